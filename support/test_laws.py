"""Laws that a fault of one line would break: steps of training, fields of files, options of generation, the
clock, signals and files of a run. support/faults.py lists such faults."""

import contextlib
import json
import math
import os
import re
import signal
import stat
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from test_hypenet import (  # noqa: F401
    DEVICE, GPU, T, VARIANTS, a_plan, convert, home, inputs, log_of, needs_triton, one_line, options, rmse,
    scan, some_documents, some_ids, tiny, write_documents)

import halo
import hypenet
import kernel
import sample
import support.fast as fast
import support.options as cli
import support.pretrained as pretrained
import support.recall as recall
import support.report as reports
import support.run as run
import support.text as text
import support.tokens as tokens
import support.world as world
import support.writer as writer
from hypenet import HypeNet
from support.tokens import Tokenizer
from test_support import assert_same_logits, edit, needs_transformers, teacher

# ---- training ----------------------------------------------------------------------------------------------


class Rows:
    """Stands in for a Corpus. Every step has the same rows, or rows that hold the number of the step."""
    seed = 0

    def __init__(self, given=None):
        self.given = given

    def rows(self, stage, plan):
        if self.given is not None:
            return lambda step: self.given.copy()
        return lambda step: np.full((plan.batch, plan.length + 1), step)

    def advance(self, plan):
        pass


def resumes(folder):
    """The option of a run that goes on where a folder has one."""
    return dict(resume=str(folder)) if (folder / "run.json").exists() else {}


def train(folder, stages, module, loss_fn, corpus):
    """Run stages {name: plan} by halo.train in a folder. Each parameter is a group of its own."""
    a_run = run.Run(str(folder), dict(micro=None, plain=True) | resumes(folder))
    try:
        for stage, plan in stages.items():
            halo.train(a_run, stage, plan, corpus, module, [[p] for p in module.parameters()], loss_fn)
    finally:
        a_run.close()


def adamw(slopes, lr):
    """How far AdamW moves a weight, by its formula: betas 0.9 and 0.95, gradients clipped to norm 1."""
    w = m = v = 0
    for step, g in enumerate(slopes, 1):
        g = g / max(1, g.norm())
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        w = w - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8)
    return w


def test_steps_are_those_of_adamw(tmp_path):
    """Betas are 0.9 and 0.95. Each group is clipped to norm 1 by itself. The log has the largest norm."""
    rng = torch.Generator().manual_seed(0)
    small, large = [0.1, 0.3, 0.2, 0.9, 0.4, 0.8], [0.6, 9.0, 1.5, 30.0, 0.7, 3.0]
    slopes = [[norm * F.normalize(torch.randn(1, 5, generator=rng)) for norm in norms]
              for norms in (small, large)]
    module = torch.nn.ParameterList(torch.zeros_like(each[0]) for each in slopes)

    def loss_fn(idx, targets):
        for w, slope in zip(module, slopes):
            yield (w * slope[idx[0, 0]]).sum()
    train(tmp_path, dict(distil=a_plan(6 * 4, 2, 2)), module, loss_fn, Rows())
    for w, slope in zip(module, slopes):
        assert rmse(w, adamw(slope, 1e-3)) < 1e-4
    logged = [record["norm"] for record in log_of(tmp_path)]
    assert logged == pytest.approx([max(pair) for pair in zip(small, large)], rel=1e-4)


def test_stages_read_text_that_no_earlier_stage_has_read(tmp_path):
    """Stages of one run read disjoint text. A run that goes on reads what it would have read."""
    write_documents(tmp_path / "text.jsonl", some_documents())
    plans = dict(align=a_plan(336, 16, 3), distil=a_plan(640, 32, 4), finetune=a_plan(640, 32, 4))
    seen = {}

    def run_stages(folder, *stages):
        module = torch.nn.ParameterList([torch.zeros(1)])
        corpus = text.Corpus(Tokenizer.bytes(), [str(tmp_path / "text.jsonl")], cell=32)
        for stage in stages:
            found = seen[folder, stage] = set()

            def loss_fn(idx, targets):
                found.update(bytes(part.tolist()) for row in idx for part in row.split(16))
                yield module[0].sum()
            train(tmp_path / folder, {stage: plans[stage]}, module, loss_fn, corpus)
    run_stages("whole", *plans)
    run_stages("stopped", "align", "distil")
    run_stages("stopped", *plans)
    pieces = [seen["whole", stage] for stage in plans]
    assert sum(map(len, pieces)) == len(set.union(*pieces)) == 21 + 40 + 40
    assert seen["stopped", "finetune"] == seen["whole", "finetune"] and not seen["stopped", "distil"]


def aligned(monkeypatch, teacher, rows, args):
    """Stage 1 without its training: the twins, the groups that are clipped, and the loss."""
    made = []
    monkeypatch.setattr(halo, "train", lambda run, stage, plan, corpus, *rest: made.extend(rest))
    config = halo.student_config(teacher.config, "L" * len(teacher.blocks), args)
    halo.align(None, teacher, config, Rows(rows.numpy()), a_plan(100, 24, 4), args)
    return made


def test_a_twin_that_says_nothing_has_loss_1(monkeypatch):
    """Stage 1 divides a layer's error by the mean square of its target. Each twin is clipped by itself."""
    old, rows = tiny(dtype=torch.float32, layers="AAAA"), some_ids(4, 25)
    for how, pe, n in ("swap", "hype", 4), ("both", "hype", 8), ("both", "rope", 4):
        twins, groups, loss_fn = aligned(monkeypatch, old, rows, options(layers=how, pe=pe))
        of_twins = [set(map(id, twin.parameters())) for twin in twins]
        assert [set(map(id, group)) for group in groups] == of_twins
        for twin in twins:
            twin.out.weight.data.zero_()
        assert [x.item() for x in loss_fn(rows[:, :-1], rows[:, 1:])] == pytest.approx([1.0] * n, rel=1e-4)


@pytest.mark.parametrize("family", ["teacher", "teacher gpt2"])
def test_both_forms_of_a_layer_learn_and_are_compared(family, monkeypatch):
    """--layers both: stage 1 also trains attention without positions, on input without learned positions, as
    selection measures it (with_kept). The student's attention layers are those that were trained."""
    old, rows = tiny(dtype=torch.float32, **VARIANTS[family]), some_ids(2, 13)
    args = options(layers="both")
    *_, loss_fn = aligned(monkeypatch, old, rows, args)
    terms = [term.item() for term in loss_fn(rows[:, :-1], rows[:, 1:])][1::2]
    config = halo.student_config(old.config, "LLL", args)
    for i, (attn, x, where, y, _) in enumerate(halo.teacher_layers(old, config, rows[:, :-1])):
        seen = []
        model = halo.with_kept(old, i, halo.attention_twin(attn, config))
        model.blocks[i].mixer.register_forward_hook(lambda mixer, given, out: seen.append(out))
        model(rows[:, :-1])
        error = halo.relative_error(seen[0], y, y.square().mean())
        assert terms[i] == pytest.approx(error.item(), rel=1e-4)
    twins, kept = (torch.nn.ModuleList(make(config) for _ in range(3))
                   for make in (hypenet.LinearAttention, hypenet.Attention))
    monkeypatch.setattr(halo, "align", lambda *_: (twins, kept))
    monkeypatch.setattr(halo, "select", lambda *given: "LAL" if given[3] is kept else None)
    student = halo.convert_staged(None, old, None, dict.fromkeys(("align", "distil", "finetune")), args)
    assert student.blocks[1].mixer is kept[1] and student.blocks[2].mixer is twins[2]


@pytest.mark.parametrize("family", ["teacher", "teacher gpt2"])
def test_twins_learn_from_the_teachers_own_pass(family):
    """teacher_layers gives the input and output that each attention layer has in a pass of the teacher."""
    old, idx, seen = tiny(**VARIANTS[family]), some_ids(2, 12), []
    config = halo.student_config(old.config, "LLL", options())
    found = [(x, y) for _, x, _, y, _ in halo.teacher_layers(old, config, idx)]
    for block in old.blocks:
        block.mixer.register_forward_hook(lambda mixer, given, y: seen.append((given[0], y)))
    old(idx)
    for (x, y), (ref_x, ref_y) in zip(found, seen, strict=True):
        assert rmse(x, ref_x) < 1e-6 and rmse(y, ref_y) < 1e-6


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_twin_starts_as_its_options_say(decay, monkeypatch):
    """A new forget gate keeps the share --retention, or what lookback says. The twin has its teacher's
    weights and gains of QK-norm, or random ones with --transfer off."""
    old, rows = tiny(dtype=torch.float32, layers="AA"), some_ids(4, 25)
    for transfer in "on", "off":
        args = options(decay=decay, retention=0.9, transfer=transfer)
        for twin, block in zip(aligned(monkeypatch, old, rows, args)[0], old.blocks):
            assert torch.allclose(twin.log_decay(torch.randn(1, 3, 32)).exp(), torch.tensor(0.9))
            theirs = block.mixer.state_dict()
            for name, w in twin.state_dict().items():
                if name in ("q_norm.weight", "k_norm.weight"):
                    assert w.equal(theirs[name]) == (transfer == "on"), name
            assert twin.qkvz.weight[:32].equal(theirs["qkvz.weight"][:32]) == (transfer == "on")
    monkeypatch.setattr(halo, "lookback", lambda attn, *_: torch.linspace(0.4, 0.9, attn.config.n_head))
    twin = aligned(monkeypatch, old, rows, options(decay=decay))[0][0]
    for h, share in enumerate(torch.linspace(0.4, 0.9, twin.config.n_head)):
        assert torch.allclose(twin.log_decay(torch.randn(1, 3, 32))[:, :, h].exp(), share)


@pytest.mark.parametrize("stages, chunks, length", [
    (dict(finetune=96), 0, 4 * 96), (dict(finetune=8), 0, 64), (dict(group=64), 0, 16 * 64),
    (dict(group=64), 15, 15 * 8)], ids=str)
def test_the_base_is_fitted_past_all_training(stages, chunks, length, monkeypatch):
    """Loss and recall choose `a` at 4 times the length of stage 3, or 16 times that of the groups, as far as
    the model knows positions."""
    student, seen = tiny(**dict(chunk=8, n_chunks=chunks) if chunks else {}), set()
    monkeypatch.setattr(halo, "recall", lambda model, corpus, n, *_, **__: (seen.add(n) or torch.zeros(1),))
    monkeypatch.setattr(halo, "losses", lambda *_: torch.zeros(1))
    corpus = types.SimpleNamespace(held_out_batches=lambda n, count, seed: seen.add(n))
    plans = {stage: a_plan(1000, n, 1) for stage, n in stages.items()}
    args = options(length=64, logit_base="fit", varied=0.0)
    halo.choose_logit_base(types.SimpleNamespace(once=lambda _, work: work()), student, corpus, plans, args)
    assert seen == {length}


def test_recall_judges_the_columns_of_the_answer(monkeypatch):
    """Of prompts with answers of 2, 4 and 3 ids the last 2, 4 and 3 columns count, whatever stands before."""
    right = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    logp = torch.tensor([[9.0, 9, -1, -3], [-1, -2, -3, -4], [9, -1, -1, -4]])
    prompts = np.zeros((3, 9), np.int64)
    monkeypatch.setattr(recall, "make_prompts", lambda *_: (prompts, [2, 4, 3]))
    monkeypatch.setattr(recall, "answers", lambda model, part, most: (logp[:, -most:], right[:, -most:]))
    mean, whole = recall.recall(tiny(), None, 9, 3)
    assert mean.tolist() == [-2.0, -2.5, -2.0] and whole.tolist() == [1.0, 0.0, 0.0]


def converted(monkeypatch, recipe, plans, **changes):
    """A conversion without its training: the student, and the plan of each stage."""
    seen = {}
    monkeypatch.setattr(halo, "train", lambda run, stage, plan, *_: seen.update({stage: plan}))
    old, corpus = tiny(dtype=torch.float32, layers="AAAA"), Rows(some_ids(4, 25).numpy())
    args = options(recipe, layers="ends", logit_base="none", length=24, **changes)
    return halo.convert(types.SimpleNamespace(once=lambda *_: None), old, corpus, plans, args), seen


def test_every_stage_trains_by_its_own_plan(monkeypatch):
    """align, distil and finetune have their rows of the plan. Two groups have half of the tokens each."""
    plans = {stage: a_plan(1000 * n, 24, n) for n, stage in enumerate(("align", "distil", "finetune"), 1)}
    assert converted(monkeypatch, "paper", plans)[1] == plans
    whole, half = a_plan(1000, 24, 4), a_plan(500, 24, 4)
    assert converted(monkeypatch, "article", dict(group=whole))[1] == dict(group1=half, group2=half)


def test_a_seed_draws_the_new_weights(monkeypatch):
    """The chunk embeddings of a student depend on --seed alone."""
    plans = dict(group=a_plan(1000, 24, 4))
    drawn = [converted(monkeypatch, "article", plans, seed=seed)[0].blocks[0].mixer.chunk_embd.weight
             for seed in (1, 2, 1)]
    assert drawn[0].equal(drawn[2]) and not drawn[0].equal(drawn[1])


@pytest.mark.parametrize("how", ["swap", "both"])
def test_scores_are_of_the_layer_they_name(how, monkeypatch):
    """R and C of layer i are of the teacher with layer i linear. R_kept and C_kept: with layer i kept, with
    "both" as stage 1 trained it."""
    old, idx = tiny(dtype=torch.float32, layers="AAA"), some_ids(4, 25)
    args = options(layers=how, eval_windows=4, length=24, varied=0.0)
    forms = aligned(monkeypatch, old, idx, args)[0]
    twins, kept = forms[:3], forms[3:]
    for mixer in kept:
        mixer.out.weight.data *= 0.5                               # as if it had trained
    monkeypatch.setattr(halo, "recall", lambda model, *_, **__: (model(idx)[0].mean((1, 2)), None))
    monkeypatch.setattr(halo, "losses", lambda model, _: model(idx)[0].square().mean((1, 2)))
    config = halo.student_config(old.config, "LLL", args)
    corpus = types.SimpleNamespace(held_out_batches=lambda *_: None)
    scores, _ = halo.layer_scores(old, twins, kept, config, corpus, args)
    for i, (twin, score) in enumerate(zip(twins, scores, strict=True)):
        stays = halo.with_kept(old, i, kept[i] if how == "both" else None)
        for kind, model in ("", halo.with_linear(old, config, i, twin)), ("_kept", stays):
            logits = model(idx)[0]
            assert score["R" + kind] == pytest.approx(logits.mean().item(), abs=1e-6)
            assert score["C" + kind] == pytest.approx(-logits.square().mean().item(), rel=1e-5)


def test_a_score_has_the_standard_error_of_its_mean(monkeypatch):
    """Selection measures R and C as means over n answers and n sequences; their errors are std / sqrt(n)."""
    old = tiny(dtype=torch.float32, layers="AA")
    args = options(layers="guarded", eval_windows=8, length=24, varied=0.0)
    twins = aligned(monkeypatch, old, some_ids(4, 25), args)[0]
    logp, loss = torch.randn(40), torch.randn(5)
    monkeypatch.setattr(halo, "recall", lambda *_, **__: (logp, None))
    monkeypatch.setattr(halo, "losses", lambda *_: loss)
    corpus = types.SimpleNamespace(held_out_batches=lambda *_: None)
    config = halo.student_config(old.config, "LL", args)
    scores, teacher_loss = halo.layer_scores(old, twins, None, config, corpus, args)
    wanted = dict(R=logp.mean(), R_se=logp.std() / 40 ** 0.5, C=-loss.mean(), C_se=loss.std() / 5 ** 0.5)
    assert len(scores) == 2 and teacher_loss == loss.mean().item()
    for score in scores:
        assert score == pytest.approx({name: x.item() for name, x in wanted.items()})


def test_the_error_of_swap_is_that_of_differences(monkeypatch):
    """Both futures of a layer answer the same questions and read the same text. So the error of the score is
    that of their differences: here R differs by 0 or 2 (n = 40), C by 1 everywhere."""
    old = tiny(dtype=torch.float32, layers="A")
    args = options(layers="swap", eval_windows=8, length=24, varied=0.0, task="S1")
    twins = aligned(monkeypatch, old, some_ids(4, 25), args)[0]
    noise, step = torch.randn(40), torch.arange(40) % 2 * 2.0

    def kept(model):
        return isinstance(model.blocks[0], halo.WithoutPositions)
    monkeypatch.setattr(halo, "recall", lambda model, *_, **__: (noise + step * kept(model), None))
    monkeypatch.setattr(halo, "losses", lambda model, _: noise[:5] - 1.0 * kept(model))
    corpus = types.SimpleNamespace(held_out_batches=lambda *_: None)
    config = halo.student_config(old.config, "L", args)
    (score,), _ = halo.layer_scores(old, twins, None, config, corpus, args)
    assert score["swap_se"] == pytest.approx(step.std().item() / 40 ** 0.5, abs=1e-6)


def test_the_recipe_of_real_teachers_is_the_papers_but_for_three_rows():
    changed = {row for row, value in halo.RECIPES["real"].items() if value != halo.RECIPES["paper"][row]}
    assert changed == {"layers", "decay", "hidden"}


@pytest.mark.parametrize("n_params, tokens, lr, batch", [
    (1.7e9, (320e6, 1e9, 1e9), (1e-3, 1e-4, 1e-5), (32, 24, 128)),
    (8e9, (320e6, 1e9, 1e9), (1e-3, 1e-4, 1e-5), (32, 24, 128)),
    (0.017e9, (32e6, 1e8, 1e8), (3e-3, 1e-3, 6.607e-4), (8, 8, 1)),
    (0.17e9, (101.19e6, 316.2e6, 316.2e6), (3e-3, 8.128e-4, 8.128e-5), (32, 24, 8))])
def test_a_plan_fits_its_teachers_size(n_params, tokens, lr, batch):
    """Tokens go with the root of the size, learning rates with its power -0.91, up to 1e-3, in stage 1 up to
    3e-3. A stage has at least the steps of the paper's shortest, times the root of 1.7B / size, if need be
    in smaller batches, of 8 or a multiple if possible."""
    plans = {stage: halo.PLANS["real"][stage] for stage in ("align", "distil", "finetune")}
    cli.scale(plans, n_params, [])
    for i, plan in enumerate(plans.values()):
        assert (plan.tokens, plan.lr, plan.batch) == pytest.approx((tokens[i], lr[i], batch[i]), rel=1e-3)
        assert plan.steps >= 476 * max(1, 1.7e9 / n_params) ** 0.5


@pytest.mark.parametrize("n, batch", [(5000, 24), (2048, 24), (1024, 48), (1500, 32), (90, 544)])
def test_a_plan_is_cut_to_what_its_teacher_reads(n, batch):
    """A step keeps its tokens, but for sequences beyond a multiple of 8."""
    plan = halo.PLANS["real"]["distil"]
    found = cli.cut(plan, n)
    assert (found.length, found.batch) == (min(n, 2048), batch)
    assert found == halo.replace(plan, length=found.length, batch=batch)


def test_no_size_changes_what_is_asked_for():
    asked = dict(tokens=7, lr=8, batch=9)
    plans = dict(finetune=halo.replace(halo.PLANS["real"]["finetune"], **asked))
    whole = dict(plans)
    cli.scale(plans, 1e6, [f"finetune.{field}={x}" for field, x in asked.items()])
    assert plans == whole


@pytest.mark.parametrize("short, cut", [(0.0, 0), (0.25, 16), (0.26, 16), (0.9, 56)])
def test_a_share_of_stage_3_is_short_texts(short, cut, monkeypatch):
    """The first tokens of a sequence of 64 are texts of 2 tokens, as many as plan.short has room for. Their
    target is the teacher, the target of the rest the text. A sequence's loss is the mean over its tokens."""
    seen = {}
    monkeypatch.setattr(halo, "train", lambda run, stage, plan, *rest: seen.update({stage: rest}))
    old, idx = tiny(dtype=torch.float32, layers="AA", max_len=48), some_ids(3, 65)
    student = tiny(dtype=torch.float32, layers="LA", max_len=48, seed=1)
    plans = dict(finetune=halo.replace(a_plan(1000, 64, 2), short=short))
    o = options("real")
    halo.finetune(None, student, old, None, plans, o)
    found = sum(seen["finetune"][-1](idx[:, :-1], idx[:, 1:]))
    texts = [(at, at + 2, 0.0) for at in range(0, cut, 2)] + [(cut, 64, 1.0)]
    expected = sum((end - at) / 64 * halo.distil_loss(student, old, idx[:, at:end], idx[:, at + 1:end + 1],
                                                      "forward", alpha, o.hidden) for at, end, alpha in texts)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_control_is_the_teacher_after_stage_3(monkeypatch):
    """--control converts nothing: the model has the teacher's config and logits before stage 3 trains it, and
    stage 3 is all that trains. Its loss is the student's."""
    seen = {}
    monkeypatch.setattr(halo, "train", lambda run, stage, plan, *rest: seen.update({stage: rest}))
    old, idx = tiny(dtype=torch.float32, layers="AAA", max_len=8), some_ids(2, 13)
    plans = dict(finetune=a_plan(1000, 12, 2))
    args = options("real", control=True, logit_base="none")
    model = halo.convert(types.SimpleNamespace(), old, None, plans, args)
    assert list(seen) == ["finetune"] and model is not old and model.config == old.config
    assert rmse(model(idx)[0], old(idx)[0]) < 1e-6
    loss_fn = seen["finetune"][3]
    logits, targets = old(idx[:, :-1])[0], idx[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert sum(loss_fn(idx[:, :-1], targets)).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kl, alpha, hidden", [("forward", 0, 0), ("forward", 0.25, 2), ("reverse", 0.5, 0),
                                               ("forward", 1, 2)])
def test_the_loss_of_distillation(kl, alpha, hidden):
    """alpha CE + (1 - alpha) KL, a mean over all tokens, and the hidden states' error: for each token and
    block |student - teacher|^2 / |teacher|^2. With alpha 1 there is no teacher."""
    teacher, student = tiny(1, torch.float32, layers="AA"), tiny(2, torch.float32, layers="LA")
    idx, targets = some_ids(2, 16), some_ids(2, 16, seed=1)
    s, t = student(idx)[0].log_softmax(-1), teacher(idx)[0].log_softmax(-1)
    p, q = (t, s) if kl == "forward" else (s, t)
    ce = -s.gather(-1, targets[..., None])[..., 0]
    wanted = (alpha * ce + (1 - alpha) * (p.exp() * (p - q)).sum(-1)).mean()
    if alpha == 1:
        teacher = None
    else:
        seen = ([], [])
        for model, outputs in zip((student, teacher), seen):
            for block in model.blocks:
                block.register_forward_hook(lambda module, inputs, y, outputs=outputs: outputs.append(y))
            model.hidden(idx)
        errors = [(a - b).norm(dim=-1) ** 2 / b.norm(dim=-1) ** 2 for a, b in zip(*seen)]
        wanted = wanted + hidden * torch.stack(errors).mean()
    assert halo.distil_loss(student, teacher, idx, targets, kl, alpha, hidden).item() == pytest.approx(
        wanted.item())


@pytest.mark.parametrize("stride, rows", [(1, 1), (3, 1), (3, 2)])
def test_a_gate_remembers_as_far_as_its_head_looks(stride, rows, monkeypatch):
    """A head that looks `stride` tokens back, and no further, gives gamma = d / (1 + d) with d = stride. Its
    first tokens look at the nearest token there is."""
    T = 64
    q, k = torch.zeros(2, rows, T, 2, T)
    for i in range(T):
        q[:, i, 0, max(0, i - stride)] = k[:, i, :, i] = 1e4           # head 0; head 1 looks everywhere
    attn = types.SimpleNamespace(project=lambda x, where: (q, k, None, None))
    gamma = halo.lookback(attn, torch.zeros(rows, T, 1), None)
    log_d = sum(math.log1p(min(i, stride)) for i in range(T)) / T
    log_all = sum(sum(math.log1p(d) for d in range(i + 1)) / (i + 1) for i in range(T)) / T
    d = torch.tensor([log_d, log_all]).expm1()
    assert torch.allclose(gamma, d / (1 + d), atol=1e-5)


def test_selection_weighs_a_layer_against_the_teachers_loss(monkeypatch):
    """guarded keeps the layer whose linear form costs over 1 nat more than the teacher's loss."""
    scores = [dict(R=-1.0 - i, R_se=0.1, C=-2.0 - 0.1 * i, C_se=0.1) for i in range(4)]
    scores[0]["C"] = -3.5
    monkeypatch.setattr(halo, "layer_scores", lambda *_: (scores, 2.4))
    a_run = types.SimpleNamespace(once=lambda _, work: work())
    assert halo.select(a_run, None, [None] * 4, None, None, None, options(layers="guarded")) == "ALLL"


@pytest.mark.parametrize("layers, given, sizes", [
    ("L" * 12, 0, [6, 6]), ("LA" * 13, 0, [5, 4, 4]), ("LAL", 0, [1, 1]), ("LLLLL", 1, [5]),
    ("LL", 9, [1, 1])])
def test_groups_have_at_most_six_layers(layers, given, sizes):
    """Unless told otherwise, linear layers are converted in at least 2 groups, of at most 6 layers each."""
    groups = halo.groups_of(layers, given)
    assert [len(group) for group in groups] == sizes
    assert [i for group in groups for i in group] == [i for i, kind in enumerate(layers) if kind == "L"]


def test_a_new_model_has_gpt2s_weights():
    """Matrices have std 0.02, those that write into the residual stream 0.02 / sqrt(2 layers). Norms are 1,
    biases 0, and forget gates keep 0.7."""
    model = HypeNet(hypenet.HypeNetConfig(layers="LALALALA", decay="head", qkv_bias=True, out_bias=True))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.005 if residual else 0.02, rel=0.1), name
        elif name.endswith("forget.bias"):
            assert torch.allclose(torch.sigmoid(p), torch.tensor(0.7))
        else:
            assert p.equal(torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name


def test_a_new_teacher_knows_the_length_of_its_training(monkeypatch):
    """--plan pretrain.length=40 makes a teacher whose max_len is 40, and whose weights depend on --seed."""
    monkeypatch.setattr(halo, "train", lambda *_: None)
    made = [halo.pretrain(None, None, dict(pretrain=None), options(
        teacher="tiny-gpt2", hybrid=False, length=40, seed=seed)) for seed in (1, 2)]
    assert made[0].config.max_len == 40 == len(made[0].wpe.weight)
    assert not made[0].wte.weight.equal(made[1].wte.weight)


@pytest.mark.parametrize("steps, warmup, rates", [(40, 50, [0.25, 0.5, 0.75]), (1000, 2, [0.5])], ids=str)
def test_warm_up_takes_at_most_a_tenth_of_the_steps(steps, warmup, rates):
    """The rate rises in a line over `warmup` steps, or over a tenth of a short stage, and then is whole."""
    plan = halo.Plan(tokens=steps, length=1, batch=1, lr=2.0, lr_end=2.0, warmup=warmup)
    wanted = [2 * rate for rate in [*rates, 1, 1, 1]]
    assert [plan.rate(step) for step in range(len(wanted))] == pytest.approx(wanted)


def test_steps_hide_different_things():
    """Each step hides other pass keys, and the same ones if the step comes again. A seed hides its own."""
    corpus = Rows(np.zeros((2, 257), np.int64))
    corpus.tokenizer = Tokenizer.bytes()

    def rows(step, seed=0):
        corpus.seed = seed
        return recall.training_rows(corpus, "distil", a_plan(5000, 256, 2, recall=1))(step).tolist()
    assert rows(0) == rows(0) and rows(0) != rows(1) and rows(0) != rows(0, seed=1)


def test_a_row_asks_up_to_three_times():
    """A row of training has one pass key, and asks for the key 1, 2 or 3 times."""
    tokenizer, rng, asked = Tokenizer.bytes(), np.random.default_rng(0), set()
    for _ in range(30):
        row = np.zeros(512, np.int64)
        recall.hide(tokenizer, row, rng)
        written = tokenizer.decode(row.tolist())
        key, = re.findall(r"# The pass key is (\d{5})", written)
        asked.add(written.count(f"# What is the pass key? The pass key is {key}"))
    assert asked == {1, 2, 3}


@pytest.mark.parametrize("bos, begin", [(None, []), (7, [7])])
def test_documents_begin_and_end(bos, begin):
    """The ids of a document stand between bos, if there is one, and the end id."""
    tokenizer = types.SimpleNamespace(bos=bos, end=9, n_vocab=300, encode_batch=lambda texts: [
        np.array([*each.encode()], np.int32) for each in texts])
    found = [ids.tolist() for ids in text.encode_documents(tokenizer, ["ab", ""])]
    assert found == [[*begin, 97, 98, 9], [*begin, 9]]


def test_rows_of_two_sources_are_mixed(tmp_path):
    """The rows of a stage come in an order without rule: each ten of them are of both sources."""
    for name in "ab":
        write_documents(tmp_path / f"{name}.jsonl", [f"{n}{name * 99}" for n in range(400)])
    data = [f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.jsonl:0.5"]
    rows = text.Corpus(Tokenizer.bytes(), data, cell=32).rows("distil", a_plan(32 * 100, 32, 10))
    for step in range(10):
        assert 0 < sum((row == ord("a")).sum() > 10 for row in rows(step)) < 10


@pytest.mark.parametrize("task, prose", [("S1", False), ("S2", True), ("S3", True), ("multi-key", True)])
def test_numbers_are_hidden_in_natural_text(task, prose):
    """A pass key is asked for in text as in training, RULER's numbers in natural text."""
    seen = []

    def windows(rng, n, length, prose=False):
        seen.append(prose)
        return np.zeros((n, length), np.int64)
    corpus = types.SimpleNamespace(tokenizer=Tokenizer.bytes(), windows=windows)
    recall.make_prompts(corpus, 600, 2, 0, task, 0.0)
    assert seen == [prose]


def test_seeds_and_epochs_have_their_own_order(tmp_path):
    """Documents come in an order of the seed. Each epoch draws a new order of the cells."""
    write_documents(tmp_path / "text.jsonl", some_documents(100))

    def corpus(seed):
        return text.Corpus(Tokenizer.bytes(), [str(tmp_path)], seed, cell=32)
    first, again, other = (corpus(seed).sources[0] for seed in (0, 0, 1))
    ids = [source.parts[0].read(0, 2000).tolist() for source in (first, again, other)]
    assert ids[0] == ids[1] != ids[2] and sorted(ids[0]) != ids[0]
    cells = [first.order(epoch) // 32 for epoch in (0, 1)]
    assert all(sorted(each) == list(range(len(each))) for each in cells)
    assert (cells[0] != cells[1]).mean() > 0.9 < (cells[0] != np.arange(len(cells[0]))).mean()


# ---- loading -----------------------------------------------------------------------------------------------

GPT2 = dict(model_type="gpt2", vocab_size=61, n_embd=32, n_head=4, n_positions=T, n_layer=2)
LLAMA = dict(model_type="llama", vocab_size=61, hidden_size=32, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=T, num_hidden_layers=2)
QWEN3 = dict(LLAMA, model_type="qwen3", num_key_value_heads=2)
AUTHORS = dict(QWEN3, model_type="hypenet", mixer_types=["attn", "lightning-attn"])
FIELDS = [  # a config.json, a field, our name for it, our value without the field and with it
    (GPT2, dict(layer_norm_epsilon=0.1), "norm_eps", 1e-5, 0.1),
    (GPT2, dict(n_inner=40), "n_hidden", 128, 40),
    (GPT2, dict(tie_word_embeddings=False), "tied", True, False),
    (LLAMA, dict(rms_norm_eps=0.1), "norm_eps", 1e-6, 0.1),
    (LLAMA, dict(tie_word_embeddings=True), "tied", False, True),
    (LLAMA, dict(head_dim=16), "head_dim", 8, 16), (LLAMA, dict(num_key_value_heads=2), "n_kv_head", 4, 2),
    (LLAMA, dict(rope_theta=5e5), "rope_theta", 1e4, 5e5),
    (LLAMA, dict(attention_bias=True), "qkv_bias", False, True),
    (LLAMA, dict(attention_bias=True), "out_bias", False, True),
    (LLAMA, dict(mlp_bias=True), "mlp_bias", False, True),
    (QWEN3, dict(rms_norm_eps=0.1), "norm_eps", 1e-6, 0.1), (QWEN3, dict(head_dim=16), "head_dim", 128, 16),
    (QWEN3, dict(tie_word_embeddings=True), "tied", False, True),
    (AUTHORS, dict(attn_use_rope=False), "attn_position", True, False),
    (AUTHORS, dict(attn_use_output_gate=True), "attn_gate", False, True),
    (AUTHORS, dict(lightning_nkv=4), "linear_kv_head", 2, 4),
    (AUTHORS, dict(lightning_use_rope=False), "linear_rope", True, False),
    (AUTHORS, dict(lightning_use_qk_norm=True), "linear_qk_norm", False, True),
    (AUTHORS, dict(lightning_use_output_norm=True), "linear_norm", False, True),
    (AUTHORS, dict(lightning_use_output_gate=True), "linear_gate", False, True),
]


@pytest.mark.parametrize("given, field, ours, without, value", FIELDS, ids=str)
def test_a_field_of_a_config_counts(given, field, ours, without, value):
    """A field of config.json has its value in ours. A field that is absent has the value of transformers."""
    assert getattr(pretrained.translate(given | field, "x")[0], ours) == value
    assert getattr(pretrained.translate(given, "x")[0], ours) == without


@needs_transformers
@pytest.mark.parametrize("name, changes", [
    ("gpt2 untied", dict(layer_norm_epsilon=0.5)), ("qwen3 tied", dict(rms_norm_eps=0.5))])
def test_a_large_epsilon_gives_the_logits_of_transformers(name, changes, tmp_path):
    """An epsilon of 0.5 changes every norm, of q and k too: the logits are still those of transformers."""
    theirs = teacher(name, tmp_path, **changes)
    assert_same_logits(pretrained.load(tmp_path), theirs)


@needs_transformers
def test_buffers_in_older_files_are_left_out(tmp_path):
    """Older files of Llama hold the frequencies of RoPE too: they load, with the same logits."""
    theirs = teacher("llama", tmp_path)
    edit(tmp_path / "model.safetensors", lambda weights: weights.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_logits(pretrained.load(tmp_path), theirs)


def test_every_norm_adds_the_epsilon_of_the_config():
    """Norms of q, k and o divide by the root of mean square + norm_eps."""
    model = tiny(norm_eps=0.5)
    x, where = torch.randn(1, 1, 32, dtype=torch.float64), hypenet.locate(model.config, torch.zeros(1, 1))

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * module.weight
    linear, attention = (model.blocks[i].mixer for i in (0, 1))
    q, k, v, z = (t[0, 0] for t in linear.qkvz(x).split(linear.sizes, -1))
    q, k, v = (t.view(4, 8) for t in (q, k, v))
    o = (norm(q, linear.q_norm) * norm(k, linear.k_norm)).sum(1, keepdim=True) * v / 8 ** 0.5
    assert rmse(linear.mix(x, where)[0, 0], norm(o.flatten(), linear.norm) * torch.sigmoid(z)) < 1e-6
    for out, ref, module in zip(attention.project(x, where), attention.qkvz(x).split(attention.sizes, -1),
                                (attention.q_norm, attention.k_norm)):
        assert rmse(out.flatten(), norm(ref.view(-1, 8), module).flatten()) < 1e-6


@pytest.mark.parametrize("load", [HypeNet.from_pretrained, pretrained.load])
def test_weights_are_loaded_in_the_dtype_asked_for(load, tmp_path):
    """A float32 file loads as bf16, a bf16 file as float32, each weight rounded once."""
    model = tiny(dtype=torch.float32)
    for stored, asked in ((None, torch.bfloat16), (torch.bfloat16, torch.float32)):
        model.save_pretrained(tmp_path, stored)
        for name, w in load(tmp_path, dtype=asked).state_dict().items():
            assert w.dtype == asked and w.equal(model.state_dict()[name].bfloat16().to(asked))


@pytest.mark.parametrize("changes", [dict(chunk=16, n_chunks=3), dict(layers="AA", position="learned")])
def test_the_last_position_is_known(changes):
    """A model of 48 positions reads 48 tokens, and continues 40 tokens by 9: the last is never read."""
    model = tiny(dtype=torch.float32, **changes)
    assert model(some_ids(1, 48))[0].shape == (1, 48, 61)
    assert len(model.generate([some_ids(40).tolist()], 9)[0]) == 9
    with one_line("49 tokens", "48"):
        model(some_ids(1, 49))


def test_every_end_in_a_gguf_file_stops_a_text(monkeypatch, tmp_path):
    """The ids eos, eot and eom of a .gguf file all end a text. A document ends with eos."""
    names = ["a", "b", "<eos>", "<eot>", "<eom>", "<bos>"]
    fields = dict(model="gpt2", pre="gpt-2", tokens=names, merges=[], token_type=[1, 1, 3, 3, 3, 3])
    fields |= {f"{name}_token_id": names.index(f"<{name}>") for name in ("eos", "eot", "eom", "bos")}
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    monkeypatch.setattr(tokens, "open_gguf", lambda path: (fields, {}))
    (tmp_path / "model.gguf").touch()
    tokenizer = Tokenizer.load(tmp_path / "model.gguf")
    assert (tokenizer.stops, tokenizer.end, tokenizer.bos) == ({2, 3, 4}, 2, None)


def loaded_teacher(folder, length, vocab_size=256, plan=()):
    """What halo.py does with a teacher of 96 tokens: the teacher, the options, and the plans."""
    tiny(dtype=torch.float32, layers="AAAA", vocab_size=vocab_size, max_len=96).save_pretrained(folder)
    Tokenizer.bytes().save(folder)
    args = options(path=str(folder), teacher=str(folder), length=length, scaled=False, plan=plan)
    plans = dict(align=a_plan(1e4, length, 2), distil=a_plan(1e4, length, 2), finetune=a_plan(1e4, 400, 2))
    return cli.load_teacher(halo, plans, args), args, plans


def test_a_teacher_is_measured_where_it_was_trained(tmp_path):
    """Stages 1 and 2 read as far as the teacher was trained, if the plan has longer sequences: more sequences
    a step, unless their number is given. All is measured at the length of stage 2. Who asks for longer
    sequences is refused."""
    for length, read, batch in (200, 96, 4), (950, 96, 16), (90, 90, 2):
        _, args, plans = loaded_teacher(tmp_path / str(length), length, plan=["distil.batch=2"])
        assert args.length == plans["align"].length == plans["distil"].length == read
        assert [plans[stage].batch for stage in plans] == [batch, 2, 2] and plans["finetune"].length == 400
    with one_line("distil.length=97", "96"):
        loaded_teacher(tmp_path / "b", 97, plan=["distil.length=97"])


def test_a_teacher_and_its_tokenizer_belong_together(tmp_path):
    """A teacher of 61 ids with a tokenizer of 256 is refused before anything is trained."""
    with one_line("255", "61", "belong together"):
        loaded_teacher(tmp_path, 90, vocab_size=61)


# ---- one token at a time -----------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("act", ["swiglu", "gelu", "logsigmoid", None])
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_fused_linear_is_its_formula(norm, act):
    """act((norm(x) * sigmoid(gate)) W^T + bias) + residual, for 24 inputs: no power of two."""
    rng = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE)
    K, N = 24, 20
    x, gate, residual = some(2, K) + 1, some(2, K), some(2, N)
    weight, bias = some(2 * N if act == "swiglu" else N, K), some(2 * N if act == "swiglu" else N)
    gain, shift = some(K) if norm else None, some(K) if norm == "layer" else None
    h = x if norm is None else hypenet.normed(x, gain, shift, 0.3)
    y = (h * torch.sigmoid(gate)) @ weight.T + bias
    if act == "swiglu":
        y = F.silu(y[:, :N]) * y[:, N:]
    elif act:
        y = F.gelu(y, approximate="tanh") if act == "gelu" else F.logsigmoid(y)
    out = fast.fused_linear(x, weight, bias, (gain, shift), 0.3, gate, act, residual)
    assert rmse(out, y + residual) < 1e-5


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("layers", ["L", "A"])
def test_kernels_read_a_token_of_an_odd_model(layers, monkeypatch):
    """Two heads share each k and v, the width is 24, and norms add 0.3: the kernels give the plain logits."""
    monkeypatch.setattr(fast, "has_kernels", lambda x, *sizes: True)
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    model = tiny(dtype=torch.float32, layers=layers, n_embd=24, linear_kv_head=2, norm="layer", norm_eps=0.3,
                 **biases).to(DEVICE)
    states = [model.init_state(2, 9) for _ in range(2)]
    for idx in some_ids(3, 2, 1).to(DEVICE):
        plain, fused = model.hidden(idx, states[0]), fast.read(model, idx, states[1])
        assert rmse(fused, plain) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="Triton's interpreter cannot do bf16: this law needs a GPU")
@pytest.mark.parametrize("shape", ["head", "token", "channel"])
def test_decays_in_bf16_are_their_values(shape):
    """Decays that bf16 holds exactly give the scan and gradients of the same decays in float32."""
    q, k, v, g, state = (x.bfloat16() for x in inputs(shape, 100, dtype=torch.float32))
    state = state.float()
    for out, ref in zip(scan([q, k, v, g, state], "triton"), scan([q, k, v, g.float(), state], "triton")):
        assert rmse(out, ref) < 4e-2                                        # sums of rounded terms


@needs_triton
def test_each_kind_of_scan_has_its_own_warning(monkeypatch):
    """A kind of scan that Triton cannot compile warns once. Another kind is tried, and warns for itself."""
    def give_up(*_):
        raise kernel.triton.TritonError("out of resource")
    for name, value in dict(_not_compiled=set(), _pick_backend=lambda *_: "triton", _triton_forward=give_up,
                            interpreted=lambda: False).items():
        monkeypatch.setattr(kernel, name, value)
    with pytest.warns(UserWarning) as warned:
        for K in (24, 16, 24):
            tensors = inputs("head", 5, K=K, dtype=torch.float32)
            assert rmse(kernel.chunked_scan(*tensors)[0], kernel.scan_torch(*tensors, 1.0)[0]) < 1e-6
    wanted = "Triton cannot compile the scan (TritonError): PyTorch runs it, slower"
    assert [str(warning.message) for warning in warned] == [wanted] * 2


def test_a_prompt_is_read_in_segments():
    """A prompt is read in segments, of 1,024 tokens on a CPU, and progress is told the size of each."""
    model = tiny(dtype=torch.float32)
    for n, segment, sizes in ((25, 10, [10, 10, 5]), (1500, None, [1024, 476])):
        told = []
        read = fast.prefill(model, some_ids(n), model.init_state(1, n), segment, told.append)
        assert told == sizes
        assert rmse(read, model(some_ids(1, n))[0][:, -1:]) < 1e-4


def test_a_teacher_writes_only_ids_of_its_tokenizer():
    """Ids from n_vocab on, and ids that no token has, are in no document that a teacher writes. A document is
    no longer than the texts that the teacher was trained on."""
    model = tiny(dtype=torch.float32, layers="AA")
    known = set(range(0, 50, 2))
    tokenizer = types.SimpleNamespace(end=0, bos=None, stops={0}, n_vocab=50, config={},
                                      holes=sorted(set(range(50)) - known))
    documents = list(writer.teacher_documents(model, tokenizer, 2000, rows=8))
    written = np.concatenate(documents)
    assert set(written.tolist()) == known and len(written) >= 2000
    assert max(map(len, documents)) <= model.config.max_len == 48
    assert all(ids[-1] == 0 and not (ids[:-1] == 0).any() for ids in documents)


# ---- sample.py ---------------------------------------------------------------------------------------------


def sampled(model, stops, *flags):
    """The ids that sample.py writes after a prompt. A document ends with id 99, a text with any of stops."""
    args = sample.get_args(["--prompt", "a", "--tokens", "40", "--device", "cpu", *flags])
    characters = types.SimpleNamespace(push=str, flush=str)
    tokenizer = types.SimpleNamespace(stops=stops, end=99, n_vocab=61, holes=[], decode=str,
                                      stream_decoder=lambda: characters)
    return sample.write(args, tokenizer, model, model.init_state(1, 43), [1, 2, 3])[0]


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.7, seed=3), dict(temperature=1.5, seed=4, top_k=20),
    dict(temperature=2.5, seed=4, top_p=0.9)], ids=str)
def test_sample_writes_what_generate_says(options, capsys):
    """sample.py's ids are those of HypeNet.generate with its temperature, seed, top-k and top-p."""
    model = tiny(dtype=torch.float32)
    flags = [word for name, x in options.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    assert sampled(model, {99}, *flags) == model.generate([[1, 2, 3]], 40, **options)[0]


def test_every_stop_id_ends_the_text(capsys):
    """Whichever of the tokenizer's stop ids comes first ends the text, and is not part of it."""
    model, flags = tiny(dtype=torch.float32), ("--temperature", "1", "--seed", "5")
    ids = sampled(model, {99}, *flags)
    for n in (7, 12, 39):
        assert sampled(model, {ids[n], 99}, *flags) == ids[:ids.index(ids[n])]


# ---- a run's clock, signals, files -------------------------------------------------------------------------


def test_a_second_signal_stops_at_once(tmp_path, capsys):
    """The first SIGINT or SIGTERM asks for the end, the second raises. close() gives both back."""
    before = [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)]
    for first in signal.SIGINT, signal.SIGTERM:
        a_run = run.Run(str(tmp_path), resumes(tmp_path))
        signal.raise_signal(first)
        assert a_run.asked and "second signal" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        a_run.close()
    assert [signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)] == before


def test_seconds_count_on_over_a_resume(tmp_path):
    """A run that goes on after 100 seconds has taken more than 100, and not the time between."""
    a_run = run.Run(str(tmp_path), resumes(tmp_path))
    a_run.began -= 100
    a_run.save()
    a_run.close()
    done = json.loads((tmp_path / "run.json").read_text())["done"]
    again = run.Run(str(tmp_path), resumes(tmp_path))
    again.close()
    assert done["seconds"] >= 100 and done["seconds"] <= again.seconds() < 130


def test_the_loss_that_is_shown_goes_on_over_a_resume(tmp_path, capsys):
    """The mean of the loss after a stop and a resume is that of a run without a stop."""
    def shown(folder, stop):
        module = torch.nn.ParameterList([torch.zeros(1)])

        def loss_fn(idx, targets):
            if idx[0, 0] == stop:
                signal.raise_signal(signal.SIGTERM)
            yield module[0].sum() * 0 + 10.0 * idx[0, 0]
        for _ in range(1 + (stop is not None)):
            with contextlib.suppress(SystemExit):
                train(tmp_path / folder, dict(distil=a_plan(8 * 4, 2, 2)), module, loss_fn, Rows())
            stop = None
        return re.search(r"8/8 \| loss (\S+)", capsys.readouterr().out)[1]
    assert shown("whole", None) == shown("stopped", 4)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path, capsys):
    """A stage that was stopped within step 4 goes on, and its line names step 6 of the whole stage."""
    module = torch.nn.ParameterList([torch.zeros(1)])
    stops = [3]

    def loss_fn(idx, targets):
        if idx[0, 0] in stops:
            stops.clear()
            signal.raise_signal(signal.SIGTERM)
        yield module[0].sum() + (math.inf if idx[0, 0] == 5 else 0)
    stages = dict(distil=a_plan(8 * 4, 2, 2))
    with pytest.raises(SystemExit):
        train(tmp_path, stages, module, loss_fn, Rows())
    with one_line("distil", "at step 6", "distil.pt"):
        train(tmp_path, stages, module, loss_fn, Rows())


def test_a_signal_in_a_measurement_ends_the_run_after_it(tmp_path, capsys):
    """Ctrl-C while something is measured: the result is kept, the run ends with status 130, and goes on."""
    a_run = run.Run(str(tmp_path), resumes(tmp_path))
    with pytest.raises(SystemExit) as stop:
        a_run.once("fit", lambda: signal.raise_signal(signal.SIGINT) or [1.5])
    a_run.close()
    again = run.Run(str(tmp_path), resumes(tmp_path))
    again.close()
    assert stop.value.code == 130 and again.once("fit", lambda: pytest.fail("measured again")) == [1.5]


def test_the_log_line_has_the_speed_of_a_step(tmp_path, capsys):
    """tok/s is the tokens of one step over its milliseconds. Each checkpoint keeps the seconds so far."""
    module = torch.nn.ParameterList([torch.zeros(1)])

    def loss_fn(idx, targets):
        time.sleep(0.03)
        yield module[0].sum()
    train(tmp_path, dict(distil=a_plan(4 * 400, 100, 4)), module, loss_fn, Rows())
    lines = re.findall(r"\| (\d+) ms \| ([\d,]+) tok/s", capsys.readouterr().out)
    assert len(lines) == 4
    assert 0.12 < json.loads((tmp_path / "run.json").read_text())["done"]["seconds"] < 60
    for ms, speed in lines:
        assert int(speed.replace(",", "")) == pytest.approx(400 * 1000 / int(ms), rel=0.05)


def test_a_run_goes_on_with_its_own_text_alone(tmp_path):
    """Each source of a text counts for its name. A run does not go on with a text of another name."""
    names = set()
    for changed in None, "a.jsonl", "b.jsonl":
        for n, name in enumerate(("a.jsonl", "b.jsonl")):
            write_documents(tmp_path / name, some_documents(300 + 50 * n + (name == changed)))
        data = [f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.jsonl:0.5"]
        names.add(text.Corpus(Tokenizer.bytes(), data, cell=32).facts["sha256"])
    assert len(names) == 3
    a_run = run.Run(str(tmp_path / "run"), {})
    a_run.once("text", lambda: dict(sha256="as it was"))
    corpus, args = types.SimpleNamespace(facts=dict(sha256="altered")), options(resume="out/x", pretrain=True)
    with one_line("--resume out/x", "text has changed"):
        cli.execute(halo, a_run, None, corpus, {}, args)


def test_a_new_run_takes_an_empty_folder(tmp_path):
    """An empty folder is free, by name or by default. A default that is in use gets the next number."""
    folder = str(tmp_path / "run")
    for asked in folder, None:
        assert run.new_folder(asked, folder) == folder
    os.mkdir(folder)
    for asked in folder, None:
        assert run.new_folder(asked, folder) == folder
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "run-2").touch()
    assert run.new_folder(None, folder) == f"{folder}-3"
    with one_line("--resume"):
        run.new_folder(folder, "x")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077], ids=oct)
def test_written_files_have_the_mode_of_the_umask(mask, tmp_path):
    """Whoever may read other files of the user may read a model too: modes are 666 without the umask."""
    before = os.umask(mask)
    try:
        tiny(dtype=torch.float32).save_pretrained(tmp_path)
        Tokenizer.bytes().save(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask} and len(list(tmp_path.iterdir())) >= 3


def test_an_error_of_the_disk_names_the_file(tmp_path):
    """An error without a file, as of a full disk, gets the name of the file that was to be written."""
    def full(tmp):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError) as error:
        hypenet.write_file(str(tmp_path / "a.json"), full)
    assert error.value.filename == str(tmp_path / "a.json") and not os.listdir(tmp_path)


# ---- flags -------------------------------------------------------------------------------------------------


def test_a_budget_multiplies_the_tokens_of_every_stage():
    """--budget 0.5 halves the tokens of every stage. --plan has the last word."""
    def tokens(*argv):
        plans = cli.settle(halo, cli.get_args(halo, ["--device", "cpu", *argv]))
        return {stage: plan.tokens for stage, plan in plans.items()}
    half = {stage: n / 2 for stage, n in tokens().items()}
    assert tokens("--budget", "0.5") == half
    assert tokens("--budget", "0.5", "--plan", "distil.tokens=300") == half | dict(distil=300)


def test_a_teacher_that_is_trained_first_has_the_options_of_the_run(monkeypatch, capsys):
    """Seed, device, text and plan of a conversion are also those of the teacher that it trains first."""
    made = []
    monkeypatch.setattr(cli, "run_main", lambda halo, argv: made.append(argv))
    given = "--teacher mini --seed 7 --device cpu --data a.txt --plan pretrain.tokens=9 distil.tokens=8"
    args = cli.get_args(halo, given.split())
    args.path = "out/mini-teacher"
    cli.make_teacher(halo, args)
    got = cli.get_args(halo, made[0])
    assert (got.pretrain, got.teacher, got.out, got.seed, got.device, got.data, got.plan) == (
        True, "mini", "out/mini-teacher", 7, "cpu", ["a.txt"], ["pretrain.tokens=9"])


def test_the_text_of_a_run_is_cut_for_its_longest_sequence(tmp_path):
    """Stages of 16 and 32 tokens get rows of 17 and 33 ids out of cells of 32."""
    write_documents(tmp_path / "text.jsonl", some_documents())
    plans = dict(distil=a_plan(160, 16, 2), finetune=a_plan(320, 32, 2))
    args = types.SimpleNamespace(tokenizer=Tokenizer.bytes(), data=[str(tmp_path)], seed=0)
    corpus = cli.open_text(plans, 100, None, args)
    shapes = [corpus.rows(stage, plan)(0).shape for stage, plan in plans.items()]
    assert corpus.cell == 32 and shapes == [(2, 17), (2, 33)]


@pytest.mark.parametrize("recipe, changes, longest", [
    ("paper", dict(logit_base="none"), 64 * 96), ("paper", dict(logit_base="fit"), 8001),
    ("article", dict(max_ctx=1000), 16 * 96), ("article", dict(max_ctx=5000), 5017)])
def test_the_text_is_enough_for_the_longest_measurement(recipe, changes, longest):
    """The report asks at up to 64 times the length, fitting at 4 times that of stage 3. A student is asked
    for no more than it knows, and a teacher for 16 times."""
    args = options(recipe, length=96, pretrain=False, **changes)
    config = tiny(layers="AAAA", max_len=96).config
    plans = dict(finetune=a_plan(9000, 2000, 1))
    assert cli.longest_text(halo, config, plans, args) == longest


# ---- what a run will cost ----------------------------------------------------------------------------------


def test_a_lack_of_memory_is_no_lost_process():
    """PyTorch's error for memory is a RuntimeError, as are those of a lost process."""
    with pytest.raises(torch.OutOfMemoryError), world.talk():
        raise torch.OutOfMemoryError
    with pytest.raises(world.Lost), world.talk():
        raise RuntimeError


@pytest.mark.parametrize("weight", [0, 5e6])
def test_hours_are_operations_over_the_measured_rate(weight, monkeypatch):
    """Hours are 8 operations per parameter and token, at half the rate of a product of 2^30 in a second."""
    seconds = iter(range(100))
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(seconds))
    params = weight / 2 or HypeNet(halo.TEACHERS["mini"]).n_params()
    with one_line(f"about {8 * params * 3e8 / 2 ** 30 / 3600:,.1f} hours"):
        cli.check_hours(halo, types.SimpleNamespace(teacher="mini", pretrain=False), "mini", weight, 3e8)


def test_a_probe_tells_the_speed_of_a_stage():
    """A probe tells the rows at once, the tokens of a second, and the peak in GB: here of this process."""
    module = torch.nn.ParameterList([torch.zeros(1)])

    def loss_fn(idx, targets):
        time.sleep(0.03)
        yield module[0].sum()
    probe = run.Probe(dict(micro=None, plain=True), 61)
    halo.train(probe, "group2", a_plan(1e6, 100, 16), Rows(), module, [[module[0]]], loss_fn)
    (stage, (rows, speed, peak)), = probe.found.items()
    assert (stage, rows) == ("group", 16) and 0.2 < speed / (16 * 100 / 0.03) <= 1
    assert 0.1 < peak < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


@pytest.mark.parametrize("recipe", halo.RECIPES)
def test_a_run_takes_the_disk_that_was_forecast(recipe, home, tmp_path, monkeypatch):
    """At its fullest moment the folder of a run takes what disk_bytes says, to a fifth."""
    forecast, most = [], [0]

    def check_disk(folder, n_bytes):
        forecast.append(n_bytes)

    def replace(tmp, path, plain=os.replace):
        most.append(sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file()))
        plain(tmp, path)
    monkeypatch.setattr(cli, "check_disk", check_disk)
    monkeypatch.setattr(os, "replace", replace)
    every_step = property(lambda stage: -1, lambda stage, seconds: None)
    monkeypatch.setattr(run.Stage, "pause", every_step, raising=False)
    more = ["--layers", "ends", "--trials", "1"] + ["--max-ctx", "6200"] * (recipe == "article")
    convert(home, tmp_path / "run", "--recipe", recipe, *more, steps=3)
    assert max(most) == pytest.approx(forecast[0], rel=0.2)


def test_the_table_has_the_numbers_of_the_report(capsys):
    """The table of a conversion shows the report's numbers: shares in percent, seconds in minutes."""
    reports.print_report(dict(
        layers="LALA", params=dict(teacher=1234, student=1300), val_loss=dict(teacher=1.5, student=1.625),
        kl=0.0625, top1_agreement=0.875, tokens=12345, seconds=90, peak_gb=2.5, logit_base=500.0,
        passkey=dict(teacher={"64": 1.0, "999": None}, student={"64": 0.5, "999": 0.25})))
    assert [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()] == [
        ["teacher", "student"], ["layers", "AAAA", "LALA"], ["parameters", "1,234", "1,300"],
        ["held-out loss, nats a token", "1.5000", "1.6250"], ["KL to the teacher, nats a token", "0.0625"],
        ["same likeliest next token", "87.5%"], ["pass key found in 64 tokens", "100%", "50%"],
        ["pass key found in 999 tokens", "-", "25%"],
        ["12,345 training tokens, 1.5 minutes, peak memory 2.5 GB, logit base 500"], [""]]


def test_the_model_of_a_group_is_usable(tmp_path, monkeypatch, capsys):
    """sample.py reads what a progressive run leaves after each group: model and tokenizer."""
    monkeypatch.setattr(reports, "losses", lambda *_: torch.tensor([1.25, 1.75]))
    model, tokenizer = tiny(dtype=torch.float32, vocab_size=256), Tokenizer.bytes()
    corpus = types.SimpleNamespace(tokenizer=tokenizer, held_out_batches=lambda *_: None)
    a_run = types.SimpleNamespace(path=lambda name: str(tmp_path / name))
    args = types.SimpleNamespace(length=8, eval_windows=2)
    assert reports.save_usable(a_run, "group1", "group 1 of 2", model, corpus, args) == 1.5
    given = ["--model", str(tmp_path / "group1"), "--prompt", "a", "--device", "cpu"]
    loaded = sample.load(sample.get_args(given))
    assert loaded[0].spec == tokenizer.spec and loaded[1].config == model.config


@pytest.mark.parametrize("hybrid, lengths", [(False, ["8"]), (True, ["8", "128", "512"])])
def test_a_pretrained_model_is_stored_in_bf16_and_measured(hybrid, lengths, tmp_path, monkeypatch, capsys):
    """A new teacher is asked at its own length, a hybrid at 16 and 64 times that too. Its file is in bf16."""
    monkeypatch.setattr(reports, "losses", lambda *_: torch.tensor([1.25, 1.75]))
    monkeypatch.setattr(reports, "shares", lambda model, corpus, lengths, args: dict(
        passkey={str(n): 0.5 for n in lengths}))
    model, a_run = tiny(dtype=torch.float32), run.Run(str(tmp_path), resumes(tmp_path))
    a_run.close()
    corpus = types.SimpleNamespace(facts={}, held_out_batches=lambda *_: None)
    args = types.SimpleNamespace(tokenizer=Tokenizer.bytes(), length=8, eval_windows=2, hybrid=hybrid,
                                 teacher="tiny", device="cpu")
    reports.finish_pretrained(a_run, model, corpus, args)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passkey"] == {n: 0.5 for n in lengths} and report["val_loss"] == 1.5
    size = sum(2 * w.numel() for w in model.state_dict().values())
    assert size < (tmp_path / "model.safetensors").stat().st_size < 1.5 * size
