"""`sde_step` in a process with the stand-in driver, as `scenarios.py` for the losses."""

from __future__ import annotations

import math
import sys
from itertools import product

from flowdppo_ops import _native
from standin.emulated import on_gpu
from standin.harness import Driver
from standin.scenarios import MULTIPROCESSORS, KiB, refused

MiB = 1 << 20
F32, BF16, F16, F64 = "float32", "bfloat16", "float16", "float64"
NUMBERS = ("flow_sde", 0.75, 0.5, 0.25, 0.125, None)


def forward(
    target=(0, 0),
    *,
    rows=3,
    numel=600,
    dtypes=(F32, None, F32, None, F32),
    schedule=NUMBERS,
    normalizer=True,
    stored=F32,
    residual=None,
    partials=None,
    tickets=None,
):
    """A forward at made-up addresses: model output, unconditional output, sample, next latent, noise at 1 to 5 MiB; the
    stored latent, the mean and the residual at 6, 7 and 8."""
    arrays = tuple(None if dtype is None else ((1 + i) * MiB, dtype) for i, dtype in enumerate(dtypes))
    latents = stored and (6 * MiB, stored), 7 * MiB, residual and (8 * MiB, residual)
    out = (*latents, 16 * KiB, 32 * KiB, 48 * KiB)
    partials, tickets = partials or (64 * KiB, MiB), tickets or (80 * KiB, rows)
    _native.sde_step_forward_cuda(target, arrays, schedule, rows, numel, normalizer, out, partials, tickets)


def backward(
    target=(0, 0), *, rows=3, numel=600, stored=F32, grads=(16 * KiB, MiB), output=(8 * MiB, F32), uncond=None
):
    saved = (*grads, (2 * MiB, stored), 3 * MiB, 48 * KiB)
    _native.sde_step_backward_cuda(target, saved, rows, numel, output, uncond)


# ---- images and arguments --------------------------------------------------------------------------------------------


def its_image_alone() -> None:
    driver = Driver()
    for _ in range(2):
        forward()
        backward()
    log = driver.log()
    assert log[:2] == ["retain 0", "load sm_90"], log
    assert [line.split()[1] for line in log[2:]] == ["sde_step_forward_f32", "sde_step_backward_f32"] * 2


def every_entry_point() -> None:
    driver, seen = Driver(), {}
    mixes = {"f32": (F32, F32), "bf16_f32": (BF16, F32), "bf16": (BF16, BF16), "f16": (F16, F16), "mixed": (F32, BF16)}
    for (variant, (output, sample)), noise in product(mixes.items(), (F32, BF16, F16)):
        forward(dtypes=(output, None, sample, None, noise), stored=sample)
        backward(stored=sample, output=(8 * MiB, output))
        launches = driver.launches()
        assert [launch.name for launch in launches] == [f"sde_step_{way}_{variant}" for way in ("forward", "backward")]
        seen |= {launch.name: len(bytes(launch.parameters)) for launch in launches}
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith("sde_step")}
    # An unconditional output of another dtype than the conditional one.
    forward(dtypes=(BF16, F32, F32, None, F32), schedule=(*NUMBERS[:5], 2.0))
    backward(output=(8 * MiB, BF16), uncond=(9 * MiB, F32))
    assert [launch.name.split("_")[-1] for launch in driver.launches()] == ["mixed", "mixed"]


def forward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    rows = (1 * KiB, F32, 1, 3), (2 * KiB, BF16, 3, 2), (3 * KiB, F64, 1, 6), 0.5, (4 * KiB, F16, 1, 1)
    options = {"rows": 6, "numel": 10_000, "schedule": ("cps", *rows), "normalizer": False, "residual": F16}
    forward((0, stream), dtypes=(F16, BF16, F32, None, F16), **options)
    (launch,) = driver.launches()
    splits = 3  # parts of at least 4096 elements
    assert (launch.name, launch.blocks, launch.threads) == ("sde_step_forward_mixed", 6 * splits, 256)
    assert launch.stream == stream
    # address, value, dtype, present, divide, modulo, pad
    schedule = (1 * KiB, 0.0, 0, 1, 1, 3, 0), (2 * KiB, 0.0, 1, 1, 3, 2, 0), (3 * KiB, 0.0, 3, 1, 1, 6, 0)
    schedule += (0, 0.5, 0, 1, 1, 1, 0), (4 * KiB, 0.0, 2, 1, 1, 1, 0)
    latents = (1 * MiB, 2, 0), (2 * MiB, 1, 0), (3 * MiB, 0, 0), (5 * MiB, 2, 0)
    out = 6 * MiB, 7 * MiB, 8 * MiB, 16 * KiB, 32 * KiB, 48 * KiB
    wanted = (*latents, (*schedule, 3, 0), *out, 64 * KiB, 80 * KiB, 6, 10_000, 1, 0, 2, splits)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()
    # A given latent, stored already: nothing is drawn, nothing stored, nothing that is not wanted.
    forward(dtypes=(F32, None, F32, F32, None), stored=None, schedule=("dance_sde", *NUMBERS[1:]))
    (launch,) = driver.launches()
    given = launch.parameters
    assert given.next.as_tuple() == (4 * MiB, 0, 0)
    assert (given.draws, given.stored, given.residual, given.normalizer, given.splits) == (0, 0, 0, 1, 1)
    assert (given.uncond.data, given.schedule.guidance.present, given.schedule.sampler) == (0, 0, 2)


def backward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    options = {"stored": F16, "output": (8 * MiB, BF16), "uncond": (9 * MiB, F16)}
    backward((0, stream), rows=2, numel=8192, **options)
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.threads) == ("sde_step_backward_mixed", 4, 256)
    assert launch.stream == stream
    saved = (2 * MiB, 2, 0), 3 * MiB, 48 * KiB, 16 * KiB, MiB
    wanted = (*saved, 8 * MiB, 9 * MiB, 2, 8192, 1, 2, 2, 0)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()
    for grads in ((None, MiB), (16 * KiB, None)):
        backward(grads=grads, output=None, uncond=(9 * MiB, F32))
        (launch,) = driver.launches()
        sources = launch.parameters.grad_log_prob, launch.parameters.grad_mean
        assert sources == tuple(address or 0 for address in grads)
        assert (launch.parameters.grad_output, launch.parameters.grad_uncond) == (0, 9 * MiB)


def grids() -> None:
    """Blocks stay within a grid and cover the rows; splits and grid belong together."""
    driver = Driver()
    several = 16 * MULTIPROCESSORS
    for rows, numel, splits in (
        (1_000_000, 512, 0),
        (1_000_000, 513, 1),
        (1, 4097, 2),
        (16, 65_536, several // 16),
        (3, 1 << 33, math.ceil(several / 3)),
    ):
        needed, capturing = _native.sde_step_workspace_cuda((0, 0), rows, numel)
        assert (needed, capturing) == (rows * splits if splits > 1 else 0, False)
        # What no block waits for needs no counters.
        forward(rows=rows, numel=numel, partials=(64 * KiB, needed), tickets=(80 * KiB, rows if splits > 1 else 0))
        backward(rows=rows, numel=numel)
        for launch in driver.launches():
            blocks = rows * splits if splits else math.ceil(rows / 8)
            assert (launch.blocks, launch.parameters.splits) == (blocks, splits), (rows, numel, launch.blocks)
            assert (launch.parameters.rows, launch.parameters.numel) == (rows, numel)
    refused(RuntimeError, lambda: forward(rows=1 << 31, numel=600), "2147483648 rows", "grid")
    stream = driver.stream()
    driver.capture(stream, True)
    assert _native.sde_step_workspace_cuda((0, stream), 3, 600) == (0, True)


def bad_arguments() -> None:
    """Refused before the driver is asked for anything."""
    driver = Driver()
    guided = (*NUMBERS[:5], 2.0)
    for dtypes, schedule, name in (
        ((F64, None, F32, None, F32), NUMBERS, "model_output"),
        ((F32, F64, F32, None, F32), guided, "uncond_output"),
        ((F32, None, F64, None, F32), NUMBERS, "sample"),
        ((F32, None, F32, F64, None), NUMBERS, "prev_sample"),
        ((F32, None, F32, None, F64), NUMBERS, "noise"),
    ):
        given = {"dtypes": dtypes, "schedule": schedule, "stored": dtypes[2]}
        refused(TypeError, lambda given=given: forward(**given), f"{name} has dtype float64", "CPU")
    refused(TypeError, lambda: forward(residual=F64), "residual has dtype float64")
    refused(TypeError, lambda: forward(stored=F16), "prev_sample has dtype float16, wanted float32")
    given = {"dtypes": (F32, None, F32, F16, None), "stored": None}
    refused(TypeError, lambda: forward(**given), "prev_sample has dtype float16, wanted float32")
    refused(ValueError, lambda: forward(stored=None), "memory for prev_sample is missing")
    refused(ValueError, lambda: forward(dtypes=(F32, None, F32, None, None)), "one of prev_sample and noise is missing")
    refused(ValueError, lambda: forward(dtypes=(F32, None, F32, F32, F32)), "one of prev_sample and noise is missing")
    refused(ValueError, lambda: forward(dtypes=(F32, F32, F32, None, F32)), "guidance_scale is missing")
    refused(ValueError, lambda: forward(schedule=guided), "uncond_output is missing")
    refused(ValueError, lambda: forward(schedule=("euler", *NUMBERS[1:])), "sampler is", "flow_sde, dance_sde, cps")
    too_many = ("cps", (KiB, F32, 1, 4), *NUMBERS[2:])
    refused(ValueError, lambda: forward(schedule=too_many), "sigma has 4 elements")
    refused(ValueError, lambda: forward(numel=10_000, tickets=(80 * KiB, 2)), "tickets has 2 elements, wanted 3")
    refused(ValueError, lambda: forward(numel=10_000, partials=(64 * KiB, 8)), "partials has 8 elements, wanted 9")
    refused(TypeError, lambda: backward(stored=F64), "prev_sample has dtype float64", "CPU")
    refused(TypeError, lambda: backward(output=(8 * MiB, F64)), "grad_output has dtype float64")
    refused(ValueError, lambda: backward(output=(2, F32)), "grad_output is at address 0x2")
    assert driver.launches() == []


# ---- from `flowdppo_ops.sde_step` on, with emulated kernels ----------------------------------------------------------


def parity() -> None:
    """The results are within the suite's tolerance; one launch forward, one backward; the workspace is as it was."""
    driver, cuda = Driver(), on_gpu()
    from parity import equal_bits
    from sde_step_cases import FLOAT32_DTYPES, LAYOUTS, SAMPLERS, draw, run, three_way

    from flowdppo_ops import sde_step

    calls = [
        {"sampler": sampler, "replay": replay, "guidance": guidance, "residual": guidance}
        for sampler, replay, guidance in product(SAMPLERS, (False, True), (False, True))
    ]
    calls += [{"dtypes": d, "guidance": True, "residual": True} for d in FLOAT32_DTYPES.values()]
    calls += [{"shape": s, "row_dims": r, "schedule_shape": v} for s, r, v in LAYOUTS.values()]
    calls += [{"shape": (3, numel)} for numel in (1, 7, 512, 513, 4096, 4097, 65_543)]
    for call in calls:
        three_way(sde_step, draw(**call))
    arguments = draw((4, 65_543), residual=True)
    drawn = run(sde_step, arguments)
    del arguments["noise"]
    equal_bits(run(sde_step, arguments | {"prev_sample": drawn["prev_sample"]}), drawn)

    names = [launch.name.split("_")[2] for launch in driver.launches()]
    assert names == ["forward", "backward"] * (len(calls) + 2)
    assert list(cuda._tickets) == [(0, 0)]
    assert not cuda._tickets[0, 0].any()


def launches() -> None:
    """One each way, through the dispatcher as well; none for a gradient that nobody wants."""
    driver, cuda = Driver(), on_gpu()
    import torch
    from sde_step_cases import draw, run
    from torch.utils._python_dispatch import TorchDispatchMode

    from flowdppo_ops import sde_step

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    arguments = draw((3, 9000), guidance=True, residual=True)
    with Watching():
        run(sde_step, arguments)
    assert [launch.name for launch in driver.launches()] == ["sde_step_forward_f32", "sde_step_backward_f32"]
    assert not cuda._tickets, "a tensor outlived a call through the dispatcher"
    sde_step(**arguments)
    with torch.no_grad():
        sde_step(**arguments | {"model_output": arguments["model_output"].requires_grad_()})
    assert [launch.name for launch in driver.launches()] == ["sde_step_forward_f32"] * 2


def float64_from_python() -> None:
    Driver()
    on_gpu()
    from sde_step_cases import DTYPES, draw

    from flowdppo_ops import sde_step

    arguments = draw(dtypes=DTYPES["one float64 latent"])
    refused(TypeError, lambda: sde_step(**arguments), "model_output has dtype float64", "GPU")
    arguments = draw()
    sde_step(**arguments | {name: arguments[name].double() for name in ("sigma", "sigma_next", "noise_level")})


if __name__ == "__main__":
    globals()[sys.argv[1]]()
