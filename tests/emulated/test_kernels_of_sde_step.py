"""The kernels of `sde_step`, beyond the tests that the CPU backend has too."""

from __future__ import annotations

import pytest
import torch
from parity import equal_bits
from sde_step_cases import FLOAT32_DTYPES, SAMPLERS, draw, run, three_way
from standin.emulated import on_cpu
from standin.gpu import memory, outputs_off, unreadable
from test_kernels import off

from flowdppo_ops import sde_step

dtypes = pytest.mark.parametrize("dtypes", FLOAT32_DTYPES.values(), ids=FLOAT32_DTYPES)
# A warp takes the row, one block, three blocks.
lengths = pytest.mark.parametrize("numel", [40, 700, 8300])


# Around a vector of 8, one and two steps of a warp, one block and several.
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 256, 257, 511, 512, 513, 767, 4096, 4099, 8201])
@dtypes
def test_lengths(numel, dtypes):
    for replay in (False, True):
        three_way(sde_step, draw((2, numel), guidance=True, residual=True, dtypes=dtypes, replay=replay))


def test_rows_longer_than_a_run(gpu):
    gpu.target = lambda: (1, 0)  # that has no multiprocessor to cut a row for
    three_way(sde_step, draw((2, 65_536 + 9), guidance=True, residual=True))


@pytest.mark.parametrize("rows", [7, 8, 9, 70])
def test_many_short_rows(rows):
    three_way(sde_step, draw((rows, 21), residual=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
@lengths
def test_deterministic_rows(sampler, numel):
    arguments = draw((4, numel), sampler=sampler, residual=True, guidance=True)
    arguments["noise_level"][1] = 0.0
    arguments["sigma_next"][2] = 0.0
    mine = three_way(sde_step, arguments)
    fixed = [1, 2] if sampler == "cps" else [1]
    assert (mine["std"][fixed] == 0).all()
    assert (mine["residual"][fixed] == 0).all()


@dtypes
def test_odd_addresses(dtypes):
    """Each latent alone, the outputs, and all."""
    arguments = draw((3, 200), guidance=True, residual=True, dtypes=dtypes)
    names = [name for name, value in arguments.items() if torch.is_tensor(value) and value.ndim == 2]
    for moved in ([], *([name] for name in names), names):
        for offset in (1, 4):
            with outputs_off(offset if len(moved) != 1 else 0):
                three_way(sde_step, arguments | {name: off(arguments[name], offset) for name in moved})


@pytest.mark.parametrize("numel", [7, 12, 1004, 1008, 4099])
@pytest.mark.parametrize("name", ["uncond_output", "noise", "residual", "model_output"])
def test_vectors_of_two_lengths(name, numel):
    """Where a dtype's vectors are aligned, those of a shorter one need not be."""
    dtypes = {"*": torch.float32, name: torch.float16}
    for offset in (0, 4):
        with outputs_off(offset):
            three_way(sde_step, draw((3, numel), guidance=True, residual=True, dtypes=dtypes))


@dtypes
def test_latents_have_the_bits_of_the_cpu(dtypes):
    arguments = draw((3, 300), guidance=True, residual=True, dtypes=dtypes)
    emulated, native = run(sde_step, arguments), on_cpu(run, sde_step, arguments)
    for name in ("prev_sample", "prev_sample_mean", "std", "residual"):
        equal_bits({name: emulated[name]}, {name: native[name]})


@lengths
def test_same_bits_in_any_order(driver, numel):
    arguments = draw((3, numel), guidance=True, residual=True)
    driver.shuffle(0)
    natural = run(sde_step, arguments)
    for seed in (1, 100, 200):
        driver.shuffle(seed)
        equal_bits(run(sde_step, arguments), natural)


@pytest.mark.parametrize("upstream", [1.0, torch.inf, torch.nan])
def test_rows_without_a_coefficient_are_not_read(upstream):
    arguments = draw((4, 300), replay=True)
    arguments["noise_level"] = 0.0
    for name in ("model_output", "sample", "prev_sample"):
        arguments[name] = memory(4, 300).copy_(arguments[name])
    output = arguments["model_output"].requires_grad_()
    step = sde_step(**arguments)
    with unreadable([arguments["prev_sample"]]):
        (grad,) = torch.autograd.grad(step.log_prob, output, torch.full((4,), upstream))
    assert (grad == 0).all()


def test_one_launch_each_way(driver):
    """And none for a gradient that nobody wants."""
    arguments = draw((3, 9000), guidance=True, residual=True)
    run(sde_step, arguments)
    assert [launch.name for launch in driver.launches()] == ["sde_step_forward_f32", "sde_step_backward_f32"]
    sde_step(**arguments)
    with torch.no_grad():
        sde_step(**arguments | {"model_output": arguments["model_output"].requires_grad_()})
    assert [launch.name for launch in driver.launches()] == ["sde_step_forward_f32"] * 2


def test_float64_is_refused():
    """Of latents; row vectors may have it."""
    arguments = draw()
    with pytest.raises(TypeError, match=r"model_output has dtype float64.* on a GPU"):
        sde_step(**arguments | {"model_output": arguments["model_output"].double()})
    sde_step(**arguments | {name: arguments[name].double() for name in ("sigma", "sigma_next", "noise_level")})
