"""Laws of support/export.py and support/evaluate.py."""
import importlib.util
import json
import math
import os
import re
import tempfile

import numpy as np
import pytest
import torch

CACHES = tempfile.TemporaryDirectory()      # transformers and datasets read these when they are imported
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = os.environ["HF_DATASETS_CACHE"] = CACHES.name

import support.evaluate as evaluate  # noqa: E402
import support.export as export  # noqa: E402
from hypenet import FAMILIES, HypeNet  # noqa: E402
from support.test_support import TOKENIZERS, our_tokenizer, random_texts  # noqa: E402
from support.tokens import Tokenizer  # noqa: E402
from test_hypenet import ARTICLE, GPT2, HERE, HYPE, LLAMA3, PLAIN, one_line, rmse, tiny  # noqa: E402


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


needs_transformers = needs("transformers")
KINDS = {
    "gpt2 teacher": dict(GPT2, layers="AAA"),
    "gpt2": dict(GPT2, **HYPE),
    "qwen3": dict(FAMILIES["qwen3"], **HYPE, tied=False),
    "llama": dict(FAMILIES["llama"], **HYPE, rope_scaling=LLAMA3, decay="head"),
    "window": dict(HYPE, window=7),
    "article": ARTICLE,
    "all linear": dict(PLAIN, layers="LLL"),
}
TEXTS = ["import os\n", "def f(x):\n    return x", "x", "class A:"]
STUDENT = HERE / "assets" / "tiny-student"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: a kind of KINDS -> our model, and the folder of its export. Ids from 256 have no token."""
    folder = tmp_path_factory.mktemp("export")

    def get(kind, dtype="float32"):
        run, out = folder / kind / "run", folder / kind.replace(" ", "_") / dtype
        if not run.exists():
            tiny(dtype=torch.float32, vocab_size=260, **KINDS[kind]).save_pretrained(run)
            Tokenizer.bytes().save(run)
        if not out.exists():
            export.export(str(run), str(out), dtype)
        return HypeNet.from_pretrained(run, getattr(torch, dtype)), out
    return get


def auto(folder, **options):
    from transformers import AutoModelForCausalLM
    options = dict(dtype=torch.float32) | options
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def auto_tokenizer(folder):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def greedy(model, text, n):
    """The ids that sample.py gives: those without a token are never drawn."""
    from support import fast
    return [id.item() for id in fast.stream(model, [list(text.encode())], n, never=range(256, 260))]


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_logits_and_our_text(kind, exported):
    """AutoModelForCausalLM: our logits to 1e-5, and our greedy text of 200 tokens (of as many as a model with
    learned positions or chunks knows). Four texts of different lengths, padded on either side, with a cache
    or without, continue as each alone. Sampled text is the same with a cache and without."""
    ours, folder = exported(kind)
    theirs, tokenizer = auto(folder), auto_tokenizer(folder)
    theirs.generation_config.eos_token_id = None
    longest = max(map(len, TEXTS))
    n = min(200, ours.config.limit() - longest)
    ids = torch.tensor([list(TEXTS[1].encode())])
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)[0]).abs().max() <= 1e-5
    wanted = greedy(ours, TEXTS[1], n)
    assert theirs.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.size(1):].tolist() == wanted
    alone = [greedy(ours, text, 12) for text in TEXTS]
    for side, use_cache in (("right", False), ("right", True), ("left", True)):
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
        new = theirs.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert new[:, longest:].tolist() == alone, (side, use_cache)
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled.append(theirs.generate(**batch, max_new_tokens=12, do_sample=True, top_k=0, temperature=9.0,
                                       use_cache=use_cache))
    assert sampled[0].equal(sampled[1]) and sampled[0].max() < 256


@needs_transformers
def test_exported_weights_have_the_type_asked_for(exported):
    """Exported or loaded as bfloat16, a model gives the logits of our bfloat16 model to the bit. Text ends
    where ours ends, and padding is the end."""
    ids = torch.tensor([list(TEXTS[1].encode())])
    for exported_as, asked in (("bfloat16", "auto"), ("float32", torch.bfloat16)):
        ours, folder = exported("qwen3", exported_as)
        theirs = auto(folder, dtype=asked)
        with torch.no_grad():
            assert theirs(ids).logits.equal(ours.bfloat16()(ids)[0]) and theirs.dtype == torch.bfloat16
    ends = theirs.generation_config
    assert (ends.eos_token_id, ends.pad_token_id) == ([0], 0) and theirs.config.vocab_size == 260


@needs_transformers
@needs("accelerate")
def test_device_map(exported):
    """With a device_map the logits are the same, so nothing of the model was left on the meta device."""
    ours, folder = exported("llama")
    ids = torch.tensor([list(TEXTS[1].encode())])
    for device_map in ("cpu", "auto"):
        theirs = auto(folder, device_map=device_map)
        assert rmse(theirs(ids.to(theirs.device)).logits.cpu(), ours(ids)[0]) < 1e-5


@needs_transformers
@pytest.mark.parametrize("kind", ["qwen3", "window", "article"])
def test_cache_of_transformers(kind, exported):
    """A cache that forward makes grows with its tokens: part by part, logits are those of the whole text.
    Beam search gives the same with a cache and without, and generation goes on from a cache as from text."""
    theirs = auto(exported(kind)[1])
    name = "cache" if "cache" in theirs(torch.tensor([[1]]), use_cache=True) else "past_key_values"
    ids = torch.tensor([list(TEXTS[1].encode()), list(TEXTS[1][::-1].encode())])
    with torch.no_grad():
        whole, cache, parts = theirs(ids).logits, None, []
        for part in ids.split([3, 1, 1, 7, ids.size(1) - 12], 1):
            out = theirs(part, use_cache=len(parts) != 3, **{name: cache})    # given, a cache counts
            parts.append(out.logits)
            cache = out[name]
        last = theirs(ids, logits_to_keep=2).logits
    assert rmse(torch.cat(parts, 1), whole) <= 1e-5 and last.equal(whole[:, -2:])
    beams = [theirs.generate(ids, max_new_tokens=8, num_beams=3, use_cache=use) for use in (True, False)]
    assert beams[0].equal(beams[1])
    first = theirs.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, ids[:, :2]), 1)
    again = theirs.generate(longer, max_new_tokens=8, do_sample=False, **{name: first[name]})
    assert again.equal(theirs.generate(longer, max_new_tokens=8, do_sample=False))


@needs_transformers
def test_long_contexts_are_read_in_segments(exported):
    """Prompts of 1,500 and 2,600 tokens, left-padded, continue as each alone. The cache has the room that
    generation needs, and the last token that is drawn takes none."""
    ours, folder = exported("window")
    theirs, tokenizer = auto(folder), auto_tokenizer(folder)
    texts = ["".join(TEXTS) * 50, "".join(TEXTS[::-1]) * 80]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    longest = batch["input_ids"].size(1)
    assert longest > 2500
    found = theirs.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert found.sequences[:, longest:].tolist() == [greedy(ours, text, 5) for text in texts]
    cache = found.get("cache", found.get("past_key_values"))
    assert cache.state.max_tokens == cache.get_seq_length() == longest + 4


@needs_transformers
def test_loss_and_a_saved_copy(exported, tmp_path):
    """labels give our loss and its gradient. save_pretrained writes a folder that loads as before."""
    ours, folder = exported("qwen3")
    theirs, ids = auto(folder), torch.tensor([list(TEXTS[1].encode())])
    wanted = ours.requires_grad_()(ids[:, :-1], ids[:, 1:])[1]
    found = theirs(ids, labels=ids).loss
    for loss in (wanted, found):
        loss.backward()
    assert abs(wanted - found) <= 1e-5
    assert torch.allclose(ours.wte.weight.grad, theirs.model.wte.weight.grad, atol=1e-5)
    theirs.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert auto(tmp_path / "copy")(ids).logits.equal(theirs(ids).logits)


@needs_transformers
def test_arguments_that_a_hypenet_has_no_use_for_are_one_line(exported):
    """A wrong mask, a row of padding, positions, embeddings, a foreign cache or an assistant: one line."""
    from transformers import DynamicCache
    theirs, ids = auto(exported("qwen3")[1]), torch.tensor([[1, 2, 3]] * 2)
    for word, options in {
            "(2, 3)": dict(attention_mask=torch.ones(2, 5)),
            "without tokens": dict(attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]])),
            "position_ids": dict(position_ids=torch.arange(3)[None]),
            "output_attentions": dict(output_attentions=True),
            "DynamicCache": dict(past_key_values=DynamicCache())}.items():
        with one_line(word):
            theirs(ids, **options)
    with one_line("assisted"):
        theirs.generate(ids[:1], assistant_model=theirs, max_new_tokens=3)
    cache = theirs(ids, use_cache=True)[1]
    with one_line("forget"):
        cache.crop(2)


@needs_transformers
@pytest.mark.parametrize("family", ["bytes", "bos asked for", *TOKENIZERS])
def test_auto_tokenizer_gives_our_ids(family, tmp_path):
    """AutoTokenizer: our ids with bos before them, our text back, our ends, our chat template's prompt."""
    if family == "bytes":
        ours = Tokenizer.bytes()
    else:
        cut = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
        ours = our_tokenizer(family if family in TOKENIZERS else "gpt2", tmp_path, truncation=cut)[1]
        ours.config |= dict(chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    if family == "bos asked for":
        ours = Tokenizer(ours.spec, [dict(ours.config, add_bos_token=True, bos_token="<|im_start|>")])
    (tmp_path / "out").mkdir()
    export.write_tokenizer(ours, str(tmp_path / "out"), 99)
    theirs = auto_tokenizer(tmp_path / "out")
    start = [] if ours.bos is None else [ours.bos]
    for text in ["\0Ā\0", "Ġ", "isn 't it , this ?", *random_texts(60)]:
        ids = ours.encode(text, special=True)
        assert theirs(text)["input_ids"] == start + ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.end, ours.bos)
    assert theirs.model_max_length == 99 and set(theirs("a")) == {"input_ids", "attention_mask"}
    if family != "bytes":
        say = [dict(role="user", content="Hi")]
        assert theirs.apply_chat_template(say, tokenize=False) == ours.chat(say)


def test_export_refuses(tmp_path, monkeypatch):
    """A folder with files, a tokenizer of another model, and code whose import is not found: one line."""
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "run")
    Tokenizer.bytes().save(tmp_path / "run")
    with one_line("new folder"):
        export.export(str(STUDENT), str(tmp_path / "run"))
    with one_line("do not belong together"):
        export.export(str(tmp_path / "run"), str(tmp_path / "out"))
    (tmp_path / "support").mkdir()
    for name in ("support/modeling_hypenet.py", "kernel.py", "hypenet.py"):
        source = (HERE / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(source.replace("from kernel import", "import kernel #"))
    monkeypatch.setattr(export, "HOME", tmp_path)
    with one_line("hypenet.py has 0 lines"):
        export.write_code(str(tmp_path))


def test_longest_text_of_a_model():
    """Learned positions and chunks end. A teacher has the length of its training. HyPE has no end."""
    for kind, length in (("gpt2 teacher", 48), ("gpt2", 131072), ("article", 48), ("qwen3", 131072)):
        assert export.longest_text(tiny(**KINDS[kind]).config) == length, kind
    assert export.longest_text(tiny(layers="AA").config) == 48


# ---- support/evaluate.py -----------------------------------------------------------------------------------


def questions_of(model, tokenizer, n):
    """n questions with a target and n with choices. The model's own text answers two of three."""
    targets, choices = [], []
    for i in range(n):
        context = f"def f{i}(self, x):\n    return"
        written = tokenizer.decode(model.generate([tokenizer.encode(context)], 12)[0])
        answer = re.match(r"\s*(\w{2,}|\W+)", written)[0]
        targets.append(dict(context=context, target=answer if i % 3 else answer[:-1]))
        wrong = ["\x7f\x7f", "~" + answer]
        choices.append(dict(context=context, choices=[wrong[0], answer, wrong[1]], gold=1 if i % 3 else 2))
    return targets, choices


def write_jsonl(path, questions):
    path.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    return str(path)


def test_scores_are_what_they_say():
    """A log-probability is that of the model's own loss. An answer that the model would write is generated,
    and is the likeliest choice. Other answers are neither."""
    model, tokenizer = HypeNet.from_pretrained(STUDENT), Tokenizer.bytes()
    targets, choices = questions_of(model, tokenizer, 9)
    found = evaluate.score(model, tokenizer, targets)
    for q, logp in zip(targets, found["log-probability"]):
        ids = torch.tensor([tokenizer.encode(q["context"] + q["target"])])
        n = len(tokenizer.encode(q["target"]))
        nats = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
        assert abs(logp + nats[-n:].sum().item()) <= 1e-4
    assert found["generated"] == [i % 3 > 0 for i in range(9)]
    assert evaluate.score(model, tokenizer, choices)["likeliest choice"] == [i % 3 > 0 for i in range(9)]
    tokenizer.holes = list(range(97, 123))           # without letters no such answer can be written
    assert not any(evaluate.score(model, tokenizer, targets)["generated"])


def test_context_and_answer_are_cut_as_lm_eval_cuts_them(tmp_path):
    """Ids are those of the whole text; spaces at the end of the context count to the answer; bos begins."""
    ours = our_tokenizer("llama", tmp_path)[1]
    for context, answer in (("def f", "(self"), ("def f(x):  ", " return"), ("", "def")):
        ids, n = evaluate.encoded(ours, context, answer)
        assert ids == [ours.bos, *ours.encode(context + answer)]
        assert ours.decode(ids[-n:]) == (context + answer)[len(context.rstrip()):]
    assert evaluate.encoded(Tokenizer.bytes(), "", "ab") == ([0, 97, 98], 2)


def test_table_has_teacher_beside_student_with_standard_errors(tmp_path, capsys):
    """The command prints mean and standard error of each model, teacher first, of the questions in files, and
    of the difference question by question."""
    model, tokenizer = HypeNet.from_pretrained(STUDENT), Tokenizer.bytes()
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", q)
             for name, q in zip(("own", "picked"), questions_of(model, tokenizer, 6))]
    evaluate.main([str(STUDENT), "--tasks", *paths, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-3:] == ["teacher", "student", "difference"] and len(lines) == 5
    error = math.sqrt(2 / 3 * 1 / 3 / 5)
    for line, task in zip(lines[2:4], ("own", "picked")):
        assert line.split()[:2] == [task, "6"] and f"66.7% ± {error:.1%}  " in line, line
    cells, scores = [], []
    for model in (HypeNet.from_pretrained(HERE / "assets" / "tiny-teacher"), model):
        logp = np.array(evaluate.score(model, tokenizer, json_lines(paths[0]))["log-probability"])
        scores.append(logp)
    for logp in (*scores, scores[1] - scores[0]):
        cells.append(f"{logp.mean():.3f} ± {logp.std(ddof=1) / 6 ** 0.5:.3f}")
    assert re.split("  +", lines[1])[-3:] == cells
    evaluate.main([str(STUDENT), "--teacher", "none", "--tasks", paths[1], "--questions", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == "student" and "teacher" not in lines[0] and lines[1].split()[1] == "4"


def json_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The built-in tasks, as --write writes them, of a text in which words come again."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(900)]
    documents = [" ".join(rng.choice(words[i % 30 * 30:][:30], 400)) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(dict(text=text)) for text in documents))
    evaluate.main([str(STUDENT), "--data", str(folder / "text.jsonl"), "--write", str(folder),
                   "--questions", "20"])
    names = "last_word", "agreement", "copy", "recall"
    return {name: json_lines(folder / f"{name}.jsonl") for name in names}


@pytest.mark.parametrize("report, names", [
    (dict(recipe="paper", teacher="tiny"), ["teacher", "student"]), (dict(teacher="tiny"), ["student"])])
def test_only_a_conversion_has_a_teacher_beside_it(report, names, tmp_path, monkeypatch):
    """The report of a run from random weights names a size, which is no teacher."""
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(evaluate, "load", lambda args: ("tokenizer", "model", args.model))
    args = evaluate.Namespace(model=str(tmp_path), teacher=None, device="cpu")
    assert [name for name, *_ in evaluate.load_models(args)] == names


def test_a_long_answer_beside_a_long_context_fits():
    """Rows that fit a model's learned positions one by one are written one by one: with every answer the same
    as alone."""
    model = tiny(dtype=torch.float32, layers="AAA", **dict(GPT2, max_len=32), vocab_size=256)
    tokenizer = Tokenizer.bytes()
    rows = [evaluate.encoded(tokenizer, *q) for q in (("a" * 28, "b"), ("a", "bcdefgh"))]
    alone = [evaluate.written(model, tokenizer, [row])[0] for row in rows]
    assert evaluate.written(model, tokenizer, rows) == alone


def test_built_in_tasks_have_their_answers_in_context(tasks):
    """The last word stands in the first three quarters alone, copied words in the first line, a number in its
    sentence. The verb agrees with the first noun, and the second noun has the other number."""
    assert {name: len(questions) for name, questions in tasks.items()} == dict.fromkeys(tasks, 20)
    for q in tasks["last_word"]:
        word = q["target"].strip()
        assert len(word) == 6 and 180 < len(q["context"]) <= 3 * 256 / 4
        cut = 3 * len(q["context"]) // 4
        assert word in q["context"][:cut].split() and word not in q["context"][cut:]
    for q in tasks["agreement"]:
        words = q["context"].split()
        assert q["choices"][q["gold"]].strip() in ("are", "were", "have") if words[1].endswith("s") \
            else q["choices"][q["gold"]].strip() in ("is", "was", "has")
        assert words[1].endswith("s") != words[-1].endswith("s")
    assert {q["gold"] for q in tasks["agreement"]} == {0, 1}
    for q in tasks["copy"]:
        first, again = q["context"].split("\n")
        assert f"{again}{q['target']}" in first and len(q["target"].split()) == 4
    for q in tasks["recall"]:
        name = q["context"].split()[-2]
        assert f"magic number for {name} is{q['target']}." in q["context"]


@pytest.mark.parametrize("line", [
    "no json", "[1]", '{"context": "a"}', '{"context": 1, "target": "b"}', '{"context": "a", "target": ""}',
    '{"context": "a", "choices": ["b"], "gold": 1}', '{"context": "a", "choices": ["b"], "gold": -1}',
    '{"context": "a", "choices": "bc", "gold": 0}', '{"context": "a", "choices": []}', "[" * 99999,
    '{"context": "a", "target": " "}'])
def test_a_line_that_is_no_question_is_one_line(line, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"context": "a", "target": "b"}\n' + line)
    with one_line(f"{path}, question 2", "target"):
        evaluate.read_tasks([str(path)], 10)
    for text, word in (("", "at least 2"), ('{"context": "a", "target": "b"}\n'
                                            '{"context": "a", "choices": ["b"], "gold": 0}', "two files")):
        path.write_text(text)
        with one_line(str(path), word):
            evaluate.read_tasks([str(path)], 10)
    path.write_text('{"context": "a", "target": "b"}\n' * 2)
    with one_line("tasks twice"):
        evaluate.read_tasks([str(path)] * 2, 10)


@needs_transformers
@needs("accelerate")
@needs("lm_eval")
def test_lm_eval_gives_our_scores(tmp_path):
    """lm_eval --model hf reads the exported folder and the tasks that --write writes, offline. Its accuracy
    and perplexity are those of support/evaluate.py."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    ours, folder, tokenizer = HypeNet.from_pretrained(STUDENT), tmp_path / "out", Tokenizer.bytes()
    export.export(str(STUDENT), str(folder))
    targets, choices = questions_of(ours, tokenizer, 9)
    targets.append(dict(context="import o", target="s"))
    evaluate.write_tasks(dict(own=targets, picked=choices), tmp_path)
    found = simple_evaluate(
        "hf", f"pretrained={folder},trust_remote_code=True,dtype=float32,device=cpu", tasks=["own", "picked"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), batch_size=4,
        bootstrap_iters=0)["results"]
    logp = evaluate.score(ours, tokenizer, targets)["log-probability"]
    likeliest = evaluate.score(ours, tokenizer, choices)["likeliest choice"]
    assert math.isclose(found["own"]["perplexity,none"], math.exp(-np.mean(logp)), rel_tol=1e-4)
    assert found["picked"]["acc,none"] == np.mean(likeliest)
