"""Seconds spent in the loss, measured on recorded calls of a real run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from ..result import PolicyLoss

Loss = Callable[..., PolicyLoss]
Call = tuple[Tensor, dict[str, Any]]  # what gets the gradient, and the rest of the arguments

ROUNDS = 5


def seconds_per_call(losses: dict[str, Loss], calls: Sequence[Call]) -> dict[str, float]:
    """Forward and backward of every recorded call through every loss: median over rounds, mean over calls.

    The losses take turns on each call, so that a busy moment of the machine hits both. The first round warms up
    and does not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in losses}
    for of_policy, arguments in calls:
        rounds: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(1 + ROUNDS):
            for name, loss in losses.items():
                rounds[name].append(_forward_backward(loss, of_policy, arguments))
        for name, seconds in rounds.items():
            taken[name].append(median(seconds[1:]))
    return {name: mean(seconds) for name, seconds in taken.items()}


def _forward_backward(loss: Loss, of_policy: Tensor, arguments: dict[str, Any]) -> float:
    leaf = of_policy.clone().requires_grad_()
    _wait(leaf)
    start = time.perf_counter()
    loss(leaf, **arguments).loss.backward()
    _wait(leaf)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
