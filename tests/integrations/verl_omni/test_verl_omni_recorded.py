"""Every recorded call of verl-omni through its own entry points."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from differences import effect
from golden.load import Case, load, names
from golden_adapters import largest, verl_metrics
from golden_compare import drives, grad_of, leaf
from golden_differences import DIFFERENCES
from golden_training import end_to_end, one_step_training, run
from torch import Tensor
from trainers import verl_omni as trainer
from verl_omni_calls import LOSSES, as_metrics, compare, run_micro_batch

import flowdppo_ops
from flowdppo_ops import reference

NOT_STRICT = {
    "b_verl_flowdppo__bf16_means": "means in half precision go to the trainer's own function",
    "b_verl_flowdppo__error_std_0dim_sqrt_dt_B": "its shapes go to the trainer's own function, which raises",
    "c_verl_flowgrpo__tie_outside_clip_half_gradient": "both surrogates equal: the trainer keeps half the gradient",
}


def _sizes(log_ratio: Tensor) -> dict[str, Tensor]:
    """What the metrics are small differences of."""
    return {"size.ratio_std": largest(log_ratio.exp()), "size.ppo_kl": largest(log_ratio)}


def _drive_loss(modules: Any, case: Case, double: bool, transition: bool = False) -> dict[str, Any]:
    """A recorded loss, called as the worker calls it. `transition`: with a `std_dev_t` that knows its deviation."""
    given = case.inputs(double)
    mean, log_prob = leaf(given.get("prev_sample_mean")), leaf(given.get("log_prob"))
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
        "grad.log_prob": grad_of(result.loss, log_prob),
        "grad.prev_sample_mean": grad_of(result.loss, mean),
        **as_metrics(result.metrics),
    }
    return ours if log_prob is None else ours | _sizes(log_prob.detach() - given["old_log_prob"])


recorded_losses = pytest.mark.parametrize(("name", "double"), drives(*LOSSES, "c_verl_kl"))


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
    expected = DIFFERENCES[name].ours(case, double) if name in NOT_STRICT and not double else {}
    compare(case, double, _drive_loss(strict, case, double), expected)
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
    difference = DIFFERENCES.get(name)
    expected = difference.ours(case, double) if difference else {}
    if name in HAS_NAN_KL:
        expected = _nan_kl_is_high(case)
    elif case.group == "c_verl_guard" and _has_several_steps(case):
        expected = _guard_with_row_scale(case)
    ours = _drive_loss(fixed, case, double, transition="sqrt_dt" in case.inputs(False))
    if case.meta["raises"]:  # its KL is `test_sizes_of_std_and_sqrt_dt`
        assert ours["out.loss"].isfinite()
    else:
        compare(case, double, ours, expected)
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
    mean, log_prob = leaf(given["prev_sample_mean"]), leaf(given["log_prob"])
    limit, clip, sqrt_dt = case.number("adv_clip_max"), case.number("clip_ratio"), given["sqrt_dt"]
    scale, advantages = given["std_dev_t"].flatten() * sqrt_dt, given["advantages"].clamp(-limit, limit)
    drift = ((mean - given["old_prev_sample_mean"]) ** 2).flatten(1).mean(1)
    ratio = torch.exp((log_prob - given["old_log_prob"] + drift / (2 * scale**2)) * scale)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = (losses * given.get("rollout_is_weights", torch.ones(())) / sqrt_dt**2).mean()
    above, below = (ratio - 1 > clip).double(), (1 - ratio > clip).double()
    return {
        "out.loss": loss.detach(),
        "grad.log_prob": grad_of(loss, log_prob),
        "grad.prev_sample_mean": grad_of(loss, mean),
        "metric.actor/pg_clipfrac": (above + below).mean(),
        "metric.actor/pg_clipfrac_higher": above.mean(),
        "metric.actor/pg_clipfrac_lower": below.mean(),
        "metric.actor/ratio_mean": ratio.detach().mean(),
        "metric.actor/ratio_std": ratio.detach().std(),
    }


@pytest.mark.parametrize("name", names("e_verl_step"))
def test_recorded_step(either, name):
    case = load(name)
    given, params = case.inputs(False), case.params
    output = leaf(given["model_output"])
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
    ours["grad.model_output"] = grad_of(scores, output)
    ours["grad_j2.model_output"] = grad_of(scores + 0.5 * (ours["out.prev_sample_mean"] ** 2).sum(), output)
    difference = DIFFERENCES.get(name)
    compare(case, False, ours, difference.ours(case, False) if difference else {})
    assert not either.ours.fallbacks()


@pytest.mark.parametrize("name", names("f_e2e_verl"))
def test_recorded_micro_batch_strict(strict, name):
    case = load(name)
    ours, _ = run_micro_batch(case)
    through_plain_functions = run(case, "fused", False)
    ours |= {key: through_plain_functions[key] for key in ("size.kl",) if key in through_plain_functions}
    case_names = {key.removeprefix("metric.") for key in case.recorded(False)}
    assert "kl_coef" not in case_names or case.params["config"]["use_kl_loss"] == "True"
    compare(case, False, ours, {})
    assert not strict.ours.fallbacks()


@pytest.mark.parametrize("name", names("f_e2e_verl"))
def test_recorded_micro_batch_fixed(fixed, name):
    """As `step_loss`, which knows the transition: of KL and reference KL too."""
    case = load(name)
    ours, _ = run_micro_batch(case)
    given, params = case.inputs(True), case.params
    schedule, policy = one_step_training(case, given)
    velocity = leaf(given["noise_pred"])
    result = reference.step_loss(
        velocity,
        given["sample"],
        given["prev_sample"],
        old_prev_sample_mean=given["old_prev_sample_mean"],
        **schedule,
        **policy,
    )
    loss = result.loss / params["gradient_accumulation_steps"]
    expected = {"out.loss": loss.detach(), "grad.noise_pred": grad_of(loss, velocity)}
    expected |= verl_metrics(result, params["loss_mode"])
    through_plain_functions = end_to_end(case, flowdppo_ops, False, trainers_kl=False)
    ours |= {key: through_plain_functions[key] for key in ("size.kl",) if key in through_plain_functions}
    compare(case, False, ours, expected)
    assert not fixed.ours.fallbacks()


def test_extremes_are_put_together_as_extremes(either):
    _, metrics = run_micro_batch(load("f_e2e_verl__dppo_sde_img"))
    how = {name: str(getattr(m.aggregation, "value", m.aggregation)) for name, m in metrics.items()}
    extremes = {"actor/ratio_min": "min", "actor/ratio_max": "max", "actor/kl_new_old_max": "max"}
    assert how == dict.fromkeys(how, "mean") | ({} if either.strict else extremes)


def _of_both(modules: Any, stem: str, metric: str) -> float:
    """How many times the strict value is the other's."""
    values = {}
    for strict in (True, False):
        modules.ours.enable(strict)
        values[strict] = run_micro_batch(load(stem))[0][f"metric.actor/{metric}"].item()
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
