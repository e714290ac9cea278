"""Tokenizers."""
import os
import re
import unicodedata
from itertools import groupby

import numpy as np

from support.common import read_json, write_json
from support.pretrained import fetch


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet():
    """The characters that stand for bytes in a vocabulary (GPT-2's): printable ones for themselves, the other
    bytes, in order, from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def cut(text, added):
    """text -> ids of the added tokens in it, and as str what is between them; of two that fit, the longer."""
    if not added:
        return [text]
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    return [added.get(part, part) for part in re.split(f"({pattern})", text) if part]


class Tokenizer:
    """A tiktoken encoding and the spec it is built from: tokenizer.json of a byte-level BPE (GPT-2, Qwen3,
    Llama 3), or {"type": "bytes"}, one id a byte of UTF-8. end: the id between documents; stops: all ids that
    end a text; bos: the id that begins one, or None; n_vocab: the largest id + 1; holes: those below it that
    are no token."""

    def __init__(self, spec, ends=(0,), bos=None):
        """ends: stops, the end of a document first."""
        import tiktoken
        self.spec, self.added, self.form = spec, ({}, {}), None
        if spec.get("type") == "bytes":
            pattern, ranks = r"(?s:.{1,128})", {bytes([i]): i for i in range(256)}
            self.tokens, self.ids = dict(enumerate(ranks)), np.arange(256)
        elif "model" in spec:
            pattern, ranks = self.parse()
        else:
            raise ValueError(f"type is {spec.get('type')!r}; known are bytes and the tokenizer.json of a BPE")
        self.encoding = tiktoken.Encoding("", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
        self.n_vocab = max(self.tokens) + 1
        self.holes = sorted(set(range(self.n_vocab)) - self.tokens.keys())
        self.bos, self.stops = bos, set(ends)
        if not ends or self.stops - self.tokens.keys():
            raise ValueError(f"eos_token_id is {list(ends)}; give at least one id, all of them its tokens")
        self.end = ends[0]
        text = "".join(map(chr, range(0xD800)))      # tiktoken drops what its pattern does not match
        if self.decode(self.ids[self.encoding.encode_to_numpy(text)]) != text:
            raise ValueError(f"the pattern {pattern!r} leaves out some text")

    def parse(self):
        """tokenizer.json -> tiktoken's pattern and ranks. Of all neighbours that make up a token, tiktoken
        joins those of lowest rank; so the rank of a token is its place among the merges, and `ids` leads from
        ranks to ids, whatever their order."""
        spec, model, alphabet = self.spec, self.spec["model"], byte_alphabet()
        vocab, added = model["vocab"], spec.get("added_tokens") or []
        merges = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in model["merges"]]
        whole = []                                   # ignore_merges: a piece that is a token is taken whole
        if model.get("ignore_merges"):
            whole = [token for token in vocab.keys() - set(merges) if alphabet.keys() >= set(token)]
        norm, split = spec.get("normalizer") or dict(normalizers=[]), spec.get("pre_tokenizer") or {}
        norms = [n["type"] for n in norm.get("normalizers", [norm])]
        *splits, last = split.get("pretokenizers", [split])
        patterns = [s["pattern"].get("Regex") for s in splits
                    if s.get("type") == "Split" and s["behavior"] == "Isolated" and not s.get("invert")]
        if last.get("use_regex", True):
            splits, patterns = [*splits, last], [*patterns, GPT2_PATTERN]
        wrong = [name for name, fits in dict(
            normalizer=set(norms) <= {"NFC"},
            pre_tokenizer=last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
            and len(splits) == len(patterns) == 1 and patterns[0],
            model=model["type"] == "BPE" and not any(model.get(flag) for flag in (
                "dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")),
            vocab=alphabet.keys() <= vocab.keys(),
            # two merges that make one token stand side by side, and one is there for all that could be joined
            merges=len(list(groupby(merges))) == len(set(merges)) and not any(
                token[:i] in vocab and token[i:] in vocab for token in whole for i in range(1, len(token))),
            added_tokens=not any(t.get(flag) for t in added for flag in ("single_word", "lstrip", "rstrip")),
        ).items() if not fits]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not of the kind that GPT-2, Qwen3 and Llama 3 have")

        def to_bytes(token):
            return bytes(map(alphabet.get, token)) if alphabet.keys() >= set(token) else token.encode()
        self.form = "NFC" if norms else None
        for token in added:                          # found in the text as it is, or once it is normalized
            late, text = bool(token.get("normalized")), token["content"]
            self.added[late][self.normalize(text) if late else text] = token["id"]
        vocab = vocab | {token["content"]: token["id"] for token in added}
        self.tokens = {id: to_bytes(token) for token, id in vocab.items()}
        order = list(dict.fromkeys([*alphabet, *merges, *whole]))
        self.ids = np.array([vocab[token] for token in order])
        return patterns[0], {to_bytes(token): rank for rank, token in enumerate(order)}

    @classmethod
    def bytes(cls):
        return cls({"type": "bytes"})

    def normalize(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def encode(self, text, special=False):
        """str -> ids, a list of ints."""
        return self.encode_array(text, special).tolist()

    def encode_array(self, text, special=False):
        """str -> ids, numpy int32; a lone surrogate becomes U+FFFD. special: added tokens, such as
        <|endoftext|>, that the text spells out become their ids; else they are text like any other."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        early, late = self.added if special else ({}, {})
        parts = []
        for part in cut(text, early):
            parts += [part] if isinstance(part, int) else cut(self.normalize(part), late)
        ids = [[part] if isinstance(part, int) else self.ids[self.encoding.encode_to_numpy(part)]
               for part in parts]
        return np.concatenate(ids or [[]]).astype(np.int32)

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8, and ids that are no token, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id):
        return self.tokens.get(int(id), b"\xef\xbf\xbd")

    def save(self, path):
        """Write tokenizer.json to path and, unless it tells, what begins and ends a text beside it."""
        write_json(os.path.join(path, "tokenizer.json"), self.spec)
        if "model" in self.spec:
            bos = None if self.bos is None else self.token_bytes(self.bos).decode()
            write_json(os.path.join(path, "tokenizer_config.json"), dict(
                add_bos_token=bos is not None, bos_token=bos,
                eos_token_id=[self.end, *sorted(self.stops - {self.end})]))

    @classmethod
    def load(cls, name_or_dir):
        """From a folder or the hub. Every id that config.json, generation_config.json, tokenizer_config.json
        call eos ends a text; the first, in this order, is the end of a document."""
        path = fetch(name_or_dir, weights=False)
        spec = read_json(path, "tokenizer.json", "tokenizer")
        try:
            if "model" not in spec:
                return cls(spec)
            configs = [read_json(path, f"{name}.json", "tokenizer") for name in (
                "config", "generation_config", "tokenizer_config")
                if os.path.exists(os.path.join(path, f"{name}.json"))]
            ids = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
            ends, bos, post = [], None, spec.get("post_processor") or {}
            for c in configs:
                given, eos, begin = c.get("eos_token_id"), c.get("eos_token"), c.get("bos_token")
                ends += given if isinstance(given, list) else [given]
                ends.append(ids.get(eos["content"] if isinstance(eos, dict) else eos))
                if c.get("add_bos_token"):
                    bos = ids.get(begin["content"] if isinstance(begin, dict) else begin)
            for step in post.get("processors", [post]):
                if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
                    bos = step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
            return cls(spec, [end for end in dict.fromkeys(ends) if end is not None], bos)
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}/tokenizer.json is no tokenizer ({e!r}); copy it again") from None
        except ValueError as e:
            raise ValueError(f"{path}/tokenizer.json: {e}") from None


def check_tokenizer(tokenizer, config):
    """ValueError unless every id of the tokenizer has a row in the model's embedding."""
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"the tokenizer's ids go up to {tokenizer.n_vocab - 1:,}, the model's embedding has "
                         f"{config.vocab_size:,} rows: they do not belong together")
