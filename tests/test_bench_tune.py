"""`benches/tune.py` and its table of variants, without a GPU: what is compiled, launched, compared and written down."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compilers import needs_cxx
from standin import harness as standin

from flowdppo_ops import _native

ROOT = Path(__file__).parents[1]
BENCHES = ROOT / "benches"
needs_nvrtc = pytest.mark.skipif(
    not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings"),
    reason="cuda.bindings is not installed: PyTorch is built without CUDA",
)


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module("tune")


@pytest.fixture
def variants(tune):
    return sys.modules["variants"]


# ---- the table of variants -------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_kernels_and_of_the_plan(variants):
    header = (ROOT / "kernels" / "tuning.cuh").read_text()
    found = re.findall(r"^#ifndef FLOWDPPO_(\w+).*\n#define FLOWDPPO_\1 (\w+)$", header, re.MULTILINE)
    assert dict(found) == {name: str(value) for name, value in variants.COMPILED.items()}
    assert len(found) == header.count("#ifndef")
    plan = (ROOT / "src" / "plan.rs").read_text()
    for name, value in {**variants.PLANNED, "SHORT_ROW": variants.SHORT_ROW}.items():
        assert f"const {name}: usize = {value};" in plan


def test_variants_name_what_there_is(variants):
    everything = [variants.DEFAULT, *variants.VARIANTS]
    assert len({variant.name for variant in everything}) == len(everything)
    known = variants.COMPILED | variants.PLANNED
    for variant in variants.VARIANTS + variants.LEFT_OUT:
        assert variant.settings
        assert all(known[name] != value for name, value in variant.settings.items()), variant.name
        assert set(variant.sizes) <= set(variants.DEFAULT.sizes)
        assert set(variant.cases) <= set(variants.CASES)
        assert re.search(r"\d", variant.expected), f"{variant.name}: a prediction has a number"


def test_grids(variants):
    by_name = {variant.name: variant for variant in variants.VARIANTS} | {"default": variants.DEFAULT}
    sd35, video = (16, 65_536, 132), (16, 4_838_400, 132)
    assert by_name["default"].grid(*sd35) == (16, 256)
    assert by_name["default"].grid(*video) == (132, 2112)
    assert by_name["min_part=8192"].grid(*sd35) == (8, 128)
    assert by_name["blocks=32"].grid(*video) == (264, 4224)
    assert by_name["default"].grid(9, 512, 132) == (0, 2)
    assert by_name["threads=128"].grid(9, 512, 132) == (0, 3)


def test_the_readme_has_what_is_expected_of_each(variants):
    readme = (BENCHES / "README.md").read_text()
    for variant in variants.VARIANTS + variants.LEFT_OUT:
        assert f"| {variant.name} | {variant.expected} |" in readme, "python benches/variants.py prints the table"


@pytest.fixture
def rows(tune):
    """Of loss_f32 at sd35: 20 us forward and 10 us backward cold; the variant "reversed" 2 us less backward."""
    row = tune.Row(
        op="tune loss_f32",
        shape=(16, 16, 64, 64),
        dtype="fp32",
        provider="default",
        pass_="forward",
        p20_us=1.0,
        p50_us=20.0,
        p80_us=99.0,
        repeats=9,
        bytes=2000,
        threads=2,
        cores_elsewhere=0.0,
        timing="graph",
        cache="cold",
        **dict.fromkeys(("device", "torch", "flowdppo_ops", "commit", "environment", "date"), ""),
    )
    both = replace(row, pass_="forward+backward", p50_us=30.0)
    return [row, both, replace(row, provider="reversed"), replace(both, provider="reversed", p50_us=28.0)]


def test_what_came_stands_beside_what_was_expected(variants, rows):
    lines = variants.table(variants.VARIANTS, rows).splitlines()
    (reversed_,) = (line for line in lines if line.startswith("| reversed |"))
    assert reversed_.endswith("| loss_f32 sd35 cold 20.0 + 10.0 -> 20.0 + 8.0 |")
    assert sum(line.endswith("| not measured yet |") for line in lines) == len(variants.VARIANTS) - 1


# ---- compared before it is timed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "factor", "says"),
    [
        ("reversed", 1.0, None),
        ("reversed", 1 + 2**-23, "other bits"),
        ("min_part=2048", 1 + 2**-23, None),
        ("min_part=2048", 1 + 2**-19, "gradient is 1.9e-06 away"),
        ("min_part=2048", float("nan"), "gradient is nan away"),
    ],
)
def test_results_are_the_defaults(tune, variants, name, factor, says):
    operation = importlib.import_module("bench_policy_loss").OPERATIONS["policy_loss"]
    (variant,) = (variant for variant in variants.VARIANTS if variant.name == name)
    wanted = [torch.tensor(1.0), torch.tensor([1.0, 0.5])]
    got = [wanted[0], wanted[1] * factor]
    if says is None:
        tune.compare(variant, operation, wanted, got)
    else:
        with pytest.raises(tune.WrongAnswer, match=says):
            tune.compare(variant, operation, wanted, got)


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_blocks_that_fit(tune):
    assert tune.resident(128, 256) == 2
    assert tune.resident(129, 256) == 1  # registers are handed out to a warp in units of 256
    assert tune.resident(80, 256) == 3
    assert tune.resident(32, 256) == 8
    assert tune.resident(32, 32) == 32
    assert tune.resident(80, 512) == 1


@needs_nvrtc
def test_what_the_compiler_says(tune, monkeypatch, capsys):
    monkeypatch.setattr(tune, "CASES", {"sample": tune.CASES["sample"]})
    monkeypatch.setattr(sys.modules["variants"], "CASES", tune.CASES)
    tune.main(["--compile-only", "--only", "wide_steps=2", "blocks=8"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        [name, f"sde_step_{way}_bf16_f32"] for name in ("default", "wide_steps=2") for way in ("backward", "forward")
    ]  # blocks=8 is the default's image
    registers = {(name, kernel): int(count) for name, kernel, count, *_ in lines[2:]}
    assert registers["wide_steps=2", "sde_step_forward_bf16_f32"] > registers["default", "sde_step_forward_bf16_f32"]


@needs_nvrtc
def test_a_compiler_error_is_shown(variants):
    with pytest.raises(RuntimeError, match=r"sde_step with -DFLOWDPPO_STORES=kNothing: .*\n?.*kNothing"):
        variants.compiled("sde_step", ("-DFLOWDPPO_STORES=kNothing",), "sm_90")


def test_a_kernel_that_moved_is_missed(variants, monkeypatch):
    case = variants.CASES["sample"]._replace(kernel="f8")
    monkeypatch.setattr(variants, "CASES", {"sample": case})
    with pytest.raises(RuntimeError, match=r"sde_step\.cu has no entry points for f8"):
        variants.sources("sde_step")


# ---- launched --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(tune, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2
    assert "no usable CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The stand-in driver, and the kernels that it launches."""
    folder = tmp_path_factory.mktemp("standin")
    return standin.build(folder), standin.build_kernels(folder)


@needs_cxx
@needs_nvrtc
@pytest.mark.skipif(not _native.cuda_images(), reason="built without kernels (FLOWDPPO_KERNELS=none)")
@pytest.mark.parametrize("scenario", ["same_launches", "wrong_answers"])
def test_on_the_stand_in_driver(driver, scenario):
    standin.run(scenario, driver[0], kernels=driver[1], script="tuning.py")
