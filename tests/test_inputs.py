"""What a trainer's tensors look like in memory: strides, broadcast row vectors, bad values, huge rows."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, OBJECTIVES, draw
from parity import equal_bits, leaves, run, three_way
from step_cases import LATENTS, SCHEDULE, STEP_DTYPES, STEP_OBJECTIVES, draw_step

import flowdppo_ops
from flowdppo_ops import FlowGRPO, GRPOGuard

objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


# ---- layouts in memory and row vectors -------------------------------------------------------------------------------


def transposed(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(value: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), float("nan"), dtype=value.dtype)
    wide[..., 1::2] = value
    return wide[..., 1::2]


def offset(value: torch.Tensor) -> torch.Tensor:
    """Contiguous, but at an address that no vector load likes."""
    flat = torch.full((value.numel() + 3,), float("nan"), dtype=value.dtype)
    flat[1:-2] = value.reshape(-1)
    return flat[1:-2].view(value.shape)


@pytest.mark.parametrize("change", [transposed, sliced, offset])
@pytest.mark.parametrize("dtypes", ["float32", "every latent another"])
@objectives
def test_strides_do_not_matter(fused, change, dtypes, objective):
    """To the bit: the native sums run in one order. Eager ones do not (an ulp apart when transposed)."""
    arguments = draw((4, 3), (6, 7), objective=objective, dtypes=DTYPES[dtypes], ref_kl_weight=0.5, weights=True)
    strided = {name: change(value) if torch.is_tensor(value) else value for name, value in arguments.items()}
    assert all(torch.equal(strided[name], arguments[name]) for name in strided if torch.is_tensor(strided[name]))
    equal_bits(run(fused, strided), run(fused, arguments))


def test_expanded_inputs(fused):
    """One old mean for all rows, one advantage for all steps: strides of 0."""
    arguments = draw((4, 3), (6, 7), reduction="none")
    arguments["old_prev_sample_mean"] = arguments["old_prev_sample_mean"][:1, :1].expand(4, 3, 6, 7)
    arguments["advantages"] = arguments["advantages"][:, :1].expand(4, 3)
    dense = {name: value.contiguous() if torch.is_tensor(value) else value for name, value in arguments.items()}
    equal_bits(run(fused, arguments), run(fused, dense))


def test_gradient_through_a_view(loss):
    """The mean is a transposed view of a leaf; the upstream gradient of the rows is expanded."""
    arguments = draw((4,), (6, 7), reduction="none", objective=OBJECTIVES["grpo"])
    wanted = torch.autograd.grad(
        loss(**(arguments | {"prev_sample_mean": (mean := arguments["prev_sample_mean"].requires_grad_())})).loss.sum(),
        mean,
    )[0]
    leaf = arguments["prev_sample_mean"].detach().transpose(1, 2).contiguous().requires_grad_()
    loss(**(arguments | {"prev_sample_mean": leaf.transpose(1, 2)})).loss.sum().backward()
    assert torch.equal(leaf.grad.transpose(1, 2), wanted)


ROW_VECTORS = {
    "number": (0.5, (4, 3)),
    "0-dim": (torch.tensor(0.5), (4, 3)),
    "rows": (torch.linspace(0.3, 0.9, 12).reshape(4, 3), (4, 3)),
    "one row per step": (torch.linspace(0.3, 0.9, 3).reshape(1, 3), (4, 3)),
    "one row per sample": (torch.linspace(0.3, 0.9, 4).reshape(4, 1), (4, 3)),
    "steps, trailing ones": (torch.linspace(0.3, 0.9, 3).reshape(1, 3, 1, 1), (4, 3)),
    "rows, trailing ones": (torch.linspace(0.3, 0.9, 12).reshape(4, 3, 1, 1), (4, 3)),
    "all ones": (torch.full((1, 1, 1, 1), 0.5), (4, 3)),
    "samples, trailing ones": (torch.linspace(0.3, 0.9, 4).reshape(4, 1, 1), (4,)),
    "0-dim rows": (torch.tensor(0.5), ()),
    "0-dim rows, trailing ones": (torch.full((1, 1), 0.5), ()),
    "float64 beside float32": (torch.linspace(0.3, 0.9, 12, dtype=torch.float64).reshape(4, 3), (4, 3)),
    "bfloat16": (torch.linspace(0.3, 0.9, 12, dtype=torch.bfloat16).reshape(4, 3), (4, 3)),
}


@pytest.mark.parametrize("name", ["std", "sqrt_dt", "weights", "ref_std"])
@pytest.mark.parametrize(("value", "row_shape"), ROW_VECTORS.values(), ids=ROW_VECTORS)
def test_row_vectors(loss, name, value, row_shape):
    """Every form gives what the full row-shaped float32 tensor gives (an ulp of the batch means of the guard apart)."""
    arguments = draw(row_shape, (6, 7), objective=OBJECTIVES["guard"], ref_kl_weight=0.5, weights=True)
    full = torch.as_tensor(value).float()
    full = full.reshape(full.shape[: len(row_shape)]).expand(row_shape).contiguous()
    mine, wanted = run(loss, arguments | {name: value}), run(loss, arguments | {name: full})
    for key in ("loss", "log_prob", "ratio", "kl", "keep", "grad prev_sample_mean"):
        torch.testing.assert_close(mine[key], wanted[key], rtol=2e-6, atol=1e-9)  # dtypes included


# ---- the same of step_loss -------------------------------------------------------------------------------------------

FULL_STEP = {"old_form": "residual", "ref_form": "output", "guidance": True, "weights": True}


@pytest.mark.parametrize("change", [transposed, sliced, offset])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16 outputs, float16 policies", "every latent another"])
@pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)
def test_strides_of_steps_do_not_matter(fused_step, change, dtypes, objective):
    """Of latents, rows and schedules; an odd address goes through the same loops."""
    arguments = draw_step((4, 3), (6, 7), objective=objective, dtypes=STEP_DTYPES[dtypes], **FULL_STEP)
    strided = {name: change(value) if torch.is_tensor(value) else value for name, value in arguments.items()}
    equal_bits(run(fused_step, strided), run(fused_step, arguments))


def test_expanded_inputs_of_steps(fused_step):
    """One unconditional output for all rows, one advantage for all steps, one sample: strides of 0."""
    arguments = draw_step((4, 3), (6, 7), reduction="none", **FULL_STEP)
    for name in ("sample", "old_residual", "ref_model_output"):
        arguments[name] = arguments[name][:1, :1].expand(4, 3, 6, 7)
    for name in ("advantages", "sigma", "sigma_next", "guidance_scale"):
        arguments[name] = arguments[name][:, :1].expand(4, 3)
    dense = {name: value.contiguous() if torch.is_tensor(value) else value for name, value in arguments.items()}
    equal_bits(run(fused_step, arguments), run(fused_step, dense))


def test_gradients_through_views(step_loss):
    """The outputs are two halves of one batch, as guidance is run."""
    arguments = draw_step((4,), (6, 7), reduction="none", **FULL_STEP)
    wanted = run(step_loss, arguments)
    both = torch.cat([arguments[name] for name in leaves(arguments)]).requires_grad_()
    arguments["model_output"], arguments["uncond_output"] = both.chunk(2)
    loss = step_loss(**arguments).loss
    loss.backward(1 + torch.arange(4) % 5 / 4)
    assert torch.equal(both.grad, torch.cat([wanted["grad model_output"], wanted["grad uncond_output"]]))


@pytest.mark.parametrize("name", [*SCHEDULE, "sigma_max", "guidance_scale", "weights", "ref_std"])
@pytest.mark.parametrize(("value", "row_shape"), ROW_VECTORS.values(), ids=ROW_VECTORS)
def test_row_vectors_of_steps(native, name, value, row_shape):
    """To the bit: a schedule is broadcast by its index, and rounded to float32 before anything is formed of it."""
    arguments = draw_step(row_shape, (6, 7), objective=OBJECTIVES["guard"], **FULL_STEP)
    arguments |= {"sigma": torch.full(row_shape, 0.95), "sigma_next": torch.full(row_shape, 0.25)}
    full = torch.as_tensor(value).float()
    full = full.reshape(full.shape[: len(row_shape)]).expand(row_shape).contiguous()
    if name == "sigma_max":
        arguments["sigma"] = torch.ones(row_shape)
    mine, wanted = (run(native.step_loss, arguments | {name: given}) for given in (value, full))
    assert torch.isfinite(wanted["loss"])
    equal_bits(mine, wanted)


@pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)
@pytest.mark.parametrize(
    "name", [*LATENTS[:4], "old_residual", "ref_model_output", "advantages", "sigma", "guidance_scale"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_steps_stay_alone(step_loss, objective, name, bad):
    arguments = draw_step(objective=objective, reduction="none", **FULL_STEP)
    if objective is STEP_OBJECTIVES["guard"] and name == "sigma":
        arguments["objective"] = STEP_OBJECTIVES["guard own scale"]  # the batch's own scale is a mean over the schedule
    calm = run(step_loss, arguments)
    arguments[name] = arguments[name].clone()
    arguments[name].view(12, -1)[5, -1] = bad
    mine = run(step_loss, arguments)
    others = torch.arange(12) != 5
    for key in ("loss", "log_prob", "log_ratio", "ratio", "kl", "keep", "grad model_output", "grad uncond_output"):
        assert torch.equal(mine[key][others], calm[key][others]), key
    finite = all(torch.isfinite(mine[key][5]) for key in ("loss", "log_ratio", "ratio", "kl"))
    assert not finite or (bad == float("inf") and name == "advantages")  # which is blocked or clamped
    if name != "ref_model_output":  # of the policy's loss
        assert (mine["metrics"]["nonfinite_fraction"] > 0) == (not finite)


# ---- non-finite rows -------------------------------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("name", ["prev_sample_mean", "old_prev_sample_mean", "prev_sample", "advantages", "std"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_stay_alone(loss, objective, name, bad):
    if isinstance(objective, GRPOGuard) and name == "std":
        objective = GRPOGuard(clip_range=0.01, per_row_scale=True)  # the batch's own scale is a mean of std
    arguments = draw(objective=objective, reduction="none")
    calm = run(loss, arguments)
    arguments[name] = arguments[name].clone()
    arguments[name].view(12, -1)[5, -1] = bad
    mine = run(loss, arguments)
    others = torch.arange(12) != 5
    for key in ("loss", "log_prob", "log_ratio", "ratio", "kl", "keep", "grad prev_sample_mean"):
        assert torch.equal(mine[key][others], calm[key][others]), key
    if bad != bad:  # an infinity may end as inf - inf or 0 * inf, or may not, by the order of the sums
        three_way(loss, arguments)
    numbers = torch.stack([mine[key] for key in ("loss", "log_ratio", "ratio", "kl")])
    bad_rows = ~torch.isfinite(numbers).all(0)
    # Infinities can end well: an infinite advantage is blocked or clamped, an infinite std makes the ratio 1.
    assert bad_rows.sum() == 1 or (bad == float("inf") and name in ("advantages", "std"))
    assert mine["metrics"]["nonfinite_fraction"] == bad_rows.float().mean()
    whole = run(loss, arguments | {"reduction": "sum"})
    assert torch.isfinite(whole["grad prev_sample_mean"][others]).all()


# ---- environment -----------------------------------------------------------------------------------------------------


def test_backend_reference(monkeypatch):
    monkeypatch.setenv("FLOWDPPO_OPS_BACKEND", "reference")
    arguments = draw()
    equal_bits(run(flowdppo_ops.loss, arguments), run(flowdppo_ops.reference.loss, arguments))
    # The native backend refuses this device, so nothing else can have answered.
    meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in arguments.items()}
    assert flowdppo_ops.loss(**meta).loss.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "place", "bad"),
    [
        ("std", 3, 0.0),
        ("std", 3, -0.5),
        ("std", 3, float("nan")),
        ("advantages", 3, float("inf")),
        ("prev_sample_mean", (3, 0, 0), float("nan")),
        ("old_prev_sample_mean", (3, 4, 7), float("inf")),
        ("prev_sample", (3, 1, 1), float("-inf")),
        ("weights", 3, float("nan")),
        ("ref_std", 3, 0.0),
        ("sqrt_dt", 3, 0.0),
    ],
)
def test_check_values(fused, monkeypatch, name, place, bad):
    arguments = draw(objective=OBJECTIVES["guard"], ref_kl_weight=0.5, weights=True)
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    fused(**arguments)
    arguments[name][place] = bad
    with pytest.raises(ValueError, match=rf"\b{name}\b.*row.*\b3\b"):
        fused(**arguments)
    monkeypatch.delenv("FLOWDPPO_OPS_CHECK")
    fused(**arguments)  # values are not looked at unless asked


def step_call(function: str) -> dict[str, Any]:
    """A good call of `step_loss` or `sde_step` for [4, 3] rows."""
    generator = torch.Generator().manual_seed(0)
    latents = ("model_output", "uncond_output", "sample", "prev_sample", "old_residual", "ref_model_output")
    call = {name: torch.randn(4, 3, 5, generator=generator) for name in latents}
    call |= {"sigma": torch.full((4, 3), 0.8), "sigma_next": torch.full((4, 3), 0.6)}
    call |= {"noise_level": torch.full((4, 3), 0.7), "guidance_scale": torch.full((4, 3), 2.0)}
    if function == "sde_step":
        del call["old_residual"], call["ref_model_output"]
        return call | {"row_dims": 2}
    call |= {"ref_std": torch.full((4, 3), 0.5), "ref_kl_weight": 0.1}
    return call | {"advantages": torch.ones(4, 3)}


BAD_STEPS = [
    ("sigma", 1.5, "sigma is not in [0, 1]"),
    ("sigma", 0.5, "sigma_next is not < sigma"),
    ("sigma_next", 0.8, "sigma_next is not < sigma"),
    ("sigma_next", -0.1, "sigma_next is not in [0, 1]"),
    ("noise_level", -0.7, "noise_level is not >= 0"),
    ("guidance_scale", float("nan"), "guidance_scale is not finite"),
    ("model_output", float("inf"), "model_output is not finite"),
    ("uncond_output", float("nan"), "uncond_output is not finite"),
    ("prev_sample", float("nan"), "prev_sample is not finite"),
    ("old_residual", float("inf"), "old_residual is not finite"),
    ("ref_model_output", float("nan"), "ref_model_output is not finite"),
    ("ref_std", -0.5, "ref_std is not >= 0"),
]


@pytest.mark.parametrize(
    ("function", "name", "bad", "wanted"),
    [(function, *row) for function in ("step_loss", "sde_step") for row in BAD_STEPS if row[0] in step_call(function)],
)
def test_check_values_of_steps(fused, monkeypatch, function, name, bad, wanted):
    call, run_it = step_call(function), getattr(flowdppo_ops, function)
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    run_it(**call)
    call["noise_level"][0] = 0.0  # deterministic, which is allowed
    if function == "step_loss":
        call["ref_std"][0] = 0.0
    run_it(**call)
    call[name][1, 2] = bad
    with pytest.raises(ValueError, match=re.escape(f"{function}: {wanted} in 1 of 12 rows: 5")):
        run_it(**call)
    monkeypatch.delenv("FLOWDPPO_OPS_CHECK")
    run_it(**call)


@pytest.mark.parametrize("function", ["step_loss", "sde_step"])
def test_backend_reference_of_steps(monkeypatch, function):
    monkeypatch.setenv("FLOWDPPO_OPS_BACKEND", "reference")
    call = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in step_call(function).items()}
    result = getattr(flowdppo_ops, function)(**call)
    assert result.log_prob.device.type == "meta"
    monkeypatch.delenv("FLOWDPPO_OPS_BACKEND")
    with pytest.raises(RuntimeError, match=rf"device meta.*flowdppo_ops\.reference\.{function} "):
        getattr(flowdppo_ops, function)(**call)


# ---- more than 2^31 elements -----------------------------------------------------------------------------------------


def available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(available_bytes() < 8 << 30, reason="the gradient alone takes 4.3 GB; 8 GB of free memory wanted")
def test_more_than_2_31_elements(fused):
    """64-bit counts, forward and backward. Zeros from calloc share one page, so only the gradient takes memory."""
    numel, tail = 2**31 + 5, [1.0, -2.0, 0.5, 4.0, -1.0]

    def zeros() -> torch.Tensor:
        return torch.from_numpy(np.zeros(numel, dtype=np.int16)).view(torch.bfloat16).view(1, numel)

    mean, old, sample = zeros(), zeros(), zeros()
    sample[0, -5:] = torch.tensor(tail, dtype=torch.bfloat16)
    mean[0, -1] = 0.5
    mean.requires_grad_()
    result = fused(
        mean,
        old,
        torch.ones(1),
        std=1.0,
        prev_sample=sample,
        density="cps",
        latent_reduction="sum",
        objective=FlowGRPO(clip_range=10.0),
    )
    assert result.log_prob.item() == -(1 + 4 + 0.25 + 16 + 2.25)
    assert result.log_ratio.item() == 2 * 0.5 * -1 - 0.25
    assert result.kl.item() == 0.125
    result.loss.backward()
    slope = -2 * result.ratio.item()
    wanted = torch.tensor([slope * value for value in (1, -2, 0.5, 4, -1.5)])
    torch.testing.assert_close(mean.grad[0, -5:].float(), wanted, rtol=2**-8, atol=0)
    assert mean.grad[0, :1000].count_nonzero() == 0
