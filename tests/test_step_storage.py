"""`step_loss` to the bit, whatever latents are stored as and however many threads there are; what it allocates."""

from __future__ import annotations

import itertools

import pytest
import torch
from pairs import covering
from parity import equal_bits, leaves, run, upstream_of
from step_cases import (
    LATENTS,
    OLD_FORMS,
    REF_FORMS,
    STEP_DTYPES,
    STEP_OBJECTIVES,
    draw_step,
)

from flowdppo_ops import GRPOGuard, _native

objectives = pytest.mark.parametrize("objective", STEP_OBJECTIVES.values(), ids=STEP_OBJECTIVES)


# ---- storage ---------------------------------------------------------------------------------------------------------


HALVES = (torch.float32, torch.bfloat16, torch.float16)
# Of the model outputs (trained and unconditional), the samples and the other policies; then one tensor apart.
MIXES = [dict(zip(("output", "sample", "other"), mix, strict=True)) for mix in itertools.product(HALVES, repeat=3)]
MIXES += [
    {"output": torch.bfloat16, "sample": torch.float32, "other": torch.bfloat16, name: torch.float16}
    for name in ("uncond_output", "prev_sample", "ref")
]


def mixed(mix: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtypes of a mix, by argument."""
    samples, outputs = ("sample", "prev_sample"), ("model_output", "uncond_output")
    out = dict.fromkeys(outputs, mix["output"]) | dict.fromkeys(samples, mix["sample"])
    out |= dict.fromkeys(OLD_FORMS.values(), mix["other"])
    out |= dict.fromkeys(REF_FORMS.values(), mix.get("ref", mix["other"]))
    return {"*": torch.float32} | out | {name: dtype for name, dtype in mix.items() if name in LATENTS}


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: " ".join(str(d).removeprefix("torch.") for d in mix.values()))
@pytest.mark.parametrize("guidance", [False, True])
def test_a_dtype_is_storage_alone(fused_step, mix, guidance):
    """Whatever loop a mix of dtypes has, it gives the bits of the same numbers in float32; gradients are rounded."""
    for (old_form, ref_form), latent_shape in itertools.product(itertools.product(OLD_FORMS, REF_FORMS), [(67,), (8,)]):
        arguments = draw_step(
            (4,), latent_shape, old_form=old_form, ref_form=ref_form, guidance=guidance,
            objective=STEP_OBJECTIVES["guard"], dtypes=mixed(mix),
        )  # fmt: skip
        wide = {name: value.float() if torch.is_tensor(value) else value for name, value in arguments.items()}
        mine, wanted = run(fused_step, arguments), run(fused_step, wide)
        for name in leaves(arguments):
            wanted[f"grad {name}"] = wanted[f"grad {name}"].to(arguments[name].dtype)
        equal_bits(mine, wanted)


@pytest.mark.parametrize(
    "name",
    ["model_output", "uncond_output", "sample", "prev_sample", "old_residual", "ref_model_output", "old_log_prob"],
)
@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16], ids=str)
def test_one_float64_latent_makes_all_of_it_float64(fused_step, name, rest):
    dtypes = {"*": torch.float32, **dict.fromkeys(LATENTS, rest), name: torch.float64}
    arguments = draw_step(
        (4,), (67,), old_form="residual", guidance=True, old_log_prob=True, ref_form="output", dtypes=dtypes,
    )  # fmt: skip
    wide = {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}
    mine, wanted = run(fused_step, arguments), run(fused_step, wide)
    for leaf in leaves(arguments):
        wanted[f"grad {leaf}"] = wanted[f"grad {leaf}"].to(arguments[leaf].dtype)
    equal_bits(mine, wanted)


# ---- threads, and gradients formed ahead -----------------------------------------------------------------------------


def gradient_ahead(monkeypatch, ahead: bool) -> None:
    """Whether the backward takes the gradients that the forward formed along with the loss, if it did."""
    if not ahead:
        again = _native.policy_loss_backward
        monkeypatch.setattr(_native, "policy_loss_backward", lambda *args: again(*args[:4]))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_of_two(fused_step, monkeypatch, ahead, reduction):
    """What is not asked for is not formed, and what is asked for does not change."""
    gradient_ahead(monkeypatch, ahead)
    arguments = draw_step(guidance=True, objective=STEP_OBJECTIVES["guard"], ref_form="output", reduction=reduction)
    both = run(fused_step, arguments, upstream=3.0)
    names = ("model_output", "uncond_output")
    for name, other in (names, names[::-1]):
        alone = arguments | {name: arguments[name].detach().requires_grad_(), other: arguments[other].detach()}
        result = fused_step(**alone)
        (3 * result.loss).backward(torch.ones_like(result.loss) * (upstream_of(result.loss)))
        assert torch.equal(alone[name].grad, both[f"grad {name}"])
        assert alone[other].grad is None


@pytest.mark.parametrize("dtypes", ["bfloat16 outputs, float16 policies", "every latent another"])
@pytest.mark.parametrize(("rows", "numel"), [(1, 100_003), (9, 40_000), (300, 17)])
@pytest.mark.parametrize("ahead", [True, False])
def test_same_bits_for_any_thread_count(fused_step, monkeypatch, dtypes, rows, numel, ahead):
    gradient_ahead(monkeypatch, ahead)
    options = {"objective": GRPOGuard(clip_range=10.0), "old_form": "residual", "ref_form": "output", "guidance": True}
    arguments = draw_step((rows,), (numel,), dtypes=STEP_DTYPES[dtypes], **options)
    torch.set_num_threads(1)
    alone = run(fused_step, arguments)
    for threads in (2, 5, 5):  # and from run to run
        torch.set_num_threads(threads)
        equal_bits(run(fused_step, arguments), alone)


@covering(
    objective=STEP_OBJECTIVES,
    old_form=tuple(OLD_FORMS),
    dtypes=("float32", "bfloat16", "every latent another"),
    guidance=(False, True),
    upstream=(1.0, 2.0**-7),
)
def test_gradients_formed_ahead_are_the_backward_s(
    fused_step, monkeypatch, objective, old_form, dtypes, guidance, upstream
):
    arguments = draw_step(
        latent_shape=(67,), objective=objective, old_form=old_form, guidance=guidance, ref_form="output",
        dtypes=STEP_DTYPES[dtypes], deterministic=(2,),
    )  # fmt: skip
    runs = []
    for ahead in (True, False):
        gradient_ahead(monkeypatch, ahead)
        runs.append(run(fused_step, arguments, upstream=upstream))
    equal_bits(*runs)


def test_gradients_formed_ahead_are_handed_out_once(fused_step, monkeypatch):
    """Each to whoever may write to it; a second backward forms its own."""
    gradient_ahead(monkeypatch, True)
    arguments = draw_step(guidance=True)
    leaves = [arguments[name].requires_grad_() for name in ("model_output", "uncond_output")]
    loss = fused_step(**arguments).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    wanted = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss, leaves)
    for mine, other, gone in zip(second, wanted, first, strict=True):
        assert torch.equal(mine, other)
        assert mine.abs().max() > 0
        assert mine.data_ptr() != gone.data_ptr()


@objectives
def test_power_of_two_scaling_commutes(step_loss, objective):
    """A GradScaler's factor: the gradients are scaled, to the bit."""
    arguments = draw_step(objective=objective, guidance=True, dtypes=STEP_DTYPES["bfloat16 outputs, float16 policies"])
    plain, scaled = run(step_loss, arguments), run(step_loss, arguments, upstream=65536.0)
    for name in ("grad model_output", "grad uncond_output"):
        assert torch.equal(scaled[name], 65536 * plain[name])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample", "prev_sample", "model_output", "uncond_output"])
def test_overwritten_inputs_are_noticed(fused_step, name):
    """The backward reads the inputs again: a trainer that reused a buffer gets autograd's error, no wrong gradient."""
    arguments = draw_step(guidance=True)
    for output in ("model_output", "uncond_output"):
        arguments[output] = arguments[output].requires_grad_() * 1
    result = fused_step(**arguments)
    with torch.no_grad():
        arguments[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.loss.backward()


@covering(
    reduction=("mean", "none"),
    guidance=(False, True),
    upstream=(1.0, 3.0),
    dtypes=("float32", "bfloat16 outputs, float16 policies", "every latent another"),
)
def test_nothing_latent_sized_is_allocated_but_the_gradients(fused_step, reduction, guidance, upstream, dtypes):
    arguments = draw_step(
        (9,), (3000,), old_form="residual", guidance=guidance, ref_form="output", reduction=reduction,
        objective=STEP_OBJECTIVES["guard"], dtypes=STEP_DTYPES[dtypes],
    )  # fmt: skip
    values = [arguments[name].requires_grad_() for name in leaves(arguments)]
    result = fused_step(**arguments)  # what is made once is made now
    grad_loss = torch.full_like(result.loss, upstream)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(fused_step(**arguments).loss, values, grad_loss)
    sizes = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert sizes, "no allocation was seen at all"
    large = sorted(size for size in sizes if size >= 9 * 3000)  # a byte for each latent element
    assert large == sorted(value.nbytes for value in values)
