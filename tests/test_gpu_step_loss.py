"""`flowdppo_ops.step_loss` on a real GPU, as test_gpu.py has `loss` there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SIZES, defaults
from gpu_api import moved, operator_arguments, requested_bytes
from gpu_api import step_loss as on_gpu
from parity import equal_bits, run, three_way
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells
from test_gpu import assert_same, pytestmark  # noqa: F401
from test_step_exact import (  # noqa: F401
    test_a_guidance_scale_of_1_is_no_guidance,
    test_a_trajectory_is_its_steps,
    test_blocked_infinite_ratio,
    test_every_mask_cell,
    test_mask_cells_of_the_ablations,
    test_residual_of_a_deterministic_row_is_the_sample,
)
from test_step_parity import (  # noqa: F401
    test_blocked_rows_keep_their_penalty,
    test_deterministic_rows,
    test_divisors_of_0,
    test_dtypes,
    test_grpo_without_an_old_policy,
    test_guidance,
    test_guidance_scales,
    test_layouts,
    test_no_element_is_missed,
    test_nothing_is_random,
    test_old_log_prob,
    test_options,
    test_reference_kl,
    test_schedules,
    test_variants,
)

import flowdppo_ops
from flowdppo_ops import _native
from flowdppo_ops._checks import Call, check_step_loss
from flowdppo_ops._torch import FAMILY
from flowdppo_ops.policy_loss import _step_loss

DPPO, GRPO, GUARD = (STEP_OBJECTIVES[name] for name in ("dppo", "grpo", "guard"))
objectives = pytest.mark.parametrize("objective", [DPPO, GRPO, GUARD], ids=["dppo", "grpo", "guard"])
OUTPUTS = ("model_output", "uncond_output")


@pytest.fixture
def step_loss():
    """What the tests of `step_loss` drive."""

    def step_loss(*given: Any, **arguments: Any) -> Any:
        arguments |= dict(zip(defaults(flowdppo_ops.step_loss), given, strict=False))
        try:
            return on_gpu(**arguments)
        except TypeError as error:
            if "computed on the CPU alone" not in str(error):
                raise
            pytest.skip("float64 latents are computed on the CPU alone")

    return step_loss


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_policy_is_exact(step_loss, sampler):
    arguments = draw_step((6,), (1003,), sampler=sampler, old_form="output")
    result = step_loss(**arguments | {"old_model_output": arguments["model_output"].clone()})
    assert (result.ratio == 1).all()
    assert (result.kl == 0).all()


def leaves(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of arguments on the GPU, as what is differentiated."""
    for name in OUTPUTS:
        if name in arguments:
            arguments[name] = arguments[name].detach().requires_grad_()
    return [arguments[name] for name in OUTPUTS if name in arguments]


def checked(arguments: dict[str, Any]) -> Call:
    """The call that `step_loss` makes of its arguments."""
    return check_step_loss("checked", FAMILY, defaults(flowdppo_ops.step_loss) | arguments)


def native(call: Call) -> _native.PolicyLossCall:
    return _native.PolicyLossCall(call.fields, call.settings)


def forward_and_backward(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    wanted = leaves(arguments)
    result = flowdppo_ops.step_loss(**arguments)
    return result.loss.detach(), result._numbers, *torch.autograd.grad(result.loss, wanted)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", STEP_DTYPES.values(), ids=STEP_DTYPES)
@pytest.mark.parametrize("numel", [*SIZES, 511, 512, 513, 1_000_003])
def test_sizes(numel, dtypes):
    three_way(on_gpu, draw_step((4,), (numel,), dtypes=dtypes, old_form="residual", guidance=numel % 2 == 0))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 255, 256, 257, 5000])
@pytest.mark.parametrize("numel", [1, 40, 600])
def test_many_rows(rows, numel):
    for objective in STEP_OBJECTIVES.values():
        three_way(on_gpu, draw_step((rows,), (numel,), objective=objective, ref_form="output", deterministic=True))


@pytest.mark.parametrize(
    "dtypes", ["float32", "bfloat16", "bfloat16 outputs, float16 policies", "every latent another"]
)
@pytest.mark.parametrize("numel", [1000, 4099])
def test_any_alignment(dtypes, numel):
    """Latents that begin at an odd element, each at another one, give the gradient of aligned ones."""
    options = {"guidance": True, "ref_form": "output", "old_form": "residual", "objective": GUARD}
    arguments = moved(draw_step((5,), (numel,), dtypes=STEP_DTYPES[dtypes], **options))
    shifted = dict(arguments)
    latents = [name for name, v in arguments.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
    for offset, name in enumerate(latents):
        buffer = torch.full((5 * numel + 8,), torch.nan, dtype=arguments[name].dtype, device="cuda")
        view = buffer[1 + offset : 1 + offset + 5 * numel].view(5, numel)
        shifted[name] = view.copy_(arguments[name])
    for mine, wanted in zip(forward_and_backward(shifted)[2:], forward_and_backward(arguments)[2:], strict=True):
        largest = wanted.double().abs().max()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[wanted.dtype]
        assert (mine.double() - wanted.double()).abs().max() <= tolerance * largest
        assert largest > 0


@pytest.mark.parametrize("old_form", OLD_FORMS)
@pytest.mark.parametrize("numel", [1, 40, 1000, 70_000])
def test_masks_and_bits_of_the_cpu_backend(old_form, numel):
    """Where the sums are exact, ratio and KL have the CPU backend's bits, and every cell of the mask its outcome."""
    arguments, keep = step_mask_cells(numel, old_form)
    mine, cpu = run(on_gpu, arguments), run(flowdppo_ops.step_loss, arguments)
    assert torch.equal(mine["keep"], keep)
    equal_bits({k: mine[k] for k in ("kl", "ratio")}, {k: cpu[k] for k in ("kl", "ratio")})


# ---- sharded latents -------------------------------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("sizes", [(3, 600, 400), (70_000, 1)], ids=str)
def test_shards_add_up(objective, sizes):
    """Uneven shards whose sums are added here, as a collective adds them."""
    arguments = moved(draw_step((9,), (sum(sizes),), objective=objective, old_form="output"))
    latents = [name for name, v in arguments.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
    shards = [
        checked(arguments | {name: arguments[name].split(sizes, 1)[at].contiguous() for name in latents})
        for at in range(len(sizes))
    ]
    sums = sum(native(shard).shard_sums() for shard in shards)
    assert sums[-1] == sum(sizes)
    whole = flowdppo_ops.step_loss(**arguments)
    for shard in shards:
        mine = _step_loss.memo.run(native(shard), sums)
        torch.testing.assert_close(mine.loss, whole.loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(mine.keep, whole.keep)


# ---- determinism, graphs, torch.compile ------------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("shape", [((16,), (65_543,)), ((3,), (1_000_003,)), ((5000,), (33,))])
def test_the_same_bits_every_time(objective, shape):
    arguments = draw_step(*shape, objective=objective, guidance=True, ref_form="output")
    first = run(on_gpu, arguments)
    for _ in range(10):
        equal_bits(first, run(on_gpu, arguments))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graph_capture_and_replay(sampler):
    """Schedules are read on the GPU: a replay takes those of its own step."""
    options = {"sampler": sampler, "guidance": True, "old_form": "residual", "ref_form": "output"}
    inputs = [moved(draw_step((8,), (20_000,), seed=seed, **options)) for seed in range(3)]
    static = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in inputs[0].items()}
    wanted = leaves(static)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(flowdppo_ops.step_loss(**static).loss, wanted)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flowdppo_ops.step_loss(**static)
        grads = torch.autograd.grad(result.loss, wanted)
    for given in (*inputs, inputs[0]):
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                static[name].detach().copy_(value.detach())
        graph.replay()
        replayed = tuple(t.clone() for t in (result.loss.detach(), result._numbers, *grads))
        assert_same(replayed, forward_and_backward(dict(given)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    arguments = moved(draw_step((8,), (3000,), guidance=True, old_form="residual"))
    wanted = forward_and_backward(dict(arguments))

    @torch.compile(fullgraph=True, mode=mode)
    def compiled(given):
        result = flowdppo_ops.step_loss(**given)
        return result.loss, result.ratio

    outputs = leaves(arguments)
    for _ in range(4):  # with CUDA graphs: warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        value, _ = compiled(arguments)
        grads = torch.autograd.grad(value, outputs)
        assert_same((value.detach().clone(), *(g.clone() for g in grads)), (wanted[0], *wanted[2:]))


def test_opcheck():
    arguments = moved(draw_step(guidance=True, old_form="residual", ref_form="output"))
    leaves(arguments)
    call = checked(arguments)
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss.default, (), operator_arguments(call))


# ---- what a training step must not pay for ---------------------------------------------------------------------------


@pytest.mark.parametrize("old_form", OLD_FORMS)
def test_no_host_synchronisation(old_form):
    arguments = moved(draw_step((8,), (20_000,), old_form=old_form, guidance=True, ref_form="mean", weights=True))
    forward_and_backward(arguments)  # modules are loaded, tickets are there
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_latent_sized_is_allocated_but_the_gradient():
    latent_bytes = 16 * 1_000_000 * 2
    arguments = moved(draw_step((16,), (1_000_000,), old_form="residual", dtypes=STEP_DTYPES["bfloat16"]))
    forward_and_backward(dict(arguments))
    outputs = leaves(arguments)
    torch.cuda.synchronize()
    before = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    result = flowdppo_ops.step_loss(**arguments)
    assert requested_bytes("peak") - before <= latent_bytes / 100
    (grad,) = torch.autograd.grad(result.loss, outputs)
    assert requested_bytes("peak") - before <= latent_bytes * 1.01
    assert grad.numel() * grad.element_size() == latent_bytes


def test_two_launches():
    """One kernel forward, one backward, and nothing else on the GPU."""
    options = {"dtypes": STEP_DTYPES["bfloat16 outputs, float16 policies"], "old_form": "residual"}
    arguments = moved(draw_step((8,), (20_000,), **options))
    outputs, upstream = leaves(arguments), torch.ones((), device="cuda")
    forward_and_backward(dict(arguments))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(flowdppo_ops.step_loss(**arguments).loss, outputs, upstream)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # The backward of FlowDPPO reads no old policy, so the variant of plain float32 samples fits.
    wanted = ["policy_loss_backward_step_bf16_f32", "policy_loss_forward_step_bf16_f32_f16"]
    assert sorted(kernels) == wanted
