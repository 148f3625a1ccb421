"""`flowdppo_ops.sde_step` on the emulated kernels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from cases import defaults
from launch_arguments import SdeStepBackward, SdeStepForward, option
from torch import Tensor

from flowdppo_ops import SdeStep, _native, sde_step
from flowdppo_ops._checks import Call, check_sde_step
from flowdppo_ops._torch import FAMILY

from .call import DTYPES, SHORT_ROW, Launch, Server

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16
# By the dtypes of the model outputs and of the sample.
VARIANTS = {(_f32, _f32): "f32", (_bf16, _f32): "bf16_f32", (_bf16, _bf16): "bf16", (_f16, _f16): "f16"}


class EmulatedSdeStep:
    """Called with the keywords of `sde_step`.

    splits: blocks of a row; 0 a warp per row; None as a launcher would choose. offsets: elements by which the tensors
    of either launch lie off a multiple of 16 bytes. Every launch takes another order of blocks and threads, unless
    `seed` says which.
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

    def __call__(self, **given: Any) -> SdeStep:
        call = check_sde_step("emulated", FAMILY, defaults(sde_step) | given)
        latents = [call.fields[name] for name in _native.SDE_STEP_LATENTS if name in call.fields]
        assert all(latent.dtype != torch.float64 for latent in latents), "float64 is the CPU's"
        return SdeStep(*_Function.apply(call.fields["model_output"], call.fields.get("uncond_output"), call, self))

    def plan(self, rows: int, numel: int) -> tuple[int, int]:
        splits = self.splits
        if splits is None:
            splits = 0 if numel <= SHORT_ROW else 1
        return splits, rows * splits if splits else math.ceil(rows / self.server.warps)

    def kernel(self, direction: str, outputs: set[torch.dtype], sample: torch.dtype) -> str:
        fitting = [
            name for (output, of_sample), name in VARIANTS.items() if outputs == {output} and sample == of_sample
        ]
        return f"sde_step_{direction}_{self.variant or (fitting or ['mixed'])[0]}"

    def forward(self, call: Call) -> dict[str, Tensor]:
        given, rows = call.fields, math.prod(call.row_shape)
        sample, residual_dtype = given["sample"], call.settings["residual_dtype"]
        numel = sample.numel() // rows
        splits, blocks = self.plan(rows, numel)
        launch = Launch(self.server, SdeStepForward(splits=splits), self.offsets, call.row_shape)
        argument = launch.argument.call
        argument.rows, argument.numel = rows, numel
        argument.sampler = option("sampler", call.settings["sampler"])
        argument.log_prob_normalizer = call.settings["log_prob_normalizer"]
        for name in _native.SDE_STEP_LATENTS:
            if name in given:
                launch.latent(f"call.latents.{name}", given[name])
        launch.row_vectors("call.schedule", _native.SCHEDULE, given)
        if "prev_sample" not in given or given["prev_sample"].dtype != sample.dtype:
            launch.output("stored", sample.dtype, rows * numel)
        if residual_dtype is not None:
            launch.argument.residual.dtype = DTYPES[residual_dtype]
            launch.output("residual", residual_dtype, rows * numel)
        launch.output("prev_sample_mean", _f32, rows * numel)
        launch.output("log_prob", _f32, rows)
        launch.output("std", _f32, rows)
        launch.output("numbers", _f32, rows * _native.SDE_STEP_NUMBERS)
        if splits > 1:
            launch.output("partials", _f32, rows * splits)
            launch.output("tickets", torch.int32, rows, fill=0)
        outputs = {given[name].dtype for name in ("model_output", "uncond_output") if name in given}
        return launch.run(self.kernel("forward", outputs, sample.dtype), blocks, next(self.seeds))

    def backward(
        self,
        stored: Tensor,
        mean: Tensor,
        numbers: Tensor,
        grad_log_prob: Tensor | None,
        grad_mean: Tensor | None,
        dtypes: tuple[torch.dtype | None, torch.dtype | None],
    ) -> dict[str, Tensor]:
        """`dtypes`: of the gradients of the two outputs; None: not wanted."""
        rows = numbers.numel() // _native.SDE_STEP_NUMBERS
        numel = mean.numel() // rows
        splits, blocks = self.plan(rows, numel)
        launch = Launch(self.server, SdeStepBackward(rows=rows, numel=numel, splits=splits), self.offsets, (rows,))
        launch.latent("prev_sample", stored)
        inputs = {"prev_sample_mean": mean, "numbers": numbers}
        inputs |= {"grad_log_prob": grad_log_prob, "grad_prev_sample_mean": grad_mean}
        for name, tensor in inputs.items():
            if tensor is not None:
                launch.input(name, tensor)
        for name, dtype in zip(GRADIENTS, dtypes, strict=True):
            if dtype is not None:
                getattr(launch.argument, name).dtype = DTYPES[dtype]
                launch.output(name, dtype, mean.numel())
        kernel = self.kernel("backward", {dtype for dtype in dtypes if dtype is not None}, stored.dtype)
        return launch.run(kernel, blocks, next(self.seeds))


GRADIENTS = ("grad_model_output", "grad_uncond_output")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model_output, uncond_output, call, emulated):
        out = emulated.forward(call)
        shape = call.fields["sample"].shape
        stored = out["stored"].reshape(shape) if "stored" in out else call.fields["prev_sample"]
        residual = out["residual"].reshape(shape) if "residual" in out else None
        mean = out["prev_sample_mean"].reshape(shape)
        ctx.emulated, ctx.saved = emulated, (stored, mean, out["numbers"])
        ctx.dtypes = [None if t is None else t.dtype for t in (model_output, uncond_output)]
        std = out["std"].reshape(call.row_shape)
        ctx.mark_non_differentiable(stored, std, *([] if residual is None else [residual]))
        ctx.set_materialize_grads(False)
        return stored, out["log_prob"].reshape(call.row_shape), mean, std, residual

    @staticmethod
    def backward(ctx, _stored, grad_log_prob, grad_mean, *_others):
        wanted = zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        dtypes = tuple(dtype if wants else None for dtype, wants in wanted)
        out = ctx.emulated.backward(*ctx.saved, grad_log_prob, grad_mean, dtypes)
        shape = ctx.saved[1].shape
        grads = (out.get(name) for name in GRADIENTS)
        return *(None if grad is None else grad.reshape(shape) for grad in grads), None, None
