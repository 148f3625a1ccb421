"""Online RL fine-tuning: roll out, score, update several times inside a trust region, repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..advantages import group_advantages
from ..objectives import Objective
from ..result import PolicyLoss
from .model import Velocity
from .rollout import Schedule, path_kl, replayed_means, rollout, select


@dataclass(frozen=True)
class Settings:
    """One fine-tuning. `iterations` rollouts; `epochs` passes over each, in `minibatches` updates per pass."""

    iterations: int
    epochs: int
    minibatches: int = 2
    group_size: int = 32  # images per prompt and rollout
    learning_rate: float = 2e-4
    max_grad_norm: float = 1.0


@dataclass
class Run:
    """What a fine-tuning left behind. The curves have one value per iteration, from before its updates."""

    policy: Velocity
    reward: list[float] = field(default_factory=list)  # mean over the rollout
    kl: list[float] = field(default_factory=list)  # from the pretrained model, nats per image
    masked: list[float] = field(default_factory=list)  # share of rows masked or clipped, mean over the updates
    grad_norm: list[float] = field(default_factory=list)  # mean over the updates, before clipping
    calls: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)  # recorded inputs of the loss
    updates: int = 0

    @property
    def curves(self) -> dict[str, list[float]]:
        return {"reward": self.reward, "kl": self.kl, "masked": self.masked, "grad_norm": self.grad_norm}


def finetune(
    pretrained: Velocity,
    classes: tuple[int, ...],
    reward: Callable[[Tensor], Tensor],
    objective: Objective,
    schedule: Schedule,
    settings: Settings,
    seed: int,
    loss: Callable[..., PolicyLoss],
    after_iteration: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Fine-tunes a copy of `pretrained` on the prompts `classes` towards `reward` (images in, `[batch]` out).

    `loss` is `flowdppo_ops.loss` or `flowdppo_ops.reference.loss`. All randomness comes from `seed`, so objectives
    that share it see the same noise until their policies part.
    """
    run = Run(copy.deepcopy(pretrained))
    policy = run.policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    device = schedule.sigmas.device
    prompts = torch.tensor(classes, device=device).repeat_interleave(settings.group_size)

    for iteration in range(settings.iterations):
        batch = rollout(policy, prompts, schedule, generator)
        rewards = reward(batch.images)
        advantages = group_advantages(rewards, prompts)[:, None].expand(-1, schedule.steps)
        run.reward.append(rewards.mean().item())
        run.kl.append(path_kl(batch, pretrained, schedule))

        masked, grad_norm = [], []
        for _ in range(settings.epochs):
            order = torch.randperm(len(prompts), generator=generator).to(device)
            for rows in order.chunk(settings.minibatches):
                old = select(batch, rows)
                mean = replayed_means(policy, old, schedule)
                arguments = {
                    "old_prev_sample_mean": old.means,
                    "advantages": advantages[rows],
                    "std": old.std,
                    "sqrt_dt": schedule.sqrt_dt,
                    "prev_sample": old.prev_samples,
                    "objective": objective,
                }
                out = loss(mean, **arguments)
                optimizer.zero_grad()
                out.loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
                optimizer.step()

                masked.append(out.metrics()["masked_fraction"])
                grad_norm.append(norm.item())
                run.updates += 1
                if iteration in (0, settings.iterations // 2, settings.iterations - 1):
                    run.calls.append((mean.detach(), arguments))
        run.masked.append(sum(masked) / len(masked))
        run.grad_norm.append(sum(grad_norm) / len(grad_norm))
        after_iteration(run)
    return run
