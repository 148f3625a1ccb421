"""The reference where steps are deterministic, of residuals and of `sde_step`, against the formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import DTYPES, draw
from reference_cases import F64, LATENT, ROWS, SAMPLERS, normal, rollout, schedule, wide
from torch.distributions import Normal

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference

# ---- deterministic rows ---------------------------------------------------------------------------------------------

OBJECTIVES = {
    "dppo": FlowDPPO(1e-3),
    "dppo plain": FlowDPPO(1e-3, normalize_kl=False),
    "dppo velocity": FlowDPPO(1e-3, kl_space="velocity"),
    "grpo": FlowGRPO((0.01, 0.02)),
    "guard": GRPOGuard(0.01),
    "guard own scale": GRPOGuard(0.01, per_row_scale=True),
}
# The last step of all three, which is deterministic in CPS, and no noise in the second of four samples.
LAST = {
    "sigma": torch.tensor([[1.0, 0.8, 0.5]], dtype=F64),
    "sigma_next": torch.tensor([[0.8, 0.5, 0.0]], dtype=F64),
    "noise_level": torch.tensor([[0.7], [0.0], [0.7], [0.7]], dtype=F64),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("old_form", ["old_prev_sample_mean", "old_model_output", "old_residual"])
@pytest.mark.parametrize("noise", ["some", "none"])
def test_deterministic_rows(sampler, objective, old_form, noise):
    """Defined by convention, alone or among others: nothing was random, so nothing is learnt from the log-prob."""
    steps = LAST if noise == "some" else LAST | {"noise_level": 0.0}
    data = rollout(sampler, steps)
    x, old_v, v, old = data["x"], data["old_v"], data["v"].requires_grad_(), data["old"]
    fixed, cps = old.std == 0, sampler == "cps"
    assert fixed.sum() == (12 if noise == "none" else 6 if cps else 3)
    forms = {
        "old_prev_sample_mean": old.prev_sample_mean,
        "old_model_output": old_v,
        "old_residual": old.residual,
    }
    for old_log_prob, ref_kl_weight in itertools.product((None, old.log_prob), (0.0, 0.2)):
        result = reference.step_loss(
            v, x, old.prev_sample, normal(*ROWS, seed=5), **steps, sampler=sampler, reduction="none",
            **{old_form: forms[old_form]}, old_log_prob=old_log_prob, objective=objective,
            ref_model_output=old_v, ref_kl_weight=ref_kl_weight,
        )  # fmt: skip
        gradient = torch.autograd.grad(result.loss.sum(), v)[0]
        for value in (result.loss, result.log_prob, result.log_ratio, result.ratio, result.kl, gradient):
            assert torch.isfinite(value).all()
        assert result.metrics()["nonfinite_fraction"] == 0
        if getattr(objective, "normalize_kl", True) and getattr(objective, "kl_space", "latent") == "latent":
            assert (result.kl[fixed] == 0).all()
        if isinstance(objective, GRPOGuard) and (noise == "none" or objective.per_row_scale):
            assert (result.ratio[fixed] == 1).all()
        if cps:  # keeps its log-prob, which needs no std
            error = old.prev_sample - reference.sde_step(v, x, **steps, sampler=sampler, row_dims=2).prev_sample_mean
            torch.testing.assert_close(result.log_prob, -(error**2).mean((-1, -2)))
            continue
        assert (result.log_prob[fixed] == 0).all()
        assert (result.log_ratio[fixed] == 0).all()
        if not (isinstance(objective, GRPOGuard) and noise == "some" and not objective.per_row_scale):
            assert (result.ratio[fixed] == 1).all()
            assert (gradient[fixed] == 0).all()  # nor from the penalty, whose ref_std is 0
        assert (gradient[~fixed] != 0).any() or noise == "none"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_residual_of_a_deterministic_row_is_the_sample(sampler):
    """Where std is 0 the mean is the sample, `mu° = x'`; the residual, 0 or anything, says nothing."""
    data, steps = rollout(sampler), schedule() | {"noise_level": 0.0}
    common = (data["v"], data["x"], data["old"].prev_sample, torch.ones(ROWS, dtype=F64))
    options = {**steps, "sampler": sampler, "objective": FlowDPPO(normalize_kl=False)}
    for residual in (torch.zeros_like(data["x"]), normal(*ROWS, *LATENT, seed=6)):
        mine = reference.step_loss(*common, **options, old_residual=residual)
        wanted = reference.step_loss(*common, **options, old_prev_sample_mean=data["old"].prev_sample)
        assert torch.equal(mine.kl, wanted.kl)
        assert (mine.kl > 0).all()


def test_divisors_of_0():
    """No step at all (sigma_next == sigma) has b = 0 as well; and a reference std may be 0 where the step's is not."""
    x, v, old_v = (normal(4, 33, seed=seed) for seed in (1, 2, 3))
    still = {"sigma": 0.5, "sigma_next": 0.5, "noise_level": 0.7}
    objective = FlowDPPO(kl_space="velocity")
    result = reference.step_loss(
        v.requires_grad_(), x, x, torch.ones(4), **still, old_model_output=old_v, objective=objective
    )
    assert (result.kl == 0).all()
    assert (torch.autograd.grad(result.loss, v)[0] == 0).all()
    ref_std = torch.tensor([0.0, 0.5, 0.0, 0.5])
    result = reference.step_loss(
        v, x, x, torch.zeros(4), **still | {"sigma_next": 0.3}, old_model_output=old_v, ref_model_output=old_v,
        ref_kl_weight=1.0, ref_std=ref_std, reduction="none",
    )  # fmt: skip
    assert torch.equal(result.loss != 0, ref_std != 0)
    gradient = torch.autograd.grad(result.loss.sum(), v)[0]
    assert torch.equal((gradient != 0).all(1), ref_std != 0)


def test_a_std_of_0_stays_undefined_in_loss():
    """There it is an argument, and 0 is a mistake that `nonfinite_fraction` shows."""
    arguments = draw(dtypes=DTYPES["float64"]) | {"std": 0.0}
    assert reference.loss(**arguments).metrics()["nonfinite_fraction"] == 1


# ---- residuals ------------------------------------------------------------------------------------------------------


def steps_of_std(sampler: str, std: float, b: int) -> dict[str, torch.Tensor | float | str]:
    """A schedule of `b` rows from sigma 0.9 to 0.6 whose noise level makes this standard deviation."""
    sigma, sigma_next = 0.9, 0.6
    if sampler == "cps":
        noise_level = math.asin(std / sigma_next) * 2 / math.pi
    else:
        noise_level = std / math.sqrt(sigma - sigma_next) / (math.sqrt(sigma / (1 - sigma)) if "flow" in sampler else 1)
    return {"sigma": sigma, "sigma_next": sigma_next, "noise_level": torch.full((b,), noise_level), "sampler": sampler}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("std", [0.05, 0.1, 0.2, 0.5])
def test_kl_floor_of_a_half_precision_residual(sampler, std):
    """On policy, what storing the old policy in two bytes costs: 2e-8 as a residual whatever the std, while a bfloat16
    mean is beyond a threshold of 1e-5 from std 0.3 down."""
    x, v = normal(4, 4096, seed=1).float(), normal(4, 4096, seed=2).float()
    steps = steps_of_std(sampler, std, 4)
    generator = torch.Generator().manual_seed(0)
    step = reference.sde_step(v, x, **steps, generator=generator, residual_dtype=torch.float16)
    torch.testing.assert_close(step.std, torch.full((4,), std))
    encoded = reference.encode_residual(step.prev_sample, step.prev_sample_mean, step.std)
    assert encoded.dtype == torch.float16
    assert torch.equal(encoded, step.residual)

    def kl(**old):
        return reference.step_loss(v, x, step.prev_sample, torch.ones(4), **steps, **old).kl

    assert (kl(old_residual=encoded) < 3e-8).all()
    assert (kl(old_residual=encoded) > 1e-8).all()
    # In float32 it is the very mean: what is left is the rounding of one division.
    exact = reference.encode_residual(step.prev_sample, step.prev_sample_mean, step.std, torch.float32)
    assert (kl(old_residual=exact) == 0).all()
    if std < 0.3:
        assert (kl(old_prev_sample_mean=step.prev_sample_mean.bfloat16()) > 1e-5).all()


@pytest.mark.parametrize("std", [torch.tensor([0.5, 0.0, 2.0, 1.0]), torch.tensor([[0.5, 0.0, 2.0]]), 0.25, 0.0])
@pytest.mark.parametrize("trailing", [False, True])
def test_encode_residual(api, std, trailing):
    x, mean = normal(4, 3, 5, seed=1), normal(4, 3, 5, seed=2)
    full = torch.as_tensor(std, dtype=F64)
    full = full.reshape(full.shape + (1,) * (3 - full.ndim))
    if trailing and torch.is_tensor(std):
        std = std.reshape(full.shape)
    wanted = torch.where(full == 0, 0, (x - mean) / full)
    assert torch.equal(api.encode_residual(x, mean, std, F64), wanted)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mine = api.encode_residual(x.to(dtype), mean.float().requires_grad_(), std)
        assert (mine.dtype, mine.requires_grad) == (torch.float16, False)
        wanted = torch.where(full == 0, 0, (x.to(dtype).float() - mean.float()) / full.float())
        assert torch.equal(mine, wanted.half())
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(api.encode_residual(strided, mean, std), api.encode_residual(x, mean, std))


# ---- sde_step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sde_step_formula(sampler):
    """Mean plus std times noise, scored by torch.distributions (CPS by its own squared error)."""
    x, v, noise = (normal(*ROWS, *LATENT, seed=seed) for seed in (1, 2, 3))
    step = reference.sde_step(v, x, **schedule(), sampler=sampler, noise=noise, row_dims=2, residual_dtype=F64)
    assert step.std.shape == step.log_prob.shape == ROWS
    torch.testing.assert_close(step.prev_sample, step.prev_sample_mean + wide(step.std) * noise)
    torch.testing.assert_close(step.residual, noise, rtol=1e-9, atol=1e-12)
    error = step.prev_sample - step.prev_sample_mean
    log_prob = -(error**2) if sampler == "cps" else Normal(0.0, wide(step.std)).log_prob(error)
    torch.testing.assert_close(step.log_prob, log_prob.mean((-1, -2)))
    bare = reference.sde_step(
        v, x, **schedule(), sampler=sampler, noise=noise, row_dims=2, log_prob_normalizer=False
    ).log_prob
    constant = 0.0 if sampler == "cps" else step.std.log() + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(bare, step.log_prob + constant)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_replay_of_a_stored_latent(sampler, dtype):
    """What the rollout stored, in its dtype, scores to the very same log-prob: the latent is rounded before scoring."""
    x, v = (normal(4, 33, seed=seed).to(dtype) for seed in (1, 2))
    options = {"sigma": 0.8, "sigma_next": 0.6, "sampler": sampler}
    drawn = reference.sde_step(v, x, **options, generator=torch.Generator().manual_seed(0))
    assert drawn.prev_sample.dtype == dtype
    assert drawn.log_prob.dtype == drawn.prev_sample_mean.dtype == torch.float32
    again = reference.sde_step(v, x, **options, prev_sample=drawn.prev_sample)
    assert torch.equal(again.log_prob, drawn.log_prob)
    assert torch.equal(again.prev_sample, drawn.prev_sample)
    loss = reference.step_loss(
        v,
        x,
        drawn.prev_sample,
        torch.ones(4),
        **options,
        noise_level=0.7,
        old_model_output=v,
        old_log_prob=drawn.log_prob,
    )
    assert (loss.log_ratio == 0).all()


def test_generator_decides_the_noise():
    x = v = torch.zeros(3, 50)
    draws = [
        reference.sde_step(v, x, sigma=0.8, sigma_next=0.6, generator=torch.Generator().manual_seed(seed)).prev_sample
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_generator_draws_on_its_own_device():
    """As diffusers allow: a CPU generator beside latents on a GPU, for which the meta device stands in."""
    x, generator = torch.zeros(3, 50, device="meta"), torch.Generator().manual_seed(1)
    step = reference.sde_step(x, x, sigma=0.8, sigma_next=0.6, generator=generator)
    assert step.prev_sample.device.type == "meta"
    drawn = torch.Generator().manual_seed(1)
    torch.randn(3, 50, generator=drawn)
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_given_latent_is_rounded_as_stored():
    """Replay of a float32 latent beside bfloat16 samples scores what the samples' dtype can hold."""
    x, v, given = (normal(4, 33, seed=seed).float() for seed in (1, 2, 3))
    x = x.bfloat16()
    common = {"sigma": 0.8, "sigma_next": 0.6}
    step = reference.sde_step(v, x, **common, prev_sample=given)
    assert step.prev_sample.dtype == torch.bfloat16
    assert torch.equal(step.prev_sample, given.bfloat16())
    assert torch.equal(step.log_prob, reference.sde_step(v, x, **common, prev_sample=given.bfloat16()).log_prob)
    assert not torch.equal(step.log_prob, reference.sde_step(v, x.float(), **common, prev_sample=given).log_prob)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_coefficients_are_rounded_once(sampler):
    """Formed in float64: half an ulp, where float32 is up to 5 times as far, in the `b` of CPS."""
    sigmas = torch.linspace(1, 0.02, 99)
    steps = {"sigma": sigmas[:-1], "sigma_next": sigmas[1:], "noise_level": 0.7, "sampler": sampler}
    exact = {name: value.double() if torch.is_tensor(value) else value for name, value in steps.items()}
    exact |= {"noise_level": torch.tensor(0.7).double(), "sigma_max": torch.tensor(0.99).double()}
    a, b, std = reference.transition(**exact)
    ones, zeros = torch.ones(98, 1), torch.zeros(98, 1)
    for x, v, wanted in ((ones, zeros, a), (zeros, ones, b)):
        step = reference.sde_step(v, x, **steps, noise=zeros)
        assert torch.equal(step.prev_sample_mean[:, 0], wanted.float())
        assert torch.equal(step.std, std.float())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_statistics(sampler):
    """Mean and standard deviation over n draws: within 5 of their standard errors, std/sqrt(n) and std/sqrt(2 n)."""
    n = 200_000
    x, v = torch.full((1, n), 0.5), torch.full((1, n), -1.5)
    step = reference.sde_step(
        v, x, sigma=0.8, sigma_next=0.6, sampler=sampler, generator=torch.Generator().manual_seed(7)
    )
    std = step.std.item()
    drawn = step.prev_sample.double()
    assert abs(drawn.mean() - step.prev_sample_mean[0, 0]) <= 5 * std / math.sqrt(n)
    assert abs(drawn.std() - std) <= 5 * std / math.sqrt(2 * n)
    # E log p = -entropy (CPS: -std^2); the spread of one term is 1/sqrt(2) (CPS: sqrt(2) std^2).
    wanted = -(std**2) if sampler == "cps" else -Normal(0.0, std).entropy()
    spread = math.sqrt(2) * std**2 if sampler == "cps" else math.sqrt(0.5)
    assert abs(step.log_prob.item() - wanted) <= 5 * spread / math.sqrt(n)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("options", [{"noise_level": 0.0}, {"sigma_next": 0.0}], ids=str)
def test_deterministic_steps_are_defined(sampler, options):
    x, v = normal(4, 33, seed=1), normal(4, 33, seed=2)
    options = {"sigma": 0.4, "sigma_next": 0.2, "noise_level": 0.7} | options
    step = reference.sde_step(v.requires_grad_(), x, **options, sampler=sampler, residual_dtype=F64)
    if options["noise_level"] == 0 or sampler == "cps":
        assert (step.std == 0).all()
        assert torch.equal(step.prev_sample, step.prev_sample_mean)
        assert (step.residual == 0).all()
        assert (step.log_prob == 0).all()
    if options["noise_level"] == 0:  # the plain Euler step along the velocity
        torch.testing.assert_close(step.prev_sample_mean, x - 0.2 * v)
    if options["sigma_next"] == 0 and sampler == "cps":  # the clean image
        torch.testing.assert_close(step.prev_sample_mean, x - 0.4 * v)
    gradient = torch.autograd.grad(step.log_prob.sum() + step.prev_sample_mean.sum(), v)[0]
    for value in (*step[:4], step.residual, gradient):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("row_dims", [0, 1, 2, 4])
def test_row_dims(row_dims):
    x, v, noise = (normal(2, 3, 4, 5, seed=seed) for seed in (1, 2, 3))
    step = reference.sde_step(v, x, sigma=0.8, sigma_next=0.6, noise=noise, row_dims=row_dims)
    assert step.log_prob.shape == step.std.shape == (2, 3, 4, 5)[:row_dims]
    one = reference.sde_step(v, x, sigma=0.8, sigma_next=0.6, noise=noise, row_dims=4).log_prob
    wanted = one.reshape(*one.shape[:row_dims], -1).mean(-1)
    torch.testing.assert_close(step.log_prob, wanted)


# ---- gradcheck ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [schedule(), LAST], ids=["noisy", "some deterministic"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_gradcheck_step_loss(sampler, steps, objective):
    data = rollout(sampler, steps, latent=(2, 2))
    v, old = data["v"].clone().requires_grad_(), data["old"]
    uncond = (data["v"] + 0.01 * normal(*ROWS, 2, 2, seed=6)).requires_grad_()
    refs = {"ref_prev_sample_mean": old.prev_sample_mean}, {"ref_model_output": data["old_v"]}
    for reduction, ref in zip(("mean", "none"), refs, strict=True):

        def value(v, uncond, reduction=reduction, ref=ref):
            return reference.step_loss(
                v, data["x"], old.prev_sample, normal(*ROWS, seed=5), **steps, sampler=sampler,
                uncond_output=uncond, guidance_scale=torch.tensor([[1.5, 2.0, 0.5]], dtype=F64),
                old_residual=old.residual, objective=objective, reduction=reduction, **ref, ref_kl_weight=0.2,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(value, (v, uncond))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [schedule(), LAST], ids=["noisy", "some deterministic"])
def test_gradcheck_sde_step(sampler, steps):
    data = rollout(sampler, steps, latent=(2, 2))

    def value(v, uncond):
        step = reference.sde_step(
            v, data["x"], **steps, sampler=sampler, prev_sample=data["old"].prev_sample, row_dims=2,
            uncond_output=uncond, guidance_scale=1.5,
        )  # fmt: skip
        return step.log_prob, step.prev_sample_mean

    leaves = (data["v"].clone().requires_grad_(), normal(*ROWS, 2, 2, seed=6).requires_grad_())
    assert torch.autograd.gradcheck(value, leaves)
