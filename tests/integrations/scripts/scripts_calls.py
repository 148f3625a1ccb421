"""The recorded calls of flow_grpo, the GRPO-Guard script and Flow-Factory, through the integrations' own functions.

With `strict=True` every recorded number is reproduced, shapes included; with `strict=False` it is what
`golden_differences.DIFFERENCES` lists.
"""

from __future__ import annotations

from typing import Any

import torch
from golden.load import Case
from golden_compare import grad_of, leaf
from torch import Tensor

from flowdppo_ops.integrations import flow_factory, flow_grpo

Results = dict[str, Tensor | None]

# An input, and what the scripts keep to themselves: it shows in the loss.
NOT_RETURNED = {"out.ratio_mean_bias", "out.ratio"}


def expected(case: Case, double: bool, *left_out: str) -> Results:
    return {key: value for key, value in case.recorded(double).items() if key not in left_out}


class Scheduler:
    """What a step may ask of diffusers' scheduler. Not `index_for_timestep`, which waits for the device."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.sigmas, self.timesteps = given["sigmas"], given["timesteps"]


def script_step(case: Case, given: dict[str, Tensor], model_output: Tensor, strict: bool) -> tuple[Tensor, ...]:
    latents = (model_output, given["timestep"], given["sample"])
    scheduler, noise_level, prev_sample = Scheduler(given), case.number("noise_level"), given["prev_sample"]
    upstream = case.meta["upstream"]
    if upstream["file"].startswith("miles/"):
        return flow_grpo.miles_sde_step_with_logprob(scheduler, *latents, prev_sample, noise_level)
    if upstream["project"] == "flow_grpo":
        return flow_grpo.sde_step_with_logprob(
            scheduler, *latents, noise_level=noise_level, prev_sample=prev_sample, strict=strict
        )
    return flow_grpo.guard_sde_step_with_logprob(
        scheduler,
        *latents,
        noise_level=noise_level,
        prev_sample=prev_sample,
        sde_type=case.params.get("sde_type", "sde"),
        return_sqrt_dt=True,
    )


def run_script_step(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    model_output = leaf(given["model_output"])
    results = script_step(case, given, model_output, strict)
    scores = (results[1] * given["w"]).sum()
    return {
        **dict(zip(("in.prev_sample", "out.log_prob", "out.prev_sample_mean", "out.std_dev_t"), results, strict=False)),
        "out.sqrt_dt": results[4] if len(results) == 5 else None,
        "grad.model_output": grad_of(scores, model_output),
        "grad_j2.model_output": grad_of(scores + 0.5 * (results[2] ** 2).sum(), model_output),
    }


def script_loss(case: Case, given: dict[str, Tensor], strict: bool, **more: Any) -> tuple[Tensor, flow_grpo.Info]:
    config = {"clip_range": case.number("clip_range"), "adv_clip_max": case.number("adv_clip_max")}
    penalty = {"beta": case.params.get("beta", 0.0), "ref_prev_sample_mean": given.get("ref_prev_sample_mean")}
    policy = [given[name] for name in ("log_prob", "old_log_prob", "advantages")]
    step = {name: given[name] for name in ("prev_sample_mean", "std_dev_t", "sqrt_dt")}
    if case.params.get("rationorm", True):
        step["old_prev_sample_mean"] = given["old_prev_sample_mean"]
        return flow_grpo.guard_loss(*policy, **step, **config, **penalty, strict=strict)
    return flow_grpo.grpo_loss(*policy, **step, **config, **penalty, strict=strict)


def run_script_loss(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    given |= {name: leaf(given[name]) for name in ("log_prob", "prev_sample_mean")}
    loss, info = script_loss(case, given, strict)
    return {
        "out.loss": loss.detach(),
        "out.policy_loss": info["policy_loss"],
        **{f"metric.{name}": value for name, value in info.items()},
        **{f"grad.{name}": grad_of(loss, given[name]) for name in ("log_prob", "prev_sample_mean")},
    }


def trainer_loss(case: Case, given: dict[str, Tensor], strict: bool | None) -> tuple[Tensor, flow_factory.Info]:
    policy = [given[name] for name in ("log_prob", "old_log_prob", "advantages")]
    config = {"clip_range": tuple(case.params["clip_range"]), "adv_clip_range": tuple(case.params["adv_clip_range"])}
    if "guard" not in case.name:
        return flow_factory.grpo_loss(*policy, **config)
    step = {name: given[name] for name in ("std_dev_t", "dt")}
    means = {
        "next_latents_mean": given["prev_sample_mean"],
        "old_next_latents_mean": given["old_prev_sample_mean"],
    }
    return flow_factory.guard_loss(*policy, **means, **step, **config, strict=strict)


def run_trainer_loss(case: Case, strict: bool) -> Results:
    given = case.inputs(False)
    given |= {name: leaf(given[name]) for name in ("log_prob", "prev_sample_mean")}
    loss, info = trainer_loss(case, given, strict)
    assert not any(value.requires_grad for value in info.values())
    assert torch.equal(info["loss"], loss.detach())
    assert info["unclipped_loss"].shape == info["clipped_loss"].shape == info["ratio"].shape
    worst = torch.maximum(info["unclipped_loss"], info["clipped_loss"]).mean()
    assert torch.allclose(worst, info["policy_loss"], rtol=1e-6)
    return {
        "out.loss": loss.detach(),
        "out.ratio": info["ratio"],
        **{f"metric.{name}": value for name, value in info.items()},
        **{f"grad.{name}": grad_of(loss, given[name]) for name in ("log_prob", "prev_sample_mean")},
    }
