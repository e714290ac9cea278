"""The command line of halo.py: from flags to a run. halo.py imports this file, so this file cannot import
halo.py. A function that needs the tables or functions of halo.py gets the module as its first argument, halo.

    get_args    flags -> args. A row of the recipe is a flag
    settle      args -> the plan of each stage to come. Options that do not go together are refused here
    load_teacher, open_text, probe    teacher, text and memory, checked before the run begins
    run_main    all steps above in this order, then the run
"""
import argparse
import json
import math
import os
import shutil
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hypenet import DECAYS, HypeNetConfig, Weightless
from support import fast, pretrained, world
from support.common import Parser, command_line, default_device, filled, number
from support.recall import has_room, plant
from support.report import finish, finish_pretrained
from support.run import Probe, Run, new_folder, options_of
from support.text import Corpus, data_sources
from support.tokens import Tokenizer, check_tokenizer
from support.writer import teacher_text, write_together

# ---- flags -------------------------------------------------------------------------------------------------


def get_args(halo, argv):
    """The options of a command line. args.given: the flags that were written out."""
    p = Parser(prog="halo.py", description=halo.__doc__.split("\n\n")[0], epilog="eq. N: of arXiv 2601.22156")
    add = p.add_argument
    many = dict(nargs="+", action="extend")
    add("--teacher", type=filled, default="tiny",
        help="tiny: shipped, 1M parameters. mini, small (3.5M, 14M), tiny-gpt2, small-gpt2: trained first, "
             "once, on a GPU. smollm2 (from pip), gpt2, gpt2-xl, Qwen/Qwen3-1.7B, another repository of the "
             "hub, or a .gguf file: with almost the paper's plan, on a GPU. Or a folder of a GPT-2, Llama or "
             "Qwen, or of --pretrain: the plan then depends on the size of the weights")
    add("--recipe", choices=halo.RECIPES,
        help="the recipe that sets the rows below; default: paper, for real teachers real")
    add("--out", type=filled, help="folder of the run; default: out/TEACHER-RECIPE, then -2, -3, ...")
    add("--resume", type=filled, metavar="RUN",
        help="go on with the run in this folder, with the options of the run. Only --device and --plain can "
             "be given anew")
    add("--data", **many, type=filled, metavar="PATH[:WEIGHT]",
        help="text to train on. stdlib: source of Python's standard library, the default. teacher: text that "
             "the teacher writes, the default of smollm2 and .gguf files. fineweb: fetched as needed, the "
             "default of other real teachers. Or files and folders: .txt, .jsonl, .parquet (field text), .gz "
             "of the first two, .bin (llm.c's shards of GPT-2 tokens; val in the name: held out). A weight "
             "is a share of the sequences: web/:0.7 books/:0.3")
    add("--device", type=filled, help=f"cuda, mps or cpu; default here: {default_device()}")
    add("--micro", type=number(int, 1), metavar="N", help="at most N sequences go through the models at "
        "once; default: as many as fit, up to 131,072 tokens")
    add("--plain", action="store_true", help="on a GPU, neither compile operations nor record steps")
    add("--dry-run", action="store_true",
        help="print the plan, for a conversion on a GPU also memory and time, then end")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N",
        help="seed of all random choices; default: 0")
    add("--budget", type=number(float, 1e-6), default=1.0, metavar="X",
        help="multiply the tokens of each stage by X")
    add("--plan", **many, default=[], metavar="STAGE.FIELD=X",
        help="change entries of the plan, such as distil.tokens=4e6 or align.lr=1e-3")
    add("--pretrain", action="store_true",
        help=f"train a teacher ({', '.join(halo.TEACHERS)}) from random weights; with --layers a hybrid")
    add = p.add_argument_group("rows of the recipe").add_argument
    for name, values, allowed, text in halo.ROWS:
        check = dict(choices=allowed) if isinstance(allowed, tuple) else dict(type=allowed, metavar="X")
        defaults = "; ".join(f"{recipe}: {value}" for recipe, value in zip(halo.RECIPES, values))
        add("--" + name.replace("_", "-"), **check, help=f"{text} ({defaults})")
    add = p.add_argument_group("finer choices").add_argument
    add("--keep", type=number(int, 1), metavar="N",
        help=f"how many layers stay attention, with --layers {', '.join(halo.SCORED)} or even; "
        "default: a quarter")
    add("--groups", type=number(int, 0), default=0, metavar="N",
        help="groups of linear layers in a progressive run; default: one per 6 linear layers, at least 2")
    add("--transfer", choices=("on", "off"), default="on",
        help="linear layers start from the weights of attention layers (on) or random (off)")
    add("--control", action="store_true",
        help="convert nothing: the teacher itself trains as a student does in stage 3, for comparison")
    add("--max-ctx", type=number(int, 1), default=65536 + 1024, metavar="N",
        help="positions that a chunk HyPE model knows, for context and answer together; default: 66,560")
    add("--trials", type=number(int, 1, 10 ** 6), default=20, metavar="N",
        help="questions asked at each length; on a CPU a quarter of N at 64 times the length; default: 20")
    add("--eval-windows", type=number(int, 2, 10 ** 6), default=256, metavar="N",
        help="held-out sequences on which losses are measured; default: 256")
    add("--set", **many, default=[], metavar="FIELD=X",
        help="set fields of the student's HypeNetConfig, such as linear_rope=false")
    args = p.parse_args(argv)
    args.given = sorted({a.split("=")[0] for a in argv if a.startswith("--")})
    return args


def resumed(halo, args, argv):
    """The options of a run that was stopped. Only the device can change, and only --plain can be added."""
    free = "--resume", "--device", "--plain"
    given = [a for a in argv if a.startswith("--") and a.split("=")[0] not in free]
    refuse([(given, f"--resume takes its options from the run; leave out {' '.join(given)}")])
    options = vars(get_args(halo, [])) | options_of(args.resume)
    options["resume"] = args.resume
    options["device"] = args.device or options["device"]
    options["plain"] = args.plain or options["plain"]
    return argparse.Namespace(**options)


def refuse(rows):
    """ValueError with the message of the first row (wrong, message) whose `wrong` is true."""
    for wrong, message in rows:
        if wrong:
            raise ValueError(message)


# ---- flags -> plans ----------------------------------------------------------------------------------------


def settle(halo, args):
    """Fill in all values that the options leave open. Returns the plans of the stages to come. ValueError for
    options that do not go together."""
    args.hybrid = args.layers is not None         # whether --pretrain trains a hybrid
    free = args.device or args.dry_run or args.resume              # no limit of hours on a CPU
    args.device = world.join(default_device(args.device))
    args.path = halo.teacher_path(args.teacher)
    size, weight = plan_of(halo, args)
    args.recipe = args.recipe or ("real" if size == "real" else "paper")
    for name, value in halo.RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    local = args.teacher == "smollm2" or args.teacher.endswith(".gguf")       # need no hub
    if size == "real" and not args.data:
        args.data = ["teacher" if local else "fineweb"]
    args.scaled = size == "real"
    args.fused = size != "tiny" and args.device.startswith("cuda") and not args.plain
    args.changes = read_set(args.set)
    check_options(halo, args)
    args.teacher_first = args.teacher in halo.TEACHERS and not weight and not args.pretrain
    if args.pretrain:
        stages = ["pretrain"]
    elif args.control:
        stages = ["finetune"]
    else:
        stages = ["align", "distil", "finetune"] if args.training == "staged" else ["group"]
    shipped = args.path.startswith(halo.HERE)
    before = ["pretrain"] * (args.teacher in halo.TEACHERS and not shipped and not args.pretrain)
    plans = {stage: halo.PLANS[size][stage] for stage in before + stages}
    plans |= {stage: replace(plans[stage], tokens=plans[stage].tokens * args.budget) for stage in stages}
    change_plans(plans, args.plan)
    if before and not args.teacher_first:
        del plans["pretrain"]                                      # the teacher is there
    if args.device == "cpu" and not free and ("pretrain" in plans or size in ("small", "real")):
        check_hours(halo, args, size, weight, sum(plan.total for plan in plans.values()))
    # What is measured follows distil; --control is measured at distil's length, --pretrain at its own.
    first = plans.get("distil") or plans[stages[0]]
    args.varied = first.varied
    # How many of report.ASKED are measured. 1: pass keys alone, as in training. 2: one of four keys too.
    args.asked = 1 if first.recall and not first.varied else 2
    args.length = halo.PLANS[size]["distil"].length if args.control else first.length
    return {stage: plans[stage] for stage in stages}


PLAN_BYTES = dict(tiny=0, mini=4e6, small=10e6, real=100e6)     # the least bytes of weights for this plan


def plan_of(halo, args):
    """The name of a teacher's row in PLANS, and the bytes of its weights: 0 if the teacher has none yet."""
    weight = sum(file.stat().st_size for file in Path(args.path).glob("*.safetensors"))
    if args.teacher in halo.TEACHERS:
        return args.teacher.split("-")[0], weight
    if not os.path.isdir(args.path):
        return "real", weight
    return [name for name, least in PLAN_BYTES.items() if weight >= least][-1], weight


def whole(text):
    """A whole number, which may be written 4e6."""
    value = float(text)
    if value != int(value):
        raise ValueError
    return int(value)


LEAST_STEPS = 475                    # of a stage, for 1.7B; the paper's stage 3 has 477 and keeps its batch
MOST_LR = dict(align=3e-3, distil=1e-3, finetune=1e-3, group=1e-3)      # of a small teacher


def scale(plans, n_params, given):
    """Fit the paper's plan to a teacher of n_params parameters, in place; `given`: the items of --plan. The
    paper's smallest teacher has 1.7B. A smaller teacher reads fewer tokens, by the square root of its size,
    at a higher rate, at most that of MOST_LR; lr_end stays. The exponent -0.91 gives SmolLM2-135M 1e-3 and
    1e-4 in stages 2 and 3, which did well in small batches (results/README.md). A stage has at least
    LEAST_STEPS / sqrt(share) steps, if need be in smaller batches, of 8 or a multiple if possible."""
    share = min(1.0, n_params / 1.7e9)
    given = {item.partition("=")[0] for item in given}
    for stage, plan in plans.items():
        tokens = plan.tokens if f"{stage}.tokens" in given else plan.tokens * share ** 0.5
        most = max(1, int(tokens / plan.length / LEAST_STEPS * share ** 0.5))     # sequences of a step
        most = most // 8 * 8 or most                               # 2, 4 or 8 GPUs share them evenly
        lr = min(MOST_LR[stage], plan.lr * share ** -0.91)
        fitted = dict(tokens=tokens, lr=lr, batch=min(plan.batch, most))
        fitted = {field: x for field, x in fitted.items() if f"{stage}.{field}" not in given}
        plans[stage] = replace(plan, **fitted)


def cut(plan, n):
    """The plan in sequences of at most n tokens. A step keeps its tokens, as far as a multiple of 8 sequences
    does (see scale)."""
    if plan.length <= n:
        return plan
    batch = plan.batch * plan.length // n
    return replace(plan, length=n, batch=batch // 8 * 8 or batch)


PLAN_FIELDS = {                                   # the fields of halo.Plan that --plan can change
    "tokens": number(float, 1), "length": number(whole, 1), "batch": number(whole, 1),
    "lr": number(float, 1e-30), "lr_end": number(float, 0), "recall": number(float, 0, 1),
    "warmup": number(whole, 1), "varied": number(float, 0, 1), "chats": number(float, 0, 1),
    "short": number(float, 0, 0.9), "weight_decay": number(float, 0),
}


def change_plans(plans, items):
    """Change entries of plans, in place, by items STAGE.FIELD=X."""
    names = [item.partition("=")[0] for item in items]
    for item in items:
        key, _, value = item.partition("=")
        stage, _, field = key.partition(".")
        refuse([(stage not in plans, f"--plan {item}: the stages of this run are {', '.join(plans)}"),
                (field not in PLAN_FIELDS, f"--plan {item}: the fields are {', '.join(PLAN_FIELDS)}")])
        try:
            plans[stage] = replace(plans[stage], **{field: PLAN_FIELDS[field](value)})
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--plan {item}: {error}") from None
    for stage, plan in plans.items():
        shares = {f"{stage}.{name}": getattr(plan, name) for name in ("varied", "chats")}
        refuse([(name in names and x and not plan.recall,
                 f"--plan {name}={x}: a share of the recall sequences, but recall is 0")
                for name, x in shares.items()])
        refuse([(plan.short and stage != "finetune",
                 f"--plan {stage}.short={plan.short}: only finetune reads a part of a row as short texts")])


def read_set(items):
    """The items FIELD=X of --set as a dict. X is JSON, or else a string. Only students have these fields."""
    names = [field.name for field in fields(HypeNetConfig)]
    known = [name for name in names[names.index("attn_position"):] if name != "logit_base"]
    changes = {}
    for item in items:
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"--set {item}: fields are {', '.join(known)}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    return changes


def check_options(halo, args):
    """ValueError for options that do not go together."""
    layers = args.layers
    scored = layers in halo.SCORED
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
            ("--hidden", args.alpha < 1 or not args.hidden, "--alpha below 1"),
            ("--keep", scored or layers == "even", f"--layers {', '.join(halo.SCORED)} or even")):
        rows.append((flag in args.given and not possible, f"{flag} goes with {wants}"))
    rows += [(args.control and flag in args.given, f"{flag} changes a student; --control has none")
             for flag in ("--layers --decay --retention --state --pe --extras --training --keep --groups "
                          "--transfer --window --set").split()]
    if args.pretrain:
        rows += [(args.teacher not in halo.TEACHERS,
                  f"--pretrain --teacher {args.teacher}: known sizes are {', '.join(halo.TEACHERS)}"),
                 (args.hybrid and scored,
                  f"--pretrain with --layers {layers}: no teacher gives scores; use ends, even or letters"),
                 (args.transfer == "off", "--transfer off goes with a teacher, not with --pretrain")]
        rows += [(flag in args.given, f"{flag} goes with a teacher, not with --pretrain")
                 for flag in ("--alpha", "--kl", "--hidden", "--groups", "--training", "--control")]
        rows += [(flag in args.given and not args.hybrid, f"--pretrain {flag} goes with --layers: a hybrid")
                 for flag in ("--decay --retention --state --pe --extras --window --logit-base --max-ctx "
                              "--keep --set").split()]
    else:
        rows += [(not staged and scored,
                  f"--training progressive with --layers {layers}: no stage 1 for scores; use ends or even"),
                 (not staged and args.pe == "hype",
                  "--training progressive with --pe hype: attention does not train; use chunk or rope")]
    refuse(rows)


def check_hours(halo, args, size, weight, tokens):
    """ValueError that sends a long run to a GPU, with a guess at the hours on this CPU."""
    refuse([(size == "real", f"--teacher {args.teacher} is no folder of a small model, and wants a GPU; "
             "--teacher tiny runs on a CPU, --device cpu starts this run anyway")])
    with Weightless():
        params = weight / 2 or halo.HypeNet(halo.TEACHERS[args.teacher]).n_params()
    what, other = ("--pretrain ", "") if args.pretrain else ("", "--teacher tiny takes minutes, ")
    raise ValueError(f"{what}--teacher {args.teacher} wants a GPU: about {cpu_hours(params, tokens):,.1f} "
                     f"hours on this CPU; {other}--device cpu starts this run anyway")


def check_layers(halo, how, n_layer, keep):
    """ValueError if --layers (how) or --keep does not fit a teacher of n_layer layers."""
    letters = bool(how) and set(how) <= set("AL")
    refuse([(not letters and how not in (*halo.SCORED, "even", "ends"),
             f"--layers {how}: give {', '.join(halo.SCORED)}, even, ends, or a letter A or L for each layer"),
            (letters and len(how) != n_layer,
             f"--layers {how} names {len(how)} layers; the teacher has {n_layer}"),
            (keep and keep >= n_layer, f"--keep {keep} leaves no linear layer: there are {n_layer} layers")])


def check_stage_length(stage, plan, limit, args):
    """ValueError if a stage's sequences are longer than the models know, or too short for a pass key."""
    chunks = f" (--max-ctx {args.max_ctx})" if args.pe == "chunk" else ""
    refuse([(plan.length > limit,
             f"--plan {stage}.length={plan.length}: the model knows {limit} positions{chunks}")])
    if plan.recall:
        room = plan.length - int(plan.short * plan.length)             # where training_rows hides it
        check_room(args, room, f"--plan {stage}.length", f", or {stage}.recall=0")


def check_room(args, n, what, way_out=""):
    """ValueError if a text of n tokens has no room for a pass key."""
    try:
        plant(args.tokenizer, np.zeros(n, np.int64), np.random.default_rng(0))
    except ValueError as e:
        raise ValueError(f"{what}: {e}{way_out}") from None


# ---- teacher and text --------------------------------------------------------------------------------------

ROUNDS = 4                           # how often a run reads what its teacher writes: so often old text is as
                                     # good as new (arXiv 2305.16264), and writing takes longer than reading


def make_teacher(halo, args):
    """Pretrain a teacher that is not there yet, or go on with it, and keep it for later runs."""
    begun = world.of_first(os.path.exists(os.path.join(args.path, "run.json")))
    if begun and args.dry_run:
        print(f"--teacher {args.teacher} is half trained. --resume {args.path} goes on with its training, as "
              "does this command without --dry-run")
        return
    print(f"--teacher {args.teacher} is trained first, once, in {args.path}. The conversion follows.\n",
          flush=True)
    argv = ["--device", args.device] + ["--plain"] * args.plain
    if begun:
        argv += ["--resume", args.path]
    else:
        argv += ["--pretrain", "--teacher", args.teacher, "--out", args.path, "--seed", str(args.seed)]
        argv += ["--dry-run"] * args.dry_run
        argv += ["--data", *args.data] if args.data else []
        plan = [item for item in args.plan if item.startswith("pretrain.")]
        argv += ["--plan", *plan] if plan else []
    run_main(halo, argv)
    print()


def load_teacher(halo, plans, args):
    """The teacher. Options that do not fit the teacher are errors here, before stage 1. Fits the plans to the
    teacher's size. Sets args.tokenizer and args.task, which selection and the fit of logit_base measure:
    multi-key, or pass keys if training hides those or the text has no room for multi-key. Lowers args.length
    to the teacher's max_len. All is measured at this length and its multiples, because a RoPE teacher's
    max_len would take too long."""
    args.tokenizer = Tokenizer.load(args.path)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    teacher = pretrained.load(args.path, dtype, args.device).requires_grad_(False)
    check_tokenizer(args.tokenizer, teacher.config)
    if args.scaled:
        scale(plans, teacher.n_params(), args.plan)
    config = teacher.config
    n_layer = len(config.layers)
    check_layers(halo, args.layers, n_layer, args.keep)
    student = config if args.control else halo.student_config(config, "L" * n_layer, args)
    choose = partial(halo.choose_layers, args.layers, n_layer, keep=args.keep)
    refuse([("L" in config.layers, f"--teacher {args.teacher} is a hybrid, {config.layers}: not a teacher"),
            (args.layers not in halo.SCORED and "L" not in choose() and not args.control,
             f"--layers {args.layers} leaves nothing to convert"),
            (student.key_dim > config.head_dim or student.linear_kv_head % config.n_kv_head,
             f"--set: key_dim is at most the teacher's head_dim, {config.head_dim}, and linear_kv_head a "
             f"multiple of its n_kv_head, {config.n_kv_head}")])
    both = min(config.max_len, student.limit())
    given = {item.partition("=")[0] for item in args.plan}
    for stage, plan in plans.items():
        if stage != "finetune" and f"{stage}.length" not in given:     # the teacher reads whole sequences
            own = dict(batch=plan.batch) if f"{stage}.batch" in given else {}
            plan = plans[stage] = replace(cut(plan, config.max_len), **own)
        limit = dict(align=config.max_len, finetune=student.limit()).get(stage, both)
        check_stage_length(stage, plan, limit, args)
        refuse([(plan.short and plan.length // 32 > config.max_len,
                 f"--plan {stage}.length={plan.length}: its short texts have {plan.length // 32} tokens, and "
                 f"the teacher knows {config.max_len}; give a lower length, or {stage}.short=0")])
    args.length = min(config.max_len, args.length)
    check_room(args, args.length, f"recall is measured in {args.length} tokens, as many as distil.length")
    hides = any(plan.recall and plan.varied < 1 for plan in plans.values())
    args.task = "S1" if hides or not has_room("multi-key", args.length, args.tokenizer) else "multi-key"
    if args.task == "multi-key":
        args.varied = 0.0                                          # multi-key alone is asked for
    return teacher


def config_to_pretrain(halo, plans, args):
    """The config of a teacher to train. Sets args.tokenizer and args.task, as load_teacher does."""
    config = halo.TEACHERS[args.teacher]
    args.tokenizer, args.task = Tokenizer.bytes(), "S1"
    check_stage_length("pretrain", plans["pretrain"], math.inf, args)
    if args.hybrid:
        check_layers(halo, args.layers, len(config.layers), args.keep)
    return config


def longest_text(halo, config, plans, args):
    """The longest text, in tokens, that a measurement of the run reads at once. Training does not count."""
    if args.pretrain:
        return args.length * (64 if args.hybrid else 1) + 1
    longest = 64 * args.length
    if args.logit_base == "fit":
        longest = max(longest, halo.fit_length(plans, args.length) + 1)
    student = config if args.control else halo.student_config(config, "L" * len(config.layers), args)
    students = student.limit()
    return max(min(longest, students + 1), min(16 * args.length, config.limit()))     # the teacher reads less


def open_text(plans, longest, teacher, args):
    """The Corpus of a run. Too little text is an error here, before stage 1."""
    n_tokens = max(20 * longest, sum(plan.total for plan in plans.values()) / ROUNDS)

    def order(share):                                              # what --data teacher asks for
        return teacher, args.path, args.tokenizer, share * n_tokens, args.seed

    def write(share):
        return teacher_text(*order(share), args.dry_run)
    for paths, share in data_sources(args.data or []):
        if teacher and "teacher" in paths and not args.dry_run and world.SIZE > 1:
            write_together(*order(share))

    def corpus():
        cell = max(plan.length for plan in plans.values())
        found = Corpus(args.tokenizer, args.data, args.seed, cell, write=teacher and write)
        found.windows(np.random.default_rng(0), 1, longest)
        return found
    return world.in_turn(corpus)


# ---- what a run will cost ----------------------------------------------------------------------------------


def probe(halo, teacher, corpus, plans, args):
    """The cost of each stage on this device, as in Probe.found. ValueError if a stage does not fit."""
    run = Probe(vars(args), args.tokenizer.n_vocab)
    try:
        halo.method(args)(run, teacher, corpus, plans, args)
    except torch.OutOfMemoryError:
        way_out = "more --groups" if "group" in plans else "--recipe article, which trains groups of layers,"
        raise ValueError(f"weights, gradients and optimizer state exceed the memory of {args.device}; give "
                         f"{way_out} or a smaller --teacher") from None
    return run.found


def disk_bytes(halo, teacher, plans, args):
    """The bytes that a run writes. Adam's state and the weights are 12 bytes per trained parameter, twice,
    because an old checkpoint stays until the new one is written. A stage that has ended keeps 4. The student,
    and in a progressive run the model of each group, take 4 per parameter. Parameters are counted as if all
    layers were linear, with their gates."""
    config = teacher.config if args.control else halo.student_config(
        teacher.config, "L" * len(teacher.config.layers), args)
    with Weightless():
        n_params = halo.HypeNet(config).n_params()
    n_groups = 0
    if "group" in plans:
        layers = halo.choose_layers(args.layers, len(teacher.config.layers), keep=args.keep)
        n_groups = len(halo.groups_of(layers, args.groups))
    return (28 / max(1, n_groups) + 4 * (1 + n_groups)) * n_params


def check_disk(folder, n_bytes):
    """ValueError if the disk of a folder, which need not exist yet, has less room."""
    parent = next(p for p in (Path(folder).absolute() / "x").parents if p.exists())
    free = shutil.disk_usage(parent).free
    if n_bytes > free:
        raise ValueError(f"checkpoints and student need {n_bytes / 1e6:,.0f} MB of disk, {parent} has "
                         f"{free / 1e6:,.0f} MB; let --out name a folder on a larger disk")


def cpu_hours(params, tokens):
    """A guess at the hours that training takes on this CPU: 8 operations per parameter and token, at half the
    rate of a large matrix product."""
    a, b = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    rate = 2 * 1024 ** 3 / min(seconds)
    return 8 * params * tokens / (rate / 2) / 3600


def print_plan(corpus, plans, found):
    """Print the text of a run, and one row per stage. `found`, of a Probe, adds memory, speed and time."""
    total = sum(plan.total for plan in plans.values())
    for paths, share, source in zip(corpus.paths, corpus.shares, corpus.sources):
        n = sum(source.sizes)
        read = share * total
        rounds = f" ({read / n:.1f} rounds, each in a new order)" if read > n else ""
        print(f"text {' '.join(paths)}: {n:,} tokens to train on, of which this run reads {read:,.0f}{rounds}"
              f"; {len(source.held_out):,} held out")
    seconds = sum(plan.total / found[name][1] for name, plan in plans.items()) if found else 0
    unit, in_unit = ("hours", 3600) if seconds >= 3600 else ("minutes", 60)
    header = f"{'stage':9s}{'tokens':>14s}{'steps':>8s}{'length':>7s}{'batch':>7s}  learning rate"
    print(header + f"{'at once':>9s}{'peak GB':>9s}{'tok/s':>11s}{unit:>9s}" * bool(found))
    for name, plan in plans.items():
        row = f"{name:9s}{plan.total:14,}{plan.steps:8,}{plan.length:7,}{plan.batch:7,}"
        row += f"  {f'{plan.lr:.0e}->{plan.lr_end:.0e}':13s}"
        if found:
            at_once, speed, peak = found[name]
            row += f"{at_once:9,}{peak:9.1f}{speed:11,.0f}{plan.total / speed / in_unit:9.2f}"
        print(row.rstrip())
    if found:
        print(f"{seconds / in_unit:.1f} {unit} in all, without measuring. at once: sequences of a batch that "
              "go through\ntogether; the others follow, with the same result")
    print(flush=True)


# ---- the run -----------------------------------------------------------------------------------------------


def run_main(halo, argv):
    """Do everything that a command line asks for."""
    args = get_args(halo, argv)
    if args.resume:
        args = resumed(halo, args, argv)
    options = dict(vars(args))
    plans = settle(halo, args)
    if args.teacher_first:
        make_teacher(halo, args)
        if args.dry_run:
            return
    fast.fuse((vars(halo), "relative_error"), backend="inductor" if args.fused else None)
    name = os.path.basename(os.path.normpath(args.teacher))
    folder = args.resume or world.of_first(new_folder(args.out, os.path.join("out", f"{name}-{args.recipe}")))
    teacher = None if args.pretrain else world.in_turn(partial(load_teacher, halo, plans, args))
    config = teacher.config if teacher else config_to_pretrain(halo, plans, args)
    if teacher and not args.resume:
        check_disk(folder, disk_bytes(halo, teacher, plans, args))
    longest = longest_text(halo, config, plans, args)
    corpus = open_text(plans, longest, teacher, args)
    found = {}
    if args.device.startswith("cuda") and teacher and not args.resume:
        found = probe(halo, teacher, corpus, plans, args)
        torch.cuda.reset_peak_memory_stats(args.device)
    print(f"teacher {args.teacher}: {len(config.layers)} layers, trained at {config.max_len} tokens | "
          f"recipe {args.recipe} | device {args.device} | run {folder}")
    print_plan(corpus, plans, found)
    if world.SIZE > 1:
        print(f"{world.SIZE} processes share the rows of each batch. Each holds whole models, unless parts "
              "are named above.\n")
    if not args.dry_run:
        execute(halo, Run(folder, options), teacher, corpus, plans, args)


def execute(halo, run, teacher, corpus, plans, args):
    """The run itself: pretraining, or a conversion and its report."""
    stages = {stage: vars(plan) for stage, plan in plans.items()}
    recipe = {row[0]: getattr(args, row[0]) for row in halo.ROWS}
    weights = None if args.pretrain else pretrained.digest(args.path)
    try:
        refuse([(run.once("teacher", lambda: weights) != weights,
                 f"--resume {args.resume}: the teacher's files have changed meanwhile; start a new run"),
                (run.once("text", lambda: corpus.facts)["sha256"] != corpus.facts["sha256"],
                 f"--resume {args.resume}: the text has changed meanwhile; start a new run"),
                (run.once("plans", lambda: stages) != stages,
                 f"--resume {args.resume}: its stages are not those of this version; start a new run"),
                (run.once("recipe", lambda: recipe) != recipe,
                 f"--resume {args.resume}: its recipe is not that of this version; start a new run")])
        if args.pretrain:
            finish_pretrained(run, halo.pretrain(run, corpus, plans, args), corpus, args)
        else:
            finish(run, teacher, halo.convert(run, teacher, corpus, plans, args), corpus, args)
    finally:
        run.close()


def main(halo, argv):
    """run_main with every error as one line."""
    def run(argv):
        try:
            run_main(halo, argv)
        except torch.OutOfMemoryError:                             # rare in training: see within_memory
            raise ValueError("the device ran out of memory: take a smaller --teacher or another --device"
                             ) from None
    command_line("halo.py", run, argv, lasting=True)
