"""The objectives as values: defaults, equality, immutability. What they refuse is in test_errors.py."""

from __future__ import annotations

import dataclasses
import math

import pytest

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
