"""The trainers' training step in plain PyTorch, from the model's output to loss and metrics: what the benches replace.

Follows verl-omni at a1139baf: its operations on latents and rows, and its waits for the device, in its order. What
stands for what:

    look_up         `FlowMatchSDEDiscreteScheduler.sample_previous_step`, its first lines, and diffusers'
                    `index_for_timestep`, which it calls for each sample
    flow_sde, cps,  the branches of `sample_previous_step`, `sde_type="sde"`, `"cps"`, `"dance_sde"`, up to the mean
    dance_sde
    sampled         the same function's `if prev_sample is None`
    log_prob        the same function's log-prob, mean over the latents and `sqrt_dt`
    dppo_loss       `FlowDPPOLoss.compute_loss`
    read            the thirteen `.item()` at its end

Left out, and in favour of this side: autocast, the division by the accumulation steps, the moves between stacked and
unstacked results (`postprocess_batch_func`), and how each metric is averaged afterwards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NOISE_LEVEL, STEPS, STEP = 0.7, 10, 4  # sigma 0.82 to 0.75 with SD3.5's schedule


class Scheduler(NamedTuple):
    """sigmas: `[steps + 1]` float32, from 1 down to 0. timesteps: `[steps]`, what the pipeline calls a step by."""

    sigmas: Tensor
    timesteps: Tensor


class Step(NamedTuple):
    """As the trainers hold it: `std_dev_t` `[rows, 1, ...]` is without sqrt(-dt) for "sde" and with it otherwise."""

    mean: Tensor
    std_dev_t: Tensor
    std: Tensor  # of the transition: what noise is multiplied by
    dt: Tensor


def shifted_schedule(device: torch.device) -> Scheduler:
    """SD3.5's: uniform steps, shifted by 3 towards the noise."""
    uniform = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    sigmas = (3 * uniform / (1 + 2 * uniform)).float().to(device)
    return Scheduler(sigmas, 1000 * sigmas[:-1])


class At(NamedTuple):
    """Where the rows of a micro-batch stand, all at one step, as trainers have it: rows, float32."""

    timestep: Tensor  # by which the trainers look up their sigmas
    sigma: Tensor  # what they find
    sigma_next: Tensor


def at_one_step(schedule: Scheduler, rows: int) -> At:
    found = (schedule.timesteps[STEP], schedule.sigmas[STEP], schedule.sigmas[STEP + 1])
    return At(*(one.expand(rows).contiguous() for one in found))


def wide(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[rows, 1, ...]`, of the rank of latents of that shape."""
    return row.reshape(-1, *(1 for _ in shape[1:]))


def look_up(scheduler: Scheduler, timestep: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """sigma now and next, `[rows, 1, ...]`. The host waits twice per sample: for a `nonzero` and for its result."""
    indices = []
    for one in timestep:
        found = (scheduler.timesteps == one).nonzero()
        indices.append(found[min(1, len(found) - 1)].item())
    index = torch.tensor(indices)
    return wide(scheduler.sigmas[index], shape), wide(scheduler.sigmas[index + 1], shape)


def flow_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor, eta: float) -> Step:
    dt = sigma_next - sigma
    q = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta
    mean = x * (1 + q**2 / (2 * sigma) * dt) + v * (1 + q**2 * (1 - sigma) / (2 * sigma)) * dt
    return Step(mean, q, q * torch.sqrt(-1 * dt), dt)


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, _sigma_max: Tensor, eta: float) -> Step:
    dt = sigma_next - sigma
    std = sigma_next * math.sin(eta * math.pi / 2)
    image, noise = x - sigma * v, x + v * (1 - sigma)
    return Step(image * (1 - sigma_next) + noise * torch.sqrt(sigma_next**2 - std**2), std, std, dt)


def dance_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, _sigma_max: Tensor, eta: float) -> Step:
    dt = sigma_next - sigma
    std = eta * torch.sqrt(-1 * dt)
    image = x - sigma * v
    score = -(x - image * (1 - sigma)) / sigma**2
    return Step(x + dt * v + (-0.5 * eta**2 * score) * dt, std, std, dt)


SAMPLERS = {"flow_sde": flow_sde, "cps": cps, "dance_sde": dance_sde}


def sampled(step: Step, noise: Tensor) -> Tensor:
    return step.mean + step.std * noise


def log_prob(step: Step, prev_sample: Tensor, sampler: str) -> tuple[Tensor, Tensor]:
    """Rows: mean over the latents of the log-density of each element; and `sqrt_dt`."""
    each = -((prev_sample.detach() - step.mean) ** 2)
    if sampler != "cps":
        std = step.std
        each = each / (2 * std**2) - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    sqrt_dt = torch.sqrt(-1 * step.dt)
    return each.mean(dim=tuple(range(1, each.ndim))), sqrt_dt.reshape(sqrt_dt.shape[0])


def dppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    step: Step,
    sqrt_dt: Tensor,
    old_mean: Tensor,
    limit: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and the metrics before they are read.

    The KL's divisor is `std_dev_t * sqrt_dt` for every sampler: right for "sde", sqrt(-dt) twice for the others.
    """
    advantages = advantages.detach()
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    unmasked = -advantages * ratio

    squared = (step.mean - old_mean).pow(2)
    sigma = step.std_dev_t * wide(sqrt_dt, squared.shape)
    each = squared / (2 * sigma.pow(2))
    kl = each.mean(dim=tuple(range(1, each.ndim)))

    high = kl >= limit
    positive = high & (ratio > 1.0) & (advantages > 0)
    negative = high & (ratio < 1.0) & (advantages < 0)
    blocked = positive | negative
    keep = (~blocked).detach()
    zero = torch.zeros((), dtype=unmasked.dtype, device=unmasked.device)
    loss = torch.mean(torch.where(keep, unmasked, zero))

    with torch.no_grad():
        metrics = {
            "ratio_std": ratio.std(unbiased=False),
            "ppo_kl": torch.mean(-log_ratio),
            "approx_kl": (0.5 * log_ratio.pow(2)).mean(),
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "kl_new_old_mean": kl.mean(),
            "kl_new_old_max": kl.max(),
            "kl_mask_fraction": high.float().mean(),
            "pos_rm_fraction": positive.float().mean(),
            "neg_rm_fraction": negative.float().mean(),
            "masked_fraction": blocked.float().mean(),
            "unmasked_fraction": keep.float().mean(),
        }
    return loss, metrics


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The host waits for each."""
    return {name: value.detach().item() for name, value in metrics.items()}
