"""Generate text with a HypeNet, after a context of any length.

    python sample.py --ctx 65536                        held-out text with a pass key in it, then the question
    python sample.py --ctx 4096 --teacher               the same question for the model's teacher
    python sample.py --file book.txt --ctx 32768        continue the last 32,768 tokens of a file
    python sample.py --prompt "import os" --tokens 200  continue a prompt
    python sample.py --model smollm2 --chat --prompt "Why is the sky blue?"     ask an instruct model
    python sample.py --model gpt2 --prompt "Once"       another model: a folder, or a name on the hub
    python sample.py --model chen-yingfa/HypeNet-2B --logit-base 500 --file book.txt    the authors' model

Without --model, the newest run under out/ answers, or the shipped student if there is no run. The context is
read in segments. Only the K/V of attention layers grow with the context, up to the window if there is one.
"""
import glob
import os
import sys
import time
from dataclasses import replace

from support.early import prepare

prepare(__name__)                                # before torch is imported

import numpy as np
import torch
from tqdm import tqdm

from halo import teacher_path
from support import fast, pretrained
from support.common import (
    Parser, command_line, default_device, filled, number, read_json, read_text)
from support.recall import plant
from support.report import announce, print_costs, say
from support.text import Corpus
from support.tokens import Tokenizer, check_tokenizer

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny-student")


def get_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0])
    add = p.add_argument
    add("--model", type=filled, help="folder, or name on the hub; default: the newest run in out/")
    add("--teacher", action="store_true", help="run the model's all-attention teacher instead")
    add("--prompt", help="text to continue; without --prompt and --file the model is asked for a pass key")
    add("--chat", action="store_true", help="the prompt is a user's message; the model answers the user")
    add("--file", type=filled, help="text file to continue")
    add("--ctx", type=number(int, 1), help="tokens of context; default: all text, or 4096 with a pass key")
    add("--tokens", type=number(int, 1), default=64, help="tokens to generate; default: %(default)s")
    add("--temperature", type=number(float, 0), default=0.0, help="0 (default): always the likeliest token")
    add("--top-k", type=number(int, 1), help="sample among the k likeliest tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from the fewest tokens of this total probability")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="seed of every random choice; default: 0")
    add("--logit-base", type=number(float, 1), help="sharpen attention in long contexts (a of paper eq. 11)")
    add("--segment", type=number(int, 1), help="tokens read at a time; default: 16384 on a GPU, else 1024")
    add("--device", type=filled, help=f"cuda, mps or cpu; default: {default_device()} here")
    args = p.parse_args(argv)
    if args.prompt is not None and args.file is not None:
        raise ValueError("--prompt and --file: give one of them")
    if args.chat and args.prompt is None:
        raise ValueError("--chat needs the message: give --prompt TEXT")
    args.device = default_device(args.device)
    return args


def load(args):
    """The tokenizer and the model asked for, and the path of its weights."""
    runs = sorted(glob.glob(os.path.join("out", "*", "report.json")), key=os.path.getmtime)
    path = args.model or (os.path.dirname(runs[-1]) if runs else SHIPPED)
    tokenizer = Tokenizer.load(path)
    if args.teacher:
        report = read_json(path, "report.json", "report of halo.py, which --teacher needs")
        student, path = path, teacher_path(str(report.get("teacher")))
        if Tokenizer.load(path).digest() != tokenizer.digest():
            raise ValueError(f"--teacher: the tokenizers of {path} and {student} differ, and so do their ids")
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = pretrained.load(path, dtype=dtype, device=args.device)
    check_tokenizer(tokenizer, model.config)
    if args.logit_base is not None:
        checked = replace(model.config, logit_base=args.logit_base)          # ValueError at 1
        model.config.logit_base = checked.logit_base                         # all layers share this config
    return tokenizer, model, path


def pass_key(args, tokenizer):
    """Ids of held-out text with a pass key in it and the question at its end; the answer."""
    rng = np.random.default_rng(args.seed)
    places = np.arange(args.ctx or 4096)
    text = Corpus(tokenizer).held_out.take(places, mode="wrap")          # repeated where it is too short
    ids, n_answer = plant(tokenizer, text, rng, depth=rng.random())     # the answer is at the end
    return ids[:-n_answer].tolist(), tokenizer.decode(ids[-n_answer:]).strip()


def context(args, tokenizer):
    """The prompt's ids, and the right answer or None. Of a text the last --ctx ids remain, the first of them
    BOS, which begins a text, if the tokenizer has one."""
    if args.prompt is None and args.file is None:
        return pass_key(args, tokenizer)
    start = [] if args.chat or tokenizer.bos is None else [tokenizer.bos]
    if args.chat:                                                # the chat template adds BOS itself
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": args.prompt}]), special=True)
    elif args.prompt is not None:
        ids = tokenizer.encode(args.prompt)
    else:
        ids = tokenizer.encode(read_text(args.file))
    if not ids:
        raise ValueError(f"{f'--file {args.file}' if args.file else '--prompt'} is empty: give some text")
    n = len(start) + len(ids)
    if args.ctx and n < args.ctx:
        say(f"the text has {n:,} tokens, fewer than --ctx {args.ctx:,}; all are used")
    room = (args.ctx or n) - len(start)
    return start + ids[-max(1, room):], None


def write(args, tokenizer, model, state, prompt):
    """Read the prompt, print its end and the text that follows. Return the generated ids, and timestamps: of
    the start, then of every id, a stop id included."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    characters = tokenizer.stream_decoder()          # a character may be several tokens
    out, times = [], [time.time()]
    with tqdm(total=len(prompt), desc="reading", unit="tok", unit_scale=True, file=sys.stderr) as bar:
        for idx in fast.stream(model, [prompt], args.tokens, temperature=args.temperature, top_k=args.top_k,
                               top_p=args.top_p, seed=args.seed, n_vocab=tokenizer.n_vocab,
                               never=tokenizer.holes, segment=args.segment, progress=bar.update, state=state):
            token = idx.item()                       # waits until the device has the id
            times.append(time.time())
            if len(times) == 2:                      # the prompt is read
                bar.close()
                print(f"... {tokenizer.decode(prompt[-300:]).lstrip()}", end=bold)
            if token in tokenizer.stops:
                break
            out.append(token)
            print(characters.push(token), end="", flush=True)
    print(characters.flush(), end=f"{plain}\n")
    return out, times


def run_main(argv):
    args = get_args(argv)
    tokenizer, model, path = load(args)
    prompt, answer = context(args, tokenizer)
    state = model.init_state(1, len(prompt) + args.tokens)
    announce(model, path, state.max_tokens)
    out, times = write(args, tokenizer, model, state, prompt)
    print_costs(model, state, prompt, out, times)
    if answer:
        found = tokenizer.decode(out).strip().startswith(answer)
        say(f"pass key {answer}: {'found' if found else 'NOT found'}")


def main(argv=None):
    try:
        command_line("sample.py", run_main, argv)
    finally:
        if sys.stdout.isatty():                              # after Ctrl-C too
            print("\033[0m", end="", flush=True)


if __name__ == "__main__":
    main()
