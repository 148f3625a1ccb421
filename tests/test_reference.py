"""The executable specification against things it was not written from: torch.distributions, finite differences, closed
forms, and sampling statistics. Numbers recorded from trainers are compared in test_golden.py."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, draw
from reference_cases import F64, LATENT, ROWS, SAMPLERS, normal, rollout, schedule, wide
from torch.distributions import Normal, kl_divergence

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference

# ---- transition -----------------------------------------------------------------------------------------------------


def test_transition_flow_sde():
    """Flow-GRPO's own way to write it: std_dev_t = eta sqrt(s/(1-s)), mean from the two terms of eq. 9."""
    s, s_next, eta = torch.tensor([1.0, 0.8, 0.3], dtype=F64), torch.tensor([0.8, 0.5, 0.0], dtype=F64), 0.7
    x, v = normal(3, seed=1), normal(3, seed=2)
    a, b, std = reference.transition("flow_sde", s, s_next, torch.tensor(eta), torch.tensor(0.99, dtype=F64))
    dt = s_next - s
    q = eta * torch.sqrt(s / (1 - torch.tensor([0.99, 0.8, 0.3], dtype=F64)))
    mean = x * (1 + q**2 / (2 * s) * dt) + v * (1 + q**2 * (1 - s) / (2 * s)) * dt
    torch.testing.assert_close(a * x + b * v, mean)
    torch.testing.assert_close(std, q * torch.sqrt(s - s_next))


def test_transition_dance_sde():
    """DanceGRPO: an Euler step along v plus the score correction -eta^2/2 (x - (1-s) x0)/s^2 with x0 = x - s v."""
    s, s_next, eta = torch.tensor([0.9, 0.4], dtype=F64), torch.tensor([0.6, 0.1], dtype=F64), 0.3
    x, v = normal(2, seed=1), normal(2, seed=2)
    a, b, std = reference.transition("dance_sde", s, s_next, torch.tensor(eta, dtype=F64), torch.tensor(0.99))
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean = x + (v - 0.5 * eta**2 * score) * (s_next - s)
    torch.testing.assert_close(a * x + b * v, mean)
    torch.testing.assert_close(std, eta * torch.sqrt(s - s_next))


def test_transition_cps():
    """Coefficients preserving: x0 and x1 estimates with (1-s') and sqrt(s'^2 - std^2), std added back by the noise."""
    s, s_next, eta = torch.tensor([0.9, 0.4], dtype=F64), torch.tensor([0.6, 0.0], dtype=F64), 0.7
    x, v = normal(2, seed=1), normal(2, seed=2)
    a, b, std = reference.transition("cps", s, s_next, torch.tensor(eta, dtype=F64), torch.tensor(0.99))
    x0, x1 = x - s * v, x + (1 - s) * v
    torch.testing.assert_close(a * x + b * v, (1 - s_next) * x0 + torch.sqrt(s_next**2 - std**2) * x1)
    torch.testing.assert_close(std, s_next * math.sin(eta * math.pi / 2))


# ---- loss against torch.distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_reduction", ["mean", "sum"])
def test_gaussian_rows(latent_reduction):
    arguments = draw((4, 3), (5, 2), dtypes=DTYPES["float64"], latent_reduction=latent_reduction)
    new, old = (
        Normal(arguments[name], wide(arguments["std"])) for name in ("prev_sample_mean", "old_prev_sample_mean")
    )

    def rows(value: torch.Tensor) -> torch.Tensor:
        return value.mean((-1, -2)) if latent_reduction == "mean" else value.sum((-1, -2))

    result = reference.loss(**arguments)
    log_prob, old_log_prob = (rows(p.log_prob(arguments["prev_sample"])) for p in (new, old))
    torch.testing.assert_close(result.log_prob, log_prob)
    torch.testing.assert_close(result.log_ratio, log_prob - old_log_prob, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.ratio, (log_prob - old_log_prob).exp())
    torch.testing.assert_close(result.kl, rows(kl_divergence(new, old)))


def test_reference_kl_is_the_gaussian_one():
    arguments = draw((4, 3), (5, 2), dtypes=DTYPES["float64"], ref_kl_weight=0.3, reduction="none")
    new, ref = (
        Normal(arguments[name], wide(arguments["ref_std"])) for name in ("prev_sample_mean", "ref_prev_sample_mean")
    )
    penalty = kl_divergence(new, ref).mean((-1, -2))
    plain = reference.loss(**(arguments | {"ref_kl_weight": 0.0}))
    result = reference.loss(**arguments)
    torch.testing.assert_close(result.loss, plain.loss + 0.3 * penalty)
    assert result.metrics()["kl_loss"] == pytest.approx(penalty.mean().item())


def test_blocked_rows_keep_their_penalty():
    objective = FlowDPPO(kl_mask_threshold=0.0, mask="symmetric")
    arguments = draw(dtypes=DTYPES["float64"], ref_kl_weight=0.3, objective=objective)
    penalty = reference.loss(**arguments).metrics()["kl_loss"]
    for reduction, rows in (("mean", 1), ("kept_mean", 1), ("sum", 12)):
        result = reference.loss(**arguments, reduction=reduction)
        assert not result.keep.any()
        assert result.loss.item() == pytest.approx(0.3 * penalty * rows, rel=1e-14)


@pytest.mark.parametrize("objective", [FlowDPPO(1e-2), FlowGRPO((0.01, 0.02), 1.0)], ids=["dppo", "grpo"])
@pytest.mark.parametrize("density", ["gaussian", "cps"])
def test_closed_form_gradient(objective, density):
    """d loss / d mu = c (x' - mu), c = -A ratio keep w / (rows N sigma^2), with 2 for 1/sigma^2 in CPS."""
    arguments = draw((12,), (5, 2), dtypes=DTYPES["float64"], objective=objective, density=density, weights=True)
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = reference.loss(**arguments)
    result.loss.backward()
    advantages = arguments["advantages"].clamp(-1, 1) if isinstance(objective, FlowGRPO) else arguments["advantages"]
    inverse = 2.0 if density == "cps" else 1 / arguments["std"] ** 2
    c = -advantages * result.ratio * result.keep * arguments["weights"] * inverse / (12 * 10)
    torch.testing.assert_close(mean.grad, c[:, None, None] * (arguments["prev_sample"] - mean.detach()))


def test_clipped_surrogate_is_the_maximum():
    arguments = draw((96,), (5,), dtypes=DTYPES["float64"], objective=FlowGRPO((0.1, 0.2)), reduction="none")
    result = reference.loss(**arguments)
    ratio, advantages = result.ratio, arguments["advantages"]
    wanted = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.2))
    torch.testing.assert_close(result.loss, wanted)
    assert 0 < result.keep.sum() < 96


@pytest.mark.parametrize("per_row_scale", [False, True])
def test_guard_formula(per_row_scale):
    arguments = draw(
        (12,), (5,), dtypes=DTYPES["float64"], objective=GRPOGuard(0.01, per_row_scale=per_row_scale), reduction="none"
    )
    result = reference.loss(**arguments)
    std, sqrt_dt = arguments["std"], arguments["sqrt_dt"]
    drift = (arguments["prev_sample_mean"] - arguments["old_prev_sample_mean"]).square().mean(1)
    c = std if per_row_scale else sqrt_dt.mean() * (std / sqrt_dt).mean()
    ratio = ((result.log_ratio + drift / (2 * c**2)) * c).exp()
    surrogate = torch.maximum(-arguments["advantages"] * ratio, -arguments["advantages"] * ratio.clamp(0.99, 1.01))
    torch.testing.assert_close(result.ratio, ratio)
    torch.testing.assert_close(result.loss, surrogate / (sqrt_dt**2 if per_row_scale else sqrt_dt.mean() ** 2))


def test_half_precision_is_widened():
    """16-bit inputs give what their float32 values give; only the gradient is rounded."""
    arguments = draw(dtypes=DTYPES["every latent another"], ref_kl_weight=0.1, weights=True)
    wide_ones = {name: value.float() if torch.is_tensor(value) else value for name, value in arguments.items()}
    narrow, wide_mean = arguments["prev_sample_mean"].requires_grad_(), wide_ones["prev_sample_mean"].requires_grad_()
    first, second = reference.loss(**arguments), reference.loss(**wide_ones)
    first.loss.backward()
    second.loss.backward()
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.ratio, second.ratio)
    assert torch.equal(narrow.grad, wide_mean.grad.half())


# ---- step_loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "objective", [FlowDPPO(1e-3), FlowGRPO((0.01, 0.02)), GRPOGuard(0.01)], ids=["dppo", "grpo", "guard"]
)
@pytest.mark.parametrize("old_form", ["old_prev_sample_mean", "old_model_output", "old_residual"])
@pytest.mark.parametrize("with_log_prob", [False, True])
def test_step_loss_is_sde_step_and_loss(sampler, objective, old_form, with_log_prob):
    """One call from the model's output equals scheduler step, then loss; in every form of the old policy."""
    data = rollout(sampler)
    v, old = data["v"].requires_grad_(), data["old"]
    forms = {
        "old_prev_sample_mean": old.prev_sample_mean,
        "old_model_output": data["old_v"],
        "old_residual": old.residual,
    }
    options = {
        "objective": objective,
        "old_log_prob": old.log_prob if with_log_prob else None,
        "ref_prev_sample_mean": old.prev_sample_mean + 0.01,
        "ref_kl_weight": 0.2,
        "weights": torch.tensor(1.5),
    }
    advantages = normal(*ROWS, seed=5)
    fused = reference.step_loss(
        v,
        data["x"],
        old.prev_sample,
        advantages,
        **schedule(),
        sampler=sampler,
        **{old_form: forms[old_form]},
        **options,
    )
    replay = reference.sde_step(v, data["x"], **schedule(), sampler=sampler, prev_sample=old.prev_sample, row_dims=2)
    composed = reference.loss(
        replay.prev_sample_mean,
        old.prev_sample_mean,
        advantages,
        std=replay.std,
        sqrt_dt=torch.sqrt(schedule()["sigma"] - schedule()["sigma_next"]),
        prev_sample=old.prev_sample,
        density="cps" if sampler == "cps" else "gaussian",
        **options,
    )
    torch.testing.assert_close(fused.loss, composed.loss)
    for name in ("log_prob", "log_ratio", "ratio", "kl"):
        torch.testing.assert_close(getattr(fused, name), getattr(composed, name), rtol=1e-9, atol=1e-13)
    assert torch.equal(fused.keep, composed.keep)
    assert (fused.log_ratio.abs() > 1e-6).all()
    mine, wanted = (torch.autograd.grad(result.loss, v)[0] for result in (fused, composed))
    torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_velocity_kl(sampler):
    data = rollout(sampler)
    result = reference.step_loss(
        data["v"], data["x"], data["old"].prev_sample, normal(*ROWS), **schedule(), sampler=sampler,
        old_prev_sample_mean=data["old"].prev_sample_mean, objective=FlowDPPO(kl_space="velocity"),
    )  # fmt: skip
    wanted = (data["v"] - data["old_v"]).square().mean((-1, -2))
    torch.testing.assert_close(result.kl, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_loss_on_policy_is_exact(sampler, dtype):
    data = {name: value.to(dtype) for name, value in rollout(sampler).items() if name != "old"}
    old = reference.sde_step(data["v"], data["x"], **schedule(), sampler=sampler, row_dims=2)
    for form in ({"old_model_output": data["v"]}, {"old_prev_sample_mean": old.prev_sample_mean}):
        result = reference.step_loss(
            data["v"], data["x"], old.prev_sample, torch.ones(ROWS), **schedule(), sampler=sampler, **form
        )
        assert (result.ratio == 1).all()
        assert (result.kl == 0).all()


def test_step_loss_without_an_old_mean():
    data = rollout("flow_sde")
    result = reference.step_loss(
        data["v"], data["x"], data["old"].prev_sample, normal(*ROWS), **schedule(),
        old_log_prob=data["old"].log_prob, objective=FlowGRPO(0.1),
    )  # fmt: skip
    assert result.kl is None
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_trajectory_in_one_call(sampler, shape):
    """[B, S] rows with a schedule per step give what a call for each step gives."""
    data, advantages = rollout(sampler), normal(*ROWS, seed=5)
    steps = {name: value.reshape(shape) if torch.is_tensor(value) else value for name, value in schedule().items()}
    given = {"old_residual": data["old"].residual, "sampler": sampler, "reduction": "none"}
    v = data["v"].requires_grad_()
    whole = reference.step_loss(v, data["x"], data["old"].prev_sample, advantages, **steps, **given)
    gradient = torch.autograd.grad(whole.loss.sum(), v)[0]
    replay = reference.sde_step(v, data["x"], **steps, sampler=sampler, prev_sample=data["old"].prev_sample, row_dims=2)
    for i in range(ROWS[1]):
        at = {name: value[0, i] if torch.is_tensor(value) else value for name, value in schedule().items()}
        one_v = data["v"].detach()[:, i].clone().requires_grad_()
        latents = (one_v, data["x"][:, i], data["old"].prev_sample[:, i])
        given["old_residual"] = data["old"].residual[:, i]
        one = reference.step_loss(*latents, advantages[:, i], **at, **given)
        assert torch.equal(one.loss, whole.loss[:, i])
        assert torch.equal(one.ratio, whole.ratio[:, i])
        assert torch.equal(torch.autograd.grad(one.loss.sum(), one_v)[0], gradient[:, i])
        scored = reference.sde_step(*latents[:2], **at, sampler=sampler, prev_sample=latents[2])
        assert torch.equal(scored.log_prob, replay.log_prob[:, i])
        assert torch.equal(scored.std, replay.std[:, i])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [4.5, torch.tensor([[1.0], [0.0], [7.5], [2.0]], dtype=F64)], ids=["number", "rows"])
def test_guidance(sampler, scale):
    """The step of the combined velocity, whose gradient goes to both outputs in the proportions of the combination."""
    data, advantages = rollout(sampler), normal(*ROWS, seed=5)
    outputs = data["v"].requires_grad_(), (data["v"].detach() + 0.02 * normal(*ROWS, *LATENT, seed=6)).requires_grad_()
    share = wide(torch.as_tensor(scale, dtype=F64))
    combined = (outputs[1] + share * (outputs[0] - outputs[1])).detach().requires_grad_()
    guided = {"uncond_output": outputs[1], "guidance_scale": scale}
    common = {**schedule(), "sampler": sampler}

    def loss(output, **more):
        return reference.step_loss(
            output, data["x"], data["old"].prev_sample, advantages, **common, **more,
            old_model_output=data["old_v"], ref_model_output=data["x"], ref_kl_weight=0.2, objective=FlowGRPO(0.5),
        )  # fmt: skip

    def score(output, **more):
        step = reference.sde_step(output, data["x"], **common, **more, prev_sample=data["old"].prev_sample, row_dims=2)
        return (step.log_prob * advantages).sum() + (step.prev_sample_mean**2).sum()

    assert torch.equal(loss(outputs[0], **guided).kl, loss(combined).kl)
    for value in (lambda *args, **more: loss(*args, **more).loss, score):
        mine, wanted = value(outputs[0], **guided), value(combined)
        torch.testing.assert_close(mine, wanted)
        whole = torch.autograd.grad(wanted, combined)[0]
        for gradient, part in zip(torch.autograd.grad(mine, outputs), (share, 1 - share), strict=True):
            torch.testing.assert_close(gradient, part * whole, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_reference_model_output(sampler):
    """The penalty from the reference's model output is that from its mean, and exactly 0 when it is the policy's."""
    data, advantages = rollout(sampler), torch.zeros(ROWS, dtype=F64)
    v, ref_v = data["v"].requires_grad_(), data["v"].detach() + 0.3 * normal(*ROWS, *LATENT, seed=6)
    common = {**schedule(), "sampler": sampler}
    ref_mean = reference.sde_step(ref_v, data["x"], **common, row_dims=2).prev_sample_mean

    def penalty(**ref):
        return reference.step_loss(
            v, data["x"], data["old"].prev_sample, advantages, **common, old_model_output=data["old_v"],
            ref_kl_weight=1.0, **ref,
        ).loss  # fmt: skip

    mine, wanted = penalty(ref_model_output=ref_v), penalty(ref_prev_sample_mean=ref_mean)
    torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value, v)[0] for value in (mine, wanted)), rtol=1e-9, atol=1e-13)
    assert penalty(ref_model_output=v.detach()) == 0
