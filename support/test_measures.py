"""Laws of the measures of a real teacher: bench.py niah, what models write, rows that only repeat."""
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
import support.recall as recall
from support import evaluate
from hypenet import HypeNet, HypeNetConfig
from support.tokens import Tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{}>{% endfor %}<bot>"
FIELDS = dict(layers="LA", n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_hidden=48, max_len=512,
              norm="rms", mlp="swiglu", qk_norm=True, position="rope", vocab_size=256)


def model_of(seed, **changes):
    torch.manual_seed(seed)
    return HypeNet(HypeNetConfig(**FIELDS | changes)).requires_grad_(False)


def chat_tokenizer():
    tokenizer = Tokenizer.bytes()
    tokenizer.config = dict(chat_template=CHAT)
    return tokenizer


def corpus_of(tokenizer):
    def windows(rng, n, length, prose=False):
        return rng.integers(97, 123, (n, length))
    return types.SimpleNamespace(tokenizer=tokenizer, windows=windows, held_out=range(2 ** 16),
                                 facts=dict(sha256=""))


@pytest.mark.parametrize("name, needles", [("multi-query", 4), ("chat", 1)])
def test_a_written_task_asks_for_every_value_before_room_for_its_answer(name, needles):
    tokenizer = chat_tokenizer()
    task = recall.written_tasks(tokenizer)[name]
    ids, n = recall.plant(tokenizer, np.full(700, 120), np.random.default_rng(0), 0.5, task=task)
    prompt, answer = tokenizer.decode(ids[:-task.write]), tokenizer.decode(ids[-task.write:][:n])
    told = dict(re.findall(r"The special magic number for (\w+) is (\d{5})\.", prompt))
    asked = [told[word] for word in re.findall(r"\w+", prompt.splitlines()[-1]) if word in told]
    assert len(ids) == 700 and n < task.write and len(told) == len(asked) == needles
    assert answer.strip().split(", ") == asked
    assert prompt.startswith("<user>") == (name == "chat") == prompt.endswith("?</{}><bot>")


def test_only_a_chat_template_gives_a_chat():
    assert set(recall.written_tasks(Tokenizer.bytes())) == {"multi-query"}


def test_a_batch_goes_on_as_each_row_alone():
    """Prompts read and continued together give the ids that HypeNet.generate gives for each."""
    model = model_of(0)
    prompts = torch.randint(97, 123, (3, 40))
    alone = [model.generate([row.tolist()], 6)[0] for row in prompts]
    assert recall.continued(model, prompts, 6, 256).tolist() == [ids[-6:] for ids in alone]


@pytest.mark.parametrize("text, share", [
    ("{0}, {1}", 0.5), ("none", 0.0), ("{3} {2}; {1} and {0}", 1.0), ("\0{0}", 0.0)])
def test_the_share_of_values_that_stand_in_what_is_written(text, share, monkeypatch):
    """Values count in any order, but not after the id that ends a text."""
    tokenizer, corpus = Tokenizer.bytes(), corpus_of(Tokenizer.bytes())
    task = recall.written_tasks(tokenizer)["multi-query"]

    def continued(model, prompts, n, n_vocab):
        found = []
        for prompt in prompts.tolist():
            told = re.findall(r"is (\d{5})\.", tokenizer.decode(prompt))
            found.append(tokenizer.encode(text.format(*told).ljust(n)))
        return torch.tensor(found)
    monkeypatch.setattr(recall, "continued", continued)
    assert recall.written(model_of(0), corpus, 600, 5, task).tolist() == [share] * 5


@pytest.mark.parametrize("n", [128, 512, 2048])
def test_rows_without_pass_keys_have_no_words_of_a_test(n):
    """varied 1: every row repeats something, none has a pass key, and the first share `short` stays."""
    plan = types.SimpleNamespace(recall=1.0, varied=1.0, chats=0.0, batch=60, short=0.25, length=n)
    plain = np.random.default_rng(0).integers(97, 123, (60, n + 1))
    corpus = types.SimpleNamespace(seed=0, tokenizer=Tokenizer.bytes())
    corpus.rows = lambda *_: lambda step: plain.copy()
    rows = recall.training_rows(corpus, "distil", plan)(0)
    assert not any(b"pass key" in bytes(row.astype(np.uint8)) for row in rows)
    assert (rows[:, :n // 4] == plain[:, :n // 4]).all()
    assert (rows[:, n // 4:] != plain[:, n // 4:]).any(1).all()
    assert n == 128 or sum(map(comes_again, rows)) > 50            # a value may stand without a question


def comes_again(row):
    passages = [bytes(row[i:i + 12].astype(np.uint8)) for i in range(len(row) - 11)]
    return len(set(passages)) < len(passages)


@pytest.mark.parametrize("count", [10, 38])
def test_ends_of_texts_are_scored_as_in_one_pass(count):
    """Losses, KL(teacher, student) and agreement of the last tokens are those of whole logits."""
    student, teacher = model_of(0), model_of(1, layers="AA")
    texts = np.random.default_rng(0).integers(0, 256, (3, 40))
    found = bench.at_ends([teacher, student], texts, count)
    idx = torch.from_numpy(texts)
    s, t = (model(idx)[0][:, -1 - count:-1].log_softmax(-1) for model in (student, teacher))
    refs = [F.cross_entropy(log.mT, idx[:, -count:], reduction="none") for log in (t, s)]
    refs += [(t.exp() * (t - s)).sum(-1), (s.argmax(-1) == t.argmax(-1)).float()]
    for column, ref in zip(found.T, refs):
        assert column == pytest.approx(ref.mean(1).tolist(), rel=1e-3, abs=1e-4)
    assert bench.at_ends([student], texts, count)[:, 0] == pytest.approx(found[:, 1])


@pytest.fixture
def niah(tmp_path, monkeypatch):
    """A function that runs niah with two students of a tiny teacher, and returns its table."""
    monkeypatch.setattr(bench, "RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(bench, "draw", lambda *_: None)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(300)]
    for name in ("text", "other"):
        lines = [json.dumps(dict(text=" ".join(rng.choice(words, 300)))) for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    for i, name in enumerate(("one", "two", "teacher")):
        model_of(i, layers="AA" if name == "teacher" else "LA").save_pretrained(tmp_path / name)
        Tokenizer.bytes().save(tmp_path / name)
        (tmp_path / name / "report.json").write_text("{}")

    def run(*flags, models=("one", "two")):
        bench.main(["niah", "--device", "cpu", "--name", "x", "--trials", "2", "--windows", "3",
                    "--model", *(str(tmp_path / name) for name in models), "--teacher",
                    str(tmp_path / "teacher"), "--data", str(tmp_path / "text.jsonl"), *flags])
        return json.loads((tmp_path / "results" / "x.json").read_text())
    run.folder = tmp_path
    return run


def test_a_table_of_several_students_in_several_calls(niah):
    """Rows of an earlier call stay, but those of a student whose weights have changed go."""
    unseen = ["--unseen", str(niah.folder / "other.jsonl")]
    rows = niah("--contexts", "512", "640", "--readers", "students", *unseen)["rows"]
    assert {row["model"] for row in rows} == {"one", "two"} and {row["context"] for row in rows} == {512, 640}
    kl = {row["context"] for row in rows if row["task"] == "KL, unseen"}
    assert kl == {512}                                       # the teacher knows no longer text
    assert {row["context"] for row in rows if row["task"] == "loss, unseen"} == {512, 640}
    shutil.copy(niah.folder / "two" / "model.safetensors", niah.folder / "one" / "model.safetensors")
    content = niah("--contexts", "640", "--readers", "yarn", *unseen)
    rows = content["rows"]
    assert {row["model"] for row in rows} == {"two", "teacher, YaRN"}
    assert set(content["students"]) == {"one", "two"}
    assert {row["model"] for row in niah("--contexts", "512", "--readers", "window")["rows"]} == {
        "teacher, sink + window"}                            # other texts: all begins anew


def test_trials_of_long_contexts_have_their_own_number(niah, monkeypatch):
    seen = {}

    def asked(model, corpus, n, trials, *_, **__):
        seen[n] = trials
        return torch.ones(trials)
    monkeypatch.setattr(bench, "written", asked)
    monkeypatch.setattr(bench, "recall", lambda *given, **_: (None, asked(*given)))
    monkeypatch.setattr(bench, "predict", lambda *_: None)
    monkeypatch.setattr(bench, "Corpus", lambda tokenizer, _: corpus_of(tokenizer))
    niah("--contexts", "512", "32768", "99999", "--readers", "students", "--trials", "7",
         "--trials-long", "3")
    assert seen == {512: 7, 32768: 3}


@pytest.mark.parametrize("models, flags, line", [
    (("one", "two/../one"), [], "same name"), (("one", "teacher"), [], "same name"),
    (("one", "other"), [], "its tokenizer"), (("one",), ["--contexts", "99999"], "has only"),
    (("one",), ["--unseen", "none"], "--unseen none: not found")])
def test_models_and_texts_that_cannot_be_compared_are_refused(niah, models, flags, line, capsys):
    shutil.copytree(niah.folder / "one", niah.folder / "other")
    Tokenizer(Tokenizer.bytes().spec + "\n").save(niah.folder / "other")
    with pytest.raises(SystemExit) as stop:
        niah(*flags, models=models)
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_text_that_a_teacher_wrote_is_not_measured(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"options": {"data": ["web:0.5", "teacher:0.5"]}}')
    with pytest.raises(SystemExit) as stop:
        bench.main(["niah", "--device", "cpu", "--model", str(tmp_path)])
    assert stop.value.code == 2 and "give other text with --data" in capsys.readouterr().err


def test_choices_need_gold():
    with pytest.raises(ValueError, match="the place is no question"):
        evaluate.checked('{"context": "a", "choices": ["b", "c"]}', "the place")


def test_an_answer_that_leaves_no_context_is_refused():
    tokenizer = types.SimpleNamespace(bos=None, end=0, encode=lambda text: [len(text)])
    with pytest.raises(ValueError, match="'ab': context and answer are one token"):
        evaluate.encoded(tokenizer, "a", "b")


def test_tasks_that_were_not_tried_count_as_zero_in_the_mean():
    rows = [dict(model=model, context=n, task=task, value=1.0, low=0.9, high=1.0, by_depth=[])
            for model, n, task in (("a", 8, "S2"), ("a", 8, "chat"), ("b", 8, "S2"), ("a", 8, "S1"))]
    assert [row["value"] for model in "abc" for row in bench.mean_of_tasks(rows, model)] == [1.0, 0.5]


def test_runs_that_differ_in_their_seed_have_one_colour(monkeypatch):
    """The figure of niah names models whose names differ in their last digits once, with their number."""
    drawn = []
    monkeypatch.setattr(bench, "draw", lambda path, panels: drawn.extend(panels))
    rows = [dict(model=model, task="S1", context=8, value=1.0, low=1.0, high=1.0, by_depth=[1.0])
            for model in ("seed0", "seed1", "650M tokens", "teacher")]
    students = dict.fromkeys(("seed0", "seed1", "650M tokens"), dict(layers="LA"))
    bench.draw_niah(dict(students=students, trained=8), rows, "a.json")
    _, lines, _ = drawn[0]
    assert [label for label, _ in lines] == ["seed, 2 runs"] * 2 + ["650M tokens", "teacher"]
