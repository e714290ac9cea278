"""HALO: distil a pretrained Transformer into a HypeNet (hypenet.py), which reads long contexts cheaply.

    python halo.py                             the whole job on a laptop CPU, offline, in minutes
    python halo.py --recipe article            the recipe of the article in place of the paper's
    python halo.py --resume out/tiny-paper     go on with a run that was stopped
    python halo.py --teacher small             the same at 14M parameters, on one GPU, teacher included
    python halo.py --pretrain --out teacher    train the tiny teacher anew (one GPU)

The paper's recipe (arXiv 2601.22156 section 4) is a row of stages, and one loop trains them all:

    transfer   copy the attention weights into linear twins; KV heads cloned (eq. 13), new gates neutral
    align      stage 1: every twin alone learns its attention layer's output (eq. 7)
    select     which stay attention: the layers that lose most by becoming linear (in place of eq. 8, 9)
    distil     stage 2: the hybrid learns the teacher's predictions (eq. 10); RoPE leaves attention (HyPE)
    finetune   stage 3: longer sequences, no teacher
    fit        the base a of the logit scaling s_t (eq. 11), on long held-out text and recall

The article's recipe is progressive: the middle layers are converted in groups; only the newest group and the
chunk embeddings train, on alpha CE + (1 - alpha) KL(student, teacher).

Every random choice is a function of (seed, stage, step): on one CPU a run repeats exactly, and a stopped run
goes on as one never stopped. A run's folder holds log.jsonl (a line a step), one checkpoint a stage,
report.json, and the student: config.json, model.safetensors, tokenizer.json.
"""
import argparse
import bisect
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import string
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a thread that spins long stalls another busy program

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hypenet import FAMILIES, Attention, HypeNet, HypeNetConfig, LinearAttention, locate  # noqa: E402
from support import fast  # noqa: E402
from support.common import Parser, command_line, default_device, number, write_json  # noqa: E402
from support.recall import TASKS, answers, has_room, plant, recall, training_rows  # noqa: E402,F401
from support.run import Run, ahead, bf16, checkpoint_blocks, fitted, peak_gb, recorded  # noqa: E402
from support.text import SHARDS, Corpus  # noqa: E402,F401
from support.tokens import Tokenizer, check_tokenizer  # noqa: E402
from support.common import write_text  # noqa: E402,F401
from hypenet import write_file  # noqa: E402


HERE = os.path.dirname(os.path.abspath(__file__))

# ---- recipes and plans -------------------------------------------------------------------------------------

# Every key is a flag of its own, so an ablation is one flag; get_args says what the values mean.
RECIPES = {
    "paper": dict(layers="swap", decay="constant", state="full", pe="hype", extras="on",
                  training="staged", kl="forward", alpha=0.0, window=0, logit_base="fit"),
    "article": dict(layers="ends", decay="channel", state="half", pe="chunk", extras="off",
                    training="progressive", kl="reverse", alpha=0.5, window=2048, logit_base="none"),
}
SCORED = ("swap", "guarded", "score")   # ways to choose layers that measure each one


@dataclass
class Plan:
    """What one stage costs: tokens in all, length of a sequence, batch in sequences, learning rate from lr to
    lr_end by a cosine after a warm-up, and recall: the share of sequences that hide a pass key and ask for
    it, for recall is what selection and the final table measure; varied: of these, the share that has other
    things to recall instead (see hide); weight_decay: of matrices."""
    tokens: float
    length: int
    batch: int
    lr: float
    lr_end: float
    recall: float = 0.5
    warmup: int = 50
    varied: float = 0.0
    weight_decay: float = 0.0

    @property
    def steps(self):
        return max(1, round(self.tokens / (self.length * self.batch)))

    @property
    def total(self):
        return self.steps * self.length * self.batch

    def rate(self, step):
        """The learning rate of a step; the warm-up takes a tenth of the steps at most."""
        warm = min(1.0, (step + 1) / min(self.warmup, max(1, self.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return warm * (self.lr_end + (self.lr - self.lr_end) * cosine)


# Of teachers from the hub the paper's (its Table 5), and for groups the article's 2.3B tokens, 2M a step. Of
# the tiny one what a laptop can do, of the mini one (for ablations) a GPU in a minute, of the small one in
# two, on half the tokens of its teacher at most; with things to recall, which text alone teaches too slowly.
PLANS = {
    "tiny": dict(
        pretrain=Plan(200e6, 256, 256, 3e-3, 1e-4, 0.3, 200),
        align=Plan(0.4e6, 256, 16, 3e-3, 1e-4),
        distil=Plan(1.5e6, 256, 16, 2e-3, 1e-4, 0.25),
        finetune=Plan(0.3e6, 1024, 4, 3e-4, 3e-5),
        group=Plan(2e6, 256, 16, 3e-3, 1e-4, 0.25)),
    "mini": dict(
        pretrain=Plan(118e6, 512, 128, 3e-3, 1e-4, 0.7, 200, 0.8, weight_decay=0.5),
        align=Plan(2e6, 512, 32, 3e-3, 1e-4, 0.7, varied=0.8),
        distil=Plan(10e6, 512, 32, 2e-3, 1e-4, 0.6, varied=0.8),
        finetune=Plan(3e6, 16384, 1, 3e-4, 3e-5, 0.8, varied=0.8),
        group=Plan(15e6, 512, 32, 3e-3, 1e-4, 0.6, varied=0.8)),
    "small": dict(
        pretrain=Plan(200e6, 1024, 64, 2e-3, 1e-4, 0.7, 200, 0.8, weight_decay=1.0),
        align=Plan(6.5e6, 1024, 32, 2e-3, 1e-4, 0.7, varied=0.8),
        distil=Plan(50e6, 1024, 32, 1e-3, 5e-5, 0.6, varied=0.8),
        finetune=Plan(32e6, 32768, 1, 2e-4, 2e-5, 0.8, varied=0.8),
        group=Plan(88e6, 1024, 32, 2e-3, 1e-4, 0.6, varied=0.8)),
    "real": dict(
        align=Plan(320e6, 512, 32, 1e-3, 1e-5, 0),
        distil=Plan(1e9, 512, 96, 1e-4, 1e-5, 0),
        finetune=Plan(1e9, 16384, 128, 1e-5, 1e-5, 0),
        group=Plan(2.3e9, 1024, 2048, 1e-5, 1e-5, 0)),
}

TINY = dict(layers="A" * 8, n_embd=96, n_head=3, n_kv_head=3, head_dim=32, max_len=256)
MINI = dict(layers="A" * 8, n_embd=192, n_head=6, n_kv_head=2, head_dim=32, max_len=512)
SMALL = dict(layers="A" * 8, n_embd=384, n_head=6, n_kv_head=6, head_dim=64, max_len=1024)
TEACHERS = {                                 # which --pretrain makes; tiny is shipped
    "tiny": HypeNetConfig(n_hidden=288, **TINY, **FAMILIES["qwen3"]),
    "tiny-gpt2": HypeNetConfig(n_hidden=384, **TINY, **FAMILIES["gpt2"]),
    "mini": HypeNetConfig(n_hidden=576, **MINI, **FAMILIES["qwen3"]),
    "small": HypeNetConfig(n_hidden=1024, **SMALL, **FAMILIES["qwen3"]),
    "small-gpt2": HypeNetConfig(n_hidden=1536, **SMALL, **FAMILIES["gpt2"]),
}
SIZES = dict(tiny=0, mini=4e6, small=10e6, real=100e6)     # bytes of weights from which on a plan is taken

# ---- text: documents ---------------------------------------------------------------------------------------


# ---- text: rows of tokens ----------------------------------------------------------------------------------


# ---- transfer: a student out of a teacher's weights --------------------------------------------------------


def student_config(teacher, layers, o):
    """The config of a student with these layers, o being the options of a recipe; ValueError if what --set
    changes cannot be."""
    on, half = o.extras == "on", o.state == "half"
    chunk = min(2048, teacher.max_len // 4) if o.pe == "chunk" else None
    config = dict(layers=layers, chunk=chunk, n_chunks=math.ceil(o.max_ctx / chunk) if chunk else 0,
                  attn_position=o.pe != "hype", attn_gate=on, window=o.window or None,
                  decay=o.decay, key_dim=teacher.head_dim // 2 if half else teacher.head_dim,
                  linear_rope=o.pe != "chunk", linear_qk_norm=on and not half, linear_norm=on,
                  linear_gate=on, linear_kv_head=teacher.n_head)
    student = replace(teacher, **{**config, **o.changes})
    if student.key_dim > teacher.head_dim or student.linear_kv_head % teacher.n_kv_head:
        raise ValueError(f"--set: key_dim is at most {teacher.head_dim}, the teacher's head_dim, and "
                         f"linear_kv_head a multiple of its n_kv_head, {teacher.n_kv_head}")
    return student


@torch.no_grad()
def low_rank_keys(attn, x, rank):
    """Projections of half width whose products come closest to the teacher's (the article's smaller state).
    With A = [diag(gain / rms) W, bias] of a head, q . k = [x, 1] A_q^T A_k [x, 1]^T. The best rank-r
    approximation of A_q^T A_k is U_r S_r V_r^T; each side takes the square root of S. Returns the rows of q
    and k, (H*r, C + 1) each, the bias last. 1 / rms is QK-norm's, its mean over one batch x (B,T,C)."""
    c, sides = attn.config, []
    H, D = c.n_head, c.head_dim
    outputs, weights = attn.qkvz(x).split(attn.sizes, dim=-1), with_bias(attn.qkvz).split(attn.sizes)
    for y, A, heads, norm in zip(outputs, weights, (H, c.n_kv_head), ("q_norm", "k_norm")):
        A = A.unflatten(0, (heads, D))                             # (heads, D, C + 1)
        if c.qk_norm:
            rms = y.unflatten(-1, (heads, D)).square().mean(-1).add(c.norm_eps).sqrt()
            A = A * getattr(attn, norm).weight[:, None] * (1 / rms).mean((0, 1))[:, None, None]
        sides.append(torch.linalg.qr(A.repeat_interleave(H // heads, 0).cpu().double().mT))
    (Q_q, R_q), (Q_k, R_k) = sides                                 # A^T = Q R, so the SVD is of D x D only
    U, S, Vh = torch.linalg.svd(R_q @ R_k.mT)
    root = S[:, :rank, None].sqrt()
    return [(root * M[:, :rank]).flatten(0, 1).to(x) for M in ((Q_q @ U).mT, Vh @ Q_k.mT)]


def with_bias(linear):
    """Rows of a Linear with their bias, or 0, as a last column: (out, in + 1)."""
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), 1)


@torch.no_grad()
def linear_twin(attn, config, x, where, retention=0.7, transfer=True):
    """A linear layer out of an attention layer (transfer False: a random one): its weights, KV heads cloned
    (paper eq. 13), gates neutral.
    On one batch of the layer's inputs x (B,T,C), W_o is then scaled column by column, by least squares, so
    that what it reads starts as close to what the teacher's reads as a factor can bring it."""
    c, t = config, attn.config
    twin = LinearAttention(c).to(x.device)
    q, k, v, _ = with_bias(attn.qkvz).split(attn.sizes)
    clones = c.linear_kv_head // t.n_kv_head

    def clone(rows):                                               # a head's rows, again for each query head
        return rows.unflatten(0, (t.n_kv_head, -1)).repeat_interleave(clones, 0).flatten(0, 1)
    if c.key_dim < c.head_dim:
        q, k = low_rank_keys(attn, x, c.key_dim)                   # k has a head a query head already
        k = k.unflatten(0, (c.n_head, -1))[::c.n_head // c.linear_kv_head].flatten(0, 1)
    else:
        k = clone(k)
    if hasattr(twin, "forget"):
        nn.init.zeros_(twin.forget.weight)
        nn.init.constant_(twin.forget.bias, math.log(retention / (1 - retention)))
    if not transfer:
        return twin
    fill(twin.qkvz, torch.cat((q, k, clone(v))))
    fill(twin.out, with_bias(attn.out))
    if c.linear_qk_norm and t.qk_norm and c.key_dim == c.head_dim:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    a, o = attn.mix(x, where).float(), twin.mix(x, where).float()  # (B,T,H*D): what W_o reads, in both
    twin.out.weight *= (a * o).sum((0, 1)) / (o * o).sum((0, 1)).clamp(min=1e-12)  # c of least |a - c o|^2
    return twin


@torch.no_grad()
def attention_twin(attn, config):
    """An attention layer for the student: its teacher's weights; a new gate starts as the identity, its
    sigmoid(0) = 1/2 made up for by doubling W_o; chunk embeddings start random (std 0.02)."""
    twin = Attention(config).to(attn.out.weight.device)
    fill(twin.qkvz, with_bias(attn.qkvz))
    fill(twin.out, with_bias(attn.out))
    if config.attn_gate:
        twin.out.weight *= 2
    if config.qk_norm:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    if hasattr(twin, "chunk_embd"):
        nn.init.normal_(twin.chunk_embd.weight, std=0.02)
    return twin


def fill(linear, rows):
    """Set the first rows of a Linear, the bias last in each; what is left, a gate, becomes 0."""
    n = len(rows)
    linear.weight[:n], linear.weight[n:] = rows[:, :-1], 0
    if linear.bias is not None:
        linear.bias[:n], linear.bias[n:] = rows[:, -1], 0


@torch.no_grad()
def teacher_layers(teacher, config, idx):
    """Run a teacher on idx (B,T) and yield, layer by layer, what a twin of it needs: the attention layer,
    its input x (B,T,C) after the norm, where its tokens stand (with the teacher's rotation for the one and
    the twin's for the other), and its output y (B,T,C)."""
    known = replace(config, attn_position=True, chunk=None, n_chunks=0)   # the teacher's positions, the twins' RoPE
    where = locate(known, torch.arange(idx.size(1), device=idx.device)[None])
    h = teacher.embed(idx, where)
    for block in teacher.blocks:
        x = block.norm1(h)
        y = block.mixer(x, where)
        yield block.mixer, x, where, y
        h = h + y
        h = h + block.mlp(block.norm2(h))


def make_twins(teacher, config, corpus, plan, o):
    """A linear twin of every attention layer, and what its output squared would be on average in the teacher;
    both from one batch of text, of at most 2^14 tokens."""
    plan = replace(plan, batch=min(plan.batch, max(1, 2 ** 14 // plan.length)))
    rows = training_rows(corpus, "transfer", plan)(0)
    idx, twins, squares = torch.from_numpy(rows[:, :-1]).to(o.device), nn.ModuleList(), []
    with bf16():
        for attn, x, where, y in teacher_layers(teacher, config, idx):
            twins.append(linear_twin(attn, config, x, where, o.retention, o.transfer == "on"))
            squares.append(y.float().square().mean())
    return twins, squares


def assemble(teacher, config, mixers):
    """A student: its mixers are those of a list, all else is copied from a model (the teacher)."""
    with torch.device(teacher.wte.weight.device):
        student = HypeNet(replace(config))
    shared = {name: w for name, w in teacher.state_dict().items() if ".mixer." not in name}
    new = student.load_state_dict(shared, strict=False).missing_keys
    assert all(".mixer." in name or "chunk_embd" in name for name in new), f"not transferred: {new}"
    for block, mixer in zip(student.blocks, mixers):
        block.mixer, mixer.config = mixer, student.config
    return student


# ---- losses ------------------------------------------------------------------------------------------------


def by_slices(work, model, *tensors, elements=None):
    """[work(slice of each tensor)], so many tokens (N,...) at a time that logits have about `elements`
    values: a large vocabulary then needs no more memory than a small one."""
    n = max(1, (elements or (2 ** 27 if tensors[0].is_cuda else 2 ** 24)) // model.config.vocab_size)
    return [work(*part) for part in zip(*(t.split(n) for t in tensors))]


def token_losses(logits_s, logits_t, targets, kl, alpha):
    """Sum over tokens of alpha CE + (1 - alpha) KL, of logits (n,V) of student and teacher (None: CE)."""
    log_s, loss = logits_s.float().log_softmax(-1), 0.0
    if alpha:
        loss = alpha * F.nll_loss(log_s, targets, reduction="sum")
    if logits_t is not None:
        log_t = logits_t.float().log_softmax(-1)
        p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
        loss = loss + (1 - alpha) * F.kl_div(log_q, p, reduction="sum", log_target=True)
    return loss


class _HeadLoss(torch.autograd.Function):
    """The loss of a head, in slices whose gradients are taken as soon as their logits are there: no logits
    are kept, and none are made twice. work(weight, slices of xs and others) -> loss."""

    @staticmethod
    def forward(ctx, work, elements, student, weight, xs, *others):
        weight, xs = weight.detach().requires_grad_(ctx.needs_input_grad[3]), xs.detach()

        def one(x, *others):
            x.requires_grad_(ctx.needs_input_grad[4])
            with torch.enable_grad():
                loss = work(weight, x, *others)
            if loss.requires_grad:
                loss.backward()
            return loss.detach(), x.grad
        losses, grads = zip(*by_slices(one, student, xs, *others, elements=elements))
        ctx.grads = weight.grad, torch.cat(grads) if ctx.needs_input_grad[4] else None
        return sum(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (w, x), ctx.grads = ctx.grads, None
        return None, None, None, *(g if g is None else g.mul_(grad) for g in (w, x)), None, None


def distil_loss(student, teacher, idx, targets, kl, alpha, offset=None, slice_elements=None):
    """alpha CE + (1 - alpha) KL, means over all tokens. kl "forward": KL(teacher, student), paper eq. 10;
    "reverse": KL(student, teacher), the article's."""
    xs = student.hidden(idx, offset=offset).flatten(0, 1)                         # (N,C)
    with torch.no_grad():
        xt = teacher.hidden(idx).flatten(0, 1) if alpha < 1 else xs.detach()

    def work(weight, xs, xt, y):
        with torch.no_grad():
            logits_t = teacher.head(xt) if alpha < 1 else None
        return token_losses(F.linear(xs, weight.to(xs.dtype)), logits_t, y, kl, alpha)         # (n,V)
    return _HeadLoss.apply(work, slice_elements, student, student.head_weight(), xs, xt,
                           targets.flatten()) / len(xs)


def objective(student, teacher, o, alpha):
    """The loss function of a stage (see backward). Chunk HyPE starts each sequence somewhere, so that the
    embedding of every chunk is trained; where, its own ids tell, as good as at random, in a recorded step
    too."""
    def loss_fn(idx, targets, step):
        c, offset = student.config, None
        if c.chunk:
            most = max(0, c.chunk * c.n_chunks - idx.size(1)) + 1
            offset = (idx * torch.arange(1, idx.size(1) + 1, device=idx.device) ** 2).sum(1) % most
        yield distil_loss(student, teacher, idx, targets, o.kl, alpha, offset)
    return loss_fn


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(models, batches):
    """Means over the tokens of each sequence (sequences, 1 or 4): the loss of each model in nats, and of two
    models, teacher and student, KL(teacher, student) and how often the likeliest next token is the same."""
    def one(targets, *xs):
        logs = [model.head(x).float().log_softmax(-1) for model, x in zip(models, xs)]
        out = [-log.gather(-1, targets[:, None])[:, 0] for log in logs]
        if len(logs) > 1:
            t, s = logs
            out += [F.kl_div(s, t, reduction="none", log_target=True).sum(-1), t.argmax(-1) == s.argmax(-1)]
        return torch.stack([x.float() for x in out], 1)             # (n, 1 or 4)
    means = []
    for idx, targets in batches:
        idx, targets = idx.to(models[0].wte.weight.device), targets.to(models[0].wte.weight.device)
        with bf16():
            xs = [model.hidden(idx).flatten(0, 1) for model in models]
            scores = torch.cat(by_slices(one, models[0], targets.flatten(), *xs))
        means.append(scores.unflatten(0, idx.shape).mean(1).cpu())
    return torch.cat(means)


def losses(model, batches):
    """Mean loss of each sequence, nats a token."""
    return measure([model], batches)[:, 0]


def compare(teacher, student, batches):
    """Held-out loss of both, KL(teacher, student) in nats a token, and the share of tokens whose likeliest
    next token is the same."""
    t, s, kl, same = measure([teacher, student], batches).mean(0).tolist()
    return dict(val_loss=dict(teacher=t, student=s), kl=kl, top1_agreement=same)


# ---- a run: its folder, its log, its checkpoints -----------------------------------------------------------


# ---- training ----------------------------------------------------------------------------------------------


def backward(loss_fn, rows, step, micro):
    """Add up the gradients of the mean loss of a batch, rows (batch, length + 1), `micro` of them at a time;
    returns the loss. loss_fn(idx, targets, step) yields terms of the loss of some rows. Each is
    backpropagated as it comes, so that memory holds the graph of one alone."""
    total = 0.0
    for first in range(0, len(rows), micro):
        part = rows[first:first + micro]
        terms = loss_fn(part[:, :-1], part[:, 1:], step)
        while True:
            with bf16():
                term = next(terms, None)
            if term is None:
                break
            term = term * (len(part) / len(rows))
            term.backward()
            total = total + term.detach()
    return total


def train(run, stage, plan, corpus, module, groups, loss_fn):
    """The one training loop (AdamW 0.9/0.95; the weights of matrices decay only where a plan says so, in no
    stage of paper appendix B). groups: lists of parameters, each clipped to a gradient norm of 1 alone; all
    else in module is frozen, and on CUDA bf16. loss_fn: see backward. A stage that was stopped goes on; one
    that is finished is only loaded. ValueError if the loss is not finite, the checkpoint is damaged, or
    memory or disk run out."""
    params, device = [p for g in groups for p in g], groups[0][0].device
    trained = set(map(id, params))
    for p in module.parameters():
        p.requires_grad_(id(p) in trained)
        if device.type == "cuda":
            p.data = p.data.to(torch.float32 if p.requires_grad else torch.bfloat16)
    most = min(plan.batch, max(1, 2 ** 17 // plan.length))         # more tokens at once are not faster
    micro, run.tokens = run.options["micro"] or most, run.tokens + plan.total
    if isinstance(run, Probe):
        run.measure(stage, plan, module, params, loss_fn, micro)
        return checkpoint_blocks(module, on=False)
    opt = torch.optim.AdamW([dict(params=[p for p in params if p.dim() > 1], weight_decay=plan.weight_decay),
                             dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)],
                            lr=plan.lr, betas=(0.9, 0.95), fused=True)
    file, first, mean, replay = run.path(f"{stage}.pt"), 0, None, None
    if os.path.exists(file):
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            module.load_state_dict(saved["module"], strict=False)
            first, mean = saved["step"], saved["mean"]
            if "optimizer" in saved:
                opt.load_state_dict(saved["optimizer"])
        except Exception:                                          # torch raises several types
            raise ValueError(f"{file} is damaged; remove it to train this stage again") from None
        del saved
    if first < plan.steps:
        run.forget(stage, first)

    def save(step):
        state = dict(step=step, mean=mean, module={
            name: p for name, p in module.named_parameters() if p.requires_grad})
        if step < plan.steps:
            state["optimizer"] = opt.state_dict()
        try:
            write_file(file, lambda tmp: torch.save(state, tmp))
        except (OSError, RuntimeError) as e:                       # torch's own on a full disk
            raise ValueError(f"{file}: {e}; free some disk, then --resume {run.folder}") from None
        run.save()

    def gradients(rows, step, micro):                              # clipped; loss and norm (2,)
        loss = backward(loss_fn, rows, step, micro)
        norms = [nn.utils.clip_grad_norm_(g, 1.0) for g in groups]
        return torch.stack((loss, torch.stack(norms).max()))       # NaN if any is
    bar = tqdm(range(first, plan.steps), desc=f"{stage:9s}", initial=first, total=plan.steps, mininterval=0.5,
               dynamic_ncols=True, disable=first == plan.steps)
    saved_at, pause, tick = time.time(), 120.0, time.time()
    for step, rows in zip(bar, ahead(training_rows(corpus, stage, plan), range(first, plan.steps), device)):
        if replay:
            both = replay(rows)
        else:
            both, micro = fitted(stage, module, micro, partial(gradients, rows, step))
        value, norm = both.tolist()
        if not (math.isfinite(value) and math.isfinite(norm)):
            good = f"last checkpoint {file}" if os.path.exists(file) else "no checkpoint yet"
            flag = f"--plan {stage.rstrip('0123456789')}.lr={plan.lr / 3:.0e}"
            raise ValueError(f"{stage}: loss {value:.3g}, gradient norm {norm:.3g} at step "
                             f"{step + 1}, {good}; start anew with {flag}")
        lr = plan.rate(step)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        if not replay:
            opt.zero_grad()
            if step == first + 1 < plan.steps - 1 and micro >= len(rows):        # all is compiled, and fits
                replay = recorded(partial(gradients, step=step, micro=micro), rows, run.options)
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        now = time.time()
        ms, tick = 1000 * (now - tick), now
        run.log(stage=stage, step=step + 1, loss=value, norm=norm, lr=lr, ms=round(ms, 2))
        if (step + 1) % max(1, plan.steps // 4) == 0 or step + 1 == plan.steps:
            tqdm.write(f"{stage:9s}{step + 1:6,}/{plan.steps:,} | loss {mean:.4f} | norm {norm:.2f} | "
                       f"lr {lr:.1e} | {ms:,.0f} ms | {1000 * plan.total / plan.steps / ms:,.0f} tok/s")
        bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        if step + 1 == plan.steps or run.stop or now - saved_at > pause:
            save(step + 1)
            run.leave_if_asked()
            saved_at = tick = time.time()
            pause = max(pause, 20 * (saved_at - now))              # large models: at most 5% of the time
    module.requires_grad_(False).zero_grad()
    checkpoint_blocks(module, on=False)
    corpus.advance(plan)


# ---- the paper's stages ------------------------------------------------------------------------------------


def align(run, teacher, config, corpus, plan, o):
    """Stage 1 (paper eq. 7): a linear twin of every attention layer, each alone, on the teacher's own hidden
    states. The loss is the sum over layers of MSE / mean square of the target on one batch: Adam does not
    see the factor, and 1 a layer is what an output of zero would score. A layer is a term: its graph is gone
    before the teacher runs the next."""
    twins, squares = make_twins(teacher, config, corpus, plan, o)

    def loss_fn(idx, targets, step):
        for twin, square, (_, x, where, y) in zip(twins, squares, teacher_layers(teacher, config, idx)):
            yield (twin(x, where).float() - y.float()).square().mean() / square
    train(run, "align", plan, corpus, twins, [list(t.parameters()) for t in twins], loss_fn)
    return twins


def swap_scores(teacher, twins, config, corpus, o):
    """R and C of paper eq. 8, measured with what is built in. For every layer, of the model in which it alone
    is linear: mean log-probability of an answer's tokens (R: of pass keys and, in the share that training
    has, of values after other words, see recall) and minus the held-out loss (C), with their standard errors;
    for "swap" also those of the model in which it alone is what it would be if it stayed: with HyPE,
    attention without positions. RoPE is left out; learned positions entered at the input, so the layer reads
    the stream less wpe: gone is what they added themselves, not what layers before made of it. Returns these
    and the teacher's own C. A swap is made in place; config tells the kind of layer i."""
    own, scores = teacher.config, []
    batches = corpus.held_out_batches(o.length, max(2, o.eval_windows // 2))

    def both(kind=""):
        R = recall(teacher, corpus, o.length, o.trials * 2, varied=o.varied)[0]
        C = -losses(teacher, batches)
        return {f"R{kind}": R.mean().item(), f"R{kind}_se": R.std().item() / len(R) ** 0.5,
                f"C{kind}": C.mean().item(), f"C{kind}_se": C.std().item() / len(C) ** 0.5}
    for i, twin in enumerate(tqdm(twins, desc="select   ", dynamic_ncols=True)):
        block, layers = teacher.blocks[i], "A" * i + "L" + "A" * (len(twins) - 1 - i)
        attn = block.mixer

        def kept(x, where, cache=None):
            h = x - teacher.wpe(where.pos) if own.position == "learned" else x
            x = x + attn(block.norm1(h), where._replace(attn_rope=None), cache)
            return x + block.mlp(block.norm2(x))
        try:
            block.mixer = twin
            teacher.config = replace(config, layers=layers, attn_position=True, chunk=None, n_chunks=0, window=None,
                                     attn_gate=False)
            scores.append(both())
            block.mixer, teacher.config = attn, own
            if o.layers == "swap":
                if o.pe == "hype":
                    block.forward = kept
                scores[i].update(both("_kept"))
        finally:
            block.mixer, teacher.config = attn, own
            vars(block).pop("forward", None)
    return scores, -losses(teacher, batches).mean().item()


def choose_layers(how, n_layer, scores=None, base_C=None, limit=1.0, keep=None):
    """The layers that stay attention, as a string of "A" and "L". how: the string itself; "even"; "ends", the
    article's first and last quarter; "score", the `keep` (default floor(L/4)) layers of highest

        score_i = (max R - R_i) / (max C - C_i + 1e-6)             paper eq. 8, 9

    much recall lost for little language lost; "guarded", the same with the denominator floored at C's
    standard error, and those layers first whose lone swap costs more than `limit` nats; or "swap":

        score_i = (R_i if it stays - R_i if it is linear) + (the same of C)

    A layer that stays loses its RoPE (HyPE), so the choice is between two losses. One that looks a fixed step
    back needs positions, and is better off linear, with RoPE, however much recall hangs on it. ValueError if
    how is none of these."""
    if how not in (*SCORED, "even", "ends") and (set(how) - set("AL") or not how):
        raise ValueError(f"--layers {how}: give {', '.join(SCORED)}, even, ends, or a letter A or L a layer")
    if set(how) <= set("AL"):
        if len(how) != n_layer:
            raise ValueError(f"--layers {how} names {len(how)} layers; the teacher has {n_layer}")
        return how
    k = keep or max(1, n_layer // 4)
    if how == "ends":                                              # the article's get_hybrid_config
        stay = [*range(n_layer // 4), *range(n_layer * 3 // 4, n_layer)]
    elif how == "even":
        stay = [round((i + 1) * n_layer / k) - 1 for i in range(k)]
    else:
        best_R, best = max(s["R"] for s in scores), max(scores, key=lambda s: s["C"])
        for s in scores:
            floor = best["C_se"] if how == "guarded" else 0.0
            s["score"] = (s["R_kept"] - s["R"] + s["C_kept"] - s["C"] if how == "swap" else
                          (best_R - s["R"]) / (max(best["C"] - s["C"], floor) + 1e-6))
            s["must"] = how == "guarded" and base_C - s["C"] > limit
        order = sorted(range(n_layer), key=lambda i: (scores[i]["must"], scores[i]["score"]), reverse=True)
        stay = order[:k]
    return "".join("A" if i in stay else "L" for i in range(n_layer))


def convert_staged(run, teacher, corpus, plans, o):
    """The paper's HALO: align, select, distil, finetune, fit."""
    L = len(teacher.config.layers)
    config = student_config(teacher.config, "L" * L, o)
    twins = align(run, teacher, config, corpus, plans["align"], o)
    scores = base = None
    if o.layers in SCORED:
        scores, base = run.once("scores", lambda: swap_scores(teacher, twins, config, corpus, o))
    layers = choose_layers(o.layers, L, scores, base, keep=o.keep)
    if scores:
        print_scores(scores, layers, base)
    config = replace(config, layers=layers)
    student = assemble(teacher, config, [attention_twin(b.mixer, config) if kind == "A" else twin
                                         for b, twin, kind in zip(teacher.blocks, twins, layers)])
    twins = None                                                   # frees those of layers that stay attention
    everything, fade = [list(student.parameters())], round(o.fade * plans["distil"].steps)
    distil = objective(student, teacher, o, o.alpha)

    def fading(idx, targets, step):                                # RoPE (or wpe) leaves attention slowly
        student.config.attn_pe = max(0.0, 1 - step / fade)
        yield from distil(idx, targets, step)
    train(run, "distil", plans["distil"], corpus, student, everything, fading if fade else distil)
    student.config.attn_pe = config.attn_pe
    train(run, "finetune", plans["finetune"], corpus, student, everything,
          objective(student, teacher, o, alpha=1.0))
    return student


def print_scores(scores, layers, base):
    kinds = {"": "linear", "_kept": "kept"} if "R_kept" in scores[0] else {"": "linear"}
    header = "layer"
    for name in kinds.values():
        header += f"{f'recall if {name} (log p)':>27s}{f'held-out loss if {name}':>25s}"
    print(f"\n{header}{'score':>10s}")
    for i, s in enumerate(scores):
        row = f"{i:3d} {layers[i]}"
        for k in kinds:
            row += f"{s[f'R{k}']:17.3f} +- {s[f'R{k}_se']:6.3f}{-s[f'C{k}']:15.4f} +- {s[f'C{k}_se']:.4f}"
        print(f"{row}{s['score']:10.3f}" + "  (swap costs over 1 nat)" * s["must"])
    print(f"teacher's held-out loss {-base:.4f}; layers: {layers}\n")


# ---- the article's progressive conversion ------------------------------------------------------------------


def groups_of(layers, o):
    """The linear layers in the groups in which they are converted."""
    linear = [i for i, kind in enumerate(layers) if kind == "L"]
    return np.array_split(linear, min(len(linear), o.groups or max(2, math.ceil(len(linear) / 6))))


def convert_progressive(run, teacher, corpus, plans, o):
    """The article's halo_distillation: the linear layers in groups, the model usable after each."""
    layers = choose_layers(o.layers, len(teacher.config.layers), keep=o.keep)
    groups, config = groups_of(layers, o), student_config(teacher.config, layers, o)
    plan = replace(plans["group"], tokens=plans["group"].tokens / len(groups))
    twins, _ = make_twins(teacher, config, corpus, plan, o)
    mixers, student = [attention_twin(block.mixer, config) for block in teacher.blocks], teacher
    for g, group in enumerate(groups, 1):
        for i in group:
            mixers[i] = twins[i]
        now = "".join("L" if isinstance(m, LinearAttention) else "A" for m in mixers)
        student, stage = assemble(student, replace(config, layers=now), mixers), f"group{g}"
        params = [p for i in group for p in student.blocks[i].mixer.parameters()]
        params += [p for name, p in student.named_parameters() if "chunk_embd" in name]
        train(run, stage, plan, corpus, student, [params], objective(student, teacher, o, o.alpha))

        def usable():
            student.save_pretrained(run.path(stage))
            corpus.tokenizer.save(run.path(stage))
            loss = losses(student, corpus.held_out_batches(o.length, o.eval_windows)).mean().item()
            print(f"group {g} of {len(groups)}: {now} | held-out loss {loss:.4f} | usable: {run.path(stage)}")
            return loss
        run.once(stage, usable)
    return student


# ---- the logit base, the report ----------------------------------------------------------------------------


def fit_logit_base(student, corpus, length, seed, varied=0.0):
    """What each base a of s_t (paper eq. 11) costs at a long length: {a: held-out loss less the mean
    log-probability of an answer's tokens}, nats; the sum that `choose_layers` "swap" goes by. From None, no
    scaling, to ever more, until one costs 0.02 more than the best so far."""
    batches, out = corpus.held_out_batches(length, 8, seed), {}
    for a in tqdm((None, 10000, 3000, 1000, 500, 300, 100, 50, 20), desc="fit a    ", dynamic_ncols=True):
        student.config.logit_base = a
        R = recall(student, corpus, length, 10, seed + 1, varied=varied)[0]     # not the keys of the report
        out[str(a)] = (losses(student, batches).mean() - R.mean()).item()
        if out[str(a)] > min(out.values()) + 0.02:
            break
    return out


def least(fits):
    """The base that costs least, None or a number."""
    base = min(fits, key=fits.get)
    return None if base == "None" else float(base)


# Fields of report.json: the task asked for, and what a table calls it. The second is for models whose
# training had more to find than pass keys.
ASKED = {"passkey": ("S1", "pass key found"), "multikey": ("multi-key", "one of four found")}


def shares(model, corpus, lengths, o):
    """What share of answers a model finds: {field of ASKED: {length: share, None past the last position it
    knows or without room}}."""
    fields = list(ASKED)[:2 if o.varied else 1]
    out = {field: dict.fromkeys(map(str, lengths)) for field in fields}
    for field, n in tqdm([*itertools.product(fields, lengths)], desc="recall   ", dynamic_ncols=True):
        task, _ = ASKED[field]
        if n <= model.config.limit() and has_room(task, n, corpus):
            dear = o.device == "cpu" and n > 16 * o.length         # minutes, on a CPU
            trials = max(1, o.trials // 4) if dear else o.trials
            out[field][str(n)] = recall(model, corpus, n, trials, task=task)[1].mean().item()
    return out


def evaluate(teacher, student, corpus, o):
    """The numbers of the final table and of report.json. What is hidden is asked for at 1 to 16 times the
    length of distillation, of the student at 64 times too."""
    lengths = [n * o.length for n in (1, 2, 4, 16, 64)]
    theirs, ours = shares(teacher, corpus, lengths[:4], o), shares(student, corpus, lengths, o)
    return dict(**compare(teacher, student, corpus.held_out_batches(o.length, o.eval_windows)),
                **{field: dict(teacher=theirs[field], student=ours[field]) for field in ours})


def percent(share):
    return "-" if share is None else f"{share:.0%}"


def print_report(r):
    def row(title, teacher, student):
        width = max(10, len(r["layers"]) + 2, len(f"{r['params']['student']:,}") + 1)
        print(f"{title:34s}{teacher:>{width}s}{student:>{width}s}")

    row("", "teacher", "student")
    row("layers", "A" * len(r["layers"]), r["layers"])
    row("parameters", *(f"{r['params'][m]:,}" for m in ("teacher", "student")))
    row("held-out loss, nats a token", *(f"{r['val_loss'][m]:.4f}" for m in ("teacher", "student")))
    row("KL to the teacher, nats a token", "", f"{r['kl']:.4f}")
    row("same likeliest next token", "", f"{r['top1_agreement']:.1%}")
    for field, (_, what) in ASKED.items():
        for n, share in r[field]["student"].items() if field in r else ():
            row(f"{what} in {int(n):,} tokens", percent(r[field]["teacher"].get(n)), percent(share))
    peak = f", peak memory {r['peak_gb']:.1f} GB" if r["peak_gb"] else ""
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes{peak}, "
          + (f"logit base {r['logit_base']:g}\n" if r["logit_base"] else "no logit scaling\n"))


# ---- what a run will cost ----------------------------------------------------------------------------------


class Probe:
    """Stands in for a Run to try the stages on the device: found[stage] = sequences at once that fit, tokens
    a second, peak memory in GB, of forward and backward passes of true shape on random ids. ValueError if
    they do not fit."""

    def __init__(self, teacher, corpus, plans, o):
        self.options, self.tokens, self.found, self.n_vocab = vars(o), 0, {}, o.tokenizer.n_vocab
        even = argparse.Namespace(**{**vars(o), "layers": "even" if o.layers in SCORED else o.layers})
        try:
            (convert_progressive if "group" in plans else convert_staged)(self, teacher, corpus, plans, even)
        except torch.OutOfMemoryError:
            fits = "more --groups" if "group" in plans else "--recipe article, which trains groups of layers,"
            raise ValueError(f"weights, gradients and optimizer state exceed the memory of {o.device}; give "
                             f"{fits} or a smaller --teacher") from None

    def once(self, name, work):
        """Nothing is measured or written."""

    def measure(self, stage, plan, module, params, loss_fn, micro):
        aside = torch.empty(2 * sum(p.numel() for p in params), device=params[0].device)   # for the optimizer
        rows = torch.randint(self.n_vocab, (plan.batch, plan.length + 1), device=aside.device)
        for _ in range(3):                                         # the first finds what fits, and warms up
            if aside.is_cuda:
                torch.cuda.reset_peak_memory_stats(aside.device)
            began = time.time()
            _, micro = fitted(stage, module, micro, lambda n: backward(loss_fn, rows[:n], 0, n).item())
            seconds = time.time() - began
        rows = rows[:micro]
        module.zero_grad()
        replay = micro >= plan.batch and recorded(lambda rows: backward(loss_fn, rows, 0, micro), rows,
                                                  self.options)
        for _ in range(2 * bool(replay)):
            began = time.time()
            replay(rows).item()
            seconds = time.time() - began
        module.zero_grad()
        self.found[stage.rstrip("0123456789")] = (len(rows), len(rows) * plan.length / seconds,
                                                  peak_gb(aside.device.type))


def check_disk(folder, teacher, plans, o):
    """ValueError if the disk has no room for what a run writes: a checkpoint with its optimizer state, the
    next one beside it, the student and, of a progressive run, a model a group."""
    groups = 0
    if "group" in plans:
        groups = len(groups_of(choose_layers(o.layers, len(teacher.config.layers), keep=o.keep), o))
    need = (28 / max(1, groups) + 4 * (1 + groups)) * teacher.n_params() / 1e9
    parent = next(p for p in (Path(folder).absolute() / "x").parents if p.exists())
    if need > (free := shutil.disk_usage(parent).free / 1e9):
        raise ValueError(f"checkpoints and student need {need:.0f} GB of disk, {parent} has {free:.0f}; let "
                         "--out name a folder on a larger one")


def print_plan(folder, config, corpus, plans, o, found):
    """The stages of a run and, where a Probe has tried them, what they cost."""
    print(f"teacher {o.teacher}: {len(config.layers)} layers, trained at {config.max_len} tokens | "
          f"recipe {o.recipe} | device {o.device} | run {folder}")
    total = sum(plan.total for plan in plans.values())
    for paths, share, source in zip(corpus.paths, corpus.shares, corpus.sources):
        n, read = sum(source.sizes), share * total
        print(f"text {' '.join(paths)}: {n:,} tokens to train on, of which this run reads {read:,.0f}"
              + f" ({read / n:.1f} rounds, each in a new order)" * bool(read > n)
              + f"; {len(source.held_out):,} held out")
    seconds = sum(plan.total / found[name][1] for name, plan in plans.items()) if found else 0
    unit, a_unit = ("hours", 3600) if seconds >= 3600 else ("minutes", 60)
    measured = f"   {'at once':>8s}{'peak GB':>9s}{'tok/s':>11s}{unit:>9s}" if found else ""
    print(f"{'stage':10s}{'tokens':>14s}{'steps':>8s}{'length':>8s}{'batch':>7s}   learning rate{measured}")
    for name, plan in plans.items():
        row = f"{name:10s}{plan.total:14,}{plan.steps:8,}{plan.length:8,}{plan.batch:7,}"
        row += f"   {plan.lr:.0e}->{plan.lr_end:.0e}"
        if found:
            at_once, speed, peak = found[name]
            row += f"{at_once:12,}{peak:9.1f}{speed:11,.0f}{plan.total / speed / a_unit:9.2f}"
        print(row)
    if found:
        print(f"{seconds / a_unit:.1f} {unit} in all, measuring aside. at once: how many sequences of a "
              "batch go through together; more are taken one after the other, with the same result")
    print(flush=True)


# ---- command line ------------------------------------------------------------------------------------------


def get_args(argv):
    p = Parser(prog="halo.py", description=__doc__.split("\n\n")[0],
               epilog="eq.: of arXiv 2601.22156. A row left out follows --recipe. " + " ".join(
                   f"{name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in rows.items()) + "."
                   for name, rows in RECIPES.items()))
    add, many = p.add_argument, dict(nargs="+", action="extend")
    add("--teacher", default="tiny",
        help="tiny (shipped, 1M parameters); mini, small (3.5M, 14M), tiny-gpt2, small-gpt2, which are "
             "trained first, once, and want a GPU; gpt2, gpt2-medium, gpt2-large, gpt2-xl, a repository "
             "of the hub such as Qwen/Qwen3-1.7B, or a folder of a GPT-2, Qwen3, Llama 3 or of --pretrain. "
             "Those of the hub get the paper's plan and fineweb and want a GPU; folders get, by the size of "
             "their weights, the plan of tiny, mini (from 4 MB) or small (10 MB), with stdlib, or the "
             "paper's (from 100 MB)")
    add("--recipe", default="paper", choices=RECIPES, help="the paper's (default) or the article's")
    add("--out", help="folder of the run; default out/TEACHER-RECIPE; -2, -3, ... if taken")
    add("--resume", metavar="RUN",
        help="go on with the run in this folder; of its options --device can change and --plain be added")
    add("--data", **many, metavar="PATH[:WEIGHT]",
        help="text to train on: stdlib (source of Python's standard library), fineweb (fetched as needed), "
             ".txt, .jsonl (field text), .gz of either, .bin (llm.c's shards of GPT-2 tokens; val in the "
             "name: held out), folders of these. Weights are shares of sequences: web/:0.7 code/:0.1 "
             "books/:0.2")
    add("--device", help=f"cuda, mps or cpu; default: {default_device()} here")
    add("--micro", type=number(int, 1), metavar="N",
        help="sequences of a batch that go through the models at once, at most; default: as many as fit, of "
        "up to 131,072 tokens")
    add("--plain", action="store_true",
        help="on a GPU, run every operation by itself: none is compiled (torch.compile, up to a minute; for "
             "the tiny teachers never), no step is recorded (CUDA graph)")
    add("--dry-run", action="store_true", help="print the plan, on a GPU with memory and time, and end")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N", help="of every random choice")
    add("--budget", type=number(float, 1e-6), default=1.0, metavar="X",
        help="multiply the tokens of every stage by this")
    add("--plan", **many, default=[], metavar="STAGE.FIELD=X",
        help="change entries of the plan, such as distil.tokens=4e6 or align.lr=1e-3")
    add("--pretrain", action="store_true",
        help=f"train the teacher ({', '.join(TEACHERS)}) from random weights instead; with --layers a hybrid")
    add = p.add_argument_group("rows of the recipe").add_argument
    add("--layers", help="which stay attention: swap (those that lose more as linear layers than as "
                         "attention without positions), score (eq. 8), guarded (eq. 8, denominator floored "
                         "at the noise), even, ends (first, last quarter), or letters such as LLALLLAL")
    add("--keep", type=number(int, 1), metavar="N", help="how many stay attention, with --layers "
        "swap, guarded, score or even; default: a quarter")
    add("--decay", choices=("constant", "none", "head", "channel"),
        help="of linear layers: eq. 19, no forgetting, or a gate for each head or key channel")
    add("--state", choices=("full", "half"), help="width of a key in linear layers: the teacher's, or half")
    add("--pe", choices=("hype", "chunk", "rope"),
        help="hype: RoPE in linear layers, none in attention; chunk: the article's; rope: both")
    add("--extras", choices=("on", "off"), help="QK-norm, output norm and output gates")
    add("--training", choices=("staged", "progressive"),
        help="align, select, distil, finetune; or layers converted in groups, one after the other")
    add("--kl", choices=("forward", "reverse"), help="KL(teacher, student), KL(student, teacher)")
    add("--alpha", type=number(float, 0, 1), metavar="X", help="share of cross-entropy in the loss, 0 to 1")
    add("--window", type=number(int, 0), metavar="N", help="attention reaches this many tokens back, 0: all")
    add("--logit-base", metavar="A", help="a of s_t (eq. 11): fit, none, or a number above 1")
    add = p.add_argument_group("finer choices").add_argument
    add("--groups", type=number(int, 0), default=0, metavar="N",
        help="groups of linear layers in a progressive run; default: one for 6 layers, at least 2")
    add("--transfer", choices=("on", "off"), default="on",
        help="linear layers start from their attention layers' weights, or random (off)")
    add("--retention", type=number(float, 0.001, 0.999), default=0.7, metavar="X",
        help="share of the state that a new forget gate keeps at each token")
    add("--fade", type=number(float, 0, 1), default=0.0, metavar="X",
        help="share of stage 2 over which RoPE (or GPT-2's wpe) leaves attention; 0: at once")
    add("--max-ctx", type=number(int, 1), default=65536 + 1024, metavar="N",
        help="positions that a chunk HyPE model knows, context and answer together")
    add("--trials", type=number(int, 1), default=20, metavar="N",
        help="questions asked at each length, on a CPU a quarter of them at 64 times the length; default 20")
    add("--eval-windows", type=number(int, 2), default=256, metavar="N",
        help="held-out sequences that losses are measured on; default 256")
    add("--set", **many, default=[], metavar="FIELD=X",
        help="set fields of the student's HypeNetConfig, such as linear_rope=false")
    o = p.parse_args(argv)
    o.given = sorted({a.split("=")[0] for a in argv if a.startswith("--")})
    return o


def teacher_path(name):
    """The folder of a teacher of TEACHERS, shipped or to be made; any other name as it is."""
    shipped, made = (os.path.join(folder, f"{name}-teacher") for folder in (f"{HERE}/assets", "out"))
    return name if name not in TEACHERS else shipped if os.path.isdir(shipped) else made


def settle(o):
    """Fill in the recipe, o.path of the teacher and o.data; return the plans of the stages and the changes of
    --set. ValueError for what cannot go."""
    o.hybrid, asked, o.device = o.layers is not None, o.device, default_device(o.device)   # layers asked for?
    for key, value in RECIPES[o.recipe].items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    o.path = teacher_path(o.teacher)
    weight = sum(file.stat().st_size for file in Path(o.path).glob("*.safetensors"))
    size = (o.teacher.split("-")[0] if o.teacher in TEACHERS else
            [name for name in SIZES if weight >= SIZES[name]][-1] if os.path.isdir(o.path) else "real")
    real = size == "real"
    o.data = o.data or (["fineweb"] if real else None)
    o.fused = size != "tiny" and o.device.startswith("cuda") and not o.plain
    plans = {stage: replace(plan, tokens=plan.tokens * o.budget) for stage, plan in PLANS[size].items()}
    for item in o.plan:
        key, _, value = item.partition("=")
        stage, _, field = key.partition(".")
        if stage not in plans or field not in vars(plans[stage]):
            raise ValueError(f"--plan {item}: STAGE is one of {', '.join(plans)}; FIELD one of "
                             + ", ".join(vars(plans["align"])))
        try:
            kind = type(getattr(PLANS["tiny"][stage], field))
            plans[stage] = replace(plans[stage], **{field: kind(float(value))})
        except (ValueError, OverflowError):
            raise ValueError(f"--plan {item}: {value!r} is no number") from None
    changes, names = {}, [f.name for f in fields(HypeNetConfig)]
    known = [n for n in names[names.index("attn_pe"):] if n != "logit_base"]
    for key, _, value in (item.partition("=") for item in o.set):
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    try:
        base = o.logit_base in ("fit", "none") or 1 < float(o.logit_base) < math.inf
    except ValueError:
        base = False
    plans_fit = all(min(p.tokens, p.length, p.batch, p.lr, p.warmup) > 0 and 0 <= p.recall <= 1
                    and 0 <= p.varied <= 1 and p.weight_decay >= 0
                    and all(map(math.isfinite, vars(p).values())) for p in plans.values())
    scored, staged, stray = o.layers in SCORED, o.training == "staged", sorted(changes.keys() - known)

    def refuse(wrong, message):
        if wrong:
            raise ValueError(message)
    refuse(stray, f"--set {' '.join(stray)}: fields are {', '.join(known)}")
    refuse(not plans_fit,
           "--plan: tokens, length, batch, lr and warmup must be positive, recall and varied between 0 and "
           "1, weight_decay at least 0")
    refuse(any(p.varied and not p.recall for p in plans.values()),
           "--plan: varied is a share of the sequences of recall, which are 0")
    refuse(not base, f"--logit-base {o.logit_base}: give fit, none or a number above 1")
    refuse(o.fade and not (o.pe == "hype" and staged), "--fade goes with --pe hype, --training staged")
    refuse(o.groups and staged, "--groups goes with --training progressive")
    for flag, used, wants in (("--retention", o.decay in ("head", "channel"), "--decay head or channel"),
                              ("--max-ctx", o.pe == "chunk", "--pe chunk"),
                              ("--kl", o.alpha < 1, "--alpha below 1")):
        refuse(flag in o.given and not used, f"{flag} goes with {wants}")
    refuse(o.keep and not (scored or o.layers == "even"),
           f"--keep goes with --layers {', '.join(SCORED)} or even")
    made = o.teacher in TEACHERS and (o.pretrain or not weight)       # or will be, before all else
    todo = ["pretrain"] * made + ["align", "distil", "finetune"] * staged + ["group"] * (not staged)
    if o.pretrain:
        todo = ["pretrain"]
        refuse(o.teacher not in TEACHERS,
               f"--pretrain --teacher {o.teacher}: known sizes are {', '.join(TEACHERS)}")
        refuse(o.hybrid and scored,
               f"--pretrain with --layers {o.layers}: no teacher to score; use ends, even or letters")
        refuse((o.set or o.keep) and not o.hybrid, "--pretrain --set and --keep go with --layers: a hybrid")
        refuse(o.transfer == "off", "--transfer off goes with a teacher, not with --pretrain")
    else:
        refuse(not staged and scored,
               f"--training progressive with --layers {o.layers}: no stage 1 to score by; use ends or even")
        refuse(not staged and o.pe == "hype",
               "--training progressive with --pe hype: its attention layers do not train; use chunk or rope")
    if o.device == "cpu" and not asked and not o.dry_run and not o.resume:
        refuse(real, f"--teacher {o.teacher} is no folder of a small model, and wants a GPU; --teacher tiny "
               "runs on a CPU, --device cpu tries it all the same")
        if made or size == "small":
            hours = hours_on_a_cpu(weight / 2 or n_params(TEACHERS[o.teacher]), [plans[s] for s in todo])
            raise ValueError(f"--teacher {o.teacher} wants a GPU: about {hours:,.1f} hours on this CPU; "
                             "--teacher tiny takes minutes, --device cpu tries it all the same")
    plans = {stage: plans[stage] for stage in todo if o.pretrain or stage != "pretrain"}
    o.varied = next(plans[stage].varied for stage in ("distil", "group", "pretrain") if stage in plans)
    return plans, changes


def n_params(config):
    with torch.device("meta"):
        return HypeNet(config).n_params()


def hours_on_a_cpu(params, plans):
    """A guess: 8 operations a parameter and token, at half the rate of a large product."""
    (a, b), seconds = torch.randn(2, 1024, 1024), []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    rate = 2 * 1024 ** 3 / min(seconds)
    return 8 * params * sum(plan.total for plan in plans) / (rate / 2) / 3600


def make_teacher(o):
    """Pretrain a teacher that is not there yet (or go on with it) and keep it for later runs."""
    known = os.path.exists(os.path.join(o.path, "run.json"))
    if known and o.dry_run:
        print(f"--teacher {o.teacher} is half trained: --resume {o.path} goes on with it, as does this run")
        return
    argv = ["--resume", o.path] if known else ["--pretrain", "--teacher", o.teacher, "--out", o.path,
                                               "--seed", str(o.seed), *["--dry-run"] * o.dry_run]
    plan = [item for item in o.plan if item.startswith("pretrain.")]
    argv += ["--plain"] * (o.plain and not known)
    for flag, values in (("--data", o.data), ("--plan", plan)):
        argv += [flag, *values] if values and not known else []
    print(f"--teacher {o.teacher} is trained first, once, in {o.path}; its conversion follows\n", flush=True)
    run_main([*argv, "--device", o.device])
    print()


def new_folder(o):
    folder = o.out or os.path.join("out", f"{os.path.basename(os.path.normpath(o.teacher))}-{o.recipe}")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--out {folder} is a file; name a folder")
    if not os.path.isdir(folder) or not os.listdir(folder):
        return folder
    if o.out:
        raise ValueError(f"--out {folder} is not empty; go on with it by --resume {folder}, or name another")
    return next(f"{folder}-{i}" for i in range(2, 10 ** 6) if not os.path.exists(f"{folder}-{i}"))


def convert(run, teacher, corpus, plans, o):
    """Distil a teacher into a student by the options o; returns the student and its report."""
    torch.manual_seed(o.seed)                             # chunk embeddings and other new weights
    how = convert_progressive if "group" in plans else convert_staged
    student = how(run, teacher, corpus, plans, o).eval()
    base = o.logit_base
    if base == "fit":
        length = 16 * o.length if "group" in plans else max(o.length, 4 * plans["finetune"].length)
        length = min(length, student.config.limit())
        fits = run.once("fit", lambda: fit_logit_base(student, corpus, length, o.seed, o.varied))
        print(f"held-out loss + loss of an answer at {length:,} tokens by logit base: "
              + ", ".join(f"{a} {x:.4f}" for a, x in fits.items()) + "\n")
        base = least(fits)
    student.config.logit_base = None if base in ("none", None) else float(base)
    report = run.once("report", lambda: dict(
        recipe=o.recipe, teacher=o.teacher, tokens=run.tokens, device=o.device, text=corpus.facts,
        layers=student.config.layers, logit_base=student.config.logit_base,
        params=dict(teacher=teacher.n_params(), student=student.n_params()),
        **evaluate(teacher, student, corpus, o), seconds=run.seconds(), peak_gb=peak_gb(o.device)))
    student.save_pretrained(run.folder)
    o.tokenizer.save(run.folder)
    write_json(run.path("report.json"), report)
    return student, report


def pretrain(run, corpus, plans, o):
    """Train a teacher (or, with --layers, a hybrid) from random weights on text with things to recall;
    returns it."""
    config = replace(TEACHERS[o.teacher], max_len=plans["pretrain"].length)
    T = o.length = config.max_len
    if o.hybrid:
        config = student_config(config, choose_layers(o.layers, len(config.layers), keep=o.keep), o)
    torch.manual_seed(o.seed)
    model = HypeNet(config).to(o.device)
    train(run, "pretrain", plans["pretrain"], corpus, model, [list(model.parameters())],
          objective(model, None, o, alpha=1.0))
    model.eval()
    if o.hybrid and o.logit_base == "fit":
        length = min(16 * T, config.limit())
        config.logit_base = least(fit_logit_base(model, corpus, length, o.seed, o.varied))
    o.tokenizer.save(run.folder)
    model.save_pretrained(run.folder, torch.bfloat16)     # last: a folder that has it is whole
    loss = losses(model, corpus.held_out_batches(T, o.eval_windows)).mean().item()
    found = shares(model, corpus, (T, 16 * T, 64 * T)[:3 if o.hybrid else 1], o)
    write_json(run.path("report.json"), dict(
        teacher=o.teacher, tokens=run.tokens, device=o.device, text=corpus.facts, layers=config.layers,
        params=model.n_params(), val_loss=loss, **found, seconds=run.seconds()))
    said = [f"{ASKED[field][1]} in {int(n):,} tokens {percent(share)}" for field in found
            for n, share in found[field].items()]
    print(f"\n{model.n_params():,} parameters, held-out loss {loss:.4f} nats a token, "
          + ", ".join([*said, f"{run.seconds() / 60:.1f} minutes"]))
    print(f"python sample.py --model {run.folder}" if o.hybrid else f"python halo.py --teacher {run.folder}")
    return model


def check_length(stage, plan, limit, o):
    """ValueError if a stage's sequences are longer than its models know, or too short for a pass key."""
    if plan.length > limit:
        raise ValueError(f"--plan {stage}.length={plan.length}: the model knows {limit} positions"
                         + (f" (--max-ctx {o.max_ctx})" if o.pe == "chunk" else ""))
    if plan.recall:
        try:
            plant(o.tokenizer, np.zeros(plan.length, np.int64), np.random.default_rng(0))
        except ValueError as e:
            raise ValueError(f"--plan {stage}.length: {e}, or {stage}.recall=0") from None


def resumed(o, argv):
    """The options of a run that was stopped; only the device may be another, and --plain be added."""
    free = "--resume", "--device", "--plain"
    given = [a for a in argv if a.startswith("--") and a.split("=")[0] not in free]
    if given:
        raise ValueError(f"--resume takes its options from the run; leave out {' '.join(given)}")
    try:
        with open(os.path.join(o.resume, "run.json"), encoding="utf-8") as f:
            options = vars(get_args([])) | json.load(f)["options"]
        return argparse.Namespace(**{**options, "resume": o.resume, "device": o.device or options["device"],
                                     "plain": o.plain or options["plain"]})
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--resume {o.resume}: no run there (no run.json that can be read)") from None


def load_teacher(plans, o):
    """The teacher; sets o.tokenizer, its own, and o.length, at which (and multiples) all is measured: that of
    the stages that distil, for a RoPE teacher may know far more positions than are worth asking about."""
    o.tokenizer = Tokenizer.load(o.path)
    kind = torch.bfloat16 if o.device.startswith("cuda") else torch.float32
    teacher = HypeNet.from_pretrained(o.path, kind, o.device).requires_grad_(False)
    check_tokenizer(o.tokenizer, teacher.config)
    L, known = len(teacher.config.layers), teacher.config.limit()
    if "L" in teacher.config.layers:
        raise ValueError(f"--teacher {o.teacher} is a hybrid, {teacher.config.layers}: not a teacher")
    student = student_config(teacher.config, "L" * L, o).limit()
    if o.keep and o.keep >= L:
        raise ValueError(f"--keep {o.keep} leaves nothing to convert: the teacher has {L} layers")
    if o.layers not in SCORED and "L" not in choose_layers(o.layers, L, keep=o.keep):
        raise ValueError(f"--layers {o.layers} leaves nothing to convert")
    for stage, plan in plans.items():                     # what is wrong fails now, not after stage 1
        check_length(stage, plan, dict(align=known, finetune=student).get(stage, min(known, student)), o)
    o.length = min(teacher.config.max_len, plans["group" if "group" in plans else "distil"].length)
    plant(o.tokenizer, np.zeros(o.length, np.int64), np.random.default_rng(0))
    return teacher


def run_main(argv):
    o = get_args(argv)
    if o.resume:
        o = resumed(o, argv)
    options = dict(vars(o))
    plans, o.changes = settle(o)
    if not o.pretrain and o.teacher in TEACHERS and not list(Path(o.path).glob("*.safetensors")):
        make_teacher(o)
        if o.dry_run:
            return
    fast.fuse((globals(), "token_losses"), backend="inductor" if o.fused else None)
    folder, found = o.resume or new_folder(o), {}
    if o.pretrain:
        o.tokenizer, config = Tokenizer.bytes(), TEACHERS[o.teacher]
        longest = plans["pretrain"].length * (64 if o.hybrid else 1) + 1
        check_length("pretrain", plans["pretrain"], math.inf, o)
    else:
        teacher = load_teacher(plans, o)
        config, longest = teacher.config, 64 * o.length
        if o.logit_base == "fit" and "finetune" in plans:  # reads four times the length of stage 3
            longest = max(longest, 4 * plans["finetune"].length + 1)
        if not o.resume:
            check_disk(folder, teacher, plans, o)
    corpus = Corpus(o.tokenizer, o.data, o.seed, max(plan.length for plan in plans.values()))
    corpus.windows(np.random.default_rng(0), 1, longest)  # or an error, now
    if o.device.startswith("cuda") and not o.resume and not o.pretrain:
        found = Probe(teacher, corpus, plans, o).found
        torch.cuda.reset_peak_memory_stats(o.device)
    print_plan(folder, config, corpus, plans, o, found)
    if o.dry_run:
        return
    run = Run(folder, options)
    try:
        if run.once("text", lambda: corpus.facts)["sha256"] != corpus.facts["sha256"]:
            raise ValueError(f"--resume {o.resume}: the text has changed since it began; start a new run")
        now = {stage: vars(plan) for stage, plan in plans.items()}
        if run.once("plans", lambda: now) != now:
            raise ValueError(f"--resume {o.resume}: its stages are not this version's; start a new run")
        if o.pretrain:
            pretrain(run, corpus, plans, o)
        else:
            print_report(convert(run, teacher, corpus, plans, o)[1])
            print(f"files in {run.folder}: model.safetensors, config.json, tokenizer.json, report.json, "
                  f"log.jsonl\n\npython sample.py --model {run.folder} --ctx 65536")
    finally:
        run.close()


def main(argv=None):
    def run(argv):
        try:
            run_main(argv)
        except torch.OutOfMemoryError:                    # training has its own way out: see fitted
            raise ValueError("the device ran out of memory: take a smaller --teacher or another --device"
                             ) from None
    command_line("halo.py", run, argv)


if __name__ == "__main__":
    main()
