//! The boundary of `policy_loss`.

use pyo3::prelude::*;

use super::{Array, Vector, elements, guarded, option, vector};
use crate::cpu::policy_loss::Targets;
use crate::cuda;
use crate::cuda::launch::Target;
use crate::cuda::policy_loss::Workspace;
use crate::error::Error;
use crate::objective::{Clip, Density, KlDivisor, Mask, Objective, Problem, Reduction, fields, numbers_len};
use crate::ops::policy_loss::{
    Backward, Latents, Outputs, backward, backward_on_gpu, forward, forward_on_gpu, latent_names, loss_len, shard_sums,
    shard_sums_len, shard_sums_on_gpu,
};
use crate::plan::gradient_ahead;
use crate::tensor::{Dtype, View, ViewMut};
use crate::transition::step::{Form, Step};

/// In the order of `ops::policy_loss::Latents`.
type LatentArrays = (Option<Array>, Option<Array>, Option<Array>, Option<Array>, Option<Array>, Option<Array>);

/// advantages, log_prob, old_log_prob, weights, std, sqrt_dt, ref_std
type Vectors = (Vector, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>, Option<Vector>);

/// `_args.Schedule`: sampler, old_form, ref_form, sigma, sigma_next, noise_level, sigma_max, guidance_scale
type ScheduleTuple<'a> = (&'a str, &'a str, &'a str, Vector, Vector, Vector, Vector, Option<Vector>);

/// `objectives._native`: name, low (or threshold), high, adv_clip_max, mask, kl_divisor, keep_nan_kl, per_row_scale
type ObjectiveTuple<'a> = (&'a str, f64, f64, f64, &'a str, &'a str, bool, bool);

fn numbers_elements(rows: usize, has_schedule: bool) -> Result<usize, Error> {
    let too_large = Error::TooLarge { name: "numbers", rows, numel: fields(has_schedule) };
    numbers_len(rows, has_schedule).ok_or(too_large)
}

/// # Safety
/// Every array has `rows * numel` elements, unwritten and alive for `'a`.
unsafe fn latents<'a, Space>(
    arrays: LatentArrays,
    rows: usize,
    numel: usize,
    forms: Option<(Form, Form)>,
) -> Result<Latents<'a, Space>, Error> {
    let [output, uncond_output, sample, prev_sample, old, reference] = latent_names(forms);
    let len = elements(output, rows, numel)?;
    let view = |name, array: Option<Array>| {
        // SAFETY: passed on from the caller.
        array.map(|(address, dtype)| unsafe { View::new(name, address, dtype, len) }).transpose()
    };
    Ok(Latents {
        output: view(output, arrays.0)?,
        uncond_output: view(uncond_output, arrays.1)?,
        sample: view(sample, arrays.2)?,
        prev_sample: view(prev_sample, arrays.3)?,
        old: view(old, arrays.4)?,
        reference: view(reference, arrays.5)?,
    })
}

fn form(name: &'static str, came: &str) -> Result<Form, Error> {
    option(name, came, "mean, output, residual", Form::parse)
}

/// # Safety
/// As `vector`.
unsafe fn step<'a, Space>(
    (sampler, old_form, ref_form, sigma, sigma_next, noise_level, sigma_max, guidance_scale): ScheduleTuple<'_>,
    rows: usize,
) -> Result<Step<'a, Space>, Error> {
    let schedule = (sampler, sigma, sigma_next, noise_level, sigma_max, guidance_scale);
    Ok(Step {
        // SAFETY: passed on from the caller.
        schedule: unsafe { super::schedule(schedule, rows) }?,
        old_form: form("old_form", old_form)?,
        ref_form: form("ref_form", ref_form)?,
    })
}

fn objective(
    (name, low, high, adv_clip_max, mask, kl_divisor, keep_nan_kl, per_row_scale): ObjectiveTuple<'_>,
) -> Result<Objective, Error> {
    let mask = option("mask", mask, "asymmetric, symmetric, none", |mask| match mask {
        "asymmetric" => Some(Mask::Asymmetric),
        "symmetric" => Some(Mask::Symmetric),
        "none" => Some(Mask::None),
        _ => None,
    })?;
    let kl_divisor = option("kl_divisor", kl_divisor, "gaussian, constant, velocity", |divisor| match divisor {
        "gaussian" => Some(KlDivisor::Gaussian),
        "constant" => Some(KlDivisor::Constant),
        "velocity" => Some(KlDivisor::Velocity),
        _ => None,
    })?;
    let clip = Clip { low, high, adv_clip_max };
    option("objective", name, "flow_dppo, flow_grpo, grpo_guard", |name| match name {
        "flow_dppo" => Some(Objective::FlowDppo { threshold: low, kl_divisor, mask, keep_nan_kl }),
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
    schedule: Option<ScheduleTuple<'_>>,
    rows: usize,
    numel: usize,
    double: bool,
    objective_tuple: ObjectiveTuple<'_>,
    (density, latent_reduction, reduction, ref_kl_weight): Options<'_>,
) -> Result<(Latents<'a, Space>, Problem<'a, Space>), Error> {
    // SAFETY: passed on from the caller.
    let step: Option<Step<'a, Space>> = schedule.map(|schedule| unsafe { step(schedule, rows) }).transpose()?;
    let forms = step.map(|step| (step.old_form, step.ref_form));
    // SAFETY: passed on from the caller.
    let latents = unsafe { latents(arrays, rows, numel, forms) }?;
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
        has_kl: latents.old.is_some() && (std.is_some() || step.is_some()),
        has_ref: latents.reference.is_some(),
        step,
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
        numbers: output("numbers", addresses.1, numbers_elements(problem.rows, problem.step.is_some())?)?,
    })
}

/// The gradients of the output and of the unconditional one.
type Gradients = (Option<Array>, Option<Array>);

/// # Safety
/// Freshly allocated in the memory of `Space`, with `rows * numel` elements each.
unsafe fn targets<'a, Space>(arrays: Gradients, rows: usize, numel: usize) -> Result<Targets<'a, Space>, Error> {
    let len = elements("grad_output", rows, numel)?;
    let target = |name, array: Option<Array>| {
        // SAFETY: passed on from the caller.
        array.map(|(address, dtype)| unsafe { ViewMut::new(name, address, dtype, len) }).transpose()
    };
    Ok(Targets { output: target("grad_output", arrays.0)?, uncond_output: target("grad_uncond_output", arrays.1)? })
}

/// # Safety
/// As `latents`, `vector` and `targets`, for arrays in the memory of `Space`; `numbers` is what the forward left there.
#[allow(clippy::too_many_arguments)]
unsafe fn gradients<'a, Space>(
    arrays: LatentArrays,
    forms: Option<(&str, &str)>,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    double: bool,
    gradients: Gradients,
    grad_log_prob: Option<Array>,
) -> Result<(Latents<'a, Space>, Backward<'a, Space>), Error> {
    let dtype = if double { Dtype::F64 } else { Dtype::F32 };
    let forms = match forms {
        Some((old, reference)) => Some((form("old_form", old)?, form("ref_form", reference)?)),
        None => None,
    };
    let numbers_len = numbers_elements(rows, forms.is_some())?;
    let log_prob = |(address, dtype)| {
        // SAFETY: passed on from the caller.
        unsafe { ViewMut::new("grad_log_prob", address, dtype, rows) }
    };
    // SAFETY: as above.
    let (latents, grad_loss, numbers, targets) = unsafe {
        let numbers = View::new("numbers", numbers, dtype, numbers_len)?;
        let latents = latents(arrays, rows, numel, forms)?;
        (latents, vector("grad_loss", grad_loss, rows)?, numbers, targets(gradients, rows, numel)?)
    };
    let grad_log_prob = grad_log_prob.map(log_prob).transpose()?;
    Ok((latents, Backward { rows, numel, double, grad_loss, numbers, forms, targets, grad_log_prob }))
}

/// Whether a forward on the CPU does well to form the gradient too, see `plan::gradient_ahead`.
#[pyfunction]
pub fn policy_loss_gradient_ahead(rows: usize, row_bytes: usize) -> bool {
    gradient_ahead(rows, row_bytes)
}

/// Forward of `policy_loss` on CPU memory; `out` are the addresses of the loss and the numbers. `shard_sums`: address of
/// what `policy_loss_shard_sums` gave, summed over all shards.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_forward(
    py: Python<'_>,
    arrays: LatentArrays,
    vectors: Vectors,
    schedule: Option<ScheduleTuple<'_>>,
    rows: usize,
    numel: usize,
    double: bool,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: (usize, usize),
    gradients_ahead: Option<Gradients>,
    shard_sums: Option<usize>,
    threads: usize,
) -> PyResult<()> {
    let sums_len = sums_elements(rows)?;
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, mut outputs, ahead, sums) = unsafe {
        let (latents, problem) = problem(arrays, vectors, schedule, rows, numel, double, objective, options)?;
        let ahead = gradients_ahead.map(|arrays| targets(arrays, rows, numel)).transpose()?;
        let sums = shard_sums.map(|address| View::new("shard_sums", address, Dtype::F64, sums_len)).transpose()?;
        let outputs = outputs(&problem, out)?;
        (latents, problem, outputs, ahead, sums)
    };
    let work = || forward(&problem, &latents, &mut outputs, ahead.as_ref(), sums, threads);
    Ok(py.detach(|| guarded(work))?)
}

fn sums_elements(rows: usize) -> Result<usize, Error> {
    shard_sums_len(rows).ok_or(Error::TooLarge { name: "shard_sums", rows, numel: 4 })
}

/// First half of a forward whose latents are sharded: `[4 rows + 1]` float64 at `out`, to be summed over the shards.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_shard_sums(
    py: Python<'_>,
    arrays: LatentArrays,
    vectors: Vectors,
    schedule: Option<ScheduleTuple<'_>>,
    rows: usize,
    numel: usize,
    double: bool,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    let sums_len = sums_elements(rows)?;
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, mut out) = unsafe {
        let (latents, problem) = problem(arrays, vectors, schedule, rows, numel, double, objective, options)?;
        (latents, problem, ViewMut::new("shard_sums", out, Dtype::F64, sums_len)?)
    };
    Ok(py.detach(|| guarded(|| shard_sums(&problem, &latents, &mut out, threads)))?)
}

/// Backward of `policy_loss` on CPU memory, from the forward's numbers. `forms`: old and reference, with a schedule.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_backward(
    py: Python<'_>,
    arrays: LatentArrays,
    forms: Option<(&str, &str)>,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    double: bool,
    gradients: Gradients,
    grad_log_prob: Option<Array>,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, call) =
        unsafe { self::gradients(arrays, forms, grad_loss, numbers, rows, numel, double, gradients, grad_log_prob) }?;
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
    schedule: Option<ScheduleTuple<'_>>,
    rows: usize,
    numel: usize,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: (usize, usize),
    shard_sums: Option<usize>,
    partials: Memory,
    tickets: Memory,
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    let sums_len = sums_elements(rows)?;
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, outputs, sums, workspace) = unsafe {
        let (latents, problem) = problem(arrays, vectors, schedule, rows, numel, false, objective, options)?;
        let outputs = outputs(&problem, out)?;
        let sums = shard_sums.map(|address| View::new("shard_sums", address, Dtype::F64, sums_len)).transpose()?;
        (latents, problem, outputs, sums, workspace(partials, tickets)?)
    };
    let work = || forward_on_gpu(target, &problem, &latents, &outputs, sums, &workspace);
    Ok(py.detach(|| guarded(work))?)
}

/// Address and elements.
type Memory = (usize, usize);

/// # Safety
/// Memory of the GPU of at least these lengths, that no other launch uses meanwhile.
unsafe fn workspace<'a>(partials: Memory, tickets: Memory) -> Result<Workspace<'a>, Error> {
    // SAFETY: passed on from the caller.
    unsafe {
        Ok(Workspace {
            partials: ViewMut::new("partials", partials.0, Dtype::F32, partials.1)?,
            tickets: ViewMut::new("tickets", tickets.0, Dtype::F32, tickets.1)?,
        })
    }
}

/// As `policy_loss_shard_sums`, on a GPU.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_shard_sums_cuda(
    py: Python<'_>,
    target: (usize, usize),
    arrays: LatentArrays,
    vectors: Vectors,
    schedule: Option<ScheduleTuple<'_>>,
    rows: usize,
    numel: usize,
    objective: ObjectiveTuple<'_>,
    options: Options<'_>,
    out: usize,
    partials: Memory,
    tickets: Memory,
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    let sums_len = sums_elements(rows)?;
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, problem, out, workspace) = unsafe {
        let (latents, problem) = problem(arrays, vectors, schedule, rows, numel, false, objective, options)?;
        let out = ViewMut::new("shard_sums", out, Dtype::F64, sums_len)?;
        (latents, problem, out, workspace(partials, tickets)?)
    };
    Ok(py.detach(|| guarded(|| shard_sums_on_gpu(target, &problem, &latents, &out, &workspace)))?)
}

/// As `policy_loss_backward`, on a GPU.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn policy_loss_backward_cuda(
    py: Python<'_>,
    target: (usize, usize),
    arrays: LatentArrays,
    forms: Option<(&str, &str)>,
    grad_loss: Vector,
    numbers: usize,
    rows: usize,
    numel: usize,
    gradients: Gradients,
    grad_log_prob: Option<Array>,
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (latents, call) =
        unsafe { self::gradients(arrays, forms, grad_loss, numbers, rows, numel, false, gradients, grad_log_prob) }?;
    Ok(py.detach(|| guarded(|| backward_on_gpu(target, &call, &latents)))?)
}
