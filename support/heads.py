"""hypenet.make_heads as one kernel: RMSNorm of each head, then RoPE, for q or k of whole sequences.

A head has few channels. torch.compile makes kernels of several passes for it, at a third of the speed of
memory. Here one program has a tile of heads, and their two halves of channels are two tensors: RoPE turns
channel i and i + D/2 as one pair. The backward kernel computes the norm again from its input.
"""
import torch

from kernel import block_size, card, ceil_div, triton

if triton:
    import triton.language as tl

ROWS = 64                                   # heads in a tile


class Heads(torch.autograd.Function):
    """x (B,T,H,D) with any strides over B, T and H -> RoPE(RMSNorm(x)) (B,T,H,D), contiguous. weight (D,) or
    None: no norm. cos, sin (1 or B,T,1,D/2) or None: no RoPE."""

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        out = x.new_empty(x.shape)
        launch(heads_kernel, x, weight, eps, (cos, sin), x, out, None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, weight, cos, sin = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dx = x.new_empty(x.shape)
        dweight = None if weight is None else x.new_empty(n_programs(x), x.size(-1), dtype=torch.float32)
        launch(heads_gradient_kernel, x, weight, ctx.eps, (cos, sin), dout, dx, dweight)
        return dx, None if weight is None else dweight.sum(0).to(weight.dtype), None, None, None


def n_programs(x):
    return min(ceil_div(x[..., 0].numel(), ROWS), 16 * card(x.device)[1])


def launch(kernel, x, weight, eps, rope, y, out, dweight):
    """y: the tensor that goes through the kernel, x or the gradient of the output."""
    (B, T, H, D), (cos, sin) = x.shape, rope
    assert x.stride(3) == y.stride(3) == 1 and (cos is None or cos.is_contiguous() and sin.is_contiguous())
    with torch.cuda.device_of(x):
        kernel[(n_programs(x),)](
            x, y, weight, cos, sin, out, dweight, B * T * H, T, H, eps, *x.stride()[:3], *y.stride()[:3],
            T * (D // 2) if cos is not None and len(cos) > 1 else 0, D=D, HALF=block_size(D // 2), ROWS=ROWS,
            num_warps=4)


def serves(x, embd, s_t, dtype):
    """Whether the kernels do all that make_heads is asked for."""
    return (triton is not None and x.is_cuda and embd is None and s_t is None and x.dtype == dtype
            and x.stride(-1) == 1 and x.size(-1) % 2 == 0 and x.size(1) > 1)


if triton:
    @triton.jit
    def load_halves(ptr, at, channel, D: tl.constexpr, mask):
        a = tl.load(ptr + at + channel, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(ptr + at + channel + D // 2, mask=mask, other=0.0).to(tl.float32)
        return a, b

    @triton.jit
    def load_tile_of_heads(
        first, x_ptr, y_ptr, cos_ptr, sin_ptr, n, T, H, stride_xb, stride_xt, stride_xh, stride_yb, stride_yt,
        stride_yh, stride_rope, channel, D: tl.constexpr, ROWS: tl.constexpr,
    ):
        """ROWS heads from the first on: where they stand in the output, the mask, both halves of x and of y,
        and cos and sin."""
        row = first + tl.arange(0, ROWS)
        b, t, h = row // (T * H), row // H % T, row % H
        mask = (row < n)[:, None] & (channel < D // 2)
        a, c = load_halves(x_ptr, (b * stride_xb + t * stride_xt + h * stride_xh)[:, None], channel, D, mask)
        ya, yb = load_halves(y_ptr, (b * stride_yb + t * stride_yt + h * stride_yh)[:, None], channel, D, mask)
        cos, sin = tl.full(mask.shape, 1.0, tl.float32), tl.zeros(mask.shape, tl.float32)
        if cos_ptr is not None:
            at = (b * stride_rope + t * (D // 2))[:, None] + channel
            cos, sin = tl.load(cos_ptr + at, mask=mask, other=0.0), tl.load(sin_ptr + at, mask=mask, other=0.0)
        return row[:, None] * D + channel, mask, a, c, ya, yb, cos, sin

    @triton.jit
    def heads_kernel(
        x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, dweight_ptr, n, T, H, eps, stride_xb, stride_xt,
        stride_xh, stride_yb, stride_yt, stride_yh, stride_rope, D: tl.constexpr, HALF: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """RoPE(RMSNorm(x)), a tile after another."""
        channel = tl.arange(0, HALF)[None, :]
        if weight_ptr is not None:
            weight_a, weight_b = load_halves(weight_ptr, 0, channel, D, channel < D // 2)
        for first in range(tl.program_id(0).to(tl.int64) * ROWS, n, tl.num_programs(0) * ROWS):
            at, mask, a, b, _, _, cos, sin = load_tile_of_heads(
                first, x_ptr, y_ptr, cos_ptr, sin_ptr, n, T, H, stride_xb, stride_xt, stride_xh, stride_yb,
                stride_yt, stride_yh, stride_rope, channel, D, ROWS)
            if weight_ptr is not None:
                r = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + eps)[:, None]
                a, b = a * r * weight_a, b * r * weight_b
            tl.store(out_ptr + at, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + at + D // 2, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def heads_gradient_kernel(
        x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, dweight_ptr, n, T, H, eps, stride_xb, stride_xt,
        stride_xh, stride_yb, stride_yt, stride_yh, stride_rope, D: tl.constexpr, HALF: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """The gradient by x, from y, the gradient by the output; each program's share of the one by weight.
        With x^ = x r, r = 1 / rms, and g = y' * weight, where y' is y turned back:
        dx = r (g - x^ mean(g x^)), dweight = sum y' x^."""
        channel = tl.arange(0, HALF)[None, :]
        if weight_ptr is not None:
            weight_a, weight_b = load_halves(weight_ptr, 0, channel, D, channel < D // 2)
            sum_a, sum_b = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
        for first in range(tl.program_id(0).to(tl.int64) * ROWS, n, tl.num_programs(0) * ROWS):
            at, mask, a, b, ya, yb, cos, sin = load_tile_of_heads(
                first, x_ptr, y_ptr, cos_ptr, sin_ptr, n, T, H, stride_xb, stride_xt, stride_xh, stride_yb,
                stride_yt, stride_yh, stride_rope, channel, D, ROWS)
            ya, yb = ya * cos + yb * sin, yb * cos - ya * sin
            if weight_ptr is not None:
                r = tl.rsqrt(tl.sum(a * a + b * b, 1) / D + eps)[:, None]
                a, b = a * r, b * r
                sum_a += ya * a
                sum_b += yb * b
                ya, yb = ya * weight_a, yb * weight_b
                mean = (tl.sum(ya * a + yb * b, 1) / D)[:, None]
                ya, yb = r * (ya - a * mean), r * (yb - b * mean)
            tl.store(out_ptr + at, ya.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + at + D // 2, yb.to(out_ptr.dtype.element_ty), mask=mask)
        if weight_ptr is not None:
            at = dweight_ptr + tl.program_id(0) * D + tl.arange(0, HALF)
            tl.store(at, tl.sum(sum_a, 0), mask=tl.arange(0, HALF) < D // 2)
            tl.store(at + D // 2, tl.sum(sum_b, 0), mask=tl.arange(0, HALF) < D // 2)
