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
        name="flow_factory: scales and log-probs of different rows",
        trainer="Flow-Factory GRPO-Guard",
        behaviour="the scale `[B, 1, ...]` of every row meets the log-prob `[B]` of every row",
        effect="none while all rows are at one step; at six steps ratios are up to 6.4 % off, the loss 0.8 %",
        strict="the same, `ratio` in its shape `[B, 1, ..., B]`",
        fixed="each row its own scale",
    ),
    Defect(
        name="flow_factory: the penalty in policy_loss",
        trainer="Flow-Factory",
        behaviour="`loss += kl_loss` adds to the very tensor that is logged as `policy_loss`",
        effect="with `kl_beta` > 0 `policy_loss` is `loss`: logged twice, the policy's own never",
        strict="the same",
        fixed="`policy_loss` without the penalty",
    ),
    Defect(
        name="flow_grpo: one drift for the batch",
        trainer="GRPO-Guard script",
        behaviour="the drift that re-centres a ratio is averaged over the batch as well",
        effect="every ratio has a gradient in every mean; of six recorded rows its norm is 0.0050 to 0.0074, "
        "not 0.031 to 0.20",
        strict="the same",
        fixed="each row its own drift",
    ),
    Defect(
        name="flow_grpo: penalty without dt",
        trainer="flow_grpo, GRPO-Guard script",
        behaviour="the reference penalty is divided by `2 std_dev_t^2`, which has no -dt in it",
        effect="3.7 to 25 times less than the KL of the step over nine of SD3.5's ten steps, 112 times at the last",
        strict="the same",
        fixed="the step's KL; `beta` then means something else, and `sqrt_dt` is needed",
    ),
    Defect(
        name="flow_grpo: token latents mixed",
        trainer="flow_grpo",
        behaviour="sigmas are `[B, 1, 1, 1]` whatever the latents, so that `[B, N, C]` becomes `[B, B, N, C]`",
        effect="B times the memory, and one log-prob for all: -0.34 where four samples have -0.27 to -0.42",
        strict="the same",
        fixed="each sample scored by itself",
    ),
    Defect(
        name="scripts: NaN gradient of a blocked row",
        trainer="flow_grpo, GRPO-Guard script, Flow-Factory",
        behaviour="a ratio that overflows and is clipped away has the gradient 0 times infinity",
        effect="NaN in every parameter, from one row",
        strict="the same",
        fixed="0",
    ),
    Defect(
        name="scripts: a step without noise",
        trainer="flow_grpo, GRPO-Guard script, Flow-Factory",
        behaviour="with noise level 0 a Gaussian log-prob is NaN or infinite",
        effect="NaN in every parameter, from one row",
        strict="log-prob 0, gradient 0",
        fixed="log-prob 0, gradient 0",
    ),
]
