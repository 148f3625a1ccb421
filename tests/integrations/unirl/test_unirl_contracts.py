"""What UniRL's trainer relies on: signatures, algorithms, sampling."""

from __future__ import annotations

import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from trainers import unirl as standin_unirl
from unirl_modules import INTEGRATION, described, trainer, training_step

from flowdppo_ops import PolicyLoss, reference


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
