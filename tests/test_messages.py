"""Messages for what newcomers get wrong: they name the probable cause, not the argument that happened to be checked."""

from __future__ import annotations

import re

import pytest
import torch

import flowdppo_ops
from flowdppo_ops import FlowGRPO, GRPOGuard

SCHEDULE = {"sigma": 0.5, "sigma_next": 0.4, "noise_level": 0.7}


@pytest.fixture
def latents():
    """Of 4 samples at 3 steps."""
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def step_loss(latents, advantages, **arguments):
    arguments = {"old_model_output": latents, **SCHEDULE, **arguments}
    return flowdppo_ops.step_loss(latents, latents, latents, advantages, **arguments)


def test_advantages_decide_the_rows(latents):
    """`[B]` advantages pool the steps of `[B, S, ...]` latents. With `[B, S]` log-probs that cannot be meant."""
    cause = "Are the rows (4, 3), one per sample and step? Then give advantages of that shape: they decide the rows"
    log_prob = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=f"old_log_prob has shape .*{re.escape(cause)}"):
        step_loss(latents, torch.ones(4), old_log_prob=log_prob)
    with pytest.raises(ValueError, match=f"log_prob has shape .*{re.escape(cause)}"):
        flowdppo_ops.loss(latents, latents, torch.ones(4), std=0.3, log_prob=log_prob, old_log_prob=log_prob)
    for sigma in (torch.full((1, 3), 0.5), torch.full((4, 3, 1, 1), 0.5)):
        with pytest.raises(ValueError, match=f"sigma has shape .*{re.escape(cause)}"):
            step_loss(latents, torch.ones(4), sigma=sigma)
    assert step_loss(latents, torch.ones(4, 3), old_log_prob=log_prob).ratio.shape == (4, 3)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 7), (4, 3, 2, 2, 2)])
def test_no_cause_is_guessed_where_no_rows_would_fit(latents, shape):
    with pytest.raises(ValueError, match="has shape") as error:
        step_loss(latents, torch.ones(4), old_log_prob=torch.zeros(shape))
    assert "Are the rows" not in str(error.value)


def test_sde_step_names_row_dims(latents):
    sigma = torch.tensor([[0.5, 0.4, 0.3]])
    schedule = {"sigma": sigma, "sigma_next": sigma - 0.1}
    with pytest.raises(ValueError, match=re.escape("sigma has shape (1, 3)") + ".*Then row_dims=2"):
        flowdppo_ops.sde_step(latents, latents, **schedule)
    assert flowdppo_ops.sde_step(latents, latents, row_dims=2, **schedule).log_prob.shape == (4, 3)


def test_flow_grpo_needs_no_old_mean(latents):
    rows, says = torch.ones(4, 3), "; FlowGRPO needs none where old_log_prob is given"
    none = {"old_model_output": None}
    with pytest.raises(ValueError, match="got none for the old policy.*" + says):
        step_loss(latents, rows, objective=FlowGRPO(), **none)
    with pytest.raises(ValueError, match="old_prev_sample_mean is None.*" + says):
        flowdppo_ops.loss(latents, None, rows, std=0.3, prev_sample=latents, objective=FlowGRPO())
    assert step_loss(latents, rows, objective=FlowGRPO(), old_log_prob=rows, **none).kl is None
    with pytest.raises(ValueError, match=r"got none for the old policy, wanted exactly one of [a-z_, ]*$"):
        step_loss(latents, rows, objective=GRPOGuard(), old_log_prob=rows, **none)
