"""The README's figures, made from the rows in results/, so that none is typed by hand.

    python benches/figures.py            # prints what stands in each marked place
    python benches/figures.py --write    # puts it into README.md, and with rows of a GPU a plot into docs/

A place begins with `<!-- figures: NAME -->` and ends with `<!-- end -->`. Of a case that was measured more than once
the newest run counts.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench_training_step import shares
from harness import Row, read_json
from report import FRESH, GOAL, Case, grouped

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
PLOT = README.parent / "docs" / "gpu.svg"
PLACE = re.compile(r"(<!-- figures: (.+?) -->\n\n)(.*?)(\n<!-- end -->\n)", re.DOTALL)

BOTH = "forward+backward"
OLD_POLICY = {"fused": "float32 mean", "fused_output": "bfloat16 model output", "fused_residual": "float16 residual"}
OPERATIONS = ("policy_loss", "step_loss", "sde_step")  # and what begins so: other samplers
PEERS = {"eager": "eager", "compile": "compiled", "compile_max": "max-autotune", "triton": "Triton"}
SHOWN = PEERS | {"fused": "fused"}
# What the table and the plot show: image latents, micro-batch 16, and what no L2 holds. `report.py` has all.
IMAGES = {(16, 16, 64, 64): "SD3.5, 512 px", (16, 4096, 64): "FLUX, 1024 px"}
TABLED = IMAGES | {(16, 16, 21, 90, 160): "video, 720p"}
NOISE = 1.005  # a peer that is less than half a percent ahead is not
WANTED = {"eager": 10.0, "compile": 2.0}  # times as fast there
NOT_MEASURED = "**No figure of a GPU is measured yet**: the CUDA kernels are tested in an emulator (below), not timed."


def on_gpu(row: Row) -> bool:
    return "driver=" in row.environment


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each operation, shape and dtype, and of its cold starts, the rows of its last run."""
    out = []
    for of_case in grouped(rows, lambda row: (row.op, row.shape, row.dtype, row.timing in FRESH)).values():
        last = max(row.date for row in of_case)
        out += [row for row in of_case if row.date == last]
    return out


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def table(head: list[str], aligned: str, lines: Iterable[list[str]]) -> str:
    """aligned: a letter a column, "l" or "r"."""
    rules = "|".join("---" if side == "l" else "--:" for side in aligned)
    made = ["|".join(f" {cell} " if cell else " " for cell in line) for line in (head, *lines)]
    return "".join(f"|{line}|\n" for line in (made[0], rules, *made[1:]))


# ---- CPU -------------------------------------------------------------------------------------------------------------


def loss_on_cpu(rows: list[Row]) -> str:
    """With malloc as it comes: what trainers have."""
    of_loss = [row for row in rows if not on_gpu(row) and row.op == "policy_loss"]
    rows = newest(row for row in of_loss if "malloc=default" in row.environment)
    lines, sentence = [], ""
    for (shape, dtype), of_case in grouped(rows, lambda row: (row.shape, row.dtype)).items():
        us = cpu_times(of_case)
        faster = f"{us['eager'] / us['fused']:.0f}x and {us['compile'] / us['fused']:.1f}x as fast"
        times = [f"{us[name]:.0f} us" for name in ("eager", "compile", "fused")]
        lines.append([f"`{list(shape)}`", dtype, *times, faster])
        copies = us["fused"] / (2 * us["copy"])
        sentence = sentence or f"In {dtype} fused takes {copies:.1f} times as long as two copies of one tensor."
    head = ["latents", "dtype", "eager", "compiled", "fused", "fused is"]
    return table(head, "llrrrl", lines) + "\n" + paragraph(sentence)


def step_loss_on_cpu(rows: list[Row]) -> str:
    """From a bfloat16 output and float32 samples, as in training; and what was counted."""
    rows = newest(row for row in rows if not on_gpu(row) and row.op == "step_loss" and row.dtype == "bf16+fp32")
    lines, text = [], ""
    for shape, of_case in grouped(rows, lambda row: row.shape).items():
        us = cpu_times(of_case)
        for provider, old in OLD_POLICY.items():
            first = provider == "fused"
            peers = [f"{us[name]:.0f} us" if first else "" for name in ("eager", "compile")]
            ratios = f"{us['eager'] / us[provider]:.0f}x and {us['compile'] / us[provider]:.1f}x"
            cells = [f"`{list(shape)}`" if first else "", old, *peers, f"{us[provider]:.0f} us"]
            lines.append([*cells, ratios + (" as fast" if first else "")])
        text = text or counted({row.provider: row for row in of_case if row.pass_ == BOTH})
    head = ["latents", "old policy", "eager", "compiled", "fused", "fused is"]
    return table(head, "llrrrl", lines) + "\n" + paragraph(text)


def cpu_times(rows: list[Row]) -> dict[str, float]:
    """Microseconds of forward and backward by provider, and of the copy."""
    return {row.provider: row.p50_us for row in rows if row.pass_ in (BOTH, "copy")}


def counted(rows: dict[str, Row]) -> str:
    """What eager and fused do beside taking time."""
    eager, fused = rows["eager"], rows["fused"]
    waits = fused.host_syncs or "nothing"
    allocated = "the gradient" if fused.latent_allocations == 1 else f"{fused.latent_allocations} times a latent's size"
    return (
        f"The chain takes {eager.ops} operators, {eager.latent_ops} of them over latents, waits for {eager.host_syncs} "
        f"numbers, allocates {eager.latent_allocations} times a latent's size and moves "
        f"{eager.bytes_moved / eager.bytes:.0f} times the bytes it must; fused takes {fused.ops} operators, "
        f"{fused.latent_ops} of them over latents, waits for {waits}, and allocates {allocated}."
    )


# ---- GPU -------------------------------------------------------------------------------------------------------------


def gpu_rows(rows: list[Row]) -> list[Row]:
    return newest(row for row in rows if on_gpu(row) and row.op.startswith(OPERATIONS))


def gpu_cases(rows: list[Row]) -> list[GpuCase]:
    timed = (row for row in gpu_rows(rows) if row.timing not in FRESH)
    return [GpuCase(of_case) for of_case in grouped(timed, case_key).values()]


def gpu(rows: list[Row]) -> str:
    cases = gpu_cases(rows)
    if not cases:
        return paragraph(NOT_MEASURED)
    rows = gpu_rows(rows)
    runs = dict.fromkeys(f"{r.device} ({r.environment}, torch {r.torch}, {r.commit}, {r.date[:10]})" for r in rows)
    times = [f"{name}, us" for name in SHOWN.values()]
    head = ["", "latents", "dtype", *times, "of copy", "launches", "waits"]
    parts = [
        paragraph(
            f"{'; '.join(runs)}. Kernel times of forward and backward (of `sde_step_sample` the forward), medians of "
            "CUDA-graph replays, inputs evicted from the L2 where that is possible; with * what waits for the device "
            "and cannot be captured, timed from Python. Of copy: the share of the copy's bandwidth in the same mode "
            "that the fused forward and backward reach. Launches and waits for the device: eager, fused."
        ),
        table(head, "lll" + "r" * (len(head) - 3), [case.line() for case in cases if case.shape in TABLED]),
        said(
            "Behind a peer", [case.behind() for case in cases], "Fused is behind no peer in any row, to half a percent."
        ),
        said(
            "Image latents, short of 10 times eager or twice compiled",
            [case.too_slow() for case in cases],
            "Image latents: at least 10 times as fast as eager and twice as fast as compiled in every row.",
        ),
        said(
            f"Beyond the L2, short of {GOAL:.0%} of the copy",
            [case.short_of_copy() for case in cases],
            f"Beyond the L2: at least {GOAL:.0%} of the copy in every row.",
        ),
    ]
    if fresh := [row for row in rows if row.timing == "first call"]:
        parts.append(paragraph(first_calls(fresh)))
    parts.append(f"![Share of the copy's bandwidth]({PLOT.relative_to(README.parent)})\n")
    return "\n".join(filter(None, parts))


def case_key(row: Row) -> tuple:
    return row.op, row.shape, row.dtype


def said(what: str, found: Iterable[str | None], nothing: str) -> str:
    """found: a text for each case that there is something to say of, "" where all is well, None where it says nothing.
    Nothing at all is said if there is no case to say it of."""
    asked = [text for text in found if text is not None]
    texts = [f"- {text}\n" for text in asked if text]
    if not texts:
        return paragraph(nothing) if asked else ""
    return f"{what}:\n\n{''.join(texts)}"


class GpuCase(Case):
    def __init__(self, rows: list[Row]):
        super().__init__(rows)
        self.name = f"`{rows[0].op} {list(rows[0].shape)}` {rows[0].dtype}"
        self.operation, self.shape = rows[0].op, rows[0].shape
        self.label = f"{TABLED.get(self.shape, list(self.shape))}\n{rows[0].dtype}"
        self._cells = [f"`{rows[0].op}`", f"`{list(rows[0].shape)}`", rows[0].dtype]
        self.modes.sort(key=lambda mode: (("graph", "call", "host").index(mode[0]), mode[1]))  # cold before warm
        passes = {pass_ for pass_, _ in self.series}
        self.whole = BOTH if BOTH in passes else "forward"

    def named(self, texts: Iterable[str]) -> str:
        together = " and ".join(texts)
        return together and f"{self.name}: {together}"

    def mode_of(self, provider: str) -> tuple[str, str] | None:
        """The first that the provider was timed in, of all that there are."""
        return next((mode for mode in self.modes if self.cost(mode, self.whole, provider)), None)

    def us(self, provider: str) -> str:
        mode = self.mode_of(provider)
        if mode is None:
            return ""
        return f"{self.cost(mode, self.whole, provider)[0]:.1f}" + ("" if mode[0] == "graph" else "*")

    def share(self, provider: str) -> float | None:
        """Of the copy, in all."""
        mode = self.mode_of(provider)
        return self.of_copy(mode, self.whole, provider) if mode else None

    def shares(self) -> dict[str, float]:
        mode = self.modes[0]
        shares = {pass_: self.of_copy(mode, pass_, "fused") for pass_ in ("forward", "backward")}
        return {pass_: share for pass_, share in shares.items() if share is not None}

    def line(self) -> list[str]:
        counts = [self.counts(self.whole, provider) for provider in ("eager", "fused")]
        both = [", ".join(one[at] for one in counts if one[at]) for at in (0, 1)]
        return [
            *self._cells,
            *(self.us(provider) for provider in SHOWN),
            ", ".join(f"{share:.0%}" for share in self.shares().values()),
            *both,
        ]

    def ratios(self, peer: str) -> Iterator[tuple[float, str]]:
        """How many times as long as the peer fused takes, where both were timed alike."""
        for mode in self.modes:
            for pass_ in ("forward", "backward", BOTH):
                mine, other = self.cost(mode, pass_, "fused"), self.cost(mode, pass_, peer)
                if mine and other and other[0] > 0:
                    yield mine[0] / other[0], f"{pass_}, {', '.join(mode)}"

    def behind(self) -> str | None:
        """Of each peer that is faster in anything, the worst."""
        worst = {peer: max(ratios) for peer in PEERS if (ratios := list(self.ratios(peer)))}
        if not worst:
            return None
        slower = {PEERS[peer]: one for peer, one in worst.items() if one[0] >= NOISE}
        return self.named(f"{peer} ({ratio:.2f} times its time, {where})" for peer, (ratio, where) in slower.items())

    def too_slow(self) -> str | None:
        times = {peer: n for peer in WANTED if (n := self.faster(peer)) is not None}
        if self.shape not in IMAGES or self.whole != BOTH or len(times) < len(WANTED):
            return None
        short = [f"{PEERS[peer]} {n:.1f}x" for peer, n in times.items() if n < WANTED[peer]]
        return self.named(short)

    def faster(self, peer: str) -> float | None:
        """How many times as fast as the peer fused is, in the peer's first mode."""
        mode = self.mode_of(peer)
        mine = mode and self.cost(mode, self.whole, "fused")
        return self.cost(mode, self.whole, peer)[0] / mine[0] if mine else None

    def short_of_copy(self) -> str | None:
        """What has a warm form is not beyond the L2."""
        shares = self.shares()
        if any(cache == "warm" for _, cache in self.modes) or not shares:
            return None
        short = [f"{pass_} {share:.0%}" for pass_, share in shares.items() if share < GOAL]
        return self.named(short)


def first_calls(rows: list[Row]) -> str:
    texts = []
    for (op, shape, dtype), of_case in grouped(rows, case_key).items():
        seconds = {row.provider: row.p50_us / 1e6 for row in of_case}
        each = [f"{name} {seconds[one]:.2f} s" for one, name in SHOWN.items() if one in seconds]
        texts.append(f"`{op} {list(shape)}` {dtype}: {', '.join(each)}")
    return f"First results in a fresh process, caches empty: {'; '.join(texts)}."


def plot(rows: list[Row], file: Path) -> None:
    """What the table shows, as shares of the copy's bandwidth: a panel an operation, a group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "figures"  # the same rows, the same file
    from matplotlib import pyplot

    of_operations = grouped((case for case in gpu_cases(rows) if case.shape in TABLED), lambda case: case.operation)
    lines = -(-len(of_operations) // 2)
    figure, axes = pyplot.subplots(lines, 2, figsize=(11, 0.4 + 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(of_operations) :]:
        axis.set_axis_off()
    width = 0.8 / len(SHOWN)
    for axis, (operation, cases) in zip(axes.flat, of_operations.items(), strict=False):
        for index, (provider, name) in enumerate(SHOWN.items()):
            shares = [100 * (case.share(provider) or 0.0) for case in cases]
            left = [at + (index - (len(SHOWN) - 1) / 2) * width for at in range(len(cases))]
            axis.bar(left, shares, width, label=name)
        axis.axhline(100 * GOAL, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(cases)), [case.label for case in cases], fontsize=7)
        axis.set_title(operation, fontsize=9)
        axis.set_ylabel("% of the copy's bandwidth", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=len(SHOWN), loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (0.4 + 2.6 * lines)))
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


# ---- a training step -------------------------------------------------------------------------------------------------

STEPS = {"training_step": "all parameters", "training_step_attention": "the attention alone"}
STEP_NOT_MEASURED = "On a GPU it is not measured yet: `python benches/bench_training_step.py --device cuda`."
CHAINS = {"eager": "eager", "compile": "compiled", "fused": "fused", "fused_residual": "fused, residual"}


def training_step(rows: list[Row]) -> str:
    """The time from the model's output to its gradient, and its share of the step."""
    rows = newest(row for row in rows if row.op in STEPS)
    missing = "" if any(on_gpu(row) for row in rows) else STEP_NOT_MEASURED
    if not rows:
        return paragraph(missing)
    lines = []
    for of_case in grouped(rows, lambda row: (row.device, row.shape, row.op)).values():
        found, step = shares(of_case), next(row for row in of_case if (row.timing, row.provider) == ("call", "fixed"))
        times = [
            f"{found[name].chain_us / 1e3:.2f} ms, {found[name].chain:.1%}" if name in found else "" for name in CHAINS
        ]
        layers, heads, parameters = (fact.partition("=")[2] for fact in step.environment.split()[-3:])
        model = f"{int(parameters) / 1e6:.1f} million, {layers} layers of {heads}"
        lines.append(
            [step.device, model, f"`{list(step.shape)}`", STEPS[step.op], f"{step.p50_us / 1e3:.0f} ms", *times]
        )
    head = ["", "parameters", "latents", "trained", "step without", *CHAINS.values()]
    return table(head, "llll" + "r" * (len(head) - 4), lines) + (f"\n{paragraph(missing)}" if missing else "")


# ---- the README ------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[list[Row]], str]] = {
    "loss on a CPU": loss_on_cpu,
    "step_loss on a CPU": step_loss_on_cpu,
    "training step": training_step,
    "GPU": gpu,
}


def all_rows(folder: Path = RESULTS) -> list[Row]:
    return [row for file in sorted(folder.glob("*.json")) for row in read_json(file)]


def filled(text: str, rows: list[Row]) -> str:
    """`text` with its marked places made anew."""
    return PLACE.sub(lambda place: place[1] + PLACES[place[2]](rows) + place[4], text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="figures", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md, and the plot beside it")
    args = parser.parse_args(argv)
    rows = all_rows()
    for name, make in PLACES.items():
        print(f"<!-- figures: {name} -->\n\n{make(rows)}")
    if args.write:
        README.write_text(filled(README.read_text(), rows))
        if gpu_cases(rows):
            plot(rows, PLOT)


if __name__ == "__main__":
    main()
