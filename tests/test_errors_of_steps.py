"""Bad input of `step_loss`, `sde_step` and `encode_residual`, as test_errors.py has that of `loss`."""

from __future__ import annotations

import math

import pytest
import torch
from cases import OBJECTIVES
from test_errors import latents, says

GRPO = OBJECTIVES["grpo"]
ROWS, LATENTS = (4, 3), (4, 3, 6, 2)


# ---- the sampler's functions ----------------------------------------------------------------------------------------


def step(**change) -> dict:
    good = {
        "model_output": latents(),
        "sample": latents(),
        "prev_sample": latents(),
        "advantages": torch.ones(ROWS),
        "old_prev_sample_mean": latents(),
        "sigma": 0.8,
        "sigma_next": 0.6,
        "noise_level": 0.7,
    }
    return {name: value for name, value in (good | change).items() if value is not ...}


STEP_LOSS = {
    "sampler": ({"sampler": "ddim"}, ValueError, ("sampler", "'ddim'", "'flow_sde'", "'dance_sde'", "'cps'")),
    "two old policies": (
        {"old_model_output": latents()},
        ValueError,
        ("old_prev_sample_mean and old_model_output", "exactly one", "old_residual"),
    ),
    "no old policy": ({"old_prev_sample_mean": ...}, ValueError, ("none", "exactly one", "old_model_output")),
    "no old policy, with a log-prob, for an objective that needs its KL": (
        {"old_prev_sample_mean": ..., "old_log_prob": torch.zeros(ROWS)},
        ValueError,
        ("none", "exactly one"),
    ),
    "sample of another shape": (
        {"sample": latents((4, 3, 12))},
        ValueError,
        ("sample", "(4, 3, 12)", "(4, 3, 6, 2)", "model_output"),
    ),
    "no sample": ({"sample": None}, TypeError, ("sample", "NoneType", "torch.Tensor")),
    "no prev_sample": ({"prev_sample": None}, TypeError, ("prev_sample", "NoneType", "torch.Tensor")),
    "no model output": ({"model_output": None}, TypeError, ("model_output", "NoneType", "torch.Tensor")),
    "rows not first": ({"advantages": torch.ones(3)}, ValueError, ("model_output", "(4, 3, 6, 2)", "(3,)")),
    "sigma per step": ({"sigma": torch.full((3,), 0.8)}, ValueError, ("sigma", "(3,)", "(4, 3)")),
    "sigma as a list": ({"sigma": [0.8]}, TypeError, ("sigma", "list", "number")),
    "integer sigma_next": ({"sigma_next": torch.zeros(ROWS, dtype=torch.int64)}, TypeError, ("sigma_next", "int64")),
    "noise level of other rows": ({"noise_level": torch.ones(2, 3)}, ValueError, ("noise_level", "(2, 3)")),
    "old log-prob of other rows": ({"old_log_prob": torch.zeros(4)}, ValueError, ("old_log_prob", "(4,)", "(4, 3)")),
    "integer model output": (
        {"model_output": latents(dtype=torch.int64)},
        TypeError,
        ("model_output", "torch.int64", "float32"),
    ),
    "no old policy and no old log-prob": (
        {"old_prev_sample_mean": ..., "objective": GRPO},
        ValueError,
        ("none", "exactly one"),
    ),
    "reference KL without its policy": (
        {"ref_kl_weight": 0.1},
        ValueError,
        ("none", "reference policy", "ref_prev_sample_mean", "ref_model_output"),
    ),
    "two reference policies": (
        {"ref_kl_weight": 0.1, "ref_prev_sample_mean": latents(), "ref_model_output": latents()},
        ValueError,
        ("ref_prev_sample_mean and ref_model_output", "exactly one"),
    ),
    "residual of another shape": (
        {"old_prev_sample_mean": ..., "old_residual": latents((4, 3))},
        ValueError,
        ("old_residual", "(4, 3)", "(4, 3, 6, 2)", "model_output"),
    ),
    "guidance without its scale": ({"uncond_output": latents()}, ValueError, ("guidance_scale is None", "uncond")),
    "guidance without its output": ({"guidance_scale": 4.5}, ValueError, ("uncond_output is None", "guidance_scale")),
    "guidance output of another shape": (
        {"guidance_scale": 4.5, "uncond_output": latents((4, 3))},
        ValueError,
        ("uncond_output", "(4, 3)", "(4, 3, 6, 2)"),
    ),
    "guidance scale of other rows": (
        {"guidance_scale": torch.ones(3), "uncond_output": latents()},
        ValueError,
        ("guidance_scale", "(3,)", "(4, 3)"),
    ),
    "no sigma": ({"sigma": None}, ValueError, ("sigma is None",)),
    "no sigma_max": ({"sigma_max": None}, ValueError, ("sigma_max is None",)),
    "sample on another device": ({"sample": latents(device="meta")}, ValueError, ("sample", "meta", "cpu")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'")),
    "latent_reduction": ({"latent_reduction": "max"}, ValueError, ("latent_reduction", "'max'")),
    "objective": ({"objective": None}, TypeError, ("objective", "NoneType")),
    "process_group": ({"process_group": "world"}, TypeError, ("process_group", "str", "ProcessGroup", "None")),
}


@pytest.mark.parametrize(("change", "error", "facts"), STEP_LOSS.values(), ids=STEP_LOSS)
def test_step_loss(api, change, error, facts):
    with pytest.raises(error) as caught:
        api.step_loss(**step(**change))
    says(str(caught.value), ("flowdppo_ops.step_loss", *facts))


def sde(**change) -> dict:
    good = {"model_output": latents(), "sample": latents(), "sigma": 0.8, "sigma_next": 0.6}
    return good | change


SDE_STEP = {
    "sampler": ({"sampler": "euler"}, ValueError, ("sampler", "'euler'", "'flow_sde'")),
    "replay with noise": ({"prev_sample": latents(), "noise": latents()}, ValueError, ("prev_sample", "noise")),
    "replay with a generator": (
        {"prev_sample": latents(), "generator": torch.Generator()},
        ValueError,
        ("prev_sample", "noise"),
    ),
    "noise and generator": (
        {"noise": latents(), "generator": torch.Generator()},
        ValueError,
        ("noise and generator", "at most one"),
    ),
    "row_dims beyond the rank": ({"row_dims": 5}, ValueError, ("row_dims", "5", "0 to 4")),
    "negative row_dims": ({"row_dims": -1}, ValueError, ("row_dims", "-1", "0 to 4")),
    "row_dims as a bool": ({"row_dims": True}, ValueError, ("row_dims", "True")),
    "sample of another shape": ({"sample": latents((4, 3))}, ValueError, ("sample", "(4, 3)", "(4, 3, 6, 2)")),
    "no sample": ({"sample": None}, TypeError, ("sample", "NoneType", "torch.Tensor")),
    "noise of another shape": ({"noise": latents((4, 3))}, ValueError, ("noise", "(4, 3)", "(4, 3, 6, 2)")),
    "sigma per step, rows per sample": ({"sigma": torch.full((3,), 0.8)}, ValueError, ("sigma", "(3,)", "(4,)")),
    "model output as a list": ({"model_output": [0.0]}, TypeError, ("model_output", "list")),
    "integer sample": ({"sample": latents(dtype=torch.int64)}, TypeError, ("sample", "torch.int64")),
    "no rows": (
        {"model_output": latents((0, 3)), "sample": latents((0, 3))},
        ValueError,
        ("model_output", "(0, 3)", "at least one row"),
    ),
    "no latent elements": (
        {"model_output": latents((4, 0)), "sample": latents((4, 0))},
        ValueError,
        ("model_output", "(4, 0)", "at least one latent element"),
    ),
    "guidance without its scale": ({"uncond_output": latents()}, ValueError, ("guidance_scale is None", "uncond")),
    "guidance without its output": ({"guidance_scale": 4.5}, ValueError, ("uncond_output is None", "guidance_scale")),
    "no noise level": ({"noise_level": None}, ValueError, ("noise_level is None",)),
    "generator's seed": ({"generator": 7}, TypeError, ("generator", "int", "torch.Generator")),
    "integer residual": ({"residual_dtype": torch.int8}, TypeError, ("residual_dtype", "torch.int8", "float16")),
    "residual wider than the arithmetic": (
        {"residual_dtype": torch.float64},
        TypeError,
        ("residual_dtype", "torch.float64", "float32"),
    ),
}


@pytest.mark.parametrize(("change", "error", "facts"), SDE_STEP.values(), ids=SDE_STEP)
def test_sde_step(api, change, error, facts):
    with pytest.raises(error) as caught:
        api.sde_step(**sde(**change))
    says(str(caught.value), ("flowdppo_ops.sde_step", *facts))


def test_the_good_steps_are_good(api):
    assert math.isfinite(api.step_loss(**step()).loss)
    assert torch.isfinite(api.sde_step(**sde()).log_prob).all()


def test_a_bad_step_leaves_no_trace(step_loss):
    good = step(model_output=torch.ones(LATENTS, requires_grad=True))
    with pytest.raises(ValueError, match="old_model_output"):
        step_loss(**good, old_model_output=latents())
    assert good["model_output"].grad is None
    step_loss(**good).loss.backward()
    assert torch.isfinite(good["model_output"].grad).all()


GUIDED = {"uncond_output": latents(), "guidance_scale": torch.ones(ROWS), "sigma": torch.full(ROWS, 0.8)}


@pytest.mark.parametrize("name", ["model_output", "sample", "prev_sample", "old_prev_sample_mean", *GUIDED])
def test_freed_memory_of_a_step_is_not_read(fused_step, name):
    arguments = step(**{name: value.clone() for name, value in GUIDED.items()})
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\bmemory\b"):
        fused_step(**arguments)


@pytest.mark.parametrize("name", ["sample", "old_prev_sample_mean", "uncond_output", "guidance_scale", "sigma"])
def test_sparse_tensors_of_a_step_do_not_crash(fused_step, name):
    arguments = step(**GUIDED)
    arguments[name] = arguments[name].to_sparse()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        fused_step(**arguments)


def test_another_device_of_a_step(fused_step):
    arguments = {name: v.to("meta") if torch.is_tensor(v) else v for name, v in step(**GUIDED).items()}
    with pytest.raises(RuntimeError, match=r"meta.*flowdppo_ops\.reference\.step_loss"):
        fused_step(**arguments)


ENCODE = {
    "latent as a list": ({"prev_sample": [0.0]}, TypeError, ("prev_sample", "list", "torch.Tensor")),
    "mean of another shape": ({"mean": latents((4, 3))}, ValueError, ("mean", "(4, 3)", "(4, 3, 6, 2)")),
    "mean on another device": ({"mean": latents(device="meta")}, ValueError, ("mean", "meta", "cpu")),
    "no std": ({"std": None}, ValueError, ("std is None",)),
    "std per step": ({"std": torch.ones(3)}, ValueError, ("std", "(3,)", "(4,)")),
    "std of more dimensions than the latents": ({"std": torch.ones(4, 1, 1, 1, 1)}, ValueError, ("std", "rank 4")),
    "std as a list": ({"std": [1.0]}, TypeError, ("std", "list", "number")),
    "dtype": ({"dtype": torch.int8}, TypeError, ("dtype", "torch.int8", "float16")),
}


@pytest.mark.parametrize(("change", "error", "facts"), ENCODE.values(), ids=ENCODE)
def test_encode_residual(api, change, error, facts):
    with pytest.raises(error) as caught:
        api.encode_residual(**({"prev_sample": latents(), "mean": latents(), "std": 0.5} | change))
    says(str(caught.value), ("flowdppo_ops.encode_residual", *facts))
