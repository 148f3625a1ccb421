"""The loss helpers of UniRL's algorithms, fused.

After `strict` and `penalty`, each takes the parameters of UniRL's own helper. It returns what that returns, the loss of
each element (with the penalty) and the metrics; or a string, the reason why UniRL's own helper must run.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import FlowDPPO, FlowGRPO, PolicyLoss
from ._terms import CLIP_METRICS, DPPO_METRICS, RATIO_METRICS, policy_loss

Result = tuple[Tensor, Mapping[str, Tensor]]


class Penalty(NamedTuple):
    """`beta` times the KL from a reference policy, which UniRL has since September 2026."""

    beta: float
    means: Tensor
    ref_means: Tensor
    sigma: Tensor  # the standard deviation of the transition, `[1, S, 1, ...]`


def flowdppo_kl_adv_loss(
    strict: bool,
    penalty: Penalty | None,
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    new_means: Tensor,
    old_means: Tensor,
    advantages: Tensor,
    sigma_t: Tensor,
    kl_mask_threshold: float,
) -> Result | str:
    rows, means = (new_logp, old_logp, advantages), (new_means.detach(), old_means)
    if reason := _unserved_rows(rows) or _unserved_means(new_logp, means, strict):
        return reason
    std = _row_sigma(sigma_t, tuple(new_logp.shape))
    if std is None:
        return f"a sigma of shape {tuple(sigma_t.shape)}, which is not one per row"
    # `FlowDPPO` refuses thresholds below 0 and NaN. For these, as for 0, every KL is high.
    objective = FlowDPPO(kl_mask_threshold=kl_mask_threshold if kl_mask_threshold > 0 else 0.0)
    return _per_element(strict, penalty, rows, objective, DPPO_METRICS, means, std=std)


def grpo_clip_loss(
    strict: bool,
    penalty: Penalty | None,
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> Result | str:
    """Rows may have any shape: `FlowGRPO` has steps, `GRPO` has tokens."""
    rows, high = (new_logp, old_logp, advantages), clip_range if clip_range_high is None else clip_range_high
    if reason := _unserved_rows(rows):
        return reason
    if not (clip_range >= 0 and high >= 0):
        return "a negative clip range"
    objective = FlowGRPO(clip_range=(float(clip_range), float(high)))
    return _per_element(strict, penalty, rows, objective, (*RATIO_METRICS, *CLIP_METRICS, "approx_kl"))


_Rows = tuple[Tensor, Tensor, Tensor]  # new and old log-probs, advantages


def _per_element(
    strict: bool,
    penalty: Penalty | None,
    rows: _Rows,
    objective: FlowDPPO | FlowGRPO,
    metrics: tuple[str, ...],
    means: tuple[Tensor | None, Tensor | None] = (None, None),
    **more: Any,
) -> Result | str:
    new_logp, old_logp, advantages = rows
    if penalty is not None:
        if reason := _unserved_means(new_logp, (penalty.means.detach(), penalty.ref_means), strict):
            return reason
        ref_std = _row_sigma(penalty.sigma, tuple(new_logp.shape))
        if ref_std is None:
            return f"a sigma of shape {tuple(penalty.sigma.shape)}, which is not one per row"
        if not strict:  # a deterministic step has KL 0
            ref_std = ref_std.masked_fill(ref_std == 0, math.inf)
        means = (penalty.means, means[1])
        more |= {"ref_prev_sample_mean": penalty.ref_means, "ref_kl_weight": penalty.beta, "ref_std": ref_std}
    more |= {"advantages": advantages.detach(), "old_log_prob": old_logp, "objective": objective}
    result = policy_loss(strict, new_logp, means, reduction="none", **more)
    return result.loss, LateMetrics(result, metrics, more["advantages"], objective)


class LateMetrics(UserDict[str, Tensor]):
    """A helper's metrics: name -> 0-dim tensor on the host.

    All are copied from the device when one is first read. UniRL reads them after it has launched the backward: a copy
    before that would delay the launch.
    """

    def __init__(
        self,
        result: PolicyLoss,
        names: tuple[str, ...],
        advantages: Tensor,
        objective: FlowDPPO | FlowGRPO,
    ) -> None:
        self._result, self._names, self._advantages, self._objective = result, names, advantages, objective

    @cached_property
    def numbers(self) -> dict[str, float]:
        return self._result.metrics()

    @cached_property
    def data(self) -> dict[str, Tensor]:
        return {name: torch.tensor(self.numbers[name], dtype=self._result.ratio.dtype) for name in self._names}

    def policy_loss(self) -> float:
        """The mean loss without the penalty."""
        ratio, blocked_loss = self._result.ratio, 0.0
        if isinstance(self._objective, FlowGRPO):
            low, high = self._objective.clip_range
            blocked_loss = -self._advantages * ratio.clamp(1 - low, 1 + high)
        return torch.where(self._result.keep, -self._advantages * ratio, blocked_loss).mean().item()


def _unserved_rows(rows: _Rows) -> str:
    """Why the fused loss cannot take these rows, or would return another dtype than UniRL; empty if it can."""
    first, *others = rows
    double = first.dtype == torch.float64 and first.device.type == "cpu"
    if first.device.type not in ("cpu", "cuda"):
        return f"log-probs on {first.device.type}"
    if not double and first.dtype != torch.float32:
        return f"log-probs of {first.dtype} on {first.device.type}"
    if any((t.shape, t.dtype, t.device) != (first.shape, first.dtype, first.device) for t in others):
        return "log-probs and advantages of different shape, dtype or device"
    return "" if first.numel() else "no rows"


def _unserved_means(new_logp: Tensor, means: tuple[Tensor, Tensor], strict: bool) -> str:
    new, old = means
    if new.shape != old.shape or new.shape[: new_logp.ndim] != new_logp.shape or not new.numel():
        return f"means of shape {tuple(new.shape)} and {tuple(old.shape)} for rows {tuple(new_logp.shape)}"
    if strict and new.ndim == new_logp.ndim:
        return "means without latent dimensions, which UniRL takes for one row"
    if any(t.device != new_logp.device for t in means):
        return "means and log-probs on different devices"
    wide = (torch.float64,) if new_logp.dtype == torch.float64 else ()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *wide)
    return next((f"means of {t.dtype} with log-probs of {new_logp.dtype}" for t in means if t.dtype not in dtypes), "")


def _row_sigma(sigma_t: Tensor, row_shape: tuple[int, ...]) -> Tensor | None:
    """UniRL's sigma `[1, S, 1, 1, 1]` as `[1, S]`, which fits means of any rank; None if it is not one number per
    row."""
    if sigma_t.numel() == 1:
        return sigma_t.reshape(())
    rank = len(row_shape)
    leading, trailing = sigma_t.shape[:rank], sigma_t.shape[rank:]
    fits = len(leading) == rank and all(have in (1, want) for have, want in zip(leading, row_shape, strict=True))
    return sigma_t.reshape(leading) if fits and trailing.count(1) == len(trailing) else None
