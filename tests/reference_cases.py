"""Inputs for the tests of the specification, in float64."""

from __future__ import annotations

import torch

from flowdppo_ops import reference

SAMPLERS = ("flow_sde", "dance_sde", "cps")
ROWS, LATENT = (4, 3), (5, 2)
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def schedule() -> dict[str, torch.Tensor]:
    """Per step, as trainers hold it; the first step starts at sigma 1 exactly."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=F64)
    return {"sigma": sigmas[None, :3], "sigma_next": sigmas[None, 1:], "noise_level": 0.7}


def wide(row: torch.Tensor) -> torch.Tensor:
    return row.expand(ROWS)[..., None, None]


def rollout(
    sampler: str, steps: dict[str, torch.Tensor] | None = None, latent: tuple[int, ...] = LATENT
) -> dict[str, torch.Tensor]:
    """Latents of one rollout: old and new model outputs, samples, and what the old policy drew."""
    x, old_v, noise, change = (normal(*ROWS, *latent, seed=seed) for seed in (1, 2, 3, 4))
    steps = schedule() if steps is None else steps
    old = reference.sde_step(old_v, x, **steps, sampler=sampler, noise=noise, row_dims=2, residual_dtype=F64)
    return {"x": x, "old_v": old_v, "v": old_v + 0.1 * change, "old": old}
