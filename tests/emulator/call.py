"""`loss` and `step_loss` on the emulated kernels: the arguments of a launch, sent to a server process.

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
from emulator.build import Fault, build
from launch_arguments import Backward, Forward, Latents, Problem, RowVector, Schedule
from torch import Tensor

from flowdppo_ops import FlowDPPO, PolicyLoss, _args, _native, _step_args
from flowdppo_ops._torch import FAMILY

SHORT_ROW = 512  # kShortRow
LATENTS = tuple(name for name, _ in Latents._fields_)  # in the order of `_args.Latents`
FORMS = ("mean", "output", "residual")
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


class Launch:
    """An argument under construction: its scalars, and the buffers that its pointers will point to."""

    def __init__(
        self, server: Server, argument: ctypes.Structure, offsets: dict[str, int], row_shape: tuple[int, ...]
    ) -> None:
        self.server, self.argument, self.offsets, self.row_shape = server, argument, offsets, row_shape
        self.buffers: list[_Buffer] = []
        self.outputs: dict[str, tuple[torch.dtype, int]] = {}

    def point(self, at: int, tensor: Tensor, offset: int = 0) -> None:
        """The pointer at this byte of the argument to the tensor; `offset`: elements off a multiple of 16 bytes."""
        self.buffers.append(_Buffer(_bytes(tensor), [at], offset * tensor.element_size()))

    def latents(self, latents: _args.Latents) -> None:
        start = self.at("latents")
        for name, tensor in zip(LATENTS, latents, strict=True):
            if tensor is not None:
                getattr(self.argument.latents, name).dtype = DTYPES[tensor.dtype]
                self.point(start + getattr(Latents, name).offset, tensor, self.offsets.get(name, 0))

    def row_vector(self, struct: RowVector, at: int, value: float | Tensor | None) -> None:
        struct.present = value is not None
        if isinstance(value, Tensor):
            struct.dtype = DTYPES[value.dtype]
            struct.divide, struct.modulo = _args.row_stride(tuple(value.shape), self.row_shape)
            self.point(at, value)
        elif value is not None:
            struct.value = value

    def input(self, name: str, value: Tensor) -> None:
        self.point(self.at(name), value, self.offsets.get(name, 0))

    def output(self, name: str, dtype: torch.dtype, count: int, fill: int = CANARY) -> None:
        """Filled with canaries: an element that is not written does not pass for a result."""
        size = torch.empty(0, dtype=dtype).element_size()
        offset = self.offsets.get(name, 0) * size
        self.buffers.append(_Buffer(bytes([fill]) * (count * size), [self.at(name)], offset, is_output=True))
        self.outputs[name] = (dtype, count)

    def at(self, name: str) -> int:
        """Where in the argument a pointer stands."""
        return getattr(type(self.argument), name).offset

    def run(self, kernel: str, blocks: int, seed: int) -> dict[str, Tensor]:
        replies = self.server.launch(kernel, self.argument, self.buffers, blocks, seed)
        pairs = zip(self.outputs.items(), replies, strict=True)
        out = {name: torch.frombuffer(bytearray(data), dtype=dtype) for (name, (dtype, _)), data in pairs}
        assert "tickets" not in out or not out["tickets"].any(), "tickets are not 0 after the launch"
        return out


class Emulated:
    """A loss on the emulated kernels, called with keywords.

    splits: blocks of a row; 0 a warp per row; None as a launcher would choose. offsets: elements by which the latents
    (names as in `Latents`), "grad_output" and "grad_uncond" lie off a multiple of 16 bytes. Every launch takes another
    order of blocks and threads, unless `seed` says which.
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

    def run(self, call: _args.LossCall, row_sums: Tensor | None = None) -> PolicyLoss:
        """`row_sums`: those of all shards, of which the latents are one."""
        latents, vectors = call.latents, call.vectors
        loss, numbers = _Function.apply(latents.output, latents.uncond_output, vectors.log_prob, call, self, row_sums)
        return PolicyLoss(loss, numbers, call.row_shape, latents.old is not None, latents.ref is not None)

    def plan(self, rows: int, numel: int) -> tuple[int, int]:
        """(splits, blocks)"""
        splits = self.splits
        if splits is None:
            splits = 0 if numel <= SHORT_ROW else math.ceil(numel / 4096)
        return splits, math.ceil(rows / self.server.warps) if splits == 0 else rows * splits

    def kernel(self, direction: str, latents: _args.Latents, is_step: bool) -> str:
        output, uncond, sample, prev_sample, old, ref = (None if t is None else t.dtype for t in latents)
        fitting = [
            name
            for dtypes, name in VARIANTS[is_step].items()
            for outputs, samples, policies in [dtypes]
            if {output, uncond} <= {None, outputs}
            and {sample, prev_sample} <= {None, samples}
            and {old, ref} <= {None, policies}
        ]
        mixed = "step_mixed" if is_step else "mixed"
        return f"policy_loss_{direction}_{self.variant or (fitting or [mixed])[0]}"

    def forward(self, call: _args.LossCall, row_sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and numbers."""
        stage = WHOLE if row_sums is None else OBJECTIVE_ALONE
        launch, rows = self._forward(call, stage)
        per_row = call.settings.reduction == "none"
        launch.output("loss", torch.float32, rows if per_row else 1)
        launch.output("numbers", torch.float32, rows * fields(call.schedule is not None) + _native.BATCH_LEN)
        if row_sums is not None:
            launch.input("row_sums", row_sums)
        numel = 0 if stage == OBJECTIVE_ALONE else launch.argument.problem.numel
        out = self._run_forward(launch, call, rows, numel)
        return out["loss"].reshape(call.row_shape if per_row else ()), out["numbers"]

    def row_sums(self, call: _args.LossCall) -> Tensor:
        """Of the shard of every row that the latents are, `[4 rows + 1]`."""
        launch, rows = self._forward(call, SUMS_ALONE)
        launch.output("row_sums", torch.float64, 4 * rows + 1)
        return self._run_forward(launch, call, rows, launch.argument.problem.numel)["row_sums"]

    def _forward(self, call: _args.LossCall, stage: int) -> tuple[Launch, int]:
        latents, vectors, settings, schedule = call.latents, call.vectors, call.settings, call.schedule
        if call.double:
            raise Float64("no kernel takes float64 latents")
        rows = vectors.advantages.numel()
        launch = Launch(self.server, Forward(stage=stage), self.offsets, call.row_shape)
        # Without their bytes where none may be read.
        launch.latents(latents if stage != OBJECTIVE_ALONE else _args.Latents(*[None] * len(latents)))
        problem = launch.argument.problem
        problem.rows, problem.numel = rows, 0 if latents.output is None else latents.output.numel() // rows
        problem.objective = ("flow_dppo", "flow_grpo", "grpo_guard").index(settings.objective)
        problem.density = ("gaussian", "cps").index(settings.density)
        problem.latent_sum = settings.latent_reduction == "sum"
        problem.reduction = ("mean", "sum", "none", "kept_mean").index(settings.reduction)
        problem.mask = ("asymmetric", "symmetric", "none").index(settings.mask)
        problem.kl_divisor = ("gaussian", "constant", "velocity").index(settings.kl_divisor)
        for name in ("keep_nan_kl", "per_row_scale", "low", "high", "adv_clip_max", "ref_kl_weight"):
            setattr(problem, name, getattr(settings, name))
        problem.has_kl = latents.old is not None and (vectors.std is not None or schedule is not None)
        problem.has_ref = latents.ref is not None
        at = Forward.problem.offset
        for name, value in vectors._asdict().items():
            launch.row_vector(getattr(problem, name), at + getattr(Problem, name).offset, value)
        if schedule is not None:
            problem.old_form, problem.ref_form = FORMS.index(schedule.old_form), FORMS.index(schedule.ref_form)
            problem.schedule.sampler = 1 + _args.SAMPLERS.index(schedule.sampler)
            at += Problem.schedule.offset
            given = dict(
                zip(("sigma", "sigma_next", "noise_level", "sigma_max", "guidance"), schedule[3:], strict=True)
            )
            for name, value in given.items():
                launch.row_vector(getattr(problem.schedule, name), at + getattr(Schedule, name).offset, value)
        return launch, rows

    def _run_forward(self, launch: Launch, call: _args.LossCall, rows: int, numel: int) -> dict[str, Tensor]:
        whole_rows = launch.argument.stage == OBJECTIVE_ALONE
        splits, blocks = (0, math.ceil(rows / self.server.warps)) if whole_rows else self.plan(rows, numel)
        launch.argument.splits = splits
        launch.output("partials", torch.float32, rows * max(splits, 1) * 4)
        launch.output("tickets", torch.int32, rows + 1, fill=0)
        kernel = self.kernel("forward", call.latents, call.schedule is not None)
        return launch.run(kernel, blocks, next(self.seeds))

    def backward(
        self,
        grad_loss: Tensor,
        numbers: Tensor,
        latents: _args.Latents,
        schedule: _args.Schedule | None,
        wants: tuple[bool, bool, bool],
    ) -> dict[str, Tensor]:
        """`wants`: the gradients of the output, of the unconditional output and of the log-prob."""
        is_step = schedule is not None
        rows = (numbers.numel() - _native.BATCH_LEN) // fields(is_step)
        numel = 0 if latents.output is None else latents.output.numel() // rows
        splits, blocks = self.plan(rows, numel)
        argument = Backward(splits=splits, rows=rows, numel=numel)
        launch = Launch(self.server, argument, self.offsets, (rows,))
        launch.latents(latents)
        launch.row_vector(launch.argument.grad_loss, Backward.grad_loss.offset, grad_loss.contiguous().reshape(-1))
        launch.input("numbers", numbers)
        if schedule is not None:
            launch.argument.old_form = FORMS.index(schedule.old_form)
            launch.argument.ref_form = FORMS.index(schedule.ref_form)
        if not any(wants[:2]):
            blocks = math.ceil(rows / (32 * self.server.warps))
        if wants[0]:
            launch.output("grad_output", latents.output.dtype, latents.output.numel())
        if wants[1]:
            launch.output("grad_uncond", latents.uncond_output.dtype, latents.uncond_output.numel())
        if wants[2]:
            launch.output("grad_log_prob", torch.float32, rows)
        return launch.run(self.kernel("backward", latents, is_step), blocks, next(self.seeds))


class EmulatedLoss(Emulated):
    """`flowdppo_ops.loss`"""

    def __call__(self, prev_sample_mean: Any, old_prev_sample_mean: Any, advantages: Any, **options: Any) -> PolicyLoss:
        names = ("std", "sqrt_dt", "prev_sample", "log_prob", "old_log_prob", "weights", "ref_prev_sample_mean")
        defaults = dict.fromkeys((*names, "ref_std", "process_group")) | {"ref_kl_weight": 0.0}
        defaults |= {"objective": FlowDPPO(), "density": "gaussian", "latent_reduction": "mean", "reduction": "mean"}
        options = defaults | {"prev_sample_mean": prev_sample_mean, "advantages": advantages} | options
        return self.run(_args.check_loss("emulated", FAMILY, old_prev_sample_mean=old_prev_sample_mean, **options))


class EmulatedStepLoss(Emulated):
    """`flowdppo_ops.step_loss`"""

    def __call__(self, **options: Any) -> PolicyLoss:
        return self.run(self.checked(**options))

    def checked(self, **options: Any) -> _args.LossCall:
        names = ("uncond_output", "guidance_scale", "old_prev_sample_mean", "old_model_output", "old_residual")
        names += ("old_log_prob", "weights", "ref_prev_sample_mean", "ref_model_output", "ref_std", "process_group")
        defaults = dict.fromkeys(names) | {"ref_kl_weight": 0.0, "sampler": "flow_sde", "sigma_max": 0.99}
        defaults |= {"objective": FlowDPPO(), "latent_reduction": "mean", "reduction": "mean"}
        return _step_args.check_step_loss("emulated", FAMILY, **(defaults | options))


def fields(is_step: bool) -> int:
    return _native.STEP_FIELDS if is_step else _native.FIELDS


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
        latents, (numbers,) = ctx.call.latents, ctx.saved_tensors
        wants_output, *wants_others = ctx.needs_input_grad[:3]
        differentiable = _args.differentiates_mean(latents, ctx.call.settings.objective)
        if ctx.call.settings.objective != "grpo_guard":
            latents = latents._replace(old=None)
        wants = (wants_output and differentiable, *wants_others)
        out = ctx.emulated.backward(grad_loss, numbers, latents, ctx.call.schedule, wants)
        like = {"grad_output": latents.output, "grad_uncond": latents.uncond_output}
        like["grad_log_prob"] = ctx.call.vectors.log_prob
        grads = [
            out[name].reshape(tensor.shape).to(tensor.dtype) if name in out else None for name, tensor in like.items()
        ]
        return *grads, None, None, None
