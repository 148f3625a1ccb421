"""Times `flowdppo_ops.loss` beside the trainers' eager loss, `torch.compile` of it, Triton, and a memory copy.

    python benches/bench_policy_loss.py [--sizes sd35 4x8] [--dtypes fp32] [--threads 2] [--json FILE] [--quick]
    python benches/bench_policy_loss.py --device cuda --json FILE

Each provider's loss and gradient are compared with float64 before anything is timed. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from cold_start import cold_start
from devices import Cpu, Cuda, Mode, graph_repeats
from harness import Effort, Measured, Row, WrongAnswer, percentiles, write_json
from torch import Tensor

import flowdppo_ops

SIZES = {
    "sd35": (16, 16, 64, 64),  # SD3.5, 512 px
    "rows": (16, 65536),  # the same, flat: the row the CPU target is stated for
    "flux": (16, 4096, 64),  # FLUX and Qwen-Image, 1024 px, packed tokens
    "wan": (2, 16, 21, 60, 104),  # Wan, 81 frames of 480 x 832
    "video": (16, 16, 21, 90, 160),  # 81 frames of 720 x 1280: 310 MB a tensor in fp32, beyond any L2
    "video64": (64, 16, 21, 90, 160),
    "small": (4, 8),  # nothing but the cost of a call
}
# Not fp16: its gradients, 1e-6 an element, are subnormal without a scaled loss, and too coarse to be checked.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MACHINES = {"cpu": Cpu, "cuda": Cuda}

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


def triton_loss() -> Callable[[Inputs], Tensor]:
    from triton_policy_loss import triton_policy_loss

    def loss(i: Inputs) -> Tensor:
        return triton_policy_loss(i.mean, i.old_mean, i.prev_sample, i.advantages, i.std, KL_THRESHOLD)

    return loss


def providers(names: tuple[str, ...]) -> list[Provider]:
    """Fresh for each case: a compiled function specialises on shape and dtype, and its cache holds few of them."""
    if "compile" in names:  # else the compiler would be imported for nothing: 1.5 s of a cold start
        torch.compiler.reset()
    makers = {
        "eager": lambda: trainer_loss,
        "compile": lambda: torch.compile(trainer_loss, fullgraph=True, dynamic=False),
        "triton": triton_loss,
        "fused": lambda: fused_loss,
    }
    return [Provider(name, makers[name]()) for name in names]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = Cpu.device) -> Inputs:
    """Rows of low and high KL, of ratio below and above 1, of both signs of the advantage.

    Only the third and fourth row are blocked: the gradient of a blocked row is zeros and might be cheaper to make.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows, latent_dims = shape[0], tuple(range(1, len(shape)))
    row = torch.arange(rows, device=device)

    def wide(of_rows: Tensor) -> Tensor:
        return of_rows.reshape(rows, *(1 for _ in latent_dims))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    std = torch.linspace(0.5, 0.7, rows, device=device)
    kl = torch.where((row % 2 == 1) | (row == 2), 10.0, 0.1) * KL_THRESHOLD
    lean = torch.where(row % 2 == 0, 2.0, -2.0)  # the sample lies towards the new mean (ratio above 1) or away from it
    advantages = torch.where(row == 3, -1.0, 1.0) * torch.linspace(0.5, 2.0, rows, device=device)

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


def copies(i: Inputs, count: int) -> list[Inputs]:
    """`i` and clones of it: the same values in other memory."""
    clones = [Inputs(*(t.detach().clone() for t in i)) for _ in range(count - 1)]
    return [i, *(clone._replace(mean=clone.mean.requires_grad_()) for clone in clones)]


def forward(provider: Provider, i: Inputs) -> tuple[Tensor, ...]:
    return (provider.loss(i),)


def forward_backward(provider: Provider, i: Inputs) -> tuple[Tensor, ...]:
    i.mean.grad = None
    loss = provider.loss(i)
    loss.backward()
    return loss, i.mean.grad


PASSES = {"forward": forward, "forward+backward": forward_backward}


def check(provider: Provider, i: Inputs, expected: tuple[Tensor, Tensor]) -> None:
    """Raises WrongAnswer unless loss and gradient are those of float64, to `TOLERANCE` and the gradient's dtype."""
    i.mean.grad = None
    poison(i.mean)
    check_outputs(provider.name, forward_backward(provider, i), expected, i.mean.dtype)


def check_outputs(name: str, outputs: tuple[Tensor, ...], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """`outputs`: the loss, or loss and gradient."""
    rounding = torch.finfo(dtype).eps / 2
    for what, got, want, tolerance in zip(
        ("loss", "gradient"), outputs, expected, (TOLERANCE, TOLERANCE + rounding), strict=False
    ):
        error = ((got.detach().double() - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            raise WrongAnswer(
                f"{name}: {what} is {error:.1e} away from float64, wanted at most {tolerance:.1e} "
                f"(relative to its largest value; gradient of shape {list(expected[1].shape)}, {dtype})"
            )


def poison(like: Tensor) -> None:
    """Leaves NaN in the memory handed out next: an output that nobody writes must not be an earlier, right one."""
    sizes = (1, like.shape[0], 16 * like.shape[0], 4096)
    small = [torch.full((size,), math.nan, device=like.device) for size in sizes for _ in range(8)]
    large = [torch.full_like(like, math.nan) for _ in range(2)]
    del small, large


def bench(
    shape: tuple[int, ...],
    dtype: str,
    effort: Effort,
    facts: dict[str, str],
    machine: Cpu | Cuda,
    names: tuple[str, ...],
) -> list[Row]:
    """All modes, providers and passes of one shape and dtype, the providers of a mode interleaved; a row each."""
    i = make_inputs(shape, DTYPES[dtype], machine.device)
    expected = truth(i)
    chosen = providers(names)
    for provider in chosen:
        check(provider, i, expected)

    def forget() -> None:
        i.mean.grad = None

    series = list(itertools.product(chosen, PASSES))
    costs = {(one.name, name): machine.costs(partial(PASSES[name], one, i), forget) for one, name in series}
    tensor_bytes = i.mean.numel() * i.mean.element_size()
    rows = []
    for mode in machine.modes(tensor_bytes):
        sets = copies(i, mode.sets)
        calls = {(one.name, name): [partial(PASSES[name], one, each) for each in sets] for one, name in series}
        calls["copy", "copy"] = [partial(copy_into, torch.empty_like(each.old_mean), each.old_mean) for each in sets]
        if mode.timing == "graph":
            timed = measure_graphs(machine, mode, calls, expected, effort)
        else:
            timed = machine.measure(mode, calls, effort)
        rows += [
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
                cores_elsewhere=timed.cores_elsewhere,
                timing=mode.timing,
                cache=mode.cache,
                **(costs[provider, pass_]._asdict() if provider != "copy" else {}),
                **facts,
            )
            for (provider, pass_), us in timed.samples.items()
        ]
    return rows


def copy_into(target: Tensor, source: Tensor) -> tuple[Tensor, ...]:
    return (target.copy_(source),)


def measure_graphs(
    machine: Cuda,
    mode: Mode,
    calls: dict[tuple[str, str], list[Callable[[], tuple[Tensor, ...]]]],
    expected: tuple[Tensor, Tensor],
    effort: Effort,
) -> Measured:
    """Captures each series once; what its graph writes is filled with NaN, then checked after a replay."""
    dtype = calls["copy", "copy"][0]()[0].dtype
    times = graph_repeats(mode, expected[1].numel() * dtype.itemsize)
    captured = {key: machine.capture(of_sets, times) for key, of_sets in calls.items()}
    for (provider, pass_), graph in captured.items():
        if provider == "copy":
            continue
        for output in itertools.chain(*graph.outputs):
            output.fill_(math.nan)
        graph.replay()
        for outputs in graph.outputs:
            check_outputs(f"{provider} {pass_} in a graph", outputs, expected, dtype)
    return machine.measure_captured(captured, effort)


def cold_starts(
    shape: tuple[int, ...], dtype: str, count: int, facts: dict[str, str], machine: Cpu | Cuda, names: tuple[str, ...]
) -> list[Row]:
    """Two rows a provider, each the wait for the first loss and gradient, in `count` fresh processes.

    "cold start" counts from the first import, "first call" from when everything but the provider is there.
    """
    rows = []
    for name in names:
        runs = [cold_start(name, shape, dtype, machine.name) for _ in range(count)]
        for timing, seconds in (
            ("cold start", [run["finished"] for run in runs]),
            ("first call", [run["finished"] - run["ready"] for run in runs]),
        ):
            rows.append(
                Row(
                    op="policy_loss",
                    shape=shape,
                    dtype=dtype,
                    provider=name,
                    pass_="forward+backward",
                    **percentiles([1e6 * one for one in seconds]),
                    repeats=count,
                    bytes=TENSORS_MOVED["forward+backward"] * math.prod(shape) * DTYPES[dtype].itemsize,
                    threads=torch.get_num_threads(),
                    cores_elsewhere=None,
                    timing=timing,
                    cache="cold",
                    **facts,
                )
            )
    return rows


def report(rows: list[Row], title: str = "") -> str:
    """One shape, dtype and mode as a table. `of copy` is the share of the copy's bandwidth."""
    p50 = {(row.provider, row.pass_): row.p50_us for row in rows}
    copy = next(row for row in rows if row.provider == "copy")
    fused_ran = ("fused", "forward") in p50
    lines = [
        "",
        f"{list(copy.shape)} {copy.dtype}  {title}".rstrip(),
        f"  {'pass':<17}{'provider':<9}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}"
        f"{'GB/s':>8}{'of copy':>9}{'fused is':>16}",
    ]
    for row in sorted(rows, key=lambda row: list(TENSORS_MOVED).index(row.pass_)):
        peer = fused_ran and row.provider not in ("copy", "fused")
        faster = f"{row.p50_us / p50['fused', row.pass_]:.2f}x as fast" if peer else ""
        times = "".join(f"{us:10.1f}" for us in (row.p20_us, row.p50_us, row.p80_us))
        share = row.gb_per_s / copy.gb_per_s
        lines.append(f"  {row.pass_:<17}{row.provider:<9}{times}{row.gb_per_s:8.1f}{share:>9.0%}{faster:>16}".rstrip())
    if fused_ran:
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


def reports(rows: list[Row]) -> str:
    """Of one shape and dtype: a table per mode."""
    by_mode: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_mode.setdefault(f"{row.timing}, {row.cache}", []).append(row)
    return "\n".join(report(of_mode, mode if len(by_mode) > 1 else "") for mode, of_mode in by_mode.items())


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=MACHINES, default="cpu")
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, help=f"of {', '.join(SIZES)}, or AxBxC; default: those of the device"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--providers", nargs="+", choices=Cuda.providers, help="default: all that the device has")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works, not for numbers")
    parser.add_argument("--libc-malloc", action="store_true", help="leave malloc as it is: adds luck with page faults")
    parser.add_argument("--cold-starts", type=int, help="fresh processes per provider (default: 3 on cuda, 0 on cpu)")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")
    args = parser.parse_args(argv)
    names = tuple(args.providers or MACHINES[args.device].providers)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"bench_policy_loss: --device cuda: torch {torch.__version__} finds no usable CUDA device\n")
    if "triton" in names and importlib.util.find_spec("triton") is None:
        parser.exit(2, "bench_policy_loss: triton is not installed; name the others with --providers\n")
    if "triton" in names and args.device == "cpu":
        parser.exit(2, "bench_policy_loss: triton runs on --device cuda alone\n")

    torch.set_num_threads(args.threads)
    machine = Cpu(args.libc_malloc) if args.device == "cpu" else MACHINES[args.device]()
    facts = machine.facts() | ({"commit": args.commit} if args.commit else {})
    print(
        f"{facts['device']}, {args.threads} threads, torch {facts['torch']}, "
        f"flowdppo_ops {facts['flowdppo_ops']} at {facts['commit']}  {facts['environment']}".rstrip()
    )
    cases = list(itertools.product(args.sizes or [SIZES[name] for name in machine.sizes], args.dtypes))
    rows = []
    for shape, dtype in cases:
        try:
            with machine.session():
                new = bench(shape, dtype, machine.quick if args.quick else machine.full, facts, machine, names)
        except WrongAnswer as error:
            sys.exit(f"bench_policy_loss: wrong answer, not timed: {error}")
        print(reports(new), flush=True)
        rows += new
        if args.json:
            write_json(rows, args.json)  # after each case: a run that is cut short leaves what it has
    count = machine.cold_starts if args.cold_starts is None else args.cold_starts
    if count > 0:
        new = cold_starts(*cases[0], count, facts, machine, names)
        print(f"\n{list(cases[0][0])} {cases[0][1]}: seconds to the first loss and gradient in a fresh process")
        for row in new:
            print(f"  {row.timing:<12}{row.provider:<9}{row.p50_us / 1e6:8.2f}")
        rows += new
        if args.json:
            write_json(rows, args.json)
    return rows


if __name__ == "__main__":
    main()
