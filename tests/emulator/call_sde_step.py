"""`flowdppo_ops.sde_step` on the emulated kernels; the structures are those of kernels/sde_step.cuh."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from launch_arguments import Schedule
from sde_step_arguments import Backward, Forward
from torch import Tensor

from flowdppo_ops import SdeStep, _args, _native, _step_args
from flowdppo_ops._torch import FAMILY

from .call import DTYPES, SHORT_ROW, Launch, Server

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16
# By the dtypes of the model outputs and of the sample.
VARIANTS = {(_f32, _f32): "f32", (_bf16, _f32): "bf16_f32", (_bf16, _bf16): "bf16", (_f16, _f16): "f16"}


class EmulatedSdeStep:
    """Called with the keywords of `sde_step`.

    splits: blocks of a row; 0 a warp per row; None as a launcher would choose. offsets: elements by which the tensors
    of `Forward` and `Backward` lie off a multiple of 16 bytes. Every launch takes another order of blocks and threads,
    unless `seed` says which.
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
        names = ("uncond_output", "guidance_scale", "prev_sample", "noise", "generator", "residual_dtype")
        defaults = dict.fromkeys(names) | {"sigma_max": 0.99, "log_prob_normalizer": True}
        call = _step_args.check_sde_step("emulated", FAMILY, **(defaults | given))
        assert not call.double, "float64 is the CPU's"
        return SdeStep(*_Function.apply(call.model_output, call.uncond_output, call, self))

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

    def forward(self, call: _step_args.StepCall) -> dict[str, Tensor]:
        rows = math.prod(call.row_shape)
        numel = call.sample.numel() // rows
        splits, blocks = self.plan(rows, numel)
        argument = Forward(rows=rows, numel=numel, splits=splits, normalizer=call.log_prob_normalizer)
        launch = Launch(self.server, argument, self.offsets, call.row_shape)
        following = call.noise if call.prev_sample is None else call.prev_sample
        argument.draws = call.prev_sample is None
        latents = {"output": call.model_output, "uncond": call.uncond_output, "sample": call.sample, "next": following}
        for name, tensor in latents.items():
            if tensor is not None:
                getattr(argument, name).dtype = DTYPES[tensor.dtype]
                launch.input(name, tensor)
        argument.schedule.sampler = 1 + _args.SAMPLERS.index(call.sampler)
        vectors = call.sigma, call.sigma_next, call.noise_level, call.sigma_max, call.guidance_scale
        for name, value in zip(("sigma", "sigma_next", "noise_level", "sigma_max", "guidance"), vectors, strict=True):
            at = Forward.schedule.offset + getattr(Schedule, name).offset
            launch.row_vector(getattr(argument.schedule, name), at, value)
        if call.prev_sample is None or call.prev_sample.dtype != call.sample.dtype:
            launch.output("stored", call.sample.dtype, rows * numel)
        if call.residual_dtype is not None:
            argument.residual_dtype = DTYPES[call.residual_dtype]
            launch.output("residual", call.residual_dtype, rows * numel)
        launch.output("mean", _f32, rows * numel)
        launch.output("log_prob", _f32, rows)
        launch.output("std", _f32, rows)
        launch.output("numbers", _f32, rows * _native.SDE_STEP_NUMBERS)
        if splits > 1:
            launch.output("partials", _f32, rows * splits)
            launch.output("tickets", torch.int32, rows, fill=0)
        outputs = {t.dtype for t in (call.model_output, call.uncond_output) if t is not None}
        kernel = self.kernel("forward", outputs, call.sample.dtype)
        return launch.run(kernel, blocks, next(self.seeds))

    def backward(
        self,
        stored: Tensor,
        mean: Tensor,
        numbers: Tensor,
        grad_log_prob: Tensor | None,
        grad_mean: Tensor | None,
        dtypes: tuple[torch.dtype | None, torch.dtype | None],
    ) -> dict[str, Tensor]:
        rows = numbers.numel() // _native.SDE_STEP_NUMBERS
        numel = mean.numel() // rows
        splits, blocks = self.plan(rows, numel)
        argument = Backward(rows=rows, numel=numel, splits=splits)
        launch = Launch(self.server, argument, self.offsets, (rows,))
        argument.next.dtype = DTYPES[stored.dtype]
        inputs = {"next": stored, "mean": mean, "numbers": numbers}
        inputs |= {"grad_log_prob": grad_log_prob, "grad_mean": grad_mean}
        for name, tensor in inputs.items():
            if tensor is not None:
                launch.input(name, tensor)
        for name, dtype in zip(("output", "uncond"), dtypes, strict=True):
            if dtype is not None:
                setattr(argument, f"{name}_dtype", DTYPES[dtype])
                launch.output(f"grad_{name}", dtype, mean.numel())
        kernel = self.kernel("backward", {dtype for dtype in dtypes if dtype is not None}, stored.dtype)
        return launch.run(kernel, blocks, next(self.seeds))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model_output, uncond_output, call, emulated):
        out = emulated.forward(call)
        shape = call.sample.shape
        stored = out["stored"].reshape(shape) if "stored" in out else call.prev_sample
        residual = out["residual"].reshape(shape) if "residual" in out else None
        mean = out["mean"].reshape(shape)
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
        grads = (out.get(f"grad_{name}") for name in ("output", "uncond"))
        return *(None if grad is None else grad.reshape(shape) for grad in grads), None, None
