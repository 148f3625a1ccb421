"""Times `flowdppo_ops.sde_step` beside the trainers' scheduler step: eager, compiled, in Triton.

    python benches/bench_sde_step.py [--ops sde_step_replay] [--sizes small image] [--json FILE]
    python benches/bench_sde_step.py --device cuda --json FILE

`sde_step_sample` draws the next latent, as a rollout does, without autograd. The noise is an input: `torch.randn` makes
it for everybody, and takes longer than the step. `sde_step_replay` scores a stored latent and differentiates log-prob
and mean together. See README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import trainer_chain
from harness import Operation, Outputs, Provider, compiled, doubled, main
from torch import Tensor
from trainer_chain import NOISE_LEVEL, wide

import flowdppo_ops
from flowdppo_ops import reference


class StepInputs(NamedTuple):
    """Latents float32 but for the model's output, which has the dtype under test."""

    model_output: Tensor  # requires grad in a replay
    sample: Tensor
    noise_or_next: Tensor  # the noise, or the next sample that is replayed
    grad_log_prob: Tensor  # rows
    grad_mean: Tensor  # latents
    sigmas: Tensor  # this and the rest: `trainer_chain.Schedule`
    timesteps: Tensor
    timestep: Tensor
    sigma: Tensor
    sigma_next: Tensor


def make_inputs(replay: bool, shape: tuple[int, ...], dtype: str, device: torch.device) -> StepInputs:
    of_output = {"fp32": torch.float32, "bf16+fp32": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    output, sample, noise_or_next, grad_mean = (
        torch.randn(shape, generator=generator, device=device) for _ in range(4)
    )
    # The gradients of a loss that is a mean over the rows and over the elements.
    return StepInputs(
        model_output=output.to(of_output).requires_grad_(replay),
        sample=sample,
        noise_or_next=noise_or_next,
        grad_log_prob=torch.linspace(0.5, 2.0, shape[0], device=device) / shape[0],
        grad_mean=grad_mean / sample.numel(),
        **trainer_chain.schedule_of(shape[0], device)._asdict(),
    )


def trainer_tensors(replay: bool, inputs: StepInputs, sigma: Tensor, sigma_next: Tensor) -> Outputs:
    velocity = inputs.model_output.float()
    step = trainer_chain.flow_sde(inputs.sample, velocity, sigma, sigma_next, inputs.sigmas[1], NOISE_LEVEL)
    prev_sample = inputs.noise_or_next if replay else step.mean + step.std * inputs.noise_or_next
    log_prob, _ = trainer_chain.log_prob(step, prev_sample)
    return (log_prob, step.mean) if replay else (prev_sample, log_prob, step.mean)


def trainer_step(replay: bool) -> Provider:
    def step(inputs: StepInputs) -> Outputs:
        sigmas = trainer_chain.look_up(inputs.sigmas, inputs.timesteps, inputs.timestep, inputs.sample.shape)
        return trainer_tensors(replay, inputs, *sigmas)

    return step


def compiled_step(replay: bool) -> Provider:
    """The sigmas ready-made: their look-up waits for the device, twice a row."""
    tensors = compiled(partial(trainer_tensors, replay))

    def step(inputs: StepInputs) -> Outputs:
        shape = inputs.sample.shape
        return tensors(inputs, wide(inputs.sigma, shape), wide(inputs.sigma_next, shape))

    return step


def package_step(sde_step: Callable, replay: bool, residual_dtype: torch.dtype | None, inputs: StepInputs) -> Outputs:
    """`sde_step`: the package's, or its reference's. The rows' sigmas stay on the device."""
    schedule = {"sigma": inputs.sigma, "sigma_next": inputs.sigma_next, "sigma_max": inputs.sigmas[1]}
    options = {"noise_level": NOISE_LEVEL, "residual_dtype": residual_dtype}
    options["prev_sample" if replay else "noise"] = inputs.noise_or_next
    step = sde_step(inputs.model_output, inputs.sample, **schedule, **options)
    if replay:
        return step.log_prob, step.prev_sample_mean
    results = (step.prev_sample, step.log_prob, step.prev_sample_mean)
    return results if residual_dtype is None else (*results, step.residual)


def triton_step(replay: bool) -> Provider:
    from triton_sde_step import triton_sde_draw, triton_sde_replay

    triton = triton_sde_replay if replay else triton_sde_draw

    def step(inputs: StepInputs) -> Outputs:
        # sigma_max is a number here: it stands in for a sigma of 1, and no row has one.
        schedule = (inputs.sigma, inputs.sigma_next, NOISE_LEVEL, 0.99)
        return triton(inputs.model_output, inputs.sample, inputs.noise_or_next, *schedule)

    return step


def truth(replay: bool, inputs: StepInputs, provider: str) -> Outputs:
    inputs = doubled(inputs)
    residual_dtype = torch.float64 if provider == "fused_residual" else None
    results = package_step(reference.sde_step, replay, residual_dtype, inputs)
    if replay:
        torch.autograd.backward(results, (inputs.grad_log_prob, inputs.grad_mean))
        results += (inputs.model_output.grad,)
    return tuple(result.detach() for result in results)


def bytes_moved(replay: bool, inputs: StepInputs, provider: str, pass_: str) -> int:
    """Forward reads output, sample and noise or next sample, and writes the mean; what is drawn is written as well.

    Backward reads next sample, mean and the mean's gradient, and writes the output's.
    """
    output, latents = inputs.model_output.nbytes, inputs.sample.nbytes  # the mean is float32 as well
    forward = output + 3 * latents
    if not replay:
        return forward + latents + (2 * inputs.sample.numel() if provider == "fused_residual" else 0)
    return forward if pass_ == "forward" else forward + 3 * latents + output


def operation(replay: bool) -> Operation:
    def fused(residual_dtype: torch.dtype | None) -> Provider:
        return partial(package_step, flowdppo_ops.sde_step, replay, residual_dtype)

    return Operation(
        outputs=("log-prob", "mean") if replay else ("next sample", "log-prob", "mean", "residual"),
        dtypes=("bf16+fp32", "fp32"),
        make_inputs=partial(make_inputs, replay),
        providers={
            "eager": partial(trainer_step, replay),
            "compile": partial(compiled_step, replay),
            "triton": partial(triton_step, replay),
            "fused": partial(fused, None),
            **({} if replay else {"fused_residual": partial(fused, torch.float16)}),
        },
        expected=partial(truth, replay),
        bytes_moved=partial(bytes_moved, replay),
        copied="sample",
        leaf="model_output" if replay else None,
        grad_outputs=lambda inputs: (inputs.grad_log_prob, inputs.grad_mean),
    )


OPERATIONS = {"sde_step_sample": operation(replay=False), "sde_step_replay": operation(replay=True)}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], OPERATIONS)
