"""The loss of the head and its gradient, from logits, in one kernel.

halo.sum_of_losses is the definition: alpha CE + (1 - alpha) KL. A vocabulary is wide, so logits are the
largest tensors of a step. The plain form reads and writes the logits many times, mostly in float32. Each
program of loss_kernel has one token, and makes two passes over its logits. The first pass finds the
denominators of both softmaxes, and the KL. The second pass writes the gradient over the student's logits. The
second pass runs from the last column to the first, and so finds most logits in the cache.

Let s and t be the logits of student and teacher, and lse the log of the sum of e^s or e^t. Then
log q = s - lse_s and log p = t - lse_t are the logs of the two softmaxes:

    term             loss                                   gradient with respect to s
    CE               lse_s - s[target]                      q - onehot(target)
    KL, "forward"    D = sum p (t - s) - lse_t + lse_s      q - p
    KL, "reverse"    D = sum q (s - t) - lse_s + lse_t      q (log q - log p - D)
"""
import torch

from kernel import interpreted, triton

if triton:
    import triton.language as tl

    from kernel import exp


def fused(x):
    """Whether loss_kernel runs on the device of x."""
    return triton is not None and x.is_cuda


def loss_and_gradient(plain, logits_s, logits_t, targets, kl, alpha):
    """plain(logits_s, logits_t, targets, kl, alpha), a sum over tokens, and its gradient (n,V) for logits_s.
    plain is halo.sum_of_losses. On a GPU the kernel computes both, and the gradient overwrites logits_s."""
    if fused(logits_s):
        return launch(logits_s, logits_t, targets, kl, alpha), logits_s
    with torch.enable_grad():
        logits_s.requires_grad_()
        loss = plain(logits_s, logits_t, targets, kl, alpha)
    return loss.detach(), torch.autograd.grad(loss, logits_s)[0]


def launch(logits_s, logits_t, targets, kl, alpha):
    """The loss of loss_and_gradient, by the kernel. The gradient overwrites logits_s."""
    (n, V), with_teacher = logits_s.shape, logits_t is not None
    assert logits_s.stride(1) == 1 and (not with_teacher or logits_t.stride(1) == 1)
    loss = logits_s.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(logits_s):
        loss_kernel[(n,)](
            logits_s, logits_t, targets, loss, V, logits_s.stride(0),
            logits_t.stride(0) if with_teacher else 0, targets.stride(0), float(alpha), TEACHER=with_teacher,
            REVERSE=kl == "reverse", BLOCK=1024 if interpreted() else 8192, num_warps=32)
    return loss.sum()


if triton:
    LOW = tl.constexpr(-1e30)               # stands for -inf: a difference of two is 0, not NaN

    @triton.jit
    def load_logits(ptr, at, V):
        mask = at < V
        return tl.where(mask, tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32), LOW)

    @triton.jit
    def add_online(top, below, x):
        """Adds the columns of x to softmax denominators, one per row: below * e^top plus the sum of e^x.
        Returns the new top, the new below, the factor for older sums, and e^(x - top)."""
        higher = tl.maximum(top, tl.max(x, 1))
        fade = exp(top - higher)
        e = exp(x - higher[:, None])
        return higher, fade * below + tl.sum(e, 1), fade, e

    @triton.jit
    def loss_kernel(
        s_ptr, t_ptr, target_ptr, loss_ptr, V, stride_s, stride_t, stride_target, alpha,
        TEACHER: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """One token: the loss, and the gradient, which is written over the logits at s_ptr. Each thread has
        eight neighbouring columns, a row of `at`. So no thread waits for another within the first pass."""
        row = tl.program_id(0).to(tl.int64)
        s_ptr += row * stride_s
        target = tl.load(target_ptr + row * stride_target)
        at = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        s_target = tl.load(s_ptr + target).to(tl.float32)
        top_s = tl.full((BLOCK // 8,), LOW, tl.float32)
        below_s = tl.zeros((BLOCK // 8,), tl.float32)
        if TEACHER:
            t_ptr += row * stride_t
            top_t, below_t, apart = top_s, below_s, below_s
        for first in range(0, V, BLOCK):
            s = load_logits(s_ptr, first + at, V)
            top_s, below_s, fade, e = add_online(top_s, below_s, s)
            if TEACHER:
                t = load_logits(t_ptr, first + at, V)
                difference = s - t
                if not REVERSE:
                    difference = -difference
                    top_t, below_t, fade, e = add_online(top_t, below_t, t)
                    apart = fade * apart + tl.sum(e * difference, 1)
                else:
                    apart = fade * apart + tl.sum(e * difference, 1)
                    top_t, below_t, fade, e = add_online(top_t, below_t, t)
        top = tl.max(top_s, 0)
        below = tl.sum(below_s * exp(top_s - top), 0)
        lse_s = top + tl.log(below)
        loss = alpha * (lse_s - s_target)
        if TEACHER:
            if REVERSE:
                D = tl.sum(apart * exp(top_s - top), 0) / below - lse_s
            top = tl.max(top_t, 0)
            below = tl.sum(below_t * exp(top_t - top), 0)
            lse_t = top + tl.log(below)
            if REVERSE:
                D += lse_t
            else:
                D = tl.sum(apart * exp(top_t - top), 0) / below - lse_t + lse_s
            loss += (1 - alpha) * D
        tl.store(loss_ptr + row, loss)
        for back in range(0, V, BLOCK):         # the columns read last are nearest in the cache
            first = (V - 1) // BLOCK * BLOCK - back
            s = load_logits(s_ptr, first + at, V)
            q = exp(s - lse_s)
            gradient = alpha * (q - tl.where(first + at == target, 1.0, 0.0))
            if TEACHER:
                t = load_logits(t_ptr, first + at, V)
                if REVERSE:
                    gradient += (1 - alpha) * q * (s - lse_s - t + lse_t - D)
                else:
                    gradient += (1 - alpha) * (q - exp(t - lse_t))
            tl.store(s_ptr + first + at, gradient.to(s_ptr.dtype.element_ty), mask=first + at < V)
