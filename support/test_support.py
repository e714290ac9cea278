"""Laws of support/, sample.py and bench.py, and of what the README says."""

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


from test_hypenet import (  # noqa: E402,F401
    DEVICE, HERE, INF, T, VARIANTS, a_plan, convert, every_variant, home, needs_triton, one_line, options, rmse, rope_by_hand, runs, some_documents, some_ids, tiny, write_documents)

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
            m.setattr(fast, "has_kernels", lambda x, *sizes, fused=fused: fused)
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
    monkeypatch.setattr(fast, "_card", lambda device: (False, splits * B * G // 4 or 1))
    rng = torch.Generator().manual_seed(0)
    q, k, v, keys, values = (torch.randn(*size, generator=rng).to(DEVICE) for size in (
        (B, 1, H, D), (B, 1, G, D), (B, 1, G, D), (B, S, G, D), (B, S, G, D)))
    pos = torch.tensor([0, S + 5, S - 2][:B])[:, None].to(DEVICE)
    o = fast.attend_cache(q, k, v, keys, values, pos)
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
        m.setattr(fast, "has_kernels", lambda x, *sizes: False)
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
        monkeypatch.setattr(fast, "has_kernels", lambda x, *sizes, fused=fused: fused)
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


# ---- halo: text in rows ------------------------------------------------------------------------------------






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
    common.write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        common.write_json(tmp_path / "a.json", [1, 2, {"x": object()}])
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
