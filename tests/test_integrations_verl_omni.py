"""`flowdppo_ops.integrations.verl_omni`: every recorded call of verl-omni through its own entry points.

By default against a stand-in for the trainer (`trainers/verl_omni.py`), whose own functions only say that they ran.
With FLOWDPPO_OPS_VERL_OMNI naming a checkout, and a Python that has what verl-omni needs, the same tests run on the
trainer itself, in a process of their own, and so do the trainer's tests of losses, registry and configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import counting
import pytest
import test_golden as golden
import torch
from differences import effect
from golden.load import Case, load, names
from torch import Tensor
from trainers import verl_omni as trainer

import flowdppo_ops
from flowdppo_ops import reference
from flowdppo_ops.integrations import Incompatible

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
    kind = modules.schedulers.FlowMatchSDEDiscreteScheduler
    theirs = inspect.signature(kind.sample_previous_step)
    modules.ours.enable()
    assert inspect.signature(kind.sample_previous_step) == theirs
    # And takes its arguments: the signature is only shown.
    ours = inspect.signature(partial(modules.ours._sample_previous_step, None))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


def _without_class(modules, monkeypatch):
    monkeypatch.delattr(modules.algos, "GRPOGuardLoss")


def _without_module(modules, monkeypatch):
    monkeypatch.setitem(sys.modules, trainer.SCHEDULERS, None)


def _other_parameters(modules, monkeypatch):
    monkeypatch.setattr(modules.algos.KLLoss, "compute_loss", classmethod(lambda cls, *, mean, extra: None))


def with_a_keyword(function: Any) -> Any:
    """The trainer's function of a later version, which takes one keyword more."""
    own = inspect.signature(function)
    keyword = inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    parameters = [one for one in own.parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]

    def later(*args, **kwargs):
        raise AssertionError("it is refused before it is called")

    later.__signature__ = own.replace(parameters=[*parameters, keyword])
    return later


def _later_loss(modules, monkeypatch):
    own = modules.algos.FlowDPPOLoss.compute_loss
    monkeypatch.setattr(modules.algos.FlowDPPOLoss, "compute_loss", staticmethod(with_a_keyword(own)))


def _later_step(modules, monkeypatch):
    kind = modules.schedulers.FlowMatchSDEDiscreteScheduler
    monkeypatch.setattr(kind, "sample_previous_step", with_a_keyword(kind.sample_previous_step))


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
        (_later_loss, r"FlowDPPOLoss\.compute_loss is \(.*, gamma\), wanted \("),
        (_later_step, r"sample_previous_step is \(self, .*, gamma\), wanted \(self"),
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
    ratio, advantages = torch.exp(given["log_prob"] - given["old_log_prob"]), given["advantages"]
    random = (given["std_dev_t"].flatten() * given["sqrt_dt"]) > 0
    high = random & ~(case.arrays["aux.kl_per_sample"] < case.number("kl_mask_threshold"))
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
    results = ("out.prev_sample", "out.log_prob", "out.prev_sample_mean", "out.std_dev_t", "out.sqrt_dt")
    ours = dict(zip(results, found, strict=True))
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


@pytest.mark.parametrize("name", names("f_e2e_verl"))
def test_recorded_micro_batch_fixed(fixed, name):
    """As `step_loss`, which knows the transition: of KL and reference KL too."""
    case = load(name)
    ours, _ = _micro_batch(case)
    given, params = case.inputs(True), case.params
    schedule, policy = golden.adapters.one_step_training(case, given)
    velocity = _leaf(given["noise_pred"])
    result = reference.step_loss(
        velocity,
        given["sample"],
        given["prev_sample"],
        old_prev_sample_mean=given["old_prev_sample_mean"],
        **schedule,
        **policy,
    )
    loss = result.loss / params["gradient_accumulation_steps"]
    expected = {"out.loss": loss.detach(), "grad.noise_pred": _grad(loss, velocity)}
    expected |= golden.adapters._verl_metrics(result, params["loss_mode"])
    through_plain_functions = golden.adapters.end_to_end(case, flowdppo_ops, False, trainers_kl=False)
    ours |= {key: through_plain_functions[key] for key in ("size.kl",) if key in through_plain_functions}
    _compare(case, False, ours, expected)
    assert not fixed.ours.fallbacks()


def test_extremes_are_put_together_as_extremes(either):
    _, metrics = _micro_batch(load("f_e2e_verl__dppo_sde_img"))
    how = {name: str(getattr(m.aggregation, "value", m.aggregation)) for name, m in metrics.items()}
    extremes = {"actor/ratio_min": "min", "actor/ratio_max": "max", "actor/kl_new_old_max": "max"}
    assert how == dict.fromkeys(how, "mean") | ({} if either.strict else extremes)


def _of_both(modules: Any, stem: str, metric: str) -> float:
    """How many times the strict value is the other's."""
    values = {}
    for strict in (True, False):
        modules.ours.enable(strict)
        values[strict] = _micro_batch(load(stem))[0][f"metric.actor/{metric}"].item()
    return values[True] / values[False]


@pytest.mark.parametrize("sde_type", ["cps", "dance"])
def test_effect_of_counting_dt_twice(modules, sde_type):
    times = _of_both(modules, f"f_e2e_verl__dppo_{sde_type}", "kl_new_old_mean")
    assert f"too large: {times:.1f} times at the second step" in effect("KL with sqrt(-dt) twice")


def test_effect_of_the_reference_kl(modules):
    times = _of_both(modules, "f_e2e_verl__dppo_with_kl_loss", "kl_loss")
    assert f"{times:.3f} times at the second step" in effect("reference KL without sqrt(-dt)")


def test_effect_of_one_scale_for_the_batch(strict):
    given = load("f_e2e_verl__dppo_cps").arrays
    made, latents = trainer.scheduler(given["in.sigmas"], given["in.timesteps"]), torch.zeros(2, 3, 3)
    *_, std_dev_t, sqrt_dt = made.sample_previous_step(
        latents, latents, given["in.timesteps"][1:3], prev_sample=latents, return_sqrt_dt=True
    )
    times = std_dev_t.mean() * sqrt_dt.mean() / (std_dev_t.flatten() * sqrt_dt)
    assert "{:.2f} and {:.2f} times".format(*times.tolist()) in effect("one scale for the batch")


def test_effect_of_half_precision():
    arrays = load("b_verl_flowdppo__bf16_means").arrays
    off = (arrays["aux.kl_per_sample"] / arrays["aux64.kl_per_sample"] - 1).abs().max().item()
    assert f"{100 * off:.2f} % off" in effect("means in half precision")


# ---- what is done about single inputs --------------------------------------------------------------------------------

ROWS = 3


def given_loss(shape: tuple[int, ...] = (ROWS, 4, 5), **changes: Any) -> dict[str, Any]:
    """Arguments of the losses that see means, of rows of KL 0.005 at `std_dev_t` 0.5 and `sqrt_dt` 0.2."""
    generator = torch.Generator().manual_seed(1)
    ones = (1,) * (len(shape) - 1)
    mean = torch.randn(shape, generator=generator)
    arguments = {
        "old_log_prob": torch.zeros(ROWS),
        "log_prob": torch.tensor([0.1, -0.1, 0.2]).requires_grad_(),
        "advantages": torch.tensor([1.0, -2.0, -1.0]),
        "config": trainer.config(),
        "old_prev_sample_mean": mean.detach() + 0.01,
        "prev_sample_mean": mean.requires_grad_(),
        "std_dev_t": torch.full((shape[0], *ones), 0.5),
        "sqrt_dt": torch.full((ROWS,), 0.2),
    }
    return arguments | changes


def ran_own(call: Any) -> bool:
    """Whether the trainer's own function ran; its errors count, when it is the trainer itself."""
    try:
        _, metrics = call()
    except Exception:
        if not trainer.is_real():
            raise
        return True
    return trainer.is_real() or "own" in metrics


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


# ---- the step: look-up, sampling, refusals ---------------------------------------------------------------------------


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


# ---- what a micro-batch asks of a device -----------------------------------------------------------------------------


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


# ---- the trainer itself ----------------------------------------------------------------------------------------------

NEEDS = ("diffusers", "hydra", "tensordict", "verl")
THEIR_TESTS = """
    tests/trainer/diffusion/test_diffusion_core_algos_on_cpu.py
    tests/trainer/diffusion/test_diffusion_registry_on_cpu.py
    tests/trainer/diffusion/test_rollout_correction_on_cpu.py
    tests/trainer/diffusion/test_diffusion_distillation_losses_on_cpu.py
    tests/workers/config/test_diffusion_config_on_cpu.py
"""


def _needs_the_trainer() -> str:
    if not CHECKOUT:
        return "FLOWDPPO_OPS_VERL_OMNI does not name a checkout of verl-omni"
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"verl-omni needs {', '.join(missing)}, which this Python has not" if missing else ""


def _why_not() -> str:
    return "this process is the one that it starts" if trainer.is_real() else _needs_the_trainer()


real = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "there")


def _pytest(directory: Path | str, *arguments: str, **environment: str) -> dict[str, str]:
    """Test -> outcome, of pytest in a process that has the trainer."""
    path = os.pathsep.join([str(Path(flowdppo_ops.__file__).parents[1]), str(TESTS / "trainers")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bare_verl_omni", "-p", "no:cacheprovider", "-v", "-rN", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    outcomes = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", run.stdout, re.MULTILINE))
    assert outcomes, run.stdout + run.stderr
    return outcomes


@real
@pytest.mark.parametrize("strict", ["1", "0"])
def test_the_trainers_own_tests_say_the_same(strict):
    """With the integration as without it; those that need what is not installed fail both times."""
    without = _pytest(CHECKOUT, *THEIR_TESTS.split())
    enabled = _pytest(CHECKOUT, *THEIR_TESTS.split(), FLOWDPPO_OPS_INTEGRATE="1", FLOWDPPO_OPS_STRICT=strict)
    assert enabled == without
    assert list(without.values()).count("PASSED") > 60


@real
def test_all_of_this_holds_for_the_trainer_itself():
    outcomes = _pytest(TESTS.parent, str(Path(__file__).relative_to(TESTS.parent)))
    assert {name for name, outcome in outcomes.items() if outcome not in ("PASSED", "SKIPPED")} == set()
    assert list(outcomes.values()).count("PASSED") > 300
