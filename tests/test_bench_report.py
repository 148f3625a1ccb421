"""`benches/report.py` on made-up rows: the numbers in its tables, and the plot."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("harness")


@pytest.fixture
def report(harness):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return importlib.import_module("report")


@pytest.fixture
def rows(harness):
    """A run on a GPU: 1000-byte tensors, a copy of 10 us warm, cold 20 us; fused at half of the copy's bandwidth."""
    facts = {"torch": "2.11.0", "flowdppo_ops": "0.1.0", "commit": "abc", "environment": "driver=1", "date": "today"}
    like = harness.Row(
        op="policy_loss",
        shape=(2, 125),
        dtype="fp32",
        provider="copy",
        pass_="copy",
        p20_us=1.0,
        p50_us=20.0,
        p80_us=99.0,
        repeats=9,
        bytes=2000,
        threads=2,
        device="Fake GPU",
        cores_elsewhere=0.0,
        timing="graph",
        cache="cold",
        **facts,
    )
    counts = {"launches": 2, "sync_warnings": 1, "stream_syncs": 3, "dtoh_copies": 4, "peak_bytes": 6000}

    def one(provider, pass_, us, tensors, **fields):
        return replace(like, provider=provider, pass_=pass_, p50_us=us, bytes=1000 * tensors, **counts, **fields)

    return [
        one("eager", "forward", 240.0, 3),
        one("eager", "forward+backward", 600.0, 6),
        one("fused", "forward", 60.0, 3),
        one("fused", "forward+backward", 100.0, 6),
        like,
        one("fused", "forward", 70.0, 3, timing="call"),
        replace(like, timing="call", p50_us=21.0),
        one("fused", "forward+backward", 2.5e6, 6, timing="cold start"),
        one("fused", "forward+backward", 0.25e6, 6, timing="first call"),
    ]


def cells(table: str) -> dict[tuple[str, str], list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    return {(line[0], line[1]): line[2:] for line in lines}


def test_table(report, rows):
    table = report.tables(rows)
    assert table.startswith(
        "## Fake GPU, torch 2.11.0, flowdppo_ops 0.1.0 at abc, driver=1, 2 threads, today\n\n"
        "### policy_loss `[2, 125]` fp32\n"
    )
    got = cells(table)
    head = ["graph, cold, us", "of copy", "call, cold, us", "fused is (graph, cold)"]
    assert got["pass", "provider"] == [*head, "launches", "waits", "copies to host", "peak B/element"]
    counted = ["2", "3", "4", "24.0"]
    assert got["copy", "copy"] == ["20.0", "100%", "21.0", "", "", "", "", ""]
    assert got["forward", "eager"] == ["240.0", "12%", "", "4.00x as fast", *counted]  # 3/240 against 2/20
    assert got["forward", "fused"] == ["60.0", "50%", "70.0", "", *counted]
    assert got["forward+backward", "fused"] == ["100.0", "60%", "", "", *counted]
    # Backward: 600 - 240 and 100 - 60 us for 3 tensors.
    assert got["backward", "eager"] == ["360.0", "8%", "", "9.00x as fast", "", "", "", ""]
    assert got["backward", "fused"] == ["40.0", "75%", "", "", "", "", "", ""]


def test_who_has_no_backward_has_no_line_of_it(report, rows):
    got = cells(report.tables([row for row in rows if (row.provider, row.pass_) != ("fused", "forward+backward")]))
    assert ("backward", "eager") in got
    assert ("forward", "fused") in got
    assert ("backward", "fused") not in got


def test_what_the_dispatcher_counted(report, rows):
    seen = {"ops": 40, "latent_ops": 12, "host_syncs": 3, "latent_allocations": 9, "bytes_moved": 7500}
    got = cells(report.tables([replace(row, **seen) if row.provider == "eager" else row for row in rows]))
    at = got["pass", "provider"].index("operators")
    assert got["pass", "provider"][at : at + 5] == [
        "operators",
        "on latents",
        "host syncs",
        "latent allocations",
        "bytes",
    ]
    assert got["forward", "eager"][at : at + 5] == ["40", "12", "3", "9", "2.5x"]  # 7500 of 3000 bytes
    assert got["forward+backward", "eager"][at : at + 5] == ["40", "12", "3", "9", "1.2x"]
    assert got["forward", "fused"][at : at + 5] == [""] * 5


def test_who_cannot_be_captured_is_compared_in_the_next_mode(report, rows):
    at_call = [replace(row, timing="call", p50_us=350.0) if row.provider == "eager" else row for row in rows[:1]]
    got = cells(report.tables([*rows[2:], *at_call]))
    assert got["forward", "eager"][3] == "5.00x as fast (call, cold)"  # 350 against 70 us


def test_operations_are_kept_apart(report, rows):
    other = [replace(row, op="step_loss", p50_us=3 * row.p50_us) for row in rows]
    table = report.tables(rows + other)
    assert table.index("### policy_loss `[2, 125]` fp32") < table.index("### step_loss `[2, 125]` fp32")
    assert table.count("| fused | 60.0 | 50% |") == table.count("| fused | 180.0 | 50% |") == 1


def test_fresh_processes_have_a_table_of_seconds(report, rows):
    table = report.tables(rows)
    assert "fresh process, caches empty, median of 9" in table
    assert "| fused | 2.50 | 0.25 | 2 | 3 | 4 |" in table
    bare = [replace(row, launches=None, provider=f"not {row.provider}") for row in rows[7:]]
    assert "| not fused | 2.50 | 0.25 | ? | ? | ? |" in report.tables([*rows, *bare])
    assert "| not fused | 2.50 | 0.25 |\n" in report.tables(bare)


def test_counts_that_failed_are_not_zeros(report, rows):
    unseen = [replace(row, launches=None, stream_syncs=None, dtoh_copies=None) for row in rows]
    assert cells(report.tables(unseen))["forward", "fused"][-4:] == ["?", "1", "?", "24.0"]
    of_its_own = [replace(row, peak_bytes=None) for row in rows]  # where CUDA graphs of its own have the memory
    assert cells(report.tables(of_its_own))["forward", "fused"][-4:] == ["2", "3", "4", "?"]


def test_runs_are_kept_apart(report, rows):
    later = [replace(row, date="tomorrow", p50_us=2 * row.p50_us) for row in rows]
    table = report.tables(rows + later)
    assert table.count("## Fake GPU") == 2
    assert table.count("| fused | 60.0 | 50% |") == table.count("| fused | 120.0 | 50% |") == 1


def test_a_run_on_a_cpu_has_neither_backward_nor_counts(report, rows):
    counts = dict.fromkeys(("launches", "sync_warnings", "stream_syncs", "dtoh_copies", "peak_bytes"))
    on_cpu = [replace(row, timing="call", cache="warm", **counts) for row in rows[:5]]
    got = cells(report.tables(on_cpu))
    assert got["pass", "provider"] == ["call, warm, us", "of copy", "fused is"]
    assert got["forward", "eager"] == ["240.0", "12%", "4.00x as fast"]
    assert ("backward", "eager") not in got


def test_files_to_stdout_and_plot(harness, report, rows, tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    harness.write_json(rows[:5], first)
    harness.write_json(rows[5:], second)
    report.main([str(first), str(second)])
    assert capsys.readouterr().out.rstrip("\n") == report.tables(rows).rstrip("\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    report.main([str(first), "--plot", str(tmp_path / "elsewhere.png")])
    assert (tmp_path / "elsewhere.png").exists()


def test_rows_of_before_the_devices_are_read(harness, rows, tmp_path):
    file = tmp_path / "old.json"
    harness.write_json(rows[4:5], file)
    text = file.read_text()
    file.write_text(text[: text.index(', "timing"')] + "}\n]\n")
    assert harness.read_json(file) == [replace(rows[4], timing="call", cache="warm")]


@pytest.mark.parametrize("content", [None, "no JSON", '[{"shape": [1], "unknown": 1}]'])
def test_a_file_without_rows_is_one_line_and_status_2(report, tmp_path, capsys, content):
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(file)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("report: no rows of a bench: ")


def test_cases_without_a_copy_have_no_place_in_a_plot(report, rows, tmp_path, monkeypatch):
    """Of a training step: its transformer moves bytes that nobody counts."""
    pyplot, drawn = pytest.importorskip("matplotlib.pyplot"), []
    step = [replace(row, op="training_step") for row in rows if row.provider != "copy"]
    report.plot(step, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
    monkeypatch.setattr(pyplot, "close", drawn.append)
    report.plot([*step, *rows], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    (figure,) = drawn
    (label,) = figure.axes[0].get_xticklabels()
    assert label.get_text().startswith("policy_loss ")
