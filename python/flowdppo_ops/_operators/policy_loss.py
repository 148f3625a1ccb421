"""The operator `policy_loss`, behind `loss` and `step_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._checks import Call
from ..result import Layout, PolicyLoss
from . import common

LATENTS = tuple(_native.LATENTS)
FIELDS = LATENTS + tuple(_native.ROW_VECTORS) + tuple(_native.SCHEDULE)


def run_checked(call: Call, memo: _native.PolicyLossMemo, arguments: tuple) -> PolicyLoss:
    """Runs a checked call of `loss` or `step_loss`. The memo will recognise the next call with these arguments'
    metadata, unless the call goes through the dispatcher or has a process group."""
    fields = call.fields
    common.refuse_transforms(call.where, fields.values())
    # Without latents nothing is sharded: every rank has all log-probs.
    group = call.process_group if any(name in fields for name in LATENTS) else None
    if not common.is_plain(fields.values()):
        loss, numbers = _through_the_dispatcher(call, group)
        has_old = any(name.startswith("old_") for name in fields if name in LATENTS)
        has_ref = any(name.startswith("ref_") for name in fields if name in LATENTS)
        return PolicyLoss(loss, numbers, Layout(call.row_shape, has_old, has_ref))
    if group is not None:
        native = _native.PolicyLossCall(fields, call.settings)
        sums = native.shard_sums()
        torch.distributed.all_reduce(sums, group=group)
        return memo.run(native, sums)
    if call.objective._native is None:
        object.__setattr__(call.objective, "_native", _native.Objective(call.settings))
    return memo.learn(arguments, fields, call.settings)


def memo(names: list[str]) -> _native.PolicyLossMemo:
    """The memo of a public function with these argument names."""
    return _native.PolicyLossMemo(names, _apply, PolicyLoss)


class _Loss(torch.autograd.Function):
    """Ties the loss, already computed, to what it is differentiated in: `output` (`prev_sample_mean` or
    `model_output`), `uncond_output` and `log_prob`. The row numbers are not an output: a second output costs 2 us."""

    @staticmethod
    def forward(ctx, output, uncond_output, log_prob, forward):
        loss, saved, ctx.state = forward
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if not torch.is_grad_enabled():
            return _gradients(ctx, grad_loss)
        return common.OnceDifferentiable.apply(
            "flowdppo_ops.loss", lambda: _gradients(ctx, grad_loss), grad_loss, *ctx.saved_tensors
        )

    @staticmethod
    def jvp(ctx, *_tangents):
        common.not_supported("flowdppo_ops.loss", "forward-mode differentiation is")


# `Function.apply` without its handling of `torch.func` transforms, which `refuse_transforms` has refused.
_apply = super(torch.autograd.Function, _Loss).apply


def _gradients(ctx, grad_loss: Tensor) -> tuple:
    _, numbers, *tensors = ctx.saved_tensors
    layout, unsaved, unit_gradients = ctx.state
    ctx.state = layout, unsaved, None  # a gradient may be used once: the code that receives it may write to it
    wants = list(ctx.needs_input_grad[:3])
    latents = dict(zip(layout.saved, tensors, strict=True)) | (unsaved or {})
    wants[0] = wants[0] and bool(latents)
    numbers = common.restored(numbers, layout.dtype)
    grads = _native.policy_loss_backward(grad_loss, numbers, latents, wants, unit_gradients)
    grad_output, grad_uncond, grad_log_prob = grads
    if grad_log_prob is not None:
        grad_log_prob = grad_log_prob.view(layout.row_shape)
    return grad_output, grad_uncond, grad_log_prob, None


# ---- the registered operators --------------------------------------------------------------------------------------

_SETTINGS = {
    "objective": "str",
    "kl_mask_threshold": "float",
    "clip_low": "float",
    "clip_high": "float",
    "adv_clip_max": "float",
    "mask": "str",
    "kl_divisor": "str",
    "keep_nan_kl": "bool",
    "per_row_scale": "bool",
    "sampler": "str",
    "density": "str",
    "latent_reduction": "str",
    "reduction": "str",
    "ref_kl_weight": "float",
}
_ARGUMENTS = FIELDS + tuple(_SETTINGS)
_SCHEMA = ", ".join([common.schema(FIELDS, ("advantages",)), *(f"{kind} {name}" for name, kind in _SETTINGS.items())])
_WANTS = ("wants_output", "wants_uncond_output", "wants_log_prob")

torch.library.define("flowdppo_ops::policy_loss_shard_sums", f"({_SCHEMA}) -> Tensor")
torch.library.define("flowdppo_ops::policy_loss", f"({_SCHEMA}, Tensor? shard_sums) -> (Tensor loss, Tensor numbers)")
torch.library.define(
    "flowdppo_ops::policy_loss_backward",
    f"(Tensor grad_loss, Tensor numbers, {common.schema(LATENTS, ())}, {', '.join(f'bool {name}' for name in _WANTS)})"
    " -> (Tensor grad_output, Tensor grad_uncond_output, Tensor grad_log_prob)",
)


def _through_the_dispatcher(call: Call, process_group: Any) -> tuple[Tensor, Tensor]:
    arguments = {**dict.fromkeys(FIELDS), **common.as_tensors(call.fields, call.fields["advantages"]), **call.settings}
    sums = None
    if process_group is not None:
        # `torch.compile` can trace this one; it cannot trace the in-place `torch.distributed.all_reduce`.
        from torch.distributed._functional_collectives import all_reduce

        sums = all_reduce(torch.ops.flowdppo_ops.policy_loss_shard_sums(**arguments), "sum", process_group)
    return torch.ops.flowdppo_ops.policy_loss(**arguments, shard_sums=sums)


def _native_call(args: tuple) -> _native.PolicyLossCall:
    arguments = dict(zip(_ARGUMENTS, args, strict=True))
    fields = {name: arguments[name] for name in FIELDS if arguments[name] is not None}
    return _native.PolicyLossCall(fields, {name: arguments[name] for name in _SETTINGS})


@torch.library.impl("flowdppo_ops::policy_loss_shard_sums", ("cpu", "cuda"))
def _policy_loss_shard_sums(*args):
    return _native_call(args).shard_sums(eager=False)


@torch.library.register_fake("flowdppo_ops::policy_loss_shard_sums")
def _policy_loss_shard_sums_fake(*args):
    common.check_devices("advantages", arguments := dict(zip(_ARGUMENTS, args, strict=True)))
    advantages = arguments["advantages"]
    return advantages.new_empty(4 * advantages.numel() + 1, dtype=torch.float64)


torch.library.register_autograd(
    "flowdppo_ops::policy_loss_shard_sums",
    lambda ctx, _: (None,) * len(_ARGUMENTS),
    # `policy_loss` takes the same latents and gives their gradient.
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
)


@torch.library.impl("flowdppo_ops::policy_loss", ("cpu", "cuda"))
def _policy_loss(*args):
    return tuple(_native_call(args[:-1]).forward(args[-1]))


@torch.library.register_fake("flowdppo_ops::policy_loss")
def _policy_loss_fake(*args):
    arguments = dict(zip(_ARGUMENTS, args[:-1], strict=True))
    common.check_devices("advantages", arguments | {"shard_sums": args[-1]})
    advantages = arguments["advantages"]
    dtype = common.arithmetic_dtype(arguments[name] for name in (*LATENTS, "log_prob", "old_log_prob"))
    fields = _native.FIELDS if arguments["sampler"] == "none" else _native.STEP_FIELDS
    loss = advantages.new_empty(advantages.shape if arguments["reduction"] == "none" else (), dtype=dtype)
    return loss, advantages.new_empty(advantages.numel() * fields + _native.BATCH_LEN, dtype=dtype)


@torch.library.impl("flowdppo_ops::policy_loss_backward", ("cpu", "cuda"))
def _policy_loss_backward(grad_loss, numbers, *args):
    tensors = dict(zip(LATENTS, args, strict=False))
    latents = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    grads = _native.policy_loss_backward(grad_loss, numbers, latents, args[len(LATENTS) :])
    return common.without_none(grads, numbers)


@torch.library.register_fake("flowdppo_ops::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, numbers, *args):
    latents = dict(zip(LATENTS, args, strict=False))
    common.check_devices("numbers", latents | {"numbers": numbers, "grad_loss": grad_loss})
    wants_output, wants_uncond, wants_log_prob = args[len(LATENTS) :]
    is_step = latents["model_output"] is not None
    rows = (numbers.numel() - _native.BATCH_LEN) // (_native.STEP_FIELDS if is_step else _native.FIELDS)
    return (
        torch.empty_like(latents[_output(is_step)]) if wants_output else numbers.new_empty(0),
        torch.empty_like(latents["uncond_output"]) if wants_uncond else numbers.new_empty(0),
        numbers.new_empty(rows if wants_log_prob else 0),
    )


common.refuse_second_derivatives("flowdppo_ops::policy_loss_backward", "flowdppo_ops.loss")


def _output(is_step: bool) -> str:
    return "model_output" if is_step else "prev_sample_mean"


def _setup_context(ctx, inputs, output):
    arguments = dict(zip(_ARGUMENTS, inputs, strict=False))
    is_guard = arguments["objective"] == "grpo_guard"
    has_ref = arguments["ref_prev_sample_mean"] is not None or arguments["ref_model_output"] is not None
    ctx.reads = arguments["prev_sample"] is not None or has_ref or is_guard
    read = [arguments[name] if ctx.reads and (is_guard or not name.startswith("old_")) else None for name in LATENTS]
    common.save(ctx, output[1], *read)
    ctx.dtype = output[1].dtype
    ctx.is_step = arguments["model_output"] is not None
    log_prob = arguments["log_prob"]
    ctx.log_prob_like = None if log_prob is None else (log_prob.shape, log_prob.dtype)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, grad_loss, _grad_numbers):
    grads = dict.fromkeys((*_ARGUMENTS, "shard_sums"))
    if grad_loss is not None:
        needed = dict(zip(grads, ctx.needs_input_grad, strict=True))
        names = (_output(ctx.is_step), "uncond_output", "log_prob")
        wants = [needed[name] and (ctx.reads or name == "log_prob") for name in names]
        numbers, *latents = common.saved(ctx)
        numbers = common.restored(numbers, ctx.dtype)
        found = torch.ops.flowdppo_ops.policy_loss_backward(grad_loss, numbers, *latents, *wants)
        for name, wanted, grad in zip(names, wants, found, strict=True):
            if wanted:
                grads[name] = grad
        if wants[2]:
            shape, dtype = ctx.log_prob_like
            grads["log_prob"] = grads["log_prob"].view(shape).to(dtype)
    return tuple(grads.values())


torch.library.register_autograd("flowdppo_ops::policy_loss", _registered_backward, setup_context=_setup_context)
