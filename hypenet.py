"""HypeNet: a language model that mixes a few softmax-attention layers with many linear-attention layers.

A linear-attention layer carries a state of fixed size from token to token, so a context of hundreds of
thousands of tokens costs it no memory; the few attention layers that remain keep exact recall. The file has
both kinds of layer, the model, its state, generation, the tokenizer, and loading and saving.

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
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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
    wavelengths slowed where rope_scaling is Llama 3's. Made anew at each call, so that no cast touches it."""
    freq = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns when pretrained
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)                     # 1: as it was, 0: fully slowed
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    return freq


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
    return Where(pos, start, attn_rope, linear_rope)


# ---- small parts -------------------------------------------------------------------------------------------


def make_norm(config):
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)


class MLP(nn.Module):
    """SwiGLU with gate and up in one Linear, or GPT-2's GELU."""

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        self.up = nn.Linear(config.n_embd, config.n_hidden * (2 if self.swiglu else 1), bias=config.bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.swiglu:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


def attend(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D)) v for q (B,T,H,D) and k, v (B,S,H_kv,D) -> (B,T,H,D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def attend_lse(q, k, v, causal=False):
    """Attention that also returns the log of its denominator, by which two parts of a context are merged:
    q (B,H,T,D), k, v (B,H,S,D) -> (B,H,T,D), (B,H,T)."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and half and q.size(-1) in range(8, 257, 8):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    if q.device.type == "cuda" and q.size(-1) % 8 == 0:        # pads its rows of lse to a multiple of 32
        o, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)[:2]
        return o, lse[..., :q.size(2)]
    scores = (q @ k.mT).float() * q.size(-1) ** -0.5
    if causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


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
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
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
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if where.attn_rope is not None:
            q, k = rotate(q, where.attn_rope), rotate(k, where.attn_rope)
        if hasattr(self, "chunk_embd"):
            e = self.chunk_embd(where.pos // c.chunk).unflatten(-1, (c.n_head, c.head_dim))
            q, k = q + e, k + e[:, :, ::c.n_head // c.n_kv_head]    # grouped k: the group's first head
        if c.logit_base is not None:                                # paper eq. 11
            s_t = torch.log(where.pos + c.logit_base) / math.log(c.logit_base)
            q = q * s_t[..., None, None]
        q, k = q.to(v.dtype), k.to(v.dtype)                         # autocast leaves norms in fp32
        if cache is None:
            o = self.whole(q, k, v)
        elif T == 1:
            o = self.decode(q, k, v, where, cache)
        else:
            o = self.segment(q, k, v, where, cache)
        o = o.reshape(B, T, -1)                                     # (B,T,H*D)
        return o * torch.sigmoid(z) if c.attn_gate else o

    def whole(self, q, k, v):
        """Every token of a sequence at once, nothing before it."""
        T, W = q.size(1), self.config.window
        if W is None or T <= W:
            return attend(q, k, v, causal=True)
        return attend(q, k, v, mask=torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - W))

    def segment(self, q, k, v, where, cache):
        """T tokens that follow `start` others, all rows alike. The past needs no mask, the segment is causal:
        two calls, merged by the weight of each part in the softmax's denominator. A window is one masked call
        on what the ring holds and the segment."""
        (B, T, H, D), G = q.shape, k.size(2)
        keys, values, size, start = cache["k"], cache["v"], cache["k"].size(1), where.start
        if self.config.window is None:
            own = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
            o, lse = attend_lse(*(t.transpose(1, 2) for t in (q, *own)), causal=True)
            if start:                                               # a group's queries are rows of one matrix
                rows = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, D)
                past = (t[:, :start].transpose(1, 2).to(q.dtype) for t in (keys, values))
                o_past, lse_past = attend_lse(rows, *past)
                w = torch.sigmoid(lse_past.reshape(B, H, T) - lse).unsqueeze(-1)
                o = o + (o_past.reshape(B, H, T, D) - o) * w.to(o.dtype)
            o = o.transpose(1, 2)
        else:
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
            self.q_norm = nn.RMSNorm(c.key_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.key_dim, eps=c.norm_eps)
        if c.linear_norm:
            self.norm = nn.RMSNorm(c.n_head * c.head_dim, eps=c.norm_eps)
        if c.decay in ("head", "channel"):
            self.forget = nn.Linear(c.n_embd, c.n_head * (c.key_dim if c.decay == "channel" else 1))

    def log_decay(self, x):
        """Log of the decay: (H,) where it is constant, (B,T,H) or (B,T,H,K) where a gate makes it."""
        H = self.config.n_head
        if self.config.decay == "none":
            return torch.zeros(H, device=x.device)
        if self.config.decay == "constant":                        # paper eq. 19, whether or not H is 2^n
            return -torch.exp2(-8.0 * torch.arange(1, H + 1, device=x.device) / H)
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
        if c.linear_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if where.linear_rope is not None:
            q, k = rotate(q, where.linear_rope), rotate(k, where.linear_rope)
        if c.linear_kv_head < c.n_head:
            k, v = (t.repeat_interleave(c.n_head // c.linear_kv_head, dim=2) for t in (k, v))
        S = None if cache is None else cache["S"]
        q, k = q.to(v.dtype), k.to(v.dtype)                        # autocast leaves norms in fp32
        o, S_new = chunked_scan(q, k, v, self.log_decay(x), S, scale=c.key_dim ** -0.5)
        if cache is not None:
            S.copy_(S_new)                                         # in place: the address never changes
        o = o.reshape(B, T, -1)                                    # (B,T,H*D)
        if c.linear_norm:
            o = self.norm(o)
        return o * torch.sigmoid(z) if c.linear_gate else o


# ---- the model ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)) (paper eq. 15)."""

    def __init__(self, config, kind):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.mixer = Attention(config) if kind == "A" else LinearAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, where, cache=None):
        x = x + self.mixer(self.norm1(x), where, cache)
        return x + self.mlp(self.norm2(x))


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
        pos = torch.arange(T, device=idx.device)[None]                             # (1,T)
        if state is not None:
            start, pos = state.seen, pos + state.pos[:, None]                      # (B,T)
            if start + T > state.max_tokens:
                raise ValueError(f"{start + T:,} tokens do not fit the {state.max_tokens:,} of init_state")
            if T > 1 and (state.pos != start).any():
                raise ValueError("rows hold different numbers of tokens; read each through state.row(b)")
        elif offset is not None:
            pos = pos + offset[:, None]
        self.check_length(start + T)
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):
            where = locate(c, pos, start)
            x = self.embed(idx, where)
            for i, block in enumerate(self.blocks):
                x = block(x, where, state.layers[i] if state is not None else None)
            if state is not None:
                state.pos += T
                state.seen = start + T
            return self.norm(x)

    def head(self, x):
        """x (...,C) -> logits (...,vocab_size)."""
        return F.linear(x, self.wte.weight if self.config.tied else self.lm_head.weight)

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
    def prefill(self, prompt, state, segment=1024, progress=None):
        """Read a prompt (a sequence of ids) into a state of one row, `segment` tokens at a time, to bound
        memory for activations; progress(n) is called after each. Returns logits (1,1,vocab_size)."""
        idx = torch.as_tensor(prompt, dtype=torch.int64).to(self.wte.weight.device)[None]
        for part in idx.split(segment, dim=1):
            x = self.hidden(part, state)
            if progress is not None:
                progress(part.size(1))
        return self.head(x[:, -1:])

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
               n_vocab=None, segment=1024, progress=None, state=None):
        """Continue a list of prompts (lists of ids, any lengths): yields the next ids (B,) of all rows, step
        by step. Each row is read alone and unpadded into its slice of the state; decoding is batched.
        temperature 0 is greedy; top_k and top_p cut the tail; ids from n_vocab on are never sampled."""
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("every prompt needs at least one token")
        if temperature < 0 or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} (0 or more), top_k {top_k} (1 or more), "
                             f"top_p {top_p} (above 0, at most 1)")
        device = self.wte.weight.device
        rng = torch.Generator(device).manual_seed(seed) if seed is not None else None
        if state is None:
            state = self.init_state(len(prompts), max(map(len, prompts)) + max_new_tokens)
        self.check_length(state.seen + max(map(len, prompts)) + max_new_tokens - 1)
        logits = torch.cat([self.prefill(p, state.row(b), segment, progress) for b, p in enumerate(prompts)])
        state.seen = int(state.pos.max())
        for step in range(max_new_tokens):
            idx = sample(logits[:, -1, :n_vocab], temperature, top_k, top_p, rng)  # (B,)
            yield idx
            if step + 1 < max_new_tokens:
                logits = self.head(self.hidden(idx[:, None], state))

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
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a folder that save_pretrained wrote, as dtype whatever it holds. ValueError for all else."""
        from safetensors.torch import load_file
        try:
            with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
                config = json.load(f)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"no model in {path}: it has no config.json") from None
        except ValueError:
            raise ValueError(f"{path}/config.json is not JSON; write it again") from None
        if not isinstance(config, dict) or config.pop("model_type", None) != "hypenet":
            raise ValueError(f"{path}/config.json: model_type is not hypenet; name a folder halo.py made")
        unknown = set(config) - {f.name for f in fields(HypeNetConfig)}
        if unknown:
            raise ValueError(f"{path}/config.json has unknown fields {', '.join(sorted(unknown))}")
        with torch.device("meta"):                   # no memory for weights that are about to be replaced
            model = cls(HypeNetConfig(**config))
        file = os.path.join(path, "model.safetensors")
        try:
            weights = load_file(file)
        except FileNotFoundError:
            raise ValueError(f"no model in {path}: it has no model.safetensors") from None
        except Exception as e:                       # safetensors raises its own type on a truncated file
            raise ValueError(f"{file} cannot be read ({e}); copy it again") from None
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        for name in sorted(expected.keys() ^ weights.keys()):
            raise ValueError(f"{file}: {name} is {'missing' if name in expected else 'unexpected'}")
        for name, shape in expected.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{file}: {name} is {tuple(weights[name].shape)}, not {shape}")
        weights = {name: w.to(device, dtype) for name, w in weights.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()


def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Draw ids (B,) from logits (B,vocab)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
    probs = logits.softmax(-1)
    if top_p is not None:                            # keep the fewest ids whose probability reaches top_p
        ordered, ids = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
    return torch.multinomial(probs, 1, generator=rng)[:, 0]


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


class Tokenizer:
    """A tiktoken encoding and the spec it is built from (tokenizer.json); bytes(): one id a byte of UTF-8."""

    def __init__(self, spec):
        import tiktoken
        if spec.get("type") != "bytes":
            raise ValueError(f"tokenizer of type {spec.get('type')!r}; this version knows bytes")
        self.spec, self.n_vocab, self.end = spec, 256, 0  # id 0, NUL, ends a document
        self.encoding = tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,128})", special_tokens={},
                                          mergeable_ranks={bytes([i]): i for i in range(256)})

    @classmethod
    def bytes(cls):
        return cls({"type": "bytes"})

    def encode(self, text):
        """str -> ids, a list of ints."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """str -> ids, numpy int32; a lone surrogate becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.encoding.encode_to_numpy(text).astype(np.int32)

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))

    def token_bytes(self, id):
        return self.encoding.decode_single_token_bytes(id)

    def save(self, path):
        write_json(os.path.join(path, "tokenizer.json"), self.spec)

    @classmethod
    def load(cls, path):
        try:
            with open(os.path.join(path, "tokenizer.json"), encoding="utf-8") as f:
                return cls(json.load(f))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"no tokenizer in {path}: it has no tokenizer.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            raise ValueError(f"{path}/tokenizer.json is no tokenizer; copy it again") from None


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
    """The device asked for (ValueError if there is no such one), else CUDA or Apple's, else the CPU."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is no such device here; use {default_device()}") from None
    return name


def command_line(prog, run, argv):
    """run(argv); what the user can mend ends in one line and exit status 2."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as e:
        print(f"{prog}: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
