"""Table, curves and plots."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")  # before pyplot: no display is needed, and none is opened
from matplotlib import pyplot as plt

from .data import HELD_OUT, TRAINED

SYMMETRIC = "symmetric mask"  # Flow-DPPO that also blocks an update on its way back
CONTROL = "no trust region"
# Distinct to colour-blind eyes.
COLOURS = {"Flow-DPPO": "#0072b2", "Flow-GRPO": "#d55e00", "GRPO-Guard": "#009e73", SYMMETRIC: "#cc79a7"}
OTHER = "0.55"
REWARD = "reward: minus squared difference to the mirror image"

_COLUMNS = ("", "reward", "KL", "masked", "legible", "held-out", "loss", "eager loss")
_UNITS = ("", "", "nats/image", "% of rows", "% of images", "Frechet", "s", "s")


def table(results: dict[str, Any]) -> str:
    """Fixed-width text with its caption."""
    rows = [_COLUMNS, _UNITS, _row("pretrained", [results["pretrained"]], None, {})]
    for name, entry in results["objectives"].items():
        rows.append(_row(name, entry["scores"], entry["curves"], entry["loss_seconds"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_caption(results)])


def _row(name: str, scores: list[dict], curves: list[dict] | None, seconds: dict[str, float]) -> list[str]:
    reward, kl, legible, frechet = (
        _spread([score[key] * factor for score in scores])
        for key, factor in (("reward", 1), ("kl", 1), ("legible", 100), ("held_out_frechet", 1))
    )
    masked = "-" if curves is None else _spread([100 * mean(curve["masked"]) for curve in curves])
    times = (f"{seconds[which]:.3f}" if which in seconds else "-" for which in ("fused", "reference"))
    return [name, reward, kl, masked, legible, frechet, *times]


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, to the digits that the deviation leaves meaningful."""
    centre = mean(values)
    if not math.isfinite(centre) or abs(centre) >= 1e5:
        return f"{centre:.1e}"
    digits = 3 - (abs(centre) >= 1) - (abs(centre) >= 10)
    return f"{centre:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _caption(results: dict[str, Any]) -> list[str]:
    settings, entries = results["settings"], results["objectives"]
    seeds = next(iter(entries.values()))["seeds"]
    return [
        "Odd digits fine-tuned, even digits held out. Mean ± standard deviation over",
        f"seeds {', '.join(map(str, seeds))}; the last two lines are of seed {seeds[0]} alone.",
        "reward: minus the mean squared difference between image and mirror image.",
        "KL: from the pretrained model, summed over the whole trajectory.",
        "masked: share of rows that got no gradient, over all updates.",
        "legible: share of images of the fine-tuned prompts that a classifier reads as their prompt.",
        "held-out: Frechet distance between the held-out prompts' images and the real digits.",
        f"loss, eager loss: seconds in forward and backward of one run's calls of {results['function']}, for",
        "flowdppo_ops and flowdppo_ops.reference. Each replays the calls recorded in the first, middle and last",
        "iteration of the first seed (median of 5 rounds), scaled to all calls of that run.",
        f"Trained with the {results['loss']} {results['function']} on {results['device']}, "
        f"CPU threads: {results['threads']}.",
        *textwrap.wrap("Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".", 100),
        *(f"  {name}: {entry['objective']}" for name, entry in entries.items()),
    ]


def write(out: Path, results: dict[str, Any], text: str, samples: dict[str, Tensor]) -> None:
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    # JSON has no infinity and no NaN: a policy that diverged gives null.
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    (out / "results.json").write_text(json.dumps(finite, indent=1), encoding="utf-8")
    _plot_rewards(out / "reward_over_kl.png", results, over_kl=True)
    _plot_rewards(out / "reward_over_iterations.png", results, over_kl=False)
    _plot_samples(out / "samples.png", samples)


def _curves(entry: dict[str, Any], key: str) -> np.ndarray:
    """`[seeds, iterations]`."""
    return np.array([curve[key] for curve in entry["curves"]])


def _plot_rewards(path: Path, results: dict[str, Any], over_kl: bool) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, entry in results["objectives"].items():
        kl, reward = _curves(entry, "kl"), _curves(entry, "reward")
        if over_kl:  # the first KL is 0, which a logarithm does not have
            kl, reward = kl[:, 1:], reward[:, 1:]
        colour, style = COLOURS.get(name, OTHER), "-" if name in COLOURS else "--"
        average = {"color": colour, "linewidth": 2, "label": name}
        if over_kl:
            axes.plot(kl.T, reward.T, color=colour, linewidth=0.8, alpha=0.4)
            axes.plot(kl.mean(0), reward.mean(0), style, **average)
            axes.plot(kl.mean(0)[-1:], reward.mean(0)[-1:], "o", color=colour)
        else:
            iterations = np.arange(reward.shape[1])
            axes.plot(iterations, reward.mean(0), style, **average)
            axes.fill_between(iterations, reward.min(0), reward.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.axhline(results["pretrained"]["reward"], color="0.3", linewidth=1, linestyle=":", label="pretrained")
    axes.set_ylabel(REWARD)
    axes.set_ylim(*_limits(results))
    if over_kl:
        axes.set_xlabel("KL to the pretrained model (nats per image, whole trajectory)")
        shown = np.concatenate([_curves(results["objectives"][name], "kl")[:, 1:].ravel() for name in COLOURS])
        shown = shown[np.isfinite(shown)]
        if shown.size:  # the control may leave the picture
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(0.8 * shown.min(), 1.25 * shown.max())
    else:
        axes.set_xlabel("iteration (one rollout each)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _limits(results: dict[str, Any]) -> tuple[float, float]:
    """Of the reward. The control may leave the picture: it has no say in them."""
    values = [_curves(entry, "reward") for name, entry in results["objectives"].items() if name in COLOURS]
    finite = np.concatenate([array[np.isfinite(array)] for array in values])
    low, high = (finite.min(), finite.max()) if finite.size else (-1.0, 0.0)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _plot_samples(path: Path, samples: dict[str, Tensor], per_class: int = 2) -> None:
    """One row of tiles per policy; the same noise in the same place."""
    figure, grid = plt.subplots(
        len(samples), 2, figsize=(9, 0.9 + 1.8 * len(samples)), layout="constrained", squeeze=False
    )
    for row, (name, images) in zip(grid, samples.items(), strict=True):
        for axes, classes, group in zip(row, (TRAINED, HELD_OUT), ("fine-tuned", "held-out"), strict=True):
            axes.imshow(_tiles(images, classes, per_class), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if axes in grid[0]:
                axes.set_title(f"{group} prompts: {' '.join(map(str, classes))}")
        row[0].set_ylabel(name)
    figure.suptitle("Same noise before and after fine-tuning")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _tiles(images: Tensor, classes: tuple[int, ...], per_class: int) -> np.ndarray:
    """A class per column, a draw per line, a paper-coloured pixel between neighbours."""
    framed = np.pad(images[list(classes), :per_class, 0], [(0, 0), (0, 0), (1, 0), (1, 0)], constant_values=-1)
    lines = np.concatenate(np.concatenate(framed, -1), 0)
    return np.pad(lines, [(0, 1), (0, 1)], constant_values=-1)
