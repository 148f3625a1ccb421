"""The benches: their rows, and that a wrong answer is never timed."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import platform
import re
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import needs_cxx

import flowdppo_ops

BENCHES = Path(__file__).parents[1] / "benches"
FIELDS = ["op", "shape", "dtype", "provider", "pass", "p20_us", "p50_us", "p80_us", "repeats", "bytes"]
FIELDS += ["threads", "device", "torch", "flowdppo_ops", "commit", "environment", "date", "cores_elsewhere"]
COUNTS = ["launches", "sync_warnings", "stream_syncs", "dtoh_copies", "peak_bytes"]
FIELDS += ["timing", "cache", *COUNTS]


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("harness")


@pytest.fixture
def bench(harness):
    return importlib.import_module("bench_policy_loss")


@needs_cxx
def test_quick_run_writes_a_row_per_provider_and_pass(bench, tmp_path, capsys):
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    bench.main(["--quick", "--sizes", "4x8", "--threads", str(threads), "--json", str(file)])
    rows = json.loads(file.read_text())

    both = ("forward", "forward+backward")
    series = [(name, pass_) for name in ("eager", "compile", "fused") for pass_ in both] + [("copy", "copy")]
    assert [(row["dtype"], row["provider"], row["pass"]) for row in rows] == [
        (dtype, *one) for dtype in ("fp32", "bf16") for one in series
    ]
    for row in rows:
        assert list(row) == FIELDS
        assert (row["op"], row["shape"], row["threads"]) == ("policy_loss", [4, 8], threads)
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["repeats"] >= 9
        tensors = {"copy": 2, "forward": 3, "forward+backward": 6}[row["pass"]]
        assert row["bytes"] == tensors * 32 * {"fp32": 4, "bf16": 2}[row["dtype"]]
        assert row["torch"] == torch.__version__.split("+")[0]
        assert row["flowdppo_ops"] == flowdppo_ops.__version__
        assert row["cores_elsewhere"] is None or row["cores_elsewhere"] >= 0
        assert (row["timing"], row["cache"]) == ("call", "warm")
        assert all(row[name] is None for name in COUNTS)  # nothing is launched on a CPU
        assert row["device"]
        assert row["environment"].startswith("malloc=")
        assert row["commit"]
        assert datetime.fromisoformat(row["date"].replace("Z", "+00:00")).tzinfo is not None

    published = file.read_text()
    assert platform.node() not in published
    assert str(BENCHES.parent) not in published
    table = capsys.readouterr().out
    assert table.count("x as fast") == 2 * 4  # per dtype: two peers, two passes
    assert table.count("two copies of one tensor") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8), (16, 256), (16, 4, 8, 8), (2, 4, 3, 8, 8)])
def test_inputs_land_on_both_sides_of_every_comparison(bench, shape, dtype):
    """The mask is part of what is checked only if it decides something, and not by rounding."""
    i = bench.make_inputs(shape, dtype)
    out = flowdppo_ops.reference.loss(
        i.mean,
        i.old_mean,
        i.advantages,
        std=i.std,
        prev_sample=i.prev_sample,
        old_log_prob=i.old_log_prob,
        objective=bench.OBJECTIVE,
    )
    distance = out.kl / bench.KL_THRESHOLD
    assert bool(((distance > 5) | (distance < 0.2)).all())
    assert bool((distance > 5).any())
    assert bool((distance < 0.2).any())
    if math.prod(shape[1:]) >= 192:  # with fewer elements the noise decides which side of 1 a ratio is on
        assert bool((out.ratio > 1).any())
        assert bool((out.ratio < 1).any())
        row = torch.arange(shape[0])
        assert torch.equal(out.keep, (row != 2) & (row != 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_accepts_the_eager_loss(bench, dtype):
    i = bench.make_inputs((16, 256), dtype)
    bench.check(bench.Provider("eager", bench.trainer_loss), i, bench.truth(i))


def _no_mask(bench, monkeypatch, i):
    monkeypatch.setattr(bench, "KL_THRESHOLD", math.inf)
    return bench.trainer_loss(i)


def _double_gradient(bench, monkeypatch, i):
    loss = bench.trainer_loss(i)
    return 2 * loss - loss.detach()


WRONG = {
    "twice the tolerance": (lambda bench, _, i: bench.trainer_loss(i) * (1 + 2 * bench.TOLERANCE), "loss"),
    "NaN": (lambda bench, _, i: bench.trainer_loss(i) * math.nan, "loss"),
    "no mask": (_no_mask, "loss"),
    "other std": (lambda bench, _, i: bench.trainer_loss(i._replace(std=i.std * 1.01)), "loss"),
    "double gradient": (_double_gradient, "gradient"),
    "NaN gradient": (lambda bench, _, i: bench.trainer_loss(i) + 0 * (i.mean.float() * 0).sqrt().sum(), "gradient"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_check_refuses(bench, monkeypatch, wrong, dtype):
    loss, what = WRONG[wrong]
    i = bench.make_inputs((16, 256), dtype)
    expected = bench.truth(i)
    provider = bench.Provider("wrong", lambda i: loss(bench, monkeypatch, i))
    with pytest.raises(bench.WrongAnswer, match=rf"wrong: {what} is .* away from float64, wanted at most"):
        bench.check(provider, i, expected)


@needs_cxx
def test_wrong_answer_aborts_the_run_before_it_is_timed(bench, monkeypatch, tmp_path):
    file = tmp_path / "rows.json"
    half = bench.Provider("fused", lambda i: bench.trainer_loss(i) / 2)
    monkeypatch.setattr(bench, "providers", lambda _: [half])
    monkeypatch.setattr(bench.Cpu, "measure", lambda *_: pytest.fail("timed a wrong answer"))
    with pytest.raises(SystemExit, match=r"wrong answer, not timed: fused: loss is 5\.0e-01 away"):
        bench.main(["--quick", "--sizes", "4x8", "--threads", str(torch.get_num_threads()), "--json", str(file)])
    assert not file.exists()


def test_measure_times_in_blocks_and_moves_the_first_of_the_turn(harness):
    calls = []

    def clock(call, repeats):
        calls.append((call(), repeats))
        return [10.0] * repeats

    effort = harness.Effort(rounds=2, block_us=50.0, settle_us=20.0)
    samples, _ = harness.measure({"a": lambda: "a", "b": lambda: "b"}, effort, clock)
    first = [("a", 3), ("b", 3)]  # warm-up, and how long one call takes
    assert calls == [*first, ("a", 2), ("a", 5), ("b", 2), ("b", 5), ("b", 2), ("b", 5), ("a", 2), ("a", 5)]
    assert samples == {"a": [10.0] * 10, "b": [10.0] * 10}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says what other processes use")
def test_processor_time_of_another_process_is_seen(harness):
    effort = harness.Effort(rounds=1, block_us=0.0, settle_us=0.0)
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    _, cores = harness.measure({"another": lambda: subprocess.run(busy, check=True)}, effort)
    assert cores > 0.1  # it runs seven times, four of them while `measure` counts


def test_percentiles(harness):
    assert harness.percentiles([float(n) for n in range(101)]) == {"p20_us": 20.0, "p50_us": 50.0, "p80_us": 80.0}


def test_percentiles_of_a_single_sample(harness):
    assert harness.percentiles([3.0]) == {"p20_us": 3.0, "p50_us": 3.0, "p80_us": 3.0}


# ---- CUDA, as far as it goes without: the flow on a device made of the CPU ------------------------------------------


def fake_cuda(devices, harness, skipping: str = ""):
    """`Cuda` with the calls into torch.cuda replaced; `skipping`: the name of a pass whose replays do nothing."""

    class FakeCuda(devices.Cuda):
        device = torch.device("cpu")
        providers = ("eager", "fused")
        captures = 0

        def __init__(self):
            self._l2_bytes = 8 * 64 * 4  # twice [8, 64] in fp32

        def facts(self):
            return harness.environment("driver=1.0") | {"device": "Fake GPU"}

        def session(self):
            return contextlib.nullcontext()

        def synchronize(self):
            pass

        def event_clock(self, call, repeats):
            return harness.wall_clock(call, repeats)

        def costs(self, call, reset):
            call()
            reset()
            return devices.Costs(launches=3, sync_warnings=0, stream_syncs=1, dtoh_copies=1, peak_bytes=4096)

        def capture(self, calls, times):
            FakeCuda.captures += 1
            outputs = [tuple(t.detach().clone() for t in call()) for call in calls]

            def replay():
                for _ in range(times):
                    for call, static in zip(calls, outputs, strict=True):
                        if not (skipping and len(static) == 2):
                            for kept, new in zip(static, call(), strict=True):
                                kept.copy_(new.detach())

            return devices.Captured(replay, outputs, times * len(calls))

    return FakeCuda


@pytest.fixture
def on_fake_cuda(bench, harness, monkeypatch):
    def install(**options):
        fake = fake_cuda(importlib.import_module("devices"), harness, **options)
        monkeypatch.setitem(bench.MACHINES, "cuda", fake)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return fake

    return install


ARGUMENTS = ["--device", "cuda", "--quick", "--cold-starts", "0", "--providers", "eager", "fused", "--commit", "abc"]


@needs_cxx
def test_every_mode_of_cuda_has_its_rows(bench, on_fake_cuda, tmp_path, capsys):
    file, threads = tmp_path / "rows.json", str(torch.get_num_threads())
    fake = on_fake_cuda()
    bench.main([*ARGUMENTS, "--threads", threads, "--sizes", "8x64", "--dtypes", "fp32", "--json", str(file)])
    rows = json.loads(file.read_text())
    modes = [("graph", "cold"), ("graph", "warm"), ("call", "cold"), ("call", "warm"), ("host", "warm")]
    series = [("eager", "forward"), ("eager", "forward+backward"), ("fused", "forward"), ("fused", "forward+backward")]
    assert [(row["timing"], row["cache"], row["provider"], row["pass"]) for row in rows] == [
        (*mode, *one) for mode in modes for one in [*series, ("copy", "copy")]
    ]
    assert fake.captures == 2 * 5
    for row in rows:
        assert list(row) == FIELDS
        assert (row["device"], row["commit"], row["environment"].split()[0]) == ("Fake GPU", "abc", "driver=1.0")
        counted = [3, 0, 1, 1, 4096] if row["provider"] != "copy" else [None] * 5
        assert [row[name] for name in COUNTS] == counted
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    table = capsys.readouterr().out
    for timing, cache in modes:
        assert f"[8, 64] fp32  {timing}, {cache}\n" in table


@needs_cxx
def test_replay_that_writes_nothing_is_a_wrong_answer(bench, on_fake_cuda):
    on_fake_cuda(skipping="forward+backward")
    with pytest.raises(SystemExit, match=r"eager forward\+backward in a graph: loss is nan away"):
        bench.main([*ARGUMENTS, "--threads", str(torch.get_num_threads()), "--sizes", "8x64"])


@pytest.fixture
def devices(harness):
    return importlib.import_module("devices")


@pytest.mark.parametrize(
    ("tensor_bytes", "sets"),
    [
        (4 * 16 * 65536, 23),  # 188.7 MB in steps of 8.4 MB
        (4 * 16 * 16 * 21 * 90 * 160, 1),  # beyond the L2 by itself
        (4 * 32, None),  # half a million sets: no cold form
    ],
)
def test_cold_is_what_the_l2_cannot_hold(devices, harness, tensor_bytes, sets):
    machine = fake_cuda(devices, harness)()
    machine._l2_bytes = 60 << 20
    modes = machine.modes(tensor_bytes)
    cold = [mode for mode in modes if mode.cache == "cold"]
    assert {mode.sets for mode in cold} == ({sets} if sets else set())
    if sets:
        assert sets * 2 * tensor_bytes >= 3 * machine._l2_bytes
        assert [mode.timing for mode in cold[:2]] == ["graph", "call"]
    assert any(mode.cache == "warm" for mode in modes) == (sets != 1)
    assert [mode.timing for mode in modes].count("host") == (sets != 1)


def test_a_graph_is_long_enough_and_holds_whole_turns(devices):
    assert devices.graph_repeats(devices.Mode("graph", "warm", 1), 4 * 32) == 64
    assert devices.graph_repeats(devices.Mode("graph", "cold", 23), 4 * 16 * 65536) == 2  # 46 of 47 calls
    assert devices.graph_repeats(devices.Mode("graph", "cold", 1), 1 << 30) == 1


def test_captured_samples_are_per_call(devices, harness):
    machine = fake_cuda(devices, harness)()
    machine.event_clock = lambda call, repeats: [call()] * repeats
    captured = {"a": devices.Captured(lambda: 60.0, [], 6), "b": devices.Captured(lambda: 60.0, [], 60)}
    samples, _ = machine.measure_captured(captured, harness.Effort(rounds=1, block_us=60.0, settle_us=0.0))
    assert samples == {"a": [10.0] * 3, "b": [1.0] * 3}


def test_host_clock_waits_outside_the_sample(devices, harness):
    machine, happened = fake_cuda(devices, harness)(), []
    machine.synchronize = lambda: happened.append("wait")
    samples = machine.host_clock(lambda: happened.append("call"), 2)
    assert happened == ["wait", "call", "wait", "call", "wait"]
    assert len(samples) == 2


def test_input_sets_take_turns(devices):
    turns = []
    call = devices._in_turn([lambda: turns.append(0), lambda: turns.append(1)])
    for _ in range(4):
        call()
    assert turns == [0, 1, 0, 1]


def test_copies_share_no_memory(bench):
    i = bench.make_inputs((4, 8), torch.bfloat16)
    first, second, third = bench.copies(i, 3)
    assert first is i
    for name in i._fields:
        one, two, three = (getattr(each, name) for each in (first, second, third))
        assert torch.equal(one, two)
        assert len({one.data_ptr(), two.data_ptr(), three.data_ptr()}) == 3
        assert two.requires_grad == three.requires_grad == (name == "mean")
        assert two.is_leaf


def test_launches_and_waits_are_counted_from_a_profile(devices):
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [("aten::mean", cpu), ("cudaLaunchKernel", cpu), ("reduce_kernel", cuda), ("Memcpy DtoH (Device)", cuda)]
    events += [("cudaStreamSynchronize", cpu), ("cudaDeviceSynchronize", cpu), ("Memset (Device)", cuda)]
    assert devices.count_events(events) == {"launches": 3, "stream_syncs": 1, "dtoh_copies": 1}
    unseen = {"launches": None, "stream_syncs": None, "dtoh_copies": None}
    assert devices.count_events(event for event in events if event[1] == cpu) == unseen


class FakeEvent:
    """Knows the time when it was recorded, in calls."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.calls

    def elapsed_time(self, end):
        return 0.25 * (end.at - self.at)


def test_events_stand_between_calls_and_the_first_call_is_not_timed(devices, monkeypatch):
    machine = devices.Cuda.__new__(devices.Cuda)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(devices.Cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(FakeEvent, "calls", 0)

    def call():
        FakeEvent.calls += 1

    assert machine.event_clock(call, 4) == [250.0] * 4
    assert FakeEvent.calls == 5


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_costs_are_those_of_one_call_beyond_what_was_there(devices, monkeypatch):
    machine = devices.Cuda.__new__(devices.Cuda)
    machine.device = torch.device("cpu")
    memory, modes = SimpleNamespace(now=1000, peak=0), []

    def reset():
        memory.now = 1000

    def call():  # drops the gradient it had made before, as the benches do; makes 300 bytes, keeps 50 of them
        reset()
        memory.peak = max(memory.peak, memory.now + 300)
        memory.now += 50
        torch.ones(3) + 1
        if modes[-1:] == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(devices.Cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: memory.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(memory, "peak", memory.now))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    costs = machine.costs(call, reset)
    assert (costs.peak_bytes, costs.sync_warnings, costs.launches) == (300, 2, None)
    assert modes == ["warn", "default"]


def test_cold_start_is_a_process_with_empty_caches(bench, harness, monkeypatch):
    module = importlib.import_module("cold_start")
    run, seen = subprocess.run, []
    machine = bench.Cpu()
    facts = machine.facts()  # asks git, before there is somebody listening

    def watched(command, env, **options):
        seen.append([env[name] for name in module.CACHE_FOLDERS])
        assert not any(Path(folder).exists() for folder in seen[-1])
        return run(command, env=env, **options)

    monkeypatch.setattr(module.subprocess, "run", watched)
    total, call = bench.cold_starts((4, 8), "bf16", 1, facts, machine, ("fused",))
    assert len(seen) == 1
    assert (total.timing, call.timing) == ("cold start", "first call")
    assert 0 < call.p50_us < total.p50_us
    assert (total.provider, total.pass_, total.repeats) == ("fused", "forward+backward", 1)


def test_cold_start_that_fails_says_why(harness):
    module = importlib.import_module("cold_start")
    with pytest.raises(RuntimeError, match=r"cold start of nobody ended with status 1:\n(.|\n)*KeyError: 'nobody'"):
        module.cold_start("nobody", (4, 8), "fp32", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: torch .* finds no usable CUDA device"),
        (["--providers", "triton"], "triton (runs on --device cuda alone|is not installed.*)"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"bench_policy_loss: {message}\n", err)


@pytest.mark.parametrize("size", ["huge", "8", "0x8", "4x-1"])
def test_unknown_size_is_named(bench, size, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sizes", size])
    assert f"'{size}': wanted one of {', '.join(bench.SIZES)}, or a shape" in capsys.readouterr().err
