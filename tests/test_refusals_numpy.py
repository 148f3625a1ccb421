"""`flowdppo_ops.numpy`: numbers and arrays that are refused, and arrays that are more than plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_calls import refuses, small_call

import flowdppo_ops.numpy as fnp
from flowdppo_ops import FlowGRPO

HUGE = 10**400


def arrays(kind: str = "loss", **change) -> dict:
    return {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in (small_call(kind, everything=True) | change).items()
    }


@pytest.mark.parametrize("name", ["std", "sqrt_dt", "weights", "ref_std", "ref_kl_weight"])
def test_numbers_too_large_for_a_float_in_numpy(name):
    refuses(name, fnp.loss, **arrays() | {name: HUGE})


@pytest.mark.parametrize("threads", [-1, 0, 2**70, 1.5, "2", True, [1]], ids=repr)
def test_threads_in_numpy(threads):
    refuses("threads", fnp.loss, **arrays(), threads=threads)


@pytest.mark.parametrize("threads", [1, 2, 10_000, np.int64(2)], ids=repr)
def test_good_threads_in_numpy(threads):
    assert np.array_equal(fnp.loss(**arrays(), threads=threads)[0], fnp.loss(**arrays())[0])


# ---- NumPy's other arrays --------------------------------------------------------------------------------------------

ARRAYS = [name for name, value in arrays().items() if isinstance(value, np.ndarray)]
# Two-dimensional, which a matrix always is: log-probs of [4, 3] rows and nothing else.
LOG_PROBS = {"old_log_prob": np.zeros((4, 3)), "log_prob": np.linspace(-1, 1, 12).reshape(4, 3)}
LOG_PROBS |= {"advantages": np.ones((4, 3)), "objective": FlowGRPO(0.1), "reduction": "none"}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("mask", [False, True])
def test_masked_arrays_are_refused(name, mask):
    """What is masked must not count, and here it would."""
    given = arrays()
    masked = np.ma.masked_array(given[name], mask=mask)
    message = refuses(name, fnp.loss, error=TypeError, **given | {name: masked})
    assert "MaskedArray" in message


def test_masked_log_probs_are_refused():
    refuses("log_prob", fnp.loss, error=TypeError, **arrays("log_prob") | {"log_prob": np.ma.zeros(12, np.float32)})


def as_memmap(value, folder):
    mapped = np.memmap(folder / f"array{id(value)}", value.dtype, "w+", shape=value.shape)
    mapped[...] = value
    return mapped


SUBCLASSES = {
    "recarray": lambda value, folder: value.view(np.recarray),
    "memmap": as_memmap,
    "read-only": lambda value, folder: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape),
}


def assert_plain(mine, wanted) -> None:
    (loss, grads), (wanted_loss, wanted_grads) = mine, wanted
    assert type(loss) is type(wanted_loss)
    assert np.array_equal(loss, wanted_loss)
    pairs = zip(*(g if isinstance(g, tuple) else (g,) for g in (grads, wanted_grads)), strict=True)
    for grad, wanted_grad in pairs:
        assert type(grad) is np.ndarray
        assert grad.flags.writeable
        assert np.array_equal(grad, wanted_grad)


@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
@pytest.mark.parametrize("name", [*ARRAYS, "all"])
def test_other_arrays_give_plain_ones(tmp_path, name, make):
    given = arrays()
    changed = {key: make(given[key], tmp_path) for key in (ARRAYS if name == "all" else [name])}
    assert_plain(fnp.loss(**given | changed, reduction="none"), fnp.loss(**given, reduction="none"))


@pytest.mark.parametrize("names", [["log_prob"], ["old_log_prob"], ["advantages"], [*LOG_PROBS][:3]], ids=str)
@pytest.mark.parametrize("make", [np.asmatrix, lambda value: value.view(np.recarray)], ids=["matrix", "recarray"])
def test_other_log_probs_give_plain_ones(names, make):
    changed = {name: make(LOG_PROBS[name]) for name in names}
    assert_plain(fnp.loss(None, None, **LOG_PROBS | changed), fnp.loss(None, None, **LOG_PROBS))
