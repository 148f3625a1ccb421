"""The Triton rivals of the benches: their answers through Triton's interpreter, and that they compile for a GPU.

Each in a process of its own: Triton decides at import whether it interprets, and only one backend can be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
BENCHES = Path(__file__).parents[1] / "benches"


def process(program: str, **environment: str) -> str:
    path = os.pathsep.join([str(BENCHES), os.environ.get("PYTHONPATH", "")])
    command, surroundings = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Small blocks, so that rows have several of them and remainders, split over one program or more. 17 rows: the last
# program's tile holds 16. The benches' own check compares with float64; each call needs the ticket back at 0.
ANSWER = """
import torch, triton, harness
import bench_policy_loss, bench_sde_step, triton_policy_loss, triton_sde_step
configs = [(16, 1, 1), (32, 4, 3), (256, 8, 1)]
operations = bench_policy_loss.OPERATIONS | bench_sde_step.OPERATIONS
for turn, shape in enumerate([(5, 33), (16, 300), (4, 2, 8, 8), (17, 20)]):
    block, splits, stages = configs[turn % 3]
    for module in (triton_policy_loss, triton_sde_step):
        split = triton.Config({"BLOCK": block, "SPLITS": splits, "STAGES": stages})
        module._forward_kernel.configs = [split]
        module._backward_kernel.configs = [triton.Config({"BLOCK": block})]
    for name, operation in operations.items():
        dtype = operation.dtypes[turn % 2]
        inputs = operation.make_inputs(shape, dtype, torch.device("cpu"))
        # The interpreter cuts bfloat16 off where a GPU rounds.
        harness.TOLERANCE = 2.0**-8 if operation.leaf and dtype != "fp32" else 1e-5
        harness.check(operation, "triton", operation.providers["triton"](), inputs)
        print(name, dtype, shape)
assert triton_policy_loss.ticket_of(torch.device("cpu")).item() == 0
"""


def test_the_answers_are_those_of_float64():
    assert len(process(ANSWER, TRITON_INTERPRET="1").splitlines()) == 4 * 4


COMPILE = """
import json, re
import triton, triton_policy_loss as loss, triton_sde_step as sde
from triton.backends.compiler import GPUTarget

LATENTS = ("source", "sample", "prev_sample", "old_mean", "grad_source", "model_output", "other", "grad_output")
WIDE = ("mean", "grad_mean")  # latents in fp32, whatever the others are
SCALARS = {"rows": "i32", "numel": "i32", "ticket": "*i32"} | dict.fromkeys(
    ("threshold", "noise_level", "sigma_max"), "fp32"
)
FORWARD = {"SPLITS": 8, "STAGES": 1, "TILE_ROWS": 16}
found = []
kernels = [(loss._forward_kernel, FORWARD | {"STEP": step}) for step in (False, True)]
kernels += [(loss._backward_kernel, {"STEP": step}) for step in (False, True)]
kernels += [(sde._forward_kernel, FORWARD | {"DRAW": draw}) for draw in (False, True)] + [(sde._backward_kernel, {})]
for dtype in ("fp32", "bf16", "fp16"):
    for kernel, constants in kernels:
        names, constants = kernel.fn.arg_names, {"BLOCK": 1024, **constants}
        signature, aligned = {}, {}
        for at, name in enumerate(names):
            pointer = "*" + dtype if name in LATENTS else "*fp32"
            signature[name] = "constexpr" if name in constants else SCALARS.get(name, pointer)
            if name in LATENTS or name in WIDE or name == "numel":
                aligned[(at,)] = [["tt.divisibility", 16]]
        values = {(names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(fn=kernel.fn, signature=signature, constexprs=values, attrs=aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        accesses = (r"ld\\.global\\S*\\.v4", r"st\\.global\\S*\\.v4", r"\\.local")
        found.append([len(re.findall(one, ptx)) for one in accesses])
print(json.dumps(found))
"""


def test_compiles_for_hopper_with_16_byte_accesses(tmp_path):
    """The interpreter takes much that the compiler refuses. 1024 elements on 128 threads: 2 vectors of fp32 each."""
    found = iter(json.loads(process(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1]))
    for vectors in (2, 1, 1):  # fp32, bf16, fp16
        for step in (0, 1):
            assert next(found) == [(3 + step) * vectors, 0, 0]  # loads, stores, local memory
        for step in (0, 1):
            assert next(found) == [(2 + step) * vectors, vectors, 0]
        for draw in (0, 1):  # the mean and its gradient are fp32
            assert next(found) == [3 * vectors, 2 + draw * vectors, 0]
        assert next(found) == [2 * 2 + vectors, vectors, 0]
