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
import copy
import math
import os
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import support.fast as fast
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
        return fast.attend_cache(q, k, v, cache["k"], cache["v"], where.pos, where.s_t, head_gains(self),
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
            o = fast.decode(q, k, v, self.log_decay(x), S, c.key_dim ** -0.5)
        else:
            o, S_new = chunked_scan(q, k, v, self.log_decay(x), S, scale=c.key_dim ** -0.5)
            if cache is not None:
                S.copy_(S_new)                                     # in place: the address never changes
        y = gated(o.reshape(B, T, -1), z if c.linear_gate else None,                  # (B,T,H*D)
                  self.norm.weight if c.linear_norm else None, c.norm_eps)
        return y.to(v.dtype)                                       # o of float16 is float32 up to its norm

    def step(self, q, k, v, where, cache, log_decay=None):
        """One token a row, of what qkvz gives: (B,H*K), (B,G*K), (B,G*D) -> (B,H*D). log_decay: of a gate,
        (B,H) or (B,H*K)."""
        c = self.config
        g = self.log_decay(q) if log_decay is None else log_decay[:, None]
        if c.decay == "channel":
            g = g.unflatten(-1, (c.n_head, c.key_dim))
        q, k, v = (t.view(len(t), 1, -1, n) for t, n in ((q, c.key_dim), (k, c.key_dim), (v, c.head_dim)))
        o = fast.decode(q, k, v, g, cache["S"], c.key_dim ** -0.5, head_gains(self), c.norm_eps,
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
        return fast.linear(x, layer.weight, layer.bias, weights, eps, gate, act, residual)
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
        return (fast.has_kernels(idx, self.config.head_dim, self.config.key_dim)
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
        from support.common import write_json
        write_json(os.path.join(path, "config.json"), dict(model_type="hypenet", **asdict(self.config)))

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """Load a folder that save_pretrained wrote, or GPT-2, Qwen3, Llama 3 or the authors' HypeNet, from a
        folder or the hub, as dtype whatever it holds. Each weight is read straight into its place, so little
        more memory is needed than the weights take. ValueError, in one line, for all that does not fit."""
        from support.pretrained import fetch, find_weights, is_conv1d, open_weights, read_config
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
        self.record = fast.has_kernels(self.idx, model.config.head_dim) and graph is not False

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


# ---- tokenizer ---------------------------------------------------------------------------------------------


# ---- what the command lines share --------------------------------------------------------------------------


