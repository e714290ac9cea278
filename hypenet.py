"""HypeNet: a language model that mixes a few softmax-attention layers with many linear-attention layers.

A linear-attention layer carries a state of fixed size from token to token, so a context of hundreds of
thousands of tokens costs it no memory; the few attention layers that remain keep exact recall. The file has
both kinds of layer, the model, its state, generation, the tokenizer, and loading: our own files, GPT-2's,
Qwen3's, Llama 3's, and the authors'.

    paper (default)                          article (--recipe article)

    logits                                   logits
      |  norm, head                            |  norm, head
      |                                        |
     (+)<-- MLP <-- norm                      (+)<-- MLP <-- norm
      |                                        |
     (+)<-- W_o (gate * o)      <- norm       (+)<-- W_o o                <- norm
      |       o = softmax(s_t q k^T) v         |       o = softmax(q k^T) v, window of 2,048
      |       no position at all (NoPE)        |       q, k = RoPE(position mod chunk) + e[position div chunk]
      |     "A": floor(L/4) layers, by score   |     "A": the first and the last quarter
     (+)<-- MLP <-- norm                      (+)<-- MLP <-- norm
      |                                        |
     (+)<-- W_o (gate * norm(o)) <- norm      (+)<-- W_o o                <- norm
      |       o_t = q_t S_t                    |       o_t = q_t S_t
      |       S_t = gamma S_{t-1} + k_t^T v_t  |       S_t = diag(f_t) S_{t-1} + k_t^T v_t
      |       q, k = RoPE(QK-norm(q, k))       |       keys of half width, no RoPE, no QK-norm
      |       gamma: one constant a head       |       f_t = sigmoid(x W_f + b): a gate a key channel
      |     "L": all other layers              |     "L": the middle half
    tokens                                   tokens

Read the drawing from the bottom up; one layer of each kind is shown. HyPE is RoPE in linear layers only: the
attention layers, without positions, meet no distance they have not been trained on. A softmax over t tokens
flattens as t grows, which s_t = log(t + a) / log(a) on the queries makes up for. A teacher is the same class:
a HypeNet whose layers are all "A", with RoPE (or learned positions).

In shapes: B rows, T tokens, C width, H heads, D head size, K key width, V value width (= D), idx token ids.

The article's names, and ours:
    get_hybrid_config              halo.choose_layers("ends", ...)
    HybridLayer                    Block, whose mixer is Attention or LinearAttention
    LinearAttentionRNN             LinearAttention, forget_gate = LinearAttention.forget
    HyPEPositionEncoding           locate (position mod chunk), Attention.chunk_embd (position div chunk)
    initialize_rnn_from_attention  halo.linear_twin
    halo_distillation              halo.convert_progressive

References: HypeNet and HALO, arXiv 2601.22156 ("the paper": section 5, appendix A). Lightning Attention,
2405.17381. GLA, 2312.06635. RoPE, 2104.09864. Logit scaling, SWAN-GPT, 2504.08719. The authors' code:
github.com/thunlp/hybrid-linear-attention.
Not here: training on several GPUs, short convolutions, delta-rule mixers.
"""
import argparse
import copy
import errno
import json
import math
import os
import re
import sys
import unicodedata
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernel
from kernel import chunked_scan

# ---- configuration -----------------------------------------------------------------------------------------


@dataclass
class HypeNetConfig:
    """Sizes and choices of one model, teacher or student; a ValueError names the values that clash."""
    layers: str = "AAAA"            # one letter a layer: "A" attention, "L" linear attention
    vocab_size: int = 256           # rows of the embedding, at least the tokenizer's ids
    n_embd: int = 128               # C, the width
    n_head: int = 4                 # H, query heads
    n_kv_head: int = 4              # k and v heads of attention layers; n_head / n_kv_head queries share one
    head_dim: int = 32              # D, free of n_embd / n_head
    n_hidden: int = 384             # width of the MLP's hidden layer
    max_len: int = 256              # tokens the teacher was trained on; rows of wpe if positions are learned
    norm: str = "rms"               # "rms" (RMSNorm) or "layer" (LayerNorm)
    norm_eps: float = 1e-6
    mlp: str = "swiglu"             # "swiglu" or "gelu" (tanh form)
    bias: bool = False              # biases in every Linear but the forget gate, which always has one
    position: str = "rope"          # what the teacher knows positions by: "rope" or "learned" (wpe)
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's: factor, low_freq_factor, high_freq_factor, original_max_...
    tied: bool = True               # the head is the embedding
    qk_norm: bool = True            # RMSNorm of q and k, per head, in attention layers
    # attention layers of a student
    attn_pe: float = 1.0            # scales RoPE's angles or wpe: 1 as in the teacher, 0 none (HyPE)
    chunk: int | None = None        # chunk HyPE: positions modulo this many tokens ...
    n_chunks: int = 0               # ... plus a learned embedding of each of this many chunks
    attn_gate: bool = False         # sigmoid output gate
    logit_base: float | None = None  # a of s_t = log(t + a) / log(a), paper eq. 11; None: s_t = 1
    window: int | None = None       # attend to this many tokens, the query's own included; None: all
    # linear layers
    decay: str = "constant"         # "constant" (paper eq. 19), "none", or a gate per "head" / "channel"
    key_dim: int = 0                # K, width of a key; 0: head_dim
    linear_kv_head: int = 0         # heads of k and v; 0: n_head, as cloned by paper eq. 13
    linear_rope: bool = True        # RoPE on q and k
    linear_qk_norm: bool = True     # RMSNorm of q and k, per head
    linear_norm: bool = True        # one RMSNorm over all H * D channels of o
    linear_gate: bool = True        # sigmoid output gate

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), f.type | int if f.type in (float, float | None) else f.type
            if not isinstance(value, kind) or isinstance(value, bool) and f.type is not bool:
                raise ValueError(f"{f.name} is {value!r}; its type is {getattr(f.type, '__name__', f.type)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name} is {value}; it must be finite")
        self.key_dim = self.key_dim or self.head_dim
        self.linear_kv_head = self.linear_kv_head or self.n_head
        for name, allowed in dict(norm=("rms", "layer"), mlp=("swiglu", "gelu"), position=("rope", "learned"),
                                  decay=("constant", "none", "head", "channel")).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if not self.layers or set(self.layers) - set("AL"):
            raise ValueError(f'layers is {self.layers!r}; one letter a layer, "A" attention, "L" linear')
        for name in ("vocab_size n_embd n_head n_kv_head head_dim n_hidden max_len key_dim linear_kv_head "
                     "window chunk").split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_kv_head", "linear_kv_head"):
            if self.n_head % getattr(self, name):
                raise ValueError(f"n_head {self.n_head} is no multiple of {name} {getattr(self, name)}")
        for name, used in dict(head_dim=self.position == "rope", key_dim=self.linear_rope).items():
            if used and getattr(self, name) % 2:
                raise ValueError(f"{name} is {getattr(self, name)}; RoPE pairs channels, so it must be even")
        if self.logit_base is not None and self.logit_base <= 1:
            raise ValueError(f"logit_base is {self.logit_base}; s_t = log(t + a) / log(a) needs a > 1")
        if not 0 <= self.attn_pe <= 1 or self.rope_theta <= 0 or self.norm_eps < 0:
            raise ValueError(f"attn_pe {self.attn_pe} (0 to 1), rope_theta {self.rope_theta} (positive), "
                             f"norm_eps {self.norm_eps} (not negative)")
        if (self.chunk is None) != (self.n_chunks == 0) or self.n_chunks < 0:
            raise ValueError(f"chunk {self.chunk} and n_chunks {self.n_chunks}: give both or neither")
        if self.position == "learned" and self.chunk and self.chunk > self.max_len:
            raise ValueError(f"chunk {self.chunk}, n_chunks {self.n_chunks}, position learned: "
                             f"a chunk exceeds the {self.max_len} positions of max_len")
        missing = [] if self.rope_scaling is None else [
            k for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            if k not in self.rope_scaling]
        if missing:
            raise ValueError(f"rope_scaling lacks {', '.join(missing)}; only Llama 3's kind is known")

    def limit(self):
        """The most tokens a sequence may have: only learned embeddings of positions set one."""
        if self.chunk:
            return self.chunk * self.n_chunks
        return self.max_len if self.position == "learned" and self.attn_pe else math.inf


# The three teacher families, as data; the sizes are a model's own.
FAMILIES = {
    "gpt2": dict(norm="layer", norm_eps=1e-5, mlp="gelu", bias=True, qk_norm=False, position="learned",
                 tied=True),
    "qwen3": dict(norm="rms", mlp="swiglu", bias=False, qk_norm=True, position="rope"),
    "llama": dict(norm="rms", mlp="swiglu", bias=False, qk_norm=False, position="rope"),
}

# ---- positions ---------------------------------------------------------------------------------------------


def rope_frequencies(config, dim, device=None):
    """Angle a token of each pair of channels, (dim / 2,) fp32: theta^(-2i / dim) (RoPE section 3.2), the long
    wavelengths slowed where rope_scaling is Llama 3's. No weight, no buffer, so that no cast touches it."""
    s = config.rope_scaling
    scaling = s and (s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"],
                     s["factor"])
    return frequencies(config.rope_theta, dim, scaling, device)


@lru_cache(None)                     # made once, at an address that stays, also under inference_mode
@torch.inference_mode(False)
def frequencies(theta, dim, scaling, device):
    freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if scaling:
        pretrained, low, high, factor = scaling
        turns = pretrained * freq / (2 * math.pi)                             # full turns when pretrained
        keep = ((turns - low) / (high - low)).clamp(0, 1)                     # 1: as it was, 0: fully slowed
        freq = keep * freq + (1 - keep) * freq / factor
    return freq


@lru_cache(None)
@torch.inference_mode(False)
def constant_log_decay(H, device):
    """Log of gamma_h = exp(-2^(-8h/H)), h = 1..H (paper eq. 19), whether or not H is a power of two."""
    return -torch.exp2(-8.0 * torch.arange(1, H + 1, device=device) / H)


def rotate(x, cos_sin):
    """RoPE on x (B,T,H,D): channel i and i + D/2 are one pair (rotate_half)."""
    cos, sin = cos_sin                                                        # (B or 1, T, 1, D/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Where(NamedTuple):
    """Where the tokens of a call stand: made once in locate, used by every layer."""
    pos: torch.Tensor                # (B or 1, T) absolute positions
    start: int                       # tokens the longest row already holds, on the host; 0 without a state
    attn_rope: tuple | None          # cos and sin for attention layers, None: no rotation
    linear_rope: tuple | None        # the same for linear layers
    s_t: torch.Tensor | None         # (B or 1, T), scales queries of attention layers (paper eq. 11)


def locate(config, pos, start=0):
    """The Where of tokens at positions pos (B or 1, T); start: see Where."""
    def cos_sin(pos, dim, scale=1.0):
        angle = scale * pos[..., None, None] * rope_frequencies(config, dim, pos.device)  # (B or 1,T,1,dim/2)
        return angle.cos(), angle.sin()
    c, attn_rope, linear_rope = config, None, None
    if c.position == "rope" and c.attn_pe:
        attn_rope = cos_sin(pos % c.chunk if c.chunk else pos, c.head_dim, c.attn_pe)
    if c.linear_rope:
        linear_rope = cos_sin(pos, c.key_dim)
    s_t = torch.log(pos + c.logit_base) / math.log(c.logit_base) if c.logit_base else None
    return Where(pos, start, attn_rope, linear_rope, s_t)


# ---- small parts -------------------------------------------------------------------------------------------


class fusible:
    """A function of elementwise steps and sums over channels, the work between two matrix products. It runs
    as written, step by step, until fuse() makes a kernel of it."""
    known = []

    def __init__(self, plain):
        self.plain = self.run = plain
        self.known.append(self)

    def __call__(self, *args):
        return self.run(*args)


def fuse(backend="inductor"):
    """Have torch.compile make one kernel (and one for gradients) of each fusible function, for all models of
    this process; backend None: as written again. Compiling takes up to a minute in all, in the first calls:
    worth it for training on a GPU, or for reading millions of tokens. What cannot be compiled runs as
    written, with a warning of torch."""
    if backend:
        warnings.filterwarnings("ignore", message="\nOnline softmax is disabled")
        torch._dynamo.config.suppress_errors = True
        name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, name, 64)          # shapes, dtypes, with and without gradients
    for f in fusible.known:
        f.run = torch.compile(f.plain, backend=backend) if backend else f.plain


def product_dtype(x):
    """What a Linear would multiply x in: norms and RoPE give that right away."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else x.dtype


@fusible
def normed(x, weight, bias, eps, dtype):
    """RMSNorm of x, or with a bias LayerNorm, over the last dimension."""
    weight, size = weight.to(x.dtype), x.shape[-1:]            # else autocast leaves torch's fused kernel
    if bias is None:
        return F.rms_norm(x, size, weight, eps).to(dtype)
    return F.layer_norm(x, size, weight, bias.to(x.dtype), eps).to(dtype)


@fusible
def add_normed(x, y, weight, bias, eps, dtype):
    """x + y, and its norm."""
    x = x + y
    return x, normed.plain(x, weight, bias, eps, dtype)


@fusible
def make_heads(x, gain, eps, cos_sin, embd, s_t, dtype):
    """q or k, (B,T,H,D), made ready for its product, each step where its argument is not None: RMSNorm per
    head, RoPE, the sum with an embedding (B or 1,T,H,D), the product with s_t (B or 1,T)."""
    if gain is not None:
        x = normed.plain(x, gain, None, eps, x.dtype)
    if cos_sin is not None:
        x = rotate(x, cos_sin)
    if embd is not None:
        x = x + embd
    if s_t is not None:
        x = x * s_t[..., None, None]
    return x.to(dtype)


@fusible
def gated(o, z, gain, eps):
    """norm(o) * sigmoid(z), without what is None."""
    if gain is not None:
        o = normed.plain(o, gain, None, eps, o.dtype)
    return o if z is None else o * torch.sigmoid(z)


@fusible
def merged(o, lse, o_past, lse_past):
    """Attention to two parts of a context as one: o (B,H,T,D), each part with its weight in the softmax over
    both, and lse (B,H,T)."""
    w = torch.sigmoid(lse_past - lse).unsqueeze(-1)
    return (o * (1 - w) + o_past * w).to(o.dtype), torch.logaddexp(lse, lse_past)


@fusible
def activated(x, swiglu):
    """silu(gate) * up of x = [gate, up], or GPT-2's GELU."""
    if swiglu:
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    return F.gelu(x, approximate="tanh")


class RMSNorm(nn.RMSNorm):
    bias = None

    def forward(self, x):
        return normed(x, self.weight, None, self.eps, product_dtype(x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return normed(x, self.weight, self.bias, self.eps, product_dtype(x))


def make_norm(config):
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.n_embd, eps=config.norm_eps)


class MLP(nn.Module):
    """SwiGLU with gate and up in one Linear, or GPT-2's GELU."""

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        self.up = nn.Linear(config.n_embd, config.n_hidden * (2 if self.swiglu else 1), bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down(activated(self.up(x), self.swiglu))


def attend(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D)) v for q (B,T,H,D) and k, v (B,S,H_kv,D) -> (B,T,H,D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def attend_lse(q, k, v, causal=False):
    """Attention that also returns the log of its denominator, by which two parts of a context are merged:
    q (B,H,T,D), k, v (B,H_kv,S,D) -> (B,H,T,D), (B,H,T). On Hopper cuDNN's is nearly twice as fast as torch's
    flash attention; what it declines goes to the others."""
    (B, H, T, D), G, aten = q.shape, k.size(1), torch.ops.aten
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and D in range(8, 129, 8) and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0):
        try:
            o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
            return o, lse.view(B, H, T)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:                                            # no cuDNN, or too old a one
            pass
    if causal:
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    else:                                                               # a group's queries: one matrix's rows
        q = q.reshape(B, G, -1, D)
    if q.device.type == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    elif q.is_cuda and half and D in range(8, 257, 8):
        o, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    elif q.is_cuda and D % 8 == 0:                                      # pads rows of lse to a multiple of 32
        o, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
        lse = lse[..., :q.size(2)]
    else:
        scores = (q @ k.mT).float() * D ** -0.5
        if causal:
            scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        o, lse = scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)
    return o.reshape(B, H, T, D), lse.reshape(B, H, T)


PAST = 65536                         # tokens of the past in one call of attention


def head_gains(mixer):
    """Gains of the norms of a mixer's q and k; None, None without QK-norm."""
    return (mixer.q_norm.weight, mixer.k_norm.weight) if hasattr(mixer, "q_norm") else (None, None)


# ---- attention layer (paper eq. 17) ------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention with grouped KV heads. A teacher's: RoPE or nothing. A student's: NoPE with scaled
    queries, or chunk HyPE; an output gate, a window. Eq. 17 also norms o; the authors' code does not."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sizes = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim,
                      c.n_head * c.head_dim * c.attn_gate]
        self.qkvz = nn.Linear(c.n_embd, sum(self.sizes), bias=c.bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps)
        if c.chunk and c.position == "rope":
            self.chunk_embd = nn.Embedding(c.n_chunks, c.n_head * c.head_dim)

    def forward(self, x, where, cache=None):
        """x (B,T,C) -> (B,T,C). With a cache (see State) the tokens follow those it holds."""
        return self.out(self.mix(x, where, cache))

    def mix(self, x, where, cache=None):
        """All but the output projection: x (B,T,C) -> gate * o (B,T,H*D)."""
        c, (B, T, _) = self.config, x.shape
        q, k, v, z = self.qkvz(x).split(self.sizes, dim=-1)
        q, k, v = (t.view(B, T, -1, c.head_dim) for t in (q, k, v))
        gains = head_gains(self)
        e = e_k = None
        if hasattr(self, "chunk_embd"):
            e = self.chunk_embd(where.pos // c.chunk).unflatten(-1, (c.n_head, c.head_dim))
            e_k = e[:, :, ::c.n_head // c.n_kv_head]                # grouped k: the group's first head
        q = make_heads(q, gains[0], c.norm_eps, where.attn_rope, e, where.s_t, v.dtype)
        k = make_heads(k, gains[1], c.norm_eps, where.attn_rope, e_k, None, v.dtype)
        if cache is None:
            o = self.whole(q, k, v)
        elif T == 1:
            o = self.decode(q, k, v, where, cache)
        else:
            o = self.segment(q, k, v, where, cache)
        return gated(o.reshape(B, T, -1), z if c.attn_gate else None, None, None)   # (B,T,H*D)

    def whole(self, q, k, v):
        """Every token of a sequence at once, nothing before it."""
        T, W = q.size(1), self.config.window
        if W is None or T <= W:
            return attend(q, k, v, causal=True)
        return attend(q, k, v, mask=torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - W))

    def segment(self, q, k, v, where, cache):
        """T tokens that follow `start` others, all rows alike. The segment is causal, the past needs no mask:
        calls of their own, merged by the weight of each part in the softmax's denominator. The past comes in
        parts, for cuDNN plans anew (40 ms) at every length it meets. A window is one masked call on what the
        ring holds and the segment."""
        T, keys, values, size, start = q.size(1), cache["k"], cache["v"], cache["k"].size(1), where.start
        if self.config.window is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o, lse = attend_lse(q, k, v, causal=True)
            for first in range(0, start, PAST):
                part = slice(first, min(start, first + PAST))
                past = (t[:, part].transpose(1, 2).to(q.dtype) for t in (keys, values))
                o, lse = merged(o, lse, *attend_lse(q, *past))
            keys[:, start:start + T], values[:, start:start + T] = k.transpose(1, 2), v.transpose(1, 2)
            return o.transpose(1, 2)
        W = self.config.window
        pos = torch.arange(max(0, start - W + 1), start + T, device=q.device)   # of what is attended to
        distance = pos[-T:, None] - pos
        past = (t[:, pos[:-T] % size].to(q.dtype) for t in (keys, values))
        near = (distance >= 0) & (distance < W)
        o = attend(q, *(torch.cat(pair, dim=1) for pair in zip(past, (k, v))), near)
        slots = torch.arange(start, start + T, device=q.device)[-size:] % size
        keys[:, slots], values[:, slots] = k[:, -size:].to(keys.dtype), v[:, -size:].to(values.dtype)
        return o

    def decode(self, q, k, v, where, cache):
        """One token a row, each row at its own position: it attends to its own keys and no others."""
        keys, values, pos = cache["k"], cache["v"], where.pos[:, 0]                 # pos (B,)
        row, slot = torch.arange(len(pos), device=q.device), pos % keys.size(1)
        keys[row, slot], values[row, slot] = k[:, 0].to(keys.dtype), v[:, 0].to(values.dtype)
        used = min(where.start + 1, keys.size(1))                   # where.start: the longest row
        mine = None                                                 # one row: all of them are its own
        if len(pos) > 1:                                            # a full ring is all mine
            mine = (torch.arange(used, device=q.device) <= pos[:, None])[:, None, None]
        rows = q.view(len(q), k.size(2), -1, q.size(-1)).transpose(1, 2)            # a group's queries: rows
        o = attend(rows, keys[:, :used].to(q.dtype), values[:, :used].to(q.dtype), mine)
        return o.transpose(1, 2).reshape(q.shape)

    def step(self, q, k, v, where, cache, log_decay=None):
        """decode of what qkvz gives, (B,H*D) and (B,G*D): norms, positions and s_t are the kernel's part."""
        c = self.config
        q, k, v = (t.view(len(t), 1, -1, c.head_dim) for t in (q, k, v))
        chunks = (self.chunk_embd.weight, c.chunk) if hasattr(self, "chunk_embd") else None
        return kernel.attend_cache(q, k, v, cache["k"], cache["v"], where.pos, where.s_t, head_gains(self),
                                   c.norm_eps, where.attn_rope, chunks).flatten(1)


# ---- linear-attention layer (paper eq. 18) -----------------------------------------------------------------


class LinearAttention(nn.Module):
    """y = (norm(o) * sigmoid(x W_z)) W_o with o from the recurrence of kernel.chunked_scan."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sizes = [c.n_head * c.key_dim, c.linear_kv_head * c.key_dim, c.linear_kv_head * c.head_dim,
                      c.n_head * c.head_dim * c.linear_gate]
        self.qkvz = nn.Linear(c.n_embd, sum(self.sizes), bias=c.bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias)
        if c.linear_qk_norm:
            self.q_norm = RMSNorm(c.key_dim, eps=c.norm_eps)
            self.k_norm = RMSNorm(c.key_dim, eps=c.norm_eps)
        if c.linear_norm:
            self.norm = RMSNorm(c.n_head * c.head_dim, eps=c.norm_eps)
        if c.decay in ("head", "channel"):
            self.forget = nn.Linear(c.n_embd, c.n_head * (c.key_dim if c.decay == "channel" else 1))

    def log_decay(self, x):
        """Log of the decay: (H,) where it is constant, (B,T,H) or (B,T,H,K) where a gate makes it."""
        H = self.config.n_head
        if self.config.decay == "none":
            return torch.zeros(H, device=x.device)
        if self.config.decay == "constant":
            return constant_log_decay(H, x.device)
        g = F.logsigmoid(self.forget(x).float())
        return g if self.config.decay == "head" else g.unflatten(-1, (H, -1))

    def forward(self, x, where, cache=None):
        """x (B,T,C) -> (B,T,C). With a cache the tokens follow those its state has read."""
        return self.out(self.mix(x, where, cache))

    def mix(self, x, where, cache=None):
        """All but the output projection: x (B,T,C) -> gate * norm(o) (B,T,H*D)."""
        c, (B, T, _) = self.config, x.shape
        q, k, v, z = self.qkvz(x).split(self.sizes, dim=-1)
        q, k = q.view(B, T, -1, c.key_dim), k.view(B, T, -1, c.key_dim)
        v = v.view(B, T, -1, c.head_dim)
        q, k = (make_heads(t, gain, c.norm_eps, where.linear_rope, None, None, v.dtype)
                for t, gain in zip((q, k), head_gains(self)))
        if c.linear_kv_head < c.n_head:
            k, v = (t.repeat_interleave(c.n_head // c.linear_kv_head, dim=2) for t in (k, v))
        S = None if cache is None else cache["S"]
        if cache is not None and T == 1:
            o = kernel.decode(q, k, v, self.log_decay(x), S, c.key_dim ** -0.5)
        else:
            o, S_new = chunked_scan(q, k, v, self.log_decay(x), S, scale=c.key_dim ** -0.5)
            if cache is not None:
                S.copy_(S_new)                                     # in place: the address never changes
        return gated(o.reshape(B, T, -1), z if c.linear_gate else None,               # (B,T,H*D)
                     self.norm.weight if c.linear_norm else None, c.norm_eps)

    def step(self, q, k, v, where, cache, log_decay=None):
        """One token a row, of what qkvz gives: (B,H*K), (B,G*K), (B,G*D) -> (B,H*D). log_decay: of a gate,
        (B,H) or (B,H*K)."""
        c = self.config
        g = self.log_decay(q) if log_decay is None else log_decay[:, None]
        if c.decay == "channel":
            g = g.unflatten(-1, (c.n_head, c.key_dim))
        q, k, v = (t.view(len(t), 1, -1, n) for t, n in ((q, c.key_dim), (k, c.key_dim), (v, c.head_dim)))
        o = kernel.decode(q, k, v, g, cache["S"], c.key_dim ** -0.5, head_gains(self), c.norm_eps,
                          where.linear_rope, "triton")
        return o.flatten(1)


# ---- the model ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)) (paper eq. 15)."""

    def __init__(self, config, kind):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.mixer = Attention(config) if kind == "A" else LinearAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, where, cache=None):
        n, y = self.norm2, self.mixer(self.norm1(x), where, cache)
        x, h = add_normed(x, y, n.weight, n.bias, n.eps, product_dtype(x))
        return x + self.mlp(h)

    def step(self, x, where, cache):
        """The same for one token a row, x (B,C), on a GPU. For a few rows in five launches (attention: seven;
        a forget gate: one more): each Linear comes with the norm and gate before it, the
        activation and sum after it."""
        m, g = self.mixer, None
        q, k, v, z = linear(m.qkvz, x, self.norm1).split(m.sizes, dim=-1)
        if hasattr(m, "forget"):
            g = linear(m.forget, x, self.norm1, act="logsigmoid")
        o = m.step(q, k, v, where, cache, g)
        x = linear(m.out, o, getattr(m, "norm", None), gate=z if z.size(-1) else None, residual=x)
        h = linear(self.mlp.up, x, self.norm2, act="swiglu" if self.mlp.swiglu else "gelu")
        return linear(self.mlp.down, h, residual=x)


FEW = 4                              # rows up to which the kernel of a Linear beats the library's products


def linear(layer, x, norm=None, gate=None, act=None, residual=None):
    """kernel.linear of a Linear and the norm before it. Many rows are multiplied by the library."""
    if len(x) <= FEW:
        weights, eps = ((None, None), 0.0) if norm is None else ((norm.weight, norm.bias), norm.eps)
        return kernel.linear(x, layer.weight, layer.bias, weights, eps, gate, act, residual)
    x = x if norm is None else norm(x)
    y = layer(x if gate is None else gated(x, gate, None, None))
    if act is not None:
        y = F.logsigmoid(y.float()) if act == "logsigmoid" else activated(y, act == "swiglu")
    return y if residual is None else residual + y


class State:
    """All that a model remembers of the tokens it has read. Allocated once, updated in place. pos (B,) int64:
    tokens each row holds. seen: the most any row holds, on the host. layers: for an attention layer k and v
    (B, size, H_kv, D), size = max_tokens, or window as a ring; for a linear one S (B,H,K,V) fp32."""

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        def zeros(*shape, dtype=dtype):
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)
        c, size = config, min(max_tokens, config.window or max_tokens)
        self.max_tokens, self.seen, self.pos = max_tokens, 0, zeros(dtype=torch.int64)
        self.layers = [dict(k=zeros(size, c.n_kv_head, c.head_dim), v=zeros(size, c.n_kv_head, c.head_dim))
                       if kind == "A" else dict(S=zeros(c.n_head, c.key_dim, c.head_dim, dtype=torch.float32))
                       for kind in c.layers]

    def row(self, b):
        """A view of row b: what is read into it lands in this state, whose `seen` is left to the caller."""
        view = copy.copy(self)
        view.seen, view.pos = int(self.pos[b]), self.pos[b:b + 1]
        view.layers = [{name: t[b:b + 1] for name, t in layer.items()} for layer in self.layers]
        return view

    def nbytes(self):
        """Bytes of S and of K/V, a pair."""
        size = {"S": 0, "k": 0, "v": 0}
        for layer in self.layers:
            for name, t in layer.items():
                size[name] += t.numel() * t.element_size()
        return size["S"], size["k"] + size["v"]


class HypeNet(nn.Module):
    """The whole model. HypeNet(config) has random weights; from_pretrained loads them."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config                     # shared by all layers: a change of attn_pe reaches each
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.position == "learned":
            self.wpe = nn.Embedding(c.max_len, c.n_embd)
            if c.chunk:                              # no rotation to add it to, so it joins wpe at the input
                self.chunk_embd = nn.Embedding(c.n_chunks, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, kind) for kind in c.layers)
        self.norm = make_norm(c)
        if not c.tied:
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():      # GPT-2's: 0.02, less for what is added to x
            if p.dim() == 2:
                residual = name.endswith(("mixer.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * len(c.layers)) if residual else 1))
            elif name.endswith("forget.bias"):       # keep 0.70 of the state
                nn.init.constant_(p, math.log(0.7 / 0.3))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def embed(self, idx, where):
        """Token embeddings, with the learned positions of a GPT-2 teacher: idx (B,T) -> x (B,T,C)."""
        c, x = self.config, self.wte(idx)
        if c.position == "learned" and c.chunk:
            x = x + self.wpe(where.pos % c.chunk) + self.chunk_embd(where.pos // c.chunk)
        elif c.position == "learned" and c.attn_pe:
            x = x + c.attn_pe * self.wpe(where.pos)
        return x

    def can_step(self, idx):
        """Whether Block.step runs here, and for blocks as they are (halo.swap_scores lends them others)."""
        return (kernel.has_kernels(idx, self.config.head_dim, self.config.key_dim)
                and not any("forward" in vars(block) for block in self.blocks))

    def check_room(self, state, n):
        if state.seen + n > state.max_tokens:
            raise ValueError(f"{state.seen + n:,} tokens do not fit the {state.max_tokens:,} of init_state")

    def check_length(self, n):
        limit = self.config.limit()
        if n > limit:
            what = f"chunks of {self.config.chunk}" if self.config.chunk else "learned positions"
            raise ValueError(f"{n:,} tokens are more than the {limit:,} that this model's {what} reach")

    def hidden(self, idx, state=None, offset=None):
        """idx (B,T) -> x (B,T,C), after the final norm. The first token is at position 0, or at offset (B,),
        for training; with a state, which no gradient flows through, after those it holds: T = 1, each row at
        its own position, or T > 1, all rows at one. ValueError past the state's room or the last position."""
        c, T, start = self.config, idx.size(1), 0
        pos = torch.arange(T, device=idx.device)[None] if T > 1 or state is None else 0            # (1,T)
        if state is not None:
            start, pos = state.seen, state.pos[:, None] + pos                      # (B,T)
            self.check_room(state, T)
            if T > 1 and (state.pos != start).any():
                raise ValueError("rows hold different numbers of tokens; read each through state.row(b)")
        elif offset is not None:
            pos = pos + offset[:, None]
        self.check_length(start + T)
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            where = locate(c, pos, start)
            x = self.embed(idx, where)
            if state is not None and T == 1 and self.can_step(idx):
                x = x[:, 0]
                for block, cache in zip(self.blocks, state.layers):
                    x = block.step(x, where, cache)
                x = x[:, None]
            else:
                for i, block in enumerate(self.blocks):
                    x = block(x, where, state.layers[i] if state is not None else None)
            if state is not None:
                state.pos += T
                state.seen = start + T
            return self.norm(x)

    def head_weight(self):
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def head(self, x):
        """x (...,C) -> logits (...,vocab_size)."""
        return F.linear(x, self.head_weight())

    def forward(self, idx, targets=None, state=None, all_logits=False, offset=None):
        """idx (B,T) -> logits (B,T,vocab_size), loss. With a state only the last position's (B,1,vocab_size),
        unless all_logits or targets. loss: mean cross-entropy in nats, None without targets (B,T)."""
        x = self.hidden(idx, state, offset)
        if state is not None and not all_logits and targets is None:
            x = x[:, -1:]
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss

    # ---- generation ----

    def init_state(self, batch_size, max_tokens):
        """An empty State for rows of at most max_tokens, of the model's device and dtype."""
        w = self.wte.weight
        return State(self.config, batch_size, max_tokens, w.device, w.dtype)

    @torch.no_grad()
    def prefill(self, prompt, state, segment=None, progress=None):
        """Read a prompt (a sequence of ids) into a state of one row, `segment` tokens at a time, to bound
        memory for activations (default: 16,384 on a GPU, else 1,024); progress(n) is called after each.
        Returns logits (1,1,vocab_size)."""
        idx = torch.as_tensor(prompt, dtype=torch.int64).to(self.wte.weight.device)[None]
        for part in idx.split(segment or (16384 if idx.is_cuda else 1024), dim=1):
            x = self.hidden(part, state)
            if progress is not None:
                progress(part.size(1))
        return self.head(x[:, -1:])

    def decoder(self, state, logits=None, pick=None, rng=None, graph=None):
        """A Decoder that goes on from a state. logits (B,vocab_size), of the last token each row has read,
        give the first ids (None: id 0); pick(logits) -> ids (B,), greedy by default, draws from rng and must
        not wait for the device."""
        return Decoder(self, state, logits, pick or sample, rng, graph)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
               n_vocab=None, segment=None, progress=None, state=None, never=(), graph=None):
        """Continue a list of prompts (lists of ids, any lengths): yields the next ids (B,) of all rows, step
        by step. Each row is read alone and unpadded into its slice of the state; decoding is batched.
        temperature 0 is greedy; top_k and top_p cut the tail; ids from n_vocab on, and those in `never`, are
        not sampled. graph: see Decoder. To go on from the same state, begin the next prompt with the last id
        yielded: it was drawn, not read."""
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("every prompt needs at least one token")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if temperature < 0 or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} (0 or more), top_k {top_k} (1 or more), "
                             f"top_p {top_p} (above 0, at most 1)")
        device = self.wte.weight.device
        rng = torch.Generator(device).manual_seed(seed) if seed is not None else None
        if state is None:
            state = self.init_state(len(prompts), max(map(len, prompts)) + max_new_tokens)
        if len(state.pos) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for a state of {len(state.pos)} rows; give one a row")
        held = max(n + len(prompt) for n, prompt in zip(state.pos.tolist(), prompts)) + max_new_tokens - 1
        self.check_length(held)
        self.check_room(state, held - state.seen)
        logits = torch.cat([self.prefill(p, state.row(b), segment, progress) for b, p in enumerate(prompts)])
        state.seen = int(state.pos.max())
        banned = torch.tensor(sorted(never), dtype=torch.int64, device=device)

        def pick(logits):
            logits = logits.index_fill(-1, banned, -math.inf) if never else logits
            return sample(logits[:, :n_vocab], temperature, top_k, top_p, rng)
        decoder = self.decoder(state, logits[:, -1], pick, rng, graph)
        yield decoder.idx.clone()
        for _ in range(max_new_tokens - 1):
            yield decoder().clone()

    def generate(self, prompts, max_new_tokens, stop=(), **options):
        """Continuations of a list of prompts, a list of id lists, each ended before the first id in `stop`.
        Options: those of stream."""
        out, done = [[] for _ in prompts], [False] * len(prompts)
        for idx in self.stream(prompts, max_new_tokens, **options):
            for b, token in enumerate(idx.tolist()):
                done[b] = done[b] or token in stop
                if not done[b]:
                    out[b].append(token)
            if all(done):
                break
        return out

    # ---- files ----

    def save_pretrained(self, path, dtype=None):
        """Write config.json and model.safetensors (in dtype, or as is) to path, each whole or not at all."""
        from safetensors.torch import save_file
        os.makedirs(path, exist_ok=True)
        weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.state_dict().items()}
        write_file(os.path.join(path, "model.safetensors"), lambda tmp: save_file(weights, tmp))
        write_json(os.path.join(path, "config.json"), dict(model_type="hypenet", **asdict(self.config)))

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """Load a folder that save_pretrained wrote, or GPT-2, Qwen3, Llama 3 or the authors' HypeNet, from a
        folder or the hub, as dtype whatever it holds. Each weight is read straight into its place, so little
        more memory is needed than the weights take. ValueError, in one line, for all that does not fit."""
        path = fetch(name_or_dir)
        config, family, q_scale = read_config(path)
        with torch.device("meta"):                   # no memory for weights that are about to be replaced
            model = cls(config)
        found = open_weights(path)
        places = find_weights(model, family, found, path)
        weights = {name: torch.empty(p.shape, dtype=dtype, device=device)
                   for name, p in model.state_dict().items()}
        for theirs, (ours, start, shape) in places.items():
            w = found[theirs].get_tensor(theirs)     # a view of the file, read as it is copied
            weights[ours][start:start + shape[0]] = w.T if is_conv1d(theirs) else w
        model.load_state_dict(weights, assign=True)
        for block in model.blocks:                   # a constant scale of the queries is a gain of their norm
            if q_scale != 1 and isinstance(block.mixer, Attention):
                block.mixer.q_norm.weight.data *= q_scale
        return model.eval()


class Decoder:
    """Generation, one token a row a call: the model reads idx (B,), and pick chooses the next ids from its
    logits. On a GPU the second call records all of it as a CUDA graph, which later calls replay: hundreds of
    small kernels cost more to launch than to run. All that a step reads or writes stays at one address, and
    what changes from step to step (positions, ids, random numbers) is on the device. graph=False: never."""

    def __init__(self, model, state, logits, pick, rng, graph):
        self.model, self.state, self.pick, self.rng = model, state, pick, rng
        self.idx = torch.zeros_like(state.pos) if logits is None else pick(logits)
        self.graph, self.calls = None, 0
        self.record = kernel.has_kernels(self.idx, model.config.head_dim) and graph is not False

    def step(self):
        logits = self.model.head(self.model.hidden(self.idx[:, None], self.state))
        self.idx.copy_(self.pick(logits[:, -1]))

    @torch.no_grad()
    def __call__(self):
        """Read the ids drawn last and draw the next: idx (B,), overwritten by the next call."""
        self.calls += 1
        if not self.record or self.calls == 1:               # the first call also compiles what there is to
            self.step()
        elif self.graph is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.idx.device)
            if self.rng is not None:
                graph.register_generator_state(self.rng)
            with torch.cuda.graph(graph, stream=stream):     # records, runs nothing; counts state.seen up
                self.step()
            self.graph = graph
            self.graph.replay()
        else:
            self.model.check_room(self.state, 1)
            self.model.check_length(self.state.seen + 1)
            self.graph.replay()
            self.state.seen += 1
        return self.idx


def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Draw ids (B,) from logits (B,vocab); nothing in it waits for the device."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)      # never inf less inf
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None:                            # keep the fewest ids whose probability reaches top_p
        ordered, ids = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
    waits = torch.empty_like(probs).exponential_(generator=rng)     # the first of events of these rates
    return (probs / waits).argmax(-1)


# ---- files: ours, Hugging Face's, the authors' -------------------------------------------------------------

SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# Fields of config.json that must have one of these values, or be absent: with another, the numbers differ.
ALIKE = dict(
    activation_function=("gelu_new", "gelu_pytorch_tanh"), hidden_act=("silu", "swish"),
    attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,), partial_rotary_factor=(1,),
    scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,),
    add_cross_attention=(False,), lightning_scale=("1/sqrt(d)",), lightning_use_short_conv=(False,),
    quantization_config=())

# Our sizes by the names of their config.json.
GPT2_SIZES = dict(vocab_size="vocab_size", n_embd="n_embd", n_head="n_head", max_len="n_positions")
LLAMA_SIZES = dict(vocab_size="vocab_size", n_embd="hidden_size", n_head="num_attention_heads",
                   n_hidden="intermediate_size", max_len="max_position_embeddings")

# Our modules and what files call them, {} a layer's number. Where | stands, several of theirs make up the
# rows of one of ours; {z} is the authors' gate, o_gate in attention layers and z_proj in linear ones.
GPT2_NAMES = {
    "wte": "wte", "wpe": "wpe", "norm": "ln_f", "lm_head": "lm_head",
    "blocks.{}.norm1": "h.{}.ln_1",
    "blocks.{}.mixer.qkvz": "h.{}.attn.c_attn",
    "blocks.{}.mixer.out": "h.{}.attn.c_proj",
    "blocks.{}.norm2": "h.{}.ln_2",
    "blocks.{}.mlp.up": "h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "h.{}.mlp.c_proj",
}
LLAMA_NAMES = {
    "wte": "embed_tokens", "norm": "norm", "lm_head": "lm_head",
    "blocks.{}.norm1": "layers.{}.input_layernorm",
    "blocks.{}.mixer.qkvz": "layers.{}.self_attn.q_proj|k_proj|v_proj|{z}",
    "blocks.{}.mixer.q_norm": "layers.{}.self_attn.q_norm",
    "blocks.{}.mixer.k_norm": "layers.{}.self_attn.k_norm",
    "blocks.{}.mixer.norm": "layers.{}.self_attn.o_norm",
    "blocks.{}.mixer.out": "layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "layers.{}.mlp.gate_proj|up_proj",
    "blocks.{}.mlp.down": "layers.{}.mlp.down_proj",
}
NAMES = {"gpt2": GPT2_NAMES, "qwen3": LLAMA_NAMES, "llama": LLAMA_NAMES, "hypenet": LLAMA_NAMES}
DROPPED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")     # buffers that we make ourselves


def fetch(name_or_dir, weights=True):
    """A folder with the files of a model (weights=False: only those of its tokenizer): name_or_dir itself if
    it is one, else downloaded by huggingface_hub, with its cache, HF_ENDPOINT, HF_HUB_OFFLINE and tokens."""
    name = os.fspath(name_or_dir)
    if os.path.isdir(name):
        return name
    repo = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise ValueError(f"no model in {name}: it is no folder, none of {', '.join(SHORT_NAMES)}, "
                         "and not of the form owner/name")
    import huggingface_hub
    from huggingface_hub import errors
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    try:
        return huggingface_hub.snapshot_download(repo, allow_patterns=files + weights * [
            "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"])
    except errors.GatedRepoError:
        problem = f"is gated: accept its terms at huggingface.co/{repo}, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "is no folder here and no repository of the hub: check the name; if private, hf auth login"
    except Exception as e:                           # a dozen types of several libraries
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"does not fit the disk ({e.strerror}): free some, or let HF_HOME name a larger one"
        elif isinstance(e, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            problem = ("is no folder here, not in the hub's cache, and the hub is out of reach: go online "
                       "(HF_HUB_OFFLINE unset) or give a local folder")
        else:
            problem = f"cannot be downloaded ({' '.join(str(e).split())}): try again, or give a local folder"
    raise ValueError(f"{name} {problem}")


def read_json(path, name, what):
    """The object in path/name; ValueError, no {what}, where there is none."""
    try:
        with open(os.path.join(path, name), encoding="utf-8") as f:
            value = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} in {path}: it has no {name}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}/{name} is no {what}: it is not JSON, or no object; copy it again")
    return value


def read_config(path):
    """The config.json of a folder -> HypeNetConfig, the family (a key of NAMES, None: our own format), and a
    constant that multiplies the queries."""
    given = read_json(path, "config.json", "model")
    try:
        if given.get("model_type") == "hypenet" and "mixer_types" not in given:
            unknown = given.keys() - {f.name for f in fields(HypeNetConfig)} - {"model_type"}
            if unknown:
                raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
            return HypeNetConfig(**{k: v for k, v in given.items() if k != "model_type"}), None, 1
        return translate(given)
    except KeyError as e:
        problem = f"it lacks {e.args[0]}"
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        problem = f"a field has a value of the wrong type or size ({e})"
    except ValueError as e:
        problem = e
    raise ValueError(f"{path}/config.json: {problem}")


def translate(given):
    """read_config for a config.json of Hugging Face's or the authors'. ValueError where a field asks for what
    our layers do not do, rather than other numbers."""
    family = given.get("model_type")
    if family not in ("gpt2", "qwen3", "llama", "hypenet"):
        raise ValueError(f"model_type is {family!r}; known are hypenet, gpt2, qwen3, llama")
    for field, allowed in ALIKE.items():
        if given.get(field) is not None and given[field] not in allowed:
            raise ValueError(f"{field} is {given[field]}; allowed: {', '.join(map(str, allowed)) or 'none'}")
    if set(given.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {given['layer_types']}; allowed: full_attention")
    gpt2, authors, q_scale = family == "gpt2", family == "hypenet", 1
    c = dict(FAMILIES["qwen3" if authors else family], tied=given.get("tie_word_embeddings", gpt2))
    c |= {ours: given[theirs] for ours, theirs in (GPT2_SIZES if gpt2 else LLAMA_SIZES).items()}
    c["layers"] = "A" * given["n_layer" if gpt2 else "num_hidden_layers"]
    c["head_dim"] = given.get("head_dim") or c["n_embd"] // c["n_head"]
    c["n_kv_head"] = given.get("num_key_value_heads") or c["n_head"]
    if gpt2:
        c["norm_eps"] = given.get("layer_norm_epsilon", 1e-5)
        c["n_hidden"] = given.get("n_inner") or 4 * c["n_embd"]
        return HypeNetConfig(**c), family, q_scale
    c["norm_eps"] = given.get("rms_norm_eps", 1e-6)
    rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})   # older and newer files
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = any(isinstance(value, dict) for value in rope.values())                  # one a type of layer
    if nested or kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rope_scaling is {rope}; allowed: rope_type default or llama3, of all channels")
    c["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if kind == "llama3":
        c["rope_scaling"] = {name: rope[name] for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if authors:                                      # what is absent is as in their configuration class
        kinds, given_kinds = {"attn": "A", "lightning-attn": "L", "lightning_attn": "L"}, given["mixer_types"]
        if set(given_kinds) - kinds.keys() or len(given_kinds) != len(c["layers"]):
            raise ValueError(f"mixer_types is {given_kinds}; one of {', '.join(kinds)} a layer")
        c["layers"] = "".join(kinds[kind] for kind in given_kinds)
        for field, ours in dict(lightning_nh="n_head", lightning_head_dim="head_dim").items():
            if given.get(field) not in (None, c[ours]):
                raise ValueError(f"{field} is {given[field]}; allowed: that of attention, {c[ours]}")
        if "L" in c["layers"] and c["n_head"] & (c["n_head"] - 1):
            raise ValueError(f"num_attention_heads is {c['n_head']}; allowed: powers of two, for which alone "
                             "the authors' decays are those of eq. 19, and ours")
        c |= dict(attn_pe=float(given.get("attn_use_rope", True)),
                  attn_gate=given.get("attn_use_output_gate", False),
                  linear_kv_head=given.get("lightning_nkv") or c["n_kv_head"],
                  linear_rope=given.get("lightning_use_rope", True),
                  linear_qk_norm=given.get("lightning_use_qk_norm", False),
                  linear_norm=given.get("lightning_use_output_norm", False),
                  linear_gate=given.get("lightning_use_output_gate", False))
        scaling = given.get("attn_logits_scaling")
        hype = re.fullmatch(r"hype(?: (\d+))?", str(scaling))
        if hype:                                     # eq. 11 with this a; theirs is 362 where none is given
            c["logit_base"] = float(hype[1] or 362)
        elif type(scaling) in (int, float):
            q_scale = scaling
        elif scaling is not None:
            raise ValueError(f'attn_logits_scaling is {scaling!r}; allowed: null, a number, "hype 500"')
    return HypeNetConfig(**c), family, q_scale


def open_weights(path):
    """The tensors in a folder's safetensors files, not yet read: name -> the open file that has it."""
    from safetensors import safe_open
    files, found = ["model.safetensors"], {}
    if not os.path.exists(os.path.join(path, files[0])) and os.path.exists(
            os.path.join(path, "model.safetensors.index.json")):
        shards = read_json(path, "model.safetensors.index.json", "model").get("weight_map")
        files = sorted(set(shards.values())) if isinstance(shards, dict) else files
    for file in files:
        try:
            f = safe_open(os.path.join(path, file), framework="pt")
        except FileNotFoundError:
            raise ValueError(f"no model in {path}: it has no {file}") from None
        except Exception as e:                       # safetensors raises its own type on a truncated file
            raise ValueError(f"{path}/{file} cannot be read ({e}); copy or download it again") from None
        found.update(dict.fromkeys(f.keys(), f))
    return found


def is_conv1d(name):
    """Whether this weight is one of GPT-2's Conv1D, stored (in, out)."""
    return re.search(r"\.c_(attn|proj|fc)\.weight$", name) is not None


def find_weights(model, family, found, path):
    """Where each tensor of a file goes: its name -> (ours, first row, shape there). ValueError names all that
    are missing, unexpected or of another shape."""
    config, places = model.config, {}
    prefix = max({name.split(".")[0] for name in found} & {"transformer", "model"}, default="")
    for ours, p in model.state_dict().items():
        module, kind = ours.rsplit(".", 1)           # kind: weight or bias
        template = NAMES[family][re.sub(r"\.\d+\.", ".{}.", module)] if family else module
        layer = int(module.split(".")[1]) if module.startswith("blocks") else 0
        z = "o_gate" if config.layers[layer] == "A" else "z_proj"
        stem, _, last = template.format(layer, z=z).rpartition(".")
        names, start = last.split("|"), 0
        sizes = [len(p) // len(names)] * len(names)
        if module.endswith("qkvz") and len(names) > 1:
            sizes = model.get_submodule(module[:-len(".qkvz")]).sizes
        for name, rows in zip(names, sizes):
            if rows:                                 # none: a gate that this model lacks
                parts = "" if module == "lm_head" else prefix, stem, name, kind
                places[".".join(filter(None, parts))] = ours, start, (rows, *p.shape[1:])
                start += rows
    problems = [f"{name} is missing" for name in sorted(places.keys() - found.keys())]
    wte = next(name for name, place in places.items() if place[0] == "wte.weight")
    for name in sorted(found):
        if name in places:
            shape = tuple(found[name].get_slice(name).get_shape())
            wanted = places[name][2][::-1 if is_conv1d(name) else 1]
            if shape != wanted:
                problems.append(f"{name} is {shape}, not {wanted}")
        elif name == "lm_head.weight" and config.tied:
            if wte in found and not found[name].get_tensor(name).equal(found[wte].get_tensor(wte)):
                problems.append(f"{name} differs from {wte}, though config.json ties the two")
        elif not name.endswith(DROPPED):
            problems.append(f"{name} is unexpected")
    if problems:
        raise ValueError(f"the weights in {path} are not those of its config.json: {'; '.join(problems)}")
    return places


def write_file(path, write):
    """write(tmp) makes the file under a temporary name, then it takes its own: none is ever half-written."""
    tmp = f"{path}.tmp{os.getpid()}"
    try:
        write(tmp)
        mask = os.umask(0)                           # safetensors would leave it readable to its owner alone
        os.umask(mask)
        os.chmod(tmp, 0o666 & ~mask)
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def write_text(path, text):
    def write(tmp):
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(text)
    write_file(path, write)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ---- tokenizer ---------------------------------------------------------------------------------------------


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet():
    """The characters that stand for bytes in a vocabulary (GPT-2's): printable ones for themselves, the other
    bytes, in order, from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def cut(text, added):
    """text -> ids of the added tokens in it, and as str what is between them; of two that fit, the longer."""
    if not added:
        return [text]
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    return [added.get(part, part) for part in re.split(f"({pattern})", text) if part]


class Tokenizer:
    """A tiktoken encoding and the spec it is built from: tokenizer.json of a byte-level BPE (GPT-2, Qwen3,
    Llama 3), or {"type": "bytes"}, one id a byte of UTF-8. end: the id between documents; stops: all ids that
    end a text; bos: the id that begins one, or None; n_vocab: the largest id + 1; holes: those below it that
    are no token."""

    def __init__(self, spec, ends=(0,), bos=None):
        """ends: stops, the end of a document first."""
        import tiktoken
        self.spec, self.added, self.form = spec, ({}, {}), None
        if spec.get("type") == "bytes":
            pattern, ranks = r"(?s:.{1,128})", {bytes([i]): i for i in range(256)}
            self.tokens, self.ids = dict(enumerate(ranks)), np.arange(256)
        elif "model" in spec:
            pattern, ranks = self.parse()
        else:
            raise ValueError(f"type is {spec.get('type')!r}; known are bytes and the tokenizer.json of a BPE")
        self.encoding = tiktoken.Encoding("", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
        self.n_vocab = max(self.tokens) + 1
        self.holes = sorted(set(range(self.n_vocab)) - self.tokens.keys())
        self.bos, self.stops = bos, set(ends)
        if not ends or self.stops - self.tokens.keys():
            raise ValueError(f"eos_token_id is {list(ends)}; give at least one id, all of them its tokens")
        self.end = ends[0]
        text = "".join(map(chr, range(0xD800)))      # tiktoken drops what its pattern does not match
        if self.decode(self.ids[self.encoding.encode_to_numpy(text)]) != text:
            raise ValueError(f"the pattern {pattern!r} leaves out some text")

    def parse(self):
        """tokenizer.json -> tiktoken's pattern and ranks. Of all neighbours that make up a token, tiktoken
        joins those of lowest rank; so the rank of a token is its place among the merges, and `ids` leads from
        ranks to ids, whatever their order."""
        spec, model, alphabet = self.spec, self.spec["model"], byte_alphabet()
        vocab, added = model["vocab"], spec.get("added_tokens") or []
        merges = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in model["merges"]]
        whole = []                                   # ignore_merges: a piece that is a token is taken whole
        if model.get("ignore_merges"):
            whole = [token for token in vocab.keys() - set(merges) if alphabet.keys() >= set(token)]
        norm, split = spec.get("normalizer") or dict(normalizers=[]), spec.get("pre_tokenizer") or {}
        norms = [n["type"] for n in norm.get("normalizers", [norm])]
        *splits, last = split.get("pretokenizers", [split])
        patterns = [s["pattern"].get("Regex") for s in splits
                    if s.get("type") == "Split" and s["behavior"] == "Isolated" and not s.get("invert")]
        if last.get("use_regex", True):
            splits, patterns = [*splits, last], [*patterns, GPT2_PATTERN]
        wrong = [name for name, fits in dict(
            normalizer=set(norms) <= {"NFC"},
            pre_tokenizer=last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
            and len(splits) == len(patterns) == 1 and patterns[0],
            model=model["type"] == "BPE" and not any(model.get(flag) for flag in (
                "dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")),
            vocab=alphabet.keys() <= vocab.keys(),
            # two merges that make one token stand side by side, and one is there for all that could be joined
            merges=len(list(groupby(merges))) == len(set(merges)) and not any(
                token[:i] in vocab and token[i:] in vocab for token in whole for i in range(1, len(token))),
            added_tokens=not any(t.get(flag) for t in added for flag in ("single_word", "lstrip", "rstrip")),
        ).items() if not fits]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not of the kind that GPT-2, Qwen3 and Llama 3 have")

        def to_bytes(token):
            return bytes(map(alphabet.get, token)) if alphabet.keys() >= set(token) else token.encode()
        self.form = "NFC" if norms else None
        for token in added:                          # found in the text as it is, or once it is normalized
            late, text = bool(token.get("normalized")), token["content"]
            self.added[late][self.normalize(text) if late else text] = token["id"]
        vocab = vocab | {token["content"]: token["id"] for token in added}
        self.tokens = {id: to_bytes(token) for token, id in vocab.items()}
        order = list(dict.fromkeys([*alphabet, *merges, *whole]))
        self.ids = np.array([vocab[token] for token in order])
        return patterns[0], {to_bytes(token): rank for rank, token in enumerate(order)}

    @classmethod
    def bytes(cls):
        return cls({"type": "bytes"})

    def normalize(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def encode(self, text, special=False):
        """str -> ids, a list of ints."""
        return self.encode_array(text, special).tolist()

    def encode_array(self, text, special=False):
        """str -> ids, numpy int32; a lone surrogate becomes U+FFFD. special: added tokens, such as
        <|endoftext|>, that the text spells out become their ids; else they are text like any other."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        early, late = self.added if special else ({}, {})
        parts = []
        for part in cut(text, early):
            parts += [part] if isinstance(part, int) else cut(self.normalize(part), late)
        ids = [[part] if isinstance(part, int) else self.ids[self.encoding.encode_to_numpy(part)]
               for part in parts]
        return np.concatenate(ids or [[]]).astype(np.int32)

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8, and ids that are no token, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id):
        return self.tokens.get(int(id), b"\xef\xbf\xbd")

    def save(self, path):
        """Write tokenizer.json to path and, unless it tells, what begins and ends a text beside it."""
        write_json(os.path.join(path, "tokenizer.json"), self.spec)
        if "model" in self.spec:
            bos = None if self.bos is None else self.token_bytes(self.bos).decode()
            write_json(os.path.join(path, "tokenizer_config.json"), dict(
                add_bos_token=bos is not None, bos_token=bos,
                eos_token_id=[self.end, *sorted(self.stops - {self.end})]))

    @classmethod
    def load(cls, name_or_dir):
        """From a folder or the hub. Every id that config.json, generation_config.json, tokenizer_config.json
        call eos ends a text; the first, in this order, is the end of a document."""
        path = fetch(name_or_dir, weights=False)
        spec = read_json(path, "tokenizer.json", "tokenizer")
        try:
            if "model" not in spec:
                return cls(spec)
            configs = [read_json(path, f"{name}.json", "tokenizer") for name in (
                "config", "generation_config", "tokenizer_config")
                if os.path.exists(os.path.join(path, f"{name}.json"))]
            ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
            ends, bos, post = [], None, spec.get("post_processor") or {}
            for c in configs:
                given, eos, begin = c.get("eos_token_id"), c.get("eos_token"), c.get("bos_token")
                ends += given if isinstance(given, list) else [given]
                ends.append(ids.get(eos["content"] if isinstance(eos, dict) else eos))
                if c.get("add_bos_token"):
                    bos = ids.get(begin["content"] if isinstance(begin, dict) else begin)
            for step in post.get("processors", [post]):
                if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                    bos = step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
            return cls(spec, [end for end in dict.fromkeys(ends) if end is not None], bos)
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}/tokenizer.json is no tokenizer ({e!r}); copy it again") from None
        except ValueError as e:
            raise ValueError(f"{path}/tokenizer.json: {e}") from None


def check_tokenizer(tokenizer, config):
    """ValueError unless every id of the tokenizer has a row in the model's embedding."""
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"the tokenizer's ids go up to {tokenizer.n_vocab - 1:,}, the model's embedding has "
                         f"{config.vocab_size:,} rows: they do not belong together")


# ---- what the command lines share --------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=math.inf):
    """A type for add_argument: an int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))
        return value
    return parse


def default_device(name=None):
    """The device asked for (ValueError if there is no such one), else CUDA or Apple's, else the CPU. A GPU
    that is asked for by number becomes the current one, on which graphs are recorded."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is no such device here; use {default_device()}") from None
    return name


def command_line(prog, run, argv):
    """run(argv); what the user can mend ends in one line and exit status 2."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:                          # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as e:
        print(f"{prog}: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
