"""Laws of what bench.py measures of a run, and of how it sorts kernels."""
import pytest

import bench
from test_support import bench_prints, bench_rows, ends_in_one_line, results, tiny  # noqa: F401

RUN = "assets/tiny-student"


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_run_is_measured_with_its_teacher(mode, results, monkeypatch, capsys):  # noqa: F811
    """--model gives one row per context for the student and for the teacher of its report."""
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e10)
    bench_prints(f"{mode} --device cpu --model {bench.halo.HERE}/{RUN} --ctx 64 128 --name x", capsys)
    rows = bench_rows(results, "x")
    assert [(r["size"], r["kind"], r["context"]) for r in rows] == [
        ("tiny-student", kind, n) for kind in ("student", "teacher") for n in (64, 128)]
    assert all(r["peak_gb"] > 0 for r in rows)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_contexts_beyond_the_positions_of_a_run_are_left_out(mode, results, monkeypatch, capsys):  # noqa: F811
    """A model with learned positions gets the rows of the contexts that these reach."""
    config = bench.HypeNetConfig("A", max_len=128, n_embd=32, **bench.FAMILIES["gpt2"])
    bench.HypeNet(config).save_pretrained(results / "model")
    monkeypatch.setattr(bench, "run_of", lambda folder: dict(student=folder))
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e10)
    bench.main(f"{mode} --device cpu --model {results}/model --ctx 64 4096 --name x".split())
    assert [row["context"] for row in bench_rows(results, "x")] == [64]
    bench.main(f"{mode} --device cpu --model {results}/model --name none".split())


def test_an_estimate_is_the_sum_of_its_segments(monkeypatch):
    """A segment that takes 1 s, and 1 s more per 1,000 tokens before it: the estimate sums all segments."""
    clock, model = iter([0.0] * 9), bench.HypeNet(bench.SIZES["tiny"].teacher)
    seen = []
    monkeypatch.setattr(bench.fast, "read", lambda model, idx, state: seen.append(int(state.pos.max())))

    def once(f, device):
        f()
        return 1 + seen[-1] / 1000, next(clock)
    monkeypatch.setattr(bench, "once", once)
    starts = range(0, 10000, bench.SEGMENT)
    found = bench.estimate(model, bench.torch.device("cpu"), 10000)[0]
    assert found == pytest.approx(sum(1 + start / 1000 for start in starts)) and len(seen) == 3


def test_long_readings_are_estimated(results, monkeypatch, capsys):  # noqa: F811
    """Where the floor of a reading is above WHOLE, the row and the table say "estimated"."""
    monkeypatch.setattr(bench, "WHOLE", 0)
    text = bench_prints("prefill --device cpu --size tiny --kind teacher --ctx 64 --name x", capsys)
    assert bench_rows(results, "x")[0]["by"] == "estimated" and "teacher  estimated" in text


def test_kernels_are_sorted_by_kind():
    """Products get their names by order, where their number is right; other kernels go by their names."""
    products = bench.products_of(tiny(layers="L", decay="head"))
    assert products == ["q, k, v, gate", "forget gate", "output", "MLP up", "MLP down", "head"]
    kernels = [("nvjet_a", 1.0), ("gemvx", 2.0), ("scan_kernel", 3.0), ("nvjet_b", 4.0), ("nvjet_a", 5.0),
               ("triton_red_fused_add", 6.0), ("nvjet_a", 7.0), ("linear_kernel", 8.0)]
    found = bench.shares(kernels, products)
    assert found["forget gate"] == [2.0, 1] and found["head"] == [8.0, 1] and found["scan"] == [3.0, 1]
    assert found["norms, gates, sums"] == [6.0, 1]
    assert bench.shares(kernels[1:], products)["products"] == [26.0, 5]


@pytest.mark.parametrize("given, word", [
    ("decode --model assets/tiny-student --size tiny", "--size"), ("decode --model none", "report.json"),
    ("prefill --model none", "config.json"), ("prefill --profile --device cpu", "--profile")])
def test_errors_are_one_line(given, word, results, capsys):  # noqa: F811
    """Bad input ends with status 2 and one line that names it."""
    ends_in_one_line(bench, given.split(), word, capsys)
