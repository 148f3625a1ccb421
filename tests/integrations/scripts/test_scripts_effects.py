"""What the table of differences says about the scripts and Flow-Factory."""

from __future__ import annotations

import re

import pytest
from differences import effect
from golden.load import load
from scripts_calls import run_script_loss, run_script_step, run_trainer_loss


def numbers(name: str) -> list[float]:
    """In a difference's effect, in order."""
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", effect(name))]


def test_effect_of_the_penalty_without_dt():
    sigmas = load("g_flowgrpo_step__sd3_mid").arrays["in.sigmas"]  # SD3.5's: ten steps, shifted by 3
    times = 1 / (sigmas[:-1] - sigmas[1:])
    smallest, largest, _, last = numbers("penalty without dt")
    assert times[:9].min().item() == pytest.approx(smallest, rel=0.01)
    assert times[:9].max().item() == pytest.approx(largest, rel=0.01)
    assert times[9].item() == pytest.approx(last, rel=0.01)


def test_effect_of_one_drift_for_the_batch():
    case = load("g2_script_loss__guard_per_sample_std")
    norms = [
        run_script_loss(case, strict)["grad.prev_sample_mean"].flatten(1).norm(dim=1).aminmax() for strict in (1, 0)
    ]
    found = [value.item() for pair in norms for value in pair]
    assert found == pytest.approx(numbers("one drift for the batch"), rel=0.02)


def test_effect_of_mixed_token_latents():
    case = load("g_flowgrpo_step__sd3_token_layout_quirk")
    mixed, own = (run_script_step(case, strict)["out.log_prob"] for strict in (True, False))
    wanted = numbers("token latents mixed")
    found = [mixed.max().item(), own.max().item(), own.min().item()]
    assert found == pytest.approx(wanted, rel=0.02)


def test_effect_of_scales_of_other_rows():
    case = load("i2_flowfactory_loss__guard_per_sample_step")
    strict, fixed = (run_trainer_loss(case, strict) for strict in (True, False))
    ratio, own = strict["out.ratio"].flatten(1), fixed["out.ratio"]
    off = (strict["out.loss"] / fixed["out.loss"] - 1).abs().item()
    wanted = numbers("scales and log-probs of different rows")
    assert (ratio / own - 1).abs().max().item() == pytest.approx(wanted[0] / 100, rel=0.02)
    assert off == pytest.approx(wanted[1] / 100, rel=0.05)
