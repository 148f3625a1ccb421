"""docs/trainers.md: its table is complete, and its diffs do what they replace.

The lines they add run on recorded calls. Where an environment variable gives a trainer's checkout, the lines they take
out are found in it, and the file before and after runs on the same numbers.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from differences import differences
from golden.load import Case, load, names
from golden_compare import differing, leaf
from torch import Tensor
from trainers.flow_factory import stand_in

from flowdppo_ops.integrations import flow_factory, flow_grpo

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "trainers.md").read_text()

# Where a diff's file lies -> the environment variable with the checkout.
CHECKOUTS = {
    "src/": "FLOWDPPO_OPS_FLOW_FACTORY",
    "scripts/": "FLOWDPPO_OPS_FLOW_GRPO",
    "flow_grpo/diffusers_patch/": "FLOWDPPO_OPS_FLOW_GRPO",
    "flow_grpo/": "FLOWDPPO_OPS_MILES",
    "miles/": "FLOWDPPO_OPS_MILES",
}


class Hunk(NamedTuple):
    first: int  # lines of the trainer's file, from 1, both taken out
    last: int
    removed: list[str]
    added: list[str]


class Diff(NamedTuple):
    file: str
    hunks: list[Hunk]

    @property
    def added(self) -> str:
        return "\n".join(line for hunk in self.hunks for line in hunk.added)


@cache
def diffs() -> list[Diff]:
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        header, *lines = block.splitlines()
        if not header.startswith("--- "):  # of a configuration, not of a file's lines
            continue
        hunks: list[Hunk] = []
        for line in lines:
            if place := re.fullmatch(r"@@ lines? (\d+)(?: to (\d+))? @@", line):
                hunks.append(Hunk(int(place[1]), int(place[2] or place[1]), [], []))
            else:
                assert line[0] in "+-", line
                (hunks[-1].added if line[0] == "+" else hunks[-1].removed).append(line[1:])
        found.append(Diff(header.removeprefix("--- "), hunks))
    return found


def diff(function: str) -> Diff:
    (found,) = [one for one in diffs() if f"loss, values = {function}(" in one.added]
    return found


def loss_lines(one: Diff) -> str:
    return "\n".join(one.hunks[-1].added)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_entries_are_complete():
    found = differences()
    assert len({one.name for one in found}) == len(found) >= 20
    assert all(all(one) for one in found)


def test_every_module_has_a_section():
    modules = {path.stem for path in (DOCS.parent / "python/flowdppo_ops/integrations").glob("[a-z]*.py")}
    for module in modules:
        assert f"flowdppo_ops.integrations.{module}" in PAGE or f"integrations import {module}" in PAGE


# ---- what is added runs ----------------------------------------------------------------------------------------------


def script_scope(case: Case, given: dict[str, Tensor]) -> dict[str, Any]:
    """What is in scope at the loss of a script, under its names."""
    config = {name: case.params[name] for name in ("clip_range", "adv_clip_max", "beta")}
    one_step = {"log_probs": "old_log_prob", "advantages": "advantages", "prev_sample_mean": "old_prev_sample_mean"}
    return {
        "torch": torch,
        "config": SimpleNamespace(train=SimpleNamespace(**config), rationorm=case.params["rationorm"]),
        "sample": {theirs: given[ours][:, None] for theirs, ours in one_step.items()},
        "j": 0,
        "info": defaultdict(list),
        **{name: given[name] for name in ("log_prob", "prev_sample_mean", "std_dev_t", "sqrt_dt")},
        **({"prev_sample_mean_ref": given["ref_prev_sample_mean"]} if "ref_prev_sample_mean" in given else {}),
        "grpo_loss": flow_grpo.grpo_loss,
        "guard_loss": flow_grpo.guard_loss,
    }


def trainer_scope(case: Case, given: dict[str, Tensor], kl_type: str = "v-based", kl_beta: float = 0.0) -> dict:
    """The same of Flow-Factory. `noise_pred` and the reference's results are made of what there is."""
    arguments = {name: case.params[name] for name in ("clip_range", "adv_clip_range")}
    output = SimpleNamespace(
        log_prob=given["log_prob"],
        next_latents_mean=given["prev_sample_mean"],
        noise_pred=given["prev_sample_mean"] * 2,
        std_dev_t=given["std_dev_t"],
        dt=given["dt"],
    )
    ref = SimpleNamespace(next_latents_mean=given["old_prev_sample_mean"], noise_pred=given["old_prev_sample_mean"])
    return {
        "torch": torch,
        "output": output,
        "old_log_prob": given["old_log_prob"],
        "batch": {"advantage": given["advantages"], "next_latents_mean": given["old_prev_sample_mean"][:, None]},
        "callback_index_map": [0],
        "timestep_index": 0,
        "forward_inputs": {},
        "ref_output": ref,
        "loss_info": defaultdict(list),
        "self": SimpleNamespace(
            training_args=SimpleNamespace(**arguments, kl_type=kl_type, kl_beta=kl_beta),
            enable_kl_loss=kl_beta > 0,
            adapter=SimpleNamespace(forward=lambda **_: ref, use_ref_parameters=contextlib.nullcontext),
        ),
    }


def leaves(case: Case) -> dict[str, Tensor]:
    given = case.inputs(False)
    return given | {name: leaf(given[name]) for name in ("log_prob", "prev_sample_mean")}


def outcome(scope: dict[str, Any], given: dict[str, Tensor], log: str) -> dict[str, Tensor | None]:
    """The loss, its gradients, and the values that were logged."""
    loss = scope["loss"]
    found = {f"metric.{name}": value for name, (value,) in scope[log].items()}
    for name in ("log_prob", "prev_sample_mean"):
        found[f"grad.{name}"] = torch.autograd.grad(loss, given[name], retain_graph=True, allow_unused=True)[0]
    return {"out.loss": loss.detach(), **{name: v if v is None else v.detach() for name, v in found.items()}}


@pytest.mark.parametrize("name", names("g2_script_loss"))
def test_losses_of_the_scripts(name):
    case = load(name)
    given = leaves(case)
    scope = script_scope(case, given)
    exec(loss_lines(diff("guard_loss" if case.params["rationorm"] else "grpo_loss")), scope)
    ours = outcome(scope, given, "info")
    want = {key: value for key, value in case.recorded(False).items() if key in ours}
    assert not differing(ours, want, case)
    logged = {key for key in case.recorded(False) if key.startswith("metric.")}
    assert {key for key in ours if key.startswith("metric.")} == logged


@pytest.mark.parametrize("name", names("i2_flowfactory_loss"))
def test_losses_of_flow_factory(name):
    case = load(name)
    given = leaves(case)
    scope = trainer_scope(case, given)
    exec(loss_lines(diff("fused.guard_loss" if "guard" in name else "fused.grpo_loss")), scope)
    ours = outcome(scope, given, "loss_info")
    want = {key: value for key, value in case.recorded(False).items() if key in ours}
    assert want.keys() >= {"out.loss", "grad.log_prob", "metric.clip_frac_high"}
    assert not differing(ours, want, case)


def test_what_is_imported_is_there():
    lines = [
        line for one in diffs() for line in one.added.splitlines() if re.match(r"(from|import) flowdppo_ops", line)
    ]
    assert len(lines) >= 8
    for line in lines:
        exec(line, {})


def test_enabling_flow_factory():
    (one,) = [one for one in diffs() if one.file == "src/flow_factory/train.py"]
    with stand_in():
        try:
            exec("\n".join(line for line in one.added.splitlines() if not line.startswith("from .")), {})
            assert flow_factory.enabled()
        finally:
            flow_factory.disable()


# ---- what is taken out is there, and does the same -------------------------------------------------------------------


def checkout(file: str) -> Path:
    variable = next(variable for prefix, variable in CHECKOUTS.items() if file.startswith(prefix))
    if variable not in os.environ:
        pytest.skip(f"{variable} gives no checkout")
    return Path(os.environ[variable]) / file


def applied(one: Diff, source: str) -> str:
    """The file with the diff; what it says it takes out is what it takes out."""
    lines = source.splitlines()
    for hunk in reversed(one.hunks):
        there = lines[hunk.first - 1 : hunk.last]
        if hunk.removed[1:-1] == ["..."]:
            assert [there[0].strip(), there[-1].strip()] == [hunk.removed[0], hunk.removed[-1]]
        else:
            assert [line.strip() for line in there] == hunk.removed
        indentation = there[0][: len(there[0]) - len(there[0].lstrip())]
        added = textwrap.indent("\n".join(hunk.added), indentation)
        lines[hunk.first - 1 : hunk.last] = added.splitlines()
    return "\n".join(lines) + "\n"


def before_the_backward(source: str) -> list[list[ast.stmt]]:
    """Of each training loop in a file: the statements between the model's forward and the backward."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.With) or "accumulate(" not in ast.unparse(node.items[0]):
            continue
        said = [ast.unparse(statement) for statement in node.body]
        end = next(i for i, text in enumerate(said) if text.startswith(("accelerator.back", "self.accelerator.back")))
        forwards = ("with autocast()", "output = self.adapter.forward")
        start = next(i for i, text in enumerate(said) if text.startswith(forwards))
        found.append(node.body[start + 1 : end])
    return found


@pytest.mark.parametrize("one", diffs(), ids=lambda one: f"{one.file}-{one.hunks[0].first}")
def test_diff_applies(one):
    path = checkout(one.file)
    if not path.exists():
        pytest.skip(f"{one.file} is not in that checkout")
    ast.parse(applied(one, path.read_text()))


def run_statements(statements: list[ast.stmt], scope: dict[str, Any]) -> dict[str, Any]:
    exec(compile(ast.Module(statements, []), "<trainer>", "exec"), scope)
    return scope


@pytest.mark.parametrize("name", names("g2_script_loss"))
def test_the_script_before_and_after(name):
    case = load(name)
    one = diff("guard_loss" if case.params["rationorm"] else "grpo_loss")
    source = checkout(one.file).read_text()
    results = []
    for text in (source, applied(one, source)):
        given = leaves(case)
        (statements,) = before_the_backward(text)
        results.append(outcome(run_statements(statements, script_scope(case, given)), given, "info"))
    assert results[0].keys() == results[1].keys()
    assert not differing(results[1], results[0], case)


@pytest.mark.parametrize("penalty", [("v-based", 0.0), ("v-based", 0.04), ("x-based", 0.04)], ids=str)
@pytest.mark.parametrize("name", names("i2_flowfactory_loss"))
def test_flow_factory_before_and_after(name, penalty):
    case, is_guard = load(name), "guard" in name
    one = diff("fused.guard_loss" if is_guard else "fused.grpo_loss")
    source = checkout(one.file).read_text()
    results = []
    for text in (source, applied(one, source)):
        given = leaves(case)
        statements = before_the_backward(text)[is_guard]
        results.append(outcome(run_statements(statements, trainer_scope(case, given, *penalty)), given, "loss_info"))
    assert results[0].keys() == results[1].keys()
    assert not differing(results[1], results[0], case)


def test_checkouts_are_looked_for():
    """So that a skip is a skip for want of a checkout, not of a diff."""
    assert len(diffs()) >= 8
    assert {variable for one in diffs() for prefix, variable in CHECKOUTS.items() if one.file.startswith(prefix)}
    assert importlib.util.find_spec("flowdppo_ops") is not None
