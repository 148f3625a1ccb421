"""Times `flowdppo_ops.loss` and `flowdppo_ops.step_loss` beside what trainers do: eager, compiled, in Triton.

    python benches/bench_policy_loss.py [--ops step_loss] [--sizes sd35 4x8] [--dtypes fp32] [--threads 2] [--json FILE]
    python benches/bench_policy_loss.py --device cuda --json FILE

`policy_loss` starts at the step's mean, `step_loss` at the model's output. Each provider's loss and gradient are
compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import trainer_chain
from runner import Operation, Outputs, compiled, doubled, main, max_autotuned
from torch import Tensor
from trainer_chain import NOISE_LEVEL, wide

import flowdppo_ops
from flowdppo_ops import reference

# Far above what bf16 storage of the means adds to the KL at std 0.4 (9e-6), so that rounding decides no row.
KL_THRESHOLD = 1e-3
OBJECTIVE = flowdppo_ops.FlowDPPO(kl_mask_threshold=KL_THRESHOLD)


# ---- what both operations are tried on -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of low and high KL, of ratio below and above 1, of both signs of the advantage.

    Only the third and fourth row are blocked: the gradient of a blocked row is zeros and might be cheaper to make.
    """

    drift: Tensor  # latents: the new mean less the old
    action: Tensor  # latents: the next sample less the old mean
    advantages: Tensor  # rows


def draw_rows(shape: tuple[int, ...], std: Tensor, generator: torch.Generator) -> Rows:
    """`std`: rows."""
    rows, latent_dims, device = shape[0], tuple(range(1, len(shape))), std.device
    row = torch.arange(rows, device=device)
    kl = torch.where((row % 2 == 1) | (row == 2), 10.0, 0.1) * KL_THRESHOLD
    lean = torch.where(row % 2 == 0, 2.0, -2.0)  # the sample lies towards the new mean (ratio above 1) or away from it
    direction, noise = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    size = direction.square().mean(latent_dims, keepdim=True).sqrt()
    drift = direction * wide(std * torch.sqrt(2 * kl), shape) / size
    advantages = torch.where(row == 3, -1.0, 1.0) * torch.linspace(0.5, 2.0, rows, device=device)
    return Rows(drift, wide(lean, shape) * drift + wide(std, shape) * noise, advantages)


def log_prob_of(innovation: Tensor, std: Tensor, sampler: str) -> Tensor:
    """Rows, formed in float64. `std`: rows."""
    q, std = innovation.double().square().flatten(1).mean(1), std.double()
    if sampler == "cps":
        return -q.float()
    return (-q / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)).float()


# ---- loss ----------------------------------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """What a trainer holds at the loss. The means and the sample have the dtype under test, the rest is float32."""

    mean: Tensor  # requires grad
    old_mean: Tensor
    prev_sample: Tensor
    old_log_prob: Tensor  # rows
    advantages: Tensor  # rows
    std: Tensor  # [rows, 1, ...]


def make_loss_inputs(shape: tuple[int, ...], dtype: str, device: torch.device) -> LossInputs:
    # Not fp16: its gradients, 1e-6 an element, are subnormal without a scaled loss, and too coarse to be checked.
    of_latents = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    std = torch.linspace(0.5, 0.7, shape[0], device=device)
    old_mean = torch.randn(shape, generator=generator, device=device)
    rows = draw_rows(shape, std, generator)
    latents = (old_mean + rows.drift, old_mean, old_mean + rows.action)
    mean, old_mean, prev_sample = (t.to(of_latents) for t in latents)
    old_log_prob = log_prob_of(prev_sample.double() - old_mean.double(), std, "flow_sde")
    return LossInputs(mean.requires_grad_(), old_mean, prev_sample, old_log_prob, rows.advantages, wide(std, shape))


def trainer_loss(i: LossInputs) -> Outputs:
    """The trainers' chain from the step's mean to the loss, one PyTorch operation after the other.

    Follows verl-omni at a1139baf: the log-prob of `FlowMatchSDEDiscreteScheduler.sample_previous_step` (per element,
    in float32, then the mean over the latents) and `FlowDPPOLoss.compute_loss`, without its metrics and their 13 host
    synchronisations; std is the transition's, which it multiplies together first. Both favour this side.
    """
    latent_dims = tuple(range(1, i.mean.ndim))
    mean, old_mean, prev_sample = i.mean.float(), i.old_mean.float(), i.prev_sample.float()
    log_prob = -((prev_sample - mean) ** 2) / (2 * i.std**2) - torch.log(i.std) - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob.mean(dim=latent_dims)

    ratio = torch.exp(log_prob - i.old_log_prob)
    kl = ((mean - old_mean).pow(2) / (2 * i.std.pow(2))).mean(dim=latent_dims)
    high = kl >= KL_THRESHOLD
    positive_blocked = high & (ratio > 1.0) & (i.advantages > 0)
    negative_blocked = high & (ratio < 1.0) & (i.advantages < 0)
    row_loss = -i.advantages * ratio
    return (torch.where(positive_blocked | negative_blocked, torch.zeros_like(row_loss), row_loss).mean(),)


def package_loss(loss: Callable, i: LossInputs) -> Outputs:
    """`loss`: the package's, or its reference's."""
    policy = {"std": i.std, "prev_sample": i.prev_sample, "old_log_prob": i.old_log_prob, "objective": OBJECTIVE}
    return (loss(i.mean, i.old_mean, i.advantages, **policy).loss,)


def triton_loss() -> Callable[[LossInputs], Outputs]:
    from triton_policy_loss import triton_policy_loss

    def loss(i: LossInputs) -> Outputs:
        return (triton_policy_loss(i.mean, i.old_mean, i.prev_sample, i.advantages, i.std, KL_THRESHOLD),)

    return loss


def loss_truth(i: LossInputs, _provider: str) -> Outputs:
    i = doubled(i)
    (loss,) = package_loss(reference.loss, i)
    loss.backward()
    return loss.detach(), i.mean.grad


def loss_bytes(i: LossInputs, provider: str, pass_: str) -> int:
    """Forward reads mean, old mean and sample; backward reads mean and sample and writes the gradient.

    Row vectors are left out: 4 bytes beside 65536 elements.
    """
    forward = i.mean.nbytes + i.old_mean.nbytes + i.prev_sample.nbytes
    return forward if pass_ == "forward" else forward + 2 * i.mean.nbytes + i.prev_sample.nbytes


# ---- step_loss -----------------------------------------------------------------------------------------------------


class StepInputs(NamedTuple):
    """What a trainer holds after the model's forward; the old policy in each of its forms.

    The model's output has the dtype under test, as has the old one; the residual is float16, the rest float32.
    """

    model_output: Tensor  # requires grad
    sample: Tensor
    prev_sample: Tensor
    old_mean: Tensor
    old_output: Tensor
    old_residual: Tensor
    old_log_prob: Tensor  # rows
    advantages: Tensor  # rows
    timestep: Tensor  # this and the next two: `trainer_chain.At`
    sigma: Tensor
    sigma_next: Tensor
    sigmas: Tensor  # this and the next: `trainer_chain.Scheduler`
    timesteps: Tensor


# provider -> the form in which it gets the old policy; the others get its mean, as trainers do.
OLD_FORMS = {"fused_output": "old_output", "fused_residual": "old_residual"}
_KEYWORDS = {"old_mean": "old_prev_sample_mean", "old_output": "old_model_output", "old_residual": "old_residual"}


def make_step_inputs(
    sampler: str,
    shape: tuple[int, ...],
    dtype: str,
    device: torch.device,
    model: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StepInputs:
    """`model`: sample and timestep to its output; random numbers stand in for one. The old policy is made around it."""
    of_output = {"fp32": torch.float32, "bf16+fp32": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    schedule = trainer_chain.shifted_schedule(device)
    at = trainer_chain.at_one_step(schedule, shape[0])
    noise_level, sigma_max = schedule.sigmas.new_tensor(NOISE_LEVEL).double(), schedule.sigmas[1].double()
    coefficients = reference.transition(sampler, at.sigma.double(), at.sigma_next.double(), noise_level, sigma_max)
    a, b, std = (row.float() for row in coefficients)
    sample, output = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    output = (model(sample, at.timestep) if model else output).to(of_output)
    rows = draw_rows(shape, std, generator)
    old_output = (output - rows.drift / wide(b, shape)).to(of_output)
    old_mean = wide(a, shape) * sample + wide(b, shape) * old_output
    prev_sample = old_mean + rows.action
    return StepInputs(
        model_output=output.requires_grad_(),
        sample=sample,
        prev_sample=prev_sample,
        old_mean=old_mean,
        old_output=old_output,
        old_residual=((prev_sample - old_mean) / wide(std, shape)).half(),
        old_log_prob=log_prob_of(prev_sample.double() - old_mean.double(), std, sampler),
        advantages=rows.advantages,
        **at._asdict(),
        **schedule._asdict(),
    )


def trainer_tensors(
    sampler: str, limit: float, i: StepInputs, sigma: Tensor, sigma_next: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the trainers' step that waits for nothing: loss, and metrics not read. `sigma`: `[rows, 1, ...]`."""
    velocity = i.model_output.float()
    step = trainer_chain.SAMPLERS[sampler](i.sample, velocity, sigma, sigma_next, i.sigmas[1], NOISE_LEVEL)
    log_prob, sqrt_dt = trainer_chain.log_prob(step, i.prev_sample, sampler)
    return trainer_chain.dppo_loss(log_prob, i.old_log_prob, i.advantages, step, sqrt_dt, i.old_mean, limit)


def trainer_limit(sampler: str) -> float:
    """The chain's KL threshold that blocks what `KL_THRESHOLD` should: but for sde, its KL is 1/-dt times too large."""
    if sampler == "flow_sde":
        return KL_THRESHOLD
    at = trainer_chain.at_one_step(trainer_chain.shifted_schedule(torch.device("cpu")), 1)
    return KL_THRESHOLD / (at.sigma - at.sigma_next).item()


def trainer_step_loss(sampler: str) -> Callable[[StepInputs], Outputs]:
    limit = trainer_limit(sampler)

    def loss(i: StepInputs) -> Outputs:
        scheduler = trainer_chain.Scheduler(i.sigmas, i.timesteps)
        sigmas = trainer_chain.look_up(scheduler, i.timestep, i.sample.shape)
        value, metrics = trainer_tensors(sampler, limit, i, *sigmas)
        trainer_chain.read(metrics)
        return (value,)

    return loss


def compiled_step_loss(sampler: str, mode: str | None = None) -> Callable[[StepInputs], Outputs]:
    """The sigmas ready-made and the metrics never read: with the waits in it there would be a graph per metric."""
    tensors = compiled(partial(trainer_tensors, sampler, trainer_limit(sampler)), mode)

    def loss(i: StepInputs) -> Outputs:
        return (tensors(i, wide(i.sigma, i.sample.shape), wide(i.sigma_next, i.sample.shape))[0],)

    return loss


def package_step_loss(step_loss: Callable, sampler: str, old_form: str, i: StepInputs) -> Outputs:
    """`step_loss`: the package's, or its reference's. The rows' sigmas stay on the device."""
    policy = {
        _KEYWORDS[old_form]: getattr(i, old_form),
        "old_log_prob": i.old_log_prob,
        "objective": OBJECTIVE,
    }
    sigmas = {"sigma": i.sigma, "sigma_next": i.sigma_next, "sigma_max": i.sigmas[1]}
    schedule = {"sampler": sampler, "noise_level": NOISE_LEVEL, **sigmas}
    return (step_loss(i.model_output, i.sample, i.prev_sample, i.advantages, **schedule, **policy).loss,)


def triton_step() -> Callable[[StepInputs], Outputs]:
    from triton_policy_loss import triton_step_loss

    def loss(i: StepInputs) -> Outputs:
        # sigma_max as a number: it stands in for a sigma of 1, which there is none of here.
        schedule = (i.sigma, i.sigma_next, NOISE_LEVEL, 0.99)
        latents = (i.model_output, i.sample, i.prev_sample, i.old_mean)
        return (triton_step_loss(*latents, i.advantages, *schedule, KL_THRESHOLD),)

    return loss


def step_truth(sampler: str, i: StepInputs, provider: str) -> Outputs:
    i = doubled(i)
    (loss,) = package_step_loss(reference.step_loss, sampler, OLD_FORMS.get(provider, "old_mean"), i)
    loss.backward()
    return loss.detach(), i.model_output.grad


def step_bytes(i: StepInputs, provider: str, pass_: str) -> int:
    """Forward reads output, sample, next sample and old policy; backward the first three, and writes the gradient."""
    source = i.model_output.nbytes + i.sample.nbytes + i.prev_sample.nbytes
    forward = source + getattr(i, OLD_FORMS.get(provider, "old_mean")).nbytes
    return forward if pass_ == "forward" else forward + source + i.model_output.nbytes


def step_operation(name: str, sampler: str) -> Operation:
    def fused(old_form: str) -> Callable[[], Callable[[StepInputs], Outputs]]:
        return lambda: partial(package_step_loss, flowdppo_ops.step_loss, sampler, old_form)

    return Operation(
        name=name,
        outputs=("loss",),
        dtypes=("bf16+fp32", "fp32"),
        make_inputs=partial(make_step_inputs, sampler),
        providers={
            "eager": partial(trainer_step_loss, sampler),
            "compile": partial(compiled_step_loss, sampler),
            "compile_max": max_autotuned(partial(compiled_step_loss, sampler)),
            **({"triton": triton_step} if sampler == "flow_sde" else {}),
            "fused": fused("old_mean"),
            **{provider: fused(form) for provider, form in OLD_FORMS.items()},
        },
        expected=partial(step_truth, sampler),
        bytes_moved=step_bytes,
        copied="sample",
        leaf="model_output",
    )


OPERATIONS = {
    "policy_loss": Operation(
        name="policy_loss",
        outputs=("loss",),
        dtypes=("fp32", "bf16"),
        make_inputs=make_loss_inputs,
        providers={
            "eager": lambda: trainer_loss,
            "compile": lambda: compiled(trainer_loss),
            "compile_max": max_autotuned(partial(compiled, trainer_loss)),
            "triton": triton_loss,
            "fused": lambda: partial(package_loss, flowdppo_ops.loss),
        },
        expected=loss_truth,
        bytes_moved=loss_bytes,
        copied="old_mean",
        leaf="mean",
    ),
    "step_loss": step_operation("step_loss", "flow_sde"),
    "step_loss_cps": step_operation("step_loss_cps", "cps"),
    "step_loss_dance": step_operation("step_loss_dance", "dance_sde"),
}


if __name__ == "__main__":
    main("bench_policy_loss", __doc__.splitlines()[0], OPERATIONS, ("policy_loss", "step_loss"), None)
