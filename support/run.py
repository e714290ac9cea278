"""A run: its folder, log, checkpoints, signals, memory, graphs."""
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from support.common import write_json, write_text


def bf16():
    """Autocast for CUDA; elsewhere it does nothing."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


class Run:
    """A folder that a run lives in and can be taken up from. run.json holds its options and the results of
    what is done; a stop (Ctrl-C, SIGTERM) waits for the training step to end, then saves."""

    def __init__(self, folder, options):
        self.folder, self.options, self.done = folder, options, {}
        self.stop, self.tokens = False, 0                 # tokens: of all stages so far
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(self.path("run.json")):
            with open(self.path("run.json"), encoding="utf-8") as f:
                self.done = json.load(f)["done"]
        self.began = time.time() - self.done.get("seconds", 0.0)
        self.save()
        self.handlers = {sig: signal.signal(sig, self.on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)

    def on_signal(self, *_):
        if self.stop:                                     # asked twice: at once
            raise KeyboardInterrupt
        self.stop = True
        print("\nstopping after this step or measurement; once more: at once", file=sys.stderr)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return time.time() - self.began

    def save(self):
        self.done["seconds"] = self.seconds()
        write_json(self.path("run.json"), dict(options=self.options, done=self.done))

    def log(self, **record):
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def forget(self, stage, step):
        """Drop the log lines of a stage past a step: they will be written again."""
        with open(self.path("log.jsonl"), "a+", encoding="utf-8") as f:
            f.seek(0)
            lines = []
            for line in f:
                try:
                    r = json.loads(line)
                except ValueError:                         # cut off when the machine went down
                    continue
                if r["stage"] != stage or r["step"] <= step:
                    lines.append(line)
        write_text(self.path("log.jsonl"), "".join(lines))

    def once(self, name, work):
        """The result of work(), a JSON value: computed once in the life of a run."""
        if name not in self.done:
            self.done[name] = work()
            self.save()
            self.leave_if_asked()
        return self.done[name]

    def leave_if_asked(self):
        if self.stop:
            print(f"\nstopped; go on with: python halo.py --resume {self.folder}", file=sys.stderr)
            raise SystemExit(130)


def ahead(make, steps, device):
    """make(step) on the device for each of a range of steps; a thread makes the next one meanwhile."""
    def one(step):
        rows = torch.from_numpy(make(step))
        return rows.pin_memory() if device.type == "cuda" else rows
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(one, steps.start)
        for step in steps:
            rows = coming.result()                                 # or the error that making it met
            if step + 1 < steps.stop:
                coming = pool.submit(one, step + 1)
            yield rows.to(device, non_blocking=True)


def checkpoint_blocks(module, on=True):
    """Let each block of a model keep its input alone, and make the rest again in the backward pass."""
    for block in getattr(module, "blocks", []):
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        else:
            vars(block).pop("forward", None)


def fitted(stage, module, micro, work):
    """work(micro), and the micro that fitted: where memory runs out it is halved, at one row blocks are
    checkpointed. A step is a function of its number and has changed no weight yet, so it can be repeated."""
    while True:
        try:
            return work(micro), micro
        except torch.OutOfMemoryError:
            pass                                                   # freed only once the handler is left
        module.zero_grad()
        torch.cuda.empty_cache()
        blocks = getattr(module, "blocks", [])
        if micro > 1:
            micro = (micro + 1) // 2
        elif blocks and "forward" not in vars(blocks[0]):
            checkpoint_blocks(module)
        else:
            raise ValueError(f"{stage}: one sequence exceeds the memory; give --plan {stage}.length a lower "
                             "value, a smaller --teacher, or --recipe article")
        tqdm.write(f"{stage}: out of memory; on with {micro} rows at once"
                   + ", blocks checkpointed" * (bool(blocks) and "forward" in vars(blocks[0])))


def recorded(work, rows, options):
    """work, a function of rows, as a CUDA graph for rows of this shape: a small model's step is a thousand
    launches, which cost the host more than the card. A replay writes gradients anew. None on other devices,
    with --plain or --fade (which changes the kernels of stage 2), or if memory has no room for as much as it
    holds now."""
    if not rows.is_cuda or options["plain"] or options["fade"]:
        return None
    held = torch.cuda.memory_reserved(rows.device)
    torch.cuda.empty_cache()
    if held > torch.cuda.mem_get_info(rows.device)[0]:
        return None
    graph, still = torch.cuda.CUDAGraph(), rows.clone()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):      # a thread pins memory meanwhile
        out = work(still)

    def replay(rows):
        still.copy_(rows)
        graph.replay()
        return out
    return replay


def peak_gb(device):
    """Peak memory of this process, or of the GPU it used, in GB; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        from resource import RUSAGE_SELF, getrusage       # not on Windows
    except ImportError:
        return None
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
