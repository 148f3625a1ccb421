"""Calls of verl-omni's entry points, recorded and made, and how they are compared."""

from __future__ import annotations

from typing import Any

import torch
from golden.load import Case
from golden_adapters import largest
from golden_compare import disagreements, leaf
from golden_differences import NOT_OURS
from torch import Tensor
from trainers import verl_omni as trainer

LOSSES = {"b_verl_flowdppo": "flow_dppo", "c_verl_flowgrpo": "flow_grpo", "c_verl_guard": "grpo_guard"}


def as_metrics(metrics: dict[str, float]) -> dict[str, Tensor]:
    assert all(type(value) is float for value in metrics.values())
    return {f"metric.{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def compare(case: Case, double: bool, ours: dict[str, Any], expected: dict[str, Any], hidden: str = "aux.") -> None:
    parameters = [k for k in NOT_OURS if k != "out.sqrt_dt"]  # which the scheduler's step returns
    recorded = {k: v for k, v in case.recorded(double).items() if not k.startswith(hidden) and k not in parameters}
    expected = {k: v for k, v in expected.items() if k in recorded}
    assert {k for k in ours if k.startswith("metric.")} == {k for k in recorded if k.startswith("metric.")}
    wrong = disagreements(case, ours, recorded | expected, double)
    assert not wrong, f"{case.name}: {case.meta['note']}"


def run_micro_batch(case: Case) -> tuple[dict[str, Any], Tensor]:
    """Adapter, worker's loss and gradient of a recorded micro-batch, as `forward_step` has them, and the gradient."""
    given, params = case.inputs(False), case.params
    velocity = leaf(given["noise_pred"])
    step = trainer.scheduler(given["sigmas"], given["timesteps"]).sample_previous_step(
        sample=given["sample"],
        model_output=velocity,
        timestep=given["timestep"],
        noise_level=params["noise_level"],
        prev_sample=given["prev_sample"],
        sde_type=params["sde_type"],
        return_sqrt_dt=True,
    )
    model_output = dict(zip(("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt"), step[1:], strict=True))
    settings = {k: _parsed(v) for k, v in params["config"].items()} | {"loss_mode": params["loss_mode"]}
    data = {"old_log_probs": given["old_log_prob"], "advantages": given["advantages"]}
    optional = ("old_prev_sample_mean", "ref_prev_sample_mean", "rollout_is_weights")
    data |= {name: given[name] for name in optional if name in given}
    loss, metrics = trainer.diffusion_loss(
        trainer.config(**settings), model_output, data, params["gradient_accumulation_steps"]
    )
    (grad,) = torch.autograd.grad(loss, velocity)
    numbers = {k: getattr(v, "values", [v])[0] for k, v in metrics.items() if k != "kl_coef"}
    ours = {"out.loss": loss, "grad.noise_pred": grad, **as_metrics(numbers)}
    ours |= {
        "out.log_prob": step[1],
        "out.prev_sample_mean": step[2],
        "out.std_dev_t": step[3],
        "out.sqrt_dt": step[4],
        "size.ppo_kl": largest(step[1]),
        "size.ratio_std": torch.ones(()),
    }
    log_ratio = largest(step[1].detach() - given["old_log_prob"])
    ours["size.approx_kl"] = ours["size.ppo_kl"] * log_ratio
    return ours, metrics


def _parsed(value: str) -> Any:
    return {"True": True, "False": False}.get(value) if value in ("True", "False") else float(value)


ROWS = 3


def given_loss(shape: tuple[int, ...] = (ROWS, 4, 5), **changes: Any) -> dict[str, Any]:
    """Arguments of the losses that see means, of rows of KL 0.005 at `std_dev_t` 0.5 and `sqrt_dt` 0.2."""
    generator = torch.Generator().manual_seed(1)
    ones = (1,) * (len(shape) - 1)
    mean = torch.randn(shape, generator=generator)
    arguments = {
        "old_log_prob": torch.zeros(ROWS),
        "log_prob": torch.tensor([0.1, -0.1, 0.2]).requires_grad_(),
        "advantages": torch.tensor([1.0, -2.0, -1.0]),
        "config": trainer.config(),
        "old_prev_sample_mean": mean.detach() + 0.01,
        "prev_sample_mean": mean.requires_grad_(),
        "std_dev_t": torch.full((shape[0], *ones), 0.5),
        "sqrt_dt": torch.full((ROWS,), 0.2),
    }
    return arguments | changes


def ran_own(call: Any) -> bool:
    """Whether the trainer's own function ran; its errors count, when it is the trainer itself."""
    try:
        _, metrics = call()
    except Exception:
        if not trainer.is_real():
            raise
        return True
    return trainer.is_real() or "own" in metrics
