"""Times `flowdppo_ops.loss` and `flowdppo_ops.step_loss` beside what trainers do: eager, compiled, in Triton.

    python benches/bench_policy_loss.py [--ops step_loss] [--sizes small 16x65536] [--dtypes fp32] [--json FILE]
    python benches/bench_policy_loss.py --device cuda --json FILE

`policy_loss` starts at the step's mean, `step_loss` at the model's output. See README.md beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import trainer_chain
from harness import Operation, Outputs, Provider, compiled, doubled, main
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


def log_prob_of(innovation: Tensor, std: Tensor) -> Tensor:
    """Rows, formed in float64. `std`: rows."""
    q, std = innovation.double().square().flatten(1).mean(1), std.double()
    return (-q / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)).float()


class Minimal(torch.autograd.Function):
    """The least that an autograd function costs: two saved tensors, an empty result, an empty gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, prev_sample: Tensor) -> Tensor:
        ctx.save_for_backward(leaf, prev_sample)
        return leaf.new_empty(())

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


# The first field of either operation's inputs is what the gradient goes to.
YARDSTICKS: dict[str, Provider] = {"minimal": lambda inputs: (Minimal.apply(inputs[0], inputs.prev_sample),)}


# ---- loss ----------------------------------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """What a trainer holds at the loss. The means and the sample have the dtype under test, the rest is float32."""

    mean: Tensor  # requires grad
    old_mean: Tensor
    prev_sample: Tensor
    old_log_prob: Tensor  # rows
    advantages: Tensor  # rows
    std: Tensor  # [rows, 1, ...], of the transition; with this -dt is 1
    dt: Tensor  # [rows, 1, ...]


def make_loss_inputs(shape: tuple[int, ...], dtype: str, device: torch.device) -> LossInputs:
    # Not fp16: its gradients, 1e-6 an element, are subnormal without a scaled loss, and too coarse to be checked.
    of_latents = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    std = torch.linspace(0.5, 0.7, shape[0], device=device)
    old_mean = torch.randn(shape, generator=generator, device=device)
    rows = draw_rows(shape, std, generator)
    latents = (old_mean + rows.drift, old_mean, old_mean + rows.action)
    mean, old_mean, prev_sample = (t.to(of_latents) for t in latents)
    old_log_prob = log_prob_of(prev_sample.double() - old_mean.double(), std)
    std = wide(std, shape)
    return LossInputs(
        mean.requires_grad_(), old_mean, prev_sample, old_log_prob, rows.advantages, std, -torch.ones_like(std)
    )


def trainer_loss(inputs: LossInputs) -> Outputs:
    """The trainers' chain from the step's mean to the loss, in float32. It has no metrics, and none of their waits."""
    mean, old_mean, prev_sample = (t.float() for t in (inputs.mean, inputs.old_mean, inputs.prev_sample))
    step = trainer_chain.Step(mean, inputs.std, inputs.dt)
    log_prob, sqrt_dt = trainer_chain.log_prob(step, prev_sample)
    policy = (inputs.old_log_prob, inputs.advantages, step, sqrt_dt, old_mean)
    return (trainer_chain.dppo_loss(log_prob, *policy, KL_THRESHOLD)[0],)


def package_loss(loss: Callable, inputs: LossInputs) -> Outputs:
    """`loss`: the package's, or its reference's."""
    policy = {"std": inputs.std, "prev_sample": inputs.prev_sample, "old_log_prob": inputs.old_log_prob}
    return (loss(inputs.mean, inputs.old_mean, inputs.advantages, **policy, objective=OBJECTIVE).loss,)


def triton_loss() -> Provider:
    from triton_policy_loss import triton_policy_loss

    def loss(inputs: LossInputs) -> Outputs:
        latents = (inputs.mean, inputs.old_mean, inputs.prev_sample)
        return (triton_policy_loss(*latents, inputs.advantages, inputs.std, KL_THRESHOLD),)

    return loss


def loss_truth(inputs: LossInputs, _provider: str) -> Outputs:
    inputs = doubled(inputs)
    (loss,) = package_loss(reference.loss, inputs)
    loss.backward()
    return loss.detach(), inputs.mean.grad


def loss_bytes(inputs: LossInputs, _provider: str, pass_: str) -> int:
    """Forward reads mean, old mean and sample; backward reads mean and sample and writes the gradient."""
    mean, prev_sample = inputs.mean.nbytes, inputs.prev_sample.nbytes
    forward = mean + inputs.old_mean.nbytes + prev_sample
    return forward if pass_ == "forward" else forward + 2 * mean + prev_sample


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
    sigmas: Tensor  # this and the rest: `trainer_chain.Schedule`
    timesteps: Tensor
    timestep: Tensor
    sigma: Tensor
    sigma_next: Tensor


# Provider to the field and the keyword of the old policy that it gets; the others get its mean, as trainers do.
OLD_FORMS = {"fused_output": ("old_output", "old_model_output"), "fused_residual": ("old_residual", "old_residual")}
OLD_MEAN = ("old_mean", "old_prev_sample_mean")


def make_step_inputs(shape: tuple[int, ...], dtype: str, device: torch.device) -> StepInputs:
    of_output = {"fp32": torch.float32, "bf16+fp32": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    schedule = trainer_chain.schedule_of(shape[0], device)
    noise_level, sigma_max = schedule.sigmas.new_tensor(NOISE_LEVEL).double(), schedule.sigmas[1].double()
    sigmas = (schedule.sigma.double(), schedule.sigma_next.double())
    a, b, std = (row.float() for row in reference.transition("flow_sde", *sigmas, noise_level, sigma_max))
    sample, output = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    output = output.to(of_output)
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
        old_log_prob=log_prob_of(prev_sample.double() - old_mean.double(), std),
        advantages=rows.advantages,
        **schedule._asdict(),
    )


def trainer_tensors(inputs: StepInputs, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the trainers' step that waits for nothing: loss, and metrics not read. `sigma`: `[rows, 1, ...]`."""
    velocity = inputs.model_output.float()
    step = trainer_chain.flow_sde(inputs.sample, velocity, sigma, sigma_next, inputs.sigmas[1], NOISE_LEVEL)
    log_prob, sqrt_dt = trainer_chain.log_prob(step, inputs.prev_sample)
    policy = (inputs.old_log_prob, inputs.advantages, step, sqrt_dt, inputs.old_mean)
    loss, of_rows = trainer_chain.dppo_loss(log_prob, *policy, KL_THRESHOLD)
    return loss, trainer_chain.metrics(of_rows)


def trainer_step_loss(inputs: StepInputs) -> Outputs:
    sigmas = trainer_chain.look_up(inputs.sigmas, inputs.timesteps, inputs.timestep, inputs.sample.shape)
    loss, metrics = trainer_tensors(inputs, *sigmas)
    trainer_chain.read(metrics)
    return (loss,)


def compiled_step_loss() -> Provider:
    """The sigmas ready-made and the metrics never read: with the waits in it there would be a graph per metric."""
    tensors = compiled(trainer_tensors)

    def loss(inputs: StepInputs) -> Outputs:
        shape = inputs.sample.shape
        return (tensors(inputs, wide(inputs.sigma, shape), wide(inputs.sigma_next, shape))[0],)

    return loss


def package_step_loss(step_loss: Callable, old_form: tuple[str, str], inputs: StepInputs) -> Outputs:
    """`step_loss`: the package's, or its reference's. The rows' sigmas stay on the device."""
    field, keyword = old_form
    policy = {keyword: getattr(inputs, field), "old_log_prob": inputs.old_log_prob, "objective": OBJECTIVE}
    schedule = {"sigma": inputs.sigma, "sigma_next": inputs.sigma_next, "sigma_max": inputs.sigmas[1]}
    latents = (inputs.model_output, inputs.sample, inputs.prev_sample)
    return (step_loss(*latents, inputs.advantages, **schedule, noise_level=NOISE_LEVEL, **policy).loss,)


def triton_step() -> Provider:
    from triton_policy_loss import triton_step_loss

    def loss(inputs: StepInputs) -> Outputs:
        # sigma_max is a number here: it stands in for a sigma of 1, and no row has one.
        schedule = (inputs.sigma, inputs.sigma_next, NOISE_LEVEL, 0.99)
        latents = (inputs.model_output, inputs.sample, inputs.prev_sample, inputs.old_mean)
        return (triton_step_loss(*latents, inputs.advantages, *schedule, KL_THRESHOLD),)

    return loss


def step_truth(inputs: StepInputs, provider: str) -> Outputs:
    inputs = doubled(inputs)
    (loss,) = package_step_loss(reference.step_loss, OLD_FORMS.get(provider, OLD_MEAN), inputs)
    loss.backward()
    return loss.detach(), inputs.model_output.grad


def step_bytes(inputs: StepInputs, provider: str, pass_: str) -> int:
    """Forward reads output, sample, next sample and old policy; backward the first three, and writes the gradient."""
    source = inputs.model_output.nbytes + inputs.sample.nbytes + inputs.prev_sample.nbytes
    forward = source + getattr(inputs, OLD_FORMS.get(provider, OLD_MEAN)[0]).nbytes
    return forward if pass_ == "forward" else forward + source + inputs.model_output.nbytes


OPERATIONS = {
    "policy_loss": Operation(
        outputs=("loss",),
        dtypes=("fp32", "bf16"),
        make_inputs=make_loss_inputs,
        providers={
            "eager": lambda: trainer_loss,
            "compile": lambda: compiled(trainer_loss),
            "triton": triton_loss,
            "fused": lambda: partial(package_loss, flowdppo_ops.loss),
        },
        expected=loss_truth,
        bytes_moved=loss_bytes,
        copied="old_mean",
        leaf="mean",
        yardsticks=YARDSTICKS,
    ),
    "step_loss": Operation(
        outputs=("loss",),
        dtypes=("bf16+fp32", "fp32"),
        make_inputs=make_step_inputs,
        providers={
            "eager": lambda: trainer_step_loss,
            "compile": compiled_step_loss,
            "triton": triton_step,
            "fused": lambda: partial(package_step_loss, flowdppo_ops.step_loss, OLD_MEAN),
            "fused_output": lambda: partial(package_step_loss, flowdppo_ops.step_loss, OLD_FORMS["fused_output"]),
            "fused_residual": lambda: partial(package_step_loss, flowdppo_ops.step_loss, OLD_FORMS["fused_residual"]),
        },
        expected=step_truth,
        bytes_moved=step_bytes,
        copied="sample",
        leaf="model_output",
        yardsticks=YARDSTICKS,
    ),
}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], OPERATIONS)
