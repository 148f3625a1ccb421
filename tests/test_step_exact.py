"""What `step_loss` promises to the bit: masks, on-policy numbers, one row beside others, dtypes, threads, memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import CELLS
from pairs import covering
from parity import equal_bits, leaves, run, upstream_of
from step_cases import (
    LATENTS,
    OLD_FORMS,
    SAMPLERS,
    SCHEDULE,
    STEP_DTYPES,
    STEP_OBJECTIVES,
    draw_step,
    step_mask_cells,
)

from flowdppo_ops import FlowDPPO, GRPOGuard, reference

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
old_forms = pytest.mark.parametrize("old_form", OLD_FORMS)
objectives = pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes_of_all = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


# ---- the mask --------------------------------------------------------------------------------------------------------


@samplers
@old_forms
@dtypes_of_all
@pytest.mark.parametrize("kl_divisor", ["gaussian", "constant", "velocity"])
def test_every_mask_cell(step_loss, sampler, old_form, dtype, kl_divisor):
    for numel in (1, 41, 64):  # 41: N times the rounded 1/N is not 1
        arguments, keep = step_mask_cells(numel, old_form, dtype, sampler=sampler, kl_divisor=kl_divisor)
        output = arguments["model_output"].requires_grad_()
        result = step_loss(**arguments, reduction="sum")
        result.loss.backward()
        wrong = [cell for cell, want, got in zip(CELLS, keep, result.keep, strict=True) if want != got]
        assert not wrong
        limit = arguments["objective"].kl_mask_threshold
        for row, (kl, ratio, sign) in enumerate(CELLS):
            here, at = result.kl[row].item(), result.ratio[row].item()
            assert {"below": here < limit, "at": here == limit, "above": here > limit}[kl]
            assert {"below": at < 1, "at": at == 1, "above": at > 1}[ratio]
            moved = bool((output.grad[row] != 0).any())
            # Where t is 1/2 the innovation is the drift: x' is the mean, and nothing pulls.
            silent = sign == 0 or ratio == "above"
            assert moved == (bool(keep[row]) and not silent), (kl, ratio, sign)


@pytest.mark.parametrize("mask", ["symmetric", "none"])
def test_mask_cells_of_the_ablations(step_loss, mask):
    arguments, _ = step_mask_cells(64, "residual")
    arguments["objective"] = FlowDPPO(arguments["objective"].kl_mask_threshold, mask=mask)
    assert step_loss(**arguments).keep.tolist() == [mask == "none" or kl == "below" for kl, _, _ in CELLS]


@samplers
@objectives
@pytest.mark.parametrize("guidance", [False, True])
def test_blocked_rows_with_infinities(fused_step, sampler, objective, guidance):
    """A blocked row's gradient is exactly 0, whatever its latents became, and the other rows' is what it was."""
    options = {"old_form": "output", "old_log_prob": True, "guidance": guidance}
    arguments = draw_step(sampler=sampler, objective=objective, **options)
    calm = run(fused_step, arguments)
    # An infinity makes the log-prob -inf and the ratio 0, which a negative advantage has blocked already.
    row = int((~calm["keep"] & (arguments["advantages"] < 0)).nonzero()[0])
    # In the output, GRPO-Guard's drift would be infinite too, and the ratio NaN.
    for name in ("sample", "prev_sample") + ("model_output",) * (not isinstance(objective, GRPOGuard)):
        bad = arguments | {name: arguments[name].clone()}
        bad[name][row, 3, 1] = float("inf")
        mine = run(fused_step, bad)
        assert (mine["ratio"][row], mine["keep"][row]) == (0, False), name
        for leaf in leaves(arguments):
            assert torch.equal(mine[f"grad {leaf}"], calm[f"grad {leaf}"]), (name, leaf)
            assert (mine[f"grad {leaf}"][row] == 0).all()


def test_blocked_infinite_ratio(step_loss):
    arguments = draw_step((3,), objective=FlowDPPO(mask="symmetric", kl_mask_threshold=0.05), old_log_prob=True)
    arguments["advantages"] = torch.ones(3)
    calm = run(step_loss, arguments)
    assert calm["keep"].tolist() == [True, False, True]
    arguments["old_log_prob"][1] = -1e4
    mine = run(step_loss, arguments)
    assert mine["ratio"][1] == float("inf")
    assert torch.equal(mine["grad model_output"], calm["grad model_output"])
    assert torch.equal(mine["loss"], calm["loss"])


def test_blocked_row_with_an_infinite_latent_keeps_its_penalty(fused_step):
    """What a blocked row no longer needs is not read: no 0 * inf beside the reference term."""
    arguments = draw_step((1,), (40,), ref_form="output", objective=STEP_OBJECTIVES["grpo"], old_log_prob=True)
    arguments |= {"advantages": -torch.ones(1), "guidance_scale": 3.0, "uncond_output": torch.zeros(1, 40)}
    wanted = run(fused_step, arguments | {"advantages": torch.zeros(1)})
    arguments["prev_sample"][0, 7] = float("inf")
    mine = run(fused_step, arguments)
    assert (mine["ratio"].item(), mine["keep"].item()) == (0.0, False)
    for name in ("grad model_output", "grad uncond_output"):
        assert (mine[name] != 0).all()
        assert torch.equal(mine[name], wanted[name])


@samplers
def test_coefficients_are_those_of_float32(fused_step, sampler):
    """Formed in float64 from float32 numbers and rounded once, wherever they are used: `d = b^2` over `b^2` again."""
    rows = 200
    steps = {"sigma": torch.linspace(0.5, 0.99, rows), "sigma_next": torch.linspace(0.1, 0.45, rows)}
    zeros = torch.zeros(rows, 1)
    old = {"old_model_output": zeros, "objective": STEP_OBJECTIVES["velocity"]}
    kl = fused_step(1 + zeros, zeros, zeros, zeros[:, 0], **steps, noise_level=0.7, sampler=sampler, **old).kl
    noise_level = torch.tensor(0.7).double()
    sigma, sigma_next = (value.double() for value in steps.values())
    _, b, _ = reference.transition(sampler, sigma, sigma_next, noise_level, noise_level)
    b = b.float()
    assert torch.equal(kl, ((b * b).double() / b.double() ** 2).float())


# ---- on policy -------------------------------------------------------------------------------------------------------


@covering(
    sampler=SAMPLERS,
    objective=STEP_OBJECTIVES,
    dtype=ALL_DTYPES,
    latent_reduction=("mean", "sum"),
    scale=(None, 1.0, 4.5),
)
def test_on_policy_is_exact(native, sampler, objective, dtype, latent_reduction, scale):
    """The policy's own output, or its mean as `sde_step` recorded it: ratio 1 and KL 0 to the last bit; and the
    log-prob of one call is the old one of the next."""
    arguments = draw_step(
        (3, 2), (1003,), sampler=sampler, dtypes={"*": dtype}, objective=objective, latent_reduction=latent_reduction,
        old_form="output", deterministic=(1, 2),
    )  # fmt: skip
    output = arguments["model_output"]
    del arguments["old_model_output"]
    guided = {}
    if scale is not None:
        guided = {"uncond_output": output if scale == 1 else output.flip(0), "guidance_scale": scale}
    common = {name: arguments[name] for name in (*SCHEDULE, "sampler", "sigma_max")} | guided
    step = native.sde_step(output, arguments["sample"], **common, row_dims=2)
    olds = [{"old_prev_sample_mean": step.prev_sample_mean}]
    if scale in (None, 1.0):  # after guidance: the combination of another scale is not stored exactly
        olds.append({"old_model_output": output})
    arguments |= guided | {"prev_sample": step.prev_sample}
    for old in olds:
        first = native.step_loss(**arguments, **old)
        again = native.step_loss(**arguments, **old, old_log_prob=first.log_prob)
        for result in (first, again):
            assert (result.ratio == 1).all()
            assert (result.log_ratio == 0).all()
            assert (result.kl == 0).all()
            assert result.keep.all()
        metrics = first.metrics()
        assert (metrics["ratio_mean"], metrics["ratio_std"], metrics["approx_kl"]) == (1, 0, 0)
    if latent_reduction == "mean" and dtype != torch.float64:  # whose sums round as well, in another order
        assert torch.equal(first.log_prob, step.log_prob)


@samplers
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 outputs"])
@pytest.mark.parametrize("std", [0.05, 0.1, 0.2, 0.5])
def test_on_policy_kl_of_a_half_precision_residual(native, sampler, dtypes, std):
    """Two bytes an element, and a KL of 2e-8 at every std; 1e-5 is the threshold."""
    arguments = draw_step((2,), (4096,), sampler=sampler, dtypes=STEP_DTYPES[dtypes])
    arguments = {name: arguments[name] for name in ("model_output", "sample")}
    sigma, sigma_next = 0.9, 0.6
    if sampler == "cps":
        noise_level = float(torch.tensor(std / sigma_next).asin() * 2 / torch.pi)
    else:
        noise_level = std / (sigma - sigma_next) ** 0.5 / (3.0 if sampler == "flow_sde" else 1.0)
    steps = {"sigma": sigma, "sigma_next": sigma_next, "noise_level": noise_level, "sampler": sampler}
    generator = torch.Generator().manual_seed(1)
    step = native.sde_step(**arguments, **steps, generator=generator, residual_dtype=torch.float16)
    torch.testing.assert_close(step.std, torch.full((2,), std), rtol=1e-5, atol=0)
    arguments |= {"prev_sample": step.prev_sample, "advantages": torch.ones(2)} | steps
    for residual in (step.residual, native.encode_residual(step.prev_sample, step.prev_sample_mean, step.std)):
        result = native.step_loss(**arguments, old_residual=residual)
        assert (result.kl < 1e-7).all()
        assert (result.kl > 1e-9).all()  # float16 was indeed rounded to
        assert result.keep.all()
        assert ((result.ratio - 1).abs() < 1e-4).all()


# ---- guidance --------------------------------------------------------------------------------------------------------


@samplers
@old_forms
def test_a_guidance_scale_of_1_is_no_guidance(step_loss, sampler, old_form):
    """To the bit, where `uncond + (output - uncond)` is exact."""
    arguments, _ = step_mask_cells(33, old_form, sampler=sampler)
    guided = arguments | {"uncond_output": arguments["model_output"].flip(0), "guidance_scale": 1.0}
    plain, mine = run(step_loss, arguments), run(step_loss, guided)
    assert (mine.pop("grad uncond_output") == 0).all()
    equal_bits(mine, plain)
    # One of 0 takes the unconditional output alone.
    swapped = {"model_output": guided["uncond_output"], "uncond_output": guided["model_output"], "guidance_scale": 0.0}
    mine = run(step_loss, guided | swapped)
    assert (mine.pop("grad model_output") == 0).all()
    mine["grad model_output"] = mine.pop("grad uncond_output")
    equal_bits(mine, plain)


# ---- rows ------------------------------------------------------------------------------------------------------------


SCHEDULE_SHAPES = [(1, 3), (1, 3, 1, 1), (1, 3, 1, 1, 1), (4, 1), (4, 1, 1, 1, 1), (1, 1), ()]


@samplers
@old_forms
@pytest.mark.parametrize("shape", SCHEDULE_SHAPES, ids=str)
def test_a_trajectory_is_its_steps(step_loss, sampler, old_form, shape):
    """[B, S] rows with a schedule of fewer elements give what each step of each sample gives in a call of its own."""
    options = {"sampler": sampler, "old_form": old_form, "guidance": True, "ref_form": "output", "reduction": "none"}
    latents = (2, 3, 1) if len(shape) == 5 else (2, 3)
    # No row has a say in another's scale.
    arguments = draw_step((4, 3), latents, objective=STEP_OBJECTIVES["guard own scale"], **options)
    drawn = draw_step(shape[:2], latents, **options)
    arguments |= {name: drawn[name].reshape(shape) for name in (*SCHEDULE, "guidance_scale")}
    whole = run(step_loss, arguments)
    weights = upstream_of(whole["loss"])
    for row in itertools.product(range(4), range(3)):
        one = run(step_loss, only(arguments, row), upstream=weights[row])
        for name in ("loss", "log_prob", "log_ratio", "ratio", "kl", "keep", "grad model_output", "grad uncond_output"):
            assert torch.equal(one[name], whole[name][row]), name


def only(arguments: dict[str, Any], row: tuple[int, ...]) -> dict[str, Any]:
    """The call for one row: of what all rows share, that."""
    out = dict(arguments)
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.ndim:
            part = value[tuple(min(i, size - 1) for i, size in zip(row, value.shape, strict=False))]
            out[name] = part if name in LATENTS else part.reshape(())
    return out


@samplers
@dtypes_of_all
def test_residual_of_a_deterministic_row_is_the_sample(step_loss, sampler, dtype):
    """Where nothing was random `mu° = x'`; the residual, 0 or anything, says nothing."""
    arguments = draw_step(
        sampler=sampler, old_form="residual", deterministic=(0, 5), objective=FlowDPPO(normalize_kl=False),
        dtypes={"*": dtype},
    )  # fmt: skip
    wanted = run(step_loss, {**arguments, "old_residual": None, "old_prev_sample_mean": arguments["prev_sample"]})
    for value in (0.0, 3.0, -70.0):
        arguments["old_residual"][[0, 5]] = value
        mine = run(step_loss, arguments)
        for row in (0, 5):
            assert mine["kl"][row] == wanted["kl"][row] > 0
            assert mine["log_ratio"][row] == wanted["log_ratio"][row]
            assert torch.equal(mine["grad model_output"][row], wanted["grad model_output"][row])
