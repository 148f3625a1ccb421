"""Flow-Factory: its scheduler's step, replaced by `enable()`, and the losses that its trainers compute inline.

No plug-in point reaches a trainer's `optimize`, so a few lines of it change, as docs/trainers.md shows. The losses take
what is in scope there, and return the loss with what the trainer logs. `strict=None` takes what `enable` was told, and
else FLOWDPPO_OPS_STRICT; the step has no defect. Tested with Flow-Factory at a0b2bc5a; `dppo_loss` against the formulas
of its trainer of July 2026, which was read and not run.
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

    `std_dev_t` is the transition's standard deviation for "CPS" alone, and without sqrt(-dt) for the others. A noise
    level of 0 (evaluation) gives log-prob 0 where the original has NaN.
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
    given = {"noise": draw(latents, generator)} if next_latents is None else {"prev_sample": next_latents}
    # A next sample is scored in the dtype of the sample: one that is drawn is rounded to it, here as there, a given one
    # must not be.
    rounds = next_latents is None or next_latents.dtype == latents.dtype
    fused = sde_step(
        noise_pred,
        latents if rounds else latents.float(),
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_max=_rows(sigma_max or self.sigmas[1], latents),
        noise_level=noise_level,
        sampler=_SAMPLERS[dynamics],
        **given,
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
    """float32 on the latents' device, `[rows]` or 0-dim, however many trailing ones it came with."""
    if isinstance(value, Real):  # filled there: a copy from the host would wait
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
    """`GRPOTrainer.optimize` from "Compute loss" to the last `loss_info[...]`.

    Args:
        log_prob, old_log_prob, advantage: `[B]`; the advantage as it is, before it is clamped.
        clip_range, adv_clip_range: of `training_args`, (low, high) with a negative low.
        kl_beta, kl_latents, ref_kl_latents: the penalty `kl_beta * mean (kl_latents - ref_kl_latents)^2`, on
            `noise_pred` with `kl_type` "v-based", on `next_latents_mean` with "x-based".
        strict: True gives a blocked row of infinite ratio the trainer's gradient, NaN, and has the penalty in
            `policy_loss`, as it is logged there; False 0, and not. None: see above.

    Returns:
        `(loss, info)`: 0-dim, and detached `ratio unclipped_loss clipped_loss` `[B]`, `policy_loss loss clip_frac_high
        clip_frac_low clip_frac_total` 0-dim, and `kl_div kl_loss` with a penalty. Differentiable in `log_prob` and
        `kl_latents`.
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
    """`GRPOGuardTrainer.optimize` from "Compute loss" to the last `loss_info[...]`.

    Args:
        next_latents_mean, std_dev_t, dt: as the step returns them; `old_next_latents_mean` is what the rollout kept.
        strict: True pairs the scale of every row with the log-prob of every row, as the trainer does: its ratio is
            `[B, 1, ..., B]`. The same as False, each row with its own, while all rows are at one step. The
            rest as in `grpo_loss`.
        The others: as in `grpo_loss`.

    Returns:
        As `grpo_loss`, with `ratio unclipped_loss clipped_loss` in the shape of the ratio. Differentiable in
        `log_prob`, `next_latents_mean` and `kl_latents`.
    """
    strict = wants_strict(_patch.strict if strict is None else strict)
    advantage = torch.clamp(advantage, *adv_clip_range)
    scale = torch.sqrt(-dt) * std_dev_t
    if strict:
        # Rows of numbers from here on; the latents are read once, for their mean squares.
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
            sqrt_dt=1.0,  # no final division by -dt here
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
    """`DPPOTrainer.optimize` (July 2026) from "Compute loss" to the last `loss_info[...]`, with latents of one tensor.

    Args:
        mask_latents, old_mask_latents: what the KL mask compares, of the policy and of the rollout: velocities with
            `kl_mask_type` "v-based", means of the next latent with "x-based".
        kl_mask_threshold, adv_clip_range: of `training_args`.
        mask_std: `[B]` or `[B, 1, ...]`, the standard deviation of the transition, for "x-based": the KL is then
            `mean (p - q)^2 / (2 mask_std^2)`. None, for "v-based": `mean (p - q)^2`.
        The others: as in `grpo_loss`.

    Returns:
        As `grpo_loss`, with `ratio kl_new_old unclipped_loss` `[B]` and 0-dim `policy_loss loss keep_ratio
        masked_ratio`. A NaN KL blocks no row, as in the trainer.
    """
    strict = wants_strict(_patch.strict if strict is None else strict)
    advantage = torch.clamp(advantage, *adv_clip_range)
    # Without `mask_std` the squares are divided by 2 in the KL, and so is the threshold: both exactly.
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
    kept = result.keep.float().mean()
    info = {
        "ratio": result.ratio,
        "kl_new_old": result.kl / halved,
        "unclipped_loss": -advantage * result.ratio,
        "keep_ratio": kept,
        "masked_ratio": 1.0 - kept,
    }
    return _penalised(result.loss, info, kl_beta, kl_latents, ref_kl_latents, strict)


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
        kl_div = 2 * gaussian_kl(latents, ref_latents, 1.0).mean()  # the plain mean of squares
        kl_loss = kl_beta * kl_div
        total = policy_loss + kl_loss
        info |= {"kl_div": kl_div.detach(), "kl_loss": kl_loss.detach()}
        if strict:  # the trainer's `loss += kl_loss` adds to the tensor that it logs as policy_loss
            logged = total.detach()
    return total, info | {"policy_loss": logged, "loss": total.detach()}
