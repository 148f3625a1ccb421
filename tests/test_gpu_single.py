"""The single pass on a real GPU: what a plan and an emulator cannot show, resident blocks that wait for one another."""

from __future__ import annotations

from typing import Any

import gpu_api
import pytest
import torch
from cases import DTYPES, OBJECTIVES, draw, mask_cells
from gpu_api import moved
from parity import equal_bits, run, three_way
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, draw_step
from test_gpu import pytestmark  # noqa: F401
from test_gpu_step_loss import forward_and_backward

import flowdppo_ops
from flowdppo_ops import _native

SWITCH = "FLOWDPPO_OPS_SINGLE_PASS"
# Rows of each size: the longest takes every block there is, the last number is more than a turn of all teams. No more:
# what is expected comes from float64 on the CPU, a second for two million elements.
SIZES = {520: (1, 2, 16, 300), 4104: (1, 2, 16, 300), 65_536: (1, 2, 16, 64), 1_000_008: (1, 2, 4), 4_838_400: (1, 2)}


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[int]:
    """The rows of every single pass; all calls take it where they can."""
    launched, launch = [], _native.policy_loss_forward_cuda

    def watched(*arguments: Any) -> None:
        launch(*arguments)
        _, _, _, _, rows, _, _, _, _, gradients_ahead, *_ = arguments
        if gradients_ahead is not None:
            launched.append(rows)

    monkeypatch.setattr(_native, "policy_loss_forward_cuda", watched)
    monkeypatch.setenv(SWITCH, "1")
    return launched


@pytest.mark.parametrize(("rows", "numel"), [(rows, numel) for numel, each in SIZES.items() for rows in each])
def test_sizes(launched, rows, numel):
    three_way(gpu_api.loss, draw((rows,), (numel,)))
    three_way(gpu_api.step_loss, draw_step((rows,), (numel,), guidance=True, old_form="residual"))
    assert launched == [rows] * 2


@pytest.mark.parametrize("dtypes", [name for name in STEP_DTYPES if name != "every latent another"])
@pytest.mark.parametrize("old_form", OLD_FORMS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_dtypes_of_steps(launched, sampler, old_form, dtypes):
    options = {"sampler": sampler, "old_form": old_form, "deterministic": True}
    three_way(gpu_api.step_loss, draw_step((20,), (40_000,), dtypes=STEP_DTYPES[dtypes], **options))
    assert launched == [20]


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("objective", ["dppo", "grpo"])
def test_dtypes_of_means(launched, objective, dtypes):
    for source in ("sample", "sample and old"):
        options = {"objective": OBJECTIVES[objective], "source": source}
        three_way(gpu_api.loss, draw((20,), (40_000,), dtypes=DTYPES[dtypes], **options))
    assert launched == [20] * 2


@pytest.mark.parametrize("numel", [520, 70_000])
def test_bits_of_the_cpu_backend(numel):
    arguments, keep = mask_cells(numel)
    mine = run(gpu_api.loss, arguments)
    assert torch.equal(mine["keep"], keep)
    equal_bits(mine, run(flowdppo_ops.loss, arguments))


@pytest.mark.parametrize("upstream", [1.0, 1 / 3, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_upstream(monkeypatch, dtype, upstream):
    """Exactly the two kernels' own: the device decides whether anything is left to do."""
    arguments, _ = mask_cells(4096, dtype)
    mine = run(gpu_api.loss, arguments, upstream=upstream)
    monkeypatch.delenv(SWITCH)
    equal_bits(mine, run(gpu_api.loss, arguments, upstream=upstream))


def test_same_bits_run_to_run():
    arguments = moved(draw_step((16,), (262_144,), dtypes=STEP_DTYPES["bfloat16 outputs, float16 policies"]))
    first = forward_and_backward(arguments)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(arguments), first, strict=True))


def test_two_streams_at_once(launched):
    """Two cooperative launches: neither may have some of its blocks resident and wait for the other."""
    arguments = moved(draw_step((16,), (262_144,)))
    wanted = forward_and_backward(arguments)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(forward_and_backward(arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, wanted, strict=True))
    assert len(launched) == 41


def test_cuda_graph(launched):
    """Captured and replayed on other values; the loss's gradient is read at the replay, too."""
    arguments = moved(draw_step((16,), (65_536,)))
    leaf = arguments["model_output"].detach().requires_grad_()
    arguments["model_output"] = leaf
    upstream = torch.ones((), device="cuda")

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        result = flowdppo_ops.step_loss(**arguments)
        return result.loss.detach(), torch.autograd.grad(result.loss, leaf, upstream)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for factor in (1.0, 0.25):
        with torch.no_grad():
            arguments["prev_sample"].add_(0.01)
        upstream.fill_(factor)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(captured, call(), strict=True))
    assert len(launched) == 4


def test_nothing_waits():
    arguments = moved(draw_step((16,), (65_536,)))
    forward_and_backward(arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
