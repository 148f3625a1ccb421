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
        "KL with sqrt(-dt) twice",
        "verl-omni",
        "`FlowDPPOLoss` and `GRPOGuardLoss` take `std_dev_t * sqrt_dt` for every `sde_type`, but the `std_dev_t` of "
        "`cps` and `dance_sde` has sqrt(-dt) in it already",
        "KL 1/(-dt) times too large: 21.4 times at the second step of SD3.5's ten, so more rows are blocked",
        "the same KL",
        "the KL of the transition, whatever the sampler",
    ),
    Defect(
        "KL where nothing is random",
        "verl-omni",
        "the last step of `cps` has std 0: the KL is inf, or NaN where an element is unchanged, and the loss of "
        "`GRPOGuardLoss` NaN",
        "every row that moves away from the old policy is blocked there; with `grpo_guard` the gradient is NaN",
        "inf or NaN, NaN only where the whole mean is unchanged",
        "KL 0, ratio 1 in `grpo_guard`, no gradient of drift or penalty",
    ),
    Defect(
        "reference KL without sqrt(-dt)",
        "verl-omni",
        "`KLLoss` divides by `2 std_dev_t^2`, and the `std_dev_t` of `sde` is without sqrt(-dt)",
        "the penalty is -dt times the KL: 0.047 times at the second step of SD3.5's ten, otherwise at the others",
        "the same penalty",
        "the KL of the transition; `kl_loss_coef` has to be chosen anew",
    ),
    Defect(
        "NaN KL counts as low",
        "verl-omni",
        "`FlowDPPOLoss` takes `kl >= threshold`, which is false for NaN",
        "a row with a NaN in its mean is never blocked",
        "kept",
        "counts as high",
    ),
    Defect(
        "NaN gradient of blocked rows",
        "verl-omni",
        "a row that is blocked or clipped away has gradient 0 * inf where its ratio is infinite",
        "one row of log-ratio above 88.7 makes every weight NaN",
        "NaN",
        "gradient 0",
    ),
    Defect(
        "one scale for the batch",
        "verl-omni",
        "`GRPOGuardLoss` takes the means of `std_dev_t` and `sqrt_dt` over a micro-batch for every row",
        "none while its rows are at one step; 0.87 and 1.20 times the rows' own scales where one is at the second and "
        "one at the third of SD3.5's ten steps",
        "the batch's",
        "each row's own",
    ),
    Defect(
        "extremes are averaged",
        "verl-omni",
        "the worker takes the mean of every metric over micro-batches and ranks",
        "`ratio_max`, `ratio_min` and `kl_new_old_max` are means of the micro-batches' extremes",
        "the same means",
        "the extremes of all",
    ),
    Defect(
        "deviation of one ratio",
        "verl-omni",
        "`ratio_std` of `FlowGRPOLoss` and `GRPOGuardLoss` is NaN for a micro-batch of one row",
        "NaN in the mean over micro-batches, at every step",
        "NaN",
        "0",
    ),
    Defect(
        "a sigma per row along the last latent axis",
        "verl-omni",
        "`FlowDPPOLoss` broadcasts a `[B]` `sqrt_dt` with a 0-dim `std_dev_t`, what `sample_previous_step` returns "
        "without `timestep`, against the last latent axis",
        "an error, or a wrong KL where that axis has length B",
        "the trainer's own function runs",
        "the sigma of each row",
    ),
    Defect(
        "means in half precision",
        "verl-omni",
        "`FlowDPPOLoss` squares the difference of half-precision means in half precision",
        "a KL 0.07 % off in bfloat16; workers store float32",
        "the trainer's own function runs",
        "squared in float32",
    ),
    Defect(
        "log-prob without noise",
        "verl-omni",
        "`sample_previous_step` scores a step of noise level 0",
        "log-prob NaN or -inf, gradient NaN",
        "log-prob 0, gradient 0: a rollout throws these steps away",
        "log-prob 0, gradient 0",
    ),
    Defect(
        "half a gradient on a tie",
        "verl-omni",
        "a ratio outside the clip range whose two surrogates round to the same float32: `maximum` halves the gradient",
        "half the gradient of a row whose ratio is an ulp outside",
        "no gradient: the ratio is outside",
        "no gradient",
    ),
]
