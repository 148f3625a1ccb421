"""The executable specification: every function of the package in plain PyTorch.

Any float dtype and any device (one with float64, for the coefficients of a step); half precision is widened to float32,
float64 stays. Gradients are autograd's. The native backends are tested against this module, and this module against
numbers recorded from the public trainers.

Notation, for a row (one sample at one denoising step) with `N` latent elements: `x` sample, `v` model output, `x'`
next sample, `mu` its mean, `mu°` the old policy's mean, `sigma` the transition's standard deviation, `A` advantage.

Sources: Flow-DPPO (arXiv 2606.11025); Flow-GRPO (arXiv 2505.05470); GRPO-Guard (arXiv 2510.22319); DanceGRPO (arXiv
2505.07818); coefficients-preserving sampling (arXiv 2509.05952). The trainers' functions are named where they decide.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._checks import Call, check_loss, check_sde_step, check_step_loss
from ._sde_step import SdeStep, encode_residual, standardised
from ._torch import FAMILY, Generator, draw_noise, row_tensor
from .advantages import group_advantages
from .objectives import FlowDPPO, Objective
from .result import METRICS, Layout, PolicyLoss

__all__ = ["SdeStep", "encode_residual", "group_advantages", "loss", "sde_step", "step_loss", "transition"]

RowVector = float | Tensor


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


class _Rows(NamedTuple):
    """A schedule's rows, each of the rows' shape and in the arithmetic dtype."""

    a: Tensor
    b: Tensor
    std: Tensor
    sqrt_dt: Tensor
    guidance_scale: Tensor | None


def _schedule_rows(call: Call, dtype: torch.dtype, device: torch.device) -> _Rows:
    """Formed in float64 from values rounded to `dtype`, then rounded to it: half an ulp, where float32 all the way is
    up to 5 times as far (the terms of CPS's `b` cancel), and every backend comes to the same."""

    def rows(name: str) -> Tensor:
        return row_tensor(call.fields[name], call.row_shape, dtype, device).double()

    sigma, sigma_next = rows("sigma"), rows("sigma_next")
    formed = (
        *transition(call.settings["sampler"], sigma, sigma_next, rows("noise_level"), rows("sigma_max")),
        torch.sqrt(sigma - sigma_next),
    )
    scale = rows("guidance_scale").to(dtype) if "guidance_scale" in call.fields else None
    return _Rows(*(row.to(dtype) for row in formed), scale)


def _wide(row: Tensor, like: Tensor) -> Tensor:
    """Rows against latents."""
    return row.reshape(row.shape + (1,) * (like.ndim - row.ndim))


def _guided(output: Tensor, uncond_output: Tensor | None, scale: Tensor | None) -> Tensor:
    """Classifier-free guidance, the velocity that the step takes."""
    return output if uncond_output is None else uncond_output + _wide(scale, output) * (output - uncond_output)


# ---- row statistics ------------------------------------------------------------------------------------------------


class _Differences(NamedTuple):
    """The latents that the statistics are taken of; None where nothing asked for it."""

    innovation: Tensor | None  # x' - mu
    drift: Tensor | None  # mu - mu°
    ref_drift: Tensor | None  # mu - mu_ref

    def constant(self) -> _Differences:
        return _Differences(*(None if t is None else t.detach() for t in self))

    def without(self, rows: Tensor) -> _Differences:
        """With zeros for `rows`, a boolean of the rows' shape, in what the policy's term reads. The penalty keeps all.

        A gradient of 0 that meets an infinite or NaN latent on its way back is NaN: it must meet a constant instead.
        """

        def selected(latent: Tensor | None) -> Tensor | None:
            return None if latent is None else torch.where(_wide(rows, latent), torch.zeros_like(latent), latent)

        return _Differences(selected(self.innovation), selected(self.drift), self.ref_drift)


class _Statistics(NamedTuple):
    """Each latent-reduced to the rows; None where nothing asked for it."""

    q: Tensor | None  # mean (x' - mu)^2
    d: Tensor | None  # mean (mu - mu°)^2
    p: Tensor | None  # mean (mu - mu°)(x' - mu°)
    f: Tensor | None  # mean (mu - mu_ref)^2
    scale: float | Tensor  # 1, or N with latent_reduction="sum": the weight of a per-element constant


def _statistics(
    differences: _Differences, row_shape: tuple[int, ...], latent_reduction: str, process_group: Any = None
) -> _Statistics:
    """Of all ranks' latents."""
    innovation, drift, ref_drift = differences
    some = next((t for t in differences if t is not None), None)
    if some is None:
        return _Statistics(None, None, None, None, 1.0)
    numel = _over_ranks(some.new_tensor(some.numel() // max(1, math.prod(row_shape))), process_group)

    def over_latents(product: Tensor) -> Tensor:
        total = _over_ranks(product.reshape(*row_shape, -1).sum(-1), process_group)
        return total / numel if latent_reduction == "mean" else total

    return _Statistics(
        q=None if innovation is None else over_latents(innovation**2),
        d=None if drift is None else over_latents(drift**2),
        p=None if innovation is None or drift is None else over_latents(drift * (innovation + drift)),
        f=None if ref_drift is None else over_latents(ref_drift**2),
        scale=numel if latent_reduction == "sum" else 1.0,
    )


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


def _over_ranks(value: Tensor, process_group: Any) -> Tensor:
    return value if process_group is None else _SumOverRanks.apply(value, process_group)


def _quotient(dividend: Tensor, divisor: Tensor, zero_defined: bool) -> Tensor:
    """With `zero_defined`, 0 with gradient 0 where the divisor is 0: a deterministic row of a step."""
    if not zero_defined:
        return dividend / divisor
    zero = divisor == 0
    # Selected before the division as well: autograd would multiply the infinite slope by the 0 of the other branch.
    return torch.where(
        zero, torch.zeros_like(dividend), dividend / torch.where(zero, torch.ones_like(divisor), divisor)
    )


def _log_prob(
    q: Tensor, std: Tensor, density: str, scale: float | Tensor, normalizer: bool = True, zero_defined: bool = False
) -> Tensor:
    """Gaussian log-density, or CPS's own: minus the squared error, no scale and no normaliser."""
    if density == "cps":
        return -q
    log_prob = -_quotient(q, 2 * std**2, zero_defined)
    if normalizer:
        log_prob = log_prob - scale * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return torch.where(std == 0, torch.zeros_like(log_prob), log_prob) if zero_defined else log_prob


def _kl_divisor(kind: str, std: Tensor, b: Tensor | None = None) -> Tensor:
    """What `mean (mu - mu°)^2` is divided by; with "velocity" the KL is `mean (v - v°)^2 = d / b^2`, with no factor."""
    if kind == "velocity":
        return b**2
    return 2 * std**2 if kind == "gaussian" else torch.full_like(std, 2.0)


# ---- objective: a row's numbers -> loss, keep, metrics -------------------------------------------------------------


def _objective(
    call: Call,
    differences: _Differences,
    *,
    dtype: torch.dtype,
    std: Tensor | None,
    sqrt_dt: Tensor | None,
    kl_divisor: Tensor | None,
    zero_defined: bool = False,
) -> PolicyLoss:
    """`zero_defined`: whether a row of std 0 is deterministic (the steps) or not allowed (`loss`)."""
    settings, density = call.settings, call.settings["density"]
    log_prob = _as(dtype, call.fields, "log_prob")  # None takes that of the innovation
    old_log_prob, advantages = _row(call, dtype, "old_log_prob"), _row(call, dtype, "advantages")
    weights, ref_std = _row(call, dtype, "weights"), _row(call, dtype, "ref_std")
    ref_std = std if ref_std is None else ref_std
    guard_scale, row_scale = None, 1.0
    if settings["objective"] == "grpo_guard":
        # verl-omni GRPOGuardLoss.compute_loss; std_dev_t there is std / sqrt_dt here.
        if settings["per_row_scale"]:
            guard_scale, row_scale = std, 1 / sqrt_dt**2
        else:
            guard_scale, row_scale = sqrt_dt.mean() * (std / sqrt_dt).mean(), 1 / sqrt_dt.mean() ** 2

    def row_numbers(of: _Differences) -> tuple[_Statistics, Tensor, Tensor, Tensor]:
        """Statistics, log-prob, log-ratio, and the logarithm of what the objective calls the ratio."""
        stats = _statistics(of, call.row_shape, settings["latent_reduction"], call.process_group)
        own = log_prob
        if own is None:
            own = _log_prob(stats.q, std, density, stats.scale, zero_defined=zero_defined)
        if old_log_prob is not None:
            log_ratio = own - old_log_prob
        elif density == "cps":
            log_ratio = 2 * stats.p - stats.d
        else:  # the same number as log_prob - old_log_prob, without cancellation; exactly 0 when mu == mu°
            log_ratio = _quotient(stats.p, std**2, zero_defined) - _quotient(stats.d, 2 * std**2, zero_defined)
        if guard_scale is None:
            return stats, own, log_ratio, log_ratio
        drift = _quotient(stats.d, 2 * guard_scale**2, zero_defined)
        return stats, own, log_ratio, (log_ratio + drift) * guard_scale

    # Twice: first which rows are blocked, then what is differentiated, which leaves their latents out.
    stats, *numbers = row_numbers(differences.constant())
    own_log_prob, log_ratio, exponent = (number.detach() for number in numbers)
    ratio = torch.exp(exponent)
    kl = None
    if stats.d is not None and kl_divisor is not None:
        kl = _quotient(stats.d, kl_divisor, zero_defined)

    zeros = torch.zeros_like(ratio, dtype=torch.bool)
    high, above, below = zeros, zeros, zeros
    if settings["objective"] == "flow_dppo":
        threshold = kl.new_full((), settings["kl_mask_threshold"])  # compared in the arithmetic dtype
        high = kl >= threshold if settings["keep_nan_kl"] else ~(kl < threshold)
        away = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
        blocked = {"asymmetric": high & away, "symmetric": high, "none": zeros}[settings["mask"]]
        blocked_loss = torch.zeros_like(ratio)
    else:
        low, up, limit = (settings[name] for name in ("clip_low", "clip_high", "adv_clip_max"))
        advantages = advantages.clamp(-limit, limit)
        clipped = ratio.clamp(1 - low, 1 + up)
        # The larger surrogate is the clipped one exactly when the ratio left the range on the side that A favours.
        blocked = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
        blocked_loss = -advantages * clipped
        above, below = ratio - 1 > up, 1 - ratio > low

    # Selected before exp as well, so that a blocked row with an infinite ratio has gradient 0 instead of NaN.
    stats, _, _, exponent = row_numbers(differences.without(blocked))
    open_loss = -advantages * torch.exp(torch.where(blocked, torch.zeros_like(exponent), exponent))
    row_loss = torch.where(blocked, blocked_loss, open_loss) * row_scale
    if weights is not None:
        row_loss = row_loss * weights
    ref_kl = None if stats.f is None else _quotient(stats.f, 2 * ref_std**2, zero_defined)

    # The policy's term over the rows, then the reference term over all of them: blocking a row's update does not
    # lift its penalty.
    keep, reduction = ~blocked, settings["reduction"]
    if reduction == "none":
        loss = row_loss
    elif reduction == "kept_mean":
        loss = torch.where(keep, row_loss, torch.zeros_like(row_loss)).sum() / keep.sum().clamp(min=1)
    else:
        loss = row_loss.mean() if reduction == "mean" else row_loss.sum()
    if ref_kl is not None:
        penalty = ref_kl if reduction == "none" else ref_kl.sum() if reduction == "sum" else ref_kl.mean()
        loss = loss + settings["ref_kl_weight"] * penalty

    absent = torch.zeros_like(ratio)
    rows = [own_log_prob, log_ratio, ratio, absent if kl is None else kl, keep.to(ratio.dtype)]
    metrics = _metrics(log_ratio, ratio, kl, row_loss.detach(), high, blocked, above, below, advantages, ref_kl)
    return PolicyLoss(
        loss,
        torch.cat([row.reshape(-1) for row in rows] + [metrics[name].to(ratio.dtype).reshape(1) for name in METRICS]),
        Layout(tuple(ratio.shape), has_kl=kl is not None, has_ref=ref_kl is not None),
    )


def _metrics(
    log_ratio: Tensor,
    ratio: Tensor,
    kl: Tensor | None,
    row_loss: Tensor,
    high: Tensor,
    blocked: Tensor,
    above: Tensor,
    below: Tensor,
    advantages: Tensor,
    ref_kl: Tensor | None,
) -> dict[str, Tensor]:
    """Every name of `METRICS`, as the trainers define them."""
    absent = torch.zeros_like(ratio).sum()

    def share(rows: Tensor) -> Tensor:
        return rows.to(ratio.dtype).mean()

    finite = torch.isfinite(log_ratio) & torch.isfinite(ratio) & torch.isfinite(row_loss)
    if kl is not None:
        finite = finite & torch.isfinite(kl)
    return {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.reshape(-1).std() if ratio.numel() > 1 else absent,
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "ppo_kl": (-log_ratio).mean(),
        "kl_new_old_mean": absent if kl is None else kl.mean(),
        "kl_new_old_max": absent if kl is None else kl.max(),
        "kl_mask_fraction": share(high),
        "pos_rm_fraction": share(blocked & (advantages > 0)),
        "neg_rm_fraction": share(blocked & (advantages < 0)),
        "masked_fraction": share(blocked),
        "unmasked_fraction": share(~blocked),
        "clip_fraction": share(above | below),
        "clipfrac_gt_one": share(above),
        "clipfrac_lt_one": share(below),
        "nonfinite_fraction": share(~finite),
        "kl_loss": absent if ref_kl is None else ref_kl.detach().mean(),
    }


# ---- the public functions ------------------------------------------------------------------------------------------


def loss(
    prev_sample_mean: Tensor | None,
    old_prev_sample_mean: Tensor | None,
    advantages: Tensor,
    *,
    std: RowVector | None = None,
    sqrt_dt: RowVector | None = None,
    prev_sample: Tensor | None = None,
    log_prob: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    weights: RowVector | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: RowVector | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    density: str = "gaussian",
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: Any = None,
) -> PolicyLoss:
    """`flowdppo_ops.loss` in plain PyTorch: same arguments, same results, same errors."""
    return checked_loss(check_loss("flowdppo_ops.loss", FAMILY, locals()))


def _as(dtype: torch.dtype, latents: dict[str, Any], name: str) -> Tensor | None:
    return latents[name].to(dtype) if name in latents else None


def _constant(dtype: torch.dtype, latents: dict[str, Any], name: str) -> Tensor | None:
    return latents[name].detach().to(dtype) if name in latents else None


def _dtype(fields: dict[str, Any]) -> torch.dtype:
    """Of the arithmetic: float64 where a latent or a log-prob is. Other row vectors may be float64."""
    wide = (fields[name] for name in (*_native.LATENTS, "noise", "log_prob", "old_log_prob") if name in fields)
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in wide) else torch.float32


def checked_loss(call: Call) -> PolicyLoss:
    """Of a checked call."""
    fields, settings, dtype = call.fields, call.settings, _dtype(call.fields)
    mean = _as(dtype, fields, "prev_sample_mean")
    next_sample = _constant(dtype, fields, "prev_sample")
    old_mean = _constant(dtype, fields, "old_prev_sample_mean")
    ref_mean = _constant(dtype, fields, "ref_prev_sample_mean")
    differences = _Differences(
        None if next_sample is None else next_sample - mean,
        None if old_mean is None else mean - old_mean,
        None if ref_mean is None else mean - ref_mean,
    )
    std = _row(call, dtype, "std")
    kl_divisor = None if std is None else _kl_divisor(settings["kl_divisor"], std)
    sqrt_dt = _row(call, dtype, "sqrt_dt")
    return _objective(call, differences, dtype=dtype, std=std, sqrt_dt=sqrt_dt, kl_divisor=kl_divisor)


def _row(call: Call, dtype: torch.dtype, name: str) -> Tensor | None:
    """A row vector by name, of the rows' shape."""
    if name not in call.fields:
        return None
    return row_tensor(call.fields[name], call.row_shape, dtype, call.fields["advantages"].device)


def step_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    *,
    sigma: RowVector,
    sigma_next: RowVector,
    noise_level: RowVector,
    sampler: str = "flow_sde",
    sigma_max: RowVector = 0.99,
    uncond_output: Tensor | None = None,
    guidance_scale: RowVector | None = None,
    old_prev_sample_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    old_residual: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    weights: RowVector | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: RowVector | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: Any = None,
) -> PolicyLoss:
    """`flowdppo_ops.step_loss` in plain PyTorch: same arguments, same results, same errors."""
    return checked_step_loss(check_step_loss("flowdppo_ops.step_loss", FAMILY, locals()))


def checked_step_loss(call: Call) -> PolicyLoss:
    """Of a checked call."""
    fields, settings, dtype = call.fields, call.settings, _dtype(call.fields)
    output, uncond = _as(dtype, fields, "model_output"), _as(dtype, fields, "uncond_output")
    x, x_next = _constant(dtype, fields, "sample"), _constant(dtype, fields, "prev_sample")
    a, b, std, sqrt_dt, scale = _schedule_rows(call, dtype, output.device)

    velocity = _guided(output, uncond, scale)
    mean = _wide(a, x) * x + _wide(b, x) * velocity
    innovation = x_next - mean

    def drift(policy: str) -> Tensor | None:
        """`mu` minus the mean of another policy, in whichever form that is given."""
        if f"{policy}_prev_sample_mean" in fields:
            return mean - _constant(dtype, fields, f"{policy}_prev_sample_mean")
        if f"{policy}_model_output" in fields:  # no cancellation between two means
            return _wide(b, x) * (velocity - _constant(dtype, fields, f"{policy}_model_output"))
        if f"{policy}_residual" not in fields:
            return None
        # mu° = x' - std e. A residual stored from this very mean gives its rounding error and no more.
        wide_std = _wide(std, x)
        drifted = -wide_std * (standardised(innovation, std) - _constant(dtype, fields, f"{policy}_residual"))
        return torch.where(wide_std == 0, -innovation, drifted)

    differences = _Differences(innovation, drift("old"), drift("ref"))
    kl_divisor = _kl_divisor(settings["kl_divisor"], std, b)
    return _objective(
        call, differences, dtype=dtype, std=std, sqrt_dt=sqrt_dt, kl_divisor=kl_divisor, zero_defined=True
    )


def sde_step(
    model_output: Tensor,
    sample: Tensor,
    *,
    sigma: RowVector,
    sigma_next: RowVector,
    noise_level: RowVector = 0.7,
    sampler: str = "flow_sde",
    sigma_max: RowVector = 0.99,
    uncond_output: Tensor | None = None,
    guidance_scale: RowVector | None = None,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generator = None,
    log_prob_normalizer: bool = True,
    residual_dtype: torch.dtype | None = None,
    row_dims: int = 1,
) -> SdeStep:
    """`flowdppo_ops.sde_step` in plain PyTorch: same arguments, same results, same errors."""
    return SdeStep(*checked_sde_step(check_sde_step("flowdppo_ops.sde_step", FAMILY, locals())))


def checked_sde_step(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The parts of `SdeStep`, of a checked call."""
    fields, settings, dtype = call.fields, call.settings, _dtype(call.fields)
    sample, given = fields["sample"], _constant(dtype, fields, "prev_sample")
    a, b, std, _, scale = _schedule_rows(call, dtype, sample.device)
    velocity = _guided(_as(dtype, fields, "model_output"), _as(dtype, fields, "uncond_output"), scale)
    mean = _wide(a, sample) * sample.detach().to(dtype) + _wide(b, sample) * velocity
    if given is None:
        noise = _constant(dtype, fields, "noise")
        noise = draw_noise(sample, dtype, call.generator) if noise is None else noise
        given = mean.detach() + _wide(std, sample) * noise
    # A latent that is given in the dtype of `sample` is stored as it is.
    as_given = "prev_sample" in fields and fields["prev_sample"].dtype == sample.dtype
    stored = fields["prev_sample"].detach() if as_given else given.to(sample.dtype)
    innovation = stored.to(dtype) - mean
    q = _statistics(_Differences(innovation, None, None), call.row_shape, "mean").q
    density = "cps" if settings["sampler"] == "cps" else "gaussian"
    log_prob = _log_prob(q, std, density, 1.0, settings["log_prob_normalizer"], zero_defined=True)
    residual_dtype = settings["residual_dtype"]
    residual = None if residual_dtype is None else standardised(innovation.detach(), std).to(residual_dtype)
    return stored, log_prob, mean, std, residual
