"""The operator inside PyTorch: compile, opcheck, gradcheck, autocast, checkpointing, fake tensors, threads, forks."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import threading
import time

import pytest
import torch
from compilers import needs_cxx
from step_cases import draw_step
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard
from flowdppo_ops._checks import Call, check_loss, check_step_loss
from flowdppo_ops._operators import common
from flowdppo_ops._operators import policy_loss as _library
from flowdppo_ops._torch import FAMILY

# Wide enough that rows fall on both sides of every mask and clip.
OBJECTIVES = {
    "flow_dppo": FlowDPPO(1e-4),
    "flow_grpo": FlowGRPO((1e-3, 2e-3), adv_clip_max=1.0),
    "grpo_guard": GRPOGuard(1e-3),
}
SOURCES = ("prev_sample", "log_prob")
FUNCTIONS = pytest.mark.parametrize("source", ["prev_sample", "step"], ids=["loss", "step_loss"])


def inputs(source: str, dtype=torch.float32, rows=8, numel=37) -> tuple[dict, dict]:
    """`(differentiable, constant)` keyword arguments of `loss`, or of `step_loss` for the source "step"."""
    if source == "step":
        options = {"old_form": "residual", "ref_form": "output", "guidance": True, "weights": True}
        constant = draw_step((rows,), (numel,), dtypes={"*": dtype}, **options)
        del constant["objective"]
        return {name: constant.pop(name) for name in ("model_output", "uncond_output")}, constant
    torch.manual_seed(5)
    mean = torch.randn(rows, numel, dtype=dtype)
    noise = 0.5 * torch.randn(rows, numel, dtype=dtype)
    # The drift goes with the noise in the first half (ratio > 1) and against it in the second (ratio < 1).
    drift = 0.02 * torch.linspace(1, -1, rows, dtype=dtype)[:, None] * noise
    constant = {
        "old_prev_sample_mean": mean - drift,
        "advantages": (torch.rand(rows, dtype=dtype) + 0.5) * torch.tensor([1, -1]).repeat(rows)[:rows],
        "std": torch.linspace(0.3, 0.6, rows, dtype=dtype),
        "sqrt_dt": 0.3,
        "weights": torch.rand(rows, 1, dtype=dtype),
        "ref_prev_sample_mean": mean + 0.02,
        "ref_kl_weight": 0.04,
    }
    if source == "prev_sample":
        return {"prev_sample_mean": mean}, {**constant, "prev_sample": mean + noise}
    log_prob = torch.randn(rows, dtype=dtype)
    nudge = 0.004 * torch.linspace(-1, 1, rows, dtype=dtype)
    return {"prev_sample_mean": mean, "log_prob": log_prob}, {**constant, "old_log_prob": log_prob + nudge}


def call(**arguments) -> flowdppo_ops.PolicyLoss:
    """The function that these are arguments of."""
    return (flowdppo_ops.step_loss if "model_output" in arguments else flowdppo_ops.loss)(**arguments)


def run(differentiable: dict, constant: dict, objective) -> tuple:
    """Loss, rows and gradients of one call, gradients in the order of `differentiable`."""
    leaves = {name: value.detach().requires_grad_() for name, value in differentiable.items()}
    result = call(**leaves, **constant, objective=objective)
    grads = torch.autograd.grad(result.loss, list(leaves.values()))
    return result.loss.detach(), result.ratio, result.kl, result.keep, *grads


def assert_equal(mine: tuple, wanted: tuple) -> None:
    for index, (a, b) in enumerate(zip(mine, wanted, strict=True)):
        assert torch.equal(a, b), f"output {index}: {a} is not {b}"


@pytest.mark.parametrize("source", [*SOURCES, "step"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_inputs_reach_both_sides_of_every_branch(source, objective):
    keep = run(*inputs(source), objective)[3]
    assert keep.any(), "every row is blocked"
    assert not keep.all(), "no row is blocked"


def assert_compiled_equals_eager(source, objective, backend, dynamic):
    torch._dynamo.reset()
    differentiable, constant = inputs(source)

    def rows(*leaves):
        result = call(**dict(zip(differentiable, leaves, strict=True)), **constant, objective=objective)
        return result.loss, result.ratio, result.kl, result.keep

    compiled = torch.compile(rows, fullgraph=True, backend=backend, dynamic=dynamic)
    leaves = [value.detach().requires_grad_() for value in differentiable.values()]
    loss, *others = compiled(*leaves)
    assert not any(row.requires_grad for row in others)
    grads = torch.autograd.grad(loss, leaves)
    assert_equal((loss.detach(), *others, *grads), run(differentiable, constant, objective))


backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[needs_cxx, pytest.mark.slow])]
)


@pytest.mark.parametrize("dynamic", [False, True])
@backends
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_compiled_equals_eager(objective, source, backend, dynamic):
    assert_compiled_equals_eager(source, objective, backend, dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@backends
def test_compiled_step_equals_eager(backend, dynamic):
    assert_compiled_equals_eager("step", OBJECTIVES["grpo_guard"], backend, dynamic)  # which reads every latent twice


def test_compiled_function_may_return_the_whole_result():
    torch._dynamo.reset()
    differentiable, constant = inputs("prev_sample")
    compiled = torch.compile(flowdppo_ops.loss, fullgraph=True, backend="aot_eager")
    result, eager = compiled(**differentiable, **constant), flowdppo_ops.loss(**differentiable, **constant)
    assert torch.equal(result.loss, eager.loss)
    assert result.metrics() == eager.metrics()


@FUNCTIONS
def test_exported_program_equals_eager(source):
    differentiable, constant = inputs(source)

    arguments = {**differentiable, **constant}
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return call(**{**arguments, **dict(zip(names, tensors, strict=True))}).loss

    tensors = tuple(arguments[name] for name in names)
    program = torch.export.export(Loss(), tensors)
    assert torch.equal(program.module()(*tensors), Loss()(*tensors))


def checked(differentiable: dict, constant: dict, objective, reduction="mean") -> Call:
    function, check = ("step_loss", check_step_loss) if "model_output" in differentiable else ("loss", check_loss)
    names = inspect.signature(getattr(flowdppo_ops, function)).parameters
    options = {"objective": objective, "latent_reduction": "mean", "reduction": reduction, "density": "gaussian"}
    given = dict.fromkeys(names) | {name: value for name, value in options.items() if name in names}
    return check("test", FAMILY, given | differentiable | constant)


def operator_arguments(call: Call) -> tuple:
    tensors = common.as_tensors(call.fields, call.fields["advantages"])
    arguments = dict.fromkeys(_library.FIELDS) | tensors | call.settings
    return tuple(arguments[name] for name in _library._ARGUMENTS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("source", [*SOURCES, "step"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_opcheck(objective, source, reduction):
    differentiable, constant = inputs(source)
    if source == "step":  # each gradient has the dtype of its own output
        differentiable["uncond_output"] = differentiable["uncond_output"].bfloat16()
    call = checked({k: v.requires_grad_() for k, v in differentiable.items()}, constant, objective, reduction)
    arguments = operator_arguments(call)
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss.default, (*arguments, None))
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss_shard_sums.default, arguments)
    sums = torch.ops.flowdppo_ops.policy_loss_shard_sums(*arguments)
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss.default, (*arguments, sums.detach()))

    loss, numbers = torch.ops.flowdppo_ops.policy_loss(*arguments, None)
    latents = [None if t is None else t.detach() for t in arguments[: len(_library.LATENTS)]]
    wants = True, source == "step", source == "log_prob"
    args = (torch.ones_like(loss), numbers.detach(), *latents, *wants)
    torch.library.opcheck(torch.ops.flowdppo_ops.policy_loss_backward.default, args)


@pytest.mark.parametrize("alone", ["model_output", "uncond_output"])
@pytest.mark.parametrize("through", ["the direct road", "the dispatcher"])
def test_one_of_two_outputs_is_trained(alone, through):
    """The other gets no gradient, and what is asked for is what both would have got."""
    differentiable, constant = inputs("step")
    both = dict(zip(differentiable, run(differentiable, constant, OBJECTIVES["grpo_guard"])[4:], strict=True))
    leaf = differentiable[alone].requires_grad_()
    with contextlib.nullcontext() if through == "the direct road" else Through():
        result = call(**differentiable, **constant, objective=OBJECTIVES["grpo_guard"])
    result.loss.backward()
    assert torch.equal(leaf.grad, both[alone])
    assert all(value.grad is None for name, value in differentiable.items() if name != alone)


@pytest.mark.parametrize("name", ["model_output", "uncond_output", "sample", "prev_sample", "old_residual"])
def test_the_dispatcher_knows_float64(name):
    """Arithmetic follows the widest latent, whoever finds it."""
    differentiable, constant = inputs("step")
    part = differentiable if name in differentiable else constant
    part[name] = part[name].double()
    wanted = run(differentiable, constant, FlowDPPO())
    assert wanted[0].dtype == torch.float64
    with Through():
        assert_equal(run(differentiable, constant, FlowDPPO()), wanted)


class Through(TorchDispatchMode):
    """Sees every operator, which closes the direct road."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
@pytest.mark.parametrize("density", ["gaussian", "cps"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_gradcheck(objective, source, density, reduction):
    differentiable, constant = inputs(source, torch.float64, rows=5, numel=3)

    def call(*leaves):
        arguments = dict(zip(differentiable, leaves, strict=True))
        return flowdppo_ops.loss(
            **arguments, **constant, objective=objective, density=density, reduction=reduction
        ).loss

    leaves = [value.requires_grad_() for value in differentiable.values()]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-6)


@FUNCTIONS
def test_second_derivative_is_refused(source):
    differentiable, constant = inputs(source)
    leaves = [value.requires_grad_() for value in differentiable.values()]
    for grad in torch.autograd.grad(call(**differentiable, **constant).loss, leaves, create_graph=True):
        assert grad.requires_grad, "a penalty on this gradient would silently be a constant"
        with pytest.raises(RuntimeError, match="second derivatives"):
            grad.sum().backward(retain_graph=True)


@FUNCTIONS
def test_autocast_leaves_the_result_alone(source):
    differentiable, constant = inputs(source)
    wanted = run(differentiable, constant, FlowDPPO())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(run(differentiable, constant, FlowDPPO()), wanted)


def test_means_from_an_autocast_model():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(16, 16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = model(x)
        assert mean.dtype == torch.bfloat16
        result = flowdppo_ops.loss(mean, mean.detach(), torch.randn(4), std=0.5, prev_sample=torch.randn(4, 16))
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.ratio, torch.ones(4))
    result.loss.backward()
    assert model.weight.grad.abs().sum() > 0


@FUNCTIONS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(source, use_reentrant):
    differentiable, constant = inputs(source)
    leaves = [value.requires_grad_() for value in differentiable.values()]

    def loss(*leaves):
        doubled = [leaf * 2 for leaf in leaves]
        return call(**dict(zip(differentiable, doubled, strict=True)), **constant).loss

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    assert_equal(tuple(leaf.grad for leaf in leaves), wanted)


@FUNCTIONS
def test_inference_mode_and_no_grad(source):
    differentiable, constant = inputs(source)
    wanted = call(**differentiable, **constant).loss
    leaves = {name: value.requires_grad_() for name, value in differentiable.items()}
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            loss = call(**leaves, **constant).loss
        assert torch.equal(loss, wanted)
        assert not loss.requires_grad


@FUNCTIONS
def test_fake_tensors_never_reach_native_code(monkeypatch, source):
    def refuse(*args):
        raise AssertionError("native code was called")

    for name in ("PolicyLossCall", "policy_loss_backward"):
        monkeypatch.setattr(_library._native, name, refuse)
    differentiable, constant = inputs(source, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in constant.items()}
        leaves = {name: mode.from_tensor(value).requires_grad_() for name, value in differentiable.items()}
        result = call(**leaves, **fake)
        result.loss.backward()
        assert (result.loss.dtype, result.loss.shape, result.keep.shape) == (torch.float32, (), (8,))
        for leaf in leaves.values():
            assert (leaf.grad.dtype, leaf.grad.shape) == (leaf.dtype, leaf.shape)


def test_native_code_refuses_memory_that_is_not_there():
    differentiable, constant = inputs("prev_sample")
    call = checked(differentiable, constant, FlowDPPO())
    call.fields["prev_sample_mean"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"prev_sample_mean has \d+ elements and no memory"):
        _library._native.PolicyLossCall(call.fields, call.settings)


@FUNCTIONS
def test_dispatch_modes_see_the_operators(source):
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    differentiable, constant = inputs(source)
    wanted = run(differentiable, constant, FlowDPPO())
    with Log():
        assert_equal(run(differentiable, constant, FlowDPPO()), wanted)
    assert "flowdppo_ops.policy_loss.default" in seen
    assert "flowdppo_ops.policy_loss_backward.default" in seen


def test_saved_tensor_hooks_see_what_is_kept():
    differentiable, constant = inputs("prev_sample")
    mean, packed = differentiable["prev_sample_mean"].requires_grad_(), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flowdppo_ops.loss(mean, **{**constant, "ref_kl_weight": 0.0}).loss.backward()
    # FlowDPPO's backward reads the mean and the sample; the old mean is free to go.
    assert packed.count(mean.shape) == 2

    differentiable, constant = inputs("step")
    leaves, packed[:] = {name: value.requires_grad_() for name, value in differentiable.items()}, []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(**leaves, **{**constant, "ref_kl_weight": 0.0}).loss.backward()
    assert packed.count(mean.shape) == 4  # both outputs and both samples; the residual is free to go


def test_the_interpreter_runs_on_during_a_long_call():
    rows = 1_000_000  # ~0.1 s of native work
    log_prob, advantages = torch.randn(rows), torch.randn(rows)
    times = {}

    def call():
        start = time.perf_counter()
        flowdppo_ops.loss(None, None, advantages, log_prob=log_prob, old_log_prob=log_prob, objective=FlowGRPO())
        times["call"] = time.perf_counter() - start

    thread = threading.Thread(target=call)
    thread.start()
    gap, last = 0.0, time.perf_counter()
    while thread.is_alive():
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
    thread.join()
    # With the GIL held, this loop would stand still for all of the call.
    assert gap < times["call"] / 2


def test_lazily_negated_views_have_their_own_sign():
    differentiable, constant = inputs("prev_sample")
    sample = constant["prev_sample"]
    negated = torch.complex(torch.zeros_like(sample), -sample).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, sample)
    wanted = flowdppo_ops.loss(**differentiable, **constant).loss
    assert torch.equal(flowdppo_ops.loss(**differentiable, **{**constant, "prev_sample": negated}).loss, wanted)


@pytest.mark.parametrize("name", ["uncond_output", "old_residual", "sigma", "guidance_scale", "weights"])
def test_lazily_negated_views_of_a_step(name):
    differentiable, constant = inputs("step")
    arguments = {**differentiable, **constant}
    value = arguments[name]
    negated = torch._neg_view(-value)  # contiguous, so that no copy resolves it
    assert negated.is_neg()
    assert torch.equal(call(**{**arguments, name: negated}).loss, call(**arguments).loss)


@FUNCTIONS
def test_the_operator_takes_any_strides(source):
    differentiable, constant = inputs(source)
    name = "sqrt_dt" if source == "prev_sample" else "sigma_max"
    call = checked(differentiable, {**constant, name: torch.tensor(0.3)}, FlowDPPO())
    arguments = operator_arguments(call)
    latents = len(_library.LATENTS)
    strided = [None if t is None else t.t().contiguous().t() for t in arguments[:latents]]
    assert not any(t.is_contiguous() for t in strided if t is not None)
    wanted = torch.ops.flowdppo_ops.policy_loss(*arguments, None)
    mine = torch.ops.flowdppo_ops.policy_loss(*strided, *arguments[latents:], None)
    assert torch.equal(mine[0], wanted[0])


@pytest.mark.parametrize("scale", [1.0, 3.0, 2.0**-7, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_formed_ahead_is_the_backward_s(dtype, scale, monkeypatch):
    """The forward may form the gradient too; with any factor from upstream it is what a second pass would give."""
    torch.set_num_threads(2)
    differentiable, constant = inputs("prev_sample", dtype)
    mean = differentiable["prev_sample_mean"].requires_grad_()
    grads = []
    for _ in range(2):
        result = flowdppo_ops.loss(mean, **{**constant, "ref_kl_weight": 0.0}, objective=OBJECTIVES["flow_dppo"])
        grads += torch.autograd.grad(result.loss * scale, mean)
        again = _library._native.policy_loss_backward  # the second time without what the forward formed
        monkeypatch.setattr(_library._native, "policy_loss_backward", lambda *args, again=again: again(*args[:4]))
    assert (grads[0][~result.keep] == 0).all()
    assert not result.keep.all()
    if dtype == torch.float32 and scale == 3:  # three roundings of half an ulp against two
        assert ((grads[0] - grads[1]).abs() <= 2.5 * 2.0**-23 * grads[1].abs()).all()
    else:  # an infinite factor makes NaN of a difference of 0, both times
        torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=scale == float("inf"))


def test_gradient_formed_ahead_is_handed_out_once():
    differentiable, constant = inputs("prev_sample")
    mean = differentiable["prev_sample_mean"].requires_grad_()
    loss = flowdppo_ops.loss(mean, **constant).loss
    (first,) = torch.autograd.grad(loss, mean, retain_graph=True)
    wanted = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, mean)
    assert torch.equal(second, wanted)


@pytest.mark.parametrize("rows", [3, 8, 9])
def test_same_bits_for_any_thread_count_with_a_factor_from_upstream(rows):
    """Whether the gradient is formed ahead must not hang on the threads: a factor then rounds once more."""
    differentiable, constant = inputs("prev_sample", rows=rows, numel=40_001)
    mean = differentiable["prev_sample_mean"].requires_grad_()
    grads = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        grads += torch.autograd.grad(flowdppo_ops.loss(mean, **constant).loss / 3, mean)
    for grad in grads[1:]:
        assert torch.equal(grad, grads[0])


WITHOUT_DLPACK = """
import sys
import torch
if sys.argv[1] == "attributes":
    torch.Tensor.__dlpack_c_exchange_api__ = None
from flowdppo_ops import loss, sde_step
torch.manual_seed(0)
old, x, noise = torch.randn(3, 4, 5, dtype=torch.bfloat16), torch.randn(3, 5, 4).mT, torch.randn(3, 4, 5)
mean, advantages = torch.nn.Parameter(old + 0.1 * noise), torch.randn(3)
for _ in range(2):
    result = loss(mean, old, advantages, std=torch.full((3, 1, 1), 0.5), prev_sample=x)
    (grad,) = torch.autograd.grad(result.loss, mean)
    step = sde_step(mean, x, sigma=0.8, sigma_next=0.7, noise=noise)
    print([t.double().sum().item() for t in (result.loss, result.kl, grad, step.log_prob, step.prev_sample)])
"""


def test_tensors_are_described_alike_with_and_without_dlpack():
    """PyTorch before 2.10 offers no such interface."""
    command = [sys.executable, "-c", WITHOUT_DLPACK]
    found = [
        subprocess.run([*command, way], capture_output=True, text=True, check=True) for way in ("dlpack", "attributes")
    ]
    assert found[0].stdout == found[1].stdout
    assert found[0].stdout.count("[") == 2
