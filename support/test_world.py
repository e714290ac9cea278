"""Two processes give what one gives: losses, weights, choices and reports (support/world.py).

The processes are started by torchrun, on the CPU, once for all tests but that of a killed one."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import halo
from hypenet import HypeNet
from support import run
from test_hypenet import data_of, home, log_of, rmse  # noqa: F401

# What each process does: the runs of a file, one after the other. A process may stop or be killed at a step.
PROGRAM = """
import json, os, signal, sys
import halo
from support import run, world

def at_step(a_run, plain=run.Run.log, **record):
    plain(a_run, **record)
    if [world.RANK, record["stage"], record["step"]] == job["at"]:
        os.kill(os.getpid(), job["signal"])
run.Run.log = at_step
for job in json.load(open(sys.argv[1])):
    try:
        halo.main(job["argv"])
    except SystemExit as stop:
        assert stop.code == 130
"""


def argv(home, out, recipe, batch=4):
    """A run of four steps a stage, with selection and the fit of `a` in the paper's recipe."""
    stages = ["group"] if recipe == "article" else ["align", "distil", "finetune"]
    sizes = dict(length=96, batch=batch, tokens=4 * 96 * batch)
    plan = [f"{stage}.{key}={x}" for stage in stages for key, x in sizes.items()]
    return ["--teacher", str(home / "teacher"), "--data", *data_of(home), "--out", str(out), "--recipe", recipe,
            "--device", "cpu", "--plan", *plan, "--trials", "5", "--eval-windows", "300"]


def job(argv, at=None, number=signal.SIGTERM):
    return dict(argv=argv, at=at, signal=number)


def torchrun(folder, *jobs):
    """Let two processes work on jobs. Returns the exit status, and what they printed."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(folder / "program.py"), str(folder / "jobs.json")]
    env = os.environ | dict(PYTHONPATH=halo.HERE, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def stopped(monkeypatch, argv, at):
    """A run of one process that ends after a step."""
    def log(a_run, plain=run.Run.log, **record):
        plain(a_run, **record)
        if (record["stage"], record["step"]) == at:
            signal.raise_signal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "log", log)
        halo.main(argv)


@pytest.fixture(scope="module")
def outs(home, tmp_path_factory):                                           # noqa: F811
    """Folders of runs, by name: of one process, of two, begun by one and ended by two, and the reverse."""
    folder = tmp_path_factory.mktemp("world")
    for recipe in halo.RECIPES:
        halo.main(argv(home, folder / f"{recipe} by one", recipe))
    halo.main(argv(home, folder / "idle by one", "paper", batch=1))
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, argv(home, folder / "one, then two", "paper"), ("distil", 2))
    found = torchrun(
        folder,
        *(job(argv(home, folder / f"{recipe} by two", recipe)) for recipe in halo.RECIPES),
        job(argv(home, folder / "idle by two", "paper", batch=1)),
        job(["--resume", str(folder / "one, then two")]),
        job(argv(home, folder / "two, then one", "paper"), at=[1, "finetune", 2]))
    print(*found)
    assert found[0] == 0
    halo.main(["--resume", str(folder / "two, then one")])
    return folder


@pytest.mark.parametrize("name, ref", [
    ("paper by two", "paper by one"), ("article by two", "article by one"), ("idle by two", "idle by one"),
    ("one, then two", "paper by one"), ("two, then one", "paper by one")])
def test_two_processes_are_one(name, ref, outs):
    """Losses, norms, weights, layers, logit base and report are those of one process: with a row for each, with
    an idle process, and in a run that goes on with more processes or fewer."""
    logs = [log_of(outs / out) for out in (name, ref)]
    for mine, other in zip(*logs, strict=True):
        print(mine, other)
        assert mine == {key: pytest.approx(x, rel=1e-5) if key in ("loss", "norm") else x for key, x in other.items()}
    mine, other = (HypeNet.from_pretrained(outs / out) for out in (name, ref))
    assert mine.config == other.config
    for (key, w), v in zip(mine.state_dict().items(), other.state_dict().values()):
        print(key, rmse(w, v))
    mine, other = (json.loads((outs / out / "report.json").read_text()) for out in (name, ref))
    for numbers in mine, other:
        for key in ("seconds", "peak_gb"):
            numbers.pop(key)
    print(mine, other)
