"""The Flow-DPPO loss in Triton, from the mean or from the model's output: the strongest alternative we could write.

For a row of `N` latent elements, with `mu` the new mean, `mu°` the old, `x'` the next sample, `A` the advantage:

    d = mean (mu - mu°)^2       p = mean (mu - mu°)(x' - mu°)       kl = d / (2 std^2)
    ratio = exp((p - d / 2) / std^2)
    blocked = not (kl < threshold) and ((ratio > 1 and A > 0) or (ratio < 1 and A < 0))
    loss = mean over rows of (0 if blocked else -A ratio)
    d loss / d mu_j = c (x'_j - mu_j),   c = 0 if blocked else -A ratio / (rows N std^2)

With STEP the mean is that of Flow-SDE, `mu = a x + b v`, formed from the model's output `v` and the sample `x` as they
are read; `a`, `b` and `std` come from the row's sigmas in every program, and the gradient is multiplied by `b`.

Forward, one launch: each program leaves (sum of d, sum of p), the last one ends with the loss (`triton_rows.py`).
Backward, one launch: reads `mu` (or `v` and `x`) and `x'`, writes the gradient in the dtype of `mu` or `v`; a blocked
row is written without being read.

For the benches alone. Against `flowdppo_ops` it leaves out the log-prob, all metrics, every check and every option. It
needs contiguous latents and one stream at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_rows import (
    BLOCKS,
    MAX_SPLITS,
    SPLIT,
    Schedule,
    flow_sde,
    is_last,
    need_contiguous,
    share,
    summed,
    ticket_of,
    tile_rows,
    tuned,
)


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
    numbers,  # [4, rows] fp32, out: ratio, kl, keep, coefficient
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
            tl.store(numbers + r, ratio, mask=here)
            tl.store(numbers + rows + r, kl, mask=here)
            tl.store(numbers + 2 * rows + r, keep.to(tl.float32), mask=here)
            tl.store(numbers + 3 * rows + r, slope * row_loss / (variance * rows * numel), mask=here)
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
        results = torch.empty(1 + 4 * rows, dtype=torch.float32, device=source.device)
        loss, numbers = results[0], results[1:]
        partials = torch.empty(2 * rows * MAX_SPLITS, dtype=torch.float32, device=source.device)
        # What a kernel does not read must be a tensor all the same.
        ctx.step = schedule is not None
        ctx.schedule = schedule or Schedule(advantages, advantages, 0.0, 0.0)
        ctx.sample = source if sample is None else sample

        def grid(config):
            return (rows * config["SPLITS"],)

        _forward_kernel[grid](
            source,
            ctx.sample,
            prev_sample,
            old_mean,
            advantages,
            advantages if std is None else std,
            *ctx.schedule,
            threshold,
            loss,
            numbers,
            partials,
            ticket_of(source.device),
            rows,
            numel,
            TILE_ROWS=tile_rows(rows),
            STEP=ctx.step,
        )
        ctx.save_for_backward(source, prev_sample, numbers)
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)
        return loss, numbers

    @staticmethod
    def backward(ctx, grad_loss, _grad_numbers):
        source, prev_sample, numbers = ctx.saved_tensors
        rows = numbers.numel() // 4
        numel = source.numel() // rows
        grad_source = torch.empty_like(source)

        def grid(config):
            return (rows * triton.cdiv(numel, config["BLOCK"]),)

        coefficients = numbers[3 * rows :]
        latents = (source, ctx.sample, prev_sample)
        _backward_kernel[grid](
            *latents, *ctx.schedule, coefficients, grad_loss, grad_source, numel, rows, STEP=ctx.step
        )
        return grad_source, *(None,) * 7


def loss_and_numbers(
    source: Tensor,
    sample: Tensor | None,
    prev_sample: Tensor,
    old_mean: Tensor,
    advantages: Tensor,
    std: Tensor | None,
    schedule: tuple | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """The loss, and `[4, rows]`: ratio, kl, keep (1 or 0), gradient coefficient.

    `source` is the mean, with `std`; or the model's output, with `sample` and `schedule`.
    """
    need_contiguous(source, sample, prev_sample, old_mean)
    schedule = None if schedule is None else Schedule(*schedule)
    loss, numbers = _PolicyLoss.apply(source, sample, prev_sample, old_mean, advantages, std, schedule, threshold)
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
    latents = (prev_sample_mean, None, prev_sample, old_prev_sample_mean)
    return loss_and_numbers(*latents, advantages, std.reshape(-1), None, threshold)[0]


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
    """The same from one Flow-SDE step, differentiable in `model_output`.

    Args:
        model_output, sample, prev_sample, old_prev_sample_mean: `[rows, ...]`, contiguous, fp32, bf16 or fp16 each.
        advantages, sigma, sigma_next: `[rows]` fp32.
        noise_level, sigma_max: as `flowdppo_ops.step_loss` takes them.
        threshold: nats per latent element; a row of a KL not below it may be blocked.
    """
    latents = (model_output, sample, prev_sample, old_prev_sample_mean)
    return loss_and_numbers(*latents, advantages, None, (sigma, sigma_next, noise_level, sigma_max), threshold)[0]
