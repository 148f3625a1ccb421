"""The bench of a training step: its rows, its shares, and that a wrong answer is never timed."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench_cuda import fake_cuda
from test_benches import FIELDS
from torch import nn

BENCHES = Path(__file__).parents[1] / "benches"
LATENTS = (4, 16, 8, 8)


class StandIn(nn.Module):
    """Called as diffusers' `SD3Transformer2DModel`."""

    def __init__(self, *, in_channels, joint_attention_dim, pooled_projection_dim, **_):
        super().__init__()
        self.block = nn.ModuleDict({"attn": nn.Conv2d(in_channels, in_channels, 3, padding=1)})
        self.text = nn.Linear(joint_attention_dim, in_channels)
        self.pooled = nn.Linear(pooled_projection_dim, in_channels)

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict):
        assert not return_dict
        text = self.text(encoder_hidden_states).mean(1) + self.pooled(pooled_projections)
        noisy = (timestep / 1000).to(text.dtype)
        return (self.block.attn(hidden_states) + (noisy[:, None] * text)[..., None, None],)


@pytest.fixture
def bench(monkeypatch):
    """With a model of a few thousand parameters."""
    monkeypatch.syspath_prepend(BENCHES)
    module = importlib.import_module("bench_training_step")
    monkeypatch.setitem(module.MODELS, "small", module.Model(LATENTS, 2, 2, 16, (5, 24), 12, 1))
    return module


@pytest.fixture
def diffusers_model(bench):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[bench]'")
    return bench.sd3_transformer()


@pytest.fixture
def stand_in(bench, monkeypatch):
    monkeypatch.setattr(bench, "sd3_transformer", lambda: StandIn)


@pytest.fixture(params=["stand-in", "diffusers"])
def kind(request):
    return StandIn if request.param == "stand-in" else request.getfixturevalue("diffusers_model")


def batch_of(bench, kind, op="training_step"):
    return bench.MicroBatch(kind, bench.MODELS["small"], bench.TRAINED[op], torch.device("cpu"))


def run(bench, *arguments):
    threads = str(torch.get_num_threads())
    return bench.main(["--quick", "--threads", threads, "--sizes", "small", *arguments])


def with_chain(bench, monkeypatch, call):
    """`eager` becomes `call`, a function of the right one and the inputs."""
    right = bench.CHAINS.providers["eager"]()
    providers = {**bench.CHAINS.providers, "eager": lambda: lambda i: call(right, i)}
    monkeypatch.setattr(bench, "CHAINS", replace(bench.CHAINS, providers=providers))


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_per_provider_of_the_step_and_of_the_chain_in_it(bench, stand_in, tmp_path, capsys):
    file = tmp_path / "rows.json"
    run(bench, "--providers", "eager", "fused", "fused_residual", "--json", str(file))
    rows = json.loads(file.read_text())
    names = ("fixed", "eager", "fused", "fused_residual")
    assert [(row["op"], row["timing"], row["provider"]) for row in rows] == [
        (op, timing, name)
        for op in ("training_step", "training_step_attention")
        for timing in ("call", "chain")
        for name in names
    ]
    parameters = 16 * 16 * 9 + 16 + 16 * 24 + 16 + 16 * 12 + 16
    for row in rows:
        assert list(row) == FIELDS
        assert (row["shape"], row["dtype"], row["pass"]) == (list(LATENTS), "bf16+fp32", "forward+backward")
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["environment"].endswith(f" layers=2 heads=2x16 parameters={parameters}")
    by = {(row["op"], row["timing"], row["provider"]): row for row in rows}
    of_latents = 4 * 16 * 64
    for op in bench.TRAINED:
        step, chain = ({name: by[op, timing, name] for name in names} for timing in ("call", "chain"))
        # Two waits a row and thirteen metrics; the model waits for nothing.
        assert [step[name]["host_syncs"] for name in names] == [0, 2 * 4 + 13, 0, 0]
        assert [chain[name]["host_syncs"] for name in names] == [None, 2 * 4 + 13, 0, 0]
        for name in names[1:]:
            # Of the chain's operators, fixed lacks all but autograd's fill of the loss's own gradient.
            assert step[name]["ops"] - step["fixed"]["ops"] == chain[name]["ops"]
        assert [step[name]["bytes"] for name in names] == [of_latents * n for n in (2, 26, 26, 24)]
    printed = capsys.readouterr().out
    assert printed.count("  fixed  ") == 2
    assert f"+{chain['eager']['ops']}    +21\n" in printed
    assert f"+{chain['fused']['ops']}     +0\n" in printed


def test_on_a_gpu_the_host_has_rows_too(bench, stand_in, monkeypatch, tmp_path, capsys):
    """On a device made of the CPU; the chain's marks are events on the bench's stream."""
    fake = fake_cuda(importlib.import_module("devices"), importlib.import_module("harness"))
    fake._stream, recorded = "side", []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            recorded.append(stream)
            self.at = time.perf_counter_ns()

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e6

    monkeypatch.setitem(importlib.import_module("runner").MACHINES, "cuda", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    rows = run(bench, "--device", "cuda", "--providers", "fused", "--ops", "training_step", "--commit", "abc")
    assert [(row.timing, row.provider) for row in rows] == [
        (timing, name) for timing in ("call", "host", "chain") for name in ("fixed", "fused")
    ]
    assert set(recorded) == {"side"}
    step = next(row for row in rows if (row.timing, row.provider) == ("call", "fused"))
    assert (step.sync_warnings, step.peak_bytes) == (0, 4096)
    chain = next(row for row in rows if (row.timing, row.provider) == ("chain", "fused"))
    assert chain.p50_us > 0
    fixed, fused = (line.split() for line in capsys.readouterr().out.splitlines()[4:6])
    assert (fixed[-2:], fused[-2:]) == (["0", "0"], ["+0", "+0"])  # waits that PyTorch warned of, megabytes


# ---- the share -------------------------------------------------------------------------------------------------------


class Takes(torch.autograd.Function):
    """Nothing but time, forward and backward, on a clock that nothing else moves."""

    @staticmethod
    def forward(ctx, x, clock, forward_us, backward_us):
        clock.now += 1000 * forward_us
        ctx.clock, ctx.backward_us = clock, backward_us
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += 1000 * ctx.backward_us
        return gradient, None, None, None


def test_the_share_is_what_the_chain_takes_of_the_step(bench, monkeypatch, capsys):
    """A model of 500 us forward and 400 us backward, a chain of 70 and 30: a tenth, seen from outside and inside."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.now)

    class Slow(StandIn):
        def forward(self, *args, **kwargs):
            return (Takes.apply(*super().forward(*args, **kwargs), clock, 500, 400),)

    def chain(right, i):
        return right(i._replace(model_output=Takes.apply(i.model_output, clock, 70, 30)))

    monkeypatch.setattr(bench, "sd3_transformer", lambda: Slow)
    with_chain(bench, monkeypatch, chain)
    rows = run(bench, "--providers", "eager", "fused", "--ops", "training_step")
    p50 = {(row.timing, row.provider): row.p50_us for row in rows}
    assert p50["call", "fixed"] == p50["call", "fused"] == 900
    assert p50["call", "eager"] == 1000
    assert [p50["chain", name] for name in ("fixed", "eager", "fused")] == [0, 100, 0]
    found = bench.shares(rows)
    assert found["eager"] == bench.Share(100, 0, 0.1, 100, 0.1)
    assert found["fused"] == bench.Share(0, 0, 0, 0, 0)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  eager"))
    assert line.split()[4:8] == ["+0.100", "10.00%", "+0.100", "10.00%"]


def test_a_difference_below_the_spread_is_named(bench):
    def row(timing, provider, p20, p50, p80):
        times = {"p20_us": p20, "p50_us": p50, "p80_us": p80}
        facts = dict.fromkeys(("device", "torch", "flowdppo_ops", "commit", "environment", "date"), "")
        harness = importlib.import_module("harness")
        counts = {"repeats": 9, "bytes": 1, "threads": 1, "cores_elsewhere": 0.0}
        return harness.Row("training_step", LATENTS, "", provider, "", **times, **counts, **facts, timing=timing)

    rows = [row("chain", name, 1, us, 90) for name, us in (("fixed", 2), ("eager", 52), ("fused", 12))]
    rows += [row("call", "fixed", 990, 1000, 1030), row("call", "eager", 1040, 1050, 1060)]
    rows += [row("call", "fused", 1000, 1010, 1020)]
    found = bench.shares(rows)
    assert found["eager"] == bench.Share(50, 40, 50 / 1050, 50, 50 / 1050)
    assert found["fused"] == bench.Share(10, 40, 10 / 1010, 10, 10 / 1010)
    assert bench.report(rows).endswith(
        "\n  less beyond fixed than a step's own spread: fused; the chain's time is its share"
    )


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["training_step", "training_step_attention"])
def test_a_gradient_reaches_what_is_trained_and_nothing_else(bench, kind, op):
    """And the one that `fixed` starts from is the chain's: the model's backward sees the same numbers."""
    batch = batch_of(bench, kind, op)
    fixed, eager = bench.make_chains(["eager"], batch.inputs)
    gradients = []
    for chain in (fixed, eager):
        batch.run(chain)
        found = {name: parameter.grad for name, parameter in batch.transformer.named_parameters()}
        assert {name for name, gradient in found.items() if gradient is not None} == {
            name for name in found if bench.TRAINED[op] in name
        }
        gradients.append([gradient for gradient in found.values() if gradient is not None])
    largest = max(gradient.abs().max() for gradient in gradients[1])
    assert largest > 0
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 0.02 * largest  # a few roundings of bfloat16, 0.004 each


def test_rows_of_a_step_are_on_both_sides_of_the_mask(bench, kind):
    """The old policy is made around the model's output: the chain has something to decide."""
    i = batch_of(bench, kind).inputs
    reference = importlib.import_module("flowdppo_ops.reference")
    of_step = importlib.import_module("bench_policy_loss")
    results = []

    def keep_result(*args, **kwargs):
        results.append(reference.step_loss(*args, **kwargs))
        return results[-1]

    for form in ("old_mean", "old_output", "old_residual"):
        of_step.package_step_loss(keep_result, "flow_sde", form, i)
    for out in results:
        distance = out.kl / of_step.KL_THRESHOLD
        assert torch.equal(distance > 1, torch.tensor([False, True, True, True]))
        assert bool(((distance > 5) | (distance < 0.2)).all())
        assert torch.equal(out.keep, torch.tensor([True, True, False, False]))


def test_a_step_leaves_nothing_to_the_garbage_collector(bench, kind):
    """It is off while steps are timed: what it would have to free, activations and all, would pile up."""
    batch = batch_of(bench, kind)
    outputs = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for chain in bench.make_chains(["eager", "fused"], batch.inputs):
            batch.run(chain, lambda output: outputs.append(weakref.ref(output.untyped_storage())))
    finally:
        if collecting:
            gc.enable()
    assert [output() for output in outputs] == [None] * 3


def test_medium_is_as_large_as_sd35_medium(bench, diffusers_model):
    with torch.device("meta"):
        model = diffusers_model(**bench.MODELS["medium"].config())
    assert sum(one.numel() for one in model.parameters()) == 2_243_171_520


@pytest.mark.parametrize("provider", ["eager", "fused"])
def test_right_answer_is_accepted(bench, kind, provider):
    batch = batch_of(bench, kind)
    _, chain = bench.make_chains([provider], batch.inputs)
    bench.check(batch, chain)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda right, i: (right(i)[0] * 1.001,), "loss"),
        (lambda right, i: (2 * right(i)[0] - right(i)[0].detach(),), "gradient"),  # its value is right
        (lambda right, i: right(i._replace(sample=1.01 * i.sample)), "loss"),
    ],
)
def test_wrong_answer_is_not_timed_and_ends_in_a_failure(bench, stand_in, monkeypatch, tmp_path, wrong, what):
    file = tmp_path / "rows.json"
    with_chain(bench, monkeypatch, wrong)
    said = f"^bench_training_step: training_step small: wrong answer, not timed: eager: {what} is .* away from float64"
    with pytest.raises(SystemExit, match=said):
        run(bench, "--providers", "fused", "eager", "--ops", "training_step", "--json", str(file))
    assert {row["provider"] for row in json.loads(file.read_text())} == {"fixed", "fused"}


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"^bench_training_step: needs diffusers, pip install '\.\[bench\]': "):
        run(importlib.import_module("bench_training_step"))


def test_provider_of_another_device_is_one_line_and_status_2(bench, stand_in, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(bench, "--providers", "triton")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "bench_training_step: triton runs on --device cuda alone\n"
