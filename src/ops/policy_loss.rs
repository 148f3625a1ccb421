//! `policy_loss`: the operator behind `loss` and `step_loss`.

use super::{Place, refuse_float64, require};
use crate::call::{Dtype, Latent, ObjectiveKind, PolicyLoss, PolicyLossBackward, PolicyLossForward, Stage};
use crate::cpu::memory::Host;
use crate::cpu::policy_loss as cpu;
pub use crate::cpu::policy_loss::Gradients;
use crate::cuda::launch::Target;
use crate::cuda::policy_loss as gpu;
use crate::error::Error;
use crate::plan::GridPlan;

/// The grid of a forward on a GPU, and the lengths of its `partials` and `tickets`.
pub fn workspace(target: Target, call: &PolicyLoss, stage: Stage) -> Result<(GridPlan, usize, usize), Error> {
    check(call)?;
    refuse_float64(call.latents.named())?;
    for (name, vector) in call.vectors.named() {
        if ["log_prob", "old_log_prob"].contains(&name) && vector.dtype == Dtype::F64 {
            return Err(Error::Float64OnGpu { name });
        }
    }
    gpu::plan(target.device, call, stage)
}

/// Computes loss and numbers; with `Stage::SumsAlone` the rows' sums. On the host it also writes the gradients for a
/// `grad_loss` of 1 to `unit_gradients`. On a GPU, where `plan` is that of `workspace`, it returns once the work is on
/// the stream.
///
/// # Safety
/// Every address in `call` and `unit_gradients` that is not 0 is memory in `place`, aligned, of the length that the
/// field's comment says, alive until the work is done. Nobody writes to inputs meanwhile, nobody else touches outputs.
pub unsafe fn forward(
    place: Place, plan: Option<GridPlan>, call: &PolicyLossForward, unit_gradients: Option<&Gradients>,
) -> Result<(), Error> {
    check(&call.call)?;
    let sums_alone = call.stage == Stage::SumsAlone;
    require(sums_alone || (call.loss != 0 && call.numbers != 0), "memory for loss and numbers")?;
    require(call.stage == Stage::Whole || call.row_sums != 0, "memory for shard_sums")?;
    match place {
        Place::Gpu(target) => {
            let plan = plan.ok_or(Error::Missing { name: "a plan" })?;
            require(unit_gradients.is_none(), "a CPU, for gradients in the forward")?;
            // SAFETY: the caller promises memory of the stream's device that stays until the kernel has run.
            // `workspace` made the plan from this call, and the lengths of `partials` and `tickets` from the plan.
            unsafe { gpu::forward(target, plan, call) }
        }
        Place::Host { threads } => {
            if unit_gradients.is_some() {
                let divides = call.call.divisor().is_some() && call.stage == Stage::Whole;
                require(divides, "a divisor for gradients in the forward")?;
                require(call.call.latents.output().1.is_present(), call.call.latents.output().0)?;
            }
            // SAFETY: the caller promises memory of this process, of the call's lengths, which nobody else writes.
            let (call, unit_gradients) =
                unsafe { (Host::new(call), unit_gradients.map(|gradients| Host::new(gradients))) };
            cpu::forward(call, unit_gradients, threads);
            Ok(())
        }
    }
}

/// Computes the gradients. On a GPU it returns once the work is on the stream.
///
/// # Safety
/// As `forward`; `numbers` is what the forward left, of the length that `rows` and the latents say.
pub unsafe fn backward(place: Place, call: &mut PolicyLossBackward) -> Result<(), Error> {
    let latents = &call.latents;
    let (output_name, output) = latents.output();
    require(call.numbers != 0, "numbers")?;
    require(call.grad_output == 0 || output.is_present(), output_name)?;
    let has_uncond = latents.uncond_output.is_present() && latents.has_model_output();
    require(call.grad_uncond_output == 0 || has_uncond, "uncond_output")?;
    let wanted = call.grad_output != 0 || call.grad_uncond_output != 0;
    require(!wanted || !latents.has_model_output() || latents.sample.is_present(), "sample")?;
    match place {
        Place::Gpu(target) => {
            refuse_float64(latents.named())?;
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

/// Multiplies a gradient that the forward computed. False if it must be computed again: see `cpu::scale_in_place`.
///
/// # Safety
/// `gradient` has `len` elements in the memory of this process, which nobody else touches.
pub unsafe fn scale_in_place(gradient: &Latent, len: usize, factor: f64, threads: usize) -> bool {
    // SAFETY: the caller promises the elements, which nobody else touches.
    cpu::scale_in_place(unsafe { Host::new(gradient) }, len, factor, threads)
}

/// Refuses a call that lacks an argument of its formulas, or has one that does not belong there.
fn check(call: &PolicyLoss) -> Result<(), Error> {
    let PolicyLoss { latents, vectors, objective, .. } = call;
    let (output_name, output) = latents.output();
    let has_output = output.is_present();
    require(call.rows > 0 && vectors.advantages.is_present(), "advantages")?;
    let has_latents = latents.each().into_iter().any(|latent| latent.is_present());
    require(!has_latents || (has_output && call.numel > 0), output_name)?;
    let replays = latents.prev_sample.is_present();
    require(replays || vectors.log_prob.is_present(), "prev_sample or log_prob")?;
    let needs_kl = objective.kind != ObjectiveKind::FlowGrpo;
    let needs_old = needs_kl || !vectors.old_log_prob.is_present();
    require(!needs_old || latents.has_old(), "old_prev_sample_mean, old_model_output or old_residual")?;
    let only_one = |names: &[bool]| names.iter().filter(|&&present| present).count() <= 1;
    let olds = [latents.old_prev_sample_mean, latents.old_model_output, latents.old_residual];
    require(only_one(&olds.map(|latent| latent.is_present())), "a single form of the old policy")?;
    let refs = [latents.ref_prev_sample_mean, latents.ref_model_output];
    require(only_one(&refs.map(|latent| latent.is_present())), "a single form of the reference policy")?;
    require(call.has_schedule() == latents.has_model_output(), "model_output with a sampler, or neither")?;
    if call.has_schedule() {
        require(!latents.prev_sample_mean.is_present(), "one of model_output and prev_sample_mean")?;
        require(latents.sample.is_present() && replays, "sample and prev_sample")?;
        return super::sde_step::check_schedule(&call.schedule, latents.uncond_output.is_present());
    }
    let of_means = [latents.uncond_output, latents.sample, latents.old_model_output, latents.old_residual];
    let stray = of_means.iter().chain([&latents.ref_model_output]).any(|latent| latent.is_present());
    require(!stray, "model_output, which the other latents belong to")?;
    let has_std = vectors.std.is_present();
    require(!latents.has_ref() || has_std || vectors.ref_std.is_present(), "ref_std")?;
    require(!(needs_kl || replays) || has_std, "std")?;
    require(objective.kind != ObjectiveKind::GrpoGuard || vectors.sqrt_dt.is_present(), "sqrt_dt")
}
