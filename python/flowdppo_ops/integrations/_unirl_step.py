"""UniRL's `denoise` in one pass forward and one backward."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._sde_step import sde_step
from .._torch import Generator
from ._schedule import draw

SAMPLERS = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}  # `canonical_name` of a strategy -> `sampler`
_SMALLEST_SCORED_ETA = 1e-7


def denoise(
    self: Any,
    noise_pred: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 1.0,
    prev_sample: Tensor | None = None,
    generator: Generator = None,
    sigma_max: float | Tensor = 0.99,
    step_index: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor] | str:
    """Replaces `denoise` of UniRL's strategies: draws the next latent, or scores `prev_sample`.

    Args:
        noise_pred, sample, prev_sample: latents `[B, *latent]`.
        sigma, sigma_next: 0-dim or `[B]`, with or without trailing ones.
        eta: the noise level. Below 1e-7 the step is not scored.
        generator: one, or a list of one per sample; None takes PyTorch's default. It draws the noise that UniRL draws.
            UniRL has this parameter since September 2026.
        sigma_max: as in `flowdppo_ops.step_loss`.
        step_index: not read, as in UniRL's strategies.

    Returns:
        `(next latent, log_prob or None, mean)` in float32. A next latent that is scored is rounded to the dtype of
        `sample`. Or a string, the reason why UniRL's own method must run.
    """
    if reason := _unserved(noise_pred, sample, prev_sample, sigma, sigma_next, sigma_max, eta):
        return reason
    scored = not eta < _SMALLEST_SCORED_ETA
    if not scored or sample.dtype == torch.float64:
        sample = sample.float()
    step = sde_step(
        _at_most_float(noise_pred),
        sample,
        sigma=_row_vector(sigma, sample),
        sigma_next=_row_vector(sigma_next, sample),
        noise_level=float(eta),
        sampler=SAMPLERS[self.canonical_name],
        sigma_max=_row_vector(sigma_max, sample),
        prev_sample=None if prev_sample is None else _at_most_float(prev_sample),
        noise=None if prev_sample is not None or generator is None else draw(sample, generator),
    )
    return step.prev_sample.float(), step.log_prob if scored else None, step.prev_sample_mean


def _at_most_float(latents: Tensor) -> Tensor:
    """Float64 latents as float32, because UniRL computes a step in float32. `sde_step` widens half precision itself."""
    return latents.float() if latents.dtype == torch.float64 else latents


def _row_vector(value: float | Tensor, latents: Tensor) -> float | Tensor:
    """`value` on the device of the latents; a tensor gets trailing dimensions of 1 up to their rank, as in UniRL."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        value = value.reshape(())
    elif value.ndim < latents.ndim:
        value = value.reshape(*value.shape, *(1,) * (latents.ndim - value.ndim))
    return value.to(latents.device, non_blocking=True)


def _unserved(
    noise_pred: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float | Tensor,
    eta: float,
) -> str:
    """Why the fused step cannot take the call; empty if it can."""
    others = [noise_pred] if prev_sample is None else [noise_pred, prev_sample]
    if sample.device.type not in ("cpu", "cuda"):
        return f"latents on {sample.device.type}"
    if sample.ndim < 2 or not sample.numel() or any(t.shape != sample.shape for t in others):
        return f"latents of shape {', '.join(str(tuple(t.shape)) for t in (sample, *others))}"
    if any(t.device != sample.device for t in others):
        return "latents on different devices"
    if not all(t.is_floating_point() for t in (sample, *others)):
        return "latents that are no floating-point numbers"
    if not isinstance(eta, Real) or (isinstance(sigma_max, Tensor) and sigma_max.numel() != 1):
        return "eta or sigma_max other than one number"
    for value in (sigma, sigma_next):
        rows = value.shape[:1].numel()  # 1 for 0-dim
        if rows not in (1, len(sample)) or value.numel() != rows or value.ndim > sample.ndim:
            return f"a sigma of shape {tuple(value.shape)} for latents of shape {tuple(sample.shape)}"
    if torch.is_grad_enabled():
        if sample.requires_grad:
            return "a gradient for the sample"
        if prev_sample is None and noise_pred.requires_grad:
            return "a gradient for the latent that is drawn"
    return ""
