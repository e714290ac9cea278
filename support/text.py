"""Text: documents -> rows of token ids."""
import bisect
import gzip
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import sysconfig
import zlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from support.recall import hide
from support.tokens import Tokenizer


FINEWEB, SHARD = "kjj0/fineweb10B-gpt2", 10 ** 8     # of the hub: shards of so many GPT-2 tokens


SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 103))]


MAGIC, GPT2_END = 20240520, 50256


HELD_OUT = 2 ** 22                                   # tokens of a source that are measured on, at most


def stdlib_documents():
    """(group, text) of every source file of this Python's standard library, but for tests and site-packages.
    A group is a top-level module or package: all of it stands on one side of the held-out split."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith("config-"))
        for path in (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")):
            with open(path, encoding="utf-8", errors="replace") as f:
                yield os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py"), f.read()


def file_documents(files, piece=65536):
    """(group, text) of .txt and .jsonl files, gzipped or not. A line of .jsonl is a document; a .txt is cut
    at line ends into pieces of about 64 KB, so that one file can be split too. A group is a text: all copies
    stand on one side."""
    for path in files:
        unpack = gzip.open if path.endswith(".gz") else open
        try:
            with unpack(path, "rt", encoding="utf-8-sig", errors="replace") as f:
                while lines := f.readlines(piece):
                    if path.endswith((".jsonl", ".jsonl.gz")):
                        texts = [str(json.loads(line)["text"]) for line in lines if line.strip()]
                    else:
                        texts = ["".join(lines)]
                    yield from zip(texts, texts)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--data {path}: not every line is a JSON object with a field text") from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"--data {path}: damaged; copy it again") from None


def data_files(path):
    """The files of text or tokens that a path of --data stands for; ValueError if there are none."""
    if path in ("stdlib", "fineweb"):
        return SHARDS if path == "fineweb" else []
    if not os.path.exists(path):
        raise ValueError(f"--data {path}: not found; give files, folders, stdlib or fineweb")
    kinds = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".bin")
    inside = sorted(str(p) for p in Path(path).rglob("*") if p.is_file()) or [path]
    if not (found := [p for p in inside if p.endswith(kinds)]):
        raise ValueError(f"--data {path}: no file there ends in {', '.join(kinds)}")
    return found


def data_sources(data):
    """[(paths, share of the rows)] of --data: each path with a weight is a source, those without are one.
    ValueError if only some have a weight, or one is not above 0."""
    names = []
    for item in data:
        names += [item] if os.path.exists(item) else item.split(",")
    found = [(n, "") if os.path.exists(n) or ":" not in n else n.rsplit(":", 1) for n in names]
    if not any(w for _, w in found) and ("fineweb" not in names or len(names) == 1):
        return [(names, 1.0)]
    try:
        weights = np.array([float(w) for _, w in found])
    except ValueError:
        weights = np.zeros(1)
    if not 0 < weights.min() <= weights.max() < math.inf:
        raise ValueError(f"--data {' '.join(data)}: give each path a weight above 0, as in web/:0.7 "
                         "code/:0.3, or give none a weight")
    return [([path], share) for (path, _), share in zip(found, weights / weights.sum())]


@lru_cache(None)
def read_shard(path):
    """Tokens (n,) of a shard of FineWeb's or llm.c's, a memory map: 256 int32 (magic, version 1, n), then
    uint16 ids of GPT-2, its end id before each document. ValueError if the file is anything else."""
    least = 0
    if path in SHARDS:
        from huggingface_hub import hf_hub_download
        try:
            path, least = hf_hub_download(FINEWEB, path, repo_type="dataset"), SHARD
        except Exception as e:                                      # the hub's, the network's, the disk's
            raise ValueError(f"--data fineweb: cannot fetch {path} of {FINEWEB} ({str(e)[:200]}); see to "
                             "the network and the disk, or give --data of your own") from None
    header, size = np.fromfile(path, "<i4", 256).tolist(), os.path.getsize(path)
    if len(header) < 256 or header[:2] != [MAGIC, 1] or size != 1024 + 2 * header[2] or header[2] < least:
        raise ValueError(f"{path} is no whole shard of tokens (256 int32, {MAGIC}, 1, n ...; n uint16); "
                         "remove it or fetch it again")
    return np.memmap(path, "<u2", "r", offset=1024)


class Source:
    """Documents in a row, the end id after each. All text is one part of it, in memory, in an order that the
    seed draws; each shard of tokens is one, memory-mapped. held_out (n,) is one group of text in 16, the same
    ones on every machine, and what shards with "val" in their names begin with.

    It is read in cells of so many ids: those of one part in an order that each epoch draws anew, then those
    of the next. No id comes twice an epoch, and a cell is found by its number: a run remembers no more."""

    def __init__(self, paths, tokenizer, seed, cell, digest):
        self.tokenizer, self.seed, self.cell, self.gpt2 = tokenizer, seed, cell, None
        self.order = lru_cache(8)(self.order)
        files = [p for path in paths for p in data_files(path)]
        shards = [p for p in files if p.endswith(".bin")]
        stdlib = stdlib_documents() if "stdlib" in paths else []
        sides = [], []                                              # documents to train on, held out
        for group, text in itertools.chain(stdlib, file_documents([p for p in files if p not in shards])):
            digest.update(text.encode("utf-8", "replace"))
            name = hashlib.sha256(b"hypenet" + group.encode("utf-8", "replace")).hexdigest()
            sides[int(name, 16) % 16 == 0].append(self.document(text))
        self.documents = sum(map(len, sides))
        random.Random(seed).shuffle(sides[0])
        train, held_out = (np.concatenate([*side, self.document("")[:0]]) for side in sides)
        self.parts, self.sizes = [train], [len(train)]              # text, then the names of shards
        if shards and (tokenizer.n_vocab != GPT2_END + 1 or tokenizer.encode("Hello world") != [15496, 995]):
            self.gpt2 = Tokenizer.load("gpt2")
        for path in shards:
            n, name = SHARD if path in SHARDS else len(read_shard(path)), os.path.basename(path)
            digest.update(f"{name} {n}".encode())
            if "val" in name:
                held_out = np.concatenate((held_out, self.encode(read_shard(path)[:HELD_OUT])))
            else:
                self.parts.append(path)
                self.sizes.append(n)
        self.held_out = held_out[:HELD_OUT].astype(np.int32)
        self.begins = np.cumsum([0] + [max(0, n - 1) // cell for n in self.sizes]).tolist()   # in cells
        if not self.begins[-1]:
            raise ValueError(f"--data {' '.join(paths)}: too few tokens to train on in sequences of {cell:,}")

    def document(self, text):
        """Its ids, with what begins and ends a document, in as few bytes as they need."""
        t = self.tokenizer
        ids = np.concatenate(([] if t.bos is None else [t.bos], t.encode_array(text), [t.end]))
        return ids.astype(np.min_scalar_type(t.n_vocab - 1))

    def encode(self, tokens):
        """Ids of a shard as ids of the tokenizer: the same if it is GPT-2's, else by way of their text."""
        if self.gpt2 is None:
            return tokens
        documents = np.split(tokens, np.flatnonzero(tokens == GPT2_END))
        texts = (self.gpt2.decode(ids[ids != GPT2_END].tolist()) for ids in documents if len(ids))
        return np.concatenate([self.document(text) for text in texts])

    def order(self, k):
        """Where the cells of the k-th part, over all epochs, begin, in the order in which they are read."""
        n, rng = self.sizes[k % len(self.parts)] - 1, np.random.default_rng([self.seed, k])
        return rng.integers(n % self.cell + 1) + self.cell * rng.permutation(n // self.cell)

    def read(self, c, start, n):
        """Ids (n,) int64 from place `start` on in cell c, counted over all epochs. A row of a shard that is
        encoded anew begins where it would, and is as much text as gives n ids."""
        epoch, c = divmod(c, self.begins[-1])
        j = bisect.bisect(self.begins, c) - 1                       # the part
        at = self.order(epoch * len(self.parts) + j)[c - self.begins[j]] + start
        ids = (read_shard(self.parts[j]) if j else self.parts[0])[at:at + n]
        if j and self.gpt2:
            tokens, ids, size = read_shard(self.parts[j]), [], n
            while len(ids) < n:                                     # at the end of a shard on from its start
                size += n // 4 + 1
                ids = self.encode(tokens.take(np.arange(at, at + size), mode="wrap"))[:n]
        return ids.astype(np.int64)


class Corpus:
    """Text to train on, and held_out (n,) int32, documents in a row. data: what --data lists, None for the
    standard library. Sources with weights are mixed, in shares of rows. cell: text is shuffled in stretches
    of so many tokens, at least a sequence of any stage. ValueError if there is too little of it."""

    def __init__(self, tokenizer, data=None, seed=0, cell=1024):
        self.tokenizer, self.seed, self.cell, digest = tokenizer, seed, cell, hashlib.sha256()
        self.paths, shares = zip(*data_sources(data or ["stdlib"]))
        self.shares, self.taken = np.array(shares), np.zeros(len(shares), int)          # cells, by stages
        self.sources = [Source(paths, tokenizer, seed, cell, digest) for paths in self.paths]
        tokens = sum(sum(source.sizes) + len(source.held_out) for source in self.sources)
        if not data and tokens < 2e6:
            raise ValueError(f"only {tokens:,} tokens of source in Python's standard library (stripped?); "
                             "give text of your own with --data")
        self.held_out = np.concatenate([source.held_out for source in self.sources])
        self.facts = dict(name=" ".join(data or ["stdlib"]), python=platform.python_version(), tokens=tokens,
                          documents=sum(s.documents for s in self.sources), sha256=digest.hexdigest())

    def split(self, rows):
        """How many of the first so many rows of a stage each source gives: (sources,)."""
        n, most = np.floor(self.shares * rows + 1e-6).astype(int), self.shares.argmax()
        n[most] += rows - n.sum()
        return n

    def advance(self, plan):
        """Count the cells of a stage as taken: the next stage begins behind them."""
        rows_in_cell = self.cell // plan.length
        self.taken = self.taken + np.ceil(self.split(plan.steps * plan.batch) / rows_in_cell).astype(int)

    def rows(self, stage, plan):
        """The training sequences of a stage, a function: step -> (batch, length + 1) int64, a share
        plan.recall of them with something to recall (hide). The stage takes cells of each source in turn
        and cuts them into rows, shuffled in blocks of 2^24 tokens; the last id of one row is the first of the
        next."""
        total, taken, size = plan.steps * plan.batch, self.taken, max(plan.batch, 2 ** 24 // plan.length)
        key, in_cell = [self.seed, zlib.crc32(stage.encode())], self.cell // plan.length

        @lru_cache(2)
        def block(b):                                               # (rows, 3): source, cell, start in it
            rows, firsts, ends = [], self.split(b * size), self.split(min(total, (b + 1) * size))
            for source, (first, end) in enumerate(zip(firsts, ends)):
                i = np.arange(first, end)
                cells, starts = taken[source] + i // in_cell, i % in_cell * plan.length
                rows.append(np.stack((np.full(len(i), source), cells, starts), 1))
            return np.random.default_rng([*key, b, 2]).permutation(np.concatenate(rows))

        def batch(step):
            where = [block(i // size)[i % size] for i in range(step * plan.batch, (step + 1) * plan.batch)]
            rows = np.stack([self.sources[s].read(c, start, plan.length + 1) for s, c, start in where])
            rng = np.random.default_rng([*key, step])
            share = plan.recall * plan.batch                       # less than 1: now and then a row
            for row in rows[:int(share * (step + 1) + 1e-6) - int(share * step + 1e-6)]:
                hide(self.tokenizer, row, rng, plan.varied)
            return rows
        return batch

    @cached_property
    def prose(self):
        """Ids (n,) of natural text, held out: of the standard library what its docstrings say, else all."""
        text = self.tokenizer.decode(self.held_out.tolist()) if self.paths == (["stdlib"],) else ""
        found = re.findall(r'^ *r?"""([A-Z](?:(?!""").)*)', text, re.DOTALL | re.MULTILINE)
        prose = "\n\n".join(inspect.cleandoc(string) for string in found if len(string) > 200)
        return self.tokenizer.encode_array(prose) if prose else self.held_out

    def windows(self, rng, batch, length, prose=False):
        """(batch, length) int64: stretches of held-out text from random places; of prose (if that is asked
        for), which is short, around and around."""
        if prose:
            starts = rng.integers(0, len(self.prose), batch)
            rows = [self.prose.take(np.arange(s, s + length), mode="wrap") for s in starts]
            return np.stack(rows).astype(np.int64)
        if len(self.held_out) < length:
            raise ValueError(f"the held-out text has {len(self.held_out):,} tokens, too few for a sequence "
                             f"of {length:,}; give more --data (1/16 of text, shards with val in the name)")
        starts = rng.integers(0, len(self.held_out) - length + 1, batch)
        return np.stack([self.held_out[s:s + length] for s in starts]).astype(np.int64)
