"""`python -m flowdppo_ops doctor`: prints what is installed and which backends run, and tests each of them.

`flowdppo_ops.doctor()` prints the same about the running process, and with it which integrations are active there. It
imports no trainer, and opens a CUDA context only to test a GPU that PyTorch sees.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from . import _native, _self_test
from .numpy import default_threads

# Names of the trainers' packages, and of the modules in `integrations` for them.
INTEGRATIONS = ("verl_omni", "unirl", "flow_factory", "flow_grpo")

# Variables of CUDA and OpenMP: which GPUs a process sees, and how many threads it uses.
OTHER_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")

Line = tuple[str, str]


def add_command(commands: argparse._SubParsersAction) -> None:
    summary = "Say what is installed, which backends run, and whether they compute the right thing"
    parser = commands.add_parser("doctor", help=summary, description=f"{summary}. Exit code 1 if one does not.")
    parser.set_defaults(run=lambda _args: 0 if doctor() else 1)


def doctor() -> bool:
    """Prints versions, backends, GPUs and the kernels that they would load, environment variables and integrations, and
    tests every backend that can run here, which takes about a second each.

    Returns:
        True if every test passed. A test compares results and gradients of `loss`, `step_loss` and `sde_step` (without
        PyTorch, of `numpy.loss`) in float32 with those in float64.
    """
    try:
        torch = import_module("torch")
    except ImportError:
        torch = None
    sections = {
        "versions": _versions(torch),
        "backends": _backends(torch),
        "environment": _environment(),
        "integrations": _integrations(),
    }
    for title, lines in sections.items():
        print(title)
        for name, text in lines:
            print(f"  {name:<14} {text}")
    print("self-test: float32 against float64, error relative to the largest value")
    passed = [_passes(where, run) for where, run in _self_tests(torch)]
    return all(passed)


def _versions(torch: ModuleType | None) -> Iterator[Line]:
    yield "flowdppo_ops", _native.__version__
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "numpy", np.__version__
    if torch is None:
        yield "torch", "not installed: flowdppo_ops.numpy alone"
    else:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield "torch", f"{torch.__version__}, built {built}"


def _backends(torch: ModuleType | None) -> Iterator[Line]:
    threads = default_threads() if torch is None else torch.get_num_threads()
    yield "cpu", f"{_native.instruction_set()}, {threads} threads"
    images = [(unit, capability, is_ptx) for unit, capability, is_ptx, _ in _native.cuda_images()]
    yield "images", _by_unit(images) or "none: built without kernels (FLOWDPPO_KERNELS=none)"
    try:
        driver = _native.cuda_driver()
    except RuntimeError as error:  # cuInit fails if there is a driver but no GPU that it can use
        yield "cuda", f"not usable: {error}"
        return
    if driver is None:
        yield "cuda", "no driver: libcuda is not there"
        return
    version, gpus = driver
    yield "cuda", f"driver for CUDA {version // 1000}.{version % 1000 // 10}, GPUs: {len(gpus)}, {_seen_by(torch)}"
    for ordinal, (name, capability) in enumerate(gpus):
        loads = _by_unit(_native.cuda_images_for(capability)) or "no image fits: calls raise RuntimeError"
        yield f"GPU {ordinal}", f"{name}, compute capability {capability // 10}.{capability % 10}: {loads}"


def _seen_by(torch: ModuleType | None) -> str:
    if torch is None:
        return "and no PyTorch"
    if not torch.version.cuda:
        return "but PyTorch is built without CUDA"
    return f"of which PyTorch sees {torch.cuda.device_count()}"


def _by_unit(images: list[tuple[str, int, bool]]) -> str:
    """For example "policy_loss sm_80 sm_90, sde_step sm_80 sm_90"."""
    named: dict[str, list[str]] = {}
    for unit, capability, is_ptx in images:
        named.setdefault(unit, []).append(f"{'compute' if is_ptx else 'sm'}_{capability}")
    return ", ".join(f"{unit} {' '.join(names)}" for unit, names in named.items())


def _environment() -> Iterator[Line]:
    names = [name for name in sorted(os.environ) if name.startswith("FLOWDPPO_") or name in OTHER_VARIABLES]
    for name in names:
        yield name, repr(os.environ[name])
    if not names:
        yield "FLOWDPPO_*", "not set"


def _integrations() -> Iterator[Line]:
    for name in INTEGRATIONS:
        found = name in sys.modules or find_spec(name) is not None
        yield name, f"trainer {'found' if found else 'not found'}, {_active(name)}"


def _active(name: str) -> str:
    module = sys.modules.get(f"{__package__}.integrations.{name}")
    if module is None or not getattr(module, "active", module.enabled)():
        return "not active in this process"
    fallbacks = getattr(module, "fallbacks", dict)()
    calls = "; ".join(f"{reason}: {times} calls" for reason, times in fallbacks.items())
    return f"active, its own functions ran: {calls}" if calls else "active"


def _self_tests(torch: ModuleType | None) -> Iterator[tuple[str, _self_test.Run]]:
    if torch is None:
        yield "numpy", _self_test.of_numpy
        return
    by_reference = os.environ.get("FLOWDPPO_OPS_BACKEND") == "reference"
    devices = ["cpu"]
    for ordinal in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(ordinal)
        if by_reference or _native.cuda_images_for(10 * major + minor):
            devices.append(f"cuda:{ordinal}")
    for device in devices:
        yield f"{device}, reference" if by_reference else device, partial(_self_test.of_torch, device)


def _passes(where: str, run: _self_test.Run) -> bool:
    start = time.perf_counter()
    try:
        errors = run()
    except Exception as error:  # any: a user's call would raise the same
        print(f"  {where:<14} FAILED: {type(error).__name__}: {error}")
        return False
    passed = all(error <= _self_test.LIMIT for error in errors.values())
    text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    verdict = "ok" if passed else f"FAILED: wanted at most {_self_test.LIMIT:.0e}"
    print(f"  {where:<14} {text}  {verdict} ({time.perf_counter() - start:.2f} s)")
    return passed
