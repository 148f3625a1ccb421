"""Inputs for `step_loss`, drawn so that every branch of the objectives is entered, as `cases.draw` does for `loss`.

Outputs and samples come first; the old policy is a drift of chosen KL away from the mean that they make, and the next
sample leans along or against that drift. Whatever a latent is stored as is rounded before others are formed from it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import CELLS, OBJECTIVES, THRESHOLD, mask_cells

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference

SAMPLERS = ("flow_sde", "dance_sde", "cps")
OLD_FORMS = {"mean": "old_prev_sample_mean", "output": "old_model_output", "residual": "old_residual"}
REF_FORMS = {"mean": "ref_prev_sample_mean", "output": "ref_model_output"}
SCHEDULE = ("sigma", "sigma_next", "noise_level")
SIGMA_MAX = 0.9375  # exact in every dtype
LATENTS = ("model_output", "uncond_output", "sample", "prev_sample", *OLD_FORMS.values(), *REF_FORMS.values())

STEP_OBJECTIVES = OBJECTIVES | {
    "velocity": FlowDPPO(kl_mask_threshold=THRESHOLD, kl_space="velocity"),
    "plain kl": FlowDPPO(kl_mask_threshold=THRESHOLD / 10, normalize_kl=False),
    "guard own scale": GRPOGuard(clip_range=0.01, per_row_scale=True),
}

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16


def _policies(dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys((*OLD_FORMS.values(), *REF_FORMS.values()), dtype)


_outputs_bf16 = {"*": _f32, "model_output": _bf16, "uncond_output": _bf16}
# Per tensor; "*" is for those not named.
STEP_DTYPES = {
    "float32": {"*": _f32},
    "bfloat16": {"*": _bf16} | dict.fromkeys(SCHEDULE, _f32),
    "float16": {"*": _f16} | dict.fromkeys(SCHEDULE, _f32),
    "bfloat16 outputs": _outputs_bf16,
    "bfloat16 outputs and policies": _outputs_bf16 | _policies(_bf16),
    "bfloat16 outputs, float16 policies": _outputs_bf16 | _policies(_f16),
    "every latent another": {
        "*": _f32,
        "model_output": _f16,
        "uncond_output": _bf16,
        "sample": _bf16,
        "prev_sample": _f32,
        **_policies(_bf16),
        "old_residual": _f16,
        "ref_model_output": _f16,
        "advantages": _bf16,
        "weights": _f16,
        "guidance_scale": _f16,
    },
}
# For the CPU and the reference alone.
FLOAT64_DTYPES = {"float64": {"*": torch.float64}, "one float64 latent": {"*": _f32, "sample": torch.float64}}


def draw_step(
    row_shape: tuple[int, ...] = (12,),
    latent_shape: tuple[int, ...] = (5, 8),
    *,
    sampler: str = "flow_sde",
    old_form: str | None = "mean",
    ref_form: str | None = None,
    guidance: bool = False,
    old_log_prob: bool = False,
    weights: bool = False,
    deterministic: bool | tuple[int, ...] = False,
    dtypes: dict[str, torch.dtype] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments for `step_loss`.

    old_form: None draws no old policy. deterministic: these rows, or every third, have no noise; with "cps" every
    second of them is a last step instead. `options` go to `step_loss`; with a `ref_form` the weight of the reference
    term is 0.5. The row's number picks its KL (0.1 or 10 thresholds), the side of its ratio and the sign of its
    advantage, with periods 2, 4 and 12. Every fifth row begins at sigma 1, where `sigma_max` counts.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, numel = math.prod(row_shape), math.prod(latent_shape)
    objective = options.setdefault("objective", STEP_OBJECTIVES["dppo"])
    dtypes = dtypes or STEP_DTYPES["float32"]
    out: dict[str, Any] = {}

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        """`value` as it is stored; returned in float64 and as `[rows]` or `[rows, numel]`."""
        shape = row_shape + latent_shape if name in LATENTS else row_shape
        out[name] = value.reshape(shape).to(dtypes.get(name, dtypes["*"]))
        return out[name].double().reshape(value.shape)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)

    number = torch.arange(rows) + seed
    scale = torch.where(number % 2 == 0, 0.1, 10.0).double() * THRESHOLD
    scale = scale / (numel if options.get("latent_reduction") == "sum" else 1)
    lean = torch.where(number // 2 % 2 == 0, 4.0, -4.0).double()
    sign = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[number // 4 % 3]

    sigma = keep("sigma", torch.where(number % 5 == 4, 1.0, uniform(0.4, 0.95)))
    sigma_next, noise_level = sigma * uniform(0.6, 0.8), uniform(0.3, 0.9)
    fixed = list(range(0, rows, 3) if deterministic is True else deterministic or ())
    last = fixed[1::2] if sampler == "cps" else []
    sigma_next[last] = 0.0
    noise_level[[row for row in fixed if row not in last]] = 0.0
    sigma_next, noise_level = keep("sigma_next", sigma_next), keep("noise_level", noise_level)
    sigma_max = torch.tensor(SIGMA_MAX, dtype=torch.float64)
    a, b, std = reference.transition(sampler, sigma, sigma_next, noise_level, sigma_max)
    a, b, std = (row[:, None] for row in (a, b, std))
    some_std = torch.where(std == 0, 0.3, std)

    v = keep("model_output", normal(rows, numel))
    if guidance:
        uncond, guidance_scale = keep("uncond_output", normal(rows, numel)), keep("guidance_scale", uniform(0.5, 3.0))
        v = uncond + guidance_scale[:, None] * (v - uncond)
    mean = a * keep("sample", normal(rows, numel)) + b * v

    unit = b.abs() if getattr(objective, "kl_space", "latent") == "velocity" else some_std * math.sqrt(2)
    drift = normal(rows, numel)
    drift = drift / drift.square().mean(1, keepdim=True).sqrt() * unit * scale.sqrt()[:, None]
    old_mean = mean - drift
    x_next = keep("prev_sample", old_mean + std * normal(rows, numel) + lean[:, None] * drift)
    policies = {"mean": old_mean, "output": v - drift / b, "residual": (x_next - old_mean) / some_std}
    policies["residual"] = torch.where(std == 0, 0.0, policies["residual"])
    if old_form is not None:
        keep(OLD_FORMS[old_form], policies[old_form])
    if ref_form is not None:
        ref_drift = 0.3 * some_std * normal(rows, numel)
        keep(REF_FORMS[ref_form], {"mean": mean - ref_drift, "output": v - ref_drift / b}[ref_form])
        keep("ref_std", uniform(0.4, 0.9))
        options.setdefault("ref_kl_weight", 0.5)

    keep("advantages", sign * uniform(0.5, 1.5))
    if old_log_prob or (old_form is None and isinstance(objective, FlowGRPO)):
        error = (x_next - old_mean).square().mean(1)
        deviation = some_std[:, 0]
        gaussian = -error / (2 * deviation**2) - torch.log(deviation) - 0.5 * math.log(2 * math.pi)
        value = -error if sampler == "cps" else torch.where(std[:, 0] == 0, 0.01 * lean, gaussian)
        keep("old_log_prob", value * (numel if options.get("latent_reduction") == "sum" else 1))
    if weights:
        keep("weights", uniform(0.5, 1.5))
    return out | {"sampler": sampler, "sigma_max": SIGMA_MAX} | options


# Steps from sigma 1 whose coefficients are dyadic: the rest of the schedule, b and std; a is 1/2 in all of them.
DYADIC = {
    "flow_sde": ({"sigma_next": 0.75, "noise_level": 1.0, "sigma_max": 0.75}, -0.25, 1.0),
    "dance_sde": ({"sigma_next": 0.75, "noise_level": 2.0}, -0.25, 1.0),
    "cps": ({"sigma_next": 0.5, "noise_level": 1.0}, -0.5, 0.5),
}


def step_mask_cells(
    numel: int,
    old_form: str,
    dtype: torch.dtype = torch.float32,
    *,
    sampler: str = "dance_sde",
    kl_divisor: str = "gaussian",
) -> tuple[dict[str, Any], torch.Tensor]:
    """The cells of `cases.mask_cells` as steps, exact in every form of the old policy.

    Outputs are multiples of 1/4 and samples of 1/8, so that every mean is one of 1/16 with at most 8 significant bits.
    `v - v°` is one of three powers of 2, and its square, but for the divisor, is the KL: the threshold in the middle.
    """
    generator = torch.Generator().manual_seed(numel)
    schedule, b, std = DYADIC[sampler]
    size = {"below": 0.5, "at": 1.0, "above": 2.0}  # of v - v°
    lean = {"below": 0.0, "at": 0.5, "above": 1.0}  # of x' - mu°, in drifts: the log-ratio is 0 in the middle
    gap = torch.tensor([size[kl] for kl, _, _ in CELLS])[:, None]
    gap = gap * (2.0 * torch.randint(0, 2, (len(CELLS), numel), generator=generator) - 1)
    old_output = torch.randint(-4, 5, (len(CELLS), numel), generator=generator) / 4
    sample = torch.randint(-8, 9, (len(CELLS), numel), generator=generator) / 8
    old_mean = 0.5 * sample + b * old_output
    away = b * gap * torch.tensor([lean[ratio] for _, ratio, _ in CELLS])[:, None]
    latents = {"model_output": old_output + gap, "sample": sample, "prev_sample": old_mean + away}
    latents[OLD_FORMS[old_form]] = {"mean": old_mean, "output": old_output, "residual": away / std}[old_form]
    for value in latents.values():
        assert torch.equal(value.to(dtype).float(), value)  # the premise: nothing is rounded
    divisor = {"gaussian": 2 * std**2, "constant": 2.0, "velocity": b**2}[kl_divisor]
    kl_space = "velocity" if kl_divisor == "velocity" else "latent"
    arguments = {name: value.to(dtype) for name, value in latents.items()} | {
        "advantages": torch.tensor([sign for _, _, sign in CELLS]),
        "objective": FlowDPPO(b**2 / divisor, normalize_kl=kl_divisor != "constant", kl_space=kl_space),
    }
    return arguments | {"sampler": sampler, "sigma": 1.0} | schedule, mask_cells(1)[1]
