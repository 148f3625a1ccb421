"""`benches/tune.py` in a process with the stand-in driver: variants compiled by NVRTC, launched through cuda.bindings.

The driver runs the emulated kernels as they ship, whatever the variant: what is seen here is launches, not variants.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from cuda.bindings import driver as cuda
from launch_arguments import Latents
from test_bench_cuda import fake_cuda

from standin.emulated import on_gpu
from standin.harness import Driver, Launch
from standin.scenarios import MULTIPROCESSORS, refused

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))  # its harness, not the one beside this file
import devices
import harness
import runner
import tune
import variants

SHAPE = (3, 9001)  # two blocks to a row by default, with a tail each


def run(*arguments: str) -> list[harness.Row]:
    """The command line on a machine whose device memory is the host's."""
    cuda.cuCtxSetCurrent(cuda.cuDevicePrimaryCtxRetain(0)[1])
    on_gpu()
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(
        major=9, minor=0, multi_processor_count=MULTIPROCESSORS
    )
    runner.SIZES["tiny"] = SHAPE
    runner.graph_repeats = lambda *_: 1
    tune.MACHINE = fake_cuda(devices, harness)
    return tune.main([*arguments, "--sizes", "tiny", "--quick", "--jobs", "2", "--commit", "abc"])


class Seen(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    splits: int
    latents: tuple  # addresses and dtypes
    is_dependent: bool


def launches_of(driver: Driver, call) -> list[Seen]:
    driver.log()
    call()
    log = driver.log()
    found = []
    for before, line in zip(["", *log], log, strict=False):
        if line.startswith("launch"):
            launch = Launch(line)
            of = launch.parameters
            latents = of.latents if hasattr(of, "latents") else Latents(of.output, of.uncond, of.sample, of.next)
            found.append(
                Seen(launch.name, launch.blocks, launch.threads, of.splits, latents.as_tuple(), before == "dependent")
            )
    return found


def same_launches() -> None:
    """The default's are the package's own, and nothing comes between them; others differ as they say. Every variant has
    a row for each pass."""
    driver, capture, seen = Driver(), runner.capture, {}

    def look(operation, machine, mode, calls, *others):
        for (name, pass_), sets in calls.items():
            seen[operation.name, name, pass_] = launches_of(driver, sets[0])
        return capture(operation, machine, mode, calls, *others)

    runner.capture = look
    rows = run("--only", "dependent", "blocks=8", "min_part=2048", "--cases", "loss_f32", "step_residual", "sample")
    for operation, peer, passes in (
        ("tune loss_f32", "fused", ("forward", "forward+backward")),
        ("tune step_residual", "fused_residual", ("forward", "forward+backward")),
        ("tune sample", "fused", ("forward",)),
    ):
        for pass_ in passes:
            assert seen[operation, "default", pass_] == seen[operation, peer, pass_], (operation, pass_)
    both = seen["tune loss_f32", "dependent", "forward+backward"]
    assert [(launch.kernel, launch.is_dependent) for launch in both] == [
        ("policy_loss_forward_f32", False),
        ("policy_loss_backward_f32", True),
    ]
    assert [launch.splits for launch in seen["tune loss_f32", "default", "forward"]] == [3]
    assert [launch.splits for launch in seen["tune sample", "min_part=2048", "forward"]] == [5]
    assert {(row.op, row.provider, row.pass_) for row in rows if row.provider == "blocks=8"} == {
        ("tune loss_f32", "blocks=8", "forward"),
        ("tune loss_f32", "blocks=8", "forward+backward"),
        ("tune sample", "blocks=8", "forward"),
    }
    assert {row.cache for row in rows} == {"cold"}
    assert all("nvrtc 1" in row.environment and row.commit == "abc" for row in rows)


def wrong_answers() -> None:
    """None is timed, and the others are: here of a grid that leaves a part out, and of a launch that is refused."""
    Driver()
    timed, table = [], tune.table
    tune.table = lambda chosen, rows: timed.extend(rows) or table(chosen, rows)
    grid = variants.Variant.grid

    def without_the_last_block(self, *shape):
        splits, blocks = grid(self, *shape)
        return splits, blocks - (self.name == "blocks=8")

    variants.Variant.grid = without_the_last_block
    names = ("blocks=8", "blocks=32", "threads=128")  # the emulated kernels take 256
    refused(
        SystemExit,
        lambda: run("--only", *names, "--cases", "loss_f32"),
        "tune: loss_f32 tiny: threads=128: left out: RuntimeError: CUDA_ERROR_INVALID_VALUE",
        "tune: loss_f32 tiny: wrong answer, not timed: blocks=8: loss is",
    )
    assert {row.provider for row in timed} == {"copy", "fused", "default", "blocks=32"}


if __name__ == "__main__":
    globals()[sys.argv[1]]()
