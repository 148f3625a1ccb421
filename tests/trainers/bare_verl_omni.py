"""A pytest plugin, and an import: verl-omni's sources without what their packages pull in (vllm-omni, Ray workers).

`FLOWDPPO_OPS_VERL_OMNI` is a checkout. Its packages are registered without their `__init__` being run; every module is
the real file. With `FLOWDPPO_OPS_INTEGRATE=1` the integration is enabled, as a worker's `external_lib` enables it.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

_BARE = """
    verl_omni verl_omni.models verl_omni.pipelines verl_omni.pipelines.sd3_flow_grpo verl_omni.trainer
    verl_omni.trainer.omni verl_omni.workers.engine verl_omni.workers.engine.fsdp
"""

checkout = Path(os.environ["FLOWDPPO_OPS_VERL_OMNI"]).resolve()
sys.path.insert(0, str(checkout))
for _name in _BARE.split():
    _package = types.ModuleType(_name)
    _package.__path__ = [str(checkout.joinpath(*_name.split(".")))]
    _package.__file__ = str(checkout.joinpath(*_name.split("."), "__init__.py"))
    sys.modules[_name] = _package
    _parent, _, _child = _name.rpartition(".")
    if _parent:
        setattr(importlib.import_module(_parent), _child, _package)

if os.environ.get("FLOWDPPO_OPS_INTEGRATE") == "1":
    importlib.import_module("flowdppo_ops.integrations.verl_omni")
