"""All that needs a GPU, in stages that each end on their own: tests, sanitizer, figures, profile.

    python benches/on_gpu.py OUT                       # everything; OUT gets a log and the rows of each stage
    python benches/on_gpu.py OUT suite sanitize        # some stages; "bench" is all of its parts
    python benches/on_gpu.py OUT bench --minutes 9     # ends by then: what has not begun is left out
    python benches/on_gpu.py --list                    # the stages, and how long they are expected to take

Needs the package installed, PyTorch, pytest and Triton; compute-sanitizer and ncu for their stages. No network, no
build. A stage that fails stops no other; the exit status is 1 if one did.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import bench_policy_loss
import bench_sde_step
from devices import Cuda, graph_repeats
from runner import SIZES, Operation

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TIMED = {bench_policy_loss: ("policy_loss", "step_loss"), bench_sde_step: ("sde_step_sample", "sde_step_replay")}
KERNELS = ("policy_loss", "sde_step")  # what every kernel's name begins with
TAIL = 15  # lines of a log that are shown when its stage fails


class Command(NamedTuple):
    name: str
    argv: list[str]
    environment: Mapping[str, str] = {}


@dataclass(frozen=True)
class Stage:
    """name: also that of its log. minutes: expected. what: for the list."""

    name: str
    commands: list[Command]
    minutes: float
    what: str = field(default="")


# ---- expected minutes ------------------------------------------------------------------------------------------------
# From the effort that `devices.Cuda` asks for and these figures of the card and of the compilers, which are guesses.

L2_BYTES, BYTES_PER_US = 60 << 20, 4e6
TRAFFIC = {"eager": 10, "compile": 2, "compile_max": 2}  # bytes moved, in those that must; others 1
COMPILING_S = {"compile": 10.0, "compile_max": 60.0, "triton": 12.0}  # a case; others nothing
STARTING_S = 6.0  # a fresh process: importing torch, making inputs
CASE_S = 2.0  # inputs, the right answer, counting
PART_MINUTES = 8.0  # longest part of `bench`: ten minutes with something to spare


class Assumed(Cuda):
    """The modes of a card that need not be there."""

    def __init__(self) -> None:
        self._l2_bytes = L2_BYTES


def case_seconds(operation: Operation, size: str, dtype: str) -> float:
    """Of one shape and dtype: all modes, providers and passes."""
    tensor_bytes = math.prod(SIZES[size]) * (2 if dtype == "bf16" else 4)
    effort, seconds = Assumed.full, CASE_S
    providers = [name for name in operation.providers if is_tried(name, operation, size, dtype)]
    for provider in providers:
        seconds += COMPILING_S.get(provider, 0.0)
    series = [*itertools.product(providers, operation.passes), ("copy", "copy")]
    for mode, (provider, pass_) in itertools.product(Assumed().modes(tensor_bytes), series):
        tensors = {"copy": 2, "forward": 4}.get(pass_, 7)
        call_us = 10 + TRAFFIC.get(provider, 1) * tensors * tensor_bytes / BYTES_PER_US
        calls = mode.sets * graph_repeats(mode, tensor_bytes) if mode.timing == "graph" else 1
        us = calls * call_us
        blocks = max(effort.block_us, 3 * us) + max(effort.settle_us, us) + 2 * us
        seconds += (effort.rounds * blocks + 4 * us) / 1e6
    return seconds


def is_tried(provider: str, operation: Operation, size: str, dtype: str) -> bool:
    """Where nobody names the providers."""
    sizes = Cuda.seldom.get(provider)
    return sizes is None or (size in sizes and dtype == operation.dtypes[0])


def cold_start_seconds(operation: Operation) -> float:
    providers = [name for name in operation.providers if name not in Cuda.seldom]
    each = [STARTING_S + COMPILING_S.get(provider, 0.0) for provider in providers]
    return Cuda.cold_starts * sum(each)


# ---- stages ----------------------------------------------------------------------------------------------------------


def script(folder: str, name: str, *arguments: str | Path) -> list[str]:
    return [PYTHON, str(ROOT / folder / name), *map(str, arguments)]


def machine() -> Stage:
    look = ["nvidia-smi", "-L"], [PYTHON, "-m", "flowdppo_ops", "doctor"]
    names = "nvidia-smi", "doctor"
    return Stage("machine", [Command(*one) for one in zip(names, look, strict=True)], 0.3, "what is there")


def suite() -> Stage:
    # The project's own options name plugins that need not be installed.
    options = ["-o", "addopts=-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q", "-m", "gpu"]
    # Without a GPU every test is skipped, which pytest calls a success.
    is_there = [PYTHON, "-c", "import torch; print(torch.cuda.get_device_name())"]
    pytest = [PYTHON, "-m", "pytest", *options, str(ROOT / "tests")]
    # What the CPU computes is small, and on shared cores more threads only wait for one another.
    commands = [Command("torch", is_there), Command("pytest", pytest, {"OMP_NUM_THREADS": "4"})]
    return Stage("suite", commands, 4.0, "the tests marked gpu")


def sanitize() -> Stage:
    """Every kernel under each tool. initcheck sees all kernels: it must know what PyTorch's have written; the others
    look at ours alone. What an API call returns is PyTorch's business, and ours raises."""
    every_kernel = script("tests", "every_kernel.py")
    commands = [Command("count", [*every_kernel, "--count"])]
    own = ["--kernel-name", ",".join(f"kns={name}" for name in KERNELS)]
    for tool, options in {
        "memcheck": ["--report-api-errors", "no", *own],
        "racecheck": own,
        "synccheck": own,
        "initcheck": [],
    }.items():
        argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *options, *every_kernel]
        commands.append(Command(tool, argv, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return Stage("sanitize", commands, 7.0, "every kernel under compute-sanitizer")


def bench(out: Path, options: list[str]) -> Iterator[Stage]:
    """A part holds sizes of one operation that fit in `PART_MINUTES`; cold starts go with the first."""
    for module, names in TIMED.items():
        for name in names:
            operation = module.OPERATIONS[name]
            for number, (sizes, seconds) in enumerate(parts(operation)):
                stage = f"bench-{name}" + (f"-{number + 1}" if number else "")
                what = ["--device", "cuda", "--ops", name, "--sizes", *sizes]
                what += ["--minutes", str(PART_MINUTES)] + ([] if number == 0 else ["--cold-starts", "0"])
                argv = script("benches", f"{module.__name__}.py", *what, "--json", out / f"{stage}.json", *options)
                yield Stage(stage, [Command(name, argv)], seconds / 60, " ".join(sizes))


def parts(operation: Operation) -> list[tuple[list[str], float]]:
    """Sizes and expected seconds."""
    out = [([], cold_start_seconds(operation))]
    for size in Cuda.sizes:
        seconds = sum(case_seconds(operation, size, dtype) for dtype in operation.dtypes)
        sizes, so_far = out[-1]
        if sizes and so_far + seconds > 60 * PART_MINUTES:
            out.append(([size], seconds))
        else:
            out[-1] = ([*sizes, size], so_far + seconds)
    return out


# Those of `ncu --list-sections`: bytes and throughput, L2 hits and sectors a request, occupancy, stall reasons.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "LaunchStats", "Occupancy")
SECTIONS += ("SchedulerStats", "WarpStateStats")


def profile(out: Path) -> Stage:
    argv = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    argv += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})_", "--log-file", str(out / "profile.csv")]
    for section in SECTIONS:
        argv += ["--section", section]
    argv += script("benches", "launch_once.py", "--device", "cuda")
    return Stage("profile", [Command("ncu", argv)], 3.0, "one launch of each kernel beyond the L2, under ncu")


def step(out: Path, options: list[str]) -> Stage:
    argv = script("benches", "bench_training_step.py", "--device", "cuda", "--json", out / "step.json", *options)
    return Stage("step", [Command("training step", argv)], 4.0, "the loss's share of a training step")


def all_stages(out: Path, commit: str | None) -> list[Stage]:
    options = ["--commit", commit] if commit else []
    measuring = *bench(out, options), profile(out), step(out, options)
    return [machine(), suite(), sanitize(), *measuring]


def chosen(stages: list[Stage], names: Iterable[str]) -> list[Stage]:
    """In the order of `stages`. A name stands for the stages that begin with it; raises ValueError if none does."""
    wanted = []
    for name in names:
        found = [one for one in stages if one.name == name or one.name.startswith(f"{name}-")]
        if not found:
            raise ValueError(f"no stage {name!r}; there are {', '.join(one.name for one in stages)}")
        wanted += found
    return [one for one in stages if one in wanted or not wanted]


# ---- running ---------------------------------------------------------------------------------------------------------


def run(command: Command, log: Path, seconds: float | None) -> str:
    """Appends to the log; what became of it: "ok", or a reason."""
    with log.open("a") as output:
        output.write(f"$ {' '.join(command.argv)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                command.argv,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | command.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"not started: {error.strerror}: {command.argv[0]}"
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started: its own session
                process.wait()
    return "ok" if status == 0 else f"exit status {status}"


def run_all(stages: list[Stage], out: Path, minutes: float | None) -> bool:
    """Whether all went well. The summary is written after every command: a run that is cut short leaves it."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    lines: list[str] = []
    for stage, command in [(each, command) for each in stages for command in each.commands]:
        log = out / f"{stage.name}.txt"
        if command is stage.commands[0]:
            log.write_text("")
        start = time.monotonic()
        left = None if deadline is None else deadline - start
        result = "not begun: out of time" if left is not None and left <= 0 else run(command, log, left)
        lines.append(f"{stage.name:24}{command.name:16}{(time.monotonic() - start) / 60:6.1f} min  {result}")
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)
        if result != "ok":
            print(*(f"    {line}" for line in log.read_text().splitlines()[-TAIL:]), sep="\n", flush=True)
    print("\n".join(["", *lines]))
    return all(line.endswith("  ok") for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a folder, made if it is not there")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--minutes", type=float, help="end after so many, whatever is left to do")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")
    parser.add_argument("--list", action="store_true", help="print the stages and the minutes expected")
    args = parser.parse_args(argv)
    out = (args.out or Path()).resolve()
    every = all_stages(out, args.commit)
    if args.list:
        for one in every:
            print(f"{one.name:24}{one.minutes:5.1f} min  {one.what}")
        print(f"{'together':24}{sum(one.minutes for one in every):5.1f} min")
        return 0
    if args.out is None:
        parser.error("OUT is missing")
    try:
        stages = chosen(every, args.stages)
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)
    return 0 if run_all(stages, out, args.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
