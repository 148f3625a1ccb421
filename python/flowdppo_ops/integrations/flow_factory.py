"""Flow-Factory: its scheduler's step, which `enable()` replaces, and the losses that its trainers compute inline.

A trainer computes its loss inside `optimize`, where nothing can be replaced. So a few lines of it must be edited, as
docs/trainers.md shows, to call the functions below. They take the variables of `optimize`, and return the loss and the
values that the trainer logs. `strict=None` takes the setting of `enable` or, before that, FLOWDPPO_OPS_STRICT. The step
has no defect and gives the same numbers with either setting.

Tested with Flow-Factory at a0b2bc5a. `dppo_loss` was tested against the formulas of Flow-Factory's trainer of July
2026, not against the trainer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import FlowDPPO, FlowGRPO, GRPOGuard, sde_step
from .._torch import Generator
from ._patch import Patch, Replacement, log, wants_strict
from ._schedule import draw, look_up, wide
from ._terms import gaussian_kl, policy_loss

__all__ = ["disable", "dppo_loss", "enable", "enabled", "fallbacks", "grpo_loss", "guard_loss"]

_patch = Patch("Flow-Factory", tested="commit a0b2bc5a")
enable, disable, enabled, fallbacks = _patch.enable, _patch.disable, _patch.enabled, _patch.count_fallbacks

_SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}
_RESULTS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")

Info = dict[str, Tensor]


@_patch.replaces
def _replacements(strict: bool) -> list[Replacement]:
    module = _patch.module("flow_factory.scheduler.flow_match_euler_discrete")
    scheduler = _patch.attribute(module, "FlowMatchEulerDiscreteSDEScheduler")
    output = _patch.attribute(module, "SDESchedulerOutput")
    return [_patch.replacement(scheduler, "step", partial(_step, output))]


def _step(
    output: type,
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Generator = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = _RESULTS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> Any:
    """`FlowMatchEulerDiscreteSDEScheduler.step` in one pass, without waiting for the device.

    As in the original, `std_dev_t` is the standard deviation of the transition for "CPS", and lacks sqrt(-dt) for the
    other dynamics. At noise level 0 (evaluation) log-prob is 0, where the original returns NaN.
    """
    dynamics = dynamics_type or self.dynamics_type
    if reason := _unserved(dynamics, timestep, timestep_next, latents):
        return reason
    if timestep_next is None:
        sigma, sigma_next = look_up(self, timestep)
    else:
        sigma, sigma_next = timestep / 1000, timestep_next / 1000
    if self.is_eval:
        noise_level = 0.0
    elif noise_level is None:
        noise_level = self.get_noise_level_for_sigma(sigma)
    sigma, sigma_next, noise_level = (_rows(one, latents) for one in (sigma, sigma_next, noise_level))
    next_or_noise = {"noise": draw(latents, generator)} if next_latents is None else {"prev_sample": next_latents}
    # `sde_step` rounds the next latent to the dtype of `sample`. The original does so for a latent that it draws, but
    # not for one that is given.
    rounds = next_latents is None or next_latents.dtype == latents.dtype
    fused = sde_step(
        noise_pred,
        latents if rounds else latents.float(),
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_max=_rows(sigma_max or self.sigmas[1], latents),
        noise_level=noise_level,
        sampler=_SAMPLERS[dynamics],
        **next_or_noise,
    )
    dt = sigma_next - sigma
    std_dev_t = fused.std
    if dynamics == "Flow-SDE":
        std_dev_t = std_dev_t / torch.sqrt(-dt)
    elif dynamics == "Dance-SDE":
        std_dev_t = noise_level
    results = {
        "next_latents": fused.prev_sample.float(),
        "next_latents_mean": fused.prev_sample_mean,
        "noise_pred": noise_pred.float(),
        "log_prob": fused.log_prob if compute_log_prob else None,
        "std_dev_t": wide(std_dev_t.expand(len(latents)), latents.ndim),
        "dt": wide(dt.expand(len(latents)), latents.ndim),
    }
    if not return_dict:
        return tuple(results.values())
    for name in set(return_kwargs) - set(results):
        log.warning("flowdppo_ops: requested return keyword %r is not among the step's results", name)
    return output.from_dict({name: results[name] for name in return_kwargs if name in results})


def _unserved(dynamics: str, timestep: float | Tensor, timestep_next: float | Tensor | None, latents: Tensor) -> str:
    if dynamics not in _SAMPLERS:
        return f"dynamics {dynamics}"
    if timestep_next is None and (not isinstance(timestep, Tensor) or not timestep.is_floating_point()):
        return "a timestep that is no floating-point tensor, without the next one"
    if latents.dtype == torch.float64:
        return "float64 latents"
    return ""


def _rows(value: float | Sequence[float] | Tensor, latents: Tensor) -> Tensor:
    """`value` as float32 on the latents' device: 0-dim, or `[rows]` without trailing dimensions."""
    if isinstance(value, Real):  # filled on the device: copying from the host would wait for it
        return torch.full((), value, dtype=torch.float32, device=latents.device)
    value = torch.as_tensor(value).to(latents.device, torch.float32)
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1)


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: tuple[float, float],
    adv_clip_range: tuple[float, float],
    kl_beta: float = 0.0,
    kl_latents: Tensor | None = None,
    ref_kl_latents: Tensor | None = None,
    strict: bool | None = None,
) -> tuple[Tensor, Info]:
    """Replaces `GRPOTrainer.optimize` from "Compute loss" to the last `loss_info[...]`.

    Args:
        log_prob, old_log_prob, advantage: `[B]`; the advantage before it is clamped.
        clip_range, adv_clip_range: (low, high) of `training_args`, with a negative low.
        kl_beta, kl_latents, ref_kl_latents: the penalty `kl_beta * mean (kl_latents - ref_kl_latents)^2`. The latents
            are `noise_pred` with `kl_type` "v-based", `next_latents_mean` with "x-based".
        strict: True gives a blocked row of infinite ratio the trainer's gradient, NaN, and logs `policy_loss` with the
            penalty, as the trainer does. False gives gradient 0, and `policy_loss` without the penalty. None: see the
            module.

    Returns:
        `(loss, info)`. `loss` is 0-dim, differentiable in `log_prob` and `kl_latents`. `info` has detached tensors:
        `ratio unclipped_loss clipped_loss` `[B]`; 0-dim `policy_loss loss clip_frac_high clip_frac_low
        clip_frac_total`; with a penalty 0-dim `kl_div kl_loss`.
    """
    strict = wants_strict(_patch.strict if strict is None else strict)
    advantage = torch.clamp(advantage, *adv_clip_range)
    objective = FlowGRPO((-clip_range[0], clip_range[1]))
    result = policy_loss(strict, log_prob, advantages=advantage, old_log_prob=old_log_prob, objective=objective)
    info = _info(result.ratio, advantage, clip_range)
    return _penalised(result.loss, info, kl_beta, kl_latents, ref_kl_latents, strict)


def guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    next_latents_mean: Tensor,
    old_next_latents_mean: Tensor,
    std_dev_t: Tensor,
    dt: Tensor,
    clip_range: tuple[float, float],
    adv_clip_range: tuple[float, float],
    kl_beta: float = 0.0,
    kl_latents: Tensor | None = None,
    ref_kl_latents: Tensor | None = None,
    strict: bool | None = None,
) -> tuple[Tensor, Info]:
    """Replaces `GRPOGuardTrainer.optimize` from "Compute loss" to the last `loss_info[...]`.

    Args:
        next_latents_mean, std_dev_t, dt: as the step returns them.
        old_next_latents_mean: the mean that the rollout kept.
        strict: True combines the scale of every row with the log-prob of every row, as the trainer does, which gives a
            ratio of shape `[B, 1, ..., B]`. False takes each row's own scale. Both give the same loss if all rows are
            at the same step. Otherwise as in `grpo_loss`.
        The others: as in `grpo_loss`.

    Returns:
        As `grpo_loss`; `ratio unclipped_loss clipped_loss` have the shape of the ratio, and the loss is differentiable
        in `next_latents_mean` too.
    """
    strict = wants_strict(_patch.strict if strict is None else strict)
    advantage = torch.clamp(advantage, *adv_clip_range)
    scale = torch.sqrt(-dt) * std_dev_t
    if strict:
        # The fused call reads the latents once and returns a number per row; the rest is arithmetic on rows.
        squares = 2 * gaussian_kl(next_latents_mean, old_next_latents_mean, 1.0)
        ratio = torch.exp((log_prob - old_log_prob) * scale + squares / (2 * scale))
        unclipped, clipped = _surrogates(ratio, advantage, clip_range)
        loss = torch.mean(torch.maximum(unclipped, clipped))
    else:
        result = policy_loss(
            strict,
            log_prob,
            (next_latents_mean, old_next_latents_mean),
            advantages=advantage,
            std=scale,
            sqrt_dt=1.0,  # the trainer does not divide by -dt
            old_log_prob=old_log_prob,
            objective=GRPOGuard((-clip_range[0], clip_range[1]), per_row_scale=True),
        )
        loss, ratio = result.loss, result.ratio
    return _penalised(loss, _info(ratio.detach(), advantage, clip_range), kl_beta, kl_latents, ref_kl_latents, strict)


def dppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    mask_latents: Tensor,
    old_mask_latents: Tensor,
    kl_mask_threshold: float,
    adv_clip_range: tuple[float, float],
    mask_std: Tensor | None = None,
    kl_beta: float = 0.0,
    kl_latents: Tensor | None = None,
    ref_kl_latents: Tensor | None = None,
    strict: bool | None = None,
) -> tuple[Tensor, Info]:
    """Replaces `DPPOTrainer.optimize` (July 2026) from "Compute loss" to the last `loss_info[...]`, for latents that
    are one tensor.

    Args:
        mask_latents, old_mask_latents: latents of the policy and of the rollout, whose KL the mask compares: velocities
            with `kl_mask_type` "v-based", means of the next latent with "x-based".
        kl_mask_threshold, adv_clip_range: of `training_args`.
        mask_std: `[B]` or `[B, 1, ...]`, the standard deviation of the transition, for "x-based": the KL is
            `mean (p - q)^2 / (2 mask_std^2)`. None for "v-based": the KL is `mean (p - q)^2`.
        The others: as in `grpo_loss`.

    Returns:
        As `grpo_loss`, but `info` has `ratio kl_new_old unclipped_loss` `[B]` and 0-dim `policy_loss loss keep_ratio
        masked_ratio`, with a penalty `kl_div kl_loss`. A row whose KL is NaN is not blocked, as in the trainer.
    """
    strict = wants_strict(_patch.strict if strict is None else strict)
    advantage = torch.clamp(advantage, *adv_clip_range)
    # Without `mask_std`, `loss` divides the mean square by 2. So the threshold is divided by 2 here, which is exact.
    halved = 1.0 if mask_std is not None else 0.5
    result = policy_loss(
        strict,
        log_prob,
        (mask_latents.detach(), old_mask_latents),
        advantages=advantage,
        std=1.0 if mask_std is None else mask_std,
        old_log_prob=old_log_prob,
        objective=FlowDPPO(halved * kl_mask_threshold, normalize_kl=mask_std is not None, nan_kl="keep"),
    )
    policy = result.loss
    if strict:  # the trainer multiplies a blocked row by 0: NaN where its ratio is infinite
        policy = policy + (0.0 * result.ratio.masked_fill(result.keep, 0.0)).sum()
    kept = result.keep.float().mean()
    info = {
        "ratio": result.ratio,
        "kl_new_old": result.kl / halved,
        "unclipped_loss": -advantage * result.ratio,
        "keep_ratio": kept,
        "masked_ratio": 1.0 - kept,
    }
    return _penalised(policy, info, kl_beta, kl_latents, ref_kl_latents, strict)


def _surrogates(ratio: Tensor, advantage: Tensor, clip_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return -advantage * ratio, -advantage * torch.clamp(ratio, 1.0 + clip_range[0], 1.0 + clip_range[1])


def _info(ratio: Tensor, advantage: Tensor, clip_range: tuple[float, float]) -> Info:
    high, low = (ratio > 1.0 + clip_range[1]).float().mean(), (ratio < 1.0 + clip_range[0]).float().mean()
    unclipped, clipped = _surrogates(ratio, advantage, clip_range)
    info = {"ratio": ratio, "unclipped_loss": unclipped, "clipped_loss": clipped}
    return info | {"clip_frac_high": high, "clip_frac_low": low, "clip_frac_total": high + low}


def _penalised(
    policy_loss: Tensor, info: Info, kl_beta: float, latents: Tensor | None, ref_latents: Tensor | None, strict: bool
) -> tuple[Tensor, Info]:
    total, logged = policy_loss, policy_loss.detach()
    if kl_beta > 0:
        kl_div = 2 * gaussian_kl(latents, ref_latents, 1.0).mean()  # the mean of squares
        kl_loss = kl_beta * kl_div
        total = policy_loss + kl_loss
        info |= {"kl_div": kl_div.detach(), "kl_loss": kl_loss.detach()}
        if strict:  # the trainer's `loss += kl_loss` changes the tensor that it logs as policy_loss
            logged = total.detach()
    return total, info | {"policy_loss": logged, "loss": total.detach()}
