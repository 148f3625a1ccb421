"""Markdown tables on stdout and a plot, from the rows that a bench wrote with `--json`.

    python benches/report.py benches/results/h200.json [FILE...] [--plot PLOT.png]

A section per run, a table per operation, shape and dtype, a line per pass and provider; times are medians. The plot,
share of the copy's bandwidth, goes beside the first file unless told otherwise; it is not committed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from harness import Row, read_json

PASSES = ("copy", "forward", "backward", "forward+backward")
FRESH = ("cold start", "first call")  # timings of a whole process, in seconds
GOAL = 0.9  # of the copy's bandwidth, for latents beyond the L2


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def run_of(row: Row) -> str:
    facts = (row.device, f"torch {row.torch}", f"flowdppo_ops {row.flowdppo_ops} at {row.commit}", row.environment)
    return ", ".join(fact for fact in (*facts, f"{row.threads} threads", row.date) if fact)


class Case:
    """The rows of one run, operation, shape and dtype: microseconds and share of the copy by mode, pass, provider."""

    def __init__(self, rows: list[Row]):
        self.rows = {((row.timing, row.cache), row.pass_, row.provider): row for row in rows}
        self.modes = list(dict.fromkeys((row.timing, row.cache) for row in rows))
        self.series = list(dict.fromkeys((row.pass_, row.provider) for row in rows))
        # Only kernel times can be subtracted: in a call from Python host and device overlap.
        providers = dict.fromkeys(row.provider for row in rows)
        self.series += [
            ("backward", one) for one in providers if any(self.cost(mode, "backward", one) for mode in self.modes)
        ]
        self.series.sort(key=lambda one: PASSES.index(one[0]))

    def _any_row(self, pass_: str, provider: str) -> Row | None:
        """Of whatever mode: what was counted is the same in all."""
        return next((row for mode in self.modes if (row := self.rows.get((mode, pass_, provider)))), None)

    def cost(self, mode: tuple[str, str], pass_: str, provider: str) -> tuple[float, int] | None:
        """Microseconds and bytes; those of `backward` are forward+backward less forward."""
        if pass_ == "backward":
            both = self.cost(mode, "forward+backward", provider)
            first = self.cost(mode, "forward", provider)
            if mode[0] != "graph" or both is None or first is None:
                return None
            return both[0] - first[0], both[1] - first[1]
        row = self.rows.get((mode, pass_, provider))
        return None if row is None else (row.p50_us, row.bytes)

    def of_copy(self, mode: tuple[str, str], pass_: str, provider: str) -> float | None:
        cost, copy = self.cost(mode, pass_, provider), self.cost(mode, "copy", "copy")
        if cost is None or copy is None or cost[0] <= 0:
            return None
        return (cost[1] / cost[0]) / (copy[1] / copy[0])

    def fused_is(self, pass_: str, provider: str) -> str:
        """How many times as fast fused is, in the first mode that has both: who waits has no time in a graph."""
        for mode in self.modes if provider not in ("copy", "fused") else []:
            cost, fused = self.cost(mode, pass_, provider), self.cost(mode, pass_, "fused")
            if cost is not None and fused is not None and fused[0] > 0:
                return f"{cost[0] / fused[0]:.2f}x as fast" + (f" ({', '.join(mode)})" if mode != self.modes[0] else "")
        return ""

    def dispatched(self, pass_: str, provider: str) -> list[str]:
        """`counting.Counts`; the bytes as a multiple of those that must move."""
        row = self._any_row(pass_, provider)
        if row is None or row.ops is None:
            return [""] * 5
        counted = [row.ops, row.latent_ops, row.host_syncs, row.latent_allocations]
        return [*map(str, counted), f"{row.bytes_moved / row.bytes:.1f}x"]

    def counts(self, pass_: str, provider: str) -> list[str]:
        """Launches, waits of the host, copies to it, and peak memory in bytes per latent element."""
        row = self._any_row(pass_, provider)
        if row is None or not was_counted(row):
            return [""] * 4
        elements = 1
        for n in row.shape:
            elements *= n
        waits = max((n for n in (row.sync_warnings, row.stream_syncs) if n is not None), default=None)
        counted = ["?" if n is None else str(n) for n in (row.launches, waits, row.dtoh_copies)]
        return [*counted, "?" if row.peak_bytes is None else f"{row.peak_bytes / elements:.1f}"]


def was_counted(row: Row) -> bool:
    """`devices.Costs`: on a GPU waits always are, launches and memory where they can be."""
    return row.sync_warnings is not None


def case_table(rows: list[Row]) -> list[str]:
    case = Case(rows)
    shared = [mode for mode in case.modes if mode[0] == "graph"] or case.modes  # where bandwidth means something
    dispatched = any(row.ops is not None for row in rows)
    counted = any(map(was_counted, rows))
    head = ["pass", "provider"]
    for mode in case.modes:
        head += [", ".join(mode) + ", us", *(["of copy"] if mode in shared else [])]
    head += ["fused is" + (f" ({', '.join(case.modes[0])})" if len(case.modes) > 1 else "")]
    head += ["operators", "on latents", "host syncs", "latent allocations", "bytes"] if dispatched else []
    head += ["launches", "waits", "copies to host", "peak B/element"] if counted else []
    lines = [_line(head), _line(["---"] * 2 + ["--:"] * (len(head) - 2))]
    for pass_, provider in case.series:
        cells = [pass_, provider]
        for mode in case.modes:
            cost = case.cost(mode, pass_, provider)
            cells.append("" if cost is None else f"{cost[0]:.1f}")
            if mode in shared:
                cells.append(_format(case.of_copy(mode, pass_, provider), "{:.0%}"))
        cells.append(case.fused_is(pass_, provider))
        cells += case.dispatched(pass_, provider) if dispatched else []
        lines.append(_line(cells + (case.counts(pass_, provider) if counted else [])))
    return lines


def fresh_table(rows: list[Row]) -> list[str]:
    """Seconds; and what the profiler saw of a later call, if it saw anything."""
    seconds = {(row.provider, row.timing): row.p50_us / 1e6 for row in rows}
    profiled = {row.provider: (row.launches, row.stream_syncs, row.dtoh_copies) for row in rows if row.launches}
    head = ["provider", "from the first import, s", "the call itself, s"]
    head += ["launches", "waits", "copies to host"] if profiled else []
    lines = [_line(head), _line(["---"] + ["--:"] * (len(head) - 1))]
    for provider in dict.fromkeys(row.provider for row in rows):
        cells = [provider, *(_format(seconds.get((provider, timing)), "{:.2f}") for timing in FRESH)]
        cells += map(str, profiled.get(provider, "???")) if profiled else []
        lines.append(_line(cells))
    return lines


def tables(rows: list[Row]) -> str:
    lines: list[str] = []
    for run, of_run in grouped(rows, run_of).items():
        lines += [f"## {run}", ""]
        for (op, shape, dtype, fresh), of_case in grouped(of_run, _case_key).items():
            title = f"### {op} `{list(shape)}` {dtype}"
            if fresh:
                repeats = of_case[0].repeats
                title += f": first results in a fresh process, caches empty, median of {repeats}"
            lines += [title, "", *(fresh_table(of_case) if fresh else case_table(of_case)), ""]
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Share of the copy's bandwidth in the first mode of each case: a line of panels per run, a panel per pass.

    Cases without a copy, those of a training step, are not in it; with no other there is no plot.
    """
    measured = {(run_of(row), _case_key(row)) for row in rows if row.provider == "copy"}
    runs = grouped((row for row in rows if (run_of(row), _case_key(row)) in measured), run_of)
    if not runs:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = ("forward", "forward+backward")
    figure, axes = pyplot.subplots(len(runs), 2, figsize=(14, 4.5 * len(runs)), squeeze=False, sharey="row")
    for line, (run, of_run) in zip(axes, runs.items(), strict=True):
        cases = {key: Case(of_case) for key, of_case in grouped(of_run, _case_key).items()}
        labels = [
            f"{op} {'x'.join(map(str, shape))}\n{dtype} {', '.join(case.modes[0])}"
            for (op, shape, dtype, _), case in cases.items()
        ]
        providers = [name for name in dict.fromkeys(row.provider for row in of_run) if name != "copy"]
        width = 0.8 / max(1, len(providers))
        for axis, pass_ in zip(line, passes, strict=True):
            for index, provider in enumerate(providers):
                shares = [case.of_copy(case.modes[0], pass_, provider) or 0.0 for case in cases.values()]
                left = [at + (index - (len(providers) - 1) / 2) * width for at in range(len(cases))]
                axis.bar(left, [100 * share for share in shares], width, label=provider)
            axis.axhline(100 * GOAL, color="grey", linewidth=0.8, linestyle="--")
            axis.set_xticks(range(len(cases)), labels, rotation=30, ha="right", fontsize=7)
            axis.set_title(f"{pass_}\n{run}", fontsize=8)
            axis.set_ylabel("% of the copy's bandwidth")
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _case_key(row: Row) -> tuple:
    return row.op, row.shape, row.dtype, row.timing in FRESH


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows, as `--json` writes them")
    parser.add_argument("--plot", type=Path, metavar="PLOT.png", help="default: the first FILE with .png")
    args = parser.parse_args(argv)
    try:
        rows = [row for file in args.files for row in read_json(file)]
    except (OSError, ValueError, TypeError) as error:
        parser.exit(2, f"report: no rows of a bench: {error}\n")
    print(tables(rows))
    plot(rows, args.plot or args.files[0].with_suffix(".png"))


if __name__ == "__main__":
    main()
