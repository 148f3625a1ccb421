"""`benches/on_gpu.py` with stand-ins for the programs it starts: which command lines, and what becomes of a failure."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Notes how it was called, and fails or hangs where the environment says so.
STANDIN = f"""#!{sys.executable}
import json, os, signal, sys
line = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([line, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]), file=calls)
if os.environ.get("HANG", "nowhere") in line:
    signal.pause()
sys.exit(7 if os.environ.get("FAIL", "nowhere") in line else 0)
"""


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    module, folder = importlib.import_module("on_gpu"), tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (folder / name).write_text(STANDIN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(module, "PYTHON", str(folder / "python"))
    return module


@pytest.fixture
def run(on_gpu, tmp_path):
    """Runs the script; exit status, each stage's result in the summary, and what the stand-ins noted."""

    def call(*arguments):
        status = on_gpu.main([str(tmp_path / "out"), *arguments])
        summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
        results = dict(re.fullmatch(r"(\S+) +\d+\.\d min  (.*)", line).groups() for line in summary)
        return status, results, [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return call


def test_every_stage_runs(run, on_gpu, tmp_path):
    status, results, calls = run("--commit", "abc")
    assert results == {stage.name: "ok" for stage in on_gpu.all_stages(tmp_path, None)}
    assert (status, len(calls)) == (0, len(results))
    sanitized = [(line, no_caching) for line, no_caching in calls if line.startswith("compute-sanitizer")]
    assert len(sanitized) == 4
    for line, no_caching in sanitized:
        assert ("kns=policy_loss,kns=sde_step" in line) == ("initcheck" not in line)
        assert no_caching == "1"


def test_the_benches_take_their_command_lines(on_gpu, tmp_path, monkeypatch):
    """Each operation is timed once, on the GPU, and its rows are kept."""
    stages = [stage for stage in on_gpu.all_stages(tmp_path, "abc") if stage.name.startswith("bench-")]
    harness, timed = importlib.import_module("harness"), []
    monkeypatch.setattr(harness, "bench", lambda name, *_: timed.append(name) or ([], []))
    monkeypatch.setattr(harness, "facts", lambda device, commit: {"device": device.type, "commit": commit})
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: True)
    for stage in stages:
        module = importlib.import_module(Path(stage.argv[1]).stem)
        harness.main("summary", module.OPERATIONS, stage.argv[2:])
        assert (tmp_path / f"{stage.name}.json").exists()
        assert f"bench-{timed[-1]}" == stage.name
    assert set(timed) == {"policy_loss", "step_loss", "sde_step_sample", "sde_step_replay"}


def test_a_failure_stops_nothing(run, monkeypatch):
    monkeypatch.setenv("FAIL", "--tool racecheck")
    status, results, _ = run("sanitize", "bench-step_loss")
    assert results.pop("sanitize-racecheck") == "exit status 7"
    assert set(results.values()) == {"ok"}
    assert list(results)[-1] == "bench-step_loss"
    assert status == 1


def test_a_program_that_is_not_there(run, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").unlink()
    status, results, _ = run("machine")
    assert list(results.values()) == ["not started: No such file or directory: nvidia-smi", "ok", "ok"]
    assert status == 1


def test_time_runs_out(run, monkeypatch):
    monkeypatch.setenv("HANG", "every_kernel.py --count")
    status, results, _ = run("machine-doctor", "sanitize", "--minutes", "0.05")
    assert list(results.values()) == ["ok", "out of time", *["not begun: out of time"] * 4]
    assert status == 1


def test_an_unknown_stage_is_named(on_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main([str(tmp_path / "out"), "ben"])
    assert "no stage 'ben'; there are machine-driver, " in capsys.readouterr().err


def test_every_kernel_takes_the_option_it_is_given(on_gpu):
    script = [sys.executable, str(ROOT / "tests" / "every_kernel.py"), "--help"]
    assert "--count" in subprocess.run(script, capture_output=True, text=True, timeout=120).stdout
