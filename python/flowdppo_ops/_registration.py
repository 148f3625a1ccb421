"""Registers the operators with PyTorch: at once if PyTorch is imported, otherwise when it is imported.

`torch.export.load` finds operators by name. So they must be registered in a process that has imported PyTorch and this
package, in either order, even if no function of this package has been used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_operators() -> None:
    if sys.modules.get("torch") is not None:
        _register()
    elif "torch" not in sys.modules:  # None in `sys.modules` forbids the import
        sys.meta_path.insert(0, _AfterPyTorch())


def _register() -> None:
    import_module("flowdppo_ops._operators.policy_loss")
    import_module("flowdppo_ops._operators.sde_step")


class _AfterPyTorch:
    """A finder of modules that finds PyTorch as Python's own finder does, and registers the operators after its
    import."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec
