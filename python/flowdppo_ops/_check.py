"""`FLOWDPPO_OPS_CHECK=1`: checks of values, for debugging. They synchronise a GPU, so they are off otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._args import LossCall
from ._step_args import StepCall
from ._torch import row_tensor

Values = dict[str, Tensor]  # [rows, elements] each
Range = tuple[str, str, Callable[[Values], Tensor]]  # name, what is wanted, where it holds

_LOSS_RANGES: tuple[Range, ...] = (
    ("std", "> 0", lambda given: given["std"] > 0),
    ("sqrt_dt", "> 0", lambda given: given["sqrt_dt"] > 0),
    ("ref_std", "> 0", lambda given: given["ref_std"] > 0),
)
_STEP_RANGES: tuple[Range, ...] = (
    ("sigma", "in [0, 1]", lambda given: (given["sigma"] >= 0) & (given["sigma"] <= 1)),
    ("sigma_next", "in [0, 1]", lambda given: (given["sigma_next"] >= 0) & (given["sigma_next"] <= 1)),
    ("sigma_next", "< sigma", lambda given: given["sigma_next"] < given["sigma"]),
    ("noise_level", ">= 0", lambda given: given["noise_level"] >= 0),
    ("ref_std", ">= 0", lambda given: given["ref_std"] >= 0),  # 0 in a deterministic step, which a trainer may pass on
)
_SCHEDULE = ("sigma", "sigma_next", "noise_level", "sigma_max", "guidance_scale")
_FORMS = {"mean": "prev_sample_mean", "output": "model_output", "residual": "residual"}


def check_values(where: str, call: LossCall) -> None:
    """Raises ValueError naming the argument and the rows unless all is finite, every deviation positive, and a schedule
    within its ranges."""
    latents, vectors, schedule = call.latents._asdict(), call.vectors._asdict(), call.schedule
    if schedule is None:
        names, ranges = ("prev_sample_mean", "mean", "mean"), _LOSS_RANGES
    else:
        names, ranges = ("model_output", schedule.old_form, schedule.ref_form), _STEP_RANGES
        vectors |= {name: getattr(schedule, name) for name in _SCHEDULE}
    output, old, ref = names
    named = {"output": output, "old": f"old_{_FORMS[old]}", "ref": f"ref_{_FORMS[ref]}"}
    latents = {named.get(name, name): value for name, value in latents.items()}
    _check(where, call.row_shape, call.vectors.advantages.device, latents, vectors, ranges)


def check_step_values(where: str, call: StepCall) -> None:
    """As `check_values`, for `sde_step`."""
    latents = ("model_output", "uncond_output", "sample", "prev_sample", "noise")
    given = ({name: getattr(call, name) for name in names} for names in (latents, _SCHEDULE))
    _check(where, call.row_shape, call.sample.device, *given, _STEP_RANGES)


def _check(
    where: str,
    row_shape: tuple[int, ...],
    device: torch.device,
    latents: dict[str, Any],
    vectors: dict[str, Any],
    ranges: tuple[Range, ...],
) -> None:
    rows = torch.Size(row_shape).numel()
    given = {name: value.detach() for name, value in latents.items() if value is not None}
    given |= {
        name: row_tensor(value, row_shape, torch.float64, device)
        for name, value in vectors.items()
        if value is not None
    }
    given = {name: value.reshape(rows, -1) for name, value in given.items()}
    for name, value in given.items():
        _refuse(where, name, "finite", torch.isfinite(value))
    for name, wanted, holds in ranges:
        if name in given:
            _refuse(where, name, wanted, holds(given))


def _refuse(where: str, name: str, wanted: str, good: Tensor) -> None:
    bad = ~good.all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(f"{where}: {name} is not {wanted} in {len(rows)} of {bad.numel()} rows: {shown}")
