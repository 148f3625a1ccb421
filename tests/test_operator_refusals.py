"""The registered operators, called directly with what does not fit: refused, never read.

The calls are those that the public functions make, recorded on their way through the dispatcher; then one argument at a
time is exchanged for one that does not fit the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from parity import leaves, upstream_of
from small_calls import results_of, small_call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowdppo_ops import FlowGRPO

ROWS, NUMEL = 4, 8


class Recorded(NamedTuple):
    operator: Any
    arguments: tuple
    made: list[bool]  # whether an argument is a result of an operator before

    @property
    def names(self) -> list[str]:
        return [argument.name for argument in self.operator._schema.arguments]

    def with_(self, index: int, value: Any) -> Any:
        arguments = list(self.arguments)
        arguments[index] = value
        with torch.no_grad():
            return self.operator(*arguments)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[Recorded] = []
        self._results: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "flowdppo_ops":
            assert not kwargs
            made = [isinstance(value, Tensor) and value.data_ptr() in self._results for value in args]
            self.calls.append(Recorded(func, args, made))
            results = out if isinstance(out, (tuple, list)) else (out,)
            self._results |= {result.data_ptr() for result in results if result.numel()}
        return out


def call_of(kind: str) -> tuple[str, dict[str, Any]]:
    """Of every kind, with all that can be given, in numbers that bfloat16 holds."""
    name, _, form = kind.partition(", ")
    options = {"everything": True}
    if form == "log-probs alone":
        options = {"objective": FlowGRPO(0.01), "weights": True}
    arguments = small_call(name, (ROWS,), (NUMEL,), dtype=torch.bfloat16, **options)
    arguments = {
        key: value.bfloat16().float() if isinstance(value, Tensor) else value for key, value in arguments.items()
    }
    if form == "log-probs alone":
        del arguments["prev_sample_mean"], arguments["old_prev_sample_mean"], arguments["std"]
        arguments |= {"prev_sample_mean": None, "old_prev_sample_mean": None}
    if form == "drawn":
        arguments["noise"] = arguments.pop("prev_sample")
    if form == "sharded":
        arguments["process_group"] = torch.distributed.group.WORLD
    return name, arguments


FORMS = ["loss", "loss, sharded", "log_prob", "log_prob, log-probs alone"]
FORMS += ["step_loss", "step_loss, sharded", "sde_step", "sde_step, drawn"]


def recorded(form: str) -> list[Recorded]:
    if "sharded" in form:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        kind, arguments = call_of(form)
        names = ["log_prob"] if form.endswith("alone") else leaves(arguments)
        inputs = [arguments[name].requires_grad_() for name in names]
        with Recorder() as recorder:
            results = results_of(kind, arguments)
            torch.autograd.grad(results, inputs, [upstream_of(result) for result in results])
    finally:
        if "sharded" in form:
            torch.distributed.destroy_process_group()
    assert len(recorder.calls) >= 2, "a forward and a backward"
    return recorder.calls


@pytest.fixture(scope="module")
def calls(native):
    """By form of the call; each recorded once."""
    return {form: recorded(form) for form in FORMS}


forms = pytest.mark.parametrize("form", FORMS)


def assert_refused(calls: list[Recorded], kind: type, change, *, only_made: bool = False) -> None:
    """Every argument of that kind, when it is changed. change: None where it does not apply."""
    taken, tried = [], 0
    for call in calls:
        for index, value in enumerate(call.arguments):
            if not isinstance(value, kind) or (only_made and not call.made[index]):
                continue
            changed = change(value)
            if changed is None:
                continue
            tried += 1
            try:
                call.with_(index, changed)
            except (ValueError, TypeError):
                continue
            except Exception as error:
                taken.append(f"{call.operator} {call.names[index]}: {type(error).__name__}: {error}")
            else:
                taken.append(f"{call.operator} {call.names[index]}")
    assert tried
    assert taken == []


def row_short(value: Tensor) -> Tensor:
    return value[:-1].clone() if value.ndim else value.repeat(ROWS - 1)


def row_more(value: Tensor) -> Tensor:
    return torch.cat([value, value[:1]]) if value.ndim else value.repeat(ROWS + 1)


def element_short(value: Tensor) -> Tensor | None:
    return value[:, :-1].clone() if value.ndim == 2 else None


def element_more(value: Tensor) -> Tensor | None:
    return torch.cat([value, value[:, :1]], 1) if value.ndim == 2 else None


def exchanged(value: Tensor) -> Tensor | None:
    return value.t().contiguous() if value.ndim == 2 else None


def element_each(value: Tensor) -> Tensor | None:
    return value[:, None].repeat(1, NUMEL) if value.ndim == 1 else None


def empty(value: Tensor) -> Tensor:
    return value.new_empty(0)


OF_LATENTS = [element_short, element_more, exchanged]
SIZES = [row_short, row_more, element_each, empty, *OF_LATENTS]
FORMS_OF_SIZES = [
    (form, change) for form in FORMS for change in SIZES if "alone" not in form or change not in OF_LATENTS
]


@pytest.mark.parametrize(("form", "change"), FORMS_OF_SIZES)
def test_sizes_that_do_not_fit(calls, form, change):
    assert_refused(calls[form], Tensor, change)


OTHER_KINDS = [torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]


@forms
@pytest.mark.parametrize("dtype", OTHER_KINDS, ids=str)
def test_dtypes_that_are_never_taken(calls, form, dtype):
    assert_refused(calls[form], Tensor, lambda value: value.to(dtype))


@pytest.mark.parametrize("form", [form for form in FORMS if "drawn" not in form])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_intermediate_results_in_half_precision(calls, form, dtype):
    """What an operator made for another has the dtype of the arithmetic (sums over ranks: float64)."""
    assert any(any(call.made) for call in calls[form])
    assert_refused(calls[form], Tensor, lambda value: value.to(dtype), only_made=True)


def as_numbers(result: Any) -> list[Tensor]:
    return [value.double() for value in (result if isinstance(result, (tuple, list)) else (result,))]


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_inputs_of_another_float_dtype(calls, form, dtype):
    """Refused, or the same numbers read as what they are."""
    wrong = []
    for call in calls[form]:
        for index, value in enumerate(call.arguments):
            if not isinstance(value, Tensor) or call.made[index]:
                continue
            try:
                mine = as_numbers(call.with_(index, value.to(dtype)))
            except (ValueError, TypeError):
                continue
            for a, b in zip(mine, as_numbers(call.with_(index, value)), strict=True):
                if not a.numel() or not b.numel():  # what is not made, or already there
                    continue
                if a.shape != b.shape or not ((a - b).abs() <= 0.01 * b.abs().max()).all():
                    wrong.append(f"{call.operator} {call.names[index]}")
    assert wrong == []


@forms
def test_tensors_of_another_device(calls, form):
    """The meta device stands in for it."""
    assert_refused(calls[form], Tensor, lambda value: value.to("meta"))


@forms
def test_absent_tensors(calls, form):
    """Refused, or not needed; never an address of nothing."""
    for call in calls[form]:
        for index, value in enumerate(call.arguments):
            is_optional = "Optional" in str(call.operator._schema.arguments[index].type)
            if isinstance(value, Tensor) and is_optional:
                try:
                    results = as_numbers(call.with_(index, None))
                except (ValueError, TypeError):
                    continue
                assert all(torch.isfinite(result).all() for result in results), call.names[index]


@forms
def test_words_that_are_unknown(calls, form):
    assert_refused(calls[form], str, lambda value: "nonsense")


@pytest.mark.parametrize("number", [-1, 3, 5, 2**40])
@pytest.mark.parametrize("form", ["sde_step", "sde_step, drawn"])
def test_row_dims_beyond_the_rank(calls, form, number):
    assert_refused(calls[form], int, lambda value: None if isinstance(value, bool) else number)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("form", ["sde_step", "sde_step, drawn"])
def test_dtypes_of_results(calls, form, dtype):
    assert_refused(calls[form], torch.dtype, lambda value: dtype)


@forms
def test_what_was_recorded_is_taken(calls, form):
    """Else the tests above prove nothing."""
    for call in calls[form]:
        with torch.no_grad():
            assert all(torch.isfinite(result).all() for result in as_numbers(call.operator(*call.arguments)))
