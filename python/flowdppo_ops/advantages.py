"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .objectives import check_option, not_negative


def group_advantages(
    rewards: Tensor, group_ids: Tensor | Iterable, *, std: str | None = "global", eps: float = 1e-4
) -> Tensor:
    """Advantages: rewards minus their group's mean, divided by a standard deviation.

    Args:
        rewards: `[B]` or `[B, T]`, a float dtype. A group's mean is that of all columns of its rows.
        group_ids: `[B]`, the group (prompt) of each row: an integer tensor, or a sequence or array of hashable values.
        std: "global" divides by the standard deviation of all rewards, "group" by that of the row's group; None does
            not divide. Standard deviations are unbiased, as in the trainers.
        eps: a number >= 0, which is added to the standard deviation.

    Returns:
        A tensor of the shape, dtype and device of `rewards`, without gradient. The advantage of a row that is alone in
        its group is exactly 0 for every `std`, even if other rewards are NaN.

    Raises:
        TypeError: `rewards` is no dense float tensor, `group_ids` are neither integers nor hashable values, or `eps` is
            no number. ValueError: shapes that do not fit, an unknown `std`, or an `eps` that is negative or NaN.

    Source: verl-omni `compute_flow_grpo_outcome_advantage` (std=None is `norm_adv_by_std_in_grpo=False`).
    """
    where = "flowdppo_ops.group_advantages"
    check_option(where, "std", std, ("global", "group", None))
    eps = not_negative(where, "eps", eps)
    if not isinstance(rewards, Tensor):
        raise TypeError(f"{where}: rewards is a {type(rewards).__name__}, wanted a torch.Tensor")
    if rewards.is_nested or rewards.layout != torch.strided:
        raise TypeError(f"{where}: rewards is a nested or sparse tensor, wanted a dense one")
    if not rewards.is_floating_point():
        raise TypeError(f"{where}: rewards has dtype {rewards.dtype}, wanted a float dtype")
    if rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ValueError(f"{where}: rewards has shape {tuple(rewards.shape)}, wanted [B] or [B, T], not empty")
    index, groups = _group_index(where, group_ids, rewards)

    # Sums are float64, because the deviations from a group's mean may be small beside the mean.
    table = rewards.detach().double().reshape(rewards.shape[0], -1)
    columns = table.shape[1]

    def per_group(per_row: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=rewards.device).index_add_(0, index, per_row)

    members = per_group(torch.ones_like(table[:, 0]))
    mean = per_group(table.sum(1)) / (members * columns)
    result = table - mean[index, None]
    if std == "global" and table.numel() > 1:
        result = result / (table.std() + eps)
    elif std == "group":
        variance = per_group((result**2).sum(1)) / (members * columns - 1)
        result = result / (variance.sqrt()[index, None] + eps)
    # Last, because a NaN among the rewards, or the standard deviation of a single reward, makes the quotient NaN.
    alone = (members == 1)[index, None]
    result = torch.where(alone, torch.zeros_like(result), result)
    return result.reshape(rewards.shape).to(rewards.dtype)


def _group_index(where: str, group_ids: Tensor | Iterable, rewards: Tensor) -> tuple[Tensor, int]:
    """`group_ids` as numbers from 0 on, on the device of `rewards`, and the number of groups."""
    if isinstance(group_ids, Tensor):
        if group_ids.is_floating_point() or group_ids.is_complex():
            raise TypeError(f"{where}: group_ids has dtype {group_ids.dtype}, wanted an integer dtype")
        shape = tuple(group_ids.shape)
    else:
        try:
            group_ids = list(group_ids)
        except TypeError:
            kind = type(group_ids).__name__
            raise TypeError(f"{where}: group_ids is a {kind}, wanted a tensor or a sequence") from None
        shape = (len(group_ids),)
    if shape != rewards.shape[:1]:
        raise ValueError(f"{where}: group_ids has shape {shape}, wanted ({rewards.shape[0]},), one per row of rewards")
    if isinstance(group_ids, Tensor):
        unique, index = torch.unique(group_ids.to(rewards.device), return_inverse=True)
        return index, unique.numel()
    try:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(group_ids))}
    except TypeError as error:
        raise TypeError(f"{where}: group_ids has an element that cannot be hashed: {error}") from None
    return torch.tensor([numbers[group] for group in group_ids], device=rewards.device), len(numbers)
