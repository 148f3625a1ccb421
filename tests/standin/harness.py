"""The stand-in driver from Python: building it, and talking to it from the process that has it loaded."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from compilers import cxx, sanitizer_library
from launch_arguments import ARGUMENTS

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compiles `libcuda.so.1` into `folder`, for LD_LIBRARY_PATH."""
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command = [cxx(), *flags, HERE / "libcuda.cpp", "-o", folder / "libcuda.so.1", "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return folder


def run(
    scenario: str,
    folder: Path | None,
    capabilities: str = "90",
    kernels: Path | None = None,
    script: str = "scenarios.py",
) -> None:
    """Runs a function of `script` in a process of its own: a process loads its driver and its modules only once."""
    done = _process([HERE / script, scenario], folder, kernels, STANDIN_CAPABILITIES=capabilities)
    assert done.returncode == 0, f"{scenario} on {capabilities} ended with {done.returncode}:\n{done.stdout}"


def pytest(
    plugin: str, folder: Path, kernels: Path, *arguments: str | Path, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """What pytest says of tests on emulated kernels, by one of the plugins `emulated` and `rehearsal`."""
    command = ["-m", "pytest", "-p", f"standin.{plugin}", "-p", "no:cacheprovider", "-v", "--no-header"]
    command += ["--capture=sys", *arguments]  # of which a sanitizer, which writes its report itself, knows nothing
    devices = {"STANDIN_CAPABILITIES": "90,90", "STANDIN_MULTIPROCESSORS": "4,0"}
    return _process(command, folder, kernels, timeout=timeout, NO_COLOR="1", **devices)


def _process(
    arguments: Iterable[str | Path],
    folder: Path | None,
    kernels: Path | None = None,
    *,
    timeout: float = 240,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Python, where the stand-in is the driver."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, STANDIN_CAPABILITIES="90", PYTHONPATH=path) | variables
    environment.pop("LD_LIBRARY_PATH", None)
    if folder is not None:
        environment["LD_LIBRARY_PATH"] = str(folder)
    command = [sys.executable, *map(str, arguments)]
    if kernels is not None:
        # One thread: two cost more than they save at these sizes.
        environment |= {"STANDIN_KERNELS": str(kernels), "OMP_NUM_THREADS": "1"}
        sanitizer = kernels.name.partition("-")[0]
        environment |= OPTIONS
        # By `env`, so that only Python itself has a sanitizer; which has to be there before all else.
        libraries = sanitizer_library(sanitizer), sanitizer_library("stdc++")
        command = [*_fixed_addresses(), "env", f"LD_PRELOAD={':'.join(libraries)}", *command]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )


OPTIONS = {
    # What is allocated is filled, lest an element that is not written passes for a result.
    "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=165:max_malloc_fill_size=1000000000",
    # Python and PyTorch are not instrumented.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """The command that switches address randomisation off, where it may: under 32 random bits, the default of recent
    kernels, the TSan of older compilers ends with "unexpected memory mapping"."""
    command = ("setarch", "-R")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return ()
    return command if done.returncode == 0 else ()


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

    def shuffle(self, seed: int) -> None:
        """From now on every emulated launch has another order of blocks and threads; 0: the natural one again."""
        self._library.standin_shuffle(seed)

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
