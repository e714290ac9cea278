"""Thirty faults of one line: a file, some code that stands there once, and what to put in its place.

Each fault changes something that a user would care about. The comment above a fault says what it does. Tests
should fail for every fault; at most two may pass all tests."""

FAULTS = [
    # A short stage never leaves its warm-up.
    ("halo.py", "(step + 1) / min(self.warmup, max(1, self.steps // 10))", "(step + 1) / self.warmup"),
    # A chunk is as long as a sequence of training.
    ("halo.py", "chunk = min(2048, teacher.max_len // 4)", "chunk = min(2048, teacher.max_len)"),
    # Linear layers keep few heads of k and v (against paper eq. 13).
    ("halo.py", "linear_kv_head=teacher.n_head)", "linear_kv_head=teacher.n_kv_head)"),
    # Every group of the article's recipe trains on the tokens of all groups.
    ("halo.py", 'tokens=plans["group"].tokens / len(groups)', 'tokens=plans["group"].tokens'),
    # Stage 3 trains on short sequences.
    ("halo.py", 'plan = plans["finetune"]\n', 'plan = plans["distil"]\n'),
    # A last micro-batch with fewer rows counts too much.
    ("halo.py", "term = term * (len(part) / len(rows))", "term = term * (at_once / len(rows))"),
    # --keep is ignored.
    ("halo.py", "k = keep or max(1, n_layer // 4)", "k = max(1, n_layer // 4)"),
    # The standard error of a mean is that of one sequence: `guarded` sees noise everywhere.
    ("halo.py", "return x.std().item() / len(x) ** 0.5", "return x.std().item()"),
    # --seed does not change the random weights of a conversion.
    ("halo.py", "torch.manual_seed(args.seed)                 # chunk", "torch.manual_seed(0)  # chunk"),
    # A teacher trained at another length says that it was trained at the usual one.
    ("halo.py", "config = replace(TEACHERS[args.teacher], max_len=args.length)",
     "config = replace(TEACHERS[args.teacher])"),
    # The residual stream of a new model grows with its depth.
    ("hypenet.py", "math.sqrt(2 * len(c.layers))", "1"),
    # A new model with forget gates forgets faster.
    ("hypenet.py", "DECAYS[c.decay].bias(0.7)", "DECAYS[c.decay].bias(0.5)"),
    # Files are as large as the weights in memory, whatever dtype was asked for.
    ("hypenet.py", 'p.detach().to("cpu", dtype)', 'p.detach().to("cpu")'),
    # The last position that a model knows is refused.
    ("hypenet.py", "if n > c.limit():", "if n >= c.limit():"),
    # A window saves no memory.
    ("hypenet.py", "n_slots = min(max_tokens, c.window or max_tokens)", "n_slots = max_tokens"),
    # Weights keep the dtype of the file.
    ("hypenet.py", "{name: w.to(dtype) for name, w in weights.items()}", "weights"),
    # A run that is killed loses its whole stage.
    ("support/run.py", "now - self.saved_at > self.pause\n", "False\n"),
    # The loss that is shown starts anew after a resume.
    ("support/run.py", 'self.mean = saved["mean"]', "self.mean = None"),
    # --micro is ignored.
    ("support/run.py", 'run.options["micro"] or max(1, most', "max(1, most"),
    # An empty folder counts as used.
    ("support/run.py", "if not os.path.exists(folder) or os.path.isdir(folder) and is_unused(folder):",
     "if not os.path.exists(folder):"),
    # --seed does not change the order of documents.
    ("support/text.py", "random.Random(seed).shuffle(order)", "random.Random(0).shuffle(order)"),
    # Every epoch reads the text in the same order.
    ("support/text.py", "self.cell * rng.permutation(n // self.cell)",
     "self.cell * np.arange(n // self.cell)"),
    # Documents run into each other.
    ("support/text.py", "end = np.array([tokenizer.end], np.int32)", "end = np.array([], np.int32)"),
    # --logit-base fit asks for the pass keys that the report asks for.
    ("support/recall.py", "np.random.default_rng([seed, length])", "np.random.default_rng([length])"),
    # Every step hides the same pass keys.
    ("support/recall.py", "zlib.crc32(stage.encode()), step])", "zlib.crc32(stage.encode())])"),
    # --budget is ignored.
    ("support/options.py", "tokens=plans[stage].tokens * args.budget", "tokens=plans[stage].tokens"),
    # A teacher that is trained first has seed 0, whatever --seed says.
    ("support/options.py", '"--seed", str(args.seed)]', '"--seed", "0"]'),
    # A long prompt is read at once, and its activations fill the memory.
    ("support/fast.py", "idx.split(segment or (16384 if idx.is_cuda else 1024), dim=1)",
     "idx.split(idx.size(1), dim=1)"),
    # Ids that no token has are generated.
    ("support/tokens.py", "self.holes = sorted(set(range(self.n_vocab)) - known)", "self.holes = []"),
    # A model of the hub lacks the stop ids of its generation_config.json.
    ("support/pretrained.py", '"config.json", "generation_config.json", "tokenizer.json",',
     '"config.json", "tokenizer.json",'),
]
