"""Laws of kernel.py, hypenet.py and halo.py: what each must satisfy, whatever its weights. Every test compares
values with a definition, with another way to compute the same, or with what was there before. Needs no network and
no GPU; Triton's kernels run on the GPU where there is one, else in Triton's interpreter."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import random
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"    # read when triton is first imported

import halo  # noqa: E402
import hypenet  # noqa: E402
import kernel  # noqa: E402
from hypenet import FAMILIES, HypeNet, HypeNetConfig, Tokenizer  # noqa: E402

torch.set_num_threads(1)                    # the tensors are tiny
DEVICE = "cuda" if GPU else "cpu"
INF = float("inf")
SHAPES = ("head", "step", "channel")        # log_decay (H,), (B,T,H), (B,T,H,K)
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="triton is not installed")
FAST = ["torch", pytest.param("triton", marks=needs_triton)]


def rmse(out, ref):
    """RMSE(ref - out) / RMSE(ref) in float64; inf and NaN fail any limit."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, (out.shape, ref.shape)
    return ((out - ref).norm() / ref.norm().clamp_min(1e-30)).item()


@contextlib.contextmanager
def one_line(*words, error=ValueError):
    """The block must raise a ValueError of one line that holds these words."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---- the scan: inputs and one way to run it ----------------------------------------------------------------


def inputs(shape, T, B=2, H=3, K=24, V=40, dtype=torch.float64, seed=0):
    """q, k, v, log_decay, state, all random, with decays of every strength."""
    rng = torch.Generator().manual_seed(seed)
    def draw(*size):
        return torch.randn(*size, generator=rng, dtype=torch.float64)
    size = {"head": (H,), "step": (B, T, H), "channel": (B, T, H, K)}[shape]
    log_decay = -draw(*size).abs() * torch.rand(size, generator=rng, dtype=torch.float64)
    tensors = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), log_decay, draw(B, H, K, V)
    return [x.to(DEVICE, dtype) for x in tensors]


def upstream(o, state):
    """A fixed random gradient for each."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, state)]


def scan(tensors, backend, grads=True, dtype=None):
    """o, the final state, and the gradients of a fixed random function of both, in the given dtype."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_(grads) for x in tensors]
    o, state = kernel.chunked_scan(*tensors, scale=0.3, backend=backend)
    return [o, state, *(torch.autograd.grad((o, state), tensors, upstream(o, state)) if grads else ())]


def assert_equal(outs, refs, limit):
    for name, out, ref in zip(("o", "state", "dq", "dk", "dv", "dlog_decay", "dstate"), outs, refs):
        assert rmse(out, ref) <= limit, f"{name}: {rmse(out, ref):.1e}, allowed {limit:.0e}"


# ---- the scan: chunked equals sequential -------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 31, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_sequential(shape, T):
    """Chunks of matrix products equal the recurrence, forward and gradients, at any length, in float64."""
    tensors = inputs(shape, T)
    assert_equal(scan(tensors, "torch"), scan(tensors, "sequential"), 1e-13)


@needs_triton
@pytest.mark.parametrize("T, K, V", [(1, 16, 16), (63, 24, 40), (64, 32, 16), (65, 24, 72), (130, 24, 40)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_sequential(shape, T, K, V):
    """The kernels equal the recurrence, forward and every gradient, to the digits of float32."""
    tensors = inputs(shape, T, 2, 1, K, V, torch.float32)
    assert_equal(scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64), 3e-6)


@needs_triton
@pytest.mark.parametrize("shape, K", [("head", 144), ("channel", 72)])
def test_triton_wide_heads(shape, K):
    """Wide keys and V of several blocks are equal too."""
    tensors = inputs(shape, 40, 1, 1, K, 72, torch.float32)
    assert_equal(scan(tensors, "triton"), scan(tensors, "sequential", dtype=torch.float64), 3e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_do_not_matter(shape, backend):
    """Views with any strides give what their contiguous copies give, gradients too."""
    tensors = inputs(shape, 34, 2, 2, dtype=torch.float32)
    views = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in tensors]     # batch last in memory
    wide = torch.cat(tensors[:3], -1).split([24, 24, 40], -1)                   # q, k, v of one fused projection
    refs = scan(tensors, backend)
    assert not views[0].is_contiguous() and not wide[0].is_contiguous()
    for others in (views, [*wide, *views[3:]]):
        leaves = [x.detach().requires_grad_() for x in others]
        assert [x.stride() for x in leaves] == [x.stride() for x in others]
        assert_equal(scan(others, backend), refs, 1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_inputs(shape, backend):
    """bf16 inputs give bf16 outputs and a float32 state, near float64's on the same numbers."""
    q, k, v, log_decay, state = inputs(shape, 70, 1, 2, dtype=torch.float32)
    tensors = [x.bfloat16() for x in (q, k, v)] + [log_decay, state]
    outs, refs = scan(tensors, backend), scan(tensors, "sequential", dtype=torch.float64)
    assert [x.dtype for x in outs[:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    rounds = GPU and backend == "triton"    # its matrix units multiply bf16; all else is float32 inside
    assert_equal(outs, refs, 4e-2 if rounds else 2e-2)
    assert rmse(outs[1], refs[1]) <= (5e-3 if rounds else 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_does_not_round(shape):
    """Autocast leaves the scan as it is: float32 stays float32."""
    tensors = inputs(shape, 70, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = scan(tensors, "torch", grads=False)
    assert_equal(outs, scan(tensors, "sequential", grads=False), 1e-6)


# ---- the scan: extremes, the state passed on ---------------------------------------------------------------


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
    T = 2_000 if backend == "triton" and not GPU else 100_000
    q, k, v, log_decay, state = inputs(shape, T, 1, 1, 16, 4, torch.float32)
    outs = scan([q, k, v, 0 * log_decay, state], backend, grads=False)
    writes = k[0, :, 0, :, None].double() * v[0, :, 0, None, :].double()
    states = state[0, 0].double() + writes.cumsum(0)                        # (T,K,V)
    o = 0.3 * torch.einsum("tk,tkv->tv", q[0, :, 0].double(), states)
    assert_equal(outs, [o[None, :, None], states[None, None, -1]], 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [*FAST, None])
def test_split_anywhere(backend, shape):
    """A sequence cut in pieces, the state passed on, equals one call, gradients through the cuts too."""
    tensors = inputs(shape, 70, 1, 1, dtype=torch.float32)
    q, k, v, log_decay, state = leaves = [x.requires_grad_() for x in tensors]
    outputs = []
    for start, end in ((0, 1), (1, 34), (34, 69), (69, 70)):
        parts = [x if x.dim() == 1 else x[:, start:end] for x in (q, k, v, log_decay)]
        o, state = kernel.chunked_scan(*parts, state, 0.3, backend)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    outs = [o, state, *torch.autograd.grad((o, state), leaves, upstream(o, state))]
    assert_equal(outs, scan(tensors, "sequential", dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("backend", ["sequential", *FAST])
def test_state_is_not_written_to(backend):
    """The state given is left as it was, and None is a state of zeros."""
    q, k, v, log_decay, state = inputs("step", 5, 1, 1, dtype=torch.float32)
    before = state.clone()
    kernel.chunked_scan(q, k, v, log_decay, state, backend=backend)
    assert state.equal(before)
    zeros = kernel.chunked_scan(q, k, v, log_decay, 0 * state, backend=backend)
    assert all(a.equal(b) for a, b in zip(kernel.chunked_scan(q, k, v, log_decay, backend=backend), zeros))


# ---- the scan: backends and bad input ----------------------------------------------------------------------


def test_backend_is_chosen_by_device(monkeypatch):
    """None is one step of the definition at T = 1, else the fast form of the device."""
    calls = []
    for name in ("scan_sequential", "scan_torch"):
        plain = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, name=name, plain=plain: calls.append(name) or plain(*a))
    for T in (1, 2):
        kernel.chunked_scan(*(x.cpu() for x in inputs("head", T)))
    assert calls == ["scan_sequential", "scan_torch"]


@pytest.mark.parametrize("changes, message", [
    (dict(k=(2, 5, 3, 7)), "q, k: given"),
    (dict(q=(2, 5, 8), k=(2, 5, 8)), "q, k: given"),
    (dict(q=(2, 0, 3, 8), k=(2, 0, 3, 8)), "T >= 1"),
    (dict(v=(2, 6, 3, 4)), "v: given"),
    (dict(log_decay=(4,)), "log_decay: given"),
    (dict(log_decay=(2, 5, 3, 4)), "log_decay: given"),
    (dict(state=(2, 3, 4, 8)), "state: given"),
    (dict(backend="cuda"), "backend: given 'cuda'"),
    (dict(dtype=torch.int64), "dtypes: given"),
])
def test_bad_scan_input_is_one_line(changes, message):
    """Bad shapes, dtypes and backends raise one line that says what was given and what is allowed."""
    sizes = dict(q=(2, 5, 3, 8), k=(2, 5, 3, 8), v=(2, 5, 3, 4), log_decay=(3,), state=(2, 3, 8, 4))
    sizes |= {name: size for name, size in changes.items() if name in sizes}
    args = {name: torch.zeros(size, dtype=changes.get("dtype")) for name, size in sizes.items()}
    with one_line(message, "allowed"):
        kernel.chunked_scan(**args, backend=changes.get("backend"))


def test_triton_says_what_it_cannot():
    """backend="triton" without Triton, on float64 or on too wide keys raises one line."""
    for shape, K, dtype in (("head", 8, torch.float64), ("head", 257, torch.float32), ("channel", 129, torch.float32)):
        with one_line("given 'triton', but"):
            kernel.chunked_scan(*inputs(shape, 3, K=K, dtype=dtype), backend="triton")


def test_kernel_needs_no_triton(monkeypatch):
    """kernel.py imports and runs where there is no triton; asking for it is one line."""
    monkeypatch.setitem(sys.modules, "triton", None)                        # import triton now fails
    spec = importlib.util.spec_from_file_location("kernel_alone", kernel.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    tensors = inputs("channel", 9)
    assert_equal(alone.chunked_scan(*tensors), kernel.chunked_scan(*tensors, backend="sequential"), 1e-13)
    with one_line("not installed"):
        alone.chunked_scan(*tensors, backend="triton")


# ---- the model: tiny random ones of every kind -------------------------------------------------------------

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GPT2 = dict(FAMILIES["gpt2"], n_kv_head=4)
HYPE = dict(attn_pe=0.0, attn_gate=True, logit_base=20.0)
PLAIN = dict(linear_norm=False, linear_gate=False, linear_qk_norm=False)
VARIANTS = {
    "teacher": dict(layers="AAA"),
    "teacher llama3": dict(layers="AAA", rope_scaling=LLAMA3, tied=False, qk_norm=False, bias=True, n_kv_head=1),
    "teacher gpt2": dict(layers="AAA", **GPT2),
    "hype": HYPE,
    "hype no decay": dict(HYPE, decay="none", linear_kv_head=1),
    "hype decay per head": dict(HYPE, decay="head", linear_norm=False),
    "hype decay per channel": dict(HYPE, decay="channel", linear_kv_head=2),
    "hype half keys": dict(HYPE, key_dim=4, linear_gate=False, qk_norm=False),
    "hype gpt2": dict(GPT2, **HYPE),
    "rope fading": dict(HYPE, attn_pe=0.3),
    "wpe fading": dict(GPT2, attn_pe=0.3),
    "all linear": dict(PLAIN, layers="LLL", linear_rope=False),
    "window": dict(HYPE, window=7),
    "window of one": dict(window=1),
    "window wider than the text": dict(window=100),
    "article": dict(PLAIN, decay="channel", key_dim=4, linear_rope=False, chunk=8, n_chunks=6, window=11),
    "article no window": dict(PLAIN, decay="channel", linear_rope=False, chunk=16, n_chunks=3, attn_gate=True),
    "article gpt2": dict(GPT2, **PLAIN, decay="channel", key_dim=4, linear_rope=False, chunk=8, n_chunks=6, window=11),
}
T = 45
every_variant = pytest.mark.parametrize("name", VARIANTS)


def tiny(seed=0, dtype=torch.float64, **changes):
    """A random model, none of whose norms, gates, biases and embeddings is neutral."""
    sizes = dict(layers="LALA", vocab_size=61, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, n_hidden=40, max_len=48)
    torch.manual_seed(seed)
    model = HypeNet(HypeNetConfig(**sizes | changes)).to(dtype).eval().requires_grad_(False)
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


# ---- the model: its layers are their formulas --------------------------------------------------------------


def test_attention_layer_is_its_formula():
    """o_t = sigmoid(z_t) * sum_j softmax_j(s_t q_t . k_j / sqrt(D)) v_j over the window, s_t = log(t + a) / log(a),
    t from 0; q, k = RoPE(position mod chunk) + e[position div chunk], a grouped k taking its first head's e."""
    model = tiny(layers="A", chunk=8, n_chunks=6, logit_base=20.0, attn_gate=True, window=11)
    attn, x, pos = model.blocks[0].mixer, torch.randn(T, 32, dtype=torch.float64), torch.arange(T)
    q, k, v, z = (x @ attn.qkvz.weight.T).split([32, 16, 16, 32], 1)
    e = attn.chunk_embd.weight[pos // 8].split(8, 1)
    o = []
    for h in range(4):
        group = slice(h // 2 * 8, h // 2 * 8 + 8)
        q_h = rope_by_hand(norm_by_hand(q[:, 8 * h:8 * h + 8], attn.q_norm), pos % 8) + e[h]
        k_h = rope_by_hand(norm_by_hand(k[:, group], attn.k_norm), pos % 8) + e[h // 2 * 2]
        s = torch.log(pos + 20.0) / math.log(20.0)
        scores = (s[:, None] * q_h @ k_h.T) / math.sqrt(8)
        outside = (pos[None] > pos[:, None]) | (pos[None] <= pos[:, None] - 11)
        o.append(scores.masked_fill(outside, -INF).softmax(-1) @ v[:, group])
    y = (torch.cat(o, 1) * torch.sigmoid(z)) @ attn.out.weight.T
    assert rmse(attn(x[None], hypenet.locate(model.config, pos[None]))[0], y) < 1e-6


def test_linear_layer_is_its_formula():
    """S_t = diag(f_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(K), y = (norm(o) * sigmoid(z)) W_o, one norm over
    all heads; q, k = RoPE(QK-norm(q, k)), f_t = sigmoid(x W_f + b), two heads sharing one k and v."""
    model = tiny(layers="L", decay="channel", key_dim=4, linear_kv_head=2)
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
    y = (norm_by_hand(o, mixer.norm) * torch.sigmoid(z)) @ mixer.out.weight.T
    assert rmse(mixer(x[None], hypenet.locate(model.config, pos[None]))[0], y) < 1e-6


def test_constant_decay_is_equation_19():
    """gamma_h = exp(-2^(-8h/H)), h = 1 .. H: for 32 heads from 0.4313237 to 0.9961014; decay "none" is 1."""
    gamma = tiny(n_head=32, n_kv_head=4).blocks[0].mixer.log_decay(torch.zeros(1)).exp().tolist()
    assert gamma == pytest.approx([math.exp(-2 ** (-8 * h / 32)) for h in range(1, 33)], rel=1e-6)
    assert [gamma[0], gamma[-1]] == pytest.approx([0.4313237, 0.9961014], abs=1e-7)
    assert tiny(decay="none").blocks[0].mixer.log_decay(torch.zeros(1)).tolist() == [0.0] * 4


def test_llama3_slows_long_wavelengths():
    """Angles of wavelengths under original / high stay, over original / low are divided by factor, between blend."""
    angles = hypenet.rope_frequencies(HypeNetConfig(rope_scaling=LLAMA3), 16).tolist()
    for i, angle in enumerate(angles):
        plain = 10000.0 ** (-2 * i / 16)
        wavelength = 2 * math.pi / plain
        smooth = min(1, max(0, (64 / wavelength - 1) / (4 - 1)))
        assert angle == pytest.approx(smooth * plain + (1 - smooth) * plain / 8, rel=1e-5)
    assert 10000.0 ** (-2 / 16) / 8 < angles[1] < 10000.0 ** (-2 / 16)      # one that is blended


def test_rope_sees_only_distances():
    """RoPE's scores depend on distances alone: a text moved by 5,000 positions gives the same logits."""
    idx, far = some_ids(2, T), torch.tensor([5000, 0])
    model = tiny()
    assert rmse(model(idx, offset=far)[0], model(idx)[0]) < 1e-3
    assert rmse(tiny(logit_base=20.0)(idx, offset=far)[0], tiny(logit_base=20.0)(idx)[0]) > 1e-2


def test_half_precision_keeps_positions_and_state():
    """After .to(bfloat16), RoPE at position 100,000 is as exact as at 0, and S still adds up in float32."""
    idx, far = some_ids(1, T), torch.tensor([100_000])
    exact, half = tiny(dtype=torch.float32, layers="LA"), tiny(dtype=torch.float32, layers="LA").to(torch.bfloat16)
    cos, sin = hypenet.locate(half.config, far[:, None]).attn_rope
    turn = 100_000 * 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert torch.allclose(cos[0, 0, 0].double(), turn.cos(), atol=0.02)
    assert torch.allclose(sin[0, 0, 0].double(), turn.sin(), atol=0.02)
    assert rmse(half(idx, offset=far)[0], exact(idx, offset=far)[0]) < 0.08
    model = tiny(dtype=torch.float32, layers="L", decay="none").to(torch.bfloat16)
    steps, whole, idx = model.init_state(1, 600), model.init_state(1, 600), some_ids(1, 600)
    model(idx, state=whole)
    for token in idx.split(1, 1):
        model(token, state=steps)
    assert rmse(steps.layers[0]["S"], whole.layers[0]["S"]) < 2e-3
    assert steps.layers[0]["S"].dtype == torch.float32


# ---- the model: any cut of a text, any batch, the same -----------------------------------------------------


@every_variant
def test_one_pass_is_segments_is_single_tokens(name):
    """One pass, segments of odd sizes and token by token give equal logits, for every kind of layer and position."""
    model, idx = tiny(**VARIANTS[name]), some_ids(2, T)
    whole = model(idx)[0]
    for sizes in ([5, 1, 13, 2, 3, 17, 4], [1] * T, [T]):
        state = model.init_state(2, T)
        where = [t.data_ptr() for layer in state.layers for t in layer.values()]
        parts = [model(part, state=state, all_logits=True)[0] for part in idx.split(sizes, 1)]
        assert rmse(torch.cat(parts, 1), whole) < 1e-5
        assert state.pos.tolist() == [T, T]
        assert where == [t.data_ptr() for layer in state.layers for t in layer.values()]    # updated in place


@every_variant
def test_causal(name):
    """Another token at t changes the logits at t, and none before."""
    model, idx = tiny(**VARIANTS[name]), some_ids(1, T)
    whole = model(idx)[0]
    for t in (1, 20, T - 1):
        other = idx.clone()
        other[0, t:] = (other[0, t:] + 1) % 61
        change = (model(other)[0] - whole).abs().amax((0, 2))               # (T,)
        assert change[:t].max() < 1e-9 < 1e-3 < change[t:].min()


@every_variant
def test_batch_is_each_alone(name):
    """Prompts of different lengths in one batch continue as each does alone, and as full passes say (greedy)."""
    model = tiny(dtype=torch.float32, **VARIANTS[name])
    prompts = [some_ids(n, seed=n).tolist() for n in (3, 33, 1, 20)]
    batch = model.generate(prompts, 12, segment=5)
    assert batch == [model.generate([p], 12, segment=64)[0] for p in prompts]
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert ids[len(prompt):] == batch.pop(0)


def test_stop_ids_end_a_row():
    """A row ends before its first stop id; the others go on, and are not changed by it."""
    model, prompts = tiny(dtype=torch.float32), [[1, 2, 3], [4, 5]]
    free = model.generate(prompts, 20)
    stop = next(token for token in free[0] if token not in free[1])
    assert model.generate(prompts, 20, stop=[stop]) == [free[0][:free[0].index(stop)], free[1]]


def test_sampling_options():
    """A seed repeats; top_k = 1 and a small top_p are greedy; ids from n_vocab on are never drawn."""
    model, prompts = tiny(dtype=torch.float32), [[1, 2, 3], [4, 5]]
    def draw(**options):
        return model.generate(prompts, 30, temperature=3.0, **options)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1) == draw(top_p=1e-9) == model.generate(prompts, 30)
    for temperature in (0.0, 3.0):
        rows = model.generate(prompts, 40, temperature=temperature, n_vocab=7, seed=0)
        assert max(map(max, rows)) < 7


@pytest.mark.parametrize("options, weights", [
    (dict(), [1, 2, 3, 4]), (dict(top_k=2), [0, 0, 3, 4]), (dict(top_p=0.65), [0, 0, 3, 4]),
    (dict(top_p=0.75), [0, 2, 3, 4]), (dict(temperature=0.5), [1, 4, 9, 16])])
def test_samples_have_their_probabilities(options, weights):
    """Ids are drawn in proportion to p^(1 / temperature), cut to the top_k, or to the fewest that reach top_p."""
    logits = torch.tensor([1.0, 2, 3, 4]).log().expand(20_000, 4)
    ids = hypenet.sample(logits, **dict(temperature=1.0) | options, rng=torch.Generator().manual_seed(0))
    share = torch.bincount(ids, minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor(weights) / sum(weights), atol=0.015)
    assert (share[torch.tensor(weights) == 0] == 0).all()


def test_state_size():
    """K/V is exactly max_tokens or, with a window, no more than it; S does not depend on either."""
    S = 2 * 3 * 4 * 8 * 8 * 4                               # two rows, three linear layers, (H,K,V) in float32
    for window, tokens, kv in ((None, 100, 100), (None, 9999, 9999), (50, 30, 30), (50, 100, 50), (50, 9999, 50)):
        model = tiny(dtype=torch.bfloat16, layers="LLAL", window=window)
        assert model.init_state(2, tokens).nbytes() == (S, 2 * 2 * kv * 2 * 8 * 2)


# ---- the model: files, bad input, the tokenizer ------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher llama3", "hype", "article", "article gpt2"])
def test_saved_model_is_the_model(name, tmp_path):
    """save_pretrained and from_pretrained give equal logits and config; saved as bf16, the rounded weights."""
    model, idx = tiny(dtype=torch.float32, **VARIANTS[name]), some_ids(1, T)
    model.save_pretrained(tmp_path)
    again = HypeNet.from_pretrained(tmp_path)
    assert again.config == model.config and again(idx)[0].equal(model(idx)[0])
    model.save_pretrained(tmp_path, torch.bfloat16)
    rounded = HypeNet.from_pretrained(tmp_path).state_dict()
    assert all(rounded[name].equal(w.bfloat16().float()) for name, w in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def rewrite(change):
    """A function of a model's folder: change(config) of its config.json."""
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return apply


def reweigh(change):
    """A function of a model's folder: change(weights) of its model.safetensors."""
    def apply(folder):
        from safetensors.torch import load_file, save_file
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
    return apply


def cut(name, size):
    """A function of a folder: the file of this name, cut to its first bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize("harm, word", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (cut("config.json", 40), "config.json"),
    (cut("model.safetensors", 3000), "model.safetensors"),
    (cut("model.safetensors", 0), "model.safetensors"),
    (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    (rewrite(lambda c: c.update(model_type="gpt2")), "model_type"),
    (rewrite(lambda c: c.update(n_ebd=3)), "n_ebd"),
    (rewrite(lambda c: c.update(n_embd="32")), "n_embd"),
    (rewrite(lambda c: c.update(layers="LAXA")), "layers"),
    (rewrite(lambda c: c.update(n_hidden=41)), "blocks.0.mlp"),
    (reweigh(lambda w: w.pop("blocks.1.mixer.out.weight")), "blocks.1.mixer.out.weight is missing"),
    (reweigh(lambda w: w.update(extra=torch.zeros(2))), "extra is unexpected"),
    (reweigh(lambda w: w.update({"norm.weight": torch.zeros(31)})), "norm.weight"),
])
def test_bad_model_files_are_one_line(harm, word, tmp_path):
    """Missing, cut or altered files of a model raise one line that names the file, the tensor or the field."""
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    harm(tmp_path)
    with one_line(word):
        HypeNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [
    dict(layers=""), dict(layers="AB"), dict(layers=7), dict(norm="batch"), dict(mlp="relu"), dict(position="alibi"),
    dict(decay="some"), dict(n_embd=0), dict(n_embd=-4), dict(n_embd="32"), dict(n_embd=32.5), dict(n_kv_head=3),
    dict(linear_kv_head=3), dict(linear_kv_head=-1), dict(key_dim=-8), dict(head_dim=7), dict(key_dim=5),
    dict(logit_base=1.0), dict(logit_base="fit"), dict(window=0), dict(chunk=0, n_chunks=4), dict(chunk=8),
    dict(n_chunks=4), dict(chunk=8, n_chunks=-4), dict(attn_pe=2.0), dict(attn_pe=-0.5), dict(rope_theta=0.0),
    dict(rope_scaling={"factor": 8.0}), dict(position="learned", chunk=512, n_chunks=4),
], ids=str)
def test_bad_config_is_one_line(changes):
    """A value that is not allowed, alone or beside the others, raises one line that names its field."""
    with one_line(list(changes)[-1] if changes.get("chunk") != 0 else "chunk"):
        HypeNetConfig(**changes)


def test_too_many_tokens_are_one_line():
    """Past a state's room, the last chunk or the last learned position there is one line with the numbers."""
    with one_line("6 tokens", "5"):
        model = tiny()
        model(some_ids(1, 6), state=model.init_state(1, 5))
    with one_line("49 tokens", "48"):
        tiny(chunk=16, n_chunks=3)(some_ids(1, 49))
    with one_line("49 tokens", "48"):
        tiny(**VARIANTS["teacher gpt2"])(some_ids(1, 49))
    with one_line("at least one token"):
        tiny().generate([[1], []], 3)


def test_tokenizer_round_trip(tmp_path):
    """Bytes in, the same text out, whatever it is; a lone surrogate becomes U+FFFD; so too when saved and loaded."""
    Tokenizer.bytes().save(tmp_path)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    texts = ["", "def f(x):\n\treturn x\r\n", "混合线性注意力", "👩‍👩‍👧🏽", "\0\ufeff\u2028e\u0301", "x" * 1000, everything]
    for tokenizer in (Tokenizer.bytes(), Tokenizer.load(tmp_path)):
        for text in texts:
            assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
        assert tokenizer.decode([0xE6, 0xB7]) == "\ufffd" and tokenizer.token_bytes(0xE6) == b"\xe6"
    for text in ("{}", '{"type": "words"}', "not JSON"):
        (tmp_path / "tokenizer.json").write_text(text)
        with one_line("tokenizer"):
            Tokenizer.load(tmp_path)
