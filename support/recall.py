"""Hidden things in text: how they are hidden, asked for and measured.

A model that predicts plain text well need not recall a detail of it. Training therefore hides things in the
text and asks for them (training_rows, hide), and tests ask for things after any amount of text (recall).

    TASKS            what tests hide, in the spirit of RULER (arXiv 2404.06654)
    written_tasks    tasks whose answer the model writes: multi-query, and a question to a chat model
    plant            hides what a task asks for in a text, and asks
    reworded, again  other hidden things: values after words of the text, and repeated passages
    Chats            other rows for training: a question of the teacher's after a long text
    training_rows    rows of a corpus, a share of them with something to recall
    recall           for each answer its log-probability, and whether the model finds it
    written          the share of values that stand in what a model writes
"""
import re
import string
import zlib
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch

from support import fast, world
from support.run import bf16
from support.writer import DAY, FREE, scripts

KEY_NAMES = tuple("amber basalt cedar dahlia ember fennel garnet heron indigo jasper kestrel larch marble "
                  "nettle opal pepper quartz raven saffron thistle".split())

# `reworded` draws from these: what joins words and value, what ends a sentence, what a value is made of.
JOINTS = (" is", " was", " has", " =", ":", " equals", " of")
STOPS = ".?!:;,"
SIGNS = string.digits + string.ascii_lowercase


class Task(NamedTuple):
    """One kind of thing to find in a text."""
    needle: str                      # the sentence that tells a value
    question: str                    # the words right before the answer; {names}: one question for all
    signs: str                       # the characters that a value is drawn from
    size: int = 5                    # characters of a value
    needles: int = 1                 # needles in a text, each with its own name; a test asks for the first,
                                     # or with {names} for all
    names: tuple = KEY_NAMES         # the names to draw from
    prose: bool = True               # a test hides the needle in natural text, else in text as in training
    lead: str = ""                   # the words before the text, such as the beginning of a chat
    special: bool = False            # the words hold special ids, such as a chat template's
    write: int = 0                   # tokens of an answer that the model writes; 0: it predicts the answer


NUMBER = ("\nThe special magic number for {name} is {value}.\n",
          "\nWhich number was mentioned above? The special magic number for {name} is")

TASKS = {                            # the keys are RULER's names; training hides S1
    "S1": Task("\n# The pass key is {value}. Remember it.\n", "\n# What is the pass key? The pass key is",
               string.digits, prose=False),
    "S2": Task(*NUMBER, string.digits),
    "S3": Task(*NUMBER, "0123456789abcdef", 32),
    "multi-key": Task(*NUMBER, string.digits, needles=4),
}


def written_tasks(tokenizer):
    """Tasks whose answer the model writes. multi-query asks for four values at once. chat is a user's message
    in plain words, for a tokenizer with a chat template."""
    needle, _ = NUMBER
    question = "\nWhich numbers were mentioned above? The special magic numbers for {names} are"
    tasks = {"multi-query": Task(needle, question, string.digits, needles=4, write=64)}
    if tokenizer.template():
        lead, _, end = tokenizer.chat([dict(role="user", content="{text}")], DAY).partition("{text}")
        question = "\n\nWhat is the special magic number for {name}?"
        question += end.replace("{", "{{").replace("}", "}}")       # plant calls str.format
        tasks["chat"] = Task(needle, question, string.digits, lead=lead, special=True, write=32)
    return tasks


# ---- hiding ------------------------------------------------------------------------------------------------


def plant(tokenizer, text, rng, depth=None, ask=1, task="S1"):
    """Hide the values of a task in text (n,) and ask for them: ids (n,), and the length of an answer in ids.

    depth None (training): needles and `ask` questions stand at random places, a needle before its questions.
    With several needles, most places are near the ends of the text, and one question in eight follows its
    needle at once: chance gives a long text few of either. Questions without room are left out.
    depth 0 to 1 (tests): the first needle stands at this share of the text, the other needles anywhere. One
    question for the first needle ends the text.

    A task that predicts ends with its answer. A task that writes ends with room for task.write ids, and these
    begin with the right answer.

    task: a Task, or its name in TASKS. ValueError if the text has no room for needles and one question."""
    assert depth is None or ask == 1, "a test has one question, at its end"
    task = TASKS.get(task, task)
    encode = partial(tokenizer.encode_array, special=True) if task.special else tokenizer.encode_array
    names = rng.permutation(task.names)[:task.needles] if "{name}" in task.needle else [""]
    values = ["".join(task.signs[i] for i in rng.integers(0, len(task.signs), task.size)) for _ in names]
    needles = [encode(task.needle.format(name=name, value=value)) for name, value in zip(names, values)]
    wanted = [", ".join(values)] if "{names}" in task.question else values
    targets = [encode(f" {value}") for value in wanted]
    questions = []
    for name, target in zip(names, targets):
        question = encode(task.question.format(name=name, names=", ".join(names)))
        room = np.zeros(max(0, task.write - len(target)), int)
        questions.append(np.concatenate((question, target, room)))
    lead = encode(task.lead)

    asked = [i % len(questions) for i in range(ask)]                # the name of each question
    left = len(text) - len(lead) - sum(map(len, needles)) - sum(len(questions[i]) for i in asked)
    while left < 0 and len(asked) > 1:
        left += len(questions[asked.pop()])
    if left < 0:
        raise ValueError(f"a text of {len(text)} tokens has no room: the task needs {len(text) - left} "
                         "tokens; use a longer length")

    order = [*range(len(names)), *asked]                            # of names: first told, then asked for
    if depth is None:
        cuts = np.sort(rng.integers(0, left + 1, len(order)))
        if len(names) > 1:                                          # in any order; the sine favours both ends
            order = rng.permutation(order)
            cuts = (left * np.sin(np.pi / 2 * cuts / max(1, left)) ** 2).astype(int)
            for i in range(len(names)):
                first, *rest = np.flatnonzero(order == i)
                cuts[[place for place in rest if rng.random() < 1 / 8]] = cuts[first]
    else:
        cuts = [int(depth * left), *rng.integers(0, max(1, left), len(names) - 1), left]
    parts = [lead]
    at = 0
    told = set()
    for cut, i in sorted(zip(cuts, order), key=lambda pair: pair[0]):
        parts += [text[at:cut], questions[i] if i in told else needles[i]]
        told.add(i)
        at = cut
    return np.concatenate([*parts, text[at:left]]).astype(text.dtype), len(targets[0])


def reworded(tokenizer, ids, rng, most=4):
    """A Task of 1 to `most` values, each asked for by words of the text that it follows.

    A model trained on pass keys alone finds pass keys. A model trained on these finds whatever followed the
    same words earlier. All names begin with the same words (up to 5), so that a name must be read to its
    end. Half of the tasks draw few words at random, so that names resemble each other. The other half takes
    words in a row as the text has them, so that the usual next word is the wrong answer. A value is 3 to 24
    characters long, all digits or drawn from 6 to 36 of the digits and letters."""
    ends = [i for i in (tokenizer.end, tokenizer.bos) if i is not None]
    text = tokenizer.decode(ids[~np.isin(ids, ends)].tolist())
    words = re.findall(r"[^\W\d_]{2,12}", text) or ["number"]
    n = int(rng.integers(1, most + 1))
    pool = rng.integers(0, len(words), n + rng.integers(3, 12))
    in_a_row = rng.random() < 0.5

    def some_words(low, high):
        size = rng.integers(low, high)
        first = rng.integers(len(words))
        return " ".join(words[first:first + size] if in_a_row else [words[i] for i in rng.choice(pool, size)])
    head = some_words(0, 6)
    opening = some_words(0, 5)                                      # words before the question
    joint = JOINTS[rng.integers(len(JOINTS))]
    stop = STOPS[rng.integers(len(STOPS))]
    names = tuple(dict.fromkeys(f"{head} {some_words(1, 4)}".strip() for _ in range(n)))
    signs = "".join(rng.permutation(list(SIGNS))[:rng.integers(6, len(SIGNS) + 1)])
    signs = rng.choice((string.digits, signs))
    size = int(rng.integers(3, 25))
    opening = f"{opening}{stop} " if opening else ""
    return Task("\n{name}" + joint + " {value}.\n", "\n" + opening + "{name}" + joint, signs, size,
                len(names), names)


def again(row, rng, times):
    """Repeat `times` passages of a row of ids (n,), in place, each once and later in the row.

    A passage has 16 to 128 ids, fewer where the row is short, and none overlaps another. Half of the passages
    get a random order of ids in both places: then only the first place can tell what comes in the second."""
    lengths = np.minimum(rng.integers(16, 129, times), len(row) // (2 * times))
    order = rng.permutation(np.repeat(np.arange(times), 2))         # which passage stands in each place
    room = len(row) - lengths[order].sum()
    ends = np.sort(rng.integers(0, room + 1, 2 * times)) + np.cumsum(lengths[order])
    for i, n in enumerate(lengths):
        first, second = ends[order == i] - n
        if rng.random() < 0.5:
            row[first:first + n] = rng.permutation(row[first:first + n])
        row[second:second + n] = row[first:first + n]


class Chats:
    """Chats that a teacher wrote (support/writer.py), to put a long text before the user's question.

    The teacher writes short messages. A user may give a long text, and ask at its end."""

    def __init__(self, corpus):
        script = scripts(corpus.tokenizer)[-1]                      # the chat's, if there is a chat template
        first = script.index(FREE)                                  # the user's question
        self.documents = corpus.written
        self.before = script[:first]
        self.after = script[first + 1:-2]                           # up to the answer; nothing if no template
        self.gap = corpus.tokenizer.encode("\n\n")
        template = self.before + self.after
        spelled = corpus.tokenizer.encode(corpus.tokenizer.decode(template))    # without special ids
        self.special = [*corpus.tokenizer.stops, *set(template).difference(spelled)]

    def draw(self, rng, most):
        """The first `most` ids of a chat, a list, from the user's question on. The question ends in the first
        half of `most`. None if none of 20 documents is such a chat, or without a chat template."""
        n = len(self.after)
        for i in rng.integers(0, len(self.documents.n_ids), 20 if n else 0):
            ids = self.documents.read(self.documents.places[i], self.documents.n_ids[i]).tolist()
            ids, begun = ids[len(self.before):], ids[:len(self.before)]
            if begun == self.before and any(ids[j:j + n] == self.after for j in range(most // 2 - n)):
                return ids[:most]
        return None

    def lengthen(self, row, rng):
        """Make a row of ids (n,) a chat, in place: the user's message is the start of the row's text, without
        stops and ids of the template, and then a question; the answer follows. Returns False, and changes
        nothing, if there is no chat for it or too little text."""
        chat = self.draw(rng, len(row) // 2)
        if chat is None:
            return False
        text = row[~np.isin(row, self.special)]
        n = len(row) - len(self.before) - len(self.gap) - len(chat)
        if len(text) < n:
            return False
        row[:] = np.concatenate((self.before, text[:n], self.gap, chat))
        return True


def more_in(row):
    """The factor by which a long row hides more: the root of its length over 256."""
    return max(1, round((len(row) / 256) ** 0.5))


def hide(tokenizer, row, rng, varied=0.0):
    """Give a row of ids (n,), in place, something to recall.

    A row gets a pass key (S1) and 1 to 3 questions for it. With probability `varied` it gets instead passages
    that come again, or values after words of the text (reworded), half of the time each. A row too short for
    such values gets passages. A long row gets more of these (more_in)."""
    times = int(rng.integers(1, 4))
    if not varied or rng.random() >= varied:
        row[:] = plant(tokenizer, row, rng, ask=times)[0]
        return
    if rng.random() >= 0.5:
        task = reworded(tokenizer, row, rng, 4 * more_in(row))
        with suppress(ValueError):                                  # no room
            row[:] = plant(tokenizer, row, rng, ask=2 * task.needles, task=task)[0]
            return
    again(row, rng, 2 * times * more_in(row))


def training_rows(corpus, stage, plan):
    """The rows of a stage, a function of the step -> (batch, length + 1) int64.

    A share plan.recall of the rows has something to recall, with plan.varied as in `hide`. About a share
    plan.chats of them becomes chats instead, if the teacher wrote any. The first share plan.short of a row
    stays as it is. A share below one row per step gives one row every few steps. A batch depends on seed,
    stage and step alone, so that a stopped run goes on with the same rows."""
    plain_rows = corpus.rows(stage, plan)
    if not plan.recall:
        return plain_rows
    each = plan.recall * plan.batch
    chats = Chats(corpus) if plan.chats and corpus.written else None

    def rows_of(step):
        rows = plain_rows(step)
        rng = np.random.default_rng([corpus.seed, zlib.crc32(stage.encode()), step])
        n = int(each * (step + 1) + 1e-6) - int(each * step + 1e-6)
        for row in rows[:n, int(plan.short * plan.length):]:
            if not (chats and rng.random() < plan.chats and chats.lengthen(row, rng)):
                hide(corpus.tokenizer, row, rng, plan.varied)
        return rows
    return rows_of


# ---- measuring ---------------------------------------------------------------------------------------------


def has_room(task, n, tokenizer):
    """Whether a text of n tokens has room for a task, whatever names and values are drawn (50 draws)."""
    text = np.zeros(min(n, 4096), np.int64)                         # no task needs more
    try:
        for seed in range(50):
            plant(tokenizer, text, np.random.default_rng(seed), 0.5, task=task)
    except ValueError:
        return False
    return True


def make_prompts(corpus, length, trials, seed, task, varied):
    """Prompts (trials, length) that end in their answers, and the length of each answer in ids. The texts are
    held out. The first needle stands at five depths in turn: 0, 1/4, 1/2, 3/4 and 1. A share `varied` of the
    prompts asks for reworded values in place of the task, as far as there is room."""
    rng = np.random.default_rng([seed, length])
    prompts, n_answer = [], []
    for i, text in enumerate(corpus.windows(rng, trials, length, TASKS.get(task, task).prose)):
        depth = i % 5 / 4
        planted = None
        if varied and rng.random() < varied:
            with suppress(ValueError):                              # no room
                other = reworded(corpus.tokenizer, text, rng)
                planted = plant(corpus.tokenizer, text, rng, depth, task=other)
        ids, n = planted or plant(corpus.tokenizer, text, rng, depth, task=task)
        prompts.append(ids)
        n_answer.append(n)
    return np.stack(prompts), n_answer


def shortened(prompts, keep):
    """The first 4 and the last keep - 4 ids of longer prompts. keep None: all ids."""
    if not keep or keep >= prompts.size(1):
        return prompts
    return torch.cat((prompts[:, :4], prompts[:, 4 - keep:]), 1)


def read_end(model, idx, n, state):
    """Read ids (B,T) into a state, in segments. Returns float32 logits (B,n,V) behind the last n ids."""
    cut = idx.size(1) - n
    for part in idx[:, :cut].split(8192 if idx.is_cuda else 1024, dim=1):
        fast.read(model, part, state)
    return model.head(fast.read(model, idx[:, cut:], state)).float()


@torch.no_grad()
def answers(model, prompts, n_answer):
    """Prompts (B,n) that end in answers of n_answer ids -> two tensors (B,n_answer): the log-probability of
    each answer id, and whether the model finds this id the likeliest after the ids before."""
    logits = read_end(model, prompts[:, :-1], n_answer, model.init_state(*prompts.shape))
    target = prompts[:, -n_answer:]
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return logp, logits.argmax(-1) == target


def recall(model, corpus, length, trials, seed=0, task="S1", keep=None, varied=0.0):
    """Ask a model for what a task hides in `length` tokens of held-out text. Two tensors (trials,): the mean
    log-probability of the ids of each answer, and 1.0 where greedy decoding gives the whole answer.

    keep: the model reads only the first 4 and the last keep - 4 tokens of a longer text.
    varied: the share of prompts that ask for reworded values, as training does."""
    prompts, n_answer = make_prompts(corpus, length, trials, seed, task, varied)
    prompts = shortened(torch.from_numpy(prompts), keep)
    most = max(n_answer)
    logp, right = [], []
    for part in world.parts(prompts, max(1, 65536 // prompts.size(1))):
        with bf16():
            found = answers(model, part.to(model.wte.weight.device), most)
        for rows, new in zip((logp, right), found):
            rows += new.cpu()                                       # one tensor a row
    n_answer = world.split(n_answer)
    mean_logp = [x[most - n:].mean() for x, n in zip(logp, n_answer)]
    whole = [x[most - n:].all().float() for x, n in zip(right, n_answer)]
    return torch.stack(world.gather(mean_logp)), torch.stack(world.gather(whole))


@torch.no_grad()
def continued(model, prompts, n, n_vocab):
    """The n ids (B,n) that greedy decoding gives after prompts (B,T)."""
    def pick(logits):
        return logits[:, :n_vocab].argmax(-1)
    state = model.init_state(len(prompts), prompts.size(1) + n)
    decoder = fast.Decoder(model, state, read_end(model, prompts, 1, state)[:, 0], pick)
    return torch.stack([decoder.idx.clone(), *(decoder().clone() for _ in range(n - 1))], 1)


def written(model, corpus, length, trials, task, seed=0, keep=None):
    """Ask as `recall` does, for a task of written_tasks. The model writes task.write ids, or fewer if it ends
    its text. Returns the share of the values asked for that stand in this text, (trials,)."""
    tokenizer = corpus.tokenizer
    prompts, n_answer = make_prompts(corpus, length, trials, seed, task, 0.0)
    prompts = shortened(torch.from_numpy(prompts), keep)
    texts = []
    for part in world.parts(prompts[:, :-task.write], max(1, 65536 // prompts.size(1))):
        found = continued(model, part.to(model.wte.weight.device), task.write, tokenizer.n_vocab)
        for ids in found.tolist():
            texts.append(tokenizer.decode(takewhile(lambda id: id not in tokenizer.stops, ids)))
    shares = []
    for text, ids, n in zip(texts, world.split(prompts[:, -task.write:]), world.split(n_answer)):
        values = tokenizer.decode(ids[:n].tolist()).split(",")
        shares.append(float(np.mean([value.strip() in text for value in values])))
    return torch.tensor(world.gather(shares))
