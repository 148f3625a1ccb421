"""flow_grpo, its fork with GRPO-Guard, and miles: scheduler steps, and the losses that their scripts compute inline.

A script computes its loss inside `main`, where nothing can be replaced. So an import and a few lines of it must be
edited, as docs/trainers.md shows. The steps have the arguments and results of the functions that they replace, and find
their sigmas without waiting for the device. The losses take the variables of `main`, and return the loss and the values
that the script logs, as 0-dim tensors on the device.

`strict=None` reads FLOWDPPO_OPS_STRICT. Tested with flow_grpo at ac4c86e8 and miles_diffusion at 2929e491.
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
    """Whether this process has called one of the functions below."""
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
    """Replaces flow_grpo's `sde_step_with_logprob` (`diffusers_patch/sd3_sde_with_logprob.py`).

    Args:
        self: the scheduler.
        model_output, sample, prev_sample: latents `[B, ...]`. If `prev_sample` is None it is drawn.
        timestep: `[B]`, or `[1]` for all rows.
        noise_level, generator: as in `flowdppo_ops.sde_step`.
        strict: True mixes the samples of token latents `[B, N, C]`, as the original does: its sigmas are always
            `[B, 1, 1, 1]`, which broadcasts everything to `[B, B, N, C]`. False scores each sample by itself.

    Returns:
        `(prev_sample, log_prob [B], mean, std_dev_t [B, 1, 1, 1])` in float32. `std_dev_t` lacks sqrt(-dt). Log-prob
        and mean are differentiable in `model_output`.

    Raises:
        IndexError: a timestep that the scheduler does not have, on the CPU. On a GPU the results are NaN.
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
    """Replaces `sde_step_with_logprob` of the fork with GRPO-Guard, for latents of any rank.

    It differs from flow_grpo's in this: `sde_type` is "sde" or "cps", and for "cps" `std_dev_t` is the standard
    deviation of the transition. `std_dev_t` is `[B, 1, ...]`, of the rank of the latents. With `return_sqrt_dt` there
    is a fifth result, `sqrt(sigma - sigma_next)`, in the shape of `std_dev_t`.
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
    """Replaces `sde_step_with_logprob` of miles (`miles/utils/sde_log_prob.py`), which scores and does not draw."""
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
    """`(prev_sample, log_prob, mean, std_dev_t, sqrt_dt)`. The last two are `[timesteps, 1, ...]`, of this `rank` or,
    if it is None, of the rank of the latents. `mixes`: every timestep is combined with every sample, `[timesteps, B,
    ...]`.
    """
    if sde_type not in _SAMPLERS:
        raise ValueError(f"flowdppo_ops: sde_type is {sde_type!r}, wanted one of {', '.join(_SAMPLERS)}")
    sigma, sigma_next = (one.to(sample.device) for one in look_up(scheduler, timestep))
    # `sde_step` rounds the next latent to the dtype of `sample`; the originals do not round it.
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
    """Replaces `scripts/train_sd3.py` from "grpo logic" to the last `info[...]`; also in the fork, without `rationorm`.

    Args:
        log_prob, old_log_prob, advantages: `[B]`; the advantages before they are clamped.
        clip_range, adv_clip_max, beta: of `config.train`.
        prev_sample_mean, ref_prev_sample_mean, std_dev_t: as the step returns them; needed if `beta > 0`.
        sqrt_dt: row vector, `sqrt(sigma - sigma_next)`; needed if `beta > 0` with `strict=False`.
        strict: True divides the reference penalty by `2 std_dev_t^2` and gives a blocked row of infinite ratio the
            gradient NaN, as the script does. False divides by `2 std_dev_t^2 sqrt_dt^2`, twice the variance of the
            transition, and gives a blocked row the gradient 0.

    Returns:
        `(loss, info)`. `loss` is 0-dim, differentiable in `log_prob` and `prev_sample_mean`. `info` has the script's
        values, 0-dim: `approx_kl clipfrac clipfrac_gt_one clipfrac_lt_one policy_loss loss`, and `kl_loss` if `beta >
        0`.

    Raises:
        ValueError: `sqrt_dt` is needed and None.
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
    """Replaces `train_sd3_GRPO_Guard.py` with `rationorm`, from "grpo logic" to the last `info[...]`.

    Args:
        prev_sample_mean, std_dev_t, sqrt_dt: as the step returns them.
        old_prev_sample_mean: the mean that the rollout kept.
        strict: True re-centres every log-ratio by the mean drift of the batch, as the script does, so that each ratio
            has a gradient in every sample's mean. False re-centres it by the row's own drift (GRPO-Guard, arXiv
            2510.22319). Otherwise as in `grpo_loss`.
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
        info["approx_kl"] = 0.5 * log_ratio.detach().square().mean()  # of the log-ratio before it is re-centred
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
    """The loss with the reference penalty, and the script's values. Those in `info` replace the result's."""
    values, total = result.metric_tensors(), result.loss
    info = {"approx_kl": values["approx_kl"]} | {_CLIP_NAMES[name]: values[name] for name in CLIP_METRICS} | info
    info["policy_loss"] = result.loss.detach()
    if beta > 0:
        if not strict and sqrt_dt is None:
            raise ValueError(
                "flowdppo_ops: sqrt_dt is None, wanted a row vector: with strict=False the reference penalty is the "
                "KL of the transition, whose std is std_dev_t * sqrt_dt"
            )
        kl_loss = gaussian_kl(mean, ref_mean, std_dev_t if strict else std_dev_t * sqrt_dt).mean()
        info["kl_loss"] = kl_loss.detach()
        total = result.loss + beta * kl_loss
    return total, info | {"loss": total.detach()}
