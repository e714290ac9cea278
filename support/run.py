"""A training run that can be stopped, even killed, and taken up again as if it had never stopped.

    run = Run("out/mine", options)                    a folder: run.json, log.jsonl, one checkpoint per stage
    value = run.once("name", work)                    work() is called once in the life of the run
    progress = run.stage("name", plan, module, optimizer, gradients)
    for step, rows in progress.steps(corpus, rows_of):     goes on where the stage stood
        loss = progress.compute(rows)                 as many rows at once as memory holds
        loss, norm = progress.finite(loss, norm)      after the caller has clipped the gradients
        ...                                           the caller updates the weights
        progress.done(step, loss, norm, lr)           one line of the log; sometimes a checkpoint

Of several processes (support/world.py) the first writes all files. If one is lost, each of the others saves a
checkpoint. All go on, try again and stop together.

A Probe has the interface of a Run. Its stages take a few steps on random ids, and measure speed and memory.

A plan has steps, total (tokens), length, batch, lr and rate(step). rows_of(corpus, stage, plan) returns a
function: step -> ids (batch, length + 1). corpus.advance(plan) is called when a stage has ended.
Read Run and Stage first. Memory and recordings come after them.
"""
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hypenet import write_file
from support import shard, world
from support.common import default_device, hash_file, write_json
from support.loss import fused

try:
    import fcntl
except ImportError:                                   # Windows: nothing keeps two runs out of one folder
    fcntl = None

# ---- a run -------------------------------------------------------------------------------------------------


class BrokenOff(KeyboardInterrupt):
    """A signal has ended the computation of a step's gradients. The step has changed no weight yet."""


class Run:
    """A run and its folder. run.json holds the options, all results so far, and a hash of every checkpoint.
    After Ctrl-C or SIGTERM the run writes a checkpoint of the last whole step, and the program ends.
    ValueError if another run has the folder, or if run.json is not as a run wrote it."""

    def __init__(self, folder, options):
        claimed, self.lock = claim(folder, options) if world.RANK == 0 else (folder, None)
        self.folder = world.of_first(claimed)
        self.options = options
        self.done = {}                                # results by name, see once()
        self.asked = False                            # whether a signal has asked for the end
        self.can_break = False                        # whether a signal may end the work at once
        self.tokens = 0                               # of all stages so far
        if world.of_first(os.path.exists(self.path("run.json"))):
            _, self.done = read_run(self.folder)
        self.began = time.time() - self.done.get("seconds", 0.0)
        threads = self.done.setdefault("threads", torch.get_num_threads())
        if threads != torch.get_num_threads() and default_device(options.get("device")) == "cpu":
            print(f"this run began with {threads} threads and goes on with {torch.get_num_threads()}: the "
                  "numbers can differ in their last bits from those of an unbroken run "
                  f"(OMP_NUM_THREADS={threads} gives equal numbers)", file=sys.stderr)
        self.save()
        self.handlers = {sig: signal.signal(sig, self.on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        """Give back the signals and the lock; call it in `finally`. After an error in one of several
        processes signals are ignored: torchrun sends one, and it must not cut off the message."""
        failed = world.SIZE > 1 and sys.exc_info()[0]
        for sig, handler in self.handlers.items():
            signal.signal(sig, signal.SIG_IGN if failed else handler)
        if self.lock:
            self.lock.close()

    def on_signal(self, *_):
        if self.asked:                                # the second signal ends the program at once
            raise KeyboardInterrupt
        self.asked = True
        if world.SIZE == 1:                           # torchrun signals also if another process fails
            print("\nstopping; a second signal stops at once", file=sys.stderr)
        if self.can_break:
            raise BrokenOff

    def unless_asked(self, work, at_once):
        """work(at_once), or NaN if a signal ends the work."""
        self.can_break = True
        try:
            return work(at_once)
        except BrokenOff:
            return torch.tensor(math.nan)
        finally:
            self.can_break = False

    def leave_if_asked(self):
        if world.any_of(self.asked):
            print(f"\nstopped; go on with --resume {self.folder}", file=sys.stderr)
            raise SystemExit(130)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return time.time() - self.began

    def save(self, by_all=False):
        self.done["seconds"] = self.seconds()
        if world.RANK == 0 or by_all:
            record = dict(options=self.options, done=self.done, sha256=seal(self.options, self.done))
            write_json(self.path("run.json"), record)

    def once(self, name, work):
        """The result of work(), a JSON value. A run that goes on takes the result from run.json."""
        if name not in self.done:
            self.done[name] = world.of_first(work())
            self.save()
            self.leave_if_asked()
        return self.done[name]

    def digests(self, stage):
        """The hashes that a stage's checkpoint may have: the newest one's, and while that is written the
        one's before."""
        return self.done.setdefault("checkpoints", {}).get(stage, [])

    def stage(self, name, plan, module, optimizer, gradients):
        return Stage(self, name, plan, module, optimizer, gradients)

    def log(self, **record):
        if world.RANK:
            return
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def trim_log(self, stage, step):
        """Drop the lines of a stage after this step: the run will write them again."""
        if world.RANK:
            return
        with open(self.path("log.jsonl"), "a+", encoding="utf-8") as f:
            f.seek(0)
            lines = []
            for line in f:
                try:
                    record = json.loads(line)
                except ValueError:                    # half a line: the machine went down
                    continue
                if record["stage"] != stage or record["step"] <= step:
                    lines.append(line)
        write_file(self.path("log.jsonl"), "".join(lines))


# ---- the folder of a run -----------------------------------------------------------------------------------

LOCK = ".lock"                                        # locked while a run lives; holds its process id


def new_folder(asked, default):
    """The folder of a new run: the one asked for, else default, default-2, default-3, ... ValueError if the
    folder asked for is in use or no folder."""
    folder = asked or default
    if asked and os.path.exists(asked) and not os.path.isdir(asked):
        raise ValueError(f"--out {asked} is a file; name a folder")
    if not os.path.exists(folder) or os.path.isdir(folder) and is_unused(folder):
        return folder
    if asked:
        raise ValueError(f"--out {folder} is not empty; go on with it by --resume {folder}, or name another")
    number = 2
    while os.path.exists(f"{folder}-{number}"):
        number += 1
    return f"{folder}-{number}"


def is_unused(folder):
    """Whether a folder has no files, except those that a killed run leaves before its first file is whole."""
    return all(name == LOCK or is_leftover(name) for name in os.listdir(folder))


def is_leftover(name):
    """Whether a name is that of a file that hypenet.write_file has not finished."""
    return re.search(r"\.tmp\d+$", name) is not None


def claim(folder, options):
    """Take a folder for this run alone, and remove unfinished files of a killed run. Returns the folder and
    its lock, an open file. Another run may have taken the folder since new_folder was called. This run then
    takes the next folder. ValueError instead if an option names the folder."""
    resumed = options.get("resume")
    named = resumed or options.get("out")
    default, number = re.fullmatch(r"(.*?)(?:-(\d+))?", folder, re.DOTALL).groups()
    for number in itertools.count(int(number or 1) + 1):
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")
        free = hold(lock)
        begun = os.path.exists(os.path.join(folder, "run.json")) if named else not is_unused(folder)
        if free and (resumed or not begun):
            break
        if named:
            lock.seek(0)
            holder = "" if free else f" by the process {lock.read()}"
            raise ValueError(f"the folder {folder} is in use{holder}; wait for that run, or name another")
        lock.close()
        print(f"another run has taken {folder}; this run goes to {default}-{number}")
        folder = f"{default}-{number}"
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    for path in Path(folder).rglob("*.tmp*"):
        if is_leftover(path.name):
            path.unlink()
    return folder, lock


def hold(lock):
    """Lock an open file until the file is closed or this process ends in any way. False if another process
    has locked the file. True, with a warning, if the disk has no locks."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        print(f"{lock.name} cannot be locked ({e}): start no second run in this folder", file=sys.stderr)
    return True


def seal(options, done):
    """The hash of the contents of run.json."""
    return hashlib.sha256(json.dumps([options, done]).encode()).hexdigest()


def read_run(folder):
    """The contents of run.json: the options of the run in a folder, and all results so far. ValueError if the
    folder has no run, or if run.json is not as a run wrote it."""
    try:
        with open(os.path.join(folder, "run.json"), encoding="utf-8") as f:
            record = json.load(f)
        options, done, digest = dict(record["options"]), dict(record["done"]), record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--resume {folder}: no run there (no run.json that can be read)") from None
    if digest != seal(options, done):
        raise ValueError(f"--resume {folder}: its run.json was altered or is damaged; put the file back as "
                         "it was, or start a new run")
    return options, done


def options_of(folder):
    """The options of the run in a folder; ValueError if the folder has no run."""
    return read_run(folder)[0]


# ---- a stage of training -----------------------------------------------------------------------------------


class Stage:
    """The progress of one stage. A stage that was stopped goes on from its checkpoint; a stage that has ended
    is only loaded. gradients(rows, at_once) leaves gradients in the parameters that train, and returns the
    loss as a tensor. At most at_once rows go through the model together. ValueError if the checkpoint is
    damaged, the loss is not finite, memory or disk run out, or another process ends."""

    def __init__(self, run, name, plan, module, optimizer, gradients):
        self.run = run
        self.name = name
        self.plan = plan
        self.module = module
        self.optimizer = optimizer
        self.gradients = gradients
        self.mine = -(-plan.batch // world.SIZE)      # rows of a batch that this process takes, at most
        most = 2 ** 17
        if shard.is_shared(module):
            most = shard.TOKENS
            checkpoint_blocks(module)
            if plan.batch % world.SIZE:
                raise ValueError(f"--plan {without_number(name)}.batch={plan.batch}: give a multiple of "
                                 f"{world.SIZE}, the number of GPUs that share the model")
        self.at_once = min(self.mine, run.options["micro"] or max(1, most // plan.length))
        self.first = 0                                # steps done before this process
        self.computed = 0                             # steps done in this process
        self.mean = None                              # of the loss, over about 20 steps
        self.replay = None                            # the recording of a step
        self.pause = 120.0                            # seconds between two checkpoints
        run.tokens += plan.total
        self.load()
        if not shard.is_shared(module):
            world.equalise(module.parameters())

    def load(self):
        self.file = self.run.path(f"{self.name}.pt")
        if os.path.exists(self.file):
            self.read(hash_file(self.file))
        if self.first < self.plan.steps:
            self.run.trim_log(self.name, self.first)

    def read(self, digest):
        """Load the checkpoint with the hash `digest`. ValueError unless this run wrote it for this stage."""
        saved = None
        if digest in self.run.digests(self.name):
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
        if saved is None or saved["module"].keys() != self.trained().keys():
            raise ValueError(f"{self.file} is not as this run wrote it: altered, of another run or stage, or "
                             "damaged; remove it to train this stage again")
        self.run.done["checkpoints"][self.name] = [digest]          # the other hash no longer counts
        shard.load(self.module, self.optimizer, saved)
        self.first = saved["step"]
        self.mean = saved["mean"]

    def trained(self):
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def save(self, step, by_all=False):
        """Write the checkpoint after this step. by_all: all processes write, because some may have ended."""
        state = dict(step=step, mean=self.mean, module=self.trained())
        if step < self.plan.steps:                    # after the last step nobody needs the optimizer
            state["optimizer"] = self.optimizer.state_dict()
        state = shard.whole(state)
        if world.RANK == 0 or by_all:
            self.write(state, step, by_all)
        if not by_all:
            self.run.done["checkpoints"] = world.of_first(self.run.done.get("checkpoints"))

    def write(self, state, step, by_all):
        """Write a checkpoint. ValueError if a weight is not finite, or the disk is full."""
        if not torch.stack([p.isfinite().all() for p in state["module"].values()]).all():
            raise self.not_finite("a weight is not finite", step)

        def write(tmp):
            torch.save(state, tmp)
            old = self.run.digests(self.name)[-1:]    # a kill may come before the new file has its name
            self.run.done["checkpoints"][self.name] = [*old, hash_file(tmp)]
            self.run.save(by_all)
        try:
            write_file(self.file, write)
        except (OSError, RuntimeError) as e:          # RuntimeError: from torch, on a full disk
            message = f"{self.file}: {e}; mend that (free some disk?), then --resume {self.run.folder}"
            raise ValueError(message) from None

    def not_finite(self, what, step):
        kept = f"last checkpoint {self.file}" if os.path.exists(self.file) else "no checkpoint yet"
        return ValueError(f"{self.name}: {what} at step {step}, {kept}; start anew with "
                          f"--plan {without_number(self.name)}.lr={self.plan.lr / 3:.0e}")

    def rate(self, step):
        return self.plan.rate(step)

    def steps(self, corpus, rows_of):
        """Yield (step, rows) for every step that is left. A thread makes the next rows meanwhile."""
        left = range(self.first, self.plan.steps)
        device = next(self.module.parameters()).device
        self.bar = tqdm(left, desc=f"{self.name:9s}", initial=self.first, total=self.plan.steps,
                        mininterval=0.5, dynamic_ncols=True, disable=len(left) == 0)
        self.saved_at = self.tick = time.time()
        yield from zip(self.bar, ahead(rows_of(corpus, self.name, self.plan), left, device))
        checkpoint_blocks(self.module, on=False)
        corpus.advance(self.plan)

    def compute(self, rows):
        """Leave the gradients of a batch, summed over the processes, and return the loss. The first step
        compiles, and finds how many rows fit. The third step is recorded as a CUDA graph, if `recorded` can,
        every process has a row, and the module is not shared out."""
        self.computed += 1
        if self.computed == 3 and self.plan.batch >= world.SIZE and not shard.is_shared(self.module):
            self.module.zero_grad()                   # the recording allocates gradients of its own
            work = partial(self.gradients, at_once=self.at_once)
            self.replay = recorded(work, rows, self.run.options["plain"])
            if world.any_of(self.replay is None):
                self.replay = None
        return self.together(self.first + self.computed - 1, partial(self.sums, rows))

    def sums(self, rows):
        """Gradients and loss. A signal to any process ends the run here, before the step changes a weight.
        The processes check whether any got a signal while their GPUs still compute."""
        work = partial(self.gradients, rows)
        if self.replay:
            loss = self.replay(rows)
        elif shard.is_shared(self.module):            # a step that waits for others cannot be tried again
            loss = work(self.at_once)
        else:
            work = partial(self.run.unless_asked, work)
            loss, self.at_once = within_memory(self.name, self.module, self.at_once, work)
        if world.any_of(self.run.asked):
            self.save(self.first + self.computed - 1)
            self.run.leave_if_asked()
        shared = shard.is_shared(self.module)         # then FSDP has summed the gradients
        world.add_up(loss, [] if shared else [p for p in self.module.parameters() if p.requires_grad])
        return loss

    def together(self, step, work):
        """work(), in which the processes wait for each other. ValueError if a process has ended. All others
        first write the checkpoint after this step, because process 0 may be gone. No process can write a
        shared module alone."""
        try:
            return work()
        except world.Lost as error:
            if not shard.is_shared(self.module):
                self.save(step, by_all=True)
            raise ValueError(f"{error}; go on with --resume {self.run.folder}") from None

    def finite(self, loss, norm):
        """Loss and norm of a step as numbers; ValueError if one is not finite."""
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss {loss:.3g}, gradient norm {norm:.3g}"
            raise self.not_finite(what, self.first + self.computed)
        return loss, norm

    def done(self, step, loss, norm, lr):
        """Write the log line of a step. Save a checkpoint now and then, at the end and before a stop."""
        steps = self.plan.steps
        self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
        now = time.time()
        ms = 1000 * (now - self.tick)
        self.tick = now
        self.run.log(stage=self.name, step=step + 1, loss=loss, norm=norm, lr=lr, ms=round(ms, 2))
        if (step + 1) % max(1, steps // 4) == 0 or step + 1 == steps:
            speed = 1000 * self.plan.total / steps / ms
            tqdm.write(f"{self.name:9s}{step + 1:6,}/{steps:,} | loss {self.mean:.4f} | norm {norm:.2f} | "
                       f"lr {lr:.1e} | {ms:,.0f} ms | {speed:,.0f} tok/s")
        self.bar.set_postfix_str(f"loss {self.mean:.4f}", refresh=False)
        due = world.RANK == 0 and now - self.saved_at > self.pause
        if step + 1 == steps or self.together(step + 1, lambda: world.any_of(self.run.asked, due)):
            self.save(step + 1)
            self.run.leave_if_asked()
            self.saved_at = self.tick = time.time()
            self.pause = max(self.pause, 20 * (self.saved_at - now))   # at most 5% of the time for saving


def without_number(stage):
    """The name of a stage in its plan: group2 -> group."""
    return stage.rstrip("0123456789")


def ahead(make, steps, device):
    """make(step), on the device, for each step of a range. A thread makes the next rows meanwhile."""
    def one(step):
        rows = torch.from_numpy(make(step))
        return rows.pin_memory() if device.type == "cuda" else rows
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(one, steps.start)
        for step in steps:
            rows = coming.result()                    # an error in make(step) is raised here
            if step + 1 < steps.stop:
                coming = pool.submit(one, step + 1)
            yield rows.to(device, non_blocking=True)


# ---- a probe -----------------------------------------------------------------------------------------------


class Probe:
    """Stands in for a Run, to measure the stages on this device before a run begins. found[stage] is a tuple:
    rows at once that fit, tokens per second, peak memory in GB. No weight changes, and no file is written.
    ValueError or torch.OutOfMemoryError if a stage does not fit."""

    def __init__(self, options, n_vocab):
        self.options = options
        self.n_vocab = n_vocab
        self.tokens = 0
        self.found = {}
        self.asked = False                            # a signal ends a probe at once

    def unless_asked(self, work, at_once):
        return work(at_once)

    def once(self, name, work):
        """Does nothing: a probe measures only the stages of training."""

    def stage(self, name, plan, module, optimizer, gradients):
        return ProbeStage(self, name, plan, module, optimizer, gradients)


class ProbeStage(Stage):
    """Three steps on random ids at learning rate 0. The optimizer allocates its state in the first step, so
    the later steps show how much memory the stage needs. Two more steps time the recording, if any."""

    def load(self):
        self.file = ""

    def rate(self, step):
        return 0.0

    def steps(self, corpus, rows_of):
        device = next(self.module.parameters()).device
        shape = (self.plan.batch, self.plan.length + 1)
        rows = torch.randint(self.run.n_vocab, shape, device=device)
        for step in range(5):
            if step < 3 or self.replay:
                yield step, rows[:self.at_once * world.SIZE]      # one part of a batch: all cost the same
        checkpoint_blocks(self.module, on=False)
        speed = self.at_once * world.SIZE * self.plan.length / world.of_first(self.seconds)
        self.run.found[without_number(self.name)] = (self.at_once, speed, peak_gb(device.type))

    def compute(self, rows):
        if rows.is_cuda and not self.replay:          # a replay allocates nothing
            torch.cuda.reset_peak_memory_stats(rows.device)
        self.began = time.time()
        return super().compute(rows)

    def finite(self, loss, norm):
        found = super().finite(loss, norm)
        self.seconds = time.time() - self.began
        return found

    def together(self, step, work):
        return work()

    def done(self, step, loss, norm, lr):
        """A probe has no log."""


# ---- memory ------------------------------------------------------------------------------------------------


def bf16():
    """Autocast to bfloat16 on CUDA; on other devices it does nothing. Each weight is used once, so a cache
    would only keep the copies of all weights."""
    return torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available(), cache_enabled=False)


def checkpoint_blocks(module, on=True):
    """Let each block of a model keep only its input. The backward pass computes the rest again."""
    for block in getattr(module, "blocks", []):
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        else:
            vars(block).pop("forward", None)


def checkpointed(module):
    """Whether the blocks of a model are checkpointed."""
    return any("forward" in vars(block) for block in getattr(module, "blocks", []))


def within_memory(stage, module, at_once, work):
    """work(at_once), and the number of rows at once that fit. If memory runs out, half the rows are tried. If
    one row is too many, the blocks are checkpointed. work has changed no weight yet, so a second try gives
    the same result. If one process must try again, all do."""
    while True:
        try:
            found = work(at_once)
        except torch.OutOfMemoryError:
            found = None                              # memory is freed only after the handler
        if not world.any_of(found is None):
            return found, at_once
        module.zero_grad()
        torch.cuda.empty_cache()
        if at_once > 1:
            at_once = (at_once + 1) // 2
        elif getattr(module, "blocks", []) and not checkpointed(module):
            checkpoint_blocks(module)
        else:
            raise ValueError(f"{stage}: one sequence exceeds the memory; give --plan {without_number(stage)}"
                             ".length a lower value, or take a smaller --teacher")
        tqdm.write(f"{stage}: out of memory; on with {at_once} rows at once"
                   + ", blocks checkpointed" * checkpointed(module))


def by_slices(work, n_vocab, *tensors, elements=None):
    """[work(slice of each tensor), ...]. The tensors (N,...) are cut along their tokens, so that the logits
    of a slice have about `elements` elements."""
    n = max(1, (elements or (2 ** 27 if tensors[0].is_cuda else 2 ** 24)) // n_vocab)
    slices = [t.split(n) for t in tensors]
    return [work(*part) for part in zip(*slices)]


def loss_by_slices(work, weight, xs, *others, elements=None):
    """The loss of tokens xs (N,C) behind a head with weight (V,C), as a sum over slices of n tokens.
    work(logits, slices of others) returns a slice's loss and its gradient with respect to the logits (n,V).
    All logits together may need more memory than the model. So each slice's gradient goes on to xs and the
    weight at once, and its logits are freed."""
    if elements is None and fused(xs):
        elements = 2 ** 29                            # the kernel makes no copies of the logits
    return SlicedLoss.apply(work, elements, weight, xs, *others)


class SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, elements, weight, xs, *others):
        train_weight, train_xs = ctx.needs_input_grad[2:4]
        autocast = xs.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocast else xs.dtype
        w = weight.to(dtype)
        losses, dxs, dweight = [], [], None

        def one(x, *others):
            nonlocal dweight
            loss, dlogits = work(F.linear(x, w), *others)
            losses.append(loss)
            if train_xs:
                dxs.append(dlogits @ w)
            if train_weight and dweight is None:
                dweight = (dlogits.T @ x).to(weight.dtype)
            elif train_weight:
                dweight += dlogits.T @ x
        by_slices(one, len(weight), xs.to(dtype), *others, elements=elements)
        ctx.grads = dweight, torch.cat(dxs).to(xs.dtype) if train_xs else None
        ctx.n_others = len(others)
        return sum(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = [g if g is None else g.mul_(grad) for g in ctx.grads]    # in place: no second copy
        ctx.grads = None
        return None, None, *grads, *[None] * ctx.n_others


@lru_cache
def side_stream(device):
    return torch.cuda.Stream(device)


def beside(x, first, second):
    """first() and second(), each a list of tensors on the device of x. On a GPU both run at the same time,
    because one of them often waits for memory while the other multiplies."""
    if not x.is_cuda:
        return first(), second()
    main, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        b = second()
    a = first()
    main.wait_stream(side)
    for tensor in b:
        tensor.record_stream(main)
    return a, b


def peak_gb(device):
    """Peak memory in GB of the GPU, or of this process on a CPU. None if the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        from resource import RUSAGE_SELF, getrusage   # not on Windows
    except ImportError:
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- recording ---------------------------------------------------------------------------------------------


def recorded(work, rows, plain=False):
    """work, a function of rows, as a CUDA graph for rows of this shape. The step of a small model launches a
    thousand kernels, and to launch them takes longer than to run them. A replay overwrites the gradients, and
    does not add to them. None without CUDA, if `plain` is asked for, or if memory has no room for a second
    copy of all that this process holds in it."""
    if not rows.is_cuda or plain:
        return None
    held = torch.cuda.memory_reserved(rows.device)
    torch.cuda.empty_cache()
    if held > torch.cuda.mem_get_info(rows.device)[0]:
        return None
    graph = torch.cuda.CUDAGraph()
    still = rows.clone()                              # a graph reads its input at one address
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):   # a thread pins memory meanwhile
        result = work(still)

    def replay(rows):
        still.copy_(rows)
        graph.replay()
        return result
    return replay
