//! `sde_step` on a GPU: picks the kernel of `kernels/sde_step.cu` and its grid. One launch each way.

use super::device::PerDevice;
use super::launch::{Direction, Target, Unit, Variant};
use crate::call::Dtype::{Bf16, F16, F32};
use crate::call::{SdeStep, SdeStepBackward, SdeStepForward};
use crate::error::Error;
use crate::plan::GridPlan;

pub static UNIT: Unit = Unit {
    name: "sde_step",
    variants: &[
        Variant::step("f32", F32, F32, F32),
        Variant::step("bf16_f32", Bf16, F32, F32),
        Variant::step("bf16", Bf16, Bf16, Bf16),
        Variant::step("f16", F16, F16, F16),
        Variant { suffix: "mixed", is_step: true, dtypes: None },
    ],
    bytes: [size_of::<SdeStepForward>(), size_of::<SdeStepBackward>()],
    loaded: PerDevice::new(),
};

/// The grid of a forward on a device, and lengths of its `partials` and `tickets`.
pub fn plan(ordinal: usize, call: &SdeStep) -> Result<(GridPlan, usize, usize), Error> {
    let rows = call.rows as usize;
    let plan = GridPlan::new(rows, call.numel as usize, UNIT.multiprocessors(ordinal)?)?;
    let splits = plan.splits as usize;
    Ok(if splits > 1 { (plan, rows * splits, rows) } else { (plan, 0, 0) })
}

/// # Safety
/// As `Unit::launch`: `call` is checked, its addresses are memory of `target.device`, and its `partials` and `tickets`
/// have the lengths that the function `plan` returned with this `plan`.
pub unsafe fn forward(target: Target, plan: GridPlan, call: &SdeStepForward) -> Result<(), Error> {
    let latents = &call.call.latents;
    let groups: [&[_]; 3] = [&[latents.model_output, latents.uncond_output], &[latents.sample], &[]];
    // SAFETY: the caller promises the memory and the plan; kernels of `UNIT` take this struct in this direction.
    unsafe { UNIT.launch(target, Direction::Forward, (true, groups), plan, call) }
}

/// # Safety
/// As `Unit::launch`: `call` is checked, and its addresses are memory of `target.device`.
pub unsafe fn backward(target: Target, call: &mut SdeStepBackward) -> Result<(), Error> {
    let plan = GridPlan::new(call.rows as usize, call.numel as usize, UNIT.multiprocessors(target.device)?)?;
    call.splits = plan.splits;
    let groups: [&[_]; 3] = [&[call.grad_model_output, call.grad_uncond_output], &[call.prev_sample], &[]];
    // SAFETY: the caller promises the memory; the plan is of this call; kernels of `UNIT` take this struct here.
    unsafe { UNIT.launch(target, Direction::Backward, (true, groups), plan, call) }
}
