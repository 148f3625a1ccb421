"""UniRL: fused `FlowDPPO`, `FlowGRPO` and sampling strategies, and the loss helpers of its own classes.

    algorithm:
      _target_: flowdppo_ops.integrations.unirl.FlowDPPO    # was unirl.algorithms.flowdppo.FlowDPPO
    pipeline:
      strategy:
        _target_: flowdppo_ops.integrations.unirl.FlowSDEStrategy    # was unirl.sde.kernels.FlowSDEStrategy

The classes are subclasses of UniRL's. Each is made when it is first used, so that importing this module does not import
UniRL. The algorithms take UniRL's keywords and `strict`, and do not need `enable()`. UniRL of June 2026 and of
September 2026 are supported; only the latter has `beta`, `backend`, generators and `transition_std`.

`enable()` is for recipes that keep UniRL's own classes. It replaces the helpers that compute their losses:
`_flowdppo_kl_adv_loss` of `FlowDPPO`, and `_grpo_clip_loss` of `FlowGRPO` and of the token algorithm `GRPO`. With
`strict=False` it also replaces `FlowDPPO._compute_sigma_t` and the averaging of metrics over micro-batches.

A trajectory is `[B, S, *latent]`: B samples, S trained steps of each, any latent dimensions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ._patch import Patch, Replacement, wants_strict
from ._unirl_loss import LateMetrics, Penalty, flowdppo_kl_adv_loss, grpo_clip_loss
from ._unirl_step import SAMPLERS as _SAMPLERS
from ._unirl_step import denoise

if TYPE_CHECKING:  # made by `__getattr__`
    FlowDPPO: type
    FlowGRPO: type
    FlowSDEStrategy: type
    CPSSDEStrategy: type
    DanceSDEStrategy: type

__all__ = [
    "CPSSDEStrategy",
    "DanceSDEStrategy",
    "FlowDPPO",
    "FlowGRPO",
    "FlowSDEStrategy",
    "disable",
    "enable",
    "enabled",
    "fallbacks",
]

_patch = Patch("UniRL", tested="commit 1a7b501e8fe8517b432a130220d2ff462f9b5afa, and a stand-in for 0c97cfb8")
enable, disable, enabled, fallbacks = _patch.enable, _patch.disable, _patch.enabled, _patch.count_fallbacks


def active() -> bool:
    """Whether the helpers are replaced, or a class of this module has been used."""
    return enabled() or not _CLASSES.keys().isdisjoint(globals())


@_patch.replaces
def _replacements(strict: bool) -> Iterator[Replacement]:
    """Replaces each helper in every module that has imported it by name."""
    flowdppo = _patch.module("unirl.algorithms.flowdppo")
    yield _patch.replacement(flowdppo, "_flowdppo_kl_adv_loss", partial(flowdppo_kl_adv_loss, strict, None))
    for name in ("base", "flowgrpo", "grpo"):
        module = _patch.module(f"unirl.algorithms.{name}")
        yield _patch.replacement(module, "_grpo_clip_loss", partial(grpo_clip_loss, strict, None))
    if strict:
        return
    algorithm = _patch.attribute(flowdppo, "FlowDPPO")
    yield _patch.replacement(algorithm, "_compute_sigma_t", _transition_sigma_t, later=("sample_ndim",))
    aggregate = _patch.original(_patch.module("unirl.utils.misc"), "aggregate_numeric_metrics")
    for name in ("utils.misc", "train.stack", "train.unified_model_stack"):
        module = _patch.module(f"unirl.{name}")
        yield _patch.replacement(module, "aggregate_numeric_metrics", partial(_with_extremes, aggregate))


def _own_sigma_t(algorithm: Any, segment: Any, target_steps: list[int], device: torch.device, ndim: int) -> Tensor:
    """The sigma of the KL as UniRL computes it, `[1, S, 1, ...]` float32; ones without `add_kl_coefficient`.

    Before September 2026 it has rank 5 and Flow-SDE's formula for every strategy, with sigma clamped to 0.99; since
    then it has the strategy's formula and rank `ndim`.
    """
    own = _patch.original(_patch.attribute(_patch.module("unirl.algorithms.flowdppo"), "FlowDPPO"), "_compute_sigma_t")
    return own(algorithm, segment, target_steps, device, **_of_rank(own, ndim))


def _of_rank(function: Callable[..., Any], ndim: int) -> dict[str, int]:
    """The argument that tells UniRL the rank of the means. Before September 2026 there was none: the rank was 5."""
    return {"sample_ndim": ndim} if "sample_ndim" in signature(function).parameters else {}


def _transition_sigma_t(
    self: Any, segment: Any, target_steps: list[int], device: torch.device, sample_ndim: int = 5
) -> Tensor:
    """The standard deviation of the strategy's transition, in the shape of `_own_sigma_t`. It is inf, which gives KL 0,
    where the transition is deterministic."""
    strategy = getattr(self.stage, "strategy", None)
    sampler = _SAMPLERS.get(getattr(strategy, "canonical_name", ""))
    if sampler is None and self.add_kl_coefficient:
        _patch.fall_back(f"sigma of the KL with strategy {type(strategy).__name__}")
    if sampler is None or not self.add_kl_coefficient:
        return _own_sigma_t(self, segment, target_steps, device, sample_ndim)
    if segment.sigmas is None:
        raise ValueError("FlowDPPO with add_kl_coefficient=True requires segment.sigmas.")
    # Rounded to float32, as in the stages, which pass the second sigma to their strategy as `sigma_max`.
    sigmas = segment.sigmas.to(device=device, dtype=torch.float32).double()
    index = torch.tensor(target_steps, dtype=torch.long, device=device)
    eta = sigmas.new_tensor(float(self.params.eta))
    std = reference.transition(sampler, sigmas[index], sigmas[index + 1], eta, sigmas[1])[2]
    return torch.where(std == 0, math.inf, std).float().reshape(1, -1, *(1,) * (sample_ndim - 2))


def _with_extremes(aggregate: Callable[..., Any], metrics_list: list[dict[str, Any]]) -> dict[str, float]:
    """Merges metrics over micro-batches, updates and ranks: takes the minimum of `*_min`, the maximum of `*_max`, and
    UniRL's mean of the others."""
    merged = aggregate(metrics_list)
    for suffix, extreme in (("_min", min), ("_max", max)):
        for name in filter(lambda name: name.endswith(suffix), merged):
            values = [aggregate([metrics])[name] for metrics in metrics_list if name in metrics]
            merged[name] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return merged


class _Algorithm:
    """What the fused `FlowDPPO` and `FlowGRPO` override; they inherit the rest from UniRL's class of the same name.

    `_helper` is the module and name of UniRL's helper, and its fused form, which takes new and old log-probs and
    advantages, then `_latents`, and last `_setting`, which is also logged.
    """

    _own_keywords: tuple[str, ...]
    _helper: tuple[str, str, Callable[..., Any]]

    def __init__(self, *, strict: bool | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strict = wants_strict(strict)
        line = f"flowdppo_ops: UniRL's {type(self).__name__} runs fused, strict={self.strict}"
        _patch.say_once(logging.INFO, line)

    def compute_loss_and_backward(
        self, *, conditions: Any, segment: Any, advantages: Tensor, training_progress: float, loss_scale: float
    ) -> Any:
        """As UniRL's. It waits for the device after it has launched the backward: once for the loss, once for all
        metrics."""
        base = _patch.module("unirl.algorithms.base")
        steps = self._resolve_target_steps(segment)
        if not steps:
            return base.AlgorithmStepResult(loss=0.0, metrics={}, num_steps_or_tokens=0, has_backward=False)
        typed = base.typed_conditions(conditions, self.conditions_cls)
        replay = self.stage.replay(typed, segment=segment, params=self.params, step_indices=steps)
        new_logp = replay.log_probs
        old_logp = _anchor(segment, "sde_logp", steps, new_logp)
        wide = advantages.to(dtype=new_logp.dtype, device=new_logp.device).reshape(-1, 1).expand_as(new_logp)
        rows = {"new_logp": new_logp, "old_logp": old_logp, "advantages": wide}
        penalty = self._penalty(base, typed, segment, steps, replay.prev_sample_means)
        latents = self._latents(segment, steps, replay.prev_sample_means)
        setting, (module, name, fused) = self._setting(training_progress), self._helper
        own = _patch.original(_patch.module(module), name)
        helper = _patch.with_fallback(own, partial(fused, self.strict, penalty))
        per_element, late = helper(**rows, **latents, **setting)
        loss, is_fused, kl_ref = per_element.mean(), isinstance(late, LateMetrics), None
        if penalty is not None and not is_fused:
            kl_ref = base._reference_kl_loss(*penalty[1:])
            loss = loss + penalty.beta * kl_ref
        (loss * loss_scale).backward()
        value = loss.item()
        metrics = {"policy_loss": value, **setting, **{name: v.item() for name, v in late.items()}}
        if penalty is not None:
            metrics["policy_loss"] = late.policy_loss() if is_fused else per_element.mean().item()
            metrics |= {"beta": penalty.beta, "kl_ref_mean": late.numbers["kl_loss"] if is_fused else kl_ref.item()}
        return base.AlgorithmStepResult(loss=value, metrics=metrics, num_steps_or_tokens=len(steps), has_backward=True)

    def _penalty(
        self, base: Any, conditions: Any, segment: Any, steps: list[int], means: Tensor | None
    ) -> Penalty | None:
        beta = getattr(self, "beta", 0.0)  # since September 2026
        if not beta > 0:
            return None
        if means is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}: beta > 0 requires stage.replay() to return prev_sample_means, but got None.")
        trained = {"segment": segment, "target_steps": steps}
        replay = base._reference_replay_means
        ref_means = replay(self.stage, self._ref_model, conditions=conditions, params=self.params, **trained)
        setting = {"eta": float(self.params.eta), "device": means.device, "add_coefficient": True}
        setting |= _of_rank(base._transition_sigma, means.ndim)
        sigma = base._transition_sigma(self.stage, **trained, **setting)
        return Penalty(beta, means, ref_means.to(dtype=means.dtype, device=means.device), sigma)


class _FlowDPPO(_Algorithm):
    """UniRL's FlowDPPO, fused, for image, token and video trajectories. `strict`: as in `enable`."""

    _own_keywords = ("kl_mask_threshold", "add_kl_coefficient")
    _helper = ("unirl.algorithms.flowdppo", "_flowdppo_kl_adv_loss", flowdppo_kl_adv_loss)

    def _setting(self, training_progress: float) -> dict[str, float]:
        return {"kl_mask_threshold": self.kl_mask_threshold}

    def _latents(self, segment: Any, steps: list[int], means: Tensor | None) -> dict[str, Tensor]:
        if means is None:
            raise RuntimeError("FlowDPPO requires stage.replay() to return prev_sample_means, but got None.")
        return {
            "new_means": means,
            "old_means": _anchor(segment, "sde_means", steps, means),
            "sigma_t": self._compute_sigma_t(segment, steps, device=means.device, sample_ndim=means.ndim),
        }

    def _compute_sigma_t(
        self, segment: Any, target_steps: list[int], device: torch.device, sample_ndim: int = 5
    ) -> Tensor:
        sigma_t = _own_sigma_t if self.strict else _transition_sigma_t
        return sigma_t(self, segment, target_steps, device, sample_ndim)


class _FlowGRPO(_Algorithm):
    """UniRL's FlowGRPO, fused. `strict`: as in `enable`."""

    _own_keywords = ("clip_range", "clip_schedule")
    _helper = ("unirl.algorithms.base", "_grpo_clip_loss", grpo_clip_loss)

    def _setting(self, training_progress: float) -> dict[str, float]:
        resolve = _patch.module("unirl.algorithms.base")._resolve_clip_range_from_schedule
        return {"clip_range": float(resolve(self.clip_range, self.clip_schedule, training_progress))}

    def _latents(self, segment: Any, steps: list[int], means: Tensor | None) -> dict[str, Tensor]:
        return {}


def _anchor(segment: Any, field: str, steps: list[int], like: Tensor) -> Tensor:
    """The old policy's field at the trained steps. If all its steps are trained, as they usually are, it is returned
    without UniRL's gather, which copies it twice."""
    value, recorded = getattr(segment, field), segment.sde_indices
    if value is None or recorded.tolist() != steps:
        base = _patch.module("unirl.algorithms.base")
        value = base.gather_sde_field(value, recorded, steps, field_name=field)
    return value.to(dtype=like.dtype, device=like.device)


# ---- the classes, made when they are first used ----------------------------------------------------------------------

# name -> (UniRL's module, the class that overrides methods of UniRL's; None for a strategy)
_CLASSES: dict[str, tuple[str, type | None]] = {
    "FlowDPPO": ("unirl.algorithms.flowdppo", _FlowDPPO),
    "FlowGRPO": ("unirl.algorithms.flowgrpo", _FlowGRPO),
    "FlowSDEStrategy": ("unirl.sde.kernels", None),
    "CPSSDEStrategy": ("unirl.sde.kernels", None),
    "DanceSDEStrategy": ("unirl.sde.kernels", None),
}


# Keywords of the algorithms' constructors. An unknown one is refused, because a fused algorithm would ignore it.
_KEYWORDS = {"params", "stage", "pipeline", "stage_attr", "old_logp_source", "conditions_cls", "beta", "backend"}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, algorithm = _CLASSES[name]
    base = _patch.attribute(_patch.module(module), name)
    # `__module__` must be given: UniRL's classes are abstract, and their metaclass would set it to "abc".
    members: dict[str, Any] = {"__module__": __name__}
    if algorithm is None:
        _check_keywords(name, base, {"config"})
        _check_method(base, "denoise", signature(denoise).parameters, later=("generator",))
        members["__doc__"] = f"UniRL's {name} with a fused `denoise`, which draws or scores a step."
        members["denoise"] = _patch.with_fallback(base.denoise, denoise)
        bases = (base,)
        _patch.say_once(logging.INFO, f"flowdppo_ops: UniRL's {name} runs fused")
    else:
        own = signature(base)
        _check_keywords(name, base, _KEYWORDS | set(algorithm._own_keywords))
        _check_method(base, "_resolve_target_steps", ("self", "segment"))
        _check_method(base, "prepare_segment", ("self", "conditions", "segment"))
        _check_method(base, "compute_loss_and_backward", signature(_Algorithm.compute_loss_and_backward).parameters)
        called = ("AlgorithmStepResult", "_resolve_clip_range_from_schedule", "gather_sde_field", "typed_conditions")
        if "beta" in own.parameters:
            called += ("_reference_kl_loss", "_reference_replay_means", "_transition_sigma")
        for needed in called:
            _patch.attribute(_patch.module("unirl.algorithms.base"), needed)
        # UniRL's keywords and `strict`, for Hydra and editors.
        strict = Parameter("strict", Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
        members["__signature__"] = own.replace(parameters=[*own.parameters.values(), strict])
        members["__doc__"] = algorithm.__doc__
        bases = (algorithm, base)
    made = globals()[name] = type(name, bases, members)
    return made


def _check_keywords(name: str, base: type, known: set[str]) -> None:
    if later := signature(base).parameters.keys() - known:
        raise _patch.incompatible(name, f"a class that takes {', '.join(sorted(later))}", "one that does not")


def _check_method(base: type, method: str, parameters: Any, later: tuple[str, ...] = ()) -> None:
    _patch.check_parameters(f"{base.__name__}.{method}", _patch.attribute(base, method), parameters, later)


def __dir__() -> list[str]:
    return sorted(__all__)
