"""UniRL's surface since September 2026: a reference penalty, the transition's sigma, generators.

On a stand-in (trainers/unirl.py), against the formulas in float64.
"""

from __future__ import annotations

import inspect
import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainers import unirl as standin_unirl
from unirl_modules import both, described, trainer

from flowdppo_ops import reference
from flowdppo_ops.integrations import Incompatible

STRATEGIES = ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy")
SHAPES = {"image": (4, 3, 2, 5, 5), "token": (4, 3, 11, 6), "video": (2, 3, 3, 2, 5, 5)}
SIGMAS = torch.linspace(1, 0, 11) ** 0.7
STEPS = [0, 1, 4]
ETA, BETA = 0.7, 0.04

algorithms = pytest.mark.parametrize("kind", ["FlowDPPO", "FlowGRPO"])
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture
def unirl(september):
    return september


def training_step(unirl: Any, kind: str, strategy: str = "FlowSDEStrategy", shape=SHAPES["image"], **arguments: Any):
    """An algorithm, its call, and the leaf that its stage computes from; the reference has another model output."""
    torch.manual_seed(3)
    noise_pred, sample, drift, other = torch.randn(4, *shape)
    strategy, params = getattr(unirl, strategy)(), SimpleNamespace(eta=ETA)
    segment = standin_unirl.Segment(SIGMAS, torch.tensor(STEPS))
    with torch.no_grad():
        drawn = [
            strategy.denoise(noise_pred[:, k], sample[:, k], SIGMAS[s], SIGMAS[s + 1], eta=ETA, sigma_max=SIGMAS[1])
            for k, s in enumerate(STEPS)
        ]
    prev_sample, segment.sde_logp, segment.sde_means = (torch.stack(each, 1) for each in zip(*drawn, strict=True))
    leaf = (noise_pred + 0.01 * drift).requires_grad_()
    stage, ref = (
        standin_unirl.Stage(strategy, (output, sample, prev_sample)) for output in (leaf, noise_pred + 0.3 * other)
    )
    algorithm = getattr(unirl, kind)(params=params, stage=stage, backend=ref, **arguments)
    call = {"conditions": {}, "segment": segment, "advantages": torch.randn(shape[0]), "training_progress": 0.5}
    return algorithm, call | {"loss_scale": 0.25}, leaf


def std_of(algorithm: Any) -> Tensor:
    """`[1, S]` float64."""
    sampler = {"flow": "flow_sde", "cps": "cps", "dance": "dance_sde"}[algorithm.stage.strategy.canonical_name]
    sigmas = SIGMAS.double()
    now, following = sigmas[STEPS], sigmas[[step + 1 for step in STEPS]]
    return reference.transition(sampler, now, following, torch.tensor(ETA).double(), sigmas[1])[2][None]


def truth_of(algorithm: Any, call: dict[str, Any], leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, reference KL, and the gradient of the scaled loss. Gives the algorithm a limit that some of its rows
    are beyond."""
    segment, given = call["segment"], {"params": algorithm.params, "step_indices": STEPS}
    replay = algorithm.stage.replay({}, segment=segment, **given)
    ref = algorithm._ref_model.replay({}, segment=segment, **given).prev_sample_means.double()
    means, log_prob = replay.prev_sample_means.double(), replay.log_probs.double()
    std, ratio = std_of(algorithm), torch.exp(log_prob - segment.sde_logp.double())
    advantages = call["advantages"].double()[:, None]
    kl = ((means - segment.sde_means.double()) ** 2).flatten(2).mean(2) / (2 * std**2)
    is_clipped = hasattr(algorithm, "clip_range")
    distance = ((ratio - 1).abs() if is_clipped else kl).detach()
    away = distance[(ratio - 1) * advantages > 0].sort().values
    limit = away[len(away) // 2 - 1 : len(away) // 2 + 1].mean().item()
    if is_clipped:
        algorithm.clip_range = limit
        rows = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - limit, 1 + limit))
    else:
        algorithm.kl_mask_threshold = limit
        rows = torch.where((kl >= limit) & ((ratio - 1) * advantages > 0), 0.0, -advantages * ratio)
    kl_ref = (((means - ref) ** 2).flatten(2).mean(2) / (2 * std**2)).mean()
    gradient = torch.autograd.grad((rows.mean() + BETA * kl_ref) * call["loss_scale"], leaf)[0]
    return rows.mean(), kl_ref, gradient


@both
@strategies
@algorithms
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_penalty(unirl, kind, strategy, shape, strict):
    algorithm, call, leaf = training_step(unirl, kind, strategy, shape, beta=BETA, strict=strict)
    policy, kl_ref, gradient = truth_of(algorithm, call, leaf)
    result = algorithm.compute_loss_and_backward(**call)
    metrics = result.metrics
    assert metrics["beta"] == BETA
    assert metrics["kl_ref_mean"] == pytest.approx(kl_ref.item(), rel=1e-5)
    assert metrics["policy_loss"] == pytest.approx(policy.item(), rel=1e-5)
    assert result.loss == pytest.approx((policy + BETA * kl_ref).item(), rel=1e-5)
    assert list(metrics)[:2] == ["policy_loss", "kl_mask_threshold" if kind == "FlowDPPO" else "clip_range"]
    assert list(metrics)[-2:] == ["beta", "kl_ref_mean"]
    assert all(type(value) is float for value in metrics.values())
    assert (leaf.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()
    assert unirl.fallbacks() == {}


def test_penalty_before_sigmas_had_a_rank(unirl, monkeypatch):
    """Between June and September UniRL had `beta`, and sigmas of rank 5 for means of any rank."""
    base = trainer("algorithms.base")
    monkeypatch.setattr(base, "_transition_sigma", partial(_sigma_of_rank_5, base._transition_sigma))
    algorithm, call, leaf = training_step(unirl, "FlowGRPO", shape=SHAPES["token"], beta=BETA)
    policy, kl_ref, _ = truth_of(algorithm, call, leaf)
    result = algorithm.compute_loss_and_backward(**call)
    assert result.metrics["kl_ref_mean"] == pytest.approx(kl_ref.item(), rel=1e-5)
    assert result.loss == pytest.approx((policy + BETA * kl_ref).item(), rel=1e-5)


def _sigma_of_rank_5(septembers, stage, *, segment, target_steps, eta, device, add_coefficient=True):
    given = {"segment": segment, "target_steps": target_steps, "eta": eta, "device": device}
    return septembers(stage, **given, add_coefficient=add_coefficient, sample_ndim=5)


@both
def test_penalty_where_nothing_is_random(unirl, strict, monkeypatch):
    """CPS's last step has no KL; UniRL divides by 0 there."""
    monkeypatch.setattr(sys.modules[__name__], "STEPS", [0, 9])
    algorithm, call, leaf = training_step(
        unirl, "FlowGRPO", "CPSSDEStrategy", (4, 2, 2, 5, 5), beta=BETA, strict=strict
    )
    result = algorithm.compute_loss_and_backward(**call)
    assert math.isfinite(result.metrics["kl_ref_mean"]) != strict
    assert math.isfinite(result.metrics["policy_loss"])
    assert leaf.grad.isfinite().all() != strict


@algorithms
def test_no_penalty_without_beta(unirl, kind, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("no reference is replayed")

    monkeypatch.setattr(trainer("algorithms.base"), "_reference_replay_means", never)
    algorithm, call, _ = training_step(unirl, kind)
    result = algorithm.compute_loss_and_backward(**call)
    assert result.loss == result.metrics["policy_loss"]
    assert not {"beta", "kl_ref_mean"} & set(result.metrics)


def test_penalty_beside_unirls_own_loss(unirl, monkeypatch):
    """Where a helper does not serve the rows, the reference KL is UniRL's own function too."""

    def numbers(**given):
        return given["new_logp"] * 2, {"ratio_mean": torch.tensor(1.0)}

    monkeypatch.setattr(trainer("algorithms.base"), "_grpo_clip_loss", numbers)
    algorithm, call, leaf = training_step(unirl, "FlowGRPO", beta=BETA)
    _, kl_ref, _ = truth_of(algorithm, call, leaf)
    algorithm.clip_range = -1e-3
    result = algorithm.compute_loss_and_backward(**call)
    assert unirl.fallbacks() == {"a negative clip range": 1}
    assert result.metrics["kl_ref_mean"] == pytest.approx(kl_ref.item(), rel=1e-5)
    assert result.loss == pytest.approx(result.metrics["policy_loss"] + BETA * kl_ref.item(), rel=1e-5)


@algorithms
def test_a_penalty_needs_means(unirl, kind, monkeypatch):
    algorithm, call, _ = training_step(unirl, kind, beta=BETA)
    replayed = algorithm.stage.replay({}, segment=call["segment"], params=algorithm.params, step_indices=STEPS)
    without = replayed._replace(prev_sample_means=None)
    monkeypatch.setattr(algorithm.stage, "replay", lambda *_args, **_given: without)
    with pytest.raises(RuntimeError, match="prev_sample_means"):
        algorithm.compute_loss_and_backward(**call)


@algorithms
def test_constructors_are_unirls(unirl, kind):
    own, fused = getattr(trainer(f"algorithms.{kind.lower()}"), kind), getattr(unirl, kind)
    assert described(fused) == [*described(own), ("strict", inspect.Parameter.KEYWORD_ONLY, None)]
    assert fused.requires_backend is True
    given = {"params": SimpleNamespace(eta=ETA), "stage": SimpleNamespace(batch_replay_steps=True)}
    with pytest.raises(ValueError, match="beta > 0 needs a backend"):
        fused(**given, beta=0.1, old_logp_source="replay")
    with pytest.raises(ValueError, match="old_logp_source='replay'"):
        fused(**given)


@strategies
@pytest.mark.parametrize("ndim", [3, 5, 6])
def test_sigma_of_the_kl(unirl, strategy, ndim):
    """Strict is UniRL's own, the strategy's, to the bit; fixed differs where nothing is random alone."""
    strategy, segment = getattr(unirl, strategy)(), SimpleNamespace(sigmas=torch.tensor([1.0, 0.8, 0.4, 0.0]))
    given = {"params": SimpleNamespace(eta=ETA), "stage": SimpleNamespace(strategy=strategy)}
    strict, fixed = (
        unirl.FlowDPPO(**given, strict=one)._compute_sigma_t(segment, [0, 1, 2], torch.device("cpu"), sample_ndim=ndim)
        for one in (True, False)
    )
    assert strict.shape == fixed.shape == (1, 3, *(1,) * (ndim - 2))
    sigmas = segment.sigmas
    own = strategy.transition_std(sigma=sigmas[:3], sigma_next=sigmas[1:], eta=ETA, sigma_max=sigmas[1])
    assert torch.equal(strict.flatten(), own)
    assert torch.allclose(fixed.flatten(), torch.where(own == 0, math.inf, own), rtol=1e-6)
    ones = unirl.FlowDPPO(**given, add_kl_coefficient=False)
    assert torch.equal(ones._compute_sigma_t(segment, [0, 2], torch.device("cpu"), ndim).flatten(), torch.ones(2))


@both
def test_enable(unirl, strict):
    own = trainer("algorithms.flowdppo").FlowDPPO
    before = own._compute_sigma_t
    unirl.enable(strict=strict)
    assert (own._compute_sigma_t is before) == strict
    given = {"params": SimpleNamespace(eta=ETA), "stage": SimpleNamespace(strategy=unirl.CPSSDEStrategy())}
    segment = SimpleNamespace(sigmas=torch.tensor([1.0, 0.4, 0.0]))
    sigma = own(**given)._compute_sigma_t(segment, [0, 1], torch.device("cpu"), sample_ndim=4)
    last = 0.0 if strict else math.inf
    assert sigma.flatten().tolist() == pytest.approx([0.4 * math.sin(0.35 * math.pi), last], rel=1e-6)
    unirl.disable()
    assert own._compute_sigma_t is before


# ---- generators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generators", [None, "one", "a list of one", "one per sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generators(unirl, generators, dtype):
    """Draws the noise of diffusers' `randn_tensor`: of a list of one all rows, of a list of many one row each."""
    strategy, shape = unirl.FlowSDEStrategy(), (3, 4, 5)
    noise_pred, sample = torch.randn(2, *shape).to(dtype)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    of_samples = torch.stack([torch.randn(shape[1:], generator=one) for one in seeded(1, 2, 3)])
    torch.manual_seed(5)
    generator, noise = {
        None: (None, torch.randn(shape, generator=seeded(5)[0])),
        "one": (seeded(7)[0], torch.randn(shape, generator=seeded(7)[0])),
        "a list of one": (seeded(7), torch.randn(shape, generator=seeded(7)[0])),
        "one per sample": (seeded(1, 2, 3), of_samples),
    }[generators]
    given = {"eta": ETA, "sigma_max": SIGMAS[1]}
    drawn, log_prob, mean = strategy.denoise(noise_pred, sample, SIGMAS[1], SIGMAS[2], generator=generator, **given)
    std = strategy.transition_std(sigma=SIGMAS[1], sigma_next=SIGMAS[2], **given)
    assert torch.allclose(drawn, mean + std * noise, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=2e-6)
    scored = strategy.denoise(noise_pred, sample, SIGMAS[1], SIGMAS[2], prev_sample=drawn, generator=generator, **given)
    assert torch.equal(scored[1], log_prob)
    assert unirl.fallbacks() == {}


def test_generators_of_another_number(unirl):
    noise_pred, sample = torch.randn(2, 3, 4, 5)
    generators = [torch.Generator() for _ in range(2)]
    with pytest.raises(ValueError, match="generator has 2 generators, wanted one for each of the samples"):
        unirl.FlowSDEStrategy().denoise(noise_pred, sample, SIGMAS[1], SIGMAS[2], generator=generators)


# ---- what a later UniRL may bring ------------------------------------------------------------------------------------


def test_functions_that_a_penalty_needs(unirl):
    del trainer("algorithms.base")._reference_kl_loss
    with pytest.raises(Incompatible, match=r"base\._reference_kl_loss is absent"):
        _ = unirl.FlowDPPO
