"""What the benches share: an operation and its peers, the check of an answer, two ways to time a call, rows, options.

    hot     blocks of consecutive calls, with torch.utils.benchmark: caches, interpreter and allocator know the call
    cold    one call at a time, each right after a model's forward, as a trainer makes it

The peers take turns, so that all of them see the same machine. A bench file says what its operations are (`Operation`)
and calls `main`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

SIZES = {
    "small": (16, 32),  # nothing but the cost of a call
    "image": (16, 16, 64, 64),  # SD3.5, 512 px
    "flux": (16, 4096, 64),  # FLUX and Qwen-Image, 1024 px, packed tokens
    "wan": (2, 16, 21, 60, 104),  # Wan, 81 frames of 480 x 832
    "video": (16, 16, 21, 90, 160),  # 81 frames of 720 x 1280: 310 MB a tensor in fp32, beyond any L2
}
MODEL = {"cpu": (256, 1024, torch.float32), "cuda": (4096, 4096, torch.bfloat16)}  # tokens, width and dtype
USUAL = {"cpu": ("small", "image"), "cuda": ("small", "image", "flux", "video")}

# Of the largest value, plus one rounding to the result's dtype. The eager chain is at 2e-7; a loss without its mask, or
# with every ratio 1, is off by 2e-3 or more.
TOLERANCE = 1e-5
BLOCK_S = 0.01
MAX_CORES_ELSEWHERE = 0.1  # with one of two taken a copy of 4 MB took 8 ms instead of 0.04 ms, at p20, p50 and p80
# Settings that change what is measured, malloc's among them. Other variables hold paths, and rows are published.
SETTINGS = ("FLOWDPPO_OPS_BACKEND", "FLOWDPPO_OPS_CHECK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
SETTINGS += ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

Inputs = Any  # a NamedTuple of tensors, the operation's own
Outputs = tuple[Tensor, ...]
Provider = Callable[[Inputs], Outputs]


class WrongAnswer(Exception):
    """A provider's result differs from the float64 one: its time would mean nothing."""


@dataclass(frozen=True)
class Operation:
    """One operation and those who compute it.

    outputs: the names of what a call returns, in this order.
    dtypes: the names that `make_inputs` takes.
    make_inputs: `(shape, dtype name, device)` to a NamedTuple of tensors.
    providers: name to a function that makes a fresh provider: a compiled one is made for one shape and dtype.
    expected: inputs and provider name to the right outputs in float64; with a `leaf` its gradient is the last of them.
    bytes_moved: inputs, provider name and pass to the bytes that any implementation must move.
    copied: the field that the memory copy, the yardstick, copies.
    leaf: the field that gets the gradient; None for an operation without a backward.
    grad_outputs: inputs to what the backward starts from; None stands for 1.
    yardsticks: providers that are timed beside the others and not checked; the copy is always one.
    """

    outputs: tuple[str, ...]
    dtypes: Sequence[str]
    make_inputs: Callable[[tuple[int, ...], str, torch.device], Inputs]
    providers: Mapping[str, Callable[[], Provider]]
    expected: Callable[[Inputs, str], Outputs]
    bytes_moved: Callable[[Inputs, str, str], int]
    copied: str
    leaf: str | None = None
    grad_outputs: Callable[[Inputs], Sequence[Tensor | None]] = lambda _: [None]
    yardsticks: Mapping[str, Provider] = field(default_factory=dict)


def doubled(inputs: Inputs) -> Inputs:
    """The inputs as they were rounded to their dtypes, in float64."""
    return type(inputs)(*(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- one call ----------------------------------------------------------------------------------------------------


def forget_gradient(operation: Operation, inputs: Inputs) -> None:
    if operation.leaf:
        getattr(inputs, operation.leaf).grad = None


def forward_and_backward(operation: Operation, provider: Provider, inputs: Inputs) -> Outputs:
    """The outputs, and the gradient if there is one."""
    forget_gradient(operation, inputs)
    outputs = provider(inputs)
    if operation.leaf is None:
        return outputs
    torch.autograd.backward(outputs, operation.grad_outputs(inputs))
    return *outputs, getattr(inputs, operation.leaf).grad


def check(operation: Operation, name: str, provider: Provider, inputs: Inputs) -> None:
    """Raises WrongAnswer unless outputs and gradient are those of float64, to `TOLERANCE` and the outputs' dtypes."""
    expected = operation.expected(inputs, name)
    names = (*operation.outputs, "gradient") if operation.leaf else operation.outputs
    leave_nan(getattr(inputs, operation.copied))
    outputs = forward_and_backward(operation, provider, inputs)
    if len(outputs) != len(expected):
        raise WrongAnswer(f"{len(outputs)} results, wanted {len(expected)}")
    for what, output, right in zip(names, outputs, expected, strict=False):
        tolerance = TOLERANCE + torch.finfo(output.dtype).eps / 2
        error = ((output.detach().double() - right).abs().max() / right.abs().max()).item()
        if not error <= tolerance:
            raise WrongAnswer(f"{what} is {error:.1e} of its largest value away from float64, at most {tolerance:.1e}")


def leave_nan(like: Tensor) -> None:
    """Leaves NaN in the memory handed out next: an output that nobody writes must not be an earlier, right one."""
    sizes = (1, like.shape[0], 16 * like.shape[0], 4096)
    freed = [torch.full((size,), math.nan, device=like.device) for size in sizes for _ in range(8)]
    freed += [torch.full(like.shape, math.nan, device=like.device) for _ in range(2)]
    del freed


# ---- timing --------------------------------------------------------------------------------------------------------


def model_forward(device: torch.device) -> Callable[[], None]:
    """A function that does as much as evicts the caches: 8 matrix products with GELU.

    On a GPU it reads 268 MB of weights and makes 1.1 TFLOP, expected to take 2 ms: the launches of the call that is
    timed wait in the queue meanwhile, as they do in training.
    """
    tokens, width, dtype = MODEL[device.type]
    weights = [0.03 * torch.randn(width, width, device=device).to(dtype) for _ in range(8)]
    hidden = torch.randn(tokens, width, device=device).to(dtype)

    @torch.no_grad()
    def forward() -> None:
        activations = hidden
        for weight in weights:
            activations = torch.nn.functional.gelu(activations @ weight)

    return forward


Moment = tuple[float, torch.cuda.Event | None]  # the host's clock in seconds; on the device's current stream


def moment(device: torch.device) -> Moment:
    event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
    if event:
        event.record()
    return time.perf_counter(), event


def microseconds(start: Moment, end: Moment) -> tuple[float, float]:
    """On the device's clock where there is one, and on the host's. The events have happened."""
    host = 1e6 * (end[0] - start[0])
    return (1e3 * start[1].elapsed_time(end[1]) if start[1] else host), host


# Provider and pass to microseconds of a call, each with those until the host went on.
Samples = dict[tuple[str, str], list[tuple[float, float]]]


def in_turn(names: Mapping[Any, Any], rounds: int) -> Iterator[Any]:
    """All of them `rounds` times, in an order drawn anew each time."""
    draw = random.Random(0)
    return (name for _ in range(rounds) for name in draw.sample(list(names), len(names)))


def time_hot(operation: Operation, providers: Mapping[str, Provider], inputs: Inputs, rounds: int) -> Samples:
    """A sample is the mean of a block of consecutive calls, of `BLOCK_S` together."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, provider in providers.items():
        calls[name, "forward"] = partial(provider, inputs)
        if operation.leaf and name != "copy":
            calls[name, "forward+backward"] = partial(forward_and_backward, operation, provider, inputs)
    timers = {
        key: Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for key, call in calls.items()
    }
    number = {key: max(1, int(BLOCK_S / timer.timeit(3).mean)) for key, timer in timers.items()}
    samples: Samples = {key: [] for key in timers}
    for key in in_turn(timers, rounds):
        us = 1e6 * timers[key].timeit(number[key]).mean
        samples[key].append((us, us))
    return samples


def time_cold(
    operation: Operation, providers: Mapping[str, Provider], inputs: Inputs, rounds: int, device: torch.device
) -> Samples:
    """A sample is one call after a model's forward."""
    model, samples = model_forward(device), {}
    for name in in_turn(providers, rounds):
        forget_gradient(operation, inputs)
        model()
        moments = [moment(device)]
        outputs = providers[name](inputs)
        moments.append(moment(device))
        if operation.leaf and name != "copy":
            torch.autograd.backward(outputs, operation.grad_outputs(inputs))
            moments.append(moment(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del outputs  # else the next call would free them while it is timed
        for pass_, end in zip(("forward", "forward+backward"), moments[1:], strict=False):
            samples.setdefault((name, pass_), []).append(microseconds(moments[0], end))
    return samples


# ---- rows ----------------------------------------------------------------------------------------------------------


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
    return {f"p{10 * tenth}_us": round(tenths[tenth - 1], 3) for tenth in (2, 5, 8)}


def seconds_elsewhere() -> float:
    """Processor seconds since boot that were not this process's, stolen ones included; NaN where Linux does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def facts(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The fields of a row that say where and what it was measured on: no host name, no path."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        settings += [f"cuda={torch.version.cuda}", f"triton={version('triton')}"]
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
        name = model[1] if model else "unknown"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "flowdppo_ops": version("flowdppo-ops"),
        "commit": commit or commit_of_checkout(),
        "environment": " ".join(settings),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit_of_checkout() -> str:
    """Short hash, with `+` when tracked files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One operation, shape, dtype and cache. "of copy": the provider's bytes a second over those of the copy."""
    p50 = {(row["provider"], row["pass"]): row["p50_us"] for row in rows}
    copy = next(row["bytes"] / row["p50_us"] for row in rows if row["provider"] == "copy")
    first = rows[0]
    lines = [f"\n{first['op']} {first['shape']} {first['dtype']}, {first['cache']}"]
    lines.append(f"  {'pass':<17}{'provider':<15}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}{'of copy':>9}  fused is")
    for row in sorted(rows, key=lambda row: row["pass"]):
        times = "".join(f"{row[name]:10.1f}" for name in ("p20_us", "p50_us", "p80_us"))
        share = "" if row["bytes"] is None else f"{row['bytes'] / row['p50_us'] / copy:.0%}"
        fused = None if row["provider"] in ("fused", "copy") else p50.get(("fused", row["pass"]))
        faster = "" if fused is None else f"  {row['p50_us'] / fused:.2f}x as fast"
        lines.append(f"  {row['pass']:<17}{row['provider']:<15}{times}{share:>9}{faster}")
    if (first["cores_elsewhere"] or 0.0) > MAX_CORES_ELSEWHERE:
        lines.append(f"  NOT QUIET: other processes used {first['cores_elsewhere']} processors; quote none of this")
    return "\n".join(lines)


# ---- a case, and the command line ----------------------------------------------------------------------------------


def bench(
    name: str,
    operation: Operation,
    shape: tuple[int, ...],
    dtype: str,
    providers: Sequence[str],
    caches: Sequence[str],
    rounds: int,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one operation, shape and dtype; and what was not timed, because it was wrong or did not run."""
    inputs = operation.make_inputs(shape, dtype, device)
    torch.compiler.reset()  # else a second shape is compiled with dynamic sizes
    right: dict[str, Provider] = {}
    failures = []
    for one in providers:
        try:
            provider = operation.providers[one]()
            check(operation, one, provider, inputs)
        except Exception as error:
            message = str(error).partition("\n")[0]
            failures.append(f"{name} {list(shape)} {dtype}: {one} is not timed: {type(error).__name__}: {message}")
        else:
            right[one] = provider
    if not right:
        return [], failures
    copied = getattr(inputs, operation.copied).detach()
    target = torch.empty_like(copied)
    right |= {**operation.yardsticks, "copy": lambda _: (target.copy_(copied),)}

    def bytes_of(provider: str, pass_: str) -> int | None:
        if provider in operation.yardsticks:
            return None
        return 2 * copied.nbytes if provider == "copy" else operation.bytes_moved(inputs, provider, pass_)

    rows = []
    for cache in caches:
        elsewhere, start = seconds_elsewhere(), time.perf_counter()
        timed = time_hot if cache == "hot" else partial(time_cold, device=device)
        samples = timed(operation, right, inputs, rounds)
        cores = (seconds_elsewhere() - elsewhere) / (time.perf_counter() - start)
        rows += [
            {"op": name, "shape": list(shape), "dtype": dtype, "cache": cache, "provider": provider, "pass": pass_}
            | percentiles([us for us, _ in pairs])
            | {"host_p50_us": round(statistics.median(host for _, host in pairs), 3)}
            | {"rounds": rounds, "bytes": bytes_of(provider, pass_)}
            | {"cores_elsewhere": None if math.isnan(cores) else round(max(0.0, cores), 2)}
            for (provider, pass_), pairs in sorted(samples.items(), key=lambda one: list(right).index(one[0][0]))
        ]
    return rows, failures


def parse_size(text: str) -> tuple[int, ...]:
    """A name of `SIZES`, or a shape such as 16x4096x64: rows first."""
    if text in SIZES:
        return SIZES[text]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted one of {', '.join(SIZES)}, or a shape such as 16x4096x64")
    return tuple(map(int, text.split("x")))


def main(summary: str, operations: Mapping[str, Operation], argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The command line of a bench file. Ends with status 1 where something was not timed."""
    dtypes = list(dict.fromkeys(dtype for one in operations.values() for dtype in one.dtypes))
    every = list(dict.fromkeys(name for one in operations.values() for name in one.providers))
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--device", choices=USUAL, default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--rounds", type=int, default=40, help="how often all peers take their turn (default 40)")
    parser.add_argument("--ops", nargs="+", choices=operations, default=list(operations), help="default: all")
    parser.add_argument("--sizes", nargs="+", type=parse_size, help=f"of {', '.join(SIZES)}, or a shape: 16x4096")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="default: all")
    parser.add_argument("--providers", nargs="+", choices=every, help="default: all, but triton on a GPU alone")
    parser.add_argument("--caches", nargs="+", choices=("hot", "cold"), default=["hot", "cold"], help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after each case")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: torch {torch.__version__} finds no usable CUDA device\n")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    wanted = args.providers or [name for name in every if name != "triton" or args.device == "cuda"]
    where = facts(device, args.commit)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value))

    shapes = args.sizes or [SIZES[name] for name in USUAL[args.device]]
    rows, failures = [], []
    for name, shape in itertools.product(args.ops, shapes):
        operation = operations[name]
        providers = [one for one in operation.providers if one in wanted]
        for dtype in [one for one in operation.dtypes if one in args.dtypes]:
            new, failed = bench(name, operation, shape, dtype, providers, args.caches, args.rounds, device)
            rows += [row | where for row in new]
            failures += failed
            for _, of_cache in itertools.groupby(new, key=lambda row: row["cache"]):
                print(table(list(of_cache)), flush=True)
            if args.json:
                lines = ",\n".join(json.dumps(row) for row in rows)
                args.json.write_text(f"[\n{lines}\n]\n")
    if failures:
        sys.exit("\n".join(failures))
    return rows
