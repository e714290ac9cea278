"""Text that a teacher writes itself, for whoever lacks the text that the teacher was trained on.

    teacher_text         the Encoded text of --data teacher: written once, then kept in the cache of text
    write_together       under torchrun, the parts of this text, by all processes of a machine
    teacher_documents    the documents, one after the other
    Writer               the teacher at work: many rows at once, each writes one document after the other

The teacher draws each id at temperature 1, from its own distribution. A base model begins a document as in
its training: with bos, or with the end id that stands between documents. An instruct model begins every
second document with the chat template. There it writes the user's question first, and then its own answer.
"""
import hashlib
import json
import math
from datetime import datetime

import numpy as np
import torch

from hypenet import State, sample
from support import text, world
from support.fast import Decoder
from support.pretrained import digest

LENGTH = 1024                        # tokens of a document, at most
ROWS = 512                           # documents that a GPU writes at once, at most
AT_ONCE = 64                         # tokens of each row between two copies to the host
FREE = -1                            # in a script: the teacher draws ids here
DAY = datetime(2026, 1, 1)           # for chat templates that write a date: a text is the same every day
PART = 2 ** 22                       # tokens that one process writes in one go, at most


def scripts(tokenizer):
    """What documents consist of, a list for each kind: ids, and FREE where the teacher draws ids up to a
    stop. Each list ends with the end id."""
    begin = tokenizer.end if tokenizer.bos is None else tokenizer.bos
    found = [[begin, FREE, tokenizer.end]]
    if tokenizer.config.get("chat_template"):
        question = "QUESTION7d1f"                                   # no template has this word
        prompt = tokenizer.chat([dict(role="user", content=question)], DAY)
        before, _, after = (tokenizer.encode(part, special=True) for part in prompt.partition(question))
        answer = [*after, FREE] if after else []
        found.append([*(before or [begin]), FREE, *answer, tokenizer.end])
    return found


class Writer:
    """A teacher that writes documents in many rows.

    All scripts make up one long script, which each row follows round and round. `at` (rows,) is the place of
    the next id in the script. Each document begins at position 0, where the state holds nothing: no document
    sees another. All this happens on the device, so that a CUDA graph holds it and the host never waits."""

    def __init__(self, model, tokenizer, seed, rows, length):
        device = model.wte.weight.device
        each = scripts(tokenizer)
        sizes = torch.tensor([len(script) for script in each], device=device)
        starts = sizes.cumsum(0) - sizes
        self.script = torch.tensor(sum(each, []), device=device)
        self.ends = (sizes.cumsum(0) - 1).repeat_interleave(sizes)  # the place where a place's document ends
        self.begins = torch.zeros_like(self.script, dtype=torch.bool).index_fill(0, starts, True)
        self.stops = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.stops[sorted(tokenizer.stops)] = True
        self.never = torch.tensor(tokenizer.holes, dtype=torch.int64, device=device)
        self.n_vocab = tokenizer.n_vocab
        self.length = length
        self.state = model.init_state(rows, length)
        self.rng = torch.Generator(device).manual_seed(seed)
        self.at = starts[torch.arange(rows, device=device) % len(each)]
        self.decoder = Decoder(model, self.state, pick=self.pick, rng=self.rng)
        self.decoder.idx.copy_(self.script[self.at])
        self.at.add_(1)

    def pick(self, logits):
        """The next id of each row (rows,): given by the script, or drawn."""
        logits = logits[:, :self.n_vocab]
        if len(self.never):
            logits = logits.index_fill(-1, self.never, -math.inf)
        drawn = sample(logits, temperature=1.0, rng=self.rng)
        at = self.at
        pos = self.state.pos                                        # of the next id
        pos.mul_(~self.begins[at])
        at.add_((self.script[at] == FREE) & self.stops[drawn])      # after a stop, the script goes on
        at.copy_(torch.where(pos == self.length - 1, self.ends[at], at))            # no room: the end id
        ids = self.script[at]
        at.add_(ids != FREE).remainder_(len(self.script))
        return torch.where(ids == FREE, drawn, ids)

    @torch.no_grad()
    def write(self, n):
        """The next n ids of each row, (rows, n) numpy int64. The last id of a document is given as ~id."""
        found = self.at.new_empty(n, len(self.at))
        for ids in found:
            idx = self.decoder.idx
            ids.copy_(torch.where(self.begins[self.at], ~idx, idx))
            self.decoder.held = 0                                   # a row never holds more than `length`
            self.decoder()
        return found.T.cpu().numpy()


def n_rows(model, length):
    """How many rows to write at once: their state may take a third of a GPU's memory."""
    device = model.wte.weight.device
    if device.type != "cuda":
        return 32
    one = sum(State(model.config, 1, length, "meta", model.wte.weight.dtype).nbytes())
    return max(1, min(ROWS, torch.cuda.get_device_properties(device).total_memory // 3 // one))


def teacher_documents(model, tokenizer, n_tokens, seed=0, rows=None):
    """Documents that the model writes, arrays of ids, about n_tokens in all or more. A document ends with the
    end id. It begins with bos, if the tokenizer has bos, or as the chat template begins.

    Every document that was begun is ended, because unfinished documents are mostly long ones. One that
    reaches LENGTH is cut there."""
    length = min(LENGTH, model.config.max_len)
    rows = min(rows or n_rows(model, length), max(1, n_tokens // length))
    writer = Writer(model, tokenizer, seed, rows, length)
    begun = {row: [] for row in range(rows)}                        # the parts of each row's document
    n = 0                                                           # tokens of all documents
    with text.progress("teacher", n_tokens, "tok") as bar:
        while begun:
            enough = n >= n_tokens
            n_before = n
            found = writer.write(AT_ONCE)
            for row in list(begun):
                *ends, rest = np.split(found[row], np.flatnonzero(found[row] < 0) + 1)
                for part in ends:
                    ids = np.concatenate([*begun[row], part])
                    ids[-1] = ~ids[-1]
                    if tokenizer.bos is None and ids[0] == tokenizer.end:
                        ids = ids[1:]                               # it ends the document before
                    yield ids
                    n += len(part)
                    begun[row] = []
                    if enough:
                        del begun[row]
                        break
                else:
                    begun[row].append(rest)
                    n += len(rest)
            bar.update(n - n_before)


def name_of(path, tokenizer, n_tokens, seed):
    """A name for what a teacher writes: hashes of its files, and what it was asked for. The name of a shard
    has the tokenizer's digest and the FORMAT of the cache besides."""
    template = tokenizer.config.get("chat_template")
    return json.dumps(["teacher", n_tokens, seed, LENGTH, sorted(tokenizer.stops), template, digest(path)])


def order_of(path, tokenizer, n_tokens, seed):
    """The name of a text, its tokens, and (name, tokens, seed) of its parts. It has n_tokens to train on, and
    1/15 more to hold out."""
    n_tokens = math.ceil(n_tokens * 16 / 15)
    n_parts = math.ceil(n_tokens / PART)
    name = name_of(path, tokenizer, n_tokens, seed)
    parts = [(f"{name} part {i}", math.ceil(n_tokens / n_parts), seed + 10 ** 6 * i) for i in range(n_parts)]
    return name, n_tokens, parts


def write_part(model, tokenizer, name, n_tokens, seed):
    """The Encoded of a part, from the cache or written now."""
    kind = text.id_type(tokenizer)

    def write(file):
        index = []
        for ids in teacher_documents(model, tokenizer, n_tokens, seed):
            data = ids.astype(kind).tobytes()
            file.write(data)
            index.append((len(ids), hashlib.sha256(b"hypenet" + data).digest()[-1] % 16 == 0))
        file.flush()
        return np.array(index, text.INDEX)
    return text.open_shard(name, "", tokenizer) or text.write_shard(name, "", tokenizer, write)


def write_together(model, path, tokenizer, n_tokens, seed=0):
    """Let each process of a machine write some parts, before all of them call teacher_text. The text does not
    depend on the number of processes, because each part has a seed of its own."""
    name, _, parts = order_of(path, tokenizer, n_tokens, seed)
    if not text.open_shard(name, "", tokenizer):
        for part in parts[world.LOCAL_RANK::world.LOCAL_SIZE]:
            write_part(model, tokenizer, *part)
    world.total(0)                                                  # all parts are there


def teacher_text(model, path, tokenizer, n_tokens, seed=0, dry_run=False):
    """About n_tokens to train on that the model writes, and 1/15 more to hold out: an Encoded. path: the
    files of the model. What was written before comes from the cache. A dry run writes nothing: end ids stand
    for the text."""
    name, n_tokens, parts = order_of(path, tokenizer, n_tokens, seed)
    encoded = text.open_shard(name, "", tokenizer)
    if dry_run and not encoded:
        length = min(LENGTH, model.config.max_len)
        n = math.ceil(n_tokens / length)
        ids = np.broadcast_to(np.array(tokenizer.end, text.id_type(tokenizer)), n * length)    # no memory
        return text.Encoded(lambda: ids, np.full(n, length), np.arange(n) % 16 == 0, "dry run")

    def write(file):
        index = []
        for part in parts:
            found = write_part(model, tokenizer, *part)
            file.write(found.ids())
            index += zip(found.n_ids, found.is_held_out)
        file.flush()
        index = np.array(index, text.INDEX)
        print(f"the teacher wrote {index['n_ids'].sum():,} tokens in {len(index):,} documents", flush=True)
        return index
    if not encoded:
        encoded = text.write_shard(name, "", tokenizer, write)
        for part, *_ in parts:
            text.remove_shard(part, tokenizer)
    found = hashlib.sha256(encoded.ids())
    found.update(encoded.n_ids)
    return encoded._replace(sha256=found.hexdigest())
