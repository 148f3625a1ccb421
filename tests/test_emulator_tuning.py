"""The kernels with other settings than those of kernels/tuning.cuh, run by the emulator: what benches/tune.py times."""

from __future__ import annotations

import sys
from collections.abc import Callable

import parity
import pytest
import sde_step_cases
from cases import OBJECTIVES, draw
from compilers import needs_cxx
from emulator.build import Fault
from emulator.call import EmulatedLoss, EmulatedStepLoss, Server, start
from emulator.call_sde_step import EmulatedSdeStep
from step_cases import STEP_DTYPES, draw_step

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator switches stacks as Linux does"),
    needs_cxx,
]

# Where loads and stores go, and who does what when, but not in which order numbers are added up.
SAME_BITS = {
    "MIN_BLOCKS": 3,
    "FORWARD_LOADS": "kStream",
    "BACKWARD_LOADS": "kKeep",
    "STORES": "kStream",
    "BACKWARD_REVERSED": 1,
    "DEPENDENT_LAUNCH": 1,
}
SAME_NUMBERS = {
    "few threads, one step": {"THREADS": 128, "NARROW_STEPS": 1, "WIDE_STEPS": 2},
    "many threads, many steps, reversed": {
        "THREADS": 512,
        "NARROW_STEPS": 4,
        "WIDE_STEPS": 3,
        "BACKWARD_REVERSED": 1,
    },
}

# A warp per row; a block, with whole vectors alone; several, with a tail; more than is added up in one go.
CUTS = ((0, 35), (1, 1024), (3, 5003), (1, 65_536 + 9))


def losses(server: Server, run: Callable) -> list:
    calls = []
    for splits, numel in CUTS:
        arguments = draw((3,), (numel,), objective=OBJECTIVES["guard"], ref_kl_weight=0.5)
        calls.append(run(EmulatedLoss(server, splits=splits), arguments))
    return calls


def step_losses(server: Server, run: Callable) -> list:
    calls = []
    for splits, numel in CUTS:
        arguments = draw_step((3,), (numel,), guidance=True, dtypes=STEP_DTYPES["bfloat16 outputs"])
        calls.append(run(EmulatedStepLoss(server, splits=splits), arguments))
    return calls


def steps(server: Server, run: Callable) -> list:
    calls = []
    dtypes = sde_step_cases.DTYPES["bfloat16 model, float32 rollout"]
    for splits, numel in CUTS:
        arguments = sde_step_cases.draw((3, numel), guidance=True, residual=True, dtypes=dtypes)
        calls.append(run(EmulatedSdeStep(server, splits=splits), arguments))
    return calls


# Unit and variant, and the calls: a kernel of few words a step, of many, and `sde_step`, which has both.
KERNELS = {
    "loss": (("policy_loss", "f32"), losses, parity),
    "step_loss": (("policy_loss", "step_bf16_f32"), step_losses, parity),
    "sde_step": (("sde_step", "bf16_f32"), steps, sde_step_cases),
}
each_kernel = pytest.mark.parametrize(("alone", "calls", "cases"), KERNELS.values(), ids=KERNELS)


@pytest.fixture
def tuned(tmp_path):
    servers = []

    def tuned(alone, settings, sanitizer="plain", fault=None):
        servers.append(start(tmp_path / str(len(servers)), sanitizer, fault, alone, settings))
        return servers[-1]

    yield tuned
    for server in servers:
        server.close()


@each_kernel
def test_same_bits(tuned, alone, calls, cases):
    wanted, got = (calls(tuned(alone, settings), cases.run) for settings in ({}, SAME_BITS))
    for mine, other in zip(got, wanted, strict=True):
        parity.equal_bits(mine, other)


@each_kernel
@pytest.mark.parametrize("settings", SAME_NUMBERS.values(), ids=SAME_NUMBERS)
def test_same_numbers(tuned, alone, calls, cases, settings):
    calls(tuned(alone, settings, "asan"), cases.three_way)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("common/parts.cuh", "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x"), "overflow|error "),
        (Fault("common/parts.cuh", "kSteps * kWarpSize)", "2 * kWarpSize)"), "overflow|not finite|error "),
    ],
    ids=["one part further", "the first vectors of two steps"],
)
def test_planted_faults_are_seen(tuned, fault, says):
    alone, calls, cases = KERNELS["loss"]
    server = tuned(alone, SAME_NUMBERS["many threads, many steps, reversed"], "asan", fault)
    with pytest.raises(AssertionError, match=says):
        calls(server, cases.three_way)
