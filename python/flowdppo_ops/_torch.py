"""What the checks and the loaders need to know of PyTorch."""

from __future__ import annotations

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
    float64=torch.float64,
    layout=torch.strided,
    contiguous=torch.Tensor.contiguous,
    broadcast=torch.Tensor.expand,
    has_devices=True,
)


def row_tensor(
    value: float | torch.Tensor, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A checked row vector as a tensor of exactly the rows' shape, detached."""
    if not isinstance(value, torch.Tensor):
        return torch.full(row_shape, value, dtype=dtype, device=device)
    value = value.detach().to(dtype)
    return value.reshape(()).expand(row_shape) if value.numel() == 1 else value.reshape(row_shape)
