"""The executable specification: every function of the package in plain PyTorch.

Any float dtype and any device (one with float64, for the coefficients of a step); half precision is widened to float32,
float64 stays. Gradients are autograd's. The native backends are tested against this module, and this module against
numbers recorded from the public trainers.

Notation, for a row (one sample at one denoising step) with `N` latent elements: `x` sample, `v` model output, `x'`
next sample, `mu` its mean, `mu°` the old policy's mean, `std` the transition's standard deviation, `A` advantage.

Sources: Flow-DPPO (arXiv 2606.11025); Flow-GRPO (arXiv 2505.05470); GRPO-Guard (arXiv 2510.22319); DanceGRPO (arXiv
2505.07818); coefficients-preserving sampling (arXiv 2509.05952). The trainers' functions are named where they decide.
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
    """The tensors of a checked call in its arithmetic dtype: float64 where a latent or a log-prob is, else float32."""

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
        """A row vector, of the rows' shape."""
        if name not in self.call.fields:
            return None
        return row_tensor(self.call.fields[name], self.call.row_shape, self.dtype, self.device)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """Rows against latents."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - rows.ndim))


# ---- transition: sampler and schedule -> mu = a x + b v, std -------------------------------------------------------


def transition(
    sampler: str, sigma: Tensor, sigma_next: Tensor, noise_level: Tensor, sigma_max: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The affine coefficients `(a, b)` of the mean and the standard deviation of one step.

    Args:
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps".
        sigma, sigma_next: noise levels now and next, in [0, 1], `sigma_next < sigma`.
        noise_level: the trainers' `eta`.
        sigma_max: stands in for `sigma` in `1 - sigma` where `sigma == 1` exactly.

    Returns:
        `a, b, std`, elementwise. Follows UniRL's `FlowSDEStrategy`, `DanceSDEStrategy` and `CPSSDEStrategy`.
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
    """A step's mean, and what it is made of; rows but for the two latents."""

    a: Tensor
    b: Tensor
    std: Tensor
    sqrt_dt: Tensor
    velocity: Tensor  # classifier-free guidance included
    mean: Tensor


def _step(given: _Inputs) -> _Step:
    """The coefficients are formed in float64 from values rounded to the arithmetic dtype, then rounded to it: half an
    ulp, where float32 all the way is up to 5 times as far (the terms of CPS's `b` cancel), and every backend comes to
    the same."""
    schedule = ("sigma", "sigma_next", "noise_level", "sigma_max")
    sigma, sigma_next, noise_level, sigma_max = (given.rows(name).double() for name in schedule)
    formed = transition(given.call.settings["sampler"], sigma, sigma_next, noise_level, sigma_max)
    a, b, std, sqrt_dt = (rows.to(given.dtype) for rows in (*formed, torch.sqrt(sigma - sigma_next)))
    x, velocity = given.constant("sample"), given.differentiable("model_output")
    uncond = given.differentiable("uncond_output")
    if uncond is not None:
        velocity = uncond + _wide(given.rows("guidance_scale"), x) * (velocity - uncond)
    return _Step(a, b, std, sqrt_dt, velocity, _wide(a, x) * x + _wide(b, x) * velocity)


# ---- row statistics ------------------------------------------------------------------------------------------------


class _Differences(NamedTuple):
    """The latents that the statistics are taken of; None where nothing asks for it."""

    innovation: Tensor | None  # x' - mu
    drift: Tensor | None  # mu - mu°
    ref_drift: Tensor | None = None  # mu - mu_ref


class _Statistics(NamedTuple):
    """Each reduced over the latents of a row; None where nothing asks for it."""

    scale: float | Tensor = 1.0  # the weight of a constant per element: 1, or N with latent_reduction="sum"
    innovation_sq: Tensor | None = None  # mean (x' - mu)^2
    drift_sq: Tensor | None = None  # mean (mu - mu°)^2
    drift_dot: Tensor | None = None  # mean (mu - mu°)(x' - mu°)
    ref_drift_sq: Tensor | None = None  # mean (mu - mu_ref)^2


def _statistics(
    differences: _Differences, row_shape: tuple[int, ...], latent_reduction: str = "mean", process_group: Any = None
) -> _Statistics:
    """Of the latents of all ranks: their sums and their number of elements come together in one all-reduce."""
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
    """With this rank's gradient alone: the loss is one number that all ranks have, not one for each."""

    @staticmethod
    def forward(ctx, value, process_group):
        total = value.clone()
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _divide_or_zero(dividend: Tensor, divisor: Tensor) -> Tensor:
    """0 with gradient 0 where the divisor is 0. A step of standard deviation 0 is deterministic: its log-prob and KL
    are 0. (`loss` wants `std > 0`, and divides.)"""
    zero = divisor == 0
    # Selected before the division as well: autograd would multiply the infinite slope by the 0 of the other branch.
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
    """`log_prob - old_log_prob` without its cancellation; exactly 0 when `mu == mu°`."""
    if density == "cps":
        return 2 * stats.drift_dot - stats.drift_sq
    return divide(stats.drift_dot, std**2) - divide(stats.drift_sq, 2 * std**2)


def _kl_divisor(kind: str, std: Tensor, b: Tensor | None) -> Tensor:
    """What `mean (mu - mu°)^2` is divided by; with "velocity" the KL is `mean (v - v°)^2`, with no factor."""
    if kind == "velocity":
        return b**2
    return 2 * std**2 if kind == "gaussian" else torch.full_like(std, 2.0)


# ---- objective: a row's ratio, KL and advantage -> which rows are blocked ------------------------------------------


class _Verdict(NamedTuple):
    """Rows; booleans but for the loss."""

    blocked: Tensor  # no gradient to the policy
    blocked_loss: Tensor  # the loss of such a row
    high_kl: Tensor
    above: Tensor  # the ratio is above, or below, the clip range
    below: Tensor


def _trust_region(settings: dict[str, Any], ratio: Tensor, kl: Tensor, advantages: Tensor) -> _Verdict:
    """FlowDPPO."""
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
    # The larger one is the clipped one exactly when the ratio left the range on the side that A favours.
    blocked = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
    nowhere = torch.zeros_like(blocked)
    return _Verdict(blocked, -advantages * clipped, nowhere, ratio - 1 > high, 1 - ratio > low)


def _block_gradient(latents: Tensor | None, rows: Tensor) -> None:
    """Makes the gradient of these rows exactly 0."""

    def without(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else torch.where(_wide(rows, grad), torch.zeros_like(grad), grad)

    if latents is not None and latents.requires_grad:
        latents.register_hook(without)


def _policy_loss(
    given: _Inputs,
    differences: _Differences,
    *,
    std: Tensor | None,
    sqrt_dt: Tensor | None,
    b: Tensor | None = None,
    divide: Divide,
) -> PolicyLoss:
    """From the differences to the result. `b`: the coefficient of the model output, for `kl_space="velocity"`."""
    call, settings = given.call, given.call.settings
    stats = _statistics(differences, call.row_shape, settings["latent_reduction"], call.process_group)
    log_prob, old_log_prob = given.differentiable("log_prob"), given.rows("old_log_prob")
    if log_prob is None:
        log_prob = _log_prob(stats, std, settings["density"], divide)
    log_ratio = _log_ratio(stats, std, settings["density"], divide) if old_log_prob is None else log_prob - old_log_prob

    # The logarithm of what the objective calls the ratio.
    exponent, row_scale = log_ratio, 1.0
    if settings["objective"] == "grpo_guard":
        # verl-omni GRPOGuardLoss.compute_loss; std_dev_t there is std / sqrt_dt here.
        if settings["per_row_scale"]:
            guard_scale, row_scale = std, 1 / sqrt_dt**2
        else:
            guard_scale, row_scale = sqrt_dt.mean() * (std / sqrt_dt).mean(), 1 / sqrt_dt.mean() ** 2
        exponent = (log_ratio + divide(stats.drift_sq, 2 * guard_scale**2)) * guard_scale
    ratio = torch.exp(exponent).detach()

    kl = None
    if stats.drift_sq is not None and std is not None:
        kl = divide(stats.drift_sq, _kl_divisor(settings["kl_divisor"], std, b)).detach()

    advantages = given.rows("advantages").clamp(-settings["adv_clip_max"], settings["adv_clip_max"])
    if settings["objective"] == "flow_dppo":
        verdict = _trust_region(settings, ratio, kl, advantages)
    else:
        verdict = _clip(settings, ratio, advantages)
    blocked = verdict.blocked

    # A blocked row's gradient is 0, also where 0 meets an infinite ratio or latent on the way back. Not that of the
    # reference drift: blocking a row's update does not lift its penalty.
    _block_gradient(differences.innovation, blocked)
    _block_gradient(differences.drift, blocked)
    exponent = torch.where(blocked, torch.zeros_like(exponent), exponent)
    row_loss = torch.where(blocked, verdict.blocked_loss, -advantages * torch.exp(exponent)) * row_scale
    if "weights" in call.fields:
        row_loss = row_loss * given.rows("weights")
    loss = _reduced(row_loss, settings["reduction"], ~blocked)
    ref_kl = None
    if stats.ref_drift_sq is not None:
        ref_std = given.rows("ref_std") if "ref_std" in call.fields else std
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
    """Every name of `METRICS`, as the trainers define them."""
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


# ---- the functions, of checked calls -------------------------------------------------------------------------------


def checked_loss(call: Call) -> PolicyLoss:
    given = _Inputs(call)
    mean, next_sample = given.differentiable("prev_sample_mean"), given.constant("prev_sample")
    old_mean, ref_mean = given.constant("old_prev_sample_mean"), given.constant("ref_prev_sample_mean")
    differences = _Differences(
        None if next_sample is None else next_sample - mean,
        None if old_mean is None else mean - old_mean,
        None if ref_mean is None else mean - ref_mean,
    )
    return _policy_loss(given, differences, std=given.rows("std"), sqrt_dt=given.rows("sqrt_dt"), divide=torch.div)


def checked_step_loss(call: Call) -> PolicyLoss:
    given = _Inputs(call)
    step = _step(given)
    innovation = given.constant("prev_sample") - step.mean
    b, std = _wide(step.b, innovation), _wide(step.std, innovation)

    def drift(policy: str) -> Tensor | None:
        """`mu` minus the mean of another policy, in whichever form that is given."""
        mean, output, residual = (
            given.constant(f"{policy}_{form}") for form in ("prev_sample_mean", "model_output", "residual")
        )
        if mean is not None:
            return step.mean - mean
        if output is not None:  # no cancellation between two means
            return b * (step.velocity - output)
        if residual is None:
            return None
        # mu° = x' - std e. A residual stored from this very mean gives its rounding error and no more.
        drifted = -std * (standardised(innovation, step.std) - residual)
        return torch.where(std == 0, -innovation, drifted)

    differences = _Differences(innovation, drift("old"), drift("ref"))
    return _policy_loss(given, differences, std=step.std, sqrt_dt=step.sqrt_dt, b=step.b, divide=_divide_or_zero)


def checked_sde_step(call: Call) -> SdeStep:
    given, settings = _Inputs(call), call.settings
    step, dtype = _step(given), call.fields["sample"].dtype
    mean, std, next_sample = step.mean, step.std, call.fields.get("prev_sample")
    if next_sample is None:
        noise = given.constant("noise")
        if noise is None:
            noise = draw_noise(call.fields["sample"], given.dtype, call.generator)
        next_sample = mean.detach() + _wide(std, mean) * noise
    elif next_sample.dtype != dtype:
        next_sample = next_sample.to(given.dtype)
    stored = next_sample.detach().to(dtype)
    innovation = stored.to(given.dtype) - mean
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
    """`run`, with the arguments and the checks of the package's function."""
    parameters, where = signature(public), f"flowdppo_ops.{public.__name__}"

    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        given = parameters.bind(*args, **kwargs)
        given.apply_defaults()
        return run(check(where, FAMILY, given.arguments))

    function.__name__ = function.__qualname__ = public.__name__
    function.__doc__ = f"`{where}` in plain PyTorch: same arguments, same results, same errors."
    function.__signature__ = parameters
    return function


loss = _like(policy_loss.loss, check_loss, checked_loss)
step_loss = _like(policy_loss.step_loss, check_step_loss, checked_step_loss)
sde_step = _like(_sde_step.sde_step, check_sde_step, checked_sde_step)
