"""The operator `policy_loss`, behind `loss` and `step_loss`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _cuda, _native
from .._args import Latents, LossCall, Schedule, Settings, Vectors, differentiates_mean
from .common import array, contiguous, is_plain, schedule_tuple, vector

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMS = Schedule._fields[:3]  # sampler, old_form, ref_form
_SCHEDULE_VECTORS = Schedule._fields[3:]


def policy_loss(call: LossCall, process_group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """`(loss, numbers)`; differentiable in `output`, `uncond_output` and `log_prob` through `loss` alone.

    With `process_group` the latents are one shard of several: the rows' sums are added up over its ranks before the
    objective looks at them, in one collective of `4 rows + 1` float64.
    """
    latents, vectors, schedule = call.latents, call.vectors, call.schedule
    if latents.output is None:
        process_group = None  # log-probs alone, which are whole
    if not is_plain((*latents, *vectors, *(schedule[3:] if schedule else ()))):
        return _through_the_dispatcher(call, process_group)
    sums = None
    if process_group is not None:
        sums = _shard_sums(call)
        torch.distributed.all_reduce(sums, group=process_group)
    leaves = latents.output, latents.uncond_output, vectors.log_prob
    if not torch.is_grad_enabled() or not _any_requires_grad(leaves):
        return _forward(call, sums)
    ahead = None if sums is not None else _empty_gradients_ahead(call)
    loss, numbers = _forward(call, sums, ahead)
    return _Eager.apply(*leaves, call, (loss, numbers, ahead)), numbers


def _any_requires_grad(leaves: tuple[Tensor | None, ...]) -> bool:
    return any(leaf is not None and leaf.requires_grad for leaf in leaves)


def _through_the_dispatcher(call: LossCall, process_group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    arguments, sums = operator_arguments(call), None
    if process_group is not None:
        from torch.distributed._functional_collectives import all_reduce  # traceable, unlike the one in place

        sums = all_reduce(torch.ops.flowdppo_ops.policy_loss_shard_sums(*arguments), "sum", process_group)
    return torch.ops.flowdppo_ops.policy_loss(*arguments, sums)


def operator_arguments(call: LossCall) -> tuple:
    """Of the registered operators, whose schema knows tensors and plain settings; no sampler: there is no schedule."""
    schedule, like = call.schedule, call.vectors.advantages
    vectors = *call.vectors, *(schedule[3:] if schedule else (None,) * len(_SCHEDULE_VECTORS))
    tensors = [like.new_full((), v, dtype=torch.float64) if isinstance(v, float) else v for v in vectors]
    return *call.latents, *tensors, *(schedule[:3] if schedule else ("", "mean", "mean")), *call.settings


class _Saved(NamedTuple):
    """What the backward is told beside the tensors."""

    forms: tuple[str, str] | None
    log_prob_like: tuple[torch.Size, torch.dtype] | None


def _saved(call: LossCall) -> _Saved:
    log_prob, schedule = call.vectors.log_prob, call.schedule
    return _Saved(
        None if schedule is None else schedule[1:3], None if log_prob is None else (log_prob.shape, log_prob.dtype)
    )


def _read_by_backward(call: LossCall) -> Latents:
    latents, objective = call.latents, call.settings.objective
    return latents._replace(
        output=latents.output if differentiates_mean(latents, objective) else None,
        old=latents.old if objective == "grpo_guard" else None,
    )


# ---- the native calls ----------------------------------------------------------------------------------------------


def _fields(has_schedule: bool) -> int:
    return _native.STEP_FIELDS if has_schedule else _native.FIELDS


def _latent_elements(latents: Latents, rows: int) -> int:
    output = latents.output
    return 0 if output is None else output.numel() // rows


def _forward(
    call: LossCall,
    sums: Tensor | None = None,
    ahead: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    operator: bool = False,
) -> tuple[Tensor, Tensor]:
    """`sums`: every row's, of all shards. `ahead`: where the gradients go, if they are wanted already. `operator`:
    called through the dispatcher, where no tensor may outlive the call."""
    advantages = call.vectors.advantages
    loss, numbers = _empty_outputs(advantages, call.double, call.settings.reduction, call.schedule is not None)
    out, sums_at = (loss.data_ptr(), numbers.data_ptr()), None if sums is None else sums.data_ptr()
    target, arguments = _cuda.target(advantages), _arguments(call)
    if target is None:
        gradients = None if ahead is None else (array(ahead[0]), array(ahead[1]))
        _native.policy_loss_forward(
            *arguments[:5], call.double, *arguments[5:], out, gradients, sums_at, torch.get_num_threads()
        )
    else:
        with _workspace(call, target, not operator) as workspace:
            _native.policy_loss_forward_cuda(target, *arguments, out, sums_at, *workspace)
    return loss, numbers


def _shard_sums(call: LossCall, *, operator: bool = False) -> Tensor:
    """Of this shard: `[rows, 4]` and the elements of a row, flat, float64."""
    sums = _empty_sums(call.vectors.advantages)
    target, arguments = _cuda.target(sums), _arguments(call)
    if target is None:
        _native.policy_loss_shard_sums(
            *arguments[:5], call.double, *arguments[5:], sums.data_ptr(), torch.get_num_threads()
        )
    else:
        with _workspace(call, target, not operator) as workspace:
            _native.policy_loss_shard_sums_cuda(target, *arguments, sums.data_ptr(), *workspace)
    return sums


def _arguments(call: LossCall) -> tuple:
    """arrays, vectors, schedule, rows, numel, objective, options: of every forward."""
    latents, settings, row_shape = call.latents, call.settings, call.row_shape
    rows = math.prod(row_shape)
    return (
        tuple([array(t) for t in latents]),
        tuple([vector(v, rows, row_shape) for v in call.vectors]),
        None if call.schedule is None else schedule_tuple(call.schedule, rows, row_shape),
        rows,
        _latent_elements(latents, rows),
        settings[:8],
        settings[8:],
    )


def _workspace(call: LossCall, target: _cuda.Target, may_keep: bool) -> _cuda.Workspace:
    settings, advantages = call.settings, call.vectors.advantages
    rows = advantages.numel()
    needs_batch_means = settings.objective == "grpo_guard" and not settings.per_row_scale
    numel = _latent_elements(call.latents, rows)
    partials, is_capturing = _native.policy_loss_workspace_cuda(target, rows, numel, needs_batch_means)
    return _cuda.Workspace(advantages, target, partials, rows + 1, is_capturing, may_keep)


def _empty_outputs(advantages: Tensor, double: bool, reduction: str, has_schedule: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if double else torch.float32
    loss = advantages.new_empty(advantages.shape if reduction == "none" else (), dtype=dtype)
    return loss, advantages.new_empty(advantages.numel() * _fields(has_schedule) + _native.BATCH_LEN, dtype=dtype)


def _empty_sums(advantages: Tensor) -> Tensor:
    return advantages.new_empty(4 * advantages.numel() + 1, dtype=torch.float64)


def _empty_gradients_ahead(call: LossCall) -> tuple[Tensor | None, Tensor | None] | None:
    """Memory for the gradients of the latents, where the forward does well to form them along with the loss.

    On the CPU alone, where the gradient of a whole batch is a second pass over memory that the caches could save; with
    the batch's divisor known beforehand and one `grad_loss` for all rows.
    """
    output, uncond, sample, prev_sample, _, _ = call.latents
    if (
        prev_sample is None
        or not _any_requires_grad((output, uncond))
        or call.settings.reduction not in ("mean", "sum")
        or _cuda.target(output) is not None
    ):
        return None
    rows = call.vectors.advantages.numel()
    row_bytes = sum([t.nbytes for t in (output, uncond, sample, prev_sample) if t is not None]) // rows
    if not _native.policy_loss_gradient_ahead(rows, row_bytes):
        return None
    return tuple([torch.empty_like(t) if t is not None and t.requires_grad else None for t in (output, uncond)])


def _backward(
    grad_loss: Tensor,
    numbers: Tensor,
    latents: Latents,
    forms: tuple[str, str] | None,
    wants: tuple[bool, bool, bool],
    memory: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `output` and `uncond_output`, in their dtypes, and of `log_prob`, flat, in the arithmetic dtype.

    `memory`: for the first two, where there is some already.
    """
    rows = (numbers.numel() - _native.BATCH_LEN) // _fields(forms is not None)
    grad_loss = grad_loss.contiguous()  # held by its name until Rust has read it: autograd hands down expanded scalars
    grad_output, grad_uncond = [
        None if not wanted else torch.empty_like(like) if given is None else given
        for wanted, like, given in zip(wants[:2], latents[:2], memory, strict=True)
    ]
    grad_log_prob = numbers.new_empty(rows) if wants[2] else None
    arrays, numel = tuple([array(t) for t in latents]), _latent_elements(latents, rows)
    arguments = arrays, forms, vector(grad_loss, rows), numbers.data_ptr(), rows, numel
    out = (array(grad_output), array(grad_uncond)), array(grad_log_prob)
    target = _cuda.target(numbers)
    if target is None:
        _native.policy_loss_backward(*arguments, numbers.dtype == torch.float64, *out, torch.get_num_threads())
    else:
        _native.policy_loss_backward_cuda(target, *arguments, *out)
    return grad_output, grad_uncond, grad_log_prob


def _as_log_prob(grad_log_prob: Tensor, saved: _Saved) -> Tensor:
    shape, dtype = saved.log_prob_like
    return grad_log_prob.view(shape).to(dtype)


class _Eager(torch.autograd.Function):
    """Ties the loss, already computed, to its inputs. The numbers stay outside: a second output costs 2 us."""

    @staticmethod
    def forward(ctx, output, uncond_output, log_prob, call, results):
        loss, numbers, ctx.gradients_ahead = results
        ctx.save_for_backward(numbers, *_read_by_backward(call))
        ctx.saved = _saved(call)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if not torch.is_grad_enabled():
            return _eager_backward(ctx, grad_loss)
        # A graph of the backward is being built: differentiating it must fail, also where `grad_loss` is a constant.
        return _differentiable_once(ctx, grad_loss if grad_loss.requires_grad else grad_loss.detach().requires_grad_())


def _eager_backward(ctx, grad_loss):
    numbers, *tensors = ctx.saved_tensors
    # Handed out once: whoever gets them may write to them.
    ahead, ctx.gradients_ahead = ctx.gradients_ahead, None
    if ahead is not None:
        scale = grad_loss.item()
        if scale == 1:
            return *ahead, None, None, None
        # Half precision would be rounded twice, and a blocked row's zeros must not become 0 * inf.
        if math.isfinite(scale) and all(t is None or t.dtype.itemsize >= 4 for t in ahead):
            return *[None if t is None else t.mul_(scale) for t in ahead], None, None, None
    latents, saved = Latents(*tensors), ctx.saved
    wants_output, wants_uncond, wants_log_prob, _, _ = ctx.needs_input_grad
    wants = wants_output and latents.output is not None, wants_uncond, wants_log_prob
    memory = ahead or (None, None)
    grad_output, grad_uncond, grad_log_prob = _backward(grad_loss, numbers, latents, saved.forms, wants, memory)
    grad_log_prob = None if grad_log_prob is None else _as_log_prob(grad_log_prob, saved)
    return grad_output, grad_uncond, grad_log_prob, None, None


_differentiable_once = once_differentiable(_eager_backward)


# ---- the registered operators --------------------------------------------------------------------------------------

_LATENTS = ", ".join(f"Tensor? {name}" for name in Latents._fields)
_VECTORS = "Tensor advantages, " + ", ".join(f"Tensor? {name}" for name in Vectors._fields[1:] + _SCHEDULE_VECTORS)
_SETTINGS = (
    "str sampler, str old_form, str ref_form, str objective, float low, float high, float adv_clip_max, str mask, "
    "str kl_divisor, bool keep_nan_kl, bool per_row_scale, str density, str latent_reduction, str reduction, "
    "float ref_kl_weight"
)
_TENSORS = Latents._fields + Vectors._fields + _SCHEDULE_VECTORS
_ARGUMENTS = _TENSORS + _FORMS + Settings._fields

torch.library.define("flowdppo_ops::policy_loss_shard_sums", f"({_LATENTS}, {_VECTORS}, {_SETTINGS}) -> Tensor")
torch.library.define(
    "flowdppo_ops::policy_loss",
    f"({_LATENTS}, {_VECTORS}, {_SETTINGS}, Tensor? shard_sums) -> (Tensor loss, Tensor numbers)",
)
# A schema cannot return an optional tensor: what is not wanted comes back empty. No `old_form`: there is no schedule.
torch.library.define(
    "flowdppo_ops::policy_loss_backward",
    f"(Tensor grad_loss, Tensor numbers, {_LATENTS}, str old_form, str ref_form, bool wants_output, bool wants_uncond, "
    "bool wants_log_prob) -> (Tensor grad_output, Tensor grad_uncond, Tensor grad_log_prob)",
)


def _call(args: tuple) -> LossCall:
    """Anybody may call an operator, with any strides; the direct road has seen to it before."""
    tensors = dict(zip(_TENSORS, contiguous(args[: len(_TENSORS)]), strict=True))
    forms, settings = args[len(_TENSORS) : len(_TENSORS) + 3], Settings(*args[len(_TENSORS) + 3 :])
    latents = Latents(*[tensors[name] for name in Latents._fields])
    vectors = Vectors(*[tensors[name] for name in Vectors._fields])
    schedule = Schedule(*forms, *[tensors[name] for name in _SCHEDULE_VECTORS]) if forms[0] else None
    wide = (*latents, vectors.log_prob, vectors.old_log_prob)
    double = any(t is not None and t.dtype == torch.float64 for t in wide)
    return LossCall(tuple(vectors.advantages.shape), latents, vectors, schedule, settings, double)


@torch.library.impl("flowdppo_ops::policy_loss_shard_sums", ("cpu", "cuda"))
def _policy_loss_shard_sums(*args):
    return _shard_sums(_call(args), operator=True)


@torch.library.register_fake("flowdppo_ops::policy_loss_shard_sums")
def _policy_loss_shard_sums_fake(*args):
    return _empty_sums(args[len(Latents._fields)])


def _shard_sums_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output)  # the gradient is `policy_loss`'s, which takes the same latents


torch.library.register_autograd(
    "flowdppo_ops::policy_loss_shard_sums",
    lambda ctx, _: (None,) * len(_ARGUMENTS),
    setup_context=_shard_sums_context,
)


@torch.library.impl("flowdppo_ops::policy_loss", ("cpu", "cuda"))
def _policy_loss(*args):
    *args, sums = args
    return _forward(_call(args), sums, operator=True)


@torch.library.register_fake("flowdppo_ops::policy_loss")
def _policy_loss_fake(*args):
    call = _call(args[:-1])
    return _empty_outputs(call.vectors.advantages, call.double, call.settings.reduction, call.schedule is not None)


@torch.library.impl("flowdppo_ops::policy_loss_backward", ("cpu", "cuda"))
def _policy_loss_backward(grad_loss, numbers, *args):
    *latents, old_form, ref_form, wants_output, wants_uncond, wants_log_prob = args
    forms, wants = (old_form, ref_form) if old_form else None, (wants_output, wants_uncond, wants_log_prob)
    grads = _backward(grad_loss, numbers.contiguous(), Latents(*contiguous(latents)), forms, wants)
    return tuple(numbers.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("flowdppo_ops::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, numbers, *args):
    output, uncond, *_, old_form, _, wants_output, wants_uncond, wants_log_prob = args
    rows = (numbers.numel() - _native.BATCH_LEN) // _fields(bool(old_form))
    return (
        torch.empty_like(output) if wants_output else numbers.new_empty(0),
        torch.empty_like(uncond) if wants_uncond else numbers.new_empty(0),
        numbers.new_empty(rows if wants_log_prob else 0),
    )


def _setup_context(ctx, inputs, output):
    call, numbers = _call(inputs[:-1]), output[1]
    ctx.save_for_backward(numbers, *_read_by_backward(call))
    ctx.saved = _saved(call)
    ctx.mark_non_differentiable(numbers)
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, grad_loss, _grad_numbers):
    grads = dict.fromkeys((*_ARGUMENTS, "shard_sums"))
    if grad_loss is not None:
        numbers, *tensors = ctx.saved_tensors
        wanted = dict(zip(grads, ctx.needs_input_grad, strict=True))
        wants = wanted["output"] and tensors[0] is not None, wanted["uncond_output"], wanted["log_prob"]
        found = torch.ops.flowdppo_ops.policy_loss_backward(
            grad_loss, numbers, *tensors, *(ctx.saved.forms or ("", "")), *wants
        )
        for name, wants_it, grad in zip(("output", "uncond_output", "log_prob"), wants, found, strict=True):
            if wants_it:
                grads[name] = _as_log_prob(grad, ctx.saved) if name == "log_prob" else grad
    return tuple(grads.values())


torch.library.register_autograd("flowdppo_ops::policy_loss", _registered_backward, setup_context=_setup_context)
