"""`flowdppo_ops.loss`: its gradients, and what its result says."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, OBJECTIVES, VARIANTS, draw
from parity import far_from_ties, run

from flowdppo_ops import FlowDPPO

SOURCES = ("sample", "sample and old", "log_prob")

objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@objectives
def test_anchors_get_no_gradient(loss, source, objective):
    arguments = draw(source=source, objective=objective, ref_kl_weight=0.5, weights=True)
    tensors = {name: value.requires_grad_() for name, value in arguments.items() if torch.is_tensor(value)}
    loss(**arguments).loss.backward()
    moved = {name for name, value in tensors.items() if value.grad is not None}
    assert moved == {"prev_sample_mean"} | ({"log_prob"} if source == "log_prob" else set())


def test_log_prob_source_gives_the_mean_no_gradient(loss):
    arguments = draw(source="log_prob")
    arguments["prev_sample_mean"].requires_grad_()
    arguments["log_prob"].requires_grad_()
    loss(**arguments).loss.backward()
    assert arguments["prev_sample_mean"].grad is None
    assert arguments["log_prob"].grad is not None


def test_only_the_loss_is_differentiable(loss):
    arguments = draw()
    arguments["prev_sample_mean"].requires_grad_()
    result = loss(**arguments)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in (result.log_prob, result.log_ratio, result.ratio, result.kl))
    assert not loss(**draw()).loss.requires_grad
    with torch.no_grad():
        assert not loss(**arguments).loss.requires_grad


def test_backward_twice_accumulates(loss):
    arguments = draw(objective=OBJECTIVES["guard"], ref_kl_weight=0.5)
    mean = arguments["prev_sample_mean"].requires_grad_()
    result = loss(**arguments)
    result.loss.backward(retain_graph=True)
    once = mean.grad.clone()
    result.loss.backward()
    assert once.abs().max() > 0
    assert torch.equal(mean.grad, 2 * once)
    with pytest.raises(RuntimeError):  # autograd's own: the graph was freed
        result.loss.backward()


def test_micro_batches_add_up(loss):
    """Two halves, each with its own backward, against the whole with reduction="sum"."""
    arguments = draw(reduction="sum", dtypes=DTYPES["float64"])
    whole = run(loss, arguments)["grad prev_sample_mean"]
    mean = arguments["prev_sample_mean"].requires_grad_()
    for half in (slice(0, 5), slice(5, 12)):
        loss(**{k: v[half] if torch.is_tensor(v) else v for k, v in arguments.items()}).loss.backward()
    torch.testing.assert_close(mean.grad, whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("source", ["sample", "log_prob"])
@pytest.mark.parametrize("name", ["expanded", "sliced"])
def test_upstream_gradient_of_any_strides(loss, source, name):
    """`loss.sum()` hands an expanded gradient down, an indexed loss a strided one."""
    rows = 5000  # beyond the allocator's small bins: a copy that is dropped too early is overwritten
    arguments = draw((rows,), (3,), source=source, reduction="none", objective=OBJECTIVES["guard"])
    upstream = torch.full((1,), 0.5).expand(rows) if name == "expanded" else torch.linspace(0, 1, 3 * rows)[1::3]
    assert not upstream.is_contiguous()
    names = ["prev_sample_mean"] + ["log_prob"] * (source == "log_prob")
    values = [arguments[name].requires_grad_() for name in names]
    value = loss(**arguments).loss
    mine = torch.autograd.grad(value, values, upstream, retain_graph=True)
    wanted = torch.autograd.grad(value, values, upstream.contiguous())
    for one, other in zip(mine, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["prev_sample", "prev_sample_mean"])
def test_overwritten_inputs_are_noticed(fused, name):
    """The backward reads the inputs again: a trainer that reused a buffer gets autograd's error, no wrong gradient."""
    arguments = draw()
    leaf = arguments["prev_sample_mean"].requires_grad_()
    arguments["prev_sample_mean"] = leaf * 1
    result = fused(**arguments)
    with torch.no_grad():
        arguments[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.loss.backward()


def test_second_derivatives_are_refused(fused):
    arguments = draw()
    mean = arguments["prev_sample_mean"].requires_grad_()
    gradient = torch.autograd.grad(fused(**arguments).loss, mean, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_gradcheck(loss):
    """Finite differences in float64, on rows far enough from every threshold."""
    for objective, source in itertools.product((*OBJECTIVES.values(), VARIANTS["guard own scale"]), SOURCES):
        arguments = draw(
            (12,), (3,), source=source, objective=objective, reduction="none", ref_kl_weight=0.2,
            dtypes=DTYPES["float64"],
        )  # fmt: skip
        assert far_from_ties(arguments, margin=1e-2)  # a finite difference across a threshold is no derivative
        names = ["prev_sample_mean"] + ["log_prob"] * (source == "log_prob")

        def rows(*values, names=names, arguments=arguments):
            return loss(**(arguments | dict(zip(names, values, strict=True)))).loss

        assert torch.autograd.gradcheck(rows, [arguments[name].clone().requires_grad_() for name in names])


# ---- result ----------------------------------------------------------------------------------------------------------

METRICS = (
    "ratio_mean ratio_std ratio_min ratio_max approx_kl ppo_kl kl_new_old_mean kl_new_old_max kl_mask_fraction "
    "pos_rm_fraction neg_rm_fraction masked_fraction unmasked_fraction clip_fraction clipfrac_gt_one clipfrac_lt_one "
    "nonfinite_fraction"
)


def test_metrics(loss):
    result = loss(**draw())
    metrics = result.metrics(prefix="actor/")
    assert list(metrics) == [f"actor/{name}" for name in METRICS.split()]
    assert all(type(value) is float for value in metrics.values())
    assert "kl_loss" in loss(**draw(ref_kl_weight=0.1)).metrics()
    assert "PolicyLoss" in repr(result)
    keep, advantages = result.keep, draw()["advantages"]
    by_hand = {
        "ratio_mean": result.ratio.mean(),
        "ratio_std": result.ratio.std(),
        "ratio_max": result.ratio.max(),
        "approx_kl": 0.5 * result.log_ratio.square().mean(),
        "ppo_kl": -result.log_ratio.mean(),
        "kl_new_old_mean": result.kl.mean(),
        "kl_mask_fraction": (result.kl >= 1e-2).float().mean(),
        "pos_rm_fraction": (~keep & (advantages > 0)).float().mean(),
        "neg_rm_fraction": (~keep & (advantages < 0)).float().mean(),
        "masked_fraction": (~keep).float().mean(),
        "unmasked_fraction": keep.float().mean(),
    }
    for name, value in by_hand.items():
        assert metrics[f"actor/{name}"] == pytest.approx(value.item(), rel=1e-6), name


def test_metrics_that_stay_on_the_device(loss):
    """The same names and values, nothing copied: 0-dim views of one tensor."""
    x = torch.randn(6, 20, requires_grad=True)
    call = {"std": 0.5, "prev_sample": x.detach() + 0.3, "objective": FlowDPPO(kl_mask_threshold=1e-3)}
    for more in ({}, {"ref_prev_sample_mean": x.detach() * 0.9, "ref_kl_weight": 0.1}):
        result = loss(x, x.detach() * 1.05, torch.randn(6), **call, **more)
        tensors = result.metric_tensors("actor/")
        assert {name: value.item() for name, value in tensors.items()} == result.metrics("actor/")
        assert all(value.ndim == 0 and not value.requires_grad for value in tensors.values())
        assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == 1
