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
    "tiny": dict(pretrain=Plan(100e6, 256, 256, 3e-3, 1e-4, 0.3, 200), align=Plan(0.5e6, 256, 16, 3e-3, 1e-4),
                 distil=Plan(2e6, 256, 16, 2e-3, 1e-4, 0.25), finetune=Plan(0.3e6, 1024, 4, 3e-4, 3e-5),
                 group=Plan(2.5e6, 256, 16, 3e-3, 1e-4, 0.25)),
}

TEACHERS = {
    "tiny": HypeNetConfig(layers="A" * 8, n_embd=96, n_head=3, n_kv_head=3, head_dim=32, n_hidden=288, max_len=256,
                          **FAMILIES["qwen3"]),
}

# ---- text --------------------------------------------------------------------------------------------------


def stdlib_documents():
    """(group, path) of every source file of this Python's standard library, tests and site-packages left out.
    A group is a top-level module or package: its files stand on one side of the held-out split."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                yield os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py"), path


class Corpus:
    """Text as two long rows of token ids, train and held_out (numpy), documents ended by the tokenizer's end id."""

    def __init__(self, tokenizer):
        self.tokenizer, sides, digest, count = tokenizer, ([], []), hashlib.sha256(), 0
        for group, path in stdlib_documents():
            with open(path, "rb") as f:
                data = f.read()
            digest.update(data)
            count += 1
            held_out = int(hashlib.sha256(b"hypenet" + group.encode()).hexdigest(), 16) % 16 == 0
            sides[held_out].extend([tokenizer.encode_array(data.decode("utf-8", "replace")), [tokenizer.end]])
        self.train, self.held_out = (np.concatenate(side).astype(np.int32) if side else np.zeros(0, np.int32) for side in sides)
        if len(self.train) + len(self.held_out) < 2e6:
            raise ValueError(f"only {len(self.train) + len(self.held_out):,} tokens of Python source found in the "
                             "standard library (a stripped Python?); give text of your own with --data")
        self.facts = dict(name="stdlib", python=platform.python_version(), files=count,
                          tokens=len(self.train) + len(self.held_out), sha256=digest.hexdigest())

    def windows(self, rng, batch, length, held_out=False):
        """(batch, length) int64: stretches of text from random places."""
        text = self.held_out if held_out else self.train
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


def student_config(teacher, layers, o, max_ctx):
    """The config of a student with these layers, o being the options of a recipe."""
    on = o.extras == "on"
    chunk = min(2048, teacher.max_len // 4) if o.pe == "chunk" else None
    half = o.state == "half"
    return replace(teacher, layers=layers, chunk=chunk, n_chunks=math.ceil(max_ctx / chunk) if chunk else 0,
                   attn_pe=0.0 if o.pe == "hype" else 1.0, attn_gate=on, window=o.window or None, decay=o.decay,
                   key_dim=teacher.head_dim // 2 if half else teacher.head_dim, linear_rope=o.pe != "chunk",
                   linear_qk_norm=on and not half, linear_norm=on, linear_gate=on,
                   linear_kv_head=teacher.n_head, **o.set)


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
def linear_twin(attn, config, x, where, retention=0.7, random=False):
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
    """A folder that a run lives in, and can be taken up from. run.json holds the options and what is done."""

    def __init__(self, folder, options):
        self.folder, self.options, self.stop, self.began = folder, options, False, time.time()
        os.makedirs(folder, exist_ok=True)
        self.done = {}                                    # result of each finished step, and seconds used so far
        if os.path.exists(self.path("run.json")):
            with open(self.path("run.json"), encoding="utf-8") as f:
                self.done = json.load(f)["done"]
        self.before = self.done.get("seconds", 0.0)
        self.save()
        for sig in (signal.SIGINT, signal.SIGTERM):       # a stop waits for the step to end, then saves
            signal.signal(sig, self.on_signal)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def on_signal(self, *_):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True

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
        twins = nn.ModuleList(linear_twin(attn, config, h, where) for attn, h, where, _ in neighbours(teacher, config, idx))

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
    config = student_config(teacher.config, "L" * L, o, o.max_ctx)
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
    config = student_config(teacher.config, layers, o, o.max_ctx)
    rng = np.random.default_rng([o.seed, zlib.crc32(b"transfer")])
    plan = replace(plans["group"], tokens=plans["group"].tokens / n_groups)
    idx = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length, plan.recall)).to(teacher.wte.weight.device)
    with torch.no_grad():
        twins = [linear_twin(attn, config, h, where) for attn, h, where, _ in neighbours(teacher, config, idx)]
    mixers = [attention_twin(block.mixer, config) for block in teacher.blocks]
    batches = held_out(corpus, teacher.config.max_len, o.eval_windows)
    for g, group in enumerate(np.array_split(linear, n_groups), 1):
        for i in group:
            mixers[i] = twins[i]
        now = "".join("L" if isinstance(m, LinearAttention) else "A" for m in mixers)
        student = assemble(teacher, replace(config, layers=now), mixers)
        if g > 1 and hasattr(student, "chunk_embd"):
            student.chunk_embd.load_state_dict(before.chunk_embd.state_dict())
        params = [p for i in group for p in student.blocks[i].mixer.parameters()]
        params += [p for name, p in student.named_parameters() if "chunk_embd" in name]

        def loss_fn(idx, targets, step):
            return distil_loss(student, teacher, idx, targets, o.kl, o.alpha, random_offset(student, idx, step, o))
        train(run, f"group{g}", plan, o.seed, corpus, student, [params], loss_fn)
        mixers, before = [block.mixer for block in student.blocks], student

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
        for name, model in (("teacher", teacher), ("student", student)):
            if name == "teacher" and n > 16 * c.max_len:
                continue
            beyond = model.config.position == "learned" and model.config.attn_pe and n > c.max_len
            report["passkey"][name][str(n)] = None if beyond else recall(model, corpus, n, o.trials)[1].mean().item()
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
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes, logit base {r['logit_base']}, "
          f"peak memory {r['peak_gb']:.1f} GB")


# ---- command line ------------------------------------------------------------------------------------------


def pretrain(run, corpus, plans, o):
    """Train a teacher (or, with --layers, a hybrid) from random weights on text and pass keys."""
    torch.manual_seed(o.seed)
    config = TEACHERS[o.teacher]
    if o.layers not in RECIPES_LAYERS:
        config = student_config(config, choose_layers(o.layers, len(config.layers)), o, o.max_ctx)
    model = HypeNet(config).to(o.device)
    train(run, "pretrain", plans["pretrain"], o.seed, corpus, model, [list(model.parameters())],
          lambda idx, targets, step: model(idx, targets, offset=random_offset(model, idx, step, o))[1])
    return model


RECIPES_LAYERS = ("score", "guarded", "ends", "even")


def keep_memory():
    """Let glibc keep what it has freed: tensors of a few MB cost more in page faults than in arithmetic (CPU steps
    take 0.7 of the time). Does nothing elsewhere."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2 ** 30)                              # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2 ** 31 - 1)                          # M_TRIM_THRESHOLD
            libc.mallopt(-2, 2 ** 27)                              # M_TOP_PAD
        except (OSError, AttributeError):
            pass


def get_args(argv):
    p = argparse.ArgumentParser(prog="halo.py", formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", default="tiny")
    p.add_argument("--recipe", default="paper", choices=list(RECIPES))
    p.add_argument("--out")
    p.add_argument("--resume")
    p.add_argument("--pretrain", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--layers")
    p.add_argument("--decay")
    p.add_argument("--state")
    p.add_argument("--pe")
    p.add_argument("--extras")
    p.add_argument("--training")
    p.add_argument("--kl")
    p.add_argument("--alpha", type=float)
    p.add_argument("--window", type=int)
    p.add_argument("--logit-base", dest="logit_base")
    p.add_argument("--groups", type=int, default=0)
    p.add_argument("--fade", type=float, default=0.0)
    p.add_argument("--max-ctx", type=int, default=65536)
    p.add_argument("--trials", type=int, default=20)
    p.add_argument("--eval-windows", type=int, default=256)
    p.add_argument("--plan", nargs="*", default=[])
    p.add_argument("--set", nargs="*", default=[])
    o = p.parse_args(argv)
    for key, value in RECIPES[o.recipe].items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    return o


def main(argv=None):
    o = get_args(argv)
    kinds = {f.name: f.type for f in fields(HypeNetConfig)}
    o.set = {k: json.loads(v) for k, v in (s.split("=") for s in o.set)}
    plans = dict(PLANS["tiny"])
    for item in o.plan:
        key, value = item.split("=")
        stage, field = key.split(".")
        plans[stage] = replace(plans[stage], **{field: type(getattr(plans[stage], field))(float(value))})
    keep_memory()
    run = Run(o.out or f"out/{o.teacher}-{o.recipe}", vars(o))
    corpus = Corpus(Tokenizer.bytes())
    if o.pretrain:
        model = pretrain(run, corpus, plans, o).eval()
        model.save_pretrained(o.out, torch.bfloat16)
        corpus.tokenizer.save(o.out)
        b = held_out(corpus, model.config.max_len, 256)
        r = dict(loss=losses(model, b).mean().item(), **{str(n): recall(model, corpus, n, 50)[1].mean().item() for n in (256, 512, 1024, 4096)})
        print(r)
        return
    path = os.path.join(HERE, "assets", "tiny-teacher") if o.teacher == "tiny" else o.teacher
    teacher = HypeNet.from_pretrained(path, device=o.device).requires_grad_(False)
    teacher.config = replace(teacher.config)
    convert = convert_progressive if o.training == "progressive" else convert_staged
    student = convert(run, teacher, corpus, plans, o).eval()
    T = teacher.config.max_len
    if o.logit_base == "fit":
        fits = run.once("fit", lambda: fit_logit_base(student, corpus, 16 * T, o.seed))
        print(fits)
        best = min(fits, key=fits.get)
        student.config.logit_base = None if best == "None" else float(best)
    else:
        student.config.logit_base = None if o.logit_base == "none" else float(o.logit_base)
    report = run.once("eval", lambda: evaluate(teacher, student, corpus, o, [T, 2 * T, 4 * T, 16 * T, 64 * T]))
    import resource
    report = dict(recipe=o.recipe, layers=student.config.layers, logit_base=student.config.logit_base,
                  params=dict(teacher=teacher.n_params(), student=student.n_params()),
                  tokens=0, seconds=run.seconds(), peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, **report, corpus=corpus.facts)
    student.save_pretrained(run.folder)
    corpus.tokenizer.save(run.folder)
    write_json(run.path("report.json"), report)
    print_report(report)


if __name__ == "__main__":
    main()
