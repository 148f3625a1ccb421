"""Inputs for `sde_step`, and when two of its results count as equal; the policy is that of `parity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity import close, widen
from torch import Tensor

from flowdppo_ops import SdeStep, reference
from flowdppo_ops._torch import row_tensor

SAMPLERS = ("flow_sde", "dance_sde", "cps")
_f32, _bf16, _f16, _f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Per tensor; "*" is for those not named. `next` is the given latent or the noise.
DTYPES = {
    "float32": {"*": _f32},
    "bfloat16": {"*": _bf16},
    "float16": {"*": _f16},
    "float64": {"*": _f64},
    "bfloat16 model, float32 rollout": {"*": _f32, "model_output": _bf16, "uncond_output": _bf16},
    "bfloat16 model, float32 rollout, float16 residual": {
        "*": _f32,
        "model_output": _bf16,
        "uncond_output": _bf16,
        "residual": _f16,
    },
    "every latent another": {
        "model_output": _bf16,
        "uncond_output": _f32,
        "sample": _f16,
        "next": _f32,
        "residual": _bf16,
    },
    "one float64 latent": {"*": _f32, "model_output": _f64, "residual": _f16},
}
FLOAT32_DTYPES = {name: dtypes for name, dtypes in DTYPES.items() if "float64" not in name}

# (latents, row_dims, shape of the schedule)
LAYOUTS = {
    "image [B,C,H,W]": ((3, 4, 5, 6), 1, (3,)),
    "steps [B,S,N,C], one schedule": ((2, 3, 5, 8), 2, (1, 3)),
    "steps [B,S,N,C], trailing ones": ((2, 3, 5, 8), 2, (1, 3, 1, 1)),
    "steps [B,S,N,C], a step per sample": ((2, 3, 5, 8), 2, (2, 1)),
    "rows [A,B,C], neighbours apart": ((2, 3, 2, 7), 3, (2, 1, 2)),
    "one row of everything": ((4, 9), 0, ()),
    "rows alone": ((5,), 1, (5,)),
    "one number": ((), 0, ()),
}


def draw(
    shape: tuple[int, ...] = (4, 5, 8),
    row_dims: int = 1,
    schedule_shape: tuple[int, ...] | None = None,
    *,
    sampler: str = "flow_sde",
    replay: bool = False,
    guidance: bool = False,
    residual: bool = False,
    dtypes: dict[str, torch.dtype] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments for `sde_step`. A given next latent lies about one std from the mean."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtypes or DTYPES["float32"]

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        size = shape[:row_dims] if schedule_shape is None else schedule_shape
        # float32 numbers: the truth in float64 has the same ones.
        return (low + (high - low) * torch.rand(size, generator=generator)).float()

    def dtype(name: str) -> torch.dtype:
        return dtypes.get(name, dtypes.get("*"))

    sigma = uniform(0.5, 0.95)
    out = {
        "model_output": normal(),
        "sample": normal(),
        "sigma": sigma,
        "sigma_next": sigma - uniform(0.05, 0.3),
        "noise_level": uniform(0.3, 0.8),
        "sampler": sampler,
        "row_dims": row_dims,
    }
    if guidance:
        out |= {"uncond_output": normal(), "guidance_scale": uniform(1.5, 6.0)}
    noise = normal()
    for name in ("model_output", "uncond_output", "sample"):
        if name in out:
            out[name] = out[name].to(dtype(name))
    if replay:
        drawn = reference.sde_step(**widen(out), noise=noise).prev_sample
        out["prev_sample"] = drawn.to(dtype("next"))
    else:
        out["noise"] = noise.to(dtype("next"))
    if residual:
        out["residual_dtype"] = dtype("residual")
    return out


def run(
    step: Callable[..., SdeStep], arguments: dict[str, Any], through: tuple[str, ...] = ("log_prob", "prev_sample_mean")
) -> dict[str, Tensor | None]:
    """What one call gives, and the gradients of the model's outputs, through one of its results or through both."""
    arguments = dict(arguments)
    wanted = [name for name in ("model_output", "uncond_output") if name in arguments]
    for name in wanted:  # detach() keeps the strides
        arguments[name] = arguments[name].detach().requires_grad_()
    result = step(**arguments)
    assert isinstance(result, SdeStep)
    results = [getattr(result, name) for name in through]
    gradients = torch.autograd.grad(results, [arguments[name] for name in wanted], [upstream_of(t) for t in results])
    out = {name: None if t is None else t.detach() for name, t in result._asdict().items()}
    return out | {f"grad {name}": t for name, t in zip(wanted, gradients, strict=True)}


def upstream_of(result: Tensor) -> Tensor:
    """Dyadic numbers, another one for every row and for neighbouring elements, and of both signs."""
    number = torch.arange(result.numel(), device=result.device)
    return (number % 7 / 4 - 0.75).reshape(result.shape).to(result.dtype)


def three_way(step: Callable[..., SdeStep], arguments: dict[str, Any], **options: Any) -> dict[str, Tensor | None]:
    """Runs `step` and asserts the policy for all it returns, which it gives back.

    A latent that is drawn is compared first, and then scored: its rounding may fall to either side, and what is scored
    is what was stored.
    """
    mine = run(step, arguments, **options)
    arguments = dict(arguments)
    if "noise" in arguments:
        eager, truth = reference.sde_step(**arguments), reference.sde_step(**widen(arguments))
        magnitude = magnitudes(arguments) + (row("std", arguments, truth.std) * arguments.pop("noise")).abs()
        close("prev_sample", mine["prev_sample"], eager.prev_sample, truth.prev_sample, magnitude)
        arguments["prev_sample"] = mine["prev_sample"]
    else:
        arguments["prev_sample"] = arguments["prev_sample"].to(arguments["sample"].dtype)
        assert torch.equal(mine["prev_sample"], arguments["prev_sample"])
    eager, wide = run(reference.sde_step, arguments, **options), widen(arguments)
    if "residual_dtype" in wide:
        wide["residual_dtype"] = torch.float64
    truth = run(reference.sde_step, wide, **options)
    assert mine.keys() == eager.keys()
    scale = scales(wide, truth, options.get("through", ("log_prob", "prev_sample_mean")))
    for name in mine.keys() - {"prev_sample"}:
        close(name, mine[name], eager[name], truth[name], scale.get(name))
    return mine


# ---- scales ----------------------------------------------------------------------------------------------------------


def row(name: str, arguments: dict[str, Any], value: float | Tensor | None = None) -> Tensor:
    """A row vector, of float64 and of a shape that broadcasts to the latents."""
    latents = arguments["sample"]
    row_shape = latents.shape[: arguments["row_dims"]]
    value = row_tensor(arguments[name] if value is None else value, row_shape, torch.float64, latents.device)
    return value.reshape(row_shape + (1,) * (latents.ndim - len(row_shape)))


def coefficients(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    names = ("sigma", "sigma_next", "noise_level")
    return reference.transition(arguments["sampler"], *(row(name, arguments) for name in names), torch.tensor(0.99))


def magnitudes(arguments: dict[str, Any]) -> Tensor:
    """Of what is added up to give the mean."""
    a, b, _ = coefficients(arguments)
    output, uncond = arguments["model_output"].double().abs(), arguments.get("uncond_output")
    if uncond is not None:
        output = row("guidance_scale", arguments) * (output + uncond.double().abs()) + uncond.double().abs()
    return (a * arguments["sample"].double()).abs() + b.abs() * output


def scales(arguments: dict[str, Any], truth: dict[str, Tensor | None], through: tuple[str, ...]) -> dict[str, Tensor]:
    """Per output, the magnitudes that were added up; `arguments` are a replay's, it and `truth` in float64."""
    row_dims, cps = arguments["row_dims"], arguments["sampler"] == "cps"
    _, b, std = coefficients(arguments)
    fixed = std == 0
    std = torch.where(fixed, torch.ones_like(std), std)
    mean, stored = truth["prev_sample_mean"], arguments["prev_sample"]
    added = magnitudes(arguments) + stored.abs()  # to give x' - mu

    def over_latents(latents: Tensor) -> Tensor:
        return latents.reshape((*latents.shape[:row_dims], -1)).mean(-1)

    error = over_latents((stored - mean).abs() * added)
    rows = std.reshape(error.shape)
    constant = rows.log().abs() + 1
    out = {"prev_sample_mean": magnitudes(arguments), "log_prob": error if cps else error / rows**2 + constant}
    if truth["residual"] is not None:
        largest = (added / std).flatten(row_dims).amax(-1) if added.ndim > row_dims else added / std
        out["residual"] = largest.reshape(fixed.shape)
    gradient = torch.zeros_like(mean)
    if "prev_sample_mean" in through:
        gradient = gradient + upstream_of(mean).abs()
    if "log_prob" in through:
        numel = mean.numel() // error.numel()
        coefficient = 2 / numel if cps else torch.where(fixed, torch.zeros_like(std), 1 / (numel * std**2))
        gradient = gradient + row("", arguments, upstream_of(error).abs()) * coefficient * added
    scale = row("guidance_scale", arguments) if "guidance_scale" in arguments else torch.ones_like(b)
    out["grad model_output"] = (b * scale).abs() * gradient
    out["grad uncond_output"] = (b * (1 - scale)).abs() * gradient
    return out
