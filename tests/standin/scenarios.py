"""What happens in a process with the stand-in driver: one function each, run by `harness.run` by name.

No kernel runs here: tensors are address space, which the launcher passes on and must not follow.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import pytest
import torch
from launch_arguments import Structure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, _native, loss
from flowdppo_ops.policy_loss import _loss
from standin.gpu import memory, on_gpu, without_memory
from standin.harness import Driver

MULTIPROCESSORS = 4  # of the stand-in's devices
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {F32: 0, BF16: 1, F16: 2, F64: 3}
SETTINGS = {
    "sampler": "none",
    "density": "gaussian",
    "latent_reduction": "mean",
    "reduction": "mean",
    "ref_kl_weight": 0.0,
}

# Dtypes of latents: of outputs, samples, and the old and the reference policy.
MEANS = {"prev_sample_mean": F32, "prev_sample": F32, "old_prev_sample_mean": F32}
STEP = {"model_output": BF16, "sample": F32, "prev_sample": F32, "old_residual": F16}
# Over means every row has a std; a schedule has it in itself.
VECTORS = {"std": 0.5, "sqrt_dt": 0.25}
SCHEDULE = {"sigma": 0.75, "sigma_next": 0.5, "noise_level": 0.7, "sigma_max": 0.99}


def call(
    rows: tuple[int, ...] = (3,),
    numel: int = 600,
    dtypes: dict[str, torch.dtype] = MEANS,
    *,
    objective: Any = None,
    vectors: dict[str, Any] | None = None,
    **settings: Any,
) -> _native.PolicyLossCall:
    """A call of `loss`, or of `step_loss` where there is a `model_output`."""
    is_step = "model_output" in dtypes
    fields = {name: memory(*rows, numel, dtype=dtype) for name, dtype in dtypes.items()}
    fields |= {"advantages": memory(*rows)} | (SCHEDULE if is_step else VECTORS) | (vectors or {})
    given = SETTINGS | {"sampler": "flow_sde" if is_step else "none"} | (objective or FlowDPPO())._settings | settings
    made = _native.PolicyLossCall(fields, given)
    FIELDS.clear()
    FIELDS.update(fields)
    return made


FIELDS: dict[str, Any] = {}  # of the latest call


def forward(*given: Any, **options: Any) -> _native.PolicyLossCall:
    made = call(*given, **options)
    _loss.memo.run(made)
    return made


def backward(
    rows: int = 3,
    numel: int = 600,
    dtypes: dict[str, torch.dtype] | None = None,
    wants: tuple[bool, bool, bool] = (True, False, False),
) -> list[Tensor | None]:
    dtypes = {"prev_sample_mean": F32, "prev_sample": F32} if dtypes is None else dtypes
    latents = {name: memory(rows, numel, dtype=dtype) for name, dtype in dtypes.items()}
    count = _native.STEP_FIELDS if "model_output" in dtypes else _native.FIELDS
    given = {"grad_loss": memory(), "numbers": memory(rows * count + _native.BATCH_LEN)}
    FIELDS.clear()
    FIELDS.update(latents | given)
    return _native.policy_loss_backward(*given.values(), latents, wants, None)


def refused(kind: type, call, *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def holds(struct: Structure, fields: dict[str, Any], **strides: tuple[int, int]) -> None:
    """The latents or the row vectors of a call are those of `fields`, and no others. `strides`: of tensors of rows."""
    for name, _ in struct._fields_:
        value, came = fields.get(name), getattr(struct, name).as_tuple()
        if not isinstance(value, Tensor):
            wanted = (0,) * len(came)
            if value is not None:
                wanted = (0, value, 0, 1, 0, 0)
        elif len(came) == 3:
            wanted = (value.data_ptr(), DTYPES[value.dtype], 0)
        else:
            wanted = (value.data_ptr(), 0.0, DTYPES[value.dtype], 1, *strides[name])
        assert came == wanted, f"{name}: {came}, wanted {wanted}"


# ---- images ----------------------------------------------------------------------------------------------------------


def image(wanted: str) -> None:
    driver, _ = Driver(), on_gpu()
    forward()
    forward()
    log = driver.log()
    assert log[:2] == ["retain 0", f"load {wanted}"], log
    assert [line.split()[0] for line in log[2:]] == ["launch", "launch"], log


def no_image() -> None:
    Driver()
    on_gpu()
    refused(RuntimeError, forward, "cuda:0", "compute capability 7.5", "flowdppo_ops.reference")


def every_entry_point() -> None:
    """All kernels that the launcher names are in the image, with parameters of its size."""
    driver, seen = Driver(), {}
    on_gpu()
    # Outputs, samples, and the old and the reference policy.
    mixes = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F32)]
    means = [(F32, BF16, BF16), (F32, F16, F16)]
    steps = [(BF16, F32, BF16), (BF16, F32, F16), (F32, F32, F16)]
    for is_step, more in ((False, means), (True, steps)):
        for outputs, samples, policies in mixes + more:
            if is_step:
                dtypes = {"model_output": outputs, "sample": samples}
                others = {"old_residual": policies, "ref_model_output": policies}
            else:
                dtypes = {"prev_sample_mean": outputs}
                others = {"old_prev_sample_mean": policies, "ref_prev_sample_mean": policies}
            dtypes |= {"prev_sample": samples} | others
            forward(dtypes=dtypes)
            backward(dtypes=dtypes)
    for launch in driver.launches():
        seen[launch.name] = len(bytes(launch.parameters))
    two_kernels = ("policy_loss_forward_", "policy_loss_backward_")
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith(two_kernels)}


# ---- arguments -------------------------------------------------------------------------------------------------------


def forward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    gpu, made = on_gpu(0, stream), without_memory()
    rows = 2, 3
    vectors = {
        "advantages": memory(*rows, dtype=BF16),
        "log_prob": memory(*rows),
        "old_log_prob": memory(*rows, dtype=F16),
        "weights": 1.5,
        "std": memory(1, 1, dtype=F64),
        "sqrt_dt": memory(1, 3),
        "ref_std": memory(2, 1),
    }
    dtypes = {"prev_sample_mean": F16, "prev_sample": BF16, "old_prev_sample_mean": F32, "ref_prev_sample_mean": F16}
    guard = GRPOGuard(clip_range=(0.125, 0.25), adv_clip_max=3.0, per_row_scale=True)
    options = {"density": "cps", "latent_reduction": "sum", "reduction": "kept_mean", "ref_kl_weight": 0.7}
    forward(rows, 10_000, dtypes, objective=guard, vectors=vectors, **options)
    (launch,) = driver.launches()
    splits = 3  # parts of at least 4096 elements
    assert (launch.name, launch.blocks, launch.threads) == ("policy_loss_forward_mixed", 6 * splits, 256)
    assert launch.stream == stream
    mine, argument = launch.parameters, launch.parameters.call
    whole = (1, 6)
    strides = {"advantages": whole, "log_prob": whole, "old_log_prob": whole}
    strides |= {"std": (1, 1), "sqrt_dt": (1, 3), "ref_std": (3, 2)}
    holds(argument.latents, FIELDS)
    holds(argument.vectors, FIELDS, **strides)
    holds(argument.schedule, {})
    assert (argument.rows, argument.numel) == (6, 10_000)
    assert argument.objective.as_tuple() == (0.0, 0.125, 0.25, 3.0, 2, 2, 0, 0, 1, 0)
    assert argument.settings.as_tuple() == (0.7, 0, 1, 1, 3)
    loss, numbers, partials = made
    assert [mine.loss, mine.numbers, mine.partials] == [tensor.data_ptr() for tensor in made]
    assert (loss.shape, numbers.numel(), partials.numel()) == ((), 6 * _native.FIELDS + _native.BATCH_LEN, 6 * 3 * 4)
    assert (mine.tickets, mine.row_sums) == (gpu.tickets[0].data_ptr(), 0)
    assert (mine.splits, mine.stage) == (splits, 0)


def step_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    on_gpu(0, stream)
    rows = 2, 3
    vectors = {
        "sigma": memory(1, 3),
        "sigma_next": memory(2, 1, dtype=F64),
        "noise_level": 0.75,
        "sigma_max": memory(2, 3, 1, dtype=BF16),
        "guidance_scale": memory(dtype=F16),
    }
    dtypes = {"model_output": BF16, "uncond_output": BF16, "sample": F32, "prev_sample": F32}
    dtypes |= {"old_residual": F16, "ref_model_output": F16}
    objective = FlowDPPO(kl_mask_threshold=0.5, kl_space="velocity", mask="symmetric", nan_kl="keep")
    options = {"density": "cps", "reduction": "none", "ref_kl_weight": 0.75, "sampler": "cps"}
    forward(rows, 10_000, dtypes, objective=objective, vectors=vectors, **options)
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.stream) == ("policy_loss_forward_step_bf16_f32_f16", 18, stream)
    argument = launch.parameters.call
    strides = {"sigma": (1, 3), "sigma_next": (3, 2), "sigma_max": (1, 6), "guidance_scale": (1, 1)}
    holds(argument.latents, FIELDS)
    holds(argument.vectors, FIELDS, advantages=(1, 6))
    holds(argument.schedule, FIELDS, **strides)
    assert argument.objective.as_tuple() == (0.5, 0.0, 0.0, math.inf, 0, 1, 2, 1, 0, 0)
    assert argument.settings.as_tuple() == (0.75, 3, 1, 0, 2)
    # Every sampler has its number, and every form of the other policies its place.
    for number, sampler in enumerate(("flow_sde", "dance_sde", "cps")):
        forward(dtypes=STEP, sampler=sampler)
        assert driver.launches()[0].parameters.call.settings.sampler == 1 + number
    for old in ("old_prev_sample_mean", "old_model_output", "old_residual"):
        for ref in ("ref_prev_sample_mean", "ref_model_output"):
            dtypes = {"model_output": BF16, "sample": F32, "prev_sample": F32, old: F32, ref: F32}
            forward(dtypes=dtypes)
            holds(driver.launches()[0].parameters.call.latents, FIELDS)
            backward(dtypes=dtypes)
            holds(driver.launches()[0].parameters.latents, FIELDS)


def shards() -> None:
    """Two launches with a sum between them: the first has no outputs but the sums, the second reads no latents."""
    driver, _ = Driver(), on_gpu()
    made = without_memory()
    for dtypes, suffix in ((MEANS, "f32"), (STEP, "step_bf16_f32_f16")):
        shard = call((3,), 10_000, dtypes)
        made.clear()
        sums = shard.shard_sums()
        assert [tensor.numel() for tensor in made] == [13, 3 * 3 * 4]
        _loss.memo.run(shard, sums)
        first, second = driver.launches()
        assert first.name == second.name == f"policy_loss_forward_{suffix}"
        mine = first.parameters
        assert (first.blocks, mine.splits, mine.stage) == (9, 3, 1)
        assert (mine.loss, mine.numbers, mine.row_sums) == (0, 0, sums.data_ptr())
        mine = second.parameters
        assert (second.blocks, mine.splits, mine.stage) == (1, 0, 2)
        assert [mine.loss, mine.numbers] == [tensor.data_ptr() for tensor in made[2:4]]
        assert mine.row_sums == sums.data_ptr()
    # The objective alone has a warp for every row, and GRPO-Guard its sums to wait for.
    shard = call((3,), 10_000, objective=GRPOGuard())
    sums = shard.shard_sums()
    made.clear()
    _loss.memo.run(shard, sums)
    assert made[2].numel() == 12


def objectives() -> None:
    """Each option in its own field, and what is absent marked so."""
    driver, _ = Driver(), on_gpu()
    for objective, changes in {
        FlowDPPO(): {"kl_mask_threshold": 1e-5, "mask": 0},
        FlowDPPO(kl_mask_threshold=math.inf, mask="symmetric"): {"kl_mask_threshold": math.inf, "mask": 1},
        FlowDPPO(mask="none", normalize_kl=False): {"kl_mask_threshold": 1e-5, "mask": 2, "kl_divisor": 1},
        FlowDPPO(nan_kl="keep"): {"kl_mask_threshold": 1e-5, "keep_nan_kl": 1, "mask": 0},
        FlowGRPO(clip_range=(0.25, 0.5)): {"kind": 1, "clip_low": 0.25, "clip_high": 0.5},
        FlowGRPO(adv_clip_max=2.1): {"kind": 1, "clip_low": 1e-4, "clip_high": 1e-4, "adv_clip_max": 2.1},
        GRPOGuard(): {"kind": 2, "clip_low": 2e-6, "clip_high": 2e-6},
        GRPOGuard(per_row_scale=True): {"kind": 2, "clip_low": 2e-6, "clip_high": 2e-6, "per_row_scale": 1},
    }.items():
        forward(objective=objective)
        (launch,) = driver.launches()
        argument = launch.parameters.call
        wanted = dict.fromkeys((name for name, _ in argument.objective._fields_), 0)
        wanted |= {"adv_clip_max": math.inf, "mask": 2} | changes
        assert {name: getattr(argument.objective, name) for name in wanted} == wanted, objective
        present = {name for name, _ in argument.vectors._fields_ if getattr(argument.vectors, name).present}
        assert present == {"advantages", "std", "sqrt_dt"}
        assert argument.latents.ref_prev_sample_mean.data == 0
    for at, reduction in enumerate(("mean", "sum", "none", "kept_mean")):
        forward(reduction=reduction)
        assert driver.launches()[0].parameters.call.settings.reduction == at


def backward_arguments() -> None:
    driver = Driver()
    stream = driver.stream()
    on_gpu(0, stream)
    dtypes = {"prev_sample_mean": F32, "prev_sample": BF16}
    grad, _, grad_log_prob = backward(2, 8192, dtypes, (True, False, True))
    (launch,) = driver.launches()
    assert (launch.name, launch.blocks, launch.threads) == ("policy_loss_backward_f32_bf16", 4, 256)
    assert launch.stream == stream
    mine = launch.parameters
    holds(mine.latents, FIELDS)
    assert mine.grad_loss.as_tuple() == (FIELDS["grad_loss"].data_ptr(), 0.0, 0, 1, 1, 1)
    assert (mine.rows, mine.numel, mine.splits, mine.dtype) == (2, 8192, 2, 0)
    assert mine.numbers == FIELDS["numbers"].data_ptr()
    assert (mine.grad_output, mine.grad_log_prob) == (grad.data_ptr(), grad_log_prob.data_ptr())
    assert mine.grad_uncond_output == 0
    # Log-probs alone: a thread a row.
    backward(1000, 0, {}, (False, False, True))
    (launch,) = driver.launches()
    assert (launch.blocks, launch.parameters.splits, launch.parameters.grad_output) == (4, 0, 0)
    # With guidance either gradient, or both.
    dtypes = {"model_output": BF16, "uncond_output": BF16, "sample": F32, "prev_sample": F32}
    for wants in ((True, True, False), (True, False, False), (False, True, False)):
        grads = backward(2, 8192, dtypes, wants)
        (launch,) = driver.launches()
        assert (launch.name, launch.blocks) == ("policy_loss_backward_step_bf16_f32", 4)
        addresses = [0 if grad is None else grad.data_ptr() for grad in grads[:2]]
        assert [launch.parameters.grad_output, launch.parameters.grad_uncond_output] == addresses
        assert [address != 0 for address in addresses] == [*wants[:2]]


def grids() -> None:
    """Blocks stay within a grid and cover the rows; splits, grid and workspace belong together."""
    driver, gpu = Driver(), on_gpu()
    made = without_memory()
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
        made.clear()
        forward((rows,), numel)
        (launch,) = driver.launches()
        blocks = rows * splits if splits else math.ceil(rows / 8)
        assert (launch.blocks, launch.parameters.splits) == (blocks, splits), (rows, numel, launch.blocks)
        assert (launch.parameters.call.rows, launch.parameters.call.numel) == (rows, numel)
        assert made[2].numel() == (rows * splits * 4 if splits > 1 else 0)
        assert gpu.tickets[-1].numel() > rows
    # GRPO-Guard keeps every row's sums until all are there.
    made.clear()
    forward((7,), 100, objective=GRPOGuard())
    assert made[2].numel() == 28
    driver.log()
    refused(RuntimeError, lambda: forward((1 << 31,), 600), "2147483648 rows", "grid")
    assert driver.launches() == []


def bad_arguments() -> None:
    """Refused before the driver is asked for anything."""
    driver, _ = Driver(), on_gpu()
    means = dict.fromkeys((*MEANS, "ref_prev_sample_mean"), F32)
    outputs = dict.fromkeys((*STEP, "uncond_output", "ref_model_output"), F32)
    guided = {"guidance_scale": 2.0}
    for dtypes, vectors in ((means, {}), (outputs, guided)):
        for name in dtypes:
            wrong = dtypes | {name: F64}
            made = call(dtypes=wrong, vectors=vectors)
            refused(TypeError, made.forward, f"{name} has dtype float64", "CPU")
            refused(TypeError, made.shard_sums, f"{name} has dtype float64", "CPU")
    for name in ("log_prob", "old_log_prob"):
        vectors = {"log_prob": memory(3), "old_log_prob": memory(3)} | {name: memory(3, dtype=F64)}
        refused(TypeError, lambda given=vectors: forward(vectors=given), f"{name} has dtype float64")
    refused(TypeError, lambda: backward(dtypes={"prev_sample_mean": F64}), "prev_sample_mean has dtype float64")
    refused(ValueError, lambda: backward(dtypes={}, numel=0), "prev_sample_mean is missing")
    refused(ValueError, lambda: backward(dtypes=STEP, wants=(True, True, False)), "uncond_output is missing")
    refused(ValueError, lambda: forward(dtypes=outputs), "uncond_output with guidance_scale, or neither")
    two = MEANS | {"ref_prev_sample_mean": F32, "ref_model_output": F32}
    refused(ValueError, lambda: forward(dtypes=two), "a single form of the reference policy")
    assert driver.launches() == []


# ---- tickets, contexts, streams, captures, threads -------------------------------------------------------------------


def kept_tickets() -> None:
    """Kept per stream and grown; never those of a capture, nor of a call through the dispatcher."""
    driver = Driver()
    stream = driver.stream()
    gpu = on_gpu(0, stream)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def used(rows: int = 4) -> int:
        """The address that a call gave to its kernel."""
        loss(memory(rows, 6), memory(rows, 6), memory(rows), std=1.0, prev_sample=memory(rows, 6))
        (launch,) = driver.launches()
        return launch.parameters.tickets

    def lengths() -> list[int]:
        return [tickets.numel() for tickets in gpu.tickets]

    first, second = used(), used()
    (kept,) = gpu.tickets
    assert first == second == kept.data_ptr()
    assert (lengths(), kept.element_size()) == ([1024], 4)

    driver.capture(stream, True)
    captured = used()
    driver.capture(stream, False)
    with Watching():
        watched = used()
    assert lengths() == [1024, 5, 5]
    assert [captured, watched] == [tickets.data_ptr() for tickets in gpu.tickets[1:]]

    assert used(1023) == kept.data_ptr()
    assert lengths() == [1024, 5, 5]
    assert used(1024) == used(5) == gpu.tickets[-1].data_ptr()
    assert lengths() == [1024, 5, 5, 2048]
    gpu.target = lambda: (0, 0)
    assert used() == gpu.tickets[-1].data_ptr()
    assert lengths() == [1024, 5, 5, 2048, 1024]
    assert not any(tickets.any() for tickets in gpu.tickets)


def current_context_is_restored() -> None:
    driver, gpu = Driver(), on_gpu()
    for before in (None, driver.context(1), driver.context(0)):
        for device in (0, 1):
            gpu.target = lambda device=device: (device, 0)
            driver.current = before
            forward()
            backward()
            assert driver.current == before
            driver.fail("cuLaunchKernel", 700)
            refused(RuntimeError, forward, "cuLaunchKernel")
            driver.fail("cuLaunchKernel", 0)
            assert driver.current == before


def a_stream_of_another_device_is_an_error() -> None:
    driver = Driver()
    on_gpu(0, driver.stream(1))
    refused(RuntimeError, forward, "CUDA_ERROR_INVALID_HANDLE")


def first_call_inside_a_capture() -> None:
    driver = Driver()
    stream, other = driver.stream(), driver.stream()
    gpu = on_gpu(0, stream)
    driver.capture(stream, True)
    forward()
    assert driver.capture_mode() == 0
    assert len(driver.launches()) == 1
    # Its counters are its own, those of other streams are kept for the next call.
    for target in (other, 0):
        gpu.target = lambda target=target: (0, target)
        forward()
    assert [tickets.numel() for tickets in gpu.tickets] == [4, 1024, 1024]


def two_devices_and_many_threads() -> None:
    """Every device's module is loaded once, whoever comes first; launches go where they were sent."""
    driver = Driver()
    streams = [driver.stream(0), driver.stream(1)]
    start, failures, mine = threading.Barrier(8), [], threading.local()
    gpu = on_gpu()
    gpu.target = lambda: (mine.device, streams[mine.device])

    def work(device: int) -> None:
        mine.device = device
        try:
            start.wait()
            for _ in range(20):
                forward()
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
    driver, gpu = Driver(), on_gpu()
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
    stream = driver.stream()
    gpu.target = lambda: (0, stream)
    refused(RuntimeError, forward, "cuStreamIsCapturing")
    gpu.target = lambda: (0, 0)
    forward()
    assert len(driver.launches()) == 1


def no_such_device() -> None:
    Driver()
    gpu = on_gpu(1)
    refused(RuntimeError, forward, "cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE")
    gpu.target = lambda: (64, 0)
    refused(RuntimeError, forward, "cuda:64")


def no_driver() -> None:
    on_gpu()
    for call in (forward, backward):
        refused(RuntimeError, call, "no NVIDIA driver", "libcuda.so.1", "flowdppo_ops.reference")


if __name__ == "__main__":
    name, *arguments = sys.argv[1].split(":")
    globals()[name](*arguments)
