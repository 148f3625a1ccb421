"""flow_grpo, its fork with GRPO-Guard, and miles: scheduler steps, and the losses that their scripts compute inline.

No plug-in point reaches the scripts: an import and a few lines of `main` change, as docs/trainers.md shows. The steps
have the arguments and results of the functions they stand in for, and find their sigmas without waiting for the device.
The losses take what is in scope where a script computes its own, and return it with the values that the script logs:
0-dim tensors that stay on the device.

`strict=None` asks the environment, FLOWDPPO_OPS_STRICT. Tested with flow_grpo at ac4c86e8 and miles_diffusion at
2929e491.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import FlowGRPO, GRPOGuard, PolicyLoss, sde_step
from .._torch import Generator
from ._patch import log, wants_strict
from ._schedule import draw, look_up, wide
from ._terms import CLIP_METRICS, gaussian_kl, policy_loss

__all__ = [
    "enabled",
    "grpo_loss",
    "guard_loss",
    "guard_sde_step_with_logprob",
    "miles_sde_step_with_logprob",
    "sde_step_with_logprob",
]

_SAMPLERS = {"sde": "flow_sde", "cps": "cps"}
_CLIP_NAMES = dict(zip(CLIP_METRICS, ("clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"), strict=True))

Info = dict[str, Tensor]


def enabled() -> bool:
    """Whether this process has used one of the functions below."""
    return _announce.cache_info().currsize > 0


@cache
def _announce(strict: bool) -> None:
    log.info("flowdppo_ops: flow_grpo's script runs fused, strict=%s", strict)


def _strict(strict: bool | None) -> bool:
    strict = wants_strict(strict)
    _announce(strict)
    return strict


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generator = None,
    *,
    strict: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flow_grpo's `sde_step_with_logprob` (`diffusers_patch/sd3_sde_with_logprob.py`); `self` is the scheduler.

    Args:
        model_output, sample, prev_sample: latents `[B, ...]`; without `prev_sample` it is drawn.
        timestep: `[B]`, or `[1]` for all rows.
        strict: True mixes the samples of token latents `[B, N, C]`, as the original does: its sigmas are always
            `[B, 1, 1, 1]`, so that everything becomes `[B, B, N, C]`. False scores each sample by itself.

    Returns:
        `(prev_sample, log_prob [B], mean, std_dev_t [B, 1, 1, 1])` in float32; `std_dev_t` is without sqrt(-dt).
        Differentiable in `model_output` through log-prob and mean.

    Raises:
        IndexError: a timestep that is not the scheduler's (on a GPU the results are NaN instead).
    """
    mixes = _strict(strict) and sample.ndim == 3
    latents = (model_output, sample, prev_sample)
    return _step(self, *latents, timestep, noise_level, generator, rank=4, mixes=mixes)[:4]


def guard_sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generator = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """The function of that name in the fork with GRPO-Guard, for latents of any rank.

    As `sde_step_with_logprob`, and: `sde_type` "sde" or "cps"; with `return_sqrt_dt` a fifth result, `[B, 1, ...]` as
    `std_dev_t` is. `std_dev_t` of "cps" is the transition's standard deviation.
    """
    _strict(None)
    latents = (model_output, sample, prev_sample)
    results = _step(self, *latents, timestep, noise_level, generator, sde_type)
    return results if return_sqrt_dt else results[:4]


def miles_sde_step_with_logprob(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    noise_level: float = 0.7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sde_step_with_logprob` of miles (`miles/utils/sde_log_prob.py`), which only scores."""
    _strict(None)
    return _step(scheduler, model_output, sample, prev_sample, timestep, noise_level)[:4]


def _step(
    scheduler: Any,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    timestep: Tensor,
    noise_level: float,
    generator: Generator = None,
    sde_type: str = "sde",
    rank: int | None = None,
    mixes: bool = False,
) -> tuple[Tensor, ...]:
    """prev_sample, log_prob, mean, std_dev_t, sqrt_dt; the last two `[timesteps, 1, ...]`, of `rank` or the latents'.

    `mixes`: every timestep with every sample, `[timesteps, B, ...]`.
    """
    if sde_type not in _SAMPLERS:
        raise ValueError(f"flowdppo_ops: sde_type is {sde_type!r}, wanted one of {', '.join(_SAMPLERS)}")
    sigma, sigma_next = (one.to(sample.device) for one in look_up(scheduler, timestep))
    # What is drawn has the dtype of the sample, and the originals do not round it.
    latents = {"model_output": model_output, "sample": sample.float()}
    latents |= {"noise": draw(sample, generator)} if prev_sample is None else {"prev_sample": prev_sample}
    if mixes:
        latents = {name: one.expand(len(sigma), *one.shape) for name, one in latents.items()}
    step = sde_step(
        **latents,
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_max=scheduler.sigmas[1].to(sample.device),
        noise_level=noise_level,
        sampler=_SAMPLERS[sde_type],
    )
    if prev_sample is None:
        prev_sample = step.prev_sample
    sqrt_dt = torch.sqrt(sigma - sigma_next)
    std = step.std[: len(sigma)]
    std_dev_t = std / sqrt_dt if sde_type == "sde" else std
    rows = (wide(one, rank or sample.ndim) for one in (std_dev_t, sqrt_dt))
    return prev_sample.float(), step.log_prob, step.prev_sample_mean, *rows


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float,
    beta: float = 0.0,
    prev_sample_mean: Tensor | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    std_dev_t: Tensor | None = None,
    sqrt_dt: Tensor | None = None,
    strict: bool | None = None,
) -> tuple[Tensor, Info]:
    """`scripts/train_sd3.py` from "grpo logic" to the last `info[...]`; also the fork's without `rationorm`.

    Args:
        log_prob, old_log_prob, advantages: `[B]`; advantages as they are, before they are clamped.
        clip_range, adv_clip_max, beta: of `config.train`.
        prev_sample_mean, ref_prev_sample_mean, std_dev_t: as the step returns them; needed if `beta > 0`.
        sqrt_dt: row vector, `sqrt(sigma - sigma_next)`; needed with `strict=False` if `beta > 0`.
        strict: True divides the reference penalty by `2 std_dev_t^2`, as the script does, and gives a blocked row of
            infinite ratio the script's gradient, NaN. False divides by the transition's variance, `2 std_dev_t^2
            sqrt_dt^2`, and the gradient of a blocked row is 0.

    Returns:
        `(loss, info)`: 0-dim, and the script's logging values `approx_kl clipfrac clipfrac_gt_one clipfrac_lt_one
        policy_loss loss`, and `kl_loss` if `beta > 0`. Differentiable in `log_prob` and `prev_sample_mean`.
    """
    strict = _strict(strict)
    objective = FlowGRPO(clip_range, adv_clip_max)
    result = policy_loss(strict, log_prob, advantages=advantages, old_log_prob=old_log_prob, objective=objective)
    return _penalised(result, {}, beta, prev_sample_mean, ref_prev_sample_mean, std_dev_t, sqrt_dt, strict)


def guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    clip_range: float,
    adv_clip_max: float,
    beta: float = 0.0,
    ref_prev_sample_mean: Tensor | None = None,
    strict: bool | None = None,
) -> tuple[Tensor, Info]:
    """`train_sd3_GRPO_Guard.py` with `rationorm`, from "grpo logic" to the last `info[...]`.

    Args:
        prev_sample_mean, std_dev_t, sqrt_dt: as the step returns them; `old_prev_sample_mean` is what the rollout kept.
        strict: True re-centres every log-ratio by the mean of the batch's drifts, as the script does, whose mean runs
            over all dimensions: each sample's ratio then has a gradient in every sample's mean. False takes each row's
            own drift (GRPO-Guard, arXiv 2510.22319). The rest as in `grpo_loss`.
        The others: as in `grpo_loss`.

    Returns:
        As `grpo_loss`.
    """
    strict = _strict(strict)
    info = {}
    if strict:
        mean_sqrt_dt = sqrt_dt.mean()
        scale = mean_sqrt_dt * std_dev_t.mean()
        log_ratio = log_prob - old_log_prob
        result = policy_loss(
            strict,
            (log_ratio + gaussian_kl(prev_sample_mean, old_prev_sample_mean, scale).mean()) * scale,
            advantages=advantages,
            old_log_prob=torch.zeros_like(log_ratio),
            weights=1 / mean_sqrt_dt**2,
            objective=FlowGRPO(clip_range, adv_clip_max),
        )
        info["approx_kl"] = 0.5 * log_ratio.detach().square().mean()  # of the log-ratio as it was
    else:
        result = policy_loss(
            strict,
            log_prob,
            (prev_sample_mean, old_prev_sample_mean),
            advantages=advantages,
            std=std_dev_t * sqrt_dt,
            sqrt_dt=sqrt_dt,
            old_log_prob=old_log_prob,
            objective=GRPOGuard(clip_range, adv_clip_max),
        )
    return _penalised(result, info, beta, prev_sample_mean, ref_prev_sample_mean, std_dev_t, sqrt_dt, strict)


def _penalised(
    result: PolicyLoss,
    info: Info,
    beta: float,
    mean: Tensor | None,
    ref_mean: Tensor | None,
    std_dev_t: Tensor | None,
    sqrt_dt: Tensor | None,
    strict: bool,
) -> tuple[Tensor, Info]:
    """With the reference penalty, and the script's logging values; `info` has those that are not the result's."""
    values, total = result.metric_tensors(), result.loss
    info = {"approx_kl": values["approx_kl"]} | {_CLIP_NAMES[name]: values[name] for name in CLIP_METRICS} | info
    info["policy_loss"] = result.loss.detach()
    if beta > 0:
        if not strict and sqrt_dt is None:
            raise ValueError(
                "flowdppo_ops: sqrt_dt is missing: with strict=False the reference penalty is the step's KL"
            )
        kl_loss = gaussian_kl(mean, ref_mean, std_dev_t if strict else std_dev_t * sqrt_dt).mean()
        info["kl_loss"] = kl_loss.detach()
        total = result.loss + beta * kl_loss
    return total, info | {"loss": total.detach()}
