"""The doctor's tests: a backend's float32 results and gradients against the same formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Run = Callable[[], dict[str, float]]

# Of an error relative to the largest value. Rounding to float32 gives 1e-7 to 1e-6 here; a row that is wrongly blocked,
# or a gradient of the wrong sign, gives 1e-1 or more.
LIMIT = 1e-5

ROWS, LATENT = 6, (3, 5, 17)  # the elements of a row are no multiple of a vector width
THRESHOLD = 1e-3


def of_torch(device: str) -> dict[str, float]:
    """The largest error of the results and gradients of `loss`, `step_loss` and `sde_step` on a device."""
    import torch

    import flowdppo_ops
    from flowdppo_ops import reference

    generator = torch.Generator().manual_seed(0)
    sample, output, noise, drift = torch.randn(4, ROWS, *LATENT, generator=generator)
    row = torch.arange(ROWS)
    # KL below and above the threshold, ratio below and above 1, advantages of both signs.
    drift = drift * torch.where(row % 2 == 0, 0.03, 0.3)[:, None, None, None]
    advantages = torch.tensor([1.0, -1.0, 2.0, 1.0, -2.0, -1.0])
    tensors = (sample, sample - 0.1 * output + 0.2 * noise, output + drift, output, advantages)
    schedule = {"sigma": 0.8 - 0.1 * row, "sigma_next": 0.7 - 0.1 * row, "noise_level": torch.tensor(0.7)}
    objective = flowdppo_ops.FlowDPPO(kl_mask_threshold=THRESHOLD)

    def run(api: Any, dtype: torch.dtype, where: str) -> dict[str, list[torch.Tensor]]:
        x, x_next, new, old, a = (one.float().to(where, dtype) for one in tensors)
        steps = {name: one.float().to(where, dtype) for name, one in schedule.items()}
        new.requires_grad_()
        losses = {
            "loss": api.loss(new, old, a, std=0.75, prev_sample=x_next, objective=objective),
            "step_loss": api.step_loss(new, x, x_next, a, **steps, old_model_output=old, objective=objective),
        }
        results = {
            name: [one.loss, one.log_prob, one.kl, one.keep, *torch.autograd.grad(one.loss, new)]
            for name, one in losses.items()
        }
        step = api.sde_step(new, x, prev_sample=x_next, **steps)
        gradient = torch.autograd.grad(step.log_prob.sum() + step.prev_sample_mean.square().sum(), new)
        return results | {"sde_step": [step.log_prob, step.prev_sample_mean, step.std, *gradient]}

    ours = run(flowdppo_ops, torch.float32, device)
    truth = run(reference, torch.float64, "cpu")
    return {name: max(map(_error, ours[name], truth[name])) for name in truth}


def of_numpy() -> dict[str, float]:
    """The largest error of `flowdppo_ops.numpy.loss` and its gradient, without PyTorch: the formulas are written
    out."""
    from flowdppo_ops import FlowDPPO
    from flowdppo_ops import numpy as ours

    std, advantages = 0.8, np.array([1.0, -1.0, 2.0, 1.0, -2.0, -1.0])
    old, noise, drift = np.random.default_rng(0).standard_normal((3, ROWS, math.prod(LATENT)))
    mean = old + drift * np.where(np.arange(ROWS) % 2 == 0, 0.02, 0.2)[:, None]
    arrays = [array.astype(np.float32) for array in (mean, old, advantages, old + std * noise)]
    objective = FlowDPPO(kl_mask_threshold=THRESHOLD)
    loss, gradient = ours.loss(*arrays[:3], std=std, prev_sample=arrays[3], objective=objective)

    mean, old, advantages, prev_sample = (array.astype(np.float64) for array in arrays)
    std = float(np.float32(std))
    log_ratio = (((prev_sample - old) ** 2 - (prev_sample - mean) ** 2) / (2 * std**2)).mean(1)
    kl, ratio = ((mean - old) ** 2 / (2 * std**2)).mean(1), np.exp(log_ratio)
    blocked = (kl >= THRESHOLD) & (np.sign(log_ratio) == np.sign(advantages))
    assert 0 < blocked.sum() < ROWS
    row_loss = np.where(blocked, 0.0, -advantages * ratio)
    truth = (row_loss / mean.size)[:, None] * (prev_sample - mean) / std**2
    return {"numpy.loss": max(_error(loss, row_loss.mean()), _error(gradient, truth))}


def _error(got, want) -> float:
    """The largest difference relative to the largest value; NaN, which fails the test, if a difference is NaN."""
    got, want = (np.asarray(one.detach().cpu() if hasattr(one, "detach") else one, np.float64) for one in (got, want))
    difference = np.abs(got - want).max()
    return math.nan if np.isnan(difference) else float(difference / np.abs(want).max())
