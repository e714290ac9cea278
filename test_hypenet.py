"""Laws of kernel.py, hypenet.py and halo.py. Every test compares values: with a definition
written out, with another way to compute the same, or with what was there before. No network and no GPU
needed: the Triton kernels run on a GPU where there is one, else in Triton's interpreter. Models are random
and tiny, runs of halo.py a few steps long."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

import halo
import hypenet
import kernel
import support.fast as fast
import support.options as cli  # noqa: F401
import support.recall as recall  # noqa: F401
import support.report as reports  # noqa: F401
import support.run as run  # noqa: F401
import support.text as text  # noqa: F401
from hypenet import FAMILIES, HypeNet, HypeNetConfig
from support.run import seal
from support.tokens import Tokenizer

GPU = torch.cuda.is_available()

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
    """q and k are used in v's dtype. float16 is computed in float32, so a state may pass 65,504. float32 q
    beside float16 v may pass 65,504 too."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    outs = scan([q, k.half(), v, log_decay, state], "triton")
    assert_equal(outs, scan([q, k.half().float(), v, log_decay, state], "triton"), 1e-3)
    tensors = [(q / 1000).half(), k.half(), v.half(), log_decay, 1e5 * state.abs()]
    outs, refs = scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64)
    assert max(rmse(outs[i], refs[i]) for i in (0, 1, 4, 5)) <= 2e-3        # dq and dk are too large for it
    tensors = [1e5 * q, k, v.half(), log_decay, state]
    outs, refs = scan(tensors, "triton", grads=False), scan(tensors, "sequential", grads=False)
    assert_equal(outs, refs, 2e-3)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_change_nothing(shape, monkeypatch):
    """Few heads, many tokens: segments that run at once give what one walk over the chunks gives."""
    tensors = inputs(shape, 560, 1, 1, 24, 40, torch.float32)
    refs = scan(tensors, "sequential", dtype=torch.float64)
    for hopper, cores, segments in ((False, 0, 1), (False, 8, 4), (True, 8, 2)):
        monkeypatch.setattr(kernel, "card", lambda device, card=(hopper, cores): card)
        assert kernel._layout(tensors[0], tensors[2], "head").n_segments == segments or GPU
        if segments > 1 and (GPU or not hopper or shape == "head"):         # one segment is most tests'
            assert_equal(scan(tensors, "triton"), refs, 2e-5)


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
    monkeypatch.setattr(kernel, "interpreted", lambda: True)
    with pytest.raises(kernel.triton.TritonError):                          # the interpreter's own are bugs
        scan(tensors, None)
    monkeypatch.setattr(kernel, "interpreted", lambda: False)
    with pytest.raises(kernel.triton.TritonError):
        scan(tensors, "triton")
    with pytest.warns(UserWarning, match="Triton cannot compile") as warned:
        assert_equal(scan(tensors, None), refs, 2e-6)
        assert_equal(scan(tensors, None), refs, 2e-6)
    assert len(warned) == 1 and len(calls) == 3


@pytest.mark.gpu
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
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
GPT2 = dict(FAMILIES["gpt2"], n_kv_head=4)
HYPE = dict(attn_position=False, attn_gate=True, logit_base=20.0)
PLAIN = dict(linear_norm=False, linear_gate=False, linear_qk_norm=False, linear_rope=False)
ARTICLE = dict(PLAIN, decay="channel", key_dim=4, chunk=8, n_chunks=6, window=11)
VARIANTS = {
    "teacher": dict(layers="AAA"),
    "teacher llama3": dict(FAMILIES["llama"], layers="AAA", rope_scaling=LLAMA3, tied=False, n_kv_head=1),
    "teacher biased": dict(layers="AAA", n_kv_head=4, **BIASES),
    "teacher yarn": dict(FAMILIES["llama"], layers="AAA", rope_scaling=YARN, qkv_bias=True),
    "teacher gpt2": dict(layers="AAA", **GPT2),
    "hype": HYPE,
    "hype no decay": dict(HYPE, decay="none", linear_kv_head=1),
    "hype decay per head": dict(HYPE, decay="head", linear_norm=False),
    "hype decay per channel": dict(HYPE, decay="channel", linear_kv_head=2),
    "hype half keys": dict(HYPE, key_dim=4, linear_gate=False, qk_norm=False),
    "hype gpt2": dict(GPT2, **HYPE),
    "rope in both": dict(HYPE, attn_position=True),
    "wpe kept": dict(GPT2, layers="LALA"),
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
    s_t = log(t + a) / log(a), t from 0; q, k = RoPE(position mod chunk) + e[position div chunk], where a
    grouped k takes its first head's e."""
    model = tiny(layers="A", chunk=8, n_chunks=6, logit_base=20.0, attn_gate=True, window=11)
    attn, x, pos, o = model.blocks[0].mixer, torch.randn(T, 32, dtype=torch.float64), torch.arange(T), []
    q, k, v, z = (x @ attn.qkvz.weight.T).split([32, 16, 16, 32], 1)
    e = attn.chunk_embd.weight[pos // 8].split(8, 1)
    for h in range(4):
        group = slice(h // 2 * 8, h // 2 * 8 + 8)
        q_h = rope_by_hand(norm_by_hand(q[:, 8 * h:8 * h + 8], attn.q_norm), pos % 8) + e[h]
        k_h = rope_by_hand(norm_by_hand(k[:, group], attn.k_norm), pos % 8) + e[h // 2 * 2]
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


@pytest.mark.parametrize("name", ["teacher llama3", "hype", "wpe kept", "article gpt2"])
def test_model_is_its_formula(name):
    """x = wte, + wpe or + wpe[position mod chunk] + e[position div chunk] if positions are learned;
    x + mixer(norm(x)), x + MLP(norm(x)) in every layer; logits are norm(x) times wte or the head's own."""
    model, idx, pos = tiny(**VARIANTS[name]), some_ids(1, T), torch.arange(T)
    c, x, where = model.config, model.wte.weight[idx], hypenet.locate(model.config, pos[None])
    if c.chunk:
        x = x + model.wpe.weight[pos % 8] + model.chunk_embd.weight[pos // 8]
    elif c.position == "learned":
        x = x + model.wpe.weight[pos]
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
    angles = hypenet.rope_frequencies(HypeNetConfig(rope_scaling=LLAMA3), 16)[0].tolist()
    plain = [10000.0 ** (-2 * i / 16) for i in range(8)]
    smooth = [min(1, max(0, (64 * x / (2 * math.pi) - 1) / (4 - 1))) for x in plain]
    assert angles == pytest.approx([s * x + (1 - s) * x / 8 for s, x in zip(smooth, plain)], rel=1e-5)
    assert smooth[0] == 1 > smooth[1] > 0 == smooth[-1]


def test_numbers_do_not_depend_on_the_default_dtype():
    """Positions, s_t and constant decays are float32 whatever torch's default dtype is."""
    def numbers():
        where = hypenet.locate(HypeNetConfig(logit_base=20.0), torch.arange(250, 300)[None])
        return [*where.attn_rope, where.s_t, hypenet.lightning(None, 4, "cpu")]
    before = numbers()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == torch.float32 and x.equal(y) for x, y in zip(found, before))


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
@pytest.mark.parametrize("read", ["plain", "fast"])
def test_one_pass_is_segments_is_single_tokens(name, read, monkeypatch):
    """One pass, segments of odd sizes and token by token give equal logits, by model.hidden and by fast.read;
    the state stays where it is."""
    monkeypatch.setattr(fast, "PAST", 7)                                    # parts of the past
    model, idx = tiny(**VARIANTS[name]), some_ids(2, T)
    hidden = model.hidden if read == "plain" else functools.partial(fast.read, model)
    whole = model(idx)[0]
    for sizes in ([5, 1, 13, 2, 3, 17, 4], [1] * T, [T]):
        state = model.init_state(2, T)
        addresses = [t.data_ptr() for layer in state.layers for t in layer.values()]
        parts = [model.head(hidden(part, state)) for part in idx.split(sizes, 1)]
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
def test_rows_of_any_lengths_are_each_alone(name):
    """Rows that hold different numbers of tokens read several tokens at once, each as if it were alone."""
    model, idx = tiny(**VARIANTS[name]), some_ids(3, T)
    held, state = (3, 20, 1), model.init_state(3, T)
    for b, n in enumerate(held):
        model(idx[b:b + 1, :n], state=state.row(b))
    both = torch.stack([row[n:n + 6] for row, n in zip(idx, held)])
    logits = model(both, state=state, all_logits=True)[0]
    for b, n in enumerate(held):
        assert rmse(logits[b], model(idx[b:b + 1, :n + 6])[0][0, n:]) < 1e-5
    assert state.pos.tolist() == [n + 6 for n in held]


@every_variant
def test_batch_is_each_alone(name):
    """Prompts of different lengths in one batch continue as each does alone, and as full passes say; the fast
    stream gives the same tokens."""
    model = tiny(dtype=torch.float32, **VARIANTS[name])
    prompts = [some_ids(n, seed=n).tolist() for n in (3, 33, 1, 20)]
    batch = model.generate(prompts, 12)
    assert batch == [model.generate([p], 12)[0] for p in prompts] == streamed(model, prompts, 12, segment=5)
    for prompt, continuation in zip(prompts, batch):
        for token in continuation:
            assert token == model(torch.tensor([prompt]))[0][0, -1].argmax()
            prompt.append(token)


def streamed(model, prompts, n, **options):
    """All that fast.stream yields, as generate gives it."""
    return torch.stack(list(fast.stream(model, prompts, n, **options)), 1).tolist()


@pytest.mark.parametrize("generate", [HypeNet.generate, streamed])
def test_generation_options(generate):
    """A seed repeats; top_k = 1 and a small top_p are greedy; both generators draw the same tokens."""
    model, prompts = tiny(dtype=torch.float32), [[1, 2, 3], [4, 5]]
    def draw(**options):
        return generate(model, prompts, 30, temperature=3.0, **options)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1) == HypeNet.generate(model, prompts, 30, temperature=3.0, seed=1)
    assert draw(top_k=1) == draw(top_p=1e-9) == model.generate(prompts, 30)


@pytest.mark.parametrize("options, weights", [
    (dict(), [1, 2, 3, 4]), (dict(top_k=2), [0, 0, 3, 4]), (dict(top_p=0.65), [0, 0, 3, 4]),
    (dict(top_p=0.75), [0, 2, 3, 4]), (dict(temperature=0.5), [1, 4, 9, 16])], ids=str)
def test_samples_have_their_probabilities(options, weights):
    """Ids are drawn in proportion to p^(1 / temperature), of the top_k, or of the fewest that reach top_p."""
    logits = torch.tensor([1.0, 2, 3, 4]).log().expand(20_000, 4)
    ids = hypenet.sample(logits, **dict(temperature=1.0) | options, rng=torch.Generator().manual_seed(0))
    share, weights = torch.bincount(ids, minlength=4) / 20_000, torch.tensor(weights)
    assert torch.allclose(share, weights / weights.sum(), atol=0.015) and not share[weights == 0].any()


def test_a_wait_of_zero_draws_no_masked_id(monkeypatch):
    """A random number of -0.0, which some devices give, makes no masked id win."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator=None: x.fill_(-0.0))
    logits = torch.tensor([[1.0, 2, 3, 4]])
    assert hypenet.sample(logits, temperature=1.0, top_k=2).item() in (2, 3)


def test_state_size():
    """K/V is exactly max_tokens or, with a window, no more than it; S does not depend on either."""
    S = 2 * 3 * 4 * 8 * 8 * 4               # two rows, three linear layers, (H,K,V) in float32
    for window, tokens, kv in ((None, 99, 99), (None, 9999, 9999), (50, 30, 30), (50, 9999, 50)):
        model = tiny(dtype=torch.bfloat16, layers="LLAL", window=window)
        assert model.init_state(2, tokens).nbytes() == (S, 2 * 2 * kv * 2 * 8 * 2)


# ---- halo: transfer ----------------------------------------------------------------------------------------


PUBLISHED = ("paper", "article")                 # recipes; `real` differs from the paper's in two rows


def options(recipe="paper", **changes):
    """The options of a recipe, as halo.py hands them on."""
    rows = dict(halo.RECIPES[recipe], max_ctx=512, changes={}, device="cpu", task="S1", asked=1)
    return argparse.Namespace(**vars(cli.get_args(halo, [])) | rows | changes)


@pytest.mark.parametrize("family", [BIASES, GPT2], ids=["rope", "gpt2"])
@pytest.mark.parametrize("recipe", halo.RECIPES)
def test_all_attention_student_is_the_teacher(recipe, family):
    """With all layers "A", the teacher's positions and chunk embeddings 0, the transfer changes no logit."""
    teacher, idx = tiny(layers="AAA", **family), some_ids(2, 12)            # 12 tokens: one chunk, of 48 / 4
    config = halo.student_config(teacher.config, "AAA", options(recipe, changes=dict(attn_position=True)))
    twins = [halo.attention_twin(block.mixer, config) for block in teacher.blocks]
    student = halo.assemble(teacher, config, twins).double()
    chunks = [p for name, p in student.named_parameters() if "chunk_embd" in name]
    assert config.attn_gate == (recipe != "article")
    assert len(chunks) == (recipe == "article") * (1 if family is GPT2 else 3)
    for p in chunks:
        assert 0.015 < p.std() < 0.025
        p.data.zero_()
    assert rmse(student(idx)[0], teacher(idx)[0]) < 1e-6


@pytest.mark.parametrize("qk_norm, rank", [(True, 4), (False, 4), (False, 8)])
def test_low_rank_keys_are_the_best(qk_norm, rank):
    """A head's product of q and k rows is the truncated SVD of A_q^T A_k, split evenly, A holding QK-norm's
    gain and typical 1 / rms; at full rank without QK-norm q . k is the teacher's, biases included."""
    attn = tiny(layers="A", qk_norm=qk_norm, **BIASES).blocks[0].mixer
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
    (attn, h, where, *_), = halo.teacher_layers(teacher, config, some_ids(4, T))
    twin = halo.linear_twin(attn, config, h, where, retention=0.7)
    q, k, v, z = twin.qkvz.weight.split(twin.sizes)
    rows = attn.qkvz.weight.unflatten(0, (8, 8))                            # heads: four of q, two of k and v
    assert q.equal(rows[:4].flatten(0, 1)) and k.equal(rows[[4, 4, 5, 5]].flatten(0, 1))
    assert v.equal(rows[[6, 6, 7, 7]].flatten(0, 1)) and twin.k_norm.weight.equal(attn.k_norm.weight)
    assert not z.any() and not twin.forget.weight.any()
    assert torch.allclose(torch.sigmoid(twin.forget.bias), torch.tensor(0.7))
    a, o = attn.mix(h, where).flatten(0, 1), twin.mix(h, where).flatten(0, 1)
    factor = torch.stack([torch.linalg.lstsq(o[:, i:i + 1], a[:, i:i + 1]).solution[0, 0] for i in range(32)])
    assert rmse(twin.out.weight, attn.out.weight * factor) < 1e-4


@pytest.mark.parametrize("recipe, changes, norm", [
    ("paper", {}, True), ("paper", dict(key_dim=4), False), ("article", {}, False),
    ("paper", dict(key_dim=4, linear_qk_norm=True), True), ("paper", dict(key_dim=0), True)])
def test_narrow_keys_have_no_norm(recipe, changes, norm):
    """low_rank_keys applies QK-norm's gain: narrow keys get no second norm, unless --set asks for it."""
    config = halo.student_config(tiny(layers="A").config, "L", options(recipe, changes=changes))
    assert config.linear_qk_norm == norm


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


def test_compare_is_its_formula():
    """Of one model with itself KL is 0 and every likeliest token the same; of two, KL and losses are those of
    the distillation loss and of the models, whatever the batches."""
    model, other, prompts = tiny(dtype=torch.float32), tiny(1, torch.float32), some_ids(6, T)
    idx, targets = prompts[:, :-1], prompts[:, 1:]
    batches = [(idx[:2], targets[:2]), (idx[2:], targets[2:])]
    same, pair = (reports.compare(model, m, batches) for m in (model, other))
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert pair["kl"] == pytest.approx(halo.distil_loss(other, model, idx, targets, "forward", 0).item())
    assert pair["val_loss"]["student"] == pytest.approx(other(idx, targets)[1].item(), rel=1e-5)




def test_what_is_found_is_reported(monkeypatch, capsys):
    """The report asks for pass keys, and for one number of four where training had more than pass keys. On a
    CPU the longest texts are asked a quarter as often. Past what a model knows there is no share."""
    model, asked = tiny(dtype=torch.float32, vocab_size=300, layers="AA", max_len=1024), []
    corpus = types.SimpleNamespace(tokenizer=Tokenizer.bytes())

    def recall(model, corpus, length, trials, task):
        asked.append((length, trials, task))
        return None, torch.ones(trials) / (4 if task == "S1" else 2)
    monkeypatch.setattr(reports, "recall", recall)
    monkeypatch.setattr(model.config, "limit", lambda: 4000, raising=False)
    for device, varied in itertools.product(("cpu", "cuda"), (0.0, 0.3)):
        asked.clear()
        o = types.SimpleNamespace(device=device, asked=2 if varied else 1, trials=20, length=96)
        shares = reports.shares(model, corpus, [96, 2048, 9999], o)
        assert shares.pop("passkey") == {"96": 0.25, "2048": 0.25, "9999": None}
        assert shares == ({"multikey": {"96": None, "2048": 0.5, "9999": None}} if varied else {})
        assert asked[:2] == [(96, 20, "S1"), (2048, 5 if device == "cpu" else 20, "S1")]
    report = dict(layers="LA", params=dict(teacher=1, student=2), val_loss=dict(teacher=1.0, student=2.0),
                  kl=0.1, top1_agreement=0.5, tokens=10, seconds=60, peak_gb=None, logit_base=None,
                  passkey=dict(teacher={"64": 1.0}, student={"64": 0.5, "128": 0.25}))
    reports.print_report(report)
    plain = capsys.readouterr().out
    reports.print_report(report | dict(multikey=dict(teacher={"64": None}, student={"64": 0.75})))
    table = capsys.readouterr().out
    assert re.search(r"pass key found in 128 tokens +- +25%", plain) and "of 4" not in plain
    assert re.search(r"1 of 4 keys found in 64 tokens +- +75%", table)


def test_tables_are_at_most_100_columns_wide(capsys):
    """The tables of selection and report fit a terminal of 100 columns, at the size of a real model."""
    numbers = {f"{name}{kind}{se}": -12.3456 for name in "RC" for kind in ("", "_kept") for se in ("", "_se")}
    numbers["swap_se"] = 12.345
    layers = "LA" * 24
    reports.print_scores([numbers] * 48, [(False, -123.456)] * 48, layers, 12.3456)
    report = dict(layers=layers, params=dict(teacher=14 * 10 ** 9, student=14 * 10 ** 9), kl=0.1,
                  val_loss=dict(teacher=12.3456, student=12.3456), top1_agreement=0.5, tokens=10 ** 9,
                  seconds=1e5, peak_gb=139.5, logit_base=500.0,
                  passkey=dict(teacher={}, student={"262144": 1.0}))
    reports.print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 60 and max(map(len, lines)) <= 100


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
    assert halo.choose_layers(how, 8, scores, teacher_loss=1.9) == layers


@pytest.mark.parametrize("family", [BIASES, GPT2], ids=["rope", "gpt2"])
@pytest.mark.parametrize("kind", ["linear", "kept"])
def test_a_swapped_layer_is_all_that_changes(kind, family):
    """A teacher whose layer 1 is linear, or kept without positions, is its own blocks one after the other but
    for this layer. All other weights are the teacher's, in its memory."""
    teacher, idx = tiny(dtype=torch.float32, layers="AAA", **family), some_ids(2, 12)
    config, pos = halo.student_config(teacher.config, "LLL", options()), torch.arange(12)
    where = hypenet.locate(halo.replace(config, attn_position=True), pos[None])
    twin = hypenet.LinearAttention(config)
    model = halo.with_linear(teacher, config, 1, twin) if kind == "linear" else halo.with_kept(teacher, 1)
    x = teacher.embed(idx, where)
    for i, block in enumerate(teacher.blocks):
        if i == 1 and kind == "linear":
            y = twin(block.norm1(x), where)
        elif i == 1:
            unplaced = x - teacher.wpe.weight[:12] if family is GPT2 else x
            y = block.mixer(block.norm1(unplaced), where._replace(attn_rope=None))
        else:
            y = block.mixer(block.norm1(x), where)
        x = x + y
        x = x + block.mlp(block.norm2(x))
    assert rmse(model.hidden(idx), teacher.norm(x)) < 1e-6 < rmse(teacher.hidden(idx), teacher.norm(x))
    theirs = {name: w.data_ptr() for name, w in teacher.state_dict().items()}
    mine = {name: w.data_ptr() for name, w in model.state_dict().items()}
    others = [name for name in theirs if kind == "kept" or "blocks.1.mixer" not in name]
    assert all(mine[name] == theirs[name] for name in others)
    assert all(parameter.requires_grad is False for parameter in model.parameters())


# ---- halo: training ----------------------------------------------------------------------------------------


def take_gradients(module):
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return grads


@pytest.mark.parametrize("kind", ["distil", "chunk", "align"])
def test_gradients_do_not_depend_on_micro(kind, monkeypatch):
    """Loss and gradients of a batch are those of the sum of its terms, whether 1, 3 or all rows go through at
    once, with chunk offsets too."""
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
        loss_fn = halo.objective(module, teacher, o.kl, 0.5, 0.5)
    module.requires_grad_(True)
    whole = sum(loss_fn(rows[:, :-1], rows[:, 1:]))
    whole.backward()
    ref = take_gradients(module)
    assert len(ref) >= 20
    for micro in (1, 3, 7, 100):
        loss = halo.backward(loss_fn, rows, micro)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, grad in take_gradients(module).items():
            assert (grad - ref[name]).norm() <= 1e-5 * max(ref[name].norm(), 1e-3), (micro, name)


def test_chunk_offsets_hang_on_every_id(monkeypatch):
    """A sequence of a chunk HyPE student may start anywhere within the known positions. Each of its ids has
    a say in the start."""
    o, rows, seen = options("paper", pe="chunk", kl="reverse"), some_ids(64, 25), []
    student = HypeNet(halo.student_config(tiny(layers="AAAA").config, "LALL", o))
    monkeypatch.setattr(halo, "distil_loss", lambda *args: seen.append(args[-1]))
    for row in rows, rows.index_fill(1, torch.tensor([20]), 3), rows.index_fill(1, torch.tensor([0]), 3):
        list(halo.objective(student, None, o.kl, 0.5)(row[:, :-1], row[:, 1:]))
    first, *others = seen
    most = student.config.chunk * student.config.n_chunks - 24
    assert len(set(first.tolist())) > 55 and 0 <= first.min() < most / 5 < most * 4 / 5 < first.max() <= most
    assert all((first != other).sum() > 55 for other in others)


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
    flags = dict(zip(argv, argv[1:]))
    training = flags.get("--training") or halo.RECIPES[flags.get("--recipe", "paper")]["training"]
    stages = ["group"] if training == "progressive" else ["align", "distil", "finetune"]
    plan = [f"{stage}.{key}={x}" for stage in stages
            for key, x in dict(length=96, batch=2, tokens=192 * steps).items()]
    halo.main(["--teacher", str(home / teacher), "--data", *data_of(home), "--out", str(out),
               "--device", "cpu", "--plan", *plan, "--trials", "2", "--eval-windows", "4",
               "--logit-base", "none", *argv])
    return json.loads((out / "report.json").read_text())


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in record.items() if key != "ms"} for record in records]


def held_out_loss(home, out):
    """The held-out loss of the model in a folder, measured anew."""
    batches = text.Corpus(Tokenizer.load(out), data_of(home)).held_out_batches(96, 4)
    return pytest.approx(reports.losses(HypeNet.from_pretrained(out), batches).mean().item(), rel=1e-6)


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
        watch(stage, module, work, lambda: sum(loss_fn(rows[:, :-1], rows[:, 1:])))
    def whole(run, teacher, *rest, plain=halo.convert):
        return watch("teacher", teacher, lambda _: plain(run, teacher, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halo, "train", train)
        patch.setattr(halo, "convert", whole)
        for recipe in PUBLISHED:
            seen, text = {}, io.StringIO()
            with contextlib.redirect_stdout(text):
                convert(home, home / recipe, "--recipe", recipe)
            runs[recipe] = home / recipe, text.getvalue(), seen
    return runs


def test_stages_train_what_they_say(runs):
    """align changes every tensor of the twins, distil and finetune every tensor of the student. A group
    changes its own mixers and the chunk embeddings alone. Each stage lowers its loss. The teacher stays."""
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


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_report(recipe, runs, home):
    """report.json has its keys, and its numbers belong to the student saved beside it. The last line printed
    is the sample.py command. The article's recipe leaves a usable model after each group."""
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
    assert list(report["passkey"]["student"]) == lengths and list(report["passkey"]["teacher"]) == lengths[:4]
    assert text.splitlines()[-1] == f"python sample.py --model {out} --ctx 65536"
    groups = [HypeNet.from_pretrained(folder).config.layers for folder in sorted(out.glob("group?"))]
    assert groups == (["ALAA", "ALLA"] if recipe == "article" else [])


@pytest.mark.parametrize("recipe, stage, step, crash", [
    ("paper", None, 0, 0), ("paper", "align", 8, 0), ("paper", "distil", 3, 0), ("paper", "finetune", 5, 1),
    ("article", None, 0, 0), ("article", "group1", 4, 0), ("article", "group2", 1, 0)])
def test_a_run_repeats(recipe, stage, step, crash, runs, home, tmp_path, monkeypatch, capsys):
    """One seed gives one run, bit for bit, even if SIGTERM or a crash stops it and --resume goes on."""
    def log(a_run, plain=run.Run.log, **record):
        plain(a_run, **record)
        if (record["stage"], record["step"]) == (stage, step):
            if crash:
                raise SystemExit(1)
            assert signal.getsignal(signal.SIGTERM) == a_run.on_signal      # else these tests would end here
            signal.raise_signal(signal.SIGTERM)
    out, ref = tmp_path / "run", runs[recipe][0]
    if stage is None:
        convert(home, out, "--recipe", recipe)
        convert(home, tmp_path / "other", "--recipe", recipe, "--seed", "1", steps=1)
        assert log_of(tmp_path / "other")[0]["loss"] != log_of(ref)[0]["loss"]
    else:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(run.Run, "log", log)
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
    "--pe hype --training staged": dict(attn_position=False, chunk=None, linear_rope=True),
    "--pe rope": dict(attn_position=True, chunk=None, linear_rope=True),
    "--pe chunk": dict(attn_position=True, chunk=24, n_chunks=2774, linear_rope=False),
    **{f"--decay {x}": dict(decay=x) for x in ("constant", "none", "head", "channel")},
    "--extras on": dict(attn_gate=True, linear_norm=True, linear_gate=True),
    "--extras off": dict(attn_gate=False, linear_norm=False, linear_gate=False, linear_qk_norm=False),
    "--state full": dict(key_dim=8), "--state half": dict(key_dim=4, linear_qk_norm=False),
    "--layers LLAA": dict(layers="LLAA"), "--layers even": dict(layers="LLLA"), "--layers score": {},
    "--training staged": {}, "--training progressive --pe rope": {}, "--groups 1": {},
    "--kl forward --alpha 0.25": {},
    "--kl reverse --alpha 0.75": {}, "--alpha 1": {}, "--hidden 0.5": {},
    "--max-ctx 400": dict(n_chunks=17),
    "--window 50": dict(window=50), "--window 0": dict(window=None), "--logit-base fit": {},
    "--logit-base 300": dict(logit_base=300.0), "--teacher gpt2": {}, "--teacher llama": {},
    "--set linear_rope=true linear_kv_head=2": dict(linear_rope=True, linear_kv_head=2),
}
ONLY = {"--layers score": "paper", "--groups 1": "article", "--max-ctx 400": "article"}
CASES = [(recipe, row) for recipe in PUBLISHED for row in ROWS if ONLY.get(row, recipe) == recipe
         and str(halo.RECIPES[recipe].get(row.split()[0][2:])) != row.split()[1]]
CASES += [("real", "--layers LLAA")]


@pytest.mark.parametrize("recipe, row", CASES)
def test_every_row_is_a_flag(recipe, row, home, tmp_path, monkeypatch):
    """A flag changes its row of a recipe, and every kind of teacher is converted. Stages, losses and the
    saved student are those asked for, and the report is of this student."""
    out, flags, losses, default = tmp_path / "run", row.split(), set(), halo.RECIPES[recipe]
    def distil_loss(student, teacher, idx, targets, kl, alpha, hidden, *rest, plain=halo.distil_loss):
        losses.add((kl, alpha, hidden))
        return plain(student, teacher, idx, targets, kl, alpha, hidden, *rest)
    def recall(model, corpus, length, *rest, plain=halo.recall, **kind):  # short texts, for speed
        return plain(model, corpus, length if "--max-ctx" in row else min(length, 192), *rest, **kind)
    monkeypatch.setattr(halo, "distil_loss", distil_loss)
    for module in (halo, reports):
        monkeypatch.setattr(module, "recall", recall)
    teacher, flags = (flags[1], []) if flags[0] == "--teacher" else ("teacher", flags)
    report = convert(home, out, "--recipe", recipe, "--layers", "ends", *flags, steps=2, teacher=teacher)
    config, flag = vars(HypeNet.from_pretrained(out).config), dict(zip(flags[::2], flags[1::2]))
    assert config.items() >= ROWS[row].items() and report["val_loss"]["student"] == held_out_loss(home, out)
    kl = flag.get("--kl", default["kl"])
    alpha, hidden = (float(flag.get(f"--{name}", default[name])) for name in ("alpha", "hidden"))
    if flag.get("--training", default["training"]) == "staged":
        assert losses == {(kl, alpha, hidden), (kl, 1.0, 0.0)}              # the last stage is by the text
        stages = ["align", "distil", "finetune"]
    else:
        assert losses == {(kl, alpha, hidden)}
        stages = ["group1", "group2"] if "--groups" not in flag else ["group1"]
    assert list(dict.fromkeys(record["stage"] for record in log_of(out))) == stages
    if flag.get("--logit-base") == "fit":
        fits = json.loads((out / "run.json").read_text())["done"]["fit"]
        assert str(config["logit_base"]) in (cheapest := min(fits, key=fits.get), f"{cheapest}.0")


def test_layers_and_base_are_chosen_by_what_training_hides(home, tmp_path, monkeypatch, capsys):
    """Where stage 2 hides other things than pass keys, selection and base ask for them in the same share, and
    the report asks for one number of four. A run whose stages or recipe have changed does not go on."""
    shares = {}

    def recall(model, corpus, length, trials, seed=0, task="S1", varied=0.0, plain=halo.recall):
        shares.setdefault((seed, task), set()).add(varied)
        return plain(model, corpus, min(length, 400), trials, seed, task, varied=varied)
    for module in (halo, reports):
        monkeypatch.setattr(module, "recall", recall)
    report = convert(home, tmp_path / "run", "--logit-base", "fit", "--plan", "distil.varied=0.4", steps=2)
    assert shares == {(0, "S1"): {0.4, 0.0}, (1, "S1"): {0.4}, (0, "multi-key"): {0.0}}
    assert report["multikey"]["student"].keys() == report["passkey"]["student"].keys()
    assert "1 of 4 keys found in 1,536 tokens" in capsys.readouterr().out
    file = tmp_path / "run" / "run.json"
    saved = json.loads(file.read_text())
    plans = saved["done"]["plans"]
    for key, value, line in (("plans", plans | dict(finetune=plans["distil"]), "its stages are not"),
                             ("recipe", saved["done"]["recipe"] | dict(hidden=3), "its recipe is not")):
        done = saved["done"] | {key: value}
        file.write_text(json.dumps(saved | dict(done=done, sha256=seal(saved["options"], done))))
        with pytest.raises(SystemExit) as stop:
            halo.main(["--resume", str(tmp_path / "run")])
        assert stop.value.code == 2 and line in capsys.readouterr().err




@pytest.mark.parametrize("teacher", ["teacher", "gpt2"])
def test_groups_go_on(teacher, home, tmp_path):
    """The second group starts from what the first has learned, and each of its layers from the values of its
    attention layer: one step later no weight is far from there."""
    convert(home, tmp_path, "--recipe", "article", steps=2, teacher=teacher)
    first, last, old = map(HypeNet.from_pretrained, (tmp_path / "group1", tmp_path, home / teacher))
    for name, w in first.state_dict().items():
        assert "blocks.2.mixer" in name or (last.state_dict()[name] - w).abs().max() < 0.01, name
    for i in (1, 2):
        a, b = (model.blocks[i].mixer for model in (last, old))
        v, v_old = (mixer.qkvz.weight.split(mixer.sizes)[2].unflatten(0, (-1, 8)) for mixer in (a, b))
        assert (v - v_old.repeat_interleave(len(v) // len(v_old), 0)).abs().max() < 0.01


def test_pretrain(home, tmp_path, monkeypatch):
    """--pretrain makes a teacher that learns and can be converted; with --layers, a hybrid of the recipe. The
    learning rate warms up and falls as a cosine. Weight decay shrinks matrices alone."""
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
    halo.main([*argv, "--out", str(tmp_path / "hybrid"), "--layers", "LLAL", "--decay", "channel",
               "--retention", "0.9", "--logit-base", "500"])
    hybrid = HypeNet.from_pretrained(tmp_path / "hybrid")
    config = hybrid.config
    assert (config.layers, config.attn_position, config.linear_gate) == ("LLAL", False, True)
    assert config.logit_base == 500
    kept = torch.sigmoid(hybrid.blocks[0].mixer.forget.bias.float())
    assert (kept - 0.9).abs().max() < 0.05                                  # the start, 25 steps ago
    monkeypatch.setitem(halo.TEACHERS, "tiny-gpt2", dataclasses.replace(small, **FAMILIES["gpt2"]))
    halo.main([*argv, "--out", str(tmp_path / "gpt2"), "--teacher", "tiny-gpt2"])
    halo.main(["--out", str(tmp_path / "decayed"), *argv, "pretrain.weight_decay=20"])
    free, decayed = (HypeNet.from_pretrained(tmp_path / name) for name in ("teacher", "decayed"))
    shrunk = {name: (w.norm() / free.state_dict()[name].norm()).item()
              for name, w in decayed.state_dict().items()}
    assert all(0.97 < x if "norm" in name else x < 0.8 for name, x in shrunk.items()), shrunk
    convert(home, tmp_path / "gpt2-student", "--layers", "ends", steps=2, teacher=tmp_path / "gpt2")
    config = HypeNet.from_pretrained(tmp_path / "gpt2-student").config
    assert (config.position, config.attn_position, config.norm) == ("learned", False, "layer")


def test_logit_base_is_fitted_to_loss_and_recall(monkeypatch):
    """A base costs the held-out loss plus the loss of answers, and the report asks for other answers. No base
    is tried after one that costs 0.02 more than the best."""
    model, corpus, seeds = tiny(dtype=torch.float32), text.Corpus(Tokenizer.bytes()), set()

    def found(student, corpus, length, trials, seed, task, varied):
        seeds.add((seed, task, varied))
        return torch.full((trials,), -9.0 if (student.config.logit_base or 1e9) > 50 else -1.0), None
    monkeypatch.setattr(halo, "recall", found)
    monkeypatch.setattr(halo, "losses", lambda model, _: torch.tensor([model.config.logit_base == 20]) + 2.0)
    o = types.SimpleNamespace(seed=0, task="S2", varied=0.5)
    fits = halo.fit_logit_base(model, corpus, 64, o)
    assert (fits["None"], fits["100"], fits["50"], fits["20"]) == (11, 11, 3, 4) and seeds == {(1, "S2", 0.5)}
    args = types.SimpleNamespace(logit_base="fit", length=64)
    for costs, best in (fits, 50.0), ({"None": 1.0, "20": 2.0}, None):
        a_run = types.SimpleNamespace(once=lambda name, work: costs)
        assert halo.choose_logit_base(a_run, model, corpus, {}, args) == best
    monkeypatch.setattr(halo, "losses", lambda m, _: -1e-4 * torch.tensor([m.config.logit_base or 1e5]))
    assert list(halo.fit_logit_base(model, corpus, 64, o)) == ["None", "10000"]


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
        patch.setattr(cli, "run_main", lambda _, argv: made.append(argv))
        for plain in (True, False):
            o = cli.get_args(halo, [*argv, *["--plain"] * plain])
            cli.settle(halo, o)
            cli.make_teacher(halo, o)
    assert ["--plain" in nested for nested in made] == [True, False]
    halo.main([*argv, "--keep", "2", "--transfer", "off"])
    assert "trained first" in capsys.readouterr().out
    assert json.loads(Path("out/mini-teacher/report.json").read_text())["tokens"] == 768
    assert HypeNet.from_pretrained("out/mini-paper").config.layers == "LALA"
    halo.main(argv)
    assert "trained first" not in capsys.readouterr().out and Path("out/mini-paper-2/report.json").exists()


