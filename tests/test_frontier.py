"""`demo --frontier`: the grid, going on where a run ended, statistics, tables and figures."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("sklearn", reason="the demo needs scikit-learn")

from flowdppo_ops.__main__ import main
from flowdppo_ops.demo import frontier, frontier_report
from flowdppo_ops.demo.rollout import uniform_schedule

CLAIMS = Path(__file__).parents[1] / "docs" / "claims"


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_case_once():
    cases = frontier.Grid().cases()
    assert len(set(cases)) == len(cases)
    assert {case.seed for case in cases} == set(range(5))
    plain = [case for case in cases if case.kind == "frontier" and case.sampler == "flow_sde" and case.seed == 0]
    products = {(case.iterations, case.epochs) for case in plain}
    assert {epochs for iterations, epochs in products if iterations == 8} == {1, 4, 16, 64}
    assert {epochs for iterations, epochs in products if iterations * epochs == 128} == {1, 4, 16, 64}
    for product in products:
        some = [case for case in plain if (case.iterations, case.epochs) == product]
        for name in ("Flow-DPPO", "Flow-GRPO", "GRPO-Guard", "symmetric mask"):
            widths = [case.width for case in some if case.objective == name]
            assert max(widths) / min(widths) >= 100
        assert sum(case.objective == "no trust region" for case in some) == 1


def test_limits_have_the_width():
    from flowdppo_ops.demo.compare import objectives

    for sampler in ("flow_sde", "cps"):
        schedule = uniform_schedule(10, 0.7, "cpu", sampler)
        wide, tight = objectives(schedule, 1), objectives(schedule, 1 / 16)
        assert wide["Flow-DPPO"].kl_mask_threshold == pytest.approx(16 * tight["Flow-DPPO"].kl_mask_threshold)
        for name in ("Flow-GRPO", "GRPO-Guard"):
            assert wide[name].clip_range == pytest.approx(4 * tight[name].clip_range)


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, capfd):
    grid = frontier.Grid(1, (1 / 16, 1), 1, (2,), 2, ("flow_sde", "cps"), (1 / 4,), 2)
    monkeypatch.setattr(frontier, "QUICK", grid)
    command = ["demo", "--frontier", "--quick", "--pretrain-steps", "30", "--workers", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert {frontier.Case(**json.loads(line)["case"]) for line in lines} == set(grid.cases())
    assert f"{len(lines)} of {len(lines)} fine-tunings to do" in capfd.readouterr().out
    for name in ("tables.md", "frontier.png", "reuse.png"):
        assert (tmp_path / name).stat().st_size > 1000

    # As a run leaves it that was ended while it wrote a line.
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    assert main([*command, "--workers", "1"]) == 0
    assert f"2 of {len(lines)} fine-tunings to do" in capfd.readouterr().out
    again = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert again[:-2] == lines[:-2]
    assert sorted(again) == sorted(lines)  # the same seeds give the same numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "argument --quick: only with --frontier"),
        (["--workers", "2"], "argument --workers: only with --frontier"),
        (["--frontier", "--seeds", "2"], "argument --seeds: not with --frontier"),
        (["--frontier", "--loss", "reference"], "argument --loss: not with --frontier"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", str(tmp_path), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# ---- statistics ------------------------------------------------------------------------------------------------------


def rows_of(**frontiers):
    """`objective=(kl to reward, seeds' offsets)`, at KL 10, 20, 40, 80."""
    return [
        {
            "case": {"objective": name, "seed": seed, "width": width},
            "scores": {"kl": kl, "reward": None if kl is None else reward(kl) + offset},
        }
        for name, (reward, offsets, kls) in frontiers.items()
        for seed, offset in enumerate(offsets)
        for width, kl in enumerate(kls)
    ]


KL = (10.0, 20.0, 40.0, 80.0)
OFFSETS = (0.0, 0.002, -0.001, 0.001, -0.002)


def test_reward_at_equal_kl():
    """0.03 ahead at every KL, at other KLs on the way: the reward is linear in the KL, so interpolation is exact."""
    kls = {"a": KL, "b": (15.0, 25.0, 100.0)}
    rows = rows_of(a=(lambda kl: 0.001 * kl + 0.03, OFFSETS, kls["a"]), b=(lambda kl: 0.001 * kl, 5 * (0.0,), kls["b"]))
    found = frontier_report.matched(rows, "a", "b", "kl", "reward")
    assert found["range"] == (15, 80)
    for part in frontier_report.PARTS:
        centre, low, high = found[part]
        assert centre == pytest.approx(0.03, abs=1e-12)
        assert 0.027 <= low < 0.03 < high <= 0.033
        assert frontier_report.verdict(found[part]) == "ahead"
        assert frontier_report.verdict(found[part], higher_is_better=False) == "behind"


def test_the_halves_are_told_apart():
    """Ahead at low KL, behind at high."""
    rows = rows_of(a=(lambda kl: 0.1 * (kl < 30), OFFSETS, KL), b=(lambda kl: 0.05, 5 * (0.0,), KL))
    found = frontier_report.matched(rows, "a", "b", "kl", "reward")
    assert [frontier_report.verdict(found[part]) for part in ("lower", "upper")] == ["ahead", "behind"]


def test_level_where_the_seeds_disagree():
    rows = rows_of(a=(lambda kl: 0.001 * kl, [10 * x for x in OFFSETS], KL), b=(lambda kl: 0.001 * kl, 5 * (0.0,), KL))
    found = frontier_report.matched(rows, "a", "b", "kl", "reward")
    assert frontier_report.verdict(found["all"]) == "level"


@pytest.mark.parametrize("kls", [(90.0, 100.0), (None, None), (20.0, None)])
def test_no_common_range(kls):
    """Apart, diverged, or a single point left."""
    rows = rows_of(a=(lambda kl: 0.0, OFFSETS, KL), b=(lambda kl: 0.0, OFFSETS, kls))
    assert frontier_report.matched(rows, "a", "b", "kl", "reward") is None


def test_the_interval_covers_the_mean_nine_times_of_ten():
    """Five seeds: a bootstrap interval of 95 % covers less than it says, which the page says too."""
    draws = np.random.default_rng(1).normal(size=(200, 5))
    covered = np.mean([low < 0 < high for _, low, high in map(frontier_report.interval, draws)])
    assert 0.75 <= covered <= 0.95


# ---- what is committed -----------------------------------------------------------------------------------------------


def test_committed_tables_follow_from_the_committed_rows():
    rows = frontier.read(CLAIMS / "rows.jsonl")
    assert {frontier.Case(**row["case"]) for row in rows} == set(frontier.Grid().cases())
    assert frontier_report.tables(rows) == (CLAIMS / "tables.md").read_text(encoding="utf-8")


def test_the_page_quotes_the_tables():
    """Its table has the cells of `tables.md`, and so have the figures of its text."""
    page = CLAIMS.with_suffix(".md").read_text(encoding="utf-8")
    rows = frontier.read(CLAIMS / "rows.jsonl")
    quoted = 0
    for line in page.splitlines():
        if not (cells := [cell.strip() for cell in line.split("|")[1:-1]]) or " x " not in cells[0] or len(cells) != 4:
            continue
        numbers, _, sampler = cells[0].partition(", ")
        if numbers == "rollouts x epochs":
            continue
        iterations, epochs = map(int, numbers.split(" x "))
        case = {
            "kind": "frontier",
            "sampler": sampler.lower() or "flow_sde",
            "iterations": iterations,
            "epochs": epochs,
        }
        for cell, other in zip(cells[1:3], ("Flow-GRPO", "GRPO-Guard"), strict=True):
            table = frontier_report.tables(frontier_report.select(rows, **case)).split("##")[1]
            wanted = [row for row in table.splitlines() if f"Flow-DPPO - {other} " in row]
            assert (cell in wanted[0]) if wanted else cell == "-", (case, cell)
            quoted += bool(wanted)
    assert quoted == 15


def test_figures_of_a_reused_rollout():
    rows, page = frontier.read(CLAIMS / "rows.jsonl"), CLAIMS.with_suffix(".md").read_text(encoding="utf-8")
    text = page.split("## One rollout, reused")[1].split("##")[0]
    for objective, width, all_updates in (
        *(("Flow-DPPO", width, (64 if width == 1 else 32, 512)) for width in (1, 1 / 4, 1 / 16)),
        ("Flow-GRPO", 1, (512,)),
        ("no trust region", 1, (64, 512)),
    ):
        some = frontier_report.select(rows, kind="reuse", objective=objective, width=width)
        updates, reward = frontier_report.reuse_curves(some, "reward")
        for at in all_updates:
            assert f"{reward[:, list(updates).index(at)].mean():.3f}" in text, (objective, width, at)
