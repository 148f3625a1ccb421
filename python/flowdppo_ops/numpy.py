"""`flowdppo_ops.loss` for NumPy arrays: loss and gradient in one call, without PyTorch."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

import numpy as np

from . import _checks, _native
from .objectives import FlowDPPO, Objective

__all__ = ["loss"]

_FAMILY = _checks.Family(
    type=np.ndarray,
    name="numpy.ndarray",
    dtypes={np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.float64): "float64"},
    float64=np.dtype(np.float64),
    layout=None,
    has_devices=False,
    expand=np.broadcast_to,
)

RowVector = float | np.ndarray


def loss(
    prev_sample_mean: np.ndarray | None,
    old_prev_sample_mean: np.ndarray | None,
    advantages: np.ndarray,
    *,
    std: RowVector | None = None,
    sqrt_dt: RowVector | None = None,
    prev_sample: np.ndarray | None = None,
    log_prob: np.ndarray | None = None,
    old_log_prob: np.ndarray | None = None,
    weights: RowVector | None = None,
    ref_prev_sample_mean: np.ndarray | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: RowVector | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    density: str = "gaussian",
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: None = None,
    threads: int | None = None,
) -> tuple[Any, Any]:
    """`flowdppo_ops.loss` on NumPy arrays (float32, float16 or float64), with the gradient.

    Args:
        threads: the largest number of threads to use; None takes the number of processors this process may run on. In
            a process that has imported PyTorch, at most `torch.get_num_threads()` are used. Results do not depend on
            the number of threads.
        The others: as in `flowdppo_ops.loss`, with `numpy.ndarray` for tensors; bfloat16 does not exist in NumPy, and
            `process_group` must be None.

    Returns:
        `(loss, grad)`. `loss` is a NumPy scalar, or an array of the rows' shape with `reduction="none"`; float32, or
        float64 for float64 inputs. `grad` is the derivative of the loss (with "none" of the sum of the row losses):
        with `prev_sample` the derivative in `prev_sample_mean`, with `log_prob` that in `log_prob`, in its shape and
        dtype. If both have a gradient (`log_prob` with `GRPOGuard` or a reference KL) it is the pair `(grad_log_prob,
        grad_prev_sample_mean)`.

    Raises:
        ValueError: as `flowdppo_ops.loss`; `threads` is neither None nor a whole number from 1 on.
        TypeError: as `flowdppo_ops.loss`; a masked array.
    """
    arguments, where = locals(), "flowdppo_ops.numpy.loss"
    for name, array in arguments.items():
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{where}: {name} is a {type(array).__name__}, wanted a numpy.ndarray: its mask would be lost"
            )
    if process_group is not None:
        raise ValueError(f"{where}: process_group is {process_group!r}, wanted None: arrays belong to one process")
    if threads is None:
        threads = default_threads()
    elif isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= threads < 2**31:
        raise ValueError(f"{where}: threads is {threads!r}, wanted None or a whole number of at least 1")
    call = _checks.check_loss(where, _FAMILY, arguments)
    value, grad_mean, grad_log_prob = _native.policy_loss_numpy(call.fields, call.settings, int(threads))
    if grad_log_prob is None:
        return value[()], grad_mean
    grad_log_prob = grad_log_prob.reshape(call.row_shape).astype(log_prob.dtype)
    return value[()], grad_log_prob if grad_mean is None else (grad_log_prob, grad_mean)


def default_threads() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
