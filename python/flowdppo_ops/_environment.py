"""Reads the environment variables of the package. An unknown value raises ValueError."""

from __future__ import annotations

import os


def wants_reference() -> bool:
    """`FLOWDPPO_OPS_BACKEND=reference`: every eager call goes to `flowdppo_ops.reference`."""
    return _value("FLOWDPPO_OPS_BACKEND", ("reference",)) == "reference"


def wants_checks() -> bool:
    """`FLOWDPPO_OPS_CHECK=1`: every eager call checks values too, which synchronises a GPU."""
    return _value("FLOWDPPO_OPS_CHECK", ("0", "1")) == "1"


def wants_strict() -> bool:
    """`FLOWDPPO_OPS_STRICT=1`, or not set: integrations reproduce their trainer's numbers to rounding."""
    return _value("FLOWDPPO_OPS_STRICT", ("0", "1")) != "0"


def _value(name: str, allowed: tuple[str, ...]) -> str:
    """The value of a variable, "" if it is not set. It is read at every call, so that a running process can change
    it."""
    value = os.environ.get(name, "")
    if value and value not in allowed:
        wanted = " or ".join(map(repr, allowed))
        raise ValueError(f"flowdppo_ops: {name} is {value!r}, wanted {wanted}, or not set")
    return value
