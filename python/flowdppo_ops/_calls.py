"""What the public functions share: a call whose metadata was checked before runs at once, any other is checked
first."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from . import _environment
from ._checks import Call, Family
from ._torch import FAMILY


class PublicFunction:
    """The argument names of a public function, its checks, and a native memory of the calls that passed them.

    Args:
        function: the public function; its name and its parameters are read.
        check: takes the public name, the array library and the arguments by name; returns the checked call or raises.
        memo: a native class; made from the argument names, it remembers calls.
        run: takes a checked call, the memo and the arguments; runs the call and adds it to the memo.
        check_values: raises if a checked call has values that are out of range; for `FLOWDPPO_OPS_CHECK=1`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        check: Callable[[str, Family, dict[str, Any]], Call],
        memo: type,
        run: Callable[[Call, Any, tuple], Any],
        check_values: Callable[[Call], None],
    ) -> None:
        self.name = function.__name__
        self.names = tuple(signature(function).parameters)
        self.check, self.run, self.check_values = check, run, check_values
        self.memo = memo(list(self.names))
        # The result of a call whose metadata was checked before; None for any other call.
        self.forward = self.memo.forward

    def checked(self, arguments: tuple) -> Any:
        """Checks the arguments, runs the call and returns its result."""
        call = self.check(f"flowdppo_ops.{self.name}", FAMILY, dict(zip(self.names, arguments, strict=True)))
        if not torch.compiler.is_compiling():
            if _environment.wants_reference():
                return getattr(import_module("flowdppo_ops.reference"), f"checked_{self.name}")(call)
            if _environment.wants_checks():
                self.check_values(call)
        check_backend(call.where, next(iter(call.fields.values())).device)
        return self.run(call, self.memo, arguments)


def check_backend(where: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        name = where.rpartition(".")[2]
        raise RuntimeError(
            f"{where}: no backend for device {device}, wanted cpu or cuda; flowdppo_ops.reference.{name} runs on every "
            "device with float64 (FLOWDPPO_OPS_BACKEND=reference sends every eager call there)"
        )
