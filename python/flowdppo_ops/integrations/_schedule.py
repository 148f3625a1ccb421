"""What the trainers' schedulers do on the host, on the device: finding sigmas by timestep. And the noise they draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import Generator, draw_noise


def look_up(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """sigma now and next of each timestep `[rows]`, as diffusers' `index_for_timestep` finds them.

    That one waits for the device twice per sample. Here nothing does: a timestep that the schedule does not have is an
    error for tensors on the CPU, as it is there, and a sigma of NaN on other devices. Where a schedule has a timestep
    twice, diffusers takes the second.
    """
    found = scheduler.timesteps.to(timestep.device) == timestep.reshape(-1, 1)
    if found.device.type == "cpu" and not bool(found.any(1).all()):
        raise IndexError(f"flowdppo_ops: the schedule has not all of the timesteps {timestep.tolist()}")
    nth = found.cumsum(1)
    index = (found & (nth == nth[:, -1:].clamp(max=2))).int().argmax(1)
    sigmas = scheduler.sigmas.to(timestep.device)
    return torch.where(nth[:, -1] > 0, sigmas[index], torch.nan), sigmas[index + 1]


def draw(like: Tensor, generator: Generator) -> Tensor:
    """float32 noise in the shape of `like`, as diffusers' `randn_tensor` draws it: of several generators one a row."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]  # draws all rows
    return draw_noise(like, torch.float32, generator)


def wide(rows: Tensor, rank: int) -> Tensor:
    """`[rows]` as `[rows, 1, ...]`, of the rank of the latents: the form in which trainers keep row vectors."""
    return rows.reshape(-1, *(1,) * (rank - 1))
