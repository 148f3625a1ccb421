"""Row vectors as the native code gets them: small ones stay small, and an index says whose row an element is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flowdppo_ops._args import check_row_vector, row_stride
from flowdppo_ops._torch import FAMILY, row_tensor

ROW_SHAPES = [(), (1,), (3,), (2, 3), (1, 3), (2, 1), (1, 1), (2, 3, 4), (2, 1, 4), (2, 3, 1), (2, 1, 1)]


def shapes(row_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All that broadcast to the rows, with and without trailing ones for two latent dimensions."""
    leading = itertools.product(*(sorted({1, rows}) for rows in row_shape))
    return [shape + trailing for shape in leading for trailing in ((), (1, 1))] + [()]


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_every_row_vector_is_indexed(row_shape):
    rows, like = math.prod(row_shape), torch.zeros(*row_shape, 5, 2)
    for shape in shapes(row_shape):
        given = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
        kept = check_row_vector("test", FAMILY, "v", given, "like", like, row_shape, like.ndim)
        divide, modulo = row_stride(kept.shape, row_shape)
        assert modulo == kept.numel()
        wanted = given.reshape(shape[: len(row_shape)]).expand(row_shape)
        assert torch.equal(kept.reshape(-1)[torch.arange(rows) // divide % modulo], wanted.reshape(-1))
        assert torch.equal(row_tensor(kept, row_shape, torch.float32, like.device), wanted)
        written_out = (row_shape, shape[:3]) == ((2, 3, 4), (2, 1, 4))  # the one pattern that no index describes
        assert kept.numel() == (rows if written_out else given.numel())


def test_row_stride():
    assert row_stride((), (2, 3)) == row_stride((1, 1, 1, 1), (2, 3)) == (1, 1)
    assert row_stride((2, 3), (2, 3)) == row_stride((2, 3, 1), (2, 3)) == (1, 6)
    assert row_stride((1, 3), (2, 3)) == (1, 3)
    assert row_stride((2, 1), (2, 3)) == (3, 2)
    assert row_stride((1, 3, 1), (2, 3, 4)) == (4, 3)
    assert row_stride((2, 1, 4), (2, 3, 4)) is None


def test_a_schedule_is_not_copied():
    sigma = torch.linspace(1, 0.1, 3)[None, :, None, None, None]
    kept = check_row_vector("test", FAMILY, "sigma", sigma, "like", sigma, (4, 3), 5)
    assert kept.data_ptr() == sigma.data_ptr()
