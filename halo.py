"""HALO: distil a pretrained Transformer into a HypeNet (hypenet.py), a model that reads long texts cheaply.

    python halo.py                             convert the tiny teacher on a laptop CPU, offline, in minutes
    python halo.py --recipe article            the article's recipe in place of the paper's
    python halo.py --resume out/tiny-paper     go on with a run that was stopped
    python halo.py --teacher small             convert a teacher of 14M parameters, on one GPU
    python halo.py --pretrain --out teacher    train the tiny teacher anew, on one GPU

The paper's recipe (arXiv 2601.22156, section 4) has six stages. align, distil and finetune share the loop
`train`.

    stage     what trains              what it reads                    what it learns, or what comes out
    transfer  nothing                  one batch of text                a linear twin of each attention layer
    align     each linear twin, alone  what its attention layer reads   what that layer writes (eq. 7)
    select    nothing                  held-out text                    which layers stay attention (eq. 8, 9)
    distil    the whole hybrid         text                             the teacher's predictions (eq. 10)
    finetune  the whole hybrid         longer text                      the next token, without a teacher
    fit       nothing                  held-out text, longer still      the base a of s_t (eq. 11)

The article's recipe is progressive. It converts the linear layers group by group. Only the newest group and
the chunk embeddings train, on alpha CE + (1 - alpha) KL(student, teacher).

Map of the file:
    read first      recipes and plans, transfer, losses, the training loop, the paper's stages
    read second     the article's conversion, the logit base, the report
    skip at first   measuring, whole runs, the command line

Deviations from the paper, and what each buys:
    transfer  Least squares scales each column of W_o, so the twin starts near its attention layer.
    align     A layer's error is divided by its target's mean square. Else clipping slows large outputs.
    select    `swap` compares a linear layer with attention without positions. `--layers score` is eq. 8.
    select    Recall is a log-probability, not an accuracy. It tells layers apart before any answer is right.
    all       Some rows of text hide something to recall. Plain text teaches small models recall too slowly.

Batches depend on (seed, stage, step), initial weights on the seed. On one CPU a run repeats exactly,
and a stopped run goes on as if it had never stopped. The folder of a run holds log.jsonl (one line per step),
one checkpoint per stage, report.json, and the student: config.json, model.safetensors, tokenizer.json.
"""
import argparse
import itertools
import math
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a thread that spins long stalls other busy programs

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hypenet import (  # noqa: E402
    DECAYS, FAMILIES, Attention, Block, HypeNet, HypeNetConfig, LinearAttention, locate)
from support import fast, pretrained  # noqa: E402
from support.common import Parser, command_line, default_device, number, write_json  # noqa: E402
from support.loss import loss_and_gradient  # noqa: E402
from support.recall import has_room, plant, recall, training_rows  # noqa: E402
from support.run import (  # noqa: E402
    Probe, Run, beside, bf16, by_slices, change_plans, check_disk, cpu_hours, loss_by_slices, new_folder,
    options_of, peak_gb, print_plan, read_set, refuse, teacher_argv)
from support.text import Corpus  # noqa: E402
from support.tokens import Tokenizer, check_tokenizer  # noqa: E402
from support.writer import teacher_text  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- recipes and plans -------------------------------------------------------------------------------------

SCORED = ("swap", "guarded", "score")               # ways to choose layers that first measure each layer

# A recipe is a column of this table, and every row is a flag: an ablation is one flag.
ROWS = (  # flag, the paper's value, the article's value, allowed values, help
    ("layers", "swap", "ends", str,
     "the layers that stay attention. swap: those that lose more as linear layers than as attention without "
     "positions. score: eq. 8. guarded: eq. 8, but differences in loss below the noise count as noise. even. "
     "ends: the first and the last quarter. Or one letter per layer, such as LLALLLAL"),
    ("decay", "constant", "channel", tuple(DECAYS),
     "what linear layers forget. constant: eq. 19. none: nothing. head, channel: a learned gate for each "
     "head or key channel"),
    ("state", "full", "half", ("full", "half"), "width of a key in linear layers: the teacher's, or half"),
    ("pe", "hype", "chunk", ("hype", "chunk", "rope"),
     "positions. hype: RoPE in linear layers, none in attention. chunk: the article's. rope: RoPE in both"),
    ("extras", "on", "off", ("on", "off"), "QK-norm and output norm in linear layers, output gates in all"),
    ("training", "staged", "progressive", ("staged", "progressive"),
     "staged: align, select, distil, finetune. progressive: groups of layers, one after the other"),
    ("kl", "forward", "reverse", ("forward", "reverse"),
     "forward: KL(teacher, student). reverse: KL(student, teacher)"),
    ("alpha", 0.0, 0.5, number(float, 0, 1), "share of cross-entropy in the loss, 0 to 1"),
    ("window", 0, 2048, number(int, 0), "attention sees the last N tokens, its own included; 0: all"),
    ("logit_base", "fit", "none", str, "a of s_t (eq. 11): fit, none, or a number above 1"),
)
RECIPES = {"paper": {row[0]: row[1] for row in ROWS}, "article": {row[0]: row[2] for row in ROWS}}


@dataclass
class Plan:
    """Data and learning rate of one stage. The rate is a warm-up times a cosine from lr to lr_end."""
    tokens: float                    # in all
    length: int                      # tokens of a sequence
    batch: int                       # sequences of a step
    lr: float
    lr_end: float
    recall: float = 0.5              # share of sequences with a hidden key; plain text teaches recall slowly
    warmup: int = 50                 # steps, at most a tenth of all
    varied: float = 0.0              # share of those sequences that use other tasks
    weight_decay: float = 0.0        # of matrices; the paper has none (appendix B)

    @property
    def steps(self):
        return max(1, round(self.tokens / (self.length * self.batch)))

    @property
    def total(self):
        return self.steps * self.length * self.batch

    def rate(self, step):
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / min(self.warmup, max(1, self.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return warm * (self.lr_end + (self.lr - self.lr_end) * cosine)


# Each plan fits a budget. tiny: 5 minutes on a laptop CPU. mini, for ablations: 1 minute on a GPU. small: 2
# minutes on a GPU. Sequences of stage 3 are 4 times (tiny) or 32 times as long as those of stage 2: see
# convert_staged. mini and small repeat their text over ten times: their teachers train with weight decay.
PLANS = {
    "tiny": dict(
        pretrain=Plan(tokens=200e6, length=256, batch=256, lr=3e-3, lr_end=1e-4, recall=0.3, warmup=200),
        align=Plan(tokens=0.4e6, length=256, batch=16, lr=3e-3, lr_end=1e-4),
        distil=Plan(tokens=1.5e6, length=256, batch=16, lr=2e-3, lr_end=1e-4, recall=0.25),
        finetune=Plan(tokens=0.3e6, length=1024, batch=4, lr=3e-4, lr_end=3e-5),
        group=Plan(tokens=2e6, length=256, batch=16, lr=3e-3, lr_end=1e-4, recall=0.25)),
    "mini": dict(
        pretrain=Plan(tokens=118e6, length=512, batch=128, lr=3e-3, lr_end=1e-4, recall=0.7, warmup=200,
                      varied=0.8, weight_decay=0.5),
        align=Plan(tokens=2e6, length=512, batch=32, lr=3e-3, lr_end=1e-4, recall=0.7, varied=0.8),
        distil=Plan(tokens=10e6, length=512, batch=32, lr=2e-3, lr_end=1e-4, recall=0.6, varied=0.8),
        finetune=Plan(tokens=3e6, length=16384, batch=1, lr=3e-4, lr_end=3e-5, recall=0.8, varied=0.8),
        group=Plan(tokens=15e6, length=512, batch=32, lr=3e-3, lr_end=1e-4, recall=0.6, varied=0.8)),
    "small": dict(                               # a conversion reads less than half of its teacher's tokens
        pretrain=Plan(tokens=200e6, length=1024, batch=64, lr=2e-3, lr_end=1e-4, recall=0.7, warmup=200,
                      varied=0.8, weight_decay=1.0),
        align=Plan(tokens=6.5e6, length=1024, batch=32, lr=2e-3, lr_end=1e-4, recall=0.7, varied=0.8),
        distil=Plan(tokens=50e6, length=1024, batch=32, lr=1e-3, lr_end=5e-5, recall=0.6, varied=0.8),
        finetune=Plan(tokens=32e6, length=32768, batch=1, lr=2e-4, lr_end=2e-5, recall=0.8, varied=0.8),
        group=Plan(tokens=88e6, length=1024, batch=32, lr=2e-3, lr_end=1e-4, recall=0.6, varied=0.8)),
    "real": dict(                                # the paper's Table 5; a real teacher can recall already
        align=Plan(tokens=320e6, length=512, batch=32, lr=1e-3, lr_end=1e-5, recall=0),
        distil=Plan(tokens=1e9, length=512, batch=96, lr=1e-4, lr_end=1e-5, recall=0),
        finetune=Plan(tokens=1e9, length=16384, batch=128, lr=1e-5, lr_end=1e-5, recall=0),
        group=Plan(tokens=2.3e9, length=1024, batch=2048, lr=1e-5, lr_end=1e-5, recall=0)),   # the article's
}
SIZES = dict(tiny=0, mini=4e6, small=10e6, real=100e6)     # a folder: the plan follows its bytes of weights

TINY = dict(layers="A" * 8, n_embd=96, n_head=3, n_kv_head=3, head_dim=32, max_len=256)
MINI = dict(layers="A" * 8, n_embd=192, n_head=6, n_kv_head=2, head_dim=32, max_len=512)
SMALL = dict(layers="A" * 8, n_embd=384, n_head=6, n_kv_head=6, head_dim=64, max_len=1024)
TEACHERS = {                                     # what --pretrain can train; the repository ships tiny
    "tiny": HypeNetConfig(n_hidden=288, **TINY, **FAMILIES["qwen3"]),
    "tiny-gpt2": HypeNetConfig(n_hidden=384, **TINY, **FAMILIES["gpt2"]),
    "mini": HypeNetConfig(n_hidden=576, **MINI, **FAMILIES["qwen3"]),
    "small": HypeNetConfig(n_hidden=1024, **SMALL, **FAMILIES["qwen3"]),
    "small-gpt2": HypeNetConfig(n_hidden=1536, **SMALL, **FAMILIES["gpt2"]),
}

# ---- transfer: a student out of a teacher's weights --------------------------------------------------------


def student_config(teacher, layers, args):
    """The config of a student with these layers; args: the options of a recipe."""
    extras = args.extras == "on"
    chunk = min(2048, teacher.max_len // 4) if args.pe == "chunk" else None
    config = dict(
        layers=layers,
        chunk=chunk,
        n_chunks=math.ceil(args.max_ctx / chunk) if chunk else 0,
        attn_position=args.pe != "hype",
        attn_gate=extras,
        window=args.window or None,
        decay=args.decay,
        key_dim=teacher.head_dim // 2 if args.state == "half" else teacher.head_dim,
        linear_rope=args.pe != "chunk",
        linear_norm=extras,
        linear_gate=extras,
        linear_kv_head=teacher.n_head)
    config |= args.changes
    narrow = config["key_dim"] < teacher.head_dim
    config.setdefault("linear_qk_norm", extras and not narrow)     # low_rank_keys has applied QK-norm's gain
    return replace(teacher, **config)


@torch.no_grad()
def linear_twin(attn, config, x, where, retention=0.7, transfer=True):
    """A linear layer out of an attention layer: the same weights, KV heads cloned (paper eq. 13), gates
    neutral. transfer False: a random layer. The twin reads one batch x (B,T,C) of the layer's inputs, and
    least squares scales each input channel of its W_o to match attention's."""
    t = attn.config
    twin = LinearAttention(config).to(x.device)
    if twin.forget is not None:                  # a new gate keeps the same share of the state at every token
        nn.init.zeros_(twin.forget.weight)
        nn.init.constant_(twin.forget.bias, DECAYS[config.decay].bias(retention))
    if not transfer:
        return twin
    q, k, v, _ = with_bias(attn.qkvz).split(attn.sizes)
    clones = config.linear_kv_head // t.n_kv_head
    v = clone_heads(v, t.n_kv_head, clones)
    if config.key_dim < config.head_dim:
        q, k = low_rank_keys(attn, x, config.key_dim)              # one head of k for each query head
        k = k.unflatten(0, (config.n_head, -1))[::config.n_head // config.linear_kv_head].flatten(0, 1)
    else:
        k = clone_heads(k, t.n_kv_head, clones)
    fill(twin.qkvz, torch.cat((q, k, v)))
    fill(twin.out, with_bias(attn.out))
    if config.linear_qk_norm and t.qk_norm and config.key_dim == config.head_dim:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    target = attn.mix(x, where).float()                            # (B,T,H*D): attention's input to W_o
    o = twin.mix(x, where).float()                                 # (B,T,H*D): the twin's
    scale = (target * o).sum((0, 1)) / (o * o).sum((0, 1)).clamp(min=1e-12)   # least |target - scale * o|^2
    twin.out.weight *= scale
    return twin


@torch.no_grad()
def attention_twin(attn, config):
    """An attention layer of the student, with its teacher's weights. A new gate is sigmoid(0) = 1/2, and a
    doubled W_o makes up for it. Chunk embeddings start random (std 0.02)."""
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


@torch.no_grad()
def low_rank_keys(attn, x, rank):
    """The q and k of width `rank` whose product best fits the teacher's before RoPE (SVD, Frobenius norm).
    For a head, q . k = [x, 1] A_q^T A_k [x, 1]^T with A = [diag(gain / rms) W, bias]. The best
    approximation of A_q^T A_k of this rank is U_r Sigma_r V_r^T, and q and k each get sqrt(Sigma_r).
    1 / rms belongs to QK-norm and differs from token to token: its mean over one batch x (B,T,C) stands in.
    Returns the rows of q and of k, (H*rank, C+1) each, the bias in the last column."""
    c = attn.config
    H, D = c.n_head, c.head_dim

    def factors(y, A, n_head, norm):
        """Q (H,C+1,D) and R (H,D,D) of A^T = Q R, for every query head."""
        A = A.unflatten(0, (n_head, D))                            # (n_head, D, C+1)
        if c.qk_norm:
            rms = y.unflatten(-1, (n_head, D)).square().mean(-1).add(c.norm_eps).sqrt()
            A = A * norm.weight[:, None] * (1 / rms).mean((0, 1))[:, None, None]
        return torch.linalg.qr(A.repeat_interleave(H // n_head, 0).cpu().double().mT)
    y_q, y_k, *_ = attn.qkvz(x).split(attn.sizes, dim=-1)
    A_q, A_k, *_ = with_bias(attn.qkvz).split(attn.sizes)
    Q_q, R_q = factors(y_q, A_q, H, attn.q_norm)
    Q_k, R_k = factors(y_k, A_k, c.n_kv_head, attn.k_norm)
    U, singular, Vh = torch.linalg.svd(R_q @ R_k.mT)               # of D x D: A_q^T A_k = Q_q R_q R_k^T Q_k^T
    root = singular[:, :rank, None].sqrt()
    q = root * (Q_q @ U).mT[:, :rank]                              # (H, rank, C+1)
    k = root * (Vh @ Q_k.mT)[:, :rank]
    return q.flatten(0, 1).to(x), k.flatten(0, 1).to(x)


def with_bias(linear):
    """The rows of a Linear with their bias, or 0, as a last column: (out, in + 1)."""
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), 1)


def clone_heads(rows, n_head, times):
    """Repeat each of n_head heads `times` times."""
    return rows.unflatten(0, (n_head, -1)).repeat_interleave(times, 0).flatten(0, 1)


def fill(linear, rows):
    """Copy rows into a Linear; their last column is the bias. Its remaining rows, a gate's, become 0."""
    n = len(rows)
    linear.weight[:n] = rows[:, :-1]
    linear.weight[n:] = 0
    if linear.bias is not None:
        linear.bias[:n] = rows[:, -1]
        linear.bias[n:] = 0


@torch.no_grad()
def teacher_layers(teacher, config, idx):
    """Run a teacher on idx (B,T). Yield for every layer what its twin needs: the attention layer, its input x
    (B,T,C) after the norm, where the tokens stand, and its output y (B,T,C). Attention uses the
    teacher's positions; twins use RoPE as config says."""
    both = replace(config, attn_position=True, chunk=None, n_chunks=0)
    where = locate(both, torch.arange(idx.size(1), device=idx.device)[None])
    h = teacher.embed(idx, where)
    for block in teacher.blocks:
        x = block.norm1(h)
        y = block.mixer(x, where)
        yield block.mixer, x, where, y
        h = h + y
        h = h + block.mlp(block.norm2(h))


def make_twins(teacher, config, corpus, plan, args):
    """A linear twin of every attention layer, and the mean square of every layer's output, both from one
    batch of at most 2^14 tokens."""
    one_batch = replace(plan, batch=min(plan.batch, max(1, 2 ** 14 // plan.length)))
    rows = torch.from_numpy(training_rows(corpus, "transfer", one_batch)(0)).to(args.device)
    twins = nn.ModuleList()
    squares = []
    with bf16():
        for attn, x, where, y in teacher_layers(teacher, config, rows[:, :-1]):
            twins.append(linear_twin(attn, config, x, where, args.retention, args.transfer == "on"))
            squares.append(y.float().square().mean())
    return twins, squares


def assemble(source, config, mixers):
    """A model with this config and these mixers. All else is copied from the source, a teacher or student."""
    with torch.device(source.wte.weight.device):
        model = HypeNet(replace(config))
    shared = {name: w for name, w in source.state_dict().items() if ".mixer." not in name}
    missing = model.load_state_dict(shared, strict=False).missing_keys
    assert all(".mixer." in name or "chunk_embd" in name for name in missing), f"not transferred: {missing}"
    for block, mixer in zip(model.blocks, mixers):
        block.mixer = mixer
        mixer.config = model.config
    return model


# ---- losses ------------------------------------------------------------------------------------------------


def distil_loss(student, teacher, idx, targets, kl, alpha, offset=None, slice_elements=None):
    """alpha CE + (1 - alpha) KL, means over all tokens. kl "forward": KL(teacher, student), paper eq. 10;
    "reverse": KL(student, teacher), the article's. Full logits would not fit memory, so the head runs on
    slices of tokens, of about slice_elements logits. token_losses defines what loss_and_gradient computes."""
    def learn():
        return student.hidden(idx, offset=offset).flatten(0, 1)                   # (N,C)

    @torch.no_grad()
    def teach():
        return teacher.hidden(idx).flatten(0, 1) if alpha < 1 else targets.flatten()      # or not used
    xs, xt = beside(idx, learn, teach)

    def work(logits_s, xt, y):
        logits_t = teacher.head(xt) if alpha < 1 else None                        # (n,V)
        return loss_and_gradient(token_losses, logits_s, logits_t, y, kl, alpha)
    total = loss_by_slices(work, student.head_weight(), xs, xt, targets.flatten(), elements=slice_elements)
    return total / len(xs)


def token_losses(logits_s, logits_t, targets, kl, alpha):
    """Sum over tokens of alpha CE + (1 - alpha) KL, from logits (n,V) of student and teacher (None: CE)."""
    log_s = logits_s.float().log_softmax(-1)
    loss = 0.0
    if alpha:
        loss = alpha * F.nll_loss(log_s, targets, reduction="sum")
    if logits_t is not None:
        log_t = logits_t.float().log_softmax(-1)
        p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
        loss = loss + (1 - alpha) * F.kl_div(log_q, p, reduction="sum", log_target=True)
    return loss


def objective(student, teacher, kl, alpha):
    """The loss function of a stage, for `train`. Chunk HyPE gives each sequence a random start position, so
    that every chunk embedding is trained. CUDA graphs cannot call the host's
    random generator, so a hash of the ids picks the start."""
    def loss_fn(idx, targets):
        c = student.config
        offset = None
        if c.chunk:
            starts = max(0, c.chunk * c.n_chunks - idx.size(1)) + 1
            offset = (idx * torch.arange(1, idx.size(1) + 1, device=idx.device) ** 2).sum(1) % starts
        yield distil_loss(student, teacher, idx, targets, kl, alpha, offset)
    return loss_fn


# ---- the training loop -------------------------------------------------------------------------------------


def train(run, stage, plan, corpus, module, groups, loss_fn):
    """The one training loop (paper appendix B). groups are lists of the module's parameters: they train, and
    each list is clipped to a gradient norm of 1 by itself. loss_fn(idx, targets) yields terms of the loss,
    one by one; their sum is the loss. `run` keeps the log and the checkpoints: a stopped stage goes on."""
    params = only_train(module, groups)
    matrices = [p for p in params if p.dim() > 1]
    vectors = [p for p in params if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=plan.weight_decay),
                                   dict(params=vectors, weight_decay=0.0)],
                                  lr=plan.lr, betas=(0.9, 0.95), fused=True)

    def gradients(rows, at_once):
        optimizer.zero_grad()
        loss = backward(loss_fn, rows, at_once)
        norms = [nn.utils.clip_grad_norm_(group, 1.0) for group in groups]
        return torch.stack((loss, torch.stack(norms).max()))       # the maximum is NaN if any norm is

    progress = run.stage(stage, plan, module, optimizer, gradients)
    for step, rows in progress.steps(corpus, training_rows):
        loss, norm = progress.compute(rows)                        # calls gradients; raises if not finite
        lr = progress.rate(step)                                   # plan.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        progress.done(step, loss, norm, lr)
    module.requires_grad_(False).zero_grad()


def only_train(module, groups):
    """Let the parameters of the groups train, and freeze all others of module. On a GPU those that train are
    float32, frozen ones bfloat16. Returns a list of those that train."""
    params = [p for group in groups for p in group]
    trained = set(map(id, params))
    for p in module.parameters():
        p.requires_grad_(id(p) in trained)
        if p.device.type == "cuda":
            p.data = p.data.to(torch.float32 if p.requires_grad else torch.bfloat16)
    return params


def backward(loss_fn, rows, at_once):
    """Add up gradients of rows (batch, length + 1) over micro-batches of at_once rows; returns the mean loss.
    Each term of the loss is backpropagated as it comes, so memory holds the graph of one term alone."""
    def forward(terms):
        with bf16():                                               # the forward pass alone
            return next(terms, None)
    total = 0.0
    for part in rows.split(at_once):
        terms = loss_fn(part[:, :-1], part[:, 1:])
        for term in iter(partial(forward, terms), None):
            term = term * (len(part) / len(rows))
            term.backward()
            total = total + term.detach()
    return total


# ---- the paper's stages ------------------------------------------------------------------------------------


def convert_staged(run, teacher, corpus, plans, args):
    """The paper's HALO: align, select, distil, finetune. Returns the student."""
    config = student_config(teacher.config, "L" * len(teacher.config.layers), args)
    twins = align(run, teacher, config, corpus, plans["align"], args)
    layers = select(run, teacher, twins, config, corpus, args)
    config = replace(config, layers=layers)
    mixers = [attention_twin(block.mixer, config) if kind == "A" else twin
              for block, twin, kind in zip(teacher.blocks, twins, layers)]
    student = assemble(teacher, config, mixers)
    del twins, mixers                                              # frees the twins of attention layers
    everything = [list(student.parameters())]

    # From here attention has no positions (HyPE). With RoPE the score of two tokens depends on their
    # distance, and at a distance that training never had the score is arbitrary. Without positions the
    # score depends on the two tokens alone, near or far. The order of tokens comes from the linear layers,
    # which keep RoPE. GPT-2's learned positions leave the whole residual stream here.
    distil = objective(student, teacher, args.kl, args.alpha)
    train(run, "distil", plans["distil"], corpus, student, everything, distil)

    # Stage 3 has long sequences, because attention must learn to find one key among thousands: stage 2 never
    # shows it so many. Stage 3 has no teacher: a small one cannot read such texts, a large one would cost
    # too much. The text itself is the target. So a student reads further than its teacher: attention ignores
    # distance, linear states saturate by decay, and training showed it texts 4 to 32 times as long.
    finetune = objective(student, None, args.kl, alpha=1.0)
    train(run, "finetune", plans["finetune"], corpus, student, everything, finetune)
    return student


def align(run, teacher, config, corpus, plan, args):
    """Stage 1 (paper eq. 7): every linear twin learns its attention layer's output, each alone, on the hidden
    states of the teacher. The loss is a sum over layers of MSE / mean square of the target: a twin
    that outputs 0 has loss 1. Each layer is a term, whose graph is gone before the teacher runs the next."""
    twins, squares = make_twins(teacher, config, corpus, plan, args)

    def loss_fn(idx, targets):
        for twin, square, (_, x, where, y) in zip(twins, squares, teacher_layers(teacher, config, idx)):
            yield relative_error(twin(x, where), y, square)
    train(run, "align", plan, corpus, twins, [list(twin.parameters()) for twin in twins], loss_fn)
    return twins


def relative_error(out, target, square):
    """The mean squared error of a layer's output, in units of the target's mean square."""
    return (out.float() - target.float()).square().mean() / square


def select(run, teacher, twins, config, corpus, args):
    """The layers that stay attention, one letter per layer."""
    n_layer = len(twins)
    if args.layers not in SCORED:
        return choose_layers(args.layers, n_layer, keep=args.keep)
    scores, minus_loss = run.once("scores", lambda: swap_scores(teacher, twins, config, corpus, args))
    teacher_loss = -minus_loss
    layers = choose_layers(args.layers, n_layer, scores, teacher_loss, keep=args.keep)
    print_scores(scores, layers, teacher_loss)
    return layers


def choose_layers(how, n_layer, scores=None, teacher_loss=None, limit=1.0, keep=None):
    """The layers that stay attention, as a string of "A" and "L". how is the string itself, or a rule:

    even      every so many layers
    ends      the first and the last quarter (the article's get_hybrid_config)
    score     the highest  score_i = (max R - R_i) / (max C - C_i + 1e-6)  (paper eq. 8, 9). R is recall, C is
              minus the loss, both with layer i linear. A layer stays if its linear form loses much recall
              but little C
    guarded   the same, with the denominator floored at C's standard error. A layer stays first if its
              linear form costs over `limit` nats
    swap      the highest  score_i = (R_i if it stays - R_i if it is linear) + (the same of C)

    Each layer has two futures: linear with RoPE, or attention without (HyPE). `swap` compares the two. Say a
    layer looks a fixed number of tokens back: it needs RoPE, so linear suits it, even if it helps recall."""
    k = keep or max(1, n_layer // 4)
    if set(how) <= set("AL"):
        return how
    if how == "even":
        stay = [round((i + 1) * n_layer / k) - 1 for i in range(k)]
    elif how == "ends":
        stay = [*range(n_layer // 4), *range(n_layer * 3 // 4, n_layer)]
    else:
        add_scores(how, scores, teacher_loss, limit)
        order = sorted(range(n_layer), key=lambda i: (scores[i]["must"], scores[i]["score"]), reverse=True)
        stay = order[:k]
    return "".join("A" if i in stay else "L" for i in range(n_layer))


def add_scores(how, scores, teacher_loss, limit):
    """Give each layer its score, and whether it must stay attention; see choose_layers."""
    best_R = max(s["R"] for s in scores)
    best = max(scores, key=lambda s: s["C"])
    floor = best["C_se"] if how == "guarded" else 0.0
    for s in scores:
        if how == "swap":
            s["score"] = s["R_kept"] - s["R"] + s["C_kept"] - s["C"]
        else:
            s["score"] = (best_R - s["R"]) / (max(best["C"] - s["C"], floor) + 1e-6)   # paper eq. 8
        s["must"] = how == "guarded" and -s["C"] - teacher_loss > limit


def swap_scores(teacher, twins, config, corpus, args):
    """R and C of paper eq. 8 for every layer i, with their standard errors (_se). R is the log-probability of
    an answer, per token. C is minus the held-out loss. R and C are measured with layer i linear. R_kept and
    C_kept (for "swap") are measured with layer i as attention: without positions (--pe hype), else the
    teacher's. A new output gate is left out. All other layers are the teacher's. Returns a list of
    dicts, one per layer, and minus the held-out loss of the teacher itself. The report draws its held-out
    text with the same default seed."""
    batches = corpus.held_out_batches(args.length, max(2, args.eval_windows // 2))
    scores = []

    def both(model, kind=""):
        logp = recall(model, corpus, args.length, args.trials * 2, varied=args.varied)[0]
        loss = losses(model, batches)
        return {f"R{kind}": logp.mean().item(), f"R{kind}_se": logp.std().item() / len(logp) ** 0.5,
                f"C{kind}": -loss.mean().item(), f"C{kind}_se": loss.std().item() / len(loss) ** 0.5}
    unchanged = both(teacher, "_kept") if args.layers == "swap" and args.pe != "hype" else {}
    for i, twin in enumerate(tqdm(twins, desc="select   ", dynamic_ncols=True)):
        scores.append(both(with_linear(teacher, config, i, twin)) | unchanged)
        if args.layers == "swap" and args.pe == "hype":
            scores[i] |= both(with_kept(teacher, i), "_kept")
    return scores, -losses(teacher, batches).mean().item()


def with_linear(teacher, config, i, twin):
    """The teacher with layer i exchanged for its linear twin, of the kind that config says. Both models share
    the weights of all other layers."""
    layers = "A" * i + "L" + "A" * (len(teacher.blocks) - 1 - i)
    swapped = replace(config, layers=layers, attn_position=True, chunk=None, n_chunks=0, window=None,
                      attn_gate=False)
    with torch.device("meta"):                                     # memory for no weight
        model = HypeNet(swapped)
    model.blocks[i].mixer = twin
    return share_weights(model, teacher)


def with_kept(teacher, i):
    """The teacher with layer i as HyPE would keep it: attention without positions."""
    with torch.device("meta"):
        model = HypeNet(teacher.config)
        model.blocks[i] = WithoutPositions(teacher.config, getattr(model, "wpe", None))
    return share_weights(model, teacher)


class WithoutPositions(Block):
    """A teacher's block whose attention knows no positions. RoPE is left out. Learned positions sit in the
    residual stream, so wpe is subtracted before attention. What earlier layers made of wpe stays."""

    def __init__(self, config, wpe):
        super().__init__(config, "A")
        self.wpe = wpe

    def forward(self, x, where, cache=None):
        unplaced = x if self.wpe is None else x - self.wpe(where.pos)
        x = x + self.mixer(self.norm1(unplaced), where._replace(attn_rope=None), cache)
        return x + self.mlp(self.norm2(x))


def share_weights(model, teacher):
    """Let a model without weights (on the device "meta") use those of a teacher, by name."""
    missing = {name for name, w in model.state_dict().items() if w.is_meta}
    shared = {name: w for name, w in teacher.state_dict().items() if name in missing}
    model.load_state_dict(shared, strict=False, assign=True)
    return model.requires_grad_(False)


def print_scores(scores, layers, teacher_loss):
    kinds = {"": "if linear", "_kept": "if kept"} if "R_kept" in scores[0] else {"": "if linear"}
    width = 19 * len(kinds)
    print(f"\n{'':5s}{'recall (log p)':>{width}s}{'held-out loss':>{width}s}")
    print("layer" + 2 * "".join(f"{name:>19s}" for name in kinds.values()) + f"{'score':>10s}")
    for i, s in enumerate(scores):
        row = f"{i:3d} {layers[i]}"
        for kind in kinds:
            row += f"{s[f'R{kind}']:9.3f} +- {s[f'R{kind}_se']:6.3f}"
        for kind in kinds:
            row += f"{-s[f'C{kind}']:9.4f} +- {s[f'C{kind}_se']:6.4f}"
        print(f"{row}{s['score']:10.3f}" + "  (must stay: linear costs over 1 nat)" * s["must"])
    print(f"teacher's held-out loss {teacher_loss:.4f}; layers: {layers}\n")


# ---- the article's progressive conversion ------------------------------------------------------------------


def convert_progressive(run, teacher, corpus, plans, args):
    """The article's halo_distillation: the linear layers in groups, with a usable model after each group. A
    group trains its own mixers and all chunk embeddings; every other weight is frozen."""
    layers = choose_layers(args.layers, len(teacher.config.layers), keep=args.keep)
    groups = groups_of(layers, args.groups)
    config = student_config(teacher.config, layers, args)
    plan = replace(plans["group"], tokens=plans["group"].tokens / len(groups))
    twins, _ = make_twins(teacher, config, corpus, plan, args)
    mixers = [attention_twin(block.mixer, config) for block in teacher.blocks]
    student = teacher
    for n, group in enumerate(groups, 1):
        for i in group:
            mixers[i] = twins[i]
        letters = "".join("L" if isinstance(mixer, LinearAttention) else "A" for mixer in mixers)
        student = assemble(student, replace(config, layers=letters), mixers)
        params = [p for i in group for p in student.blocks[i].mixer.parameters()]
        params += [p for name, p in student.named_parameters() if "chunk_embd" in name]
        stage = f"group{n}"
        train(run, stage, plan, corpus, student, [params], objective(student, teacher, args.kl, args.alpha))
        title = f"group {n} of {len(groups)}: {letters}"
        run.once(stage, lambda: save_usable(run, stage, title, student, corpus, args))
    return student


def save_usable(run, stage, title, student, corpus, args):
    """Save the model after a group, for use; returns its held-out loss."""
    student.save_pretrained(run.path(stage))
    corpus.tokenizer.save(run.path(stage))
    loss = losses(student, corpus.held_out_batches(args.length, args.eval_windows)).mean().item()
    print(f"{title} | held-out loss {loss:.4f} | usable: {run.path(stage)}")
    return loss


def groups_of(layers, n_groups=0):
    """The linear layers in the groups in which they are converted; by default at most 6 in each."""
    linear = [i for i, kind in enumerate(layers) if kind == "L"]
    return np.array_split(linear, min(len(linear), n_groups or max(2, math.ceil(len(linear) / 6))))


# ---- measuring ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(models, batches):
    """Means over the tokens of each sequence, (sequences, 1 or 4): the loss of each model in nats. Of two
    models, teacher and student, also KL(teacher, student) and how often their likeliest next token agrees."""
    def one(targets, *xs):
        logs = [model.head(x).float().log_softmax(-1) for model, x in zip(models, xs)]
        out = [-log.gather(-1, targets[:, None])[:, 0] for log in logs]
        if len(logs) > 1:
            t, s = logs
            out.append(F.kl_div(s, t, reduction="none", log_target=True).sum(-1))
            out.append((t.argmax(-1) == s.argmax(-1)).float())
        return torch.stack(out, 1)                                  # (n, 1 or 4)
    device = models[0].wte.weight.device
    means = []
    for idx, targets in batches:
        idx, targets = idx.to(device), targets.to(device)
        with bf16():
            xs = [model.hidden(idx).flatten(0, 1) for model in models]
            scores = torch.cat(by_slices(one, models[0].config.vocab_size, targets.flatten(), *xs))
        means.append(scores.unflatten(0, idx.shape).mean(1).cpu())
    return torch.cat(means)


def losses(model, batches):
    """Mean loss of each sequence, in nats per token."""
    return measure([model], batches)[:, 0]


def compare(teacher, student, batches):
    """Held-out loss of both, KL(teacher, student) in nats per token, and how often their likeliest next token
    agrees."""
    t, s, kl, same = measure([teacher, student], batches).mean(0).tolist()
    return dict(val_loss=dict(teacher=t, student=s), kl=kl, top1_agreement=same)


# ---- the logit base ----------------------------------------------------------------------------------------
#
# Why s_t is a logarithm (paper eq. 11). Say the score of the right key exceeds all others by m. Among t keys
# its softmax weight is e^m / (e^m + t), which goes to 0. Let s_t = log(t + a) / log(a) multiply the query.
# With m = log(a), the weight is (t + a) / (2t + a), at least a half at any t. Without s_t the right key keeps
# half the weight up to t = a keys. s_t starts at 1 and reaches 2 at t = a^2 - a: the larger a,
# the gentler the scaling.
#
# Why training has no s_t: the weights learn scores that are sharp enough for the length they train at. So a
# can be chosen afterwards, on texts that are much longer than any training sequence.
#
# Why several bases are tried: which is best depends on m, that is on how sharp this student's scores are. Too
# large a base leaves attention flat. Too small a base makes attention one-hot, which raises the loss.


def choose_logit_base(run, student, corpus, plans, args):
    """The base a that --logit-base asks for, or the one that fits best; None: no scaling."""
    if args.logit_base != "fit":
        return None if args.logit_base == "none" else float(args.logit_base)
    length = min(fit_length(plans, args.length), student.config.limit())
    costs = run.once("fit", lambda: fit_logit_base(student, corpus, length, args.seed, args.varied))
    print(f"held-out loss + loss of an answer, at {length:,} tokens, by logit base")
    print("".join(f"{a:>9s}" for a in costs))
    print("".join(f"{cost:9.4f}" for cost in costs.values()) + "\n")
    return cheapest(costs)


def fit_logit_base(student, corpus, length, seed, varied=0.0):
    """What each base a costs at a long length: {a: held-out loss + loss of an answer's tokens}, both in
    nats a token. Their weights are equal by choice, as in choose_layers "swap". The cost should fall, then
    rise. So the search ends once a base costs 0.02 more than the best; the bases left scale more."""
    batches = corpus.held_out_batches(length, 8, seed)
    costs = {}
    for a in tqdm((None, 10000, 3000, 1000, 500, 300, 100, 50, 20), desc="fit a    ", dynamic_ncols=True):
        student.config.logit_base = a
        logp = recall(student, corpus, length, 10, seed + 1, varied=varied)[0]  # other keys than the report's
        costs[str(a)] = (losses(student, batches).mean() - logp.mean()).item()
        if costs[str(a)] > min(costs.values()) + 0.02:
            break
    return costs


def cheapest(costs):
    """The base that costs least, None or a number."""
    logit_base = min(costs, key=costs.get)
    return None if logit_base == "None" else float(logit_base)


def fit_length(plans, length):
    """The length at which the base is fitted: well past every training sequence."""
    return 16 * length if "group" in plans else max(length, 4 * plans["finetune"].length)


# ---- the report --------------------------------------------------------------------------------------------

# Field of report.json -> (the task asked for, its title in the table). The second task is for
# models that were trained to find more than pass keys.
ASKED = {"passkey": ("S1", "pass key found"), "multikey": ("multi-key", "one of four found")}


def shares(model, corpus, lengths, args):
    """The share of answers that a model finds: {field of ASKED: {length: share}}. The share is None past the
    last position that the model knows, and where the text has no room for the task."""
    asked = list(ASKED)[:2 if args.varied else 1]
    found = {field: dict.fromkeys(map(str, lengths)) for field in asked}
    for field, n in tqdm([*itertools.product(asked, lengths)], desc="recall   ", dynamic_ncols=True):
        task, _ = ASKED[field]
        if n <= model.config.limit() and has_room(task, n, corpus):
            slow = args.device == "cpu" and n > 16 * args.length    # minutes
            trials = max(1, args.trials // 4) if slow else args.trials
            found[field][str(n)] = recall(model, corpus, n, trials, task=task)[1].mean().item()
    return found


def evaluate(teacher, student, corpus, args):
    """The numbers of the report. Recall is asked for at 1 to 16 times the length of distillation, and of the
    student at 64 times. Past its training length the number of keys grows, and s_t corrects for it."""
    lengths = [n * args.length for n in (1, 2, 4, 16, 64)]
    teachers = shares(teacher, corpus, lengths[:4], args)
    students = shares(student, corpus, lengths, args)
    numbers = compare(teacher, student, corpus.held_out_batches(args.length, args.eval_windows))
    for field in students:
        numbers[field] = dict(teacher=teachers[field], student=students[field])
    return numbers


def percent(share):
    return "-" if share is None else f"{share:.0%}"


def print_report(r):
    width = max(10, len(f"{r['params']['student']:,}") + 1)

    def row(title, teacher, student):
        print(f"{title:34s}{teacher:>{width}s}{student:>{width}s}")
    n_layer = len(r["layers"])
    row("", "teacher", "student")
    row("layers", "A" * n_layer if n_layer + 2 <= width else "all A", f"  {r['layers']}")
    row("parameters", *(f"{r['params'][model]:,}" for model in ("teacher", "student")))
    row("held-out loss, nats a token", *(f"{r['val_loss'][model]:.4f}" for model in ("teacher", "student")))
    row("KL to the teacher, nats a token", "", f"{r['kl']:.4f}")
    row("same likeliest next token", "", f"{r['top1_agreement']:.1%}")
    for field, (_, title) in ASKED.items():
        for n, share in r[field]["student"].items() if field in r else ():
            row(f"{title} in {int(n):,} tokens", percent(r[field]["teacher"].get(n)), percent(share))
    peak = f", peak memory {r['peak_gb']:.1f} GB" if r["peak_gb"] else ""
    scaling = f"logit base {r['logit_base']:g}" if r["logit_base"] else "no logit scaling"
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes{peak}, {scaling}\n")


# ---- whole runs --------------------------------------------------------------------------------------------


def convert(run, teacher, corpus, plans, args):
    """Distil a teacher into a student; returns the student and its report."""
    torch.manual_seed(args.seed)                 # chunk embeddings and other new weights
    how = convert_progressive if "group" in plans else convert_staged
    student = how(run, teacher, corpus, plans, args).eval()
    student.config.logit_base = choose_logit_base(run, student, corpus, plans, args)
    report = run.once("report", lambda: dict(
        recipe=args.recipe, teacher=args.teacher, tokens=run.tokens, device=args.device, text=corpus.facts,
        layers=student.config.layers, logit_base=student.config.logit_base,
        params=dict(teacher=teacher.n_params(), student=student.n_params()),
        **evaluate(teacher, student, corpus, args), seconds=run.seconds(), peak_gb=peak_gb(args.device)))
    student.save_pretrained(run.folder)
    args.tokenizer.save(run.folder)
    write_json(run.path("report.json"), report)
    return student, report


def pretrain(run, corpus, plans, args):
    """Train a teacher, or with --layers a hybrid, from random weights; returns the model."""
    T = args.length
    config = replace(TEACHERS[args.teacher], max_len=T)
    if args.hybrid:
        config = student_config(config, choose_layers(args.layers, len(config.layers), keep=args.keep), args)
    torch.manual_seed(args.seed)
    model = HypeNet(config).to(args.device)
    for block in model.blocks:
        if getattr(block.mixer, "forget", None) is not None:
            nn.init.constant_(block.mixer.forget.bias, DECAYS[config.decay].bias(args.retention))
    train(run, "pretrain", plans["pretrain"], corpus, model, [list(model.parameters())],
          objective(model, None, args.kl, alpha=1.0))
    model.eval()
    if args.hybrid and args.logit_base == "fit":
        length = min(16 * T, config.limit())
        config.logit_base = cheapest(fit_logit_base(model, corpus, length, args.seed, args.varied))
    elif args.hybrid and args.logit_base != "none":
        config.logit_base = float(args.logit_base)
    args.tokenizer.save(run.folder)
    model.save_pretrained(run.folder, torch.bfloat16)     # last: a folder with this file is whole
    loss = losses(model, corpus.held_out_batches(T, args.eval_windows)).mean().item()
    found = shares(model, corpus, (T, 16 * T, 64 * T)[:3 if args.hybrid else 1], args)
    write_json(run.path("report.json"), dict(
        teacher=args.teacher, tokens=run.tokens, device=args.device, text=corpus.facts, layers=config.layers,
        params=model.n_params(), val_loss=loss, **found, seconds=run.seconds()))
    print(f"\n{model.n_params():,} parameters, held-out loss {loss:.4f} nats a token, "
          f"{run.seconds() / 60:.1f} minutes")
    for field, by_length in found.items():
        for n, share in by_length.items():
            print(f"{ASKED[field][1]} in {int(n):,} tokens {percent(share)}")
    print(f"python {'sample.py --model' if args.hybrid else 'halo.py --teacher'} {run.folder}")
    return model


# ---- command line ------------------------------------------------------------------------------------------


def get_args(argv):
    p = Parser(prog="halo.py", description=__doc__.split("\n\n")[0], epilog="eq. N: of arXiv 2601.22156")
    add = p.add_argument
    many = dict(nargs="+", action="extend")
    add("--teacher", default="tiny",
        help="tiny: shipped, 1M parameters. mini, small (3.5M, 14M), tiny-gpt2, small-gpt2: trained first, "
             "once, on a GPU. smollm2 (from pip), gpt2, gpt2-xl, Qwen/Qwen3-1.7B, another repository of the "
             "hub, or a .gguf file: by the paper's plan, on a GPU. A folder of a GPT-2, Llama or Qwen, or of "
             "--pretrain: by its size")
    add("--recipe", default="paper", choices=RECIPES, help="whose values the rows below take; default: paper")
    add("--out", help="folder of the run; default: out/TEACHER-RECIPE, then -2, -3, ...")
    add("--resume", metavar="RUN",
        help="go on with the run in this folder, by its own options; --device and --plain can be given too")
    add("--data", **many, metavar="PATH[:WEIGHT]",
        help="text to train on. stdlib: source of Python's standard library, the default. teacher: text that "
             "the teacher writes, the default of smollm2 and .gguf files. fineweb: fetched as needed, the "
             "default of other real teachers. Or files and folders: .txt, .jsonl, .parquet (field text), .gz "
             "of the first two, .bin (llm.c's shards of GPT-2 tokens; val in the name: held out). Weights: "
             "shares of sequences: web/:0.7 books/:0.3")
    add("--device", help=f"cuda, mps or cpu; default here: {default_device()}")
    add("--micro", type=number(int, 1), metavar="N", help="sequences that go through the models at once, at "
        "most; default: as many as fit, up to 131,072 tokens")
    add("--plain", action="store_true", help="on a GPU, neither compile operations nor record steps")
    add("--dry-run", action="store_true", help="print the plan, on a GPU with memory and time, then end")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N", help="of all random choices")
    add("--budget", type=number(float, 1e-6), default=1.0, metavar="X", help="multiply all tokens by X")
    add("--plan", **many, default=[], metavar="STAGE.FIELD=X",
        help="change entries of the plan, such as distil.tokens=4e6 or align.lr=1e-3")
    add("--pretrain", action="store_true",
        help=f"train a teacher ({', '.join(TEACHERS)}) from random weights; with --layers a hybrid")
    add = p.add_argument_group("rows of the recipe").add_argument
    for name, paper, article, allowed, text in ROWS:
        check = dict(choices=allowed) if isinstance(allowed, tuple) else dict(type=allowed, metavar="X")
        add("--" + name.replace("_", "-"), **check, help=f"{text} (paper: {paper}; article: {article})")
    add = p.add_argument_group("finer choices").add_argument
    add("--keep", type=number(int, 1), metavar="N",
        help="how many layers stay attention, with --layers swap, guarded, score, even; default: a quarter")
    add("--groups", type=number(int, 0), default=0, metavar="N",
        help="groups of linear layers in a progressive run; default: one per 6 layers, at least 2")
    add("--transfer", choices=("on", "off"), default="on",
        help="linear layers start from the weights of attention layers (on) or random (off)")
    add("--retention", type=number(float, 0.001, 0.999), default=0.7, metavar="X",
        help="share of the state that a new forget gate keeps at each token; default: 0.7")
    add("--max-ctx", type=number(int, 1), default=65536 + 1024, metavar="N",
        help="positions that a chunk HyPE model knows, for context and answer together")
    add("--trials", type=number(int, 1), default=20, metavar="N",
        help="questions asked at each length; at 64 times the length on a CPU a quarter; default: 20")
    add("--eval-windows", type=number(int, 2), default=256, metavar="N",
        help="held-out sequences that losses are measured on; default: 256")
    add("--set", **many, default=[], metavar="FIELD=X",
        help="set fields of the student's HypeNetConfig, such as linear_rope=false")
    args = p.parse_args(argv)
    args.given = sorted({a.split("=")[0] for a in argv if a.startswith("--")})
    return args


def settle(args):
    """Fill in what the options leave open. Returns the plans of the stages to come; ValueError for options
    that do not go together."""
    args.hybrid = args.layers is not None         # whether --pretrain trains a hybrid
    free = args.device or args.dry_run or args.resume              # a CPU will do
    args.device = default_device(args.device)
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.path = teacher_path(args.teacher)
    weight = sum(file.stat().st_size for file in Path(args.path).glob("*.safetensors"))
    if args.teacher in TEACHERS:
        size = args.teacher.split("-")[0]
    else:
        fitting = [name for name, least in SIZES.items() if weight >= least]
        size = fitting[-1] if os.path.isdir(args.path) else "real"
    local = args.teacher == "smollm2" or args.teacher.endswith(".gguf")       # for whoever lacks the hub
    if size == "real" and not args.data:
        args.data = ["teacher" if local else "fineweb"]
    args.fused = size != "tiny" and args.device.startswith("cuda") and not args.plain
    names = [field.name for field in fields(HypeNetConfig)]
    known = [name for name in names[names.index("attn_position"):] if name != "logit_base"]
    args.changes = read_set(args.set, known)                       # fields of a student alone
    plans = {stage: replace(plan, tokens=plan.tokens * args.budget) for stage, plan in PLANS[size].items()}
    change_plans(plans, args.plan)
    check_options(args, plans)
    made = args.teacher in TEACHERS and (args.pretrain or not weight)      # the teacher is trained here
    stages = ["align", "distil", "finetune"] if args.training == "staged" else ["group"]
    stages = ["pretrain"] if args.pretrain else stages
    if args.device == "cpu" and not free and (made or size in ("small", "real")):
        now = ["pretrain"] * (made and not args.pretrain) + stages
        check_hours(args, size, weight, sum(plans[stage].total for stage in now))
    args.varied = plans["distil" if "distil" in stages else stages[0]].varied
    return {stage: plans[stage] for stage in stages}


def teacher_path(name):
    """The folder of a teacher of TEACHERS, shipped or to be made; any other name as it is."""
    if name not in TEACHERS:
        return name
    shipped = os.path.join(HERE, "assets", f"{name}-teacher")
    return shipped if os.path.isdir(shipped) else os.path.join("out", f"{name}-teacher")


def check_options(args, plans):
    """ValueError for options that do not go together."""
    layers = args.layers
    scored = layers in SCORED
    staged = args.training == "staged"
    try:
        possible = args.logit_base in ("fit", "none") or 1 < float(args.logit_base) < math.inf
    except ValueError:
        possible = False
    rows = [(not possible, f"--logit-base {args.logit_base}: give fit, none or a number above 1")]
    for flag, possible, wants in (
            ("--groups", not staged, "--training progressive"),
            ("--retention", DECAYS[args.decay].width(1) > 0, "a --decay by gates, such as head or channel"),
            ("--max-ctx", args.pe == "chunk", "--pe chunk"),
            ("--kl", args.alpha < 1, "--alpha below 1"),
            ("--keep", scored or layers == "even", f"--layers {', '.join(SCORED)} or even")):
        rows.append((flag in args.given and not possible, f"{flag} goes with {wants}"))
    for p in plans.values():
        positive = min(p.tokens, p.length, p.batch, p.lr, p.warmup) > 0
        others = 0 <= p.recall <= 1 and 0 <= p.varied <= 1 and min(p.weight_decay, p.lr_end) >= 0
        finite = all(map(math.isfinite, vars(p).values()))
        rows += [(not (positive and others and finite),
                  "--plan: tokens, length, batch, lr and warmup must be positive, recall and varied between "
                  "0 and 1, lr_end and weight_decay at least 0"),
                 (p.varied and not p.recall,
                  "--plan: varied is a share of the sequences of recall, which are 0")]
    if args.pretrain:
        rows += [(args.teacher not in TEACHERS,
                  f"--pretrain --teacher {args.teacher}: known sizes are {', '.join(TEACHERS)}"),
                 (args.hybrid and scored,
                  f"--pretrain with --layers {layers}: no teacher to score; use ends, even or letters"),
                 ((args.set or args.keep) and not args.hybrid,
                  "--pretrain --set and --keep go with --layers: a hybrid"),
                 (args.transfer == "off", "--transfer off goes with a teacher, not with --pretrain")]
        rows += [(flag in args.given, f"{flag} goes with a teacher, not with --pretrain")
                 for flag in ("--alpha", "--kl", "--groups")]
    else:
        rows += [(not staged and scored,
                  f"--training progressive with --layers {layers}: no stage 1 to score by; use ends or even"),
                 (not staged and args.pe == "hype",
                  "--training progressive with --pe hype: its attention does not train; use chunk or rope")]
    refuse(rows)


def check_hours(args, size, weight, tokens):
    """Refuse what takes hours on a CPU that nobody asked for."""
    refuse([(size == "real", f"--teacher {args.teacher} is no folder of a small model, and wants a GPU; "
             "--teacher tiny runs on a CPU, --device cpu tries it all the same")])
    with torch.device("meta"):
        params = weight / 2 or HypeNet(TEACHERS[args.teacher]).n_params()
    raise ValueError(f"--teacher {args.teacher} wants a GPU: about {cpu_hours(params, tokens):,.1f} hours on "
                     "this CPU; --teacher tiny takes minutes, --device cpu tries it all the same")


def check_layers(how, n_layer, keep):
    letters = bool(how) and set(how) <= set("AL")
    refuse([(not letters and how not in (*SCORED, "even", "ends"),
             f"--layers {how}: give {', '.join(SCORED)}, even, ends, or a letter A or L for each layer"),
            (letters and len(how) != n_layer,
             f"--layers {how} names {len(how)} layers; the teacher has {n_layer}"),
            (keep and keep >= n_layer, f"--keep {keep} leaves no linear layer: there are {n_layer} layers")])


def check_stage_length(stage, plan, limit, args):
    """ValueError if a stage's sequences are longer than its models know, or too short for a pass key."""
    chunks = f" (--max-ctx {args.max_ctx})" if args.pe == "chunk" else ""
    refuse([(plan.length > limit,
             f"--plan {stage}.length={plan.length}: the model knows {limit} positions{chunks}")])
    if plan.recall:
        try:
            plant(args.tokenizer, np.zeros(plan.length, np.int64), np.random.default_rng(0))
        except ValueError as e:
            raise ValueError(f"--plan {stage}.length: {e}, or {stage}.recall=0") from None


def load_teacher(plans, args):
    """The teacher. What is wrong is found here, before stage 1. Sets args.tokenizer, and args.length: all is
    measured at the distillation length and its multiples. A RoPE teacher's maximum is too long to test."""
    args.tokenizer = Tokenizer.load(args.path)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    teacher = pretrained.load(args.path, dtype, args.device).requires_grad_(False)
    check_tokenizer(args.tokenizer, teacher.config)
    config = teacher.config
    n_layer = len(config.layers)
    check_layers(args.layers, n_layer, args.keep)
    student = student_config(config, "L" * n_layer, args)
    refuse([("L" in config.layers, f"--teacher {args.teacher} is a hybrid, {config.layers}: not a teacher"),
            (args.layers not in SCORED and "L" not in choose_layers(args.layers, n_layer, keep=args.keep),
             f"--layers {args.layers} leaves nothing to convert"),
            (student.key_dim > config.head_dim or student.linear_kv_head % config.n_kv_head,
             f"--set: key_dim is at most the teacher's head_dim, {config.head_dim}, and linear_kv_head a "
             f"multiple of its n_kv_head, {config.n_kv_head}")])
    both = min(config.limit(), student.limit())
    for stage, plan in plans.items():
        limit = dict(align=config.limit(), finetune=student.limit()).get(stage, both)
        check_stage_length(stage, plan, limit, args)
    args.length = min(config.max_len, plans["group" if "group" in plans else "distil"].length)
    plant(args.tokenizer, np.zeros(args.length, np.int64), np.random.default_rng(0))
    return teacher


def make_teacher(args):
    """Pretrain a teacher that is not there yet, or go on with it, and keep it for later runs."""
    argv = teacher_argv(args)
    if "--resume" in argv and args.dry_run:
        print(f"--teacher {args.teacher} is half trained: --resume {args.path} goes on with it, as does "
              "this run")
        return
    print(f"--teacher {args.teacher} is trained first, once, in {args.path}; its conversion follows\n",
          flush=True)
    run_main(argv)
    print()


def resumed(args, argv):
    """The options of a run that was stopped. Only the device can change, and --plain be added."""
    free = "--resume", "--device", "--plain"
    given = [a for a in argv if a.startswith("--") and a.split("=")[0] not in free]
    refuse([(given, f"--resume takes its options from the run; leave out {' '.join(given)}")])
    options = vars(get_args([])) | options_of(args.resume)
    options["resume"] = args.resume
    options["device"] = args.device or options["device"]
    options["plain"] = args.plain or options["plain"]
    return argparse.Namespace(**options)


def probe(teacher, corpus, plans, args):
    """What the stages cost on this device, see Probe.found; ValueError if they do not fit."""
    layers = "even" if args.layers in SCORED else args.layers      # nothing is selected, so any will do
    args = argparse.Namespace(**vars(args) | dict(layers=layers))
    run = Probe(vars(args), args.tokenizer.n_vocab)
    how = convert_progressive if "group" in plans else convert_staged
    try:
        how(run, teacher, corpus, plans, args)
    except torch.OutOfMemoryError:
        way_out = "more --groups" if "group" in plans else "--recipe article, which trains groups of layers,"
        raise ValueError(f"weights, gradients and optimizer state exceed the memory of {args.device}; give "
                         f"{way_out} or a smaller --teacher") from None
    return run.found


def disk_gb(teacher, plans, args):
    """GB that a run writes: two checkpoints (the old one stays until the new one is written), the student
    and, in a progressive run, a model for each group."""
    n_groups = 0
    if "group" in plans:
        layers = choose_layers(args.layers, len(teacher.config.layers), keep=args.keep)
        n_groups = len(groups_of(layers, args.groups))
    return (28 / max(1, n_groups) + 4 * (1 + n_groups)) * teacher.n_params() / 1e9


def run_main(argv):
    args = get_args(argv)
    if args.resume:
        args = resumed(args, argv)
    options = dict(vars(args))
    plans = settle(args)
    if not args.pretrain and args.teacher in TEACHERS and not list(Path(args.path).glob("*.safetensors")):
        make_teacher(args)
        if args.dry_run:
            return
    fast.fuse((globals(), "relative_error"), backend="inductor" if args.fused else None)
    name = os.path.basename(os.path.normpath(args.teacher))
    folder = args.resume or new_folder(args.out, os.path.join("out", f"{name}-{args.recipe}"))
    if args.pretrain:
        teacher = None
        config = TEACHERS[args.teacher]
        args.tokenizer = Tokenizer.bytes()
        args.length = plans["pretrain"].length
        check_stage_length("pretrain", plans["pretrain"], math.inf, args)
        if args.hybrid:
            check_layers(args.layers, len(config.layers), args.keep)
        longest = args.length * (64 if args.hybrid else 1) + 1
    else:
        teacher = load_teacher(plans, args)
        config = teacher.config
        longest = 64 * args.length
        if args.logit_base == "fit":
            longest = max(longest, fit_length(plans, args.length) + 1)
        known = student_config(config, "L" * len(config.layers), args).limit()
        longest = max(min(longest, known + 1), min(16 * args.length, config.limit()))   # student's, teacher's
        if not args.resume:
            check_disk(folder, disk_gb(teacher, plans, args))
    n_tokens = max(20 * longest, sum(plan.total for plan in plans.values()))

    def write(share):                                              # for --data teacher
        return teacher_text(teacher, args.path, args.tokenizer, share * n_tokens, args.seed, args.dry_run)
    cell = max(plan.length for plan in plans.values())
    corpus = Corpus(args.tokenizer, args.data, args.seed, cell, write=teacher and write)
    corpus.windows(np.random.default_rng(0), 1, longest)           # too little text is an error now
    found = {}
    if args.device.startswith("cuda") and not args.resume and not args.pretrain:
        found = probe(teacher, corpus, plans, args)
        torch.cuda.reset_peak_memory_stats(args.device)
    print(f"teacher {args.teacher}: {len(config.layers)} layers, trained at {config.max_len} tokens | "
          f"recipe {args.recipe} | device {args.device} | run {folder}")
    print_plan(corpus, plans, found)
    if not args.dry_run:
        execute(folder, options, teacher, corpus, plans, args)


def execute(folder, options, teacher, corpus, plans, args):
    """The run itself: pretraining, or a conversion and its report."""
    run = Run(folder, options)
    stages = {stage: vars(plan) for stage, plan in plans.items()}
    try:
        refuse([(run.once("text", lambda: corpus.facts)["sha256"] != corpus.facts["sha256"],
                 f"--resume {args.resume}: the text has changed since it began; start a new run"),
                (run.once("plans", lambda: stages) != stages,
                 f"--resume {args.resume}: its stages are not this version's; start a new run")])
        if args.pretrain:
            pretrain(run, corpus, plans, args)
        else:
            print_report(convert(run, teacher, corpus, plans, args)[1])
            print(f"files in {run.folder}: model.safetensors, config.json, tokenizer.json, report.json, "
                  f"log.jsonl\n\npython sample.py --model {run.folder} --ctx 65536")
    finally:
        run.close()


def main(argv=None):
    def run(argv):
        try:
            run_main(argv)
        except torch.OutOfMemoryError:                             # outside of training, see within_memory
            raise ValueError("the device ran out of memory: take a smaller --teacher or another --device"
                             ) from None
    command_line("halo.py", run, argv)


if __name__ == "__main__":
    main()
