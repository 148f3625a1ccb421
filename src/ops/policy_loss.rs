//! `policy_loss`: the operator behind `loss`.
//!
//! Shapes and dtypes were checked in Python, where the messages can name the user's arguments; what is checked here is
//! what memory safety and the formulas rest on.

use crate::cpu::policy_loss::{
    Coefficients, Targets, gradient, log_prob_gradient, read_field, row_objective, row_sums, rows_with_gradient,
};
use crate::cpu::simd::Real;
use crate::cuda::launch::Target;
use crate::cuda::policy_loss::{self as gpu, Workspace};
use crate::error::Error;
use crate::objective::{BATCH_LEN, Field, Objective, POLICY_DIVISOR, Problem, Reduction, Sums, fields};
use crate::plan::Plan;
use crate::tensor::{Dtype, Gpu, Host, Rows, View, ViewMut};
use crate::transition::means::{Means, with_means};
use crate::transition::step::{self, Form, with_outputs};

/// The latents of a call, `[rows, numel]` each; absent where nothing reads them.
#[derive(Clone, Copy, Debug)]
pub struct Latents<'a, Space = Host> {
    /// What the gradient goes to: `prev_sample_mean`, or `model_output` with a schedule.
    pub output: Option<View<'a, Space>>,
    pub uncond_output: Option<View<'a, Space>>,
    pub sample: Option<View<'a, Space>>,
    pub prev_sample: Option<View<'a, Space>>,
    /// The old policy's mean, or what `Step::old_form` says.
    pub old: Option<View<'a, Space>>,
    pub reference: Option<View<'a, Space>>,
}

/// The user's names for the fields of `Latents`, in order. `forms`: those of a call with a schedule.
pub fn latent_names(forms: Option<(Form, Form)>) -> [&'static str; 6] {
    let Some((old, reference)) = forms else {
        let (old, reference) = ("old_prev_sample_mean", "ref_prev_sample_mean");
        return ["prev_sample_mean", "uncond_output", "sample", "prev_sample", old, reference];
    };
    let old = match old {
        Form::Mean => "old_prev_sample_mean",
        Form::Output => "old_model_output",
        Form::Residual => "old_residual",
    };
    let reference = if reference == Form::Mean { "ref_prev_sample_mean" } else { "ref_model_output" };
    ["model_output", "uncond_output", "sample", "prev_sample", old, reference]
}

impl<'a, Space: Copy> Latents<'a, Space> {
    pub fn views(&self) -> [Option<View<'a, Space>>; 6] {
        [self.output, self.uncond_output, self.sample, self.prev_sample, self.old, self.reference]
    }
}

/// Where the forward writes.
pub struct Outputs<'a, Space = Host> {
    /// One element, or one per row with `Reduction::None`.
    pub loss: ViewMut<'a, Space>,
    /// `[fields, rows]`, then `[BATCH_LEN]`.
    pub numbers: ViewMut<'a, Space>,
}

/// `gradients_ahead`: where the gradients for a `grad_loss` of 1 go, if they are wanted already. `sums`: every row's,
/// from `row_sums` of all shards; no latents are read then.
pub fn forward(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    outputs: &mut Outputs<'_>,
    gradients_ahead: Option<&Targets<'_>>,
    sums: Option<View<'_>>,
    threads: usize,
) -> Result<(), Error> {
    check(problem, latents)?;
    let ahead = match (gradients_ahead, problem.divisor()) {
        (None, _) => None,
        (Some(targets), Some(divisor)) if sums.is_none() => Some((targets, divisor)),
        _ => return Err(Error::Missing { name: "a divisor for the gradient ahead of the batch" }),
    };
    if ahead.is_some() && latents.output.is_none() {
        return Err(Error::Missing { name: latent_names(forms(problem))[0] });
    }
    if problem.double {
        run_forward::<f64>(problem, latents, outputs, ahead, sums, threads);
    } else {
        run_forward::<f32>(problem, latents, outputs, ahead, sums, threads);
    }
    Ok(())
}

/// The sums over this shard of every row: `[rows, 4]` in the order of `Sums`, then the shard's elements of a row;
/// float64. Added up over the shards they are what `forward` takes.
pub fn shard_sums(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    out: &mut ViewMut<'_>,
    threads: usize,
) -> Result<(), Error> {
    check(problem, latents)?;
    let sums = if problem.double {
        sums_of::<f64>(problem, latents, threads)
    } else {
        sums_of::<f32>(problem, latents, threads)
    };
    let (rows, numel) = out.slice_mut::<f64>().split_at_mut(SUMS * problem.rows);
    for (out, sums) in rows.chunks_exact_mut(SUMS).zip(sums) {
        out.copy_from_slice(&[sums.q, sums.d, sums.cross, sums.f]);
    }
    numel[0] = problem.numel as f64;
    Ok(())
}

/// Sums of a row.
const SUMS: usize = 4;

/// Length of what `shard_sums` writes.
pub fn shard_sums_len(rows: usize) -> Option<usize> {
    rows.checked_mul(SUMS)?.checked_add(1)
}

/// As `forward`, on a GPU: puts the work on the stream and returns.
pub fn forward_on_gpu(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    sums: Option<View<'_, Gpu>>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    check_on_gpu(problem, latents)?;
    gpu::forward(target, problem, latents, outputs, sums, workspace)
}

/// As `shard_sums`, on a GPU: puts the work on the stream and returns.
pub fn shard_sums_on_gpu(
    target: Target,
    problem: &Problem<'_, Gpu>,
    latents: &Latents<'_, Gpu>,
    out: &ViewMut<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    check_on_gpu(problem, latents)?;
    gpu::shard_sums(target, problem, latents, out, workspace)
}

fn check_on_gpu(problem: &Problem<'_, Gpu>, latents: &Latents<'_, Gpu>) -> Result<(), Error> {
    check(problem, latents)?;
    refuse_float64(latents, forms(problem))?;
    for (name, vector) in [("log_prob", problem.log_prob), ("old_log_prob", problem.old_log_prob)] {
        if let Some(Rows::Array { view, .. }) = vector {
            refuse_float64_in(name, Some(view))?;
        }
    }
    Ok(())
}

/// Float64 latents and log-probs are computed in float64 throughout, which is the CPU's. Other row vectors may be
/// float64.
fn refuse_float64(latents: &Latents<'_, Gpu>, forms: Option<(Form, Form)>) -> Result<(), Error> {
    latent_names(forms).into_iter().zip(latents.views()).try_for_each(|(name, view)| refuse_float64_in(name, view))
}

pub(super) fn refuse_float64_in(name: &'static str, view: Option<View<'_, Gpu>>) -> Result<(), Error> {
    match view {
        Some(view) if view.dtype() == Dtype::F64 => Err(Error::Float64OnGpu { name }),
        _ => Ok(()),
    }
}

fn check<Space: Copy>(problem: &Problem<'_, Space>, latents: &Latents<'_, Space>) -> Result<(), Error> {
    let Latents { output, uncond_output, sample, prev_sample, old, reference } = latents;
    let [output_name, .., old_name, _] = latent_names(forms(problem));
    let require = |present: bool, name| if present { Ok(()) } else { Err(Error::Missing { name }) };
    let has_latents = prev_sample.is_some() || old.is_some() || reference.is_some();
    require(!has_latents || output.is_some(), output_name)?;
    require(prev_sample.is_some() || problem.log_prob.is_some(), "prev_sample or log_prob")?;
    let needs_kl = !matches!(problem.objective, Objective::FlowGrpo(_));
    let needs_old = needs_kl || problem.old_log_prob.is_none();
    require(!needs_old || old.is_some(), old_name)?;
    if let Some(step) = &problem.step {
        require(sample.is_some() && prev_sample.is_some(), "sample and prev_sample")?;
        let guided = step.schedule.guidance_scale.is_some();
        return require(guided == uncond_output.is_some(), "uncond_output or guidance_scale");
    }
    require(!problem.has_ref || problem.ref_std.is_some(), "ref_std")?;
    require(!(needs_kl || prev_sample.is_some()) || problem.std.is_some(), "std")?;
    let guard = matches!(problem.objective, Objective::GrpoGuard { .. });
    require(!guard || problem.sqrt_dt.is_some(), "sqrt_dt")
}

fn means<'a>(latents: &Latents<'a>) -> Option<Means<'a>> {
    latents.output.map(|prev_sample_mean| Means {
        prev_sample_mean,
        prev_sample: latents.prev_sample,
        old_prev_sample_mean: latents.old,
        ref_prev_sample_mean: latents.reference,
    })
}

/// None where a latent that every step has is missing.
fn model_outputs<'a>(
    latents: &Latents<'a>,
    forms: (Form, Form),
    rows: &'a [step::Coefficients],
) -> Option<step::Outputs<'a>> {
    Some(step::Outputs {
        output: latents.output?,
        uncond_output: latents.uncond_output,
        sample: latents.sample?,
        prev_sample: latents.prev_sample,
        old: latents.old,
        old_form: forms.0,
        reference: latents.reference,
        ref_form: forms.1,
        rows,
    })
}

/// Runs `$body` with `$source` bound to the source of a call, if it reads latents at all. `$forms` is None for means;
/// `$rows` are the steps' coefficients.
macro_rules! with_source {
    ($latents:expr, $forms:expr, $rows:expr, $source:ident => $body:expr) => {
        match $forms {
            Some(forms) => model_outputs($latents, forms, $rows).map(|outputs| with_outputs!(outputs, $source => $body)),
            None => means($latents).map(|means| with_means!(means, $source => $body)),
        }
    };
}

fn forms<Space: Copy>(problem: &Problem<'_, Space>) -> Option<(Form, Form)> {
    problem.step.map(|step| (step.old_form, step.ref_form))
}

/// Empty without a schedule.
fn step_coefficients(problem: &Problem<'_>) -> Vec<step::Coefficients> {
    (0..problem.rows).map_while(|row| problem.transition(row)).map(step::Coefficients::from).collect()
}

/// Empty without latents.
fn sums_of<F: Real>(problem: &Problem<'_>, latents: &Latents<'_>, threads: usize) -> Vec<Sums> {
    let (plan, rows) = (Plan::new(problem.rows, problem.numel), step_coefficients(problem));
    with_source!(latents, forms(problem), &rows, source => row_sums::<F, _>(&source, plan, threads)).unwrap_or_default()
}

fn run_forward<F: Real>(
    problem: &Problem<'_>,
    latents: &Latents<'_>,
    outputs: &mut Outputs<'_>,
    gradients_ahead: Option<(&Targets<'_>, f64)>,
    sums: Option<View<'_>>,
    threads: usize,
) {
    if let Some((targets, divisor)) = gradients_ahead {
        let (plan, rows) = (Plan::new(problem.rows, problem.numel), step_coefficients(problem));
        with_source!(latents, forms(problem), &rows, source => {
            rows_with_gradient::<F, _>(problem, &source, plan, divisor, &outputs.numbers, targets, threads);
        });
    } else if let Some(sums) = sums {
        let (sums, numel) = sums.slice::<f64>(0, SUMS * problem.rows + 1).split_at(SUMS * problem.rows);
        let of_rows = |sums: &[f64]| Sums { q: sums[0], d: sums[1], cross: sums[2], f: sums[3] };
        let sums: Vec<Sums> = sums.chunks_exact(SUMS).map(of_rows).collect();
        let whole = Problem { numel: numel[0] as usize, ..*problem };
        row_objective::<F>(&whole, &sums, &outputs.numbers, threads);
    } else {
        row_objective::<F>(problem, &sums_of::<F>(problem, latents, threads), &outputs.numbers, threads);
    }

    let (rows, batch_out) =
        outputs.numbers.slice_mut::<F>().split_at_mut(fields(problem.step.is_some()) * problem.rows);
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
    /// Of a call with a schedule: old and reference.
    pub forms: Option<(Form, Form)>,
    pub targets: Targets<'a, Space>,
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
    refuse_float64(latents, call.forms)?;
    let Targets { output, uncond_output } = &call.targets;
    let pairs = [("grad_output", output, latents.output), ("grad_uncond_output", uncond_output, latents.uncond_output)];
    for (name, gradient, latent) in pairs {
        if let (Some(gradient), Some(latent)) = (gradient, latent)
            && gradient.dtype() != latent.dtype()
        {
            // The kernels know one dtype for both; a narrower gradient would be written past its end.
            let (came, wanted) = (gradient.dtype().name(), latent.dtype().name());
            return Err(Error::Dtype { name, came, wanted });
        }
    }
    gpu::backward(target, call, latents)
}

fn check_backward<Space: Copy>(call: &Backward<'_, Space>, latents: &Latents<'_, Space>) -> Result<(), Error> {
    let Targets { output, uncond_output } = &call.targets;
    let require = |present: bool, name| if present { Ok(()) } else { Err(Error::Missing { name }) };
    require(output.is_none() || latents.output.is_some(), latent_names(call.forms)[0])?;
    require(uncond_output.is_none() || (latents.uncond_output.is_some() && call.forms.is_some()), "uncond_output")?;
    let wanted = output.is_some() || uncond_output.is_some();
    require(!wanted || call.forms.is_none() || (latents.output.is_some() && latents.sample.is_some()), "sample")
}

fn run_backward<F: Real>(call: Backward<'_>, latents: &Latents<'_>, threads: usize) {
    let at_divisor = fields(call.forms.is_some()) * call.rows + POLICY_DIVISOR;
    let numbers = call.numbers.slice::<F>(0, at_divisor - POLICY_DIVISOR + BATCH_LEN);
    let divisor = numbers[at_divisor].to_f64();
    let stored = |field, row| read_field(numbers, call.rows, field, row);
    // A coefficient of 0 stays 0, whatever it is multiplied with.
    let scaled = |field, row, divisor| {
        let coefficient = stored(field, row);
        if coefficient == 0.0 { 0.0 } else { call.grad_loss.get(row) * coefficient / divisor }
    };
    if let Some(mut out) = call.grad_log_prob {
        log_prob_gradient::<F>((0..call.rows).map(|row| scaled(Field::CoefLogProb, row, divisor)), &mut out);
    }
    if call.targets.output.is_none() && call.targets.uncond_output.is_none() {
        return;
    }
    let coefficients = |row| Coefficients {
        innovation: scaled(Field::CoefInnovation, row, divisor),
        drift: scaled(Field::CoefDrift, row, divisor),
        reference: scaled(Field::CoefRef, row, 1.0),
        guidance: if call.forms.is_some() { stored(Field::StepGuidance, row) } else { 1.0 },
    };
    let steps = if call.forms.is_some() { call.rows } else { 0 };
    let steps: Vec<step::Coefficients> = (0..steps)
        .map(|row| step::Coefficients {
            a: stored(Field::StepA, row),
            b: stored(Field::StepB, row),
            std: stored(Field::StepStd, row),
            guidance: stored(Field::StepGuidance, row),
        })
        .collect();
    let (plan, targets) = (Plan::new(call.rows, call.numel), &call.targets);
    with_source!(latents, call.forms, &steps, source => gradient::<F, _>(&source, &coefficients, plan, targets, threads));
}

/// Elements of the loss.
pub fn loss_len(reduction: Reduction, rows: usize) -> usize {
    if reduction == Reduction::None { rows } else { 1 }
}
