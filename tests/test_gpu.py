"""`flowdppo_ops.loss` on a real GPU: what the emulator and the stand-in driver cannot show.

Run with `pytest -m gpu`. Collected everywhere; without a GPU every test is skipped and says so.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import product
from typing import Any

import pytest
import torch
from cases import CELLS, DTYPES, LAYOUTS, OBJECTIVES, SIZES, VARIANTS, defaults, draw, mask_cells
from gpu_api import loss, moved, operator_arguments, requested_bytes
from parity import equal_bits, run, three_way

import flowdppo_ops
from flowdppo_ops import FlowDPPO, _native
from flowdppo_ops._checks import check_loss
from flowdppo_ops._torch import FAMILY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here, or a PyTorch without CUDA"),
    pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)"),
]

SOURCES = ("sample", "sample and old", "log_prob")
GPU_DTYPES = {name: dtypes for name, dtypes in DTYPES.items() if "float64" not in name}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def leaf(arguments: dict[str, Any]) -> torch.Tensor:
    """The mean of arguments on the GPU, as what is differentiated."""
    arguments["prev_sample_mean"] = arguments["prev_sample_mean"].detach().requires_grad_()
    return arguments["prev_sample_mean"]


# ---- parity with the float64 reference, masks exactly ----------------------------------------------------------------


@objectives
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("density", ["gaussian", "cps"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
def test_options(objective, source, density, reduction):
    for latent_reduction, ref_kl_weight in product(("mean", "sum"), (0.0, 0.5)):
        options = {"density": density, "reduction": reduction, "latent_reduction": latent_reduction}
        three_way(loss, draw(objective=objective, source=source, weights=True, ref_kl_weight=ref_kl_weight, **options))


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("source", SOURCES)
def test_variants(objective, source):
    three_way(loss, draw(objective=objective, source=source, weights=True))


@objectives
@pytest.mark.parametrize("dtypes", GPU_DTYPES.values(), ids=GPU_DTYPES)
@pytest.mark.parametrize("source", SOURCES)
def test_dtypes(objective, dtypes, source):
    for latent_shape in ((4, 9), (4, 1024), (3, 7, 331)):
        three_way(loss, draw((6,), latent_shape, source=source, objective=objective, dtypes=dtypes, ref_kl_weight=0.5))


@pytest.mark.parametrize("dtypes", GPU_DTYPES.values(), ids=GPU_DTYPES)
@pytest.mark.parametrize("numel", [*SIZES, 511, 512, 513, 1_000_003])
def test_sizes(numel, dtypes):
    three_way(loss, draw((4,), (numel,), dtypes=dtypes))


@pytest.mark.parametrize(("rows", "latents"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(rows, latents):
    three_way(loss, draw(rows, latents))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 255, 256, 257, 5000])
@pytest.mark.parametrize("numel", [1, 40, 600])
def test_many_rows(rows, numel):
    for objective, source in product(OBJECTIVES.values(), ("sample", "log_prob")):
        three_way(loss, draw((rows,), (numel,), objective=objective, source=source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1000, 4099])
def test_any_alignment(dtype, numel):
    """Latents that begin at an odd element, each at another one, give the bits of aligned ones."""
    arguments = moved(draw((5,), (numel,), dtypes={"*": dtype}, ref_kl_weight=0.5))
    shifted = dict(arguments)
    for offset, name in enumerate(("prev_sample_mean", "old_prev_sample_mean", "prev_sample", "ref_prev_sample_mean")):
        buffer = torch.full((5 * numel + 8,), torch.nan, dtype=dtype, device="cuda")
        view = buffer[1 + offset : 1 + offset + 5 * numel].view(5, numel)
        shifted[name] = view.copy_(arguments[name])
    gradients = []
    for given in (arguments, shifted):
        mean = leaf(given)
        result = flowdppo_ops.loss(**given)
        gradients.append(torch.autograd.grad(result.loss, mean)[0])
    # The gradient is element by element; only sums depend on how elements are grouped.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    largest = gradients[0].double().abs().max()
    assert (gradients[0].double() - gradients[1].double()).abs().max() <= tolerance * largest
    assert largest > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 40, 1000, 70_000])
def test_mask_cells(dtype, numel):
    arguments, keep = mask_cells(numel, dtype)
    mine = run(loss, arguments)
    assert torch.equal(mine["keep"], keep)
    equal_bits(
        {"kl": mine["kl"], "ratio": mine["ratio"]}, {k: run(flowdppo_ops.loss, arguments)[k] for k in ("kl", "ratio")}
    )
    assert len(CELLS) == keep.numel()


def test_on_policy_is_exact():
    arguments = draw((6,), (5000,))
    arguments["old_prev_sample_mean"] = arguments["prev_sample_mean"].clone()
    mine = loss(**arguments)
    assert torch.equal(mine.ratio, torch.ones(6))
    assert torch.equal(mine.kl, torch.zeros(6))
    fed_back = loss(**arguments, old_log_prob=mine.log_prob)
    assert torch.equal(fed_back.log_ratio, torch.zeros(6))


def test_infinities_stay_in_their_row():
    arguments = draw((12,), (700,))
    for row, name, value in ((0, "prev_sample", torch.inf), (1, "prev_sample_mean", torch.nan)):
        arguments[name][row, 3] = value
    arguments["std"][2] = 1e-30  # the ratio overflows
    mine, cpu = run(loss, arguments), run(flowdppo_ops.loss, arguments)
    assert torch.equal(mine["keep"], cpu["keep"])
    for name in ("ratio", "kl", "log_prob", "grad prev_sample_mean"):
        assert torch.equal(mine[name].isfinite(), cpu[name].isfinite()), name
        assert mine[name][3:].isfinite().all()
    assert mine["metrics"]["nonfinite_fraction"] == cpu["metrics"]["nonfinite_fraction"] > 0


def test_a_million_rows():
    arguments = moved(draw((1_000_000,), (1,)))
    on_cpu = flowdppo_ops.loss(**moved(arguments, "cpu"))
    result = flowdppo_ops.loss(**arguments)
    assert torch.equal(result.keep.cpu(), on_cpu.keep)
    assert abs(result.loss.item() - on_cpu.loss.item()) <= 1e-5 * abs(on_cpu.loss.item())


def test_rows_beyond_32_bits():
    """An offset that wraps at 2^31 or 2^32 elements would miss the only element that differs."""
    free, _ = torch.cuda.mem_get_info()
    if free < 50 << 30:
        pytest.skip("needs 50 GiB of free GPU memory")
    numel = (1 << 32) + 9
    mean = torch.zeros(1, numel, dtype=torch.bfloat16, device="cuda")
    sample = torch.ones(1, 1, dtype=torch.bfloat16, device="cuda").expand(1, numel).contiguous()
    old = torch.zeros_like(mean)
    old[0, -1] = -65536.0
    mean.requires_grad_()
    result = flowdppo_ops.loss(
        mean, old, torch.ones(1, device="cuda"), std=1.0, prev_sample=sample, objective=FlowDPPO(mask="none")
    )
    (grad,) = torch.autograd.grad(result.loss, mean)
    kl = 65536.0**2 / (2 * numel)
    assert abs(result.kl.item() - kl) <= 1e-5 * kl
    assert abs(result.log_prob.item() - (-0.5 - 0.9189385332)) <= 1e-5
    wanted = -result.ratio.item() / numel
    for at in (0, 1 << 31, 1 << 32, numel - 1):
        assert abs(grad[0, at].item() - wanted) <= 2**-8 * abs(wanted), at


def test_metadata_errors():
    arguments = moved(draw())
    with pytest.raises(ValueError, match="cpu"):
        flowdppo_ops.loss(**arguments | {"prev_sample": arguments["prev_sample"].cpu()})
    with pytest.raises(TypeError, match="prev_sample has dtype float64"):
        flowdppo_ops.loss(**arguments | {"prev_sample": arguments["prev_sample"].double()})
    flowdppo_ops.loss(**arguments | {"std": arguments["std"].double()})


# ---- determinism, streams, threads, devices --------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("shape", [((16,), (65_543,)), ((3,), (1_000_003,)), ((5000,), (33,))])
def test_the_same_bits_every_time(objective, shape):
    arguments = draw(*shape, objective=objective, ref_kl_weight=0.5)
    first = run(loss, arguments)
    for _ in range(10):
        equal_bits(first, run(loss, arguments))


def forward_and_backward(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    mean = leaf(arguments)
    result = flowdppo_ops.loss(**arguments)
    return result.loss.detach(), result._numbers, *torch.autograd.grad(result.loss, mean)


def assert_same(mine: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(mine, wanted, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_side_streams():
    """Work on a stream waits for what was put there before, and for nothing else."""
    many = [moved(draw((4,), (200_000,), seed=seed)) for seed in range(8)]
    wanted = [forward_and_backward(arguments) for arguments in many]
    torch.cuda.synchronize()
    results = []
    for arguments in many:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = dict(arguments, prev_sample=torch.zeros_like(arguments["prev_sample"]))
            torch.cuda._sleep(10_000_000)  # the copy below is not done when the loss is called
            late["prev_sample"].copy_(arguments["prev_sample"])
            results.append(forward_and_backward(late))
    torch.cuda.synchronize()
    for mine, theirs in zip(results, wanted, strict=True):
        assert_same(mine, theirs)


def test_two_threads():
    many = [moved(draw((16,), (30_000,), seed=seed)) for seed in range(2)]
    wanted = [forward_and_backward(arguments) for arguments in many]
    torch.cuda.synchronize()
    failures = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    assert_same(forward_and_backward(many[index]), wanted[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = draw((4,), (10_000,))
    there = moved(arguments, "cuda:1")
    results = forward_and_backward(there)
    assert torch.cuda.current_device() == 0
    assert all(result.device.index == 1 for result in results)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same(results, forward_and_backward(moved(arguments, "cuda:0")))


# ---- CUDA graphs, torch.compile --------------------------------------------------------------------------------------


@objectives
def test_graph_capture_and_replay(objective):
    inputs = [moved(draw((8,), (20_000,), seed=seed, objective=objective)) for seed in range(3)]
    static = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in inputs[0].items()}
    mean = leaf(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(flowdppo_ops.loss(**static).loss, mean)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flowdppo_ops.loss(**static)
        (grad,) = torch.autograd.grad(result.loss, mean)
    for given in (*inputs, inputs[0]):
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                static[name].detach().copy_(value.detach())
        graph.replay()
        replayed = tuple(t.clone() for t in (result.loss.detach(), result._numbers, grad))
        assert_same(replayed, forward_and_backward(dict(given)))


def test_replays_and_calls_side_by_side():
    """A graph has tickets of its own: replays on one stream do not count in the calls of another."""
    static = moved(draw((8,), (400_000,)))
    wanted = forward_and_backward(dict(static))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = flowdppo_ops.loss(**static)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    eager = []
    for _ in range(30):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        with torch.cuda.stream(streams[1]), torch.no_grad():
            eager.append(flowdppo_ops.loss(**static)._numbers)
    torch.cuda.synchronize()
    for numbers in (result._numbers, *eager):
        assert torch.equal(numbers, wanted[1])


def test_the_first_call_of_a_process_may_be_captured():
    script = """
import torch, flowdppo_ops
mean = torch.zeros(4, 5000, device="cuda")
arguments = dict(advantages=torch.ones(4, device="cuda"), std=0.5, prev_sample=mean + 1)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = flowdppo_ops.loss(mean, mean, **arguments)
graph.replay()
assert result.loss.item() == -1, result.loss
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    arguments = moved(draw((8,), (3000,)))
    wanted = forward_and_backward(dict(arguments))

    @torch.compile(fullgraph=True, mode=mode)
    def compiled(mean, rest):
        result = flowdppo_ops.loss(mean, **rest)
        return result.loss, result.ratio

    mean = leaf(arguments)
    rest = {name: value for name, value in arguments.items() if name != "prev_sample_mean"}
    for _ in range(4):  # with CUDA graphs: warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        value, _ = compiled(mean, rest)
        (grad,) = torch.autograd.grad(value, mean)
        assert_same((value.detach().clone(), grad.clone()), (wanted[0], wanted[2]))


def test_opcheck():
    arguments = moved(draw())
    leaf(arguments)
    call = check_loss("checked", FAMILY, defaults(flowdppo_ops.loss) | arguments)
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss.default, (), operator_arguments(call))


# ---- what a training step must not pay for ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_no_host_synchronisation(source):
    arguments = moved(draw((8,), (20_000,), source=source, weights=True, ref_kl_weight=0.5))
    forward_and_backward(arguments)  # modules are loaded, tickets are there
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait():
    """Both launches return while the GPU is still busy with what was queued before."""
    arguments = moved(draw((8,), (20_000,)))
    forward_and_backward(arguments)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    forward_and_backward(arguments)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_nothing_latent_sized_is_allocated_but_the_gradient():
    latent_bytes = 16 * 1_000_000 * 4
    arguments = moved(draw((16,), (1_000_000,)))
    mean = leaf(arguments)
    forward_and_backward(dict(arguments))
    torch.cuda.synchronize()
    before = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    result = flowdppo_ops.loss(**arguments)
    assert requested_bytes("peak") - before <= latent_bytes / 100
    (grad,) = torch.autograd.grad(result.loss, mean)
    assert requested_bytes("peak") - before <= latent_bytes * 1.01
    assert grad.numel() * grad.element_size() == latent_bytes


def test_gradients_accumulate():
    parts = [moved(draw((4,), (3000,), seed=seed)) for seed in range(3)]
    for arguments in parts:
        arguments["prev_sample_mean"] = parts[0]["prev_sample_mean"]
    mean = torch.nn.Parameter(parts[0]["prev_sample_mean"])
    wanted = sum(forward_and_backward(dict(arguments))[2] for arguments in parts)
    for arguments in parts:
        flowdppo_ops.loss(**arguments | {"prev_sample_mean": mean}).loss.backward()
    assert torch.equal(mean.grad, wanted)
    assert wanted.abs().max() > 0


def test_two_launches():
    """One kernel forward, one backward, and nothing else on the GPU."""
    arguments = moved(draw((8,), (20_000,)))
    mean = leaf(arguments)
    upstream = torch.ones((), device="cuda")
    forward_and_backward(dict(arguments))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(flowdppo_ops.loss(**arguments).loss, mean, upstream)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["policy_loss_backward_f32", "policy_loss_forward_f32"]
