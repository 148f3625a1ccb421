"""The benches on CUDA, as far as they go without: on a device made of the CPU, and cold starts."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import needs_cxx
from test_benches import COUNTS, FIELDS, run


def fake_cuda(devices, harness, skipping: str = ""):
    """`Cuda` with the calls into torch.cuda replaced; `skipping`: the name of a pass whose replays do nothing."""

    class FakeCuda(devices.Cuda):
        device = torch.device("cpu")
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
            return devices.Costs(sync_warnings=0, peak_bytes=4096)

        def capture(self, calls, times):
            FakeCuda.captures += 1
            outputs = [tuple(t.detach().clone() for t in call()) for call in calls]

            def replay():
                for _ in range(times):
                    for call, static in zip(calls, outputs, strict=True):
                        if not (skipping and len(static) == 2):
                            for kept, new in zip(static, call(), strict=True):
                                kept.copy_(new.detach())

            seen = devices.DeviceCounts(launches=3, stream_syncs=1, dtoh_copies=1)
            return devices.Captured(replay, outputs, times * len(calls), seen)

    return FakeCuda


@pytest.fixture
def on_fake_cuda(runner, harness, monkeypatch):
    def install(**options):
        fake = fake_cuda(importlib.import_module("devices"), harness, **options)
        monkeypatch.setitem(runner.MACHINES, "cuda", fake)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return fake

    return install


ARGUMENTS = ["--device", "cuda", "--quick", "--cold-starts", "0", "--providers", "eager", "fused", "--commit", "abc"]


@needs_cxx
def test_every_mode_of_cuda_has_its_rows(bench, on_fake_cuda, tmp_path, capsys):
    file, threads = tmp_path / "rows.json", str(torch.get_num_threads())
    fake = on_fake_cuda()
    run(bench, *ARGUMENTS, "--threads", threads, "--sizes", "8x64", "--dtypes", "fp32", "--json", str(file))
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
        assert f"policy_loss [8, 64] fp32  {timing}, {cache}\n" in table


@needs_cxx
def test_who_waits_for_the_device_is_not_captured(bench, on_fake_cuda):
    """A wait inside a capture is an error, and ends it for good."""
    on_fake_cuda()
    threads = str(torch.get_num_threads())
    rows = run(bench, *ARGUMENTS, "--ops", "step_loss", "--threads", threads, "--sizes", "8x64", "--dtypes", "fp32")
    timings = {}
    for row in rows:
        timings.setdefault(row.provider, set()).add(row.timing)
    assert timings["eager"] == {"call", "host"}
    assert timings["fused"] == {"graph", "call", "host"}
    assert {row.launches for row in rows if row.provider == "fused"} == {3}
    assert {(row.launches, row.sync_warnings) for row in rows if row.provider == "eager"} == {(None, 0)}


@needs_cxx
def test_replay_that_writes_nothing_is_a_wrong_answer(bench, on_fake_cuda):
    on_fake_cuda(skipping="forward+backward")
    with pytest.raises(SystemExit, match=r"eager forward\+backward in a graph: loss is nan away"):
        run(bench, *ARGUMENTS, "--threads", str(torch.get_num_threads()), "--sizes", "8x64")


def with_provider(bench, monkeypatch, **providers):
    """`policy_loss` with these beside the eager chain."""
    operation = bench.OPERATIONS["policy_loss"]
    both = {"eager": operation.providers["eager"], **providers}
    monkeypatch.setitem(bench.OPERATIONS, "policy_loss", replace(operation, providers=both))


ALL_ON_CUDA = ["--device", "cuda", "--quick", "--cold-starts", "0", "--sizes", "8x64", "--dtypes", "fp32"]


@needs_cxx
def test_graphs_of_its_own_are_not_captured(bench, on_fake_cuda, monkeypatch):
    """In a graph the same kernels without them take their place; both answers are checked first."""
    fake, called = on_fake_cuda(), []

    def noted(kind):
        def call(i):
            called.append(kind)
            return bench.trainer_loss(i)

        return call

    counted = {}
    measured, captured = fake.measure, fake.measure_captured

    def measure(machine, mode, series, effort):
        called.clear()
        result = measured(machine, mode, series, effort)
        counted[mode.timing] = set(called)
        return result

    def measure_captured(machine, series, effort):
        called.clear()
        result = captured(machine, series, effort)
        counted["graph"] = set(called)
        return result

    monkeypatch.setattr(fake, "measure", measure)
    monkeypatch.setattr(fake, "measure_captured", measure_captured)
    with_provider(bench, monkeypatch, compile_max=lambda: (noted("replays"), noted("plain")))
    rows = run(bench, *ALL_ON_CUDA, "--providers", "eager", "compile_max", "--threads", str(torch.get_num_threads()))
    assert counted == {"graph": {"plain"}, "call": {"replays"}, "host": {"replays"}}
    own = [row for row in rows if row.provider == "compile_max"]
    assert len(own) == 2 * 5
    assert {(row.launches, row.peak_bytes, row.ops) for row in own} == {(3, None, None)}
    assert {row.peak_bytes for row in rows if row.provider == "eager"} == {4096}


@pytest.mark.parametrize("wrong", ["replays", "plain"])
def test_both_of_its_answers_are_checked(runner, bench, case, wrong):
    operation, i, expected, eager = case("bench_policy_loss", "policy_loss", "fp32")
    calls = {"replays": eager, "plain": eager, wrong: lambda i: (2 * eager(i)[0],)}
    provider = runner.Provider("compile_max", calls["replays"], calls["plain"])
    with pytest.raises(runner.WrongAnswer, match=r"compile_max( for a graph)?: loss is 1\.0e"):
        runner.checked_and_counted(operation, provider, i, expected, runner.Cpu())


def test_a_step_begins_before_each_call_of_tuned_graphs(runner, bench, sde_bench, monkeypatch):
    happened = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: happened.append("step"))
    call, in_graph = runner.max_autotuned(lambda mode: lambda _: happened.append(mode))()
    call(None)
    in_graph(None)
    assert happened == ["step", "max-autotune", "max-autotune-no-cudagraphs"]
    for operation in (bench.OPERATIONS | sde_bench.OPERATIONS).values():
        assert len(operation.providers["compile_max"]()) == 2  # torch.compile refuses a mode that it does not know


@needs_cxx
def test_who_cannot_run_is_left_out_and_named(bench, on_fake_cuda, monkeypatch, tmp_path):
    """The others have their rows all the same; a run that is not whole ends with status 1."""
    file = tmp_path / "rows.json"
    fake = on_fake_cuda()
    capture = fake.capture

    def broken():
        def call(i):
            raise RuntimeError("no kernel image\nand many lines more")

        return call

    def refuse_eager_backward(machine, calls, times):
        if len(calls[0]()) == 2 and calls[0].args[1] is bench.trainer_loss:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(machine, calls, times)

    monkeypatch.setattr(fake, "capture", refuse_eager_backward)
    with_provider(bench, monkeypatch, triton=broken, fused=bench.OPERATIONS["policy_loss"].providers["fused"])
    with pytest.raises(SystemExit) as stopped:
        run(bench, *ALL_ON_CUDA, "--threads", str(torch.get_num_threads()), "--json", str(file))
    assert str(stopped.value).splitlines() == [
        "bench_policy_loss: policy_loss [8, 64] fp32: triton: left out: RuntimeError: no kernel image",
        *[
            "bench_policy_loss: policy_loss [8, 64] fp32: eager forward+backward in a graph: left out: RuntimeError: "
            "operation not permitted when stream is capturing"
        ]
        * 2,
    ]
    rows = {(row["provider"], row["pass"], row["timing"]) for row in json.loads(file.read_text())}
    assert {provider for provider, _, _ in rows} == {"eager", "fused", "copy"}
    assert ("eager", "forward+backward", "graph") not in rows
    assert {("eager", "forward", "graph"), ("eager", "forward+backward", "call"), ("copy", "copy", "graph")} <= rows


def test_who_tunes_for_long_is_tried_on_some_sizes(bench, runner, on_fake_cuda, monkeypatch):
    fake, tried = on_fake_cuda(), []
    monkeypatch.setattr(fake, "seldom", {"compile_max": ("small",)})
    eager = bench.OPERATIONS["policy_loss"].providers["eager"]
    with_provider(bench, monkeypatch, compile_max=lambda: (eager(), eager()))
    monkeypatch.setattr(
        runner, "bench", lambda operation, shape, dtype, *more: tried.append((shape, dtype, more[3])) or []
    )
    arguments = ["--device", "cuda", "--cold-starts", "0", "--threads", str(torch.get_num_threads())]
    run(bench, *arguments, "--sizes", "small", "8x64")
    both = ["eager", "compile_max"]
    cases = [((4, 8), "fp32", both), ((4, 8), "bf16", ["eager"]), ((8, 64), "fp32", ["eager"])]
    assert tried == [*cases, ((8, 64), "bf16", ["eager"])]
    tried.clear()
    run(bench, *arguments, "--sizes", "8x64", "--dtypes", "bf16", "--providers", "compile_max")
    assert tried == [((8, 64), "bf16", ["compile_max"])]


def test_when_time_is_up_what_is_left_is_named(bench, on_fake_cuda, capsys):
    on_fake_cuda()
    arguments = [*ALL_ON_CUDA, "--providers", "eager", "--threads", str(torch.get_num_threads())]
    assert run(bench, *arguments, "--minutes", "0", "--cold-starts", "1") == []
    out = capsys.readouterr().out
    assert "no time left for policy_loss [8, 64] fp32\n" in out
    assert "no time left for the cold start of eager\n" in out


def test_cold_starts_alone(runner, bench, monkeypatch):
    monkeypatch.setattr(runner, "cold_start", lambda *_: {"ready": 2.0, "finished": 3.0})
    arguments = ["--no-cases", "--cold-starts", "1", "--sizes", "4x8", "--dtypes", "fp32"]
    rows = run(bench, *arguments, "--threads", str(torch.get_num_threads()))
    assert [(row.provider, row.timing, row.p50_us) for row in rows] == [
        (name, *one) for name in ("eager", "compile", "fused") for one in (("cold start", 3e6), ("first call", 1e6))
    ]


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


def test_every_set_is_called_twice_before_the_clock_runs(devices, harness):
    machine, called = fake_cuda(devices, harness)(), []
    machine.event_clock = lambda call, repeats: pytest.fail("timed") if len(called) < 6 else [1.0] * repeats
    series = {"a": [partial(called.append, 0), partial(called.append, 1)], "b": [partial(called.append, 2)]}
    machine.measure(devices.Mode("call", "cold", 2), series, harness.Effort(1, 1.0, 0.0))
    assert called == [0, 1, 2, 0, 1, 2]


def test_input_sets_take_turns(devices):
    turns = []
    call = devices._in_turn([lambda: turns.append(0), lambda: turns.append(1)])
    for _ in range(4):
        call()
    assert turns == [0, 1, 0, 1]


def test_copies_share_no_memory(runner, bench):
    i = bench.make_loss_inputs((4, 8), "bf16", torch.device("cpu"))
    first, second, third = runner.copies(i, 3)
    assert first is i
    for name in i._fields:
        one, two, three = (getattr(each, name) for each in (first, second, third))
        assert torch.equal(one, two)
        assert len({one.data_ptr(), two.data_ptr(), three.data_ptr()}) == 3
        assert two.requires_grad == three.requires_grad == (name == "mean")
        assert two.is_leaf


def test_launches_and_waits_are_counted_from_a_profile(devices):
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    seen = [("aten::mean", cpu), ("cudaLaunchKernel", cpu), ("reduce_kernel", cuda), ("Memcpy DtoH (Device)", cuda)]
    seen += [("cudaStreamSynchronize", cpu), ("cudaDeviceSynchronize", cpu), ("Memset (Device)", cuda)]
    events = [SimpleNamespace(name=name, device_type=kind, is_user_annotation=False) for name, kind in seen]
    # What a compiled region is called: once on the host, once as the range of its kernels.
    events += [SimpleNamespace(name="Region: 0/0", device_type=kind, is_user_annotation=True) for kind in (cpu, cuda)]
    assert devices.count_events(events) == (3, 1, 1)
    assert devices.count_events(event for event in events if event.device_type == cpu) == (None, None, None)


def test_launches_are_the_nodes_of_a_graph(devices, monkeypatch):
    kernel, copy, fill, empty, event = 0, 1, 2, 5, 7
    assert devices.count_nodes([kernel, fill, kernel, empty, kernel, fill, kernel, event], 2) == (3, 0, 0)
    assert devices.count_nodes([kernel, copy], 1) == (2, 0, None)  # to where is not known
    assert devices.count_nodes([kernel] * 3, 2) == (None, 0, 0)  # the calls were not alike
    assert devices.count_nodes(None, 1) == (None, 0, None)

    class Driver:
        refuses = ""

        def cuGraphGetNodes(self, graph, nodes, count):
            assert graph.value == 0x1234
            if nodes is None:
                count._obj.value = 3
            else:
                assert len(nodes) == count._obj.value == 3
                nodes[:] = [0x10, 0x20, 0x30]
            return 1 if self.refuses == "nodes" else 0

        def cuGraphNodeGetType(self, node, kind):
            kind._obj.value = {0x10: kernel, 0x20: copy, 0x30: event}[node.value]
            return 1 if self.refuses == "type" else 0

    monkeypatch.setattr(devices.ctypes, "CDLL", {"libcuda.so.1": Driver()}.get)
    assert devices.node_types(0x1234) == [kernel, copy, event]
    for refused in ("nodes", "type"):
        monkeypatch.setattr(Driver, "refuses", refused)
        assert devices.node_types(0x1234) is None


def test_the_profiler_looks_at_one_later_call(devices, monkeypatch):
    """On a CPU it sees nothing of a device; that the calls before are made is seen."""
    machine = devices.Cuda.__new__(devices.Cuda)
    happened = []
    monkeypatch.setattr(devices.Cuda, "synchronize", lambda _: happened.append("wait"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CUDA is not available
        assert machine.profiled(lambda: happened.append("call")) == (None, None, None)
    assert happened == ["call", "call", "wait", "call", "wait"]


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
    assert costs == (2, 300)
    assert modes == ["warn", "default"]


def test_cold_start_is_a_process_with_empty_caches(runner, bench, monkeypatch):
    module = importlib.import_module("cold_start")
    run, seen = subprocess.run, []
    machine = runner.Cpu()
    facts = machine.facts()  # asks git, before there is somebody listening

    def watched(command, env, **options):
        seen.append([env[name] for name in module.CACHE_FOLDERS])
        assert not any(Path(folder).exists() for folder in seen[-1])
        return run(command, env=env, **options)

    monkeypatch.setattr(module.subprocess, "run", watched)
    operation = bench.OPERATIONS["policy_loss"]
    total, call = runner.cold_starts("bench_policy_loss", operation, (4, 8), "bf16", 1, facts, machine, ("fused",))
    assert len(seen) == 1
    assert (total.timing, call.timing) == ("cold start", "first call")
    assert 0 < call.p50_us < total.p50_us
    assert (total.provider, total.pass_, total.repeats) == ("fused", "forward+backward", 1)


def test_first_call_has_what_the_profiler_saw(runner, bench, monkeypatch):
    seen = {"launches": 146, "stream_syncs": 29, "dtoh_copies": 13}
    monkeypatch.setattr(runner, "cold_start", lambda *_: {"ready": 2.0, "finished": 3.0, "seen": seen})
    operation = bench.OPERATIONS["policy_loss"]
    machine = runner.Cpu()
    total, call = runner.cold_starts("", operation, (4, 8), "fp32", 1, machine.facts(), machine, ("eager",))
    assert (call.timing, call.launches, call.stream_syncs, call.dtoh_copies) == ("first call", 146, 29, 13)
    assert (total.timing, total.launches) == ("cold start", None)


def test_cold_start_that_fails_says_why(harness):
    module = importlib.import_module("cold_start")
    with pytest.raises(RuntimeError, match=r"cold start of nobody ended with status 1:\n(.|\n)*KeyError: 'nobody'"):
        module.cold_start("bench_policy_loss", "policy_loss", "nobody", (4, 8), "fp32", "cpu")
