//! `policy_loss`: the operator behind `loss`.
//!
//! Shapes and dtypes were checked in Python, where the messages can name the user's arguments; what is checked here is
//! what memory safety and the formulas rest on.

use crate::cpu::policy_loss::{
    Coefficients, gradient, log_prob_gradient, read_field, row_objective, row_sums, rows_with_gradient,
};
use crate::cpu::simd::Real;
use crate::cuda::launch::Target;
use crate::cuda::policy_loss::{self as gpu, Workspace};
use crate::error::Error;
use crate::objective::{BATCH_LEN, FIELDS, Field, Objective, POLICY_DIVISOR, Problem, Reduction};
use crate::plan::Plan;
use crate::tensor::{Dtype, Gpu, Host, Rows, View, ViewMut};
use crate::transition::means::{Means, with_source};

/// The latents of a call, `[rows, numel]` each; absent where nothing reads them.
#[derive(Clone, Copy, Debug)]
pub struct Latents<'a, Space = Host> {
    pub prev_sample_mean: Option<View<'a, Space>>,
    pub prev_sample: Option<View<'a, Space>>,
    pub old_prev_sample_mean: Option<View<'a, Space>>,
    pub ref_prev_sample_mean: Option<View<'a, Space>>,
}

/// Where the forward writes.
pub struct Outputs<'a, Space = Host> {
    /// One element, or one per row with `Reduction::None`.
    pub loss: ViewMut<'a, Space>,
    /// `[FIELDS, rows]`, then `[BATCH_LEN]`.
    pub numbers: ViewMut<'a, Space>,
}

/// `gradient_ahead`: where the gradient of `prev_sample_mean` for a `grad_loss` of 1 goes, if it is wanted already.
pub fn forward(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    outputs: &mut Outputs<'_>,
    gradient_ahead: Option<&ViewMut<'_>>,
    threads: usize,
) -> Result<(), Error> {
    check(problem, latents)?;
    let ahead = match (gradient_ahead, means(latents), problem.divisor()) {
        (None, ..) => None,
        (Some(gradient), Some(_), Some(divisor)) => Some((gradient, divisor)),
        (Some(_), None, _) => return Err(Error::Missing { name: "prev_sample_mean" }),
        (Some(_), _, None) => return Err(Error::Missing { name: "a divisor for the gradient ahead of the batch" }),
    };
    if problem.double {
        run_forward::<f64>(problem, latents, outputs, ahead, threads);
    } else {
        run_forward::<f32>(problem, latents, outputs, ahead, threads);
    }
    Ok(())
}

/// As `forward`, on a GPU: puts the work on the stream and returns.
pub fn forward_on_gpu(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    check(problem, latents)?;
    refuse_float64(latents)?;
    for (name, vector) in [("log_prob", problem.log_prob), ("old_log_prob", problem.old_log_prob)] {
        if let Some(Rows::Array { view, .. }) = vector {
            refuse_float64_in(name, Some(view))?;
        }
    }
    gpu::forward(target, problem, latents, outputs, workspace)
}

/// Float64 latents and log-probs are computed in float64 throughout, which is the CPU's. Other row vectors may be
/// float64.
fn refuse_float64(latents: &Latents<'_, Gpu>) -> Result<(), Error> {
    let Latents { prev_sample_mean, prev_sample, old_prev_sample_mean, ref_prev_sample_mean } = *latents;
    refuse_float64_in("prev_sample_mean", prev_sample_mean)?;
    refuse_float64_in("prev_sample", prev_sample)?;
    refuse_float64_in("old_prev_sample_mean", old_prev_sample_mean)?;
    refuse_float64_in("ref_prev_sample_mean", ref_prev_sample_mean)
}

fn refuse_float64_in(name: &'static str, view: Option<View<'_, Gpu>>) -> Result<(), Error> {
    match view {
        Some(view) if view.dtype() == Dtype::F64 => Err(Error::Float64OnGpu { name }),
        _ => Ok(()),
    }
}

fn check<Space>(problem: &Problem<'_, Space>, latents: &Latents<'_, Space>) -> Result<(), Error> {
    let Latents { prev_sample_mean, prev_sample, old_prev_sample_mean, ref_prev_sample_mean } = latents;
    let require = |present: bool, name| if present { Ok(()) } else { Err(Error::Missing { name }) };
    let has_latents = prev_sample.is_some() || old_prev_sample_mean.is_some() || ref_prev_sample_mean.is_some();
    require(!has_latents || prev_sample_mean.is_some(), "prev_sample_mean")?;
    require(prev_sample.is_some() || problem.log_prob.is_some(), "prev_sample or log_prob")?;
    require(!problem.has_ref || problem.ref_std.is_some(), "ref_std")?;
    let needs_kl = !matches!(problem.objective, Objective::FlowGrpo(_));
    let needs_old = needs_kl || problem.old_log_prob.is_none();
    require(!needs_old || old_prev_sample_mean.is_some(), "old_prev_sample_mean")?;
    require(!(needs_kl || prev_sample.is_some()) || problem.std.is_some(), "std")?;
    let guard = matches!(problem.objective, Objective::GrpoGuard { .. });
    require(!guard || problem.sqrt_dt.is_some(), "sqrt_dt")
}

fn means<'a>(latents: &Latents<'a>) -> Option<Means<'a>> {
    latents.prev_sample_mean.map(|prev_sample_mean| Means {
        prev_sample_mean,
        prev_sample: latents.prev_sample,
        old_prev_sample_mean: latents.old_prev_sample_mean,
        ref_prev_sample_mean: latents.ref_prev_sample_mean,
    })
}

fn run_forward<F: Real>(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    outputs: &mut Outputs<'_>,
    gradient_ahead: Option<(&ViewMut<'_>, f64)>,
    threads: usize,
) {
    let plan = Plan::new(problem.rows, problem.numel);
    match (means(latents), gradient_ahead) {
        (Some(means), Some((gradient, divisor))) => with_source!(means, source => {
            rows_with_gradient::<F, _>(problem, &source, plan, divisor, &outputs.numbers, gradient, threads);
        }),
        (means, _) => {
            let sums = match means {
                Some(means) => with_source!(means, source => row_sums::<F, _>(&source, plan, threads)),
                None => Vec::new(),
            };
            row_objective::<F>(problem, &sums, &outputs.numbers, threads);
        }
    }

    let (rows, batch_out) = outputs.numbers.slice_mut::<F>().split_at_mut(FIELDS * problem.rows);
    let at = |field, row| read_field(rows, problem.rows, field, row);
    let (loss, batch) = problem.batch(at);
    let out = outputs.loss.slice_mut::<F>();
    match loss {
        Some(loss) => out[0] = F::from_f64(loss),
        None => {
            for (row, out) in out.iter_mut().enumerate() {
                *out = F::from_f64(problem.row_loss(|field| at(field, row)));
            }
        }
    }
    for (out, number) in batch_out.iter_mut().zip(batch) {
        *out = F::from_f64(number);
    }
}

/// What the backward reads and writes.
pub struct Backward<'a, Space = Host> {
    pub rows: usize,
    pub numel: usize,
    pub double: bool,
    /// d objective / d loss, one number or one per row.
    pub grad_loss: Rows<'a, Space>,
    /// What the forward left.
    pub numbers: View<'a, Space>,
    /// `[rows, numel]` in the dtype of the mean.
    pub grad_mean: Option<ViewMut<'a, Space>>,
    /// `[rows]`
    pub grad_log_prob: Option<ViewMut<'a, Space>>,
}

pub fn backward(call: Backward<'_>, latents: &Latents<'_>, threads: usize) -> Result<(), Error> {
    check_backward(&call, latents)?;
    if call.double {
        run_backward::<f64>(call, latents, threads);
    } else {
        run_backward::<f32>(call, latents, threads);
    }
    Ok(())
}

/// As `backward`, on a GPU: puts the work on the stream and returns.
pub fn backward_on_gpu(target: Target, call: &Backward<'_, Gpu>, latents: &Latents<'_, Gpu>) -> Result<(), Error> {
    check_backward(call, latents)?;
    refuse_float64(latents)?;
    if let (Some(gradient), Some(mean)) = (&call.grad_mean, latents.prev_sample_mean)
        && gradient.dtype() != mean.dtype()
    {
        // The kernels know one dtype for both; a narrower gradient would be written past its end.
        let (came, wanted) = (gradient.dtype().name(), mean.dtype().name());
        return Err(Error::Dtype { name: "grad_mean", came, wanted });
    }
    gpu::backward(target, call, latents)
}

fn check_backward<Space>(call: &Backward<'_, Space>, latents: &Latents<'_, Space>) -> Result<(), Error> {
    match (&call.grad_mean, latents.prev_sample_mean.is_some()) {
        (Some(_), false) => Err(Error::Missing { name: "prev_sample_mean" }),
        _ => Ok(()),
    }
}

fn run_backward<F: Real>(call: Backward<'_>, latents: &Latents<'_>, threads: usize) {
    let numbers = call.numbers.slice::<F>(0, FIELDS * call.rows + BATCH_LEN);
    let divisor = numbers[FIELDS * call.rows + POLICY_DIVISOR].to_f64();
    // A coefficient of 0 stays 0, whatever it is multiplied with.
    let scaled = |field, row, divisor| {
        let coefficient = read_field(numbers, call.rows, field, row);
        if coefficient == 0.0 { 0.0 } else { call.grad_loss.get(row) * coefficient / divisor }
    };
    if let Some(mut out) = call.grad_log_prob {
        log_prob_gradient::<F>((0..call.rows).map(|row| scaled(Field::CoefLogProb, row, divisor)), &mut out);
    }
    if let (Some(out), Some(means)) = (call.grad_mean, means(latents)) {
        let coefficients = |row| Coefficients {
            innovation: scaled(Field::CoefInnovation, row, divisor),
            drift: scaled(Field::CoefDrift, row, divisor),
            reference: scaled(Field::CoefRef, row, 1.0),
        };
        let plan = Plan::new(call.rows, call.numel);
        with_source!(means, source => gradient::<F, _>(&source, &coefficients, plan, &out, threads));
    }
}

/// Elements of the loss.
pub fn loss_len(reduction: Reduction, rows: usize) -> usize {
    if reduction == Reduction::None { rows } else { 1 }
}
