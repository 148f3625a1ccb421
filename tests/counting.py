"""What a call asks of a device, counted at PyTorch's dispatcher: the same on a CPU, where there is nothing to launch.

An operator that does device work is one launch or more, an `.item()` is a wait. Nothing is estimated: a dispatch mode
sees every operator of forward and backward, with the tensors that go in and come out. It sees none inside a compiled
graph or a Triton kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result the host must have before it can go on, and methods that never reach the dispatcher on a CPU.
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


def _is_like(name: str) -> bool:
    """Takes a tensor for its shape, dtype or device, and does not read it."""
    return name.endswith("_like") or name.startswith("aten::new_")


class Counts(NamedTuple):
    """Of one call. Latent-sized: with as many elements in memory as the latents."""

    ops: int  # operators that do device work: no views, no allocations
    latent_ops: int  # of them, those with a latent-sized tensor
    host_syncs: int  # values that the host waits for
    latent_allocations: int  # latent-sized tensors that did not exist before, the gradient included
    bytes_moved: int  # of everything that goes into and comes out of the latent operators


def count(call: Callable[[], Any], latent_elements: int) -> Counts:
    """`call` is made once, with the dispatcher watched.

    Operators of this package then take their registered form, where a Python number of a schedule becomes a 0-dim
    tensor: an operator each, on no latents, that a call without a watcher does not have.
    """
    with _Waits() as waits, _Watch(latent_elements) as watch:
        call()
    return Counts(watch.ops, watch.latent_ops, watch.waits + waits.reads, watch.allocations, watch.bytes)


class _Waits(TorchFunctionMode):
    reads = 0

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        if function in _READS:
            self.reads += 1
        return function(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    def __init__(self, latent_elements: int):
        super().__init__()
        self._latent_elements = latent_elements
        self.ops = self.latent_ops = self.waits = self.allocations = self.bytes = 0

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        went_in, came_out = _tensors((args, kwargs)), _tensors(result)
        known = {_memory(tensor) for tensor in went_in}
        fresh = [tensor for tensor in came_out if _memory(tensor) not in known]
        self.allocations += sum(_elements(tensor) >= self._latent_elements for tensor in fresh)
        name = operator._schema.name
        writes = operator._schema.is_mutable
        if name in _ALLOCATIONS or (came_out and not fresh and not writes):  # a view, or memory with nothing in it
            return result
        self.ops += 1
        self.waits += name in _WAITS
        moved = came_out if _is_like(name) else went_in + came_out
        if any(_elements(tensor) >= self._latent_elements for tensor in moved):
            self.latent_ops += 1
            self.bytes += sum(_elements(tensor) * tensor.element_size() for tensor in moved)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _elements(tensor: Tensor) -> int:
    """In memory: a row expanded over the latents is a row."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
