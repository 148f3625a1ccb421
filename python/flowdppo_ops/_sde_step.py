"""`sde_step`: one step of a sampler, drawn or scored, fused; and `encode_residual`.

Underscored, since a submodule `sde_step` would take the function's place in the package when it is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._check import check_step_values
from ._library.sde_step import sde_step as _sde_step
from ._step_args import check_sde_step
from ._switches import check_backend, wants_checks, wants_reference
from ._torch import FAMILY, draw_noise
from .reference import SdeStep, encode_residual

__all__ = ["SdeStep", "encode_residual", "sde_step"]


def sde_step(
    model_output: Tensor,
    sample: Tensor,
    *,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float | Tensor = 0.7,
    sampler: str = "flow_sde",
    sigma_max: float | Tensor = 0.99,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    log_prob_normalizer: bool = True,
    residual_dtype: torch.dtype | None = None,
    row_dims: int = 1,
) -> SdeStep:
    """One step of a sampler, in one pass: draws the next latent, or scores a given one.

    Latents are float32, bfloat16 or float16, mixed freely, with any strides; arithmetic is float32. Float64 latents are
    computed in float64, on the CPU. Row vectors are as in `loss`, for the rows that `row_dims` makes.

    Args:
        model_output, sample: latents; the velocity `v` and the sample `x`.
        sigma, sigma_next, noise_level, sampler, sigma_max, uncond_output, guidance_scale: as in `step_loss`. Nothing of
            them is read on the host.
        prev_sample: latents; score this next latent instead of drawing one (replay).
        noise: standard normal latents to use instead of drawing them.
        generator: draws the noise, on its own device: a CPU generator gives latents on a GPU the noise it gives on a
            CPU. None takes PyTorch's own for the device.
        log_prob_normalizer: False leaves out `log std + log(2 pi)/2` (verl-omni's `include_logprob_normalizer`); no
            effect for "cps", which has none.
        residual_dtype: also return the standardised residual in this dtype, float16 for `old_residual` of `step_loss`.
        row_dims: how many leading dimensions are rows: 1 for `[B, ...]`, 2 for a trajectory's `[B, S, ...]`.

    The next latent is rounded to the dtype of `sample` before it is scored, drawn or given, so that a replay of the
    stored one gives the same log-prob. Where the step is deterministic (`std == 0`: the last step of "cps", or
    `noise_level` 0) the residual is 0 and a Gaussian log-prob is 0 with gradient 0: nothing was random, so the ratio of
    two policies there is 1.

    Returns:
        `SdeStep`, differentiable in `model_output` and `uncond_output` through `log_prob` and `prev_sample_mean`
        together, once; `prev_sample` is a constant.

    Raises:
        ValueError: shapes, different devices, an unknown option, `noise` or `generator` together with `prev_sample`.
        TypeError: not a tensor, a dtype that is not supported.
        RuntimeError: a device without a backend; `flowdppo_ops.reference.sde_step` runs there.

    Environment: as `loss`; `FLOWDPPO_OPS_CHECK=1` checks the ranges that `step_loss` names.

    Source: UniRL `denoise`; verl-omni `FlowMatchSDEDiscreteScheduler.sample_previous_step`; flow_grpo
    `sde_step_with_logprob`. `flowdppo_ops.reference` states every formula.
    """
    if wants_reference():
        return reference.sde_step(**locals())
    where = "flowdppo_ops.sde_step"
    call = check_sde_step(
        where,
        FAMILY,
        model_output=model_output,
        sample=sample,
        sigma=sigma,
        sigma_next=sigma_next,
        noise_level=noise_level,
        sampler=sampler,
        sigma_max=sigma_max,
        uncond_output=uncond_output,
        guidance_scale=guidance_scale,
        prev_sample=prev_sample,
        noise=noise,
        generator=generator,
        log_prob_normalizer=log_prob_normalizer,
        residual_dtype=residual_dtype,
        row_dims=row_dims,
    )
    check_backend(where, sample.device)
    if wants_checks():
        check_step_values(where, call)
    if call.prev_sample is None and call.noise is None:  # here, so that the operator gives the same for the same inputs
        call = call._replace(noise=draw_noise(sample, torch.float64 if call.double else torch.float32, generator))
    return SdeStep(*_sde_step(call))
