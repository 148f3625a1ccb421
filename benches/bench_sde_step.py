"""Times `flowdppo_ops.sde_step` beside the trainers' scheduler step: eager, compiled, in Triton.

    python benches/bench_sde_step.py [--ops sde_step_replay] [--sizes sd35 4x8] [--threads 2] [--json FILE]
    python benches/bench_sde_step.py --device cuda --json FILE

`sde_step_sample` draws the next latent, as a rollout does, without autograd. The noise is given: `torch.randn` makes it
for everybody, and takes longer than the step. `sde_step_replay` scores a stored latent and differentiates log-prob and
mean together. Results are compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

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

SUFFIXES = {"": "flow_sde", "_cps": "cps", "_dance": "dance_sde"}


class StepInputs(NamedTuple):
    """Latents float32 but for the model's output, which has the dtype under test."""

    model_output: Tensor  # requires grad in a replay
    sample: Tensor
    other: Tensor  # noise, or the next sample that is replayed
    grad_log_prob: Tensor  # rows
    grad_mean: Tensor  # latents
    timestep: Tensor  # this and the next two: `trainer_chain.At`
    sigma: Tensor
    sigma_next: Tensor
    sigmas: Tensor  # this and the next: `trainer_chain.Scheduler`
    timesteps: Tensor


def make_inputs(replay: bool, shape: tuple[int, ...], dtype: str, device: torch.device) -> StepInputs:
    of_output = {"fp32": torch.float32, "bf16+fp32": torch.bfloat16}[dtype]
    generator = torch.Generator(device).manual_seed(0)
    schedule = trainer_chain.shifted_schedule(device)
    output, sample, other, grad_mean = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    # What the backward is given: of a loss that is a mean over the rows, and, an element, over the latents.
    numel = sample[0].numel()
    return StepInputs(
        model_output=output.to(of_output).requires_grad_(replay),
        sample=sample,
        other=other,
        grad_log_prob=torch.linspace(0.5, 2.0, shape[0], device=device) / shape[0],
        grad_mean=grad_mean / (shape[0] * numel),
        **trainer_chain.at_one_step(schedule, shape[0])._asdict(),
        **schedule._asdict(),
    )


def trainer_tensors(sampler: str, replay: bool, i: StepInputs, sigma: Tensor, sigma_next: Tensor) -> Outputs:
    velocity = i.model_output.float()
    step = trainer_chain.SAMPLERS[sampler](i.sample, velocity, sigma, sigma_next, i.sigmas[1], NOISE_LEVEL)
    prev_sample = i.other if replay else trainer_chain.sampled(step, i.other)
    log_prob, _ = trainer_chain.log_prob(step, prev_sample, sampler)
    return (log_prob, step.mean) if replay else (prev_sample, log_prob, step.mean)


def trainer_step(sampler: str, replay: bool) -> Callable[[StepInputs], Outputs]:
    def step(i: StepInputs) -> Outputs:
        scheduler = trainer_chain.Scheduler(i.sigmas, i.timesteps)
        sigmas = trainer_chain.look_up(scheduler, i.timestep, i.sample.shape)
        return trainer_tensors(sampler, replay, i, *sigmas)

    return step


def compiled_step(sampler: str, replay: bool, mode: str | None = None) -> Callable[[StepInputs], Outputs]:
    """The sigmas ready-made: their look-up waits for the device, twice a row."""
    tensors = compiled(partial(trainer_tensors, sampler, replay), mode)
    return lambda i: tensors(i, wide(i.sigma, i.sample.shape), wide(i.sigma_next, i.sample.shape))


def package_step(
    sde_step: Callable, sampler: str, replay: bool, residual_dtype: torch.dtype | None, i: StepInputs
) -> Outputs:
    """`sde_step`: the package's, or its reference's. The rows' sigmas stay on the device."""
    sigmas = {"sigma": i.sigma, "sigma_next": i.sigma_next, "sigma_max": i.sigmas[1]}
    schedule = {"sampler": sampler, "noise_level": NOISE_LEVEL, **sigmas}
    latent = {"prev_sample" if replay else "noise": i.other}
    step = sde_step(i.model_output, i.sample, **latent, **schedule, residual_dtype=residual_dtype)
    if replay:
        return step.log_prob, step.prev_sample_mean
    results = (step.prev_sample, step.log_prob, step.prev_sample_mean)
    return results if residual_dtype is None else (*results, step.residual)


def triton_step(replay: bool) -> Callable[[StepInputs], Outputs]:
    from triton_sde_step import triton_sde_draw, triton_sde_replay

    step = triton_sde_replay if replay else triton_sde_draw
    # sigma_max as a number: it stands in for a sigma of 1, which there is none of here.
    return lambda i: step(i.model_output, i.sample, i.other, i.sigma, i.sigma_next, NOISE_LEVEL, 0.99)


def truth(sampler: str, replay: bool, i: StepInputs, provider: str) -> Outputs:
    wider = doubled(i)
    residual_dtype = torch.float64 if provider == "fused_residual" else None
    results = package_step(reference.sde_step, sampler, replay, residual_dtype, wider)
    if replay:
        torch.autograd.backward(results, (wider.grad_log_prob, wider.grad_mean))
        results += (wider.model_output.grad,)
    return tuple(result.detach() for result in results)


def bytes_moved(replay: bool, i: StepInputs, provider: str, pass_: str) -> int:
    """Forward reads output, sample and noise or next sample, and writes the mean; what is drawn is written as well.

    Backward reads next sample, mean and the mean's gradient, and writes the output's.
    """
    mean = i.grad_mean.nbytes  # float32 as well
    forward = i.model_output.nbytes + i.sample.nbytes + i.other.nbytes + mean
    if not replay:
        residual = 2 * i.sample.numel() if provider == "fused_residual" else 0
        return forward + i.sample.nbytes + residual
    return forward if pass_ == "forward" else forward + i.other.nbytes + 2 * mean + i.model_output.nbytes


def operation(name: str, sampler: str, replay: bool) -> Operation:
    def fused(residual_dtype: torch.dtype | None) -> Callable[[], Callable[[StepInputs], Outputs]]:
        return lambda: partial(package_step, flowdppo_ops.sde_step, sampler, replay, residual_dtype)

    return Operation(
        name=name,
        outputs=("log-prob", "mean") if replay else ("next sample", "log-prob", "mean", "residual"),
        dtypes=("bf16+fp32", "fp32"),
        make_inputs=partial(make_inputs, replay),
        providers={
            "eager": partial(trainer_step, sampler, replay),
            "compile": partial(compiled_step, sampler, replay),
            "compile_max": max_autotuned(partial(compiled_step, sampler, replay)),
            **({"triton": partial(triton_step, replay)} if sampler == "flow_sde" else {}),
            "fused": fused(None),
            **({} if replay else {"fused_residual": fused(torch.float16)}),
        },
        expected=partial(truth, sampler, replay),
        bytes_moved=partial(bytes_moved, replay),
        copied="sample",
        leaf="model_output" if replay else None,
        cotangents=lambda i: (i.grad_log_prob, i.grad_mean),
    )


OPERATIONS = {
    name + suffix: operation(name + suffix, sampler, replay=name == "sde_step_replay")
    for suffix, sampler in SUFFIXES.items()
    for name in ("sde_step_sample", "sde_step_replay")
}


if __name__ == "__main__":
    main("bench_sde_step", __doc__.splitlines()[0], OPERATIONS, ("sde_step_sample", "sde_step_replay"), None)
