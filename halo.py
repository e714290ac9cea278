"""HALO: distil a pretrained Transformer into a HypeNet (hypenet.py), a hybrid that reads long contexts cheaply.

    python halo.py                             the whole job on a laptop CPU, offline, in minutes
    python halo.py --recipe article            the recipe of the article in place of the paper's
    python halo.py --resume out/tiny-paper     go on with a run that was stopped
    python halo.py --pretrain --out teacher    train the tiny teacher anew (one GPU)

The paper's recipe (arXiv 2601.22156 section 4) is a row of stages, and one loop trains them all:

    transfer   copy the attention weights into linear twins; KV heads cloned (eq. 13), new gates neutral
    align      stage 1: every twin alone learns its attention layer's output (eq. 7)
    select     which layers stay attention: those whose loss hurts recall most and language least (eq. 8, 9)
    distil     stage 2: the hybrid learns the teacher's predictions (eq. 10); RoPE leaves attention (HyPE)
    finetune   stage 3: longer sequences, no teacher
    fit        the base a of the logit scaling s_t (eq. 11), on long held-out text

The article's recipe is progressive: the middle layers are converted in groups; only the newest group and the
chunk embeddings train, on alpha CE + (1 - alpha) KL(student, teacher).

Every random choice is a function of (seed, stage, step), so a run repeats exactly and a stopped run goes on as
one never stopped. A run's folder holds log.jsonl (a line a step), one checkpoint a stage, report.json, and the
student: config.json, model.safetensors, tokenizer.json.
"""
import argparse
import ctypes
import gzip
import hashlib
import json
import math
import os
import platform
import signal
import sys
import sysconfig
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a second busy program would stall spinning threads: 10x slower

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hypenet import (FAMILIES, Attention, HypeNet, HypeNetConfig, LinearAttention, Tokenizer, locate, write_file,
                     write_json)

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- recipes and plans -------------------------------------------------------------------------------------

# One row of DESIGN's table each; every key is a flag, so an ablation is one flag.
RECIPES = {
    "paper": dict(layers="guarded", decay="constant", state="full", pe="hype", extras="on", training="staged",
                  kl="forward", alpha=0.0, window=0, logit_base="fit"),
    "article": dict(layers="ends", decay="channel", state="half", pe="chunk", extras="off", training="progressive",
                    kl="reverse", alpha=0.5, window=2048, logit_base="none"),
}


@dataclass
class Plan:
    """What one stage costs. tokens in all; length of a sequence; batch in sequences; learning rate from lr to
    lr_end by a cosine after a warm-up; recall: the share of sequences that hold a pass key and its question."""
    tokens: float
    length: int
    batch: int
    lr: float
    lr_end: float
    recall: float = 0.5
    warmup: int = 50

    @property
    def steps(self):
        return max(1, round(self.tokens / (self.length * self.batch)))


PLANS = {
    "paper": dict(align=Plan(320e6, 512, 32, 1e-3, 1e-5, 0.0), distil=Plan(1e9, 512, 96, 1e-4, 1e-5, 0.0),
                  finetune=Plan(1e9, 16384, 128, 1e-5, 1e-5, 0.0), group=Plan(2.3e9, 512, 4096, 1e-5, 1e-5, 0.0)),
    "tiny": dict(pretrain=Plan(200e6, 256, 256, 3e-3, 1e-4, 0.3, 200), align=Plan(0.5e6, 256, 16, 3e-3, 1e-4),
                 distil=Plan(2e6, 256, 16, 2e-3, 1e-4, 0.25), finetune=Plan(0.3e6, 1024, 4, 3e-4, 3e-5),
                 group=Plan(2.5e6, 256, 16, 3e-3, 1e-4, 0.25)),
}

TEACHERS = {
    "tiny": HypeNetConfig(layers="A" * 8, n_embd=96, n_head=3, n_kv_head=3, head_dim=32, n_hidden=288, max_len=256,
                          **FAMILIES["qwen3"]),
}

# ---- text --------------------------------------------------------------------------------------------------


def stdlib_documents():
    """(group, text) of every source file of this Python's standard library, tests and site-packages left out. A
    group is a top-level module or package: all of it stands on one side of the held-out split."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    yield os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py"), f.read()


def file_documents(paths, piece=65536):
    """(group, text) of .txt and .jsonl files, gzipped or not, and of folders of them. A line of a .jsonl is a
    document; a .txt is cut at line ends into pieces of about 64 KB, so that a single file can be split too."""
    kinds = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
    files = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(os.path.join(d, n) for d, _, names in os.walk(path) for n in names if n.endswith(kinds))
            if not found:
                raise ValueError(f"--data {path}: no file in it ends in {', '.join(kinds)}")
            files += found
        elif os.path.isfile(path) and path.endswith(kinds):
            files.append(path)
        else:
            raise ValueError(f"--data {path}: {'must end in ' + ', '.join(kinds) if os.path.exists(path) else 'not found'}")
    for path in files:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as f:
            if ".jsonl" in path:
                for n, line in enumerate(f, 1):
                    try:
                        text = json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError):
                        raise ValueError(f"--data {path}: line {n} is no JSON object with a field text") from None
                    yield text, text
            else:
                while lines := f.readlines(piece):
                    yield lines[0], "".join(lines)


class Corpus:
    """Text as two long rows of token ids, train and held_out (numpy), each document followed by the tokenizer's end
    id. A document is held out by a hash of its group: 1 in 16, the same on every machine."""

    def __init__(self, tokenizer, data=None):
        self.tokenizer, sides, digest, count = tokenizer, ([], []), hashlib.sha256(), 0
        for group, text in file_documents(data) if data else stdlib_documents():
            digest.update(text.encode("utf-8", "replace"))
            count += 1
            held_out = int(hashlib.sha256(b"hypenet" + group.encode("utf-8", "replace")).hexdigest(), 16) % 16 == 0
            sides[held_out].extend([tokenizer.encode_array(text), [tokenizer.end]])
        self.train, self.held_out = (np.concatenate([*side, []]).astype(np.int32) for side in sides)
        tokens = len(self.train) + len(self.held_out)
        if not data and tokens < 2e6:
            raise ValueError(f"only {tokens:,} tokens of Python source found in the standard library (a stripped "
                             "Python?); give text of your own with --data")
        self.facts = dict(name=" ".join(data) if data else "stdlib", python=platform.python_version(), documents=count,
                          tokens=tokens, sha256=digest.hexdigest())

    def windows(self, rng, batch, length, held_out=False):
        """(batch, length) int64: stretches of text from random places."""
        text = self.held_out if held_out else self.train
        if len(text) < length:
            raise ValueError(f"{length:,} tokens asked of the {'held-out' if held_out else 'training'} text, which has "
                             f"{len(text):,}; give more with --data")
        starts = rng.integers(0, len(text) - length + 1, batch)
        return np.stack([text[s:s + length] for s in starts]).astype(np.int64)

    def mixed(self, rng, batch, length, recall):
        """Training sequences (batch, length): text, of which a share `recall` holds a pass key asked for."""
        rows = self.windows(rng, batch, length)
        for row in rows[:round(recall * batch)]:
            row[:] = plant(self.tokenizer, row, rng, ask=int(rng.integers(1, 4)))[0]
        return rows


def plant(tokenizer, text, rng, depth=None, ask=1):
    """Hide a five-digit pass key in text (n,) and ask for it: ids (n,), and how many ids at the end of a question
    are its answer. depth None: key and questions at random places (training); else the key at that share of
    the text and the question at its very end (testing)."""
    key = "".join(map(str, rng.integers(0, 10, 5)))
    needle = tokenizer.encode_array(f"\n# The pass key is {key}. Remember it.\n")
    answer = tokenizer.encode_array(f" {key}")
    question = tokenizer.encode_array("\n# What is the pass key? The pass key is")
    pieces = [needle] + [np.concatenate((question, answer))] * ask
    while sum(map(len, pieces)) > len(text) and len(pieces) > 2:
        pieces.pop()
    room = len(text) - sum(map(len, pieces))
    if room < 0:
        raise ValueError(f"{len(text)} tokens are too few for a pass key and its question ({len(text) - room})")
    cuts = sorted(rng.integers(0, room + 1, len(pieces))) if depth is None else [int(depth * room), room]
    edges = [0, *map(int, cuts), room]
    parts = [part for i, piece in enumerate(pieces) for part in (text[edges[i]:edges[i + 1]], piece)]
    return np.concatenate(parts + [text[edges[-2]:room]]), len(answer)


# ---- transfer: a student out of a teacher's weights --------------------------------------------------------


def student_config(teacher, layers, o):
    """The config of a student with these layers, o being the options of a recipe."""
    on = o.extras == "on"
    chunk = min(2048, teacher.max_len // 4) if o.pe == "chunk" else None
    half = o.state == "half"
    config = dict(layers=layers, chunk=chunk, n_chunks=math.ceil(o.max_ctx / chunk) if chunk else 0,
                  attn_pe=0.0 if o.pe == "hype" else 1.0, attn_gate=on, window=o.window or None, decay=o.decay,
                  key_dim=teacher.head_dim // 2 if half else teacher.head_dim, linear_rope=o.pe != "chunk",
                  linear_qk_norm=on and not half, linear_norm=on, linear_gate=on, linear_kv_head=teacher.n_head)
    return replace(teacher, **{**config, **o.changes})


def attention_twin(attn, config):
    """An attention layer for the student: its teacher's weights; a new gate starts as the identity, its
    sigmoid(0) = 1/2 made up for by doubling W_o."""
    twin = Attention(config).to(attn.out.weight.device)
    n = attn.qkvz.weight.size(0)                                   # q, k, v
    with torch.no_grad():
        twin.qkvz.weight[:n], twin.qkvz.weight[n:] = attn.qkvz.weight, 0
        twin.out.weight.copy_(attn.out.weight * (2 if config.attn_gate else 1))
        if config.bias:
            twin.qkvz.bias[:n], twin.qkvz.bias[n:] = attn.qkvz.bias, 0
            twin.out.bias.copy_(attn.out.bias)
        if config.qk_norm:
            twin.q_norm.load_state_dict(attn.q_norm.state_dict())
            twin.k_norm.load_state_dict(attn.k_norm.state_dict())
        if hasattr(twin, "chunk_embd"):
            nn.init.normal_(twin.chunk_embd.weight, std=0.02)
    return twin


def low_rank_keys(attn, x, rank):
    """Projections of half width whose products come closest to the teacher's (the article's smaller state).
    With A = [diag(gain / rms) W, bias] of a head, q . k = [x, 1] A_q^T A_k [x, 1]^T; its best approximation of
    rank r is U_r S_r V_r^T, and each side takes the square root of S. Returns q and k rows, (H*r, C + 1) each."""
    c = attn.config
    H, D = c.n_head, c.head_dim
    q, k, _ = attn.qkvz(x).split(attn.sizes[:3], dim=-1)
    sides = []
    for y, first, heads, norm in ((q, 0, H, "q_norm"), (k, H * D, c.n_kv_head, "k_norm")):
        rows = slice(first, first + heads * D)
        A = attn.qkvz.weight[rows]
        A = torch.cat((A, attn.qkvz.bias[rows, None] if c.bias else torch.zeros_like(A[:, :1])), 1).view(heads, D, -1)
        if c.qk_norm:                                              # no norm in the twin: its typical 1 / rms, folded in
            rms = y.unflatten(-1, (heads, D)).pow(2).mean(-1).add(c.norm_eps).sqrt()
            A = A * getattr(attn, norm).weight[:, None] * (1 / rms).mean((0, 1))[:, None, None]
        sides.append(A.repeat_interleave(H // heads, 0).double())  # (H, D, C + 1)
    U, S, Vh = torch.linalg.svd(sides[0].mT @ sides[1])            # of (H, C + 1, C + 1)
    root = S[:, :rank, None].sqrt()
    return [(root * M).flatten(0, 1).float() for M in (U.mT[:, :rank], Vh[:, :rank])]


@torch.no_grad()
def linear_twin(attn, config, x, where, retention=0.7):
    """A linear layer out of an attention layer: its weights, KV heads cloned (paper eq. 13), gates neutral. On
    one batch of the layer's inputs x (B,T,C), W_o is then scaled channel by channel so that the twin's output
    starts as close to the teacher's as a scale can bring it (least squares)."""
    c, t = config, attn.config
    twin = LinearAttention(c).to(x.device)
    H, D, K = c.n_head, c.head_dim, c.key_dim
    nq, nk, nv, _ = twin.sizes
    w = torch.cat((attn.qkvz.weight, attn.qkvz.bias[:, None]), 1) if t.bias else F.pad(attn.qkvz.weight, (0, 1))
    q, k, v, _ = w.split(attn.sizes)                               # rows, the bias as a last column
    def clone(m):                                                  # rows of one kv head after another
        return m.unflatten(0, (t.n_kv_head, -1)).repeat_interleave(c.linear_kv_head // t.n_kv_head, 0).flatten(0, 1)
    if K < D:
        q, k = low_rank_keys(attn, x, K)
        k = k.unflatten(0, (H, K))[::H // c.linear_kv_head].flatten(0, 1)
    else:
        k = clone(k)
    rows = torch.cat((q, k, clone(v)))
    twin.qkvz.weight[:nq + nk + nv], twin.qkvz.weight[nq + nk + nv:] = rows[:, :-1], 0
    twin.out.weight.copy_(attn.out.weight)
    if c.bias:
        twin.qkvz.bias[:nq + nk + nv], twin.qkvz.bias[nq + nk + nv:] = rows[:, -1], 0
        twin.out.bias.copy_(attn.out.bias)
    if c.linear_qk_norm and t.qk_norm and K == D:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    if hasattr(twin, "forget"):
        nn.init.zeros_(twin.forget.weight)
        nn.init.constant_(twin.forget.bias, math.log(retention / (1 - retention)))
    a, o = attn.mix(x, where), twin.mix(x, where)                  # what W_o reads: the teacher's and the twin's
    twin.out.weight *= (a * o).sum((0, 1)) / (o * o).sum((0, 1))   # (H*D,), one factor a column
    return twin


def neighbours(teacher, config, idx):
    """Run a frozen teacher on idx (B,T) and yield, layer by layer, what a twin needs: the layer's attention, its
    normed input h, where its tokens stand, and its output y."""
    where = locate(replace(config, attn_pe=1.0, chunk=None, n_chunks=0), torch.arange(idx.size(1), device=idx.device)[None])
    x = teacher.embed(idx, where)
    for block in teacher.blocks:
        h = block.norm1(x)
        y = block.mixer(h, where)
        yield block.mixer, h, where, y
        x = x + y
        x = x + block.mlp(block.norm2(x))


def assemble(teacher, config, mixers):
    """A student: everything but the mixers copied from the teacher, the mixers' weights copied from a list."""
    student = HypeNet(config).to(teacher.wte.weight.device)
    own = student.state_dict()
    student.load_state_dict({name: w for name, w in teacher.state_dict().items() if ".mixer." not in name}, strict=False)
    for block, mixer in zip(student.blocks, mixers):
        block.mixer.load_state_dict(mixer.state_dict())
    return student


# ---- losses ------------------------------------------------------------------------------------------------


def distil_loss(student, teacher, idx, targets, kl, alpha, offset=None, slice_elements=2 ** 24):
    """alpha CE + (1 - alpha) KL, means over all tokens. kl "forward": KL(teacher, student), paper eq. 10;
    "reverse": KL(student, teacher), the article's. Logits exist for a slice of tokens at a time, and are made
    again in the backward pass, so a large vocabulary needs no more memory than a small one."""
    xs = student.hidden(idx, offset=offset).flatten(0, 1)                         # (N,C)
    with torch.no_grad():
        xt = teacher.hidden(idx).flatten(0, 1) if alpha < 1 else xs
    n = max(1, slice_elements // student.config.vocab_size)

    def one(xs, xt, y):
        log_s = student.head(xs).float().log_softmax(-1)                          # (n,V)
        loss = alpha * F.nll_loss(log_s, y, reduction="sum") if alpha else 0
        if alpha < 1:
            with torch.no_grad():
                log_t = teacher.head(xt).float().log_softmax(-1)
            p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
            loss = loss + (1 - alpha) * F.kl_div(log_q, p, reduction="sum", log_target=True)
        return loss
    slices = list(zip(xs.split(n), xt.split(n), targets.flatten().split(n)))
    if len(slices) == 1:
        return one(*slices[0]) / len(xs)
    return sum(checkpoint(one, *s, use_reentrant=False) for s in slices) / len(xs)


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model, prompts, n_answer):
    """Prompts (B,n) that end in their answers -> log-probability of each answer token (B, n_answer), and whether
    greedy decoding would give the whole answer (B,)."""
    state, cut = model.init_state(len(prompts), prompts.size(1)), prompts.size(1) - n_answer - 1
    for part in prompts[:, :cut].split(1024, dim=1):
        model.hidden(part, state)
    logits = model(prompts[:, cut:-1], state=state, all_logits=True)[0].float()     # (B, n_answer, V)
    target = prompts[:, -n_answer:]
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return logp, (logits.argmax(-1) == target).all(1)


def prompts_of(corpus, length, trials, seed):
    """Test prompts (trials, length), the key at five depths in turn, and the length of the answer."""
    rng = np.random.default_rng([seed, length])
    rows = [plant(corpus.tokenizer, text, rng, depth=(i % 5) / 4) for i, text in
            enumerate(corpus.windows(rng, trials, length, held_out=True))]
    return torch.from_numpy(np.stack([ids for ids, _ in rows])), rows[0][1]


def recall(model, corpus, length, trials, seed=0):
    """(mean log-probability of an answer token (trials,), answered in full (trials,)) at one context length."""
    prompts, n = prompts_of(corpus, length, trials, seed)
    parts = [answers(model, part.to(model.wte.weight.device), n) for part in prompts.split(max(1, 65536 // length))]
    return torch.cat([p.mean(1) for p, _ in parts]).cpu(), torch.cat([hit for _, hit in parts]).cpu().float()


@torch.no_grad()
def held_out(corpus, length, count, seed=0, batch=32):
    """Batches idx, targets (b,length) of held-out text, the same at every call."""
    rows = torch.from_numpy(corpus.windows(np.random.default_rng([seed, 1]), count, length + 1, held_out=True))
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(batch)]


@torch.no_grad()
def losses(model, batches):
    """Mean loss of each sequence, nats a token."""
    out = []
    for idx, targets in batches:
        logits = model(idx.to(model.wte.weight.device))[0].float()
        out.append(F.cross_entropy(logits.mT, targets.to(logits.device), reduction="none").mean(1))
    return torch.cat(out).cpu()


@torch.no_grad()
def compare(teacher, student, batches):
    """(KL(teacher, student) in nats a token, share of tokens whose likeliest next token agrees)."""
    kl = agree = n = 0
    for idx, _ in batches:
        idx = idx.to(teacher.wte.weight.device)
        t, s = teacher(idx)[0].float().log_softmax(-1), student(idx)[0].float().log_softmax(-1)
        kl += F.kl_div(s, t, reduction="sum", log_target=True).item()
        agree += (t.argmax(-1) == s.argmax(-1)).sum().item()
        n += idx.numel()
    return kl / n, agree / n


# ---- a run: its folder, its log, its checkpoints -----------------------------------------------------------


class Run:
    """A folder that a run lives in and can be taken up from. run.json holds its options and the results of the
    steps that are done; a stop (Ctrl-C, SIGTERM) waits for the training step to end, then saves."""

    def __init__(self, folder, options):
        self.folder, self.options, self.done, self.began = folder, options, {}, time.time()
        self.stop = False
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(self.path("run.json")):
            with open(self.path("run.json"), encoding="utf-8") as f:
                self.done = json.load(f)["done"]
        self.before = self.done.get("seconds", 0.0)
        self.save()
        self.handlers = {sig: signal.signal(sig, self.on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)

    def on_signal(self, *_):
        if self.stop:                                     # asked twice: at once
            raise KeyboardInterrupt
        self.stop = True

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return self.before + time.time() - self.began

    def save(self):
        self.done["seconds"] = self.seconds()
        write_json(self.path("run.json"), dict(options=self.options, done=self.done))

    def log(self, **record):
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

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


def train(run, stage, plan, seed, corpus, module, groups, loss_fn, save_every=120.0):
    """The one training loop (AdamW 0.9/0.95, no weight decay, paper appendix B). groups: lists of parameters, each
    clipped to a gradient norm of 1 alone. loss_fn(idx, targets, step) -> loss. A finished stage is only loaded."""
    params, file, device = [p for g in groups for p in g], run.path(f"{stage}.pt"), groups[0][0].device
    for p in module.parameters():
        p.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.AdamW(params, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = 0
    if os.path.exists(file):
        saved = torch.load(file, map_location=device, weights_only=True)
        module.load_state_dict(saved["module"])
        first = saved["step"]
        if "optimizer" in saved:
            opt.load_state_dict(saved["optimizer"])

    def save(step):
        state = dict(module=module.state_dict(), step=step)
        if step < plan.steps:
            state["optimizer"] = opt.state_dict()
        write_file(file, lambda tmp: torch.save(state, tmp))
        run.save()

    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    bar = tqdm(range(first, plan.steps), desc=f"{stage:9s}", initial=first, total=plan.steps, mininterval=0.5,
               dynamic_ncols=True, disable=first == plan.steps)
    mean, saved_at, tick, per_step = None, time.time(), time.time(), plan.batch * plan.length
    for step in bar:
        rng = np.random.default_rng([seed, zlib.crc32(stage.encode()), step])
        rows = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length + 1, plan.recall)).to(device)
        warm = min(1.0, (step + 1) / min(plan.warmup, max(1, plan.steps // 10)))
        lr = warm * (plan.lr_end + (plan.lr - plan.lr_end) * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))
        with autocast:
            loss = loss_fn(rows[:, :-1], rows[:, 1:], step)
        loss.backward()
        norm = max(nn.utils.clip_grad_norm_(g, 1.0) for g in groups)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise ValueError(f"{stage}: loss {value} or gradient norm {norm:.3g} at step {step} is not finite; the weights "
                             f"were not touched; last good checkpoint: {file}; try a lower {stage}.lr with --plan")
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        now = time.time()
        ms, tick = 1000 * (now - tick), now
        run.log(stage=stage, step=step + 1, loss=value, norm=float(norm), lr=lr, ms=round(ms, 2))
        if (step + 1) % max(1, plan.steps // 4) == 0 or step + 1 == plan.steps:
            tqdm.write(f"{stage:9s}{step + 1:6,}/{plan.steps:,} | loss {mean:.4f} | norm {norm:.2f} | lr {lr:.1e} | "
                       f"{ms:,.0f} ms | {1000 * per_step / ms:,.0f} tok/s")
        bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        if step + 1 == plan.steps or run.stop or now - saved_at > save_every:
            save(step + 1)
            saved_at = now
            run.leave_if_asked()
    for p in params:
        p.requires_grad_(False)


# ---- the paper's stages ------------------------------------------------------------------------------------


def align(run, teacher, config, corpus, plan, o):
    """Stage 1 (paper eq. 7): a linear twin of every attention layer, each alone, fed the teacher's hidden states.
    The loss shown is the sum over layers of MSE over the target's mean square (Adam does not see the factor)."""
    device = teacher.wte.weight.device
    rng = np.random.default_rng([o.seed, zlib.crc32(b"transfer")])
    idx = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length, plan.recall)).to(device)
    with torch.no_grad():
        twins = nn.ModuleList(linear_twin(attn, config, h, where, o.retention)
                              for attn, h, where, _ in neighbours(teacher, config, idx))

    def loss_fn(idx, targets, step):
        with torch.no_grad():
            given = list(neighbours(teacher, config, idx))
        return sum((twin(h, where) - y).square().mean() / y.square().mean()
                   for twin, (_, h, where, y) in zip(twins, given))
    train(run, "align", plan, o.seed, corpus, twins, [list(t.parameters()) for t in twins], loss_fn)
    return twins


def swap_scores(run, teacher, twins, config, corpus, o):
    """R and C of paper eq. 8, measured with what is built in: for every layer, the model in which it alone is linear:
    mean log-probability of a pass key's tokens (R) and minus the held-out loss (C), each with its standard error."""
    batches, scores, own = held_out(corpus, teacher.config.max_len, o.eval_windows // 2), [], teacher.config
    for i, twin in enumerate(tqdm(twins, desc="select   ", dynamic_ncols=True)):
        attn = teacher.blocks[i].mixer
        try:
            teacher.blocks[i].mixer = twin
            teacher.config = replace(config, layers="A" * i + "L" + "A" * (len(twins) - 1 - i), attn_pe=1.0, chunk=None,
                                     n_chunks=0, window=None, attn_gate=False)
            R, hits = recall(teacher, corpus, own.max_len, o.trials * 2)
            C = -losses(teacher, batches)
        finally:
            teacher.blocks[i].mixer, teacher.config = attn, own
        scores.append({name: x.item() for name, x in dict(
            R=R.mean(), R_se=R.std() / len(R) ** 0.5, C=C.mean(), C_se=C.std() / len(C) ** 0.5, hit=hits.mean()).items()})
    return scores


def choose_layers(how, n_layer, scores=None, base_C=None, limit=1.0):
    """The layers that stay attention, as a string of "A" and "L". how: "score", paper eq. 8 and 9 as written;
    "guarded", the same with the denominator floored at C's standard error, and a layer whose lone swap costs
    more than `limit` nats always kept; "even"; "ends", the article's first and last quarter; or the string itself."""
    if set(how) <= set("AL"):
        if len(how) != n_layer:
            raise ValueError(f"--layers {how} names {len(how)} layers; the teacher has {n_layer}")
        return how
    k = max(1, n_layer // 4)
    if how == "ends":                                              # the article's get_hybrid_config
        keep = [*range(n_layer // 4), *range(n_layer * 3 // 4, n_layer)]
    elif how == "even":
        keep = [round((i + 1) * n_layer / k) - 1 for i in range(k)]
    else:
        best_R, best_C = max(s["R"] for s in scores), max(s["C"] for s in scores)
        for s in scores:
            floor = max(s["C_se"] for s in scores) if how == "guarded" else 0.0
            s["score"] = (best_R - s["R"]) / (max(best_C - s["C"], floor) + 1e-6)
            s["must"] = how == "guarded" and base_C - s["C"] > limit
        order = sorted(range(n_layer), key=lambda i: (scores[i]["must"], scores[i]["score"]), reverse=True)
        keep = order[:k]
    return "".join("A" if i in keep else "L" for i in range(n_layer))


def convert_staged(run, teacher, corpus, plans, o):
    """The paper's HALO: align, select, distil, finetune, fit."""
    L = len(teacher.config.layers)
    config = student_config(teacher.config, "L" * L, o)
    twins = align(run, teacher, config, corpus, plans["align"], o)
    scores = None
    if o.layers in ("score", "guarded"):
        scores = run.once("scores", lambda: swap_scores(run, teacher, twins, config, corpus, o))
        base = -losses(teacher, held_out(corpus, teacher.config.max_len, o.eval_windows // 2)).mean().item()
        layers = choose_layers(o.layers, L, scores, base)
        print_scores(scores, layers, base)
    else:
        layers = choose_layers(o.layers, L)
    config = replace(config, layers=layers)
    student = assemble(teacher, config, [attention_twin(b.mixer, config) if kind == "A" else twin
                                         for b, twin, kind in zip(teacher.blocks, twins, layers)])
    fade = round(o.fade * plans["distil"].steps) if o.pe == "hype" else 0

    def loss_fn(idx, targets, step):
        if o.pe == "hype":                                         # RoPE (or wpe) leaves attention: HyPE
            student.config.attn_pe = max(0.0, 1 - step / fade) if fade else 0.0
        return distil_loss(student, teacher, idx, targets, o.kl, o.alpha, random_offset(student, idx, step, o))
    train(run, "distil", plans["distil"], o.seed, corpus, student, [list(student.parameters())], loss_fn)
    student.config.attn_pe = config.attn_pe

    def loss_fn(idx, targets, step):
        return student(idx, targets, offset=random_offset(student, idx, step, o))[1]
    train(run, "finetune", plans["finetune"], o.seed, corpus, student, [list(student.parameters())], loss_fn)
    return student


def random_offset(student, idx, step, o):
    """Chunk HyPE: a start for each sequence, so that every chunk's embedding is trained."""
    c = student.config
    if not c.chunk:
        return None
    rng = np.random.default_rng([o.seed, zlib.crc32(b"offset"), step])
    return torch.from_numpy(rng.integers(0, max(1, c.chunk * c.n_chunks - idx.size(1) + 1), len(idx))).to(idx.device)


def print_scores(scores, layers, base):
    print("\nlayer  recall if linear (log p)   held-out loss if linear   score")
    for i, s in enumerate(scores):
        print(f"{i:3d} {layers[i]}  {s['R']:9.3f} +- {s['R_se']:.3f}        {-s['C']:9.4f} +- {s['C_se']:.4f}    "
              f"{s['score']:8.3f}" + ("  (never converted)" if s["must"] else ""))
    print(f"teacher's held-out loss {-base:.4f}; layers: {layers}\n")


# ---- the article's progressive conversion ------------------------------------------------------------------


def convert_progressive(run, teacher, corpus, plans, o):
    """The article's halo_distillation: the linear layers in groups, the model usable after each."""
    layers = choose_layers(o.layers, len(teacher.config.layers))
    linear = [i for i, kind in enumerate(layers) if kind == "L"]
    n_groups = min(len(linear), o.groups or max(2, math.ceil(len(linear) / 6)))
    config = student_config(teacher.config, layers, o)
    rng = np.random.default_rng([o.seed, zlib.crc32(b"transfer")])
    plan = replace(plans["group"], tokens=plans["group"].tokens / n_groups)
    idx = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length, plan.recall)).to(teacher.wte.weight.device)
    with torch.no_grad():
        twins = [linear_twin(attn, config, h, where, o.retention)
                 for attn, h, where, _ in neighbours(teacher, config, idx)]
    mixers = [attention_twin(block.mixer, config) for block in teacher.blocks]
    batches = held_out(corpus, teacher.config.max_len, o.eval_windows)
    for g, group in enumerate(np.array_split(linear, n_groups), 1):
        for i in group:
            mixers[i] = twins[i]
        now = "".join("L" if isinstance(m, LinearAttention) else "A" for m in mixers)
        student = assemble(teacher, replace(config, layers=now), mixers)
        if g > 1 and hasattr(student, "chunk_embd"):
            student.chunk_embd.load_state_dict(last.chunk_embd.state_dict())
        params = [p for i in group for p in student.blocks[i].mixer.parameters()]
        params += [p for name, p in student.named_parameters() if "chunk_embd" in name]

        def loss_fn(idx, targets, step):
            return distil_loss(student, teacher, idx, targets, o.kl, o.alpha, random_offset(student, idx, step, o))
        train(run, f"group{g}", plan, o.seed, corpus, student, [params], loss_fn)
        mixers, last = [block.mixer for block in student.blocks], student

        def usable():
            student.save_pretrained(run.path(f"group{g}"))
            corpus.tokenizer.save(run.path(f"group{g}"))
            return losses(student, batches).mean().item()
        loss = run.once(f"group{g}", usable)
        print(f"group {g} of {n_groups}: {now} | held-out loss {loss:.4f} | usable model in {run.path(f'group{g}')}")
    return student


# ---- the logit base, the report ----------------------------------------------------------------------------


def fit_logit_base(student, corpus, length, seed, candidates=(None, 10000, 3000, 1000, 500, 300, 100, 50, 20)):
    """The base a of s_t (paper eq. 11) of least loss on long held-out text: {a: loss}."""
    batches, out = held_out(corpus, length, 8, seed, batch=4), {}
    for a in tqdm(candidates, desc="fit a    ", dynamic_ncols=True):
        student.config.logit_base = a
        out[str(a)] = losses(student, batches).mean().item()
    return out


def evaluate(teacher, student, corpus, o, lengths):
    """The numbers of the final table and of report.json."""
    c, batches = teacher.config, held_out(corpus, teacher.config.max_len, o.eval_windows)
    kl, agree = compare(teacher, student, batches)
    report = dict(val_loss=dict(teacher=losses(teacher, batches).mean().item(), student=losses(student, batches).mean().item()),
                  kl=kl, top1_agreement=agree, passkey=dict(teacher={}, student={}))
    for n in tqdm(lengths, desc="pass keys", dynamic_ncols=True):
        trials = max(5, o.trials * min(lengths[-2], n) // n)                      # the longest are dear
        for name, model in (("teacher", teacher), ("student", student)):
            if name == "teacher" and n > 16 * c.max_len:
                continue
            beyond = model.config.position == "learned" and model.config.attn_pe and n > c.max_len
            report["passkey"][name][str(n)] = None if beyond else recall(model, corpus, n, trials)[1].mean().item()
    return report


def print_report(r):
    print(f"\n{'':34s}{'teacher':>10s}{'student':>10s}")
    print(f"{'layers':34s}{'A' * len(r['layers']):>10s}{r['layers']:>10s}")
    print(f"{'parameters':34s}{r['params']['teacher']:>10,}{r['params']['student']:>10,}")
    print(f"{'held-out loss, nats a token':34s}{r['val_loss']['teacher']:>10.4f}{r['val_loss']['student']:>10.4f}")
    print(f"{'KL to the teacher, nats a token':34s}{'':>10s}{r['kl']:>10.4f}")
    print(f"{'same likeliest next token':34s}{'':>10s}{r['top1_agreement']:>10.1%}")
    for n in r["passkey"]["student"]:
        cells = ["-" if r["passkey"][m].get(n) is None else f"{r['passkey'][m][n]:.0%}" for m in ("teacher", "student")]
        print(f"{'pass key found in ' + format(int(n), ',') + ' tokens':34s}{cells[0]:>10s}{cells[1]:>10s}")
    peak = f", peak memory {r['peak_gb']:.1f} GB" if r["peak_gb"] else ""
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes{peak}, logit base {r['logit_base']}\n")


# ---- command line ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):                             # one line, no usage
        self.exit(2, f"{self.prog}: {message}\n")


def get_args(argv):
    p = Parser(prog="halo.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
               epilog="A recipe is ten rows, each a flag; a flag left out follows --recipe.")
    p.add_argument("--teacher", default="tiny", help="tiny (shipped, about 1M parameters), or the folder of a model")
    p.add_argument("--recipe", default="paper", choices=RECIPES, help="the paper's (default) or the article's")
    p.add_argument("--out", help="folder of the run; default out/TEACHER-RECIPE, or the next free number")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, under its own options")
    p.add_argument("--data", nargs="+", metavar="PATH", help="text to train on: .txt, .jsonl (field text), .gz of "
                   "either, or folders of them; default: the source of Python's standard library")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, mps or cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--budget", type=float, default=1.0, help="multiply the tokens of every stage by this")
    p.add_argument("--plan", nargs="+", default=[], metavar="STAGE.FIELD=X", help="change one entry of the plan, "
                   "such as distil.tokens=4e6 or align.lr=1e-3")
    p.add_argument("--pretrain", action="store_true", help="train the teacher from random weights instead; with "
                   "--layers a hybrid, of the recipe's kind")
    r = p.add_argument_group("rows of the recipe")
    r.add_argument("--layers", help="which layers stay attention: guarded (eq. 8, its denominator floored at the "
                   "noise), score (eq. 8 as written), even, ends (first and last quarter), or letters such as LLAL")
    r.add_argument("--decay", choices=("constant", "none", "head", "channel"), help="of linear layers: eq. 19, no "
                   "forgetting, or a gate for each head or key channel")
    r.add_argument("--state", choices=("full", "half"), help="width of a key in linear layers")
    r.add_argument("--pe", choices=("hype", "chunk", "rope"), help="hype: RoPE in linear layers, none in attention; "
                   "chunk: the article's; rope: RoPE in both")
    r.add_argument("--extras", choices=("on", "off"), help="QK-norm, output norm and gates")
    r.add_argument("--training", choices=("staged", "progressive"), help="the paper's stages, or groups of layers")
    r.add_argument("--kl", choices=("forward", "reverse"), help="KL(teacher, student) or KL(student, teacher)")
    r.add_argument("--alpha", type=float, help="share of cross-entropy in the distillation loss, 0 to 1")
    r.add_argument("--window", type=int, help="attention reaches this many tokens back, 0: all")
    r.add_argument("--logit-base", help="a of s_t (eq. 11): fit, none, or a number above 1")
    m = p.add_argument_group("finer choices")
    m.add_argument("--groups", type=int, default=0, help="groups of a progressive run; default ceil(linear / 6), >= 2")
    m.add_argument("--retention", type=float, default=0.7, help="what a forget gate keeps at the start")
    m.add_argument("--fade", type=float, default=0.0, help="share of stage 2 over which RoPE leaves attention; 0: at once")
    m.add_argument("--max-ctx", type=int, default=65536, help="longest context a chunk HyPE model will be asked for")
    m.add_argument("--trials", type=int, default=20, help="pass keys asked at each length")
    m.add_argument("--eval-windows", type=int, default=256, help="held-out sequences for the losses")
    m.add_argument("--set", nargs="+", default=[], metavar="FIELD=X", help="set any field of HypeNetConfig of the "
                   "student, such as linear_rope=false")
    return p.parse_args(argv)


def settle(o):
    """Fill in the recipe, read --plan and --set; ValueError, in one line, for what does not go together."""
    o.hybrid = o.layers is not None                       # for --pretrain: layers were asked for
    for key, value in RECIPES[o.recipe].items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    plans = {k: replace(p, tokens=p.tokens * o.budget) for k, p in PLANS["tiny"].items()}
    for item in o.plan:
        key, _, value = item.partition("=")
        stage, _, field = key.partition(".")
        if stage not in plans or field not in asdict(plans[stage]):
            raise ValueError(f"--plan {item}: no such entry; stages {', '.join(plans)}; fields {', '.join(asdict(plans['align']))}")
        try:
            plans[stage] = replace(plans[stage], **{field: type(getattr(plans[stage], field))(float(value))})
        except ValueError:
            raise ValueError(f"--plan {item}: {value!r} is no number") from None
    for stage, plan in plans.items():
        if min(plan.tokens, plan.length, plan.batch) <= 0 or not 0 <= plan.recall <= 1:
            raise ValueError(f"--plan: tokens, length and batch of {stage} must be positive, recall between 0 and 1: {plan}")
    types = {f.name: f.type for f in fields(HypeNetConfig)}
    changes = {}
    for item in o.set:
        key, _, value = item.partition("=")
        if key not in types:
            raise ValueError(f"--set {item}: no field {key!r}; fields: {', '.join(types)}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    try:
        base = o.logit_base in ("fit", "none") or float(o.logit_base) > 1
    except ValueError:
        base = False
    for ok, message in (
            (base, f"--logit-base {o.logit_base}: give fit, none or a number above 1"),
            (0 <= o.alpha <= 1, f"--alpha {o.alpha}: a share between 0 and 1"),
            (0 < o.retention < 1, f"--retention {o.retention}: a share between 0 and 1"),
            (0 <= o.fade <= 1, f"--fade {o.fade}: a share between 0 and 1"),
            (o.window >= 0, f"--window {o.window}: 0 for all, or a number of tokens"),
            (min(o.trials, o.eval_windows, o.max_ctx) > 0, "--trials, --eval-windows and --max-ctx must be positive"),
            (o.training == "staged" or o.layers not in ("score", "guarded"),
             f"--training progressive with --layers {o.layers}: scores come from stage 1; use ends, even or letters"),
            (o.training == "progressive" or not o.groups, "--groups goes with --training progressive"),
            (o.device.split(":")[0] in ("cpu", "cuda", "mps"), f"--device {o.device}: cuda, mps or cpu"),
            (not o.device.startswith("cuda") or torch.cuda.is_available(), f"--device {o.device}: no CUDA device here; use cpu")):
        if not ok:
            raise ValueError(message)
    return plans, changes


def keep_memory():
    """Let glibc keep what it has freed: tensors of a few MB cost more in page faults than in arithmetic (a CPU step
    takes 0.7 of the time). Does nothing elsewhere."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 27)):  # mmap and trim threshold, top pad
                libc.mallopt(option, value)
        except (OSError, AttributeError):
            pass


def new_folder(o):
    folder = o.out or os.path.join("out", f"{os.path.basename(os.path.normpath(o.teacher))}-{o.recipe}")
    if not os.path.isdir(folder) or not os.listdir(folder):
        return folder
    if o.out:
        raise ValueError(f"--out {folder} is not empty; go on with it by --resume {folder}, or name another")
    return next(f"{folder}-{i}" for i in range(2, 10 ** 6) if not os.path.exists(f"{folder}-{i}"))


def print_plan(run, teacher, corpus, plans, stages, o):
    facts = corpus.facts
    print(f"teacher {o.teacher}: {len(teacher.layers)} layers, trained at {teacher.max_len} tokens | recipe {o.recipe} | "
          f"device {o.device} | run {run.folder}")
    print(f"text {facts['name']}: {len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out")
    print(f"{'stage':10s}{'tokens':>12s}{'steps':>8s}{'length':>8s}{'batch':>7s}   learning rate")
    for name, plan in stages:
        print(f"{name:10s}{plan.steps * plan.batch * plan.length:12,}{plan.steps:8,}{plan.length:8,}{plan.batch:7,}"
              f"   {plan.lr:.0e} -> {plan.lr_end:.0e}")
    print(flush=True)


def convert(teacher, o, run, plans):
    """Distil a teacher into a student by the options o; returns the student and its report."""
    corpus, T = Corpus(o.tokenizer, o.data), teacher.config.max_len
    if o.training == "progressive":
        names, go = ["group"], convert_progressive
    else:
        names, go = ["align", "distil", "finetune"], convert_staged
    print_plan(run, teacher.config, corpus, plans, [(n, plans[n]) for n in names], o)
    student = go(run, teacher, corpus, plans, o).eval()
    if o.logit_base == "fit":
        fits = run.once("fit", lambda: fit_logit_base(student, corpus, 16 * T, o.seed))
        best = min(fits, key=fits.get)
        print(f"held-out loss at {16 * T:,} tokens by logit base: " + ", ".join(f"{a} {x:.4f}" for a, x in fits.items()))
    else:
        best = o.logit_base.capitalize()
    student.config.logit_base = None if best == "None" else float(best)
    measured = run.once("eval", lambda: evaluate(teacher, student, corpus, o, [T, 2 * T, 4 * T, 16 * T, 64 * T]))
    report = dict(recipe=o.recipe, teacher=o.teacher, layers=student.config.layers, logit_base=student.config.logit_base,
                  params=dict(teacher=teacher.n_params(), student=student.n_params()),
                  tokens=sum(plans[n].steps * plans[n].batch * plans[n].length for n in names),
                  seconds=run.seconds(), peak_gb=peak_gb(), device=o.device, **measured, text=corpus.facts)
    student.save_pretrained(run.folder)
    o.tokenizer.save(run.folder)
    write_json(run.path("report.json"), report)
    return student, report


def pretrain(config, o, run, plans):
    """Train a teacher (or, with --layers, a hybrid) from random weights on text and pass keys; returns it."""
    corpus, plan = Corpus(o.tokenizer, o.data), plans["pretrain"]
    if o.hybrid:
        config = student_config(config, choose_layers(o.layers, len(config.layers)), o)
    print_plan(run, config, corpus, plans, [("pretrain", plan)], o)
    torch.manual_seed(o.seed)
    model = HypeNet(config).to(o.device)
    train(run, "pretrain", plan, o.seed, corpus, model, [list(model.parameters())],
          lambda idx, targets, step: model(idx, targets, offset=random_offset(model, idx, step, o))[1])
    model.eval().save_pretrained(run.folder, torch.bfloat16)
    o.tokenizer.save(run.folder)
    loss = losses(model, held_out(corpus, config.max_len, o.eval_windows)).mean().item()
    hits = recall(model, corpus, config.max_len, o.trials)[1].mean().item()
    print(f"\n{model.n_params():,} parameters, held-out loss {loss:.4f} nats a token, pass key found in {config.max_len} tokens "
          f"{hits:.0%}, {run.seconds() / 60:.1f} minutes")
    return model


def peak_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource                                   # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def run_main(argv):
    o = get_args(argv)
    if o.resume:
        try:
            with open(os.path.join(o.resume, "run.json"), encoding="utf-8") as f:
                options = json.load(f)["options"]
        except (OSError, ValueError, KeyError):
            raise ValueError(f"--resume {o.resume}: no run there (no run.json that can be read)") from None
        o = argparse.Namespace(**{**options, "out": o.resume, "resume": o.resume})
    options = dict(vars(o))
    plans, o.changes = settle(o)
    if o.pretrain and o.teacher not in TEACHERS:
        raise ValueError(f"--pretrain --teacher {o.teacher}: known sizes: {', '.join(TEACHERS)}")
    o.tokenizer = Tokenizer.bytes()
    if not o.pretrain:
        path = os.path.join(HERE, "assets", f"{o.teacher}-teacher") if o.teacher in TEACHERS else o.teacher
        teacher = HypeNet.from_pretrained(path, device=o.device).requires_grad_(False)
        if "L" in teacher.config.layers:
            raise ValueError(f"--teacher {o.teacher} has linear layers ({teacher.config.layers}); a teacher has none")
        o.tokenizer = Tokenizer.load(path)
        student_config(teacher.config, "L" * len(teacher.config.layers), o)       # fails now, not after stage 1
        if o.layers not in ("score", "guarded"):
            choose_layers(o.layers, len(teacher.config.layers))
    keep_memory()
    run = Run(o.resume or new_folder(o), options)
    try:
        if o.pretrain:
            pretrain(TEACHERS[o.teacher], o, run, plans)
            print(f"use it with: python halo.py --teacher {run.folder}")
        else:
            _, report = convert(teacher, o, run, plans)
            print_report(report)
            print(f"files in {run.folder}: model.safetensors, config.json, tokenizer.json, report.json, log.jsonl\n\n"
                  f"python sample.py --model {run.folder} --ctx 65536")
    finally:
        run.close()


def main(argv=None):
    try:
        run_main(argv)
    except (ValueError, OSError) as e:
        print(f"halo.py: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
