"""`benches/on_gpu.py` with stand-ins for the programs it starts: which command lines, and what becomes of a failure."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "nvidia-smi", "compute-sanitizer", "ncu")
# Notes how it was called, and fails where it is told to. "hang": a child that holds the other end of the pipe as well.
STANDIN = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
arguments = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([arguments, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]), file=calls)
print("called")
line = " ".join(arguments)
if os.environ.get("HANG", "nowhere") in line:
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], stdout=open(os.environ["PIPE"], "w"))
    signal.pause()
sys.exit(7 if os.environ.get("FAIL", "nowhere") in line else 0)
"""
# From the manuals; one that is not there would end the stage on the one machine where it can run.
OPTIONS = {
    "compute-sanitizer": {"--tool", "--error-exitcode", "--report-api-errors", "--kernel-name"},
    "ncu": {"--clock-control", "--profile-from-start", "--csv", "--page", "--kernel-name", "--log-file", "--section"},
}


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benches")
    return importlib.import_module("on_gpu")


@pytest.fixture
def programs(on_gpu, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(STANDIN)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(on_gpu, "PYTHON", str(folder / "python"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


@pytest.fixture
def run(on_gpu, tmp_path, programs, capsys):
    """Runs the script; its exit status, the lines of its summary, and the calls of the stand-ins."""

    def call(*arguments: str) -> tuple[int, list[str], list[list[str]]]:
        status = on_gpu.main([str(tmp_path / "out"), *arguments])
        summary = (tmp_path / "out" / "summary.txt").read_text()
        assert capsys.readouterr().out.endswith(f"\n\n{summary}")
        calls = [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]
        return status, summary.splitlines(), calls

    return call


def commands(summary: list[str]) -> dict[tuple[str, str], str]:
    pattern = r"(\S+) +(\S+(?: \S+)*) +\d+\.\d min  (.*)"
    return {(stage, command): result for stage, command, result in (re.fullmatch(pattern, s).groups() for s in summary)}


def test_every_stage_runs(run, on_gpu, tmp_path):
    status, summary, calls = run("--commit", "abc")
    every = on_gpu.all_stages(tmp_path, None)
    assert commands(summary) == {(stage.name, command.name): "ok" for stage in every for command in stage.commands}
    assert status == 0
    assert len(calls) == len(summary)
    for stage in every:
        log = (tmp_path / "out" / f"{stage.name}.txt").read_text()
        assert log.count("\ncalled\n") == len(stage.commands)


def test_command_lines(run, tmp_path):
    """Of each script the options are its own, with values that it takes; those of the tools are in their manuals."""
    _, _, calls = run("--commit", "abc")
    scripts = {}
    for program, *arguments in calls:
        if program in OPTIONS:
            at = next(n for n, argument in enumerate(arguments) if argument.endswith("python"))
            assert {word for word in arguments[:at] if word.startswith("--")} <= OPTIONS[program]
            arguments = arguments[at + 1 :]
        if arguments[0].endswith(".py") and len(arguments) > len(scripts.get(arguments[0], [])):
            scripts[arguments[0]] = arguments
    assert {Path(name).name for name in scripts} == {
        "every_kernel.py",
        "bench_policy_loss.py",
        "bench_sde_step.py",
        "launch_once.py",
        "bench_training_step.py",
    }
    missing = []
    for file, arguments in scripts.items():
        if not Path(file).exists():
            missing.append(Path(file).name)
            continue
        done = subprocess.run([sys.executable, *arguments, "--help"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for option in arguments:
            assert not option.startswith("--") or f"{option} " in done.stdout, f"{option} is none of {file}'s"
    if missing:
        pytest.skip(f"not there to be asked: {', '.join(missing)}")


def test_every_operation_has_every_size_once(on_gpu, tmp_path):
    for module, names in on_gpu.TIMED.items():
        for name in names:
            stages = on_gpu.chosen(on_gpu.all_stages(tmp_path, None), [f"bench-{name}"])
            lines = [command.argv for stage in stages for command in stage.commands]
            sizes = [word for argv in lines for word in argv if word in on_gpu.SIZES]
            assert sizes == list(on_gpu.Cuda.sizes)
            assert all(argv[1].endswith(f"{module.__name__}.py") for argv in lines)
            # Cold starts are measured once.
            assert [("--cold-starts" in argv) for argv in lines] == [number > 0 for number in range(len(lines))]


def test_the_sanitizer_knows_what_pytorch_wrote(run, tmp_path):
    """initcheck looks at all kernels, the others at ours; PyTorch's allocator would hide what is beyond a tensor."""
    run("sanitize")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0][0][-1] == "--count"
    tools = {arguments[arguments.index("--tool") + 1]: arguments for arguments, _ in calls[1:]}
    assert set(tools) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    for tool, arguments in tools.items():
        assert ("kns=policy_loss,kns=sde_step" in arguments) == (tool != "initcheck")
        assert "--count" not in arguments
    assert [no_caching for _, no_caching in calls] == [None, "1", "1", "1", "1"]


def test_a_failure_stops_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FAIL", "--tool racecheck")
    status, summary, _ = run("sanitize", "profile")
    results = commands(summary)
    assert results.pop(("sanitize", "racecheck")) == "exit status 7"
    assert set(results.values()) == {"ok"}
    assert list(results)[-1] == ("profile", "ncu")
    assert status == 1


def test_a_program_that_is_not_there(run, programs):
    (programs / "ncu").unlink()
    status, summary, _ = run("profile", "machine")
    assert list(commands(summary).values()) == ["ok", "ok", "not started: No such file or directory: ncu"]
    assert status == 1


def test_time_runs_out(run, monkeypatch, tmp_path):
    """Whatever a stage has started ends with it: the pipe is closed by all who could write to it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("PIPE", str(pipe))
    monkeypatch.setenv("HANG", "every_kernel.py --count")
    status, summary, calls = run("machine", "sanitize", "--minutes", "0.1")
    assert list(commands(summary).values()) == ["ok", "ok", "out of time", *["not begun: out of time"] * 4]
    assert status == 1
    assert len(calls) == 3
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""


def test_stages_fit_in_ten_minutes(on_gpu, tmp_path, capsys):
    every = on_gpu.all_stages(tmp_path, None)
    assert all(0 < stage.minutes < 10 for stage in every)
    assert on_gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*(stage.name for stage in every), "together"]
    assert float(listed[-1].split()[1]) == pytest.approx(sum(stage.minutes for stage in every), abs=0.1)


def test_expected_seconds_follow_the_effort(on_gpu, monkeypatch):
    """A latent of a few bytes: graph, call and host, each provider and pass and the copy, in blocks of 5 + 2 ms."""
    operation = on_gpu.bench_policy_loss.OPERATIONS["policy_loss"]
    tried = [name for name in operation.providers if name != "compile_max"]  # for that it is the wrong size
    compiling = sum(on_gpu.COMPILING_S.get(name, 0.0) for name in tried)
    series = 2 * len(tried) + 1
    seconds = on_gpu.case_seconds(operation, "small", "fp32") - on_gpu.CASE_S - compiling
    assert seconds == pytest.approx(3 * series * 10 * 0.007, rel=0.1)
    assert on_gpu.case_seconds(operation, "video64", "fp32") > on_gpu.case_seconds(operation, "video64", "bf16")


def test_stages_are_chosen_by_name(on_gpu, tmp_path, capsys):
    every = on_gpu.all_stages(tmp_path, None)
    names = [stage.name for stage in every]
    assert [stage.name for stage in on_gpu.chosen(every, [])] == names
    assert [stage.name for stage in on_gpu.chosen(every, ["step", "suite"])] == ["suite", "step"]
    assert [stage.name for stage in on_gpu.chosen(every, ["bench"])] == [n for n in names if n.startswith("bench-")]
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main([str(tmp_path / "out"), "ben"])
    assert stopped.value.code == 2
    assert "no stage 'ben'; there are machine, suite, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_launch_once_marks_one_call_of_each(on_gpu, capsys, monkeypatch):
    launch_once = importlib.import_module("launch_once")
    marks = []
    monkeypatch.setattr(launch_once, "mark", lambda device, which: marks.append(which))
    assert launch_once.main(["--device", "cpu", "--size", "4x8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{' '.join(one)} [4, 8]" for one in launch_once.LAUNCHED]
    assert marks == ["start", "stop"] * len(printed)
