"""HALO: distil a pretrained Transformer into a HypeNet (hypenet.py), which reads long contexts cheaply.

    python halo.py                             the whole job on a laptop CPU, offline, in minutes
    python halo.py --recipe article            the recipe of the article in place of the paper's
    python halo.py --resume out/tiny-paper     go on with a run that was stopped
    python halo.py --pretrain --out teacher    train the tiny teacher anew (one GPU)

The paper's recipe (arXiv 2601.22156 section 4) is a row of stages, and one loop trains them all:

    transfer   copy the attention weights into linear twins; KV heads cloned (eq. 13), new gates neutral
    align      stage 1: every twin alone learns its attention layer's output (eq. 7)
    select     which stay attention: the layers that lose most by becoming linear (in place of eq. 8, 9)
    distil     stage 2: the hybrid learns the teacher's predictions (eq. 10); RoPE leaves attention (HyPE)
    finetune   stage 3: longer sequences, no teacher
    fit        the base a of the logit scaling s_t (eq. 11), on long held-out text

The article's recipe is progressive: the middle layers are converted in groups; only the newest group and the
chunk embeddings train, on alpha CE + (1 - alpha) KL(student, teacher).

Every random choice is a function of (seed, stage, step), so a run repeats exactly and a stopped run goes on
as one never stopped. A run's folder holds log.jsonl (a line a step), one checkpoint a stage, report.json, and
the student: config.json, model.safetensors, tokenizer.json.
"""
import argparse
import ctypes
import gzip
import hashlib
import json
import math
import os
import platform
import signal
import sys
import sysconfig
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a thread that spins long stalls another busy program

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hypenet import (FAMILIES, Attention, HypeNet, HypeNetConfig, LinearAttention, Parser,  # noqa: E402
                     Tokenizer, command_line, default_device, locate, number, write_file, write_json,
                     write_text)

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- recipes and plans -------------------------------------------------------------------------------------

# Every key is a flag of its own, so an ablation is one flag; get_args says what the values mean.
RECIPES = {
    "paper": dict(layers="swap", decay="constant", state="full", pe="hype", extras="on",
                  training="staged", kl="forward", alpha=0.0, window=0, logit_base="fit"),
    "article": dict(layers="ends", decay="channel", state="half", pe="chunk", extras="off",
                    training="progressive", kl="reverse", alpha=0.5, window=2048, logit_base="none"),
}
SCORED = ("swap", "guarded", "score")   # ways to choose layers that measure each one


@dataclass
class Plan:
    """What one stage costs: tokens in all, length of a sequence, batch in sequences, learning rate from lr to
    lr_end by a cosine after a warm-up, and recall: the share of sequences that hide a pass key and ask for
    it, for recall is what selection and the final table measure."""
    tokens: float
    length: int
    batch: int
    lr: float
    lr_end: float
    recall: float = 0.5
    warmup: int = 50

    @property
    def steps(self):
        return max(1, round(self.tokens / (self.length * self.batch)))

    @property
    def total(self):
        return self.steps * self.length * self.batch


# The tiny teacher's plan. The paper's own (its Table 5) is align 320M tokens of length 512, distil 1B of 512,
# finetune 1B of 16,384, the article's 2.3B in all; at 1M parameters these would take a laptop months.
PLANS = dict(
    pretrain=Plan(200e6, 256, 256, 3e-3, 1e-4, 0.3, 200),
    align=Plan(0.4e6, 256, 16, 3e-3, 1e-4),
    distil=Plan(1.5e6, 256, 16, 2e-3, 1e-4, 0.25),
    finetune=Plan(0.3e6, 1024, 4, 3e-4, 3e-5),
    group=Plan(2e6, 256, 16, 3e-3, 1e-4, 0.25),
)

TEACHERS = {
    "tiny": HypeNetConfig(layers="A" * 8, n_embd=96, n_head=3, n_kv_head=3, head_dim=32, n_hidden=288,
                          max_len=256, **FAMILIES["qwen3"]),
}

# ---- text --------------------------------------------------------------------------------------------------


def stdlib_documents():
    """(group, text) of every source file of this Python's standard library, but for tests and site-packages.
    A group is a top-level module or package: all of it stands on one side of the held-out split."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, dirs, names in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in skip and not d.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    yield os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py"), f.read()


def file_documents(paths, piece=65536):
    """(group, text) of .txt and .jsonl files, gzipped or not, and of folders of them. A line of a .jsonl is a
    document; a .txt is cut at line ends into pieces of about 64 KB, so that one file can be split too."""
    kinds, files = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz"), []
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"--data {path}: not found")
        inside = sorted(os.path.join(d, n) for d, _, names in os.walk(path) for n in names) or [path]
        found = [p for p in inside if p.endswith(kinds)]
        if not found:
            raise ValueError(f"--data {path}: no file there ends in {', '.join(kinds)}")
        files += found
    for path in files:
        unpack = gzip.open if path.endswith(".gz") else open
        try:
            with unpack(path, "rt", encoding="utf-8", errors="replace") as f:
                while lines := f.readlines(piece):
                    if ".jsonl" not in path:
                        yield lines[0], "".join(lines)
                        continue
                    for line in lines:
                        yield line, str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--data {path}: not every line is a JSON object with a field text") from None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"--data {path}: damaged; copy it again") from None


class Corpus:
    """Text as two long rows of token ids, train and held_out (numpy), the tokenizer's end id after each
    document. One group in 16 is held out, by a hash of its name: the same ones on every machine."""

    def __init__(self, tokenizer, data=None):
        self.tokenizer, sides, digest, count = tokenizer, ([], []), hashlib.sha256(), 0
        for group, text in file_documents(data) if data else stdlib_documents():
            digest.update(text.encode("utf-8", "replace"))
            count += 1
            name = hashlib.sha256(b"hypenet" + group.encode("utf-8", "replace"))
            sides[int(name.hexdigest(), 16) % 16 == 0].extend([tokenizer.encode_array(text), [tokenizer.end]])
        self.train, self.held_out = (np.concatenate([*side, []]).astype(np.int32) for side in sides)
        tokens = len(self.train) + len(self.held_out)
        if not data and tokens < 2e6:
            raise ValueError(f"only {tokens:,} tokens of source in Python's standard library (stripped?); "
                             "give text of your own with --data")
        self.facts = dict(name=" ".join(data) if data else "stdlib", python=platform.python_version(),
                          documents=count, tokens=tokens, sha256=digest.hexdigest())

    def windows(self, rng, batch, length, held_out=False):
        """(batch, length) int64: stretches of text from random places."""
        text = self.held_out if held_out else self.train
        if len(text) < length:
            raise ValueError(f"the {'held-out' if held_out else 'training'} text has {len(text):,} tokens, "
                             f"too few for a sequence of {length:,}; give more --data (1/16 is held out)")
        starts = rng.integers(0, len(text) - length + 1, batch)
        return np.stack([text[s:s + length] for s in starts]).astype(np.int64)

    def mixed(self, rng, batch, length, recall):
        """Training sequences (batch, length): text, a share `recall` of it with a pass key to be found."""
        rows = self.windows(rng, batch, length)
        for row in rows[:round(recall * batch)]:
            row[:] = plant(self.tokenizer, row, rng, ask=int(rng.integers(1, 4)))[0]
        return rows


def plant(tokenizer, text, rng, depth=None, ask=1):
    """Hide a five-digit pass key in text (n,) and ask for it: ids (n,), and how many ids at the end of a
    question are its answer. depth None: key and questions at random places (training); else the key at that
    share of the text and the question at its very end (testing)."""
    key = "".join(map(str, rng.integers(0, 10, 5)))
    needle = tokenizer.encode_array(f"\n# The pass key is {key}. Remember it.\n")
    answer = tokenizer.encode_array(f" {key}")
    question = tokenizer.encode_array("\n# What is the pass key? The pass key is")
    pieces = [needle] + [np.concatenate((question, answer))] * ask
    while sum(map(len, pieces)) > len(text) and len(pieces) > 2:
        pieces.pop()
    room = len(text) - sum(map(len, pieces))
    if room < 0:
        raise ValueError(f"{len(text)} tokens have no room for a pass key and its question, "
                         f"{len(text) - room} tokens; use a longer length, or recall=0")
    cuts = sorted(rng.integers(0, room + 1, len(pieces))) if depth is None else [int(depth * room), room]
    edges = [0, *map(int, cuts), room]
    parts = [part for i, piece in enumerate(pieces) for part in (text[edges[i]:edges[i + 1]], piece)]
    return np.concatenate(parts + [text[edges[-2]:room]]), len(answer)


# ---- transfer: a student out of a teacher's weights --------------------------------------------------------


def student_config(teacher, layers, o):
    """The config of a student with these layers, o being the options of a recipe."""
    on = o.extras == "on"
    chunk = min(2048, teacher.max_len // 4) if o.pe == "chunk" else None
    half = o.state == "half"
    for name, fits in dict(key_dim=lambda n: n <= teacher.head_dim,
                           linear_kv_head=lambda n: n and n % teacher.n_kv_head == 0).items():
        if name in o.changes and not fits(o.changes[name]):
            raise ValueError(f"--set {name}={o.changes[name]}: key_dim is at most {teacher.head_dim}, the "
                             f"teacher's, linear_kv_head a multiple of its {teacher.n_kv_head} K/V heads")
    config = dict(layers=layers, chunk=chunk, n_chunks=math.ceil(o.max_ctx / chunk) if chunk else 0,
                  attn_pe=0.0 if o.pe == "hype" else 1.0, attn_gate=on, window=o.window or None,
                  decay=o.decay, key_dim=teacher.head_dim // 2 if half else teacher.head_dim,
                  linear_rope=o.pe != "chunk", linear_qk_norm=on and not half, linear_norm=on,
                  linear_gate=on, linear_kv_head=teacher.n_head)
    return replace(teacher, **{**config, **o.changes})


@torch.no_grad()
def low_rank_keys(attn, x, rank):
    """Projections of half width whose products come closest to the teacher's (the article's smaller state).
    With A = [diag(gain / rms) W, bias] of a head, q . k = [x, 1] A_q^T A_k [x, 1]^T. The best rank-r
    approximation of A_q^T A_k is U_r S_r V_r^T; each side takes the square root of S. Returns the rows of q
    and k, (H*r, C + 1) each, the bias last. 1 / rms is QK-norm's, its mean over one batch x (B,T,C)."""
    c, sides = attn.config, []
    H, D = c.n_head, c.head_dim
    outputs, weights = attn.qkvz(x).split(attn.sizes, dim=-1), with_bias(attn.qkvz).split(attn.sizes)
    for y, A, heads, norm in zip(outputs, weights, (H, c.n_kv_head), ("q_norm", "k_norm")):
        A = A.unflatten(0, (heads, D))                             # (heads, D, C + 1)
        if c.qk_norm:
            rms = y.unflatten(-1, (heads, D)).square().mean(-1).add(c.norm_eps).sqrt()
            A = A * getattr(attn, norm).weight[:, None] * (1 / rms).mean((0, 1))[:, None, None]
        sides.append(torch.linalg.qr(A.repeat_interleave(H // heads, 0).cpu().double().mT))
    (Q_q, R_q), (Q_k, R_k) = sides                                 # A^T = Q R, so the SVD is of D x D only
    U, S, Vh = torch.linalg.svd(R_q @ R_k.mT)
    root = S[:, :rank, None].sqrt()
    return [(root * M[:, :rank]).flatten(0, 1).to(x) for M in ((Q_q @ U).mT, Vh @ Q_k.mT)]


def with_bias(linear):
    """Rows of a Linear with their bias, or 0, as a last column: (out, in + 1)."""
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), 1)


@torch.no_grad()
def linear_twin(attn, config, x, where, retention=0.7):
    """A linear layer out of an attention layer: its weights, KV heads cloned (paper eq. 13), gates neutral.
    On one batch of the layer's inputs x (B,T,C), W_o is then scaled column by column, by least squares, so
    that what it reads starts as close to what the teacher's reads as a factor can bring it."""
    c, t = config, attn.config
    twin = LinearAttention(c).to(x.device)
    q, k, v, _ = with_bias(attn.qkvz).split(attn.sizes)
    clones = c.linear_kv_head // t.n_kv_head

    def clone(rows):                                               # a head's rows, again for each query head
        return rows.unflatten(0, (t.n_kv_head, -1)).repeat_interleave(clones, 0).flatten(0, 1)
    if c.key_dim < c.head_dim:
        q, k = low_rank_keys(attn, x, c.key_dim)                   # k has a head a query head already
        k = k.unflatten(0, (c.n_head, -1))[::c.n_head // c.linear_kv_head].flatten(0, 1)
    else:
        k = clone(k)
    fill(twin.qkvz, torch.cat((q, k, clone(v))))
    fill(twin.out, with_bias(attn.out))
    if c.linear_qk_norm and t.qk_norm and c.key_dim == c.head_dim:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    if hasattr(twin, "forget"):
        nn.init.zeros_(twin.forget.weight)
        nn.init.constant_(twin.forget.bias, math.log(retention / (1 - retention)))
    a, o = attn.mix(x, where), twin.mix(x, where)                  # (B,T,H*D): what W_o reads, in both
    twin.out.weight *= (a * o).sum((0, 1)) / (o * o).sum((0, 1)).clamp(min=1e-12)  # c of least |a - c o|^2
    return twin


@torch.no_grad()
def attention_twin(attn, config):
    """An attention layer for the student: its teacher's weights; a new gate starts as the identity, its
    sigmoid(0) = 1/2 made up for by doubling W_o; chunk embeddings start random (std 0.02)."""
    twin = Attention(config).to(attn.out.weight.device)
    fill(twin.qkvz, with_bias(attn.qkvz))
    fill(twin.out, with_bias(attn.out))
    if config.attn_gate:
        twin.out.weight *= 2
    if config.qk_norm:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    if hasattr(twin, "chunk_embd"):
        nn.init.normal_(twin.chunk_embd.weight, std=0.02)
    return twin


def fill(linear, rows):
    """Set the first rows of a Linear, the bias last in each; what is left, a gate, becomes 0."""
    n = len(rows)
    linear.weight[:n], linear.weight[n:] = rows[:, :-1], 0
    if linear.bias is not None:
        linear.bias[:n], linear.bias[n:] = rows[:, -1], 0


@torch.no_grad()
def teacher_layers(teacher, config, idx):
    """Run a teacher on idx (B,T) and list, for each layer, what a twin of it needs: the attention layer,
    its input x (B,T,C) after the norm, where its tokens stand (with the teacher's rotation for the one and
    the twin's for the other), and its output y (B,T,C)."""
    known = replace(config, attn_pe=1.0, chunk=None, n_chunks=0)   # the teacher's positions, the twins' RoPE
    where, out = locate(known, torch.arange(idx.size(1), device=idx.device)[None]), []
    h = teacher.embed(idx, where)
    for block in teacher.blocks:
        x = block.norm1(h)
        y = block.mixer(x, where)
        out.append((block.mixer, x, where, y))
        h = h + y
        h = h + block.mlp(block.norm2(h))
    return out


def make_twins(teacher, config, corpus, plan, o):
    """A linear twin of every attention layer, calibrated on one batch of text."""
    rng = np.random.default_rng([o.seed, zlib.crc32(b"transfer")])
    idx = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length, plan.recall)).to(o.device)
    return nn.ModuleList(linear_twin(attn, config, x, where, o.retention)
                         for attn, x, where, _ in teacher_layers(teacher, config, idx))


def assemble(teacher, config, mixers):
    """A student: all but the mixers copied from a model (the teacher), the mixers' weights from a list."""
    student = HypeNet(replace(config)).to(teacher.wte.weight.device)
    shared = {name: w for name, w in teacher.state_dict().items() if ".mixer." not in name}
    new = student.load_state_dict(shared, strict=False).missing_keys
    assert all(".mixer." in name or "chunk_embd" in name for name in new), f"not transferred: {new}"
    for block, mixer in zip(student.blocks, mixers):
        block.mixer.load_state_dict(mixer.state_dict())
    return student


# ---- losses ------------------------------------------------------------------------------------------------


def distil_loss(student, teacher, idx, targets, kl, alpha, offset=None, slice_elements=2 ** 24):
    """alpha CE + (1 - alpha) KL, means over all tokens. kl "forward": KL(teacher, student), paper eq. 10;
    "reverse": KL(student, teacher), the article's. Logits exist for a slice of tokens at a time, and are made
    again in the backward pass, so a large vocabulary needs no more memory than a small one."""
    xs = student.hidden(idx, offset=offset).flatten(0, 1)                         # (N,C)
    with torch.no_grad():
        xt = teacher.hidden(idx).flatten(0, 1) if alpha < 1 else xs
    n = max(1, slice_elements // student.config.vocab_size)

    def one(xs, xt, y):
        log_s = student.head(xs).float().log_softmax(-1)                          # (n,V)
        loss = alpha * F.nll_loss(log_s, y, reduction="sum") if alpha else 0
        if alpha < 1:
            with torch.no_grad():
                log_t = teacher.head(xt).float().log_softmax(-1)
            p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
            loss = loss + (1 - alpha) * F.kl_div(log_q, p, reduction="sum", log_target=True)
        return loss
    slices = list(zip(xs.split(n), xt.split(n), targets.flatten().split(n)))
    if len(slices) == 1:
        return one(*slices[0]) / len(xs)
    return sum(checkpoint(one, *s, use_reentrant=False) for s in slices) / len(xs)


def objective(student, teacher, stage, o, alpha):
    """The loss function of a stage. Chunk HyPE gets a random start for each sequence, so that the embedding
    of every chunk is trained."""
    def loss_fn(idx, targets, step):
        c, offset = student.config, None
        if c.chunk:
            rng = np.random.default_rng([o.seed, zlib.crc32(stage.encode()), step, 1])
            starts = rng.integers(0, max(0, c.chunk * c.n_chunks - idx.size(1)) + 1, len(idx))
            offset = torch.from_numpy(starts).to(idx.device)
        return distil_loss(student, teacher, idx, targets, o.kl, alpha, offset)
    return loss_fn


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model, prompts, n_answer):
    """Prompts (B,n) that end in their answers -> log-probability of each answer token (B, n_answer), and
    whether greedy decoding would give the whole answer (B,)."""
    state, cut = model.init_state(len(prompts), prompts.size(1)), prompts.size(1) - n_answer - 1
    for part in prompts[:, :cut].split(1024, dim=1):
        model.hidden(part, state)
    logits = model(prompts[:, cut:-1], state=state, all_logits=True)[0].float()     # (B, n_answer, V)
    target = prompts[:, -n_answer:]
    logp = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return logp, (logits.argmax(-1) == target).all(1)


def recall(model, corpus, length, trials, seed=0):
    """Ask for pass keys hidden at five depths, in turn, of held-out text. At one context length: the mean
    log-probability of an answer's tokens, and whether it was answered in full, (trials,) each."""
    rng = np.random.default_rng([seed, length])
    rows = [plant(corpus.tokenizer, text, rng, depth=(i % 5) / 4) for i, text in
            enumerate(corpus.windows(rng, trials, length, held_out=True))]
    prompts = torch.from_numpy(np.stack([ids for ids, _ in rows])).to(model.wte.weight.device)
    parts = [answers(model, part, rows[0][1]) for part in prompts.split(max(1, 65536 // length))]
    return torch.cat([p.mean(1) for p, _ in parts]).cpu(), torch.cat([hit for _, hit in parts]).cpu().float()


@torch.no_grad()
def held_out(corpus, length, count, seed=0, batch=32):
    """Batches idx, targets (b,length) of held-out text, the same at every call."""
    rng = np.random.default_rng([seed, 1])
    rows = torch.from_numpy(corpus.windows(rng, count, length + 1, held_out=True))
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(batch)]


@torch.no_grad()
def losses(model, batches):
    """Mean loss of each sequence, nats a token."""
    device = model.wte.weight.device
    return torch.cat([loss_of(model(idx.to(device))[0], targets) for idx, targets in batches])


def loss_of(logits, targets):
    return F.cross_entropy(logits.float().mT, targets.to(logits.device), reduction="none").mean(1).cpu()


@torch.no_grad()
def compare(teacher, student, batches):
    """Held-out loss of both, KL(teacher, student) in nats a token, and the share of tokens whose likeliest
    next token is the same."""
    loss, kl, same = dict(teacher=[], student=[]), [], []
    for idx, targets in batches:
        idx = idx.to(teacher.wte.weight.device)
        t, s = (model(idx)[0].float().log_softmax(-1) for model in (teacher, student))
        loss["teacher"].append(loss_of(t, targets))
        loss["student"].append(loss_of(s, targets))
        kl.append(F.kl_div(s, t, reduction="none", log_target=True).sum(-1).mean(1).cpu())
        same.append((t.argmax(-1) == s.argmax(-1)).float().mean(1).cpu())
    return dict(val_loss={name: torch.cat(x).mean().item() for name, x in loss.items()},
                kl=torch.cat(kl).mean().item(), top1_agreement=torch.cat(same).mean().item())


# ---- a run: its folder, its log, its checkpoints -----------------------------------------------------------


class Run:
    """A folder that a run lives in and can be taken up from. run.json holds its options and the results of
    what is done; a stop (Ctrl-C, SIGTERM) waits for the training step to end, then saves."""

    def __init__(self, folder, options):
        self.folder, self.options, self.done, self.began = folder, options, {}, time.time()
        self.stop, self.tokens = False, 0                 # tokens: of all stages so far
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(self.path("run.json")):
            with open(self.path("run.json"), encoding="utf-8") as f:
                self.done = json.load(f)["done"]
        self.before = self.done.get("seconds", 0.0)
        self.save()
        self.handlers = {sig: signal.signal(sig, self.on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    def close(self):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)

    def on_signal(self, *_):
        if self.stop:                                     # asked twice: at once
            raise KeyboardInterrupt
        self.stop = True
        print("\nstopping after this step or measurement; once more: at once", file=sys.stderr)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return self.before + time.time() - self.began

    def save(self):
        self.done["seconds"] = self.seconds()
        write_json(self.path("run.json"), dict(options=self.options, done=self.done))

    def log(self, **record):
        with open(self.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def forget(self, stage, step):
        """Drop the log lines of a stage past a step: they will be written again."""
        with open(self.path("log.jsonl"), "a+", encoding="utf-8") as f:
            f.seek(0)
            lines = [line for line in f if (r := json.loads(line))["stage"] != stage or r["step"] <= step]
        write_text(self.path("log.jsonl"), "".join(lines))

    def once(self, name, work):
        """The result of work(), a JSON value: computed once in the life of a run."""
        if name not in self.done:
            self.done[name] = work()
            self.save()
            self.leave_if_asked()
        return self.done[name]

    def leave_if_asked(self):
        if self.stop:
            print(f"\nstopped; go on with: python halo.py --resume {self.folder}", file=sys.stderr)
            raise SystemExit(130)


def train(run, stage, plan, seed, corpus, module, groups, loss_fn, save_every=120.0):
    """The one training loop (AdamW 0.9/0.95, no weight decay: paper appendix B). groups: lists of parameters,
    each clipped to a gradient norm of 1 alone; all else in module is frozen. loss_fn(idx, targets, step) ->
    loss. A stage that was stopped goes on; one that is finished is only loaded."""
    params, file, device = [p for g in groups for p in g], run.path(f"{stage}.pt"), groups[0][0].device
    for p in module.parameters():
        p.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    opt = torch.optim.AdamW(params, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first, mean, run.tokens = 0, None, run.tokens + plan.total
    if os.path.exists(file):
        try:
            saved = torch.load(file, map_location=device, weights_only=True)
        except Exception:                                          # torch raises several types
            raise ValueError(f"{file} is damaged; remove it to train this stage again") from None
        module.load_state_dict(saved["module"])
        first, mean = saved["step"], saved["mean"]
        if "optimizer" in saved:
            opt.load_state_dict(saved["optimizer"])
    if first < plan.steps:
        run.forget(stage, first)

    def save(step):
        state = dict(module=module.state_dict(), step=step, mean=mean)
        if step < plan.steps:
            state["optimizer"] = opt.state_dict()
        write_file(file, lambda tmp: torch.save(state, tmp))
        run.save()

    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    bar = tqdm(range(first, plan.steps), desc=f"{stage:9s}", initial=first, total=plan.steps, mininterval=0.5,
               dynamic_ncols=True, disable=first == plan.steps)
    saved_at = tick = time.time()
    for step in bar:
        rng = np.random.default_rng([seed, zlib.crc32(stage.encode()), step])
        rows = torch.from_numpy(corpus.mixed(rng, plan.batch, plan.length + 1, plan.recall)).to(device)
        warm = min(1.0, (step + 1) / min(plan.warmup, max(1, plan.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        lr = warm * (plan.lr_end + (plan.lr - plan.lr_end) * cosine)
        with autocast:
            loss = loss_fn(rows[:, :-1], rows[:, 1:], step)
        loss.backward()
        norm = max(nn.utils.clip_grad_norm_(g, 1.0) for g in groups)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            good = f"last checkpoint {file}" if os.path.exists(file) else "no checkpoint yet"
            flag = f"--plan {stage.rstrip('0123456789')}.lr={plan.lr / 3:.0e}"
            raise ValueError(f"{stage}: loss {value:.3g}, gradient norm {float(norm):.3g} at step "
                             f"{step + 1}, {good}; start anew with {flag}")
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        now = time.time()
        ms, tick = 1000 * (now - tick), now
        run.log(stage=stage, step=step + 1, loss=value, norm=float(norm), lr=lr, ms=round(ms, 2))
        if (step + 1) % max(1, plan.steps // 4) == 0 or step + 1 == plan.steps:
            tqdm.write(f"{stage:9s}{step + 1:6,}/{plan.steps:,} | loss {mean:.4f} | norm {norm:.2f} | "
                       f"lr {lr:.1e} | {ms:,.0f} ms | {1000 * plan.total / plan.steps / ms:,.0f} tok/s")
        bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
        if step + 1 == plan.steps or run.stop or now - saved_at > save_every:
            save(step + 1)
            run.leave_if_asked()
            saved_at = tick = time.time()
    for p in params:
        p.requires_grad_(False)


# ---- the paper's stages ------------------------------------------------------------------------------------


def align(run, teacher, config, corpus, plan, o):
    """Stage 1 (paper eq. 7): a linear twin of every attention layer, each alone, on the teacher's own hidden
    states. The loss shown is the sum over layers of MSE / mean square of the target: Adam does not see the
    factor, and 1 a layer is what an output of zero would score."""
    twins = make_twins(teacher, config, corpus, plan, o)

    def loss_fn(idx, targets, step):
        given = teacher_layers(teacher, config, idx)
        return sum((twin(x, where).float() - y.float()).square().mean() / y.float().square().mean()
                   for twin, (_, x, where, y) in zip(twins, given))
    train(run, "align", plan, o.seed, corpus, twins, [list(t.parameters()) for t in twins], loss_fn)
    return twins


def swap_scores(teacher, twins, config, corpus, o):
    """R and C of paper eq. 8, measured with what is built in. For every layer, of the model in which it alone
    is linear: mean log-probability of a pass key's tokens (R) and minus the held-out loss (C), with their
    standard errors; for "swap" also those of the model in which it alone is what it would be if it stayed:
    with HyPE, attention without RoPE. Returns these and the teacher's own C. A swap is made in place, the
    model's config telling it which kind layer i now is."""
    own, scores = teacher.config, []
    batches = held_out(corpus, own.max_len, max(2, o.eval_windows // 2))

    def measure(kind=""):
        R, C = recall(teacher, corpus, own.max_len, o.trials * 2)[0], -losses(teacher, batches)
        return {f"R{kind}": R.mean().item(), f"R{kind}_se": R.std().item() / len(R) ** 0.5,
                f"C{kind}": C.mean().item(), f"C{kind}_se": C.std().item() / len(C) ** 0.5}
    for i, twin in enumerate(tqdm(twins, desc="select   ", dynamic_ncols=True)):
        attn = teacher.blocks[i].mixer
        try:
            teacher.blocks[i].mixer = twin
            teacher.config = replace(config, layers="A" * i + "L" + "A" * (len(twins) - 1 - i), attn_pe=1.0,
                                     chunk=None, n_chunks=0, window=None, attn_gate=False)
            scores.append(measure())
        finally:
            teacher.blocks[i].mixer, teacher.config = attn, own
        if o.layers == "swap":
            if o.pe == "hype":
                attn.mix = lambda x, where, cache=None: type(attn).mix(
                    attn, x, where._replace(attn_rope=None), cache)
            try:
                scores[i].update(measure("_kept"))
            finally:
                vars(attn).pop("mix", None)
    return scores, -losses(teacher, batches).mean().item()


def choose_layers(how, n_layer, scores=None, base_C=None, limit=1.0):
    """The layers that stay attention, as a string of "A" and "L". how: the string itself; "even"; "ends", the
    article's first and last quarter; "score", the floor(L/4) layers of highest

        score_i = (max R - R_i) / (max C - C_i + 1e-6)             paper eq. 8, 9

    much recall lost for little language lost; "guarded", the same with the denominator floored at C's
    standard error, and those layers first whose lone swap costs more than `limit` nats; or "swap":

        score_i = (R_i if it stays - R_i if it is linear) + (the same of C)

    A layer that stays loses its RoPE (HyPE), so the choice is between two losses. One that looks a fixed step
    back needs positions, and is better off linear, with RoPE, however much recall hangs on it."""
    if how not in (*SCORED, "even", "ends") and (set(how) - set("AL") or not how):
        raise ValueError(f"--layers {how}: give {', '.join(SCORED)}, even, ends, or a letter A or L a layer")
    if set(how) <= set("AL"):
        if len(how) != n_layer:
            raise ValueError(f"--layers {how} names {len(how)} layers; the teacher has {n_layer}")
        return how
    k = max(1, n_layer // 4)
    if how == "ends":                                              # the article's get_hybrid_config
        keep = [*range(n_layer // 4), *range(n_layer * 3 // 4, n_layer)]
    elif how == "even":
        keep = [round((i + 1) * n_layer / k) - 1 for i in range(k)]
    else:
        best_R, best = max(s["R"] for s in scores), max(scores, key=lambda s: s["C"])
        for s in scores:
            floor = best["C_se"] if how == "guarded" else 0.0
            s["score"] = (s["R_kept"] - s["R"] + s["C_kept"] - s["C"] if how == "swap" else
                          (best_R - s["R"]) / (max(best["C"] - s["C"], floor) + 1e-6))
            s["must"] = how == "guarded" and base_C - s["C"] > limit
        order = sorted(range(n_layer), key=lambda i: (scores[i]["must"], scores[i]["score"]), reverse=True)
        keep = order[:k]
    return "".join("A" if i in keep else "L" for i in range(n_layer))


def convert_staged(run, teacher, corpus, plans, o):
    """The paper's HALO: align, select, distil, finetune, fit."""
    L = len(teacher.config.layers)
    config = student_config(teacher.config, "L" * L, o)
    twins = align(run, teacher, config, corpus, plans["align"], o)
    scores = base = None
    if o.layers in SCORED:
        scores, base = run.once("scores", lambda: swap_scores(teacher, twins, config, corpus, o))
    layers = choose_layers(o.layers, L, scores, base)
    if scores:
        print_scores(scores, layers, base)
    config = replace(config, layers=layers)
    student = assemble(teacher, config, [attention_twin(b.mixer, config) if kind == "A" else twin
                                         for b, twin, kind in zip(teacher.blocks, twins, layers)])
    everything, fade = [list(student.parameters())], round(o.fade * plans["distil"].steps)
    distil = objective(student, teacher, "distil", o, o.alpha)

    def fading(idx, targets, step):                                # RoPE (or wpe) leaves attention slowly
        student.config.attn_pe = max(0.0, 1 - step / fade)
        return distil(idx, targets, step)
    train(run, "distil", plans["distil"], o.seed, corpus, student, everything, fading if fade else distil)
    student.config.attn_pe = config.attn_pe
    train(run, "finetune", plans["finetune"], o.seed, corpus, student, everything,
          objective(student, teacher, "finetune", o, alpha=1.0))
    return student


def print_scores(scores, layers, base):
    kinds = {"": "linear", "_kept": "kept"} if "R_kept" in scores[0] else {"": "linear"}
    print("\nlayer" + "".join(f"{f'recall if {k} (log p)':>27s}{f'held-out loss if {k}':>25s}"
                             for k in kinds.values()) + f"{'score':>10s}")
    for i, s in enumerate(scores):
        print(f"{i:3d} {layers[i]}" + "".join(
            f"{s['R' + k]:17.3f} +- {s['R' + k + '_se']:6.3f}{-s['C' + k]:15.4f} +- {s['C' + k + '_se']:.4f}"
            for k in kinds) + f"{s['score']:10.3f}" + ("  (swap costs over 1 nat)" if s["must"] else ""))
    print(f"teacher's held-out loss {-base:.4f}; layers: {layers}\n")


# ---- the article's progressive conversion ------------------------------------------------------------------


def convert_progressive(run, teacher, corpus, plans, o):
    """The article's halo_distillation: the linear layers in groups, the model usable after each."""
    layers = choose_layers(o.layers, len(teacher.config.layers))
    linear = [i for i, kind in enumerate(layers) if kind == "L"]
    n_groups = min(len(linear), o.groups or max(2, math.ceil(len(linear) / 6)))
    config = student_config(teacher.config, layers, o)
    plan = replace(plans["group"], tokens=plans["group"].tokens / n_groups)
    twins = make_twins(teacher, config, corpus, plan, o)
    mixers = [attention_twin(block.mixer, config) for block in teacher.blocks]
    batches, student = held_out(corpus, teacher.config.max_len, o.eval_windows), teacher
    for g, group in enumerate(np.array_split(linear, n_groups), 1):
        for i in group:
            mixers[i] = twins[i]
        now = "".join("L" if isinstance(m, LinearAttention) else "A" for m in mixers)
        student = assemble(student, replace(config, layers=now), mixers)
        params = [p for i in group for p in student.blocks[i].mixer.parameters()]
        params += [p for name, p in student.named_parameters() if "chunk_embd" in name]
        stage = f"group{g}"
        train(run, stage, plan, o.seed, corpus, student, [params],
              objective(student, teacher, stage, o, o.alpha))
        mixers = [block.mixer for block in student.blocks]

        def usable():
            student.save_pretrained(run.path(stage))
            corpus.tokenizer.save(run.path(stage))
            return losses(student, batches).mean().item()
        loss = run.once(stage, usable)
        print(f"group {g} of {n_groups}: {now} | held-out loss {loss:.4f} | usable: {run.path(stage)}")
    return student


# ---- the logit base, the report ----------------------------------------------------------------------------


def fit_logit_base(student, corpus, length, seed):
    """Held-out loss at a long length by the base a of s_t (paper eq. 11): {a: loss}."""
    batches, out = held_out(corpus, length, 8, seed, batch=4), {}
    for a in tqdm((None, 10000, 3000, 1000, 500, 300, 100, 50, 20), desc="fit a    ", dynamic_ncols=True):
        student.config.logit_base = a
        out[str(a)] = losses(student, batches).mean().item()
    return out


def evaluate(teacher, student, corpus, o):
    """The numbers of the final table and of report.json. Pass keys are asked at 1 to 16 times the teacher's
    length, and of the student at 64 times too; None: past the last position a model knows."""
    T, found = teacher.config.max_len, dict(teacher={}, student={})
    for n in tqdm((T, 2 * T, 4 * T, 16 * T, 64 * T), desc="pass keys", dynamic_ncols=True):
        trials = max(1, o.trials * 16 * T // max(n, 16 * T))       # the longest are dear
        for name, model in dict(teacher=teacher, student=student).items():
            if n <= 16 * T or name == "student":
                known = n <= model.config.limit()
                found[name][str(n)] = recall(model, corpus, n, trials)[1].mean().item() if known else None
    return dict(**compare(teacher, student, held_out(corpus, T, o.eval_windows)), passkey=found)


def print_report(r):
    def row(title, teacher, student):
        print(f"{title:34s}{teacher:>10s}{student:>10s}")

    def found(model, n):
        hits = r["passkey"][model].get(n)
        return "-" if hits is None else f"{hits:.0%}"
    row("", "teacher", "student")
    row("layers", "A" * len(r["layers"]), r["layers"])
    row("parameters", *(f"{r['params'][m]:,}" for m in ("teacher", "student")))
    row("held-out loss, nats a token", *(f"{r['val_loss'][m]:.4f}" for m in ("teacher", "student")))
    row("KL to the teacher, nats a token", "", f"{r['kl']:.4f}")
    row("same likeliest next token", "", f"{r['top1_agreement']:.1%}")
    for n in r["passkey"]["student"]:
        row(f"pass key found in {int(n):,} tokens", found("teacher", n), found("student", n))
    peak = f", peak memory {r['peak_gb']:.1f} GB" if r["peak_gb"] else ""
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes{peak}, "
          + (f"logit base {r['logit_base']:g}\n" if r["logit_base"] else "no logit scaling\n"))


# ---- command line ------------------------------------------------------------------------------------------


def get_args(argv):
    p = Parser(prog="halo.py", description=__doc__.split("\n\n")[0],
               epilog="eq.: of arXiv 2601.22156. A row left out follows --recipe. " + " ".join(
                   f"{name}: " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in rows.items()) + "."
                   for name, rows in RECIPES.items()))
    p.add_argument("--teacher", default="tiny", help="tiny (shipped, 1M parameters) or the folder of a model")
    p.add_argument("--recipe", default="paper", choices=RECIPES, help="the paper's (default), the article's")
    p.add_argument("--out", help="folder of the run; default out/TEACHER-RECIPE; -2, -3, ... if taken")
    p.add_argument("--resume", metavar="RUN",
                   help="go on with the run in this folder, under its own options (but for --device)")
    p.add_argument("--data", nargs="+", action="extend", metavar="PATH",
                   help="text to train on: .txt, .jsonl (field text), .gz of either, or folders of them; "
                        "default: the source of Python's standard library")
    p.add_argument("--device", help=f"cuda, mps or cpu; default: {default_device()} here")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0)
    p.add_argument("--budget", type=number(float, 1e-6), default=1.0,
                   help="multiply the tokens of every stage by this")
    p.add_argument("--plan", nargs="+", action="extend", default=[], metavar="STAGE.FIELD=X",
                   help="change entries of the plan, such as distil.tokens=4e6 or align.lr=1e-3")
    p.add_argument("--pretrain", action="store_true",
                   help="train the teacher from random weights instead; with --layers a hybrid")
    r = p.add_argument_group("rows of the recipe")
    r.add_argument("--layers", help="which stay attention: swap (those that lose more as linear layers "
                                    "than as attention without RoPE), score (eq. 8), guarded (eq. 8, its "
                                    "denominator floored at the noise), even, ends (first, last quarter), "
                                    "or letters such as LLALLLAL")
    r.add_argument("--decay", choices=("constant", "none", "head", "channel"),
                   help="of linear layers: eq. 19, no forgetting, or a gate for each head or key channel")
    r.add_argument("--state", choices=("full", "half"), help="width of a key in linear layers")
    r.add_argument("--pe", choices=("hype", "chunk", "rope"),
                   help="hype: RoPE in linear layers, none in attention; chunk: the article's; rope: both")
    r.add_argument("--extras", choices=("on", "off"), help="QK-norm, output norm and gates")
    r.add_argument("--training", choices=("staged", "progressive"), help="stages, or groups of layers")
    r.add_argument("--kl", choices=("forward", "reverse"), help="KL(teacher, student), KL(student, teacher)")
    r.add_argument("--alpha", type=number(float, 0, 1), help="share of cross-entropy in the loss, 0 to 1")
    r.add_argument("--window", type=number(int, 0), help="attention reaches this many tokens back, 0: all")
    r.add_argument("--logit-base", help="a of s_t (eq. 11): fit, none, or a number above 1")
    m = p.add_argument_group("finer choices")
    m.add_argument("--groups", type=number(int, 0), default=0,
                   help="into which a progressive run parts linear layers; default ceil(n / 6), at least 2")
    m.add_argument("--retention", type=number(float, 0.001, 0.999), default=0.7,
                   help="share of the state that a new forget gate keeps at each token")
    m.add_argument("--fade", type=number(float, 0, 1), default=0.0,
                   help="share of stage 2 over which RoPE leaves attention; 0: at once")
    m.add_argument("--max-ctx", type=number(int, 1), default=65536 + 1024,
                   help="positions that a chunk HyPE model knows, context and answer together")
    m.add_argument("--trials", type=number(int, 1), default=20,
                   help="pass keys asked at each length; a quarter of them at 64 times the length")
    m.add_argument("--eval-windows", type=number(int, 2), default=256,
                   help="held-out sequences for the losses")
    m.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=X",
                   help="set fields of the student's HypeNetConfig, such as linear_rope=false")
    return p.parse_args(argv)


def settle(o):
    """Fill in the recipe; return the plans and the changes of --set. ValueError for what cannot go."""
    o.hybrid = o.layers is not None                       # for --pretrain: layers were asked for
    o.device = default_device(o.device)
    for key, value in RECIPES[o.recipe].items():
        if getattr(o, key) is None:
            setattr(o, key, value)
    plans = {stage: replace(plan, tokens=plan.tokens * o.budget) for stage, plan in PLANS.items()}
    for item in o.plan:
        key, _, value = item.partition("=")
        stage, _, field = key.partition(".")
        if stage not in plans or field not in asdict(plans[stage]):
            raise ValueError(f"--plan {item}: STAGE is one of {', '.join(plans)}; FIELD one of "
                             + ", ".join(asdict(plans["align"])))
        kind = type(getattr(PLANS[stage], field))
        try:
            plans[stage] = replace(plans[stage], **{field: kind(float(value))})
        except (ValueError, OverflowError):
            raise ValueError(f"--plan {item}: {value!r} is no number") from None
    names = [f.name for f in fields(HypeNetConfig)]
    changes, known = {}, [n for n in names[names.index("attn_pe"):] if n != "logit_base"]
    for item in o.set:
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"--set {item}: fields are {', '.join(known)}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    try:
        base = o.logit_base in ("fit", "none") or 1 < float(o.logit_base) < math.inf
    except ValueError:
        base = False
    scored = o.layers in SCORED
    for ok, message in (
            (all(min(p.tokens, p.length, p.batch, p.lr, p.warmup) > 0 and 0 <= p.recall <= 1
                 and all(map(math.isfinite, asdict(p).values())) for p in plans.values()),
             "--plan: tokens, length, batch, lr and warmup must be positive, recall between 0 and 1"),
            (base, f"--logit-base {o.logit_base}: give fit, none or a number above 1"),
            (not o.fade or o.pe == "hype" and o.training == "staged", "--fade goes with --pe hype, staged"),
            (o.training == "staged" or o.pretrain or not scored,
             f"--training progressive with --layers {o.layers}: no stage 1 to score by; use ends or even"),
            (o.training == "staged" or o.pretrain or o.pe != "hype",
             "--training progressive with --pe hype: its attention layers do not train; use chunk or rope"),
            (not o.pretrain or not o.hybrid or not scored,
             f"--pretrain with --layers {o.layers}: no teacher to score; use ends, even or letters"),
            (not o.pretrain or o.hybrid or not o.set, "--pretrain --set goes with --layers: a hybrid"),
            (o.training == "progressive" or not o.groups, "--groups goes with --training progressive")):
        if not ok:
            raise ValueError(message)
    return plans, changes


def keep_memory():
    """Let glibc keep what it has freed: tensors of a few MB cost more in page faults than in arithmetic. Does
    nothing elsewhere."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            for option, value in ((-3, 2 ** 30), (-1, 2 ** 31 - 1), (-2, 2 ** 27)):
                libc.mallopt(option, value)               # mmap threshold, trim threshold, top pad
        except (OSError, AttributeError):
            pass


def new_folder(o):
    folder = o.out or os.path.join("out", f"{os.path.basename(os.path.normpath(o.teacher))}-{o.recipe}")
    if not os.path.isdir(folder) or not os.listdir(folder):
        return folder
    if o.out:
        raise ValueError(f"--out {folder} is not empty; go on with it by --resume {folder}, or name another")
    return next(f"{folder}-{i}" for i in range(2, 10 ** 6) if not os.path.exists(f"{folder}-{i}"))


def print_plan(run, teacher, corpus, plans, o):
    print(f"teacher {o.teacher}: {len(teacher.layers)} layers, trained at {teacher.max_len} tokens | "
          f"recipe {o.recipe} | device {o.device} | run {run.folder}")
    print(f"text {corpus.facts['name']}: {len(corpus.train):,} tokens to train on, "
          f"{len(corpus.held_out):,} held out")
    print(f"{'stage':10s}{'tokens':>12s}{'steps':>8s}{'length':>8s}{'batch':>7s}   learning rate")
    for name, plan in plans.items():
        print(f"{name:10s}{plan.total:12,}{plan.steps:8,}{plan.length:8,}{plan.batch:7,}   "
              f"{plan.lr:.0e} -> {plan.lr_end:.0e}")
    print(flush=True)


def convert(run, teacher, corpus, plans, o):
    """Distil a teacher into a student by the options o; returns the student and its report."""
    T, progressive = teacher.config.max_len, o.training == "progressive"
    stages = ["group"] if progressive else ["align", "distil", "finetune"]
    print_plan(run, teacher.config, corpus, {name: plans[name] for name in stages}, o)
    torch.manual_seed(o.seed)                             # chunk embeddings and other new weights
    student = (convert_progressive if progressive else convert_staged)(run, teacher, corpus, plans, o).eval()
    base = o.logit_base
    if base == "fit":
        length = min(16 * T, student.config.limit())
        fits = run.once("fit", lambda: fit_logit_base(student, corpus, length, o.seed))
        print(f"held-out loss at {length:,} tokens by logit base: "
              + ", ".join(f"{a} {x:.4f}" for a, x in fits.items()) + "\n")
        base = min(fits, key=fits.get)
    student.config.logit_base = None if base in ("none", "None") else float(base)
    report = dict(recipe=o.recipe, teacher=o.teacher, layers=student.config.layers,
                  logit_base=student.config.logit_base,
                  params=dict(teacher=teacher.n_params(), student=student.n_params()), tokens=run.tokens)
    report = run.once("report", lambda: dict(
        **report, **evaluate(teacher, student, corpus, o), seconds=run.seconds(), peak_gb=peak_gb(o.device),
        device=o.device, text=corpus.facts))
    student.save_pretrained(run.folder)
    o.tokenizer.save(run.folder)
    write_json(run.path("report.json"), report)
    return student, report


def pretrain(run, corpus, plans, o):
    """Train a teacher (or, with --layers, a hybrid) from random weights on text and pass keys; returns it."""
    plan = plans["pretrain"]
    config = replace(TEACHERS[o.teacher], max_len=plan.length)
    if o.hybrid:
        config = student_config(config, choose_layers(o.layers, len(config.layers)), o)
    print_plan(run, config, corpus, {"pretrain": plan}, o)
    torch.manual_seed(o.seed)
    model = HypeNet(config).to(o.device)
    train(run, "pretrain", plan, o.seed, corpus, model, [list(model.parameters())],
          objective(model, None, "pretrain", o, alpha=1.0))
    model.eval().save_pretrained(run.folder, torch.bfloat16)
    o.tokenizer.save(run.folder)
    loss = losses(model, held_out(corpus, config.max_len, o.eval_windows)).mean().item()
    hits = recall(model, corpus, config.max_len, o.trials)[1].mean().item()
    print(f"\n{model.n_params():,} parameters, held-out loss {loss:.4f} nats a token, pass key found in "
          f"{config.max_len} tokens {hits:.0%}, {run.seconds() / 60:.1f} minutes")
    print(f"python sample.py --model {run.folder}" if o.hybrid else f"python halo.py --teacher {run.folder}")
    return model


def peak_gb(device):
    """Peak memory of this process, or of the GPU it used, in GB; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource                                   # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_length(stage, plan, limit, o):
    """ValueError if a stage's sequences are longer than its models know, or too short for a pass key."""
    if plan.length > limit:
        raise ValueError(f"--plan {stage}.length={plan.length}: the model knows {limit} positions"
                         + (f" (--max-ctx {o.max_ctx})" if o.pe == "chunk" else ""))
    if plan.recall:
        try:
            plant(o.tokenizer, np.zeros(plan.length, np.int64), np.random.default_rng(0))
        except ValueError as e:
            raise ValueError(f"--plan {stage}.length: {e}") from None


def resumed(o, argv):
    """The options of a run that was stopped; only the device may be another."""
    given = [a for a in argv if a.startswith("--") and a.split("=")[0] not in ("--resume", "--device")]
    if given:
        raise ValueError(f"--resume takes its options from the run; leave out {' '.join(given)}")
    try:
        with open(os.path.join(o.resume, "run.json"), encoding="utf-8") as f:
            options = json.load(f)["options"]
        return argparse.Namespace(**{**options, "resume": o.resume, "device": o.device or options["device"]})
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--resume {o.resume}: no run there (no run.json that can be read)") from None


def run_main(argv):
    o = get_args(argv)
    if o.resume:
        o = resumed(o, argv)
    options = dict(vars(o))
    plans, o.changes = settle(o)
    if o.pretrain and o.teacher not in TEACHERS:
        raise ValueError(f"--pretrain --teacher {o.teacher}: known sizes are {', '.join(TEACHERS)}")
    o.tokenizer, longest, lengths = Tokenizer.bytes(), 256, {"pretrain": math.inf}
    if not o.pretrain:
        path = os.path.join(HERE, "assets", f"{o.teacher}-teacher") if o.teacher in TEACHERS else o.teacher
        teacher = HypeNet.from_pretrained(path, device=o.device).requires_grad_(False)
        if "L" in teacher.config.layers:
            raise ValueError(f"--teacher {o.teacher} is a hybrid, {teacher.config.layers}: not a teacher")
        o.tokenizer, longest = Tokenizer.load(path), 64 * teacher.config.max_len
        L = len(teacher.config.layers)
        student = student_config(teacher.config, "L" * L, o)
        both = min(student.limit(), teacher.config.limit())
        lengths = (dict(group=both) if o.training == "progressive" else
                   dict(align=teacher.config.limit(), distil=both, finetune=student.limit()))
        if o.layers not in SCORED and "L" not in choose_layers(o.layers, L):
            raise ValueError(f"--layers {o.layers} leaves nothing to convert")
    for stage, limit in lengths.items():                  # what is wrong fails now, not after stage 1
        check_length(stage, plans[stage], limit, o)
    if not o.pretrain:
        plant(o.tokenizer, np.zeros(teacher.config.max_len, np.int64), np.random.default_rng(0))
    corpus = Corpus(o.tokenizer, o.data)
    corpus.windows(np.random.default_rng(0), 1, longest, held_out=True)
    keep_memory()
    run = Run(o.resume or new_folder(o), options)
    try:
        if run.once("text", lambda: corpus.facts) != corpus.facts:
            raise ValueError(f"--resume {o.resume}: the text has changed since it began; start a new run")
        if o.pretrain:
            pretrain(run, corpus, plans, o)
        else:
            _, report = convert(run, teacher, corpus, plans, o)
            print_report(report)
            print(f"files in {run.folder}: model.safetensors, config.json, tokenizer.json, report.json, "
                  f"log.jsonl\n\npython sample.py --model {run.folder} --ctx 65536")
    finally:
        run.close()


def main(argv=None):
    command_line("halo.py", run_main, argv)


if __name__ == "__main__":
    main()
