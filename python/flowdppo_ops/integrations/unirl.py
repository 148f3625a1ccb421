"""UniRL: fused `FlowDPPO`, `FlowGRPO` and sampling strategies, and the loss helpers of its own classes.

    algorithm:
      _target_: flowdppo_ops.integrations.unirl.FlowDPPO    # was unirl.algorithms.flowdppo.FlowDPPO
    pipeline:
      strategy:
        _target_: flowdppo_ops.integrations.unirl.FlowSDEStrategy    # was unirl.sde.kernels.FlowSDEStrategy

The classes are subclasses of UniRL's, made when one is first asked for: importing this module imports no UniRL. The
algorithms take UniRL's keywords and `strict`. `enable()` is for recipes that keep UniRL's own classes: it rebinds the
helpers that compute their losses.

`B` samples, `S` trained steps of each; a trajectory is `[B, S, *latent]` with any latent dimensions.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import FlowDPPO as _FlowDPPOObjective
from .. import FlowGRPO as _FlowGRPOObjective
from .. import PolicyLoss, loss, reference, sde_step
from ._patch import Patch, Replacement, wants_strict

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

_SAMPLERS = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}  # a strategy's canonical_name -> ours
_DETERMINISTIC = 1e-7  # UniRL scores no step of a smaller eta
_CLAMP = 0.99  # of the sigma in UniRL's KL

# Where the helpers are looked up: they are imported by name.
_CLIP_USERS = ("base", "flowgrpo", "grpo")
_AVERAGING = ("utils.misc", "train.stack", "train.unified_model_stack")

_KL_METRICS = (
    *("ratio_mean", "ratio_std", "ratio_min", "ratio_max", "approx_kl", "kl_new_old_mean", "kl_new_old_max"),
    *("kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction"),
)
_CLIP_METRICS = (
    *("ratio_mean", "ratio_std", "ratio_min", "ratio_max", "clip_fraction", "clipfrac_gt_one", "clipfrac_lt_one"),
    "approx_kl",
)


def enable(strict: bool | None = None) -> None:
    """Rebinds the loss helpers where UniRL looks them up.

    These are `_flowdppo_kl_adv_loss` of `FlowDPPO`, and `_grpo_clip_loss` of `FlowGRPO` and of the token algorithm
    `GRPO`. With `strict=False` also `FlowDPPO._compute_sigma_t`, and the averaging of metrics over micro-batches.

    Args:
        strict: True reproduces UniRL to rounding, its defects included; False does what the maths says; None reads
            FLOWDPPO_OPS_STRICT, which is True when not set.

    Raises:
        Incompatible: UniRL is not importable, or its surface is another than that of the commit tested.
    """
    _patch.enable(strict, _replacements)


def disable() -> None:
    """Puts UniRL's own functions back."""
    _patch.disable()


def enabled() -> bool:
    """Whether the helpers are rebound; the classes of this module need no `enable()`."""
    return _patch.strict is not None


def active() -> bool:
    """Whether the helpers are rebound, or a recipe has asked for a class of this module."""
    return enabled() or not _CLASSES.keys().isdisjoint(globals())


def fallbacks() -> dict[str, int]:
    """reason -> how many calls UniRL's own function served for it."""
    return dict(_patch.fallbacks)


def _replacements(strict: bool) -> Iterator[Replacement]:
    flowdppo, *users = (_patch.module(f"unirl.algorithms.{name}") for name in ("flowdppo", *_CLIP_USERS))
    yield _replacement(flowdppo, "_flowdppo_kl_adv_loss", _flowdppo_kl_adv_loss)
    for module in users:
        yield _replacement(module, "_grpo_clip_loss", _grpo_clip_loss)
    if strict:
        return
    yield _replacement(_patch.attribute(flowdppo, "FlowDPPO"), "_compute_sigma_t", _transition_sigma_t)
    for name in _AVERAGING:
        module = _patch.module(f"unirl.{name}")
        yield _replacement(module, "aggregate_numeric_metrics", _aggregate_numeric_metrics)


def _replacement(owner: Any, name: str, value: Callable[..., Any]) -> Replacement:
    """Of a function with the same parameters."""
    _patch.check_parameters(name, _patch.attribute(owner, name), inspect.signature(value).parameters)
    return Replacement(owner, name, value)


# ---- the loss helpers ------------------------------------------------------------------------------------------------


def _flowdppo_kl_adv_loss(
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    new_means: Tensor,
    old_means: Tensor,
    advantages: Tensor,
    sigma_t: Tensor,
    kl_mask_threshold: float,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What `enable()` puts in the place of UniRL's: per-element loss `[B, S]`, and the metrics."""
    rows, means = (new_logp, old_logp, advantages), (new_means, old_means)
    return _kl_adv_loss(rows, means, sigma_t, kl_mask_threshold, _patch.strict is not False)


def _grpo_clip_loss(
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What `enable()` puts in the place of UniRL's, for rows of any shape: steps or tokens."""
    return _clip_loss((new_logp, old_logp, advantages), clip_range, clip_range_high, _patch.strict is not False)


_Rows = tuple[Tensor, Tensor, Tensor]  # new and old log-probs, advantages


def _kl_adv_loss(
    rows: _Rows, means: tuple[Tensor, Tensor], sigma_t: Tensor, threshold: float, strict: bool
) -> tuple[Tensor, Mapping[str, Tensor]]:
    std = _row_sigma(sigma_t, tuple(rows[0].shape))
    reason = _unserved_rows(rows) or _unserved_means(rows[0], means, strict)
    if not reason and std is None:
        reason = f"a sigma of shape {tuple(sigma_t.shape)}, which is not one per row"
    if reason:
        names = ("new_logp", "old_logp", "advantages", "new_means", "old_means")
        given = dict(zip(names, (*rows, *means), strict=True))
        return _own(
            "unirl.algorithms.flowdppo",
            "_flowdppo_kl_adv_loss",
            reason,
            **given,
            sigma_t=sigma_t,
            kl_mask_threshold=threshold,
        )
    # Every KL is high for a threshold below 0 and for NaN, as for 0.
    objective = _FlowDPPOObjective(kl_mask_threshold=threshold if threshold > 0 else 0.0)
    new, old = means
    return _per_element(rows, (new.detach(), old), std, objective, _KL_METRICS, strict)


def _clip_loss(
    rows: _Rows, clip_range: float, clip_range_high: float | None, strict: bool
) -> tuple[Tensor, Mapping[str, Tensor]]:
    high = clip_range if clip_range_high is None else clip_range_high
    reason = _unserved_rows(rows)
    if not reason and not (clip_range >= 0 and high >= 0):
        reason = "a negative clip range"
    if reason:
        given = dict(zip(("new_logp", "old_logp", "advantages"), rows, strict=True))
        return _own(
            "unirl.algorithms.base",
            "_grpo_clip_loss",
            reason,
            **given,
            clip_range=clip_range,
            clip_range_high=clip_range_high,
        )
    objective = _FlowGRPOObjective(clip_range=(float(clip_range), float(high)))
    return _per_element(rows, (None, None), None, objective, _CLIP_METRICS, strict)


def _per_element(
    rows: _Rows,
    means: tuple[Tensor | None, Tensor | None],
    std: Tensor | None,
    objective: _FlowDPPOObjective | _FlowGRPOObjective,
    metrics: tuple[str, ...],
    strict: bool,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    new_logp, old_logp, advantages = rows
    result = loss(
        *means,
        advantages.detach(),
        std=std,
        log_prob=new_logp,
        old_log_prob=old_logp,
        objective=objective,
        reduction="none",
    )
    per_element = result.loss
    if strict and per_element.requires_grad:
        # UniRL's gradient of a blocked row is 0 times its ratio: NaN where that is infinite. A branch that is never
        # taken has this gradient, and no value.
        ratio = torch.exp(torch.where(result.keep, 0.0, new_logp - old_logp))
        per_element = torch.where(torch.zeros_like(result.keep), ratio, per_element)
    return per_element, _Late(result, metrics)


class _Late(Mapping[str, Tensor]):
    """A helper's metrics: name -> 0-dim tensor on the host.

    They are copied there, at once, when the first is read. UniRL reads them after its backward; copied here they would
    hold up the launch of the model's.
    """

    def __init__(self, result: PolicyLoss, names: tuple[str, ...]) -> None:
        self._result = result
        self._names = names

    @cached_property
    def _copied(self) -> dict[str, Tensor]:
        values, dtype = self._result.metrics(), self._result.ratio.dtype
        return {name: torch.tensor(values[name], dtype=dtype) for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        return self._copied[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# ---- what the helpers do not serve -----------------------------------------------------------------------------------


def _own(module: str, name: str, reason: str, **given: Any) -> Any:
    """UniRL's own function, counted."""
    _patch.fall_back(reason)
    return _patch.original(_patch.module(module), name)(**given)


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


# ---- the sigma of the KL ---------------------------------------------------------------------------------------------


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


# ---- metrics over micro-batches --------------------------------------------------------------------------------------


def _aggregate_numeric_metrics(metrics_list: list[dict[str, Any]]) -> dict[str, float]:
    """UniRL's means over micro-batches, updates and ranks; of a minimum the least and of a maximum the largest."""
    aggregate = _patch.original(_patch.module("unirl.utils.misc"), "aggregate_numeric_metrics")
    merged = aggregate(metrics_list)
    for suffix, extreme in (("_min", min), ("_max", max)):
        for name in filter(lambda name: name.endswith(suffix), merged):
            values = [aggregate([metrics])[name] for metrics in metrics_list if name in metrics]
            merged[name] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return merged


# ---- algorithms ------------------------------------------------------------------------------------------------------


class _Algorithm:
    """What `FlowDPPO` and `FlowGRPO` have of their own; the rest is inherited from UniRL's class of that name."""

    def __init__(self, *, strict: bool | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strict = wants_strict(strict)
        _say_fused(self, f", strict={self.strict}")

    def compute_loss_and_backward(
        self, *, conditions: Any, segment: Any, advantages: Tensor, training_progress: float, loss_scale: float
    ) -> Any:
        """Loss of one micro-batch: the mean over `[B, S]`; its gradient, times `loss_scale`, goes to the stage's model.

        Args:
            conditions, segment: what `stage.replay` takes.
            advantages: `[B]`.
            training_progress: in [0, 1], for the schedule of a clip range.
            loss_scale: one over the number of micro-batches.

        Returns:
            UniRL's `AlgorithmStepResult`. The device is waited for after the backward is launched, for the loss and for
            all metrics together.
        """
        base = _patch.module("unirl.algorithms.base")
        steps = self._resolve_target_steps(segment)
        if not steps:
            return base.AlgorithmStepResult(loss=0.0, metrics={}, num_steps_or_tokens=0, has_backward=False)
        typed = base.typed_conditions(conditions, self.conditions_cls)
        replay = self.stage.replay(typed, segment=segment, params=self.params, step_indices=steps)
        new_logp = replay.log_probs
        old_logp = _anchor(segment, "sde_logp", steps, new_logp)
        wide = advantages.to(dtype=new_logp.dtype, device=new_logp.device).reshape(-1, 1).expand_as(new_logp)
        rows = new_logp, old_logp, wide
        per_element, late, setting = self._per_element(rows, segment, steps, replay, training_progress)
        mean = per_element.mean()
        (mean * loss_scale).backward()
        value = mean.item()
        metrics = {"policy_loss": value, **setting, **{name: v.item() for name, v in late.items()}}
        return base.AlgorithmStepResult(loss=value, metrics=metrics, num_steps_or_tokens=len(steps), has_backward=True)


class _FlowDPPO(_Algorithm):
    """UniRL's FlowDPPO, fused, for image, token and video trajectories. `strict` as in `enable`."""

    def _per_element(
        self, rows: _Rows, segment: Any, steps: list[int], replay: Any, training_progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor], dict[str, float]]:
        new_means = replay.prev_sample_means
        if new_means is None:
            raise RuntimeError("FlowDPPO requires stage.replay() to return prev_sample_means, but got None.")
        means = new_means, _anchor(segment, "sde_means", steps, new_means)
        sigma_t = self._compute_sigma_t(segment, steps, device=new_means.device)
        result = _kl_adv_loss(rows, means, sigma_t, self.kl_mask_threshold, self.strict)
        return *result, {"kl_mask_threshold": self.kl_mask_threshold}

    def _compute_sigma_t(self, segment: Any, target_steps: list[int], device: torch.device) -> Tensor:
        return (_strict_sigma_t if self.strict else _transition_sigma_t)(self, segment, target_steps, device)


class _FlowGRPO(_Algorithm):
    """UniRL's FlowGRPO, fused. `strict` as in `enable`."""

    def _per_element(
        self, rows: _Rows, segment: Any, steps: list[int], replay: Any, training_progress: float
    ) -> tuple[Tensor, Mapping[str, Tensor], dict[str, float]]:
        scheduled = _patch.module("unirl.algorithms.base")._resolve_clip_range_from_schedule
        clip_range = float(scheduled(self.clip_range, self.clip_schedule, training_progress))
        return *_clip_loss(rows, clip_range, None, self.strict), {"clip_range": clip_range}


def _anchor(segment: Any, field: str, steps: list[int], like: Tensor) -> Tensor:
    """The old policy's field at the trained steps. They are all of its steps as a rule, and then it is as it is:
    UniRL's gather copies it twice."""
    value, recorded = getattr(segment, field), segment.sde_indices
    if value is None or recorded.tolist() != steps:
        base = _patch.module("unirl.algorithms.base")
        value = base.gather_sde_field(value, recorded, steps, field_name=field)
    return value.to(dtype=like.dtype, device=like.device)


# ---- strategies ------------------------------------------------------------------------------------------------------


class _Strategy:
    """`denoise` in one pass forward and one backward; `step` and `compute_log_prob` are UniRL's."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _say_fused(self)

    def denoise(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        sigma_max: float | Tensor = 0.99,
        step_index: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One transition: draws the next latent, or scores `prev_sample`.

        Args:
            noise_pred, sample: latents `[B, *latent]`; the velocity, which has the gradient, and the sample.
            sigma, sigma_next: 0-dim or `[B]`, with or without trailing ones.
            eta: noise level; below 1e-7 nothing is scored.
            prev_sample: latents; None draws, with PyTorch's own generator and the numbers that UniRL draws.
            sigma_max: 0-dim or a number; stands in for a sigma of exactly 1.
            step_index: not used.

        Returns:
            `(prev_sample, log_prob, prev_sample_mean)`, all float32: latents, rounded to the dtype of `sample` if they
            are scored; `[B]`, or None where nothing is scored; latents.
        """
        reason = _unserved_step(noise_pred, sample, prev_sample, sigma, sigma_next, sigma_max, eta)
        if reason:
            _patch.fall_back(reason)
            schedule = {"eta": eta, "sigma_max": sigma_max, "step_index": step_index}
            return super().denoise(noise_pred, sample, sigma, sigma_next, prev_sample=prev_sample, **schedule)
        scored = not eta < _DETERMINISTIC
        if not scored or sample.dtype == torch.float64:
            sample = sample.float()
        step = sde_step(
            _at_most_float(noise_pred),
            sample,
            sigma=_row_vector(sigma, sample),
            sigma_next=_row_vector(sigma_next, sample),
            noise_level=float(eta),
            sampler=_SAMPLERS[self.canonical_name],
            sigma_max=_row_vector(sigma_max, sample),
            prev_sample=None if prev_sample is None else _at_most_float(prev_sample),
        )
        return step.prev_sample.float(), step.log_prob if scored else None, step.prev_sample_mean


def _at_most_float(latents: Tensor) -> Tensor:
    """UniRL computes a step in float32 whatever it is given; half precision is widened in the pass itself."""
    return latents.float() if latents.dtype == torch.float64 else latents


def _row_vector(value: float | Tensor, latents: Tensor) -> float | Tensor:
    """`value` where the latents are, padded with trailing ones as UniRL does."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        value = value.reshape(())
    elif value.ndim < latents.ndim:
        value = value.reshape(*value.shape, *(1,) * (latents.ndim - value.ndim))
    return value.to(latents.device, non_blocking=True)


def _unserved_step(
    noise_pred: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float | Tensor,
    eta: float,
) -> str:
    """Why the fused step cannot take the call; empty if it can."""
    others = [noise_pred] if prev_sample is None else [noise_pred, prev_sample]
    if sample.device.type not in ("cpu", "cuda"):
        return f"latents on {sample.device.type}"
    if sample.ndim < 2 or not sample.numel() or any(t.shape != sample.shape for t in others):
        return f"latents of shape {', '.join(str(tuple(t.shape)) for t in (sample, *others))}"
    if any(t.device != sample.device for t in others):
        return "latents on different devices"
    if not all(t.is_floating_point() for t in (sample, *others)):
        return "latents that are no floating-point numbers"
    if not isinstance(eta, Real) or (isinstance(sigma_max, Tensor) and sigma_max.numel() != 1):
        return "eta or sigma_max other than one number"
    for value in (sigma, sigma_next):
        rows = value.shape[:1].numel()  # 1 for 0-dim
        if rows not in (1, len(sample)) or value.numel() != rows or value.ndim > sample.ndim:
            return f"a sigma of shape {tuple(value.shape)} for latents of shape {tuple(sample.shape)}"
    if torch.is_grad_enabled():
        if sample.requires_grad:
            return "a gradient for the sample"
        if prev_sample is None and noise_pred.requires_grad:
            return "a gradient for the latent that is drawn"
    return ""


# ---- the classes, made when asked for --------------------------------------------------------------------------------

# name -> (UniRL's module, what is put over its class)
_CLASSES: dict[str, tuple[str, type]] = {
    "FlowDPPO": ("unirl.algorithms.flowdppo", _FlowDPPO),
    "FlowGRPO": ("unirl.algorithms.flowgrpo", _FlowGRPO),
    "FlowSDEStrategy": ("unirl.sde.kernels", _Strategy),
    "CPSSDEStrategy": ("unirl.sde.kernels", _Strategy),
    "DanceSDEStrategy": ("unirl.sde.kernels", _Strategy),
}
# What is called or replaced of UniRL's: methods with their parameters, and names of `unirl.algorithms.base`.
_ALGORITHM_METHODS = {
    "_resolve_target_steps": ("self", "segment"),
    "compute_loss_and_backward": tuple(inspect.signature(_Algorithm.compute_loss_and_backward).parameters),
    "prepare_segment": ("self", "conditions", "segment"),
}
_STRATEGY_METHODS = {"denoise": tuple(inspect.signature(_Strategy.denoise).parameters)}
_BASE = ("AlgorithmStepResult", "_resolve_clip_range_from_schedule", "gather_sde_field", "typed_conditions")


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, mine = _CLASSES[name]
    base = _patch.attribute(_patch.module(module), name)
    is_algorithm = issubclass(mine, _Algorithm)
    for method, parameters in (_ALGORITHM_METHODS if is_algorithm else _STRATEGY_METHODS).items():
        _patch.check_parameters(f"{name}.{method}", _patch.attribute(base, method), parameters)
    for needed in _BASE if is_algorithm else ():
        _patch.attribute(_patch.module("unirl.algorithms.base"), needed)
    # The module by name: UniRL's classes are abstract, and a class that their metaclass makes is taken for abc's.
    own = {"__module__": __name__, "__doc__": mine.__doc__, "__signature__": _signature(base, mine)}
    made = globals()[name] = type(name, (mine, base), own)
    return made


def __dir__() -> list[str]:
    return sorted(__all__)


def _signature(base: Callable[..., Any], mine: type) -> inspect.Signature:
    """UniRL's keywords, which Hydra and editors see, and ours."""
    signature = inspect.signature(base)
    own = [p for p in inspect.signature(mine).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return signature.replace(parameters=[*signature.parameters.values(), *own])


def _say_fused(instance: object, more: str = "") -> None:
    _patch.say_once(logging.INFO, f"flowdppo_ops: UniRL's {type(instance).__name__} runs fused{more}")
