"""`loss`: the policy loss of a flow-matching RL trainer, fused."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _args
from ._check import check_values
from ._library.policy_loss import policy_loss
from ._torch import FAMILY
from .objectives import FlowDPPO, Objective
from .result import PolicyLoss

_WHERE = "flowdppo_ops.loss"


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
    process_group: None = None,
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
        process_group: not supported; must be None.

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
    if _is_set(_BACKEND, _REFERENCE):
        return _reference().loss(**locals())
    call = _args.check_loss(
        _WHERE,
        FAMILY,
        prev_sample_mean=prev_sample_mean,
        old_prev_sample_mean=old_prev_sample_mean,
        advantages=advantages,
        std=std,
        sqrt_dt=sqrt_dt,
        prev_sample=prev_sample,
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        weights=weights,
        ref_prev_sample_mean=ref_prev_sample_mean,
        ref_kl_weight=ref_kl_weight,
        ref_std=ref_std,
        objective=objective,
        density=density,
        latent_reduction=latent_reduction,
        reduction=reduction,
        process_group=process_group,
    )
    if advantages.device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"{_WHERE}: no backend for device {advantages.device}, wanted cpu or cuda; flowdppo_ops.reference.loss "
            "runs on any device (FLOWDPPO_OPS_BACKEND=reference sends every call there)"
        )
    if _is_set(_CHECK, _ON):
        check_values(_WHERE, call)
    value, numbers = policy_loss(call)
    latents = call.latents
    has_kl, has_ref = latents.old_prev_sample_mean is not None, latents.ref_prev_sample_mean is not None
    return PolicyLoss(value, numbers, call.row_shape, has_kl, has_ref)


# The mapping behind `os.environ`, keyed as the platform has it. A name that is not set costs 0.5 us in
# `os.environ.get`, an exception raised and caught, and 0.05 us here: 6 % of a call on an image latent.
_SETTINGS = getattr(os.environ, "_data", os.environ)
_BACKEND, _CHECK = (os.environ.encodekey(f"FLOWDPPO_OPS_{name}") for name in ("BACKEND", "CHECK"))
_REFERENCE, _ON = (os.environ.encodevalue(value) for value in ("reference", "1"))


def _is_set(name: bytes | str, value: bytes | str) -> bool:
    """Read at every call, so that a debugger's shell or a test can switch; not while a graph is captured."""
    return not torch.compiler.is_compiling() and _SETTINGS.get(name) == value


def _reference():
    from . import reference

    return reference
