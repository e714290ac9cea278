"""A training run that can be stopped, even killed, and taken up again as if it had never stopped.

    run = Run("out/mine", options)                    a folder: run.json, log.jsonl, one checkpoint per stage
    value = run.once("name", work)                    work() is called once in the life of the run
    progress = run.stage("name", plan, module, optimizer, gradients)
    for step, rows in progress.steps(corpus, rows_of):     goes on where the stage stood
        loss, norm = progress.compute(rows)           as many rows at once as memory holds
        ...                                           the caller updates the weights
        progress.done(step, loss, norm, lr)           one line of the log; sometimes a checkpoint

A Probe has the interface of a Run. Its stages take a few steps on random ids, and measure what they cost.

A plan has steps, total (tokens), length, batch, lr, lr_end and rate(step). rows_of(corpus, stage, plan) is a
function step -> ids (batch, length + 1). corpus.advance(plan) is called when a stage has ended.
Read Run and Stage first. Memory, recordings and estimates come after them.
"""
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hypenet import write_file
from support.common import default_device, hash_file, write_json

try:
    import fcntl
except ImportError:                                   # Windows: nothing keeps two runs out of one folder
    fcntl = None

# ---- a run -------------------------------------------------------------------------------------------------


class Run:
    """A run and its folder. run.json holds the options, the results of what is done, and a hash of every
    checkpoint. After Ctrl-C or SIGTERM the training step in progress ends, a checkpoint is written, then the
    program leaves. ValueError if another run has the folder, or run.json is not as it was written."""

    def __init__(self, folder, options):
        self.folder, self.lock = claim(folder, options)
        self.options = options
        self.done = {}                                # results by name, see once()
        self.stop = False                             # whether a signal has asked for the end
        self.tokens = 0                               # of all stages so far
        if os.path.exists(self.path("run.json")):
            _, self.done = read_run(self.folder)
        self.began = time.time() - self.done.get("seconds", 0.0)
        threads = self.done.setdefault("threads", torch.get_num_threads())
        if threads != torch.get_num_threads() and default_device(options.get("device")) == "cpu":
            print(f"this run began with {threads} threads and goes on with {torch.get_num_threads()}: its "
                  f"numbers are not bit for bit those of an unbroken run (OMP_NUM_THREADS={threads} gives "
                  "those)", file=sys.stderr)
        self.save()
        self.handlers = {sig: signal.signal(sig, self.on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)
        self.lock.close()

    def on_signal(self, *_):
        if self.stop:                                 # the second signal ends the program at once
            raise KeyboardInterrupt
        self.stop = True
        print("\nstopping after this step or measurement; a second signal stops at once", file=sys.stderr)

    def leave_if_asked(self):
        if self.stop:
            print(f"\nstopped; go on with --resume {self.folder}", file=sys.stderr)
            raise SystemExit(130)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return time.time() - self.began

    def save(self):
        self.done["seconds"] = self.seconds()
        record = dict(options=self.options, done=self.done, sha256=seal(self.options, self.done))
        write_json(self.path("run.json"), record)

    def once(self, name, work):
        """The result of work(), a JSON value. A run that goes on takes the result from run.json."""
        if name not in self.done:
            self.done[name] = work()
            self.save()
            self.leave_if_asked()
        return self.done[name]

    def digests(self, stage):
        """The hashes that a stage's checkpoint may have: that of the newest, and of the one before."""
        return self.done.setdefault("checkpoints", {}).get(stage, [])

    def stage(self, name, plan, module, optimizer, gradients):
        return Stage(self, name, plan, module, optimizer, gradients)

    def log(self, **record):
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def trim_log(self, stage, step):
        """Drop the lines of a stage after this step: the run will write them again."""
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

LOCK = ".lock"                                        # held while a run lives; the number of its process


def new_folder(asked, default):
    """The folder of a new run: the one asked for, else default, default-2, default-3, ... ValueError if the
    folder asked for is in use."""
    folder = asked or default
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--out {folder} is a file; name a folder")
    if not os.path.isdir(folder) or is_unused(folder):
        return folder
    if asked:
        raise ValueError(f"--out {folder} is not empty; go on with it by --resume {folder}, or name another")
    number = 2
    while os.path.exists(f"{folder}-{number}"):
        number += 1
    return f"{folder}-{number}"


def is_unused(folder):
    """Whether a folder has no file but what a killed run leaves before its first file is whole."""
    return all(name == LOCK or is_leftover(name) for name in os.listdir(folder))


def is_leftover(name):
    """Whether a file is one that hypenet.write_file had not finished."""
    return re.search(r"\.tmp\d+$", name) is not None


def claim(folder, options):
    """Take a folder for this run alone, and remove what a killed run left there. Returns the folder and its
    lock, an open file. If no option names the folder, and another run has taken it since new_folder was
    called, the next folder is taken. ValueError if the folder that an option names is taken."""
    resumed = options.get("resume")
    named = resumed or options.get("out")
    default = re.sub(r"-\d+$", "", folder)
    for number in itertools.count(2):
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")
        free = hold(lock)
        begun = os.path.exists(os.path.join(folder, "run.json")) if named else not is_unused(folder)
        if free and (resumed or not begun):
            break
        if named:
            lock.seek(0)
            holder = "" if free else f" by the process {lock.read()}"
            raise ValueError(f"the folder {folder} is in use{holder}; wait for its end, or name another")
        lock.close()
        print(f"another run has taken {folder}; this one goes to {default}-{number}")
        folder = f"{default}-{number}"
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    for path in Path(folder).rglob("*.tmp*"):
        if is_leftover(path.name):
            path.unlink()
    return folder, lock


def hold(lock):
    """Lock an open file until it is closed or this process ends, however it ends. False if another process
    holds it. A disk without locks is taken as free."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        print(f"{lock.name} cannot be locked ({e}): start no second run in this folder", file=sys.stderr)
    return True


def seal(options, done):
    """The hash of what run.json holds."""
    return hashlib.sha256(json.dumps([options, done]).encode()).hexdigest()


def read_run(folder):
    """What run.json holds: the options of the run in a folder, and what is done. ValueError if the folder has
    no run, or run.json is not as a run wrote it."""
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
    is only loaded. gradients(rows, at_once) leaves gradients in the parameters that train, computed from so
    many rows at once, and returns (loss, norm) as a tensor (2,). ValueError if the checkpoint is damaged, the
    loss is not finite, or memory or disk run out."""

    def __init__(self, run, name, plan, module, optimizer, gradients):
        self.run = run
        self.name = name
        self.plan = plan
        self.module = module
        self.optimizer = optimizer
        self.gradients = gradients
        self.at_once = run.options["micro"] or min(plan.batch, max(1, 2 ** 17 // plan.length))
        self.first = 0                                # steps done before this process
        self.computed = 0                             # steps done in this process
        self.mean = None                              # of the loss, over about 20 steps
        self.replay = None                            # the recording of a step
        self.pause = 120.0                            # seconds between two checkpoints
        run.tokens += plan.total
        self.load()

    def load(self):
        self.file = self.run.path(f"{self.name}.pt")
        if os.path.exists(self.file):
            self.read(hash_file(self.file))
        if self.first < self.plan.steps:
            self.run.trim_log(self.name, self.first)

    def read(self, digest):
        """Take up the checkpoint, whose hash is `digest`, if it is what this run wrote for this stage."""
        known = digest in self.run.digests(self.name)
        saved = torch.load(self.file, map_location="cpu", weights_only=True) if known else dict(module={})
        if saved["module"].keys() != self.trained().keys():
            raise ValueError(f"{self.file} is not as this run wrote it: altered, of another run or stage, or "
                             "damaged; remove it to train this stage again")
        self.run.done["checkpoints"][self.name] = [digest]          # the only one that counts from here on
        self.module.load_state_dict(saved["module"], strict=False)
        self.first = saved["step"]
        self.mean = saved["mean"]
        if self.first < self.plan.steps:
            self.optimizer.load_state_dict(saved["optimizer"])

    def trained(self):
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def save(self, step):
        trained = self.trained()
        if not torch.stack([p.isfinite().all() for p in trained.values()]).all():
            raise self.not_finite("a weight is not finite", step)
        state = dict(step=step, mean=self.mean, module=trained)
        if step < self.plan.steps:                    # after the last step nobody needs the optimizer
            state["optimizer"] = self.optimizer.state_dict()

        def write(tmp):
            torch.save(state, tmp)
            old = self.run.digests(self.name)[-1:]    # a kill may come before the new file has its name
            self.run.done["checkpoints"][self.name] = [*old, hash_file(tmp)]
            self.run.save()
        try:
            write_file(self.file, write)
        except (OSError, RuntimeError) as e:          # RuntimeError: torch's own on a full disk
            message = f"{self.file}: {e}; free some disk, then --resume {self.run.folder}"
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
        """Gradients of a batch; returns loss and norm. The first step compiles what there is to compile, and
        finds how many rows fit; the third is recorded. ValueError if loss or norm is not finite."""
        self.computed += 1
        if self.computed == 3 and self.at_once >= self.plan.batch:
            self.module.zero_grad()                   # the recording allocates gradients of its own
            work = partial(self.gradients, at_once=self.at_once)
            self.replay = recorded(work, rows, self.run.options["plain"])
        if self.replay:
            result = self.replay(rows)
        else:
            work = partial(self.gradients, rows)
            result, self.at_once = within_memory(self.name, self.module, self.at_once, work)
        loss, norm = result.tolist()
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
        if step + 1 == steps or self.run.stop or now - self.saved_at > self.pause:
            self.save(step + 1)
            self.run.leave_if_asked()
            self.saved_at = self.tick = time.time()
            self.pause = max(self.pause, 20 * (self.saved_at - now))   # at most 5% of the time for saving


def without_number(stage):
    """The name of a stage in its plan: group2 -> group."""
    return stage.rstrip("0123456789")


def ahead(make, steps, device):
    """make(step) on the device for each of a range of steps; a thread makes the next one meanwhile."""
    def one(step):
        rows = torch.from_numpy(make(step))
        return rows.pin_memory() if device.type == "cuda" else rows
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(one, steps.start)
        for step in steps:
            rows = coming.result()                    # raises here what making the rows raised
            if step + 1 < steps.stop:
                coming = pool.submit(one, step + 1)
            yield rows.to(device, non_blocking=True)


# ---- a probe -----------------------------------------------------------------------------------------------


class Probe:
    """Stands in for a Run, to measure the stages on this device before a run begins. found[stage] is a tuple:
    rows at once that fit, tokens a second, peak memory in GB. No weight changes, and no file is written.
    ValueError or torch.OutOfMemoryError if a stage does not fit."""

    def __init__(self, options, n_vocab):
        self.options = options
        self.n_vocab = n_vocab
        self.tokens = 0
        self.found = {}

    def once(self, name, work):
        """A probe measures stages alone."""

    def stage(self, name, plan, module, optimizer, gradients):
        return ProbeStage(self, name, plan, module, optimizer, gradients)


class ProbeStage(Stage):
    """Three steps on random ids at learning rate 0. The optimizer allocates its state in the first step, so
    the later steps show what memory the stage needs. Two more steps time a recording."""

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
                yield step, rows[:self.at_once]       # one part of a batch: the others cost the same
        checkpoint_blocks(self.module, on=False)
        speed = self.at_once * self.plan.length / self.seconds
        self.run.found[without_number(self.name)] = (self.at_once, speed, peak_gb(device.type))

    def compute(self, rows):
        if rows.is_cuda and not self.replay:          # a replay allocates nothing
            torch.cuda.reset_peak_memory_stats(rows.device)
        began = time.time()
        loss, norm = super().compute(rows)
        self.seconds = time.time() - began
        return loss, norm

    def done(self, step, loss, norm, lr):
        """A probe has no log."""


# ---- memory ------------------------------------------------------------------------------------------------


def bf16():
    """Autocast to bfloat16 on CUDA; on other devices it does nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def checkpoint_blocks(module, on=True):
    """Let each block of a model keep its input alone; the backward pass computes the rest again."""
    for block in getattr(module, "blocks", []):
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        else:
            vars(block).pop("forward", None)


def checkpointed(module):
    """Whether the blocks of a model are checkpointed."""
    blocks = getattr(module, "blocks", [])
    return len(blocks) > 0 and "forward" in vars(blocks[0])


def within_memory(stage, module, at_once, work):
    """work(at_once), and the rows at once that fitted. Where memory runs out, half the rows are tried; at one
    row the blocks are checkpointed. work has changed no weight yet, so a second try gives the same result."""
    while True:
        try:
            return work(at_once), at_once
        except torch.OutOfMemoryError:
            pass                                      # memory is freed only after the handler
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
    """[work(slice of each tensor)] for slices of the tokens (N,...), each with about `elements` logits."""
    n = max(1, (elements or (2 ** 27 if tensors[0].is_cuda else 2 ** 24)) // n_vocab)
    slices = [t.split(n) for t in tensors]
    return [work(*part) for part in zip(*slices)]


def loss_by_slices(work, n_vocab, weight, xs, *others, elements=None):
    """The sum of work(weight, slice of xs, slices of others): a loss of tokens xs (N,C) behind a head, whose
    weight is (n_vocab,C). All logits (N,n_vocab) may need more memory than the model. So the gradient of a
    slice is taken as soon as its loss is known, and its logits are dropped."""
    return SlicedLoss.apply(work, n_vocab, elements, weight, xs, *others)


class SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, n_vocab, elements, weight, xs, *others):
        weight = weight.detach().requires_grad_(ctx.needs_input_grad[3])
        xs = xs.detach()

        def one(x, *others):
            x.requires_grad_(ctx.needs_input_grad[4])
            with torch.enable_grad():
                loss = work(weight, x, *others)
            if loss.requires_grad:
                loss.backward()
            return loss.detach(), x.grad
        losses, grads = zip(*by_slices(one, n_vocab, xs, *others, elements=elements))
        ctx.grads = weight.grad, torch.cat(grads) if ctx.needs_input_grad[4] else None
        ctx.n_others = len(others)
        return sum(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = [g if g is None else g.mul_(grad) for g in ctx.grads]
        ctx.grads = None                              # in place, so that no second copy is made
        return None, None, None, *grads, *[None] * ctx.n_others


def peak_gb(device):
    """Peak memory in GB of the GPU, or of this process; None where the system does not tell."""
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
    thousand kernels, and launching them costs more time than running them. A replay writes all gradients
    anew. None on other devices, if `plain` is asked for, or if memory has no room for a second copy of all
    that it holds."""
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


# ---- options -----------------------------------------------------------------------------------------------


def refuse(rows):
    """ValueError with the message of the first of rows (wrong, message) that is wrong."""
    for wrong, message in rows:
        if wrong:
            raise ValueError(message)


def teacher_argv(args):
    """The command line that trains the teacher of a run, or goes on with it."""
    argv = ["--device", args.device]
    if os.path.exists(os.path.join(args.path, "run.json")):
        return [*argv, "--resume", args.path]
    argv += ["--pretrain", "--teacher", args.teacher, "--out", args.path, "--seed", str(args.seed)]
    argv += ["--dry-run"] * args.dry_run + ["--plain"] * args.plain
    argv += ["--data", *args.data] if args.data else []
    plan = [item for item in args.plan if item.startswith("pretrain.")]
    return argv + (["--plan", *plan] if plan else [])


# ---- what a run will cost ----------------------------------------------------------------------------------


def check_disk(folder, gigabytes):
    """ValueError if the disk of a folder, which need not exist yet, has less room."""
    parent = next(p for p in (Path(folder).absolute() / "x").parents if p.exists())
    free = shutil.disk_usage(parent).free / 1e9
    if gigabytes > free:
        raise ValueError(f"checkpoints and student need {gigabytes:.0f} GB of disk, {parent} has {free:.0f}; "
                         "let --out name a folder on a larger one")


def cpu_hours(params, tokens):
    """A guess at the hours that training takes on this CPU: 8 operations per parameter and token, at half the
    rate of a large matrix product."""
    a, b = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    rate = 2 * 1024 ** 3 / min(seconds)
    return 8 * params * tokens / (rate / 2) / 3600


def change_plans(plans, items):
    """Change entries of plans, in place, by items STAGE.FIELD=X."""
    for item in items:
        key, _, value = item.partition("=")
        stage, _, field = key.partition(".")
        types = {f.name: f.type for f in fields(next(iter(plans.values())))}
        if stage not in plans or field not in types:
            raise ValueError(f"--plan {item}: STAGE is one of {', '.join(plans)}; FIELD one of "
                             + ", ".join(types))
        try:
            plans[stage] = replace(plans[stage], **{field: types[field](float(value))})
        except (ValueError, OverflowError):
            raise ValueError(f"--plan {item}: {value!r} is no number") from None


def read_set(items, known):
    """The items FIELD=X of --set as a dict; X is JSON, or else a string."""
    changes = {}
    for item in items:
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"--set {item}: fields are {', '.join(known)}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    return changes


def print_plan(corpus, plans, found):
    """The text of a run, and a row for each stage: with the findings of a Probe also memory, speed, time."""
    total = sum(plan.total for plan in plans.values())
    for paths, share, source in zip(corpus.paths, corpus.shares, corpus.sources):
        n = sum(source.sizes)
        read = share * total
        rounds = f" ({read / n:.1f} rounds, each in a new order)" if read > n else ""
        print(f"text {' '.join(paths)}: {n:,} tokens to train on, of which this run reads {read:,.0f}{rounds}"
              f"; {len(source.held_out):,} held out")
    seconds = sum(plan.total / found[name][1] for name, plan in plans.items()) if found else 0
    unit, in_unit = ("hours", 3600) if seconds >= 3600 else ("minutes", 60)
    header = f"{'stage':9s}{'tokens':>14s}{'steps':>8s}{'length':>7s}{'batch':>7s}  learning rate"
    print(header + f"{'at once':>9s}{'peak GB':>9s}{'tok/s':>11s}{unit:>9s}" * bool(found))
    for name, plan in plans.items():
        row = f"{name:9s}{plan.total:14,}{plan.steps:8,}{plan.length:7,}{plan.batch:7,}"
        row += f"  {f'{plan.lr:.0e}->{plan.lr_end:.0e}':13s}"
        if found:
            at_once, speed, peak = found[name]
            row += f"{at_once:9,}{peak:9.1f}{speed:11,.0f}{plan.total / speed / in_unit:9.2f}"
        print(row.rstrip())
    if found:
        print(f"{seconds / in_unit:.1f} {unit} in all, without measuring. at once: sequences of a batch that "
              "go through\ntogether; the others follow, with the same result")
    print(flush=True)
