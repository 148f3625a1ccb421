"""Argument checks, on metadata alone: which argument, what came, what was wanted.

Nothing here reads a value (that would synchronise a GPU) or allocates. The same checks serve PyTorch and NumPy: a
`Family` names the array type and the dtypes it may have. Shapes: *rows* are the shape of `advantages`; *latents* are
the rows followed by any latent dimensions; a *row vector* is a number, or an array that broadcasts to the rows from
the left, with the rank of the rows or of the latents.

The native module remembers calls that passed (`src/boundary/memo.rs`) by the types, dtypes, shapes, devices and options
of their arguments, and by which numbers are 0: a check must not depend on anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

from ._native import DENSITIES, LATENT_REDUCTIONS, REDUCTIONS, SAMPLERS
from .objectives import FlowDPPO, FlowGRPO, GRPOGuard, check_option

Arguments = dict[str, Any]  # of a public function, by name


class Call(NamedTuple):
    """A checked call: what the operator takes, by the names of `src/call.rs`."""

    where: str  # the public function, for messages
    row_shape: tuple[int, ...]
    fields: Arguments  # latents and row vectors that are read; none is None
    settings: Arguments
    objective: Any = None  # of the losses, and so is the next
    process_group: Any = None
    generator: Any = None  # of `sde_step`


class Family(NamedTuple):
    """An array library: its type, how that type is called, and `dtype -> name` for the dtypes allowed."""

    type: type
    name: str
    dtypes: dict[Any, str]
    float64: Any
    layout: Any  # the dense one, None where there is no other
    has_devices: bool
    expand: Callable[[Any, tuple[int, ...]], Any]  # an array and a shape that it broadcasts to


def check_array(where: str, family: Family, name: str, value: Any) -> None:
    if not isinstance(value, family.type):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a {family.name}")
    if value.dtype not in family.dtypes:
        wanted = ", ".join(family.dtypes.values())
        raise TypeError(f"{where}: {name} has dtype {value.dtype}, wanted one of {wanted}")
    if family.layout is not None and (value.layout != family.layout or value.is_nested):
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{where}: {name} has layout {layout}, wanted {family.layout}")


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
    return as_float(where, name, value)


def as_float(where: str, name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: {name} is a whole number beyond float64, wanted a float64") from None


def check_full_row_vector(where: str, family: Family, name: str, value: Any, advantages: Any) -> None:
    """`value`: None, or an array of exactly the rows' shape."""
    if value is None:
        return
    check_array(where, family, name, value)
    check_shape(where, name, value, advantages.shape, "advantages")
    check_same_device(where, family, name, value, "advantages", advantages)


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
    """`value`: None, a number, or an array of rank 0, of the rank of the rows, or of the rank of the latents. Returned,
    or a view that the native module can index: one where the dimensions that vary are neighbours."""
    if value is None or type(value) is float:
        return value
    if not isinstance(value, family.type):
        if isinstance(value, Real) and not isinstance(value, bool):
            as_float(where, name, value)
            return value
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a number or a {family.name}")
    check_array(where, family, name, value)
    check_same_device(where, family, name, value, like_name, like)
    shape, rank = tuple(value.shape), len(row_shape)
    leading, trailing = shape[:rank], shape[rank:]
    rank_fits = not trailing or latent_rank is None or len(shape) == latent_rank
    fits = len(leading) == rank and all(
        have == want or have == 1 for have, want in zip(leading, row_shape, strict=True)
    )
    if shape and not (fits and rank_fits and all(have == 1 for have in trailing)):
        latent = "" if latent_rank is None else f", or rank {latent_rank} with trailing ones"
        raise ValueError(
            f"{where}: {name} has shape {shape}, wanted a number or a shape that broadcasts to the rows {row_shape} "
            f"dimension by dimension (rank {rank}{latent})"
        )
    varying = [at for at, have in enumerate(leading) if have > 1]
    if varying and any(shape[at] != row_shape[at] for at in range(varying[0], varying[-1])):  # [A, 1, C] of [A, B, C]
        return family.expand(value.reshape(leading), row_shape)
    return value


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
    shape = tuple(like.shape)
    if shape[: len(row_shape)] != row_shape:
        raise ValueError(
            f"{where}: {leader} has shape {shape}, wanted the rows {row_shape} first, then the latent dimensions"
        )
    if 0 in shape:
        raise ValueError(f"{where}: {leader} has shape {shape}, wanted at least one latent element per row")
    for name, value in others:
        check_array(where, family, name, value)
        check_shape(where, name, value, shape, leader)
        check_same_device(where, family, name, value, leader, like)


def require(where: str, name: str, value: Any, why: str) -> None:
    if value is None:
        raise ValueError(f"{where}: {name} is None, wanted a value: {why}")


def _read(given: Arguments, names: tuple[str, ...]) -> Arguments:
    return {name: given[name] for name in names if given[name] is not None}


def _row_vectors(where: str, family: Family, given: Arguments, names: Iterable[str], *like: Any) -> Arguments:
    checked = {name: check_row_vector(where, family, name, given[name], *like) for name in names}
    return {name: value for name, value in checked.items() if value is not None}


def check_loss(where: str, family: Family, given: Arguments) -> Call:
    """The contract of `flowdppo_ops.loss`."""
    process_group, objective = given["process_group"], given["objective"]
    check_process_group(where, "process_group", process_group)
    check_objective(where, objective)
    check_option(where, "density", given["density"], DENSITIES)
    check_option(where, "latent_reduction", given["latent_reduction"], LATENT_REDUCTIONS)
    check_option(where, "reduction", given["reduction"], REDUCTIONS)
    ref_kl_weight = check_number(where, "ref_kl_weight", given["ref_kl_weight"])
    if getattr(objective, "kl_space", "latent") != "latent":
        raise ValueError(
            f"{where}: kl_space is {objective.kl_space!r}, wanted 'latent': only step_loss sees velocities"
        )
    advantages = given["advantages"]
    row_shape = check_rows(where, family, advantages)

    # Which log-prob source, and what is needed with it.
    replay, has_ref = given["prev_sample"] is not None, ref_kl_weight != 0
    if replay == (given["log_prob"] is not None):
        came = "both" if replay else "neither"
        raise ValueError(f"{where}: got {came} of prev_sample and log_prob, wanted exactly one")
    if not replay:
        require(where, "old_log_prob", given["old_log_prob"], "it is compared with log_prob")
    if replay or has_ref or objective._needs_kl:
        require(where, "prev_sample_mean", given["prev_sample_mean"], "the statistics are taken from it")
        if replay or objective._needs_kl or given["ref_std"] is None:
            require(where, "std", given["std"], "the standard deviation of the transition")
    if objective._needs_kl or (replay and given["old_log_prob"] is None):
        require(where, "old_prev_sample_mean", given["old_prev_sample_mean"], "the mean of the old policy")
    if objective._needs_sqrt_dt:
        require(where, "sqrt_dt", given["sqrt_dt"], "GRPOGuard rescales by sqrt(-dt)")
    if has_ref:
        require(where, "ref_prev_sample_mean", given["ref_prev_sample_mean"], "ref_kl_weight is not 0")

    # All latents that are given are checked. An old mean that nothing needs is read for the KL, as long as there is all
    # that a KL takes; a reference mean without a weight is not read.
    mean = given["prev_sample_mean"]
    latents = _read(given, ("prev_sample_mean", "prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean"))
    reads_old = given["std"] is not None and mean is not None
    fields = dict(latents)
    if not has_ref:
        fields.pop("ref_prev_sample_mean", None)
    if not reads_old:
        fields.pop("old_prev_sample_mean", None)
    if latents:
        check_latents(where, family, row_shape, latents)
        leader = next(iter(latents))
        check_same_device(where, family, "advantages", advantages, leader, latents[leader])
    if len(fields) == 1 and not replay:  # log-probs alone: the mean is not read
        fields = {}
    for name in ("log_prob", "old_log_prob"):
        check_full_row_vector(where, family, name, given[name], advantages)
    like = ("advantages", advantages, row_shape, getattr(mean, "ndim", None))
    fields |= _read(given, ("advantages", "log_prob", "old_log_prob"))
    fields |= _row_vectors(where, family, given, ("weights", "std", "sqrt_dt", "ref_std"), *like)
    settings = {
        "sampler": "none",
        "density": given["density"],
        "latent_reduction": given["latent_reduction"],
        "reduction": given["reduction"],
        "ref_kl_weight": ref_kl_weight,
    }
    return Call(where, row_shape, fields, objective._settings | settings, objective, process_group)


_SCHEDULE = ("sigma", "sigma_next", "noise_level", "sigma_max", "guidance_scale")


def _only(where: str, of: str, given: Arguments, names: tuple[str, ...], *, needed: bool) -> None:
    """At most one of `names` is given, and one if it is needed."""
    came = [name for name in names if given[name] is not None]
    if len(came) > 1 or (needed and not came):
        raise ValueError(
            f"{where}: got {' and '.join(came) or 'none'} for the {of} policy, wanted exactly one of {', '.join(names)}"
        )


def _check_guidance(where: str, given: Arguments) -> None:
    if given["uncond_output"] is not None:
        require(where, "guidance_scale", given["guidance_scale"], "uncond_output is given")
    elif given["guidance_scale"] is not None:
        require(where, "uncond_output", None, "guidance_scale is given")


def _check_schedule(where: str, family: Family, given: Arguments, *like: Any) -> Arguments:
    for name in _SCHEDULE:
        if name != "guidance_scale":
            require(where, name, given[name], "a number or a row vector")
    return _row_vectors(where, family, given, _SCHEDULE, *like)


def check_step_loss(where: str, family: Family, given: Arguments) -> Call:
    """The contract of `flowdppo_ops.step_loss`."""
    process_group, objective, sampler = given["process_group"], given["objective"], given["sampler"]
    check_process_group(where, "process_group", process_group)
    check_objective(where, objective)
    check_option(where, "sampler", sampler, SAMPLERS)
    check_option(where, "latent_reduction", given["latent_reduction"], LATENT_REDUCTIONS)
    check_option(where, "reduction", given["reduction"], REDUCTIONS)
    ref_kl_weight = check_number(where, "ref_kl_weight", given["ref_kl_weight"])
    olds = ("old_prev_sample_mean", "old_model_output", "old_residual")
    refs = ("ref_prev_sample_mean", "ref_model_output")
    _only(where, "old", given, olds, needed=objective._needs_kl or given["old_log_prob"] is None)
    _only(where, "reference", given, refs, needed=ref_kl_weight != 0)
    _check_guidance(where, given)
    advantages = given["advantages"]
    row_shape = check_rows(where, family, advantages)
    latents = {name: given[name] for name in ("model_output", "sample", "prev_sample")}
    latents |= _read(given, ("uncond_output", *olds, *refs))
    check_latents(where, family, row_shape, latents)
    check_same_device(where, family, "advantages", advantages, "model_output", given["model_output"])
    check_full_row_vector(where, family, "old_log_prob", given["old_log_prob"], advantages)
    like = ("advantages", advantages, row_shape, given["model_output"].ndim)
    fields = latents | _row_vectors(where, family, given, ("weights", "ref_std"), *like)
    fields |= _check_schedule(where, family, given, *like)
    if ref_kl_weight == 0:  # not read
        for name in refs:
            fields.pop(name, None)
    fields |= _read(given, ("advantages", "old_log_prob"))
    settings = {
        "sampler": sampler,
        "density": "cps" if sampler == "cps" else "gaussian",
        "latent_reduction": given["latent_reduction"],
        "reduction": given["reduction"],
        "ref_kl_weight": ref_kl_weight,
    }
    return Call(where, row_shape, fields, objective._settings | settings, objective, process_group)


def check_sde_step(where: str, family: Family, given: Arguments) -> Call:
    """The contract of `flowdppo_ops.sde_step`. Without `prev_sample` and `noise` the noise is still to be drawn."""
    sampler, generator, row_dims = given["sampler"], given["generator"], given["row_dims"]
    check_option(where, "sampler", sampler, SAMPLERS)
    if given["prev_sample"] is not None and (given["noise"] is not None or generator is not None):
        raise ValueError(f"{where}: got prev_sample and a source of noise, wanted one: replay draws nothing")
    if given["noise"] is not None and generator is not None:
        raise ValueError(f"{where}: got noise and generator, wanted at most one")
    _check_guidance(where, given)
    normalizer = given["log_prob_normalizer"]
    if not isinstance(normalizer, bool):
        raise TypeError(f"{where}: log_prob_normalizer is a {type(normalizer).__name__}, wanted a bool")
    output = given["model_output"]
    check_array(where, family, "model_output", output)
    rank = output.ndim
    if isinstance(row_dims, bool) or not isinstance(row_dims, int) or not 0 <= row_dims <= rank:
        raise ValueError(f"{where}: row_dims is {row_dims!r}, wanted 0 to {rank}, the rank of the latents")
    shape = tuple(output.shape)
    row_shape = shape[:row_dims]
    if 0 in row_shape:
        raise ValueError(f"{where}: model_output has shape {shape}, wanted at least one row")
    latents = {"model_output": output, "sample": given["sample"]}
    latents |= _read(given, ("uncond_output", "prev_sample", "noise"))
    check_latents(where, family, row_shape, latents)
    residual_dtype = given["residual_dtype"]
    if residual_dtype is not None:
        double = any(latent.dtype == family.float64 for latent in latents.values())
        allowed = {dtype: name for dtype, name in family.dtypes.items() if double or dtype != family.float64}
        if not any(residual_dtype is dtype for dtype in allowed):
            raise TypeError(
                f"{where}: residual_dtype is {residual_dtype!r}, wanted one of {', '.join(allowed.values())}"
            )
    fields = latents | _check_schedule(where, family, given, "model_output", output, row_shape, rank)
    settings = {
        "sampler": sampler,
        "log_prob_normalizer": normalizer,
        "residual_dtype": residual_dtype,
        "row_dims": row_dims,
    }
    return Call(where, row_shape, fields, settings, generator=generator)
