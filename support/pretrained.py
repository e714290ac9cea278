"""Other people's checkpoints."""
import errno
import os
import re
from dataclasses import fields


from hypenet import FAMILIES, HypeNetConfig
from support.common import read_json


SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


# Fields of config.json that must have one of these values, or be absent: with another, the numbers differ.
ALIKE = dict(
    activation_function=("gelu_new", "gelu_pytorch_tanh"), hidden_act=("silu", "swish"),
    attention_bias=(False,), mlp_bias=(False,), use_sliding_window=(False,), partial_rotary_factor=(1,),
    scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,),
    add_cross_attention=(False,), lightning_scale=("1/sqrt(d)",), lightning_use_short_conv=(False,),
    quantization_config=())


# Our sizes by the names of their config.json.
GPT2_SIZES = dict(vocab_size="vocab_size", n_embd="n_embd", n_head="n_head", max_len="n_positions")


LLAMA_SIZES = dict(vocab_size="vocab_size", n_embd="hidden_size", n_head="num_attention_heads",
                   n_hidden="intermediate_size", max_len="max_position_embeddings")


# Our modules and what files call them, {} a layer's number. Where | stands, several of theirs make up the
# rows of one of ours; {z} is the authors' gate, o_gate in attention layers and z_proj in linear ones.
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


NAMES = {"gpt2": GPT2_NAMES, "qwen3": LLAMA_NAMES, "llama": LLAMA_NAMES, "hypenet": LLAMA_NAMES}


DROPPED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")     # buffers that we make ourselves


def fetch(name_or_dir, weights=True):
    """A folder with the files of a model (weights=False: only those of its tokenizer): name_or_dir itself if
    it is one, else downloaded by huggingface_hub, with its cache, HF_ENDPOINT, HF_HUB_OFFLINE and tokens."""
    name = os.fspath(name_or_dir)
    if os.path.isdir(name):
        return name
    repo = SHORT_NAMES.get(name, name)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise ValueError(f"no model in {name}: it is no folder, none of {', '.join(SHORT_NAMES)}, "
                         "and not of the form owner/name")
    import huggingface_hub
    from huggingface_hub import errors
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    try:
        return huggingface_hub.snapshot_download(repo, allow_patterns=files + weights * [
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


def read_config(path):
    """The config.json of a folder -> HypeNetConfig, the family (a key of NAMES, None: our own format), and a
    constant that multiplies the queries."""
    given = read_json(path, "config.json", "model")
    try:
        if given.get("model_type") == "hypenet" and "mixer_types" not in given:
            if "attn_pe" in given:
                given["attn_position"] = bool(given.pop("attn_pe"))
            unknown = given.keys() - {f.name for f in fields(HypeNetConfig)} - {"model_type"}
            if unknown:
                raise ValueError(f"unknown fields {', '.join(sorted(unknown))}")
            return HypeNetConfig(**{k: v for k, v in given.items() if k != "model_type"}), None, 1
        return translate(given)
    except KeyError as e:
        problem = f"it lacks {e.args[0]}"
    except (TypeError, AttributeError, ZeroDivisionError) as e:
        problem = f"a field has a value of the wrong type or size ({e})"
    except ValueError as e:
        problem = e
    raise ValueError(f"{path}/config.json: {problem}")


def translate(given):
    """read_config for a config.json of Hugging Face's or the authors'. ValueError where a field asks for what
    our layers do not do, rather than other numbers."""
    family = given.get("model_type")
    if family not in ("gpt2", "qwen3", "llama", "hypenet"):
        raise ValueError(f"model_type is {family!r}; known are hypenet, gpt2, qwen3, llama")
    for field, allowed in ALIKE.items():
        if given.get(field) is not None and given[field] not in allowed:
            raise ValueError(f"{field} is {given[field]}; allowed: {', '.join(map(str, allowed)) or 'none'}")
    if set(given.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {given['layer_types']}; allowed: full_attention")
    gpt2, authors, q_scale = family == "gpt2", family == "hypenet", 1
    c = dict(FAMILIES["qwen3" if authors else family], tied=given.get("tie_word_embeddings", gpt2))
    c |= {ours: given[theirs] for ours, theirs in (GPT2_SIZES if gpt2 else LLAMA_SIZES).items()}
    c["layers"] = "A" * given["n_layer" if gpt2 else "num_hidden_layers"]
    c["head_dim"] = given.get("head_dim") or c["n_embd"] // c["n_head"]
    c["n_kv_head"] = given.get("num_key_value_heads") or c["n_head"]
    if gpt2:
        c["norm_eps"] = given.get("layer_norm_epsilon", 1e-5)
        c["n_hidden"] = given.get("n_inner") or 4 * c["n_embd"]
        return HypeNetConfig(**c), family, q_scale
    c["norm_eps"] = given.get("rms_norm_eps", 1e-6)
    rope = (given.get("rope_scaling") or {}) | (given.get("rope_parameters") or {})   # older and newer files
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = any(isinstance(value, dict) for value in rope.values())                  # one a type of layer
    if nested or kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rope_scaling is {rope}; allowed: rope_type default or llama3, of all channels")
    c["rope_theta"] = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if kind == "llama3":
        c["rope_scaling"] = {name: rope[name] for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if authors:                                      # what is absent is as in their configuration class
        kinds, given_kinds = {"attn": "A", "lightning-attn": "L", "lightning_attn": "L"}, given["mixer_types"]
        if set(given_kinds) - kinds.keys() or len(given_kinds) != len(c["layers"]):
            raise ValueError(f"mixer_types is {given_kinds}; one of {', '.join(kinds)} a layer")
        c["layers"] = "".join(kinds[kind] for kind in given_kinds)
        for field, ours in dict(lightning_nh="n_head", lightning_head_dim="head_dim").items():
            if given.get(field) not in (None, c[ours]):
                raise ValueError(f"{field} is {given[field]}; allowed: that of attention, {c[ours]}")
        if "L" in c["layers"] and c["n_head"] & (c["n_head"] - 1):
            raise ValueError(f"num_attention_heads is {c['n_head']}; allowed: powers of two, for which alone "
                             "the authors' decays are those of eq. 19, and ours")
        c |= dict(attn_position=given.get("attn_use_rope", True),
                  attn_gate=given.get("attn_use_output_gate", False),
                  linear_kv_head=given.get("lightning_nkv") or c["n_kv_head"],
                  linear_rope=given.get("lightning_use_rope", True),
                  linear_qk_norm=given.get("lightning_use_qk_norm", False),
                  linear_norm=given.get("lightning_use_output_norm", False),
                  linear_gate=given.get("lightning_use_output_gate", False))
        scaling = given.get("attn_logits_scaling")
        hype = re.fullmatch(r"hype(?: (\d+))?", str(scaling))
        if hype:                                     # eq. 11 with this a; theirs is 362 where none is given
            c["logit_base"] = float(hype[1] or 362)
        elif type(scaling) in (int, float):
            q_scale = scaling
        elif scaling is not None:
            raise ValueError(f'attn_logits_scaling is {scaling!r}; allowed: null, a number, "hype 500"')
    return HypeNetConfig(**c), family, q_scale


def open_weights(path):
    """The tensors in a folder's safetensors files, not yet read: name -> the open file that has it."""
    from safetensors import safe_open
    files, found = ["model.safetensors"], {}
    if not os.path.exists(os.path.join(path, files[0])) and os.path.exists(
            os.path.join(path, "model.safetensors.index.json")):
        shards = read_json(path, "model.safetensors.index.json", "model").get("weight_map")
        files = sorted(set(shards.values())) if isinstance(shards, dict) else files
    for file in files:
        try:
            f = safe_open(os.path.join(path, file), framework="pt")
        except FileNotFoundError:
            raise ValueError(f"no model in {path}: it has no {file}") from None
        except Exception as e:                       # safetensors raises its own type on a truncated file
            raise ValueError(f"{path}/{file} cannot be read ({e}); copy or download it again") from None
        found.update(dict.fromkeys(f.keys(), f))
    return found


def is_conv1d(name):
    """Whether this weight is one of GPT-2's Conv1D, stored (in, out)."""
    return re.search(r"\.c_(attn|proj|fc)\.weight$", name) is not None


def find_weights(model, family, found, path):
    """Where each tensor of a file goes: its name -> (ours, first row, shape there). ValueError names all that
    are missing, unexpected or of another shape."""
    config, places = model.config, {}
    prefix = max({name.split(".")[0] for name in found} & {"transformer", "model"}, default="")
    for ours, p in model.state_dict().items():
        module, kind = ours.rsplit(".", 1)           # kind: weight or bias
        template = NAMES[family][re.sub(r"\.\d+\.", ".{}.", module)] if family else module
        layer = int(module.split(".")[1]) if module.startswith("blocks") else 0
        z = "o_gate" if config.layers[layer] == "A" else "z_proj"
        stem, _, last = template.format(layer, z=z).rpartition(".")
        names, start = last.split("|"), 0
        sizes = [len(p) // len(names)] * len(names)
        if module.endswith("qkvz") and len(names) > 1:
            sizes = model.get_submodule(module[:-len(".qkvz")]).sizes
        for name, rows in zip(names, sizes):
            if rows:                                 # none: a gate that this model lacks
                parts = "" if module == "lm_head" else prefix, stem, name, kind
                places[".".join(filter(None, parts))] = ours, start, (rows, *p.shape[1:])
                start += rows
    problems = [f"{name} is missing" for name in sorted(places.keys() - found.keys())]
    wte = next(name for name, place in places.items() if place[0] == "wte.weight")
    for name in sorted(found):
        if name in places:
            shape = tuple(found[name].get_slice(name).get_shape())
            wanted = places[name][2][::-1 if is_conv1d(name) else 1]
            if shape != wanted:
                problems.append(f"{name} is {shape}, not {wanted}")
        elif name == "lm_head.weight" and config.tied:
            if wte in found and not found[name].get_tensor(name).equal(found[wte].get_tensor(wte)):
                problems.append(f"{name} differs from {wte}, though config.json ties the two")
        elif not name.endswith(DROPPED):
            problems.append(f"{name} is unexpected")
    if problems:
        raise ValueError(f"the weights in {path} are not those of its config.json: {'; '.join(problems)}")
    return places
