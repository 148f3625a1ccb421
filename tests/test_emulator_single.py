"""The kernels that do forward and backward in a single pass, run by the emulator with all blocks side by side: parity
in every dtype mix that they take, however rows are cut, races, and planted faults in what they alone have."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from cases import DTYPES, OBJECTIVES, VARIANTS, draw, mask_cells
from compilers import needs_cxx
from emulator.build import Fault
from emulator.call import Emulated, EmulatedLoss, EmulatedStepLoss, Teams
from parity import equal_bits, run, same_bits, three_way
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells
from test_emulator import OVERFLOW, RACE, assert_seen

import flowdppo_ops
from flowdppo_ops import FlowGRPO

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    needs_cxx,
]

# Blocks of a team, teams, and how many vectors of 8 a thread can keep beyond its part: the next row's beginning.
CUTS = [(1, 1, 0), (1, 3, 1), (3, 2, 0), (5, 2, 1), (2, 5, 9)]
cuts = pytest.mark.parametrize("cut", CUTS, ids=str)
MEANS = ("dppo", "grpo")
MEAN_DTYPES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")} | {
    f"float32, {str(anchors)[6:]} anchors": {
        "*": torch.float32,
        "prev_sample": anchors,
        "old_prev_sample_mean": anchors,
    }
    for anchors in (torch.bfloat16, torch.float16)
}


def single(kind: type[Emulated], server, numel: int, cut: tuple[int, int, int] = CUTS[3], **options) -> Emulated:
    splits, teams, beyond = cut
    part = math.ceil(math.ceil(numel / splits) / 64) * 64
    least = math.ceil(part / (256 * server.warps))
    return kind(server, splits=splits, single=Teams(teams, least + beyond), **options)


# ---- parity ----------------------------------------------------------------------------------------------------------


@cuts
@pytest.mark.parametrize("numel", [8, 64, 200, 4104, 13_000])
@pytest.mark.parametrize("objective", [OBJECTIVES[name] for name in MEANS], ids=MEANS)
def test_means(asan, objective, numel, cut):
    """Empty splits, a last step that not every thread has, several steps; teams whose last turns are not all full."""
    arguments = draw((6,), (numel,), objective=objective, weights=True)
    three_way(single(EmulatedLoss, asan, numel, cut), arguments)


@pytest.mark.parametrize("numel", [520, 9000])
@pytest.mark.parametrize("dtypes", MEAN_DTYPES.values(), ids=MEAN_DTYPES)
def test_dtypes_of_means(asan, dtypes, numel):
    three_way(single(EmulatedLoss, asan, numel), draw((6,), (numel,), dtypes=dtypes))


@cuts
@pytest.mark.parametrize("old_form", OLD_FORMS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps(asan, sampler, old_form, cut):
    arguments = draw_step((6,), (4104,), sampler=sampler, old_form=old_form, guidance=cut[0] % 2 == 1)
    three_way(single(EmulatedStepLoss, asan, 4104, cut), arguments)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("dtypes", [name for name in STEP_DTYPES if name != "every latent another"])
def test_dtypes_of_steps(asan, dtypes, guidance):
    arguments = draw_step((6,), (5000,), dtypes=STEP_DTYPES[dtypes], guidance=guidance, old_form="residual")
    three_way(single(EmulatedStepLoss, asan, 5000), arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
@pytest.mark.parametrize("density", ["gaussian", "cps"])
def test_options(asan, density, latent_reduction, reduction):
    options = {"density": density, "latent_reduction": latent_reduction, "reduction": reduction}
    three_way(single(EmulatedLoss, asan, 520), draw((7,), (520,), source="sample and old", **options))


@pytest.mark.parametrize("objective", [v for name, v in VARIANTS.items() if "guard" not in name])
def test_variants(asan, objective):
    three_way(single(EmulatedLoss, asan, 520), draw((12,), (520,), objective=objective))


@pytest.mark.parametrize("name", ["velocity", "plain kl"])
def test_variants_of_steps(asan, name):
    three_way(single(EmulatedStepLoss, asan, 520), draw_step((12,), (520,), objective=STEP_OBJECTIVES[name]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_deterministic_rows(asan, sampler):
    arguments = draw_step((12,), (520,), sampler=sampler, old_form="residual", deterministic=True)
    three_way(single(EmulatedStepLoss, asan, 520), arguments)


def test_more_rows_than_threads(asan):
    """The steps of a team's rows are formed 256 at a time."""
    three_way(single(EmulatedStepLoss, asan, 64, (1, 2, 1)), draw_step((700,), (64,)))


@cuts
def test_bits_of_the_cpu_backend(asan, cut):
    """Every mask cell. Where the sums over the latents are exact, the backends give the same bits."""
    arguments, keep = mask_cells(520)
    mine = run(single(EmulatedLoss, asan, 520, cut), arguments)
    assert torch.equal(mine["keep"], keep)
    equal_bits(mine, run(flowdppo_ops.loss, arguments))


@pytest.mark.parametrize("old_form", OLD_FORMS)
def test_bits_of_the_cpu_backend_for_steps(asan, old_form):
    arguments, keep = step_mask_cells(520, old_form)
    mine = run(single(EmulatedStepLoss, asan, 520), arguments)
    assert torch.equal(mine["keep"], keep)
    equal_bits(mine, run(flowdppo_ops.step_loss, arguments))


@pytest.mark.parametrize("cut", [(3, 2, 1), (2, 5, 0)], ids=str)
def test_same_bits_in_any_order(asan, cut):
    arguments = draw_step((7,), (5000,), guidance=True)
    natural = run(single(EmulatedStepLoss, asan, 5000, cut, seed=0), arguments)
    for seed in range(1, 6):
        equal_bits(run(single(EmulatedStepLoss, asan, 5000, cut, seed=seed), arguments), natural)


def test_blocked_rows_are_zero_whatever_they_hold(asan):
    arguments = draw((4,), (520,), objective=FlowGRPO(clip_range=0.0), source="sample and old")
    arguments["prev_sample"][1] = float("inf")
    arguments["advantages"] = -torch.ones(4)
    result = run(single(EmulatedLoss, asan, 520), arguments)
    assert not result["keep"][1]
    assert (result["grad prev_sample_mean"][1] == 0).all()


# ---- the gradient that the backward is given -------------------------------------------------------------------------


def test_the_backward_leaves_a_gradient_of_one_alone(asan):
    """Whatever stands there stays; nothing is read."""
    emulated = single(EmulatedLoss, asan, 520)
    arguments = draw((4,), (520,))
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = emulated(**arguments)
    result.loss.grad_fn.formed["grad_output"].fill_(7)
    result.loss.backward()
    assert (mean.grad == 7).all()


@pytest.mark.parametrize("upstream", [0.25, 1 / 3, 65536.0])
@pytest.mark.parametrize("dtypes", ["bfloat16", "bfloat16 outputs, float16 policies"])
def test_any_other_is_the_two_kernels(asan, dtypes, upstream):
    """Not the formed gradient scaled: half precision would be rounded twice."""
    arguments, _ = step_mask_cells(520, "mean", torch.bfloat16)
    arguments = {k: v.to(STEP_DTYPES[dtypes].get(k, torch.float32)) if isinstance(v, torch.Tensor) else v
                 for k, v in arguments.items()}  # fmt: skip
    mine = run(single(EmulatedStepLoss, asan, 520), arguments, upstream=upstream)
    equal_bits(mine, run(EmulatedStepLoss(asan, splits=2), arguments, upstream=upstream))


def test_an_infinite_one_leaves_blocked_rows_alone(asan):
    arguments, keep = mask_cells(64)
    mine = run(single(EmulatedLoss, asan, 64), arguments, upstream=float("inf"))
    assert (mine["grad prev_sample_mean"][~keep] == 0).all()
    wanted = run(flowdppo_ops.loss, arguments, upstream=float("inf"))
    assert same_bits(mine["grad prev_sample_mean"], wanted["grad prev_sample_mean"]).all()


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(1, 2, 1), (3, 1, 1), (2, 2, 0)], ids=str)
def test_no_data_race(tsan, cut):
    three_way(single(EmulatedLoss, tsan, 280, cut), draw((3,), (280,)))
    three_way(single(EmulatedStepLoss, tsan, 280, cut), draw_step((3,), (280,), guidance=True))


# ---- planted faults: each is seen, by the check that is there for it -------------------------------------------------


def check_values(server):
    for cut in CUTS:
        three_way(single(EmulatedLoss, server, 4104, cut), draw((6,), (4104,)))


def check_steps(server):
    for cut in CUTS:
        three_way(single(EmulatedStepLoss, server, 4104, cut), draw_step((6,), (4104,), guidance=True))
    test_more_rows_than_threads(server)


def check_races(server):
    for cut in ((3, 1, 1), (2, 2, 0)):
        three_way(single(EmulatedLoss, server, 280, cut), draw((3,), (280,)))


def check_blocked(server):
    test_blocked_rows_are_zero_whatever_they_hold(server)


def check_formed(server):
    test_the_backward_leaves_a_gradient_of_one_alone(server)


KERNEL, PARTS = "policy_loss_single.cu", "common/parts.cuh"
WRONG = "keep: |not finite|: error "
# name: (the fault, sanitizer, check, what the check says, variant)
FAULTS = {
    "no fence before the word": (
        Fault(KERNEL, "    __threadfence();  // the numbers come before the word that they are there\n", ""),
        "tsan", check_races, RACE, "f32",
    ),
    "no fence after the word": (
        Fault(KERNEL, "    __threadfence();  // the word comes before the numbers\n", ""),
        "tsan", check_races, RACE, "f32",
    ),
    "no waiting for the numbers": (
        Fault(KERNEL, "while (poll(waiting) == 0) pause();", ""), "tsan", check_races, f"{RACE}|tickets", "f32"
    ),
    "no barrier before the coefficient is read": (
        Fault(KERNEL, "  __syncthreads();\n  return s_coefficient[0];", "  return s_coefficient[0];"),
        "tsan", check_races, RACE, "f32",
    ),
    "a word for one reader": (
        Fault(KERNEL, "atomicExch(tickets.waiting + row, static_cast<unsigned>(p.splits))",
              "atomicExch(tickets.waiting + row, 1u)"),
        "asan", check_values, "deadlock|tickets are not 0", "f32",
    ),
    "nobody leaves": (
        Fault(KERNEL, "    atomicSub(waiting, 1u);\n", ""), "asan", check_values, "tickets are not 0", "f32"
    ),
    "the word is never given": (
        Fault(KERNEL, "static_cast<unsigned>(p.splits));\n  }", "0u);\n  }"), "asan", check_values, "deadlock", "f32"
    ),
    "one slot too many": (
        Fault(KERNEL, "slots(room / (kVector * kThreads))", "slots(room / (kVector * kThreads) + 1)"),
        "asan", check_values, OVERFLOW, "f32",
    ),
    "the next row over the last": (
        Fault(KERNEL, "? steps : ring.slots - steps;", "? steps : steps;"), "asan", check_values,
        f"{WRONG}|{OVERFLOW}", "f32",
    ),
    "the slots of the row before": (
        Fault(KERNEL, "    slot = next_slot;\n", ""), "asan", check_values, WRONG, "f32"
    ),
    "the last vectors left out": (
        Fault(KERNEL, "if (vector >= vectors) break;", "break;"), "asan", check_values, WRONG, "f32"
    ),
    "a vector past the part": (
        Fault(KERNEL, "if (vector >= vectors) break;", "if (vector > vectors) break;"), "asan", check_values,
        f"{WRONG}|{OVERFLOW}", "f32",
    ),
    "the coefficient of another row": (
        Fault(KERNEL, "await_coefficient(p, last)", "await_coefficient(p, team)"), "asan", check_values,
        f"{WRONG}|tickets|deadlock", "f32",
    ),
    "a mean that is a sum": (
        Fault(KERNEL, "problem.reduction == kReduceMean ?", "false ?"), "asan", check_values, "grad", "f32"
    ),
    "zero times infinity": (
        Fault(KERNEL, "coefficient == 0.f ? 0.f :", "false ? 0.f :"), "asan", check_blocked, "assert", "f32"
    ),
    "a formed gradient formed again": (
        Fault("policy_loss.cu", "if (p.formed && ", "if (false && "), "asan", check_formed, "assert", "f32"
    ),
    "the step of the team's first row": (
        Fault(KERNEL, "team_step(problem, team, teams, index)", "team_step(problem, team, teams, 0)"),
        "asan", check_steps, WRONG, "step_f32",
    ),
    "the guidance of the next row": (
        Fault(KERNEL, "last * problem.numel + part.first, last_step)", "last * problem.numel + part.first, step)"),
        "asan", check_steps, "grad", "step_f32",
    ),
    "steps that are formed once": (
        Fault(KERNEL, "if (index % kThreads == 0) {", "if (index == 0) {"), "asan", check_steps, WRONG, "step_f32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(builds, name):
    fault, sanitizer, check, says, variant = FAULTS[name]
    assert_seen(builds, name, fault, sanitizer, check, says, variant)


@pytest.mark.parametrize("check", [check_values, check_steps, check_blocked, check_formed])
def test_checks_pass_without_a_fault(asan, check):
    check(asan)


def test_check_for_races_passes_without_a_fault(tsan):
    check_races(tsan)
