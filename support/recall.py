"""What is hidden in text and asked for, and how answers are measured."""
import re
import string
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from support.run import bf16


NAMES = tuple("amber basalt cedar dahlia ember fennel garnet heron indigo jasper kestrel larch marble nettle "
              "opal pepper quartz raven saffron thistle".split())


class Task(NamedTuple):
    """Something to find in a text, in the spirit of RULER (arXiv 2404.06654)."""
    needle: str
    question: str
    signs: str                       # what a value is drawn from
    size: int = 5                    # and how many of them it has
    needles: int = 1                 # of so many, under different names; a test asks for the first
    names: tuple = NAMES
    prose: bool = True               # in natural text; else in text like that of training


NUMBER = ("\nThe special magic number for {name} is {value}.\n",
          "\nWhich number was mentioned above? The special magic number for {name} is")


TASKS = {                                                           # training has the first alone
    "S1": Task("\n# The pass key is {value}. Remember it.\n", "\n# What is the pass key? The pass key is",
               "0123456789", prose=False),
    "S2": Task(*NUMBER, "0123456789"),
    "S3": Task(*NUMBER, "0123456789abcdef", 32),
    "multi-key": Task(*NUMBER, "0123456789", needles=4),
}


# S1 in other words, for training: what stands between words and value, what before the words of a question,
# and what a value is made of
JOINTS = (" is", " was", " has", " =", ":", " equals", " of")


STOPS = ".?!:;,"


SIGNS = string.digits + string.ascii_lowercase


def reworded(tokenizer, ids, rng, most=4):
    """S1 in other words: up to `most` values, of 3 to 24 digits or of some digits and letters, each after
    some words of a text, the first of which (up to 5) all have in common; asked for is what follows when the
    same words come again. The words are a few drawn at random, so that names are alike, or stand in a row as
    in the text, so that what usually follows them is not what did here. Who has seen the pass key alone
    can find a pass key; who has seen these, what followed the same words before. Most of a short row is
    these."""
    ends = [i for i in (tokenizer.end, tokenizer.bos) if i is not None]
    text, n = tokenizer.decode(ids[~np.isin(ids, ends)].tolist()), int(rng.integers(1, most + 1))
    words = re.findall(r"[^\W\d_]{2,12}", text) or ["number"]
    few, in_a_row = rng.integers(0, len(words), n + rng.integers(3, 12)), rng.random() < 0.5

    def some(low, high):
        size, first = rng.integers(low, high), rng.integers(len(words))
        return " ".join(words[first:first + size] if in_a_row else [words[i] for i in rng.choice(few, size)])
    head, lead = some(0, 6), some(0, 5)
    joint, stop = JOINTS[rng.integers(len(JOINTS))], STOPS[rng.integers(len(STOPS))]
    names = dict.fromkeys(f"{head} {some(1, 4)}".strip() for _ in range(n))
    some_signs = "".join(rng.permutation(list(SIGNS))[:rng.integers(6, len(SIGNS) + 1)])
    signs, size = rng.choice((string.digits, some_signs)), int(rng.integers(3, 25))
    return Task("\n{name}" + joint + " {value}.\n", "\n" + f"{lead}{stop} " * bool(lead) + "{name}" + joint,
                signs, size, len(names), tuple(names), prose=False)


def again(row, rng, times):
    """So many passages of a row of ids, 16 to 128 each where there is room, stand in it once more, later, and
    none on another; half of them with their ids in a random order, both times, so that nothing but the first
    place can tell what the second will be."""
    lengths = np.minimum(rng.integers(16, 129, times), len(row) // (2 * times))
    order = rng.permutation(np.repeat(np.arange(times), 2))         # of the places, two for each
    room = len(row) - lengths[order].sum()
    ends = np.sort(rng.integers(0, room + 1, 2 * times)) + np.cumsum(lengths[order])
    for i, n in enumerate(lengths):
        first, second = ends[order == i] - n
        if rng.random() < 0.5:
            row[first:first + n] = rng.permutation(row[first:first + n])
        row[second:second + n] = row[first:first + n]


def plant(tokenizer, text, rng, depth=None, ask=1, task="S1"):
    """Hide what a task (its name, or itself) asks for in text (n,), and ask: ids (n,), and how many ids at
    the end of a question are its answer. depth None: needle and questions at random places (training); else
    the needle at that share of the text and the question at its very end (testing). Other needles stand at
    random places. A test's question is for the first needle; in training all are asked for, and of several
    needles and questions more stand near its two ends, of which a long text would have few."""
    assert depth is None or ask == 1, "a test has one question, at its end"
    t = TASKS[task] if isinstance(task, str) else task
    names = rng.permutation(t.names)[:t.needles] if "{name}" in t.needle else [""]
    values = ["".join(t.signs[i] for i in rng.integers(0, len(t.signs), t.size)) for _ in names]
    needles = [tokenizer.encode_array(t.needle.format(name=n, value=v)) for n, v in zip(names, values)]
    answers = [tokenizer.encode_array(f" {v}") for v in values]
    asked = [np.concatenate((tokenizer.encode_array(t.question.format(name=n)), answer))
             for n, answer in zip(names, answers)]
    order = [*range(len(names)), *(i % len(names) for i in range(ask))]        # of names: told, and asked for
    free = len(text) - sum(map(len, needles))
    while (left := free - sum(len(asked[i]) for i in order[len(names):])) < 0 and len(order) > len(names) + 1:
        order.pop()                                                 # a question
    if left < 0:
        raise ValueError(f"{len(text)} tokens have no room for a pass key and its question, "
                         f"{len(text) - left} tokens; use a longer length")
    if depth is None:
        cuts = np.sort(rng.integers(0, left + 1, len(order)))
        if len(names) > 1:                                          # in any order, more near both ends
            order = rng.permutation(order)
            cuts = (left * np.sin(np.pi / 2 * cuts / max(1, left)) ** 2).astype(int)
    else:
        cuts = [int(depth * left), *rng.integers(0, max(1, left), len(names) - 1), left]
    parts, at, told = [], 0, set()
    for cut, i in sorted(zip(cuts, order), key=lambda pair: pair[0]):
        parts += [text[at:cut], (asked if i in told else needles)[i]]
        told, at = told | {i}, cut
    return np.concatenate([*parts, text[at:left]]), len(answers[0])


def has_room(task, n, corpus):
    """Whether a text of n tokens has room for a task, in 50 draws of names and values."""
    try:
        text = np.zeros(min(n, 4096), np.int64)                     # none needs more
        for seed in range(50):
            plant(corpus.tokenizer, text, np.random.default_rng(seed), 0.5, task=task)
    except ValueError:
        return False
    return True


def hide(tokenizer, row, rng, varied=0.0):
    """Give a row of ids (n,), in place, something to recall: a pass key; or, with probability `varied`, in
    equal parts passages that come again and values after other words (a pass key if they have no room). Of
    these a long row has more than a short one, as the root of its length."""
    times, more = int(rng.integers(1, 4)), max(1, round((len(row) / 256) ** 0.5))
    if varied and rng.random() < varied:
        if rng.random() < 0.5:
            return again(row, rng, 2 * times * more)
        task = reworded(tokenizer, row, rng, 4 * more)
        with suppress(ValueError):                                  # no room
            row[:] = plant(tokenizer, row, rng, ask=2 * task.needles, task=task)[0]
            return
    row[:] = plant(tokenizer, row, rng, ask=times)[0]


@torch.no_grad()
def answers(model, prompts, n_answer):
    """Prompts (B,n) that end in their answers -> log-probability of each answer token, and whether it is the
    likeliest after those before it, (B, n_answer) each."""
    state, cut = model.init_state(len(prompts), prompts.size(1)), prompts.size(1) - n_answer - 1
    for part in prompts[:, :cut].split(8192 if prompts.is_cuda else 1024, dim=1):
        model.hidden(part, state)
    logits = model(prompts[:, cut:-1], state=state, all_logits=True)[0].float()     # (B, n_answer, V)
    target = prompts[:, -n_answer:]
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return logp, logits.argmax(-1) == target


def recall(model, corpus, length, trials, seed=0, task="S1", keep=None, varied=0.0):
    """Ask for what a task hides at five depths, in turn, of held-out text. At one context length: the mean
    log-probability of an answer's tokens, and whether greedy decoding gives it in full, (trials,) each. keep:
    of longer contexts only the first 4 and the last keep - 4 tokens are read. varied: the share of values
    after other words (reworded) in place of the task, as far as there is room."""
    rng, rows, n_answer = np.random.default_rng([seed, length]), [], []
    for i, text in enumerate(corpus.windows(rng, trials, length, TASKS[task].prose)):
        depth, made = i % 5 / 4, None
        if varied and rng.random() < varied:
            with suppress(ValueError):                              # no room
                made = plant(corpus.tokenizer, text, rng, depth, task=reworded(corpus.tokenizer, text, rng))
        ids, n = made or plant(corpus.tokenizer, text, rng, depth, task=task)
        rows.append(ids)
        n_answer.append(n)
    prompts = torch.from_numpy(np.stack(rows)).to(model.wte.weight.device)
    if keep and keep < length:
        prompts = torch.cat((prompts[:, :4], prompts[:, 4 - keep:]), 1)
    most, logp, right = max(n_answer), [], []
    for part in prompts.split(max(1, 65536 // length)):
        with bf16():
            found = answers(model, part, most)
        logp += found[0].cpu()
        right += found[1].cpu()
    return (torch.stack([x[most - n:].mean() for x, n in zip(logp, n_answer)]),
            torch.stack([x[most - n:].all().float() for x, n in zip(right, n_answer)]))
