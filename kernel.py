"""
The scan behind every linear layer. A head's state S, K x V numbers, decays, takes in a token and is read:

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        g_t = log_decay_t <= 0
    o_t = scale * q_t S_t

Its cost grows with the length T, not with T^2, and its memory not at all: that is what a linear layer has
over attention. But taken literally it is T tiny products one after the other. Both fast forms below cut the
sequence into chunks of C tokens. Unroll the recurrence over a chunk, tokens 1 .. C, from its start state S_0:

    S_C = e^(g_1 + .. + g_C) * S_0  +  sum_j  e^(g_{j+1} + .. + g_C) * k_j^T v_j
    o_i = scale * ( (q_i * e^(g_1 + .. + g_i)) S_0  +  sum_{j <= i} A_ij v_j ),
    A_ij = sum_c  q_ic k_jc e^(g_{j+1,c} + .. + g_{i,c})                           c: the K key channels

With inclusive prefix sums P_i = g_1 + .. + g_i and exclusive suffix sums R_j = g_{j+1} + .. + g_C, all but A
is plain matrix products (capital letters stack a chunk's tokens as rows; * is elementwise, a decay that has
one number a row or a channel scaling all of it):

    O = scale * ( (Q * e^P) S_0 + A V )             S_C = e^(P_C) * S_0 + (K * e^R)^T V

Only the start states are sequential, one step a chunk. The textbook form of the decay in A is e^(P_i - P_j),
which makes A one product, (Q * e^P)(K * e^-P)^T. But e^-P overflows, P_i - P_j loses digits, and -inf less
-inf is NaN. Here nothing is subtracted: exponents are sums of numbers <= 0, every factor lies in [0, 1], and
g = 0 (forget nothing) and g = -inf (forget all) need no special case (the Triton kernels take two shortcuts
that their rounding hides: head_decay in bf16, level_factors at its smallest blocks). Two ways to build A:

  one number a head     The decay does not depend on c: A = (Q K^T) * D, D_ij = e^(g_{j+1} + .. + g_i).
                        Column j of the exponent is the running sum over i of g, the entries up to j set to 0.
  one number a channel  Divide and conquer. Cut a block of 2h tokens in the middle. From j in the left half to
                        i in the right half the path crosses the cut, so its decay is a product of two:
                            g_{j+1} + .. + g_i  =  R_j (of the left half)  +  P_i (of the right half),
                        and that quarter of A is one product, (Q * e^P)(K * e^R)^T. The halves are the same
                        problem with h/2, down to one token, A_ii = q_i . k_i: log2(C) levels.

Below them stand the kernels of a single token, with which a model generates: the same recurrence in one step,
attention to a long cache, and a Linear with all that surrounds it.

References: Lightning Attention (constant decay a head; arXiv 2401.04658, 2405.17381), Gated Linear Attention
(decay a channel, in chunks; arXiv 2312.06635, section 4), HypeNet (arXiv 2601.22156, eq. 5, 6, 18, 19).
All tensors are time-major: (B,T,H,K) is batch, time, heads, key channels. Needs neither Triton nor a GPU.
"""

import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BACKENDS = ("sequential", "torch", "triton")


# ---------------------------------------------------------------------- a sequence: chunked_scan
def chunked_scan(q, k, v, log_decay, state=None, scale=1.0, backend=None):
    """
    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t (arXiv 2601.22156, eq. 5, 6, 18).

    q, k       (B,T,H,K), T >= 1, any strides
    v          (B,T,H,V)
    log_decay  natural logarithm of the decay, in [-inf, 0] (not checked): (H,) constant, (B,T,H) one number
               a head, or (B,T,H,K) one a channel
    state      (B,H,K,V), S before the first token; None is zeros. It is never written to.
    backend    "sequential", "torch" or "triton"; None is one step of the definition where T is 1, else the
               Triton kernels on a GPU and PyTorch elsewhere
    Returns    o (B,T,H,V) in v's dtype, and S after the last token (B,H,K,V) in float32, or in float64 if
               any input is.

    Computed in the state's dtype whatever autocast says, but for the Triton kernels, which multiply in bf16
    (the decays of channels in two parts each) where v is bf16 and sum in float32. Differentiable in all five
    tensors, also through the state returned; the gradient of a log_decay of -inf is 0. Passing the state on
    splits a sequence anywhere.
    Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    backend, chosen = _check(q, k, v, log_decay, state, scale, backend), backend is None
    B, T, H, K = q.shape
    tensors = [x for x in (q, k, v, log_decay, state) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if backend == "triton":
            g = log_decay if log_decay.dim() == 4 else log_decay[..., None].expand(B, T, H, 1)
            try:
                return _TritonScan.apply(q.to(v.dtype), k.to(v.dtype), v, g, state, float(scale))
            except Exception as e:
                if not chosen or not _cannot_compile(e):
                    raise
        scan = scan_sequential if backend == "sequential" else scan_torch
        o, state = scan(q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), state, scale)
    return o.to(v.dtype), state


# ---------------------------------------------------------------------- what is asked for, what can be done
def _cannot_compile(error):
    """Whether it is Triton that gave up, on this card or at this size; says so, once for each reason."""
    known = isinstance(error, triton.TritonError) or "PassManager" in str(error)
    if known and not _interpreted():
        warnings.warn(f"the Triton scan cannot run here ({type(error).__name__}); PyTorch's runs, slower")
        return True
    return False


def _check(q, k, v, log_decay, state, scale, backend):
    """The backend to use, or a ValueError of one line."""
    if q.dim() != 4 or k.shape != q.shape or q.shape[1] < 1:
        raise ValueError(f"q, k: given {tuple(q.shape)}, {tuple(k.shape)}, allowed equal (B,T,H,K), T >= 1")
    B, T, H, K = q.shape
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: given {tuple(v.shape)}, allowed ({B},{T},{H},V)")
    if log_decay.shape not in ((H,), (B, T, H), (B, T, H, K)):
        allowed = f"{(H,)}, {(B, T, H)} or {(B, T, H, K)}"
        raise ValueError(f"log_decay: given {tuple(log_decay.shape)}, allowed {allowed}")
    if state is not None and state.shape != (B, H, K, v.shape[-1]):
        raise ValueError(f"state: given {tuple(state.shape)}, allowed {(B, H, K, v.shape[-1])}")
    if scale == 0:
        raise ValueError("scale: given 0, allowed any other number")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: given {backend!r}, allowed None, {', '.join(map(repr, BACKENDS))}")
    tensors = [x for x in (q, k, v, log_decay, state) if x is not None]
    if not all(x.is_floating_point() for x in tensors):
        raise ValueError(f"dtypes: given {', '.join(str(x.dtype) for x in tensors)}, allowed floating point")
    cannot = None
    if triton is None:
        cannot = "Triton is not installed"
    elif not q.is_cuda and not _interpreted():
        cannot = f"tensors are on {q.device}"
    elif any(x.dtype == torch.float64 for x in tensors):
        cannot = "an input is float64"
    elif max(K, v.shape[-1]) > 256:                     # a block of the state would not fit the registers
        cannot = f"K or V is {max(K, v.shape[-1])}, above 256"
    if backend == "triton" and cannot:
        raise ValueError(f"backend: given 'triton', but {cannot}; allowed here 'torch' or 'sequential'")
    if backend is None:
        backend = "sequential" if T == 1 else "triton" if q.is_cuda and not cannot else "torch"
    return backend


# ---------------------------------------------------------------------- sequential: the definition
def scan_sequential(q, k, v, log_decay, state, scale):
    """The two lines of the recurrence, token by token: what the forms below are tested against."""
    decay = log_decay.exp()
    if decay.dim() < 4:
        decay = decay.expand(q.shape[:3])[..., None]                        # (B,T,H,1)
    outputs = []
    for q_t, k_t, v_t, a_t in zip(*(x.unbind(1) for x in (q, k, v, decay))):
        state = a_t[..., None] * state + k_t[..., :, None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state)[..., 0, :])      # (B,H,V)
    return torch.stack(outputs, 1), state


# ---------------------------------------------------------------------- torch: chunks of matrix products
def scan_torch(q, k, v, log_decay, state, scale):
    """The chunked form in plain PyTorch, differentiated by autograd. The tail is one shorter chunk."""
    T = q.shape[1]
    C = min(T, 32)                          # larger costs more in A, smaller more in calls: best on CPUs
    outputs = []
    for start, end, size in ((0, T - T % C, C), (T - T % C, T, T % C)):
        if start < end:
            parts = [x[:, start:end] for x in (q, k, v)]
            g = log_decay if log_decay.dim() == 1 else log_decay[:, start:end]
            o, state = _scan_chunks(*parts, g, state, scale, size)
            outputs.append(o)
    return torch.cat(outputs, 1) if len(outputs) > 1 else o, state


def _scan_chunks(q, k, v, g, state, scale, C):
    """The same for N = T/C whole chunks: all at once, but for the loop over their start states."""
    def chunks(x):
        return x.unflatten(1, (-1, C)).transpose(2, 3).contiguous()
    q, k, v = chunks(q), chunks(k), chunks(v)                               # (B,N,H,C,K or V)
    if g.dim() == 4:
        o, P, R = _within_channels(q, k, v, chunks(g))                      # P, R: (B,N,H,C,K)
        o = o * scale
    else:                                   # a constant decay stays (H,C,1) and broadcasts over B and N
        g = g[:, None].expand(-1, C) if g.dim() == 1 else chunks(g)         # (H,C) or (B,N,H,C)
        o, P, R = _within_heads(q, k, v, g[..., None], scale)               # P, R: (H,C,1) or (B,N,H,C,1)
    writes = (k * R.exp()).mT @ v                                           # (B,N,H,K,V)
    decay = P[..., -1, :, None].exp()                                       # (B,N,H,1 or K,1) or (H,1,1)
    decays = decay.unbind(1) if decay.dim() == 5 else [decay] * writes.shape[1]
    starts = []
    for decay_n, write_n in zip(decays, writes.unbind(1)):
        starts.append(state)
        state = torch.addcmul(write_n, decay_n, state)
    o = o + (q * (P.exp() * scale)) @ torch.stack(starts, 1)                # (B,N,H,C,V)
    return o.transpose(2, 3).flatten(1, 2), state


def _within_heads(q, k, v, g, scale):
    """scale * A V for one decay a head, g (...,C,1), and the sums P and R."""
    C = g.shape[-2]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)    # row l, column j: l > j
    D = torch.where(later, g, 0).cumsum(-2).exp().tril() * scale            # (...,C,C)
    R = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return ((q @ k.mT) * D) @ v, g.cumsum(-2), R


def _within_channels(q, k, v, g):
    """A V for one decay a channel, g (...,C,K), and the sums P and R, built from those of the halves."""
    C = g.shape[-2]
    if C == 1:
        return (q * k).sum(-1, keepdim=True) * v, g, torch.zeros_like(g)
    if C % 2:                               # a token k = 0, g = 0 at the end changes nothing before it
        padded = (F.pad(x, (0, 0, 0, 1)) for x in (q, k, v, g))
        return (x[..., :C, :] for x in _within_channels(*padded))
    q, k, v, g = (x.unflatten(-2, (2, -1)) for x in (q, k, v, g))           # (...,2,C/2,K or V)
    (o_l, o_r), (P_l, P_r), (R_l, R_r) = (x.unbind(-3) for x in _within_channels(q, k, v, g))
    A = (q.select(-3, 1) * P_r.exp()) @ (k.select(-3, 0) * R_l.exp()).mT    # (...,C/2,C/2): right reads left
    o = torch.cat((o_l, o_r + A @ v.select(-3, 0)), -2)
    P = torch.cat((P_l, P_r + P_l[..., -1:, :]), -2)
    R = torch.cat((R_l + P_r[..., -1:, :], R_r), -2)
    return o, P, R


# ---------------------------------------------------------------------- triton: one scan, four times
# Write dO for scale * dL/dO and dS for dL/dS. Differentiating the two lines at the top of this file,
#     O = scale * ( (Q * e^P) S_0 + A V )               S_C = e^(P_C) * S_0 + (K * e^R)^T V,
# gives, with dA_ij = dO_i . v_j for j <= i, else 0, and the sums of g between j and i written G_ij,
#     dV   = (K * e^R) dS_C + A^T dO                    dS_0 = e^(P_C) * dS_C + (Q * e^P)^T dO
#     dq_i = e^P_i * (S_0 dO_i)  +  sum_j dA_ij k_j e^G_ij
#     dk_j = e^R_j * (dS_C v_j)  +  sum_i dA_ij q_i e^G_ij
# dV and dS_0 are the scan again, from the last chunk to the first: q and k have changed places, dO is what
# is written, dS the state, A is transposed. In the other two the state is transposed: dO reads S^T, which V
# writes to with K; V reads dS^T, which dO writes to with Q. So one kernel, scan_kernel, does it all:
#     o   scan of q, k, v    from S_0                   dv  scan of k, q, dO   from dS_T, last chunk first
#     dq  scan of dO, v, k   from S_0^T                 dk  scan of v, dO, q   from dS_T^T, last chunk first
# A program holds BLOCK_V columns of one head's state in registers and walks over the chunks. Each block of
# columns reads q and k once; nothing of the forward pass is kept but its inputs, and the backward pass holds
# one state a chunk only where log_decay wants a gradient.
#
# One decay a head: e^P, e^R and A = (Q K^T) * D are made on the way (SIDE "head"), in all four scans alike.
# One a channel: making A takes longer than the scan, and a program that also holds the state can keep too few
# warps busy with it. But only the state is sequential. prepare_kernel makes Q * e^P, K * e^R and A of all
# chunks side by side, the scans have bare matrix products left (SIDE "key": a state's decays lie along its
# rows, "value": along its columns, where it is transposed), and finish_kernel adds what of dq and dk lies
# within a chunk.
#
# Long sequences, few heads: the card would stand idle. So the chunks are dealt out to segments that run at
# once. A first pass over k and v alone gives what each segment adds to the state and its decay; a program
# then begins by replaying the segments before its own, S = e^total * S + local.
#
# The decay's gradient. What reaches the loss through channel c is a sum of terms, each with a factor
# e^(sum of the g on its way), so the gradient of g_t is the sum of the terms that have g_t on their way. In
# one chunk:
#     X_ij  from k_j to q_i,  if j < t <= i             q_i * dq_i = Y_i + sum_j X_ij
#     Y_i   from S_0 to q_i,  if t <= i                 k_j * dk_j = Z_j + sum_i X_ij
#     Z_j   from k_j to S_C,  if j < t                  sum_V S_C * dS_C = W + sum_j Z_j
#     W     from S_0 to S_C,  always
# Sum q_s * dq_s - k_s * dk_s over s >= t: the X with both ends at t or later cancel, which leaves the X and Y
# that cross t, less the Z_j of j >= t; adding W + sum_j Z_j completes it:
#     dg_t = sum_{s = t .. C} (q_s * dq_s - k_s * dk_s)  +  sum_V S_C * dS_C             (0 where g_t = -inf)
# One a head can afford the X themselves. Either restarts at every chunk, so that its digits do not wear off
# with T. Where log_decay wants a gradient, the scan for dq leaves each S_0 behind (marks) and the scan for dk
# meets it with its dS_C: W = e^(P_C) * sum_V S_0 * dS_C.
#
# Decays on the matrix units. The sum of g over tokens that depend on the row is a product of a 0/1 matrix
# with g, exact where g is bf16 (else g goes in two parts). Of the levels that make A, those of larger halves
# are as at the top; rows of a right half need one factor and rows of a left half the other, so one e^sum
# serves both. The smallest blocks are done at once, about their middle: e^(g_m + .. + g_i) on one side, its
# inverse on the other. There a single g counts for no less than -8.5 in bf16 and -17 in float32, whose e^g is
# below the rounding of either; their sums, at most 8 of the one and 4 of the other, keep e^sum within e^68,
# which leaves room for gradients of 1e-8 and for products of an input and a gradient up to 1e8.
if triton:
    @triton.jit
    def load_tile(ptr, rows, stride, cols, n_rows, N_COLS: tl.constexpr):
        """Rows of a matrix that lie `stride` apart, 0 past its edges."""
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
    def rest(x, DTYPE: tl.constexpr):
        """What DTYPE leaves of float32 x."""
        return x - x.to(DTYPE).to(tl.float32)

    @triton.jit
    def fine_dot(a, b, DTYPE: tl.constexpr):
        """Product of float32 a and b to about 16 bits where DTYPE is bf16: of a and its rest with b and its
        rest, but for that of both rests."""
        out = dot(a, b, DTYPE)
        if DTYPE != tl.float32:
            out += dot(a, rest(b, DTYPE), DTYPE) + dot(rest(a, DTYPE), b, DTYPE)
        return out

    @triton.jit
    def exp(x):
        return tl.exp2(1.4426950408889634 * x)                              # 2 instructions; tl.exp: 5

    @triton.jit
    def sums(rows, g, DTYPE: tl.constexpr, EXACT: tl.constexpr):
        """Sums of g (C,N) over the tokens that each row of a 0/1 matrix (C,C) picks; g in two parts where
        DTYPE does not hold all its digits."""
        out = dot(rows, g, DTYPE)
        if not EXACT:
            out += dot(rows, rest(g, DTYPE), DTYPE)
        return out

    @triton.jit
    def level_factors(g, level: tl.constexpr, LEAF: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr):
        """What one level of A needs: factors (C,N) for the token that reads and the one that is read, and the
        pairs (C,C) of them. Level 0: blocks of 2 LEAF tokens about their middle; then halves of 2 LEAF,
        4 LEAF, .. tokens."""
        t = tl.arange(0, g.shape[0])
        i, j = t[:, None], t[None, :]
        HALF: tl.constexpr = LEAF << level
        right = i // HALF % 2 == 1
        own = (i // HALF == j // HALF) & ((j <= i) == right)                # from the middle to i, or i to it
        if level == 0:
            near = sums(own, tl.maximum(g, -8.5 if LEAF == 8 else -17.0), DTYPE, EXACT)
            near = tl.where(right, near, -near)
            return exp(near), exp(-near), (i // (2 * HALF) == j // (2 * HALF)) & (i >= j)
        else:
            factor = exp(sums(own, g, DTYPE, EXACT))
            return factor, factor, right & (i // HALF == j // HALF + 1)

    @triton.jit
    def head_decay(g_ptr, rows, stride, left, REVERSE: tl.constexpr, DTYPE: tl.constexpr):
        """One decay a head, over a chunk: the sum of g, its sums between each token and the side from which
        the state is read (C,) and to which it is written (C,), and D (C,C), the decay from j to i."""
        i, j = rows[:, None], rows[None, :]
        g = tl.load(g_ptr + rows * stride, mask=rows < left, other=0.0).to(tl.float32)
        if DTYPE == tl.float32:
            g = tl.maximum(g, -1e4)                                         # finite, and e^-1e4 is 0
            after_j = tl.where(i > j, g[:, None], 0.0)
            P, R, G = tl.cumsum(g, 0), tl.sum(after_j, 0), tl.cumsum(after_j, 0)
            if REVERSE:
                G = tl.trans(G)
        else:                                                               # differences do: bf16 is coarser
            g = tl.maximum(g, -80.0)
            P = tl.cumsum(g, 0)
            R = tl.sum(g, 0) - P
            G = P[None, :] - P[:, None] if REVERSE else P[:, None] - P[None, :]
        D = tl.where((i <= j) if REVERSE else (i >= j), exp(G), 0.0)
        if REVERSE:
            P, R = R, P
        return tl.sum(g, 0), P, R, D

    @triton.jit
    def chunk_of(T, H, n_chunks, BLOCK_T: tl.constexpr):
        """The chunk that this program has to itself: its number among all, batch row, head, first token, rows
        and how many tokens are left from the first on."""
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
        """Of one chunk: Q * e^P, K * e^R, A, and the sum of g."""
        at_chunk, b, h, first, rows, left = chunk_of(T, H, n_chunks, BLOCK_T)
        i, j = rows[:, None], rows[None, :]
        at = ((b * T + first) * H + h) * K
        q_ptr += b * stride_qb + h * stride_qh + first * stride_qt
        k_ptr += b * stride_kb + h * stride_kh + first * stride_kt
        g_ptr += b * stride_gb + h * stride_gh + first * stride_gt
        A = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, K, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            q = load_tile(q_ptr, rows, stride_qt, keys, left, K)
            k = load_tile(k_ptr, rows, stride_kt, keys, left, K)
            g = tl.maximum(load_tile(g_ptr, rows, stride_gt, keys, left, K).to(tl.float32), -1e4)
            for level in tl.static_range(LEVELS):
                up, down, pair = level_factors(g, level, LEAF, DTYPE, EXACT)
                A += tl.where(pair, fine_dot(q * up, tl.trans(k * down), DTYPE), 0.0)
            q_out = q * exp(sums(j <= i, g, DTYPE, EXACT))
            k_out = k * exp(sums(j > i, g, DTYPE, EXACT))
            store_tile(q_out_ptr + at, rows, H * K, keys, left, K, q_out)
            store_tile(k_out_ptr + at, rows, H * K, keys, left, K, k_out)
            tl.store(total_ptr + at_chunk * K + keys, tl.sum(g, 0), mask=keys < K)
        tl.store(A_ptr + at_chunk * BLOCK_T * BLOCK_T + i * BLOCK_T + j, A)

    @triton.jit
    def scan_kernel(
        q_ptr, k_ptr, v_ptr, g_ptr, A_ptr, start_ptr, local_ptr, total_ptr, o_ptr, final_ptr, marks_ptr,
        w_ptr, dg_ptr, T, H, n_chunks, n_segments, per_segment, scale,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        stride_gb, stride_gt, stride_gh, stride_wb, stride_wt, stride_wh, stride_sk, stride_sv,
        K: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ):
        """One scan over one segment. Without o_ptr it is the first pass, which gives local and total. g_ptr:
        g of each token (SIDE head), else the sums of each chunk. dg_ptr: this is the scan for dk, and gets dg
        (SIDE head) or W (SIDE value); w_ptr is then k."""
        FIRST_PASS: tl.constexpr = o_ptr is None
        N_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
        bh = (tl.program_id(0) // N_BLOCKS).to(tl.int64)
        b, h, block, segment = bh // H, bh % H, tl.program_id(0) % N_BLOCKS, tl.program_id(1)
        keys = tl.arange(0, BLOCK_K)
        vals = block * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = tl.arange(0, BLOCK_T)
        N_G: tl.constexpr = K if SIDE == "key" else V if SIDE == "value" else 1
        gates = keys if SIDE == "key" else vals if SIDE == "value" else tl.arange(0, 1)
        q_ptr += b * stride_qb + h * stride_qh
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
        g_ptr += b * stride_gb + h * stride_gh
        in_S = (keys < K)[:, None] & (vals < V)[None, :]
        at_S = keys[:, None] * stride_sk + vals[None, :] * stride_sv
        at_mark = keys[:, None] * V + vals[None, :]

        if FIRST_PASS:
            S = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        else:
            S = tl.load(start_ptr + bh * K * V + at_S, mask=in_S, other=0.0)
            if local_ptr is not None:                                       # replay the segments before this
                for past in range(segment):
                    at = bh * n_segments + past
                    decay = exp(tl.load(total_ptr + at * N_G + gates, mask=gates < N_G, other=0.0))
                    S *= decay[:, None] if SIDE == "key" else decay[None, :]
                    S += tl.load(local_ptr + at * K * V + at_S, mask=in_S, other=0.0)
        total = tl.zeros_like(gates).to(tl.float32)
        begin, end = segment * per_segment, tl.minimum((segment + 1) * per_segment, n_chunks)
        if SIDE != "head":
            chunk = tl.cast(n_chunks - 1 - begin if REVERSE else begin, tl.int64)
            sum_next = tl.load(g_ptr + chunk * stride_gt + gates, mask=gates < N_G, other=0.0)

        for step in range(begin, end):
            chunk = tl.cast(n_chunks - 1 - step if REVERSE else step, tl.int64)
            at_chunk = bh * n_chunks + chunk
            first = chunk * BLOCK_T
            left = (T - first).to(tl.int32)
            at = (b * T + first) * H + h                                    # first, in what is written here
            k = load_tile(k_ptr + first * stride_kt, rows, stride_kt, keys, left, K)
            v = load_tile(v_ptr + first * stride_vt, rows, stride_vt, vals, left, V)
            if SIDE == "head":
                sum_g, read, write, D = head_decay(g_ptr + first * stride_gt, rows, stride_gt, left,
                                                   REVERSE, DTYPE)
                added = dot(tl.trans(k), v * exp(write)[:, None], DTYPE)
            else:
                sum_g = sum_next                                            # loaded a chunk ahead
                after = tl.minimum(step + 1, n_chunks - 1)
                after = tl.cast(n_chunks - 1 - after if REVERSE else after, tl.int64)
                sum_next = tl.load(g_ptr + after * stride_gt + gates, mask=gates < N_G, other=0.0)
                added = dot(tl.trans(k), v, DTYPE)

            if not FIRST_PASS:
                q = load_tile(q_ptr + first * stride_qt, rows, stride_qt, keys, left, K)
                o = scale * dot(q, S, DTYPE)
                if dg_ptr is not None:                                      # here v is q and S is dS_C
                    S_0 = tl.load(marks_ptr + at_chunk * K * V + at_mark, mask=in_S, other=0.0)
                    W = scale * exp(sum_g) * tl.sum(S_0 * S, 0)
                if SIDE == "head":
                    o *= exp(read)[:, None]
                    A = scale * dot(q, tl.trans(k), DTYPE) * D
                    if dg_ptr is not None:                                  # and A is dA_ji e^G_ji
                        w = load_tile(w_ptr + b * stride_wb + h * stride_wh + first * stride_wt, rows,
                                      stride_wt, vals, left, V)             # k
                        X = tl.trans(A) * dot(v, tl.trans(w), DTYPE)
                        X = sums(rows[None, :] >= rows[:, None], X, DTYPE, DTYPE == tl.float32)     # i >= t
                        Y, Z = scale * exp(write) * tl.sum(v * dot(k, S_0, DTYPE), 1), tl.sum(w * o, 1)
                        X = tl.where(rows[None, :] < rows[:, None], X + Z[None, :], 0.0)            # j < t
                        dg = tl.sum(X, 1) + tl.cumsum(Y, 0, reverse=True) + tl.sum(W, 0)
                        g = tl.load(g_ptr + (first + rows) * stride_gt, mask=rows < left, other=0.0)
                        part = block.to(tl.int64) * T * (tl.num_programs(0) // N_BLOCKS)    # one a block
                        tl.store(dg_ptr + part + at + rows * H, tl.where(g == float("-inf"), 0.0, dg),
                                 mask=rows < left)
                    o += dot(A, v, DTYPE)
                elif SIDE == "key":
                    i, j = (rows[None, :], rows[:, None]) if REVERSE else (rows[:, None], rows[None, :])
                    A = tl.load(A_ptr + at_chunk * BLOCK_T * BLOCK_T + i * BLOCK_T + j)
                    o += scale * dot(A, v, DTYPE)
                    if DTYPE != tl.float32:                                 # what bf16 leaves of A
                        o += scale * dot(rest(A, DTYPE), v, DTYPE)
                elif dg_ptr is not None:
                    tl.store(dg_ptr + at_chunk * V + vals, W, mask=vals < V)
                store_tile(o_ptr + at * V, rows, H * V, vals, left, V, o)

            if marks_ptr is not None and dg_ptr is None:
                tl.store(marks_ptr + at_chunk * K * V + at_mark, S.to(marks_ptr.dtype.element_ty), mask=in_S)
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
            if segment == n_segments - 1:
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
        """Of one chunk: dq and dk out of S_0 dO_i and dS_C v_j (dq_in, dk_in), and dg."""
        at_chunk, b, h, first, rows, left = chunk_of(T, H, n_chunks, BLOCK_T)
        i, j = rows[:, None], rows[None, :]
        at = ((b * T + first) * H + h) * K
        q_ptr += b * stride_qb + h * stride_qh + first * stride_qt
        k_ptr += b * stride_kb + h * stride_kh + first * stride_kt
        v_ptr += b * stride_vb + h * stride_vh + first * stride_vt
        g_ptr += b * stride_gb + h * stride_gh + first * stride_gt
        do_ptr += b * stride_db + h * stride_dh + first * stride_dt
        dA = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for start in range(0, V, BLOCK_K):
            vals = start + tl.arange(0, BLOCK_K)
            do = load_tile(do_ptr, rows, stride_dt, vals, left, V)
            v = load_tile(v_ptr, rows, stride_vt, vals, left, V)
            dA += scale * dot(do, tl.trans(v), DTYPE)
        for start in range(0, K, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            q = load_tile(q_ptr, rows, stride_qt, keys, left, K)
            k = load_tile(k_ptr, rows, stride_kt, keys, left, K)
            raw = load_tile(g_ptr, rows, stride_gt, keys, left, K)
            g = tl.maximum(raw.to(tl.float32), -1e4)
            dq = load_tile(dq_in_ptr + at, rows, H * K, keys, left, K) * exp(sums(j <= i, g, DTYPE, EXACT))
            dk = load_tile(dk_in_ptr + at, rows, H * K, keys, left, K) * exp(sums(j > i, g, DTYPE, EXACT))
            if dg_ptr is not None:
                W = tl.load(W_ptr + at_chunk * K + keys, mask=keys < K, other=0.0)
                SdS = W + tl.sum(k * dk, 0)                                 # so far k * dk is Z
            for level in tl.static_range(LEVELS):
                up, down, pair = level_factors(g, level, LEAF, DTYPE, EXACT)
                dA_l = tl.where(pair, dA, 0.0)
                dq += up * fine_dot(dA_l, k * down, DTYPE)
                dk += down * fine_dot(tl.trans(dA_l), q * up, DTYPE)
            store_tile(dq_ptr + at, rows, H * K, keys, left, K, dq)
            store_tile(dk_ptr + at, rows, H * K, keys, left, K, dk)
            if dg_ptr is not None:
                dg = sums(j >= i, q * dq - k * dk, DTYPE, DTYPE == tl.float32) + SdS[None, :]
                store_tile(dg_ptr + at, rows, H * K, keys, left, K, tl.where(raw == float("-inf"), 0.0, dg))


class _TritonScan(torch.autograd.Function):
    """g is (B,T,H,1) or (B,T,H,K). A constant one comes expanded, stride 0; autograd sums its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, scale):
        q, k, v, g = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, g))
        state, A, side = state.contiguous(), None, "head" if g.shape[-1] == 1 else "key"
        ctx.save_for_backward(q, k, v, g, state)
        ctx.side, ctx.scale = side, scale
        if side == "key":
            q, k, g, A = _prepare(q, k, g)
        return _scan(q, k, v, g, A, side, state, _segments(k, v, g, side), scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        try:
            return _TritonScan._backward(ctx, do, dfinal)
        except Exception as e:
            if not _cannot_compile(e):
                raise
        with torch.enable_grad():                           # the same through PyTorch's form
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            q, k, v, g, state = (x.float() for x in inputs)
            o, final = scan_torch(q, k, v, g if ctx.side == "key" else g[..., 0], state, ctx.scale)
            return *torch.autograd.grad((o, final), inputs, (do.float(), dfinal)), None

    @staticmethod
    def _backward(ctx, do, dfinal):
        q, k, v, g, state = ctx.saved_tensors
        side, scale, A, marks, dg = ctx.side, ctx.scale, None, None, None
        do = do if do.stride(-1) == 1 else do.contiguous()
        end = dfinal.contiguous() / scale                   # a scan multiplies all that it reads by scale
        if side == "head":
            qs, ks, gs, transposed, dtype = q, k, g, "head", q.dtype
        else:
            qs, ks, gs, A = _prepare(q, k, g)
            transposed, dtype = "value", torch.float32      # finish_kernel adds to it
        past, coming = _segments(ks, v, gs, side), _segments(qs, do, gs, side, reverse=True)
        if ctx.needs_input_grad[3]:
            s = _layout(v, k, side)
            marks = ks.new_empty(*state.shape[:2], s["n_chunks"], *state.shape[:1:-1], dtype=_stored(ks))
            dg = (g.new_empty(s["n_blocks"], *g.shape, dtype=torch.float32) if side == "head" else
                  g.new_empty(*state.shape[:2], s["n_chunks"], k.shape[-1], dtype=torch.float32))
        dq, _ = _scan(do, v, ks, gs, None, transposed, state.mT, past, scale, marks=marks, dtype=dtype)
        dk, _ = _scan(v, do, qs, gs, None, transposed, end.mT, coming, scale, True, marks, k, dg, dtype)
        dv, dstate = _scan(ks, qs, do, gs, A, side, end, coming, scale, reverse=True)
        if side == "key":
            dq, dk, dg = _finish(q, k, v, g, do, dq, dk, dg, scale)
        elif dg is not None:
            dg = dg.sum(0).to(g.dtype)
        return dq, dk, dv, dg, dstate * scale, None


def _scan(q, k, v, g, A, side, start, segments, scale, reverse=False, marks=None, w=None, dg=None,
          dtype=None):
    """One scan: o (B,T,H,V) and the state after the last token it comes to, laid out as start is."""
    o, final = v.new_empty(v.shape, dtype=dtype), torch.empty_like(start)
    _launch_scan(q, k, v, g, A, side, start, segments, scale, reverse, o, final, marks, w, dg)
    return o, final


def _segments(k, v, g, side, reverse=False):
    """The first pass: what each segment but the last adds to the state, and the sum of its g. () if there is
    one segment only."""
    (B, _, H, K), n = k.shape, _layout(k, v, side)["n_segments"]
    if n == 1:
        return ()
    local = k.new_empty(B, H, n, K, v.shape[-1], dtype=torch.float32)
    total = k.new_empty(B, H, n, g.shape[-1], dtype=torch.float32)
    _launch_scan(k, k, v, g, None, side, local[:, :, 0], (local, total), 1.0, reverse)
    return local, total


def _launch_scan(q, k, v, g, A, side, start, segments, scale, reverse, o=None, final=None, marks=None,
                 w=None, dg=None):
    (B, T, H, K), V, s = k.shape, v.shape[-1], _layout(k, v, side)
    local, total = segments or (None, None)
    if o is None and s["BLOCK_T"] == 64:    # the first pass has less to do at once, and runs best in halves
        s = s | dict(BLOCK_T=32, n_chunks=2 * s["n_chunks"], per_segment=2 * s["per_segment"], stages=3)
    grid = (B * H * s["n_blocks"], s["n_segments"] - (o is None))
    scan_kernel[grid](
        q, k, v, g, A, start, local, total, o, final, marks, w, dg,
        T, H, s["n_chunks"], s["n_segments"], s["per_segment"], scale,
        *_strides(q, k, v, g, k if w is None else w), start.stride(-2), start.stride(-1),
        K=K, V=V, SIDE=side, REVERSE=reverse, DTYPE=_dtype(v), BLOCK_T=s["BLOCK_T"], BLOCK_K=s["BLOCK_K"],
        BLOCK_V=s["BLOCK_V"], num_warps=4, num_stages=s["stages"])


def _prepare(q, k, g):
    """Q * e^P, K * e^R, the sum of g of each chunk (B,N,H,K), and A (B,H,N,C,C)."""
    (B, T, H, K), s = q.shape, _layout(q, k, "key")
    N, C = s["n_chunks"], s["BLOCK_T"]
    qs, ks = q.new_empty(2, B, T, H, K, dtype=_stored(q))
    A, total = q.new_empty(B, H, N, C, C, dtype=torch.float32), q.new_empty(B, H, N, K, dtype=torch.float32)
    prepare_kernel[(B * H * N,)](q, k, g, qs, ks, A, total, T, H, N, *_strides(q, k, g), K=K,
                                 **_within_chunk(q, g, s), num_warps=1, num_stages=2)
    return qs, ks, total.transpose(1, 2), A


def _finish(q, k, v, g, do, dq_in, dk_in, W, scale):
    (B, T, H, K), s = q.shape, _layout(q, v, "key")
    dq, dk = q.new_empty(2, B, T, H, K)
    dg = None if W is None else g.new_empty(B, T, H, K)
    finish_kernel[(B * H * s["n_chunks"],)](
        q, k, v, g, do, dq_in, dk_in, W, dq, dk, dg, T, H, s["n_chunks"], scale, *_strides(q, k, v, g, do),
        K=K, V=v.shape[-1], **_within_chunk(q, g, s), num_warps=2, num_stages=3)
    return dq, dk, dg


def _strides(*tensors):
    """Each one's strides over batch, time and heads."""
    return [n for x in tensors for n in x.stride()[:3]]


def _dtype(x):
    """What is multiplied. float32 for float16 too: a state can pass its limit of 65,504."""
    return tl.bfloat16 if x.dtype == torch.bfloat16 and not _interpreted() else tl.float32


def _stored(x):
    """What is kept between two kernels: in the dtype that is multiplied."""
    return torch.bfloat16 if _dtype(x) == tl.bfloat16 else torch.float32


def _within_chunk(q, g, s):
    """Constants of prepare_kernel and finish_kernel. Narrow blocks of channels: many small programs keep more
    loads and products in flight than a few large ones."""
    half = _dtype(q) == tl.bfloat16
    first = 8 if half else 4
    return dict(DTYPE=_dtype(q), EXACT=not half or g.dtype == torch.bfloat16, BLOCK_T=s["BLOCK_T"],
                BLOCK_K=min(32, s["BLOCK_K"]), LEAF=first, LEVELS=(s["BLOCK_T"] // first).bit_length() - 1)


def _layout(k, v, side):
    return _layout_of(k.shape, v.shape[-1], v.dtype, side, _card(k.device))


@lru_cache(4096)                            # small scans would spend more time here than on the card
def _layout_of(shape, V, dtype, side, card):
    """How a scan lies on the card: chunks of BLOCK_T tokens, blocks of BLOCK_V columns, segments of chunks.
    Chosen once by timing on an H200; other cards have less shared memory and no use for 64-row products."""
    (B, T, H, K), (hopper, cores) = shape, card
    BLOCK_K, BLOCK_V = _block(K), _block(V)
    if dtype == torch.bfloat16 or _interpreted():
        BLOCK_T = 64 if side == "head" and hopper and max(BLOCK_K, BLOCK_V) <= 128 else 32
        BLOCK_V = min(BLOCK_V, 64 if BLOCK_K <= (128 if hopper else 64) else 32)
    else:                                   # float32 is multiplied outside the matrix units: small products
        BLOCK_T, BLOCK_V = 16, min(BLOCK_V, 32)
    n_chunks = _ceil(T, BLOCK_T)
    wanted = 2 * cores // (B * H * _ceil(max(K, V), 64))                    # two programs a multiprocessor
    per_segment = _ceil(n_chunks, max(1, min(wanted, n_chunks // 4)))
    return dict(BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, BLOCK_V=BLOCK_V, n_blocks=_ceil(V, BLOCK_V),
                n_chunks=n_chunks, per_segment=per_segment, n_segments=_ceil(n_chunks, per_segment),
                stages=2 if BLOCK_T == 64 else 3)


def _ceil(a, b):
    return -(-a // b)


def _block(n):
    """The least power of two that holds n, and a matrix unit's 16."""
    return max(16, 1 << (n - 1).bit_length())


@lru_cache
def _card(device):
    """Whether a GPU has Hopper's shared memory (227 KB a program), and how many multiprocessors."""
    if device.type != "cuda":
        return True, 4
    p = torch.cuda.get_device_properties(device)
    return p.shared_memory_per_block_optin >= 200 * 1024, p.multi_processor_count


def _interpreted():
    """TRITON_INTERPRET=1: the kernels run on a CPU, for tests. That interpreter cannot multiply bf16."""
    return not isinstance(scan_kernel, triton.JITFunction)
