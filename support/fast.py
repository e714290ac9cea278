"""Fast generation: the tokens of HypeNet.generate, by kernels for one token at a time.

    stream(model, prompts, n)     yields the next ids of all rows, step by step
    prefill(model, prompt, state) reads a long prompt in segments of bounded memory
    read(model, idx, state)       what model.hidden(idx, state) gives
    fuse()                        compiles functions between matrix products, for training and long prompts

A generated token must read all weights, the state, the keys and the values once. Nothing else should cost
time. So three functions do the work of a layer on one token. fused_linear does norm, gate, Linear, activation
and residual sum. scan_token is the recurrence. attend_cache is attention to a long cache. A CUDA graph then
replays all layers, because hundreds of small kernels cost more to launch than to run.

Map: stream and Decoder first, then read and its attention, then the three functions, at last their kernels.
`serves` says whether the kernels of one token compute a model. Every other model is computed by torch.
"""
import math
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F

import hypenet
from hypenet import (
    DECAYS, Attention, Block, HypeNet, LinearAttention, normed, sample, softmax_attention, store)
from kernel import block_size, card, ceil_div, dot_dtype, output_dtype, triton
from support import heads

if triton:
    import triton.language as tl

    from kernel import dot, exp, load_tile, store_tile

TOKEN_DECAYS = ("constant", "none", "head", "channel")      # rows of hypenet.DECAYS that scan_token computes
PAST = 65536                         # most past keys per attention call
FEW = 4                              # largest batch for fused_linear; above, the library's product is faster


def has_kernels(x, *sizes):
    """Whether the kernels of a single token run where x lies, with heads of these sizes."""
    return triton is not None and x.is_cuda and max(sizes, default=1) <= 256


def is_known(block):
    """Whether a block computes what hypenet.Block says. Only then may faster code of this file replace it."""
    kinds = (Attention, LinearAttention)
    return type(block) is Block and type(block.mixer) in kinds and "forward" not in vars(block)


def serves(model, x):
    """Whether the kernels of a single token compute this model, for tensors that lie where x does."""
    c = model.config
    sizes = c.head_dim, c.key_dim
    return c.decay in TOKEN_DECAYS and all(map(is_known, model.blocks)) and has_kernels(x, *sizes)


# ---- generation --------------------------------------------------------------------------------------------


@torch.no_grad()
def stream(model, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None, n_vocab=None,
           segment=None, progress=None, state=None, never=(), graph=True):
    """Continue prompts, a list of id lists of any lengths: yields the next ids (B,) of all rows, again and
    again. Each row is read alone and unpadded into its slice of the state; then all rows go on together.

    temperature 0 is greedy; top_k and top_p drop unlikely ids. Ids from n_vocab on, and those in `never`, are
    not sampled. segment, progress: see prefill. graph: see Decoder. state: a State with one row per prompt,
    which may hold earlier tokens (default: a new one). The last id yielded is not in the state yet: start the
    next prompt with this id. ValueError for wrong arguments, when the first ids are drawn."""
    check_stream(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device = model.wte.weight.device
    rng = torch.Generator(device).manual_seed(seed) if seed is not None else None
    if state is None:
        state = model.init_state(len(prompts), max(map(len, prompts)) + max_new_tokens)
    if len(state.pos) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for a state of {len(state.pos)} rows; give one per row")
    ends = [held + len(prompt) for held, prompt in zip(state.pos.tolist(), prompts)]
    check_room(model, state, max(ends) + max_new_tokens - 1)
    logits = torch.cat([prefill(model, prompt, state.row(b), segment, progress)
                        for b, prompt in enumerate(prompts)])
    banned = torch.tensor(sorted(never), dtype=torch.int64, device=device)

    def pick(logits):
        logits = logits.index_fill(-1, banned, -math.inf) if never else logits
        return sample(logits[:, :n_vocab], temperature, top_k, top_p, rng)
    decoder = Decoder(model, state, logits[:, -1], pick, rng, graph)
    yield decoder.idx.clone()
    for _ in range(max_new_tokens - 1):
        yield decoder().clone()


def check_stream(model, prompts, max_new_tokens, temperature, top_k, top_p):
    """ValueError, in one line, for arguments of stream that are wrong."""
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    if lowest < 0 or highest >= model.config.vocab_size:
        raise ValueError(f"a prompt has ids from {lowest} to {highest}; allowed: 0 to "
                         f"{model.config.vocab_size - 1}, so its tokenizer is not this model's")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def check_room(model, state, n):
    """ValueError if a row of a state cannot hold n tokens, or the model does not know as many positions."""
    model.check_positions(n)
    if n > state.max_tokens:
        raise ValueError(f"{n:,} tokens per row; the state has room for {state.max_tokens:,}")


@torch.no_grad()
def prefill(model, prompt, state, segment=None, progress=None):
    """Read a prompt (a sequence of ids) into a state of one row, `segment` tokens at a time, to bound the
    memory of activations (default: 16,384 on a GPU, else 1,024). progress(n) is called after each segment.
    Returns logits (1,1,vocab_size) of the last token."""
    idx = torch.as_tensor(prompt, dtype=torch.int64).to(model.wte.weight.device)[None]
    check_room(model, state, int(state.pos.max()) + idx.size(1))
    for part in idx.split(segment or (16384 if idx.is_cuda else 1024), dim=1):
        x = read(model, part, state)
        if progress is not None:
            progress(part.size(1))
    return model.head(x[:, -1:])


class Decoder:
    """Generation, one token per row and call: the model reads idx (B,), then pick(logits) -> ids (B,) chooses
    the next ids. rng: the generator that pick draws from. The first ids are pick(logits), or 0 without
    logits.

    If `serves` knows the model, the second call records a CUDA graph, and later calls replay the graph. A
    graph replays fixed addresses, so tensors are updated in place. Positions, ids and random numbers live on
    the device. graph=False: never record."""

    def __init__(self, model, state, logits=None, pick=sample, rng=None, graph=True):
        self.model, self.state, self.pick, self.rng = model, state, pick, rng
        self.idx = torch.zeros_like(state.pos) if logits is None else pick(logits)
        self.held = int(state.pos.max())                     # tokens of the longest row, known to the host
        self.graph, self.calls = None, 0
        self.record = graph and serves(model, self.idx)

    def advance(self):
        logits = self.model.head(read(self.model, self.idx[:, None], self.state))
        self.idx.copy_(self.pick(logits[:, -1]))

    @torch.no_grad()
    def __call__(self):
        """Read the ids drawn last and draw the next: idx (B,), overwritten by the next call."""
        self.calls, self.held = self.calls + 1, self.held + 1
        check_room(self.model, self.state, self.held)
        if not self.record or self.calls == 1:               # the first call compiles the kernels
            self.advance()
            return self.idx
        if self.graph is None:
            graph, on_side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.idx.device)
            if self.rng is not None:
                graph.register_generator_state(self.rng)
            with torch.cuda.graph(graph, stream=on_side):    # only records; replay runs this call too
                self.advance()
            self.graph = graph
        self.graph.replay()
        return self.idx


# ---- reading -----------------------------------------------------------------------------------------------


@torch.no_grad()
def read(model, idx, state):
    """model.hidden(idx, state), faster: idx (B,T) -> x (B,T,C). T > 1 needs rows that hold equally many
    tokens, else ValueError."""
    if idx.size(1) == 1 and serves(model, idx):
        return read_token(model, idx, state)
    where = model.place(idx, state)
    start = int(state.pos.max())
    if idx.size(1) > 1 and (state.pos != start).any():
        raise ValueError("rows hold different numbers of tokens; read each through state.row(b)")
    x, y = model.embed(idx, where), None                     # the input of a block is x + y
    for block, cache in zip(model.blocks, state.layers):
        if not is_known(block):
            x, y = block(x if y is None else x + y, where, cache), None
            continue
        m = block.mixer
        x, h = summed(x, y, block.norm1)
        if isinstance(m, Attention):
            q, k, v, z = m.project(h, where)
            o = attend_past(m, q, k, v, where.pos, cache, start)
            y = m.out(hypenet.gated(o.flatten(2), None, z))
        else:
            y = m(h, where, cache)
        x, h = summed(x, y, block.norm2)
        y = block.mlp(h)
    state.pos += idx.size(1)
    return summed(x, y, model.norm)[1]


def attend_past(mixer, q, k, v, pos, cache, start):
    """What mixer.attend gives, without a copy of the cache: T tokens that follow `start` others."""
    B, T, H, D = q.shape
    if T == 1:
        return attend_one(q, k, v, pos, cache, start)
    if mixer.config.window is not None or not has_lse(q):
        return mixer.attend(q, k, v, pos, cache)
    # The new segment needs a causal mask, the past none: compute both, then merge. The past comes in parts of
    # fixed size, because cuDNN reuses its plan for a known length. A new length costs 40 ms.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o, lse = attend_lse(q, k, v, causal=True)
    for first in range(0, start, PAST):
        part = slice(first, min(start, first + PAST))
        past = (cache[name][:, part].transpose(1, 2).to(q.dtype) for name in ("k", "v"))
        o, lse = merged(o, lse, *attend_lse(q, *past))
    cache["k"][:, start:start + T], cache["v"][:, start:start + T] = k.transpose(1, 2), v.transpose(1, 2)
    return o.transpose(1, 2)


def attend_one(q, k, v, pos, cache, start):
    """One token per row, each row at its own position: a row attends to its own keys and no others."""
    store(cache, k, v, pos)
    keys, values, pos = cache["k"], cache["v"], pos[:, 0]                       # pos (B,)
    used, mine = min(start + 1, keys.size(1)), None
    if len(pos) > 1:                            # rows may differ in length, so each row masks its empty slots
        mine = (torch.arange(used, device=q.device) <= pos[:, None])[:, None, None]
    grouped = q.view(len(q), k.size(2), -1, q.size(-1)).transpose(1, 2)         # one copy of K/V per group
    o = softmax_attention(grouped, keys[:, :used].to(q.dtype), values[:, :used].to(q.dtype), mine)
    return o.transpose(1, 2).reshape(q.shape)


def has_lse(q):
    """Whether torch has an attention that returns the log of its denominator for such queries."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cpu" or q.is_cuda and half and q.size(-1) in range(8, 257, 8)


def attend_lse(q, k, v, causal=False):
    """Attention that also returns the log of its softmax denominator, which `merged` needs: q (B,H,T,D), k, v
    (B,H_kv,n,D) -> (B,H,T,D), (B,H,T). On Hopper cuDNN's attention is nearly twice as fast as torch's flash
    attention. Flash attention computes the shapes that cuDNN declines."""
    (B, H, T, D), H_kv, aten = q.shape, k.size(1), torch.ops.aten
    if q.is_cuda and D <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0):
        try:
            o, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
            return o, lse.view(B, H, T)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:                                    # no cuDNN, or too old a one
            pass
    if causal:
        k, v = (t.repeat_interleave(H // H_kv, dim=1) for t in (k, v))
    else:                                                       # stack a group's queries: no copies of K/V
        q = q.reshape(B, H_kv, -1, D)
    flash = aten._scaled_dot_product_flash_attention if q.is_cuda else (
        aten._scaled_dot_product_flash_attention_for_cpu)
    o, lse = flash(q, k, v, 0.0, causal)[:2]
    return o.reshape(B, H, T, D), lse.reshape(B, H, T)


def merged(o, lse, o_past, lse_past):
    """Attention to two parts of a context as one: o (B,H,T,D), each part with its weight in the softmax over
    both, and lse (B,H,T)."""
    w = torch.sigmoid(lse_past - lse).unsqueeze(-1)
    return (o * (1 - w) + o_past * w).to(o.dtype), torch.logaddexp(lse, lse_past)


# ---- one token on a GPU ------------------------------------------------------------------------------------


def read_token(model, idx, state):
    """read for one token per row, by the kernels below: idx (B,1) -> x (B,1,C). It never synchronises,
    so a CUDA graph can record read_token."""
    where = hypenet.locate(model.config, state.pos[:, None])
    x = model.embed(idx, where)[:, 0]
    for block, cache in zip(model.blocks, state.layers):
        x = token_block(block, x, where, cache)
    state.pos += 1
    return model.norm(x[:, None])


def token_block(block, x, where, cache):
    """A Block on one token per row, x (B,C), in five launches for a few rows (attention: seven; a forget
    gate: one more). One kernel does norm, gate, Linear, activation and residual sum."""
    m = block.mixer
    q, k, v, z = linear(m.qkvz, x, block.norm1).split(m.sizes, dim=-1)
    if isinstance(m, Attention):
        o = token_attention(m, q, k, v, where, cache)
    else:
        if m.forget is None:
            g = constant_log_decay(m.config.decay, m.config.n_head, x.device)
        else:
            g = linear(m.forget, x, block.norm1, act="logsigmoid")
        o = token_scan(m, q, k, v, g, where, cache)
    x = linear(m.out, o, getattr(m, "norm", None), gate=z if z.size(-1) else None, residual=x)
    h = linear(block.mlp.up, x, block.norm2, act="swiglu" if block.mlp.swiglu else "gelu")
    return linear(block.mlp.down, h, residual=x)


@lru_cache(None)                     # made once: five small kernels per layer and token cost time
@torch.inference_mode(False)
def constant_log_decay(decay, H, device):
    return DECAYS[decay].formula(None, H, device)


def token_attention(m, q, k, v, where, cache):
    """(B,H*D), (B,H_kv*D), (B,H_kv*D) of qkvz -> o (B,H*D): the kernels do norms, positions and s_t too."""
    c = m.config
    q, k, v = (t.view(len(t), 1, -1, c.head_dim) for t in (q, k, v))
    chunks = (m.chunk_embd.weight, c.chunk) if hasattr(m, "chunk_embd") else None
    return attend_cache(q, k, v, cache["k"], cache["v"], where.pos, where.s_t, gains(m), c.norm_eps,
                        where.attn_rope, chunks).flatten(1)


def token_scan(m, q, k, v, g, where, cache):
    """(B,H*K), (B,H_kv*K), (B,H_kv*V) of qkvz -> o (B,H*V); g: log decay (H,), (B,H) or (B,H*K)."""
    c = m.config
    if m.forget is not None:
        g = g[:, None].unflatten(-1, (c.n_head, -1)) if c.decay == "channel" else g[:, None]
    q, k, v = (t.view(len(t), 1, -1, n) for t, n in ((q, c.key_dim), (k, c.key_dim), (v, c.head_dim)))
    return scan_token(q, k, v, g, cache["S"], c.key_dim ** -0.5, gains(m), c.norm_eps,
                      where.linear_rope).flatten(1)


def gains(mixer):
    """Gains of the norms of a mixer's q and k; None, None without QK-norm."""
    return (None, None) if mixer.q_norm is None else (mixer.q_norm.weight, mixer.k_norm.weight)


def linear(layer, x, norm=None, gate=None, act=None, residual=None):
    """fused_linear of a Linear and the norm before it. Many rows are multiplied by the library."""
    if len(x) <= FEW:
        weights, eps = ((None, None), 0.0) if norm is None else ((norm.weight, norm.bias), norm.eps)
        return fused_linear(x, layer.weight, layer.bias, weights, eps, gate, act, residual)
    y = layer(hypenet.gated(x if norm is None else norm(x), None, gate).to(layer.weight.dtype))
    if act == "logsigmoid":
        y = F.logsigmoid(y.float())
    elif act is not None:
        y = hypenet.activated(y, act == "swiglu")
    return y if residual is None else residual + y


# ---- compiling the functions between matrix products -------------------------------------------------------


def product_dtype(x):
    """The dtype in which a Linear multiplies x. A compiled norm casts its output: one kernel less."""
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype


def cast_normed(x, weight, bias, eps):
    return normed(x, weight, bias, eps).to(product_dtype(x))


def add_normed(x, y, weight, bias, eps):
    """x + y, and its norm."""
    x = x + y
    return x, cast_normed(x, weight, bias, eps)


def summed(x, y, norm):
    """x + y, and the norm of the sum. y may be None."""
    return (x, norm(x)) if y is None else add_normed(x, y, norm.weight, norm.bias, norm.eps)


def fused_block(self, x, where, cache=None):
    """Block.forward, with each sum and the norm after the sum as one kernel. x may be a pair, whose sum is
    the input (the second None: no sum yet). Then the output is such a pair."""
    is_pair = isinstance(x, tuple)
    x, h = summed(*(x if is_pair else (x, None)), self.norm1)
    x, h = summed(x, self.mixer(h, where, cache), self.norm2)
    y = self.mlp(h)
    return (x, y) if is_pair else x + y


def fused_hidden(self, idx, state=None, offset=None, all_blocks=False):
    """HypeNet.hidden of whole sequences: the last sum of a block and the first norm of the next are one
    kernel."""
    if state is not None or not all(type(block) is Block for block in self.blocks):
        return PLAIN["HypeNet.hidden"](self, idx, state, offset, all_blocks)
    where = self.place(idx, offset=offset)
    x = self.embed(idx, where), None
    xs = []
    for block in self.blocks:
        x = block(x, where)
        if all_blocks:
            x = x[0] + x[1], None
            xs.append(x[0])
    x = summed(*x, self.norm)[1]
    return [*xs, x] if all_blocks else x


PLAIN = {}                           # the functions as written, by module and name


def compiled(f, backend):
    """f by torch.compile. A call whose optional arguments are None computes nothing, and stays outside:
    torch gives a function up for good if it finds nothing to compile."""
    fast = torch.compile(f, backend=backend)

    def call(x, *args):
        idle = all(arg is None for arg in args[:4])
        return f(x, *args) if idle else fast(x, *args)
    return call


def heads_by_kernel(otherwise):
    """make_heads by the kernel of support/heads.py where it serves, else by the function `otherwise`."""
    def call(x, norm, cos_sin, embd, s_t, dtype):
        if (norm or cos_sin) and heads.serves(x, embd, s_t, dtype):
            return heads.Heads.apply(x, *(norm or (None, 0.0)), *(cos_sin or (None, None)))
        return otherwise(x, norm, cos_sin, embd, s_t, dtype)
    return call


def fuse(*more, backend="inductor"):
    """Let torch.compile make one kernel (and one for gradients) of each function between matrix products, for
    all models of this process. more: pairs (globals of a module, name of a function there) to compile as
    well. backend None: undo.

    Compiling takes up to a minute in all, in the first calls. Training on a GPU and reading millions of
    tokens repay this time. A function that cannot be compiled runs as written, with a warning of torch."""
    if backend:
        warnings.filterwarnings("ignore", message="\nOnline softmax is disabled")
        torch._dynamo.config.suppress_errors = True
        name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, name, 64)          # each shape, dtype and grad mode compiles once more
    of_model = [(vars(hypenet), name) for name in ("normed", "make_heads", "gated", "activated")]
    for space, name in (*of_model, (globals(), "add_normed"), (globals(), "merged"), *more):
        plain = PLAIN.setdefault((space["__name__"], name), space[name])
        written = cast_normed if backend and plain is normed else plain
        space[name] = compiled(written, backend) if backend else plain
    if backend:
        hypenet.make_heads = heads_by_kernel(hypenet.make_heads)
    for owner, name, fast in ((Block, "forward", fused_block), (HypeNet, "hidden", fused_hidden)):
        plain = PLAIN.setdefault(f"{owner.__name__}.{name}", getattr(owner, name))
        setattr(owner, name, fast if backend else plain)


# ---- the three functions of a token ------------------------------------------------------------------------


def scan_token(q, k, v, log_decay, state, scale=1.0, norms=(None, None), eps=0.0, rope=None):
    """One token of kernel.chunked_scan, in place: q (B,1,H,K), k (B,1,H_kv,K), v (B,1,H_kv,V), where H / H_kv
    heads share a k and a v; log_decay (H,), (B,1,H) or (B,1,H,K); state (B,H,K,V) float32, contiguous, read
    and overwritten once. The kernel also does what comes before: RMSNorm of q and k with gains `norms` (K,),
    and RoPE by rope = cos, sin (B,1,1,K/2). Returns o (B,1,H,V) in kernel.output_dtype(v). No
    gradient flows."""
    (B, T, H, K), (_, _, H_kv, V) = q.shape, v.shape
    assert T == 1 and state.shape == (B, H, K, V) and state.is_contiguous(), (q.shape, state.shape)
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "the last stride of q, k, v must be 1"
    g = log_decay if log_decay.dim() == 4 else log_decay[..., None].expand(B, 1, H, 1)
    o, BLOCK_V = v.new_empty(B, 1, H, V, dtype=output_dtype(v)), min(16, block_size(V))
    with torch.cuda.device_of(q):
        scan_token_kernel[(B * H, ceil_div(V, BLOCK_V))](
            q, k, v, g, state, o, *norms, *_cos_sin(rope), H, H // H_kv, scale, eps,
            *(n for x in (q, k, v, g) for n in x.stride()[::2]), g.stride(3) if g.shape[-1] > 1 else 0,
            K=K, V=V, BLOCK_K=block_size(K), BLOCK_V=BLOCK_V, **_early(q.device))
    return o


def attend_cache(q, k, v, keys, values, pos, s=None, norms=(None, None), eps=0.0, rope=None, chunks=None):
    """One token of attention: k, v (B,1,H_kv,D) go into their slot, pos % n_slots, of the cache keys, values
    (B,n_slots,H_kv,D), of equal strides. Then q (B,1,H,D) attends to the min(pos + 1, n_slots) slots in use.
    pos (B,1) int64 is the token's position; s (B,1) multiplies the queries; norms, eps, rope: as in
    scan_token. chunks: embeddings (n,H*D) of chunks and the tokens in a chunk; the token's embedding is added
    to q, and to k as to the first q of its group. Returns o (B,1,H,D).

    Few heads would leave the GPU idle, so several programs split each head's cache. Their results are merged
    by the denominators of their softmaxes. The number of used slots lives on the device. The call can
    therefore be part of a CUDA graph."""
    (B, _, H, D), (_, n_slots, H_kv, _) = q.shape, keys.shape
    assert keys.stride() == values.stride() and {x.stride(3) for x in (q, k, v, keys)} == {1}
    R, BLOCK_D = H // H_kv, block_size(D)
    BLOCK_S = 64 if BLOCK_D * keys.element_size() <= 256 else 32       # keys per tile
    n_splits = min(ceil_div(n_slots, BLOCK_S), ceil_div(4 * card(q.device)[1], B * H_kv), 128)
    o, q_out = q.new_empty(q.shape), q.new_empty(q.shape)
    part = q.new_empty(B, H_kv, n_splits, R, D, dtype=torch.float32)
    lse = q.new_empty(B, H_kv, n_splits, R, dtype=torch.float32)
    early = _early(q.device)
    with torch.cuda.device_of(q):
        cache_kernel[(B, H + H_kv)](
            q, k, v, keys, values, q_out, pos, s, *norms, *_cos_sin(rope), *(chunks or (None, 1)), H, H_kv,
            n_slots, eps, *(n for x in (q, k, v) for n in x.stride()[::2]), *keys.stride()[:3], D=D,
            BLOCK_D=BLOCK_D, **early)
        attend_kernel[(B * H_kv, n_splits)](
            q_out, keys, values, pos, part, lse, H_kv, n_slots, n_splits, D ** -0.5, *keys.stride()[:3], R=R,
            D=D, DTYPE=dot_dtype(keys), BLOCK_R=block_size(R), BLOCK_D=BLOCK_D, BLOCK_S=BLOCK_S, **early)
        merge_kernel[(B * H_kv, R)](part, lse, o, n_splits, R=R, D=D, BLOCK_D=BLOCK_D,
                                    BLOCK_N=block_size(n_splits), **early)
    return o


def fused_linear(x, weight, bias=None, norm=(None, None), eps=0.0, gate=None, act=None, residual=None):
    """act((norm(x) * sigmoid(gate)) weight^T + bias) + residual for a few tokens. x, gate (B,K_in) with any
    stride over B; weight (N,K_in), or (2N,K_in) where act is "swiglu" (else "gelu", "logsigmoid" or None);
    norm: gain (K_in,) of an RMSNorm and None, or gain and bias of a LayerNorm; residual (B,N). Returns (B,N)
    in the dtype of residual, else of x. One launch reads the weights once. With so few tokens, reading the
    weights is the cost of a layer."""
    (B, K), N = x.shape, weight.shape[0] // (2 if act == "swiglu" else 1)
    assert x.stride(1) == 1 and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    BLOCK_K, matrices = block_size(K), 2 if act == "swiglu" else 1
    BLOCK_N = max(1, 2 ** 15 // (BLOCK_K * matrices * weight.element_size()))  # 32 KB of weights per program
    y = (x if residual is None else residual).new_empty(B, N)
    with torch.cuda.device_of(x):
        linear_kernel[(ceil_div(N, BLOCK_N),)](
            x, weight, bias, *norm, gate, residual, y, B, N, eps, x.stride(0),
            0 if gate is None else gate.stride(0), K=K, ACT=act or "", BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=8, **_early(x.device))
    return y


def _cos_sin(rope):
    """cos and sin (B,1,1,half), or None, None without RoPE."""
    return (None, None) if rope is None else (x.contiguous() for x in rope)


@lru_cache
def _early(device):
    """Options of the kernels of one token. On Hopper and later cards a kernel is launched before the previous
    kernel has ended (programmatic dependent launch)."""
    if (device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)
            and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")):
        return dict(EARLY=True, launch_pdl=True)
    return dict(EARLY=False)


if triton:
    # ------------------------------------------------------------------ triton: one token
    # The cost of a token is to read the weights, the state and the cache once. All other work must share a
    # launch. So the kernel that reads a tensor also does its norm, gate, RoPE or sum. A layer takes five
    # launches: Linear, state and three Linears (attention: seven).
    @triton.jit
    def await_previous(EARLY: tl.constexpr):
        """Launch the next kernel, then wait until the previous kernel has ended. Code above this call
        overlaps with the previous kernel, so the code may load weights only. A kernel without weights calls
        await_previous first, to launch the next kernel early. EARLY: see _early."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def load_head(x_ptr, norm_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """One head's q or k of one token (D,) in float32, after RMSNorm (norm_ptr: gain) and RoPE."""
        d = tl.arange(0, BLOCK_D)
        HALF: tl.constexpr = D // 2
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        other = tl.where(d < HALF, d + HALF, d - HALF)                      # d and d + HALF are a pair
        if cos_ptr is not None:                                             # load first, then compute
            y = tl.load(x_ptr + other, mask=d < D, other=0.0).to(tl.float32)
            cos = tl.load(cos_ptr + d % HALF, mask=d < D, other=0.0)
            sin = tl.load(sin_ptr + d % HALF, mask=d < D, other=0.0)
        if norm_ptr is not None:
            gain = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            if cos_ptr is not None:
                y *= tl.load(norm_ptr + other, mask=d < D, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            x *= r * gain
            if cos_ptr is not None:
                y *= r
        if cos_ptr is not None:
            x = x * cos + tl.where(d < HALF, -y, y) * sin
        return x

    @triton.jit
    def scan_token_kernel(
        q_ptr, k_ptr, v_ptr, g_ptr, S_ptr, o_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr,
        H, per_kv, scale, eps,
        stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, stride_gk,
        K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
    ):
        """One token: S = e^g * S + k^T v in place, o = scale * q S; per_kv heads share a k and a v."""
        await_previous(EARLY)
        bh = tl.program_id(0).to(tl.int64)
        b, h = bh // H, bh % H
        keys = tl.arange(0, BLOCK_K)
        vals = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        if cos_ptr is not None:
            cos_ptr += b * (K // 2)
            sin_ptr += b * (K // 2)
        at = bh * K * V + keys[:, None] * V + vals[None, :]
        mask = (keys < K)[:, None] & (vals < V)[None, :]
        S = tl.load(S_ptr + at, mask=mask, other=0.0)
        h_kv = h // per_kv
        q = load_head(q_ptr + b * stride_qb + h * stride_qh, q_norm_ptr, cos_ptr, sin_ptr, eps, K, BLOCK_K)
        k = load_head(k_ptr + b * stride_kb + h_kv * stride_kh, k_norm_ptr, cos_ptr, sin_ptr, eps, K, BLOCK_K)
        v = tl.load(v_ptr + b * stride_vb + h_kv * stride_vh + vals, mask=vals < V, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + b * stride_gb + h * stride_gh + keys * stride_gk, mask=keys < K, other=0.0)
        S = exp(g.to(tl.float32))[:, None] * S + k[:, None] * v[None, :]
        tl.store(S_ptr + at, S, mask=mask)
        o = scale * tl.sum(q[:, None] * S, 0)
        tl.store(o_ptr + bh * V + vals, o.to(o_ptr.dtype.element_ty), mask=vals < V)

    @triton.jit
    def cache_kernel(
        q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, q_out_ptr, pos_ptr, s_ptr, q_norm_ptr, k_norm_ptr, cos_ptr,
        sin_ptr, embd_ptr, chunk, H, H_kv, n_slots, eps, stride_qb, stride_qh, stride_kb, stride_kh,
        stride_vb, stride_vh, stride_cb, stride_cs, stride_ch, D: tl.constexpr, BLOCK_D: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """One token of an attention layer: stores k and v in the cache, prepares q (times s_t, if given)."""
        await_previous(EARLY)
        b, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
        pos = tl.load(pos_ptr + b)
        if cos_ptr is not None:
            cos_ptr += b * (D // 2)
            sin_ptr += b * (D // 2)
        if embd_ptr is not None:                                            # k: as its group's first head
            embd_ptr += (pos // chunk * H + tl.where(head < H, head, (head - H) * (H // H_kv))) * D
        if head < H:
            q_ptr += b * stride_qb + head * stride_qh
            q = load_head(q_ptr, q_norm_ptr, cos_ptr, sin_ptr, eps, D, BLOCK_D)
            if embd_ptr is not None:
                q += tl.load(embd_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            if s_ptr is not None:
                q *= tl.load(s_ptr + b)
            tl.store(q_out_ptr + (b * H + head) * D + d, q.to(q_out_ptr.dtype.element_ty), mask=d < D)
        else:
            g = head - H
            slot = b * stride_cb + pos % n_slots * stride_cs + g * stride_ch
            k_ptr += b * stride_kb + g * stride_kh
            k = load_head(k_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps, D, BLOCK_D)
            if embd_ptr is not None:
                k += tl.load(embd_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + b * stride_vb + g * stride_vh + d, mask=d < D, other=0.0)
            tl.store(keys_ptr + slot + d, k.to(keys_ptr.dtype.element_ty), mask=d < D)
            tl.store(values_ptr + slot + d, v.to(values_ptr.dtype.element_ty), mask=d < D)

    @triton.jit
    def linear_kernel(
        x_ptr, w_ptr, bias_ptr, norm_ptr, shift_ptr, gate_ptr, residual_ptr, y_ptr, B, N, eps,
        stride_xb, stride_zb, K: tl.constexpr, ACT: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
    ):
        """y = act(W (norm(x) * sigmoid(z)) + bias) + residual, a few whole rows of W (N,K) per program. The
        program loads its rows once, before await_previous, then multiplies one token after the other. ACT
        swiglu reads a second matrix N rows further down."""
        n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        at, inside = n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + at, mask=inside, other=0.0)
        if ACT == "swiglu":
            w_up = tl.load(w_ptr + tl.cast(N, tl.int64) * K + at, mask=inside, other=0.0)
        if norm_ptr is not None:
            gain = tl.load(norm_ptr + k, mask=k < K, other=0.0)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + k, mask=k < K, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            if ACT == "swiglu":
                bias_up = tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        await_previous(EARLY)
        for b in range(B):
            b = tl.cast(b, tl.int64)
            x = tl.load(x_ptr + b * stride_xb + k, mask=k < K, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                z = tl.load(gate_ptr + b * stride_zb + k, mask=k < K, other=0.0)
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
            if shift_ptr is not None:                                       # a LayerNorm
                x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
            if norm_ptr is not None:
                x *= tl.rsqrt(tl.sum(x * x, 0) / K + eps) * gain.to(tl.float32)
            if shift_ptr is not None:
                x += shift.to(tl.float32)
            if gate_ptr is not None:
                x *= 1 / (1 + exp(-z.to(tl.float32)))
            y = tl.sum(w.to(tl.float32) * x[None, :], 1)
            if bias_ptr is not None:
                y += bias
            if ACT == "swiglu":
                up = tl.sum(w_up.to(tl.float32) * x[None, :], 1)
                if bias_ptr is not None:
                    up += bias_up
                y *= up / (1 + exp(-y))
            elif ACT == "logsigmoid":
                y = tl.minimum(y, 0.0) - tl.log(1 + exp(-tl.abs(y)))
            elif ACT == "gelu":                                             # its tanh form
                y /= 1 + exp(-1.5957691216057308 * (y + 0.044715 * y * y * y))
            if residual_ptr is not None:
                y += residual
            tl.store(y_ptr + b * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)

    @triton.jit
    def attend_kernel(
        q_ptr, k_ptr, v_ptr, pos_ptr, part_ptr, lse_ptr, H_kv, n_slots, n_splits, scale,
        stride_kb, stride_ks, stride_kh, R: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
    ):
        """The R queries of one K/V head attend to one share of the head's cache. Writes the output and
        the log of the softmax denominator."""
        await_previous(EARLY)
        bg, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, g = bg // H_kv, bg % H_kv
        used = tl.minimum(tl.load(pos_ptr + b) + 1, n_slots)
        share = tl.cdiv(tl.cdiv(used, BLOCK_S), n_splits) * BLOCK_S         # slots per program: whole blocks
        begin, end = split * share, tl.minimum((split + 1) * share, used)
        r, dim, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
        k_ptr += b * stride_kb + g * stride_kh
        v_ptr += b * stride_kb + g * stride_kh
        q = load_tile(q_ptr + bg * R * D, r, D, dim, R, D)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        below, o = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for first in range(begin, end, BLOCK_S):
            left = end - first
            k = load_tile(k_ptr + first * stride_ks, s, stride_ks, dim, left, D)
            v = load_tile(v_ptr + first * stride_ks, s, stride_ks, dim, left, D)
            scores = dot(q, tl.trans(k), DTYPE) * scale
            scores = tl.where((s < left)[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            p, fade = exp(scores - higher[:, None]), exp(top - higher)
            below = fade * below + tl.sum(p, 1)
            o = fade[:, None] * o + dot(p, v, DTYPE)
            top = higher
        at = (bg * n_splits + split) * R
        o = tl.where((below > 0)[:, None], o / below[:, None], 0.0)         # a share may be empty
        store_tile(part_ptr + at * D, r, D, dim, R, D, o)
        tl.store(lse_ptr + at + r, tl.where(below > 0, top + tl.log(below), float("-inf")), mask=r < R)

    @triton.jit
    def merge_kernel(part_ptr, lse_ptr, o_ptr, n_splits, R: tl.constexpr, D: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr):
        """Sums the shares of one query, each times its weight in the softmax over all keys."""
        await_previous(EARLY)
        bg, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
        n, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        at = (bg * n_splits + n) * R + r
        lse = tl.load(lse_ptr + at, mask=n < n_splits, other=float("-inf"))
        w = exp(lse - tl.max(lse, 0))
        part = tl.load(part_ptr + at[:, None] * D + dim[None, :],
                       mask=(n < n_splits)[:, None] & (dim < D)[None, :], other=0.0)
        o = tl.sum(w[:, None] * part, 0) / tl.sum(w, 0)
        tl.store(o_ptr + (bg * R + r) * D + dim, o.to(o_ptr.dtype.element_ty), mask=dim < D)
