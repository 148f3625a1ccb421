"""`sde_step`, one fused step of a sampler, which draws or scores the next latent; and `encode_residual`.

The module's name begins with `_`, because importing a submodule `sde_step` would replace the function of that name in
the package.
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
    """The stochastic denoising step of every row. "float32" stands for float64 where a latent is float64.

    Attributes:
        prev_sample: latents in the dtype of `sample`; the next latent.
        log_prob: rows, float32; nats per latent element.
        prev_sample_mean: latents, float32; the mean of the transition.
        std: rows, float32; the standard deviation of the transition, which contains sqrt(-dt).
        residual: latents in `residual_dtype`; `(prev_sample - prev_sample_mean) / std`. None if not asked for.
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

    Latents are float32, bfloat16 or float16, each with its own dtype and any strides; arithmetic is float32. If a
    latent is float64, arithmetic is float64, on the CPU only. Row vectors are as in `loss`; `row_dims` says what the
    rows are.

    Args:
        model_output, sample: latents; the velocity `v` that the model predicts, and its sample `x`.
        sigma, sigma_next, noise_level, sampler, sigma_max, uncond_output, guidance_scale: as in `step_loss`. Tensors
            among them are not read on the host.
        prev_sample: latents; the next latent, which is then scored (replay). None draws one.
        noise: latents; the standard normal noise to use. None draws it.
        generator: a `torch.Generator`, or a list of one per sample (first dimension), which draws the noise; None takes
            the default generator of the device. A generator draws on its own device: with a CPU generator the noise is
            the same for latents on a CPU and on a GPU. With a list a sample's noise does not depend on the batch.
        log_prob_normalizer: False leaves out the term `-log(std) - log(2 pi)/2` of `log_prob` (verl-omni's
            `include_logprob_normalizer`). The log-prob of "cps" has no such term.
        residual_dtype: dtype of the standardised residual; float16 suits `old_residual` of `step_loss`. None returns
            no residual.
        row_dims: how many leading dimensions are rows: 1 for `[B, ...]`, 2 for a trajectory's `[B, S, ...]`.

    A next latent, drawn or given, is rounded to the dtype of `sample` before it is scored. So a replay of the stored
    latent gives the same log-prob. Where the step is deterministic (`std == 0`: `noise_level` 0, or the last step of
    "cps") the residual is 0, and a Gaussian log-prob is 0 with gradient 0: the ratio of two policies there is 1.

    Returns:
        `SdeStep`. `log_prob` and `prev_sample_mean` are differentiable in `model_output` and `uncond_output`, once. The
        others are constants, `prev_sample` too.

    Raises:
        ValueError: shapes, different devices, an unknown option, `noise` or `generator` together with `prev_sample`.
        TypeError: not a tensor, a dtype that is not supported.
        NotImplementedError: forward-mode or second derivatives, `torch.func` transforms.
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
    """`innovation / std`, as a product with 1/std, which is computed in float64 and rounded so that every backend gives
    the same bits. It is 0 where `std` is 0, even if the latent overflowed when it was stored."""
    per_std = std.double().reciprocal().to(std.dtype)
    per_std = per_std.reshape(per_std.shape + (1,) * (innovation.ndim - per_std.ndim))
    return torch.where(per_std.isinf(), torch.zeros_like(innovation), innovation * per_std.nan_to_num(posinf=0.0))


def encode_residual(
    prev_sample: Tensor, mean: Tensor, std: float | Tensor, dtype: torch.dtype = torch.float16
) -> Tensor:
    """The old policy's mean as the residual `(x' - mu) / std`, which `step_loss` takes as `old_residual`.

    A float16 residual takes two bytes per latent element, and its rounding adds 2e-8 to the KL at every std. Rounding
    the mean to bfloat16 adds 5e-4 at std 0.05, far above a threshold of 1e-5. `sde_step(residual_dtype=...)` returns
    the same residual without another pass over the latents.

    Args:
        prev_sample: latents; the next latent `x'`, as it is stored.
        mean: latents; its mean `mu` under the old policy. Pass it in float32: the residual keeps its rounding error.
        std: a number, or a tensor that broadcasts to the latents from the left, dimension by dimension, with or without
            trailing ones: `[B]`, `[1, S]` or `[B, 1, 1, 1]`. Standard deviation of the transition, with sqrt(-dt) in
            it.
        dtype: float16, or any other dtype of latents.

    Returns:
        Latents in `dtype`, without gradient; 0 where `std` is 0, which `step_loss` takes for `mu = x'`. PyTorch's own
        operators compute it, on every device that has float64, in float32 (float64 if a latent is float64), with
        temporaries of the latents' size.

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
