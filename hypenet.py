"""HypeNet: a language model with a few softmax-attention layers and many linear-attention layers.

An attention layer keeps the keys and values of all past tokens, so its memory grows with the context. A
linear layer keeps one state of fixed size instead. The many linear layers make long contexts cheap; the few
attention layers keep exact recall. Both kinds use the same Transformer block; only the mixer differs. An
article on the web retells the paper, but describes another method. This file can build both (see README.md):

    paper (halo.py's default)                article (--recipe article)

    logits                                   logits
      |  norm, head                            |  norm, head
      |                                        |
     (+)<-- MLP <-- norm                      (+)<-- MLP <-- norm
      |                                        |
     (+)<-- W_o (gate * o)      <- norm       (+)<-- W_o o                <- norm
      |       o = softmax(s_t q k^T) v         |       o = softmax(q k^T) v, window of 2,048
      |       no positions at all (NoPE)       |       RoPE(q, k; position mod chunk) + e[position div chunk]
      |     "A": a quarter, chosen by measuring|     "A": the first and the last quarter
     (+)<-- MLP <-- norm                      (+)<-- MLP <-- norm
      |                                        |
     (+)<-- W_o (gate * norm(o)) <- norm      (+)<-- W_o o                <- norm
      |       o_t = q_t S_t                    |       o_t = q_t S_t
      |       S_t = gamma S_{t-1} + k_t^T v_t  |       S_t = diag(f_t) S_{t-1} + k_t^T v_t
      |       q, k = RoPE(QK-norm(q, k))       |       keys of half width, no RoPE, no QK-norm
      |       gamma: one constant per head     |       f_t = sigmoid(x W_f + b): one gate per key channel
      |     "L": all other layers              |     "L": the middle half
    tokens                                   tokens

Read the drawing from the bottom up. Each column shows one attention layer above one linear layer. Left out
are the scales: D^-1/2 of q k^T, and K^-1/2 of the linear layer's o.
halo.choose_layers decides which layers are "A". A teacher is a trained Transformer; a student is the hybrid
that learns from the teacher. A teacher is a HypeNet of "A" layers, with RoPE or learned positions.

HyPE, the paper's position encoding, is RoPE in the linear layers and no positions in the attention layers.
RoPE turns each query and key by its position, so their product depends on their distance. A model knows only
the distances of its training. An attention layer without positions never sees a distance, so none can be new
to it. Linear layers do meet new distances, but their decay makes far tokens count little (paper 5.1).

Read first: the config, `locate`, `Attention`, `LinearAttention`, `HypeNet`. On a first reading, skip `check`
and what saves and loads files. Everything is plain PyTorch. The same code handles a whole sequence, a part of
one and one token. support/fast.py generates the same tokens faster. support/pretrained.py loads GPT-2, Qwen
and Llama.

In shapes: B rows, T tokens, C width, H heads, H_kv heads of keys and values, D head size, K key width, V
value width (= D), idx token ids.

The article's names, and ours:
    get_hybrid_config              halo.choose_layers("ends", ...)
    HybridLayer                    Block, whose mixer is Attention or LinearAttention
    LinearAttentionRNN             LinearAttention; its forget_gate is LinearAttention.forget
    HyPEPositionEncoding           locate (position mod chunk), Attention.chunk_embd (position div chunk)
    initialize_rnn_from_attention  halo.linear_twin
    halo_distillation              halo.convert_progressive

References: HypeNet and HALO, arXiv 2601.22156 ("the paper": section 5, appendix A). Lightning Attention,
2405.17381. GLA, 2312.06635. RoPE, 2104.09864. YaRN, 2309.00071. Logit scaling, SWAN-GPT, 2504.08719. The
authors' code: github.com/thunlp/hybrid-linear-attention. Not here: short convolutions, delta-rule mixers.
"""
import copy
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kernel import chunked_scan

# ---- configuration -----------------------------------------------------------------------------------------


@dataclass
class HypeNetConfig:
    """Sizes and choices of one model. The defaults make a small teacher; halo.student_config makes a student.
    ValueError for values that clash (see check)."""
    layers: str = "AAAA"            # one letter per layer: "A" attention, "L" linear attention
    vocab_size: int = 256           # rows of the embedding, at least as many as the tokenizer has ids
    n_embd: int = 128               # C, the width
    n_head: int = 4                 # H, query heads
    n_kv_head: int = 4              # H_kv in attention layers; each serves n_head / n_kv_head query heads
    head_dim: int = 32              # D; need not be n_embd / n_head
    n_hidden: int = 384             # width of the MLP's hidden layer
    max_len: int = 256              # longest sequence of the teacher's training; rows of wpe
    norm: str = "rms"               # "rms" (RMSNorm) or "layer" (LayerNorm)
    norm_eps: float = 1e-6
    mlp: str = "swiglu"             # "swiglu" or "gelu" (tanh form)
    qkv_bias: bool = False          # biases of q, k, v and the gate
    out_bias: bool = False          # biases of W_o
    mlp_bias: bool = False          # biases of the MLP
    position: str = "rope"          # how the teacher knows positions: "rope" or "learned" (a table, wpe)
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # how RoPE was extended to longer contexts (see SCALINGS)
    tied: bool = True               # the head is the embedding
    qk_norm: bool = True            # RMSNorm of q and k, per head, in attention layers
    # attention layers of a student
    attn_position: bool = True      # True: the teacher's positions; False: none (as in HyPE)
    chunk: int | None = None        # the article's positions ("chunk HyPE"): tokens per chunk of positions
    n_chunks: int = 0               # number of chunks; each has a learned embedding
    attn_gate: bool = False         # sigmoid output gate
    logit_base: float | None = None  # a of s_t, for long contexts (see Attention); None: s_t = 1
    window: int | None = None       # attend to this many tokens, the query's own included; None: all
    # linear layers
    decay: str = "constant"         # a row of DECAYS
    key_dim: int = 0                # K, width of a key; 0: head_dim
    linear_kv_head: int = 0         # heads of k and v; 0: n_head (transfer clones: paper eq. 13)
    linear_rope: bool = True        # RoPE on q and k
    linear_qk_norm: bool = True     # RMSNorm of q and k, per head
    linear_norm: bool = True        # one RMSNorm over all H * D channels of o
    linear_gate: bool = True        # sigmoid output gate

    def __post_init__(self):
        self.key_dim = self.key_dim or self.head_dim
        self.linear_kv_head = self.linear_kv_head or self.n_head
        check(self)

    def limit(self):
        """The longest sequence. Only learned embeddings, of positions or chunks, set a limit."""
        if self.chunk:
            return self.chunk * self.n_chunks
        return self.max_len if self.position == "learned" and self.attn_position else math.inf


# The three teacher families as data. A model's own config adds its sizes, and may add biases.
FAMILIES = {
    "gpt2": dict(norm="layer", norm_eps=1e-5, mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True,
                 qk_norm=False, position="learned", tied=True),
    "qwen3": dict(norm="rms", mlp="swiglu", qk_norm=True, position="rope"),
    "llama": dict(norm="rms", mlp="swiglu", qk_norm=False, position="rope"),
}

# ---- positions ---------------------------------------------------------------------------------------------


def rope_frequencies(config, dim, device=None):
    """Returns freq (dim / 2,) float32, freq_i = theta^(-2i / dim) (RoPE section 3.2), and a number that
    multiplies cos and sin. In a longer context slow pairs would turn to angles that training never had. So
    rope_scaling divides their frequencies by `factor`, as in transformers. keep, from 0 to 1 for each pair,
    says how much of the old frequency stays."""
    pair = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    freq = config.rope_theta ** -(pair / dim)
    s = config.rope_scaling
    if s is None:
        return freq, 1.0
    keep, attention_factor = 0.0, 1.0                            # "linear": lower all frequencies alike
    if s["rope_type"] == "llama3":                               # high frequencies stay
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif s["rope_type"] == "yarn":                               # high frequencies, of low index, stay
        low, high = yarn_range(config.rope_theta, dim, s)
        keep = 1 - ((pair / 2 - low) / (high - low)).clamp(0, 1)
        attention_factor = yarn_attention_factor(s)
    return keep * freq + (1 - keep) * freq / s["factor"], attention_factor


def yarn_range(theta, dim, s):
    """First and last pair index of YaRN's ramp from kept to divided frequencies (YaRN eq. 18 to 21)."""
    def pair_of(turns):                      # index of the pair with so many turns over the original context
        wavelength = s["original_max_position_embeddings"] / turns                # in tokens per turn
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))
    low, high = pair_of(s.get("beta_fast", 32)), pair_of(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high if high > low else low + 0.001                   # no division by zero
    return low, high


def yarn_attention_factor(s):
    """YaRN's factor of cos and sin. Both q and k carry the factor, so logits grow by its square."""
    def scale(weight):
        return 0.1 * weight * math.log(s["factor"]) + 1 if s["factor"] > 1 else 1.0
    if "attention_factor" in s:
        return s["attention_factor"]
    if "mscale" in s and "mscale_all_dim" in s:
        return scale(s["mscale"]) / scale(s["mscale_all_dim"])
    return scale(1.0)


def rotate(x, cos_sin):
    """RoPE on x (B,T,H,D): channels i and i + D/2 are a pair (as with rotate_half in transformers)."""
    cos, sin = cos_sin                                                        # (B or 1, T, 1, D/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Where(NamedTuple):
    """Positions of the tokens of one call, and what every layer needs of them. locate makes it."""
    pos: torch.Tensor                # (B or 1, T) absolute positions, int64
    attn_rope: tuple | None          # cos and sin for attention layers; None: no rotation
    linear_rope: tuple | None        # the same for linear layers
    s_t: torch.Tensor | None         # (B or 1, T), multiplies the queries of attention layers (paper eq. 11)


def locate(config, pos):
    """The Where of tokens at positions pos (B or 1, T)."""
    def cos_sin(p, dim):
        freq, attention_factor = rope_frequencies(config, dim, p.device)
        angle = p[..., None, None] * freq                                     # (B or 1, T, 1, dim/2)
        return attention_factor * angle.cos(), attention_factor * angle.sin()
    attn_rope = linear_rope = s_t = None
    if config.position == "rope" and config.attn_position:
        attn_rope = cos_sin(pos % config.chunk if config.chunk else pos, config.head_dim)
    if config.linear_rope:
        linear_rope = cos_sin(pos, config.key_dim)
    if config.logit_base:
        s_t = torch.log(pos.float() + config.logit_base) / math.log(config.logit_base)
    return Where(pos, attn_rope, linear_rope, s_t)


# ---- small parts -------------------------------------------------------------------------------------------
# support/fast.py can compile four functions, each as one kernel: normed, make_heads, gated and activated.


def normed(x, weight, bias, eps):
    """RMSNorm of x over the last dimension, or LayerNorm where there is a bias."""
    weight, size = weight.to(x.dtype), x.shape[-1:]
    if bias is None:
        return F.rms_norm(x, size, weight, eps)
    return F.layer_norm(x, size, weight, bias.to(x.dtype), eps)


def make_heads(x, norm, cos_sin, embd, s_t, dtype):
    """Prepares q or k (B,T,H,D) for the product. An argument of None skips its step. The steps: RMSNorm per
    head (norm: gain and eps), RoPE, the sum with embd (B or 1,T,H,D), the product with s_t (B or 1,T). The
    result has this dtype."""
    if norm is not None:
        x = normed(x, norm[0], None, norm[1])
    if cos_sin is not None:
        x = rotate(x, cos_sin)
    if embd is not None:
        x = x + embd
    if s_t is not None:
        x = x * s_t[..., None, None]
    return x.to(dtype)


def gated(o, norm, z):
    """norm(o) * sigmoid(z): o and z (B,T,H*D), norm: gain and eps. An argument of None skips its step."""
    if norm is not None:
        o = normed(o, norm[0], None, norm[1])
    return o if z is None else o * torch.sigmoid(z)


def activated(x, swiglu):
    """SwiGLU if swiglu: x is then gate and up side by side. Otherwise GPT-2's GELU."""
    if swiglu:
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    return F.gelu(x, approximate="tanh")


class RMSNorm(nn.RMSNorm):
    bias = None                                      # LayerNorm has one, so code for both reads norm.bias

    def forward(self, x):
        return normed(x, self.weight, None, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return normed(x, self.weight, self.bias, self.eps)


def make_norm(config):
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.n_embd, eps=config.norm_eps)


def gain_of(norm):
    """Gain and eps of an RMSNorm, the arguments of the functions above; None without a norm."""
    return None if norm is None else (norm.weight, norm.eps)


class MLP(nn.Module):
    """SwiGLU with gate and up in one Linear, or GPT-2's GELU."""

    def __init__(self, config):
        super().__init__()
        self.swiglu = config.mlp == "swiglu"
        self.up = nn.Linear(config.n_embd, config.n_hidden * (2 if self.swiglu else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        return self.down(activated(self.up(x), self.swiglu))


def softmax_attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D)) v: q (B,T,H,D); k, v (B,keys,H_kv,D). mask: True where a query sees a key."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


# ---- attention layer (paper eq. 17) ------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention. In a teacher, attention has RoPE, or no positions if its input has learned ones. In
    a student, attention has no positions (as in HyPE), the article's (chunk HyPE) or the teacher's. A
    student's attention may have scaled queries, an output gate or a window. Eq. 17 also norms o. We follow
    the authors' code, which does not.

    A softmax over more keys is flatter, so the right key can drown in a long context. After training a
    student's queries may therefore be multiplied by s_t = log(t + a) / log(a) (paper eq. 11). halo.py derives
    s_t where it fits a."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sizes = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim,
                      c.n_head * c.head_dim if c.attn_gate else 0]
        self.qkvz = nn.Linear(c.n_embd, sum(self.sizes), bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        if c.chunk and c.position == "rope":
            self.chunk_embd = nn.Embedding(c.n_chunks, c.n_head * c.head_dim)

    def forward(self, x, where, cache=None):
        """x (B,T,C) -> (B,T,C). With a cache (see State) the tokens follow those it holds."""
        return self.out(self.mix(x, where, cache))

    def mix(self, x, where, cache=None):
        """All but the output projection: x (B,T,C) -> gate * o (B,T,H*D)."""
        q, k, v, z = self.project(x, where)
        return gated(self.attend(q, k, v, where.pos, cache).flatten(2), None, z)

    def project(self, x, where):
        """x (B,T,C) -> q (B,T,H,D), k and v (B,T,H_kv,D), gate z (B,T,H*D) or None."""
        c = self.config
        q, k, v, z = self.qkvz(x).split(self.sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)) for t in (q, k, v))
        e = e_k = None
        if hasattr(self, "chunk_embd"):
            e = self.chunk_embd(where.pos // c.chunk).unflatten(-1, (c.n_head, c.head_dim))
            e_k = e[:, :, ::c.n_head // c.n_kv_head]                # grouped k: the group's first head
        q = make_heads(q, gain_of(self.q_norm), where.attn_rope, e, where.s_t, v.dtype)
        k = make_heads(k, gain_of(self.k_norm), where.attn_rope, e_k, None, v.dtype)
        return q, k, v, z if c.attn_gate else None

    def attend(self, q, k, v, pos, cache=None):
        """Each query sees its own key and earlier ones; with a window only the last W. pos (B or 1, T). With
        a cache its keys and values come first, and k and v are stored afterwards."""
        T, W = q.size(1), self.config.window or math.inf
        if cache is None and T <= W:
            return softmax_attention(q, k, v, causal=True)
        keys, values, key_pos = k, v, pos
        if cache is not None:
            pos = pos.expand(len(q), T)
            key_pos = torch.cat((slot_positions(cache, pos), pos), 1)             # (B, n_slots + T)
            keys = torch.cat((cache["k"].to(k.dtype), k), 1)
            values = torch.cat((cache["v"].to(v.dtype), v), 1)
            store(cache, k, v, pos)
        distance = pos[:, :, None] - key_pos[:, None]               # (B or 1, T, keys)
        seen = (distance >= 0) & (distance < W) & (key_pos >= 0)[:, None]
        return softmax_attention(q, keys, values, mask=seen[:, None])


def slot_positions(cache, pos):
    """The position that each slot holds, (B,n_slots), before tokens at pos (B,T) are stored. Negative: the
    slot is empty. Position p is in slot p % n_slots: after position 5, four slots hold 4, 5, 2, 3."""
    n_slots, last = cache["k"].size(1), pos[:, :1] - 1
    return last - (last - torch.arange(n_slots, device=pos.device)) % n_slots


def store(cache, k, v, pos):
    """Write k and v (B,T,H_kv,D) into slots pos % n_slots; pos (B,T). Of more tokens than slots the last are
    stored. Keys are stored after RoPE, because their rotation depends on their own position alone."""
    n_slots, rows = cache["k"].size(1), torch.arange(len(pos), device=pos.device)[:, None]
    slots = pos[:, -n_slots:] % n_slots
    for name, new in (("k", k), ("v", v)):
        cache[name][rows, slots] = new[:, -n_slots:].to(cache[name].dtype)


# ---- linear-attention layer (paper eq. 18) -----------------------------------------------------------------


class Decay(NamedTuple):
    """A kind of linear layer: how its state fades, and which scan computes it. formula(z, H, device) gives
    log_decay for kernel.chunked_scan. z (B,T,H,width) is the output of the forget gate's Linear. If width is
    0 there is no such Linear, and z is None."""
    width: Callable                  # K -> outputs of the Linear per head and token
    formula: Callable                # (z, H, device) -> log_decay: (H,), (B,T,H) or (B,T,H,K), float32
    scan: Callable = chunked_scan     # a row may bring another recurrence with the same arguments

    def bias(self, share):
        """The bias of the Linear with which S keeps this share of itself at every token: a number, or a
        tensor of one per head."""
        return torch.logit(torch.as_tensor(share))


def lightning(z, H, device):
    """log gamma_h = -2^(-8h/H), h = 1..H (paper eq. 19, Lightning Attention), also where H is no power of
    two. Each head remembers for a time of its own, from 2^(8/H) tokens at the first to 256 at the last."""
    return -torch.exp2(-8.0 * torch.arange(1, H + 1, dtype=torch.float32, device=device) / H)


DECAYS = {
    "constant": Decay(lambda K: 0, lightning),
    "none": Decay(lambda K: 0, lambda z, H, device: torch.zeros(H, dtype=torch.float32, device=device)),
    "head": Decay(lambda K: 1, lambda z, H, device: F.logsigmoid(z)[..., 0]),
    "channel": Decay(lambda K: K, lambda z, H, device: F.logsigmoid(z)),
}


class LinearAttention(nn.Module):
    """y = (norm(o) * sigmoid(x W_z)) W_o, where o comes from the recurrence of kernel.chunked_scan.

    QK-norm bounds the key under which a token writes to S. The norm of o keeps its size steady as S grows. S
    is float32: a bf16 state can stop growing after a few hundred tokens. kernel.py says why, and why o has
    the scale K^-1/2."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.sizes = [c.n_head * c.key_dim, c.linear_kv_head * c.key_dim, c.linear_kv_head * c.head_dim,
                      c.n_head * c.head_dim if c.linear_gate else 0]
        self.qkvz = nn.Linear(c.n_embd, sum(self.sizes), bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.q_norm = RMSNorm(c.key_dim, eps=c.norm_eps) if c.linear_qk_norm else None
        self.k_norm = RMSNorm(c.key_dim, eps=c.norm_eps) if c.linear_qk_norm else None
        self.norm = RMSNorm(c.n_head * c.head_dim, eps=c.norm_eps) if c.linear_norm else None
        width = DECAYS[c.decay].width(c.key_dim)
        self.forget = nn.Linear(c.n_embd, c.n_head * width) if width else None

    def log_decay(self, x):
        """Log of the decay of each token of x (B,T,C), shaped as the row of DECAYS says."""
        H = self.config.n_head
        z = None if self.forget is None else self.forget(x).float().unflatten(-1, (H, -1))
        return DECAYS[self.config.decay].formula(z, H, x.device)

    def forward(self, x, where, cache=None):
        """x (B,T,C) -> (B,T,C). With a cache the tokens follow those its state has read."""
        return self.out(self.mix(x, where, cache))

    def mix(self, x, where, cache=None):
        """All but the output projection: x (B,T,C) -> gate * norm(o) (B,T,H*D)."""
        c = self.config
        q, k, v, z = self.qkvz(x).split(self.sizes, dim=-1)
        q, k = (t.unflatten(-1, (-1, c.key_dim)) for t in (q, k))                 # (B,T,H or fewer,K)
        v = v.unflatten(-1, (-1, c.head_dim))                                     # (B,T,H or fewer,V)
        q = make_heads(q, gain_of(self.q_norm), where.linear_rope, None, None, v.dtype)
        k = make_heads(k, gain_of(self.k_norm), where.linear_rope, None, None, v.dtype)
        if c.linear_kv_head < c.n_head:
            k, v = (t.repeat_interleave(c.n_head // c.linear_kv_head, dim=2) for t in (k, v))
        S = None if cache is None else cache["S"]
        scan = DECAYS[c.decay].scan
        o, S_new = scan(q, k, v, self.log_decay(x), S, scale=c.key_dim ** -0.5)   # (B,T,H,V), (B,H,K,V)
        if cache is not None:
            S.copy_(S_new)
        y = gated(o.flatten(2), gain_of(self.norm), z if c.linear_gate else None)
        return y.to(v.dtype)                                       # the scan of float16 returns float32


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
    """All that a model remembers of the tokens it has read, allocated once and updated in place. pos (B,)
    int64: tokens that each row has read. layers: an attention layer has k and v (B,n_slots,H_kv,D), a linear
    layer S (B,H,K,V) float32. With a window the slots are a ring buffer: new tokens overwrite the oldest."""

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        def zeros(*shape, dtype=dtype):
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)
        c = config
        n_slots = min(max_tokens, c.window or max_tokens)
        self.max_tokens, self.layers = max_tokens, []
        self.pos = zeros(dtype=torch.int64)
        for kind in c.layers:
            if kind == "A":
                self.layers.append({name: zeros(n_slots, c.n_kv_head, c.head_dim) for name in ("k", "v")})
            else:
                self.layers.append(dict(S=zeros(c.n_head, c.key_dim, c.head_dim, dtype=torch.float32)))

    def row(self, b):
        """A view of row b. Tokens that are read into the view change this state."""
        view = copy.copy(self)
        view.pos = self.pos[b:b + 1]
        view.layers = [{name: t[b:b + 1] for name, t in layer.items()} for layer in self.layers]
        return view

    def nbytes(self):
        """Bytes of S and bytes of keys and values, a pair."""
        size = {"S": 0, "k": 0, "v": 0}
        for layer in self.layers:
            for name, t in layer.items():
                size[name] += t.numel() * t.element_size()
        return size["S"], size["k"] + size["v"]


class HypeNet(nn.Module):
    """The whole model. HypeNet(config) has random weights; from_pretrained loads them."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if c.position == "learned":
            self.wpe = nn.Embedding(c.max_len, c.n_embd)
            if c.chunk:                              # like learned positions, added to the input
                self.chunk_embd = nn.Embedding(c.n_chunks, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, kind) for kind in c.layers)
        self.norm = make_norm(c)
        if not c.tied:
            self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for name, p in self.named_parameters():      # GPT-2's initialisation
            if p.dim() == 2:
                std = 0.02
                if name.endswith(("mixer.out.weight", "mlp.down.weight")):        # into the residual stream
                    std /= math.sqrt(2 * len(c.layers))
                nn.init.normal_(p, std=std)
            elif name.endswith("forget.bias"):       # S keeps 0.7 per token (the article's)
                nn.init.constant_(p, DECAYS[c.decay].bias(0.7))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def embed(self, idx, where):
        """Token embeddings, with the learned positions of a GPT-2 teacher: idx (B,T) -> x (B,T,C)."""
        c, x = self.config, self.wte(idx)
        if c.position == "learned" and c.chunk:
            x = x + self.wpe(where.pos % c.chunk) + self.chunk_embd(where.pos // c.chunk)
        elif c.position == "learned" and c.attn_position:
            x = x + self.wpe(where.pos)
        return x

    def place(self, idx, state=None, offset=None):
        """The Where of idx (B,T). ValueError if the state is full, or if a position has no embedding. offset
        (B,) is for training: it is not checked, and not read with a state."""
        T, held = idx.size(1), 0                             # held: tokens that the longest row has read
        pos = torch.arange(T, device=idx.device)[None]                            # (1,T)
        if state is not None:
            held = int(state.pos.max())
            pos = state.pos[:, None] + pos                                        # (B,T)
            if held + T > state.max_tokens:
                raise ValueError(f"{held + T:,} tokens per row; the state has room for {state.max_tokens:,}")
        elif offset is not None:                     # varied starts train the embeddings of all chunks
            pos = pos + offset[:, None]
        self.check_positions(held + T)
        return locate(self.config, pos)

    def check_positions(self, n):
        c = self.config
        if n > c.limit():
            what = f"chunks of {c.chunk}" if c.chunk else "learned positions"
            raise ValueError(f"{n:,} tokens are more than the {c.limit():,} that this model's {what} reach")

    def hidden(self, idx, state=None, offset=None, all_blocks=False):
        """idx (B,T) -> x (B,T,C), after the final norm. The first token is at position 0 or at offset (B,).
        The caller keeps offset in range. With a state, tokens follow those that each row has read, and no
        gradient flows. all_blocks: return a list, the output of each block (B,T,C) and, last, x."""
        with torch.set_grad_enabled(state is None and torch.is_grad_enabled()):
            where = self.place(idx, state, offset)
            x = self.embed(idx, where)
            xs = []
            for i, block in enumerate(self.blocks):
                x = block(x, where, None if state is None else state.layers[i])
                if all_blocks:
                    xs.append(x)
            if state is not None:
                state.pos += idx.size(1)
            x = self.norm(x)
            return [*xs, x] if all_blocks else x

    def head_weight(self):
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def head(self, x):
        """x (...,C) -> logits (...,vocab_size)."""
        return F.linear(x, self.head_weight())

    def forward(self, idx, targets=None, state=None, all_logits=False, offset=None):
        """idx (B,T) -> logits (B,T,vocab_size), loss. With a state, logits are (B,1,vocab_size), those of the
        last position; all_logits or targets ask for all. loss: mean cross-entropy in nats, None without
        targets (B,T)."""
        x = self.hidden(idx, state, offset)
        if state is not None and not all_logits and targets is None:
            x = x[:, -1:]
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss

    def init_state(self, batch_size, max_tokens):
        """An empty State for rows of at most max_tokens, of the model's device and dtype."""
        w = self.wte.weight
        return State(self.config, batch_size, max_tokens, w.device, w.dtype)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=0):
        """Continue prompts, a list of id lists of any lengths. Returns max_new_tokens ids for each prompt.
        Each prompt is read alone into its row of the state, so no row needs padding. temperature 0 is
        greedy."""
        device = self.wte.weight.device
        refuse(max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        refuse(not prompts or not all(prompts), "every prompt needs at least one token")
        rng = torch.Generator(device).manual_seed(seed)
        state = self.init_state(len(prompts), max(map(len, prompts)) + max_new_tokens)
        logits = torch.cat([self(torch.tensor([prompt], device=device), state=state.row(b))[0]
                            for b, prompt in enumerate(prompts)])                 # (B,1,vocab_size)
        new = []
        for _ in range(max_new_tokens):
            if new:
                logits, _ = self(new[-1][:, None], state=state)
            new.append(sample(logits[:, -1], temperature, top_k, top_p, rng))     # (B,)
        return torch.stack(new, 1).tolist()

    # ---- files ----

    def save_pretrained(self, path, dtype=None):
        """Write config.json, then model.safetensors (in dtype, or as is) to path, each whole or not at all.
        So a new folder never has weights without their config. ValueError if a weight is not finite."""
        from safetensors.torch import save_file
        os.makedirs(path, exist_ok=True)
        weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.state_dict().items()}
        check_weights(weights, path)
        config = json.dumps(dict(model_type="hypenet", **asdict(self.config)), indent=1) + "\n"
        write_file(os.path.join(path, "config.json"), config)
        write_file(os.path.join(path, "model.safetensors"), lambda tmp: save_file(weights, tmp))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a folder of save_pretrained. Weights are converted to dtype. ValueError, in one line, if
        config and weights do not match or a weight is not finite. support/pretrained.py loads other formats
        too, and says more of damaged files."""
        from safetensors.torch import load_file
        with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
            config = read_config(json.load(f), path)
        with Weightless():                           # the weights are about to be replaced
            model = cls(config)
        weights = load_file(os.path.join(path, "model.safetensors"), device=str(device))
        wanted = {name: p.shape for name, p in model.state_dict().items()}
        wrong = wanted.items() ^ {(name, w.shape) for name, w in weights.items()}
        names = ", ".join(sorted({name for name, _ in wrong})[:3])
        refuse(wrong, f"{path}: weights do not match config.json: see {names}")
        check_weights(weights, path)
        model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
        return model.eval()


def sample(logits, temperature=0.0, top_k=None, top_p=None, rng=None):
    """Draw ids (B,) from logits (B,vocab_size). It never waits for the GPU, so a CUDA graph can record it."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)   # else a tiny temperature would overflow
    logits = logits / max(temperature, 1e-30)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None:                            # keep the fewest ids whose probability reaches top_p
        ordered, ids = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered)
    waits = torch.empty_like(probs).exponential_(generator=rng)  # a race: id i wins in proportion to probs[i]
    return (probs / waits.clamp(min=1e-30)).argmax(-1)           # a wait of 0 would make 0 / 0


def write_file(path, content):
    """Write a file whole or not at all, even if the machine goes down: under a temporary name, which then
    becomes path. content: text, or a function that writes the file of a given name."""
    tmp = f"{path}.tmp{os.getpid()}"
    try:
        with open(tmp, "w", encoding="utf-8") as f:
            mode = os.fstat(f.fileno()).st_mode
            f.write("" if callable(content) else content)
        if callable(content):
            content(tmp)
        os.chmod(tmp, mode)                          # safetensors makes files that only their owner can read
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as error:
        error.filename = error.filename or path      # the error of a full disk names no file
        raise
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)
    with suppress(OSError):                          # the folder stores the name; some systems cannot sync it
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_config(given, path):
    """The HypeNetConfig of a config.json of save_pretrained. ValueError if any field is unknown or absent."""
    refuse(type(given) is not dict, f"{path}/config.json: this is no config; copy it again")
    given = {field: value for field, value in given.items() if field != "model_type"}
    wrong = sorted({f.name for f in fields(HypeNetConfig)} ^ given.keys())
    refuse(wrong, f"{path}/config.json: fields are unknown or missing: {', '.join(wrong)}; copy it again")
    try:
        return HypeNetConfig(**given)
    except (ValueError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path}/config.json: {problem}") from None


class Weightless(TorchFunctionMode):
    """Within it a new model has neither memory for its weights (device "meta") nor values. To draw values on
    that device PyTorch imports its compiler, which takes seconds. So nothing is drawn."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        with torch.device("meta"):
            return function(*args, **(kwargs or {}))


def check_weights(weights, path):
    for name, w in weights.items():
        refuse(not w.is_floating_point() or not w.isfinite().all(),
               f"{path}: {name} is not of finite floating-point numbers; copy it again, or train anew")


# ---- checks of a config ------------------------------------------------------------------------------------

CHOICES = dict(norm=("rms", "layer"), mlp=("swiglu", "gelu"), position=("rope", "learned"), decay=(*DECAYS,))
SCALINGS = {                         # fields of rope_scaling that each rope_type must have, and may have
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"))}
SIZES = ("vocab_size", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "max_len", "key_dim",
         "linear_kv_head", "window", "chunk")


def check(config):
    """ValueError, in one line, for values of a config that are wrong or do not go together."""
    c = config
    for f in fields(c):
        check_type(f.name, getattr(c, f.name), f.type)
    for name, allowed in CHOICES.items():
        value = getattr(c, name)
        refuse(value not in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    refuse(not c.layers or set(c.layers) - set("AL"),
           f'layers is {c.layers!r}; one letter per layer, "A" attention, "L" linear')
    for name in SIZES:
        value = getattr(c, name)
        refuse(value is not None and value < 1, f"{name} is {value}; it must be at least 1")
    for name in ("n_kv_head", "linear_kv_head"):
        refuse(c.n_head % getattr(c, name), f"n_head {c.n_head} is no multiple of {name} {getattr(c, name)}")
    for name, used in dict(head_dim=c.position == "rope", key_dim=c.linear_rope).items():
        refuse(used and getattr(c, name) % 2,
               f"{name} is {getattr(c, name)}; RoPE pairs channels, so it must be even")
    refuse(c.logit_base is not None and c.logit_base <= 1,
           f"logit_base is {c.logit_base}; s_t = log(t + a) / log(a) needs a > 1")
    refuse(c.rope_theta <= 0, f"rope_theta is {c.rope_theta}; it must be positive")
    refuse(c.norm_eps < 0, f"norm_eps is {c.norm_eps}; it must not be negative")
    refuse((c.chunk is None) != (c.n_chunks == 0) or c.n_chunks < 0,
           f"chunk {c.chunk} and n_chunks {c.n_chunks}: give both or neither")
    refuse(c.position == "learned" and c.chunk and c.chunk > c.max_len,
           f"chunk {c.chunk}, n_chunks {c.n_chunks}, position learned: a chunk exceeds the {c.max_len} "
           "positions of max_len")
    refuse(c.chunk and not c.attn_position,
           f"chunk {c.chunk} and attn_position {c.attn_position}: chunks are positions of attention layers")
    if c.rope_scaling is not None:
        check_scaling(c.rope_scaling)


def check_type(name, value, kind):
    allowed = kind | int if kind in (float, float | None) else kind
    wrong = not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)  # True is an int
    refuse(wrong, f"{name} is {value!r}; its type is {getattr(kind, '__name__', kind)}")
    refuse(isinstance(value, float) and not math.isfinite(value), f"{name} is {value}; it must be finite")


def check_scaling(s):
    kind = s.get("rope_type")
    refuse(kind not in SCALINGS, f"rope_scaling has rope_type {kind!r}; allowed: {', '.join(SCALINGS)}")
    needed, allowed = SCALINGS[kind]
    for name in needed:
        refuse(name not in s, f"rope_scaling of rope_type {kind} lacks {name}")
    for name, value in s.items():
        refuse(name not in ("rope_type", *needed, *allowed),
               f"rope_scaling of rope_type {kind} has the unknown field {name}")
        number = type(value) in (int, float) and 0 < value < math.inf
        refuse(name not in ("rope_type", "truncate") and not number,
               f"rope_scaling has {name} {value!r}; it must be a positive number")
    refuse(type(s.get("truncate", True)) is not bool, "rope_scaling has truncate; allowed: true, false")
    refuse(kind == "llama3" and s["low_freq_factor"] >= s["high_freq_factor"],
           "rope_scaling: low_freq_factor must be below high_freq_factor")


def refuse(wrong, message):
    if wrong:
        raise ValueError(message)
