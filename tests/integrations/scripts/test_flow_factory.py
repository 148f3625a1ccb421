"""Flow-Factory: its scheduler's step and its losses."""

from __future__ import annotations

import inspect
import math
import sys
from functools import partial

import pytest
import torch
from golden.load import load, names
from golden_compare import differing, grad_of, leaf
from golden_differences import DIFFERENCES
from scripts_calls import expected, run_trainer_loss, trainer_loss
from trainers.flow_factory import RESULTS, SDESchedulerOutput

from flowdppo_ops.integrations import Incompatible, flow_factory


@pytest.mark.parametrize("name", names("i_flowfactory_step"))
def test_step_of_flow_factory(name, scheduler):
    case = load(name)
    given = case.inputs(False)
    noise_pred = leaf(given["model_output"])
    step = scheduler(case).step(
        noise_pred,
        given["timestep"],
        given["sample"],
        next_latents=given["prev_sample"],
        timestep_next=given["timestep_next"],
        noise_level=case.number("noise_level"),
    )
    scores = (step.log_prob * given["w"]).sum()
    ours = {
        "out.log_prob": step.log_prob,
        "out.prev_sample_mean": step.next_latents_mean,
        "out.std_dev_t": step.std_dev_t,
        "out.dt": step.dt,
        "grad.model_output": grad_of(scores, noise_pred),
        "grad_j2.model_output": grad_of(scores + 0.5 * (step.next_latents_mean**2).sum(), noise_pred),
    }
    assert not differing(ours, expected(case, False), case)
    assert torch.equal(step.next_latents, given["prev_sample"])
    assert torch.equal(step.noise_pred, given["model_output"])
    assert flow_factory.fallbacks() == {}


def test_arguments_of_the_step(scheduler):
    """0-dim and per-row timesteps, the schedule's own next one, noise levels as trainers hold them, picked results."""
    case = load("i_flowfactory_step__Flow-SDE_mid")
    given, one = case.inputs(False), scheduler(case)
    latents, rows = given["sample"], len(given["sample"])
    common = {"next_latents": given["prev_sample"]}
    sigma, sigma_next = given["timestep"] / 1000, given["timestep_next"] / 1000
    at = {"timestep_next": given["timestep_next"]}
    want = one.step(given["model_output"], given["timestep"], latents, noise_level=0.7, **at, **common)
    for timestep, more in (
        (given["timestep"][0], {"timestep_next": given["timestep_next"][0], "noise_level": 0.7}),
        (given["timestep"], {**at, "noise_level": torch.full((rows, 1, 1, 1), 0.7)}),
        (given["timestep"][0], {"timestep_next": torch.tensor(given["timestep_next"][0].item()), "noise_level": [0.7]}),
        (given["timestep"], {**at, "sigma_max": 0.5}),  # its noise level is the scheduler's own
        (given["timestep"], {}),
        (given["timestep"][0], {}),
    ):
        got = one.step(given["model_output"], timestep, latents, **more, **common)
        for name in RESULTS:
            mine, theirs = getattr(got, name), getattr(want, name)
            assert mine.shape == theirs.shape
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6), (name, more)
    assert torch.allclose(want.dt.flatten(), sigma_next - sigma)

    results = one.step(given["model_output"], given["timestep"], latents, return_dict=False, **at, **common)
    in_order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    assert all(torch.equal(mine, getattr(want, name)) for mine, name in zip(results, in_order, strict=True))
    picked = one.step(
        *(given["model_output"], given["timestep"], latents),
        **(at | common | {"return_kwargs": ["log_prob", "dt"], "compute_log_prob": False}),
    )
    assert picked == SDESchedulerOutput(dt=picked.dt)
    assert flow_factory.fallbacks() == {}


@pytest.mark.parametrize("name", [name for name in names("i_flowfactory_step") if name.endswith("mid")])
def test_a_drawn_latent_is_scored_as_stored(name, scheduler):
    """Rounded to the dtype of the latents, here bfloat16; a given one is not rounded."""
    case = load(name)
    given, one = case.inputs(False), scheduler(case)
    latents, timestep, at = given["sample"].bfloat16(), given["timestep"], {"timestep_next": given["timestep_next"]}
    drawn = one.step(given["model_output"], timestep, latents, generator=torch.Generator().manual_seed(0), **at)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    std = drawn.std_dev_t * (1 if "CPS" in name else torch.sqrt(-drawn.dt))
    assert drawn.next_latents.dtype == torch.float32
    assert torch.equal(drawn.next_latents, drawn.next_latents.bfloat16().float())
    rounding = 2.0**-8 * drawn.next_latents.abs() + 1e-6
    assert bool(((drawn.next_latents - (drawn.next_latents_mean + std * noise)).abs() <= rounding).all())
    again = one.step(given["model_output"], timestep, latents, next_latents=drawn.next_latents, **at)
    assert torch.equal(again.log_prob, drawn.log_prob)
    off = one.step(given["model_output"], timestep, latents, next_latents=drawn.next_latents + 1e-4, **at)
    assert torch.equal(off.next_latents, drawn.next_latents + 1e-4)
    assert not torch.equal(off.log_prob, drawn.log_prob)


def test_evaluation_is_deterministic(scheduler):
    case = load("i_flowfactory_step__Flow-SDE_mid")
    given, one = case.inputs(False), scheduler(case)
    one.is_eval = True
    step = one.step(given["model_output"], given["timestep"], given["sample"], timestep_next=given["timestep_next"])
    assert torch.equal(step.next_latents, step.next_latents_mean)
    assert torch.allclose(step.next_latents_mean, given["sample"] + step.dt * given["model_output"], atol=1e-6)
    assert step.log_prob.tolist() == [0.0] * len(given["sample"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dynamics_type": "ODE"}, "dynamics ODE"),
        ({"timestep": 4}, "a timestep that is no floating-point tensor, without the next one"),
        ({"latents": torch.zeros(3, 2, dtype=torch.float64)}, "float64 latents"),
    ],
)
def test_what_is_not_served_goes_to_the_trainer(change, reason, scheduler):
    one = scheduler(load("i_flowfactory_step__Flow-SDE_mid"))
    arguments = {"noise_pred": torch.zeros(3, 2), "timestep": one.timesteps[:1], "latents": torch.zeros(3, 2)} | change
    before = flow_factory.fallbacks().get(reason, 0)
    got = one.step(**arguments, return_kwargs=["dt"])
    assert {name: got[name] for name in arguments} == arguments
    assert got["self"] is one
    assert got["return_kwargs"] == ["dt"]
    assert flow_factory.fallbacks()[reason] == before + 1
    flow_factory._patch.fallbacks.clear()


def test_enable_and_disable(trainer):
    own = vars(trainer.FlowMatchEulerDiscreteSDEScheduler)["step"]
    assert not flow_factory.enabled()
    flow_factory.enable(strict=True)
    fused = vars(trainer.FlowMatchEulerDiscreteSDEScheduler)["step"]
    assert fused is not own
    flow_factory.enable(strict=True)
    assert vars(trainer.FlowMatchEulerDiscreteSDEScheduler)["step"] is fused
    flow_factory.enable(strict=False)  # another one, over the trainer's own and not over the first
    assert vars(trainer.FlowMatchEulerDiscreteSDEScheduler)["step"].__wrapped__ is own
    assert flow_factory.enabled()
    flow_factory.disable()
    assert vars(trainer.FlowMatchEulerDiscreteSDEScheduler)["step"] is own
    assert not flow_factory.enabled()


def test_another_flow_factory_is_refused(trainer):
    trainer.FlowMatchEulerDiscreteSDEScheduler.step = lambda self, noise_pred, timestep: None
    with pytest.raises(Incompatible, match=r"step is \(self, noise_pred, timestep\), wanted .*tested with commit a0b2"):
        flow_factory.enable()
    assert not flow_factory.enabled()


def test_a_later_keyword_of_flow_factory_is_refused(trainer):
    own = inspect.signature(trainer.FlowMatchEulerDiscreteSDEScheduler.step)
    later = [*own.parameters.values(), inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.0)]
    step = partial(trainer.FlowMatchEulerDiscreteSDEScheduler.step)
    step.__signature__ = own.replace(parameters=later)
    trainer.FlowMatchEulerDiscreteSDEScheduler.step = step
    with pytest.raises(Incompatible, match=r"step is \(self, .*, gamma\), wanted \(self"):
        flow_factory.enable()
    assert not flow_factory.enabled()


def test_no_flow_factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    with pytest.raises(Incompatible, match="not importable"):
        flow_factory.enable()


@pytest.mark.parametrize("name", names("i2_flowfactory_loss"))
def test_loss_of_flow_factory(name):
    case = load(name)
    ours = run_trainer_loss(case, strict=True)
    assert not differing(ours, expected(case, False), case)
    assert not differing(ours, expected(case, True), case)


@pytest.mark.parametrize("name", [name for name in names("i2_flowfactory_loss") if "guard" in name])
def test_scale_of_each_row(name):
    case = load(name)
    ours, recorded = run_trainer_loss(case, strict=False), case.recorded(False)
    ours["out.ratio"] = ours["out.ratio"].expand(recorded["out.ratio"].shape)
    if "shared" in name:  # all rows at one step: nothing to mix up
        assert not differing(ours, recorded, case)
        return
    assert differing(ours, recorded, case)
    assert not differing(ours, DIFFERENCES[name].ours(case, False), case)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["grpo", "guard"])
def test_penalty_of_flow_factory(kind, strict):
    """`kl_beta * mean((v - v_ref)^2)`, unscaled, with its gradient."""
    case = load(f"i2_flowfactory_loss__{kind}_shared_step")
    given = case.inputs(False)
    config = {"clip_range": (-0.2, 0.25), "adv_clip_range": (-5.0, 5.0)}
    policy = [given[name] for name in ("log_prob", "old_log_prob", "advantages")]
    if kind == "guard":
        config |= {"std_dev_t": given["std_dev_t"], "dt": given["dt"]}
        config |= {"next_latents_mean": given["prev_sample_mean"], "old_next_latents_mean": given["prev_sample_mean"]}
    function = partial(getattr(flow_factory, f"{kind}_loss"), strict=strict)
    plain, _ = function(*policy, **config)
    velocity, ref = leaf(given["prev_sample_mean"]), given["old_prev_sample_mean"]
    total, info = function(*policy, **config, kl_beta=0.04, kl_latents=velocity, ref_kl_latents=ref)
    kl_div = (velocity.detach().double() - ref.double()).square().mean()
    assert torch.allclose(info["kl_div"].double(), kl_div, rtol=1e-6)
    assert torch.allclose(info["kl_loss"].double(), 0.04 * kl_div, rtol=1e-6)
    assert torch.allclose(total.double(), plain.double() + 0.04 * kl_div, rtol=1e-6)
    assert torch.equal(info["loss"], total.detach())
    assert torch.equal(info["policy_loss"], (total if strict else plain).detach())
    want = 2 * 0.04 * (velocity.detach() - ref) / velocity.numel()
    assert torch.allclose(grad_of(total, velocity), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["v-based", "x-based"])
@pytest.mark.parametrize("shape", [(16, 3, 5, 7), (16, 33, 6)], ids=["image", "token"])
def test_dppo_loss_of_flow_factory(kind, shape, strict):
    """Against the trainer's formulas in float64: which rows are blocked, loss, gradients and what is logged."""
    generator = torch.Generator().manual_seed(2)
    new, old = torch.randn(2, *shape, generator=generator)
    new = leaf(old + 0.01 * torch.arange(16).reshape(-1, *(1,) * (len(shape) - 1)) * new)
    log_prob, old_log_prob, advantage = torch.randn(3, 16, generator=generator)
    log_prob = leaf(old_log_prob + 0.1 * log_prob)
    std = torch.linspace(0.2, 0.9, 16) if kind == "x-based" else None
    kl = (new.detach() - old).double().square().flatten(1).mean(1)
    if std is not None:
        kl = kl / (2 * std.double() ** 2)
    threshold = kl.sort().values[7:9].mean().item()
    total, info = flow_factory.dppo_loss(
        log_prob,
        old_log_prob,
        advantage,
        mask_latents=new,
        old_mask_latents=old,
        kl_mask_threshold=threshold,
        adv_clip_range=(-0.9, 1.1),
        mask_std=None if std is None else std.reshape(-1, *(1,) * (len(shape) - 1)),
        kl_beta=0.04,
        kl_latents=new,
        ref_kl_latents=old + 1.0,
        strict=strict,
    )
    row, clipped = leaf(log_prob.detach().double()), advantage.double().clamp(-0.9, 1.1)
    ratio = torch.exp(row - old_log_prob.double())
    keep = ~((kl >= threshold) & ((ratio - 1) * clipped > 0))
    assert 2 <= (~keep).sum() < (kl >= threshold).sum()
    policy = (-clipped * ratio * keep).mean()
    kl_div = (new.detach().double() - old.double() - 1).square().mean()
    wanted = {
        "ratio": ratio,
        "kl_new_old": kl,
        "unclipped_loss": -clipped * ratio,
        "policy_loss": policy + 0.04 * kl_div if strict else policy,
        "loss": policy + 0.04 * kl_div,
        "keep_ratio": keep.double().mean(),
        "masked_ratio": (~keep).double().mean(),
        "kl_div": kl_div,
        "kl_loss": 0.04 * kl_div,
    }
    assert info.keys() == wanted.keys()
    for name, want in wanted.items():
        assert torch.allclose(info[name].double(), want.detach(), rtol=1e-5, atol=1e-7), name
        assert not info[name].requires_grad
    assert torch.allclose(grad_of(total, log_prob).double(), grad_of(policy, row), rtol=1e-5, atol=1e-9)
    want = 2 * 0.04 * (new.detach() - old - 1) / new.numel()
    assert torch.allclose(grad_of(total, new), want, rtol=1e-5, atol=1e-9)


def test_dppo_blocks_no_row_of_nan_kl():
    latents = torch.zeros(2, 8)
    latents[0, 3] = math.nan
    given = {"kl_mask_threshold": 1e-5, "adv_clip_range": (-5.0, 5.0)}
    rows = (torch.tensor([0.1, 0.1]), torch.zeros(2), torch.ones(2))
    _, info = flow_factory.dppo_loss(*rows, mask_latents=latents, old_mask_latents=torch.zeros(2, 8), **given)
    assert info["keep_ratio"] == 1.0
    assert info["kl_new_old"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("strict", [True, False])
def test_dppo_row_of_infinite_ratio(strict):
    """Blocked, it is 0 * inf in the trainer: a loss of NaN, and a gradient of NaN in that row."""
    log_prob = leaf(torch.tensor([100.0, 0.1]))
    latents = {"mask_latents": torch.ones(2, 8), "old_mask_latents": torch.zeros(2, 8)}
    given = {"kl_mask_threshold": 1e-5, "adv_clip_range": (-5.0, 5.0), "strict": strict}
    total, _ = flow_factory.dppo_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), **latents, **given)
    (grad,) = torch.autograd.grad(total, log_prob)
    assert [total.isnan().item(), *grad.isnan().tolist()] == [strict, strict, False]


def test_guard_takes_the_strict_of_enable(trainer):
    case = load("i2_flowfactory_loss__guard_per_sample_step")
    given = case.inputs(False)
    both = {strict: trainer_loss(case, given, strict)[0] for strict in (True, False)}
    assert not torch.equal(both[True], both[False])
    for strict, want in both.items():
        flow_factory.enable(strict=strict)
        assert torch.equal(trainer_loss(case, given, None)[0], want)
