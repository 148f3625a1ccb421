"""Compiles the kernels for the emulator, as a library that the stand-in driver launches from."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from compilers import cxx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "kernels"
KEPT = ROOT / "target" / "emulator"

# -ffp-contract=off: nothing is fused but by `fmaf`, as build.rs has it for GPUs. The scheduler is built without
# sanitizers, see there.
COMMON = ("-std=c++20", "-g1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas")  # of #pragma unroll
SANITIZERS = {
    "asan": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-O1", "-fsanitize=thread"),
}


class Part(NamedTuple):
    """Variants of a unit's kernels that are compiled together; all parts at the same time."""

    unit: str
    variants: tuple[str, ...]


def parts() -> list[Part]:
    """All kernels, those of the losses in two parts: together they would take longer than all else."""
    losses = re.findall(r"^  X\((\w+),", (KERNELS / "transition.cuh").read_text(), re.MULTILINE)
    steps = re.findall(r"^SDE_STEP\((\w+),", (KERNELS / "sde_step.cu").read_text(), re.MULTILINE)
    of_steps = tuple(name for name in losses if name.startswith("step"))
    return [
        Part("policy_loss", of_steps),
        Part("policy_loss", tuple(name for name in losses if name not in of_steps)),
        Part("sde_step", tuple(steps)),
    ]


def library(sanitizer: str) -> Path:
    """All kernels. Kept in target/ until a source changes; whoever comes while they are compiled waits."""
    import fcntl

    sources = sorted([*KERNELS.rglob("*.cu*"), *HERE.glob("*.[ch]*"), Path(__file__)])
    version = subprocess.run([cxx(), "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(b"\0".join([version, *(source.read_bytes() for source in sources)])).hexdigest()[:16]
    kept = KEPT / f"{sanitizer}-{state}.so"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            made = build(KEPT / f"{sanitizer}-{state}", sanitizer, parts())
            for old in KEPT.glob(f"{sanitizer}-*.so"):
                old.unlink()
            made.replace(kept)
            shutil.rmtree(made.parent)
    return kept


def build(folder: Path, sanitizer: str, compiled: Iterable[Part], kernels: Path = KERNELS) -> Path:
    """`kernels`: the sources, which need not be the project's own."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = (*COMMON, "-DFLOWDPPO_EMULATOR", "-I", HERE)
    jobs = [(HERE / f"{name}.cpp", folder / f"{name}.o", ("-O2",)) for name in ("scheduler", "launch")]
    for number, part in enumerate(compiled):
        # Without the entry points of other parts: an include path before `kernels` has the file that lists them.
        listed = "transition.cuh" if part.unit == "policy_loss" else "sde_step.cu"
        entry = rf"^(?:  X|SDE_STEP)\((?!(?:{'|'.join(part.variants)}),)\w+,.*\n"
        sources = folder / f"kernels{number}"
        shutil.copytree(kernels, sources, dirs_exist_ok=True)
        text = re.sub(entry, "", (sources / listed).read_text(), flags=re.MULTILINE)
        (sources / listed).write_text(text)
        variants = " ".join(f"X({name})" for name in part.variants)
        which = f"-DEMULATE_{part.unit.upper()}", f"-DVARIANTS={variants}", "-I", sources
        jobs.append((HERE / "kernels.cpp", folder / f"part{number}.o", (*SANITIZERS[sanitizer], *which)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: run(cxx(), *flags, *job[2], "-c", job[0], "-o", job[1]), jobs[::-1]))
    link = [flag for flag in SANITIZERS[sanitizer] if flag.startswith("-fsanitize")]
    run(cxx(), "-shared", *link, *(job[1] for job in jobs), "-o", folder / "libkernels.so")
    return folder / "libkernels.so"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
