"""What both operators need: who may be called directly, what is not supported, and the parts of a schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Private, so looked up with care: without them every call goes through the dispatcher.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_plain(values: Iterable[Any]) -> bool:
    """Whether a call may pass the dispatcher by: real memory, and nobody watching. `FakeTensor.data_ptr()` is 0 and its
    device says cpu; subclasses and modes must see the operator."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    return all(type(value) in (Tensor, torch.nn.Parameter) for value in values if isinstance(value, Tensor))


def refuse_transforms(where: str, values: Iterable[Any]) -> None:
    """Of what would give 0 or None instead of a derivative."""
    if torch.compiler.is_compiling():
        return
    if _functorch_is_active():
        not_supported(where, "torch.func transforms are")
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            not_supported(where, "forward-mode differentiation is")


def not_supported(where: str, what: str) -> NoReturn:
    name = where.rpartition(".")[2]
    raise NotImplementedError(
        f"{where}: {what} not supported, reverse mode once is; flowdppo_ops.reference.{name} has them all"
    )


class Once(torch.autograd.Function):
    """A backward whose graph is being built (`create_graph=True`): the result depends on `tensors`, and differentiating
    it must fail rather than give 0."""

    @staticmethod
    def forward(ctx: Any, where: str, run: Callable[[], tuple], *tensors: Tensor | None) -> tuple:
        ctx.where = where
        return run()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> NoReturn:
        not_supported(ctx.where, "second derivatives are")


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For the backward. Autograd refuses to save what was made under `inference_mode`, as rollouts are: that is kept
    beside, which loses nothing but the check that nobody writes to it."""
    ctx.kept = {at: tensor for at, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if at in ctx.kept else tensor for at, tensor in enumerate(tensors)))


def saved(ctx: Any) -> list[Tensor | None]:
    return [ctx.kept.get(at, tensor) for at, tensor in enumerate(ctx.saved_tensors)]


def restored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the forward left, which a hook may have given back in another float dtype."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_devices(like_name: str, arguments: dict[str, Any]) -> None:
    """In a fake: the dispatcher takes a call for it as soon as one tensor is on the meta device."""
    like = arguments[like_name]
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device != like.device:
            raise ValueError(f"flowdppo_ops: {name} is on {value.device}, wanted {like.device}, where {like_name} is")


def as_tensors(fields: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """An operator's schema knows tensors alone: numbers become 0-dim ones."""
    return {
        name: value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)
        for name, value in fields.items()
    }


def schema(names: Iterable[str], needed: Iterable[str]) -> str:
    """Tensor arguments; those that are not `needed` are optional."""
    return ", ".join(f"Tensor{'' if name in needed else '?'} {name}" for name in names)


def without_none(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """A schema cannot return an optional tensor: what is not made comes back empty."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)
