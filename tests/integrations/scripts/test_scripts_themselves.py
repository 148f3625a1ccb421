"""The scripts and Flow-Factory themselves, where a variable gives a checkout."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_compare import leaf
from trainers import flow_factory as surface

from flowdppo_ops.integrations import flow_factory, flow_grpo


def needs(variable: str, *modules: str) -> Path:
    """A trainer's checkout, and what it imports."""
    if variable not in os.environ:
        pytest.skip(f"{variable} gives no checkout")
    for module in modules:
        pytest.importorskip(module)
    return Path(os.environ[variable])


def real_module(path: Path) -> ModuleType:
    """One file of a checkout, without the packages around it."""
    spec = importlib.util.spec_from_file_location(f"trainers_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real_scheduler(kind: Any) -> Any:
    scheduler = kind(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


STEP_FILE = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
STEPS = {
    "flow_grpo": ("FLOWDPPO_OPS_FLOW_GRPO", STEP_FILE, flow_grpo.sde_step_with_logprob),
    "guard": ("FLOWDPPO_OPS_MILES", f"flow_grpo/{STEP_FILE}", flow_grpo.guard_sde_step_with_logprob),
    "miles": ("FLOWDPPO_OPS_MILES", "miles/utils/sde_log_prob.py", flow_grpo.miles_sde_step_with_logprob),
}


@pytest.mark.parametrize("which", STEPS)
def test_signature_of_the_real_step(which):
    variable, file, ours = STEPS[which]
    theirs = real_module(needs(variable, "diffusers") / file).sde_step_with_logprob
    mine = [one for one in inspect.signature(ours).parameters.values() if one.name != "strict"]
    real = list(inspect.signature(theirs).parameters.values())
    assert [(one.name, one.default) for one in mine] == [(one.name, one.default) for one in real]


WAYS = [
    *(("flow_grpo", "sde", draws) for draws in (False, True)),
    *(("guard", sde_type, draws) for sde_type in ("sde", "cps") for draws in (False, True)),
    ("miles", "sde", False),  # which only scores
]


@pytest.mark.parametrize("layout", [(3, 4, 6, 6), (3, 20, 8)], ids=str)
@pytest.mark.parametrize(("which", "sde_type", "draws"), WAYS)
def test_the_real_step(which, sde_type, draws, layout):
    """Beside ours on the real scheduler, gradients included."""
    variable, file, ours = STEPS[which]
    theirs = real_module(needs(variable, "diffusers") / file).sde_step_with_logprob
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = real_scheduler(FlowMatchEulerDiscreteScheduler)
    torch.manual_seed(0)
    velocity, sample, prev_sample = (torch.randn(layout) for _ in range(3))
    options = {"sde_type": sde_type, "return_sqrt_dt": True} if which == "guard" else {}
    results = []
    for step in (theirs, ours):
        model_output = leaf(velocity)
        more = {"generator": torch.Generator().manual_seed(1)} if draws else {"prev_sample": prev_sample}
        timestep = scheduler.timesteps[[0, 4, 9]]
        got = step(scheduler, model_output, timestep, sample=sample, noise_level=0.7, **more, **options)
        (gradient,) = torch.autograd.grad(got[1].sum() + got[2].square().sum(), model_output)
        results.append([one.detach() for one in (*got, gradient)])
    for real, mine in zip(*results, strict=True):
        assert mine.shape == real.shape
        assert torch.allclose(mine, real, rtol=1e-5, atol=1e-5 * real.abs().max().item())


@pytest.fixture
def real_flow_factory():
    checkout = needs("FLOWDPPO_OPS_FLOW_FACTORY", "diffusers", "accelerate", "transformers")
    with surface.real(checkout) as module:
        yield module


@pytest.mark.parametrize("dynamics", ["Flow-SDE", "Dance-SDE", "CPS", "ODE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calls", ["train", "rollout", "reference", "by index"])
def test_the_real_flow_factory(real_flow_factory, calls, dtype, dynamics):
    """Its scheduler before `enable()`, after it, and after `disable()`."""
    kind = real_flow_factory.FlowMatchEulerDiscreteSDEScheduler
    own = kind.step
    torch.manual_seed(0)
    noise_pred, latents = (torch.randn(3, 4, 6, 6).to(dtype) for _ in range(2))
    next_latents = (latents + 0.1 * torch.randn(3, 4, 6, 6)).to(dtype)

    def run() -> Any:
        scheduler = kind(noise_level=0.7, dynamics_type=dynamics, shift=3.0)
        scheduler.set_timesteps(10)
        timesteps = scheduler.timesteps
        at, after = timesteps[[2, 3, 4]], timesteps[[3, 4, 5]]
        given = leaf(noise_pred)
        if calls == "train":
            got = scheduler.step(given, at, latents, next_latents, timestep_next=after, noise_level=0.7)
        elif calls == "rollout":  # as an adapter's inference does, with 0-dim timesteps
            generator = torch.Generator().manual_seed(1)
            got = scheduler.step(given, at[0], latents, timestep_next=after[0], generator=generator, noise_level=0.7)
        elif calls == "reference":
            got = scheduler.step(
                given, at, latents, next_latents, timestep_next=after, noise_level=0.7, compute_log_prob=False
            )
        else:
            got = scheduler.step(given, at, latents, next_latents)
        scores = got.next_latents_mean.square().sum() + (0 if got.log_prob is None else got.log_prob.sum())
        return got.to_dict() | {"gradient": torch.autograd.grad(scores, given)[0]}

    before = run()
    flow_factory.enable()
    assert kind.step is not own
    fused = run()
    flow_factory.disable()
    assert kind.step is own
    assert (dynamics == "ODE") == bool(flow_factory.fallbacks())
    flow_factory._patch.fallbacks.clear()
    assert fused.keys() == before.keys()
    for name, theirs in before.items():
        mine = fused[name]
        if theirs is None:
            assert mine is None
            continue
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        rounding = 2.0**-7 if dtype == torch.bfloat16 and name in ("gradient", "next_latents") else 1e-5
        assert torch.allclose(mine, theirs, rtol=rounding, atol=1e-5 * theirs.abs().max().item()), name
