"""The kernels of `sde_step` run on the CPU by the emulator, as test_emulator.py runs those of the losses."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from compilers import needs_cxx
from emulator import call, call_sde_step
from emulator.build import Fault
from emulator.call import EmulatedStepLoss, start
from emulator.call_sde_step import EmulatedSdeStep
from parity import equal_bits
from sde_step_cases import FLOAT32_DTYPES, LAYOUTS, SAMPLERS, draw, run, three_way

from flowdppo_ops import _native, sde_step

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    needs_cxx,
]

# A warp per row, and blocks of a row. 64 elements, the unit of a split, do not fill five.
splits = pytest.mark.parametrize("splits", [0, 1, 2, 5])
dtypes = pytest.mark.parametrize("dtypes", FLOAT32_DTYPES.values(), ids=FLOAT32_DTYPES)
both_ways = pytest.mark.parametrize("replay", [False, True], ids=["drawn", "replay"])
INPUTS = (*_native.SDE_STEP_LATENTS, "grad_prev_sample_mean")
OUTPUTS = ("stored", "prev_sample_mean", "residual", *call_sde_step.GRADIENTS)


@pytest.mark.parametrize("sampler", SAMPLERS)
@splits
@dtypes
@both_ways
def test_parity(asan, sampler, splits, dtypes, replay):
    for guidance, residual in itertools.product((False, True), repeat=2):
        options = {"replay": replay, "guidance": guidance, "residual": residual, "dtypes": dtypes}
        arguments = draw((3, 5, 33), sampler=sampler, **options) | {"log_prob_normalizer": residual}
        three_way(EmulatedSdeStep(asan, splits=splits), arguments)


@pytest.mark.parametrize("through", [("log_prob",), ("prev_sample_mean",)])
@dtypes
def test_gradients_of_one_result(asan, through, dtypes):
    for replay, guidance in itertools.product((False, True), repeat=2):
        arguments = draw((3, 300), replay=replay, guidance=guidance, dtypes=dtypes)
        three_way(EmulatedSdeStep(asan, splits=2), arguments, through=through)


# Around a vector of 8, one and two steps of a warp, and the run of 65536 that is summed in one go.
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 256, 257, 511, 512, 513, 767, 4096, 65_536 + 9])
@dtypes
def test_sizes(asan, numel, dtypes):
    for splits in (0, 1, 3) if numel < 10_000 else (1, 2):
        three_way(EmulatedSdeStep(asan, splits=splits), draw((2, numel), guidance=True, residual=True, dtypes=dtypes))


@pytest.mark.parametrize(("shape", "row_dims", "schedule"), LAYOUTS.values(), ids=LAYOUTS)
@splits
def test_layouts(asan, shape, row_dims, schedule, splits):
    three_way(EmulatedSdeStep(asan, splits=splits), draw(shape, row_dims, schedule, guidance=True, residual=True))


@pytest.mark.parametrize("rows", [7, 8, 9, 70])
def test_many_short_rows(asan, rows):
    three_way(EmulatedSdeStep(asan), draw((rows, 21), residual=True))


@pytest.mark.parametrize("where", [*INPUTS, *OUTPUTS, "all"])
@dtypes
def test_any_alignment(asan, where, dtypes):
    offsets = dict.fromkeys((*INPUTS, *OUTPUTS) if where == "all" else (where,), 1)
    arguments = draw((3, 200), guidance=True, residual=True, dtypes=dtypes)
    three_way(EmulatedSdeStep(asan, splits=1, offsets=offsets), arguments)


@pytest.mark.parametrize("variant", ["f32", "bf16_f32", "bf16", "f16"])
@both_ways
def test_mixed_gives_the_bits_of_the_variant_made_for_the_dtypes(asan, variant, replay):
    output, sample = next(pair for pair, name in call_sde_step.VARIANTS.items() if name == variant)
    dtypes = {"*": sample, "model_output": output, "uncond_output": output, "residual": torch.float16}
    arguments = draw((2, 300), guidance=True, residual=True, replay=replay, dtypes=dtypes)
    mine, mixed = (run(EmulatedSdeStep(asan, splits=0, variant=name), arguments) for name in (None, "mixed"))
    for name in mine.keys() - {"log_prob"}:  # sums are cut at another place
        equal_bits({name: mine[name]}, {name: mixed[name]})


@dtypes
def test_latents_have_the_bits_of_the_cpu(asan, dtypes):
    arguments = draw((3, 300), guidance=True, residual=True, dtypes=dtypes)
    emulated, native = run(EmulatedSdeStep(asan), arguments), run(sde_step, arguments)
    for name in ("prev_sample", "prev_sample_mean", "std", "residual"):
        equal_bits({name: emulated[name]}, {name: native[name]})


@dtypes
@splits
def test_a_replay_of_the_stored_latent_has_the_same_bits(asan, dtypes, splits):
    arguments = draw((3, 300), guidance=True, residual=True, dtypes=dtypes)
    step = EmulatedSdeStep(asan, splits=splits)
    drawn = run(step, arguments | {"noise": arguments["noise"].float()})
    del arguments["noise"]
    equal_bits(run(step, arguments | {"prev_sample": drawn["prev_sample"]}), drawn)


@splits
def test_a_recorded_policy_has_no_drift(asan, splits):
    """`mu`, and the residual, are formed as `step_loss` forms them: given back as the old policy's, they have KL 0."""
    arguments = draw((4, 300), replay=True, guidance=True)
    step = EmulatedSdeStep(asan, splits=splits)(**arguments, residual_dtype=torch.float32)
    del arguments["row_dims"]
    for old in ({"old_prev_sample_mean": step.prev_sample_mean}, {"old_residual": step.residual}):
        result = EmulatedStepLoss(asan, splits=splits)(**arguments, advantages=torch.ones(4), **old)
        assert (result.kl == 0).all()
        assert (result.ratio == 1).all()


def test_any_order_of_blocks_and_threads_gives_the_same_bits(asan):
    arguments = draw((3, 700), guidance=True, residual=True)
    natural = run(EmulatedSdeStep(asan, splits=3, seed=0), arguments)
    for seed in range(1, 6):
        equal_bits(run(EmulatedSdeStep(asan, splits=3, seed=seed), arguments), natural)


@pytest.mark.parametrize("sampler", SAMPLERS)
@splits
@both_ways
def test_deterministic_rows(asan, sampler, splits, replay):
    arguments = draw((4, 130), sampler=sampler, replay=replay, residual=True, guidance=True)
    arguments["noise_level"][1] = 0.0
    arguments["sigma_next"][2] = 0.0
    mine = three_way(EmulatedSdeStep(asan, splits=splits), arguments)
    assert all(value.isfinite().all() for value in mine.values())
    fixed = [1, 2] if sampler == "cps" else [1]
    assert (mine["std"][fixed] == 0).all()
    assert (mine["residual"][fixed] == 0).all()


def test_a_deterministic_row_that_overflows_as_it_is_stored_has_no_residual(asan):
    arguments = draw((4, 50), residual=True, dtypes={"*": torch.float16})
    arguments["noise_level"][1] = 0.0
    arguments["sample"][1], arguments["model_output"][1] = 6e4, -6e4
    step = EmulatedSdeStep(asan)(**arguments)
    assert (step.prev_sample[1] == torch.inf).all()
    assert step.log_prob[1] == 0
    assert (step.residual[1] == 0).all()


@pytest.mark.parametrize("upstream", [1.0, torch.inf, torch.nan])
def test_rows_without_a_coefficient_are_not_read(asan, monkeypatch, upstream):
    """The latents that the backward gets have no bytes at all: a single read would end it."""
    arguments = draw((4, 300), replay=True)
    arguments["noise_level"] = 0.0
    output = arguments["model_output"].requires_grad_()
    step = EmulatedSdeStep(asan, splits=2)(**arguments)
    content = call._bytes
    monkeypatch.setattr(call, "_bytes", lambda t: b"" if t.shape[1:] == (300,) else content(t))
    (grad,) = torch.autograd.grad(step.log_prob, output, torch.full((4,), upstream))
    assert (grad == 0).all()


@pytest.mark.parametrize("splits", [0, 1, 3])
def test_no_data_race(tsan, splits):
    three_way(EmulatedSdeStep(tsan, splits=splits), draw((3, 200), guidance=True, residual=True))


# ---- planted faults: each is seen, by the check that is there for it -------------------------------------------------


def check_values(server):
    for splits, numel in ((1, 1004), (3, 1003), (0, 35)):
        for replay in (False, True):
            arguments = draw((3, numel), guidance=True, residual=True, replay=replay)
            three_way(EmulatedSdeStep(server, splits=splits), arguments | {"log_prob_normalizer": replay})


def check_deterministic(server):
    arguments = draw((3, 40), residual=True)
    arguments["noise_level"][1] = 0.0
    three_way(EmulatedSdeStep(server), arguments)


def check_odd_address(server):
    three_way(EmulatedSdeStep(server, offsets={"residual": 1}), draw((1, 64), residual=True))


def check_races(server):
    three_way(EmulatedSdeStep(server, splits=3), draw((3, 200)))


KERNEL, SCHEDULE, PARTS, STREAM = "sde_step.cu", "schedule.cuh", "common/parts.cuh", "common/stream.cuh"
OVERFLOW, RACE, WRONG = "heap-buffer-overflow", "data race", "error "
# name: (the fault, sanitizer, check, what the check says)
FAULTS = {
    "a vector read past the end": (
        Fault(STREAM, "      if (vector < whole) {", "      if (vector <= whole) {"), "asan", check_values, OVERFLOW
    ),
    "an element past the end": (
        Fault(STREAM, "tail < count; tail += part.threads", "tail <= count; tail += part.threads"),
        "asan", check_values, OVERFLOW,
    ),
    "a dropped tail": (
        Fault(STREAM, "tail < count; tail += part.threads", "tail < 0; tail += part.threads"),
        "asan", check_values, WRONG,
    ),
    "vectors at an odd address": (
        Fault(KERNEL, "mean.aligned(first) && residual.aligned(first)", "mean.aligned(first)"),
        "asan", check_odd_address, "misaligned address",
    ),
    "a run that is not added up": (Fault(KERNEL, "    sum += run;\n", ""), "asan", check_values, WRONG),
    "noise on a given latent": (
        Fault(KERNEL, "draws(p.call.latents.noise.data)", "draws(true)"), "asan", check_values, WRONG
    ),
    "no guidance in a tail": (
        Fault(KERNEL, "if (uncond.present) {", "if (uncond.present && kCount > 1) {"),
        "asan", check_values, WRONG,
    ),
    "guidance's other share": (
        Fault(KERNEL, "fmaf(-b, guidance, b)", "b * guidance"), "asan", check_values, "grad uncond_output"
    ),
    "a normalizer that is not asked for": (
        Fault(KERNEL, "call.log_prob_normalizer ? log(std)", "true ? log(std)"), "asan", check_values, "log_prob"
    ),
    "a deterministic row divided by its std": (
        Fault(KERNEL, "step.std == 0.f ? 0.f : 1.f / step.std", "1.f / step.std"),
        "asan", check_deterministic, "not finite",
    ),
    "one partial sum for all splits": (
        Fault(PARTS, "of_row[part.split * kCount + i] = sums[i]", "of_row[i] = sums[i]"),
        "asan", check_values, "not finite|error",
    ),
    "no barrier before the step is read": (
        Fault(SCHEDULE, "  __syncthreads();\n  return {s_step", "  return {s_step"), "tsan", check_races, RACE
    ),
    "no fence after the count": (
        Fault(PARTS, "    __threadfence();  // the count comes before what the last block reads\n", ""),
        "tsan", check_races, RACE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(builds, name):
    fault, sanitizer, check, says = FAULTS[name]
    server = start(builds / f"sde-step-{name.replace(' ', '-')}", sanitizer, fault, ("sde_step", "f32"))
    try:
        with pytest.raises(AssertionError, match=says):
            check(server)
    finally:
        server.close()


@pytest.mark.parametrize("check", [check_values, check_deterministic, check_odd_address])
def test_checks_pass_without_a_fault(asan, check):
    check(asan)


def test_check_for_races_passes_without_a_fault(tsan):
    check_races(tsan)


def test_every_entry_point_is_emulated(asan):
    wanted = {name for name, _ in _native.cuda_entry_points() if name.startswith("sde_step")}
    mine = {f"sde_step_{way}_{name}" for way in ("forward", "backward") for name in call_sde_step.VARIANTS.values()}
    assert wanted == mine | {"sde_step_forward_mixed", "sde_step_backward_mixed"}
