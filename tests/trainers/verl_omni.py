"""verl-omni's surface, as an integration sees it: a stand-in, or the trainer itself where it is loaded.

The stand-in has the names, signatures and registry of verl-omni a1139ba and none of its arithmetic: its own functions
give back what they were called with. `bare_verl_omni.py` loads the real one.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ALGOS = "verl_omni.trainer.diffusion.diffusion_algos"
SCHEDULERS = "verl_omni.pipelines.schedulers.flow_match_sde"
WORKERS = "verl_omni.workers.utils.losses"


class Settings(dict):
    """`config.diffusion_loss`: read as attributes and with `.get`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def config(**settings: Any) -> SimpleNamespace:
    """Of an actor: the worker's own fields, and a loss with these settings."""
    usual = {"clip_ratio": 1e-4, "adv_clip_max": 5.0, "kl_mask_threshold": 1e-5, "add_kl_coefficient": True}
    use_kl = "kl_loss_coef" in settings
    return SimpleNamespace(
        diffusion_loss=Settings(usual | settings),
        global_batch_info={},
        loss_scale_factor=1.0,
        rollout_correction=SimpleNamespace(bypass_mode=False),
        use_kl_loss=use_kl,
        kl_loss_coef=settings.get("kl_loss_coef", 0.0),
        use_distill_loss=False,
    )


def scheduler(sigmas: Tensor, timesteps: Tensor, step_index: int | None = None) -> Any:
    made = sys.modules[SCHEDULERS].FlowMatchSDEDiscreteScheduler()
    made.sigmas, made.timesteps, made._step_index = sigmas, timesteps, step_index
    return made


def adapter(made: Any, latents: Tensor, timesteps: Tensor, velocity: Tensor, step: int, **algorithm: Any) -> Any:
    """What SD3's training adapter gives the worker: log-probs, means, `std_dev_t`, `sqrt_dt` of a step of trajectories.

    latents: `[B, steps + 1, ...]`; timesteps: `[B, steps]`; velocity: what the transformer says.
    """
    if is_real():
        from verl_omni.pipelines.sd3_flow_grpo.diffusers_training_adapter import StableDiffusion3FlowGRPO

        model = SimpleNamespace(pipeline=SimpleNamespace(guidance_scale=None), algo=SimpleNamespace(**algorithm))
        batch = {"all_latents": latents, "all_timesteps": timesteps}
        return StableDiffusion3FlowGRPO.forward_and_sample_previous_step(
            lambda **_: (velocity,), made, model, {}, None, batch, step
        )
    return made.sample_previous_step(
        sample=latents[:, step].float(),
        model_output=velocity.float(),
        timestep=timesteps[:, step],
        prev_sample=latents[:, step + 1].float(),
        return_logprobs=True,
        return_sqrt_dt=True,
        **algorithm,
    )[1:]


def diffusion_loss(actor: Any, model_output: dict[str, Tensor], data: dict[str, Tensor], steps: int) -> Any:
    """The worker's loss of a micro-batch and its metrics, `steps` gradients being accumulated."""
    workers = sys.modules[WORKERS]
    numbers = {"gradient_accumulation_steps": steps, "sp_size": 1}
    if is_real():
        tensors = workers.tu.get_tensordict(data)
        workers.tu.assign_non_tensor(tensors, **numbers)
        return workers.diffusion_loss(actor, model_output, tensors)
    return workers.diffusion_loss(actor, model_output, data | numbers)


def is_real() -> bool:
    return "bare_verl_omni" in sys.modules


@contextmanager
def loaded() -> Iterator[Any]:
    """The modules that an integration imports, in `sys.modules`; `.algos`, `.schedulers`, `.workers`."""
    before = dict(sys.modules)
    if not is_real():
        sys.modules.update(_stand_in())
    try:
        algos, schedulers, workers = map(import_module, _NAMES)
        yield SimpleNamespace(algos=algos, schedulers=schedulers, workers=workers)
    finally:
        if not is_real():
            for name in set(sys.modules) - set(before):
                if name.partition(".")[0] == "verl_omni":
                    del sys.modules[name]


_NAMES = (ALGOS, SCHEDULERS, WORKERS)


def _stand_in() -> dict[str, types.ModuleType]:
    modules: dict[str, types.ModuleType] = {}
    for name in _NAMES:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    vars(modules[ALGOS]).update(_algos())
    vars(modules[SCHEDULERS]).update(_schedulers())
    vars(modules[WORKERS]).update(_workers(modules[ALGOS].DIFFUSION_LOSS_REGISTRY))
    return modules


def own(name: str, **inputs: Any) -> tuple[Tensor, dict[str, Any]]:
    """What a function of the stand-in returns: that it ran, and with what."""
    return torch.tensor(-1.0), {"own": name, **inputs}


def _algos() -> dict[str, Any]:
    @dataclass
    class DiffusionLossResult:
        loss: Tensor
        metrics: dict[str, Any]
        add_loss_metric: bool = False

    class DiffusionLossFn:
        required_model_output_keys: tuple[str, ...] = ()
        required_data_keys: tuple[str, ...] = ()

        def validate_inputs(self, *, loss_name, model_output, data):
            missing = [key for key in self.required_model_output_keys if key not in model_output]
            missing += [key for key in self.required_data_keys if key not in data]
            if missing:
                raise KeyError(f"{loss_name}: {missing}")

    class FlowGRPOLoss(DiffusionLossFn):
        required_model_output_keys = ("log_probs",)
        required_data_keys = ("old_log_probs", "advantages")

        @classmethod
        def compute_loss(cls, *, old_log_prob, log_prob, advantages, config, rollout_is_weights=None):
            return own("FlowGRPOLoss", log_prob=log_prob)

        def __call__(self, *, config, model_output, data):
            loss, metrics = self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                config=config,
                rollout_is_weights=data.get("rollout_is_weights", None),
            )
            return DiffusionLossResult(loss=loss, metrics=metrics)

    class _MeanLoss(DiffusionLossFn):
        required_model_output_keys = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
        required_data_keys = ("old_log_probs", "advantages", "old_prev_sample_mean")

        def __call__(self, *, config, model_output, data):
            loss, metrics = self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                old_prev_sample_mean=data["old_prev_sample_mean"],
                prev_sample_mean=model_output["prev_sample_mean"],
                std_dev_t=model_output["std_dev_t"],
                sqrt_dt=model_output["sqrt_dt"],
                config=config,
                rollout_is_weights=data.get("rollout_is_weights", None),
            )
            return DiffusionLossResult(loss=loss, metrics=metrics)

    class FlowDPPOLoss(_MeanLoss):
        @classmethod
        def compute_loss(
            cls,
            *,
            old_log_prob,
            log_prob,
            advantages,
            config,
            old_prev_sample_mean,
            prev_sample_mean,
            std_dev_t,
            sqrt_dt,
            rollout_is_weights=None,
        ):
            return own("FlowDPPOLoss", log_prob=log_prob, std_dev_t=std_dev_t)

    class GRPOGuardLoss(_MeanLoss):
        @classmethod
        def compute_loss(
            cls,
            *,
            old_log_prob,
            log_prob,
            advantages,
            config,
            old_prev_sample_mean,
            prev_sample_mean,
            std_dev_t,
            sqrt_dt,
            rollout_is_weights=None,
        ):
            return own("GRPOGuardLoss", log_prob=log_prob, std_dev_t=std_dev_t)

    class KLLoss(DiffusionLossFn):
        required_model_output_keys = ("prev_sample_mean", "std_dev_t")
        required_data_keys = ("ref_prev_sample_mean",)

        @classmethod
        def compute_loss(cls, *, prev_sample_mean, ref_prev_sample_mean, std_dev_t):
            return own("KLLoss", prev_sample_mean=prev_sample_mean)

        def __call__(self, *, config, model_output, data):
            loss, metrics = self.compute_loss(
                prev_sample_mean=model_output["prev_sample_mean"],
                ref_prev_sample_mean=data["ref_prev_sample_mean"],
                std_dev_t=model_output["std_dev_t"],
            )
            return DiffusionLossResult(loss=loss, metrics=metrics)

    classes = {
        "flow_dppo": FlowDPPOLoss,
        "flow_grpo": FlowGRPOLoss,
        "dance_grpo": FlowGRPOLoss,
        "grpo_guard": GRPOGuardLoss,
        "kl": KLLoss,
    }
    registry = {name: kind() for name, kind in classes.items()}
    return {kind.__name__: kind for kind in classes.values()} | {"DIFFUSION_LOSS_REGISTRY": registry}


def _schedulers() -> dict[str, Any]:
    def randn_tensor(shape, generator=None, device=None, dtype=None):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    class FlowMatchSDEDiscreteScheduler:
        @property
        def step_index(self):
            return self._step_index

        def index_for_timestep(self, timestep):
            raise AssertionError("makes the host wait for each sample")

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
            assert sde_type in ("sde", "cps", "dance_sde")
            assert sample.dtype == model_output.dtype == torch.float32
            assert prev_sample is None or prev_sample.dtype == torch.float32
            if per_token_timesteps is not None:
                raise NotImplementedError("per_token_timesteps")
            return own("sample_previous_step", sample=sample, noise_level=noise_level)

    return {"FlowMatchSDEDiscreteScheduler": FlowMatchSDEDiscreteScheduler, "randn_tensor": randn_tensor}


def _workers(registry: dict[str, Any]) -> dict[str, Any]:
    class Metric:
        def __init__(self, aggregation, value=None):
            assert aggregation in ("mean", "min", "max")
            self.aggregation, self.values = aggregation, [value]

        @classmethod
        def from_dict(cls, data, aggregation):
            return {key: cls(value=value, aggregation=aggregation) for key, value in data.items()}

    def diffusion_loss(config, model_output, data, dp_group=None):
        metric = sys.modules[WORKERS].Metric  # looked up when called, as a module's own functions do
        modes = [config.diffusion_loss.get("loss_mode", "flow_grpo")] + ["kl"] * config.use_kl_loss
        total, metrics = None, {}
        for mode in modes:
            registry[mode].validate_inputs(loss_name=mode, model_output=model_output, data=data)
            result = registry[mode](config=config, model_output=model_output, data=data)
            metrics |= metric.from_dict(result.metrics, aggregation="mean")
            if total is None:
                total = result.loss
            else:
                total += result.loss * config.kl_loss_coef  # in place, as the worker does
        return total / data["gradient_accumulation_steps"], metrics

    return {"Metric": Metric, "diffusion_loss": diffusion_loss}
