//! The boundary of `sde_step`.

use pyo3::prelude::*;

use super::{Array, ScheduleTuple, elements, guarded, schedule};
use crate::cuda;
use crate::cuda::launch::Target;
use crate::cuda::sde_step::Workspace;
use crate::error::Error;
use crate::ops::sde_step::{
    Backward, NUMBERS, Next, Outputs, Step, backward, backward_on_gpu, forward, forward_on_gpu,
};
use crate::tensor::{Dtype, View, ViewMut};

/// model_output, uncond_output, sample, prev_sample, noise: one of the last two
type LatentArrays = (Array, Option<Array>, Array, Option<Array>, Option<Array>);

/// prev_sample, prev_sample_mean, residual, and the addresses of log_prob, std, numbers
type OutputArrays = (Option<Array>, usize, Option<Array>, usize, usize, usize);

/// grad_log_prob, grad_mean, prev_sample, prev_sample_mean, numbers
type SavedArrays = (Option<usize>, Option<usize>, Array, usize, usize);

fn arithmetic(double: bool) -> Dtype {
    if double { Dtype::F64 } else { Dtype::F32 }
}

/// # Safety
/// Latents have `rows * numel` elements in the memory of `Space`, unwritten and alive for `'a`; row vectors as `vector`.
unsafe fn step<'a, Space: Copy>(
    arrays: LatentArrays,
    schedule_tuple: ScheduleTuple<'_>,
    rows: usize,
    numel: usize,
    double: bool,
    normalizer: bool,
) -> Result<Step<'a, Space>, Error> {
    let len = elements("model_output", rows, numel)?;
    // SAFETY: passed on from the caller.
    let view = |name, (address, dtype): Array| unsafe { View::new(name, address, dtype, len) };
    let next = match (arrays.3, arrays.4) {
        (Some(given), None) => Next::Given(view("prev_sample", given)?),
        (None, Some(noise)) => Next::Noise(view("noise", noise)?),
        _ => return Err(Error::Missing { name: "one of prev_sample and noise" }),
    };
    Ok(Step {
        rows,
        numel,
        double,
        // SAFETY: as above.
        schedule: unsafe { schedule(schedule_tuple, rows) }?,
        normalizer,
        model_output: view("model_output", arrays.0)?,
        uncond_output: arrays.1.map(|array| view("uncond_output", array)).transpose()?,
        sample: view("sample", arrays.2)?,
        next,
    })
}

/// # Safety
/// All are freshly allocated in the memory of `Space`, so that nobody else refers to them, and as long as `step` asks.
unsafe fn outputs<'a, Space>(step: &Step<'_, Space>, arrays: OutputArrays) -> Result<Outputs<'a, Space>, Error> {
    let (rows, dtype) = (step.rows, arithmetic(step.double));
    let len = elements("prev_sample_mean", rows, step.numel)?;
    // SAFETY: passed on from the caller.
    let output = |name, address, dtype, len| unsafe { ViewMut::new(name, address, dtype, len) };
    let latent =
        |name, array: Option<Array>| array.map(|(address, dtype)| output(name, address, dtype, len)).transpose();
    Ok(Outputs {
        next: latent("prev_sample", arrays.0)?,
        mean: output("prev_sample_mean", arrays.1, dtype, len)?,
        residual: latent("residual", arrays.2)?,
        log_prob: output("log_prob", arrays.3, dtype, rows)?,
        std: output("std", arrays.4, dtype, rows)?,
        numbers: output("numbers", arrays.5, dtype, elements("numbers", rows, NUMBERS)?)?,
    })
}

/// # Safety
/// What was saved lies in the memory of `Space`, with the shapes that `Backward` says, unwritten and alive for `'a`; the
/// gradients are freshly allocated.
unsafe fn gradients<'a, Space>(
    (grad_log_prob, grad_mean, next, mean, numbers): SavedArrays,
    rows: usize,
    numel: usize,
    double: bool,
    grad_output: Option<Array>,
    grad_uncond: Option<Array>,
) -> Result<Backward<'a, Space>, Error> {
    let (dtype, len) = (arithmetic(double), elements("prev_sample_mean", rows, numel)?);
    // SAFETY: passed on from the caller.
    let view = |name, address, dtype, len| unsafe { View::new(name, address, dtype, len) };
    let output = |name, array: Option<Array>| {
        // SAFETY: as above.
        array.map(|(address, dtype)| unsafe { ViewMut::new(name, address, dtype, len) }).transpose()
    };
    Ok(Backward {
        rows,
        numel,
        double,
        grad_log_prob: grad_log_prob.map(|address| view("grad_log_prob", address, dtype, rows)).transpose()?,
        grad_mean: grad_mean.map(|address| view("grad_mean", address, dtype, len)).transpose()?,
        next: view("prev_sample", next.0, next.1, len)?,
        mean: view("prev_sample_mean", mean, dtype, len)?,
        numbers: view("numbers", numbers, dtype, elements("numbers", rows, NUMBERS)?)?,
        grad_output: output("grad_output", grad_output)?,
        grad_uncond: output("grad_uncond", grad_uncond)?,
    })
}

/// Forward of `sde_step` on CPU memory.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn sde_step_forward(
    py: Python<'_>,
    arrays: LatentArrays,
    schedule: ScheduleTuple<'_>,
    rows: usize,
    numel: usize,
    double: bool,
    normalizer: bool,
    out: OutputArrays,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (step, outputs) = unsafe {
        let step = step(arrays, schedule, rows, numel, double, normalizer)?;
        let outputs = outputs(&step, out)?;
        (step, outputs)
    };
    Ok(py.detach(|| guarded(|| forward(&step, &outputs, threads)))?)
}

/// Backward of `sde_step` on CPU memory, from what the forward left.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn sde_step_backward(
    py: Python<'_>,
    saved: SavedArrays,
    rows: usize,
    numel: usize,
    double: bool,
    grad_output: Option<Array>,
    grad_uncond: Option<Array>,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let call = unsafe { gradients(saved, rows, numel, double, grad_output, grad_uncond) }?;
    Ok(py.detach(|| guarded(|| backward(&call, threads)))?)
}

// ---- the same on a GPU: addresses of its memory; `target` is PyTorch's device number and the current stream there ----

/// What a forward needs beside its outputs: the length of the float32 partial sums, and whether the stream is being
/// captured into a CUDA graph. Loads the kernels when a device is first used.
#[pyfunction]
pub fn sde_step_workspace_cuda(
    py: Python<'_>,
    target: (usize, usize),
    rows: usize,
    numel: usize,
) -> PyResult<(usize, bool)> {
    let target = Target { device: target.0, stream: target.1 };
    let find = || Ok((cuda::sde_step::partials(target.device, rows, numel)?, target.is_capturing()?));
    Ok(py.detach(|| guarded(find))?)
}

/// As `sde_step_forward`, on a GPU. `partials` and `tickets`: address and elements; the tickets are 0.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn sde_step_forward_cuda(
    py: Python<'_>,
    target: (usize, usize),
    arrays: LatentArrays,
    schedule: ScheduleTuple<'_>,
    rows: usize,
    numel: usize,
    normalizer: bool,
    out: OutputArrays,
    partials: (usize, usize),
    tickets: (usize, usize),
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let (step, outputs, workspace) = unsafe {
        let step = step(arrays, schedule, rows, numel, false, normalizer)?;
        let outputs = outputs(&step, out)?;
        let workspace = Workspace {
            partials: ViewMut::new("partials", partials.0, Dtype::F32, partials.1)?,
            tickets: ViewMut::new("tickets", tickets.0, Dtype::F32, tickets.1)?,
        };
        (step, outputs, workspace)
    };
    Ok(py.detach(|| guarded(|| forward_on_gpu(target, &step, &outputs, &workspace)))?)
}

/// As `sde_step_backward`, on a GPU.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn sde_step_backward_cuda(
    py: Python<'_>,
    target: (usize, usize),
    saved: SavedArrays,
    rows: usize,
    numel: usize,
    grad_output: Option<Array>,
    grad_uncond: Option<Array>,
) -> PyResult<()> {
    let target = Target { device: target.0, stream: target.1 };
    // SAFETY: the contract of the boundary, see `mod.rs`.
    let call = unsafe { gradients(saved, rows, numel, false, grad_output, grad_uncond) }?;
    Ok(py.detach(|| guarded(|| backward_on_gpu(target, &call)))?)
}
