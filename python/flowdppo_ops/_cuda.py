"""What a call on a GPU needs beside its arrays: device and stream, and memory that the blocks of the forward share."""

from __future__ import annotations

import torch
from torch import Tensor

Target = tuple[int, int]

# (device, stream) -> int32 counters, all 0 whenever no forward runs on that stream: kernels leave them so.
_tickets: dict[Target, Tensor] = {}


def target(tensor: Tensor) -> Target | None:
    """The device's number and the stream that is current there; None for a tensor in the host's memory."""
    if not tensor.is_cuda:
        return None
    device = tensor.device
    return device.index, torch.cuda.current_stream(device).cuda_stream


class Workspace:
    """Addresses and lengths of partial sums (float32, uninitialised) and of tickets (zero), for the native call inside
    the `with`; both from PyTorch's allocator.

    Both are given back while the kernel may still be running: the allocator hands them out again to the same stream
    only, where whatever comes next runs after it. For the same reason the calls of a stream can share their tickets,
    which saves filling new ones with zeros: a launch of 2 us beside kernels of 10 us.

    Two calls must not take the kept tickets. One that is captured into a CUDA graph: the graph may be replayed on any
    stream, beside calls that use them; it gets its own, from the graph's memory, and a fill that is replayed with it.
    And one inside `torch.compile` (`may_keep=False`): its CUDA-graph trees warm up in the graph's memory pool, and
    refuse tensors that stay behind there.
    """

    def __init__(
        self, like: Tensor, target: Target, partials: int, tickets: int, is_capturing: bool, may_keep: bool
    ) -> None:
        """`partials`, `tickets`: their lengths. `is_capturing`: whether the stream is being captured, as the operator
        says."""
        keep = may_keep and not is_capturing
        kept = _tickets.get(target) if keep else None
        if kept is None or kept.numel() < tickets:
            # Kept ones grow by powers of two: no new ones for every batch size.
            kept = like.new_zeros(max(1024, 1 << (tickets - 1).bit_length()) if keep else tickets, dtype=torch.int32)
            if keep:
                _tickets[target] = kept
        self._tensors = like.new_empty(partials, dtype=torch.float32), kept

    def __enter__(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return tuple([(t.data_ptr(), t.numel()) for t in self._tensors])

    def __exit__(self, *_: object) -> None:
        pass
