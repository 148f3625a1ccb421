"""Row vectors of every shape that broadcasts to the rows: each row has its own element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flowdppo_ops import FlowGRPO, loss
from flowdppo_ops._torch import row_tensor

ROW_SHAPES = [(), (1,), (3,), (2, 3), (1, 3), (2, 1), (1, 1), (2, 3, 4), (2, 1, 4), (2, 3, 1), (2, 1, 1)]


def shapes(row_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All that broadcast to the rows, with and without trailing ones for two latent dimensions."""
    leading = itertools.product(*(sorted({1, rows}) for rows in row_shape))
    return [shape + trailing for shape in leading for trailing in ((), (1, 1))] + [()]


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_every_row_reads_its_own_element(row_shape):
    """The loss of a row is minus its weight here. ([A, 1, C] for rows [A, B, C] is written out; the others are not.)"""
    log_prob, mean = torch.zeros(row_shape), torch.zeros(*row_shape, 5, 2)
    for shape in shapes(row_shape):
        weights = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
        result = loss(
            mean, None, torch.ones(row_shape), log_prob=log_prob, old_log_prob=log_prob, weights=weights,
            objective=FlowGRPO(), reduction="none",
        )  # fmt: skip
        wanted = weights.reshape(shape[: len(row_shape)]).expand(row_shape)
        assert torch.equal(-result.loss, wanted)
        assert torch.equal(row_tensor(weights, row_shape, torch.float32, mean.device), wanted)
