"""The CPU backend's threads: the same bits for any number of them, from any thread, in any process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DTYPES, OBJECTIVES, draw
from parity import equal_bits, run

from flowdppo_ops import GRPOGuard


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dtypes", ["float32", "every latent another"])
@pytest.mark.parametrize(("rows", "numel"), [(16, 65_536), (1, 100_003), (7, 40_000), (300, 17)])
def test_same_bits_for_any_thread_count(fused, threads, dtypes, rows, numel):
    arguments = draw(
        (rows,), (numel,), dtypes=DTYPES[dtypes], objective=GRPOGuard(clip_range=10.0), ref_kl_weight=0.1, weights=True
    )
    torch.set_num_threads(1)
    alone = run(fused, arguments)
    torch.set_num_threads(threads)
    equal_bits(run(fused, arguments), alone)
    equal_bits(run(fused, arguments), alone)  # and from run to run


def test_concurrent_callers(fused):
    """The GIL is released: callers on several Python threads do not disturb each other."""
    torch.set_num_threads(2)
    calls = [draw((3,), (40_000,), seed=seed, objective=OBJECTIVES["grpo"]) for seed in range(4)]
    alone = [run(fused, arguments) for arguments in calls]
    with ThreadPoolExecutor(4) as pool:
        for mine, wanted in zip(pool.map(lambda arguments: run(fused, arguments), 8 * calls), 8 * alone, strict=True):
            equal_bits(mine, wanted)


def test_other_python_threads_run_during_a_call(fused):
    torch.set_num_threads(1)
    x = torch.linspace(-1, 1, 60_000_000, dtype=torch.bfloat16).view(1, -1)
    advantages, ticks, done = torch.ones(1), [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    fused(x, x, advantages, std=0.5, prev_sample=x)
    end = time.perf_counter()
    done.set()
    thread.join()
    # Far from both ends, where Python may hand over the GIL on its own.
    during = [at for at in ticks if start + 0.2 * (end - start) < at < end - 0.2 * (end - start)]
    assert len(during) >= 3, f"{len(during)} ticks of 1 ms in the middle of a call of {1000 * (end - start):.0f} ms"


# ---- processes of their own ------------------------------------------------------------------------------------------

NUMPY = """
import multiprocessing, os, signal, sys, threading
import numpy as np
import flowdppo_ops.numpy

x = np.linspace(-1, 1, 400_000, dtype=np.float32).reshape(2, -1)

def call(threads=4):
    loss, grad = flowdppo_ops.numpy.loss(x, 0.9 * x, np.ones(2, np.float32), std=0.5, prev_sample=x + 0.25,
                                         threads=threads)
    return loss.tobytes() + grad.tobytes()

def forked(child):
    if (process := os.fork()) == 0:
        signal.alarm(30)  # the end of a child that hangs
        os._exit(0 if child() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0

def tasks():
    # The threads of this process, by number; Linux alone can say.
    return set(os.listdir("/proc/self/task")) if sys.platform == "linux" else set()

wanted = call(threads=1)
"""

TORCH = (
    NUMPY
    + """
import torch, flowdppo_ops
torch.set_num_threads(4)
t = torch.from_numpy(x)
# Computed here: in a child of a process that has used OpenMP, PyTorch's own operators would hang.
arguments = {"std": 0.5, "prev_sample": t + 0.25}
means = (t, 0.9 * t, torch.ones(2))

def call_torch():
    return flowdppo_ops.loss(*means, **arguments).loss.item()

torch.set_num_threads(1)
wanted_torch = call_torch()
torch.set_num_threads(4)
"""
)

SCRIPTS = {
    "without PyTorch": NUMPY
    + """
assert all(call(threads) == wanted for threads in (2, 3, 7, 1_000_000))
assert "torch" not in sys.modules
""",
    "PyTorch after the first call": NUMPY
    + """
import time

def wakes_of_rayon():
    # How often each of rayon's threads has gone to sleep, by its number.
    wakes = {}
    for task in tasks():
        if open(f"/proc/self/task/{task}/comm").read().startswith("flowdppo-"):
            lines = open(f"/proc/self/task/{task}/status").readlines()
            wakes[task] = [line for line in lines if line.startswith("voluntary_ctxt_switches")]
    return wakes

assert call() == wanted
import torch
torch.set_num_threads(3)
torch.zeros(400_000).add_(1)  # PyTorch's team is there
time.sleep(0.2)  # and rayon's threads sleep
present, wakes = tasks(), wakes_of_rayon()
assert wakes or sys.platform != "linux" or os.cpu_count() == 1
assert all(call(threads) == wanted for threads in (2, 3, 7, 1_000_000))
time.sleep(0.2)
assert tasks() == present, "threads besides PyTorch's"
assert wakes_of_rayon() == wakes, "rayon's threads took part"
""",
    "PyTorch's threads and no others": TORCH
    + """
torch.zeros(400_000).add_(1)
present = tasks()
assert call_torch() == wanted_torch
# Two tasks for four threads. None of them may end: PyTorch would have to start others.
small = [torch.zeros(2, 32_768) for _ in range(2)]
flowdppo_ops.loss(*small, torch.ones(2), std=0.5, prev_sample=small[0])
assert tasks() == present
""",
    "fork, without PyTorch": NUMPY
    + """
forked(lambda: call() == wanted)  # before the parent has used threads
assert call() == wanted
forked(lambda: call() == wanted)
with multiprocessing.get_context("fork").Pool(2, signal.alarm, (30,)) as pool:
    assert pool.map(call, [1, 2, 4]) == 3 * [wanted]
""",
    "fork, after PyTorch's operators alone": TORCH
    + """
forked(lambda: call_torch() == wanted_torch and call() == wanted)
""",
    "fork, after calls on PyTorch's threads": TORCH
    + """
def child(_):
    return call_torch()

assert call_torch() == wanted_torch
forked(lambda: call_torch() == wanted_torch and call() == wanted)
with multiprocessing.get_context("fork").Pool(2, signal.alarm, (30,)) as pool:
    assert pool.map(child, range(3)) == 3 * [wanted_torch]
assert call_torch() == wanted_torch  # and in the parent as before
""",
    "fork of a fork": TORCH
    + """
assert call_torch() == wanted_torch
def child():
    assert call_torch() == wanted_torch  # on a team of its own
    forked(lambda: call_torch() == wanted_torch)
    return True
forked(child)
""",
    "fork while others are calling": TORCH
    + """
done = threading.Event()
def calls():
    while not done.is_set():
        call_torch()
callers = [threading.Thread(target=calls) for _ in range(2)]
for caller in callers:
    caller.start()
for _ in range(5):
    forked(lambda: call_torch() == wanted_torch)
done.set()
for caller in callers:
    caller.join()
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_process(native, script):
    """A forked child has its parent's memory but none of its threads; waiting for those would hang."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
