"""Parts of trainers' losses for which `loss` has no option, and the names of the metrics that trainers log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import FlowGRPO, PolicyLoss, loss

Means = tuple[Tensor, Tensor] | tuple[None, None]  # the policy's and the old policy's

RATIO_METRICS = ("ratio_mean", "ratio_std", "ratio_min", "ratio_max")
DPPO_METRICS = (
    *(*RATIO_METRICS, "approx_kl", "kl_new_old_mean", "kl_new_old_max", "kl_mask_fraction"),
    *("pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction"),
)
CLIP_METRICS = ("clip_fraction", "clipfrac_gt_one", "clipfrac_lt_one")


def gaussian_kl(mean: Tensor, other: Tensor, std: float | Tensor) -> Tensor:
    """`[B]`: the mean over the latents of `(mean - other)^2 / (2 std^2)`, differentiable in `mean`.

    `loss` computes it as its reference KL, in one pass each way. The policy's own loss is 0, because its advantages
    are.
    """
    no_policy = torch.zeros(len(mean), dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device)
    return loss(
        mean,
        None,
        no_policy,
        log_prob=no_policy,
        old_log_prob=no_policy,
        objective=FlowGRPO(),
        ref_prev_sample_mean=other,
        ref_kl_weight=1.0,
        ref_std=std,
        reduction="none",
    ).loss


def policy_loss(strict: bool, log_prob: Tensor, means: Means = (None, None), **more: Any) -> PolicyLoss:
    """`loss` of a log-prob that the trainer has computed.

    With `strict` the gradient of a blocked row of infinite ratio is NaN, as in the trainers, whose autograd multiplies
    0 by infinity.
    """
    if strict:
        log_prob = log_prob.view_as(log_prob)  # a tensor whose hook sees the gradient of this loss alone
    result = loss(*means, log_prob=log_prob, **more)
    if strict and log_prob.requires_grad:
        ratio = result.ratio
        log_prob.register_hook(lambda grad: grad.masked_fill((grad == 0) & (ratio == math.inf), math.nan))
    return result
