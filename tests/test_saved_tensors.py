"""What is kept for the backward: tensors that a hook gives back in another form, and rollouts under inference_mode."""

from __future__ import annotations

import pytest
import torch
from parity import leaves, upstream_of
from small_calls import (
    FEW_LONG_ROWS,
    KINDS,
    MANY_SHORT_ROWS,
    Subclass,
    assert_equal,
    going,
    gradients,
    results_of,
    roads,
    small_call,
    with_leaves,
)

pytestmark = pytest.mark.usefixtures("native")

EVERYTHING = {kind: small_call(kind, everything=True) for kind in KINDS}
CONSTANTS = [
    (kind, name)
    for kind in KINDS
    for name, value in EVERYTHING[kind].items()
    if isinstance(value, torch.Tensor) and name not in leaves(EVERYTHING[kind])
]


# ---- saved tensors ---------------------------------------------------------------------------------------------------

SAME = {
    "other strides": lambda x: torch.stack([x, x], -1)[..., 0],
    "an offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "float64": lambda x: x.double(),
    "the negative bit": lambda x: torch._neg_view(-x),
    "a subclass": lambda x: x.as_subclass(Subclass),
}


def gradients_of_saved(kind: str, shape: tuple, unpack, *, twice: bool) -> tuple[torch.Tensor, ...]:
    """twice: of a second backward, which has nothing but the saved tensors."""
    inputs, arguments = with_leaves(small_call(kind, *shape))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), unpack):
        results = results_of(kind, arguments)
    upstreams = [upstream_of(result) for result in results]
    if twice:
        torch.autograd.grad(results, inputs, upstreams, retain_graph=True)
    return torch.autograd.grad(results, inputs, upstreams)


# The first backward of many short rows may have the forward's own gradient.
BACKWARDS = {
    "first, many short rows": (MANY_SHORT_ROWS, False),
    "second, many short rows": (MANY_SHORT_ROWS, True),
    "first, few long rows": (FEW_LONG_ROWS, False),
}


@pytest.mark.parametrize(("shape", "twice"), BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("unpack", SAME.values(), ids=SAME)
@roads
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_that_come_back_in_another_form(kind, road, unpack, shape, twice):
    wanted = gradients(kind, small_call(kind, *shape))
    with going(road):
        mine = gradients_of_saved(kind, shape, unpack, twice=twice)
    assert [gradient.dtype for gradient in mine] == [gradient.dtype for gradient in wanted]
    assert_equal(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_that_come_back_rounded(kind, dtype):
    """Hooks that store in two bytes: the gradient has their rounding error and no more."""
    wanted = gradients(kind, small_call(kind))
    mine = gradients_of_saved(kind, MANY_SHORT_ROWS, lambda x: x.to(dtype), twice=True)
    for gradient, exact in zip(mine, wanted, strict=True):
        assert gradient.dtype == exact.dtype
        assert (gradient - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_that_were_offloaded(kind):
    inputs, arguments = with_leaves(EVERYTHING[kind])
    with torch.autograd.graph.save_on_cpu():
        results = results_of(kind, arguments)
    mine = torch.autograd.grad(results, inputs, [upstream_of(result) for result in results])
    assert_equal(mine, gradients(kind, EVERYTHING[kind]))


WRONG = {
    "one element short": lambda x: x[..., :-1],
    "one element more": lambda x: torch.cat([x, x[..., :1]], -1),
    "another device": lambda x: x.to("meta"),
    "integers": lambda x: x.long(),
}


@pytest.mark.parametrize("unpack", WRONG.values(), ids=WRONG)
@roads
@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_that_come_back_wrong(kind, road, unpack):
    with going(road), pytest.raises((ValueError, TypeError, RuntimeError)):
        gradients_of_saved(kind, MANY_SHORT_ROWS, unpack, twice=True)


# ---- rollouts under inference_mode -----------------------------------------------------------------------------------


def from_inference(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return value.clone()


def from_inference_strided(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([value, value], -1)[..., 0]


@pytest.mark.parametrize("make", [from_inference, from_inference_strided])
@roads
@pytest.mark.parametrize(("kind", "name"), CONSTANTS)
def test_constants_made_under_inference_mode(kind, name, road, make):
    arguments = EVERYTHING[kind]
    constant = make(arguments[name])
    assert constant.is_inference()
    wanted = gradients(kind, arguments)
    with going(road):
        assert_equal(gradients(kind, arguments | {name: constant}), wanted)


@roads
@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_the_leaves_made_under_inference_mode(kind, road):
    """A rollout, and twice: an epoch later it is used again."""
    arguments = EVERYTHING[kind]
    rollout = arguments | {name: from_inference(arguments[name]) for of, name in CONSTANTS if of == kind}
    wanted = gradients(kind, arguments)
    for _ in range(2):
        with going(road):
            assert_equal(gradients(kind, rollout), wanted)


@pytest.mark.parametrize("name", ["model_output", "uncond_output"])
@pytest.mark.parametrize("kind", ["step_loss", "sde_step"])
def test_the_other_output_made_under_inference_mode(kind, name):
    """One of guidance's two passes without gradient."""
    arguments = EVERYTHING[kind]
    leaf = arguments[name].detach().requires_grad_()
    grads = []
    for make in (torch.clone, from_inference):
        (other,) = {"model_output", "uncond_output"} - {name}
        results = results_of(kind, arguments | {name: leaf, other: make(arguments[other])})
        grads.append(torch.autograd.grad(results, leaf, [upstream_of(result) for result in results]))
    assert_equal(*grads)
