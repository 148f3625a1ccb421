"""The operator `policy_loss`, behind `loss`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _cuda, _native
from .._args import Latents, LossCall, Settings, Vectors, differentiates_mean
from .common import array, contiguous, is_plain, vector


def policy_loss(call: LossCall) -> tuple[Tensor, Tensor]:
    """`(loss, numbers)`; differentiable in `prev_sample_mean` and `log_prob` through `loss` alone."""
    latents, vectors = call.latents, call.vectors
    if not is_plain(latents + vectors):
        like = vectors.advantages
        tensors = [like.new_full((), v, dtype=torch.float64) if isinstance(v, float) else v for v in vectors]
        return torch.ops.flowdppo_ops.policy_loss(*latents, *tensors, *call.settings)
    mean, log_prob = latents.output, vectors.log_prob
    differentiable = (mean is not None and mean.requires_grad) or (log_prob is not None and log_prob.requires_grad)
    if not differentiable or not torch.is_grad_enabled():
        return _forward(latents, vectors, call.settings, call.double)
    ahead = _empty_gradient_ahead(call)
    loss, numbers = _forward(latents, vectors, call.settings, call.double, ahead)
    return _Eager.apply(mean, log_prob, call, (loss, numbers, ahead)), numbers


def _read_by_backward(latents: Latents, objective: str) -> Latents:
    return Latents(
        latents.output if differentiates_mean(latents, objective) else None,
        None,
        None,
        latents.prev_sample,
        latents.old if objective == "grpo_guard" else None,
        latents.ref,
    )


# ---- the native calls ----------------------------------------------------------------------------------------------


def _arrays(latents: Latents) -> tuple:
    return tuple([array(t) for t in (latents.output, latents.prev_sample, latents.old, latents.ref)])


def _latent_elements(latents: Latents, rows: int) -> int:
    mean = latents.output
    return 0 if mean is None else mean.numel() // rows


def _forward(
    latents: Latents,
    vectors: Vectors,
    settings: Settings,
    double: bool,
    ahead: Tensor | None = None,
    *,
    operator: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ahead`: where the gradient of the mean goes, if it is wanted already. `operator`: called through the
    dispatcher, where no tensor may outlive the call."""
    advantages = vectors.advantages
    loss, numbers = _empty_outputs(advantages, double, settings.reduction)
    rows = advantages.numel()
    numel = _latent_elements(latents, rows)
    arrays, rows_arrays = _arrays(latents), tuple([vector(v, advantages.shape) for v in vectors])
    objective = (*settings[:5], settings.kl_divisor == "gaussian", *settings[6:8])
    out = loss.data_ptr(), numbers.data_ptr()
    target = _cuda.target(advantages)
    if target is None:
        _native.policy_loss_forward(
            arrays,
            rows_arrays,
            rows,
            numel,
            double,
            objective,
            settings[8:],
            out,
            array(ahead),
            torch.get_num_threads(),
        )
    else:
        needs_batch_means = settings.objective == "grpo_guard" and not settings.per_row_scale
        partials, tickets = _cuda.workspace(advantages, target, rows, numel, needs_batch_means, not operator)
        _native.policy_loss_forward_cuda(
            target,
            arrays,
            rows_arrays,
            rows,
            numel,
            objective,
            settings[8:],
            out,
            (partials.data_ptr(), partials.numel()),
            (tickets.data_ptr(), tickets.numel()),
        )
    return loss, numbers


def _empty_outputs(advantages: Tensor, double: bool, reduction: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if double else torch.float32
    loss = advantages.new_empty(advantages.shape if reduction == "none" else (), dtype=dtype)
    return loss, advantages.new_empty(advantages.numel() * _native.FIELDS + _native.BATCH_LEN, dtype=dtype)


def _empty_gradient_ahead(call: LossCall) -> Tensor | None:
    """Memory for the gradient of the mean, where the forward does well to form it along with the loss.

    On the CPU alone, where the gradient of a whole batch is a second pass over memory that the caches could save; with
    the batch's divisor known beforehand and one `grad_loss` for all rows.
    """
    mean = call.latents.output
    if (
        mean is None
        or call.latents.prev_sample is None
        or not mean.requires_grad
        or call.settings.reduction not in ("mean", "sum")
        or _cuda.target(mean) is not None
    ):
        return None
    rows = call.vectors.advantages.numel()
    row_bytes = mean.nbytes // rows * 2  # of the mean and the sample
    return torch.empty_like(mean) if _native.policy_loss_gradient_ahead(rows, row_bytes) else None


def _backward(
    grad_loss: Tensor, numbers: Tensor, latents: Latents, wants_mean: bool, wants_log_prob: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `prev_sample_mean`, in its dtype, and of `log_prob`, flat and in the arithmetic dtype."""
    rows = (numbers.numel() - _native.BATCH_LEN) // _native.FIELDS
    grad_loss = grad_loss.contiguous()  # held by its name until Rust has read it: autograd hands down expanded scalars
    grad_mean = torch.empty_like(latents.output) if wants_mean else None
    grad_log_prob = numbers.new_empty(rows) if wants_log_prob else None
    arrays, numel = _arrays(latents), _latent_elements(latents, rows)
    out = array(grad_mean), array(grad_log_prob)
    target = _cuda.target(numbers)
    if target is None:
        double = numbers.dtype == torch.float64
        _native.policy_loss_backward(
            arrays,
            vector(grad_loss, grad_loss.shape),
            numbers.data_ptr(),
            rows,
            numel,
            double,
            *out,
            torch.get_num_threads(),
        )
    else:
        _native.policy_loss_backward_cuda(
            target, arrays, vector(grad_loss, grad_loss.shape), numbers.data_ptr(), rows, numel, *out
        )
    return grad_mean, grad_log_prob


def _as_log_prob(ctx, grad_log_prob: Tensor) -> Tensor:
    shape, dtype = ctx.log_prob_like
    return grad_log_prob.view(shape).to(dtype)


class _Eager(torch.autograd.Function):
    """Ties the loss, already computed, to its two inputs. The numbers stay outside: a second output costs 2 us."""

    @staticmethod
    def forward(ctx, mean, log_prob, call, results):
        loss, numbers, ctx.gradient_ahead = results
        ctx.save_for_backward(numbers, *_read_by_backward(call.latents, call.settings.objective))
        ctx.log_prob_like = None if log_prob is None else (log_prob.shape, log_prob.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if not torch.is_grad_enabled():
            return _eager_backward(ctx, grad_loss)
        # A graph of the backward is being built: differentiating it must fail, also where `grad_loss` is a constant.
        return _differentiable_once(ctx, grad_loss if grad_loss.requires_grad else grad_loss.detach().requires_grad_())


def _eager_backward(ctx, grad_loss):
    numbers, *saved = ctx.saved_tensors
    # Handed out once: whoever gets it may write to it.
    ahead, ctx.gradient_ahead = ctx.gradient_ahead, None
    if ahead is not None:
        scale = grad_loss.item()
        if scale == 1:
            return ahead, None, None, None
        # Half precision would be rounded twice, and a blocked row's zeros must not become 0 * inf.
        if ahead.dtype.itemsize >= 4 and math.isfinite(scale):
            return ahead.mul_(scale), None, None, None
    latents = Latents(*saved)
    needs_mean, needs_log_prob, _, _ = ctx.needs_input_grad
    wants_mean = needs_mean and latents.output is not None
    grad_mean, grad_log_prob = _backward(grad_loss, numbers, latents, wants_mean, needs_log_prob)
    return grad_mean, None if grad_log_prob is None else _as_log_prob(ctx, grad_log_prob), None, None


_differentiable_once = once_differentiable(_eager_backward)


# ---- the registered operators --------------------------------------------------------------------------------------

_LATENTS = ", ".join(f"Tensor? {name}" for name in Latents._fields)
_VECTORS = "Tensor advantages, " + ", ".join(f"Tensor? {name}" for name in Vectors._fields[1:])
_SETTINGS = (
    "str objective, float low, float high, float adv_clip_max, str mask, str kl_divisor, bool keep_nan_kl, "
    "bool per_row_scale, str density, str latent_reduction, str reduction, float ref_kl_weight"
)
_ARGUMENTS = Latents._fields + Vectors._fields + Settings._fields

torch.library.define(
    "flowdppo_ops::policy_loss", f"({_LATENTS}, {_VECTORS}, {_SETTINGS}) -> (Tensor loss, Tensor numbers)"
)
# A schema cannot return an optional tensor: what is not wanted comes back empty.
torch.library.define(
    "flowdppo_ops::policy_loss_backward",
    f"(Tensor grad_loss, Tensor numbers, {_LATENTS}, bool wants_mean, bool wants_log_prob)"
    " -> (Tensor grad_mean, Tensor grad_log_prob)",
)


def _split(args: tuple) -> tuple[Latents, Vectors, Settings, bool]:
    a, b = len(Latents._fields), len(Latents._fields) + len(Vectors._fields)
    latents, vectors = Latents(*args[:a]), Vectors(*args[a:b])
    wide = (*latents, vectors.log_prob, vectors.old_log_prob)
    double = any(t is not None and t.dtype == torch.float64 for t in wide)
    return latents, vectors, Settings(*args[b:]), double


@torch.library.impl("flowdppo_ops::policy_loss", ("cpu", "cuda"))
def _policy_loss(*args):
    latents, vectors, settings, double = _split(args)
    return _forward(Latents(*contiguous(latents)), Vectors(*contiguous(vectors)), settings, double, operator=True)


@torch.library.register_fake("flowdppo_ops::policy_loss")
def _policy_loss_fake(*args):
    _, vectors, settings, double = _split(args)
    return _empty_outputs(vectors.advantages, double, settings.reduction)


@torch.library.impl("flowdppo_ops::policy_loss_backward", ("cpu", "cuda"))
def _policy_loss_backward(grad_loss, numbers, *args):
    grads = _backward(grad_loss, numbers.contiguous(), Latents(*contiguous(args[:-2])), *args[-2:])
    return tuple(numbers.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("flowdppo_ops::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, numbers, *args):
    mean, (wants_mean, wants_log_prob) = args[0], args[-2:]
    rows = (numbers.numel() - _native.BATCH_LEN) // _native.FIELDS
    return (
        torch.empty_like(mean) if wants_mean else numbers.new_empty(0),
        numbers.new_empty(rows if wants_log_prob else 0),
    )


def _setup_context(ctx, inputs, output):
    latents, vectors, settings, _ = _split(inputs)
    log_prob, numbers = vectors.log_prob, output[1]
    ctx.save_for_backward(numbers, *_read_by_backward(latents, settings.objective))
    ctx.log_prob_like = None if log_prob is None else (log_prob.shape, log_prob.dtype)
    ctx.mark_non_differentiable(numbers)
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, grad_loss, _grad_numbers):
    grads = dict.fromkeys(_ARGUMENTS)
    if grad_loss is not None:
        numbers, *saved = ctx.saved_tensors
        wanted = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
        wants_mean = wanted["output"] and saved[0] is not None
        grad_mean, grad_log_prob = torch.ops.flowdppo_ops.policy_loss_backward(
            grad_loss, numbers, *saved, wants_mean, wanted["log_prob"]
        )
        if wants_mean:
            grads["output"] = grad_mean
        if wanted["log_prob"]:
            grads["log_prob"] = _as_log_prob(ctx, grad_log_prob)
    return tuple(grads.values())


torch.library.register_autograd("flowdppo_ops::policy_loss", _registered_backward, setup_context=_setup_context)
