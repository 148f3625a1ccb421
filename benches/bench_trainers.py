"""Times a training step of each trainer, from the model's output to its gradient, beside the integrated one.

    python benches/bench_trainers.py [--ops flow_grpo] [--sizes sd35 4x8] [--threads 2] [--json FILE]
    FLOWDPPO_OPS_VERL_OMNI=... FLOWDPPO_OPS_UNIRL=... python benches/bench_trainers.py --device cuda --json FILE

Scheduler step, log-prob, loss, metrics and backward of one micro-batch, all rows at one step: Flow-DPPO for verl-omni
and UniRL, the clipped loss for flow_grpo and Flow-Factory. `eager` is that chain in plain PyTorch (`trainer_chain.py`),
`trainer` the trainer's own functions where an environment variable gives its checkout, `fused` those functions with the
integration enabled. Results are compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trainer_chain
from bench_policy_loss import (
    KL_THRESHOLD,
    StepInputs,
    make_step_inputs,
    step_bytes,
    step_truth,
    trainer_step_loss,
    trainer_tensors,
)
from runner import Operation, Outputs, doubled, main
from torch import Tensor
from trainer_chain import NOISE_LEVEL, STEP, wide

import flowdppo_ops
from flowdppo_ops import reference

# Between the log-ratios that the inputs have, 3e-4 and 3e-2: some rows are clipped, some are not.
CLIP_RANGE = 0.01
ADV_CLIP_MAX = 5.0

TESTS = Path(__file__).parents[1] / "tests"  # for the trainers' surfaces, where a trainer is not there


def checkout(name: str) -> Path | None:
    found = os.environ.get(f"FLOWDPPO_OPS_{name.upper()}")
    return Path(found) if found else None


def surface(name: str) -> Any:
    """What loads a trainer's modules, or stands in for them."""
    if str(TESTS) not in sys.path:
        sys.path[:0] = [str(TESTS), str(TESTS / "trainers")]
    return importlib.import_module(f"trainers.{name}")


# ---- verl-omni -------------------------------------------------------------------------------------------------------


@cache
def verl_omni(fused: bool) -> Callable[[StepInputs], Outputs]:
    made = surface("verl_omni")
    if checkout("verl_omni"):
        importlib.import_module("bare_verl_omni")
    entered = made.loaded()  # and never left: the modules are there as long as the process is
    modules = entered.__enter__()
    ours = importlib.import_module("flowdppo_ops.integrations.verl_omni")
    ours.enable(strict=True)
    kind, registry = modules.schedulers.FlowMatchSDEDiscreteScheduler, modules.algos.DIFFUSION_LOSS_REGISTRY
    original = ours._patch.original
    step = kind.sample_previous_step if fused else original(kind, "sample_previous_step")
    compute_loss = (registry["flow_dppo"] if fused else original(registry, "flow_dppo")).compute_loss
    config = made.config(kl_mask_threshold=KL_THRESHOLD)
    schedule = trainer_chain.shifted_schedule(torch.device("cpu"))
    scheduler = made.scheduler(schedule.sigmas, schedule.timesteps)

    def call(i: StepInputs) -> Outputs:
        scheduler.sigmas, scheduler.timesteps = i.sigmas, i.timesteps
        _, log_prob, mean, std_dev_t, sqrt_dt = step(
            scheduler,
            i.sample,
            i.model_output.float(),
            timestep=i.timestep,
            noise_level=NOISE_LEVEL,
            prev_sample=i.prev_sample,
            return_sqrt_dt=True,
        )
        loss, _metrics = compute_loss(
            old_log_prob=i.old_log_prob,
            log_prob=log_prob,
            advantages=i.advantages,
            config=config,
            old_prev_sample_mean=i.old_mean,
            prev_sample_mean=mean,
            std_dev_t=std_dev_t,
            sqrt_dt=sqrt_dt,
        )
        return (loss,)

    return call


# ---- UniRL -----------------------------------------------------------------------------------------------------------


def unirl_chain(i: StepInputs) -> Outputs:
    """The trainers' chain; UniRL takes its sigmas by index and waits for none."""
    at = (i.sigmas[STEP].expand(len(i.sample)), i.sigmas[STEP + 1].expand(len(i.sample)))
    value, metrics = trainer_tensors("flow_sde", KL_THRESHOLD, i, *(wide(one, i.sample.shape) for one in at))
    trainer_chain.read(metrics)
    return (value,)


@cache
def unirl(fused: bool) -> Callable[[StepInputs], Outputs]:
    found = checkout("unirl")
    if found:
        sys.path.insert(0, str(found))
    else:
        sys.modules.update(surface("unirl").modules())
    ours = importlib.import_module("flowdppo_ops.integrations.unirl")
    ours.enable(strict=True)
    algorithms = importlib.import_module("unirl.algorithms.flowdppo")
    kernels = ours if fused else importlib.import_module("unirl.sde.kernels")
    strategy = kernels.FlowSDEStrategy()
    name = "_flowdppo_kl_adv_loss"
    helper = getattr(algorithms, name) if fused else ours._patch.original(algorithms, name)

    def call(i: StepInputs) -> Outputs:
        sigma, sigma_next = i.sigmas[STEP], i.sigmas[STEP + 1]
        _, log_prob, mean = strategy.denoise(
            i.model_output,
            i.sample,
            sigma,
            sigma_next,
            eta=NOISE_LEVEL,
            prev_sample=i.prev_sample,
            sigma_max=i.sigmas[1],
        )
        # As `FlowDPPO._compute_sigma_t`, of the rank of the trajectory `[B, 1, ...]`.
        sigma_t = torch.sqrt(sigma / (1 - sigma.clamp(max=0.99))) * NOISE_LEVEL * torch.sqrt(sigma - sigma_next)
        per_element, metrics = helper(
            new_logp=log_prob[:, None],
            old_logp=i.old_log_prob[:, None],
            new_means=mean[:, None],
            old_means=i.old_mean[:, None],
            advantages=i.advantages[:, None],
            sigma_t=sigma_t.reshape((1,) * (mean.ndim + 1)),
            kl_mask_threshold=KL_THRESHOLD,
        )
        # Ours are on the host, copied there at once: counted as a wait each, where a GPU waits once.
        trainer_chain.read(dict(metrics))
        return (per_element.mean(),)

    return call


# ---- the clipped loss of the scripts ---------------------------------------------------------------------------------


def clipped_loss(log_prob: Tensor, i: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """flow_grpo's `train_sd3.py` from "grpo logic" on: the loss, and what it logs, which nobody waits for."""
    advantages = torch.clamp(i.advantages, -ADV_CLIP_MAX, ADV_CLIP_MAX)
    ratio = torch.exp(log_prob - i.old_log_prob)
    clipped = -advantages * torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    loss = torch.mean(torch.maximum(-advantages * ratio, clipped))
    return loss, {
        "approx_kl": 0.5 * torch.mean((log_prob - i.old_log_prob) ** 2),
        "clipfrac": torch.mean((torch.abs(ratio - 1.0) > CLIP_RANGE).float()),
        "clipfrac_gt_one": torch.mean((ratio - 1.0 > CLIP_RANGE).float()),
        "clipfrac_lt_one": torch.mean((1.0 - ratio > CLIP_RANGE).float()),
    }


def clipped_chain(looks_up: bool, i: StepInputs) -> Outputs:
    """`looks_up`: flow_grpo finds its sigmas on the host; Flow-Factory divides the timestep by 1000."""
    if looks_up:
        scheduler = trainer_chain.Scheduler(i.sigmas, i.timesteps)
        sigma, sigma_next = trainer_chain.look_up(scheduler, i.timestep, i.sample.shape)
        sigma_max = i.sigmas[1].item()
    else:
        sigma, sigma_next = (wide(one, i.sample.shape) for one in (i.timestep / 1000, i.sigma_next))
        sigma_max = i.sigmas[1].item()
    step = trainer_chain.flow_sde(
        i.sample, i.model_output.float(), sigma, sigma_next, torch.tensor(sigma_max, device=sigma.device), NOISE_LEVEL
    )
    log_prob, _ = trainer_chain.log_prob(step, i.prev_sample, "flow_sde")
    return (clipped_loss(log_prob, i)[0],)


@cache
def flow_grpo(fused: bool) -> Callable[[StepInputs], Outputs]:
    ours = importlib.import_module("flowdppo_ops.integrations.flow_grpo")
    if fused:
        step = partial(ours.sde_step_with_logprob, strict=True)
    else:
        sys.path.insert(0, str(checkout("flow_grpo")))
        step = importlib.import_module("flow_grpo.diffusers_patch.sd3_sde_with_logprob").sde_step_with_logprob

    def call(i: StepInputs) -> Outputs:
        scheduler = SimpleNamespace(sigmas=i.sigmas, timesteps=i.timesteps)
        scheduler.index_for_timestep = partial(index_for_timestep, scheduler)
        _, log_prob, _, _ = step(
            scheduler,
            i.model_output.float(),
            i.timestep,
            i.sample.float(),
            prev_sample=i.prev_sample.float(),
            noise_level=NOISE_LEVEL,
        )
        if not fused:
            return (clipped_loss(log_prob, i)[0],)
        policy = {"clip_range": CLIP_RANGE, "adv_clip_max": ADV_CLIP_MAX, "strict": True}
        return (ours.grpo_loss(log_prob, i.old_log_prob, i.advantages, **policy)[0],)

    return call


def index_for_timestep(scheduler: Any, timestep: Tensor) -> int:
    """diffusers'."""
    found = (scheduler.timesteps == timestep).nonzero()
    return found[min(1, len(found) - 1)].item()


@cache
def flow_factory(fused: bool) -> Callable[[StepInputs], Outputs]:
    made, found = surface("flow_factory"), checkout("flow_factory")
    entered = made.real(found) if found else made.stand_in()
    with entered as module:
        ours = importlib.import_module("flowdppo_ops.integrations.flow_factory")
        ours.enable(strict=True)
        kind = module.FlowMatchEulerDiscreteSDEScheduler
        step = kind.step if fused else ours._patch.original(kind, "step")
        ours.disable()
        scheduler = kind() if found else kind({"sigmas": None, "timesteps": None})

    def call(i: StepInputs) -> Outputs:
        scheduler.sigmas, scheduler.timesteps = i.sigmas, i.timesteps
        output = step(
            scheduler,
            i.model_output,
            i.timestep,
            i.sample,
            next_latents=i.prev_sample,
            timestep_next=1000 * i.sigma_next,
            noise_level=NOISE_LEVEL,
            return_kwargs=["log_prob", "dt"],
        )
        if not fused:
            return (clipped_loss(output.log_prob, i)[0],)
        policy = {"clip_range": (-CLIP_RANGE, CLIP_RANGE), "adv_clip_range": (-ADV_CLIP_MAX, ADV_CLIP_MAX)}
        return (ours.grpo_loss(output.log_prob, i.old_log_prob, i.advantages, **policy, strict=True)[0],)

    return call


def clipped_truth(i: StepInputs, _provider: str) -> Outputs:
    i = doubled(i)
    result = reference.step_loss(
        i.model_output,
        i.sample,
        i.prev_sample,
        i.advantages,
        sigma=i.sigma,
        sigma_next=i.sigma_next,
        sigma_max=i.sigmas[1],
        noise_level=NOISE_LEVEL,
        old_log_prob=i.old_log_prob,
        objective=flowdppo_ops.FlowGRPO(CLIP_RANGE, ADV_CLIP_MAX),
    )
    result.loss.backward()
    return result.loss.detach(), i.model_output.grad


def clipped_bytes(i: StepInputs, _provider: str, pass_: str) -> int:
    """As `step_bytes`, without an old policy."""
    source = i.model_output.nbytes + i.sample.nbytes + i.prev_sample.nbytes
    return source if pass_ == "forward" else 2 * source + i.model_output.nbytes


# ---- the operations --------------------------------------------------------------------------------------------------


def operation(
    name: str,
    trainer: Callable[[bool], Callable[[StepInputs], Outputs]],
    chain: Callable[[StepInputs], Outputs],
    expected: Callable[[StepInputs, str], Outputs],
    bytes_moved: Callable[[StepInputs, str, str], int],
) -> Operation:
    return Operation(
        name=name,
        outputs=("loss",),
        dtypes=("bf16+fp32", "fp32"),
        make_inputs=partial(make_step_inputs, "flow_sde"),
        providers={
            "eager": lambda: chain,
            **({"trainer": partial(trainer, False)} if checkout(name) else {}),
            "fused": partial(trainer, True),
        },
        expected=expected,
        bytes_moved=bytes_moved,
        copied="sample",
        leaf="model_output",
    )


def dppo_truth(i: StepInputs, provider: str) -> Outputs:
    return step_truth("flow_sde", i, provider)


def whole_step_bytes(i: StepInputs, _provider: str, pass_: str) -> int:
    return step_bytes(i, "fused", pass_)


OPERATIONS = {
    one.name: one
    for one in (
        operation("verl_omni", verl_omni, trainer_step_loss("flow_sde"), dppo_truth, whole_step_bytes),
        operation("unirl", unirl, unirl_chain, dppo_truth, whole_step_bytes),
        operation("flow_grpo", flow_grpo, partial(clipped_chain, True), clipped_truth, clipped_bytes),
        operation("flow_factory", flow_factory, partial(clipped_chain, False), clipped_truth, clipped_bytes),
    )
}

if __name__ == "__main__":
    main("bench_trainers", __doc__.splitlines()[0], OPERATIONS, tuple(OPERATIONS), None)
