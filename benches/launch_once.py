"""One forward and one backward of each operation between two marks, for a profiler that waits for them.

    ncu --profile-from-start off ... python benches/launch_once.py --device cuda      # as `on_gpu.py OUT profile` does

Latents are far beyond the L2 by default. Every call is made twice before, unseen: modules are loaded, memory is there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import bench_policy_loss
import bench_sde_step
import torch
from runner import MACHINES, SIZES, parse_size

OPERATIONS = bench_policy_loss.OPERATIONS | bench_sde_step.OPERATIONS
# operation, provider, dtype
LAUNCHED = (
    ("policy_loss", "fused", "fp32"),
    ("policy_loss", "fused", "bf16"),
    ("step_loss", "fused", "fp32"),
    ("step_loss", "fused", "bf16+fp32"),
    ("step_loss", "fused_residual", "bf16+fp32"),
    ("sde_step_sample", "fused", "bf16+fp32"),
    ("sde_step_sample", "fused_residual", "bf16+fp32"),
    ("sde_step_replay", "fused", "bf16+fp32"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch_once", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=MACHINES, default="cuda")
    parser.add_argument("--size", type=parse_size, default=SIZES["video"], help=f"of {', '.join(SIZES)}, or AxBxC")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"launch_once: torch {torch.__version__} finds no usable CUDA device\n")
    machine = MACHINES[args.device]()
    for name, provider, dtype in LAUNCHED:
        operation = OPERATIONS[name]
        i = operation.make_inputs(args.size, dtype, machine.device)
        call = partial(operation.run, operation.passes[-1], operation.make_providers([provider])[0].call, i)
        for _ in range(2):
            call()
        machine.synchronize()
        mark(machine.name, "start")
        call()
        machine.synchronize()
        mark(machine.name, "stop")
        print(f"{name} {provider} {dtype} {list(args.size)}", flush=True)
    return 0


def mark(device: str, which: str) -> None:
    if device == "cuda":
        getattr(torch.cuda.profiler, which)()


if __name__ == "__main__":
    sys.exit(main())
