"""UniRL's entry points, fused, on the recorded calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden.load import Case, load, names
from golden_adapters import largest, schedule_of
from golden_compare import disagreements, drives
from golden_differences import DIFFERENCES, no_noise, squared_drift, stored_means_kl
from golden_training import end_to_end
from torch import Tensor
from trainers import unirl as standin_unirl
from unirl_modules import both, is_standin, trainer

from flowdppo_ops import reference

# Of golden_differences.DIFFERENCES, those that UniRL's entry points do not have with strict=True.
_REPRODUCED = (
    *("a_unirl_klmask__float64_ratio_inf", "a_unirl_klmask__ratio_inf_adv_pos", "a2_unirl_clip__inf_ratio"),
    *("d2_unirl_sigma_t__hand_near_one_eta0.7_on", "d2_unirl_sigma_t__hand_near_one_eta1_on"),
)
_NO_LATENTS = "a_unirl_klmask__quirk_rank2_means"  # goes to UniRL's own function with strict=True
_OTHER_RANK = (
    "a_unirl_klmask__error_token_4d_rank5_sigma",
    "a_unirl_klmask__error_video_6d_rank5_sigma",
    "a_unirl_klmask__quirk_token_4d_rank5_sigma_B_eq_S",
)


def _masked_rows(case: Case, double: bool) -> dict[str, Tensor]:
    """Means of another rank than sigma_t `[1, S, 1, 1, 1]`: one KL per row, whatever the latent dimensions."""
    given = case.inputs(True)
    shape = case.params.get("new_means_shape")
    given |= {"new_means": torch.zeros(shape), "old_means": torch.zeros(shape)} if shape else {}
    drift = ((given["new_means"] - given["old_means"]).double() ** 2).flatten(2).mean(-1)
    kl = drift / (2 * given["sigma_t"].reshape(1, -1) ** 2)
    ratio, advantages = torch.exp(given["new_logp"] - given["old_logp"]), given["advantages"]
    high = kl >= case.number("kl_mask_threshold")
    pos, neg = high & (ratio > 1) & (advantages > 0), high & (ratio < 1) & (advantages < 0)
    loss = torch.where(pos | neg, 0.0, -advantages * ratio)
    shares = {"kl_mask": high, "pos_rm": pos, "neg_rm": neg, "masked": pos | neg, "unmasked": ~(pos | neg)}
    expected = {
        "out.loss_per_elem": loss,
        "metric.kl_new_old_mean": kl.mean(),
        "metric.kl_new_old_max": kl.max(),
        "grad.mean.new_logp": loss / loss.numel(),
        **{f"metric.{name}_fraction": rows.double().mean() for name, rows in shares.items()},
    }
    return expected | ({"grad.w.new_logp": loss * given["w"]} if "w" in given else {})


def expected_of(case: Case, double: bool, strict: bool) -> dict[str, Tensor]:
    """What stands in the place of the recorded numbers."""
    if case.name in _OTHER_RANK:
        return _masked_rows(case, double)
    difference = DIFFERENCES.get(case.name)
    if difference is None or (strict and case.name in _REPRODUCED):
        return {}
    return difference.ours(case, double)


def agree(case: Case, ours: dict[str, Any], expected: dict[str, Tensor], double: bool = False) -> None:
    """All that UniRL's function returned; `aux.*` is what the recording computed beside it."""
    wanted = case.recorded(double) | expected
    wanted = {key: value for key, value in wanted.items() if not key.startswith("aux.")}
    assert not case.recorded(double).keys() - ours.keys() - {key for key in case.recorded(double) if "aux." in key}
    wrong = disagreements(case, ours, wanted, double)
    assert not wrong, f"{case.name}: {case.meta['note']}"


def run_helper(case: Case, helper: Any, double: bool, **more: Any) -> dict[str, Any]:
    """One of the loss helpers, with the gradients that were recorded."""
    given = case.inputs(double)
    shape = case.params.get("new_means_shape")
    leaves = {"new_logp": given["new_logp"].clone().requires_grad_()}
    if "kl_mask_threshold" in more:
        means = {name: torch.zeros(shape) if shape else given[name] for name in ("new_means", "old_means")}
        leaves["new_means"] = means["new_means"].clone().requires_grad_()
        more |= {"old_means": means["old_means"], "sigma_t": given["sigma_t"]}
    call = {"old_logp": given["old_logp"], "advantages": given["advantages"], **leaves, **more}
    (rows, metrics), mean = helper(**call), helper(**call)[0].mean()
    weighted = (rows * given.get("w", torch.ones(()))).sum()
    ratio = torch.exp(given["new_logp"] - given["old_logp"])
    ours = {
        "out.loss_per_elem": rows,
        "grad.w.new_logp": torch.autograd.grad(weighted, leaves["new_logp"], retain_graph=True)[0],
        **{f"metric.{name}": value for name, value in metrics.items()},
        "size.ratio_std": largest(ratio),
    }
    for name, leaf in leaves.items():
        gradient = torch.autograd.grad(mean, leaf, retain_graph=True, allow_unused=True)
        ours[f"grad.mean.{name}"] = gradient[0]
    assert all(v.ndim == 0 and v.device.type == "cpu" and not v.requires_grad for v in metrics.values())
    return ours


@both
@pytest.mark.parametrize(("name", "double"), drives("a_unirl_klmask"))
def test_recorded_masked_losses(unirl, name, double, strict):
    case = load(name)
    unirl.enable(strict=strict)
    helper = trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss
    if name == _NO_LATENTS and strict:
        if is_standin():
            given = case.inputs(double)
            given = {k: given[k] for k in ("new_logp", "old_logp", "new_means", "old_means", "advantages", "sigma_t")}
            assert helper(**given, kl_mask_threshold=1.0).name == "_flowdppo_kl_adv_loss"
        else:
            agree(
                case, run_helper(case, helper, double, kl_mask_threshold=case.number("kl_mask_threshold")), {}, double
            )
        assert list(unirl.fallbacks()) == ["means without latent dimensions, which UniRL takes for one row"]
        return
    ours = run_helper(case, helper, double, kl_mask_threshold=case.number("kl_mask_threshold"))
    agree(case, ours, expected_of(case, double, strict), double)
    assert unirl.fallbacks() == {}


@both
@pytest.mark.parametrize("user", ["base", "flowgrpo", "grpo"])
@pytest.mark.parametrize(("name", "double"), drives("a2_unirl_clip"))
def test_recorded_clipped_losses(unirl, name, double, strict, user):
    case = load(name)
    unirl.enable(strict=strict)
    more = {"clip_range": case.number("clip_range")}
    if case.params.get("clip_range_high") is not None:
        more["clip_range_high"] = case.number("clip_range_high")
    ours = run_helper(case, trainer(f"algorithms.{user}")._grpo_clip_loss, double, **more)
    agree(case, ours, expected_of(case, double, strict), double)
    assert unirl.fallbacks() == {}


_NO_DENSITY = "d_unirl_step__flow_dt_zero"


@pytest.mark.parametrize("name", names("d_unirl_step"))
def test_recorded_steps(unirl, name):
    """`denoise` is float32 whatever it is given, so there is no double run of it."""
    case = load(name)
    given, eta = case.inputs(False), case.number("eta")
    noise_pred = given["noise_pred"].clone().requires_grad_()
    more = {"sigma_max": given["sigma_max"]} if "sigma_max" in given else {}
    strategy = getattr(unirl, case.params["strategy"])()
    prev_sample, log_prob, mean = strategy.denoise(
        noise_pred,
        given["sample"],
        given["sigma"],
        given["sigma_next"],
        eta=eta,
        prev_sample=given["prev_sample"],
        **more,
    )
    assert (log_prob is None) == case.params["log_prob_is_none"]
    assert str(prev_sample.dtype) == case.params["returned_prev_sample_dtype"]
    same = torch.equal(prev_sample, given["prev_sample"].float())
    assert same == case.params["returned_prev_sample_bitwise_equals_input"]
    ours = {"out.log_prob": log_prob, "out.prev_sample_mean": mean, "out.prev_sample": prev_sample}
    if log_prob is not None:
        scores = (log_prob * given["w"]).sum()
        for key, objective in (("grad", scores), ("grad_j2", scores + 0.5 * (mean**2).sum())):
            ours[f"{key}.noise_pred"] = torch.autograd.grad(objective, noise_pred, retain_graph=True)[0]
    # Sigma twice in a schedule: UniRL's log-prob is NaN, ours 0. No schedule has that.
    agree(case, ours, no_noise(case, False) if name == _NO_DENSITY else {})
    assert unirl.fallbacks() == {}


@both
@pytest.mark.parametrize("name", names("d2_unirl_sigma_t"))
def test_recorded_sigmas_of_the_kl(unirl, name, strict):
    case = load(name)
    algorithm = unirl.FlowDPPO(
        params=SimpleNamespace(eta=case.number("eta")),
        stage=SimpleNamespace(strategy=unirl.FlowSDEStrategy()),
        add_kl_coefficient=case.params["add_kl_coefficient"],
        strict=strict,
    )
    segment = SimpleNamespace(sigmas=case.inputs(False)["sigmas"])
    sigma_t = algorithm._compute_sigma_t(segment, case.params["target_steps"], device=torch.device("cpu"))
    recorded = case.arrays["out.sigma_t"]
    assert sigma_t.shape == recorded.shape
    assert sigma_t.dtype == torch.float32
    if not strict and case.params["add_kl_coefficient"]:
        recorded = case.arrays["aux.replay_transition_std"].reshape(recorded.shape)
    agree(case, {"out.sigma_t": sigma_t}, {"out.sigma_t": recorded})


def run_algorithm(case: Case, unirl: Any, strict: bool) -> dict[str, Any]:
    """One micro-batch through the fused strategy and the fused algorithm."""
    given, params = case.inputs(False), case.params
    noise_pred = given["noise_pred"].clone().requires_grad_()
    stored = case.arrays["out.new_means"].dtype
    strategy = getattr(unirl, params["strategy"])()
    stage = standin_unirl.Stage(strategy, (noise_pred, given["sample"], given["prev_sample"]), stored)
    given_params = SimpleNamespace(eta=case.number("eta"))
    if "clip_range" in params:
        algorithm = unirl.FlowGRPO(params=given_params, stage=stage, clip_range=params["clip_range"], strict=strict)
    else:
        names = ("kl_mask_threshold", "add_kl_coefficient", "old_logp_source")
        own = {name: params[name] for name in names}
        algorithm = unirl.FlowDPPO(params=given_params, stage=stage, strict=strict, **own)
    segment = standin_unirl.Segment(given["sigmas"], given["sde_indices"], given["old_logp"], given.get("old_means"))
    call = {"conditions": {}, "segment": segment, "advantages": given["advantages"], "training_progress": 0.0}
    result = algorithm.compute_loss_and_backward(**call, loss_scale=case.number("loss_scale"))
    assert isinstance(result, trainer("algorithms.base").AlgorithmStepResult)
    assert result.has_backward
    assert result.num_steps_or_tokens == params["num_steps_or_tokens"]
    assert type(result.loss) is float
    assert all(type(value) is float for value in result.metrics.values())
    assert set(result.metrics) == {key[7:] for key in case.arrays if key.startswith("metric.")}
    with torch.no_grad():
        replay = stage.replay({}, segment=segment, params=given_params, step_indices=params["sde_indices"])
    sizes = end_to_end(case, reference, False)
    ours = {
        "out.loss": torch.tensor(result.loss),
        "out.new_logp": replay.log_probs,
        "out.new_means": replay.prev_sample_means,
        "grad.noise_pred": noise_pred.grad,
        **{f"metric.{name}": torch.tensor(value, dtype=torch.float64) for name, value in result.metrics.items()},
        **{key: value for key, value in sizes.items() if key.startswith("size.")},
    }
    if "out.sigma_t" in case.arrays:
        ours["out.sigma_t"] = algorithm._compute_sigma_t(segment, params["sde_indices"], torch.device("cpu"))
    return ours


_HALF = ("f_e2e_unirl__flow_bf16_recipe", "f_e2e_unirl__flow_fp16_default")


@pytest.mark.parametrize("name", names("f_e2e_unirl"))
def test_recorded_training_steps(unirl, name):
    """UniRL squares the difference of half-precision means in half precision: the one difference, the KL of `_HALF`."""
    case = load(name)
    agree(case, run_algorithm(case, unirl, True), expected_of(case, False, True) if name in _HALF else {})
    assert unirl.fallbacks() == {}


@pytest.mark.parametrize("name", names("f_e2e_unirl"))
def test_fixed_training_steps_have_the_kl_of_the_transition(unirl, name):
    """Against `sde_step` and `loss` of the reference, with the standard deviation that the one hands the other."""
    case = load(name)
    ours = run_algorithm(case, unirl, False)
    expected = end_to_end(case, reference, False, trainers_kl=False)
    if "out.sigma_t" in case.arrays and case.params["add_kl_coefficient"]:
        expected["out.sigma_t"] = transition_std(case).reshape(1, -1, 1, 1, 1)
    elif "out.sigma_t" in case.arrays:
        expected["out.sigma_t"] = case.arrays["out.sigma_t"]
    if name in _HALF:  # of the means as they are stored
        drift = squared_drift(case).flatten(2).mean(-1)
        kl = drift / (2 * expected["out.sigma_t"].reshape(1, -1) ** 2)
        expected = {"out.sigma_t": expected["out.sigma_t"], "metric.kl_new_old_mean": kl.mean()}
        assert not disagreements(case, ours, expected, False)
        return
    keep = {key for key in case.recorded(False) if not key.startswith("aux.") and key in expected}
    assert not disagreements(case, ours, {key: expected[key] for key in keep}, False)
    assert {"out.loss", "grad.noise_pred"} <= keep


def transition_std(case: Case) -> Tensor:
    """`[S]` in float64."""
    given, index = case.inputs(True), torch.tensor(case.params["sde_indices"])
    eta = given["sigmas"].new_tensor(case.number("eta"))
    schedule = schedule_of(given["sigmas"], index, case.params["strategy"], eta)
    return reference.transition(**schedule)[2]


def test_effects_are_as_listed():
    """The numbers in the table of docs/trainers.md, from what UniRL's own functions returned."""
    factors = {}  # UniRL's KL over the transition's
    for name in ("flow", "cps", "dance"):
        case = load(f"f_e2e_unirl__{name}_fp32")
        factors[name] = ((transition_std(case) / case.arrays["out.sigma_t"].flatten()) ** 2).tolist()
    assert factors["flow"] == pytest.approx([1 / 3.57, 1, 1], rel=1e-3)
    assert factors["cps"] == pytest.approx([0.42, 1.24, 2.97], rel=1e-2)
    assert factors["dance"] == pytest.approx([0.01, 0.037, 0.22], rel=2e-2)
    for name, effect in zip(_HALF, (1.2e-4, 6e-5), strict=True):
        case = load(name)
        exact = stored_means_kl(case, False)["metric.kl_new_old_mean"].item()
        assert abs(case.arrays["metric.kl_new_old_mean"].item() / exact - 1) == pytest.approx(effect, rel=0.2)


def test_listed_differences_are_some(unirl):
    """What strict=True reproduces differs with strict=False, so that the lists cannot outlive their reasons."""
    for name in _REPRODUCED:
        assert DIFFERENCES[name]
        case = load(name)
        expected = expected_of(case, False, False)
        recorded = {key: want for key, want in case.recorded(False).items() if key in expected}
        assert disagreements(case, expected, recorded, False), name


@both
@pytest.mark.parametrize(
    "shape",
    [(4, 3, 11, 6), (3, 3, 11, 6), (4, 1, 11, 6), (1, 3, 11, 6), (1, 1, 7), (2, 3, 3, 2, 4, 5), (2, 3, 1, 2, 4, 5)],
    ids=["token", "token B=S", "token S=1", "token B=1", "flat", "video S=C", "video C=1"],
)
def test_sigma_of_rank_5_fits_means_of_any_rank(unirl, shape, strict):
    generator = torch.Generator().manual_seed(7)
    rows = shape[:2]
    new, old = (torch.randn(shape, generator=generator) for _ in range(2))
    new = old + 0.01 * new
    sigma_t = torch.linspace(0.2, 1.5, rows[1]).reshape(1, -1, 1, 1, 1)
    log_diff = torch.randn(rows, generator=generator) / 100
    advantages = torch.randn(rows, generator=generator)
    kl = ((new - old).double() ** 2).flatten(2).mean(-1) / (2 * sigma_t.double().reshape(1, -1) ** 2)
    threshold = kl.flatten().sort().values[: (kl.numel() + 1) // 2].mean().item()
    unirl.enable(strict=strict)
    per_element, metrics = trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss(
        new_logp=log_diff,
        old_logp=torch.zeros(rows),
        new_means=new,
        old_means=old,
        advantages=advantages,
        sigma_t=sigma_t,
        kl_mask_threshold=threshold,
    )
    blocked = (kl >= threshold) & (log_diff * advantages > 0)
    assert torch.equal(per_element == 0, blocked)
    assert per_element.shape == rows
    assert metrics["kl_new_old_max"].item() == pytest.approx(kl.max().item(), rel=1e-5)
    assert metrics["kl_new_old_mean"].item() == pytest.approx(kl.mean().item(), rel=1e-5)
    assert metrics["masked_fraction"].item() == pytest.approx(blocked.double().mean().item())
    assert unirl.fallbacks() == {}
