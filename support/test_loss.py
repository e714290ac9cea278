"""Laws of support/loss.py: the kernel of the head's loss equals its definition, halo.token_losses."""
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"    # read when triton is first imported

import halo  # noqa: E402
import kernel  # noqa: E402
import support.loss as loss  # noqa: E402

torch.set_num_threads(1)
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]    # the interpreter has no bf16
pytestmark = pytest.mark.skipif(kernel.triton is None, reason="triton is not installed")


def rmse(out, ref):
    return ((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [7, 1024, 2500])
@pytest.mark.parametrize("kl, alpha", [("forward", 0), ("reverse", 0), ("forward", 0.3), ("reverse", 0.5),
                                       ("forward", 1)])
def test_kernel_is_the_definition(kl, alpha, V, dtype):
    """Loss and gradient by the student's logits equal those of the formula in float64."""
    torch.manual_seed(0)
    logits_s, logits_t = 4 * torch.randn(2, 5, V, device=DEVICE) + 30
    logits_s, logits_t = logits_s.to(dtype), logits_t.to(dtype) if alpha < 1 else None
    targets = torch.randint(V, (5, 2), device=DEVICE)[:, 0]                 # a slice of rows has a stride
    leaf = logits_s.double().requires_grad_()
    ref = halo.token_losses(leaf, logits_t, targets, kl, alpha)
    gradient = torch.autograd.grad(ref, leaf)[0]
    out = loss.launch(logits_s, logits_t, targets, kl, alpha)
    assert rmse(out, ref.detach()) < 1e-5
    assert rmse(logits_s, gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_kernel_gives_the_loss_of_distillation(frozen, monkeypatch):
    """distil_loss by the kernel equals distil_loss as written: value, and gradients of all that trains. A
    frozen head, as in the article's recipe, has none."""
    torch.manual_seed(0)
    config = halo.HypeNetConfig(layers="AL", n_embd=32, head_dim=16, n_head=2, n_kv_head=2, n_hidden=48)
    teacher, student = halo.HypeNet(config).to(DEVICE), halo.HypeNet(config).to(DEVICE)
    idx, targets = torch.randint(256, (2, 2, 9), device=DEVICE)
    student.wte.requires_grad_(not frozen)
    params = [p for p in student.parameters() if p.requires_grad]

    def results(kernels):
        monkeypatch.setattr(loss, "fused", lambda x: kernels)
        value = halo.distil_loss(student, teacher, idx, targets, "reverse", 0.5, slice_elements=5 * 256)
        return [value, *torch.autograd.grad(2 * value, params)]
    for out, ref in zip(results(True), results(False)):
        assert rmse(out.detach(), ref.detach()) < 1e-5
