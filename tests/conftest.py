"""Which implementation the tests drive, and a clean environment for each of them."""

from __future__ import annotations

import pytest
import torch

import flowdppo_ops
from flowdppo_ops import reference


def pytest_addoption(parser: pytest.Parser) -> None:
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
def fused(request: pytest.FixtureRequest):
    """The native `loss`, for what the reference does not promise."""
    if request.config.getoption("--impl") == "reference":
        pytest.skip("promised by the native backend alone")
    return flowdppo_ops.loss


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch):
    """A developer's FLOWDPPO_OPS_* do not decide what is tested, and no test leaves its thread count behind."""
    for name in ("FLOWDPPO_OPS_BACKEND", "FLOWDPPO_OPS_CHECK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- the emulator: built once for all files of tests -----------------------------------------------------------------


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory):
    """Where executables are made."""
    return tmp_path_factory.mktemp("emulator")


def _server(folder, sanitizer: str):
    from emulator.call import start

    server = start(folder, sanitizer)
    yield server
    server.close()


@pytest.fixture(scope="session")
def asan(builds):
    """The kernels under the address and the undefined-behaviour sanitizer."""
    yield from _server(builds / "asan", "asan")


@pytest.fixture(scope="session")
def tsan(builds):
    """The kernels under the thread sanitizer."""
    yield from _server(builds / "tsan", "tsan")
