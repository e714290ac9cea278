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
g = 0 (forget nothing) and g = -inf (forget all) need no special case. Two ways to build A from such sums:

  one number a head     The decay does not depend on c: A = (Q K^T) * D, D_ij = e^(g_{j+1} + .. + g_i).
                        Column j of the exponent is the running sum over i of g, the entries up to j set to 0.
  one number a channel  Divide and conquer. Cut a block of 2h tokens in the middle. From j in the left half to
                        i in the right half the path crosses the cut, so its decay is a product of two:
                            g_{j+1} + .. + g_i  =  R_j (of the left half)  +  P_i (of the right half),
                        and that quarter of A is one product, (Q * e^P)(K * e^R)^T. The halves are the same
                        problem with h/2, down to one token, A_ii = q_i . k_i: log2(C) levels.

References: Lightning Attention (constant decay a head; arXiv 2401.04658, 2405.17381), Gated Linear Attention
(decay a channel, in chunks; arXiv 2312.06635, section 4), HypeNet (arXiv 2601.22156, eq. 5, 6, 18, 19).
All tensors are time-major: (B,T,H,K) is batch, time, heads, key channels. Needs neither Triton nor a GPU.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BACKENDS = ("sequential", "torch", "triton")


# ---------------------------------------------------------------------- the one public function
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

    Computed in the state's dtype whatever autocast says, but for bf16 inputs to the Triton kernels, which are
    multiplied as bf16 and summed in float32. Differentiable in all five tensors, also through the state
    returned; the gradient of a log_decay of -inf is 0. Passing the state on splits a sequence anywhere.
    Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    backend = _check(q, k, v, log_decay, state, backend)
    B, T, H, K = q.shape
    tensors = [x for x in (q, k, v, log_decay, state) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if backend == "triton":
            g = log_decay.expand(B, T, H) if log_decay.dim() == 1 else log_decay
            return _TritonScan.apply(q, k, v, g, state, float(scale))
        scan = scan_sequential if backend == "sequential" else scan_torch
        o, state = scan(q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype), state, scale)
    return o.to(v.dtype), state


def _check(q, k, v, log_decay, state, backend):
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
    elif K > (128 if log_decay.dim() == 4 else 256):    # beyond this a compilation takes minutes
        cannot = f"K is {K}, above {128 if log_decay.dim() == 4 else 256}"
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


# ---------------------------------------------------------------------- triton: one program a head
# One program holds BLOCK_V columns of one head's S (the V columns never meet) and walks over the chunks.
# The forward keeps S at each chunk's start; the backward walks from the last chunk to the first with
# dS = dL/dS and so has nothing sequential to recompute. Write dO for scale * dL/dO. Differentiating
#     O = (Q * e^P) S_0 + A V,    S_C = e^(P_C) * S_0 + (K * e^R)^T V,    A as at the top of this file,
# gives, with dA_ij = dO_i . v_j for j <= i,
#     dV   = A^T dO + (K * e^R) dS_C
#     dq_i = e^P_i * (S_0 dO_i) + sum_{j <= i} dA_ij k_j e^(g_{j+1} + .. + g_i)
#     dk_j = e^R_j * (dS_C v_j) + sum_{i >= j} dA_ij q_i e^(g_{j+1} + .. + g_i)
#     dS_0 = e^(P_C) * dS_C + (Q * e^P)^T dO            which is dS_C of the chunk before
#
# The decay. What reaches the loss through channel c is a sum of terms, each with a factor e^(sum of the g on
# its way), so the gradient of g_t is the sum of the terms that have g_t on their way:
#     X_ij  from k_j to q_i,  if j < t <= i             q_i * dq_i = Y_i + sum_j X_ij
#     Y_i   from S_0 to q_i,  if t <= i                 k_j * dk_j = Z_j + sum_i X_ij
#     Z_j   from k_j to S_C,  if j < t                  sum_V S_C * dS_C = W + sum_j Z_j
#     W     from S_0 to S_C,  always
# One number a head has its X at hand, summed over channels: X = A * dA. One number a channel would need an X
# for each, but can do without. Sum q_s * dq_s - k_s * dk_s over s >= t: the X with both ends at t or later
# cancel, which leaves the X and Y that cross t, less the Z_j of j >= t; adding W + sum_j Z_j completes it:
#     dg_t = sum_{s = t .. C} (q_s * dq_s - k_s * dk_s)  +  sum_V S_C * dS_C             (0 where g_t = -inf)
# Both restart at every chunk, so their digits do not wear off with T.
if triton:
    @triton.jit
    def load_tile(ptr, rows, stride, cols, n_rows, n_cols):
        """A float32 tile of a matrix whose rows lie `stride` apart, 0 past its edges."""
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def store_tile(ptr, rows, stride, cols, n_rows, n_cols, tile):
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        tl.store(ptr + rows[:, None] * stride + cols[None, :], tile.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def dot(a, b, DTYPE: tl.constexpr):
        return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")     # never TF32

    @triton.jit
    def decay_sums(g, g_next, SIZE: tl.constexpr):
        """P (inclusive prefix), R (exclusive suffix sums) in blocks of SIZE rows; g_next is g one row on."""
        ROWS: tl.constexpr = g.shape[0]
        COLS: tl.constexpr = g.shape[1]
        inside = (tl.arange(0, ROWS) % SIZE != SIZE - 1)[:, None]           # a block's last row has no suffix
        P = tl.cumsum(tl.reshape(g, (ROWS // SIZE, SIZE, COLS)), 1)
        R = tl.cumsum(tl.reshape(tl.where(inside, g_next, 0.0), (ROWS // SIZE, SIZE, COLS)), 1, reverse=True)
        return tl.reshape(P, (ROWS, COLS)), tl.reshape(R, (ROWS, COLS))

    @triton.jit
    def head_decay(g, BLOCK_T: tl.constexpr):
        """D_ij = e^(g_{j+1} + .. + g_i) for j <= i, else 0, of one decay a head, g (BLOCK_T,1)."""
        i = tl.arange(0, BLOCK_T)[:, None]
        j = tl.arange(0, BLOCK_T)[None, :]
        return tl.where(i >= j, tl.exp(tl.cumsum(tl.where(i > j, g, 0.0), 0)), 0.0)

    @triton.jit
    def crossing(HALF: tl.constexpr, BLOCK_T: tl.constexpr):
        """True where row i is in the right and column j in the left half of one block of 2 HALF tokens."""
        i = tl.arange(0, BLOCK_T)[:, None] // HALF
        j = tl.arange(0, BLOCK_T)[None, :] // HALF
        return (i % 2 == 1) & (i == j + 1)

    @triton.jit
    def forward_kernel(
        q_ptr, k_ptr, v_ptr, g_ptr, state_ptr, o_ptr, starts_ptr, final_ptr, T, H, K, V, scale,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        stride_gb, stride_gt, stride_gh,
        KEEP_STARTS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LEVELS: tl.constexpr,
    ):
        bh = tl.program_id(0).to(tl.int64)                                  # int64: offsets pass 2^31
        b, h = bh // H, bh % H
        keys = tl.arange(0, BLOCK_K)
        vals = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        gates = tl.arange(0, BLOCK_K if CHANNELS else 1)                    # columns of g
        n_gates = K if CHANNELS else 1
        t = tl.arange(0, BLOCK_T)
        q_ptr += b * stride_qb + h * stride_qh
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
        g_ptr += b * stride_gb + h * stride_gh
        o_ptr += (b * T * H + h) * V
        starts_ptr += bh * tl.cdiv(T, BLOCK_T) * K * V
        S = load_tile(state_ptr + bh * K * V, keys, V, vals, K, V)

        for n in range(0, tl.cdiv(T, BLOCK_T)):
            if KEEP_STARTS:
                store_tile(starts_ptr, keys, V, vals, K, V, S)
                starts_ptr += K * V
            rows = n * BLOCK_T + t.to(tl.int64)                             # past T all is 0: no effect on S
            q = load_tile(q_ptr, rows, stride_qt, keys, T, K)
            k = load_tile(k_ptr, rows, stride_kt, keys, T, K)
            v = load_tile(v_ptr, rows, stride_vt, vals, T, V)
            g = load_tile(g_ptr, rows, stride_gt, gates, T, n_gates)
            g_next = load_tile(g_ptr, rows + 1, stride_gt, gates, T, n_gates)

            if CHANNELS:
                A = tl.where(t[:, None] == t[None, :], tl.sum(q * k, 1)[:, None], 0.0)
                for level in tl.static_range(LEVELS):
                    P, R = decay_sums(g, g_next, 1 << level)
                    A_level = dot(q * tl.exp(P), tl.trans(k * tl.exp(R)), DTYPE)
                    A += tl.where(crossing(1 << level, BLOCK_T), A_level, 0.0)
            else:
                A = dot(q, tl.trans(k), DTYPE) * head_decay(g, BLOCK_T)
            P, R = decay_sums(g, g_next, BLOCK_T)
            o = dot(q * tl.exp(P), S, DTYPE) + dot(A, v, DTYPE)
            store_tile(o_ptr, rows, H * V, vals, T, V, scale * o)
            S = tl.exp(tl.sum(g, 0))[:, None] * S + dot(tl.trans(k * tl.exp(R)), v, DTYPE)
        store_tile(final_ptr + bh * K * V, keys, V, vals, K, V, S)

    @triton.jit
    def backward_kernel(
        q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, starts_ptr, final_ptr, dfinal_ptr,
        dq_ptr, dk_ptr, dv_ptr, dg_ptr, dstate_ptr, B, T, H, K, V, scale,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        stride_gb, stride_gt, stride_gh, stride_db, stride_dt, stride_dh,
        CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LEVELS: tl.constexpr,
    ):
        bh = tl.program_id(0).to(tl.int64)
        b, h = bh // H, bh % H
        keys = tl.arange(0, BLOCK_K)
        vals = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        gates = tl.arange(0, BLOCK_K if CHANNELS else 1)
        n_gates = K if CHANNELS else 1
        t = tl.arange(0, BLOCK_T)
        q_ptr += b * stride_qb + h * stride_qh
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
        g_ptr += b * stride_gb + h * stride_gh
        do_ptr += b * stride_db + h * stride_dh
        dv_ptr += (b * T * H + h) * V
        part = (tl.program_id(1) * B + b) * T * H + h                       # dq, dk, dg: one part a V block
        dq_ptr += part * K
        dk_ptr += part * K
        dg_ptr += part * n_gates
        n_chunks = tl.cdiv(T, BLOCK_T)
        starts_ptr += (bh + 1) * n_chunks * K * V
        dS = load_tile(dfinal_ptr + bh * K * V, keys, V, vals, K, V)
        SdS = tl.sum(load_tile(final_ptr + bh * K * V, keys, V, vals, K, V) * dS, 1)    # sum_V S_C * dS_C

        for n in range(0, n_chunks):
            starts_ptr -= K * V
            rows = (n_chunks - 1 - n) * BLOCK_T + t.to(tl.int64)
            q = load_tile(q_ptr, rows, stride_qt, keys, T, K)
            k = load_tile(k_ptr, rows, stride_kt, keys, T, K)
            v = load_tile(v_ptr, rows, stride_vt, vals, T, V)
            do = load_tile(do_ptr, rows, stride_dt, vals, T, V) * scale
            g = load_tile(g_ptr, rows, stride_gt, gates, T, n_gates)
            g_next = load_tile(g_ptr, rows + 1, stride_gt, gates, T, n_gates)
            S = load_tile(starts_ptr, keys, V, vals, K, V)

            P, R = decay_sums(g, g_next, BLOCK_T)
            q_P = q * tl.exp(P)
            decay = tl.exp(tl.sum(g, 0))[:, None]                           # e^(P_C)
            dq = tl.exp(P) * dot(do, tl.trans(S), DTYPE)                    # so far q * dq is Y
            dk = tl.exp(R) * dot(v, tl.trans(dS), DTYPE)                    # so far k * dk is Z
            dv = dot(k * tl.exp(R), dS, DTYPE)
            dA = dot(do, tl.trans(v), DTYPE)
            if CHANNELS:
                diagonal = t[:, None] == t[None, :]
                A = tl.where(diagonal, tl.sum(q * k, 1)[:, None], 0.0)
                dA_ii = tl.sum(tl.where(diagonal, dA, 0.0), 1)[:, None]
                dq += dA_ii * k
                dk += dA_ii * q
                for level in tl.static_range(LEVELS):
                    P, R = decay_sums(g, g_next, 1 << level)
                    cross = crossing(1 << level, BLOCK_T)
                    q_l, k_l, dA_l = q * tl.exp(P), k * tl.exp(R), tl.where(cross, dA, 0.0)
                    A += tl.where(cross, dot(q_l, tl.trans(k_l), DTYPE), 0.0)
                    dq += tl.exp(P) * dot(dA_l, k_l, DTYPE)
                    dk += tl.exp(R) * dot(tl.trans(dA_l), q_l, DTYPE)
                dg = tl.cumsum(q * dq - k * dk, 0, reverse=True) + SdS[None, :]
                dg = tl.where(g == float("-inf"), 0.0, dg)
            else:
                D = head_decay(g, BLOCK_T)
                A = dot(q, tl.trans(k), DTYPE) * D
                X_Z = tl.cumsum(A * dA, 0, reverse=True) + tl.sum(k * dk, 1)[None, :]
                X_Z = tl.where(t[:, None] > t[None, :], X_Z, 0.0)           # [t, j]: from j, crossing t
                Y = tl.cumsum(tl.sum(q * dq, 1), 0, reverse=True)
                dg = (tl.sum(X_Z, 1) + Y)[:, None] + decay * tl.sum(S * dS)
                dq += dot(dA * D, k, DTYPE)
                dk += dot(tl.trans(dA * D), q, DTYPE)
            dv += dot(tl.trans(A), do, DTYPE)

            store_tile(dq_ptr, rows, H * K, keys, T, K, dq)
            store_tile(dk_ptr, rows, H * K, keys, T, K, dk)
            store_tile(dv_ptr, rows, H * V, vals, T, V, dv)
            store_tile(dg_ptr, rows, H * n_gates, gates, T, n_gates, dg)

            dS = decay * dS + dot(tl.trans(q_P), do, DTYPE)
            SdS = tl.sum(S * dS, 1)                                         # this S_0 is the next one's S_C
        store_tile(dstate_ptr + bh * K * V, keys, V, vals, K, V, dS)


class _TritonScan(torch.autograd.Function):
    """g is (B,T,H) or (B,T,H,K): a constant one comes expanded, stride 0, and autograd sums its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, g, state, scale):
        q, k, v, state = _dense(q), _dense(k), _dense(v), state.contiguous()
        g = _dense(g) if g.dim() == 4 else g
        B, T, H, K, V = *q.shape, v.shape[-1]
        grid, config = _launch(q, k, v, g)
        o, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
        keep = any(ctx.needs_input_grad)    # without a backward, memory does not grow with T but for o
        starts = state.new_empty(B, H, triton.cdiv(T, config["BLOCK_T"]) if keep else 0, K, V)
        forward_kernel[grid](q, k, v, g, state, o, starts, final, T, H, K, V, scale,
                             *_strides(q, k, v, g), KEEP_STARTS=keep, **config)
        ctx.save_for_backward(q, k, v, g, starts, final)
        ctx.scale = scale
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, g, starts, final = ctx.saved_tensors
        B, T, H, K, V = *q.shape, v.shape[-1]
        grid, config = _launch(q, k, v, g)
        do, dfinal = _dense(do), dfinal.contiguous()
        parts = grid[1]
        dq, dk = final.new_empty(2, parts, B, T, H, K)
        dg = final.new_empty(parts, *g.shape)
        dv, dstate = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(final)
        backward_kernel[grid](q, k, v, g, do, starts, final, dfinal, dq, dk, dv, dg, dstate,
                              B, T, H, K, V, ctx.scale, *_strides(q, k, v, g, do), **config)
        dq, dk, dg = (x.sum(0).to(like.dtype) for x, like in ((dq, q), (dk, k), (dg, g)))
        return dq, dk, dv, dg, dstate, None


def _dense(x):
    """x with its last dimension contiguous, as the kernels read it; the other strides are passed to them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors):
    """Each one's strides over batch, time and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _launch(q, k, v, g):
    """The grid and the compile-time constants: tiles small enough for 99 KB of shared memory."""
    B, _, H, K, V = *q.shape, v.shape[-1]
    BLOCK_K, BLOCK_V = (max(16, triton.next_power_of_2(x)) for x in (K, V))
    bf16 = q.dtype == k.dtype == v.dtype == torch.bfloat16 and not _interpreted()
    if bf16 or _interpreted():              # 32 rows: with 64, triton 3.6 uses Hopper's async products, and
        BLOCK_T, BLOCK_V = 32, min(BLOCK_V, 64 if BLOCK_K <= 64 else 32)    # dq, dk come out wrong at K = 24
    else:                                   # float32 is unrolled, outside the matrix units: small products
        BLOCK_T, BLOCK_V = 16, min(BLOCK_V, 32)
    DTYPE = tl.bfloat16 if bf16 else tl.float32     # for float16 too: a state can pass its limit of 65,504
    config = dict(CHANNELS=g.dim() == 4, LEVELS=BLOCK_T.bit_length() - 1, DTYPE=DTYPE,
                  BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, BLOCK_V=BLOCK_V, num_warps=4, num_stages=1)
    return (B * H, triton.cdiv(V, BLOCK_V)), config


def _interpreted():
    """TRITON_INTERPRET=1: the kernels run on a CPU, for tests. That interpreter cannot multiply bf16."""
    return not isinstance(forward_kernel, triton.JITFunction)
