"""Generate from a HypeNet that halo.py made, after a context of any length.

    python sample.py --ctx 65536                        held-out text with a pass key in it, then the question
    python sample.py --file book.txt --ctx 32768        the last 32,768 tokens of a file, continued
    python sample.py --prompt "import os" --tokens 200  a prompt, continued
    python sample.py --ctx 4096 --teacher               the same, asked of the teacher
    python sample.py --model gpt2 --prompt "Once"       GPT-2, Qwen3, Llama 3: a folder, or a name of the hub
    python sample.py --model chen-yingfa/HypeNet-2B --logit-base 500 --file book.txt    the authors' own

Without --model: the newest run under out/, else the shipped student. The context is read in segments, so all
that grows with it is the K/V of the few attention layers, and with a window not even that.
"""
import codecs
import glob
import json
import os
import sys
import time
from dataclasses import replace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see halo.py

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hypenet import HypeNet, State  # noqa: E402
from support.common import Parser, command_line, default_device, number  # noqa: E402
from support.tokens import Tokenizer, check_tokenizer  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))


def get_args(argv):
    p = Parser(prog="sample.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", help="folder of a model, or its name on the Hugging Face hub; default: the "
                                   "newest run in out/, else the shipped one")
    p.add_argument("--ctx", type=number(int, 1), help="tokens of context; default: all the text has, or 4096")
    p.add_argument("--prompt", help="text to continue")
    p.add_argument("--file", help="text file to continue, from its last --ctx tokens; with neither, held-out "
                                  "text of Python's standard library with a pass key in it")
    p.add_argument("--tokens", type=number(int, 1), default=64, help="tokens to generate")
    p.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 (default): greedy")
    p.add_argument("--top-k", type=number(int, 1), help="sample among the k likeliest tokens")
    p.add_argument("--top-p", type=number(float, 1e-9, 1), help="sample among the likeliest, to this share")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0)
    p.add_argument("--logit-base", type=number(float, 1), help="a of s_t = log(t + a) / log(a), which scales "
                                                               "the queries; default: the model's own")
    p.add_argument("--segment", type=number(int, 1), help="tokens read at a time; default: 8192 on a GPU, "
                                                          "else 1024")
    p.add_argument("--teacher", action="store_true", help="run the model's all-attention teacher instead")
    p.add_argument("--device", help=f"cuda, mps or cpu; default: {default_device()} here")
    o = p.parse_args(argv)
    if o.prompt is not None and o.file is not None:
        raise ValueError("--prompt and --file: give one of them")
    o.device = default_device(o.device)
    return o


def find_model():
    """The newest finished run of this machine, else the shipped student."""
    runs = sorted(glob.glob(os.path.join("out", "*", "report.json")), key=os.path.getmtime)
    return os.path.dirname(runs[-1]) if runs else os.path.join(HERE, "assets", "tiny-student")


def context(o, tokenizer):
    """Ids of the context, and the answer that would be right, if there is one."""
    if o.prompt is None and o.file is None:
        from halo import Corpus, plant
        n, corpus, rng = o.ctx or 4096, Corpus(tokenizer), np.random.default_rng(o.seed)
        text = np.resize(corpus.held_out, n)                 # the held-out text again where it is too short
        ids, n_answer = plant(tokenizer, text, rng, depth=rng.random())
        return ids[:-n_answer].tolist(), tokenizer.decode(ids[-n_answer:]).strip()
    text = o.prompt
    if text is None:
        with open(o.file, encoding="utf-8-sig", errors="replace") as f:
            text = f.read()
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{'--file ' + o.file if o.file else '--prompt'} is empty: give some text")
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    if o.ctx and len(start + ids) < o.ctx:
        print(f"the text has {len(start + ids):,} tokens, fewer than --ctx {o.ctx:,}; all are used",
              file=sys.stderr)
    return start + ids[-max(1, (o.ctx or len(start + ids)) - len(start)):], None


def size(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def run_main(argv):
    o = get_args(argv)
    folder = o.model or find_model()
    tokenizer = Tokenizer.load(folder)
    weights = folder
    if o.teacher:
        try:
            with open(os.path.join(folder, "report.json"), encoding="utf-8") as f:
                weights = os.fspath(json.load(f)["teacher"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"--teacher: {folder} has no report.json that names its teacher") from None
        shipped = os.path.join(HERE, "assets", f"{os.path.basename(weights)}-teacher")
        weights = shipped if weights == os.path.basename(weights) and os.path.isdir(shipped) else weights
    dtype = torch.bfloat16 if o.device.startswith("cuda") else torch.float32
    model = HypeNet.from_pretrained(weights, dtype=dtype, device=o.device)
    check_tokenizer(tokenizer, model.config)
    if o.logit_base is not None:                             # the layers share this config, and read it anew
        model.config.logit_base = replace(model.config, logit_base=o.logit_base).logit_base
    prompt, answer = context(o, tokenizer)
    c, total = model.config, len(prompt) + o.tokens
    if total > 16384 and "A" in c.layers and not (c.attn_position or c.chunk or c.logit_base):
        print(f"sample.py: {total:,} tokens are more than the 16,384 of the paper's training, and the model "
              "does not scale its queries: give --logit-base (paper: 500 for 2B, 600 for 5B, 900 for 9B)",
              file=sys.stderr)
    base = f", logit base {c.logit_base:g}" if c.logit_base else ""
    print(f"model {weights}: layers {c.layers}, {model.n_params():,} parameters{base}", file=sys.stderr)
    state = model.init_state(1, total)
    S, KV = state.nbytes()
    ids = tokenizer.decode(prompt[-300:])
    with tqdm(total=len(prompt), desc="reading", unit="tok", unit_scale=True, file=sys.stderr) as bar:
        decoder, out, began, times = codecs.getincrementaldecoder("utf-8")("replace"), [], time.time(), []
        for idx in model.stream([prompt], o.tokens, o.temperature, o.top_k, o.top_p, o.seed,
                                tokenizer.n_vocab, o.segment, bar.update, state, tokenizer.holes):
            times.append(time.time())
            if len(times) == 1:
                bar.close()
                sys.stdout.write(f"... {ids.lstrip()}" + ("\033[1m" if sys.stdout.isatty() else ""))
            token = idx.item()
            if token in tokenizer.stops:
                break
            out.append(token)
            sys.stdout.write(decoder.decode(tokenizer.token_bytes(token)))
            sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + ("\033[0m\n" if sys.stdout.isatty() else "\n"))
    read = times[0] - began
    attention = replace(c, layers="A" * len(c.layers), window=None)   # what it would hold with no L
    teacher_KV = State(attention, 1, total, "meta", dtype).nbytes()[1]
    print(f"\nread {len(prompt):,} tokens in {read:.1f} s, {len(prompt) / read:,.0f} tok/s", file=sys.stderr)
    if len(times) > 1:
        ms = 1000 * (times[-1] - times[0]) / (len(times) - 1)
        print(f"wrote {len(out)} tokens, {ms:.1f} ms a token", file=sys.stderr)
    print(f"memory: state {size(S)} + K/V {size(KV)}; all-attention K/V {size(teacher_KV)}", file=sys.stderr)
    if answer:
        found = tokenizer.decode(out).strip().startswith(answer)
        print(f"pass key {answer}: {'found' if found else 'NOT found'}", file=sys.stderr)


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")             # a terminal that cannot show a character
    try:
        command_line("sample.py", run_main, argv)
    finally:
        if sys.stdout.isatty():                              # after Ctrl-C too
            print("\033[0m", end="", flush=True)


if __name__ == "__main__":
    main()
