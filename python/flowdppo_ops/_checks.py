"""Argument checks. A message says which argument is wrong, what came and what was wanted.

The checks read metadata alone, because reading a value would synchronise a GPU. PyTorch and NumPy share them: a
`Family` holds what differs between the two libraries.

*Rows* have the shape of `advantages`. *Latents* have the shape of the rows, followed by any latent dimensions. A *row
vector* is a number, or an array that broadcasts to the rows from the left and has the rank of the rows or of the
latents.

The native module (`src/boundary/memo.rs`) remembers which calls have passed. It compares the types, dtypes, shapes,
devices and options of the arguments, and whether a number is 0. So a check must not depend on anything else.

`torch.compile` traces these functions. PyTorch 2.6 can trace `{**a, **b}` but not `a | b`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

from ._native import DENSITIES, LATENT_REDUCTIONS, REDUCTIONS, SAMPLERS
from .objectives import FlowDPPO, FlowGRPO, GRPOGuard, check_option

Arguments = dict[str, Any]  # of a public function, by name
Shape = tuple[int, ...]


class Call(NamedTuple):
    """A call that has passed its checks. Its fields and settings have the names of the operator's arguments."""

    where: str  # the name of the public function, for messages
    row_shape: Shape
    fields: Arguments  # latents and row vectors that the operator reads; none is None
    settings: Arguments  # everything else that the operator takes
    objective: Any = None  # of `loss` and `step_loss`
    process_group: Any = None  # of `loss` and `step_loss`
    generator: Any = None  # of `sde_step`


class Family(NamedTuple):
    """An array library, PyTorch or NumPy, as the checks see it."""

    type: type
    name: str  # of the type, for messages
    dtypes: dict[Any, str]  # that an array may have, with their names
    float64: Any
    layout: Any  # that an array must have; None if the library has a single layout
    has_devices: bool
    expand: Callable[[Any, Shape], Any]  # returns a view of an array in a shape that it broadcasts to


class Checks(NamedTuple):
    """Checks of a call of the public function `where` with these `arguments`. Methods take the names of
    arguments."""

    where: str
    family: Family
    arguments: Arguments

    def present(self, *names: str) -> Arguments:
        return {name: self.arguments[name] for name in names if self.arguments[name] is not None}

    def require(self, name: str, why: str) -> None:
        if self.arguments[name] is None:
            raise ValueError(f"{self.where}: {name} is None, wanted a value: {why}")

    def option(self, name: str, allowed: list[str]) -> None:
        check_option(self.where, name, self.arguments[name], allowed)

    def number(self, name: str, wanted: str = "a number") -> float:
        value = self.arguments[name]
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{self.where}: {name} is a {type(value).__name__}, wanted {wanted}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{self.where}: {name} is a whole number beyond float64, wanted a float64") from None

    def array(self, name: str) -> None:
        where, value, family = self.where, self.arguments[name], self.family
        if not isinstance(value, family.type):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a {family.name}")
        if value.dtype not in family.dtypes:
            wanted = ", ".join(family.dtypes.values())
            raise TypeError(f"{where}: {name} has dtype {value.dtype}, wanted one of {wanted}")
        if family.layout is not None and (value.layout != family.layout or value.is_nested):
            layout = "nested" if value.is_nested else value.layout
            raise TypeError(f"{where}: {name} has layout {layout}, wanted {family.layout}")

    def same_device(self, name: str, like: str) -> None:
        came, wanted = self.arguments[name], self.arguments[like]
        if self.family.has_devices and came.device != wanted.device:
            raise ValueError(f"{self.where}: {name} is on {came.device}, wanted {wanted.device}, where {like} is")

    def array_like(self, name: str, like: str) -> None:
        """Checks that `name` is an array of the shape of `like`, on its device."""
        self.array(name)
        came, wanted = tuple(self.arguments[name].shape), tuple(self.arguments[like].shape)
        if came != wanted:
            why = self.more_rows(came, wanted) if like == "advantages" else ""
            raise ValueError(f"{self.where}: {name} has shape {came}, wanted {wanted}, that of {like}{why}")
        self.same_device(name, like)

    def more_rows(self, came: Shape, row_shape: Shape) -> str:
        """For messages. What to change where an argument has more row dimensions than the call, as `[B, S]` log-probs
        beside `[B]` advantages have."""
        rank = max((at for at, size in enumerate(came, 1) if size != 1), default=0)
        leaders = (name for name in ("model_output", "prev_sample_mean") if self.arguments.get(name) is not None)
        leader = next(leaders, None)
        if leader is None or rank <= len(row_shape):
            return ""
        rows = tuple(self.arguments[leader].shape)[:rank]
        if len(rows) < rank or any(size not in (1, row) for size, row in zip(came, rows, strict=False)):
            return ""
        if "row_dims" in self.arguments:
            return f". Are the rows {rows}? Then row_dims={rank}: the default of 1 makes one row per sample"
        return (
            f". Are the rows {rows}, one per sample and step? Then give advantages of that shape: they decide the rows"
        )

    def rows(self) -> Shape:
        """Checks `advantages` and returns its shape, which is that of the rows."""
        self.array("advantages")
        row_shape = tuple(self.arguments["advantages"].shape)
        if 0 in row_shape:
            raise ValueError(f"{self.where}: advantages has shape {row_shape}, wanted at least one row")
        return row_shape

    def latents(self, row_shape: Shape, leader: str, *others: str) -> None:
        """Checks that `leader` has the rows' shape first and at least one element per row, and `others` its shape."""
        self.array(leader)
        shape = tuple(self.arguments[leader].shape)
        if shape[: len(row_shape)] != row_shape:
            wanted = f"the rows {row_shape} first, then the latent dimensions"
            raise ValueError(f"{self.where}: {leader} has shape {shape}, wanted {wanted}")
        if 0 in shape:
            raise ValueError(f"{self.where}: {leader} has shape {shape}, wanted at least one latent element per row")
        for name in others:
            self.array_like(name, leader)

    def row_vector(self, name: str, like: str, row_shape: Shape, latent_rank: int | None) -> Any:
        """Checks a row vector, which may be None, and returns it. The native module finds the element of a row by one
        division and one remainder, so an array whose varying dimensions are not neighbours is expanded to all rows."""
        value = self.arguments[name]
        if value is None:
            return None
        if not isinstance(value, self.family.type):
            self.number(name, f"a number or a {self.family.name}")
            return value
        self.array(name)
        self.same_device(name, like)
        shape, rank = tuple(value.shape), len(row_shape)
        leading, trailing = shape[:rank], shape[rank:]
        rank_fits = not trailing or latent_rank is None or len(shape) == latent_rank
        fits = len(leading) == rank and all(
            have == want or have == 1 for have, want in zip(leading, row_shape, strict=True)
        )
        if shape and not (fits and rank_fits and all(have == 1 for have in trailing)):
            latent = "" if latent_rank is None else f", or rank {latent_rank} with trailing ones"
            raise ValueError(
                f"{self.where}: {name} has shape {shape}, wanted a number or a shape that broadcasts to the rows "
                f"{row_shape} dimension by dimension (rank {rank}{latent}){self.more_rows(shape, row_shape)}"
            )
        varying = [at for at, have in enumerate(leading) if have > 1]
        if varying and any(shape[at] != row_shape[at] for at in range(varying[0], varying[-1])):
            return self.family.expand(value.reshape(leading), row_shape)  # [A, 1, C] for rows [A, B, C]
        return value

    def row_vectors(self, names: Iterable[str], *like: Any) -> Arguments:
        checked = {name: self.row_vector(name, *like) for name in names}
        return {name: value for name, value in checked.items() if value is not None}

    def schedule(self, *like: Any) -> Arguments:
        names = ("sigma", "sigma_next", "noise_level", "sigma_max", "guidance_scale")
        for name in names[:-1]:
            self.require(name, "a number or a row vector")
        return self.row_vectors(names, *like)

    def guidance(self) -> None:
        if self.arguments["uncond_output"] is not None:
            self.require("guidance_scale", "uncond_output is given")
        elif self.arguments["guidance_scale"] is not None:
            self.require("uncond_output", "guidance_scale is given")

    def one_form(self, policy: str, names: tuple[str, ...], *, needed: bool, unless: str = "") -> None:
        """Checks that at most one of `names` is given, and exactly one if it is `needed`. `unless`: when it is not."""
        came = list(self.present(*names))
        if len(came) > 1 or (needed and not came):
            listed, wanted = " and ".join(came) or "none", ", ".join(names)
            why = "" if came else unless
            raise ValueError(f"{self.where}: got {listed} for the {policy} policy, wanted exactly one of {wanted}{why}")

    def objective(self) -> Any:
        objective = self.arguments["objective"]
        if not isinstance(objective, (FlowDPPO, FlowGRPO, GRPOGuard)):
            wanted = "a FlowDPPO, FlowGRPO or GRPOGuard instance"
            raise TypeError(f"{self.where}: objective is a {type(objective).__name__}, wanted {wanted}")
        return objective

    def settings(self, sampler: str, density: str) -> Arguments:
        """Checks and returns the settings of a loss that do not belong to its objective."""
        self.option("latent_reduction", LATENT_REDUCTIONS)
        self.option("reduction", REDUCTIONS)
        return {
            "sampler": sampler,
            "density": density,
            "latent_reduction": self.arguments["latent_reduction"],
            "reduction": self.arguments["reduction"],
            "ref_kl_weight": self.number("ref_kl_weight"),
        }


def check_process_group(where: str, name: str, value: Any) -> None:
    """Checks that `value` is None or a `torch.distributed.ProcessGroup` that this process is a member of."""
    if value is None:
        return
    distributed = sys.modules.get("torch.distributed")  # a process that has a group has imported it
    if isinstance(value, getattr(distributed, "ProcessGroup", ())):
        return
    # `torch.distributed.new_group` returns -100 to the processes that are not members. A collective over -100 warns and
    # does nothing.
    outside = getattr(getattr(distributed, "GroupMember", None), "NON_GROUP_MEMBER", None)
    if type(value) is type(outside) and value == outside:
        raise ValueError(f"{where}: {name} is a group that this process is not a member of")
    raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted None or a torch.distributed.ProcessGroup")


def without_old_mean(objective: Any) -> str:
    """For messages: what else would do."""
    name = type(objective).__name__
    return "" if objective._needs_kl else f"; {name} needs none where old_log_prob is given"


def check_loss(where: str, family: Family, arguments: Arguments) -> Call:
    """Checks the arguments of `flowdppo_ops.loss`; its docstring states what is wanted."""
    checks = Checks(where, family, arguments)
    check_process_group(where, "process_group", arguments["process_group"])
    objective = checks.objective()
    checks.option("density", DENSITIES)
    settings = checks.settings("none", arguments["density"])
    ref_kl_weight = settings["ref_kl_weight"]
    if getattr(objective, "kl_space", "latent") != "latent":
        raise ValueError(
            f"{where}: kl_space is {objective.kl_space!r}, wanted 'latent': only step_loss sees velocities"
        )
    row_shape = checks.rows()

    replay, has_ref = arguments["prev_sample"] is not None, ref_kl_weight != 0
    if replay == (arguments["log_prob"] is not None):
        came = "both" if replay else "neither"
        raise ValueError(f"{where}: got {came} of prev_sample and log_prob, wanted exactly one")
    if not replay:
        checks.require("old_log_prob", "it is compared with log_prob")
    if replay or has_ref or objective._needs_kl:
        checks.require("prev_sample_mean", "log-prob, KL or penalty are computed from it")
        if replay or objective._needs_kl or arguments["ref_std"] is None:
            checks.require("std", "the standard deviation of the transition")
    if objective._needs_kl or (replay and arguments["old_log_prob"] is None):
        checks.require("old_prev_sample_mean", "the mean of the old policy" + without_old_mean(objective))
    if objective._needs_sqrt_dt:
        checks.require("sqrt_dt", "GRPOGuard rescales by sqrt(-dt)")
    if has_ref:
        checks.require("ref_prev_sample_mean", "ref_kl_weight is not 0")

    # Every latent that is given is checked, but two may not be read: a reference mean of weight 0, and an old mean
    # where no KL can be computed, for lack of `std` or `prev_sample_mean`.
    mean = arguments["prev_sample_mean"]
    fields = checks.present("prev_sample_mean", "prev_sample", "old_prev_sample_mean", "ref_prev_sample_mean")
    if fields:
        checks.latents(row_shape, *fields)
        checks.same_device("advantages", next(iter(fields)))
    if not has_ref:
        fields.pop("ref_prev_sample_mean", None)
    if arguments["std"] is None or mean is None:
        fields.pop("old_prev_sample_mean", None)
    if len(fields) == 1 and not replay:  # `prev_sample_mean` alone: nothing is computed from it
        fields = {}
    of_rows = checks.present("advantages", "log_prob", "old_log_prob")
    for name in of_rows:
        checks.array_like(name, "advantages")
    like = ("advantages", row_shape, getattr(mean, "ndim", None))
    fields = {**fields, **of_rows, **checks.row_vectors(("weights", "std", "sqrt_dt", "ref_std"), *like)}
    return Call(where, row_shape, fields, {**objective._settings, **settings}, objective, arguments["process_group"])


def check_step_loss(where: str, family: Family, arguments: Arguments) -> Call:
    """Checks the arguments of `flowdppo_ops.step_loss`; its docstring states what is wanted."""
    checks, sampler = Checks(where, family, arguments), arguments["sampler"]
    check_process_group(where, "process_group", arguments["process_group"])
    objective = checks.objective()
    checks.option("sampler", SAMPLERS)
    settings = checks.settings(sampler, "cps" if sampler == "cps" else "gaussian")
    ref_kl_weight = settings["ref_kl_weight"]
    olds = ("old_prev_sample_mean", "old_model_output", "old_residual")
    refs = ("ref_prev_sample_mean", "ref_model_output")
    needs_old = objective._needs_kl or arguments["old_log_prob"] is None
    checks.one_form("old", olds, needed=needs_old, unless=without_old_mean(objective))
    checks.one_form("reference", refs, needed=ref_kl_weight != 0)
    checks.guidance()
    row_shape = checks.rows()
    latents = ("model_output", "sample", "prev_sample", *checks.present("uncond_output", *olds, *refs))
    checks.latents(row_shape, *latents)
    checks.same_device("advantages", "model_output")
    fields = {name: arguments[name] for name in latents if ref_kl_weight != 0 or name not in refs}
    of_rows = checks.present("advantages", "old_log_prob")
    for name in of_rows:
        checks.array_like(name, "advantages")
    like = ("advantages", row_shape, arguments["model_output"].ndim)
    vectors = checks.row_vectors(("weights", "ref_std"), *like)
    fields = {**fields, **of_rows, **vectors, **checks.schedule(*like)}
    return Call(where, row_shape, fields, {**objective._settings, **settings}, objective, arguments["process_group"])


def check_sde_step(where: str, family: Family, arguments: Arguments) -> Call:
    """Checks the arguments of `flowdppo_ops.sde_step`; its docstring states what is wanted. If there is neither
    `prev_sample` nor `noise` among the fields, the caller draws the noise."""
    checks, generator, row_dims = Checks(where, family, arguments), arguments["generator"], arguments["row_dims"]
    checks.option("sampler", SAMPLERS)
    if arguments["prev_sample"] is not None and (arguments["noise"] is not None or generator is not None):
        raise ValueError(f"{where}: got prev_sample and a source of noise, wanted one: replay draws nothing")
    if arguments["noise"] is not None and generator is not None:
        raise ValueError(f"{where}: got noise and generator, wanted at most one")
    checks.guidance()
    normalizer = arguments["log_prob_normalizer"]
    if not isinstance(normalizer, bool):
        raise TypeError(f"{where}: log_prob_normalizer is a {type(normalizer).__name__}, wanted a bool")
    checks.array("model_output")
    shape = tuple(arguments["model_output"].shape)
    if isinstance(row_dims, bool) or not isinstance(row_dims, int) or not 0 <= row_dims <= len(shape):
        raise ValueError(f"{where}: row_dims is {row_dims!r}, wanted 0 to {len(shape)}, the rank of the latents")
    row_shape = shape[:row_dims]
    if 0 in row_shape:
        raise ValueError(f"{where}: model_output has shape {shape}, wanted at least one row")
    latents = ("model_output", "sample", *checks.present("uncond_output", "prev_sample", "noise"))
    checks.latents(row_shape, *latents)
    residual_dtype = arguments["residual_dtype"]
    if residual_dtype is not None:
        double = any(arguments[name].dtype == family.float64 for name in latents)
        allowed = {dtype: name for dtype, name in family.dtypes.items() if double or dtype != family.float64}
        if not any(residual_dtype is dtype for dtype in allowed):
            wanted = ", ".join(allowed.values())
            raise TypeError(f"{where}: residual_dtype is {residual_dtype!r}, wanted one of {wanted}")
    fields = {name: arguments[name] for name in latents}
    fields = {**fields, **checks.schedule("model_output", row_shape, len(shape))}
    settings = {name: arguments[name] for name in ("sampler", "log_prob_normalizer", "residual_dtype", "row_dims")}
    return Call(where, row_shape, fields, settings, generator=generator)
