"""What the Triton rivals have in common: a row's share of the programs, sums that the last program ends, and tuning.

A row is split over SPLITS programs. Each leaves its sums in `partials`; the program that draws the last ticket adds
them up in a fixed order. A second kernel for that would cost a launch (1 to 2 us inside a CUDA graph) beside a forward
of 3 us. The tickets are shared by all calls on a device: one stream at a time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 256
_EPILOGUE_TILE = 4096  # partials that the last program adds up at once: 32 a thread

# Blocks of 8 to 32 elements a thread: 1 to 8 loads of 16 bytes in flight per tensor. STAGES 3 loads ahead through
# shared memory (cp.async), 1 leaves that to the occupancy. `worthwhile` leaves 24 of them for a size; to compile one
# takes 0.4 s of cold start.
SPLIT = [
    triton.Config({"BLOCK": block, "SPLITS": splits, "STAGES": stages}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8))
    for stages in (1, 3)
    for splits in (1, 2, 4, 8, 16, 32, 64, 128, 256)
]
BLOCKS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
]
# L2-cold, as Triton's own; for a third of its time, as 24 candidates of 125 ms each are 3 s of cold start.
_TIMED = functools.partial(triton.testing.do_bench, warmup=10, rep=30)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU nothing can be tuned: the first one is taken


def worthwhile(configs, arguments, **_):
    """Keeps the splits that make one, two or four programs per multiprocessor, none of them without work."""
    rows, numel = arguments["rows"], arguments["numel"]
    processors = torch.cuda.get_device_properties(arguments["partials"].device).multi_processor_count

    def wanted(config) -> set[int]:
        most = min(MAX_SPLITS, _power_of_2_up_to(triton.cdiv(numel, config.kwargs["BLOCK"])))
        return {min(most, _power_of_2_up_to(max(1, waves * processors // rows))) for waves in (1, 2, 4)}

    return [config for config in configs if config.kwargs["SPLITS"] in wanted(config)]


def _power_of_2_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def tuned(configs: list[triton.Config], *flags: str) -> Callable:
    """Decorator: the best of SPLIT or BLOCKS for each number and length of rows, and value of the constants `flags`.

    Triton tells the dtypes of the arguments apart by itself.
    """
    return triton.autotune(
        configs=configs[:1] if _INTERPRETED else configs,
        key=["rows", "numel", *flags],
        prune_configs_by={"early_config_prune": worthwhile} if configs is SPLIT else None,
        do_bench=_TIMED,
    )


@triton.jit
def flow_sde(sigma, sigma_next, noise_level, sigma_max):
    """`a`, `b` and the variance of a step; its mean is `a` times the sample and `b` times the model's output."""
    dt = sigma_next - sigma
    q_squared = noise_level * noise_level * sigma / (1.0 - tl.where(sigma == 1.0, sigma_max, sigma))
    a = 1.0 + q_squared / (2.0 * sigma) * dt
    b = (1.0 + q_squared * (1.0 - sigma) / (2.0 * sigma)) * dt
    return a, b, -q_squared * dt


@triton.jit
def share(program, numel, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Row, its first element, and the columns from begin to end that are this program's: whole blocks but for the
    row's last."""
    row, split = program // SPLITS, program % SPLITS
    span = tl.cdiv(tl.cdiv(numel, SPLITS), BLOCK) * BLOCK
    begin = split * span
    return row, row.to(tl.int64) * numel, begin, tl.minimum(begin + span, numel)


@triton.jit
def is_last(ticket, programs):
    """Whether all other programs have stored their partials."""
    tl.debug_barrier()  # the ticket is drawn by one thread: the others' stores must have been made before it
    return tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1


@triton.jit
def summed(partials, row, here, SPLITS: tl.constexpr):
    """`[tile]`: the sum of each row's partials, 0 where not `here`."""
    at = row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    # .cg: from the L2, where the other multiprocessors' stores are
    return tl.sum(tl.load(partials + at, mask=here[:, None], other=0.0, cache_modifier=".cg"), axis=1)


@functools.cache
def ticket_of(device: torch.device) -> Tensor:
    """`[1]` int32, 0 before and after every launch."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def tile_rows(rows: int) -> int:
    """How many rows the last program takes at once."""
    return min(triton.next_power_of_2(rows), _EPILOGUE_TILE // MAX_SPLITS)


def need_contiguous(*latents: Tensor | None) -> None:
    if not all(one is None or one.is_contiguous() for one in latents):
        raise ValueError("the Triton rivals take contiguous latents only")


class Schedule(NamedTuple):
    sigma: Tensor  # [rows] fp32
    sigma_next: Tensor
    noise_level: float
    sigma_max: float
