"""`flowdppo_ops.loss` on the emulated kernels: the arguments of a launch, sent to a server process.

The structs are those of kernels/policy_loss.cuh; the server refuses one of another size.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from launch_arguments import Backward, Forward, Problem, RowVector
from torch import Tensor

from flowdppo_ops import FlowDPPO, PolicyLoss, _args, _native
from flowdppo_ops._torch import FAMILY

from .build import Fault, build

SHORT_ROW = 512  # kShortRow
_LATENTS = ("mean", "next", "old", "ref")
CANARY = 0xA5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
VARIANTS = {
    (torch.float32, torch.float32): "f32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.float16, torch.float16): "f16",
    (torch.float32, torch.bfloat16): "f32_bf16",
    (torch.float32, torch.float16): "f32_f16",
}


class Died(AssertionError):
    """The server ended in the middle of a launch; the message is what it wrote: a sanitizer's report, or its own."""


class Float64(TypeError):
    """The call needs float64 arithmetic, which is the CPU backend's alone."""


class Server:
    """One process of the executable that `build.build` made; started at need, and again after it has died."""

    def __init__(self, executable: Path, threads: int = 256) -> None:
        self.executable, self.warps = executable, threads // 32
        self.process: subprocess.Popen[bytes] | None = None
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server)

    def launch(
        self, kernel: str, argument: ctypes.Structure, buffers: list[_Buffer], blocks: int, seed: int
    ) -> list[bytes]:
        pointers = [(at, index) for index, buffer in enumerate(buffers) for at in buffer.pointers]
        name = kernel.encode()
        request = [_words(len(name), ctypes.sizeof(argument), len(buffers), len(pointers), blocks, seed), name]
        request.append(bytes(argument))
        for buffer in buffers:
            request += [len(buffer.data).to_bytes(8, "little"), _words(buffer.offset, buffer.is_output), buffer.data]
        request += [_words(*pointer) for pointer in pointers]
        if self.process is None:
            # halt_on_error: a data race ends the process as every other fault does.
            options = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
            self.process = subprocess.Popen(
                [*_fixed_addresses(), self.executable],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=options,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(b"".join(request))
            self.process.stdin.flush()
        except BrokenPipeError:
            self._died(kernel)
        replies = []
        for buffer in buffers:
            if buffer.is_output:
                replies.append(self.process.stdout.read(len(buffer.data)))
                if len(replies[-1]) != len(buffer.data):
                    self._died(kernel)
        return replies

    def _died(self, kernel: str) -> None:
        self.close()
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        self.errors.seek(0)
        self.errors.truncate()
        raise Died(f"{kernel}: {text}")

    def close(self) -> None:
        """Ends the process: it runs until its stdin does."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):  # of what it died before reading
                self.process.stdin.close()  # type: ignore[union-attr]
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process.wait()
            self.process = None


def start(folder: Path, sanitizer: str, fault: Fault | None = None, unit: str = "policy_loss") -> Server:
    """Of kernels that are built into `folder`, a new one; see `build`."""
    folder.mkdir()
    return Server(build(folder, sanitizer, fault, unit), threads=64 if sanitizer == "tsan" else 256)


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """The command that switches address randomisation off, where it may: under 32 random bits, the default of recent
    kernels, the TSan of older compilers ends with "unexpected memory mapping"."""
    command = ("setarch", "-R")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return ()
    return command if done.returncode == 0 else ()


def _words(*values: int) -> bytes:
    return b"".join(int(value).to_bytes(4, "little") for value in values)


class _Buffer:
    def __init__(self, data: bytes, pointers: list[int], offset: int = 0, is_output: bool = False) -> None:
        self.data, self.pointers, self.offset, self.is_output = data, pointers, offset, is_output


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Launch:
    """An argument under construction: its scalars, and the buffers that its pointers will point to."""

    def __init__(self, argument: ctypes.Structure, offsets: dict[str, int]) -> None:
        self.argument, self.offsets = argument, offsets
        self.buffers: list[_Buffer] = []
        self.outputs: dict[str, tuple[torch.dtype, int]] = {}

    def latent(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            getattr(self.argument, name).dtype = DTYPES[tensor.dtype]
            offset = self.offsets.get(name, 0) * tensor.element_size()
            self.buffers.append(_Buffer(_bytes(tensor), [getattr(type(self.argument), name).offset], offset))

    def row_vector(self, struct: RowVector, at: int, value: float | Tensor | None) -> None:
        struct.present = value is not None
        if isinstance(value, Tensor):
            struct.dtype, struct.divide, struct.modulo = DTYPES[value.dtype], 1, value.numel()
            self.buffers.append(_Buffer(_bytes(value), [at]))
        elif value is not None:
            struct.value = value

    def output(self, name: str, dtype: torch.dtype, count: int, fill: int = CANARY) -> None:
        """Filled with canaries: an element that is not written does not pass for a result."""
        size = torch.empty(0, dtype=dtype).element_size()
        offset = self.offsets.get(name, 0) * size
        at = getattr(type(self.argument), name).offset
        self.buffers.append(_Buffer(bytes([fill]) * (count * size), [at], offset, is_output=True))
        self.outputs[name] = (dtype, count)

    def run(self, server: Server, kernel: str, blocks: int, seed: int) -> dict[str, Tensor]:
        replies = server.launch(kernel, self.argument, self.buffers, blocks, seed)
        pairs = zip(self.outputs.items(), replies, strict=True)
        return {name: torch.frombuffer(bytearray(data), dtype=dtype) for (name, (dtype, _)), data in pairs}


class EmulatedLoss:
    """`flowdppo_ops.loss`, called with keywords, on the emulated kernels.

    splits: blocks of a row; 0 a warp per row; None as a launcher would choose. offsets: elements by which "mean",
    "next", "old", "ref" and "grad_mean" lie off a multiple of 16 bytes. Every launch takes another order of blocks and
    threads, unless `seed` says which.
    """

    def __init__(
        self,
        server: Server,
        *,
        splits: int | None = None,
        offsets: dict[str, int] | None = None,
        variant: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.server, self.splits, self.offsets, self.variant = server, splits, offsets or {}, variant
        self.seeds = itertools.count(1) if seed is None else itertools.repeat(seed)

    def __call__(self, prev_sample_mean: Any, old_prev_sample_mean: Any, advantages: Any, **options: Any) -> PolicyLoss:
        names = ("std", "sqrt_dt", "prev_sample", "log_prob", "old_log_prob", "weights", "ref_prev_sample_mean")
        defaults = dict.fromkeys((*names, "ref_std", "process_group")) | {"ref_kl_weight": 0.0}
        defaults |= {"objective": FlowDPPO(), "density": "gaussian", "latent_reduction": "mean", "reduction": "mean"}
        options = defaults | {"prev_sample_mean": prev_sample_mean, "advantages": advantages} | options
        call = _args.check_loss("emulated", FAMILY, old_prev_sample_mean=old_prev_sample_mean, **options)
        loss, numbers = _Function.apply(call.latents.prev_sample_mean, call.vectors.log_prob, call, self)
        latents = call.latents
        has_kl, has_ref = latents.old_prev_sample_mean is not None, latents.ref_prev_sample_mean is not None
        return PolicyLoss(loss, numbers, call.row_shape, has_kl, has_ref)

    def plan(self, rows: int, numel: int) -> tuple[int, int]:
        """(splits, blocks)"""
        splits = self.splits
        if splits is None:
            splits = 0 if numel <= SHORT_ROW else math.ceil(numel / 4096)
        return splits, math.ceil(rows / self.server.warps) if splits == 0 else rows * splits

    def kernel(self, direction: str, latents: _args.Latents) -> str:
        mean, *anchors = (None if t is None else t.dtype for t in latents)
        fitting = [
            name
            for (of_mean, of_anchors), name in VARIANTS.items()
            if mean in (None, of_mean) and all(dtype in (None, of_anchors) for dtype in anchors)
        ]
        return f"policy_loss_{direction}_{self.variant or (fitting or ['mixed'])[0]}"

    def forward(self, call: _args.LossCall) -> tuple[Tensor, Tensor]:
        latents, vectors, settings = call.latents, call.vectors, call.settings
        if call.double:
            raise Float64("no kernel takes float64 latents")
        rows = vectors.advantages.numel()
        mean = latents.prev_sample_mean
        numel = 0 if mean is None else mean.numel() // rows
        splits, blocks = self.plan(rows, numel)
        launch = _Launch(Forward(splits=splits), self.offsets)
        for name, latent in zip(_LATENTS, latents, strict=True):
            launch.latent(name, latent)
        problem = launch.argument.problem
        problem.rows, problem.numel = rows, numel
        problem.objective = ("flow_dppo", "flow_grpo", "grpo_guard").index(settings.objective)
        problem.density = ("gaussian", "cps").index(settings.density)
        problem.latent_sum = settings.latent_reduction == "sum"
        problem.reduction = ("mean", "sum", "none", "kept_mean").index(settings.reduction)
        problem.mask = ("asymmetric", "symmetric", "none").index(settings.mask)
        for name in ("normalize_kl", "keep_nan_kl", "per_row_scale", "low", "high", "adv_clip_max", "ref_kl_weight"):
            setattr(problem, name, getattr(settings, name))
        problem.has_kl = latents.old_prev_sample_mean is not None and vectors.std is not None
        problem.has_ref = latents.ref_prev_sample_mean is not None
        vectors = vectors._replace(ref_std=vectors.std if vectors.ref_std is None else vectors.ref_std)
        for name, value in vectors._asdict().items():
            at = Forward.problem.offset + getattr(Problem, name).offset
            launch.row_vector(getattr(problem, name), at, value)
        count = rows if settings.reduction == "none" else 1
        launch.output("loss", torch.float32, count)
        launch.output("numbers", torch.float32, rows * _native.FIELDS + _native.BATCH_LEN)
        launch.output("partials", torch.float32, rows * max(splits, 1) * 4)
        launch.output("tickets", torch.int32, rows + 1, fill=0)
        out = launch.run(self.server, self.kernel("forward", latents), blocks, next(self.seeds))
        assert (out["tickets"] == 0).all(), "tickets are not 0 after a launch"
        return out["loss"].reshape(call.row_shape if settings.reduction == "none" else ()), out["numbers"]

    def backward(
        self, grad_loss: Tensor, numbers: Tensor, latents: _args.Latents, wants_mean: bool, wants_log_prob: bool
    ) -> dict[str, Tensor]:
        rows = (numbers.numel() - _native.BATCH_LEN) // _native.FIELDS
        mean = latents.prev_sample_mean
        numel = 0 if mean is None else mean.numel() // rows
        splits, blocks = self.plan(rows, numel)
        launch = _Launch(Backward(splits=splits, rows=rows, numel=numel), self.offsets)
        for name, latent in zip(_LATENTS, latents, strict=True):
            launch.latent(name, latent)
        launch.row_vector(launch.argument.grad_loss, Backward.grad_loss.offset, grad_loss.contiguous())
        launch.buffers.append(_Buffer(_bytes(numbers), [Backward.numbers.offset]))
        if wants_mean:
            launch.argument.grad_dtype = DTYPES[mean.dtype]
            launch.output("grad_mean", mean.dtype, mean.numel())
        else:
            blocks = math.ceil(rows / (32 * self.server.warps))
        if wants_log_prob:
            launch.output("grad_log_prob", torch.float32, rows)
        return launch.run(self.server, self.kernel("backward", latents), blocks, next(self.seeds))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, log_prob, call, emulated):
        loss, numbers = emulated.forward(call)
        ctx.call, ctx.emulated = call, emulated
        ctx.save_for_backward(numbers)
        ctx.mark_non_differentiable(numbers)
        return loss, numbers

    @staticmethod
    def backward(ctx, grad_loss, _):
        latents, (numbers,) = ctx.call.latents, ctx.saved_tensors
        wants = tuple(ctx.needs_input_grad[:2])
        differentiable = _args.differentiates_mean(latents, ctx.call.settings.objective)
        if ctx.call.settings.objective != "grpo_guard":
            latents = latents._replace(old_prev_sample_mean=None)
        out = ctx.emulated.backward(grad_loss, numbers, latents, wants[0] and differentiable, wants[1])
        grad_mean, grad_log_prob = out.get("grad_mean"), out.get("grad_log_prob")
        if grad_mean is not None:
            grad_mean = grad_mean.reshape(latents.prev_sample_mean.shape)
        if grad_log_prob is not None:
            log_prob = ctx.call.vectors.log_prob
            grad_log_prob = grad_log_prob.reshape(log_prob.shape).to(log_prob.dtype)
        return grad_mean, grad_log_prob, None, None
