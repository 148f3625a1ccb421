"""The three objectives: what a row's ratio, KL and advantage become.

Each is a small frozen dataclass; the arithmetic is in `flowdppo_ops.reference` (the specification) and in the
native backends. Ratios, limits and thresholds are dimensionless or in nats per latent element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

PUBLISHED_NATS = 1e-5 * 65_536  # of Flow-DPPO: its threshold times the latent elements of SD3.5 at 512 pixels

_DEFAULTS = {
    "objective": "",
    "kl_mask_threshold": 0.0,
    "clip_low": 0.0,
    "clip_high": 0.0,
    "adv_clip_max": math.inf,
    "mask": "none",
    "kl_divisor": "gaussian",
    "keep_nan_kl": False,
    "per_row_scale": False,
}


class _Objective:
    """`_settings`: what the operator takes of an objective, by the names of its schema. `_native`: the same for native
    code, made when the objective is first used, and not pickled."""

    _native: ClassVar[Any] = None
    _needs_kl: ClassVar[bool] = True
    _needs_sqrt_dt: ClassVar[bool] = False

    def _set(self, **settings: Any) -> None:
        object.__setattr__(self, "_settings", {**_DEFAULTS, **settings})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_native"}


@dataclass(frozen=True)
class FlowDPPO(_Objective):
    """Divergence proximal policy optimisation for flow models (arXiv 2606.11025): an exact KL trust region.

    A row is blocked when its KL from the old policy is high *and* the update moves further away:
    `ratio > 1` with a positive advantage, or `ratio < 1` with a negative one. A blocked row has loss 0 and
    gradient exactly 0; every other row has loss `-advantage * ratio`.

    The KL is a mean over the N latent elements of a row, so the same threshold means a different trust region for
    another latent size. 1e-5 was published for SD3.5 at 512 pixels: N = 65,536, which makes 0.655 nats for the whole
    row. `per_sample` takes the threshold in nats for the whole row. Two rules carry a setting over to another N:

    - the same KL for the whole row: `kl_mask_threshold = nats / N`. This is `per_sample`.
    - the same width as a clip range c of `FlowGRPO`: `kl_mask_threshold = N c^2 / 2`. Under the old policy the
      log-ratio of a row of KL k has mean -k and standard deviation `sqrt(2 k / N)`, so at this threshold c is one
      standard deviation.

    The first grows with 1/N and the second with N: at N = 65,536 and c = 1e-4 they give 1e-5 and 3.3e-4. docs/loop.md
    has what both did in a small run. Watch `masked_fraction` in the metrics: the share of rows that are blocked.

    Args:
        kl_mask_threshold: nats per latent element (nats with `latent_reduction="sum"`), >= 0, may be inf. KL is
            high unless it is below: equality is high. Compared in the arithmetic dtype (float32, or float64).
        normalize_kl: divide the squared drift by `2 std^2` (the Gaussian KL); with False by 2 alone
            (`add_kl_coefficient=False` in UniRL and verl-omni).
        mask: "asymmetric" as above; "symmetric" blocks every row of high KL; "none" blocks nothing.
        nan_kl: "mask" counts a NaN KL as high (UniRL), "keep" as low (verl-omni).
        kl_space: "latent" compares the KL of the transition; "velocity", in `step_loss` only, the mean squared
            difference of the model outputs, whatever `normalize_kl` says.

    Raises:
        ValueError: unknown option, or a threshold that is negative, NaN or too large for a float.
        TypeError: a threshold that is no number, or a `normalize_kl` that is no bool.
    """

    kl_mask_threshold: float = 1e-5
    normalize_kl: bool = True
    mask: str = "asymmetric"
    nan_kl: str = "mask"
    kl_space: str = "latent"

    def __post_init__(self) -> None:
        threshold = not_negative("FlowDPPO", "kl_mask_threshold", self.kl_mask_threshold)
        _check_bool("FlowDPPO", "normalize_kl", self.normalize_kl)
        check_option("FlowDPPO", "mask", self.mask, ("asymmetric", "symmetric", "none"))
        check_option("FlowDPPO", "nan_kl", self.nan_kl, ("mask", "keep"))
        check_option("FlowDPPO", "kl_space", self.kl_space, ("latent", "velocity"))
        divisor = "gaussian" if self.normalize_kl else "constant"
        self._set(
            objective="flow_dppo",
            kl_mask_threshold=threshold,
            mask=self.mask,
            kl_divisor="velocity" if self.kl_space == "velocity" else divisor,
            keep_nan_kl=self.nan_kl == "keep",
        )

    @classmethod
    def per_sample(
        cls, nats: float = PUBLISHED_NATS, *, numel: int, mask: str = "asymmetric", nan_kl: str = "mask"
    ) -> FlowDPPO:
        """The threshold in nats for a whole row: `FlowDPPO(nats / numel)`, for the default `latent_reduction="mean"`.

        Args:
            nats: KL of one transition, summed over its latent elements, >= 0, may be inf. The default is the published
                setting, so that `FlowDPPO.per_sample(numel=65_536) == FlowDPPO()`.
            numel: latent elements of one row, at least 1: `latents[0].numel()` for rows `[B]`.
            mask, nan_kl: as in `FlowDPPO`.

        Raises:
            ValueError: `nats` is negative, NaN or too large for a float, `numel` is less than 1, an unknown option.
            TypeError: `nats` is no number, or `numel` no whole number.
        """
        where = "FlowDPPO.per_sample"
        total = not_negative(where, "nats", nats)
        if isinstance(numel, bool) or not isinstance(numel, Integral):
            raise TypeError(f"{where}: numel is a {type(numel).__name__}, wanted a whole number")
        if numel < 1:
            raise ValueError(f"{where}: numel is {numel}, wanted at least 1")
        return cls(total / numel, mask=mask, nan_kl=nan_kl)


@dataclass(frozen=True)
class FlowGRPO(_Objective):
    """Clipped surrogate of Flow-GRPO (arXiv 2505.05470): `max(-A ratio, -A clip(ratio, 1 - low, 1 + high))`.

    Args:
        clip_range: one number for both sides, or `(low, high)`; each the distance from 1, >= 0. A list of two becomes
            a tuple.
        adv_clip_max: advantages are clamped to plus and minus this; None leaves them.

    Raises:
        ValueError: a limit that is negative, NaN or too large for a float. (Flow-Factory writes its pair as (-low,
            high): drop the sign.)
        TypeError: a limit that is no number.
    """

    _needs_kl: ClassVar[bool] = False

    clip_range: float | tuple[float, float] = 1e-4
    adv_clip_max: float | None = None

    def __post_init__(self) -> None:
        self._set(objective="flow_grpo", **_clip_limits("FlowGRPO", self))


@dataclass(frozen=True)
class GRPOGuard(_Objective):
    """GRPO-Guard (arXiv 2510.22319): the log-ratio is re-centred by the mean drift and rescaled per step.

    `ratio = exp((log_ratio + drift / (2 c^2)) c)`, then the clipped surrogate of `FlowGRPO`, divided by
    `mean(sqrt_dt)^2`. Follows verl-omni's `GRPOGuardLoss`: the drift is one value per row.

    Args:
        clip_range, adv_clip_max: as in `FlowGRPO`.
        per_row_scale: False: `c = mean(sqrt_dt) mean(std / sqrt_dt)` over the batch. True: each row's own
            `c = std`, and its own `sqrt_dt` as divisor.

    Raises:
        ValueError, TypeError: as `FlowGRPO`; TypeError too for a `per_row_scale` that is no bool.
    """

    _needs_sqrt_dt: ClassVar[bool] = True

    clip_range: float | tuple[float, float] = 2e-6
    adv_clip_max: float | None = None
    per_row_scale: bool = False

    def __post_init__(self) -> None:
        _check_bool("GRPOGuard", "per_row_scale", self.per_row_scale)
        limits = _clip_limits("GRPOGuard", self)
        self._set(objective="grpo_guard", per_row_scale=self.per_row_scale, **limits)


Objective = FlowDPPO | FlowGRPO | GRPOGuard


def check_option(where: str, name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    # Only a string or None is compared: an array answers a comparison with an array.
    is_comparable = value is None or isinstance(value, str)
    if not is_comparable or value not in allowed:
        came = repr(value) if is_comparable else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {name} is {came}, wanted one of {', '.join(map(repr, allowed))}")


def not_negative(where: str, name: str, value: object) -> float:
    """`value` as a float. Raises unless it is a number >= 0; infinity is one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted a number")
    try:
        number = float(value)
    except OverflowError:  # 10**400
        raise ValueError(f"{where}: {name} is a number too large for a float, wanted a number >= 0") from None
    # A comparison is False for NaN too. `math.isnan` cannot be traced: under torch.compile a number may be a symbol.
    if not number >= 0:
        raise ValueError(f"{where}: {name} is {value}, wanted a number >= 0")
    return number


def _check_bool(where: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, wanted True or False")


def _clip_limits(where: str, objective: FlowGRPO | GRPOGuard) -> dict[str, float]:
    if isinstance(objective.clip_range, list):
        object.__setattr__(objective, "clip_range", tuple(objective.clip_range))  # a list cannot be hashed
    pair = objective.clip_range
    low, high = pair if isinstance(pair, tuple) and len(pair) == 2 else (pair, pair)
    limit = objective.adv_clip_max
    return {
        "clip_low": not_negative(where, "clip_range", low),
        "clip_high": not_negative(where, "clip_range", high),
        "adv_clip_max": math.inf if limit is None else not_negative(where, "adv_clip_max", limit),
    }
