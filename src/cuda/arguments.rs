//! What the arguments of every kernel are made of: twins of the structures in `kernels/common` and
//! `kernels/schedule.cuh`, field for field.

use crate::error::Error;
use crate::tensor::{Dtype, Gpu, Rows, View, ViewMut};
use crate::transition::schedule::{Sampler, Schedule};

/// `struct Latent`: `[rows, numel]`, contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct LatentArgument {
    /// 0: absent
    data: usize,
    dtype: i32,
    pad: i32,
}

/// `struct RowVector`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RowArgument {
    /// 0: `value`, for all rows
    data: usize,
    value: f32,
    dtype: i32,
    present: i32,
    /// Row r has element `r / divide % modulo`.
    divide: i32,
    modulo: i32,
    pad: i32,
}

/// `struct Schedule`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ScheduleArgument {
    sigma: RowArgument,
    sigma_next: RowArgument,
    noise_level: RowArgument,
    sigma_max: RowArgument,
    guidance: RowArgument,
    sampler: i32,
    pad: i32,
}

/// The same numbers stand in static assertions of the headers: neither side can drift alone.
const _: () = assert!(size_of::<LatentArgument>() == 16);
const _: () = assert!(size_of::<RowArgument>() == 32);
const _: () = assert!(size_of::<ScheduleArgument>() == 168);

pub(super) fn dtype_number(dtype: Dtype) -> i32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::Bf16 => 1,
        Dtype::F16 => 2,
        Dtype::F64 => 3,
    }
}

pub(super) fn latent_argument(view: Option<View<'_, Gpu>>) -> LatentArgument {
    match view {
        Some(view) => LatentArgument { data: view.address(), dtype: dtype_number(view.dtype()), pad: 0 },
        None => LatentArgument { data: 0, dtype: 0, pad: 0 },
    }
}

pub(super) fn row_argument(vector: Option<Rows<'_, Gpu>>) -> RowArgument {
    let absent = RowArgument { data: 0, value: 0.0, dtype: 0, present: 0, divide: 1, modulo: 1, pad: 0 };
    match vector {
        None => absent,
        Some(Rows::Number(value)) => RowArgument { value: value as f32, present: 1, ..absent },
        // Plans refuse more rows than 31 bits hold.
        Some(Rows::Array { view, divide, modulo }) => RowArgument {
            data: view.address(),
            dtype: dtype_number(view.dtype()),
            present: 1,
            divide: divide as i32,
            modulo: modulo as i32,
            ..absent
        },
    }
}

pub(super) fn schedule_argument<'a>(schedule: Option<&Schedule<'a, Gpu>>) -> ScheduleArgument {
    let row = |of: fn(&Schedule<'a, Gpu>) -> Option<Rows<'a, Gpu>>| row_argument(schedule.and_then(of));
    ScheduleArgument {
        sigma: row(|schedule| Some(schedule.sigma)),
        sigma_next: row(|schedule| Some(schedule.sigma_next)),
        noise_level: row(|schedule| Some(schedule.noise_level)),
        sigma_max: row(|schedule| Some(schedule.sigma_max)),
        guidance: row(|schedule| schedule.guidance_scale),
        sampler: match schedule.map(|schedule| schedule.sampler) {
            None => 0,
            Some(Sampler::FlowSde) => 1,
            Some(Sampler::DanceSde) => 2,
            Some(Sampler::Cps) => 3,
        },
        pad: 0,
    }
}

/// A workspace is made elsewhere, hence measured: a kernel that ran past its end would not be noticed.
pub(super) fn long_enough(name: &'static str, view: &ViewMut<'_, Gpu>, wanted: usize) -> Result<(), Error> {
    let came = view.elements();
    if came < wanted { Err(Error::Workspace { name, came, wanted }) } else { Ok(()) }
}
