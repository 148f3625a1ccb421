"""A pytest plugin for tests on emulated kernels: tensors of the CPU pass for a GPU's, and each call goes through the
launcher and the stand-in driver to kernels/, compiled for the emulator. `harness.pytest` starts it.

Blocks and threads run in another order at every launch, the same ones in every run of the tests.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import sde_step_cases
import step_cases
from torch import distributed

from standin.gpu import Gpu, on_gpu
from standin.harness import Driver

DRIVER, GPU = Driver(), on_gpu()

# Latents that a test leaves to `draw` have 40 elements, a row that a warp takes. Half of the tests get longer rows
# instead: one block takes those of 600, two blocks those of 5000.
_LATENTS = ((5, 8), (5, 8), (5, 120), (5, 1001))


@pytest.fixture(scope="session")
def driver() -> Driver:
    return DRIVER


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return GPU


@pytest.fixture(scope="session")
def group() -> Iterator[distributed.ProcessGroup]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def on_cpu(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Calls it with tensors that are the CPU's after all."""
    target, GPU.target = GPU.target, lambda: None
    try:
        return function(*given, **options)
    finally:
        GPU.target = target


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    name = zlib.crc32(pyfuncitem.name.encode())
    latents = _LATENTS[name % 4]
    cases.draw.__defaults__ = step_cases.draw_step.__defaults__ = ((12,), latents)
    sde_step_cases.draw.__defaults__ = ((4, *latents), *sde_step_cases.draw.__defaults__[1:])
    DRIVER.shuffle(1 + name % 1_000_000)
    try:
        return (yield)
    except TypeError as error:
        if "float64 is computed on the CPU alone" in str(error):
            pytest.skip("float64 latents are computed on the CPU alone")
        raise
    finally:
        DRIVER.log()
        GPU.target = lambda: (0, 0)
        assert not any(tickets.any() for tickets in GPU.tickets), "tickets are not 0 after the launch"
