"""What both operators share: which calls bypass the dispatcher, what is refused, saved tensors, and schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Both are private to PyTorch and may disappear. Without the first every call goes through the dispatcher; without the
# second a `torch.func` transform is not recognised.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_plain(values: Iterable[Any]) -> bool:
    """Whether a call may bypass the dispatcher: all tensors are of PyTorch's own classes, and no dispatch mode is
    active. Subclasses and modes must see the operator. A `FakeTensor` has no memory, although its device may be cpu."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        return False
    return all(type(value) in (Tensor, torch.nn.Parameter) for value in values if isinstance(value, Tensor))


def refuse_transforms(where: str, values: Iterable[Any]) -> None:
    """Raises NotImplementedError under `torch.func` transforms and for tensors with a forward-mode tangent: without
    this their derivative would silently be 0 or None."""
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
        f"{where}: {what} not supported, only reverse mode once; flowdppo_ops.reference.{name} supports all of these"
    )


def refuse_second_derivatives(backward: str, where: str) -> None:
    """Makes differentiating the operator `backward` raise NotImplementedError."""
    torch.library.register_autograd(backward, lambda ctx, *grads: not_supported(where, "second derivatives are"))


class OnceDifferentiable(torch.autograd.Function):
    """Runs a backward under `create_graph=True`, where `tensors` are the inputs. Differentiating the result raises;
    without this a second derivative would silently be 0."""

    @staticmethod
    def forward(ctx: Any, where: str, run: Callable[[], tuple], *tensors: Tensor | None) -> tuple:
        ctx.where = where
        return run()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> NoReturn:
        not_supported(ctx.where, "second derivatives are")


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves tensors for the backward. Autograd refuses to save those that were made under `inference_mode`, as rollouts
    are, so `ctx` holds these itself. For them autograd does not check that nobody has written to them since."""
    ctx.unsaved = {at: tensor for at, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if at in ctx.unsaved else tensor for at, tensor in enumerate(tensors)))


def saved(ctx: Any) -> list[Tensor | None]:
    """The tensors that `save` saved."""
    return [ctx.unsaved.get(at, tensor) for at, tensor in enumerate(ctx.saved_tensors)]


def restored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A saved tensor in the dtype that the forward gave it. Hooks (`torch.autograd.graph.saved_tensors_hooks`) may
    return it in another float dtype."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def check_devices(like_name: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError unless all tensors are on one device. Fakes need this check, because the dispatcher calls the
    fake if any tensor is on the meta device."""
    like = arguments[like_name]
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device != like.device:
            raise ValueError(f"flowdppo_ops: {name} is on {value.device}, wanted {like.device}, where {like_name} is")


def arithmetic_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype in which a call computes: float64 if one of its latents and log-probs is float64, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def as_tensors(fields: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Fields with 0-dim float64 tensors in the place of numbers, because the operators' schemas take tensors."""
    return {
        name: value if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float64)
        for name, value in fields.items()
    }


def schema(names: Iterable[str], needed: Iterable[str]) -> str:
    """The text of these tensor arguments in an operator's schema. Those that are not `needed` are optional."""
    return ", ".join(f"Tensor{'' if name in needed else '?'} {name}" for name in names)


def without_none(tensors: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The tensors with empty ones in the place of None, because a schema cannot return an optional tensor."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)
