//! `policy_loss`: the operator behind `loss`.
//!
//! Shapes and dtypes were checked in Python, where the messages can name the user's arguments; what is checked here is
//! what memory safety and the formulas rest on.

use crate::cpu::policy_loss::{Coefficients, gradient, log_prob_gradient, read_field, row_objective, row_sums};
use crate::cpu::simd::Real;
use crate::error::Error;
use crate::objective::{BATCH_LEN, FIELDS, Field, Objective, POLICY_DIVISOR, Problem, Reduction};
use crate::plan::Plan;
use crate::tensor::{Rows, View, ViewMut};
use crate::transition::{Means, with_source};

/// The latents of a call, `[rows, numel]` each; absent where nothing reads them.
#[derive(Clone, Copy, Debug)]
pub struct Latents<'a> {
    pub prev_sample_mean: Option<View<'a>>,
    pub prev_sample: Option<View<'a>>,
    pub old_prev_sample_mean: Option<View<'a>>,
    pub ref_prev_sample_mean: Option<View<'a>>,
}

/// Where the forward writes.
pub struct Outputs<'a> {
    /// One element, or one per row with `Reduction::None`.
    pub loss: ViewMut<'a>,
    /// `[FIELDS, rows]`, then `[BATCH_LEN]`.
    pub numbers: ViewMut<'a>,
}

pub fn forward(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    outputs: &mut Outputs<'_>,
    threads: usize,
) -> Result<(), Error> {
    check(problem, latents)?;
    if problem.double {
        run_forward::<f64>(problem, latents, outputs, threads);
    } else {
        run_forward::<f32>(problem, latents, outputs, threads);
    }
    Ok(())
}

fn check(problem: &Problem<'_>, latents: &Latents<'_>) -> Result<(), Error> {
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

fn run_forward<F: Real>(problem: &Problem<'_>, latents: &Latents<'_>, outputs: &mut Outputs<'_>, threads: usize) {
    let plan = Plan::new(problem.rows, problem.numel);
    let sums = match means(latents) {
        Some(means) => with_source!(means, source => row_sums::<F, _>(&source, plan, threads)),
        None => Vec::new(),
    };
    row_objective::<F>(problem, &sums, &outputs.numbers, threads);

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
pub struct Backward<'a> {
    pub rows: usize,
    pub numel: usize,
    pub double: bool,
    /// d objective / d loss, one number or one per row.
    pub grad_loss: Rows<'a>,
    /// What the forward left.
    pub numbers: View<'a>,
    /// `[rows, numel]` in the dtype of the mean.
    pub grad_mean: Option<ViewMut<'a>>,
    /// `[rows]`
    pub grad_log_prob: Option<ViewMut<'a>>,
}

pub fn backward(call: Backward<'_>, latents: &Latents<'_>, threads: usize) -> Result<(), Error> {
    if call.grad_mean.is_some() && latents.prev_sample_mean.is_none() {
        return Err(Error::Missing { name: "prev_sample_mean" });
    }
    if call.double {
        run_backward::<f64>(call, latents, threads);
    } else {
        run_backward::<f32>(call, latents, threads);
    }
    Ok(())
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
