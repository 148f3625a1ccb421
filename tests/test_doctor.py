"""`python -m flowdppo_ops doctor`: it says what is there, and fails when the numbers are wrong."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compilers import needs_cxx
from standin import harness
from trainers import unirl

import flowdppo_ops
from flowdppo_ops import _doctor, _native, _self_test
from flowdppo_ops.__main__ import main
from flowdppo_ops.integrations import flow_grpo

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from flowdppo_ops.__main__ import main
sys.exit(main(["doctor"]))
"""

Report = dict[str, dict[str, str]]


def run(*command: str, code: int = 0, **variables: str) -> Report:
    """What a doctor says in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWDPPO_OPS_")}
    environment.pop("LD_LIBRARY_PATH", None)
    command = [sys.executable, *(command or ("-m", "flowdppo_ops", "doctor"))]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return read(done.stdout)


def read(text: str) -> Report:
    """Section -> name -> what it says."""
    report: Report = {}
    for line in text.splitlines():
        if not line.startswith("  "):
            section = report.setdefault(line.partition(":")[0], {})
            continue
        name, said = re.fullmatch(r"  (.{14}|\S+) (.*)", line).groups()
        assert name.strip() not in section
        section[name.strip()] = said
    assert list(report) == ["versions", "backends", "environment", "integrations", "self-test"]
    return report


def errors(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\S+) (\d\.\de[+-]\d+)", text)}


def test_what_it_says():
    report = run()
    assert report["versions"]["flowdppo_ops"] == flowdppo_ops.__version__
    assert report["versions"]["torch"].startswith(f"{torch.__version__}, built ")
    assert re.fullmatch(r"(avx512|avx2|baseline), \d+ threads", report["backends"]["cpu"])
    images = report["backends"]["images"]
    embedded = [(unit, f"{'compute' if is_ptx else 'sm'}_{one}") for unit, one, is_ptx, _ in _native.cuda_images()]
    assert all(unit in images and one in images for unit, one in embedded)
    assert embedded or images == "none: built without kernels (FLOWDPPO_KERNELS=none)"
    assert report["environment"] == {"FLOWDPPO_*": "not set"}
    assert list(report["integrations"]) == ["verl_omni", "unirl", "flow_factory", "flow_grpo"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_no_failure():
    report = run()
    assert report["backends"]["cuda"] == "no driver: libcuda is not there"
    assert "GPU 0" not in report["backends"]
    assert list(report["self-test"]) == ["cpu"]


def test_self_test_of_the_cpu():
    said = run()["self-test"]["cpu"]
    assert re.search(r"  ok \(\d\.\d\d s\)$", said)
    assert errors(said).keys() == {"loss", "step_loss", "sde_step"}
    assert all(0 < error < 2e-6 for error in errors(said).values())


def test_variables_that_are_set():
    variables = {"CUDA_VISIBLE_DEVICES": "3", "FLOWDPPO_OPS_BACKEND": "reference", "FLOWDPPO_OPS_CHECK": "1"}
    report = run(**variables)
    assert report["environment"] == {name: repr(value) for name, value in variables.items()}
    assert errors(report["self-test"]["cpu, reference"]).keys() == {"loss", "step_loss", "sde_step"}


def test_without_torch():
    report = run("-c", WITHOUT_TORCH)
    assert report["versions"]["torch"] == "not installed: flowdppo_ops.numpy alone"
    assert errors(report["self-test"]["numpy"]).keys() == {"numpy.loss"}
    assert list(report["self-test"]) == ["numpy"]


def test_trainers_are_found_and_not_imported(tmp_path):
    package = tmp_path / "unirl"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = run(PYTHONPATH=os.pathsep.join(path))["integrations"]
    assert found["unirl"] == "trainer found, not active in this process"
    assert found["flow_factory"] == "trainer not found, not active in this process"


def test_integrations_of_this_process(monkeypatch, capsys):
    """As a trainer calls it: `flowdppo_ops.doctor()`."""
    flow_grpo._announce.cache_clear()
    assert flowdppo_ops.doctor()
    assert read(capsys.readouterr().out)["integrations"]["flow_grpo"].endswith(", not active in this process")
    flow_grpo._announce(True)
    module = SimpleNamespace(enabled=lambda: True, fallbacks=lambda: {"float64 latents": 2})
    monkeypatch.setitem(sys.modules, "flowdppo_ops.integrations.unirl", module)
    assert flowdppo_ops.doctor()
    found = read(capsys.readouterr().out)["integrations"]
    assert found["flow_grpo"].endswith(", active")
    assert found["unirl"].endswith(", active, its own functions ran: float64 latents: 2 calls")
    flow_grpo._announce.cache_clear()


def test_a_class_that_a_recipe_names_is_active(monkeypatch):
    """UniRL's classes need no `enable()`."""
    name = "flowdppo_ops.integrations.unirl"
    for module, surface in unirl.modules().items():
        monkeypatch.setitem(sys.modules, module, surface)
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    integration = importlib.import_module(name)
    assert not integration.active()
    assert integration.FlowSDEStrategy.canonical_name == "flow"
    assert integration.active()
    assert not integration.enabled()
    assert _doctor._active("unirl") == "active"


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@needs_cxx
def test_gpus_of_a_driver(tmp_path):
    """Which image each would load, from the driver that the loader would use."""
    backends = run(LD_LIBRARY_PATH=str(harness.build(tmp_path)), STANDIN_CAPABILITIES="75,90")["backends"]
    assert backends["cuda"].startswith("driver for CUDA 12.4, GPUs: 2, of which PyTorch sees ")
    loads = [f"{unit} {'compute' if ptx else 'sm'}_{image}" for unit, image, ptx in _native.cuda_images_for(90)]
    nothing = "no image fits: calls raise RuntimeError"
    assert backends["GPU 0"] == f"Stand-in 75, compute capability 7.5: {nothing}"
    assert backends["GPU 1"] == f"Stand-in 90, compute capability 9.0: {', '.join(loads) or nothing}"


def test_a_driver_that_does_not_work(monkeypatch, capsys):
    def cuda_driver():
        raise RuntimeError("cuInit: CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(_native, "cuda_driver", cuda_driver)
    assert flowdppo_ops.doctor()
    assert read(capsys.readouterr().out)["backends"]["cuda"] == "not usable: cuInit: CUDA_ERROR_NO_DEVICE"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_self_test_of_a_gpu():
    # Where the driver is found by that path alone.
    report = run(LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    assert errors(report["self-test"]["cuda:0"]).keys() == {"loss", "step_loss", "sde_step"}
    assert torch.cuda.get_device_name(0) in report["backends"]["GPU 0"]


# ---- planted faults --------------------------------------------------------------------------------------------------


def failed_test_of_the_cpu(capsys) -> str:
    assert main(["doctor"]) == 1
    said = read(capsys.readouterr().out)["self-test"]["cpu"]
    assert "FAILED" in said
    return said


def too_large(said: str) -> set[str]:
    return {name for name, error in errors(said).items() if error > _self_test.LIMIT}


@pytest.mark.parametrize("function", ["loss", "step_loss"])
def test_a_mask_that_blocks_nothing_fails(function, monkeypatch, capsys):
    own = getattr(flowdppo_ops, function)
    unmasked = flowdppo_ops.FlowDPPO(mask="none")
    monkeypatch.setattr(flowdppo_ops, function, lambda *given, **more: own(*given, **more | {"objective": unmasked}))
    said = failed_test_of_the_cpu(capsys)
    assert too_large(said) == {function}
    assert "FAILED: wanted at most 1e-05" in said


@pytest.mark.parametrize("function", ["loss", "step_loss", "sde_step"])
def test_each_function_is_tested(function, monkeypatch, capsys):
    own = getattr(flowdppo_ops, function)
    monkeypatch.setattr(flowdppo_ops, function, lambda first, *rest, **more: own(first * 1.0001, *rest, **more))
    assert too_large(failed_test_of_the_cpu(capsys)) == {function}


def test_an_error_of_a_call_fails(monkeypatch, capsys):
    def no(*_arguments, **_options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(flowdppo_ops, "sde_step", no)
    assert failed_test_of_the_cpu(capsys) == "FAILED: RuntimeError: no kernel"


def test_nan_fails():
    assert not _self_test._error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) <= _self_test.LIMIT
