"""`group_advantages` against a loop over groups in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowdppo_ops import group_advantages, reference


def by_hand(rewards: np.ndarray, ids: list, std: str | None, eps: float) -> np.ndarray:
    out = np.empty_like(rewards, dtype=np.float64)
    for i, group in enumerate(ids):
        members = rewards[[j for j, other in enumerate(ids) if other == group]]
        alone = len(members) == 1
        centred = rewards[i] - (rewards[i] if alone else members.mean())
        divisor = {"global": rewards.std(ddof=1), "group": 1.0 if alone else members.std(ddof=1), None: 1 - eps}[std]
        out[i] = centred / (divisor + eps)
    return out


IDS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "interleaved, of unequal size": [5, -1, 5, 9, -1, 5, 5, 9],
    "one alone": [0, 0, 0, 0, 1, 2, 2, 2],
    "all one group": [7] * 8,
    "names": ["cat", "dog", "cat", "cat", "dog", "dog", "cat", "dog"],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("std", ["global", "group", None])
@pytest.mark.parametrize("shape", [(8,), (8, 3)])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_against_a_loop(ids, std, shape, eps):
    rewards = 20 + torch.randn(shape, generator=torch.Generator().manual_seed(1))  # far from 0, as scores are
    wanted = torch.from_numpy(by_hand(rewards.double().numpy(), ids, std, eps))
    mine = group_advantages(rewards, ids, std=std, eps=eps)
    assert mine.shape == rewards.shape
    assert mine.dtype == torch.float32
    # One rounding of the result: sums run in float64.
    assert ((mine.double() - wanted).abs() <= 2**-23 * wanted.abs() + 1e-12).all()


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([4, 4, 9, 9]), torch.tensor([4, 4, 9, 9], dtype=torch.uint8), np.array([4, 4, 9, 9]), (4, 4, 9, 9)],
    ids=["int64", "uint8", "numpy", "tuple"],
)
def test_kinds_of_ids(ids):
    rewards = torch.tensor([1.0, 2.0, 5.0, 9.0])
    assert torch.equal(group_advantages(rewards, ids, std=None), torch.tensor([-0.5, 0.5, -2.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype):
    rewards = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=dtype)
    mine = group_advantages(rewards, [0, 0, 1, 1])
    assert mine.dtype == dtype
    assert mine.tolist() == group_advantages(rewards.double(), [0, 0, 1, 1]).to(dtype).tolist()


def test_alone_is_exactly_zero():
    rewards = torch.tensor([0.1, 0.7, 0.3])
    for std in ("global", "group", None):
        assert group_advantages(rewards, [0, 1, 2], std=std).tolist() == [0, 0, 0]
    # With columns there is something to be centred on: the row's own mean, but the contract says 0.
    assert group_advantages(rewards[:, None].expand(3, 2), [0, 1, 1], std=None)[0].tolist() == [0, 0]


def test_equal_rewards_give_zero():
    assert (group_advantages(torch.full((6,), 0.3), [0, 0, 0, 1, 1, 1], std="group") == 0).all()
    assert (group_advantages(torch.full((6,), 0.3), [0, 0, 0, 1, 1, 1], std="global") == 0).all()


@pytest.mark.parametrize("std", ["global", "group", None])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("reward", [0.5, 0.0, math.inf, math.nan])
def test_one_single_reward(std, eps, reward):
    """Nothing to be compared with: 0, as for a group of one anywhere."""
    assert group_advantages(torch.tensor([reward]), [0], std=std, eps=eps).tolist() == [0]
    assert group_advantages(torch.tensor([[reward, 1.0]]), [0], std=std, eps=eps).tolist() == [[0, 0]]


@pytest.mark.parametrize("std", ["global", "group", None])
@pytest.mark.parametrize("other", [0.5, math.inf, math.nan])
def test_alone_beside_any_other_group(std, other):
    """Also where the standard deviation of all rewards is 0, infinite or NaN."""
    rewards = torch.tensor([0.5, other, other])
    assert group_advantages(rewards, [0, 1, 1], std=std, eps=0.0)[0].item() == 0


def test_order_of_rows_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rewards, ids = torch.randn(64, generator=generator), torch.randint(0, 9, (64,), generator=generator)
    order = torch.randperm(64, generator=generator)
    mixed = group_advantages(rewards[order], ids[order], std="group")
    torch.testing.assert_close(mixed, group_advantages(rewards, ids, std="group")[order], rtol=1e-6, atol=1e-7)


def test_non_contiguous_and_detached():
    rewards = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine = group_advantages(rewards.T, [0, 0, 0, 0, 1, 1, 1, 1])
    assert not mine.requires_grad
    assert torch.equal(mine, group_advantages(rewards.T.contiguous(), [0, 0, 0, 0, 1, 1, 1, 1]))


def test_reference_has_the_same_function():
    assert reference.group_advantages is group_advantages
