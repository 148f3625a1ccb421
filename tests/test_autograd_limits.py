"""What autograd may ask for beyond one ordinary backward: the right gradient or an error, never a silent 0."""

from __future__ import annotations

import math

import pytest
import torch
from parity import leaves, upstream_of
from small_calls import (
    DIRECT,
    DISPATCHED,
    FEW_LONG_ROWS,
    KINDS,
    LOSSES,
    MANY_SHORT_ROWS,
    Subclass,
    assert_equal,
    function_of,
    going,
    gradients,
    results_of,
    roads,
    small_call,
    with_leaves,
)
from torch.autograd import forward_ad

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, reference

pytestmark = pytest.mark.usefixtures("native")

EVERYTHING = {kind: small_call(kind, everything=True) for kind in KINDS}
LEAVES = [(kind, name) for kind in KINDS for name in leaves(EVERYTHING[kind])]
SHAPES = {"many short rows": MANY_SHORT_ROWS, "few long rows": FEW_LONG_ROWS}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# ---- forward mode and function transforms ----------------------------------------------------------------------------


def as_function(kind: str, name: str):
    """One number as a function of one leaf, and the leaf."""
    arguments = EVERYTHING[kind]

    def function(leaf):
        return sum(result.sum() for result in results_of(kind, arguments | {name: leaf}))

    return function, arguments[name]


def by_jvp(function, leaf):
    return torch.func.jvp(function, (leaf,), (torch.ones_like(leaf),))


def by_dual(function, leaf):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(leaf, torch.ones_like(leaf)))


def by_dual_without_grad(function, leaf):
    with torch.no_grad():
        return by_dual(function, leaf)


def by_dual_with_grad(function, leaf):
    return by_dual(function, leaf.detach().requires_grad_())


def by_dual_through_the_dispatcher(function, leaf):
    with going(DISPATCHED):
        return by_dual(function, leaf)


FORWARD = [by_jvp, by_dual, by_dual_without_grad, by_dual_with_grad, by_dual_through_the_dispatcher]


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize(("kind", "name"), LEAVES)
def test_forward_mode_is_refused(kind, name, way):
    """A tangent that got lost would be a derivative of 0."""
    with pytest.raises(RuntimeError):
        way(*as_function(kind, name))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_a_tangent_work_in_a_dual_level(kind):
    wanted = gradients(kind, EVERYTHING[kind])
    with forward_ad.dual_level():
        assert_equal(gradients(kind, EVERYTHING[kind]), wanted)


TRANSFORMS = {
    "grad": lambda function, leaf: torch.func.grad(function)(leaf),
    "vjp": lambda function, leaf: torch.func.vjp(function, leaf)[1](torch.ones(())),
    "jacrev": lambda function, leaf: torch.func.jacrev(function)(leaf),
    "jacfwd": lambda function, leaf: torch.func.jacfwd(function)(leaf),
    "vmap": lambda function, leaf: torch.func.vmap(function)(torch.stack([leaf, leaf])),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("kind", "name"), LEAVES)
def test_function_transforms_are_refused(kind, name, transform):
    with pytest.raises(RuntimeError):
        transform(*as_function(kind, name))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_upstream_gradients(kind):
    """Refused, or the same as one after the other."""
    inputs, arguments = with_leaves(small_call(kind, reduction="none"))
    (loss,) = results_of(kind, arguments)
    each = torch.eye(len(loss))
    wanted = [torch.autograd.grad(loss, inputs, upstream, retain_graph=True) for upstream in each]
    try:
        mine = torch.autograd.grad(loss, inputs, each, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    assert_equal(mine, tuple(torch.stack(of_leaf) for of_leaf in zip(*wanted, strict=True)))


# ---- second derivatives ----------------------------------------------------------------------------------------------


def to_nothing_unused(gradient, leaf):
    torch.autograd.grad(gradient.sum(), leaf)


def to_none(gradient, leaf):
    torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)


def to_zeros(gradient, leaf):
    torch.autograd.grad(gradient.sum(), leaf, allow_unused=True, materialize_grads=True)


def to_the_leaf(gradient, leaf):
    gradient.sum().backward()


WAYS = pytest.mark.parametrize("differentiate", [to_nothing_unused, to_none, to_zeros, to_the_leaf])


@WAYS
@shapes
@pytest.mark.parametrize("road", [DIRECT, DISPATCHED, "of a subclass"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind, road, shape, differentiate):
    arguments = small_call(kind, *shape)
    inputs = [arguments[name].detach().requires_grad_() for name in leaves(arguments)]
    if road == "of a subclass":
        inputs = [leaf.detach().as_subclass(Subclass).requires_grad_() for leaf in inputs]
    arguments |= dict(zip(leaves(arguments), inputs, strict=True))
    with going(road):
        results = results_of(kind, arguments)
        first = torch.autograd.grad(sum(result.sum() for result in results), inputs, create_graph=True)
        for gradient, leaf in zip(first, inputs, strict=True):
            with pytest.raises(RuntimeError):
                differentiate(gradient, leaf)


@pytest.mark.parametrize("reduction", ["mean", "none", "kept_mean"])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_gradient_penalty_is_refused(kind, reduction):
    """Also where only the upstream gradient leads back to a leaf."""
    inputs, arguments = with_leaves(small_call(kind, everything=True, reduction=reduction))
    (loss,) = results_of(kind, arguments)
    weight = torch.ones_like(loss, requires_grad=True)
    first = torch.autograd.grad((loss * weight).sum(), inputs, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    for allow_unused in (False, True):
        with pytest.raises(RuntimeError):
            torch.autograd.grad(penalty, [*inputs, weight], allow_unused=allow_unused, retain_graph=True)


@pytest.mark.parametrize(("kind", "name"), LEAVES)
def test_forward_mode_of_the_gradient_is_refused(kind, name):
    """Two backwards make a forward derivative (`torch.autograd.functional.jvp`), a Hessian's too."""
    function, leaf = as_function(kind, name)
    with pytest.raises(RuntimeError):
        torch.autograd.functional.jvp(function, leaf, torch.ones_like(leaf))
    with pytest.raises(RuntimeError):
        torch.autograd.functional.hvp(function, leaf, torch.ones_like(leaf))


# ---- upstream gradients ----------------------------------------------------------------------------------------------


def negated(value: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of the other sign, as `z.conj().imag` has it."""
    view = torch._neg_view(-value)
    assert view.is_neg()
    assert torch.equal(view, value)
    return view


@roads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
@pytest.mark.parametrize("kind", LOSSES)
def test_upstream_gradient_of_a_loss_with_the_negative_bit(kind, reduction, dtype, road):
    arguments = small_call(kind, dtype=dtype, reduction=reduction)
    wanted = gradients(kind, arguments)
    with going(road):
        assert_equal(gradients(kind, arguments, lambda result: negated(upstream_of(result))), wanted)


@shapes
def test_upstream_gradient_from_a_complex_number(shape):
    inputs, arguments = with_leaves(small_call("loss", *shape))
    (loss,) = results_of("loss", arguments)
    upstream = torch.tensor(1 + 2j).conj().imag
    (gradient,) = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    (once,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_equal((gradient,), (-2 * once,))


@roads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("negative", ["log_prob", "prev_sample_mean", "both"])
def test_upstream_gradients_of_a_step_with_the_negative_bit(negative, dtype, road):
    arguments = small_call("sde_step", dtype=dtype)
    wanted = gradients("sde_step", arguments)

    def upstream(result):
        of = "log_prob" if result.ndim == 1 else "prev_sample_mean"
        return negated(upstream_of(result)) if negative in (of, "both") else upstream_of(result)

    with going(road):
        assert_equal(gradients("sde_step", arguments, upstream), wanted)


def overflowing_call(kind: str, row_shape, latent_shape) -> dict:
    """Row coefficients that float32 holds, times latents that make the gradient too large for it."""
    zeros, rows = torch.zeros(*row_shape, *latent_shape), row_shape[0]
    common = {"prev_sample": zeros + 100, "advantages": torch.full(row_shape, 3e37), "latent_reduction": "sum"}
    common |= {"objective": FlowDPPO(math.inf), "reduction": "sum"}
    common["advantages"][rows // 2] *= -1
    if kind == "loss":
        return common | {"prev_sample_mean": zeros, "old_prev_sample_mean": zeros, "std": 1.0}
    schedule = {"sigma": 0.8, "sigma_next": 0.6, "noise_level": 0.7}
    return common | schedule | {"model_output": zeros, "sample": zeros, "old_model_output": zeros}


@pytest.mark.parametrize("factor", [0.0, -0.0, 2.0**-20])
@shapes
@pytest.mark.parametrize("kind", ["loss", "step_loss"])
def test_upstream_factor_of_a_gradient_that_overflows(kind, shape, factor):
    """The factor belongs into the rows' coefficients, before the latents: what would overflow without it does not."""
    arguments = overflowing_call(kind, *shape)
    (without,) = gradients(kind, arguments, torch.ones_like)
    assert without.isinf().all()  # the premise
    (mine,) = gradients(kind, arguments, lambda result: torch.full_like(result, factor))
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    inputs, wide = with_leaves(wide)
    (wanted,) = torch.autograd.grad(function_of(kind, reference)(**wide).loss * factor, inputs)
    assert torch.isfinite(mine).all()
    assert ((mine - wanted).abs() <= 2.0**-20 * wanted.abs()).all()


# ---- numbers that change under torch.compile -------------------------------------------------------------------------

NUMBERS = {
    "FlowDPPO's threshold": ("loss", lambda x: {"objective": FlowDPPO(x)}),
    "FlowDPPO's threshold in a step": ("step_loss", lambda x: {"objective": FlowDPPO(x, kl_space="velocity")}),
    "FlowGRPO's clip range": ("loss", lambda x: {"objective": FlowGRPO(x)}),
    "FlowGRPO's pair": ("loss", lambda x: {"objective": FlowGRPO((x, 2 * x))}),
    "FlowGRPO's list": ("loss", lambda x: {"objective": FlowGRPO([x, 2 * x])}),
    "FlowGRPO's clamp": ("log_prob", lambda x: {"objective": FlowGRPO(1e-3, adv_clip_max=x)}),
    "GRPOGuard's clip range": ("loss", lambda x: {"objective": GRPOGuard(x), "sqrt_dt": 0.3}),
    "weight of the reference": ("loss", lambda x: {"ref_kl_weight": x, "ref_prev_sample_mean": REFERENCE}),
    "std": ("loss", lambda x: {"std": 0.3 + x}),
    "noise level": ("step_loss", lambda x: {"noise_level": 0.5 + x}),
    "noise level of sde_step": ("sde_step", lambda x: {"noise_level": 0.5 + x}),
    "guidance scale": ("sde_step", lambda x: {"guidance_scale": 2 + x}),
}
REFERENCE = small_call("loss")["prev_sample_mean"] + 0.1


@pytest.mark.parametrize(("kind", "options"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_change_under_compile(kind, options):
    """From the second value on, Dynamo has a symbol in place of the number."""
    torch._dynamo.reset()
    arguments = small_call(kind)
    name = leaves(arguments)[0]

    def function(leaf, number):
        return tuple(results_of(kind, {**arguments, name: leaf, **options(number)}))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for number in (0.01, 0.02, 0.3, 0.0004):
        leaf = arguments[name].detach().requires_grad_()
        mine, wanted = compiled(leaf, number), function(leaf, number)
        for a, b in zip(mine, wanted, strict=True):
            assert torch.equal(a, b)
        upstream = [upstream_of(result) for result in wanted]
        assert_equal(torch.autograd.grad(mine, leaf, upstream), torch.autograd.grad(wanted, leaf, upstream))


def test_an_objective_that_is_made_of_a_bad_number_under_compile():
    """The check of a threshold is part of what is compiled."""
    torch._dynamo.reset()
    arguments = small_call("loss")

    def function(threshold):
        return flowdppo_ops.loss(**{**arguments, "objective": FlowDPPO(threshold)}).loss

    compiled = torch.compile(function, backend="aot_eager")
    compiled(0.01), compiled(0.02)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="kl_mask_threshold"):
            compiled(bad)
