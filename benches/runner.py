"""From an operation and its peers to checked, counted and timed rows: what the benches' command lines have in common.

A bench file says what an operation is (`Operation`): its inputs, who computes it, what is right, and how many bytes it
must move. Everything else, whatever the operation, is here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cold_start import cold_start
from counting import Counts, count
from devices import Captured, Cpu, Cuda, DeviceCounts, Mode, graph_repeats
from harness import Effort, Measured, Row, WrongAnswer, percentiles, write_json
from torch import Tensor

SIZES = {
    "sd35": (16, 16, 64, 64),  # SD3.5, 512 px
    "rows": (16, 65536),  # the same, flat: the row the CPU target is stated for
    "flux": (16, 4096, 64),  # FLUX and Qwen-Image, 1024 px, packed tokens
    "wan": (2, 16, 21, 60, 104),  # Wan, 81 frames of 480 x 832
    "video": (16, 16, 21, 90, 160),  # 81 frames of 720 x 1280: 310 MB a tensor in fp32, beyond any L2
    "video64": (64, 16, 21, 90, 160),
    "small": (4, 8),  # nothing but the cost of a call
}
MACHINES = {"cpu": Cpu, "cuda": Cuda}
PASSES = ("copy", "forward", "forward+backward")
COMPILED = ("compile", "compile_max")
UNSEEN = (*COMPILED, "triton")  # by the dispatcher: nothing to count there

# Calls whose results are checked. One with CUDA graphs of its own runs without them in the first, records them in the
# second, and replays them from the third on.
CHECKED_CALLS = 3

# Relative to the largest value, plus one rounding to the dtype of the result. fp32 eager is at 2e-7 and a loss without
# its mask, or with ratio 1, is off by 2e-3 or more.
TOLERANCE = 1e-5

# With one of two cores taken by another process a copy of 4 MB took 8 ms instead of 0.04 ms, at p20, p50 and p80: a
# thread waits for a partner that has no processor.
MAX_CORES_ELSEWHERE = 0.1

Inputs = Any  # a NamedTuple of tensors, the operation's own
Outputs = tuple[Tensor, ...]


class Provider(NamedTuple):
    """in_graph: stands for `call` in a CUDA graph, where `call` replays graphs of its own: those cannot be captured."""

    name: str
    call: Callable[[Inputs], Outputs]
    in_graph: Callable[[Inputs], Outputs] | None = None


@dataclass(frozen=True)
class Operation:
    """One operation and those who compute it.

    name: `Row.op`.
    outputs: what a call returns, in this order; a provider may end earlier, with `expected` to match.
    dtypes: the names that `make_inputs` takes.
    make_inputs: `(shape, dtype name, device)` to a NamedTuple of tensors.
    providers: name to a function that makes a fresh `Inputs -> outputs`: a compiled one specialises on shape and dtype.
        Or a pair of them, the second for CUDA graphs (`Provider.in_graph`).
    expected: inputs and provider to the right outputs in float64; the gradient is the last of them.
    bytes_moved: inputs, provider and pass to the bytes that must move, whatever the provider does.
    copied: the field that the memory copy copies.
    leaf: the field that gets the gradient; None for an operation that has no backward.
    cotangents: inputs to what the outputs are multiplied by in the backward; None stands for 1.
    """

    name: str
    outputs: tuple[str, ...]
    dtypes: Sequence[str]
    make_inputs: Callable[[tuple[int, ...], str, torch.device], Inputs]
    providers: Mapping[str, Callable[[], Callable[[Inputs], Outputs] | tuple[Callable, Callable]]]
    expected: Callable[[Inputs, str], Outputs]
    bytes_moved: Callable[[Inputs, str, str], int]
    copied: str
    leaf: str | None = None
    cotangents: Callable[[Inputs], Sequence[Tensor | None]] = lambda _: [None]

    @property
    def results(self) -> tuple[str, ...]:
        return (*self.outputs, "gradient") if self.leaf else self.outputs

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "forward+backward") if self.leaf else ("forward",)

    def run(self, pass_: str, call: Callable[[Inputs], Outputs], i: Inputs) -> Outputs:
        if pass_ == "forward":
            return call(i)
        leaf = getattr(i, self.leaf)
        leaf.grad = None
        outputs = call(i)
        torch.autograd.backward(outputs, self.cotangents(i))
        return *outputs, leaf.grad

    def forget(self, i: Inputs) -> None:
        if self.leaf:
            getattr(i, self.leaf).grad = None

    def make_providers(self, names: Sequence[str]) -> list[Provider]:
        if any(name in COMPILED for name in names):  # else the compiler's import is for nothing: 1.5 s of a cold start
            torch.compiler.reset()
        made = {name: self.providers[name]() for name in names}
        return [Provider(name, *(one if isinstance(one, tuple) else (one,))) for name, one in made.items()]


def doubled(i: Inputs) -> Inputs:
    """The inputs as they were rounded, in float64."""
    return type(i)(*(t.detach().double().requires_grad_(t.requires_grad) for t in i))


def copies(i: Inputs, times: int) -> list[Inputs]:
    """`i` and clones of it: the same values in other memory."""
    return [i, *(type(i)(*(t.detach().clone().requires_grad_(t.requires_grad) for t in i)) for _ in range(times - 1))]


def compiled(function: Callable, mode: str | None = None) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def max_autotuned(make: Callable[[str], Callable[[Inputs], Outputs]]) -> Callable[[], tuple[Callable, Callable]]:
    """A `compile_max` provider, from a function that compiles in a mode: the call that a user would make, whose kernels
    are replayed in CUDA graphs of its own, and one that can be captured: the same kernels without them.
    """

    def both() -> tuple[Callable, Callable]:
        replaying = make("max-autotune")

        def call(i: Inputs) -> Outputs:
            # Else a forward that no backward follows is taken for unfinished: no graph is replayed, and all are kept.
            torch.compiler.cudagraph_mark_step_begin()
            return replaying(i)

        return call, make("max-autotune-no-cudagraphs")

    return both


def check(operation: Operation, provider: Provider, i: Inputs, expected: Outputs) -> None:
    """Raises WrongAnswer unless outputs and gradient are those of float64, to `TOLERANCE` and the outputs' dtypes.

    Each time the results are overwritten with NaN: who returns the same memory again must have written it again.
    """
    for _ in range(CHECKED_CALLS):
        operation.forget(i)
        poison(getattr(i, operation.copied))
        outputs = operation.run(operation.passes[-1], provider.call, i)
        if len(outputs) != len(expected):
            raise WrongAnswer(f"{provider.name}: {len(outputs)} results, wanted {len(expected)}")
        check_outputs(operation, provider.name, outputs, expected)
        overwrite(outputs)
        del outputs  # a graph that is recorded or replayed in the next call finds nothing of this one alive


def overwrite(outputs: Outputs) -> None:
    for output in outputs:
        output.detach().fill_(math.nan)


def checked_and_counted(
    operation: Operation, provider: Provider, i: Inputs, expected: Outputs, machine: Cpu | Cuda
) -> dict[tuple[str, str], dict[str, int | None]]:
    """Provider and pass to the counts of a row. Raises WrongAnswer."""
    check(operation, provider, i, expected)
    if provider.in_graph:
        check(operation, Provider(f"{provider.name} for a graph", provider.in_graph), i, expected)
    counts = {}
    for pass_ in operation.passes:
        call = partial(operation.run, pass_, provider.call, i)
        seen = Counts() if provider.name in UNSEEN else count(call, getattr(i, operation.copied).numel())
        costs = machine.costs(call, partial(operation.forget, i))
        if provider.in_graph:  # its graphs' memory was allocated when they were recorded
            costs = costs._replace(peak_bytes=None)
        counts[provider.name, pass_] = costs._asdict() | seen._asdict()
    return counts


def check_outputs(operation: Operation, name: str, outputs: Outputs, expected: Outputs) -> None:
    """`outputs`: as many of `expected` as there are, from the first on."""
    for what, got, want in zip(operation.results, outputs, expected, strict=False):
        tolerance = TOLERANCE + torch.finfo(got.dtype).eps / 2
        error = ((got.detach().double() - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            raise WrongAnswer(
                f"{name}: {what} is {error:.1e} away from float64, wanted at most {tolerance:.1e} "
                f"(relative to its largest value; shape {list(want.shape)}, {got.dtype})"
            )


def poison(like: Tensor) -> None:
    """Leaves NaN in the memory handed out next: an output that nobody writes must not be an earlier, right one."""
    sizes = (1, like.shape[0], 16 * like.shape[0], 4096)
    small = [torch.full((size,), math.nan, device=like.device) for size in sizes for _ in range(8)]
    large = [torch.full(like.shape, math.nan, device=like.device) for _ in range(2)]
    del small, large


def bench(
    operation: Operation,
    shape: tuple[int, ...],
    dtype: str,
    effort: Effort,
    facts: dict[str, str],
    machine: Cpu | Cuda,
    names: Sequence[str],
    failures: list[str],
) -> list[Row]:
    """All modes, providers and passes of one shape and dtype, the providers of a mode interleaved; a row each.

    A provider whose answer is wrong, or that cannot be run, is not timed; `failures` says which, and why.
    """
    i = operation.make_inputs(shape, dtype, machine.device)
    chosen: list[Provider] = []
    expected: dict[str, Outputs] = {}
    counts: dict[tuple[str, str], dict[str, int | None]] = {}
    for provider in operation.make_providers(names):
        expected[provider.name] = operation.expected(i, provider.name)
        with noted(failures, provider.name):
            counts |= checked_and_counted(operation, provider, i, expected[provider.name], machine)
            chosen.append(provider)

    rows = []
    for mode in machine.modes(getattr(i, operation.copied).nbytes) if chosen else []:
        with noted(failures, f"{mode.timing}, {mode.cache}"):
            timed = measured(operation, machine, mode, chosen, counts, i, expected, effort, failures)
            rows += [
                Row(
                    op=operation.name,
                    shape=shape,
                    dtype=dtype,
                    provider=provider,
                    pass_=pass_,
                    **percentiles(us),
                    repeats=len(us),
                    bytes=bytes_of(operation, i, provider, pass_),
                    threads=torch.get_num_threads(),
                    cores_elsewhere=timed.cores_elsewhere,
                    timing=mode.timing,
                    cache=mode.cache,
                    **counts.get((provider, pass_), {}),
                    **facts,
                )
                for (provider, pass_), us in timed.samples.items()
            ]
    return rows


def bytes_of(operation: Operation, i: Inputs, provider: str, pass_: str) -> int:
    return 2 * getattr(i, operation.copied).nbytes if provider == "copy" else operation.bytes_moved(i, provider, pass_)


def measured(
    operation: Operation,
    machine: Cpu | Cuda,
    mode: Mode,
    chosen: Sequence[Provider],
    counts: Mapping[tuple[str, str], dict[str, int | None]],
    i: Inputs,
    expected: dict[str, Outputs],
    effort: Effort,
    failures: list[str],
) -> Measured:
    """Every provider and pass, and the copy, in one mode. A graph adds what it holds to `counts`."""
    sets = copies(i, mode.sets)
    in_graph = mode.timing == "graph"
    calls = {
        (one.name, pass_): [
            partial(operation.run, pass_, (in_graph and one.in_graph) or one.call, each) for each in sets
        ]
        for one, pass_ in itertools.product(chosen, operation.passes)
    }
    sources = [getattr(each, operation.copied).detach() for each in sets]
    calls["copy", "copy"] = [partial(copy_into, torch.empty_like(source), source) for source in sources]
    if not in_graph:
        return machine.measure(mode, calls, effort)
    # A call that waits for the device cannot be captured: it has no times of this kind.
    capturable = {key: of_sets for key, of_sets in calls.items() if not counts.get(key, {}).get("host_syncs")}
    captured = capture(operation, machine, mode, capturable, expected, failures)
    for key in counts.keys() & captured.keys():
        counts[key].update(captured[key].seen._asdict())
    return machine.measure_captured(captured, effort)


def copy_into(target: Tensor, source: Tensor) -> Outputs:
    return (target.copy_(source),)


def capture(
    operation: Operation,
    machine: Cuda,
    mode: Mode,
    calls: dict[tuple[str, str], list[Callable[[], Outputs]]],
    expected: dict[str, Outputs],
    failures: list[str],
) -> dict[tuple[str, str], Captured]:
    """Captures each series once; what its graph writes is filled with NaN, then checked after a replay."""
    times = graph_repeats(mode, calls["copy", "copy"][0]()[0].nbytes)
    captured = {}
    for (provider, pass_), of_sets in calls.items():
        what = f"{provider} {pass_} in a graph"
        with noted(failures, what):
            graph = machine.capture(of_sets, times)
            if provider != "copy":
                overwrite(tuple(itertools.chain(*graph.outputs)))
                graph.replay()
                for outputs in graph.outputs:
                    check_outputs(operation, what, outputs, expected[provider])
            captured[provider, pass_] = graph
    return captured


@contextlib.contextmanager
def noted(failures: list[str], what: str) -> Iterator[None]:
    """What fails in here is left out; the rest of the run is worth having all the same."""
    try:
        yield
    except WrongAnswer as error:
        failures.append(f"wrong answer, not timed: {error}")
    except Exception as error:
        traceback.print_exc()
        failures.append(f"{what}: left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    else:
        return
    print(failures[-1], file=sys.stderr, flush=True)


def cold_starts(
    module: str,
    operation: Operation,
    shape: tuple[int, ...],
    dtype: str,
    repeats: int,
    facts: dict[str, str],
    machine: Cpu | Cuda,
    names: Sequence[str],
) -> list[Row]:
    """Two rows a provider, each the wait for the first results, in `repeats` fresh processes.

    "cold start" counts from the first import, "first call" from when everything but the provider is there, with what
    the profiler saw of a later call. `module`: the bench file whose `OPERATIONS` has the operation.
    """
    rows = []
    pass_ = operation.passes[-1]
    i = operation.make_inputs(shape, dtype, machine.device)
    for name in names:
        runs = [cold_start(module, operation.name, name, shape, dtype, machine.name) for _ in range(repeats)]
        seen = DeviceCounts(**runs[-1].get("seen", {}))
        for timing, seconds, counts in (
            ("cold start", [run["finished"] for run in runs], DeviceCounts()),
            ("first call", [run["finished"] - run["ready"] for run in runs], seen),
        ):
            rows.append(
                Row(
                    op=operation.name,
                    shape=shape,
                    dtype=dtype,
                    provider=name,
                    pass_=pass_,
                    **percentiles([1e6 * one for one in seconds]),
                    repeats=repeats,
                    bytes=operation.bytes_moved(i, name, pass_),
                    threads=torch.get_num_threads(),
                    cores_elsewhere=None,
                    timing=timing,
                    cache="cold",
                    **counts._asdict(),
                    **facts,
                )
            )
    return rows


def report(rows: list[Row], title: str = "") -> str:
    """One operation, shape, dtype and mode as a table. `of copy` is the share of the copy's bandwidth."""
    p50 = {(row.provider, row.pass_): row.p50_us for row in rows}
    copy = next(row for row in rows if row.provider == "copy")
    width = 1 + max(len(row.provider) for row in rows)
    lines = [
        "",
        f"{copy.op} {list(copy.shape)} {copy.dtype}  {title}".rstrip(),
        f"  {'pass':<17}{'provider':<{width}}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}{'GB/s':>8}{'of copy':>9}"
        f"{'ops':>5}{'latent':>7}{'syncs':>6}{'allocs':>7}{'moved':>7}{'fused is':>17}",
    ]
    for row in sorted(rows, key=lambda row: PASSES.index(row.pass_)):
        peer = ("fused", row.pass_) in p50 and row.provider not in ("copy", "fused")
        faster = f"{row.p50_us / p50['fused', row.pass_]:.2f}x as fast" if peer else ""
        times = "".join(f"{us:10.1f}" for us in (row.p20_us, row.p50_us, row.p80_us))
        seen = (row.ops, row.latent_ops, row.host_syncs, row.latent_allocations)
        counted = "".join(f"{'' if n is None else n:>{w}}" for n, w in zip(seen, (5, 7, 6, 7), strict=True))
        moved = "" if row.bytes_moved is None else f"{row.bytes_moved / row.bytes:.1f}x"
        share = row.gb_per_s / copy.gb_per_s
        lines.append(
            f"  {row.pass_:<17}{row.provider:<{width}}{times}{row.gb_per_s:8.1f}{share:>9.0%}"
            f"{counted}{moved:>7}{faster:>17}".rstrip()
        )
    last = max((pass_ for _, pass_ in p50), key=PASSES.index)
    if ("fused", last) in p50:
        two_copies = p50["fused", last] / (2 * copy.p50_us)
        lines.append(f"  fused {last} takes {two_copies:.2f} times as long as two copies of one tensor")
    return "\n".join(lines + not_quiet(rows))


def not_quiet(rows: list[Row]) -> list[str]:
    """A line for the end of a table, if something else ran meanwhile."""
    most = max(row.cores_elsewhere or 0.0 for row in rows)
    if most <= MAX_CORES_ELSEWHERE:
        return []
    return [f"  NOT QUIET: {most} processors were busy with something else; quote none of this"]


def reports(rows: list[Row]) -> str:
    """Of one operation, shape and dtype: a table per mode."""
    by_mode: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_mode.setdefault(f"{row.timing}, {row.cache}", []).append(row)
    return "\n".join(report(of_mode, mode if len(by_mode) > 1 else "") for mode, of_mode in by_mode.items())


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


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """What every bench in one process takes: where to run, how long, and where the rows go."""
    parser.add_argument("--device", choices=MACHINES, default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works, not for numbers")
    parser.add_argument("--libc-malloc", action="store_true", help="leave malloc as it is: adds luck with page faults")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")


def set_up(
    parser: argparse.ArgumentParser, args: argparse.Namespace, wanted: Sequence[str]
) -> tuple[Cpu | Cuda, dict[str, str]]:
    """The machine and its facts, printed; ends the process where it, or a provider that is `wanted`, is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: torch {torch.__version__} finds no usable CUDA device\n")
    if "triton" in wanted and importlib.util.find_spec("triton") is None:
        parser.exit(2, f"{parser.prog}: triton is not installed; name the others with --providers\n")
    for name in wanted:
        if name in MACHINES[args.device].lacks:
            parser.exit(2, f"{parser.prog}: {name} runs on --device cuda alone\n")
    torch.set_num_threads(args.threads)
    machine = Cpu(args.libc_malloc) if args.device == "cpu" else MACHINES[args.device]()
    facts = machine.facts() | ({"commit": args.commit} if args.commit else {})
    print(
        f"{facts['device']}, {args.threads} threads, torch {facts['torch']}, "
        f"flowdppo_ops {facts['flowdppo_ops']} at {facts['commit']}  {facts['environment']}".rstrip()
    )
    return machine, facts


def main(
    module: str, summary: str, operations: Mapping[str, Operation], usual: Sequence[str], argv: list[str] | None
) -> list[Row]:
    """The command line of the bench file `module`, whose operations are `operations`; `usual`: which run by default."""
    every = list(operations.values())
    dtypes = list(dict.fromkeys(name for one in every for name in one.dtypes))
    providers = list(dict.fromkeys(name for one in every for name in one.providers))
    parser = argparse.ArgumentParser(prog=module, description=summary)
    add_machine_options(parser)
    parser.add_argument("--ops", nargs="+", choices=operations, default=list(usual), help=f"default: {' '.join(usual)}")
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, help=f"of {', '.join(SIZES)}, or AxBxC; default: those of the device"
    )
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="default: all the operation has")
    parser.add_argument("--providers", nargs="+", choices=providers, help="default: all that operation and device have")
    parser.add_argument("--cold-starts", type=int, help="fresh processes per provider (default: 1 on cuda, 0 on cpu)")
    parser.add_argument("--no-cases", action="store_true", help="cold starts alone")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after that; default: no end")
    args = parser.parse_args(argv)
    wanted = args.providers or [name for name in providers if name not in MACHINES[args.device].lacks]
    machine, facts = set_up(parser, args, wanted)
    rows: list[Row] = []
    failures: list[str] = []
    end = time.monotonic() + 60 * args.minutes

    def in_time(what: str) -> bool:
        if time.monotonic() < end:
            return True
        print(f"\nno time left for {what}")
        return False

    def names_of(operation: Operation, shape: tuple[int, ...], dtype: str) -> list[str]:
        """Who was named; else all, but for those that a case of this kind is not worth the time of."""

        def worthwhile(name: str) -> bool:
            sizes = None if args.providers else machine.seldom.get(name)
            return sizes is None or (dtype == operation.dtypes[0] and shape in map(SIZES.get, sizes))

        return [name for name in operation.providers if name in wanted and worthwhile(name)]

    def add(new: list[Row]) -> None:
        rows.extend(new)
        if args.json:
            write_json(rows, args.json)  # after each case: a run that is cut short leaves what it has

    shapes = args.sizes or [SIZES[name] for name in machine.sizes]
    repeats = machine.cold_starts if args.cold_starts is None else args.cold_starts
    for operation in map(operations.get, args.ops):
        cases = list(itertools.product(shapes, [name for name in operation.dtypes if name in args.dtypes]))
        for shape, dtype in [] if args.no_cases else cases:
            case = f"{operation.name} {list(shape)} {dtype}"
            if not in_time(case):
                continue
            start, effort = time.monotonic(), machine.quick if args.quick else machine.full
            of_case: list[str] = []
            with noted(of_case, case), machine.session():
                names = names_of(operation, shape, dtype)
                new = bench(operation, shape, dtype, effort, facts, machine, names, of_case)
                if new:
                    add(new)
                    print(reports(new))
            print(f"  {time.monotonic() - start:.0f} s for this case", flush=True)
            failures += [f"{case}: {failure}" for failure in of_case]
        if repeats > 0 and cases:
            shape, dtype = cases[0]
            case = f"{operation.name} {list(shape)} {dtype}"
            print(f"\n{case}: seconds to the first results in a fresh process")
            for name in names_of(operation, shape, dtype):
                if args.providers is None and name in machine.seldom:  # a minute or so a process
                    continue
                if not in_time(f"the cold start of {name}"):
                    continue
                with noted(failures, f"{case}: cold start of {name}"):
                    new = cold_starts(module, operation, shape, dtype, repeats, facts, machine, [name])
                    for row in new:
                        print(f"  {row.timing:<12}{row.provider:<16}{row.p50_us / 1e6:8.2f}", flush=True)
                    add(new)
    if failures:
        sys.exit("\n".join(f"{module}: {failure}" for failure in failures))
    return rows
