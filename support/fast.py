"""Generation at the speed of memory."""
from functools import lru_cache

import torch

from kernel import block_size as _block, card as _card, ceil_div as _ceil, dot_dtype as _dtype
from kernel import dot, exp, load_tile, store_tile, triton

if triton:
    import triton.language as tl


# ---------------------------------------------------------------------- one token: decode, attention, Linear
def has_kernels(x, *sizes):
    """Whether the kernels of a single token run where x lies, with heads of these sizes."""
    return triton is not None and x.is_cuda and max(sizes, default=1) <= 256


def decode(q, k, v, log_decay, state, scale=1.0, norms=(None, None), eps=0.0, rope=None, backend=None):
    """
    One token of chunked_scan, in place: q (B,1,H,K), k (B,1,G,K), v (B,1,G,V), heads sharing a k and v where
    G < H; log_decay (H,), (B,1,H) or (B,1,H,K); state (B,H,K,V) float32, contiguous, read and overwritten
    once. Returns o (B,1,H,V) in v's dtype. backend None: "triton" on a GPU, else "torch". Triton's also does
    what comes before: RMSNorm of q and k with gains `norms` (K,), and RoPE by rope = cos, sin (B,1,1,K/2).
    For inference: no gradient flows. ValueError for T > 1 or a state that does not fit.
    """
    (B, T, H, K), (_, _, G, V) = q.shape, v.shape
    if T != 1 or H % G or state.shape != (B, H, K, V) or not state.is_contiguous():
        raise ValueError(f"decode: given T = {T}, a state {tuple(state.shape)} of strides {state.stride()}; "
                         f"allowed T = 1, {(B, H, K, V)}, contiguous")
    g = log_decay if log_decay.dim() == 4 else log_decay[..., None].expand(B, 1, H, 1)
    if backend is None:
        backend = "triton" if has_kernels(q, K) and state.dtype == torch.float32 else "torch"
    if backend == "torch":
        assert norms == (None, None) and rope is None, "norms and RoPE are the Triton kernel's alone"
        q, g = q[:, 0].to(state.dtype), g[:, 0].to(state.dtype)
        k, new = (x[:, 0].to(state.dtype).repeat_interleave(H // G, dim=1) for x in (k, v))
        state.mul_(g.exp()[..., None]).add_(k[..., None] * new[:, :, None, :])
        return (scale * (q[:, :, None, :] @ state)).transpose(1, 2).to(v.dtype)
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1, "the last stride of q, k, v must be 1"
    o, BLOCK_V = v.new_empty(B, 1, H, V), min(16, _block(V))
    with torch.cuda.device_of(q):
        decode_kernel[(B * H, _ceil(V, BLOCK_V))](
            q, k, v, g, state, o, *norms, *_cos_sin(rope), H, H // G, scale, eps,
            *(n for x in (q, k, v, g) for n in x.stride()[::2]), g.stride(3) if g.shape[-1] > 1 else 0,
            K=K, V=V, BLOCK_K=_block(K), BLOCK_V=BLOCK_V, **_early(q.device))
    return o


def attend_cache(q, k, v, keys, values, pos, s=None, norms=(None, None), eps=0.0, rope=None, chunks=None):
    """
    One token of attention: k, v (B,1,G,D) go into their slot, pos % S, of the cache keys, values (B,S,G,D),
    of equal strides, and q (B,1,H,D) attends to the min(pos + 1, S) that are in it; pos (B,1) int64 is the
    token's position. s (B,1) multiplies the queries; norms, eps, rope: as in decode. chunks:
    embeddings (n,H*D) of chunks of so many tokens, a pair; the token's is added to q, and to a k as to its
    group's first q. Returns o (B,1,H,D).

    The cache is read once, with all of the card however few the heads are: it is dealt out in shares, whose
    softmaxes are merged by their denominators. How full it is only the device knows, so that a CUDA graph can
    hold the call.
    """
    (B, _, H, D), (_, S, G, _) = q.shape, keys.shape
    assert keys.stride() == values.stride() and {x.stride(3) for x in (q, k, v, keys)} == {1}
    R, BLOCK_D = H // G, _block(D)
    BLOCK_S = 64 if BLOCK_D * keys.element_size() <= 256 else 32       # two tiles of 16 KB, three in flight
    n_splits = min(_ceil(S, BLOCK_S), _ceil(4 * _card(q.device)[1], B * G), 128)    # four a multiprocessor
    o, q_out = q.new_empty(2, B, 1, H, D)
    part = o.new_empty(B, H, n_splits, D, dtype=torch.float32)
    lse = o.new_empty(B, H, n_splits, dtype=torch.float32)
    with torch.cuda.device_of(q):
        cache_kernel[(B, H + G)](
            q, k, v, keys, values, q_out, pos, s, *norms, *_cos_sin(rope), *(chunks or (None, 1)), H, G, S,
            eps,
            *(n for x in (q, k, v) for n in x.stride()[::2]), *keys.stride()[:3], D=D, BLOCK_D=BLOCK_D,
            **_early(q.device))
        attend_kernel[(B * G, n_splits)](
            q_out, keys, values, pos, part, lse, G, S, n_splits, D ** -0.5, *keys.stride()[:3], R=R, D=D,
            DTYPE=_dtype(keys), BLOCK_R=_block(R), BLOCK_D=BLOCK_D, BLOCK_S=BLOCK_S, **_early(q.device))
        merge_kernel[(B * G, R)](part, lse, o, n_splits, R=R, D=D, BLOCK_D=BLOCK_D, BLOCK_N=_block(n_splits),
                                 **_early(q.device))
    return o


def linear(x, weight, bias=None, norm=(None, None), eps=0.0, gate=None, act=None, residual=None):
    """
    act((norm(x) * sigmoid(gate)) weight^T + bias) + residual for a few tokens: x, gate (B,K) with any stride
    over B, weight (N,K), or (2N,K) where act is "swiglu" (else "gelu", "logsigmoid" or None), norm the gain
    (K,) of an RMSNorm and None, or gain and bias of a LayerNorm, residual (B,N). Returns (B,N) in x's dtype.
    One launch that reads the weights once: with so few tokens a layer costs what it takes to read it.
    """
    (B, K), N = x.shape, weight.shape[0] // (2 if act == "swiglu" else 1)
    assert x.stride(1) == 1 and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    BLOCK_K, matrices = _block(K), 2 if act == "swiglu" else 1
    BLOCK_N = max(1, 2 ** 15 // (BLOCK_K * matrices * weight.element_size()))   # 32 KB of weights a program
    y = x.new_empty(B, N)
    with torch.cuda.device_of(x):
        linear_kernel[(_ceil(N, BLOCK_N),)](
            x, weight, bias, *norm, gate, residual, y, B, N, eps, x.stride(0),
            0 if gate is None else gate.stride(0), K=K, ACT=act or "", BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            num_warps=8, **_early(x.device))
    return y


def _cos_sin(rope):
    """cos and sin (B,1,1,half), or None, None without RoPE."""
    return (None, None) if rope is None else (x.contiguous() for x in rope)


@lru_cache
def _early(device):
    """Options of the kernels of one token: from Hopper on each is launched before the one before it has ended
    (programmatic dependent launch)."""
    if (device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)
            and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")):
        return dict(EARLY=True, launch_pdl=True)
    return dict(EARLY=False)


if triton:
    # ------------------------------------------------------------------ triton: one token
    # A token costs what it takes to read the weights, the state and the cache once; what else there is to do
    # must not take launches of its own. So a norm, a gate, RoPE or a sum is done by the kernel that reads the
    # tensor next to it, and a layer is five launches (attention seven): Linear, state and three Linears.
    @triton.jit
    def await_previous(EARLY: tl.constexpr):
        """From here on the next kernel may be launched, while this one waits for the one before to end: what
        stands above, of each, hides behind its predecessor. So nothing above may read what a kernel of the
        step writes: only weights. EARLY: see _early."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def load_head(x_ptr, norm_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """One head's q or k of one token (D,) in float32, its RMSNorm (norm_ptr: gain) and RoPE done."""
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
    def decode_kernel(
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
        sin_ptr, embd_ptr, chunk, H, G, SIZE, eps, stride_qb, stride_qh, stride_kb, stride_kh,
        stride_vb, stride_vh, stride_cb, stride_cs, stride_ch, D: tl.constexpr, BLOCK_D: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """One token of an attention layer: k and v into the cache, q made ready (times s_t, if given)."""
        await_previous(EARLY)
        b, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
        pos = tl.load(pos_ptr + b)
        if cos_ptr is not None:
            cos_ptr += b * (D // 2)
            sin_ptr += b * (D // 2)
        if embd_ptr is not None:                                            # of a k: its group's first head's
            embd_ptr += (pos // chunk * H + tl.where(head < H, head, (head - H) * (H // G))) * D
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
            slot = b * stride_cb + pos % SIZE * stride_cs + g * stride_ch
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
        """y = act(W (norm(x) * sigmoid(z)) + bias) + residual, a few whole rows of W (N,K) a program: they go
        from memory to registers in one go, with nothing to wait for, and meet one token after the other. ACT
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
        q_ptr, k_ptr, v_ptr, pos_ptr, part_ptr, lse_ptr, G, SIZE, n_splits, scale,
        stride_kb, stride_ks, stride_kh, R: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
    ):
        """The R queries of one K/V head against one share of its cache: their softmax over it, and the log of
        its denominator."""
        await_previous(EARLY)
        bg, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        b, g = bg // G, bg % G
        used = tl.minimum(tl.load(pos_ptr + b) + 1, SIZE)
        share = tl.cdiv(tl.cdiv(used, BLOCK_S), n_splits) * BLOCK_S         # of a program, in whole blocks
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
        o = tl.where((below > 0)[:, None], o / below[:, None], 0.0)         # a share may hold nothing
        store_tile(part_ptr + at * D, r, D, dim, R, D, o)
        tl.store(lse_ptr + at + r, tl.where(below > 0, top + tl.log(below), float("-inf")), mask=r < R)

    @triton.jit
    def merge_kernel(part_ptr, lse_ptr, o_ptr, n_splits, R: tl.constexpr, D: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr):
        """The shares of one query, each with its weight in the softmax over all."""
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
