"""verl-omni: what `enable()` replaces, what it refuses, and what goes to the trainer's own functions."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import verl_omni as trainer
from verl_omni_calls import ROWS, given_loss, ran_own

from flowdppo_ops import reference
from flowdppo_ops.integrations import Incompatible

STEP = "sample_previous_step"


def replaced(modules: Any) -> dict[str, Any]:
    return {
        **modules.registry,
        "step": vars(modules.scheduler)[STEP],
        "Metric": modules.workers.Metric,
    }


def test_enable_is_idempotent_and_disable_puts_back_what_was_there(modules):
    before = replaced(modules)
    modules.ours.enable()
    first = replaced(modules)
    modules.ours.enable()
    assert replaced(modules) == first
    assert modules.ours.enabled()
    fused = {"flow_dppo", "flow_grpo", "dance_grpo", "grpo_guard", "kl", "step"}
    assert {name for name in before if first[name] is not before[name]} == fused
    modules.ours.enable(strict=False)
    assert {name for name in before if replaced(modules)[name] is not before[name]} == {*fused, "Metric"}
    modules.ours.enable(strict=True)
    assert replaced(modules)["Metric"] is before["Metric"]
    modules.ours.disable()
    assert all(replaced(modules)[name] is value for name, value in before.items())
    assert not modules.ours.enabled()


def test_importing_enables(modules):
    assert modules.ours._patch.strict is None
    sys.modules.pop("flowdppo_ops.integrations.verl_omni")
    again = importlib.import_module("flowdppo_ops.integrations.verl_omni")
    assert again.enabled()
    again.disable()
    sys.modules["flowdppo_ops.integrations.verl_omni"] = modules.ours


@pytest.mark.parametrize(("setting", "strict"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_decides_where_nothing_is_said(modules, monkeypatch, setting, strict):
    if setting is not None:
        monkeypatch.setenv("FLOWDPPO_OPS_STRICT", setting)
    modules.ours.enable()
    assert modules.ours._patch.strict is strict


def test_a_setting_that_means_nothing_is_refused(modules, monkeypatch):
    monkeypatch.setenv("FLOWDPPO_OPS_STRICT", "yes")
    with pytest.raises(ValueError, match="FLOWDPPO_OPS_STRICT is 'yes', wanted '0' or '1'"):
        modules.ours.enable()


def test_one_line_says_what_runs(modules, caplog):
    modules.ours._patch._said.clear()
    with caplog.at_level(logging.INFO, logger="flowdppo_ops"):
        for _ in range(2):
            modules.ours.enable(strict=True)
            modules.ours.disable()
    assert caplog.messages == ["flowdppo_ops: verl-omni runs fused, strict=True (6 replaced)"]


def test_what_another_party_has_replaced_since_stays(strict, caplog):
    theirs = object()
    strict.registry["kl"] = theirs
    strict.ours.disable()
    assert strict.registry.pop("kl") is theirs
    assert "kl of verl-omni was replaced by another party and stays" in caplog.text
    strict.registry["kl"] = strict.algos.KLLoss()


def test_the_losses_are_the_trainers_classes(either):
    classes = dict.fromkeys(("flow_grpo", "dance_grpo"), "FlowGRPOLoss")
    classes |= {"flow_dppo": "FlowDPPOLoss", "grpo_guard": "GRPOGuardLoss", "kl": "KLLoss"}
    for name, class_name in classes.items():
        theirs, ours = getattr(either.algos, class_name), either.registry[name]
        assert isinstance(ours, theirs)
        assert type(ours) is not theirs
        assert (ours.required_model_output_keys, ours.required_data_keys) == (
            theirs.required_model_output_keys,
            theirs.required_data_keys,
        )
        for method in ("compute_loss", "__call__", "validate_inputs"):
            assert inspect.signature(getattr(type(ours), method)) == inspect.signature(getattr(theirs, method))


def test_the_step_has_the_trainers_signature(modules):
    theirs = inspect.signature(modules.scheduler.sample_previous_step)
    modules.ours.enable()
    assert inspect.signature(modules.scheduler.sample_previous_step) == theirs
    # And takes its arguments: the signature is only shown.
    ours = inspect.signature(partial(modules.ours._sample_previous_step, None))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def with_a_keyword(function: Any) -> Any:
    """The trainer's function of a later version, which takes one keyword more."""
    own = inspect.signature(function)
    keyword = inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    parameters = [one for one in own.parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]

    def later(*args, **kwargs):
        raise AssertionError("it is refused before it is called")

    later.__signature__ = own.replace(parameters=[*parameters, keyword])
    return later


def later_loss(modules, patch):
    patch.setattr(
        modules.algos.FlowDPPOLoss,
        "compute_loss",
        staticmethod(with_a_keyword(modules.algos.FlowDPPOLoss.compute_loss)),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, patch: patch.delattr(m.algos, "GRPOGuardLoss"), r"diffusion_algos\.GRPOGuardLoss is absent"),
        (
            lambda m, patch: patch.setitem(sys.modules, trainer.SCHEDULERS, None),
            r"module verl_omni\.pipelines\.schedulers\.flow_match_sde is not importable",
        ),
        (
            lambda m, patch: patch.setattr(
                m.algos.KLLoss, "compute_loss", classmethod(lambda cls, *, mean, extra: None)
            ),
            r"KLLoss\.compute_loss is \(mean, extra\), wanted \(prev_sample_mean, ref_prev_sample_mean",
        ),
        (later_loss, r"FlowDPPOLoss\.compute_loss is \(.*, gamma\), wanted \("),
        (
            lambda m, patch: patch.setattr(m.scheduler, STEP, with_a_keyword(m.scheduler.sample_previous_step)),
            r"sample_previous_step is \(self, .*, gamma\), wanted \(self",
        ),
        (
            lambda m, patch: patch.setitem(m.registry, "flow_dppo", object()),
            r"loss 'flow_dppo' is a object, wanted a FlowDPPOLoss",
        ),
        (
            lambda m, patch: patch.setattr(m.scheduler, STEP, lambda self, sample: None),
            r"sample_previous_step is \(self, sample\), wanted \(self, sample, model_output, timestep",
        ),
    ],
)
def test_another_surface_is_named_and_nothing_replaced(modules, monkeypatch, change, says):
    change(modules, monkeypatch)
    before = replaced(modules)
    with pytest.raises(Incompatible, match=f"verl-omni's .*{says}.*tested with verl-omni a1139ba"):
        modules.ours.enable()
    assert replaced(modules) == before
    assert not modules.ours.enabled()


UNSERVED = {
    "a dtype that is not float32": {
        "log_prob": torch.zeros(ROWS).half(),
        **{k: torch.zeros(ROWS).half() for k in ("old_log_prob", "advantages", "sqrt_dt")},
        **{k: torch.zeros(ROWS, 4, 5).half() for k in ("old_prev_sample_mean", "prev_sample_mean")},
        "std_dev_t": torch.ones(ROWS, 1, 1).half(),
    },
    "mixed precision": {"old_prev_sample_mean": torch.zeros(ROWS, 4, 5).bfloat16()},
    "several devices": {"old_prev_sample_mean": torch.zeros(ROWS, 4, 5, device="meta")},
    "a constant that requires a gradient": {"old_log_prob": torch.zeros(ROWS, requires_grad=True)},
    "log-probs, advantages or weights of different shapes": {"rollout_is_weights": torch.ones(ROWS, 1)},
    "means of different shapes, or not of one row per log-prob": {"old_prev_sample_mean": torch.zeros(1, 4, 5)},
    "std_dev_t neither 0-dim nor [B, 1, ...]": {"std_dev_t": torch.ones(ROWS)},
    "sqrt_dt neither 0-dim nor [B]": {"sqrt_dt": torch.ones(ROWS, 1, 1)},
    "a 0-dim std_dev_t with one sqrt_dt per row, which the trainer broadcasts along the last latent axis": {
        "std_dev_t": torch.ones(())
    },
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_is_not_served_goes_to_the_trainer_and_is_counted(strict, reason, caplog):
    call = partial(strict.registry["flow_dppo"].compute_loss, **given_loss(**UNSERVED[reason]))
    for times in (1, 2):
        assert ran_own(call)
        assert strict.ours.fallbacks() == {f"FlowDPPOLoss: {reason}": times}


def test_a_device_without_a_backend_is_not_served(strict):
    inputs = {k: v.detach().to("meta") if isinstance(v, Tensor) else v for k, v in given_loss().items()}
    if not trainer.is_real():
        assert ran_own(partial(strict.registry["grpo_guard"].compute_loss, **inputs))
        assert strict.ours.fallbacks() == {"GRPOGuardLoss: device meta": 1}


@pytest.mark.parametrize("name", ["flow_dppo", "flow_grpo", "grpo_guard"])
def test_a_setting_of_a_later_version_is_left_to_the_trainer(strict, name):
    """A field that the trainer gets one day: at its default it changes nothing, set it is not ignored."""

    @dataclass
    class Later:
        clip_ratio: float = 1e-4
        adv_clip_max: float = 5.0
        kl_mask_threshold: float = 1e-5
        add_kl_coefficient: bool = True
        dual_clip: float = 0.0
        _mutable: list = field(default_factory=list)

    inputs = given_loss()
    if name == "flow_grpo":
        inputs = {key: inputs[key] for key in ("old_log_prob", "log_prob", "advantages", "config")}
    loss = strict.registry[name].compute_loss
    loss(**inputs | {"config": SimpleNamespace(diffusion_loss=Later())})
    assert not strict.ours.fallbacks()
    assert ran_own(partial(loss, **inputs | {"config": SimpleNamespace(diffusion_loss=Later(dual_clip=3.0))}))
    ((reason, times),) = strict.ours.fallbacks().items()
    assert (reason.split(": ")[1], times) == ("diffusion_loss.dual_clip=3.0, which is not known here", 1)


def test_half_precision_is_served_where_the_maths_decides(fixed):
    inputs = given_loss(old_prev_sample_mean=torch.zeros(ROWS, 4, 5).bfloat16())
    loss, _ = fixed.registry["flow_dppo"].compute_loss(**inputs)
    assert loss.isfinite()
    assert fixed.ours.fallbacks() == {"std_dev_t of an unknown sampler, taken for Flow-SDE's": 1}


@pytest.mark.parametrize(
    ("std_dev_t", "sqrt_dt"), [((ROWS, 1, 1), (ROWS,)), ((ROWS, 1, 1), ()), ((), ()), ((), (ROWS,))]
)
def test_sizes_of_std_and_sqrt_dt(fixed, std_dev_t, sqrt_dt):
    inputs = given_loss(std_dev_t=torch.full(std_dev_t, 0.5), sqrt_dt=torch.full(sqrt_dt, 0.2))
    _, metrics = fixed.registry["flow_dppo"].compute_loss(**inputs)
    assert metrics["actor/kl_new_old_mean"] == pytest.approx(0.01**2 / (2 * (0.5 * 0.2) ** 2), rel=1e-5)


@pytest.mark.parametrize("name", ["flow_dppo", "flow_grpo", "grpo_guard"])
def test_gradient_of_an_infinite_ratio(either, name):
    """The trainer's is NaN where nothing of the ratio reaches the loss."""
    log_prob = torch.tensor([100.0, 0.0, 0.0]).requires_grad_()
    inputs = given_loss(
        log_prob=log_prob, advantages=torch.tensor([1.0, 1.0, -1.0]), std_dev_t=torch.full((3, 1, 1), 4.5)
    )
    inputs["old_prev_sample_mean"] = inputs["prev_sample_mean"].detach() + 1
    if name == "flow_grpo":
        inputs = {k: inputs[k] for k in ("old_log_prob", "log_prob", "advantages", "config")}
    else:
        inputs["std_dev_t"]._flowdppo_std = torch.full((3,), 0.9)
    loss, metrics = either.registry[name].compute_loss(**inputs)
    (other,) = torch.autograd.grad((0 * log_prob).sum(), log_prob)
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert loss.isfinite()
    assert (other == 0).all()
    if metrics["actor/ratio_mean"] == math.inf:
        assert grad[0].isnan() if either.strict else grad[0] == 0
    assert grad[1:].isfinite().all()


def test_deviation_of_one_ratio(either):
    one = torch.zeros(1)
    _, metrics = either.registry["flow_grpo"].compute_loss(
        old_log_prob=one, log_prob=one, advantages=one, config=trainer.config()
    )
    assert math.isnan(metrics["actor/ratio_std"]) if either.strict else metrics["actor/ratio_std"] == 0


@pytest.mark.parametrize("weights", [None, torch.tensor([3.0, 0.5])], ids=["", "weights"])
@pytest.mark.parametrize("name", ["flow_dppo", "grpo_guard", "kl"])
def test_nothing_is_nan_where_nothing_is_random(fixed, name, weights):
    """The last CPS step, next to an ordinary row: it has ratio 1, KL 0 and no gradient of the means."""
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    velocity = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sample, prev_sample = torch.ones(2, 4, 5), torch.zeros(2, 4, 5)
    step = trainer.scheduler(sigmas, 1000 * sigmas[:-1]).sample_previous_step(
        sample, velocity, torch.tensor([500.0, 1000.0]), prev_sample=prev_sample, sde_type="cps", return_sqrt_dt=True
    )
    _, log_prob, mean, std_dev_t, sqrt_dt = step
    assert std_dev_t.flatten()[0] == 0
    if name == "kl":
        inputs = {"prev_sample_mean": mean, "ref_prev_sample_mean": mean.detach() + 0.1, "std_dev_t": std_dev_t}
    else:
        inputs = given_loss(
            shape=(2, 4, 5), std_dev_t=std_dev_t, sqrt_dt=sqrt_dt, log_prob=log_prob, prev_sample_mean=mean
        )
        inputs |= {"old_log_prob": log_prob.detach() - 0.1, "old_prev_sample_mean": mean.detach() + 0.1}
        inputs |= {"advantages": torch.tensor([1.0, -1.0]), "rollout_is_weights": weights}
    loss, metrics = fixed.registry[name].compute_loss(**inputs)
    (grad,) = torch.autograd.grad(loss, velocity)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad[1].abs().max() > 0
    assert all(map(math.isfinite, metrics.values()))
    kl = 0.1**2 / (2 * std_dev_t.flatten()[1].item() ** 2)  # of the other row
    if name == "flow_dppo":  # CPS keeps its log-prob there, and the KL of 0 does not block it
        assert metrics["actor/kl_new_old_mean"] == pytest.approx(kl / 2, rel=1e-4)
        assert metrics["actor/kl_mask_fraction"] == 0.5
    else:
        assert (grad[0] == 0).all()
    if name == "kl":
        assert loss.item() == pytest.approx(kl / 2, rel=1e-4)


@pytest.mark.parametrize("sde_type", ["sde", "cps", "dance_sde"])
def test_the_kl_is_of_the_transition(either, sde_type):
    """Strict: `std_dev_t * sqrt_dt` for every sampler, which is the transition's for one of them."""
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    latents = torch.zeros(2, 4, 5)
    made = trainer.scheduler(sigmas, 1000 * sigmas[:-1], step_index=1)
    for timestep in (None, torch.full((2,), 750.0)):
        _, log_prob, mean, std_dev_t, sqrt_dt = made.sample_previous_step(
            latents, latents, timestep, prev_sample=latents, sde_type=sde_type, return_sqrt_dt=True
        )
        assert sqrt_dt.tolist() == [0.5, 0.5]
        assert std_dev_t.shape == (() if timestep is None else (2, 1, 1))
        schedule = {"sigma": 0.75, "sigma_next": 0.5, "noise_level": 0.7, "sigma_max": 0.75}
        sampler = {"sde": "flow_sde"}.get(sde_type, sde_type)
        std = reference.sde_step(latents, latents, prev_sample=latents, sampler=sampler, **schedule).std[0].item()
        inputs = given_loss(
            shape=(2, 4, 5), log_prob=log_prob, std_dev_t=std_dev_t, sqrt_dt=sqrt_dt, prev_sample_mean=mean
        )
        inputs |= {"old_log_prob": log_prob, "advantages": torch.zeros(2), "old_prev_sample_mean": mean + 0.1}
        if either.strict and timestep is None:
            inputs["sqrt_dt"] = sqrt_dt[0]  # of rows, it meets the trainer's error
        _, metrics = either.registry["flow_dppo"].compute_loss(**inputs)
        counted = 0.25 if either.strict and sde_type != "sde" else 1.0
        assert metrics["actor/kl_new_old_mean"] == pytest.approx(0.1**2 / (2 * std**2 * counted), rel=1e-4)
