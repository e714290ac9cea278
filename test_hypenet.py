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
from hypenet import FAMILIES, HypeNet, HypeNetConfig, Tokenizer  # noqa: E402

torch.set_num_threads(1)                    # the tensors are tiny
DEVICE = "cuda" if GPU else "cpu"
HERE = Path(__file__).parent
INF = float("inf")
SHAPES = ("head", "step", "channel")        # log_decay (H,), (B,T,H), (B,T,H,K)
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
    size = {"head": (H,), "step": (B, T, H), "channel": (B, T, H, K)}[shape]
    log_decay = -torch.randn(size, generator=rng).abs() * torch.rand(size, generator=rng)
    sizes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V)
    q, k, v, state = (torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes)
    return [x.to(DEVICE, dtype) for x in (q, k, v, log_decay, state)]


def gradients(o, state, tensors):
    """Those of a fixed random function of o and the final state."""
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, state)]
    return torch.autograd.grad((o, state), tensors, upstream)


def scan(tensors, backend, grads=True, dtype=None):
    """o, the final state and, of both, the gradients, computed in the given dtype."""
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
    """Strong decays a channel, with keys and gradients of 1e4 or gradients of 1e-8, lose no digits."""
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
    """q and k are taken in v's dtype; float16 runs in float32, whose states may pass 65,504."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    outs = scan([q, k.half(), v, log_decay, state], "triton")
    assert_equal(outs, scan([q, k.half().float(), v, log_decay, state], "triton"), 1e-3)
    tensors = [(q / 1000).half(), k.half(), v.half(), log_decay, 1e5 * state.abs()]
    outs, refs = scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64)
    assert max(rmse(outs[i], refs[i]) for i in (0, 1, 4, 5)) <= 2e-3        # dq and dk are too large for it


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_segments_change_nothing(shape, monkeypatch):
    """Segments that run at once, for few heads and many tokens, give what one walk over the chunks gives."""
    tensors = inputs(shape, 1100, 1, 1, 24, 40, torch.float32)
    for hopper, cores, segments in ((False, 0, 1), (False, 8, 7), (True, 8, 4)):
        monkeypatch.setattr(kernel, "_card", lambda device, card=(hopper, cores): card)
        layout = kernel._layout(tensors[0], tensors[2], "head")
        assert layout["n_segments"] == segments or GPU
        assert_equal(scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64), 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_one_step(shape):
    """decode equals chunked_scan at T = 1, state and output, and overwrites the state it is given."""
    q, k, v, log_decay, state = inputs(shape, 1, dtype=torch.float32)
    ref_o, ref_state = kernel.chunked_scan(q, k, v, log_decay, state, 0.3, "sequential")
    o = kernel.decode(q, k, v, log_decay, state, 0.3)
    assert rmse(o, ref_o) <= 1e-6 and rmse(state, ref_state) <= 1e-6
    with one_line("T = 2"):
        kernel.decode(*inputs(shape, 2, dtype=torch.float32))


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_be_compiled_runs_in_pytorch(shape, monkeypatch):
    """Where Triton gives up, forward or backward, the PyTorch form runs, with one line that says so."""
    tensors = inputs(shape, 40, dtype=torch.float32)
    refs = scan(tensors, "torch")

    def give_up(*_, **__):
        raise kernel.triton.TritonError("out of resource")
    monkeypatch.setattr(kernel, "_check", lambda *_: "triton")              # as a GPU would choose
    monkeypatch.setattr(kernel, "_interpreted", lambda: True)
    with monkeypatch.context() as m:
        m.setattr(kernel, "_scan", give_up)
        with pytest.raises(kernel.triton.TritonError):                      # the interpreter's own are bugs
            scan(tensors, None, grads=False)
    monkeypatch.setattr(kernel, "_cannot_compile", lambda e: isinstance(e, kernel.triton.TritonError))
    monkeypatch.setattr(kernel._TritonScan, "_backward", staticmethod(give_up))
    assert_equal(scan(tensors, None), refs, 2e-6)
    monkeypatch.setattr(kernel, "_scan", give_up)
    assert_equal(scan(tensors, None), refs, 0)


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
    """bf16 inputs give bf16 outputs and a float32 state, near float64's on the same numbers; autocast does
    not round float32."""
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
    """Gates a channel, multiplied in a half precision that holds the inputs and 0/1 sums of gates exactly: of
    one chunk without a state, outputs and all gradients are float32's. What a product of decays and inputs
    gives is not rounded, nor is A."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 16, 2, 24, generator=rng).bfloat16().float() for _ in range(4))
    g = -torch.randint(64, (1, 16, 2, 24), generator=rng) / 64
    monkeypatch.setattr(kernel, "_dtype", lambda x: kernel.tl.float16)      # the interpreter has no bf16

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
    """Decays of 0, e^-30 and 0 = e^-inf in one chunk are exact; the gradient of -inf is 0, never NaN."""
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
    """With log_decay 0 the state is the sum of k^T v, after 100,000 tokens too (interpreted: 2,000)."""
    n = 2_000 if backend == "triton" and not GPU else 100_000
    q, k, v, log_decay, state = inputs(shape, n, 1, 1, 16, 4, torch.float32)
    outs = scan([q, k, v, 0 * log_decay, state], backend, grads=False)
    writes = k[0, :, 0, :, None].double() * v[0, :, 0, None, :].double()
    states = state[0, 0].double() + writes.cumsum(0)                        # (T,K,V)
    o = 0.3 * torch.einsum("tk,tkv->tv", q[0, :, 0].double(), states)
    assert_equal(outs, [o[None, :, None], states[None, None, -1]], 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [*FAST, None])
def test_split_anywhere(backend, shape):
    """A sequence cut in pieces, the state passed on, equals one call, gradients through the cuts too. A state
    given is not written to, and None is zeros."""
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
    """None is one step of the definition at T = 1, else the fast form of the device."""
    calls = []
    for name in ("scan_sequential", "scan_torch"):
        plain = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, name=name, plain=plain: calls.append(name) or plain(*a))
    for n in (1, 2):
        kernel.chunked_scan(*(x.cpu() for x in inputs("head", n)))
    assert calls == ["scan_sequential", "scan_torch"]


@pytest.mark.parametrize("changes, message", [
    (dict(k=(2, 5, 3, 7)), "q, k: given"), (dict(q=(2, 5, 8), k=(2, 5, 8)), "q, k: given"),
    (dict(q=(2, 0, 3, 8), k=(2, 0, 3, 8)), "T >= 1"), (dict(v=(2, 6, 3, 4)), "v: given"),
    (dict(log_decay=(4,)), "log_decay: given"), (dict(log_decay=(2, 5, 3, 4)), "log_decay: given"),
    (dict(state=(2, 3, 4, 8)), "state: given"), (dict(backend="cuda"), "backend: given 'cuda'"),
    (dict(dtype=torch.int64), "dtypes: given"), (dict(scale=0), "scale: given 0")], ids=str)
def test_bad_scan_input_is_one_line(changes, message):
    """Bad shapes, dtypes and backends raise one line that says what was given and what is allowed."""
    sizes = dict(q=(2, 5, 3, 8), k=(2, 5, 3, 8), v=(2, 5, 3, 4), log_decay=(3,), state=(2, 3, 8, 4))
    args = {name: torch.zeros(changes.get(name, size), dtype=changes.get("dtype"))
            for name, size in sizes.items()}
    with one_line(message, "allowed"):
        kernel.chunked_scan(**args, scale=changes.get("scale", 1.0), backend=changes.get("backend"))


def test_triton_is_not_needed(monkeypatch):
    """kernel.py imports and runs where there is no triton; backend="triton" there, on a CPU, on float64 or on
    too wide keys is one line."""
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


# ---- generation on a GPU -----------------------------------------------------------------------------------

@needs_triton
@pytest.mark.parametrize("few", [4, 2])
@pytest.mark.parametrize("name", VARIANTS if GPU else [
    "teacher llama3", "hype no decay", "hype gpt2", "hype half keys", "all linear", "window", "article",
    "hype decay per head", "article gpt2"])
def test_fused_step_is_the_plain_one(name, few, monkeypatch):
    """Rows of different lengths, decoded by Block.step and its kernels (or, of more than a few rows, the
    library's products): the logits, S, K/V and positions are those of the plain layers."""
    monkeypatch.setattr(hypenet, "FEW", few)
    model, rng = tiny(dtype=torch.float32, **VARIANTS[name]).to(DEVICE), torch.Generator().manual_seed(3)
    prompts, found = [[1, 2, 3, 4, 5], [7, 8], [9] * 20], []
    new = torch.randint(61, (2, 3, 1), generator=rng).to(DEVICE)
    for fused in (False, True):
        state, logits = model.init_state(3, 40), []
        for b, prompt in enumerate(prompts):
            model.prefill(prompt, state.row(b))
        state.seen = 20
        with monkeypatch.context() as m:
            m.setattr(kernel, "has_kernels", lambda x, *sizes, fused=fused: fused)
            for idx in new:
                logits.append(model.head(model.hidden(idx, state)))
        held = [t for layer in state.layers for t in layer.values()]
        found.append([torch.cat(logits, 1), state.pos, *held])
    for out, ref in zip(*found):
        assert rmse(out, ref) <= 1e-5


@needs_triton
@pytest.mark.parametrize("B, H, G, D, S, splits", [
    (1, 4, 2, 32, 300, 5), (3, 6, 6, 24, 1000, 16), (2, 8, 2, 64, 64, 1)])
def test_attention_to_a_cache(B, H, G, D, S, splits, monkeypatch):
    """However it is shared out, attention of one token is softmax over the min(pos + 1, S) keys of its row,
    its own k and v in slot pos % S."""
    monkeypatch.setattr(kernel, "_card", lambda device: (False, splits * B * G // 4 or 1))
    rng = torch.Generator().manual_seed(0)
    q, k, v, keys, values = (torch.randn(*size, generator=rng).to(DEVICE) for size in (
        (B, 1, H, D), (B, 1, G, D), (B, 1, G, D), (B, S, G, D), (B, S, G, D)))
    pos = torch.tensor([0, S + 5, S - 2][:B])[:, None].to(DEVICE)
    o = kernel.attend_cache(q, k, v, keys, values, pos)
    for b, n in enumerate(pos[:, 0].tolist()):
        assert keys[b, n % S].equal(k[b, 0]) and values[b, n % S].equal(v[b, 0])
        own = (x[b, :n + 1].repeat_interleave(H // G, 1).transpose(0, 1).double() for x in (keys, values))
        ref = torch.nn.functional.scaled_dot_product_attention(q[b].transpose(0, 1).double(), *own)
        assert rmse(o[b].transpose(0, 1), ref) <= 1e-5


def test_decoder_is_the_plain_loop():
    """A Decoder reads the ids drawn last and draws the next, one more token in the state at each call."""
    model, prompt = tiny(dtype=torch.float32), some_ids(9, seed=5).tolist()
    state = model.init_state(1, 20)
    decoder = model.decoder(state, model.prefill(prompt, state)[:, -1])
    ids = prompt + [decoder.idx.item()]
    for n in range(10, 20):
        ids.append(decoder().item())
        assert state.pos.tolist() == [n] and state.seen == n
        assert ids[-1] == model(torch.tensor([ids[:-1]]))[0][0, -1].argmax()
    decoder()
    with one_line("21 tokens", "20"):
        decoder()


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("prompts", [
    [list(range(50))], [[1], list(range(60)), [3] * 7, [5] * 33]], ids=["1", "4"])
@every_variant
def test_graph_is_the_plain_path(name, prompts, monkeypatch):
    """Two hundred greedy tokens in float32: the CUDA graph draws what the layers do without any of it."""
    assert torch.get_float32_matmul_precision() == "highest"                # no TF32
    changes = dict(VARIANTS[name], max_len=400) | ({"n_chunks": 50} if "chunk" in VARIANTS[name] else {})
    model = tiny(dtype=torch.float32, **changes).to("cuda")
    graph = model.generate(prompts, 200)
    with monkeypatch.context() as m:
        m.setattr(kernel, "has_kernels", lambda x, *sizes: False)
        assert model.generate(prompts, 200) == graph
    assert model.generate(prompts, 50, temperature=1.0, seed=3) == model.generate(
        prompts, 50, temperature=1.0, seed=3, graph=False)


@needs_triton
@pytest.mark.parametrize("name", ["hype", "teacher llama3", "article"])
def test_fused_step_in_bf16_rounds_no_more_than_the_plain_one(name, monkeypatch):
    """Fed the same tokens, the kernels' logits in bf16 are no further from float32's than those of the plain
    layers in bf16, and about as far from these as these from float32's."""
    from triton.runtime import interpreter

    def rounded(x, from_type, to_type, mode, plain=interpreter._convert_float):
        if x.dtype != np.float32:
            return plain(x, from_type, to_type, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
    monkeypatch.setattr(interpreter, "_convert_float", rounded)             # which cuts bf16 off
    prompt, new, found = some_ids(1, 30)[0], some_ids(1, 20, seed=1)[0], []
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = tiny(dtype=torch.float32, max_len=64, **VARIANTS[name] | (
            {"n_chunks": 8} if "chunk" in VARIANTS[name] else {})).bfloat16().to(DEVICE, dtype)
        monkeypatch.setattr(kernel, "has_kernels", lambda x, *sizes, fused=fused: fused)
        state = model.init_state(1, 64)
        model.prefill(prompt, state)
        new = new.to(DEVICE)
        found.append(torch.cat([model.head(model.hidden(idx.view(1, 1), state)) for idx in new], 1))
    exact, plain, fused = found
    assert not fused.equal(exact) and rmse(fused, exact) <= rmse(plain, exact) < 0.1
    assert rmse(fused, plain) <= 1.3 * rmse(plain, exact)                   # two roundings apart


# ---- the model: files, bad input, the tokenizer ------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher llama3", "hype", "article", "article gpt2"])
def test_saved_model_is_the_model(name, tmp_path):
    """save_pretrained and from_pretrained keep logits and config; saved as bf16, they round the weights."""
    model, idx = tiny(dtype=torch.float32, **VARIANTS[name]), some_ids(1, T)
    model.save_pretrained(tmp_path)
    again = HypeNet.from_pretrained(tmp_path)
    assert again.config == model.config and again(idx)[0].equal(model(idx)[0])
    model.save_pretrained(tmp_path, torch.bfloat16)
    rounded = HypeNet.from_pretrained(tmp_path).state_dict()
    assert all(rounded[name].equal(w.bfloat16().float()) for name, w in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("file, harm, word", [
    ("config.json", None, "config.json"), ("config.json", 40, "config.json"),
    ("config.json", b"[1]", "config.json"), ("config.json", dict(model_type="bert"), "model_type"),
    ("config.json", dict(n_ebd=3), "n_ebd"), ("config.json", dict(n_embd="32"), "n_embd"),
    ("config.json", dict(layers="LAXA"), "layers"), ("config.json", dict(n_hidden=41), "blocks.0.mlp"),
    ("model.safetensors", None, "model.safetensors"), ("model.safetensors", 3000, "model.safetensors"),
    ("model.safetensors", 0, "model.safetensors"),
    ("model.safetensors", {"blocks.1.mlp.up.weight": None}, "blocks.1.mlp.up.weight is missing"),
    ("model.safetensors", dict(extra=torch.zeros(2)), "extra is unexpected"),
    ("model.safetensors", {"norm.weight": torch.zeros(31)}, "norm.weight")], ids=str)
def test_bad_model_files_are_one_line(file, harm, word, tmp_path):
    """Files missing (None), cut (to so many bytes) or altered raise one line: the file, tensor or field."""
    from safetensors.torch import load_file, save_file
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / file
    if harm is None:
        path.unlink()
    elif not isinstance(harm, dict):
        path.write_bytes(harm if isinstance(harm, bytes) else path.read_bytes()[:harm])
    elif file == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    else:
        save_file({name: w for name, w in (load_file(path) | harm).items() if w is not None}, path)
    with one_line(word):
        HypeNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [
    dict(layers=""), dict(layers="AB"), dict(layers=7), dict(norm="batch"), dict(mlp="relu"),
    dict(position="x"), dict(decay="some"), dict(n_embd=0), dict(n_embd=-4), dict(n_embd="32"),
    dict(n_embd=32.5), dict(n_kv_head=3), dict(linear_kv_head=3), dict(linear_kv_head=-1), dict(key_dim=-8),
    dict(head_dim=7), dict(key_dim=5), dict(logit_base=1.0), dict(logit_base=INF), dict(logit_base="fit"),
    dict(window=0), dict(n_chunks=4, chunk=0), dict(chunk=8), dict(n_chunks=4), dict(chunk=8, n_chunks=-4),
    dict(attn_pe=2.0), dict(attn_pe=-0.5), dict(rope_theta=0.0), dict(rope_scaling={"factor": 8.0}),
    dict(position="learned", n_chunks=4, chunk=512)], ids=str)
def test_bad_config_is_one_line(changes):
    """A value that is not allowed, alone or beside the others, raises one line that names its field."""
    with one_line(list(changes)[-1]):
        HypeNetConfig(**changes)


def test_bad_calls_are_one_line():
    """Tokens past a state's room, the last chunk or the last learned position, rows of unequal lengths in one
    segment and options of no meaning are one line with the numbers, before anything is generated."""
    model, full = tiny(), tiny(chunk=16, n_chunks=3)
    with one_line("6 tokens", "5"):
        model(some_ids(1, 6), state=model.init_state(1, 5))
    for known in (full, tiny(**VARIANTS["teacher gpt2"])):
        with one_line("49 tokens", "48"):
            known(some_ids(1, 49))
    with one_line("49 tokens", "48"):
        next(full.stream([[1] * 20, [2] * 40], 10))
    with one_line("row(b)"):
        state = model.init_state(2, 9)
        model(some_ids(1, 3), state=state.row(1))
        model(some_ids(2, 2), state=state)
    with one_line("at least one token"):
        model.generate([[1], []], 3)
    for options in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)):
        with one_line(*options):
            model.generate([[1]], 3, **options)
    with one_line("max_new_tokens is 0"):
        model.generate([[1]], 0)
    state = model.init_state(2, 9)
    model.generate([[1] * 4, [2]], 3, state=state)
    with one_line("1 prompts", "2 rows"):
        model.generate([[1]], 1, state=state)
    with one_line("10 tokens", "9"):
        next(model.stream([[3], [4]], 4, state=state))
    assert model.generate([[5, 6]], 5, temperature=1e-39) == model.generate([[5, 6]], 5)


def test_tokenizer_round_trip(tmp_path):
    """Bytes in, the same text out, whatever it is, but for lone surrogates (U+FFFD); saved and loaded too."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    texts = ["", "def f(x):\n\treturn x\r\n", "混合线性", "👩‍👩‍👧🏽", "\0\ufeff\u2028e\u0301", "x" * 999]
    Tokenizer.bytes().save(tmp_path)
    for tokenizer in (Tokenizer.bytes(), Tokenizer.load(tmp_path)):
        for text in (*texts, everything):
            ids = tokenizer.encode(text)
            assert ids == list(text.encode()) and tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
        assert tokenizer.decode([0xE6, 0xB7]) == "\ufffd" and tokenizer.token_bytes(0xE6) == b"\xe6"
    for text in ("{}", '{"type": "words"}', "not JSON", None):
        (tmp_path / "tokenizer.json").write_text(text) if text else (tmp_path / "tokenizer.json").unlink()
        with one_line("tokenizer"):
            Tokenizer.load(tmp_path)


# ---- real teachers -----------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                        reason="transformers is not installed")
needs_tokenizers = pytest.mark.skipif(not importlib.util.find_spec("tokenizers"),
                                      reason="tokenizers is not installed")
SMALL = dict(vocab_size=61, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=40, max_position_embeddings=16)
SLOWED = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
TEACHERS = {
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_positions=T)),
    "qwen3": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, rope_theta=1e6)),
    "qwen3 tied": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "llama": ("LlamaForCausalLM", dict(SMALL, rope_parameters=SLOWED, rms_norm_eps=1e-3)),
}


def teacher(name, path, **changes):
    """A tiny random model made and saved by transformers, none of whose norms and biases is neutral."""
    import transformers
    kind, sizes = TEACHERS[name]
    shards = changes.pop("max_shard_size", "1GB")
    made = getattr(transformers, kind)
    torch.manual_seed(0)
    model = made(made.config_class(**sizes | dict(bos_token_id=0, eos_token_id=0) | changes)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    model.save_pretrained(path, max_shard_size=shards)
    return model


def edit(path, change):
    """Rewrite a .json or .safetensors file: change alters its dict in place, or returns another."""
    from safetensors.torch import load_file, save_file
    value = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
    value = change(value) or value
    path.write_text(json.dumps(value)) if path.suffix == ".json" else save_file(value, path)


def assert_same_logits(model, theirs, limit=1e-5):
    """At all of T positions, three times max_position_embeddings where there is no table of them."""
    with torch.no_grad():
        out, ref = model(some_ids(2, T))[0], theirs(some_ids(2, T)).logits
    assert (out - ref).abs().max() < limit * ref.abs().max() and ref.std() > 0.1


@needs_transformers
@pytest.mark.parametrize("files", ["one file", "shards", "older config"])
@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_gives_the_logits_of_transformers(name, files, tmp_path):
    """A model that transformers made and saved gives its logits through our loader; saved by us and loaded
    again, the same to the bit, a tied head never written."""
    theirs = teacher(name, tmp_path, max_shard_size="20KB" if files == "shards" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (files != "shards")
    if files == "older config" and name != "gpt2":       # as on the hub: rope_theta and rope_scaling
        def older(config):
            rope = config.pop("rope_parameters")
            config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if len(rope) > 1 else None)
        edit(tmp_path / "config.json", older)
    model = HypeNet.from_pretrained(tmp_path)
    assert_same_logits(model, theirs)
    model.save_pretrained(tmp_path / "ours")
    again = HypeNet.from_pretrained(tmp_path / "ours")
    assert again.config == model.config and again(some_ids(1, T))[0].equal(model(some_ids(1, T))[0])
    assert ("lm_head.weight" in again.state_dict()) == (name in ("qwen3", "llama"))
    rounded = HypeNet.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(rounded[name].equal(w.bfloat16()) for name, w in model.state_dict().items())


@needs_transformers
def test_gpt2_files_of_every_kind(tmp_path):
    """With the transformer. prefix or without, with the buffers and the tied head that older files hold; a
    head that is not the embedding it is tied to, and a prefix on some names only, are errors."""
    theirs, file = teacher("gpt2", tmp_path), tmp_path / "model.safetensors"
    buffers = {"h.1.attn.bias": torch.ones(1, 1, T, T).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    edit(file, lambda w: w.update({f"transformer.{k}": v for k, v in buffers.items()}))
    assert_same_logits(HypeNet.from_pretrained(tmp_path), theirs)
    edit(file, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()})
    assert_same_logits(HypeNet.from_pretrained(tmp_path), theirs)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"].clone()}))
    assert_same_logits(HypeNet.from_pretrained(tmp_path), theirs)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"] + 1e-3}))
    with one_line("lm_head.weight differs from wte.weight"):
        HypeNet.from_pretrained(tmp_path)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"].clone(),
                                   "transformer.wpe.weight": w.pop("wpe.weight")}))
    with one_line("transformer.wte.weight is missing", "; wte.weight is unexpected"):
        HypeNet.from_pretrained(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name, rename, words", [
    ("gpt2", {"h.1.mlp.c_fc.weight": None, "h.0.ln_1.bias": "h.0.ln_1.beta"}, [
        "h.1.mlp.c_fc.weight is missing", "h.0.ln_1.bias is missing", "h.0.ln_1.beta is unexpected"]),
    ("gpt2", {"h.0.mlp.c_fc.weight": torch.zeros(128, 32)}, ["c_fc.weight is (128, 32), not (32, 128)"]),
    ("llama", {"layers.1.self_attn.k_proj.weight": None, "layers.0.mlp.up_proj.weight": torch.zeros(39, 32),
               "layers.0.self_attn.q_norm.weight": torch.ones(8)}, [
        "model.layers.1.self_attn.k_proj.weight is missing", "layers.0.self_attn.q_norm.weight is unexpected",
        "model.layers.0.mlp.up_proj.weight is (39, 32), not (40, 32)"])], ids=["names", "shape", "llama"])
def test_wrong_tensors_are_all_named(name, rename, words, tmp_path):
    """Every tensor that is missing, unexpected or of another shape is named, in one line."""
    teacher(name, tmp_path)
    prefix = "transformer." if name == "gpt2" else "model."

    def harm(weights):
        for old, new in rename.items():
            tensor = weights.pop(prefix + old, None)
            if isinstance(new, str):
                weights[prefix + new] = tensor
            elif new is not None:
                weights[prefix + old] = new
    edit(tmp_path / "model.safetensors", harm)
    with one_line(*words):
        HypeNet.from_pretrained(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name, changes", [
    ("gpt2", dict(activation_function="relu")), ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    ("gpt2", dict(reorder_and_upcast_attn=True)), ("gpt2", dict(n_positions=None)),
    ("qwen3", dict(hidden_act="gelu")), ("qwen3", dict(attention_bias=True)), ("llama", dict(mlp_bias=True)),
    ("qwen3", dict(use_sliding_window=True)), ("qwen3", dict(layer_types=["full_attention", "sliding"])),
    ("llama", dict(rope_scaling=dict(SLOWED, rope_type="yarn"), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=None)),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5))),
    ("qwen3", dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=5.0)))),
    ("llama", dict(quantization_config=dict(bits=4))), ("llama", dict(vocab_size="61")),
    ("llama", dict(num_hidden_layers=None)), ("llama", dict(model_type="mistral"))], ids=str)
def test_configs_we_would_get_wrong_are_one_line(name, changes, tmp_path):
    """A field that asks for what our layers do not do, or is missing (None), is an error that names it."""
    teacher(name, tmp_path)
    field = next(iter(changes))
    with one_line("config.json", field if field != "rope_parameters" else "rope_scaling"):
        edit(tmp_path / "config.json", lambda c: {k: v for k, v in (c | changes).items() if v is not None})
        HypeNet.from_pretrained(tmp_path)


@needs_transformers
def test_bad_shards_are_one_line(tmp_path):
    """A shard that is missing, cut short or no safetensors file at all is named."""
    teacher("llama", tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()
    for harm in (whole[:-100], whole[:4], b"version https://git-lfs.github.com/spec/v1\n", None):
        file.write_bytes(harm) if harm is not None else file.unlink()
        with one_line(file.name):
            HypeNet.from_pretrained(tmp_path)


def test_hub_names_end_in_a_folder_or_one_line(monkeypatch, tmp_path):
    """A hub's name, short or whole, is fetched, only files we read; what can go wrong on the way is one line
    with the name and what to do about it."""
    import huggingface_hub
    from huggingface_hub import errors
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda *a, **k: asked.append((a, k)) or tmp_path)
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    assert HypeNet.from_pretrained("gpt2-xl").config.n_embd == 32
    assert hypenet.fetch("Qwen/Qwen3-1.7B", weights=False) == tmp_path
    assert [a for a, _ in asked] == [("openai-community/gpt2-xl",), ("Qwen/Qwen3-1.7B",)]
    wanted = [k["allow_patterns"] for _, k in asked]
    assert all(p.endswith((".json", ".safetensors")) for p in wanted[0]) and "tokenizer.json" in wanted[0]
    assert all(p.endswith(".json") and "index" not in p for p in wanted[1])
    response = type("Response", (), dict(headers={}, request=None, status_code=403, url=""))()
    for error, word in ((errors.GatedRepoError("403", response=response), "accept its terms"),
                        (errors.RepositoryNotFoundError("404", response=response), "check the name"),
                        (errors.LocalEntryNotFoundError("no"), "go online"),
                        (errors.OfflineModeIsEnabled("no"), "go online"),
                        (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
                        (RuntimeError("two\nlines"), "two lines")):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        for load in (HypeNet.from_pretrained, Tokenizer.load):
            with one_line("meta-llama/Llama-3.2-1B", word):
                load("meta-llama/Llama-3.2-1B")
    for name in ("nowhere", "out/a/b", "/tmp/none", "./x", "gpt2-tiny"):
        with one_line(name, "gpt2-xl", "owner/name"):
            HypeNet.from_pretrained(name)


# ---- the authors' checkpoints ------------------------------------------------------------------------------

AUTHORS = dict(SMALL, model_type="hypenet", num_hidden_layers=4, head_dim=16, rms_norm_eps=1e-5,
               rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True, hidden_act="silu",
               mixer_types=["lightning-attn", "attn", "lightning_attn", "attn"], attention_bias=False,
               attn_use_rope=False, attn_use_output_gate=True, attn_logits_scaling=None,
               lightning_nh=4, lightning_nkv=4, lightning_head_dim=16, lightning_scale="1/sqrt(d)",
               lightning_use_rope=True, lightning_use_qk_norm=True, lightning_use_output_norm=True,
               lightning_use_output_gate=True)


def save_authors(path, **changes):
    """Random weights by the names of the authors' files, saved with their config.json."""
    from safetensors.torch import save_file
    c, w, rng = AUTHORS | changes, {}, torch.Generator().manual_seed(0)
    D, C = c["head_dim"], c["hidden_size"]

    def add(name, *shape):
        w[f"{name}.weight"] = torch.randn(shape, generator=rng) * 0.3 + (len(shape) == 1)
    add("model.embed_tokens", c["vocab_size"], C)
    add("model.norm", C)
    for i, kind in enumerate(c["mixer_types"]):
        at, linear = f"model.layers.{i}.self_attn", kind != "attn"
        q, kv = 4 * D, (c["lightning_nkv"] if linear else c["num_key_value_heads"]) * D
        for name, shape in dict(q_proj=(q, C), k_proj=(kv, C), v_proj=(kv, C), o_proj=(C, q), q_norm=(D,),
                                k_norm=(D,)).items():
            add(f"{at}.{name}", *shape)
        if c["lightning_use_output_gate" if linear else "attn_use_output_gate"]:
            add(f"{at}.{'z_proj' if linear else 'o_gate'}", q, C)
        if linear and c["lightning_use_output_norm"]:
            add(f"{at}.o_norm", q)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{i}.{name}", C)
        for name, shape in dict(gate_proj=(40, C), up_proj=(40, C), down_proj=(C, 40)).items():
            add(f"model.layers.{i}.mlp.{name}", *shape)
    save_file(w, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(c))
    return c, w


def authors_logits(c, w, idx):
    """The forward pass of github.com/thunlp/hybrid-linear-attention written out, one head at a time, in
    float64: idx (T,) -> (T,vocab_size). The states of linear layers go from token to token."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in w.items()}
    D, pos, scaling = c["head_dim"], torch.arange(len(idx)), c["attn_logits_scaling"]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]
    x = w["embed_tokens.weight"][idx]
    for i, kind in enumerate(c["mixer_types"]):
        at, linear = f"layers.{i}.self_attn", kind != "attn"
        y, out = norm(x, f"layers.{i}.input_layernorm"), []
        q, k, v = (y @ w[f"{at}.{name}_proj.weight"].T for name in "qkv")
        for h in range(4):
            g = h * k.size(1) // (4 * D)                                 # the head of k and v it shares
            q_h = norm(q[:, h * D:(h + 1) * D], f"{at}.q_norm")
            k_h, v_h = norm(k[:, g * D:(g + 1) * D], f"{at}.k_norm"), v[:, g * D:(g + 1) * D]
            if c["lightning_use_rope" if linear else "attn_use_rope"]:
                q_h, k_h = rope_by_hand(q_h, pos), rope_by_hand(k_h, pos)
            if linear:
                S, o, decay = torch.zeros(D, D, dtype=torch.float64), [], math.exp(-2 ** (-8 * (h + 1) / 4))
                for t in range(len(idx)):
                    S = decay * S + torch.outer(k_h[t], v_h[t])
                    o.append(q_h[t] @ S / math.sqrt(D))
                out.append(torch.stack(o))
            else:
                if isinstance(scaling, str):
                    a = float(scaling.split()[1]) if " " in scaling else 362.0
                    q_h = q_h * (torch.log(pos + a) / math.log(a))[:, None]
                elif scaling is not None:
                    q_h = q_h * scaling
                scores = (q_h @ k_h.T / math.sqrt(D)).masked_fill(pos[None] > pos[:, None], -INF)
                out.append(scores.softmax(-1) @ v_h)
        o = torch.cat(out, 1)
        if linear and c["lightning_use_output_norm"]:
            o = norm(o, f"{at}.o_norm")                                  # over all heads at once
        gate = f"{at}.{'z_proj' if linear else 'o_gate'}.weight"
        o = o * torch.sigmoid(y @ w[gate].T) if gate in w else o
        x = x + o @ w[f"{at}.o_proj.weight"].T
        y = norm(x, f"layers.{i}.post_attention_layernorm")
        a, up = (y @ w[f"layers.{i}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (a * torch.sigmoid(a) * up) @ w[f"layers.{i}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ w["embed_tokens.weight"].T


@pytest.mark.parametrize("changes", [
    dict(), dict(attn_logits_scaling="hype 500"), dict(attn_logits_scaling="hype"),
    dict(attn_logits_scaling=1.7), dict(lightning_nkv=2), dict(attn_use_rope=True),
    dict(lightning_use_rope=False), dict(lightning_use_output_norm=False, attn_use_output_gate=False),
    dict(lightning_use_output_gate=False)], ids=str)
def test_authors_checkpoint_gives_their_logits(changes, tmp_path):
    """A model in the authors' format gives the logits of their formulas: no output norm in attention, one
    over all heads in linear layers, s_t from position 0, off where attn_logits_scaling is null."""
    c, w = save_authors(tmp_path, **changes)
    model, idx = HypeNet.from_pretrained(tmp_path), some_ids(1, T)
    assert model.config.layers == "LALA" and rmse(model(idx)[0][0], authors_logits(c, w, idx[0])) < 1e-5
    assert model.config.logit_base == {"hype 500": 500.0, "hype": 362.0}.get(c["attn_logits_scaling"])


@pytest.mark.parametrize("changes", [
    dict(attn_logits_scaling="log"), dict(attn_logits_scaling=True), dict(lightning_scale="1/d"),
    dict(lightning_use_short_conv=True), dict(lightning_nh=8), dict(lightning_head_dim=8),
    dict(mixer_types=["gdn"] * 4), dict(mixer_types=["attn"] * 3),
    dict(num_attention_heads=12, lightning_nh=12)], ids=str)
def test_authors_options_we_lack_are_one_line(changes, tmp_path):
    """What their code can do and ours cannot is an error that names the field, before weights are read."""
    (tmp_path / "config.json").write_text(json.dumps(AUTHORS | changes))
    with one_line("config.json", next(iter(changes))):
        HypeNet.from_pretrained(tmp_path)


def test_sample_warns_where_queries_are_not_scaled(tmp_path, monkeypatch, capsys):
    """The authors' files say null: past 16,384 tokens one line on stderr names the flag and the paper's
    values; the flag scales the queries, and is told so."""
    save_authors(tmp_path, vocab_size=256)
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "text").write_text("x" * 20_000)
    monkeypatch.setattr(HypeNet, "stream", lambda self, *_: iter([torch.tensor([0])]))
    for extra, warns in ((["--ctx", "16383"], 0), (["--ctx", "16384"], 1), (["--logit-base", "500"], 0)):
        sample.main(["--model", str(tmp_path), "--file", str(tmp_path / "text"), "--tokens", "1", *extra])
        lines = capsys.readouterr().err.splitlines()
        warned = [line for line in lines if "--logit-base" in line]
        assert len(warned) == warns and all(word in line for line in warned for word in ("500", "600", "900"))
        assert any("logit base 500" in line for line in lines) == ("500" in extra)


# ---- tokenizers --------------------------------------------------------------------------------------------

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
FRAGMENTS = [
    " Zqxj", "def f(self, x):", " return x[1:-1]", "x", "Zz", "_", " the", "ing", "!!!", "…", " 12345678 ",
    "'s", "'S", "'LL", "'\u017f", "  ", "       ", "\n", "\r\n\r\n", "\t\t", "\u3000", "\xa0", "\x85", "\0",
    "\ufeff", "e\u0301", "a\u0308\u0323", "\u1100\u1161", "\u0344", "\u0338", "\u212b", "\ufb01",
    "\U0001d400", "混合线性注意力", "。", "👩‍👩‍👧🏽", "🏳️‍🌈", "déjà", "Ελληνικά", "русский", "עברית", "한국어",
    "नमस्ते", "<", ">", "<|end|>", "<|im_start|>", "<think>", "<think>ing", "</think>"]


@functools.cache
def their_tokenizer(family):
    """A byte-level BPE of the tokenizers library, trained here, with the family's pattern and tokens."""
    from tokenizers import (AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors,
                            trainers)
    from tokenizers import Tokenizer as Theirs
    byte_level, model = pre_tokenizers.ByteLevel, models.BPE(ignore_merges=family == "llama")
    theirs, pattern = Theirs(model), LLAMA_PATTERN if family == "llama" else QWEN_PATTERN
    theirs.decoder, theirs.pre_tokenizer = decoders.ByteLevel(), byte_level(add_prefix_space=False)
    if family != "gpt2":
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False, use_regex=False)])
    if family == "qwen3":
        theirs.normalizer = normalizers.NFC()
    text = [(HERE / "hypenet.py").read_text(encoding="utf-8"), *FRAGMENTS[1:] * 20]
    theirs.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=byte_level.alphabet(), show_progress=False,
        special_tokens=["<|end|>"] if family == "gpt2" else []))     # ids before, or after, those of bytes
    spec = json.loads(theirs.to_str())
    spec["model"]["vocab"]["ĠZqxj"] = len(spec["model"]["vocab"])   # no merge makes it: whole or not at all
    theirs = Theirs.from_str(json.dumps(spec))
    theirs.add_special_tokens([AddedToken("<|end|>", normalized=family == "gpt2"), "<|im_start|>"])
    theirs.add_tokens(["<think>", "<think>ing", AddedToken("</think>", normalized=False)])
    if family == "llama":
        begin = theirs.token_to_id("<|im_start|>")
        theirs.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)])
    return theirs


def our_tokenizer(family, path, **changes):
    """The same, read from the tokenizer.json that the library wrote."""
    theirs = their_tokenizer(family)
    theirs.save(str(path / "tokenizer.json"))
    edit(path / "tokenizer.json", lambda spec: spec | changes)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return theirs, Tokenizer.load(path)


@needs_tokenizers
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_that_of_the_tokenizers_library(family, tmp_path):
    """1,000 strings of code, many scripts, emoji, combining accents, runs of spaces and special tokens get
    the ids and the text that the library gives them; ids at random decode to its text, too; lone surrogates,
    which it refuses, become U+FFFD."""
    theirs, ours = our_tokenizer(family, tmp_path)
    rng, differ = random.Random(0), 0
    for i in range(1000):
        parts = rng.choices(FRAGMENTS, k=rng.randint(1, 20))
        text = "".join(part * rng.choice([1, 1, 1, 2, 30]) for part in parts)
        if i % 4 == 0:                                   # any characters at all, of the Unicode of both
            text += "".join(chr(rng.choice([rng.randrange(0x20, 0x590), rng.randrange(0x4E00, 0xD7A4)]))
                            for _ in range(20))
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
        differ += ours.encode(text) != ids
        noise = rng.choices(range(ours.n_vocab), k=20)
        assert ours.decode(noise) == theirs.decode(noise, skip_special_tokens=False), noise
    assert 300 < differ < 1000                           # special=False: <|end|> is text like any other
    assert ours.decode(ours.encode("<|end|>")) == "<|end|>" and len(ours.encode("<|end|>")) > 1
    assert ours.decode(ours.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert ours.n_vocab == theirs.get_vocab_size() and ours.holes == []


@needs_tokenizers
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_is_saved_beside_the_student(family, tmp_path):
    """Saved, with a student's config.json there, it loads with the same ids, ends and beginning, and the
    library reads the file too. Llama's template says what begins a text; the first end ends a document."""
    theirs, ours = our_tokenizer(family, tmp_path)
    end, begin = map(theirs.token_to_id, ("<|end|>", "<|im_start|>"))
    assert (ours.end, ours.stops, ours.bos) == (end, {end}, begin if family == "llama" else None)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[begin, 5])))
    ours = Tokenizer.load(tmp_path)
    assert (ours.end, ours.stops) == (begin, {begin, 5, end})
    student = tmp_path / "student"
    tiny(dtype=torch.float32).save_pretrained(student)
    ours.save(student)
    again, text = Tokenizer.load(student), "".join(FRAGMENTS)
    assert (again.end, again.stops, again.bos) == (ours.end, ours.stops, ours.bos)
    assert again.encode(text, special=True) == ours.encode(text, special=True)
    assert type(theirs).from_file(str(student / "tokenizer.json")).to_str() == theirs.to_str()


@needs_tokenizers
def test_ids_may_have_any_order_and_holes(tmp_path):
    """Ids in an order that is not that of the merges, and ids that no token has: same ids as the library, the
    holes are never sampled, and decode to U+FFFD."""
    theirs, ours = our_tokenizer("llama", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    new = {id: 3 * id % 1009 for id in range(ours.n_vocab)}              # 1009 is prime: no two become one
    spec["model"]["vocab"] = {token: new[id] for token, id in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = new[token["id"]]
    shuffled = Tokenizer(spec, [new[ours.end]])
    for text in FRAGMENTS + ["".join(FRAGMENTS)]:
        ids = [new[id] for id in theirs.encode(text, add_special_tokens=False).ids]
        assert shuffled.encode(text, special=True) == ids and shuffled.decode(ids) == text
    assert shuffled.holes == sorted(set(range(shuffled.n_vocab)) - set(new.values()))
    assert shuffled.decode([shuffled.holes[0], 10 ** 9]) == "\ufffd\ufffd"
    model = tiny(dtype=torch.float32)
    drawn = model.generate([[1, 2]], 200, temperature=9.0, seed=0, never=list(range(0, 61, 2)))[0]
    assert len(drawn) == 200 and all(id % 2 for id in drawn)


@needs_tokenizers
@pytest.mark.parametrize("changes, word", [
    (dict(normalizer=dict(type="NFKC")), "normalizer"),
    (dict(normalizer=dict(type="Sequence", normalizers=[dict(type="Lowercase")])), "normalizer"),
    (dict(pre_tokenizer=None), "pre_tokenizer"), (dict(pre_tokenizer=dict(type="Digits")), "pre_tokenizer"),
    (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True, use_regex=True)), "pre_tokenizer"),
    (dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[
        dict(type="Split", pattern=dict(Regex=r"\p{L}+"), behavior="Isolated", invert=False),
        dict(type="ByteLevel", add_prefix_space=False, use_regex=False)])), "leaves out"),
    (dict(added_tokens=[dict(id=1, content="<s>", lstrip=True)]), "added_tokens"),
    (dict(model=dict(type="Unigram", vocab={}, merges=[])), "model"),
    (dict(model=dict(type="BPE", vocab={"a": 0}, merges=[])), "vocab"), (dict(model={}), "tokenizer"),
    (dict(model=dict(type="BPE", vocab={}, merges=["a b", "ab c", "b c", "a bc"])), "merges")], ids=str)
def test_tokenizers_we_would_get_wrong_are_one_line(changes, word, tmp_path):
    """Any other kind of tokenizer is an error that names what is different."""
    with one_line("tokenizer.json", word):
        our_tokenizer("gpt2", tmp_path, **changes)


@needs_tokenizers
def test_tokenizer_needs_an_end_and_a_model_of_its_size(tmp_path):
    """No end id, an end id that is no token, more ids than the model has rows, a token that tiktoken would
    join but the library takes only whole: one line each."""
    _, ours = our_tokenizer("gpt2", tmp_path)
    hypenet.check_tokenizer(ours, HypeNetConfig(vocab_size=ours.n_vocab))
    with one_line(f"{ours.n_vocab - 1:,}"):
        hypenet.check_tokenizer(ours, HypeNetConfig(vocab_size=ours.n_vocab - 1))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["ĠZqxjx"] = ours.n_vocab
    with one_line("merges"):
        Tokenizer(spec, [0])
    for config in ({}, {"eos_token_id": 5000}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with one_line("eos_token_id"):
            Tokenizer.load(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama"])
def test_sample_continues_as_transformers_does(name, tmp_path, capsys):
    """sample.py --model FOLDER prints the prompt and the greedy continuation of transformers; a tokenizer
    with more ids than the model has rows is an error."""
    theirs, _ = our_tokenizer(name, tmp_path)
    model = teacher(name, tmp_path, vocab_size=theirs.get_vocab_size() + 7, eos_token_id=5)
    ids = theirs.encode("def f(x):\n", add_special_tokens=True).ids
    with torch.no_grad():
        for _ in range(12):
            scores = model(torch.tensor([ids])).logits[0, -1, :theirs.get_vocab_size()]
            ids.append(scores.argmax().item())
    sample.main(["--model", str(tmp_path), "--prompt", "def f(x):\n", "--tokens", "12", "--device", "cpu"])
    assert capsys.readouterr().out == "... " + theirs.decode(ids, skip_special_tokens=False) + "\n"
    teacher(name, tmp_path)
    with pytest.raises(SystemExit):
        sample.main(["--model", str(tmp_path), "--prompt", "x", "--device", "cpu"])
    assert "the model's embedding has 61 rows" in capsys.readouterr().err


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


# ---- halo: text in rows ------------------------------------------------------------------------------------


def write_documents(path, texts):
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))


def some_documents(n=400, words=150):
    rng = random.Random(n)
    return [f"doc{i} " + "".join(rng.choices("abcdefgh \n", k=rng.randrange(1, 2 * words))) for i in range(n)]


def shard(path, documents, magic=20240520, version=1, cut=0):
    """A shard as FineWeb's: a header of 256 int32, then each document after GPT-2's end id, uint16."""
    ids = np.concatenate([[50256, *document] for document in documents]).astype(np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes((header.tobytes() + ids.tobytes())[:-cut or None])
    return ids


class Gpt2:
    """A stand-in for GPT-2's tokenizer: id i stands for chr(97 + i % 26)."""
    n_vocab, end, bos, spec = 50257, 50256, None, {"type": "stand-in"}

    def encode(self, text):
        return [15496, 995] if text == "Hello world" else [ord(c) - 97 for c in text]

    def encode_array(self, text):
        return np.array(self.encode(text), np.int32)

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def a_plan(tokens, length, batch, recall=0):
    return halo.Plan(tokens, length, batch, 1e-3, 1e-3, recall)


def rows_of(corpus, stage, plan):
    """All rows of a stage, (rows, length + 1), the stage counted as done."""
    make = corpus.rows(stage, plan)
    rows = np.concatenate([make(step) for step in range(plan.steps)])
    corpus.advance(plan)
    return rows


def test_an_epoch_is_every_token_once(tmp_path):
    """Rows of one epoch hold each position of the training text once, but for less than a cell, each row a
    stretch of it; the next epoch has another order, another seed too."""
    write_documents(tmp_path / "text.jsonl", some_documents())
    corpus = halo.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=64)
    text = corpus.sources[0].parts[0].astype(np.int64)
    n = (len(text) - 1) // 64                                               # cells
    seen, orders = np.zeros(len(text), int), []
    for epoch in range(2):
        cells = corpus.sources[0].order(epoch)
        assert len(cells) == n and 0 <= cells.min() and cells.max() + 64 < len(text)
        orders.append(cells.tolist())
        for c, at in enumerate(cells):
            row = corpus.sources[0].read(epoch * n + c, 0, 65)
            assert (row == text[at:at + 65]).all()
            seen[at:at + 64] += 1
    assert (seen <= 2).all() and (seen == 2).sum() > len(text) - 3 * 64 and orders[0] != orders[1]
    rows = rows_of(corpus, "a", a_plan(n // 8 * 8 * 64, 32, 16))
    assert len({row.tobytes() for row in rows}) == len(rows) == n // 8 * 16
    other = halo.Corpus(Tokenizer.bytes(), [str(tmp_path)], seed=1, cell=64)
    assert not (other.rows("a", a_plan(640, 32, 16))(0) == rows[:16]).all()


def test_stages_read_disjoint_text(tmp_path):
    """Stages of different lengths take text in turn: none of it twice until it runs out, none held out."""
    write_documents(tmp_path / "a.jsonl", [f"{i:08d}" for i in range(9000)])
    corpus = halo.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=96)
    found = []
    for name, sizes in dict(a=(20000, 48, 4), b=(20000, 96, 5), c=(9600, 32, 3)).items():
        rows = rows_of(corpus, name, a_plan(*sizes)).astype(np.uint8)
        found.append(set().union(*(bytes(row).split(b"\0")[1:-1] for row in rows)))
    assert all(len(stage) > 500 for stage in found)
    edges = set().union(*[found[i] & found[j] for i in range(3) for j in range(i)])
    assert len(edges) < 0.05 * sum(map(len, found))     # documents that a cell's edge cuts, at most
    held_out = set(bytes(corpus.held_out.astype(np.uint8)).split(b"\0"))
    assert not held_out & set().union(*found) and 400 < len(held_out) < 700


def test_weights_are_shares_of_rows(tmp_path):
    """Sources with weights give their shares of the rows in every block; a batch depends on its step only."""
    for name in "abc":
        (tmp_path / name).mkdir()
        write_documents(tmp_path / name / "x.jsonl", [name * 50 + str(i) for i in range(1000)])
    data = [f"{tmp_path}/a:0.7,{tmp_path}/b:0.1", f"{tmp_path}/c:0.2"]
    corpus = halo.Corpus(Tokenizer.bytes(), data, cell=64)
    first, second = a_plan(64000, 32, 20), a_plan(32000, 64, 10)
    make = corpus.rows("first", first)
    again = halo.Corpus(Tokenizer.bytes(), data, cell=64).rows("first", first)
    assert all((make(step) == again(step)).all() for step in (99, 3, 50))   # any order, any time
    counts = []
    for name, p in dict(first=first, second=second).items():
        letters = [max("abc", key=bytes(row.astype(np.uint8)).decode("latin1").count)
                   for row in rows_of(corpus, name, p)]
        counts.append([letters.count(letter) / len(letters) for letter in "abc"])
    assert counts == [pytest.approx([0.7, 0.1, 0.2], abs=0.003)] * 2
    for bad in (["x:0.5", "y"], ["x:0"], ["x:many"], ["fineweb", "x"], ["x:inf", "y:1"], ["x:nan"]):
        with one_line("weight"):
            halo.data_sources(bad)


def test_shards_are_read_as_they_are(tmp_path):
    """A shard of GPT-2 tokens is mapped, not loaded; those named val are held out and no other; an epoch goes
    through all of them, no place twice."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 26, rng.integers(1, 90)) for _ in range(300)]
    val = shard(tmp_path / "x_val_0.bin", documents[:50])
    train = [shard(tmp_path / f"x_train_{i}.bin", documents[a:a + 100]) for i, a in ((1, 50), (2, 150))]
    corpus = halo.Corpus(Gpt2(), [str(tmp_path)], cell=40)
    source = corpus.sources[0]
    assert (corpus.held_out == val).all() and source.sizes == [0, *map(len, train)]
    n = [(len(ids) - 1) // 40 for ids in train]
    for epoch in range(2):
        for first, cells, ids, path in zip((0, n[0]), n, train, source.parts[1:]):
            assert isinstance(halo.read_shard(path), np.memmap)
            windows = {ids[at:at + 40].tobytes(): at for at in range(len(ids) - 39)}
            read = [source.read(epoch * sum(n) + first + c, 0, 40) for c in range(cells)]
            places = sorted(windows[row.astype(np.uint16).tobytes()] for row in read)
            assert (np.diff(places) == 40).all()
    (tmp_path / "x_val_0.bin").unlink()
    with one_line("0 tokens", "val"):
        halo.Corpus(Gpt2(), [str(tmp_path)], cell=40).windows(rng, 1, 40)


def test_shards_are_encoded_for_another_tokenizer(tmp_path, monkeypatch):
    """Decoded and encoded again, an end id after each document: a row begins in the text where it would, and
    is as much of it as gives its length; at the end of a shard it goes on from the start."""
    monkeypatch.setattr(halo.Tokenizer, "load", lambda name: Gpt2())
    documents = [[3, 1, 2], [5] * 70, [25], [7] * 100]
    ids = shard(tmp_path / "train.bin", documents)
    shard(tmp_path / "val.bin", documents[:1] * 3)
    corpus = halo.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=16)
    assert bytes(corpus.held_out.astype(np.uint8)) == b"dbc\0" * 3
    whole, source = "".join("\0" if i == 50256 else chr(97 + i) for i in [*ids, *ids])[1:], corpus.sources[0]
    for c in range((len(ids) - 1) // 16):
        at = source.order(1)[c]
        row = bytes(source.read(c, 0, 17).astype(np.uint8)).decode()
        assert row == whole[max(0, at - 1):][:17] or row == whole[at:][:17]

    class Joined(Tokenizer):
        """A tokenizer of fewer ids than GPT-2's: three letters are one."""
        def encode_array(self, text, special=False):
            return np.full(len(text) // 3 + 1, 97, np.int32)
    joined = halo.Corpus(Joined(Tokenizer.bytes().spec), [str(tmp_path)], cell=64)
    assert all(len(joined.sources[0].read(c, 0, 65)) == 65 for c in range(4))


@pytest.mark.parametrize("harm", [dict(magic=1), dict(version=9), dict(cut=2), dict(cut=7000)], ids=str)
def test_damaged_shards_are_one_line(harm, tmp_path):
    """A shard that is cut short, or no shard at all, is named in one line."""
    shard(tmp_path / "a.bin", [[1] * 3000], **harm)
    with one_line("a.bin"):
        halo.Corpus(Gpt2(), [str(tmp_path)])


def test_no_network_is_one_line(monkeypatch, capsys):
    """FineWeb without a network is one line that names what is missing, status 2."""
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to host")
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, offline)
    for path in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        with one_line("--data fineweb", path):
            halo.read_shard(path)
    with pytest.raises(SystemExit) as stop:
        halo.main(["--data", "fineweb", "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "no route" in error


def test_copies_of_a_text_stand_on_one_side(tmp_path):
    """A text is trained on or held out whatever else its line says, and so are pieces of a file whose
    paragraphs are parted by blank lines."""
    lines = [json.dumps(dict(id=j, text=f"document {i} " * 9)) for i in range(200) for j in range(3)]
    (tmp_path / "copies.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "prose.txt").write_text("".join(f"\nparagraph {i} {'word ' * 500}\n" for i in range(1500)))
    for name, texts in (("copies.jsonl", 200), ("prose.txt", 50)):
        corpus = halo.Corpus(Tokenizer.bytes(), [str(tmp_path / name)], cell=64)
        sides = [set(corpus.tokenizer.decode(ids).split("\0")) - {""}
                 for ids in (corpus.sources[0].parts[0], corpus.held_out)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) >= texts
        assert 0.01 < len(sides[1]) / texts < 0.2


def test_a_log_cut_off_is_read(tmp_path):
    """The last line of a log may be half a line: it is dropped with those that will be written again."""
    run = halo.Run(str(tmp_path), {})
    run.close()
    for step in (1, 2, 3):
        run.log(stage="align", step=step)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"stage": "al')
    run.forget("align", 2)
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")] == [1, 2]


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


# ---- halo: the plan ----------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused(monkeypatch, tmp_path):
    """Weights and optimizer beyond the card, files beyond the disk: one line that names the way out."""
    teacher, tokenizer = tiny(layers="AAAA"), Tokenizer.bytes()

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(halo, "make_twins", full)
    with one_line("--recipe article"):
        halo.Probe(teacher, None, dict(align=None), options(tokenizer=tokenizer))
    with one_line("--groups"):
        halo.Probe(teacher, None, dict(group=a_plan(640, 64, 5)), options("article", tokenizer=tokenizer))
    for plans, o in ((dict(align=None), options()), (dict(group=None), options("article"))):
        halo.check_disk(tmp_path / "run", teacher, plans, o)
        with monkeypatch.context() as patch, one_line("--out", str(tmp_path)):
            patch.setattr(halo.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
            halo.check_disk(tmp_path / "a" / "run", teacher, plans, o)


def test_plans_of_real_teachers(monkeypatch, tmp_path):
    """A teacher of the hub, or a folder of much weight, gets the paper's plan and fineweb, any other
    that of tiny and the standard library; the article's plan is 2.3B tokens, 2M a step."""
    monkeypatch.setattr(halo, "default_device", lambda name=None: "cuda")
    def plans(*argv):
        o = halo.get_args(list(argv))
        return halo.settle(o)[0], o.data
    real, data = plans("--teacher", "gpt2-xl")
    assert data == ["fineweb"] and [(p.steps, p.length, p.batch) for p in real.values()] == [
        (19531, 512, 32), (20345, 512, 96), (477, 16384, 128)]
    group = plans("--teacher", "gpt2-xl", "--recipe", "article")[0]["group"]
    assert group.tokens == 2.3e9 and 2e6 <= group.length * group.batch <= 2.2e6 and group.lr == 1e-5
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    assert plans("--teacher", str(tmp_path)) == (plans()[0], None)
    monkeypatch.setitem(halo.SIZES, "real", 999)
    assert plans("--teacher", str(tmp_path)) == (real, ["fineweb"])


def test_probe_measures_every_stage(tmp_path):
    """A probe tries each stage, the memory of its optimizer set aside, and changes nothing of the teacher."""
    write_documents(tmp_path / "text.jsonl", some_documents(words=400))
    teacher, tokenizer = tiny(dtype=torch.float32, vocab_size=256, layers="AAAA"), Tokenizer.bytes()
    before = {name: w.clone() for name, w in teacher.state_dict().items()}
    corpus = halo.Corpus(tokenizer, [str(tmp_path)], cell=64)
    for recipe, stages in dict(paper=["align", "distil", "finetune"], article=["group"]).items():
        o = options(recipe, tokenizer=tokenizer)
        found = halo.Probe(teacher, corpus, {stage: a_plan(640, 64, 5) for stage in stages}, o).found
        assert list(found) == stages and all(m == 5 and speed > 0 for m, speed, _ in found.values())
        assert not corpus.taken.any()
    assert all(w.equal(before[name]) for name, w in teacher.state_dict().items())
    assert not any("forward" in vars(block) for block in teacher.blocks)


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
            assert hypenet.default_device(name) == name
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


@needs_transformers
@pytest.mark.parametrize("recipe", halo.RECIPES)
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama"])
def test_real_families_go_through(name, recipe, home, tmp_path, capsys):
    """A random model of transformers with a BPE tokenizer is planned, converted two rows at a time, and its
    student read again with its tokenizer; each layer is scored without its positions, learned ones too."""
    theirs, ours = our_tokenizer(name, tmp_path)
    sizes = dict(n_layer=4, n_positions=128) if name == "gpt2" else dict(
        num_hidden_layers=4, max_position_embeddings=4096)
    teacher(name, tmp_path, vocab_size=theirs.get_vocab_size() + 7, **sizes)
    argv = ["--recipe", recipe, *["--max-ctx", "8192"] * (recipe == "article"), "--micro", "1"]
    with pytest.raises(FileNotFoundError):                                  # no report: nothing was done
        convert(home, tmp_path / "no", *argv, "--dry-run", steps=1, teacher=tmp_path)
    assert not (tmp_path / "no").exists() and "learning rate" in capsys.readouterr().out
    report = convert(home, tmp_path / "run", *argv, steps=1, teacher=tmp_path)
    student, tokenizer = HypeNet.from_pretrained(tmp_path / "run"), Tokenizer.load(tmp_path / "run")
    assert tokenizer.encode("def x") == ours.encode("def x")
    assert student.config.layers == report["layers"] and "L" in report["layers"]
    if recipe == "paper":
        scores = json.loads((tmp_path / "run" / "run.json").read_text())["done"]["scores"][0]
        assert student.config.attn_pe == 0
        assert len({s["C_kept"] for s in scores} | {s["C"] for s in scores}) == 8


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


# ---- halo: what bad input gets -----------------------------------------------------------------------------

ERRORS = {  # what is given, {} being the fixture's folder: a word of the line it gets
    "--recipe blog": "paper", "--decay slow": "channel", "--seed x": "seed", "--seed -1": "seed",
    "--teacher {}/nowhere": "nowhere", "--teacher {}/text.jsonl": "text.jsonl",
    "--teacher {}/short": "64", "--teacher {}/gpt2 --pe rope --plan finetune.length=200": "positions",
    "--teacher {}/paper": "hybrid", "--resume {}/nowhere": "nowhere", "--resume {}/paper --seed 3": "--seed",
    "--out {}/paper": "not empty", "--pretrain --teacher {}/teacher": "tiny", "--layers LLA": "LLA",
    "--layers some": "some", "--groups 2": "progressive", "--training progressive": "--layers",
    "--training progressive --layers ends": "--pe", "--layers AAAA": "--layers",
    "--recipe article --groups -1": "groups", "--recipe article --max-ctx 50": "max-ctx",
    "--recipe article --fade 1": "fade", "--fade -1": "fade", "--alpha 1.5": "alpha", "--alpha nan": "alpha",
    "--window -1": "window", "--retention 1": "retention", "--trials 0": "trials", "--budget 0": "budget",
    "--logit-base 1": "logit-base", "--logit-base long": "logit-base", "--logit-base inf": "logit-base",
    "--budget nan": "budget", "--budget inf": "budget", "--plan distil.token=1": "lr_end",
    "--plan a=1": "distil", "--plan align.recall=0 align.varied=0.5": "varied",
    "--plan align.tokens=many": "number", "--plan align.tokens=-1": "--plan",
    "--plan align.lr=nan": "--plan", "--plan align.length=40": "align", "--set gate=true": "gate",
    "--set window=0": "window", "--set n_embd=64": "n_embd", "--set linear_kv_head=3": "linear_kv_head",
    "--device tpu": "no such device", "--device mps": "mps", "--data {}/no.txt": "no.txt",
    "--data {}/teacher": ".jsonl", "--data {}/bad.jsonl": "bad.jsonl", "--data {}/short.txt": "--data",
    "--data {}/cut.txt.gz": "cut.txt.gz", "--data {}/plain.txt.gz": "plain.txt.gz",
    "--data stdlib:0.5 stdlib": "weight", "--micro 0": "micro", "--teacher gpt2-xl": "GPU",
    "--teacher Qwen/Qwen3-1.7B": "GPU", "--teacher no/such": "no/such", "--teacher tiny-gpt2": "hours",
    "--teacher small": "hours", "--keep 3 --layers ends": "--keep", "--keep 4": "--keep 4",
    "--retention 0.5": "--decay", "--max-ctx 900": "--pe", "--alpha 1 --kl reverse": "--alpha",
    "--pretrain --teacher tiny --keep 2": "--keep", "--pretrain --teacher tiny --transfer off": "--transfer",
    "--teacher {}/empty": "tokenizer",
}


@pytest.mark.parametrize("given", ERRORS)
def test_bad_input_is_one_line(given, runs, home, tmp_path, monkeypatch, capsys):
    """Bad input ends with status 2 and one line that names it, before anything is trained or written."""
    if "mps" in given and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    (home / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (home / "short.txt").write_text("short\n")
    (home / "empty").mkdir(exist_ok=True)
    (home / "plain.txt.gz").write_text("not compressed\n")
    (home / "cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(3000))[:1500])
    monkeypatch.setattr(halo, "train", lambda *_: pytest.fail("training began"))
    device = halo.default_device
    monkeypatch.setattr(halo, "default_device", lambda name=None: device(name or "cpu"))
    argv = given.replace("{}", str(home)).split()
    if "--resume" not in given:                                             # else it takes no other flags
        argv = ["--teacher", str(home / "teacher"), "--out", str(tmp_path / "run"), *argv]
        argv += [] if "--data" in given else ["--data", str(home / "text.jsonl")]
    with pytest.raises(SystemExit) as stop:
        halo.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and ERRORS[given] in error, error
    assert not (tmp_path / "run").exists()


def test_non_finite_loss_stops(home, tmp_path, monkeypatch, capsys):
    """A loss that is not finite ends the run before it reaches the weights, naming the last checkpoint."""
    def infinite(student, teacher, idx, *rest, plain=halo.distil_loss):
        seen.append((student, {n: w.clone() for n, w in student.state_dict().items()}))
        return plain(student, teacher, idx, *rest) * (1 if len(seen) < 3 else INF)
    seen = []
    monkeypatch.setattr(halo, "distil_loss", infinite)
    with pytest.raises(SystemExit) as stop:
        convert(home, tmp_path / "run", "--layers", "LLLA", steps=3)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("halo.py: distil") and "inf" in line
    student, weights = seen[-1]
    assert len(seen) == 3 and all(w.equal(weights[name]) for name, w in student.state_dict().items())
    named = re.search(r"\S+\.pt", line)
    assert os.path.exists(named[0]) if named else "no checkpoint yet" in line


def test_files_appear_whole(tmp_path):
    """A file that cannot be finished is not begun: the old one stays, and nothing lies beside it."""
    hypenet.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        hypenet.write_json(tmp_path / "a.json", [1, 2, {"x": object()}])
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and os.listdir(tmp_path) == ["a.json"]


# ---- sample.py ---------------------------------------------------------------------------------------------


def test_shipped_student_finds_the_key(capsys, monkeypatch, tmp_path):
    """In a fresh clone sample.py takes the shipped student, says so, and answers a pass key at a length,
    2,048, at which its teacher does not; the report names the tokens read, the bytes of state and K/V."""
    monkeypatch.chdir(tmp_path)                                              # no runs of this machine here
    sample.main(["--ctx", "2048", "--tokens", "8", "--device", "cpu"])
    text = capsys.readouterr().err
    assert "tiny-student" in text and re.search(r"pass key \d{5}: found", text)
    S, K = 6 * 3 * 32 * 32 * 4, 2 * 2 * (2042 + 8) * 3 * 32 * 4             # six linear layers, two attention
    sizes = f"state {S / 1e6:.2f} MB + K/V {K / 1e6:.2f} MB; all-attention K/V {4 * K / 1e6:.2f} MB"
    assert "read 2,042 tokens" in text and sizes in text
    sample.main(["--ctx", "2048", "--tokens", "8", "--device", "cpu", "--teacher"])
    text = capsys.readouterr().err
    assert "tiny-teacher" in text and "NOT found" in text


def test_sample_takes_the_newest_run(runs, monkeypatch, tmp_path, capsys):
    """Of the runs under out/ the newest is taken; a file is continued from its last --ctx tokens."""
    monkeypatch.chdir(tmp_path)
    for age, recipe in enumerate(("paper", "article")):
        shutil.copytree(runs[recipe][0], tmp_path / "out" / recipe)
        os.utime(tmp_path / "out" / recipe / "report.json", (age, age))
    (tmp_path / "text.txt").write_text("x" * 300 + "end")
    sample.main(["--file", "text.txt", "--ctx", "100", "--tokens", "3", "--device", "cpu"])
    text = capsys.readouterr()
    assert "out/article" in text.err.replace(os.sep, "/") and "read 100 tokens" in text.err
    assert text.out.startswith("... " + "x" * 97 + "end")


def test_split_characters_print_whole(monkeypatch, capsys):
    """A character whose bytes are several tokens is printed once whole; the end id ends the text."""
    ids = [*"é中👍".encode(), 0, *b"never"]
    monkeypatch.setattr(HypeNet, "stream", lambda *_: (torch.tensor([i]) for i in ids))
    sample.main(["--model", str(HERE / "assets" / "tiny-student"), "--prompt", "a", "--device", "cpu"])
    assert capsys.readouterr().out == "... aé中👍\n"


@pytest.mark.parametrize("given, word", [
    ("--model nowhere", "nowhere"), ("--ctx 0", "--ctx"), ("--tokens x", "--tokens"),
    ("--file none.txt", "none.txt"), ("--prompt a --file b", "--prompt"), ("--prompt=", "--prompt"),
    ("--temperature -1", "--temperature"), ("--top-p 2", "--top-p"),
    ("--device tpu", "tpu")])
def test_sample_errors_are_one_line(given, word, capsys):
    """Bad input of sample.py ends with status 2 and one line that names it."""
    student = ["--model", str(HERE / "assets" / "tiny-student")]
    with pytest.raises(SystemExit) as stop:
        sample.main(([] if "--model" in given else student) + given.split())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and word in line and line.startswith("sample.py: ")


# ---- bench.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results/ of one's own."""
    monkeypatch.setattr(bench, "RESULTS", str(tmp_path))
    return tmp_path


def bench_rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("tied", [True, False])
def test_bench_floors_by_hand(tied):
    """Bytes of a decoded token and operations of a forward pass, counted by hand on two layers."""
    c = HypeNetConfig("AL", vocab_size=50, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_hidden=16,
                      tied=tied)
    attention = 8 * (8 + 4 + 4) + 8 * 8                  # q, k, v, out
    linear = 8 * (4 * 8) + 8 * 8                         # q, k, v (a head a query head), gate, out
    mlp = 8 * 32 + 16 * 8
    norms = 5 * 8 + 2 * 4 + 2 * 4 + 8                    # of blocks and model, QK-norms, output norm
    read = attention + linear + 2 * mlp + norms + 50 * 8           # the head; an embedding of its own: a row
    S, KV = 3 * 2 * 4 * 4 * 4, 3 * 100 * 2 * 4 * 2       # three rows of 100 tokens, S fp32, K/V bf16
    moved, held = bench.weigh(c, 3, 100, torch.bfloat16)
    assert moved == 2 * read + 2 * S + KV
    assert held == 2 * (read + (not tied) * 50 * 8) + S + KV
    assert bench.operations(c, 10) == (2 * 10 * (attention + linear + 2 * mlp), 4 * 2 * 4 * 55)
    assert bench.operations(c, 10, "mixer")[0] == 2 * 10 * (attention + linear)
    windowed = HypeNetConfig("AA", n_head=2, head_dim=4, n_kv_head=1, window=3)
    assert bench.operations(windowed, 10)[1] == 2 * 4 * 2 * 4 * (1 + 2 + 8 * 3)
    ops, head = bench.operations(c, 10), 2 * 8 * 50
    assert bench.train_operations("finetune", c, c, 10) == 3 * (sum(ops) / 10 + head)
    assert bench.train_operations("distil", c, c, 10) == 4 * (sum(ops) / 10 + head)
    twins = 2 * 2 * (3 * linear - 8 * 32)                # both layers; inputs need no gradient
    assert bench.train_operations("align", c, c, 10) == sum(ops) / 10 + twins


def test_bench_shapes_are_the_published_ones():
    """Parameters of the sizes that the tables name, in millions; layers that stay attention."""
    with torch.device("meta"):
        params = {(size, kind): bench.HypeNet(bench.config_of(size, kind)).n_params() / 1e6
                  for size, kind in (("2b", "hybrid"), ("2b", "teacher"), ("gpt2-xl", "teacher"),
                                     ("14b", "teacher"))}
    assert {name: round(n) for name, n in params.items()} == {
        ("2b", "hybrid"): 1926, ("2b", "teacher"): 1721, ("gpt2-xl", "teacher"): 1558,
        ("14b", "teacher"): 14768}
    for size, n in (("2b", 7), ("gpt2-xl", 12), ("14b", 10), ("tiny", 2)):
        assert bench.config_of(size, "hybrid").layers.count("A") == n
    assert bench.config_of("2b", "article").window == 2048


def test_bench_decode_and_figure(results, monkeypatch, capsys):
    """Every model and context gets its row, with times, floors and tokens a second that agree; a second
    run replaces its own rows only; out of memory is a row too; the figure shows what the file holds."""
    bench.main("decode --device cpu".split())
    rows = bench_rows(results, "decode-cpu")
    assert {(r["kind"], r["context"]) for r in rows if r["batch"] == 1} == {
        (kind, n) for kind in bench.ALL for n in (256, 1024)}
    assert {r["kind"] for r in rows if r["batch"] > 4} == {"hybrid", "teacher"}     # the largest that fits
    for r in rows:
        assert r["floor_ms"] > 0 and r["need_gb"] > 0 and r["peak_gb"] is None
        assert r["ratio"] == pytest.approx(r["ms"] / r["floor_ms"])
        assert r["tok_s"] == pytest.approx(1000 * r["batch"] / r["ms"])

    class Full:
        def init_state(self, *_):
            raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, "build", lambda *_: Full())
    bench.main("decode --device cpu --kind teacher --ctx 1024 2048".split())
    after = bench_rows(results, "decode-cpu")
    assert len(after) == len(rows) + 1 and after[-1]["ms"] is after[-2]["ms"] is None
    assert all(r in after for r in rows if (r["kind"], r["context"], r["batch"]) != ("teacher", 1024, 1))
    assert capsys.readouterr().out.count("memory    ") == 2
    if pytest.importorskip("matplotlib", reason="matplotlib is not installed"):
        picture = results / "decode-tiny.png"
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        picture.unlink()
        bench.main("figure --size tiny".split())
        assert picture.stat().st_size > 10_000


def test_bench_without_matplotlib(results, monkeypatch, capsys):
    """A figure that cannot be drawn is one line, the rows are written all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.main("decode --device cpu --kind hybrid --ctx 64 --name x".split())
    assert "pip install matplotlib" in capsys.readouterr().out and bench_rows(results, "x")[0]["ms"] > 0


def test_bench_prefill(results):
    """Seconds of hybrid and teacher, the latter to --teacher-max; the floor is operations over rates."""
    bench.main("prefill --device cpu --ctx 100 300 --teacher-max 200".split())
    content = json.loads((results / "prefill-cpu.json").read_text(encoding="utf-8"))
    assert [(r["kind"], r["context"]) for r in content["rows"]] == [
        ("hybrid", 100), ("hybrid", 300), ("teacher", 100)]
    for r in content["rows"]:
        linear, attention = bench.operations(bench.config_of("tiny", r["kind"]), r["context"])
        floor = linear / content["matmul_rate"] + attention / content["attention_rate"]["tiny"][0]
        assert r["floor_s"] == pytest.approx(floor) and r["seconds"] > 0 and r["ratio"] > 0


def test_bench_niah(results, home, runs, monkeypatch, capsys):
    """What a student and its teacher find and predict at each length, with intervals, and a figure; reading
    on YaRN's terms leaves the teacher as it was."""
    run = runs["paper"][0]
    for name, task in list(halo.TASKS.items())[1:]:                         # short ones, for short texts
        short = task._replace(needle="{name} is {value}.", question="{name} is", size=4)
        monkeypatch.setitem(halo.TASKS, name, short)
    argv = ["niah", "--device", "cpu", "--model", str(run), "--teacher", str(home / "teacher"), "--data",
            str(home / "text.jsonl"), "--trials", "2", "--times", "2", "--windows", "2"]
    bench.main(argv)
    rows, T = bench_rows(results, "niah-cpu"), HypeNet.from_pretrained(home / "teacher").config.max_len
    assert {r["task"] for r in rows if r["model"] == "student"} == {*halo.TASKS, "loss"}
    assert {r["model"] for r in rows} >= {"student", "teacher", "teacher, sink + window"}
    assert {r["context"] for r in rows} == {T, 2 * T}
    assert all(r["low"] <= r["value"] <= r["high"] for r in rows)
    for r in (r for r in rows if r["task"] != "loss"):
        assert np.mean(r["by_depth"]) == r["value"] and len(r["by_depth"]) == 2
    monkeypatch.setattr(halo, "recall", lambda *_, **__: 2 * (torch.zeros(2),))       # nothing is found
    bench.main([*argv, "--times", "16", "--name", "none"])
    asked = [r["context"] // T for r in bench_rows(results, "none")
             if (r["model"], r["task"]) == ("student", "S1")]
    assert asked == [1, 2]                                                  # and 4 and 16 are not tried
    teacher = tiny(dtype=torch.float32, layers="AA", max_len=8)
    before, idx = teacher(some_ids(1, 16))[0], some_ids(1, 16)
    with bench.stretched(teacher, 2.0):
        assert rmse(teacher(idx)[0], before) > 1e-3
    assert teacher(idx)[0].equal(before)
    assert bench.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert bench.wilson(0, 20)[0] == 0 and bench.wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-3)


def test_last_loss_is_that_of_one_pass():
    """The loss of a text's end, all before it read in segments, is that of one pass."""
    model, text = tiny(dtype=torch.float32).to(DEVICE), some_ids(2, 40).cpu().numpy()
    with halo.bf16():
        logits = model(torch.from_numpy(text).to(DEVICE))[0][:, :-1].float()
    for n in (10, 38):
        refs = torch.nn.functional.cross_entropy(logits[:, -n:].mT, torch.from_numpy(text[:, -n:]).to(DEVICE),
                                                 reduction="none").mean(1)
        assert bench.last_loss(model, text, n) == pytest.approx(refs.tolist(), rel=5e-3 if GPU else 1e-4)


def test_bench_ablate(results, tmp_path, monkeypatch, capsys):
    """Each change is a run of halo.py with its flags on one teacher, on one of the GPUs; what is there is not
    run again; a run that fails is a line, and no row; what cannot be run at all ends it."""
    calls, seen, broken = [], set(), []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a,b,c")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def run(argv, env, **_):
        o = halo.get_args(argv[2:])
        calls.append(argv)
        seen.add((env["CUDA_VISIBLE_DEVICES"], o.trials))
        if broken:
            raise OSError("Cannot allocate memory")
        if o.kl == "reverse":
            return types.SimpleNamespace(returncode=2, stderr="halo.py: no luck\n")
        recall, four = {"256": 1.0, "4096": 0.5, "16384": 0.25}, {"256": 0.75, "4096": 0.0}
        whole = dict(layers="LA", seconds=60, val_loss=dict(teacher=1.0, student=1.0 + 0.1 * o.seed),
                     passkey=dict(student=recall), **dict(multikey=dict(student=four)) if o.seed else {})
        scratch = dict(layers="LA", seconds=60, val_loss=1.5, passkey=recall, multikey=four)
        with open(os.path.join(o.out, "report.json"), "w") as f:
            json.dump(scratch if o.pretrain else whole, f)
        with open(os.path.join(o.out, "run.json"), "w") as f:
            json.dump(dict(done={} if o.pretrain else dict(scores=[[dict(R=-1.0)], -1.0])), f)
        return types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(bench.subprocess, "run", run)
    command = "ablate --device cpu --seeds 2 --budget 0.5 --jobs 2 --trials 7"
    bench.main(command.split())
    rows = {(r["change"], r["seed"]): r for r in bench_rows(results, "ablate")}
    assert rows.keys() == {(name, 0) for name in bench.ABLATIONS if name != "KL reversed"} | {
        (name, 1) for name in bench.SEEDED}
    assert rows["paper", 0]["scores"][0] == [dict(R=-1.0)]
    assert not rows["from scratch, all tokens", 0]["scores"] and seen == {("a", 7), ("b", 7)}
    assert rows["paper", 1]["gap"] == pytest.approx(0.1) and rows["paper", 0]["at_16x"] == 0.5
    assert rows["from scratch, all tokens", 0]["gap"] == pytest.approx(0.5)
    fours = [[row[f"four_{n}x"] for n in (1, 16, 64)] for row in (
        rows["from scratch, all tokens", 0], rows["paper", 1], rows["paper", 0])]
    assert fours == [[0.75, 0.0, None], [0.75, 0.0, None], [None, None, None]]
    assert "KL reversed, seed 0: failed: halo.py: no luck" in capsys.readouterr().out
    calls.clear()
    bench.main(command.split())
    assert len(calls) == 1 and "reverse" in calls[0]
    made = tmp_path / "teacher"                                             # another teacher of that name
    made.mkdir()
    (made / "model.safetensors").touch()
    (made / "report.json").write_text(json.dumps(dict(val_loss=1.25)))
    monkeypatch.setattr(bench.halo, "teacher_path", lambda name: str(made))
    path = results / "ablate.json"
    file = json.loads(path.read_text())
    same = next(r for r in file["rows"] if r["change"] == "1 attention layer")
    same["teacher_loss"] = 1.25004                                          # measured by another run
    path.write_text(json.dumps(file))
    bench.main([*command.split(), "--only", "paper", "from scratch, all tokens"])
    rows = {(r["change"], r["seed"]): r["teacher_loss"] for r in bench_rows(results, "ablate")}
    assert rows == {("1 attention layer", 0): 1.25004, ("paper", 0): 1.0, ("paper", 1): 1.0,
                    ("from scratch, all tokens", 0): 1.25} and len(calls) == 4
    broken.append(True)
    with pytest.raises(SystemExit) as stop:
        bench.main(["ablate", "--device", "cpu"])
    assert stop.value.code == 2 and "Cannot allocate memory" in capsys.readouterr().err
    choices = bench.draws(8, 2)
    assert len(set(choices)) == 28 and {s.count("A") for s in choices} == {2}


def test_bench_train(results, monkeypatch):
    """A row a stage, of true length, with utilisation of the peak that is given and the plan's hours."""
    plans = {name: halo.replace(halo.PLANS["tiny"][name], length=n, batch=4) for name, n in
             (("align", 16), ("distil", 32), ("finetune", 48))}
    monkeypatch.setitem(halo.PLANS, "tiny", plans)
    bench.main("train --device cpu --peak 1e12 --seconds 1e-3".split())
    rows = bench_rows(results, "train-cpu")
    assert [(r["stage"], r["length"], r["plan_batch"]) for r in rows] == [
        ("align", 16, 4), ("distil", 32, 4), ("finetune", 48, 4)]
    for r in rows:
        assert r["tok_s"] == pytest.approx(r["batch"] * r["length"] / r["seconds"]) and r["batch"] <= 4
        assert r["hours"] == pytest.approx(r["tokens"] / r["tok_s"] / 3600) and r["peak_gb"] > 0
        assert r["used"] == pytest.approx(r["operations"] * r["tok_s"] / 1e12) and 0 < r["used"] < 1
    bench.main("train --device cpu --peak 1e12 --seconds 1e-3 --stage distil --name one".split())
    assert [r["stage"] for r in bench_rows(results, "one")] == ["distil"]


def test_bench_kernel(results, monkeypatch):
    """Rows of every kind of decay, errors small; attention beside the constant one."""
    monkeypatch.setattr(bench, "CPU_SCANS", [(1, 128, 4, 16, 16)])
    bench.main("kernel --device cpu".split())
    rows = bench_rows(results, "kernel-cpu")
    assert {(r["decay"], r["by"]) for r in rows} >= {
        ("constant", "ours"), ("constant", "sdpa"), ("head", "ours"), ("channel", "ours")}
    for r in rows:
        assert 0 < r["forward"] and 0 < r["both"]
        assert r["by"] != "ours" or max(r[x] for x in ("o", "dq", "dk", "dv")) < 5e-3


def test_bench_when(results, capsys):
    """The hybrid wins from where the curves cross, straight in log-log; limits are kept; past what was
    measured, and without rows, one line and status 2."""
    def row(kind, context, ms, gb):
        return dict(size="2b", kind=kind, batch=1, context=context, ms=ms, peak_gb=ms and gb, need_gb=gb)
    rows = [row("hybrid", 1000, 2.0, 4), row("hybrid", 100000, 2.0, 4), row("hybrid", 200000, 3.0, 5),
            row("teacher", 1000, 1.0, 2), row("teacher", 100000, 4.0, 32), row("teacher", 200000, None, 64)]
    bench.write_json(str(results / "decode-x.json"), dict(device="X", rows=rows))

    def when(*given):
        bench.main(["when", *given])
        return capsys.readouterr().out
    out = when("--ctx", "10000")                         # ms 2 and 2 there, GB 4 and 8
    assert "hybrid   2.00 ms, 4 GB" in out and "teacher  2.00 ms, 8 GB" in out
    assert "in time the hybrid wins from about 10,000 tokens" in out
    assert "in memory the hybrid wins from about 3,200 tokens" in out      # 1000 * 100^(1/4)
    assert "use the teacher: the hybrid takes 2.00 of the time and 2.00 of the memory" in when("--ctx", "50")
    assert "use the hybrid: the hybrid takes 0.50 of the time and 0.12" in when("--ctx", "100000")
    assert "use the hybrid: it alone" in when("--ctx", "150000")
    assert "lack of memory" in when("--ctx", "150000")
    assert "use the hybrid: it alone is known to keep within 3 ms" in when("--ctx", "100000", "--ms", "3")
    assert "use the teacher: it alone" in when("--ctx", "1000", "--gb", "3")
    assert "use neither: both exceed 0.1 ms and 1 GB" in when("--ctx", "1000", "--ms", "0.1", "--gb", "1")
    assert "from 1,000 tokens on, the shortest measured" in bench_wins(capsys, results, rows, hybrid=0.5)
    assert "in time the hybrid wins at no context up to 200,000" in bench_wins(capsys, results, rows[:2] + [
        row("hybrid", 200000, 9.0, 5), *rows[3:5], row("teacher", 200000, 8.0, 64)])
    for given, word in (("--ctx 200001", "200000"), ("--ctx 10 --size 14b", "decode --size 14b"),
                        ("--ctx 10 --name nothing", "nothing")):
        with pytest.raises(SystemExit) as stop:
            when(*given.split())
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1 and word in line


def bench_wins(capsys, folder, rows, hybrid=None):
    rows = [dict(r, ms=hybrid) if hybrid and r["kind"] == "hybrid" else r for r in rows]
    bench.write_json(str(folder / "decode-x.json"), dict(device="X", rows=rows))
    bench.main(["when", "--ctx", "1000"])
    return capsys.readouterr().out


def test_bench_wins_where_the_teacher_does_not_fit():
    """Where the teacher is faster until it no longer fits, the hybrid wins from there; lost again: not."""
    assert bench.wins_from([1, 10, 100], [2, 3, 4], [1, 2, INF]) == 100
    assert bench.wins_from([1, 10, 100], [2, 1, 4], [3, 2, 3]) is None
    assert bench.at([10, 1000], [1, INF], 100) == INF == bench.at([10, 100, 1000], [1, INF, INF], 500)


@pytest.mark.parametrize("given, word", [
    ("", "required"), ("draw", "draw"), ("decode --size 7b", "7b"), ("decode --ctx 0", "--ctx"),
    ("decode --batch x", "--batch"), ("prefill --kind mamba", "mamba"), ("when", "--ctx"),
    ("when --ctx 9 --ms -1", "--ms"), ("train --device tpu", "tpu"), ("kernel --device meta", "meta"),
    ("figure --name none", "none"),
    ("decode --size tiny --ctx 4000 --kind article", "2,048 that this model's chunks")])
def test_bench_errors_are_one_line(given, word, results, capsys):
    """Bad input of bench.py ends with status 2 and one line that names it."""
    with pytest.raises(SystemExit) as stop:
        bench.main(given.split())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and word in line and line.startswith("bench.py")


def test_bench_refuses_a_file_of_another_kind(results, capsys):
    """A file in results/ that no table has written is never written over."""
    (results / "decode-cpu.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        bench.main("decode --device cpu --kind hybrid --ctx 64".split())
    assert stop.value.code == 2 and "decode-cpu.json" in capsys.readouterr().err
    assert (results / "decode-cpu.json").read_text(encoding="utf-8") == "[1]"


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """Output into "head" ends quietly."""
    script = "import hypenet; hypenet.command_line('x', lambda _: [print(9 ** 999) for _ in range(9999)], [])"
    with subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 141


# ---- the README tells the truth ----------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_readme_commands_exist():
    """Every command the README shows parses; every flag and file it names exists."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    commands = re.findall(r"python (halo|sample|bench)\.py([^\n&#]*)", blocks)
    assert len(commands) >= 10
    for script, rest in commands:
        dict(halo=halo, sample=sample, bench=bench)[script].get_args(shlex.split(rest))
    known = set()
    for module, *mode in [(halo,), (sample,), *((bench, mode) for mode in bench.MODES)]:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
            module.get_args([*mode, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", text.getvalue()))
    assert set(re.findall(r"`(--[a-z][a-z-]*)", README)) <= known
    for name in re.findall(r"`((?:results/|assets/)?[\w-]*\.?(?:py|json|log)?)`", README):
        if name.endswith((".py", "/")) or name.startswith(("results/", "assets/")):
            assert (HERE / name).exists(), name


def test_readme_decode_times_are_those_of_results():
    """Every ms, ratio to the floor and GB in the README's table of decoding is a row of the file it names."""
    rows = bench_rows(HERE / "results", "decode-h200")
    known = {(r["kind"], r["context"]): f"{r['ms']:.2f} ({r['ratio']:.2f}) {r['peak_gb']:.1f}"
             for r in rows if r["size"] == "2b" and r["batch"] == 1}
    table = re.findall(r"^\| ([\d,]+) \| (\S+ \(.*?) \| (.*?) \| (\S+) \| (.*?) \|$", README, re.M)
    assert len(table) == 5
    for context, hybrid, teacher, gain, article in table:
        cells = [known[kind, int(context.replace(",", ""))] for kind in ("hybrid", "teacher", "article")]
        assert [hybrid, teacher, article] == cells
        assert float(teacher.split()[0]) / float(hybrid.split()[0]) == pytest.approx(float(gain), abs=0.015)


def test_readme_recall_is_that_of_results():
    """What the README's first screen says of the figure is what the file behind it holds."""
    rows = bench_rows(HERE / "results", "niah-tiny")
    value = {(r["model"], r["task"], r["context"]): r["value"] for r in rows}
    found = {model: [v for (m, task, n), v in value.items() if (m, task) == (model, "S1") and n > 256]
             for model in ("student", "teacher", "teacher, YaRN")}
    assert set(found["student"]) == {1.0} and set(found["teacher"] + found["teacher, YaRN"]) == {0.0}
    assert not any(v for (model, task, _), v in value.items() if task in ("S2", "S3", "multi-key"))
    worse = {m: value[m, "loss", 16384] - value[m, "loss", 256] for m in ("student", "teacher")}
    text = " ".join(README.split())
    assert f"{worse['student']:.2f} nats worse than at 256, its teacher {worse['teacher']:.1f}" in text
    assert value["student", "loss", 1024] < value["student", "loss", 512] < value["student", "loss", 256]


def test_readme_kernel_times_are_those_of_results():
    """Every row in the README's table of scans is what the file it names holds."""
    rows = bench_rows(HERE / "results", "kernel-h200")
    known = {(", ".join(map(str, r["shape"])), r["decay"], r["by"]): r for r in rows}
    table = re.findall(r"^\| (\d+(?:, \d+){4}) \| (\w+) \| (.*) \|$", README, re.M)
    assert len(table) == 8
    for shape, decay, cells in table:
        ours, fla, sdpa = (known.get((shape, decay, by)) for by in ("ours", "fla", "sdpa"))
        times = [f"{r['forward']:.3f} / {r['both']:.3f}" if r else "" for r in (ours, fla, sdpa)]
        ratios = " / ".join(f"{ours[key] / fla[key]:.2f}" for key in ("forward", "both"))
        assert cells.split(" | ") == [*times[:2], ratios, times[2], f"{ours['floor']:.3f}",
                                      f"{ours['gb']:.2f} / {fla['gb']:.2f}"], (shape, decay)


def test_readme_ablations_are_those_of_results():
    """The README's table of single changes is what two files hold, of the mini and of the tiny teacher, flags
    and all, and every run that bench.py makes of the mini one is there."""
    rows = {scale: bench_rows(HERE / "results", name)
            for scale, name in dict(mini="ablate", tiny="ablate-tiny").items()}
    titles = {"paper": "**none: the paper's recipe**", "article": "**the article's recipe**"}

    def cells(mine, tasks):
        yield ", ".join(f"{r['gap']:.4f}" for r in mine)
        for task in tasks:
            known = [[r.get(f"{task}_{n}x") for n in (1, 16, 64)] for r in mine]
            yield ", ".join(dict.fromkeys(" / ".join(f"{x:.0%}" for x in row)
                                          for row in known if None not in row))
    for change, flags in bench.ABLATIONS.items():
        mini, tiny = (sorted((r for r in rows[scale] if r["change"] == change), key=lambda r: r["seed"])
                      for scale in ("mini", "tiny"))
        assert all(r["flags"] == flags for r in mini + tiny)
        assert [r["seed"] for r in mini] == list(range(3 if change in bench.SEEDED else 1))
        title = titles.get(change, change if "{" in flags else f"{change} (`{flags}`)")
        row = [*cells(mini, ("at", "four")), *cells(tiny, ("at",))]
        assert re.search(rf"^\| {re.escape(title)} \| *" + r" *\| *".join(map(re.escape, row)) + r" *\|$",
                         README, re.M), title
    assert all({r["teacher"] for r in rows[scale]} == {scale} for scale in rows)


def test_readme_on_single_changes():
    """The sentences by that table: how many runs, seeds of eq. 8, scores of layers, decays by data."""
    rows, text = bench_rows(HERE / "results", "ablate"), " ".join(README.split())

    def seeds(change):
        return sorted((r for r in rows if r["change"] == change), key=lambda r: r["seed"])
    minutes, log = sorted(r["minutes"] for r in rows), (HERE / "results" / "ablate.log").read_text()
    whole = int(re.search(r"(\d+) s\n", log)[1]) / 60
    assert (f"all {len(rows)} in {whole:.1f} minutes, {minutes[0]:.1f} to {minutes[-2]:.1f} minutes each, "
            f"{minutes[-1]:.1f} from scratch") in text
    six = sorted(r["gap"] for name in ("paper", "layers by eq. 8, guarded") for r in seeds(name))
    assert f"these six runs span {six[0]:.4f} to {six[-1]:.4f}" in text
    assert ", ".join(f"{r['gap']:.4f}" for r in seeds("layers by eq. 8")) + ", everything found" in text
    for layer in (1, 4, 7, 5, 6):
        scores = dict.fromkeys(f"{r['scores'][0][layer]['score']:.3f}" for r in seeds("paper"))
        assert f"layer {layer} {', '.join(scores)}" in text
    gaps = [f"{r['val_loss']['student'] - r['val_loss']['teacher']:.4f}"
            for r in json.loads((HERE / "results" / "tiny-decay.json").read_text())]
    assert f"with seed 1, {gaps[1]}, where the recipe has 0.0479 and {gaps[0]}" in text
    by_head, by_channel = (seeds(f"decay by data, a {what}")[0]["gap"] for what in ("head", "channel"))
    assert f"{by_head:.4f} and {by_channel:.4f}, by 0.006 (mini" in text


def test_readme_small_and_gpt2_results():
    """The table of the small student and the line on GPT-2's positions are what their files hold."""
    rows, gpt2 = (bench_rows(HERE / "results", f"niah-{name}")
                  for name in ("small", "small-gpt2"))
    names = {"student": "student", "student without s_t": "student without s_t", "teacher": "teacher",
             "teacher, YaRN": "teacher, YaRN for each length",
             "teacher, sink + window": "teacher, first 4 tokens and the last 1,020"}
    asked = [(rows, model, "S1", name) for model, name in names.items()]
    asked.append((gpt2, "student", "S1", "student of a teacher of GPT-2's kind"))
    for task, title in {"S2": ", another wording, in prose", "multi-key": ", one of four",
                        "S3": ", 32 hexadecimal digits"}.items():
        asked += [(rows, "student", task, f"{task}{title}: student"),
                  (rows, "teacher", task, f"{task}: teacher"),
                  (rows, "teacher, YaRN", task, f"{task}: teacher, YaRN"),
                  (gpt2, "student", task, f"{task}: student of GPT-2's kind")]
    for file, model, task, name in asked:
        hits = [f"{r['value']:.0%}" for r in file if (r["model"], r["task"]) == (model, task)]
        assert len(hits) >= 3 and "| ".join([f"| {name} ", *(f"{hit} " for hit in hits)]) in README, name
    text = " ".join(README.split())
    for name, start in (("small", "student's held-out loss is"), ("small-gpt2", "of GPT-2's kind")):
        log = (HERE / "results" / f"{name}-paper.log").read_text(encoding="utf-8")
        teacher, student = re.search(r"held-out loss, nats a token +(\S+) +(\S+)", log).groups()
        whose = "the teacher's " * (name == "small")
        assert f"{start} {student} against {whose}{teacher}" in text
    log = (HERE / "results" / "small-paper.log").read_text(encoding="utf-8")
    seconds = [int(re.search(rf"^# python {program}.*: (\d+) s", log, re.M)[1])
               for program in ("halo.py", "bench.py niah")]
    assert "in {:.1f} minutes ({} and {} s) on one".format(sum(seconds) / 60, *seconds) in text
    runs = json.loads((HERE / "results" / "tiny-gpt2.json").read_text(encoding="utf-8"))
    for how, first in (("at once loss", 0), ("faded", 2)):
        one, two = (r["passkey"]["student"] for r in runs[first:first + 2])
        losses = " and ".join(f"{r['val_loss']['student']:.4f}" for r in runs[first:first + 2])
        middle = ", pass keys in 4,096 tokens" if first == 0 else ","
        end = ", in 16,384" if first == 0 else ","
        assert (f"{how} {losses}{middle} {one['4096']:.0%} and {two['4096']:.0%}{end} {one['16384']:.0%} and "
                f"{two['16384']:.0%}") in text


@pytest.mark.parametrize("recipe", ["paper", "article"])
def test_readme_numbers_are_those_of_results(recipe):
    """Losses, recall, tokens and minutes in the README are those of the reports under results/; the student
    that ships is the one the paper's report speaks of."""
    r = json.loads((HERE / "results" / f"tiny-{recipe}.json").read_text(encoding="utf-8"))
    recall = " / ".join(f"{r['passkey']['student'][n]:.0%}" for n in ("256", "1024", "4096", "16384"))
    for value in (f"{r['val_loss']['student']:.4f}", f"{r['val_loss']['teacher']:.4f}", recall,
                  f"{r['tokens']:,}", f"{r['seconds'] / 60:.1f}", f"{r['params']['student']:,}"):
        assert value in README, value
    if recipe == "paper":
        assert json.loads((HERE / "assets" / "tiny-student" / "report.json").read_text(encoding="utf-8")) == r
        config = HypeNet.from_pretrained(HERE / "assets" / "tiny-student").config
        assert (config.layers, config.logit_base) == (r["layers"], r["logit_base"])
