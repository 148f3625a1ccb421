"""Tables and figures of `demo --frontier`, made from its rows alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import bootstrap

matplotlib.use("Agg")  # before pyplot: no display is needed, and none is opened
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import COLOURS, CONTROL, OTHER, SYMMETRIC

Row = dict[str, Any]
STYLES = {name: (colour, "s--" if name == SYMMETRIC else "o-") for name, colour in COLOURS.items()}
LARGE = 1e5  # a score beyond it counts as diverged
POINTS = 40  # at which two frontiers are compared
PARTS = ("all", "lower", "upper")  # of the range that they share
SCORES_OF_REUSE = (("reward", 3), ("kl", 1), ("held_out_frechet", 2))


def write(out: Path, rows: list[Row]) -> None:
    (out / "tables.md").write_text(tables(rows), encoding="utf-8")
    draw_frontiers(out / "frontier.png", rows)
    draw_reuse(out / "reuse.png", rows)
    print(f"Written to {out}: tables.md, frontier.png, reuse.png")


# ---- statistics ------------------------------------------------------------------------------------------------------


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row["case"][key] == value for key, value in wanted.items())]


def values(rows: list[Row], score: str) -> np.ndarray:
    """NaN where a policy diverged."""
    return np.array([np.nan if row["scores"][score] is None else row["scores"][score] for row in rows])


def settings(rows: list[Row]) -> list[tuple[str, int, int]]:
    """Sampler, rollouts and epochs per rollout of the frontiers that were run."""
    cases = [row["case"] for row in rows if row["case"]["kind"] == "frontier"]
    found = {(case["sampler"], case["iterations"], case["epochs"]) for case in cases}
    iterations = [iterations for _, iterations, _ in found]
    usual = max(iterations, key=iterations.count)  # those of an equal number of rollouts come first
    return sorted(found, key=lambda one: (one[0] != "flow_sde", one[1] != usual, one[2]))


class Curve:
    """`y` over `x` of one objective and seed through the widths of the trust region, between its ends only."""

    def __init__(self, rows: list[Row], x: str, y: str) -> None:
        along, over = values(rows, x), values(rows, y)
        good = np.isfinite(along) & np.isfinite(over)
        order = np.argsort(along[good])
        self.x, self.y = along[good][order], over[good][order]

    def at(self, x: np.ndarray) -> np.ndarray:
        return np.interp(x, self.x, self.y)


def matched(rows: list[Row], first: str, second: str, x: str, y: str) -> dict[str, Any] | None:
    """How much more `y` the first objective has than the second at equal `x`: once per seed, averaged over the range
    of `x` that all seeds of both have, and over its lower and upper half. `None` where there is no such range."""
    seeds = sorted({row["case"]["seed"] for row in rows})
    pairs = [[Curve(select(rows, objective=name, seed=seed), x, y) for name in (first, second)] for seed in seeds]
    if not all(len(curve.x) >= 2 for pair in pairs for curve in pair):
        return None
    low, high = (choose(curve.x[end] for pair in pairs for curve in pair) for choose, end in ((max, 0), (min, -1)))
    if not low < high:
        return None
    # The logarithm where `x` is positive: the KL of these frontiers spans a factor of ten.
    grid = np.geomspace(low, high, POINTS) if low > 0 else np.linspace(low, high, POINTS)
    gaps = np.array([one.at(grid) - two.at(grid) for one, two in pairs])  # [seeds, POINTS]
    parts = {"all": gaps, "lower": gaps[:, : POINTS // 2], "upper": gaps[:, POINTS // 2 :]}
    return {"range": (low, high), **{name: interval(part.mean(1)) for name, part in parts.items()}}


def interval(samples: np.ndarray) -> tuple[float, float, float]:
    """Mean over the seeds, and a 95 % bootstrap interval of it."""
    if len(samples) < 2 or np.ptp(samples) == 0:
        return samples.mean(), np.nan, np.nan
    found = bootstrap((samples,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return samples.mean(), found.low, found.high


def verdict(found: tuple[float, float, float], higher_is_better: bool = True) -> str:
    _, low, high = found
    if low > 0 or high < 0:
        return "ahead" if (low > 0) == higher_is_better else "behind"
    return "level" if np.isfinite(low) else "one seed"


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    """Markdown."""
    parts = [
        ("Reward at equal KL", _matched_table(rows, "kl", "reward", "nats per image", True)),
        (
            "Held-out Frechet distance at equal reward",
            _matched_table(rows, "reward", "held_out_frechet", "reward", False),
        ),
        ("Scores", _score_table(rows)),
        ("One rollout, reused", _reuse_table(rows)),
    ]
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in parts)


def _matched_table(rows: list[Row], x: str, y: str, unit: str, higher_is_better: bool) -> str:
    lines = [f"| sampler | rollouts x epochs | pair | {unit} | whole range | lower half | upper half |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|")
    for sampler, iterations, epochs in settings(rows):
        of = select(rows, kind="frontier", sampler=sampler, iterations=iterations, epochs=epochs)
        names = [name for name in STYLES if select(of, objective=name)]
        for first, second in combinations(names, 2):
            if first != names[0] and SYMMETRIC in (first, second):
                continue  # the symmetric mask is an ablation of Flow-DPPO
            start = f"| {sampler} | {iterations} x {epochs} | {first} - {second} |"
            found = matched(of, first, second, x, y)
            if found is None:
                both = (values(select(of, objective=name), x) for name in (first, second))
                ranges = " and ".join(f"{np.nanmin(some):.3g} to {np.nanmax(some):.3g}" for some in both)
                lines.append(f"{start} nothing in common: {ranges} | | | |")
                continue
            cells = (f"{_signed(found[part])}, {verdict(found[part], higher_is_better)}" for part in PARTS)
            lines.append(f"{start} {found['range'][0]:.3g} to {found['range'][1]:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _signed(found: tuple[float, float, float]) -> str:
    centre, low, high = (f"{value:+.4f}" for value in found)
    return f"{centre} [{low}, {high}]"


def _score_table(rows: list[Row]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = ["| sampler | rollouts x epochs | objective | width | reward | KL | masked | held-out Frechet | legible |"]
    lines.append("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for sampler, iterations, epochs in settings(rows):
        of = select(rows, kind="frontier", sampler=sampler, iterations=iterations, epochs=epochs)
        for name in (*STYLES, CONTROL):
            for width in sorted({row["case"]["width"] for row in select(of, objective=name)}):
                some = select(of, objective=name, width=width)
                spreads = [
                    _spread(values(some, score), digits)
                    for score, digits in (("reward", 3), ("kl", 1), ("held_out_frechet", 2), ("legible", 2))
                ]
                masked = _spread(np.array([row["masked"] for row in some]), 2)
                cells = [spreads[0], spreads[1], masked, *spreads[2:]]
                shown = "-" if name == CONTROL else f"{width:g}"
                lines.append(f"| {sampler} | {iterations} x {epochs} | {name} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(samples: np.ndarray, digits: int) -> str:
    finite = samples[np.isfinite(samples)]
    if len(finite) < len(samples) or abs(finite).max() >= LARGE:
        large = sum(abs(finite) >= LARGE) + len(samples) - len(finite)
        return f"diverged ({large} of {len(samples)})"
    return f"{finite.mean():.{digits}f} ± {finite.std(ddof=1) if len(finite) > 1 else 0:.{digits}f}"


def _reuse_table(rows: list[Row]) -> str:
    """The best reward on the way, when, and the last one."""
    lines = ["| objective | width | best reward | after updates | last reward | KL | held-out Frechet |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for name in (*STYLES, CONTROL):
        for width in sorted({row["case"]["width"] for row in select(rows, kind="reuse", objective=name)}):
            some = select(rows, kind="reuse", objective=name, width=width)
            updates, reward = reuse_curves(some, "reward")
            best = np.nanargmax(np.where(np.isfinite(reward), reward, -np.inf), 1)
            cells = [
                _spread(reward[np.arange(len(some)), best], 3),
                f"{np.median(updates[best]):g}",
                *(_spread(values(some, score), digits) for score, digits in SCORES_OF_REUSE),
            ]
            shown = "-" if name == CONTROL else f"{width:g}"
            lines.append(f"| {name} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reuse_curves(rows: list[Row], score: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates `[points]` and the score `[seeds, points]`."""
    updates = np.array([point["updates"] for point in rows[0]["points"]])
    found = [[np.nan if point[score] is None else point[score] for point in row["points"]] for row in rows]
    return updates, np.array(found)


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_frontiers(path: Path, rows: list[Row]) -> None:
    """A panel per sampler, rollouts and epochs: mean over the seeds at each width, with the standard deviations."""
    found = settings(rows)
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    size = (3.2 * columns + 0.5, 3.0 * lines + 0.8)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (sampler, iterations, epochs) in zip(grid.flat, found, strict=False):
        of = select(rows, kind="frontier", sampler=sampler, iterations=iterations, epochs=epochs)
        for name in STYLES:
            _draw_frontier(axes, name, select(of, objective=name))
        title = f"{iterations} rollout{'s' * (iterations > 1)}, {epochs} epoch{'s' * (epochs > 1)} each"
        axes.set_title(title if sampler == "flow_sde" else f"{title}, {sampler.upper()}", fontsize=10)
        _log_axis(axes)
        axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set_ylabel("reward")
    figure.supxlabel("KL to the pretrained model (nats per image, whole trajectory)", fontsize=10)
    _legend(figure, grid[0, 0], "Reward over KL: a point per width of the trust region")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_frontier(axes: Axes, name: str, rows: list[Row]) -> None:
    colour, style = STYLES[name]
    points = []
    for width in sorted({row["case"]["width"] for row in rows}):
        some = select(rows, width=width)
        points.append([f(values(some, score)) for score in ("kl", "reward") for f in (np.mean, np.std)])
    if points:
        kl, kl_std, reward, reward_std = np.array(points).T
        axes.errorbar(kl, reward, reward_std, kl_std, style, color=colour, label=name, elinewidth=0.8, markersize=4)


def _log_axis(axes: Axes) -> None:
    """With a few round numbers on it: one decade has more ticks than room, and less than one may have none."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    digits = (1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 6, 8)
    axes.set_xticks([digit * 10.0**power for power in range(-3, 6) for digit in digits])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low, high)


def draw_reuse(path: Path, rows: list[Row]) -> None:
    """Reward above, KL below, over the updates on one rollout; a column per width; mean and range over the seeds."""
    of = select(rows, kind="reuse")
    widths = sorted({row["case"]["width"] for row in select(of, objective="Flow-DPPO")})
    size = (max(7.5, 3.6 * len(widths) + 0.5), 5.5)
    figure, grid = plt.subplots(2, len(widths), figsize=size, layout="constrained", squeeze=False, sharey="row")
    for column, width in zip(grid.T, widths, strict=True):
        for axes, score in zip(column, ("reward", "kl"), strict=True):
            for name, (colour, style) in {**STYLES, CONTROL: (OTHER, "-")}.items():
                some = select(of, objective=name, **({} if name == CONTROL else {"width": width}))
                if some:
                    updates, found = reuse_curves(some, score)
                    found = np.where(abs(found) < LARGE, found, np.nan)
                    whole = np.isfinite(found).all(0)  # once a seed diverged there is no mean
                    updates, found = updates[whole], found[:, whole]
                    axes.plot(updates, found.mean(0), style, color=colour, label=name, markersize=4)
                    axes.fill_between(updates, found.min(0), found.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
        column[0].set_title(f"width {width:g}", fontsize=10)
        column[1].set_xlabel("updates on one rollout")
    rewards = [point["reward"] for row in of if row["case"]["objective"] != CONTROL for point in row["points"]]
    grid[0, 0].set_ylim(min(rewards) - 0.02, max(rewards) + 0.02)  # the control may leave the picture
    grid[0, 0].set_ylabel("reward")
    grid[1, 0].set_yscale("log")
    grid[1, 0].set_ylabel("KL (nats per image)")
    _legend(figure, grid[0, 0], "One rollout, reused: when does another epoch hurt?")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, title=title)
