"""The README's figures are those of the rows, and of made-up rows of a GPU those that they should be."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"
IMAGE, VIDEO = (16, 16, 64, 64), (16, 16, 21, 90, 160)


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("figures")


@pytest.fixture
def row(figures):
    """A function that makes a row of a GPU: 6000 bytes beside the copy's 2000 in 1 us."""

    def make(provider, us, pass_="forward+backward", **fields):
        size = {"copy": 2000, "forward": 3000}.get(pass_, 6000)
        counts = {"launches": 2, "sync_warnings": 0, "stream_syncs": 0, "dtoh_copies": 0, "peak_bytes": 9}
        if provider == "eager":
            counts |= {"launches": 146, "stream_syncs": 29}
        return figures.Row(
            **{"op": "policy_loss", "shape": IMAGE, "dtype": "fp32", "timing": "graph", "cache": "cold"}
            | {"p20_us": us, "p80_us": us, "repeats": 3, "bytes": size, "threads": 2, "device": "Fake GPU"}
            | {"torch": "2.11", "flowdppo_ops": "0.1.0", "commit": "abc", "environment": "driver=1 cuda=13.0"}
            | {"date": "2026-12-01T10:00:00Z", "cores_elsewhere": 0.0}
            | counts
            | fields,
            provider=provider,
            pass_=pass_,
            p50_us=us,
        )

    return make


@pytest.fixture
def image(row):
    """Forward 2 us and backward 2 us: 75 % of the copy's bandwidth each."""
    warm = {"cache": "warm"}
    return [
        row("copy", 1.0, "copy"),
        row("eager", 48.0),
        row("compile", 9.0),
        row("compile_max", 8.0),
        row("triton", 3.75),
        row("fused", 4.0),
        row("triton", 2.5, "forward"),
        row("fused", 2.0, "forward"),
        row("copy", 1.0, "copy", **warm),
        row("triton", 2.0, **warm),
        row("fused", 1.9, **warm),
    ]


def line_of(text: str, *cells: str) -> list[str]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [line for line in lines if line[: len(cells)] == [*cells]]
    return found[len(cells) :]


def paragraphs(text: str) -> list[str]:
    """A list is a part of the paragraph before it."""
    parts = [part.replace("\n", " ").strip() for part in text.replace(":\n\n-", ":\n-").split("\n\n")]
    return [part for part in parts if part[:1] != "|"]


def test_the_readme_has_the_figures_of_the_rows(figures):
    text = figures.README.read_text()
    assert [name for _, name, _, _ in figures.PLACE.findall(text)] == list(figures.PLACES)
    assert figures.filled(text, figures.all_rows()) == text, "python benches/figures.py --write"


def test_another_row_makes_another_readme(figures):
    text, rows = figures.README.read_text(), figures.all_rows()
    (at,) = [
        at
        for at, one in enumerate(rows)
        if (one.environment, one.dtype, one.provider, one.pass_) == ("malloc=default", "fp32", "fused", figures.BOTH)
    ]
    rows[at] = replace(rows[at], p50_us=2 * rows[at].p50_us)
    changed = figures.filled(text, rows)
    assert "| `[16, 65536]` | fp32 | 3152 us | 336 us | 312 us | 10x and 1.1x as fast |" in changed
    assert "In fp32 fused takes 3.8 times as long as two copies of one tensor." in changed


def test_without_a_gpu_nothing_is_said_of_one(figures):
    assert figures.gpu([]) == figures.paragraph(figures.NOT_MEASURED)
    assert figures.gpu([one for one in figures.all_rows() if not figures.on_gpu(one)]) == figures.gpu([])


def test_table_of_a_gpu(figures, image):
    text = figures.gpu(image)
    assert text.startswith("Fake GPU (driver=1 cuda=13.0, torch 2.11, abc, 2026-12-01). Kernel times")
    times = ["eager, us", "compiled, us", "max-autotune, us", "Triton, us", "fused, us"]
    assert line_of(text, "", "latents", "dtype") == [*times, "of copy", "launches", "waits"]
    line = line_of(text, "`policy_loss`", f"`{list(IMAGE)}`", "fp32")
    assert line == ["48.0", "9.0", "8.0", "3.8", "4.0", "75%, 75%", "146, 2", "29, 0"]


def test_rows_where_fused_is_behind_are_named(figures, image, row):
    """Of a peer that is faster in several ways the worst, also in a mode that the table does not show."""
    name = "`policy_loss [16, 16, 64, 64]` fp32"
    said = f"Behind a peer: - {name}: Triton (1.60 times its time, backward, graph, cold)"
    # Triton's backward takes 3.75 - 2.5 us, ours 4 - 2.
    assert said in paragraphs(figures.gpu(image))
    slower = [
        replace(one, p50_us=5.0) if (one.provider, one.pass_) == ("triton", figures.BOTH) else one for one in image
    ]
    assert "Fused is behind no peer in any row, to half a percent." in paragraphs(figures.gpu(slower))
    warm = [*slower, row("compile", 1.0, cache="warm")]
    said = f"{name}: compiled (1.90 times its time, forward+backward, graph, warm)"
    assert f"Behind a peer: - {said}" in paragraphs(figures.gpu(warm))


def test_image_latents_that_fall_short_are_named(figures, image):
    reached = "Image latents: at least 10 times as fast as eager and twice as fast as compiled in every row."
    assert reached in paragraphs(figures.gpu(image))
    slow = [replace(one, p50_us=30.0) if one.provider == "eager" else one for one in image]
    short = "Image latents, short of 10 times eager or twice compiled: "
    assert f"{short}- `policy_loss [16, 16, 64, 64]` fp32: eager 7.5x" in paragraphs(figures.gpu(slow))
    elsewhere = [replace(one, shape=(16, 65536)) for one in slow]
    for other in (elsewhere, [one for one in slow if one.provider != "compile"]):
        assert not any(said.startswith("Image latents") for said in paragraphs(figures.gpu(other)))


def test_beyond_the_l2_the_copy_is_the_measure(figures, image):
    """What has a warm form fits into the L2."""
    assert not any(said.startswith("Beyond the L2") for said in paragraphs(figures.gpu(image)))
    video = [replace(one, shape=VIDEO) for one in image if one.cache == "cold"]
    short = f"Beyond the L2, short of 90% of the copy: - `policy_loss {list(VIDEO)}` fp32: forward 75% and backward 75%"
    assert short in paragraphs(figures.gpu(video))
    for both, forward, short in ((3.6, 1.6, "backward 75%"), (3.2, 1.6, "")):  # microseconds
        times = {figures.BOTH: both, "forward": forward}
        mine = [replace(one, p50_us=times[one.pass_]) if one.provider == "fused" else one for one in video]
        reached = "Beyond the L2: at least 90% of the copy in every row."
        missed = f"Beyond the L2, short of 90% of the copy: - `policy_loss {list(VIDEO)}` fp32: {short}"
        assert (missed if short else reached) in paragraphs(figures.gpu(mine))


def test_who_waits_is_timed_from_python_and_marked(figures, image, row):
    """Eager in the calls' mode alone: compared with fused there."""
    rest = [one for one in image if one.provider != "eager"]
    called = [row("eager", 99.0, timing="call"), row("fused", 9.0, timing="call")]
    text = figures.gpu([*rest, *called])
    assert line_of(text, "`policy_loss`")[2] == "99.0*"
    called[1] = replace(called[1], p50_us=11.0)
    short = "Image latents, short of 10 times eager or twice compiled: "
    assert f"{short}- `policy_loss [16, 16, 64, 64]` fp32: eager 9.0x" in paragraphs(figures.gpu([*rest, *called]))


def test_the_newest_run_of_a_case_counts(figures, image):
    later = [replace(one, p50_us=2 * one.p50_us, date="2026-12-02T10:00:00Z", commit="def") for one in image]
    other = [replace(one, dtype="bf16") for one in image]
    text = figures.gpu([*later, *image, *other])
    assert line_of(text, "`policy_loss`", f"`{list(IMAGE)}`", "fp32")[4] == "8.0"
    assert line_of(text, "`policy_loss`", f"`{list(IMAGE)}`", "bf16")[4] == "4.0"
    assert "abc, 2026-12-01" in text
    assert "def, 2026-12-02" in text


def test_other_operations_have_no_place_there(figures, image):
    alone = figures.gpu(image)
    assert figures.gpu([*image, *(replace(one, op="training_step") for one in image)]) == alone
    drawn = [replace(one, op="sde_step_sample", pass_="forward") for one in image[1:6]]
    assert "`sde_step_sample`" in figures.gpu(drawn)


def test_first_calls_are_seconds(figures, image, row):
    fresh = [row(name, us, timing="first call") for name, us in (("compile", 12.34e6), ("fused", 0.1e6))]
    fresh.append(row("fused", 5e6, timing="cold start"))
    said = "`policy_loss [16, 16, 64, 64]` fp32: compiled 12.34 s, fused 0.10 s."
    assert f"First results in a fresh process, caches empty: {said}" in paragraphs(figures.gpu([*image, *fresh]))


def test_writing(figures, monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n\n<!-- figures: GPU -->\n\nold\n\n<!-- end -->\nafter\n")
    monkeypatch.setattr(figures, "README", page)
    figures.main([])
    assert "old" in page.read_text()
    figures.main(["--write"])
    assert (
        page.read_text()
        == f"before\n\n<!-- figures: GPU -->\n\n{figures.gpu(figures.all_rows())}\n<!-- end -->\nafter\n"
    )
    assert capsys.readouterr().out.count("<!-- figures: ") == 2 * len(figures.PLACES)


def test_the_plot_is_there_when_there_are_rows_of_a_gpu(figures, image, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert figures.PLOT.exists() == bool(figures.gpu_cases(figures.all_rows()))
    monkeypatch.setattr(figures, "README", tmp_path / "README.md")
    monkeypatch.setattr(figures, "PLOT", tmp_path / "gpu.svg")
    figures.README.write_text("<!-- figures: GPU -->\n\nold\n\n<!-- end -->\n")
    monkeypatch.setattr(figures, "all_rows", list)
    figures.main(["--write"])
    assert not figures.PLOT.exists()
    rows = [*image, *(replace(one, op="step_loss", shape=VIDEO) for one in image)]
    monkeypatch.setattr(figures, "all_rows", lambda: rows)
    figures.main(["--write"])
    assert "![Share of the copy's bandwidth](gpu.svg)" in figures.README.read_text()
    first = figures.PLOT.read_text()
    assert "<svg" in first
    figures.main(["--write"])
    assert figures.PLOT.read_text() == first


def test_share_of_a_training_step(figures, row):
    facts = {"op": "training_step", "shape": (8, 16, 32, 32), "dtype": "bf16+fp32", "cache": "warm"}
    facts["environment"] = "malloc=kept layers=2 heads=4x32 parameters=1250000"
    times = {"call": {"fixed": 95e3, "eager": 100e3}, "chain": {"fixed": 20.0, "eager": 2020.0}}
    rows = [row(provider, us, timing=timing, **facts) for timing, of in times.items() for provider, us in of.items()]
    text = figures.training_step(rows)
    line = line_of(text, "Fake GPU", "1.2 million, 2 layers of 4x32", "`[8, 16, 32, 32]`", "all parameters")
    assert line == ["95 ms", "2.00 ms, 2.0%", "", "", ""]
    missing = figures.paragraph(figures.STEP_NOT_MEASURED)
    assert text.endswith(f"\n\n{missing}")
    assert figures.training_step([]) == missing
    facts["environment"] = f"driver=1 {facts['environment']}"
    assert missing not in figures.training_step([replace(one, environment=facts["environment"]) for one in rows])
