"""The integration on a stand-in for verl-omni, or on the trainer itself (see test_verl_omni_itself.py)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
from trainers import verl_omni as trainer


@pytest.fixture
def modules(monkeypatch):
    """The trainer's modules, and `.ours`, the integration, which is not enabled."""
    monkeypatch.delenv("FLOWDPPO_OPS_STRICT", raising=False)
    with trainer.loaded() as found:
        ours = importlib.import_module("flowdppo_ops.integrations.verl_omni")
        ours.disable()
        ours._patch.fallbacks.clear()
        scheduler = found.schedulers.FlowMatchSDEDiscreteScheduler
        yield SimpleNamespace(
            **vars(found), ours=ours, registry=found.algos.DIFFUSION_LOSS_REGISTRY, scheduler=scheduler
        )
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
