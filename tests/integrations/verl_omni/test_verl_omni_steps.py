"""verl-omni's step: look-up of timesteps, sampling, refusals, and what a micro-batch asks of a device."""

from __future__ import annotations

import math
from typing import Any

import counting
import pytest
import torch
from torch import Tensor
from trainers import verl_omni as trainer
from verl_omni_calls import ROWS, ran_own


def a_step(modules: Any, **changes: Any) -> Any:
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    made = trainer.scheduler(sigmas, 1000 * sigmas[:-1], changes.pop("step_index", None))
    arguments = {
        "sample": torch.ones(2, 4, 5),
        "model_output": torch.ones(2, 4, 5),
        "timestep": torch.tensor([500.0, 750.0]),
    }
    return made.sample_previous_step(**(arguments | changes))


def test_each_sample_is_looked_up_by_its_timestep(strict):
    sqrt_dt = a_step(strict, prev_sample=torch.zeros(2, 4, 5), return_sqrt_dt=True)[-1]
    assert torch.equal(sqrt_dt, torch.tensor([0.5, 0.25]).sqrt())


def test_of_several_equal_timesteps_it_is_the_second(strict):
    """As diffusers' `index_for_timestep`."""
    sigmas = torch.tensor([0.9, 0.8, 0.6, 0.3, 0.0])
    made = trainer.scheduler(sigmas, torch.tensor([5.0, 7.0, 7.0, 7.0]))
    latents = torch.zeros(2, 3, 3)
    sqrt_dt = made.sample_previous_step(
        latents, latents, torch.tensor([7.0, 5.0]), prev_sample=latents, return_sqrt_dt=True
    )[-1]
    assert torch.allclose(sqrt_dt, torch.tensor([0.6 - 0.3, 0.9 - 0.8]).sqrt())


def test_a_timestep_that_is_not_in_the_schedule(strict):
    with pytest.raises(IndexError, match=r"not all of the timesteps \[500\.0, 740\.0\] are in the schedule"):
        a_step(strict, timestep=torch.tensor([500.0, 740.0]))


def test_timesteps_are_compared_in_the_schedules_precision(strict):
    """As a 0-dim timestep is with a schedule."""
    third = torch.tensor([1000 / 3, 500.0], dtype=torch.float64)
    sigmas = torch.tensor([0.5, 1 / 3, 0.0])
    made = trainer.scheduler(sigmas, third.flip(0).float())
    latents = torch.zeros(2, 3, 3)
    sqrt_dt = made.sample_previous_step(latents, latents, third, prev_sample=latents, return_sqrt_dt=True)[-1]
    assert torch.equal(sqrt_dt, (sigmas[:-1] - sigmas[1:]).sqrt().flip(0))


@pytest.mark.parametrize("sde_type", ["sde", "cps", "dance_sde"])
def test_sampling_draws_the_trainers_noise(strict, sde_type):
    randn = strict.schedulers.randn_tensor
    shape = (2, 4, 5)
    found = a_step(strict, generator=torch.Generator().manual_seed(3), sde_type=sde_type, return_sqrt_dt=True)
    noise = randn(shape, generator=torch.Generator().manual_seed(3), device=torch.device("cpu"), dtype=torch.float32)
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = found
    std = std_dev_t * sqrt_dt.view(-1, 1, 1) if sde_type == "sde" else std_dev_t
    assert torch.allclose(prev_sample, mean + std * noise, rtol=0, atol=2.0**-22)
    replay = a_step(strict, prev_sample=prev_sample, sde_type=sde_type)
    assert torch.equal(replay[1], log_prob)
    assert a_step(strict, sde_type=sde_type, return_logprobs=False)[1] is None


def test_a_noise_level_per_sample_without_timestep(strict):
    """The batched rollout of requests whose windows differ; 0 outside of them."""
    noise_level = torch.tensor([0.7, 0.0]).view(2, 1, 1)
    found = a_step(strict, timestep=None, step_index=1, noise_level=noise_level, return_sqrt_dt=True)
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = found
    assert torch.allclose(std_dev_t, noise_level * math.sqrt(0.75 / 0.25))
    assert sqrt_dt.tolist() == [0.5, 0.5]
    assert torch.equal(prev_sample[1], mean[1])
    assert log_prob[1] == 0


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (AssertionError, {"sde_type": "ode"}),
        (AssertionError, {"sample": torch.ones(2, 4, 5).half()}),
        (AssertionError, {"model_output": torch.ones(2, 4, 5).double()}),
        (AssertionError, {"prev_sample": torch.ones(2, 4, 5).bfloat16()}),
        (NotImplementedError, {"per_token_timesteps": torch.ones(2)}),
    ],
)
def test_what_the_trainer_refuses_it_still_refuses(strict, error, changes):
    with pytest.raises(error):
        a_step(strict, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sample": torch.ones(1, 4, 5)}, "latents of different shapes or devices"),
        ({"sample": torch.ones(2, 4, 5, requires_grad=True)}, "a sample that requires a gradient"),
        ({"timestep": torch.tensor([500.0])}, "a timestep that is not one per sample"),
        ({"noise_level": torch.ones(2)}, "a noise_level that is neither 0-dim nor [B, 1, ...] in float32"),
        ({"noise_level": torch.ones(2, 1, 1).half()}, "a noise_level that is neither 0-dim nor [B, 1, ...] in float32"),
        ({"timestep": None}, "no timestep and no step_index"),
    ],
)
def test_steps_that_are_not_served(strict, changes, reason):
    arguments = {"prev_sample": torch.zeros(2, 4, 5)} | changes
    assert ran_own(lambda: a_step(strict, **arguments)[:2])
    assert strict.ours.fallbacks() == {f"sample_previous_step: {reason}": 1}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_mode", ["flow_dppo", "flow_grpo", "grpo_guard"])
def test_a_micro_batch_waits_three_times_and_passes_the_latents_eight(either, loss_mode, stored):
    """Adapter, worker's loss and backward. The trainer: 26 operators on latents and 29 waits, for `flow_dppo`.

    Copies: two latents out of the trajectory and, where the loss reads it, the old mean. Then step and loss, forward
    and backward; the loss reads no latents in its backward but for `grpo_guard`.
    """
    seen = counting.count(_training(stored, loss_mode), ROWS * 4 * 40)
    assert not either.ours.fallbacks()
    assert seen.latent_ops <= {"flow_dppo": 6, "flow_grpo": 4, "grpo_guard": 7}[loss_mode]
    assert seen.host_syncs <= 3  # metrics, loss, and on a CPU whether the timesteps are in the schedule


def _training(stored: torch.dtype, loss_mode: str) -> Any:
    """A micro-batch at step 1 of trajectories as the rollout stores them: latents `[B, steps + 1, ...]`."""
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    latents, velocity = torch.zeros(ROWS, 4, 4, 40, dtype=stored), torch.zeros(ROWS, 4, 40).requires_grad_()
    timesteps = (1000 * sigmas[:-1]).expand(ROWS, 3)
    made = trainer.scheduler(sigmas, 1000 * sigmas[:-1])
    actor = trainer.config(loss_mode=loss_mode)
    data = {"old_log_probs": torch.zeros(ROWS, 3)[:, 1], "advantages": torch.ones(ROWS, 3)[:, 1]}
    if loss_mode != "flow_grpo":
        data["old_prev_sample_mean"] = torch.zeros(ROWS, 3, 4, 40)[:, 1]

    def micro_batch() -> None:
        step = trainer.adapter(made, latents, timesteps, velocity, 1, noise_level=0.7, sde_type="sde")
        model_output = dict(zip(("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt"), step, strict=True))
        loss, _ = trainer.diffusion_loss(actor, model_output, data, 4)
        loss.detach().item()  # the worker's, for its output
        loss.backward()
        assert velocity.grad is not None

    return micro_batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here, or a PyTorch without CUDA")
@pytest.mark.parametrize("sde_type", ["sde", "cps", "dance_sde"])
def test_a_step_on_a_gpu_does_not_wait(strict, sde_type):
    """And says what it says on a CPU; a timestep that is not in the schedule makes its row NaN."""
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    sample, velocity, prev_sample = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))

    def run(device: str, *timesteps: float) -> tuple[Tensor, ...]:
        made = trainer.scheduler(sigmas.to(device), 1000 * sigmas[:-1].to(device))
        leaf = velocity.to(device).requires_grad_()
        inputs = sample.to(device), leaf, torch.tensor(timesteps).to(device)
        arguments = {"prev_sample": prev_sample.to(device), "sde_type": sde_type, "return_sqrt_dt": True}
        made.sample_previous_step(*inputs, **arguments)  # loads the kernels
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            _, log_prob, mean, std_dev_t, sqrt_dt = made.sample_previous_step(*inputs, **arguments)
            (grad,) = torch.autograd.grad(log_prob.sum() + mean.sum(), leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return tuple(t.detach().cpu() for t in (log_prob, mean, std_dev_t, sqrt_dt, grad))

    for ours, want in zip(run("cuda", 500.0, 750.0), run("cpu", 500.0, 750.0), strict=True):
        assert torch.allclose(ours, want, rtol=2.0**-20, atol=2.0**-20)
    log_prob, *_ = run("cuda", 500.0, 740.0)
    assert log_prob.isnan().tolist() == [False, True]
