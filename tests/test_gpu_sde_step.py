"""`flowdppo_ops.sde_step` on a real GPU: what the emulator and the stand-in driver cannot show.

Run with `pytest -m gpu`. Collected everywhere; without a GPU every test is skipped and says so.
"""

from __future__ import annotations

import pytest
import torch
from gpu_api import moved, requested_bytes, sde_step
from parity import equal_bits
from sde_step_cases import FLOAT32_DTYPES, LAYOUTS, SAMPLERS, draw, run, three_way
from torch import Tensor

import flowdppo_ops
from flowdppo_ops import _native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here, or a PyTorch without CUDA"),
    pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)"),
]

dtypes = pytest.mark.parametrize("dtypes", FLOAT32_DTYPES.values(), ids=FLOAT32_DTYPES)
both_ways = pytest.mark.parametrize("replay", [False, True], ids=["drawn", "replay"])


# ---- parity with the float64 reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [False, True])
@both_ways
def test_options(sampler, guidance, replay):
    for residual in (False, True):
        arguments = draw((6, 4, 700), sampler=sampler, replay=replay, guidance=guidance, residual=residual)
        three_way(sde_step, arguments | {"log_prob_normalizer": residual})


@dtypes
@both_ways
@pytest.mark.parametrize("shape", [(6, 4, 9), (6, 4096), (3, 7, 331)])
def test_dtypes(dtypes, replay, shape):
    three_way(sde_step, draw(shape, guidance=True, residual=True, replay=replay, dtypes=dtypes))


@dtypes
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 511, 512, 513, 4097, 65_545, 1_000_003])
def test_sizes(numel, dtypes):
    three_way(sde_step, draw((4, numel), residual=True, dtypes=dtypes))


@pytest.mark.parametrize(("shape", "row_dims", "schedule"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(shape, row_dims, schedule):
    three_way(sde_step, draw(shape, row_dims, schedule, guidance=True, residual=True))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 5000])
@pytest.mark.parametrize("numel", [1, 40, 600])
def test_many_rows(rows, numel):
    three_way(sde_step, draw((rows, numel), residual=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1000, 4099])
def test_any_alignment(dtype, numel):
    """Latents that begin at an odd element, each at another one, give the latents of aligned ones."""
    arguments = moved(draw((5, numel), guidance=True, residual=True, dtypes={"*": dtype}))
    shifted = dict(arguments)
    for offset, name in enumerate(("model_output", "uncond_output", "sample", "noise")):
        buffer = torch.full((5 * numel + 8,), torch.nan, dtype=dtype, device="cuda")
        shifted[name] = buffer[1 + offset : 1 + offset + 5 * numel].view(5, numel).copy_(arguments[name])
    wanted, mine = (run(flowdppo_ops.sde_step, given, through=("prev_sample_mean",)) for given in (arguments, shifted))
    for name in wanted.keys() - {"log_prob"}:  # a sum depends on how elements are grouped
        equal_bits({name: mine[name]}, {name: wanted[name]})
    assert torch.allclose(mine["log_prob"], wanted["log_prob"], rtol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("numel", [130, 5000])
def test_deterministic_rows(sampler, numel):
    arguments = draw((4, numel), sampler=sampler, residual=True, guidance=True)
    arguments["noise_level"][1] = 0.0
    arguments["sigma_next"][2] = 0.0
    mine = three_way(sde_step, arguments)
    assert all(value.isfinite().all() for value in mine.values())
    assert (mine["residual"][[1, 2] if sampler == "cps" else [1]] == 0).all()


@dtypes
@pytest.mark.parametrize("numel", [300, 20_000])
def test_latents_have_the_bits_of_the_cpu(dtypes, numel):
    arguments = draw((3, numel), guidance=True, residual=True, dtypes=dtypes)
    there, here = run(sde_step, arguments), run(flowdppo_ops.sde_step, arguments)
    for name in ("prev_sample", "prev_sample_mean", "std", "residual"):
        equal_bits({name: there[name]}, {name: here[name]})


# ---- determinism, generators, graphs ---------------------------------------------------------------------------------


@dtypes
def test_a_replay_of_the_stored_latent_has_the_same_bits(dtypes):
    arguments = moved(draw((8, 60_000), guidance=True, residual=True, dtypes=dtypes))
    drawn = run(flowdppo_ops.sde_step, arguments)
    for _ in range(5):
        equal_bits(run(flowdppo_ops.sde_step, arguments), drawn)
    del arguments["noise"]
    replay = run(flowdppo_ops.sde_step, arguments | {"prev_sample": drawn["prev_sample"]})
    equal_bits(replay, drawn)


def test_a_recorded_policy_has_no_drift():
    """Nor does a compiler that fuses `u / std - residual` give it one."""
    arguments = moved(draw((4, 30_000), replay=True, guidance=True))
    step = flowdppo_ops.sde_step(**arguments, residual_dtype=torch.float32)
    del arguments["row_dims"]
    for old in ({"old_prev_sample_mean": step.prev_sample_mean}, {"old_residual": step.residual}):
        result = flowdppo_ops.step_loss(**arguments, advantages=torch.ones(4, device="cuda"), **old)
        assert (result.kl == 0).all()
        assert (result.ratio == 1).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_generator_decides_the_noise(device):
    arguments = moved(draw((4, 3000)))
    del arguments["noise"]
    drawn = [
        flowdppo_ops.sde_step(**arguments, generator=torch.Generator(device).manual_seed(seed)).prev_sample
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_graph_capture_and_replay():
    inputs = [moved(draw((8, 40_000), seed=seed, guidance=True, residual=True)) for seed in range(3)]
    static = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs[0].items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(flowdppo_ops.sde_step, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(flowdppo_ops.sde_step, static)
    for given in (*inputs, inputs[0]):
        for name, value in given.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        graph.replay()
        equal_bits({name: t.clone() for name, t in captured.items()}, run(flowdppo_ops.sde_step, given))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    arguments = moved(draw((8, 3000), guidance=True, residual=True))
    wanted = run(flowdppo_ops.sde_step, arguments)
    compiled = torch.compile(flowdppo_ops.sde_step, fullgraph=True, mode=mode)
    for _ in range(4):  # with CUDA graphs: warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        mine = run(compiled, arguments)
        for name in ("prev_sample", "log_prob", "std", "residual", "grad model_output", "grad uncond_output"):
            equal_bits({name: mine[name].clone()}, {name: wanted[name]})


# ---- what a rollout must not pay for ---------------------------------------------------------------------------------


def test_no_host_synchronisation():
    arguments = moved(draw((8, 20_000), guidance=True, residual=True))
    run(flowdppo_ops.sde_step, arguments)  # modules are loaded, tickets are there
    del arguments["noise"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(flowdppo_ops.sde_step, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_launches():
    """One kernel forward, one backward, and nothing else on the GPU."""
    arguments = moved(draw((8, 20_000), guidance=True, residual=True))
    outputs = [arguments[name].requires_grad_() for name in ("model_output", "uncond_output")]
    upstream = [torch.ones(8, device="cuda"), torch.ones(8, 20_000, device="cuda")]
    run(flowdppo_ops.sde_step, arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step = flowdppo_ops.sde_step(**arguments)
        torch.autograd.grad([step.log_prob, step.prev_sample_mean], outputs, upstream)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(kernels) == ["sde_step_backward_f32", "sde_step_forward_f32"]


def test_nothing_latent_sized_is_allocated_but_the_results():
    latent_bytes = 16 * 1_000_000 * 4
    arguments = moved(draw((16, 1_000_000), replay=True))
    output = arguments["model_output"].requires_grad_()
    run(flowdppo_ops.sde_step, arguments)
    torch.cuda.synchronize()
    before = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    step = flowdppo_ops.sde_step(**arguments)
    assert requested_bytes("peak") - before <= latent_bytes * 1.01  # the mean
    (grad,) = torch.autograd.grad(step.log_prob, output, torch.ones(16, device="cuda"))
    assert requested_bytes("peak") - before <= latent_bytes * 2.01
    assert grad.nbytes == latent_bytes
