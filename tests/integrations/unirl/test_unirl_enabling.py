"""What goes to UniRL's own functions, and what `enable()` replaces."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from typing import Any

import pytest
import torch
from trainers import unirl as standin_unirl
from unirl_modules import KL, MEANS, ROWS, trainer, unirl_modules

from flowdppo_ops.integrations import Incompatible


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({name: value.bfloat16() for name, value in ROWS.items()}, "log-probs of torch.bfloat16 on cpu"),
        ({"advantages": torch.ones(4, 1)}, "log-probs and advantages of different shape, dtype or device"),
        ({"old_logp": torch.zeros(4, 3).double()}, "log-probs and advantages of different shape, dtype or device"),
        ({name: value[:0] for name, value in (ROWS | MEANS).items()}, "no rows"),
        ({name: value.to("meta") for name, value in ROWS.items()}, "log-probs on meta"),
        (
            {"old_means": torch.zeros(4, 3, 2, 5, 1)},
            "means of shape (4, 3, 2, 5, 5) and (4, 3, 2, 5, 1) for rows (4, 3)",
        ),
        (
            {name: value.double() for name, value in MEANS.items()},
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
    given = KL | change
    own = trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss(**given)
    assert own == standin_unirl.OwnResult("_flowdppo_kl_adv_loss", given)
    if "log-probs" in reason and "means" not in reason:
        rows = {name: given[name] for name in ROWS}
        own = trainer("algorithms.grpo")._grpo_clip_loss(**rows, clip_range=0.2)
        assert own.given == {**rows, "clip_range": 0.2, "clip_range_high": None}
    assert list(standin.fallbacks()) == [reason]


def test_negative_clip_range_is_unirls(standin):
    standin.enable()
    assert trainer("algorithms.base")._grpo_clip_loss(**ROWS, clip_range=-0.1).name == "_grpo_clip_loss"
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
    assert list(trainer("algorithms.base")._grpo_clip_loss(**ROWS, clip_range=0.1)[1]) == clip
    kl = ["approx_kl", "kl_new_old_mean", "kl_new_old_max", "kl_mask_fraction"]
    removed = ["pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction"]
    assert list(trainer("algorithms.flowdppo")._flowdppo_kl_adv_loss(**KL)[1]) == [*ratio, *kl, *removed]


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


@pytest.mark.parametrize(
    ("module", "name"),
    [("algorithms.flowdppo", "FlowDPPO"), ("algorithms.flowgrpo", "FlowGRPO"), ("sde.kernels", "FlowSDEStrategy")],
)
def test_a_keyword_of_a_later_unirl_is_refused(june_or_september, module, name):
    """It would be accepted and have no effect."""
    own = getattr(trainer(module), name)
    later = [p for p in inspect.signature(own).parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    later.append(inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.0))
    setattr(trainer(module), name, type(name, (own,), {"__signature__": inspect.Signature(later)}))
    with pytest.raises(Incompatible, match=f"UniRL's {name} is a class that takes gamma, wanted one that does not"):
        getattr(june_or_september, name)


def test_without_unirl(standin, monkeypatch):
    for name in unirl_modules():
        monkeypatch.setitem(sys.modules, name, None)
    assert "FlowDPPO" in dir(standin)
    for use in (standin.enable, lambda: standin.FlowDPPO, lambda: standin.CPSSDEStrategy):
        with pytest.raises(Incompatible, match=r"module unirl\S* is not importable"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = standin.Nothing
