"""The kernels of `loss` and `step_loss`, beyond the tests that the CPU backend has too: how rows are cut and where they
begin, the order of blocks and threads, what is not read, shards, and the bits of the CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, OBJECTIVES, draw, mask_cells
from parity import close, equal_bits, leaves, run, scales, specification, three_way, widen
from standin.emulated import on_cpu
from standin.gpu import memory, outputs_off, unreadable
from step_cases import OLD_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step, step_mask_cells
from torch.utils._python_dispatch import TorchDispatchMode

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

FUNCTIONS = {"loss": flowdppo_ops.loss, "step_loss": flowdppo_ops.step_loss}
functions = pytest.mark.parametrize("function", FUNCTIONS)
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
# A warp takes the row, one block, three blocks.
lengths = pytest.mark.parametrize("numel", [40, 700, 8300])


def drawn(function: str, rows: int, numel: int, **options: Any) -> dict[str, Any]:
    """Every latent that can be there at once."""
    options.setdefault("objective", OBJECTIVES["guard"])
    if function == "loss":
        return draw((rows,), (numel,), **{"ref_kl_weight": 0.2} | options)
    return draw_step((rows,), (numel,), **{"ref_form": "output", "guidance": True, "old_form": "residual"} | options)


def latents_of(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if torch.is_tensor(value) and value.ndim == 2]


# ---- how rows are cut ------------------------------------------------------------------------------------------------


@functions
@objectives
@pytest.mark.parametrize(
    ("rows", "numel"), [(3, 1), (9, 63), (2, 64), (5, 130), (3, 513), (3, 4099), (2, 8201), (1, 70_000)]
)
def test_lengths(function, objective, rows, numel):
    """A warp per row with the last block half full, one block, up to 18; of the last one a single element, or none."""
    options = {} if function == "loss" else {"old_form": list(OLD_FORMS)[numel % 3], "guidance": numel % 2 == 0}
    arguments = drawn(function, rows, numel, objective=objective, reduction="kept_mean", **options)
    three_way(FUNCTIONS[function], arguments)


@functions
def test_rows_longer_than_a_run(gpu, function):
    """A block's part of more than 65536 elements, which are summed in several goes."""
    gpu.target = lambda: (1, 0)  # that has no multiprocessor to cut a row for
    three_way(FUNCTIONS[function], drawn(function, 2, 65_536 + 9))


@functions
@objectives
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_rows(function, objective, reduction):
    """More rows than threads in a block: the batch's loops go round."""
    options = {} if function == "loss" else {"deterministic": True}
    three_way(FUNCTIONS[function], drawn(function, 700, 3, objective=objective, reduction=reduction, **options))


@functions
@objectives
@lengths
@pytest.mark.parametrize("kind", ["float32", "mixed"])
def test_same_bits_in_any_order(driver, function, objective, numel, kind):
    dtypes = {"float32": DTYPES["float32"], "mixed": DTYPES["every latent another"]}[kind]
    if function == "step_loss":
        dtypes = STEP_DTYPES["bfloat16 outputs, float16 policies" if kind == "mixed" else kind]
    arguments = drawn(function, 7, numel, dtypes=dtypes, objective=objective, reduction="none")
    driver.shuffle(0)
    natural = run(FUNCTIONS[function], arguments)
    for seed in (1, 100, 200):
        driver.shuffle(seed)
        equal_bits(run(FUNCTIONS[function], arguments), natural)


# ---- where they begin ------------------------------------------------------------------------------------------------


def off(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, from an address so many elements off a multiple of 64 bytes; before them, somebody else's."""
    buffer = tensor.new_full((elements + tensor.numel(),), torch.nan)
    return buffer[elements:].view(tensor.shape).copy_(tensor)


@functions
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 outputs, float16 policies", "mixed"])
@pytest.mark.parametrize("offset", [1, 3, 4, 7])
def test_odd_addresses(function, kind, offset):
    """No base is promised to be a multiple of 16 bytes: each tensor alone, the gradients, and all."""
    dtypes = (DTYPES if function == "loss" else STEP_DTYPES).get("every latent another" if kind == "mixed" else kind)
    if dtypes is None:
        pytest.skip("no such dtypes of means")
    arguments = drawn(function, 2, 200, dtypes=dtypes)
    names = latents_of(arguments)
    for moved in ([], *([name] for name in names), names):
        with outputs_off(offset if len(moved) != 1 else 0):
            three_way(FUNCTIONS[function], arguments | {name: off(arguments[name], offset) for name in moved})


@functions
@pytest.mark.parametrize("numel", [7, 12, 1004, 1008, 4099])
def test_vectors_of_two_lengths(function, numel):
    """Where a dtype's vectors are aligned, those of a shorter one need not be; nor is a gradient's where its latent's
    are."""
    dtypes = {"*": torch.float32, "prev_sample": torch.bfloat16, "uncond_output": torch.float16}
    for offset in (0, 4):
        with outputs_off(offset):
            three_way(FUNCTIONS[function], drawn(function, 3, numel, dtypes=dtypes))


# ---- beside the CPU backend ------------------------------------------------------------------------------------------


@functions
@pytest.mark.parametrize("objective", [*STEP_OBJECTIVES.values(), FlowDPPO(2.0**-5, mask="symmetric")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
@pytest.mark.parametrize("numel", [64, 1024, 8192])
def test_bits_of_the_cpu_backend(function, objective, reduction, numel):
    """Where the sums over the latents are exact, the two backends give the same bits: their row formulas are twins."""
    if function == "loss":
        arguments = mask_cells(numel)[0] | {"sqrt_dt": 0.4}
        if getattr(objective, "kl_space", "latent") == "velocity":
            pytest.skip("an option of `step_loss`")
    else:
        arguments = step_mask_cells(numel, list(OLD_FORMS)[len(reduction) % 3])[0]
    arguments |= {"objective": objective, "reduction": reduction}
    equal_bits(run(FUNCTIONS[function], arguments), on_cpu(run, FUNCTIONS[function], arguments))


def test_clip_limits(gpu):
    """1 - 0.09 rounded to float32 is not 1 - float32(0.09) rounded: ratios there are kept or not as on the CPU."""
    low, high = 0.09, 0.18
    limits = torch.tensor([[1 - low], [1 + high]], dtype=torch.float64).log().float()
    log_prob = (limits + torch.arange(-64, 64) * 2.0**-27).flatten()  # steps of an eighth of the ratio's ulp
    given = {"log_prob": log_prob, "old_log_prob": torch.zeros(256), "objective": FlowGRPO(clip_range=(low, high))}
    given |= {"advantages": torch.tensor([-1.0, 1.0]).repeat_interleave(128)}
    given |= {"prev_sample_mean": None, "old_prev_sample_mean": None}
    keep = [call(flowdppo_ops.loss, **given).keep for call in (on_cpu, lambda f, **options: f(**options))]
    assert torch.equal(*keep), (keep[0] != keep[1]).nonzero()
    assert all(0 < side.sum() < 128 for side in keep[0].view(2, 128))


@pytest.mark.parametrize("reduction", ["mean", "kept_mean", "none"])
@pytest.mark.parametrize("where", [0, 3, 299])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(value, where, reduction):
    """It shows in every metric as in the CPU backend: NaN wins a maximum, in whatever row it is."""
    arguments = {
        "prev_sample_mean": None,
        "old_prev_sample_mean": None,
        "advantages": torch.arange(300) % 3 - 1.0,
        "log_prob": torch.zeros(300),
        "old_log_prob": torch.arange(300) % 4 / 8,
        "reduction": reduction,
        "objective": FlowGRPO(clip_range=0.125),
    }
    arguments["log_prob"][where] = value
    equal_bits(run(flowdppo_ops.loss, arguments), on_cpu(run, flowdppo_ops.loss, arguments))


def test_an_infinite_upstream_gradient_leaves_blocked_rows_alone():
    """A GradScaler that overflowed: 0 * inf would make NaN of what was blocked."""
    arguments, keep = mask_cells(64)
    mine = run(flowdppo_ops.loss, arguments, upstream=float("inf"))
    assert (mine["grad prev_sample_mean"][~keep] == 0).all()
    equal_bits(mine, on_cpu(run, flowdppo_ops.loss, arguments, upstream=float("inf")))


def test_an_infinite_old_mean_in_a_clipped_row_leaves_the_penalty():
    """The drift has no coefficient there: the old mean is not read, so no 0 * inf beside the reference term."""
    objective = GRPOGuard(clip_range=0.01, per_row_scale=True)
    arguments = draw((4,), (40,), source="log_prob", objective=objective, ref_kl_weight=0.5)
    arguments["advantages"] = torch.ones(4)
    arguments["old_prev_sample_mean"][1, 7] = float("inf")
    mine = run(flowdppo_ops.loss, arguments)
    mean, ref_mean = (arguments[name][1].double() for name in ("prev_sample_mean", "ref_prev_sample_mean"))
    wanted = 0.5 * (mean - ref_mean) / (arguments["ref_std"][1].double() ** 2 * 40 * 4)
    assert not mine["keep"][1]
    assert (mine["grad prev_sample_mean"][1] - wanted).abs().max() <= 2e-7 * wanted.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@lengths
def test_on_policy_is_exact(sampler, dtype, numel):
    """Equal model outputs: the ratio is exactly 1 and the KL exactly 0, whatever the roundings of the mean."""
    for objective in STEP_OBJECTIVES.values():
        arguments = draw_step((6,), (numel,), sampler=sampler, old_form="output", objective=objective)
        arguments["model_output"] = arguments["model_output"].to(dtype)
        arguments["old_model_output"] = arguments["model_output"].float()
        result = flowdppo_ops.step_loss(**arguments)
        assert (result.ratio == 1).all()
        assert (result.kl == 0).all()


# ---- what is done, and what is not -----------------------------------------------------------------------------------


def backward_without(function: str, arguments: dict[str, Any], hidden: Callable[[str], bool]) -> list[torch.Tensor]:
    """Gradients of a call whose backward must not read the latents that are `hidden`."""
    for name in latents_of(arguments):
        arguments[name] = memory(*arguments[name].shape, dtype=arguments[name].dtype).copy_(arguments[name])
    wanted = [arguments[name].requires_grad_() for name in leaves(arguments)]
    result = FUNCTIONS[function](**arguments)
    with unreadable(arguments[name] for name in latents_of(arguments) if hidden(name)):
        return list(torch.autograd.grad(result.loss.sum(), wanted))


@functions
@lengths
def test_blocked_rows_are_not_read(function, numel):
    options = {"objective": FlowDPPO(kl_mask_threshold=0.0, mask="symmetric"), "reduction": "none"}
    options |= {"ref_kl_weight": 0.0} if function == "loss" else {"ref_form": None}
    for gradient in backward_without(function, drawn(function, 4, numel, **options), lambda name: True):
        assert (gradient == 0).all()


@functions
@pytest.mark.parametrize("objective", ["dppo", "grpo"])
def test_the_backward_does_not_read_the_old_policy(function, objective):
    """But for GRPO-Guard, whose drift has a gradient."""
    for old_form in OLD_FORMS if function == "step_loss" else ("mean",):
        options = {} if function == "loss" else {"old_form": old_form}
        arguments = drawn(function, 4, 700, objective=OBJECTIVES[objective], **options)
        gradients = backward_without(function, arguments, lambda name: name.startswith("old_"))
        assert all(gradient.any() for gradient in gradients)


class Watching(TorchDispatchMode):
    """Counts what is made as large as latents."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= 4096:
                self.made.append(function)
        return out


@functions
def test_two_launches_and_the_gradients_alone(driver, function):
    arguments = drawn(function, 3, 4096)
    driver.log()
    run(FUNCTIONS[function], arguments)
    launched = [launch.name for launch in driver.launches()]
    variant = "f32" if function == "loss" else "step_f32"
    assert launched == [f"policy_loss_forward_{variant}", f"policy_loss_backward_{variant}"]
    wanted = [arguments[name].requires_grad_() for name in leaves(arguments)]
    with Watching() as watching:
        torch.autograd.grad(FUNCTIONS[function](**arguments).loss, wanted)
    assert watching.made == [torch.ops.flowdppo_ops.policy_loss_backward.default] * len(wanted)


@functions
def test_float64_is_refused(function):
    """Of latents; row vectors may have it."""
    arguments = drawn(function, 3, 40)
    name = latents_of(arguments)[0]
    with pytest.raises(TypeError, match=f"{name} has dtype float64.* on a GPU"):
        FUNCTIONS[function](**arguments | {name: arguments[name].double()})
    FUNCTIONS[function](**arguments | {"advantages": arguments["advantages"].double()})


# ---- sharded latents -------------------------------------------------------------------------------------------------


@functions
@pytest.mark.parametrize("sizes", [(3, 600, 400), (1, 40, 9000), (700,)], ids=str)
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
@objectives
def test_shards_add_up(driver, group, monkeypatch, function, objective, latent_reduction, sizes):
    """Uneven shards, their sums added as a collective adds them: each has the loss of the whole and its part of the
    gradient, in three launches."""
    options = {"objective": objective, "latent_reduction": latent_reduction, "reduction": "none"}
    arguments = drawn(function, 9, sum(sizes), **options)
    names = latents_of(arguments)
    shards = [arguments | {n: arguments[n].split(sizes, 1)[at].contiguous() for n in names} for at in range(len(sizes))]
    collected: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: collected.append(sums.clone()))
    for shard in shards:
        FUNCTIONS[function](**shard, process_group=group)
    total = torch.stack(collected).sum(0)
    assert total[-1] == sum(sizes)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums, group: sums.copy_(total))
    driver.log()
    parts = [run(lambda **given: FUNCTIONS[function](**given, process_group=group), shard) for shard in shards]
    assert len(driver.launches()) == 3 * len(sizes)
    for part in parts[1:]:
        equal_bits({"loss": part["loss"]}, {"loss": parts[0]["loss"]})
    mine = parts[0] | {n: torch.cat([part[n] for part in parts], -1) for n in parts[0] if n.startswith("grad ")}
    eager, truth = (run(specification(arguments), each) for each in (arguments, widen(arguments)))
    scale = scales(widen(arguments), truth)
    assert torch.equal(mine["keep"], truth["keep"])
    for name in mine.keys() - {"keep", "metrics"}:
        close(name, mine[name], eager[name], truth[name], scale.get(name))
    if len(sizes) == 1:
        whole = run(FUNCTIONS[function], arguments)
        equal_bits({name: mine[name] for name in ("loss", "ratio")}, {name: whole[name] for name in ("loss", "ratio")})
