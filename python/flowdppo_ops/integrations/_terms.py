"""Terms of the trainers' losses that `loss` has no option for, made of it and of a few numbers per row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import FlowGRPO, PolicyLoss, loss


def gaussian_kl(mean: Tensor, other: Tensor, std: float | Tensor) -> Tensor:
    """`[B]`: mean over the latents of `(mean - other)^2 / (2 std^2)`, differentiable in `mean`, in one pass each way.

    It is the reference term of `loss`, whose policy is given advantages of 0.
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


def with_gradient_of_exp(result: PolicyLoss, exponent: Tensor) -> Tensor:
    """`result.loss`, 0-dim, with the trainers' gradient of a blocked row: 0 times its ratio, NaN if that is infinite.

    A branch that is never taken has this gradient, and no value.
    """
    blocked = torch.exp(torch.where(result.keep, 0.0, exponent)).sum()
    return torch.where(torch.zeros_like(result.loss, dtype=torch.bool), blocked, result.loss)
