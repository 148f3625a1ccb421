"""PyTorch as the checks see it, row vectors as tensors, and random noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import Family

FAMILY = Family(
    type=torch.Tensor,
    name="torch.Tensor",
    dtypes={torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"},
    float64=torch.float64,
    layout=torch.strided,
    has_devices=True,
    expand=torch.Tensor.expand,
)

Generator = torch.Generator | Sequence[torch.Generator] | None


def row_tensor(
    value: float | torch.Tensor, row_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A checked row vector as a detached tensor of the rows' shape."""
    if not isinstance(value, torch.Tensor):
        return torch.full(row_shape, value, dtype=dtype, device=device)
    value = value.detach().to(dtype)
    leading = () if value.numel() == 1 else value.shape[: len(row_shape)]
    return value.reshape(leading).expand(row_shape)


def draw_noise(like: torch.Tensor, dtype: torch.dtype, generator: Generator = None) -> torch.Tensor:
    """Standard normal noise in the shape of `like`, on its device. As in diffusers, a generator draws on its own
    device, so that a CPU generator gives the same noise for every GPU; and each of several generators draws one sample
    (first dimension). Raises TypeError and ValueError."""
    if generator is None or isinstance(generator, torch.Generator):
        return _randn(like.shape, dtype, generator, like.device)
    where = "flowdppo_ops.sde_step"
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        came = type(generator).__name__
        raise TypeError(f"{where}: generator is a {came}, wanted a torch.Generator, or a list of one per sample")
    if like.ndim == 0 or len(generator) != like.shape[0]:
        raise ValueError(
            f"{where}: generator has {len(generator)} generators, wanted one for each of the samples of shape "
            f"{tuple(like.shape)}"
        )
    return torch.cat([_randn((1, *like.shape[1:]), dtype, one, like.device) for one in generator])


def _randn(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device)
