"""`sde_step`: one step of a sampler, drawn or scored, fused; and `encode_residual`.

Underscored, since a submodule `sde_step` would take the function's place in the package when it is imported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._calls import PublicFunction
from ._checks import Checks, check_sde_step
from ._native import SdeStepMemo
from ._operators import sde_step as operator
from ._torch import FAMILY, Generator, draw_noise, row_tensor
from ._values import check_step_values

__all__ = ["SdeStep", "encode_residual", "sde_step"]


class SdeStep(NamedTuple):
    """One stochastic denoising step, or one for each row.

    prev_sample: latents in the dtype of `sample`; the next latent. log_prob: rows, float32 (float64 for float64
    latents); nats per latent element. prev_sample_mean: latents, float32 (float64). std: rows, float32 (float64); the
    standard deviation of the transition, sqrt(-dt) included. residual: latents in `residual_dtype`, `(prev_sample -
    prev_sample_mean) / std`, or None.
    """

    prev_sample: Tensor
    log_prob: Tensor
    prev_sample_mean: Tensor
    std: Tensor
    residual: Tensor | None


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
    generator: Generator = None,
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
            CPU. A list has one for each sample, the first dimension, whose noise then does not depend on the batch.
            None takes PyTorch's own for the device.
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
    arguments = (
        model_output, sample, sigma, sigma_next, noise_level, sampler, sigma_max, uncond_output, guidance_scale,
        prev_sample, noise, generator, log_prob_normalizer, residual_dtype, row_dims,
    )  # fmt: skip
    forward = None if is_dynamo_compiling() else _sde_step.forward(arguments, draw_noise)
    return SdeStep(*(_sde_step.checked(arguments) if forward is None else operator.results(*forward)))


_sde_step = PublicFunction(sde_step, check_sde_step, SdeStepMemo, operator.run_checked, check_step_values)


def standardised(innovation: Tensor, std: Tensor) -> Tensor:
    """The innovation times 1/std, formed in float64 and rounded: the same bits everywhere. 0 where std is 0, also for a
    latent that has overflowed as it was stored."""
    per_std = std.double().reciprocal().to(std.dtype)
    per_std = per_std.reshape(per_std.shape + (1,) * (innovation.ndim - per_std.ndim))
    return torch.where(per_std.isinf(), torch.zeros_like(innovation), innovation * per_std.nan_to_num(posinf=0.0))


def encode_residual(
    prev_sample: Tensor, mean: Tensor, std: float | Tensor, dtype: torch.dtype = torch.float16
) -> Tensor:
    """The old policy in its compact form, `(x' - mu) / std`, for the `old_residual` of `step_loss`.

    Two bytes per latent element, whose rounding alone makes a KL of 2e-8 at every std; that of a bfloat16 mean makes
    5e-4 at std 0.05, and trips a threshold of 1e-5. `sde_step(residual_dtype=...)` gives the same without another pass.

    Args:
        prev_sample: latents; the next latent as stored, `x'`.
        mean: latents; its mean under the old policy, `mu`, better in float32: what it was rounded to is encoded.
        std: a number, or a tensor that broadcasts to the latents from the left, dimension by dimension, with or without
            trailing ones: `[B]`, `[1, S]` or `[B, 1, 1, 1]`. Standard deviation of the transition, sqrt(-dt) included.
        dtype: float16, or any other floating dtype of latents.

    Returns:
        Latents in `dtype`, without gradient; 0 where `std` is 0 (there `step_loss` takes `mu° = x'`). Plain PyTorch on
        every device, in float32 (float64 for float64 latents), with temporaries of the latents' size.

    Raises:
        ValueError, TypeError: as `loss`.
    """
    where = "flowdppo_ops.encode_residual"
    checks = Checks(where, FAMILY, {"prev_sample": prev_sample, "mean": mean, "std": std})
    checks.array("prev_sample")
    checks.array_like("mean", "prev_sample")
    if dtype not in FAMILY.dtypes:
        raise TypeError(f"{where}: dtype is {dtype}, wanted one of {', '.join(FAMILY.dtypes.values())}")
    shape = tuple(prev_sample.shape)
    row_shape = shape[: getattr(std, "ndim", 0)]
    checks.require("std", "the standard deviation of the transition")
    std = checks.row_vector("std", "prev_sample", row_shape, len(shape))
    wide = torch.float64 if torch.float64 in (prev_sample.dtype, mean.dtype) else torch.float32
    rows = row_tensor(std, row_shape, wide, prev_sample.device)
    return standardised(prev_sample.detach().to(wide) - mean.detach(), rows).to(dtype)
