//! `policy_loss` on the CPU: a forward adds up the rows' sums and evaluates the objective, a backward writes gradients.
//! Sums are float32 (float64 in a float64 call) over `BLOCK` elements in `LANES` interleaved lanes, then float64 over
//! blocks, lanes and chunks, always in this order: the bits depend on neither thread count nor schedule.

use std::sync::atomic::{AtomicBool, Ordering};

use super::gradient::{Buffers, Coefficients, Targets, gradient, row_gradient};
use super::memory::{Host, ViewMut};
use super::objective::{Problem, Row, Sums};
use super::simd::{BLOCK, Kernel, LANES, Real, dispatch};
use super::source::step::StepRow;
use super::source::{Moments, Source, with_source};
use super::threads::{for_each, for_each_row, map};
use crate::call::{
    BATCH_LEN, Dtype, Field, Latent, POLICY_DIVISOR, PolicyLoss, PolicyLossBackward, PolicyLossForward, SUMS, Stage,
    fields, numbers_len, row_sums_len,
};
use crate::plan::{Plan, Stretch};

/// Arrays for the gradients of the latents; `output` is for that of `prev_sample_mean` or `model_output`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gradients {
    pub output: Latent,
    pub uncond_output: Latent,
}

/// Writes loss and numbers, or with `Stage::SumsAlone` the rows' sums; and to `unit_gradients`, if present, the
/// gradients for a `grad_loss` of 1. Those need a reduction whose divisor does not depend on the rows.
pub fn forward(call: Host<'_, PolicyLossForward>, unit_gradients: Option<Host<'_, Gradients>>, threads: usize) {
    match call.call.dtype() {
        Dtype::F64 => forward_in::<f64>(call, unit_gradients, threads),
        _ => forward_in::<f32>(call, unit_gradients, threads),
    }
}

fn forward_in<F: Real>(call: Host<'_, PolicyLossForward>, unit_gradients: Option<Host<'_, Gradients>>, threads: usize) {
    let (whole, problem) = (call.part(|call| &call.call), Problem::new(call.part(|call| &call.call)));
    let (rows, plan) = (problem.rows, Plan::new(problem.rows, whole.numel as usize));
    let output = |address: fn(&PolicyLossForward) -> u64, dtype, len| {
        call.output(|call| Latent::new(address(call), dtype), len).expect("checked: the forward's outputs are there")
    };
    let sums_len = row_sums_len(rows).expect("checked: the sums fit into memory");
    if call.stage == Stage::SumsAlone {
        let mut out = output(|call| call.row_sums, Dtype::F64, sums_len);
        let (of_rows, numel) = out.slice_mut::<f64>().split_at_mut(SUMS * rows);
        of_rows.copy_from_slice(bytemuck::cast_slice(&sums_of::<F>(whole, &problem, plan, threads)));
        numel[0] = whole.numel as f64;
        return;
    }

    let len = numbers_len(rows, problem.has_schedule()).expect("checked: the numbers fit into memory");
    let mut numbers = output(|call| call.numbers, F::DTYPE, len);
    if let Some(unit_gradients) = unit_gradients {
        let targets: Targets<'_> = [
            unit_gradients.output(|gradients| gradients.output, rows * plan.numel),
            unit_gradients.output(|gradients| gradients.uncond_output, rows * plan.numel),
        ];
        let divisor = whole.divisor().expect("checked: the divisor is known beforehand");
        let steps = step_rows(&problem);
        with_source!(F, whole.part(|call| &call.latents), rows * plan.numel, &steps, source => {
            rows_with_gradient::<F, _>(&problem, &source, plan, divisor, &numbers, &targets, threads);
        });
    } else if call.stage == Stage::ObjectiveAlone {
        let sums =
            call.view(|call| Latent::new(call.row_sums, Dtype::F64), sums_len).expect("checked: the sums are there");
        let (of_rows, numel) = sums.slice::<f64>(0, sums_len).split_at(SUMS * rows);
        row_objective::<F>(&problem.with_numel(numel[0] as usize), bytemuck::cast_slice(of_rows), &numbers, threads);
    } else {
        row_objective::<F>(&problem, &sums_of::<F>(whole, &problem, plan, threads), &numbers, threads);
    }

    let (of_rows, batch_out) = numbers.slice_mut::<F>().split_at_mut(len - BATCH_LEN);
    let at = |field, row| read_field(of_rows, rows, field, row);
    let (loss, batch) = problem.batch(at);
    let mut out = output(|call| call.loss, F::DTYPE, whole.loss_len());
    match (loss, out.slice_mut::<F>()) {
        (Some(loss), out) => out[0] = F::from_f64(loss),
        (None, out) => {
            for (row, out) in out.iter_mut().enumerate() {
                *out = F::from_f64(problem.row_loss(|field| at(field, row)));
            }
        }
    }
    for (out, number) in batch_out.iter_mut().zip(batch) {
        *out = F::from_f64(number);
    }
}

/// The step of every row; empty without a schedule.
fn step_rows<F: Real>(problem: &Problem<'_>) -> Vec<StepRow<F>> {
    let transitions = (0..problem.rows).map_while(|row| problem.transition(row));
    transitions.map(|step| StepRow::new(step.a, step.b, step.std, step.guidance)).collect()
}

/// The sums of every row; zeros without latents.
fn sums_of<F: Real>(call: Host<'_, PolicyLoss>, problem: &Problem<'_>, plan: Plan, threads: usize) -> Vec<Sums> {
    let (rows, latents) = (step_rows(problem), call.part(|call| &call.latents));
    with_source!(F, latents, plan.rows * plan.numel, &rows, source => {
        row_sums::<F, _>(&source, plan, problem.has_ref, threads)
    })
    .unwrap_or_else(|| vec![Sums::default(); plan.rows])
}

/// Writes the gradients of the latents and of `log_prob`.
pub fn backward(call: Host<'_, PolicyLossBackward>, threads: usize) {
    match call.dtype {
        Dtype::F64 => backward_in::<f64>(call, threads),
        _ => backward_in::<f32>(call, threads),
    }
}

fn backward_in<F: Real>(call: Host<'_, PolicyLossBackward>, threads: usize) {
    let (rows, latents) = (call.rows as usize, call.part(|call| &call.latents));
    let is_step = latents.has_model_output();
    let at_divisor = fields(is_step) * rows + POLICY_DIVISOR;
    let len = at_divisor - POLICY_DIVISOR + BATCH_LEN;
    let numbers = call.view(|call| Latent::new(call.numbers, F::DTYPE), len).expect("checked: the numbers are there");
    let numbers = numbers.slice::<F>(0, len);
    let divisor = numbers[at_divisor].to_f64();
    let stored = |field, row| read_field(numbers, rows, field, row);
    // 0 stays 0, even times an infinity or NaN.
    let scaled = |field, row, divisor| {
        let coefficient = stored(field, row);
        if coefficient == 0.0 { 0.0 } else { call.row(|call| &call.grad_loss, row) * coefficient / divisor }
    };
    if let Some(mut out) = call.output(|call| Latent::new(call.grad_log_prob, F::DTYPE), rows) {
        for (row, out) in out.slice_mut::<F>().iter_mut().enumerate() {
            *out = F::from_f64(scaled(Field::CoefLogProb, row, divisor));
        }
    }
    let plan = Plan::new(rows, call.numel as usize);
    let len = rows * plan.numel;
    let targets: Targets<'_> = [
        call.output(|call| Latent { data: call.grad_output, ..*call.latents.output().1 }, len),
        call.output(|call| Latent { data: call.grad_uncond_output, ..call.latents.uncond_output }, len),
    ];
    if targets.iter().all(Option::is_none) {
        return;
    }
    let coefficients = |row| Coefficients {
        terms: [
            scaled(Field::CoefInnovation, row, divisor),
            scaled(Field::CoefDrift, row, divisor),
            scaled(Field::CoefRef, row, 1.0),
        ],
        guidance: if is_step { stored(Field::StepGuidance, row) } else { 1.0 },
    };
    let step = |row| {
        let [a, b, std, guidance] =
            [Field::StepA, Field::StepB, Field::StepStd, Field::StepGuidance].map(|field| stored(field, row));
        StepRow::new(a, b, std, guidance)
    };
    let steps: Vec<_> = if is_step { (0..rows).map(step).collect() } else { Vec::new() };
    with_source!(F, latents, len, &steps, source => gradient::<F, _>(&source, &coefficients, plan, &targets, threads));
}

/// Multiplies a gradient for a `grad_loss` of 1 by another `grad_loss`. Returns false if the backward must compute the
/// gradient instead: half precision would be rounded twice, and an element that is not finite might be with this
/// factor.
pub fn scale_in_place(gradient: Host<'_, Latent>, len: usize, factor: f64, threads: usize) -> bool {
    match gradient.dtype {
        Dtype::F32 => scale_in::<f32>(gradient, len, factor, threads),
        Dtype::F64 => scale_in::<f64>(gradient, len, factor, threads),
        Dtype::Bf16 | Dtype::F16 => false,
    }
}

fn scale_in<F: Real>(gradient: Host<'_, Latent>, len: usize, factor: f64, threads: usize) -> bool {
    let Some(out) = gradient.output(|gradient| *gradient, len) else { return false };
    let (plan, all_finite, factor) = (Plan::new(1, len), AtomicBool::new(factor.is_finite()), F::from_f64(factor));
    for_each(plan.tasks(), threads, <()>::default, |(), task| {
        for Stretch { first, len, .. } in plan.stretches(task) {
            // SAFETY: stretches do not overlap, and every task runs once.
            let part = unsafe { out.part_mut::<F>(first, len) };
            let mut finite = true;
            for value in part {
                finite &= value.to_f64().is_finite();
                *value = *value * factor;
            }
            if !finite {
                all_finite.store(false, Ordering::Relaxed);
            }
        }
    });
    all_finite.into_inner()
}

fn row_sums<F: Real, S: Source<F>>(source: &S, plan: Plan, has_ref: bool, threads: usize) -> Vec<Sums> {
    let of_tasks = map(plan.tasks(), threads, S::Scratch::default, |scratch, task| {
        let stretches = plan.stretches(task);
        stretches.map(|stretch| stretch_sums(source, stretch, has_ref, scratch)).collect::<Vec<_>>()
    });
    of_tasks.concat().chunks(plan.chunks_per_row).map(total).collect()
}

fn total(stretches: &[Sums]) -> Sums {
    stretches.iter().fold(Sums::default(), Sums::plus)
}

fn stretch_sums<F: Real, S: Source<F>>(source: &S, stretch: Stretch, has_ref: bool, scratch: &mut S::Scratch) -> Sums {
    if has_ref {
        dispatch(SumKernel::<F, S, true> { source, stretch, scratch })
    } else {
        dispatch(SumKernel::<F, S, false> { source, stretch, scratch })
    }
}

/// Without `REF` the kernel leaves out a quarter of the arithmetic, which is what limits bfloat16. (Memory limits
/// float32.)
struct SumKernel<'a, F: Real, S: Source<F>, const REF: bool> {
    source: &'a S,
    stretch: Stretch,
    scratch: &'a mut S::Scratch,
}

impl<F: Real, S: Source<F>, const REF: bool> Kernel for SumKernel<'_, F, S, REF> {
    type Output = Sums;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Sums {
        let SumKernel { source, stretch, scratch } = self;
        // Lanes stay apart to the end: adding up 32 lanes after every block would take a fifth of the time.
        let mut total = LaneSums::<f64>::default();
        for part in stretch.parts(BLOCK) {
            let block = source.block(part, scratch);
            let mut sums = LaneSums::<F>::default();
            // The tail comes after the loop: a call inside would spill the sums from their registers in every round.
            let full = part.len / LANES * LANES;
            for at in (0..full).step_by(LANES) {
                sums = sums.plus::<FMA, REF>(S::moments::<FMA, false>(&block, at));
            }
            if full < part.len {
                sums = sums.plus::<FMA, REF>(S::moments::<FMA, true>(&block, full));
            }
            for lane in 0..LANES {
                total.q[lane] += sums.q[lane].to_f64();
                total.d[lane] += sums.d[lane].to_f64();
                total.cross[lane] += sums.cross[lane].to_f64();
                total.f[lane] += sums.f[lane].to_f64();
            }
        }
        let LaneSums { q, d, cross, f } = &total;
        Sums { q: q.iter().sum(), d: d.iter().sum(), cross: cross.iter().sum(), f: f.iter().sum() }
    }
}

/// Running sums, one per lane. They are four fields, because an array of them would be kept in memory, not in
/// registers.
#[derive(Clone, Copy, Default)]
struct LaneSums<F> {
    q: [F; LANES],
    d: [F; LANES],
    cross: [F; LANES],
    f: [F; LANES],
}

impl<F: Real> LaneSums<F> {
    /// Takes `self` by value. By reference, every round would store every sum to memory.
    #[inline(always)]
    fn plus<const FMA: bool, const REF: bool>(mut self, moments: Moments<F>) -> Self {
        let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
        for lane in 0..LANES {
            self.q[lane] = u[lane].mul_add::<FMA>(u[lane], self.q[lane]);
            self.d[lane] = e[lane].mul_add::<FMA>(e[lane], self.d[lane]);
            self.cross[lane] = e[lane].mul_add::<FMA>(u[lane], self.cross[lane]);
            if REF {
                self.f[lane] = r[lane].mul_add::<FMA>(r[lane], self.f[lane]);
            }
        }
        self
    }
}

/// Writes every row's numbers to `rows`, laid out `[fields, rows]`.
fn row_objective<F: Real>(problem: &Problem<'_>, sums: &[Sums], rows: &ViewMut<'_>, threads: usize) {
    let guard = problem.guard_scale();
    for_each_row(problem.rows, threads, |row| {
        // SAFETY: every row is done once.
        unsafe { write_row::<F>(problem, problem.row(row, sums[row], guard), row, rows) };
    });
}

/// # Safety
/// Nobody else writes this row.
unsafe fn write_row<F: Real>(problem: &Problem<'_>, numbers: Row, row: usize, out: &ViewMut<'_>) {
    for (field, number) in numbers.into_iter().take(fields(problem.has_schedule())).enumerate() {
        // SAFETY: the caller lets no other thread write this row, and each field is an element of its own.
        unsafe { out.part_mut::<F>(field * problem.rows + row, 1)[0] = F::from_f64(number) };
    }
}

/// Does the work of `row_sums`, `row_objective` and `gradient` (for a `grad_loss` of 1) row by row, with the same bits:
/// the gradient then finds the row's latents in the cache. `divisor` is the batch's.
fn rows_with_gradient<F: Real, S: Source<F>>(
    problem: &Problem<'_>, source: &S, plan: Plan, divisor: f64, numbers: &ViewMut<'_>, targets: &Targets<'_>,
    threads: usize,
) {
    let guard = problem.guard_scale();
    for_each(plan.row_tasks(), threads, Buffers::<F, S>::default, |buffers, task| {
        for row in plan.rows_of(task) {
            let sums = plan
                .stretches_of(row)
                .map(|stretch| stretch_sums(source, stretch, problem.has_ref, &mut buffers.0))
                .fold(Sums::default(), |total, sums| total.plus(&sums));
            let row_numbers = problem.row(row, sums, guard);
            // SAFETY: tasks own disjoint rows.
            unsafe { write_row::<F>(problem, row_numbers, row, numbers) };
            let stored = |field: Field| F::from_f64(row_numbers[field as usize]).to_f64();
            let terms =
                [stored(Field::CoefInnovation) / divisor, stored(Field::CoefDrift) / divisor, stored(Field::CoefRef)];
            let guidance = if problem.has_schedule() { stored(Field::StepGuidance) } else { 1.0 };
            row_gradient(source, plan.stretches_of(row), Coefficients { terms, guidance }, buffers, targets);
        }
    });
}

fn read_field<F: Real>(rows: &[F], count: usize, field: Field, row: usize) -> f64 {
    rows[field as usize * count + row].to_f64()
}
