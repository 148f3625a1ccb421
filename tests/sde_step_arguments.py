"""What a launch of `sde_step` takes: the structures of kernels/sde_step.cuh, field for field."""

from __future__ import annotations

import ctypes
from typing import ClassVar

from launch_arguments import Latent, Schedule, Structure, fields


class Forward(Structure):
    _fields_: ClassVar = [
        *fields(Latent, "output uncond sample next"),
        *fields(Schedule, "schedule"),
        *fields(ctypes.c_size_t, "stored mean residual log_prob std numbers partials tickets"),
        *fields(ctypes.c_longlong, "rows numel"),
        *fields(ctypes.c_int, "draws normalizer residual_dtype splits"),
    ]


class Backward(Structure):
    _fields_: ClassVar = [
        *fields(Latent, "next"),
        *fields(ctypes.c_size_t, "mean numbers grad_log_prob grad_mean grad_output grad_uncond"),
        *fields(ctypes.c_longlong, "rows numel"),
        *fields(ctypes.c_int, "output_dtype uncond_dtype splits pad"),
    ]
