"""`sde_step` in a process with the stand-in driver, as `scenarios.py` for the losses."""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flowdppo_ops import _native
from standin.gpu import memory, on_gpu, without_memory
from standin.harness import Driver
from standin.scenarios import BF16, DTYPES, F16, F32, F64, MULTIPROCESSORS, SCHEDULE, holds, refused

DRAWN = {"model_output": F32, "sample": F32, "noise": F32}
OUTPUTS = ("stored", "log_prob", "prev_sample_mean", "std", "residual", "numbers")

FIELDS: dict[str, Any] = {}  # of the latest call


def forward(
    rows: tuple[int, ...] = (3,),
    numel: int = 600,
    dtypes: dict[str, torch.dtype] = DRAWN,
    vectors: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor | None]:
    fields = {name: memory(*rows, numel, dtype=dtype) for name, dtype in dtypes.items()} | SCHEDULE | (vectors or {})
    FIELDS.clear()
    FIELDS.update(fields)
    options = {"sampler": "flow_sde", "log_prob_normalizer": True, "residual_dtype": None, "row_dims": len(rows)}
    return dict(zip(OUTPUTS, _native.SdeStepCall(fields, options | settings).forward(), strict=True))


def backward(
    rows: int = 3,
    numel: int = 600,
    stored: torch.dtype = F32,
    has: tuple[bool, bool] = (True, True),
    dtypes: tuple[torch.dtype | None, torch.dtype | None] = (F32, None),
) -> list[Tensor | None]:
    """`has`: the gradients of log-prob and mean that came. `dtypes`: of those that are wanted."""
    FIELDS.clear()
    FIELDS["prev_sample"] = memory(rows, numel, dtype=stored)
    FIELDS["prev_sample_mean"], FIELDS["numbers"] = memory(rows, numel), memory(_native.SDE_STEP_NUMBERS * rows)
    saved = tuple(FIELDS.values())
    FIELDS["grad_log_prob"], FIELDS["grad_prev_sample_mean"] = (
        memory(*shape) if came else None for came, shape in zip(has, ((rows,), (rows, numel)), strict=True)
    )
    grads = FIELDS["grad_log_prob"], FIELDS["grad_prev_sample_mean"]
    return _native.sde_step_backward(grads, *saved, list(dtypes))


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


# ---- images and arguments --------------------------------------------------------------------------------------------


def its_image_alone() -> None:
    driver, _ = Driver(), on_gpu()
    for _ in range(2):
        forward()
        backward()
    log = driver.log()
    assert log[:2] == ["retain 0", "load sm_90"], log
    assert [line.split()[1] for line in log[2:]] == ["sde_step_forward_f32", "sde_step_backward_f32"] * 2


def every_entry_point() -> None:
    driver, seen = Driver(), {}
    on_gpu()
    mixes = {"f32": (F32, F32), "bf16_f32": (BF16, F32), "bf16": (BF16, BF16), "f16": (F16, F16), "mixed": (F32, BF16)}
    for (variant, (output, sample)), noise in product(mixes.items(), (F32, BF16, F16)):
        forward(dtypes={"model_output": output, "sample": sample, "noise": noise})
        backward(stored=sample, dtypes=(output, None))
        launches = driver.launches()
        assert [launch.name for launch in launches] == [f"sde_step_{way}_{variant}" for way in ("forward", "backward")]
        seen |= {launch.name: len(bytes(launch.parameters)) for launch in launches}
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith("sde_step")}
    # An unconditional output of another dtype than the conditional one.
    forward(dtypes=DRAWN | {"model_output": BF16, "uncond_output": F32}, vectors={"guidance_scale": 2.0})
    backward(dtypes=(BF16, F32))
    assert [launch.name.split("_")[-1] for launch in driver.launches()] == ["mixed", "mixed"]


def forward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    gpu, made = on_gpu(0, stream), without_memory()
    vectors = {
        "sigma": memory(1, 3),
        "sigma_next": memory(2, 1, dtype=BF16),
        "noise_level": memory(2, 3, dtype=F64),
        "sigma_max": 0.5,
        "guidance_scale": memory(1, 1, dtype=F16),
    }
    dtypes = {"model_output": F16, "uncond_output": BF16, "sample": F32, "noise": F16}
    options = {"sampler": "cps", "log_prob_normalizer": False, "residual_dtype": F16}
    out = forward((2, 3), 10_000, dtypes, vectors, **options)
    (launch,) = driver.launches()
    splits = 3  # parts of at least 4096 elements
    assert (launch.name, launch.blocks, launch.threads) == ("sde_step_forward_mixed", 6 * splits, 256)
    assert launch.stream == stream
    mine, argument = launch.parameters, launch.parameters.call
    holds(argument.latents, FIELDS)
    strides = {"sigma": (1, 3), "sigma_next": (3, 2), "noise_level": (1, 6), "guidance_scale": (1, 1)}
    holds(argument.schedule, FIELDS, **strides)
    assert (argument.rows, argument.numel, argument.sampler, argument.log_prob_normalizer) == (6, 10_000, 3, 0)
    assert mine.residual.as_tuple() == (out["residual"].data_ptr(), 2, 0)
    for name in ("stored", "log_prob", "prev_sample_mean", "std", "numbers"):
        assert getattr(mine, name) == out[name].data_ptr(), name
    assert [mine.partials, mine.tickets] == addresses(made[-1], gpu.tickets[0])
    assert (made[-1].numel(), mine.splits) == (6 * splits, splits)
    # A given latent, stored already: nothing is drawn, nothing stored, nothing that is not wanted.
    out = forward(dtypes={"model_output": F32, "sample": F32, "prev_sample": F32}, sampler="dance_sde")
    (launch,) = driver.launches()
    given = launch.parameters
    holds(given.call.latents, FIELDS)
    holds(given.call.schedule, FIELDS)
    assert (given.stored, given.residual.data, given.splits) == (0, 0, 1)
    assert (given.call.sampler, given.call.log_prob_normalizer) == (2, 1)
    assert (out["stored"], out["residual"]) == (None, None)
    # In another dtype it is stored in that of the sample.
    out = forward(dtypes={"model_output": F32, "sample": F32, "prev_sample": F16})
    assert driver.launches()[0].parameters.stored == out["stored"].data_ptr()


def backward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    on_gpu(0, stream)
    grads = backward(2, 8192, F16, dtypes=(BF16, F16))
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.threads) == ("sde_step_backward_mixed", 4, 256)
    assert launch.stream == stream
    mine = launch.parameters
    assert (mine.rows, mine.numel, mine.splits, mine.dtype) == (2, 8192, 2, 0)
    assert mine.prev_sample.as_tuple() == (FIELDS["prev_sample"].data_ptr(), 2, 0)
    for name in ("prev_sample_mean", "numbers", "grad_log_prob", "grad_prev_sample_mean"):
        assert getattr(mine, name) == FIELDS[name].data_ptr(), name
    targets = [mine.grad_model_output.as_tuple(), mine.grad_uncond_output.as_tuple()]
    assert targets == [(grad.data_ptr(), DTYPES[grad.dtype], 0) for grad in grads]
    for has in ((False, True), (True, False)):
        _, uncond = backward(has=has, dtypes=(None, F32))
        (launch,) = driver.launches()
        mine = launch.parameters
        wanted = addresses(FIELDS["grad_log_prob"], FIELDS["grad_prev_sample_mean"])
        assert [mine.grad_log_prob, mine.grad_prev_sample_mean] == wanted
        assert [address != 0 for address in wanted] == [*has]
        assert [mine.grad_model_output.data, mine.grad_uncond_output.data] == addresses(None, uncond)


def grids() -> None:
    """Blocks stay within a grid and cover the rows; splits, grid and workspace belong together."""
    driver, gpu = Driver(), on_gpu()
    made = without_memory()
    several = 16 * MULTIPROCESSORS
    for rows, numel, splits in (
        (1_000_000, 512, 0),
        (1_000_000, 513, 1),
        (1, 4097, 2),
        (16, 65_536, several // 16),
        (3, 1 << 33, math.ceil(several / 3)),
    ):
        forward((rows,), numel)
        # What no block waits for needs no counters.
        assert made[-1].numel() == (rows * splits if splits > 1 else 0)
        assert splits <= 1 or gpu.tickets[-1].numel() >= rows
        backward(rows, numel)
        for launch, of in zip(driver.launches(), (lambda p: p.call, lambda p: p), strict=True):
            blocks = rows * splits if splits else math.ceil(rows / 8)
            assert (launch.blocks, launch.parameters.splits) == (blocks, splits), (rows, numel, launch.blocks)
            assert (of(launch.parameters).rows, of(launch.parameters).numel) == (rows, numel)
    refused(RuntimeError, lambda: forward((1 << 31,), 600), "2147483648 rows", "grid")
    stream = driver.stream()
    gpu.target = lambda: (0, stream)
    driver.capture(stream, True)
    forward((3,), 10_000)
    assert gpu.tickets[-1].numel() == 3


def bad_arguments() -> None:
    """Refused before the driver is asked for anything."""
    driver, _ = Driver(), on_gpu()
    guided = {"guidance_scale": 2.0}
    given = {"model_output": F32, "sample": F32, "prev_sample": F32}
    for name in ("model_output", "uncond_output", "sample", "prev_sample", "noise"):
        dtypes = {} if name == "prev_sample" else DRAWN
        dtypes = (dtypes or given) | {name: F64}
        vectors = guided if name == "uncond_output" else {}
        refused(TypeError, lambda d=dtypes, v=vectors: forward(dtypes=d, vectors=v), f"{name} has dtype float64", "CPU")
    refused(TypeError, lambda: forward(residual_dtype=F64), "residual has dtype float64")
    neither = {"model_output": F32, "sample": F32}
    for dtypes in (neither, given | {"noise": F32}):
        refused(ValueError, lambda dtypes=dtypes: forward(dtypes=dtypes), "one of prev_sample and noise is missing")
    refused(ValueError, lambda: forward(dtypes=DRAWN | {"uncond_output": F32}), "uncond_output with guidance_scale")
    refused(ValueError, lambda: forward(vectors=guided), "uncond_output with guidance_scale")
    refused(ValueError, lambda: forward(vectors={"sigma": memory(4)}), "sigma has shape")
    refused(TypeError, lambda: backward(stored=F64), "prev_sample has dtype float64", "CPU")
    refused(TypeError, lambda: backward(dtypes=(F64, None)), "grad_model_output has dtype float64")
    assert driver.launches() == []


if __name__ == "__main__":
    globals()[sys.argv[1]]()
