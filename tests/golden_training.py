"""A trainer's recorded training step, said through this package, and every recorded case by its name."""

from __future__ import annotations

from typing import Any

import torch
from golden.load import Case
from golden_adapters import (
    ADAPTERS,
    NORMALIZER_ERROR,
    Api,
    Results,
    largest,
    metrics_of,
    schedule_of,
    verl_metrics,
    verl_objective,
)
from golden_compare import grad_of, leaf
from torch import Tensor

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference


def _unirl_training(case: Case, given: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schedule, and the policy's arguments."""
    params, sigmas, index = case.params, given["sigmas"], given["sde_indices"][None]
    if "clip_range" in params:
        objective = FlowGRPO(clip_range=case.number("clip_range"))
    else:
        threshold = case.number("kl_mask_threshold")
        objective = FlowDPPO(kl_mask_threshold=threshold, normalize_kl=params["add_kl_coefficient"])
    schedule = schedule_of(sigmas, index, params["strategy"], case.number("eta"))
    return schedule, {
        "advantages": given["advantages"][:, None].expand(given["old_logp"].shape),
        "old_log_prob": given["old_logp"],
        "objective": objective,
    }


def one_step_training(case: Case, given: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """verl-omni and the guard script: the schedule, and the policy's arguments."""
    params, advantages = case.params, given["advantages"]
    index = torch.tensor(params.get("step_indices", [params["step"]] * len(advantages)))
    if case.group == "f_e2e_verl":
        objective = verl_objective(case, params["loss_mode"])
    else:
        objective = GRPOGuard(clip_range=case.number("clip_range"), adv_clip_max=case.number("adv_clip_max"))
    schedule = schedule_of(given["sigmas"], index, params.get("sde_type", "sde"), params["noise_level"])
    return schedule, {
        "advantages": advantages,
        "old_log_prob": given["old_log_prob"],
        "objective": objective,
        "weights": given.get("rollout_is_weights"),
        "ref_prev_sample_mean": given.get("ref_prev_sample_mean"),
        "ref_kl_weight": float(params.get("config", {}).get("kl_loss_coef", 0)),
    }


def end_to_end(case: Case, api: Api, double: bool, one_call: bool = False, trainers_kl: bool = True) -> Results:
    """A trainer's training step: through `sde_step` and then `loss`, or in one call of `step_loss`.

    With `trainers_kl` the two-call form is given what the trainer takes its KL from: UniRL's own sigma and the means as
    stored, verl-omni's product of the standard deviation with sqrt(-dt) for every sampler.
    """
    given, unirl = case.inputs(double), case.group == "f_e2e_unirl"
    schedule, policy = (_unirl_training if unirl else one_step_training)(case, given)
    flow, sqrt_dt = schedule["sampler"] == "flow_sde", torch.sqrt(schedule["sigma"] - schedule["sigma_next"])
    constant = NORMALIZER_ERROR if double and not unirl and schedule["sampler"] != "cps" else 0.0
    policy["old_log_prob"] = policy["old_log_prob"] - constant
    velocity, latents = leaf(given["noise_pred"]), (given["sample"], given["prev_sample"])
    old_mean = given.get("old_means", given.get("old_prev_sample_mean"))
    row_dims = policy["advantages"].ndim
    step = api.sde_step(velocity, latents[0], prev_sample=latents[1], row_dims=row_dims, **schedule)
    mean, std = step.prev_sample_mean, step.std
    std_dev_t = std / sqrt_dt if flow else std
    if one_call:
        policy |= {"old_prev_sample_mean": old_mean, "ref_std": std_dev_t}
        result = api.step_loss(velocity, *latents, **schedule, **policy)
    else:
        if trainers_kl and unirl:
            std = case.arrays.get("out.sigma_t")  # its formula is d2_unirl_sigma_t
            stored = case.arrays["out.new_means"]
            mean = mean if stored.dtype == torch.float32 else stored
        elif trainers_kl and not flow:
            std = std * sqrt_dt
        result = api.loss(mean, old_mean, log_prob=step.log_prob, std=std, sqrt_dt=sqrt_dt, ref_std=std_dev_t, **policy)
    total = result.loss * (
        case.number("loss_scale") if unirl else 1 / case.params.get("gradient_accumulation_steps", 1)
    )
    script = case.group == "f_e2e_guard_script"
    rename = {"clip_fraction": "clipfrac"} if script else {}
    ours = {
        "out.loss": result.loss if unirl else total,
        "metric.loss": result.loss,
        "metric.policy_loss": result.loss,
        "out.ratio": result.ratio,
        "out.log_prob": result.log_prob + constant,
        "out.new_logp": result.log_prob,
        "out.prev_sample_mean": step.prev_sample_mean,
        "out.new_means": step.prev_sample_mean,
        "out.std_dev_t": std_dev_t,
        "aux.kl_per_sample": result.kl,
        "grad.noise_pred": grad_of(total, velocity),
        **(metrics_of(result, rename=rename) if unirl or script else verl_metrics(result, case.params["loss_mode"])),
    }
    # Here the log-probs come out of a step of ours, so their difference carries the rounding of both.
    ours["size.ppo_kl"] = largest(result.log_prob)
    ours["size.approx_kl"] = ours["size.ppo_kl"] * largest(result.log_ratio)
    if result.kl is not None and mean is step.prev_sample_mean:
        # So does the drift `mu - mu°` of the KL: half an ulp of the mean, in units of sigma.
        unit = 1e-13 if double else 2.0**-23
        mean_in_std = largest(mean) / (std.min() if getattr(policy["objective"], "normalize_kl", True) else 1)
        ours["size.kl"] = torch.sqrt(2 * largest(result.kl) + (unit * mean_in_std) ** 2) * mean_in_std / 24
    return ours


# They take `one_call` as well.
END_TO_END = dict.fromkeys(("f_e2e_unirl", "f_e2e_verl", "f_e2e_guard_script"), end_to_end)


def run(case: Case, through: str, double: bool) -> dict[str, Tensor | None]:
    impl, _, function = through.partition(" ")
    api = {"reference": reference, "fused": flowdppo_ops}[impl]
    if case.group in END_TO_END:
        return END_TO_END[case.group](case, api, double, one_call=function == "step_loss")
    return ADAPTERS[case.group](case, api, double)
