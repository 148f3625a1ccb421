//! `policy_loss` on a GPU: picks the kernel of `kernels/policy_loss.cu` and its grid. A forward is one launch: blocks
//! share rows, a row's last block runs the objective, the last of those the batch. Sharded latents take two, for the
//! rows' sums and for the objective. A backward is one launch.

use super::device::PerDevice;
use super::launch::{Direction, Target, Unit, Variant};
use crate::call::Dtype::{Bf16, F16, F32};
use crate::call::{PolicyLoss, PolicyLossBackward, PolicyLossForward, Stage};
use crate::error::Error;
use crate::plan::GridPlan;

pub static UNIT: Unit = Unit {
    name: "policy_loss",
    variants: &[
        Variant::means("f32", F32, F32),
        Variant::means("bf16", Bf16, Bf16),
        Variant::means("f16", F16, F16),
        Variant::means("f32_bf16", F32, Bf16),
        Variant::means("f32_f16", F32, F16),
        Variant::step("step_f32", F32, F32, F32),
        Variant::step("step_bf16", Bf16, Bf16, Bf16),
        Variant::step("step_f16", F16, F16, F16),
        Variant::step("step_bf16_f32", Bf16, F32, F32),
        Variant::step("step_bf16_f32_bf16", Bf16, F32, Bf16),
        Variant::step("step_bf16_f32_f16", Bf16, F32, F16),
        Variant { suffix: "mixed", is_step: false, dtypes: None },
        Variant { suffix: "step_mixed", is_step: true, dtypes: None },
    ],
    bytes: [size_of::<PolicyLossForward>(), size_of::<PolicyLossBackward>()],
    loaded: PerDevice::new(),
};

/// The grid of a forward on a device, and lengths of its `partials` and `tickets`.
pub fn plan(ordinal: usize, call: &PolicyLoss, stage: Stage) -> Result<(GridPlan, usize, usize), Error> {
    let rows = call.rows as usize;
    let numel = if stage == Stage::ObjectiveAlone { 0 } else { call.numel as usize };
    let plan = GridPlan::new(rows, numel, UNIT.multiprocessors(ordinal)?)?;
    let needs_batch_means = stage != Stage::SumsAlone && call.needs_batch_means();
    Ok((plan, plan.partials(rows, needs_batch_means), rows + 1))
}

/// # Safety
/// As `Unit::launch`: `call` is checked, its addresses are memory of `target.device`, and its `partials` and `tickets`
/// have the lengths that the function `plan` returned with this `plan`.
pub unsafe fn forward(target: Target, plan: GridPlan, call: &PolicyLossForward) -> Result<(), Error> {
    let (outputs, samples, policies) = call.call.latents.groups();
    let kernel = (call.call.has_schedule(), [&outputs[..], &samples, &policies]);
    // SAFETY: the caller promises the memory and the plan; kernels of `UNIT` take this struct in this direction.
    unsafe { UNIT.launch(target, Direction::Forward, kernel, plan, call) }
}

/// # Safety
/// As `Unit::launch`: `call` is checked, and its addresses are memory of `target.device`.
pub unsafe fn backward(target: Target, call: &mut PolicyLossBackward) -> Result<(), Error> {
    let (rows, numel) = (call.rows as usize, call.numel as usize);
    let plan = match (call.grad_output, call.grad_uncond_output) {
        (0, 0) => GridPlan::of_rows(rows)?,
        _ => GridPlan::new(rows, numel, UNIT.multiprocessors(target.device)?)?,
    };
    call.splits = plan.splits;
    let (outputs, samples, policies) = call.latents.groups();
    let kernel = (call.latents.has_model_output(), [&outputs[..], &samples, &policies]);
    // SAFETY: the caller promises the memory; the plan is of this call; kernels of `UNIT` take this struct here.
    unsafe { UNIT.launch(target, Direction::Backward, kernel, plan, call) }
}
