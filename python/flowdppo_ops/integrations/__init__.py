"""The trainers' own entry points, run by this package: one module per trainer, and what `strict` decides.

With `strict=True`, the default here, a trainer's numbers are reproduced to rounding, its defects included; with
`strict=False` the fused functions do what the maths says. `DEFECTS` lists every difference.
"""

from __future__ import annotations

from typing import NamedTuple

from ._patch import Incompatible

__all__ = ["DEFECTS", "Defect", "Incompatible"]


class Defect(NamedTuple):
    """A behaviour of a trainer that is not what the maths says, and what each setting does about it."""

    name: str
    trainer: str
    behaviour: str
    effect: str  # with a number
    strict: str  # what `strict=True` does
    fixed: str  # what `strict=False` does


DEFECTS: list[Defect] = [
    Defect(
        name="sigma of the KL near sigma 1",
        trainer="UniRL",
        behaviour="`FlowDPPO._compute_sigma_t` clamps sigma to 0.99; the step puts `sigmas[1]` for an exact 1",
        effect="first step of the SD3 recipe (10 steps, shift 3, eta 0.7): 1.3229 for 0.7, a KL 3.57 times too small",
        strict="as UniRL",
        fixed="the transition's standard deviation",
    ),
    Defect(
        name="sigma of the KL with CPS and Dance",
        trainer="UniRL",
        behaviour="`FlowDPPO._compute_sigma_t` has Flow-SDE's formula whatever the strategy",
        effect="steps 0, 1, 4 of that schedule: 0.42, 1.24 and 2.97 times the KL (CPS), 0.01, 0.037 and 0.22 (Dance)",
        strict="as UniRL",
        fixed="the transition's standard deviation; no KL at the last step of CPS, which draws nothing",
    ),
    Defect(
        name="sigma_t for token and video trajectories",
        trainer="UniRL",
        behaviour="`[1, S, 1, 1, 1]` is broadcast against means of rank 4 and 6",
        effect="an exception; or a KL of mixed rows or steps where sizes happen to fit (token: B = S, B = 1 or S = 1; "
        "video: C = S or C = 1)",
        strict="one KL per row",
        fixed="one KL per row",
    ),
    Defect(
        name="means without latent dimensions",
        trainer="UniRL",
        behaviour="the mean over no dimensions is one over all",
        effect="one KL for the batch",
        strict="UniRL's own function runs",
        fixed="one KL per row",
    ),
    Defect(
        name="gradient of a blocked row with an infinite ratio",
        trainer="UniRL",
        behaviour="0 times infinity",
        effect="NaN where the log-ratio is above 88.7; one such row makes every weight NaN",
        strict="NaN",
        fixed="0",
    ),
    Defect(
        name="KL of half-precision means",
        trainer="UniRL",
        behaviour="the difference is squared in the means' dtype, `trajectory_precision`",
        effect="KL off by 1e-4 (bfloat16) and 6e-5 (float16) of itself in a recorded training step",
        strict="squared in float32",
        fixed="squared in float32",
    ),
    Defect(
        name="extremes of metrics",
        trainer="UniRL",
        behaviour="`aggregate_numeric_metrics` averages over micro-batches, updates and ranks, also minima and maxima",
        effect="`ratio_max` 2, 4 and 3 of three micro-batches are logged as 3, not 4",
        strict="as UniRL",
        fixed="with `enable()`: the least `*_min`, the largest `*_max`",
    ),
    Defect(
        name="log-prob of a step of no length",
        trainer="UniRL",
        behaviour="an SDE of standard deviation 0 is given a density",
        effect="NaN where a schedule has a sigma twice, which those of UniRL have not",
        strict="0, with gradient 0",
        fixed="0, with gradient 0",
    ),
]
