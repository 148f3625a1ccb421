"""What UniRL's modules look like to `flowdppo_ops.integrations.unirl`, without UniRL.

Names, parameters, class attributes and the plumbing that the integration leaves to UniRL, at commit 1a7b501e (of June
2026) and, with `modules(september=True)`, at 0c97cfb8. Of its arithmetic only the sigmas of the KL and the reference
KL, which the integration calls: a helper or a step here returns `OwnResult`, which says that UniRL's own function was
called, and how.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch

from flowdppo_ops.reference import transition


class OwnResult(NamedTuple):
    name: str
    given: dict[str, Any]


# ---- unirl.algorithms ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlgorithmStepResult:
    loss: float
    metrics: dict[str, Any]
    num_steps_or_tokens: int
    has_backward: bool


def typed_conditions(conditions, conditions_cls):
    return conditions if conditions_cls is None else conditions_cls.from_dict(dict(conditions))


def gather_sde_field(tensor, sde_indices, target_steps, *, field_name="field"):
    if tensor is None or sde_indices is None:
        raise ValueError(f"gather_sde_field: {field_name} or sde_indices is None")
    recorded = sde_indices.tolist()
    return tensor[:, [recorded.index(step) for step in target_steps]]


def _resolve_clip_range_from_schedule(clip_range, schedule, progress):
    factors = {"linear_decay": 1 - 0.5 * progress, "cosine_decay": 0.5 * (1 + math.cos(math.pi * progress))}
    return clip_range * factors.get(schedule, 1.0)


def _grpo_clip_loss(*, new_logp, old_logp, advantages, clip_range, clip_range_high=None):
    return OwnResult("_grpo_clip_loss", dict(locals()))


def _flowdppo_kl_adv_loss(*, new_logp, old_logp, new_means, old_means, advantages, sigma_t, kl_mask_threshold):
    return OwnResult("_flowdppo_kl_adv_loss", dict(locals()))


class StageAlgorithm(ABC):  # noqa: B024 (as UniRL's: the metaclass is what matters)
    requires_ema_rollout = False
    supports_multi_update = False
    anchor_fields: tuple[str, ...] = ()

    def _resolve_target_steps(self, segment):
        return [] if segment.sde_indices is None else [int(i) for i in segment.sde_indices.tolist()]

    def prepare_segment(self, *, conditions, segment):
        raise AssertionError("UniRL's own, which the integration inherits")

    def compute_loss_and_backward(self, *, conditions, segment, advantages, training_progress, loss_scale):
        raise AssertionError("UniRL's own, which the integration replaces")


def _stage(stage, pipeline, stage_attr):
    if stage is None and pipeline is None:
        raise ValueError("either `stage` or `pipeline` must be provided")
    return getattr(pipeline, stage_attr) if stage is None else stage


class FlowDPPO(StageAlgorithm):
    supports_multi_update = True
    anchor_fields = ("sde_logp", "sde_means")

    def recomputes_anchor(self):
        return True

    def __init__(
        self,
        *,
        params,
        stage=None,
        pipeline=None,
        stage_attr="diffusion",
        kl_mask_threshold=1e-5,
        add_kl_coefficient=True,
        old_logp_source="rollout",
        conditions_cls=None,
    ):
        self.stage = _stage(stage, pipeline, stage_attr)
        self.params = params
        self.kl_mask_threshold = float(kl_mask_threshold)
        self.add_kl_coefficient = bool(add_kl_coefficient)
        self.old_logp_source = old_logp_source
        self.conditions_cls = conditions_cls

    def _compute_sigma_t(self, segment, target_steps, device):
        if not self.add_kl_coefficient:
            return torch.ones(1, len(target_steps), 1, 1, 1, device=device)
        now, following = _sigmas(segment, target_steps, device)
        return (torch.sqrt(now / (1 - now.clamp(max=0.99)) * (now - following)) * self.params.eta).reshape(
            1, -1, 1, 1, 1
        )


def _sigmas(segment, target_steps, device):
    if segment.sigmas is None:
        raise ValueError("add_kl_coefficient=True needs segment.sigmas")
    sigmas = segment.sigmas.to(device, torch.float32)
    return sigmas[target_steps], sigmas[[step + 1 for step in target_steps]]


class FlowGRPO(StageAlgorithm):
    supports_multi_update = True
    anchor_fields = ("sde_logp",)

    def recomputes_anchor(self):
        return self.old_logp_source == "replay"

    def __init__(
        self,
        *,
        params,
        stage=None,
        pipeline=None,
        stage_attr="diffusion",
        clip_range=1e-4,
        clip_schedule="constant",
        old_logp_source="rollout",
        conditions_cls=None,
    ):
        self.stage = _stage(stage, pipeline, stage_attr)
        self.params = params
        self.clip_range = float(clip_range)
        self.clip_schedule = clip_schedule
        self.old_logp_source = old_logp_source
        self.conditions_cls = conditions_cls


# ---- unirl.sde.kernels -----------------------------------------------------------------------------------------------


class StepStrategy(ABC):  # noqa: B024 (as above)
    def __init__(self, *, config=None):
        del config

    def denoise(
        self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, sigma_max=0.99, step_index=0
    ):
        return OwnResult("denoise", {name: value for name, value in locals().items() if name != "self"})


class FlowSDEStrategy(StepStrategy):
    canonical_name: ClassVar[str] = "flow"


class CPSSDEStrategy(StepStrategy):
    canonical_name: ClassVar[str] = "cps"


class DanceSDEStrategy(StepStrategy):
    canonical_name: ClassVar[str] = "dance"


# ---- since September 2026: a reference penalty, the transition's sigma, generators -----------------------------------


def _transition_sigma(stage, *, segment, target_steps, eta, device, add_coefficient, sample_ndim):
    shape = (1, len(target_steps), *(1,) * (sample_ndim - 2))
    if not add_coefficient:
        return torch.ones(shape, device=device)
    now, following = _sigmas(segment, target_steps, device)
    sigma_max = segment.sigmas.to(device)[1]
    return stage.strategy.transition_std(sigma=now, sigma_next=following, eta=eta, sigma_max=sigma_max).reshape(shape)


def _reference_replay_means(stage, ref_model, *, conditions, segment, params, target_steps):
    assert ref_model is not None
    return ref_model.replay(conditions, segment=segment, params=params, step_indices=target_steps).prev_sample_means


def _reference_kl_loss(new_means, ref_means, sigma_t):
    return ((new_means - ref_means.detach()) ** 2 / (2 * sigma_t**2)).flatten(2).mean(2).mean()


def _with_penalty(algorithm: type) -> type:
    """UniRL's constructor of September: `beta`, `backend`, and a check of the stage."""

    class Later(algorithm):
        requires_backend = True

        def __init__(self, *, beta=0.0, backend=None, **arguments):
            super().__init__(**arguments)
            if beta > 0 and backend is None:
                raise ValueError("beta > 0 needs a backend")
            if getattr(self.stage, "batch_replay_steps", False) and self.old_logp_source == "rollout":
                raise ValueError("a stage that replays all steps as one batch needs old_logp_source='replay'")
            self.beta, self._ref_model = float(beta), backend

    own = inspect.signature(algorithm).parameters
    later = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in _LATER]
    Later.__signature__ = inspect.Signature([*own.values(), *later])
    Later.__name__ = Later.__qualname__ = algorithm.__name__
    return Later


_LATER = (("beta", 0.0), ("backend", None))
SeptembersFlowDPPO, SeptembersFlowGRPO = _with_penalty(FlowDPPO), _with_penalty(FlowGRPO)


def _septembers_sigma_t(self, segment, target_steps, device, sample_ndim=5):
    given = {"segment": segment, "target_steps": target_steps, "eta": self.params.eta, "device": device}
    return _transition_sigma(self.stage, **given, add_coefficient=self.add_kl_coefficient, sample_ndim=sample_ndim)


SeptembersFlowDPPO._compute_sigma_t = _septembers_sigma_t


def _later_strategy(strategy: type) -> type:
    """`denoise` with a generator, and the transition's standard deviation, whose formula is the reference's."""

    class Later(strategy):
        def denoise(
            self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None, generator=None, sigma_max=0.99,
            step_index=0,
        ):  # fmt: skip
            return OwnResult("denoise", {name: value for name, value in locals().items() if name != "self"})

        def transition_std(self, *, sigma, sigma_next, eta, sigma_max=0.99):
            name = {"flow": "flow_sde", "cps": "cps", "dance": "dance_sde"}[self.canonical_name]
            sigma_max = torch.as_tensor(sigma_max, dtype=sigma.dtype)
            return transition(name, sigma, sigma_next, torch.as_tensor(eta, dtype=sigma.dtype), sigma_max)[2]

    Later.__name__ = Later.__qualname__ = strategy.__name__
    return Later


# ---- unirl.utils.misc ------------------------------------------------------------------------------------------------


def aggregate_numeric_metrics(metrics_list):
    names = {name for metrics in metrics_list for name in metrics}
    found = {name: [float(metrics[name]) for metrics in metrics_list if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


_CONTENTS = {
    "unirl": (),
    "unirl.algorithms": (),
    "unirl.algorithms.base": (
        *(AlgorithmStepResult, StageAlgorithm, typed_conditions, gather_sde_field),
        *(_resolve_clip_range_from_schedule, _grpo_clip_loss),
    ),
    "unirl.algorithms.flowdppo": (FlowDPPO, _flowdppo_kl_adv_loss),
    "unirl.algorithms.flowgrpo": (FlowGRPO, _grpo_clip_loss),
    "unirl.algorithms.grpo": (_grpo_clip_loss,),
    "unirl.sde": (),
    "unirl.sde.kernels": (StepStrategy, FlowSDEStrategy, CPSSDEStrategy, DanceSDEStrategy),
    "unirl.train": (),
    "unirl.train.stack": (aggregate_numeric_metrics,),
    "unirl.train.unified_model_stack": (aggregate_numeric_metrics,),
    "unirl.utils": (),
    "unirl.utils.misc": (aggregate_numeric_metrics,),
}


_SEPTEMBER = {
    "unirl.algorithms.base": (_transition_sigma, _reference_replay_means, _reference_kl_loss),
    "unirl.algorithms.flowdppo": (SeptembersFlowDPPO,),
    "unirl.algorithms.flowgrpo": (SeptembersFlowGRPO,),
    "unirl.sde.kernels": tuple(map(_later_strategy, (FlowSDEStrategy, CPSSDEStrategy, DanceSDEStrategy))),
}


def modules(september: bool = False) -> dict[str, ModuleType]:
    """Fresh modules by name, for `sys.modules`."""
    made = {name: ModuleType(name) for name in _CONTENTS}
    for name, contents in _CONTENTS.items():
        later = _SEPTEMBER.get(name, ()) if september else ()
        vars(made[name]).update({each.__name__: each for each in (*contents, *later)})
        made[name].__path__ = []
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, made[name])
    return made


# ---- the stage -------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """The fields of UniRL's LatentSegment that an algorithm reads."""

    sigmas: torch.Tensor | None = None
    sde_indices: torch.Tensor | None = None
    sde_logp: torch.Tensor | None = None
    sde_means: torch.Tensor | None = None


class Replay(NamedTuple):
    log_probs: torch.Tensor
    prev_sample_means: torch.Tensor | None


class Stage:
    """Replays recorded latents through a strategy as UniRL's stages do: step by step, stacked along axis 1.

    `latents`: noise_pred, sample and prev_sample, `[B, S, *latent]` each, of the steps `step_indices`.
    """

    def __init__(self, strategy: Any, latents: tuple[torch.Tensor, ...], means_dtype=torch.float32) -> None:
        self.strategy = strategy
        self.latents = latents
        self.means_dtype = means_dtype

    def replay(self, conditions, *, segment, params, step_indices):
        log_probs, means = [], []
        for place, step in enumerate(step_indices):
            noise_pred, sample, prev_sample = (t[:, place] for t in self.latents)
            _, log_prob, mean = self.strategy.denoise(
                noise_pred=noise_pred,
                sample=sample,
                sigma=segment.sigmas[step],
                sigma_next=segment.sigmas[step + 1],
                eta=params.eta,
                prev_sample=prev_sample,
                sigma_max=segment.sigmas[1],
                step_index=step,
            )
            log_probs.append(log_prob)
            means.append(mean)
        return Replay(torch.stack(log_probs, 1), torch.stack(means, 1).to(self.means_dtype))
