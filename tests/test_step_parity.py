"""`step_loss` against the reference: every option with every other that it can meet, and what the formulas say."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LAYOUTS, SIZES, VARIANTS
from pairs import covering
from parity import equal_bits, far_from_ties, run, three_way
from step_cases import (
    DYADIC,
    FLOAT64_DTYPES,
    LATENTS,
    OLD_FORMS,
    REF_FORMS,
    SAMPLERS,
    SCHEDULE,
    STEP_DTYPES,
    STEP_OBJECTIVES,
    draw_step,
)

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

REDUCTIONS = [("mean", "mean"), ("sum", "sum"), ("none", "mean"), ("kept_mean", "sum")]  # of rows, of latents

ALL_DTYPES = STEP_DTYPES | FLOAT64_DTYPES

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
objectives = pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)


# ---- options ---------------------------------------------------------------------------------------------------------


@covering(
    sampler=SAMPLERS,
    old_form=tuple(OLD_FORMS),
    objective=STEP_OBJECTIVES,
    reductions={" ".join(pair): pair for pair in REDUCTIONS},
)
def test_options(step_loss, sampler, old_form, objective, reductions):
    reduction, latent_reduction = reductions
    options = {"reduction": reduction, "latent_reduction": latent_reduction, "weights": reduction in ("sum", "none")}
    arguments = draw_step(sampler=sampler, old_form=old_form, objective=objective, **options)
    assert far_from_ties(arguments)
    mine = three_way(step_loss, arguments)
    # The premise of the whole matrix: some rows are let through and some are not.
    assert 0 < mine["keep"].sum() < mine["keep"].numel()


@samplers
@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_variants(step_loss, sampler, objective):
    for old_form in OLD_FORMS:
        three_way(step_loss, draw_step(sampler=sampler, old_form=old_form, objective=objective, weights=True))


@samplers
@objectives
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
def test_old_log_prob(step_loss, sampler, objective, latent_reduction):
    for old_form in OLD_FORMS:
        options = {"old_form": old_form, "old_log_prob": True, "weights": True, "latent_reduction": latent_reduction}
        arguments = draw_step(sampler=sampler, objective=objective, **options)
        assert far_from_ties(arguments)
        three_way(step_loss, arguments)


@samplers
@pytest.mark.parametrize("ref_form", [None, *REF_FORMS])
def test_grpo_without_an_old_policy(step_loss, sampler, ref_form):
    arguments = draw_step(sampler=sampler, objective=STEP_OBJECTIVES["grpo"], old_form=None, ref_form=ref_form)
    mine = three_way(step_loss, arguments)
    assert mine["kl"] is None
    assert not [name for name in mine["metrics"] if name.startswith("kl_new")]


@samplers
@objectives
@pytest.mark.parametrize("ref_form", REF_FORMS)
def test_reference_kl(step_loss, sampler, objective, ref_form):
    for reduction, latent_reduction in REDUCTIONS:
        options = {"ref_form": ref_form, "reduction": reduction, "latent_reduction": latent_reduction, "weights": True}
        arguments = draw_step(sampler=sampler, objective=objective, **options)
        if latent_reduction == "sum":  # the transition's stands in for it
            del arguments["ref_std"]
        assert "kl_loss" in three_way(step_loss, arguments)["metrics"]


@objectives
@pytest.mark.parametrize("ref_form", REF_FORMS)
def test_blocked_rows_keep_their_penalty(step_loss, objective, ref_form):
    """Of a row whose update is blocked, the reference's gradient alone is left."""
    arguments = draw_step(objective=objective, ref_form=ref_form, reduction="none")
    mine = run(step_loss, arguments)
    alone = run(step_loss, arguments | {"advantages": torch.zeros(12)})
    blocked = ~mine["keep"]
    assert blocked.any()
    assert (mine["grad model_output"][blocked] != 0).any(-1).any(-1).all()
    assert torch.equal(mine["grad model_output"][blocked], alone["grad model_output"][blocked])


# ---- dtypes, sizes, layouts ------------------------------------------------------------------------------------------


@covering(objective=STEP_OBJECTIVES, old_form=tuple(OLD_FORMS), dtypes=ALL_DTYPES)
def test_dtypes(step_loss, objective, old_form, dtypes):
    options = {"objective": objective, "old_form": old_form, "ref_form": "output", "guidance": True}
    arguments = draw_step(latent_shape=(4, 9), dtypes=dtypes, **options)
    mine = three_way(step_loss, arguments)
    double = any(arguments[name].dtype == torch.float64 for name in LATENTS if name in arguments)
    for name in ("loss", "log_prob", "log_ratio", "ratio", "kl"):
        assert mine[name].dtype == (torch.float64 if double else torch.float32), name
    assert mine["keep"].dtype == torch.bool
    for name in ("model_output", "uncond_output"):
        assert mine[f"grad {name}"].dtype == arguments[name].dtype


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs, float16 policies"])
def test_sizes(step_loss, numel, dtypes):
    three_way(step_loss, draw_step((3,), (numel,), dtypes=STEP_DTYPES[dtypes], old_form="residual", guidance=True))


def test_a_batch_of_images(step_loss):
    """The size that trainers have: [16, 16, 64, 64], model outputs in bfloat16, an old policy in two bytes."""
    dtypes = STEP_DTYPES["bfloat16 outputs, float16 policies"]
    arguments = draw_step((16,), (16, 64, 64), old_form="residual", dtypes=dtypes)
    mine = three_way(step_loss, arguments)
    assert mine["grad model_output"].dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("numel", [1, 3, 33, 2049, 32769])
@pytest.mark.parametrize("guided", [False, True])
def test_no_element_is_missed(step_loss, numel, where, guided):
    """One element differs from zero; all statistics and the gradients come from it alone, exactly."""
    place = 0 if where == "first" else numel - 1
    output, uncond, sample, prev_sample = (torch.zeros(3, numel) for _ in range(4))
    output[1, place], sample[1, place], prev_sample[1, place] = 2.0, 1.0, 0.25
    guidance = {}
    if guided:  # -4 + 1.5 (0 + 4) = 2
        output[1, place], uncond[1, place] = 0.0, -4.0
        guidance = {"uncond_output": uncond.requires_grad_(), "guidance_scale": 1.5}
    schedule, b, _ = DYADIC["cps"]  # mu = x / 2 + b v
    result = step_loss(
        output.requires_grad_(), sample, prev_sample, torch.ones(3), sigma=1.0, **schedule, sampler="cps", **guidance,
        old_prev_sample_mean=torch.zeros(3, numel), latent_reduction="sum", reduction="sum",
        objective=FlowGRPO(clip_range=1e9),
    )  # fmt: skip
    result.loss.backward()
    mean, innovation = -0.5, 0.75
    assert result.log_prob.tolist() == [0, -(innovation**2), 0]
    assert result.log_ratio.tolist() == [0, 2 * mean * 0.25 - mean**2, 0]
    assert result.kl.tolist() == [0, mean**2 / (2 * 0.5**2), 0]
    wanted = torch.zeros(3, numel)
    wanted[1, place] = -2 * innovation * b * result.ratio[1]
    if guided:
        torch.testing.assert_close(uncond.grad, -0.5 * wanted, rtol=1e-6, atol=0)
        wanted *= 1.5
    torch.testing.assert_close(output.grad, wanted, rtol=1e-6, atol=0)


STEP_LAYOUTS = LAYOUTS | {"rows of rank 3": ((2, 3, 2), (5,))}


@samplers
@pytest.mark.parametrize(("row_shape", "latent_shape"), STEP_LAYOUTS.values(), ids=STEP_LAYOUTS)
def test_layouts(step_loss, sampler, row_shape, latent_shape):
    for seed, objective in itertools.product(range(0, 12, 3), ("dppo", "guard")):  # every KL, ratio and sign
        reduction = ("mean", "none")[seed % 2]
        options = {"reduction": reduction, "objective": STEP_OBJECTIVES[objective], "seed": seed}
        mine = three_way(step_loss, draw_step(row_shape, latent_shape, sampler=sampler, **options))
        assert mine["ratio"].shape == mine["keep"].shape == row_shape
        assert mine["loss"].shape == (row_shape if reduction == "none" else ())
        assert mine["grad model_output"].shape == row_shape + latent_shape


@pytest.mark.parametrize("schedule", ["numbers", "0-dim", "[1, S]", "[1, S, 1, 1, 1]", "[B, 1]", "mixed"])
def test_schedules(step_loss, schedule):
    """A trajectory in one call: steps are rows, and a schedule says what they have in common once."""
    arguments = draw_step((2, 3), (4, 5, 6), old_form="output", guidance=True)
    names = ("sigma", "sigma_next", "noise_level", "guidance_scale", "sigma_max")
    shapes = {"[1, S]": (1, 3), "[1, S, 1, 1, 1]": (1, 3, 1, 1, 1), "[B, 1]": (2, 1), "0-dim": (), "numbers": ()}
    for number, name in enumerate(names):
        shape = shapes.get(schedule, ((1, 3), (2, 1), (), (2, 3))[number % 4])
        low, high = {"sigma": (0.7, 0.9), "sigma_next": (0.4, 0.6), "guidance_scale": (1.0, 3.0)}.get(name, (0.5, 0.99))
        value = torch.linspace(low, high, max(1, torch.Size(shape).numel())).reshape(shape)
        arguments[name] = value.item() if schedule == "numbers" else value
    whole = dict(arguments)
    for name in names:
        value = torch.as_tensor(arguments[name])
        whole[name] = value.reshape(value.shape[:2]).expand(2, 3).contiguous()
    equal_bits(three_way(step_loss, arguments), run(step_loss, whole))


# ---- guidance --------------------------------------------------------------------------------------------------------


@covering(sampler=SAMPLERS, old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES)
def test_guidance(step_loss, sampler, old_form, objective):
    for reduction, latent_reduction in REDUCTIONS[:2]:
        options = {"guidance": True, "ref_form": "mean", "reduction": reduction, "latent_reduction": latent_reduction}
        mine = three_way(step_loss, draw_step(sampler=sampler, old_form=old_form, objective=objective, **options))
        assert 0 < mine["keep"].sum() < mine["keep"].numel()


GUIDANCE_SCALES = {
    "number": 4.5,
    "0-dim": torch.tensor(4.5),
    "one": 1.0,
    "zero": 0.0,
    "negative": -1.5,
    "a row": torch.tensor([[1.0], [0.0], [7.5]]),
    "steps, trailing ones": torch.tensor([1.0, 0.0, 2.5, -1.0]).reshape(1, 4, 1, 1),
}


@pytest.mark.parametrize("scale", GUIDANCE_SCALES.values(), ids=GUIDANCE_SCALES)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs", "every latent another"])
def test_guidance_scales(step_loss, scale, dtypes):
    options = {"objective": STEP_OBJECTIVES["guard"], "ref_form": "output", "guidance": True}
    arguments = draw_step((3, 4), (5, 2), dtypes=STEP_DTYPES[dtypes], **options)
    mine = three_way(step_loss, arguments | {"guidance_scale": scale})
    rows = torch.as_tensor(scale)
    rows = rows.reshape(rows.shape[:2]).expand(3, 4)
    assert torch.equal((mine["grad model_output"] != 0).flatten(2).any(-1), rows != 0)
    assert torch.equal((mine["grad uncond_output"] != 0).flatten(2).any(-1), rows != 1)


# ---- one function made of two ----------------------------------------------------------------------------------------


@covering(sampler=SAMPLERS, old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES, old_log_prob=(False, True))
def test_step_loss_is_sde_step_and_loss(native, sampler, old_form, objective, old_log_prob):
    """In float64, with the KL and the gradient in the output by the chain rule."""
    arguments = draw_step(
        sampler=sampler, old_form=old_form, objective=objective, old_log_prob=old_log_prob, ref_form="mean",
        guidance=True, weights=True, dtypes=FLOAT64_DTYPES["float64"],
    )  # fmt: skip
    whole = run(native.step_loss, arguments)
    policy = {name: arguments[name].requires_grad_() for name in ("model_output", "uncond_output")}
    common = {name: arguments[name] for name in (*SCHEDULE, "guidance_scale", "sampler", "sigma_max")}
    step = native.sde_step(**policy, sample=arguments["sample"], **common, prev_sample=arguments["prev_sample"])
    old = arguments[OLD_FORMS[old_form]]
    if old_form == "output":
        old = native.sde_step(old, arguments["sample"], **{**common, "guidance_scale": None}).prev_sample_mean
    elif old_form == "residual":
        old = arguments["prev_sample"] - step.std[:, None, None] * old
    velocity = isinstance(objective, FlowDPPO) and objective.kl_space == "velocity"
    given = {name: arguments[name] for name in ("advantages", "weights", "ref_std", "ref_kl_weight", "prev_sample")}
    if velocity:  # for `loss`, a matter of the threshold: no row is masked in either
        given["objective"] = FlowDPPO(mask="none")
        whole = run(native.step_loss, arguments | {"objective": FlowDPPO(mask="none")})
    else:
        given["objective"] = objective
    if old_log_prob:
        given["old_log_prob"] = arguments["old_log_prob"]
    parts = native.loss(
        step.prev_sample_mean, old, **given, std=step.std, ref_prev_sample_mean=arguments["ref_prev_sample_mean"],
        density="cps" if sampler == "cps" else "gaussian",
        sqrt_dt=torch.sqrt(arguments["sigma"] - arguments["sigma_next"]),
    )  # fmt: skip
    parts.loss.backward()
    assert torch.equal(parts.keep, whole["keep"])
    for name in ("loss", "log_prob", "log_ratio", "ratio", "kl"):
        torch.testing.assert_close(whole[name], getattr(parts, name).detach(), rtol=1e-10, atol=1e-13)
    for name, leaf in policy.items():
        torch.testing.assert_close(whole[f"grad {name}"], leaf.grad, rtol=1e-9, atol=1e-14)


@samplers
def test_velocity_kl(step_loss, sampler):
    """The mean squared difference of the outputs, from whatever form: `d / b^2`, with no factor."""
    options = {"sampler": sampler, "objective": STEP_OBJECTIVES["velocity"], "dtypes": FLOAT64_DTYPES["float64"]}
    drawn = draw_step(old_form="output", **options)
    wanted = (drawn["model_output"] - drawn["old_model_output"]).square().mean((-1, -2))
    for old_form in OLD_FORMS:
        kl = step_loss(**draw_step(old_form=old_form, **options)).kl
        torch.testing.assert_close(kl, wanted, rtol=1e-9, atol=0)


# ---- deterministic rows ----------------------------------------------------------------------------------------------


@covering(
    sampler=SAMPLERS,
    old_form=tuple(OLD_FORMS),
    objective=STEP_OBJECTIVES,
    rows={"one": (5,), "some": (1, 2, 3, 6, 9), "all": tuple(range(12))},
)
def test_deterministic_rows(step_loss, sampler, old_form, objective, rows):
    """No NaN, and the reference's numbers, whatever the other rows are and whatever the old policy's form."""
    fixed = torch.zeros(12, dtype=torch.bool)
    fixed[list(rows)] = True
    options = {"old_form": old_form, "guidance": True, "reduction": "none", "weights": True, "deterministic": rows}
    for ref_form, old_log_prob in zip(REF_FORMS, (False, True), strict=True):
        with_policies = {"ref_form": ref_form, "old_log_prob": old_log_prob}
        arguments = draw_step(sampler=sampler, objective=objective, **options, **with_policies)
        del arguments["ref_std"]  # then the transition's, which is 0
        mine = three_way(step_loss, arguments)
        for value in mine.values():
            assert not isinstance(value, torch.Tensor) or torch.isfinite(value).all()
        assert mine["metrics"]["nonfinite_fraction"] == 0
        if isinstance(objective, GRPOGuard) and not objective.per_row_scale and not fixed.all():
            continue  # the drift is measured with the batch's scale
        if getattr(objective, "normalize_kl", True) and getattr(objective, "kl_space", "latent") == "latent":
            assert (mine["kl"][fixed] == 0).all()
        if sampler != "cps":
            for name in ("log_prob", "grad model_output", "grad uncond_output"):
                assert (mine[name][fixed] == 0).all(), name
            assert (mine["ratio"][fixed] == 1).all() or old_log_prob
        if not fixed.all():
            assert (mine["grad model_output"][~fixed] != 0).any()


@covering(old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES)
def test_nothing_is_random(step_loss, old_form, objective):
    """The last step of CPS, in every row: GRPO-Guard's scale is 0 as well."""
    arguments = draw_step(sampler="cps", old_form=old_form, objective=objective, ref_form="mean")
    arguments |= {"sigma_next": 0.0, "ref_std": None}
    if old_form == "residual":
        arguments["old_residual"] = torch.zeros_like(arguments["old_residual"])
    mine = three_way(step_loss, arguments)
    assert all(mine[name].isfinite().all() for name in ("loss", "ratio", "kl", "grad model_output"))


def test_divisors_of_0(step_loss):
    """A reference std of 0 makes no penalty, and the other rows keep theirs."""
    arguments = draw_step((4,), ref_form="output", reduction="none")
    arguments |= {"ref_std": torch.tensor([0.0, 0.5, 0.0, 0.5]), "advantages": torch.zeros(4)}
    mine = three_way(step_loss, arguments)
    assert torch.equal(mine["loss"] != 0, arguments["ref_std"] != 0)
    assert torch.equal((mine["grad model_output"] != 0).all(-1).all(-1), arguments["ref_std"] != 0)
    # No step at all, sigma_next == sigma: b is 0 as well.
    still = draw_step((4,), (33,), objective=STEP_OBJECTIVES["velocity"])
    mine = run(step_loss, still | {"sigma_next": still["sigma"]})
    assert (mine["kl"] == 0).all()
    assert (mine["grad model_output"] == 0).all()
