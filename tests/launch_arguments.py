"""What kernels are launched with: the structures of kernels/call.cuh, field for field.

Names of latents and of row vectors are the native module's own lists, so that none is written here again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import ClassVar

from flowdppo_ops import _native


class Structure(ctypes.Structure):
    def as_tuple(self) -> tuple:
        values = (getattr(self, name) for name, *_ in self._fields_)
        return tuple(v.as_tuple() if isinstance(v, Structure) else v for v in values)


def fields(kind: type, names: str | Iterable[str]) -> list[tuple[str, type]]:
    return [(name, kind) for name in (names.split() if isinstance(names, str) else names)]


class Latent(Structure):
    _fields_: ClassVar = [*fields(ctypes.c_size_t, "data"), *fields(ctypes.c_int, "dtype pad")]


class RowVector(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_size_t, "data"),
        *fields(ctypes.c_double, "value"),
        *fields(ctypes.c_int, "dtype present"),
        *fields(ctypes.c_uint, "divide modulo"),
    ]


class Latents(Structure):
    _fields_: ClassVar = fields(Latent, _native.LATENTS)


class RowVectors(Structure):
    _fields_: ClassVar = fields(RowVector, _native.ROW_VECTORS)


class Schedule(Structure):
    _fields_: ClassVar = fields(RowVector, _native.SCHEDULE)


class SdeStepLatents(Structure):
    _fields_: ClassVar = fields(Latent, _native.SDE_STEP_LATENTS)


class Objective(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_double, "kl_mask_threshold clip_low clip_high adv_clip_max"),
        *fields(ctypes.c_int, "kind mask kl_divisor keep_nan_kl per_row_scale pad"),
    ]


class Settings(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_double, "ref_kl_weight"),
        *fields(ctypes.c_int, "sampler density latent_reduction reduction"),
    ]


class PolicyLoss(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_longlong, "rows numel"),
        ("latents", Latents),
        ("vectors", RowVectors),
        ("schedule", Schedule),
        ("objective", Objective),
        ("settings", Settings),
    ]


class PolicyLossForward(Structure):
    _fields_: ClassVar = [
        ("call", PolicyLoss),
        *fields(ctypes.c_size_t, "loss numbers partials tickets row_sums"),
        *fields(ctypes.c_uint, "splits"),
        *fields(ctypes.c_int, "stage"),
    ]


class PolicyLossBackward(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_longlong, "rows numel"),
        ("latents", Latents),
        ("grad_loss", RowVector),
        *fields(ctypes.c_size_t, "numbers grad_output grad_uncond_output grad_log_prob"),
        *fields(ctypes.c_uint, "splits"),
        *fields(ctypes.c_int, "dtype"),
    ]


class SdeStep(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_longlong, "rows numel"),
        ("latents", SdeStepLatents),
        ("schedule", Schedule),
        *fields(ctypes.c_int, "sampler log_prob_normalizer"),
    ]


class SdeStepForward(Structure):
    _fields_: ClassVar = [
        ("call", SdeStep),
        *fields(ctypes.c_size_t, "stored prev_sample_mean"),
        ("residual", Latent),
        *fields(ctypes.c_size_t, "log_prob std numbers partials tickets"),
        *fields(ctypes.c_uint, "splits"),
        *fields(ctypes.c_int, "pad"),
    ]


class SdeStepBackward(Structure):
    _fields_: ClassVar = [
        *fields(ctypes.c_longlong, "rows numel"),
        ("prev_sample", Latent),
        *fields(ctypes.c_size_t, "prev_sample_mean numbers grad_log_prob grad_prev_sample_mean"),
        *fields(Latent, "grad_model_output grad_uncond_output"),
        *fields(ctypes.c_uint, "splits"),
        *fields(ctypes.c_int, "dtype"),
    ]


# Of an entry point's name, which begins with these: what it is launched with.
ARGUMENTS: dict[str, type[Structure]] = {
    "policy_loss_forward": PolicyLossForward,
    "policy_loss_backward": PolicyLossBackward,
    "sde_step_forward": SdeStepForward,
    "sde_step_backward": SdeStepBackward,
}

# Names in the order of their numbers, by the settings of a checked call.
OPTIONS: dict[str, tuple[str, ...]] = {
    "objective": ("flow_dppo", "flow_grpo", "grpo_guard"),
    "mask": ("asymmetric", "symmetric", "none"),
    "kl_divisor": ("gaussian", "constant", "velocity"),
    "sampler": ("none", *_native.SAMPLERS),
    "density": tuple(_native.DENSITIES),
    "latent_reduction": tuple(_native.LATENT_REDUCTIONS),
    "reduction": tuple(_native.REDUCTIONS),
}


def option(name: str, value: str) -> int:
    return OPTIONS[name].index(value)
