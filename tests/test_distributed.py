"""Latents sharded over real processes, and metrics over data-parallel ones.

A shard's call must give the numbers of the whole: `parity.close` compares them with the unsharded float64 reference,
and allows twice the error of the unsharded call of the same implementation.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import CELLS, DTYPES, LAYOUTS, OBJECTIVES, VARIANTS, draw, mask_cells
from cases import LATENTS as MEANS
from parity import close, equal_bits, far_from_ties, is_step, leaves, run, same_bits, scales, widen
from ranks import Ranks
from step_cases import LATENTS as STEP_LATENTS
from step_cases import REF_FORMS, SAMPLERS, STEP_DTYPES, STEP_OBJECTIVES, draw_step
from torch import Tensor, distributed

import flowdppo_ops
from flowdppo_ops import FlowGRPO, PolicyLoss, _native, reference
from flowdppo_ops.result import METRICS

LATENTS = {*MEANS, *STEP_LATENTS}
SOURCES = ("sample", "sample and old", "log_prob")
REDUCTIONS = ("mean", "sum", "none", "kept_mean")
# Elements of the sharded dimension by rank: uneven, of 7 altogether.
SHARDS = {2: (5, 2), 3: (1, 4, 2)}
LATENT_SHAPE = (7, 5)

implementation = pytest.mark.parametrize("functions", [flowdppo_ops, reference], ids=["fused", "reference"])
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By size; started by the first call."""
    found = {size: Ranks(size, tmp_path_factory.mktemp("worlds")) for size in SHARDS}
    yield found
    for world in found.values():
        world.close()


@pytest.fixture(params=SHARDS, ids=lambda size: f"{size} ranks")
def ranks(request, worlds) -> Ranks:
    return worlds[request.param]


@pytest.fixture(scope="module")
def three(worlds) -> Ranks:
    return worlds[3]


# ---- what runs on the ranks ------------------------------------------------------------------------------------------


def on_shard(loss, arguments: dict[str, Any], sizes: tuple[int, ...], dim: int) -> dict[str, Any]:
    world = distributed.group.WORLD
    return run(loss, shard(arguments, sizes, dim, distributed.get_rank()) | {"process_group": world})


def shard(arguments: dict[str, Any], sizes: tuple[int, ...], dim: int, rank: int) -> dict[str, Any]:
    """One rank's part of the latents, and all of the rest."""
    return {
        name: value.split(sizes, dim)[rank] if name in LATENTS and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


# ---- the whole, from its shards --------------------------------------------------------------------------------------


def sharded(ranks: Ranks, loss, arguments: dict[str, Any], sizes=None, dim=None) -> dict[str, Any]:
    """What the ranks give together: the numbers, which all have alike, and the gradients end to end. By default the
    first latent dimension is sharded."""
    sizes = sizes or SHARDS[ranks.size]
    dim = arguments["advantages"].ndim if dim is None else dim
    return joined(ranks(on_shard, loss, arguments, sizes, dim), dim)


def joined(shards: list[dict[str, Any]], dim: int) -> dict[str, Any]:
    ends = {f"grad {name}" for name in LATENTS}
    first, *others = ({name: value for name, value in part.items() if name not in ends} for part in shards)
    for other in others:
        equal_bits(first, other)
    return first | {name: torch.cat([part[name] for part in shards], dim) for name in shards[0].keys() & ends}


def as_unsharded(mine: dict[str, Any], loss, arguments: dict[str, Any]) -> None:
    """Asserts the policy of `parity`, with the unsharded call as the peer."""
    truth_loss = reference.step_loss if is_step(arguments) else reference.loss
    whole, truth = run(loss, arguments), run(truth_loss, widen(arguments))
    scale = scales(widen(arguments), truth)
    assert mine.keys() == whole.keys()
    assert torch.equal(mine["keep"], truth["keep"])
    for name in mine.keys() - {"keep", "metrics"}:
        close(name, mine[name], whole[name], truth[name], scale.get(name))
    assert mine["metrics"].keys() == whole["metrics"].keys()
    for name, value in mine["metrics"].items():
        three = (torch.tensor(v, dtype=torch.float64) for v in (value, whole["metrics"][name], truth["metrics"][name]))
        close(f"metrics {name}", *three, scale.get(f"metrics {name}"), eps_of=whole["ratio"].dtype)


# ---- loss ------------------------------------------------------------------------------------------------------------


@implementation
@objectives
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
def test_loss(ranks, functions, objective, source, latent_reduction):
    for density, reduction in itertools.product(("gaussian", "cps"), REDUCTIONS):
        arguments = draw(
            (12,),
            LATENT_SHAPE,
            source=source,
            objective=objective,
            density=density,
            latent_reduction=latent_reduction,
            reduction=reduction,
            weights=reduction in ("sum", "none"),
            ref_kl_weight=0.5 if reduction in ("mean", "none") else 0.0,
        )
        assert far_from_ties(arguments)
        mine = sharded(ranks, functions.loss, arguments)
        assert 0 < mine["keep"].sum() < mine["keep"].numel()
        as_unsharded(mine, functions.loss, arguments)


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_variants(ranks, objective):
    for source in SOURCES:
        arguments = draw((12,), LATENT_SHAPE, source=source, objective=objective, weights=True)
        as_unsharded(sharded(ranks, flowdppo_ops.loss, arguments), flowdppo_ops.loss, arguments)


@implementation
@objectives
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_dtypes(ranks, functions, objective, dtypes):
    arguments = draw((12,), LATENT_SHAPE, objective=objective, dtypes=dtypes, weights=True, ref_kl_weight=0.5)
    mine = sharded(ranks, functions.loss, arguments)
    assert mine["grad prev_sample_mean"].dtype == arguments["prev_sample_mean"].dtype
    as_unsharded(mine, functions.loss, arguments)


@pytest.mark.parametrize("layout", [name for name, (_, latent) in LAYOUTS.items() if latent])
def test_any_dimension_may_be_sharded(three, layout):
    row_shape, latent_shape = LAYOUTS[layout]
    arguments = draw(row_shape, latent_shape)
    for dim, size in enumerate(latent_shape, start=len(row_shape)):
        if size >= 3:
            mine = sharded(three, flowdppo_ops.loss, arguments, (1, size - 2, 1), dim)
            as_unsharded(mine, flowdppo_ops.loss, arguments)


def test_shards_of_many_chunks(ranks):
    """Of 32768 elements: the threads' own split lies elsewhere in a shard than in the whole."""
    arguments = draw((3,), (70_001,))
    sizes = {2: (70_000, 1), 3: (3, 33_001, 36_997)}[ranks.size]
    as_unsharded(sharded(ranks, flowdppo_ops.loss, arguments, sizes), flowdppo_ops.loss, arguments)


@implementation
def test_every_mask_cell_is_exact(ranks, functions):
    """Dyadic numbers, whose sums are exact: a threshold that is met exactly by the whole is met by its shards."""
    arguments, keep = mask_cells(8)
    sizes = {2: (5, 3), 3: (1, 5, 2)}[ranks.size]
    mine, whole = sharded(ranks, functions.loss, arguments, sizes), run(functions.loss, arguments)
    equal_bits(mine, whole)
    assert mine["keep"].tolist() == keep.tolist()
    on_threshold = [kl == "at" for kl, _, _ in CELLS]
    assert (mine["kl"] == arguments["objective"].kl_mask_threshold).tolist() == on_threshold


@implementation
@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
def test_on_policy_is_exact(ranks, functions, latent_reduction):
    arguments = draw((4,), LATENT_SHAPE, latent_reduction=latent_reduction)
    arguments["old_prev_sample_mean"] = arguments["prev_sample_mean"]
    mine = sharded(ranks, functions.loss, arguments)
    assert mine["ratio"].tolist() == [1.0] * 4
    assert mine["kl"].tolist() == [0.0] * 4


@implementation
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_shards_nonfinite_value_is_every_ranks(ranks, functions, value):
    arguments = draw((12,), LATENT_SHAPE)
    arguments["prev_sample_mean"][3, -1, 0] = value  # in the last rank's shard
    mine, whole = sharded(ranks, functions.loss, arguments), run(functions.loss, arguments)
    assert mine["metrics"]["nonfinite_fraction"] == whole["metrics"]["nonfinite_fraction"] > 0
    for name in ("log_prob", "log_ratio", "ratio", "kl", "keep", "loss", "grad prev_sample_mean"):
        ours, theirs = mine[name].double(), whole[name].double()
        assert same_bits(ours.isnan(), theirs.isnan()).all(), name
        assert same_bits(ours.isinf() * ours.sign(), theirs.isinf() * theirs.sign()).all(), name


# ---- step_loss -------------------------------------------------------------------------------------------------------


@implementation
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("old_form", ["mean", "output", "residual"])
@pytest.mark.parametrize("guidance", [False, True], ids=["", "guidance"])
def test_steps(ranks, functions, sampler, old_form, guidance):
    for objective, latent_reduction in itertools.product(OBJECTIVES.values(), ("mean", "sum")):
        arguments = draw_step(
            (12,),
            LATENT_SHAPE,
            sampler=sampler,
            old_form=old_form,
            guidance=guidance,
            objective=objective,
            latent_reduction=latent_reduction,
        )
        mine = sharded(ranks, functions.step_loss, arguments)
        assert 0 < mine["keep"].sum() < mine["keep"].numel()
        as_unsharded(mine, functions.step_loss, arguments)


@pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)
@pytest.mark.parametrize("ref_form", REF_FORMS)
def test_step_options(ranks, objective, ref_form):
    for reduction, old_log_prob in itertools.product(REDUCTIONS, (False, True)):
        arguments = draw_step(
            (2, 6),
            LATENT_SHAPE,
            objective=objective,
            old_form="output",
            ref_form=ref_form,
            guidance=True,
            weights=True,
            old_log_prob=old_log_prob,
            reduction=reduction,
        )
        as_unsharded(sharded(ranks, flowdppo_ops.step_loss, arguments), flowdppo_ops.step_loss, arguments)


@pytest.mark.parametrize("dtypes", STEP_DTYPES.values(), ids=STEP_DTYPES)
def test_step_dtypes(ranks, dtypes):
    arguments = draw_step((12,), LATENT_SHAPE, old_form="residual", ref_form="output", guidance=True, dtypes=dtypes)
    as_unsharded(sharded(ranks, flowdppo_ops.step_loss, arguments), flowdppo_ops.step_loss, arguments)


def test_step_float64(ranks):
    arguments = widen(draw_step((12,), LATENT_SHAPE, old_form="residual", ref_form="output", guidance=True))
    as_unsharded(sharded(ranks, flowdppo_ops.step_loss, arguments), flowdppo_ops.step_loss, arguments)


@implementation
@objectives
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_deterministic_rows(ranks, functions, objective, sampler):
    arguments = draw_step(
        (12,), LATENT_SHAPE, sampler=sampler, objective=objective, ref_form="mean", deterministic=True
    )
    as_unsharded(sharded(ranks, functions.step_loss, arguments), functions.step_loss, arguments)


# ---- around the call -------------------------------------------------------------------------------------------------


def compiled_on_shard(loss, arguments: dict[str, Any], sizes: tuple[int, ...], backend: str) -> dict[str, Any]:
    mine = shard(arguments, sizes, 1, distributed.get_rank()) | {"process_group": distributed.group.WORLD}
    wanted = leaves(mine)

    def call(*tensors: Tensor):
        result = loss(**mine | dict(zip(wanted, tensors, strict=True)))
        return result.loss, result.log_prob, result.log_ratio, result.ratio, result.kl, result.keep

    torch._dynamo.reset()
    tensors = [mine[name].detach().requires_grad_() for name in wanted]
    value, *rows = torch.compile(call, fullgraph=True, backend=backend)(*tensors)
    gradients = torch.autograd.grad(value, tensors)
    out = {"loss": value.detach()} | dict(zip(("log_prob", "log_ratio", "ratio", "kl", "keep"), rows, strict=True))
    return out | {f"grad {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


@pytest.mark.slow
@implementation
@pytest.mark.parametrize("of", ["loss", "log_prob", "step_loss"])
def test_compiled(three, functions, of):
    """The same bits as without, from the graph's own collective."""
    if of == "step_loss":
        arguments, loss = draw_step((12,), LATENT_SHAPE, guidance=True), functions.step_loss
    else:
        source = "sample" if of == "loss" else of
        arguments, loss = draw((12,), LATENT_SHAPE, source=source, ref_kl_weight=0.5), functions.loss
    mine = joined(three(compiled_on_shard, loss, arguments, SHARDS[3], "aot_eager"), 1)
    eager = sharded(three, loss, arguments)
    equal_bits(mine, {name: value for name, value in eager.items() if name != "metrics"})


def collectives(loss, arguments: dict[str, Any], sizes: tuple[int, ...], compiled: bool) -> list[list]:
    """Of a forward, of a backward, of `metrics()`, and of `metrics(group)`: name and elements of each."""
    group = distributed.group.WORLD
    mine = shard(arguments, sizes, 1, distributed.get_rank()) | {"process_group": group}
    for name in leaves(mine):
        mine[name] = mine[name].detach().requires_grad_()
    torch._dynamo.reset()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    call(**mine)  # compiles
    found = []

    def watched(work):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            done = work()
        events = [event for event in profile.events() if event.name.startswith("gloo:")]
        found.append([(event.name, *itertools.chain(*event.input_shapes)) for event in events])
        return done

    result = watched(lambda: call(**mine))
    watched(lambda: result.loss.backward())
    watched(lambda: result.metrics())
    watched(lambda: result.metrics(group=group))
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_collective(three, compiled):
    """Of 4 numbers a row and the count of elements; none in the backward."""
    rows = 12
    wanted = [[("gloo:all_reduce", 4 * rows + 1)], [], [], [("gloo:all_gather", len(METRICS) + 1)]]
    for arguments, loss in (
        (draw((rows,), LATENT_SHAPE), flowdppo_ops.loss),
        (draw((rows,), LATENT_SHAPE, source="log_prob", ref_kl_weight=0.5), flowdppo_ops.loss),
        (draw_step((rows,), LATENT_SHAPE, guidance=True, ref_form="output"), flowdppo_ops.step_loss),
    ):
        assert three(collectives, loss, arguments, SHARDS[3], compiled) == [wanted] * 3


def test_log_probs_alone_need_no_collective(three):
    arguments = draw((12,), LATENT_SHAPE, source="log_prob", objective=OBJECTIVES["grpo"])
    arguments |= dict.fromkeys(("prev_sample_mean", "old_prev_sample_mean", "std"))
    found = three(collectives, flowdppo_ops.loss, arguments, SHARDS[3], False)
    assert [forward for forward, *_ in found] == [[]] * 3
    for functions in (flowdppo_ops, reference):
        equal_bits(sharded(three, functions.loss, arguments), run(functions.loss, arguments))


def without_gradient(loss, arguments: dict[str, Any], sizes: tuple[int, ...]) -> list[Tensor]:
    mine = shard(arguments, sizes, 1, distributed.get_rank()) | {"process_group": distributed.group.WORLD}
    found = []
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found.append(loss(**mine).loss)
    return [value.clone() for value in found]


def test_without_gradient(ranks):
    arguments = draw((12,), LATENT_SHAPE)
    wanted = sharded(ranks, flowdppo_ops.loss, arguments)["loss"]
    for values in ranks(without_gradient, flowdppo_ops.loss, arguments, SHARDS[ranks.size]):
        assert [value.item() for value in values] == [wanted.item()] * 2


def trained(arguments: dict[str, Any], sizes: tuple[int, ...], times: int) -> Tensor:
    """The gradient of a parameter that every latent goes through, averaged over the ranks by PyTorch's DDP."""
    mine = shard(arguments, sizes, 1, distributed.get_rank())
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(5, 5, bias=False))
    with torch.no_grad():
        model.module.weight.copy_(torch.eye(5))
    mean = model(mine.pop("prev_sample_mean"))
    (times * flowdppo_ops.loss(mean, **mine, process_group=distributed.group.WORLD).loss).backward()
    return model.module.weight.grad


def test_average_over_the_shards_wants_the_loss_times_their_number(three):
    """A shard's gradient is that of the loss; a parameter's is the sum over shards, where trainers average."""
    arguments = widen(draw((12,), LATENT_SHAPE))
    arguments["prev_sample_mean"].requires_grad_(False)
    gradient = run(reference.loss, arguments)["grad prev_sample_mean"]
    wanted = torch.einsum("...i,...j->ij", gradient, arguments["prev_sample_mean"])
    linear32 = {name: v.float() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    first, *others = three(trained, linear32, SHARDS[3], 3)
    assert all(torch.equal(first, other) for other in others)
    # Sums of 84 products in float32: an ulp of the largest gradient for each addition is never reached.
    torch.testing.assert_close(first.double(), wanted, rtol=0, atol=84 * 2**-23 * wanted.abs().max().item())


def in_a_subgroup(arguments: dict[str, Any], sizes: tuple[int, ...]) -> Any:
    """Ranks 0 and 2 share the latents; rank 1 is told what it may not do."""
    group = distributed.new_group([0, 2])
    if distributed.get_rank() != 1:
        result = run(
            flowdppo_ops.loss, shard(arguments, sizes, 1, distributed.get_rank() // 2) | {"process_group": group}
        )
        return result
    said = []
    whole = flowdppo_ops.loss(**arguments)
    for call in (
        lambda: flowdppo_ops.loss(**arguments, process_group=group),
        lambda: reference.loss(**arguments, process_group=group),
        lambda: whole.metrics(group=group),
    ):
        with pytest.raises(ValueError, match="this process is not a member") as error:
            call()
        said.append(str(error.value))
    return said


def test_subgroup(three):
    arguments = draw((12,), LATENT_SHAPE, dtypes=DTYPES["float64"])
    first, said, third = three(in_a_subgroup, arguments, (5, 2))
    as_unsharded(joined([first, third], 1), flowdppo_ops.loss, arguments)
    assert said == [
        "flowdppo_ops.loss: process_group is a group that this process is not a member of",
        "flowdppo_ops.loss: process_group is a group that this process is not a member of",
        "PolicyLoss.metrics: group is a group that this process is not a member of",
    ]


# ---- metrics of data-parallel ranks ----------------------------------------------------------------------------------


def of_own_rows(arguments: dict[str, Any], counts: tuple[int, ...], **options: Any) -> tuple[dict[str, float], ...]:
    rank = distributed.get_rank()
    rows = len(arguments["advantages"])
    mine = {
        name: value.split(counts)[rank] if isinstance(value, Tensor) and len(value) == rows else value
        for name, value in arguments.items()
    }
    return flowdppo_ops.loss(**mine).metrics(group=distributed.group.WORLD, **options)


def by_one_call(loss, arguments: dict[str, Any]) -> dict[str, float]:
    return run(loss, arguments)["metrics"]


def as_one_call(ranks: Ranks, arguments: dict[str, Any], counts: tuple[int, ...]) -> dict[str, float]:
    """Asserts that all ranks have the metrics that one call on all rows has, within `parity`'s policy."""
    mine, *others = ranks(of_own_rows, arguments, counts)
    whole = by_one_call(flowdppo_ops.loss, arguments)
    truth = run(reference.loss, widen(arguments))
    scale = scales(widen(arguments), truth)
    assert mine.keys() == whole.keys() == truth["metrics"].keys()
    double = any(value.dtype == torch.float64 for value in arguments.values() if isinstance(value, Tensor))
    for name, value in mine.items():
        for other in others:
            assert other[name] == value or (math.isnan(other[name]) and math.isnan(value)), name
        values = (torch.tensor(v, dtype=torch.float64) for v in (value, whole[name], truth["metrics"][name]))
        close(name, *values, scale.get(f"metrics {name}"), eps_of=torch.float64 if double else torch.float32)
    return mine


ROW_COUNTS = {2: ((11, 1), (5, 7)), 3: ((1, 7, 4), (10, 1, 1))}


@pytest.mark.parametrize(
    "objective", [OBJECTIVES["dppo"], OBJECTIVES["grpo"], VARIANTS["guard own scale"]], ids=["dppo", "grpo", "guard"]
)
def test_metrics_over_ranks(ranks, objective):
    for counts, ref_kl_weight in itertools.product(ROW_COUNTS[ranks.size], (0.0, 0.5)):
        arguments = draw((12,), LATENT_SHAPE, objective=objective, ref_kl_weight=ref_kl_weight)
        mine = as_one_call(ranks, arguments, counts)
        assert mine["ratio_min"] < mine["ratio_mean"] < mine["ratio_max"]
        assert mine["ratio_std"] > 0
        assert ("kl_loss" in mine) == (ref_kl_weight != 0)


def test_metrics_of_a_row_a_rank(ranks):
    as_one_call(ranks, draw((ranks.size,), LATENT_SHAPE), (1,) * ranks.size)


def test_metrics_without_kl(ranks):
    arguments = draw((12,), LATENT_SHAPE, source="log_prob", objective=FlowGRPO(0.02))
    arguments |= dict.fromkeys(("prev_sample_mean", "old_prev_sample_mean", "std"))
    for mine in ranks(of_own_rows, arguments, ROW_COUNTS[ranks.size][0]):
        assert mine.keys() == flowdppo_ops.loss(**arguments).metrics().keys()
        assert not any("kl_new_old" in name for name in mine)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 11])
def test_metrics_of_nonfinite_rows(ranks, value, row):
    arguments = draw((12,), LATENT_SHAPE)
    arguments["prev_sample"][row] = value
    mine = as_one_call(ranks, arguments, ROW_COUNTS[ranks.size][1])
    assert math.isnan(mine["ratio_std"])
    assert mine["nonfinite_fraction"] == pytest.approx(1 / 12)


def test_metrics_of_huge_ratios(ranks):
    """Squares of float64 ratios overflow: to infinity, as in one call, and without an exception."""
    arguments = draw((12,), LATENT_SHAPE, source="log_prob", dtypes=DTYPES["float64"])
    arguments["log_prob"][0] = arguments["old_log_prob"][0] + 600
    whole = by_one_call(flowdppo_ops.loss, arguments)
    for mine in ranks(of_own_rows, arguments, ROW_COUNTS[ranks.size][0]):
        assert mine["ratio_max"] == whole["ratio_max"] > 1e200
        assert mine["ratio_std"] == whole["ratio_std"] == math.inf


def test_metrics_with_prefix(three):
    arguments = draw((12,), LATENT_SHAPE)
    plain, prefixed = (three(with_prefix, arguments, (1, 7, 4), prefix)[0] for prefix in ("", "actor/"))
    assert prefixed == {f"actor/{name}": value for name, value in plain.items()}


def with_prefix(arguments: dict[str, Any], counts: tuple[int, ...], prefix: str) -> dict[str, float]:
    return of_own_rows(arguments, counts, prefix=prefix)


# ---- on GPUs ---------------------------------------------------------------------------------------------------------


def on_gpu_shard(name: str, arguments: dict[str, Any], sizes: tuple[int, ...]) -> dict[str, Any]:
    def loss(**mine: Any) -> PolicyLoss:
        """On the GPU for arguments on the CPU, where the suite compares."""
        moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in mine.items()}
        result = getattr(flowdppo_ops, name)(**moved)
        return PolicyLoss(result.loss.cpu(), result._numbers.cpu(), result._layout)

    return on_shard(loss, arguments, sizes, 1)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not distributed.is_nccl_available(), reason="needs NCCL and two NVIDIA GPUs"
)
@pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)")
def test_nccl(tmp_path):
    ranks = Ranks(2, tmp_path, backend="nccl")
    try:
        for objective in OBJECTIVES.values():
            arguments = draw((12,), (70, 500), objective=objective, ref_kl_weight=0.5)
            as_unsharded(joined(ranks(on_gpu_shard, "loss", arguments, (50, 20)), 1), flowdppo_ops.loss, arguments)
            arguments = draw_step((12,), (70, 500), objective=objective, old_form="residual", guidance=True)
            mine = joined(ranks(on_gpu_shard, "step_loss", arguments, (50, 20)), 1)
            as_unsharded(mine, flowdppo_ops.step_loss, arguments)
    finally:
        ranks.close()
