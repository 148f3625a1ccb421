"""The executable specification: every function of the package in plain PyTorch, with autograd's gradients.

Arithmetic is float64 where a latent or a log-prob is float64, else float32. `loss` runs on every device; `step_loss`
and `sde_step` on every device with float64, because the coefficients of a step are computed in float64. Tests compare
the native backends with this module, and this module with numbers that the public trainers computed.

Notation, for a row (one sample at one denoising step) with `N` latent elements: `x` sample, `v` model output, `x'`
next sample, `mu` its mean, `mu°` the old policy's mean, `std` the transition's standard deviation, `A` advantage.

Sources: Flow-DPPO (arXiv 2606.11025); Flow-GRPO (arXiv 2505.05470); GRPO-Guard (arXiv 2510.22319); DanceGRPO (arXiv
2505.07818); coefficients-preserving sampling (arXiv 2509.05952). A trainer's function is named where it defines more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _native, _sde_step, policy_loss
from ._checks import Call, Family, check_loss, check_sde_step, check_step_loss
from ._sde_step import SdeStep, encode_residual, standardised
from ._torch import FAMILY, draw_noise, row_tensor
from .advantages import group_advantages
from .result import METRICS, Layout, PolicyLoss

__all__ = ["SdeStep", "encode_residual", "group_advantages", "loss", "sde_step", "step_loss", "transition"]


class _Inputs:
    """The tensors of a checked call, converted to the dtype of its arithmetic. An absent one is None."""

    def __init__(self, call: Call) -> None:
        wide = (call.fields.get(name) for name in (*_native.LATENTS, "noise", "log_prob", "old_log_prob"))
        is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in wide)
        self.dtype = torch.float64 if is_double else torch.float32
        self.device = next(iter(call.fields.values())).device
        self.call = call

    def differentiable(self, name: str) -> Tensor | None:
        return self.call.fields[name].to(self.dtype) if name in self.call.fields else None

    def constant(self, name: str) -> Tensor | None:
        return self.call.fields[name].detach().to(self.dtype) if name in self.call.fields else None

    def rows(self, name: str) -> Tensor | None:
        """A row vector as a constant tensor of the rows' shape."""
        if name not in self.call.fields:
            return None
        return row_tensor(self.call.fields[name], self.call.row_shape, self.dtype, self.device)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` with trailing dimensions of 1, so that they broadcast to the latents `like`."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - rows.ndim))


# ---- transition: sampler and schedule -> mu = a x + b v, std -------------------------------------------------------


def transition(
    sampler: str, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, sigma_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The affine coefficients `(a, b)` of the mean and the standard deviation of one step.

    Args:
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps".
        sigma, sigma_next: noise levels now and next, in [0, 1], `sigma_next < sigma`; of any one shape and float dtype,
            as is the rest.
        noise_level: the trainers' `eta`, >= 0.
        sigma_max: replaces `sigma` in `1 - sigma` where `sigma == 1` exactly; < 1.

    Returns:
        `a, b, std` of each element. Follows UniRL's `FlowSDEStrategy`, `DanceSDEStrategy` and `CPSSDEStrategy`.
    """
    if sampler == "cps":
        std = sigma_next * torch.sin(noise_level * (math.pi / 2))
        r = torch.sqrt(sigma_next**2 - std**2)
        return (1 - sigma_next) + r, -sigma * (1 - sigma_next) + (1 - sigma) * r, std
    dt = sigma_next - sigma
    if sampler == "flow_sde":
        q = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * noise_level
    else:
        q = noise_level
    a = 1 + q**2 / (2 * sigma) * dt
    b = (1 + q**2 * (1 - sigma) / (2 * sigma)) * dt
    return a, b, q * torch.sqrt(-dt)


class _Step(NamedTuple):
    """The mean of a step, and what it was computed from. All are rows, but velocity and mean are latents."""

    a: Tensor
    b: Tensor
    std: Tensor
    sqrt_dt: Tensor
    velocity: Tensor  # classifier-free guidance included
    mean: Tensor


def _step(inputs: _Inputs) -> _Step:
    """The step of a call. Its coefficients are computed in float64, from values that are rounded to the dtype of the
    arithmetic, and are then rounded to it. So their error is half an ulp, and every backend gets the same; in float32
    the error would be up to 5 times as large, because the terms of CPS's `b` cancel."""
    schedule = ("sigma", "sigma_next", "noise_level", "sigma_max")
    sigma, sigma_next, noise_level, sigma_max = (inputs.rows(name).double() for name in schedule)
    coefficients = transition(inputs.call.settings["sampler"], sigma, sigma_next, noise_level, sigma_max)
    a, b, std, sqrt_dt = (rows.to(inputs.dtype) for rows in (*coefficients, torch.sqrt(sigma - sigma_next)))
    x, velocity = inputs.constant("sample"), inputs.differentiable("model_output")
    uncond = inputs.differentiable("uncond_output")
    if uncond is not None:
        velocity = uncond + _wide(inputs.rows("guidance_scale"), x) * (velocity - uncond)
    return _Step(a, b, std, sqrt_dt, velocity, _wide(a, x) * x + _wide(b, x) * velocity)


# ---- row statistics ------------------------------------------------------------------------------------------------


class _Differences(NamedTuple):
    """Differences of latents, from which the statistics are computed. None if the call does not need one."""

    innovation: Tensor | None  # x' - mu
    drift: Tensor | None  # mu - mu°
    ref_drift: Tensor | None = None  # mu - mu_ref


class _Statistics(NamedTuple):
    """Rows: sums or means over the latents. None if the call does not need one. The comments are for means."""

    scale: float | Tensor = 1.0  # the sum or mean of the constant 1: N or 1
    innovation_sq: Tensor | None = None  # mean (x' - mu)^2
    drift_sq: Tensor | None = None  # mean (mu - mu°)^2
    drift_dot: Tensor | None = None  # mean (mu - mu°)(x' - mu°)
    ref_drift_sq: Tensor | None = None  # mean (mu - mu_ref)^2


def _statistics(
    differences: _Differences, row_shape: tuple[int, ...], latent_reduction: str = "mean", process_group: Any = None
) -> _Statistics:
    """The statistics of the latents. If these are sharded over a process group, one all-reduce adds up the ranks' sums
    and numbers of elements."""
    innovation, drift, ref_drift = differences
    products = {}
    if innovation is not None:
        products["innovation_sq"] = innovation**2
    if drift is not None:
        products["drift_sq"] = drift**2
    if innovation is not None and drift is not None:
        products["drift_dot"] = drift * (innovation + drift)
    if ref_drift is not None:
        products["ref_drift_sq"] = ref_drift**2
    if not products:
        return _Statistics()
    by_row = [product.reshape(*row_shape, -1) for product in products.values()]
    sums = [product.sum(-1) for product in by_row]
    numel = torch.full_like(sums[0], by_row[0].shape[-1])
    if process_group is not None:
        *sums, numel = _SumOverRanks.apply(torch.stack([*sums, numel]), process_group)
    if latent_reduction == "sum":
        return _Statistics(numel, **dict(zip(products, sums, strict=True)))
    return _Statistics(1.0, **{name: total / numel for name, total in zip(products, sums, strict=True)})


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, whose backward passes the gradient on unchanged: the ranks compute one common loss, so their
    gradients must not be summed."""

    @staticmethod
    def forward(ctx, value, process_group):
        total = value.clone()
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _divide_or_zero(dividend: Tensor, divisor: Tensor) -> Tensor:
    """The quotient, but 0 with gradient 0 where the divisor is 0. This defines log-prob and KL of a deterministic step.
    (`loss`, which wants `std > 0`, divides by `torch.div`.)"""
    zero = divisor == 0
    # The divisor is replaced too. Otherwise autograd would multiply the infinite derivative of the quotient by 0: NaN.
    return torch.where(
        zero, torch.zeros_like(dividend), dividend / torch.where(zero, torch.ones_like(divisor), divisor)
    )


Divide = Callable[[Tensor, Tensor], Tensor]


def _log_prob(
    stats: _Statistics, std: Tensor, density: str, divide: Divide = _divide_or_zero, normalizer: bool = True
) -> Tensor:
    """Gaussian log-density, or CPS's own: minus the squared error, no scale and no normaliser."""
    if density == "cps":
        return -stats.innovation_sq
    log_prob = -divide(stats.innovation_sq, 2 * std**2)
    if normalizer:
        log_prob = log_prob - stats.scale * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return torch.where(std == 0, torch.zeros_like(log_prob), log_prob) if divide is _divide_or_zero else log_prob


def _log_ratio(stats: _Statistics, std: Tensor, density: str, divide: Divide) -> Tensor:
    """`log_prob - old_log_prob` from the means, without cancellation: exactly 0 if `mu == mu°`."""
    if density == "cps":
        return 2 * stats.drift_dot - stats.drift_sq
    return divide(stats.drift_dot, std**2) - divide(stats.drift_sq, 2 * std**2)


def _kl_divisor(kind: str, std: Tensor, b: Tensor | None) -> Tensor:
    """The divisor of `mean (mu - mu°)^2` in the KL. With "velocity" it is `b^2`, so that the KL is `mean (v -
    v°)^2`."""
    if kind == "velocity":
        return b**2
    return 2 * std**2 if kind == "gaussian" else torch.full_like(std, 2.0)


# ---- objective: a row's ratio, KL and advantage -> which rows are blocked ------------------------------------------


class _Verdict(NamedTuple):
    """What an objective decides for each row. All are booleans but `blocked_loss`."""

    blocked: Tensor  # the row gives the policy no gradient
    blocked_loss: Tensor  # the loss of a blocked row
    high_kl: Tensor
    above: Tensor  # the ratio is above the clip range
    below: Tensor  # the ratio is below the clip range


def _trust_region(settings: dict[str, Any], ratio: Tensor, kl: Tensor, advantages: Tensor) -> _Verdict:
    """FlowDPPO: blocks rows whose KL is not below the threshold and, with the asymmetric mask, would move further
    away."""
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    threshold = kl.new_full((), settings["kl_mask_threshold"])  # compared in the arithmetic dtype
    high = kl >= threshold if settings["keep_nan_kl"] else ~(kl < threshold)
    away = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
    blocked = {"asymmetric": high & away, "symmetric": high, "none": nowhere}[settings["mask"]]
    return _Verdict(blocked, torch.zeros_like(ratio), high, nowhere, nowhere)


def _clip(settings: dict[str, Any], ratio: Tensor, advantages: Tensor) -> _Verdict:
    """FlowGRPO and GRPOGuard: the larger of the surrogates `-A ratio` and `-A clip(ratio)`."""
    low, high = settings["clip_low"], settings["clip_high"]
    clipped = ratio.clamp(1 - low, 1 + high)
    # The clipped surrogate is the larger one if and only if the ratio left the range on the side that A favours.
    blocked = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
    nowhere = torch.zeros_like(blocked)
    return _Verdict(blocked, -advantages * clipped, nowhere, ratio - 1 > high, 1 - ratio > low)


def _block_gradient(latents: Tensor | None, rows: Tensor) -> None:
    """Makes the gradient of these rows of `latents` exactly 0, also where it would be 0 times infinity."""

    def without(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else torch.where(_wide(rows, grad), torch.zeros_like(grad), grad)

    if latents is not None and latents.requires_grad:
        latents.register_hook(without)


def _policy_loss(
    inputs: _Inputs,
    differences: _Differences,
    *,
    std: Tensor | None,
    sqrt_dt: Tensor | None,
    b: Tensor | None = None,
    divide: Divide,
) -> PolicyLoss:
    """The result of a call, from its differences of latents. `b` is needed for `kl_space="velocity"`."""
    call, settings = inputs.call, inputs.call.settings
    stats = _statistics(differences, call.row_shape, settings["latent_reduction"], call.process_group)
    log_prob, old_log_prob = inputs.differentiable("log_prob"), inputs.rows("old_log_prob")
    if log_prob is None:
        log_prob = _log_prob(stats, std, settings["density"], divide)
    log_ratio = _log_ratio(stats, std, settings["density"], divide) if old_log_prob is None else log_prob - old_log_prob

    # The ratio is `exp(exponent)`.
    exponent, row_scale = log_ratio, 1.0
    if settings["objective"] == "grpo_guard":
        # verl-omni's `GRPOGuardLoss.compute_loss`, whose `std_dev_t` is `std / sqrt_dt`.
        if settings["per_row_scale"]:
            guard_scale, row_scale = std, 1 / sqrt_dt**2
        else:
            guard_scale, row_scale = sqrt_dt.mean() * (std / sqrt_dt).mean(), 1 / sqrt_dt.mean() ** 2
        exponent = (log_ratio + divide(stats.drift_sq, 2 * guard_scale**2)) * guard_scale
    ratio = torch.exp(exponent).detach()

    kl = None
    if stats.drift_sq is not None and std is not None:
        kl = divide(stats.drift_sq, _kl_divisor(settings["kl_divisor"], std, b)).detach()

    advantages = inputs.rows("advantages").clamp(-settings["adv_clip_max"], settings["adv_clip_max"])
    if settings["objective"] == "flow_dppo":
        verdict = _trust_region(settings, ratio, kl, advantages)
    else:
        verdict = _clip(settings, ratio, advantages)
    blocked = verdict.blocked

    # The gradient of a blocked row is exactly 0, even if its ratio or a latent is infinite. Its reference penalty, and
    # so the gradient of the reference drift, stays.
    _block_gradient(differences.innovation, blocked)
    _block_gradient(differences.drift, blocked)
    exponent = torch.where(blocked, torch.zeros_like(exponent), exponent)
    row_loss = torch.where(blocked, verdict.blocked_loss, -advantages * torch.exp(exponent)) * row_scale
    if "weights" in call.fields:
        row_loss = row_loss * inputs.rows("weights")
    loss = _reduced(row_loss, settings["reduction"], ~blocked)
    ref_kl = None
    if stats.ref_drift_sq is not None:
        ref_std = inputs.rows("ref_std") if "ref_std" in call.fields else std
        ref_kl = divide(stats.ref_drift_sq, 2 * ref_std**2)
        everywhere = torch.ones_like(blocked)
        loss = loss + settings["ref_kl_weight"] * _reduced(ref_kl, settings["reduction"], everywhere)

    metrics = _metrics(log_ratio.detach(), ratio, kl, row_loss.detach(), advantages, verdict, ref_kl)
    rows = [log_prob, log_ratio, ratio, torch.zeros_like(ratio) if kl is None else kl, ~blocked]
    numbers = [row.detach().to(ratio.dtype).reshape(-1) for row in (*rows, *(metrics[name] for name in METRICS))]
    return PolicyLoss(loss, torch.cat(numbers), Layout(tuple(ratio.shape), kl is not None, ref_kl is not None))


def _reduced(rows: Tensor, reduction: str, kept: Tensor) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        return rows.mean()
    return torch.where(kept, rows, torch.zeros_like(rows)).sum() / kept.sum().clamp(min=1)


def _metrics(
    log_ratio: Tensor,
    ratio: Tensor,
    kl: Tensor | None,
    row_loss: Tensor,
    advantages: Tensor,
    verdict: _Verdict,
    ref_kl: Tensor | None,
) -> dict[str, Tensor]:
    """The value of every name in `METRICS`, as the trainers define them; 0 where there is no KL."""
    absent = torch.zeros((), dtype=ratio.dtype, device=ratio.device)

    def share(rows: Tensor) -> Tensor:
        return rows.to(ratio.dtype).mean()

    numbers = [log_ratio, ratio, row_loss] + ([] if kl is None else [kl])
    blocked, above, below = verdict.blocked, verdict.above, verdict.below
    return {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.reshape(-1).std() if ratio.numel() > 1 else absent,
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "ppo_kl": (-log_ratio).mean(),
        "kl_new_old_mean": absent if kl is None else kl.mean(),
        "kl_new_old_max": absent if kl is None else kl.max(),
        "kl_mask_fraction": share(verdict.high_kl),
        "pos_rm_fraction": share(blocked & (advantages > 0)),
        "neg_rm_fraction": share(blocked & (advantages < 0)),
        "masked_fraction": share(blocked),
        "unmasked_fraction": share(~blocked),
        "clip_fraction": share(above | below),
        "clipfrac_gt_one": share(above),
        "clipfrac_lt_one": share(below),
        "nonfinite_fraction": share(~torch.isfinite(torch.stack(numbers)).all(0)),
        "kl_loss": absent if ref_kl is None else ref_kl.mean(),
    }


# ---- checked calls -------------------------------------------------------------------------------------------------


def checked_loss(call: Call) -> PolicyLoss:
    inputs = _Inputs(call)
    mean, next_sample = inputs.differentiable("prev_sample_mean"), inputs.constant("prev_sample")
    old_mean, ref_mean = inputs.constant("old_prev_sample_mean"), inputs.constant("ref_prev_sample_mean")
    differences = _Differences(
        None if next_sample is None else next_sample - mean,
        None if old_mean is None else mean - old_mean,
        None if ref_mean is None else mean - ref_mean,
    )
    return _policy_loss(inputs, differences, std=inputs.rows("std"), sqrt_dt=inputs.rows("sqrt_dt"), divide=torch.div)


def checked_step_loss(call: Call) -> PolicyLoss:
    inputs = _Inputs(call)
    step = _step(inputs)
    innovation = inputs.constant("prev_sample") - step.mean
    b, std = _wide(step.b, innovation), _wide(step.std, innovation)

    def drift(policy: str) -> Tensor | None:
        """`mu` minus the mean of another policy, "old" or "ref", which is given in one of three forms."""
        mean, output, residual = (
            inputs.constant(f"{policy}_{form}") for form in ("prev_sample_mean", "model_output", "residual")
        )
        if mean is not None:
            return step.mean - mean
        if output is not None:  # a difference of two means would lose digits
            return b * (step.velocity - output)
        if residual is None:
            return None
        # mu° = x' - std e. If e was encoded from the same mu, the drift is its rounding error times std.
        drifted = -std * (standardised(innovation, step.std) - residual)
        return torch.where(std == 0, -innovation, drifted)

    differences = _Differences(innovation, drift("old"), drift("ref"))
    return _policy_loss(inputs, differences, std=step.std, sqrt_dt=step.sqrt_dt, b=step.b, divide=_divide_or_zero)


def checked_sde_step(call: Call) -> SdeStep:
    inputs, settings = _Inputs(call), call.settings
    step, dtype = _step(inputs), call.fields["sample"].dtype
    mean, std, next_sample = step.mean, step.std, call.fields.get("prev_sample")
    if next_sample is None:
        noise = inputs.constant("noise")
        if noise is None:
            noise = draw_noise(call.fields["sample"], inputs.dtype, call.generator)
        next_sample = mean.detach() + _wide(std, mean) * noise
    elif next_sample.dtype != dtype:
        next_sample = next_sample.to(inputs.dtype)
    stored = next_sample.detach().to(dtype)
    innovation = stored.to(inputs.dtype) - mean
    density = "cps" if settings["sampler"] == "cps" else "gaussian"
    stats = _statistics(_Differences(innovation, None), call.row_shape)
    log_prob = _log_prob(stats, std, density, normalizer=settings["log_prob_normalizer"])
    residual = None
    if settings["residual_dtype"] is not None:
        residual = standardised(innovation.detach(), std).to(settings["residual_dtype"])
    return SdeStep(stored, log_prob, mean, std, residual)


# ---- the public functions ------------------------------------------------------------------------------------------

P = ParamSpec("P")
R = TypeVar("R")


def _like(
    public: Callable[P, R], check: Callable[[str, Family, dict[str, Any]], Call], run: Callable[[Call], R]
) -> Callable[P, R]:
    """The function that checks its arguments as `public` does and then calls `run`; it has the signature of
    `public`."""
    parameters, where = signature(public), f"flowdppo_ops.{public.__name__}"

    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        return run(check(where, FAMILY, bound.arguments))

    function.__name__ = function.__qualname__ = public.__name__
    function.__doc__ = f"`{where}` in plain PyTorch: same arguments, same results, same errors."
    function.__signature__ = parameters
    return function


loss = _like(policy_loss.loss, check_loss, checked_loss)
step_loss = _like(policy_loss.step_loss, check_step_loss, checked_step_loss)
sde_step = _like(_sde_step.sde_step, check_sde_step, checked_sde_step)
