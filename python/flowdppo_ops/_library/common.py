"""What both operators need: who may take the direct road, and tensors as the native module is given them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._args import row_stride
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


def vector(value: float | Tensor | None, row_shape: tuple[int, ...]) -> float | tuple[int, str, int, int] | None:
    if value is None or isinstance(value, float):
        return value
    return value.data_ptr(), _DTYPE_NAMES[value.dtype], *row_stride(value.shape, row_shape)


def contiguous(values: Iterable) -> list:
    """Anybody may call an operator, with any strides; the direct road has seen to it before."""
    return [FAMILY.contiguous(v) if isinstance(v, Tensor) else v for v in values]
