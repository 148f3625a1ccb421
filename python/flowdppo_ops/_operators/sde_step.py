"""The operator `sde_step`, behind `sde_step`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._checks import Call
from .._torch import draw_noise
from . import common

FIELDS = tuple(_native.SDE_STEP_LATENTS) + tuple(_native.SCHEDULE)
WHERE = "flowdppo_ops.sde_step"

# `(prev_sample, log_prob, prev_sample_mean, std, residual)`, of which `log_prob` and `prev_sample_mean` are
# differentiable.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def run_checked(call: Call, memo: _native.SdeStepMemo, arguments: tuple) -> Results:
    """Runs a checked call of `sde_step`. The memo will recognise the next call with these arguments' metadata, unless
    the call goes through the dispatcher."""
    common.refuse_transforms(call.where, call.fields.values())
    if common.is_plain(call.fields.values()):
        draw = partial(draw_noise, generator=call.generator)
        return results(*memo.learn(arguments, call.fields, call.settings, draw))
    fields, settings = dict(call.fields), call.settings
    sample = fields["sample"]
    if "prev_sample" not in fields and "noise" not in fields:
        dtype = common.arithmetic_dtype(fields.get(name) for name in _native.SDE_STEP_LATENTS)
        fields["noise"] = draw_noise(sample, dtype, call.generator)
    arguments = {**dict.fromkeys(FIELDS), **common.as_tensors(fields, sample), **settings}
    stored, *others, residual, _ = torch.ops.flowdppo_ops.sde_step(**arguments)
    if _is_as_stored(arguments):
        stored = fields["prev_sample"].detach()
    return stored, *others, None if settings["residual_dtype"] is None else residual


def results(outputs: list, leaves: list | None) -> Results:
    """The results of a native forward. `leaves`, None if nothing is differentiated, are `model_output` and
    `uncond_output`; log-prob and mean are tied to them."""
    prev_sample, log_prob, mean, std, residual, _ = outputs
    if leaves is not None:
        log_prob, mean = _Step.apply(*leaves, outputs)
    return prev_sample, log_prob, mean, std, residual


class _Step(torch.autograd.Function):
    """Ties log-prob and mean, already computed, to `model_output` and `uncond_output`."""

    @staticmethod
    def forward(ctx, model_output, uncond_output, outputs):
        prev_sample, log_prob, mean, _, _, numbers = outputs
        common.save(ctx, prev_sample, mean, numbers)
        ctx.dtype = mean.dtype
        ctx.dtypes = model_output.dtype, None if uncond_output is None else uncond_output.dtype
        ctx.set_materialize_grads(False)
        return log_prob, mean

    @staticmethod
    def backward(ctx, *grads):
        if not torch.is_grad_enabled():
            return _gradients(ctx, grads)
        # The saved mean is an output of this function: through it the gradients depend on the model outputs.
        return common.OnceDifferentiable.apply(WHERE, lambda: _gradients(ctx, grads), *grads, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, *_tangents):
        common.not_supported(WHERE, "forward-mode differentiation is")


def _gradients(ctx, grads: tuple[Tensor | None, Tensor | None]) -> tuple:
    if grads == (None, None):
        return None, None, None
    return *_native.sde_step_backward(grads, *_saved(ctx), _wanted_dtypes(ctx)), None


def _saved(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """Next latent, mean and numbers, as the forward saved them. The native backward takes the next latent in any
    dtype."""
    stored, mean, numbers = common.saved(ctx)
    return stored, common.restored(mean, ctx.dtype), common.restored(numbers, ctx.dtype)


def _wanted_dtypes(ctx) -> list[torch.dtype | None]:
    """Dtypes of the gradients of `model_output` and `uncond_output`, None where one is not wanted. These are the first
    two arguments of `_Step` and of the operator."""
    return [dtype if wanted else None for dtype, wanted in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]


# ---- the registered operators --------------------------------------------------------------------------------------

_SETTINGS = {"sampler": "str", "log_prob_normalizer": "bool", "residual_dtype": "ScalarType?", "row_dims": "int"}
_ARGUMENTS = FIELDS + tuple(_SETTINGS)
_OUTPUTS = ("prev_sample", "log_prob", "prev_sample_mean", "std", "residual", "numbers")
_OPTIONAL = ("uncond_output", "prev_sample", "noise", "guidance_scale")
_NEEDED = [name for name in FIELDS if name not in _OPTIONAL]

torch.library.define(
    "flowdppo_ops::sde_step",
    f"({common.schema(FIELDS, _NEEDED)}, {', '.join(f'{kind} {name}' for name, kind in _SETTINGS.items())}) -> "
    f"({common.schema(_OUTPUTS, _OUTPUTS)})",
)
torch.library.define(
    "flowdppo_ops::sde_step_backward",
    "(Tensor? grad_log_prob, Tensor? grad_mean, Tensor prev_sample, Tensor prev_sample_mean, Tensor numbers, "
    "ScalarType? output_dtype, ScalarType? uncond_dtype) -> (Tensor grad_output, Tensor grad_uncond)",
)


def _is_as_stored(arguments: dict[str, Any]) -> bool:
    """Whether `prev_sample` is given in the dtype of `sample`, so that the operator need not write the next latent."""
    prev_sample = arguments["prev_sample"]
    return prev_sample is not None and prev_sample.dtype == arguments["sample"].dtype


@torch.library.impl("flowdppo_ops::sde_step", ("cpu", "cuda"))
def _sde_step(*args):
    arguments = dict(zip(_ARGUMENTS, args, strict=True))
    fields = {name: arguments[name] for name in FIELDS if arguments[name] is not None}
    call = _native.SdeStepCall(fields, {name: arguments[name] for name in _SETTINGS})
    return common.without_none(call.forward(), arguments["sample"])


@torch.library.register_fake("flowdppo_ops::sde_step")
def _sde_step_fake(*args):
    arguments = dict(zip(_ARGUMENTS, args, strict=True))
    common.check_devices("model_output", arguments)
    sample, row_dims, residual_dtype = (arguments[name] for name in ("sample", "row_dims", "residual_dtype"))
    dtype, shape = common.arithmetic_dtype(arguments[name] for name in _native.SDE_STEP_LATENTS), sample.shape
    outputs = (
        None if _is_as_stored(arguments) else sample.new_empty(shape),
        sample.new_empty(shape[:row_dims], dtype=dtype),
        sample.new_empty(shape, dtype=dtype),
        sample.new_empty(shape[:row_dims], dtype=dtype),
        None if residual_dtype is None else sample.new_empty(shape, dtype=residual_dtype),
        sample.new_empty(_native.SDE_STEP_NUMBERS * shape[:row_dims].numel(), dtype=dtype),
    )
    return common.without_none(outputs, sample)


@torch.library.impl("flowdppo_ops::sde_step_backward", ("cpu", "cuda"))
def _sde_step_backward(grad_log_prob, grad_mean, prev_sample, mean, numbers, *dtypes):
    grads = _native.sde_step_backward((grad_log_prob, grad_mean), prev_sample, mean, numbers, dtypes)
    return common.without_none(grads, mean)


@torch.library.register_fake("flowdppo_ops::sde_step_backward")
def _sde_step_backward_fake(grad_log_prob, grad_mean, prev_sample, mean, numbers, *dtypes):
    tensors = {"grad_log_prob": grad_log_prob, "grad_mean": grad_mean, "prev_sample": prev_sample, "numbers": numbers}
    common.check_devices("prev_sample_mean", tensors | {"prev_sample_mean": mean})
    return tuple(mean.new_empty(0) if dtype is None else torch.empty_like(mean, dtype=dtype) for dtype in dtypes)


common.refuse_second_derivatives("flowdppo_ops::sde_step_backward", WHERE)


def _setup_context(ctx, inputs, output):
    arguments, out = dict(zip(_ARGUMENTS, inputs, strict=True)), dict(zip(_OUTPUTS, output, strict=True))
    stored = arguments["prev_sample"] if _is_as_stored(arguments) else out["prev_sample"]
    common.save(ctx, stored, out["prev_sample_mean"], out["numbers"])
    ctx.dtype = out["numbers"].dtype
    uncond = arguments["uncond_output"]
    ctx.dtypes = arguments["model_output"].dtype, None if uncond is None else uncond.dtype
    ctx.mark_non_differentiable(*(out[name] for name in ("prev_sample", "std", "residual", "numbers")))
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, _prev_sample, grad_log_prob, grad_mean, *_others):
    grads = dict.fromkeys(_ARGUMENTS)
    if grad_log_prob is not None or grad_mean is not None:
        dtypes = _wanted_dtypes(ctx)
        made = torch.ops.flowdppo_ops.sde_step_backward(grad_log_prob, grad_mean, *_saved(ctx), *dtypes)
        for name, grad, dtype in zip(("model_output", "uncond_output"), made, dtypes, strict=True):
            grads[name] = None if dtype is None else grad
    return tuple(grads.values())


torch.library.register_autograd("flowdppo_ops::sde_step", _registered_backward, setup_context=_setup_context)
