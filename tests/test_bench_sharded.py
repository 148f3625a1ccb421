"""The bench of sharded latents, and its table in docs/sharding.md."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import distributed

import flowdppo_ops

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("bench_sharded")


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_quick_run_writes_a_row_per_number_of_ranks_and_rows(bench, tmp_path, capsys):
    file = tmp_path / "rows.json"
    bench.main(["--quick", "--ranks", "1", "2", "--rows", "1", "3", "--json", str(file)])
    rows = json.loads(file.read_text())
    calls = ("collective", "unsharded", "sharded")
    assert [(row["environment"].split()[0], row["shape"][0], row["provider"]) for row in rows] == [
        (f"ranks={ranks}", count, name) for ranks in (1, 2) for count in (1, 3) for name in calls
    ]
    for row in rows:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["bytes"] == (0 if row["provider"] == "unsharded" else 8 * (4 * row["shape"][0] + 1))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:4] for line in printed[2:6]] == [
        [f" {count} ", f" {8 * (4 * count + 1)} ", f" {ranks} "] for count in (1, 3) for ranks in (1, 2)
    ]


def test_table_replaces_what_is_between_the_markers(bench, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.BEGIN}old\n{bench.END}after\n")
    monkeypatch.setattr(bench, "PAGE", page)
    bench.write_table("new\n")
    assert page.read_text() == f"before\n{bench.BEGIN}new\n{bench.END}after\n"


def test_page_has_the_whole_table(bench):
    _, _, rest = bench.PAGE.read_text().partition(bench.BEGIN)
    text, marker, _ = rest.partition(bench.END)
    assert marker
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [line[:3] for line in cells[2:]] == [
        [str(rows), str(bench.bytes_reduced(rows)), str(ranks)] for rows in bench.ROWS for ranks in bench.RANKS
    ]
    assert all(int(cell) > 0 for line in cells[2:] for cell in line[3:])


@pytest.mark.parametrize("rows", [1, 16])
def test_right_answer_is_accepted(bench, group, rows):
    bench.check(bench.make_inputs(rows, 1), 0, group)


def test_wrong_answer_is_refused(bench, group, monkeypatch):
    """Of the whole of two ranks this world of one has half: sums and count of the other are missing."""
    with pytest.raises(bench.WrongAnswer, match="of rank 0: off by"):
        bench.check(bench.make_inputs(16, 2), 0, group)
    nan = torch.full((16,), torch.nan)
    monkeypatch.setattr(flowdppo_ops.PolicyLoss, "kl", nan)
    with pytest.raises(bench.WrongAnswer, match="kl of rank 0: off by nan"):
        bench.check(bench.make_inputs(16, 1), 0, group)


def test_quick_times_are_not_written_into_the_page(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--write"])
    assert "--quick" in capsys.readouterr().err
