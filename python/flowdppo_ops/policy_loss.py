"""The fused policy loss of flow-matching RL: `loss` takes means, `step_loss` takes model outputs."""

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
    """Gaussian log-prob, KL, ratio, mask or clip, and loss, in one pass over the latents. The backward takes one more.

    A *row* is one (sample, step) pair; the rows have the shape of `advantages`. *Latents* have the rows' shape followed
    by any latent dimensions (image, token, video). Tensors are float32, bfloat16 or float16, each with its own dtype
    and any strides; arithmetic and results are float32. If a latent or a log-prob is float64, arithmetic and results
    are float64, on the CPU only. A *row vector* is a number, a 0-dim tensor, or a tensor that broadcasts to the rows
    dimension by dimension, with or without trailing ones for the latent dimensions: `[B]`, `[B, 1, 1, 1]`, `[1, S]`,
    `[1, S, 1, 1, 1]`. `[S]` for rows `[B, S]` is an error.

    Args:
        prev_sample_mean: latents; mean `mu` of the next latent under the policy that is trained.
        old_prev_sample_mean: latents; the mean under the old policy. Both means may be None for `FlowGRPO` with both
            log-probs and no reference KL; then `.kl` is None. `FlowGRPO` with `prev_sample` and `old_log_prob` does not
            need the old mean either.
        advantages: rows.
        std: row vector > 0; standard deviation of the transition, which contains sqrt(-dt) (verl-omni: `std_dev_t *
            sqrt_dt` for `sde_type="sde"`, `std_dev_t` for the others). Needed with `prev_sample`, `FlowDPPO` or
            `GRPOGuard`.
        sqrt_dt: row vector > 0; `sqrt(sigma - sigma_next)`. Only `GRPOGuard` needs it.
        prev_sample: latents; the next latent that the rollout drew, a constant. The gradient then goes to
            `prev_sample_mean`. Exactly one of `prev_sample` and `log_prob` must be given.
        log_prob: rows; nats, the log-prob that the trainer has computed. The gradient then goes to it. Needs
            `old_log_prob`.
        old_log_prob: rows; nats, the log-prob under the old policy. If it is None the log-ratio is computed from the
            means without cancellation, and is exactly 0 if they are equal.
        weights: row vector; multiplies each row's policy loss (rollout importance weights).
        ref_prev_sample_mean: latents; mean `mu_ref` under the reference policy.
        ref_kl_weight: a number. If it is not 0, `ref_kl_weight * mean over rows of mean (mu - mu_ref)^2 / (2
            ref_std^2)` is added to the loss.
        ref_std: row vector > 0; None takes `std`.
        objective: `FlowDPPO`, `FlowGRPO` or `GRPOGuard`.
        density: "gaussian", or "cps" for coefficients-preserving sampling, whose log-prob is minus the mean squared
            error.
        latent_reduction: "mean" over the latents, as in all trainers, or "sum" for joint log-probs and KLs.
        reduction: over the rows' policy losses: "mean", "sum", "none" (the loss is row-shaped), or "kept_mean" (the sum
            over the kept rows, divided by their number). The reference KL is summed with "sum", added to its row with
            "none", and otherwise averaged over all rows.
        process_group: a `torch.distributed` group of sequence or context parallelism, whose ranks hold shards of the
            latents of the same rows. Shards may differ in size; all other arguments must be the same on all ranks, and
            all ranks must call. One collective adds up the rows' sums, `4 rows + 1` float64. Every rank gets the loss
            of the whole latents, and its derivative in its own shard: do not reduce gradients over this group again.

    Returns:
        `PolicyLoss`. `.loss` is differentiable, once: in `prev_sample_mean` with `prev_sample`, a reference KL or
        `GRPOGuard`, and in `log_prob` if that is given. The gradient of a blocked row is exactly 0, even if its ratio
        is infinite.

    Raises:
        ValueError: shapes, a missing or surplus argument, different devices, an unknown option.
        TypeError: not a tensor, a dtype that is not supported.
        NotImplementedError: forward-mode or second derivatives, `torch.func` transforms.
        RuntimeError: a device without a backend; `flowdppo_ops.reference.loss` runs there.

    Environment: `FLOWDPPO_OPS_BACKEND=reference` sends every eager call to `flowdppo_ops.reference.loss`;
    `FLOWDPPO_OPS_CHECK=1` checks values too (finite, std > 0), which synchronises a GPU. Compiled calls ignore both.

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
    """`loss` from the model's raw output: scheduler step, log-prob, KL and objective in one pass over the latents.

    Rows, latents and row vectors are as in `loss`. The steps of a trajectory may be rows: `[B, S, ...]` latents, `[B,
    S]` advantages, and a schedule of `[1, S]` or `[1, S, 1, 1, 1]`. The means are `mu = a x + b v`; `sampler` and
    schedule give a, b and the std.

    Args:
        model_output: latents; the velocity `v` that the trained policy predicts. The gradient goes here, in its dtype.
        sample, prev_sample: latents, constants; `x`, and the next latent `x'` that the rollout drew from it.
        advantages: rows.
        sigma, sigma_next: row vectors in [0, 1], `sigma_next < sigma`; the noise levels now and next.
        noise_level: row vector >= 0; the trainers' `eta`.
        sampler: "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO) or "cps" (coefficients-preserving sampling). The
            log-prob of "cps" is `-mean (x' - mu)^2`, that of the others is Gaussian.
        sigma_max: row vector < 1; replaces `sigma` in `1 - sigma` where `sigma == 1` exactly. Trainers pass
            `sigmas[1]`. Only "flow_sde" reads it.
        uncond_output, guidance_scale: latents and row vector, both or neither; classifier-free guidance. The step uses
            `v = uncond_output + guidance_scale * (model_output - uncond_output)`, and both outputs have a gradient.
        old_prev_sample_mean, old_model_output, old_residual: latents; the old policy, exactly one of its mean, its
            model output (after its guidance), or its residual `(x' - mu_old) / std`, which `encode_residual` and
            `sde_step(residual_dtype=...)` return and which may be stored as float16. If the old model output equals `v`
            the KL is exactly 0. `FlowGRPO` with `old_log_prob` needs none of them; then `.kl` is None.
        old_log_prob: rows; nats, as in `loss`: from `sde_step`, or from a trainer's scheduler with its normaliser.
        weights: as in `loss`.
        ref_prev_sample_mean, ref_model_output: latents; the reference policy, exactly one of its mean and its model
            output (after its guidance), if `ref_kl_weight` is not 0.
        ref_kl_weight: as in `loss`.
        ref_std: row vector >= 0; None takes the std of the transition.
        objective: `FlowDPPO`, `FlowGRPO` or `GRPOGuard`. `FlowDPPO(kl_space="velocity")` compares `mean (v - v_old)^2`.
        latent_reduction, reduction, process_group: as in `loss`.

    A row is *deterministic* if the std of its transition is 0: at `noise_level` 0, or at the last step of "cps". There
    a Gaussian `log_prob` is 0 with gradient 0, the log-ratio without `old_log_prob` is 0, a residual means `mu_old =
    x'`, and a KL or a reference KL whose divisor is 0 is 0. The log-prob of "cps" needs no std and stays.

    Returns:
        `PolicyLoss`. `.loss` is differentiable in `model_output` and `uncond_output`, once.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `loss`.

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
