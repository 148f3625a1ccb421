"""From `flowdppo_ops.loss` and `step_loss` on, through the stand-in driver to emulated kernels, as scenarios.py: one
function each, run by `harness.run` by name."""

from __future__ import annotations

import sys
from itertools import product

from flowdppo_ops import FlowGRPO
from standin.gpu import on_gpu
from standin.harness import Driver
from standin.scenarios import refused


def parity() -> None:
    """The results of `loss` are within the suite's tolerance, and the masks the same; the workspace is as it was."""
    driver, gpu = Driver(), on_gpu()
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
    (tickets,) = gpu.tickets
    assert not tickets.any()


def step_parity() -> None:
    """The same of `step_loss`, in two launches and with nothing of the latents' size beside the gradients."""
    driver, _ = Driver(), on_gpu()
    from parity import equal_bits, run, three_way
    from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells

    from flowdppo_ops import step_loss

    calls = []
    for number, (sampler, old_form, objective) in enumerate(product(SAMPLERS, OLD_FORMS, STEP_OBJECTIVES.values())):
        options = {"ref_form": (None, "mean", "output")[number % 3], "guidance": bool(number % 2)}
        calls.append({"sampler": sampler, "old_form": old_form, "objective": objective, **options})
    for reduction, latent_reduction in product(("mean", "sum", "none", "kept_mean"), ("mean", "sum")):
        calls.append({"reduction": reduction, "latent_reduction": latent_reduction, "weights": True})
    calls += [{"dtypes": dtypes, "guidance": True, "ref_form": "output"} for dtypes in STEP_DTYPES.values()]
    calls += [{"dtypes": dtypes, "old_form": "residual"} for dtypes in STEP_DTYPES.values()]
    calls += [{"deterministic": True, "objective": o} for o in STEP_OBJECTIVES.values()]
    calls += [{"latent_shape": (numel,), "old_form": "output"} for numel in (1, 7, 512, 513, 4096, 4097, 65_543)]
    for call in calls:
        three_way(step_loss, draw_step(**call))
    for old_form in OLD_FORMS:
        arguments, keep = step_mask_cells(1000, old_form)
        assert (run(step_loss, arguments)["keep"] == keep).all()
    arguments = draw_step((2, 3), (4, 20_000), guidance=True)
    arguments |= {name: arguments[name][:1].clone() for name in ("sigma", "noise_level")}
    arguments["sigma_next"] = 0.25
    equal_bits(three_way(step_loss, arguments), run(step_loss, arguments))
    assert len(driver.launches()) == 2 * (len(calls) + 5)  # a forward and a backward each
    nothing_else_is_allocated()


def nothing_else_is_allocated() -> None:
    """Nor copied: a step allocates its gradients and rows, on the way of the kernels."""
    import torch
    from step_cases import draw_step
    from torch.utils._python_dispatch import TorchDispatchMode

    from flowdppo_ops import step_loss

    latent_sized = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= 4096:
                    latent_sized.append(function)
            return out

    arguments = draw_step((3,), (4096,), guidance=True, ref_form="output", old_form="residual")
    leaves = [arguments[name].requires_grad_() for name in ("model_output", "uncond_output")]
    with Watching():
        torch.autograd.grad(step_loss(**arguments).loss, leaves)
    operator = torch.ops.flowdppo_ops.policy_loss_backward.default
    assert latent_sized == [operator] * 2, latent_sized  # its two gradients


def sharded_parity() -> None:
    """Uneven shards, their sums added as a collective adds them: each has the loss of the whole and its part of the
    gradient, in three launches."""
    driver, _ = Driver(), on_gpu()
    import torch
    from step_cases import STEP_OBJECTIVES, draw_step
    from torch import distributed

    from flowdppo_ops import step_loss

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group, collected = distributed.group.WORLD, []
    for objective in STEP_OBJECTIVES.values():
        arguments = draw_step((9,), (1003,), objective=objective, old_form="residual", reduction="sum")
        latents = [name for name, v in arguments.items() if isinstance(v, torch.Tensor) and v.ndim == 2]
        sizes = 3, 600, 400
        shards = [arguments | {n: arguments[n].split(sizes, 1)[at] for n in latents} for at in range(len(sizes))]
        collected.clear()
        distributed.all_reduce = lambda sums, group: collected.append(sums.clone())
        for shard in shards:
            step_loss(**shard, process_group=group)
        total = sum(collected)
        assert total[-1] == sum(sizes)
        distributed.all_reduce = lambda sums, group, total=total: sums.copy_(total)
        driver.log()
        gradients = []
        for shard in shards:
            leaf = shard["model_output"].detach().requires_grad_()
            result = step_loss(**shard | {"model_output": leaf}, process_group=group)
            gradients += torch.autograd.grad(result.loss, leaf)
        assert len(driver.launches()) == 3 * len(sizes)
        leaf = arguments["model_output"].requires_grad_()
        whole = step_loss(**arguments)
        (gradient,) = torch.autograd.grad(whole.loss, leaf)
        driver.log()
        assert torch.equal(result.keep, whole.keep)
        torch.testing.assert_close(result.loss, whole.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            torch.cat(gradients, 1), gradient, rtol=1e-6, atol=1e-7 * gradient.abs().max().item()
        )


def clip_limits() -> None:
    """1 - 0.09 rounded to float32 is not 1 - float32(0.09) rounded: ratios there are kept or not as on the CPU."""
    Driver()
    gpu = on_gpu()
    import torch

    from flowdppo_ops import loss

    low, high = 0.09, 0.18
    limits = torch.tensor([[1 - low], [1 + high]], dtype=torch.float64).log().float()
    log_prob = (limits + torch.arange(-64, 64) * 2.0**-27).flatten()  # steps of an eighth of the ratio's ulp
    advantages = torch.tensor([-1.0, 1.0]).repeat_interleave(128)
    arguments = {"log_prob": log_prob, "old_log_prob": torch.zeros(256)}
    keep = []
    for target in (gpu.target, lambda: None):
        gpu.target = target
        keep.append(loss(None, None, advantages, **arguments, objective=FlowGRPO(clip_range=(low, high))).keep)
    assert torch.equal(*keep), (keep[0] != keep[1]).nonzero()
    assert all(0 < side.sum() < 128 for side in keep[0].view(2, 128))


def kept_tickets() -> None:
    """Kept per stream and grown; never those of a capture, nor of a call through the dispatcher."""
    driver = Driver()
    stream = driver.stream()
    gpu = on_gpu(0, stream)
    from cases import draw
    from torch.utils._python_dispatch import TorchDispatchMode

    from flowdppo_ops import loss

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def used(rows: int = 4) -> int:
        """The address that a call gave to its kernel."""
        loss(**draw((rows,), (6,)))
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
    globals()[sys.argv[1]]()
