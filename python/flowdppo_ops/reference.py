"""The executable specification: every function of the package in plain PyTorch.

Any float dtype and any device; half precision is widened to float32, float64 stays. Gradients are autograd's. The
native backends are tested against this module, and this module against numbers recorded from the public trainers.

Notation, for a row (one sample at one denoising step) with `N` latent elements: `x` sample, `v` model output, `x'`
next sample, `mu` its mean, `mu°` the old policy's mean, `sigma` the transition's standard deviation, `A` advantage.

Sources: Flow-DPPO (arXiv 2606.11025); Flow-GRPO (arXiv 2505.05470); GRPO-Guard (arXiv 2510.22319); DanceGRPO (arXiv
2505.07818); coefficients-preserving sampling (arXiv 2509.05952). The trainers' functions are named where they decide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _args
from ._torch import FAMILY, row_tensor
from .advantages import group_advantages
from .objectives import FlowDPPO, FlowGRPO, GRPOGuard, Objective, check_option
from .result import METRICS, PolicyLoss

__all__ = ["SdeStep", "group_advantages", "loss", "sde_step", "step_loss", "transition"]

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


# ---- row statistics ------------------------------------------------------------------------------------------------


class _Statistics(NamedTuple):
    """Each latent-reduced to the rows; None where nothing asked for it."""

    q: Tensor | None  # mean (x' - mu)^2
    d: Tensor | None  # mean (mu - mu°)^2
    p: Tensor | None  # mean (mu - mu°)(x' - mu°)
    f: Tensor | None  # mean (mu - mu_ref)^2
    scale: float  # 1, or N with latent_reduction="sum": the weight of a per-element constant


def _statistics(
    innovation: Tensor | None,
    drift: Tensor | None,
    ref_drift: Tensor | None,
    row_shape: tuple[int, ...],
    latent_reduction: str,
) -> _Statistics:
    """From `innovation = x' - mu`, `drift = mu - mu°` and `ref_drift = mu - mu_ref`."""

    def over_latents(product: Tensor) -> Tensor:
        product = product.reshape(*row_shape, -1)
        return product.mean(-1) if latent_reduction == "mean" else product.sum(-1)

    some = next((t for t in (innovation, drift, ref_drift) if t is not None), None)
    numel = 0 if some is None else some.numel() // max(1, math.prod(row_shape))
    return _Statistics(
        q=None if innovation is None else over_latents(innovation**2),
        d=None if drift is None else over_latents(drift**2),
        p=None if innovation is None or drift is None else over_latents(drift * (innovation + drift)),
        f=None if ref_drift is None else over_latents(ref_drift**2),
        scale=float(numel) if latent_reduction == "sum" else 1.0,
    )


def _log_prob(q: Tensor, std: Tensor, density: str, scale: float, normalizer: bool = True) -> Tensor:
    """Gaussian log-density, or CPS's own: minus the squared error, no scale and no normaliser."""
    if density == "cps":
        return -q
    log_prob = -q / (2 * std**2)
    if normalizer:
        log_prob = log_prob - scale * (torch.log(std) + 0.5 * math.log(2 * math.pi))
    return log_prob


# ---- objective: a row's numbers -> loss, keep, metrics -------------------------------------------------------------


def _objective(
    stats: _Statistics,
    *,
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    std: Tensor | None,
    sqrt_dt: Tensor | None,
    kl_divisor: Tensor | None,
    ref_std: Tensor | None,
    ref_kl_weight: float,
    objective: Objective,
    density: str,
    reduction: str,
) -> PolicyLoss:
    if old_log_prob is not None:
        log_ratio = log_prob - old_log_prob
    elif density == "cps":
        log_ratio = 2 * stats.p - stats.d
    else:  # the same number as log_prob - old_log_prob, without cancellation; exactly 0 when mu == mu°
        log_ratio = stats.p / std**2 - stats.d / (2 * std**2)
    kl = None if stats.d is None or kl_divisor is None else stats.d.detach() / kl_divisor

    exponent, row_scale = log_ratio, 1.0
    if isinstance(objective, GRPOGuard):
        # verl-omni GRPOGuardLoss.compute_loss; std_dev_t there is std / sqrt_dt here.
        if objective.per_row_scale:
            c, row_scale = std, 1 / sqrt_dt**2
        else:
            c, row_scale = sqrt_dt.mean() * (std / sqrt_dt).mean(), 1 / sqrt_dt.mean() ** 2
        exponent = (log_ratio + stats.d / (2 * c**2)) * c
    ratio = torch.exp(exponent.detach())

    zeros = torch.zeros_like(ratio, dtype=torch.bool)
    high, above, below = zeros, zeros, zeros
    if isinstance(objective, FlowDPPO):
        threshold = torch.tensor(objective.kl_mask_threshold, dtype=kl.dtype)  # compared in the arithmetic dtype
        high = kl >= threshold if objective.nan_kl == "keep" else ~(kl < threshold)
        away = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
        blocked = {"asymmetric": high & away, "symmetric": high, "none": zeros}[objective.mask]
        blocked_loss = torch.zeros_like(ratio)
    else:
        low, up, limit = objective._native[1:4]
        advantages = advantages.clamp(-limit, limit)
        clipped = ratio.clamp(1 - low, 1 + up)
        # The larger surrogate is the clipped one exactly when the ratio left the range on the side that A favours.
        blocked = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
        blocked_loss = -advantages * clipped
        above, below = ratio - 1 > up, 1 - ratio > low

    # Selected before exp as well, so that a blocked row with an infinite ratio has gradient 0 instead of NaN.
    open_loss = -advantages * torch.exp(torch.where(blocked, torch.zeros_like(exponent), exponent))
    row_loss = torch.where(blocked, blocked_loss, open_loss) * row_scale
    if weights is not None:
        row_loss = row_loss * weights
    ref_kl = None if stats.f is None else stats.f / (2 * ref_std**2)

    # The policy's term over the rows, then the reference term over all of them: blocking a row's update does not
    # lift its penalty.
    keep = ~blocked
    if reduction == "none":
        loss = row_loss
    elif reduction == "kept_mean":
        loss = torch.where(keep, row_loss, torch.zeros_like(row_loss)).sum() / keep.sum().clamp(min=1)
    else:
        loss = row_loss.mean() if reduction == "mean" else row_loss.sum()
    if ref_kl is not None:
        penalty = ref_kl if reduction == "none" else ref_kl.sum() if reduction == "sum" else ref_kl.mean()
        loss = loss + ref_kl_weight * penalty

    absent = torch.zeros_like(ratio)
    rows = [log_prob.detach(), log_ratio.detach(), ratio, absent if kl is None else kl, keep.to(ratio.dtype)]
    metrics = _metrics(
        log_ratio.detach(), ratio, kl, row_loss.detach(), high, blocked, above, below, advantages, ref_kl
    )
    return PolicyLoss(
        loss,
        torch.cat([row.reshape(-1) for row in rows] + [metrics[name].to(ratio.dtype).reshape(1) for name in METRICS]),
        tuple(ratio.shape),
        has_kl=kl is not None,
        has_ref=ref_kl is not None,
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
    process_group: None = None,
) -> PolicyLoss:
    """`flowdppo_ops.loss` in plain PyTorch: same arguments, same results, same errors."""
    call = _args.check_loss(
        "flowdppo_ops.loss",
        FAMILY,
        prev_sample_mean=prev_sample_mean,
        old_prev_sample_mean=old_prev_sample_mean,
        advantages=advantages,
        std=std,
        sqrt_dt=sqrt_dt,
        prev_sample=prev_sample,
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        weights=weights,
        ref_prev_sample_mean=ref_prev_sample_mean,
        ref_kl_weight=ref_kl_weight,
        ref_std=ref_std,
        objective=objective,
        density=density,
        latent_reduction=latent_reduction,
        reduction=reduction,
        process_group=process_group,
    )
    dtype = torch.float64 if call.double else torch.float32
    mean, *anchors = (None if t is None else t.to(dtype) for t in call.latents)
    next_sample, old_mean, ref_mean = (None if t is None else t.detach() for t in anchors)
    stats = _statistics(
        None if next_sample is None else next_sample - mean,
        None if old_mean is None else mean - old_mean,
        None if ref_mean is None else mean - ref_mean,
        call.row_shape,
        latent_reduction,
    )

    def rows(value: float | Tensor | None) -> Tensor | None:
        return None if value is None else row_tensor(value, call.row_shape, dtype, advantages.device)

    vectors = call.vectors
    std = rows(vectors.std)
    kl_divisor = None if std is None else 2 * std**2
    if isinstance(objective, FlowDPPO) and not objective.normalize_kl:
        kl_divisor = torch.full_like(kl_divisor, 2.0)
    return _objective(
        stats,
        log_prob=_log_prob(stats.q, std, density, stats.scale) if log_prob is None else vectors.log_prob.to(dtype),
        old_log_prob=rows(vectors.old_log_prob),
        advantages=rows(vectors.advantages),
        weights=rows(vectors.weights),
        std=std,
        sqrt_dt=rows(vectors.sqrt_dt),
        kl_divisor=kl_divisor,
        ref_std=std if ref_std is None else rows(vectors.ref_std),
        ref_kl_weight=ref_kl_weight,
        objective=objective,
        density=density,
        reduction=reduction,
    )


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
    old_prev_sample_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    old_residual: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    weights: RowVector | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: RowVector | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: None = None,
) -> PolicyLoss:
    """From the model's raw output to the loss: scheduler step, log-prob, KL and objective.

    Args:
        model_output: latents; the velocity `v`. The gradient goes here.
        sample, prev_sample: latents; `x` and the next `x'` that the rollout drew.
        advantages: the rows.
        sigma, sigma_next, noise_level, sampler, sigma_max: the schedule, see `transition`.
        old_prev_sample_mean, old_model_output, old_residual: the old policy, at most one of its mean `mu°`, its
            model output, or its standardised residual `(x' - mu°) / std`. May be missing for `FlowGRPO` with
            `old_log_prob`.
        old_log_prob and the rest: as in `loss`. The density follows from the sampler.

    Raises:
        ValueError, TypeError: as `loss`.
    """
    where = "flowdppo_ops.step_loss"
    _args.check_process_group(where, process_group)
    _args.check_objective(where, objective)
    check_option(where, "sampler", sampler, _args.SAMPLERS)
    check_option(where, "latent_reduction", latent_reduction, _args.LATENT_REDUCTIONS)
    check_option(where, "reduction", reduction, _args.REDUCTIONS)
    olds = {
        "old_prev_sample_mean": old_prev_sample_mean,
        "old_model_output": old_model_output,
        "old_residual": old_residual,
    }
    given = {name: value for name, value in olds.items() if value is not None}
    if len(given) > 1 or (not given and (old_log_prob is None or not isinstance(objective, FlowGRPO))):
        came = " and ".join(given) or "none"
        raise ValueError(f"{where}: got {came} for the old policy, wanted exactly one of {', '.join(olds)}")
    ref_kl_weight = _args.check_number(where, "ref_kl_weight", ref_kl_weight)
    row_shape = _args.check_rows(where, FAMILY, advantages)
    latents = {"model_output": model_output, "sample": sample, "prev_sample": prev_sample, **given}
    if ref_kl_weight:
        _args.require(where, "ref_prev_sample_mean", ref_prev_sample_mean, "ref_kl_weight is not 0")
        latents["ref_prev_sample_mean"] = ref_prev_sample_mean
    _args.check_latents(where, FAMILY, row_shape, latents)
    _args.check_same_device(where, FAMILY, "advantages", advantages, "model_output", model_output)
    _args.check_full_row_vector(where, FAMILY, "old_log_prob", old_log_prob, advantages)
    dtype = _step_dtype(*latents.values())
    rows = _row_reader(where, "model_output", model_output, row_shape, dtype)

    x, x_next = sample.detach().to(dtype), prev_sample.detach().to(dtype)
    velocity = model_output.to(dtype)
    a, b, std = transition(
        sampler,
        rows("sigma", sigma),
        rows("sigma_next", sigma_next),
        rows("noise_level", noise_level),
        rows("sigma_max", sigma_max),
    )

    def wide(row: Tensor) -> Tensor:
        return row.reshape(row_shape + (1,) * (model_output.ndim - len(row_shape)))

    mean = wide(a) * x + wide(b) * velocity
    innovation = x_next - mean
    if old_prev_sample_mean is not None:
        drift = mean - old_prev_sample_mean.detach().to(dtype)
    elif old_model_output is not None:  # b (v - v°): no cancellation between two means
        drift = wide(b) * (velocity - old_model_output.detach().to(dtype))
    elif old_residual is not None:  # mu° = x' - std e
        drift = wide(std) * old_residual.detach().to(dtype) - innovation
    else:
        drift = None
    ref_drift = mean - ref_prev_sample_mean.detach().to(dtype) if ref_kl_weight else None
    stats = _statistics(innovation, drift, ref_drift, row_shape, latent_reduction)

    kl_divisor = 2 * std**2
    if isinstance(objective, FlowDPPO):
        if objective.kl_space == "velocity":  # mean (v - v°)^2 = d / b^2, with no further factor
            kl_divisor = b**2
        elif not objective.normalize_kl:
            kl_divisor = torch.full_like(std, 2.0)
    density = "cps" if sampler == "cps" else "gaussian"
    return _objective(
        stats,
        log_prob=_log_prob(stats.q, std, density, stats.scale),
        old_log_prob=None if old_log_prob is None else rows("old_log_prob", old_log_prob),
        advantages=rows("advantages", advantages),
        weights=None if weights is None else rows("weights", weights),
        std=std,
        sqrt_dt=torch.sqrt(rows("sigma", sigma) - rows("sigma_next", sigma_next)),
        kl_divisor=kl_divisor,
        ref_std=std if ref_std is None else rows("ref_std", ref_std),
        ref_kl_weight=ref_kl_weight,
        objective=objective,
        density=density,
        reduction=reduction,
    )


class SdeStep(NamedTuple):
    """One stochastic denoising step.

    prev_sample: next latent, in the dtype of `sample`. log_prob: rows, float32 (float64 for float64 latents), nats.
    prev_sample_mean: latents, float32. std: rows, the standard deviation of the transition, sqrt(-dt) included.
    residual: latents in `residual_dtype`, `(prev_sample - prev_sample_mean) / std`, or None.
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
    sigma: RowVector,
    sigma_next: RowVector,
    noise_level: RowVector = 0.7,
    sampler: str = "flow_sde",
    sigma_max: RowVector = 0.99,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    log_prob_normalizer: bool = True,
    residual_dtype: torch.dtype | None = None,
    row_dims: int = 1,
) -> SdeStep:
    """One step of the sampler: draws the next latent, or scores a given one.

    Args:
        model_output, sample: latents of one shape; the first `row_dims` dimensions are the rows.
        sigma, sigma_next, noise_level, sampler, sigma_max: see `transition`.
        prev_sample: score this latent instead of drawing one (replay).
        noise: standard normal latents to use instead of drawing them from `generator`.
        log_prob_normalizer: False leaves out `log std + log(2 pi)/2` (verl-omni's `include_logprob_normalizer`); no
            effect for "cps", which has none.
        residual_dtype: also return the standardised residual in this dtype.
        row_dims: how many leading dimensions are rows.

    The latent is rounded to the dtype of `sample` before it is scored, so that a replay of the stored one gives the
    same log-prob. Where the step is deterministic (`std == 0`: the last CPS step, or `noise_level` 0) the residual is
    0 and a Gaussian log-prob is defined as 0: nothing was random, so the ratio of two policies there is 1.

    Gradient: `model_output`, through `log_prob` and `prev_sample_mean`; `prev_sample` is a constant.
    Source: UniRL `denoise`; verl-omni `FlowMatchSDEDiscreteScheduler.sample_previous_step`.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or options; `noise` or `generator` together with `prev_sample`.
    """
    where = "flowdppo_ops.sde_step"
    check_option(where, "sampler", sampler, _args.SAMPLERS)
    if prev_sample is not None and (noise is not None or generator is not None):
        raise ValueError(f"{where}: got prev_sample and a source of noise, wanted one: replay draws nothing")
    if noise is not None and generator is not None:
        raise ValueError(f"{where}: got noise and generator, wanted at most one")
    _args.check_array(where, FAMILY, "model_output", model_output)
    if isinstance(row_dims, bool) or not isinstance(row_dims, int) or not 0 <= row_dims <= model_output.ndim:
        raise ValueError(f"{where}: row_dims is {row_dims!r}, wanted 0 to {model_output.ndim}, the rank of the latents")
    row_shape = tuple(model_output.shape[:row_dims])
    if 0 in row_shape:
        raise ValueError(f"{where}: model_output has shape {tuple(model_output.shape)}, wanted at least one row")
    latents = {"model_output": model_output, "sample": sample}
    latents |= {k: v for k, v in {"prev_sample": prev_sample, "noise": noise}.items() if v is not None}
    _args.check_latents(where, FAMILY, row_shape, latents)
    dtype = _step_dtype(model_output, sample)
    rows = _row_reader(where, "model_output", model_output, row_shape, dtype)
    a, b, std = transition(
        sampler,
        rows("sigma", sigma),
        rows("sigma_next", sigma_next),
        rows("noise_level", noise_level),
        rows("sigma_max", sigma_max),
    )

    def wide(row: Tensor) -> Tensor:
        return row.reshape(row_shape + (1,) * (model_output.ndim - row_dims))

    mean = wide(a) * sample.detach().to(dtype) + wide(b) * model_output.to(dtype)
    if prev_sample is None:
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=dtype)
        prev_sample = mean.detach() + wide(std) * noise.to(dtype)
    stored = prev_sample.detach().to(sample.dtype)
    innovation = stored.to(dtype) - mean
    stats = _statistics(innovation, None, None, row_shape, "mean")
    density = "cps" if sampler == "cps" else "gaussian"
    fixed = std == 0
    some_std = torch.where(fixed, torch.ones_like(std), std)
    log_prob = _log_prob(stats.q, some_std, density, 1.0, log_prob_normalizer)
    if density == "gaussian":
        log_prob = torch.where(fixed, torch.zeros_like(log_prob), log_prob)
    residual = None
    if residual_dtype is not None:
        scaled = torch.where(wide(fixed), torch.zeros_like(innovation), innovation / wide(some_std))
        residual = scaled.detach().to(residual_dtype)
    return SdeStep(stored, log_prob, mean, std.contiguous(), residual)


def _step_dtype(*latents: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in latents) else torch.float32


def _row_reader(where: str, like_name: str, like: Tensor, row_shape: tuple[int, ...], dtype: torch.dtype):
    """A function that checks a row vector and returns it as a tensor of the rows' shape."""

    def read(name: str, value: RowVector) -> Tensor:
        _args.require(where, name, value, "a number or a row vector")
        value = _args.check_row_vector(where, FAMILY, name, value, like_name, like, row_shape, like.ndim)
        return row_tensor(value, row_shape, dtype, like.device)

    return read
