"""Argument checks, on metadata alone: which argument, what came, what was wanted.

Nothing here reads a value (that would synchronise a GPU) or allocates. The same checks serve PyTorch and NumPy: a
`Family` names the array type and the dtypes it may have. Shapes: *rows* are the shape of `advantages`; *latents* are
the rows followed by any latent dimensions; a *row vector* is a number, or an array that broadcasts to the rows from
the left, with the rank of the rows or of the latents.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

from .objectives import FlowDPPO, FlowGRPO, GRPOGuard, check_option

DENSITIES = ("gaussian", "cps")
LATENT_REDUCTIONS = ("mean", "sum")
REDUCTIONS = ("mean", "sum", "none", "kept_mean")
SAMPLERS = ("flow_sde", "dance_sde", "cps")


class Family(NamedTuple):
    """An array library: its type, how that type is called, and `dtype -> name` for the dtypes allowed."""

    type: type
    name: str
    dtypes: dict[Any, str]


class Checked(NamedTuple):
    """What a call's shapes say."""

    row_shape: tuple[int, ...]
    rows: int
    numel: int  # latent elements per row, 0 when no latents were given
    latents: tuple[str, ...]  # those that will be read
    double: bool  # arithmetic in float64


def check_array(where: str, family: Family, name: str, value: Any) -> None:
    if not isinstance(value, family.type):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a {family.name}")
    if value.dtype not in family.dtypes:
        wanted = ", ".join(family.dtypes.values())
        raise TypeError(f"{where}: {name} has dtype {value.dtype}, wanted one of {wanted}")


def check_same_device(where: str, name: str, value: Any, like_name: str, like: Any) -> None:
    if value.device != like.device:
        raise ValueError(f"{where}: {name} is on {value.device}, wanted {like.device}, where {like_name} is")


def check_shape(where: str, name: str, value: Any, shape: tuple[int, ...], of: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, wanted {shape}, that of {of}")


def check_row_vector(
    where: str,
    family: Family,
    name: str,
    value: Any,
    like_name: str,
    like: Any,
    row_shape: tuple[int, ...],
    latent_rank: int | None,
) -> None:
    """`value`: a number, or an array of rank 0, of the rank of the rows, or of the rank of the latents."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return
    if not isinstance(value, family.type):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a number or a {family.name}")
    check_array(where, family, name, value)
    check_same_device(where, name, value, like_name, like)
    shape = tuple(value.shape)
    if not shape or shape == row_shape:
        return
    leading, trailing = shape[: len(row_shape)], shape[len(row_shape) :]
    rank_fits = not trailing or latent_rank is None or len(shape) == latent_rank
    fits = len(leading) == len(row_shape) and all(
        have in (1, want) for have, want in zip(leading, row_shape, strict=True)
    )
    if not (fits and rank_fits and all(n == 1 for n in trailing)):
        latent = "" if latent_rank is None else f", or rank {latent_rank} with trailing ones"
        raise ValueError(
            f"{where}: {name} has shape {shape}, wanted a number or a shape that broadcasts to the rows {row_shape} "
            f"dimension by dimension (rank {len(row_shape)}{latent})"
        )


def check_objective(where: str, objective: Any) -> None:
    if not isinstance(objective, (FlowDPPO, FlowGRPO, GRPOGuard)):
        raise TypeError(
            f"{where}: objective is a {type(objective).__name__}, wanted a FlowDPPO, FlowGRPO or GRPOGuard instance"
        )


def check_process_group(where: str, process_group: Any) -> None:
    if process_group is not None:
        raise ValueError(f"{where}: process_group is {process_group!r}, wanted None: sharded latents are not supported")


def check_rows(where: str, family: Family, advantages: Any) -> tuple[int, ...]:
    check_array(where, family, "advantages", advantages)
    row_shape = tuple(advantages.shape)
    if 0 in row_shape:
        raise ValueError(f"{where}: advantages has shape {row_shape}, wanted at least one row")
    return row_shape


def check_latents(where: str, family: Family, leader: str, latents: dict[str, Any], row_shape: tuple[int, ...]) -> int:
    """All of `latents` are arrays of one shape on one device, rows first; returns the elements of a row."""
    like = latents[leader]
    check_array(where, family, leader, like)
    shape = tuple(like.shape)
    if shape[: len(row_shape)] != row_shape:
        raise ValueError(
            f"{where}: {leader} has shape {shape}, wanted the rows {row_shape} first, then the latent dimensions"
        )
    numel = 1
    for n in shape[len(row_shape) :]:
        numel *= n
    if numel == 0:
        raise ValueError(f"{where}: {leader} has shape {shape}, wanted at least one latent element per row")
    for name, value in latents.items():
        if name != leader:
            check_array(where, family, name, value)
            check_shape(where, name, value, shape, leader)
            check_same_device(where, name, value, leader, like)
    return numel


def require(where: str, name: str, value: Any, why: str) -> None:
    if value is None:
        raise ValueError(f"{where}: {name} is None, wanted a value: {why}")


def check_loss(
    where: str,
    family: Family,
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
) -> Checked:
    """The contract of `flowdppo_ops.loss`."""
    check_objective(where, objective)
    check_option(where, "density", density, DENSITIES)
    check_option(where, "latent_reduction", latent_reduction, LATENT_REDUCTIONS)
    check_option(where, "reduction", reduction, REDUCTIONS)
    if isinstance(ref_kl_weight, bool) or not isinstance(ref_kl_weight, Real):
        raise TypeError(f"{where}: ref_kl_weight is a {type(ref_kl_weight).__name__}, wanted a number")
    if isinstance(objective, FlowDPPO) and objective.kl_space != "latent":
        raise ValueError(f"{where}: kl_space is {objective.kl_space!r}, wanted 'latent': only step_loss sees velocities")
    row_shape = check_rows(where, family, advantages)

    # Which log-prob source, and what it needs.
    if (prev_sample is None) == (log_prob is None):
        came = "neither" if prev_sample is None else "both"
        raise ValueError(f"{where}: got {came} of prev_sample and log_prob, wanted exactly one")
    if log_prob is not None:
        require(where, "old_log_prob", old_log_prob, "it is compared with log_prob")
    guard, has_ref = isinstance(objective, GRPOGuard), ref_kl_weight != 0
    needs_kl = guard or isinstance(objective, FlowDPPO)
    if prev_sample is not None or needs_kl or has_ref:
        require(where, "prev_sample_mean", prev_sample_mean, "the statistics are taken from it")
        if not (isinstance(objective, FlowGRPO) and prev_sample is None and ref_std is not None):
            require(where, "std", std, "the standard deviation of the transition")
    if needs_kl or (prev_sample is not None and old_log_prob is None):
        require(where, "old_prev_sample_mean", old_prev_sample_mean, "the mean of the old policy")
    if guard:
        require(where, "sqrt_dt", sqrt_dt, "GRPOGuard rescales by sqrt(-dt)")
    if has_ref:
        require(where, "ref_prev_sample_mean", ref_prev_sample_mean, "ref_kl_weight is not 0")

    # What is read. A mean that nothing needs is read for the KL, as long as there is all that KL takes.
    reads_old = old_prev_sample_mean is not None and prev_sample_mean is not None and std is not None
    latents = {"prev_sample_mean": prev_sample_mean}
    if reads_old:
        latents["old_prev_sample_mean"] = old_prev_sample_mean
    if prev_sample is not None:
        latents["prev_sample"] = prev_sample
    if has_ref:
        latents["ref_prev_sample_mean"] = ref_prev_sample_mean
    if len(latents) == 1:  # log-probs alone
        latents, numel, latent_rank = {}, 0, None
        if prev_sample_mean is not None:
            latent_rank = getattr(prev_sample_mean, "ndim", None)
    else:
        numel = check_latents(where, family, "prev_sample_mean", latents, row_shape)
        latent_rank = prev_sample_mean.ndim
        check_same_device(where, "advantages", advantages, "prev_sample_mean", prev_sample_mean)

    for name, value in (("log_prob", log_prob), ("old_log_prob", old_log_prob)):
        if value is not None:
            check_array(where, family, name, value)
            check_shape(where, name, value, row_shape, "advantages")
            check_same_device(where, name, value, "advantages", advantages)
    vectors = (("std", std), ("sqrt_dt", sqrt_dt), ("weights", weights), ("ref_std", ref_std))
    for name, value in vectors:
        if value is not None:
            check_row_vector(where, family, name, value, "advantages", advantages, row_shape, latent_rank)

    wide = [*latents.values(), log_prob, old_log_prob]
    double = any(v is not None and family.dtypes[v.dtype] == "float64" for v in wide)
    return Checked(row_shape, _size(row_shape), numel, tuple(latents), double)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
