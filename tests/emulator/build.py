"""Compiles the kernels for the emulator, plain or under a sanitizer, with a fault planted where a test asks for it."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from compilers import cxx

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"

# -ffp-contract=off: nothing is fused but by `fmaf`, as build.rs has it for GPUs. The scheduler is built without
# sanitizers, see there.
_COMMON = ("-std=c++20", "-g", "-ffp-contract=off")
_SANITIZERS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}


class Fault(NamedTuple):
    """A change to a kernel source. `old` must be there, once, or the source has moved away from the test."""

    file: str
    old: str
    new: str


# Threads are what TSan pays for, 0.6 ms each: two warps a block are enough for any race between warps.
FEWER_THREADS = Fault("common/reduce.cuh", "constexpr int kThreads = 256;", "constexpr int kThreads = 64;")


def build(
    folder: Path, sanitizer: str = "plain", fault: Fault | None = None, alone: tuple[str, str] | None = None
) -> Path:
    """The server (server.cpp) as an executable in `folder`, an empty one of its own.

    `alone`: unit and variant of the only kernels, enough where a planted fault is looked for: most of the time to
    compile is the others'.
    """
    kernels, flags = KERNELS, _COMMON + _SANITIZERS[sanitizer]
    edits = [edit for edit in (fault, FEWER_THREADS if sanitizer == "tsan" else None) if edit]
    if edits or alone:
        kernels = folder / "kernels"
        shutil.copytree(KERNELS, kernels)
    for edit in edits:
        _edit(kernels / edit.file, functools.partial(_replace, edit))
    if alone:
        unit, variant = alone
        file, entry = ("transition.cuh", "  X(") if unit == "policy_loss" else (f"{unit}.cu", f"{unit.upper()}(")
        _edit(kernels / file, functools.partial(_only, entry, variant))
        flags += (f"-DEMULATE_{unit.upper()}={variant}",)
    include = ("-DFLOWDPPO_EMULATOR", "-I", kernels, "-I", HERE, "-Wno-unknown-pragmas")  # of #pragma unroll
    _run(cxx(), *flags, *include, "-c", HERE / "launch.cpp", "-o", folder / "launch.o")
    _run(cxx(), *flags, folder / "launch.o", *_unsanitized_objects(folder.parent), "-o", folder / "server")
    return folder / "server"


@functools.cache
def _unsanitized_objects(folder: Path) -> tuple[Path, Path]:
    """The scheduler and the server, the same for every build of a test run."""
    objects = folder / "scheduler.o", folder / "server.o"
    for made in objects:
        _run(cxx(), *_COMMON, "-O2", "-c", HERE / f"{made.stem}.cpp", "-o", made)
    return objects


def _run(*command: str | Path | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def _edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def _replace(fault: Fault, text: str) -> str:
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old}"
    return text.replace(fault.old, fault.new)


def _only(entry: str, variant: str, text: str) -> str:
    """Without the entry points of the other variants; `entry`: how the line of one begins."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(entry) or line.startswith(f"{entry}{variant},"))
