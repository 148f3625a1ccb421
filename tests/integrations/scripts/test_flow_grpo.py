"""flow_grpo, its fork and miles: steps, the look-up of a timestep, losses."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from golden.load import Case, load, names
from golden_compare import differing, grad_of, leaf
from golden_differences import DIFFERENCES
from scripts_calls import NOT_RETURNED, Scheduler, expected, run_script_loss, run_script_step, script_loss, script_step
from torch import Tensor

from flowdppo_ops.integrations import _schedule, flow_factory, flow_grpo


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
        "grad.noise_pred": grad_of(loss, noise_pred),
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
    wanted = grad_of(eager, log_prob)
    assert wanted.isnan().tolist() == [True, False, False, False]
    for strict, want in ((True, wanted), (False, wanted.nan_to_num(nan=0.0, posinf=torch.inf))):
        loss, _ = function(log_prob, torch.zeros(4), advantages, **config, strict=strict)
        assert torch.equal(loss, eager)
        assert grad_of(loss, log_prob).tolist() == pytest.approx(want.tolist(), nan_ok=True)


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
