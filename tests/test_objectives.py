"""The objectives as values: defaults, equality, immutability. What they refuse is in test_errors.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard


def test_defaults():
    """The published ones; trainers rely on them by not naming them."""
    assert dataclasses.asdict(FlowDPPO()) == {
        "kl_mask_threshold": 1e-5,
        "normalize_kl": True,
        "mask": "asymmetric",
        "nan_kl": "mask",
        "kl_space": "latent",
    }
    assert dataclasses.asdict(FlowGRPO()) == {"clip_range": 1e-4, "adv_clip_max": None}
    assert dataclasses.asdict(GRPOGuard()) == {"clip_range": 2e-6, "adv_clip_max": None, "per_row_scale": False}


@pytest.mark.parametrize("kind", [FlowDPPO, FlowGRPO, GRPOGuard])
def test_value_semantics(kind):
    """Frozen, equal by value and hashable: `torch.compile` guards on them and trainers keep them as defaults."""
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    field = dataclasses.fields(kind)[0].name
    other = dataclasses.replace(kind(), **{field: 0.5})
    assert other != kind()
    assert getattr(other, field) == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(other, field, 0.1)
    assert kind.__name__ in repr(other)


def test_edges_are_allowed():
    assert FlowDPPO(kl_mask_threshold=math.inf).kl_mask_threshold == math.inf
    assert FlowDPPO(kl_mask_threshold=0).kl_mask_threshold == 0
    assert FlowGRPO(clip_range=(0, math.inf)).clip_range == (0, math.inf)
    assert FlowGRPO(adv_clip_max=0.0).adv_clip_max == 0


def test_positional_first_argument():
    assert FlowDPPO(1e-3) == FlowDPPO(kl_mask_threshold=1e-3)
    assert FlowGRPO((0.1, 0.2)) == FlowGRPO(clip_range=(0.1, 0.2))


# ---- the threshold in nats for a whole row ---------------------------------------------------------------------------


def test_per_sample_divides_by_the_latents():
    assert FlowDPPO.per_sample(numel=65_536) == FlowDPPO()  # the published setting
    assert FlowDPPO.per_sample(0.66, numel=256) == FlowDPPO(0.66 / 256)
    assert FlowDPPO.per_sample(math.inf, numel=1).kl_mask_threshold == math.inf
    options = {"mask": "symmetric", "nan_kl": "keep"}
    assert FlowDPPO.per_sample(0, numel=4, **options) == FlowDPPO(0.0, **options)


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "nats is -1, wanted a number >= 0", {"nats": -1, "numel": 4}),
        (ValueError, "nats is nan", {"nats": math.nan, "numel": 4}),
        (TypeError, "nats is a str", {"nats": "1", "numel": 4}),
        (ValueError, "numel is 0, wanted at least 1", {"numel": 0}),
        (TypeError, "numel is a float, wanted a whole number", {"numel": 256.0}),
        (TypeError, "numel is a bool", {"numel": True}),
        (ValueError, "mask is 'all'", {"numel": 4, "mask": "all"}),
    ],
)
def test_per_sample_refuses(error, says, arguments):
    with pytest.raises(error, match=says):
        FlowDPPO.per_sample(**arguments)


def test_per_sample_is_the_threshold_of_the_sum():
    """The same rows are high as with `latent_reduction="sum"`, where the threshold is in nats for the row anyway."""
    generator = torch.Generator().manual_seed(0)
    old, drift, noise = torch.randn(3, 64, 256, generator=generator)
    mean = old + torch.linspace(0, 0.03, 64)[:, None] * drift
    rest = {"advantages": torch.ones(64), "std": 0.3, "prev_sample": old + 0.3 * noise}
    rest["old_log_prob"] = torch.full((64,), -10.0)  # every ratio above 1
    mean_kl = flowdppo_ops.loss(mean, old, objective=FlowDPPO.per_sample(0.5, numel=256), **rest)
    sum_kl = flowdppo_ops.loss(mean, old, objective=FlowDPPO(0.5), latent_reduction="sum", **rest)
    assert 0 < mean_kl.keep.sum() < 64
    assert torch.equal(mean_kl.keep, sum_kl.kl < 0.5)


def test_width_of_the_log_ratio_at_a_kl():
    """Under the old policy: mean -k and standard deviation sqrt(2 k / N); hence `N c^2 / 2` for a clip range c."""
    rows, numel, std, clip = 4096, 64, 0.3, 1e-2
    generator = torch.Generator().manual_seed(0)
    old, noise = torch.randn(2, rows, numel, dtype=torch.float64, generator=generator)
    kl = numel * clip**2 / 2
    drift = std * math.sqrt(2 * kl)
    result = flowdppo_ops.loss(old + drift, old, torch.ones(rows), std=std, prev_sample=old + std * noise)
    assert result.kl.mean().item() == pytest.approx(kl)
    log_ratio = result.log_ratio
    assert log_ratio.mean().item() == pytest.approx(-kl, abs=4 * clip / math.sqrt(rows))
    assert log_ratio.std().item() == pytest.approx(clip, rel=4 / math.sqrt(2 * rows))


def test_per_sample_in_a_compiled_graph():
    """Of the shapes in the graph, also where they are symbolic."""

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def high(mean, old):
        objective = FlowDPPO.per_sample(0.5, numel=mean[0].numel())
        rows = mean.shape[0]
        return flowdppo_ops.loss(
            mean, old, torch.ones(rows), std=0.3, prev_sample=old, old_log_prob=torch.ones(rows), objective=objective
        ).kl

    assert high(torch.ones(2, 8), torch.ones(2, 8)).tolist() == [0, 0]
    assert high(torch.ones(3, 9), torch.ones(3, 9)).tolist() == [0, 0, 0]
