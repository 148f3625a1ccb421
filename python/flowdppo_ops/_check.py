"""`FLOWDPPO_OPS_CHECK=1`: checks of values, for debugging. They synchronise a GPU, so they are off otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from ._args import LossCall

_POSITIVE = ("std", "sqrt_dt", "ref_std")


def check_values(where: str, call: LossCall) -> None:
    """Raises ValueError naming the argument and the rows unless all is finite, and every deviation positive."""
    rows = call.vectors.advantages.numel()
    given = {**call.latents._asdict(), **call.vectors._asdict()}
    for name, value in given.items():
        if value is None:
            continue
        table = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
        table = table.reshape(1 if table.numel() == 1 else rows, -1)
        _refuse(where, name, "finite", ~torch.isfinite(table).all(1))
        if name in _POSITIVE:
            _refuse(where, name, "> 0", ~(table > 0).all(1))


def _refuse(where: str, name: str, wanted: str, bad: Tensor) -> None:
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(f"{where}: {name} is not {wanted} in {len(rows)} of {bad.numel()} rows: {shown}")
