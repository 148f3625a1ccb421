"""What needs a GPU, in stages: tests, every kernel under compute-sanitizer, the benches.

    python benches/on_gpu.py OUT [STAGE...] [--minutes 9] [--commit HASH]

OUT gets a log of each stage, the benches' rows, and `summary.txt`. Needs the package installed, PyTorch, pytest and
Triton, and compute-sanitizer for its stages; no network, no build. A stage that fails stops no other, and makes the
exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
BENCHES = {
    "bench_policy_loss.py": ("policy_loss", "step_loss"),
    "bench_sde_step.py": ("sde_step_sample", "sde_step_replay"),
}
KERNELS = "kns=policy_loss,kns=sde_step"  # what the names of the package's kernels begin with
# initcheck looks at every kernel: it must know what PyTorch's kernels have written. memcheck leaves out what CUDA's own
# calls return: PyTorch handles that, and the package raises.
SANITIZERS = {
    "memcheck": ["--report-api-errors", "no", "--kernel-name", KERNELS],
    "racecheck": ["--kernel-name", KERNELS],
    "synccheck": ["--kernel-name", KERNELS],
    "initcheck": [],
}


class Stage(NamedTuple):
    name: str  # and that of its log
    argv: list[str]
    environment: Mapping[str, str] = MappingProxyType({})


def all_stages(out: Path, commit: str | None) -> list[Stage]:
    stages = [
        Stage("machine-driver", ["nvidia-smi", "-L"]),
        Stage("machine-doctor", [PYTHON, "-m", "flowdppo_ops", "doctor"]),
        # Without a GPU every test is skipped, which pytest calls a success.
        Stage("machine-torch", [PYTHON, "-c", "import torch; print(torch.cuda.get_device_name())"]),
    ]
    # The project's own options name plugins that need not be installed here.
    pytest = ["-o", "addopts=-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-q", "-m", "gpu"]
    # What the tests compute on the CPU is small: more threads only wait for one another.
    stages.append(Stage("suite", [PYTHON, "-m", "pytest", *pytest, str(ROOT / "tests")], {"OMP_NUM_THREADS": "4"}))
    every_kernel = [PYTHON, str(ROOT / "tests" / "every_kernel.py")]
    stages.append(Stage("sanitize-count", [*every_kernel, "--count"]))
    for tool, options in SANITIZERS.items():
        argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *options, *every_kernel]
        # PyTorch's allocator would hide what lies beyond a tensor.
        stages.append(Stage(f"sanitize-{tool}", argv, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    for script, operations in BENCHES.items():
        for name in operations:
            argv = [PYTHON, str(ROOT / "benches" / script), "--device", "cuda", "--ops", name]
            argv += ["--json", str(out / f"bench-{name}.json"), *(["--commit", commit] if commit else [])]
            stages.append(Stage(f"bench-{name}", argv))
    return stages


def run(stage: Stage, log: Path, seconds: float | None) -> str:
    """Writes the log; what became of the stage: "ok", or a reason."""
    with log.open("w") as output:
        options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment
        try:
            process = subprocess.Popen(stage.argv, env=environment, start_new_session=True, **options)
        except OSError as error:
            return f"not started: {error.strerror}: {stage.argv[0]}"
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, made if it is not there")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="machine, suite, sanitize, bench, bench-step_loss")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so many, whatever is left")
    parser.add_argument("--commit", help="what git would say, for a copy of the tree without it")
    args = parser.parse_args(argv)
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    stages = all_stages(out, args.commit)
    for name in args.stages:
        if not any(f"{stage.name}-".startswith(f"{name}-") for stage in stages):
            parser.error(f"no stage {name!r}; there are {', '.join(stage.name for stage in stages)}")
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for stage in stages:
        if args.stages and not any(f"{stage.name}-".startswith(f"{name}-") for name in args.stages):
            continue
        start, log = time.monotonic(), out / f"{stage.name}.txt"
        left = end - start
        result = run(stage, log, None if left == float("inf") else left) if left > 0 else "not begun: out of time"
        lines.append(f"{stage.name:24}{(time.monotonic() - start) / 60:6.1f} min  {result}")
        print(lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")  # a run that is cut short leaves it
    return 0 if all(line.endswith("  ok") for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
