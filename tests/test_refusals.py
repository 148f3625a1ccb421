"""Refusals at the boundary: the kind of error, the argument's name in it, and nothing that passes unnoticed."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import OBJECTIVES
from small_calls import KINDS, LOSSES, function_of, refuses, small_call

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO, GRPOGuard, group_advantages

GUARD = OBJECTIVES["guard"]
EVERYTHING = {kind: small_call(kind, everything=True) for kind in KINDS}


def call(kind: str, api=flowdppo_ops, /, **change):
    return function_of(kind, api)(**{**EVERYTHING[kind], **change})


# ---- the environment -------------------------------------------------------------------------------------------------

UNKNOWN = [("FLOWDPPO_OPS_BACKEND", value, "'reference'") for value in ("nonsense", "Reference", "reference ", "1")]
UNKNOWN += [("FLOWDPPO_OPS_CHECK", value, "'1'") for value in ("true", "2", "yes", "01")]


@pytest.mark.parametrize(("variable", "value", "wanted"), UNKNOWN)
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_settings(native, monkeypatch, kind, variable, value, wanted):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as caught:
        call(kind)
    assert repr(value) in str(caught.value)
    assert wanted in str(caught.value)
    monkeypatch.delenv(variable)
    call(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_known_settings(native, monkeypatch, kind):
    for variable, value in (("FLOWDPPO_OPS_BACKEND", "reference"), ("FLOWDPPO_OPS_CHECK", "1")):
        monkeypatch.setenv(variable, value)
        call(kind)
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "0")
    call(kind)


# What the docstrings promise, as numbers and as one bad row. sigma_next < sigma is a range of either.
STEP_RANGES = [("sigma", -0.1), ("sigma", 1.5), ("sigma", math.nan), ("sigma_next", -0.1), ("sigma_next", 1.0)]
STEP_RANGES += [("noise_level", -0.1), ("noise_level", math.inf), ("guidance_scale", math.nan)]
RANGES = [("loss", name, bad) for name in ("std", "sqrt_dt", "ref_std") for bad in (0.0, -0.5, math.nan, math.inf)]
RANGES += [(kind, name, bad) for kind in ("step_loss", "sde_step") for name, bad in STEP_RANGES]
RANGES += [("step_loss", "ref_std", -0.5), ("step_loss", "ref_std", math.nan)]
RANGES += [(kind, "weights", bad) for kind in LOSSES for bad in (math.nan, math.inf)]


@pytest.mark.parametrize("form", ["number", "row"])
@pytest.mark.parametrize(("kind", "name", "bad"), RANGES)
def test_ranges_are_checked(native, monkeypatch, kind, name, bad, form):
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    call(kind)
    value = bad
    if form == "row":
        value = EVERYTHING[kind][name].clone()
        value[3] = bad
    refuses(name, call, kind, error=ValueError, **{name: value})


TENSORS = [
    (kind, name) for kind in KINDS for name, value in EVERYTHING[kind].items() if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("kind", "name"), TENSORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_tensor_is_checked(native, monkeypatch, kind, name, bad):
    value = EVERYTHING[kind][name].clone()
    value[3] = bad
    call(kind, **{name: value})
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    refuses(name, call, kind, error=ValueError, **{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_weight_of_the_reference_is_checked(native, monkeypatch, kind, bad):
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    refuses("ref_kl_weight", call, kind, error=ValueError, ref_kl_weight=bad)


@pytest.mark.parametrize("sigma_max", [1.0, 1.5, torch.full((12,), 1.0)], ids=["1", "1.5", "rows"])
@pytest.mark.parametrize("kind", ["step_loss", "sde_step"])
def test_what_stands_in_for_a_sigma_of_1_is_checked(native, monkeypatch, kind, sigma_max):
    """`1 - sigma_max` is divided by, and its sign is that of a square."""
    monkeypatch.setenv("FLOWDPPO_OPS_CHECK", "1")
    first = {"sigma": torch.ones(12), "sigma_next": torch.full((12,), 0.8)}
    call(kind, **first, sigma_max=0.99)
    refuses("sigma_max", call, kind, error=ValueError, **first, sigma_max=sigma_max)
    call(kind, **first, sigma_max=sigma_max, sampler="dance_sde")  # which does not read it


# ---- numbers ---------------------------------------------------------------------------------------------------------

HUGE = 10**400
NUMBERS = [(kind, name) for kind, name in TENSORS if EVERYTHING[kind][name].ndim == 1]
NUMBERS = [pair for pair in NUMBERS if pair[1] not in ("advantages", "log_prob", "old_log_prob")]
NUMBERS += [(kind, "ref_kl_weight") for kind in LOSSES] + [(kind, "sigma_max") for kind in ("step_loss", "sde_step")]


@pytest.mark.parametrize("huge", [HUGE, -HUGE, 10**5000], ids=["10^400", "-10^400", "10^5000"])
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_numbers_too_large_for_a_float(api, kind, name, huge):
    refuses(name, call, kind, api, **{name: huge})


@pytest.mark.parametrize(
    ("kind", "name"),
    [(FlowDPPO, "kl_mask_threshold"), (FlowGRPO, "clip_range"), (FlowGRPO, "adv_clip_max"), (GRPOGuard, "clip_range")],
)
@pytest.mark.parametrize("huge", [HUGE, -HUGE, 10**5000], ids=["10^400", "-10^400", "10^5000"])
def test_limits_too_large_for_a_float(kind, name, huge):
    refuses(name, kind, error=ValueError, **{name: huge})
    if name == "clip_range":
        refuses(name, kind, error=ValueError, clip_range=(0.1, huge))


# ---- tensors that have no plain memory -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(("kind", "name"), TENSORS)
def test_nested_tensors(api, kind, name, layout):
    value = EVERYTHING[kind][name]
    nested = torch.nested.nested_tensor([row.reshape(-1) for row in value], layout=layout)
    refuses(name, call, kind, api, **{name: nested})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_rewards(layout):
    rewards = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    refuses("rewards", group_advantages, rewards, [0, 0])


# ---- options ---------------------------------------------------------------------------------------------------------

NO_WORDS = {
    "array": np.array(["mean", "sum"]),
    "array of one": np.array(["mean"]),
    "tensor": torch.ones(2),
    "list": ["mean"],
    "dictionary": {},
    "number": 1,
    "bytes": b"mean",
}
no_words = pytest.mark.parametrize("value", NO_WORDS.values(), ids=NO_WORDS)
OPTIONS = [(kind, name) for kind in LOSSES for name in ("latent_reduction", "reduction")]
OPTIONS += [("loss", "density"), ("step_loss", "sampler"), ("sde_step", "sampler")]


@no_words
@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_options_that_are_no_words(api, kind, name, value):
    refuses(name, call, kind, api, **{name: value})


@no_words
@pytest.mark.parametrize("name", ["mask", "nan_kl", "kl_space"])
def test_options_of_an_objective_that_are_no_words(name, value):
    refuses(name, FlowDPPO, **{name: value})


@no_words
def test_std_of_group_advantages_that_is_no_word(value):
    refuses("std", group_advantages, torch.ones(2), [0, 0], std=value)


@pytest.mark.parametrize("value", [[], {}, "float16", np.float16, np.zeros(2), 16, torch.complex64], ids=repr)
def test_residual_dtype(api, value):
    refuses("residual_dtype", call, "sde_step", api, error=TypeError, residual_dtype=value)


SWITCHES = [
    ("normalize_kl", lambda value: FlowDPPO(normalize_kl=value)),
    ("per_row_scale", lambda value: GRPOGuard(per_row_scale=value)),
    ("log_prob_normalizer", lambda value: call("sde_step", log_prob_normalizer=value)),
]


@pytest.mark.parametrize("value", ["no", "False", 0, 1, None, [], np.zeros(2)], ids=repr)
@pytest.mark.parametrize(("name", "function"), SWITCHES)
def test_switches_are_true_or_false(name, function, value):
    """A word from a configuration file is true, whatever it says."""
    refuses(name, function, value, error=TypeError)


@pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard])
def test_a_clip_range_from_a_list(kind):
    """As configuration files give it: the same objective, which torch.compile and caches hash."""
    from_list, from_tuple = kind([0.1, 0.2]), kind((0.1, 0.2))
    assert from_list == from_tuple
    assert hash(from_list) == hash(from_tuple)
    assert from_list.clip_range == (0.1, 0.2)
    pair = [0.1, 0.2]
    objective = kind(pair)
    pair[0] = 9.0
    assert objective.clip_range == (0.1, 0.2)


@pytest.mark.parametrize("value", [[0.1], [0.1, 0.2, 0.3], [], [0.1, "x"], [0.1, None], np.ones(2)], ids=repr)
@pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard])
def test_clip_ranges_that_are_none(kind, value):
    refuses("clip_range", kind, error=TypeError, clip_range=value)


# ---- what nobody reads is still checked ------------------------------------------------------------------------------

UNREAD = [
    ("loss", "ref_prev_sample_mean", {"ref_kl_weight": 0.0}),
    ("loss", "ref_std", {"ref_kl_weight": 0.0}),
    ("loss", "sqrt_dt", {"objective": FlowDPPO()}),
    ("log_prob", "prev_sample_mean", {"objective": FlowGRPO(), "ref_kl_weight": 0.0, "std": None}),
    ("log_prob", "old_prev_sample_mean", {"objective": FlowGRPO(), "ref_kl_weight": 0.0, "std": None}),
    ("step_loss", "ref_model_output", {"ref_kl_weight": 0.0}),
    ("step_loss", "ref_prev_sample_mean", {"ref_kl_weight": 0.0, "ref_model_output": None}),
    ("step_loss", "ref_std", {"ref_kl_weight": 0.0}),
    ("step_loss", "sigma_max", {"sampler": "dance_sde"}),
    ("sde_step", "sigma_max", {"sampler": "cps"}),
]


@pytest.mark.parametrize("value", ["foo", [1.0], np.ones(12)], ids=["word", "list", "array"])
@pytest.mark.parametrize(("kind", "name", "options"), UNREAD)
def test_arguments_that_nothing_reads(api, kind, name, options, value):
    refuses(name, call, kind, api, error=TypeError, **options | {name: value})


# ---- group_advantages, metrics, the demo -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eps", ["x", None, True, [], torch.ones(()), -1.0, math.nan, HUGE], ids=lambda eps: str(eps)[:9]
)
def test_eps(eps):
    refuses("eps", group_advantages, torch.ones(2), [0, 0], eps=eps)


@pytest.mark.parametrize("ids", [None, 7, 0.5, np.array(3), [[0], [0]], [{}, {}], torch.ones(2), [0]], ids=repr)
def test_group_ids(ids):
    refuses("group_ids", group_advantages, torch.ones(2), ids)


@pytest.mark.parametrize("prefix", [None, 3, b"actor/", ["actor/"]], ids=repr)
@pytest.mark.parametrize("method", ["metrics", "metric_tensors"])
def test_prefix_of_metrics(api, method, prefix):
    result = call("loss", api)
    refuses("prefix", getattr(result, method), error=TypeError, prefix=prefix)


DEMO = [("--seeds", text) for text in ("9999999999999999999999,", "0,99999999999999999999", "9" * 22, "9" * 5000)]
DEMO += [(option, "9" * 30) for option in ("--threads", "--iterations", "--epochs", "--pretrain-steps")]


@pytest.mark.parametrize(("option", "text"), DEMO, ids=lambda text: text[:24])
def test_numbers_of_the_demo(option, text, capsys):
    """Refused where the options are read: by the parser, in its own words."""
    from flowdppo_ops.__main__ import main

    with pytest.raises(SystemExit) as exit_:
        main(["demo", option, text])
    assert exit_.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


# ---- programs saved by torch.export ----------------------------------------------------------------------------------

RUN_SAVED = """
import pathlib, sys
import torch
import flowdppo_ops
for folder in pathlib.Path(sys.argv[1]).iterdir():
    program = torch.export.load(folder / "program.pt2").module()
    leaf, wanted = torch.load(folder / "numbers.pt")
    assert torch.equal(program(leaf), wanted), folder.name
    print(folder.name)
"""


class Exported(torch.nn.Module):
    """A call with its tensors as buffers, which every version of PyTorch exports."""

    def __init__(self, kind: str, name: str):
        super().__init__()
        self.kind, self.name = kind, name
        drawn = {"prev_sample": None, "noise": EVERYTHING[kind]["prev_sample"]} if kind == "sde_step" else {}
        self.arguments = {**EVERYTHING[kind], **drawn}
        for argument, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(argument, value.detach())

    def forward(self, leaf):
        tensors = {name: getattr(self, name) for name in self._buffers}
        result = function_of(self.kind)(**{**self.arguments, **tensors, self.name: leaf})
        return result.log_prob if self.kind == "sde_step" else result.loss


def test_saved_programs_run_where_the_package_was_imported_only(native, tmp_path):
    """`import flowdppo_ops` does not import PyTorch, and a program that is loaded names its operators."""
    kinds = {"loss": "prev_sample_mean", "step_loss": "model_output", "sde_step": "model_output"}
    for kind, name in kinds.items():
        module, leaf = Exported(kind, name), EVERYTHING[kind][name]
        (tmp_path / kind).mkdir()
        torch.export.save(torch.export.export(module, (leaf,)), tmp_path / kind / "program.pt2")
        torch.save((leaf, module(leaf)), tmp_path / kind / "numbers.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN_SAVED, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(kinds)
