"""How each recorded trainer function is said through this package.

`ADAPTERS[group](case, api, double)` runs a case and returns our results under the names of the recorded ones. `api`
holds the functions under test: `flowdppo_ops`, or its `reference`. What a trainer calls differently (names, a standard
deviation without sqrt(-dt), a biased deviation of the ratios, ...) is converted here, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from golden.load import Case
from golden_compare import grad_of, leaf
from torch import Tensor

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, PolicyLoss

Results = dict[str, Tensor | None]
Api = Any

# flow_grpo, verl-omni and Flow-Factory hold log(sqrt(2 pi)) as a float32 tensor, which stays float32 when the rest is
# double. The two constants round to the same float32 number, so this only shows in double precision.
NORMALIZER_ERROR = math.log(math.sqrt(2 * math.pi)) - torch.tensor(math.sqrt(2 * math.pi)).log().double().item()

SAMPLERS = {
    **dict.fromkeys(("flow", "FlowSDEStrategy", "sde", "Flow-SDE"), "flow_sde"),
    **dict.fromkeys(("dance", "DanceSDEStrategy", "dance_sde", "Dance-SDE"), "dance_sde"),
    **dict.fromkeys(("cps", "CPSSDEStrategy", "CPS"), "cps"),
}
_VERL_CLIP_NAMES = {
    "clip_fraction": "pg_clipfrac",
    "clipfrac_gt_one": "pg_clipfrac_higher",
    "clipfrac_lt_one": "pg_clipfrac_lower",
}


def largest(value: Tensor) -> Tensor:
    value = value.detach().double().abs()
    return value[torch.isfinite(value)].max() if torch.isfinite(value).any() else torch.zeros(())


def metrics_of(result: PolicyLoss, prefix: str = "", rename: dict[str, str] | None = None) -> Results:
    """The metrics, and under `size.*` the magnitude a metric is a small difference of, for the tolerances."""
    rename = rename or {}
    values = {
        f"metric.{prefix}{rename.get(k, k)}": torch.tensor(v, dtype=torch.float64) for k, v in result.metrics().items()
    }
    return values | {"size.ratio_std": largest(result.ratio), "size.ppo_kl": largest(result.log_ratio)}


# ---- losses: a, a2, b, c, g2, i2 -------------------------------------------------------------------------------------


def _unirl(case: Case, api: Api, double: bool, objective: Any) -> Results:
    """UniRL `_flowdppo_kl_adv_loss` and `_grpo_clip_loss`: per-element losses, reduced by the caller."""
    given = case.inputs(double)
    shape = case.params.get("new_means_shape")  # means that only matter by their shape are left out of the file
    mean = leaf(torch.zeros(shape) if shape else given.get("new_means"))
    log_prob = leaf(given["new_logp"])
    call = partial(
        api.loss,
        mean,
        torch.zeros(shape) if shape else given.get("old_means"),
        given["advantages"],
        std=given.get("sigma_t"),
        log_prob=log_prob,
        old_log_prob=given["old_logp"],
        objective=objective,
    )
    rows, mean_loss = call(reduction="none"), call(reduction="mean").loss
    return {
        "out.loss_per_elem": rows.loss,
        "aux.kl_per_sample": rows.kl,
        "grad.w.new_logp": grad_of((rows.loss * given["w"]).sum(), log_prob),
        "grad.mean.new_logp": grad_of(mean_loss, log_prob),
        "grad.mean.new_means": grad_of(mean_loss, mean),
        **metrics_of(rows),
    }


def _unirl_mask(case: Case, api: Api, double: bool) -> Results:
    return _unirl(case, api, double, FlowDPPO(kl_mask_threshold=case.number("kl_mask_threshold")))


def _unirl_clip(case: Case, api: Api, double: bool) -> Results:
    low = case.number("clip_range")
    high = case.params.get("clip_range_high")
    return _unirl(case, api, double, FlowGRPO(clip_range=(low, low if high is None else high)))


def _rows(given: dict[str, Tensor], *names: str) -> list[Tensor | None]:
    """Per-sample scalars, however many trailing ones they carry."""
    found = [given.get(name) for name in names]
    return [v if v is None or v.ndim == 0 else v.reshape(v.shape[0]) for v in found]


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _one_step(
    case: Case, api: Api, double: bool, objective: Any, **more: Any
) -> tuple[PolicyLoss, Results, dict[str, Tensor]]:
    """A loss over `[B]` rows of one step, with its gradients, as verl-omni, flow_grpo and Flow-Factory write it."""
    given = case.inputs(double)
    std_dev_t, sqrt_dt = _rows(given, "std_dev_t", "sqrt_dt")
    mean, log_prob = leaf(given.get("prev_sample_mean")), leaf(given["log_prob"])
    result = api.loss(
        mean,
        given.get("old_prev_sample_mean"),
        given["advantages"],
        log_prob=log_prob,
        old_log_prob=given["old_log_prob"],
        weights=given.get("rollout_is_weights"),
        objective=objective,
        **{"std": _product(std_dev_t, sqrt_dt), "sqrt_dt": sqrt_dt, **more},
    )
    ours = {
        "out.loss": result.loss,
        "out.ratio": result.ratio,
        "aux.kl_per_sample": result.kl,
        "grad.log_prob": grad_of(result.loss, log_prob),
        "grad.prev_sample_mean": grad_of(result.loss, mean),
    }
    return result, ours, given


def verl_objective(case: Case, loss_mode: str) -> Any:
    if loss_mode == "flow_dppo":
        config = case.params.get("config", case.params)
        normalize_kl = str(config["add_kl_coefficient"]) == "True"
        threshold = case.number("kl_mask_threshold")
        return FlowDPPO(kl_mask_threshold=threshold, normalize_kl=normalize_kl, nan_kl="keep")
    kind = FlowGRPO if loss_mode == "flow_grpo" else GRPOGuard
    return kind(clip_range=case.number("clip_ratio"), adv_clip_max=case.number("adv_clip_max"))


def verl_metrics(result: PolicyLoss, loss_mode: str) -> Results:
    values = metrics_of(result, "actor/", _VERL_CLIP_NAMES)
    if loss_mode == "flow_dppo":  # verl-omni's Flow-DPPO alone logs the biased deviation
        rows = result.ratio.numel()
        values["metric.actor/ratio_std"] *= math.sqrt((rows - 1) / rows)
    return values


def _verl_loss(case: Case, api: Api, double: bool, loss_mode: str) -> Results:
    result, ours, _ = _one_step(case, api, double, verl_objective(case, loss_mode))
    return ours | verl_metrics(result, loss_mode)


def _verl_kl(case: Case, api: Api, double: bool) -> Results:
    """`KLLoss` is our reference term with nothing else in the loss."""
    given = case.inputs(double)
    mean = leaf(given["prev_sample_mean"])
    zeros = torch.zeros(mean.shape[0], dtype=mean.dtype)
    result = api.loss(
        mean,
        None,
        zeros,
        log_prob=zeros,
        old_log_prob=zeros,
        objective=FlowGRPO(),
        ref_prev_sample_mean=given["ref_prev_sample_mean"],
        ref_kl_weight=1.0,
        ref_std=given["std_dev_t"],
    )
    ours = {"out.loss": result.loss, "grad.prev_sample_mean": grad_of(result.loss, mean)}
    return ours | metrics_of(result, "actor/")


def _script_loss(case: Case, api: Api, double: bool) -> Results:
    """flow_grpo's `train_sd3.py` and the GRPO-Guard script."""
    kind = GRPOGuard if case.params["rationorm"] else FlowGRPO
    objective = kind(clip_range=case.number("clip_range"), adv_clip_max=case.number("adv_clip_max"))
    given = case.inputs(double)
    beta = case.number("beta")
    reference_term = {
        "ref_kl_weight": beta,
        "ref_prev_sample_mean": given.get("ref_prev_sample_mean"),
        "ref_std": given["std_dev_t"],
    }
    result, ours, _ = _one_step(case, api, double, objective, **reference_term)
    policy_loss = _one_step(case, api, double, objective)[1]["out.loss"]
    ours |= {"out.policy_loss": policy_loss, "metric.policy_loss": policy_loss, "metric.loss": result.loss}
    return ours | metrics_of(result, rename={"clip_fraction": "clipfrac"})


def _flowfactory_loss(case: Case, api: Api, double: bool) -> Results:
    """Flow-Factory `GRPOTrainer` and `GRPOGuardTrainer`; its guard has no final division by -dt."""
    (low, high), (_, limit) = case.params["clip_range"], case.params["adv_clip_range"]
    given = case.inputs(double)
    std_dev_t, dt = _rows(given, "std_dev_t", "dt")
    common = {"clip_range": (-low, high), "adv_clip_max": limit}
    guard = "guard" in case.name
    objective = GRPOGuard(**common, per_row_scale=True) if guard else FlowGRPO(**common)
    result, ours, _ = _one_step(case, api, double, objective, std=std_dev_t * (-dt).sqrt(), sqrt_dt=1.0)
    if guard:  # upstream's ratio is [B,1,..,1,B]: the scale of row i with the log-prob of row j
        ours["out.ratio"] = ours["out.ratio"].expand(case.arrays["out.ratio"].shape)
    names = {"clip_fraction": "clip_frac_total", "clipfrac_gt_one": "clip_frac_high"}
    return ours | metrics_of(result, rename=names | {"clipfrac_lt_one": "clip_frac_low"})


# ---- steps: d, d2, e, g, i -------------------------------------------------------------------------------------------


def _step(case: Case, api: Api, double: bool, velocity_name: str, **schedule: Any) -> tuple[Results, Tensor]:
    given = case.inputs(double)
    velocity = leaf(given[velocity_name])
    step = api.sde_step(velocity, given["sample"], prev_sample=given["prev_sample"], **schedule)
    scores = (step.log_prob * given["w"]).sum()
    ours = {
        "out.log_prob": step.log_prob,
        "out.prev_sample": step.prev_sample,
        "out.prev_sample_mean": step.prev_sample_mean,
        f"grad.{velocity_name}": grad_of(scores, velocity),
        f"grad_j2.{velocity_name}": grad_of(scores + 0.5 * (step.prev_sample_mean**2).sum(), velocity),
    }
    return ours, step.std


def _unirl_step(case: Case, api: Api, double: bool) -> Results:
    given = case.inputs(double)
    ours, std = _step(
        case,
        api,
        double,
        "noise_pred",
        sampler=SAMPLERS[case.params["canonical_name"]],
        sigma=given["sigma"],
        sigma_next=given["sigma_next"],
        noise_level=case.number("eta"),
        sigma_max=given.get("sigma_max", 0.99),
    )
    return ours | {"out.std_var": std if given["sigma"].ndim else std[:1]}


def schedule_of(sigmas: Tensor, index: Tensor, sampler: str, noise_level: float | Tensor) -> dict[str, Any]:
    """Steps `index` of a full schedule: sigma 1 is stood in for by the second sigma."""
    return {
        "sampler": SAMPLERS[sampler],
        "sigma": sigmas[index],
        "sigma_next": sigmas[index + 1],
        "sigma_max": sigmas[1],
        "noise_level": noise_level,
    }


def _scheduler_step(case: Case, api: Api, double: bool) -> Results:
    """verl-omni, flow_grpo, the guard fork, miles: `std_dev_t` of Flow-SDE is without sqrt(-dt)."""
    given, params = case.inputs(double), case.params
    index, noise_level = torch.tensor(params["step_indices"]), given.get("noise_level", params["noise_level"])
    schedule = schedule_of(given["sigmas"], index, params.get("sde_type", "sde"), noise_level)
    normalizer = params.get("include_logprob_normalizer", True)
    ours, std = _step(case, api, double, "model_output", log_prob_normalizer=normalizer, **schedule)
    if double and normalizer and schedule["sampler"] != "cps":
        ours["out.log_prob"] = ours["out.log_prob"] + NORMALIZER_ERROR * (std > 0)
    if schedule["sampler"] == "flow_sde":
        std = std / torch.sqrt(schedule["sigma"] - schedule["sigma_next"])
    one = params.get("internal_step_index") is not None  # upstream's 0-dim path
    return ours | {"out.std_dev_t": std[0] if one else std}


def _flowfactory_step(case: Case, api: Api, double: bool) -> Results:
    """Trainer path: sigma is the timestep over 1000. `std_dev_t` of both SDEs is without sqrt(-dt)."""
    given = case.inputs(double)
    sigma, sigma_next = given["timestep"] / 1000, given["timestep_next"] / 1000
    sampler = SAMPLERS[case.params["dynamics_type"]]
    ours, std = _step(
        case,
        api,
        double,
        "model_output",
        sampler=sampler,
        sigma=sigma,
        sigma_next=sigma_next,
        sigma_max=given["sigmas"][1],
        noise_level=case.number("noise_level"),
    )
    return ours | {"out.std_dev_t": std if sampler == "cps" else std / torch.sqrt(sigma - sigma_next)}


def _unirl_sigma_t(case: Case, api: Api, double: bool) -> Results:
    """The sigma in `step_loss`'s KL, read back from the KL of two means that are 1 apart, and the transition's."""
    sigmas, index = case.inputs(double)["sigmas"], torch.tensor(case.params["target_steps"])
    zeros = torch.zeros(len(index), 1)
    call = {"sigma": sigmas[index], "sigma_next": sigmas[index + 1], "noise_level": case.number("eta")}
    objective = FlowDPPO(normalize_kl=case.params["add_kl_coefficient"])
    result = api.step_loss(
        zeros, zeros, zeros, zeros[:, 0], old_prev_sample_mean=zeros + 1, objective=objective, **call
    )
    step = api.sde_step(zeros, zeros, prev_sample=zeros, sigma_max=sigmas[1], **call)
    return {"out.sigma_t": torch.sqrt(0.5 / result.kl), "aux.replay_transition_std": step.std}


def _advantage(case: Case, api: Api, double: bool) -> Results:
    std = ("global" if case.params["global_std"] else "group") if case.params["norm_adv_by_std_in_grpo"] else None
    given = case.inputs(double)
    call = partial(api.group_advantages, given["sample_level_rewards"], std=std, eps=case.number("epsilon"))
    by_name, by_number = call(case.params["index"]), call(given["group_index"])
    assert torch.equal(by_name.nan_to_num(nan=9), by_number.nan_to_num(nan=9))
    return {"out.advantages": by_name}


ADAPTERS: dict[str, Callable[[Case, Api, bool], Results]] = {
    "a_unirl_klmask": _unirl_mask,
    "a2_unirl_clip": _unirl_clip,
    "b_verl_flowdppo": partial(_verl_loss, loss_mode="flow_dppo"),
    "c_verl_flowgrpo": partial(_verl_loss, loss_mode="flow_grpo"),
    "c_verl_guard": partial(_verl_loss, loss_mode="grpo_guard"),
    "c_verl_kl": _verl_kl,
    "d_unirl_step": _unirl_step,
    "d2_unirl_sigma_t": _unirl_sigma_t,
    "e_verl_step": _scheduler_step,
    "g_flowgrpo_step": _scheduler_step,
    "g2_script_loss": _script_loss,
    "h_verl_advantage": _advantage,
    "i_flowfactory_step": _flowfactory_step,
    "i2_flowfactory_loss": _flowfactory_loss,
}
