"""Laws of the kernels of a training step: each equals the plain function that it stands for."""

import pytest
import torch

import halo
import hypenet
import support.heads as heads
import support.loss as loss
from test_hypenet import DEVICE, GPU, needs_triton, rmse, some_ids, tiny

DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]    # the interpreter has no bf16
pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [7, 1024, 2500])
@pytest.mark.parametrize("kl, alpha", [("forward", 0), ("reverse", 0), ("forward", 0.3), ("reverse", 0.5),
                                       ("forward", 1)])
def test_kernel_is_the_definition(kl, alpha, V, dtype):
    """Loss and gradient by the student's logits equal those of halo.sum_of_losses, also in a vocabulary that
    is no multiple of the block."""
    torch.manual_seed(0)
    logits_s, logits_t = 4 * torch.randn(2, 5, V, device=DEVICE) + 30
    logits_s, logits_t = logits_s.to(dtype), logits_t.to(dtype) if alpha < 1 else None
    targets = torch.randint(V, (5, 2), device=DEVICE)[:, 0]                 # a slice of rows has a stride
    leaf = logits_s.double().requires_grad_()
    ref = halo.sum_of_losses(leaf, logits_t, targets, kl, alpha)
    gradient = torch.autograd.grad(ref, leaf)[0]
    out = loss.launch(logits_s, logits_t, targets, kl, alpha)
    assert rmse(out, ref) < 1e-5
    assert rmse(logits_s, gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_kernel_gives_the_loss_of_distillation(frozen, monkeypatch):
    """distil_loss by the kernel equals distil_loss as written: value, and gradients of all that trains. A
    frozen head, as in the article's recipe, has none."""
    teacher, student = tiny(1, torch.float32).to(DEVICE), tiny(2, torch.float32).to(DEVICE).requires_grad_()
    idx, targets = some_ids(2, 9).to(DEVICE), some_ids(2, 9, seed=1).to(DEVICE)
    student.wte.requires_grad_(not frozen)
    params = [p for p in student.parameters() if p.requires_grad]

    def results(kernels):
        monkeypatch.setattr(loss, "fused", lambda x: kernels)
        value = halo.distil_loss(student, teacher, idx, targets, "reverse", 0.5, slice_elements=5 * 61)
        return [value, *torch.autograd.grad(2 * value, params)]
    assert max(map(rmse, results(True), results(False))) < 1e-5


@pytest.mark.parametrize("D, normed, turned", [(64, True, True), (6, True, True), (32, True, False),
                                               (16, False, True)])
def test_heads_are_normed_and_turned(D, normed, turned):
    """Heads equals make_heads for strided heads, positions of each row, and strided gradients: output, and
    gradients by x and the gain of the norm."""
    torch.manual_seed(0)
    B, T, H = 2, 37, 3
    x = torch.randn(B, T, 3, H, D, device=DEVICE, requires_grad=True)
    weight, dy = torch.rand(D, device=DEVICE, requires_grad=True), torch.randn(B, H, T, D, device=DEVICE)
    angle = torch.randn(B, T, 1, D // 2, device=DEVICE)
    norm = (weight, 1e-5) if normed else None
    rope = (angle.cos(), angle.sin()) if turned else None
    ref = hypenet.make_heads(x[:, :, 1], norm, rope, None, None, x.dtype)
    out = heads.Heads.apply(x[:, :, 1], *(norm or (None, 0)), *(rope or (None, None)))
    params = [x, weight] if normed else [x]
    found, wanted = ([y, *torch.autograd.grad(y, params, dy.transpose(1, 2))] for y in (out, ref))
    assert max(map(rmse, found, wanted)) < 1e-6
