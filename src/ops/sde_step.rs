//! `sde_step`: one stochastic denoising step, drawn or scored.

use super::{Place, refuse_float64, require};
use crate::call::{Latent, Sampler, Schedule, SdeStep, SdeStepBackward, SdeStepForward};
use crate::cpu::memory::Host;
use crate::cpu::sde_step as cpu;
use crate::cuda::launch::Target;
use crate::cuda::sde_step as gpu;
use crate::error::Error;
use crate::plan::GridPlan;

/// The grid of a forward on a GPU, and the lengths of its `partials` and `tickets`.
pub fn workspace(target: Target, call: &SdeStep) -> Result<(GridPlan, usize, usize), Error> {
    refuse_float64(call.latents.named())?;
    gpu::plan(target.device, call)
}

/// Computes next latent, mean, residual, log-prob and std. On a GPU, where `plan` is that of `workspace`, it returns
/// once the work is on the stream.
///
/// # Safety
/// Every address in `call` that is not 0 is memory in `place`, aligned, of the length that the field's comment says,
/// alive until the work is done. Nobody writes to inputs meanwhile, nobody else touches outputs.
pub unsafe fn forward(place: Place, plan: Option<GridPlan>, call: &SdeStepForward) -> Result<(), Error> {
    check(call)?;
    match place {
        Place::Gpu(target) => {
            refuse_float64([("residual", &call.residual)].into_iter())?;
            let plan = plan.ok_or(Error::Missing { name: "a plan" })?;
            // SAFETY: the caller promises memory of the stream's device that stays until the kernel has run.
            // `workspace` made the plan from this call, and the lengths of `partials` and `tickets` from the plan.
            unsafe { gpu::forward(target, plan, call) }
        }
        Place::Host { threads } => {
            // SAFETY: the caller promises memory of this process, of the call's lengths, which nobody else writes.
            cpu::forward(unsafe { Host::new(call) }, threads);
            Ok(())
        }
    }
}

/// Computes the gradients of the model outputs. On a GPU it returns once the work is on the stream.
///
/// # Safety
/// As `forward`; `prev_sample`, `prev_sample_mean` and `numbers` are what the forward left.
pub unsafe fn backward(place: Place, call: &mut SdeStepBackward) -> Result<(), Error> {
    let there = call.prev_sample.is_present() && call.prev_sample_mean != 0 && call.numbers != 0;
    require(there && call.rows > 0 && call.numel > 0, "prev_sample, prev_sample_mean and numbers")?;
    match place {
        Place::Gpu(target) => {
            let latents: [(_, &Latent); 3] = [
                ("prev_sample", &call.prev_sample),
                ("grad_model_output", &call.grad_model_output),
                ("grad_uncond_output", &call.grad_uncond_output),
            ];
            refuse_float64(latents.into_iter())?;
            // SAFETY: the caller promises memory of the stream's device that stays until the kernel has run.
            unsafe { gpu::backward(target, call) }
        }
        Place::Host { threads } => {
            // SAFETY: the caller promises memory of this process, of the call's lengths, which nobody else writes.
            cpu::backward(unsafe { Host::new(call) }, threads);
            Ok(())
        }
    }
}

fn check(forward: &SdeStepForward) -> Result<(), Error> {
    let SdeStep { latents, schedule, sampler, rows, numel, .. } = &forward.call;
    require(*rows > 0 && *numel > 0 && latents.model_output.is_present(), "model_output")?;
    require(latents.sample.is_present(), "sample")?;
    let (has_next, has_noise) = (latents.prev_sample.is_present(), latents.noise.is_present());
    require(has_next != has_noise, "one of prev_sample and noise")?;
    require(*sampler != Sampler::None, "sampler")?;
    check_schedule(schedule, latents.uncond_output.is_present())?;
    let outputs = [forward.prev_sample_mean, forward.log_prob, forward.std, forward.numbers];
    require(outputs.iter().all(|&address| address != 0), "memory for the outputs")?;
    let as_stored = has_next && latents.prev_sample.dtype == latents.sample.dtype;
    require(as_stored || forward.stored != 0, "memory for prev_sample")
}

/// Refuses a schedule that lacks a field, or `guidance_scale` without `uncond_output` and the reverse.
pub(super) fn check_schedule(schedule: &Schedule, has_uncond: bool) -> Result<(), Error> {
    for (name, vector) in schedule.named() {
        require(name == "guidance_scale" || vector.is_present(), name)?;
    }
    require(schedule.guidance_scale.is_present() == has_uncond, "uncond_output with guidance_scale, or neither")
}
