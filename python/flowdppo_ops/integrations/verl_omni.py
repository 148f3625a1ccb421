"""verl-omni with its losses and its scheduler step fused.

`actor_rollout_ref.model.external_lib=flowdppo_ops.integrations.verl_omni` is all that a recipe needs: every worker
imports this module, which calls `enable()`. Replaced are the losses `flow_dppo`, `flow_grpo`, `dance_grpo`,
`grpo_guard` and `kl` of the registry, and `FlowMatchSDEDiscreteScheduler.sample_previous_step`; with `strict=False`
also how a loss's extremes are put together over micro-batches. `disable()` takes all of it back.

What the trainer accepts and the fused functions do not (another device, half-precision means with `strict=True`, shapes
that only broadcasting gives a meaning to) goes to the trainer's own function; `fallbacks()` counts it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._sde_step import sde_step
from ..objectives import FlowDPPO, FlowGRPO, GRPOGuard, Objective
from ..policy_loss import loss
from ..result import PolicyLoss
from ._patch import Patch, Replacement
from ._schedule import look_up

__all__ = ["disable", "enable", "enabled", "fallbacks"]

_patch = Patch("verl-omni", "verl-omni a1139ba, verl 0.9.1, diffusers 0.42.1")

_SAMPLERS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}
_POLICY_METRICS = {
    "actor/ppo_kl": "ppo_kl",
    "actor/pg_clipfrac": "clip_fraction",
    "actor/pg_clipfrac_higher": "clipfrac_gt_one",
    "actor/pg_clipfrac_lower": "clipfrac_lt_one",
    "actor/ratio_mean": "ratio_mean",
    "actor/ratio_std": "ratio_std",
}
_DPPO_METRICS = {
    "actor/ppo_kl": "ppo_kl",
    "actor/approx_kl": "approx_kl",
    "actor/ratio_mean": "ratio_mean",
    "actor/ratio_std": "ratio_std",
    "actor/ratio_min": "ratio_min",
    "actor/ratio_max": "ratio_max",
    "actor/kl_new_old_mean": "kl_new_old_mean",
    "actor/kl_new_old_max": "kl_new_old_max",
    "actor/kl_mask_fraction": "kl_mask_fraction",
    "actor/pos_rm_fraction": "pos_rm_fraction",
    "actor/neg_rm_fraction": "neg_rm_fraction",
    "actor/masked_fraction": "masked_fraction",
    "actor/unmasked_fraction": "unmasked_fraction",
}

Result = tuple[Tensor, dict[str, float]]


def enable(strict: bool | None = None) -> None:
    """Replaces what the module names. Twice is once; the other `strict` replaces the first.

    Args:
        strict: True reproduces the trainer to rounding, False does what the maths says where the two differ
            (`flowdppo_ops.integrations.DEFECTS`); None reads FLOWDPPO_OPS_STRICT, "1" where it is not set.

    Raises:
        Incompatible: verl-omni cannot be imported, or is not what this was written for; nothing is replaced then.
    """
    _patch.enable(strict, _replacements)


def disable() -> None:
    """Puts the trainer's own losses and step back."""
    _patch.disable()


def enabled() -> bool:
    return _patch.strict is not None


def fallbacks() -> dict[str, int]:
    """How many calls went to the trainer's own function, or took a number as it does, and why."""
    return dict(_patch.fallbacks)


# ---- losses ----------------------------------------------------------------------------------------------------------
#
# Each function has the parameters of the trainer's `compute_loss`, after `strict`, and returns what it returns; or a
# string, the reason why the trainer's own has to run.


def _flow_dppo(
    strict: bool,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    old_prev_sample_mean: Tensor,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    rollout_is_weights: Tensor | None = None,
) -> Result | str:
    means, rows = (prev_sample_mean, old_prev_sample_mean), (old_log_prob, advantages.detach(), rollout_is_weights)
    if reason := _unserved(strict, log_prob, rows, means, std_dev_t, sqrt_dt):
        return reason
    if strict and sqrt_dt.ndim > std_dev_t.ndim:
        return "std_dev_t 0-dim and sqrt_dt of rows: the trainer lays it along the last latent axis"
    settings = config.diffusion_loss
    std = std_dev_t.flatten() * sqrt_dt if strict else _or_infinity(_transition_std(std_dev_t, sqrt_dt))
    objective = _objective(
        FlowDPPO,
        kl_mask_threshold=float(settings.kl_mask_threshold),
        normalize_kl=bool(getattr(settings, "add_kl_coefficient", True)),
        nan_kl="keep" if strict else "mask",
    )
    result = _policy_loss(strict, objective, log_prob, *rows, *means, std=std)
    metrics = _metrics(result, _DPPO_METRICS)
    count = result.ratio.numel()
    metrics["actor/ratio_std"] *= math.sqrt((count - 1) / count)  # this loss alone logs the biased one
    return result.loss, metrics


def _flow_grpo(
    strict: bool,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> Result | str:
    rows = (old_log_prob, advantages, rollout_is_weights)
    if reason := _unserved(strict, log_prob, rows):
        return reason
    result = _policy_loss(strict, _clipped(FlowGRPO, config), log_prob, *rows, None, None)
    return result.loss, _clip_metrics(strict, result)


def _grpo_guard(
    strict: bool,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    old_prev_sample_mean: Tensor,
    prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    rollout_is_weights: Tensor | None = None,
) -> Result | str:
    means, rows = (prev_sample_mean, old_prev_sample_mean), (old_log_prob, advantages, rollout_is_weights)
    if reason := _unserved(strict, log_prob, rows, means, std_dev_t, sqrt_dt):
        return reason
    if strict:  # `GRPOGuard` takes sqrt_dt out again
        std = std_dev_t.flatten() * sqrt_dt
    else:  # a deterministic row: ratio 1, gradient 0
        std = _transition_std(std_dev_t, sqrt_dt)
        random = (std > 0).expand(log_prob.shape)
        weights = random.to(log_prob.dtype) if rollout_is_weights is None else rollout_is_weights * random
        rows = (torch.where(random, old_log_prob, log_prob.detach()), advantages, weights)
        std = torch.where(random, std, 1e15)  # the drift has no part in its exponent, drift / (2 std)
    objective = _clipped(GRPOGuard, config, per_row_scale=not strict)
    result = _policy_loss(strict, objective, log_prob, *rows, *means, std=std, sqrt_dt=sqrt_dt)
    return result.loss, _clip_metrics(strict, result)


def _kl(strict: bool, *, prev_sample_mean: Tensor, ref_prev_sample_mean: Tensor, std_dev_t: Tensor) -> Result | str:
    """The reference term of `loss`, next to a policy loss of 0."""
    if prev_sample_mean.ndim < 3:
        return "means of a rank below 3, which the trainer refuses"
    zeros = prev_sample_mean.detach().new_zeros(len(prev_sample_mean))
    if reason := _unserved(strict, zeros, (), (prev_sample_mean, ref_prev_sample_mean), std_dev_t):
        return reason
    result = loss(
        prev_sample_mean,
        None,
        zeros,
        log_prob=zeros,
        old_log_prob=zeros,
        ref_prev_sample_mean=ref_prev_sample_mean,
        ref_kl_weight=1.0,
        ref_std=std_dev_t if strict else _or_infinity(_transition_std(std_dev_t, None)),
        objective=_objective(FlowGRPO),
    )
    return result.loss, {"actor/kl_loss": result.metrics()["kl_loss"]}


_LOSSES = {
    "flow_dppo": ("FlowDPPOLoss", _flow_dppo),
    "flow_grpo": ("FlowGRPOLoss", _flow_grpo),
    "dance_grpo": ("FlowGRPOLoss", _flow_grpo),
    "grpo_guard": ("GRPOGuardLoss", _grpo_guard),
    "kl": ("KLLoss", _kl),
}


def _unserved(
    strict: bool,
    log_prob: Tensor,
    rows: tuple[Tensor | None, ...],
    means: tuple[Tensor, ...] = (),
    std_dev_t: Tensor | None = None,
    sqrt_dt: Tensor | None = None,
) -> str:
    """Why the trainer's own function has to run; empty where this package's does the same or better.

    `means`: that of the policy first. The trainer's broadcasting gives some other shapes a meaning too, seldom one that
    is meant, and they do not come up in its workers.
    """
    shape, device, dtype = log_prob.shape, log_prob.device, log_prob.dtype
    constants = [t for t in (*rows, *means[1:], std_dev_t, sqrt_dt) if t is not None]
    tensors = [log_prob, *means[:1], *constants]
    allowed = {torch.float32} if device.type == "cuda" else {torch.float32, torch.float64}
    if not strict:
        allowed |= {torch.bfloat16, torch.float16}
    if device.type not in ("cpu", "cuda"):
        return f"device {device.type}"
    if any(t.device != device for t in tensors):
        return "several devices"
    if strict and any(t.dtype != dtype for t in tensors):
        return "mixed precision"
    if any(t.dtype not in allowed for t in tensors):
        return "a dtype that is not float32"
    if torch.is_grad_enabled() and any(t.requires_grad for t in constants):
        return "a gradient to something that is no output of the model"
    if any(t is not None and t.shape != shape for t in rows):
        return "log-probs, advantages or weights of different shapes"
    if not means:
        return ""
    ones = (1,) * (means[0].ndim - 1)
    if any(m.shape != means[0].shape or m.shape[:1] != shape for m in means):
        return "means of different shapes, or not of one row per log-prob"
    if std_dev_t.ndim and std_dev_t.shape != shape + ones:
        return "std_dev_t neither 0-dim nor [B, 1, ...]"
    if sqrt_dt is not None and sqrt_dt.ndim and sqrt_dt.shape != shape:
        return "sqrt_dt neither 0-dim nor [B]"
    return ""


def _policy_loss(
    strict: bool,
    objective: Objective,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    mean: Tensor | None,
    old_mean: Tensor | None,
    std: Tensor | None = None,
    sqrt_dt: Tensor | None = None,
) -> PolicyLoss:
    if strict:
        log_prob = log_prob.view_as(log_prob)  # for the hook: it is not to see the gradients of other losses
    result = loss(
        mean,
        old_mean,
        advantages,
        std=std,
        sqrt_dt=sqrt_dt,
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        weights=weights,
        objective=objective,
    )
    if strict and log_prob.requires_grad:
        ratio = result.ratio
        # The backward of the trainer's exp: 0 * inf.
        log_prob.register_hook(lambda grad: grad.masked_fill((grad == 0) & (ratio == math.inf), math.nan))
    return result


def _transition_std(std_dev_t: Tensor, sqrt_dt: Tensor | None) -> Tensor:
    """Rows, or 0-dim: the standard deviation of the transition.

    The trainer's `std_dev_t` does not tell whether sqrt(-dt) is in it: `sample_previous_step` has left the deviation
    with it.
    """
    std = getattr(std_dev_t, "_flowdppo_std", None)
    if std is None:
        _patch.fallbacks["std_dev_t of an unknown sampler, taken for Flow-SDE's"] += 1
        std = std_dev_t.flatten() if std_dev_t.ndim else std_dev_t
        std = std if sqrt_dt is None else std * sqrt_dt
    return std


def _or_infinity(std: Tensor) -> Tensor:
    """Where `std` is 0 nothing is random: the KL is 0."""
    return std.masked_fill(std == 0, math.inf)


@functools.lru_cache(maxsize=64)
def _objective(kind: type[Objective], **settings: Any) -> Objective:
    return kind(**settings)


def _clipped(kind: type[Objective], config: Any, **more: bool) -> Objective:
    settings = config.diffusion_loss
    return _objective(kind, clip_range=float(settings.clip_ratio), adv_clip_max=float(settings.adv_clip_max), **more)


def _metrics(result: PolicyLoss, names: dict[str, str]) -> dict[str, float]:
    values = result.metrics()
    return {theirs: values[ours] for theirs, ours in names.items()}


def _clip_metrics(strict: bool, result: PolicyLoss) -> dict[str, float]:
    metrics = _metrics(result, _POLICY_METRICS)
    if strict and result.ratio.numel() == 1:
        metrics["actor/ratio_std"] = math.nan
    return metrics


# ---- the scheduler step ----------------------------------------------------------------------------------------------


def _fused_step(original: Callable[..., Any], randn_tensor: Callable[..., Tensor]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_previous_step(
        self,
        sample,
        model_output,
        timestep=None,
        generator=None,
        per_token_timesteps=None,
        noise_level=0.7,
        prev_sample=None,
        sde_type="sde",
        return_logprobs=True,
        return_sqrt_dt=False,
        include_logprob_normalizer=True,
    ):
        latents = (sample, model_output) if prev_sample is None else (sample, model_output, prev_sample)
        reason = _refused(latents, per_token_timesteps, sde_type)
        reason = reason or _unserved_latents(*latents) or _unserved_schedule(self, sample, timestep, noise_level)
        if reason:
            _patch.fall_back(f"sample_previous_step: {reason}")
            return original(
                self,
                sample,
                model_output,
                timestep,
                generator,
                per_token_timesteps,
                noise_level,
                prev_sample,
                sde_type,
                return_logprobs,
                return_sqrt_dt,
                include_logprob_normalizer,
            )
        if timestep is None:
            index = self.step_index
            sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        else:
            sigma, sigma_next = look_up(self, timestep.to(self.timesteps.dtype))
        noise = None
        if prev_sample is None:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        step = sde_step(
            model_output,
            sample,
            sigma=sigma,
            sigma_next=sigma_next,
            noise_level=noise_level,
            sampler=_SAMPLERS[sde_type],
            sigma_max=self.sigmas[1],
            prev_sample=prev_sample,
            noise=noise,
            log_prob_normalizer=include_logprob_normalizer,
        )
        sqrt_dt = torch.sqrt(sigma - sigma_next)
        std_dev_t = step.std / sqrt_dt if sde_type == "sde" else step.std
        if timestep is None and getattr(noise_level, "ndim", 0) == 0:
            std_dev_t = std_dev_t[0]
        else:
            std_dev_t = std_dev_t.view(-1, *(1 for _ in sample.shape[1:]))
        std_dev_t._flowdppo_std = step.std
        results = (
            step.prev_sample if prev_sample is None else prev_sample,
            step.log_prob if return_logprobs else None,
            step.prev_sample_mean,
            std_dev_t,
        )
        if return_sqrt_dt:
            return *results, sqrt_dt if sqrt_dt.ndim else sqrt_dt.expand(len(sample)).clone()
        return results

    return sample_previous_step


def _refused(latents: tuple[Tensor, ...], per_token_timesteps: Any, sde_type: str) -> str:
    refused = per_token_timesteps is not None or sde_type not in _SAMPLERS
    return "arguments that it refuses" if refused or any(t.dtype != torch.float32 for t in latents) else ""


def _unserved_latents(sample: Tensor, *others: Tensor) -> str:
    if sample.device.type not in ("cpu", "cuda"):
        return f"device {sample.device.type}"
    if sample.ndim == 0 or any(t.shape != sample.shape or t.device != sample.device for t in others):
        return "latents of different shapes or devices"
    if torch.is_grad_enabled() and sample.requires_grad:
        return "a gradient to the sample"
    return ""


def _unserved_schedule(scheduler: Any, sample: Tensor, timestep: Any, noise_level: Any) -> str:
    sigmas, rows = scheduler.sigmas, (len(sample),)
    if sigmas.dtype != torch.float32 or sigmas.device != sample.device:
        return "sigmas that are not float32, or not where the sample is"
    if timestep is None:
        if scheduler.step_index is None:
            return "no timestep and no step_index"
    elif not isinstance(timestep, Tensor) or timestep.shape != rows:
        return "a timestep that is not one per sample"
    if isinstance(noise_level, Tensor):
        wide = rows + (1,) * (sample.ndim - 1)
        if noise_level.dtype != torch.float32 or (noise_level.ndim and noise_level.shape != wide):
            return "a noise_level that is neither 0-dim nor [B, 1, ...] in float32"
        if noise_level.device != sample.device:
            return "a noise_level on another device than the sample"
    elif not isinstance(noise_level, Real):
        return "a noise_level that is no number"
    return ""


# ---- what is replaced ------------------------------------------------------------------------------------------------


def _replacements(strict: bool) -> list[Replacement]:
    algos = _patch.module("verl_omni.trainer.diffusion.diffusion_algos")
    registry = _patch.attribute(algos, "DIFFUSION_LOSS_REGISTRY")
    found = []
    for name, (class_name, compute) in _LOSSES.items():
        trainers = _patch.attribute(algos, class_name)
        registered = _patch.original(registry, name)
        if type(registered) is not trainers:
            raise _patch.incompatible(f"loss {name!r}", f"a {type(registered).__name__}", f"a {class_name}")
        _, *parameters = _parameters(compute)
        _patch.check_parameters(f"{class_name}.compute_loss", trainers.compute_loss, parameters)
        _patch.check_parameters(f"{class_name}.__call__", trainers.__call__, ("self", "config", "model_output", "data"))
        found.append(Replacement(registry, name, _fused_loss(trainers, compute, strict)()))

    steps = _patch.module("verl_omni.pipelines.schedulers.flow_match_sde")
    scheduler = _patch.attribute(steps, "FlowMatchSDEDiscreteScheduler")
    _patch.attribute(scheduler, "sample_previous_step")
    original = _patch.original(scheduler, "sample_previous_step")
    step = _fused_step(original, _patch.attribute(steps, "randn_tensor"))
    _patch.check_parameters("FlowMatchSDEDiscreteScheduler.sample_previous_step", original, _parameters(step))
    found.append(Replacement(scheduler, "sample_previous_step", step))

    if not strict:
        workers = _patch.module("verl_omni.workers.utils.losses")
        _patch.attribute(workers, "Metric")
        found.append(Replacement(workers, "Metric", _Metrics(_patch.original(workers, "Metric"))))
    return found


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _fused_loss(trainers: type, compute: Callable[..., Result | str], strict: bool) -> type:
    """The trainer's class with another `compute_loss`: it validates, is called and prepares batches as ever."""

    @functools.wraps(trainers.compute_loss.__func__)
    def compute_loss(cls, **inputs: Any) -> Result:
        found = compute(strict, **inputs)
        if isinstance(found, str):
            _patch.fall_back(f"{trainers.__name__}: {found}")
            return trainers.compute_loss(**inputs)
        return found

    members = {"compute_loss": classmethod(compute_loss), "__module__": __name__, "__doc__": trainers.__doc__}
    return type(trainers.__name__, (trainers,), members)


class _Metrics:
    """`verl.utils.metric.Metric` for the worker's losses, with the extremes put together as extremes.

    The worker asks for the mean of every metric over the micro-batches and ranks, of `ratio_max` too.
    """

    def __init__(self, trainers: Any) -> None:
        self._trainers = trainers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._trainers(*args, **kwargs)

    def from_dict(self, data: dict[str, float], aggregation: Any) -> dict[str, Any]:
        of = {"min": "min", "max": "max"}
        return {
            name: self._trainers(value=value, aggregation=of.get(name.rpartition("_")[2], aggregation))
            for name, value in data.items()
        }


enable()
