"""Times `flowdppo_ops.loss` beside the trainers' eager loss, `torch.compile` of it, and a memory copy.

    python benches/bench_policy_loss.py [--sizes sd35 4x8] [--dtypes fp32] [--threads 2] [--json FILE] [--quick]

Each provider's loss and gradient are compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness import (
    FULL,
    QUICK,
    Effort,
    Row,
    WrongAnswer,
    environment,
    keep_freed_memory,
    measure,
    percentiles,
    write_json,
)
from torch import Tensor

import flowdppo_ops

SIZES = {
    "sd35": (16, 16, 64, 64),  # SD3.5, 512 px
    "rows": (16, 65536),  # the same, flat: the row the CPU target is stated for
    "flux": (16, 4096, 64),  # FLUX and Qwen-Image, 1024 px, packed tokens
    "wan": (2, 16, 21, 60, 104),  # Wan, 81 frames of 480 x 832
    "small": (4, 8),  # nothing but the cost of a call
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Bytes each pass must move, in whole latent tensors, for every provider. Forward reads mean, old mean and sample;
# backward reads mean and sample and writes the gradient. Row vectors are left out: 4 bytes beside 65536 elements.
TENSORS_MOVED = {"copy": 1 + 1, "forward": 3, "forward+backward": 3 + 2 + 1}

# Far above what bf16 storage of the means adds to the KL at std 0.5 (5.6e-6), so that rounding decides no row.
KL_THRESHOLD = 1e-3
OBJECTIVE = flowdppo_ops.FlowDPPO(kl_mask_threshold=KL_THRESHOLD)

# Relative to the largest value. fp32 eager is at 2e-7 and a loss without its mask, or with ratio 1, is off by 2e-3
# or more. A gradient may be rounded once more, to the dtype of the mean.
TOLERANCE = 1e-5

# With one of two cores taken by another process a copy of 4 MB took 8 ms instead of 0.04 ms, at p20, p50 and p80: a
# thread waits for a partner that has no processor.
MAX_CORES_ELSEWHERE = 0.1


class Inputs(NamedTuple):
    """What a trainer holds at the loss. The means and the sample have the dtype under test, the rest is float32."""

    mean: Tensor  # requires grad
    old_mean: Tensor
    prev_sample: Tensor
    old_log_prob: Tensor  # rows
    advantages: Tensor  # rows
    std: Tensor  # [rows, 1, ...]


class Provider(NamedTuple):
    name: str
    loss: Callable[[Inputs], Tensor]


def trainer_loss(i: Inputs) -> Tensor:
    """The trainers' chain from the step's mean to the loss, one PyTorch operation after the other.

    Follows verl-omni at a1139baf: the log-prob of `FlowMatchSDEDiscreteScheduler.sample_previous_step` (per element,
    in float32, then the mean over the latents) and `FlowDPPOLoss.compute_loss`, without its metrics and their 13 host
    synchronisations; std is the transition's, which it multiplies together first. Both favour this side.
    """
    latent_dims = tuple(range(1, i.mean.ndim))
    mean, old_mean, prev_sample = i.mean.float(), i.old_mean.float(), i.prev_sample.float()
    log_prob = -((prev_sample - mean) ** 2) / (2 * i.std**2) - torch.log(i.std) - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob.mean(dim=latent_dims)

    ratio = torch.exp(log_prob - i.old_log_prob)
    kl = ((mean - old_mean).pow(2) / (2 * i.std.pow(2))).mean(dim=latent_dims)
    high = kl >= KL_THRESHOLD
    positive_blocked = high & (ratio > 1.0) & (i.advantages > 0)
    negative_blocked = high & (ratio < 1.0) & (i.advantages < 0)
    row_loss = -i.advantages * ratio
    return torch.where(positive_blocked | negative_blocked, torch.zeros_like(row_loss), row_loss).mean()


def fused_loss(i: Inputs) -> Tensor:
    return flowdppo_ops.loss(
        i.mean,
        i.old_mean,
        i.advantages,
        std=i.std,
        prev_sample=i.prev_sample,
        old_log_prob=i.old_log_prob,
        objective=OBJECTIVE,
    ).loss


def providers() -> list[Provider]:
    """Fresh for each case: a compiled function specialises on shape and dtype, and its cache holds few of them."""
    torch.compiler.reset()
    compiled = torch.compile(trainer_loss, fullgraph=True, dynamic=False)
    return [Provider("eager", trainer_loss), Provider("compile", compiled), Provider("fused", fused_loss)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Rows of low and high KL, of ratio below and above 1, of both signs of the advantage.

    Only the third and fourth row are blocked: the gradient of a blocked row is zeros and might be cheaper to make.
    """
    generator = torch.Generator().manual_seed(0)
    rows, latent_dims = shape[0], tuple(range(1, len(shape)))
    row = torch.arange(rows)

    def wide(of_rows: Tensor) -> Tensor:
        return of_rows.reshape(rows, *(1 for _ in latent_dims))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    std = torch.linspace(0.5, 0.7, rows)
    kl = torch.where((row % 2 == 1) | (row == 2), 10.0, 0.1) * KL_THRESHOLD
    lean = torch.where(row % 2 == 0, 2.0, -2.0)  # the sample lies towards the new mean (ratio above 1) or away from it
    advantages = torch.where(row == 3, -1.0, 1.0) * torch.linspace(0.5, 2.0, rows)

    old_mean, direction = normal(), normal()
    drift = direction * wide(std * torch.sqrt(2 * kl)) / direction.square().mean(latent_dims, keepdim=True).sqrt()
    mean, prev_sample = old_mean + drift, old_mean + wide(lean) * drift + wide(std) * normal()
    mean, old_mean, prev_sample = mean.to(dtype), old_mean.to(dtype), prev_sample.to(dtype)
    q = (prev_sample.double() - old_mean.double()).square().mean(latent_dims)
    old_log_prob = -q / (2 * std.double() ** 2) - torch.log(std.double()) - 0.5 * math.log(2 * math.pi)
    return Inputs(mean.requires_grad_(), old_mean, prev_sample, old_log_prob.float(), advantages, wide(std))


def truth(i: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by the specification; the inputs are taken as they were rounded."""
    mean = i.mean.detach().double().requires_grad_()
    loss = flowdppo_ops.reference.loss(
        mean,
        i.old_mean.double(),
        i.advantages.double(),
        std=i.std.double(),
        prev_sample=i.prev_sample.double(),
        old_log_prob=i.old_log_prob.double(),
        objective=OBJECTIVE,
    ).loss
    loss.backward()
    return loss.detach(), mean.grad


def forward(provider: Provider, i: Inputs) -> Tensor:
    return provider.loss(i)


def forward_backward(provider: Provider, i: Inputs) -> Tensor:
    i.mean.grad = None
    loss = provider.loss(i)
    loss.backward()
    return loss


def check(provider: Provider, i: Inputs, expected: tuple[Tensor, Tensor]) -> None:
    """Raises WrongAnswer unless loss and gradient are those of float64, to `TOLERANCE` and the gradient's dtype."""
    loss = forward_backward(provider, i)
    rounding = torch.finfo(i.mean.dtype).eps / 2
    for what, got, want, tolerance in (
        ("loss", loss.detach(), expected[0], TOLERANCE),
        ("gradient", i.mean.grad, expected[1], TOLERANCE + rounding),
    ):
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            raise WrongAnswer(
                f"{provider.name}: {what} is {error:.1e} away from float64, wanted at most {tolerance:.1e} "
                f"(relative to its largest value; shape {list(i.mean.shape)}, {i.mean.dtype})"
            )


def bench(shape: tuple[int, ...], dtype: str, effort: Effort, facts: dict[str, str]) -> list[Row]:
    """All providers and passes of one shape and dtype, interleaved; a row each."""
    i = make_inputs(shape, DTYPES[dtype])
    expected = truth(i)
    calls = {}
    for provider in providers():
        check(provider, i, expected)
        calls[provider.name, "forward"] = partial(forward, provider, i)
        calls[provider.name, "forward+backward"] = partial(forward_backward, provider, i)
    copied = torch.empty_like(i.old_mean)
    calls["copy", "copy"] = partial(copied.copy_, i.old_mean)
    samples, cores_elsewhere = measure(calls, effort)
    tensor_bytes = i.mean.numel() * i.mean.element_size()
    return [
        Row(
            op="policy_loss",
            shape=shape,
            dtype=dtype,
            provider=provider,
            pass_=pass_,
            **percentiles(us),
            repeats=len(us),
            bytes=TENSORS_MOVED[pass_] * tensor_bytes,
            threads=torch.get_num_threads(),
            cores_elsewhere=cores_elsewhere,
            **facts,
        )
        for (provider, pass_), us in samples.items()
    ]


def report(rows: list[Row]) -> str:
    """One shape and dtype as a table. `of copy` is the share of the copy's bandwidth."""
    p50 = {(row.provider, row.pass_): row.p50_us for row in rows}
    copy = next(row for row in rows if row.provider == "copy")
    lines = [
        "",
        f"{list(copy.shape)} {copy.dtype}",
        f"  {'pass':<17}{'provider':<9}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}"
        f"{'GB/s':>8}{'of copy':>9}{'fused is':>16}",
    ]
    for row in sorted(rows, key=lambda row: list(TENSORS_MOVED).index(row.pass_)):
        peer = row.provider not in ("copy", "fused")
        faster = f"{row.p50_us / p50['fused', row.pass_]:.2f}x as fast" if peer else ""
        times = "".join(f"{us:10.1f}" for us in (row.p20_us, row.p50_us, row.p80_us))
        share = row.gb_per_s / copy.gb_per_s
        lines.append(f"  {row.pass_:<17}{row.provider:<9}{times}{row.gb_per_s:8.1f}{share:>9.0%}{faster:>16}".rstrip())
    two_copies = p50["fused", "forward+backward"] / (2 * copy.p50_us)
    lines.append(f"  fused forward+backward takes {two_copies:.2f} times as long as two copies of one tensor")
    if (copy.cores_elsewhere or 0.0) > MAX_CORES_ELSEWHERE:
        lines.append(
            f"  NOT QUIET: {copy.cores_elsewhere} processors were busy with something else; quote none of this"
        )
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, ...]:
    """A name of `SIZES`, or a shape such as 16x4096x64: rows first."""
    if text in SIZES:
        return SIZES[text]
    try:
        shape = tuple(int(n) for n in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted one of {', '.join(SIZES)}, or a shape such as 16x4096x64")
    return shape


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=parse_size, help=f"of {', '.join(SIZES)}, or AxBxC; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works, not for numbers")
    parser.add_argument("--libc-malloc", action="store_true", help="leave malloc as it is: adds luck with page faults")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    kept = not args.libc_malloc and keep_freed_memory()
    facts = environment("malloc=kept" if kept else "malloc=default")
    print(
        f"{facts['device']}, {args.threads} threads, torch {facts['torch']}, "
        f"flowdppo_ops {facts['flowdppo_ops']} at {facts['commit']}  {facts['environment']}".rstrip()
    )
    rows = []
    for shape in args.sizes or SIZES.values():
        for dtype in args.dtypes:
            try:
                new = bench(shape, dtype, QUICK if args.quick else FULL, facts)
            except WrongAnswer as error:
                sys.exit(f"bench_policy_loss: wrong answer, not timed: {error}")
            print(report(new), flush=True)
            rows += new
    if args.json:
        write_json(rows, args.json)
    return rows


if __name__ == "__main__":
    main()
