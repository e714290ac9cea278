"""Try to break the project: kill runs, and put faults into the code.

    python -m support.torture --kills        kill a small run at 50 random moments, and at every rename of a
                                             file. Resume the run, compare it with a run that nobody killed
    python -m support.torture --faults       put each fault of support/faults.py into a copy of the project,
                                             where the tests must fail
    python -m support.torture --faults 3 17 -k "plan or log"     two of the faults, against some of the tests

Both modes run on a CPU, --kills in minutes, --faults in hours. A kill is SIGKILL: no handler runs, and files
stay as they are. --kills needs fork, which Windows lacks.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import halo
from hypenet import HypeNet, HypeNetConfig
from support import run
from support.common import Parser, command_line, number
from support.faults import FAULTS
from support.tokens import Tokenizer

HERE = Path(__file__).resolve().parent.parent

# ---- kills -------------------------------------------------------------------------------------------------


class Hasty(run.Stage):
    """A stage that saves checkpoints as often as a stage may: saving takes at most 5% of the time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pause = 0.0


def make_teacher(folder):
    """Write a random teacher for 96 tokens, and a text, to a folder. Returns the arguments of a small run."""
    torch.manual_seed(0)
    config = HypeNetConfig(n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_hidden=64, max_len=96)
    HypeNet(config).save_pretrained(folder / "teacher")
    HypeNet.from_pretrained(folder / "teacher")      # imports more of torch, once for all runs
    Tokenizer.bytes().save(folder / "teacher")
    rng = random.Random(0)
    texts = ["".join(rng.choices("some words of a text\n", k=900)) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    plan = [f"{stage}.{item}" for stage in ("align", "distil", "finetune")
            for item in ("length=96", "batch=2", "tokens=1920")]
    return ["--teacher", str(folder / "teacher"), "--data", str(folder / "text.jsonl"), "--device", "cpu",
            "--plan", *plan, "--trials", "1", "--eval-windows", "2", "--logit-base", "none"]


def start(argv, kill=0):
    """Start halo.py in a process of its own. Returns the process id. kill n: the process kills itself before
    its n-th rename of a file. kill -n: after this rename. The process is a fork, because to import torch
    takes longer than the run."""
    pid = os.fork()
    if pid:
        return pid
    n_renames = 0

    def replace(old, new, plain=os.replace):
        nonlocal n_renames
        n_renames += 1
        if n_renames == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(old, new)
        print("rename", file=renames, flush=True)
        if n_renames == -kill:
            os.kill(os.getpid(), signal.SIGKILL)
    status = 1
    try:
        torch.set_num_threads(1)
        run.Stage = Hasty
        os.replace = replace
        with open(os.devnull, "w") as nowhere, open("renames", "w") as renames:
            sys.stdout = sys.stderr = nowhere
            halo.main(argv)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def wait(pid):
    """Wait for a process to end. Returns the exit status, or minus the signal that killed the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(out):
    """The contents, by file name, that a resumed run must share with an unbroken run. Times are left out."""
    names = "model.safetensors", "config.json", "tokenizer.json"
    found = {name: (out / name).read_bytes() for name in names}
    found["log.jsonl"] = [json.loads(line) | dict(ms=0) for line in open(out / "log.jsonl")]
    report = json.loads((out / "report.json").read_text())
    found["report.json"] = report | dict(seconds=0, peak_gb=0)
    return found


def leftovers(out):
    """{name of an unfinished file in a folder: number of bytes}."""
    return {path.name: path.stat().st_size for path in out.rglob("*") if run.is_leftover(path.name)}


def survives(argv, out, reference, kill):
    """Kill a run, resume the run, and remove its folder. kill: seconds until the kill (a float), or the
    number of a rename (an int), as in `start`. Returns the leftovers of the kill, or None if the run ended
    before the kill. ValueError unless the resumed run equals the reference."""
    pid = start([*argv, "--out", str(out)], kill=kill if isinstance(kill, int) else 0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(pid, signal.SIGKILL)
    status = wait(pid)
    if status == 0:
        shutil.rmtree(out)
        return None
    if status != -signal.SIGKILL:
        raise ValueError(f"halo.py {' '.join(argv)} ends by itself with status {status}")
    left = leftovers(out) if out.exists() else {}
    begun = (out / "run.json").exists()
    again = ["--resume", str(out)] if begun else [*argv, "--out", str(out)]
    status = wait(start(again))
    if status or leftovers(out):
        raise ValueError(f"killed at {kill}: halo.py {' '.join(again)} ends with status {status}; "
                         f"{leftovers(out)} stays")
    found = result(out)
    wrong = [name for name in reference if found[name] != reference[name]]
    if wrong:
        raise ValueError(f"killed at {kill}: {', '.join(wrong)} in {out} are not those of an unbroken run")
    shutil.rmtree(out)
    return left


def kills(n_moments, n_renames=None, seed=0):
    """Kill a run at n_moments random moments, and before and after each rename. n_renames: how many renames,
    drawn at random. Prints the counts. ValueError if a run does not survive."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.chdir(folder)
        argv = make_teacher(folder)
        began = time.time()
        if wait(start([*argv, "--out", "reference"])):
            raise ValueError(f"the run fails without a kill: halo.py {' '.join(argv)}")
        seconds = time.time() - began
        reference = result(folder / "reference")
        renames = range(1, len(open("renames").readlines()) + 1)
        if n_renames is not None:
            renames = rng.sample(renames, n_renames)
        lefts = []                                    # the leftovers of each kill
        while len(lefts) < n_moments:
            moment = rng.uniform(0, seconds)
            left = survives(argv, folder / "killed", reference, moment)
            if left is None:
                seconds = moment                      # this run took at most so long
            else:
                lefts.append(left)
        print(f"{len(lefts)}/{n_moments} runs killed at a random moment of {seconds:.1f} s: bit for bit the "
              "unbroken run")
        found = [survives(argv, folder / "killed", reference, kill) for n in renames for kill in (n, -n)]
        found = [left for left in found if left is not None]        # None: the run ended before the kill
        print(f"{len(found)}/{2 * len(renames)} runs killed before or after a rename: bit for bit the "
              "unbroken run")
        largest = max([*lefts, *found, {}], key=lambda files: sum(files.values()))
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in largest.items()) or "nothing"
        print(f"most that a kill left over: {sizes}; the next start removed it")


# ---- faults ------------------------------------------------------------------------------------------------


def survivors(numbers, argv):
    """Put each fault into a copy of the project and run pytest with argv there. Returns the numbers of the
    faults that no test has found."""
    found = []
    for n in numbers:
        file, old, new = FAULTS[n - 1]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".git", "out", ".venv", "*cache*"))
            code = (copy / file).read_text()
            if code.count(old) != 1:
                raise ValueError(f"fault {n}: {file} has {old!r} {code.count(old)} times, not once")
            (copy / file).write_text(code.replace(old, new))
            (copy / "support" / "faults.py").write_text("FAULTS = []\n")     # a test looks for every fault
            tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *argv], cwd=copy,
                                   capture_output=True, text=True)
        failed = [line for line in tests.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if tests.returncode == 0:
            found.append(n)
        print(f"{n:2d} {file}: {new}: {failed[0] if failed else tests.stdout[-200:]}", flush=True)
    return found


def get_args(argv):
    p = Parser(prog="python -m support.torture", description=__doc__.split("\n\n")[0])
    add = p.add_argument
    add("--kills", action="store_true", help="kill runs")
    add("--moments", type=number(int, 0), default=50, help="random moments of a kill; default: %(default)s")
    add("--renames", type=number(int, 0), help="renames of a file at which to kill; default: all")
    add("--faults", type=number(int, 1, len(FAULTS)), nargs="*", metavar="N",
        help="put faults into the code, all or the faults N; further arguments go to pytest")
    args, rest = p.parse_known_args(argv)
    if not args.kills and args.faults is None:
        p.error("give --kills or --faults")
    return args, rest


def run_main(argv):
    args, rest = get_args(argv)
    if args.kills:
        kills(args.moments, args.renames)
    if args.faults is not None:
        numbers = args.faults or range(1, len(FAULTS) + 1)
        found = survivors(numbers, rest)
        print(f"{len(found)} of {len(numbers)} faults pass all tests: {found}")


if __name__ == "__main__":
    command_line("torture", run_main, None)
