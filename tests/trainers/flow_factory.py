"""Flow-Factory's scheduler, as an integration sees it: a stand-in, or its own module out of a checkout."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Union

import torch
from torch import Tensor

MODULE = "flow_factory.scheduler.flow_match_euler_discrete"
RESULTS = ["next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred"]


@dataclass
class SDESchedulerOutput:
    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SDESchedulerOutput:
        return cls(**{name: data[name] for name in {one.name for one in fields(cls)} & data.keys()})


class _Scheduler:
    """The surface that the integration relies on. Its own step does nothing but return what it was called with."""

    def __init__(self, given: dict[str, Tensor], dynamics_type: str = "Flow-SDE", noise_level: float = 0.7) -> None:
        self.sigmas, self.timesteps = given["sigmas"], given["timesteps"]
        self.dynamics_type, self.noise_level, self.is_eval = dynamics_type, noise_level, False

    def get_noise_level_for_sigma(self, sigma: Tensor) -> Tensor:
        return torch.where(sigma > self.sigmas[-2], self.noise_level, 0.0)

    def step(
        self,
        noise_pred,
        timestep,
        latents,
        next_latents=None,
        timestep_next=None,
        generator=None,
        noise_level=None,
        compute_log_prob=True,
        return_dict=True,
        return_kwargs=RESULTS,
        dynamics_type=None,
        sigma_max=None,
    ):
        return locals()


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    """A module of the trainer's name with that surface, its class a new one each time."""
    module = ModuleType(MODULE)
    module.FlowMatchEulerDiscreteSDEScheduler = type("FlowMatchEulerDiscreteSDEScheduler", (), dict(vars(_Scheduler)))
    module.SDESchedulerOutput = SDESchedulerOutput
    with _known({"flow_factory": None, "flow_factory.scheduler": None, MODULE: module}):
        yield module


@contextmanager
def real(checkout: Path) -> Iterator[ModuleType]:
    """The scheduler's real file; the packages around it without what they import. Needs diffusers and transformers."""
    source = checkout / "src" / "flow_factory"
    packages = {}
    for name in ("flow_factory", "flow_factory.scheduler", "flow_factory.utils"):
        packages[name] = ModuleType(name)
        packages[name].__path__ = [str(source.joinpath(*name.split(".")[1:]))]
    base = ModuleType("flow_factory.utils.base")  # which imports media libraries, for one function
    functions = ast.parse((source / "utils" / "base.py").read_text()).body
    wanted = [one for one in functions if getattr(one, "name", "") == "to_broadcast_tensor"]
    vars(base).update({"Union": Union, "List": list, "torch": torch})
    exec(compile(ast.Module(wanted, []), "base.py", "exec"), vars(base))
    with _known(packages | {base.__name__: base}):
        yield import_module(MODULE)


@contextmanager
def _known(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    assert not any(name.partition(".")[0] == "flow_factory" for name in sys.modules)
    sys.modules.update({name: module or ModuleType(name) for name, module in modules.items()})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "flow_factory"]:
            del sys.modules[name]
