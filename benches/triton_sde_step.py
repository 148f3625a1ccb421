"""One Flow-SDE step in Triton, drawn or replayed: the strongest alternative we could write.

For a row of `N` latent elements, with `v` the model's output, `x` the sample, `z` the noise, `x'` the next sample:

    mu = a x + b v      x' = mu + std z, or given
    log_prob = -mean (x' - mu)^2 / (2 std^2) - log std - log(2 pi) / 2
    d / d v_j = b (grad_mu_j + grad_log_prob (x'_j - mu_j) / (N std^2))

Forward, one launch: reads `v`, `x` and `z` or `x'`, writes `mu` in fp32 and a drawn `x'` in the dtype of `x`, scored as
it is stored; each program leaves its sum of `(x' - mu)^2`, and as in `triton_policy_loss.py` the last one to end makes
the log-probs.
Backward, one launch: reads `x'`, `mu` and its gradient, writes the gradient in the dtype of `v`.

For the benches alone. Against `flowdppo_ops` it leaves out the other samplers, the residual, the generator, every check
and every option. It needs contiguous latents and one stream at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_policy_loss import (
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

_HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))


@tuned(SPLIT, "DRAW")
@triton.jit
def _forward_kernel(
    model_output,  # [rows, numel] fp32, bf16 or fp16, as the next two
    sample,
    other,  # with DRAW the noise, else the next sample
    sigma,  # [rows] fp32
    sigma_next,
    noise_level,
    sigma_max,
    prev_sample,  # [rows, numel] in the dtype of the sample, out; written with DRAW alone
    mean,  # [rows, numel] fp32, out
    log_prob,  # [rows] fp32, out
    partials,  # [rows, SPLITS] fp32, workspace
    ticket,  # [1] int32, 0 before and after
    rows,
    numel,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    DRAW: tl.constexpr,
):
    program = tl.program_id(0)
    row, base, begin, end = share(program, numel, BLOCK, SPLITS)
    a, b, std_squared = flow_sde(tl.load(sigma + row), tl.load(sigma_next + row), noise_level, sigma_max)
    std = tl.sqrt(std_squared)

    squared = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = column < numel  # a span ends at a block's end, only the row can end earlier
        v = tl.load(model_output + base + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(sample + base + column, mask=inside, other=0.0).to(tl.float32)
        following = tl.load(other + base + column, mask=inside, other=0.0).to(tl.float32)
        mu = a * x + b * v
        if DRAW:
            stored = (mu + std * following).to(prev_sample.dtype.element_ty)
            tl.store(prev_sample + base + column, stored, mask=inside)
            following = stored.to(tl.float32)
        tl.store(mean + base + column, mu, mask=inside)
        squared += (following - mu) * (following - mu)
    tl.store(partials + program, tl.sum(squared, axis=0))

    if is_last(ticket, rows * SPLITS):
        for first in range(0, rows, TILE_ROWS):
            r = first + tl.arange(0, TILE_ROWS)
            here = r < rows
            now, later = tl.load(sigma + r, mask=here, other=0.5), tl.load(sigma_next + r, mask=here, other=0.0)
            _a, _b, variance = flow_sde(now, later, noise_level, sigma_max)
            q = summed(partials, r, here, SPLITS) / numel
            tl.store(log_prob + r, -0.5 * (q / variance + tl.log(variance)) - _HALF_LOG_2_PI, mask=here)
        tl.store(ticket, 0)


@tuned(BLOCKS)
@triton.jit
def _backward_kernel(
    prev_sample,  # [rows, numel] fp32, bf16 or fp16
    mean,  # [rows, numel] fp32
    sigma,  # [rows] fp32
    sigma_next,
    noise_level,
    sigma_max,
    grad_log_prob,  # [rows] fp32
    grad_mean,  # [rows, numel] fp32
    grad_output,  # [rows, numel], out
    rows,
    numel,
    BLOCK: tl.constexpr,
):
    per_row = tl.cdiv(numel, BLOCK)
    row = tl.program_id(0) // per_row
    column = (tl.program_id(0) % per_row) * BLOCK + tl.arange(0, BLOCK)
    inside = column < numel
    at = row.to(tl.int64) * numel + column
    _a, b, variance = flow_sde(tl.load(sigma + row), tl.load(sigma_next + row), noise_level, sigma_max)
    coefficient = tl.load(grad_log_prob + row) / (variance * numel)
    innovation = tl.load(prev_sample + at, mask=inside, other=0.0).to(tl.float32)
    innovation -= tl.load(mean + at, mask=inside, other=0.0)
    grad = b * (tl.load(grad_mean + at, mask=inside, other=0.0) + coefficient * innovation)
    tl.store(grad_output + at, grad.to(grad_output.dtype.element_ty), mask=inside)


def _forward(model_output: Tensor, sample: Tensor, other: Tensor, schedule: Schedule, draw: bool) -> tuple[Tensor, ...]:
    rows = schedule.sigma.numel()
    mean = torch.empty(sample.shape, dtype=torch.float32, device=sample.device)
    prev_sample = torch.empty_like(sample) if draw else other
    log_prob = torch.empty(rows, dtype=torch.float32, device=sample.device)
    partials = torch.empty(rows * MAX_SPLITS, dtype=torch.float32, device=sample.device)

    _forward_kernel[lambda config: (rows * config["SPLITS"],)](
        model_output,
        sample,
        other,
        *schedule,
        prev_sample,
        mean,
        log_prob,
        partials,
        ticket_of(sample.device),
        rows,
        sample.numel() // rows,
        TILE_ROWS=tile_rows(rows),
        DRAW=draw,
    )
    return prev_sample, log_prob, mean


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model_output, sample, prev_sample, schedule):
        _, log_prob, mean = _forward(model_output, sample, prev_sample, schedule, draw=False)
        ctx.save_for_backward(prev_sample, mean)
        ctx.schedule, ctx.dtype = schedule, model_output.dtype
        return log_prob, mean

    @staticmethod
    def backward(ctx, grad_log_prob, grad_mean):
        prev_sample, mean = ctx.saved_tensors
        rows = grad_log_prob.numel()
        numel = mean.numel() // rows
        grad_output = torch.empty_like(mean, dtype=ctx.dtype)
        grads = (grad_log_prob.contiguous(), grad_mean.contiguous())

        grid = lambda config: (rows * triton.cdiv(numel, config["BLOCK"]),)  # noqa: E731
        _backward_kernel[grid](prev_sample, mean, *ctx.schedule, *grads, grad_output, rows, numel)
        return grad_output, None, None, None


def triton_sde_draw(
    model_output: Tensor,
    sample: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next sample in the dtype of `sample`, its log-prob `[rows]` and the step's mean, both fp32. Not differentiable.

    Latents `[rows, ...]`, contiguous, fp32, bf16 or fp16 each; `sigma`, `sigma_next`: `[rows]` fp32.
    """
    need_contiguous(model_output, sample, noise)
    return _forward(model_output, sample, noise, Schedule(sigma, sigma_next, noise_level, sigma_max), draw=True)


def triton_sde_replay(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: float,
) -> tuple[Tensor, Tensor]:
    """Log-prob `[rows]` of `prev_sample` and the step's mean, both fp32 and differentiable in `model_output`."""
    need_contiguous(model_output, sample, prev_sample)
    return _Replay.apply(model_output, sample, prev_sample, Schedule(sigma, sigma_next, noise_level, sigma_max))
