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
    leading = () if value.numel() == 1 else value.shape[: len(row_shape)]
    return value.reshape(leading).expand(row_shape)


def draw_noise(like: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """Standard normal latents. A generator draws on its own device, as diffusers has it: a CPU generator gives the same
    noise for latents on any GPU."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"flowdppo_ops.sde_step: generator is a {type(generator).__name__}, wanted a torch.Generator")
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=device).to(like.device)
