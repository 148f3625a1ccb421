"""The benches: their rows, and that a wrong answer is never timed."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from compilers import needs_cxx
from golden.load import load

import flowdppo_ops

BENCHES = Path(__file__).parents[1] / "benches"
FIELDS = ["op", "shape", "dtype", "provider", "pass", "p20_us", "p50_us", "p80_us", "repeats", "bytes"]
FIELDS += ["threads", "device", "torch", "flowdppo_ops", "commit", "environment", "date", "cores_elsewhere"]
COUNTS = ["launches", "sync_warnings", "stream_syncs", "dtoh_copies", "peak_bytes"]
SEEN = ["ops", "latent_ops", "host_syncs", "latent_allocations", "bytes_moved"]
FIELDS += ["timing", "cache", *COUNTS, *SEEN]


def run(bench, *arguments):
    """A bench's command line."""
    usual = ("policy_loss",) if bench.__name__ == "bench_policy_loss" else ("sde_step_sample", "sde_step_replay")
    return importlib.import_module("runner").main(bench.__name__, "summary", bench.OPERATIONS, usual, [*arguments])


@needs_cxx
def test_quick_run_writes_a_row_per_provider_and_pass(bench, tmp_path, capsys):
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    run(bench, "--quick", "--sizes", "4x8", "--threads", str(threads), "--json", str(file))
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
        assert (row["timing"], row["cache"]) == ("call", "warm")
        assert all(row[name] is None for name in COUNTS)  # nothing is launched on a CPU
        assert all((row[name] is None) == (row["provider"] in ("compile", "copy")) for name in SEEN)
        assert row["device"]
        assert row["environment"].startswith("malloc=")
        assert row["commit"]
        assert datetime.fromisoformat(row["date"].replace("Z", "+00:00")).tzinfo is not None

    published = file.read_text()
    assert platform.node() not in published
    assert str(BENCHES.parent) not in published
    table = capsys.readouterr().out
    assert table.count("policy_loss [4, 8]") == 2
    assert table.count("x as fast") == 2 * 4  # per dtype: two peers, two passes
    assert table.count("two copies of one tensor") == 2


@needs_cxx
def test_step_loss_has_a_row_per_form_of_the_old_policy(bench, tmp_path):
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    ops, sizes = ("--ops", "step_loss"), ("--sizes", "4x8")
    run(bench, "--quick", *ops, *sizes, "--threads", str(threads), "--dtypes", "bf16+fp32", "--json", str(file))
    rows = {(row["provider"], row["pass"]): row for row in json.loads(file.read_text())}
    names = ("eager", "compile", "fused", "fused_output", "fused_residual")
    assert set(rows) == {(name, pass_) for name in names for pass_ in ("forward", "forward+backward")} | {("copy",) * 2}
    assert {row["op"] for row in rows.values()} == {"step_loss"}
    old = {"fused_output": 2, "fused_residual": 2}  # bytes an element; the mean is 4
    for (name, pass_), row in rows.items():
        source = 2 + 4 + 4  # output, sample, next sample
        forward = source + old.get(name, 4)
        assert row["bytes"] == 32 * {"copy": 8, "forward": forward, "forward+backward": forward + source + 2}[pass_]


@needs_cxx
def test_sde_step_has_a_row_per_provider_and_pass(sde_bench, tmp_path):
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    run(sde_bench, "--quick", "--sizes", "4x8", "--threads", str(threads), "--dtypes", "fp32", "--json", str(file))
    rows = {(row["op"], row["provider"], row["pass"]): row for row in json.loads(file.read_text())}
    names, replay = ("eager", "compile", "fused"), ("forward", "forward+backward")
    assert set(rows) == (
        {("sde_step_sample", name, "forward") for name in (*names, "fused_residual")}
        | {("sde_step_replay", name, pass_) for name in names for pass_ in replay}
        | {(op, "copy", "copy") for op in ("sde_step_sample", "sde_step_replay")}
    )
    moved = {key: row["bytes"] / (4 * 32) for key, row in rows.items()}
    assert moved["sde_step_sample", "fused", "forward"] == 5
    assert moved["sde_step_sample", "fused_residual", "forward"] == 5.5
    assert moved["sde_step_replay", "eager", "forward"] == 4
    assert moved["sde_step_replay", "eager", "forward+backward"] == 4 + 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(4, 8), (16, 256), (16, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_inputs_land_on_both_sides_of_every_comparison(bench, shape, dtype):
    """The mask is part of what is checked only if it decides something, and not by rounding."""
    i = bench.make_loss_inputs(shape, dtype, torch.device("cpu"))
    out = flowdppo_ops.reference.loss(
        i.mean,
        i.old_mean,
        i.advantages,
        std=i.std,
        prev_sample=i.prev_sample,
        old_log_prob=i.old_log_prob,
        objective=bench.OBJECTIVE,
    )
    assert_both_sides(bench, out, shape)


@pytest.mark.parametrize("dtype", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("form", ["old_mean", "old_output", "old_residual"])
@pytest.mark.parametrize("sampler", ["flow_sde", "cps", "dance_sde"])
def test_inputs_of_a_step_do_so_in_every_form(bench, sampler, form, dtype):
    i = bench.make_step_inputs(sampler, (16, 4, 8, 8), dtype, torch.device("cpu"))
    results = []

    def keep_result(*args, **kwargs):
        results.append(flowdppo_ops.reference.step_loss(*args, **kwargs))
        return results[-1]

    bench.package_step_loss(keep_result, sampler, form, i)
    assert_both_sides(bench, results[0], (16, 4, 8, 8))


def assert_both_sides(bench, out, shape):
    distance = out.kl / bench.KL_THRESHOLD
    assert bool(((distance > 5) | (distance < 0.2)).all())
    assert bool((distance > 5).any())
    assert bool((distance < 0.2).any())
    if math.prod(shape[1:]) >= 192:  # with fewer elements the noise decides which side of 1 a ratio is on
        assert bool((out.ratio > 1).any())
        assert bool((out.ratio < 1).any())
        row = torch.arange(shape[0])
        assert torch.equal(out.keep, (row != 2) & (row != 3))


# What computes each operation right, in the trainers' way.
SUITES = [
    ("bench_policy_loss", name, dtype)
    for name, dtype in (
        ("policy_loss", "fp32"),
        ("policy_loss", "bf16"),
        ("step_loss", "fp32"),
        ("step_loss", "bf16+fp32"),
        ("step_loss_cps", "bf16+fp32"),
        ("step_loss_dance", "bf16+fp32"),
    )
] + [
    ("bench_sde_step", f"sde_step_{name}{suffix}", "bf16+fp32")
    for name in ("sample", "replay")
    for suffix in ("", "_cps", "_dance")
]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: " ".join(suite[1:]))
def test_check_accepts_the_eager_chain(runner, case, suite):
    operation, i, expected, eager = case(*suite)
    runner.check(operation, runner.Provider("eager", eager), i, expected)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: " ".join(suite[1:]))
def test_check_refuses_each_wrong_result(runner, case, suite):
    """Twice the tolerance, NaN, a gradient too large, one result less: whichever of the results it is."""
    operation, i, expected, eager = case(*suite)

    def refused(call, what):
        with pytest.raises(runner.WrongAnswer, match=what):
            runner.check(operation, runner.Provider("wrong", call), i, expected)

    for at, name in enumerate(operation.outputs[: len(eager(i))]):
        for factor in (1 + 2.1 * runner.TOLERANCE, math.nan):

            def bent(i, at=at, factor=factor):
                outputs = list(eager(i))
                outputs[at] = outputs[at] * factor
                return tuple(outputs)

            refused(bent, f"wrong: {name} is .* away from float64, wanted at most")
    if operation.leaf:
        scaled = {at: 2 * t - t.detach() for at, t in enumerate(eager(i))}  # the value stays, the gradient doubles
        refused(lambda _: tuple(scaled.values()), "wrong: gradient is .* away from float64")
    else:
        refused(lambda i: eager(i)[:-1], "wrong: 2 results, wanted 3")


def test_check_refuses_memory_that_is_written_once(runner, case):
    """In the first call and the second, but not in the third: as graphs that are recorded and not replayed leave it."""
    operation, i, expected, eager = case("bench_sde_step", "sde_step_sample", "fp32")
    kept, calls = eager(i), []

    def call(i):
        calls.append(i)
        for old, new in zip(kept, eager(i), strict=True):
            old.copy_(new) if len(calls) < 3 else None
        return kept

    with pytest.raises(runner.WrongAnswer, match="kept: next sample is nan away"):
        runner.check(operation, runner.Provider("kept", call), i, expected)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check_needs_the_mask_and_the_std(runner, bench, case, monkeypatch, dtype):
    operation, i, expected, eager = case("bench_policy_loss", "policy_loss", dtype)
    other_std = runner.Provider("std", lambda i: eager(i._replace(std=i.std * 1.01)))
    with pytest.raises(runner.WrongAnswer, match="std: loss is"):
        runner.check(operation, other_std, i, expected)
    monkeypatch.setattr(bench, "KL_THRESHOLD", math.inf)
    with pytest.raises(runner.WrongAnswer, match="eager: loss is"):
        runner.check(operation, runner.Provider("eager", eager), i, expected)


@pytest.mark.parametrize("name", ["dppo_sde_img", "dppo_sde_tok_per_sample_t", "dppo_cps", "dppo_dance"])
def test_the_chain_is_the_trainers(chain, name):
    """Against recorded runs of verl-omni: within rounding, on whatever machine; to the bit on the one that recorded."""
    case = load(f"f_e2e_verl__{name}")
    given, want, params = case.inputs(False), case.recorded(False), case.params
    sampler = {"sde": "flow_sde"}.get(params["sde_type"], params["sde_type"])
    velocity = given["noise_pred"].clone().requires_grad_()
    scheduler = chain.Scheduler(given["sigmas"], given["timesteps"])
    sigmas = chain.look_up(scheduler, given["timestep"], velocity.shape)
    step = chain.SAMPLERS[sampler](given["sample"], velocity, *sigmas, given["sigmas"][1], params["noise_level"])
    log_prob, sqrt_dt = chain.log_prob(step, given["prev_sample"], sampler)
    loss, metrics = chain.dppo_loss(
        log_prob,
        given["old_log_prob"],
        given["advantages"],
        step,
        sqrt_dt,
        given["old_prev_sample_mean"],
        case.number("kl_mask_threshold"),
    )
    loss = loss / params["gradient_accumulation_steps"]
    loss.backward()
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=1e-9)
    close(step.mean.detach(), want["out.prev_sample_mean"])
    close(step.std_dev_t, want["out.std_dev_t"])
    close(log_prob.detach(), want["out.log_prob"])
    close(loss.detach(), want["out.loss"])
    torch.testing.assert_close(velocity.grad, want["grad.noise_pred"], rtol=1e-4, atol=1e-8)
    recorded = {name.split("/")[1]: value for name, value in want.items() if name.startswith("metric.")}
    assert set(recorded) == set(metrics)
    for name, value in chain.read(metrics).items():
        # Means of a log-ratio, small differences of log-probs near 1: 6e-8 of 1, whatever their size.
        assert value == pytest.approx(recorded[name].item(), rel=2e-5, abs=2e-7), name


# ---- what the dispatcher sees ----------------------------------------------------------------------------------------


def test_counts_of_known_calls(harness):
    counting = importlib.import_module("counting")
    x, row = torch.ones(4, 8), torch.ones(4, 1)

    def counts(call):
        return tuple(counting.count(call, 32))

    latent, small = 4 * 32, 4 * 4
    assert counts(lambda: x + row) == (1, 1, 0, 1, 2 * latent + small)
    assert counts(lambda: row + row) == (1, 0, 0, 0, 0)
    assert counts(lambda: x.view(8, 4).t().detach().expand(2, 4, 8)) == (0, 0, 0, 0, 0)
    assert counts(lambda: x.add_(row)) == (1, 1, 0, 0, 2 * latent + small)  # read and written in its place
    assert counts(lambda: row.expand(4, 8) + 1) == (1, 1, 0, 1, small + latent)  # what is expanded is read once
    assert counts(lambda: torch.empty(4, 8)) == (0, 0, 0, 1, 0)
    assert counts(lambda: torch.zeros_like(x)) == (1, 1, 0, 1, latent)  # not read, only looked at
    assert counts(lambda: x.new_ones(2)) == (1, 0, 0, 0, 0)
    assert counts(lambda: x.sum().item()) == (2, 1, 1, 0, latent + 4)
    assert counts(lambda: bool(x[0, 0] > 0)) == (2, 0, 1, 0, 0)
    assert counts(lambda: (row > 0).nonzero()) == (2, 0, 1, 0, 0)
    assert counts(lambda: row.tolist()) == (0, 0, 1, 0, 0)
    assert counts(lambda: x.double().float()) == (2, 2, 0, 2, 2 * (latent + 2 * latent))


def test_counts_include_the_backward(harness):
    counting = importlib.import_module("counting")
    x = torch.ones(4, 8, requires_grad=True)
    seen = counting.count(lambda: (2 * x).sum().backward(), 32)
    # 2 x and its sum; the loss's own gradient; 2 times that, expanded
    assert (seen.ops, seen.latent_ops, seen.host_syncs, seen.latent_allocations) == (4, 3, 0, 2)
    latent = 4 * 32
    assert seen.bytes_moved == 2 * latent + (latent + 4) + (4 + latent)


def test_counts_of_the_trainers_chain(runner, bench):
    """8 rows: 29 waits, as measured on verl-omni itself; a bf16 output adds a conversion each way."""
    operation, shape = bench.OPERATIONS["step_loss"], (8, 4, 8, 8)
    i = operation.make_inputs(shape, "fp32", torch.device("cpu"))
    eager = operation.providers["eager"]()
    seen = runner.count(lambda: operation.run("forward+backward", eager, i), i.sample.numel())
    assert seen.host_syncs == 2 * 8 + 13
    assert (seen.ops, seen.latent_ops, seen.latent_allocations) == (141, 24, 22)
    halved = operation.make_inputs(shape, "bf16+fp32", torch.device("cpu"))
    more = runner.count(lambda: operation.run("forward+backward", eager, halved), i.sample.numel())
    assert (more.ops - seen.ops, more.latent_ops - seen.latent_ops) == (2, 2)


@pytest.mark.parametrize("provider", ["fused", "fused_output", "fused_residual"])
def test_step_loss_is_two_operators_and_allocates_the_gradient(runner, bench, provider):
    """Forward, backward, and two that touch no latents: autograd's fill of the loss's own gradient, and the noise level
    that becomes a tensor because somebody watches. Each input is read once, those of the backward twice."""
    operation = bench.OPERATIONS["step_loss"]
    i = operation.make_inputs((8, 4, 8, 8), "bf16+fp32", torch.device("cpu"))
    call = operation.providers[provider]()
    seen = runner.count(lambda: operation.run("forward+backward", call, i), i.sample.numel())
    assert (seen.ops, seen.latent_ops, seen.host_syncs, seen.latent_allocations) == (4, 2, 0, 1)
    must = operation.bytes_moved(i, provider, "forward+backward")
    assert must <= seen.bytes_moved <= must + 4 * 8 * 64  # rows and their numbers: a few dozen floats a row


@pytest.mark.parametrize(
    ("name", "provider", "operators", "allocations"),
    [
        ("sde_step_sample", "fused", 1, 2),  # next sample and mean
        ("sde_step_sample", "fused_residual", 1, 3),
        ("sde_step_replay", "fused", 2, 2),  # mean and gradient
    ],
)
def test_sde_step_is_an_operator_each_way(runner, sde_bench, name, provider, operators, allocations):
    operation = sde_bench.OPERATIONS[name]
    i = operation.make_inputs((8, 4, 8, 8), "bf16+fp32", torch.device("cpu"))
    call, pass_ = operation.providers[provider](), operation.passes[-1]
    seen = runner.count(lambda: operation.run(pass_, call, i), i.sample.numel())
    assert (seen.latent_ops, seen.host_syncs, seen.latent_allocations) == (operators, 0, allocations)
    assert seen.ops == operators + 1  # the noise level, as above
    must = operation.bytes_moved(i, provider, pass_)
    assert must <= seen.bytes_moved <= must + 4 * 8 * 64


@needs_cxx
def test_wrong_answer_aborts_the_run_before_it_is_timed(runner, bench, monkeypatch, tmp_path):
    file = tmp_path / "rows.json"
    half = {"fused": lambda: lambda i: (bench.trainer_loss(i)[0] / 2,)}
    operation = replace(bench.OPERATIONS["policy_loss"], providers=half)
    monkeypatch.setitem(bench.OPERATIONS, "policy_loss", operation)
    monkeypatch.setattr(runner.Cpu, "measure", lambda *_: pytest.fail("timed a wrong answer"))
    with pytest.raises(SystemExit, match=r"wrong answer, not timed: fused: loss is 5\.0e-01 away"):
        run(bench, "--quick", "--sizes", "4x8", "--threads", str(torch.get_num_threads()), "--json", str(file))
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


def test_percentiles_of_a_single_sample(harness):
    assert harness.percentiles([3.0]) == {"p20_us": 3.0, "p50_us": 3.0, "p80_us": 3.0}


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: torch .* finds no usable CUDA device"),
        (["--providers", "triton"], "triton (runs on --device cuda alone|is not installed.*)"),
        (["--providers", "compile_max"], "compile_max runs on --device cuda alone"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run(bench, *arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"bench_policy_loss: {message}\n", err)


@pytest.mark.parametrize("size", ["huge", "8", "0x8", "4x-1"])
def test_unknown_size_is_named(runner, bench, size, capsys):
    with pytest.raises(SystemExit):
        run(bench, "--sizes", size)
    assert f"'{size}': wanted one of {', '.join(runner.SIZES)}, or a shape" in capsys.readouterr().err


# ---- the trainers ----------------------------------------------------------------------------------------------------

# Operators on latents, forward and backward, in float32: of the chain, and of the integration (at most one a pass, and
# what adds two losses or widens nothing). Waits: verl-omni's metrics at once, and the look-up's question on a CPU.
COUNTED = {"verl_omni": (24, 3, 2), "unirl": (24, 3, 13), "flow_grpo": (20, 2, 1), "flow_factory": (20, 2, 0)}


def test_trainers_beside_their_integrations(tmp_path):
    """In a process of its own: stand-ins for trainers stay in its modules."""
    file = tmp_path / "rows.json"
    arguments = ["--quick", "--sizes", "8x3x40x40", "--dtypes", "fp32", "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWDPPO_OPS_")}
    command = [sys.executable, str(BENCHES / "bench_trainers.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["op"], row["provider"], row["pass"]): row for row in json.loads(file.read_text())}
    for trainer, (chain, fused, waits) in COUNTED.items():
        both = [rows[trainer, provider, "forward+backward"] for provider in ("eager", "fused")]
        assert [row["latent_ops"] for row in both] == [chain, fused]
        assert both[1]["host_syncs"] == waits
        assert both[1]["bytes_moved"] < both[0]["bytes_moved"] / 4


def test_wrong_answer_of_an_integration_is_not_timed(tmp_path):
    code = """
import flowdppo_ops.integrations.flow_grpo as ours
own = ours.grpo_loss
ours.grpo_loss = lambda *given, clip_range, **more: own(*given, clip_range=2 * clip_range, **more)
import bench_trainers, runner
runner.main("bench_trainers", "", bench_trainers.OPERATIONS, ("flow_grpo",), ["--quick", "--sizes", "8x3x5"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWDPPO_OPS_")}
    path = os.pathsep.join([str(BENCHES), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert "wrong answer, not timed: fused: loss is" in done.stderr
