"""Checks of values, which `FLOWDPPO_OPS_CHECK=1` turns on for debugging. They synchronise a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import Call
from ._native import LATENTS, SDE_STEP_LATENTS
from ._torch import row_tensor

Values = dict[str, Tensor]  # each [rows, elements]
Range = tuple[str, str, Callable[[Values], Tensor]]  # name, wanted range, function that says where a value is in range

_LOSS_RANGES: tuple[Range, ...] = (
    ("std", "> 0", lambda values: values["std"] > 0),
    ("sqrt_dt", "> 0", lambda values: values["sqrt_dt"] > 0),
    ("ref_std", "> 0", lambda values: values["ref_std"] > 0),
)
_STEP_RANGES: tuple[Range, ...] = (
    ("sigma", "in [0, 1]", lambda values: (values["sigma"] >= 0) & (values["sigma"] <= 1)),
    ("sigma_next", "in [0, 1]", lambda values: (values["sigma_next"] >= 0) & (values["sigma_next"] <= 1)),
    ("sigma_next", "< sigma", lambda values: values["sigma_next"] < values["sigma"]),
    ("sigma_max", "< 1 where sigma is 1", lambda values: (values["sigma_max"] < 1) | (values["sigma"] != 1)),
    ("noise_level", ">= 0", lambda values: values["noise_level"] >= 0),
    # A trainer may pass the std of a deterministic step, which is 0, as `ref_std`.
    ("ref_std", ">= 0", lambda values: values["ref_std"] >= 0),
)


def check_values(call: Call) -> None:
    """Raises ValueError, which names an argument and its rows, unless every value is finite and in its range."""
    if not math.isfinite(call.settings["ref_kl_weight"]):
        raise ValueError(f"{call.where}: ref_kl_weight is {call.settings['ref_kl_weight']}, wanted a finite number")
    is_step = "model_output" in call.fields
    _check(call, LATENTS, _STEP_RANGES if is_step else _LOSS_RANGES)


def check_step_values(call: Call) -> None:
    """As `check_values`, for `sde_step`."""
    _check(call, SDE_STEP_LATENTS, _STEP_RANGES)


def _check(call: Call, latents: list[str], ranges: tuple[Range, ...]) -> None:
    rows, device = torch.Size(call.row_shape).numel(), next(iter(call.fields.values())).device
    values = {
        name: value.detach() if name in latents else row_tensor(value, call.row_shape, torch.float64, device)
        for name, value in call.fields.items()
    }
    values = {name: value.reshape(rows, -1) for name, value in values.items()}
    for name, value in values.items():
        _refuse(call.where, name, "finite", torch.isfinite(value))
    for name, wanted, holds in ranges:
        if name == "sigma_max" and call.settings["sampler"] != "flow_sde":
            continue
        if name in values:
            _refuse(call.where, name, wanted, holds(values))


def _refuse(where: str, name: str, wanted: str, good: Tensor) -> None:
    bad = ~good.all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(f"{where}: {name} is not {wanted} in {len(rows)} of {bad.numel()} rows: {shown}")
