"""Laws of kernel.py, hypenet.py, halo.py and sample.py. Every test compares values: with a definition
written out, with another way to compute the same, or with what was there before. No network and no GPU
needed: the Triton kernels run on a GPU where there is one, else in Triton's interpreter. Models are random
and tiny, runs of halo.py a few steps long."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"    # read when triton is first imported

import bench  # noqa: E402
import halo  # noqa: E402
import hypenet  # noqa: E402
import kernel  # noqa: E402
import sample  # noqa: E402
import support.common as common  # noqa: E402
import support.fast as fast  # noqa: E402
import support.pretrained as pretrained  # noqa: E402
import support.recall as recall  # noqa: E402,F401
import support.run as run  # noqa: E402,F401
import support.text as text  # noqa: E402,F401
from hypenet import FAMILIES, HypeNet, HypeNetConfig  # noqa: E402
from support.tokens import Tokenizer  # noqa: E402

torch.set_num_threads(1)                    # the tensors are tiny
DEVICE = "cuda" if GPU else "cpu"
HERE = Path(__file__).parent
INF = float("inf")
SHAPES = ("head", "token", "channel")       # log_decay (H,), (B,T,H), (B,T,H,K)
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="triton is not installed")
FAST = ["torch", pytest.param("triton", marks=needs_triton)]


def rmse(out, ref):
    """RMSE(ref - out) / RMSE(ref) in float64; inf and NaN fail any limit."""
    assert out.shape == ref.shape, (out.shape, ref.shape)
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    return ((out - ref).norm() / ref.norm().clamp_min(1e-30)).item()


@contextlib.contextmanager
def one_line(*words):
    """The block must raise a ValueError of one line that holds these words."""
    with pytest.raises(ValueError) as error:
        yield
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


# ---- the scan ----------------------------------------------------------------------------------------------


def inputs(shape, T, B=2, H=3, K=24, V=40, dtype=torch.float64):
    """q, k, v, log_decay, state, all random, with decays of every strength."""
    rng = torch.Generator().manual_seed(0)
    size = {"head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[shape]
    log_decay = -torch.randn(size, generator=rng).abs() * torch.rand(size, generator=rng)
    sizes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V)
    q, k, v, state = (torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes)
    return [x.to(DEVICE, dtype) for x in (q, k, v, log_decay, state)]


def gradients(o, state, tensors):
    """The gradients of a fixed random function of o and the final state."""
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, state)]
    return torch.autograd.grad((o, state), tensors, upstream)


def scan(tensors, backend, grads=True, dtype=None):
    """o, the final state, and their gradients, computed in the given dtype."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_(grads) for x in tensors]
    o, state = kernel.chunked_scan(*tensors, scale=0.3, backend=backend)
    return [o, state, *(gradients(o, state, tensors) if grads else ())]


def assert_equal(outs, refs, limit):
    for name, out, ref in zip(("o", "state", "dq", "dk", "dv", "dlog_decay", "dstate"), outs, refs):
        assert rmse(out, ref) <= limit, f"{name}: {rmse(out, ref):.1e}, allowed {limit:.0e}"


@pytest.mark.parametrize("n", [1, 2, 31, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_sequential(shape, n):
    """Chunks of matrix products equal the recurrence, forward and gradients, at any length, in float64."""
    tensors = inputs(shape, n)
    assert_equal(scan(tensors, "torch"), scan(tensors, "sequential"), 1e-13)


@needs_triton
@pytest.mark.parametrize("n, K, V", [
    (1, 16, 16), (63, 24, 40), (64, 32, 16), (65, 24, 72), (130, 24, 40), (50, 100, 72)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_sequential(shape, n, K, V):
    """The kernels equal the recurrence, forward and every gradient, to the digits of float32. The gradient of
    a constant decay is one sum over all tokens, whose terms cancel."""
    tensors = inputs(shape, n, 2, 1, K, V, torch.float32)
    outs, refs = scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64)
    assert_equal(outs[:5] + outs[6:], refs[:5] + refs[6:], 1e-6)
    assert rmse(outs[5], refs[5]) <= (2e-5 if shape == "head" else 2e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [1e4, 1e-8], ids=str)
def test_large_and_small_numbers_stay_finite(size, backend):
    """Strong decays per channel lose no digits, with keys and gradients of 1e4 or gradients of 1e-8."""
    rng, n = torch.Generator().manual_seed(0), 40
    q, k, v, up = (torch.randn(1, n, 1, 16, generator=rng).to(DEVICE) for _ in range(4))
    g = -25.0 * (torch.rand(1, n, 1, 16, generator=rng) < 0.5).float().to(DEVICE)
    if size > 1:
        k, up = k * size, up * size
    else:
        up = up * size
    grads = []
    for dtype, how in ((torch.float32, backend), (torch.float64, "sequential")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, g)]
        o = kernel.chunked_scan(*leaves, backend=how)[0]
        grads.append([o, *torch.autograd.grad(o, leaves, up.to(dtype))])
    for out, ref in zip(*grads):
        assert rmse(out, ref) <= 2e-5


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_and_half_dtypes(shape):
    """q and k are used in v's dtype. float16 is computed in float32, so a state may pass 65,504."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    outs = scan([q, k.half(), v, log_decay, state], "triton")
    assert_equal(outs, scan([q, k.half().float(), v, log_decay, state], "triton"), 1e-3)
    tensors = [(q / 1000).half(), k.half(), v.half(), log_decay, 1e5 * state.abs()]
    outs, refs = scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64)
    assert max(rmse(outs[i], refs[i]) for i in (0, 1, 4, 5)) <= 2e-3        # dq and dk are too large for it


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_change_nothing(shape, monkeypatch):
    """Few heads, many tokens: segments that run at once give what one walk over the chunks gives."""
    tensors = inputs(shape, 1100, 1, 1, 24, 40, torch.float32)
    for hopper, cores, segments in ((False, 0, 1), (False, 8, 7), (True, 8, 4)):
        monkeypatch.setattr(kernel, "card", lambda device, card=(hopper, cores): card)
        assert kernel._layout(tensors[0], tensors[2], "head").n_segments == segments or GPU
        assert_equal(scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64), 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_scan_token_is_one_token(shape):
    """The scan of one token equals chunked_scan at T = 1, and overwrites the state that it is given."""
    q, k, v, log_decay, state = inputs(shape, 1, dtype=torch.float32)
    ref_o, ref_state = kernel.chunked_scan(q, k, v, log_decay, state, 0.3, "sequential")
    o = fast.decode(q, k, v, log_decay, state, 0.3)
    assert rmse(o, ref_o) <= 1e-6 and rmse(state, ref_state) <= 1e-6
    with one_line("T = 2"):
        fast.decode(*inputs(shape, 2, dtype=torch.float32))


@needs_triton
@pytest.mark.parametrize("fails", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_be_compiled_runs_in_pytorch(shape, fails, monkeypatch):
    """Where Triton cannot compile the forward or the backward pass, the PyTorch form runs. One warning says
    so, and Triton is not tried again. A caller who names Triton gets its error."""
    calls = []

    def give_up(*_):
        calls.append(fails)
        raise kernel.triton.TritonError("out of resource")
    tensors = inputs(shape, 40, dtype=torch.float32)
    refs = scan(tensors, "torch")
    monkeypatch.setattr(kernel, "_not_compiled", set())
    monkeypatch.setattr(kernel, "_pick_backend", lambda *_: "triton")       # as a GPU would
    monkeypatch.setattr(kernel, f"_triton_{fails}", give_up)
    with pytest.raises(kernel.triton.TritonError):                          # the interpreter's own are bugs
        scan(tensors, None)
    monkeypatch.setattr(kernel, "interpreted", lambda: False)
    with pytest.raises(kernel.triton.TritonError):
        scan(tensors, "triton")
    with pytest.warns(UserWarning, match="Triton cannot compile") as warned:
        assert_equal(scan(tensors, None), refs, 2e-6)
        assert_equal(scan(tensors, None), refs, 2e-6)
    assert len(warned) == 1 and len(calls) == 3


@pytest.mark.skipif(not GPU, reason="offsets past 2^31 need 5 GB of tensors on a GPU")
@pytest.mark.parametrize("shape", ["head", "channel"])
def test_offsets_pass_two_to_the_31(shape):
    """The last tokens of a tensor of more than 2^31 elements are read and written where they lie."""
    B, T, H, K = 1, 2 ** 31 // 128 + 4096, 1, 128
    x = torch.zeros(B, T, H, K, dtype=torch.bfloat16, device="cuda")
    x[:, -256:] = torch.randn(B, 256, H, K, device="cuda").bfloat16()
    g = torch.full((H,), -0.1, device="cuda") if shape == "head" else torch.full_like(x, -0.1)
    o, state = kernel.chunked_scan(x, x, x, g)
    g_end = g if shape == "head" else g[:, -256:]
    ref, ref_state = kernel.chunked_scan(x[:, -256:], x[:, -256:], x[:, -256:], g_end)
    assert rmse(o[:, -256:], ref) <= 1e-2 and rmse(state, ref_state) <= 1e-2 and not o[:, :-256].any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_do_not_matter(shape, backend):
    """Views with any strides give what their contiguous copies give, gradients too."""
    tensors = inputs(shape, 34, 2, 2, dtype=torch.float32)
    views = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]     # batch last in memory
    wide = torch.cat(tensors[:3], -1).split([24, 24, 40], -1)     # q, k, v of one fused projection
    refs = scan(tensors, backend)
    assert not views[0].is_contiguous() and not wide[0].is_contiguous()
    for others in (views, [*wide, *views[3:]]):
        assert [x.detach().requires_grad_().stride() for x in others] == [x.stride() for x in others]
        assert_equal(scan(others, backend), refs, 1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_inputs(shape, backend):
    """bf16 inputs give bf16 outputs and a float32 state, near those of float64. Autocast does not round
    float32."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    tensors = [x.bfloat16() for x in (q, k, v)] + [log_decay, state]
    outs, refs = scan(tensors, backend), scan(tensors, "sequential", dtype=torch.float64)
    assert [x.dtype for x in outs[:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    rounds = GPU and backend == "triton"    # its matrix units multiply bf16; all else is float32 inside
    assert_equal(outs, refs, 4e-2 if rounds else 2e-2)
    assert rmse(outs[1], refs[1]) <= (5e-3 if rounds else 1e-6)
    tensors = [q, k, v, log_decay, state]
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = scan(tensors, backend, grads=False)
    assert_equal(outs, scan(tensors, "sequential", grads=False), 1e-6)


@needs_triton
@pytest.mark.skipif(GPU, reason="the interpreter's: compiled kernels know bf16 and float32 alone")
def test_half_precision_rounds_nothing_within_a_chunk(monkeypatch):
    """One decay per channel, multiplied in a half precision that holds the inputs and the sums of g exactly.
    Within one chunk outputs and gradients are then those of float32: neither A nor a product of decays and
    inputs is rounded."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 16, 2, 24, generator=rng).bfloat16().float() for _ in range(4))
    g = -torch.randint(64, (1, 16, 2, 24), generator=rng) / 64
    monkeypatch.setattr(kernel, "dot_dtype", lambda x: kernel.tl.float16)   # the interpreter has no bf16

    def results(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, g)]
        o = kernel.chunked_scan(*leaves, scale=0.5, backend=backend)[0]
        return [o, *torch.autograd.grad(o, leaves, do.to(dtype))]
    for out, ref in zip(results("triton", torch.float32), results("sequential", torch.float64)):
        assert rmse(out, ref) < 3e-6


@pytest.mark.parametrize("value", [-30.0, -INF, "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_extreme_decays(backend, shape, value):
    """log_decay 0, -30 and -inf in one chunk are exact. The gradient of -inf is 0, never NaN."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    if value == "mixed":
        choice = torch.randint(4, log_decay.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        log_decay = torch.tensor([0, -0.1, -30, -INF], device=DEVICE)[choice]
    else:
        log_decay[..., 1] = value           # one head, or one channel
    tensors = q, k, v, log_decay, state
    outs = scan(tensors, backend)
    assert_equal(outs, scan(tensors, "sequential", dtype=torch.float64), 1e-5)
    assert (outs[5][log_decay == -INF] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_forget_nothing_for_100_000_tokens(backend, shape):
    """With log_decay 0 the state is the sum of k^T v, even after 100,000 tokens (interpreted: 2,000)."""
    n = 2_000 if backend == "triton" and not GPU else 100_000
    q, k, v, log_decay, state = inputs(shape, n, 1, 1, 16, 4, torch.float32)
    outs = scan([q, k, v, 0 * log_decay, state], backend, grads=False)
    writes = k[0, :, 0, :, None].double() * v[0, :, 0, None, :].double()
    states = state[0, 0].double() + writes.cumsum(0)                        # (T,K,V)
    o = 0.3 * torch.einsum("tk,tkv->tv", q[0, :, 0].double(), states)
    assert_equal(outs, [o[None, :, None], states[None, None, -1]], 1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_float16_sums_are_finite(backend):
    """float16 values near 65 that are never forgotten: o passes float16's 65,504, so it is float32."""
    n = 2_000 if backend == "triton" and not GPU else 12_000
    q, k, v = (65 + torch.rand(1, n, 1, 4, device=DEVICE).half() for _ in range(3))
    forget_nothing = torch.zeros(1, device=DEVICE)
    o, state = kernel.chunked_scan(q, k, v, forget_nothing, scale=0.5, backend=backend)
    writes = k[0, :, 0, :, None].double() * v[0, :, 0, None, :].double()
    ref = 0.5 * torch.einsum("tk,tkv->tv", q[0, :, 0].double(), writes.cumsum(0))
    assert_equal([o, state], [ref[None, :, None], writes.sum(0)[None, None]], 1e-5)
    assert o.dtype == torch.float32 and o[0, 0].max() > 65_504
    one = kernel.chunked_scan(q[:, :1], k[:, :1], v[:, :1], forget_nothing, scale=0.5)[0]
    assert rmse(one, o[:, :1]) < 1e-6


def test_a_float16_layer_is_finite():
    """A float16 layer that forgets nothing reads 12,000 values near 65. o passes 65,504, and the output is
    still that of float32."""
    model = tiny(dtype=torch.float32, layers="L", decay="none", linear_rope=False)
    layer = model.blocks[0].mixer
    torch.nn.init.constant_(layer.qkvz.weight, 2.0)
    x = 1 + torch.rand(1, 12_000, 32, generator=torch.Generator().manual_seed(0)) / 32
    where = hypenet.locate(model.config, torch.arange(12_000)[None])
    with torch.no_grad():
        y = layer(x, where)
        assert rmse(layer.half()(x.half(), where), y) < 1e-2


@pytest.mark.parametrize("log_decay, stops", [(-1 / 256, 128), (0.0, 256)])
def test_a_bf16_state_would_stop(log_decay, stops):
    """Every token writes a 1. With the slowest decay of eq. 19 a bf16 state stops near 128, after about 200
    tokens, and without decay at 256. The state of the scan does not stop."""
    decay, S, right, tokens = math.exp(log_decay), torch.zeros((), dtype=torch.bfloat16), 0.0, 0
    for _ in range(1000):
        before, S = S, (decay * S.float() + 1).bfloat16()
        right = decay * right + 1
        tokens += int(S != before)
    assert abs(S.item() - stops) <= 1 and 200 <= tokens <= 256 and right > 251
    ones = torch.ones(1, 1000, 1, 1)
    state = kernel.chunked_scan(ones, ones, ones, torch.tensor([log_decay]))[1]
    assert abs(state.item() / right - 1) < 1e-5


def test_scale_cancels_in_a_norm():
    """An RMSNorm after the scan gives the same output and gradients with any scale, up to its epsilon."""
    found = []
    for scale in (1.0, 24 ** -0.5):
        leaves = [x.cpu().requires_grad_() for x in inputs("head", 9)]
        o = kernel.chunked_scan(*leaves, scale=scale)[0]
        y = torch.nn.functional.rms_norm(o.flatten(2), (120,), eps=1e-6)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append([y, *torch.autograd.grad(y, leaves, weights)])
    for with_scale, without in zip(*found):
        assert rmse(with_scale, without) < 1e-5


@pytest.mark.parametrize("q, v", [((0, 5, 2, 4), (0, 5, 2, 3)), ((1, 5, 0, 4), (1, 5, 0, 3)),
                                  ((1, 5, 2, 4), (1, 5, 2, 0)), ((1, 5, 2, 0), (1, 5, 2, 3))], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_nothing_in_nothing_out(backend, shape, q, v):
    """No rows, heads or channels: results and gradients have the shapes and values of the definition."""
    tensors = inputs(shape, *(q[1], q[0], *q[2:], v[3]), dtype=torch.float32)
    for out, ref in zip(scan(tensors, backend), scan(tensors, "sequential")):
        assert out.shape == ref.shape and out.dtype == ref.dtype and out.equal(ref)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [*FAST, None])
def test_split_anywhere(backend, shape):
    """A sequence cut into pieces, with the state passed on, equals one call, gradients included. The given
    state is not written to, and None means zeros."""
    tensors, outputs = inputs(shape, 70, 1, 1, dtype=torch.float32), []
    q, k, v, log_decay, state = leaves = [x.clone().requires_grad_() for x in tensors]
    for start, end in ((0, 1), (1, 34), (34, 69), (69, 70)):
        parts = [x if x.dim() == 1 else x[:, start:end] for x in (q, k, v, log_decay)]
        o, state = kernel.chunked_scan(*parts, state, 0.3, backend)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    outs = [o, state, *gradients(o, state, leaves)]
    assert_equal(outs, scan(tensors, "sequential", dtype=torch.float64), 1e-5)
    assert leaves[4].equal(tensors[4])
    zeros = kernel.chunked_scan(*tensors[:4], 0 * tensors[4], 0.3, backend)
    assert_equal(kernel.chunked_scan(*tensors[:4], None, 0.3, backend), zeros, 0)


def test_backend_is_chosen_by_device(monkeypatch):
    """backend None: one token by the definition, more by the fast form of the device."""
    calls = []
    for name in ("scan_sequential", "scan_torch"):
        plain = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, name=name, plain=plain: calls.append(name) or plain(*a))
    for n in (1, 2):
        kernel.chunked_scan(*(x.cpu() for x in inputs("head", n)))
    assert calls == ["scan_sequential", "scan_torch"]


@pytest.mark.parametrize("changes, message", [
    (dict(k=(2, 5, 3, 7)), "k: given"), (dict(q=(2, 5, 8), k=(2, 5, 8)), "q: given"),
    (dict(q=(2, 0, 3, 8), k=(2, 0, 3, 8)), "T >= 1"), (dict(v=(2, 6, 3, 4)), "v: given"),
    (dict(log_decay=(4,)), "log_decay: given"), (dict(log_decay=(2, 5, 3, 4)), "log_decay: given"),
    (dict(state=(2, 3, 4, 8)), "state: given"), (dict(backend="cuda"), "backend: given 'cuda'"),
    (dict(dtype=torch.int64), "int64, allowed floating-point"), (dict(v=(2, 5, 3)), "(2, 5, 3, V)"),
    (dict(scale=0), "scale: given 0")], ids=str)
def test_bad_scan_input_is_one_line(changes, message):
    """Bad shapes, dtypes and backends raise one line that says what was given and what is allowed."""
    sizes = dict(q=(2, 5, 3, 8), k=(2, 5, 3, 8), v=(2, 5, 3, 4), log_decay=(3,), state=(2, 3, 8, 4))
    args = {name: torch.zeros(changes.get(name, size), dtype=changes.get("dtype"))
            for name, size in sizes.items()}
    with one_line(message, "allowed"):
        kernel.chunked_scan(**args, scale=changes.get("scale", 1.0), backend=changes.get("backend"))


def test_triton_is_not_needed(monkeypatch):
    """kernel.py imports and runs without Triton. backend="triton" is then refused in one line, as for float64
    and for keys that are too wide."""
    for shape, K, dtype in (("head", 8, "float64"), ("head", 257, "float32"), ("channel", 257, "float32")):
        with one_line("given 'triton', but"):
            kernel.chunked_scan(*inputs(shape, 3, K=K, dtype=getattr(torch, dtype)), backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)                        # import triton now fails
    spec = importlib.util.spec_from_file_location("kernel_alone", kernel.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    tensors = inputs("channel", 9)
    assert_equal(alone.chunked_scan(*tensors), kernel.chunked_scan(*tensors, backend="sequential"), 1e-13)
    with one_line("not installed"):
        alone.chunked_scan(*tensors, backend="triton")


# ---- the model: its layers are their formulas --------------------------------------------------------------

T = 45
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GPT2 = dict(FAMILIES["gpt2"], n_kv_head=4)
HYPE = dict(attn_pe=0.0, attn_gate=True, logit_base=20.0)
PLAIN = dict(linear_norm=False, linear_gate=False, linear_qk_norm=False, linear_rope=False)
ARTICLE = dict(PLAIN, decay="channel", key_dim=4, chunk=8, n_chunks=6, window=11)
VARIANTS = {
    "teacher": dict(layers="AAA"),
    "teacher llama3": dict(FAMILIES["llama"], layers="AAA", rope_scaling=LLAMA3, tied=False, n_kv_head=1),
    "teacher biased": dict(layers="AAA", bias=True, n_kv_head=4),
    "teacher gpt2": dict(layers="AAA", **GPT2),
    "hype": HYPE,
    "hype no decay": dict(HYPE, decay="none", linear_kv_head=1),
    "hype decay per head": dict(HYPE, decay="head", linear_norm=False),
    "hype decay per channel": dict(HYPE, decay="channel", linear_kv_head=2),
    "hype half keys": dict(HYPE, key_dim=4, linear_gate=False, qk_norm=False),
    "hype gpt2": dict(GPT2, **HYPE),
    "rope fading": dict(HYPE, attn_pe=0.3),
    "wpe fading": dict(GPT2, attn_pe=0.3),
    "all linear": dict(PLAIN, layers="LLL"),
    "window": dict(HYPE, window=7),
    "window of one": dict(window=1),
    "window wider than the text": dict(window=100),
    "article": ARTICLE,
    "article no window": dict(ARTICLE, window=None, key_dim=8, attn_gate=True),
    "article gpt2": dict(GPT2, **ARTICLE),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def tiny(seed=0, dtype=torch.float64, **changes):
    """A random model, none of whose norms, gates, biases and embeddings is neutral."""
    sizes = dict(layers="LALA", vocab_size=61, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, n_hidden=40)
    torch.manual_seed(seed)
    model = HypeNet(HypeNetConfig(**dict(sizes, max_len=48) | changes)).to(dtype).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.3 * torch.randn(p.shape, dtype=torch.float64)
    return model


def some_ids(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def rope_by_hand(x, pos):
    """Channels i and i + D/2 of x (T,D) as one complex number, turned by pos * 10000^(-2i/D)."""
    D = x.shape[-1]
    turn = pos[:, None] * 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * torch.exp(1j * turn)
    return torch.cat((z.real, z.imag), -1)


def norm_by_hand(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def test_attention_layer_is_its_formula():
    """o_t = sigmoid(z_t) * sum_j softmax_j(s_t q_t . k_j / sqrt(D)) v_j over the window, with
    s_t = log(t + a) / log(a), t from 0; q, k = RoPE(attn_pe * (position mod chunk)) + e[position div chunk],
    a grouped k taking its first head's e."""
    model = tiny(layers="A", attn_pe=0.3, chunk=8, n_chunks=6, logit_base=20.0, attn_gate=True, window=11)
    attn, x, pos, o = model.blocks[0].mixer, torch.randn(T, 32, dtype=torch.float64), torch.arange(T), []
    q, k, v, z = (x @ attn.qkvz.weight.T).split([32, 16, 16, 32], 1)
    e = attn.chunk_embd.weight[pos // 8].split(8, 1)
    for h in range(4):
        group = slice(h // 2 * 8, h // 2 * 8 + 8)
        q_h = rope_by_hand(norm_by_hand(q[:, 8 * h:8 * h + 8], attn.q_norm), 0.3 * (pos % 8)) + e[h]
        k_h = rope_by_hand(norm_by_hand(k[:, group], attn.k_norm), 0.3 * (pos % 8)) + e[h // 2 * 2]
        scores = torch.log(pos + 20.0)[:, None] / math.log(20.0) * (q_h @ k_h.T) / math.sqrt(8)
        outside = (pos[None] > pos[:, None]) | (pos[None] <= pos[:, None] - 11)
        o.append(scores.masked_fill(outside, -INF).softmax(-1) @ v[:, group])
    y = (torch.cat(o, 1) * torch.sigmoid(z)) @ attn.out.weight.T
    assert rmse(attn(x[None], hypenet.locate(model.config, pos[None]))[0], y) < 1e-6


@pytest.mark.parametrize("linear_norm", [True, False])
def test_linear_layer_is_its_formula(linear_norm):
    """S_t = diag(f_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(K), y = (norm(o) * sigmoid(z)) W_o, one norm
    over all heads; q, k = RoPE(QK-norm(q, k)), f_t = sigmoid(x W_f + b), two heads sharing one k and v."""
    model = tiny(layers="L", decay="channel", key_dim=4, linear_kv_head=2, linear_norm=linear_norm)
    mixer, x, pos = model.blocks[0].mixer, torch.randn(T, 32, dtype=torch.float64), torch.arange(T)
    q, k, v, z = (x @ mixer.qkvz.weight.T).split([16, 8, 16, 32], 1)
    f = torch.sigmoid(x @ mixer.forget.weight.T + mixer.forget.bias)
    o = torch.zeros(T, 32, dtype=torch.float64)
    for h in range(4):
        q_h = rope_by_hand(norm_by_hand(q[:, 4 * h:4 * h + 4], mixer.q_norm), pos)
        k_h = rope_by_hand(norm_by_hand(k[:, h // 2 * 4:h // 2 * 4 + 4], mixer.k_norm), pos)
        v_h, S = v[:, h // 2 * 8:h // 2 * 8 + 8], torch.zeros(4, 8, dtype=torch.float64)
        for t in range(T):
            S = f[t, 4 * h:4 * h + 4, None] * S + torch.outer(k_h[t], v_h[t])
            o[t, 8 * h:8 * h + 8] = q_h[t] @ S / math.sqrt(4)
    y = ((norm_by_hand(o, mixer.norm) if linear_norm else o) * torch.sigmoid(z)) @ mixer.out.weight.T
    assert rmse(mixer(x[None], hypenet.locate(model.config, pos[None]))[0], y) < 1e-6


@pytest.mark.parametrize("name", ["teacher llama3", "hype", "wpe fading", "article gpt2"])
def test_model_is_its_formula(name):
    """x = wte, + attn_pe * wpe or + wpe[position mod chunk] + e[position div chunk] if positions are learned;
    x + mixer(norm(x)), x + MLP(norm(x)) in every layer; logits are norm(x) times wte or the head's own."""
    model, idx, pos = tiny(**VARIANTS[name]), some_ids(1, T), torch.arange(T)
    c, x, where = model.config, model.wte.weight[idx], hypenet.locate(model.config, pos[None])
    if c.chunk:
        x = x + model.wpe.weight[pos % 8] + model.chunk_embd.weight[pos // 8]
    elif c.position == "learned":
        x = x + 0.3 * model.wpe.weight[pos]
    for block in model.blocks:
        x = x + block.mixer(block.norm1(x), where)
        a, up = (block.mlp.up(block.norm2(x)).split(40, -1) * 2)[:2]
        gelu = 0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
        x = x + block.mlp.down(a * torch.sigmoid(a) * up if c.mlp == "swiglu" else gelu)
    logits = model.norm(x) @ (model.wte if c.tied else model.lm_head).weight.T
    assert rmse(model(idx)[0], logits) < 1e-9


def test_constant_decay_is_equation_19():
    """gamma_h = exp(-2^(-8h/H)), h = 1 .. H: for 32 heads from 0.4313237 to 0.9961014; decay "none" is 1."""
    gamma = tiny(n_head=32, n_kv_head=4).blocks[0].mixer.log_decay(torch.zeros(1)).exp().tolist()
    assert gamma == pytest.approx([math.exp(-2 ** (-8 * h / 32)) for h in range(1, 33)], rel=1e-6)
    assert [gamma[0], gamma[-1]] == pytest.approx([0.4313237, 0.9961014], abs=1e-7)
    assert tiny(decay="none").blocks[0].mixer.log_decay(torch.zeros(1)).tolist() == [0.0] * 4


def test_llama3_slows_long_wavelengths():
    """Wavelengths under original / high stay, those over original / low grow by factor, others blend."""
    angles = hypenet.rope_frequencies(HypeNetConfig(rope_scaling=LLAMA3), 16).tolist()
    plain = [10000.0 ** (-2 * i / 16) for i in range(8)]
    smooth = [min(1, max(0, (64 * x / (2 * math.pi) - 1) / (4 - 1))) for x in plain]
    assert angles == pytest.approx([s * x + (1 - s) * x / 8 for s, x in zip(smooth, plain)], rel=1e-5)
    assert smooth[0] == 1 > smooth[1] > 0 == smooth[-1]


def test_rope_sees_only_distances():
    """A text moved by 5,000 positions gives the same logits: RoPE's scores see distances. s_t sees more."""
    idx, far, scaled = some_ids(2, T), torch.tensor([5000, 0]), tiny(logit_base=20.0)
    assert rmse(tiny()(idx, offset=far)[0], tiny()(idx)[0]) < 1e-3
    assert rmse(scaled(idx, offset=far)[0], scaled(idx)[0]) > 1e-2


def test_half_precision_keeps_positions_and_state():
    """After .to(bfloat16), RoPE at position 100,000 is as exact as at 0, and S still adds up in float32."""
    idx, far = some_ids(1, T), torch.tensor([100_000])
    exact, half = tiny(dtype=torch.float32), tiny(dtype=torch.float32).to(torch.bfloat16)
    turn = 100_000 * 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for x, ref in zip(hypenet.locate(half.config, far[:, None]).attn_rope, (turn.cos(), turn.sin())):
        assert torch.allclose(x.flatten().double(), ref, atol=0.02)
    assert rmse(half(idx, offset=far)[0], exact(idx, offset=far)[0]) < 0.1
    model, idx = tiny(dtype=torch.float32, layers="L", decay="none").to(torch.bfloat16), some_ids(1, 600)
    steps, whole = model.init_state(1, 600), model.init_state(1, 600)
    model(idx, state=whole)
    for token in idx.split(1, 1):
        model(token, state=steps)
    assert steps.layers[0]["S"].dtype == torch.float32
    assert rmse(steps.layers[0]["S"], whole.layers[0]["S"]) < 2e-3


# ---- the model: any cut of a text, any batch ---------------------------------------------------------------


@every_variant
def test_one_pass_is_segments_is_single_tokens(name, monkeypatch):
    """One pass, segments of odd sizes and token by token give equal logits; the state stays where it is."""
    monkeypatch.setattr(hypenet, "PAST", 7)                                 # parts of the past
    model, idx = tiny(**VARIANTS[name]), some_ids(2, T)
    whole = model(idx)[0]
    for sizes in ([5, 1, 13, 2, 3, 17, 4], [1] * T, [T]):
        state = model.init_state(2, T)
        addresses = [t.data_ptr() for layer in state.layers for t in layer.values()]
        parts = [model(part, state=state, all_logits=True)[0] for part in idx.split(sizes, 1)]
        assert rmse(torch.cat(parts, 1), whole) < 1e-5
        assert state.pos.tolist() == [T, T]
        assert addresses == [t.data_ptr() for layer in state.layers for t in layer.values()]


@every_variant
def test_causal(name):
    """Other tokens from t on change the logits from t on, and none before."""
    model, idx = tiny(**VARIANTS[name]), some_ids(1, T)
    for t in (1, 20, T - 1):
        other = torch.cat((idx[:, :t], (idx[:, t:] + 1) % 61), 1)
        change = (model(other)[0] - model(idx)[0]).abs().amax((0, 2))       # (T,)
        assert change[:t].max() < 1e-9 < 1e-3 < change[t:].min()


@every_variant
def test_batch_is_each_alone(name):
    """Prompts of different lengths in one batch continue as each does alone, and as full passes say."""
    model = tiny(dtype=torch.float32, **VARIANTS[name])
    prompts = [some_ids(n, seed=n).tolist() for n in (3, 33, 1, 20)]
    batch = model.generate(prompts, 12, segment=5)
    assert batch == [model.generate([p], 12, segment=64)[0] for p in prompts]
    for prompt, continuation in zip(prompts, batch):
        for token in continuation:
            assert token == model(torch.tensor([prompt]))[0][0, -1].argmax()
            prompt.append(token)


def test_generation_options():
    """A row ends before its first stop id and leaves the others as they are; a seed repeats; top_k = 1 and a
    small top_p are greedy; ids from n_vocab on are never drawn."""
    model, prompts = tiny(dtype=torch.float32), [[1, 2, 3], [4, 5]]
    def draw(**options):
        return model.generate(prompts, 30, temperature=3.0, **options)
    greedy = model.generate(prompts, 30)
    stop = next(token for token in greedy[0] if token not in greedy[1])
    assert model.generate(prompts, 30, stop=[stop]) == [greedy[0][:greedy[0].index(stop)], greedy[1]]
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1) == draw(top_p=1e-9) == greedy
    assert max(map(max, draw(n_vocab=7) + model.generate(prompts, 30, n_vocab=7))) < 7


@pytest.mark.parametrize("options, weights", [
    (dict(), [1, 2, 3, 4]), (dict(top_k=2), [0, 0, 3, 4]), (dict(top_p=0.65), [0, 0, 3, 4]),
    (dict(top_p=0.75), [0, 2, 3, 4]), (dict(temperature=0.5), [1, 4, 9, 16])], ids=str)
def test_samples_have_their_probabilities(options, weights):
    """Ids are drawn in proportion to p^(1 / temperature), of the top_k, or of the fewest that reach top_p."""
    logits = torch.tensor([1.0, 2, 3, 4]).log().expand(20_000, 4)
    ids = hypenet.sample(logits, **dict(temperature=1.0) | options, rng=torch.Generator().manual_seed(0))
    share, weights = torch.bincount(ids, minlength=4) / 20_000, torch.tensor(weights)
    assert torch.allclose(share, weights / weights.sum(), atol=0.015) and not share[weights == 0].any()


def test_state_size():
    """K/V is exactly max_tokens or, with a window, no more than it; S does not depend on either."""
    S = 2 * 3 * 4 * 8 * 8 * 4               # two rows, three linear layers, (H,K,V) in float32
    for window, tokens, kv in ((None, 99, 99), (None, 9999, 9999), (50, 30, 30), (50, 9999, 50)):
        model = tiny(dtype=torch.bfloat16, layers="LLAL", window=window)
        assert model.init_state(2, tokens).nbytes() == (S, 2 * 2 * kv * 2 * 8 * 2)


# ---- halo: transfer ----------------------------------------------------------------------------------------


def options(recipe="paper", **changes):
    """The options of a recipe, as halo.py hands them on."""
    rows = dict(halo.RECIPES[recipe], max_ctx=512, changes={}, device="cpu")
    return argparse.Namespace(**vars(halo.get_args([])) | rows | changes)


@pytest.mark.parametrize("family", [dict(bias=True), GPT2], ids=["rope", "gpt2"])
@pytest.mark.parametrize("recipe", halo.RECIPES)
def test_all_attention_student_is_the_teacher(recipe, family):
    """With all layers "A", the teacher's positions and chunk embeddings 0, the transfer changes no logit."""
    teacher, idx = tiny(layers="AAA", **family), some_ids(2, 12)            # 12 tokens: one chunk, of 48 / 4
    config = halo.student_config(teacher.config, "AAA", options(recipe, changes=dict(attn_pe=1.0)))
    twins = [halo.attention_twin(block.mixer, config) for block in teacher.blocks]
    student = halo.assemble(teacher, config, twins).double()
    chunks = [p for name, p in student.named_parameters() if "chunk_embd" in name]
    assert config.attn_gate == (recipe == "paper")
    assert len(chunks) == (recipe == "article") * (1 if family is GPT2 else 3)
    for p in chunks:
        assert 0.015 < p.std() < 0.025
        p.data.zero_()
    assert rmse(student(idx)[0], teacher(idx)[0]) < 1e-6


@pytest.mark.parametrize("qk_norm, rank", [(True, 4), (False, 4), (False, 8)])
def test_low_rank_keys_are_the_best(qk_norm, rank):
    """A head's product of q and k rows is the truncated SVD of A_q^T A_k, split evenly, A holding QK-norm's
    gain and typical 1 / rms; at full rank without QK-norm q . k is the teacher's, biases included."""
    attn = tiny(layers="A", bias=True, qk_norm=qk_norm).blocks[0].mixer
    x = torch.randn(3, 50, 32, dtype=torch.float64)
    ones = torch.cat((x, torch.ones(3, 50, 1)), -1)
    sides = torch.cat((attn.qkvz.weight, attn.qkvz.bias[:, None]), 1).split(attn.sizes)
    q, k = (rows.double().unflatten(0, (4, rank)) for rows in halo.low_rank_keys(attn, x, rank))
    for h in range(4):
        A = [sides[0].unflatten(0, (4, 8))[h], sides[1].unflatten(0, (2, 8))[h // 2]]
        full = (ones @ A[0].T) @ (ones @ A[1].T).mT
        if qk_norm:
            A = [a * norm.weight[:, None] * ((ones @ a.T).square().mean(-1) + 1e-6).rsqrt().mean()
                 for a, norm in zip(A, (attn.q_norm, attn.k_norm))]
        U, S, Vh = torch.linalg.svd(A[0].T @ A[1])
        assert rmse(q[h].T @ k[h], U[:, :rank] * S[:rank] @ Vh[:rank]) < 1e-5
        assert rmse(q[h].norm(dim=1), k[h].norm(dim=1)) < 1e-5
        assert qk_norm or rank < 8 or rmse((ones @ q[h].T) @ (ones @ k[h].T).mT, full) < 1e-5


def test_linear_twin_starts_close():
    """A twin has the teacher's q, k, v with KV heads cloned, its QK-norm, neutral gates, and an output
    projection scaled column by column to the least squares."""
    teacher = tiny(layers="A", dtype=torch.float32)
    config = halo.student_config(teacher.config, "L", options("paper", decay="channel"))
    (attn, h, where, _), = halo.teacher_layers(teacher, config, some_ids(4, T))
    twin = halo.linear_twin(attn, config, h, where)
    q, k, v, z = twin.qkvz.weight.split(twin.sizes)
    rows = attn.qkvz.weight.unflatten(0, (8, 8))                            # heads: four of q, two of k and v
    assert q.equal(rows[:4].flatten(0, 1)) and k.equal(rows[[4, 4, 5, 5]].flatten(0, 1))
    assert v.equal(rows[[6, 6, 7, 7]].flatten(0, 1)) and twin.k_norm.weight.equal(attn.k_norm.weight)
    assert not z.any() and not twin.forget.weight.any()
    assert torch.allclose(torch.sigmoid(twin.forget.bias), torch.tensor(0.7))
    a, o = attn.mix(h, where).flatten(0, 1), twin.mix(h, where).flatten(0, 1)
    factor = torch.stack([torch.linalg.lstsq(o[:, i:i + 1], a[:, i:i + 1]).solution[0, 0] for i in range(32)])
    assert rmse(twin.out.weight, attn.out.weight * factor) < 1e-4


def write_documents(path, texts):
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))


def some_documents(n=400, words=150):
    rng = random.Random(n)
    return [f"doc{i} " + "".join(rng.choices("abcdefgh \n", k=rng.randrange(1, 2 * words))) for i in range(n)]


def a_plan(tokens, length, batch, recall=0):
    return halo.Plan(tokens, length, batch, 1e-3, 1e-3, recall)


# ---- halo: losses, text, scores ----------------------------------------------------------------------------


@pytest.mark.parametrize("kl, alpha", [("forward", 0), ("reverse", 0.5), ("forward", 0.3), ("reverse", 1)])
def test_sliced_loss_is_its_formula(kl, alpha):
    """alpha CE + (1 - alpha) KL, slice by slice, equals the formula written out, values and gradients."""
    teacher, student = tiny(1, torch.float32, layers="AA"), tiny(2, torch.float32).requires_grad_()
    idx, targets = some_ids(2, 17), some_ids(2, 17, seed=1)
    def value_and_gradients(loss):
        return [loss, *torch.autograd.grad(loss, list(student.parameters()))]
    s, t = student(idx)[0].log_softmax(-1), teacher(idx)[0].log_softmax(-1)
    p, q = (t, s) if kl == "forward" else (s, t)
    ce = -s.gather(-1, targets[..., None]).mean()
    refs = value_and_gradients(alpha * ce + (1 - alpha) * (p.exp() * (p - q)).sum(-1).mean())
    for n in (5 * 61, 61, 2 ** 24):                                         # slices of five tokens, one, all
        loss = halo.distil_loss(student, teacher, idx, targets, kl, alpha, slice_elements=n)
        assert max(map(rmse, value_and_gradients(loss), refs)) < 1e-4


@pytest.mark.parametrize("name", ["hype", "article", "article gpt2", "teacher gpt2"])
def test_fused_functions_are_those_written(name):
    """Compiled, each small function is one whole graph; loss, gradients, a prefill in segments stay."""
    from torch._dynamo.utils import counters
    teacher, student = tiny(1, torch.float32), tiny(2, torch.float32, **VARIANTS[name]).requires_grad_()
    idx, targets = some_ids(2, 17), some_ids(2, 17, seed=1)

    def results():
        loss = halo.distil_loss(student, teacher, idx, targets, "forward", 0.3)
        logits = student.prefill(idx[0], student.init_state(1, 17), segment=7)
        return [loss, logits, *torch.autograd.grad(loss, list(student.parameters()))]
    refs = results()
    counters.clear()
    hypenet.fuse("inductor" if GPU else "aot_eager")
    try:
        found = results()
        assert counters["stats"]["calls_captured"] > 0 and not counters["graph_break"]
    finally:
        hypenet.fuse(None)
    assert all(map(torch.equal, results(), refs)) and max(map(rmse, found, refs)) < 1e-4


@pytest.mark.parametrize("depth, ask", [(0, 1), (0.25, 1), (0.5, 1), (1, 1), (None, 3)])
def test_plant(depth, ask):
    """A planted text keeps its length and its order; the key stands at the depth asked for, its question and
    answer at the end; in training the questions come anywhere after the key. Each is answered by the key."""
    text, tokenizer = np.frombuffer(b"abcdefghij" * 40, np.uint8).astype(np.int64), Tokenizer.bytes()
    needle = r"\n# The pass key is (\d{5})\. Remember it\.\n"
    question = r"\n# What is the pass key\? The pass key is (\d{5})"
    ids, n = halo.plant(tokenizer, text, np.random.default_rng(3), depth, ask)
    whole = tokenizer.decode(ids)
    found, asked = re.search(needle, whole), list(re.finditer(question, whole))
    rest = re.sub(f"{needle}|{question}", "", whole)
    assert len(ids) == 400 and rest == tokenizer.decode(text)[:len(rest)] and n == len(" 12345")
    assert [a[1] for a in asked] == [found[1]] * ask and asked[0].start() >= found.end()
    assert depth is None or (found.start() == int(depth * len(rest)) and asked[0].end() == 400)
    with one_line("20 tokens"):
        halo.plant(tokenizer, text[:20], np.random.default_rng(0))


def test_reworded(monkeypatch):
    """Training also asks for values that follow other words: words of the text, in whatever alphabet. Each
    value is asked for twice, in any order; a question ends in what stands before its value. A plan says how
    often, and what ends a document is no word. A long row has more of them."""
    tokenizer, phrases, sizes, numbers, signs, stops = Tokenizer.bytes(), set(), set(), set(), set(), set()
    in_a_row = set()
    for seed in range(30):
        text = "".join(f"word{chr(97 + i % 26)}{chr(97 + i % 7)}=(42, )\n" for i in range(120))
        rng, row = np.random.default_rng(seed), tokenizer.encode_array(text)
        task = halo.reworded(tokenizer, row, np.random.default_rng(seed))
        ids, n = halo.plant(tokenizer, row, rng, ask=2 * task.needles, task=task)
        whole, joint = tokenizer.decode(ids), task.question.split("{name}")[1]
        pattern = "(?<!word.. ){} (?!word)(\\w+)"               # not the words of another one
        found = {name: re.findall(pattern.format(re.escape(name + joint)), whole) for name in task.names}
        for name, values in found.items():
            assert set(name.split()) <= set(re.findall("word..", text))
            assert sum(v[:task.size] == values[0] for v in values) >= 3 and len(values[0]) == task.size
        assert n == 1 + task.size and len(task.names) == task.needles
        phrases, sizes = phrases | set(task.names), sizes | {task.size}
        head = os.path.commonprefix([*task.names, *task.names[:1]]).split()[:-1]
        if len(head) > 1:                                           # words as the text has them, or not
            in_a_row.add(" ".join(head) in " ".join(re.findall("word..", text)))
        numbers.add(task.needles)
        signs.add(task.signs)
        stops.update(re.findall("(.) {name}", task.question))
    assert len(phrases) > 50 and len(sizes) > 9 and numbers == {1, 2, 3, 4}
    assert stops == set(halo.STOPS) >= {".", "?"} and in_a_row == {False, True}
    assert "0123456789" in signs and len(signs) > 9 and all(6 <= len(s) == len(set(s)) <= 36 for s in signs)

    def words(text):
        names = halo.reworded(tokenizer, tokenizer.encode_array(text), np.random.default_rng(0)).names
        return set(" ".join(names).split())
    assert words("1 + 1") == {"number"} and words("größer 中文 3") == {"größer", "中文"}
    names, orders = ("one", "two", "three"), set()
    task = halo.Task("\n{name} {value}.\n", "\n{name}", "0123456789", 5, 3, names)
    for seed in range(40):
        whole = tokenizer.decode(halo.plant(tokenizer, row, np.random.default_rng(seed), ask=6, task=task)[0])
        seen, values = [], {}
        for name, value, dot in re.findall(r"\n(one|two|three) (\d{5})(\.?)", whole):
            assert (dot == ".") == (name not in seen) and values.setdefault(name, value) == value
            seen.append(name)                                               # told, then asked for
        assert sorted(seen) == sorted(3 * names)
        orders.add(tuple(seen))
    assert len(orders) > 30
    with pytest.raises(AssertionError):
        halo.plant(tokenizer, row, rng, 0.5, ask=2)
    task, near, firsts = task._replace(needles=16, names=tuple(f"n{i}" for i in range(16))), [], []
    for seed in range(20):                                                  # of a long row more at the ends
        ids, _ = halo.plant(tokenizer, np.resize(row, 32768), np.random.default_rng(seed), ask=32, task=task)
        places = np.array([m.start() for m in re.finditer(r"\nn\d+ \d{5}", tokenizer.decode(ids))])
        near.append([(places < 1024).mean(), (places > 31744).mean()])
        firsts.append(places[0])
    assert len(places) == 48 and (np.mean(near, 0) > 0.08).all() and np.median(firsts) < 64

    def most(length):
        asked = []

        def plant(tokenizer, row, rng, ask, task="S1", plain=halo.plant):
            asked.append(ask)
            return plain(tokenizer, row, rng, ask=ask, task=task)
        monkeypatch.setattr(halo, "plant", plant)
        monkeypatch.setattr(halo, "again", lambda row, rng, times: asked.append(times))
        for seed in range(60):
            halo.hide(tokenizer, np.resize(row, length), np.random.default_rng(seed), varied=1.0)
        return max(asked)
    small, middle, long = (most(length) for length in (256, 1024, 16384))   # 2 times 4 at most, 8, 32
    assert small == 8 < 10 < middle <= 16 < 40 < long <= 64
    monkeypatch.undo()
    corpus = halo.Corpus(tokenizer)
    for length, share, low, high in ((512, 0.0, 1, 1), (512, 0.5, 0.3, 0.7), (512, 1.0, 0, 0),
                                     (160, 1.0, 0.05, 0.45)):                # half reworded, no room for many
        plan = halo.Plan(1e6, length, 100, 1e-3, 1e-4, recall=1.0, varied=share)
        rows = corpus.rows("distil", plan)(0)
        assert low <= np.mean(["pass key" in tokenizer.decode(row) for row in rows]) <= high


def test_again():
    """Passages that come again, as long as there is room for: each id of one stands in two places, always as
    far apart; what is not in them is untouched. About half are out of order, both times."""
    mixed = 0
    for seed, length, times in itertools.product(range(20), (4, 20, 100, 1000), (1, 2, 3)):
        row = 10_000 + np.arange(length)
        halo.again(row, np.random.default_rng(seed), times)
        at = {i: np.flatnonzero(row == i) for i in row}
        twice = {i: places for i, places in at.items() if len(places) == 2}
        assert all(len(places) < 3 for places in at.values())
        lengths = len(twice)
        assert times * min(16, length // (2 * times)) <= lengths <= times * min(128, length // (2 * times))
        assert len({b - a for a, b in twice.values()}) <= times
        assert all(i == 10_000 + at[i][0] for i in at if i not in twice)    # once, and where it was
        mixed += (times, length) == (1, 1000) and any(i - 10_000 not in places for i, places in twice.items())
    assert 5 <= mixed <= 15                                                 # of 20


@pytest.mark.parametrize("task", halo.TASKS)
def test_tasks(task):
    """A task hides as many values as it says, under names of their own, and asks for one by its name; the
    answer is that value, and the needle stands at the depth asked for."""
    t, tokenizer, found = halo.TASKS[task], Tokenizer.bytes(), set()
    text = np.frombuffer(b"lorem ipsum " * 100, np.uint8).astype(np.int64)
    for seed, depth in itertools.product(range(3), (0, 0.5, 1)):
        ids, n = halo.plant(tokenizer, text, np.random.default_rng(seed), depth, task=task)
        whole = tokenizer.decode(ids)
        answer, question = whole[-n:], whole[:-n]
        name = question.rsplit(" for ", 1)[1].split()[0] if t.prose else ""
        needle = t.needle.format(name=name, value=answer.strip())
        assert len(ids) == len(text) and question.endswith(t.question.format(name=name))
        assert len(answer) == 1 + t.size and set(answer[1:]) <= set(t.signs) and whole.count(needle) == 1
        names = re.findall(t.needle.format(name="(\\w+)", value=f"[{t.signs}]{{{t.size}}}"), whole)
        assert len(names) == t.needles and (not t.prose or len(set(names)) == t.needles)
        assert depth != 0.5 or abs(whole.index(needle) - 600) < 250
        found.add(answer)
    assert len(found) == 3


def test_prose_is_what_docstrings_say(tmp_path):
    """Natural text is held out, longer than a docstring, and no code; of one's own text all of it."""
    corpus = halo.Corpus(Tokenizer.bytes())
    prose, held_out = (corpus.tokenizer.decode(ids.tolist()) for ids in (corpus.prose, corpus.held_out))
    assert len(prose) > 20_000 and prose.count("\ndef ") < prose.count("\n\n") / 50
    assert prose[1000:1030].strip().splitlines()[0] in held_out
    rows = corpus.windows(np.random.default_rng(0), 2, 2 * len(prose), prose=True)  # around, around
    assert (rows[:, :len(prose)] == rows[:, len(prose):]).all()
    lines = [json.dumps({"text": f"{i} " * 90}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    own = halo.Corpus(Tokenizer.bytes(), [str(tmp_path / "text.jsonl")])
    assert own.prose is own.held_out


def test_held_out_text_is_never_trained_on(home, tmp_path):
    """A document stands whole on one side, about 1 in 16 of them held out; files and folders, gzipped or not,
    read alike; a package of the standard library is one group, its tests left out."""
    corpus = halo.Corpus(Tokenizer.bytes(), [str(home / "text.jsonl")])
    def documents(ids):
        return set(re.findall(r"doc\d+ ", corpus.tokenizer.decode(ids)))
    train, held_out = documents(corpus.sources[0].parts[0]), documents(corpus.held_out)
    assert not train & held_out and len(train | held_out) == 400 and 10 <= len(held_out) <= 45
    windows = corpus.windows(np.random.default_rng(0), 50, 700)
    assert set().union(*map(documents, windows)) <= held_out
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress((home / "text.jsonl").read_bytes()))
    assert (halo.Corpus(Tokenizer.bytes(), [str(tmp_path)]).held_out == corpus.held_out).all()
    groups = [group for group, _ in halo.stdlib_documents()]
    assert groups.count("encodings") > 50 and "argparse" in groups
    assert not {"test", "site-packages"} & set(groups)


def test_answers_are_those_of_a_full_pass():
    """Pass keys are scored through a state as a full pass would score them; only a whole answer is a hit."""
    model, prompts = tiny(dtype=torch.float32), some_ids(6, T)
    for i in range(T - 3, T):                                               # rows 0, 1 say what is likeliest
        prompts[:2, i] = model(prompts[:2, :i])[0][:, -1].argmax(-1)
    prompts[1, -3] = (prompts[1, -3] + 1) % 61                              # row 1 but for its first token
    logp, right = halo.answers(model, prompts, 3)
    full = model(prompts)[0].log_softmax(-1)[:, -4:-1].gather(-1, prompts[:, -3:, None])[..., 0]
    assert rmse(logp, full) < 1e-4 and right.all(1).tolist() == [True] + [False] * 5
    idx, targets, other = prompts[:, :-1], prompts[:, 1:], tiny(1, torch.float32)
    batches = [(idx[:2], targets[:2]), (idx[2:], targets[2:])]
    same, pair = (halo.compare(model, m, batches) for m in (model, other))
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert pair["kl"] == pytest.approx(halo.distil_loss(other, model, idx, targets, "forward", 0).item())
    assert pair["val_loss"]["student"] == pytest.approx(other(idx, targets)[1].item(), rel=1e-5)


def test_recall_of_answers_of_many_lengths():
    """Pass keys of different numbers of tokens are scored each by its own, as one by one."""
    class Pairs:
        """Bytes, but for even numbers of two digits, which are one id."""
        def encode_array(self, text):
            parts = re.findall(r"[0-9][02468]|.", text, re.S)
            return np.array([ord(part) if len(part) == 1 else 150 + int(part) for part in parts], np.int32)
    model = tiny(dtype=torch.float32, vocab_size=300, layers="AAAA")
    def windows(rng, n, length, prose=False):
        return rng.integers(100, 120, (n, length))
    corpus = types.SimpleNamespace(tokenizer=Pairs(), windows=windows)
    logp, hits = halo.recall(model, corpus, 128, 9)
    rng, lengths = np.random.default_rng([0, 128]), set()
    for i, text in enumerate(windows(rng, 9, 128)):
        ids, n = halo.plant(corpus.tokenizer, text, rng, depth=(i % 5) / 4)
        one = halo.answers(model, torch.from_numpy(ids)[None], n)
        assert logp[i].item() == pytest.approx(one[0].mean().item(), rel=1e-4) and hits[i] == one[1].all()
        lengths.add(n)
    assert len(lengths) > 1


@pytest.mark.parametrize("speed, rows, total", [
    (1e4, ("10.00", "1.67"), "11.7 minutes in all"), (1e3, ("1.67", "0.28"), "1.9 hours in all")])
def test_plan_says_how_long(speed, rows, total, capsys):
    """Where the stages have been tried, a plan has their times: minutes, or hours from one on."""
    corpus = types.SimpleNamespace(paths=[["text"]], shares=[1.0], sources=[
        types.SimpleNamespace(sizes=[100], held_out=range(7))])
    plans = dict(align=halo.Plan(6e6, 100, 10, 1e-3, 1e-4), distil=halo.Plan(1e6, 100, 10, 1e-3, 1e-4))
    o = types.SimpleNamespace(teacher="t", recipe="paper", device="cuda")
    halo.print_plan("out/t", HypeNetConfig(layers="AA"), corpus, plans, o,
                    {stage: (10, speed, 1.5) for stage in plans})
    out = capsys.readouterr().out
    assert total in out and all(re.search(rf"^{stage} .* {x}$", out, re.M) for stage, x in zip(plans, rows))
    assert "of which this run reads 7,000,000 (70000.0 rounds, each in a new order); 7 held out" in out


def test_recall_of_what_training_hides(monkeypatch):
    """A share of the answers are values after other words, where these have room."""
    model, corpus, asked = tiny(dtype=torch.float32, vocab_size=300), halo.Corpus(Tokenizer.bytes()), []

    def plant(tokenizer, text, rng, depth, task, plain=halo.plant):
        found = plain(tokenizer, text, rng, depth, task=task)
        asked.append((task, depth))
        return found
    monkeypatch.setattr(halo, "plant", plant)
    for length, varied, low, high in ((512, 0.0, 40, 40), (512, 0.5, 8, 32), (512, 1.0, 0, 0),
                                      (140, 1.0, 1, 39)):
        asked.clear()
        logp, hits = halo.recall(model, corpus, length, 40, varied=varied)
        assert len(logp) == len(hits) == len(asked) == 40
        assert [depth for _, depth in asked] == [0, 0.25, 0.5, 0.75, 1] * 8
        assert low <= sum(task == "S1" for task, _ in asked) <= high
    monkeypatch.undo()
    assert halo.has_room("S1", 128, corpus) and halo.has_room("multi-key", 280, corpus)
    assert not halo.has_room("multi-key", 266, corpus)                      # of long names, and has of short


def test_what_is_found_is_reported(monkeypatch, capsys):
    """Pass keys, and one number of four where training had more than pass keys; the longest texts, on a CPU,
    a quarter as often; past what a model knows there is no share. Each is a row of the last table."""
    model, asked = tiny(dtype=torch.float32, vocab_size=300, layers="AA", max_len=1024), []
    corpus = types.SimpleNamespace(tokenizer=Tokenizer.bytes())

    def recall(model, corpus, length, trials, task):
        asked.append((length, trials, task))
        return None, torch.ones(trials) / (4 if task == "S1" else 2)
    monkeypatch.setattr(halo, "recall", recall)
    monkeypatch.setattr(model.config, "limit", lambda: 4000, raising=False)
    for device, varied in itertools.product(("cpu", "cuda"), (0.0, 0.3)):
        asked.clear()
        o = types.SimpleNamespace(device=device, varied=varied, trials=20, length=96)
        shares = halo.shares(model, corpus, [96, 2048, 9999], o)
        assert shares.pop("passkey") == {"96": 0.25, "2048": 0.25, "9999": None}
        assert shares == ({"multikey": {"96": None, "2048": 0.5, "9999": None}} if varied else {})
        assert asked[:2] == [(96, 20, "S1"), (2048, 5 if device == "cpu" else 20, "S1")]
    report = dict(layers="LA", params=dict(teacher=1, student=2), val_loss=dict(teacher=1.0, student=2.0),
                  kl=0.1, top1_agreement=0.5, tokens=10, seconds=60, peak_gb=None, logit_base=None,
                  passkey=dict(teacher={"64": 1.0}, student={"64": 0.5, "128": 0.25}))
    halo.print_report(report)
    plain = capsys.readouterr().out
    halo.print_report(report | dict(multikey=dict(teacher={"64": None}, student={"64": 0.75})))
    table = capsys.readouterr().out
    assert re.search(r"pass key found in 128 tokens +- +25%", plain) and "four" not in plain
    assert re.search(r"one of four found in 64 tokens +- +75%", table)


@pytest.mark.parametrize("how, lost, layers", [
    ("score", [5], "LALLLLLA"),         # eq. 8: 10 for layer 1; 0.1 / 1e-6 for layer 7, whose C is the best
    ("guarded", [], "LAALLLLL"),        # denominators of at least C_se: 10 for layer 1, 6.7 for 2, 2 for 7
    ("guarded", [5], "LALLLALL"),       # layer 5 costs more than the limit: it comes first
    ("guarded", [4, 5, 6], "LLLLLAAL"), # so do these three, by score
    ("swap", [], "LLALLLLA"),           # 1.9 for layer 2, 0.05 for 7; 1 would lose more without its RoPE
    ("even", [], "LLLALLLA"), ("ends", [], "AALLLLAA"), ("LLALLLLL", [], "LLALLLLL")])
def test_choose_layers(how, lost, layers):
    """Each way to choose the layers that stay attention, on scores worked out by hand."""
    R = [-1.0, -3.0, -2.0, -1.5, -1.0, -1.2, -1.3, -1.1]
    C = [-2.0, -2.1, -2.05, -2.0, -2.0, -2.0, -2.0, -1.9]
    kept = [-4.0, -4.0, -0.1, -1.5, -1.5, -1.5, -1.4, -1.05]                # R as attention without RoPE
    scores = [dict(R=R[i], C=-4.0 if i in lost else C[i], C_se=0.05, R_kept=kept[i], C_kept=C[i])
              for i in range(8)]
    assert halo.choose_layers(how, 8, scores, base_C=-1.9) == layers


# ---- halo: training ----------------------------------------------------------------------------------------


def take_gradients(module):
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return grads


@pytest.mark.parametrize("kind", ["distil", "chunk", "align"])
def test_gradients_do_not_depend_on_micro(kind, monkeypatch):
    """Loss and gradients of a batch are the same 1, 3 or all rows at a time, chunk offsets and all, and are
    those of the sum of the terms."""
    teacher, rows = tiny(1, torch.float32, layers="AAAA"), some_ids(7, 25)
    o = options("paper", **dict(pe="chunk", kl="reverse") if kind == "chunk" else {})
    if kind == "align":
        def train(run, stage, plan, corpus, module, groups, loss_fn):
            return made.extend((module, loss_fn))
        made, corpus = [], types.SimpleNamespace(rows=lambda stage, plan: lambda step: rows.numpy())
        monkeypatch.setattr(halo, "train", train)
        config = halo.student_config(teacher.config, "LLLL", o)
        halo.align(None, teacher, config, corpus, a_plan(700, 24, 7), o)
        module, loss_fn = made
    else:
        module = HypeNet(halo.student_config(teacher.config, "LALL", o))
        loss_fn = halo.objective(module, teacher, o, 0.5)
    module.requires_grad_(True)
    whole = sum(loss_fn(rows[:, :-1], rows[:, 1:], 3))
    whole.backward()
    ref = take_gradients(module)
    assert len(ref) >= 20
    for micro in (1, 3, 7, 100):
        loss = halo.backward(loss_fn, rows, 3, micro)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, grad in take_gradients(module).items():
            assert (grad - ref[name]).norm() <= 1e-5 * max(ref[name].norm(), 1e-3), (micro, name)


def test_chunk_offsets_hang_on_every_id(monkeypatch):
    """A sequence of a chunk HyPE student starts where all its ids say: anywhere, within what it knows."""
    o, rows, seen = options("paper", pe="chunk", kl="reverse"), some_ids(64, 25), []
    student = HypeNet(halo.student_config(tiny(layers="AAAA").config, "LALL", o))
    monkeypatch.setattr(halo, "distil_loss", lambda *args: seen.append(args[-1]))
    for row in rows, rows.index_fill(1, torch.tensor([20]), 3), rows.index_fill(1, torch.tensor([0]), 3):
        list(halo.objective(student, None, o, 0.5)(row[:, :-1], row[:, 1:], 0))
    first, *others = seen
    most = student.config.chunk * student.config.n_chunks - 24
    assert len(set(first.tolist())) > 55 and 0 <= first.min() < most / 5 < most * 4 / 5 < first.max() <= most
    assert all((first != other).sum() > 55 for other in others)


def test_checkpointed_blocks_have_the_same_gradients():
    """Blocks that are computed again in the backward pass give the same gradients, run twice, and leave no
    trace when it is over."""
    model, rows = tiny(dtype=torch.float32).requires_grad_(), some_ids(3, 20)
    def loss_fn(idx, targets, step):
        yield model(idx, targets)[1]
    calls = []
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ref = halo.backward(loss_fn, rows, 0, 3), take_gradients(model)
    assert len(calls) == 1
    halo.checkpoint_blocks(model)
    loss, grads = halo.backward(loss_fn, rows, 0, 3), take_gradients(model)
    assert len(calls) == 3 and loss == ref[0] and all(grads[name].equal(g) for name, g in ref[1].items())
    halo.checkpoint_blocks(model, on=False)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_out_of_memory_is_halved_then_checkpointed_then_said(capsys):
    """Where the device runs out of memory a step is repeated with half the rows, at one row with blocks
    checkpointed, then it ends in one line; gradients are those of one whole pass."""
    model, rows, tries = tiny(dtype=torch.float32).requires_grad_(), some_ids(6, 20), []
    def loss_fn(idx, targets, step):
        tries.append((len(idx), "forward" in vars(model.blocks[0])))
        loss = model(idx, targets)[1]
        if len(idx) > limit:
            loss.backward()                                                 # some gradients are there already
            raise torch.OutOfMemoryError("out of memory")
        yield loss
    limit = 6
    ref = halo.backward(loss_fn, rows, 0, 6), take_gradients(model)
    limit, tries[:] = 2, []
    loss, micro = halo.fitted("distil", model, 6, lambda n: halo.backward(loss_fn, rows, 0, n))
    assert [n for n, _ in tries] == [6, 3, 2, 2, 2] and micro == 2
    assert loss.item() == pytest.approx(ref[0].item(), rel=1e-6)
    assert all(torch.allclose(g, ref[1][name], atol=1e-6) for name, g in take_gradients(model).items())
    limit = 0
    with one_line("distil.length"):
        halo.fitted("distil", model, 6, lambda n: halo.backward(loss_fn, rows, 0, n))
    assert tries[-2:] == [(1, False), (1, True)]


def test_batches_are_made_ahead_and_errors_come_through():
    """The next batch is made in a thread while one is in use; what goes wrong there is raised here, at the
    step that it belongs to."""
    made, got = [], []
    def make(step):
        made.append(step)
        if step == 4:
            raise ValueError("--data: gone")
        return np.full((2, 3), step)
    with one_line("gone"):
        for step, rows in zip(range(2, 9), halo.ahead(make, range(2, 9), torch.device("cpu"))):
            assert (rows == step).all()
            got.append(step)
    assert got == [2, 3] and made == [2, 3, 4]


# ---- halo: whole runs of a few steps -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with random teachers of 96 tokens, or too few, and two texts of 400 short documents."""
    folder, rng = tmp_path_factory.mktemp("halo"), random.Random(0)
    llama = dict(FAMILIES["llama"], rope_scaling=LLAMA3, tied=False)
    for name, family in dict(teacher={}, gpt2=GPT2, llama=llama, short=dict(max_len=64)).items():
        model = tiny(dtype=torch.float32, layers="AAAA", vocab_size=256, **dict(max_len=96) | family)
        model.save_pretrained(folder / name)
        Tokenizer.bytes().save(folder / name)
    words = ["def ", "return ", "x", "self", "import ", "(y)", "\n    ", " == "]
    for name in ("text.jsonl", "more.jsonl"):
        write_documents(folder / name, [f"doc{n} " + "".join(rng.choices(words, k=150)) for n in range(400)])
    return folder


def data_of(home):
    return [f"{home}/text.jsonl:0.7", f"{home}/more.jsonl:0.3"]


def convert(home, out, *argv, steps=8, teacher="teacher"):
    """Run halo.py, so many steps a stage, each of two sequences of 96 tokens. Returns its report."""
    plan = [f"{stage}.{key}={x}" for stage in ("align", "distil", "finetune", "group")
            for key, x in dict(length=96, batch=2, tokens=192 * steps).items()]
    halo.main(["--teacher", str(home / teacher), "--data", *data_of(home), "--out", str(out),
               "--device", "cpu", "--plan", *plan, "--trials", "5", "--eval-windows", "4",
               "--logit-base", "none", *argv])
    return json.loads((out / "report.json").read_text())


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in record.items() if key != "ms"} for record in records]


def held_out_loss(home, out):
    """The held-out loss of the model in a folder, measured anew."""
    batches = halo.held_out(halo.Corpus(Tokenizer.load(out), data_of(home)), 96, 4)
    return pytest.approx(halo.losses(HypeNet.from_pretrained(out), batches).mean().item(), rel=1e-6)


def test_plain_and_device_can_change_on_resume(runs):
    """A stopped run goes on with its own options, but for the device, and --plain where that is asked for."""
    first = ["--resume", str(runs["paper"][0])]
    for more in [], ["--plain"], ["--device", "cuda", "--plain"]:
        o, own = halo.resumed(halo.get_args(first + more), first + more), halo.get_args(more)
        assert (o.plain, o.device) == (own.plain, own.device or "cpu") and o.trials == 5 and o.out


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    """So that what takes no device, as a CUDA graph, is on it."""
    current = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)
        patch.setattr(torch.cuda, "set_device", current.append)
        for name in ("cpu", "cuda", "cuda:1"):
            assert common.default_device(name) == name
    assert current == ["cuda:1"]


@pytest.mark.parametrize("recipe", ["paper", "article"])
def test_steps_that_are_recorded(recipe, home, tmp_path, monkeypatch):
    """From the third step on each is the replay of a recording, which writes the gradients anew where they
    were first (on CPUs a stand-in does), and losses and weights are those of steps taken one by one."""
    replays = {}
    def train(run, stage, plan, corpus, module, groups, loss_fn, plain=halo.train, record=halo.recorded):
        def recorded(work, rows, options):
            assert all(p.grad is None for p in module.parameters())
            again = record(work, rows, options) if GPU else work(rows)
            places = [(p, p.grad) for p in module.parameters() if p.grad is not None]
            def replay(rows):
                replays[stage] = replays.get(stage, 0) + 1
                if GPU:
                    return again(rows)
                now = [p.grad for p, _ in places]
                for p, _ in places:
                    p.grad = None
                out = work(rows)
                for (p, place), grad in zip(places, now):
                    place.copy_(p.grad)
                    p.grad = grad
                return out
            return replay
        patch.setattr(halo, "recorded", recorded)
        plain(run, stage, plan, corpus, module, groups, loss_fn)
        assert all(p.grad is None for p in module.parameters())
    outs = [tmp_path / "one by one", tmp_path / "recorded"]
    for name, work, out in (("recorded", lambda *_: None, outs[0]), ("train", train, outs[1])):
        with monkeypatch.context() as patch:
            patch.setattr(halo, name, work)
            convert(home, out, "--recipe", recipe, "--device", DEVICE)
    assert replays == (dict.fromkeys(("align", "distil", "finetune"), 6) if recipe == "paper" else
                       dict(group1=2, group2=2))
    a, b = ([r["loss"] for r in log_of(out)] for out in outs)
    assert a == pytest.approx(b, rel=0.05 if GPU else 1e-6)
    a, b = (HypeNet.from_pretrained(out).state_dict() for out in outs)
    assert GPU or all(torch.allclose(w, b[name], atol=1e-6) for name, w in a.items())


def test_steps_that_cannot_be_recorded(home, tmp_path, monkeypatch):
    """Not a part of a batch at a time, nor in a stage too short to gain by it; nor with --plain, --fade, or
    without room for what is held once more."""
    made = []
    monkeypatch.setattr(halo, "recorded", lambda work, rows, options: made.append(len(rows)))
    convert(home, tmp_path / "long", steps=3)
    convert(home, tmp_path / "short", steps=2)
    convert(home, tmp_path / "parts", "--micro", "1", steps=3)
    assert made == [2, 2, 2]
    monkeypatch.undo()
    for name, x in dict(memory_reserved=6, mem_get_info=(5, 80), empty_cache=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, x=x: x)
    rows = types.SimpleNamespace(is_cuda=True, device="cuda")
    for plain, fade in (True, 0.0), (False, 0.5), (False, 0.0):
        assert halo.recorded(None, rows, dict(plain=plain, fade=fade)) is None


@pytest.fixture(scope="session")
def runs(home):
    """A run of each recipe: its folder, what it printed and, for each stage, the weights and the loss on one
    batch before and after, and the names of those that asked for a gradient; the same of the teacher."""
    runs = {}
    def watch(name, module, work, loss=lambda: torch.zeros(())):
        def now():
            return {n: w.clone() for n, w in module.state_dict().items()}, loss().item()
        trained = set()
        before, result, after = now(), work(trained), now()
        seen[name] = *before, *after, trained
        return result
    def train(run, stage, plan, corpus, module, groups, loss_fn, plain=halo.train):
        rows = torch.from_numpy(corpus.rows("test", halo.Plan(1536, 96, 16, 1, 1))(0))
        def work(trained):
            def noting(*batch):
                trained.update(n for n, p in module.named_parameters() if p.requires_grad)
                return loss_fn(*batch)
            plain(run, stage, plan, corpus, module, groups, noting)
        watch(stage, module, work, lambda: sum(loss_fn(rows[:, :-1], rows[:, 1:], plan.steps - 1)))
    def whole(run, teacher, *rest, plain=halo.convert):
        return watch("teacher", teacher, lambda _: plain(run, teacher, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "train", train)
        patch.setattr(halo, "convert", whole)
        for recipe in halo.RECIPES:
            seen, text = {}, io.StringIO()
            with contextlib.redirect_stdout(text):
                convert(home, home / recipe, "--recipe", recipe)
            runs[recipe] = home / recipe, text.getvalue(), seen
    return runs


def test_stages_train_what_they_say(runs):
    """align changes every tensor of the twins, distil and finetune every one of the student, a group those of
    its own mixers and the chunk embeddings and no other; each lowers its loss; the teacher never changes."""
    stages = {**runs["paper"][2], **runs["article"][2]}
    for name, layer in dict(align=None, distil=None, finetune=None, group1=1, group2=2).items():
        before, loss, after, loss_after, trained = stages[name]
        mine = {n for n in before if layer is None or f"blocks.{layer}.mixer." in n or "chunk_embd" in n}
        assert {n for n in before if not after[n].equal(before[n])} == mine == trained, name
        assert len(mine) > 4 and loss_after < loss, name
        for n in mine:                                                      # at random starts: many rows
            assert "chunk" not in n or (after[n] != before[n]).any(1).sum() > 12
    for _, _, seen in runs.values():
        before, _, after, _, _ = seen["teacher"]
        assert all(after[n].equal(before[n]) for n in before)
    assert {n.split(".")[0] for n in stages["align"][0]} == set("0123")     # a twin of every layer


@pytest.mark.parametrize("recipe", halo.RECIPES)
def test_report(recipe, runs, home):
    """report.json has its keys, its numbers are those of the student saved beside it; the last line printed
    is the sample.py command; the article's recipe leaves a usable model after each group."""
    out, text, _ = runs[recipe]
    report, config = json.loads((out / "report.json").read_text()), HypeNet.from_pretrained(out).config
    assert set(report) >= {"recipe", "layers", "logit_base", "params", "tokens", "seconds", "val_loss", "kl",
                           "top1_agreement", "passkey"}
    assert (report["recipe"], report["layers"]) == (recipe, config.layers)
    assert report["val_loss"]["student"] == held_out_loss(home, out)
    assert report["val_loss"]["teacher"] == held_out_loss(home, home / "teacher")
    assert report["params"]["student"] == HypeNet(config).n_params()
    assert report["tokens"] == 192 * len(log_of(out))
    lengths = ["96", "192", "384", "1536", "6144"]
    assert list(report["passkey"]["student"]) == lengths and set(report["passkey"]["teacher"]) <= set(lengths)
    assert text.splitlines()[-1] == f"python sample.py --model {out} --ctx 65536"
    groups = [HypeNet.from_pretrained(folder).config.layers for folder in sorted(out.glob("group?"))]
    assert groups == (["ALAA", "ALLA"] if recipe == "article" else [])


@pytest.mark.parametrize("recipe, stage, step, crash", [
    ("paper", None, 0, 0), ("paper", "align", 8, 0), ("paper", "distil", 3, 0), ("paper", "finetune", 5, 1),
    ("article", None, 0, 0), ("article", "group1", 4, 0), ("article", "group2", 1, 0)])
def test_a_run_repeats(recipe, stage, step, crash, runs, home, tmp_path, monkeypatch, capsys):
    """One seed gives one run, bit for bit, also if SIGTERM or a crash stops it and --resume takes it up."""
    def log(run, plain=halo.Run.log, **record):
        plain(run, **record)
        if (record["stage"], record["step"]) == (stage, step):
            if crash:
                raise SystemExit(1)
            assert signal.getsignal(signal.SIGTERM) == run.on_signal        # else these tests would end here
            signal.raise_signal(signal.SIGTERM)
    out, ref = tmp_path / "run", runs[recipe][0]
    if stage is None:
        convert(home, out, "--recipe", recipe)
        convert(home, tmp_path / "other", "--recipe", recipe, "--seed", "1", steps=1)
        assert log_of(tmp_path / "other")[0]["loss"] != log_of(ref)[0]["loss"]
    else:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(halo.Run, "log", log)
            convert(home, out, "--recipe", recipe)
        assert crash or stop.value.code == 130 and f"--resume {out}" in capsys.readouterr().err
        assert not (out / "report.json").exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        halo.main(["--resume", str(out)])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (ref / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, ref)]
    assert reports[0] == reports[1] | {key: reports[0][key] for key in ("seconds", "peak_gb")}
    assert log_of(out) == log_of(ref)


ROWS = {  # a flag that changes a row: what it makes of the student's config
    "--pe hype --training staged": dict(attn_pe=0.0, chunk=None, linear_rope=True),
    "--pe rope": dict(attn_pe=1.0, chunk=None, linear_rope=True),
    "--pe chunk": dict(attn_pe=1.0, chunk=24, n_chunks=2774, linear_rope=False),
    **{f"--decay {x}": dict(decay=x) for x in ("constant", "none", "head", "channel")},
    "--extras on": dict(attn_gate=True, linear_norm=True, linear_gate=True),
    "--extras off": dict(attn_gate=False, linear_norm=False, linear_gate=False, linear_qk_norm=False),
    "--state full": dict(key_dim=8), "--state half": dict(key_dim=4, linear_qk_norm=False),
    "--layers LLAA": dict(layers="LLAA"), "--layers even": dict(layers="LLLA"), "--layers score": {},
    "--training staged": {}, "--training progressive --pe rope": {}, "--groups 1": {},
    "--fade 1": dict(attn_pe=0.0),
    "--kl forward --alpha 0.25": {}, "--kl reverse --alpha 0.75": {}, "--alpha 1": {},
    "--max-ctx 400": dict(n_chunks=17),
    "--window 50": dict(window=50), "--window 0": dict(window=None), "--logit-base fit": {},
    "--logit-base 300": dict(logit_base=300.0), "--teacher gpt2": {}, "--teacher llama": {},
    "--set linear_rope=true linear_kv_head=2": dict(linear_rope=True, linear_kv_head=2),
}
ONLY = {"--layers score": "paper", "--fade 1": "paper", "--groups 1": "article", "--max-ctx 400": "article"}
CASES = [(recipe, row) for recipe in halo.RECIPES for row in ROWS if ONLY.get(row, recipe) == recipe
         and str(halo.RECIPES[recipe].get(row.split()[0][2:])) != row.split()[1]]


@pytest.mark.parametrize("recipe, row", CASES)
def test_every_row_is_a_flag(recipe, row, home, tmp_path, monkeypatch):
    """Each row of a recipe is changed by its flag, each kind of teacher converted: the stages and losses are
    those asked for, and the student saved is the one asked for, the one trained and the one reported."""
    out, flags, losses, default = tmp_path / "run", row.split(), set(), halo.RECIPES[recipe]
    def distil_loss(student, teacher, idx, targets, kl, alpha, *rest, plain=halo.distil_loss):
        losses.add((kl, alpha))
        return plain(student, teacher, idx, targets, kl, alpha, *rest)
    def recall(model, corpus, length, *rest, plain=halo.recall, **kind):  # short texts, for speed
        return plain(model, corpus, length if "--max-ctx" in row else min(length, 192), *rest, **kind)
    monkeypatch.setattr(halo, "distil_loss", distil_loss)
    monkeypatch.setattr(halo, "recall", recall)
    teacher, flags = (flags[1], []) if flags[0] == "--teacher" else ("teacher", flags)
    report = convert(home, out, "--recipe", recipe, "--layers", "ends", *flags, steps=2, teacher=teacher)
    config, flag = vars(HypeNet.from_pretrained(out).config), dict(zip(flags[::2], flags[1::2]))
    assert config.items() >= ROWS[row].items() and report["val_loss"]["student"] == held_out_loss(home, out)
    kl, alpha = flag.get("--kl", default["kl"]), float(flag.get("--alpha", default["alpha"]))
    if flag.get("--training", default["training"]) == "staged":
        assert losses == {(kl, alpha), (kl, 1.0)}                           # the last stage: cross-entropy
        stages = ["align", "distil", "finetune"]
    else:
        assert losses == {(kl, alpha)}
        stages = ["group1", "group2"] if "--groups" not in flag else ["group1"]
    assert list(dict.fromkeys(record["stage"] for record in log_of(out))) == stages
    if flag.get("--logit-base") == "fit":
        fits = json.loads((out / "run.json").read_text())["done"]["fit"]
        assert config["logit_base"] == halo.least(fits)


def test_layers_and_base_are_chosen_by_what_training_hides(home, tmp_path, monkeypatch, capsys):
    """Where stage 2 hides values after other words, selection and base ask for them in the same share, and
    the report for one number of four too; a run whose stages have changed does not go on."""
    shares = {}

    def recall(model, corpus, length, trials, seed=0, task="S1", varied=0.0, plain=halo.recall):
        shares.setdefault((seed, task), set()).add(varied)
        return plain(model, corpus, min(length, 400), trials, seed, task, varied=varied)
    monkeypatch.setattr(halo, "recall", recall)
    report = convert(home, tmp_path / "run", "--logit-base", "fit", "--plan", "distil.varied=0.4", steps=2)
    assert shares == {(0, "S1"): {0.4, 0.0}, (1, "S1"): {0.4}, (0, "multi-key"): {0.0}}
    assert report["multikey"]["student"].keys() == report["passkey"]["student"].keys()
    assert "one of four found in 1,536 tokens" in capsys.readouterr().out
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    run["done"]["plans"]["finetune"]["tokens"] *= 2
    file.write_text(json.dumps(run))
    with pytest.raises(SystemExit) as stop:
        halo.main(["--resume", str(tmp_path / "run")])
    assert stop.value.code == 2 and "stages are not" in capsys.readouterr().err




@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_groups_go_on(teacher, home, tmp_path):
    """The second group starts from what the first has learned, each of its layers from its own teacher's
    values: one step later nothing is far from there."""
    convert(home, tmp_path, "--recipe", "article", steps=2, teacher=teacher)
    first, last, old = map(HypeNet.from_pretrained, (tmp_path / "group1", tmp_path, home / teacher))
    for name, w in first.state_dict().items():
        assert "blocks.2.mixer" in name or (last.state_dict()[name] - w).abs().max() < 0.01, name
    for i in (1, 2):
        a, b = (model.blocks[i].mixer for model in (last, old))
        v, v_old = (mixer.qkvz.weight.split(mixer.sizes)[2].unflatten(0, (-1, 8)) for mixer in (a, b))
        assert (v - v_old.repeat_interleave(len(v) // len(v_old), 0)).abs().max() < 0.01


def test_pretrain(home, tmp_path, monkeypatch):
    """--pretrain makes a teacher that learns, at a rate that warms up and falls as a cosine, and that can be
    converted; with --layers, a hybrid of the recipe."""
    small = HypeNetConfig(layers="AAAA", n_embd=32, n_head=2, n_kv_head=2, head_dim=16, max_len=96)
    monkeypatch.setitem(halo.TEACHERS, "tiny", small)
    argv = ["--pretrain", "--device", "cpu", "--data", str(home / "text.jsonl"), "--eval-windows", "4",
            "--plan", "pretrain.tokens=9600", "pretrain.batch=4", "pretrain.length=96"]
    halo.main(["--out", str(tmp_path / "teacher"), *argv])
    losses, rates = zip(*((record["loss"], record["lr"]) for record in log_of(tmp_path / "teacher")))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    end, drop = halo.PLANS["tiny"]["pretrain"].lr_end, halo.PLANS["tiny"]["pretrain"].lr
    drop -= end
    cosine = [end + drop * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)]
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]])             # warm-up: a tenth of the steps
    assert HypeNet.from_pretrained(tmp_path / "teacher").config == small
    convert(home, tmp_path / "student", "--layers", "ends", steps=1, teacher=tmp_path / "teacher")
    halo.main([*argv, "--out", str(tmp_path / "hybrid"), "--layers", "LLAL"])
    config = HypeNet.from_pretrained(tmp_path / "hybrid").config
    assert (config.layers, config.attn_pe, config.linear_gate) == ("LLAL", 0.0, True)
    monkeypatch.setitem(halo.TEACHERS, "tiny-gpt2", dataclasses.replace(small, **FAMILIES["gpt2"]))
    halo.main([*argv, "--out", str(tmp_path / "gpt2"), "--teacher", "tiny-gpt2"])
    halo.main(["--out", str(tmp_path / "decayed"), *argv, "pretrain.weight_decay=20"])
    free, decayed = (HypeNet.from_pretrained(tmp_path / name) for name in ("teacher", "decayed"))
    shrunk = {name: (w.norm() / free.state_dict()[name].norm()).item()
              for name, w in decayed.state_dict().items()}
    assert all(0.97 < x if "norm" in name else x < 0.8 for name, x in shrunk.items()), shrunk
    argv = ["--layers", "ends", "--fade", "0.5"]
    convert(home, tmp_path / "gpt2-student", *argv, steps=2, teacher=tmp_path / "gpt2")
    config = HypeNet.from_pretrained(tmp_path / "gpt2-student").config
    assert (config.position, config.attn_pe, config.norm) == ("learned", 0.0, "layer")


def test_logit_base_is_fitted_to_loss_and_recall(monkeypatch):
    """What a base costs is the held-out loss plus that of answers, none of which the report asks for. None is
    tried after one that is 0.02 worse than the best."""
    model, corpus, seeds = tiny(dtype=torch.float32), halo.Corpus(Tokenizer.bytes()), set()

    def found(student, corpus, length, trials, seed, varied):
        seeds.add((seed, varied))
        return torch.full((trials,), -9.0 if (student.config.logit_base or 1e9) > 50 else -1.0), None
    monkeypatch.setattr(halo, "recall", found)
    monkeypatch.setattr(halo, "losses", lambda model, _: torch.tensor([model.config.logit_base == 20]) + 2.0)
    fits = halo.fit_logit_base(model, corpus, 64, seed=0, varied=0.5)
    assert (fits["None"], fits["100"], fits["50"], fits["20"]) == (11, 11, 3, 4) and seeds == {(1, 0.5)}
    assert halo.least(fits) == 50.0 and halo.least({"None": 1.0, "20": 2.0}) is None
    monkeypatch.setattr(halo, "losses", lambda m, _: -1e-4 * torch.tensor([m.config.logit_base or 1e5]))
    assert list(halo.fit_logit_base(model, corpus, 64, seed=0)) == ["None", "10000"]


def test_teacher_is_made_once(home, tmp_path, monkeypatch, capsys):
    """A teacher that is neither shipped nor there is pretrained first, and found by the next run."""
    monkeypatch.chdir(tmp_path)
    small = HypeNetConfig(layers="AAAA", n_embd=32, n_head=2, n_kv_head=2, head_dim=16, max_len=96)
    monkeypatch.setitem(halo.TEACHERS, "mini", small)
    plans = {name: halo.replace(plan, tokens=2 * 96 * 4, length=96, batch=4)
             for name, plan in halo.PLANS["mini"].items()}
    monkeypatch.setitem(halo.PLANS, "mini", plans)
    argv = ["--teacher", "mini", "--device", "cpu", "--data", str(home / "text.jsonl"), "--layers", "even",
            "--eval-windows", "2", "--trials", "1", "--logit-base", "none"]
    halo.main([*argv, "--dry-run"])
    assert not (tmp_path / "out").exists() and "pretrain " in capsys.readouterr().out
    Path("out/mini-teacher").mkdir(parents=True)
    Path("out/mini-teacher/run.json").write_text("{}")                      # half trained
    halo.main([*argv, "--dry-run"])
    assert "half trained" in capsys.readouterr().out
    shutil.rmtree("out")
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(halo, "run_main", made.append)
        for plain in (True, False):
            o = halo.get_args([*argv, *["--plain"] * plain])
            halo.settle(o)
            halo.make_teacher(o)
    assert ["--plain" in nested for nested in made] == [True, False]
    halo.main([*argv, "--keep", "2", "--transfer", "off"])
    assert "trained first" in capsys.readouterr().out
    assert json.loads(Path("out/mini-teacher/report.json").read_text())["tokens"] == 768
    assert HypeNet.from_pretrained("out/mini-paper").config.layers == "LALA"
    halo.main(argv)
    assert "trained first" not in capsys.readouterr().out and Path("out/mini-paper-2/report.json").exists()


