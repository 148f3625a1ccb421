"""Where a bench runs: how calls are timed there, and what can be counted beside the time.

`Cpu` times calls as Python makes them. `Cuda` has three clocks more (see `Mode`), makes the L2 cold by letting input
sets take turns, and counts launches, host synchronisations and memory. Everything on CUDA happens on one side stream:
graphs cannot be captured on the default one, and autograd would tie a capture to the stream where a leaf was used.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from harness import FULL, QUICK, Call, Effort, Measured, environment, keep_freed_memory, measure
from torch import Tensor

CACHES = 3  # cold: what moves before an input comes again, in sizes of the L2; one size is not enough, it is not LRU
MOST_SETS = 64  # a latent tensor of less than 1.4 MB on an H200 has no cold form: its cost is the call's
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
KERNEL, COPY, FILL = 0, 1, 2  # nodes of a graph, as the driver numbers their types


class Mode(NamedTuple):
    """One way to time every provider.

    timing: "graph": a CUDA graph of many calls, divided by their number: kernels and the gaps between them.
        "call": consecutive calls from Python: whichever of host and device is slower.
        "host": until the call returns, the device idle before: what Python, checks and launches cost.
    cache: "warm": the same inputs at every call. "cold": the inputs were evicted from the L2 since their last use.
    """

    timing: str
    cache: str
    sets: int  # copies of the inputs that take turns


class Costs(NamedTuple):
    """Of one call; None where it cannot be counted."""

    sync_warnings: int | None = None  # operations that PyTorch knows to wait for the device
    peak_bytes: int | None = None  # allocated at once, beyond what was there before the call


class DeviceCounts(NamedTuple):
    """Of one call; None where it cannot be counted."""

    launches: int | None = None  # kernels, copies and fills on the device
    stream_syncs: int | None = None  # waits of the host, from whatever library
    dtoh_copies: int | None = None


class Captured(NamedTuple):
    replay: Call
    outputs: list[tuple[Tensor, ...]]  # of each input set, where every replay writes them
    calls: int
    seen: DeviceCounts = DeviceCounts()


class Cpu:
    name = "cpu"
    device = torch.device("cpu")
    lacks = ("triton", "compile_max")
    seldom: Mapping[str, tuple[str, ...]] = {}
    sizes = ("sd35", "rows", "flux", "wan", "small")
    full, quick = FULL, QUICK
    cold_starts = 0

    def __init__(self, libc_malloc: bool = False):
        self._malloc = "malloc=kept" if not libc_malloc and keep_freed_memory() else "malloc=default"

    def facts(self) -> dict[str, str]:
        return environment(self._malloc)

    def session(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def modes(self, _tensor_bytes: int) -> list[Mode]:
        return [Mode("call", "warm", 1)]

    def costs(self, _call: Call, _reset: Call) -> Costs:
        return Costs()

    def profiled(self, _call: Call) -> DeviceCounts:
        return DeviceCounts()

    def measure(self, _mode: Mode, series: Mapping[Any, list[Call]], effort: Effort) -> Measured:
        return measure({key: calls[0] for key, calls in series.items()}, effort)

    def mark(self) -> int:
        """A moment of a call, for `elapsed_us`."""
        return time.perf_counter_ns()

    def elapsed_us(self, start: int, end: int) -> float:
        return (end - start) / 1000


class Cuda:
    name = "cuda"
    lacks = ()
    # Tunes for a minute or so: unless it is named, tried on an image's latents and beyond the L2, in the first dtype.
    seldom: Mapping[str, tuple[str, ...]] = {"compile_max": ("sd35", "video")}
    sizes = ("sd35", "flux", "video", "small", "wan", "video64")  # what matters most comes first, see `--minutes`
    # A device's clock is steadier than a shared machine's: half the rounds, half the time in each, and no libgomp.
    full, quick = Effort(rounds=10, block_us=5_000, settle_us=2_000), QUICK
    cold_starts = 1

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)
        self._l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def facts(self) -> dict[str, str]:
        settings = (f"driver={_driver()}", f"cuda={torch.version.cuda}", f"triton={_version('triton')}")
        return environment(*settings) | {"device": torch.cuda.get_device_name(self.device)}

    def session(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def modes(self, tensor_bytes: int) -> list[Mode]:
        """Cold as far as `MOST_SETS` reach; warm, and the host's time, unless a single set is cold by itself.

        Counted by the copy, which moves the least: two tensors of a set. The host's time does not depend on the size,
        and at 5 ms of device time a call it would take a minute to measure.
        """
        sets = max(1, math.ceil(CACHES * self._l2_bytes / (2 * tensor_bytes)))
        caches = [("cold", sets)] if sets <= MOST_SETS else []
        caches += [("warm", 1)] if sets > 1 else []
        modes = [Mode(timing, *cache) for timing in ("graph", "call") for cache in caches]
        return modes + ([Mode("host", "warm", 1)] if sets > 1 else [])

    def capture(self, calls: list[Call], times: int) -> Captured:
        """All calls in one graph, `times` over. Each has been made before: no compiling or tuning in a capture."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(times):
                outputs = [tuple(output.detach() for output in call()) for call in calls]
        graph.instantiate()
        total = times * len(calls)
        return Captured(graph.replay, outputs, total, count_nodes(node_types(graph.raw_cuda_graph()), total))

    def measure(self, mode: Mode, series: Mapping[Any, list[Call]], effort: Effort) -> Measured:
        clock = self.host_clock if mode.timing == "host" else self.event_clock
        # torch.compile's own graphs are recorded anew for each address that a backward reads: before anything is timed.
        for _ in range(2):
            for call in itertools.chain(*series.values()):
                call()
        return measure({key: _in_turn(calls) for key, calls in series.items()}, effort, clock)

    def measure_captured(self, captured: Mapping[Any, Captured], effort: Effort) -> Measured:
        """As `measure`; a sample is the mean of the calls in one replay."""
        timed = measure({key: one.replay for key, one in captured.items()}, effort, self.event_clock)
        samples = {key: [us / captured[key].calls for us in replays] for key, replays in timed.samples.items()}
        return timed._replace(samples=samples)

    def event_clock(self, call: Call, repeats: int) -> list[float]:
        """Microseconds between events on the stream; one call goes ahead, so that the device is not idle at first."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        call()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.synchronize()
        return [self.elapsed_us(*pair) for pair in itertools.pairwise(events)]

    def mark(self) -> torch.cuda.Event:
        """A moment on the stream. Autograd's threads call this too, and have a current stream of their own."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def elapsed_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """After `synchronize`."""
        return 1000 * start.elapsed_time(end)

    def host_clock(self, call: Call, repeats: int) -> list[float]:
        """Microseconds until each call returns. The device is idle before: a full queue would make the host wait."""
        samples = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) / 1000)
        self.synchronize()
        return samples

    def costs(self, call: Call, reset: Call) -> Costs:
        """`reset` drops what an earlier call left, so that its memory is not taken for the inputs'."""
        call()
        reset()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.synchronize()
        sync_warnings = sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
        return Costs(sync_warnings, peak_bytes)

    def profiled(self, call: Call) -> DeviceCounts:
        """Once a process, and not where anything is timed.

        From the second session on the profiler loses kernels of a session's beginning, one more each time
        (https://github.com/pytorch/pytorch/issues/192021), and what it leaves behind slows a process by 10 to 20 %
        (https://github.com/pytorch/pytorch/pull/146604).
        """
        for _ in range(2):
            call()
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            self.synchronize()
        return count_events(profiler.events())


def node_types(graph: int) -> list[int] | None:
    """Of a `CUgraph`; None where the driver does not say."""
    driver, raw = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph)
    count, one = ctypes.c_size_t(), ctypes.c_int()
    if driver.cuGraphGetNodes(raw, None, ctypes.byref(count)) != 0:
        return None
    nodes, types = (ctypes.c_void_p * count.value)(), []
    if driver.cuGraphGetNodes(raw, nodes, ctypes.byref(count)) != 0:
        return None
    for node in nodes:
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(one)) != 0:
            return None
        types.append(one.value)
    return types


def count_nodes(types: Sequence[int] | None, calls: int) -> DeviceCounts:
    """Of each of `calls` calls in a graph. None of them waited: a capture cannot. Where copies go is not looked up."""
    if types is None:
        return DeviceCounts(stream_syncs=0)
    launches = sum(one in (KERNEL, COPY, FILL) for one in types)
    return DeviceCounts(launches // calls if launches % calls == 0 else None, 0, None if COPY in types else 0)


def count_events(events: Iterable[Any]) -> DeviceCounts:
    """Of a profile; all None when it saw nothing of the device.

    A range that somebody annotated on the host, as torch.compile does, is shown on the device as well: nothing ran.
    """
    events = [event for event in events if not event.is_user_annotation]
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    if not on_device:
        return DeviceCounts()
    return DeviceCounts(
        launches=len(on_device),
        stream_syncs=sum(event.name in WAITS for event in events),
        dtoh_copies=sum(name.startswith("Memcpy DtoH") for name in on_device),
    )


def graph_repeats(mode: Mode, tensor_bytes: int) -> int:
    """How often all sets go into one graph: calls that move 600 MB, 64 at most.

    150 us at 4 TB/s: the host needs about 10 us to send off a graph, and must stay ahead of the device.
    """
    calls = min(64, 600_000_000 // (3 * tensor_bytes))
    return max(1, calls // mode.sets)


def _in_turn(calls: list[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    following: Callable[[], Call] = itertools.cycle(calls).__next__
    return lambda: following()()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        output = []
    return output[0] if output else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
