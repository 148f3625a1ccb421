"""`flowdppo_ops.loss`: parity with the reference, and what it promises beyond it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CELLS, DTYPES, LAYOUTS, OBJECTIVES, SIZES, VARIANTS, draw, mask_cells
from pairs import covering
from parity import far_from_ties, run, three_way

from flowdppo_ops import FlowDPPO, FlowGRPO

SOURCES = ("sample", "sample and old", "log_prob")
DENSITIES = ("gaussian", "cps")
LATENT_REDUCTIONS = ("mean", "sum")
REDUCTIONS = ("mean", "sum", "none", "kept_mean")

objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


# ---- parity ----------------------------------------------------------------------------------------------------------


@covering(
    objective=OBJECTIVES,
    source=SOURCES,
    density=DENSITIES,
    latent_reduction=LATENT_REDUCTIONS,
    reduction=REDUCTIONS,
)
def test_options(loss, objective, source, density, latent_reduction, reduction):
    arguments = draw(
        source=source,
        objective=objective,
        density=density,
        latent_reduction=latent_reduction,
        reduction=reduction,
        weights=reduction in ("sum", "none"),
    )
    assert far_from_ties(arguments)
    mine = three_way(loss, arguments)
    # The premise of the whole matrix: some rows are let through and some are not.
    assert 0 < mine["keep"].sum() < mine["keep"].numel()


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("source", SOURCES)
def test_variants(loss, objective, source):
    three_way(loss, draw(source=source, objective=objective, weights=True))


@covering(objective=OBJECTIVES, dtypes=DTYPES, source=SOURCES)
def test_dtypes(loss, objective, dtypes, source):
    arguments = draw(
        source=source, objective=objective, dtypes=dtypes, weights=True, ref_kl_weight=0.5, latent_shape=(4, 9)
    )
    mine = three_way(loss, arguments)
    latents = [v for k, v in arguments.items() if k.endswith(("sample", "mean", "log_prob")) and torch.is_tensor(v)]
    arithmetic = torch.float64 if any(v.dtype == torch.float64 for v in latents) else torch.float32
    for name in ("loss", "log_prob", "log_ratio", "ratio", "kl"):
        assert mine[name].dtype == arithmetic, name
    assert mine["keep"].dtype == torch.bool
    for name in ("prev_sample_mean", "log_prob"):
        if f"grad {name}" in mine:
            assert mine[f"grad {name}"].dtype == arguments[name].dtype, name


@covering(objective=OBJECTIVES, reduction=REDUCTIONS, source=SOURCES, latent_reduction=LATENT_REDUCTIONS)
def test_reference_kl(loss, objective, reduction, source, latent_reduction):
    arguments = draw(
        source=source,
        objective=objective,
        reduction=reduction,
        latent_reduction=latent_reduction,
        ref_kl_weight=0.3,
        weights=True,
    )
    three_way(loss, arguments)
    del arguments["ref_std"]  # then std stands in for it
    three_way(loss, arguments)


@covering(objective=OBJECTIVES, layout=LAYOUTS, reduction=("mean", "none"))
def test_layouts(loss, objective, layout, reduction):
    row_shape, latent_shape = layout
    for seed in range(4):  # so that the layouts with few rows see every KL, ratio and sign
        arguments = draw(row_shape, latent_shape, objective=objective, reduction=reduction, seed=3 * seed)
        mine = three_way(loss, arguments)
        assert mine["ratio"].shape == mine["keep"].shape == row_shape
        assert mine["loss"].shape == (row_shape if reduction == "none" else ())
        assert mine["grad prev_sample_mean"].shape == row_shape + latent_shape


@pytest.mark.parametrize("numel", SIZES, ids=lambda n: str(n))
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "every latent another", "float64"])
def test_sizes(loss, numel, dtypes):
    rows = 2 if numel > 2000 else 5
    arguments = draw((rows,), (numel,), dtypes=DTYPES[dtypes], objective=FlowDPPO(mask="none"), seed=1)
    three_way(loss, arguments)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("numel", [1, 3, 33, 32769])
def test_no_element_is_missed(loss, numel, where):
    """One element differs from zero; all statistics and the gradient come from it alone, exactly."""
    place = 0 if where == "first" else numel - 1
    mean, old, sample = (torch.zeros(3, numel) for _ in range(3))
    mean[1, place], sample[1, place] = 0.5, 2.0
    mean.requires_grad_()
    result = loss(
        mean,
        old,
        torch.ones(3),
        std=1.0,
        prev_sample=sample,
        density="cps",
        latent_reduction="sum",
        reduction="sum",
        objective=FlowGRPO(clip_range=1e9),
    )
    result.loss.backward()
    assert result.log_prob.tolist() == [0, -2.25, 0]
    assert result.log_ratio.tolist() == [0, 2 * 0.5 * 2 - 0.25, 0]
    assert result.kl.tolist() == [0, 0.125, 0]
    wanted = torch.zeros(3, numel)
    wanted[1, place] = -2 * 1.5 * result.ratio[1]
    torch.testing.assert_close(mean.grad, wanted, rtol=1e-6, atol=0)


def test_log_probs_alone(loss):
    """FlowGRPO with both log-probs needs no latents and no std, and has no KL then."""
    arguments = draw((4, 3), source="log_prob", objective=OBJECTIVES["grpo"], reduction="none", weights=True)
    for name in ("prev_sample_mean", "old_prev_sample_mean", "std"):
        arguments[name] = None
    mine = three_way(loss, arguments)
    assert mine["kl"] is None
    assert not [name for name in mine["metrics"] if name.startswith("kl")]


def test_grpo_without_old_mean(loss):
    arguments = draw(source="sample and old", objective=OBJECTIVES["grpo"])
    arguments["old_prev_sample_mean"] = None
    mine = three_way(loss, arguments)
    assert mine["kl"] is None


def test_no_normalize_kl_ignores_std(loss):
    arguments = draw(objective=FlowDPPO(normalize_kl=False))
    drift = (arguments["prev_sample_mean"] - arguments["old_prev_sample_mean"]).double()
    torch.testing.assert_close(loss(**arguments).kl.double(), drift.square().flatten(1).mean(1) / 2, rtol=1e-6, atol=0)


# ---- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 41, 49, 64])  # 41 (49 in float64): N times the rounded 1/N is not 1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_mask_cell(loss, numel, dtype):
    arguments, keep = mask_cells(numel, dtype)
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = loss(**arguments, reduction="sum")
    result.loss.backward()
    wrong = [cell for cell, want, got in zip(CELLS, keep, result.keep, strict=True) if want != got]
    assert not wrong
    for row, (kl, ratio, sign) in enumerate(CELLS):
        here, at, limit = result.kl[row].item(), result.ratio[row].item(), 2.0**-5
        assert {"below": here < limit, "at": here == limit, "above": here > limit}[kl]
        assert {"below": at < 1, "at": at == 1, "above": at > 1}[ratio]
        moved = bool((mean.grad[row] != 0).any())
        silent = sign == 0 or torch.equal(arguments["prev_sample"][row], arguments["prev_sample_mean"][row])
        assert moved == (bool(keep[row]) and not silent), (kl, ratio, sign)


@pytest.mark.parametrize("mask", ["symmetric", "none"])
def test_mask_cells_of_the_ablations(loss, mask):
    arguments, _ = mask_cells(64)
    arguments["objective"] = FlowDPPO(kl_mask_threshold=2.0**-5, mask=mask)
    keep = [mask == "none" or kl == "below" for kl, _, _ in CELLS]
    assert loss(**arguments).keep.tolist() == keep


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(("log_ratio", "side"), [(-0.5, -1), (-0.25, 0), (0.0, 0), (0.125, 0), (0.25, 1)])
def test_every_clip_cell(loss, sign, log_ratio, side):
    """Ratios below, in and above [1 - 0.3, 1 + 0.2]; clipped only where the advantage favours leaving."""
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    result = loss(
        None,
        None,
        torch.tensor([sign]),
        log_prob=log_prob,
        old_log_prob=torch.zeros(1),
        objective=FlowGRPO(clip_range=(0.3, 0.2)),
    )
    result.loss.backward()
    clipped = side * sign > 0
    assert result.keep.item() == (not clipped)
    ratio = np.exp(log_ratio)
    wanted = -sign * (np.clip(ratio, 0.7, 1.2) if clipped else ratio)
    assert abs(result.loss.item() - wanted) <= 2e-7
    assert abs(log_prob.grad.item() - (0 if clipped else wanted)) <= 2e-7
    metrics = result.metrics()
    assert (metrics["clipfrac_gt_one"], metrics["clipfrac_lt_one"]) == (side > 0, side < 0)
    assert metrics["masked_fraction"] == clipped


def test_clip_range_zero_keeps_the_on_policy_ratio(loss):
    """A ratio of exactly 1 lies on both limits, and a limit is inside."""
    arguments = draw(objective=FlowGRPO(clip_range=0.0))
    arguments["prev_sample_mean"] = arguments["old_prev_sample_mean"]
    result = loss(**arguments)
    assert result.keep.all()
    metrics = result.metrics()
    assert [metrics[name] for name in ("clip_fraction", "clipfrac_gt_one", "clipfrac_lt_one")] == [0, 0, 0]


@pytest.mark.parametrize("nan_kl", ["mask", "keep"])
def test_nan_kl(loss, nan_kl):
    """A NaN KL beside finite log-probs: high for UniRL, low for verl-omni."""
    arguments = draw((4,), source="log_prob", objective=FlowDPPO(nan_kl=nan_kl))
    arguments["old_prev_sample_mean"][:, 1] = float("nan")
    arguments["advantages"] = torch.ones(4)
    arguments["log_prob"] = arguments["old_log_prob"] + torch.tensor([0.1, -0.1, 0.1, -0.1])
    mine = run(loss, arguments)
    assert mine["kl"].isnan().all()
    assert mine["keep"].tolist() == [nan_kl == "keep", True, nan_kl == "keep", True]
    assert mine["metrics"]["nonfinite_fraction"] == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_blocked_rows_are_exactly_zero(loss, reduction):
    arguments = draw(reduction=reduction, objective=FlowDPPO(kl_mask_threshold=0.0, mask="symmetric"))
    mine = run(loss, arguments)
    assert not mine["keep"].any()
    assert (mine["loss"] == 0).all()
    assert (mine["grad prev_sample_mean"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_blocked_infinite_ratio(loss, dtype):
    """exp overflows: a blocked row has loss 0 and gradient 0, not 0 * inf, and leaves its neighbours alone."""
    arguments = draw((3,), dtypes={"*": dtype}, objective=FlowDPPO(mask="symmetric", kl_mask_threshold=0.05), seed=0)
    arguments["advantages"] = torch.ones(3, dtype=dtype)
    calm = run(loss, arguments)
    assert calm["keep"].tolist() == [True, False, True]
    step = arguments["prev_sample_mean"][1] - arguments["old_prev_sample_mean"][1]
    arguments["prev_sample"][1] += 4000 * step
    mine = run(loss, arguments)
    assert mine["ratio"][1] == float("inf")
    assert torch.isfinite(mine["loss"])
    assert (mine["grad prev_sample_mean"][1] == 0).all()
    assert torch.equal(mine["grad prev_sample_mean"], calm["grad prev_sample_mean"])
    assert torch.equal(mine["loss"], calm["loss"])


def test_blocked_row_with_an_infinite_latent_keeps_its_penalty(fused):
    """What a blocked row no longer needs is not read: no 0 * inf beside the reference term."""
    mean = torch.randn(1, 40, requires_grad=True)
    ref_mean, prev_sample = torch.randn(1, 40), torch.randn(1, 40)
    prev_sample[0, 7] = float("inf")
    result = fused(
        mean,
        torch.randn(1, 40),
        -torch.ones(1),
        std=0.5,
        prev_sample=prev_sample,
        old_log_prob=torch.zeros(1),
        ref_prev_sample_mean=ref_mean,
        ref_kl_weight=0.5,
    )
    result.loss.backward()
    assert (result.ratio.item(), result.keep.item()) == (0.0, False)
    wanted = 0.5 * (mean.detach() - ref_mean) / (0.5**2 * 40)
    assert (mean.grad - wanted).abs().max() <= 2e-7 * wanted.abs().max()


def test_clipped_infinite_ratio(loss):
    log_prob = torch.tensor([1000.0, 0.0], requires_grad=True)
    result = loss(None, None, torch.ones(2), log_prob=log_prob, old_log_prob=torch.zeros(2), objective=FlowGRPO(0.5))
    result.loss.backward()
    assert result.loss.item() == -(1.5 + 1) / 2
    assert log_prob.grad.tolist() == [0, -0.5]


@pytest.mark.parametrize("nothing", [False, True])
def test_kept_mean(loss, nothing):
    objective = FlowDPPO(kl_mask_threshold=0.0 if nothing else 1e-2, mask="symmetric")
    arguments = draw((8,), objective=objective, reduction="none")
    rows = loss(**arguments)
    kept = rows.keep.sum().item()
    assert kept == (0 if nothing else 4)
    mine = run(loss, arguments | {"reduction": "kept_mean"})
    wanted = rows.loss.double().sum() / max(kept, 1)
    assert abs(mine["loss"].double() - wanted) <= 1e-7
    assert bool((mine["grad prev_sample_mean"] == 0).all()) == nothing


# ---- exactness -------------------------------------------------------------------------------------------------------


@covering(
    dtypes=("float32", "bfloat16", "float16", "float64"),
    density=DENSITIES,
    latent_reduction=LATENT_REDUCTIONS,
    objective=OBJECTIVES,
)
def test_on_policy_is_exact(loss, dtypes, density, latent_reduction, objective):
    """Equal means: ratio 1 and KL 0 to the last bit; and the log-prob of one call is the old one of the next."""
    arguments = draw(
        (3, 2), (1003,), dtypes=DTYPES[dtypes], density=density, latent_reduction=latent_reduction, objective=objective
    )
    arguments["old_prev_sample_mean"] = arguments["prev_sample_mean"].clone()
    first = loss(**arguments)
    again = loss(**arguments, old_log_prob=first.log_prob)
    for result in (first, again):
        assert (result.ratio == 1).all()
        assert (result.log_ratio == 0).all()
        assert (result.kl == 0).all()
        assert result.keep.all()
    metrics = first.metrics()
    assert (metrics["ratio_mean"], metrics["ratio_std"], metrics["approx_kl"]) == (1, 0, 0)


@objectives
def test_power_of_two_scaling_commutes(loss, objective):
    """A GradScaler's factor: the gradient is scaled, to the bit."""
    arguments = draw(objective=objective, dtypes=DTYPES["bfloat16 policy, float32 rollout"])
    plain, scaled = run(loss, arguments), run(loss, arguments, upstream=65536.0)
    assert torch.equal(scaled["grad prev_sample_mean"], 65536 * plain["grad prev_sample_mean"])
