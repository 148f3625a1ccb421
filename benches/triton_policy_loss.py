"""The Flow-DPPO loss in Triton: the strongest alternative we could write, for the benches alone.

For a row of `N` latent elements, with `mu` the new mean, `mu°` the old, `x'` the next sample, `A` the advantage:

    d = mean (mu - mu°)^2       p = mean (mu - mu°)(x' - mu°)       kl = d / (2 std^2)
    ratio = exp((p - d / 2) / std^2)
    blocked = not (kl < threshold) and ((ratio > 1 and A > 0) or (ratio < 1 and A < 0))
    loss = mean over rows of (0 if blocked else -A ratio)
    d loss / d mu_j = c (x'_j - mu_j),   c = 0 if blocked else -A ratio / (rows N std^2)

Forward, one launch: a row is split over SPLITS programs, each leaves (sum of d, sum of p) in `partials`; the program
that draws the last ticket adds them up in a fixed order and ends with the loss. A second kernel for that would cost a
launch (1 to 2 us inside a CUDA graph) beside a forward of 3 us. Backward, one launch: reads `mu` and `x'`, writes the
gradient in the dtype of `mu`; a blocked row is written without being read.

Against `flowdppo_ops.loss` it leaves out the log-prob, all metrics, every check and every option. It needs contiguous
latents and one stream at a time (the tickets are shared by all calls on a device).
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 256
_EPILOGUE_TILE = 4096  # partials that the last program adds up at once: 32 a thread

# Blocks of 8 to 32 elements a thread: 1 to 8 loads of 16 bytes in flight per tensor. STAGES 3 loads ahead through
# shared memory (cp.async), 1 leaves that to the occupancy. `_worthwhile` leaves 24 of them for a size; to compile one
# takes 0.4 s of cold start.
_FORWARD = [
    triton.Config({"BLOCK": block, "SPLITS": splits, "STAGES": stages}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8))
    for stages in (1, 3)
    for splits in (1, 2, 4, 8, 16, 32, 64, 128, 256)
]
_BACKWARD = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8))
]
# L2-cold, as Triton's own; for a third of its time, as 24 candidates of 125 ms each are 3 s of cold start.
_TIMED = functools.partial(triton.testing.do_bench, warmup=10, rep=30)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU nothing can be tuned: the first one is taken


def _worthwhile(configs, arguments, **_):
    """Keeps the splits that make one, two or four programs per multiprocessor, none of them without work."""
    rows, numel = arguments["rows"], arguments["numel"]
    processors = torch.cuda.get_device_properties(arguments["mean"].device).multi_processor_count

    def wanted(config) -> set[int]:
        most = min(MAX_SPLITS, _power_of_2_up_to(triton.cdiv(numel, config.kwargs["BLOCK"])))
        return {min(most, _power_of_2_up_to(max(1, waves * processors // rows))) for waves in (1, 2, 4)}

    return [config for config in configs if config.kwargs["SPLITS"] in wanted(config)]


def _power_of_2_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@triton.autotune(
    configs=_FORWARD[:1] if _INTERPRETED else _FORWARD,
    key=["rows", "numel"],
    prune_configs_by={"early_config_prune": _worthwhile},
    do_bench=_TIMED,
)
@triton.jit
def _forward_kernel(
    mean,  # [rows, numel] fp32, bf16 or fp16, as the next two
    old_mean,
    prev_sample,
    advantages,  # [rows] fp32
    std,  # [rows] fp32
    threshold,
    loss,  # [1] fp32, out
    numbers,  # [4, rows] fp32, out: ratio, kl, keep, coefficient
    partials,  # [2, rows, SPLITS] fp32, workspace
    ticket,  # [1] int32, 0 before and after
    rows,
    numel,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    row, split = program // SPLITS, program % SPLITS
    base = row.to(tl.int64) * numel
    span = tl.cdiv(tl.cdiv(numel, SPLITS), BLOCK) * BLOCK
    begin = split * span
    end = tl.minimum(begin + span, numel)

    drift_squared = tl.zeros([BLOCK], dtype=tl.float32)
    drift_innovation = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = column < numel  # a span ends at a block's end, only the row can end earlier
        mu = tl.load(mean + base + column, mask=inside, other=0.0).to(tl.float32)
        old = tl.load(old_mean + base + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(prev_sample + base + column, mask=inside, other=0.0).to(tl.float32)
        drift = mu - old
        drift_squared += drift * drift
        drift_innovation += drift * (x - old)
    tl.store(partials + program, tl.sum(drift_squared, axis=0))
    tl.store(partials + rows * SPLITS + program, tl.sum(drift_innovation, axis=0))

    tl.debug_barrier()  # the ticket is drawn by one thread: the others' stores must have been made before it
    if tl.atomic_add(ticket, 1, sem="acq_rel") == rows * SPLITS - 1:
        total = tl.zeros([TILE_ROWS], dtype=tl.float32)
        for first in range(0, rows, TILE_ROWS):
            r = first + tl.arange(0, TILE_ROWS)
            here = r < rows
            at = r[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
            # .cg: from the L2, where the other multiprocessors' stores are
            d = tl.load(partials + at, mask=here[:, None], other=0.0, cache_modifier=".cg")
            p = tl.load(partials + rows * SPLITS + at, mask=here[:, None], other=0.0, cache_modifier=".cg")
            d = tl.sum(d, axis=1) / numel
            p = tl.sum(p, axis=1) / numel
            advantage = tl.load(advantages + r, mask=here, other=0.0)
            sigma = tl.load(std + r, mask=here, other=1.0)
            variance = sigma * sigma

            ratio = tl.exp((p - 0.5 * d) / variance)
            kl = d / (2.0 * variance)
            low = kl < threshold  # a NaN is high
            away = ((ratio > 1.0) & (advantage > 0.0)) | ((ratio < 1.0) & (advantage < 0.0))
            keep = low | (away == 0)
            row_loss = tl.where(keep, -advantage * ratio, 0.0)
            total += tl.where(here, row_loss, 0.0)
            tl.store(numbers + r, ratio, mask=here)
            tl.store(numbers + rows + r, kl, mask=here)
            tl.store(numbers + 2 * rows + r, keep.to(tl.float32), mask=here)
            tl.store(numbers + 3 * rows + r, row_loss / (variance * rows * numel), mask=here)
        tl.store(loss, tl.sum(total, axis=0) / rows)
        tl.store(ticket, 0)


@triton.autotune(
    configs=_BACKWARD[:1] if _INTERPRETED else _BACKWARD,
    key=["rows", "numel"],
    do_bench=_TIMED,
)
@triton.jit
def _backward_kernel(
    mean,
    prev_sample,
    coefficients,  # [rows] fp32
    grad_loss,  # [1] fp32
    grad_mean,  # [rows, numel], out
    numel,
    rows,
    BLOCK: tl.constexpr,
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
        mu = tl.load(mean + base + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(prev_sample + base + column, mask=inside, other=0.0).to(tl.float32)
        grad = coefficient * (x - mu)
    tl.store(grad_mean + base + column, grad.to(grad_mean.dtype.element_ty), mask=inside)


@functools.cache
def _ticket(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, old_mean, prev_sample, advantages, std, threshold):
        rows = advantages.numel()
        numel = mean.numel() // rows
        results = torch.empty(1 + 4 * rows, dtype=torch.float32, device=mean.device)
        loss, numbers = results[0], results[1:]
        partials = torch.empty(2 * rows * MAX_SPLITS, dtype=torch.float32, device=mean.device)

        def grid(config):
            return (rows * config["SPLITS"],)

        _forward_kernel[grid](
            mean,
            old_mean,
            prev_sample,
            advantages,
            std,
            threshold,
            loss,
            numbers,
            partials,
            _ticket(mean.device),
            rows,
            numel,
            TILE_ROWS=min(triton.next_power_of_2(rows), _EPILOGUE_TILE // MAX_SPLITS),
        )
        ctx.save_for_backward(mean, prev_sample, numbers)
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        return loss, numbers

    @staticmethod
    def backward(ctx, grad_loss, _grad_numbers):
        mean, prev_sample, numbers = ctx.saved_tensors
        rows = numbers.numel() // 4
        numel = mean.numel() // rows
        grad_mean = torch.empty_like(mean)

        def grid(config):
            return (rows * triton.cdiv(numel, config["BLOCK"]),)

        coefficients = numbers[3 * rows :]
        _backward_kernel[grid](mean, prev_sample, coefficients, grad_loss, grad_mean, numel, rows)
        return grad_mean, None, None, None, None, None


def policy_loss_and_numbers(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    std: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """As `triton_policy_loss`, and `[4, rows]`: ratio, kl, keep (1 or 0), gradient coefficient."""
    for latents in (prev_sample_mean, old_prev_sample_mean, prev_sample):
        if not latents.is_contiguous():
            raise ValueError("triton_policy_loss: latents must be contiguous")
    loss, numbers = _PolicyLoss.apply(
        prev_sample_mean, old_prev_sample_mean, prev_sample, advantages, std.reshape(-1), threshold
    )
    return loss, numbers.view(4, -1)


def triton_policy_loss(
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    std: Tensor,
    threshold: float,
) -> Tensor:
    """Mean Flow-DPPO loss, differentiable in `prev_sample_mean`.

    Args:
        prev_sample_mean, old_prev_sample_mean, prev_sample: `[rows, ...]`, contiguous, fp32, bf16 or fp16 each.
        advantages: `[rows]` fp32.
        std: `[rows]` or `[rows, 1, ...]` fp32, of the transition.
        threshold: nats per latent element; a row of a KL not below it may be blocked.
    """
    return policy_loss_and_numbers(prev_sample_mean, old_prev_sample_mean, prev_sample, advantages, std, threshold)[0]
