"""`flowdppo_ops.integrations.verl_omni`: every recorded call of verl-omni through its own entry points.

By default against a stand-in for the trainer (`trainers/verl_omni.py`), whose own functions only say that they ran. With
FLOWDPPO_OPS_VERL_OMNI naming a checkout, and an interpreter that has what verl-omni needs, the same tests run on the
trainer itself, in a process of their own, and so do the trainer's tests of losses, registry and configuration.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_golden as golden
import torch
from golden.load import Case, load, names
from torch import Tensor
from trainers import verl_omni as trainer

from flowdppo_ops.integrations._patch import Incompatible

TESTS = Path(__file__).parent
CHECKOUT = os.environ.get("FLOWDPPO_OPS_VERL_OMNI", "")
LOSSES = {"b_verl_flowdppo": "flow_dppo", "c_verl_flowgrpo": "flow_grpo", "c_verl_guard": "grpo_guard"}


@pytest.fixture
def modules(monkeypatch):
    """The trainer's modules, and `.ours`, the integration, which is not enabled."""
    monkeypatch.delenv("FLOWDPPO_OPS_STRICT", raising=False)
    with trainer.loaded() as found:
        ours = importlib.import_module("flowdppo_ops.integrations.verl_omni")
        ours.disable()
        ours._patch.fallbacks.clear()
        yield SimpleNamespace(**vars(found), ours=ours, registry=found.algos.DIFFUSION_LOSS_REGISTRY)
        ours.disable()
        if not trainer.is_real():
            del sys.modules["flowdppo_ops.integrations.verl_omni"]


@pytest.fixture(params=[True, False], ids=["strict", "fixed"])
def either(request, modules):
    """The integration, enabled; `.strict` says how."""
    modules.ours.enable(strict=request.param)
    modules.strict = request.param
    return modules


@pytest.fixture
def strict(modules):
    modules.ours.enable(strict=True)
    return modules


@pytest.fixture
def fixed(modules):
    modules.ours.enable(strict=False)
    return modules


# ---- in place, and taken back ----------------------------------------------------------------------------------------


def replaced(modules: Any) -> dict[str, Any]:
    return {
        **modules.registry,
        "step": vars(modules.schedulers.FlowMatchSDEDiscreteScheduler)["sample_previous_step"],
        "Metric": modules.workers.Metric,
    }


def test_enable_is_idempotent_and_disable_puts_back_what_was_there(modules):
    before = replaced(modules)
    modules.ours.enable()
    first = replaced(modules)
    modules.ours.enable()
    assert replaced(modules) == first
    assert modules.ours.enabled()
    changed = {name for name in before if first[name] is not before[name]}
    assert changed == {"flow_dppo", "flow_grpo", "dance_grpo", "grpo_guard", "kl", "step"}
    modules.ours.enable(strict=False)
    changed = {name for name in before if replaced(modules)[name] is not before[name]}
    assert changed == {"flow_dppo", "flow_grpo", "dance_grpo", "grpo_guard", "kl", "step", "Metric"}
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
    kind = modules.schedulers.FlowMatchSDEDiscreteScheduler
    theirs = inspect.signature(kind.sample_previous_step)
    modules.ours.enable()
    assert inspect.signature(kind.sample_previous_step) == theirs
    # And takes its arguments: the signature is only shown.
    code = kind.sample_previous_step.__code__
    assert code.co_varnames[: code.co_argcount] == tuple(theirs.parameters)
    assert kind.sample_previous_step.__defaults__ == kind.sample_previous_step.__wrapped__.__defaults__


def _without_class(modules, monkeypatch):
    monkeypatch.delattr(modules.algos, "GRPOGuardLoss")


def _without_module(modules, monkeypatch):
    monkeypatch.setitem(sys.modules, trainer.SCHEDULERS, None)


def _other_parameters(modules, monkeypatch):
    monkeypatch.setattr(modules.algos.KLLoss, "compute_loss", classmethod(lambda cls, *, mean, extra: None))


def _other_loss(modules, monkeypatch):
    monkeypatch.setitem(modules.registry, "flow_dppo", object())


def _other_step(modules, monkeypatch):
    kind = modules.schedulers.FlowMatchSDEDiscreteScheduler
    monkeypatch.setattr(kind, "sample_previous_step", lambda self, sample: None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without_class, r"diffusion_algos\.GRPOGuardLoss is absent"),
        (_without_module, r"module verl_omni\.pipelines\.schedulers\.flow_match_sde is not importable"),
        (
            _other_parameters,
            r"KLLoss\.compute_loss is \(mean, extra\), wanted \(prev_sample_mean, ref_prev_sample_mean",
        ),
        (_other_loss, r"loss 'flow_dppo' is a object, wanted a FlowDPPOLoss"),
        (_other_step, r"sample_previous_step is \(self, sample\), wanted \(self, sample, model_output, timestep"),
    ],
)
def test_another_surface_is_named_and_nothing_replaced(modules, monkeypatch, change, says):
    change(modules, monkeypatch)
    before = replaced(modules)
    with pytest.raises(Incompatible, match=f"verl-omni's .*{says}.*tested with verl-omni a1139ba"):
        modules.ours.enable()
    assert replaced(modules) == before
    assert not modules.ours.enabled()


# ---- recorded losses -------------------------------------------------------------------------------------------------

NOT_STRICT = {
    "b_verl_flowdppo__bf16_means": "means in half precision go to the trainer's own function",
    "b_verl_flowdppo__error_std_0dim_sqrt_dt_B": "its shapes go to the trainer's own function, which raises",
    "c_verl_flowgrpo__tie_outside_clip_half_gradient": "both surrogates equal: the trainer keeps half the gradient",
}


def _leaf(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone().requires_grad_()


def _grad(value: Tensor, leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0]


def _numbers(metrics: dict[str, float]) -> dict[str, Tensor]:
    assert all(type(value) is float for value in metrics.values())
    return {f"metric.{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def _sizes(log_ratio: Tensor) -> dict[str, Tensor]:
    """What the metrics are small differences of."""
    largest = golden.adapters._largest
    return {"size.ratio_std": largest(log_ratio.exp()), "size.ppo_kl": largest(log_ratio)}


def _drive_loss(modules: Any, case: Case, double: bool, transition: bool = False) -> dict[str, Any]:
    """A recorded loss, called as the worker calls it. `transition`: with a `std_dev_t` that knows its deviation."""
    given = case.inputs(double)
    mean, log_prob = _leaf(given.get("prev_sample_mean")), _leaf(given.get("log_prob"))
    if transition:
        given["std_dev_t"] = given["std_dev_t"].clone()
        given["std_dev_t"]._flowdppo_std = given["std_dev_t"].flatten() * given["sqrt_dt"]
    settings = {k: v for k, v in case.params.items() if k in ("add_kl_coefficient",)}
    settings |= {k: case.number(k) for k in ("kl_mask_threshold", "clip_ratio", "adv_clip_max") if k in case.params}
    result = modules.registry[LOSSES.get(case.group, "kl")](
        config=trainer.config(**settings),
        model_output={
            "log_probs": log_prob,
            "prev_sample_mean": mean,
            "std_dev_t": given.get("std_dev_t"),
            "sqrt_dt": given.get("sqrt_dt"),
        },
        data={
            "old_log_probs": given.get("old_log_prob"),
            "advantages": given.get("advantages"),
            "old_prev_sample_mean": given.get("old_prev_sample_mean"),
            "ref_prev_sample_mean": given.get("ref_prev_sample_mean"),
            "rollout_is_weights": given.get("rollout_is_weights"),
        },
    )
    ours = {
        "out.loss": result.loss,
        "grad.log_prob": _grad(result.loss, log_prob),
        "grad.prev_sample_mean": _grad(result.loss, mean),
        **_numbers(result.metrics),
    }
    return ours if log_prob is None else ours | _sizes(log_prob.detach() - given["old_log_prob"])


def _compare(case: Case, double: bool, ours: dict[str, Any], expected: dict[str, Any], hidden: str = "aux.") -> None:
    parameters = [k for k in golden.NOT_OURS if k != "out.sqrt_dt"]  # which the scheduler's step returns
    recorded = {k: v for k, v in case.recorded(double).items() if not k.startswith(hidden) and k not in parameters}
    expected = {k: v for k, v in expected.items() if k in recorded}
    assert {k for k in ours if k.startswith("metric.")} == {k for k in recorded if k.startswith("metric.")}
    wrong = []
    for key, want in (recorded | expected).items():
        allowed = 0.0 if want is None else golden._allowed(case, key, want, ours, double)
        wrong.append(golden._mismatch(key, ours[key], want, allowed))
    assert not list(filter(None, wrong)), f"{case.name}: {case.meta['note']}"


def _drives(*groups: str, doubles: bool = True) -> list[Any]:
    stems = [stem for group in groups for stem in names(group)]
    drives = [pytest.param(stem, False, id=stem) for stem in stems]
    if doubles:
        drives += [pytest.param(stem, True, id=f"{stem}-double") for stem in stems if load(stem).has_double()]
    return drives


recorded_losses = pytest.mark.parametrize(("name", "double"), _drives(*LOSSES, "c_verl_kl"))


@recorded_losses
def test_recorded_loss_strict(strict, name, double):
    case = load(name)
    if name in NOT_STRICT and "own function" in NOT_STRICT[name] and not double:
        if case.meta["raises"] and trainer.is_real():
            with pytest.raises(RuntimeError, match=re.escape(case.meta["raises"]["message"])):
                _drive_loss(strict, case, double)
        else:
            loss = strict.registry[LOSSES[case.group]]
            assert "own" in _metrics_of(loss, case) or trainer.is_real()
        assert list(strict.ours.fallbacks().values()) == [1]
        return
    expected = golden.DIFFERENCES[name].ours(case, double) if name in NOT_STRICT and not double else {}
    _compare(case, double, _drive_loss(strict, case, double), expected)
    assert not strict.ours.fallbacks()


def _metrics_of(loss: Any, case: Case) -> dict[str, Any]:
    """Of `compute_loss`, with what is recorded."""
    given = case.inputs(False)
    return loss.compute_loss(config=trainer.config(), **given)[1]


def test_listed_exceptions_exist():
    assert {*names("b_verl_flowdppo"), *names("c_verl_flowgrpo")} >= NOT_STRICT.keys()


@recorded_losses
def test_recorded_loss_fixed(fixed, name, double):
    """The differences are those of the plain functions, and the two below."""
    case = load(name)
    difference = golden.DIFFERENCES.get(name)
    expected = difference.ours(case, double) if difference else {}
    if name in HAS_NAN_KL:
        expected = _nan_kl_is_high(case)
    elif case.group == "c_verl_guard" and _has_several_steps(case):
        expected = _guard_with_row_scale(case)
    ours = _drive_loss(fixed, case, double, transition="sqrt_dt" in case.inputs(False))
    if case.meta["raises"]:  # its KL is `test_sizes_of_std_and_sqrt_dt`
        assert ours["out.loss"].isfinite()
    else:
        _compare(case, double, ours, expected)
    if case.group != "c_verl_kl":  # which does not say what its std_dev_t is
        assert not fixed.ours.fallbacks()


HAS_NAN_KL = [
    s for s in names("b_verl_flowdppo") if load(s).arrays.get("aux.kl_per_sample", torch.zeros(1)).isnan().any()
]


def _nan_kl_is_high(case: Case) -> dict[str, Tensor]:
    given = case.inputs(True)
    ratio, advantages, kl = (
        torch.exp(given["log_prob"] - given["old_log_prob"]),
        given["advantages"],
        case.arrays["aux.kl_per_sample"],
    )
    high = ~(kl < case.number("kl_mask_threshold"))
    up, down = high & (ratio > 1) & (advantages > 0), high & (ratio < 1) & (advantages < 0)
    losses = torch.where(up | down, 0.0, -advantages * ratio)
    shares = {"kl_mask": high, "pos_rm": up, "neg_rm": down, "masked": up | down, "unmasked": ~(up | down)}
    return {
        "out.loss": losses.mean(),
        "grad.log_prob": losses / len(losses),
        **{f"metric.actor/{k}_fraction": v.double().mean() for k, v in shares.items()},
    }


def _has_several_steps(case: Case) -> bool:
    given = case.inputs(False)
    return any(t.ndim and not (t == t.flatten()[0]).all() for t in (given["std_dev_t"], given["sqrt_dt"]))


def _guard_with_row_scale(case: Case) -> dict[str, Tensor]:
    """Each row with its own scale, stated in float64; the trainer's scale is of the batch."""
    given = case.inputs(True)
    mean, log_prob = _leaf(given["prev_sample_mean"]), _leaf(given["log_prob"])
    limit, clip, sqrt_dt = case.number("adv_clip_max"), case.number("clip_ratio"), given["sqrt_dt"]
    scale, advantages = given["std_dev_t"].flatten() * sqrt_dt, given["advantages"].clamp(-limit, limit)
    drift = ((mean - given["old_prev_sample_mean"]) ** 2).flatten(1).mean(1)
    ratio = torch.exp((log_prob - given["old_log_prob"] + drift / (2 * scale**2)) * scale)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = (losses * given.get("rollout_is_weights", torch.ones(())) / sqrt_dt**2).mean()
    above, below = (ratio - 1 > clip).double(), (1 - ratio > clip).double()
    return {
        "out.loss": loss.detach(),
        "grad.log_prob": _grad(loss, log_prob),
        "grad.prev_sample_mean": _grad(loss, mean),
        "metric.actor/pg_clipfrac": (above + below).mean(),
        "metric.actor/pg_clipfrac_higher": above.mean(),
        "metric.actor/pg_clipfrac_lower": below.mean(),
        "metric.actor/ratio_mean": ratio.detach().mean(),
        "metric.actor/ratio_std": ratio.detach().std(),
    }


# ---- recorded steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("e_verl_step"))
def test_recorded_step(either, name):
    case = load(name)
    given, params = case.inputs(False), case.params
    output = _leaf(given["model_output"])
    made = trainer.scheduler(given["sigmas"], given["timesteps"], params["internal_step_index"])
    options = {"return_sqrt_dt": params["return_sqrt_dt"], "sde_type": params["sde_type"]}
    found = made.sample_previous_step(
        given["sample"],
        output,
        given["timestep"] if params["timestep_argument"] else None,
        noise_level=given.get("noise_level", params["noise_level"]),
        prev_sample=given["prev_sample"],
        include_logprob_normalizer=params["include_logprob_normalizer"],
        **options,
    )
    ours = dict(zip(("out.prev_sample", "out.log_prob", "out.prev_sample_mean", "out.std_dev_t", "out.sqrt_dt"), found))
    assert ours["out.prev_sample"] is given["prev_sample"]
    for key in ("out.std_dev_t", "out.sqrt_dt", "out.log_prob"):
        assert ours[key].shape == case.arrays[key].shape
    scores = (ours["out.log_prob"] * given["w"]).sum()
    ours["grad.model_output"] = _grad(scores, output)
    ours["grad_j2.model_output"] = _grad(scores + 0.5 * (ours["out.prev_sample_mean"] ** 2).sum(), output)
    difference = golden.DIFFERENCES.get(name)
    _compare(case, False, ours, difference.ours(case, False) if difference else {})
    assert not either.ours.fallbacks()


# ---- recorded micro-batches ------------------------------------------------------------------------------------------


def _micro_batch(case: Case) -> tuple[dict[str, Any], Tensor]:
    """Adapter, worker's loss and gradient of a recorded micro-batch, as `forward_step` has them, and the gradient."""
    given, params = case.inputs(False), case.params
    velocity = _leaf(given["noise_pred"])
    step = trainer.scheduler(given["sigmas"], given["timesteps"]).sample_previous_step(
        sample=given["sample"],
        model_output=velocity,
        timestep=given["timestep"],
        noise_level=params["noise_level"],
        prev_sample=given["prev_sample"],
        sde_type=params["sde_type"],
        return_sqrt_dt=True,
    )
    model_output = dict(zip(("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt"), step[1:], strict=True))
    settings = {k: _parsed(v) for k, v in params["config"].items()} | {"loss_mode": params["loss_mode"]}
    data = {"old_log_probs": given["old_log_prob"], "advantages": given["advantages"]}
    optional = ("old_prev_sample_mean", "ref_prev_sample_mean", "rollout_is_weights")
    data |= {name: given[name] for name in optional if name in given}
    loss, metrics = trainer.diffusion_loss(
        trainer.config(**settings), model_output, data, params["gradient_accumulation_steps"]
    )
    (grad,) = torch.autograd.grad(loss, velocity)
    numbers = {k: getattr(v, "values", [v])[0] for k, v in metrics.items() if k != "kl_coef"}
    ours = {"out.loss": loss, "grad.noise_pred": grad, **_numbers(numbers)}
    ours |= {
        "out.log_prob": step[1],
        "out.prev_sample_mean": step[2],
        "out.std_dev_t": step[3],
        "out.sqrt_dt": step[4],
        "size.ppo_kl": golden.adapters._largest(step[1]),
        "size.ratio_std": torch.ones(()),
    }
    log_ratio = golden.adapters._largest(step[1].detach() - given["old_log_prob"])
    ours["size.approx_kl"] = ours["size.ppo_kl"] * log_ratio
    return ours, metrics


def _parsed(value: str) -> Any:
    return {"True": True, "False": False}.get(value) if value in ("True", "False") else float(value)


@pytest.mark.parametrize("name", names("f_e2e_verl"))
def test_recorded_micro_batch_strict(strict, name):
    case = load(name)
    ours, _ = _micro_batch(case)
    through_plain_functions = golden._run(case, "fused", False)
    ours |= {key: through_plain_functions[key] for key in ("size.kl",) if key in through_plain_functions}
    case_names = {key.removeprefix("metric.") for key in case.recorded(False)}
    assert "kl_coef" not in case_names or case.params["config"]["use_kl_loss"] == "True"
    _compare(case, False, ours, {})
    assert not strict.ours.fallbacks()
