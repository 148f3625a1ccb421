"""Flow-Factory, stood in for, and integrations as they are imported."""

from __future__ import annotations

from typing import Any

import pytest
from golden.load import Case
from trainers import flow_factory as surface

from flowdppo_ops.integrations import flow_factory, flow_grpo


@pytest.fixture(autouse=True)
def _as_imported():
    """No integration stays enabled, and each says its line again."""
    flow_grpo._announce.cache_clear()
    yield
    flow_factory.disable()


@pytest.fixture
def trainer():
    """A module of the trainer's name, with the surface that the integration relies on."""
    with surface.stand_in() as module:
        yield module


@pytest.fixture
def scheduler(trainer):
    """Of a case, with the integration enabled."""
    flow_factory.enable()

    def of(case: Case) -> Any:
        return trainer.FlowMatchEulerDiscreteSDEScheduler(
            case.inputs(False), case.params["dynamics_type"], case.number("noise_level")
        )

    return of
