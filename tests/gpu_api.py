"""The public functions on a GPU for arguments on the CPU, where the suite compares; gradients go back the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flowdppo_ops
from flowdppo_ops import PolicyLoss, SdeStep
from flowdppo_ops._checks import Call
from flowdppo_ops._operators.common import as_tensors
from flowdppo_ops._operators.policy_loss import FIELDS

DEVICE = "cuda"


def moved(arguments: dict[str, Any], device: str | None = None) -> dict[str, Any]:
    """`device`: by default `DEVICE`."""
    return {name: v.to(device or DEVICE) if isinstance(v, Tensor) else v for name, v in arguments.items()}


def loss(**arguments: Any) -> PolicyLoss:
    return brought_back(flowdppo_ops.loss(**moved(arguments)))


def step_loss(**arguments: Any) -> PolicyLoss:
    return brought_back(flowdppo_ops.step_loss(**moved(arguments)))


def sde_step(**arguments: Any) -> SdeStep:
    result = flowdppo_ops.sde_step(**moved(arguments))
    assert result.log_prob.device.type == DEVICE
    return SdeStep(*(None if t is None else t.cpu() for t in result))


def brought_back(result: PolicyLoss) -> PolicyLoss:
    assert result.loss.device.type == DEVICE
    return PolicyLoss(result.loss.cpu(), result._numbers.cpu(), result._layout)


def operator_arguments(call: Call) -> dict[str, Any]:
    """A checked call of a loss as the registered operator takes it."""
    fields = as_tensors(call.fields, call.fields["advantages"])
    return dict.fromkeys(FIELDS) | fields | call.settings | {"shard_sums": None}


def requested_bytes(which: str = "current") -> int:
    """What PyTorch's allocator has been asked for: "current", or the "peak" since it was reset. Its `memory_allocated`
    counts blocks, which are up to 1 MiB longer: 1.6 % of 64 MB."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]
