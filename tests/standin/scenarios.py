"""What happens in a process with the stand-in driver: one function each, run by `harness.run` by name.

Where no kernel runs, addresses are made up: the launcher passes them on and must not follow them.
"""

from __future__ import annotations

import math
import sys
import threading
from itertools import product

import pytest

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, _native
from standin.harness import Driver

KiB = 1024
OPTIONS = ("gaussian", "mean", "mean", 0.0)
MULTIPROCESSORS = 4  # of the stand-in's devices


def forward(
    target=(0, 0),
    *,
    rows=3,
    numel=600,
    dtypes=("float32", "float32", "float32", None),
    vectors=None,
    objective=None,
    options=OPTIONS,
    partials=None,
    tickets=None,
):
    """A forward at made-up addresses: the latents at 1, 2, 3, 4 MiB."""
    arrays = tuple(None if dtype is None else ((1 + i) << 20, dtype) for i, dtype in enumerate(dtypes))
    vectors = vectors or ((16 * KiB, "float32", 1, rows), None, None, None, 0.5, 0.25, None)
    objective = (objective or FlowDPPO())._native
    out = 32 * KiB, 48 * KiB
    partials = partials or (64 * KiB, 1 << 20)
    _native.policy_loss_forward_cuda(
        target, arrays, vectors, rows, numel, objective, options, out, partials, tickets or (80 * KiB, rows + 1)
    )


def backward(target=(0, 0), *, rows=3, numel=600, dtypes=("float32", "float32", None, None), grad=None, log_prob=None):
    arrays = tuple(None if dtype is None else ((1 + i) << 20, dtype) for i, dtype in enumerate(dtypes))
    _native.policy_loss_backward_cuda(
        target, arrays, (16 * KiB, "float32", 1, 1), 48 * KiB, rows, numel, grad, log_prob
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
    mixes = [("float32",) * 4, ("bfloat16",) * 4, ("float16",) * 4]
    mixes += [("float32", *("bfloat16",) * 3), ("float32", *("float16",) * 3), ("bfloat16", *("float32",) * 3)]
    for dtypes in mixes:
        forward(dtypes=dtypes)
        backward(dtypes=dtypes, grad=(1 << 24, dtypes[0]))
    for launch in driver.launches():
        seen[launch.name] = len(bytes(launch.parameters))
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith("policy_loss")}


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
        dtypes=("float16", "bfloat16", "float32", "float16"),
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
    problem = (6, 10_000, 0.125, 0.25, 2, 1, 1, 3, 0, 1, 0, 1, 1, 1, 3.0, 0.75, *rows)
    latents = (1 << 20, 2, 0), (2 << 20, 1, 0), (3 << 20, 0, 0), (4 << 20, 2, 0)
    wanted = (*latents, problem, 32 * KiB, 48 * KiB, 64 * KiB, 80 * KiB, splits, 0)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()


def objectives() -> None:
    """Each option in its own field, and what is absent marked so."""
    driver = Driver()
    for objective, changes in {
        FlowDPPO(): {"low": 1e-5, "mask": 0},
        FlowDPPO(kl_mask_threshold=math.inf, mask="symmetric"): {"low": math.inf, "mask": 1},
        FlowDPPO(mask="none", normalize_kl=False): {"low": 1e-5, "mask": 2, "normalize_kl": 0},
        FlowDPPO(nan_kl="keep"): {"low": 1e-5, "keep_nan_kl": 1},
        FlowGRPO(clip_range=(0.25, 0.5)): {"objective": 1, "low": 0.25, "high": 0.5},
        FlowGRPO(adv_clip_max=2.0): {"objective": 1, "low": 1e-4, "high": 1e-4, "adv_clip_max": 2.0},
        GRPOGuard(): {"objective": 2, "low": 2e-6, "high": 2e-6},
    }.items():
        forward(objective=objective)
        (launch,) = driver.launches()
        problem = launch.parameters.problem
        wanted = {"objective": 0, "high": 0.0, "adv_clip_max": math.inf, "normalize_kl": 1} | changes
        for name, value in wanted.items():
            came = getattr(problem, name)
            assert math.isclose(came, value, rel_tol=1e-7), (objective, name, came)
        assert [v.present for v in (problem.log_prob, problem.old_log_prob, problem.weights)] == [0, 0, 0]
        # Without a ref_std of its own the reference term takes std.
        assert problem.std.as_tuple() == problem.ref_std.as_tuple() == (0, 0.5, 0, 1, 1, 1, 0)
        assert launch.parameters.ref.data == 0
        assert problem.has_ref == 0
    for at, reduction in enumerate(("mean", "sum", "none", "kept_mean")):
        forward(options=("gaussian", "mean", reduction, 0.0))
        assert driver.launches()[0].parameters.problem.reduction == at


def backward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    latents = (1 << 20, 0, 0), (2 << 20, 1, 0), (0, 0, 0), (0, 0, 0)
    dtypes = ("float32", "bfloat16", None, None)
    backward((0, stream), rows=2, numel=8192, dtypes=dtypes, grad=(7 << 20, "float32"), log_prob=(8 * KiB, "float32"))
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.threads) == ("policy_loss_backward_f32_bf16", 4, 256)
    assert launch.stream == stream
    scalar = 16 * KiB, 0.0, 0, 1, 1, 1, 0
    wanted = (*latents, scalar, 48 * KiB, 7 << 20, 0, 2, 8 * KiB, 2, 8192)
    assert launch.parameters.as_tuple() == wanted, launch.parameters.as_tuple()
    # Log-probs alone: a thread a row.
    backward(rows=1000, numel=0, dtypes=(None,) * 4, log_prob=(8 * KiB, "float32"))
    (launch,) = driver.launches()
    assert (launch.blocks, launch.parameters.splits, launch.parameters.grad_mean) == (4, 0, 0)


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
    for dtypes, name in (
        (("float64", f32, f32, None), "prev_sample_mean"),
        ((f32, "float64", f32, None), "prev_sample"),
        ((f32, f32, "float64", None), "old_prev_sample_mean"),
        ((f32, f32, f32, "float64"), "ref_prev_sample_mean"),
    ):
        refused(TypeError, lambda dtypes=dtypes: forward(dtypes=dtypes), f"{name} has dtype float64", "CPU")
    for at, name in ((1, "log_prob"), (2, "old_log_prob")):
        vectors = [(16 * KiB, f32, 1, 3), (1 * KiB, f32, 1, 3), (2 * KiB, f32, 1, 3), None, 0.5, None, None]
        vectors[at] = (8 * KiB, "float64", 1, 3)
        refused(TypeError, lambda vectors=tuple(vectors): forward(vectors=vectors), f"{name} has dtype float64")
    refused(ValueError, lambda: forward(tickets=(80 * KiB, 3)), "tickets has 3 elements, wanted 4")
    refused(ValueError, lambda: forward(numel=10_000, partials=(64 * KiB, 35)), "partials has 35 elements, wanted 36")
    refused(ValueError, lambda: forward(tickets=(0, 4)), "tickets has 4 elements and no memory")
    refused(ValueError, lambda: backward(grad=(2, f32)), "grad_mean is at address 0x2")
    refused(ValueError, lambda: backward(dtypes=(None,) * 4, grad=(1 << 20, f32)), "prev_sample_mean is missing")
    refused(TypeError, lambda: backward(grad=(1 << 24, "float16")), "grad_mean has dtype float16, wanted float32")
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


# ---- from `flowdppo_ops.loss` on, with emulated kernels ------------------------------------------------------------


def on_gpu(device: int = 0, stream: int = 0):
    """Sends CPU tensors along the road of CUDA tensors: to the stand-in, the host's memory is a device's."""
    from flowdppo_ops import _cuda

    _cuda.target = lambda tensor: (device, stream)
    return _cuda


def parity() -> None:
    """The results of `loss` are within the suite's tolerance, and the masks the same; the workspace is as it was."""
    driver, cuda = Driver(), on_gpu()
    from cases import DTYPES, OBJECTIVES, VARIANTS, draw, mask_cells
    from parity import equal_bits, run, three_way

    from flowdppo_ops import loss

    sources, reductions = ("sample", "sample and old", "log_prob"), ("mean", "sum", "none", "kept_mean")
    calls = []
    for number, (objective, source, reduction) in enumerate(product(OBJECTIVES.values(), sources, reductions)):
        options = {"weights": True, "ref_kl_weight": 0.5 * (number % 2)}
        calls.append({"objective": objective, "source": source, "reduction": reduction, **options})
    calls += [{"objective": objective} for objective in VARIANTS.values()]
    calls += [{"dtypes": dtypes, "ref_kl_weight": 0.5} for name, dtypes in DTYPES.items() if "float64" not in name]
    calls += [{"objective": o, "density": "cps", "latent_reduction": "sum"} for o in OBJECTIVES.values()]
    # A warp per row, one block per row, several; remainders of the vectors.
    calls += [{"latent_shape": (numel,)} for numel in (1, 7, 512, 513, 4096, 4097, 65_543)]
    for call in calls:
        three_way(loss, draw(**call))
    alone = draw(source="log_prob", objective=OBJECTIVES["grpo"])
    three_way(loss, alone | {"prev_sample_mean": None, "old_prev_sample_mean": None, "std": None})
    arguments, keep = mask_cells(1000)
    assert (run(loss, arguments)["keep"] == keep).all()
    arguments = draw(latent_shape=(65_543,))
    equal_bits(run(loss, arguments), run(loss, arguments))

    assert len(driver.launches()) == 2 * (len(calls) + 4)  # a forward and a backward each
    assert list(cuda._tickets) == [(0, 0)]
    assert not cuda._tickets[0, 0].any()


def clip_limits() -> None:
    """1 - 0.09 rounded to float32 is not 1 - float32(0.09) rounded: ratios there are kept or not as on the CPU."""
    Driver()
    cuda = on_gpu()
    import torch

    from flowdppo_ops import loss

    low, high = 0.09, 0.18
    limits = torch.tensor([[1 - low], [1 + high]], dtype=torch.float64).log().float()
    log_prob = (limits + torch.arange(-64, 64) * 2.0**-27).flatten()  # steps of an eighth of the ratio's ulp
    advantages = torch.tensor([-1.0, 1.0]).repeat_interleave(128)
    arguments = {"log_prob": log_prob, "old_log_prob": torch.zeros(256)}
    keep = []
    for target in (cuda.target, lambda tensor: None):
        cuda.target = target
        keep.append(loss(None, None, advantages, **arguments, objective=FlowGRPO(clip_range=(low, high))).keep)
    assert torch.equal(*keep), (keep[0] != keep[1]).nonzero()
    assert all(0 < side.sum() < 128 for side in keep[0].view(2, 128))


def kept_tickets() -> None:
    """Kept per stream and grown; never those of a capture, nor of a call through the dispatcher."""
    driver = Driver()
    stream = driver.stream()
    cuda = on_gpu(0, stream)
    import torch
    from cases import draw
    from torch.utils._python_dispatch import TorchDispatchMode

    from flowdppo_ops import loss

    used = []
    forward = _native.policy_loss_forward_cuda

    def watched(*arguments):
        used.append(arguments[-1])
        forward(*arguments)

    _native.policy_loss_forward_cuda = watched

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def call(rows: int = 4) -> None:
        loss(**draw((rows,), (6,)))

    call()
    call()
    kept = cuda._tickets[0, stream]
    assert used == [(kept.data_ptr(), 1024)] * 2
    assert kept.dtype == torch.int32

    driver.capture(stream, True)
    call()
    driver.capture(stream, False)
    with Watching():
        call()
    for address, length in used[2:]:
        assert (address != kept.data_ptr(), length) == (True, 5)
    assert next(iter(cuda._tickets.values())) is kept

    for rows, length in ((1023, 1024), (1024, 2048), (5, 2048)):
        call(rows)
        assert used[-1][1] == length
    cuda.target = lambda tensor: (0, 0)
    call()
    assert set(cuda._tickets) == {(0, stream), (0, 0)}
    assert cuda._tickets[0, 0].data_ptr() != cuda._tickets[0, stream].data_ptr()


def float64_from_python() -> None:
    Driver()
    on_gpu()
    from cases import DTYPES, draw

    from flowdppo_ops import loss

    for source, name in (("sample", "prev_sample"), ("log_prob", "log_prob")):
        arguments = draw(dtypes=DTYPES["one float64 latent"], source=source)
        refused(TypeError, lambda arguments=arguments: loss(**arguments), f"{name} has dtype float64", "GPU")
    # Row vectors may be.
    import torch

    arguments = draw()
    loss(**(arguments | {"std": arguments["std"].to(torch.float64), "weights": torch.ones(12, dtype=torch.float64)}))


if __name__ == "__main__":
    name, *arguments = sys.argv[1].split(":")
    globals()[name](*arguments)
