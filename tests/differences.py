"""The differences between a trainer and the formulas, as the last table of docs/trainers.md has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"


class Difference(NamedTuple):
    trainer: str  # and the versions that have it, if not all
    name: str
    behaviour: str
    effect: str  # with a number
    strict: str  # what `strict=True` computes
    exact: str  # what `strict=False` computes


def differences() -> list[Difference]:
    table = PAGE.read_text(encoding="utf-8").partition("| trainer | difference |")[2]
    lines = [line for line in table.split("\n\n")[0].splitlines()[2:] if line]
    return [Difference(*(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])) for line in lines]


def effect(name: str) -> str:
    (found,) = [one.effect for one in differences() if one.name == name]
    return found
