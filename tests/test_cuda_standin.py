"""The launcher end to end without a GPU: Python -> Rust -> driver calls -> embedded image, against a stand-in driver.

`standin/libcuda.cpp` is the driver, the other files of `standin` are what is done and asserted; a process each.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from compilers import needs_cxx
from standin import harness

from flowdppo_ops import _native

ROOT = Path(__file__).parent

pytestmark = needs_cxx
needs_images = pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)")


driver = pytest.fixture(scope="module")(lambda standin_driver: standin_driver)
kernels = pytest.fixture(scope="module")(lambda asan: asan)


@needs_images
@pytest.mark.parametrize(
    ("capability", "image"),
    [
        ("80", "sm_80"),
        ("86", "sm_86"),
        ("87", "sm_86"),
        ("89", "sm_89"),
        ("90", "sm_90"),
        ("100", "sm_100"),
        ("103", "sm_100"),
        ("110", "ptx"),
        ("120", "sm_120"),
        ("121", "sm_120"),
        ("200", "ptx"),
    ],
)
def test_each_architecture_gets_its_image(driver, capability, image):
    harness.run(f"image:{image}", driver, capability)


def test_an_architecture_without_an_image_is_refused(driver):
    harness.run("no_image", driver, "75")


@needs_images
@pytest.mark.parametrize("capability", ["80", "90", "100", "120", "200"])
def test_every_entry_point_is_in_the_image(driver, capability):
    harness.run("every_entry_point", driver, capability)


@needs_images
@pytest.mark.parametrize(
    "scenario",
    ["forward_arguments", "step_arguments", "shards", "objectives", "backward_arguments", "grids", "bad_arguments"],
)
def test_arguments(driver, scenario):
    harness.run(scenario, driver)


@needs_images
@pytest.mark.parametrize(
    ("scenario", "capabilities"),
    [
        ("current_context_is_restored", "90,80"),
        ("a_stream_of_another_device_is_an_error", "90,90"),
        ("first_call_inside_a_capture", "90"),
        ("two_devices_and_many_threads", "90,80"),
        ("kept_tickets", "90"),
        ("driver_errors", "90"),
    ],
)
def test_driver(driver, scenario, capabilities):
    harness.run(scenario, driver, capabilities)


@needs_images
@pytest.mark.parametrize("capability", ["80", "90", "100", "120", "200"])
def test_every_entry_point_of_sde_step_is_in_its_image(driver, capability):
    harness.run("every_entry_point", driver, capability, script="sde_step.py")


@needs_images
@pytest.mark.parametrize(
    "scenario", ["its_image_alone", "forward_arguments", "backward_arguments", "grids", "bad_arguments"]
)
def test_arguments_of_sde_step(driver, scenario):
    harness.run(scenario, driver, script="sde_step.py")


@needs_images
@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["every_kernel_is_launched", "a_mix_left_out", "a_wrong_answer"])
def test_the_script_that_launches_every_kernel(driver, kernels, scenario):
    harness.run(scenario, driver, kernels=kernels, script="launched.py")


# ---- a rehearsal of the tests marked gpu -----------------------------------------------------------------------------

REHEARSED = "any_alignment clocks generator graph_capture host_sync metadata_errors two_launches"
MISTAKES = """
import pytest, torch, flowdppo_ops
from cases import draw
from gpu_api import moved
pytestmark = pytest.mark.gpu
x = torch.ones(3, requires_grad=True)

def test_an_upstream_gradient_of_the_host():  # an upstream gradient on another device
    there = x.detach().cuda().requires_grad_()
    torch.autograd.grad(2 * there, there, torch.ones(3))

def test_two_devices():  # tensors of two devices
    x.cuda() + x

def test_a_wait():  # item waits for the device
    there = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    there.sum().item()

def test_a_copy_into_a_capture():  # cuda waits for the device
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.cuda()

def test_a_replay_of_other_values():  # assert -?\\d
    arguments, graph = moved(draw()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flowdppo_ops.loss(**arguments)
    before = result.loss.item()
    arguments["prev_sample_mean"].add_(0.1)
    graph.replay()
    assert result.loss.item() == before

def test_a_launch_too_many():  # assert 2 == 1
    arguments = moved(draw())
    flowdppo_ops.loss(**arguments)  # fills tickets
    with torch.profiler.profile() as profile:
        flowdppo_ops.loss(**arguments).loss * 2
    assert len(profile.events()) == 1
"""


def rehearsed(driver: Path, kernels: Path, *arguments: str | Path) -> str:
    return harness.pytest("rehearsal", driver, kernels, "-m", "gpu", *arguments).stdout


@needs_images
def test_what_a_gpu_is_to_show_is_rehearsed(driver, kernels):
    """Tests that were never run where they belong, without what is wrong with the tests themselves."""
    files = [ROOT / f"test_{name}.py" for name in ("gpu", "gpu_sde_step", "gpu_step_loss", "benches")]
    said = rehearsed(driver, kernels, "-k", " or ".join(REHEARSED.split()), *files)
    assert re.fullmatch(r"=+ \d+ passed, \d+ deselected.*", said.splitlines()[-1]), said


@pytest.mark.slow
@needs_images
def test_a_rehearsal_finds_mistakes(driver, kernels, tmp_path):
    (tmp_path / "test_mistakes.py").write_text(MISTAKES)
    given = "--tb=line", "-c", ROOT.parent / "pyproject.toml", tmp_path / "test_mistakes.py"
    said = rehearsed(driver, kernels, *given)
    found, wanted = re.findall(r"\n/.*?:\d+: (.*)", said), re.findall(r"\(\):  # (.*)", MISTAKES)
    assert len(found) == len(wanted), said
    assert all(map(re.search, wanted, found)), found


def test_a_device_that_is_not_there(driver):
    harness.run("no_such_device", driver)


@pytest.mark.skipif("_has_driver()", reason="this machine has an NVIDIA driver")
def test_without_a_driver():
    harness.run("no_driver", None)


def _has_driver() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
