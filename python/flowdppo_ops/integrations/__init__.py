"""The trainers' own entry points, run by this package: one module per trainer, and what `strict` decides.

With `strict=True`, the default here, a trainer's numbers are reproduced to rounding, its defects included; with
`strict=False` the fused functions do what the maths says. `DEFECTS` lists every difference.
"""

from __future__ import annotations

from typing import NamedTuple

from ._patch import Incompatible

__all__ = ["DEFECTS", "Defect", "Incompatible"]


class Defect(NamedTuple):
    """A behaviour of a trainer that is not what the maths says, and what each setting does about it."""

    name: str
    trainer: str
    behaviour: str
    effect: str  # with a number
    strict: str  # what `strict=True` does
    fixed: str  # what `strict=False` does


DEFECTS: list[Defect] = []
