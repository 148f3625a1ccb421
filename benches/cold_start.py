"""A provider's first call in a fresh process, with every compiler's cache empty.

    python benches/cold_start.py bench_policy_loss step_loss triton 16x65536 fp32 cuda

is the process that `cold_start` starts; it prints one JSON object.

The clock starts before torch is imported; the interpreter's own start is left out. `ready` is when the inputs are on
the device, `finished` when the first results are. Triton tunes and torch.compile compiles in between. Making the inputs
has loaded some of PyTorch's elementwise kernels: that favours eager. After that the profiler counts what a call does on
the device (`seen`): it wants a process of its own.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

CACHE_FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


def cold_start(
    module: str, operation: str, provider: str, shape: tuple[int, ...], dtype: str, device: str
) -> dict[str, Any]:
    """In a process of its own: `{"ready": ..., "finished": ...}`, seconds from the first import, and `seen`."""
    command = [sys.executable, __file__, module, operation, provider, "x".join(map(str, shape)), dtype, device]
    with tempfile.TemporaryDirectory() as empty:
        folders = {name: os.path.join(empty, name.lower()) for name in CACHE_FOLDERS}
        done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cold start of {provider} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(module: str, operation: str, provider: str, shape: str, dtype: str, device: str) -> None:
    from runner import MACHINES

    op = importlib.import_module(module).OPERATIONS[operation]
    machine = MACHINES[device]()
    with machine.session():
        i = op.make_inputs(tuple(int(n) for n in shape.split("x")), dtype, machine.device)
        machine.synchronize()
        ready = time.perf_counter() - START
        call = partial(op.run, op.passes[-1], op.make_providers([provider])[0].call, i)
        call()
        machine.synchronize()
        finished = time.perf_counter() - START
        seen = machine.profiled(call)
    print(json.dumps({"ready": ready, "finished": finished, "seen": seen._asdict()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
