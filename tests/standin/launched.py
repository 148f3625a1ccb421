"""`tests/every_kernel.py` in a process with the stand-in driver: its checks hold, and what it would miss is named."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any

import every_kernel
import gpu_api
import torch

from standin.gpu import on_gpu
from standin.harness import Driver


def main(*arguments: str) -> tuple[int, list[str]]:
    """Exit status and complaints of the script, where the driver's log stands in for the profiler."""
    driver, _ = Driver(), on_gpu()
    gpu_api.DEVICE = "cpu"
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda: "the stand-in"

    def profiled(work: Callable[[], Any]) -> tuple[Any, list[str]]:
        return work(), [line.split()[1] for line in driver.log() if line.startswith("launch")]

    every_kernel.profiled = profiled
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = every_kernel.main([*arguments])
    return status, [line for line in printed.getvalue().splitlines() if line.startswith(("WRONG", "NEVER"))]


def every_kernel_is_launched() -> None:
    every_kernel.SIZES, every_kernel.ODD_SIZES = (7, 1025), (1000,)
    status, complaints = main("--count")
    assert (status, complaints) == (0, []), "\n".join(complaints)


def a_mix_left_out() -> None:
    left_out = torch.bfloat16, torch.float32, torch.float16
    every_kernel.MIXES = [mix for mix in every_kernel.MIXES if mix != left_out]
    every_kernel.SIZES, every_kernel.ODD_SIZES = (7,), (9,)
    kernels = [f"NEVER LAUNCHED  policy_loss_{way}_step_bf16_f32_f16" for way in ("forward", "backward")]
    assert main("--count") == (1, kernels)


def a_wrong_answer() -> None:
    """Of one kernel out of many: the others are checked all the same."""
    right = gpu_api.sde_step

    def wrong(**arguments: Any) -> Any:
        step = right(**arguments)
        is_the_one = arguments["model_output"].dtype == torch.float16 and arguments["sample"].dtype == torch.float16
        return step._replace(std=step.std * (1 + 1e-5)) if is_the_one else step

    gpu_api.sde_step = wrong
    every_kernel.SIZES, every_kernel.ODD_SIZES = (7,), (9,)
    status, complaints = main()
    assert status == 1
    assert len(complaints) == 6, complaints  # three residuals, at two sizes
    assert all(line.startswith("WRONG  sde_step, ") and ": std: error " in line for line in complaints)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
