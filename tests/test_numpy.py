"""`flowdppo_ops.numpy.loss`: NumPy in, `(loss, grad)` out, the same bits as the PyTorch op, and no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import DTYPES, OBJECTIVES, draw
from parity import leaves
from test_errors import says

import flowdppo_ops
from flowdppo_ops import FlowDPPO, FlowGRPO
from flowdppo_ops import numpy as fnp

objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def arrays(arguments: dict) -> dict:
    return {name: value.numpy() if torch.is_tensor(value) else value for name, value in arguments.items()}


def torch_answer(arguments: dict) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Loss and gradients of the PyTorch op, log_prob's first."""
    names = sorted(leaves(arguments))
    tensors = {name: arguments[name].detach().requires_grad_() for name in names}
    loss = flowdppo_ops.loss(**(arguments | tensors)).loss
    gradients = torch.autograd.grad(loss, list(tensors.values()), torch.ones_like(loss))
    return loss.detach().numpy(), tuple(gradient.numpy() for gradient in gradients)


def same_bits(mine: np.ndarray, wanted: np.ndarray) -> None:
    mine, wanted = np.asarray(mine), np.asarray(wanted)
    assert mine.dtype == wanted.dtype
    assert mine.shape == wanted.shape
    assert np.array_equal(mine, wanted, equal_nan=True)


def check(arguments: dict) -> None:
    loss, grad = fnp.loss(**arrays(arguments))
    wanted, gradients = torch_answer(arguments)
    same_bits(loss, wanted)
    grads = grad if isinstance(grad, tuple) else (grad,)
    assert len(grads) == len(gradients)
    for mine, other in zip(grads, gradients, strict=True):
        same_bits(mine, other)
        assert np.abs(mine).max() > 0


@objectives
@pytest.mark.parametrize("source", ["sample", "sample and old", "log_prob"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "kept_mean"])
@pytest.mark.parametrize("ref_kl_weight", [0.0, 0.5])
def test_same_as_torch(objective, source, reduction, ref_kl_weight):
    check(draw(source=source, objective=objective, reduction=reduction, ref_kl_weight=ref_kl_weight, weights=True))


@pytest.mark.parametrize(
    "dtypes",
    [
        DTYPES["float32"],
        DTYPES["float16"],
        DTYPES["float64"],
        DTYPES["one float64 latent"],
        {"*": torch.float32, "prev_sample_mean": torch.float16, "advantages": torch.float64, "std": torch.float16},
    ],
    ids=["float32", "float16", "float64", "one float64", "mixed"],
)
@pytest.mark.parametrize("density", ["gaussian", "cps"])
def test_dtypes(dtypes, density):
    check(draw((4, 3), (5, 7), dtypes=dtypes, density=density, latent_reduction="sum", objective=FlowGRPO(10.0)))


@pytest.mark.parametrize("numel", [1, 33, 40_001])
def test_sizes(numel):
    check(draw((3,), (numel,), objective=FlowDPPO(mask="none")))


def test_pair_of_gradients():
    """Where both receive one, log_prob's comes first."""
    for options in ({"objective": OBJECTIVES["guard"]}, {"ref_kl_weight": 0.5}):
        arguments = arrays(draw((4,), (5,), source="log_prob", **options))
        grad_log_prob, grad_mean = fnp.loss(**arguments)[1]
        assert grad_log_prob.shape == (4,)
        assert grad_mean.shape == (4, 5)
    assert fnp.loss(**arrays(draw((4,), (5,), source="log_prob")))[1].shape == (4,)


def test_log_probs_alone():
    loss, grad = fnp.loss(
        None,
        None,
        np.array([1.0, -1.0]),
        log_prob=np.array([0.5, 0.0]),
        old_log_prob=np.zeros(2),
        objective=FlowGRPO(clip_range=10.0),
        reduction="sum",
    )
    np.testing.assert_allclose(loss, 1 - np.exp(0.5), rtol=1e-15)
    np.testing.assert_allclose(grad, [-np.exp(0.5), 1.0], rtol=1e-15)


def test_memory_layouts():
    """Transposed, sliced, reversed, read-only and Fortran-ordered arrays give what their copies give."""
    arguments = arrays(draw((4, 3), (6, 8)))
    wanted = fnp.loss(**arguments)
    changed = dict(arguments)
    changed["prev_sample_mean"] = np.asfortranarray(arguments["prev_sample_mean"])
    changed["old_prev_sample_mean"] = np.repeat(arguments["old_prev_sample_mean"], 2, axis=-1)[..., ::2]
    changed["prev_sample"] = arguments["prev_sample"][..., ::-1].copy()[..., ::-1]
    changed["advantages"] = arguments["advantages"].copy()
    changed["advantages"].flags.writeable = False
    changed["std"] = arguments["std"][..., None, None]
    for mine, other in zip(fnp.loss(**changed), wanted, strict=True):
        same_bits(mine, other)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1, 3, 1, 1), (1, 1)], ids=str)
def test_small_row_vectors(shape):
    arguments = arrays(draw((4, 3), (6, 8)))
    small = np.linspace(0.3, 0.9, np.prod(shape), dtype=np.float32).reshape(shape)
    full = np.broadcast_to(small.reshape(shape[:2]), (4, 3))
    for mine, other in zip(*(fnp.loss(**(arguments | {"std": std})) for std in (small, full)), strict=True):
        same_bits(mine, other)


def test_inputs_are_not_written():
    arguments = arrays(draw(ref_kl_weight=0.5, weights=True))
    before = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    fnp.loss(**arguments)
    for name, value in before.items():
        assert np.array_equal(arguments[name], value), name


ERRORS = {
    "tensor": ({"prev_sample_mean": torch.zeros(12, 5, 8)}, TypeError, ("prev_sample_mean", "Tensor", "ndarray")),
    "list": ({"advantages": [1.0]}, TypeError, ("advantages", "list", "ndarray")),
    "integers": (
        {"prev_sample": np.zeros((12, 5, 8), np.int64)},
        TypeError,
        ("prev_sample", "int64", "float16", "float32", "float64"),
    ),
    "byte order": ({"std": np.ones(12, ">f4")}, TypeError, ("std", ">f4")),
    "shape": ({"prev_sample": np.zeros((12, 40), np.float32)}, ValueError, ("prev_sample", "(12, 40)", "(12, 5, 8)")),
    "rows": ({"std": np.ones(5, np.float32)}, ValueError, ("std", "(5,)", "(12,)")),
    "no source": ({"prev_sample": None}, ValueError, ("neither", "prev_sample", "log_prob")),
    "no rows": ({"advantages": np.zeros(0, np.float32)}, ValueError, ("advantages", "(0,)", "at least one row")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'", "'mean'")),
    "objective": ({"objective": "dppo"}, TypeError, ("objective", "str", "FlowDPPO")),
    "process_group": ({"process_group": "world"}, ValueError, ("process_group", "'world'", "None", "one process")),
}


@pytest.mark.parametrize(("change", "error", "facts"), ERRORS.values(), ids=ERRORS)
def test_errors(change, error, facts, capfd):
    with pytest.raises(error) as caught:
        fnp.loss(**(arrays(draw()) | change))
    says(str(caught.value), facts)
    assert capfd.readouterr() == ("", "")


SCRIPTS = {
    "import": "import flowdppo_ops",
    "dir": "import flowdppo_ops; assert 'loss' in dir(flowdppo_ops)",
    "objectives": "import flowdppo_ops; flowdppo_ops.FlowGRPO((0.1, 0.2))",
    "numpy.loss": """
import numpy as np
import flowdppo_ops.numpy
x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
loss, grad = flowdppo_ops.numpy.loss(x, 0.9 * x, np.ones(3, np.float32), std=0.5, prev_sample=x + 0.25)
assert np.isfinite(loss) and grad.shape == (3, 4) and grad.dtype == np.float32
try:
    flowdppo_ops.numpy.loss(x, x, [1.0], std=0.5, prev_sample=x)
except TypeError:
    pass
else:
    raise AssertionError
""",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_without_torch(script):
    """PyTorch takes seconds and hundreds of MB to import; NumPy users pay for neither."""
    body = f"import sys\n{script}\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_import_leaves_cuda_alone():
    """A process that forks data loaders after the import must be able to use CUDA in them."""
    body = "import flowdppo_ops, torch; flowdppo_ops.loss; assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
