"""Which implementation the tests drive, and a clean environment for each of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Threads that spin between two small loops take the other workers' cores: `test_sde_step` took 6 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import flowdppo_ops
from flowdppo_ops import reference


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # strict about options, pytest ends at one that nobody has
        parser.addini("timeout", "seconds for a test; without pytest-timeout nobody counts them")
    parser.addoption(
        "--impl",
        choices=("fused", "reference"),
        default="fused",
        help="run the tests on the functions of flowdppo_ops (default) or on those of flowdppo_ops.reference",
    )


@pytest.fixture(scope="session")
def api(request: pytest.FixtureRequest):
    """What holds the functions under test."""
    return reference if request.config.getoption("--impl") == "reference" else flowdppo_ops


@pytest.fixture(scope="session")
def loss(api):
    """The `loss` under test."""
    return api.loss


@pytest.fixture(scope="session")
def step_loss(api):
    """The `step_loss` under test."""
    return api.step_loss


@pytest.fixture(scope="session")
def native(api):
    """What holds the native functions, for what the reference does not promise."""
    if api is reference:
        pytest.skip("promised by the native backend alone")
    return api


@pytest.fixture(scope="session")
def fused(native):
    """The native `loss`."""
    return native.loss


@pytest.fixture(scope="session")
def fused_step(native):
    """The native `step_loss`."""
    return native.step_loss


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch):
    """A developer's FLOWDPPO_OPS_* do not decide what is tested, and no test leaves its thread count behind."""
    for name in ("FLOWDPPO_OPS_BACKEND", "FLOWDPPO_OPS_CHECK", "FLOWDPPO_OPS_STRICT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- emulated kernels ------------------------------------------------------------------------------------------------

# What is there is for the plugin standin.emulated, see test_emulator.py.
collect_ignore = [] if "standin.emulated" in sys.modules else ["emulated"]


@pytest.fixture(scope="session")
def standin_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a driver for machines without a GPU."""
    from standin import harness

    return harness.build(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="session")
def asan() -> Path:
    """The kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""
    from emulator.build import library

    return library("asan")
