"""Any legal call agrees with the reference: shapes, dtypes, objectives and options drawn by hypothesis."""

from __future__ import annotations

import math

import torch
from cases import DTYPES, LATENTS, LOG_PROBS, draw
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from parity import equal_bits, far_from_ties, run, three_way
from step_cases import LATENTS as STEP_LATENTS
from step_cases import OLD_FORMS, REF_FORMS, SAMPLERS, SCHEDULE, draw_step

from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard

# derandomize: CI and a developer see the same examples; raise max_examples to look for more.
dependable = settings(
    deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

dims = st.lists(st.integers(1, 5), max_size=2).map(tuple)
latent_dims = st.one_of(
    st.lists(st.integers(1, 9), max_size=4).map(tuple), st.integers(1, 3000).map(lambda numel: (numel,))
)
mixed = st.fixed_dictionaries(
    {"*": st.just(torch.float32)},
    optional=dict.fromkeys(
        (*LATENTS, *LOG_PROBS, "advantages", "std", "sqrt_dt", "weights", "ref_std"),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
)
limit = st.sampled_from([0.003, 0.02, 0.5, math.inf])
clip_range = st.one_of(limit, st.tuples(limit, limit))
clamp = st.sampled_from([None, 0.75, 100.0])
objective = st.one_of(
    st.builds(
        FlowDPPO,
        kl_mask_threshold=st.sampled_from([0.0, 1e-4, 1e-2, math.inf]),
        normalize_kl=st.booleans(),
        mask=st.sampled_from(["asymmetric", "symmetric", "none"]),
        nan_kl=st.sampled_from(["mask", "keep"]),
    ),
    st.builds(FlowGRPO, clip_range=clip_range, adv_clip_max=clamp),
    st.builds(GRPOGuard, clip_range=clip_range, adv_clip_max=clamp, per_row_scale=st.booleans()),
)
calls = st.fixed_dictionaries(
    {
        "row_shape": dims,
        "latent_shape": latent_dims,
        "source": st.sampled_from(["sample", "sample and old", "log_prob"]),
        "dtypes": st.one_of(mixed, st.just(DTYPES["float64"])),
        "objective": objective,
        "density": st.sampled_from(["gaussian", "cps"]),
        "latent_reduction": st.sampled_from(["mean", "sum"]),
        "reduction": st.sampled_from(["mean", "sum", "none", "kept_mean"]),
        "weights": st.booleans(),
        "ref_kl_weight": st.sampled_from([0.0, 0.04, 1.0]),
        "seed": st.integers(0, 1000),
    }
)


@dependable
@given(call=calls)
@example(call={"row_shape": (), "latent_shape": ()})
@example(call={"row_shape": (), "latent_shape": (1,), "source": "log_prob"})
@example(call={"row_shape": (5, 5), "latent_shape": (1, 1, 1, 1), "objective": GRPOGuard(0.02)})
def test_agrees_with_the_reference(loss, call):
    arguments = draw(**call)
    assume(far_from_ties(arguments))
    three_way(loss, arguments)


# Values where something overflows, divides by zero or is not a number.
wild = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, math.inf, -math.inf, math.nan])


@dependable
@given(
    call=calls,
    places=st.lists(
        st.tuples(
            st.sampled_from(
                ["prev_sample_mean", "old_prev_sample_mean", "prev_sample", "advantages", "std", "log_prob"]
            ),
            st.integers(0, 10**6),
            wild,
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_wild_values_never_crash(loss, call, places):
    """Whatever the numbers: the right shapes, shares within [0, 1], and no exception."""
    arguments = draw(**call)
    for name, place, value in places:
        if name in arguments:
            tensor = arguments[name].reshape(-1)
            tensor[place % tensor.numel()] = value
    mine = run(loss, arguments)
    assert mine["keep"].dtype == torch.bool
    assert mine["ratio"].shape == arguments["advantages"].shape
    for name, value in mine["metrics"].items():
        if "frac" in name:
            assert 0 <= value <= 1, name
    bad = sum(not math.isfinite(value) for value in mine["ratio"].flatten().tolist())
    assert mine["metrics"]["nonfinite_fraction"] >= bad / mine["ratio"].numel() - 1e-6  # a float32 share


# ---- step_loss -------------------------------------------------------------------------------------------------------

step_mixed = st.fixed_dictionaries(
    {"*": st.just(torch.float32)},
    optional=dict.fromkeys(
        (*STEP_LATENTS, *SCHEDULE, "advantages", "guidance_scale", "weights", "ref_std"),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
)
step_objective = st.one_of(
    objective,
    st.builds(FlowDPPO, kl_mask_threshold=st.sampled_from([1e-4, 1e-2]), kl_space=st.just("velocity")),
)
step_calls = st.fixed_dictionaries(
    {
        "row_shape": dims,
        "latent_shape": latent_dims,
        "sampler": st.sampled_from(SAMPLERS),
        "old_form": st.sampled_from([*OLD_FORMS]),
        "ref_form": st.sampled_from([None, *REF_FORMS]),
        "guidance": st.booleans(),
        "old_log_prob": st.booleans(),
        "deterministic": st.booleans(),
        "dtypes": st.one_of(step_mixed, st.just(DTYPES["float64"])),
        "objective": step_objective,
        "latent_reduction": st.sampled_from(["mean", "sum"]),
        "reduction": st.sampled_from(["mean", "sum", "none", "kept_mean"]),
        "weights": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@dependable
@given(call=step_calls)
@example(call={"row_shape": (), "latent_shape": ()})
@example(call={"row_shape": (), "latent_shape": (1,), "old_form": "residual", "guidance": True})
def test_steps_agree_with_the_reference(step_loss, call):
    arguments = draw_step(**call)
    # A deterministic row's ratio is exactly 1, on both sides of it at once, in every arithmetic.
    assume(call.get("deterministic") or far_from_ties(arguments))
    three_way(step_loss, arguments)


few = settings(dependable, max_examples=40)


@few
@given(call=step_calls, rows=st.integers(2, 9), data=st.data())
def test_rows_may_come_in_any_order(native, call, rows, data):
    """Every row by itself: permuted inputs give the permuted outputs, to the bit."""
    call |= {"row_shape": (rows,), "reduction": "sum"}
    if isinstance(call["objective"], GRPOGuard):  # whose batch means are sums in another order
        call["objective"] = GRPOGuard(0.02, per_row_scale=True)
    arguments = draw_step(**call)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    permuted = {name: value[order] if torch.is_tensor(value) else value for name, value in arguments.items()}
    mine, wanted = run(native.step_loss, permuted), run(native.step_loss, arguments)
    for name, value in wanted.items():
        if name not in ("loss", "metrics"):
            torch.testing.assert_close(mine[name], value[order], rtol=0, atol=0)


@few
@given(call=step_calls, factor=st.sampled_from([0.25, 2.0, -1.0]), name=st.sampled_from(["advantages", "weights"]))
def test_the_loss_is_linear_in(native, call, factor, name):
    """Powers of 2, to the bit: nothing of the policy's term but its scale hangs on the size of the advantages."""
    call |= {
        "objective": FlowDPPO(1e-2, mask=("symmetric", "asymmetric")[factor > 0]),
        "ref_form": None,
        "weights": True,
    }
    arguments = draw_step(**call)
    mine, wanted = (
        run(native.step_loss, arguments | {name: arguments[name] * by}, upstream=over)
        for by, over in ((factor, 1.0), (1.0, factor))
    )
    mine["loss"] = mine["loss"] / factor
    del mine["metrics"], wanted["metrics"]
    equal_bits(mine, wanted)


@few
@given(call=step_calls)
def test_a_guidance_scale_of_1_changes_nothing(native, call):
    call |= {"dtypes": DTYPES["float64"], "guidance": False}
    arguments = draw_step(**call)
    assume(call["deterministic"] or far_from_ties(arguments))
    guided = {"uncond_output": arguments["model_output"].flip(-1) + 0.5, "guidance_scale": 1.0}
    mine, wanted = run(native.step_loss, arguments | guided), run(native.step_loss, arguments)
    assert (mine["grad uncond_output"] == 0).all()
    for name in ("loss", "log_prob", "log_ratio", "ratio", "kl", "keep", "grad model_output"):
        torch.testing.assert_close(mine[name], wanted[name], rtol=1e-7, atol=1e-12)
