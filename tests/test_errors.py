"""Bad input: the exception and what its message must say, one line per mistake."""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import OBJECTIVES, draw

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

GRPO, GUARD = OBJECTIVES["grpo"], OBJECTIVES["guard"]
ROWS, LATENTS = (4, 3), (4, 3, 6, 2)


def latents(shape: tuple[int, ...] = LATENTS, **kwargs) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


def says(message: str, facts: tuple[str, ...]) -> None:
    for fact in facts:
        assert fact in message, f"{fact!r} is not in {message!r}"


# (what is changed in a good call, exception, what the message says: argument, what came, what was wanted)
LOSS = {
    # shapes
    "old mean of another shape": (
        {"old_prev_sample_mean": latents((4, 3, 6))},
        ValueError,
        ("old_prev_sample_mean", "(4, 3, 6)", "(4, 3, 6, 2)", "prev_sample_mean"),
    ),
    "sample that would broadcast": (
        {"prev_sample": latents((1, 3, 6, 2))},
        ValueError,
        ("prev_sample", "(1, 3, 6, 2)", "(4, 3, 6, 2)"),
    ),
    "rows not first": (
        {"advantages": torch.zeros(3, 4)},
        ValueError,
        ("prev_sample_mean", "(4, 3, 6, 2)", "rows", "(3, 4)"),
    ),
    "more row dimensions than latents have": (
        {"advantages": torch.zeros(4, 3, 6, 2, 1)},
        ValueError,
        ("prev_sample_mean", "(4, 3, 6, 2)", "(4, 3, 6, 2, 1)"),
    ),
    "no rows": (
        {"advantages": torch.zeros(0, 3), "prev_sample_mean": latents((0, 3, 6, 2))},
        ValueError,
        ("advantages", "(0, 3)", "at least one row"),
    ),
    "no latent elements": (
        {name: latents((4, 3, 0)) for name in ("prev_sample_mean", "old_prev_sample_mean", "prev_sample")},
        ValueError,
        ("prev_sample_mean", "(4, 3, 0)", "at least one latent element"),
    ),
    "old log-prob per latent": (
        {"old_log_prob": latents()},
        ValueError,
        ("old_log_prob", "(4, 3, 6, 2)", "(4, 3)", "advantages"),
    ),
    "old log-prob that would broadcast": ({"old_log_prob": torch.zeros(3)}, ValueError, ("old_log_prob", "(3,)")),
    # row vectors
    "std per step without the row dimension": ({"std": torch.ones(3)}, ValueError, ("std", "(3,)", "(4, 3)", "rank 2")),
    "std per sample without the step dimension": ({"std": torch.ones(4)}, ValueError, ("std", "(4,)", "(4, 3)")),
    "std of a rank between": ({"std": torch.ones(4, 3, 1)}, ValueError, ("std", "(4, 3, 1)", "rank 2", "rank 4")),
    "std per latent": ({"std": torch.ones(LATENTS)}, ValueError, ("std", "(4, 3, 6, 2)", "(4, 3)")),
    "std of other rows": ({"std": torch.ones(2, 3)}, ValueError, ("std", "(2, 3)", "(4, 3)")),
    "std with no rows": ({"std": torch.ones(0, 3)}, ValueError, ("std", "(0, 3)", "(4, 3)")),
    "weights per latent": ({"weights": torch.ones(LATENTS)}, ValueError, ("weights", "(4, 3, 6, 2)")),
    "sqrt_dt per step": (
        {"sqrt_dt": torch.ones(3), "objective": GUARD},
        ValueError,
        ("sqrt_dt", "(3,)", "(4, 3)"),
    ),
    "ref_std of other rows": (
        {"ref_std": torch.ones(4, 2), "ref_kl_weight": 0.1, "ref_prev_sample_mean": latents()},
        ValueError,
        ("ref_std", "(4, 2)", "(4, 3)"),
    ),
    # log-prob sources
    "neither source": ({"prev_sample": None}, ValueError, ("neither", "prev_sample", "log_prob", "exactly one")),
    "both sources": (
        {"log_prob": torch.zeros(ROWS), "old_log_prob": torch.zeros(ROWS)},
        ValueError,
        ("both", "prev_sample", "log_prob", "exactly one"),
    ),
    "log-prob without the old one": (
        {"prev_sample": None, "log_prob": torch.zeros(ROWS)},
        ValueError,
        ("old_log_prob is None", "log_prob"),
    ),
    "log-prob of other rows": (
        {"prev_sample": None, "log_prob": torch.zeros(4), "old_log_prob": torch.zeros(ROWS)},
        ValueError,
        ("log_prob", "(4,)", "(4, 3)"),
    ),
    # what an objective needs
    "no mean": ({"prev_sample_mean": None}, ValueError, ("prev_sample_mean is None",)),
    "no old mean": ({"old_prev_sample_mean": None}, ValueError, ("old_prev_sample_mean is None", "old policy")),
    "no old mean, and no old log-prob either": (
        {"old_prev_sample_mean": None, "objective": GRPO},
        ValueError,
        ("old_prev_sample_mean is None",),
    ),
    "no std": ({"std": None}, ValueError, ("std is None", "standard deviation")),
    "guard without sqrt_dt": ({"objective": GUARD}, ValueError, ("sqrt_dt is None", "GRPOGuard")),
    "reference KL without its mean": (
        {"ref_kl_weight": 0.1},
        ValueError,
        ("ref_prev_sample_mean is None", "ref_kl_weight"),
    ),
    "reference mean of another shape": (
        {"ref_kl_weight": 0.1, "ref_prev_sample_mean": latents((4, 3, 12))},
        ValueError,
        ("ref_prev_sample_mean", "(4, 3, 12)", "(4, 3, 6, 2)"),
    ),
    # options
    "density": ({"density": "normal"}, ValueError, ("density", "'normal'", "'gaussian'", "'cps'")),
    "latent_reduction": ({"latent_reduction": "max"}, ValueError, ("latent_reduction", "'max'", "'mean'", "'sum'")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'", "'kept_mean'", "'none'")),
    "reduction None": ({"reduction": None}, ValueError, ("reduction", "None", "'none'")),
    "velocity KL without velocities": (
        {"objective": FlowDPPO(kl_space="velocity")},
        ValueError,
        ("kl_space", "'velocity'", "'latent'", "step_loss"),
    ),
    "process_group": ({"process_group": "world"}, TypeError, ("process_group", "str", "ProcessGroup", "None")),
    # types and dtypes
    "objective's class": ({"objective": FlowDPPO}, TypeError, ("objective", "type", "FlowDPPO", "instance")),
    "objective's name": ({"objective": "dppo"}, TypeError, ("objective", "str", "FlowDPPO")),
    "mean as a list": ({"prev_sample_mean": [[1.0]]}, TypeError, ("prev_sample_mean", "list", "torch.Tensor")),
    "sample as an array": (
        {"prev_sample": latents().numpy()},
        TypeError,
        ("prev_sample", "ndarray", "torch.Tensor"),
    ),
    "advantages as a list": ({"advantages": [1.0, 2.0]}, TypeError, ("advantages", "list", "torch.Tensor")),
    "advantages as a number": ({"advantages": 1.0}, TypeError, ("advantages", "float", "torch.Tensor")),
    "integer mean": (
        {"prev_sample_mean": latents(dtype=torch.int32)},
        TypeError,
        ("prev_sample_mean", "torch.int32", "float32", "bfloat16", "float16"),
    ),
    "integer advantages": (
        {"advantages": torch.zeros(ROWS, dtype=torch.int64)},
        TypeError,
        ("advantages", "torch.int64", "float32"),
    ),
    "boolean sample": ({"prev_sample": latents(dtype=torch.bool)}, TypeError, ("prev_sample", "torch.bool")),
    "complex old mean": (
        {"old_prev_sample_mean": latents(dtype=torch.complex64)},
        TypeError,
        ("old_prev_sample_mean", "torch.complex64"),
    ),
    "float8 old mean": (
        {"old_prev_sample_mean": latents().to(torch.float8_e4m3fn)},
        TypeError,
        ("old_prev_sample_mean", "float8"),
    ),
    "integer std": ({"std": torch.ones(ROWS, dtype=torch.int32)}, TypeError, ("std", "torch.int32", "float32")),
    "std as a list": ({"std": [0.5] * 4}, TypeError, ("std", "list", "number", "torch.Tensor")),
    "std as a string": ({"std": "0.5"}, TypeError, ("std", "str", "number")),
    "std as a bool": ({"std": True}, TypeError, ("std", "bool", "number")),
    "weights as a list": ({"weights": [1.0]}, TypeError, ("weights", "list", "number")),
    "old log-prob as a number": ({"old_log_prob": 0.0}, TypeError, ("old_log_prob", "float", "torch.Tensor")),
    "ref_kl_weight as a tensor": (
        {"ref_kl_weight": torch.tensor(0.1), "ref_prev_sample_mean": latents()},
        TypeError,
        ("ref_kl_weight", "Tensor", "number"),
    ),
    "ref_kl_weight as a bool": ({"ref_kl_weight": True}, TypeError, ("ref_kl_weight", "bool", "number")),
    # devices
    "old mean on another device": (
        {"old_prev_sample_mean": latents(device="meta")},
        ValueError,
        ("old_prev_sample_mean", "meta", "cpu", "prev_sample_mean"),
    ),
    "advantages on another device": (
        {"advantages": torch.zeros(ROWS, device="meta")},
        ValueError,
        ("advantages", "meta", "cpu"),
    ),
    "std on another device": ({"std": torch.ones(ROWS, device="meta")}, ValueError, ("std", "meta", "cpu")),
}


@pytest.mark.parametrize(("change", "error", "facts"), LOSS.values(), ids=LOSS)
def test_loss(loss, change, error, facts, capfd):
    with pytest.raises(error) as caught:
        loss(**(draw(ROWS, LATENTS[2:]) | change))
    assert type(caught.value) is error
    says(str(caught.value), ("flowdppo_ops.loss", *facts))
    assert capfd.readouterr() == ("", "")  # no panic message, no warning


def test_the_good_call_is_good(loss):
    """Else the table above proves nothing."""
    assert math.isfinite(loss(**draw(ROWS, LATENTS[2:])).loss)


def test_unknown_argument(loss):
    with pytest.raises(TypeError, match="sigma"):
        loss(**draw(ROWS, LATENTS[2:]), sigma=1.0)


def test_a_bad_call_leaves_no_trace(loss):
    """The same tensors work afterwards, and their gradient is not touched."""
    arguments = draw(ROWS, LATENTS[2:])
    mean = arguments["prev_sample_mean"].requires_grad_()
    with pytest.raises(ValueError, match="reduction"):
        loss(**arguments, reduction="avg")
    assert mean.grad is None
    loss(**arguments).loss.backward()
    assert torch.isfinite(mean.grad).all()


def test_other_device(fused):
    """Neither CPU nor CUDA: points at the implementation that takes any device."""
    arguments = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in draw(ROWS, LATENTS[2:]).items()}
    with pytest.raises(RuntimeError, match=re.escape("flowdppo_ops.reference")) as caught:
        fused(**arguments)
    says(str(caught.value), ("meta",))


@pytest.mark.parametrize("name", ["prev_sample_mean", "old_prev_sample_mean", "prev_sample", "std"])
def test_freed_memory_is_not_read(fused, name):
    """FSDP frees storages under living tensors; the address is then null."""
    arguments = draw(ROWS, LATENTS[2:])
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\bmemory\b"):
        fused(**arguments)


@pytest.mark.parametrize("name", ["prev_sample", "advantages", "std", "old_log_prob", "weights"])
def test_sparse_tensors_do_not_crash(fused, name):
    """Tensors without strided memory behind them."""
    arguments = draw(ROWS, LATENTS[2:])
    arguments[name] = torch.ones(LATENTS if name == "prev_sample" else ROWS).to_sparse()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        fused(**arguments)


# ---- advantages and objectives --------------------------------------------------------------------------------------

ADVANTAGES = {
    "rewards as a list": (([1.0, 2.0], [0, 0]), {}, TypeError, ("rewards", "list", "torch.Tensor")),
    "integer rewards": ((torch.tensor([1, 2]), [0, 0]), {}, TypeError, ("rewards", "torch.int64", "float")),
    "no rewards": ((torch.zeros(0), []), {}, ValueError, ("rewards", "(0,)", "not empty")),
    "a single number": ((torch.tensor(1.0), [0]), {}, ValueError, ("rewards", "()", "[B]")),
    "rank 3": ((torch.zeros(2, 3, 4), [0, 0]), {}, ValueError, ("rewards", "(2, 3, 4)", "[B, T]")),
    "too few ids": ((torch.zeros(3), [0, 0]), {}, ValueError, ("group_ids", "(2,)", "(3,)")),
    "ids per column": ((torch.zeros(3, 2), torch.ones(3, 2).long()), {}, ValueError, ("group_ids", "(3, 2)")),
    "ids of rank 0": ((torch.zeros(1), torch.tensor(0)), {}, ValueError, ("group_ids", "()", "(1,)")),
    "float ids": ((torch.zeros(2), torch.zeros(2)), {}, TypeError, ("group_ids", "torch.float32", "integer")),
    "std": ((torch.zeros(2), [0, 0]), {"std": "batch"}, ValueError, ("std", "'batch'", "'global'", "'group'", "None")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "facts"), ADVANTAGES.values(), ids=ADVANTAGES)
def test_group_advantages(arguments, options, error, facts):
    with pytest.raises(error) as caught:
        flowdppo_ops.group_advantages(*arguments, **options)
    says(str(caught.value), ("flowdppo_ops.group_advantages", *facts))


OBJECTIVE_ERRORS = {
    "negative threshold": (FlowDPPO, {"kl_mask_threshold": -1e-5}, ValueError, ("kl_mask_threshold", "-1e-05", ">= 0")),
    "NaN threshold": (FlowDPPO, {"kl_mask_threshold": math.nan}, ValueError, ("kl_mask_threshold", "nan")),
    "threshold as a tensor": (FlowDPPO, {"kl_mask_threshold": torch.ones(())}, TypeError, ("a Tensor", "a number")),
    "threshold as a bool": (FlowDPPO, {"kl_mask_threshold": True}, TypeError, ("kl_mask_threshold", "bool", "number")),
    "threshold None": (FlowDPPO, {"kl_mask_threshold": None}, TypeError, ("kl_mask_threshold", "NoneType")),
    "mask": (FlowDPPO, {"mask": "both"}, ValueError, ("mask", "'both'", "'asymmetric'", "'symmetric'", "'none'")),
    "nan_kl": (FlowDPPO, {"nan_kl": "drop"}, ValueError, ("nan_kl", "'drop'", "'mask'", "'keep'")),
    "kl_space": (FlowDPPO, {"kl_space": "x"}, ValueError, ("kl_space", "'x'", "'latent'", "'velocity'")),
    "Flow-Factory's pair": (FlowGRPO, {"clip_range": (-1e-4, 1e-4)}, ValueError, ("clip_range", "-0.0001", ">= 0")),
    "NaN clip": (FlowGRPO, {"clip_range": math.nan}, ValueError, ("clip_range", "nan")),
    "clip as a string": (FlowGRPO, {"clip_range": "0.1"}, TypeError, ("clip_range", "str", "number")),
    "three limits": (FlowGRPO, {"clip_range": (0.1, 0.2, 0.3)}, TypeError, ("clip_range", "tuple")),
    "negative clamp": (FlowGRPO, {"adv_clip_max": -1.0}, ValueError, ("adv_clip_max", "-1.0", ">= 0")),
    "guard's clip": (GRPOGuard, {"clip_range": -1.0}, ValueError, ("GRPOGuard", "clip_range", "-1.0")),
    "guard's clamp": (GRPOGuard, {"adv_clip_max": "1"}, TypeError, ("GRPOGuard", "adv_clip_max", "str")),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "error", "facts"), OBJECTIVE_ERRORS.values(), ids=OBJECTIVE_ERRORS)
def test_objectives(kind, options, error, facts):
    with pytest.raises(error) as caught:
        kind(**options)
    says(str(caught.value), (kind.__name__, *facts))
