"""Score a student beside its teacher on small tasks. No network is needed.

    python -m support.evaluate out/tiny-paper               a run, or any model that sample.py takes
    python -m support.evaluate --tasks arc.jsonl piqa.jsonl tasks of your own
    python -m support.evaluate --write tasks                write the built-in tasks as files for lm-eval
    lm_eval --include_path tasks --tasks copy,recall --model hf --model_args pretrained=exported,...

A question is a line of JSON with a context and a target. Or the question has a context, choices and gold, the
index of the right choice. The built-in tasks are made of held-out text, or for `agreement` of fixed words:

    last_word   the last word of a passage, a long word that also stands earlier in the passage
    agreement   the verb after two nouns: "The keys near the door" are. Only the first noun decides
    copy        words in random order, a second time
    recall      one of two numbers that stand in a text

Each task has two rows. The first row uses the log-probability of each answer: in nats, summed over its
tokens. It shows the mean for the target, or how often the right choice is likeliest. The second row is the
share of right answers that greedy generation writes. ± is one standard error. "difference" is student minus
teacher, per question, so its error is smaller.
"""
import json
import math
import os
import re
from argparse import Namespace
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from halo import teacher_path
from hypenet import refuse, write_file
from sample import load
from support import fast
from support.common import (
    Parser, command_line, default_device, filled, number, read_json, read_text, write_json)
from support.recall import TASKS
from support.text import Corpus

NOUNS = "key door teacher letter window farmer picture doctor river signal engine author garden soldier table"
PLACES = ("near", "behind", "beside", "with", "without", "for", "above", "under")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))


def get_args(argv):
    p = Parser(prog="python -m support.evaluate", description=__doc__.split("\n\n")[0])
    add = p.add_argument
    add("model", nargs="?", type=filled, help="as for sample.py; default: the newest run in "
        "out/, else the shipped student")
    add("--teacher", type=filled, help="model to compare with; default: the run's teacher; none: no model")
    add("--tasks", nargs="+", type=filled, metavar="FILE.jsonl", help="questions; default: built-in tasks")
    add("--write", type=filled, metavar="FOLDER", help="write the built-in tasks for lm-eval, and end")
    add("--questions", type=number(int, 2), help="questions in a task; default: 1000 on a GPU, else 200")
    add("--length", type=number(int, 32), help="tokens of a context; default: 3/4 of the trained "
        "length, at most 768")
    add("--data", nargs="+", type=filled, help="text of the built-in tasks, as for halo.py; "
        "default: Python's standard library, whatever the run was trained on")
    add("--seed", type=number(int, 0), default=0, help="seed of the built-in tasks; default: 0")
    add("--device", type=filled, help=f"cuda, mps or cpu; default: {default_device()} here")
    args = p.parse_args(argv)
    args.device = default_device(args.device)
    args.questions = args.questions or (1000 if args.device.startswith("cuda") else 200)
    return args


def last_word(texts, size, rng):
    """A passage, and the word of six letters or more that follows. The word also stands in the first three
    quarters of the passage, but not in the last quarter."""
    places = [(text, match) for text in texts for match in re.finditer(r"(?<=\S) ([A-Za-z_]{6,})\b", text)]
    for text, match in (places[i] for i in rng.permutation(len(places))):
        context = text[max(0, match.start() - size):match.start()]
        early, late = context[:3 * size // 4], context[3 * size // 4:]
        if len(context) == size and re.search(rf"\b{match[1]}\b", early) and match[1] not in late:
            yield dict(context=context, target=match[0])


def agreement(texts, size, rng):
    """A subject, a noun of the other number, and the two forms of a verb."""
    while True:
        subject, other = rng.choice(NOUNS.split(), 2, replace=False)
        plural = int(rng.integers(2))
        context = f"The {subject}{'s' * plural} {rng.choice(PLACES)} the {other}{'s' * (1 - plural)}"
        yield dict(context=context, choices=rng.choice(VERBS).tolist(), gold=plural)


def copy(texts, size, rng):
    """Words in random order, then again the eight words before a random place. The target is the four words
    that follow there."""
    words = sorted({*TASKS["S2"].names, *re.findall(r"\b[a-z]{3,8}\b", " ".join(texts))})
    n = min(max(12, size // 8), len(words))
    while True:
        chosen = rng.choice(words, n, replace=False).tolist()
        k = int(rng.integers(8, n - 3))
        yield dict(context=f"{' '.join(chosen)}\n{' '.join(chosen[k - 8:k])}",
                   target=" " + " ".join(chosen[k:k + 4]))


def recall(texts, size, rng):
    """Two names and their numbers at random places of a text, and the question for one of them."""
    text, task = "\n".join(texts), TASKS["S2"]
    while True:
        names = rng.permutation(task.names)[:2]
        values = ["".join(rng.choice(list(task.signs), task.size)) for _ in names]
        needles = [task.needle.format(name=name, value=value) for name, value in zip(names, values)]
        asked = rng.integers(2)
        question = task.question.format(name=names[asked])
        room = max(2, size - len("".join(needles) + question))
        start = rng.integers(max(1, len(text) - room))
        a, b = start + np.sort(rng.integers(0, room + 1, 2))
        context = text[start:a] + needles[0] + text[a:b] + needles[1] + text[b:start + room] + question
        yield dict(context=context, target=f" {values[asked]}")


def built_in(corpus, args, length):
    """{name of a task: list of questions}. Both models get the same questions."""
    ids, tokenizer = corpus.prose[:2 ** 21], corpus.tokenizer
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end))
    ends = [i for i in (tokenizer.end, tokenizer.bos) if i is not None]
    texts = [tokenizer.decode(part[~np.isin(part, ends)].tolist()) for part in parts]
    size = int(length * sum(map(len, texts)) / len(ids))             # characters in `length` tokens
    tasks = {}
    for make in (last_word, agreement, copy, recall):
        questions = make(texts, size, np.random.default_rng([args.seed, len(tasks)]))
        tasks[make.__name__] = list(islice(questions, args.questions))
    refuse(len(tasks["last_word"]) < 2, f"the held-out text has no two passages of {length} tokens that end "
           "in a long word from earlier on; give a shorter --length, or more --data")
    return tasks


def read_tasks(paths, most):
    """{name of a file: the file's first questions}. ValueError for a file with any other content."""
    tasks = {}
    for path in paths:
        lines = [line for line in read_text(path).split("\n") if line.strip()][:most]
        questions = [checked(line, f"{path}, question {i}") for i, line in enumerate(lines, 1)]
        refuse(len(questions) < 2, f"{path} has {len(questions)} questions; give at least 2")
        refuse(len({"choices" in q for q in questions}) > 1,
               f"{path}: some questions have choices, others a target; put them in two files")
        name = os.path.splitext(os.path.basename(path))[0]
        refuse(name in tasks, f"--tasks names {name} twice; rename one of the files")
        tasks[name] = questions
    return tasks


def checked(line, where):
    """The question in a line of JSON. ValueError, which names the place `where`, if there is none."""
    try:
        q = json.loads(line)
        answers, gold = answers_of(q)
        texts = isinstance(q["context"], str) and all(isinstance(x, str) and x.strip() for x in answers)
        if texts and type(answers) is list and type(gold) is int and 0 <= gold < len(answers):
            return q
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{where} is no question; allowed: JSON with the texts context and target, or with "
                     "context, choices (a list of texts) and gold (the index of the right text, from 0)")


def answers_of(q):
    """The possible answers to a question, and the index of the right one."""
    return (q["choices"], q["gold"]) if "choices" in q else ([q["target"]], 0)


def write_tasks(tasks, folder):
    """NAME.jsonl and NAME.yaml of each task, for lm_eval --include_path. JSON is YAML as well."""
    os.makedirs(folder, exist_ok=True)
    for name, questions in tasks.items():
        path = os.path.join(os.path.abspath(folder), name)
        kind = dict(output_type="loglikelihood", doc_to_target="{{target}}")
        if "choices" in questions[0]:
            kind = dict(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="gold")
        write_file(f"{path}.jsonl", "".join(json.dumps(q) + "\n" for q in questions))
        write_json(f"{path}.yaml", dict(
            task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=f"{path}.jsonl")),
            test_split="test", doc_to_text="{{context}}", target_delimiter="", **kind))


def encoded(tokenizer, context, answer):
    """Ids of context and answer, and the number of ids in the answer. As in lm-eval, spaces at the end of the
    context belong to the answer. A text begins with bos. Without a bos, an empty context is the end id."""
    context, whole = context.rstrip(), context + answer
    ids = tokenizer.encode(whole)
    n = max(1, len(ids) - len(tokenizer.encode(context)))
    if tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    elif not context:
        ids = [tokenizer.end, *ids]
    refuse(n == len(ids), f"{whole!r}: context and answer are one token; give a longer context")
    return ids, n


@torch.no_grad()
def log_probabilities(model, rows):
    """The log-probability of the last n ids of each row (ids, n), given the ids before them."""
    found = []
    for part in batches(rows):
        idx = torch.zeros(len(part), max(len(ids) for ids, _ in part), dtype=torch.int64)
        for b, (ids, _) in enumerate(part):
            idx[b, :len(ids)] = torch.tensor(ids)            # no token sees the padding after it
        idx = idx.to(model.wte.weight.device)
        x = model.hidden(idx[:, :-1])
        for b, (ids, n) in enumerate(part):
            answer = slice(len(ids) - n, len(ids))
            logp = model.head(x[b, answer.start - 1:answer.stop - 1]).float().log_softmax(-1)
            found.append(logp.gather(-1, idx[b, answer, None]).sum().item())
    return found


def batches(rows, tokens=32768):
    """Lists of rows (ids, n), in order, that have about so many ids together with their padding."""
    part, longest = [], 0
    for row in rows:
        longest = max(longest, len(row[0]))
        if part and longest * (len(part) + 1) > tokens:
            yield part
            part, longest = [], len(row[0])
        part.append(row)
    yield part


def written(model, tokenizer, rows):
    """Whether greedy generation, given all ids of a row (ids, n) but the last n, writes the text of the last
    n ids and then ends the word. One value per row. Where positions are learned, rows are read one by one: a
    row's answer would else be written behind a longer row's context."""
    found, limit = [], model.config.limit()
    for part in batches(rows) if limit == math.inf else batches(rows, 0):
        room = limit - max(len(ids) - n for ids, n in part)
        steps = fast.stream(model, [ids[:-n] for ids, n in part], min(room, max(n for _, n in part) + 2),
                            n_vocab=tokenizer.n_vocab, never=tokenizer.holes, graph=False)
        for out, (ids, n) in zip(torch.stack(list(steps), 1).tolist(), part):
            wanted = re.escape(tokenizer.decode(ids[-n:]).strip())
            found.append(re.match(rf"\s*{wanted}(?!\w)", tokenizer.decode(out[:n + 2])) is not None)
    return found


def score(model, tokenizer, questions):
    """{measure: one value per question}."""
    rows, right = [], []                             # of all answers; the place of each right answer
    first = []
    for q in questions:
        answers, gold = answers_of(q)
        right.append(len(rows) + gold)
        first.append(len(rows))
        rows += [encoded(tokenizer, q["context"], answer) for answer in answers]
    logp = np.array(log_probabilities(model, rows))
    measures = {"log-probability": logp[right].tolist()}
    if "choices" in questions[0]:
        best = [start + int(part.argmax()) for start, part in zip(first, np.split(logp, first[1:]))]
        measures = {"likeliest choice": np.equal(best, right).tolist()}
    return measures | {"generated": written(model, tokenizer, [rows[i] for i in right])}


def with_difference(scores):
    """The scores of teacher and student, and the difference of each question."""
    if len(scores) < 2:
        return scores
    teacher, student = scores.values()
    return scores | dict(difference={
        task: {measure: np.subtract(student[task][measure], values, dtype=float)
               for measure, values in measures.items()} for task, measures in teacher.items()})


def table(scores):
    """scores {model: {task: {measure: values}}} -> lines of text."""
    lines = [f"{'task':<16}{'questions':>9}  {'measure':<16}" + "".join(f"{name:>18}" for name in scores)]
    for task, measures in next(iter(scores.values())).items():
        for measure, values in measures.items():
            cells = [f"{cell(measure, tasks[task][measure]):>18}" for tasks in scores.values()]
            lines.append(f"{task:<16}{len(values):>9}  {measure:<16}{''.join(cells)}")
    return lines


def cell(measure, values):
    mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.3f} ± {error:.3f}" if measure == "log-probability" else f"{mean:.1%} ± {error:.1%}"


def load_models(args):
    """Yields name, tokenizer and model: the teacher, if there is one, then the student."""
    def one(model, teacher=False):
        given = Namespace(model=model, teacher=teacher, device=args.device, logit_base=None)
        return load(given)[:2]
    is_student = args.model is None
    if args.model and os.path.exists(os.path.join(args.model, "report.json")):
        is_student = "recipe" in read_json(args.model, "report.json", "report of halo.py")
    if args.teacher is None and is_student:
        yield "teacher", *one(args.model, teacher=True)
    elif args.teacher not in (None, "none"):
        yield "teacher", *one(teacher_path(args.teacher))
    yield "student", *one(args.model)


def run_main(argv):
    args = get_args(argv)
    tasks = read_tasks(args.tasks, args.questions) if args.tasks else None
    scores = {}
    for name, tokenizer, model in load_models(args):
        if tasks is None:
            length = args.length or 3 * min(model.config.max_len, 1024) // 4
            tasks = built_in(Corpus(tokenizer, args.data), args, length)
        if args.write:
            return write_tasks(tasks, args.write)
        bar = tqdm(tasks.items(), desc=name)
        scores[name] = {task: score(model, tokenizer, questions) for task, questions in bar}
        del model                                    # before the next model is loaded
    print("\n".join(table(with_difference(scores))))


def main(argv=None):
    command_line("python -m support.evaluate", run_main, argv)


if __name__ == "__main__":
    main()
