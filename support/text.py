"""Text: documents -> rows of token ids.

    data_sources, data_files   what --data names
    documents                  the texts of files, one after the other, each with its group
    load_text                  the ids of documents: all cores encode them once, a cache on disk keeps them
    read_shard                 ids that others have encoded: the shards of FineWeb and llm.c
    Source                     documents in a row, in an order that the seed draws
    Corpus                     sources mixed by weight: the rows of each stage, and the held-out text

A corpus may be larger than the memory. Text is therefore read as a stream, once for its hash and once for its
ids. The ids stand on disk, in the folder HYPENET_CACHE or else ~/.cache/hypenet/text. Whoever needs the space
may remove that folder at any time.
"""
import bisect
import codecs
import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import random
import re
import sys
import sysconfig
import tempfile
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hypenet import write_file
from support.common import hash_file, read_json, write_json
from support.tokens import Tokenizer

FINEWEB = "kjj0/fineweb10B-gpt2"                     # a data set of the hub, encoded by GPT-2's tokenizer
SHARD = 10 ** 8                                      # tokens of each of its shards
SHARDS = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 103))]
MAGIC = 20240520                                     # the first number of a shard
GPT2_END = 50256                                     # GPT-2's end of a document, its largest id

KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet", ".bin")
PIECE = 2 ** 16                                      # characters; a .txt is cut into documents of this size
LONGEST = 2 ** 22                                    # characters of a document; a longer one is cut
LINE = 2 ** 28                                       # characters of a line of .jsonl, at most
HELD_OUT = 2 ** 22                                   # held-out tokens of a source, at most
FIRST = 2 ** 20                                      # tokens of a shard that are judged at the start

SMALL = 2 ** 24                                      # characters; less text is encoded at every start
BATCH = 2 ** 19                                      # characters that a thread encodes at once
FORMAT = 2                                           # of the cache: count up if a text gets other ids
INDEX = [("n_ids", "<i8"), ("is_held_out", "?")]     # of each document in the cache


# ---- what --data names -------------------------------------------------------------------------------------


def data_files(path):
    """The files of text or tokens that a path of --data stands for; [] for stdlib and teacher, which have
    none. ValueError if another path has none."""
    if path in ("stdlib", "fineweb", "teacher"):
        return SHARDS if path == "fineweb" else []
    if not os.path.exists(path):
        raise ValueError(f"--data {path}: not found; give files, folders, stdlib, fineweb or teacher")

    def unreadable(error):
        raise ValueError(f"--data {path}: the folder {error.filename} cannot be read ({error.strerror}); "
                         "make it readable, or leave it out")
    inside = [os.path.join(".", path) if path in SHARDS else path]    # else it would be fetched
    if os.path.isdir(path):
        inside = []
        for folder, _, names in os.walk(Path(path), onerror=unreadable):
            inside += [os.path.join(folder, name) for name in names]
    found = sorted(p for p in inside if p.endswith(KINDS) and os.path.isfile(p))
    if not found:
        raise ValueError(f"--data {path}: no file there ends in {', '.join(KINDS)}")
    return found


def data_sources(data):
    """[(paths, share of the rows)] of --data. Each path with a weight is a source; paths without weights are
    one source together. ValueError if only some paths have a weight, if fineweb or teacher stands beside
    others without a weight, or if a weight is not above 0."""
    names = []
    for item in data:
        names += [item] if os.path.exists(item) else item.split(",")
    found = [(n, "") if os.path.exists(n) or ":" not in n else n.rsplit(":", 1) for n in names]
    weighted = any(weight for _, weight in found)
    if not weighted and (len(names) == 1 or not {"fineweb", "teacher"} & set(names)):
        return [(names, 1.0)]
    try:
        weights = np.array([float(weight) for _, weight in found])
    except ValueError:
        weights = np.zeros(1)
    with np.errstate(all="ignore"):
        shares = weights / weights.sum()
    if not (weights.min() > 0 and shares.min() > 0):                # not for NaN, nor where the sum overflows
        raise ValueError(f"--data {' '.join(data)}: give each path a weight above 0, as in web/:0.7 "
                         "code/:0.3; only files, folders and stdlib may go without")
    return [([path], share) for (path, _), share in zip(found, shares)]


# ---- documents ---------------------------------------------------------------------------------------------


def stdlib_files():
    """(path, group) of every source file of this Python's standard library, without tests and site-packages.
    A group is a top-level module or package."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                yield path, os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py")


def documents(files):
    """(group, text) of every document of [(path, group)], as a stream.

    A file with a group is one document. In a file without a group (None), each line of .jsonl and each row of
    .parquet is a document, and a .txt is cut at line ends into documents; each text is its own group. A group
    stands on one side of the held-out split, so that no copy of a held-out text is trained on."""
    for path, group in files:
        if group is not None:
            with open(path, encoding="utf-8", errors="replace") as f:
                yield group, f.read()
            continue
        for text in texts_of(path):
            for start in range(0, max(1, len(text)), LONGEST):
                yield text, text[start:start + LONGEST]


def texts_of(path):
    """The texts of a file, one after the other. ValueError if the file is not what its name says."""
    try:
        if path.endswith(".parquet"):
            yield from parquet_texts(path)
        elif path.endswith((".jsonl", ".jsonl.gz")):
            yield from jsonl_texts(path)
        else:
            yield from txt_texts(path)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ValueError(f"--data {path}: damaged; copy it again") from None


@contextmanager
def open_text(path):
    """A file of text, gzipped or not, open for reading. ValueError if the file begins as UTF-16 does."""
    unpack = gzip.open if path.endswith(".gz") else open
    with unpack(path, "rb") as raw:
        if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"--data {path}: text in UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        raw.seek(0)
        yield io.TextIOWrapper(raw, "utf-8-sig", "replace")


def jsonl_texts(path):
    with open_text(path) as f:
        for i, line in enumerate(iter(partial(f.readline, LINE), "")):
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f"--data {path}: line {i + 1} is no JSON object with a string as field text")
            yield text


def txt_texts(path):
    """Pieces of PIECE characters and the rest of their last line."""
    with open_text(path) as f:
        for text in iter(partial(f.read, PIECE + 1), ""):
            if not text.endswith("\n"):
                text += f.readline(LONGEST - len(text))
            if 16 * text.count("\0") > len(text):
                raise ValueError(f"--data {path}: full of NULs; give text in UTF-8")
            yield text


def parquet_texts(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"--data {path}: reading .parquet needs pyarrow; pip install pyarrow, or give .jsonl"
                         ) from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"]):
            texts = batch.column("text").to_pylist()
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            yield from texts
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"--data {path}: no table with a column text of strings; copy it again, or give "
                         ".jsonl") from None


# ---- documents -> ids --------------------------------------------------------------------------------------


def id_type(tokenizer):
    """The smallest type of numpy that holds every id."""
    return np.min_scalar_type(tokenizer.n_vocab - 1)


def encode_documents(tokenizer, texts):
    """The ids of each text, with the ids that begin and end a document."""
    found = tokenizer.encode_batch(texts)
    begin = np.array([] if tokenizer.bos is None else [tokenizer.bos], np.int32)
    end = np.array([tokenizer.end], np.int32)
    return [np.concatenate((begin, ids, end)).astype(id_type(tokenizer)) for ids in found]


def batches(files):
    """The texts of all documents, in lists of about BATCH characters."""
    texts = []
    size = 0
    for _, text in documents(files):
        texts.append(text)
        size += len(text)
        if size >= BATCH:
            yield texts
            texts = []
            size = 0
    yield texts


def progress(what, total=None, unit="char"):
    """A bar of characters or tokens, with the time left where their number is known."""
    return tqdm(desc=f"{what:9s}", total=total, unit=unit, unit_scale=True, dynamic_ncols=True, delay=1)


def encode_all(files, tokenizer, n_chars, out):
    """Write the ids of all documents, in their order, to the open file `out`. Returns the number of ids of
    each document, (documents,) int64. n_chars: characters of text in all.

    One thread per core encodes. Threads suffice, because tokenizers release Python's lock while they work.
    Processes would need a fork, which CUDA forbids, or a copy of the whole program each."""
    n_ids = array("q")
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool, progress("encode", n_chars) as bar:
        coming = deque()                                            # of encoded batches, the oldest first

        def write_oldest():
            for ids in coming.popleft().result():
                out.write(ids)
                n_ids.append(len(ids))
        for texts in batches(files):
            coming.append(pool.submit(encode_documents, tokenizer, texts))
            if len(coming) > 2 * n_threads:                         # enough to keep all threads busy
                write_oldest()
            bar.update(sum(map(len, texts)))
        while coming:
            write_oldest()
    out.flush()
    return np.array(n_ids, np.int64)


# ---- the cache of ids --------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """What a first reading of the text tells."""
    name: str                        # a hash of the text and its groups
    sha256: str                      # a hash of the text, and of where each document ends
    is_held_out: np.ndarray          # (documents,) bool: one group in 16, the same groups on every machine
    n_chars: int


class Encoded(NamedTuple):
    """The ids of documents, one document after the other."""
    ids: object                      # a function that returns them all: an array, or a memory map of a file
    n_ids: np.ndarray                # (documents,) int64: the length of each
    is_held_out: np.ndarray          # (documents,) bool
    sha256: str                      # of the text


def survey(files):
    """Read all documents once: their Survey."""
    sha256 = hashlib.sha256()
    name = hashlib.sha256()
    is_held_out = bytearray()
    n_chars = 0
    with progress("read") as bar:
        for group, text in documents(files):
            data = text.encode("utf-8", "replace")
            group = data if group is text else group.encode("utf-8", "replace")
            side = hashlib.sha256(b"hypenet" + group).digest()
            sha256.update(len(data).to_bytes(8, "little"))
            sha256.update(data)
            name.update(side)
            is_held_out.append(side[-1] % 16 == 0)
            n_chars += len(text)
            bar.update(len(text))
    name.update(sha256.digest())
    return Survey(name.hexdigest(), sha256.hexdigest(), np.frombuffer(is_held_out, bool), n_chars)


def cache_path(name):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(os.environ.get("HYPENET_CACHE") or os.path.join(cache, "hypenet", "text"), name)


def shard_path(name, tokenizer):
    """Where the ids of a text are, without the ending: a hash of the text's name and of the tokenizer."""
    facts = json.dumps([FORMAT, name, tokenizer.digest()])
    return cache_path(hashlib.sha256(facts.encode()).hexdigest()[:32])


def state_of(files):
    """A name for the present state of files, and the time of their last change in seconds. No file is read.
    The change time (ctime) is part of the state because programs can set a modification time back."""
    facts = [FORMAT]
    changed = 0
    for path, _ in files:
        stat = os.stat(path)
        facts += [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        changed = max(changed, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32], changed / 1e9


def encoded_in(file, index, tokenizer, sha256):
    """The Encoded of a file of ids. Each call of ids() maps the file anew, because pages that were read count
    as memory of this process as long as they are mapped."""
    kind = id_type(tokenizer)
    return Encoded(lambda: np.asarray(np.memmap(file, kind, "r")), index["n_ids"].copy(),
                   index["is_held_out"].copy(), sha256)


def open_shard(name, sha256, tokenizer):
    """The Encoded of a shard in the cache, or None if no whole one is there."""
    path = shard_path(name, tokenizer)
    try:
        index = np.load(path + ".npy").astype(INDEX)
        file = open(path + ".ids", "rb")                            # stays open, should the cache be removed
    except (OSError, ValueError, EOFError):
        return None
    if os.fstat(file.fileno()).st_size != index["n_ids"].sum() * id_type(tokenizer).itemsize:
        file.close()
        return None
    return encoded_in(file, index, tokenizer, sha256)


def remove_shard(name, tokenizer):
    """Remove a shard from the cache if it is there."""
    for ending in (".npy", ".ids"):
        with suppress(OSError):
            os.unlink(shard_path(name, tokenizer) + ending)


def write_shard(name, sha256, tokenizer, write):
    """Keep the ids of a text in the cache, or in a temporary file if the cache cannot be written. write(file)
    writes all ids to an open file and returns their INDEX. The index is written last: where an index is, the
    ids are whole."""
    path = shard_path(name, tokenizer)

    def write_ids(tmp):
        nonlocal index
        with open(tmp, "wb") as f:
            index = write(f)

    def write_index(tmp):
        with open(tmp, "wb") as f:
            np.save(f, index)
    index = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for left in Path(os.path.dirname(path)).glob("*.tmp*"):     # by a run that was killed
            if left.stat().st_mtime < time.time() - 3600:           # else another run may be writing the file
                left.unlink(missing_ok=True)
        write_file(path + ".ids", write_ids)
        write_file(path + ".npy", write_index)
        file = open(path + ".ids", "rb")
    except OSError as e:
        print(f"the cache cannot be written ({e}); the ids go to a temporary file. Let HYPENET_CACHE name a "
              "folder with room", file=sys.stderr)
        file = tempfile.TemporaryFile()
        index = write(file)
    return encoded_in(file, index, tokenizer, sha256)


def load_text(files, tokenizer):
    """The ids of [(path, group)].

    Little text is encoded at every start, in memory. Other text is encoded once, into the cache. To hash much
    text takes time too, so the cache also stores, for each state of the files (sizes and times), the name of
    their text. Files that changed in the last 2 seconds get no note: the clock of a file system is coarse,
    and a second change could leave the same times."""
    began = time.time()
    state, changed = state_of(files)
    try:
        note = read_json(cache_path(""), f"{state}.json", "note")
        encoded = open_shard(note["name"], note["sha256"], tokenizer)
    except (OSError, ValueError, KeyError):
        encoded = None
    if encoded:
        return encoded
    found = survey(files)

    def write(file):
        n_ids = encode_all(files, tokenizer, found.n_chars, file)
        if state_of(files)[0] != state:
            raise ValueError("--data: a file changed while it was read; start again")
        index = np.zeros(len(n_ids), INDEX)
        index["n_ids"] = n_ids
        index["is_held_out"] = found.is_held_out
        return index
    if found.n_chars < SMALL:
        file = io.BytesIO()
        n_ids = write(file)["n_ids"]
        ids = np.frombuffer(file.getbuffer(), id_type(tokenizer))
        encoded = Encoded(lambda: ids, n_ids, found.is_held_out, found.sha256)
    else:
        given = found.name, found.sha256, tokenizer
        encoded = open_shard(*given) or write_shard(*given, write)
        if changed < began - 2 and state_of(files)[0] == state:
            with suppress(OSError):
                write_json(cache_path(f"{state}.json"), dict(name=found.name, sha256=found.sha256))
    return encoded


# ---- ids that others have encoded --------------------------------------------------------------------------


@lru_cache(None)
def read_shard(path):
    """Ids (n,) of a shard in the format of llm.c, a memory map. The file has 256 int32 (magic, version 1, n),
    then n uint16: ids of GPT-2, with the end id before each document. A name in SHARDS is fetched from the
    hub. ValueError if the file is anything else."""
    least = 0                                                       # tokens
    if path in SHARDS:
        from huggingface_hub import hf_hub_download
        least = SHARD
        try:
            path = hf_hub_download(FINEWEB, path, repo_type="dataset")
        except Exception as e:                                      # the hub's, the network's, the disk's
            raise ValueError(f"--data fineweb: cannot fetch {path} of {FINEWEB} ({str(e)[:200]}); see to "
                             "the network and the disk, or give --data of your own") from None
    header = np.fromfile(path, "<i4", 256).tolist()
    whole = len(header) == 256 and os.path.getsize(path) == 1024 + 2 * header[2]
    if not whole or header[:2] != [MAGIC, 1] or header[2] < least:
        raise ValueError(f"{path} is no whole shard of tokens (256 int32, {MAGIC}, 1, n ...; n uint16); "
                         "remove it or fetch it again")
    return np.memmap(path, "<u2", "r", offset=1024)


def shard_ids(path, places):
    """The ids of a shard at some places (an index of numpy's). ValueError if GPT-2 has no such id."""
    ids = read_shard(path)[places]
    if ids.max(initial=0) > GPT2_END:
        raise ValueError(f"{path} holds the id {ids.max():,}, but GPT-2's ids end at {GPT2_END:,}; give "
                         "text, or a shard that GPT-2's tokenizer has encoded")
    return ids


# ---- documents in a row ------------------------------------------------------------------------------------


class Joined:
    """Some encoded documents, in an order of their own, joined into one long sequence of ids."""

    def __init__(self, encoded, order):
        self.ids = encoded.ids
        self.n_ids = encoded.n_ids[order]
        self.starts = (np.cumsum(encoded.n_ids) - encoded.n_ids)[order]     # where each begins in the file
        self.places = np.cumsum(self.n_ids) - self.n_ids                    # and where in this sequence

    def __len__(self):
        return int(self.n_ids.sum())

    def read(self, at, n):
        """The ids from place `at` on, n or as many as there are."""
        ids = self.ids()
        found = [ids[:0]]
        i = max(0, np.searchsorted(self.places, at, "right") - 1)   # the document that holds the place
        while n > 0 and i < len(self.n_ids):
            skip = at - self.places[i]
            size = min(n, self.n_ids[i] - skip)
            found.append(ids[self.starts[i] + skip:self.starts[i] + skip + size])
            at += size
            n -= size
            i += 1
        return np.concatenate(found)


class Source:
    """Documents in a row, each with the end id after it, and held_out (n,), the ids that no row has.

    All text is the first part of a source, its documents in an order that the seed draws. Each shard is a
    further part. Held out are one group of text in 16, and the beginning of shards with "val" in their names.

    A source is read in cells of `cell` ids, part after part. Each epoch draws a new order of the cells of a
    part, and reads each cell once. The number of a cell says where it is. A run that goes on therefore needs
    to know only how many cells it took."""

    def __init__(self, paths, tokenizer, seed, cell, write=None):
        """write: see Corpus, here without arguments."""
        self.tokenizer = tokenizer
        self.seed = seed
        self.cell = cell
        self.order = lru_cache(8)(self.order)
        files = [p for path in paths for p in data_files(path)]
        text_files = list(stdlib_files()) if "stdlib" in paths else []
        text_files += [(p, None) for p in files if not p.endswith(".bin")]
        if "teacher" in paths and write is None:
            raise ValueError("--data teacher: no teacher is here to write text, only in a conversion by "
                             "halo.py; give files, folders, stdlib or fineweb")
        encoded = write() if "teacher" in paths else load_text(text_files, tokenizer)
        self.n_documents = len(encoded.n_ids)
        order = array("q", range(self.n_documents - int(encoded.is_held_out.sum())))
        random.Random(seed).shuffle(order)
        train = Joined(encoded, np.flatnonzero(~encoded.is_held_out)[np.array(order, int)])
        held_out = Joined(encoded, np.flatnonzero(encoded.is_held_out)).read(0, HELD_OUT)
        self.parts = [train]                                        # text, then the paths of shards
        self.sizes = [len(train)]
        self.names = [encoded.sha256] if self.n_documents else []   # of all that is read, for Corpus.facts
        held_out = [held_out, *self.add_shards([p for p in files if p.endswith(".bin")])]
        self.held_out = np.concatenate(held_out)[:HELD_OUT].astype(np.int32)
        self.begins = np.cumsum([0] + [max(0, n - 1) // cell for n in self.sizes]).tolist()   # in cells
        if not self.begins[-1]:
            raise ValueError(f"--data {' '.join(paths)}: too few tokens to train on in sequences of {cell:,}")

    def add_shards(self, paths):
        """Make each shard a part. Returns the beginnings of those that are held out. All headers are judged
        before a tokenizer is fetched to decode the shards."""
        local = [path for path in paths if path not in SHARDS]
        for path in local:
            shard_ids(path, slice(FIRST))                           # foreign ids fail now
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip(local, pool.map(hash_file, local)))
        lengths = [SHARD if path in SHARDS else len(read_shard(path)) for path in paths]
        ours = self.tokenizer
        is_gpt2 = ours.n_vocab == GPT2_END + 1 and ours.encode("Hello world") == [15496, 995]
        self.gpt2 = None if is_gpt2 or not paths else Tokenizer.load("gpt2")
        held_out = []
        for path, n in zip(paths, lengths):
            name = os.path.basename(path)
            self.names.append(f"{name} {n} {hashes.get(path, '')}")
            if "val" in name:
                held_out.append(self.from_gpt2(shard_ids(path, slice(HELD_OUT))))
                continue
            self.parts.append(path)
            self.sizes.append(n)
        return held_out

    def from_gpt2(self, ids):
        """Ids of a shard -> ids of the tokenizer: the same if it is GPT-2's, else by way of their text."""
        if self.gpt2 is None:
            return ids
        texts = []
        for document in np.split(ids, np.flatnonzero(ids == GPT2_END)):
            if len(document):
                texts.append(self.gpt2.decode(document[document != GPT2_END].tolist()))
        return np.concatenate([ids[:0], *encode_documents(self.tokenizer, texts)])

    def order(self, k):
        """Where the cells of the k-th part begin, in the order of reading; k counts on through all epochs."""
        n = self.sizes[k % len(self.parts)] - 1
        rng = np.random.default_rng([self.seed, k])
        return rng.integers(n % self.cell + 1) + self.cell * rng.permutation(n // self.cell)

    def read(self, c, start, n):
        """Ids (n,) int64 from place `start` of cell c on; c counts on through all epochs."""
        epoch, c = divmod(c, self.begins[-1])
        j = bisect.bisect(self.begins, c) - 1                       # the part
        at = self.order(epoch * len(self.parts) + j)[c - self.begins[j]] + start
        if j == 0:
            ids = self.parts[0].read(at, n)
        elif self.gpt2 is None:
            ids = shard_ids(self.parts[j], slice(at, at + n))
        else:
            ids = self.read_from_gpt2(self.parts[j], at, n)
        return ids.astype(np.int64)

    def read_from_gpt2(self, path, at, n):
        """n ids of the tokenizer for the text of a shard from place `at` on. The shard goes on from its start
        at its end."""
        size = n                                                    # of GPT-2's ids: as many as give n
        while True:
            size += n // 4 + 1
            places = np.arange(at, at + size) % len(read_shard(path))
            ids = self.from_gpt2(shard_ids(path, places))
            if len(ids) >= n:
                return ids[:n]


# ---- rows of every stage -----------------------------------------------------------------------------------


class Corpus:
    """Text to train on, and held_out (n,) int32, the ids of text to measure on.

    data: what --data lists, or None for the standard library. Sources are mixed in shares of the rows.
    cell: text is shuffled in stretches of so many ids; no sequence of a stage may be longer.
    write: the function that gives the source "teacher", from its share of the rows to Encoded.
    ValueError if there is too little text."""

    def __init__(self, tokenizer, data=None, seed=0, cell=1024, write=None):
        self.tokenizer = tokenizer
        self.seed = seed
        self.cell = cell
        self.paths, shares = zip(*data_sources(data or ["stdlib"]))
        self.shares = np.array(shares)
        self.taken = np.zeros(len(shares), int)                     # cells of each source, by stages
        self.sources = [Source(paths, tokenizer, seed, cell, write and partial(write, share))
                        for paths, share in zip(self.paths, shares)]
        tokens = sum(sum(source.sizes) + len(source.held_out) for source in self.sources)
        if not data and tokens < 2e6:
            raise ValueError(f"only {tokens:,} tokens of source in Python's standard library (stripped?); "
                             "give text of your own with --data")
        self.held_out = np.concatenate([source.held_out for source in self.sources])
        self.written = None                                         # a Joined: what the teacher wrote
        if ["teacher"] in self.paths:
            self.written = self.sources[self.paths.index(["teacher"])].parts[0]
        names = sum([source.names for source in self.sources], [])
        sha256 = names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()
        self.facts = dict(name=" ".join(data or ["stdlib"]), python=platform.python_version(), tokens=tokens,
                          documents=sum(s.n_documents for s in self.sources), sha256=sha256)

    def split(self, rows):
        """How many of the first `rows` rows of a stage each source gives: (sources,)."""
        n = np.floor(self.shares * rows + 1e-6).astype(int)
        n[self.shares.argmax()] += rows - n.sum()
        return n

    def advance(self, plan):
        """Count the cells of a stage as taken, so that the next stage begins after them."""
        rows_in_cell = self.cell // plan.length
        self.taken = self.taken + np.ceil(self.split(plan.steps * plan.batch) / rows_in_cell).astype(int)

    def rows(self, stage, plan):
        """The rows of a stage, a function of the step -> (batch, length + 1) int64. The stage takes cells of
        each source in turn and cuts them into rows, shuffled in blocks of 2^24 tokens. The last id of one row
        is the first of the next."""
        total = plan.steps * plan.batch
        in_cell = self.cell // plan.length                          # rows of a cell
        size = max(plan.batch, 2 ** 24 // plan.length)              # rows of a block
        key = [self.seed, zlib.crc32(stage.encode())]
        taken = self.taken

        @lru_cache(2)
        def block(b):                                               # (rows, 3): source, cell, start in it
            places = []
            firsts = self.split(b * size)
            ends = self.split(min(total, (b + 1) * size))
            for source in range(len(self.sources)):
                i = np.arange(firsts[source], ends[source])
                cells = taken[source] + i // in_cell
                places.append(np.stack((np.full(len(i), source), cells, i % in_cell * plan.length), 1))
            return np.random.default_rng([*key, b, 2]).permutation(np.concatenate(places))

        def rows_of(step):
            rows = []
            for i in range(step * plan.batch, (step + 1) * plan.batch):
                source, cell, start = block(i // size)[i % size]
                rows.append(self.sources[source].read(cell, start, plan.length + 1))
            return np.stack(rows)
        return rows_of

    # ---- held-out text

    @cached_property
    def prose(self):
        """Held-out ids (n,) of natural text: of the standard library its docstrings, of other text all."""
        if self.paths != (["stdlib"],):
            return self.held_out
        text = self.tokenizer.decode(self.held_out.tolist())
        found = re.findall(r'^ *r?"""([A-Z](?:(?!""").)*)', text, re.DOTALL | re.MULTILINE)
        prose = "\n\n".join(inspect.cleandoc(string) for string in found if len(string) > 200)
        return self.tokenizer.encode_array(prose) if prose else self.held_out

    def windows(self, rng, batch, length, prose=False):
        """(batch, length) int64: stretches of held-out text from random places. Prose is short: a longer
        stretch begins anew at the end of the prose."""
        ids = self.prose if prose else self.held_out
        n_places = len(ids) if prose else len(ids) - length + 1
        if n_places < 1:
            raise ValueError(f"the held-out text has {len(ids):,} tokens, too few for a sequence of "
                             f"{length:,}; give more --data (1/16 of text, shards with val in the name)")
        starts = rng.integers(0, n_places, batch)
        return np.stack([ids.take(np.arange(s, s + length), mode="wrap") for s in starts]).astype(np.int64)

    def held_out_batches(self, length, count, seed=0):
        """[(idx, targets)]: `count` sequences of held-out text, (b,length) each, the same at every call."""
        rows = torch.from_numpy(self.windows(np.random.default_rng([seed, 1]), count, length + 1))
        return [(part[:, :-1], part[:, 1:]) for part in rows.split(max(1, 2 ** 14 // length))]
