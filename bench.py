"""Measure speed, memory and recall of HypeNets beside the models that a user would pick instead.

    python bench.py decode     milliseconds per generated token, after contexts of up to a million tokens
    python bench.py prefill    seconds and memory to read such contexts
    python bench.py train      a training step of every stage at a real size: tokens/s, memory, utilisation
    python bench.py kernel     the scan of kernel.py beside flash-linear-attention and softmax attention
    python bench.py niah       what students and their teacher recall and predict far past the trained length
    python bench.py ablate     one distillation for every single change of a recipe
    python bench.py figure     draw the figure of decode or niah again from its table

Three models are compared: the paper's hybrid, its teacher, and the article's hybrid. The teacher is all
attention and runs the same code. The article's hybrid has a window of 2,048 tokens. Weights and states are
random numbers, because no time depends on them.

Every table is printed row by row and kept in results/ with the name of the device. A run that is cut off
keeps its rows. A row that is measured again replaces the older row. A model that does not fit in memory gets
a row too: "memory" in the table, null in the file. The docstring of a mode is printed above its table.
"""
import argparse
import contextlib
import gc
import inspect
import itertools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

from support.early import prepare

prepare(__name__)                                # before torch is imported

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import halo
import kernel
from hypenet import FAMILIES, HypeNet, HypeNetConfig, State, Weightless, read_config, refuse, write_file
from support import fast, options, pretrained, shard, world
from support.common import (
    Parser, command_line, default_device, file_name, filled, number, read_json, write_json)
from support.options import get_args as halo_args
from support.recall import TASKS, has_room, read_end, recall, written, written_tasks
from support.report import token_scores
from support.run import Probe, ProbeStage, bf16, checkpoint_blocks, checkpointed, peak_gb
from support.text import Corpus, data_sources
from support.tokens import Tokenizer

RESULTS = os.path.join(halo.HERE, "results")

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
    "qwen3-4b": Size("Qwen3-4B", HypeNetConfig("A" * 36, n_embd=2560, n_head=32, n_hidden=9728, **QWEN3)),
    "qwen3-8b": Size("Qwen3-8B", HypeNetConfig(
        "A" * 36, n_embd=4096, n_head=32, n_hidden=12288, tied=False, **QWEN3)),
    "smollm2": Size("SmolLM2-135M", HypeNetConfig(
        "A" * 30, n_embd=576, n_head=9, n_kv_head=3, head_dim=64, n_hidden=1536, vocab_size=49152,
        max_len=8192, rope_theta=1e5, norm_eps=1e-5, **FAMILIES["llama"])),
    "tiny": Size("the tiny teacher", halo.TEACHERS["tiny"], kinds=ALL, contexts=(256, 1024),
                 batches=((4, 256), (0, 1024))),
}


def recipe(name, **changes):
    """The options of halo.py under a recipe."""
    args = vars(halo_args(halo, [])) | halo.RECIPES[name] | dict(changes={}) | changes
    return argparse.Namespace(**args)


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


def models(args):
    """Yield (size, kind, config, model) for all of --size and --kind, or for the student of --model and its
    teacher. A model of --size that does not fit is None."""
    for kind, path in run_of(args.model).items():
        release()
        model = pretrained.load(path, dtype_on(args.device), args.device)
        yield run_name(args.model), kind, model.config, model
        del model                                        # before the next one needs its memory
    for size in args.size:
        for kind in args.kind or SIZES[size].kinds:
            config = config_of(size, kind)
            release()
            yield size, kind, config, attempt(partial(build, config, args.device))


def heads_of(args):
    """{size: a config with the heads of its models}. A student has those of its teacher."""
    if args.model:
        given = read_json(args.model, "config.json", "model")
        return {run_name(args.model): read_config(given, args.model)}
    return {size: SIZES[size].teacher for size in args.size}


def run_name(folder):
    return os.path.basename(os.path.abspath(folder))


def run_of(folder):
    """{kind: path} of the student and the teacher of a run of halo.py. Without a folder there are none."""
    if folder is None:
        return {}
    report = read_json(folder, "report.json", "report of halo.py")
    return dict(student=folder, teacher=halo.teacher_path(report.get("teacher", "tiny")))


def weigh(config, batch, context, dtype):
    """Bytes that one decoded token of every row must move, and bytes that must be held. Moved are the weights
    once, S twice (read and written) and the K/V of the context. A table that is only looked up in counts as
    held, not as moved."""
    with Weightless():
        model = HypeNet(config)
    looked_up = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    if config.tied:
        looked_up -= model.wte.weight.numel()            # the head reads all of it
    S, KV = State(config, batch, context, "meta", dtype).nbytes()
    weights = model.n_params() * dtype.itemsize
    return weights - looked_up * dtype.itemsize + 2 * S + KV, weights + S + KV


def operations(config, T, part=""):
    """Operations of a forward pass over T tokens: of the Linears with `part` in their names, and of softmax
    attention. A Linear has 2 per weight and token, attention 4 per channel, query and visible key. The head,
    norms and scan are not counted: they are under 2% of the rest."""
    with Weightless():
        blocks = HypeNet(config).blocks
    linears = [(name, m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for name, m in linears if part in name)
    W = min(T, config.window or T)                       # the first W queries see 1, 2, ... W keys
    pairs = W * (W + 1) // 2 + (T - W) * W
    return 2 * T * weights, 4 * config.n_head * config.head_dim * pairs * config.layers.count("A")


# ---- measuring ---------------------------------------------------------------------------------------------


def clock(device):
    """The time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def once(f, device):
    """Seconds that f() takes, and the GB that it needs at its peak beyond what was there (CPU: None)."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = clock(device)
    f()
    seconds = clock(device) - began
    return seconds, (torch.cuda.max_memory_allocated(device) - before) / 1e9 if cuda else None


def reset_peak(device):
    """Let peak_gb begin anew. Only Linux can do so for the memory of a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")


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


def copy_rate(device):
    """Bytes per second, read and written, of a large copy. The memory is written first: pages that nobody
    has written are one page of zeros, which stays in the cache."""
    a = torch.ones(2 ** (32 if device.type == "cuda" else 29), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a), device) / 1000)


def matmul_rate(device):
    """Operations per second of a large matrix product, in the dtype of the models."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype_on(device))
    return 2 * n ** 3 / (milliseconds(lambda: a @ b, device) / 1000)


def attention_rate(config, device):
    """Operations per second of a large call of causal attention, with a model's heads."""
    H, D = config.n_head, config.head_dim
    T = 16384 if device.type == "cuda" else 4096
    q, k, v = torch.randn(3, 1, H, T, D, device=device, dtype=dtype_on(device))
    ms = milliseconds(lambda: fast.attend_lse(q, k, v, causal=True), device)
    return 4 * H * D * (T * (T + 1) / 2) / (ms / 1000)


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


# ---- tables and figures ------------------------------------------------------------------------------------


def machine(device):
    """The device and versions that are measured, and the device's short name for files: h200, 4090, cpu."""
    name = f"CPU, {torch.get_num_threads()} threads"
    kind = device.type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = re.findall(r"[a-z]*\d+\w*|$", name.lower())[0] or "gpu"
    return dict(device=name, dtype=str(dtype_on(device)).removeprefix("torch."), torch=torch.__version__,
                python=platform.python_version(), triton=getattr(kernel.triton, "__version__", None)), kind


WIDTHS = dict(                       # of columns, others 9; below 0: the text stands at the left
    size=-8, kind=-9, stage=-9, shape=-22, decay=-10, by=-10, model=-27, task=-25, change=-35, seed=5, of=6,
    value=10, low=10, high=10,
    batch=6, plan_batch=5, length=7, at_once=8, used=9, context=11, checkpoint=7, gpus=5, hours=8,
    seconds=9, tok_s=10, pass_keys=16,
    one_of_four=16)
HEADINGS = dict(tok_s="tok/s", need_gb="needs GB", peak_gb="peak GB", extra_gb="extra GB", gb="GB",
                used="use", plan_batch="of", checkpoint="redone")


class Table:
    """A table that is printed row by row, and its file results/MODE-DEVICE.json, written with every row.
    keys: the fields that tell two rows apart. columns: the fields that are printed. about: a line that is
    printed first. Earlier rows of the same machine and versions stay until they are measured again."""

    def __init__(self, args, keys, columns, about, **facts):
        self.keys = keys.split()
        self.columns = columns.split()
        self.facts, kind = machine(args.device)
        self.path = os.path.join(RESULTS, f"{args.name or f'{args.mode}-{kind}'}.json")
        found = read_table(self.path) if os.path.exists(self.path) else {}
        same = all(found.get(key) == value for key, value in self.facts.items())
        self.rows = found["rows"] if same else []
        self.facts |= facts
        os.makedirs(RESULTS, exist_ok=True)
        print(f"{self.facts['device']}, {self.facts['dtype']}, {about}")
        print(inspect.getdoc(MODES[args.mode]) + "\n")
        self.show({name: HEADINGS.get(name, name.replace("_", " ")) for name in self.columns})

    def add(self, shown=None, **row):
        """Keep a row and print it. shown: cells that are printed and not kept."""
        self.rows = [old for old in self.rows if any(old.get(key) != row[key] for key in self.keys)] + [row]
        if world.RANK == 0:
            write_json(self.path, dict(**self.facts, rows=self.rows))
        self.show(row | (shown or {}))

    def show(self, cells):
        line = ""
        for name in self.columns:
            value = cells.get(name)
            if value is None:                            # a time is missing for one reason alone
                value = "memory" if name in ("ms", "seconds", "forward", "both") else "-"
            if isinstance(value, list):
                value = " ".join(map(str, value))
            if isinstance(value, (int, float)):
                value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
            width = WIDTHS.get(name, 9)
            line += value[:-width - 1].ljust(-width) if width < 0 else value.rjust(width)
        print(line, flush=True)


def read_table(path):
    """What a Table has written; ValueError for any other file."""
    content = read_json(os.path.dirname(path), os.path.basename(path), "table of bench.py")
    if not isinstance(content.get("rows"), list):
        raise ValueError(f"{path} is no table of bench.py, it has no rows: remove it, or give another --name")
    return content


def chosen(rows, **fields):
    """The rows that have these values."""
    return [row for row in rows if row.items() >= fields.items()]


def draw(path, panels):
    """Draw panels (title, lines, ylim) beside each other into a .png. A line is (label, rows); lines of one
    label have one colour. A row has context, value, and the band from low to high. Without ylim the axis is
    logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no figure: pip install matplotlib, then python bench.py figure")
        return
    fig = Figure(figsize=(4.2 * len(panels), 4.6), dpi=150, layout="tight")
    for ax, (title, lines, ylim) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        contexts = sorted({row["context"] for _, rows in lines for row in rows})
        lines = [line for line in lines if line[1]]
        labels = list(dict.fromkeys(label for label, _ in lines))
        for label, rows in lines:
            z = labels.index(label)
            rows = sorted(rows, key=lambda row: row["context"])
            x, y, low, high = ([row[key] for row in rows] for key in ("context", "value", "low", "high"))
            ax.plot(x, y, f"C{z}", lw=1.6, marker="o", ms=3, label=label, zorder=9 - z)
            ax.fill_between(x, low, high, color=f"C{z}", alpha=0.12, lw=0)
        if ylim is None:
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts], fontsize=8)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set(xlabel="tokens of context", ylim=ylim)
        handles = {line.get_label(): line for line in ax.lines}.values()          # one for each label
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=8,
                  frameon=False)
    write_file(path, partial(fig.savefig, format="png"))
    print(f"\nfigure in {os.path.relpath(path)}")


def bench_figure(args):
    path = os.path.join(RESULTS, f"{args.name}.json")
    content = read_table(path)
    fields = content["rows"][0] if content["rows"] else {}
    if "floor_ms" not in fields and "task" not in fields:
        raise ValueError(f"--name {args.name}: {path} is no table of decode or niah, so it has no figure")
    drawing = draw_decode if "floor_ms" in fields else draw_niah
    drawing(content, content["rows"], path)


# ---- decode ------------------------------------------------------------------------------------------------

RUN_CONTEXTS = (8192, 32768, 131072)                     # of --model


WARM = 5                                                 # untimed calls; the second one records the graph


def contexts_of(args, size, kind, config):
    """The contexts of --ctx or the default. Of a run only as many as its positions allow."""
    if not args.model:
        return args.ctx or SIZES[size].contexts
    contexts = args.ctx or RUN_CONTEXTS
    known = [n for n in contexts if n + WARM + 20 <= config.limit()]
    if len(known) < len(contexts):
        print(f"{kind}: contexts near or above its limit, {config.limit():,} tokens, are left out")
    return known


def bench_decode(args):
    """Every row of the batch has this context and gets one more token.
    Floor: the bytes of weights, S (read and written) and K/V, divided by the rate of copies.
    Needs: weights and state. Peak: everything that is allocated; on a CPU the whole process."""
    device = args.device
    rate = copy_rate(device)
    table = Table(args, "size kind batch context",
                  "size kind batch context ms floor_ms ratio tok_s need_gb peak_gb",
                  f"copies {rate / 1e12:.3g} TB/s", copy_rate=rate)
    for size, kind, config, model in models(args):
        todo = [(args.batch, n) for n in contexts_of(args, size, kind, config)]
        if not args.ctx and not args.model and kind != "article":
            todo += SIZES[size].batches
        measure = partial(decode_row, model, config, rate, device)
        for batch, context in todo:
            release()
            row = measure(context, batch or largest_batch(config, context, device))
            while row["ms"] is None and not batch and row["batch"] > 1:        # less room than it looked
                row = measure(context, row["batch"] * 15 // 16)
            table.add(size=size, kind=kind, **row)
        del model, measure
    draw_decode(table.facts, table.rows, table.path)
    return table


def decode_row(model, config, rate, device, context, batch):
    """ms per token and peak memory of a decoder whose state is filled with random numbers."""
    def work():
        state = filled_state(model, batch, context, WARM + 20)
        return milliseconds(fast.Decoder(model, state), device, warm=WARM, flush=False)
    moved, held = weigh(config, batch, context, dtype_on(device))
    floor = 1000 * moved / rate
    reset_peak(device)
    ms = model and attempt(work)
    return dict(batch=batch, context=context, ms=ms, floor_ms=floor, ratio=ms and ms / floor,
                tok_s=ms and 1000 * batch / ms, need_gb=held / 1e9,
                peak_gb=peak_gb(device.type) if ms else None)


def filled_state(model, batch, context, more):
    """A state of random numbers, as if it had read `context` tokens, with room for `more` tokens."""
    state = model.init_state(batch, context + more)
    for layer in state.layers:
        for tensor in layer.values():
            tensor.normal_()
    state.pos.fill_(context)
    return state


def largest_batch(config, context, device):
    """Rows that should fit beside a model, by arithmetic. A step may need 3% of the memory for itself. On a
    CPU a few rows are enough to try."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 ** 26
    one, two = (weigh(config, batch, context, dtype_on(device))[1] for batch in (1, 2))
    return max(1, int(0.97 * free / (two - one)))


def draw_decode(facts, rows, path):
    """A panel for each size: ms per token at batch 1, and the band down to the floor. The figure that has 2b
    is decode.png."""
    rows = [dict(row, value=row["ms"], low=row["floor_ms"], high=row["ms"]) for row in rows
            if row["batch"] == 1 and row["ms"]]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    panels = []
    for size in sizes:
        lines = [(kind, chosen(rows, size=size, kind=kind)) for kind in (*ALL, "student")]
        title = SIZES[size].title if size in SIZES else size
        panels.append((f"{title}: ms per token", lines, None))
    if sizes:
        name = "decode.png" if "2b" in sizes else f"decode-{sizes[0]}.png"
        draw(os.path.join(RESULTS, name), panels)


# ---- prefill -----------------------------------------------------------------------------------------------


WHOLE = 60                           # seconds: a CPU's reading with a larger floor is estimated
SEGMENT = 1024                       # tokens that fast.prefill reads at a time on a CPU


def bench_prefill(args):
    """Every row reads a context from its first token to its last.
    Floor: operations of the Linears and of attention, each divided by its measured rate (printed above).
    Extra: peak memory beyond weights and state. Peak: everything; on a CPU the whole process.
    Estimated: only the first, middle and last segment were read; the times of the others are interpolated."""
    device = args.device
    cuda = device.type == "cuda"
    if args.profile:
        return profile(args)
    if cuda:
        fast.fuse()
    linear = matmul_rate(device)
    rates = {size: attention_rate(config, device) for size, config in heads_of(args).items()}
    shown = ", ".join(f"{rate:.3g} ({size})" for size, rate in rates.items())
    table = Table(args, "size kind context",
                  "size kind by context seconds floor_s ratio tok_s extra_gb peak_gb",
                  f"operations per second: {linear:.3g}, attention {shown}",
                  matmul_rate=linear, attention_rate=rates)
    for size, kind, config, model in models(args):
        contexts = [n for n in contexts_of(args, size, kind, config)
                    if args.ctx or kind != "teacher" or n <= 131072]
        if contexts:
            prefill(model, device, min(32768 if cuda else SEGMENT, max(contexts)))      # compiles
        for context in contexts:
            release()
            of_linears, of_attention = operations(config, context)
            floor = of_linears / linear + of_attention / rates[size]
            whole = cuda or floor < WHOLE
            read = prefill if whole else estimate
            found = [read(model, device, context) for _ in range(2 if cuda and context <= 131072 else 1)]
            seconds, extra, peak = min(filter(None, found), default=(None,) * 3, key=lambda row: row[0])
            table.add(size=size, kind=kind, context=context, by="whole" if whole else "estimated",
                      seconds=seconds, floor_s=floor, ratio=seconds and seconds / floor,
                      tok_s=seconds and context / seconds, extra_gb=extra, peak_gb=peak)
        del model
    return table


def prefill(model, device, context):
    """Seconds to read random ids, GB beyond weights and state (CPU: None), and GB at the peak. None if the
    model does not fit."""
    def work():
        prompt = torch.randint(model.config.vocab_size, (context,), device=device)
        state = model.init_state(1, context)
        reset_peak(device)
        return *once(lambda: fast.prefill(model, prompt, state), device), peak_gb(device.type)
    return model and attempt(work)


def estimate(model, device, context):
    """Like prefill, but only three segments are read and the rest is interpolated. The GB beyond weights and
    state is None. A segment's time grows evenly with the tokens before it. Earlier keys and values are random
    numbers."""
    def work():
        starts = np.arange(0, context, SEGMENT)
        read = starts[[0, len(starts) // 2, -1]]
        idx = torch.randint(model.config.vocab_size, (1, SEGMENT), device=device)
        reset_peak(device)
        state, times = filled_state(model, 1, context, SEGMENT), []
        for start in read.tolist():
            state.pos.fill_(start)
            times.append(once(lambda: fast.read(model, idx, state), device)[0])
        return float(np.interp(starts, read, times).sum()), None, peak_gb(device.type)
    return model and attempt(work)


KERNELS = {                          # kinds of kernels by their names; the first that fits counts
    "attention": "sdpa|flash|fmha|attend_kernel|merge_kernel|cache_kernel",
    "scan": "scan_kernel|scan_token_kernel|prepare_kernel",
    "QK-norm and RoPE": "heads_kernel",
    "products": "nvjet|gemm|gemv|cutlass|linear_kernel",
    "norms, gates, sums": ""}


def profile(args):
    """Print which kernels take the time of a prompt that is read, then of one more token."""
    if args.device.type != "cuda":
        raise ValueError("--profile shows the kernels of a GPU: give --device cuda")
    fast.fuse()
    for size, kind, config, model in models(args):
        if model is None:
            print(f"{size} {kind}: memory")
            continue
        for context in args.ctx or [4096]:
            prompt = torch.randint(config.vocab_size, (context,), device=args.device)
            state = filled_state(model, 1, context, 100)
            decode = fast.Decoder(model, filled_state(model, 1, context, 100))

            def read():
                state.pos.zero_()
                fast.prefill(model, prompt, state)
            print_kernels(f"{size} {kind}, {context:,} tokens read", model, read, args.device)
            print_kernels(f"{size} {kind}, one token after {context:,}", model, decode, args.device)


def print_kernels(title, model, f, device):
    """Print the time of f() by kinds of kernels. Host: how long the CPU takes to launch the kernels."""
    for _ in range(4):                                   # compiles and records what there is to
        f()
    began = clock(device)
    f()
    host = 1000 * (time.perf_counter() - began)
    ms = 1000 * min(once(f, device)[0] for _ in range(10))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        once(f, device)
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    found = shares([(e.name, e.time_range.elapsed_us() / 1000) for e in events], products_of(model))
    rest = ms - sum(each for each, _ in found.values())
    print(f"\n{title}: {ms:.3f} ms, between kernels {rest:.3f}, host {host:.3f}")
    for part, (each, n) in found.items():
        print(f"{part:20s}{each:9.3f} ms{n:6d} launches{100 * each / ms:6.1f}%", flush=True)


def products_of(model):
    """What each matrix product of a forward pass computes, in order."""
    parts = []
    for block in model.blocks:
        gate = ["forget gate"] * (getattr(block.mixer, "forget", None) is not None)
        parts += ["q, k, v, gate", *gate, "output", "MLP up", "MLP down"]
    return [*parts, "head"]


def shares(kernels, products):
    """{kind: [ms, launches]} of kernels (name, ms) in the order of their launches. Products are told apart if
    there are as many as `products` names."""
    kinds = [next(kind for kind, names in KERNELS.items() if re.search(names, name)) for name, _ in kernels]
    parts = iter(products if kinds.count("products") == len(products) else ())
    found = {}
    for kind, (_, ms) in zip(kinds, kernels):
        row = found.setdefault(next(parts, kind) if kind == "products" else kind, [0.0, 0])
        row[0] += ms
        row[1] += 1
    return found


# ---- train -------------------------------------------------------------------------------------------------

PEAKS = dict(h100=989e12, h200=989e12, a100=312e12)      # dense bf16 operations per second, by the maker
STAGES = ("align", "distil", "finetune")


class Trial(Probe):
    """Stands in for a Run and a Corpus of halo.py. A stage takes the few steps of a Probe on random ids. Two
    steps of a whole batch follow, and options["report"] gets the second. A step that would take more than
    options["seconds"] has fewer sequences, because every sequence costs the same."""

    def stage(self, name, plan, module, optimizer, gradients):
        return TrialStage(self, name, plan, module, optimizer, gradients)

    def rows(self, stage, plan):
        """Random ids, as the rows of a Corpus."""
        rng = np.random.default_rng(0)
        return lambda step: rng.integers(self.n_vocab, size=(plan.batch, plan.length + 1))


class TrialStage(ProbeStage):
    def steps(self, corpus, rows_of):
        plan = self.plan
        options = self.run.options
        if self.name not in options["stage"]:
            return
        yield from super().steps(corpus, rows_of)                  # finds what fits at once
        speed = self.run.found[self.name][1]
        at_once = self.at_once * world.SIZE
        whole = max(1, int(options["seconds"] * speed / (at_once * plan.length)))
        batch = min(plan.batch, at_once * whole)
        self.replay = self.replay if batch == at_once else None
        checkpoint_blocks(self.module, on=shard.is_shared(self.module))
        device = next(self.module.parameters()).device
        rows = torch.randint(self.run.n_vocab, (batch, plan.length + 1), device=device)
        began = []
        for step in range(2):
            began.append(clock(device))
            yield step, rows
        seconds = clock(device) - began[1]
        options["report"](self.name, plan, batch, seconds, at_once=self.at_once, peak_gb=peak_gb(device.type),
                          checkpoint=checkpointed(self.module))
        checkpoint_blocks(self.module, on=False)


def train_operations(stage, teacher, student, T, short=0.0):
    """Operations per token of a stage's models on sequences of T, with heads and attention, without
    recomputation. Each weight costs the teacher 2 and the student 6, or 4 where no gradient reaches the
    input of its Linear. short: the share of a sequence of stage 3 that is read as texts of T / 32, with the
    teacher."""
    def forward(config, head=True):
        return sum(operations(config, T)) / T + 2 * head * config.n_embd * config.vocab_size
    if stage == "align":
        twins = replace(student, layers="L" * len(student.layers))
        of_twins = 3 * operations(twins, T, "mixer")[0] - operations(twins, T, "qkvz")[0]
        return forward(teacher, head=False) + of_twins / T
    if short:
        texts = train_operations("distil", teacher, student, T // 32)
        rest = train_operations("finetune", teacher, student, round((1 - short) * T))
        return short * texts + (1 - short) * rest
    return 3 * forward(student) + (forward(teacher) if stage == "distil" else 0)


def plans_of(size):
    """The plans of the stages that train a student of this size, without things to recall."""
    plans, longest = halo.PLANS["tiny" if size == "tiny" else "real"], SIZES[size].teacher.max_len
    plans = {stage: replace(plans[stage], recall=0.0) for stage in STAGES}
    return plans | {stage: options.cut(plans[stage], longest) for stage in ("align", "distil")}


def bench_train(args):
    """One step of each stage of halo.py under the plan of real teachers.
    Batch: sequences of the step, of the plan's so many. At once: as many go through the models together.
    Redone: activations are computed again in the backward pass.
    Use: share of the peak. Hours: for all tokens of the plan."""
    device = args.device
    if device.type == "cuda":
        fast.fuse((vars(halo), "relative_error"))
    peak = args.peak or PEAKS.get(machine(device)[1])
    columns = "size stage gpus length batch plan_batch at_once checkpoint seconds tok_s used peak_gb hours"
    rate = f"peak {f'{peak:.3g}' if peak else 'unknown (--peak)'} operations per second"
    table = Table(args, "size stage gpus recipe", columns, f"recipe {args.recipe}, {rate}", peak=peak)
    for size in args.size:
        plans = plans_of(size)
        teacher = SIZES[size].teacher
        student = config_of(size, "hybrid")

        def report(stage, plan, batch, seconds, **row):
            speed = batch * plan.length / seconds
            each = train_operations(stage, teacher, student, plan.length, plan.short)
            table.add(size=size, stage=stage, gpus=world.SIZE, recipe=args.recipe, length=plan.length,
                      plan_batch=plan.batch, batch=batch, seconds=seconds, tok_s=speed, operations=each,
                      used=peak and each * speed / peak / world.SIZE, tokens=plan.total,
                      hours=plan.total / speed / 3600, **row)
        options = recipe(args.recipe, layers=student.layers, device=args.device, report=report,
                         seconds=args.seconds, stage=args.stage)
        trial = Trial(vars(options), teacher.vocab_size)
        try:
            halo.convert_staged(trial, build(teacher, device), trial, plans, options)
        except (torch.OutOfMemoryError, ValueError) as e:                      # the latter: halo's
            line = f"{size:9s}memory: {' '.join(str(e).split())}"
            if world.SIZE > 1:
                raise ValueError(line) from None         # it ends the others, which may wait for this process
            print(line, flush=True)
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
    return kernel.chunked_scan(q, k, v, g, scale=q.shape[-1] ** -0.5, backend=backend)[0]


def rivals(decay, device):
    """{name: function (q, k, v, log_decay) -> o}: ours, and what else there is."""
    def sdpa(q, k, v, g):                                # its keys are as wide as its values
        q, k, v = (F.pad(x, (0, v.shape[-1] - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
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
    both = partial(gradients, f, tensors, do)
    began = time.time()
    out = attempt(both)
    first = time.time() - began
    errors = {}
    for name, x, ref in zip(("o", "dq", "dk", "dv", "dlog_decay"), out or (), refs):
        errors[name] = ((x[:1, :, :ref.size(2)].double() - ref).norm() / ref.norm()).item()
    del out
    with torch.no_grad():
        ms = attempt(lambda: milliseconds(partial(f, *tensors), device))
    ms_both = attempt(lambda: milliseconds(both, device))
    memory = attempt(lambda: once(both, device))
    return dict(first_call_s=first, forward=ms, both=ms_both, gb=memory and memory[1], **errors), errors


def bench_kernel(args):
    """ms of a scan in bf16: forward, and both forward and backward. Shape: B T H K V.
    Floor: the bytes of a forward pass, divided by the rate of copies. Of floor: floor / forward.
    Error: the largest relative error of o and the gradients, against float64."""
    device = args.device
    rate = copy_rate(device)
    table = Table(args, "shape decay by", "shape decay by forward both floor of_floor gb error",
                  f"copies {rate / 1e12:.3g} TB/s", copy_rate=rate)
    shapes = [args.shape] if args.shape else SCANS if device.type == "cuda" else CPU_SCANS
    for shape, decay in itertools.product(shapes, DECAYS):
        *tensors, do = scan_inputs(shape, decay, device)
        all_of = [*tensors, do]
        sliced = [(x[:1, :, :2] if x.dim() > 1 else x[:2]).double() for x in all_of]        # two heads
        refs = gradients(partial(ours, backend="torch"), sliced[:4], sliced[4])
        floor = 1000 * sum(x.numel() * x.element_size() for x in all_of if x.dim() > 1) / rate
        for name, f in rivals(decay, device).items():
            try:
                row, errors = scan_row(f, tensors, do, refs if name != "sdpa" else (), device)
            except RuntimeError as e:
                if name == "ours":
                    raise
                print(f"{' '.join(map(str, shape)):22s}{decay:10s}{name}: {' '.join(str(e).split())[:60]}")
                continue
            if name == "fla":
                row["version"] = version("fla-core")
            table.add(shape=list(shape), decay=decay, by=name, **row, floor=floor,
                      of_floor=row["forward"] and floor / row["forward"],
                      shown=dict(error=max(errors.values(), default=None)))
    return table


# ---- recall and loss at any length -------------------------------------------------------------------------


class Reader(NamedTuple):
    """A model and the way in which it reads long text."""
    name: str
    model: HypeNet
    tasks: dict                      # names and Tasks of support/recall.py
    logit_base: float | None = None
    keep: int | None = None          # read only the first 4 and the last keep - 4 tokens
    yarn: bool = False               # stretch RoPE to every length


READERS = ("students", "teacher", "yarn", "window")


def stretch(config, factor):
    """Let a model with RoPE read with YaRN (arXiv 2309.00071), for a multiple of the trained length, without
    training. Short wavelengths stay, long ones grow; logits grow by (0.1 log(factor) + 1)^2. A factor of 1
    takes YaRN away."""
    config.rope_scaling = None
    if factor > 1:
        config.rope_scaling = dict(rope_type="yarn", factor=factor,
                                   original_max_position_embeddings=config.max_len)


@contextlib.contextmanager
def reading(reader, n):
    """A context in which the model of a reader reads n tokens in the reader's way."""
    config = reader.model.config
    config.logit_base = reader.logit_base
    if reader.yarn:
        stretch(config, n / config.max_len)
    yield
    if reader.yarn:
        stretch(config, 1)


def wilson(hits, n, z=1.96):
    """The 95% interval (Wilson's) of a share, after hits of n. It stays within 0 and 1."""
    p = hits / n
    d = 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def at_ends(models, texts, count):
    """The means of token_scores over the last `count` tokens of every text (texts, n), after all earlier
    tokens are read: of one model (texts, 1), or of teacher and student (texts, 4)."""
    means = []
    at_once = max(1, min(16, 65536 // texts.shape[1]))              # logits are wide
    for part in world.parts(torch.from_numpy(texts), at_once):
        part = part.to(models[0].wte.weight.device)
        with bf16():
            ends = [read_end(model, part[:, :-1], count, model.init_state(*part.shape)) for model in models]
        means += token_scores(ends, part[:, -count:]).mean(1).cpu()                 # ends: (B, count, V)
    return torch.stack(world.gather(means)).numpy()


def readers(students, teacher, tasks, kinds=READERS):
    """The readers of these kinds. students: {name: model}. Each student as it is. A single student also
    without s_t. The teacher: as it is, with YaRN, and with a window. A control: as it is, and with YaRN. A
    model whose RoPE is scaled already is not stretched again."""
    found = []
    for name, student in students.items() if "students" in kinds else ():
        found.append(Reader(name, student, tasks, student.config.logit_base))
        if len(students) == 1 and student.config.logit_base is not None:
            found.append(Reader(f"{name} without s_t", student, dict(S1=TASKS["S1"])))
    if "teacher" in kinds:
        found.append(Reader("teacher", teacher, tasks))
    for name, model in {**students, "teacher": teacher}.items() if "yarn" in kinds else ():
        c = model.config
        if "L" not in c.layers and c.position == "rope" and c.attn_position and c.rope_scaling is None:
            found.append(Reader(f"{name}, YaRN", model, tasks, yarn=True))
    if "window" in kinds:
        found.append(Reader("teacher, sink + window", teacher, tasks, keep=teacher.config.max_len))
    return found


def is_open(table, reader, task, n):
    """Whether the last two shorter contexts have an answer, or were not tried."""
    rows = [row for row in chosen(table.rows, model=reader.name, task=task) if row["context"] < n]
    rows.sort(key=lambda row: row["context"])
    return [row["value"] for row in rows[-2:]] != [0, 0]


def ask(table, reader, n, corpus, trials, bar):
    """The rows of a reader's tasks in n tokens: the share of answers found, and by_depth the shares where the
    needle stands at 0, 1/4, ... of the text."""
    for name, task in reader.tasks.items():
        if is_open(table, reader, name, n) and has_room(task, n, corpus.tokenizer):
            if task.write:
                found = written(reader.model, corpus, n, trials, task, keep=reader.keep)
            else:
                found = recall(reader.model, corpus, n, trials, task=task, keep=reader.keep)[1]
            hits = found.sum().item()
            low, high = wilson(hits, trials)
            by_depth = [found[i::5].mean().item() for i in range(min(5, trials))]
            with tqdm.external_write_mode():
                table.add(model=reader.name, context=n, task=name, of=trials, value=hits / trials, low=low,
                          high=high, by_depth=by_depth)
        bar.update(trials * min(n, reader.keep or n))


def predict(table, reader, n, texts, count, teacher, first):
    """The rows of a reader's predictions of the last `count` tokens of texts {kind: (texts, longest)}, in
    contexts of n tokens. A student is compared with its teacher as far as the teacher was trained. first: the
    losses of each reader at its first length."""
    compared = reader.name in table.facts["students"] and n <= teacher.config.max_len
    for kind, rows in texts.items():
        if n > rows.shape[1]:
            continue
        models = [teacher, reader.model] if compared else [reader.model]
        columns = at_ends(models, rows[:, -n:], count).T
        loss = columns[int(compared)]
        start = first.setdefault((reader.name, kind), loss)
        measured = {"loss": (loss, loss - start)}
        if compared:
            teachers, _, kl, same = columns
            gap = loss - teachers
            measured |= {"loss - teacher's": (gap, gap), "KL": (kl, kl), "same token": (same, same)}
        for name, (values, spread) in measured.items():
            mean = values.mean().item()
            error = 2 * np.std(spread).item() / max(1, len(values) - 1) ** 0.5
            with tqdm.external_write_mode():
                table.add(model=reader.name, context=n, task=name + kind, of=len(values), value=mean,
                          low=mean - error, high=mean + error)


def bench_niah(args):
    """value: the share of answers found, with its 95% interval. of: the number of questions.
    S1: a pass key. S2: a number in prose. S3: 32 hexadecimal digits in prose.
    multi-key: one of four numbers. multi-query: all four numbers. chat: a number, asked for in plain words.
    In multi-query and chat the model writes its answer.
    After two lengths without an answer, longer ones are not tried.
    All other rows measure the last tokens of texts of this length, up to 64 trained lengths.
    low and high are 2 standard errors from the mean.
    loss: nats per token. Its interval is that of the difference to the first length of the same call,
    so the first has none.
    loss - teacher's, KL(teacher, student), same token: student and teacher on the same texts.
    unseen: text of --unseen, a kind that no model here was trained on."""
    names = student_names(args.model)
    text_of_run(args)
    report = read_json(args.model[0], "report.json", "report of halo.py")
    teacher_at = args.teacher or halo.teacher_path(report.get("teacher", "tiny"))
    tokenizer = Tokenizer.load(teacher_at)
    for folder in args.model:
        refuse(Tokenizer.load(folder).digest() != tokenizer.digest(),
               f"--model {folder}: its tokenizer is not that of the teacher, {teacher_at}")
    load = partial(pretrained.load, dtype=dtype_on(args.device), device=args.device)
    students = {name: load(folder) for name, folder in zip(names, args.model)}
    teacher = world.in_turn(partial(load, teacher_at))
    T = teacher.config.max_len
    corpus = world.in_turn(partial(Corpus, tokenizer, args.data))
    lengths = args.contexts or [T * n for n in (1, 2, 4, 16, 64, 256) if n <= args.times]
    lengths = lengths_within(corpus, lengths)
    texts, sha256 = niah_texts(args, corpus, min(lengths[-1], 64 * T))
    count = min(256, lengths[0] // 2)                    # tokens to predict
    facts = {name: dict(folder=os.path.normpath(folder), layers=model.config.layers,
                        logit_base=model.config.logit_base, sha256=pretrained.digest(folder))
             for (name, model), folder in zip(students.items(), args.model)}
    table = Table(args, "model task context", "model task context of value low high",
                  f"{', '.join(args.model)}, teacher {teacher_at}, trained at {T:,} tokens",
                  trained=T, sha256=[pretrained.digest(teacher_at), *sha256],
                  predicted=[args.windows, count], students=facts)
    keep_rows(table)
    tasks = TASKS | written_tasks(corpus.tokenizer)
    cells = [(reader, n, (args.trials_long or args.trials) if n >= 32768 else args.trials)
             for reader in readers(students, teacher, tasks, args.readers) for n in lengths
             if min(n, reader.keep or n) <= reader.model.config.limit()]
    total = sum(trials * min(n, reader.keep or n) * len(reader.tasks) for reader, n, trials in cells)
    first = {}
    with tqdm(total=total, unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=2) as bar:
        for reader, n, trials in cells:
            with reading(reader, n):
                ask(table, reader, n, corpus, trials, bar)
                if reader.keep is None:
                    predict(table, reader, n, texts, count, teacher, first)
    if world.RANK == 0:
        draw_niah(table.facts, table.rows, table.path)
    return table


def student_names(folders):
    """The names of students in a table: of several, the names of their folders."""
    if len(folders) == 1:
        return ["student"]
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    refuse(len({*names, "teacher"}) <= len(names), f"--model {' '.join(folders)}: two folders have the same "
           "name, or one has the name teacher; rename one")
    return names


def text_of_run(args):
    """Without --data, set it to the run's own text."""
    run = args.model[0]
    if args.data or not os.path.exists(os.path.join(run, "run.json")):
        return
    args.data = read_json(run, "run.json", "run of halo.py")["options"]["data"]
    refuse(any("teacher" in paths for paths, _ in data_sources(args.data or [])),
           f"{run} was trained on text that its teacher wrote: give other text with --data")


def lengths_within(corpus, lengths):
    """The lengths that held-out text has, in order. ValueError if there are none."""
    most = len(corpus.held_out)
    known = sorted(n for n in lengths if n <= most)
    refuse(not known, f"the held-out text has only {most:,} tokens; give shorter --contexts, or more --data")
    if len(known) < len(lengths):
        print(f"the held-out text has {most:,} tokens: longer contexts are left out")
    return known


def niah_texts(args, corpus, longest):
    """Texts {kind: (texts, longest)} to predict, and a hash of each text."""
    texts = {"": corpus.windows(np.random.default_rng(0), args.windows, longest)}
    sha256 = [corpus.facts["sha256"]]
    if args.unseen:                                      # its training split: no model was trained on it
        try:
            unseen = world.in_turn(partial(Corpus, corpus.tokenizer, args.unseen, cell=longest))
        except ValueError as error:
            raise ValueError(str(error).replace("--data", "--unseen")) from None
        texts[", unseen"] = unseen.rows("unseen", halo.Plan(1, longest - 1, args.windows, 0, 0))(0)
        sha256.append(unseen.facts["sha256"])
    return texts, sha256


def keep_rows(table):
    """Keep the rows of an earlier call if teacher and texts are the same. A row also needs the same model
    under its name. A long table can therefore be measured in several calls."""
    old = read_table(table.path) if os.path.exists(table.path) else {}
    same = all(old.get(key) == table.facts[key] for key in ("sha256", "predicted"))
    rows = table.rows if same else []
    known = old.get("students", {}) | table.facts["students"] if rows else table.facts["students"]
    changed = [name for name in known if old.get("students", {}).get(name) != known[name]]
    table.facts["students"] = known
    table.rows = [row for row in rows if re.sub(" without s_t$|, YaRN$", "", row["model"]) not in changed]


def mean_of_tasks(rows, model):
    """One row per context: the mean of all tasks but S1. A task counts as 0 where this model was not asked,
    but others were. A context is left out if some task was asked of no model there."""
    asked = [row for row in rows if "by_depth" in row and row["task"] != "S1"]
    tasks = {row["task"] for row in asked}
    found = []
    for n in sorted({row["context"] for row in asked}):
        its = chosen(asked, context=n, model=model)
        if its and {row["task"] for row in chosen(asked, context=n)} == tasks:
            value = sum(row["value"] for row in its) / len(tasks)
            half = sum((row["high"] - row["low"]) ** 2 for row in its) ** 0.5 / 2 / len(tasks)
            found.append(dict(context=n, value=value, low=value - half, high=value + half))
    return found


def draw_niah(facts, rows, path):
    """Up to three panels by context: pass keys found by all, other tasks, and loss. A single student has a
    line per task, several models have a line each for the mean of all tasks. Students whose names differ in
    their last digits alone, such as seed0 and seed1, have one colour."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    students = facts.get("students", {})
    stems = [re.sub(r"\d+$", "", model) for model in models]
    label = {model: f"{stem}, {n} runs" if (n := stems.count(stem)) > 1 else model
             for model, stem in zip(models, stems)}
    found = [(label[model], chosen(rows, model=model, task="S1")) for model in models]
    if len(students) > 1:
        title = "Other tasks, mean"
        others = [(label[model], mean_of_tasks(rows, model)) for model in models]
    else:
        title = "The student's other tasks"
        asked = dict.fromkeys(row["task"] for row in rows if "by_depth" in row and row["task"] != "S1")
        others = [(task, chosen(rows, model="student", task=task)) for task in asked]
    losses = [(label[model], chosen(rows, model=model, task="loss")) for model in models]
    shares = (-0.03, 1.05)
    panels = [(f"Pass key found (S1), trained at {facts['trained']:,}", found, shares)]
    if any(row["value"] for _, rows in others for row in rows):
        panels.append((title, others, shares))
    if least := min((row["value"] for row in chosen(rows, task="loss")), default=None):
        panels.append(("Held-out loss, nats per token", losses, (0.9 * least, 2 * least)))
    draw(path.removesuffix("json") + "png", panels)


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
FURTHER = {                          # changes that only --only runs
    "real": "--recipe real",
    "2 attention layers": "--keep 2",
    "10 attention layers": "--keep 10",
    "gates, 0.70 at first": "--decay head --retention 0.7",
    "constant decay": "--decay constant",
    "nothing to recall": "--plan {nothing}",
    "no short texts": "--plan finetune.short=0",
    "no loss on hidden states": "--hidden 0",
    "stage 2 in rows 4 times": "--plan distil.length={rows[0]} distil.batch={rows[1]}",
}
SEEDED = ["paper", "article", "layers by eq. 8", "layers by eq. 8, guarded"]    # run with --seeds seeds
DRAWS = ("LLLALALL", "ALLLLALL", "LALLLALL", "LALLLLAL", "LLLLLLAA")       # drawn at random, once
MULTIPLES = (1, 16, 64)              # of the trained length: where recall is shown


def fill_in(config, plans, budget):
    """The values of the words in ABLATIONS."""
    trained = [plans[stage] for stage in STAGES]
    return dict(
        kv=config.n_kv_head,
        layers=halo.choose_layers("even", len(config.layers)),
        tokens=plans.get("pretrain", plans["distil"]).total + budget * sum(plan.total for plan in trained),
        draws=DRAWS,
        nothing=" ".join(f"{stage}.recall=0 {stage}.varied=0" for stage in STAGES),
        rows=(4 * plans["distil"].length, plans["distil"].batch // 4),
        lr=[factor * plan.lr for factor in (3, 1 / 3) for plan in trained],
        batch=(4 * plans["distil"].batch, plans["distil"].batch // 4))


def run_halo(args, flags, seed, device):
    """Distil in a process of its own. Return its report with the scores of layers, or dict(failed=why)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--teacher", args.teacher, "--out", folder, "--seed", str(seed),
                 "--device", str(device), "--trials", str(args.trials)]
        if "--pretrain" not in flags:
            flags += ["--budget", str(args.budget)]
        run = subprocess.run([sys.executable, os.path.join(halo.HERE, "halo.py"), *flags],
                             capture_output=True, text=True, check=False)
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            return dict(failed=lines[-1] if lines else f"exit status {run.returncode}")
        scores = read_json(folder, "run.json", "run")["done"].get("scores")
        return dict(read_json(folder, "report.json", "report"), scores=scores)


def ablate_row(report, teacher_loss):
    """The fields of a row that come from a run's report. A run from scratch has no teacher in its report."""
    loss = report["val_loss"]
    recalled = dict(at=report["passkey"], four=report.get("multikey", {}))
    if isinstance(loss, dict):
        teacher_loss = loss["teacher"]
        loss = loss["student"]
        recalled = {start: shares.get("student", {}) for start, shares in recalled.items()}
    row = dict(layers=report["layers"], gap=teacher_loss and loss - teacher_loss, kl=report.get("kl"),
               same=report.get("top1_agreement"))
    for start, shares in recalled.items():
        T = int(next(iter(shares), 0))                             # the first length is that of distillation
        for n in MULTIPLES:
            row[f"{start}_{n}x"] = shares.get(str(n * T))
    return row | dict(minutes=report["seconds"] / 60, teacher_loss=teacher_loss, scores=report["scores"],
                      logit_base=report.get("logit_base"))


def percents(row, start):
    """Recall at all MULTIPLES in one cell: "100 / 95 / 20"."""
    shares = [row[f"{start}_{n}x"] for n in MULTIPLES]
    return " / ".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


def bench_ablate(args):
    """Gap: held-out loss of the student less that of the teacher, nats per token.
    Pass keys: percent found at 1, 16 and 64 times the trained length.
    One of four: the same for one of four numbers, if training had more than pass keys."""
    args.name = args.name or "ablate"
    path = halo.teacher_path(args.teacher)
    if args.teacher in halo.TEACHERS and not os.path.exists(os.path.join(path, "model.safetensors")):
        raise ValueError(f"--teacher {args.teacher} is not there yet: python halo.py --pretrain --teacher "
                         f"{args.teacher} --out {path}")
    config = pretrained.load(path).config
    args.path, args.also = path, (args.also or "").split()
    plans = halo.PLANS[options.plan_of(halo, args)[0]]
    table = Table(args, "teacher budget change seed",
                  "change seed layers kl gap pass_keys one_of_four",
                  f"teacher {args.teacher}, {config.max_len:,} tokens, {args.jobs} runs at once")
    known = fill_in(config, plans, args.budget)
    changes = ABLATIONS | FURTHER
    same = dict(teacher=args.teacher, budget=args.budget, trials=args.trials)
    same |= dict(also=" ".join(args.also)) if args.also else {}
    comparable = chosen(table.rows, **same)
    losses = [row["teacher_loss"] for row in comparable]
    done = {(row["change"], row["seed"]) for row in comparable}
    todo = [(change, seed) for seed in range(args.seeds) for change in args.only or ABLATIONS
            if (seed == 0 or change in SEEDED) and (change, seed) not in done]
    todo.sort(key=lambda run: run[0] not in halo.RECIPES)          # whole recipes first: they tell the loss
    with ThreadPoolExecutor(args.jobs) as pool, contextlib.ExitStack() as stop:
        stop.callback(pool.shutdown, wait=False, cancel_futures=True)              # Ctrl-C starts no other
        runs = {}
        for (change, seed), device in zip(todo, itertools.cycle(args.devices)):
            flags = [*args.also, *changes[change].format(**known).split()]
            runs[pool.submit(run_halo, args, flags, seed, device)] = change, seed
        for run in as_completed(runs):
            change, seed = runs[run]
            report = run.result()
            if "failed" in report:
                print(f"{change}, seed {seed}: failed: {report['failed']}", flush=True)
                continue
            row = ablate_row(report, next(filter(None, losses), None))
            losses.append(row["teacher_loss"])
            table.add(**same, change=change, seed=seed, **row, flags=changes[change],
                      shown=dict(pass_keys=percents(row, "at"), one_of_four=percents(row, "four")))
    return table


# ---- command line ------------------------------------------------------------------------------------------

MODES = dict(decode=bench_decode, prefill=bench_prefill, train=bench_train, kernel=bench_kernel,
             niah=bench_niah, ablate=bench_ablate, figure=bench_figure)
ON_GPU = dict(decode=["2b", "gpt2-xl", "14b"], prefill=["2b"], train=["2b", "gpt2-xl"])    # sizes
TEXT = dict(type=filled)
NAME = dict(type=file_name)
COUNT = dict(type=number(int, 1), metavar="N")
LIMIT = dict(type=number(float, 1e-9), metavar="X")
SOME = dict(nargs="+")
FLAGS = [                            # modes, flag, what is given, default, help
    ("decode prefill train kernel niah ablate", "--name", NAME, None, "of the file in results/"),
    ("figure", "--name", NAME, "decode-h200", "of the table in results/"),
    ("decode prefill train kernel niah ablate", "--device", TEXT, None, "cuda (where there is one) or cpu"),
    ("decode prefill train", "--size", SOME | dict(choices=SIZES), None, "; ".join(
        f"default of {mode}: {' '.join(sizes)}" for mode, sizes in ON_GPU.items()) + "; on a CPU: tiny"),
    ("decode prefill", "--model", TEXT, None, "folder of a run of halo.py: its student and its teacher are "
     "measured, in place of a size"),
    ("decode", "--kind", SOME | dict(choices=ALL), None, "models of a size; default: all"),
    ("prefill", "--kind", SOME | dict(choices=ALL), None, "models of a size; default: hybrid teacher"),
    ("decode prefill", "--ctx", SOME | COUNT, None, "tokens of context; default: by size, with --model "
     f"{' '.join(map(str, RUN_CONTEXTS))}"),
    ("prefill", "--profile", dict(action="store_true"), None, "print which kernels take the time of a "
     "prompt, 4096 tokens without --ctx, and of one more token"),
    ("decode", "--batch", COUNT, 1, "rows decoded at once"),
    ("kernel", "--shape", dict(nargs=5, type=number(int, 1), metavar=tuple("BTHKV")), None,
     f"one shape, in place of {len(SCANS)}"),
    ("train", "--stage", SOME | dict(choices=STAGES), STAGES, "stages of halo.py"),
    ("train", "--recipe", dict(choices=("paper", "real")), "paper", "as for halo.py"),
    ("train", "--peak", LIMIT, None, "operations per second that the device can do at most"),
    ("train", "--seconds", LIMIT, 10.0, "cut a longer step to fewer sequences"),
    ("niah", "--model", SOME | TEXT, ["out/small-paper"], "folders of runs of halo.py, with one teacher"),
    ("niah", "--readers", SOME | dict(choices=READERS), READERS, "models and ways to read that are measured"),
    ("niah", "--teacher", TEXT, None, "folder of its teacher; default: the run's own"),
    ("niah", "--data", SOME | TEXT, None, "text, as for halo.py; default: the run's own (needed "
     "where the teacher wrote it)"),
    ("niah", "--unseen", SOME | TEXT, None, "text of another kind, to predict"),
    ("niah", "--times", COUNT, 256, "longest context, in trained lengths"),
    ("niah", "--contexts", dict(type=number(int, 16), nargs="+", metavar="N"), None,
     "contexts in tokens; default: 1, 2, 4, 16, ... trained lengths"),
    ("niah", "--windows", COUNT, 32, "texts of each kind to predict"),
    ("niah ablate", "--trials", COUNT, 20, "questions of every task at every length"),
    ("niah", "--trials-long", COUNT, None, "the same from 32,768 tokens on"),
    ("ablate", "--teacher", TEXT, None, "as for halo.py; default: mini, on a CPU tiny"),
    ("ablate", "--also", TEXT, None, "options of halo.py for every run, as one argument"),
    ("ablate", "--only", SOME | dict(choices=ABLATIONS | FURTHER, metavar="CHANGE"), None,
     f"of {', '.join(map(repr, ABLATIONS | FURTHER))}"),
    ("ablate", "--seeds", COUNT, 3, f"seeds of {', '.join(SEEDED)}; others have one"),
    ("ablate", "--jobs", COUNT, None, "runs at once; default: 5 per GPU, on a CPU 1"),
    ("ablate", "--budget", LIMIT, 1.0, "as for halo.py"),
]


def get_args(argv):
    p = Parser(prog="bench.py", description=__doc__.split("\n\n")[0],
               epilog="Sizes: " + ", ".join(f"{name} ({size.title})" for name, size in SIZES.items()) + ".")
    modes = p.add_subparsers(dest="mode", required=True)
    for mode, line in re.findall(r"python bench\.py (\w+) +(.*)", __doc__):
        parser = modes.add_parser(mode, help=line, description=line, epilog=p.epilog)
        for used_by, flag, given, default, help_line in FLAGS:
            if mode in used_by.split():
                help_line += "; default: %(default)s" * (default is not None)
                parser.add_argument(flag, **given, default=default, help=help_line)
    args = p.parse_args(argv)
    if "device" not in args:
        return args
    args.device = torch.device(default_device(args.device or (None if torch.cuda.is_available() else "cpu")))
    world.join(str(args.device))
    if args.device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {args.device}: its times cannot be trusted; give cuda or cpu")
    cuda = args.device.type == "cuda"
    if args.mode in ON_GPU:
        of_run = args.mode != "train" and args.model
        if of_run and (args.size or args.kind):
            raise ValueError("--model measures a run's own student and teacher: leave --size and --kind out")
        args.size = [] if of_run else args.size or (ON_GPU[args.mode] if cuda else ["tiny"])
        if args.mode == "prefill":
            args.kind = args.kind or ["hybrid", "teacher"]
    if args.mode == "ablate":
        args.devices = [args.device]
        if cuda and args.device.index is None:
            args.devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        args.teacher = args.teacher or ("mini" if cuda else "tiny")
        args.jobs = args.jobs or (5 * len(args.devices) if cuda else 1)
    return args


def run_main(argv):
    args = get_args(argv)
    if world.SIZE > 1 and args.mode not in ("train", "niah"):
        raise ValueError(f"{args.mode} needs no torchrun: it uses one GPU, ablate all that it finds")
    table = MODES[args.mode](args)
    if table:
        print(f"\nwritten to {os.path.relpath(table.path)}")


def main(argv=None):
    command_line("bench.py", run_main, argv)


if __name__ == "__main__":
    main()
