"""The measurements of models, and the tables that show them.

    token_scores, measure, losses, compare    loss, KL and agreement on held-out text
    shares                      the share of hidden things that a model finds, by context length
    print_scores, print_report  the tables of a run
    finish, finish_pretrained   the end of a run: report.json, the files of the model, the last table
    announce, print_costs       for sample.py: a line on the model, then its speed and memory
"""
import itertools
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hypenet import State
from support import world
from support.common import write_json
from support.recall import has_room, recall
from support.run import bf16, by_slices, peak_gb

# ---- loss and agreement ------------------------------------------------------------------------------------


def token_scores(logits, targets):
    """Scores of each token (..., 1 or 4), for targets (...). The logits (...,V) of one model give the loss
    in nats. Those of teacher and student give both losses, KL(teacher, student), and 1 where both models find
    the same next token likeliest, else 0."""
    logs = [x.float().log_softmax(-1) for x in logits]
    out = [-log.gather(-1, targets[..., None])[..., 0] for log in logs]
    if len(logs) > 1:
        t, s = logs
        out.append(F.kl_div(s, t, reduction="none", log_target=True).sum(-1))
        out.append((t.argmax(-1) == s.argmax(-1)).float())
    return torch.stack(out, -1)


@torch.no_grad()
def measure(models, batches):
    """The means of token_scores over each sequence, (sequences, 1 or 4): of one model, or of teacher and
    student."""
    def one(targets, *xs):
        return token_scores([model.head(x) for model, x in zip(models, xs)], targets)       # (n, 1 or 4)
    device = models[0].wte.weight.device
    means = []
    for idx, targets in world.split(batches):
        idx, targets = idx.to(device), targets.to(device)
        with bf16():
            xs = [model.hidden(idx).flatten(0, 1) for model in models]
            scores = torch.cat(by_slices(one, models[0].config.vocab_size, targets.flatten(), *xs))
        means.append(scores.unflatten(0, idx.shape).mean(1).cpu())
    return torch.cat(world.gather(means))


def losses(model, batches):
    """The mean loss of each sequence, in nats per token."""
    return measure([model], batches)[:, 0]


def compare(teacher, student, batches):
    """The four numbers of `measure` as means over all tokens, by name."""
    t, s, kl, same = measure([teacher, student], batches).mean(0).tolist()
    return dict(val_loss=dict(teacher=t, student=s), kl=kl, top1_agreement=same)


# ---- recall ------------------------------------------------------------------------------------------------

# Field of report.json -> (the task of support/recall.py, the task's title in the table). The second task is
# for models that were trained to find more than pass keys.
ASKED = {"passkey": ("S1", "pass key found"), "multikey": ("multi-key", "1 of 4 keys found")}


def shares(model, corpus, lengths, args):
    """The share of answers that a model finds: {field of ASKED: {length: share}}. The share is None past the
    last position that the model knows, and where the text has no room for the task."""
    asked = list(ASKED)[:args.asked]
    found = {field: dict.fromkeys(map(str, lengths)) for field in asked}
    for field, n in tqdm([*itertools.product(asked, lengths)], desc="recall   ", dynamic_ncols=True):
        task, _ = ASKED[field]
        if n <= model.config.limit() and has_room(task, n, corpus.tokenizer):
            slow = args.device == "cpu" and n > 16 * args.length    # would take minutes
            trials = max(1, args.trials // 4) if slow else args.trials
            found[field][str(n)] = recall(model, corpus, n, trials, task=task)[1].mean().item()
    return found


def evaluate(teacher, student, corpus, args):
    """The numbers of the report. Recall is asked for at 1 to 16 times the length of distillation, and of the
    student at 64 times."""
    lengths = [n * args.length for n in (1, 2, 4, 16, 64)]
    teachers = shares(teacher, corpus, lengths[:4], args)
    students = shares(student, corpus, lengths, args)
    numbers = compare(teacher, student, corpus.held_out_batches(args.length, args.eval_windows))
    for field in students:
        numbers[field] = dict(teacher=teachers[field], student=students[field])
    return numbers


# ---- tables ------------------------------------------------------------------------------------------------


def print_scores(scores, verdicts, layers, teacher_loss):
    """The table of selection, one row per layer: the results of halo.layer_scores and of halo.priorities."""
    kinds = {"": "if linear"}
    paired = "swap_se" in scores[0]                                # both forms were measured, on one text
    if paired:
        kinds["_kept"] = "if kept"
    column = 11 if paired else 19
    width = column * len(kinds)
    titles = "".join(f"{title:>{column}s}" for title in kinds.values())
    print(f"\n     {'recall (log p)':>{width}s}{'held-out loss':>{width}s}")
    print(f"layer{titles}{titles}{'score':>10s}")
    for i, (s, (must_stay, score)) in enumerate(zip(scores, verdicts)):
        if paired:
            cells = "".join(f"{sign * s[name + kind]:11.4f}" for name, sign in (("R", 1), ("C", -1))
                            for kind in kinds)
        else:
            cells = f"{s['R']:9.3f} +- {s['R_se']:6.3f}{-s['C']:9.4f} +- {s['C_se']:6.4f}"
        note = "  (must stay: linear costs over 1 nat)" if must_stay else ""
        error = f" +- {s['swap_se']:.3f}" if paired else ""
        print(f"{i:3d} {layers[i]}{cells}{score:10.3f}{error}{note}")
    print(f"teacher's held-out loss {teacher_loss:.4f}; layers: {layers}\n")


def percent(share):
    return "-" if share is None else f"{share:.0%}"


def print_report(r):
    """The table of a conversion, from the fields of report.json."""
    params = {model: f"{n:,}" for model, n in r["params"].items()}
    width = max(10, len(params["student"]) + 1)

    def row(title, teacher, student):
        print(f"{title:34s}{teacher:>{width}s}{student:>{width}s}")
    n_layer = len(r["layers"])
    row("", "teacher", "student")
    row("layers", "A" * n_layer if n_layer + 2 <= width else "all A", f"  {r['layers']}")
    row("parameters", params["teacher"], params["student"])
    row("held-out loss, nats a token", *(f"{r['val_loss'][model]:.4f}" for model in ("teacher", "student")))
    row("KL to the teacher, nats a token", "", f"{r['kl']:.4f}")
    row("same likeliest next token", "", f"{r['top1_agreement']:.1%}")
    for field, (_, title) in ASKED.items():
        for n, share in r[field]["student"].items() if field in r else ():
            row(f"{title} in {int(n):,} tokens", percent(r[field]["teacher"].get(n)), percent(share))
    peak = f", peak memory {r['peak_gb']:.1f} GB" if r["peak_gb"] else ""
    scaling = f"logit base {r['logit_base']:g}" if r["logit_base"] else "no logit scaling"
    print(f"{r['tokens']:,} training tokens, {r['seconds'] / 60:.1f} minutes{peak}, {scaling}\n")


# ---- the end of a run --------------------------------------------------------------------------------------


def finish(run, teacher, student, corpus, args):
    """Measure a student, save it, write report.json, print the table. Returns the report."""
    report = run.once("report", lambda: dict(
        recipe=args.recipe, teacher=args.teacher, tokens=run.tokens, device=args.device, text=corpus.facts,
        layers=student.config.layers, logit_base=student.config.logit_base,
        params=dict(teacher=teacher.n_params(), student=student.n_params()),
        **evaluate(teacher, student, corpus, args), seconds=run.seconds(), peak_gb=peak_gb(args.device)))
    if world.RANK == 0:
        args.tokenizer.save(run.folder)
        student.save_pretrained(run.folder)                         # after the tokenizer that it needs
        write_json(run.path("report.json"), report)
    print_report(report)
    print(f"files in {run.folder}: model.safetensors, config.json, tokenizer.json, report.json, log.jsonl\n\n"
          f"python sample.py --model {run.folder} --ctx 65536")
    return report


def finish_pretrained(run, model, corpus, args):
    """Save and measure a model trained from random weights, write report.json, print the numbers."""
    if world.RANK == 0:
        args.tokenizer.save(run.folder)
        model.save_pretrained(run.folder, torch.bfloat16)           # last: a folder with this file is whole
    loss = losses(model, corpus.held_out_batches(args.length, args.eval_windows)).mean().item()
    lengths = [n * args.length for n in ((1, 16, 64) if args.hybrid else (1,))]
    found = shares(model, corpus, lengths, args)
    report = dict(
        teacher=args.teacher, tokens=run.tokens, device=args.device, text=corpus.facts,
        layers=model.config.layers, params=model.n_params(), val_loss=loss, **found, seconds=run.seconds())
    if world.RANK == 0:
        write_json(run.path("report.json"), report)
    print(f"\n{model.n_params():,} parameters, held-out loss {loss:.4f} nats a token, "
          f"{run.seconds() / 60:.1f} minutes")
    for field, by_length in found.items():
        for n, share in by_length.items():
            print(f"{ASKED[field][1]} in {int(n):,} tokens {percent(share)}")
    print(f"python {'sample.py --model' if args.hybrid else 'halo.py --teacher'} {run.folder}")


def save_usable(run, stage, title, student, corpus, args):
    """Save a student after a group of layers, ready for use. Returns the student's held-out loss."""
    if world.RANK == 0:
        student.save_pretrained(run.path(stage))                    # makes the folder
        corpus.tokenizer.save(run.path(stage))
    loss = losses(student, corpus.held_out_batches(args.length, args.eval_windows)).mean().item()
    print(f"{title} | held-out loss {loss:.4f} | usable: {run.path(stage)}")
    return loss


# ---- generation --------------------------------------------------------------------------------------------


def say(text):
    print(text, file=sys.stderr)


def announce(model, path, total):
    """Say which model runs. Warn if a HyPE model without s_t reads more than the paper's 16,384 tokens."""
    c = model.config
    if total > 16384 and "A" in c.layers and not (c.attn_position or c.logit_base):
        say(f"sample.py: {total:,} tokens are more than the 16,384 of the paper's training, and the model "
            "does not scale its queries: give --logit-base (paper: 500 for 2B, 600 for 5B, 900 for 9B)")
    scaled = f", logit base {c.logit_base:g}" if c.logit_base else ""
    say(f"model {path}: layers {c.layers}, {model.n_params():,} parameters{scaled}")


def size(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def print_costs(model, state, prompt, out, times):
    """Print speed and memory, and the memory that the model would need if every layer were attention."""
    read = times[1] - times[0]
    say(f"\nread {len(prompt):,} tokens in {read:.1f} s, {len(prompt) / read:,.0f} tok/s")
    if len(times) > 2:
        ms = 1000 * (times[-1] - times[1]) / (len(times) - 2)
        say(f"wrote {len(out)} tokens, {ms:.1f} ms a token")
    all_attention = replace(model.config, layers="A" * len(model.config.layers), window=None)
    dtype = model.wte.weight.dtype
    all_KV = State(all_attention, 1, state.max_tokens, "meta", dtype).nbytes()[1]     # meta: no memory
    S, KV = state.nbytes()
    say(f"memory: state {size(S)} + K/V {size(KV)}; all-attention K/V {size(all_KV)}")
