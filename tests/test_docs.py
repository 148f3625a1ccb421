"""The README and the pages under docs/: their code prints what it says, and their tables are what they were."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flowdppo_ops

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_is_shown(page):
    """The blocks of a page are one program: a later one goes on where an earlier one ended."""
    blocks = BLOCK.findall(page.read_text())
    names = {}
    for (language, code), (after, shown) in zip(blocks, [*blocks, ("", "")][1:], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        assert after == "text", f"{page.name}: a python block is followed by its output"
        assert printed.getvalue() == shown


def test_there_are_pages():
    assert sum(language == "python" for page in PAGES for language, _ in BLOCK.findall(page.read_text())) >= 4


# ---- residual.md -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kl_floor():
    spec = importlib.util.spec_from_file_location("kl_floor", DOCS / "kl_floor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed(kl_floor):
    """The table's cells by form, dtype and standard deviation."""
    _, _, rest = kl_floor.PAGE.read_text().partition(kl_floor.BEGIN)
    text, marker, _ = rest.partition(kl_floor.END)
    assert marker, "residual.md has lost its markers"
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert head == ["stored as", "bytes", *(f"std {std}" for std in kl_floor.STDS)]
    assert [line[0] for line in lines] == [f"{form}, {dtype}" for form in kl_floor.FORMS for dtype in kl_floor.DTYPES]
    for name, size, *_ in lines:
        assert int(size) == kl_floor.DTYPES[name.split(", ")[1]].itemsize
    return {
        (*name.split(", "), std): cell
        for name, _, *cells in lines
        for std, cell in zip(kl_floor.STDS, cells, strict=True)
    }


@pytest.mark.parametrize("std", [0.5, 0.2, 0.1, 0.05])
def test_table_is_what_other_noise_gives(kl_floor, printed, std):
    """Within half a unit of the last digit and five standard errors: about 2 % in all.

    A standard error is 0.22 % of the value for the 64 x 16384 elements drawn here, and half of that for the table's.
    """
    for (form, dtype), floor in kl_floor.floors(std, numel=kl_floor.NUMEL // 4, seed=1).items():
        cell, what = printed[form, dtype, std], f"{form}, {dtype} at {std}: {floor}"
        if cell == "below 1e-12":
            assert 0 <= floor.kl < kl_floor.NOTHING, what
        else:
            last_digit = 10.0 ** (math.floor(math.log10(float(cell))) - 2)
            assert floor.error < 0.005 * floor.kl, what
            assert abs(floor.kl - float(cell)) <= 0.5 * last_digit + 5 * math.hypot(floor.error, floor.error / 2), what


def test_what_the_page_says_about_the_table(kl_floor, printed):
    for std in kl_floor.STDS:
        assert float(printed["residual", "fp16", std]) < 1e-7
        assert printed["mean", "fp32", std] == printed["model output", "fp32", std] == "below 1e-12"
        assert float(printed["mean", "fp16", std]) < 1e-5
        assert (float(printed["mean", "bf16", std]) > 1e-5) == (std < 0.3)
    output = [float(printed["model output", "bf16", std]) for std in kl_floor.STDS]
    assert output == sorted(output, reverse=True)


def test_an_output_stored_as_it_came_costs_nothing(kl_floor):
    """A bfloat16 output against itself: no drift at all, whatever the rounding of the mean."""
    import flowdppo_ops

    generator = torch.Generator().manual_seed(0)
    output, sample, noise = (torch.randn(4, 256, generator=generator) for _ in range(3))
    schedule = {"sigma": 0.5, "sigma_next": 0.4, "noise_level": 1.0}
    output = output.bfloat16()
    step = flowdppo_ops.sde_step(output, sample, noise=noise, **schedule)
    result = flowdppo_ops.step_loss(
        output, sample, step.prev_sample, torch.ones(4), old_model_output=output.clone(), **schedule
    )
    assert result.kl.tolist() == [0.0] * 4
    assert result.ratio.tolist() == [1.0] * 4


# ---- trainers.md: floors of the first update -------------------------------------------------------------------------


Change = Callable[[Tensor], Tensor]


def first_update(output: Change, **changes: Change) -> tuple[float, float]:
    """`approx_kl` and `kl_new_old_mean` where the update's output is changed, or what the rollout stored."""
    generator = torch.Generator().manual_seed(3)
    sample, own, noise = torch.randn(3, 16, 65536, generator=generator)
    schedule = {"sigma": 0.8, "sigma_next": 0.7, "noise_level": 0.7}
    step = flowdppo_ops.sde_step(own, sample, noise=noise, residual_dtype=torch.float16, **schedule)
    assert step.std[0].item() == pytest.approx(0.44, abs=5e-3)
    stored = {"sample": sample, "old_log_prob": step.log_prob, "old_prev_sample_mean": step.prev_sample_mean}
    for name, change in changes.items():
        stored[name] = change(step.residual if name == "old_residual" else stored.get(name))
    if "old_residual" in stored:
        del stored["old_prev_sample_mean"]
    new, sample = output(own), stored.pop("sample")
    metrics = flowdppo_ops.step_loss(new, sample, step.prev_sample, torch.ones(16), **stored, **schedule).metrics()
    return metrics["approx_kl"], metrics["kl_new_old_mean"]


def off_by_2_percent(output: Tensor) -> Tensor:
    return output * (1 + 0.02 * (2 * torch.rand(output.shape, generator=torch.Generator().manual_seed(4)) - 1))


FIRST_UPDATES = {
    "nothing": (torch.clone, {}),
    "the old policy as a float16 residual": (torch.clone, {"old_residual": torch.clone}),
    "the old mean stored in float16": (torch.clone, {"old_prev_sample_mean": Tensor.half}),
    "the old mean stored in bfloat16": (torch.clone, {"old_prev_sample_mean": Tensor.bfloat16}),
    "the old log-prob stored in bfloat16": (torch.clone, {"old_log_prob": Tensor.bfloat16}),
    "the sample stored in bfloat16": (torch.clone, {"sample": Tensor.bfloat16}),
    "the model output rounded to bfloat16": (Tensor.bfloat16, {}),
    "the model output off by up to 2 %": (off_by_2_percent, {}),
}


@pytest.mark.parametrize("name", FIRST_UPDATES)
def test_floors_of_a_first_update(name):
    """As the table says, but for half of it: approx_kl is that of 16 rows."""
    page = (DOCS / "trainers.md").read_text()
    (cells,) = re.findall(rf"^\| {re.escape(name)}[^|]*\| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    output, changes = FIRST_UPDATES[name]
    for cell, found, apart in zip(map(float, cells), first_update(output, **changes), (3.0, 1.1), strict=True):
        assert found == 0 if cell == 0 else cell / apart <= found <= cell * apart
