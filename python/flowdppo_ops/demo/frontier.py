"""`demo --frontier`: reward over KL for objectives, widths of the trust region, and epochs per rollout.

Every fine-tuning is one row of `rows.jsonl`, written when it ends: what is there already is not run again. Two kinds:

    frontier   fine-tune, then score: one point per objective, width, epochs per rollout and seed
    reuse      one rollout, reused for many epochs: a score after 2, 4, 8, ... updates
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

import flowdppo_ops

from . import frontier_report
from .compare import NOISE_LEVEL, STEPS, objectives, score
from .data import TRAINED, digits
from .model import Velocity, pretrain
from .report import CONTROL, SYMMETRIC
from .rollout import uniform_schedule
from .score import Judge, symmetry
from .train import Settings, finetune

ROWS, PRETRAINED = "rows.jsonl", "pretrained.pt"
THREE = ("Flow-DPPO", "Flow-GRPO", "GRPO-Guard")
MINIBATCHES = Settings.minibatches


@dataclass(frozen=True)
class Case:
    """One fine-tuning. width: of the trust region, times the published one. iterations: rollouts."""

    kind: str
    sampler: str
    objective: str
    width: float
    iterations: int
    epochs: int
    seed: int

    @property
    def updates(self) -> int:
        return self.iterations * self.epochs * MINIBATCHES


@dataclass(frozen=True)
class Grid:
    """epochs: per rollout, once with `iterations` rollouts and once with as many updates as `equal_epochs` has then."""

    seeds: int = 5
    widths: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 4, 1, 4)
    iterations: int = 8
    epochs: tuple[int, ...] = (1, 4, 16, 64)
    equal_epochs: int = 16
    samplers: tuple[str, ...] = ("flow_sde", "cps")
    reuse_widths: tuple[float, ...] = (1 / 16, 1 / 4, 1)
    reuse_epochs: int = 256

    def cases(self) -> list[Case]:
        """Seeds are the outer loop: a run that is cut short has all objectives for some seeds."""
        return [case for seed in range(self.seeds) for case in dict.fromkeys(self._of_seed(seed))]

    def _of_seed(self, seed: int) -> Iterator[Case]:
        products = {(self.iterations, epochs) for epochs in self.epochs}
        products |= {(self.iterations * self.equal_epochs // epochs, epochs) for epochs in self.epochs}
        for iterations, epochs in sorted(products, key=lambda product: product[1]):
            for width in self.widths:
                for name in (*THREE, SYMMETRIC):
                    yield Case("frontier", "flow_sde", name, width, iterations, epochs, seed)
            yield Case("frontier", "flow_sde", CONTROL, 1, iterations, epochs, seed)
        for sampler in self.samplers[1:]:
            # GRPO-Guard's ratio is corrected for a Gaussian log-prob, which CPS does not have.
            for width in self.widths:
                for name in THREE[:2]:
                    yield Case("frontier", sampler, name, width, self.iterations, self.equal_epochs, seed)
        for width in self.reuse_widths:
            for name in (*THREE, SYMMETRIC):
                yield Case("reuse", "flow_sde", name, width, 1, self.reuse_epochs, seed)
        yield Case("reuse", "flow_sde", CONTROL, 1, 1, self.reuse_epochs, seed)


QUICK = Grid(2, (1 / 16, 1 / 4, 1), 8, (4, 16), 16, ("flow_sde",), (1 / 16,), 64)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    data = digits()
    if not (out / PRETRAINED).exists():
        torch.save(pretrain(data, args.pretrain_steps, "cpu").state_dict(), out / PRETRAINED)
    workers = args.workers or cores()
    cases = (QUICK if args.quick else Grid()).cases()
    rows = read(out / ROWS)
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {Case(**row["case"]) for row in rows}
    left = [case for case in cases if case not in done]
    print(f"{len(left)} of {len(cases)} fine-tunings to do, {workers} at a time; rows go to {out / ROWS}")
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool, (out / ROWS).open("a", encoding="utf-8") as file, tqdm(unit="update") as bar:
        bar.reset(sum(case.updates for case in left))
        running = {pool.submit(run_case, case, str(out / PRETRAINED)): case for case in left}
        try:
            for future in as_completed(running):
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
                bar.update(running[future].updates)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    frontier_report.write(out, read(out / ROWS))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far. A last line that was cut short is left out, and run again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@lru_cache
def _start(path: str) -> tuple[Velocity, Judge]:
    """What every fine-tuning of a process starts from."""
    policy = Velocity()
    policy.load_state_dict(torch.load(path))
    return policy, Judge(digits())


def run_case(case: Case, path: str) -> dict[str, Any]:
    """The row of a case: scores at the end, or on the way of a reuse, and the share of rows without a gradient."""
    pretrained, judge = _start(path)
    schedule = uniform_schedule(STEPS, NOISE_LEVEL, "cpu", case.sampler)
    objective = objectives(schedule, case.width)[case.objective]
    settings = Settings(case.iterations, case.epochs, keep_calls=False)
    points: list[dict[str, Any]] = []

    def after_epoch(policy: Velocity, epochs: int) -> None:
        if case.kind == "reuse" and epochs & (epochs - 1) == 0:
            points.append({"updates": epochs * MINIBATCHES, **_rounded(score(policy, pretrained, judge, schedule)[0])})

    start = (pretrained, TRAINED, symmetry, objective, schedule, settings, case.seed)
    tuned = list(finetune(*start, flowdppo_ops.step_loss, after_epoch))[-1]
    scores = _rounded(score(tuned.policy, pretrained, judge, schedule)[0])
    row = {"case": asdict(case), "scores": scores, "masked": round(fmean(tuned.curves["masked"]), 4)}
    return {**row, "points": points} if points else row


def _rounded(scores: dict[str, float]) -> dict[str, float | None]:
    """To six digits. JSON has no NaN and no infinity: a policy that diverged has null."""
    return {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in scores.items()}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
