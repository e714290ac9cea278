"""Tokenizers: text -> token ids, and ids -> text.

The library tokenizers defines the file tokenizer.json, so that library reads the file here. The tiny models
have one id per byte of UTF-8, which tiktoken encodes. Both packages are imported only where they are used.
"""
import hashlib
import json
import os
from datetime import datetime

import numpy as np

from hypenet import write_file
from support.common import at_once, read_json, write_json
from support.pretrained import fetch, open_gguf

BYTES = '{\n "type": "bytes"\n}\n'                  # the tokenizer.json of one id per byte


def repaired(text):
    """The text, each lone surrogate replaced by U+FFFD, because UTF-8 has no bytes for a lone surrogate."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content(token):
    """The text of a token in a config file: files write a string, or an object with the field content."""
    return token["content"] if isinstance(token, dict) else token


def unpack(text):
    """The text of a tokenizer.json -> the encoder of tokenizers or tiktoken, and its ids, token -> id."""
    if "".join(text[:99].split()) == "".join(BYTES.split()):
        import tiktoken
        ids = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("", pat_str=r"(?s:.{1,128})", special_tokens={}, mergeable_ranks=ids), ids
    import tokenizers
    try:
        encoder = tokenizers.Tokenizer.from_str(text)
    except Exception as e:                           # the library raises nothing more special
        raise ValueError(f"the library tokenizers cannot read it ({' '.join(str(e).split())})") from None
    encoder.no_truncation()                          # both belong to batches for a model, not to text
    encoder.no_padding()
    encoder.encode_special_tokens = True             # as text, see encode_batch
    return encoder, encoder.get_vocab(with_added_tokens=True)


class Tokenizer:
    """One tokenizer.json, with the ids that begin and end a text.

    end: the id between two documents. stops: every id that ends a generated text. bos: the id that begins a
    text, or None. n_vocab: the largest id + 1. holes: the ids below n_vocab that no token has."""

    def __init__(self, spec, configs=()):
        """spec: the text of tokenizer.json. configs: the other files, as dicts, tokenizer_config.json last.
        Every id that a config calls eos ends a text. The first of these ids ends a document."""
        self.spec = spec
        self.configs = configs
        self.encoder, ids = unpack(spec)
        self.is_bytes = b"a" in ids
        self.config = configs[-1] if configs else {}
        self.bos, ends = (None, [0]) if self.is_bytes else self.limits(ids)
        known = set(ids.values())
        given = ends if self.bos is None else [*ends, self.bos]
        if not ends or set(given) - known or not all(type(id) is int for id in given):
            raise ValueError(f"eos_token_id is {ends}, bos {self.bos}; give at least one eos, and only ids "
                             "of its tokens")
        self.end = ends[0]
        self.stops = set(ends)
        self.n_vocab = max(known) + 1
        if len(known) < len(ids) or self.n_vocab > 4 * len(known) + 2 ** 16:      # holes would take memory
            raise ValueError(f"{len(ids):,} tokens have {len(known):,} different ids, up to {max(known):,}; "
                             "give each token an id of its own, without gaps of millions")
        self.holes = sorted(set(range(self.n_vocab)) - known)

    def limits(self, ids):
        """bos, and a list of the ids that end a text. ids: token -> id. bos is what the library itself puts
        before a text, or else what a config asks for."""
        first = self.encoder.encode("a")
        bos = first.ids[0] if first.special_tokens_mask[:1] == [1] else None
        ends = []
        for config in self.configs:
            given = config.get("eos_token_id")
            ends += given if isinstance(given, list) else [given]
            ends.append(ids.get(content(config.get("eos_token"))))
            if bos is None and config.get("add_bos_token") and config.get("bos_token"):
                token = content(config["bos_token"])
                bos = ids.get(token, token)          # __init__ refuses a token without an id
        return bos, [end for end in dict.fromkeys(ends) if end is not None]

    @classmethod
    def bytes(cls):
        return cls(BYTES)

    @classmethod
    def load(cls, name_or_path):
        """From a folder, the hub or a .gguf file (see support.pretrained.fetch)."""
        path = fetch(name_or_path, weights=False)
        is_file = os.path.isfile(path)
        where = path if is_file else os.path.join(path, "tokenizer.json")
        try:
            return cls(*(gguf_files(path) if is_file else folder_files(path)))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"no tokenizer in {where} ({e!r}); copy it again") from None
        except ValueError as e:
            raise ValueError(f"no tokenizer in {where}: {e}") from None

    def encode(self, text, special=False):
        """str -> ids, a list of ints. special: see encode_batch."""
        return self.encode_array(text, special).tolist()

    def encode_array(self, text, special=False):
        """str -> ids (n,), numpy int32. special: see encode_batch."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts, special=False):
        """A list of str -> a list of ids (n,), numpy int32, on all cores. Neither bos nor end is added.

        A document may spell out a special token, such as <|endoftext|>, without the meaning of that token. So
        the token is encoded as text. special=True gives its id."""
        texts = [repaired(text) for text in texts]
        if self.is_bytes:
            return [self.encoder.encode_to_numpy(text).astype(np.int32) for text in texts]
        try:
            if special:                              # of all threads: only where no other thread encodes
                self.encoder.encode_special_tokens = False
            found = self.encoder.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            if special:
                self.encoder.encode_special_tokens = True
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD. Ids that no token has are left out."""
        ids = [int(id) for id in ids if id < self.n_vocab]
        if self.is_bytes:
            return self.encoder.decode_bytes(ids).decode("utf-8", "replace")
        return self.encoder.decode(ids, skip_special_tokens=False)

    def stream_decoder(self):
        """A StreamDecoder, for ids that come one by one."""
        return StreamDecoder(self.decode)

    def digest(self):
        """A sha256 that names this tokenizer with its bos and end: files of encoded text are named by it."""
        return hashlib.sha256(json.dumps([self.spec, self.bos, self.end]).encode()).hexdigest()

    def save(self, path):
        """Write tokenizer.json as it was read, and beside it the ids that begin and end a text."""
        write_file(os.path.join(path, "tokenizer.json"), self.spec)
        if self.is_bytes:
            return
        config = dict(self.config, add_bos_token=self.bos is not None,
                      eos_token_id=[self.end, *sorted(self.stops - {self.end})])
        if self.bos is not None:
            config["bos_token"] = self.encoder.id_to_token(self.bos)
        write_json(os.path.join(path, "tokenizer_config.json"), config)

    def template(self):
        """The chat template, a str, or None."""
        found = self.config.get("chat_template")
        if isinstance(found, list):                  # several templates, each with a name
            found = {t["name"]: t["template"] for t in found}.get("default")
        return found or None

    def chat(self, messages, day=None):
        """[{"role": "user", "content": "Hello"}, ...] -> the prompt, a str, that ends where an instruct model
        answers. Encode the prompt with special=True and put no bos before it: the template writes bos. day: a
        datetime for templates that write today's date; default: now."""
        template = self.template()
        if template is None:
            raise ValueError("this model has no chat template: give an instruct model, or leave out --chat")
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ValueError("a chat template needs the package jinja2: pip install jinja2") from None

        def fail(message):
            raise jinja2.TemplateError(message)

        def to_json(value, **options):
            return json.dumps(value, ensure_ascii=False, **options)
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        day = day or datetime.now()
        env.globals.update(raise_exception=fail, strftime_now=day.strftime)
        env.filters["tojson"] = to_json
        names = {name: content(token) for name, token in self.config.items()
                 if name.endswith("_token") and token is not None}
        try:
            return env.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
        except Exception as e:                       # a template is a program: it may fail in any way
            raise ValueError(f"the chat template of this model fails ({' '.join(str(e).split())})") from None


class StreamDecoder:
    """Ids one by one -> text. Where several tokens make up a character, the last of them gives all of it."""

    def __init__(self, decode):
        self.decode = decode
        self.ids = []                                # the ids that were shown last, then those that wait
        self.n_shown = 0

    def push(self, id):
        """The next id -> the text that is now whole."""
        self.ids.append(id)
        text = self.decode(self.ids)
        return "" if text.endswith("\ufffd") else self.show(text)

    def flush(self):
        """The text of the ids that still wait for the rest of a character."""
        return self.show(self.decode(self.ids))

    def show(self, text):
        """What text adds to the ids that were shown. A decoder may treat the first token of a text unlike the
        others, so the ids that were shown last stay in front."""
        before = self.decode(self.ids[:self.n_shown])
        self.ids = self.ids[self.n_shown:]
        self.n_shown = len(self.ids)
        return text[len(before):]


def check_tokenizer(tokenizer, config):
    """ValueError unless every id of the tokenizer has a row in the model's embedding."""
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"the tokenizer's ids go up to {tokenizer.n_vocab - 1:,}, the model's embedding has "
                         f"{config.vocab_size:,} rows: they do not belong together")


# ---- the files of a tokenizer ------------------------------------------------------------------------------


def folder_files(path):
    """A folder -> the text of tokenizer.json, and the configs beside it, tokenizer_config.json last."""
    if not os.path.exists(os.path.join(path, "tokenizer.json")):
        raise ValueError("no such file; give the folder of a whole model")
    with open(os.path.join(path, "tokenizer.json"), encoding="utf-8", opener=at_once) as f:
        text = f.read()
    configs = []
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        found = os.path.exists(os.path.join(path, name))
        configs.append(read_json(path, name, "tokenizer") if found else {})
    template = os.path.join(path, "chat_template.jinja")
    if os.path.exists(template):
        with open(template, encoding="utf-8", opener=at_once) as f:
            configs[-1]["chat_template"] = f.read()
    return text, configs


def splits(pattern):
    """How text is cut into words before bytes are merged: by this pattern, or by GPT-2's own."""
    parts = []
    if pattern:
        parts = [dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)]
    return [*parts, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=not pattern)]


# Words of Qwen2; Llama 3 has digits in groups of up to three.
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# tokenizer.ggml.pre of a .gguf file, and the pre-tokenizer of the tokenizer.json that it stands for.
PRE_TOKENIZERS = {
    "gpt-2": splits(None),
    "smollm": [dict(type="Digits", individual_digits=True), *splits(None)],
    "qwen2": splits(QWEN2),
    "llama-bpe": splits(LLAMA3),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5      # tokenizer.ggml.token_type


def gguf_files(path):
    """The same of a .gguf file: a tokenizer.json of its vocabulary and merges, and one config."""
    fields, _ = open_gguf(path)
    prefix = "tokenizer.ggml."
    given = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
    kind, pre = given.get("model"), given.get("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"{prefix}model and pre are {kind!r} and {pre!r}; allowed: 'gpt2' and one of "
                         f"{', '.join(PRE_TOKENIZERS)}")
    tokens = given["tokens"]
    kinds = given.get("token_type") or [NORMAL] * len(tokens)
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != UNUSED}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [dict(id=id, content=token, special=kinds[id] == CONTROL, **flags)
             for token, id in vocab.items() if kinds[id] in (CONTROL, USER_DEFINED)]
    spec = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added,
        normalizer=dict(type="NFC") if pre == "qwen2" else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=PRE_TOKENIZERS[pre]), post_processor=None,
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
        model=dict(type="BPE", vocab=vocab, merges=given["merges"], ignore_merges=pre == "llama-bpe"))
    names = {f"{name}_token": tokens[given[f"{name}_token_id"]] for name in ("bos", "eos")
             if f"{name}_token_id" in given}
    ends = [given[f"{name}_token_id"] for name in ("eos", "eot", "eom") if f"{name}_token_id" in given]
    config = dict(names, add_bos_token=given.get("add_bos_token", pre == "llama-bpe"),
                  eos_token_id=ends, chat_template=fields.get("tokenizer.chat_template"))
    return json.dumps(spec, ensure_ascii=False), [config]
