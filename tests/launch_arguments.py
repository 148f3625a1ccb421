"""What launches take: the structures of kernels/policy_loss.cuh, and those that all kernels share, field for field."""

from __future__ import annotations

import ctypes


class Structure(ctypes.Structure):
    def as_tuple(self) -> tuple:
        values = (getattr(self, name) for name, *_ in self._fields_)
        return tuple(v.as_tuple() if isinstance(v, Structure) else v for v in values)


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Latent(Structure):
    _fields_ = [*fields(ctypes.c_size_t, "data"), *fields(ctypes.c_int, "dtype pad")]


class RowVector(Structure):
    _fields_ = [
        *fields(ctypes.c_size_t, "data"),
        *fields(ctypes.c_float, "value"),
        *fields(ctypes.c_int, "dtype present divide modulo pad"),
    ]


class Schedule(Structure):
    _fields_ = [
        *fields(RowVector, "sigma sigma_next noise_level sigma_max guidance"),
        *fields(ctypes.c_int, "sampler pad"),
    ]


class Latents(Structure):
    _fields_ = fields(Latent, "output uncond sample next old ref")


class Problem(Structure):
    _fields_ = [
        *fields(ctypes.c_longlong, "rows numel"),
        *fields(ctypes.c_double, "low high"),
        *fields(ctypes.c_int, "objective density latent_sum reduction mask kl_divisor keep_nan_kl per_row_scale"),
        *fields(ctypes.c_int, "has_kl has_ref old_form ref_form"),
        *fields(ctypes.c_float, "adv_clip_max ref_kl_weight"),
        *fields(RowVector, "advantages log_prob old_log_prob weights std sqrt_dt ref_std"),
        *fields(Schedule, "schedule"),
    ]


class Forward(Structure):
    _fields_ = [
        *fields(Latents, "latents"),
        *fields(Problem, "problem"),
        *fields(ctypes.c_size_t, "loss numbers partials tickets row_sums"),
        *fields(ctypes.c_int, "splits stage"),
    ]


class Backward(Structure):
    _fields_ = [
        *fields(Latents, "latents"),
        *fields(RowVector, "grad_loss"),
        *fields(ctypes.c_size_t, "numbers grad_output grad_uncond grad_log_prob"),
        *fields(ctypes.c_int, "old_form ref_form splits pad"),
        *fields(ctypes.c_longlong, "rows numel"),
    ]
