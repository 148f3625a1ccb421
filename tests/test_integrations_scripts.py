"""flow_grpo, the GRPO-Guard script and Flow-Factory: their recorded calls through the integrations' own functions.

With `strict=True` every recorded number is reproduced, shapes included; with `strict=False` it is what
`test_golden.DIFFERENCES` lists.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from differences import effect
from golden.load import Case, load, names
from test_golden import DIFFERENCES, _allowed, _mismatch
from torch import Tensor
from trainers import flow_factory as surface
from trainers.flow_factory import RESULTS, SDESchedulerOutput

from flowdppo_ops.integrations import Incompatible, _schedule, flow_factory, flow_grpo

Results = dict[str, Tensor | None]

# An input, and what the scripts keep to themselves: it shows in the loss.
NOT_RETURNED = {"out.ratio_mean_bias", "out.ratio"}


def grads(objective: Tensor, leaf: Tensor) -> Tensor | None:
    return torch.autograd.grad(objective, leaf, retain_graph=True, allow_unused=True)[0]


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def differing(ours: Results, want: Results, case: Case, double: bool = False) -> list[str]:
    """What is not as recorded. float32 is compared with the trainer's double run as with its float32 one."""
    wrong = []
    for key, recorded in want.items():
        mine = ours[key]
        if recorded is None or mine is None:
            wrong += [] if mine is recorded else [f"{key}: {mine} for {recorded}"]
            continue
        if mine.shape != recorded.shape:
            wrong.append(f"{key}: shape {tuple(mine.shape)}, wanted {tuple(recorded.shape)}")
        wrong.append(_mismatch(key, mine, recorded, _allowed(case, key, recorded.float(), {}, double=False)))
    return list(filter(None, wrong))


def expected(case: Case, double: bool, *left_out: str) -> Results:
    return {key: value for key, value in case.recorded(double).items() if key not in left_out}


@pytest.fixture(autouse=True)
def _as_imported():
    """No integration stays enabled, and each says its line again."""
    flow_grpo._announce.cache_clear()
    yield
    flow_factory.disable()


# ---- flow_grpo, its fork and miles: steps ----------------------------------------------------------------------------


class Scheduler:
    """What a step may ask of diffusers' scheduler. Not `index_for_timestep`, which waits for the device."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.sigmas, self.timesteps = given["sigmas"], given["timesteps"]


def script_step(case: Case, given: dict[str, Tensor], model_output: Tensor, strict: bool) -> tuple[Tensor, ...]:
    latents = (model_output, given["timestep"], given["sample"])
    scheduler, noise_level, prev_sample = Scheduler(given), case.number("noise_level"), given["prev_sample"]
    upstream = case.meta["upstream"]
    if upstream["file"].startswith("miles/"):
        return flow_grpo.miles_sde_step_with_logprob(scheduler, *latents, prev_sample, noise_level)
    if upstream["project"] == "flow_grpo":
        return flow_grpo.sde_step_with_logprob(
            scheduler, *latents, noise_level=noise_level, prev_sample=prev_sample, strict=strict
        )
    return flow_grpo.guard_sde_step_with_logprob(
        scheduler,
        *latents,
        noise_level=noise_level,
        prev_sample=prev_sample,
        sde_type=case.params.get("sde_type", "sde"),
        return_sqrt_dt=True,
    )


def run_script_step(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    model_output = leaf(given["model_output"])
    results = script_step(case, given, model_output, strict)
    scores = (results[1] * given["w"]).sum()
    return {
        **dict(zip(("in.prev_sample", "out.log_prob", "out.prev_sample_mean", "out.std_dev_t"), results, strict=False)),
        "out.sqrt_dt": results[4] if len(results) == 5 else None,
        "grad.model_output": grads(scores, model_output),
        "grad_j2.model_output": grads(scores + 0.5 * (results[2] ** 2).sum(), model_output),
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", names("g_flowgrpo_step"))
def test_step_of_the_scripts(name, strict):
    case = load(name)
    ours = run_script_step(case, strict)
    if not strict and name in DIFFERENCES:
        assert differing(ours, expected(case, False), case)
        assert not differing(ours, DIFFERENCES[name].ours(case, False), case)
        return
    assert not differing(ours, expected(case, False), case)
    assert not differing(ours, expected(case, True), case)


def test_one_timestep_for_all_rows():
    """As a rollout calls it: `t.unsqueeze(0)`."""
    case = load("g_flowgrpo_step__sd3_mid")
    given = case.inputs(False)
    one = given | {"timestep": given["timestep"][:1]}
    results = script_step(case, one, given["model_output"], True)
    for mine, all_rows in zip(results, script_step(case, given, given["model_output"], True), strict=True):
        assert torch.equal(mine.expand_as(all_rows), all_rows)
    assert results[3].shape == (1, 1, 1, 1)


def test_unknown_sde_type_is_named():
    case = load("g_flowgrpo_step__guard_sde")
    given = case.inputs(False)
    with pytest.raises(ValueError, match="sde_type is 'ode'"):
        flow_grpo.guard_sde_step_with_logprob(
            Scheduler(given), given["model_output"], given["timestep"], given["sample"], sde_type="ode"
        )


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_drawn_as_diffusers_draws(sde_type, per_row):
    """`randn_tensor`: one generator for the batch, or a list with one for each row."""
    given = load("g_flowgrpo_step__guard_sde").inputs(False)
    shape = given["sample"].shape

    def generators():
        many = [torch.Generator().manual_seed(seed) for seed in range(len(given["sample"]))]
        return many if per_row else many[0]

    noise = (
        torch.cat([torch.randn(1, *shape[1:], generator=one) for one in generators()])
        if per_row
        else torch.randn(shape, generator=generators())
    )
    results = flow_grpo.guard_sde_step_with_logprob(
        Scheduler(given),
        given["model_output"],
        given["timestep"],
        given["sample"],
        generator=generators(),
        sde_type=sde_type,
        return_sqrt_dt=True,
    )
    prev_sample, _, mean, std_dev_t, sqrt_dt = results
    std = std_dev_t * sqrt_dt if sde_type == "sde" else std_dev_t
    assert torch.allclose(prev_sample, mean + std * noise, rtol=0, atol=2e-6)


# ---- the look-up -----------------------------------------------------------------------------------------------------


def index_for_timestep(timesteps: Tensor, timestep: Tensor) -> int:
    """diffusers' (`FlowMatchEulerDiscreteScheduler`): the second of several, an IndexError for none."""
    indices = (timesteps == timestep).nonzero()
    return indices[1 if len(indices) > 1 else 0].item()


def test_look_up_is_diffusers():
    timesteps = torch.tensor([1000.0, 900.0, 900.0, 700.0, 700.0, 700.0, 250.0])
    scheduler = SimpleNamespace(timesteps=timesteps, sigmas=torch.linspace(1, 0, 8))
    wanted = timesteps[[6, 0, 3, 1]]
    index = torch.tensor([index_for_timestep(timesteps, one) for one in wanted])
    assert index.tolist() == [6, 0, 4, 2]
    sigma, sigma_next = _schedule.look_up(scheduler, wanted)
    assert torch.equal(sigma, scheduler.sigmas[index])
    assert torch.equal(sigma_next, scheduler.sigmas[index + 1])
    with pytest.raises(IndexError, match=r"not all of the timesteps \[1000.0, 3.0\]"):
        _schedule.look_up(scheduler, torch.tensor([1000.0, 3.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_look_up_on_a_gpu_waits_for_nothing():
    scheduler = SimpleNamespace(timesteps=torch.arange(1000.0, 0, -100).cuda(), sigmas=torch.linspace(1, 0, 11).cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        sigma, _ = _schedule.look_up(scheduler, scheduler.timesteps[3:4] + scheduler.timesteps.new_zeros(2))
        unknown, _ = _schedule.look_up(scheduler, scheduler.timesteps[3:4] + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sigma, scheduler.sigmas[[3, 3]])
    assert unknown.isnan().all()


# ---- the scripts' losses ---------------------------------------------------------------------------------------------


def script_loss(case: Case, given: dict[str, Tensor], strict: bool, **more: Any) -> tuple[Tensor, flow_grpo.Info]:
    config = {"clip_range": case.number("clip_range"), "adv_clip_max": case.number("adv_clip_max")}
    penalty = {"beta": case.params.get("beta", 0.0), "ref_prev_sample_mean": given.get("ref_prev_sample_mean")}
    policy = [given[name] for name in ("log_prob", "old_log_prob", "advantages")]
    step = {name: given[name] for name in ("prev_sample_mean", "std_dev_t", "sqrt_dt")}
    if case.params.get("rationorm", True):
        step["old_prev_sample_mean"] = given["old_prev_sample_mean"]
        return flow_grpo.guard_loss(*policy, **step, **config, **penalty, strict=strict)
    return flow_grpo.grpo_loss(*policy, **step, **config, **penalty, strict=strict)


def run_script_loss(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    given |= {name: leaf(given[name]) for name in ("log_prob", "prev_sample_mean")}
    loss, info = script_loss(case, given, strict)
    return {
        "out.loss": loss.detach(),
        "out.policy_loss": info["policy_loss"],
        **{f"metric.{name}": value for name, value in info.items()},
        **{f"grad.{name}": grads(loss, given[name]) for name in ("log_prob", "prev_sample_mean")},
    }


@pytest.mark.parametrize("name", names("g2_script_loss"))
def test_loss_of_the_scripts(name):
    case = load(name)
    ours = run_script_loss(case, strict=True)
    assert not differing(ours, expected(case, False, *NOT_RETURNED), case)
    assert not differing(ours, expected(case, True, *NOT_RETURNED), case)
    assert {f"metric.{key}" for key in ours_info(case)} == {key for key in expected(case, False) if "metric" in key}


def ours_info(case: Case) -> set[str]:
    info = script_loss(case, case.inputs(False), True)[1]
    assert all(value.ndim == 0 and not value.requires_grad for value in info.values())
    return set(info)


@pytest.mark.parametrize("name", [name for name in names("g2_script_loss") if "guard" in name])
def test_drift_of_each_row(name):
    """`strict=False`; the reference penalty is another matter and left as it is."""
    case = load(name)
    ours = run_script_loss(case, strict=False)
    wanted = DIFFERENCES[name].ours(case, False)
    wanted = {key: value for key, value in wanted.items() if key in ours}
    if case.params["beta"]:
        wanted = {key: value for key, value in wanted.items() if "policy" in key or "clip" in key or "log_prob" in key}
    assert not differing(ours, wanted, case)
    recorded = {key: case.recorded(False)[key] for key in wanted}
    assert differing(ours, recorded, case), "agrees with the script"


@pytest.mark.parametrize("name", [name for name in names("g2_script_loss") if name.endswith("beta")])
def test_penalty_over_the_variance_of_the_step(name):
    """`strict=False`: larger by 1 / sqrt_dt^2."""
    case = load(name)
    given = case.inputs(False)
    strict, fixed = (run_script_loss(case, strict)["metric.kl_loss"] for strict in (True, False))
    drift = (given["prev_sample_mean"] - given["ref_prev_sample_mean"]).double().square().flatten(1).mean(1)
    rows = [given[one].double().flatten() for one in ("std_dev_t", "sqrt_dt")]
    assert torch.allclose(fixed.double(), (drift / (2 * (rows[0] * rows[1]) ** 2)).mean(), rtol=1e-5)
    assert torch.allclose(strict.double(), (drift / (2 * rows[0] ** 2)).mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="sqrt_dt is None"):
        flow_grpo.grpo_loss(
            *(given[one] for one in ("log_prob", "old_log_prob", "advantages")),
            clip_range=0.1,
            adv_clip_max=5.0,
            beta=0.1,
            prev_sample_mean=given["prev_sample_mean"],
            ref_prev_sample_mean=given["ref_prev_sample_mean"],
            std_dev_t=given["std_dev_t"],
            strict=False,
        )


@pytest.mark.parametrize("name", names("f_e2e_guard_script"))
def test_training_step_of_the_guard_script(name):
    """`compute_log_prob` and the loss, one after the other."""
    case = load(name)
    given = case.inputs(False)
    noise_pred = leaf(given["noise_pred"])
    prev_sample, log_prob, mean, std_dev_t, sqrt_dt = script_step(case, given, noise_pred, True)
    step = {"log_prob": log_prob, "prev_sample_mean": mean, "std_dev_t": std_dev_t, "sqrt_dt": sqrt_dt}
    loss, info = script_loss(case, given | step, True)
    ours = {
        **{f"out.{name}": value.detach() for name, value in step.items()},
        **{f"metric.{name}": value for name, value in info.items()},
        "out.loss": loss.detach(),
        "grad.noise_pred": grads(loss, noise_pred),
    }
    assert torch.equal(prev_sample, given["prev_sample"])
    for double in (False, True):
        # Its drifts and log-ratios are 1e-4 of what they are differences of: the README beside the cases has 9e-3.
        want = expected(case, double, *NOT_RETURNED)
        approx_kl = want.pop("metric.approx_kl")
        assert torch.allclose(ours["metric.approx_kl"].double(), approx_kl.double(), rtol=2e-2)
        assert not differing(ours, want, case)


@pytest.mark.parametrize("trainer_name", ["flow_grpo", "flow_factory"])
def test_a_blocked_infinite_ratio(trainer_name):
    """The trainers' gradient is 0 * inf; that of the other rows is what it was. An open one's is infinite."""
    log_prob, advantages = leaf(torch.tensor([200.0, 0.0, 0.5, 200.0])), torch.tensor([1.0, 1.0, 1.0, -1.0])
    config = {"clip_range": 0.1, "adv_clip_max": 5.0}
    if trainer_name == "flow_factory":
        config = {"clip_range": (-0.1, 0.1), "adv_clip_range": (-5.0, 5.0)}
    function = {"flow_grpo": flow_grpo, "flow_factory": flow_factory}[trainer_name].grpo_loss
    ratio = torch.exp(log_prob)
    eager = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1)).mean()
    wanted = grads(eager, log_prob)
    assert wanted.isnan().tolist() == [True, False, False, False]
    for strict, want in ((True, wanted), (False, wanted.nan_to_num(nan=0.0, posinf=torch.inf))):
        loss, _ = function(log_prob, torch.zeros(4), advantages, **config, strict=strict)
        assert torch.equal(loss, eager)
        assert grads(loss, log_prob).tolist() == pytest.approx(want.tolist(), nan_ok=True)


def test_a_line_once(caplog):
    case = load(names("g2_script_loss")[0])
    assert not flow_grpo.enabled()
    with caplog.at_level(logging.INFO, "flowdppo_ops"):
        for _ in range(2):
            script_loss(case, case.inputs(False), True)
    assert [record.message for record in caplog.records] == ["flowdppo_ops: flow_grpo's script runs fused, strict=True"]
    assert flow_grpo.enabled()


def test_strict_from_the_environment(monkeypatch):
    case = load("g2_script_loss__guard_wide_clip")
    given = case.inputs(False)
    both = [script_loss(case, given, strict)[0] for strict in (True, False)]
    for setting, want in (("1", both[0]), ("0", both[1])):
        monkeypatch.setenv("FLOWDPPO_OPS_STRICT", setting)
        assert torch.equal(script_loss(case, given, None)[0], want)
    assert not torch.equal(*both)


# ---- Flow-Factory: the step ------------------------------------------------------------------------------------------


@pytest.fixture
def trainer():
    """A module of the trainer's name, with the surface that the integration relies on."""
    with surface.stand_in() as module:
        yield module


@pytest.fixture
def scheduler(trainer):
    """Of a case, with the integration enabled."""
    flow_factory.enable()

    def of(case: Case) -> Any:
        return trainer.FlowMatchEulerDiscreteSDEScheduler(
            case.inputs(False), case.params["dynamics_type"], case.number("noise_level")
        )

    return of


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
        "grad.model_output": grads(scores, noise_pred),
        "grad_j2.model_output": grads(scores + 0.5 * (step.next_latents_mean**2).sum(), noise_pred),
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


# ---- Flow-Factory: losses --------------------------------------------------------------------------------------------


def trainer_loss(case: Case, given: dict[str, Tensor], strict: bool | None) -> tuple[Tensor, flow_factory.Info]:
    policy = [given[name] for name in ("log_prob", "old_log_prob", "advantages")]
    config = {"clip_range": tuple(case.params["clip_range"]), "adv_clip_range": tuple(case.params["adv_clip_range"])}
    if "guard" not in case.name:
        return flow_factory.grpo_loss(*policy, **config)
    step = {name: given[name] for name in ("std_dev_t", "dt")}
    means = {
        "next_latents_mean": given["prev_sample_mean"],
        "old_next_latents_mean": given["old_prev_sample_mean"],
    }
    return flow_factory.guard_loss(*policy, **means, **step, **config, strict=strict)


def run_trainer_loss(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    given |= {name: leaf(given[name]) for name in ("log_prob", "prev_sample_mean")}
    loss, info = trainer_loss(case, given, strict)
    assert not any(value.requires_grad for value in info.values())
    assert torch.equal(info["loss"], loss.detach())
    assert info["unclipped_loss"].shape == info["clipped_loss"].shape == info["ratio"].shape
    worst = torch.maximum(info["unclipped_loss"], info["clipped_loss"]).mean()
    assert torch.allclose(worst, info["policy_loss"], rtol=1e-6)
    return {
        "out.loss": loss.detach(),
        "out.ratio": info["ratio"],
        **{f"metric.{name}": value for name, value in info.items()},
        **{f"grad.{name}": grads(loss, given[name]) for name in ("log_prob", "prev_sample_mean")},
    }


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
    assert torch.allclose(grads(total, velocity), want, rtol=1e-5, atol=0)


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
    assert torch.allclose(grads(total, log_prob).double(), grads(policy, row), rtol=1e-5, atol=1e-9)
    want = 2 * 0.04 * (new.detach() - old - 1) / new.numel()
    assert torch.allclose(grads(total, new), want, rtol=1e-5, atol=1e-9)


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


# ---- what the table says about them ----------------------------------------------------------------------------------


def numbers(name: str) -> list[float]:
    """In a difference's effect, in order."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", effect(name))]


def test_effect_of_the_penalty_without_dt():
    sigmas = load("g_flowgrpo_step__sd3_mid").arrays["in.sigmas"]  # SD3.5's: ten steps, shifted by 3
    times = 1 / (sigmas[:-1] - sigmas[1:])
    smallest, largest, _, last = numbers("penalty without dt")
    assert times[:9].min().item() == pytest.approx(smallest, rel=0.01)
    assert times[:9].max().item() == pytest.approx(largest, rel=0.01)
    assert times[9].item() == pytest.approx(last, rel=0.01)


def test_effect_of_one_drift_for_the_batch():
    case = load("g2_script_loss__guard_per_sample_std")
    norms = [
        run_script_loss(case, strict)["grad.prev_sample_mean"].flatten(1).norm(dim=1).aminmax() for strict in (1, 0)
    ]
    found = [value.item() for pair in norms for value in pair]
    assert found == pytest.approx(numbers("one drift for the batch"), rel=0.02)


def test_effect_of_mixed_token_latents():
    case = load("g_flowgrpo_step__sd3_token_layout_quirk")
    mixed, own = (run_script_step(case, strict)["out.log_prob"] for strict in (True, False))
    wanted = numbers("token latents mixed")
    found = [mixed.max().item(), own.max().item(), own.min().item()]
    assert found == pytest.approx(wanted, rel=0.02)


def test_effect_of_scales_of_other_rows():
    case = load("i2_flowfactory_loss__guard_per_sample_step")
    strict, fixed = (run_trainer_loss(case, strict) for strict in (True, False))
    ratio, own = strict["out.ratio"].flatten(1), fixed["out.ratio"]
    off = (strict["out.loss"] / fixed["out.loss"] - 1).abs().item()
    wanted = numbers("scales and log-probs of different rows")
    assert (ratio / own - 1).abs().max().item() == pytest.approx(wanted[0] / 100, rel=0.02)
    assert off == pytest.approx(wanted[1] / 100, rel=0.05)


# ---- the trainers themselves -----------------------------------------------------------------------------------------


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
