"""verl-omni with its losses and its scheduler step fused.

A recipe needs `actor_rollout_ref.model.external_lib=flowdppo_ops.integrations.verl_omni`: then every worker imports
this module, which calls `enable()`. That replaces the losses `flow_dppo`, `flow_grpo`, `dance_grpo`, `grpo_guard` and
`kl` of the registry, and `FlowMatchSDEDiscreteScheduler.sample_previous_step`. With `strict=False` it also merges
minima and maxima over micro-batches as such. `disable()` puts the originals back.

The trainer's own function runs where the fused one cannot: on other devices, for half-precision means with
`strict=True`, and for shapes that only fit by broadcasting. `fallbacks()` counts these calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._sde_step import sde_step
from ..objectives import FlowDPPO, FlowGRPO, GRPOGuard, Objective
from ..result import PolicyLoss
from ._patch import Patch, Replacement
from ._schedule import look_up, wide
from ._terms import CLIP_METRICS, DPPO_METRICS, Means, gaussian_kl, policy_loss

__all__ = ["disable", "enable", "enabled", "fallbacks"]

_patch = Patch("verl-omni", tested="verl-omni a1139ba, verl 0.9.1, diffusers 0.42.1")
enable, disable, enabled, fallbacks = _patch.enable, _patch.disable, _patch.enabled, _patch.count_fallbacks

_SAMPLERS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}
_CLIP_NAMES = dict(zip(CLIP_METRICS, ("pg_clipfrac", "pg_clipfrac_higher", "pg_clipfrac_lower"), strict=True))

Result = tuple[Tensor, dict[str, float]]
Rows = dict[str, Tensor | None]  # `old_log_prob`, `advantages` and `weights`

# The fields of `config.diffusion_loss` in the tested version: of these losses, and of others.
_SETTINGS = {"loss_mode", "clip_ratio", "adv_clip_max", "kl_mask_threshold", "add_kl_coefficient"}
_SETTINGS |= {"mix_beta", "ref_kl_coef", "adaptive_weight_min", "dpo_beta"}

# ---- losses ----------------------------------------------------------------------------------------------------------
#
# The last parameters of each function in `_LOSSES` are those of the trainer's `compute_loss`; `_replacements` binds the
# first ones. A function returns what `compute_loss` returns, or a string, the reason why the trainer's own must run.


def _loss_of_means(
    compute: Callable[..., Result | str],
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
    """`compute_loss` of the losses that take means, Flow-DPPO and GRPO-Guard; `compute` is one of them."""
    means = (prev_sample_mean, old_prev_sample_mean)
    rows = {"old_log_prob": old_log_prob, "advantages": advantages, "weights": rollout_is_weights}
    if reason := _unserved(strict, log_prob, rows, means, std_dev_t, sqrt_dt) or _new_setting(config.diffusion_loss):
        return reason
    return compute(strict, config.diffusion_loss, log_prob, rows, means, std_dev_t, sqrt_dt)


def _flow_dppo(
    strict: bool, settings: Any, log_prob: Tensor, rows: Rows, means: Means, std_dev_t: Tensor, sqrt_dt: Tensor
) -> Result | str:
    if strict and sqrt_dt.ndim > std_dev_t.ndim:
        return "a 0-dim std_dev_t with one sqrt_dt per row, which the trainer broadcasts along the last latent axis"
    std = std_dev_t.flatten() * sqrt_dt if strict else _or_infinity(_transition_std(std_dev_t, sqrt_dt))
    objective = _objective(
        FlowDPPO,
        kl_mask_threshold=float(settings.kl_mask_threshold),
        normalize_kl=bool(getattr(settings, "add_kl_coefficient", True)),
        nan_kl="keep" if strict else "mask",
    )
    rows["advantages"] = rows["advantages"].detach()
    result = policy_loss(strict, log_prob, means, objective=objective, std=std, **rows)
    values, count = result.metrics(), result.ratio.numel()
    values["ratio_std"] *= math.sqrt((count - 1) / count)  # the trainer's Flow-DPPO logs the biased deviation
    return result.loss, {f"actor/{name}": values[name] for name in ("ppo_kl", *DPPO_METRICS)}


def _grpo_guard(
    strict: bool, settings: Any, log_prob: Tensor, rows: Rows, means: Means, std_dev_t: Tensor, sqrt_dt: Tensor
) -> Result:
    if strict:  # `GRPOGuard` divides by sqrt_dt again, which leaves the trainer's std_dev_t
        std = std_dev_t.flatten() * sqrt_dt
    else:  # a deterministic row gets ratio 1 and gradient 0
        std = _transition_std(std_dev_t, sqrt_dt)
        random, weights = (std > 0).expand(log_prob.shape), rows["weights"]
        rows["weights"] = random.to(log_prob.dtype) if weights is None else weights * random
        rows["old_log_prob"] = torch.where(random, rows["old_log_prob"], log_prob.detach())
        std = torch.where(random, std, 1e15)  # makes drift / (2 std) in the exponent negligible
    objective = _clipped(GRPOGuard, settings, per_row_scale=not strict)
    result = policy_loss(strict, log_prob, means, objective=objective, std=std, sqrt_dt=sqrt_dt, **rows)
    return _clip_loss(strict, result)


def _flow_grpo(
    strict: bool,
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None = None,
) -> Result | str:
    rows = {"old_log_prob": old_log_prob, "advantages": advantages, "weights": rollout_is_weights}
    if reason := _unserved(strict, log_prob, rows) or _new_setting(config.diffusion_loss):
        return reason
    objective = _clipped(FlowGRPO, config.diffusion_loss)
    return _clip_loss(strict, policy_loss(strict, log_prob, objective=objective, **rows))


def _kl(strict: bool, *, prev_sample_mean: Tensor, ref_prev_sample_mean: Tensor, std_dev_t: Tensor) -> Result | str:
    if prev_sample_mean.ndim < 3:
        return "means of a rank below 3, which the trainer refuses"
    rows = prev_sample_mean.detach().new_zeros(len(prev_sample_mean))
    if reason := _unserved(strict, rows, {}, (prev_sample_mean, ref_prev_sample_mean), std_dev_t):
        return reason
    std = std_dev_t if strict else _or_infinity(_transition_std(std_dev_t, None))
    penalty = gaussian_kl(prev_sample_mean, ref_prev_sample_mean, std).mean()
    return penalty, {"actor/kl_loss": penalty.item()}


@functools.cache
def _new_fields(config: type) -> dict[str, Any]:
    """Those that the tested version did not have, with their defaults."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    made = {one.name: one.default_factory() for one in fields if one.default_factory is not dataclasses.MISSING}
    return {one.name: made.get(one.name, one.default) for one in fields if one.name not in _SETTINGS}


def _new_setting(settings: Any) -> str:
    """A field that a later version of the trainer brought, and that is set: its own function knows what it means."""
    for name, default in _new_fields(type(settings)).items():
        if not name.startswith("_") and getattr(settings, name) != default:
            return f"diffusion_loss.{name}={getattr(settings, name)!r}, which is not known here"
    return ""


_LOSSES = {
    "flow_dppo": ("FlowDPPOLoss", functools.partial(_loss_of_means, _flow_dppo)),
    "flow_grpo": ("FlowGRPOLoss", _flow_grpo),
    "dance_grpo": ("FlowGRPOLoss", _flow_grpo),
    "grpo_guard": ("GRPOGuardLoss", functools.partial(_loss_of_means, _grpo_guard)),
    "kl": ("KLLoss", _kl),
}


def _unserved(
    strict: bool,
    log_prob: Tensor,
    rows: Rows,
    means: tuple[Tensor, ...] = (),
    std_dev_t: Tensor | None = None,
    sqrt_dt: Tensor | None = None,
) -> str:
    """Why the trainer's own function must run; empty if the fused one can. The first of `means` is the policy's.

    The trainer broadcasts some other shapes too, usually with an unintended result. Its workers do not produce them.
    """
    shape, device, dtype = log_prob.shape, log_prob.device, log_prob.dtype
    constants = [t for t in (*rows.values(), *means[1:], std_dev_t, sqrt_dt) if t is not None]
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
        return "a constant that requires a gradient"
    if any(t is not None and t.shape != shape for t in rows.values()):
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


def _clip_loss(strict: bool, result: PolicyLoss) -> Result:
    values = result.metrics()
    if strict and result.ratio.numel() == 1:
        values["ratio_std"] = math.nan
    names = ("ppo_kl", *CLIP_METRICS, "ratio_mean", "ratio_std")
    return result.loss, {f"actor/{_CLIP_NAMES.get(name, name)}": values[name] for name in names}


@functools.lru_cache(maxsize=64)
def _objective(kind: type[Objective], **settings: Any) -> Objective:
    return kind(**settings)


def _clipped(kind: type[Objective], settings: Any, **more: bool) -> Objective:
    return _objective(kind, clip_range=float(settings.clip_ratio), adv_clip_max=float(settings.adv_clip_max), **more)


def _transition_std(std_dev_t: Tensor, sqrt_dt: Tensor | None) -> Tensor:
    """The standard deviation of the transition, 0-dim or `[B]`.

    Whether `std_dev_t` contains sqrt(-dt) depends on the sampler and cannot be seen from its values. So the fused
    `sample_previous_step` attaches the deviation to the tensor. Without it `std_dev_t` is taken for Flow-SDE's.
    """
    std = getattr(std_dev_t, "_flowdppo_std", None)
    if std is None:
        _patch.fallbacks["std_dev_t of an unknown sampler, taken for Flow-SDE's"] += 1
        std = std_dev_t.flatten() if std_dev_t.ndim else std_dev_t
        std = std if sqrt_dt is None else std * sqrt_dt
    return std


def _or_infinity(std: Tensor) -> Tensor:
    """`std` with inf in the place of 0, so that the KL of a deterministic step is 0."""
    return std.masked_fill(std == 0, math.inf)


def _sample_previous_step(
    randn_tensor: Callable[..., Tensor],
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: Any = None,
    per_token_timesteps: Any = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
) -> tuple[Tensor | None, ...] | str:
    latents = [sample, model_output] if prev_sample is None else [sample, model_output, prev_sample]
    if per_token_timesteps is not None or sde_type not in _SAMPLERS or any(t.dtype != torch.float32 for t in latents):
        return "arguments that verl-omni refuses"
    if reason := _unserved_step(self, latents, timestep, noise_level):
        return reason
    if timestep is None:
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
    else:
        sigma, sigma_next = look_up(self, timestep.to(self.timesteps.dtype))
    noise = None
    if prev_sample is None:
        kind = {"device": model_output.device, "dtype": model_output.dtype}
        noise = randn_tensor(model_output.shape, generator=generator, **kind)
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
        std_dev_t = wide(std_dev_t, sample.ndim)
    std_dev_t._flowdppo_std = step.std
    stored = step.prev_sample if prev_sample is None else prev_sample
    results = (stored, step.log_prob if return_logprobs else None, step.prev_sample_mean, std_dev_t)
    if return_sqrt_dt:
        return *results, sqrt_dt if sqrt_dt.ndim else sqrt_dt.expand(len(sample)).clone()
    return results


def _unserved_step(scheduler: Any, latents: list[Tensor], timestep: Any, noise_level: Any) -> str:
    sample, sigmas = latents[0], scheduler.sigmas
    if sample.device.type not in ("cpu", "cuda"):
        return f"device {sample.device.type}"
    if sample.ndim == 0 or any(t.shape != sample.shape or t.device != sample.device for t in latents):
        return "latents of different shapes or devices"
    if torch.is_grad_enabled() and sample.requires_grad:
        return "a sample that requires a gradient"
    if sigmas.dtype != torch.float32 or sigmas.device != sample.device:
        return "sigmas that are not float32, or not where the sample is"
    if timestep is None:
        if scheduler.step_index is None:
            return "no timestep and no step_index"
    elif not isinstance(timestep, Tensor) or timestep.shape != sample.shape[:1]:
        return "a timestep that is not one per sample"
    if isinstance(noise_level, Tensor):
        shapes = ((), (len(sample), *(1,) * (sample.ndim - 1)))
        if noise_level.dtype != torch.float32 or noise_level.shape not in shapes:
            return "a noise_level that is neither 0-dim nor [B, 1, ...] in float32"
        if noise_level.device != sample.device:
            return "a noise_level on another device than the sample"
    elif not isinstance(noise_level, Real):
        return "a noise_level that is no number"
    return ""


@_patch.replaces
def _replacements(strict: bool) -> list[Replacement]:
    algos = _patch.module("verl_omni.trainer.diffusion.diffusion_algos")
    registry = _patch.attribute(algos, "DIFFUSION_LOSS_REGISTRY")
    found = []
    for name, (class_name, compute) in _LOSSES.items():
        trainers = _patch.attribute(algos, class_name)
        registered = _patch.original(registry, name) if name in registry else None
        if type(registered) is not trainers:
            raise _patch.incompatible(f"loss {name!r}", f"a {type(registered).__name__}", f"a {class_name}")
        compute = functools.partial(compute, strict)
        _patch.check_parameters(f"{class_name}.compute_loss", trainers.compute_loss, signature(compute).parameters)
        _patch.check_parameters(f"{class_name}.__call__", trainers.__call__, ("self", "config", "model_output", "data"))
        # A subclass that overrides `compute_loss` alone keeps the trainer's validation and preparation of batches.
        fused = _patch.with_fallback(trainers.compute_loss, compute, f"{class_name}: ")
        members = {"compute_loss": staticmethod(fused), "__module__": __name__, "__doc__": trainers.__doc__}
        found.append(Replacement(registry, name, type(class_name, (trainers,), members)()))

    steps = _patch.module("verl_omni.pipelines.schedulers.flow_match_sde")
    scheduler = _patch.attribute(steps, "FlowMatchSDEDiscreteScheduler")
    step = functools.partial(_sample_previous_step, _patch.attribute(steps, "randn_tensor"))
    found.append(_patch.replacement(scheduler, "sample_previous_step", step, "sample_previous_step: "))

    if not strict:
        workers = _patch.module("verl_omni.workers.utils.losses")
        _patch.attribute(workers, "Metric")
        found.append(Replacement(workers, "Metric", _with_extremes(_patch.original(workers, "Metric"))))
    return found


def _with_extremes(metric: type) -> type:
    """A subclass of `verl.utils.metric.Metric` that merges `*_min` by the minimum and `*_max` by the maximum.

    The trainer's worker asks for the mean of every metric over micro-batches and ranks.
    """

    def from_dict(data: dict[str, float], aggregation: Any) -> dict[str, Any]:
        of = {"min": "min", "max": "max"}
        return {
            name: metric(value=value, aggregation=of.get(name.rpartition("_")[2], aggregation))
            for name, value in data.items()
        }

    return type(metric.__name__, (metric,), {"from_dict": staticmethod(from_dict), "__module__": __name__})


enable()
