"""Laws of what a run leaves and reads: its folder, its checkpoints, its streams, and files that are wrong."""
import argparse
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn

import hypenet
from hypenet import HypeNet
from support import common, pretrained, run, text, torture, world
from support.tokens import Tokenizer
from test_hypenet import HERE, INF, one_line, tiny

STEPS = 4


@pytest.fixture
def close():
    """A list of runs to close at the end of a test."""
    runs = []
    yield runs
    for each in runs:
        each.close()


def begin(close, folder, **options):
    """A Run, closed at the end of the test."""
    close.append(run.Run(str(folder), dict(micro=None, plain=True, out=str(folder)) | options))
    return close[-1]


def train(a_run, stage, seed=0, until=STEPS, last=0.0):
    """One stage of a Run: steps of a small layer, stopped after `until` of them. `last` is added to a weight
    in the last step. Returns the weights."""
    torch.manual_seed(seed)
    module = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    plan = types.SimpleNamespace(steps=STEPS, total=STEPS, length=1, batch=1, lr=0.1)

    def gradients(rows, at_once):
        optimizer.zero_grad()
        loss = module(rows.float()).square().mean()
        loss.backward()
        return loss.detach()
    progress = a_run.stage(stage, plan, module, optimizer, gradients)
    corpus = types.SimpleNamespace(advance=lambda plan: None)
    for step, rows in progress.steps(corpus, lambda *_: lambda step: np.full((1, 3), step + 1)):
        loss, norm = progress.finite(progress.compute(rows), 1.0)
        optimizer.step()
        if step + 1 == STEPS:
            module.weight.data[0, 0] += last
        a_run.asked = step + 1 == until < STEPS
        progress.done(step, loss, norm, lr=0.1)
    return module.weight.detach()


# ---- the folder of a run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    (dict(out=None), None), ({}, ["in use", str(os.getpid()), "name another"]),
    (dict(resume=True), ["in use", str(os.getpid())])], ids=["default", "--out", "--resume"])
def test_a_folder_has_one_run(options, words, close, tmp_path):
    """Of two runs that take one folder, the second takes the next folder where no flag names it. Else it gets
    one line with the process that has the folder. A closed run leaves its folder to --resume alone."""
    first = begin(close, tmp_path / "a")
    if words is None:
        assert begin(close, tmp_path / "a", **options).folder == str(tmp_path / "a-2")
        return
    with one_line(*words):
        begin(close, tmp_path / "a", **options)
    first.close()
    if "resume" in options:
        assert begin(close, tmp_path / "a", **options).folder == first.folder
    else:
        with one_line("in use"):
            begin(close, tmp_path / "a", **options)


@pytest.mark.parametrize("files, unused", [
    ([], True), ([".lock", "run.json.tmp31"], True), (["run.json"], False), (["a.tmp"], False)])
def test_what_a_kill_leaves_is_no_file(files, unused, close, tmp_path):
    """A folder that holds nothing else counts as empty. The next run in the folder removes what is left."""
    folder = tmp_path / "a"
    folder.mkdir()
    for file in files:
        (folder / file).touch()
    assert run.new_folder(None, str(folder)) == str(folder) + "-2" * (not unused)
    if unused:
        begin(close, run.new_folder(str(folder), ""))
        assert sorted(os.listdir(folder)) == [".lock", "run.json"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS = {  # what happens to the files of a run whose stages a and b are done, and whose stage c has begun
    "a byte": lambda folder: flip(folder / "c.pt"),
    "a byte of a stage that is done": lambda folder: flip(folder / "a.pt"),
    "another stage": lambda folder: shutil.copy(folder / "a.pt", folder / "b.pt"),
    "another run": lambda folder: shutil.copy(folder / "other" / "c.pt", folder / "c.pt"),
    "empty": lambda folder: (folder / "c.pt").write_bytes(b""),
    "cut off": lambda folder: os.truncate(folder / "c.pt", 999),
    "run.json altered": lambda folder: replace(folder / "run.json", '"threads": ', '"threads": 1'),
    "run.json without its hash": lambda folder: replace(folder / "run.json", "sha256", "sha"),
    "run.json cut off": lambda folder: os.truncate(folder / "run.json", 99),
}


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def abc(close, folder, seed=0, **options):
    """A run of three stages, whose third is stopped after two steps."""
    a_run = begin(close, folder, **options)
    weights = [train(a_run, stage, seed) for stage in "ab"]
    if not options:
        with pytest.raises(SystemExit):
            train(a_run, "c", seed, until=2)
    else:
        weights.append(train(a_run, "c", seed))
    a_run.close()
    return weights


@pytest.mark.parametrize("harm", [None, *HARMS])
def test_only_files_as_they_were_written_are_read(harm, close, tmp_path, capsys):
    """A file of a run that was altered, damaged or swapped is one line that names the file and what to do. A
    run whose files are whole goes on."""
    abc(close, tmp_path / "a")
    abc(close, tmp_path / "a" / "other", seed=1)
    if harm is None:
        whole = begin(close, tmp_path / "b")
        assert abc(close, tmp_path / "a", resume=True)[2].equal([train(whole, stage) for stage in "abc"][2])
        return
    HARMS[harm](tmp_path / "a")
    words = ("run.json", "run") if "run.json" in harm else (".pt", "remove it to train this stage again")
    with one_line(*words):
        abc(close, tmp_path / "a", resume=True)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_two_files_is_no_damage(after, close, tmp_path, monkeypatch):
    """run.json holds the hash of a checkpoint before the checkpoint has its name: whichever of the two a kill
    leaves old, the run goes on, again and again."""
    abc(close, tmp_path / "a")
    reference = abc(close, tmp_path / "b") and abc(close, tmp_path / "b", resume=True)

    def kill(old, new, plain=os.replace):
        if after or not new.endswith(".pt"):
            plain(old, new)
        if new.endswith(".pt"):
            raise KeyboardInterrupt                   # no handler of the code's own
    for _ in range(1 if after else 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", kill)
            abc(close, tmp_path / "a", resume=True)
        close[-1].close()
    assert all(a.equal(b) for a, b in zip(abc(close, tmp_path / "a", resume=True), reference))


def test_kills(tmp_path):
    """A run of halo.py that is killed at a random moment goes on bit for bit."""
    argv = [sys.executable, "-m", "support.torture", "--kills", "--moments", "1", "--renames", "0"]
    found = subprocess.run(argv, cwd=HERE, capture_output=True, text=True)
    assert found.stdout.startswith("1/1 runs killed at a random moment"), found.stderr


def test_faults_are_those_of_the_code():
    """Each fault of support.torture stands in the code once, and changes the code."""
    for file, old, new in torture.FAULTS:
        assert (HERE / file).read_text().count(old) == 1 and old != new, (file, old)


def test_another_number_of_threads_is_said(close, tmp_path, monkeypatch, capsys):
    """A run that goes on with other threads says that its numbers differ, and goes on."""
    begin(close, tmp_path, device="cpu").close()
    for threads, said in ((torch.get_num_threads(), 0), (77, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        begin(close, tmp_path, resume=True, device="cpu").close()
        assert capsys.readouterr().err.count("77") == said


def test_the_clock_of_a_run_goes_on(close, tmp_path):
    """The seconds of a run are those of all its processes."""
    first = begin(close, tmp_path)
    first.began -= 1000
    first.save()
    first.close()
    assert 1000 <= begin(close, tmp_path, resume=True).seconds() < 2000


def test_weights_that_are_not_finite_are_not_saved(close, tmp_path):
    """Neither in a checkpoint, after the last step, nor as a model: one line names the flag that helps."""
    with one_line("a weight is not finite", "--plan a.lr"):
        train(begin(close, tmp_path / "a"), "a", last=INF)
    assert not (tmp_path / "a" / "a.pt").exists()
    model = tiny(dtype=torch.float32)
    model.norm.weight.data[0] = INF
    with one_line("norm.weight"):
        model.save_pretrained(tmp_path / "b")
    assert not os.listdir(tmp_path / "b")


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """The file is synced, then renamed, then its folder is synced. Its mode is that of any new file."""
    seen = []

    def fsync(file, plain=os.fsync):
        seen.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        plain(file)

    def replace(old, new, plain=os.replace):
        seen.append("rename")
        plain(old, new)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    hypenet.write_file(str(tmp_path / "a"), "text")
    assert seen == ["file", "rename", "folder"]
    (tmp_path / "b").touch()
    tiny().save_pretrained(tmp_path)
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "b").stat().st_mode}


def test_weights_are_the_last_file_of_a_model(tmp_path, monkeypatch):
    """A kill while a model is saved leaves a whole model, or none that anything takes for a model."""
    seen = []
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append(os.path.basename(new)))
    tiny().save_pretrained(tmp_path)
    assert seen == ["config.json", "model.safetensors"]


# ---- what is read ------------------------------------------------------------------------------------------


def student(folder, **fields):
    """A folder with a model, some fields of whose config.json are changed, or left out (...)."""
    tiny(dtype=torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: x for k, x in config.items() if x is not ...}))
    return folder


@pytest.mark.parametrize("load", [pretrained.load, HypeNet.from_pretrained])
@pytest.mark.parametrize("value", [math.nan, INF, torch.int32, torch.complex64], ids=str)
def test_weights_are_finite_numbers(value, load, tmp_path):
    """Weights that are NaN, infinite, integers or complex are one line that names the first of them."""
    from safetensors.torch import load_file, save_file
    file = student(tmp_path) / "model.safetensors"
    weights = load_file(file)
    w = weights["norm.weight"]
    w[-1] = value if isinstance(value, float) else 1
    weights["norm.weight"] = w if isinstance(value, float) else w.to(value)
    save_file(weights, file)
    with one_line("norm.weight"):
        load(tmp_path)


@pytest.mark.parametrize("fields, word", [
    (dict(norm_eps=...), "norm_eps"), (dict(n_ebd=3), "n_ebd"), (dict(layers="A" * 10 ** 6), "1,000,000")])
def test_configs_are_whole(fields, word, tmp_path):
    """A config.json of ours without a field, with a strange one, or with layers that the file lacks is one
    line at once."""
    began = time.time()
    with one_line(word):
        pretrained.load(student(tmp_path, **fields))
    assert time.time() - began < 5


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("harm", ["a pipe", "deep"])
def test_no_file_is_waited_for(file, harm, tmp_path):
    """A pipe that nobody writes to, and JSON nested 100,000 deep, are one line at once."""
    Tokenizer.bytes().save(student(tmp_path))
    (tmp_path / file).unlink()
    if harm == "a pipe":
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).write_text("[" * 10 ** 5)
    with one_line(str(tmp_path)):
        pretrained.load(tmp_path)
        Tokenizer.load(tmp_path)


def write_tokenizer(folder, vocab, post=None, **config):
    """A folder with a tokenizer.json of these tokens, and its tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                pre_tokenizer=None, post_processor=post, decoder=None,
                model=dict(type="BPE", vocab=vocab, merges=[]))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token_id=2) | config))
    return folder


BOS = dict(type="TemplateProcessing", single=[{"SpecialToken": dict(id="<s>", type_id=0)},
                                              {"Sequence": dict(id="A", type_id=0)}],
           pair=[], special_tokens={"<s>": dict(id="<s>", ids=[99], tokens=["<s>"])})


@pytest.mark.parametrize("vocab, more, word", [
    (dict(b=1), {}, None), (dict(b=0), {}, "2 different"), (dict(b=-1), {}, "-1"), (dict(b=1.5), {}, "1.5"),
    (dict(b=2 ** 32 - 1), {}, "4,294,967,295"), (dict(b=1), dict(eos_token_id=1.5), "1.5"),
    (dict(b=1), dict(eos_token_id=True), "True"), (dict(b=1), dict(eos_token_id=9), "9"),
    (dict(b=1), dict(add_bos_token=True, bos_token="<s>"), "<s>"),
    (dict(b=1), dict(post=BOS), "99")], ids=str)
def test_ids_of_a_tokenizer_are_checked(vocab, more, word, tmp_path):
    """Ids that are negative, fractional, given twice or absurd, and ids of bos and eos that no token has, are
    one line, before memory is taken for them."""
    write_tokenizer(tmp_path / "t", {"a": 0, "</s>": 2} | vocab, **more)
    if word is None:
        assert Tokenizer.load(tmp_path / "t").n_vocab == 3
        return
    with one_line(word):
        Tokenizer.load(tmp_path / "t")


def test_documents_begin_with_bos_and_end_with_the_end(tmp_path):
    """A tokenizer that has bos puts it before every document."""
    vocab = {"a": 0, "b": 1, "</s>": 2, "<s>": 3}
    write_tokenizer(tmp_path, vocab, add_bos_token=True, bos_token="<s>")
    found = text.encode_documents(Tokenizer.load(tmp_path), ["ab", "b"])
    assert [ids.tolist() for ids in found] == [[3, 0, 1, 2], [3, 1, 2]]


def test_no_text_is_cut_or_filled_up(tmp_path):
    """A tokenizer.json may ask for batches of one length, for a model. Text keeps its own length."""
    file = write_tokenizer(tmp_path, {"a": 0, "b": 1, "</s>": 2}) / "tokenizer.json"
    cut = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    fill = dict(strategy=dict(Fixed=9), direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0,
                pad_token="a")
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(truncation=cut, padding=fill)))
    assert Tokenizer.load(tmp_path).encode("abbba") == [0, 1, 1, 1, 0]


def shard(path, ids):
    header = np.zeros(256, "<i4")
    header[:3] = text.MAGIC, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return str(path)


def test_a_shard_is_judged_before_a_tokenizer_is_fetched(tmp_path, monkeypatch):
    """Ids that GPT-2 lacks are one line, without a network."""
    monkeypatch.setattr(Tokenizer, "load", lambda *_: pytest.fail("a tokenizer was fetched"))
    good, bad = shard(tmp_path / "a.bin", [1] * 999), shard(tmp_path / "b.bin", [1] * 998 + [60000])
    with one_line("b.bin", "60,000"):
        text.Corpus(Tokenizer.bytes(), [good, bad], cell=64)


def test_digests_name_what_was_read(tmp_path, monkeypatch):
    """The hash of a text changes with its words, with the ends of documents, and with an id in a shard. The
    hash of a model changes with a weight and with its tokenizer, not with its folder."""
    monkeypatch.setattr(Tokenizer, "load", lambda *_: Tokenizer.bytes())

    def text_of(*texts, last=5):
        lines = [json.dumps(dict(text=t)) for t in texts]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        paths = [str(tmp_path / "a.jsonl"), shard(tmp_path / "a.bin", [7] * 9999 + [last])]
        return text.Corpus(Tokenizer.bytes(), paths, cell=16).facts["sha256"]
    texts = ["one ", "two ", "one two", "one twos"]
    found = [text_of(*texts), text_of(*texts[:2], texts[2] + texts[3]), text_of(*texts, last=6)]
    assert len(set(found)) == 3 and text_of(*texts) == found[0]

    Tokenizer.bytes().save(student(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "report.json").touch()
    first = pretrained.digest(tmp_path / "a")
    assert pretrained.digest(tmp_path / "b") == first
    for file in "model.safetensors", "tokenizer.json":
        flip(tmp_path / "b" / file)
        assert pretrained.digest(tmp_path / "b") != first
        shutil.copy(tmp_path / "a" / file, tmp_path / "b" / file)


def test_the_cache_keeps_nothing_of_a_killed_run(tmp_path, monkeypatch):
    """A file that was begun over an hour ago goes when the next text is written. A newer one may be another
    run's."""
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path))
    for name, age in ("old", 4000), ("new", 9):
        (tmp_path / f"{name}.ids.tmp7").touch()
        os.utime(tmp_path / f"{name}.ids.tmp7", (time.time() - age,) * 2)
    text.write_shard("name", "", Tokenizer.bytes(), lambda file: np.zeros(0, text.INDEX))
    assert [path.name for path in tmp_path.glob("*.tmp*")] == ["new.ids.tmp7"]


@pytest.mark.parametrize("ending, n", [(".txt", 50_000_000), (".jsonl", 9_000_000)])
def test_one_long_line_is_cut(ending, n, tmp_path):
    """A document of one long line is cut into pieces, and none of its characters is lost."""
    line = "x" * n
    (tmp_path / f"a{ending}").write_text(line if ending == ".txt" else json.dumps(dict(text=line)))
    pieces = [piece for _, piece in text.documents([(str(tmp_path / f"a{ending}"), None)])]
    assert max(map(len, pieces)) <= text.LONGEST and "".join(pieces) == line


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/b", "..", ".", ""])
def test_names_stay_in_their_folder(name):
    """A name of a file cannot lead out of the program's own folder."""
    assert common.file_name("a.b") == "a.b"
    with pytest.raises(argparse.ArgumentTypeError, match="without a folder"):
        common.file_name(name)


# ---- streams and the first seconds -------------------------------------------------------------------------


def stream_of(kind):
    if kind == "full":
        return open("/dev/full", "w")
    if kind == "closed":
        stream = open(os.devnull, "w")
        stream.close()
        return stream
    return open(os.devnull, "w", encoding="ascii") if kind == "ascii" else None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("kind", ["full", "closed", "none", "ascii"])
@pytest.mark.parametrize("lasting", [True, False])
def test_a_run_outlives_its_output(kind, lasting, monkeypatch):
    """A program that leaves files ends its work, whatever becomes of stdout and stderr. Another program ends
    with an error where a disk has no room for its output."""
    def work(argv):
        for stream in sys.stdout, sys.stderr:
            print("\u2014 \udcff", file=stream, flush=True)
        done.append(argv)
    done = []
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, stream_of(kind))
    if lasting or kind != "full":
        common.command_line("x.py", work, [1], lasting=lasting)
        assert done == [[1]]
    else:
        with pytest.raises(SystemExit) as stop:
            common.command_line("x.py", work, [1])
        assert stop.value.code == 2 and not done


@pytest.mark.parametrize("program", ["sample.py", "bench.py"])
def test_ctrl_c_in_the_first_seconds_is_silent(program, tmp_path):
    """While torch is imported, Ctrl-C ends a program without a traceback."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    found = subprocess.run([sys.executable, HERE / program], env=os.environ | dict(PYTHONPATH=str(tmp_path)),
                           capture_output=True, text=True)
    assert found.returncode == -signal.SIGINT and found.stderr == ""


def test_ctrl_c_works_as_ever_once_torch_is_there(capfd):
    """A program takes Ctrl-C for an error again as soon as its command line runs."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as stop:
            common.command_line("x.py", lambda _: signal.raise_signal(signal.SIGINT), [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and capfd.readouterr().err == ""


@pytest.mark.parametrize("processes, error, ignored", [(1, True, False), (2, True, True), (2, False, False)])
def test_a_message_comes_before_torchruns_signal(processes, error, ignored, close, tmp_path, monkeypatch):
    """When one of several processes fails, it ignores signals until it has said why."""
    before = signal.getsignal(signal.SIGTERM)
    a_run = begin(close, tmp_path, device="cpu")
    monkeypatch.setattr(world, "SIZE", processes)
    try:
        with pytest.raises(ValueError) if error else nullcontext():
            try:
                if error:
                    raise ValueError
            finally:
                a_run.close()
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) == ignored
    finally:
        for sig, handler in a_run.handlers.items():
            signal.signal(sig, handler)
    assert signal.getsignal(signal.SIGTERM) == before
