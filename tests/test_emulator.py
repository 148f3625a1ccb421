"""The kernels behind `loss`, the very sources, run on the CPU by the emulator in tests/emulator.

Under AddressSanitizer and UndefinedBehaviorSanitizer they go through the whole suite of `loss`, with blocks and threads
in another order at every launch. ThreadSanitizer, slow, watches the last-block protocol on small grids. Planted faults
show that each check can fail.
"""

from __future__ import annotations

import sys
import zlib

import pytest
import torch
from cases import CELLS, DTYPES, OBJECTIVES, draw, mask_cells
from compilers import needs_cxx
from emulator import call
from emulator.build import Fault
from emulator.call import EmulatedLoss, Float64, start
from parity import equal_bits, run, three_way
from test_policy_loss import (  # noqa: F401
    test_anchors_get_no_gradient,
    test_backward_twice_accumulates,
    test_blocked_infinite_ratio,
    test_blocked_row_with_an_infinite_latent_keeps_its_penalty,
    test_blocked_rows_are_exactly_zero,
    test_clip_range_zero_keeps_the_on_policy_ratio,
    test_clipped_infinite_ratio,
    test_dtypes,
    test_every_clip_cell,
    test_every_mask_cell,
    test_grpo_without_old_mean,
    test_kept_mean,
    test_layouts,
    test_log_prob_source_gives_the_mean_no_gradient,
    test_log_probs_alone,
    test_mask_cells_of_the_ablations,
    test_metrics,
    test_nan_kl,
    test_no_element_is_missed,
    test_no_normalize_kl_ignores_std,
    test_on_policy_is_exact,
    test_only_the_loss_is_differentiable,
    test_options,
    test_power_of_two_scaling_commutes,
    test_reference_kl,
    test_sizes,
    test_variants,
)

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    needs_cxx,
]

objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
MEANS = ("prev_sample_mean", "prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean")


@pytest.fixture
def loss(request, asan):
    """What the tests of `loss` drive: each gets one of four ways to cut rows into blocks, and always the same one."""
    splits = (None, 1, 2, 5)[zlib.crc32(request.node.name.encode()) % 4]
    emulated = EmulatedLoss(asan, splits=splits)

    def loss(*arguments, **options):
        try:
            return emulated(*arguments, **options)
        except Float64:
            pytest.skip("float64 latents are computed on the CPU alone")

    return loss


@pytest.fixture
def fused(loss):
    """Here too, what the reference does not promise."""
    return loss


# ---- how rows are cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 1, 2, 3, 64])
@pytest.mark.parametrize(("rows", "numel"), [(3, 1), (9, 63), (2, 64), (5, 130), (3, 4101), (1, 70_000)])
@objectives
def test_splits(asan, objective, rows, numel, splits):
    """Empty splits, one element in the last, a warp per row with the last block half full, runs of 65536."""
    if splits == 0 and numel > 5000:
        splits = 17  # a warp per row is for short rows
    arguments = draw((rows,), (numel,), objective=objective, ref_kl_weight=0.2, weights=True, reduction="kept_mean")
    three_way(EmulatedLoss(asan, splits=splits), arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@objectives
def test_many_rows(asan, objective, reduction):
    """More rows than threads in a block: the batch's loops go round."""
    three_way(EmulatedLoss(asan), draw((700,), (3,), objective=objective, reduction=reduction, ref_kl_weight=0.1))


@pytest.mark.parametrize("splits", [0, 1, 6])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "every latent another"])
@objectives
def test_same_bits_in_any_order(asan, objective, dtypes, splits):
    arguments = draw((7,), (700,), dtypes=DTYPES[dtypes], objective=objective, ref_kl_weight=0.1, reduction="none")
    natural = run(EmulatedLoss(asan, splits=splits, seed=0), arguments)
    for seed in range(1, 6):
        equal_bits(run(EmulatedLoss(asan, splits=splits, seed=seed), arguments), natural)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("where", [*MEANS, "grad_output", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_addresses(asan, dtype, where, offset):
    """No base is promised to be a multiple of 16 bytes; elements on both sides belong to somebody else."""
    names = (*MEANS, "grad_output") if where == "all" else (where,)
    arguments = draw((2,), (200,), dtypes=DTYPES[dtype], objective=OBJECTIVES["guard"], ref_kl_weight=0.3)
    three_way(EmulatedLoss(asan, splits=2, offsets=dict.fromkeys(names, offset)), arguments)


@pytest.mark.parametrize("numel", [8, 1000, 5003])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_mixed_kernels_take_equal_dtypes_too(asan, dtype, numel):
    arguments = draw((3,), (numel,), dtypes=DTYPES[dtype], objective=OBJECTIVES["guard"], ref_kl_weight=0.3)
    three_way(EmulatedLoss(asan, variant="mixed"), arguments)


@pytest.mark.parametrize("anchors", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [7, 1024, 5003])
@objectives
def test_float32_mean_with_16_bit_anchors(asan, objective, anchors, numel):
    names = ("prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean")
    dtypes = {"*": torch.float32} | dict.fromkeys(names, anchors)
    arguments = draw((3,), (numel,), dtypes=dtypes, objective=objective, ref_kl_weight=0.3)
    three_way(EmulatedLoss(asan), arguments)


# ---- beside the CPU backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 3])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), FlowDPPO(kl_mask_threshold=2.0**-5, mask="symmetric")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
def test_bits_of_the_cpu_backend(asan, objective, reduction, splits):
    """Where the sums over the latents are exact, the two backends give the same bits: their row formulas are twins."""
    arguments, _ = mask_cells(64)
    options = {"objective": objective, "reduction": reduction, "sqrt_dt": 0.4}
    mine = run(EmulatedLoss(asan, splits=splits), arguments | options)
    equal_bits(mine, run(flowdppo_ops.loss, arguments | options))


def test_an_infinite_old_mean_in_a_clipped_row_leaves_the_penalty(asan):
    """The drift has no coefficient there: the old mean is not read, so no 0 * inf beside the reference term."""
    objective = GRPOGuard(clip_range=0.01, per_row_scale=True)
    arguments = draw((4,), (40,), source="log_prob", objective=objective, ref_kl_weight=0.5)
    arguments["advantages"] = torch.ones(4)
    arguments["old_prev_sample_mean"][1, 7] = float("inf")
    mine = run(EmulatedLoss(asan), arguments)
    mean, ref_mean = (arguments[name][1].double() for name in ("prev_sample_mean", "ref_prev_sample_mean"))
    wanted = 0.5 * (mean - ref_mean) / (arguments["ref_std"][1].double() ** 2 * 40 * 4)
    assert not mine["keep"][1]
    assert (mine["grad prev_sample_mean"][1] - wanted).abs().max() <= 2e-7 * wanted.abs().max()


def test_an_infinite_upstream_gradient_leaves_blocked_rows_alone(asan):
    """A GradScaler that overflowed: 0 * inf would make NaN of what was blocked."""
    arguments, keep = mask_cells(64)
    mine = run(EmulatedLoss(asan), arguments, upstream=float("inf"))
    assert (mine["grad prev_sample_mean"][~keep] == 0).all()
    equal_bits(mine, run(flowdppo_ops.loss, arguments, upstream=float("inf")))


@pytest.mark.parametrize("reduction", ["mean", "kept_mean", "none"])
@pytest.mark.parametrize("where", [0, 3, 299])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(asan, value, where, reduction):
    """It shows in every metric as in the CPU backend: NaN wins a maximum, in whatever row it is."""
    log_prob = torch.zeros(300)
    log_prob[where] = value
    arguments = {
        "prev_sample_mean": None,
        "old_prev_sample_mean": None,
        "advantages": torch.arange(300) % 3 - 1.0,
        "log_prob": log_prob,
        "old_log_prob": torch.arange(300) % 4 / 8,
        "reduction": reduction,
        "objective": FlowGRPO(clip_range=0.125),
    }
    equal_bits(run(EmulatedLoss(asan), arguments), run(flowdppo_ops.loss, arguments))


def test_blocked_rows_are_not_read(asan, monkeypatch):
    """The latents that the backward gets have no bytes at all: a single read would end it."""
    emulated = EmulatedLoss(asan, splits=2)
    arguments = draw((4,), (300,), objective=FlowDPPO(kl_mask_threshold=0.0, mask="symmetric"))
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = emulated(**arguments)
    monkeypatch.setattr(call, "_bytes", lambda tensor: b"" if tensor.shape[1:] == (300,) else CONTENT(tensor))
    result.loss.backward()
    assert not result.keep.any()
    assert (mean.grad == 0).all()


CONTENT = call._bytes


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [0, 1, 3])
@objectives
def test_no_data_race(tsan, objective, splits):
    three_way(EmulatedLoss(tsan, splits=splits), draw((3,), (70,), objective=objective, ref_kl_weight=0.1))


# ---- planted faults: each is seen, by the check that is there for it -------------------------------------------------


def check_mask(server):
    arguments, keep = mask_cells(64)
    got = EmulatedLoss(server, splits=2)(**arguments).keep
    wrong = [cell for cell, a, b in zip(CELLS, got, keep, strict=True) if a != b]
    assert not wrong, f"mask cells: {wrong}"


def check_clip(server):
    """A ratio of exactly 1 on the limit of an empty clip range."""
    arguments = draw((12,), (64,), objective=FlowGRPO(clip_range=0.0))
    arguments["prev_sample_mean"] = arguments["old_prev_sample_mean"]
    assert EmulatedLoss(server)(**arguments).keep.all(), "clip limits"


def check_values(server):
    for splits, numel in ((1, 1004), (3, 1003), (0, 35)):  # whole vectors, and tails of 3
        three_way(
            EmulatedLoss(server, splits=splits), draw((3,), (numel,), objective=GRPOGuard(0.01), ref_kl_weight=0.1)
        )


def check_odd_address(server):
    three_way(EmulatedLoss(server, offsets={"prev_sample": 1}), draw((1,), (64,)))


def check_races(server):
    for objective in (OBJECTIVES["dppo"], OBJECTIVES["guard"]):
        for splits in (0, 3):
            three_way(EmulatedLoss(server, splits=splits), draw((3,), (70,), objective=objective))


KERNEL, OBJECTIVE = "policy_loss.cu", "objective.cuh"
PARTS, REDUCE, STREAM = "common/parts.cuh", "common/reduce.cuh", "common/stream.cuh"
OVERFLOW, RACE, WRONG = "heap-buffer-overflow", "data race", "keep: |not finite|: error "
# name: (the fault, sanitizer, check, what the check says)
FAULTS = {
    "no barrier inside the block's sum": (
        Fault(REDUCE, "  __syncthreads();\n  if (warp == 0) {", "  if (warp == 0) {"), "asan", check_values, WRONG
    ),
    "no barrier inside the block's sum, seen as a race": (
        Fault(REDUCE, "  __syncthreads();\n  if (warp == 0) {", "  if (warp == 0) {"), "tsan", check_races, RACE
    ),
    "no barrier before shared memory is used again": (
        Fault(OBJECTIVE, "  __syncthreads();  // before the sums of squares overwrite it\n", ""),
        "tsan", check_races, RACE,
    ),
    "no barrier before the block is counted in": (
        Fault(PARTS, "  __syncthreads();  // the whole block has written\n", ""), "tsan", check_races, RACE
    ),
    "no barrier before the count is known": (
        Fault(PARTS, "  __syncthreads();\n  return s_last[0];", "  return s_last[0];"), "tsan", check_races, RACE
    ),
    "no fence before the count": (
        Fault(PARTS, "    __threadfence();  // for the block: its writes come before the count\n", ""),
        "tsan", check_races, RACE,
    ),
    "no fence after the count": (
        Fault(PARTS, "    __threadfence();  // the count comes before what the last block reads\n", ""),
        "tsan", check_races, RACE,
    ),
    "a vector read past the end": (
        Fault(STREAM, "kSteps > 1 && vector < vectors) {", "vectorised && vector <= vectors) {"),
        "asan", check_values, OVERFLOW,
    ),
    "an element read past the end": (
        Fault(STREAM, "tail < count; tail += part.threads", "tail <= count; tail += part.threads"),
        "asan", check_values, OVERFLOW,
    ),
    "a gradient written past the end": (
        Fault(KERNEL, "out.store(at, values)", "out.store(kCount == 1 ? at + 1 : at, values)"),
        "asan", check_values, OVERFLOW,
    ),
    "a dropped tail": (
        Fault(STREAM, "tail < count; tail += part.threads", "tail < 0; tail += part.threads"),
        "asan", check_values, WRONG,
    ),
    "a tail of the gradient dropped": (
        Fault(KERNEL, "out.store(at, values)", "if (kCount > 1) out.store(at, values)"),
        "asan", check_values, "grad prev_sample_mean",
    ),
    "a stretch rounded down": (
        Fault(PARTS, "((numel + splits - 1) / splits + kSplitUnit - 1)", "(numel / splits)"),
        "asan", check_values, WRONG,
    ),
    "vectors at an odd address": (
        Fault("transition.cuh", "return mean.aligned(first) && next.aligned(first)", "return mean.aligned(first)"),
        "asan", check_odd_address, "misaligned address",
    ),
    "tickets that are not reset": (
        Fault(PARTS, "atomicInc(ticket, count - 1)", "atomicInc(ticket, 0xffffffffu)"),
        "asan", check_values, "tickets are not 0",
    ),
    "> for >= at the threshold": (
        Fault(OBJECTIVE, "kl >= threshold", "kl > threshold"), "asan", check_mask, "mask cells"
    ),
    ">= for > at a ratio of 1": (
        Fault(OBJECTIVE, "ratio > 1.0 && advantage > 0.0", "ratio >= 1.0 && advantage > 0.0"),
        "asan", check_mask, "mask cells",
    ),
    ">= for > at a clip limit": (
        Fault(OBJECTIVE, "ratio > upper && advantage", "ratio >= upper && advantage"), "asan", check_clip, "clip limits"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(builds, name):
    assert_seen(builds, name, *FAULTS[name])


def assert_seen(builds, name, fault, sanitizer, check, says, variant="f32"):
    """`variant`: of the kernels, the one that the check launches."""
    folder = builds / f"{variant} {name}".replace(" ", "-").replace(">", "gt")
    server = start(folder, sanitizer, fault, ("policy_loss", variant))
    try:
        with pytest.raises(AssertionError, match=says):
            check(server)
    finally:
        server.close()


@pytest.mark.parametrize("check", [check_mask, check_clip, check_values, check_odd_address])
def test_checks_pass_without_a_fault(asan, check):
    check(asan)


def test_check_for_races_passes_without_a_fault(tsan):
    check_races(tsan)
