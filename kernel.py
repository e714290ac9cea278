"""
The scan: the recurrence that every linear layer computes.

Each head has a state S of K x V numbers. At every token the state decays, and the token's key and value are
written into the state. Then the token's query reads the state (arXiv 2601.22156, eq. 5, 6 and 18):

    S_t = diag(e^(g_t)) S_{t-1} + k_t^T v_t         g_t = log_decay_t <= 0
    o_t = scale * q_t S_t                           q_t, k_t, v_t: row vectors of K, K and V numbers

g_t has K numbers, one per key channel, or one number for the whole head. A scan of T tokens takes time
proportional to T, and its state has a fixed size. Attention needs time T^2 and keeps all keys and values.
Read this file in its order:

    scan_sequential    the definition, one token after another
    scan_torch         the same result from matrix products, chunk by chunk, in plain PyTorch, derived below
    chunked_scan       the function that other files call: checks its arguments and picks a form
    the gradient       a comment: the gradient of a scan is three more scans
    the Triton scan    the same chunks as GPU kernels. The method is complete before; skip on a first reading.

Chunks. The definition makes T tiny products that wait for each other. Both fast forms cut the sequence into
chunks of M tokens. Write G_ij = g_{j+1} + .. + g_i for the log of the decay from token j to token i. Unroll
the recurrence over the tokens 1 .. M of a chunk that starts with the state S_0:

    S_M  = e^(G_M0) * S_0  +  sum_j  e^(G_Mj) * k_j^T v_j
    o_i  = scale * ( (q_i * e^(G_i0)) S_0  +  sum_{j <= i} A_ij v_j )
    A_ij = sum_c  q_ic k_jc e^(G_ij,c)                             c = 1 .. K, the key channels

P_i = G_i0 (the past) sums g from the first token of the chunk through i. F_j = G_Mj (the future) sums g after
j. Let the matrices Q, K, V, O, P and F have one row per token, and let * multiply elementwise. P_M has one
number per channel, which scales a row of S_0. With one decay per head, P_M is one number. The start state of
each chunk needs the previous one. Everything else runs in parallel, and all but A is plain matrix products:

    O = scale * ( (Q * e^P) S_0 + A V )             S_M = e^(P_M) * S_0 + (K * e^F)^T V

The usual form of A is one product, (Q * e^P)(K * e^-P)^T. But e^-P can overflow. Another form takes e^(P_i -
P_j). The difference of two large sums loses digits, and -inf minus -inf is NaN. In scan_torch every exponent
is a sum of numbers <= 0, so every factor lies in [0, 1]. Neither g = 0 (forget nothing) nor g = -inf (forget
all) is a special case. A is built in two ways:

  one decay per head      The decay does not depend on the channel: A = (Q K^T) * E with E_ij = e^(G_ij).
                          For column j of G, set g to 0 for the tokens 1 to j, then take the cumulative sum.
  one decay per channel   Divide and conquer. Cut a block of tokens into two halves. If token j is in the
                          left half and token i in the right half, the path from j to i crosses the cut:
                              G_ij  =  F_j (of the left half)  +  P_i (of the right half).
                          The lower left quarter of A (right reads left) is therefore one product,
                          (Q * e^P)(K * e^F)^T. Each half is the same problem, down to A_ii = q_i . k_i.

Why S is float32. bf16 has 8 binary digits, so 256 + 1 gives 256. Let every token write a 1. The slowest head
of eq. 19 decays by e^(-1/256) per token, and its state should grow to 256.5. A bf16 state stops near 128,
after about 200 tokens: there the state should change by 1/2, and rounding drops the change. Without decay a
bf16 state stops at 256, after 256 tokens. A float32 state stops at 2^24, after 16.8 million tokens.

Why the model's scale is K^-1/2. If the entries of q and k are random and of size 1, q . k has size K^1/2.
Times the scale it has size 1, so o and its gradients do not grow with K. If an RMSNorm follows (the
paper's recipe), the norm cancels the scale up to its epsilon; otherwise the scale sets the size of o.

References: Lightning Attention (one constant decay per head; arXiv 2401.04658, 2405.17381), Gated Linear
Attention (one decay per channel, in chunks; arXiv 2312.06635, section 4). A head is one of the H parts of
a layer, each with its own state. (B,T,H,K) is batch, time, heads, key channels.
"""

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

try:                                        # all before the Triton scan needs neither Triton nor a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BACKENDS = ("sequential", "torch", "triton")


# ---- the definition ----------------------------------------------------------------------------------------


def scan_sequential(q, k, v, log_decay, state, scale):
    """The recurrence as written, one token after another. Arguments as in chunked_scan."""
    decay = log_decay.exp()
    if decay.dim() < 4:
        decay = decay.expand(q.shape[:3])[..., None]                        # (B,T,H,1)
    outputs = []
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v, decay))):
        state = decay_t[..., None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state)[..., 0, :])      # (B,H,V)
    return torch.stack(outputs, 1), state


# ---- the same in chunks of matrix products -----------------------------------------------------------------


def scan_torch(q, k, v, log_decay, state, scale):
    """The scan in chunks of M tokens. A remainder is one shorter chunk. Autograd gives the gradients."""
    T = q.shape[1]
    M = min(T, 32)                          # fastest on CPUs: larger makes A slower, smaller makes more calls
    whole = T - T % M                       # tokens in whole chunks
    if whole == T:
        return _scan_chunks(q, k, v, log_decay, state, scale, M)
    g = g_rest = log_decay                  # a constant decay has no axis of tokens
    if log_decay.dim() > 1:
        g, g_rest = log_decay.tensor_split([whole], 1)
    (q, q_rest), (k, k_rest), (v, v_rest) = (x.tensor_split([whole], 1) for x in (q, k, v))
    o, state = _scan_chunks(q, k, v, g, state, scale, M)
    o_rest, state = _scan_chunks(q_rest, k_rest, v_rest, g_rest, state, scale, T - whole)
    return torch.cat((o, o_rest), 1), state


def _scan_chunks(q, k, v, g, state, scale, M):
    """The scan of N = T/M whole chunks. Only the loop that finds the start states is sequential."""
    def chunks(x):
        return x.unflatten(1, (-1, M)).transpose(2, 3).contiguous()         # (B,T,H,..) -> (B,N,H,M,..)

    q, k, v = chunks(q), chunks(k), chunks(v)                               # (B,N,H,M,K or V)
    if g.dim() == 4:
        o, past, future = _by_channel(q, k, v, chunks(g))                   # past, future: (B,N,H,M,K)
        o = o * scale
    else:                                   # one decay per head; a constant one broadcasts over B and N
        g = g[:, None].expand(-1, M) if g.dim() == 1 else chunks(g)         # (H,M) or (B,N,H,M)
        o, past, future = _by_head(q, k, v, g[..., None], scale)            # past, future: (..,H,M,1)
    writes = (k * future.exp()).mT @ v                                      # (B,N,H,K,V)
    decay = past[..., -1, :, None].exp()                                    # (B,N,H,1 or K,1) or (H,1,1)
    decays = decay.unbind(1) if decay.dim() == 5 else [decay] * writes.shape[1]
    starts = []
    for decay_n, write_n in zip(decays, writes.unbind(1)):
        starts.append(state)
        state = torch.addcmul(write_n, decay_n, state)                      # decay_n * state + write_n
    o = o + (q * (past.exp() * scale)) @ torch.stack(starts, 1)             # (B,N,H,M,V)
    return o.transpose(2, 3).flatten(1, 2), state


def _by_head(q, k, v, g, scale):
    """One decay per head, g (...,M,1): scale * A V, P and F. The scale goes into E, the smallest factor."""
    M = g.shape[-2]
    later = torch.ones(M, M, dtype=torch.bool, device=g.device).tril(-1)    # row l, column j: l > j
    G = torch.where(later, g, 0).cumsum(-2)                                 # (...,M,M)
    E = G.exp().tril() * scale
    return ((q @ k.mT) * E) @ v, g.cumsum(-2), G[..., -1, :, None]          # F_j is G_Mj


def _by_channel(q, k, v, g):
    """One decay per channel, g (...,M,K): A V (not scaled), P and F, from the results of two halves. One call
    solves both halves, side by side on a new axis."""
    M = g.shape[-2]
    if M == 1:                              # one token: A_ii v_i, P = g, F = 0
        return (q * k).sum(-1, keepdim=True) * v, g, torch.zeros_like(g)
    if M % 2:                               # add a token that writes and decays nothing, drop its result
        padded = (pad(x, (0, 0, 0, 1)) for x in (q, k, v, g))
        return tuple(x[..., :M, :] for x in _by_channel(*padded))
    q, k, v, g = (x.unflatten(-2, (2, -1)) for x in (q, k, v, g))           # (...,2,M/2,K or V)
    halves = _by_channel(q, k, v, g)
    (o_l, o_r), (past_l, past_r), (future_l, future_r) = (x.unbind(-3) for x in halves)
    q_r, k_l, v_l = q.select(-3, 1), k.select(-3, 0), v.select(-3, 0)
    A = (q_r * past_r.exp()) @ (k_l * future_l.exp()).mT                    # (...,M/2,M/2): right reads left
    o = torch.cat((o_l, o_r + A @ v_l), -2)
    past = torch.cat((past_l, past_r + past_l[..., -1:, :]), -2)
    future = torch.cat((future_l + past_r[..., -1:, :], future_r), -2)
    return o, past, future


# ---- the function that others call -------------------------------------------------------------------------


def chunked_scan(q, k, v, log_decay, state=None, scale=1.0, backend=None):
    """
    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t (arXiv 2601.22156, eq. 5, 6, 18).

    q, k       (B,T,H,K), T >= 1, any strides
    v          (B,T,H,V)
    log_decay  natural logarithm of the decay, from -inf (forget all) to 0 (forget nothing): (H,) constant,
               (B,T,H) one number per head, or (B,T,H,K) one number per channel. The range is not checked.
    state      (B,H,K,V), S before the first token. None is zeros. The scan never writes into this tensor.
    scale      any number but 0, because the backward pass of the Triton scan divides by scale
    backend    "sequential", "torch" or "triton". None picks the definition for one token, else the Triton
               scan on a GPU if it can run (no float64, K and V at most 256), else the PyTorch form.
    Returns    o (B,T,H,V) in v's dtype, but in float32 if v is float16; and S after the last token
               (B,H,K,V) in float32, but in float64 if any input is float64

    The scan computes in the dtype of S, and autocast is off. Exception: if v is bf16, the Triton scan
    rounds q and k to bf16, multiplies in bf16 and sums in float32. Gradients flow from both results to
    all five tensors; the Triton scan has first derivatives only. A log_decay of -inf gets the gradient 0.
    To split a sequence, pass the returned state to the next call.
    Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    _check(q, k, v, log_decay, state, scale)
    B, _, H, K = q.shape
    dtypes = [x.dtype for x in (q, k, v, log_decay, state) if x is not None]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    must = backend == "triton"              # else PyTorch stands in where Triton cannot compile
    backend = _pick_backend(backend, q, v, dtype)
    if backend == "triton":
        if v.dtype == torch.float16 and not q.dtype == k.dtype == torch.float16:
            v = v.float()                   # q and k take the dtype of v, and could overflow in float16
        state = None if state is None else state.float()
        tensors = q.to(v.dtype), k.to(v.dtype), v, log_decay, state
        with torch.cuda.device_of(q):
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None):
                return _TritonScan.apply(*tensors, float(scale), must)
            return _forward(_laid_out(tensors), float(scale), must)
    state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    scan = scan_sequential if backend == "sequential" else scan_torch
    return _run(scan, (q, k, v, log_decay, state), scale, dtype)


def _run(scan, tensors, scale, dtype):
    """Runs scan_sequential or scan_torch on q, k, v, log_decay, state in dtype, even under autocast."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        o, state = scan(*(x.to(dtype) for x in tensors), scale)
    return o.to(output_dtype(tensors[2])), state


def output_dtype(v):
    """The dtype of o. float16 becomes float32, because a sum over many tokens can pass float16's 65,504."""
    return torch.float32 if v.dtype == torch.float16 else v.dtype


def _check(q, k, v, log_decay, state, scale):
    """Raises a ValueError of one line if the arguments do not fit together."""
    if q.dim() != 4 or q.shape[1] < 1 or not q.is_floating_point():
        raise ValueError(f"q: given {tuple(q.shape)} {q.dtype}, allowed floating-point (B,T,H,K), T >= 1")
    B, T, H, K = q.shape
    V = v.shape[-1] if v.dim() == 4 else "V"
    fits = (("k", k, [(B, T, H, K)]), ("v", v, [(B, T, H, V)]), ("state", state, [(B, H, K, V)]),
            ("log_decay", log_decay, [(H,), (B, T, H), (B, T, H, K)]))
    for name, x, shapes in fits:
        if x is not None and not (x.shape in shapes and x.is_floating_point()):
            allowed = " or ".join(str(shape).replace("'", "") for shape in shapes)
            raise ValueError(f"{name}: given {tuple(x.shape)} {x.dtype}, allowed floating-point {allowed}")
    if scale == 0:
        raise ValueError("scale: given 0, allowed any other number")


def _pick_backend(backend, q, v, dtype):
    """Returns the backend that runs. Raises a ValueError of one line if the given one cannot run."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: given {backend!r}, allowed None, {', '.join(map(repr, BACKENDS))}")
    problem, widest = None, max(q.shape[-1], v.shape[-1])
    if triton is None:
        problem = "Triton is not installed"
    elif not q.is_cuda and not interpreted():
        problem = f"tensors are on {q.device}"
    elif dtype == torch.float64:
        problem = "an input is float64"
    elif widest > 256:                      # a block of the state would not fit into the registers
        problem = f"K or V is {widest}, above 256"
    if backend == "triton" and problem:
        raise ValueError(f"backend: given 'triton', but {problem}; allowed here 'torch' or 'sequential'")
    if backend is None:
        fastest = "triton" if q.is_cuda and not problem else "torch"
        backend = "sequential" if q.shape[1] == 1 else fastest
    if backend == "triton" and (0 in q.shape or 0 in v.shape):
        return "torch"                      # Triton cannot launch 0 programs
    return backend


# ---- the gradient: three more scans ------------------------------------------------------------------------
#
# Ignore `scale`. Let dS_t be the gradient of the loss with respect to S_t, via o_t and all later tokens. The
# two lines of the recurrence give
#
#     dS_t = q_t^T do_t + e^(g_{t+1}) * dS_{t+1}
#     dq_t = do_t S_t^T            dk_t = v_t dS_t^T            dv_t = k_t dS_t
#
# dS is a state too: running backwards, each token writes do under q. In every scan a token has three vectors:
# it adds write^T value to the state, then `read` reads the state:
#
#     scan   read   write   value   state    order            what it computes (j <= i)
#     o      q      k       v       S        first to last    o_i  = sum_j ((q_i * e^G_ij) . k_j) v_j
#     dq     do     v       k       S^T      first to last    dq_i = sum_j (do_i . v_j) (k_j * e^G_ij)
#     dv     k      q       do      dS       last to first    dv_j = sum_i ((k_j * e^G_ij) . q_i) do_i
#     dk     v      do      q       dS^T     last to first    dk_j = sum_i (v_j . do_i) (q_i * e^G_ij)
#
# Each scan makes its own states again, so the forward pass stores none for the backward pass. In S^T and dS^T
# the decay scales columns, not rows. A scan from last to first exchanges P and F, and transposes A. The
# kernel multiplies every output by the scale, but not the last state. So the two scans of dS start from the
# gradient of the final state divided by the scale, which must not be 0. The gradient of the start state is
# the last state of the scan for dv, times the scale. The gradient of log_decay is derived further down.


# ---- the Triton scan: one kernel, four scans ---------------------------------------------------------------
#
# One program of scan_kernel has BLOCK_V columns of one head's state in registers and walks over the chunks of
# one segment. A chunk has BLOCK_T tokens, the M of the derivation. The backward pass stores one state per
# chunk, and only if log_decay needs a gradient.
#
# One decay per head (SIDE "head"): each program makes e^P, e^F and A on its way.
# One decay per channel: the registers cannot hold a state and also make A. A needs no state, so
# prepare_kernel makes Q * e^P, K * e^F and A for all chunks at once. The scans are then matrix products. One
# decay scales one row of S (SIDE "key"), or one column of S^T (SIDE "value"). finish_kernel adds to dq and dk
# the pairs of tokens within a chunk. In code, past and future are P and F in the order of the scan.
#
# A long sequence with few heads would leave most of the card idle. So the chunks are divided into segments
# that run at once. A first pass writes but does not read. From a zero state it finds the last state (local)
# and the sum of g (total) of every segment but the last. A program then starts by replaying the segments
# before its own: S = e^total * S + local.
if triton:
    @triton.jit
    def load_tile(ptr, rows, stride, cols, n_rows, N_COLS: tl.constexpr):
        """Rows of a matrix in memory, `stride` elements apart; 0 outside of the matrix."""
        return tl.load(ptr + rows[:, None] * stride + cols[None, :],
                       mask=(rows < n_rows)[:, None] & (cols < N_COLS)[None, :], other=0.0)

    @triton.jit
    def store_tile(ptr, rows, stride, cols, n_rows, N_COLS: tl.constexpr, x):
        tl.store(ptr + rows[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty),
                 mask=(rows < n_rows)[:, None] & (cols < N_COLS)[None, :])

    @triton.jit
    def dot(a, b, DTYPE: tl.constexpr):
        return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")

    @triton.jit
    def rounding_error(x, DTYPE: tl.constexpr):
        """The part of a float32 x that rounding to DTYPE loses."""
        return x - x.to(DTYPE).to(tl.float32)

    @triton.jit
    def fine_dot(a, b, DTYPE: tl.constexpr):
        """a b for float32 a and b. In bf16, three products give about 16 binary digits: a b, and each factor
        with the rounding error of the other."""
        out = dot(a, b, DTYPE)
        if DTYPE != tl.float32:
            out += dot(a, rounding_error(b, DTYPE), DTYPE) + dot(rounding_error(a, DTYPE), b, DTYPE)
        return out

    @triton.jit
    def exp(x):
        return tl.exp2(1.4426950408889634 * x)                              # 2 instructions; tl.exp takes 5

    @triton.jit
    def sums(picks, x, DTYPE: tl.constexpr, EXACT: tl.constexpr):
        """Sums of x (M,N) over the tokens that each row of a 0/1 matrix picks (M,M). If DTYPE does not hold x
        exactly, the rounding error is summed too."""
        out = dot(picks, x, DTYPE)
        if not EXACT:
            out += dot(picks, rounding_error(x, DTYPE), DTYPE)
        return out

    @triton.jit
    def load_gates(g_ptr, tokens, stride, T):
        return tl.load(g_ptr + tokens * stride, mask=tokens < T, other=0.0).to(tl.float32)

    @triton.jit
    def head_decay(g, tokens, REVERSE: tl.constexpr, DTYPE: tl.constexpr):
        """One decay per head, g (M,) of one chunk. Returns the sum of g, then P and F (M,) and E (M,M) in the
        order of the scan."""
        i, j = tokens[:, None], tokens[None, :]
        if DTYPE == tl.float32:
            g = tl.maximum(g, -1e4)                                         # finite, and e^-1e4 is 0
            after_j = tl.where(i > j, g[:, None], 0.0)
            past, future, G = tl.cumsum(g, 0), tl.sum(after_j, 0), tl.cumsum(after_j, 0)
            if REVERSE:
                G = tl.trans(G)
        else:               # G as a difference of sums: the lost digits are below bf16's rounding
            g = tl.maximum(g, -80.0)                                        # finite, and e^-80 = 2e-35
            past = tl.cumsum(g, 0)
            future = tl.sum(g, 0) - past
            G = past[None, :] - past[:, None] if REVERSE else past[:, None] - past[None, :]
        E = tl.where((i <= j) if REVERSE else (i >= j), exp(G), 0.0)
        if REVERSE:
            past, future = future, past
        return tl.sum(g, 0), past, future, E

    # A for one decay per channel. On a level of divide and conquer, right halves need e^P and left halves
    # need e^F. So one matrix of factors serves both: e^P in the rows of right halves, e^F in those of left
    # halves.
    #
    # A shortcut saves the lowest levels: blocks of 2 LEAF tokens are not cut further. Decays are measured
    # from the middle of the block, so one of the two factors of a pair may exceed 1. So g is raised to at
    # least -8.5 (bf16, LEAF 8) or -17 (float32, LEAF 4). The error, at most e^-8.5 = 2e-4 or e^-17 = 4e-8, is
    # below the rounding of the dtype. A sum of LEAF such g is at least -68. Factors up to e^68 = 3e29 leave
    # float32 room for inputs and gradients of 1e-8 to 1e8.
    @triton.jit
    def level_factors(g, level: tl.constexpr, LEAF: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr):
        """One level of A: the factors (M,N) of q and of k, and the pairs of tokens (M,M). Level 0 has the
        blocks of 2 LEAF tokens, level n the halves of LEAF * 2^n tokens."""
        t = tl.arange(0, g.shape[0])
        i, j = t[:, None], t[None, :]
        HALF: tl.constexpr = LEAF << level
        right = i // HALF % 2 == 1
        own = (i // HALF == j // HALF) & ((j <= i) == right)                # the tokens between i and the cut
        if level == 0:
            near = sums(own, tl.maximum(g, -8.5 if LEAF == 8 else -17.0), DTYPE, EXACT)
            near = tl.where(right, near, -near)
            return exp(near), exp(-near), (i // (2 * HALF) == j // (2 * HALF)) & (i >= j)
        else:
            factor = exp(sums(own, g, DTYPE, EXACT))
            return factor, factor, right & (i // HALF == j // HALF + 1)

    @triton.jit
    def chunk_of(T, H, n_chunks, BLOCK_T: tl.constexpr):
        """The one chunk of this program: its number, batch row, head and first token; the indices of its
        tokens; the number of tokens from the first one to the end of the sequence."""
        at_chunk = tl.program_id(0).to(tl.int64)                            # int64: offsets pass 2^31
        bh, first = at_chunk // n_chunks, at_chunk % n_chunks * BLOCK_T
        return at_chunk, bh // H, bh % H, first, tl.arange(0, BLOCK_T), (T - first).to(tl.int32)

    @triton.jit
    def prepare_kernel(
        q_ptr, k_ptr, g_ptr, q_out_ptr, k_out_ptr, A_ptr, total_ptr, T, H, n_chunks,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_gb, stride_gt, stride_gh,
        K: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr, BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    ):
        """One chunk, one decay per channel: Q * e^P, K * e^F, A, and the sum of g."""
        at_chunk, b, h, first, tokens, left = chunk_of(T, H, n_chunks, BLOCK_T)
        i, j = tokens[:, None], tokens[None, :]
        at = ((b * T + first) * H + h) * K
        q_ptr += b * stride_qb + h * stride_qh + first * stride_qt
        k_ptr += b * stride_kb + h * stride_kh + first * stride_kt
        g_ptr += b * stride_gb + h * stride_gh + first * stride_gt
        A = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            q = load_tile(q_ptr, tokens, stride_qt, cols, left, K)
            k = load_tile(k_ptr, tokens, stride_kt, cols, left, K)
            g = tl.maximum(load_tile(g_ptr, tokens, stride_gt, cols, left, K).to(tl.float32), -1e4)
            for level in tl.static_range(LEVELS):
                q_factor, k_factor, pairs = level_factors(g, level, LEAF, DTYPE, EXACT)
                A += tl.where(pairs, fine_dot(q * q_factor, tl.trans(k * k_factor), DTYPE), 0.0)
            q_out = q * exp(sums(j <= i, g, DTYPE, EXACT))
            k_out = k * exp(sums(j > i, g, DTYPE, EXACT))
            store_tile(q_out_ptr + at, tokens, H * K, cols, left, K, q_out)
            store_tile(k_out_ptr + at, tokens, H * K, cols, left, K, k_out)
            tl.store(total_ptr + at_chunk * K + cols, tl.sum(g, 0), mask=cols < K)
        tl.store(A_ptr + at_chunk * BLOCK_T * BLOCK_T + i * BLOCK_T + j, A)

    # The gradient of log_decay. g_t multiplies S_{t-1} on the way to S_t. So, with sums over the columns V,
    #
    #     dg_t  =  sum_V (e^(g_t) * S_{t-1}) * dS_t
    #           =  sum_V (S_t - k_t^T v_t) * dS_t
    #           =  sum_V S_t * (q_t^T do_t + e^(g_{t+1}) * dS_{t+1})  -  k_t * dk_t
    #           =  q_t * dq_t  -  k_t * dk_t  +  dg_{t+1}
    #
    # From here dS_M is the gradient that the last state of a chunk gets from later chunks alone. Within the
    # chunk then
    #
    #     dg_t  =  sum_{s = t .. M} (q_s * dq_s - k_s * dk_s)  +  sum_V S_M * dS_M       (0 where g_t = -inf)
    #
    # The sum starts anew in every chunk, so its rounding errors do not grow with T. finish_kernel computes
    # the sum for one decay per channel. One decay per head has one dg for all channels, which is the sum of
    # all paths that cross token t, from a token j or S_0 to a token i or S_M:
    #
    #     dg_t  =  sum_{j < t <= i} X_ij  +  sum_{i >= t} Y_i  +  sum_{j < t} Z_j  +  W
    #     X_ij  =  e^(G_ij) (q_i . k_j) (do_i . v_j)      from j to i
    #     Y_i   =  q_i . e^(P_i) do_i S_0^T               from S_0 to i
    #     Z_j   =  k_j . e^(F_j) v_j dS_M^T               from j to S_M
    #     W     =  e^(P_M) * sum S_0 * dS_M               from S_0 to S_M
    #
    # The first sum is a difference. Below, a path from j to i adds X_ij if i >= t, and subtracts it if
    # j >= t. So only the paths that cross t remain:
    #
    #     sum_{j < t <= i} X_ij  =  sum_{s >= t} (sum_{j < s} X_sj  -  sum_{i > s} X_is)
    #
    # Rows and columns sum the same float32 numbers, so the terms that cancel leave no bf16 error. The scan
    # for dq knows S_0. It stores Y in dg_ptr, and S_0 in marks_ptr unless the decay makes W tiny. The scan
    # for dk knows dS_M. Its A_ij is scale * e^(G_ij) (do_i . v_j), so X is this A times q_i . k_j. It
    # replaces Y by dg.
    @triton.jit
    def scan_kernel(
        read_ptr, write_ptr, value_ptr, g_ptr, A_ptr, start_ptr, local_ptr, total_ptr, out_ptr, final_ptr,
        marks_ptr, x_ptr, dg_ptr, T, H, n_chunks, n_segments, per_segment, scale,
        stride_rb, stride_rt, stride_rh, stride_wb, stride_wt, stride_wh, stride_vb, stride_vt, stride_vh,
        stride_gb, stride_gt, stride_gh, stride_xb, stride_xt, stride_xh,
        K: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, TURNED: tl.constexpr, REVERSE: tl.constexpr,
        DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):
        """One of the four scans, or its first pass, over one segment and BLOCK_V columns. For dq and dk, K
        and V here are the layer's V and K.

        g_ptr      g of each token (SIDE "head"), else the sums of each chunk
        TURNED     the scan is for dq or dk: memory holds the transpose of S
        out_ptr    None: this is the first pass, which gives local_ptr and total_ptr
        marks_ptr  the state before each chunk, S_0, for W. The scan for dq writes, the scan for dk reads it
        x_ptr      SIDE "head": q in the scan for dq, k in the scan for dk
        dg_ptr     SIDE "head": the scan for dq writes Y, the scan for dk replaces Y by dg. SIDE "value": W of
                   the scan for dk
        """
        FIRST_PASS: tl.constexpr = out_ptr is None
        N_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        bh = (tl.program_id(0) // N_BLOCKS).to(tl.int64)
        b, h, block, segment = bh // H, bh % H, tl.program_id(0) % N_BLOCKS, tl.program_id(1)
        rows = tl.arange(0, BLOCK_K)                                        # of S
        cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
        tokens = tl.arange(0, BLOCK_T)
        N_G: tl.constexpr = K if SIDE == "key" else V if SIDE == "value" else 1
        gates = rows if SIDE == "key" else cols if SIDE == "value" else tl.arange(0, 1)
        read_ptr += b * stride_rb + h * stride_rh
        write_ptr += b * stride_wb + h * stride_wh
        value_ptr += b * stride_vb + h * stride_vh
        g_ptr += b * stride_gb + h * stride_gh
        in_S = (rows < K)[:, None] & (cols < V)[None, :]
        at_S = rows[:, None] + cols[None, :] * K if TURNED else rows[:, None] * V + cols[None, :]
        at_mark = rows[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]

        S = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        if not FIRST_PASS:
            if start_ptr is not None:
                S = tl.load(start_ptr + bh * K * V + at_S, mask=in_S, other=0.0)
            if local_ptr is not None:
                for earlier in range(segment):
                    at = bh * n_segments + earlier
                    decay = exp(tl.load(total_ptr + at * N_G + gates, mask=gates < N_G, other=0.0))
                    S *= decay[:, None] if SIDE == "key" else decay[None, :]
                    S += tl.load(local_ptr + at * K * V + at_S, mask=in_S, other=0.0)
        total = tl.zeros_like(gates).to(tl.float32)
        begin, end = segment * per_segment, tl.minimum((segment + 1) * per_segment, n_chunks)
        chunk = tl.cast(n_chunks - 1 - begin if REVERSE else begin, tl.int64)
        if SIDE == "head":                                                  # g is loaded one chunk ahead
            g_next = load_gates(g_ptr, chunk * BLOCK_T + tokens, stride_gt, T)
        else:
            sum_next = tl.load(g_ptr + chunk * stride_gt + gates, mask=gates < N_G, other=0.0)

        for n in range(begin, end):                                         # the n-th chunk of the scan
            chunk = tl.cast(n_chunks - 1 - n if REVERSE else n, tl.int64)
            at_chunk = bh * n_chunks + chunk
            first = chunk * BLOCK_T
            left = (T - first).to(tl.int32)
            # here = tokens, up to the end of the sequence. The minimum depends on `left`, so the compiler
            # cannot keep offsets in registers from one chunk to the next. The registers are full.
            here = tl.minimum(tokens, left)
            at = (b * T + first) * H + h                                    # in contiguous tensors
            write = load_tile(write_ptr + first * stride_wt, here, stride_wt, rows, left, K)
            value = load_tile(value_ptr + first * stride_vt, here, stride_vt, cols, left, V)
            after = tl.minimum(n + 1, n_chunks - 1)
            after = tl.cast(n_chunks - 1 - after if REVERSE else after, tl.int64)
            if SIDE == "head":
                g = g_next
                g_next = load_gates(g_ptr, after * BLOCK_T + tokens, stride_gt, T)
                sum_g, past, future, E = head_decay(g, tokens, REVERSE, DTYPE)
                added = dot(tl.trans(write), value * exp(future)[:, None], DTYPE)
            else:
                sum_g = sum_next
                sum_next = tl.load(g_ptr + after * stride_gt + gates, mask=gates < N_G, other=0.0)
                added = dot(tl.trans(write), value, DTYPE)

            if not FIRST_PASS:
                if SIDE == "head" and dg_ptr is not None:                   # one part of dg per block
                    part = block.to(tl.int64) * T * (tl.num_programs(0) // N_BLOCKS)
                    at_dg, inside = dg_ptr + part + at + tokens * H, tokens < left
                    if REVERSE:
                        Y = tl.load(at_dg, mask=inside, other=0.0)
                read = load_tile(read_ptr + first * stride_rt, here, stride_rt, rows, left, K)
                out = scale * dot(read, S, DTYPE)
                if marks_ptr is not None:
                    W = tl.zeros_like(sum_g)
                    if SIDE == "value" or sum_g > (-40 if DTYPE == tl.float32 else -20):    # else W is tiny
                        mark = marks_ptr + (at_chunk * N_BLOCKS + block) * BLOCK_K * BLOCK_V + at_mark
                        if REVERSE:
                            W = tl.load(mark) * S
                            W = scale * exp(sum_g) * tl.sum(W, None if SIDE == "head" else 0)
                        else:
                            tl.store(mark, S.to(marks_ptr.dtype.element_ty))
                if SIDE == "head":
                    out *= exp(past)[:, None]
                    A = scale * dot(read, tl.trans(write), DTYPE) * E
                    if dg_ptr is not None:
                        x = load_tile(x_ptr + b * stride_xb + h * stride_xh + first * stride_xt, here,
                                      stride_xt, cols, left, V)
                        dg = tl.sum(x * out, 1)                             # Y or Z
                        if REVERSE:
                            j, i = tokens[:, None], tokens[None, :]
                            X = tl.where(j == i, 0.0, A * dot(x, tl.trans(value), DTYPE))
                            crossing = tl.cumsum(Y + tl.sum(X, 0) - tl.sum(X, 1), 0, reverse=True)
                            dg = crossing + tl.sum(tl.where(j < i, dg[:, None], 0.0), 0) + W
                            dg = tl.where(g == float("-inf"), 0.0, dg)
                        tl.store(at_dg, dg, mask=inside)
                    out += dot(A, value, DTYPE)
                elif SIDE == "key":
                    i = tokens[None, :] if REVERSE else tokens[:, None]
                    j = tokens[:, None] if REVERSE else tokens[None, :]
                    A = tl.load(A_ptr + at_chunk * BLOCK_T * BLOCK_T + i * BLOCK_T + j)
                    out += scale * dot(A, value, DTYPE)
                    if DTYPE != tl.float32:
                        out += scale * dot(rounding_error(A, DTYPE), value, DTYPE)
                elif REVERSE and dg_ptr is not None:
                    tl.store(dg_ptr + at_chunk * V + cols, W, mask=cols < V)
                store_tile(out_ptr + at * V, tokens, H * V, cols, left, V, out)

            decay = exp(sum_g)
            if SIDE == "key":
                S = decay[:, None] * S + added
            elif SIDE == "value":
                S = decay[None, :] * S + added
            else:
                S = decay * S + added
            total += sum_g

        if FIRST_PASS:
            at = bh * n_segments + segment
            tl.store(local_ptr + at * K * V + at_S, S, mask=in_S)
            tl.store(total_ptr + at * N_G + gates, total, mask=gates < N_G)
        else:
            if final_ptr is not None and segment == n_segments - 1:
                tl.store(final_ptr + bh * K * V + at_S, S, mask=in_S)

    @triton.jit
    def finish_kernel(
        q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, dq_in_ptr, dk_in_ptr, W_ptr, dq_ptr, dk_ptr, dg_ptr,
        T, H, n_chunks, scale,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        stride_gb, stride_gt, stride_gh, stride_db, stride_dt, stride_dh,
        K: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr, BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
    ):
        """One chunk, one decay per channel: dq, dk, dg. The scans gave do_i S_0^T (dq_in) and v_j dS_M^T
        (dk_in). The chunk's own pairs of tokens are added here, with dA_ij = do_i . v_j."""
        at_chunk, b, h, first, tokens, left = chunk_of(T, H, n_chunks, BLOCK_T)
        i, j = tokens[:, None], tokens[None, :]
        at = ((b * T + first) * H + h) * K
        q_ptr += b * stride_qb + h * stride_qh + first * stride_qt
        k_ptr += b * stride_kb + h * stride_kh + first * stride_kt
        v_ptr += b * stride_vb + h * stride_vh + first * stride_vt
        g_ptr += b * stride_gb + h * stride_gh + first * stride_gt
        do_ptr += b * stride_db + h * stride_dh + first * stride_dt
        dA = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, V, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            do = load_tile(do_ptr, tokens, stride_dt, cols, left, V)
            v = load_tile(v_ptr, tokens, stride_vt, cols, left, V)
            dA += scale * dot(do, tl.trans(v), DTYPE)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            q = load_tile(q_ptr, tokens, stride_qt, cols, left, K)
            k = load_tile(k_ptr, tokens, stride_kt, cols, left, K)
            raw = load_tile(g_ptr, tokens, stride_gt, cols, left, K)
            g = tl.maximum(raw.to(tl.float32), -1e4)
            dq = load_tile(dq_in_ptr + at, tokens, H * K, cols, left, K) * exp(sums(j <= i, g, DTYPE, EXACT))
            dk = load_tile(dk_in_ptr + at, tokens, H * K, cols, left, K) * exp(sums(j > i, g, DTYPE, EXACT))
            if dg_ptr is not None:                                          # dk so far: the part through S_M
                W = tl.load(W_ptr + at_chunk * K + cols, mask=cols < K, other=0.0)
                SdS = W + tl.sum(k * dk, 0)                                 # sum_V S_M * dS_M
            for level in tl.static_range(LEVELS):
                q_factor, k_factor, pairs = level_factors(g, level, LEAF, DTYPE, EXACT)
                dA_l = tl.where(pairs, dA, 0.0)
                dq += q_factor * fine_dot(dA_l, k * k_factor, DTYPE)
                dk += k_factor * fine_dot(tl.trans(dA_l), q * q_factor, DTYPE)
            store_tile(dq_ptr + at, tokens, H * K, cols, left, K, dq)
            store_tile(dk_ptr + at, tokens, H * K, cols, left, K, dk)
            if dg_ptr is not None:
                dg = sums(j >= i, q * dq - k * dk, DTYPE, DTYPE == tl.float32) + SdS[None, :]
                store_tile(dg_ptr + at, tokens, H * K, cols, left, K,
                           tl.where(raw == float("-inf"), 0.0, dg))


# ---- the Triton scan: its launches -------------------------------------------------------------------------


class _TritonScan(torch.autograd.Function):
    """The Triton scan as a function of autograd. The PyTorch form stands in where Triton cannot compile."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, scale, must):
        tensors = _laid_out((q, k, v, log_decay, state))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)    # a result that nobody uses gets the gradient None, not zeros
        ctx.scale, ctx.must = scale, must
        return _forward(tensors, scale, must)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        if do is None:
            do = torch.zeros_like(tensors[2], dtype=output_dtype(tensors[2]))
        grads = _triton_or_torch(_triton_backward, _torch_backward, ctx.must,
                                 tensors, ctx.scale, do, dfinal, wanted[3], wanted[4])
        return *grads, None, None


def _laid_out(tensors):
    """The tensors as the kernels read them: channels side by side, the state contiguous."""
    *rows, log_decay, state = tensors
    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in rows)
    return *rows, log_decay, None if state is None else state.contiguous()


def _forward(tensors, scale, must):
    return _triton_or_torch(_triton_forward, _torch_forward, must, tensors, scale)


_not_compiled = set()                       # the kinds of scan that Triton has failed to compile


def _triton_or_torch(in_triton, in_torch, must, tensors, *args):
    """Runs in_triton. If Triton cannot compile this kind of scan, runs in_torch, this time and later. If the
    caller named Triton (must), raises Triton's error instead."""
    q, _, v, log_decay, _ = tensors
    kind = v.device, v.dtype, log_decay.dim(), q.shape[-1], v.shape[-1]
    if must or kind not in _not_compiled:
        try:
            return in_triton(tensors, *args)
        except Exception as error:
            compiling = isinstance(error, triton.TritonError) or "PassManager" in str(error)
            if must or interpreted() or not compiling:
                raise
            _not_compiled.add(kind)
            warnings.warn(f"Triton cannot compile the scan ({type(error).__name__}): PyTorch runs it, slower")
    return in_torch(tensors, *args)


def _torch_forward(tensors, scale):
    *others, state = tensors
    (B, _, H, K), V = others[0].shape, others[2].shape[-1]
    state = others[0].new_zeros(B, H, K, V, dtype=torch.float32) if state is None else state
    return _run(scan_torch, (*others, state), scale, torch.float32)


def _torch_backward(tensors, scale, do, dfinal, *_):                        # all gradients, wanted or not
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        o, final = _torch_forward(leaves, scale)
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal
    grads = torch.autograd.grad((o, final), [x for x in leaves if x is not None], (do, dfinal))
    return grads if leaves[4] is not None else (*grads, None)


class Gates(NamedTuple):
    """The decays as one scan needs them."""
    side: str                               # "head", "key" or "value": see the comment above load_tile
    g: torch.Tensor                         # "head": per token, (B,T,H,1). Else the sum per chunk, (B,N,H,K)
    A: torch.Tensor = None                  # "key": (B,H,N,M,M)


def _triton_forward(tensors, scale):
    q, k, v, log_decay, state = tensors
    read, write, gates = _prepare(q, k, _per_token(log_decay, q))
    start = state, *_segments(write, v, gates)
    B, _, H, K = q.shape
    final = q.new_empty(B, H, K, v.shape[-1], dtype=torch.float32)
    return _scan((read, write, v), gates, start, scale, output_dtype(v), final=final)


def _triton_backward(tensors, scale, do, dfinal, dg_wanted, dstate_wanted):
    """The gradients of q, k, v, log_decay and the start state."""
    q, k, v, log_decay, state = tensors
    (B, _, H, K), V = q.shape, v.shape[-1]
    do = do if do.stride(-1) == 1 else do.contiguous()
    dS = None if dfinal is None else dfinal.contiguous() / scale
    g = _per_token(log_decay, q)
    read, write, gates = _prepare(q, k, g)
    forwards = _segments(write, v, gates)
    backwards = _segments(read, do, gates, reverse=True)
    marks, dg = _room_for_dg(write, v, g, gates.side) if dg_wanted else (None, None)
    if gates.side == "head":
        transposed, dtype = gates, q.dtype
    else:
        transposed, dtype = Gates("value", gates.g), torch.float32          # _finish adds to dq and dk
    dq, _ = _scan((do, v, write), transposed, (state, *forwards), scale, dtype, extras=(marks, q, dg))
    dk, _ = _scan((v, do, read), transposed, (dS, *backwards), scale, dtype, True, extras=(marks, k, dg))
    dstate = v.new_empty(B, H, K, V, dtype=torch.float32) if dstate_wanted else None
    dv, dstate = _scan((write, read, do), gates, (dS, *backwards), scale, do.dtype, True, final=dstate)
    if gates.side == "key":
        dq, dk, dg = _finish((q, k, v, g, do), (dq, dk, dg), scale)
    elif dg_wanted:
        dg = dg.sum(0).to(g.dtype)
    if dg_wanted and log_decay.dim() < 4:
        dg = dg[..., 0].sum_to_size(log_decay.shape)              # a constant decay has one gradient
    return dq, dk, dv, dg, dstate * scale if dstate_wanted else None


def _per_token(log_decay, q):
    """log_decay as (B,T,H,1) or (B,T,H,K). A constant one is a view whose strides over B and T are 0."""
    if log_decay.dim() == 4:
        return log_decay if log_decay.stride(-1) == 1 else log_decay.contiguous()
    B, T, H, _ = q.shape
    return log_decay.unsqueeze(-1).expand(B, T, H, 1)


def _prepare(q, k, g):
    """Returns read, write and Gates of the forward scan. read and write are q and k, or for one decay per
    channel Q * e^P and K * e^F."""
    if g.shape[-1] == 1:
        return q, k, Gates("head", g)
    (B, T, H, K), s = q.shape, _layout(q, k, "key")
    N, M = s.n_chunks, s.BLOCK_T
    read, write = q.new_empty(2, B, T, H, K, dtype=_stored_dtype(q))
    A = q.new_empty(B, H, N, M, M, dtype=torch.float32)
    total = q.new_empty(B, H, N, K, dtype=torch.float32)
    prepare_kernel[(B * H * N,)](q, k, g, read, write, A, total, T, H, N, *_strides(q, k, g), K=K,
                                 **_within_chunk(q, g, s), num_warps=1, num_stages=2)
    return read, write, Gates("key", total.transpose(1, 2), A)


def _finish(inputs, partial, scale):
    """Returns dq, dk, dg. inputs: q, k, v, g, do. partial: dq_in, dk_in and W (or None) from the scans."""
    q, _, v, g, _ = inputs
    (B, T, H, K), s = q.shape, _layout(q, v, "key")
    dq, dk = q.new_empty(2, B, T, H, K)
    dg = None if partial[2] is None else g.new_empty(B, T, H, K)
    finish_kernel[(B * H * s.n_chunks,)](
        *inputs, *partial, dq, dk, dg, T, H, s.n_chunks, scale, *_strides(*inputs),
        K=K, V=v.shape[-1], **_within_chunk(q, g, s), num_warps=2, num_stages=3)
    return dq, dk, dg


def _room_for_dg(write, v, g, side):
    """Empty tensors: marks, and dg in one part per block of columns (side "head") or W (side "key")."""
    (B, _, H, K), s = write.shape, _layout(v, write, side)
    marks = write.new_empty(B, H, s.n_chunks, s.n_blocks, s.BLOCK_K * s.BLOCK_V, dtype=_stored_dtype(write))
    shape = (s.n_blocks, *g.shape) if side == "head" else (B, H, s.n_chunks, K)
    return marks, g.new_empty(shape, dtype=torch.float32)


def _segments(write, value, gates, reverse=False):
    """The first pass: local and total of all segments but the last. None, None if there is one segment."""
    (B, _, H, K), n = write.shape, _layout(write, value, gates.side).n_segments
    if n == 1:
        return None, None
    local = write.new_empty(B, H, n, K, value.shape[-1], dtype=torch.float32)
    total = write.new_empty(B, H, n, gates.g.shape[-1], dtype=torch.float32)
    tensors = write, write, value
    _launch_scan(tensors, gates._replace(A=None), (None, local, total), (None, None), 1.0, reverse)
    return local, total


def _scan(tensors, gates, start, scale, dtype, reverse=False, extras=(None, None, None), final=None):
    """One scan. tensors: read, write, value. start: the start state (None: zeros), local, total. extras:
    marks, x, dg, for the gradient of log_decay. Returns out, and final with the last state if it is given."""
    value = tensors[2]
    results = value.new_empty(value.shape, dtype=dtype), final
    _launch_scan(tensors, gates, start, results, scale, reverse, extras)
    return results


def _launch_scan(tensors, gates, start, results, scale, reverse, extras=(None, None, None)):
    (_, write, value), x = tensors, extras[1]
    (B, T, H, K), V, s = write.shape, value.shape[-1], _layout(write, value, gates.side)
    first_pass = results[0] is None
    if first_pass and s.BLOCK_T == 64:      # the first pass has fewer products, and runs best on half chunks
        s = s._replace(BLOCK_T=32, n_chunks=2 * s.n_chunks, per_segment=2 * s.per_segment, stages=3)
    scan_kernel[(B * H * s.n_blocks, s.n_segments - first_pass)](
        *tensors, gates.g, gates.A, *start, *results, *extras,
        T, H, s.n_chunks, s.n_segments, s.per_segment, scale,
        *_strides(*tensors, gates.g, write if x is None else x), K=K, V=V, SIDE=gates.side,
        TURNED=x is not None, REVERSE=reverse, DTYPE=dot_dtype(value), BLOCK_T=s.BLOCK_T,
        BLOCK_K=s.BLOCK_K, BLOCK_V=s.BLOCK_V, num_warps=4, num_stages=s.stages)


def _strides(*tensors):
    """The strides of each tensor over batch, time and heads."""
    return [n for x in tensors for n in x.stride()[:3]]


# ---- sizes and dtypes --------------------------------------------------------------------------------------


def dot_dtype(x):
    """The dtype in which x is multiplied. float16 too is multiplied in float32: a state can pass 65,504."""
    return tl.bfloat16 if x.dtype == torch.bfloat16 and not interpreted() else tl.float32


def _stored_dtype(x):
    """The dtype of a tensor that one kernel writes for another: the dtype in which x is multiplied."""
    return torch.bfloat16 if dot_dtype(x) == tl.bfloat16 else torch.float32


def _within_chunk(q, g, s):
    """Constants of prepare_kernel and finish_kernel. Both take few channels at a time: many small programs
    keep more loads and products in flight than a few large ones."""
    half = dot_dtype(q) == tl.bfloat16
    leaf = 8 if half else 4
    return dict(DTYPE=dot_dtype(q), EXACT=not half or g.dtype == torch.bfloat16, BLOCK_T=s.BLOCK_T,
                BLOCK_K=min(32, s.BLOCK_K), LEAF=leaf, LEVELS=(s.BLOCK_T // leaf).bit_length() - 1)


class Layout(NamedTuple):
    """How a scan lies on the card."""
    BLOCK_T: int                            # tokens per chunk
    BLOCK_K: int                            # rows of the state, padded
    BLOCK_V: int                            # columns of the state per program
    n_blocks: int                           # of columns
    n_chunks: int
    per_segment: int                        # chunks per segment
    n_segments: int
    stages: int                             # chunks that are loaded ahead


def _layout(write, value, side):
    return _layout_of(write.shape, value.shape[-1], value.dtype, side, card(write.device))


@lru_cache(4096)                            # a small scan would spend more time here than on the card
def _layout_of(shape, V, dtype, side, card):
    """The fastest Layout, by timings on an H200. Cards with less shared memory get smaller blocks. BLOCK_T
    and the segments must depend on K and V in the same way: the scans for dq and dk exchange K and V, and use
    the first passes of the scans for o and dv."""
    (B, T, H, K), (hopper, cores) = shape, card
    BLOCK_K, BLOCK_V = block_size(K), block_size(V)
    if dtype == torch.bfloat16 or interpreted():
        BLOCK_T = 64 if side == "head" and hopper and max(BLOCK_K, BLOCK_V) <= 128 else 32
        BLOCK_V = min(BLOCK_V, 64 if BLOCK_K <= (128 if hopper else 64) else 32)
    else:                                   # float32 is multiplied without tensor cores: small products
        BLOCK_T, BLOCK_V = 16, min(BLOCK_V, 32)
    n_chunks = ceil_div(T, BLOCK_T)
    wanted = 2 * cores // (B * H * ceil_div(max(K, V), 64))            # about two programs per multiprocessor
    per_segment = ceil_div(n_chunks, max(1, min(wanted, n_chunks // 4)))       # at least about 4 chunks
    return Layout(BLOCK_T, BLOCK_K, BLOCK_V, n_blocks=ceil_div(V, BLOCK_V), n_chunks=n_chunks,
                  per_segment=per_segment, n_segments=ceil_div(n_chunks, per_segment),
                  stages=2 if BLOCK_T == 64 else 3)


def ceil_div(a, b):
    return -(-a // b)


def block_size(n):
    """The smallest power of two that is at least n and at least 16, the smallest tile of a tensor core."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache
def card(device):
    """Whether a GPU has shared memory as Hopper has (227 KB per program), and its number of
    multiprocessors."""
    if device.type != "cuda":
        return True, 4
    p = torch.cuda.get_device_properties(device)
    return p.shared_memory_per_block_optin >= 200 * 1024, p.multi_processor_count


def interpreted():
    """Whether the kernels run on a CPU (TRITON_INTERPRET=1, for tests). The interpreter cannot do bf16."""
    return not isinstance(scan_kernel, triton.JITFunction)
