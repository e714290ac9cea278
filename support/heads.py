"""hypenet.make_heads as one kernel: RMSNorm of each head, then RoPE, for q or k of whole sequences.

A head has few channels. For such a head torch.compile makes kernels of several passes, which reach a third of
the memory's speed. Here one program has a tile of heads. The two halves of the channels are two tensors,
because RoPE turns channels i and i + D/2 as one pair. The backward pass computes the norm again from its
input.
"""
import torch

from kernel import block_size, card, ceil_div, triton

if triton:
    import triton.language as tl

TILE = 2048                                 # pairs of channels per program; more would not fit the registers


class Heads(torch.autograd.Function):
    """x (B,T,H,D) with any strides over B, T and H -> RoPE(RMSNorm(x)) (B,T,H,D), contiguous. weight is (D,);
    None means no norm. cos and sin are (1 or B,T,1,D/2); None means no RoPE."""

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return launch(x, None, weight, eps, cos, sin)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, cos, sin = ctx.saved_tensors
        dx, dweight = launch(x, dy, weight, ctx.eps, cos, sin)
        return dx, None if weight is None else dweight.sum(0).to(weight.dtype), None, None, None


def launch(x, dy, weight, eps, cos, sin):
    """Forward (dy None): the output and None. Backward: dx, and dweight as one row per program. dy is the
    gradient of the output."""
    (B, T, H, D), HALF = x.shape, block_size(x.size(-1) // 2)
    ROWS = max(1, TILE // HALF)
    n_programs = min(ceil_div(B * T * H, ROWS), 16 * card(x.device)[1])
    y = x if dy is None else dy if dy.stride(3) == 1 else dy.contiguous()
    assert x.stride(3) == 1 and (cos is None or cos.is_contiguous() and sin.is_contiguous())
    out, dweight = x.new_empty(x.shape), None
    if dy is not None and weight is not None:
        dweight = x.new_empty(n_programs, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        heads_kernel[(n_programs,)](
            x, y, weight, cos, sin, out, dweight, B * T * H, T, H, eps, *x.stride()[:3], *y.stride()[:3],
            T * (D // 2) if cos is not None and len(cos) > 1 else 0, D=D, HALF=HALF, ROWS=ROWS,
            BACKWARD=dy is not None, num_warps=4)
    return out, dweight


def serves(x, embd, s_t, dtype):
    """Whether the kernel covers a call of make_heads with these arguments."""
    return (triton is not None and x.is_cuda and embd is None and s_t is None and x.dtype == dtype
            and x.stride(-1) == 1 and x.size(-1) % 2 == 0 and x.size(1) > 1)


if triton:
    @triton.jit
    def load_halves(ptr, channel, D: tl.constexpr, mask):
        a = tl.load(ptr + channel, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptr + channel + D // 2, mask=mask, other=0.0).to(tl.float32)
        return a, b

    @triton.jit
    def heads_kernel(
        x_ptr, dy_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, dweight_ptr, n, T, H, eps, stride_xb, stride_xt,
        stride_xh, stride_yb, stride_yt, stride_yh, stride_rope, D: tl.constexpr, HALF: tl.constexpr,
        ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    ):
        """y = RoPE(x r weight) with r = 1 / rms(x), one tile of ROWS heads after another. BACKWARD: dx from
        dy, and this program's share of dweight. RoPE turns dy back first. Then, with u = x r and
        g = dy weight: dx = r (g - u mean(g u)), dweight = sum dy u."""
        channel = tl.arange(0, HALF)[None, :]
        if weight_ptr is not None:
            weight_a, weight_b = load_halves(weight_ptr, channel, D, channel < D // 2)
            sum_a, sum_b = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
        for first in range(tl.program_id(0).to(tl.int64) * ROWS, n, tl.num_programs(0) * ROWS):
            row = first + tl.arange(0, ROWS)
            b, t, h = row // (T * H), row // H % T, row % H
            mask = (row < n)[:, None] & (channel < D // 2)
            at = (b * stride_xb + t * stride_xt + h * stride_xh)[:, None]
            x_a, x_b = load_halves(x_ptr + at, channel, D, mask)
            if cos_ptr is not None:
                at = (b * stride_rope + t * (D // 2))[:, None] + channel
                cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
                sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
            if weight_ptr is not None:
                r = tl.rsqrt(tl.sum(x_a * x_a + x_b * x_b, 1) / D + eps)[:, None]
                x_a, x_b = x_a * r, x_b * r
            if BACKWARD:
                at = (b * stride_yb + t * stride_yt + h * stride_yh)[:, None]
                y_a, y_b = load_halves(dy_ptr + at, channel, D, mask)
                if cos_ptr is not None:
                    y_a, y_b = y_a * cos + y_b * sin, y_b * cos - y_a * sin
                if weight_ptr is not None:
                    sum_a += y_a * x_a
                    sum_b += y_b * x_b
                    y_a, y_b = y_a * weight_a, y_b * weight_b
                    mean = (tl.sum(y_a * x_a + y_b * x_b, 1) / D)[:, None]
                    y_a, y_b = r * (y_a - x_a * mean), r * (y_b - x_b * mean)
            else:
                y_a, y_b = x_a, x_b
                if weight_ptr is not None:
                    y_a, y_b = y_a * weight_a, y_b * weight_b
                if cos_ptr is not None:
                    y_a, y_b = y_a * cos - y_b * sin, y_b * cos + y_a * sin
            at = out_ptr + row[:, None] * D + channel
            tl.store(at, y_a.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(at + D // 2, y_b.to(out_ptr.dtype.element_ty), mask=mask)
        if BACKWARD and weight_ptr is not None:
            at = dweight_ptr + tl.program_id(0) * D + tl.arange(0, HALF)
            tl.store(at, tl.sum(sum_a, 0), mask=tl.arange(0, HALF) < D // 2)
            tl.store(at + D // 2, tl.sum(sum_b, 0), mask=tl.arange(0, HALF) < D // 2)
