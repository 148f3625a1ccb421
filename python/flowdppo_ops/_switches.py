"""The environment variables that a call looks at, and the devices that have a backend."""

from __future__ import annotations

import os

import torch

# The mapping behind `os.environ`, keyed as the platform has it. A name that is not set costs 0.5 us in
# `os.environ.get`, an exception raised and caught, and 0.05 us here: 6 % of a call on an image latent.
_SETTINGS = getattr(os.environ, "_data", os.environ)
_BACKEND, _CHECK = (os.environ.encodekey(f"FLOWDPPO_OPS_{name}") for name in ("BACKEND", "CHECK"))
_REFERENCE, _ON = (os.environ.encodevalue(value) for value in ("reference", "1"))


def wants_reference() -> bool:
    """`FLOWDPPO_OPS_BACKEND=reference`."""
    return _is_set(_BACKEND, _REFERENCE)


def wants_checks() -> bool:
    """`FLOWDPPO_OPS_CHECK=1`."""
    return _is_set(_CHECK, _ON)


def _is_set(name: bytes | str, value: bytes | str) -> bool:
    """Read at every call, so that a debugger's shell or a test can switch; not while a graph is captured."""
    return not torch.compiler.is_compiling() and _SETTINGS.get(name) == value


def check_backend(where: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"{where}: no backend for device {device}, wanted cpu or cuda; flowdppo_ops.reference."
            f"{where.rpartition('.')[2]} runs on any device (FLOWDPPO_OPS_BACKEND=reference sends every call there)"
        )
