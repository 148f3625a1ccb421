//! `sde_step` on the CPU: mean, next latent, residual and log-prob in one pass, and the streaming backward. `BLOCK`
//! elements at a time stay in the first-level cache; latents of another dtype than the arithmetic's are converted into
//! buffers. Sums are taken as in `policy_loss`.

use std::f64::consts::TAU;

use super::memory::{Host, View, ViewMut};
use super::schedule::Transition;
use super::simd::{BLOCK, Buffer, Kernel, LANES, Real, Storage, dispatch, one_by_one, store_scaled, with_type};
use super::source::elements_if;
use super::source::step::{StepRow, velocity_and_mean};
use super::threads::{for_each, for_each_row, map};
use crate::call::{
    Dtype, Latent, SDE_STEP_NUMBERS, Sampler, SdeStep, SdeStepBackward, SdeStepForward, SdeStepLatents, SdeStepNumber,
};
use crate::plan::{Plan, Stretch};

const THERE: &str = "checked: what every call has is there";

type Scratch<F> = [Buffer<F>; 3];

pub fn forward(call: Host<'_, SdeStepForward>, threads: usize) {
    match call.call.dtype() {
        Dtype::F64 => forward_in::<f64>(call, threads),
        _ => forward_in::<f32>(call, threads),
    }
}

fn forward_in<F: Real>(forward: Host<'_, SdeStepForward>, threads: usize) {
    let (rows, call) = (forward.call.rows as usize, forward.part(|forward| &forward.call));
    let plan = Plan::new(rows, call.numel as usize);
    let step = &Step::new::<F>(forward);
    let transition = |row| Transition::new(call.part(|call| &call.schedule), call.sampler, row, F::DTYPE == Dtype::F64);
    let of_tasks = map(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        let of_stretch =
            |stretch: Stretch| dispatch(StepKernel { step, transition: transition(stretch.row), stretch, scratch });
        plan.stretches(task).map(of_stretch).collect::<Vec<_>>()
    });
    let squares = of_tasks.concat();

    let output = |address: fn(&SdeStepForward) -> u64, len| {
        forward.output(|forward| Latent::new(address(forward), F::DTYPE), len).expect(THERE)
    };
    let (log_probs, stds) = (output(|forward| forward.log_prob, rows), output(|forward| forward.std, rows));
    let numbers = output(|forward| forward.numbers, SDE_STEP_NUMBERS * rows);
    for_each_row(rows, threads, |row| {
        let q = squares[row * plan.chunks_per_row..][..plan.chunks_per_row].iter().sum();
        let step = transition(row);
        let (log_prob, coefficient) = log_prob(&call, step, q);
        let at = |number: SdeStepNumber| number as usize * rows + row;
        for (out, at, number) in [
            (&log_probs, row, log_prob),
            (&stds, row, step.std),
            (&numbers, at(SdeStepNumber::LogProb), coefficient),
            (&numbers, at(SdeStepNumber::Velocity), step.b),
            (&numbers, at(SdeStepNumber::Guidance), step.guidance),
        ] {
            // SAFETY: every row is done once, and each number of it is an element of its own.
            unsafe { out.part_mut::<F>(at, 1)[0] = F::from_f64(number) };
        }
    });
}

/// A row's log-prob, and the factor in `d log_prob / d mu = factor (x' - mu)`. `q` is the sum of `(x' - mu)^2`.
fn log_prob(call: &SdeStep, step: Transition, q: f64) -> (f64, f64) {
    let (n, variance) = (call.numel as f64, step.std * step.std);
    if call.sampler == Sampler::Cps {
        (-q / n, 2.0 / n)
    } else if step.is_deterministic() {
        (0.0, 0.0)
    } else {
        let constant = if call.log_prob_normalizer != 0 { step.std.ln() + 0.5 * TAU.ln() } else { 0.0 };
        (-q / (n * 2.0 * variance) - constant, 1.0 / (n * variance))
    }
}

/// A call's latents, `[rows, numel]` each.
struct Step<'a> {
    model_output: View<'a>,
    uncond_output: Option<View<'a>>,
    sample: View<'a>,
    /// `prev_sample` or, where `draws`, the noise in `x' = mu + std noise`.
    next: View<'a>,
    draws: bool,
    stored: Option<ViewMut<'a>>,
    mean: ViewMut<'a>,
    residual: Option<ViewMut<'a>>,
}

impl<'a> Step<'a> {
    fn new<F: Real>(forward: Host<'a, SdeStepForward>) -> Self {
        let latents = forward.part(|forward| &forward.call.latents);
        let len = forward.call.rows as usize * forward.call.numel as usize;
        let input = |of: fn(&SdeStepLatents) -> Latent| latents.view(of, len);
        Step {
            model_output: input(|latents| latents.model_output).expect(THERE),
            uncond_output: input(|latents| latents.uncond_output),
            sample: input(|latents| latents.sample).expect(THERE),
            next: input(|latents| *latents.next()).expect(THERE),
            draws: latents.noise.is_present(),
            stored: forward.output(|forward| Latent::new(forward.stored, latents.sample.dtype), len),
            mean: forward.output(|forward| Latent::new(forward.prev_sample_mean, F::DTYPE), len).expect(THERE),
            residual: forward.output(|forward| forward.residual, len),
        }
    }
}

/// Computes a stretch of one row, and returns its sum of `(x' - mu)^2`.
struct StepKernel<'a, F: Real> {
    step: &'a Step<'a>,
    transition: Transition,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real> Kernel for StepKernel<'_, F> {
    type Output = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let StepKernel { step, transition, stretch, scratch } = self;
        let Transition { a, b, std, guidance, .. } = transition;
        let row = StepRow::new(a, b, std, guidance);
        let mut total = [0.0; LANES];
        for part in stretch.parts(BLOCK) {
            let Stretch { first, len, .. } = part;
            // SAFETY: stretches do not overlap, and every task runs once.
            let mean = unsafe { step.mean.part_mut::<F>(first, len) };
            mean_of_block::<F, FMA>(step, row, part, mean, scratch);

            let [b0, b1, _] = &mut *scratch;
            let next = if let Some(out) = &step.stored {
                let (next, next_or_noise) = (b0.first(len), F::elements(step.next, part, b1));
                if step.draws {
                    for at in 0..len {
                        next[at] = F::from_f64(std).mul_add::<FMA>(next_or_noise[at], mean[at]);
                    }
                } else {
                    next.copy_from_slice(next_or_noise);
                }
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { store_and_round(next, out, first) };
                next
            } else {
                F::elements(step.next, part, b0)
            };

            let sums = squares::<F, FMA>(mean, next);
            for lane in 0..LANES {
                total[lane] += sums[lane].to_f64();
            }

            if let Some(out) = &step.residual {
                let innovation = b1.first(len);
                // An innovation that is infinite, because the stored latent overflowed, must not be multiplied by 0.
                let per_std = if transition.is_deterministic() { 0.0 } else { 1.0 / std };
                for at in 0..len {
                    innovation[at] = if per_std == 0.0 { F::default() } else { next[at] - mean[at] };
                }
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { store_scaled(innovation, F::from_f64(per_std), out, first) };
            }
        }
        total.iter().sum()
    }
}

/// Computes `mu = a x + b v` as `step_loss` does, so that the drift from this mean is exactly 0 for the same outputs.
#[inline(always)]
fn mean_of_block<F: Real, const FMA: bool>(
    step: &Step<'_>, row: StepRow<F>, part: Stretch, out: &mut [F], [b0, b1, b2]: &mut Scratch<F>,
) {
    let output = F::elements(step.model_output, part, b0);
    let uncond = elements_if(step.uncond_output, part, b1);
    let sample = F::elements(step.sample, part, b2);
    let full = part.len / LANES * LANES;
    for at in (0..full).step_by(LANES) {
        let at = one_by_one(at);
        let (_, mean) = velocity_and_mean::<F, F, F, FMA, false>(output, uncond, sample, row, at);
        out[at..at + LANES].copy_from_slice(&mean);
    }
    if full < part.len {
        let (_, mean) = velocity_and_mean::<F, F, F, FMA, true>(output, uncond, sample, row, full);
        out[full..].copy_from_slice(&mean[..part.len - full]);
    }
}

/// Sums of `(x' - mu)^2`, one per lane.
#[inline(always)]
fn squares<F: Real, const FMA: bool>(mean: &[F], next: &[F]) -> [F; LANES] {
    let mut sums = [F::default(); LANES];
    let full = mean.len() / LANES * LANES;
    for at in (0..full).step_by(LANES) {
        let (mean, next) = (&mean[at..at + LANES], &next[at..at + LANES]);
        for lane in 0..LANES {
            let innovation = next[lane] - mean[lane];
            sums[lane] = innovation.mul_add::<FMA>(innovation, sums[lane]);
        }
    }
    for (lane, (&mean, &next)) in mean[full..].iter().zip(&next[full..]).enumerate() {
        sums[lane] = (next - mean).mul_add::<FMA>(next - mean, sums[lane]);
    }
    sums
}

/// Writes the gradients of the model outputs, from those of the log-prob and of the mean.
pub fn backward(call: Host<'_, SdeStepBackward>, threads: usize) {
    match call.dtype {
        Dtype::F64 => backward_in::<f64>(call, threads),
        _ => backward_in::<f32>(call, threads),
    }
}

fn backward_in<F: Real>(call: Host<'_, SdeStepBackward>, threads: usize) {
    let (rows, plan) = (call.rows as usize, Plan::new(call.rows as usize, call.numel as usize));
    let numbers = call.view(|call| Latent::new(call.numbers, F::DTYPE), SDE_STEP_NUMBERS * rows).expect(THERE);
    let grad_log_prob = call.view(|call| Latent::new(call.grad_log_prob, F::DTYPE), rows);
    for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        for stretch in plan.stretches(task) {
            let number = |of: SdeStepNumber| numbers.get(of as usize * rows + stretch.row);
            // 0 stays 0, even times an infinity or NaN.
            let log_prob = match (grad_log_prob, number(SdeStepNumber::LogProb)) {
                (Some(gradient), coefficient) if coefficient != 0.0 => gradient.get(stretch.row) * coefficient,
                _ => 0.0,
            };
            let (b, guidance) = (number(SdeStepNumber::Velocity), number(SdeStepNumber::Guidance));
            dispatch(GradientKernel { call, log_prob, b, guidance, stretch, scratch });
        }
    });
}

/// `G = b (grad_mean + log_prob (x' - mu))`; `grad_output = guidance G`, `grad_uncond = (1 - guidance) G`.
struct GradientKernel<'a, F: Real> {
    call: Host<'a, SdeStepBackward>,
    log_prob: f64,
    b: f64,
    guidance: f64,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real> Kernel for GradientKernel<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let GradientKernel { call, log_prob, b, guidance, stretch, scratch } = self;
        let latents = call.rows as usize * call.numel as usize;
        let next = call.view(|call| call.prev_sample, latents).expect(THERE);
        let mean = call.view(|call| Latent::new(call.prev_sample_mean, F::DTYPE), latents).expect(THERE);
        let grad_mean = call.view(|call| Latent::new(call.grad_prev_sample_mean, F::DTYPE), latents);
        let outputs = [
            (call.output(|call| call.grad_model_output, latents), F::from_f64(b * guidance)),
            (call.output(|call| call.grad_uncond_output, latents), F::from_f64(b * (1.0 - guidance))),
        ];
        let coefficient = F::from_f64(log_prob);
        let [b0, b1, _] = scratch;
        for part in stretch.parts(BLOCK) {
            let Stretch { first, len, .. } = part;
            let (result, grad_mean) = (b0.first(len), grad_mean.map(|view| view.slice::<F>(first, len)));
            let gradient = if log_prob == 0.0 {
                result.fill(F::default());
                grad_mean.unwrap_or(result)
            } else {
                let (mean, next) = (mean.slice::<F>(first, len), F::elements(next, part, b1));
                match grad_mean {
                    None => {
                        for at in 0..len {
                            result[at] = coefficient * (next[at] - mean[at]);
                        }
                    }
                    Some(grad_mean) => {
                        for at in 0..len {
                            result[at] = coefficient.mul_add::<FMA>(next[at] - mean[at], grad_mean[at]);
                        }
                    }
                }
                result
            };
            for (out, factor) in &outputs {
                if let Some(out) = out {
                    // SAFETY: stretches do not overlap, and every task runs once.
                    unsafe { store_scaled(gradient, *factor, out, first) };
                }
            }
        }
    }
}

/// Writes `values` to `out[first..]` and rounds them to what is stored there.
/// # Safety
/// No other thread touches these elements of `out`.
#[inline(always)]
unsafe fn store_and_round<F: Real>(values: &mut [F], out: &ViewMut<'_>, first: usize) {
    // SAFETY: no other thread touches these elements, as the caller promises.
    unsafe { with_type!(out.dtype(), T => rounded(values, out.part_mut::<T>(first, values.len()))) }
}

#[inline(always)]
fn rounded<F: Real, T: Storage>(values: &mut [F], to: &mut [T]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to = T::store(*value);
        *value = to.load();
    }
}
