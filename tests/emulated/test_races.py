"""Data races in the kernels, which ThreadSanitizer sees."""

from __future__ import annotations

import pytest
import sde_step_cases
import torch
from cases import OBJECTIVES
from parity import three_way
from test_kernels import FUNCTIONS, drawn

from flowdppo_ops import reference, sde_step

# A warp takes the row, one block, two blocks.
lengths = pytest.mark.parametrize("numel", [40, 600, 4100])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("function", FUNCTIONS)
@lengths
def test_no_data_race(function, objective, numel):
    three_way(FUNCTIONS[function], drawn(function, 2, numel, objective=OBJECTIVES[objective]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("function", FUNCTIONS)
@lengths
def test_no_data_race_of_a_shard(group, function, objective, numel):
    arguments = drawn(function, 2, numel, objective=OBJECTIVES[objective])
    result = FUNCTIONS[function](**arguments, process_group=group)
    assert torch.equal(result.keep, getattr(reference, function)(**arguments).keep)


@lengths
def test_no_data_race_of_sde_step(numel):
    sde_step_cases.three_way(sde_step, sde_step_cases.draw((2, numel), guidance=True, residual=True))
