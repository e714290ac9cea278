"""HALO: distil a pretrained Transformer into a HypeNet (hypenet.py), a model that reads long texts cheaply.

    python halo.py                             convert the tiny teacher on a laptop CPU, offline, in minutes
    python halo.py --recipe article            the article's recipe in place of the paper's
    python halo.py --resume out/tiny-paper     go on with a run that was stopped
    python halo.py --teacher small             train and convert a teacher of 14M parameters, on one GPU
    python halo.py --pretrain --out teacher    train the tiny teacher anew, on one GPU
    torchrun --nproc_per_node=4 halo.py ...    any of these on 4 GPUs, with the same losses as on one

The paper's recipe (arXiv 2601.22156, section 4) has six steps. align, distil and finetune are training: the
paper calls them stage 1, 2 and 3, and all three share the loop `train`. align, select and finetune are
functions. transfer is make_twins, fit is choose_logit_base, and distil is a line of convert_staged.

    step      what trains              what it reads                    what it learns, or what comes out
    transfer  nothing                  one batch of text                a linear twin of each attention layer
    align     each twin, alone         what its attention layer reads   what that layer writes (eq. 7)
    select    nothing                  held-out text                    which layers stay attention (eq. 8, 9)
    distil    the whole hybrid         text                             the teacher's predictions (eq. 10)
    finetune  the whole hybrid         longer text                      the next token
    fit       nothing                  held-out text, longer still      the base a of s_t (eq. 11)

The student reads further than its teacher for four reasons. Attention without positions ignores distance.
Decay bounds the numbers in a linear state. Stage 3 trains on long texts. At generation s_t keeps attention
sharp. Real teachers have the recipe `real`, the paper's with three changes (see ROWS), and another plan.

The article's recipe is progressive. It turns attention layers into linear layers, group by group. Only the
mixers of the newest group and the chunk embeddings train, on alpha CE + (1 - alpha) KL(student, teacher).

Map of the file:
    read first      recipes and plans, transfer, losses, the training loop, the paper's stages
    read second     the article's conversion, the logit base, a conversion from start to end
    elsewhere       what is measured: support/report.py. The command line: support/options.py. Several GPUs:
                    support/world.py

Deviations from the paper in this file, and what each buys (README.md has more):
    transfer  Least squares scales each input channel of W_o. So a twin starts near its attention layer.
    align     A layer's error is divided by its target's mean square. All layers then learn at one pace.
    select    `swap` compares a linear layer with attention without positions. `--layers score` is eq. 8.
    select    Recall is a log-probability, not an accuracy. It tells layers apart before any answer is right.
    gates     A learned gate at first remembers as far back as its attention head looks. So stage 1 ends at a
              lower loss.
    distil    The loss can also compare each block's output with the teacher's (--hidden). The same number of
              tokens then gives a lower KL. Real teachers get longer sequences, for multi-key.
    finetune  A part of each long row is read as short texts, and the teacher is their target. Long texts
              alone pull the student away from what the teacher knows.
    data      Many rows ask for something to recall. Plain text teaches recall too slowly.

Batches depend on (seed, stage, step), initial weights on the seed. On one CPU a run repeats bit for bit, and
a stopped run, if resumed, ends like one that never stopped. The folder of a run holds log.jsonl (one line per
step), one checkpoint per stage, run.json, report.json, and the student: config.json, model.safetensors,
tokenizer.json.
"""
import math
import os
import sys
from dataclasses import dataclass, replace

from support.early import prepare

prepare(__name__)                                # before torch is imported

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from hypenet import (
    DECAYS, FAMILIES, Attention, Block, HypeNet, HypeNetConfig, LinearAttention, Weightless, locate)
from support import options, shard, world
from support.common import number
from support.loss import loss_and_gradient
from support.recall import recall, training_rows
from support.report import losses, print_scores, save_usable
from support.run import beside, bf16, loss_by_slices

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- recipes and plans -------------------------------------------------------------------------------------

SCORED = ("swap", "both", "guarded", "score")       # ways to choose layers that first measure each layer
TOO_MUCH = 1.0                                      # nats; see `guarded` in choose_layers

# A recipe is a column of this table, and every row is a flag: an ablation is one flag. `real` is the paper's
# recipe but for three rows: both forms of a layer train before the choice, each head learns its own gate, and
# the loss also compares hidden states.
ROWS = (  # flag, its value in each of RECIPES, allowed values, help
    ("layers", ("swap", "ends", "both"), str,
     "the layers that stay attention. swap: those that lose most as linear layers, compared with attention "
     "without positions. both: the same, but stage 1 trains that attention too. score: eq. 8. guarded: eq. 8 "
     "with two safeguards. even: evenly spaced. ends: the first and the last quarter. Or letters, "
     "one per layer, such as LLALLLAL"),
    ("decay", ("constant", "channel", "head"), tuple(DECAYS),
     "what linear layers forget. constant: eq. 19. none: nothing. head, channel: a learned gate for each "
     "head or key channel"),
    ("retention", (None, 0.7, None), number(float, 0.001, 0.999),
     "share of the state that a new forget gate keeps at each token. None: for each head as much as its "
     "attention head looks back"),
    ("state", ("full", "half", "full"), ("full", "half"),
     "width of a key in linear layers: the teacher's, or half"),
    ("pe", ("hype", "chunk", "hype"), ("hype", "chunk", "rope"),
     "positions. hype: RoPE in linear layers, none in attention. chunk: the article's. rope: RoPE in both"),
    ("extras", ("on", "off", "on"), ("on", "off"),
     "QK-norm and output norm in linear layers, output gates in all"),
    ("training", ("staged", "progressive", "staged"), ("staged", "progressive"),
     "staged: align, select, distil, finetune. progressive: groups of layers, one after the other"),
    ("kl", ("forward", "reverse", "forward"), ("forward", "reverse"),
     "forward: KL(teacher, student). reverse: KL(student, teacher)"),
    ("alpha", (0.0, 0.5, 0.0), number(float, 0, 1), "share of cross-entropy in the loss, 0 to 1"),
    ("hidden", (0.0, 0.0, 1.0), number(float, 0),
     "weight of a second loss, where the teacher is the target: the squared error of each block's output, "
     "divided by the mean square of the teacher's output. 0: off"),
    ("window", (0, 2048, 0), number(int, 0),
     "each token attends to the last N tokens, itself included; 0: all"),
    ("logit_base", ("fit", "none", "fit"), str, "a of s_t (eq. 11): fit, none, or a number above 1"),
)
RECIPES = {name: {row[0]: row[1][i] for row in ROWS} for i, name in enumerate(("paper", "article", "real"))}


@dataclass
class Plan:
    """Data and learning rate of one stage. The rate is a warm-up times a cosine from lr to lr_end."""
    tokens: float                    # in all; of "group", for all groups together
    length: int                      # tokens of a sequence
    batch: int                       # sequences of a step
    lr: float
    lr_end: float
    recall: float = 0.5              # share of sequences that ask for something to recall
    chats: float = 0.0               # of these, the share of chats: the teacher's question after a long text
    varied: float = 0.0              # of those that are no chats, the share whose task is not a pass key
    short: float = 0.0               # share of each sequence of stage 3 that is read as short texts: finetune
    warmup: int = 50                 # steps, at most a tenth of all
    weight_decay: float = 0.0        # of matrices; the paper has none (appendix B)

    @property
    def steps(self):
        return max(1, round(self.tokens / (self.length * self.batch)))

    @property
    def total(self):
        """The tokens that all steps read: `tokens` rounded to whole steps."""
        return self.steps * self.length * self.batch

    def rate(self, step):
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / min(self.warmup, max(1, self.steps // 10)))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return warm * (self.lr_end + (self.lr - self.lr_end) * cosine)


# Each conversion fits a budget; pretraining takes longer. tiny: 5 minutes on a laptop CPU. mini, for
# ablations: 1 minute on a GPU. small: 2 minutes on a GPU. Sequences of stage 3 are 4 times (tiny) or 32 times
# as long as those of stage 1: see finetune. Pretraining of mini and small repeats the text over ten
# times, and so has weight decay.
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
    # The paper's Table 5, for 1.7B parameters; options.scale fits it to smaller teachers. Stage 2 has fewer
    # and longer sequences than the table's 96 of 512 tokens: multi-key gains. No sequence hides a pass key.
    # In stages 1 to 3 half of them ask for values after words of the text, or repeat passages. In stages 2
    # and 3 a quarter of that half are chats: a question after a long text, if the teacher wrote some. In
    # stage 3 the teacher is the target in a quarter of each sequence (see finetune).
    "real": dict(
        align=Plan(tokens=320e6, length=512, batch=32, lr=1e-3, lr_end=1e-5, varied=1),
        distil=Plan(tokens=1e9, length=2048, batch=24, lr=1e-4, lr_end=1e-5, varied=1, chats=0.25),
        finetune=Plan(tokens=1e9, length=16384, batch=128, lr=1e-5, lr_end=1e-5, varied=1, chats=0.25,
                      short=0.25),
        group=Plan(tokens=2.3e9, length=1024, batch=2048, lr=1e-5, lr_end=1e-5, recall=0)),   # the article's
}

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
    chunk = min(2048, teacher.max_len // 4) if args.pe == "chunk" else None    # training meets several chunks
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
    config |= args.changes                                         # fields given by --set
    narrow = config["key_dim"] in range(1, teacher.head_dim)       # then q and k hold the norm's gain already
    config.setdefault("linear_qk_norm", extras and not narrow)
    return replace(teacher, **config)


@torch.no_grad()
def linear_twin(attn, config, x, where, retention=None, transfer=True):
    """A linear layer out of an attention layer. The weights are the same; KV heads are cloned (paper eq. 13),
    or q and k made narrow (low_rank_keys). A new forget gate starts with one value for all tokens:
    `retention`, or, if that is None, what lets the head remember as far back as its attention looks
    (lookback). Least squares on one batch x (B,T,C) of the layer's inputs then scales each input channel of
    W_o. transfer False: PyTorch's random weights; only the gate is set."""
    old = attn.config
    twin = LinearAttention(config).to(x.device)
    if twin.forget is not None:
        share = lookback(attn, x, where) if retention is None else torch.full((old.n_head,), retention)
        nn.init.zeros_(twin.forget.weight)
        twin.forget.bias.view(old.n_head, -1).copy_(DECAYS[config.decay].bias(share)[:, None])
    if not transfer:
        return twin
    q, k, v, _ = with_bias(attn.qkvz).split(attn.sizes)
    clones = config.linear_kv_head // old.n_kv_head
    v = clone_heads(v, old.n_kv_head, clones)
    if config.key_dim < config.head_dim:
        q, k = low_rank_keys(attn, x, config.key_dim)              # one head of k for each query head
        group = config.n_head // config.linear_kv_head             # if heads share a k: the first one's
        k = k.unflatten(0, (config.n_head, -1))[::group].flatten(0, 1)
    else:
        k = clone_heads(k, old.n_kv_head, clones)
    fill(twin.qkvz, torch.cat((q, k, v)))
    fill(twin.out, with_bias(attn.out))
    if config.linear_qk_norm and old.qk_norm and config.key_dim == config.head_dim:
        twin.q_norm.load_state_dict(attn.q_norm.state_dict())
        twin.k_norm.load_state_dict(attn.k_norm.state_dict())
    target = attn.mix(x, where).float()                            # (B,T,H*D): attention's input to W_o
    o = twin.mix(x, where).float()                                 # (B,T,H*D): the twin's
    scale = (target * o).sum((0, 1)) / (o * o).sum((0, 1)).clamp(min=1e-12)   # least |target - scale * o|^2
    twin.out.weight *= scale
    return twin


def lookback(attn, x, where):
    """The share gamma (H,) of its state that each head keeps per token, so that the head remembers as far
    back as its attention head looks. A token d back is read with weight gamma^d, so the mean d is
    gamma / (1 - gamma). d is measured on about 2,048 tokens of x (B,T,C): its first rows, or the start of one
    long row. The mean is the geometric mean of 1 + d, less 1. A plain mean would be ruled by the first token,
    on which many heads rest when they find nothing. gamma is kept between 0.3 and 0.999."""
    most = 2 ** 11
    rows = max(1, most // x.size(1))
    q, k, *_ = attn.project(x[:rows], where)                       # (B,T,H,D), (B,T,H_kv,D)
    q, k = q[:, :most], k[:, :most]
    T = q.size(1)
    k = k.repeat_interleave(q.size(2) // k.size(2), 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).float() / q.size(-1) ** 0.5
    i = torch.arange(T, device=x.device)
    back = i[:, None] - i                                          # (T,T): how far j is before i
    weights = scores.masked_fill(back < 0, -math.inf).softmax(-1)
    d = (weights * back.clamp(min=0).float().log1p()).sum(-1).mean((0, 2)).expm1()           # (H,)
    return (d / (1 + d)).clamp(0.3, 0.999)


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
    For a head, q_i . k_j = [x_i, 1] A_q^T A_k [x_j, 1]^T with A = diag(gain / rms) [W, bias]. The best
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
    """Copy rows into a Linear; their last column is the bias. The Linear's other rows, a gate's, become 0."""
    n = len(rows)
    linear.weight[:n] = rows[:, :-1]
    linear.weight[n:] = 0
    if linear.bias is not None:
        linear.bias[:n] = rows[:, -1]
        linear.bias[n:] = 0


@torch.no_grad()
def teacher_layers(teacher, config, idx):
    """Run a teacher on idx (B,T). Yield for every layer what its twins need: the attention layer, its input x
    (B,T,C) after the norm, where the tokens stand, its output y (B,T,C), and its input without learned
    positions (B,T,C). Attention uses the teacher's positions; linear twins use RoPE as config says."""
    with_positions = replace(config, attn_position=True, chunk=None, n_chunks=0)
    where = locate(with_positions, torch.arange(idx.size(1), device=idx.device)[None])
    wpe = getattr(teacher, "wpe", None)
    h = teacher.embed(idx, where)
    for block in teacher.blocks:
        x = block.norm1(h)
        y = block.mixer(x, where)
        bare = x if wpe is None else block.norm1(h - wpe(where.pos))
        yield block.mixer, x, where, y, bare
        h = h + y
        h = h + block.mlp(block.norm2(h))


def make_twins(teacher, config, corpus, plan, args):
    """A linear twin of every attention layer, and the mean square of every layer's output, both from one
    batch of at most 2^14 tokens."""
    batch = min(plan.batch, max(1, 2 ** 14 // plan.length))
    rows_of = training_rows(corpus, "transfer", replace(plan, batch=batch))
    rows = torch.from_numpy(rows_of(0)).to(args.device)            # of step 0
    twins = nn.ModuleList()
    squares = []
    with bf16():
        for attn, x, where, y, _ in teacher_layers(teacher, config, rows[:, :-1]):
            twins.append(linear_twin(attn, config, x, where, args.retention, args.transfer == "on"))
            squares.append(y.float().square().mean())
    return twins, squares


def assemble(source, config, mixers):
    """A model with this config and these mixers. All else is copied from the source, a teacher or student."""
    with torch.device(source.wte.weight.device):
        model = HypeNet(replace(config))                           # all layers will share this copy
    shared = {name: w for name, w in source.state_dict().items() if ".mixer." not in name}
    missing = model.load_state_dict(shared, strict=False).missing_keys
    assert all(".mixer." in name or "chunk_embd" in name for name in missing), f"not transferred: {missing}"
    for block, mixer in zip(model.blocks, mixers):
        block.mixer = mixer
        mixer.config = model.config
    return model


# ---- losses ------------------------------------------------------------------------------------------------


def distil_loss(student, teacher, idx, targets, kl, alpha, hidden=0.0, offset=None, slice_elements=None):
    """alpha CE + (1 - alpha) KL + hidden E, means over all tokens. kl "forward": KL(teacher, student), paper
    eq. 10; "reverse": KL(student, teacher), the article's. E is the squared error of a block's output,
    divided by the mean square of the teacher's, per token; then a mean over tokens and blocks. With alpha 1
    there is no E, and the teacher may be None. The logits of all tokens would not fit memory, so the head
    runs on slices of tokens, of about slice_elements logits."""
    all_blocks = hidden > 0 and alpha < 1

    def outputs(model, offset=None):
        """The output of each block, if E needs it, and what the head reads: a list of (B,T,C)."""
        x = model.hidden(idx, offset=offset, all_blocks=all_blocks)
        return x if all_blocks else [x]

    def of_slice(logits_s, y, *xt):                                               # (n,V), (n,), (n,C)
        logits_t = teacher.head(*xt) if xt else None
        return loss_and_gradient(sum_of_losses, logits_s, logits_t, y, kl, alpha)

    def of_student():
        return outputs(student, offset)

    @torch.no_grad()
    def of_teacher():
        return outputs(teacher)
    found = [of_student()] if alpha == 1 else beside(idx, of_student, of_teacher)
    xs, *xt = [x[-1].flatten(0, 1) for x in found]                                # (N,C)
    y = targets.flatten()
    loss = loss_by_slices(of_slice, student.head_weight(), xs, y, *xt, elements=slice_elements) / len(y)
    if all_blocks:
        blocks_s, blocks_t = (x[:-1] for x in found)
        loss = loss + hidden * sum(map(relative_error, blocks_s, blocks_t)) / len(blocks_s)
    return loss


def relative_error(out, target, square=None):
    """The mean squared error of a layer's output, divided by `square`. Without `square` the error of each
    token is divided by the mean square of its target, because a few tokens have very large states."""
    error = (out.float() - target.float()).square()
    if square is None:
        return (error.mean(-1) / target.float().square().mean(-1)).mean()
    return error.mean() / square


def sum_of_losses(logits_s, logits_t, targets, kl, alpha):
    """Sum over tokens of alpha CE + (1 - alpha) KL, from logits (n,V) of student and teacher (None: CE)."""
    log_s = logits_s.float().log_softmax(-1)
    loss = 0.0
    if alpha:
        loss = alpha * F.nll_loss(log_s, targets, reduction="sum")
    if logits_t is not None:
        log_t = logits_t.float().log_softmax(-1)
        log_p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
        loss = loss + (1 - alpha) * F.kl_div(log_q, log_p, reduction="sum", log_target=True)   # KL(p, q)
    return loss


def objective(student, teacher, kl, alpha, hidden=0.0):
    """The loss function of a stage, for `train`: it yields one term. With --pe chunk, each sequence starts at
    another position, its offset, so that every chunk embedding is trained. A hash of the ids picks the
    offset, because a CUDA graph cannot call the host's random generator."""
    def loss_fn(idx, targets):
        c = student.config
        T = idx.size(1)
        offset = None
        if c.chunk:
            hashes = (idx * torch.arange(1, T + 1, device=idx.device) ** 2).sum(1)
            offset = hashes % (max(0, c.limit() - T) + 1)
        yield distil_loss(student, teacher, idx, targets, kl, alpha, hidden, offset)
    return loss_fn


# ---- the training loop -------------------------------------------------------------------------------------


def train(run, stage, plan, corpus, module, groups, loss_fn):
    """The one training loop (paper appendix B). groups are lists of the module's parameters: they train, and
    each list is clipped to a gradient norm of 1 by itself. loss_fn(idx, targets) yields terms of the loss,
    one by one; their sum is the loss. `run` keeps log and checkpoints, so a stopped stage can be resumed."""
    only_train(module, groups)
    groups, make_whole = shard.share(module, groups)               # if they are too large for one GPU
    params = [p for group in groups for p in group]
    matrices = [p for p in params if p.dim() > 1]
    vectors = [p for p in params if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=plan.weight_decay),
                                   dict(params=vectors, weight_decay=0.0)],
                                  lr=plan.lr, betas=(0.9, 0.95), fused=True)

    def gradients(rows, at_once):
        optimizer.zero_grad()
        return backward(loss_fn, rows, at_once)

    progress = run.stage(stage, plan, module, optimizer, gradients)
    for step, rows in progress.steps(corpus, training_rows):
        loss = progress.compute(rows)                              # calls gradients, sums them over all GPUs
        norms = [nn.utils.clip_grad_norm_(group, 1.0) for group in groups]
        loss, norm = progress.finite(loss, torch.stack(norms).max())            # ValueError if one is not
        lr = progress.rate(step)                                   # plan.rate(step); 0 in a trial (run.Probe)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        optimizer.step()
        progress.done(step, loss, norm, lr)
    optimizer.state.clear()                                        # frees its memory
    module.requires_grad_(False).zero_grad()
    make_whole()


def only_train(module, groups):
    """Let the parameters of the groups train, and freeze all others of module. On a GPU, trained parameters
    are float32 and frozen ones bfloat16."""
    trained = {id(p) for group in groups for p in group}
    for p in module.parameters():
        p.requires_grad_(id(p) in trained)
        if p.device.type == "cuda":
            p.data = p.data.to(torch.float32 if p.requires_grad else torch.bfloat16)


def backward(loss_fn, rows, at_once):
    """Add up the gradients of the mean loss over rows (batch, length + 1), at_once rows at a time, and return
    this loss. Each term of the loss is backpropagated as it comes, so memory holds the graph of one term
    alone. With several GPUs each does this for its share of the rows, and the caller sums the results."""
    def forward(terms):
        with bf16():                                               # next() runs the forward pass of a term
            return next(terms, None)
    total = torch.zeros((), device=rows.device)
    for part in world.parts(rows, at_once):
        terms = loss_fn(part[:, :-1], part[:, 1:])
        while (term := forward(terms)) is not None:
            term = term * (len(part) / len(rows))
            term.backward()
            total = total + term.detach()
    return total


# ---- the paper's stages ------------------------------------------------------------------------------------


def convert_staged(run, teacher, corpus, plans, args):
    """The paper's HALO: align, select, distil, finetune. Returns the student."""
    config = student_config(teacher.config, "L" * len(teacher.config.layers), args)    # all layers get a twin
    twins, kept = align(run, teacher, config, corpus, plans["align"], args)
    layers = select(run, teacher, twins, kept, config, corpus, args)
    config = replace(config, layers=layers)
    kept = kept or [attention_twin(block.mixer, config) for block in teacher.blocks]
    mixers = [twin if kind == "L" else keep for kind, twin, keep in zip(layers, twins, kept)]
    student = assemble(teacher, config, mixers)
    del twins, kept, mixers                                        # frees the twins that the student lacks

    # From here attention has no positions (HyPE), unless --pe keeps them. With RoPE the score of two tokens
    # depends on their distance. If training never had that distance, the score is arbitrary. Without
    # positions the score depends on the two tokens alone, near or far. The order of tokens comes from the
    # linear layers, which keep RoPE. GPT-2's learned positions leave the whole residual stream here.
    train(run, "distil", plans["distil"], corpus, student, [list(student.parameters())],
          objective(student, teacher, args.kl, args.alpha, args.hidden))

    return finetune(run, student, teacher, corpus, plans, args)


def finetune(run, student, teacher, corpus, plans, args):
    """Stage 3. Returns the student.

    Its sequences are long, because attention must learn to find one key among thousands: stage 2 never shows
    it so many. As in the paper the text is the target, because the teacher cannot read so far. But our text
    is not what a large teacher was trained on. It pulls the student away from what the teacher knows. So the
    first share plan.short of each sequence is read as short texts, of 1/32 of its length. Their target is the
    teacher, as in stage 2. For real teachers 1/32 is 512 tokens, the length of stage 1."""
    short = objective(student, teacher, args.kl, args.alpha, args.hidden)      # yields one term, as long does
    long = objective(student, None, args.kl, alpha=1.0)
    plan = plans["finetune"]

    def loss_fn(idx, targets):
        T = idx.size(1)
        n = T // 32                                                # the length of a short text
        cut = int(32 * plan.short) * n                             # the length of all short texts together
        if cut:
            texts = [ids[:, :cut].reshape(-1, n) for ids in (idx, targets)]                 # (B*cut/n, n)
            yield next(short(*texts)) * (cut / T)
        yield next(long(idx[:, cut:], targets[:, cut:])) * (1 - cut / T)
    train(run, "finetune", plan, corpus, student, [list(student.parameters())], loss_fn)
    return student


def convert_control(run, teacher, corpus, plans, args):
    """The control of stage 3: the teacher, still all attention, with the same kinds of text and the same
    loss. A gain that it shows too is not due to the hybrid."""
    mixers = [attention_twin(block.mixer, teacher.config) for block in teacher.blocks]
    return finetune(run, assemble(teacher, teacher.config, mixers), teacher, corpus, plans, args)


def align(run, teacher, config, corpus, plan, args):
    """Stage 1 (paper eq. 7): every linear twin learns its attention layer's output, each alone, on the hidden
    states of the teacher. The loss is a sum over twins of MSE / mean square of the target: a twin that
    outputs 0 has a loss of about 1. Each twin is a term, whose graph is gone before the next twin runs. With
    --layers both and --pe hype every layer has a second twin, attention without positions, that trains in the
    same way. Returns two ModuleLists: the linear twins, and the second twins (else empty)."""
    twins, squares = make_twins(teacher, config, corpus, plan, args)
    n = len(twins)
    if args.layers == "both" and args.pe == "hype":
        twins.extend(attention_twin(block.mixer, config) for block in teacher.blocks)

    def loss_fn(idx, targets):
        for i, (_, x, where, y, bare) in enumerate(teacher_layers(teacher, config, idx)):
            yield relative_error(twins[i](x, where), y, squares[i])
            if len(twins) > n:
                yield relative_error(twins[n + i](bare, where._replace(attn_rope=None)), y, squares[i])
    train(run, "align", plan, corpus, twins, [list(twin.parameters()) for twin in twins], loss_fn)
    return twins[:n], twins[n:]


def select(run, teacher, twins, kept, config, corpus, args):
    """One letter per layer: "A" stays attention, "L" becomes linear. A rule of SCORED first measures what
    align returned, twins and kept."""
    n_layer = len(twins)
    if args.layers not in SCORED:
        return choose_layers(args.layers, n_layer, keep=args.keep)
    found = run.once("scores", lambda: layer_scores(teacher, twins, kept, config, corpus, args))
    if found is None:                                              # a trial: any layers cost the same
        return choose_layers("even", n_layer, keep=args.keep)
    scores, teacher_loss = found
    layers = choose_layers(args.layers, n_layer, scores, teacher_loss, keep=args.keep)
    print_scores(scores, priorities(args.layers, scores, teacher_loss), layers, teacher_loss)
    return layers


def choose_layers(how, n_layer, scores=None, teacher_loss=None, keep=None):
    """One letter per layer: "A" stays attention, "L" becomes linear. keep: how many stay (default: a
    quarter). how is the letters themselves, or a rule:

    even      every so many layers
    ends      the first and the last quarter, whatever keep is (the article's get_hybrid_config)
    score     the highest  score_i = (max R - R_i) / (max C - C_i + 1e-6)  (paper eq. 8, 9). R is recall, C is
              minus the loss, both with layer i linear. A layer stays if its linear form loses much recall
              but little C: such a layer serves recall
    guarded   the same, with the denominator at least the standard error of max C. Layers whose linear form
              costs over TOO_MUCH come first
    swap      the highest  score_i = (R_i if i is attention - R_i if i is linear) + (the same of C)
    both      the same, but stage 1 trains both forms of each layer. For swap it trains the linear form alone:
              the longer stage 1 is, the more swap favours linear layers

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
        first = priorities(how, scores, teacher_loss)
        stay = sorted(range(n_layer), key=first.__getitem__, reverse=True)[:k]
    return "".join("A" if i in stay else "L" for i in range(n_layer))


def priorities(how, scores, teacher_loss):
    """For each layer: whether it must stay attention, and its score. See choose_layers."""
    best_R = max(s["R"] for s in scores)
    cheapest = max(scores, key=lambda s: s["C"])                   # the layer whose linear form costs least
    least = cheapest["C_se"] if how == "guarded" else 0.0
    found = []
    for s in scores:
        if how in ("swap", "both"):
            score = s["R_kept"] - s["R"] + s["C_kept"] - s["C"]
        else:
            score = (best_R - s["R"]) / (max(cheapest["C"] - s["C"], least) + 1e-6)    # paper eq. 8
        found.append((how == "guarded" and -s["C"] - teacher_loss > TOO_MUCH, score))
    return found


def layer_scores(teacher, twins, kept, config, corpus, args):
    """Measure the teacher with layer i linear (R, C), and for "swap" and "both" also with layer i as the
    attention that would stay (R_kept, C_kept); for every layer i, with standard errors (_se). R is the
    log-probability of an answer, per token; C is minus the held-out loss (paper eq. 8). The attention is
    kept[i] if align trained it, with the student's gate and window; else the teacher's, without positions if
    --pe is hype. All other layers are the teacher's. swap_se is the standard error of the score. Both futures
    of a layer read the same text, so the error is that of differences. Returns a list of dicts, one per
    layer, and the held-out loss of the teacher itself."""
    batches = corpus.held_out_batches(args.length, max(2, args.eval_windows // 2))
    scores = []

    def values(model):
        """R of each question and C of each text."""
        return (recall(model, corpus, args.length, args.trials * 2, task=args.task, varied=args.varied)[0],
                -losses(model, batches))

    def error(x):
        return x.std().item() / len(x) ** 0.5

    def summary(R, C, kind=""):
        return {f"R{kind}": R.mean().item(), f"R{kind}_se": error(R),
                f"C{kind}": C.mean().item(), f"C{kind}_se": error(C)}
    for i, twin in enumerate(tqdm(twins, desc="select   ", dynamic_ncols=True)):
        linear = values(with_linear(teacher, config, i, twin))
        scores.append(summary(*linear))
        if args.layers in ("swap", "both"):
            if i == 0 or args.pe == "hype":                        # else the teacher's: the same for all i
                mixer = kept[i] if kept else None
                attention = values(with_kept(teacher, i, mixer) if args.pe == "hype" else teacher)
            scores[i] |= summary(*attention, "_kept")
            scores[i]["swap_se"] = math.hypot(*(error(a - b) for a, b in zip(attention, linear)))
    return scores, losses(teacher, batches).mean().item()


def with_linear(teacher, config, i, twin):
    """The teacher with layer i exchanged for its linear twin, of the kind that config says. Both models share
    the weights of all other layers."""
    layers = "A" * i + "L" + "A" * (len(teacher.blocks) - 1 - i)
    swapped = replace(config, layers=layers, attn_position=True, chunk=None, n_chunks=0, window=None,
                      attn_gate=False)
    with Weightless():
        model = HypeNet(swapped)
    model.blocks[i].mixer = twin
    return share_weights(model, teacher)


def with_kept(teacher, i, mixer=None):
    """The teacher with layer i as HyPE would keep it: attention without positions, its own or `mixer`."""
    with Weightless():
        model = HypeNet(teacher.config)
        model.blocks[i] = WithoutPositions(teacher.config, getattr(model, "wpe", None))
    if mixer is not None:
        model.blocks[i].mixer = mixer
    return share_weights(model, teacher)


class WithoutPositions(Block):
    """A teacher's block whose attention knows no positions. RoPE is left out. Learned positions sit in the
    residual stream, so wpe, the model's own, is subtracted before attention. What earlier layers made of wpe
    stays."""

    def __init__(self, config, wpe):
        super().__init__(config, "A")
        self.wpe = wpe

    def forward(self, x, where, cache=None):
        unplaced = x if self.wpe is None else x - self.wpe(where.pos)
        x = x + self.mixer(self.norm1(unplaced), where._replace(attn_rope=None), cache)
        return x + self.mlp(self.norm2(x))


def share_weights(model, teacher):
    """Let a model without weights (see Weightless) use those of a teacher, by name."""
    missing = {name for name, w in model.state_dict().items() if w.is_meta}
    shared = {name: w for name, w in teacher.state_dict().items() if name in missing}
    model.load_state_dict(shared, strict=False, assign=True)
    return model.requires_grad_(False)


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
        train(run, stage, plan, corpus, student, [params],
              objective(student, teacher, args.kl, args.alpha, args.hidden))
        title = f"group {n} of {len(groups)}: {letters}"
        run.once(stage, lambda: save_usable(run, stage, title, student, corpus, args))
    return student


def groups_of(layers, n_groups=0):
    """The linear layers in groups, in order of conversion. By default: at most 6 in each, at least 2
    groups."""
    linear = [i for i, kind in enumerate(layers) if kind == "L"]
    return np.array_split(linear, min(len(linear), n_groups or max(2, math.ceil(len(linear) / 6))))


# ---- the logit base ----------------------------------------------------------------------------------------
#
# Why s_t is a logarithm (paper eq. 11). Let the right key's score exceed the scores of t other keys by m. Its
# softmax weight is e^m / (e^m + t), which goes to 0. Let s_t = log(t + a) / log(a) multiply the query.
# With m = log(a), the weight is (t + a) / (2t + a), at least a half at any t. Without s_t the right key keeps
# half the weight up to t = a keys. s_t starts at 1 and reaches 2 at t = a^2 - a: the larger a,
# the gentler the scaling.
#
# Why training has no s_t: the weights learn scores that are sharp enough for the length they train at. So the
# base can be chosen afterwards, on texts that are much longer than any training sequence.
#
# Why several bases are tried: which is best depends on m, that is on how sharp this student's scores are. Too
# large a base leaves attention flat. Too small a base makes attention one-hot, which raises the loss.


def choose_logit_base(run, student, corpus, plans, args):
    """The base a that --logit-base asks for, or the one that fits best; None: no scaling."""
    if args.logit_base != "fit":
        return None if args.logit_base == "none" else float(args.logit_base)
    length = min(fit_length(plans, args.length), student.config.limit())
    costs = run.once("fit", lambda: fit_logit_base(student, corpus, length, args))
    print(f"held-out loss + loss of an answer, at {length:,} tokens, by logit base")
    print("".join(f"{a:>9s}" for a in costs))
    print("".join(f"{cost:9.4f}" for cost in costs.values()) + "\n")
    best = min(costs, key=costs.get)                               # a string, as keys of JSON in run.json are
    return None if best == "None" else float(best)


def fit_logit_base(student, corpus, length, args):
    """What each base a costs at a long length: {a: held-out loss + loss of an answer's tokens}, both in
    nats a token. The two losses count equally, by choice, as in choose_layers "swap". From base to base the
    cost should fall, then rise. So the search ends once a base costs 0.02 more than the best. The student
    keeps the last base tried; the caller sets the best."""
    batches = corpus.held_out_batches(length, 8, args.seed)
    asked = dict(trials=10, seed=args.seed + 1, task=args.task, varied=args.varied)    # not the report's seed
    costs = {}
    for a in tqdm((None, 10000, 3000, 1000, 500, 300, 100, 50, 20), desc="fit a    ", dynamic_ncols=True):
        student.config.logit_base = a
        logp = recall(student, corpus, length, **asked)[0]
        costs[str(a)] = (losses(student, batches).mean() - logp.mean()).item()
        if costs[str(a)] > min(costs.values()) + 0.02:
            break
    return costs


def fit_length(plans, length):
    """The length at which the base is fitted: well past every training sequence. plans has this run's
    stages."""
    return max(length, 4 * plans["finetune"].length) if "finetune" in plans else 16 * length


# ---- from start to end -------------------------------------------------------------------------------------


def method(args):
    """The function that makes a student out of a teacher."""
    if args.control:
        return convert_control
    return convert_staged if args.training == "staged" else convert_progressive


def convert(run, teacher, corpus, plans, args):
    """Distil a teacher into a student; returns the student."""
    torch.manual_seed(args.seed)                 # chunk embeddings and other new weights
    student = method(args)(run, teacher, corpus, plans, args).eval()
    student.config.logit_base = choose_logit_base(run, student, corpus, plans, args)
    return student


def pretrain(run, corpus, plans, args):
    """Train a teacher, or with --layers a hybrid, from random weights; returns the model."""
    config = replace(TEACHERS[args.teacher], max_len=args.length)
    if args.hybrid:
        config = student_config(config, choose_layers(args.layers, len(config.layers), keep=args.keep), args)
    torch.manual_seed(args.seed)
    model = HypeNet(config).to(args.device)
    for block in model.blocks:
        if getattr(block.mixer, "forget", None) is not None:
            nn.init.constant_(block.mixer.forget.bias, DECAYS[config.decay].bias(args.retention or 0.7))
    train(run, "pretrain", plans["pretrain"], corpus, model, [list(model.parameters())],
          objective(model, None, args.kl, alpha=1.0))
    model.eval()
    if args.hybrid:
        model.config.logit_base = choose_logit_base(run, model, corpus, plans, args)
    return model


def teacher_path(name):
    """The folder of a teacher of TEACHERS, shipped or to be made; any other name as it is."""
    if name not in TEACHERS:
        return name
    shipped = os.path.join(HERE, "assets", f"{name}-teacher")
    return shipped if os.path.isdir(shipped) else os.path.join("out", f"{name}-teacher")


def main(argv=None):
    options.main(sys.modules[__name__], argv)      # which calls convert or pretrain


if __name__ == "__main__":
    main()
