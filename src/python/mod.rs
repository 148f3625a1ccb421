//! The boundary to Python: addresses, dtype names and numbers in, validated views out.
//!
//! Nothing of PyTorch or NumPy is known here. The caller (`python/flowdppo_ops/_library`, `numpy.py`) holds every
//! array for the whole call and passes contiguous memory of the stated dtype and length.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};

use crate::cpu::simd::{self, InstructionSet};
use crate::cuda::image::{IMAGES, Image, choose};
use crate::cuda::{self, device, device::Driver};
use crate::error::Error;
use crate::tensor::{Dtype, Rows, View};
use crate::transition::schedule::{Sampler, Schedule};

pub mod policy_loss;
pub mod sde_step;

impl<'py> FromPyObject<'_, 'py> for Dtype {
    type Error = PyErr;

    fn extract(name: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Dtype::parse(name.cast::<PyString>()?.to_str()?)?)
    }
}

/// (address, dtype)
type Array = (usize, Dtype);

/// A number, or (address, dtype, divide, modulo): row r has element `r / divide % modulo`.
pub enum Vector {
    Number(f64),
    Array((usize, Dtype, usize, usize)),
}

/// By hand: the derived form tries one variant after the other, and a failed try builds an exception (~1 us).
impl<'py> FromPyObject<'_, 'py> for Vector {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if value.is_instance_of::<PyTuple>() {
            value.extract().map(Vector::Array)
        } else {
            value.extract().map(Vector::Number)
        }
    }
}

/// Length of a `[rows, numel]` array, refusing what no address space holds.
fn elements(name: &'static str, rows: usize, numel: usize) -> Result<usize, Error> {
    let too_large = Error::TooLarge { name, rows, numel };
    rows.checked_mul(numel).filter(|&len| len <= isize::MAX as usize / 8).ok_or(too_large)
}

/// # Safety
/// An array has `modulo` elements, unwritten and alive for `'a`.
unsafe fn vector<'a, Space>(name: &'static str, vector: Vector, rows: usize) -> Result<Rows<'a, Space>, Error> {
    Ok(match vector {
        Vector::Number(value) => Rows::Number(value),
        Vector::Array((address, dtype, divide, modulo)) => {
            if divide == 0 || modulo == 0 || modulo > rows {
                return Err(Error::Broadcast { name, divide, modulo, rows });
            }
            // SAFETY: passed on from the caller.
            let view = unsafe { View::new(name, address, dtype, modulo) }?;
            Rows::Array { view, divide, modulo }
        }
    })
}

/// sampler, sigma, sigma_next, noise_level, sigma_max, guidance_scale
type ScheduleTuple<'a> = (&'a str, Vector, Vector, Vector, Vector, Option<Vector>);

/// # Safety
/// As `vector`.
unsafe fn schedule<'a, Space>(
    (sampler, sigma, sigma_next, noise_level, sigma_max, guidance_scale): ScheduleTuple<'_>,
    rows: usize,
) -> Result<Schedule<'a, Space>, Error> {
    let read = |name, given| {
        // SAFETY: passed on from the caller.
        unsafe { vector(name, given, rows) }
    };
    Ok(Schedule {
        sampler: option("sampler", sampler, Sampler::NAMES, Sampler::parse)?,
        sigma: read("sigma", sigma)?,
        sigma_next: read("sigma_next", sigma_next)?,
        noise_level: read("noise_level", noise_level)?,
        sigma_max: read("sigma_max", sigma_max)?,
        guidance_scale: guidance_scale.map(|given| read("guidance_scale", given)).transpose()?,
    })
}

fn option<T>(
    name: &'static str,
    came: &str,
    wanted: &'static str,
    find: impl Fn(&str) -> Option<T>,
) -> Result<T, Error> {
    find(came).ok_or_else(|| Error::Option { name, came: came.to_owned(), wanted })
}

/// A panic is a bug of ours; as an `Exception` it reaches `except Exception`, which pyo3's own does not.
fn guarded<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast_ref::<&str>() {
        Some(text) => (*text).to_owned(),
        None => panic.downcast_ref::<String>().cloned().unwrap_or_default(),
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::Panic(text(panic))))
}

/// The embedded kernels, for static checks: unit, compute capability, is PTX, bytes.
#[pyfunction]
pub fn cuda_images(py: Python<'_>) -> Vec<(&'static str, u32, bool, Bound<'_, PyBytes>)> {
    let row = |image: &Image| (image.unit, image.capability, image.is_ptx, PyBytes::new(py, image.bytes));
    IMAGES.iter().map(row).collect()
}

/// The kernels that the launcher calls by name, and the bytes of the one argument it gives them.
#[pyfunction]
pub fn cuda_entry_points() -> Vec<(String, usize)> {
    cuda::policy_loss::entry_points().into_iter().chain(cuda::sde_step::entry_points()).collect()
}

/// Of the embedded kernels, the one of each unit that a GPU of that capability gets: unit, capability, is PTX.
#[pyfunction]
pub fn cuda_images_for(capability: u32) -> Vec<(&'static str, u32, bool)> {
    let mut units: Vec<_> = IMAGES.iter().map(|image| image.unit).collect();
    units.sort_unstable();
    units.dedup();
    let chosen = units.into_iter().filter_map(|unit| choose(IMAGES, unit, capability));
    chosen.map(|image| (image.unit, image.capability, image.is_ptx)).collect()
}

/// Its version and GPUs; None without one.
#[pyfunction]
pub fn cuda_driver() -> Result<Option<Driver>, Error> {
    guarded(device::survey)
}

/// The instructions that the CPU backend takes on this processor.
#[pyfunction]
pub fn instruction_set() -> &'static str {
    match simd::instruction_set() {
        InstructionSet::Avx512 => "avx512",
        InstructionSet::Avx2 => "avx2",
        InstructionSet::Baseline => "baseline",
    }
}
