"""With FLOWDPPO_OPS_VERL_OMNI naming a checkout, and a Python that has what verl-omni needs, the tests of this folder
run on the trainer itself, in a process of their own, and so do its tests of losses, registry and configuration."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import verl_omni as trainer

import flowdppo_ops

FOLDER = Path(__file__).parent
TESTS = FOLDER.parents[1]
CHECKOUT = os.environ.get("FLOWDPPO_OPS_VERL_OMNI", "")


NEEDS = ("diffusers", "hydra", "tensordict", "verl")
THEIR_TESTS = """
    tests/trainer/diffusion/test_diffusion_core_algos_on_cpu.py
    tests/trainer/diffusion/test_diffusion_registry_on_cpu.py
    tests/trainer/diffusion/test_rollout_correction_on_cpu.py
    tests/trainer/diffusion/test_diffusion_distillation_losses_on_cpu.py
    tests/workers/config/test_diffusion_config_on_cpu.py
"""


def why_not() -> str:
    if trainer.is_real():
        return "this process is the one that it starts"
    if not CHECKOUT:
        return "FLOWDPPO_OPS_VERL_OMNI does not name a checkout of verl-omni"
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    return f"verl-omni needs {', '.join(missing)}, which this Python has not" if missing else ""


real = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there")


def _pytest(directory: Path | str, *arguments: str, **environment: str) -> dict[str, str]:
    """Test -> outcome, of pytest in a process that has the trainer."""
    path = os.pathsep.join([str(Path(flowdppo_ops.__file__).parents[1]), str(TESTS / "trainers")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bare_verl_omni", "-p", "no:cacheprovider", "-v", "-rN", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    outcomes = dict(re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", run.stdout, re.MULTILINE))
    assert outcomes, run.stdout + run.stderr
    return outcomes


@real
@pytest.mark.parametrize("strict", ["1", "0"])
def test_the_trainers_own_tests_say_the_same(strict):
    """With the integration as without it; those that need what is not installed fail both times."""
    without = _pytest(CHECKOUT, *THEIR_TESTS.split())
    enabled = _pytest(CHECKOUT, *THEIR_TESTS.split(), FLOWDPPO_OPS_INTEGRATE="1", FLOWDPPO_OPS_STRICT=strict)
    assert enabled == without
    assert list(without.values()).count("PASSED") > 60


@real
def test_all_of_this_holds_for_the_trainer_itself():
    outcomes = _pytest(TESTS.parent, str(FOLDER.relative_to(TESTS.parent)))
    assert {name for name, outcome in outcomes.items() if outcome not in ("PASSED", "SKIPPED")} == set()
    assert list(outcomes.values()).count("PASSED") > 300
