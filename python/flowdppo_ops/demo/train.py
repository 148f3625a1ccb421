"""Online RL fine-tuning: roll out, score, update several times inside a trust region, repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..advantages import group_advantages
from ..objectives import Objective
from ..result import PolicyLoss
from .model import Velocity
from .rollout import Rollout, Schedule, model_outputs, path_kl, replayed_means, rollout, select

LOSSES = {"step": "step_loss", "loss": "loss"}  # --fused: the function of the package that one update calls


@dataclass(frozen=True)
class Settings:
    """One fine-tuning. `iterations` rollouts; `epochs` passes over each, in `minibatches` updates per pass.

    fused: "step", the loss starts at the model's output; "loss", at the mean that `sde_step` makes of it.
    keep_calls: for timing, of the first and last epoch of the first, middle and last rollout.
    """

    iterations: int
    epochs: int
    fused: str = "step"
    minibatches: int = 2
    group_size: int = 32  # images per prompt and rollout
    learning_rate: float = 2e-4
    max_grad_norm: float = 1.0
    keep_calls: bool = True


@dataclass
class Run:
    """What a fine-tuning leaves behind.

    curves: one value per iteration, from before its updates. reward: mean over the rollout. kl: from the pretrained
    model, nats per image. masked: share of rows masked or clipped, and grad_norm: before clipping, means over the
    updates. calls: some of the `arguments_of_loss`.
    """

    policy: Velocity
    curves: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in ("reward", "kl", "masked", "grad_norm")}
    )
    calls: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    updates: int = 0


def arguments_of_loss(
    fused: str, policy: Velocity, old: Rollout, schedule: Schedule, advantages: Tensor, objective: Objective
) -> tuple[Tensor, dict[str, Any]]:
    """Where the gradient goes, and the rest of what `step_loss` or `loss` is called with."""
    common = {"prev_sample": old.prev_samples, "advantages": advantages, "objective": objective}
    if fused == "loss":
        std = {"std": old.std, "sqrt_dt": schedule.sqrt_dt}
        return replayed_means(policy, old, schedule), {"old_prev_sample_mean": old.means, **std, **common}
    # The log-probs are kept anyway; without them the ratio would be that of the rounded residuals, on-policy within
    # 3e-5 of 1 over 64 elements.
    before = {"sample": old.samples, "old_residual": old.residuals, "old_log_prob": old.log_probs}
    return model_outputs(policy, old, schedule), {**before, **schedule.arguments(), **common}


def finetune(
    pretrained: Velocity,
    classes: tuple[int, ...],
    reward: Callable[[Tensor], Tensor],
    objective: Objective,
    schedule: Schedule,
    settings: Settings,
    seed: int,
    loss: Callable[..., PolicyLoss],
    after_epoch: Callable[[Velocity, int], None] = lambda policy, epochs: None,
) -> Iterator[Run]:
    """Fine-tunes a copy of `pretrained` on the prompts `classes` towards `reward` (images in, `[batch]` out).

    `loss` is what `LOSSES[settings.fused]` names, in `flowdppo_ops` or in its reference. All randomness comes from
    `seed`, so objectives that share it see the same noise until their policies part. Yields the run so far after each
    iteration; `after_epoch` gets the policy, and the number of passes over this rollout that it has seen.
    """
    run = Run(copy.deepcopy(pretrained))
    policy, curves = run.policy, run.curves
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    device = schedule.sigmas.device
    prompts = torch.tensor(classes, device=device).repeat_interleave(settings.group_size)

    for iteration in range(settings.iterations):
        batch = rollout(policy, prompts, schedule, generator)
        rewards = reward(batch.images)
        advantages = group_advantages(rewards, prompts)[:, None].expand(-1, schedule.noisy)
        curves["reward"].append(rewards.mean().item())
        curves["kl"].append(path_kl(batch, pretrained, schedule))

        masked, grad_norm = [], []
        for epoch in range(settings.epochs):
            order = torch.randperm(len(prompts), generator=generator).to(device)
            for rows in order.chunk(settings.minibatches):
                old = select(batch, rows)
                given = (settings.fused, policy, old, schedule, advantages[rows], objective)
                of_policy, arguments = arguments_of_loss(*given)
                out = loss(of_policy, **arguments)
                optimizer.zero_grad()
                out.loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
                optimizer.step()

                masked.append(out.metrics()["masked_fraction"])
                grad_norm.append(norm.item())
                run.updates += 1
                rollouts, passes = (0, settings.iterations // 2, settings.iterations - 1), (0, settings.epochs - 1)
                if settings.keep_calls and iteration in rollouts and epoch in passes:
                    run.calls.append((of_policy.detach(), arguments))
            after_epoch(policy, epoch + 1)
        curves["masked"].append(fmean(masked))
        curves["grad_norm"].append(fmean(grad_norm))
        yield run
