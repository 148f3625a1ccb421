"""The reference, and the native backend beside it, with latents that are not finite and another default device."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from cases import OBJECTIVES, THRESHOLD, VARIANTS
from parity import leaves
from small_calls import KINDS, function_of, results_of, small_call

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, group_advantages, reference

APIS = pytest.mark.parametrize("which", [reference, flowdppo_ops], ids=["reference", "fused"])


# ---- the default device ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)  # not `with torch.device(device)`, which is a mode: this is what stays set
    try:
        yield
    finally:
        torch.set_default_device(None)


CALLS = [(kind, name) for kind in KINDS[:3] for name in (*OBJECTIVES, *VARIANTS)] + [("sde_step", "")]


@APIS
@pytest.mark.parametrize(("kind", "objective"), CALLS)
def test_the_default_device_has_no_say(which, kind, objective):
    """As models are made: without memory at first, on "meta". Tensors that are given have their own device."""
    options = {"objective": (OBJECTIVES | VARIANTS)[objective]} if objective else {}
    arguments = small_call(kind, everything=True, **options)
    inputs = [arguments[name].requires_grad_() for name in leaves(arguments)]
    wanted = results_of(kind, arguments, which)
    gradients = torch.autograd.grad([result.sum() for result in wanted], inputs)
    with default_device("meta"):
        mine = results_of(kind, arguments, which)
        of_mine = torch.autograd.grad([result.sum() for result in mine], inputs)
    for a, b in zip((*mine, *of_mine), (*wanted, *gradients), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@APIS
def test_the_default_device_has_no_say_in_a_draw(which):
    arguments = small_call("sde_step")
    del arguments["prev_sample"]
    with default_device("meta"):
        step = which.sde_step(**arguments, generator=torch.Generator("cpu").manual_seed(1))
        residual = which.encode_residual(step.prev_sample, step.prev_sample_mean, step.std)
        advantages = group_advantages(torch.tensor([1.0, 2.0], device="cpu"), [0, 0])
    wanted = which.sde_step(**arguments, generator=torch.Generator("cpu").manual_seed(1))
    assert torch.equal(step.prev_sample, wanted.prev_sample)
    assert torch.isfinite(residual).all()
    assert torch.isfinite(advantages).all()


# ---- rows that are blocked and not finite ----------------------------------------------------------------------------

# (objective, advantage and old log-prob of the row that is not finite)
BLOCKED = {
    "FlowDPPO, ratio 0": (FlowDPPO(THRESHOLD), -1.0, 0.0),
    "FlowDPPO, infinite ratio": (FlowDPPO(THRESHOLD), 1.0, -math.inf),
    "FlowDPPO, symmetric": (FlowDPPO(THRESHOLD, mask="symmetric"), 1.0, 0.0),
    "FlowDPPO, symmetric, plain KL": (FlowDPPO(THRESHOLD, mask="symmetric", normalize_kl=False), -1.0, 0.0),
    "FlowGRPO, ratio 0": (FlowGRPO(1e-2), -1.0, 0.0),
}
ROW = 3  # the broken one, of high KL
BAD = {"inf": math.inf, "-inf": -math.inf, "too large to be squared": 1e30}


def broken(kind: str, name: str, bad: float, case: str) -> dict:
    """One place of one latent."""
    objective, advantage, old_log_prob = BLOCKED[case]
    arguments = small_call(kind, everything=True, objective=objective)
    for key in ("ref_prev_sample_mean", "ref_model_output", "ref_std", "ref_kl_weight", "sqrt_dt"):
        arguments.pop(key, None)  # the reference term is not lifted by the mask
    if kind == "loss" or "old_log_prob" in arguments:
        arguments["old_log_prob"] = arguments["old_log_prob"].clone()
        arguments["old_log_prob"][ROW] = old_log_prob
    arguments["advantages"] = arguments["advantages"].clone()
    arguments["advantages"][ROW] = advantage
    arguments[name] = arguments[name].clone()
    arguments[name][ROW, 1, 3] = bad
    return arguments


PLACES = [("loss", "prev_sample"), ("loss", "prev_sample_mean"), ("loss", "old_prev_sample_mean")]
PLACES += [("step_loss", name) for name in ("prev_sample", "sample", "old_residual", "model_output")]


@APIS
@pytest.mark.parametrize("case", BLOCKED)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_blocked_rows_have_gradient_0(which, kind, name, bad, case):
    for reduction in ("mean", "none", "kept_mean"):
        arguments = broken(kind, name, bad, case) | {"reduction": reduction}
        inputs = [arguments[leaf].requires_grad_() for leaf in leaves(arguments)]
        result = function_of(kind, which)(**arguments)
        if result.keep[ROW]:
            assert result.ratio[ROW].isnan()  # neither above 1 nor below
            continue
        others = torch.arange(len(result.keep)) != ROW
        for gradient in torch.autograd.grad(result.loss.sum(), inputs):
            assert (gradient[ROW] == 0).all()
            assert torch.isfinite(gradient[others]).all()
            assert gradient[others].abs().sum() > 0
        assert torch.isfinite(result.loss).all()


@APIS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_symmetric_mask_blocks_what_is_not_finite(which, kind, name, bad):
    """A NaN KL is high, so that the row is blocked whatever its ratio."""
    arguments = broken(kind, name, bad, "FlowDPPO, symmetric")
    inputs = [arguments[name].requires_grad_() for name in leaves(arguments)]
    result = function_of(kind, which)(**arguments)
    if name == "prev_sample" and kind == "loss":  # the KL does not see it
        assert torch.isfinite(result.kl).all()
        return
    assert not result.keep[ROW]
    for gradient in torch.autograd.grad(result.loss, inputs):
        assert (gradient[ROW] == 0).all()
        assert torch.isfinite(gradient).all()


@APIS
def test_a_kept_row_that_is_not_finite_says_so(which):
    """Only the mask may hide it."""
    arguments = broken("loss", "prev_sample", math.nan, "FlowDPPO, ratio 0")
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = which.loss(**arguments)
    assert result.keep[ROW]
    (gradient,) = torch.autograd.grad(result.loss, mean)
    assert gradient[ROW].isnan().any()
    assert result.metrics()["nonfinite_fraction"] > 0


@APIS
def test_blocked_rows_of_shards_have_gradient_0(which):
    """Through the sum over ranks, here of one."""
    arguments = broken("loss", "prev_sample", math.inf, "FlowDPPO, ratio 0")
    mean = arguments["prev_sample_mean"].requires_grad_()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        result = which.loss(**arguments, process_group=torch.distributed.group.WORLD)
        (gradient,) = torch.autograd.grad(result.loss, mean)
    finally:
        torch.distributed.destroy_process_group()
    assert not result.keep[ROW]
    assert (gradient[ROW] == 0).all()
    assert torch.isfinite(gradient).all()
