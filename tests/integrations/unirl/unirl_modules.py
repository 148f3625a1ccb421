"""UniRL's modules, and a training step on them: a stand-in (trainers/unirl.py), and once more UniRL itself where
FLOWDPPO_OPS_UNIRL gives the path of its sources and they can be imported."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainers import unirl as standin_unirl

SOURCES = "FLOWDPPO_OPS_UNIRL"
INTEGRATION = "flowdppo_ops.integrations.unirl"
_NEEDED = (
    *("algorithms.flowdppo", "algorithms.flowgrpo", "algorithms.grpo", "sde.kernels", "utils.misc"),
    *("train.stack", "train.unified_model_stack"),
)

both = pytest.mark.parametrize("strict", [True, False], ids=["strict", "fixed"])


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


def described(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


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


ROWS = {"new_logp": torch.zeros(4, 3), "old_logp": torch.zeros(4, 3), "advantages": torch.ones(4, 3)}
MEANS = {"new_means": torch.zeros(4, 3, 2, 5, 5), "old_means": torch.zeros(4, 3, 2, 5, 5)}
KL = {**ROWS, **MEANS, "sigma_t": torch.ones(1, 3, 1, 1, 1), "kl_mask_threshold": 1e-5}
