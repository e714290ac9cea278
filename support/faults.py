"""Thirty faults of one line: a file, some code that stands there once, and what to put in its place.

Each fault changes something that a user would care about. Tests should fail for every fault; at most two may
pass all tests. support/torture.py puts them into the code."""

FAULTS = [
    ("halo.py", "warm = min(1.0, (step + 1) /", "warm = min(1.0, step /"),
    ("halo.py", "attn.k_norm.state_dict())\n    target", "attn.q_norm.state_dict())\n    target"),
    ("halo.py", ".repeat_interleave(times, 0).flatten(0, 1)", ".repeat(times, 1, 1).flatten(0, 1)"),
    ("halo.py", "init.normal_(twin.chunk_embd.weight, std=0.02)", "init.zeros_(twin.chunk_embd.weight)"),
    ("halo.py", "range(n_layer * 3 // 4, n_layer)", "range(n_layer * 3 // 4 + 1, n_layer)"),
    ("halo.py", "loss.std().item() / len(loss) ** 0.5", "loss.std().item()"),
    ("halo.py", "F.kl_div(s, t, reduction", "F.kl_div(t, s, reduction"),
    ("halo.py", "tokens / len(groups)", "tokens"),
    ("halo.py", "min(costs.values()) + 0.02", "min(costs.values()) + 0.2"),
    ("hypenet.py", "ordered.cumsum(-1) - ordered >= top_p", "ordered.cumsum(-1) >= top_p"),
    ("hypenet.py", "pos % config.chunk if config.chunk else pos, config.head_dim", "pos, config.head_dim"),
    ("hypenet.py", "os.chmod(tmp, mode)", "os.chmod(tmp, 0o600)"),
    ("hypenet.py", "check_weights(weights, path)\n        model.load", "model.load"),
    ("support/common.py", 'flag != "--seed"', "flag"),
    ("support/common.py", 'kind = "write" if os.access(folder, os.X_OK)', 'kind = "write" if folder'),
    ("support/run.py", 'record["step"] <= step', 'record["step"] < step'),
    ("support/run.py", "fcntl.LOCK_EX", "fcntl.LOCK_SH"),
    ("support/run.py", "json.dumps([options, done])", "json.dumps(options)"),
    ("support/run.py", "known = digest in self.run.digests(self.name)", "known = True"),
    ("support/run.py", "self.began = time.time() - self.done", "self.began = time.time() + 0 * self.done"),
    ("support/text.py", "side[-1] % 16 == 0", "side[0] % 8 == 0"),
    ("support/text.py", "range(0, max(1, len(text)), LONGEST)", "range(1)"),
    ("support/text.py", "[np.concatenate((begin, ids, end))", "[np.concatenate((ids, end))"),
    ("support/tokens.py", "[self.end, *sorted(self.stops - {self.end})]", "self.end"),
    ("support/tokens.py", "encoder.no_truncation()", "encoder.no_padding()"),
    ("support/pretrained.py", 'given.get("lightning_nkv") or c["n_kv_head"]', 'c["n_kv_head"]'),
    ("support/pretrained.py", "wanted = places[name][2][::-1 if is_conv1d(name) else 1]", "wanted = shape"),
    ("support/recall.py", "len(row) // (2 * times)", "9"),
    ("support/recall.py", "prompts[:, 4 - keep:]", "prompts[:, -keep:]"),
    ("support/writer.py", "pos.mul_(~self.begins[at])", "pos.mul_(self.begins[at] < 2)"),
]
