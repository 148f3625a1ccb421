//! `sde_step` on a GPU: the arguments of `kernels/sde_step.cu`, which kernel takes them, and its grid.
//!
//! One launch each way. Rows that several blocks share need a workspace between the blocks, which is the caller's.

use super::arguments::{
    LatentArgument, ScheduleArgument, dtype_number, latent_argument, long_enough, schedule_argument,
};
use super::device::{Device, PerDevice};
use super::launch::{Grid, Kernel, Target, launch};
use crate::error::Error;
use crate::ops::sde_step::{Backward, Next, Outputs, Step};
use crate::plan::GridPlan;
use crate::tensor::{Dtype, Gpu, View, ViewMut};

// ---- twins of the structures in kernels/sde_step.cuh, field for field ----------------------------------------------

/// `struct SdeStepForward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ForwardArguments {
    output: LatentArgument,
    uncond: LatentArgument,
    sample: LatentArgument,
    next: LatentArgument,
    schedule: ScheduleArgument,
    stored: usize,
    mean: usize,
    residual: usize,
    log_prob: usize,
    std: usize,
    numbers: usize,
    partials: usize,
    tickets: usize,
    rows: i64,
    numel: i64,
    draws: i32,
    normalizer: i32,
    residual_dtype: i32,
    splits: i32,
}

/// `struct SdeStepBackward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BackwardArguments {
    next: LatentArgument,
    mean: usize,
    numbers: usize,
    grad_log_prob: usize,
    grad_mean: usize,
    grad_output: usize,
    grad_uncond: usize,
    rows: i64,
    numel: i64,
    output_dtype: i32,
    uncond_dtype: i32,
    splits: i32,
    pad: i32,
}

/// The same numbers stand in static assertions of the header: neither side can drift alone.
const FORWARD_BYTES: usize = 328;
const BACKWARD_BYTES: usize = 96;
const _: () = assert!(size_of::<ForwardArguments>() == FORWARD_BYTES);
const _: () = assert!(size_of::<BackwardArguments>() == BACKWARD_BYTES);

// ---- kernels -------------------------------------------------------------------------------------------------------

/// A kernel that knows its dtypes, or takes every mix.
struct Variant {
    suffix: &'static str,
    /// Of the model outputs and the sample.
    dtypes: Option<(Dtype, Dtype)>,
}

const VARIANTS: [Variant; 5] = [
    Variant { suffix: "f32", dtypes: Some((Dtype::F32, Dtype::F32)) },
    Variant { suffix: "bf16_f32", dtypes: Some((Dtype::Bf16, Dtype::F32)) },
    Variant { suffix: "bf16", dtypes: Some((Dtype::Bf16, Dtype::Bf16)) },
    Variant { suffix: "f16", dtypes: Some((Dtype::F16, Dtype::F16)) },
    Variant { suffix: "mixed", dtypes: None },
];
const UNIT: &str = "sde_step";

/// Names of all entry points, forward and then backward, with the bytes of their only argument.
pub fn entry_points() -> [(String, usize); 2 * VARIANTS.len()] {
    std::array::from_fn(|at| {
        let forward = at < VARIANTS.len();
        let (direction, bytes) = if forward { ("forward", FORWARD_BYTES) } else { ("backward", BACKWARD_BYTES) };
        (format!("{UNIT}_{direction}_{}", VARIANTS[at % VARIANTS.len()].suffix), bytes)
    })
}

struct Kernels {
    device: &'static Device,
    forward: [Kernel<ForwardArguments>; VARIANTS.len()],
    backward: [Kernel<BackwardArguments>; VARIANTS.len()],
}

fn kernels(ordinal: usize) -> Result<&'static Kernels, Error> {
    static KERNELS: PerDevice<Kernels> = PerDevice::new();
    KERNELS.get_or_make(ordinal, || {
        let device = Device::get(ordinal)?;
        let names = entry_points();
        let found = device.load(UNIT, names.each_ref().map(|(name, _)| name.as_str()))?;
        // SAFETY: modules stay loaded; the names pick the kernels by their only argument, whose layout the assertions
        // above and in the header pin.
        let forward = std::array::from_fn(|at| unsafe { Kernel::new(found[at]) });
        // SAFETY: as above.
        let backward = std::array::from_fn(|at| unsafe { Kernel::new(found[VARIANTS.len() + at]) });
        Ok(Kernels { device, forward, backward })
    })
}

/// The variant for model outputs of `outputs`, whichever of the two are there, and a sample.
fn variant(outputs: [Option<Dtype>; 2], sample: Dtype) -> usize {
    let fits = |variant: &Variant| {
        variant.dtypes.is_none_or(|(of_outputs, of_sample)| {
            outputs.into_iter().flatten().all(|dtype| dtype == of_outputs) && sample == of_sample
        })
    };
    VARIANTS.iter().position(fits).expect("the last variant fits everything")
}

// ---- calls ---------------------------------------------------------------------------------------------------------

/// Device memory that the blocks of one forward share.
pub struct Workspace<'a> {
    /// `[rows, splits]` float32, where splits > 1.
    pub partials: ViewMut<'a, Gpu>,
    /// `[rows]` 32-bit counters of finished parts, where splits > 1: 0 before a launch and again after it.
    pub tickets: ViewMut<'a, Gpu>,
}

fn partials_of(plan: GridPlan, rows: usize) -> usize {
    if plan.splits > 1 { rows * plan.splits as usize } else { 0 }
}

/// Length of the partial sums of a forward on this device.
pub fn partials(ordinal: usize, rows: usize, numel: usize) -> Result<usize, Error> {
    Ok(partials_of(GridPlan::new(rows, numel, kernels(ordinal)?.device.multiprocessors)?, rows))
}

/// Launches the forward; `step` and `outputs` are checked.
pub fn forward(
    target: Target,
    step: &Step<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    let Kernels { device, forward, .. } = kernels(target.device)?;
    let plan = GridPlan::new(step.rows, step.numel, device.multiprocessors)?;
    // Made elsewhere, hence measured: a kernel that ran past their end would not be noticed.
    let partials = partials_of(plan, step.rows);
    long_enough("partials", &workspace.partials, partials)?;
    long_enough("tickets", &workspace.tickets, if partials > 0 { step.rows } else { 0 })?;
    let arguments = ForwardArguments {
        output: latent_argument(Some(step.model_output)),
        uncond: latent_argument(step.uncond_output),
        sample: latent_argument(Some(step.sample)),
        next: latent_argument(Some(step.next.view())),
        schedule: schedule_argument(Some(&step.schedule)),
        stored: address(&outputs.next),
        mean: outputs.mean.address(),
        residual: address(&outputs.residual),
        log_prob: outputs.log_prob.address(),
        std: outputs.std.address(),
        numbers: outputs.numbers.address(),
        partials: workspace.partials.address(),
        tickets: workspace.tickets.address(),
        rows: step.rows as i64,
        numel: step.numel as i64,
        draws: i32::from(matches!(step.next, Next::Noise(_))),
        normalizer: i32::from(step.normalizer),
        residual_dtype: outputs.residual.as_ref().map_or(0, |view| dtype_number(view.dtype())),
        splits: plan.splits.cast_signed(),
    };
    let outputs = [Some(step.model_output.dtype()), step.uncond_output.map(|view| view.dtype())];
    let kernel = &forward[variant(outputs, step.sample.dtype())];
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    // SAFETY: addresses and lengths are those of views, whose contract the caller of `new` upheld; the grid and the
    // splits are of one plan; the stream is `Target`'s.
    unsafe { launch(kernel, device, target.stream, grid, &arguments) }
}

/// Launches the backward.
pub fn backward(target: Target, call: &Backward<'_, Gpu>) -> Result<(), Error> {
    let Kernels { device, backward, .. } = kernels(target.device)?;
    let plan = GridPlan::new(call.rows, call.numel, device.multiprocessors)?;
    let dtypes = [&call.grad_output, &call.grad_uncond].map(|view| view.as_ref().map(ViewMut::dtype));
    let saved = |view: Option<View<'_, Gpu>>| view.map_or(0, |view| view.address());
    let arguments = BackwardArguments {
        next: latent_argument(Some(call.next)),
        mean: call.mean.address(),
        numbers: call.numbers.address(),
        grad_log_prob: saved(call.grad_log_prob),
        grad_mean: saved(call.grad_mean),
        grad_output: address(&call.grad_output),
        grad_uncond: address(&call.grad_uncond),
        rows: call.rows as i64,
        numel: call.numel as i64,
        output_dtype: dtypes[0].map_or(0, dtype_number),
        uncond_dtype: dtypes[1].map_or(0, dtype_number),
        splits: plan.splits.cast_signed(),
        pad: 0,
    };
    let kernel = &backward[variant(dtypes, call.next.dtype())];
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    // SAFETY: as in `forward`.
    unsafe { launch(kernel, device, target.stream, grid, &arguments) }
}

fn address(view: &Option<ViewMut<'_, Gpu>>) -> usize {
    view.as_ref().map_or(0, ViewMut::address)
}
