"""Speed, memory and long contexts, beside what a user would pick instead.

    python bench.py decode     ms a token after contexts of up to a million tokens, and the floor
    python bench.py prefill    seconds and memory to read such contexts, and the floor
    python bench.py when       from which context on the hybrid is the better choice, by the rows of decode
    python bench.py train      a step of every stage at a real size: tokens a second, memory, utilisation
    python bench.py kernel     the scan of kernel.py, flash-linear-attention (if installed), and attention
    python bench.py niah       what a student and its teacher find, and predict, far past the trained length
    python bench.py ablate     a distillation for every single change of a recipe, several at once
    python bench.py figure     results/decode.png anew, from the rows of decode

Compared are the hybrid of the paper's recipe, its teacher (all attention, the same code) and the hybrid of
the article's recipe with its window of 2,048 tokens. Weights and the contents of states are random: no time
depends on them. Tables are printed row by row and kept in results/ with the device they were measured on; a
run that is cut off keeps its rows, and a row measured again takes the old one's place. Out of memory is a
result like any other: "memory" in a table, null in a file.
"""
import argparse
import bisect
import contextlib
import gc
import glob
import itertools
import math
import os
import platform
import queue
import re
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

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import halo  # noqa: E402
from hypenet import FAMILIES, HypeNet, HypeNetConfig, State, fuse, write_file  # noqa: E402
from support.common import Parser, command_line, default_device, number, read_json, write_json  # noqa: E402
from support.recall import TASKS, answers, has_room, recall  # noqa: E402
from support.run import Probe, ProbeStage, bf16, checkpoint_blocks, checkpointed, peak_gb  # noqa: E402
from support.text import Corpus  # noqa: E402
from support.tokens import Tokenizer  # noqa: E402
from kernel import chunked_scan  # noqa: E402

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")

# ---- models and what they must do --------------------------------------------------------------------------


class Size(NamedTuple):
    title: str
    teacher: HypeNetConfig
    layers: str                      # of the hybrid: letters, or a way to choose them (halo.choose_layers)
    contexts: tuple = (4096, 32768, 131072, 524288, 1048576)
    batches: tuple = ()              # (batch, context) that decode measures too; 0: the largest that fits
    kinds: tuple = ("hybrid", "teacher")


ALL = ("hybrid", "teacher", "article")
QWEN3 = dict(n_kv_head=8, head_dim=128, vocab_size=151936, max_len=40960, rope_theta=1e6, **FAMILIES["qwen3"])
SIZES = {
    "2b": Size("HypeNet-2B / Qwen3-1.7B", HypeNetConfig(
        "A" * 28, n_embd=2048, n_head=16, n_hidden=6144, **QWEN3), "LLAALLALAALLLLLLLLLLLALLLALL",
        batches=((32, 4096), (0, 65536)), kinds=ALL),
    "gpt2-xl": Size("GPT-2 XL", HypeNetConfig(
        "A" * 48, 50257, 1600, 25, 25, 64, 6400, 1024, **FAMILIES["gpt2"]), "even"),
    "llama-1b": Size("Llama 3.2-1B", HypeNetConfig(
        "A" * 16, n_embd=2048, n_head=32, n_kv_head=8, head_dim=64, n_hidden=8192, vocab_size=128256,
        max_len=131072, rope_theta=5e5, **FAMILIES["llama"]), "even"),
    "14b": Size("Qwen3-14B", HypeNetConfig(
        "A" * 40, n_embd=5120, n_head=40, n_hidden=17408, **{**QWEN3, "tied": False}), "even",
        (32768, 131072, 524288)),
    "tiny": Size("the tiny teacher", halo.TEACHERS["tiny"], "even", (256, 1024), ((4, 256), (0, 1024)), ALL),
}


def recipe(name, **changes):
    """The options of halo.py under a recipe."""
    return argparse.Namespace(**{**vars(halo.get_args([])), **halo.RECIPES[name], "changes": {}, **changes})


def config_of(size, kind):
    """The config of a hybrid, the paper's or the article's, or of the teacher. A table of learned positions
    would limit the latter to its length: it goes without, which saves one addition a token."""
    s = SIZES[size]
    if kind == "teacher":
        return replace(s.teacher, attn_position=s.teacher.position == "rope")
    o = recipe("article" if kind == "article" else "paper", max_ctx=2 * s.contexts[-1])
    layers = halo.choose_layers("ends" if kind == "article" else s.layers, len(s.teacher.layers))
    return replace(halo.student_config(s.teacher, layers, o), logit_base=500.0 if kind == "hybrid" else None)


def dtype_on(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(config, device):
    with torch.device(device):
        return HypeNet(config).to(dtype_on(device)).requires_grad_(False).eval()


def models(o, device):
    """(size, kind, config, model) of all that --size and --kind ask for; None: the model does not fit."""
    for size in o.size:
        for kind in o.kind or SIZES[size].kinds:
            config = config_of(size, kind)
            release()
            yield size, kind, config, attempt(partial(build, config, device))


def weigh(config, batch, context, dtype):
    """Bytes that one decoded token of each row must move, and bytes that must be held: weights (of a table
    that is only looked up in, next to nothing moves), S (read and written) and the K/V of the context."""
    with torch.device("meta"):
        model = HypeNet(config)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    looked_up = sum(w.numel() for w in tables if not (config.tied and w is model.wte.weight))
    S, KV = State(config, batch, context, "meta", dtype).nbytes()
    weights = model.n_params() * dtype.itemsize
    return weights - looked_up * dtype.itemsize + 2 * S + KV, weights + S + KV


def operations(config, T, part=""):
    """Of a forward pass over T tokens: those of the Linears with `part` in their names, two for each weight
    and token, and those of softmax attention, four for each channel, query and key that it sees. Not counted:
    the head, norms, and the scan, under 2% of the rest."""
    with torch.device("meta"):
        blocks = HypeNet(config).blocks
    weights = sum(m.weight.numel() for name, m in blocks.named_modules()
                  if isinstance(m, nn.Linear) and part in name)
    W = min(T, config.window or T)                       # the first W queries see 1, 2, ... W keys
    pairs = W * (W + 1) // 2 + (T - W) * W
    return 2 * T * weights, 4 * config.n_head * config.head_dim * pairs * config.layers.count("A")


# ---- measuring ---------------------------------------------------------------------------------------------


def milliseconds(f, device, warm=2, repeat=20, flush=True):
    """Median time of f(), in ms. On a GPU what lies in its cache is overwritten before each call (flush), and
    calls are queued, so that Python's own time hides behind the card's, as it does in training."""
    for _ in range(warm):
        f()
    if device.type != "cuda":
        return statistics.median(1000 * once(f, device)[0] for _ in range(3))
    scratch = torch.empty(2 ** 28 if flush else 0, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    torch.cuda.synchronize(device)
    for begin, end in events:
        scratch.zero_()
        begin.record()
        f()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def once(f, device):
    """Seconds that f() takes, and GB that it allocates at its peak over what was there (None on a CPU)."""
    gpu = torch.cuda if device.type == "cuda" else None
    if gpu:
        gpu.synchronize(device)
        gpu.reset_peak_memory_stats(device)
    before, began = gpu and gpu.memory_allocated(device), time.perf_counter()
    f()
    if gpu:
        gpu.synchronize(device)
    return time.perf_counter() - began, gpu and (gpu.max_memory_allocated(device) - before) / 1e9


def profiled(title, f):
    """f(), and a table of the kernels that it spends its time in."""
    with torch.profiler.profile() as profile:
        f()
    on_gpu = [(e.self_device_time_total, e) for e in profile.key_averages()
              if e.device_type == torch.autograd.DeviceType.CUDA]
    times = on_gpu or [(e.self_cpu_time_total, e) for e in profile.key_averages()]
    print(f"\n{title}: ms in all, calls, us a call")
    for us, e in sorted(times, key=lambda pair: -pair[0])[:16]:
        print(f"{us / 1000:10.3f}{e.count:7d}{us / e.count:10.1f}  {e.key[:90]}")
    print(flush=True)


def copy_rate(device):
    """Bytes a second, read and written, of a large copy."""
    a = torch.empty(2 ** (32 if device.type == "cuda" else 26), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a), device) / 1000)


def matmul_rate(device):
    """Operations a second of a large product, in the dtype of models."""
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device, dtype=dtype_on(device))
    return 2 * n ** 3 / (milliseconds(lambda: a @ b, device) / 1000)


def attention_rate(config, device):
    """Operations a second of the best single call of causal attention with a model's heads, and its name."""
    H, D, T, rates = config.n_head, config.head_dim, 16384 if device.type == "cuda" else 512, {}
    q, k, v = torch.randn(3, 1, H, T, D, device=device, dtype=dtype_on(device))
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
        pass                                             # what f had made is freed once the handler is left
    release()


def release():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- tables ------------------------------------------------------------------------------------------------


def machine(device):
    """What was measured on, and its short name in that of a file: h200, 4090, cpu."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    kind = re.findall(r"[a-z]*\d+\w*|$", name.lower())[0] or "gpu" if cuda else device.type
    return dict(device=name, dtype=str(dtype_on(device)).removeprefix("torch."), torch=torch.__version__,
                python=platform.python_version(), triton=installed("triton")), kind


def installed(package):
    """The version of a package, None if it is not there."""
    return next((d.version for d in distributions() if d.metadata["Name"] == package), None)


class Table:
    """A table, printed row by row, and its file results/MODE-DEVICE.json, written anew with each row. Rows of
    earlier runs on the same machine with the same versions stay, but for those that are measured again.
    columns: "name:format name:format ...", of which the first `keys` tell one row from another."""

    def __init__(self, o, device, keys, columns, about, **facts):
        self.columns = [(name, *re.match(r"(<?\d+)(.*)", form).groups()) for name, _, form in
                        (column.partition(":") for column in columns.split())]
        self.facts, kind = machine(device)
        plain = "-plain" * getattr(o, "plain", False)
        self.path = os.path.join(RESULTS, f"{o.name or f'{o.what}-{kind}{plain}'}.json")
        self.keys = [name for name, *_ in self.columns[:keys]]
        found = read_table(self.path) if os.path.exists(self.path) else {}
        self.rows = found["rows"] if all(found.get(k) == v for k, v in self.facts.items()) else []
        self.facts |= facts
        os.makedirs(RESULTS, exist_ok=True)
        print(f"{self.facts['device']}, {self.facts['dtype']}, {about}\n")
        print("".join(f"{name.replace('_', ' '):{'' if '<' in width else '>'}{width}}"
                      for name, width, _ in self.columns))

    def add(self, **row):
        self.rows = [r for r in self.rows if any(r[key] != row[key] for key in self.keys)] + [row]
        write_json(self.path, dict(**self.facts, rows=self.rows))
        print("".join(f"{self.cell(name, row.get(name), form):{'' if '<' in width else '>'}{width}}"
                      for name, width, form in self.columns), flush=True)

    @staticmethod
    def cell(name, value, form):
        if value is None:                                # a time is missing for one reason alone
            return "memory" if name in ("ms", "seconds", "forward", "both") else "-"
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else format(value, form)


def read_table(path):
    """What a Table has written; ValueError for any other file."""
    content = read_json(os.path.dirname(path), os.path.basename(path), "table of bench.py")
    if not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is no table of bench.py, it has no rows: remove it, or give another --name")
    return content


# ---- decode ------------------------------------------------------------------------------------------------

WARM = 5                                                 # steps; the second one records the graph


def bench_decode(o):
    device = torch.device(o.device)
    rate = copy_rate(device)
    table = Table(o, device, 4, "size:<9 kind:<9 batch:6, context:11, ms:10.2f floor_ms:10.2f ratio:7.2f "
                  "tok_s:9,.0f need_gb:9.2f peak_gb:9.2f", f"""copies {rate / 1e12:.3g} TB/s
A batch of rows, each with so many tokens of context, gets one more token each. Floor: bytes of weights, S
(both ways) and K/V over the rate of copies. GB: of weights and state; of all, at the peak.""",
                  copy_rate=rate)
    for size, kind, config, model in models(o, device):
        todo = [(o.batch, n) for n in o.ctx or SIZES[size].contexts]
        todo += () if o.ctx or kind == "article" else SIZES[size].batches
        measure = partial(decode_row, model, config, rate, device)
        for batch, context in todo:
            release()
            row = measure(context, batch or largest_batch(config, context, device))
            while row["ms"] is None and not batch and row["batch"] > 1:        # less room than it looked
                row = measure(context, row["batch"] * 15 // 16)
            table.add(size=size, kind=kind, **row)
        del model, measure
    draw(table.facts, table.rows, "2b" if "2b" in o.size else o.size[0])
    return table


def decode_row(model, config, rate, device, context, batch):
    """ms a step and peak memory of a decoder whose state is filled with random numbers."""
    def work():
        state = model.init_state(batch, context + WARM + 20)
        for tensor in (t for layer in state.layers for t in layer.values()):
            tensor.normal_()
        state.pos.fill_(context)
        state.seen = context
        return milliseconds(model.decoder(state), device, warm=WARM, flush=False)
    moved, held = weigh(config, batch, context, dtype_on(device))
    floor, cuda = 1000 * moved / rate, device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    ms = model and attempt(work)
    return dict(batch=batch, context=context, ms=ms, floor_ms=floor, ratio=ms and ms / floor,
                tok_s=ms and 1000 * batch / ms, need_gb=held / 1e9,
                peak_gb=torch.cuda.max_memory_allocated(device) / 1e9 if cuda and ms else None)


def largest_batch(config, context, device):
    """Rows that should fit beside a model, by arithmetic: 3% are left for what a step needs. Of the memory of
    a CPU, only what is enough to try."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 ** 26
    one, two = (weigh(config, batch, context, dtype_on(device))[1] for batch in (1, 2))
    return max(1, int(0.97 * free / (two - one)))


LOOK = dict(hybrid=("#1f4e79", "hybrid"), teacher=("#a63d2f", "all attention"),
            article=("#5b7f3a", "article's hybrid,\nwindow of 2,048"))


def pyplot():
    """matplotlib.pyplot, or None and a line."""
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib, then python bench.py figure")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw(facts, rows, size):
    """ms a token against context: results/decode.png, of sizes other than 2b decode-SIZE.png."""
    if (plt := pyplot()) is None:
        return
    fig, ax = plt.subplots(figsize=(7.2, 4.4), dpi=150)
    rows = sorted((r for r in rows if r["size"] == size and r["batch"] == 1), key=lambda r: r["context"])
    for kind, (color, label) in LOOK.items():
        mine = [r for r in rows if r["kind"] == kind]
        fit = [r for r in mine if r["ms"]]
        if not fit:
            continue
        x, look = [r["context"] for r in fit], dict(xytext=(8, 0), va="center", ha="left")
        ax.plot(x, [r["ms"] for r in fit], color=color, lw=1.8, marker="o", ms=3.5)
        ax.plot(x, [r["floor_ms"] for r in fit], color=color, lw=0.8, ls=(0, (4, 3)))
        if len(fit) < len(mine):
            label += f",\nno memory for {mine[len(fit)]['context']:,}"
            look = dict(xytext=(4, 6), va="bottom", ha="right")
        ax.annotate(label, (x[-1], fit[-1]["ms"]), textcoords="offset points", color=color, fontsize=9,
                    linespacing=1.3, **look)
    ax.set(xscale="log", yscale="log", xlabel="tokens of context")
    ax.minorticks_off()
    contexts, (low, high) = sorted({r["context"] for r in rows}), ax.get_ylim()
    steps = [y for e in range(-3, 5) for y in (10 ** e, 2 * 10 ** e, 5 * 10 ** e) if low <= y <= high]
    ax.set_xticks(contexts, [f"{n:,}" for n in contexts], fontsize=8)
    ax.set_yticks(steps, [f"{y:g}" for y in steps], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title("Milliseconds a token", loc="left", fontsize=11, pad=20)
    ax.text(0, 1.025, f"{SIZES[size].title}, batch 1, {facts['dtype']}, {facts['device']}; dashed: time to "
            "move weights, state and K/V once", transform=ax.transAxes, fontsize=8, color="0.35")
    fig.tight_layout()
    path = os.path.join(RESULTS, "decode.png" if size == "2b" else f"decode-{size}.png")
    write_file(path, partial(fig.savefig, format="png"))
    plt.close(fig)
    print(f"\nfigure in {os.path.relpath(path)}")


def bench_figure(o):
    draw(*measured(o)[0][1:], o.size)


# ---- when to use it ----------------------------------------------------------------------------------------


def measured(o):
    """[(file, facts, rows)]: what decode has measured of a size at batch 1."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(RESULTS), f"{o.name or 'decode-*'}.json"))):
        content = read_table(path)
        rows = [r for r in content["rows"] if (r.get("size"), r.get("batch")) == (o.size, 1)]
        if {"hybrid", "teacher"} <= {r["kind"] for r in rows}:
            found.append((path, content, sorted(rows, key=lambda r: r["context"])))
    if not found:
        raise ValueError(f"no rows of {o.size}, hybrid and teacher, in results/{o.name or 'decode-*'}.json; "
                         f"measure them: python bench.py decode --size {o.size}")
    return found


def at(contexts, values, n):
    """The value at n, straight in log-log between those measured, level before the first; inf next to inf."""
    i = bisect.bisect(contexts, max(n, contexts[0]))
    a, x = contexts[i - 1], values[i - 1]
    if n <= a or x == math.inf:
        return x
    return x * (values[i] / x) ** (math.log(n / a) / math.log(contexts[i] / a))


def wins_from(contexts, ours, theirs):
    """The context from which on ours is less than theirs up to the last; None: not even there. Between two
    that were measured, where the curves, straight in log-log, cross."""
    lead = [math.log(y / x) for x, y in zip(ours, theirs)]
    behind = max((i for i, d in enumerate(lead) if d <= 0), default=-1)
    if behind in (-1, len(lead) - 1):
        return contexts[0] if behind < 0 else None
    (a, b), (d, e) = contexts[behind:behind + 2], lead[behind:behind + 2]
    return b if e == math.inf else a * (b / a) ** (d / (d - e))


def bench_when(o):
    for path, facts, rows in measured(o):
        found = {(r["kind"], r["context"]): r for r in rows}
        contexts = [n for kind, n in found if kind == "hybrid" and found["hybrid", n]["ms"]
                    and ("teacher", n) in found]
        ms, gb = ({kind: [value(found[kind, n]) for n in contexts] for kind in ("hybrid", "teacher")}
                  for value in (lambda r: r["ms"] or math.inf, lambda r: r["peak_gb"] or r["need_gb"]))
        if not contexts or o.ctx > contexts[-1]:
            raise ValueError(f"--ctx {o.ctx}: the hybrid was measured, and fits, up to a context of "
                             f"{max(contexts, default=0)} tokens ({os.path.relpath(path)})")
        print(f"{SIZES[o.size].title}, batch 1, {facts['device']}, {os.path.relpath(path)}\n"
              f"one token after {o.ctx:,}"
              + f" (taken for {contexts[0]:,}, the shortest measured)" * (o.ctx < contexts[0]))
        now = {kind: (at(contexts, ms[kind], o.ctx), at(contexts, gb[kind], o.ctx)) for kind in ms}
        for kind, (t, m) in now.items():
            shown = f"{t:.2f} ms" if t < math.inf else "not measured, for lack of memory"
            print(f"  {kind:8s} {shown}, {m:.3g} GB")
        for what, curves in dict(time=ms, memory=gb).items():
            since = wins_from(contexts, curves["hybrid"], curves["teacher"])
            about = since and f"{float(f'{since:.2g}'):,.0f}"
            print(f"  in {what} the hybrid wins " + (
                f"at no context up to {contexts[-1]:,}" if since is None else f"from about {about} tokens on"
                if since > contexts[0] else f"from {since:,} tokens on, the shortest measured"))
        print(f"  {verdict(now, o.ms, o.gb)}")


def verdict(now, ms=None, gb=None):
    """now: ms (inf: does not fit) and GB of hybrid and teacher; ms, gb: limits. A sentence."""
    fit = [kind for kind, (t, m) in now.items() if t < math.inf and t <= (ms or t) and m <= (gb or m)]
    limits = " and ".join(filter(None, (ms and f"{ms:g} ms", gb and f"{gb:g} GB"))) or "this device"
    if len(fit) < 2:
        return (f"use the {fit[0]}: it alone is known to keep within {limits}" if fit else
                f"use neither: both exceed {limits}; take a smaller model")
    (t, m), (u, n) = now["hybrid"], now["teacher"]
    choice = ("the teacher", "either", "the hybrid")[(t < u) + (m < n)]
    return f"use {choice}: the hybrid takes {t / u:.2f} of the time and {m / n:.2f} of the memory"


# ---- prefill -----------------------------------------------------------------------------------------------


def bench_prefill(o):
    device = torch.device(o.device)
    linear, rates = matmul_rate(device), {n: attention_rate(SIZES[n].teacher, device) for n in o.size}
    shown = ", ".join(f"{rate:.3g} ({size}, {best})" for size, (rate, best) in rates.items())
    table = Table(o, device, 3, "size:<9 kind:<9 context:11, seconds:10.3f floor_s:10.3f ratio:7.2f "
                  "tok_s:11,.0f extra_gb:10.2f", f"""operations a second: {linear:.3g}, attention {shown}
So many tokens of context are read. Floor: operations of Linears and of attention over these rates, those of a
large product and of the best call of attention. Extra GB: at the peak, over weights and state.""",
                  matmul_rate=linear, attention_rate=rates)
    for size, kind, config, model in models(o, device):
        contexts = [n for n in o.ctx or SIZES[size].contexts if kind != "teacher" or n <= o.teacher_max]
        if model and contexts:                           # compiles what there is to
            attempt(partial(prefill, model, min(32768, max(contexts)), o.segment, device))
        for context in contexts:
            release()
            if o.profile and model:
                profiled(f"{size} {kind}, {context:,} tokens",
                         partial(attempt, partial(prefill, model, context, o.segment, device)))
            runs = [model and attempt(partial(prefill, model, context, o.segment, device))
                    for _ in range(2 if context <= 131072 else 1)]
            seconds, extra = min(filter(None, runs), key=lambda run: run[0], default=(None, None))
            of_linears, of_attention = operations(config, context)
            floor = of_linears / linear + of_attention / rates[size][0]
            table.add(size=size, kind=kind, context=context, seconds=seconds, floor_s=floor, extra_gb=extra,
                      ratio=seconds and seconds / floor, tok_s=seconds and context / seconds)
        del model
    return table


def prefill(model, context, segment, device):
    """Seconds, and GB over weights and state (None on a CPU), of reading random ids."""
    prompt = torch.randint(model.config.vocab_size, (context,), device=device)
    state, options = model.init_state(1, context), dict(segment=segment) if segment else {}
    return once(lambda: model.prefill(prompt, state, **options), device)


# ---- train -------------------------------------------------------------------------------------------------

PEAKS = dict(h100=989e12, h200=989e12, a100=312e12)      # dense bf16 operations a second, by the maker


class RandomText:
    """Stands in for the Corpus and the tokenizer of halo.py."""

    def __init__(self, n_vocab):
        self.n_vocab = n_vocab

    def rows(self, stage, plan):
        rng, shape = np.random.default_rng(0), (plan.batch, plan.length + 1)
        return lambda step: rng.integers(self.n_vocab, size=shape)


class Trial(Probe):
    """Stands in for a Run of halo.py: takes a few steps of every stage of o.stage on random ids, as a Probe,
    then two of a whole batch, of which the second is reported. A step of more than o.seconds is cut to fewer
    sequences: each costs the same."""

    def __init__(self, teacher, plans, o):
        super().__init__(vars(o), o.tokenizer.n_vocab)
        self.o = o
        halo.convert_staged(self, teacher, o.tokenizer, plans, o)

    def stage(self, name, plan, module, optimizer, gradients):
        return TrialStage(self, name, plan, module, optimizer, gradients)


class TrialStage(ProbeStage):
    def steps(self, corpus):
        o, plan = self.run.o, self.plan
        if self.name not in o.stage:
            return
        yield from super().steps(corpus)                                       # finds what fits at once
        speed, self.replay = self.run.found[self.name][1], None
        whole = max(1, int(o.seconds * speed / (self.at_once * plan.length)))
        batch = min(plan.batch, self.at_once * whole)
        device = next(self.module.parameters()).device
        rows = torch.randint(self.run.n_vocab, (batch, plan.length + 1), device=device)
        for step in range(2):
            wait(device)
            began = time.perf_counter()
            yield step, rows
            wait(device)
            seconds = time.perf_counter() - began
        o.report(self.name, plan, batch, seconds, at_once=self.at_once, peak_gb=peak_gb(device.type),
                 checkpoint=checkpointed(self.module))
        checkpoint_blocks(self.module, on=False)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_operations(stage, teacher, student, T):
    """Operations a token of a stage's models, in sequences of T: 2 a weight for the teacher, 6 for what is
    trained (4 where its input needs no gradient), with heads and attention, without recomputation."""
    def forward(config, head=True):
        return sum(operations(config, T)) / T + 2 * head * config.n_embd * config.vocab_size
    if stage == "align":
        twins = replace(student, layers="L" * len(student.layers))
        of_twins = 3 * operations(twins, T, "mixer")[0] - operations(twins, T, "qkvz")[0]
        return forward(teacher, head=False) + of_twins / T
    return 3 * forward(student) + (forward(teacher) if stage == "distil" else 0)


def bench_train(o):
    device = torch.device(o.device)
    peak = o.peak or PEAKS.get(machine(device)[1])
    table = Table(o, device, 2, "size:<9 stage:<9 length:8, plan_batch:11 batch:7, at_once:8 checkpoint:11 "
                  "seconds:9.2f tok_s:9,.0f used:7.1% peak_gb:8.1f tokens:14, hours:8.2f",
                  f"""peak {f"{peak:.3g}" if peak else "unknown (--peak)"} operations a second
A step of each stage of halo.py under the paper's plan, all of its batch or the first so many sequences, so
many at once. Used: share of the peak. Hours: for all tokens of the plan.""", peak=peak)
    for size in o.size:
        plans = {name: plan for name, plan in halo.PLANS["tiny" if size == "tiny" else "real"].items()
                 if name in ("align", "distil", "finetune")}
        teacher, student = SIZES[size].teacher, config_of(size, "hybrid")

        def report(stage, plan, batch, seconds, **row):
            speed = batch * plan.length / seconds
            each = train_operations(stage, teacher, student, plan.length)
            table.add(size=size, stage=stage, length=plan.length, plan_batch=plan.batch, batch=batch,
                      seconds=seconds, tok_s=speed, operations=each, used=peak and each * speed / peak,
                      tokens=plan.total, hours=plan.total / speed / 3600, **row)
        options = recipe("paper", layers=student.layers, device=o.device, report=report, seconds=o.seconds,
                         stage=o.stage, tokenizer=RandomText(teacher.vocab_size))
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
    """q, k, v, log decays as a trained gate gives them (mean retention 0.85), and the upstream gradient, all
    bf16 but a constant decay."""
    B, T, H, K, V = shape
    rng = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, device=device, generator=rng)
    q, k, v, do = (normal(B, T, H, n).bfloat16() for n in (K, K, V, V))
    if decay == "constant":
        return q, k, v, -torch.exp2(-8 * torch.arange(1, H + 1, device=device) / H), do
    g = F.logsigmoid(normal(B, T, H, K) if decay == "channel" else normal(B, T, H)).bfloat16() / 2
    return q, k, v, g, do


def ours(q, k, v, g, backend=None):
    return chunked_scan(q, k, v, g, scale=q.shape[-1] ** -0.5, backend=backend)[0]


def sdpa(q, k, v, g):                                    # keys as wide as values, as attention has them
    q, k, v = (F.pad(x, (0, v.shape[-1] - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def rivals(decay, device):
    """Functions (q, k, v, log_decay) -> o: ours, and what else there is."""
    found = dict(ours=ours)
    try:
        if device.type != "cuda":
            raise ImportError
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
        found["fla"] = {"channel": lambda q, k, v, g: chunk_gla(q, k, v, g)[0],
                        "head": lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0],
                        "constant": lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g)[0]}[decay]
    except ImportError:
        pass
    return dict(found, sdpa=sdpa) if decay == "constant" else found


def gradients(f, tensors, do):
    """f(*tensors), then its gradient in each of them but a constant decay."""
    leaves = [x.detach().requires_grad_(x.dim() > 1) for x in tensors]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], do)]


def scan_row(f, tensors, do, refs, device):
    """Times in ms, GB, and RMSE(out - ref) / RMSE(ref) of o and each gradient on the heads of refs."""
    def forward():
        with torch.no_grad():
            f(*tensors)
    both, began = partial(gradients, f, tensors, do), time.time()
    out = attempt(both)
    first = time.time() - began
    errors = {name: ((x[:1, :, :r.size(2)].double() - r).norm() / r.norm()).item()
              for name, x, r in zip(("o", "dq", "dk", "dv", "dlog_decay"), out or (), refs)}
    del out
    return dict(first_call_s=first, forward=attempt(lambda: milliseconds(forward, device)),
                both=attempt(lambda: milliseconds(both, device)),
                gb=(attempt(lambda: once(both, device)) or (0, None))[1], **errors)


def bench_kernel(o):
    device = torch.device(o.device)
    rate = copy_rate(device)
    table = Table(o, device, 3, "shape:<24 decay:<10 by:<5 forward:9.3f both:9.3f floor:8.3f of_floor:9.0% "
                  "gb:7.2f o:9.1e dq:9.1e dk:9.1e dv:9.1e dlog_decay:11.1e", f"""copies {rate / 1e12:.3g} TB/s
ms of a scan in bf16, its shape B, T, H, K, V: forward, and with the backward pass (both). Floor: the bytes of
a forward pass over the rate of copies. o, dq, ...: relative errors, against fp64.""", copy_rate=rate)
    for shape, decay in itertools.product(SCANS if device.type == "cuda" else CPU_SCANS, DECAYS):
        *tensors, do = scan_inputs(shape, decay, device)
        sliced = [(x[:1, :, :2] if x.dim() > 1 else x[:2]).double() for x in (*tensors, do)]       # two heads
        refs = gradients(partial(ours, backend="torch"), sliced[:4], sliced[4])
        floor = 1000 * sum(x.numel() * x.element_size() for x in (*tensors, do) if x.dim() > 1) / rate
        for name, f in rivals(decay, device).items():
            try:
                row = scan_row(f, tensors, do, refs if name != "sdpa" else (), device)
            except RuntimeError as e:
                if name == "ours":
                    raise
                print(f"{' '.join(map(str, shape)):24s}{decay:10s}{name}: {' '.join(str(e).split())[:150]}")
                continue
            version = dict(version=installed("flash-linear-attention")) if name == "fla" else {}
            table.add(shape=list(shape), decay=decay, by=name, **row, **version, floor=floor,
                      of_floor=row["forward"] and floor / row["forward"])
    return table


# ---- recall and loss at any length -------------------------------------------------------------------------


def wilson(hits, n, z=1.96):
    """The 95% interval of a share of which hits of n were seen (Wilson's, which stays within 0 and 1)."""
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


@contextlib.contextmanager
def stretched(model, factor):
    """A RoPE model read with YaRN (arXiv 2309.00071) for so many times its length, without training: short
    wavelengths stay, long ones slow down, and logits grow by (0.1 log(factor) + 1)^2."""
    if factor <= 1:
        yield
        return
    config, gain = model.config, (0.1 * math.log(factor) + 1) ** 2
    before, gains = config.rope_scaling, [block.mixer.q_norm.weight for block in model.blocks]
    kept = [w.data.clone() for w in gains]
    config.rope_scaling = dict(factor=factor, original_max_position_embeddings=config.max_len,
                               low_freq_factor=1.0, high_freq_factor=32.0)
    try:
        for w in gains:
            w.data *= gain
        yield
    finally:
        config.rope_scaling = before
        for w, data in zip(gains, kept):
            w.data.copy_(data)


def last_loss(model, texts, count):
    """Mean loss, nats a token, of the last `count` tokens of each text (texts, n), all before them read."""
    with bf16():
        logp = [answers(model, torch.from_numpy(text).to(model.wte.weight.device)[None], count)[0]
                for text in texts]
    return -torch.cat(logp).mean(1).cpu().numpy()


def bench_niah(o):
    """Rows of two kinds: the tasks of TASKS after so much text, by_depth of those at 0, 1/4, .. of it,
    the last of which stand right before the question; "loss", of the ends of held-out texts after so much of
    each."""
    device, report = torch.device(o.device), read_json(o.model, "report.json", "report of halo.py")
    teacher_at = o.teacher or halo.teacher_path(report.get("teacher", "tiny"))
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    student, teacher = (HypeNet.from_pretrained(path, kind, o.device) for path in (o.model, teacher_at))
    if not o.data and os.path.exists(os.path.join(o.model, "run.json")):
        o.data = read_json(o.model, "run.json", "run of halo.py")["options"]["data"]
    corpus = Corpus(Tokenizer.load(teacher_at), o.data)
    T, base, layers = teacher.config.max_len, student.config.logit_base, student.config.layers
    lengths = [T * n for n in (1, 2, 4, 16, 64, 256) if n <= o.times]
    table = Table(o, device, 3, "model:<24 task:<10 context:9, of:6 value:9.3f low:8.3f high:8.3f",
                  f"""{o.model} ({layers}), its teacher {teacher_at}, trained at {T:,} tokens
Share of answers given in full after so much text, of so many asked for at five depths, and its 95% interval;
where none is at two lengths, longer ones are not tried.
loss: nats a token of the same ends of held-out texts, so much of each text read; its interval is that of the
difference to the first.""", trained=T, layers=layers, logit_base=base)
    table.rows = []                                      # another model's
    last, every = min(lengths[-1], 64 * T), list(TASKS)
    texts = corpus.windows(np.random.default_rng(0), o.windows, last)
    kinds = [("student", student, every, base, None), ("student without s_t", student, ["S1"], None, None),
             ("teacher", teacher, every, None, None), ("teacher, YaRN", teacher, every, None, None),
             ("teacher, sink + window", teacher, every, None, T)]
    for name, model, tasks, a, keep in kinds:
        yarn = name == "teacher, YaRN"
        if name == "student without s_t" and base is None or yarn and not (
                teacher.config.qk_norm and teacher.config.position == "rope"):
            continue
        model.config.logit_base, first = a, None
        for task in tasks:
            found = []
            for n in [n for n in lengths if has_room(task, n, corpus)]:
                if min(n, keep or n) <= model.config.limit() and found[-2:] != [0, 0]:
                    with stretched(model, n / T if yarn else 1):
                        each = recall(model, corpus, n, o.trials, task=task, keep=keep)[1]
                    hits = each.sum().item()
                    found, (low, high) = [*found, hits], wilson(hits, o.trials)
                    table.add(model=name, task=task, context=n, of=o.trials, value=hits / o.trials, low=low,
                              high=high, by_depth=[each[i::5].mean().item() for i in range(min(5, o.trials))])
        for n in lengths if keep is None else ():
            if n <= min(model.config.limit(), last):
                with stretched(model, n / T if yarn else 1):
                    x = last_loss(model, texts[:, -n:], T // 2)
                first = x if first is None else first
                mean, error = x.mean().item(), 2 * np.std(x - first).item() / max(1, len(x) - 1) ** 0.5
                table.add(model=name, task="loss", context=n, of=len(x), value=mean, low=mean - error,
                          high=mean + error)
    student.config.logit_base = base
    draw_niah(table.facts, table.rows, table.path.removesuffix("json") + "png")
    return table


COLORS = {"student": "#1f4e79", "student without s_t": "#7fa6c9", "teacher": "#a63d2f",
          "teacher, YaRN": "#d98c5f", "teacher, sink + window": "#8c8c8c",
          "S2": "#1f4e79", "S3": "#5b7f3a", "multi-key": "#b8860b"}


def draw_niah(facts, rows, path):
    """Pass keys found by all, the student's other tasks, loss by context."""
    if (plt := pyplot()) is None:
        return
    models, tasks, trained = list(COLORS)[:5], list(COLORS)[5:], facts["trained"]
    others = [("student", task, task) for task in tasks]
    panels = {"Pass key found (S1)": [(model, "S1", model) for model in models],
              "The student's other tasks, in other wordings": others,
              "Held-out loss, nats a token": [(model, "loss", model) for model in models]}
    if not any(r["value"] for r in rows if r["task"] in tasks and r["model"] == "student"):
        panels = {title: lines for title, lines in panels.items() if lines is not others}
    fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.9), dpi=150)
    for ax, (title, lines) in zip(axes, panels.items()):
        ax.axvline(trained, color="0.75", lw=0.8)
        for z, (model, task, label) in enumerate(reversed(lines), 3):       # the student on top
            mine = sorted((r["context"], r["value"], r["low"], r["high"]) for r in rows
                          if (r["model"], r["task"]) == (model, task))
            if mine:
                x, y, low, high = zip(*mine)
                ax.plot(x, y, color=COLORS[label], lw=1.6, marker="o", ms=3, label=label, zorder=z)
                ax.fill_between(x, low, high, color=COLORS[label], alpha=0.12, lw=0)
        ax.set_xscale("log", base=2)
        ticks = sorted({r["context"] for r in rows if r["task"] != "loss"})
        ax.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks], fontsize=8)
        ax.minorticks_off()
        least = min(r["value"] for r in rows if r["task"] == "loss")
        ax.set_ylim(*(0.9 * least, 2 * least) if "loss" in title else (-0.03, 1.05))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("tokens of context", fontsize=9)
        named = [x[::-1] for x in ax.get_legend_handles_labels()]
        if lines is others:
            ax.legend(*named, loc="lower left", fontsize=8, frameon=False)
        elif ax is axes[0]:                                                # the models, once, below all
            fig.legend(*named, loc="lower center", ncol=5, fontsize=8, frameon=False)
    axes[0].annotate("trained", (trained, 0), (2, 0), fontsize=7, color="0.5", textcoords="offset points")
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    write_file(path, partial(fig.savefig, format="png"))
    plt.close(fig)
    print(f"\nfigure in {os.path.relpath(path)}")


# ---- ablations ---------------------------------------------------------------------------------------------

ABLATIONS = {                                            # options of halo.py: changes of a recipe
    "paper": "", "article": "--recipe article",
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
SEEDED = [*halo.RECIPES, "layers by eq. 8", "layers by eq. 8, guarded"]    # with --seeds seeds, else one


def draws(n_layer, keep):
    """Every choice of `keep` layers that stay attention, in a random order: strings."""
    rng, found = np.random.default_rng(0), list(itertools.combinations(range(n_layer), keep))
    return ["".join("LA"[i in found[n]] for i in range(n_layer)) for n in rng.permutation(len(found))]


def bench_ablate(o):
    """Every run is a process of halo.py on the same teacher and tokens; so many run at once. Rows of another
    teacher of that name, as its loss tells, do not stay in the file."""
    path, config = halo.teacher_path(o.teacher), halo.TEACHERS[o.teacher]
    if not os.path.exists(os.path.join(path, "model.safetensors")):
        raise ValueError(f"--teacher {o.teacher} is not there yet: python halo.py --pretrain --teacher "
                         f"{o.teacher} --out {path}")
    plans, T = halo.PLANS[o.teacher.split("-")[0]], config.max_len
    stages = ("align", "distil", "finetune")
    tokens = plans["pretrain"].total + o.budget * sum(plans[stage].total for stage in stages)
    L = len(config.layers)
    known = dict(kv=config.n_kv_head, layers=halo.choose_layers("even", L), tokens=tokens,
                 draws=draws(L, max(1, L // 4)),
                 lr=[x * plans[stage].lr for x in (3, 1 / 3) for stage in stages],
                 batch=(4 * plans["distil"].batch, plans["distil"].batch // 4))
    o.name = o.name or "ablate"
    table = Table(o, torch.device(o.device), 4, "teacher:<12 budget:<7 change:<36 seed:5 layers:10 gap:9.4f "
                  "at_1x:8.0% at_16x:8.0% at_64x:8.0% four_1x:9.0% four_16x:9.0% four_64x:9.0% minutes:9.1f",
                  f"""teacher {o.teacher}, {T:,} tokens
Gap: held-out loss of student less teacher, nats a token. At 1, 16, 64 times that length: pass keys found; one
number of four found, if training had more than pass keys.
Minutes: of one run, {o.jobs} at once.""")
    report = os.path.join(path, "report.json")           # of a teacher that was made here
    made = read_json(path, "report.json", "report")["val_loss"] if os.path.exists(report) else None
    table.rows = [r for r in table.rows if r["teacher"] != o.teacher
                  or made is None or abs((r["teacher_loss"] or made) - made) < 1e-3]
    same = dict(teacher=o.teacher, budget=o.budget, trials=o.trials)
    done = {(r["change"], r["seed"]) for r in table.rows if r.items() >= same.items()}
    todo = [(name, seed) for seed in range(o.seeds) for name in o.only or ABLATIONS
            if (seed == 0 or name in SEEDED) and (name, seed) not in done]
    todo.sort(key=lambda run: run[0] not in halo.RECIPES)        # the yardstick first
    kind, _, index = o.device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    visible = visible.split(",")[int(index or 0):][:1 if index else max(1, torch.cuda.device_count())]
    gpus = queue.Queue()                                 # each job takes one, a GPU serves several
    for i in range(o.jobs):
        gpus.put(visible[i % len(visible)])

    def one(name, seed):
        with tempfile.TemporaryDirectory() as folder:
            flags = ABLATIONS[name].format(**known).split()
            flags += ["--teacher", o.teacher, "--out", folder, "--seed", str(seed), "--device", kind,
                      "--trials", str(o.trials),
                      *(["--budget", str(o.budget)] if "--pretrain" not in flags else [])]
            gpu = gpus.get()
            try:
                run = subprocess.run([sys.executable, os.path.join(halo.HERE, "halo.py"), *flags],
                                     env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                                     capture_output=True, text=True, check=False)
            finally:
                gpus.put(gpu)
            if run.returncode:
                return run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
            scores = read_json(folder, "run.json", "run")["done"].get("scores")
            return dict(read_json(folder, "report.json", "report"), scores=scores)
    with ThreadPoolExecutor(o.jobs) as pool, contextlib.ExitStack() as stop:
        stop.callback(pool.shutdown, wait=False, cancel_futures=True)              # Ctrl-C starts no other
        runs = {pool.submit(one, name, seed): (name, seed) for name, seed in todo}
        for run in as_completed(runs):
            (name, seed), r = runs[run], run.result()
            if isinstance(r, list):
                print(f"{name}, seed {seed}: failed: {' '.join(r)}", flush=True)
                continue
            loss, found, base = r["val_loss"], dict(at=r["passkey"], four=r.get("multikey", {})), made
            if isinstance(loss, dict):                   # not from scratch
                loss, base = loss["student"], loss["teacher"]
                found = {start: x.get("student", {}) for start, x in found.items()}
            base = base or next((x["teacher_loss"] for x in table.rows
                                if x["teacher_loss"] and x.items() >= same.items()), None)
            table.add(**same, change=name, seed=seed, layers=r["layers"], gap=base and loss - base,
                      **{f"{start}_{n}x": shares.get(str(n * T)) for start, shares in found.items()
                         for n in (1, 16, 64)}, minutes=r["seconds"] / 60,
                      flags=ABLATIONS[name], teacher_loss=base, scores=r["scores"],
                      logit_base=r.get("logit_base"))
    return table


# ---- command line ------------------------------------------------------------------------------------------

MODES = dict(decode=bench_decode, prefill=bench_prefill, when=bench_when, train=bench_train,
             kernel=bench_kernel, niah=bench_niah, ablate=bench_ablate, figure=bench_figure)
ON_GPU = dict(decode=["2b", "gpt2-xl", "14b"], prefill=["2b"], train=["2b", "gpt2-xl"])


def get_args(argv):
    p = Parser(prog="bench.py", description=__doc__.split("\n\n")[0],
               epilog="Sizes: " + ", ".join(f"{name} ({s.title})" for name, s in SIZES.items()) + ".")
    modes = p.add_subparsers(dest="what", required=True)
    tokens, positive = number(int, 1), number(float, 1e-9)
    for name, line in re.findall(r"python bench\.py (\w+) +(.*)", __doc__):
        add = modes.add_parser(name, help=line, description=line, epilog=p.epilog).add_argument
        add("--name", help="name of the file in results/, without .json")
        if name in ("when", "figure"):
            add("--size", default="2b", choices=SIZES)
        else:
            add("--device", help="cuda or cpu; default: cuda where there is one")
        if name in ON_GPU:
            add("--size", nargs="+", choices=SIZES, help=f"default: {' '.join(ON_GPU[name])}; on a CPU tiny")
        if name in ("decode", "prefill"):
            add("--kind", nargs="+", choices=ALL, default=None if name == "decode" else ["hybrid", "teacher"])
            add("--ctx", nargs="+", type=tokens, metavar="N", help="tokens of context; default: by size")
        if name == "decode":
            add("--batch", type=tokens, default=1, help="rows decoded at once")
        if name == "prefill":
            add("--segment", type=tokens, help="tokens read at a time; default: the model's own")
            add("--profile", action="store_true", help="show which kernels the time goes to")
            add("--teacher-max", type=tokens, default=131072, metavar="N", help="longest of the teacher")
        if name in ("prefill", "train"):
            add("--plain", action="store_true", help="without torch.compile (hypenet.fuse)")
        if name == "when":
            add("--ctx", type=tokens, required=True, metavar="N", help="tokens of context")
            add("--ms", type=positive, help="limit of a token's time")
            add("--gb", type=positive, help="limit of memory")
        if name == "niah":
            count = dict(type=tokens, metavar="N")
            add("--model", default="out/small-paper", help="folder of a run of halo.py; default: %(default)s")
            add("--teacher", help="folder of its teacher; default: as the run's report says")
            add("--data", nargs="+", help="as for halo.py; default: as the run's report says")
            add("--trials", default=20, help="questions of a task at a length; default 20", **count)
            add("--times", default=256, help="longest context, in trained lengths; default 256", **count)
            add("--windows", default=32, help="held-out texts for the loss; default 32", **count)
        if name == "ablate":
            add("--teacher", help=f"of {', '.join(halo.TEACHERS)}; default: mini, on a CPU tiny")
            add("--only", nargs="+", choices=ABLATIONS, metavar="CHANGE",
                help="of " + ", ".join(map(repr, ABLATIONS)))
            add("--seeds", type=tokens, default=3, metavar="N",
                help=f"of {', '.join(SEEDED)}; of all else one; default 3")
            add("--jobs", type=tokens, metavar="N", help="runs at once; default 5 a GPU, on a CPU 1")
            add("--trials", type=tokens, default=20, metavar="N", help="as for halo.py; default 20")
            add("--budget", type=positive, default=1.0, metavar="X", help="as for halo.py")
        if name == "train":
            stages = ("align", "distil", "finetune")
            add("--stage", nargs="+", choices=stages, default=stages, help="default: all three")
            add("--peak", type=positive, help="operations a second that the device could do")
            add("--seconds", type=positive, default=10.0, help="cut a step that takes longer")
    o = p.parse_args(argv)
    if "device" in o:
        o.device = default_device(o.device or (None if torch.cuda.is_available() else "cpu"))
        if torch.device(o.device).type not in ("cuda", "cpu"):
            raise ValueError(f"--device {o.device}: only cuda and cpu are timed rightly")
        cuda = o.device.startswith("cuda")
        if cuda and not vars(o).get("plain", True):
            fuse()
        if o.what == "ablate":
            gpus = 1 if ":" in o.device else torch.cuda.device_count()
            o.teacher, o.jobs = o.teacher or ("mini" if cuda else "tiny"), o.jobs or (5 * gpus if cuda else 1)
            if o.teacher not in halo.TEACHERS:
                raise ValueError(f"--teacher {o.teacher}: give one of {', '.join(halo.TEACHERS)}")
        if o.what in ON_GPU:
            o.size = o.size or (ON_GPU[o.what] if o.device.startswith("cuda") else ["tiny"])
    return o


def run_main(argv):
    o = get_args(argv)
    table = MODES[o.what](o)
    if table:
        print(f"\nwritten to {os.path.relpath(table.path)}")


def main(argv=None):
    command_line("bench.py", run_main, argv)


if __name__ == "__main__":
    main()
