"""The kernels behind `step_loss`, run by the emulator as test_emulator.py runs those behind `loss`: the whole suite of
`step_loss`, rows cut in every way, sharded latents, races, and planted faults in what a step alone has."""

from __future__ import annotations

import sys
import zlib

import pytest
import torch
from compilers import needs_cxx
from emulator import call
from emulator.build import Fault
from emulator.call import EmulatedStepLoss
from parity import close, equal_bits, run, scales, three_way, upstream_of, widen
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells
from test_emulator import CONTENT, RACE, assert_seen
from test_step_loss import (  # noqa: F401
    test_a_float16_residual_is_on_policy,
    test_a_residual_of_a_deterministic_row_is_not_looked_at,
    test_an_infinite_sample_in_a_blocked_row,
    test_deterministic_rows,
    test_dtypes,
    test_every_mask_cell,
    test_forms,
    test_grpo_without_old_policy,
    test_guidance_shares_the_gradient,
    test_layouts,
    test_nothing_is_random,
    test_on_policy_is_exact,
    test_one_gradient_alone,
    test_options,
    test_schedules,
    test_sizes,
)

import flowdppo_ops
from flowdppo_ops import FlowDPPO, reference

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    needs_cxx,
]

# Of a call with every latent that can be there at once.
LATENTS = ("model_output", "uncond_output", "sample", "prev_sample", "old_residual", "ref_model_output")
GRADIENTS = ("grad_output", "grad_uncond_output")
DPPO, GRPO, GUARD = (STEP_OBJECTIVES[name] for name in ("dppo", "grpo", "guard"))
objectives = pytest.mark.parametrize("objective", [DPPO, GRPO, GUARD], ids=["dppo", "grpo", "guard"])


@pytest.fixture
def step_loss(request, asan):
    """What the tests of `step_loss` drive: each gets one of four ways to cut rows into blocks, and always the same."""
    return EmulatedStepLoss(asan, splits=(None, 1, 2, 5)[zlib.crc32(request.node.name.encode()) % 4])


# ---- how rows are cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize(("rows", "numel"), [(3, 1), (9, 63), (2, 64), (5, 130), (3, 4101), (1, 70_000)])
@pytest.mark.parametrize("old_form", OLD_FORMS)
def test_splits(asan, old_form, rows, numel, splits):
    if splits == 0 and numel > 5000:
        splits = 17
    options = {"objective": GUARD, "ref_form": "mean", "reduction": "kept_mean"}
    arguments = draw_step((rows,), (numel,), old_form=old_form, guidance=numel % 2 == 0, **options)
    three_way(EmulatedStepLoss(asan, splits=splits), arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)
def test_many_rows(asan, objective, reduction):
    options = {"objective": objective, "reduction": reduction, "ref_form": "output", "deterministic": True}
    three_way(EmulatedStepLoss(asan), draw_step((700,), (3,), **options))


@pytest.mark.parametrize("splits", [0, 1, 6])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs, float16 policies", "every latent another"])
@objectives
def test_same_bits_in_any_order(asan, objective, dtypes, splits):
    options = {"objective": objective, "guidance": True, "ref_form": "output", "reduction": "none"}
    arguments = draw_step((7,), (700,), dtypes=STEP_DTYPES[dtypes], **options)
    natural = run(EmulatedStepLoss(asan, splits=splits, seed=0), arguments)
    for seed in range(1, 4):
        equal_bits(run(EmulatedStepLoss(asan, splits=splits, seed=seed), arguments), natural)


@pytest.mark.parametrize("offset", [1, 3, 7])
@pytest.mark.parametrize("where", [*LATENTS, *GRADIENTS, "all"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs, float16 policies"])
def test_odd_addresses(asan, dtypes, where, offset):
    names = (*LATENTS, *GRADIENTS) if where == "all" else (where,)
    options = {"objective": GUARD, "guidance": True, "ref_form": "output", "old_form": "residual"}
    arguments = draw_step((2,), (200,), dtypes=STEP_DTYPES[dtypes], **options)
    three_way(EmulatedStepLoss(asan, splits=2, offsets=dict.fromkeys(names, offset)), arguments)


@pytest.mark.parametrize("numel", [8, 1000, 5003])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 outputs, float16 policies"])
def test_the_mixed_kernels_take_known_dtypes_too(asan, dtypes, numel):
    options = {"objective": GUARD, "guidance": True, "ref_form": "mean", "old_form": "output"}
    arguments = draw_step((3,), (numel,), dtypes=STEP_DTYPES[dtypes], **options)
    three_way(EmulatedStepLoss(asan, variant="step_mixed"), arguments)


@pytest.mark.parametrize("old_form", OLD_FORMS)
@pytest.mark.parametrize("objective", [DPPO, GRPO], ids=["dppo", "grpo"])
def test_the_backward_of_a_step_reads_what_has_a_coefficient(asan, monkeypatch, objective, old_form):
    """Whatever the old policy is given as: of it nothing is left to read, and of a blocked row nothing at all."""
    emulated = EmulatedStepLoss(asan, splits=2)
    arguments = draw_step((4,), (300,), old_form=old_form, objective=objective, guidance=True)
    arguments["advantages"] = torch.zeros(4)
    leaves = [arguments[name].requires_grad_() for name in ("model_output", "uncond_output")]
    result = emulated(**arguments)
    monkeypatch.setattr(call, "_bytes", lambda tensor: b"" if tensor.shape[1:] == (300,) else CONTENT(tensor))
    for gradient in torch.autograd.grad(result.loss, leaves):
        assert (gradient == 0).all()


# ---- sharded latents -------------------------------------------------------------------------------------------------


def sharded(emulated, arguments, sizes):
    """`arguments` cut along the last dimension: every shard's result with its gradients, and the gradients together."""
    latents = [name for name, v in arguments.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
    parts = [arguments | {name: arguments[name].split(sizes, -1)[i] for name in latents} for i in range(len(sizes))]
    for part in parts:
        part["model_output"] = part["model_output"].detach().requires_grad_()
    calls = [emulated.checked(**part) for part in parts]
    sums = torch.stack([emulated.row_sums(each) for each in calls])
    assert sums[:, -1].tolist() == list(sizes)
    results = [emulated.run(each, sums.sum(0)) for each in calls]
    grads = [
        torch.autograd.grad(r.loss, p["model_output"], torch.ones_like(r.loss))[0]
        for r, p in zip(results, parts, strict=True)
    ]
    return results, torch.cat(grads, -1)


@pytest.mark.parametrize("splits", [None, 0, 1, 3])
@pytest.mark.parametrize("sizes", [(300, 301), (1, 40, 640)], ids=str)
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
@objectives
def test_shards_add_up(asan, objective, latent_reduction, sizes, splits):
    """Uneven shards, summed on the host: every shard has the loss of the whole, and its part of the gradient."""
    options = {"objective": objective, "latent_reduction": latent_reduction, "ref_form": "output"}
    arguments = draw_step((9,), (sum(sizes),), old_form="output", reduction="none", **options)
    results, gradient = sharded(EmulatedStepLoss(asan, splits=splits), arguments, sizes)
    eager, truth = run(reference.step_loss, arguments, 1.0), run(reference.step_loss, widen(arguments))
    scale = scales(widen(arguments), truth)
    for result in results:
        assert torch.equal(result.keep, truth["keep"])
        for name in ("log_prob", "log_ratio", "ratio", "kl"):
            close(name, getattr(result, name), eager[name], truth[name], scale.get(name))
        assert torch.equal(result._numbers, results[0]._numbers)
    upstream = upstream_of(eager["loss"])[:, None]
    close(
        "gradient",
        gradient * upstream,
        eager["grad model_output"],
        truth["grad model_output"],
        scale["grad model_output"],
    )


def test_one_shard_is_the_whole(asan):
    arguments = draw_step((9,), (700,), old_form="residual", objective=GUARD)
    results, gradient = sharded(EmulatedStepLoss(asan, splits=3), arguments, (700,))
    whole = run(EmulatedStepLoss(asan, splits=3), arguments)
    assert torch.equal(results[0].ratio, whole["ratio"])
    assert torch.equal(results[0].loss, whole["loss"])
    assert torch.equal(gradient, whole["grad model_output"])


# ---- beside the CPU backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "none", "kept_mean"])
@pytest.mark.parametrize("old_form", OLD_FORMS)
@pytest.mark.parametrize("objective", [*STEP_OBJECTIVES.values(), FlowDPPO(kl_mask_threshold=2.0**-5)])
def test_bits_of_the_cpu_backend(asan, objective, old_form, reduction, splits):
    """Where the sums over the latents are exact, the two backends give the same bits: their row formulas are twins."""
    arguments, _ = step_mask_cells(64, old_form)
    arguments |= {"objective": objective, "reduction": reduction}
    mine = run(EmulatedStepLoss(asan, splits=splits), arguments)
    equal_bits(mine, run(flowdppo_ops.step_loss, arguments))


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 1, 3])
@objectives
def test_no_data_race(tsan, objective, splits):
    options = {"objective": objective, "ref_form": "mean", "guidance": True}
    three_way(EmulatedStepLoss(tsan, splits=splits), draw_step((3,), (70,), **options))


@pytest.mark.parametrize("splits", [0, 1, 3])
@objectives
def test_no_data_race_of_shards(tsan, objective, splits):
    arguments = draw_step((3,), (140,), objective=objective)
    results, _ = sharded(EmulatedStepLoss(tsan, splits=splits), arguments, (60, 80))
    assert torch.equal(results[0].keep, reference.step_loss(**arguments).keep)


# ---- planted faults: each is seen, by the check that is there for it -------------------------------------------------


def check_values(server):
    for number, sampler in enumerate(SAMPLERS):
        for old_form, splits in zip(OLD_FORMS, (0, 1, 3), strict=True):
            options = {"objective": GUARD, "guidance": True, "ref_form": ("output", "mean")[number % 2]}
            arguments = draw_step((3,), (403,), sampler=sampler, old_form=old_form, **options)
            three_way(EmulatedStepLoss(server, splits=splits), arguments)


def check_velocity(server):
    three_way(EmulatedStepLoss(server), draw_step(objective=STEP_OBJECTIVES["velocity"]))


def check_on_policy(server):
    arguments = draw_step(old_form="output")
    arguments["old_model_output"] = arguments["model_output"]
    assert (EmulatedStepLoss(server)(**arguments).kl == 0).all(), "on-policy KL"


def check_deterministic(server):
    for sampler, old_form in (("flow_sde", "mean"), ("cps", "residual")):
        for objective in (DPPO, GUARD, STEP_OBJECTIVES["guard own scale"]):
            options = {"objective": objective, "deterministic": True, "ref_form": "output"}
            arguments = draw_step(sampler=sampler, old_form=old_form, **options) | {"ref_std": None}
            three_way(EmulatedStepLoss(server, splits=1), arguments)


def check_drift_alone(server):
    """In a deterministic row the log-prob has no gradient, and GRPO-Guard's drift still has."""
    arguments = draw_step(old_form="residual", objective=GUARD, deterministic=True)
    three_way(EmulatedStepLoss(server), arguments)


def check_odd_address(server):
    for name in (*LATENTS, *GRADIENTS):
        arguments = draw_step((1,), (64,), guidance=True, old_form="residual", ref_form="output")
        three_way(EmulatedStepLoss(server, offsets={name: 1}), arguments)


def check_races(server):
    for splits in (0, 3):
        three_way(EmulatedStepLoss(server, splits=splits), draw_step((3,), (70,)))


def check_shards(server):
    for splits in (0, 3):
        arguments = draw_step((9,), (341,), objective=GUARD, latent_reduction="mean")
        results, _ = sharded(EmulatedStepLoss(server, splits=splits), arguments, (41, 300))
        wanted = reference.step_loss(**arguments).log_prob
        for result in results:
            assert ((result.log_prob - wanted).abs() <= 1e-5 * wanted.abs()).all(), "log_prob of shards"


KERNEL, OBJECTIVE = "policy_loss.cu", "objective.cuh"
SOURCE, SCHEDULE, PARTS = "transition.cuh", "schedule.cuh", "common/parts.cuh"
WRONG = "keep: |not finite|: error "
# name: (the fault, sanitizer, check, what the check says)
FAULTS = {
    "no barrier before the step is read": (
        Fault(SCHEDULE, "  __syncthreads();\n  return {s_step", "  return {s_step"), "tsan", check_races, RACE
    ),
    "half a warp left out of a shuffle": (
        Fault(SCHEDULE, "__shfl_sync(0xffffffffu", "__shfl_sync(0x0000ffffu"),
        "asan", check_values, "is not in its own mask",
    ),
    "lanes that do not come to a shuffle": (
        Fault(SCHEDULE, "if (part.thread < kWarpSize) {", "if (part.thread < 5) {"), "asan", check_values, "deadlock"
    ),
    "one step for all warps": (
        Fault(PARTS, "part.threads == kWarpSize ? static_cast<int>(threadIdx.x) / kWarpSize : 0", "0"),
        "tsan", check_races, RACE,
    ),
    "the step of another row": (
        Fault(SCHEDULE, "[lane], part.row)", "[lane], 0)"),
        "asan", check_values, WRONG,
    ),
    "no guidance": (
        Fault(SOURCE, "guided(guidance, v[j], w[j])", "v[j]"), "asan", check_values, WRONG
    ),
    "shares of the gradient exchanged": (
        Fault(KERNEL, "uncond.store(at, gradient, 1.f - guidance)", "uncond.store(at, gradient, guidance)"),
        "asan", check_values, "grad uncond_output",
    ),
    "shares of the gradient's tail exchanged": (
        Fault(KERNEL, "uncond.store(at, gradient, 1.f - ", "uncond.store(at, gradient, kCount > 1 ? 1.f - guidance : "),
        "asan", check_values, "grad uncond_output",
    ),
    "a gradient with respect to the mean": (
        Fault(OBJECTIVE, "innovation * transition.b", "innovation"), "asan", check_values, "grad model_output"
    ),
    "a drift of model outputs without b": (
        Fault(SOURCE, "out[j] = b * (v[j] - policy[j])", "out[j] = v[j] - policy[j]"), "asan", check_values, WRONG
    ),
    "a residual not in units of std": (
        Fault(SOURCE, "-unit * (u[j] * inverse_unit - policy[j])", "-(u[j] * inverse_unit - policy[j])"),
        "asan", check_values, WRONG,
    ),
    "the reference in the form of the old policy": (
        Fault(SOURCE, "differences(ref_form,", "differences(old_form,"), "asan", check_values, WRONG
    ),
    "next not read for a residual": (
        Fault(SOURCE, "wanted.innovation || old_form == kResidualForm)", "wanted.innovation)"),
        "asan", check_drift_alone, "grad",
    ),
    "vectors at an odd address": (
        Fault(SOURCE, "sample.aligned(first) && next.aligned(first)", "sample.aligned(first)"),
        "asan", check_odd_address, "misaligned",
    ),
    "gradient vectors at an odd address": (
        Fault(KERNEL, "return output.aligned(first) && uncond.aligned(first);", "return output.aligned(first);"),
        "asan", check_odd_address, "misaligned",
    ),
    "a KL in the space of means": (
        Fault(OBJECTIVE, "transition.b * transition.b", "2.0 * variance"), "asan", check_velocity, WRONG
    ),
    "a deterministic row like any other": (
        Fault(OBJECTIVE, "deterministic = step && is_deterministic(transition)", "deterministic = false"),
        "asan", check_deterministic, WRONG,
    ),
    "a KL divided by 0": (
        Fault(OBJECTIVE, "(step && kl_divisor == 0.0)", "false"), "asan", check_deterministic, WRONG
    ),
    "a reference divided by 0": (
        Fault(OBJECTIVE, "!(step && ref_std == 0.0)", "true"), "asan", check_deterministic, WRONG
    ),
    "a guard's scale of 0": (
        Fault(OBJECTIVE, "no_drift = objective.kind != kGrpoGuard || (step && scale == 0.0)",
              "no_drift = objective.kind != kGrpoGuard"),
        "asan", check_deterministic, WRONG,
    ),
    "dt for sqrt(-dt)": (
        Fault(SCHEDULE, "noise_level * sqrt(flow", "noise_level * (flow"), "asan", check_values, WRONG
    ),
    "cosine for sine": (
        Fault(SCHEDULE, "sinpi(0.5 * noise_level)", "sinpi(0.5 - 0.5 * noise_level)"), "asan", check_values, WRONG
    ),
    "the elements of a shard for those of all": (
        Fault(KERNEL, "p.stage == kObjectiveAlone ? p.row_sums[4 * call.rows]", "false ? 0.0"),
        "asan", check_shards, "log_prob of shards",
    ),
    "sums of another row": (
        Fault(KERNEL, "p.row_sums + 4 * part.row;", "p.row_sums + 4 * 0;"), "asan", check_shards, "log_prob of shards"
    ),
    "a cancelling drift": (
        Fault(SOURCE, "out[j] = b * (v[j] - policy[j])", "out[j] = b * v[j] - 1.0000001f * b * policy[j]"),
        "asan", check_on_policy, "on-policy KL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(builds, name):
    assert_seen(builds, name, *FAULTS[name], variant="step_f32")


CHECKS = {check for _, sanitizer, check, _ in FAULTS.values() if sanitizer == "asan"}


@pytest.mark.parametrize("check", sorted(CHECKS, key=lambda check: check.__name__))
def test_checks_pass_without_a_fault(asan, check):
    check(asan)


def test_check_for_races_passes_without_a_fault(tsan):
    check_races(tsan)
