"""`loss` and `step_loss`: the policy loss of a flow-matching RL trainer, fused, from means or from model outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._calls import PublicFunction
from ._checks import check_loss, check_step_loss
from ._operators import policy_loss as operator
from ._values import check_values
from .objectives import FlowDPPO, Objective
from .result import PolicyLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def loss(
    prev_sample_mean: Tensor | None,
    old_prev_sample_mean: Tensor | None,
    advantages: Tensor,
    *,
    std: float | Tensor | None = None,
    sqrt_dt: float | Tensor | None = None,
    prev_sample: Tensor | None = None,
    log_prob: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    weights: float | Tensor | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: float | Tensor | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    density: str = "gaussian",
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
) -> PolicyLoss:
    """Gaussian log-prob, KL, ratio, mask or clip, and loss, in one pass over the latents; one more for the gradient.

    A *row* is one (sample, step) pair; the rows have the shape of `advantages`. *Latents* have the rows' shape followed
    by any latent dimensions (image, token, video). Tensors are float32, bfloat16 or float16, mixed freely; arithmetic
    and results are float32. Float64 latents are computed in float64, on the CPU. Any strides work. A *row vector* is a
    number, a 0-dim tensor, or a tensor that broadcasts to the rows dimension by dimension, with or without trailing
    ones for the latent dimensions: `[B]`, `[B, 1, 1, 1]`, `[1, S]`, `[1, S, 1, 1, 1]`; `[S]` for rows `[B, S]` is an
    error.

    Args:
        prev_sample_mean: latents; mean of the next latent under the policy that is trained, `mu`.
        old_prev_sample_mean: latents; the same under the old policy. Both means may be None where nothing needs them:
            `FlowGRPO` with both log-probs and no reference KL. Then `.kl` is None.
        advantages: rows.
        std: row vector > 0; standard deviation of the transition, sqrt(-dt) included (verl-omni: `std_dev_t *
            sqrt_dt` for `sde_type="sde"`, `std_dev_t` for the others). May be None only where the means may.
        sqrt_dt: row vector > 0; `sqrt(sigma - sigma_next)`. For `GRPOGuard` alone.
        prev_sample: latents; the next latent that the rollout drew, a constant. The gradient goes to
            `prev_sample_mean`. Exactly one of `prev_sample` and `log_prob` is given.
        log_prob: rows; a log-prob computed elsewhere, which then gets the gradient. Needs `old_log_prob`.
        old_log_prob: rows; log-prob under the old policy. Without it the log-ratio comes from the means, where nothing
            cancels: exactly 0 when they are equal.
        weights: row vector; multiplies each row's policy loss (rollout importance weights).
        ref_prev_sample_mean: latents; mean under the reference policy, for the penalty.
        ref_kl_weight: adds `ref_kl_weight * mean over rows of mean (mu - mu_ref)^2 / (2 ref_std^2)`.
        ref_std: row vector > 0; None takes `std`.
        objective: `FlowDPPO`, `FlowGRPO` or `GRPOGuard`.
        density: "gaussian", or "cps" for coefficients-preserving sampling, whose log-prob is minus the mean squared
            error.
        latent_reduction: "mean" over the latents, as all trainers do, or "sum" for joint log-probs and KLs.
        reduction: over rows. "mean", "sum", "none" (row-shaped), or "kept_mean": the kept rows' losses over their
            count. The reference term is summed with "sum", averaged over all rows otherwise.
        process_group: the `torch.distributed` group whose ranks hold shards of the same rows' latents, as sequence or
            context parallelism leaves them; the shards may differ in size, everything else is the same on all ranks,
            which must all call. The rows' sums are added up in one collective of `4 rows + 1` float64; the loss is that
            of the whole latents on every rank, and the gradient its derivative in the rank's own shard: nothing is left
            to be reduced over this group. Rows are data-parallel: each rank of another dimension has its own.

    Returns:
        `PolicyLoss`. `.loss` is differentiable in `prev_sample_mean` (given `prev_sample`, a reference term or
        `GRPOGuard`) and in `log_prob` (if given), once. A blocked row's gradient is exactly 0, also where its ratio is
        infinite.

    Raises:
        ValueError: shapes, a missing or surplus argument, different devices, an unknown option.
        TypeError: not a tensor, a dtype that is not supported.
        RuntimeError: a device without a backend; `flowdppo_ops.reference.loss` runs there.

    Environment: `FLOWDPPO_OPS_BACKEND=reference` sends every call to `flowdppo_ops.reference.loss`.
    `FLOWDPPO_OPS_CHECK=1` checks values too (finite, std > 0), which synchronises a GPU.

    Source: arXiv 2606.11025 (Flow-DPPO); verl-omni `FlowDPPOLoss`, `FlowGRPOLoss`, `GRPOGuardLoss` and `KLLoss`; UniRL
    `_flowdppo_kl_adv_loss`. `flowdppo_ops.reference` states every formula.
    """
    arguments = (
        prev_sample_mean, old_prev_sample_mean, advantages, std, sqrt_dt, prev_sample, log_prob, old_log_prob,
        weights, ref_prev_sample_mean, ref_kl_weight, ref_std, objective, density, latent_reduction, reduction,
        process_group,
    )  # fmt: skip
    result = None if is_dynamo_compiling() else _loss.forward(arguments)
    return _loss.checked(arguments) if result is None else result


def step_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    *,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float | Tensor,
    sampler: str = "flow_sde",
    sigma_max: float | Tensor = 0.99,
    uncond_output: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    old_prev_sample_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    old_residual: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    weights: float | Tensor | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    ref_kl_weight: float = 0.0,
    ref_std: float | Tensor | None = None,
    objective: Objective = FlowDPPO(),  # noqa: B008 (frozen)
    latent_reduction: str = "mean",
    reduction: str = "mean",
    process_group: ProcessGroup | None = None,
) -> PolicyLoss:
    """`loss` from the model's raw output: scheduler step, log-prob, KL and objective; one more pass for the gradient.

    Rows, latents and row vectors are as in `loss`. The steps of a trajectory are rows too: `[B, S, ...]` latents,
    `[B, S]` advantages, and a schedule of `[1, S]` or `[1, S, 1, 1, 1]`.

    Args:
        model_output: latents; the velocity `v` that the trained policy predicts. The gradient goes here, in its dtype.
        sample, prev_sample: latents; `x` and the next latent `x'` that the rollout drew from it, constants.
        advantages: rows.
        sigma, sigma_next: row vectors in [0, 1], `sigma_next < sigma`; the noise levels now and next.
        noise_level: row vector >= 0; the trainers' `eta`.
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps" (coefficients-preserving sampling). Decides
            the density: CPS has its own, the others are Gaussian.
        sigma_max: row vector < 1; stands in for `sigma` in `1 - sigma` where `sigma == 1` exactly. Trainers pass
            `sigmas[1]`. For "flow_sde" alone.
        uncond_output, guidance_scale: latents and row vector, together or not at all; classifier-free guidance. The
            step takes `uncond_output + guidance_scale * (model_output - uncond_output)`, and both have a gradient.
        old_prev_sample_mean, old_model_output, old_residual: latents; the old policy, exactly one of its mean, its
            model output (after its guidance), or its residual `(x' - mu_old) / std` as `encode_residual` or
            `sde_step(residual_dtype=...)` gives it: the one to store in two bytes. The KL of an equal model output is
            exactly 0. None is needed by `FlowGRPO` with `old_log_prob`; then `.kl` is None.
        old_log_prob: rows; as in `loss`. Of `sde_step`, or of a trainer's scheduler with its normaliser.
        weights: as in `loss`.
        ref_prev_sample_mean, ref_model_output: latents; the reference policy for the penalty, exactly one of its mean
            and its model output (after its guidance), if `ref_kl_weight` is not 0.
        ref_kl_weight: as in `loss`.
        ref_std: row vector; None takes the transition's.
        objective: `FlowDPPO`, `FlowGRPO` or `GRPOGuard`. `FlowDPPO(kl_space="velocity")` compares `mean (v - v_old)^2`.
        latent_reduction, reduction, process_group: as in `loss`.

    A row is *deterministic* where the transition's std is 0: `noise_level` 0, or the last step of "cps". Nothing is
    random there, so a Gaussian `log_prob` is 0 with gradient 0, the log-ratio without `old_log_prob` is 0, a residual
    stands for `mu_old = x'`, and a KL or a reference penalty whose divisor is 0 is 0. CPS keeps its log-prob, which
    needs no std.

    Returns:
        `PolicyLoss`, differentiable in `model_output` and `uncond_output`, once.

    Raises:
        ValueError, TypeError, RuntimeError: as `loss`.

    Environment: as `loss`; `FLOWDPPO_OPS_CHECK=1` checks the ranges above.

    Source: as `loss`; UniRL `FlowSDEStrategy`, `CPSSDEStrategy` and `DanceSDEStrategy`; verl-omni
    `FlowMatchSDEDiscreteScheduler`. `flowdppo_ops.reference.transition` states the coefficients.
    """
    arguments = (
        model_output, sample, prev_sample, advantages, sigma, sigma_next, noise_level, sampler, sigma_max,
        uncond_output, guidance_scale, old_prev_sample_mean, old_model_output, old_residual, old_log_prob, weights,
        ref_prev_sample_mean, ref_model_output, ref_kl_weight, ref_std, objective, latent_reduction, reduction,
        process_group,
    )  # fmt: skip
    result = None if is_dynamo_compiling() else _step_loss.forward(arguments)
    return _step_loss.checked(arguments) if result is None else result


_loss = PublicFunction(loss, check_loss, operator.memo, operator.run_checked, check_values)
_step_loss = PublicFunction(step_loss, check_step_loss, operator.memo, operator.run_checked, check_values)
