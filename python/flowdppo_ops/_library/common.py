"""What both operators need: who may take the direct road, and tensors as the native module is given them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._args import Schedule, row_stride
from .._torch import FAMILY

_DTYPE_NAMES = FAMILY.dtypes


def is_plain(values: Iterable[float | Tensor | None]) -> bool:
    """Whether the direct road is open: real memory, and nobody watching the dispatcher.

    `FakeTensor.data_ptr()` is 0 and its device says cpu; subclasses and modes must see the operator. A lazily negated
    view (`z.conj().imag`) is contiguous, and its memory has the other sign: the dispatcher resolves it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for value in values:
        if value is None or type(value) is float:
            continue
        if type(value) not in (Tensor, torch.nn.Parameter) or value.is_neg():
            return False
    return not torch._C._are_functorch_transforms_active()


def array(tensor: Tensor | None) -> tuple[int, str] | None:
    return None if tensor is None else (tensor.data_ptr(), _DTYPE_NAMES[tensor.dtype])


def vector(
    value: float | Tensor | None, rows: int, row_shape: tuple[int, ...] | None = None
) -> float | tuple[int, str, int, int] | None:
    """`row_shape`: needed for what has neither one element nor one per row."""
    if value is None or isinstance(value, float):
        return value
    elements = value.numel()
    if elements == rows or elements == 1:
        return value.data_ptr(), _DTYPE_NAMES[value.dtype], 1, elements
    return value.data_ptr(), _DTYPE_NAMES[value.dtype], *row_stride(tuple(value.shape), row_shape)


def schedule_tuple(schedule: Schedule, rows: int, row_shape: tuple[int, ...]) -> tuple:
    """Sampler and forms, then the row vectors."""
    return *schedule[:3], *[vector(v, rows, row_shape) for v in schedule[3:]]


def contiguous(values: Iterable) -> list:
    """Anybody may call an operator, with any strides; the direct road has seen to it before."""
    return [FAMILY.contiguous(v) if isinstance(v, Tensor) else v for v in values]
