"""`step_loss`: parity with the reference for every sampler, form of the old policy, objective and dtype, and what must
hold exactly. The emulator runs the same tests on the kernels."""

from __future__ import annotations

import pytest
import torch
from cases import CELLS, LAYOUTS, SIZES
from pairs import covering
from parity import equal_bits, run, three_way
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells

from flowdppo_ops import FlowDPPO, FlowGRPO, reference

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
old_forms = pytest.mark.parametrize("old_form", OLD_FORMS)
objectives = pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)


@covering(sampler=SAMPLERS, old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES)
def test_forms(step_loss, sampler, old_form, objective):
    """With and without guidance, and with every form of the reference."""
    for ref_form, guidance in ((None, False), ("mean", True), ("output", False)):
        options = {"ref_form": ref_form, "guidance": guidance, "weights": guidance}
        three_way(step_loss, draw_step(sampler=sampler, old_form=old_form, objective=objective, **options))


@old_forms
@pytest.mark.parametrize("dtypes", STEP_DTYPES.values(), ids=STEP_DTYPES)
@pytest.mark.parametrize("guidance", [False, True])
def test_dtypes(step_loss, dtypes, old_form, guidance):
    for numel, objective in ((45, "dppo"), (1024, "guard"), (1003, "dppo")):
        options = {"guidance": guidance, "ref_form": "output" if guidance else None}
        options["objective"] = STEP_OBJECTIVES[objective]
        three_way(step_loss, draw_step((4,), (numel,), old_form=old_form, dtypes=dtypes, **options))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs, float16 policies"])
def test_sizes(step_loss, numel, dtypes):
    three_way(step_loss, draw_step((3,), (numel,), dtypes=STEP_DTYPES[dtypes], old_form="residual", guidance=True))


@pytest.mark.parametrize(("rows", "latents"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(step_loss, rows, latents):
    three_way(step_loss, draw_step(rows, latents, old_form="output", ref_form="mean", guidance=True))


@covering(
    sampler=SAMPLERS,
    reduction=("mean", "sum", "none", "kept_mean"),
    latent_reduction=("mean", "sum"),
    old_log_prob=(False, True),
)
def test_options(step_loss, sampler, reduction, latent_reduction, old_log_prob):
    options = {"reduction": reduction, "latent_reduction": latent_reduction, "old_log_prob": old_log_prob}
    for objective in (STEP_OBJECTIVES["dppo"], STEP_OBJECTIVES["grpo"]):
        arguments = draw_step(sampler=sampler, objective=objective, ref_form="output", weights=True, **options)
        three_way(step_loss, arguments)


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
    mine = three_way(step_loss, arguments)
    whole = dict(arguments)
    for name in names:
        value = torch.as_tensor(arguments[name])
        whole[name] = value.reshape(value.shape[:2]).expand(2, 3).contiguous()
    equal_bits(mine, run(step_loss, whole))


@covering(sampler=SAMPLERS, old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES)
def test_deterministic_rows(step_loss, sampler, old_form, objective):
    """No noise in every third row: finite numbers, as the reference defines them; a Gaussian log-prob is 0."""
    for ref_form in (None, "output"):
        options = {"objective": objective, "ref_form": ref_form, "old_log_prob": ref_form is None}
        arguments = draw_step(sampler=sampler, old_form=old_form, deterministic=True, **options)
        if ref_form is not None:
            arguments["ref_std"] = None  # that of the transition, 0 here and there
        mine = three_way(step_loss, arguments)
        for name in ("loss", "log_prob", "ratio", "kl", "grad model_output"):
            assert mine[name].isfinite().all(), name
        if sampler != "cps":
            assert (mine["log_prob"][::3] == 0).all()


@old_forms
@objectives
def test_nothing_is_random(step_loss, old_form, objective):
    """The last step of CPS, in every row: GRPO-Guard's scale is 0 as well."""
    arguments = draw_step(sampler="cps", old_form=old_form, objective=objective, ref_form="mean")
    arguments |= {"sigma_next": 0.0, "ref_std": None}
    if old_form == "residual":
        arguments["old_residual"] = torch.zeros_like(arguments["old_residual"])
    mine = three_way(step_loss, arguments)
    assert all(mine[name].isfinite().all() for name in ("loss", "ratio", "kl", "grad model_output"))


def test_a_residual_of_a_deterministic_row_is_not_looked_at(step_loss):
    arguments = draw_step(old_form="residual", deterministic=True, objective=STEP_OBJECTIVES["guard"])
    other = dict(arguments, old_residual=arguments["old_residual"].clone())
    other["old_residual"][::3] = 7.0
    equal_bits(run(step_loss, arguments), run(step_loss, other))


@old_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [1, 41, 64, 1003])
def test_every_mask_cell(step_loss, old_form, dtype, numel):
    """KL below, at, above the threshold, ratio below, at, above 1, every sign of the advantage: all exactly."""
    arguments, keep = step_mask_cells(numel, old_form, dtype)
    mine = run(step_loss, arguments)
    wrong = [cell for cell, want, got in zip(CELLS, keep, mine["keep"], strict=True) if want != got]
    assert not wrong
    for row, (kl, ratio, _) in enumerate(CELLS):
        here, at, limit = mine["kl"][row].item(), mine["ratio"][row].item(), 2.0**-5
        assert {"below": here < limit, "at": here == limit, "above": here > limit}[kl]
        assert {"below": at < 1, "at": at == 1, "above": at > 1}[ratio]
    assert (mine["grad model_output"][~keep] == 0).all()


@covering(sampler=SAMPLERS, dtype=(torch.float32, torch.bfloat16, torch.float16), objective=STEP_OBJECTIVES)
def test_on_policy_is_exact(step_loss, sampler, dtype, objective):
    """Equal model outputs: the ratio is exactly 1 and the KL exactly 0, whatever the roundings of the mean."""
    for guidance, numel in ((False, 40), (True, 1003)):
        # An old model output is the one after guidance, in float32 for it to be the same number.
        arguments = draw_step((6,), (numel,), sampler=sampler, old_form="output", objective=objective)
        arguments["model_output"] = arguments["model_output"].to(dtype)
        arguments["old_model_output"] = arguments["model_output"].clone()
        if guidance:
            arguments |= {"uncond_output": torch.randn(6, numel).to(dtype), "guidance_scale": 1.0}
            wide, uncond = arguments["model_output"].float(), arguments["uncond_output"].float()
            arguments["old_model_output"] = (uncond + (wide - uncond).double()).float()
        result = step_loss(**arguments)
        assert torch.equal(result.ratio, torch.ones(6))
        assert torch.equal(result.kl, torch.zeros(6))


@samplers
@pytest.mark.parametrize("sigma", [0.5, 0.2, 0.1, 0.05])
def test_a_float16_residual_is_on_policy(step_loss, sampler, sigma):
    """The KL of its rounding is 500 times below a threshold of 1e-5, at any std."""
    arguments = draw_step((4,), (4096,), sampler=sampler, old_form=None, objective=FlowGRPO())
    arguments |= {"sigma": sigma, "sigma_next": 0.8 * sigma, "objective": FlowDPPO()}
    del arguments["old_log_prob"]
    names = ("model_output", "sample", "prev_sample", "sigma", "sigma_next", "noise_level", "sampler")
    step = reference.sde_step(**{name: arguments[name] for name in names}, residual_dtype=torch.float16)
    del arguments["prev_sample"]
    drawn = step.prev_sample_mean + step.std[:, None] * torch.randn(4, 4096)
    residual = reference.encode_residual(drawn, step.prev_sample_mean, step.std)
    result = step_loss(**arguments, prev_sample=drawn, old_residual=residual)
    assert result.kl.max() < 1e-7
    assert result.keep.all()


@samplers
def test_grpo_without_old_policy(step_loss, sampler):
    arguments = draw_step(sampler=sampler, old_form=None, objective=STEP_OBJECTIVES["grpo"])
    assert three_way(step_loss, arguments)["kl"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance_shares_the_gradient(step_loss, dtype):
    arguments = draw_step((3,), (50,), guidance=True, dtypes={"*": torch.float32, "uncond_output": dtype})
    arguments["guidance_scale"] = torch.tensor([1.0, 0.0, 4.0])
    mine = run(step_loss, arguments)
    conditional, unconditional = mine["grad model_output"], mine["grad uncond_output"].float()
    assert (unconditional[0] == 0).all()
    assert (conditional[1] == 0).all()
    assert conditional[0].any()
    assert unconditional[1].any()
    tolerance = 2**-8 if dtype == torch.bfloat16 else 2**-23
    assert ((unconditional[2] + 0.75 * conditional[2]).abs() <= tolerance * conditional[2].abs()).all()


@pytest.mark.parametrize("wanted", ["model_output", "uncond_output"])
def test_one_gradient_alone(step_loss, wanted):
    arguments = draw_step((3,), (50,), guidance=True, ref_form="output")
    both = run(step_loss, arguments)
    arguments[wanted] = arguments[wanted].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(step_loss(**arguments).loss, arguments[wanted])
    assert torch.equal(gradient, both[f"grad {wanted}"])


def test_an_infinite_sample_in_a_blocked_row(step_loss):
    """Nothing of the row is read by the backward but for the reference term."""
    arguments = draw_step((4,), (40,), objective=FlowDPPO(kl_mask_threshold=0.0, mask="symmetric"), ref_form="output")
    arguments["prev_sample"][1, 7] = float("inf")
    mine = run(step_loss, arguments)
    assert not mine["keep"].any()
    assert mine["grad model_output"].isfinite().all()
    assert mine["grad model_output"].any()
