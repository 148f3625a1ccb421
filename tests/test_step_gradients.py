"""Gradients of `step_loss`: who gets one, and finite differences."""

from __future__ import annotations

import itertools

import torch
from pairs import covering
from parity import far_from_ties, leaves
from step_cases import FLOAT64_DTYPES, OLD_FORMS, SAMPLERS, STEP_OBJECTIVES, draw_step


@covering(old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES, guidance=(False, True))
def test_anchors_get_no_gradient(step_loss, old_form, objective, guidance):
    arguments = draw_step(
        old_form=old_form, objective=objective, old_log_prob=True, guidance=guidance, ref_form="mean", weights=True
    )
    tensors = {name: value.requires_grad_() for name, value in arguments.items() if torch.is_tensor(value)}
    step_loss(**arguments).loss.backward()
    moved = {name for name, value in tensors.items() if value.grad is not None}
    assert moved == set(leaves(arguments))


def test_only_the_loss_is_differentiable(step_loss):
    arguments = draw_step()
    arguments["model_output"].requires_grad_()
    result = step_loss(**arguments)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in (result.log_prob, result.log_ratio, result.ratio, result.kl))
    assert not step_loss(**draw_step()).loss.requires_grad


def test_backward_twice_accumulates(step_loss):
    arguments = draw_step(objective=STEP_OBJECTIVES["guard"], ref_form="mean", guidance=True)
    values = [arguments[name].requires_grad_() for name in leaves(arguments)]
    result = step_loss(**arguments)
    result.loss.backward(retain_graph=True)
    once = [value.grad.clone() for value in values]
    result.loss.backward()
    for value, grad in zip(values, once, strict=True):
        assert grad.abs().max() > 0
        assert torch.equal(value.grad, 2 * grad)


@covering(sampler=SAMPLERS, old_form=tuple(OLD_FORMS), objective=STEP_OBJECTIVES)
def test_gradcheck(step_loss, sampler, old_form, objective):
    """Finite differences in float64, on rows far enough from every threshold."""
    for old_log_prob, guidance in itertools.product((False, True), repeat=2):
        deterministic = old_log_prob == guidance
        arguments = draw_step(
            (6,), (3,), sampler=sampler, old_form=old_form, objective=objective, old_log_prob=old_log_prob,
            guidance=guidance, reduction="none", ref_form="output", deterministic=deterministic,
            dtypes=FLOAT64_DTYPES["float64"],
        )  # fmt: skip
        names = leaves(arguments)

        def rows(*values, names=names, arguments=arguments):
            return step_loss(**(arguments | dict(zip(names, values, strict=True)))).loss

        # A finite difference across a threshold is no derivative; a deterministic row's ratio is 1 and stays there.
        assert deterministic or far_from_ties(arguments, margin=1e-2)
        assert torch.autograd.gradcheck(rows, [arguments[name].clone().requires_grad_() for name in names])
