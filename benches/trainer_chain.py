"""The trainers' training step in plain PyTorch, from the model's output to loss and metrics: the benches' eager peer.

It follows verl-omni at a1139baf with Flow-SDE: the operations on latents and rows, and the waits for the device, in
their order. Which function stands for which part:

    look_up     the first lines of `FlowMatchSDEDiscreteScheduler.sample_previous_step`, and diffusers'
                `index_for_timestep`, which they call for each sample
    flow_sde    the branch `sde_type="sde"` of `sample_previous_step`, up to the mean
    log_prob    the end of `sample_previous_step`: log-prob, its mean over the latents, and `sqrt_dt`
    dppo_loss   `FlowDPPOLoss.compute_loss`
    metrics     its metrics
    read        the thirteen `.item()` at its end

Left out, which makes this side faster: autocast, the division by the accumulation steps, the moves between stacked and
unstacked results (`postprocess_batch_func`), and how each metric is averaged afterwards.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NOISE_LEVEL, STEPS, STEP = 0.7, 10, 4  # sigma goes from 0.82 to 0.75 with SD3.5's schedule


class Schedule(NamedTuple):
    """A schedule, and where the rows of a micro-batch stand in it: all at one step, as trainers have it. float32."""

    sigmas: Tensor  # [steps + 1], from 1 down to 0
    timesteps: Tensor  # [steps], what the pipeline calls a step by
    timestep: Tensor  # [rows], by which the trainers look up the next two
    sigma: Tensor  # [rows]
    sigma_next: Tensor  # [rows]


class Step(NamedTuple):
    """As the trainers hold it: `std_dev_t` and `dt` are `[rows, 1, ...]`, `std_dev_t` is without sqrt(-dt)."""

    mean: Tensor
    std_dev_t: Tensor
    dt: Tensor

    @property
    def std(self) -> Tensor:
        return self.std_dev_t * torch.sqrt(-1 * self.dt)


def schedule_of(rows: int, device: torch.device) -> Schedule:
    """SD3.5's: uniform steps, shifted by 3 towards the noise."""
    uniform = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    sigmas = (3 * uniform / (1 + 2 * uniform)).float().to(device)
    timesteps = 1000 * sigmas[:-1]
    here = (timesteps[STEP], sigmas[STEP], sigmas[STEP + 1])
    return Schedule(sigmas, timesteps, *(one.expand(rows).contiguous() for one in here))


def wide(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`[rows, 1, ...]`, of the rank of latents of that shape."""
    return row.reshape(-1, *(1 for _ in shape[1:]))


def look_up(sigmas: Tensor, timesteps: Tensor, timestep: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """sigma now and next, `[rows, 1, ...]`. The host waits twice per sample: for a `nonzero` and for its result."""
    indices = []
    for one in timestep:
        found = (timesteps == one).nonzero()
        indices.append(found[min(1, len(found) - 1)].item())
    index = torch.tensor(indices)
    return wide(sigmas[index], shape), wide(sigmas[index + 1], shape)


def flow_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor, eta: float) -> Step:
    dt = sigma_next - sigma
    q = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta
    mean = x * (1 + q**2 / (2 * sigma) * dt) + v * (1 + q**2 * (1 - sigma) / (2 * sigma)) * dt
    return Step(mean, q, dt)


def log_prob(step: Step, prev_sample: Tensor) -> tuple[Tensor, Tensor]:
    """Rows: mean over the latents of the log-density of each element; and `sqrt_dt`."""
    std = step.std
    each = -((prev_sample.detach() - step.mean) ** 2) / (2 * std**2)
    each = each - torch.log(std) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss, and what the metrics are made of, each of the rows: log-ratio, ratio, KL, and the masks."""
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

    return loss, (log_ratio, ratio, kl, high, positive, negative, blocked, keep)


@torch.no_grad()
def metrics(of_rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of the second result of `dppo_loss`, on the device."""
    log_ratio, ratio, kl, high, positive, negative, blocked, keep = of_rows
    return {
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


def read(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The host waits for each."""
    return {name: value.detach().item() for name, value in metrics.items()}
