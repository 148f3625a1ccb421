"""Integrations: one module per trainer, whose functions replace the trainer's own and run fused.

With `strict=True`, the default, they reproduce the trainer's numbers to rounding, its defects included. With
`strict=False` they compute what the formulas say. `DEFECTS` lists every difference.
"""

from __future__ import annotations

from typing import NamedTuple

from ._patch import Incompatible

__all__ = ["DEFECTS", "Defect", "Incompatible"]


class Defect(NamedTuple):
    """A trainer's deviation from the formulas, and what either setting of `strict` computes there."""

    name: str
    trainer: str  # and the versions that have it, if not all
    behaviour: str
    effect: str  # with a number
    strict: str  # what `strict=True` computes
    fixed: str  # what `strict=False` computes


# fmt: off
DEFECTS: list[Defect] = [
    Defect("KL with sqrt(-dt) twice", "verl-omni",
        "`FlowDPPOLoss` and `GRPOGuardLoss` take `std_dev_t * sqrt_dt` for every `sde_type`, but the `std_dev_t` of "
        "`cps` and `dance_sde` has sqrt(-dt) in it already",
        "KL 1/(-dt) times too large: 21.4 times at the second step of SD3.5's ten, so more rows are blocked",
        "this KL",
        "the KL of the transition, whatever the sampler"),
    Defect("KL where nothing is random", "verl-omni",
        "the last step of `cps` has std 0: the KL is inf, or NaN where an element is unchanged, and the loss of "
        "`GRPOGuardLoss` NaN",
        "every row that moves away from the old policy is blocked there; with `grpo_guard` the gradient is NaN",
        "KL inf, or NaN if the whole mean is unchanged; the NaN loss",
        "KL 0; ratio 1 in `grpo_guard`; drift and penalty have no gradient"),
    Defect("reference KL without sqrt(-dt)", "verl-omni",
        "`KLLoss` divides by `2 std_dev_t^2`, and the `std_dev_t` of `sde` is without sqrt(-dt)",
        "the penalty is -dt times the KL: 0.047 times at the second step of SD3.5's ten, another factor at the others",
        "this penalty",
        "the KL of the transition; `kl_loss_coef` has to be chosen anew"),
    Defect("NaN KL counts as low", "verl-omni",
        "`FlowDPPOLoss` takes `kl >= threshold`, which is false for NaN",
        "a row with a NaN in its mean is never blocked",
        "the row is not blocked",
        "a NaN KL counts as high"),
    Defect("NaN gradient of blocked rows", "all",
        "a row that is blocked or clipped away has gradient 0 * inf where its ratio is infinite",
        "one row of log-ratio above 88.7 makes every weight NaN",
        "NaN",
        "gradient 0"),
    Defect("one scale for the batch", "verl-omni",
        "`GRPOGuardLoss` takes the means of `std_dev_t` and `sqrt_dt` over a micro-batch for every row",
        "none while its rows are at one step; 0.87 and 1.20 times the rows' own scales where one is at the second "
        "and one at the third of SD3.5's ten steps",
        "the scale of the batch",
        "the scale of each row"),
    Defect("extremes are averaged", "verl-omni, UniRL",
        "every metric is averaged over micro-batches and ranks (UniRL: and updates), minima and maxima too",
        "`ratio_max` 2, 4 and 3 of three micro-batches are logged as 3, not 4",
        "these averages",
        "the minimum and the maximum of all; in UniRL only with `enable()`"),
    Defect("deviation of one ratio", "verl-omni",
        "`ratio_std` of `FlowGRPOLoss` and `GRPOGuardLoss` is NaN for a micro-batch of one row",
        "NaN in the mean over micro-batches, at every step",
        "NaN",
        "0"),
    Defect("a sigma per row along the last latent axis", "verl-omni",
        "`FlowDPPOLoss` broadcasts a `[B]` `sqrt_dt` with a 0-dim `std_dev_t`, what `sample_previous_step` returns "
        "without `timestep`, against the last latent axis",
        "an error, or a wrong KL where that axis has length B",
        "the trainer's own function runs",
        "the sigma of each row"),
    Defect("means in half precision", "verl-omni",
        "`FlowDPPOLoss` squares the difference of half-precision means in half precision",
        "a KL 0.07 % off in bfloat16; workers store float32",
        "the trainer's own function runs",
        "squared in float32"),
    Defect("log-prob without noise", "all",
        "a step of standard deviation 0 is scored: at noise level 0; in UniRL, which scores none of those, where a "
        "schedule has a sigma twice (its own have not)",
        "log-prob NaN or infinite, and NaN in every parameter, from one row",
        "log-prob 0, gradient 0: a rollout throws these steps away",
        "log-prob 0, gradient 0"),
    Defect("half a gradient on a tie", "verl-omni",
        "a ratio outside the clip range whose two surrogates round to the same float32: `maximum` halves the gradient",
        "half the gradient of a row whose ratio is an ulp outside",
        "no gradient: the ratio is outside",
        "no gradient"),
    Defect("sigma of the KL near sigma 1", "UniRL before September 2026",
        "`FlowDPPO._compute_sigma_t` clamps sigma to 0.99; the step puts `sigmas[1]` for an exact 1",
        "first step of the SD3 recipe (10 steps, shift 3, eta 0.7): 1.3229 for 0.7, a KL 3.57 times too small",
        "UniRL's sigma",
        "the transition's standard deviation"),
    Defect("sigma of the KL with CPS and Dance", "UniRL before September 2026",
        "`FlowDPPO._compute_sigma_t` has Flow-SDE's formula whatever the strategy",
        "steps 0, 1, 4 of that schedule: 0.42, 1.24 and 2.97 times the KL (CPS), 0.01, 0.037 and 0.22 (Dance)",
        "UniRL's sigma",
        "the transition's standard deviation; no KL at the last step of CPS, which draws nothing"),
    Defect("sigma_t for token and video trajectories", "UniRL before September 2026",
        "`[1, S, 1, 1, 1]` is broadcast against means of rank 4 and 6",
        "an exception; or a KL of mixed rows or steps where sizes happen to fit (token: B = S, B = 1 or S = 1; "
        "video: C = S or C = 1)",
        "one KL per row",
        "one KL per row"),
    Defect("means without latent dimensions", "UniRL",
        "the mean over no dimensions is one over all",
        "one KL for the batch",
        "UniRL's own function runs",
        "one KL per row"),
    Defect("KL of half-precision means", "UniRL",
        "the difference is squared in the means' dtype, `trajectory_precision`",
        "KL off by 1e-4 (bfloat16) and 6e-5 (float16) of itself in a recorded training step",
        "squared in float32",
        "squared in float32"),
    Defect("flow_factory: scales and log-probs of different rows", "Flow-Factory GRPO-Guard before July 2026",
        "the scale `[B, 1, ...]` of every row meets the log-prob `[B]` of every row",
        "none while all rows are at one step; at six steps ratios are up to 6.4 % off, the loss 0.8 %",
        "these ratios, with `ratio` in their shape `[B, 1, ..., B]`",
        "each row has its own scale"),
    Defect("flow_factory: the penalty in policy_loss", "Flow-Factory",
        "`loss += kl_loss` adds to the very tensor that is logged as `policy_loss`",
        "with `kl_beta` > 0 `policy_loss` is `loss`: logged twice, the policy's own never",
        "`policy_loss` with the penalty",
        "`policy_loss` without the penalty"),
    Defect("flow_grpo: one drift for the batch", "GRPO-Guard script",
        "the drift that re-centres a ratio is averaged over the batch as well",
        "every ratio has a gradient in every mean; of six recorded rows its norm is 0.0050 to 0.0074, not 0.031 to "
        "0.20",
        "the drift of the batch",
        "the drift of each row"),
    Defect("flow_grpo: penalty without dt", "flow_grpo, GRPO-Guard script",
        "the reference penalty is divided by `2 std_dev_t^2`, which has no -dt in it",
        "3.7 to 25 times less than the KL of the step over nine of SD3.5's ten steps, 112 times at the last",
        "this penalty",
        "the KL of the transition; `beta` must be chosen anew, and `sqrt_dt` is needed"),
    Defect("flow_grpo: token latents mixed", "flow_grpo",
        "sigmas are `[B, 1, 1, 1]` whatever the latents, so that `[B, N, C]` becomes `[B, B, N, C]`",
        "B times the memory, and one log-prob for all: -0.34 where four samples have -0.27 to -0.42",
        "these log-probs",
        "each sample is scored by itself"),
]
# fmt: on
