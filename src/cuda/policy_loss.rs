//! `policy_loss` on a GPU: the arguments of `kernels/policy_loss.cu`, which kernel takes them, and its grid.
//!
//! Forward: one launch; each row is split over blocks, the last block of a row runs the objective, the last row the
//! batch. With sharded latents two, `shard_sums` and a forward over the sums. Backward: one launch that streams. The
//! workspace between the blocks is the caller's: see `Workspace`.

use super::arguments::{
    LatentArgument, RowArgument, ScheduleArgument, latent_argument, long_enough, row_argument, schedule_argument,
};
use super::device::{Device, PerDevice};
use super::launch::{Grid, Kernel, Target, launch};
use crate::error::Error;
use crate::objective::{Clip, Density, KlDivisor, Mask, Objective, Problem, Reduction};
use crate::ops::policy_loss::{Backward, Latents, Outputs};
use crate::plan::GridPlan;
use crate::tensor::{Dtype, Gpu, View, ViewMut};
use crate::transition::step::Form;

// ---- twins of the structures in kernels/policy_loss.cuh, field for field -------------------------------------------

/// `struct Latents`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct LatentArguments {
    output: LatentArgument,
    uncond: LatentArgument,
    sample: LatentArgument,
    next: LatentArgument,
    old: LatentArgument,
    reference: LatentArgument,
}

/// `struct Problem`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ProblemArgument {
    rows: i64,
    numel: i64,
    low: f64,
    high: f64,
    objective: i32,
    density: i32,
    latent_sum: i32,
    reduction: i32,
    mask: i32,
    kl_divisor: i32,
    keep_nan_kl: i32,
    per_row_scale: i32,
    has_kl: i32,
    has_ref: i32,
    old_form: i32,
    ref_form: i32,
    adv_clip_max: f32,
    ref_kl_weight: f32,
    advantages: RowArgument,
    log_prob: RowArgument,
    old_log_prob: RowArgument,
    weights: RowArgument,
    std: RowArgument,
    sqrt_dt: RowArgument,
    ref_std: RowArgument,
    schedule: ScheduleArgument,
}

/// `enum Stage`
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
enum Stage {
    Whole = 0,
    SumsAlone = 1,
    ObjectiveAlone = 2,
}

/// `struct PolicyLossForward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ForwardArguments {
    latents: LatentArguments,
    problem: ProblemArgument,
    loss: usize,
    numbers: usize,
    partials: usize,
    tickets: usize,
    row_sums: usize,
    splits: i32,
    stage: Stage,
}

/// `struct PolicyLossBackward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BackwardArguments {
    latents: LatentArguments,
    grad_loss: RowArgument,
    numbers: usize,
    grad_output: usize,
    grad_uncond: usize,
    grad_log_prob: usize,
    old_form: i32,
    ref_form: i32,
    splits: i32,
    pad: i32,
    rows: i64,
    numel: i64,
}

/// The same numbers stand in static assertions of the header: neither side can drift alone.
const FORWARD_BYTES: usize = 624;
const BACKWARD_BYTES: usize = 192;
const _: () = assert!(size_of::<LatentArguments>() == 96);
const _: () = assert!(size_of::<ProblemArgument>() == 480);
const _: () = assert!(size_of::<ForwardArguments>() == FORWARD_BYTES);
const _: () = assert!(size_of::<BackwardArguments>() == BACKWARD_BYTES);

// ---- kernels -------------------------------------------------------------------------------------------------------

/// A kernel that knows its dtypes, or takes every mix.
struct Variant {
    suffix: &'static str,
    /// Whether it takes model outputs, else means.
    is_step: bool,
    /// Of the outputs, the samples, and the old and the reference policy.
    dtypes: Option<[Dtype; 3]>,
}

const fn means(suffix: &'static str, mean: Dtype, others: Dtype) -> Variant {
    Variant { suffix, is_step: false, dtypes: Some([mean, others, others]) }
}

const fn step(suffix: &'static str, outputs: Dtype, samples: Dtype, policies: Dtype) -> Variant {
    Variant { suffix, is_step: true, dtypes: Some([outputs, samples, policies]) }
}

/// Those that take every mix come last.
const VARIANTS: [Variant; 13] = [
    means("f32", Dtype::F32, Dtype::F32),
    means("bf16", Dtype::Bf16, Dtype::Bf16),
    means("f16", Dtype::F16, Dtype::F16),
    means("f32_bf16", Dtype::F32, Dtype::Bf16),
    means("f32_f16", Dtype::F32, Dtype::F16),
    step("step_f32", Dtype::F32, Dtype::F32, Dtype::F32),
    step("step_bf16", Dtype::Bf16, Dtype::Bf16, Dtype::Bf16),
    step("step_f16", Dtype::F16, Dtype::F16, Dtype::F16),
    step("step_bf16_f32", Dtype::Bf16, Dtype::F32, Dtype::F32),
    step("step_bf16_f32_bf16", Dtype::Bf16, Dtype::F32, Dtype::Bf16),
    step("step_bf16_f32_f16", Dtype::Bf16, Dtype::F32, Dtype::F16),
    Variant { suffix: "mixed", is_step: false, dtypes: None },
    Variant { suffix: "step_mixed", is_step: true, dtypes: None },
];
const UNIT: &str = "policy_loss";

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

/// The variant for these latents; what is absent fits every variant.
fn variant(latents: &Latents<'_, Gpu>, is_step: bool) -> usize {
    let Latents { output, uncond_output, sample, prev_sample, old, reference } = *latents;
    let fits = |view: Option<View<'_, Gpu>>, dtype| view.is_none_or(|view| view.dtype() == dtype);
    let matching = |variant: &Variant| {
        let fit = variant.dtypes.is_none_or(|[outputs, samples, policies]| {
            fits(output, outputs)
                && fits(uncond_output, outputs)
                && fits(sample, samples)
                && fits(prev_sample, samples)
                && fits(old, policies)
                && fits(reference, policies)
        });
        variant.is_step == is_step && fit
    };
    VARIANTS.iter().position(matching).expect("the last variant of each kind fits everything")
}

// ---- calls ---------------------------------------------------------------------------------------------------------

/// Device memory that the blocks of one forward share.
pub struct Workspace<'a> {
    /// `[rows, max(splits, 1), 4]` float32: sums of the parts of a row, where other blocks need them.
    pub partials: ViewMut<'a, Gpu>,
    /// `[rows + 1]` 32-bit counters of finished parts and rows: 0 before a launch and again after it.
    pub tickets: ViewMut<'a, Gpu>,
}

/// Length of the partial sums of a forward on this device. `needs_batch_means`: see `Problem::needs_batch_means`.
pub fn partials(ordinal: usize, rows: usize, numel: usize, needs_batch_means: bool) -> Result<usize, Error> {
    let plan = GridPlan::new(rows, numel, kernels(ordinal)?.device.multiprocessors)?;
    Ok(plan.partials(rows, needs_batch_means))
}

/// Launches the forward; `problem` and `latents` are checked. `sums`: every row's, of all shards; no latents are read
/// then.
pub fn forward(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    sums: Option<View<'_, Gpu>>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    let stage = if sums.is_some() { Stage::ObjectiveAlone } else { Stage::Whole };
    let row_sums = sums.map_or(0, |sums| sums.address());
    launch_forward(target, problem, latents, Some(outputs), row_sums, stage, workspace)
}

/// Launches the sums over this shard of every row: `[rows, 4]`, then the shard's elements of a row.
pub fn shard_sums(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    out: &ViewMut<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    launch_forward(target, problem, latents, None, out.address(), Stage::SumsAlone, workspace)
}

fn launch_forward(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: Option<&Outputs<'_, Gpu>>,
    row_sums: usize,
    stage: Stage,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    let Kernels { device, forward, .. } = kernels(target.device)?;
    let (numel, needs_batch_means) = match stage {
        Stage::Whole => (problem.numel, problem.needs_batch_means()),
        Stage::SumsAlone => (problem.numel, false),
        Stage::ObjectiveAlone => (0, problem.needs_batch_means()),
    };
    let plan = GridPlan::new(problem.rows, numel, device.multiprocessors)?;
    // Made elsewhere, hence measured: a kernel that ran past their end would not be noticed.
    long_enough("partials", &workspace.partials, plan.partials(problem.rows, needs_batch_means))?;
    long_enough("tickets", &workspace.tickets, problem.rows + 1)?;
    let arguments =
        ForwardArguments { row_sums, stage, ..forward_arguments(problem, latents, outputs, workspace, plan.splits) };
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    let kernel = &forward[variant(latents, problem.step.is_some())];
    // SAFETY: addresses and lengths are those of views, whose contract the caller of `new` upheld; the grid and the
    // splits are of one plan; the stream is `Target`'s.
    unsafe { launch(kernel, device, target.stream, grid, &arguments) }
}

/// Launches the backward.
pub fn backward(target: Target, call: &Backward<'_, Gpu>, latents: &Latents<'_, Gpu>) -> Result<(), Error> {
    let Kernels { device, backward, .. } = kernels(target.device)?;
    let plan = match (&call.targets.output, &call.targets.uncond_output) {
        (None, None) => GridPlan::of_rows(call.rows)?,
        _ => GridPlan::new(call.rows, call.numel, device.multiprocessors)?,
    };
    let (old_form, ref_form) = call.forms.unwrap_or((Form::Mean, Form::Mean));
    let arguments = BackwardArguments {
        latents: latent_arguments(latents),
        grad_loss: row_argument(Some(call.grad_loss)),
        numbers: call.numbers.address(),
        grad_output: address(&call.targets.output),
        grad_uncond: address(&call.targets.uncond_output),
        grad_log_prob: address(&call.grad_log_prob),
        old_form: form_number(old_form),
        ref_form: form_number(ref_form),
        splits: plan.splits.cast_signed(),
        pad: 0,
        rows: call.rows as i64,
        numel: call.numel as i64,
    };
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    let kernel = &backward[variant(latents, call.forms.is_some())];
    // SAFETY: as in `launch_forward`.
    unsafe { launch(kernel, device, target.stream, grid, &arguments) }
}

fn address(view: &Option<ViewMut<'_, Gpu>>) -> usize {
    view.as_ref().map_or(0, ViewMut::address)
}

// ---- arguments -----------------------------------------------------------------------------------------------------

fn form_number(form: Form) -> i32 {
    match form {
        Form::Mean => 0,
        Form::Output => 1,
        Form::Residual => 2,
    }
}

/// Of a launch that does all of a forward.
fn forward_arguments(
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: Option<&Outputs<'_, Gpu>>,
    workspace: &Workspace<'_>,
    splits: u32,
) -> ForwardArguments {
    ForwardArguments {
        latents: latent_arguments(latents),
        problem: problem_argument(problem),
        loss: outputs.map_or(0, |outputs| outputs.loss.address()),
        numbers: outputs.map_or(0, |outputs| outputs.numbers.address()),
        partials: workspace.partials.address(),
        tickets: workspace.tickets.address(),
        row_sums: 0,
        splits: splits.cast_signed(),
        stage: Stage::Whole,
    }
}

fn latent_arguments(latents: &Latents<'_, Gpu>) -> LatentArguments {
    let Latents { output, uncond_output, sample, prev_sample, old, reference } = *latents;
    LatentArguments {
        output: latent_argument(output),
        uncond: latent_argument(uncond_output),
        sample: latent_argument(sample),
        next: latent_argument(prev_sample),
        old: latent_argument(old),
        reference: latent_argument(reference),
    }
}

fn problem_argument(problem: &Problem<'_, Gpu>) -> ProblemArgument {
    let no_clip = Clip { low: 0.0, high: 0.0, adv_clip_max: f64::INFINITY };
    let gaussian = KlDivisor::Gaussian;
    let (objective, mask, clip, kl_divisor, keep_nan_kl, per_row_scale) = match problem.objective {
        Objective::FlowDppo { threshold, kl_divisor, mask, keep_nan_kl } => {
            (0, mask, Clip { low: threshold, ..no_clip }, kl_divisor, keep_nan_kl, false)
        }
        Objective::FlowGrpo(clip) => (1, Mask::Asymmetric, clip, gaussian, false, false),
        Objective::GrpoGuard { clip, per_row_scale } => (2, Mask::Asymmetric, clip, gaussian, false, per_row_scale),
    };
    let (old_form, ref_form) = problem.step.map_or((Form::Mean, Form::Mean), |step| (step.old_form, step.ref_form));
    ProblemArgument {
        rows: problem.rows as i64,
        numel: problem.numel as i64,
        objective,
        density: match problem.density {
            Density::Gaussian => 0,
            Density::Cps => 1,
        },
        latent_sum: i32::from(problem.latent_sum),
        reduction: match problem.reduction {
            Reduction::Mean => 0,
            Reduction::Sum => 1,
            Reduction::None => 2,
            Reduction::KeptMean => 3,
        },
        mask: match mask {
            Mask::Asymmetric => 0,
            Mask::Symmetric => 1,
            Mask::None => 2,
        },
        kl_divisor: match kl_divisor {
            KlDivisor::Gaussian => 0,
            KlDivisor::Constant => 1,
            KlDivisor::Velocity => 2,
        },
        keep_nan_kl: i32::from(keep_nan_kl),
        per_row_scale: i32::from(per_row_scale),
        has_kl: i32::from(problem.has_kl),
        has_ref: i32::from(problem.has_ref),
        old_form: form_number(old_form),
        ref_form: form_number(ref_form),
        low: clip.low,
        high: clip.high,
        adv_clip_max: clip.adv_clip_max as f32,
        ref_kl_weight: problem.ref_kl_weight as f32,
        advantages: row_argument(Some(problem.advantages)),
        log_prob: row_argument(problem.log_prob),
        old_log_prob: row_argument(problem.old_log_prob),
        weights: row_argument(problem.weights),
        std: row_argument(problem.std),
        sqrt_dt: row_argument(problem.sqrt_dt),
        ref_std: row_argument(problem.ref_std),
        schedule: schedule_argument(problem.step.as_ref().map(|step| &step.schedule)),
    }
}
