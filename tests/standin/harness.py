"""The stand-in driver from Python: building it, and talking to it from the process that has it loaded."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

from compilers import cxx
from launch_arguments import ARGUMENTS

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compiles `libcuda.so.1` into `folder`, for LD_LIBRARY_PATH."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command = [cxx(), *flags, HERE / "libcuda.cpp", "-o", folder / "libcuda.so.1", "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return folder


def build_kernels(folder: Path) -> Path:
    """The kernels compiled for the emulator, as a library that the driver can launch from."""
    library = folder / "libkernels.so"
    emulator, kernels = HERE.parent / "emulator", HERE.parent.parent / "kernels"
    sources = [emulator / "launch.cpp", emulator / "scheduler.cpp"]
    flags = [
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-DFLOWDPPO_EMULATOR",
        f"-I{kernels}",
        f"-I{emulator}",
    ]
    subprocess.run([cxx(), *flags, *sources, "-o", library], check=True, timeout=240)
    return library


def run(
    scenario: str,
    folder: Path | None,
    capabilities: str = "90",
    kernels: Path | None = None,
    script: str = "scenarios.py",
) -> None:
    """Runs a function of `script` in a process of its own: a process loads its driver and its modules only once."""
    command = [sys.executable, str(HERE / script), scenario]
    environment = surroundings(folder, capabilities, kernels)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (
        f"{scenario} on {capabilities} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )


def rehearse(folder: Path, kernels: Path, *arguments: str | Path) -> str:
    """What pytest says of tests marked gpu, under `rehearsal`."""
    command = [sys.executable, "-m", "pytest", "-p", "standin.rehearsal", "-p", "no:cacheprovider", "-m", "gpu"]
    # One thread: two cost more than they save at these sizes.
    environment = surroundings(folder, "90", kernels) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240
    ).stdout


def surroundings(folder: Path | None, capabilities: str, kernels: Path | None) -> dict[str, str]:
    """Environment variables that lead to the stand-in."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, STANDIN_CAPABILITIES=capabilities, PYTHONPATH=path)
    environment.pop("LD_LIBRARY_PATH", None)
    if folder is not None:
        environment["LD_LIBRARY_PATH"] = str(folder)
    if kernels is not None:
        environment["STANDIN_KERNELS"] = str(kernels)
    return environment


class Driver:
    """The library that the launcher has loaded, or will load."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name in ("standin_context", "standin_stream"):
            getattr(self._library, name).restype = ctypes.c_void_p
        self._library.standin_take_log.restype = ctypes.c_size_t
        self._library.cuInit(0)  # there are devices from now on

    def fail(self, call: str, code: int) -> None:
        self._library.standin_fail(call.encode(), code)

    def context(self, device: int) -> int:
        return self._library.standin_context(device)

    def stream(self, device: int = 0) -> int:
        return self._library.standin_stream(device)

    def capture(self, stream: int, on: bool) -> None:
        self._library.standin_capture(ctypes.c_void_p(stream), on)

    def capture_mode(self) -> int:
        return self._library.standin_capture_mode()

    @property
    def current(self) -> int | None:
        context = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value

    @current.setter
    def current(self, context: int | None) -> None:
        self._library.cuCtxSetCurrent(ctypes.c_void_p(context))

    def log(self) -> list[str]:
        """What was loaded and launched since the last look."""
        text = ctypes.create_string_buffer(self._library.standin_take_log(None, 0))
        self._library.standin_take_log(text, len(text))
        return text.value.decode().splitlines()

    def launches(self) -> list[Launch]:
        return [Launch(line) for line in self.log() if line.startswith("launch")]


class Launch:
    def __init__(self, line: str) -> None:
        pattern = r"launch (\w+) grid (\d+) 1 1 block (\d+) 1 1 shared 0 stream (\S+) parameters (\w+)"
        name, blocks, threads, stream, parameters = re.fullmatch(pattern, line).groups()
        self.name, self.blocks, self.threads = name, int(blocks), int(threads)
        self.stream = 0 if stream in ("0", "(nil)") else int(stream, 16)
        (kind,) = (kind for prefix, kind in ARGUMENTS.items() if name.startswith(prefix))
        self.parameters = kind.from_buffer_copy(bytes.fromhex(parameters))
