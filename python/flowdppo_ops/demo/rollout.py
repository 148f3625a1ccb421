"""Stochastic sampling: what the policy did, kept for the updates that follow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import flowdppo_ops

from ..reference import transition
from .data import SHAPE
from .model import Velocity


class Schedule(NamedTuple):
    """sigmas: `[steps + 1]`, from 1 down to 0. noise_level: the samplers' eta. sampler: of `sde_step`."""

    sigmas: Tensor
    noise_level: float
    sampler: str = "flow_sde"

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def noisy(self) -> int:
        """The steps that draw noise, and have a log-prob: CPS ends in a step without."""
        return self.steps - (self.sampler == "cps")

    @property
    def sqrt_dt(self) -> Tensor:
        """`[1, noisy]`, a row vector for rows `[batch, noisy]`."""
        return (self.sigmas[:-1] - self.sigmas[1:]).sqrt()[None, : self.noisy]

    @property
    def std(self) -> Tensor:
        """Of the noise of each step, `[1, noisy]`."""
        noise_level = torch.tensor(self.noise_level)
        every = self.arguments()
        return transition(self.sampler, every["sigma"], every["sigma_next"], noise_level, every["sigma_max"])[2]

    def arguments(self, step: int | None = None) -> dict[str, Any]:
        """What `sde_step` and `step_loss` want to know of a step, or of all noisy ones: row vectors `[1, noisy]`.

        Nothing is read on the host. Flow-GRPO's choice of `sigma_max`: the second sigma stands in for 1.
        """
        now, following = self.sigmas[:-1], self.sigmas[1:]
        every = (now[None, : self.noisy], following[None, : self.noisy])
        sigma, sigma_next = every if step is None else (now[step], following[step])
        sigmas = {"sigma": sigma, "sigma_next": sigma_next, "sigma_max": self.sigmas[1]}
        return {"sampler": self.sampler, "noise_level": self.noise_level, **sigmas}


class Rollout(NamedTuple):
    """Rows are `[batch, noisy steps]`; latents the rows, then `[1, 8, 8]`; float32 unless said.

    samples: x, where the step started. prev_samples: x', where it went. residuals: float16, `(x' - mean) / std` under
    the policy that drew it: all that an update needs of that policy beside the log-probs, at half the size of the
    means. means: for `--fused loss`, and for the KL that is reported. std, log_probs: rows. prompts: `[batch]`, int64.
    images: the last x', `[batch, 1, 8, 8]`.
    """

    samples: Tensor
    prev_samples: Tensor
    residuals: Tensor
    means: Tensor
    std: Tensor
    log_probs: Tensor
    prompts: Tensor
    images: Tensor


def uniform_schedule(steps: int, noise_level: float, device: str, sampler: str = "flow_sde") -> Schedule:
    return Schedule(torch.linspace(1, 0, steps + 1, device=device), noise_level, sampler)


@torch.no_grad()
def rollout(policy: Velocity, prompts: Tensor, schedule: Schedule, generator: torch.Generator) -> Rollout:
    """Draws one image per prompt. `generator` is a CPU one, so that a GPU draws the same noise."""
    x = torch.randn(len(prompts), *SHAPE, generator=generator).to(prompts.device)
    samples, steps = [], []
    for number in range(schedule.steps):
        arguments = schedule.arguments(number)
        model_output = policy(x, arguments["sigma"][None], prompts)
        step = flowdppo_ops.sde_step(model_output, x, generator=generator, residual_dtype=torch.float16, **arguments)
        if number < schedule.noisy:
            samples.append(x)
            steps.append(step)
        x = step.prev_sample
    prev_samples, log_probs, means, std, residuals = (torch.stack(field, 1) for field in zip(*steps, strict=True))
    return Rollout(torch.stack(samples, 1), prev_samples, residuals, means, std, log_probs, prompts, x)


def model_outputs(policy: Velocity, batch: Rollout, schedule: Schedule) -> Tensor:
    """What `policy` says at the recorded steps, all steps in one pass; differentiable. Latents."""
    return policy(batch.samples, schedule.sigmas[None, : schedule.noisy], batch.prompts[:, None])


def replayed_means(policy: Velocity, batch: Rollout, schedule: Schedule) -> Tensor:
    """The means that `policy` gives the recorded steps; differentiable. Latents."""
    output = model_outputs(policy, batch, schedule)
    replay = {"prev_sample": batch.prev_samples, "row_dims": 2}
    return flowdppo_ops.sde_step(output, batch.samples, **replay, **schedule.arguments()).prev_sample_mean


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
