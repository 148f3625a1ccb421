"""Launches every kernel of the package in every mix of dtypes, at small awkward sizes, and checks what comes out.

    python tests/every_kernel.py [--count]

No pytest and no large tensors: for compute-sanitizer, which slows each launch down (`make sanitize`). Every result is
compared with float64, by the suite's policy. `--count` has the profiler say which kernels ran, and fails if one of the
package's never did; a run of its own, since a profiler and a sanitizer cannot watch one process.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import cases
import gpu_api
import sde_step_cases
import step_cases
import torch
from cases import OBJECTIVES, VARIANTS, draw, mask_cells
from parity import run, three_way
from step_cases import OLD_FORMS, REF_FORMS, SAMPLERS, STEP_OBJECTIVES, draw_step, step_mask_cells
from torch import Tensor, distributed

import flowdppo_ops
from flowdppo_ops import PolicyLoss, _native

Check = tuple[str, Callable[[], object]]

# A warp per row up to 512 elements, then a block, then several, of an even and of an uneven last part.
SIZES = (1, 7, 512, 513, 8195)
ODD_SIZES = (1000, 4099)
SHARDS = (3, 600, 4400)
# Of outputs, samples, and the old and the reference policy (with `sde_step` the residual).
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = tuple(itertools.product(FLOATS, repeat=3))
REDUCTIONS = ("mean", "sum", "none", "kept_mean")
LATENTS = {*cases.LATENTS, *step_cases.LATENTS, "noise"}


def named(mix: tuple[torch.dtype, ...]) -> str:
    return " ".join(str(dtype).removeprefix("torch.") for dtype in mix)


# ---- loss and step_loss ----------------------------------------------------------------------------------------------


def loss_dtypes(mix: tuple[torch.dtype, ...]) -> dict[str, torch.dtype]:
    means = "prev_sample_mean", "prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean"
    return {"*": torch.float32} | dict(zip(means, (*mix, mix[2]), strict=True))


def step_dtypes(mix: tuple[torch.dtype, ...]) -> dict[str, torch.dtype]:
    outputs, samples, policies = mix
    out = {"*": torch.float32, "model_output": outputs, "uncond_output": outputs, "sample": samples}
    return out | {"prev_sample": samples} | dict.fromkeys((*OLD_FORMS.values(), *REF_FORMS.values()), policies)


def of_loss() -> Iterator[Check]:
    def check(name: str, **options: Any) -> Check:
        return f"loss, {name}", lambda: three_way(gpu_api.loss, draw(**options))

    # The backward of FlowDPPO reads no old policy, that of GRPO-Guard does.
    objectives = itertools.cycle([OBJECTIVES["dppo"], OBJECTIVES["guard"]])
    for seed, (numel, mix) in enumerate(itertools.product(SIZES, MIXES)):
        options = {"objective": next(objectives), "ref_kl_weight": 0.5 * (seed % 3 == 0), "seed": seed}
        yield check(
            f"{numel} of {named(mix)}", row_shape=(5,), latent_shape=(numel,), dtypes=loss_dtypes(mix), **options
        )
    for objective, source, reduction in itertools.product(
        OBJECTIVES, ("sample", "sample and old", "log_prob"), REDUCTIONS
    ):
        options = {"weights": True, "ref_kl_weight": 0.5 * (source != "sample"), "reduction": reduction}
        yield check(
            f"{objective} from {source}, {reduction}", objective=OBJECTIVES[objective], source=source, **options
        )
    for name, objective in (OBJECTIVES | VARIANTS).items():
        for density, latent_reduction in itertools.product(("gaussian", "cps"), ("mean", "sum")):
            options = {"density": density, "latent_reduction": latent_reduction, "objective": objective}
            yield check(f"{name}, {density}, {latent_reduction}", **options)
    yield check("every latent another", dtypes=cases.DTYPES["every latent another"], ref_kl_weight=0.5)
    for rows in (1, 7, 9, 257):
        yield check(f"{rows} rows", row_shape=(rows,), objective=OBJECTIVES["guard"])
    alone = draw(source="log_prob", objective=OBJECTIVES["grpo"])
    alone |= dict.fromkeys(("prev_sample_mean", "old_prev_sample_mean", "std"))
    yield "loss, log-probs alone", lambda: three_way(gpu_api.loss, alone)
    for numel in (40, 4097):
        yield f"loss, mask cells of {numel}", partial(masks, gpu_api.loss, *mask_cells(numel))


def of_step_loss() -> Iterator[Check]:
    def check(name: str, **options: Any) -> Check:
        return f"step_loss, {name}", lambda: three_way(gpu_api.step_loss, draw_step(**options))

    objectives = itertools.cycle([STEP_OBJECTIVES["dppo"], STEP_OBJECTIVES["guard"]])
    forms = itertools.cycle(itertools.product(OLD_FORMS, (None, *REF_FORMS)))
    for seed, (numel, mix) in enumerate(itertools.product(SIZES, MIXES)):
        old_form, ref_form = next(forms)
        options = {"old_form": old_form, "ref_form": ref_form, "guidance": seed % 2 == 0, "objective": next(objectives)}
        options |= {"row_shape": (5,), "latent_shape": (numel,), "dtypes": step_dtypes(mix), "seed": seed}
        yield check(f"{numel} of {named(mix)}, {old_form}, {ref_form}", **options)
    every = itertools.product(SAMPLERS, OLD_FORMS, STEP_OBJECTIVES)
    for seed, (sampler, old_form, objective) in enumerate(every):
        options = {"guidance": seed % 2 == 0, "deterministic": seed % 3 == 0, "ref_form": (None, *REF_FORMS)[seed % 3]}
        options |= {"reduction": REDUCTIONS[seed % 4], "weights": True, "objective": STEP_OBJECTIVES[objective]}
        yield check(f"{sampler}, {old_form}, {objective}", sampler=sampler, old_form=old_form, **options)
    yield check("no old policy", old_form=None, objective=STEP_OBJECTIVES["grpo"])
    yield check("every latent another", dtypes=step_cases.STEP_DTYPES["every latent another"], guidance=True)
    for old_form, numel in itertools.product(OLD_FORMS, (40, 4097)):
        cells = step_mask_cells(numel, old_form)
        yield f"step_loss, mask cells of {numel}, {old_form}", partial(masks, gpu_api.step_loss, *cells)
    for wanted in ("model_output", "uncond_output"):
        yield f"step_loss, the gradient of {wanted} alone", partial(one_gradient, wanted)


def masks(loss: Callable[..., PolicyLoss], arguments: dict[str, Any], keep: Tensor) -> None:
    assert torch.equal(run(loss, arguments)["keep"], keep)


def one_gradient(wanted: str) -> None:
    arguments = draw_step((3,), (600,), guidance=True, ref_form="output")
    both = run(gpu_api.step_loss, arguments)
    arguments[wanted] = arguments[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(gpu_api.step_loss(**arguments).loss, arguments[wanted])
    assert torch.equal(gradient, both[f"grad {wanted}"])


# ---- odd addresses ---------------------------------------------------------------------------------------------------


def at_odd_addresses(function: Callable[..., Any]) -> Callable[..., Any]:
    """Each latent begins at another odd number of elements into its memory, with NaN before and behind it."""

    def call(**arguments: Any) -> Any:
        arguments = dict(arguments)
        latents = [name for name in arguments if name in LATENTS]
        for at, name in enumerate(latents):
            value = arguments[name]
            memory = torch.full((value.numel() + 16,), torch.nan, dtype=value.dtype, device=gpu_api.DEVICE)
            view = memory[2 * at + 1 :][: value.numel()].view(value.shape)
            arguments[name] = view.copy_(value)
        return function(**arguments)

    return call


def of_odd_addresses() -> Iterator[Check]:
    for numel, mix in itertools.product(ODD_SIZES, MIXES):
        name = f"{numel} of {named(mix)} at odd addresses"
        means = draw((3,), (numel,), dtypes=loss_dtypes(mix), objective=OBJECTIVES["guard"], ref_kl_weight=0.5)
        yield f"loss, {name}", partial(three_way, at_odd_addresses(gpu_api.loss), means)
        options = {"guidance": True, "ref_form": "mean", "old_form": "residual", "objective": STEP_OBJECTIVES["guard"]}
        steps = draw_step((3,), (numel,), dtypes=step_dtypes(mix), **options)
        yield f"step_loss, {name}", partial(three_way, at_odd_addresses(gpu_api.step_loss), steps)
        drawn = sde_step_cases.draw((3, numel), dtypes=sde_dtypes(mix), guidance=True, residual=True)
        yield f"sde_step, {name}", partial(sde_step_cases.three_way, at_odd_addresses(gpu_api.sde_step), drawn)


# ---- shards ----------------------------------------------------------------------------------------------------------


def in_shards(function: Callable[..., PolicyLoss]) -> Callable[..., PolicyLoss]:
    """What ranks get that hold a shard of every row each: their sums are added here, as a collective adds them."""

    def call(**arguments: Any) -> PolicyLoss:
        latents = [name for name in arguments if name in LATENTS]
        shards = [
            arguments | {name: arguments[name].split(SHARDS, -1)[at] for name in latents} for at in range(len(SHARDS))
        ]
        collected: list[Tensor] = []
        given = {"process_group": distributed.group.WORLD}
        with patch.object(distributed, "all_reduce", lambda sums, group: collected.append(sums.clone())):
            for shard in shards:
                function(**shard, **given)
        total = sum(collected)
        assert total[-1] == sum(SHARDS)
        with patch.object(distributed, "all_reduce", lambda sums, group: sums.copy_(total)):
            results = [function(**shard, **given) for shard in shards]
        first, *others = results
        # The loss of one, and the gradients of all.
        value = first.loss + sum(other.loss - other.loss.detach() for other in others)
        assert all(torch.equal(other._numbers, first._numbers) for other in others)
        return PolicyLoss(value, first._numbers, first._layout)

    return call


def of_shards() -> Iterator[Check]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    shape = (4,), (sum(SHARDS),)
    for seed, mix in enumerate(MIXES):
        guard = seed % 2 == 0
        means = draw(*shape, dtypes=loss_dtypes(mix), objective=OBJECTIVES["guard" if guard else "dppo"], seed=seed)
        yield f"loss, shards of {named(mix)}", partial(three_way, in_shards(gpu_api.loss), means)
        options = {"objective": STEP_OBJECTIVES["guard" if guard else "velocity"], "guidance": True, "seed": seed}
        steps = draw_step(*shape, dtypes=step_dtypes(mix), old_form=list(OLD_FORMS)[seed % 3], **options)
        yield f"step_loss, shards of {named(mix)}", partial(three_way, in_shards(gpu_api.step_loss), steps)
    distributed.destroy_process_group()


# ---- sde_step --------------------------------------------------------------------------------------------------------


def sde_dtypes(mix: tuple[torch.dtype, ...]) -> dict[str, torch.dtype]:
    outputs, samples, residual = mix
    return {"*": samples, "model_output": outputs, "uncond_output": outputs, "residual": residual}


def of_sde_step() -> Iterator[Check]:
    def check(
        name: str, *given: Any, through: tuple[str, ...] = ("log_prob", "prev_sample_mean"), **options: Any
    ) -> Check:
        arguments = sde_step_cases.draw(*given, **options)
        return f"sde_step, {name}", lambda: sde_step_cases.three_way(gpu_api.sde_step, arguments, through=through)

    samplers = itertools.cycle(SAMPLERS)
    for seed, (numel, mix) in enumerate(itertools.product(SIZES, MIXES)):
        options = {"guidance": seed % 3 > 0, "residual": seed % 4 > 0, "replay": seed % 2 == 0, "seed": seed}
        yield check(f"{numel} of {named(mix)}", (5, numel), dtypes=sde_dtypes(mix), sampler=next(samplers), **options)
    for name, given in sde_step_cases.LAYOUTS.items():
        yield check(name, *given, guidance=True, residual=True)
    another = sde_step_cases.DTYPES["every latent another"]
    for replay, through in itertools.product((False, True), ("log_prob", "prev_sample_mean")):
        options = {"replay": replay, "through": (through,), "guidance": True, "residual": True}
        yield check(f"{'replay' if replay else 'drawn'} through {through}", (3, 600), dtypes=another, **options)


# ---- all of them -----------------------------------------------------------------------------------------------------


def every_check() -> Iterator[Check]:
    return itertools.chain(of_loss(), of_step_loss(), of_odd_addresses(), of_shards(), of_sde_step())


def failures(checks: Iterable[Check]) -> tuple[int, list[str]]:
    """How many were made, and what was wrong. What is no wrong answer, an error of the driver say, ends it all."""
    made, wrong = 0, []
    for name, check in checks:
        made += 1
        try:
            check()
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
        except BaseException:
            print(f"in the check of {name}:", file=sys.stderr)
            raise
    return made, wrong


def never_launched(launched: Iterable[str]) -> list[str]:
    """The entry points that are not among the names of launched kernels; prints how often the others were."""
    count = Counter(launched)
    names = [name for name, _ in _native.cuda_entry_points()]
    for name in names:
        print(f"{count[name]:6} {name}")
    return [name for name in names if not count[name]]


def profiled(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What `work` returns, and the names of what ran on the GPU meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = work()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return result, [event.name for event in profile.events() if event.device_type == on_device]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="every_kernel", description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="fail if a kernel was never launched; needs the profiler")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, f"every_kernel: torch {torch.__version__} finds no usable CUDA device\n")
    if not _native.cuda_images():
        parser.exit(2, "every_kernel: built without kernels (FLOWDPPO_KERNELS=none)\n")
    print(f"flowdppo_ops {flowdppo_ops.__version__} on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    start = time.monotonic()
    work = partial(failures, every_check())
    missing: list[str] = []
    if args.count:
        (made, wrong), launched = profiled(work)
        missing = never_launched(launched)
    else:
        made, wrong = work()
    print(f"{made} checks in {time.monotonic() - start:.0f} s")
    for line in wrong:
        print(f"WRONG  {line}")
    for name in missing:
        print(f"NEVER LAUNCHED  {name}")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
