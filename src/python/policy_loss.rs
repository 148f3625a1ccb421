//! The boundary of `policy_loss`.

use pyo3::prelude::*;

use super::{Array, Vector, elements, guarded, option, vector};
use crate::cuda;
use crate::cuda::launch::Target;
use crate::cuda::policy_loss::Workspace;
use crate::error::Error;
use crate::objective::{Clip, Density, FIELDS, Mask, Objective, Problem, Reduction, numbers_len};
use crate::ops::policy_loss::{
    Backward, Latents, Outputs, backward, backward_on_gpu, forward, forward_on_gpu, loss_len,
};
use crate::plan::gradient_ahead;
use crate::tensor::{Dtype, View, ViewMut};

/// prev_sample_mean, prev_sample, old_prev_sample_mean, ref_prev_sample_mean
type LatentArrays = (Option<Array>, Option<Array>, Option<Array>, Option<Array>);

/// advantages, log_prob, old_log_prob, weights, std, sqrt_dt, ref_std
type Vectors = (Vector, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>);

/// `objectives._native`: name, low (or threshold), high, adv_clip_max, mask, normalize_kl, keep_nan_kl, per_row_scale
type ObjectiveTuple<'a> = (&'a str, f64, f64, f64, &'a str, bool, bool, bool);

fn numbers_elements(rows: usize) -> Result<usize, Error> {
    numbers_len(rows).ok_or(Error::TooLarge { name: "numbers", rows, numel: FIELDS })
}

/// # Safety
/// Every array has `rows * numel` elements, unwritten and alive for `'a`.
unsafe fn latents<'a, Space>(arrays: LatentArrays, rows: usize, numel: usize) -> Result<Latents<'a, Space>, Error> {
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

/// density, latent_reduction, reduction, ref_kl_weight
type Options<'a> = (&'a str, &'a str, &'a str, f64);

/// # Safety
/// As `latents` and `vector`, for arrays in the memory of `Space`.
#[allow(clippy::too_many_arguments)]
unsafe fn problem<'a, Space: Copy>(
    arrays: LatentArrays,
    vectors: Vectors,
    rows: usize,
    numel: usize,
    double: bool,
    objective_tuple: ObjectiveTuple<'_>,
    (density, latent_reduction, reduction, ref_kl_weight): Options<'_>,
) -> Result<(Latents<'a, Space>, Problem<'a, Space>), Error> {
    // SAFETY: passed on from the caller.
    let latents = unsafe { latents(arrays, rows, numel) }?;
    let optional = |name, given: Option<Vector>| {
        // SAFETY: as above.
        given.map(|given| unsafe { vector(name, given, rows) }).transpose()
    };
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
        reduction: option("reduction", reduction, "mean, sum, none, kept_mean", |reduction| match reduction {
            "mean" => Some(Reduction::Mean),
            "sum" => Some(Reduction::Sum),
            "none" => Some(Reduction::None),
            "kept_mean" => Some(Reduction::KeptMean),
            _ => None,
        })?,
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
    Ok((latents, problem))
}

/// `addresses` of the loss and the numbers.
///
/// # Safety
/// Both are freshly allocated in the memory of `Space`, so that nobody else refers to them, and as long as `problem`
/// asks.
unsafe fn outputs<'a, Space>(
    problem: &Problem<'_, Space>,
    addresses: (usize, usize),
) -> Result<Outputs<'a, Space>, Error> {
    let dtype = if problem.double { Dtype::F64 } else { Dtype::F32 };
    let output = |name, address, len| {
        // SAFETY: passed on from the caller.
        unsafe { ViewMut::new(name, address, dtype, len) }
    };
    Ok(Outputs {
        loss: output("loss", addresses.0, loss_len(problem.reduction, problem.rows))?,
        numbers: output("numbers", addresses.1, numbers_elements(problem.rows)?)?,
    })
}

/// # Safety
/// As `latents` and `vector`, for arrays in the memory of `Space`; `numbers` is what the forward left there, and the
/// gradients are freshly allocated.
#[allow(clippy::too_many_arguments)]
unsafe fn gradients<'a, Space>(
    arrays: LatentArrays,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    double: bool,
    grad_mean: Option<Array>,
    grad_log_prob: Option<Array>,
) -> Result<(Latents<'a, Space>, Backward<'a, Space>), Error> {
    let dtype = if double { Dtype::F64 } else { Dtype::F32 };
    let mean_len = elements("grad_mean", rows, numel)?;
    let output = |name, array: Option<Array>, len| {
        // SAFETY: passed on from the caller.
        array.map(|(address, dtype)| unsafe { ViewMut::new(name, address, dtype, len) }).transpose()
    };
    // SAFETY: as above.
    let (latents, grad_loss, numbers) = unsafe {
        let numbers = View::new("numbers", numbers, dtype, numbers_elements(rows)?)?;
        (latents(arrays, rows, numel)?, vector("grad_loss", grad_loss, rows)?, numbers)
    };
    let grad_mean = output("grad_mean", grad_mean, mean_len)?;
    let grad_log_prob = output("grad_log_prob", grad_log_prob, rows)?;
    Ok((latents, Backward { rows, numel, double, grad_loss, numbers, grad_mean, grad_log_prob }))
}

/// Whether a forward on the CPU does well to form the gradient of the mean too, see `plan::gradient_ahead`.
#[pyfunction]
pub fn policy_loss_gradient_ahead(rows: usize, row_bytes: usize) -> bool {
    gradient_ahead(rows, row_bytes)
}

/// Forward of `policy_loss` on CPU memory; `out` are the addresses of the loss and the numbers.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_forward(
    py: Python<'_>,
    arrays: LatentArrays,
    vectors: Vectors,
    rows: usize,
    numel: usize,
    double: bool,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: (usize, usize),
    gradient_ahead: Option<Array>,
    threads: usize,
) -> PyResult<()> {
    let len = elements("gradient_ahead", rows, numel)?;
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, mut outputs, gradient) = unsafe {
        let (latents, problem) = problem(arrays, vectors, rows, numel, double, objective, options)?;
        let gradient = |(address, dtype)| ViewMut::new("gradient_ahead", address, dtype, len);
        let (outputs, gradient) = (outputs(&problem, out)?, gradient_ahead.map(gradient).transpose()?);
        (latents, problem, outputs, gradient)
    };
    Ok(py.detach(|| guarded(|| forward(&problem, &latents, &mut outputs, gradient.as_ref(), threads)))?)
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
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, call) =
        unsafe { gradients(arrays, grad_loss, numbers, rows, numel, double, grad_mean, grad_log_prob) }?;
    Ok(py.detach(|| guarded(|| backward(call, &latents, threads)))?)
}

// ---- the same on a GPU: addresses of its memory; `target` is PyTorch's device number and the current stream there ----

/// What a forward needs beside its outputs: the length of the float32 partial sums, and whether the stream is being
/// captured into a CUDA graph. Loads the kernels when a device is first used.
#[pyfunction]
pub fn policy_loss_workspace_cuda(
    py: Python<'_>,
    target: (usize, usize),
    rows: usize,
    numel: usize,
    needs_batch_means: bool,
) -> PyResult<(usize, bool)> {
    let target = Target { device: target.0, stream: target.1 };
    let partials = || cuda::policy_loss::partials(target.device, rows, numel, needs_batch_means);
    let find = || Ok((partials()?, target.is_capturing()?));
    Ok(py.detach(|| guarded(find))?)
}

/// As `policy_loss_forward`, on a GPU. `partials` and `tickets`: address and elements; the tickets are 0.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_forward_cuda(
    py: Python<'_>,
    target: (usize, usize),
    arrays: LatentArrays,
    vectors: Vectors,
    rows: usize,
    numel: usize,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: (usize, usize),
    partials: (usize, usize),
    tickets: (usize, usize),
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, outputs, workspace) = unsafe {
        let (latents, problem) = problem(arrays, vectors, rows, numel, false, objective, options)?;
        let outputs = outputs(&problem, out)?;
        let workspace = Workspace {
            partials: ViewMut::new("partials", partials.0, Dtype::F32, partials.1)?,
            tickets: ViewMut::new("tickets", tickets.0, Dtype::F32, tickets.1)?,
        };
        (latents, problem, outputs, workspace)
    };
    Ok(py.detach(|| guarded(|| forward_on_gpu(target, &problem, &latents, &outputs, &workspace)))?)
}

/// As `policy_loss_backward`, on a GPU.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_backward_cuda(
    py: Python<'_>,
    target: (usize, usize),
    arrays: LatentArrays,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    grad_mean: Option<Array>,
    grad_log_prob: Option<Array>,
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, call) =
        unsafe { gradients(arrays, grad_loss, numbers, rows, numel, false, grad_mean, grad_log_prob) }?;
    Ok(py.detach(|| guarded(|| backward_on_gpu(target, &call, &latents)))?)
}
