"""Export a model for the library transformers, and for every tool that loads models by transformers.

    python -m support.export out/tiny-paper exported        a run, or any model that sample.py takes
    lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True --tasks lambada_openai

The folder has weights, tokenizer and code: modeling_hypenet.py, with copies of hypenet.py and kernel.py.
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) loads the model. AutoTokenizer takes the
same argument. Logits are those of HypeNet. generate never draws an id that no token has.
"""
import json
import os
import re
from dataclasses import asdict

import torch

from hypenet import write_file
from support import pretrained
from support.common import Parser, command_line, filled, write_json
from support.tokens import Tokenizer, check_tokenizer, content

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LONGEST = 131072                     # tokens that the config names as the limit of a model without one


def get_args(argv):
    p = Parser(prog="python -m support.export", description=__doc__.split("\n\n")[0])
    p.add_argument("run", type=filled, help="folder of a run or model, .gguf file, or name on the hub")
    p.add_argument("out", type=filled, help="folder to write, new or empty")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="type of the weights in the folder; default: %(default)s")
    return p.parse_args(argv)


def write_code(out):
    """Copy the code. A copy imports other copies as transformers wants: from .kernel, not from kernel."""
    for name, imports in (("support/modeling_hypenet.py", 0), ("kernel.py", 0), ("hypenet.py", 1)):
        with open(os.path.join(HOME, name), encoding="utf-8") as f:
            source, n = re.subn("^from kernel import ", "from .kernel import ", f.read(), flags=re.MULTILINE)
        if n != imports:
            raise ValueError(f"{name} has {n} lines 'from kernel import'; the export knows {imports}")
        write_file(os.path.join(out, os.path.basename(name)), source)


# ---- the tokenizer -----------------------------------------------------------------------------------------


def byte_spec():
    """The tokenizer.json, as a dict, of one id per byte. Byte 0 ends a text, and the token of byte 0 is the
    character \\0. GPT-2's name for byte 0 is a letter. A text with this letter would seem to end there."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}     # GPT-2 names these by themselves
    others = (chr(i) for i in range(256, 512))                            # GPT-2's names of the other bytes
    names = [chr(b) if b in printable else next(others) for b in range(256)]
    names[0] = "\0"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    model = dict(type="BPE", vocab={name: b for b, name in enumerate(names)}, merges=[])
    end = dict(flags, id=0, content="\0", special=True)
    return dict(version="1.0", added_tokens=[end], pre_tokenizer=level, decoder=level, model=model)


def name_of(tokenizer, id):
    return "\0" if tokenizer.is_bytes else tokenizer.encoder.id_to_token(id)


def tokenizer_spec(tokenizer):
    """The tokenizer.json, as a dict, that gives the same ids, and puts the tokenizer's bos before a text."""
    if tokenizer.is_bytes:
        return byte_spec()
    spec = json.loads(tokenizer.spec) | dict(truncation=None, padding=None)
    if tokenizer.bos is not None and tokenizer.encoder.encode("a").ids[0] != tokenizer.bos:
        token = name_of(tokenizer, tokenizer.bos)
        bos = dict(SpecialToken=dict(id=token, type_id=0))
        a, b = (dict(Sequence=dict(id=name, type_id=0)) for name in "AB")
        spec["post_processor"] = dict(
            type="TemplateProcessing", single=[bos, a], pair=[bos, a, b],
            special_tokens={token: dict(id=token, ids=[tokenizer.bos], tokens=[token])})
    return spec


def write_tokenizer(tokenizer, out, longest):
    """tokenizer.json and tokenizer_config.json. PreTrainedTokenizerFast, the general class, reads the first
    file as it is. The class of one family of models would make its own tokenizer from the vocabulary."""
    given = tokenizer.config
    names = {name: content(token) for name, token in given.items() if name.endswith("_token")}
    tokens = {name: token for name, token in names.items() if isinstance(token, str)}
    end = name_of(tokenizer, tokenizer.end)
    config = dict({"pad_token": end} | tokens, eos_token=end, tokenizer_class="PreTrainedTokenizerFast",
                  model_max_length=longest, clean_up_tokenization_spaces=False, padding_side="left",
                  model_input_names=["input_ids", "attention_mask"])
    if tokenizer.bos is not None:
        config["bos_token"] = name_of(tokenizer, tokenizer.bos)
    config["chat_template"] = given.get("chat_template")
    write_json(os.path.join(out, "tokenizer.json"), tokenizer_spec(tokenizer))
    write_json(os.path.join(out, "tokenizer_config.json"), config)


# ---- the model ---------------------------------------------------------------------------------------------


def longest_text(c):
    """The longest text, in tokens, for tools that want a number. A teacher has the length of its training."""
    known = c.max_len if c.attn_position and not c.chunk else LONGEST
    return min(known, c.limit())


def write_model(model, tokenizer, out):
    """Configs first, weights last, so that a folder with weights is whole."""
    from safetensors.torch import save_file
    c = model.config
    names = dict(AutoConfig="HypeNetForCausalLMConfig", AutoModelForCausalLM="HypeNetForCausalLM")
    write_json(os.path.join(out, "config.json"), dict(
        model_type="hypenet", architectures=["HypeNetForCausalLM"], hypenet=asdict(c),
        auto_map={auto: f"modeling_hypenet.{name}" for auto, name in names.items()},
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=len(c.layers),
        num_attention_heads=c.n_head, max_position_embeddings=longest_text(c), tie_word_embeddings=c.tied))
    unused = tokenizer.holes + list(range(tokenizer.n_vocab, c.vocab_size))
    write_json(os.path.join(out, "generation_config.json"), dict(
        bos_token_id=tokenizer.bos, eos_token_id=[tokenizer.end, *sorted(tokenizer.stops - {tokenizer.end})],
        pad_token_id=tokenizer.end, suppress_tokens=unused or None))
    weights = {f"model.{name}": p.contiguous() for name, p in model.state_dict().items()}
    write_file(os.path.join(out, "model.safetensors"),
               lambda tmp: save_file(weights, tmp, metadata={"format": "pt"}))


def export(run, out, dtype="float32"):
    """Write the folder `out` for the model `run`. ValueError if `out` has files, or no model can be read."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out} is a file, or a folder with files in it; give a new folder")
    tokenizer = Tokenizer.load(run)
    model = pretrained.load(run, dtype=getattr(torch, dtype))
    check_tokenizer(tokenizer, model.config)
    os.makedirs(out, exist_ok=True)
    write_code(out)
    write_tokenizer(tokenizer, out, longest_text(model.config))
    write_model(model, tokenizer, out)
    print(f"{out}: layers {model.config.layers}, {model.n_params():,} parameters, {dtype}")


def run_main(argv):
    export(**vars(get_args(argv)))


def main(argv=None):
    command_line("support.export", run_main, argv)


if __name__ == "__main__":
    main()
