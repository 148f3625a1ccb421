"""The distance of two means, alone: what trainers add to a policy loss, or re-centre a ratio by."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import FlowGRPO, loss


def gaussian_kl(mean: Tensor, other: Tensor, std: float | Tensor) -> Tensor:
    """`[B]`: mean over the latents of `(mean - other)^2 / (2 std^2)`, differentiable in `mean`, in one pass each way.

    It is the reference term of `loss`, whose policy is given advantages of 0.
    """
    no_policy = torch.zeros(mean.shape[0], device=mean.device)
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
