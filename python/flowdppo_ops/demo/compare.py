"""The whole demo: one pretrained model, every objective from it, scores, timing, report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import flowdppo_ops

from .. import reference
from ..objectives import FlowDPPO, FlowGRPO, GRPOGuard, Objective
from . import report
from .data import CLASSES, NUMEL, TRAINED, digits
from .model import Velocity, pretrain
from .report import CONTROL, SYMMETRIC
from .rollout import Schedule, path_kl, rollout, select, uniform_schedule
from .score import Judge, symmetry
from .train import LOSSES, Settings, finetune

STEPS = 10
NOISE_LEVEL = 0.7
# Nats per latent element. The published setting, 1e-5 at the 65536 elements of an SD3.5 latent, allows 0.66 nats per
# image and step; this allows as many over 64 elements.
KL_THRESHOLD = 1e-5 * 65536 / NUMEL
WIDTH = 1 / 4  # of the trust region, as a multiple of that: where the objectives differ (docs/claims.md)
PER_CLASS = 100  # images per class that the scores are taken from
SCORE_SEED = 1_000_000  # the noise behind the scores and pictures: one set, for every policy

ROUNDS = 5  # of timing


def objectives(schedule: Schedule, width: float) -> dict[str, Objective]:
    """The three objectives with limits of about the same width, and two controls.

    width: the KL threshold as a multiple of the published one. When the new mean is `kl` nats per element away, the
    log-ratio, a mean over N elements, has a standard deviation of sqrt(2 kl / N). FlowGRPO clips where that equals the
    KL threshold. GRPOGuard multiplies its log-ratio by `c = mean(sqrt_dt) mean(std / sqrt_dt)`, so its clip range is
    `c` times as wide. With CPS the log-ratio has no 1 / (2 std^2): both are `mean(2 std^2)` times as wide there.
    """
    threshold, std = width * KL_THRESHOLD, schedule.std
    clip = math.sqrt(2 * threshold / NUMEL)
    if schedule.sampler == "cps":
        clip *= (2 * std**2).mean().item()
    scale = (schedule.sqrt_dt.mean() * (std / schedule.sqrt_dt).mean()).item()
    return {
        "Flow-DPPO": FlowDPPO(threshold),
        "Flow-GRPO": FlowGRPO(clip),
        "GRPO-Guard": GRPOGuard(clip * scale),
        SYMMETRIC: FlowDPPO(threshold, mask="symmetric"),
        CONTROL: FlowDPPO(threshold, mask="none"),
    }


def run(args: argparse.Namespace) -> None:
    out, function = Path(args.out), LOSSES[args.fused]
    losses = {"reference": getattr(reference, function)}
    if args.loss == "fused":
        losses["fused"] = getattr(flowdppo_ops, function)
    settings = Settings(args.iterations, args.epochs, args.fused)
    schedule = uniform_schedule(STEPS, NOISE_LEVEL, args.device)
    data = digits()
    judge = Judge(data)
    pretrained = pretrain(data, args.pretrain_steps, args.device)
    scores, images = score(pretrained, pretrained, judge, schedule)
    compared = objectives(schedule, WIDTH)
    samples = {"pretrained": images}
    fixed = {"steps": STEPS, "noise_level": NOISE_LEVEL}
    shown = {name: value for name, value in asdict(settings).items() if name != "keep_calls"}
    results: dict[str, Any] = {
        "loss": args.loss,
        "function": function,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "settings": {"pretrain_steps": args.pretrain_steps, "width": WIDTH, **shown, **fixed},
        "pretrained": scores,
        "objectives": {},
    }

    # The controls show that the limits bind, and what the asymmetry does; once is enough for that.
    seeds = {name: args.seeds[:1] if name in (SYMMETRIC, CONTROL) else args.seeds for name in compared}
    with tqdm(total=args.iterations * sum(map(len, seeds.values())), unit="rollout") as bar:
        for name, objective in compared.items():
            entry = {"objective": repr(objective), "seeds": seeds[name], "curves": [], "scores": []}
            for seed in seeds[name]:
                bar.set_description(f"{name}, seed {seed}")
                loss = losses[args.loss]
                for tuned in finetune(pretrained, TRAINED, symmetry, objective, schedule, settings, seed, loss):
                    last = {key: f"{tuned.curves[key][-1]:.3g}" for key in ("reward", "kl")}
                    bar.set_postfix(last, refresh=False)
                    bar.update()
                scores, images = score(tuned.policy, pretrained, judge, schedule)
                entry["curves"].append(tuned.curves)
                entry["scores"].append(scores)
                if seed == seeds[name][0]:
                    samples[name] = images
                    each = _seconds_per_call(losses, tuned.calls)
                    entry["loss_seconds"] = {which: value * tuned.updates for which, value in each.items()}
            results["objectives"][name] = entry

    table = report.table(results)
    report.write(out, results, table, samples)
    print(f"\n{table}\n\nWritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _seconds_per_call(
    losses: dict[str, Callable[..., Any]], calls: Sequence[tuple[Tensor, dict[str, Any]]]
) -> dict[str, float]:
    """Forward and backward of every recorded call through every loss: median over rounds, mean over calls.

    The losses take turns on each call, so that a busy moment of the machine hits both.
    """
    medians: dict[str, list[float]] = {name: [] for name in losses}
    for of_policy, arguments in calls:
        rounds: dict[str, list[float]] = {name: [] for name in losses}
        leaf = of_policy.clone().requires_grad_()
        for name, loss in ROUNDS * list(losses.items()):
            given = {"loss": loss, "leaf": leaf, "arguments": arguments}
            options = {"globals": given, "num_threads": torch.get_num_threads()}
            timer = Timer("torch.autograd.grad(loss(leaf, **arguments).loss, leaf)", **options)
            rounds[name].append(timer.timeit(1).median)
        for name, seconds in rounds.items():
            medians[name].append(median(seconds))
    return {name: fmean(seconds) for name, seconds in medians.items()}


def score(policy: Velocity, pretrained: Velocity, judge: Judge, schedule: Schedule) -> tuple[dict[str, float], Tensor]:
    """Scores, and the images they are of: `[10, PER_CLASS, 1, 8, 8]`, by class."""
    device = schedule.sigmas.device
    prompts = torch.arange(CLASSES, device=device).repeat_interleave(PER_CLASS)
    batch = rollout(policy, prompts, schedule, torch.Generator().manual_seed(SCORE_SEED))
    trained = torch.isin(prompts, torch.tensor(TRAINED, device=device)).nonzero()[:, 0]
    scores = judge.scores(batch.images, prompts)
    scores["kl"] = path_kl(select(batch, trained), pretrained, schedule)
    return scores, batch.images.reshape(CLASSES, PER_CLASS, *batch.images.shape[1:]).cpu()
