"""Stochastic sampling: what the policy did, kept for the updates that follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import sde_step
from .data import SHAPE
from .model import Velocity


class Schedule(NamedTuple):
    """sigmas: `[steps + 1]`, from 1 down to 0. noise_level: the samplers' eta."""

    sigmas: Tensor
    noise_level: float

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def sqrt_dt(self) -> Tensor:
        """`[1, steps]`, a row vector for rows `[batch, steps]`."""
        return (self.sigmas[:-1] - self.sigmas[1:]).sqrt()[None]


class Rollout(NamedTuple):
    """Rows are `[batch, steps]`; latents the rows, then `[1, 8, 8]`; all float32.

    samples: x, where the step started. prev_samples: x', where it went. means: its mean under the policy that drew it.
    std, log_probs: rows. prompts: `[batch]`, int64. images: the last x', `[batch, 1, 8, 8]`.
    """

    samples: Tensor
    prev_samples: Tensor
    means: Tensor
    std: Tensor
    log_probs: Tensor
    prompts: Tensor
    images: Tensor


def uniform_schedule(steps: int, noise_level: float, device: str) -> Schedule:
    return Schedule(torch.linspace(1, 0, steps + 1, device=device), noise_level)


@torch.no_grad()
def rollout(policy: Velocity, prompts: Tensor, schedule: Schedule, generator: torch.Generator) -> Rollout:
    """Draws one image per prompt with Flow-SDE. `generator` is a CPU one, so that a GPU draws the same noise."""

    def noise() -> Tensor:
        return torch.randn(len(prompts), *SHAPE, generator=generator).to(prompts.device)

    x = noise()
    samples, steps = [], []
    for sigma, sigma_next in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True):
        step = sde_step(
            policy(x, sigma[None], prompts),
            x,
            sigma=sigma,
            sigma_next=sigma_next,
            noise_level=schedule.noise_level,
            sigma_max=schedule.sigmas[1],  # Flow-GRPO's choice: the second sigma stands in for 1
            noise=noise(),
        )
        samples.append(x)
        steps.append(step)
        x = step.prev_sample
    return Rollout(
        samples=torch.stack(samples, 1),
        prev_samples=torch.stack([step.prev_sample for step in steps], 1),
        means=torch.stack([step.prev_sample_mean for step in steps], 1),
        std=torch.stack([step.std for step in steps], 1),
        log_probs=torch.stack([step.log_prob for step in steps], 1),
        prompts=prompts,
        images=x,
    )


def replayed_means(policy: Velocity, batch: Rollout, schedule: Schedule) -> Tensor:
    """The means that `policy` gives the recorded steps, all steps in one pass; differentiable. Latents."""
    model_output = policy(batch.samples, schedule.sigmas[None, :-1], batch.prompts[:, None])
    return sde_step(
        model_output,
        batch.samples,
        sigma=schedule.sigmas[None, :-1],
        sigma_next=schedule.sigmas[None, 1:],
        noise_level=schedule.noise_level,
        sigma_max=schedule.sigmas[1],
        prev_sample=batch.prev_samples,
        row_dims=2,
    ).prev_sample_mean


@torch.no_grad()
def path_kl(batch: Rollout, other: Velocity, schedule: Schedule) -> float:
    """KL from the policy that drew `batch` to `other`, in nats per image: summed over steps and latent elements.

    The KL between whole trajectories, hence an upper bound of that between the images they end in.
    """
    drift = batch.means - replayed_means(other, batch, schedule)
    per_step = drift.square().flatten(2).sum(2) / (2 * batch.std**2)
    return per_step.sum(1).mean().item()


def select(batch: Rollout, rows: Tensor) -> Rollout:
    """Some of the images, with all their steps."""
    return Rollout(*(field[rows] for field in batch))
