"""`sde_step` against the reference: all samplers, dtypes, shapes and options; exactness, determinism, strides."""

from __future__ import annotations

import itertools

import pytest
import torch
from parity import equal_bits
from sde_step_cases import DTYPES, LAYOUTS, SAMPLERS, draw, run, three_way, upstream_of

import flowdppo_ops
from flowdppo_ops import reference, sde_step

# Elements per row: a tail alone, around the lanes of 32, around the block of 2048 and the chunk of 32768.
SIZES = (1, 31, 32, 33, 2047, 2048, 2049, 32_768, 32_769, 70_003)

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
both_ways = pytest.mark.parametrize("replay", [False, True], ids=["drawn", "replay"])
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


@samplers
@both_ways
@dtypes
@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "guided"])
def test_parity(sampler, replay, dtypes, guidance):
    for residual, normalizer in itertools.product((False, True), repeat=2):
        arguments = draw(sampler=sampler, replay=replay, dtypes=dtypes, guidance=guidance, residual=residual)
        three_way(sde_step, arguments | {"log_prob_normalizer": normalizer})


@both_ways
@dtypes
@pytest.mark.parametrize("through", [("log_prob",), ("prev_sample_mean",), ("log_prob", "prev_sample_mean")])
def test_gradients(through, dtypes, replay):
    for sampler in SAMPLERS:
        arguments = draw(sampler=sampler, replay=replay, dtypes=dtypes, guidance=True)
        mine = three_way(sde_step, arguments, through=through)
        assert all(mine[f"grad {name}"].abs().max() > 0 for name in ("model_output", "uncond_output"))


@pytest.mark.parametrize("numel", SIZES)
@dtypes
def test_sizes(numel, dtypes):
    three_way(sde_step, draw((3, numel), guidance=True, residual=True, dtypes=dtypes))


@pytest.mark.parametrize(("shape", "row_dims", "schedule"), LAYOUTS.values(), ids=LAYOUTS)
@both_ways
def test_layouts(shape, row_dims, schedule, replay):
    three_way(sde_step, draw(shape, row_dims, schedule, guidance=True, residual=True, replay=replay))


def test_numbers_and_tensors_give_the_same():
    arguments = draw(schedule_shape=(), guidance=True)
    names = ("sigma", "sigma_next", "noise_level", "guidance_scale")
    equal_bits(run(sde_step, arguments), run(sde_step, arguments | {n: arguments[n].item() for n in names}))


def test_sigma_max_replaces_a_sigma_of_one():
    arguments = draw() | {"sigma": torch.tensor([1.0, 0.9, 1.0, 0.8]), "sigma_max": torch.tensor([0.9, 0.9, 0.8, 0.8])}
    equal_bits({"std": sde_step(**arguments).std}, {"std": reference.sde_step(**arguments).std})


def test_strides():
    arguments = draw((3, 4, 6, 5), guidance=True, residual=True)
    wanted = run(sde_step, arguments)
    for name in ("model_output", "uncond_output", "sample", "noise"):
        strided = arguments[name].contiguous(memory_format=torch.channels_last)
        assert not strided.is_contiguous()
        equal_bits(run(sde_step, arguments | {name: strided}), wanted)
    every_other = torch.stack([arguments["sigma"], torch.full((3,), torch.nan)], -1)[:, 0]
    equal_bits(run(sde_step, arguments | {"sigma": every_other}), wanted)


# ---- what is exact ---------------------------------------------------------------------------------------------------


@samplers
@dtypes
def test_a_replay_of_the_stored_latent_has_the_same_bits(sampler, dtypes):
    arguments = draw(sampler=sampler, dtypes=dtypes, guidance=True, residual=True)
    drawn = run(sde_step, arguments)
    del arguments["noise"]
    equal_bits(run(sde_step, arguments | {"prev_sample": drawn["prev_sample"]}), drawn)


def test_a_given_latent_is_returned_itself_where_it_has_the_dtype_of_the_sample():
    arguments = draw(replay=True)
    given = arguments["prev_sample"]
    assert sde_step(**arguments).prev_sample.data_ptr() == given.data_ptr()
    arguments["sample"] = arguments["sample"].bfloat16()
    stored = sde_step(**arguments).prev_sample
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, given.bfloat16())


def test_the_generator_decides_the_noise():
    arguments = draw()
    del arguments["noise"]
    steps = [sde_step(**arguments, generator=torch.Generator().manual_seed(seed)).prev_sample for seed in (1, 1, 2)]
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    theirs = reference.sde_step(**arguments, generator=torch.Generator().manual_seed(1)).prev_sample
    assert torch.allclose(steps[0], theirs, rtol=1e-6, atol=1e-6)


def test_what_is_drawn_has_the_std_that_is_returned():
    shape = (2, 200_000)
    arguments = draw(shape)
    del arguments["noise"]
    step = sde_step(**arguments, generator=torch.Generator().manual_seed(3))
    spread = (step.prev_sample - step.prev_sample_mean).std(1) / step.std
    assert (spread - 1).abs().max() < 5 / (2 * shape[1]) ** 0.5  # five standard errors


@samplers
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_deterministic_rows(sampler, replay, dtype):
    """Noise level 0, and CPS's last step, amid rows that are random: all is finite, nothing is random."""
    arguments = draw(sampler=sampler, replay=replay, residual=True, guidance=True, dtypes={"*": dtype})
    arguments["noise_level"][1] = 0.0
    arguments["sigma_next"][2] = 0.0
    fixed = [1, 2] if sampler == "cps" else [1]
    mine = three_way(sde_step, arguments)
    assert (mine["std"][fixed] == 0).all()
    assert (mine["residual"][fixed] == 0).all()
    assert all(value.isfinite().all() for value in mine.values())
    if sampler != "cps":
        assert (mine["log_prob"][fixed] == 0).all()
        alone = run(sde_step, arguments, through=("log_prob",))
        assert (alone["grad model_output"][fixed] == 0).all()
        assert (alone["grad model_output"][[0, 3]] != 0).any()
    if not replay:
        assert torch.equal(mine["prev_sample"][fixed], mine["prev_sample_mean"][fixed].to(dtype))


def test_rows_without_a_coefficient_are_not_read():
    """An infinite latent of a row whose log-prob has no gradient, or no coefficient, is not multiplied with 0."""
    arguments = draw(replay=True)
    arguments["noise_level"][1] = 0.0
    arguments["prev_sample"][[1, 2]] = torch.inf
    output = arguments["model_output"].requires_grad_()
    step = sde_step(**arguments)
    for upstream in (1.0, torch.inf, torch.nan):  # of the row that is deterministic
        (grad,) = torch.autograd.grad(step.log_prob, output, torch.tensor([1.0, upstream, 0.0, 1.0]), retain_graph=True)
        assert (grad[[1, 2]] == 0).all()
        assert grad[[0, 3]].isfinite().all()
    upstream = [torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones_like(output)]
    (grad,) = torch.autograd.grad([step.log_prob, step.prev_sample_mean], output, upstream)
    assert grad.isfinite().all()


def test_a_deterministic_row_that_overflows_as_it_is_stored_has_no_residual():
    arguments = draw(residual=True, dtypes={"*": torch.float16})
    arguments["noise_level"][1] = 0.0
    arguments["sample"][1] = 6e4
    arguments["model_output"][1] = -6e4
    step = sde_step(**arguments)
    assert (step.prev_sample[1] == torch.inf).all()
    assert step.log_prob[1] == 0
    assert (step.residual[1] == 0).all()


@samplers
@pytest.mark.parametrize("guidance", [False, True])
def test_a_recorded_policy_has_no_drift(sampler, guidance):
    """`mu`, and the residual, are formed as `step_loss` forms them: given back as the old policy's, they have KL 0."""
    arguments = draw((4, 3000), sampler=sampler, replay=True, guidance=guidance)
    step = sde_step(**arguments, residual_dtype=torch.float32)
    del arguments["row_dims"]
    for old in ({"old_prev_sample_mean": step.prev_sample_mean}, {"old_residual": step.residual}):
        result = flowdppo_ops.step_loss(**arguments, advantages=torch.ones(4), **old)
        assert (result.kl == 0).all()
        assert (result.ratio == 1).all()


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 100_003), (200, 33)])
@dtypes
def test_any_number_of_threads_gives_the_same_bits(shape, dtypes):
    arguments = draw(shape, guidance=True, residual=True, dtypes=dtypes)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(sde_step, arguments))
    for other in results[1:]:
        equal_bits(other, results[0])


# ---- inside PyTorch --------------------------------------------------------------------------------------------------


@samplers
@pytest.mark.parametrize("guidance", [False, True])
def test_gradcheck(sampler, guidance):
    arguments = draw((2, 3, 2), sampler=sampler, replay=True, guidance=guidance, dtypes={"*": torch.float64})
    names = ["model_output", "uncond_output"][: 1 + guidance]

    def scored(*outputs):
        step = sde_step(**arguments | dict(zip(names, outputs, strict=True)))
        return step.log_prob, step.prev_sample_mean

    assert torch.autograd.gradcheck(scored, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("wanted", ["model_output", "uncond_output"])
def test_a_gradient_that_nobody_wants_is_not_made(wanted):
    arguments = draw(guidance=True)
    both = run(sde_step, arguments)
    leaf = arguments[wanted] = arguments[wanted].requires_grad_()
    step = sde_step(**arguments)
    through = [step.log_prob, step.prev_sample_mean]
    (grad,) = torch.autograd.grad(through, [leaf], [upstream_of(t) for t in through])
    assert torch.equal(grad, both[f"grad {wanted}"])


def test_only_log_prob_and_mean_are_differentiable():
    arguments = draw(residual=True)
    arguments["model_output"].requires_grad_()
    arguments["sample"].requires_grad_()
    step = sde_step(**arguments)
    assert step.log_prob.requires_grad
    assert step.prev_sample_mean.requires_grad
    assert not any(t.requires_grad for t in (step.prev_sample, step.std, step.residual))
    given = draw(replay=True)
    given["prev_sample"].requires_grad_()
    assert not any(t.requires_grad for t in sde_step(**given) if t is not None)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(context):
    arguments = draw(residual=True, guidance=True)
    wanted = sde_step(**arguments)
    arguments["model_output"].requires_grad_()
    with context():
        step = sde_step(**arguments)
    for mine, theirs in zip(step, wanted, strict=True):
        assert not mine.requires_grad
        assert torch.equal(mine, theirs)


def test_autocast_changes_nothing():
    arguments = draw(guidance=True, residual=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(sde_step, arguments)
    equal_bits(inside, run(sde_step, arguments))


@pytest.mark.parametrize("through", ["log_prob", "prev_sample_mean"])
def test_double_backward_is_an_error(through):
    arguments = draw(replay=True)
    output = arguments["model_output"].requires_grad_()
    result = getattr(sde_step(**arguments), through)
    (grad,) = torch.autograd.grad(result.sum(), output, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_a_latent_that_was_changed_since_is_noticed():
    arguments = draw(replay=True)
    arguments["model_output"].requires_grad_()
    step = sde_step(**arguments)
    arguments["prev_sample"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step.log_prob.sum().backward()


@pytest.mark.parametrize("replay", [False, True], ids=["drawn", "replay"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["every latent another"]], ids=["float32", "mixed"])
def test_compiled_equals_eager(replay, dynamic, dtypes):
    torch._dynamo.reset()
    compiled = torch.compile(flowdppo_ops.sde_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((4, 5, 8), (3, 2, 40)):
        arguments = draw(shape, guidance=True, residual=True, replay=replay, dtypes=dtypes)
        equal_bits(run(compiled, arguments), run(sde_step, arguments))


@pytest.mark.parametrize("replay", [False, True], ids=["drawn", "replay"])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("residual_dtype", [None, torch.float16])
def test_opcheck(replay, guidance, residual_dtype):
    given = draw((2, 3, 5), 2, (1, 3), replay=replay, guidance=guidance)
    names = ("model_output", "uncond_output", "sample", "prev_sample", "noise")
    latents = [given.get(name) for name in names]
    for latent in latents[:2]:
        if latent is not None:
            latent.requires_grad_()
    vectors = given["sigma"], given["sigma_next"], given["noise_level"], torch.tensor(0.99), given.get("guidance_scale")
    args = (*latents, *vectors, "flow_sde", True, residual_dtype, 2)
    torch.library.opcheck(torch.ops.flowdppo_ops.sde_step.default, args)

    out = torch.ops.flowdppo_ops.sde_step(*args)
    stored, mean, numbers = given.get("prev_sample", out[0]), out[2].detach(), out[5]
    for grad_log_prob, grad_mean in ((torch.ones(2, 3), None), (None, mean), (torch.ones(2, 3), mean)):
        saved = grad_log_prob, grad_mean, stored, mean, numbers
        dtypes = torch.bfloat16, torch.float32 if guidance else None
        torch.library.opcheck(torch.ops.flowdppo_ops.sde_step_backward.default, (*saved, *dtypes))
