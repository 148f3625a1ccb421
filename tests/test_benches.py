"""The benches: their rows, and that a wrong answer is never timed."""

from __future__ import annotations

import importlib
import json
import math
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

import flowdppo_ops

BENCHES = Path(__file__).parents[1] / "benches"
FIELDS = ["op", "shape", "dtype", "provider", "pass", "p20_us", "p50_us", "p80_us", "repeats", "bytes"]
FIELDS += ["threads", "device", "torch", "flowdppo_ops", "commit", "environment", "date", "cores_elsewhere"]


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("harness")


@pytest.fixture
def bench(harness):
    return importlib.import_module("bench_policy_loss")


def test_quick_run_writes_a_row_per_provider_and_pass(bench, tmp_path, capsys):
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    bench.main(["--quick", "--sizes", "4x8", "--threads", str(threads), "--json", str(file)])
    rows = json.loads(file.read_text())

    both = ("forward", "forward+backward")
    series = [(name, pass_) for name in ("eager", "compile", "fused") for pass_ in both] + [("copy", "copy")]
    assert [(row["dtype"], row["provider"], row["pass"]) for row in rows] == [
        (dtype, *one) for dtype in ("fp32", "bf16") for one in series
    ]
    for row in rows:
        assert list(row) == FIELDS
        assert (row["op"], row["shape"], row["threads"]) == ("policy_loss", [4, 8], threads)
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["repeats"] >= 9
        tensors = {"copy": 2, "forward": 3, "forward+backward": 6}[row["pass"]]
        assert row["bytes"] == tensors * 32 * {"fp32": 4, "bf16": 2}[row["dtype"]]
        assert row["torch"] == torch.__version__.split("+")[0]
        assert row["flowdppo_ops"] == flowdppo_ops.__version__
        assert row["cores_elsewhere"] is None or row["cores_elsewhere"] >= 0
        assert row["device"]
        assert row["environment"].startswith("malloc=")
        assert row["commit"]
        assert datetime.fromisoformat(row["date"].replace("Z", "+00:00")).tzinfo is not None

    published = file.read_text()
    assert platform.node() not in published
    assert str(BENCHES.parent) not in published
    table = capsys.readouterr().out
    assert table.count("x as fast") == 2 * 4  # per dtype: two peers, two passes
    assert table.count("two copies of one tensor") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8), (16, 256), (16, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_inputs_land_on_both_sides_of_every_comparison(bench, shape, dtype):
    """The mask is part of what is checked only if it decides something, and not by rounding."""
    i = bench.make_inputs(shape, dtype)
    out = flowdppo_ops.reference.loss(
        i.mean,
        i.old_mean,
        i.advantages,
        std=i.std,
        prev_sample=i.prev_sample,
        old_log_prob=i.old_log_prob,
        objective=bench.OBJECTIVE,
    )
    distance = out.kl / bench.KL_THRESHOLD
    assert bool(((distance > 5) | (distance < 0.2)).all())
    assert bool((distance > 5).any())
    assert bool((distance < 0.2).any())
    if math.prod(shape[1:]) >= 192:  # with fewer elements the noise decides which side of 1 a ratio is on
        assert bool((out.ratio > 1).any())
        assert bool((out.ratio < 1).any())
        row = torch.arange(shape[0])
        assert torch.equal(out.keep, (row != 2) & (row != 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_accepts_the_eager_loss(bench, dtype):
    i = bench.make_inputs((16, 256), dtype)
    bench.check(bench.Provider("eager", bench.trainer_loss), i, bench.truth(i))


def _no_mask(bench, monkeypatch, i):
    monkeypatch.setattr(bench, "KL_THRESHOLD", math.inf)
    return bench.trainer_loss(i)


def _double_gradient(bench, monkeypatch, i):
    loss = bench.trainer_loss(i)
    return 2 * loss - loss.detach()


WRONG = {
    "twice the tolerance": (lambda bench, _, i: bench.trainer_loss(i) * (1 + 2 * bench.TOLERANCE), "loss"),
    "NaN": (lambda bench, _, i: bench.trainer_loss(i) * math.nan, "loss"),
    "no mask": (_no_mask, "loss"),
    "other std": (lambda bench, _, i: bench.trainer_loss(i._replace(std=i.std * 1.01)), "loss"),
    "double gradient": (_double_gradient, "gradient"),
    "NaN gradient": (lambda bench, _, i: bench.trainer_loss(i) + 0 * (i.mean.float() * 0).sqrt().sum(), "gradient"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_check_refuses(bench, monkeypatch, wrong, dtype):
    loss, what = WRONG[wrong]
    i = bench.make_inputs((16, 256), dtype)
    expected = bench.truth(i)
    provider = bench.Provider("wrong", lambda i: loss(bench, monkeypatch, i))
    with pytest.raises(bench.WrongAnswer, match=rf"wrong: {what} is .* away from float64, wanted at most"):
        bench.check(provider, i, expected)


def test_wrong_answer_aborts_the_run_before_it_is_timed(bench, monkeypatch, tmp_path):
    file = tmp_path / "rows.json"
    half = bench.Provider("fused", lambda i: bench.trainer_loss(i) / 2)
    monkeypatch.setattr(bench, "providers", lambda: [half])
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("timed a wrong answer"))
    with pytest.raises(SystemExit, match=r"wrong answer, not timed: fused: loss is 5\.0e-01 away"):
        bench.main(["--quick", "--sizes", "4x8", "--threads", str(torch.get_num_threads()), "--json", str(file)])
    assert not file.exists()


def test_measure_times_in_blocks_and_moves_the_first_of_the_turn(harness):
    calls = []

    def clock(call, repeats):
        calls.append((call(), repeats))
        return [10.0] * repeats

    effort = harness.Effort(rounds=2, block_us=50.0, settle_us=20.0)
    samples, _ = harness.measure({"a": lambda: "a", "b": lambda: "b"}, effort, clock)
    first = [("a", 3), ("b", 3)]  # warm-up, and how long one call takes
    assert calls == [*first, ("a", 2), ("a", 5), ("b", 2), ("b", 5), ("b", 2), ("b", 5), ("a", 2), ("a", 5)]
    assert samples == {"a": [10.0] * 10, "b": [10.0] * 10}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says what other processes use")
def test_processor_time_of_another_process_is_seen(harness):
    effort = harness.Effort(rounds=1, block_us=0.0, settle_us=0.0)
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    _, cores = harness.measure({"another": lambda: subprocess.run(busy, check=True)}, effort)
    assert cores > 0.1  # it runs seven times, four of them while `measure` counts


def test_percentiles(harness):
    assert harness.percentiles([float(n) for n in range(101)]) == {"p20_us": 20.0, "p50_us": 50.0, "p80_us": 80.0}


@pytest.mark.parametrize("size", ["huge", "8", "0x8", "4x-1"])
def test_unknown_size_is_named(bench, size, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sizes", size])
    assert f"'{size}': wanted one of sd35, rows, flux, wan, small, or a shape" in capsys.readouterr().err
