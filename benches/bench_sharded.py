"""Times `flowdppo_ops.loss` on latents sharded over ranks, beside its collective and beside the call without one.

    python benches/bench_sharded.py [--ranks 1 2 4] [--rows 1 16 256 4096] [--json FILE]
    python benches/bench_sharded.py --write        # puts the table into docs/sharding.md
    python benches/bench_sharded.py --quick        # does it work; the times mean nothing

The ranks are processes of this machine on gloo, one thread each. That shows how the cost grows with ranks and rows; it
says nothing about NVLink or a network. Latents are few, so that reading them does not hide the collective, and without
gradient, whose pass has none. Loss, KL and gradient are compared with the unsharded float64 ones before that.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from harness import Row, WrongAnswer, environment, keep_freed_memory, percentiles, read_json, wall_clock, write_json
from torch import Tensor, distributed, multiprocessing

import flowdppo_ops
from flowdppo_ops import reference

PAGE = Path(__file__).parents[1] / "docs" / "sharding.md"
BEGIN, END = "<!-- bench_sharded.py: begin -->\n", "<!-- bench_sharded.py: end -->\n"
RANKS, ROWS = (1, 2, 4), (1, 16, 256, 4096)
NUMEL = 64  # latent elements of a row on each rank
TIMEOUT = timedelta(seconds=60)
# All ranks make the same number of calls, which the clock therefore cannot decide.
ROUNDS, SETTLE, CALLS = 10, 10, 30


class Inputs(NamedTuple):
    prev_sample_mean: Tensor
    old_prev_sample_mean: Tensor
    prev_sample: Tensor
    advantages: Tensor
    std: Tensor


def make_inputs(rows: int, ranks: int) -> Inputs:
    """The whole, alike on every rank. The KL stays below the threshold: a blocked row has neither loss nor gradient."""
    generator = torch.Generator().manual_seed(rows)
    old_mean, noise, drift = (torch.randn(rows, ranks * NUMEL, generator=generator) for _ in range(3))
    std = torch.linspace(0.3, 0.6, rows)
    return Inputs(
        old_mean + 0.001 * drift, old_mean, old_mean + std[:, None] * noise, torch.linspace(0.5, 1.5, rows), std
    )


def shard(i: Inputs, rank: int) -> Inputs:
    mine = slice(rank * NUMEL, (rank + 1) * NUMEL)
    return Inputs(*[latents[:, mine].contiguous() for latents in i[:3]], i.advantages, i.std)


def bytes_reduced(rows: int) -> int:
    """Four sums a row and the count of elements, in float64."""
    return 8 * (4 * rows + 1)


def check(whole: Inputs, rank: int, group: distributed.ProcessGroup) -> None:
    """Within rounding: float32 sums of a few hundred products are right to 1e-5 of the largest number."""

    def numbers(loss, i: Inputs, **options) -> tuple[Tensor, Tensor, Tensor]:
        mean = i.prev_sample_mean.requires_grad_()
        result = loss(**i._replace(prev_sample_mean=mean)._asdict(), **options)
        return result.loss.detach(), result.kl, torch.autograd.grad(result.loss, mean)[0]

    *expected, gradient = numbers(reference.loss, Inputs(*[t.double() for t in whole]))
    expected.append(gradient[:, rank * NUMEL : (rank + 1) * NUMEL])
    found = numbers(flowdppo_ops.loss, shard(whole, rank), process_group=group)
    for name, mine, truth in zip(("loss", "kl", "gradient"), found, expected, strict=True):
        error = (mine - truth).abs().max() / truth.abs().max()
        if not error <= 1e-5:
            raise WrongAnswer(f"{name} of rank {rank}: off by {error:.1e} of its largest number")


def times(rank: int, ranks: int, rows: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each call on this rank."""
    group = distributed.group.WORLD
    whole = make_inputs(rows, ranks)
    check(whole, rank, group)
    arguments = shard(whole, rank)._asdict()
    sums = torch.zeros(bytes_reduced(rows) // 8, dtype=torch.float64)
    calls = {
        "collective": lambda: distributed.all_reduce(sums, group=group),
        "unsharded": lambda: flowdppo_ops.loss(**arguments),
        "sharded": lambda: flowdppo_ops.loss(**arguments, process_group=group),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            distributed.barrier(group)
            wall_clock(call, SETTLE)
            samples[name] += wall_clock(call, CALLS)
    return samples


def on_rank(rank: int, ranks: int, all_rows: tuple[int, ...], rounds: int, folder: str) -> None:
    """Rank 0 keeps what it saw: a collective ties the others to it."""
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, f"store-{ranks}"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    keep_freed_memory()
    gc.disable()
    samples = {rows: times(rank, ranks, rows, rounds) for rows in all_rows}
    if rank == 0:
        facts = environment(f"ranks={ranks}", "gloo", f"processors={len(os.sched_getaffinity(0))}")
        found = [
            Row(
                op="loss_sharded",
                shape=(rows, NUMEL),
                dtype="fp32",
                provider=name,
                pass_="forward",
                **percentiles(values),
                repeats=len(values),
                bytes=0 if name == "unsharded" else bytes_reduced(rows),
                threads=1,
                cores_elsewhere=None,
                **facts,
            )
            for rows, of_rows in samples.items()
            for name, values in of_rows.items()
        ]
        write_json(found, Path(folder) / f"rows-{ranks}.json")
    distributed.destroy_process_group()


def measured(ranks: int, all_rows: tuple[int, ...], rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_rank, (ranks, all_rows, rounds, folder), nprocs=ranks)
        return read_json(Path(folder) / f"rows-{ranks}.json")


def ranks_of(row: Row) -> int:
    return int(dict(setting.partition("=")[::2] for setting in row.environment.split())["ranks"])


def table(rows: list[Row]) -> str:
    """A line per number of rows and of ranks; medians."""
    medians = {(row.shape[0], ranks_of(row), row.provider): row.p50_us for row in rows}
    lines = ["| rows | bytes | ranks | collective, us | `loss`, us | sharded `loss`, us |", "|--:|--:|--:|--:|--:|--:|"]
    for count, ranks in sorted({key[:2] for key in medians}):
        cells = [f"{medians[count, ranks, name]:.0f}" for name in ("collective", "unsharded", "sharded")]
        lines.append(f"| {count} | {bytes_reduced(count)} | {ranks} | " + " | ".join(cells) + " |")
    settings = dict(setting.partition("=")[::2] for setting in rows[0].environment.split())
    where = f"{rows[0].device}, {settings['processors']} processors, torch {rows[0].torch}"
    return "\n".join(lines) + f"\n\n{where}, commit {rows[0].commit}, {rows[0].date[:10]}.\n"


def write_table(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, marker, after = rest.partition(END)
    assert marker, f"{PAGE.name} has lost its markers"
    PAGE.write_text(before + BEGIN + text + END + after)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path, help="keep the rows")
    parser.add_argument("--write", action="store_true", help="put the table into docs/sharding.md")
    parser.add_argument("--quick", action="store_true", help="does it work; the times mean nothing")
    args = parser.parse_args(argv)
    if args.quick and args.write:
        parser.error("--quick measures nothing that belongs into a page")
    rounds = 1 if args.quick else ROUNDS
    rows = [row for ranks in args.ranks for row in measured(ranks, tuple(args.rows), rounds)]
    text = table(rows)
    print(text, end="")
    if args.json:
        write_json(rows, args.json)
    if args.write:
        write_table(text)


if __name__ == "__main__":
    sys.exit(main())
