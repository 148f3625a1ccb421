"""The kernels, the very sources, on the CPU: launched by the launcher through the stand-in driver, compiled for the
emulator under AddressSanitizer and UndefinedBehaviorSanitizer. They go through the tests that the CPU backend has, with
blocks and threads in another order at every launch, and through those of tests/emulated.

A process for each file: a sanitizer ends it at the first fault, and says where.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from compilers import needs_cxx
from standin import harness

from flowdppo_ops import _native

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)"),
    needs_cxx,
    pytest.mark.timeout(900),  # with the kernels compiled first
]

HERE = Path(__file__).parent


def passes(driver: Path, kernels: Path, *arguments: str | Path) -> None:
    done = harness.pytest("emulated", driver, kernels, *arguments, timeout=600)
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:])


@pytest.mark.parametrize("file", ["policy_loss", "policy_loss_gradients", "step_parity", "sde_step"])
def test_the_tests_of_the_cpu_backend(standin_driver, asan, file):
    """But for those of PyTorch's machinery, which is the same for all devices."""
    others = "not compiled and not thread and not opcheck and not gradcheck"
    passes(standin_driver, asan, HERE / f"test_{file}.py", "-k", others)


def test_masks_of_steps(standin_driver, asan):
    """Of what the CPU backend promises to the bit, what the kernels do too."""
    passes(standin_driver, asan, HERE / "test_step_exact.py", "-k", "mask_cell or scale_of_1 or blocked_infinite")


@pytest.mark.parametrize("file", ["kernels", "kernels_of_sde_step"])
def test_the_tests_of_kernels(standin_driver, asan, file):
    passes(standin_driver, asan, HERE / "emulated" / f"test_{file}.py")


@pytest.mark.slow
def test_races(standin_driver):
    from emulator.build import library

    passes(standin_driver, library("tsan"), HERE / "emulated" / "test_races.py")
