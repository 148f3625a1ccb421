"""What trainers' schedulers do around a step: finding the sigmas of a timestep, drawing noise, shaping row vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import Generator, draw_noise


def look_up(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The sigma of each timestep `[rows]` and the sigma after it, as diffusers' `index_for_timestep` finds them.

    diffusers waits for the device twice per sample; this function does not wait. So a timestep that the schedule does
    not have raises IndexError only on the CPU; on other devices its sigma is NaN. If a schedule has a timestep twice,
    the second one counts, as in diffusers.
    """
    found = scheduler.timesteps.to(timestep.device) == timestep.reshape(-1, 1)
    if found.device.type == "cpu" and not bool(found.any(1).all()):
        raise IndexError(f"flowdppo_ops: not all of the timesteps {timestep.tolist()} are in the schedule")
    nth = found.cumsum(1)
    index = (found & (nth == nth[:, -1:].clamp(max=2))).int().argmax(1)
    sigmas = scheduler.sigmas.to(timestep.device)
    return torch.where(nth[:, -1] > 0, sigmas[index], torch.nan), sigmas[index + 1]


def draw(like: Tensor, generator: Generator) -> Tensor:
    """float32 noise in the shape of `like`, as diffusers' `randn_tensor` draws it: a list has one generator per row,
    but the generator of a list of one draws all rows."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    return draw_noise(like, torch.float32, generator)


def wide(rows: Tensor, rank: int) -> Tensor:
    """`[rows]` as `[rows, 1, ...]` of this rank, the form in which trainers keep row vectors."""
    return rows.reshape(-1, *(1,) * (rank - 1))
