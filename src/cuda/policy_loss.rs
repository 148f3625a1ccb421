//! `policy_loss` on a GPU: the arguments of `kernels/policy_loss.cu`, which kernel takes them, and its grid.
//!
//! Forward: one launch; each row is split over blocks, the last block of a row runs the objective, the last row the
//! batch. Backward: one launch that streams. The workspace between the blocks is the caller's: see `Workspace`.

use super::arguments::{LatentArgument, RowArgument, dtype_number, latent_argument, row_argument};
use super::device::{Device, PerDevice};
use super::launch::{Grid, Kernel, Target, launch};
use crate::error::Error;
use crate::objective::{Clip, Density, KlDivisor, Mask, Objective, Problem, Reduction};
use crate::ops::policy_loss::{Backward, Latents, Outputs};
use crate::plan::GridPlan;
use crate::tensor::{Dtype, Gpu, View, ViewMut};

// ---- twins of the structures in kernels/policy_loss.cuh, field for field -------------------------------------------

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
    normalize_kl: i32,
    keep_nan_kl: i32,
    per_row_scale: i32,
    has_kl: i32,
    has_ref: i32,
    adv_clip_max: f32,
    ref_kl_weight: f32,
    advantages: RowArgument,
    log_prob: RowArgument,
    old_log_prob: RowArgument,
    weights: RowArgument,
    std: RowArgument,
    sqrt_dt: RowArgument,
    ref_std: RowArgument,
}

/// `struct PolicyLossForward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ForwardArguments {
    mean: LatentArgument,
    next: LatentArgument,
    old: LatentArgument,
    reference: LatentArgument,
    problem: ProblemArgument,
    loss: usize,
    numbers: usize,
    partials: usize,
    tickets: usize,
    splits: i32,
    pad: i32,
}

/// `struct PolicyLossBackward`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BackwardArguments {
    mean: LatentArgument,
    next: LatentArgument,
    old: LatentArgument,
    reference: LatentArgument,
    grad_loss: RowArgument,
    numbers: usize,
    grad_mean: usize,
    grad_dtype: i32,
    splits: i32,
    grad_log_prob: usize,
    rows: i64,
    numel: i64,
}

/// The same numbers stand in static assertions of the header: neither side can drift alone.
const FORWARD_BYTES: usize = 408;
const BACKWARD_BYTES: usize = 144;
const _: () = assert!(size_of::<ForwardArguments>() == FORWARD_BYTES);
const _: () = assert!(size_of::<BackwardArguments>() == BACKWARD_BYTES);

// ---- kernels -------------------------------------------------------------------------------------------------------

/// Kernels that know their dtypes, by suffix: (mean, the others); and `mixed`, which takes every mix.
const VARIANTS: [(&str, Option<(Dtype, Dtype)>); 6] = [
    ("f32", Some((Dtype::F32, Dtype::F32))),
    ("bf16", Some((Dtype::Bf16, Dtype::Bf16))),
    ("f16", Some((Dtype::F16, Dtype::F16))),
    ("f32_bf16", Some((Dtype::F32, Dtype::Bf16))),
    ("f32_f16", Some((Dtype::F32, Dtype::F16))),
    ("mixed", None),
];
const UNIT: &str = "policy_loss";

/// Names of all entry points, forward and then backward, with the bytes of their only argument.
pub fn entry_points() -> [(String, usize); 2 * VARIANTS.len()] {
    std::array::from_fn(|at| {
        let forward = at < VARIANTS.len();
        let (direction, bytes) = if forward { ("forward", FORWARD_BYTES) } else { ("backward", BACKWARD_BYTES) };
        (format!("{UNIT}_{direction}_{}", VARIANTS[at % VARIANTS.len()].0), bytes)
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
fn variant(latents: &Latents<'_, Gpu>) -> usize {
    let Latents { output, prev_sample, old, reference, .. } = latents;
    let fits = |view: &Option<View<'_, Gpu>>, dtype| view.is_none_or(|view| view.dtype() == dtype);
    let matching = |&(_, dtypes): &(_, Option<(Dtype, Dtype)>)| {
        dtypes.is_none_or(|(mean, others)| {
            fits(output, mean) && [prev_sample, old, reference].into_iter().all(|view| fits(view, others))
        })
    };
    VARIANTS.iter().position(matching).expect("the last variant fits everything")
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

/// Launches the forward; `problem` and `latents` are checked.
pub fn forward(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    sums: Option<View<'_, Gpu>>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    if problem.step.is_some() || sums.is_some() {
        return Err(Error::Missing { name: "a kernel" });
    }
    let Kernels { device, forward, .. } = kernels(target.device)?;
    let plan = GridPlan::new(problem.rows, problem.numel, device.multiprocessors)?;
    // Made elsewhere, hence measured: a kernel that ran past their end would not be noticed.
    let partials = plan.partials(problem.rows, problem.needs_batch_means());
    long_enough("partials", &workspace.partials, partials)?;
    long_enough("tickets", &workspace.tickets, problem.rows + 1)?;
    let [mean, next, old, reference] = latent_arguments(latents);
    let arguments = ForwardArguments {
        mean,
        next,
        old,
        reference,
        problem: problem_argument(problem),
        loss: outputs.loss.address(),
        numbers: outputs.numbers.address(),
        partials: workspace.partials.address(),
        tickets: workspace.tickets.address(),
        splits: plan.splits.cast_signed(),
        pad: 0,
    };
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    // SAFETY: addresses and lengths are those of views, whose contract the caller of `new` upheld; the grid and the
    // splits are of one plan; the stream is `Target`'s.
    unsafe { launch(&forward[variant(latents)], device, target.stream, grid, &arguments) }
}

pub fn shard_sums(
    _: Target,
    _: &Problem<'_, Gpu>,
    _: &Latents<'_, Gpu>,
    _: &ViewMut<'_, Gpu>,
    _: &Workspace<'_>,
) -> Result<(), Error> {
    Err(Error::Missing { name: "a kernel" })
}

fn long_enough(name: &'static str, view: &ViewMut<'_, Gpu>, wanted: usize) -> Result<(), Error> {
    let came = view.elements();
    if came < wanted { Err(Error::Workspace { name, came, wanted }) } else { Ok(()) }
}

/// Launches the backward.
pub fn backward(target: Target, call: &Backward<'_, Gpu>, latents: &Latents<'_, Gpu>) -> Result<(), Error> {
    let Kernels { device, backward, .. } = kernels(target.device)?;
    let plan = match call.targets.output {
        Some(_) => GridPlan::new(call.rows, call.numel, device.multiprocessors)?,
        None => GridPlan::of_rows(call.rows)?,
    };
    let [mean, next, old, reference] = latent_arguments(latents);
    let address = |view: &Option<ViewMut<'_, Gpu>>| view.as_ref().map_or(0, ViewMut::address);
    let arguments = BackwardArguments {
        mean,
        next,
        old,
        reference,
        grad_loss: row_argument(Some(call.grad_loss)),
        numbers: call.numbers.address(),
        grad_mean: address(&call.targets.output),
        grad_dtype: call.targets.output.as_ref().map_or(0, |view| dtype_number(view.dtype())),
        splits: plan.splits.cast_signed(),
        grad_log_prob: address(&call.grad_log_prob),
        rows: call.rows as i64,
        numel: call.numel as i64,
    };
    let grid = Grid { blocks: plan.blocks, threads: GridPlan::THREADS };
    // SAFETY: as in `forward`.
    unsafe { launch(&backward[variant(latents)], device, target.stream, grid, &arguments) }
}

// ---- arguments -----------------------------------------------------------------------------------------------------

/// In the order of the structures: mean, next, old, reference.
fn latent_arguments(latents: &Latents<'_, Gpu>) -> [LatentArgument; 4] {
    let Latents { output, prev_sample, old, reference, .. } = latents;
    [output, prev_sample, old, reference].map(|view| latent_argument(*view))
}

fn problem_argument(problem: &Problem<'_, Gpu>) -> ProblemArgument {
    let no_clip = Clip { low: 0.0, high: 0.0, adv_clip_max: f64::INFINITY };
    let (objective, mask, clip, normalize_kl, keep_nan_kl, per_row_scale) = match problem.objective {
        Objective::FlowDppo { threshold, kl_divisor, mask, keep_nan_kl } => {
            (0, mask, Clip { low: threshold, ..no_clip }, kl_divisor == KlDivisor::Gaussian, keep_nan_kl, false)
        }
        Objective::FlowGrpo(clip) => (1, Mask::Asymmetric, clip, true, false, false),
        Objective::GrpoGuard { clip, per_row_scale } => (2, Mask::Asymmetric, clip, true, false, per_row_scale),
    };
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
        normalize_kl: i32::from(normalize_kl),
        keep_nan_kl: i32::from(keep_nan_kl),
        per_row_scale: i32::from(per_row_scale),
        has_kl: i32::from(problem.has_kl),
        has_ref: i32::from(problem.has_ref),
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
    }
}
