"""Several processes that work together, one for each GPU, on one machine or several. torchrun starts them:

    torchrun --nproc_per_node=4 halo.py --teacher smollm2

Every process makes the same batches. Every process holds the same weights, unless support/shard.py shares out
the weights. Each process takes some rows of a batch, and gradients are summed. So losses and weights equal
those of one process, up to rounding. Questions and held-out text are shared out too. Process 0 alone prints
and writes files, but if a process ends, each of the others saves a checkpoint. All read the run's folder: on
several machines it must be on a disk that all of them see. Without torchrun this file changes nothing.

    begin, join, fail, leave       from start to end
    parts, split, gather           each process takes its share; all get all results
    total, any_of, add_up          sums over the processes
    of_first, in_turn, equalise    the others take values of process 0, or wait for a process to go first
"""
import atexit
import datetime
import itertools
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

MANY = dist.is_available() and dist.is_torchelastic_launched()
SIZE = int(os.environ["WORLD_SIZE"]) if MANY else 1                # processes in all
RANK = int(os.environ["RANK"]) if MANY else 0                      # the number of this process
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if MANY else 0          # the number of this process on its machine
LOCAL_SIZE = int(os.environ["LOCAL_WORLD_SIZE"]) if MANY else 1    # processes on this machine
STORE = None                         # torchrun's store of keys and values that all processes see
BUCKET = 2 ** 26                     # numbers that are summed in one call
WAIT = datetime.timedelta(days=1)    # process 0 may read much text; if a process ends, no other waits on


class Lost(ValueError):
    """Another process does not answer."""


# ---- from start to end -------------------------------------------------------------------------------------


def begin():
    """Find the other processes, take a GPU, and silence every process but process 0."""
    global STORE
    if SIZE == 1 or STORE:
        return
    STORE, *_ = next(dist.rendezvous("env://"))
    if LOCAL_RANK < torch.cuda.device_count():
        torch.cuda.set_device(LOCAL_RANK)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def join(device):
    """Let the processes talk, each from its GPU or from the CPU. Returns the given device."""
    if SIZE == 1 or dist.is_initialized():
        return device
    kind, _, index = device.partition(":")
    if kind not in ("cuda", "cpu") or index:
        raise ValueError(f"--device {device}: under torchrun give cuda or cpu")
    if kind == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        raise ValueError(f"torchrun started more processes than this machine has GPUs, "
                         f"{torch.cuda.device_count()}; lower --nproc_per_node")
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=WAIT, store=STORE,
                            rank=RANK, world_size=SIZE)
    atexit.register(dist.destroy_process_group)
    return device


def fail():
    """To be called before an error is printed: only the first process that fails may print."""
    if STORE:
        sys.stderr = sys.__stderr__ if STORE.add("failed", 1) == 1 else open(os.devnull, "w")


def leave(status):
    """End this process after an error. Ordinary ways to end may wait for processes that have ended."""
    if SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def talk():
    """A context for calls that wait for other processes. Raises Lost if a process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:                    # a RuntimeError too
        raise
    except RuntimeError as error:
        raise Lost("another process of this run has ended") from error


# ---- shares ------------------------------------------------------------------------------------------------


def split(items):
    """This process's share of the rows of a tensor, or of the items of a list."""
    return items[RANK::SIZE]


def parts(rows, at_once):
    """This process's share of rows, at most at_once rows at a time. Empty if there are too few rows."""
    mine = split(rows)
    return mine.split(at_once) if len(mine) else ()


def gather(mine):
    """The results of all processes for a list that was split, in the order of the list."""
    if SIZE == 1:
        return mine
    found = [None] * SIZE
    with talk():
        dist.all_gather_object(found, mine)
    in_turns = itertools.zip_longest(*found, fillvalue=gather)       # a value that no list has
    return [item for items in in_turns for item in items if item is not gather]


# ---- sums --------------------------------------------------------------------------------------------------


def total(*numbers):
    """The sum of each number over the processes, a list of floats."""
    sums = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    if SIZE > 1:
        with talk():
            dist.all_reduce(sums)
    return sums.tolist()


def any_of(*flags):
    """Whether any flag is set in any process."""
    return any(total(*flags))


def add_up(loss, params):
    """Sum a loss and the gradients of parameters over the processes, in place, in calls of about BUCKET
    numbers. A missing gradient counts as 0."""
    if SIZE == 1:
        return
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    tensors = [loss, *(p.grad for p in params)]
    ends = itertools.accumulate(x.numel() for x in tensors)
    for _, bucket in itertools.groupby(zip(ends, tensors), key=lambda pair: pair[0] // BUCKET):
        bucket = [x for _, x in bucket]
        flat = torch.cat([x.flatten() for x in bucket])
        with talk():
            dist.all_reduce(flat)
        sums = flat.split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [part.view_as(x) for part, x in zip(sums, bucket)])


# ---- process 0 ---------------------------------------------------------------------------------------------


def of_first(value):
    """The value of process 0, any object. The values of the other processes do not count."""
    found = [value]
    if SIZE > 1:
        with talk():
            dist.broadcast_object_list(found)
    return found[0]


def in_turn(work):
    """work() in every process. On each machine one process goes first, so that the others find the files that
    this process has downloaded or cached."""
    if LOCAL_RANK:
        total(0)
    result = work()
    if not LOCAL_RANK:
        total(0)
    return result


@torch.no_grad()
def equalise(params):
    """Give all processes the weights of process 0. GPUs may differ in the last bit of what they compute."""
    for p in params if SIZE > 1 else ():
        with talk():
            dist.broadcast(p.detach(), 0)
