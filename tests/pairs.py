"""Pairwise covering arrays: every value of an option meets every value of each other option in some case. For options
that meet in a row's epilogue alone, where the full product says nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from allpairspy import AllPairs

Axis = Mapping[str, Any] | Iterable[Any]  # values, by what they are called in the names of tests


def covering(**axes: Axis) -> Callable[[Any], Any]:
    """`pytest.mark.parametrize` over all arguments named, by a covering array that is the same in every run."""
    named = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()]
    values = [list(axis.values()) for axis in named]
    names = [list(axis) for axis in named]
    rows = [tuple(row) for row in AllPairs([range(len(axis)) for axis in values])]
    cases = [
        pytest.param(*(axis[at] for axis, at in zip(values, row, strict=True)), id="-".join(each))
        for row in rows
        for each in [[axis[at] for axis, at in zip(names, row, strict=True)]]
    ]
    return pytest.mark.parametrize(tuple(axes), cases)
