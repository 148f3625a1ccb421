"""Every recorded call of the public trainers, through this package.

`golden_adapters.py` says each call in our terms, `golden_compare.py` how closely it must agree, and
`golden_differences.py` what does not and why. A case runs in float32 against the recorded numbers and, where the
trainer's function was also run in double precision, in float64 against those.
"""

from __future__ import annotations

import itertools
from typing import Any

import golden_adapters as adapters
import pytest
from golden.load import Case, load, names
from golden_compare import allowed, disagreements, mismatch, size_of
from golden_differences import DIFFERENCES, HANGS_ON_KL, KL_MEAN, NOT_OURS, STEP_LOSS_DIFFERENCES, Expected
from golden_training import END_TO_END, end_to_end, run

from flowdppo_ops import reference


def compare(case: Case, double: bool, ours: dict[str, Any], expected: Expected) -> None:
    """All that was recorded, with `expected` in the place of what is listed as different."""
    recorded = {key: value for key, value in case.recorded(double).items() if key not in NOT_OURS}
    assert not recorded.keys() - ours.keys(), "recorded results that the adapter does not return"
    wrong = disagreements(case, ours, recorded | expected, double)
    assert not wrong, f"{case.name}: {case.meta['note']}"


def _drives(impl: str) -> list[Any]:
    """Every case through the reference, and with `--impl fused` through the public functions too."""
    drives = []
    for name, api in itertools.product(names(), dict.fromkeys(("reference", impl))):
        group, ways = name.split("__")[0], [api]
        if group in END_TO_END and name not in STEP_LOSS_DIFFERENCES:
            ways.append(f"{api} step_loss")
        for through in ways:
            drives.append(pytest.param(name, through, False, id=f"{name}-{through}"))
            # UniRL's double run keeps its float32 sigma in the KL, so it is none for `step_loss`.
            if load(name).has_double() and not (through.endswith("step_loss") and group == "f_e2e_unirl"):
                drives.append(pytest.param(name, through, True, id=f"{name}-{through}-double"))
    return drives


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "through" in metafunc.fixturenames:
        metafunc.parametrize(("name", "through", "double"), _drives(metafunc.config.getoption("--impl")))


def test_agrees_with_the_recorded_trainer(name: str, through: str, double: bool) -> None:
    case, difference = load(name), DIFFERENCES.get(name)
    if difference is None:
        assert case.meta["raises"] is None, "upstream raises: list what ours does"
        compare(case, double, run(case, through, double), {})
    elif difference.raises:
        with pytest.raises(ValueError, match=difference.raises):
            run(case, through, double)
    else:
        compare(case, double, run(case, through, double), difference.ours(case, double))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_listed_difference_is_one(name: str) -> None:
    """A listed case does differ from the recorded one, so that the list cannot outlive its reasons."""
    case, difference = load(name), DIFFERENCES[name]
    if difference.raises:  # `test_agrees_with_the_recorded_trainer` sees ours raise; upstream must do something else
        assert (case.meta["raises"] or {}).get("type") != "ValueError"
        return
    ours, recorded = run(case, "reference", False), case.recorded(False)
    wanted = {key: recorded.get(key) for key in difference.ours(case, False)}
    assert disagreements(case, ours, wanted, False), f"agrees: {difference.reason}"


@pytest.mark.parametrize("name", STEP_LOSS_DIFFERENCES)
def test_step_loss_differs_in_the_kl_alone(name: str) -> None:
    case = load(name)
    ours = run(case, "reference step_loss", False)
    for key, want in case.recorded(False).items():
        if key in NOT_OURS:
            continue
        wrong = mismatch(key, ours[key], want, allowed(case, key, want, ours, False))
        if key in KL_MEAN:
            assert wrong, f"{key} agrees: {STEP_LOSS_DIFFERENCES[name]}"
        elif not any(part in key for part in HANGS_ON_KL):
            assert not wrong


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for group in END_TO_END for name in names(group)])
def test_step_loss_is_sde_step_and_loss(name: str, double: bool) -> None:
    """With the transition's own standard deviation the two ways give the same, recorded or not."""
    case = load(name)
    one = run(case, "reference step_loss", double)
    two = end_to_end(case, reference, double, trainers_kl=False)
    assert one.keys() == two.keys()
    for key, want in two.items():
        allowed = 0.0 if want is None else (1e-13 if double else 2.0**-23) * size_of(key, want, two)
        assert not mismatch(key, one[key], want, allowed)


def test_every_case_is_driven_and_every_listed_name_exists() -> None:
    stems = set(names())
    groups = {*adapters.ADAPTERS, *END_TO_END}
    assert len(stems) == 274
    assert {stem.split("__")[0] for stem in stems} == groups
    assert stems >= DIFFERENCES.keys() | STEP_LOSS_DIFFERENCES.keys()
    for through in ("reference", "fused"):
        assert {drive.values[0] for drive in _drives("fused") if drive.values[1] == through} == stems
    recorded = {key for stem in stems for key in load(stem).recorded(False)}
    assert recorded >= NOT_OURS.keys()
