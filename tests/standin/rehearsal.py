"""A rehearsal of the tests marked gpu where there is none: a pytest plugin that has CPU tensors pass for a GPU's.

    LD_LIBRARY_PATH=(that of the stand-in) STANDIN_KERNELS=... python -m pytest -p standin.rehearsal -m gpu tests

Kernels run on the stand-in driver. What CUDA refuses is refused: tensors of two devices in one call, and a wait for the
device while a graph is captured or under `set_sync_debug_mode("error")`. Not shown: what runs at the same time, memory,
`torch.compile`, and what autograd's own C++ does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from standin.harness import Driver, Launch

GPU = torch.device("cuda", 0)
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "numpy", "nonzero", "equal", "allclose"}
# What leaves the memory of its arguments alone, and launches nothing.
NO_WORK = {"data_ptr", "detach", "requires_grad_", "numel", "dim", "is_neg", "empty_like", "new_empty", "contiguous"}
NO_WORK |= {"view", "reshape", "expand", "split", "unbind", "flatten", "__getitem__", "grad", "is_contiguous", "stride"}
NO_WORK |= {"is_inference", "__len__"}

Tensor.__dlpack_c_exchange_api__ = None  # the native module would not ask Python for the device
_storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address of a storage its own
_driver = Driver()
_now = SimpleNamespace(stream=None, graph=None, sync="default", seen=None, backward=False)


def is_gpu(tensor: Tensor) -> bool:
    if _now.backward:
        return True
    with DisableTorchFunction():
        found = _storages.get(tensor.untyped_storage()._cdata)
    return found is not None and not found.expired()


def on_gpu(result: Any) -> Any:
    """The same, from now on the GPU's."""
    for tensor in tensors_of(result):
        with DisableTorchFunction():
            storage = tensor.untyped_storage()
            _storages[storage._cdata] = StorageWeakRef(storage)
    return result


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def waits(what: str) -> None:
    if _now.graph is not None or _now.sync == "error":
        raise RuntimeError(f"{what} waits for the device")


class Devices(TorchFunctionMode):
    """Tells the devices apart, in every call of PyTorch from Python."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        getter = getattr(function, "__name__", "") == "__get__"
        name = function.__self__.__name__ if getter else function.__name__
        if getter and name == "device":
            return GPU if is_gpu(args[0]) else function(*args)
        if name == "backward" and any(map(is_gpu, tensors_of(args[0]))):
            with backward():
                return function(*args, **kwargs)
        if name in ("to", "cpu", "cuda"):
            return self.moved(name, *args, **kwargs)
        given = tensors_of((args, kwargs))
        there = [is_gpu(tensor) for tensor in given]
        wanted, generator = kwargs.get("device"), kwargs.get("generator")
        makes_there = wanted is not None and torch.device(wanted).type == "cuda"
        if makes_there:
            kwargs["device"] = "cpu"
        if generator is not None and (generator.device.type == "cuda") != (makes_there or any(there)):
            raise RuntimeError(f"{name}: a generator of {generator.device}")
        if name in WAITS and any(there):
            waits(name)
        if any(there) and any(tensor.ndim for tensor, on in zip(given, there, strict=True) if not on):
            if name not in ("copy_", "__setitem__", "__getitem__"):
                raise RuntimeError(f"{name}: tensors of two devices")
            waits(name)
        result = function(*args, **kwargs)
        if makes_there or (any(there) and wanted is None):
            on_gpu(result)
            launches = not getter and name not in NO_WORK
            if launches and _now.seen is not None:
                _now.seen.append(name)
            if _now.graph is not None:
                _now.graph.captured(partial(function, *args, **kwargs) if launches else None, result)
        return result

    @staticmethod
    def moved(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = [*args, *([kwargs.pop("device")] if "device" in kwargs else [])]
        devices = [one for one in args if isinstance(one, (str, int, torch.device)) and not isinstance(one, bool)]
        dtypes = [one for one in args if isinstance(one, torch.dtype)]
        to_gpu = {"cpu": False, "cuda": True}.get(name, is_gpu(tensor))
        if devices:
            to_gpu = torch.device(devices[0]).type == "cuda"
        if to_gpu == is_gpu(tensor):
            result = Tensor.to(tensor, *dtypes) if dtypes else tensor
        else:
            waits(name)
            result = Tensor.to(tensor, *dtypes, copy=True)
        return on_gpu(result) if to_gpu else result


class Stream:
    stream_id = 1  # PyTorch's own streams have another id than their handle

    def __init__(self, handle: int | None = None) -> None:
        self.cuda_stream = _driver.stream() if handle is None else handle

    def wait_stream(self, other: Stream) -> None: ...


class Event:
    """Happens when it is recorded: nothing runs at the same time."""

    def __init__(self, **_options: Any) -> None: ...

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


@contextlib.contextmanager
def entered(stream: Stream) -> Iterator[None]:
    before, _now.stream = _now.stream, stream
    try:
        yield
    finally:
        _now.stream = before


@contextlib.contextmanager
def backward() -> Iterator[None]:
    """Autograd's C++ makes tensors that nobody here sees: in the backward of what is on the GPU, all are there."""
    _now.backward = True
    try:
        yield
    finally:
        _now.backward = False


def launch_again(launch: Launch) -> None:
    emulator = ctypes.CDLL(os.environ["STANDIN_KERNELS"])
    emulator.emu_launch(launch.name.encode(), bytes(launch.parameters), launch.blocks, 0)


class Graph:
    """What a capture did is done again, into the same memory, which the graph keeps."""

    def __init__(self) -> None:
        self._log: list[tuple[Callable[[], Any] | None, Any]] = []

    def captured(self, call: Callable[[], Any] | None, result: Any) -> None:
        self.launched()
        self._log.append((call, result))

    def launched(self) -> None:
        """Of the package's kernels since the last look."""
        self._log += [(partial(launch_again, launch), ()) for launch in _driver.launches()]

    @torch.no_grad()
    def replay(self) -> None:
        with DisableTorchFunction():
            for call, result in self._log:
                again = [] if call is None else tensors_of(call())
                for mine, new in zip(tensors_of(result), again, strict=False):
                    mine.detach().copy_(new)


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    stream = Stream()
    _driver.capture(stream.cuda_stream, True)
    _driver.log()
    _now.graph = graph
    try:
        with entered(stream):
            yield
        graph.launched()
    finally:
        _now.graph = None
        _driver.capture(stream.cuda_stream, False)


class Profile:
    """Names of launches, and of PyTorch's calls that would launch something."""

    def __init__(self, **_options: Any) -> None: ...

    def __enter__(self) -> Profile:
        _driver.log()
        _now.seen = []
        return self

    def __exit__(self, *_: object) -> None:
        launches = [line.split()[1] for line in _driver.log() if line.startswith("launch ")]
        self._names, _now.seen = launches + _now.seen, None

    def events(self) -> list[Any]:
        return [SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA) for name in self._names]


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.where


# ---- in place of PyTorch's own ---------------------------------------------------------------------------------------

_grad = torch.autograd.grad


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[Tensor, ...]:
    """Upstream gradients are where their outputs are, gradients where what they are of is."""
    outputs, inputs = tensors_of(outputs), tensors_of(inputs)
    with DisableTorchFunction():
        given = [torch.ones_like(output) for output in outputs] if grad_outputs is None else tensors_of(grad_outputs)
    for output, upstream in zip(outputs, given, strict=True):
        if upstream.ndim and grad_outputs is not None and is_gpu(output) != is_gpu(upstream):
            raise RuntimeError("grad: an upstream gradient on another device than its output")
    with backward() if any(map(is_gpu, outputs)) else contextlib.nullcontext():
        found = _grad(outputs, inputs, given, **options)
    if _now.graph is not None:
        _now.graph.captured(None, given)
    return tuple(map(at_leaf, found, inputs))


def at_leaf(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Where a copy to the other device and back would have it."""
    if is_gpu(leaf):
        return on_gpu(gradient)
    with DisableTorchFunction():
        return gradient.clone() if is_gpu(gradient) else gradient


def set_sync_debug_mode(mode: str) -> None:
    _now.sync = mode


_now.stream = Stream(0)
torch.autograd.grad, torch.Generator, torch.profiler.profile = grad, Generator, Profile
for _name, _stand_in in {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "mem_get_info": lambda: (0, 0),
    "_sleep": lambda cycles: None,
    "get_device_name": lambda device=None: "stand-in",
    "synchronize": lambda device=None: waits("synchronize"),
    "current_stream": lambda device=None: _now.stream,
    "set_sync_debug_mode": set_sync_debug_mode,
    "Event": Event,
    "Stream": Stream,
    "stream": entered,
    "CUDAGraph": Graph,
    "graph": capture,
}.items():
    setattr(torch.cuda, _name, _stand_in)
torch.accelerator.synchronize = torch.cuda.synchronize
Tensor.is_cuda, Tensor.is_cpu = property(is_gpu), property(lambda tensor: not is_gpu(tensor))
Tensor.get_device = lambda tensor: 0 if is_gpu(tensor) else -1


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    try:
        with Devices():
            return (yield)
    finally:
        set_sync_debug_mode("default")
