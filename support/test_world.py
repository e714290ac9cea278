"""Two processes give what one gives: losses, weights, choices and reports (support/world.py)."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count

import pytest
import torch

import halo
from hypenet import HypeNet
from test_hypenet import PUBLISHED, data_of, home, log_of, rmse  # noqa: F401

# What each process does: the runs of a file, one after the other. A process may get a signal after a step,
# and the second may lack memory for more than one row.
PROGRAM = """
import json, os, sys, time
import halo, torch
from support import run, shard, world

def backward(loss_fn, rows, at_once, plain=halo.backward):
    if job["full"] and world.RANK and at_once > 1:
        raise torch.OutOfMemoryError
    return plain(loss_fn, rows, at_once)
halo.backward = backward

def log(a_run, plain=run.Run.log, **record):
    plain(a_run, **record)
    if [world.RANK, record["stage"], record["step"]] == job["at"]:
        open(sys.argv[1] + ".time", "w").write(str(time.time()))
        os.kill(os.getpid(), job["signal"])
run.Run.log = log
for job in json.load(open(sys.argv[1])):
    shard.too_large = lambda params: job["shared"]
    try:
        halo.main(job["argv"])
    except SystemExit as stop:
        assert stop.code == 130
"""


def argv(home, out, recipe):
    """Stages of four steps. Of a group's three rows the first of two processes gets two, of stage 3 the only
    row. The teacher llama has a head of its own, so FSDP gathers its embeddings apart. In the paper's recipe
    stage 1 trains both forms of each layer."""
    teacher = "teacher" if recipe == "article" else "llama"
    stages = dict(group=3) if recipe == "article" else dict(align=2, distil=2, finetune=1)
    plan = []
    for stage, batch in stages.items():
        plan += [f"{stage}.length=96", f"{stage}.batch={batch}", f"{stage}.tokens={4 * 96 * batch}"]
    return ["--teacher", str(home / teacher), "--data", *data_of(home), "--out", str(out),
            "--recipe", recipe, "--hidden", "2", "--device", "cpu", "--plan", *plan, "--trials", "3",
            "--eval-windows", "180", *(["--layers", "both"] if recipe == "paper" else [])]


def job(argv, at=None, number=None, shared=False, full=False):
    return dict(argv=argv, at=at, signal=number, shared=shared, full=full)


def torchrun(folder, *jobs):
    """Let two processes work on jobs; returns their end."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "jobs").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(folder / "program.py"), str(folder / "jobs")]
    env = os.environ | dict(PYTHONPATH=halo.HERE, OMP_NUM_THREADS="1")
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def stop_within(step):
    """A halo.backward that gets a signal within a step."""
    def backward(*args, plain=halo.backward, steps=count(1)):
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)
    return backward


def test_two_processes_are_one(home, tmp_path):                             # noqa: F811
    """Losses, norms and weights of each stage, scores of layers, costs of bases and the report are those of
    one process, also in a run that goes on with more processes or fewer, with the model shared out, or with
    too little memory in one process. When a process is killed, the other saves a checkpoint and ends within
    30 seconds, with one line.

    Of the paper's recipe one run is begun by one process, which a signal stops within a step. It goes on with
    two that share out the model, and is ended by two that do not. The other is begun by two, stopped by a
    signal to one of them, goes on, is stopped by the death of one of them, and is ended by one."""
    for recipe in PUBLISHED:
        halo.main(argv(home, tmp_path / recipe, recipe))
    one_two, two_one = tmp_path / "one, two", tmp_path / "two, one"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(halo, "backward", stop_within(3))
        halo.main(argv(home, one_two, "paper"))
    end = torchrun(tmp_path, job(["--resume", str(one_two)], [0, "distil", 2], signal.SIGTERM, shared=True),
                   job(["--resume", str(one_two)]), job(argv(home, tmp_path / "two", "article"), full=True),
                   job(argv(home, two_one, "paper"), [1, "align", 3], signal.SIGTERM),
                   job(["--resume", str(two_one)], [0, "distil", 2], signal.SIGKILL))
    print(end.stdout, end.stderr)
    assert end.returncode == 1 and time.time() - float((tmp_path / "jobs.time").read_text()) < 30
    line = f"halo.py: another process of this run has ended; go on with --resume {tmp_path}/two, one\n"
    assert end.stderr.count("halo.py:") == end.stderr.count(line) == 1
    assert "group1: out of memory; on with 1 rows" in end.stdout
    assert torch.load(two_one / "distil.pt")["step"] == 2
    halo.main(["--resume", str(two_one)])
    assert [r["step"] for r in log_of(two_one) if r["stage"] == "distil"] == [1, 2, 3, 4]
    for mine, recipe in (tmp_path / "two", "article"), (one_two, "paper"), (two_one, "paper"):
        same_runs(mine, tmp_path / recipe)


def same_runs(mine, other):
    """Assert that two runs have the same checkpoints, students, logs, reports and records."""
    for file in sorted(other.glob("*.pt")):
        saved, ref = (torch.load(folder / file.name)["module"] for folder in (mine, other))
        assert saved.keys() == ref.keys() and all(rmse(saved[key], ref[key]) < 1e-5 for key in ref), file
    saved, ref = (HypeNet.from_pretrained(folder) for folder in (mine, other))
    assert saved.config == ref.config
    for read in log_of, partial(read_json, name="report.json"), partial(read_json, name="run.json"):
        found, wanted = (list(numbers(read(folder))) for folder in (mine, other))
        assert len(found) > 15 and found == pytest.approx(wanted, rel=1e-5)


def read_json(folder, name):
    return json.loads((folder / name).read_text())


def numbers(value, key=""):
    """All numbers in a JSON value, without times and memory."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and key not in ("seconds", "peak_gb"):
        yield value
