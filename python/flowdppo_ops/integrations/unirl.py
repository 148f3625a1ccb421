"""UniRL: fused `FlowDPPO`, `FlowGRPO` and sampling strategies, and the loss helpers of its own classes.

    algorithm:
      _target_: flowdppo_ops.integrations.unirl.FlowDPPO    # was unirl.algorithms.flowdppo.FlowDPPO
    pipeline:
      strategy:
        _target_: flowdppo_ops.integrations.unirl.FlowSDEStrategy    # was unirl.sde.kernels.FlowSDEStrategy

The classes are subclasses of UniRL's, made when one is first asked for: importing this module imports no UniRL. The
algorithms take UniRL's keywords and `strict`, and need no `enable()`.

`enable()` is for recipes that keep UniRL's own classes: it rebinds the helpers that compute their losses,
`_flowdppo_kl_adv_loss` of `FlowDPPO`, and `_grpo_clip_loss` of `FlowGRPO` and of the token algorithm `GRPO`; with
`strict=False` also `FlowDPPO._compute_sigma_t`, and the averaging of metrics over micro-batches.

`B` samples, `S` trained steps of each; a trajectory is `[B, S, *latent]` with any latent dimensions.
"""

from __future__ import annotations

import logging
import math
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import FlowDPPO as _FlowDPPOObjective
from .. import FlowGRPO as _FlowGRPOObjective
from .. import PolicyLoss, reference
from ._patch import Patch, Replacement, wants_strict
from ._terms import CLIP_METRICS, DPPO_METRICS, RATIO_METRICS, policy_loss
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

_patch = Patch("UniRL", tested="commit 1a7b501e8fe8517b432a130220d2ff462f9b5afa")
enable, disable, enabled, fallbacks = _patch.enable, _patch.disable, _patch.enabled, _patch.count_fallbacks

_CLAMP = 0.99  # of the sigma in UniRL's KL


def active() -> bool:
    """Whether the helpers are rebound, or a recipe has asked for a class of this module."""
    return enabled() or not _CLASSES.keys().isdisjoint(globals())


@_patch.replaces
def _replacements(strict: bool) -> Iterator[Replacement]:
    """Each helper in every module that has imported it by name."""
    flowdppo = _patch.module("unirl.algorithms.flowdppo")
    yield _patch.replacement(flowdppo, "_flowdppo_kl_adv_loss", partial(_flowdppo_kl_adv_loss, strict))
    for name in ("base", "flowgrpo", "grpo"):
        module = _patch.module(f"unirl.algorithms.{name}")
        yield _patch.replacement(module, "_grpo_clip_loss", partial(_grpo_clip_loss, strict))
    if strict:
        return
    yield _patch.replacement(_patch.attribute(flowdppo, "FlowDPPO"), "_compute_sigma_t", _transition_sigma_t)
    aggregate = _patch.original(_patch.module("unirl.utils.misc"), "aggregate_numeric_metrics")
    for name in ("utils.misc", "train.stack", "train.unified_model_stack"):
        module = _patch.module(f"unirl.{name}")
        yield _patch.replacement(module, "aggregate_numeric_metrics", partial(_with_extremes, aggregate))


# ---- the loss helpers ------------------------------------------------------------------------------------------------
#
# Each has the parameters of UniRL's after `strict`, and returns what that returns, the loss of each element and the
# metrics; or a string, the reason why UniRL's own has to run.

Result = tuple[Tensor, Mapping[str, Tensor]]


def _flowdppo_kl_adv_loss(
    strict: bool,
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    new_means: Tensor,
    old_means: Tensor,
    advantages: Tensor,
    sigma_t: Tensor,
    kl_mask_threshold: float,
) -> Result | str:
    rows, means = (new_logp, old_logp, advantages), (new_means.detach(), old_means)
    if reason := _unserved_rows(rows) or _unserved_means(new_logp, means, strict):
        return reason
    std = _row_sigma(sigma_t, tuple(new_logp.shape))
    if std is None:
        return f"a sigma of shape {tuple(sigma_t.shape)}, which is not one per row"
    # Every KL is high for a threshold below 0 and for NaN, as for 0.
    objective = _FlowDPPOObjective(kl_mask_threshold=kl_mask_threshold if kl_mask_threshold > 0 else 0.0)
    return _per_element(strict, rows, objective, DPPO_METRICS, means=means, std=std)


def _grpo_clip_loss(
    strict: bool,
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Result | str:
    """For rows of any shape: steps or tokens."""
    rows, high = (new_logp, old_logp, advantages), clip_range if clip_range_high is None else clip_range_high
    if reason := _unserved_rows(rows):
        return reason
    if not (clip_range >= 0 and high >= 0):
        return "a negative clip range"
    objective = _FlowGRPOObjective(clip_range=(float(clip_range), float(high)))
    return _per_element(strict, rows, objective, (*RATIO_METRICS, *CLIP_METRICS, "approx_kl"))


_Rows = tuple[Tensor, Tensor, Tensor]  # new and old log-probs, advantages


def _per_element(
    strict: bool, rows: _Rows, objective: _FlowDPPOObjective | _FlowGRPOObjective, metrics: tuple[str, ...], **more: Any
) -> Result:
    new_logp, old_logp, advantages = rows
    given = {"advantages": advantages.detach(), "old_log_prob": old_logp, "objective": objective}
    result = policy_loss(strict, new_logp, **given, reduction="none", **more)
    return result.loss, _Late(result, metrics)


class _Late(UserDict[str, Tensor]):
    """A helper's metrics: name -> 0-dim tensor on the host.

    They are copied there, at once, when one is first asked for. UniRL reads them after its backward; copied here they
    would hold up the launch of the model's.
    """

    def __init__(self, result: PolicyLoss, names: tuple[str, ...]) -> None:
        self._result, self._names = result, names

    @cached_property
    def data(self) -> dict[str, Tensor]:
        values, dtype = self._result.metrics(), self._result.ratio.dtype
        return {name: torch.tensor(values[name], dtype=dtype) for name in self._names}


def _unserved_rows(rows: _Rows) -> str:
    """Why the fused loss cannot take these rows, or not with the result's dtype; empty if it can."""
    first, *others = rows
    double = first.dtype == torch.float64 and first.device.type == "cpu"
    if first.device.type not in ("cpu", "cuda"):
        return f"log-probs on {first.device.type}"
    if not double and first.dtype != torch.float32:
        return f"log-probs of {first.dtype} on {first.device.type}"
    if any((t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device) for t in others):
        return "log-probs and advantages of different shape, dtype or device"
    return "" if first.numel() else "no rows"


def _unserved_means(new_logp: Tensor, means: tuple[Tensor, Tensor], strict: bool) -> str:
    new, old = means
    if new.shape != old.shape or new.shape[: new_logp.ndim] != new_logp.shape or not new.numel():
        return f"means of shape {tuple(new.shape)} and {tuple(old.shape)} for rows {tuple(new_logp.shape)}"
    if strict and new.ndim == new_logp.ndim:
        return "means without latent dimensions, which UniRL takes for one row"
    if any(t.device != new_logp.device for t in means):
        return "means and log-probs on different devices"
    wide = (torch.float64,) if new_logp.dtype == torch.float64 else ()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *wide)
    return next((f"means of {t.dtype} with log-probs of {new_logp.dtype}" for t in means if t.dtype not in dtypes), "")


def _row_sigma(sigma_t: Tensor, row_shape: tuple[int, ...]) -> Tensor | None:
    """UniRL's `[1, S, 1, 1, 1]` as `[1, S]`, which fits means of any rank; None for a sigma that is not one per row."""
    if sigma_t.numel() == 1:
        return sigma_t.reshape(())
    rank = len(row_shape)
    leading, trailing = sigma_t.shape[:rank], sigma_t.shape[rank:]
    fits = len(leading) == rank and all(have in (1, want) for have, want in zip(leading, row_shape, strict=True))
    return sigma_t.reshape(leading) if fits and trailing.count(1) == len(trailing) else None


def _strict_sigma_t(algorithm: Any, segment: Any, target_steps: list[int], device: torch.device) -> Tensor:
    """`[1, S, 1, 1, 1]` float32, UniRL's: Flow-SDE's whatever the strategy, with sigma clamped to 0.99; or ones."""
    if not algorithm.add_kl_coefficient:
        return torch.ones(1, len(target_steps), 1, 1, 1, device=device)
    sigma, sigma_next, _ = _schedule(segment, target_steps, device)
    std_dev_t = torch.sqrt(sigma / (1.0 - torch.clamp(sigma, max=_CLAMP))) * float(algorithm.params.eta)
    return (std_dev_t * torch.sqrt(sigma - sigma_next)).reshape(1, -1, 1, 1, 1)


def _transition_sigma_t(self: Any, segment: Any, target_steps: list[int], device: torch.device) -> Tensor:
    """The same of the transition that the stage's strategy makes; inf, and so no KL, where nothing is random."""
    strategy = getattr(self.stage, "strategy", None)
    sampler = _SAMPLERS.get(getattr(strategy, "canonical_name", ""))
    if sampler is None and self.add_kl_coefficient:
        _patch.fall_back(f"sigma of the KL with strategy {type(strategy).__name__}")
    if sampler is None or not self.add_kl_coefficient:
        return _strict_sigma_t(self, segment, target_steps, device)
    sigma, sigma_next, sigma_max = (t.double() for t in _schedule(segment, target_steps, device))
    std = reference.transition(sampler, sigma, sigma_next, sigma.new_tensor(float(self.params.eta)), sigma_max)[2]
    return torch.where(std == 0, math.inf, std).float().reshape(1, -1, 1, 1, 1)


def _schedule(segment: Any, target_steps: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """In float32: the steps' sigma now and next, and the sigma_max that UniRL's stages give their strategy."""
    if segment.sigmas is None:
        raise ValueError("FlowDPPO with add_kl_coefficient=True requires segment.sigmas.")
    sigmas = segment.sigmas.to(device=device, dtype=torch.float32)
    index = torch.tensor(target_steps, dtype=torch.long, device=device)
    return sigmas[index], sigmas[index + 1], sigmas[1]


def _with_extremes(aggregate: Callable[..., Any], metrics_list: list[dict[str, Any]]) -> dict[str, float]:
    """UniRL's means over micro-batches, updates and ranks; of a minimum the least and of a maximum the largest."""
    merged = aggregate(metrics_list)
    for suffix, extreme in (("_min", min), ("_max", max)):
        for name in filter(lambda name: name.endswith(suffix), merged):
            values = [aggregate([metrics])[name] for metrics in metrics_list if name in metrics]
            merged[name] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return merged


class _Algorithm:
    """What `FlowDPPO` and `FlowGRPO` have of their own; the rest is inherited from UniRL's class of that name."""

    def __init__(self, *, strict: bool | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strict = wants_strict(strict)
        line = f"flowdppo_ops: UniRL's {type(self).__name__} runs fused, strict={self.strict}"
        _patch.say_once(logging.INFO, line)

    def compute_loss_and_backward(
        self, *, conditions: Any, segment: Any, advantages: Tensor, training_progress: float, loss_scale: float
    ) -> Any:
        """UniRL's. The device is waited for after the backward is launched: for the loss, then for all metrics."""
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
        per_element, late, setting = self._per_element(rows, segment, steps, replay, training_progress)
        mean = per_element.mean()
        (mean * loss_scale).backward()
        value = mean.item()
        metrics = {"policy_loss": value, **setting, **{name: v.item() for name, v in late.items()}}
        return base.AlgorithmStepResult(loss=value, metrics=metrics, num_steps_or_tokens=len(steps), has_backward=True)


class _FlowDPPO(_Algorithm):
    """UniRL's FlowDPPO, fused, for image, token and video trajectories. `strict` as in `enable`."""

    _own_keywords = ("kl_mask_threshold", "add_kl_coefficient")

    def _per_element(
        self, rows: dict[str, Tensor], segment: Any, steps: list[int], replay: Any, training_progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor], dict[str, float]]:
        means = replay.prev_sample_means
        if means is None:
            raise RuntimeError("FlowDPPO requires stage.replay() to return prev_sample_means, but got None.")
        given = {
            "new_means": means,
            "old_means": _anchor(segment, "sde_means", steps, means),
            "sigma_t": self._compute_sigma_t(segment, steps, device=means.device),
        }
        setting = {"kl_mask_threshold": self.kl_mask_threshold}
        own = _patch.original(_patch.module("unirl.algorithms.flowdppo"), "_flowdppo_kl_adv_loss")
        helper = _patch.with_fallback(own, partial(_flowdppo_kl_adv_loss, self.strict))
        return *helper(**rows, **given, **setting), setting

    def _compute_sigma_t(self, segment: Any, target_steps: list[int], device: torch.device) -> Tensor:
        return (_strict_sigma_t if self.strict else _transition_sigma_t)(self, segment, target_steps, device)


class _FlowGRPO(_Algorithm):
    """UniRL's FlowGRPO, fused. `strict` as in `enable`."""

    _own_keywords = ("clip_range", "clip_schedule")

    def _per_element(
        self, rows: dict[str, Tensor], segment: Any, steps: list[int], replay: Any, training_progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor], dict[str, float]]:
        base = _patch.module("unirl.algorithms.base")
        scheduled = base._resolve_clip_range_from_schedule(self.clip_range, self.clip_schedule, training_progress)
        setting = {"clip_range": float(scheduled)}
        own = _patch.original(base, "_grpo_clip_loss")
        return *_patch.with_fallback(own, partial(_grpo_clip_loss, self.strict))(**rows, **setting), setting


def _anchor(segment: Any, field: str, steps: list[int], like: Tensor) -> Tensor:
    """The old policy's field at the trained steps. They are all of its steps as a rule, and then it is as it is:
    UniRL's gather copies it twice."""
    value, recorded = getattr(segment, field), segment.sde_indices
    if value is None or recorded.tolist() != steps:
        base = _patch.module("unirl.algorithms.base")
        value = base.gather_sde_field(value, recorded, steps, field_name=field)
    return value.to(dtype=like.dtype, device=like.device)


# ---- the classes, made when asked for --------------------------------------------------------------------------------

# name -> (UniRL's module, what is put over its class; None for a strategy)
_CLASSES: dict[str, tuple[str, type | None]] = {
    "FlowDPPO": ("unirl.algorithms.flowdppo", _FlowDPPO),
    "FlowGRPO": ("unirl.algorithms.flowgrpo", _FlowGRPO),
    "FlowSDEStrategy": ("unirl.sde.kernels", None),
    "CPSSDEStrategy": ("unirl.sde.kernels", None),
    "DanceSDEStrategy": ("unirl.sde.kernels", None),
}


# Of the algorithms' constructors. One of a later UniRL is refused: it would be accepted and have no effect.
_KEYWORDS = {"params", "stage", "pipeline", "stage_attr", "old_logp_source", "conditions_cls"}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, algorithm = _CLASSES[name]
    base = _patch.attribute(_patch.module(module), name)
    # The module by name: UniRL's classes are abstract, and a class that their metaclass makes is taken for abc's.
    members: dict[str, Any] = {"__module__": __name__}
    if algorithm is None:
        _check_method(base, "denoise", signature(denoise).parameters)
        members["__doc__"] = f"UniRL's {name}; `denoise`, fused, draws a step or scores it. The rest is UniRL's."
        members["denoise"] = _patch.with_fallback(base.denoise, denoise)
        bases = (base,)
        _patch.say_once(logging.INFO, f"flowdppo_ops: UniRL's {name} runs fused")
    else:
        own = signature(base)
        if later := own.parameters.keys() - _KEYWORDS - set(algorithm._own_keywords):
            raise _patch.incompatible(name, f"a class that takes {', '.join(sorted(later))}", "one that does not")
        _check_method(base, "_resolve_target_steps", ("self", "segment"))
        _check_method(base, "prepare_segment", ("self", "conditions", "segment"))
        _check_method(base, "compute_loss_and_backward", signature(_Algorithm.compute_loss_and_backward).parameters)
        called = ("AlgorithmStepResult", "_resolve_clip_range_from_schedule", "gather_sde_field", "typed_conditions")
        for needed in called:
            _patch.attribute(_patch.module("unirl.algorithms.base"), needed)
        # UniRL's keywords and ours, for Hydra and editors.
        strict = Parameter("strict", Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
        members["__signature__"] = own.replace(parameters=[*own.parameters.values(), strict])
        members["__doc__"] = algorithm.__doc__
        bases = (algorithm, base)
    made = globals()[name] = type(name, bases, members)
    return made


def _check_method(base: type, method: str, parameters: Any) -> None:
    _patch.check_parameters(f"{base.__name__}.{method}", _patch.attribute(base, method), parameters)


def __dir__() -> list[str]:
    return sorted(__all__)
