"""The operator `sde_step`, behind `sde_step`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _cuda, _native
from .._step_args import StepCall
from .common import array, contiguous, is_plain, vector


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the operator's schema; contiguous latents, then row vectors."""

    model_output: Tensor
    uncond_output: Tensor | None
    sample: Tensor
    prev_sample: Tensor | None  # one of these two
    noise: Tensor | None
    sigma: float | Tensor
    sigma_next: float | Tensor
    noise_level: float | Tensor
    sigma_max: float | Tensor
    guidance_scale: float | Tensor | None

    @property
    def is_as_stored(self) -> bool:
        """Whether the next latent is given, and in the dtype that it is stored in: there is none to write."""
        return self.prev_sample is not None and self.prev_sample.dtype == self.sample.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic, and of all outputs that have no dtype of their own."""
        double = any(t is not None and t.dtype == torch.float64 for t in self[:5])
        return torch.float64 if double else torch.float32


class Options(NamedTuple):
    """Everything that is no tensor, in the order of the schema."""

    sampler: str
    log_prob_normalizer: bool
    residual_dtype: torch.dtype | None
    row_dims: int


class Outputs(NamedTuple):
    """Of the operator, which has empty tensors for what is not made."""

    prev_sample: Tensor | None  # None where the given one is as stored
    log_prob: Tensor
    prev_sample_mean: Tensor
    std: Tensor
    residual: Tensor | None
    numbers: Tensor  # flat [SDE_STEP_NUMBERS, rows], for the backward


def sde_step(call: StepCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`(prev_sample, log_prob, prev_sample_mean, std, residual)`; differentiable through the second and the third.

    `call` has a `prev_sample` or `noise`. A given latent that has the dtype of `sample` is returned itself.
    """
    inputs = Inputs(*(getattr(call, name) for name in Inputs._fields))
    options = Options(call.sampler, call.log_prob_normalizer, call.residual_dtype, len(call.row_shape))
    output, uncond = inputs.model_output, inputs.uncond_output
    if not is_plain(inputs):
        vectors = (output.new_full((), v, dtype=torch.float64) if isinstance(v, float) else v for v in inputs[5:])
        out = Outputs(*torch.ops.flowdppo_ops.sde_step(*inputs[:5], *vectors, *options))
    else:
        out = _forward(inputs, options)
        if torch.is_grad_enabled() and (output.requires_grad or (uncond is not None and uncond.requires_grad)):
            log_prob, mean = _Eager.apply(output, uncond, inputs, out)
            out = out._replace(log_prob=log_prob, prev_sample_mean=mean)
    prev_sample = inputs.prev_sample.detach() if inputs.is_as_stored else out.prev_sample
    residual = None if call.residual_dtype is None else out.residual
    return prev_sample, out.log_prob, out.prev_sample_mean, out.std, residual


# ---- the native calls ----------------------------------------------------------------------------------------------


def _empty_outputs(inputs: Inputs, options: Options) -> Outputs:
    like, dtype = inputs.sample, inputs.dtype
    shape = like.shape
    row_shape = shape[: options.row_dims]
    residual_dtype = options.residual_dtype
    return Outputs(
        None if inputs.is_as_stored else like.new_empty(shape),
        like.new_empty(row_shape, dtype=dtype),
        like.new_empty(shape, dtype=dtype),
        like.new_empty(row_shape, dtype=dtype),
        None if residual_dtype is None else like.new_empty(shape, dtype=residual_dtype),
        like.new_empty(_native.SDE_STEP_NUMBERS * row_shape.numel(), dtype=dtype),
    )


def _forward(inputs: Inputs, options: Options, *, operator: bool = False) -> Outputs:
    """`operator`: called through the dispatcher, where no tensor may outlive the call."""
    out = _empty_outputs(inputs, options)
    row_shape, rows = out.std.shape, out.std.numel()
    numel = inputs.sample.numel() // rows
    arrays = tuple([array(t) for t in inputs[:5]])
    schedule = (options.sampler, *[vector(v, rows, row_shape) for v in inputs[5:]])
    addresses = (
        array(out.prev_sample),
        out.prev_sample_mean.data_ptr(),
        array(out.residual),
        out.log_prob.data_ptr(),
        out.std.data_ptr(),
        out.numbers.data_ptr(),
    )
    normalizer = options.log_prob_normalizer
    target = _cuda.target(out.std)
    if target is None:
        double, threads = out.std.dtype == torch.float64, torch.get_num_threads()
        _native.sde_step_forward(arrays, schedule, rows, numel, double, normalizer, addresses, threads)
    else:
        partials, is_capturing = _native.sde_step_workspace_cuda(target, rows, numel)
        with _cuda.Workspace(out.std, target, partials, rows + 1, is_capturing, not operator) as workspace:
            _native.sde_step_forward_cuda(target, arrays, schedule, rows, numel, normalizer, addresses, *workspace)
    return out


def _backward(
    grad_log_prob: Tensor | None,
    grad_mean: Tensor | None,
    prev_sample: Tensor,
    mean: Tensor,
    numbers: Tensor,
    output_dtype: torch.dtype | None,
    uncond_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `model_output` and `uncond_output` in the dtypes given; None: not wanted."""
    # Held by their names until Rust has read them: autograd hands down expanded scalars.
    grad_log_prob = None if grad_log_prob is None else grad_log_prob.contiguous()
    grad_mean = None if grad_mean is None else grad_mean.contiguous()
    rows = numbers.numel() // _native.SDE_STEP_NUMBERS
    grad_output = None if output_dtype is None else torch.empty_like(mean, dtype=output_dtype)
    grad_uncond = None if uncond_dtype is None else torch.empty_like(mean, dtype=uncond_dtype)
    saved = (
        None if grad_log_prob is None else grad_log_prob.data_ptr(),
        None if grad_mean is None else grad_mean.data_ptr(),
        array(prev_sample),
        mean.data_ptr(),
        numbers.data_ptr(),
    )
    numel, out = mean.numel() // rows, (array(grad_output), array(grad_uncond))
    target = _cuda.target(mean)
    if target is None:
        double, threads = numbers.dtype == torch.float64, torch.get_num_threads()
        _native.sde_step_backward(saved, rows, numel, double, *out, threads)
    else:
        _native.sde_step_backward_cuda(target, saved, rows, numel, *out)
    return grad_output, grad_uncond


# ---- the direct road -------------------------------------------------------------------------------------------------


def _save(ctx, inputs: Inputs, out: Outputs) -> None:
    stored = inputs.prev_sample if inputs.is_as_stored else out.prev_sample
    ctx.save_for_backward(stored, out.prev_sample_mean, out.numbers)
    uncond = inputs.uncond_output
    ctx.dtypes = inputs.model_output.dtype, None if uncond is None else uncond.dtype
    ctx.set_materialize_grads(False)


def _wanted_dtypes(ctx) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Of the two gradients; the first two arguments of both roads are what they go to."""
    of_output, of_uncond = ctx.dtypes
    wants_output, wants_uncond, *_ = ctx.needs_input_grad
    return of_output if wants_output else None, of_uncond if wants_uncond else None


class _Eager(torch.autograd.Function):
    """Ties log-prob and mean, already computed, to the two outputs of the model."""

    @staticmethod
    def forward(ctx, model_output, uncond_output, inputs, out):
        _save(ctx, inputs, out)
        return out.log_prob, out.prev_sample_mean

    @staticmethod
    def backward(ctx, grad_log_prob, grad_mean):
        if not torch.is_grad_enabled():
            return _eager_backward(ctx, grad_log_prob, grad_mean)
        # A graph of the backward is being built: differentiating it must fail, also where the gradients are constants.
        return _differentiable_once(ctx, *[_requiring_grad(grad) for grad in (grad_log_prob, grad_mean)])


def _requiring_grad(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.requires_grad else grad.detach().requires_grad_()


def _eager_backward(ctx, grad_log_prob, grad_mean):
    if grad_log_prob is None and grad_mean is None:
        return None, None, None, None
    return *_backward(grad_log_prob, grad_mean, *ctx.saved_tensors, *_wanted_dtypes(ctx)), None, None


_differentiable_once = once_differentiable(_eager_backward)


# ---- the registered operators --------------------------------------------------------------------------------------

_OPTIONAL = ("uncond_output", "prev_sample", "noise", "guidance_scale")
_INPUTS = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in Inputs._fields)
_OPTIONS = "str sampler, bool log_prob_normalizer, ScalarType? residual_dtype, int row_dims"

# A schema cannot return an optional tensor: what is not wanted comes back empty.
torch.library.define(
    "flowdppo_ops::sde_step",
    f"({_INPUTS}, {_OPTIONS}) -> ({', '.join(f'Tensor {name}' for name in Outputs._fields)})",
)
torch.library.define(
    "flowdppo_ops::sde_step_backward",
    "(Tensor? grad_log_prob, Tensor? grad_mean, Tensor prev_sample, Tensor prev_sample_mean, Tensor numbers, "
    "ScalarType? output_dtype, ScalarType? uncond_dtype) -> (Tensor grad_output, Tensor grad_uncond)",
)


def _without_none(out: Outputs) -> tuple[Tensor, ...]:
    return tuple([out.numbers.new_empty(0) if t is None else t for t in out])


def _split(args: tuple) -> tuple[Inputs, Options]:
    count = len(Inputs._fields)
    return Inputs(*args[:count]), Options(*args[count:])


@torch.library.impl("flowdppo_ops::sde_step", ("cpu", "cuda"))
def _sde_step(*args):
    inputs, options = _split(args)
    return _without_none(_forward(Inputs(*contiguous(inputs)), options, operator=True))


@torch.library.register_fake("flowdppo_ops::sde_step")
def _sde_step_fake(*args):
    return _without_none(_empty_outputs(*_split(args)))


@torch.library.impl("flowdppo_ops::sde_step_backward", ("cpu", "cuda"))
def _sde_step_backward(*args):
    mean = args[3]
    grads = _backward(*contiguous(args))
    return tuple(mean.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("flowdppo_ops::sde_step_backward")
def _sde_step_backward_fake(grad_log_prob, grad_mean, prev_sample, mean, numbers, *dtypes):
    return tuple(mean.new_empty(0) if dtype is None else torch.empty_like(mean, dtype=dtype) for dtype in dtypes)


def _setup_context(ctx, inputs, output):
    out = Outputs(*output)
    _save(ctx, _split(inputs)[0], out)
    ctx.mark_non_differentiable(out.prev_sample, out.std, out.residual, out.numbers)


def _registered_backward(ctx, _prev_sample, grad_log_prob, grad_mean, *_others):
    grads = dict.fromkeys(Inputs._fields + Options._fields)
    if grad_log_prob is not None or grad_mean is not None:
        dtypes = _wanted_dtypes(ctx)
        made = torch.ops.flowdppo_ops.sde_step_backward(grad_log_prob, grad_mean, *ctx.saved_tensors, *dtypes)
        for name, grad, dtype in zip(("model_output", "uncond_output"), made, dtypes, strict=True):
            grads[name] = None if dtype is None else grad
    return tuple(grads.values())


torch.library.register_autograd("flowdppo_ops::sde_step", _registered_backward, setup_context=_setup_context)
