"""From a public function to its operator: what has been seen goes straight there, the rest through the checks."""

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
    """Of one public function: its arguments' names, its checks, and the calls that have passed them.

    `check`: metadata. `memo`: of names, the native one. `run`: a checked call, with the memo and the arguments.
    `check_values`: for `FLOWDPPO_OPS_CHECK=1`.
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
        # Of a call like one that has been checked before; None of any other.
        self.forward = self.memo.forward

    def checked(self, arguments: tuple) -> Any:
        """The result, after all checks."""
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
        raise RuntimeError(
            f"{where}: no backend for device {device}, wanted cpu or cuda; flowdppo_ops.reference."
            f"{where.rpartition('.')[2]} runs on any device (FLOWDPPO_OPS_BACKEND=reference sends every call there)"
        )
