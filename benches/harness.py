"""What every bench shares: timing providers in turn, the row that is stored, and the facts of the environment.

Providers are timed in blocks of consecutive calls, one provider after the other, over many rounds: peers of one row
see the same machine, whatever else runs on it. Single calls do not alternate: for 8 ms after a PyTorch parallel region
libgomp's workers spin, which speeds up whoever takes the same threads and slows whoever has others, so each block
begins with calls that are not timed (`settle_us`).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

Call = Callable[[], Any]
Clock = Callable[[Call, int], list[float]]  # a call, how often -> microseconds of each

# Settings that change what is measured. Named one by one: rows are published, and other variables hold paths.
_ENVIRONMENT = ("FLOWDPPO_OPS_BACKEND", "FLOWDPPO_OPS_CHECK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


class WrongAnswer(Exception):
    """A provider's result differs from the float64 one: its time would mean nothing."""


class Effort(NamedTuple):
    """How long to measure: rounds, microseconds timed per block, and untimed before each block."""

    rounds: int
    block_us: float
    settle_us: float


# 10 ms outlasts libgomp's spinning: on 2 cores a fused forward took 195 us within 2 ms of a PyTorch region, 159 us
# after 6 ms, 127 us from 10 ms on.
FULL = Effort(rounds=20, block_us=10_000, settle_us=10_000)
QUICK = Effort(rounds=3, block_us=500, settle_us=0)


def wall_clock(call: Call, repeats: int) -> list[float]:
    """Microseconds of each of `repeats` consecutive calls. A device bench passes its own clock to `measure`."""
    now = time.perf_counter_ns
    ticks = [now()]
    for _ in range(repeats):
        call()
        ticks.append(now())
    return [(end - start) / 1000 for start, end in itertools.pairwise(ticks)]


class Measured(NamedTuple):
    samples: dict[Any, list[float]]  # microseconds per call
    cores_elsewhere: float | None


def measure(calls: Mapping[Any, Call], effort: Effort, clock: Clock = wall_clock) -> Measured:
    """Times each call in blocks, in turn, the first of the turn moving on every round.

    Every call is made at least three times first: compilation and the first use of memory are not part of it.
    """
    single = {key: min(clock(call, 3)) for key, call in calls.items()}
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    elsewhere, start = seconds_elsewhere(), time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(effort.rounds):
            first = turn % len(keys)
            for key in keys[first:] + keys[:first]:
                repeats, settle = (int(us / max(single[key], 1e-3)) for us in (effort.block_us, effort.settle_us))
                clock(calls[key], max(1, settle))
                samples[key] += clock(calls[key], max(3, repeats))
    finally:
        if collecting:
            gc.enable()
    cores = (seconds_elsewhere() - elsewhere) / (time.perf_counter() - start)
    return Measured(samples, None if math.isnan(cores) else round(max(0.0, cores), 2))


@dataclass(frozen=True)
class Row:
    """One measurement; what `--json` writes. `bytes` is what the operation must move, the same for each provider."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    provider: str
    pass_: str
    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int
    bytes: int
    threads: int
    device: str
    torch: str
    flowdppo_ops: str
    commit: str
    environment: str
    date: str
    cores_elsewhere: float | None  # processors busy with anything but this process while it was measured
    # See `devices.Mode`. "cold start" and "first call": in a process of its own. "chain": of a call, from the model's
    # output to its gradient (bench_training_step.py).
    timing: str = "call"
    cache: str = "warm"
    launches: int | None = None  # this and the next four: `devices.Costs` and `DeviceCounts` of one call
    sync_warnings: int | None = None
    stream_syncs: int | None = None
    dtoh_copies: int | None = None
    peak_bytes: int | None = None
    ops: int | None = None  # this and the rest: `counting.Counts` of one call
    latent_ops: int | None = None
    host_syncs: int | None = None
    latent_allocations: int | None = None
    bytes_moved: int | None = None

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.p50_us / 1e3


def percentiles(samples: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile to a nanosecond, under the names of `Row`."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return {f"p{10 * tenth}_us": round(tenths[tenth - 1], 3) for tenth in (2, 5, 8)}


def seconds_elsewhere() -> float:
    """Processor seconds since boot that were not this process's, stolen ones included; NaN where Linux does not tell.

    The load average is no substitute: it lags by a minute, and counts this process.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks of up to 32 MB; False where the C library cannot.

    By default it hands large blocks back to the kernel or not as the layout of the heap has it: the eager loss on
    [16, 65536] fp32 took 0 to 4096 page faults per call from one run to the next. Such luck is nobody's merit, and a
    loop that reuses its memory has none of it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h; 32 MB is the largest threshold it takes
    return mallopt is not None and bool(mallopt(m_mmap_threshold, 1 << 25) and mallopt(m_trim_threshold, (1 << 31) - 1))


def environment(*settings: str) -> dict[str, str]:
    """The fields of `Row` that say where and what, `settings` among them: no host name, no path."""
    settings += tuple(f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ)
    return {
        "device": _cpu_model(),
        "torch": version("torch"),
        "flowdppo_ops": version("flowdppo-ops"),
        "commit": _commit(),
        "environment": " ".join(settings),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_json(rows: list[Row], path: Path) -> None:
    """A JSON list, one row per line; `pass_` is written as `pass`."""
    lines = (json.dumps({name.rstrip("_"): value for name, value in asdict(row).items()}) for row in rows)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_json(path: Path) -> list[Row]:
    """What `write_json` wrote; rows from before there were devices lack the fields that have defaults."""
    return [
        Row(
            **{("pass_" if name == "pass" else name): value for name, value in row.items()}
            | {"shape": tuple(row["shape"])}
        )
        for row in json.loads(path.read_text())
    ]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash, with `+` when tracked files differ from it; "unknown" outside a checkout or without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("" if clean.returncode == 0 else "+")
