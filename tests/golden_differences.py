"""Where this package deliberately gives another result than a recorded trainer, what it gives, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import golden_adapters as adapters
import torch
from golden.load import Case
from golden_training import one_step_training
from torch import Tensor

from flowdppo_ops import reference

Expected = dict[str, Tensor]

# Recorded, but a parameter, an input of ours, or nothing this package returns.
NOT_OURS = {
    "metric.kl_mask_threshold": "a parameter",
    "metric.clip_range": "a parameter",
    "metric.kl_coef": "a parameter",
    "out.sigma_t": "f_e2e_unirl: an input of ours; its formula is compared in d2_unirl_sigma_t",
    "out.sqrt_dt": "an input of ours",
    "out.dt": "an input of ours",
    "out.ratio_mean_bias": "not returned; it shows in the ratio",
}


class Difference(NamedTuple):
    """Why a case differs, and what our result is instead of the recorded one."""

    reason: str
    ours: Callable[[Case, bool], Expected] | None = None  # expected values of the differing results
    raises: str = ""  # or the ValueError's message


def _differ(difference: Difference, *cases: str) -> dict[str, Difference]:
    return dict.fromkeys(cases, difference)


def _no_nan(case: Case, double: bool) -> Expected:
    recorded = {k: v for k, v in case.recorded(double).items() if k.startswith("grad") and v is not None}
    return {k: torch.where(v.isnan(), 0.0, v) for k, v in recorded.items()}


def _double_kl(case: Case, double: bool) -> Expected:
    return {k: v for k, v in case.recorded(True).items() if k == "aux.kl_per_sample" or "kl_new_old" in k}


def squared_drift(case: Case) -> Tensor:
    found = case.inputs(True)
    new = found.get("new_means", found.get("prev_sample_mean", case.arrays.get("out.new_means")))
    return (new.double() - found.get("old_means", found.get("old_prev_sample_mean"))) ** 2


def stored_means_kl(case: Case, double: bool) -> Expected:
    kl = (squared_drift(case) / (2 * case.arrays["out.sigma_t"].double() ** 2)).flatten(2).mean(-1)
    return {"aux.kl_per_sample": kl, "metric.kl_new_old_mean": kl.mean(), "metric.kl_new_old_max": kl.max()}


def _kl_of_row_sigma(case: Case, double: bool) -> Expected:
    given = case.inputs(True)
    sigma = given["std_dev_t"] * given["sqrt_dt"]
    return {"aux.kl_per_sample": squared_drift(case).flatten(1).mean(1) / (2 * sigma**2)}


def _rows_without_latents(case: Case, double: bool) -> Expected:
    """The masked objective with one latent element per row; the gradient of `-A ratio` is itself."""
    given = case.inputs(True)
    kl = squared_drift(case) / (2 * given["sigma_t"] ** 2)
    ratio, advantages = torch.exp(given["new_logp"] - given["old_logp"]), given["advantages"]
    high = kl >= case.number("kl_mask_threshold")
    pos, neg = high & (ratio > 1) & (advantages > 0), high & (ratio < 1) & (advantages < 0)
    loss = torch.where(pos | neg, 0.0, -advantages * ratio)
    shares = {"kl_mask_fraction": high, "neg_rm_fraction": neg, "masked_fraction": pos | neg}
    shares["unmasked_fraction"] = ~(pos | neg)
    return {
        "aux.kl_per_sample": kl,
        "out.loss_per_elem": loss,
        "grad.w.new_logp": loss * given["w"],
        "grad.mean.new_logp": loss / loss.numel(),
        "metric.kl_new_old_max": kl.max(),
        **{f"metric.{name}": rows.double().mean() for name, rows in shares.items()},
    }


def _log_density(case: Case, std: Tensor | float, mean: Tensor) -> Tensor:
    error = case.inputs(True)["prev_sample"] - mean.double()
    return (-(error**2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def _ungated_log_prob(case: Case, double: bool) -> Expected:
    given, mean, eta = case.inputs(True), case.arrays["out.prev_sample_mean"], case.number("eta")
    sigma, dt = given["sigma"], given["sigma_next"] - given["sigma"]
    if case.params["canonical_name"] == "cps":
        return {"out.log_prob": -((given["prev_sample"] - mean) ** 2).flatten(1).mean(1)}
    if eta == 0:
        return {"out.log_prob": torch.zeros(len(mean))}
    q = eta * (torch.sqrt(sigma / (1 - sigma)) if case.params["canonical_name"] == "flow" else 1)
    return {"out.log_prob": _log_density(case, float(q * torch.sqrt(-dt)), mean)}


def no_noise(case: Case, double: bool) -> Expected:
    """Nothing but the mean's own gradient, which for std 0 is `dt * mean`."""
    given, mean = case.inputs(True), case.arrays["out.prev_sample_mean"].double()
    velocity, dt = "noise_pred", 0.0
    if case.group == "e_verl_step":
        velocity, dt = "model_output", given["sigmas"][3] - given["sigmas"][2]
    expected = {"out.log_prob": torch.zeros(len(mean)), f"grad.{velocity}": torch.zeros_like(mean)}
    return expected if double else expected | {f"grad_j2.{velocity}": dt * mean}


def _unclamped_sigma(case: Case, double: bool) -> Expected:
    sigma = case.inputs(True)["sigmas"][case.params["target_steps"]]
    recorded, transition = case.arrays["out.sigma_t"].flatten(), case.arrays["aux.replay_transition_std"]
    return {"out.sigma_t": torch.where(sigma == 1, recorded, transition)}


def _unmixed_batch(case: Case, double: bool) -> Expected:
    """Upstream has `B` copies of each row, and each log-prob is the mean over the batch."""
    rec, w = case.recorded(double), case.inputs(True)["w"][:, None, None]
    mean, b = rec["out.prev_sample_mean"][0], len(w)
    sqrt_dt = math.sqrt(case.arrays["in.sigmas"][3].double() - case.arrays["in.sigmas"][4].double())
    std = rec["out.std_dev_t"].double().flatten()[0] * sqrt_dt
    log_prob = _log_density(case, float(std), mean) + (adapters.NORMALIZER_ERROR if double else 0.0)
    assert torch.allclose(log_prob.mean(), rec["out.log_prob"].double(), rtol=0, atol=1e-6)
    expected = {"out.prev_sample_mean": mean, "out.log_prob": log_prob}
    expected["grad.model_output"] = (rec["grad.model_output"] * w * b / w.sum()).to(rec["grad.model_output"].dtype)
    if not double:
        own = (rec["grad_j2.model_output"] - rec["grad.model_output"]) / b
        expected["grad_j2.model_output"] = expected["grad.model_output"] + own
    return expected


def _guard_per_row(case: Case, double: bool) -> Expected:
    """GRPO-Guard with one drift per row (and in Flow-Factory's the scale of the same row), stated in float64.

    Held against the recorded numbers first: with one drift for the batch they are the guard script's, and its ratios
    on the diagonal are Flow-Factory's.
    """
    given, params, recorded = case.inputs(True), case.params, case.recorded(double)
    flowfactory = case.group == "i2_flowfactory_loss"
    leaves: dict[str, Tensor] = {}
    if case.group == "f_e2e_guard_script":
        leaves["noise_pred"] = velocity = given["noise_pred"].clone().requires_grad_()
        schedule, _ = one_step_training(case, given)
        step = reference.sde_step(velocity, given["sample"], prev_sample=given["prev_sample"], **schedule)
        mean, log_prob = step.prev_sample_mean, step.log_prob + adapters.NORMALIZER_ERROR
        sqrt_dt = torch.sqrt(schedule["sigma"] - schedule["sigma_next"])
        std_dev_t = step.std / sqrt_dt
    else:
        leaves["prev_sample_mean"] = mean = given["prev_sample_mean"].clone().requires_grad_()
        leaves["log_prob"] = log_prob = given["log_prob"].clone().requires_grad_()
        std_dev_t = given["std_dev_t"].flatten()
        sqrt_dt = torch.sqrt(-given["dt"].flatten()) if flowfactory else given["sqrt_dt"].flatten()
    if flowfactory:
        (low, high), limit = params["clip_range"], params["adv_clip_range"][1]
        c, divisor = std_dev_t * sqrt_dt, 1.0
    else:
        (low, high), limit = (-params["clip_range"], params["clip_range"]), params["adv_clip_max"]
        c, divisor = std_dev_t.mean() * sqrt_dt.mean(), sqrt_dt.mean() ** 2
    advantages = given["advantages"].clamp(-limit, limit)
    penalty = torch.zeros(())
    if params.get("beta"):
        squares = ((mean - given["ref_prev_sample_mean"]) ** 2).flatten(1).mean(1)
        penalty = params["beta"] * (squares / (2 * std_dev_t**2)).mean()

    def policy(drift: Tensor) -> tuple[Tensor, Tensor]:
        ratio = torch.exp((log_prob - given["old_log_prob"] + drift / (2 * c**2)) * c)
        row_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 + low, 1 + high))
        return ratio.detach(), row_loss.mean() / divisor

    drift = ((mean - given["old_prev_sample_mean"]) ** 2).flatten(1).mean(1)
    ratio, loss = policy(drift)
    if flowfactory:
        theirs = ratio
        recorded_ratio = recorded["out.ratio"].reshape(len(ratio), -1).diagonal()
    else:
        theirs, their_loss = policy(drift.mean())
        recorded_ratio = recorded["out.ratio"]
        assert torch.allclose(their_loss + penalty, recorded["out.loss"].double(), rtol=2e-6, atol=0)
    assert torch.allclose(theirs, recorded_ratio.double(), rtol=2e-6, atol=0)

    grads = torch.autograd.grad(loss + penalty, list(leaves.values()))
    above, below = ratio - 1 > high, 1 - ratio > -low
    names = {True: "clip_frac_total clip_frac_high clip_frac_low", False: "clipfrac clipfrac_gt_one clipfrac_lt_one"}
    shares = zip(names[flowfactory].split(), (above | below, above, below), strict=True)
    values = {
        "out.ratio": ratio.expand(recorded["out.ratio"].shape),
        "out.loss": loss + penalty,
        "out.policy_loss": loss,
        "metric.loss": loss + penalty,
        "metric.policy_loss": loss,
        **{f"grad.{name}": grad for name, grad in zip(leaves, grads, strict=True)},
        **{f"metric.{name}": rows.double().mean() for name, rows in shares},
    }
    return {key: value for key, value in values.items() if key in recorded}


DIFFERENCES: dict[str, Difference] = {
    **_differ(
        Difference("a blocked row with an infinite ratio: upstream's gradient is 0 * inf = NaN, ours is 0", _no_nan),
        "a_unirl_klmask__float64_ratio_inf",
        "a_unirl_klmask__ratio_inf_adv_pos",
        "a2_unirl_clip__inf_ratio",
        "b_verl_flowdppo__ratio_inf_adv_pos",
        "c_verl_flowgrpo__inf_ratio",
    ),
    **_differ(
        Difference("upstream squares half-precision means in half precision; ours as its double run", _double_kl),
        "a_unirl_klmask__bf16_means_thr_0.01",
        "a_unirl_klmask__bf16_means_thr_1e-05",
        "a_unirl_klmask__fp16_means_thr_0.01",
        "a_unirl_klmask__fp16_means_thr_1e-05",
        "b_verl_flowdppo__bf16_means",
    ),
    **_differ(
        Difference("upstream squares half-precision means in half precision; ours does not", stored_means_kl),
        "f_e2e_unirl__flow_bf16_recipe",
        "f_e2e_unirl__flow_fp16_default",
    ),
    **_differ(
        Difference("sigma of another rank than the means: ours refuses, whatever the sizes", raises="std has shape"),
        "a_unirl_klmask__error_token_4d_rank5_sigma",
        "a_unirl_klmask__error_video_6d_rank5_sigma",
        "a_unirl_klmask__quirk_token_4d_rank5_sigma_B_eq_S",
    ),
    "a_unirl_klmask__quirk_rank2_means": Difference(
        "means without latent dimensions: upstream has one KL for the batch, ours one per row", _rows_without_latents
    ),
    "b_verl_flowdppo__error_std_0dim_sqrt_dt_B": Difference(
        "upstream lays the per-row sigma along the last latent axis and fails; ours takes it per row", _kl_of_row_sigma
    ),
    "c_verl_flowgrpo__batch_1_ratio_std_nan": Difference(
        "deviation of one ratio: NaN upstream here and 0 in its Flow-DPPO; ours is 0 always",
        lambda case, double: {"metric.actor/ratio_std": torch.zeros(())},
    ),
    "c_verl_flowgrpo__tie_outside_clip_half_gradient": Difference(
        "ratio outside the clip range, both float32 surrogates equal: upstream keeps half the gradient, ours none",
        lambda case, double: {"grad.log_prob": case.recorded(True)["grad.log_prob"]},
    ),
    **_differ(
        Difference(
            "below eta 1e-7 upstream returns no log-prob; ours always does, 0 for an SDE of std 0", _ungated_log_prob
        ),
        "d_unirl_step__cps_eta_0_returns_none",
        "d_unirl_step__cps_eta_9e-8_returns_none",
        "d_unirl_step__dance_eta_0_returns_none",
        "d_unirl_step__dance_eta_9e-8_returns_none",
        "d_unirl_step__flow_eta_0_returns_none",
        "d_unirl_step__flow_eta_9e-8_returns_none",
    ),
    **_differ(
        Difference(
            "an SDE of std 0 has no density: upstream gives NaN and inf, ours log-prob 0 and no gradient", no_noise
        ),
        "d_unirl_step__flow_dt_zero",
        "e_verl_step__sde_noise_level_zero",
    ),
    **_differ(
        Difference("UniRL clamps sigma to 0.99 in the KL but not in the step; ours is the step's", _unclamped_sigma),
        "d2_unirl_sigma_t__hand_near_one_eta0.7_on",
        "d2_unirl_sigma_t__hand_near_one_eta1_on",
    ),
    "g_flowgrpo_step__sd3_token_layout_quirk": Difference(
        "upstream broadcasts [B,N,C] to [B,B,N,C] and mixes the samples; ours scores each", _unmixed_batch
    ),
    **_differ(
        Difference("the guard script has one drift for the batch; ours one per row, as verl-omni", _guard_per_row),
        "f_e2e_guard_script__guard_first",
        "f_e2e_guard_script__guard_mid",
        "g2_script_loss__guard_beta",
        "g2_script_loss__guard_per_sample_std",
        "g2_script_loss__guard_shared",
        "g2_script_loss__guard_wide_clip",
    ),
    "h_verl_advantage__single_row_T1_nan_globalstd_True": Difference(
        "one single reward has no standard deviation: NaN upstream; ours is 0, as of every row alone in its group",
        lambda case, double: {"out.advantages": torch.zeros_like(case.recorded(double)["out.advantages"])},
    ),
    "i2_flowfactory_loss__guard_per_sample_step": Difference(
        "Flow-Factory pairs the scale of every row with the log-prob of every row; ours with its own", _guard_per_row
    ),
}

# `step_loss` takes its KL from the transition itself. Where the trainer does not, the KL and what hangs on it differ;
# what ours is, is `test_step_loss_is_sde_step_and_loss`.
STEP_LOSS_DIFFERENCES = {
    **dict.fromkeys(
        ("f_e2e_unirl__flow_fp32", "f_e2e_unirl__flow_fp32_replay_source"),
        "UniRL's KL takes sigma 0.99 at the first step: its standard deviation is 1.9 times that of the step",
    ),
    **dict.fromkeys(
        ("f_e2e_unirl__flow_bf16_recipe", "f_e2e_unirl__flow_fp16_default"),
        "the same, and UniRL rounds the new means to half precision before the KL",
    ),
    **dict.fromkeys(
        ("f_e2e_unirl__cps_fp32", "f_e2e_unirl__dance_fp32"), "UniRL's KL has Flow-SDE's sigma whatever the sampler"
    ),
    **dict.fromkeys(
        ("f_e2e_verl__dppo_cps", "f_e2e_verl__dppo_dance"), "verl-omni's KL has sqrt(-dt) in its sigma twice"
    ),
}
KL_MEAN = ("metric.kl_new_old_mean", "metric.actor/kl_new_old_mean")
HANGS_ON_KL = ("kl_new_old", "kl_mask", "_rm_fraction", "masked_fraction", "kl_per_sample", "loss", "grad.noise_pred")
