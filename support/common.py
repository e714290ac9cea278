"""What the programs share: command lines, devices, JSON files."""
import argparse
import json
import math
import os
import sys

import torch

from hypenet import write_file


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=math.inf):
    """A type for add_argument: an int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))
        return value
    return parse


def default_device(name=None):
    """The device asked for (ValueError if there is no such one), else CUDA or Apple's, else the CPU. A GPU
    that is asked for by number becomes the current one, on which graphs are recorded."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: there is no such device here; use {default_device()}") from None
    return name


def command_line(prog, run, argv):
    """run(argv); what the user can mend ends in one line and exit status 2."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:                          # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as e:
        print(f"{prog}: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def read_json(path, name, what):
    """The object in path/name; ValueError, no {what}, where there is none."""
    try:
        with open(os.path.join(path, name), encoding="utf-8") as f:
            value = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} in {path}: it has no {name}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}/{name} is no {what}: it is not JSON, or no object; copy it again")
    return value


def write_text(path, text):
    def write(tmp):
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(text)
    write_file(path, write)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
