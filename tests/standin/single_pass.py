"""The single pass, from `loss` and `step_loss` on, as scenarios.py: one function each, run by `harness.run` by name."""

from __future__ import annotations

import os
import sys
from functools import partial

from flowdppo_ops import _native
from standin.emulated import on_gpu
from standin.harness import Driver
from standin.scenarios import MULTIPROCESSORS, OPTIONS, SCHEDULE, KiB, arrays_at, problem, refused

SWITCH = "FLOWDPPO_OPS_SINGLE_PASS"
SINGLE, BACKWARD, FORWARD = "policy_loss_single_", "policy_loss_backward_", "policy_loss_forward_"


def switched_on():
    """The driver; loss and step_loss take the single pass from now on."""
    os.environ[SWITCH] = "1"
    return Driver(), on_gpu()


def names(driver: Driver) -> list[str]:
    return [launch.name for launch in driver.launches()]


def parity() -> None:
    """One launch for loss and gradient, and one that finds nothing left to do; the workspace is as it was."""
    driver, cuda = switched_on()
    from cases import OBJECTIVES, draw, mask_cells
    from parity import equal_bits, run, three_way

    from flowdppo_ops import loss

    calls = [
        {"objective": OBJECTIVES[name], "source": s} for name in ("dppo", "grpo") for s in ("sample", "sample and old")
    ]
    calls += [{"reduction": reduction, "latent_reduction": "sum", "weights": True} for reduction in ("mean", "sum")]
    for numel in (520, 4096, 70_000):
        for call in calls:
            three_way(loss, draw((3,), (numel,), **call))
            assert names(driver) == [SINGLE + "f32", BACKWARD + "f32"]
    arguments, keep = mask_cells(1000)
    assert (run(loss, arguments)["keep"] == keep).all()
    arguments = draw((20,), (30_000,))
    equal_bits(run(loss, arguments), run(loss, arguments))
    assert not cuda._tickets[0, 0].any()


def step_parity() -> None:
    driver, cuda = switched_on()
    from parity import run, three_way
    from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, draw_step, step_mask_cells

    from flowdppo_ops import step_loss

    for sampler in SAMPLERS:
        for number, old_form in enumerate(OLD_FORMS):
            options = {
                "sampler": sampler,
                "old_form": old_form,
                "guidance": number % 2 == 1,
                "deterministic": number == 2,
            }
            three_way(step_loss, draw_step((5,), (5000,), **options))
    for name, dtypes in STEP_DTYPES.items():
        driver.log()
        three_way(step_loss, draw_step((5,), (5000,), dtypes=dtypes, guidance=True))
        assert names(driver)[0].startswith(FORWARD if name == "every latent another" else SINGLE), name
    for old_form in OLD_FORMS:
        arguments, keep = step_mask_cells(1000, old_form)
        assert (run(step_loss, arguments)["keep"] == keep).all()
    arguments = draw_step((2, 3), (4, 2000), guidance=True)  # a schedule that broadcasts, one output that is trained
    arguments |= {name: arguments[name][:1].clone() for name in ("sigma", "noise_level")} | {"sigma_next": 0.25}
    three_way(step_loss, arguments)
    driver.log()
    arguments["uncond_output"].requires_grad_()
    step_loss(**arguments).loss.backward()
    assert names(driver) == [SINGLE + "step_f32", BACKWARD + "step_f32"]
    assert arguments["model_output"].grad is None
    assert not cuda._tickets[0, 0].any()


def gradients_of_any_upstream() -> None:
    """Exactly the two kernels' own, whatever the loss is multiplied with, and as often as it is asked for."""
    driver, _ = switched_on()
    import torch
    from cases import DTYPES, mask_cells
    from parity import equal_bits, run

    from flowdppo_ops import loss

    for dtype in ("float32", "bfloat16"):
        arguments, _ = mask_cells(1000, DTYPES[dtype]["*"])
        for upstream in (1.0, 1 / 3, 65536.0, float("inf")):
            mine = run(loss, arguments, upstream=upstream)
            del os.environ[SWITCH]
            equal_bits(mine, run(loss, arguments, upstream=upstream))
            os.environ[SWITCH] = "1"
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = loss(**arguments)
    driver.log()
    first, second = (torch.autograd.grad(result.loss, mean, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    assert [launch.parameters.formed for launch in driver.launches()] == [1, 0]


def what_takes_two_launches() -> None:
    """Whatever has more than one coefficient a row, or rows that a single pass cannot keep or cut."""
    driver, _ = switched_on()
    import torch
    from cases import DTYPES, OBJECTIVES, draw
    from parity import three_way
    from torch import distributed

    from flowdppo_ops import loss

    calls = [{"objective": OBJECTIVES["guard"]}, {"ref_kl_weight": 0.5}, {"source": "log_prob"}]
    calls += [{"reduction": reduction} for reduction in ("none", "kept_mean")]
    calls += [{"dtypes": DTYPES["every latent another"]}]
    calls += [{"latent_shape": (numel,)} for numel in (8, 512, 1001, 300_000)]
    for call in calls:
        driver.log()
        three_way(loss, draw(**{"row_shape": (3,), "latent_shape": (1000,)} | call))
        assert FORWARD in names(driver)[0], call

    arguments = draw((3,), (1000,))
    arguments["prev_sample"] = torch.empty(3001)[1:].view(3, 1000).copy_(arguments["prev_sample"])
    driver.log()
    three_way(loss, arguments)  # 4 bytes off a multiple of 16
    loss(**draw((3,), (1000,)))  # nobody wants a gradient
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    arguments = draw((3,), (1000,))
    arguments["prev_sample_mean"].requires_grad_()
    loss(**arguments, process_group=distributed.group.WORLD)
    del os.environ[SWITCH]
    loss(**arguments)
    assert not any(SINGLE in name for name in names(driver))


def grids() -> None:
    """Two blocks on each multiprocessor, half of its shared memory each, less what is not theirs."""
    driver = Driver()
    arrays = arrays_at(("float32", None, None, "float32", "float32", None))
    room = 13 * 2048  # 228 KiB / 2, less 6
    for rows, numel, splits, blocks in (
        (3, 520, 1, 3), (20, 4104, 2, 8), (20, 16_384, 2, 8), (3, 70_000, 8, 8), (1, 8 * room, 8, 8), (2, 16_384, 4, 8)
    ):  # fmt: skip
        assert _native.policy_loss_single_workspace_cuda((0, 0), arrays, None, rows, numel) == (
            4 * rows * splits, 2 * rows + 1, False
        )  # fmt: skip
        single(rows=rows, numel=numel)
        (launch,) = driver.launches()
        assert (launch.blocks, launch.threads, launch.shared) == (blocks, 256, 4 * room), (rows, numel, launch.blocks)
        assert (launch.parameters.forward.splits, launch.parameters.room) == (splits, room)
        assert (launch.parameters.grad_output, launch.parameters.grad_uncond) == (1 << 24, 0)
    assert _native.policy_loss_single_workspace_cuda((0, 0), arrays, None, 1, 8 * room + 8) is None


def single(
    target=(0, 0),
    rows=3,
    numel=600,
    dtypes=None,
    schedule=None,
    objective=None,
    options=OPTIONS,
    partials=None,
    tickets=None,
    grad_at=1 << 24,
):
    arguments = problem(rows, numel, dtypes, None, schedule, objective, options)
    workspace = partials or (64 * KiB, 1 << 20), tickets or (80 * KiB, 2 * rows + 1)
    gradients = (grad_at, dtypes[0] if dtypes else "float32"), None
    _native.policy_loss_forward_cuda(target, *arguments, (32 * KiB, 48 * KiB), gradients, None, *workspace)


def every_entry_point() -> None:
    """All kernels that the launcher names are in the image, with parameters of its size."""
    driver = Driver()
    f32, bf16, f16 = "float32", "bfloat16", "float16"
    mixes = [(f32, f32, f32), (bf16, bf16, bf16), (f16, f16, f16)]
    means = [(f32, None, None, anchors, anchors, None) for anchors in (bf16, f16)]
    means += [(o, None, None, s, p, None) for o, s, p in mixes]
    for dtypes in means:
        single(dtypes=dtypes)
    for outputs, samples, policies in [*mixes, *((bf16, f32, policies) for policies in (f32, bf16, f16))]:
        single(dtypes=(outputs, None, samples, samples, policies, None), schedule=SCHEDULE)
    seen = {launch.name: len(bytes(launch.parameters)) for launch in driver.launches()}
    assert seen == {name: size for name, size in _native.cuda_entry_points() if name.startswith(SINGLE)}


def bad_arguments() -> None:
    """Python asks first; whoever does not is refused."""
    driver = Driver()
    from flowdppo_ops import GRPOGuard

    f32, bf16 = "float32", "bfloat16"
    refused(ValueError, partial(single, numel=601), "a single pass for these latents")
    refused(ValueError, partial(single, dtypes=(f32, None, None, bf16, f32, None)), "a single pass for these latents")
    refused(ValueError, partial(single, grad_at=(1 << 24) + 8), "a single pass for these latents")
    refused(ValueError, partial(single, dtypes=(f32, None, None, f32, f32, f32)), "a coefficient")
    refused(ValueError, partial(single, options=("gaussian", "mean", "kept_mean", 0.0)), "a coefficient")
    refused(ValueError, partial(single, objective=GRPOGuard()), "a coefficient")
    refused(ValueError, partial(single, partials=(64 * KiB, 11)), "partials has 11 elements, wanted 12")
    refused(ValueError, partial(single, tickets=(80 * KiB, 6)), "tickets has 6 elements, wanted 7")
    assert driver.launches() == []
    driver.fail("cuLaunchCooperativeKernel", 720)
    refused(RuntimeError, single, "cuLaunchCooperativeKernel", "COOPERATIVE_LAUNCH_TOO_LARGE", "flowdppo_ops.reference")


def small_shared_memory() -> None:
    """Of a GPU with 100 KiB a multiprocessor."""
    driver = Driver()
    single(numel=4096)
    (launch,) = driver.launches()
    assert launch.shared == 4 * 5 * 2048
    arrays = arrays_at(("float32", None, None, "float32", "float32", None))
    longest = MULTIPROCESSORS * 2 * 5 * 2048
    for numel, takes in ((longest, True), (longest + 8, False)):
        assert (_native.policy_loss_single_workspace_cuda((0, 0), arrays, None, 1, numel) is not None) == takes


def captured() -> None:
    """Tickets of its own for a graph."""
    driver, cuda = switched_on()
    from cases import draw

    from flowdppo_ops import loss

    stream = driver.stream()
    cuda.target = lambda tensor: (0, stream)
    arguments = draw((3,), (1000,))
    arguments["prev_sample_mean"].requires_grad_()
    loss(**arguments)
    kept = cuda._tickets[0, stream].data_ptr()
    driver.capture(stream, True)
    loss(**arguments)
    driver.capture(stream, False)
    eager, graph = (launch.parameters.forward.tickets for launch in driver.launches())
    assert eager == kept != graph
    assert cuda._tickets[0, stream].data_ptr() == kept


if __name__ == "__main__":
    globals()[sys.argv[1]]()
