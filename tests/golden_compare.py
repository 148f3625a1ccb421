"""How closely a result must agree with the recorded one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden.load import Case, load, names
from torch import Tensor

# In units of 2^-23 (float32) of the largest magnitude. The trainers' own float32 results are up to 6 units (losses,
# gradients), 17 (log-prob of a step) and 25 (mean and gradient of a step with sigma 1) from their double-precision
# ones; ours may be as far to the other side.
_UNITS = {"d": 50, "e": 50, "g": 50, "i": 50}
_OTHER_UNITS = 12


def size_of(key: str, want: Tensor, ours: dict[str, Any]) -> float:
    """The magnitude that a result's rounding is relative to."""
    name = key.split(".")[-1].split("/")[-1]
    kind = "kl" if name.startswith(("kl_new_old", "kl_per_sample")) else name
    finite = want[torch.isfinite(want)].abs()
    own = finite.max().item() if finite.numel() else 0.0
    return max(own, float(ours.get(f"size.{kind}", 0.0)))


def allowed(case: Case, key: str, want: Tensor, ours: dict[str, Any], double: bool) -> float:
    if "frac" in key:
        return 2.0**-23  # a share of at most 24 rows, some of them rounded to float32: the same count
    size = size_of(key, want, ours)
    units = _UNITS.get(case.group.split("_")[0], _OTHER_UNITS)
    if case.arrays.get(key, want).dtype in (torch.bfloat16, torch.float16):
        return (torch.finfo(case.arrays[key].dtype).eps + units * 2.0**-23) * size
    if "in.noise_level" in case.arrays:  # upstream takes its sine and square in float32 always
        return units * 2.0**-23 * size
    if double or case.meta["dtype"] == "float64":
        # A float32 gradient of a double run: each use of the leaf is rounded, and their sum.
        return (1e-12 if want.dtype == torch.float64 else 2.0**-22) * size
    return units * 2.0**-23 * size


def mismatch(key: str, ours: Tensor | None, want: Tensor | None, allowed: float) -> str:
    """Empty, or what is wrong. NaN agrees with NaN, infinity with the same infinity."""
    if ours is None or want is None:
        return "" if ours is want else f"{key}: {'no' if ours is None else 'a'} value, recorded otherwise"
    if ours.numel() != want.numel():
        return f"{key}: shape {tuple(ours.shape)}, wanted {tuple(want.shape)}"
    mine, theirs = ours.detach().double().flatten(), want.detach().double().flatten()
    finite = torch.isfinite(theirs)
    error = (mine - theirs).abs()[finite]
    same = torch.equal(mine[~finite].nan_to_num(math.pi), theirs[~finite].nan_to_num(math.pi))
    if key == "out.loss_per_elem":  # the mask, exactly
        same = same and torch.equal(mine == 0, theirs == 0)
    if same and bool((error <= allowed).all()):
        return ""
    where = (~((mine - theirs).abs() <= allowed) & ~(mine.isnan() & theirs.isnan())).nonzero().flatten()[:3].tolist()
    pairs = [f"[{i}] {mine[i].item():.9g} for {theirs[i].item():.9g}" for i in where]
    return f"{key}: {', '.join(pairs)}; {allowed:.2g} allowed"


def disagreements(case: Case, ours: dict[str, Any], wanted: dict[str, Tensor | None], double: bool) -> list[str]:
    """What is wrong with the results that are `wanted`."""
    return [
        wrong
        for key, want in wanted.items()
        if (wrong := mismatch(key, ours[key], want, 0.0 if want is None else allowed(case, key, want, ours, double)))
    ]


def differing(ours: dict[str, Any], wanted: dict[str, Tensor | None], case: Case) -> list[str]:
    """Shapes too. float32 is compared with the trainer's double run as with its float32 one."""
    wrong = []
    for key, want in wanted.items():
        mine, limit = ours[key], 0.0 if want is None else allowed(case, key, want.float(), {}, False)
        if mine is not None and want is not None and mine.shape != want.shape:
            wrong.append(f"{key}: shape {tuple(mine.shape)}, wanted {tuple(want.shape)}")
        wrong.append(mismatch(key, mine, want, limit))
    return list(filter(None, wrong))


def leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone().requires_grad_()


def grad_of(objective: Tensor, leaf: Tensor | None) -> Tensor | None:
    if leaf is None:
        return None
    return torch.autograd.grad(objective, leaf, retain_graph=True, allow_unused=True)[0]


def drives(*groups: str) -> list[Any]:
    """Cases of the groups, each in float32 and, where the trainer's function was, in float64."""
    return [
        pytest.param(name, double, id=f"{name}{'-double' * double}")
        for name in (name for group in groups for name in names(group))
        for double in (False, True)
        if not double or load(name).has_double()
    ]
