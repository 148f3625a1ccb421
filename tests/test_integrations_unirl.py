"""UniRL's entry points, fused: recorded calls, contracts, and what is UniRL's own.

Everything here runs on a stand-in for UniRL's modules (trainers/unirl.py), and once more on UniRL itself where
FLOWDPPO_OPS_UNIRL gives the path of its sources and they can be imported; what only UniRL can show is at the end.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import pickle
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import golden_adapters as adapters
import pytest
import test_golden as golden
import torch
from golden.load import Case, load, names
from torch import Tensor
from trainers import unirl as standin_unirl

from flowdppo_ops import PolicyLoss, reference
from flowdppo_ops.integrations import Incompatible

SOURCES = "FLOWDPPO_OPS_UNIRL"
INTEGRATION = "flowdppo_ops.integrations.unirl"
_NEEDED = (
    *("algorithms.flowdppo", "algorithms.flowgrpo", "algorithms.grpo", "sde.kernels", "utils.misc"),
    *("train.stack", "train.unified_model_stack"),
)

both = pytest.mark.parametrize("strict", [True, False], ids=["strict", "fixed"])


# ---- the trainer, stood in for or real -------------------------------------------------------------------------------


@cache
def real_modules() -> dict[str, Any]:
    """UniRL's own modules; skips the test where there are none."""
    if SOURCES not in os.environ:
        pytest.skip(f"{SOURCES} does not say where UniRL's sources are")
    sys.path.insert(0, os.environ[SOURCES])
    try:
        for name in _NEEDED:
            importlib.import_module(f"unirl.{name}")
    except ImportError as error:
        pytest.skip(f"UniRL in {os.environ[SOURCES]} cannot be imported here: {error}")
    finally:
        sys.path.pop(0)
    return unirl_modules()


def unirl_modules() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "unirl"}


@pytest.fixture(params=["stand-in", "UniRL"] if SOURCES in os.environ else ["stand-in"])
def unirl(request, monkeypatch):
    """The integration, freshly imported on one of the two."""
    modules = standin_unirl.modules() if request.param == "stand-in" else real_modules()
    yield from on(modules, monkeypatch)


@pytest.fixture
def standin(monkeypatch):
    yield from on(standin_unirl.modules(), monkeypatch)


@pytest.fixture
def real(monkeypatch):
    yield from on(real_modules(), monkeypatch)


def on(modules: dict[str, Any], monkeypatch):
    monkeypatch.delenv("FLOWDPPO_OPS_STRICT", raising=False)
    for name in unirl_modules():
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(INTEGRATION, None)
    integration = importlib.import_module(INTEGRATION)
    yield integration
    integration.disable()
    del sys.modules[INTEGRATION]


def trainer(name: str) -> Any:
    return sys.modules[f"unirl.{name}"]


def is_standin() -> bool:
    return trainer("algorithms.base").AlgorithmStepResult is standin_unirl.AlgorithmStepResult


# ---- recorded calls --------------------------------------------------------------------------------------------------

# The differences of the plain API (test_golden.DIFFERENCES) that UniRL's entry points do not have with strict=True.
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
    difference = golden.DIFFERENCES.get(case.name)
    if difference is None or (strict and case.name in _REPRODUCED):
        return {}
    return difference.ours(case, double)


def agree(case: Case, ours: dict[str, Any], expected: dict[str, Tensor], double: bool = False) -> None:
    """All that UniRL's function returned; `aux.*` is what the recording computed beside it."""
    wanted = case.recorded(double) | expected
    wanted = {key: value for key, value in wanted.items() if not key.startswith("aux.")}
    assert not case.recorded(double).keys() - ours.keys() - {key for key in case.recorded(double) if "aux." in key}
    wrong = []
    for key, want in wanted.items():
        allowed = 0.0 if want is None else golden._allowed(case, key, want, ours, double)
        wrong.append(golden._mismatch(key, ours[key], want, allowed))
    assert not list(filter(None, wrong)), f"{case.name}: {case.meta['note']}"


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
        "size.ratio_std": adapters._largest(ratio),
    }
    for name, leaf in leaves.items():
        gradient = torch.autograd.grad(mean, leaf, retain_graph=True, allow_unused=True)
        ours[f"grad.mean.{name}"] = gradient[0]
    assert all(v.ndim == 0 and v.device.type == "cpu" and not v.requires_grad for v in metrics.values())
    return ours


def _drives(*groups: str) -> list[Any]:
    cases = [name for group in groups for name in names(group)]
    return [
        pytest.param(name, double, id=f"{name}{'-double' * double}")
        for name in cases
        for double in (False, True)
        if not double or load(name).has_double()
    ]


@both
@pytest.mark.parametrize(("name", "double"), _drives("a_unirl_klmask"))
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
@pytest.mark.parametrize(("name", "double"), _drives("a2_unirl_clip"))
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
    agree(case, ours, golden._no_noise(case, False) if name == _NO_DENSITY else {})
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
    sizes = adapters.end_to_end(case, reference, False)
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
    expected = adapters.end_to_end(case, reference, False, trainers_kl=False)
    if "out.sigma_t" in case.arrays and case.params["add_kl_coefficient"]:
        expected["out.sigma_t"] = transition_std(case).reshape(1, -1, 1, 1, 1)
    elif "out.sigma_t" in case.arrays:
        expected["out.sigma_t"] = case.arrays["out.sigma_t"]
    if name in _HALF:  # of the means as they are stored
        drift = golden._squared_drift(case).flatten(2).mean(-1)
        kl = drift / (2 * expected["out.sigma_t"].reshape(1, -1) ** 2)
        expected = {"out.sigma_t": expected["out.sigma_t"], "metric.kl_new_old_mean": kl.mean()}
        agree_some(case, ours, expected)
        return
    keep = {key for key in case.recorded(False) if not key.startswith("aux.") and key in expected}
    agree_some(case, ours, {key: expected[key] for key in keep})
    assert {"out.loss", "grad.noise_pred"} <= keep


def transition_std(case: Case) -> Tensor:
    """`[S]` in float64."""
    given, index = case.inputs(True), torch.tensor(case.params["sde_indices"])
    eta = given["sigmas"].new_tensor(case.number("eta"))
    schedule = adapters._schedule(given["sigmas"], index, case.params["strategy"], eta)
    return reference.transition(**schedule)[2]


def agree_some(case: Case, ours: dict[str, Any], expected: dict[str, Tensor]) -> None:
    wrong = (
        golden._mismatch(key, ours[key], want, golden._allowed(case, key, want, ours, False))
        for key, want in expected.items()
    )
    assert not list(filter(None, wrong))


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
        exact = golden._stored_means_kl(case, False)["metric.kl_new_old_mean"].item()
        assert abs(case.arrays["metric.kl_new_old_mean"].item() / exact - 1) == pytest.approx(effect, rel=0.2)


def test_listed_differences_are_some(unirl):
    """What strict=True reproduces differs with strict=False, so that the lists cannot outlive their reasons."""
    for name in _REPRODUCED:
        assert golden.DIFFERENCES[name]
        case = load(name)
        expected = expected_of(case, False, False)
        assert any(
            golden._mismatch(key, expected[key], want, golden._allowed(case, key, want, {}, False))
            for key, want in case.recorded(False).items()
            if key in expected
        ), name


# ---- token and video trajectories ------------------------------------------------------------------------------------


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


# ---- contracts -------------------------------------------------------------------------------------------------------


def test_signatures_are_unirls(unirl):
    flowdppo, base = trainer("algorithms.flowdppo"), trainer("algorithms.base")
    theirs = [flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss]
    unirl.enable()
    for own, fused in zip(theirs, [flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss], strict=True):
        assert fused is not own
        assert described(fused) == described(own)
    for name, module in (("FlowDPPO", "algorithms.flowdppo"), ("FlowGRPO", "algorithms.flowgrpo")):
        own, fused = getattr(trainer(module), name), getattr(unirl, name)
        assert described(fused) == [*described(own), ("strict", inspect.Parameter.KEYWORD_ONLY, None)]
        assert described(fused.prepare_segment) == described(own.prepare_segment)
        assert described(fused.compute_loss_and_backward) == described(own.compute_loss_and_backward)
    for name in ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"):
        own, fused = getattr(trainer("sde.kernels"), name), getattr(unirl, name)
        assert described(fused) == described(own)
        assert described(fused.denoise) == described(own.denoise)


def described(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", ["FlowDPPO", "FlowGRPO", "FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
def test_classes_are_unirls_too(unirl, name):
    module = {"FlowDPPO": "algorithms.flowdppo", "FlowGRPO": "algorithms.flowgrpo"}.get(name, "sde.kernels")
    own, fused = getattr(trainer(module), name), getattr(unirl, name)
    assert issubclass(fused, own)
    assert fused is getattr(unirl, name)
    assert pickle.loads(pickle.dumps(fused)) is fused  # as Ray sends it to its workers
    assert f"{fused.__module__}.{fused.__qualname__}" == f"{INTEGRATION}.{name}"
    assert fused.__doc__
    for attribute in ("canonical_name", "supports_multi_update", "anchor_fields", "requires_ema_rollout"):
        assert getattr(fused, attribute, None) == getattr(own, attribute, None)


def test_algorithms_take_a_stage_or_a_pipeline(unirl):
    stage, params = object(), SimpleNamespace(eta=0.7)
    for kind in (unirl.FlowDPPO, unirl.FlowGRPO):
        assert kind(params=params, stage=stage).stage is stage
        assert kind(params=params, pipeline=SimpleNamespace(other=stage), stage_attr="other").stage is stage
        with pytest.raises(ValueError, match="stage"):
            kind(params=params)
    assert unirl.FlowDPPO(params=params, stage=stage).recomputes_anchor() is True
    assert unirl.FlowGRPO(params=params, stage=stage).recomputes_anchor() is False
    assert unirl.FlowGRPO(params=params, stage=stage, old_logp_source="replay").recomputes_anchor() is True


def test_strict_comes_from_the_environment(unirl, monkeypatch):
    build = {"params": SimpleNamespace(eta=0.7), "stage": object()}
    assert unirl.FlowDPPO(**build).strict is True
    monkeypatch.setenv("FLOWDPPO_OPS_STRICT", "0")
    assert unirl.FlowDPPO(**build).strict is False
    assert unirl.FlowDPPO(**build, strict=True).strict is True


def test_strategies_take_a_config(unirl):
    assert unirl.FlowSDEStrategy(config=None).canonical_name == "flow"


def training_step(unirl: Any, kind: str = "FlowDPPO", shape=(4, 3, 2, 5, 5), **arguments: Any):
    """An algorithm, its segment, and the leaf that its stage computes from."""
    torch.manual_seed(3)  # the steps draw from PyTorch's own generator
    noise_pred, sample = torch.randn(2, *shape)
    sigmas = torch.linspace(1, 0, 11) ** 0.7
    strategy, params = unirl.FlowSDEStrategy(), SimpleNamespace(eta=0.7)
    with torch.no_grad():
        steps = [
            strategy.denoise(noise_pred[:, k], sample[:, k], sigmas[k], sigmas[k + 1], eta=0.7, sigma_max=sigmas[1])
            for k in range(shape[1])
        ]
    prev_sample, log_prob, mean = (torch.stack(values, 1) for values in zip(*steps, strict=True))
    leaf = (noise_pred + 0.01 * torch.randn(shape)).requires_grad_()
    stage = standin_unirl.Stage(strategy, (leaf, sample, prev_sample))
    segment = standin_unirl.Segment(sigmas, torch.arange(shape[1]), log_prob, mean)
    advantages = torch.randn(shape[0])
    algorithm = getattr(unirl, kind)(params=params, stage=stage, **arguments)
    call = {"conditions": {}, "segment": segment, "advantages": advantages, "training_progress": 0.5}
    return algorithm, call | {"loss_scale": 0.25}, leaf


def test_nothing_to_train_on(unirl):
    algorithm, call, leaf = training_step(unirl)
    call["segment"].sde_indices = torch.empty(0, dtype=torch.long)
    result = algorithm.compute_loss_and_backward(**call)
    assert (result.loss, result.metrics, result.num_steps_or_tokens, result.has_backward) == (0.0, {}, 0, False)
    assert leaf.grad is None


def test_means_are_required(unirl):
    algorithm, call, _ = training_step(unirl)
    replay = algorithm.stage.replay
    algorithm.stage.replay = lambda *a, **k: standin_unirl.Replay(replay(*a, **k).log_probs, None)
    with pytest.raises(RuntimeError, match="prev_sample_means"):
        algorithm.compute_loss_and_backward(**call)


def test_anchor_is_required(unirl):
    algorithm, call, _ = training_step(unirl)
    call["segment"].sde_logp = None
    with pytest.raises(ValueError, match="sde_logp"):
        algorithm.compute_loss_and_backward(**call)


def test_some_of_the_recorded_steps(unirl):
    """A subclass may train fewer: their anchors are found by step, not by place."""
    algorithm, call, leaf = training_step(unirl)
    algorithm._resolve_target_steps = lambda segment: [2]
    stage = algorithm.stage
    stage.latents = tuple(t[:, 2:] for t in stage.latents)
    result = algorithm.compute_loss_and_backward(**call)
    assert result.num_steps_or_tokens == 1
    assert leaf.grad[:, :2].count_nonzero() == 0
    assert leaf.grad[:, 2].count_nonzero() > 0
    assert 0 < abs(result.metrics["ratio_mean"] - 1) < 0.1


def test_device_is_waited_for_after_the_backward(unirl, monkeypatch):
    """One copy of all metrics, and not before the backward is launched."""
    algorithm, call, leaf = training_step(unirl)
    copies = []
    metrics = PolicyLoss.metrics

    def counted(self, *arguments):
        copies.append(leaf.grad is not None)
        return metrics(self, *arguments)

    monkeypatch.setattr(PolicyLoss, "metrics", counted)
    result = algorithm.compute_loss_and_backward(**call)
    assert copies == [True]
    assert len(result.metrics) == 14


CLIP = 1e-4  # half of the ratios of `training_step` are farther from 1


@pytest.mark.parametrize(("schedule", "factor"), [("constant", 1.0), ("linear_decay", 0.75), ("cosine_decay", 0.5)])
def test_clip_range_follows_its_schedule(unirl, schedule, factor):
    algorithm, call, _ = training_step(unirl, "FlowGRPO", clip_range=CLIP, clip_schedule=schedule)
    result = algorithm.compute_loss_and_backward(**call)
    assert result.metrics["clip_range"] == pytest.approx(CLIP * factor)
    assert 0 < result.metrics["clip_fraction"] < 1


@pytest.mark.parametrize("threshold", [-1.0, 0.0, math.nan])
def test_every_kl_is_high_for_a_threshold_of_no_kl(unirl, threshold):
    algorithm, call, _ = training_step(unirl, kl_mask_threshold=threshold)
    assert algorithm.compute_loss_and_backward(**call).metrics["kl_mask_fraction"] == 1


def test_sigma_without_a_schedule(unirl):
    for strict in (True, False):
        algorithm, call, _ = training_step(unirl, strict=strict)
        call["segment"].sigmas, replayed = None, call["segment"].sigmas
        with pytest.raises(ValueError, match=r"segment\.sigmas"):
            algorithm._compute_sigma_t(call["segment"], [0], torch.device("cpu"))
        assert replayed is not None


@pytest.mark.parametrize("name", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
def test_fixed_sigma_is_the_transitions(unirl, name):
    """Also where the transition draws nothing: CPS's last step, whose KL is none."""
    strategy = getattr(unirl, name)()
    stage, params = SimpleNamespace(strategy=strategy), SimpleNamespace(eta=0.7)
    algorithm = unirl.FlowDPPO(params=params, stage=stage, strict=False)
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    sigma_t = algorithm._compute_sigma_t(SimpleNamespace(sigmas=sigmas), [0, 1, 2], torch.device("cpu"))
    expected = {
        "FlowSDEStrategy": [
            0.7 * math.sqrt(s / (1 - m) * (s - n)) for s, m, n in ((1, 0.8, 0.8), (0.8, 0.8, 0.4), (0.4, 0.4, 0))
        ],
        "CPSSDEStrategy": [0.8 * math.sin(0.35 * math.pi), 0.4 * math.sin(0.35 * math.pi), math.inf],
        "DanceSDEStrategy": [0.7 * math.sqrt(dt) for dt in (0.2, 0.4, 0.4)],
    }[name]
    assert sigma_t.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_fixed_sigma_of_an_unknown_strategy_is_unirls(unirl):
    stage = SimpleNamespace(strategy=SimpleNamespace(canonical_name="other"))
    segment, cpu = SimpleNamespace(sigmas=torch.tensor([1.0, 0.5, 0.0])), torch.device("cpu")
    fixed, strict = (
        unirl.FlowDPPO(params=SimpleNamespace(eta=0.7), stage=stage, strict=strict) for strict in (False, True)
    )
    assert torch.equal(fixed._compute_sigma_t(segment, [0, 1], cpu), strict._compute_sigma_t(segment, [0, 1], cpu))
    assert unirl.fallbacks() == {"sigma of the KL with strategy SimpleNamespace": 1}


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eta", [0.7, 0.0])
@pytest.mark.parametrize("name", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
def test_sampling(unirl, name, eta, dtype):
    """The noise that UniRL draws, whatever eta, so that what is drawn afterwards is the same too."""
    strategy = getattr(unirl, name)()
    sampler = unirl._SAMPLERS[strategy.canonical_name]
    noise_pred, sample = torch.randn(2, 3, 4, 5, 5).to(dtype)
    sigma, sigma_next, sigma_max = torch.tensor(1.0), torch.tensor(0.9), torch.tensor(0.9)
    torch.manual_seed(5)
    prev_sample, log_prob, mean = strategy.denoise(
        noise_pred, sample, sigma, sigma_next, eta=eta, sigma_max=sigma_max, step_index=0
    )
    after = torch.randn(3)
    torch.manual_seed(5)
    noise = torch.randn(sample.shape)
    assert torch.equal(after, torch.randn(3))
    level = torch.tensor(eta, dtype=torch.float64)
    a, b, std = reference.transition(sampler, sigma.double(), sigma_next.double(), level, sigma_max.double())
    truth = a * sample.double() + b * noise_pred.double()
    assert torch.allclose(mean.double(), truth, rtol=0, atol=2e-6)
    drawn = truth + std * noise
    scored = eta > 0 and dtype == torch.bfloat16
    assert torch.allclose(prev_sample.double(), drawn, rtol=2**-8 if scored else 0, atol=2e-6)
    assert (prev_sample.dtype, mean.dtype) == (torch.float32, torch.float32)
    if eta == 0:
        assert log_prob is None
        return
    assert (log_prob.dtype, log_prob.shape) == (torch.float32, (3,))
    assert torch.equal(prev_sample, prev_sample.to(dtype).float())
    stored = prev_sample.to(dtype)
    replayed = strategy.denoise(noise_pred, sample, sigma, sigma_next, eta=eta, prev_sample=stored, sigma_max=sigma_max)
    assert torch.equal(replayed[1], log_prob)
    assert unirl.fallbacks() == {}


def test_sigmas_come_in_any_shape_of_one_per_row(unirl):
    strategy = unirl.FlowSDEStrategy()
    noise_pred, sample, prev_sample = torch.randn(3, 2, 4, 5, 5)
    calls = [
        strategy.denoise(noise_pred, sample, sigma, sigma_next, eta=0.7, prev_sample=prev_sample, sigma_max=sigma_max)
        for sigma, sigma_next, sigma_max in (
            (torch.tensor(0.9), torch.tensor(0.8), 0.99),
            (torch.tensor([0.9]), torch.tensor([0.8]), torch.tensor([0.99])),
            (torch.tensor([0.9, 0.9]), torch.tensor([0.8, 0.8]), torch.tensor(0.99)),
            (torch.full((2, 1), 0.9), torch.full((2, 1), 0.8), 0.99),
            (torch.full((2, 1, 1, 1), 0.9), torch.full((2, 1, 1, 1), 0.8), 0.99),
        )
    ]
    for _, log_prob, mean in calls[1:]:
        assert torch.equal(log_prob, calls[0][1])
        assert torch.equal(mean, calls[0][2])
    assert unirl.fallbacks() == {}


# ---- what goes to UniRL's own functions ------------------------------------------------------------------------------

_ROWS = {"new_logp": torch.zeros(4, 3), "old_logp": torch.zeros(4, 3), "advantages": torch.ones(4, 3)}
_MEANS = {"new_means": torch.zeros(4, 3, 2, 5, 5), "old_means": torch.zeros(4, 3, 2, 5, 5)}
_KL = {**_ROWS, **_MEANS, "sigma_t": torch.ones(1, 3, 1, 1, 1), "kl_mask_threshold": 1e-5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({name: value.bfloat16() for name, value in _ROWS.items()}, "log-probs of torch.bfloat16 on cpu"),
        ({"advantages": torch.ones(4, 1)}, "log-probs and advantages of different shape, dtype or device"),
        ({"old_logp": torch.zeros(4, 3).double()}, "log-probs and advantages of different shape, dtype or device"),
        ({name: value[:0] for name, value in (_ROWS | _MEANS).items()}, "no rows"),
        ({name: value.to("meta") for name, value in _ROWS.items()}, "log-probs on meta"),
        (
            {"old_means": torch.zeros(4, 3, 2, 5, 1)},
            "means of shape (4, 3, 2, 5, 5) and (4, 3, 2, 5, 1) for rows (4, 3)",
        ),
        (
            {name: value.double() for name, value in _MEANS.items()},
            "means of torch.float64 with log-probs of torch.float32",
        ),
        ({"old_means": torch.zeros(4, 3, 2, 5, 5, device="meta")}, "means and log-probs on different devices"),
        ({"sigma_t": torch.ones(5)}, "a sigma of shape (5,), which is not one per row"),
        ({"sigma_t": torch.ones(1, 3, 2, 1, 1)}, "a sigma of shape (1, 3, 2, 1, 1), which is not one per row"),
        ({"sigma_t": torch.ones(2, 3, 1, 1, 1)}, "a sigma of shape (2, 3, 1, 1, 1), which is not one per row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unserved_losses(standin, change, reason):
    standin.enable()
    given = _KL | change
    own = trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss(**given)
    assert own == standin_unirl.OwnResult("_flowdppo_kl_adv_loss", given)
    if "log-probs" in reason and "means" not in reason:
        rows = {name: given[name] for name in _ROWS}
        own = trainer("algorithms.grpo")._grpo_clip_loss(**rows, clip_range=0.2)
        assert own.given == {**rows, "clip_range": 0.2, "clip_range_high": None}
    assert list(standin.fallbacks()) == [reason]


def test_negative_clip_range_is_unirls(standin):
    standin.enable()
    assert trainer("algorithms.base")._grpo_clip_loss(**_ROWS, clip_range=-0.1).name == "_grpo_clip_loss"
    assert standin.fallbacks() == {"a negative clip range": 1}


_STEP = {
    "noise_pred": torch.zeros(2, 3, 4),
    "sample": torch.zeros(2, 3, 4),
    "sigma": torch.tensor(0.9),
    "sigma_next": torch.tensor(0.8),
    "eta": 0.7,
    "prev_sample": torch.zeros(2, 3, 4),
    "sigma_max": 0.99,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"noise_pred": torch.zeros(2, 3, 1)}, "latents of shape (2, 3, 4), (2, 3, 1), (2, 3, 4)"),
        (
            {name: torch.zeros(2) for name in ("noise_pred", "sample", "prev_sample")},
            "latents of shape (2,), (2,), (2,)",
        ),
        ({"sample": torch.zeros(2, 3, 4, device="meta")}, "latents on meta"),
        ({"prev_sample": torch.zeros(2, 3, 4, device="meta")}, "latents on different devices"),
        ({"sample": torch.zeros(2, 3, 4, dtype=torch.long)}, "latents that are no floating-point numbers"),
        ({"eta": torch.tensor(0.7)}, "eta or sigma_max other than one number"),
        ({"sigma_max": torch.ones(2)}, "eta or sigma_max other than one number"),
        ({"sigma": torch.full((3,), 0.9)}, "a sigma of shape (3,) for latents of shape (2, 3, 4)"),
        ({"sigma_next": torch.full((1, 3), 0.9)}, "a sigma of shape (1, 3) for latents of shape (2, 3, 4)"),
        ({"sample": torch.zeros(2, 3, 4, requires_grad=True)}, "a gradient for the sample"),
        (
            {"noise_pred": torch.zeros(2, 3, 4, requires_grad=True), "prev_sample": None},
            "a gradient for the latent that is drawn",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unserved_steps(standin, change, reason):
    given = _STEP | change
    positional = [given.pop(name) for name in ("noise_pred", "sample", "sigma", "sigma_next")]
    own = standin.FlowSDEStrategy().denoise(*positional, **given, step_index=4)
    assert own.name == "denoise"
    assert own.given["step_index"] == 4
    assert own.given["eta"] is given["eta"]
    assert own.given["noise_pred"] is positional[0]
    assert standin.fallbacks() == {reason: 1}


# ---- enabling --------------------------------------------------------------------------------------------------------

_HELPERS = (
    ("algorithms.flowdppo", "_flowdppo_kl_adv_loss"),
    *((f"algorithms.{user}", "_grpo_clip_loss") for user in ("base", "flowgrpo", "grpo")),
)
_AVERAGING = tuple((m, "aggregate_numeric_metrics") for m in ("utils.misc", "train.stack", "train.unified_model_stack"))


def held() -> dict[tuple[str, str], Any]:
    found = {(module, name): getattr(trainer(module), name) for module, name in (*_HELPERS, *_AVERAGING)}
    return found | {("FlowDPPO", "_compute_sigma_t"): trainer("algorithms.flowdppo").FlowDPPO._compute_sigma_t}


def test_enable_and_disable(unirl):
    before = held()
    assert not unirl.enabled()
    unirl.enable()
    strict = held()
    assert unirl.enabled()
    assert {place for place, value in strict.items() if value is not before[place]} == set(_HELPERS)
    unirl.enable()
    assert held() == strict
    unirl.enable(strict=False)
    assert all(value is not before[place] for place, value in held().items())
    unirl.enable(strict=True)
    assert {place for place, value in held().items() if value is not before[place]} == set(_HELPERS)
    unirl.disable()
    assert held() == before
    assert not unirl.enabled()
    unirl.disable()
    assert held() == before


def test_what_runs_is_logged_once(unirl, caplog):
    with caplog.at_level(logging.INFO, "flowdppo_ops"):
        unirl.enable()
        unirl.disable()
        unirl.enable()
        unirl.FlowSDEStrategy()
        unirl.FlowSDEStrategy()
        unirl.FlowDPPO(params=None, stage=object(), strict=False)
    assert caplog.messages == [
        "flowdppo_ops: UniRL runs fused, strict=True (4 replaced)",
        "flowdppo_ops: UniRL's FlowSDEStrategy runs fused",
        "flowdppo_ops: UniRL's FlowDPPO runs fused, strict=False",
    ]


def test_metrics_are_in_unirls_order(unirl):
    unirl.enable()
    ratio = ["ratio_mean", "ratio_std", "ratio_min", "ratio_max"]
    clip = [*ratio, "clip_fraction", "clipfrac_gt_one", "clipfrac_lt_one", "approx_kl"]
    assert list(trainer("algorithms.base")._grpo_clip_loss(**_ROWS, clip_range=0.1)[1]) == clip
    kl = ["approx_kl", "kl_new_old_mean", "kl_new_old_max", "kl_mask_fraction"]
    removed = ["pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction"]
    assert list(trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss(**_KL)[1]) == [*ratio, *kl, *removed]


def test_extremes_over_micro_batches(unirl):
    """Means of minima and maxima are UniRL's; strict=False takes the least and the largest."""
    micros = [
        {"ratio_min": 0.5, "ratio_max": 2.0, "ratio_mean": 1.0, "kl_new_old_max": 1.0},
        {"ratio_min": 0.9, "ratio_max": 4.0, "ratio_mean": 2.0, "kl_new_old_max": math.nan},
        {"ratio_max": 3.0, "kl_new_old_max": 7.0},
    ]
    unirl.enable(strict=False)
    merged = trainer("train.stack").aggregate_numeric_metrics(micros)
    assert math.isnan(merged.pop("kl_new_old_max"))
    assert merged == {"ratio_min": 0.5, "ratio_max": 4.0, "ratio_mean": 1.5}
    assert trainer("train.stack").aggregate_numeric_metrics([]) == {}
    unirl.enable(strict=True)
    assert trainer("train.stack").aggregate_numeric_metrics(micros)["ratio_max"] == 3.0


def test_another_surface_is_refused(standin):
    flowdppo, before = trainer("algorithms.flowdppo"), held()
    trainer("algorithms.grpo")._grpo_clip_loss = lambda *, new_logp, old_logp, advantages, clip: None
    with pytest.raises(Incompatible, match=r"_grpo_clip_loss is \(new_logp, old_logp, advantages, clip\).*1a7b501e"):
        standin.enable()
    assert flowdppo._flowdppo_kl_adv_loss is before["algorithms.flowdppo", "_flowdppo_kl_adv_loss"]
    assert not standin.enabled()
    del flowdppo._flowdppo_kl_adv_loss
    with pytest.raises(Incompatible, match="_flowdppo_kl_adv_loss is absent"):
        standin.enable()
    del trainer("algorithms.base").typed_conditions
    with pytest.raises(Incompatible, match=r"base\.typed_conditions is absent"):
        _ = standin.FlowGRPO
    trainer("sde.kernels").StepStrategy.denoise, own = lambda self, sample: None, standin_unirl.StepStrategy.denoise
    try:
        with pytest.raises(Incompatible, match=r"FlowSDEStrategy\.denoise is \(self, sample\)"):
            _ = standin.FlowSDEStrategy
    finally:
        standin_unirl.StepStrategy.denoise = own


@pytest.mark.parametrize(("module", "name"), [("flowdppo", "FlowDPPO"), ("flowgrpo", "FlowGRPO")])
def test_a_keyword_of_a_later_unirl_is_refused(standin, module, name):
    """It would be accepted and have no effect."""
    own = getattr(trainer(f"algorithms.{module}"), name)
    later = [*inspect.signature(own).parameters.values()]
    later.append(inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.0))
    made = type(name, (own,), {"__signature__": inspect.Signature(later)})
    setattr(trainer(f"algorithms.{module}"), name, made)
    with pytest.raises(Incompatible, match=f"UniRL's {name} is a class that takes gamma, wanted one that does not"):
        getattr(standin, name)


def test_without_unirl(standin, monkeypatch):
    for name in unirl_modules():
        monkeypatch.setitem(sys.modules, name, None)
    assert "FlowDPPO" in dir(standin)
    for use in (standin.enable, lambda: standin.FlowDPPO, lambda: standin.CPSSDEStrategy):
        with pytest.raises(Incompatible, match=r"module unirl\S* is not importable"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = standin.Nothing


# ---- UniRL itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 2, 5, 5), (1, 1, 4, 3, 3), (4, 1, 2, 3, 4, 4)], ids=["image", "one", "video"])
def test_helpers_agree_with_unirls(real, shape, dtype):
    """Drawn around the threshold and the clip range; the mask is exactly UniRL's for means that it does not round."""
    flowdppo, base = trainer("algorithms.flowdppo"), trainer("algorithms.base")
    own = flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss
    real.enable(strict=True)
    fused = flowdppo._flowdppo_kl_adv_loss, base._grpo_clip_loss
    wide = dtype if dtype == torch.float64 else torch.float32
    for seed in range(20):
        torch.manual_seed(seed)
        old_means = torch.randn(shape, dtype=wide)
        rows = {name: torch.randn(shape[:2], dtype=wide) / 100 for name in ("new_logp", "old_logp", "advantages")}
        means = {
            "new_means": (old_means + 0.05 * torch.randn(shape, dtype=wide)).to(dtype),
            "old_means": old_means.to(dtype),
        }
        sigma_t = torch.linspace(0.5, 1.5, shape[1]).reshape(1, -1, 1, 1, 1)
        calls = (rows | means | {"sigma_t": sigma_t, "kl_mask_threshold": 1.5e-3}, rows | {"clip_range": 0.01})
        for call, theirs, ours in zip(calls, own, fused, strict=True):
            results = []
            for helper in (theirs, ours):
                leaf = rows["new_logp"].clone().requires_grad_()
                per_element, metrics = helper(**call | {"new_logp": leaf})
                gradient = torch.autograd.grad(per_element.sum(), leaf)[0]
                results.append((per_element, gradient, {name: value.item() for name, value in metrics.items()}))
            (loss, gradient, metrics), (mine, my_gradient, my_metrics) = results
            near = 1e-12 if dtype == torch.float64 else 1e-6
            # Half-precision means: a KL is as far from UniRL's as a square in half precision.
            near_kl = near if dtype == wide else 2 * torch.finfo(dtype).eps
            assert torch.allclose(mine, loss, rtol=near, atol=0)
            assert torch.allclose(my_gradient, gradient, rtol=near, atol=0)
            assert list(my_metrics) == list(metrics)
            for name, value in metrics.items():
                rounding = near_kl if name.startswith("kl_new_old") else 1e-4 if name == "ratio_std" else 10 * near
                share = 1e-7 if "frac" in name else 1e-9  # UniRL's shares are float32 always
                assert my_metrics[name] == pytest.approx(value, rel=rounding, abs=share), name
    assert real.fallbacks() == {}


@pytest.mark.parametrize("shape", [(4, 3, 11, 6), (2, 3, 4, 2, 5, 5)], ids=["token", "video"])
def test_trajectories_that_unirl_cannot_take(real, shape):
    flowdppo = trainer("algorithms.flowdppo")
    rows = {name: torch.zeros(shape[:2]) for name in ("new_logp", "old_logp", "advantages")}
    call = rows | {"new_means": torch.ones(shape), "old_means": torch.zeros(shape), "kl_mask_threshold": 1e-5}
    call["sigma_t"] = torch.ones(1, shape[1], 1, 1, 1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        flowdppo._flowdppo_kl_adv_loss(**call)
    real.enable(strict=True)
    assert flowdppo._flowdppo_kl_adv_loss(**call)[1]["kl_new_old_mean"].item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eta", [0.7, 1e-7, 1e-8, 0.0])
@pytest.mark.parametrize("name", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
def test_strategies_draw_what_unirls_draw(real, name, eta, dtype):
    fused, own = getattr(real, name)(), getattr(trainer("sde.kernels"), name)()
    noise_pred, sample = torch.randn(2, 3, 4, 5, 5).to(dtype)
    for sigma, sigma_next in ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        drawn = []
        for strategy in (own, fused):
            torch.manual_seed(11)
            schedule = {"eta": eta, "sigma_max": torch.tensor(0.9)}
            step = strategy.denoise(noise_pred, sample, torch.tensor(sigma), torch.tensor(sigma_next), **schedule)
            drawn.append((step, torch.randn(2)))
        ((prev_sample, log_prob, mean), after), ((my_sample, my_log_prob, my_mean), my_after) = drawn
        assert torch.equal(my_after, after)
        ulp = torch.finfo(dtype if eta >= 1e-7 else torch.float32).eps
        assert torch.allclose(my_mean, mean, rtol=0, atol=1e-5)
        assert torch.allclose(my_sample, prev_sample, rtol=ulp, atol=1e-5)
        assert [t.dtype for t in (my_sample, my_mean)] == [t.dtype for t in (prev_sample, mean)]
        assert (my_log_prob is None) == (log_prob is None) == (eta < 1e-7)
        if eta == 0.7:
            assert torch.allclose(my_log_prob, log_prob, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert real.fallbacks() == {}


class Transformer(torch.nn.Module):
    """In the place of SD3's: a velocity with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, hidden_states, encoder_hidden_states, timestep, pooled_projections, return_dict):
        velocity = self.weight * hidden_states * (timestep / 1000).reshape(-1, 1, 1, 1).to(hidden_states.dtype)
        return (velocity + encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1).to(hidden_states.dtype),)


class Backend:
    """In the place of FSDPBackend: one process."""

    grad_sync_deferred = False
    scheduler = None

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(module.parameters(), lr=0.02)

    def trainable_module(self):
        return self.module

    def zero_grad(self):
        self.optimizer.zero_grad()

    def set_grad_sync(self, last):
        pass

    def optimizer_step(self, max_grad_norm):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_grad_norm)
        self.optimizer.step()
        return norm

    def on_rollout_end(self):
        pass


def train(real: Any, fused: bool, kind: str, strategy: str, precision: str, source: str):
    """A rollout and two optimizer steps of two micro-batches each, through UniRL's stage, segment and TrainStack."""
    for name in ("models.sd3.diffusion", "types.rollout_resp", "types.conditions.text", "types.sampling"):
        importlib.import_module(f"unirl.{name}")
    diffusion, stack = trainer("models.sd3.diffusion"), trainer("train.stack")
    text, rollout = trainer("types.conditions.text"), trainer("types.rollout_resp")
    torch.manual_seed(13)
    transformer = Transformer()
    strategies = real if fused else trainer("sde.kernels")
    stage = diffusion.SD3DiffusionStage(
        model=SimpleNamespace(transformer=transformer, device="cpu"),
        step=diffusion.SD3DiffusionStep(),
        strategy=getattr(strategies, strategy)(),
        trajectory_precision=precision,
        latent_channels=4,
    )
    params = trainer("types.sampling").DiffusionSamplingParams(
        num_inference_steps=10, guidance_scale=1.0, height=64, width=64, eta=0.7, sde_indices=[0, 1, 4], seed=17
    )
    condition = text.TextEmbedCondition(embeds=torch.randn(8, 3, 4), pooled=torch.randn(8, 4))
    linear = torch.linspace(1, 0, 11)
    schedule = 3 * linear / (1 + 2 * linear)
    segment = stage.diffuse(SimpleNamespace(text=condition, negative_text=None), schedule=schedule, params=params)
    algorithms = real if fused else trainer(f"algorithms.{kind.lower()}")
    conditions_cls = importlib.import_module("unirl.models.sd3.conditions").SD3Conditions
    own = {"kl_mask_threshold": 1e-6} if kind == "FlowDPPO" else {}
    algorithm = getattr(algorithms, kind)(
        **own,
        params=params,
        pipeline=SimpleNamespace(diffusion=stage),
        old_logp_source=source,
        conditions_cls=conditions_cls,
    )
    track = rollout.RolloutTrack(
        sample_ids=[str(i) for i in range(8)],
        conditions={"text": condition},
        segment=segment,
        advantages=torch.linspace(-1, 1.2, 8),
    )
    trainer_stack = stack.TrainStack(
        fsdp_backend=Backend(transformer),
        algorithm=algorithm,
        micro_batch_size=2,
        max_grad_norm=1.0,
        num_updates_per_batch=2,
    )
    return trainer_stack.train_track(track, training_progress=0.2), transformer.weight.item(), track.segment


@pytest.mark.parametrize("source", ["rollout", "replay"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy"])
@pytest.mark.parametrize("kind", ["FlowDPPO", "FlowGRPO"])
def test_training_is_unirls(real, kind, strategy, precision, source):
    """Rollout, anchors, losses, metrics and the weight after two optimizer steps, UniRL's and ours side by side."""
    theirs, weight, segment = train(real, False, kind, strategy, precision, source)
    ours, my_weight, my_segment = train(real, True, kind, strategy, precision, source)
    stored = torch.finfo({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps
    assert my_segment.latents.dtype == segment.latents.dtype
    assert torch.allclose(my_segment.latents.float(), segment.latents.float(), rtol=stored, atol=max(4 * stored, 1e-5))
    assert my_segment.sde_logp.dtype == segment.sde_logp.dtype
    assert torch.allclose(my_segment.sde_logp, segment.sde_logp, rtol=stored, atol=max(4 * stored, 1e-5))
    assert (my_segment.sde_means is None) == (segment.sde_means is None) == (kind == "FlowGRPO")
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert my_weight == pytest.approx(weight, rel=4 * stored)
    assert my_weight != pytest.approx(0.3, rel=1e-3)
    # A latent that is stored as its neighbour is another rollout: half precision is compared by its order alone.
    near = 1e-3 if precision == "fp32" else 0.2
    for name in ("loss", "grad_norm"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=near, abs=1e-4), name
    if precision == "fp32":
        for name, value in theirs.metrics.items():
            assert ours.metrics[name] == pytest.approx(value, rel=near, abs=1e-12), name
        assert kind == "FlowGRPO" or 0 < theirs.metrics["masked_fraction"] < 0.5
    assert real.fallbacks() == {}


def test_hydra_finds_the_classes(real):
    utils = pytest.importorskip("hydra.utils")
    assert utils.get_class(f"{INTEGRATION}.FlowDPPO") is real.FlowDPPO
    built = utils.instantiate({"_target_": f"{INTEGRATION}.CPSSDEStrategy"})
    assert (type(built), built.canonical_name) == (real.CPSSDEStrategy, "cps")
