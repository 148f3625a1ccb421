"""The benches: their rows, that a wrong answer is not timed, and that the eager chain is the trainers'."""

from __future__ import annotations

import importlib
import json
import math
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import needs_cxx
from counting import count
from golden.load import load

import flowdppo_ops
from flowdppo_ops import reference

BENCHES = Path(__file__).parents[1] / "benches"
FIELDS = ["op", "shape", "dtype", "cache", "provider", "pass", "p20_us", "p50_us", "p80_us", "host_p50_us", "rounds"]
FIELDS += ["bytes", "cores_elsewhere", "device", "threads", "torch", "flowdppo_ops", "commit", "environment", "date"]
BOTH = ("forward", "forward+backward")
CASES = [
    ("policy_loss", "fp32"),
    ("policy_loss", "bf16"),
    *((name, dtype) for name in ("step_loss", "sde_step_sample", "sde_step_replay") for dtype in ("fp32", "bf16+fp32")),
]


@pytest.fixture
def benches(monkeypatch):
    """Their modules, and the operations of both bench files."""
    monkeypatch.syspath_prepend(BENCHES)
    names = {"harness": "harness", "loss": "bench_policy_loss", "step": "bench_sde_step", "chain": "trainer_chain"}
    modules = SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    modules.operations = modules.loss.OPERATIONS | modules.step.OPERATIONS
    return modules


@pytest.fixture
def run(benches):
    """The command line of a bench, few rounds on a small shape."""

    def call(operations, *arguments):
        few = ["--rounds", "2", "--sizes", "4x8", "--threads", str(torch.get_num_threads())]
        return benches.harness.main("summary", operations, [*few, *map(str, arguments)])

    return call


@pytest.fixture
def case(benches):
    """An operation, inputs of it, and a function that checks a provider."""

    def make(name, dtype, shape=(16, 256)):
        operation = benches.operations[name]
        inputs = operation.make_inputs(shape, dtype, torch.device("cpu"))
        return operation, inputs, lambda provider: benches.harness.check(operation, "eager", provider, inputs)

    return make


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(file, dtype):
    """The rows of a file, checked for what all rows have in common; by cache, operation, provider and pass."""
    rows = json.loads(file.read_text())
    for row in rows:
        assert list(row) == FIELDS
        assert (row["shape"], row["dtype"], row["rounds"]) == ([4, 8], dtype, 2)
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["host_p50_us"] == pytest.approx(row["p50_us"], abs=1e-3)  # there is no other clock on a CPU
        assert row["cores_elsewhere"] is None or row["cores_elsewhere"] >= 0
        assert (row["threads"], row["commit"]) == (torch.get_num_threads(), "abc")
        assert (row["torch"], row["flowdppo_ops"]) == (torch.__version__.split("+")[0], flowdppo_ops.__version__)
        assert row["device"]
        assert row["date"].endswith("Z")
    assert platform.node() not in file.read_text()
    assert str(BENCHES.parent) not in file.read_text()
    keyed = {(row["cache"], row["op"], row["provider"], row["pass"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


@needs_cxx
def test_losses_have_a_row_per_cache_provider_and_pass(benches, run, tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ("--dtypes", "fp32", "--commit", "abc", "--json", file)
    run(benches.loss.OPERATIONS, *options)
    rows = read(file, "fp32")
    timed = {("policy_loss", name) for name in ("eager", "compile", "fused", "minimal")}
    timed |= {("step_loss", name) for name in (*(name for _, name in timed), "fused_output", "fused_residual")}
    series = {(*one, pass_) for one in timed for pass_ in BOTH}
    series |= {(op, "copy", "forward") for op in ("policy_loss", "step_loss")}
    assert set(rows) == {(cache, *one) for cache in ("hot", "cold") for one in series}
    for (_, op, name, pass_), row in rows.items():
        read_once = {"policy_loss": 3, "step_loss": 4 - (name == "fused_residual") / 2}[op]  # latents
        again = {"policy_loss": 3, "step_loss": 4}[op] if pass_ == BOTH[1] else 0
        bytes_ = {"copy": 2, "minimal": None}.get(name, read_once + again)
        assert row["bytes"] == (None if bytes_ is None else 4 * 32 * bytes_)
    table = capsys.readouterr().out
    assert table.count("policy_loss [4, 8] fp32, cold\n") == 1
    assert "  fused is\n" in table


@needs_cxx
def test_steps_have_a_row_per_cache_provider_and_pass(benches, run, tmp_path):
    file = tmp_path / "rows.json"
    run(benches.step.OPERATIONS, "--dtypes", "bf16+fp32", "--commit", "abc", "--json", file)
    rows = read(file, "bf16+fp32")
    sampled = ("eager", "compile", "fused", "fused_residual", "copy")
    series = {("sde_step_sample", name, "forward") for name in sampled} | {("sde_step_replay", "copy", "forward")}
    series |= {("sde_step_replay", name, pass_) for name in ("eager", "compile", "fused") for pass_ in BOTH}
    assert set(rows) == {(cache, *one) for cache in ("hot", "cold") for one in series}
    moved = {key[1:]: row["bytes"] / 32 for key, row in rows.items()}  # bytes an element
    assert moved["sde_step_sample", "fused", "forward"] == 2 + 4 * 4
    assert moved["sde_step_sample", "fused_residual", "forward"] == 2 + 4 * 4 + 2
    assert moved["sde_step_replay", "eager", "forward"] == 2 + 3 * 4
    assert moved["sde_step_replay", "eager", "forward+backward"] == 2 + 3 * 4 + 3 * 4 + 2


# ---- the check of an answer ------------------------------------------------------------------------------------------


def test_a_wrong_rival_is_not_timed(benches, run, tmp_path):
    """The others have their rows all the same, and the exit status is 1."""
    file, operation = tmp_path / "rows.json", benches.operations["policy_loss"]
    half = {"compile": lambda: lambda inputs: (benches.loss.trainer_loss(inputs)[0] / 2,)}
    wrong = {"policy_loss": replace(operation, providers=dict(operation.providers) | half)}
    said = r"policy_loss \[4, 8\] fp32: compile is not timed: WrongAnswer: loss is 5\.0e-01 of its largest value away"
    with pytest.raises(SystemExit, match=said):
        run(wrong, "--caches", "cold", "--dtypes", "fp32", "--json", file)
    assert {row["provider"] for row in json.loads(file.read_text())} == {"eager", "fused", "minimal", "copy"}


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_result_is_checked(benches, case, name, dtype):
    """Right from the eager chain and the package; refused when one is twice the tolerance away, NaN or missing."""
    operation, inputs, check = case(name, dtype)
    eager = operation.providers["eager"]()
    check(eager)
    check(operation.providers["fused"]())
    outputs = eager(inputs)
    for at, what in enumerate(operation.outputs[: len(outputs)]):
        for factor in (1 + 2.1 * benches.harness.TOLERANCE, math.nan):
            bent = tuple(factor * one if at == n else one for n, one in enumerate(eager(inputs)))
            with pytest.raises(benches.harness.WrongAnswer, match=f"{what} is .* of its largest value away"):
                check(lambda _, bent=bent: bent)
    if operation.leaf is None:
        with pytest.raises(benches.harness.WrongAnswer, match="2 results, wanted 3"):
            check(lambda _: outputs[:-1])
    else:
        doubled = tuple(2 * one - one.detach() for one in eager(inputs))  # the value stays, the gradient doubles
        with pytest.raises(benches.harness.WrongAnswer, match=r"gradient is .* of its largest value away"):
            check(lambda _: doubled)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_check_sees_mask_and_std(benches, case, monkeypatch, dtype):
    operation, _, check = case("policy_loss", dtype)
    eager = operation.providers["eager"]()
    with pytest.raises(benches.harness.WrongAnswer, match="loss is"):
        check(lambda inputs: eager(inputs._replace(std=inputs.std * 1.01)))
    monkeypatch.setattr(benches.loss, "KL_THRESHOLD", math.inf)
    with pytest.raises(benches.harness.WrongAnswer, match="loss is"):
        check(eager)


@pytest.mark.parametrize("form", ["loss", "old_mean", "old_output", "old_residual"])
@pytest.mark.parametrize("narrow", [False, True])
def test_inputs_land_on_both_sides_of_every_comparison(benches, form, narrow):
    """The mask is part of what is checked only if it decides something, and not by rounding."""
    results, shape = [], (16, 4, 8, 8)

    def keep_result(function, *arguments, **options):
        results.append(function(*arguments, **options))
        return results[-1]

    if form == "loss":
        inputs = benches.loss.make_loss_inputs(shape, "bf16" if narrow else "fp32", torch.device("cpu"))
        benches.loss.package_loss(partial(keep_result, reference.loss), inputs)
    else:
        inputs = benches.loss.make_step_inputs(shape, "bf16+fp32" if narrow else "fp32", torch.device("cpu"))
        forms = {field: (field, keyword) for field, keyword in benches.loss.OLD_FORMS.values()}
        old = forms.get(form, benches.loss.OLD_MEAN)
        benches.loss.package_step_loss(partial(keep_result, reference.step_loss), old, inputs)
    (result,) = results
    distance, row = result.kl / benches.loss.KL_THRESHOLD, torch.arange(16)
    assert bool(((distance > 5) | (distance < 0.2)).all())
    assert bool((result.ratio > 1).any())
    assert bool((result.ratio < 1).any())
    assert torch.equal(result.keep, (row != 2) & (row != 3))


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["huge", "8", "0x8", "4x-1"])
def test_an_unknown_size_is_named(benches, run, size, capsys):
    with pytest.raises(SystemExit):
        run(benches.loss.OPERATIONS, "--sizes", size)
    assert f"'{size}': wanted one of {', '.join(benches.harness.SIZES)}, or a shape" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_one_line(benches, run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run(benches.loss.OPERATIONS, "--device", "cuda")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("finds no usable CUDA device\n")


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here, or a PyTorch without CUDA")


@pytest.mark.gpu
@on_gpu
def test_clocks_of_a_gpu(benches, run, monkeypatch):
    monkeypatch.setitem(benches.harness.MODEL, "cuda", (8, 8, torch.bfloat16))
    rows = run(benches.operations, "--device", "cuda", "--dtypes", "fp32", "--providers", "eager", "fused")
    assert {(row["op"], row["cache"]) for row in rows} == {(n, c) for n in benches.operations for c in ("hot", "cold")}
    assert all(row["p50_us"] > 0 and row["host_p50_us"] > 0 for row in rows)


@pytest.mark.gpu
@on_gpu
def test_every_provider_runs_on_a_gpu(benches, run):
    rows = run(benches.operations, "--device", "cuda", "--dtypes", "fp32", "--caches", "cold")
    seen = {(row["op"], row["provider"]) for row in rows}
    assert seen >= {(name, provider) for name, one in benches.operations.items() for provider in one.providers}


# ---- what the eager chain and the package ask of a device ------------------------------------------------------------


@pytest.mark.parametrize("name", ["dppo_sde_img", "dppo_sde_tok_per_sample_t"])
def test_the_chain_is_the_trainers(benches, name):
    """Against recorded runs of verl-omni: within rounding, on whatever machine; to the bit on the one that recorded."""
    recorded, chain = load(f"f_e2e_verl__{name}"), benches.chain
    given, want, params = recorded.inputs(False), recorded.recorded(False), recorded.params
    velocity = given["noise_pred"].clone().requires_grad_()
    sigmas = chain.look_up(given["sigmas"], given["timesteps"], given["timestep"], velocity.shape)
    step = chain.flow_sde(given["sample"], velocity, *sigmas, given["sigmas"][1], params["noise_level"])
    log_prob, sqrt_dt = chain.log_prob(step, given["prev_sample"])
    policy = (given["old_log_prob"], given["advantages"], step, sqrt_dt, given["old_prev_sample_mean"])
    loss, of_rows = chain.dppo_loss(log_prob, *policy, recorded.number("kl_mask_threshold"))
    loss = loss / params["gradient_accumulation_steps"]
    loss.backward()
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=1e-9)
    close(step.mean.detach(), want["out.prev_sample_mean"])
    close(step.std_dev_t, want["out.std_dev_t"])
    close(log_prob.detach(), want["out.log_prob"])
    close(loss.detach(), want["out.loss"])
    torch.testing.assert_close(velocity.grad, want["grad.noise_pred"], rtol=1e-4, atol=1e-8)
    metrics = {name.split("/")[1]: value.item() for name, value in want.items() if name.startswith("metric.")}
    # Means of a log-ratio, small differences of log-probs near 1: 6e-8 of 1, whatever their size.
    assert chain.read(chain.metrics(of_rows)) == pytest.approx(metrics, rel=2e-5, abs=2e-7)


@pytest.mark.parametrize(
    ("name", "provider", "operators", "of_latents", "waits", "allocations"),
    [
        ("step_loss", "eager", 143, 26, 2 * 8 + 13, 24),  # 8 rows are looked up, 13 metrics are read
        # A third operator is autograd's fill of the loss's own gradient, a fourth the noise level, which becomes a
        # tensor because the dispatcher is watched.
        ("step_loss", "fused", 4, 2, 0, 1),
        ("step_loss", "fused_output", 4, 2, 0, 1),
        ("step_loss", "fused_residual", 4, 2, 0, 1),
        ("sde_step_sample", "fused", 2, 1, 0, 2),  # next sample and mean
        ("sde_step_sample", "fused_residual", 2, 1, 0, 3),
        ("sde_step_replay", "fused", 3, 2, 0, 2),  # mean and gradient
    ],
)
def test_what_a_call_asks_of_a_device(benches, case, name, provider, operators, of_latents, waits, allocations):
    """Forward and backward. The package reads each input once, those of the backward twice."""
    operation, inputs, _ = case(name, "bf16+fp32", (8, 4, 8, 8))
    call = operation.providers[provider]()
    seen = count(lambda: benches.harness.forward_and_backward(operation, call, inputs), inputs.sample.numel())
    assert seen[:4] == (operators, of_latents, waits, allocations)
    if provider != "eager":
        must = operation.bytes_moved(inputs, provider, BOTH[operation.leaf is not None])
        assert must <= seen.bytes_moved <= must + 4 * 8 * 64  # rows and their numbers: a few dozen floats a row


def test_counts_of_known_calls():
    x, row = torch.ones(4, 8), torch.ones(4, 1)
    latent, small = 4 * 32, 4 * 4
    for call, *seen in [
        (lambda: x + row, 1, 1, 0, 1, 2 * latent + small),
        (lambda: row + row, 1, 0, 0, 0, 0),
        (lambda: x.view(8, 4).t().detach().expand(2, 4, 8), 0, 0, 0, 0, 0),
        (lambda: x.add_(row), 1, 1, 0, 0, 2 * latent + small),  # read and written in its place
        (lambda: row.expand(4, 8) + 1, 1, 1, 0, 1, small + latent),  # what is expanded is read once
        (lambda: torch.empty(4, 8), 0, 0, 0, 1, 0),
        (lambda: torch.zeros_like(x), 1, 1, 0, 1, latent),  # not read, only looked at
        (lambda: x.sum().item(), 2, 1, 1, 0, latent + 4),
        (lambda: bool(x[0, 0] > 0), 2, 0, 1, 0, 0),
        (lambda: row.tolist(), 0, 0, 1, 0, 0),
    ]:
        assert tuple(count(call, 32)) == tuple(seen)
