"""The Triton rivals of the benches: their answers through Triton's interpreter, and that they compile for a GPU.

Each in a process of its own: Triton decides at import whether it interprets, and only one backend can be had.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flowdppo_ops

pytest.importorskip("triton", reason="triton is not installed")
BENCHES = Path(__file__).parents[1] / "benches"
THRESHOLD = 1e-3

# Runs every case of a file of inputs and writes the answers beside them. BLOCK is small, so that rows have several
# blocks and remainders; the interpreter takes the one configuration it is given instead of tuning.
ANSWER = """
import sys
import torch, triton, triton_rows
import triton_policy_loss as bench
import triton_sde_step as sde
file, threshold = sys.argv[1], float(sys.argv[2])
answers = []
for case in torch.load(file):
    block, splits, stages = case["config"]
    for module in (bench, sde):
        module._forward_kernel.configs = [triton.Config({"BLOCK": block, "SPLITS": splits, "STAGES": stages})]
        module._backward_kernel.configs = [triton.Config({"BLOCK": block})]
    if "noise" in case:
        step = [case[name] for name in ("sigma", "sigma_next", "noise_level", "sigma_max")]
        output = case["output"].requires_grad_()
        drawn = sde.triton_sde_draw(output.detach(), case["sample"], case["noise"], *step)
        replayed = sde.triton_sde_replay(output, case["sample"], drawn[0], *step)
        torch.autograd.backward(replayed, (case["grad_log_prob"], case["grad_mean"]))
        answers.append(dict(drawn=drawn, replayed=[one.detach() for one in replayed], grad=output.grad))
        continue
    mean = case["mean"].requires_grad_()
    if "sample" in case:
        schedule = (case["sigma"], case["sigma_next"], case["noise_level"], case["sigma_max"])
        latents = (mean, case["sample"], case["prev_sample"], case["old_mean"])
        loss = bench.triton_step_loss(*latents, case["advantages"], *schedule, threshold)
        again, numbers = bench.loss_and_numbers(*latents, case["advantages"], None, schedule, threshold)
    else:
        std = case["std"]
        loss = bench.triton_policy_loss(
            mean, case["old_mean"], case["prev_sample"], case["advantages"], std, threshold
        )
        latents = (mean, None, case["prev_sample"], case["old_mean"])
        again, numbers = bench.loss_and_numbers(*latents, case["advantages"], std.reshape(-1), None, threshold)
    (3 * loss).backward()
    ratio, kl, keep, _ = numbers.detach()
    tickets = triton_rows.ticket_of(mean.device).item()
    answers.append(dict(loss=loss.detach(), again=again.detach(), grad=mean.grad, ratio=ratio, kl=kl, keep=keep != 0,
                        tickets=tickets))
torch.save(answers, file + ".answers")
"""

SHAPES = [(1, 1), (5, 33), (16, 300), (4, 2, 8, 8), (17, 20)]  # 17 rows: the last program's tile holds 16
CONFIGS = [(16, 1, 1), (32, 4, 3), (256, 8, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative: half a unit in the last place; a whole one in bfloat16, which the interpreter cuts off where a GPU rounds.
GRADIENT_ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All cells of the mask in turn: KL a tenth of the threshold or ten times it, ratio about 1, sign of A."""
    generator = torch.Generator().manual_seed(0)
    rows, latent_dims = shape[0], tuple(range(1, len(shape)))
    row = torch.arange(rows)
    wide = (rows, *(1 for _ in latent_dims))
    std = torch.linspace(0.5, 0.7, rows).reshape(wide)
    kl = (torch.where(row % 2 == 0, 10.0, 0.1) * THRESHOLD).reshape(wide)
    lean = torch.where(row // 2 % 2 == 0, 2.0, -2.0).reshape(wide)
    old_mean, direction, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    drift = direction * std * torch.sqrt(2 * kl) / direction.square().mean(latent_dims, keepdim=True).sqrt()
    return {
        "mean": (old_mean + drift).to(dtype),
        "old_mean": old_mean.to(dtype),
        "prev_sample": (old_mean + lean * drift + 0.01 * noise).to(dtype),
        "advantages": torch.where(row // 4 % 2 == 0, 1.0, -1.0) * torch.linspace(0.5, 2.0, rows),
        "std": std,
    }


def draw_step(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same policies as model outputs: `mean` is the output of the dtype under test, the rest float32.

    A step per row, the first from sigma 1. A rounded output puts rows off their KL by far less than a factor of ten.
    """
    case, rows = draw(shape, torch.float32), shape[0]
    sigma = torch.linspace(1.0, 0.3, rows)
    schedule = {"sigma": sigma, "sigma_next": sigma - 0.1, "noise_level": 0.7, "sigma_max": 0.95}
    a, b, std = (
        row.reshape(case["std"].shape)
        for row in flowdppo_ops.reference.transition(
            "flow_sde", sigma, sigma - 0.1, torch.tensor(0.7), torch.tensor(0.95)
        )
    )
    drift = (case["mean"] - case["old_mean"]) * std / case["std"]
    lean = (case["prev_sample"] - case["old_mean"]) * std / case["std"]
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    old_output = case["old_mean"].to(dtype).float()
    old_mean = a * sample + b * old_output
    policy = {"mean": (old_output + drift / b).to(dtype), "old_mean": old_mean, "prev_sample": old_mean + lean}
    return case | schedule | policy | {"sample": sample}


def draw_sde(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`sde_step`: the output of the dtype under test, the sample of another, the rest float32. The first sigma is 1."""
    generator = torch.Generator().manual_seed(0)
    output, sample, noise, grad_mean = (torch.randn(shape, generator=generator) for _ in range(4))
    rows, sigma = shape[0], torch.linspace(1.0, 0.3, shape[0])
    return {
        "output": output.to(dtype),
        "sample": sample.to({torch.float32: torch.float16}.get(dtype, torch.float32)),
        "noise": noise,
        "sigma": sigma,
        "sigma_next": sigma - 0.1,
        "noise_level": 0.7,
        "sigma_max": 0.95,
        "grad_log_prob": torch.linspace(-1.0, 2.0, rows) * sample[0].numel(),  # both parts of the gradient count
        "grad_mean": grad_mean,
    }


def on_policy() -> dict[str, torch.Tensor]:
    case = draw((5, 33), torch.float32)
    return case | {"mean": case["old_mean"].clone()}


def process(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(BENCHES), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """`[(inputs, answer)]`, from one interpreter for all: its start takes longer than the cases."""
    cases = [
        draw(shape, DTYPES[(at + turn) % 3]) | {"config": config}
        for turn, shape in enumerate(SHAPES)
        for at, config in enumerate(CONFIGS)
    ]
    mixed = draw((16, 300), torch.float32)
    mixed["old_mean"], mixed["prev_sample"] = mixed["old_mean"].bfloat16(), mixed["prev_sample"].half()
    cases += [
        draw_step(shape, DTYPES[turn % 3]) | {"config": CONFIGS[turn % len(CONFIGS)]}
        for turn, shape in enumerate(SHAPES)
    ]
    cases += [
        draw_sde(shape, DTYPES[turn % 3]) | {"config": CONFIGS[(turn + 1) % len(CONFIGS)]}
        for turn, shape in enumerate(SHAPES)
    ]
    cases += [mixed | {"config": CONFIGS[1]}, on_policy() | {"config": CONFIGS[1]}]
    file = str(tmp_path_factory.mktemp("triton") / "cases.pt")
    torch.save(cases, file)
    process(ANSWER, file, str(THRESHOLD), TRITON_INTERPRET="1")
    return list(zip(cases, torch.load(file + ".answers"), strict=True))


@pytest.fixture(scope="module")
def answers(answered):
    """Of the losses."""
    return [(case, answer) for case, answer in answered if "noise" not in case]


def reference(case: dict[str, torch.Tensor], dtype: torch.dtype):
    mean = case["mean"].detach().to(dtype).requires_grad_()
    old_mean, prev_sample, advantages = (case[name].to(dtype) for name in ("old_mean", "prev_sample", "advantages"))
    objective = flowdppo_ops.FlowDPPO(kl_mask_threshold=THRESHOLD)
    if "sample" in case:
        schedule = {"noise_level": case["noise_level"], "sigma_max": case["sigma_max"]}
        schedule |= {name: case[name].to(dtype) for name in ("sigma", "sigma_next")}
        result = flowdppo_ops.reference.step_loss(
            mean,
            case["sample"].to(dtype),
            prev_sample,
            advantages,
            old_prev_sample_mean=old_mean,
            objective=objective,
            **schedule,
        )
    else:
        result = flowdppo_ops.reference.loss(
            mean, old_mean, advantages, std=case["std"].to(dtype), prev_sample=prev_sample, objective=objective
        )
    (3 * result.loss).backward()
    return result, mean.grad


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, of the largest value; 0 where all is 0."""
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
    return error.item()


def test_agrees_with_float64(answers):
    cells = set()
    for case, answer in answers:
        truth, gradient = reference(case, torch.float64)
        what = f"shape {list(case['mean'].shape)}, {case['mean'].dtype}, BLOCK, SPLITS, STAGES {case['config']}"
        assert torch.equal(answer["keep"], truth.keep.reshape(-1)), what
        tolerance = 2e-6  # some ten roundings of float32
        assert worst(answer["loss"], truth.loss.detach()) <= tolerance, what
        assert worst(answer["ratio"], truth.ratio) <= tolerance, what
        assert worst(answer["kl"], truth.kl) <= tolerance, what
        # A step forms the mean itself: a rounding of 3, 1.2e-7, beside an innovation of 0.03.
        of_mean = 1e-5 if "sample" in case else tolerance
        assert worst(answer["grad"], gradient) <= of_mean + GRADIENT_ROUNDING[case["mean"].dtype], what
        blocked = ~answer["keep"]
        assert (answer["grad"].reshape(len(blocked), -1)[blocked] == 0).all(), what
        cell = (truth.kl > THRESHOLD, truth.ratio > 1, case["advantages"] > 0)
        cells |= set(zip(*(of_rows.tolist() for of_rows in cell), strict=True))
    assert len(cells) == 8  # every cell of the mask was there


def test_on_policy_is_exact(answers):
    case, answer = answers[-1]
    assert torch.equal(case["mean"], case["old_mean"])
    assert (answer["ratio"] == 1).all()
    assert (answer["kl"] == 0).all()


def test_same_bits_again_and_the_ticket_is_back(answers):
    for _, answer in answers:
        assert torch.equal(answer["loss"], answer["again"])
        assert answer["tickets"] == 0


def test_sde_step_agrees_with_float64(answered):
    steps = [(case, answer) for case, answer in answered if "noise" in case]
    assert len(steps) == len(SHAPES)
    for case, answer in steps:
        what = f"shape {list(case['output'].shape)}, {case['output'].dtype}, BLOCK, SPLITS, STAGES {case['config']}"
        prev_sample, log_prob, mean = answer["drawn"]
        assert prev_sample.dtype == case["sample"].dtype, what
        assert torch.equal(log_prob, answer["replayed"][0]), what  # scored as it is stored
        assert torch.equal(mean, answer["replayed"][1]), what

        output = case["output"].detach().double().requires_grad_()
        schedule = {name: case[name].double() for name in ("sigma", "sigma_next")}
        schedule |= {name: case[name] for name in ("noise_level", "sigma_max")}
        sample, noise = case["sample"].double(), case["noise"].double()
        drawn = flowdppo_ops.reference.sde_step(output.detach(), sample, noise=noise, **schedule)
        truth = flowdppo_ops.reference.sde_step(output, sample, prev_sample=prev_sample.double(), **schedule)
        torch.autograd.backward(
            (truth.log_prob, truth.prev_sample_mean), (case["grad_log_prob"].double(), case["grad_mean"].double())
        )
        assert worst(prev_sample, drawn.prev_sample) <= 2e-6 + GRADIENT_ROUNDING[prev_sample.dtype], what
        assert worst(log_prob, truth.log_prob.detach()) <= 2e-6, what
        assert worst(mean, truth.prev_sample_mean.detach()) <= 2e-6, what
        assert worst(answer["grad"], output.grad) <= 2e-6 + GRADIENT_ROUNDING[case["output"].dtype], what


COMPILE = """
import json, re
import triton, triton_policy_loss as bench, triton_sde_step as sde
from triton.backends.compiler import GPUTarget

LATENTS = ("source", "sample", "prev_sample", "old_mean", "grad_source", "model_output", "other", "grad_output")
WIDE = ("mean", "grad_mean")  # latents in fp32, whatever the others are
SCALARS = {"rows": "i32", "numel": "i32", "ticket": "*i32"} | dict.fromkeys(
    ("threshold", "noise_level", "sigma_max"), "fp32"
)
found = {}
FORWARD = {"SPLITS": 8, "STAGES": 1, "TILE_ROWS": 16}
kernels = [
    (kernel, constants | {"STEP": step})
    for kernel, constants in ((bench._forward_kernel, FORWARD), (bench._backward_kernel, {}))
    for step in (False, True)
]
kernels += [(sde._forward_kernel, FORWARD | {"DRAW": draw}) for draw in (False, True)] + [(sde._backward_kernel, {})]
for kernel, constants in kernels:
    for dtype in ("fp32", "bf16", "fp16"):
        names, constants = kernel.fn.arg_names, {"BLOCK": 1024, **constants}
        signature, aligned = {}, {}
        for at, name in enumerate(names):
            pointer = "*" + dtype if name in LATENTS else "*fp32"
            signature[name] = "constexpr" if name in constants else SCALARS.get(name, pointer)
            if name in LATENTS or name in WIDE or name == "numel":
                aligned[(at,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(
            fn=kernel.fn,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        form = [constants[name] for name in ("STEP", "DRAW") if name in constants]
        found[f"{kernel.fn.__module__}{kernel.fn.__name__} {form} {dtype}"] = {
            "loads": len(re.findall(r"ld\\.global\\S*\\.v4", ptx)),
            "stores": len(re.findall(r"st\\.global\\S*\\.v4", ptx)),
            "local": len(re.findall(r"\\.local", ptx)),
        }
print(json.dumps(found))
"""


def test_compiles_for_hopper_with_16_byte_accesses(tmp_path):
    """The interpreter takes much that the compiler refuses. 1024 elements on 128 threads: 2 vectors of fp32 each."""
    found = json.loads(process(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    for dtype, vectors in (("fp32", 2), ("bf16", 1), ("fp16", 1)):
        for step in (False, True):
            forward, backward = (
                found[f"triton_policy_loss_{pass_}_kernel [{step}] {dtype}"] for pass_ in ("forward", "backward")
            )
            assert forward == {"loads": (3 + step) * vectors, "stores": 0, "local": 0}
            assert backward == {"loads": (2 + step) * vectors, "stores": vectors, "local": 0}
        for draw in (False, True):  # the mean and its gradient are fp32
            forward = found[f"triton_sde_step_forward_kernel [{draw}] {dtype}"]
            assert forward == {"loads": 3 * vectors, "stores": 2 + draw * vectors, "local": 0}
        backward = found[f"triton_sde_step_backward_kernel [] {dtype}"]
        assert backward == {"loads": 2 * 2 + vectors, "stores": vectors, "local": 0}


@pytest.mark.parametrize(
    ("rows", "numel", "splits"),
    [
        (16, 65536, {8, 16, 32}),
        (2, 2_096_640, {64, 128, 256}),
        (64, 4_838_400, {2, 4, 8}),
        (4, 8, {1}),
        (16, 4096, {1, 2, 4}),  # BLOCK 1024: no more than 4 have work; 4096: one
        (1_000_000, 64, {1}),
    ],
)
def test_tuning_is_about_grids_that_fill_the_device(monkeypatch, rows, numel, splits):
    monkeypatch.syspath_prepend(BENCHES)
    bench = importlib.import_module("triton_rows")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    arguments = {"rows": rows, "numel": numel, "partials": torch.empty(0)}
    kept = bench.worthwhile(bench.SPLIT, arguments)
    assert {config.kwargs["SPLITS"] for config in kept} == splits
    assert {config.kwargs["BLOCK"] for config in kept} == {config.kwargs["BLOCK"] for config in bench.SPLIT}
    for config in kept:
        assert config.kwargs["SPLITS"] <= max(1, numel // config.kwargs["BLOCK"] + 1)


PROVIDERS = """
import torch, runner
import bench_policy_loss, bench_sde_step
operations = bench_policy_loss.OPERATIONS | bench_sde_step.OPERATIONS
with_rival = [operation for operation in operations.values() if "triton" in operation.providers]
for operation in with_rival:
    i = operation.make_inputs((4, 2, 8, 8), "fp32", torch.device("cpu"))
    runner.check(operation, *operation.make_providers(["triton"]), i, operation.expected(i, "triton"))
print(*(operation.name for operation in with_rival))
"""


def test_the_benches_hand_it_what_it_takes():
    checked = process(PROVIDERS, TRITON_INTERPRET="1").split()
    assert checked == ["policy_loss", "step_loss", "sde_step_sample", "sde_step_replay"]
