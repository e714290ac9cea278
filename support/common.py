"""What the programs share: command lines, errors, devices, files of text and JSON."""
import argparse
import errno
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import partial

import torch

from hypenet import write_file
from support import world

# ---- command lines -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. A flag must be written out: --ctx, never --ct."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        world.fail()
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def number(kind, low, high=math.inf):
    """A type for add_argument: an int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            noun = "number" if kind is float else "whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} of at least {low:g}"
                                             + (f" and at most {high:g}" if high < math.inf else ""))
        return value
    return parse


def filled(text):
    """A type for add_argument: text that is not empty, as the value of an unset shell variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; give one, or leave the flag out")
    return text


def file_name(text):
    """A type for add_argument: the name of a file in a folder of the program's own, so no path."""
    if text != os.path.basename(text) or text in ("", "..", "."):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file; give a name without a folder")
    return text


def default_device(name=None):
    """The device asked for, else CUDA, Apple's or the CPU. ValueError if this machine has no such device. A
    GPU with a number becomes the current one, because CUDA graphs are recorded on the current one."""
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


def command_line(prog, run, argv, lasting=False):
    """Call run(argv) for a program. An error ends it with one line: exit status 2 where the user can mend the
    error, 1 where the program is wrong, 130 after Ctrl-C. lasting: the program leaves files, and goes on if
    nobody can read its output."""
    argv = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:           # so set while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    world.begin()
    sys.stdout = writable(sys.stdout, lasting)
    sys.stderr = writable(sys.stderr, lasting=True)
    try:
        run(argv)
        sys.stdout.flush()
    except BrokenPipeError:                          # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        world.leave(130)
        raise SystemExit(130) from None
    except Exception as error:
        line = explain(error, argv)
        status = 2 if line else 1
        line = line or (f"this program has a fault ({type(error).__name__}: {one_line(error)[:200]}); please "
                        f"report it with the traceback in {keep_traceback(prog)}")
        world.fail()
        print(f"{prog}: {line}", file=sys.stderr)
        world.leave(status)
        raise SystemExit(status) from error


def writable(stream, lasting):
    """A stream for output in place of one that may be closed, or None. A character that its encoding lacks is
    shown as a number. lasting: what cannot be written is lost."""
    if stream is None or stream.closed:
        stream = open(os.devnull, "w")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return Lasting(stream) if lasting and not isinstance(stream, Lasting) else stream


class Lasting:
    """A stream that drops what cannot be written."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):           # ValueError: the stream is closed
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


# ---- errors ------------------------------------------------------------------------------------------------

TOO_LARGE = (MemoryError, OverflowError, RecursionError, torch.OutOfMemoryError)
TOO_LARGE_IN_WORDS = re.compile(                     # of torch and numpy
    "out of memory|not enough memory|can't allocate memory|Invalid buffer size|ALLOC_FAILED"
    "|size calculation overflowed|Overflow when unpacking|array is too big|Maximum allowed dimension")
FIXES = {                                            # of errors of the operating system
    errno.ENOSPC: "the disk is full; free some space, or write to another disk",
    errno.EDQUOT: "your share of the disk is used up; free some space, or write to another disk",
    errno.EROFS: "this disk can only be read; write to another disk",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENOTDIR: "a part of this path is a file; give a folder",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}


def one_line(error):
    return " ".join(str(error).split())


def explain(error, argv):
    """What an error means and how to mend it, in one line; None if the user cannot mend it."""
    text = one_line(error)
    code = getattr(error, "errno", None) or int(re.findall(r"os error (\d+)|$", text)[0] or 0)   # Rust's
    if code in FIXES or isinstance(error, OSError):
        return explain_system(text, code, getattr(error, "filename", None))
    plain = isinstance(error, (RuntimeError, TypeError, ValueError))
    if isinstance(error, TOO_LARGE) or plain and TOO_LARGE_IN_WORDS.search(text):
        largest = largest_number(argv)
        fix = f"the largest number given is {largest}: lower it" if largest else "give less text"
        kind = type(error).__name__
        return f"a size is more than this machine can hold or count ({kind}: {text[:200]}); {fix}"
    if isinstance(error, ImportError):
        return f"{text}; install what requirements.txt lists"
    return text if isinstance(error, ValueError) else None


def explain_system(text, code, path):
    """An error of the operating system: its file, and the fix that fits."""
    fix = FIXES.get(code)
    if code in (errno.EACCES, errno.EPERM):
        fix = f"you need {missing_permission(path)}" if path else "you lack a permission"
    if fix is None:
        return text
    return f"{path}: {fix}" if path else f"{fix} ({text})"


def missing_permission(path):
    """The permission that an access to a path lacks, such as "write permission in /data"."""
    if os.path.exists(path):
        kind = "write" if os.access(path, os.R_OK) else "read"
        return f"{kind} permission for it"
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    kind = "write" if os.access(folder, os.X_OK) else "search"
    return f"{kind} permission in {folder}"


def largest_number(argv):
    """The flag with the largest number on a command line, such as "--ctx 1000000", else an empty string."""
    flag = found = ""
    largest = 0.0
    for word in argv:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
        try:
            value = float(word.rpartition("=")[2])       # as in --plan distil.tokens=1e30
        except ValueError:
            continue
        if value > largest and flag != "--seed":
            largest, found = value, f"{flag} {word}"
    return found


def keep_traceback(prog):
    """Write the traceback of the current error to the temp folder; return the file's path."""
    with tempfile.NamedTemporaryFile("w", prefix=f"{prog}-", suffix=".txt", delete=False,
                                     encoding="utf-8", errors="backslashreplace") as f:
        traceback.print_exc(file=f)
    return f.name


# ---- files -------------------------------------------------------------------------------------------------


def at_once(path, flags):
    """An opener for open(): a pipe that nobody writes to is empty, instead of a wait for ever."""
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(file, True)
    return file


def hash_file(path):
    """The hash of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        for part in iter(partial(f.read, 2 ** 20), b""):
            found.update(part)
    return found.hexdigest()


def read_text(path):
    """The text of a UTF-8 file. Bytes that are not UTF-8 become U+FFFD. ValueError for UTF-16 and binary."""
    with open(path, encoding="utf-8-sig", errors="replace", opener=at_once) as f:
        text = f.read()
    if "\0" in text or text.startswith("\ufffd\ufffd"):         # the byte-order mark of UTF-16
        raise ValueError(f"{path} is not UTF-8 text: it is UTF-16, or has NUL bytes; convert it to UTF-8")
    return text


def read_json(path, name, what):
    """The JSON object in the file path/name. ValueError if there is none: "no {what} in path"."""
    try:
        with open(os.path.join(path, name), encoding="utf-8", opener=at_once) as f:
            value = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no {what} in {path}: it has no {name}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}/{name} is no {what}: it is not JSON, or no object; copy it again")
    return value


def write_json(path, value):
    write_file(path, json.dumps(value, indent=1) + "\n")
