"""The environment variables of the package: read here, and refused where their value means nothing."""

from __future__ import annotations

import os


def wants_reference() -> bool:
    """`FLOWDPPO_OPS_BACKEND=reference`: every eager call goes to `flowdppo_ops.reference`."""
    return _value("FLOWDPPO_OPS_BACKEND", ("reference",)) == "reference"


def wants_checks() -> bool:
    """`FLOWDPPO_OPS_CHECK=1`: values are checked too, which synchronises a GPU."""
    return _value("FLOWDPPO_OPS_CHECK", ("0", "1")) == "1"


def wants_strict() -> bool:
    """Unless `FLOWDPPO_OPS_STRICT=0`: integrations reproduce their trainer to rounding."""
    return _value("FLOWDPPO_OPS_STRICT", ("0", "1")) != "0"


def _value(name: str, allowed: tuple[str, ...]) -> str:
    """Read at every call, so that a debugger's shell or a test can switch. Empty is as good as not set."""
    value = os.environ.get(name, "")
    if value and value not in allowed:
        wanted = " or ".join(map(repr, allowed))
        raise ValueError(f"flowdppo_ops: {name} is {value!r}, wanted {wanted}, or not set")
    return value
