"""Inputs for `loss`, drawn so that every branch of the objectives is entered.

An independent draw of the new means would put every log-ratio far on one side; here the new mean is the old one plus
a drift of chosen KL, and the next sample leans along or against that drift, which chooses the side of the ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

THRESHOLD = 1e-2

# Limits inside the spread of the log-ratios that `draw` gives (0.005 to 0.8), so that rows fall on both sides.
OBJECTIVES = {
    "dppo": FlowDPPO(kl_mask_threshold=THRESHOLD),
    "grpo": FlowGRPO(clip_range=(0.01, 0.02), adv_clip_max=1.0),
    "guard": GRPOGuard(clip_range=0.01),
}
# Options beyond the ones above, each with a branch of its own.
VARIANTS = {
    "dppo symmetric": FlowDPPO(kl_mask_threshold=THRESHOLD, mask="symmetric"),
    "dppo none": FlowDPPO(kl_mask_threshold=THRESHOLD, mask="none"),
    "dppo plain kl": FlowDPPO(kl_mask_threshold=THRESHOLD / 10, normalize_kl=False),
    "dppo keep nan": FlowDPPO(kl_mask_threshold=THRESHOLD, nan_kl="keep"),
    "dppo infinite threshold": FlowDPPO(kl_mask_threshold=math.inf),
    "grpo one number": FlowGRPO(clip_range=0.02),
    "guard own scale": GRPOGuard(clip_range=(0.01, 0.02), adv_clip_max=1.0, per_row_scale=True),
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Of a public function's arguments; None where there is no default."""
    parameters = signature(function).parameters.items()
    return {name: None if one.default is one.empty else one.default for name, one in parameters}


# (row shape, latent shape)
LAYOUTS = {
    "tokens [B,N,C]": ((3,), (7, 5)),
    "image [B,C,H,W]": ((2,), (4, 6, 6)),
    "video [B,C,T,H,W]": ((2,), (4, 3, 5, 6)),
    "steps [B,S,N,C]": ((2, 3), (5, 8)),
    "video steps [B,S,C,T,H,W]": ((2, 2), (3, 2, 3, 4)),
    "one row of 0-dim advantages": ((), (4, 9)),
    "one row": ((1,), (33,)),
    "rows without latent dimensions": ((12,), ()),
    "one number": ((), ()),
    "one row per axis": ((1, 1), (6,)),
}

# Elements per row, with the reason each is kept.
SIZES = {
    1: "nothing but a tail",
    3: "remainder 3 of 4, shorter than any vector",
    4: "one vector of 4, no tail",
    5: "remainder 1 of 4",
    7: "remainder 3 of 4 after one vector",
    8: "one vector of 8, no tail",
    9: "remainder 1 of 8",
    31: "one short of 32",
    32: "one unrolled block of 4 x 8",
    33: "remainder 1 of 32",
    35: "remainder 3 of 32 and of 4",
    97: "prime",
    1024: "many blocks, no tail",
    32767: "one short of the internal chunk of 32768",
    32768: "exactly one chunk",
    32769: "a second chunk of one element",
    40000: "a second chunk, partly filled",
    65536 + 7: "three chunks, the last all tail",
}

LATENTS = ("prev_sample_mean", "old_prev_sample_mean", "prev_sample", "ref_prev_sample_mean")
LOG_PROBS = ("log_prob", "old_log_prob")

_f32, _bf16, _f16, _f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Per tensor; "*" is for those not named.
DTYPES = {
    "float32": {"*": _f32},
    "bfloat16": {"*": _bf16},
    "float16": {"*": _f16},
    "float64": {"*": _f64},
    "bfloat16 policy, float32 rollout": {"*": _f32, "prev_sample_mean": _bf16},
    "float32 policy, 16-bit rollout": {"*": _f32, "old_prev_sample_mean": _bf16, "prev_sample": _f16},
    "every latent another": {
        "*": _f32,
        "prev_sample_mean": _f16,
        "old_prev_sample_mean": _f32,
        "prev_sample": _bf16,
        "ref_prev_sample_mean": _f16,
        "advantages": _bf16,
        "std": _f16,
        "weights": _f16,
    },
    "one float64 latent": {"*": _f32, "prev_sample": _f64, "log_prob": _f64},
}


def draw(
    row_shape: tuple[int, ...] = (12,),
    latent_shape: tuple[int, ...] = (5, 8),
    *,
    source: str = "sample",
    dtypes: dict[str, torch.dtype] | None = None,
    weights: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments for `loss`.

    source: "sample" (prev_sample, the old log-prob from the means), "sample and old" (with old_log_prob too) or
    "log_prob" (both log-probs given). `options` go to `loss`. With `ref_kl_weight` a reference mean is drawn.
    The row's number picks its KL (0.1 or 10 thresholds), the side of its ratio, and the sign of its advantage, with
    periods 2, 4 and 12.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, numel = math.prod(row_shape), math.prod(latent_shape)
    objective = options.setdefault("objective", OBJECTIVES["dppo"])
    cps, total = options.get("density") == "cps", options.get("latent_reduction") == "sum"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)

    number = torch.arange(rows) + seed
    kl = torch.where(number % 2 == 0, 0.1, 10.0).double() * THRESHOLD / (numel if total else 1)
    lean = torch.where(number // 2 % 2 == 0, 4.0, -4.0).double()
    sign = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)[number // 4 % 3]

    std = uniform(0.25, 0.75)
    old_mean = normal(rows, numel)
    drift = normal(rows, numel)
    drift = drift / drift.square().mean(1, keepdim=True).sqrt() * (std * torch.sqrt(2 * kl))[:, None]
    sample = old_mean + std[:, None] * normal(rows, numel) + lean[:, None] * drift
    mean = old_mean + drift

    out: dict[str, Any] = {
        "prev_sample_mean": mean,
        "old_prev_sample_mean": old_mean,
        "advantages": sign * uniform(0.5, 1.5),
        "std": std,
    }
    if source == "log_prob":
        out["old_log_prob"] = -1.2 + 0.1 * normal(rows)
        out["log_prob"] = out["old_log_prob"] + torch.where(lean > 0, 1.0, -1.0) * uniform(0.005, 0.3)
    else:
        out["prev_sample"] = sample
    if source == "sample and old":
        error = (sample - old_mean).square().mean(1)
        out["old_log_prob"] = -error if cps else -error / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
        if total:
            out["old_log_prob"] = out["old_log_prob"] * numel
    if isinstance(objective, GRPOGuard):
        out["sqrt_dt"] = uniform(0.2, 0.5)
    if weights:
        out["weights"] = uniform(0.5, 1.5)
    if options.get("ref_kl_weight"):
        out["ref_prev_sample_mean"] = mean + 0.3 * std[:, None] * normal(rows, numel)
        out["ref_std"] = uniform(0.4, 0.9)

    dtypes = dtypes or DTYPES["float32"]
    for name, value in out.items():
        shape = row_shape + latent_shape if name in LATENTS else row_shape
        out[name] = value.reshape(shape).to(dtypes.get(name, dtypes["*"]))
    return out | options


# ---- exact mask cells ------------------------------------------------------------------------------------------------

CELLS = list(itertools.product(("below", "at", "above"), ("below", "at", "above"), (-1.0, 0.0, 1.0)))
CELL_THRESHOLD = 2.0**-5


def mask_cells(numel: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], torch.Tensor]:
    """One row per cell of KL x ratio x advantage, in exact dyadic numbers, and what `keep` must be there.

    The old mean is a multiple of 1/16 in [-1, 1] and the drift +-2^-6, +-2^-5 or +-2^-4, so every value has at most 8
    significant bits (bfloat16 holds it), and every sum is exact in float32 in any order. With std 1/8 the KL is
    d/(2 std^2) = 2^-7, 2^-5 or 2^-3: the middle one *is* the threshold. `x' = mu° + drift (1/2 + t)` makes the
    log-ratio `2 kl t`: exactly 0 for t = 0.
    """
    generator = torch.Generator().manual_seed(numel)
    size = {"below": 2.0**-6, "at": 2.0**-5, "above": 2.0**-4}
    lean = {"below": -0.5, "at": 0.0, "above": 0.5}
    drift = torch.tensor([size[kl] for kl, _, _ in CELLS])[:, None]
    t = torch.tensor([lean[ratio] for _, ratio, _ in CELLS])[:, None]
    drift = drift * (2.0 * torch.randint(0, 2, (len(CELLS), numel), generator=generator) - 1)
    old_mean = torch.randint(-16, 17, (len(CELLS), numel), generator=generator) / 16
    sample = old_mean + drift * (0.5 + t)
    latents = {"prev_sample_mean": old_mean + drift, "old_prev_sample_mean": old_mean, "prev_sample": sample}
    for value in latents.values():
        assert torch.equal(value.to(dtype).float(), value)  # the premise: nothing is rounded
    keep = [not (kl != "below" and (ratio, sign) in (("above", 1.0), ("below", -1.0))) for kl, ratio, sign in CELLS]
    arguments = {name: value.to(dtype) for name, value in latents.items()} | {
        "advantages": torch.tensor([sign for _, _, sign in CELLS]),
        "std": 0.125,
        "objective": FlowDPPO(kl_mask_threshold=CELL_THRESHOLD),
    }
    return arguments, torch.tensor(keep)
