"""Argument checks, on metadata alone: which argument, what came, what was wanted.

Nothing here reads a value (that would synchronise a GPU) or allocates. The same checks serve PyTorch and NumPy: a
`Family` names the array type and the dtypes it may have. Shapes: *rows* are the shape of `advantages`; *latents* are
the rows followed by any latent dimensions; a *row vector* is a number, or an array that broadcasts to the rows from
the left, with the rank of the rows or of the latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from numbers import Real
from typing import Any, NamedTuple

from .objectives import FlowDPPO, FlowGRPO, GRPOGuard, check_option

DENSITIES = ("gaussian", "cps")
LATENT_REDUCTIONS = ("mean", "sum")
REDUCTIONS = ("mean", "sum", "none", "kept_mean")
SAMPLERS = ("flow_sde", "dance_sde", "cps")


class Family(NamedTuple):
    """An array library: its type, how that type is called, `dtype -> name` for the dtypes allowed, and two moves."""

    type: type
    name: str
    dtypes: dict[Any, str]
    float64: Any
    layout: Any  # the dense one, None where there is no other
    contiguous: Callable[[Any], Any]
    broadcast: Callable[[Any, tuple[int, ...]], Any]
    has_devices: bool


def check_array(where: str, family: Family, name: str, value: Any) -> None:
    if not isinstance(value, family.type):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a {family.name}")
    if value.dtype not in family.dtypes:
        wanted = ", ".join(family.dtypes.values())
        raise TypeError(f"{where}: {name} has dtype {value.dtype}, wanted one of {wanted}")
    if family.layout is not None and value.layout != family.layout:
        raise TypeError(f"{where}: {name} has layout {value.layout}, wanted {family.layout}")


def check_same_device(where: str, family: Family, name: str, value: Any, like_name: str, like: Any) -> None:
    if family.has_devices and value.device != like.device:
        raise ValueError(f"{where}: {name} is on {value.device}, wanted {like.device}, where {like_name} is")


def check_shape(where: str, name: str, value: Any, shape: tuple[int, ...], of: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {tuple(shape)}, that of {of}")


def check_number(where: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a number")
    return float(value)


def check_full_row_vector(where: str, family: Family, name: str, value: Any, advantages: Any) -> Any:
    """`value`: None, or an array of exactly the rows' shape; returned contiguous."""
    if value is None:
        return None
    check_array(where, family, name, value)
    check_shape(where, name, value, advantages.shape, "advantages")
    check_same_device(where, family, name, value, "advantages", advantages)
    return family.contiguous(value)


def check_row_vector(
    where: str,
    family: Family,
    name: str,
    value: Any,
    like_name: str,
    like: Any,
    row_shape: tuple[int, ...],
    latent_rank: int | None,
) -> Any:
    """`value`: None, a number, or an array of rank 0, of the rank of the rows, or of the rank of the latents.

    Returns None, a float, or a contiguous array of which `row_stride` says whose row an element is.
    """
    if value is None or type(value) is float:
        return value
    if not isinstance(value, family.type):
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a number or a {family.name}")
    check_array(where, family, name, value)
    check_same_device(where, family, name, value, like_name, like)
    shape = tuple(value.shape)
    rank = len(row_shape)
    leading, trailing = shape[:rank], shape[rank:]
    rank_fits = not trailing or latent_rank is None or len(shape) == latent_rank
    if not shape or (leading == row_shape and rank_fits and trailing.count(1) == len(trailing)):
        return family.contiguous(value)
    fits = len(leading) == rank and all(have in (1, want) for have, want in zip(leading, row_shape, strict=True))
    if not (fits and rank_fits and trailing.count(1) == len(trailing)):
        latent = "" if latent_rank is None else f", or rank {latent_rank} with trailing ones"
        raise ValueError(
            f"{where}: {name} has shape {shape}, wanted a number or a shape that broadcasts to the rows {row_shape} "
            f"dimension by dimension (rank {rank}{latent})"
        )
    if row_stride(leading, row_shape) is None:
        value = family.broadcast(value.reshape(leading), row_shape)
    return family.contiguous(value)


def row_stride(shape: tuple[int, ...], row_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """`(divide, modulo)`: row `i` has element `(i // divide) % modulo` of a contiguous row vector of this shape.

    One element is (1, 1), one per row (1, rows), [1, S] for rows [B, S] is (1, S), and [B, 1] is (S, B). None where the
    dimensions that vary are not neighbours ([A, 1, C] for rows [A, B, C]); `check_row_vector` writes those out.
    """
    rank = len(row_shape)
    if len(shape) < rank:  # 0-dim
        return 1, 1
    if shape[:rank] == row_shape:
        return 1, prod(row_shape)
    divide = modulo = inner = 1  # inner: the rows of the dimensions behind
    for have, rows in zip(reversed(shape[:rank]), reversed(row_shape), strict=True):
        if rows == 1:
            continue
        if have == rows:
            if inner != divide * modulo:
                return None
            modulo *= rows
        elif modulo == 1:
            divide *= rows
        inner *= rows
    return (divide, modulo) if modulo > 1 else (1, 1)


def check_objective(where: str, objective: Any) -> None:
    if not isinstance(objective, (FlowDPPO, FlowGRPO, GRPOGuard)):
        raise TypeError(
            f"{where}: objective is a {type(objective).__name__}, wanted a FlowDPPO, FlowGRPO or GRPOGuard instance"
        )


def check_process_group(where: str, name: str, value: Any) -> None:
    """None, or a `torch.distributed.ProcessGroup`; whoever has one has imported torch.distributed."""
    if value is None:
        return
    distributed = sys.modules.get("torch.distributed")
    if isinstance(value, getattr(distributed, "ProcessGroup", ())):
        return
    # What `torch.distributed.new_group` gives to the processes that are not in it, -100: a collective over it does
    # nothing, and says so in a warning.
    outside = getattr(getattr(distributed, "GroupMember", None), "NON_GROUP_MEMBER", None)
    if type(value) is type(outside) and value == outside:
        raise ValueError(f"{where}: {name} is a group that this process is not a member of")
    raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted None or a torch.distributed.ProcessGroup")


def check_rows(where: str, family: Family, advantages: Any) -> tuple[int, ...]:
    check_array(where, family, "advantages", advantages)
    row_shape = tuple(advantages.shape)
    if 0 in row_shape:
        raise ValueError(f"{where}: advantages has shape {row_shape}, wanted at least one row")
    return row_shape


def check_latents(where: str, family: Family, row_shape: tuple[int, ...], latents: dict[str, Any]) -> None:
    """All are arrays of the first one's shape, on its device; rows first, and at least one element each."""
    (leader, like), *others = latents.items()
    check_array(where, family, leader, like)
    shape = like.shape
    if tuple(shape[: len(row_shape)]) != row_shape:
        raise ValueError(
            f"{where}: {leader} has shape {tuple(shape)}, wanted the rows {row_shape} first, then the latent dimensions"
        )
    if 0 in shape:
        raise ValueError(f"{where}: {leader} has shape {tuple(shape)}, wanted at least one latent element per row")
    dtypes, layout, has_devices = family.dtypes, family.layout, family.has_devices
    for name, value in others:
        # All in one condition first: the three checks apart cost 0.4 us a tensor.
        if not (
            isinstance(value, family.type)
            and value.dtype in dtypes
            and value.shape == shape
            and (not has_devices or (value.device == like.device and value.layout == layout))
        ):
            check_array(where, family, name, value)
            check_shape(where, name, value, shape, leader)
            check_same_device(where, family, name, value, leader, like)


def require(where: str, name: str, value: Any, why: str) -> None:
    if value is None:
        raise ValueError(f"{where}: {name} is None, wanted a value: {why}")


class Latents(NamedTuple):
    """`[rows, latent...]` each, contiguous; None where nothing reads it.

    `output` is what the gradient goes to: `prev_sample_mean` of `loss`, `model_output` of `step_loss`, which alone has
    an `uncond_output` and a `sample`. `Schedule` says in which forms `old` and `ref` come; in `loss` they are means.
    """

    output: Any
    uncond_output: Any
    sample: Any
    prev_sample: Any
    old: Any
    ref: Any


class Vectors(NamedTuple):
    """Row vectors: floats, or contiguous arrays, see `row_stride`. The first three are whole: one element per row."""

    advantages: Any
    log_prob: Any
    old_log_prob: Any
    weights: Any
    std: Any
    sqrt_dt: Any
    ref_std: Any


class Schedule(NamedTuple):
    """What turns model outputs into means, and how the other policies are given; row vectors as in `Vectors`."""

    sampler: str
    old_form: str  # "mean", "output" or "residual"; "mean" where there is no old policy
    ref_form: str  # "mean" or "output"; "mean" where there is no reference policy
    sigma: Any
    sigma_next: Any
    noise_level: Any
    sigma_max: Any
    guidance_scale: Any  # None without `uncond_output`


class Settings(NamedTuple):
    """Everything that is no array, in the order of the operator's schema; the first eight are the objective's."""

    objective: str
    low: float
    high: float
    adv_clip_max: float
    mask: str
    kl_divisor: str  # "gaussian" (2 std^2), "constant" (2) or "velocity" (b^2, in `step_loss` only)
    keep_nan_kl: bool
    per_row_scale: bool
    density: str
    latent_reduction: str
    reduction: str
    ref_kl_weight: float


def differentiates_mean(latents: Latents, objective: str) -> bool:
    """Whether the loss depends on the mean, and so on `output`, through more than a KL that is only compared."""
    return latents.prev_sample is not None or latents.ref is not None or objective == "grpo_guard"


class LossCall(NamedTuple):
    """A checked call of `loss`, or of `step_loss`, which has a schedule instead of a std."""

    row_shape: tuple[int, ...]
    latents: Latents
    vectors: Vectors
    schedule: Schedule | None
    settings: Settings
    double: bool  # arithmetic in float64


def check_loss(
    where: str,
    family: Family,
    *,
    prev_sample_mean: Any,
    old_prev_sample_mean: Any,
    advantages: Any,
    std: Any,
    sqrt_dt: Any,
    prev_sample: Any,
    log_prob: Any,
    old_log_prob: Any,
    weights: Any,
    ref_prev_sample_mean: Any,
    ref_kl_weight: Any,
    ref_std: Any,
    objective: Any,
    density: str,
    latent_reduction: str,
    reduction: str,
    process_group: Any,
) -> LossCall:
    """The contract of `flowdppo_ops.loss`: checks its arguments, and brings them into the form of the operator."""
    check_process_group(where, "process_group", process_group)
    check_objective(where, objective)
    check_option(where, "density", density, DENSITIES)
    check_option(where, "latent_reduction", latent_reduction, LATENT_REDUCTIONS)
    check_option(where, "reduction", reduction, REDUCTIONS)
    ref_kl_weight = check_number(where, "ref_kl_weight", ref_kl_weight)
    if getattr(objective, "kl_space", "latent") != "latent":
        raise ValueError(
            f"{where}: kl_space is {objective.kl_space!r}, wanted 'latent': only step_loss sees velocities"
        )
    row_shape = check_rows(where, family, advantages)

    # Which log-prob source, and what is needed with it.
    replay, has_ref = prev_sample is not None, ref_kl_weight != 0
    if replay == (log_prob is not None):
        came = "both" if replay else "neither"
        raise ValueError(f"{where}: got {came} of prev_sample and log_prob, wanted exactly one")
    if not replay:
        require(where, "old_log_prob", old_log_prob, "it is compared with log_prob")
    if replay or has_ref or objective._needs_kl:
        require(where, "prev_sample_mean", prev_sample_mean, "the statistics are taken from it")
        if replay or objective._needs_kl or ref_std is None:
            require(where, "std", std, "the standard deviation of the transition")
    if objective._needs_kl or (replay and old_log_prob is None):
        require(where, "old_prev_sample_mean", old_prev_sample_mean, "the mean of the old policy")
    if objective._needs_sqrt_dt:
        require(where, "sqrt_dt", sqrt_dt, "GRPOGuard rescales by sqrt(-dt)")
    if has_ref:
        require(where, "ref_prev_sample_mean", ref_prev_sample_mean, "ref_kl_weight is not 0")

    # What is read. An old mean that nothing needs is read for the KL, as long as there is all that a KL takes.
    old = old_prev_sample_mean if std is not None and prev_sample_mean is not None else None
    ref = ref_prev_sample_mean if has_ref else None
    if replay or old is not None or ref is not None:
        mean = prev_sample_mean
        given = {"prev_sample_mean": mean}
        if replay:
            given["prev_sample"] = prev_sample
        if old is not None:
            given["old_prev_sample_mean"] = old
        if ref is not None:
            given["ref_prev_sample_mean"] = ref
        check_latents(where, family, row_shape, given)
        check_same_device(where, family, "advantages", advantages, "prev_sample_mean", mean)
        latent_rank = mean.ndim
    else:  # log-probs alone
        mean, latent_rank = None, getattr(prev_sample_mean, "ndim", None)
    contiguous = family.contiguous
    latents = Latents(
        None if mean is None else contiguous(mean),
        None,
        None,
        None if prev_sample is None else contiguous(prev_sample),
        None if old is None else contiguous(old),
        None if ref is None else contiguous(ref),
    )
    like = ("advantages", advantages, row_shape, latent_rank)
    vectors = Vectors(
        contiguous(advantages),
        None if log_prob is None else check_full_row_vector(where, family, "log_prob", log_prob, advantages),
        None
        if old_log_prob is None
        else check_full_row_vector(where, family, "old_log_prob", old_log_prob, advantages),
        None if weights is None else check_row_vector(where, family, "weights", weights, *like),
        None if std is None else check_row_vector(where, family, "std", std, *like),
        None if sqrt_dt is None else check_row_vector(where, family, "sqrt_dt", sqrt_dt, *like),
        None if ref_std is None else check_row_vector(where, family, "ref_std", ref_std, *like),
    )
    settings = Settings(*objective._native, density, latent_reduction, reduction, ref_kl_weight)
    float64 = family.float64
    double = False
    for array in (mean, prev_sample, old, ref, log_prob, old_log_prob):
        if array is not None and array.dtype == float64:
            double = True
    return LossCall(row_shape, latents, vectors, None, settings, double)
