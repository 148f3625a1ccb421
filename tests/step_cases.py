"""Inputs for `step_loss`, drawn so that every branch of the objectives is entered, as `cases.draw` does for `loss`.

Outputs and samples come first; the old policy is a drift of chosen KL away from the mean that they make, and the next
sample leans along or against that drift. Whatever a latent is stored as is rounded before others are formed from it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import OBJECTIVES, THRESHOLD, mask_cells

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference

SAMPLERS = ("flow_sde", "dance_sde", "cps")
OLD_FORMS = {"mean": "old_prev_sample_mean", "output": "old_model_output", "residual": "old_residual"}
REF_FORMS = {"mean": "ref_prev_sample_mean", "output": "ref_model_output"}
SCHEDULE = ("sigma", "sigma_next", "noise_level")
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
    deterministic: bool = False,
    dtypes: dict[str, torch.dtype] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments for `step_loss`.

    old_form: None draws no old policy. deterministic: every third row has no noise. `options` go to `step_loss`; with a
    `ref_form` the weight of the reference term is 0.5. The row's number picks its KL (0.1 or 10 thresholds), the side
    of its ratio and the sign of its advantage, with periods 2, 4 and 12.
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

    sigma = keep("sigma", uniform(0.4, 0.95))
    sigma_next = keep("sigma_next", sigma * uniform(0.6, 0.8))
    noise_level = uniform(0.3, 0.9)
    if deterministic:
        noise_level[::3] = 0.0
    noise_level = keep("noise_level", noise_level)
    a, b, std = reference.transition(sampler, sigma, sigma_next, noise_level, torch.tensor(0.99, dtype=torch.float64))
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
    return out | {"sampler": sampler} | options


def step_mask_cells(
    numel: int, old_form: str, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], torch.Tensor]:
    """The rows of `cases.mask_cells` as steps: sigma 1 -> 3/4 with noise level 1/4 of Dance-SDE has b = -1/4 and
    std = 1/8. The samples are 0, so that means, outputs and residuals are all exact."""
    arguments, keep = mask_cells(numel, dtype)
    mean, old_mean, x_next = (
        arguments.pop(name) for name in ("prev_sample_mean", "old_prev_sample_mean", "prev_sample")
    )
    old = {"mean": old_mean, "output": -4 * old_mean, "residual": (x_next - old_mean) / arguments.pop("std")}[old_form]
    arguments |= {"sampler": "dance_sde", "sigma": 1.0, "sigma_next": 0.75, "noise_level": 0.25}
    latents = {"model_output": -4 * mean, "sample": torch.zeros_like(mean), "prev_sample": x_next}
    return arguments | latents | {OLD_FORMS[old_form]: old}, keep
