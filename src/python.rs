//! The boundary to Python: addresses, dtype names and numbers in, validated views out.
//!
//! Nothing of PyTorch or NumPy is known here. The caller (`python/flowdppo_ops/_library.py`, `numpy.py`) holds every
//! array for the whole call and passes contiguous memory of the stated dtype and length.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use crate::error::Error;
use crate::objective::{Clip, Density, FIELDS, Mask, Objective, Problem, Reduction, numbers_len};
use crate::ops::policy_loss::{Backward, Latents, Outputs, backward, forward, loss_len};
use crate::tensor::{Dtype, Rows, View, ViewMut};

impl<'py> FromPyObject<'_, 'py> for Dtype {
    type Error = PyErr;

    fn extract(name: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Dtype::parse(name.cast::<PyString>()?.to_str()?)?)
    }
}

/// (address, dtype)
type Array = (usize, Dtype);

/// A number, or (address, dtype, stride) with stride 0 or 1.
pub(crate) enum Vector {
    Number(f64),
    Array((usize, Dtype, usize)),
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

/// prev_sample_mean, prev_sample, old_prev_sample_mean, ref_prev_sample_mean
type LatentArrays = (Option<Array>, Option<Array>, Option<Array>, Option<Array>);

/// advantages, log_prob, old_log_prob, weights, std, sqrt_dt, ref_std
type Vectors = (Vector, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>);

/// `objectives._native`: name, low (or threshold), high, adv_clip_max, mask, normalize_kl, keep_nan_kl, per_row_scale
type ObjectiveTuple<'a> = (&'a str, f64, f64, f64, &'a str, bool, bool, bool);

/// Length of a `[rows, numel]` array, refusing what no address space holds.
fn elements(name: &'static str, rows: usize, numel: usize) -> Result<usize, Error> {
    let too_large = Error::TooLarge { name, rows, numel };
    rows.checked_mul(numel).filter(|&len| len <= isize::MAX as usize / 8).ok_or(too_large)
}

fn numbers_elements(rows: usize) -> Result<usize, Error> {
    numbers_len(rows).ok_or(Error::TooLarge { name: "numbers", rows, numel: FIELDS })
}

/// # Safety
/// Every array has `rows * numel` elements, unwritten and alive for `'a`.
unsafe fn latents<'a>(arrays: LatentArrays, rows: usize, numel: usize) -> Result<Latents<'a>, Error> {
    let len = elements("prev_sample_mean", rows, numel)?;
    let view = |name, array: Option<Array>| {
        // SAFETY: passed on from the caller.
        array.map(|(address, dtype)| unsafe { View::new(name, address, dtype, len) }).transpose()
    };
    Ok(Latents {
        prev_sample_mean: view("prev_sample_mean", arrays.0)?,
        prev_sample: view("prev_sample", arrays.1)?,
        old_prev_sample_mean: view("old_prev_sample_mean", arrays.2)?,
        ref_prev_sample_mean: view("ref_prev_sample_mean", arrays.3)?,
    })
}

/// # Safety
/// An array has `rows` elements (one with stride 0), unwritten and alive for `'a`.
unsafe fn vector<'a>(name: &'static str, vector: Vector, rows: usize) -> Result<Rows<'a>, Error> {
    Ok(match vector {
        Vector::Number(value) => Rows::Number(value),
        Vector::Array((address, dtype, stride)) => {
            let stride = stride.min(1);
            // SAFETY: passed on from the caller.
            let view = unsafe { View::new(name, address, dtype, if stride == 0 { 1 } else { rows }) }?;
            Rows::Array { view, stride }
        }
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

fn objective(
    (name, low, high, adv_clip_max, mask, normalize_kl, keep_nan_kl, per_row_scale): ObjectiveTuple<'_>,
) -> Result<Objective, Error> {
    let mask = option("mask", mask, "asymmetric, symmetric, none", |mask| match mask {
        "asymmetric" => Some(Mask::Asymmetric),
        "symmetric" => Some(Mask::Symmetric),
        "none" => Some(Mask::None),
        _ => None,
    })?;
    let clip = Clip { low, high, adv_clip_max };
    option("objective", name, "flow_dppo, flow_grpo, grpo_guard", |name| match name {
        "flow_dppo" => Some(Objective::FlowDppo { threshold: low, normalize_kl, mask, keep_nan_kl }),
        "flow_grpo" => Some(Objective::FlowGrpo(clip)),
        "grpo_guard" => Some(Objective::GrpoGuard { clip, per_row_scale }),
        _ => None,
    })
}

/// A panic is a bug of ours; as an `Exception` it reaches `except Exception`, which pyo3's own does not.
fn guarded(work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast_ref::<&str>() {
        Some(text) => (*text).to_owned(),
        None => panic.downcast_ref::<String>().cloned().unwrap_or_default(),
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::Panic(text(panic))))
}

/// Forward of `policy_loss` on CPU memory; `outputs` are the addresses of the loss and the numbers.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_forward(
    py: Python<'_>,
    arrays: LatentArrays,
    vectors: Vectors,
    rows: usize,
    numel: usize,
    double: bool,
    objective_tuple: ObjectiveTuple<'_>,
    density: &str,
    latent_reduction: &str,
    reduction: &str,
    ref_kl_weight: f64,
    outputs: (usize, usize),
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the module's contract, see the top of this file.
    let latents = unsafe { latents(arrays, rows, numel) }?;
    let optional = |name, given: Option<Vector>| {
        // SAFETY: as above.
        given.map(|given| unsafe { vector(name, given, rows) }).transpose()
    };
    let reduction = option("reduction", reduction, "mean, sum, none, kept_mean", |reduction| match reduction {
        "mean" => Some(Reduction::Mean),
        "sum" => Some(Reduction::Sum),
        "none" => Some(Reduction::None),
        "kept_mean" => Some(Reduction::KeptMean),
        _ => None,
    })?;
    let std = optional("std", vectors.4)?;
    let problem = Problem {
        rows,
        numel,
        objective: objective(objective_tuple)?,
        density: option("density", density, "gaussian, cps", |density| match density {
            "gaussian" => Some(Density::Gaussian),
            "cps" => Some(Density::Cps),
            _ => None,
        })?,
        latent_sum: option("latent_reduction", latent_reduction, "mean, sum", |reduction| match reduction {
            "mean" => Some(false),
            "sum" => Some(true),
            _ => None,
        })?,
        reduction,
        ref_kl_weight,
        double,
        has_kl: latents.old_prev_sample_mean.is_some() && std.is_some(),
        has_ref: latents.ref_prev_sample_mean.is_some(),
        // SAFETY: as above.
        advantages: unsafe { vector("advantages", vectors.0, rows) }?,
        log_prob: optional("log_prob", vectors.1)?,
        old_log_prob: optional("old_log_prob", vectors.2)?,
        weights: optional("weights", vectors.3)?,
        std,
        sqrt_dt: optional("sqrt_dt", vectors.5)?,
        ref_std: optional("ref_std", vectors.6)?.or(std),
    };
    let dtype = if double { Dtype::F64 } else { Dtype::F32 };
    let output = |name, address, len| {
        // SAFETY: as above; outputs are freshly allocated, so nobody else refers to them.
        unsafe { ViewMut::new(name, address, dtype, len) }
    };
    let mut outputs = Outputs {
        loss: output("loss", outputs.0, loss_len(reduction, rows))?,
        numbers: output("numbers", outputs.1, numbers_elements(rows)?)?,
    };
    Ok(py.detach(|| guarded(|| forward(&problem, &latents, &mut outputs, threads)))?)
}

/// Backward of `policy_loss` on CPU memory, from the forward's numbers.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_backward(
    py: Python<'_>,
    arrays: LatentArrays,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    double: bool,
    grad_mean: Option<Array>,
    grad_log_prob: Option<Array>,
    threads: usize,
) -> PyResult<()> {
    let dtype = if double { Dtype::F64 } else { Dtype::F32 };
    // SAFETY: the module's contract, see the top of this file; the gradients are freshly allocated.
    let (latents, call) = unsafe {
        let latents = latents(arrays, rows, numel)?;
        let mean_len = elements("grad_mean", rows, numel)?;
        let output = |name, array: Option<Array>, len| {
            array.map(|(address, dtype)| ViewMut::new(name, address, dtype, len)).transpose()
        };
        let call = Backward {
            rows,
            numel,
            double,
            grad_loss: vector("grad_loss", grad_loss, rows)?,
            numbers: View::new("numbers", numbers, dtype, numbers_elements(rows)?)?,
            grad_mean: output("grad_mean", grad_mean, mean_len)?,
            grad_log_prob: output("grad_log_prob", grad_log_prob, rows)?,
        };
        (latents, call)
    };
    Ok(py.detach(|| guarded(|| backward(call, &latents, threads)))?)
}
