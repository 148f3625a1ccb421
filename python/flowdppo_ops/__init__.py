"""Fused policy losses and sampler steps for flow-matching RL: Flow-DPPO, Flow-GRPO and GRPO-Guard.

Importing this package imports neither PyTorch nor CUDA. The functions that take tensors import PyTorch when they are
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._native import __version__
from ._registration import register_operators
from .objectives import FlowDPPO, FlowGRPO, GRPOGuard

if TYPE_CHECKING:
    from . import numpy, reference
    from ._doctor import doctor
    from ._sde_step import SdeStep, encode_residual, sde_step
    from .advantages import group_advantages
    from .policy_loss import loss, step_loss
    from .result import PolicyLoss

__all__ = [
    "FlowDPPO",
    "FlowGRPO",
    "GRPOGuard",
    "PolicyLoss",
    "SdeStep",
    "__version__",
    "doctor",
    "encode_residual",
    "group_advantages",
    "loss",
    "numpy",
    "reference",
    "sde_step",
    "step_loss",
]

# Names that are imported when they are first used -> the modules that hold them. A name equal to that of its module is
# the module itself.
_LAZY = {
    "PolicyLoss": "result",
    "SdeStep": "_sde_step",
    "doctor": "_doctor",
    "encode_residual": "_sde_step",
    "group_advantages": "advantages",
    "loss": "policy_loss",
    "numpy": "numpy",
    "reference": "reference",
    "sde_step": "_sde_step",
    "step_loss": "policy_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_LAZY[name]}", __name__)
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_operators()
