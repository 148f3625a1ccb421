"""What happens in a process with the stand-in driver: one function each, run by `harness.run` by name.

Where no kernel runs, addresses are made up: the launcher passes them on and must not follow them.
"""

from __future__ import annotations

import math
import sys
import threading
from functools import partial

import pytest

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, _native
from standin.harness import Driver

KiB = 1024
OPTIONS = ("gaussian", "mean", "mean", 0.0)
MULTIPROCESSORS = 4  # of the stand-in's devices


# Dtypes in the order of `_args.Latents`: output, uncond_output, sample, prev_sample, old, ref.
MEANS = ("float32", None, None, "float32", "float32", None)
STEP = ("bfloat16", None, "float32", "float32", "float16", None)
SCHEDULE = ("flow_sde", "residual", "mean", (20 * KiB, "float32", 1, 3), 0.5, 0.75, 0.99, None)
# Over means every row has a std; a schedule has it in itself.
VECTORS = ((16 * KiB, "float32", 1, 3), None, None, None, 0.5, 0.25, None)
STEP_VECTORS = ((16 * KiB, "float32", 1, 3), None, None, None, None, None, None)


def arrays_at(dtypes):
    """At made-up addresses: 1 to 6 MiB."""
    return tuple(None if dtype is None else ((1 + i) << 20, dtype) for i, dtype in enumerate(dtypes))


def problem(rows, numel, dtypes, vectors, schedule, objective, options):
    """What every forward is told."""
    if dtypes is None:
        dtypes = STEP if schedule else MEANS
    if vectors is None:
        (address, dtype, *_), *rest = STEP_VECTORS if schedule else VECTORS
        vectors = ((address, dtype, 1, rows), *rest)
    return arrays_at(dtypes), vectors, schedule, rows, numel, (objective or FlowDPPO())._native, options


def forward(
    target=(0, 0),
    *,
    rows=3,
    numel=600,
    dtypes=None,
    vectors=None,
    schedule=None,
    objective=None,
    options=OPTIONS,
    shard_sums=None,
    partials=None,
    tickets=None,
):
    arguments = problem(rows, numel, dtypes, vectors, schedule, objective, options)
    out = 32 * KiB, 48 * KiB
    workspace = partials or (64 * KiB, 1 << 20), tickets or (80 * KiB, rows + 1)
    _native.policy_loss_forward_cuda(target, *arguments, out, shard_sums, *workspace)


def shard_sums(target=(0, 0), *, rows=3, numel=600, dtypes=None, schedule=None, partials=None):
    arguments = problem(rows, numel, dtypes, None, schedule, None, OPTIONS)
    workspace = partials or (64 * KiB, 1 << 20), (80 * KiB, rows + 1)
    _native.policy_loss_shard_sums_cuda(target, *arguments, 96 * KiB, *workspace)


def backward(target=(0, 0), *, rows=3, numel=600, dtypes=None, forms=None, grad=None, grad_uncond=None, log_prob=None):
    if dtypes is None:
        dtypes = ("bfloat16", None, *("float32",) * 2, None, None) if forms else ("float32", *(None,) * 5)
    grad_loss = 16 * KiB, "float32", 1, 1
    gradients = grad, grad_uncond
    _native.policy_loss_backward_cuda(
        target, arrays_at(dtypes), forms, grad_loss, 48 * KiB, rows, numel, gradients, log_prob
    )


def refused(kind: type, call, *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


# ---- images ----------------------------------------------------------------------------------------------------------


def image(wanted: str) -> None:
    driver = Driver()
    forward()
    forward()
    log = driver.log()
    assert log[:2] == ["retain 0", f"load {wanted}"], log
    assert [line.split()[0] for line in log[2:]] == ["launch", "launch"], log


def no_image() -> None:
    Driver()
    refused(RuntimeError, forward, "cuda:0", "compute capability 7.5", "flowdppo_ops.reference")


def every_entry_point() -> None:
    """All kernels that the launcher names are in the image, with parameters of its size."""
    driver, seen = Driver(), {}
    f32, bf16, f16 = "float32", "bfloat16", "float16"
    # Outputs, samples, and the old and the reference policy.
    mixes = [(f32, f32, f32), (bf16, bf16, bf16), (f16, f16, f16), (bf16, f32, f32)]
    means = [(f32, bf16, bf16), (f32, f16, f16)]
    steps = [(bf16, f32, bf16), (bf16, f32, f16), (f32, f32, f16)]
    for schedule, forms, more in ((None, None, means), (SCHEDULE, SCHEDULE[1:3], steps)):
        for outputs, samples, policies in mixes + more:
            dtypes = (outputs, None, samples if schedule else None, samples, policies, policies)
            forward(dtypes=dtypes, schedule=schedule)
            backward(dtypes=dtypes, forms=forms, grad=(1 << 24, outputs))
    for launch in driver.launches():
        seen[launch.name] = len(bytes(launch.parameters))
    two_kernels = ("policy_loss_forward_", "policy_loss_backward_")
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith(two_kernels)}


# ---- arguments -------------------------------------------------------------------------------------------------------


def forward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    vectors = (
        (1 * KiB, "bfloat16", 1, 6),
        (2 * KiB, "float32", 1, 6),
        (3 * KiB, "float16", 1, 6),
        1.5,
        (4 * KiB, "float64", 1, 1),
        (5 * KiB, "float32", 1, 3),
        (6 * KiB, "float32", 3, 2),
    )
    forward(
        (0, stream),
        rows=6,
        numel=10_000,
        dtypes=("float16", None, None, "bfloat16", "float32", "float16"),
        vectors=vectors,
        objective=GRPOGuard(clip_range=(0.125, 0.25), adv_clip_max=3.0, per_row_scale=True),
        options=("cps", "sum", "kept_mean", 0.75),
    )
    (launch,) = driver.launches()
    splits = 3  # parts of at least 4096 elements
    assert (launch.name, launch.blocks, launch.threads) == ("policy_loss_forward_mixed", 6 * splits, 256)
    assert launch.stream == stream
    # address, value, dtype, present, divide, modulo, pad
    rows = (1 * KiB, 0.0, 1, 1, 1, 6, 0), (2 * KiB, 0.0, 0, 1, 1, 6, 0), (3 * KiB, 0.0, 2, 1, 1, 6, 0)
    rows += (0, 1.5, 0, 1, 1, 1, 0), (4 * KiB, 0.0, 3, 1, 1, 1, 0)
    rows += (5 * KiB, 0.0, 0, 1, 1, 3, 0), (6 * KiB, 0.0, 0, 1, 3, 2, 0)
    no_schedule = *(ABSENT,) * 5, 0, 0
    problem = (6, 10_000, 0.125, 0.25, 2, 1, 1, 3, 0, 0, 0, 1, 1, 1, 0, 0, 3.0, 0.75, *rows, no_schedule)
    nothing = 0, 0, 0
    latents = (1 << 20, 2, 0), nothing, nothing, (4 << 20, 1, 0), (5 << 20, 0, 0), (6 << 20, 2, 0)
    wanted = (latents, problem, 32 * KiB, 48 * KiB, 64 * KiB, 80 * KiB, 0, splits, 0)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()


ABSENT = 0, 0.0, 0, 0, 1, 1, 0


def step_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    schedule = (
        "cps",
        "residual",
        "output",
        (1 * KiB, "float32", 1, 3),
        (2 * KiB, "float64", 3, 2),
        0.75,
        (3 * KiB, "bfloat16", 1, 6),
        (4 * KiB, "float16", 1, 1),
    )
    options = {
        "rows": 6,
        "numel": 10_000,
        "dtypes": ("bfloat16", "bfloat16", "float32", "float32", "float16", "float16"),
        "schedule": schedule,
    }
    objective = FlowDPPO(kl_mask_threshold=0.5, kl_space="velocity", mask="symmetric", nan_kl="keep")
    forward((0, stream), **options, objective=objective, options=("cps", "mean", "none", 0.75))
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.stream) == ("policy_loss_forward_step_bf16_f32_f16", 18, stream)
    at = {1: (1 << 20, 1, 0), 2: (2 << 20, 1, 0), 3: (3 << 20, 0, 0), 4: (4 << 20, 0, 0)}
    latents = *at.values(), (5 << 20, 2, 0), (6 << 20, 2, 0)
    rows = (16 * KiB, 0.0, 0, 1, 1, 6, 0), *(ABSENT,) * 6
    steps = (1 * KiB, 0.0, 0, 1, 1, 3, 0), (2 * KiB, 0.0, 3, 1, 3, 2, 0), (0, 0.75, 0, 1, 1, 1, 0)
    steps += (3 * KiB, 0.0, 1, 1, 1, 6, 0), (4 * KiB, 0.0, 2, 1, 1, 1, 0), 3, 0
    problem = (6, 10_000, 0.5, 0.0, 0, 1, 0, 2, 1, 2, 1, 0, 1, 1, 2, 1, math.inf, 0.75, *rows, steps)
    wanted = (latents, problem, 32 * KiB, 48 * KiB, 64 * KiB, 80 * KiB, 0, 3, 0)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()
    # Every sampler and form has its number.
    for number, sampler in enumerate(("flow_sde", "dance_sde", "cps")):
        forward(schedule=(sampler, *SCHEDULE[1:]))
        assert driver.launches()[0].parameters.problem.schedule.sampler == 1 + number
    for number, form in enumerate(("mean", "output", "residual")):
        forward(schedule=("cps", form, *SCHEDULE[2:]))
        assert driver.launches()[0].parameters.problem.old_form == number
        backward(forms=(form, "output"), grad=(1 << 24, "bfloat16"))
        parameters = driver.launches()[0].parameters
        assert (parameters.old_form, parameters.ref_form) == (number, 1)


def shards() -> None:
    """Two launches with a sum between them: the first has no outputs but the sums, the second reads no latents."""
    driver = Driver()
    for schedule, suffix in ((None, "f32"), (SCHEDULE, "step_bf16_f32_f16")):
        shard_sums(numel=10_000, schedule=schedule)
        forward(numel=10_000, schedule=schedule, shard_sums=96 * KiB)
        first, second = driver.launches()
        assert first.name == second.name == f"policy_loss_forward_{suffix}"
        mine = first.parameters
        assert (first.blocks, mine.splits, mine.stage) == (9, 3, 1)
        assert (mine.loss, mine.numbers, mine.row_sums) == (0, 0, 96 * KiB)
        mine = second.parameters
        assert (second.blocks, mine.splits, mine.stage) == (1, 0, 2)
        assert (mine.loss, mine.numbers, mine.row_sums) == (32 * KiB, 48 * KiB, 96 * KiB)
    refused(
        ValueError, lambda: shard_sums(numel=10_000, partials=(64 * KiB, 35)), "partials has 35 elements, wanted 36"
    )
    # The objective alone has a warp for every row, and GRPO-Guard its sums to wait for.
    guard = {"objective": GRPOGuard(), "shard_sums": 96 * KiB, "numel": 10_000}
    refused(ValueError, lambda: forward(**guard, partials=(64 * KiB, 11)), "partials has 11 elements, wanted 12")


def objectives() -> None:
    """Each option in its own field, and what is absent marked so."""
    driver = Driver()
    for objective, changes in {
        FlowDPPO(): {"low": 1e-5, "mask": 0},
        FlowDPPO(kl_mask_threshold=math.inf, mask="symmetric"): {"low": math.inf, "mask": 1},
        FlowDPPO(mask="none", normalize_kl=False): {"low": 1e-5, "mask": 2, "kl_divisor": 1},
        FlowDPPO(nan_kl="keep"): {"low": 1e-5, "keep_nan_kl": 1},
        FlowGRPO(clip_range=(0.25, 0.5)): {"objective": 1, "low": 0.25, "high": 0.5},
        FlowGRPO(adv_clip_max=2.0): {"objective": 1, "low": 1e-4, "high": 1e-4, "adv_clip_max": 2.0},
        GRPOGuard(): {"objective": 2, "low": 2e-6, "high": 2e-6},
    }.items():
        forward(objective=objective)
        (launch,) = driver.launches()
        problem = launch.parameters.problem
        wanted = {"objective": 0, "high": 0.0, "adv_clip_max": math.inf, "kl_divisor": 0} | changes
        for name, value in wanted.items():
            came = getattr(problem, name)
            assert math.isclose(came, value, rel_tol=1e-7), (objective, name, came)
        assert [v.present for v in (problem.log_prob, problem.old_log_prob, problem.weights)] == [0, 0, 0]
        # Without a ref_std of its own the reference term takes std.
        assert problem.std.as_tuple() == problem.ref_std.as_tuple() == (0, 0.5, 0, 1, 1, 1, 0)
        assert launch.parameters.latents.ref.data == 0
        assert problem.has_ref == 0
    for at, reduction in enumerate(("mean", "sum", "none", "kept_mean")):
        forward(options=("gaussian", "mean", reduction, 0.0))
        assert driver.launches()[0].parameters.problem.reduction == at


def backward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    nothing = 0, 0, 0
    log_prob = 8 * KiB, "float32"
    dtypes = ("float32", None, None, "bfloat16", None, None)
    backward((0, stream), rows=2, numel=8192, dtypes=dtypes, grad=(7 << 20, "float32"), log_prob=log_prob)
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.threads) == ("policy_loss_backward_f32_bf16", 4, 256)
    assert launch.stream == stream
    scalar = 16 * KiB, 0.0, 0, 1, 1, 1, 0
    latents = (1 << 20, 0, 0), nothing, nothing, (4 << 20, 1, 0), nothing, nothing
    wanted = (latents, scalar, 48 * KiB, 7 << 20, 0, 8 * KiB, 0, 0, 2, 0, 2, 8192)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()
    # Log-probs alone: a thread a row.
    backward(rows=1000, numel=0, dtypes=(None,) * 6, log_prob=log_prob)
    (launch,) = driver.launches()
    assert (launch.blocks, launch.parameters.splits, launch.parameters.grad_output) == (4, 0, 0)
    # With guidance either gradient, or both.
    dtypes = ("bfloat16", "bfloat16", "float32", "float32", None, None)
    both = (7 << 20, "bfloat16"), (8 << 20, "bfloat16")
    for grad, grad_uncond in (both, (both[0], None), (None, both[1])):
        options = {"forms": ("output", "mean"), "grad": grad, "grad_uncond": grad_uncond}
        backward(rows=2, numel=8192, dtypes=dtypes, **options)
        (launch,) = driver.launches()
        assert (launch.name, launch.blocks) == ("policy_loss_backward_step_bf16_f32", 4)
        addresses = [0 if gradient is None else gradient[0] for gradient in (grad, grad_uncond)]
        assert [launch.parameters.grad_output, launch.parameters.grad_uncond] == addresses


def grids() -> None:
    """Blocks stay within a grid and cover the rows; splits and grid belong together."""
    driver = Driver()
    several = 16 * MULTIPROCESSORS
    for rows, numel, splits in (
        (1, 1, 0),
        (1_000_000, 1, 0),
        (1_000_000, 512, 0),
        (1_000_000, 513, 1),
        (1, 4096, 1),
        (1, 4097, 2),
        (16, 65_536, several // 16),
        (3, 1 << 33, math.ceil(several / 3)),
    ):
        needed, capturing = _native.policy_loss_workspace_cuda((0, 0), rows, numel, False)
        assert (needed, capturing) == (rows * splits * 4 if splits > 1 else 0, False)
        forward(rows=rows, numel=numel, partials=(64 * KiB, needed))
        (launch,) = driver.launches()
        blocks = rows * splits if splits else math.ceil(rows / 8)
        assert (launch.blocks, launch.parameters.splits) == (blocks, splits), (rows, numel, launch.blocks)
        assert (launch.parameters.problem.rows, launch.parameters.problem.numel) == (rows, numel)
    # GRPO-Guard keeps every row's sums until all are there.
    assert _native.policy_loss_workspace_cuda((0, 0), 7, 100, True) == (28, False)
    refused(RuntimeError, lambda: forward(rows=1 << 31, numel=600), "2147483648 rows", "grid")


def bad_arguments() -> None:
    """Refused before the driver is asked for anything."""
    driver = Driver()
    f32 = "float32"
    means = ("prev_sample_mean", None, None, "prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean")
    outputs = ("model_output", "uncond_output", "sample", "prev_sample", "old_residual", "ref_model_output")
    schedule = ("cps", "residual", "output", *SCHEDULE[3:-1], 2.0)
    for given, names in ((None, means), (schedule, outputs)):
        for at, name in enumerate(names):
            dtypes = [f32 if name else None for name in names]
            dtypes[at] = "float64"
            call = partial(forward, dtypes=dtypes, schedule=given)
            if name is not None:
                refused(TypeError, call, f"{name} has dtype float64", "CPU")
    for at, name in ((1, "log_prob"), (2, "old_log_prob")):
        vectors = [(16 * KiB, f32, 1, 3), (1 * KiB, f32, 1, 3), (2 * KiB, f32, 1, 3), None, 0.5, None, None]
        vectors[at] = (8 * KiB, "float64", 1, 3)
        refused(TypeError, lambda vectors=tuple(vectors): forward(vectors=vectors), f"{name} has dtype float64")
    refused(ValueError, lambda: forward(tickets=(80 * KiB, 3)), "tickets has 3 elements, wanted 4")
    refused(ValueError, lambda: forward(numel=10_000, partials=(64 * KiB, 35)), "partials has 35 elements, wanted 36")
    refused(ValueError, lambda: forward(tickets=(0, 4)), "tickets has 4 elements and no memory")
    refused(ValueError, lambda: backward(grad=(2, f32)), "grad_output is at address 0x2")
    refused(ValueError, lambda: backward(dtypes=(None,) * 6, grad=(1 << 20, f32)), "prev_sample_mean is missing")
    refused(TypeError, lambda: backward(grad=(1 << 24, "float16")), "grad_output has dtype float16, wanted float32")
    step = {"dtypes": ("bfloat16", "float16", *(f32,) * 4), "forms": ("mean", "mean")}
    wrong = {"grad": (1 << 24, "bfloat16"), "grad_uncond": (1 << 25, "bfloat16")}
    refused(TypeError, lambda: backward(**step, **wrong), "grad_uncond_output has dtype bfloat16, wanted float16")
    step["dtypes"] = ("bfloat16", None, *(f32,) * 4)
    refused(ValueError, lambda: backward(**step, **wrong), "uncond_output is missing")
    refused(ValueError, lambda: forward(schedule=schedule), "uncond_output or guidance_scale is missing")
    refused(ValueError, lambda: forward(schedule=("ddim", *SCHEDULE[1:])), 'sampler is "ddim"')
    refused(ValueError, lambda: forward(schedule=("cps", "velocity", *SCHEDULE[2:])), 'old_form is "velocity"')
    assert driver.launches() == []


# ---- contexts, streams, captures, threads ----------------------------------------------------------------------------


def current_context_is_restored() -> None:
    driver = Driver()
    for before in (None, driver.context(1), driver.context(0)):
        for target in ((0, 0), (1, 0)):
            driver.current = before
            forward(target)
            backward(target, grad=(1 << 24, "float32"))
            assert driver.current == before
            driver.fail("cuLaunchKernel", 700)
            refused(RuntimeError, lambda target=target: forward(target), "cuLaunchKernel")
            driver.fail("cuLaunchKernel", 0)
            assert driver.current == before


def a_stream_of_another_device_is_an_error() -> None:
    driver = Driver()
    refused(RuntimeError, lambda: forward((0, driver.stream(1))), "CUDA_ERROR_INVALID_HANDLE")


def first_call_inside_a_capture() -> None:
    driver = Driver()
    stream, other = driver.stream(), driver.stream()
    driver.capture(stream, True)
    assert _native.policy_loss_workspace_cuda((0, stream), 3, 600, False) == (0, True)
    assert _native.policy_loss_workspace_cuda((0, other), 3, 600, False) == (0, False)
    assert _native.policy_loss_workspace_cuda((0, 0), 3, 600, False) == (0, False)
    forward((0, stream))
    assert driver.capture_mode() == 0
    assert len(driver.launches()) == 1


def two_devices_and_many_threads() -> None:
    """Every device's module is loaded once, whoever comes first; launches go where they were sent."""
    driver = Driver()
    streams = [driver.stream(0), driver.stream(1)]
    start, failures = threading.Barrier(8), []

    def work(device: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                forward((device, streams[device]))
            assert driver.current is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    log = driver.log()
    assert sorted(line for line in log if line.startswith("retain")) == ["retain 0", "retain 1"]
    assert sorted(line for line in log if line.startswith("load")) == ["load sm_80", "load sm_90"]
    launched = [line for line in log if line.startswith("launch")]
    assert [sum(f"stream {hex(stream)} " in line for line in launched) for stream in streams] == [80, 80]


# ---- failures --------------------------------------------------------------------------------------------------------


def driver_errors() -> None:
    """A failure of any call is a RuntimeError that names the call and the driver's reason; the next call works."""
    driver = Driver()
    calls = ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent")
    calls += ("cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction")
    calls += ("cuFuncGetAttribute", "cuLaunchKernel")
    for call in calls:
        driver.fail(call, 1)
        facts = call, "CUDA_ERROR_INVALID_VALUE", "what the driver says about it", "flowdppo_ops.reference"
        refused(RuntimeError, forward, *facts)
        driver.fail(call, 0)
        assert (driver.current, driver.capture_mode(), driver.launches()) == (None, 0, [])
    driver.fail("cuStreamIsCapturing", 1)
    target = 0, driver.stream()
    refused(RuntimeError, lambda: _native.policy_loss_workspace_cuda(target, 3, 600, False), "cuStreamIsCapturing")
    forward()
    assert len(driver.launches()) == 1


def no_such_device() -> None:
    Driver()
    refused(RuntimeError, lambda: forward((1, 0)), "cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE")
    refused(RuntimeError, lambda: forward((64, 0)), "cuda:64")


def no_driver() -> None:
    for call in (forward, lambda: backward(grad=(1 << 24, "float32"))):
        refused(RuntimeError, call, "no NVIDIA driver", "libcuda.so.1", "flowdppo_ops.reference")


if __name__ == "__main__":
    name, *arguments = sys.argv[1].split(":")
    globals()[name](*arguments)
