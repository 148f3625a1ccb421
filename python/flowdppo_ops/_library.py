"""The operator `policy_loss` in PyTorch: schema, fake, autograd, and a short way past all three.

Two roads lead to the same two native functions. Plain tensors in eager mode take `_Eager`, an autograd function that
calls them directly; everything else (`torch.compile`, `torch.export`, fake tensors, subclasses, dispatch modes) goes
through the registered operators, whose fakes never touch memory. Measured per forward and backward on 32 elements: 16 us
against 26 us through the dispatcher, beside 11 us for `x - mu` alone.

All latents arrive contiguous, and all row vectors with one element or one per row: `policy_loss.loss` sees to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._torch import FAMILY

Vector = float | Tensor


class Latents(NamedTuple):
    """`[rows, latent...]` each, contiguous; None where nothing reads it."""

    prev_sample_mean: Tensor | None
    prev_sample: Tensor | None
    old_prev_sample_mean: Tensor | None
    ref_prev_sample_mean: Tensor | None


class Vectors(NamedTuple):
    """Row vectors: numbers, or tensors with one element or one per row, contiguous."""

    advantages: Tensor
    log_prob: Tensor | None
    old_log_prob: Tensor | None
    weights: Vector | None
    std: Vector | None
    sqrt_dt: Vector | None
    ref_std: Vector | None


class Settings(NamedTuple):
    """Everything that is not a tensor, in the order of the schema."""

    objective: str
    low: float
    high: float
    adv_clip_max: float
    mask: str
    normalize_kl: bool
    keep_nan_kl: bool
    per_row_scale: bool
    density: str
    latent_reduction: str
    reduction: str
    ref_kl_weight: float

    def differentiates_mean(self, latents: Latents) -> bool:
        """Whether the loss depends on `prev_sample_mean` through more than a KL that is compared."""
        return (
            latents.prev_sample is not None
            or latents.ref_prev_sample_mean is not None
            or self.objective == "grpo_guard"
        )

    def read_by_backward(self, latents: Latents) -> Latents:
        return Latents(
            latents.prev_sample_mean if self.differentiates_mean(latents) else None,
            latents.prev_sample,
            latents.old_prev_sample_mean if self.objective == "grpo_guard" else None,
            latents.ref_prev_sample_mean,
        )


def policy_loss(latents: Latents, vectors: Vectors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, rows, batch)`; differentiable in `prev_sample_mean` and `log_prob` through `loss` alone."""
    if _plain(*latents, *vectors):
        mean, log_prob = latents.prev_sample_mean, vectors.log_prob
        if torch.is_grad_enabled() and (
            (mean is not None and mean.requires_grad) or (log_prob is not None and log_prob.requires_grad)
        ):
            return _Eager.apply(mean, log_prob, latents, vectors, settings)
        return _forward(latents, vectors, settings)
    like = vectors.advantages
    tensors = [like.new_full((), v, dtype=torch.float64) if isinstance(v, float) else v for v in vectors]
    return torch.ops.flowdppo_ops.policy_loss(*latents, *tensors, *settings)


def _plain(*values: object) -> bool:
    """Whether the direct road is open: real memory, and nobody watching the dispatcher.

    `FakeTensor.data_ptr()` is 0 and its device says cpu; subclasses and modes must see the operator.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(v) in (Tensor, torch.nn.Parameter, float, type(None)) for v in values)
    )


# ---- the native calls -------------------------------------------------------------------------------------------------


def _is_double(latents: Latents, vectors: Vectors) -> bool:
    wide = (*latents, vectors.log_prob, vectors.old_log_prob)
    return any(t is not None and t.dtype == torch.float64 for t in wide)


def _array(tensor: Tensor | None) -> tuple[int, str] | None:
    return None if tensor is None else (tensor.data_ptr(), FAMILY.dtypes[tensor.dtype])


def _vector(value: Vector | None) -> float | tuple[int, str, int] | None:
    if not isinstance(value, Tensor):
        return value
    return value.data_ptr(), FAMILY.dtypes[value.dtype], 0 if value.numel() == 1 else 1


def _sizes(latents: Latents, rows: int) -> tuple[int, int]:
    mean = latents.prev_sample_mean
    return rows, 0 if mean is None else mean.numel() // rows


def _forward(latents: Latents, vectors: Vectors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    advantages, double = vectors.advantages, _is_double(latents, vectors)
    loss, rows, batch = _empty_outputs(advantages, double, settings.reduction)
    _native.policy_loss_forward(
        tuple(map(_array, latents)),
        tuple(map(_vector, vectors)),
        *_sizes(latents, advantages.numel()),
        double,
        settings[:8],
        *settings[8:],
        (loss.data_ptr(), rows.data_ptr(), batch.data_ptr()),
        torch.get_num_threads(),
    )
    return loss, rows, batch


def _empty_outputs(advantages: Tensor, double: bool, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if double else torch.float32
    return (
        advantages.new_empty(advantages.shape if reduction == "none" else (), dtype=dtype),
        advantages.new_empty((_native.FIELDS, advantages.numel()), dtype=dtype),
        advantages.new_empty(_native.BATCH_LEN, dtype=dtype),
    )


def _backward(
    grad_loss: Tensor, rows: Tensor, batch: Tensor, latents: Latents, wants_mean: bool, wants_log_prob: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `prev_sample_mean`, in its dtype, and of `log_prob`, flat and in the arithmetic dtype."""
    mean = latents.prev_sample_mean
    grad_mean = torch.empty_like(mean) if wants_mean else None
    grad_log_prob = rows.new_empty(rows.shape[1]) if wants_log_prob else None
    _native.policy_loss_backward(
        tuple(map(_array, latents)),
        _vector(grad_loss.contiguous()),
        (rows.data_ptr(), batch.data_ptr()),
        *_sizes(latents, rows.shape[1]),
        rows.dtype == torch.float64,
        _array(grad_mean),
        _array(grad_log_prob),
        torch.get_num_threads(),
    )
    return grad_mean, grad_log_prob


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, log_prob, latents, vectors, settings):
        loss, rows, batch = _forward(latents, vectors, settings)
        ctx.save_for_backward(rows, batch, *settings.read_by_backward(latents))
        ctx.log_prob_like = None if log_prob is None else (log_prob.shape, log_prob.dtype)
        ctx.mark_non_differentiable(rows, batch)
        ctx.set_materialize_grads(False)
        return loss, rows, batch

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_rows, _grad_batch):
        if grad_loss is None:
            return None, None, None, None, None
        rows, batch, *saved = ctx.saved_tensors
        latents = Latents(*saved)
        wants_mean = ctx.needs_input_grad[0] and latents.prev_sample_mean is not None
        grad_mean, grad_log_prob = _backward(grad_loss, rows, batch, latents, wants_mean, ctx.needs_input_grad[1])
        if grad_log_prob is not None:
            shape, dtype = ctx.log_prob_like
            grad_log_prob = grad_log_prob.view(shape).to(dtype)
        return grad_mean, grad_log_prob, None, None, None


# ---- the registered operators -----------------------------------------------------------------------------------------

_LATENTS = ", ".join(f"Tensor? {name}" for name in Latents._fields)
_VECTORS = "Tensor advantages, " + ", ".join(f"Tensor? {name}" for name in Vectors._fields[1:])
_SETTINGS = (
    "str objective, float low, float high, float adv_clip_max, str mask, bool normalize_kl, bool keep_nan_kl, "
    "bool per_row_scale, str density, str latent_reduction, str reduction, float ref_kl_weight"
)

torch.library.define(
    "flowdppo_ops::policy_loss", f"({_LATENTS}, {_VECTORS}, {_SETTINGS}) -> (Tensor loss, Tensor rows, Tensor batch)"
)
# A schema cannot return an optional tensor: what is not wanted comes back empty.
torch.library.define(
    "flowdppo_ops::policy_loss_backward",
    f"(Tensor grad_loss, Tensor rows, Tensor batch, {_LATENTS}, bool wants_mean, bool wants_log_prob)"
    " -> (Tensor grad_mean, Tensor grad_log_prob)",
)


def _split(args: tuple) -> tuple[Latents, Vectors, Settings]:
    a, b = len(Latents._fields), len(Latents._fields) + len(Vectors._fields)
    return Latents(*args[:a]), Vectors(*args[a:b]), Settings(*args[b:])


@torch.library.impl("flowdppo_ops::policy_loss", "cpu")
def _policy_loss_cpu(*args):
    return _forward(*_split(args))


@torch.library.register_fake("flowdppo_ops::policy_loss")
def _policy_loss_fake(*args):
    latents, vectors, settings = _split(args)
    return _empty_outputs(vectors.advantages, _is_double(latents, vectors), settings.reduction)


@torch.library.impl("flowdppo_ops::policy_loss_backward", "cpu")
def _policy_loss_backward_cpu(grad_loss, rows, batch, *args):
    grads = _backward(grad_loss, rows, batch, Latents(*args[:-2]), *args[-2:])
    return tuple(rows.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("flowdppo_ops::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, rows, batch, *args):
    mean, (wants_mean, wants_log_prob) = args[0], args[-2:]
    return (
        torch.empty_like(mean) if wants_mean else rows.new_empty(0),
        rows.new_empty(rows.shape[1] if wants_log_prob else 0),
    )


def _setup_context(ctx, inputs, output):
    latents, vectors, settings = _split(inputs)
    _, rows, batch = output
    ctx.save_for_backward(rows, batch, *settings.read_by_backward(latents))
    log_prob = vectors.log_prob
    ctx.log_prob_like = None if log_prob is None else (log_prob.shape, log_prob.dtype)
    ctx.mark_non_differentiable(rows, batch)
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, grad_loss, _grad_rows, _grad_batch):
    grads = [None] * (len(Latents._fields) + len(Vectors._fields) + len(Settings._fields))
    if grad_loss is None:
        return tuple(grads)
    rows, batch, *saved = ctx.saved_tensors
    latents = Latents(*saved)
    at_log_prob = len(Latents._fields) + Vectors._fields.index("log_prob")
    wants_mean = ctx.needs_input_grad[0] and latents.prev_sample_mean is not None
    wants_log_prob = ctx.needs_input_grad[at_log_prob]
    grad_mean, grad_log_prob = torch.ops.flowdppo_ops.policy_loss_backward(
        grad_loss, rows, batch, *latents, wants_mean, wants_log_prob
    )
    if wants_mean:
        grads[0] = grad_mean
    if wants_log_prob:
        shape, dtype = ctx.log_prob_like
        grads[at_log_prob] = grad_log_prob.view(shape).to(dtype)
    return tuple(grads)


torch.library.register_autograd(
    "flowdppo_ops::policy_loss", _registered_backward, setup_context=_setup_context
)
