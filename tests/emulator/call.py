"""`loss` and `step_loss` on the emulated kernels: the arguments of a launch, sent to a server process.

The server refuses an argument of another size than the kernel's.
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
from cases import defaults
from emulator.build import Fault, build
from launch_arguments import PolicyLossBackward, PolicyLossForward, Structure, option
from torch import Tensor

import flowdppo_ops
from flowdppo_ops import FlowDPPO, PolicyLoss, _native
from flowdppo_ops._checks import Call, check_loss, check_step_loss
from flowdppo_ops._torch import FAMILY
from flowdppo_ops.result import Layout

SHORT_ROW = 512  # kShortRow
LATENTS, OLD, REF = (
    tuple(name for name in _native.LATENTS if name.startswith(prefix)) for prefix in ("", "old_", "ref_")
)
OUTPUTS, SAMPLES = ("prev_sample_mean", "model_output", "uncond_output"), ("sample", "prev_sample")
WHOLE, SUMS_ALONE, OBJECTIVE_ALONE = range(3)  # Stage
CANARY = 0xA5
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Dtypes of the outputs, of the samples, and of the old and the reference policy; by whether there is a schedule.
_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16
VARIANTS = {
    False: {
        (_f32, _f32, _f32): "f32",
        (_bf16, _bf16, _bf16): "bf16",
        (_f16, _f16, _f16): "f16",
        (_f32, _bf16, _bf16): "f32_bf16",
        (_f32, _f16, _f16): "f32_f16",
    },
    True: {
        (_f32, _f32, _f32): "step_f32",
        (_bf16, _bf16, _bf16): "step_bf16",
        (_f16, _f16, _f16): "step_f16",
        (_bf16, _f32, _f32): "step_bf16_f32",
        (_bf16, _f32, _bf16): "step_bf16_f32_bf16",
        (_bf16, _f32, _f16): "step_bf16_f32_f16",
    },
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
        sizes = len(name), ctypes.sizeof(argument), len(buffers), len(pointers)
        request = [_words(*sizes, blocks, seed), name, bytes(argument)]
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


def start(folder: Path, sanitizer: str, fault: Fault | None = None, alone: tuple[str, str] | None = None) -> Server:
    """`folder` is made for the build; `alone` as there."""
    folder.mkdir()
    return Server(build(folder, sanitizer, fault, alone), threads=64 if sanitizer == "tsan" else 256)


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


def row_stride(value: Tensor, row_shape: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """The row vector, written out if it must be, with (divide, modulo): row r has element r // divide % modulo."""
    leading = value.reshape(value.shape[: len(row_shape)] or (1,) * len(row_shape))
    wanted = torch.arange(value.numel()).reshape(leading.shape).expand(row_shape).flatten()
    rows = torch.arange(wanted.numel())
    for divide in range(1, len(rows) + 1):
        if len(rows) % divide == 0 and torch.equal(rows // divide % value.numel(), wanted):
            return value, divide, value.numel()
    return leading.expand(row_shape).contiguous(), 1, len(rows)


class Launch:
    """An argument under construction: its scalars, and the buffers that its pointers will point to. Places in it are
    names with dots between them: "call.latents.sample"."""

    def __init__(
        self, server: Server, argument: Structure, offsets: dict[str, int], row_shape: tuple[int, ...]
    ) -> None:
        self.server, self.argument, self.offsets, self.row_shape = server, argument, offsets, row_shape
        self.buffers: list[_Buffer] = []
        self.outputs: dict[str, tuple[torch.dtype, int]] = {}

    def find(self, place: str) -> tuple[Any, int]:
        """The field, and where in the argument it stands."""
        found, at = self.argument, 0
        for name in place.split("."):
            at += getattr(type(found), name).offset
            found = getattr(found, name)
        return found, at

    def input(self, place: str, tensor: Tensor, *, has_bytes: bool = True) -> None:
        """Points to the tensor, as far off a multiple of 16 bytes as `offsets` says. Without its bytes, where none may
        be read."""
        name = place.rpartition(".")[2]
        data = _bytes(tensor) if has_bytes else b""
        self.buffers.append(_Buffer(data, [self.find(place)[1]], self.offsets.get(name, 0) * tensor.element_size()))

    def latent(self, place: str, tensor: Tensor, *, has_bytes: bool = True) -> None:
        self.find(place)[0].dtype = DTYPES[tensor.dtype]
        self.input(place, tensor, has_bytes=has_bytes)

    def row_vector(self, place: str, value: float | Tensor) -> None:
        vector = self.find(place)[0]
        vector.present = 1
        if isinstance(value, Tensor):
            vector.dtype = DTYPES[value.dtype]
            written, vector.divide, vector.modulo = row_stride(value, self.row_shape)
            self.input(place, written)
        else:
            vector.value = value

    def row_vectors(self, start: str, names: list[str], given: dict[str, Any]) -> None:
        for name in names:
            if name in given:
                self.row_vector(f"{start}.{name}", given[name])

    def output(self, name: str, dtype: torch.dtype, count: int, fill: int = CANARY) -> None:
        """Filled with canaries: an element that is not written does not pass for a result."""
        size = torch.empty(0, dtype=dtype).element_size()
        offset = self.offsets.get(name, 0) * size
        self.buffers.append(_Buffer(bytes([fill]) * (count * size), [self.find(name)[1]], offset, is_output=True))
        self.outputs[name] = (dtype, count)

    def run(self, kernel: str, blocks: int, seed: int) -> dict[str, Tensor]:
        replies = self.server.launch(kernel, self.argument, self.buffers, blocks, seed)
        pairs = zip(self.outputs.items(), replies, strict=True)
        out = {name: torch.frombuffer(bytearray(data), dtype=dtype) for (name, (dtype, _)), data in pairs}
        assert "tickets" not in out or not out["tickets"].any(), "tickets are not 0 after the launch"
        return out


class Emulated:
    """A loss on the emulated kernels, called with keywords.

    splits: blocks of a row; 0 a warp per row; None as a launcher would choose. offsets: elements by which the latents,
    "grad_output" and "grad_uncond_output" lie off a multiple of 16 bytes. Every launch takes another order of blocks
    and threads, unless `seed` says which.
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

    def run(self, call: Call, row_sums: Tensor | None = None) -> PolicyLoss:
        """`row_sums`: those of all shards, of which the latents are one."""
        leaves = (output_of(call.fields), call.fields.get("uncond_output"), call.fields.get("log_prob"))
        loss, numbers = _Function.apply(*leaves, call, self, row_sums)
        has_std = "std" in call.fields or is_step(call.fields)
        layout = Layout(call.row_shape, has_std and has(OLD, call.fields), has(REF, call.fields))
        return PolicyLoss(loss, numbers, layout)

    def plan(self, rows: int, numel: int) -> tuple[int, int]:
        """(splits, blocks)"""
        splits = self.splits
        if splits is None:
            splits = 0 if numel <= SHORT_ROW else math.ceil(numel / 4096)
        return splits, math.ceil(rows / self.server.warps) if splits == 0 else rows * splits

    def kernel(self, direction: str, latents: dict[str, Tensor]) -> str:
        came = [{latents[name].dtype for name in names if name in latents} for names in (OUTPUTS, SAMPLES, OLD + REF)]
        fitting = [
            name
            for dtypes, name in VARIANTS[is_step(latents)].items()
            if all(one <= {dtype} for one, dtype in zip(came, dtypes, strict=True))
        ]
        mixed = "step_mixed" if is_step(latents) else "mixed"
        return f"policy_loss_{direction}_{self.variant or (fitting or [mixed])[0]}"

    def forward(self, call: Call, row_sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and numbers."""
        launch = self._forward(call, WHOLE if row_sums is None else OBJECTIVE_ALONE)
        rows, per_row = launch.argument.call.rows, call.settings["reduction"] == "none"
        launch.output("loss", torch.float32, rows if per_row else 1)
        launch.output("numbers", torch.float32, rows * fields(is_step(call.fields)) + _native.BATCH_LEN)
        if row_sums is not None:
            launch.input("row_sums", row_sums)
        out = self._run_forward(launch, call)
        return out["loss"].reshape(call.row_shape if per_row else ()), out["numbers"]

    def row_sums(self, call: Call) -> Tensor:
        """Of the shard of every row that the latents are, `[4 rows + 1]`."""
        launch = self._forward(call, SUMS_ALONE)
        launch.output("row_sums", torch.float64, 4 * launch.argument.call.rows + 1)
        return self._run_forward(launch, call)["row_sums"]

    def _forward(self, call: Call, stage: int) -> Launch:
        given, settings = call.fields, call.settings
        wide = [name for name in (*LATENTS, "log_prob", "old_log_prob") if name in given]
        if any(given[name].dtype == torch.float64 for name in wide):
            raise Float64("no kernel takes float64 latents")
        launch = Launch(self.server, PolicyLossForward(stage=stage), self.offsets, call.row_shape)
        argument = launch.argument.call
        output = output_of(given)
        argument.rows = given["advantages"].numel()
        argument.numel = 0 if output is None else output.numel() // argument.rows
        for name in LATENTS:
            if name in given:
                launch.latent(f"call.latents.{name}", given[name], has_bytes=stage != OBJECTIVE_ALONE)
        launch.row_vectors("call.vectors", _native.ROW_VECTORS, given)
        launch.row_vectors("call.schedule", _native.SCHEDULE, given)
        argument.objective.kind = option("objective", settings["objective"])
        for name in ("mask", "kl_divisor"):
            setattr(argument.objective, name, option(name, settings[name]))
        for name in ("kl_mask_threshold", "clip_low", "clip_high", "adv_clip_max", "keep_nan_kl", "per_row_scale"):
            setattr(argument.objective, name, settings[name])
        argument.settings.ref_kl_weight = settings["ref_kl_weight"]
        for name in ("sampler", "density", "latent_reduction", "reduction"):
            setattr(argument.settings, name, option(name, settings[name]))
        return launch

    def _run_forward(self, launch: Launch, call: Call) -> dict[str, Tensor]:
        rows, numel = launch.argument.call.rows, launch.argument.call.numel
        whole_rows = launch.argument.stage == OBJECTIVE_ALONE
        splits, blocks = (0, math.ceil(rows / self.server.warps)) if whole_rows else self.plan(rows, numel)
        launch.argument.splits = splits
        launch.output("partials", torch.float32, rows * max(splits, 1) * 4)
        launch.output("tickets", torch.int32, rows + 1, fill=0)
        latents = {name: call.fields[name] for name in LATENTS if name in call.fields}
        return launch.run(self.kernel("forward", latents), blocks, next(self.seeds))

    def backward(
        self, grad_loss: Tensor, numbers: Tensor, latents: dict[str, Tensor], wants: tuple[bool, bool, bool]
    ) -> dict[str, Tensor]:
        """`latents`: those that are read. `wants`: the gradients of the output, of the unconditional output and of the
        log-prob."""
        rows = (numbers.numel() - _native.BATCH_LEN) // fields(is_step(latents))
        output = output_of(latents)
        numel = 0 if output is None else output.numel() // rows
        splits, blocks = self.plan(rows, numel)
        argument = PolicyLossBackward(splits=splits, rows=rows, numel=numel)
        launch = Launch(self.server, argument, self.offsets, (rows,))
        for name, tensor in latents.items():
            launch.latent(f"latents.{name}", tensor)
        launch.row_vector("grad_loss", grad_loss.contiguous().reshape(-1))
        launch.input("numbers", numbers)
        if not any(wants[:2]):
            blocks = math.ceil(rows / (32 * self.server.warps))
        if wants[0]:
            launch.output("grad_output", output.dtype, output.numel())
        if wants[1]:
            launch.output("grad_uncond_output", latents["uncond_output"].dtype, output.numel())
        if wants[2]:
            launch.output("grad_log_prob", torch.float32, rows)
        return launch.run(self.kernel("backward", latents), blocks, next(self.seeds))


class EmulatedLoss(Emulated):
    """`flowdppo_ops.loss`"""

    def __call__(self, prev_sample_mean: Any, old_prev_sample_mean: Any, advantages: Any, **options: Any) -> PolicyLoss:
        given = {"prev_sample_mean": prev_sample_mean, "old_prev_sample_mean": old_prev_sample_mean}
        given |= {"objective": FlowDPPO(), "advantages": advantages} | options
        return self.run(check_loss("emulated", FAMILY, defaults(flowdppo_ops.loss) | given))


class EmulatedStepLoss(Emulated):
    """`flowdppo_ops.step_loss`"""

    def __call__(self, **options: Any) -> PolicyLoss:
        return self.run(self.checked(**options))

    def checked(self, **options: Any) -> Call:
        given = {"objective": FlowDPPO()} | options
        return check_step_loss("emulated", FAMILY, defaults(flowdppo_ops.step_loss) | given)


def is_step(latents: dict[str, Any]) -> bool:
    return "model_output" in latents


def has(names: tuple[str, ...], latents: dict[str, Any]) -> bool:
    return any(name in latents for name in names)


def output_of(latents: dict[str, Any]) -> Tensor | None:
    """What the gradient of the trained policy goes to."""
    return latents.get("model_output" if is_step(latents) else "prev_sample_mean")


def fields(is_step: bool) -> int:
    return _native.STEP_FIELDS if is_step else _native.FIELDS


def read_by_backward(call: Call) -> dict[str, Tensor]:
    """Of latents whose difference has no coefficient in any row, none is given."""
    given, is_guard = call.fields, call.settings["objective"] == "grpo_guard"
    if not (is_guard or "prev_sample" in given or has(REF, given)):
        return {}
    return {name: given[name] for name in LATENTS if name in given and (is_guard or name not in OLD)}


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, uncond_output, log_prob, call, emulated, row_sums):
        loss, numbers = emulated.forward(call, row_sums)
        ctx.call, ctx.emulated = call, emulated
        ctx.save_for_backward(numbers)
        ctx.mark_non_differentiable(numbers)
        return loss, numbers

    @staticmethod
    def backward(ctx, grad_loss, _):
        latents, (numbers,) = read_by_backward(ctx.call), ctx.saved_tensors
        wants_output, *wants_others = ctx.needs_input_grad[:3]
        out = ctx.emulated.backward(grad_loss, numbers, latents, (wants_output and bool(latents), *wants_others))
        like = {"grad_output": output_of(ctx.call.fields)}
        like |= {f"grad_{name}": ctx.call.fields.get(name) for name in ("uncond_output", "log_prob")}
        grads = [
            out[name].reshape(tensor.shape).to(tensor.dtype) if name in out else None for name, tensor in like.items()
        ]
        return *grads, None, None, None
