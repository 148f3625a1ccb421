"""The Flow-DPPO loss in Triton, from the mean or from the model's output: the strongest alternative we could write.

For a row of `N` latent elements, with `mu` the new mean, `mu°` the old, `x'` the next sample, `A` the advantage:

    d = mean (mu - mu°)^2       p = mean (mu - mu°)(x' - mu°)       kl = d / (2 std^2)
    ratio = exp((p - d / 2) / std^2)
    blocked = not (kl < threshold) and ((ratio > 1 and A > 0) or (ratio < 1 and A < 0))
    loss = mean over rows of (0 if blocked else -A ratio)
    d loss / d mu_j = c (x'_j - mu_j),   c = 0 if blocked else -A ratio / (rows N std^2)

With STEP the mean is that of Flow-SDE, `mu = a x + b v`, formed from the model's output `v` and the sample `x` as they
are read; `a`, `b` and `std` come from the row's sigmas in every program, and the gradient is multiplied by `b`.

A row is split over SPLITS programs. Forward, one launch: each program leaves its sums of d and p in `partials`, and the
program that draws the last ticket adds them up in a fixed order and ends with the loss. A second kernel for that would
cost a launch, 1 to 2 us inside a CUDA graph, beside a forward of 3 us.
Backward, one launch: reads `mu` (or `v` and `x`) and `x'`, writes the gradient in the dtype of `mu` or `v`; a blocked
row is written without being read.

For the benches alone. Against `flowdppo_ops` it leaves out log-prob, ratio, KL and mask of a row, all metrics, every
check and every option. It needs contiguous latents, and one stream at a time: all calls on a device share the ticket.
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

# ---- shared with triton_sde_step.py: how a row is split, how its sums meet, which configurations are tried ----------

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


# ---- the loss -------------------------------------------------------------------------------------------------------


@tuned(SPLIT, "STEP")
@triton.jit
def _forward_kernel(
    source,  # [rows, numel] fp32, bf16 or fp16, as the next three: mean, or with STEP the model's output
    sample,  # read with STEP alone
    prev_sample,
    old_mean,
    advantages,  # [rows] fp32
    std,  # [rows] fp32; read without STEP alone
    sigma,  # [rows] fp32; this and the next three are read with STEP alone
    sigma_next,
    noise_level,
    sigma_max,
    threshold,
    loss,  # [1] fp32, out
    coefficients,  # [rows] fp32, out: c, and with STEP b c
    partials,  # [2, rows, SPLITS] fp32, workspace
    ticket,  # [1] int32, 0 before and after
    rows,
    numel,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    program = tl.program_id(0)
    row, base, begin, end = share(program, numel, BLOCK, SPLITS)
    if STEP:
        a, b, _ = flow_sde(tl.load(sigma + row), tl.load(sigma_next + row), noise_level, sigma_max)

    drift_squared = tl.zeros([BLOCK], dtype=tl.float32)
    drift_innovation = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = column < numel  # a span ends at a block's end, only the row can end earlier
        mu = tl.load(source + base + column, mask=inside, other=0.0).to(tl.float32)
        if STEP:
            mu = a * tl.load(sample + base + column, mask=inside, other=0.0).to(tl.float32) + b * mu
        old = tl.load(old_mean + base + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(prev_sample + base + column, mask=inside, other=0.0).to(tl.float32)
        drift = mu - old
        drift_squared += drift * drift
        drift_innovation += drift * (x - old)
    tl.store(partials + program, tl.sum(drift_squared, axis=0))
    tl.store(partials + rows * SPLITS + program, tl.sum(drift_innovation, axis=0))

    if is_last(ticket, rows * SPLITS):
        total = tl.zeros([TILE_ROWS], dtype=tl.float32)
        for first in range(0, rows, TILE_ROWS):
            r = first + tl.arange(0, TILE_ROWS)
            here = r < rows
            d = summed(partials, r, here, SPLITS) / numel
            p = summed(partials + rows * SPLITS, r, here, SPLITS) / numel
            advantage = tl.load(advantages + r, mask=here, other=0.0)
            if STEP:
                now, following = tl.load(sigma + r, mask=here, other=0.5), tl.load(sigma_next + r, mask=here, other=0.0)
                _shift, slope, variance = flow_sde(now, following, noise_level, sigma_max)
            else:
                deviation = tl.load(std + r, mask=here, other=1.0)
                slope, variance = 1.0, deviation * deviation

            ratio = tl.exp((p - 0.5 * d) / variance)
            kl = d / (2.0 * variance)
            low = kl < threshold  # a NaN is high
            away = ((ratio > 1.0) & (advantage > 0.0)) | ((ratio < 1.0) & (advantage < 0.0))
            keep = low | (away == 0)
            row_loss = tl.where(keep, -advantage * ratio, 0.0)
            total += tl.where(here, row_loss, 0.0)
            tl.store(coefficients + r, slope * row_loss / (variance * rows * numel), mask=here)
        tl.store(loss, tl.sum(total, axis=0) / rows)
        tl.store(ticket, 0)


@tuned(BLOCKS, "STEP")
@triton.jit
def _backward_kernel(
    source,  # as in the forward
    sample,
    prev_sample,
    sigma,
    sigma_next,
    noise_level,
    sigma_max,
    coefficients,  # [rows] fp32
    grad_loss,  # [1] fp32
    grad_source,  # [rows, numel], out
    numel,
    rows,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    per_row = tl.cdiv(numel, BLOCK)
    row = tl.program_id(0) // per_row
    column = (tl.program_id(0) % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = column < numel
    base = row.to(tl.int64) * numel
    coefficient = tl.load(coefficients + row)
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    if coefficient != 0.0:
        coefficient *= tl.load(grad_loss)
        mu = tl.load(source + base + column, mask=inside, other=0.0).to(tl.float32)
        if STEP:
            a, b, _ = flow_sde(tl.load(sigma + row), tl.load(sigma_next + row), noise_level, sigma_max)
            mu = a * tl.load(sample + base + column, mask=inside, other=0.0).to(tl.float32) + b * mu
        x = tl.load(prev_sample + base + column, mask=inside, other=0.0).to(tl.float32)
        grad = coefficient * (x - mu)
    tl.store(grad_source + base + column, grad.to(grad_source.dtype.element_ty), mask=inside)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, sample, prev_sample, old_mean, advantages, std, schedule, threshold):
        rows = advantages.numel()
        numel = source.numel() // rows
        results = torch.empty(1 + rows, dtype=torch.float32, device=source.device)
        loss, coefficients = results[0], results[1:]
        partials = torch.empty(2 * rows * MAX_SPLITS, dtype=torch.float32, device=source.device)
        # What a kernel does not read must be a tensor all the same.
        ctx.step = schedule is not None
        ctx.schedule = schedule or Schedule(advantages, advantages, 0.0, 0.0)
        ctx.sample = source if sample is None else sample

        _forward_kernel[lambda config: (rows * config["SPLITS"],)](
            source,
            ctx.sample,
            prev_sample,
            old_mean,
            advantages,
            advantages if std is None else std,
            *ctx.schedule,
            threshold,
            loss,
            coefficients,
            partials,
            ticket_of(source.device),
            rows,
            numel,
            TILE_ROWS=tile_rows(rows),
            STEP=ctx.step,
        )
        ctx.save_for_backward(source, prev_sample, coefficients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        source, prev_sample, coefficients = ctx.saved_tensors
        rows = coefficients.numel()
        numel = source.numel() // rows
        grad_source = torch.empty_like(source)

        latents = (source, ctx.sample, prev_sample)
        _backward_kernel[lambda config: (rows * triton.cdiv(numel, config["BLOCK"]),)](
            *latents, *ctx.schedule, coefficients, grad_loss, grad_source, numel, rows, STEP=ctx.step
        )
        return grad_source, *(None,) * 7


def triton_policy_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    std: Tensor,
    threshold: float,
) -> Tensor:
    """Mean Flow-DPPO loss, differentiable in `prev_sample_mean`.

    Latents `[rows, ...]`, contiguous, fp32, bf16 or fp16 each; `advantages` `[rows]` and `std` `[rows, 1, ...]` fp32.
    """
    latents = (prev_sample_mean, None, prev_sample, old_prev_sample_mean)
    need_contiguous(*latents)
    return _PolicyLoss.apply(*latents, advantages, std.reshape(-1), None, threshold)


def triton_step_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_prev_sample_mean: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: float,
    threshold: float,
) -> Tensor:
    """The same from one Flow-SDE step, differentiable in `model_output`. `sigma`, `sigma_next`: `[rows]` fp32."""
    latents = (model_output, sample, prev_sample, old_prev_sample_mean)
    need_contiguous(*latents)
    schedule = Schedule(sigma, sigma_next, noise_level, sigma_max)
    return _PolicyLoss.apply(*latents, advantages, None, schedule, threshold)
