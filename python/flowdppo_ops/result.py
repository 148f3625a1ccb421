"""`PolicyLoss`: what every loss of this package returns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ._checks import check_process_group
from ._native import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")

# The numbers of a call are one flat tensor. First come these fields, each with one value per row, then coefficients of
# the gradient, which only the backward reads, and last the metrics.
_LOG_PROB, _LOG_RATIO, _RATIO, _KL, _KEEP = range(5)

_KL_METRICS = ("kl_new_old_mean", "kl_new_old_max", "kl_mask_fraction")
_REF_METRICS = ("kl_loss",)


class Layout(NamedTuple):
    """What a result needs to know about its call. The native module's `Layout` has these attributes too."""

    row_shape: tuple[int, ...]
    has_kl: bool
    has_ref: bool


class PolicyLoss:
    """The loss and the numbers behind it.

    Attributes:
        loss: 0-dim, or row-shaped with `reduction="none"`; float32 (float64 for float64 inputs). The only
            differentiable member.
        log_prob: row-shaped; nats, reduced over the latents as `latent_reduction` says.
        log_ratio: row-shaped; `log_prob` minus the old one.
        ratio: row-shaped; `exp(log_ratio)`; with `GRPOGuard` the re-centred and rescaled ratio.
        kl: row-shaped; the KL from the old policy, what `FlowDPPO` compares with its threshold. None when there was
            no old mean (or no std) to compute it from.
        keep: row-shaped, bool; False where the row was blocked or clipped away, that is where the policy's
            gradient is 0.
    """

    __slots__ = ("_layout", "_numbers", "loss")

    def __init__(self, loss: torch.Tensor, numbers: torch.Tensor, layout: Layout) -> None:
        self.loss = loss
        self._numbers = numbers
        self._layout = layout

    def _field(self, index: int) -> torch.Tensor:
        row_shape = self._layout.row_shape
        rows = math.prod(row_shape)
        return self._numbers[index * rows : (index + 1) * rows].view(row_shape)

    @property
    def log_prob(self) -> torch.Tensor:
        return self._field(_LOG_PROB)

    @property
    def log_ratio(self) -> torch.Tensor:
        return self._field(_LOG_RATIO)

    @property
    def ratio(self) -> torch.Tensor:
        return self._field(_RATIO)

    @property
    def kl(self) -> torch.Tensor | None:
        return self._field(_KL) if self._layout.has_kl else None

    @property
    def keep(self) -> torch.Tensor:
        return self._field(_KEEP) != 0

    def metrics(self, prefix: str = "", group: ProcessGroup | None = None) -> dict[str, float]:
        """The values that trainers log, as Python floats. This makes the only device-to-host copy, and waits for it.

        `ratio_mean ratio_std ratio_min ratio_max approx_kl ppo_kl`; `kl_new_old_mean kl_new_old_max
        kl_mask_fraction` (share of rows of high KL) when there is a KL; `pos_rm_fraction neg_rm_fraction
        masked_fraction unmasked_fraction` (share of rows not kept, by the sign of their advantage); `clip_fraction
        clipfrac_gt_one clipfrac_lt_one` (share of ratios outside the clip range, 0 for `FlowDPPO`);
        `nonfinite_fraction` (rows with a NaN or an infinity among their numbers); `kl_loss` with a reference KL.
        `ratio_std` is unbiased, and 0 for a single row.

        Args:
            prefix: what every name begins with, such as `"actor/"`.
            group: a `torch.distributed` group of data-parallel ranks, all of which must call. The values are then those
                of all ranks' rows together, not averages of the ranks' values; one collective gathers 19 float64 per
                rank. Ranks that hold shards of the same rows have the same metrics without it.

        Raises:
            TypeError: a `prefix` that is no string, a `group` that is no process group.
            ValueError: a `group` that this process is not a member of.
        """
        _check_prefix("metrics", prefix)
        check_process_group("PolicyLoss.metrics", "group", group)
        values = self._numbers[-len(METRICS) :]
        if group is None:
            return self._named(prefix, values.tolist())
        return self._named(prefix, _over_ranks(values, math.prod(self._layout.row_shape), group))

    def metric_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """`metrics` as 0-dim tensors on the device, without a copy or a wait: views of one tensor, in the dtype of the
        loss. For a trainer that reads its logging values later."""
        _check_prefix("metric_tensors", prefix)
        return self._named(prefix, self._numbers[-len(METRICS) :].unbind())

    def _named(self, prefix: str, values: Iterable[Value]) -> dict[str, Value]:
        absent = (() if self._layout.has_kl else _KL_METRICS) + (() if self._layout.has_ref else _REF_METRICS)
        return {prefix + name: value for name, value in zip(METRICS, values, strict=True) if name not in absent}

    def __repr__(self) -> str:
        return f"PolicyLoss(loss={self.loss}, rows={self._layout.row_shape})"


def _check_prefix(method: str, prefix: object) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"PolicyLoss.{method}: prefix is a {type(prefix).__name__}, wanted a string")


def _over_ranks(numbers: torch.Tensor, rows: int, group: ProcessGroup) -> list[float]:
    """The metrics of all ranks' rows, in the order of `METRICS`."""
    from torch import distributed, float64

    own = numbers.new_full((len(METRICS) + 1,), rows, dtype=float64)
    own[:-1] = numbers
    gathered = own.new_empty(distributed.get_world_size(group) * len(own))
    distributed.all_gather_into_tensor(gathered, own, group=group)
    *columns, counts = zip(*gathered.view(-1, len(own)).tolist(), strict=True)
    of_ranks = dict(zip(METRICS, columns, strict=True))
    total = math.fsum(counts)

    def mean(values: Iterable[float]) -> float:
        return sum(n * value for n, value in zip(counts, values, strict=True)) / total

    merged = {name: mean(values) for name, values in of_ranks.items()}
    # The variance is the mean variance within ranks plus the variance between ranks. Products instead of `**`: a
    # product that overflows is infinite, Python's `**` raises.
    distances = [value - merged["ratio_mean"] for value in of_ranks["ratio_mean"]]
    within = [(n - 1) / n * std * std for n, std in zip(counts, of_ranks["ratio_std"], strict=True)]
    variance = mean(within) + mean(distance * distance for distance in distances)
    merged["ratio_std"] = math.sqrt(variance * total / (total - 1)) if total > 1 else 0.0
    for name, extreme in (("ratio_min", min), ("ratio_max", max), ("kl_new_old_max", max)):
        values = of_ranks[name]
        merged[name] = math.nan if any(map(math.isnan, values)) else extreme(values)
    return [merged[name] for name in METRICS]
