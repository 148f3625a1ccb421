"""What the checks and the loaders need to know of PyTorch."""

from __future__ import annotations

from numbers import Real

import torch

from ._args import Family

FAMILY = Family(
    type=torch.Tensor,
    name="torch.Tensor",
    dtypes={
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
        torch.float64: "float64",
    },
)


def row_tensor(
    value: Real | torch.Tensor, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A checked row vector as a tensor of exactly the rows' shape, detached."""
    if not isinstance(value, torch.Tensor):
        return torch.full(row_shape, float(value), dtype=dtype, device=device)
    value = value.detach().to(dtype)
    if value.ndim:
        value = value.reshape(value.shape[: len(row_shape)])
    return value.expand(row_shape)
