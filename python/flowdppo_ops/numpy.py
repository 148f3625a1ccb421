"""`flowdppo_ops.loss` for NumPy arrays: loss and gradient in one call, without PyTorch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from . import _args, _native
from .objectives import FlowDPPO, Objective

__all__ = ["loss"]

_FAMILY = _args.Family(
    type=np.ndarray,
    name="numpy.ndarray",
    dtypes={np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.float64): "float64"},
    float64=np.dtype(np.float64),
    layout=None,
    contiguous=lambda array: np.require(array, requirements=("C", "A")),
    broadcast=np.broadcast_to,
    has_devices=False,
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
        threads: how many to use at most; None takes the processors this process may run on. Once the process has
            imported PyTorch, no more than `torch.get_num_threads()` are used. The result does not depend on it.
        The others: as in `flowdppo_ops.loss`, with `numpy.ndarray` for tensors.

    Returns:
        `(loss, grad)`. `loss` is a NumPy scalar, or an array of the rows' shape with `reduction="none"`; float32, or
        float64 for float64 inputs. `grad` is the derivative of the loss (of the sum of the row losses with "none"):
        with `prev_sample`, in `prev_sample_mean`, in its shape and dtype; with `log_prob`, in `log_prob`. Where both
        have one (`log_prob` with `GRPOGuard` or a reference KL) it is the pair `(grad_log_prob,
        grad_prev_sample_mean)`.

    Raises:
        ValueError, TypeError: as `flowdppo_ops.loss`.
    """
    where = "flowdppo_ops.numpy.loss"
    if process_group is not None:
        raise ValueError(f"{where}: process_group is {process_group!r}, wanted None: arrays belong to one process")
    call = _args.check_loss(
        where,
        _FAMILY,
        prev_sample_mean=prev_sample_mean,
        old_prev_sample_mean=old_prev_sample_mean,
        advantages=advantages,
        std=std,
        sqrt_dt=sqrt_dt,
        prev_sample=prev_sample,
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        weights=weights,
        ref_prev_sample_mean=ref_prev_sample_mean,
        ref_kl_weight=ref_kl_weight,
        ref_std=ref_std,
        objective=objective,
        density=density,
        latent_reduction=latent_reduction,
        reduction=reduction,
        process_group=process_group,
    )
    if threads is None:
        threads = default_threads()
    latents, vectors, settings = call.latents, call.vectors, call.settings
    mean, rows = latents.output, advantages.size
    numel = 0 if mean is None else mean.size // rows
    arrays = tuple(_array(t) for t in latents)
    dtype = np.float64 if call.double else np.float32
    value = np.empty(call.row_shape if reduction == "none" else (), dtype)
    numbers = np.empty(rows * _native.FIELDS + _native.BATCH_LEN, dtype)
    _native.policy_loss_forward(
        arrays,
        tuple(_vector(v, call.row_shape) for v in vectors),
        None,
        rows,
        numel,
        call.double,
        settings[:8],
        settings[8:],
        (_address(value), _address(numbers)),
        None,
        None,
        threads,
    )
    # The same two questions as in the operator's autograd: who has a gradient.
    of_mean = _args.differentiates_mean(latents, settings.objective)
    grad_mean = np.empty_like(mean) if of_mean else None
    grad_log_prob = np.empty(rows, dtype) if log_prob is not None else None
    gradients = (_array(grad_mean), None), _array(grad_log_prob)
    _native.policy_loss_backward(arrays, None, 1.0, _address(numbers), rows, numel, call.double, *gradients, threads)
    if grad_log_prob is None:
        return value[()], grad_mean
    grad_log_prob = grad_log_prob.reshape(call.row_shape).astype(log_prob.dtype)
    return value[()], (grad_log_prob, grad_mean) if of_mean else grad_log_prob


def default_threads() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _array(array: np.ndarray | None) -> tuple[int, str] | None:
    return None if array is None else (_address(array), _FAMILY.dtypes[array.dtype])


def _vector(value: float | np.ndarray | None, row_shape: tuple[int, ...]) -> float | tuple[int, str, int, int] | None:
    if value is None or isinstance(value, float):
        return value
    return _address(value), _FAMILY.dtypes[value.dtype], *_args.row_stride(value.shape, row_shape)
