"""CPU tensors that pass for a GPU's: to the stand-in driver the host's memory is a device's."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.13 has in mmap


class Gpu:
    """From now on every tensor says that it is on a GPU. To be made before the package's first call, which looks
    `torch.cuda.current_stream` up once and for all.

    target: gives device and stream, or None where tensors are on the CPU after all. tickets: all that were allocated.
    """

    def __init__(self, target: Callable[[], tuple[int, int] | None]) -> None:
        self.target, self.tickets = target, []
        new_zeros = Tensor.new_zeros

        def noted(tensor: Tensor, *size: object, **options: object) -> Tensor:
            self.tickets.append(new_zeros(tensor, *size, **options))
            return self.tickets[-1]

        Tensor.__dlpack_c_exchange_api__ = None  # which would say where the memory is
        Tensor.is_cpu = property(lambda _: self.target() is None)
        Tensor.is_cuda = property(lambda _: self.target() is not None)
        Tensor.get_device = lambda _: self.target()[0]
        Tensor.new_zeros = noted
        # PyTorch's own streams have another id than their handle.
        torch.cuda.current_stream = lambda _: SimpleNamespace(cuda_stream=self.target()[1], stream_id=1)


def on_gpu(device: int = 0, stream: int = 0) -> Gpu:
    return Gpu(lambda: (device, stream))


def memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Address space alone, as large as you like, for calls whose kernel is launched and does not run."""
    count = math.prod(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    pages = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype, count=max(count, 1))[:count].view(shape)


@contextlib.contextmanager
def outputs_off(elements: int) -> Iterator[None]:
    """Latents that the package allocates begin so many elements off a multiple of 64 bytes."""
    before = Tensor.new_empty, torch.empty_like

    def new_empty(like: Tensor, *shape: int | tuple[()], dtype: torch.dtype) -> Tensor:
        shape = () if shape == ((),) else shape
        off = elements if len(shape) > 1 else 0
        return before[0](like, math.prod(shape) + off, dtype=dtype)[off:].view(shape)

    Tensor.new_empty, torch.empty_like = new_empty, lambda like: new_empty(like, *like.shape, dtype=like.dtype)
    try:
        yield
    finally:
        Tensor.new_empty, torch.empty_like = before


@contextlib.contextmanager
def unreadable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Whoever reads one of these, made by `memory`, ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)

    def protect(access: int) -> None:
        for tensor in tensors:
            assert libc.mprotect(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), access) == 0

    tensors = list(tensors)
    protect(0)  # PROT_NONE
    try:
        yield
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)


def without_memory() -> list[Tensor]:
    """What the package allocates from now on is address space too; all of it, as it comes."""
    made: list[Tensor] = []

    def new_empty(_: Tensor, *shape: int | tuple[()], dtype: torch.dtype) -> Tensor:
        tensor = memory(*(() if shape == ((),) else shape), dtype=dtype)
        if tensor.numel() != 1:  # what a call's outputs are made like
            made.append(tensor)
        return tensor

    def empty_like(like: Tensor) -> Tensor:
        made.append(memory(*like.shape, dtype=like.dtype))
        return made[-1]

    Tensor.new_empty, torch.empty_like = new_empty, empty_like
    return made
