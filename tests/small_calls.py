"""Small calls of the three functions, by one name each, for tests that ask the same of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OBJECTIVES, draw
from parity import leaves, upstream_of
from sde_step_cases import draw as draw_sde_step
from step_cases import STEP_OBJECTIVES, draw_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowdppo_ops

# "log_prob" is `loss` with a log-prob of its own, which then gets the gradient.
KINDS = ("loss", "log_prob", "step_loss", "sde_step")
LOSSES = KINDS[:3]

# (rows, latents). The forward on the CPU may form the gradient of a batch along with the loss; few long rows are left
# to the backward.
MANY_SHORT_ROWS = ((12,), (5, 8))
FEW_LONG_ROWS = ((3,), (40_001,))


def function_of(kind: str, api: Any = flowdppo_ops) -> Any:
    return getattr(api, "loss" if kind == "log_prob" else kind)


def small_call(
    kind: str,
    row_shape: tuple[int, ...] = (12,),
    latent_shape: tuple[int, ...] = (5, 8),
    *,
    dtype: torch.dtype = torch.float32,
    everything: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of a call. everything: with every tensor that the function can read."""
    dtypes = {"*": dtype}
    if kind == "sde_step":
        return draw_sde_step((*row_shape, *latent_shape), len(row_shape), guidance=True, replay=True, dtypes=dtypes)
    if kind == "step_loss":
        if everything:
            options = {"objective": STEP_OBJECTIVES["guard"], "ref_form": "output", **options}
            options |= {"old_log_prob": True, "weights": True}
        return draw_step(row_shape, latent_shape, old_form="residual", guidance=True, dtypes=dtypes, **options)
    if everything:
        options = {"objective": OBJECTIVES["guard"], "ref_kl_weight": 0.5, "weights": True, **options}
    source = "log_prob" if kind == "log_prob" else "sample and old" if everything else "sample"
    return draw(row_shape, latent_shape, source=source, dtypes=dtypes, **options)


def results_of(kind: str, arguments: dict[str, Any], api: Any = flowdppo_ops) -> list[Tensor]:
    """What is differentiable of the result."""
    result = function_of(kind, api)(**arguments)
    return [result.log_prob, result.prev_sample_mean] if kind == "sde_step" else [result.loss]


class ThroughTheDispatcher(TorchDispatchMode):
    """Sees every operator, as tracing and logging modes do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def refuses(name: str, function, *args, error=(ValueError, TypeError), **kwargs) -> str:
    """Asserts an error that names the argument as a word of its own; returns the message."""
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        function(*args, **kwargs)
    assert isinstance(caught.value, (ValueError, TypeError))
    return str(caught.value)


# ---- their gradients -------------------------------------------------------------------------------------------------

DIRECT, DISPATCHED = "called directly", "through the dispatcher"
roads = pytest.mark.parametrize("road", [DIRECT, DISPATCHED])


def going(road: str):
    return ThroughTheDispatcher() if road == DISPATCHED else contextlib.nullcontext()


def with_leaves(arguments: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves of its own for what gets a gradient, and the arguments with them."""
    fresh = {name: arguments[name].detach().requires_grad_() for name in leaves(arguments)}
    return list(fresh.values()), arguments | fresh


def gradients(
    kind: str, arguments: dict[str, Any], upstream: Callable[[Tensor], Tensor] = upstream_of
) -> tuple[Tensor, ...]:
    """Of all leaves. upstream: makes the upstream gradient of a result."""
    inputs, arguments = with_leaves(arguments)
    results = results_of(kind, arguments)
    return torch.autograd.grad(results, inputs, [upstream(result) for result in results])


def assert_equal(mine: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        assert torch.equal(a, b), f"gradient {index}: {a} is not {b}"
        assert torch.isfinite(a).all()
        assert a.abs().sum() > 0, f"gradient {index} is 0, which proves nothing"


class Subclass(torch.Tensor):
    """As parameters of quantised and sharded models are."""
