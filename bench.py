"""Measure speed, memory and recall of HypeNets beside the models that a user would pick instead.

    python bench.py decode     milliseconds per generated token, after contexts of up to a million tokens
    python bench.py prefill    seconds and memory to read such contexts
    python bench.py when       the context from which on the hybrid is the better choice
    python bench.py train      a training step of every stage at a real size: tokens/s, memory, utilisation
    python bench.py kernel     the scan of kernel.py beside flash-linear-attention and softmax attention
    python bench.py niah       what a student and its teacher recall and predict far past the trained length
    python bench.py ablate     one distillation for every single change of a recipe
    python bench.py text       seconds and memory until a large text gives its first batch
    python bench.py figure     draw results/decode.png again from the rows of decode

Three models are compared: the paper's hybrid, its teacher, and the article's hybrid. The teacher is all
attention and runs the same code. The article's hybrid has a window of 2,048 tokens. Weights and states are
random numbers, because no time depends on them.

Every table is printed row by row and kept in results/ with the name of the device. A run that is cut off
keeps its rows. A row that is measured again replaces the older row. A model that does not fit in memory gets
a row too: "memory" in the table, null in the file.
"""
import argparse
import bisect
import contextlib
import gc
import glob
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see halo.py
if __name__ == "__main__":                       # Ctrl-C prints no traceback while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import halo  # noqa: E402
from hypenet import FAMILIES, HypeNet, HypeNetConfig, State, write_file  # noqa: E402
from kernel import chunked_scan  # noqa: E402
from support import fast, pretrained  # noqa: E402
from support.common import (  # noqa: E402
    Parser, command_line, default_device, file_name, filled, number, read_json, write_json)
from support.recall import TASKS, answers, has_room, recall  # noqa: E402
from support.run import (  # noqa: E402
    Probe, ProbeStage, bf16, checkpoint_blocks, checkpointed, peak_gb)
from support.text import Corpus, documents, stdlib_files  # noqa: E402
from support.tokens import Tokenizer  # noqa: E402

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")

# ---- models and their floors -------------------------------------------------------------------------------


class Size(NamedTuple):
    title: str
    teacher: HypeNetConfig
    layers: str = "even"             # of the hybrid: letters, or a way to choose them (halo.choose_layers)
    contexts: tuple = (4096, 32768, 131072, 524288, 1048576)
    batches: tuple = ()              # more (batch, context) for decode; batch 0: the largest that fits
    kinds: tuple = ("hybrid", "teacher")


ALL = ("hybrid", "teacher", "article")
QWEN3 = dict(n_kv_head=8, head_dim=128, vocab_size=151936, max_len=40960, rope_theta=1e6, **FAMILIES["qwen3"])
SIZES = {
    "2b": Size("HypeNet-2B / Qwen3-1.7B", HypeNetConfig(
        "A" * 28, n_embd=2048, n_head=16, n_hidden=6144, **QWEN3), layers="LLAALLALAALLLLLLLLLLLALLLALL",
        batches=((32, 4096), (0, 65536)), kinds=ALL),
    "gpt2-xl": Size("GPT-2 XL", HypeNetConfig(
        "A" * 48, n_embd=1600, n_head=25, n_kv_head=25, head_dim=64, n_hidden=6400, vocab_size=50257,
        max_len=1024, **FAMILIES["gpt2"])),
    "llama-1b": Size("Llama 3.2-1B", HypeNetConfig(
        "A" * 16, n_embd=2048, n_head=32, n_kv_head=8, head_dim=64, n_hidden=8192, vocab_size=128256,
        max_len=131072, rope_theta=5e5, **FAMILIES["llama"])),
    "14b": Size("Qwen3-14B", HypeNetConfig(
        "A" * 40, n_embd=5120, n_head=40, n_hidden=17408, tied=False, **QWEN3),
        contexts=(32768, 131072, 524288)),
    "tiny": Size("the tiny teacher", halo.TEACHERS["tiny"], kinds=ALL, contexts=(256, 1024),
                 batches=((4, 256), (0, 1024))),
}


def recipe(name, **changes):
    """The options of halo.py under a recipe."""
    return argparse.Namespace(**{**vars(halo.get_args([])), **halo.RECIPES[name], "changes": {}, **changes})


def config_of(size, kind):
    """The config of the paper's hybrid, the article's hybrid or the teacher. A teacher with learned positions
    runs without them, because their table would limit its context. That saves one addition per token."""
    s = SIZES[size]
    if kind == "teacher":
        return replace(s.teacher, attn_position=s.teacher.position == "rope")
    args = recipe("article" if kind == "article" else "paper", max_ctx=2 * s.contexts[-1])
    layers = halo.choose_layers("ends" if kind == "article" else s.layers, len(s.teacher.layers))
    config = halo.student_config(s.teacher, layers, args)
    return replace(config, logit_base=500.0 if kind == "hybrid" else None)


def dtype_on(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(config, device):
    with torch.device(device):
        return HypeNet(config).to(dtype_on(device)).requires_grad_(False).eval()


def models(args, device):
    """Yield (size, kind, config, model) for all of --size and --kind. A model that does not fit is None."""
    for size in args.size:
        for kind in args.kind or SIZES[size].kinds:
            config = config_of(size, kind)
            release()
            yield size, kind, config, attempt(partial(build, config, device))


def weigh(config, batch, context, dtype):
    """Bytes that one decoded token of every row must move, and bytes that must be held. Moved are the weights
    once, S twice (read and written) and the K/V of the context. A table that is only looked up in counts as
    held, not as moved."""
    with torch.device("meta"):
        model = HypeNet(config)
    looked_up = 0
    for module in model.modules():
        is_head = config.tied and module is model.wte
        if isinstance(module, nn.Embedding) and not is_head:
            looked_up += module.weight.numel()
    S, KV = State(config, batch, context, "meta", dtype).nbytes()
    weights = model.n_params() * dtype.itemsize
    return weights - looked_up * dtype.itemsize + 2 * S + KV, weights + S + KV


def operations(config, T, part=""):
    """Operations of a forward pass over T tokens: of the Linears with `part` in their names, and of softmax
    attention. A Linear has 2 per weight and token, attention 4 per channel, query and visible key. The head,
    norms and scan are not counted: they are under 2% of the rest."""
    with torch.device("meta"):
        blocks = HypeNet(config).blocks
    linears = [(name, m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for name, m in linears if part in name)
    W = min(T, config.window or T)                       # the first W queries see 1, 2, ... W keys
    pairs = W * (W + 1) // 2 + (T - W) * W
    return 2 * T * weights, 4 * config.n_head * config.head_dim * pairs * config.layers.count("A")


# ---- measuring ---------------------------------------------------------------------------------------------


def milliseconds(f, device, warm=2, repeat=20, flush=True):
    """Median time of f() in ms. On a GPU `flush` overwrites the cache before each call. The calls are queued,
    so that the host's time hides behind the card's, as it does in training."""
    for _ in range(warm):
        f()
    if device.type != "cuda":
        return statistics.median(1000 * once(f, device)[0] for _ in range(3))
    scratch = torch.empty(2 ** 28 if flush else 0, dtype=torch.int8, device=device)
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeat)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeat)]
    torch.cuda.synchronize(device)
    for begin, end in zip(begins, ends):
        scratch.zero_()
        begin.record()
        f()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in zip(begins, ends))


def once(f, device):
    """Seconds that f() takes, and the GB that it needs at its peak beyond what was there (CPU: None)."""
    if device.type != "cuda":
        began = time.perf_counter()
        f()
        return time.perf_counter() - began, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    f()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began, (torch.cuda.max_memory_allocated(device) - before) / 1e9


def profiled(title, f):
    """Run f() and print the kernels that its time goes to."""
    with torch.profiler.profile() as profile:
        f()
    events = profile.key_averages()
    times = [(e.self_device_time_total, e) for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    times = times or [(e.self_cpu_time_total, e) for e in events]
    print(f"\n{title}\n{'ms':>10s}{'calls':>7s}{'us/call':>10s}  kernel")
    for us, e in sorted(times, key=lambda pair: -pair[0])[:16]:
        print(f"{us / 1000:10.3f}{e.count:7d}{us / e.count:10.1f}  {e.key[:70]}")
    print(flush=True)


def copy_rate(device):
    """Bytes per second, read and written, of a large copy."""
    a = torch.empty(2 ** (32 if device.type == "cuda" else 26), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a), device) / 1000)


def matmul_rate(device):
    """Operations per second of a large matrix product, in the dtype of the models."""
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device, dtype=dtype_on(device))
    return 2 * n ** 3 / (milliseconds(lambda: a @ b, device) / 1000)


def attention_rate(config, device):
    """Operations per second of causal attention with a model's heads, and the fastest backend's name."""
    H, D = config.n_head, config.head_dim
    T = 16384 if device.type == "cuda" else 512
    q, k, v = torch.randn(3, 1, H, T, D, device=device, dtype=dtype_on(device))
    rates = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)), warnings.catch_warnings():
                warnings.simplefilter("ignore")          # they say why a backend declines
                ms = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)
            rates[name.split("_")[0].lower()] = 4 * H * D * (T * (T + 1) / 2) / (ms / 1000)
        except RuntimeError:                             # not for this device, dtype or head size
            pass
    best = max(rates, key=rates.get)
    return rates[best], best


def attempt(f):
    """f(), or None where the memory does not suffice."""
    try:
        return f()
    except torch.OutOfMemoryError:
        pass                                             # what f made is freed only after the handler
    release()


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- tables ------------------------------------------------------------------------------------------------


def machine(device):
    """The device and versions that are measured, and the device's short name for files: h200, 4090, cpu."""
    name = f"CPU, {torch.get_num_threads()} threads"
    kind = device.type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = re.findall(r"[a-z]*\d+\w*|$", name.lower())[0] or "gpu"
    return dict(device=name, dtype=str(dtype_on(device)).removeprefix("torch."), torch=torch.__version__,
                python=platform.python_version(), triton=installed("triton")), kind


def installed(package):
    """The version of an installed package, else None."""
    return next((d.version for d in distributions() if d.metadata["Name"] == package), None)


HEADINGS = dict(tok_s="tok/s", need_gb="needs GB", peak_gb="peak GB", extra_gb="extra GB", gb="GB",
                used="use", plan_batch="of")


class Table:
    """A table that is printed row by row, and its file results/MODE-DEVICE.json, written with every row.
    columns: field -> format, of the fields that are printed. keys: the fields that tell two rows apart.
    Earlier rows of the same machine and versions stay in the file until they are measured again."""

    def __init__(self, args, device, keys, columns, about, **facts):
        self.keys = keys.split()
        self.columns = columns
        self.facts, kind = machine(device)
        name = f"{args.mode}-{kind}" + ("-plain" if getattr(args, "plain", False) else "")
        self.path = os.path.join(RESULTS, f"{args.name or name}.json")
        found = read_table(self.path) if os.path.exists(self.path) else {}
        same = all(found.get(key) == value for key, value in self.facts.items())
        self.rows = found["rows"] if same else []
        self.facts |= facts
        os.makedirs(RESULTS, exist_ok=True)
        print(f"{self.facts['device']}, {self.facts['dtype']}, {about}\n")
        self.show({name: HEADINGS.get(name, name.replace("_", " ")) for name in columns})

    def add(self, shown=None, **row):
        """Keep a row and print it. shown: cells that are printed and not kept."""
        self.rows = [old for old in self.rows if any(old[key] != row[key] for key in self.keys)] + [row]
        write_json(self.path, dict(**self.facts, rows=self.rows))
        self.show(row | (shown or {}))

    def show(self, cells):
        line = ""
        for name, form in self.columns.items():
            value = cells.get(name)
            if value is None:                            # a time is missing for one reason alone
                value = "memory" if name in ("ms", "seconds", "forward", "both") else "-"
            if isinstance(value, (list, tuple)):
                value = " ".join(map(str, value))
            if isinstance(value, str):
                width = re.match(r"<?\d+", form)[0]
                form = width if "<" in width else f">{width}"
            line += format(value, form)
        print(line, flush=True)


def read_table(path):
    """What a Table has written; ValueError for any other file."""
    content = read_json(os.path.dirname(path), os.path.basename(path), "table of bench.py")
    if not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is no table of bench.py, it has no rows: remove it, or give another --name")
    return content


def context_axis(ax, contexts, title):
    """Set up a figure with contexts on a logarithmic axis."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts])
    ax.minorticks_off()
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("tokens of context", fontsize=9)


def pyplot():
    """matplotlib.pyplot, or None and a line that says what to install."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib, then python bench.py figure")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save_figure(fig, path, legend=0.0):
    """Write a figure, with this share of its height left free for a legend below."""
    fig.tight_layout(rect=(0, legend, 1, 1))
    write_file(path, partial(fig.savefig, format="png"))
    pyplot().close(fig)
    print(f"\nfigure in {os.path.relpath(path)}")


# ---- decode ------------------------------------------------------------------------------------------------

WARM = 5                                                 # untimed calls; the second one records the graph


def bench_decode(args):
    device = torch.device(args.device)
    rate = copy_rate(device)
    table = Table(
        args, device, keys="size kind batch context",
        columns=dict(size="<9", kind="<9", batch="6,", context="11,", ms="10.2f", floor_ms="10.2f",
                     ratio="7.2f", tok_s="9,.0f", need_gb="10.2f", peak_gb="9.2f"),
        about=f"""copies {rate / 1e12:.3g} TB/s
Every row of the batch has this context and gets one more token.
Floor: the bytes of weights, S (read and written) and K/V, divided by the rate of copies.
Needs: weights and state. Peak: everything.""",
        copy_rate=rate)
    for size, kind, config, model in models(args, device):
        todo = [(args.batch, n) for n in args.ctx or SIZES[size].contexts]
        if not args.ctx and kind != "article":
            todo += SIZES[size].batches
        measure = partial(decode_row, model, config, rate, device)
        for batch, context in todo:
            release()
            row = measure(context, batch or largest_batch(config, context, device))
            while row["ms"] is None and not batch and row["batch"] > 1:        # less room than it looked
                row = measure(context, row["batch"] * 15 // 16)
            table.add(size=size, kind=kind, **row)
        del model, measure
    draw(table.facts, table.rows, "2b" if "2b" in args.size else args.size[0])
    return table


def decode_row(model, config, rate, device, context, batch):
    """ms per token and peak memory of a decoder whose state is filled with random numbers."""
    def work():
        state = model.init_state(batch, context + WARM + 20)
        for layer in state.layers:
            for tensor in layer.values():
                tensor.normal_()
        state.pos.fill_(context)
        return milliseconds(fast.Decoder(model, state), device, warm=WARM, flush=False)
    moved, held = weigh(config, batch, context, dtype_on(device))
    floor = 1000 * moved / rate
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    ms = model and attempt(work)
    return dict(batch=batch, context=context, ms=ms, floor_ms=floor, ratio=ms and ms / floor,
                tok_s=ms and 1000 * batch / ms, need_gb=held / 1e9,
                peak_gb=torch.cuda.max_memory_allocated(device) / 1e9 if cuda and ms else None)


def largest_batch(config, context, device):
    """Rows that should fit beside a model, by arithmetic. A step may need 3% of the memory for itself. On a
    CPU a few rows are enough to try."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 ** 26
    one, two = (weigh(config, batch, context, dtype_on(device))[1] for batch in (1, 2))
    return max(1, int(0.97 * free / (two - one)))


LOOK = dict(hybrid=("#1f4e79", "hybrid"), teacher=("#a63d2f", "all attention"),
            article=("#5b7f3a", "article's hybrid, window of 2,048"))


def draw(facts, rows, size):
    """Draw ms per token against context: results/decode.png for 2b, decode-SIZE.png for other sizes."""
    plt = pyplot()
    if plt is None:
        return
    fig, ax = plt.subplots(figsize=(7.2, 4.4), dpi=150)
    rows = [r for r in rows if r["size"] == size and r["batch"] == 1]
    rows.sort(key=lambda r: r["context"])
    for kind, (color, label) in LOOK.items():
        mine = [r for r in rows if r["kind"] == kind]
        measured = [r for r in mine if r["ms"]]
        if len(measured) < len(mine):
            label += f" (no memory for {mine[len(measured)]['context']:,})"
        x = [r["context"] for r in measured]
        if x:
            ax.plot(x, [r["ms"] for r in measured], color=color, lw=1.8, marker="o", ms=3.5, label=label)
            ax.plot(x, [r["floor_ms"] for r in measured], color=color, lw=0.8, ls="--")
    context_axis(ax, sorted({r["context"] for r in rows}), f"{SIZES[size].title}: milliseconds per token, "
                 f"batch 1, {facts['dtype']}, {facts['device']}")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.plot([], [], color="0.35", lw=0.8, ls="--", label="time to move weights, state and K/V once")
    ax.legend(fontsize=8, frameon=False)
    save_figure(fig, os.path.join(RESULTS, "decode.png" if size == "2b" else f"decode-{size}.png"))


def bench_figure(args):
    path, facts, rows = decode_results(args)[0]
    draw(facts, rows, args.size)


# ---- when to use it ----------------------------------------------------------------------------------------


def decode_results(args):
    """[(path, facts, rows)]: the files in which decode has measured a size at batch 1."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(RESULTS), f"{args.name or 'decode-*'}.json"))):
        content = read_table(path)
        rows = [r for r in content["rows"] if r.get("size") == args.size and r.get("batch") == 1]
        if {"hybrid", "teacher"} <= {r["kind"] for r in rows}:
            found.append((path, content, sorted(rows, key=lambda r: r["context"])))
    if not found:
        raise ValueError(f"no rows of {args.size}, hybrid and teacher, in results/{args.name or 'decode-*'}"
                         f".json; measure them: python bench.py decode --size {args.size}")
    return found


def at(contexts, values, n):
    """The value at context n: on a straight line in log-log between two measured ones; before the first, the
    first; next to a value of inf, inf."""
    i = bisect.bisect(contexts, max(n, contexts[0]))
    a, x = contexts[i - 1], values[i - 1]
    if n <= a or x == math.inf:
        return x
    return x * (values[i] / x) ** (math.log(n / a) / math.log(contexts[i] / a))


def wins_from(contexts, ours, theirs):
    """The context from which on ours is less than theirs, up to the last context; None if ours is not less
    at the last. Between two measured contexts the curves are straight lines in log-log."""
    lead = [math.log(y / x) for x, y in zip(ours, theirs)]
    behind = [i for i, d in enumerate(lead) if d <= 0]
    if not behind:
        return contexts[0]
    i = behind[-1]
    if i == len(lead) - 1:
        return None
    a, b = contexts[i:i + 2]
    d, e = lead[i:i + 2]
    return b if e == math.inf else a * (b / a) ** (d / (d - e))


def curves(rows):
    """The contexts in which the hybrid fits and both were measured; ms and GB there, {kind: values} each."""
    found = {(r["kind"], r["context"]): r for r in rows}
    contexts = [n for kind, n in found
                if kind == "hybrid" and found["hybrid", n]["ms"] and ("teacher", n) in found]
    ms, gb = {}, {}
    for kind in ("hybrid", "teacher"):
        mine = [found[kind, n] for n in contexts]
        ms[kind] = [r["ms"] or math.inf for r in mine]
        gb[kind] = [r["peak_gb"] or r["need_gb"] for r in mine]
    return contexts, ms, gb


def since(contexts, values):
    """In words, the context from which on the hybrid has less than the teacher."""
    first = wins_from(contexts, values["hybrid"], values["teacher"])
    if first is None:
        return f"at no context up to {contexts[-1]:,}"
    if first == contexts[0]:
        return f"from {first:,} tokens on, the shortest measured"
    return f"from about {float(f'{first:.2g}'):,.0f} tokens on"


def verdict(ms, gb, most_ms, most_gb):
    """Which model to use, in a sentence. ms (inf: does not fit), gb: {kind: costs}; and the user's limits."""
    within = [kind for kind in ms if ms[kind] < math.inf
              and ms[kind] <= (most_ms or math.inf) and gb[kind] <= (most_gb or math.inf)]
    limits = [f"{most:g} {unit}" for most, unit in ((most_ms, "ms"), (most_gb, "GB")) if most]
    limits = " and ".join(limits) or "this device"
    if not within:
        return f"use neither: both exceed {limits}; take a smaller model"
    if len(within) == 1:
        return f"use the {within[0]}: it alone is known to keep within {limits}"
    time_ratio, memory_ratio = (costs["hybrid"] / costs["teacher"] for costs in (ms, gb))
    choice = ("the teacher", "either", "the hybrid")[(time_ratio < 1) + (memory_ratio < 1)]
    return f"use {choice}: the hybrid takes {time_ratio:.2f} of the time and {memory_ratio:.2f} of the memory"


def bench_when(args):
    for path, facts, rows in decode_results(args):
        contexts, ms, gb = curves(rows)
        path = os.path.relpath(path)
        if not contexts or args.ctx > contexts[-1]:
            raise ValueError(f"--ctx {args.ctx}: the hybrid was measured, and fits, up to a context of "
                             f"{max(contexts, default=0)} tokens ({path})")
        taken = f" (taken for {contexts[0]:,}, the shortest measured)" * (args.ctx < contexts[0])
        print(f"{SIZES[args.size].title}, batch 1, {facts['device']}, {path}")
        print(f"one token after {args.ctx:,}{taken}")
        ms_now = {kind: at(contexts, values, args.ctx) for kind, values in ms.items()}
        gb_now = {kind: at(contexts, values, args.ctx) for kind, values in gb.items()}
        for kind, t in ms_now.items():
            shown = f"{t:.2f} ms" if t < math.inf else "not measured, for lack of memory"
            print(f"  {kind:8s} {shown}, {gb_now[kind]:.3g} GB")
        print(f"  in time the hybrid wins {since(contexts, ms)}")
        print(f"  in memory the hybrid wins {since(contexts, gb)}")
        print(f"  {verdict(ms_now, gb_now, args.ms, args.gb)}")


# ---- prefill -----------------------------------------------------------------------------------------------


def bench_prefill(args):
    device = torch.device(args.device)
    if device.type == "cuda" and not args.plain:
        fast.fuse()
    linear = matmul_rate(device)
    rates = {size: attention_rate(SIZES[size].teacher, device) for size in args.size}
    shown = ", ".join(f"{rate:.3g} ({size}, {best})" for size, (rate, best) in rates.items())
    table = Table(
        args, device, keys="size kind context",
        columns=dict(size="<9", kind="<9", context="11,", seconds="10.3f", floor_s="10.3f", ratio="7.2f",
                     tok_s="11,.0f", extra_gb="10.2f"),
        about=f"""operations per second: {linear:.3g}, attention {shown}
Every row reads a context from its first token to its last.
Floor: the operations of Linears and of attention, each divided by its rate above.
These are the rates of a large product and of torch's fastest attention.
Extra: peak memory beyond weights and state.""",
        matmul_rate=linear, attention_rate=rates)
    for size, kind, config, model in models(args, device):
        contexts = [n for n in args.ctx or SIZES[size].contexts if kind != "teacher" or n <= args.teacher_max]
        if model and contexts:                           # compiles what there is to compile
            attempt(partial(prefill, model, min(32768, max(contexts)), args.segment, device))
        for context in contexts:
            release()
            title = f"{size} {kind}, {context:,} tokens" if args.profile else None
            seconds, extra = fastest_prefill(model, context, args.segment, device, title)
            of_linears, of_attention = operations(config, context)
            floor = of_linears / linear + of_attention / rates[size][0]
            table.add(size=size, kind=kind, context=context, seconds=seconds, floor_s=floor, extra_gb=extra,
                      ratio=seconds and seconds / floor, tok_s=seconds and context / seconds)
        del model
    return table


def fastest_prefill(model, context, segment, device, title):
    """prefill's result, the better of two for contexts that do not take long; None twice without memory."""
    if model is None:
        return None, None
    read = partial(attempt, partial(prefill, model, context, segment, device))
    if title:
        profiled(title, read)
    found = [read() for _ in range(2 if context <= 131072 else 1)]
    return min(filter(None, found), default=(None, None), key=lambda pair: pair[0])


def prefill(model, context, segment, device):
    """Seconds to read random ids, and GB beyond weights and state (CPU: None)."""
    prompt = torch.randint(model.config.vocab_size, (context,), device=device)
    state = model.init_state(1, context)
    return once(lambda: fast.prefill(model, prompt, state, segment), device)


# ---- train -------------------------------------------------------------------------------------------------

PEAKS = dict(h100=989e12, h200=989e12, a100=312e12)      # dense bf16 operations per second, by the maker
STAGES = ("align", "distil", "finetune")


class RandomText:
    """Stands in for the Corpus and the tokenizer of halo.py."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab

    def rows(self, stage, plan):
        rng = np.random.default_rng(0)
        return lambda step: rng.integers(self.n_vocab, size=(plan.batch, plan.length + 1))


class Trial(Probe):
    """Stands in for a Run of halo.py. In each stage of args.stage it takes a few steps on random ids, as a
    Probe does, then two steps of a whole batch, and reports the second. A step that would take more than
    args.seconds has fewer sequences, because every sequence costs the same."""

    def __init__(self, teacher, plans, args):
        super().__init__(vars(args), args.tokenizer.n_vocab)
        self.args = args
        halo.convert_staged(self, teacher, args.tokenizer, plans, args)

    def stage(self, name, plan, module, optimizer, gradients):
        return TrialStage(self, name, plan, module, optimizer, gradients)


class TrialStage(ProbeStage):
    def steps(self, corpus, rows_of):
        args, plan = self.run.args, self.plan
        if self.name not in args.stage:
            return
        yield from super().steps(corpus, rows_of)                  # finds what fits at once
        speed, self.replay = self.run.found[self.name][1], None
        whole = max(1, int(args.seconds * speed / (self.at_once * plan.length)))
        batch = min(plan.batch, self.at_once * whole)
        device = next(self.module.parameters()).device
        rows = torch.randint(self.run.n_vocab, (batch, plan.length + 1), device=device)
        for step in range(2):
            wait(device)
            began = time.perf_counter()
            yield step, rows
            wait(device)
            seconds = time.perf_counter() - began
        args.report(self.name, plan, batch, seconds, at_once=self.at_once, peak_gb=peak_gb(device.type),
                 checkpoint=checkpointed(self.module))
        checkpoint_blocks(self.module, on=False)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_operations(stage, teacher, student, T):
    """Operations per token of a stage's models on sequences of T, with heads and attention, without
    recomputation. Each weight costs the teacher 2 and the student 6, or 4 where no gradient reaches the
    input of its Linear."""
    def forward(config, head=True):
        return sum(operations(config, T)) / T + 2 * head * config.n_embd * config.vocab_size
    if stage == "align":
        twins = replace(student, layers="L" * len(student.layers))
        of_twins = 3 * operations(twins, T, "mixer")[0] - operations(twins, T, "qkvz")[0]
        return forward(teacher, head=False) + of_twins / T
    return 3 * forward(student) + (forward(teacher) if stage == "distil" else 0)


def bench_train(args):
    device = torch.device(args.device)
    if device.type == "cuda" and not args.plain:
        fast.fuse()
    peak = args.peak or PEAKS.get(machine(device)[1])
    table = Table(
        args, device, keys="size stage",
        columns=dict(size="<9", stage="<9", length="7,", batch="6", plan_batch="5", at_once="8",
                     checkpoint="11", seconds="9.2f", tok_s="10,.0f", used="7.1%", peak_gb="8.1f",
                     hours="8.2f"),
        about=f"""peak {f"{peak:.3g}" if peak else "unknown (--peak)"} operations per second
One step of each stage of halo.py under the paper's plan.
Batch: sequences of the step, of the plan's so many; at once: as many go through the models together.
Checkpoint: activations are computed again in the backward pass.
Use: share of the peak. Hours: for all tokens of the plan.""",
        peak=peak)
    for size in args.size:
        plans = halo.PLANS["tiny" if size == "tiny" else "real"]
        plans = {name: replace(plan, recall=0.0) for name, plan in plans.items() if name in STAGES}
        teacher, student = SIZES[size].teacher, config_of(size, "hybrid")

        def report(stage, plan, batch, seconds, **row):
            speed = batch * plan.length / seconds
            each = train_operations(stage, teacher, student, plan.length)
            table.add(size=size, stage=stage, length=plan.length, plan_batch=plan.batch, batch=batch,
                      seconds=seconds, tok_s=speed, operations=each, used=peak and each * speed / peak,
                      tokens=plan.total, hours=plan.total / speed / 3600, **row,
                      shown=dict(checkpoint="yes" if row["checkpoint"] else "no"))
        options = recipe("paper", layers=student.layers, device=args.device, report=report,
                         seconds=args.seconds, stage=args.stage, tokenizer=RandomText(teacher.vocab_size))
        try:
            Trial(build(teacher, device), plans, options)
        except (torch.OutOfMemoryError, ValueError) as e:                      # the latter: halo's
            print(f"{size:9s}memory: {' '.join(str(e).split())}", flush=True)
        release()
    return table


# ---- kernel ------------------------------------------------------------------------------------------------

SCANS = [(8, 4096, 16, 128, 128), (1, 131072, 16, 128, 128), (8, 1024, 25, 32, 64), (4, 16384, 8, 64, 64)]
CPU_SCANS = [(1, 4096, 4, 64, 64)]
DECAYS = ("constant", "head", "channel")


def scan_inputs(shape, decay, device):
    """q, k, v, log decays as a trained gate gives them (mean retention 0.85), and the upstream gradient. All
    are bf16 but a constant decay."""
    B, T, H, K, V = shape
    rng = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, device=device, generator=rng)
    q, k, v, do = (normal(B, T, H, n).bfloat16() for n in (K, K, V, V))
    if decay == "constant":
        return q, k, v, -torch.exp2(-8 * torch.arange(1, H + 1, device=device) / H), do
    gate = normal(B, T, H, K) if decay == "channel" else normal(B, T, H)
    return q, k, v, F.logsigmoid(gate).bfloat16() / 2, do


def ours(q, k, v, g, backend=None):
    return chunked_scan(q, k, v, g, scale=q.shape[-1] ** -0.5, backend=backend)[0]


def sdpa(q, k, v, g):
    """Softmax attention, whose keys are as wide as its values."""
    q, k, v = (F.pad(x, (0, v.shape[-1] - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def rivals(decay, device):
    """{name: function (q, k, v, log_decay) -> o}: ours, and what else there is."""
    found = dict(ours=ours)
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from fla.ops.gla import chunk_gla
            from fla.ops.simple_gla import chunk_simple_gla
            found["fla"] = dict(
                channel=lambda q, k, v, g: chunk_gla(q, k, v, g)[0],
                head=lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0],
                constant=lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g)[0])[decay]
    if decay == "constant":
        found["sdpa"] = sdpa
    return found


def gradients(f, tensors, do):
    """f(*tensors), then its gradient in each tensor but a constant decay."""
    leaves = [x.detach().requires_grad_(x.dim() > 1) for x in tensors]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], do)]


def scan_row(f, tensors, do, refs, device):
    """Times in ms, memory in GB, and the errors RMSE(out - ref) / RMSE(ref) of o and of every gradient, on
    the heads that refs has."""
    def forward():
        with torch.no_grad():
            f(*tensors)
    both = partial(gradients, f, tensors, do)
    began = time.time()
    out = attempt(both)
    first = time.time() - began
    errors = {}
    for name, x, ref in zip(("o", "dq", "dk", "dv", "dlog_decay"), out or (), refs):
        errors[name] = ((x[:1, :, :ref.size(2)].double() - ref).norm() / ref.norm()).item()
    del out
    ms = attempt(lambda: milliseconds(forward, device))
    ms_both = attempt(lambda: milliseconds(both, device))
    memory = attempt(lambda: once(both, device))
    return dict(first_call_s=first, forward=ms, both=ms_both, gb=memory and memory[1], **errors)


def bench_kernel(args):
    device = torch.device(args.device)
    rate = copy_rate(device)
    table = Table(
        args, device, keys="shape decay by",
        columns=dict(shape="<22", decay="<10", by="<6", forward="9.3f", both="9.3f", floor="8.3f",
                     of_floor="10.0%", gb="8.2f", error="9.1e"),
        about=f"""copies {rate / 1e12:.3g} TB/s
ms of a scan in bf16, forward, and both forward and backward. Shape: B T H K V.
Floor: the bytes of a forward pass, divided by the rate of copies. Of floor: floor / forward.
Error: the largest relative error of o and the gradients, against float64.""",
        copy_rate=rate)
    for shape, decay in itertools.product(SCANS if device.type == "cuda" else CPU_SCANS, DECAYS):
        *tensors, do = scan_inputs(shape, decay, device)
        all_of = [*tensors, do]
        sliced = [(x[:1, :, :2] if x.dim() > 1 else x[:2]).double() for x in all_of]        # two heads
        refs = gradients(partial(ours, backend="torch"), sliced[:4], sliced[4])
        floor = 1000 * sum(x.numel() * x.element_size() for x in all_of if x.dim() > 1) / rate
        for name, f in rivals(decay, device).items():
            try:
                row = scan_row(f, tensors, do, refs if name != "sdpa" else (), device)
            except RuntimeError as e:
                if name == "ours":
                    raise
                print(f"{' '.join(map(str, shape)):22s}{decay:10s}{name}: {' '.join(str(e).split())[:60]}")
                continue
            if name == "fla":
                row["version"] = installed("flash-linear-attention")
            errors = [row[name] for name in ("o", "dq", "dk", "dv", "dlog_decay") if name in row]
            table.add(shape=list(shape), decay=decay, by=name, **row, floor=floor,
                      of_floor=row["forward"] and floor / row["forward"],
                      shown=dict(error=max(errors, default=None)))
    return table


# ---- recall and loss at any length -------------------------------------------------------------------------


class Reader(NamedTuple):
    """A model and the way in which it reads long text."""
    name: str
    model: HypeNet
    tasks: list
    logit_base: float | None = None
    keep: int | None = None          # read only the first 4 and the last keep - 4 tokens
    yarn: bool = False               # stretch RoPE to every length


@contextlib.contextmanager
def stretched(model, factor):
    """Read with YaRN (arXiv 2309.00071) for a multiple of the trained length, without training. A model with
    RoPE keeps its short wavelengths and slows its long ones; its logits grow by (0.1 log(factor) + 1)^2."""
    config = model.config
    before = config.rope_scaling
    if factor > 1:
        config.rope_scaling = dict(rope_type="yarn", factor=factor,
                                   original_max_position_embeddings=config.max_len)
    try:
        yield
    finally:
        config.rope_scaling = before


def wilson(hits, n, z=1.96):
    """The 95% interval of a share of which hits of n were seen. Wilson's stays within 0 and 1."""
    p = hits / n
    d = 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def last_loss(model, texts, count):
    """Mean loss (texts,), in nats per token, of the last `count` tokens of every text (texts, n), after all
    earlier tokens are read."""
    logp = []
    with bf16():
        for text in texts:
            prompt = torch.from_numpy(text).to(model.wte.weight.device)[None]
            logp.append(answers(model, prompt, count)[0])
    return -torch.cat(logp).mean(1).cpu().numpy()


def readers(student, teacher):
    """The student with and without s_t; the teacher as it is, with YaRN, and with a window. A teacher whose
    RoPE is scaled already is not stretched again."""
    every = list(TASKS)
    logit_base = student.config.logit_base
    found = [Reader("student", student, every, logit_base)]
    if logit_base is not None:
        found.append(Reader("student without s_t", student, ["S1"]))
    found.append(Reader("teacher", teacher, every))
    if teacher.config.position == "rope" and teacher.config.rope_scaling is None:
        found.append(Reader("teacher, YaRN", teacher, every, yarn=True))
    return [*found, Reader("teacher, sink + window", teacher, every, keep=teacher.config.max_len)]


def read(reader, n, trained, work):
    """work(), with the reader set for n tokens; None for more tokens than its model has positions for."""
    if min(n, reader.keep or n) > reader.model.config.limit():
        return None
    with stretched(reader.model, n / trained if reader.yarn else 1):
        return work()


def add_recall(table, reader, corpus, lengths, trials):
    """A row for every task and length: the share of answers given in full, and by_depth the shares where the
    needle stands at 0, 1/4, ... of the text. After two lengths with no answer, longer ones are not tried."""
    for task in reader.tasks:
        hits = []
        for n in lengths:
            if hits[-2:] == [0, 0] or not has_room(task, n, corpus):
                continue
            ask = partial(recall, reader.model, corpus, n, trials, task=task, keep=reader.keep)
            found = read(reader, n, lengths[0], ask)
            if found is None:
                continue
            found = found[1]
            hits.append(found.sum().item())
            low, high = wilson(hits[-1], trials)
            by_depth = [found[i::5].mean().item() for i in range(min(5, trials))]
            table.add(model=reader.name, task=task, context=n, of=trials, value=hits[-1] / trials, low=low,
                      high=high, by_depth=by_depth)


def add_losses(table, reader, texts, lengths):
    """A "loss" row for every length: the loss of the same ends of held-out texts, after so much of each."""
    first = None
    for n in [n for n in lengths if n <= texts.shape[1]]:
        measure = partial(last_loss, reader.model, texts[:, -n:], lengths[0] // 2)
        loss = read(reader, n, lengths[0], measure)
        if loss is None:
            continue
        first = loss if first is None else first
        mean = loss.mean().item()
        error = 2 * np.std(loss - first).item() / max(1, len(loss) - 1) ** 0.5
        table.add(model=reader.name, task="loss", context=n, of=len(loss), value=mean, low=mean - error,
                  high=mean + error)


def bench_niah(args):
    device = torch.device(args.device)
    report = read_json(args.model, "report.json", "report of halo.py")
    teacher_at = args.teacher or halo.teacher_path(report.get("teacher", "tiny"))
    student = pretrained.load(args.model, dtype_on(device), args.device)
    teacher = pretrained.load(teacher_at, dtype_on(device), args.device)
    if not args.data and os.path.exists(os.path.join(args.model, "run.json")):
        args.data = read_json(args.model, "run.json", "run of halo.py")["options"]["data"]
    corpus = Corpus(Tokenizer.load(teacher_at), args.data)
    T = teacher.config.max_len
    layers = student.config.layers
    lengths = [T * n for n in (1, 2, 4, 16, 64, 256) if n <= args.times]
    table = Table(
        args, device, keys="model task context",
        columns=dict(model="<24", task="<10", context="9,", of="6", value="9.3f", low="8.3f", high="8.3f"),
        about=f"""trained at {T:,} tokens
student {args.model} ({layers})
teacher {teacher_at}
Tasks: the share of answers given in full, of so many questions, and its 95% interval.
After two lengths with no answer, longer ones are not tried.
Loss: nats per token on the ends of held-out texts, after so much of each text.
Its interval is that of the difference to the first length.""",
        trained=T, layers=layers, logit_base=student.config.logit_base)
    table.rows = []                                      # they are another model's
    texts = corpus.windows(np.random.default_rng(0), args.windows, min(lengths[-1], 64 * T))
    logit_base = student.config.logit_base
    for reader in readers(student, teacher):
        reader.model.config.logit_base = reader.logit_base
        add_recall(table, reader, corpus, lengths, args.trials)
        if reader.keep is None:
            add_losses(table, reader, texts, lengths)
    student.config.logit_base = logit_base
    draw_niah(table.facts, table.rows, table.path.removesuffix("json") + "png")
    return table


MODEL_COLORS = {"student": "#1f4e79", "student without s_t": "#7fa6c9", "teacher": "#a63d2f",
                "teacher, YaRN": "#d98c5f", "teacher, sink + window": "#8c8c8c"}
TASK_COLORS = {"S2": "#1f4e79", "S3": "#5b7f3a", "multi-key": "#b8860b"}


def draw_niah(facts, rows, path):
    """Draw up to three panels by context: pass keys found by all, the student's other tasks, and loss."""
    plt = pyplot()
    if plt is None:
        return
    more = any(r["value"] for r in rows if r["task"] in TASK_COLORS and r["model"] == "student")
    fig, axes = plt.subplots(1, 2 + more, figsize=(4 * (2 + more), 3.9), dpi=150)

    def panel(ax, title, lines):                         # lines: (model, task, label, color)
        context_axis(ax, sorted({r["context"] for r in rows if r["task"] != "loss"}), title)
        ax.axvline(facts["trained"], color="0.75", lw=0.8)
        for z, (model, task, label, color) in enumerate(lines):
            mine = [r for r in rows if r["model"] == model and r["task"] == task]
            mine.sort(key=lambda r: r["context"])
            if mine:
                x, y, low, high = ([r[key] for r in mine] for key in ("context", "value", "low", "high"))
                ax.plot(x, y, color=color, lw=1.6, marker="o", ms=3, label=label, zorder=9 - z)
                ax.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        ax.set_ylim(-0.03, 1.05)
    panel(axes[0], "Pass key found (S1)",
          [(model, "S1", model, color) for model, color in MODEL_COLORS.items()])
    if more:
        panel(axes[1], "The student's other tasks, in other wordings",
              [("student", task, task, color) for task, color in TASK_COLORS.items()])
        axes[1].legend(loc="lower left", fontsize=8, frameon=False)
    panel(axes[-1], "Held-out loss, nats per token",
          [(model, "loss", model, color) for model, color in MODEL_COLORS.items()])
    least = min(r["value"] for r in rows if r["task"] == "loss")
    axes[-1].set_ylim(0.9 * least, 2 * least)
    axes[0].annotate("trained", (facts["trained"], 0), (2, -1), textcoords="offset points", fontsize=7)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8, frameon=False)
    save_figure(fig, path, legend=0.06)


# ---- ablations ---------------------------------------------------------------------------------------------

ABLATIONS = {                        # change of a recipe: options of halo.py, {} stand for values of fill_in
    "paper": "",
    "article": "--recipe article",
    "from scratch, all tokens": "--pretrain --layers {layers} --plan pretrain.tokens={tokens}",
    "no RoPE in linear layers": "--set linear_rope=false",
    "RoPE kept in attention": "--pe rope",
    "layers evenly spaced": "--layers even",
    "layers by eq. 8": "--layers score",
    "random linear layers": "--transfer off",
    "1 attention layer": "--keep 1",
    "4 attention layers": "--keep 4",
    "0 attention layers": "--layers LLLLLLLL",
    "no QK-norm in linear layers": "--set linear_qk_norm=false",
    "no output gates": "--set attn_gate=false linear_gate=false",
    "KV heads not cloned": "--set linear_kv_head={kv}",
    "decay by data, a head": "--decay head",
    "decay by data, a channel": "--decay channel",
    "no decay": "--decay none",
    "halved keys": "--state half",
    "first and last quarter (4 layers)": "--layers ends",
    "first half (4 layers)": "--layers AAAALLLL",
    "alpha 0.5": "--alpha 0.5",
    "KL reversed": "--kl reverse",
    "progressive (with --pe rope, even)": "--training progressive --pe rope --layers even",
    "no s_t": "--logit-base none",
    "window 2,048": "--window 2048",
    "chunk HyPE": "--pe chunk",
    "article, s_t": "--recipe article --logit-base fit",
    "article, retention 0.50": "--recipe article --retention 0.50",
    "article, retention 0.62": "--recipe article --retention 0.62",
    "article, retention 0.95": "--recipe article --retention 0.95",
    **{f"layers at random, draw {i + 1}": f"--layers {{draws[{i}]}}" for i in range(5)},
    "peak learning rates 3 times": "--plan align.lr={lr[0]:.3g} distil.lr={lr[1]:.3g} "
                                   "finetune.lr={lr[2]:.3g}",
    "peak learning rates a third": "--plan align.lr={lr[3]:.3g} distil.lr={lr[4]:.3g} "
                                   "finetune.lr={lr[5]:.3g}",
    "stage 2 in batches 4 times": "--plan distil.batch={batch[0]}",
    "stage 2 in batches a quarter": "--plan distil.batch={batch[1]}",
    "layers by eq. 8, guarded": "--layers guarded",
}
SEEDED = [*halo.RECIPES, "layers by eq. 8", "layers by eq. 8, guarded"]    # run with --seeds seeds
MULTIPLES = (1, 16, 64)              # of the trained length: where recall is shown


def draws(n_layer, keep):
    """Every choice of `keep` layers that stay attention, as letters, in a random order."""
    found = list(itertools.combinations(range(n_layer), keep))
    rows = []
    for i in np.random.default_rng(0).permutation(len(found)):
        rows.append("".join("A" if layer in found[i] else "L" for layer in range(n_layer)))
    return rows


def fill_in(config, plans, budget):
    """The values of the words in ABLATIONS."""
    n_layer = len(config.layers)
    trained = [plans[stage] for stage in STAGES]
    return dict(
        kv=config.n_kv_head,
        layers=halo.choose_layers("even", n_layer),
        tokens=plans["pretrain"].total + budget * sum(plan.total for plan in trained),
        draws=draws(n_layer, max(1, n_layer // 4)),
        lr=[factor * plan.lr for factor in (3, 1 / 3) for plan in trained],
        batch=(4 * plans["distil"].batch, plans["distil"].batch // 4))


def share_gpus(device, jobs):
    """A queue with the GPU of every job, as CUDA_VISIBLE_DEVICES names it. Several jobs may share a GPU."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    visible = visible.split(",")[:max(1, count)]
    index = device.partition(":")[2]
    if index:
        visible = visible[int(index):][:1]
    gpus = queue.Queue()
    for i in range(jobs):
        gpus.put(visible[i % len(visible)])
    return gpus


def run_halo(args, flags, seed, gpus):
    """Distil in a process of its own. Return its report with the scores of layers, or dict(failed=why)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--teacher", args.teacher, "--out", folder, "--seed", str(seed),
                 "--device", args.device.partition(":")[0], "--trials", str(args.trials)]
        if "--pretrain" not in flags:
            flags += ["--budget", str(args.budget)]
        gpu = gpus.get()
        try:
            run = subprocess.run([sys.executable, os.path.join(halo.HERE, "halo.py"), *flags],
                                 env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                                 capture_output=True, text=True, check=False)
        finally:
            gpus.put(gpu)
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            return dict(failed=lines[-1] if lines else f"exit status {run.returncode}")
        scores = read_json(folder, "run.json", "run")["done"].get("scores")
        return dict(read_json(folder, "report.json", "report"), scores=scores)


def ablate_row(report, T, teacher_loss):
    """The fields of a row that come from a run's report. A run from scratch has no teacher in its report."""
    loss = report["val_loss"]
    recalled = dict(at=report["passkey"], four=report.get("multikey", {}))
    if isinstance(loss, dict):
        teacher_loss = loss["teacher"]
        loss = loss["student"]
        recalled = {start: shares.get("student", {}) for start, shares in recalled.items()}
    row = dict(layers=report["layers"], gap=teacher_loss and loss - teacher_loss)
    for start, shares in recalled.items():
        for n in MULTIPLES:
            row[f"{start}_{n}x"] = shares.get(str(n * T))
    return row | dict(minutes=report["seconds"] / 60, teacher_loss=teacher_loss, scores=report["scores"],
                      logit_base=report.get("logit_base"))


def percents(row, start):
    """Recall at all MULTIPLES in one cell: "100 / 95 / 20"."""
    shares = [row[f"{start}_{n}x"] for n in MULTIPLES]
    return " / ".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


def ablate_table(args, T, teacher_loss):
    """The table, without rows of another teacher of the same name, whose loss differs."""
    args.name = args.name or "ablate"
    table = Table(
        args, torch.device(args.device), keys="teacher budget change seed",
        columns=dict(change="<35", seed="4", layers="10", gap="9.4f", pass_keys="16", one_of_four="16",
                     minutes="9.1f"),
        about=f"""teacher {args.teacher}, {T:,} tokens
Gap: held-out loss of the student less that of the teacher, nats per token.
Pass keys: percent found at 1, 16 and 64 times the trained length.
One of four: the same for one of four numbers, if training had more than pass keys.
Minutes: of one run, {args.jobs} at once.""")
    table.rows = [row for row in table.rows if row["teacher"] != args.teacher or teacher_loss is None
                  or abs((row["teacher_loss"] or teacher_loss) - teacher_loss) < 1e-3]
    return table


def runs_to_do(args, rows):
    """(change, seed) of all runs that --only and --seeds ask for and rows lacks, whole recipes first."""
    done = {(row["change"], row["seed"]) for row in rows}
    todo = [(change, seed) for seed in range(args.seeds) for change in args.only or ABLATIONS]
    todo = [(change, seed) for change, seed in todo if seed == 0 or change in SEEDED]
    todo.sort(key=lambda run: run[0] not in halo.RECIPES)
    return [run for run in todo if run not in done]


def bench_ablate(args):
    path = halo.teacher_path(args.teacher)
    config = halo.TEACHERS[args.teacher]
    if not os.path.exists(os.path.join(path, "model.safetensors")):
        raise ValueError(f"--teacher {args.teacher} is not there yet: python halo.py --pretrain --teacher "
                         f"{args.teacher} --out {path}")
    teacher_loss = None                                  # a shipped teacher has no report
    if os.path.exists(os.path.join(path, "report.json")):
        teacher_loss = read_json(path, "report.json", "report")["val_loss"]
    table = ablate_table(args, config.max_len, teacher_loss)
    known = fill_in(config, halo.PLANS[args.teacher.split("-")[0]], args.budget)
    same = dict(teacher=args.teacher, budget=args.budget, trials=args.trials)

    def comparable():
        return [row for row in table.rows if row.items() >= same.items()]
    gpus = share_gpus(args.device, args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool, contextlib.ExitStack() as stop:
        stop.callback(pool.shutdown, wait=False, cancel_futures=True)              # Ctrl-C starts no other
        runs = {}
        for change, seed in runs_to_do(args, comparable()):
            flags = ABLATIONS[change].format(**known).split()
            runs[pool.submit(run_halo, args, flags, seed, gpus)] = change, seed
        for run in as_completed(runs):
            change, seed = runs[run]
            report = run.result()
            if "failed" in report:
                print(f"{change}, seed {seed}: failed: {report['failed']}", flush=True)
                continue
            losses = [row["teacher_loss"] for row in comparable() if row["teacher_loss"]]
            row = ablate_row(report, config.max_len, teacher_loss or next(iter(losses), None))
            table.add(**same, change=change, seed=seed, **row, flags=ABLATIONS[change],
                      shown=dict(pass_keys=percents(row, "at"), one_of_four=percents(row, "four")))
    return table


# ---- text --------------------------------------------------------------------------------------------------

START = """
import json, sys, time
began = time.time()
from halo import Plan
from support.recall import training_rows
from support.run import peak_gb
from support.text import Corpus
from support.tokens import Tokenizer
corpus = Corpus(Tokenizer.load(sys.argv[1]), [sys.argv[2]])
training_rows(corpus, "align", Plan(1e9, 512, 32, 1e-3, 1e-5))(0)
seconds = time.time() - began
print(json.dumps(dict(seconds=seconds, peak_gb=peak_gb("cpu"), tokens=corpus.facts["tokens"])))
"""


def write_large_text(path, n_bytes):
    """A .jsonl of about n_bytes: stretches of Python's standard library, no two of them alike."""
    rng = random.Random(0)
    library = "".join(text for _, text in documents(stdlib_files()))
    with open(path, "w", encoding="utf-8") as f:
        while f.tell() < n_bytes:
            for _ in range(1000):
                start = rng.randrange(len(library) - 8000)
                stretch = library[start:start + rng.randrange(100, 8000)]
                f.write(json.dumps(dict(text=f"{rng.random()} {stretch}")) + "\n")


def bench_text(args):
    """Start twice, each time in a new process and with the same cache, up to the first batch of rows."""
    table = Table(
        args, torch.device("cpu"), keys="mb start",
        columns=dict(start="<8", mb="8,.0f", seconds="10.1f", peak_gb="9.2f", tokens="16,"),
        about=f"""{os.cpu_count()} cores
MB of .jsonl, encoded by the tokenizer of {args.tokenizer}. Seconds: from the start of Python to the first
batch. The first start encodes the text; the second finds its ids in the cache.""", cores=os.cpu_count())
    for mb in args.mb:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "text.jsonl")
            write_large_text(path, mb * 1e6)
            time.sleep(3)                                # younger files are read again at the next start
            env = dict(os.environ, HYPENET_CACHE=os.path.join(folder, "cache"))
            for start in ("first", "second"):
                out = subprocess.run([sys.executable, "-c", START, args.tokenizer, path], env=env, check=True,
                                     cwd=os.path.dirname(RESULTS), stdout=subprocess.PIPE, text=True).stdout
                table.add(mb=mb, start=start, **json.loads(out))
    return table


# ---- command line ------------------------------------------------------------------------------------------

MODES = dict(decode=bench_decode, prefill=bench_prefill, when=bench_when, train=bench_train,
             kernel=bench_kernel, niah=bench_niah, ablate=bench_ablate, figure=bench_figure,
             text=bench_text)
ON_GPU = dict(decode=["2b", "gpt2-xl", "14b"], prefill=["2b"], train=["2b", "gpt2-xl"])    # sizes
COUNT = dict(type=number(int, 1), metavar="N")
LIMIT = dict(type=number(float, 1e-9), metavar="X")
FLAGS = [                            # modes, flag, options of add_argument
    ("decode prefill when train kernel niah ablate figure text", "--name", dict(
        type=file_name, help="name of the file in results/, without .json")),
    ("decode prefill train kernel niah ablate", "--device", dict(
        type=filled, help="cuda or cpu; default: cuda where there is one")),
    ("when figure", "--size", dict(default="2b", choices=SIZES, help="default: %(default)s")),
    ("decode prefill train", "--size", dict(nargs="+", choices=SIZES, help="; ".join(
        f"default of {mode}: {' '.join(sizes)}" for mode, sizes in ON_GPU.items()) + "; on a CPU: tiny")),
    ("decode prefill", "--kind", dict(
        nargs="+", choices=ALL, help="models; default: all of a size; of prefill: hybrid teacher")),
    ("decode prefill", "--ctx", dict(nargs="+", **COUNT, help="tokens of context; default: by size")),
    ("decode", "--batch", dict(**COUNT, default=1, help="rows decoded at once; default: %(default)s")),
    ("prefill", "--segment", dict(**COUNT, help="tokens read at a time; default: the model's own")),
    ("prefill", "--profile", dict(action="store_true", help="show which kernels the time goes to")),
    ("prefill", "--teacher-max", dict(
        **COUNT, default=131072, help="longest context of the teacher; default: %(default)s")),
    ("prefill train", "--plain", dict(action="store_true", help="compile nothing (torch.compile)")),
    ("when", "--ctx", dict(**COUNT, required=True, help="tokens of context")),
    ("when", "--ms", dict(**LIMIT, help="the most milliseconds that a token may take")),
    ("when", "--gb", dict(**LIMIT, help="the most GB that a model may take")),
    ("text", "--mb", dict(nargs="+", **COUNT, default=[160], help="sizes of text; default: 160")),
    ("text", "--tokenizer", dict(
        type=filled, default="smollm2", help="folder, .gguf or name of a tokenizer; default: %(default)s")),
    ("train", "--stage", dict(nargs="+", choices=STAGES, default=STAGES, help="default: all three")),
    ("train", "--peak", dict(**LIMIT, help="operations per second that the device can do at most")),
    ("train", "--seconds", dict(
        **LIMIT, default=10.0, help="cut a longer step to fewer sequences; default: %(default)s")),
    ("niah", "--model", dict(
        type=filled, default="out/small-paper", help="folder of a run of halo.py; default: %(default)s")),
    ("niah", "--teacher", dict(type=filled, help="folder of its teacher; default: the run's own")),
    ("niah", "--data", dict(nargs="+", type=filled, help="text, as for halo.py; default: the run's own")),
    ("niah", "--times", dict(
        **COUNT, default=256, help="longest context, in trained lengths; default: %(default)s")),
    ("niah", "--windows", dict(
        **COUNT, default=32, help="held-out texts to measure the loss on; default: %(default)s")),
    ("niah ablate", "--trials", dict(
        **COUNT, default=20, help="questions of every task at every length; default: %(default)s")),
    ("ablate", "--teacher", dict(
        choices=halo.TEACHERS, metavar="NAME",
        help=f"one of {', '.join(halo.TEACHERS)}; default: mini, on a CPU tiny")),
    ("ablate", "--only", dict(
        nargs="+", choices=ABLATIONS, metavar="CHANGE", help=f"of {', '.join(map(repr, ABLATIONS))}")),
    ("ablate", "--seeds", dict(
        **COUNT, default=3, help=f"seeds of {', '.join(SEEDED)}; others have one; default: %(default)s")),
    ("ablate", "--jobs", dict(**COUNT, help="runs at once; default: 5 per GPU, on a CPU 1")),
    ("ablate", "--budget", dict(**LIMIT, default=1.0, help="as for halo.py; default: %(default)s")),
]


def get_args(argv):
    p = Parser(prog="bench.py", description=__doc__.split("\n\n")[0],
               epilog="Sizes: " + ", ".join(f"{name} ({size.title})" for name, size in SIZES.items()) + ".")
    modes = p.add_subparsers(dest="mode", required=True)
    for mode, line in re.findall(r"python bench\.py (\w+) +(.*)", __doc__):
        parser = modes.add_parser(mode, help=line, description=line, epilog=p.epilog)
        for used_by, flag, options in FLAGS:
            if mode in used_by.split():
                parser.add_argument(flag, **options)
    args = p.parse_args(argv)
    if "device" in args:
        settle(args)
    return args


def settle(args):
    """Check the device, and fill in the defaults that depend on it."""
    args.device = default_device(args.device or (None if torch.cuda.is_available() else "cpu"))
    kind, _, index = args.device.partition(":")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"--device {args.device}: its times cannot be trusted; give cuda or cpu")
    if args.mode in ON_GPU:
        args.size = args.size or (ON_GPU[args.mode] if kind == "cuda" else ["tiny"])
    if args.mode == "prefill":
        args.kind = args.kind or ["hybrid", "teacher"]
    if args.mode == "ablate":
        gpus = 1 if index else torch.cuda.device_count()
        args.teacher = args.teacher or ("mini" if kind == "cuda" else "tiny")
        args.jobs = args.jobs or (5 * gpus if kind == "cuda" else 1)


def run_main(argv):
    args = get_args(argv)
    table = MODES[args.mode](args)
    if table:
        print(f"\nwritten to {os.path.relpath(table.path)}")


def main(argv=None):
    command_line("bench.py", run_main, argv)


if __name__ == "__main__":
    main()
