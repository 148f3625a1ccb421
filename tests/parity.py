"""When two results count as equal: the tolerance policy of the suite, in one place.

Three ways: *mine* (the implementation under test), *eager* (the reference on the same inputs, same arithmetic dtype)
and *truth* (the reference on the same inputs widened to float64, which is exact). Mine may be twice as far from the
truth as eager is, plus a floor:

    max |mine - truth| / scale  <=  2 max |eager - truth| / scale  +  ULPS eps(output dtype)

`scale` is, per row, the sum of the magnitudes that were added up to give the number (at least the number itself). Why
a floor: with one row eager is at times exactly right by luck. Why such a scale: a log-ratio of 1e-3 that is the
difference of two log-probs near 1 cannot be better than an ulp of 1.

Arguments are those of `loss`, or of `step_loss` where there is a `model_output`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowdppo_ops import FlowDPPO, GRPOGuard, PolicyLoss, reference
from flowdppo_ops._torch import row_tensor

# Roundings on the way to one number, each at most half an ulp of its row's scale: sums (4), division by N, 2 std^2 and
# its quotient (3), the two constants (2), exp (2), products with A, w and the row scale (3), the mean over rows (2).
ULPS = 8

ROWS = ("log_prob", "log_ratio", "ratio", "kl")

Results = dict[str, Any]


def is_step(arguments: dict[str, Any]) -> bool:
    return "model_output" in arguments


def specification(arguments: dict[str, Any]) -> Callable[..., PolicyLoss]:
    """The reference's function for a call."""
    return reference.step_loss if is_step(arguments) else reference.loss


# ---- running ---------------------------------------------------------------------------------------------------------


def leaves(arguments: dict[str, Any]) -> list[str]:
    """The arguments that receive a gradient."""
    if is_step(arguments):
        return ["model_output"] + ["uncond_output"] * ("uncond_output" in arguments)
    through_mean = (
        "prev_sample" in arguments
        or isinstance(arguments["objective"], GRPOGuard)
        or arguments.get("ref_kl_weight", 0) != 0
    )
    return ["prev_sample_mean"] * through_mean + ["log_prob"] * ("log_prob" in arguments)


def run(loss: Callable[..., PolicyLoss], arguments: dict[str, Any], upstream: float = 1.0) -> Results:
    """Everything that one call gives: loss, rows, metrics and, as "grad <name>", the gradients."""
    arguments = dict(arguments)
    wanted = leaves(arguments)
    for name in wanted:  # detach() keeps the strides
        arguments[name] = arguments[name].detach().requires_grad_()
    result = loss(**arguments)
    assert isinstance(result, PolicyLoss)
    gradients = torch.autograd.grad(
        result.loss, [arguments[name] for name in wanted], upstream * upstream_of(result.loss)
    )
    out = {name: getattr(result, name) for name in ROWS} | {"loss": result.loss.detach(), "keep": result.keep}
    out |= {f"grad {name}": value for name, value in zip(wanted, gradients, strict=True)}
    return out | {"metrics": result.metrics()}


def upstream_of(loss: Tensor) -> Tensor:
    """A different dyadic weight for every row of reduction="none", so that rows cannot be swapped unseen."""
    weight = 1 + torch.arange(loss.numel(), device=loss.device) % 5 / 4
    return weight.reshape(loss.shape).to(loss.dtype)


def widen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


# ---- comparing -------------------------------------------------------------------------------------------------------


def three_way(loss: Callable[..., PolicyLoss], arguments: dict[str, Any]) -> Results:
    """Runs `loss` and asserts the policy for all it returns; gives back what it returned."""
    specified = specification(arguments)
    mine, eager = run(loss, arguments), run(specified, arguments)
    truth = run(specified, widen(arguments))
    scale = scales(widen(arguments), truth)
    assert mine.keys() == eager.keys()
    assert torch.equal(mine["keep"], truth["keep"]), f"keep: {first_differences(mine['keep'], truth['keep'])}"
    for name in mine:
        if name not in ("keep", "metrics"):
            close(name, mine[name], eager[name], truth[name], scale.get(name))
    assert mine["metrics"].keys() == eager["metrics"].keys()
    for name, value in mine["metrics"].items():
        three = (torch.tensor(v, dtype=torch.float64) for v in (value, eager["metrics"][name], truth["metrics"][name]))
        close(f"metrics {name}", *three, scale.get(f"metrics {name}"), eps_of=eager["ratio"].dtype)
    return mine


def close(
    name: str,
    mine: Tensor | None,
    eager: Tensor | None,
    truth: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps_of: torch.dtype | None = None,
) -> None:
    """Asserts the policy for one output. NaN and infinities must be where the truth has them."""
    if truth is None:
        assert mine is None
        assert eager is None
        return
    assert mine.dtype == eager.dtype, f"{name}: dtype {mine.dtype}, wanted {eager.dtype}"
    assert mine.shape == truth.shape, f"{name}: shape {tuple(mine.shape)}, wanted {tuple(truth.shape)}"
    kind = torch.finfo(eps_of or mine.dtype)
    mine, eager = mine.double(), eager.double()
    finite = torch.isfinite(truth) & (truth.abs() <= kind.max)
    same = torch.where(finite, torch.isfinite(mine), same_bits(mine, truth.to(eager.dtype)) | (mine == eager))
    assert same.all(), f"{name}: not finite where it should be, or the other way: {first_differences(mine, truth)}"
    scale = truth.abs() if scale is None else torch.broadcast_to(scale, truth.shape)
    scale = torch.where(torch.isfinite(scale), torch.maximum(scale, truth.abs()), truth.abs())

    def error(value: Tensor) -> Tensor:
        # Below the smallest normal number an ulp is absolute.
        return torch.where(finite, (value - truth).abs() / scale.clamp(min=kind.tiny), torch.zeros_like(truth))

    allowed = 2 * error(eager).max() + ULPS * kind.eps
    worst = error(mine).max()
    assert worst <= allowed, (
        f"{name}: error {worst:.3g}, allowed {allowed:.3g} (eager {error(eager).max():.3g}): "
        f"{first_differences(mine, truth, error(mine) > allowed)}"
    )


def equal_bits(mine: Results, other: Results) -> None:
    """Asserts that two runs gave the very same numbers."""
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype, name
            same = same_bits(value, other[name])
            assert same.all(), f"{name}: {first_differences(value, other[name], ~same)}"
        elif name == "metrics":
            for key, number in value.items():
                there = other[name][key]
                assert number == there or (math.isnan(number) and math.isnan(there)), f"{key}: {number} and {there}"


def same_bits(mine: Tensor, other: Tensor) -> Tensor:
    return (mine == other) | (mine.isnan() & other.isnan())


def first_differences(mine: Tensor, other: Tensor, where: Tensor | None = None, count: int = 4) -> str:
    where = ~same_bits(mine, other) if where is None else where
    places = where.nonzero()[:count].tolist()
    listed = ", ".join(f"{place}: {mine[tuple(place)].item()} for {other[tuple(place)].item()}" for place in places)
    return f"{int(where.sum())} of {where.numel()} differ, first at {listed}"


# ---- scales ----------------------------------------------------------------------------------------------------------


def scales(arguments: dict[str, Any], truth: Results) -> dict[str, Tensor]:
    """Per output, the magnitudes that were added up; `arguments` and `truth` in float64."""
    wanted, spread = leaves(arguments), Spread(0.0, 0.0)
    if is_step(arguments):
        arguments, spread = as_means(arguments)
    shape = arguments["advantages"].shape

    def rows(name: str, default: float) -> Tensor:
        value = arguments.get(name)
        return row_tensor(default if value is None else value, shape, torch.float64, torch.device("cpu"))

    mean, old, sample = (arguments.get(name) for name in ("prev_sample_mean", "old_prev_sample_mean", "prev_sample"))
    total, cps = arguments.get("latent_reduction") == "sum", arguments.get("density") == "cps"

    def over_latents(product: Tensor) -> Tensor:
        product = product.abs().reshape(*shape, -1)
        return product.sum(-1) if total else product.mean(-1)

    std, zero = rows("std", 1.0), torch.zeros(shape, dtype=torch.float64)
    has_drift = mean is not None and old is not None
    exact = over_latents((mean - old) ** 2) if has_drift else zero
    drift = exact + over_latents((mean - old) * spread.drift) if has_drift else zero
    if sample is None:
        log_prob = rows("log_prob", 0.0).abs()
    else:
        error = over_latents((sample - mean) ** 2) + over_latents((sample - mean) * spread.mean)
        constant = (mean.numel() // shape.numel() if total else 1) * (std.log().abs() + 0.5 * math.log(2 * math.pi))
        log_prob = error if cps else error / (2 * std**2) + constant
    if "old_log_prob" in arguments:
        log_ratio = log_prob + rows("old_log_prob", 0.0).abs()
    else:
        product = over_latents((mean - old) * (sample - old)) + over_latents((mean - old) * spread.mean)
        product = product + over_latents((sample - old) * spread.drift)
        log_ratio = 2 * product + drift if cps else product / std**2 + drift / (2 * std**2)
    exponent, row_scale = log_ratio, torch.ones_like(zero)
    objective = arguments["objective"]
    if isinstance(objective, GRPOGuard):
        sqrt_dt = rows("sqrt_dt", 1.0)
        c = std if objective.per_row_scale else sqrt_dt.mean() * (std / sqrt_dt).mean()
        exponent = (log_ratio + drift / (2 * c**2)) * c
        row_scale = 1 / (sqrt_dt**2 if objective.per_row_scale else sqrt_dt.mean() ** 2)

    ratio = torch.nan_to_num(truth["ratio"].abs(), nan=0.0, posinf=0.0) * (1 + exponent)
    row_loss = rows("advantages", 0.0).abs() * ratio * rows("weights", 1.0).abs() * row_scale
    penalty = zero
    if arguments.get("ref_kl_weight"):
        ref_drift = mean - arguments["ref_prev_sample_mean"]
        penalty = over_latents(ref_drift**2) + over_latents(ref_drift * spread.mean)
        penalty = penalty / (2 * rows("ref_std", 1.0) ** 2)
        row_loss = row_loss + arguments["ref_kl_weight"] * penalty
    reduction = arguments.get("reduction", "mean")
    kept = truth["keep"].sum().clamp(min=1)
    loss = {"none": row_loss, "mean": row_loss.mean(), "sum": row_loss.sum(), "kept_mean": row_loss.sum() / kept}
    out = {"log_prob": log_prob, "log_ratio": log_ratio, "ratio": ratio, "loss": loss[reduction]}

    # A row's gradient is one coefficient times a latent: it inherits the relative error of both.
    for name in wanted:
        gradient = torch.nan_to_num(truth[f"grad {name}"].abs(), nan=0.0, posinf=0.0)
        largest = gradient.reshape(*shape, -1).amax(-1) * (1 + exponent)
        if sample is not None:
            largest = largest * (1 + spread.of_largest(sample - mean, shape))
        out[f"grad {name}"] = largest.reshape(shape + (1,) * (gradient.ndim - len(shape)))

    out |= {f"metrics ratio_{of}": ratio.max() for of in ("mean", "std", "min", "max")}
    out |= {"metrics approx_kl": log_ratio.max() ** 2, "metrics ppo_kl": log_ratio.max()}
    if has_drift and truth["kl"] is not None:
        kl = truth["kl"] * torch.where(exact > 0, drift / exact, 1.0)
        out |= {"kl": kl, "metrics kl_new_old_mean": kl.mean(), "metrics kl_new_old_max": kl.max()}
    return out | {"metrics kl_loss": penalty.mean()}


class Spread(NamedTuple):
    """The magnitudes that were added up to give a mean, and those that make the difference of two means inexact."""

    mean: Tensor | float
    drift: Tensor | float

    def of_largest(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor | float:
        """Per row, of the largest element; 0 for given means."""
        if not isinstance(self.mean, Tensor):
            return 0.0
        largest, spread = (t.abs().reshape(*shape, -1).amax(-1) for t in (latents, self.mean))
        return spread / largest


def as_means(arguments: dict[str, Any]) -> tuple[dict[str, Any], Spread]:
    """What `loss` would be given for the same numbers; `arguments` in float64. A deterministic row gets std 1: what is
    divided by std is exactly 0 there."""
    shape, latents = arguments["advantages"].shape, arguments["model_output"].shape

    def wide(row: Tensor) -> Tensor:
        return row.reshape(shape + (1,) * (len(latents) - len(shape)))

    def rows(name: str, default: float = 0.0) -> Tensor:
        return row_tensor(arguments.get(name, default), shape, torch.float64, torch.device("cpu"))

    sigma, sigma_next = rows("sigma"), rows("sigma_next")
    schedule = sigma, sigma_next, rows("noise_level"), rows("sigma_max", 0.99)
    a, b, std = reference.transition(arguments["sampler"], *schedule)
    v, v_spread = arguments["model_output"], torch.zeros(latents, dtype=torch.float64)
    if "uncond_output" in arguments:
        uncond, guided = arguments["uncond_output"], wide(rows("guidance_scale"))
        v, v_spread = uncond + guided * (v - uncond), uncond.abs() + (guided * (v - uncond)).abs()
    x, x_next = arguments["sample"], arguments["prev_sample"]
    mean = wide(a) * x + wide(b) * v
    spread = (wide(a) * x).abs() + (wide(b) * v).abs() + wide(b).abs() * v_spread
    out = arguments | {"prev_sample_mean": mean, "std": torch.where(std == 0, 1.0, std)}
    out |= {
        "sqrt_dt": torch.sqrt(sigma - sigma_next),
        "density": "cps" if arguments["sampler"] == "cps" else "gaussian",
    }
    drift_spread = spread
    if "old_model_output" in arguments:
        out["old_prev_sample_mean"] = mean - wide(b) * (v - arguments["old_model_output"])
        drift_spread = wide(b).abs() * v_spread
    elif "old_residual" in arguments:
        out["old_prev_sample_mean"] = x_next - wide(std) * arguments["old_residual"]
    if "ref_model_output" in arguments:
        out["ref_prev_sample_mean"] = mean - wide(b) * (v - arguments["ref_model_output"])
    if arguments.get("ref_std") is None:
        out["ref_std"] = out["std"]
    return out, Spread(spread, drift_spread)


def far_from_ties(arguments: dict[str, Any], margin: float = 1e-3) -> bool:
    """Whether no row is so near a threshold that rounding may decide its side. Exact ties are tested apart."""
    truth = run(specification(arguments), widen(arguments))
    objective, ratio = arguments["objective"], truth["ratio"]
    limits = [1.0]
    if isinstance(objective, FlowDPPO):
        threshold = objective.kl_mask_threshold
        if math.isfinite(threshold) and ((truth["kl"] - threshold).abs() <= margin * threshold).any():
            return False
    else:
        limits = [1 - objective._settings["clip_low"], 1 + objective._settings["clip_high"]]
    return all(((ratio - limit).abs() > margin / 100).all() for limit in limits)
