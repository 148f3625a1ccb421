"""The README and the pages under docs/: their code prints what it says, and their tables are what they were."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import math
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch
from flowdppo_ops._native import METRICS
from torch import Tensor

import flowdppo_ops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_is_shown(page, one_thread):
    """The blocks of a page are one program: a later one goes on where an earlier one ended. All output is shown."""
    blocks = BLOCK.findall(page.read_text())
    names = {}
    for (language, code), (after, shown) in zip(blocks, [*blocks, ("", "")][1:], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        assert_printed(printed.getvalue(), shown if after == "text" else "")


NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def assert_printed(printed: str, shown: str) -> None:
    """Equal, but for one unit in the last digit of a decimal: other processors round otherwise."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for came, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        mantissa, _, exponent = wanted.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(came) - float(wanted)) < 1.5 * unit, printed


@pytest.fixture
def one_thread():
    """Small tensors on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_wrong_number_is_seen():
    assert_printed("ratio 0.53, 3 rows\n", "ratio 0.54, 3 rows\n")
    for wrong in ("ratio 0.55, 3 rows\n", "ratio 0.53, 4 rows\n", "ratio 0.53, 3 rows", "kl 0.53, 3 rows\n"):
        with pytest.raises(AssertionError):
            assert_printed("ratio 0.53, 3 rows\n", wrong)


def test_there_are_pages():
    with_code = {page.name for page in PAGES if any(language == "python" for language, _ in BLOCK.findall(read(page)))}
    assert with_code >= {"README.md", "api.md", "loop.md", "residual.md", "sharding.md"}


def read(page: Path) -> str:
    return page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", read(file), re.MULTILINE) if file.suffix == ".md" else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


# ---- README.md -------------------------------------------------------------------------------------------------------


def test_eager_and_fused_lines_agree():
    """The lines that the README takes out, and those that it puts in, on the same numbers."""
    (block,) = [code for language, code in BLOCK.findall(read(ROOT / "README.md")) if "-ratio = " in code]
    generator = torch.Generator().manual_seed(0)
    sample, old_output, noise = torch.randn(3, 16, 4, 32, 32, generator=generator)
    schedule = {"sigma": torch.tensor(0.6), "sigma_next": torch.tensor(0.5), "noise_level": 0.7}
    step = flowdppo_ops.sde_step(old_output, sample, noise=noise, **schedule)
    change = torch.linspace(0, 0.05, 16)[:, None, None, None]
    results = []
    for sign in "-+":
        output = (old_output + change * noise.flip(0)).requires_grad_()
        scope = {"torch": torch, "math": math, "flowdppo_ops": flowdppo_ops, "sample": sample, "output": output}
        scope |= {"prev_sample": step.prev_sample, "old_mean": step.prev_sample_mean, "old_log_prob": step.log_prob}
        scope |= {"advantages": torch.linspace(1, -1, 16), **schedule}
        exec("\n".join(line[1:] for line in block.splitlines() if line.startswith(sign)), scope)
        scope["loss"].backward()
        results.append((scope["loss"].detach(), output.grad, scope["metrics"]))
    (eager_loss, eager_grad, eager_metrics), (loss, grad, metrics) = results
    assert 0 < metrics["masked_fraction"] < 1
    torch.testing.assert_close(loss, eager_loss)
    torch.testing.assert_close(grad, eager_grad, rtol=1e-4, atol=1e-9)
    assert {name: metrics[name] for name in eager_metrics} == pytest.approx(eager_metrics)


def test_the_doctor_prints_what_the_readme_shows(capsys):
    flowdppo_ops.doctor()
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    (shown,) = [text for _, text in BLOCK.findall(read(ROOT / "README.md")) if text.startswith("backends")]
    for line in shown.splitlines():
        assert line.split()[0] in printed, line


# ---- api.md ----------------------------------------------------------------------------------------------------------


def table_rows(text: str) -> dict[str, list[str]]:
    """By the names in code marks of the first cell."""
    rows = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return {name: cells[1:] for cells in rows for name in re.findall(r"`([\w.]+)`", cells[0])}


def section(page: Path, title: str) -> str:
    return re.split(r"^## ", read(page).split(f"\n## {title}\n", 1)[1], flags=re.MULTILINE)[0]


@pytest.mark.parametrize("function", ["loss", "step_loss", "sde_step", "group_advantages"])
def test_every_argument_and_its_default(function):
    rows = table_rows(section(DOCS / "api.md", function).split("\n| result")[0])
    parameters = signature(getattr(flowdppo_ops, function)).parameters
    assert list(rows) == list(parameters)
    for name, parameter in parameters.items():
        default, needed = rows[name][0], parameter.default is parameter.empty
        if needed:
            assert default == ("required" if parameter.kind is parameter.KEYWORD_ONLY else ""), name
        elif name == "objective":
            assert eval(default.strip("`"), vars(flowdppo_ops)) == parameter.default
        else:
            assert eval(default.strip("`")) == parameter.default, name


@pytest.mark.parametrize("objective", ["FlowDPPO", "FlowGRPO", "GRPOGuard"])
def test_every_field_of_an_objective(objective):
    text = section(DOCS / "api.md", "Objectives").split(f"| `{objective}` | default | meaning |\n", 1)[1]
    rows = table_rows(text.split("\n\n")[0])
    fields = {field.name: field.default for field in dataclasses.fields(getattr(flowdppo_ops, objective))}
    assert {name: eval(cells[0].strip("`")) for name, cells in rows.items()} == fields


def test_every_metric_and_attribute():
    text = section(DOCS / "api.md", "PolicyLoss")
    assert set(table_rows(text.split("| metric |")[1])) == set(METRICS)
    attributes = {name.strip(".") for name in table_rows(text.split("| metric |")[0])}
    assert attributes == {"loss", "log_prob", "log_ratio", "ratio", "kl", "keep"}
    step = section(DOCS / "api.md", "sde_step").split("\n| result")[1]
    assert tuple(table_rows(step)) == flowdppo_ops.SdeStep._fields


# ---- loop.md ---------------------------------------------------------------------------------------------------------


def test_thresholds_of_the_two_rules():
    rows = re.findall(r"^\| .*? \| `(.*?)` \| (\S+) \| (\S+) \|$", read(DOCS / "loop.md"), re.MULTILINE)
    clips = [0, 1e-3, 1e-4]
    assert len(rows) == len(clips)
    for (rule, *cells), c in zip(rows, clips, strict=True):
        for cell, n in zip(cells, (65_536, 256), strict=True):
            value = eval(rule.replace("N c^2 / 2", "N * c**2 / 2"), {"N": n, "c": c})
            assert f"{value:.1e}" == f"{float(cell):.1e}", (rule, n)


def test_numbers_in_the_text_are_those_printed():
    page = read(DOCS / "loop.md")
    printed = {name.strip(): end for name, *end in re.findall(r"^(.*)reward at the end (\S+), .* (\S+)$", page, re.M)}
    assert re.findall(r"0.655 nats ended at (\S+) with (\S+) masked", page) == [tuple(printed[""])]
    shares = re.findall(r"Masking (\d+) to (\d+) % .* masked (\d+) %", page)
    wanted = [printed[name][1] for name in ("", "0.0655 nats", "1e-5 an element")]
    assert [f"0.{int(share):02}" for share in shares[0]] == wanted


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


def own_update(numel: int, dtype: torch.dtype | None, **keep: bool) -> flowdppo_ops.PolicyLoss:
    """A policy compared with itself; the old one is the residual in `dtype`, or its float32 mean."""
    rows = max(256, (1 << 20) // numel)
    schedule = {"sigma": 0.5, "sigma_next": 0.46, "noise_level": 1.0}
    output, sample = torch.randn(2, rows, numel, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(rows, numel, generator=torch.Generator().manual_seed(1))
    step = flowdppo_ops.sde_step(output, sample, noise=noise, residual_dtype=dtype, **schedule)
    old = {"old_prev_sample_mean": step.prev_sample_mean} if dtype is None else {"old_residual": step.residual}
    old |= {"old_log_prob": step.log_prob} if keep["log_prob"] else {}
    return flowdppo_ops.step_loss(output, sample, step.prev_sample, torch.ones(rows), **old, **schedule)


def test_what_the_first_update_shows():
    text = section(DOCS / "residual.md", "What the first update shows")
    exact, *residuals = [line for line in text.splitlines() if line.startswith("| float32") or " residual |" in line]
    assert exact.count("exactly") == 3
    assert not own_update(256, None, log_prob=False).kl.any()
    for log_prob in (False, True):
        assert (own_update(256, None, log_prob=log_prob).ratio == 1).all()
    for line, dtype in zip(residuals, (torch.float16, torch.bfloat16), strict=True):
        kl, deviation = re.fullmatch(r"\|.*\| (\S+) \| exactly 1 \| 1 within (\S+) / sqrt\(N\) \|", line).groups()
        result = own_update(256, dtype, log_prob=True)
        assert (result.ratio == 1).all()
        assert result.kl.mean().item() == pytest.approx(float(kl), rel=0.03)
        measured = own_update(256, dtype, log_prob=False).log_ratio.std().item() * 16
        assert measured == pytest.approx(float(deviation), rel=0.06)  # of 4096 rows: 1.1 %
        if dtype == torch.float16:
            others = re.findall(r"([\d.e-]+) at (?:N = )?([\d,]+)", text)
            assert len(others) == 3
            for value, numel in others:
                assert measured / math.sqrt(int(numel.replace(",", ""))) == pytest.approx(float(value), rel=0.06)


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


# ---- CONTRIBUTING.md -------------------------------------------------------------------------------------------------


def test_named_files_exist():
    text = section(ROOT / "CONTRIBUTING.md", "Where things are")
    for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE):
        folder = ""
        for path in re.findall(r"`(.*?)`", cell):
            folder = path.rpartition("/")[0] or folder
            assert (ROOT / folder / path.rpartition("/")[2]).exists(), path
