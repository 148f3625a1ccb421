//! `sde_step` on the CPU: mean, next latent, residual and log-prob in one pass, and the streaming backward.
//!
//! A block of `BLOCK` elements goes through the first-level cache step by step: a tensor that does not have the
//! arithmetic type is converted into a buffer first. Sums as in `policy_loss`: `LANES` interleaved lanes over a block,
//! then float64 in a fixed order, so that the bits depend on neither thread count nor schedule.

use std::f64::consts::TAU;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::{Host, View, ViewMut};
use super::schedule::Transition;
use super::simd::{BLOCK, Kernel, LANES, Real, Storage, dispatch, store_scaled, widen, with_part};
use super::source::step::{guided, mean};
use super::source::{self, lanes, padded};
use super::threads::for_each;
use crate::call::{
    Dtype, Latent, SDE_STEP_NUMBERS, Sampler, SdeStep, SdeStepBackward, SdeStepForward, SdeStepLatents, SdeStepNumber,
};
use crate::plan::{Plan, Stretch};

type Scratch<F> = source::Scratch<F, 3>;

/// A call's latents, `[rows, numel]` each.
struct Step<'a> {
    call: Host<'a, SdeStep>,
    double: bool,
    model_output: View<'a>,
    uncond_output: Option<View<'a>>,
    sample: View<'a>,
    /// The next latent, or the noise that draws it.
    next: View<'a>,
    draws: bool,
    stored: Option<ViewMut<'a>>,
    mean: ViewMut<'a>,
    residual: Option<ViewMut<'a>>,
    log_prob: ViewMut<'a>,
    std: ViewMut<'a>,
    numbers: ViewMut<'a>,
}

impl<'a> Step<'a> {
    fn new(forward: Host<'a, SdeStepForward>) -> Self {
        let call = forward.part(|forward| &forward.call);
        let (latents, dtype, rows) = (call.part(|call| &call.latents), call.dtype(), call.rows as usize);
        let len = rows * call.numel as usize;
        let input = |of: fn(&SdeStepLatents) -> &Latent| latents.view(of, len);
        let output = |address: fn(&SdeStepForward) -> u64, dtype, len| {
            forward.output(|forward| Latent::new(address(forward), dtype), len)
        };
        const THERE: &str = "checked: what every call has is there";
        Step {
            call,
            double: dtype == Dtype::F64,
            model_output: input(|latents| &latents.model_output).expect(THERE),
            uncond_output: input(|latents| &latents.uncond_output),
            sample: input(|latents| &latents.sample).expect(THERE),
            next: input(|latents| latents.next()).expect(THERE),
            draws: latents.noise.is_present(),
            stored: output(|forward| forward.stored, latents.sample.dtype, len),
            mean: output(|forward| forward.prev_sample_mean, dtype, len).expect(THERE),
            residual: forward.output(|forward| forward.residual, len),
            log_prob: output(|forward| forward.log_prob, dtype, rows).expect(THERE),
            std: output(|forward| forward.std, dtype, rows).expect(THERE),
            numbers: output(|forward| forward.numbers, dtype, SDE_STEP_NUMBERS * rows).expect(THERE),
        }
    }

    fn transition(&self, row: usize) -> Transition {
        Transition::new(self.call.part(|call| &call.schedule), self.call.sampler, row, self.double)
    }

    /// Writes what becomes of a row. `q`: sum of `(x' - mu)^2`.
    ///
    /// # Safety
    /// No other thread writes this row.
    unsafe fn write_row<F: Real>(&self, row: usize, q: f64) {
        let step = self.transition(row);
        let (n, std) = (self.call.numel as f64, step.std);
        let (log_prob, coefficient) = if self.call.sampler == Sampler::Cps {
            (-q / n, 2.0 / n)
        } else if step.is_deterministic() {
            (0.0, 0.0)
        } else {
            let constant = if self.call.log_prob_normalizer != 0 { std.ln() + 0.5 * TAU.ln() } else { 0.0 };
            (-q / (n * 2.0 * (std * std)) - constant, 1.0 / (n * (std * std)))
        };
        let at = |number: SdeStepNumber| number as usize * self.call.rows as usize + row;
        for (out, at, number) in [
            (&self.log_prob, row, log_prob),
            (&self.std, row, std),
            (&self.numbers, at(SdeStepNumber::LogProb), coefficient),
            (&self.numbers, at(SdeStepNumber::Velocity), step.b),
            (&self.numbers, at(SdeStepNumber::Guidance), step.guidance),
        ] {
            // SAFETY: no other thread writes this row, and each number of it is an element of its own.
            unsafe { out.part_mut::<F>(at, 1)[0] = F::from_f64(number) };
        }
    }
}

pub fn forward(call: Host<'_, SdeStepForward>, threads: usize) {
    let step = &Step::new(call);
    if step.double { forward_in::<f64>(step, threads) } else { forward_in::<f32>(step, threads) }
}

fn forward_in<F: Real>(step: &Step<'_>, threads: usize) {
    let plan = Plan::new(step.call.rows as usize, step.call.numel as usize);
    // Of rows in several stretches, the sum of each: the bits of a float64.
    let split = plan.chunks_per_row > 1;
    let partials: Vec<AtomicU64> = (0..if split { plan.partials() } else { 0 }).map(|_| AtomicU64::new(0)).collect();
    for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        for stretch in plan.stretches(task) {
            let transition = step.transition(stretch.row);
            let q = dispatch(StepKernel { step, transition, stretch, scratch });
            match partials.get(stretch.partial) {
                Some(partial) => partial.store(q.to_bits(), Ordering::Relaxed),
                // SAFETY: every row is one stretch, and every task runs once.
                None => unsafe { step.write_row::<F>(stretch.row, q) },
            }
        }
    });
    for (row, chunks) in partials.chunks(plan.chunks_per_row).enumerate() {
        let q = chunks.iter().map(|partial| f64::from_bits(partial.load(Ordering::Relaxed))).sum();
        // SAFETY: all threads are done.
        unsafe { step.write_row::<F>(row, q) };
    }
}

/// A stretch of one row; gives its sum of `(x' - mu)^2`.
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
        let mut total = [0.0; LANES];
        for offset in (0..stretch.len).step_by(BLOCK) {
            let (first, len) = (stretch.first + offset, BLOCK.min(stretch.len - offset));
            // SAFETY: stretches do not overlap, and every task runs once.
            let mean = unsafe { step.mean.part_mut::<F>(first, len) };
            mean_of_block::<F, FMA>(step, transition, first, mean, scratch);
            let [b0, b1, _] = scratch.buffers();
            let next = next_of_block::<F, FMA>(step, transition, first, mean, b0, b1);
            let sums = squares::<F, FMA>(mean, next);
            for lane in 0..LANES {
                total[lane] += sums[lane].to_f64();
            }
            if let Some(out) = &step.residual {
                let innovation = &mut b1[..len];
                // 0 times an overflow of the stored latent would be NaN.
                let per_std = if transition.is_deterministic() { 0.0 } else { 1.0 / transition.std };
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

/// `mu = a x + b v`, by the functions that form the means of `step_loss`: a mean that is recorded here and given back as
/// the old policy's gives a drift of exactly 0.
#[inline(always)]
fn mean_of_block<F: Real, const FMA: bool>(
    step: &Step<'_>,
    transition: Transition,
    first: usize,
    out: &mut [F],
    scratch: &mut Scratch<F>,
) {
    let (len, [b0, b1, b2]) = (out.len(), scratch.buffers());
    let [a, b, guidance] = [F::from_f64(transition.a), F::from_f64(transition.b), F::from_f64(transition.guidance)];
    let output = widen(step.model_output, first, len, b0);
    let sample = widen(step.sample, first, len, b1);
    let uncond = match step.uncond_output {
        Some(uncond) => Some(widen(uncond, first, len, b2)),
        None => None,
    };
    let full = len / LANES * LANES;
    for at in (0..full).step_by(LANES) {
        let mut velocity = lanes::<F, F, FMA>(output, at);
        if let Some(uncond) = uncond {
            velocity = guided::<F, FMA>(velocity, lanes::<F, F, FMA>(uncond, at), guidance);
        }
        out[at..at + LANES].copy_from_slice(&mean::<F, FMA>(a, b, velocity, lanes::<F, F, FMA>(sample, at)));
    }
    if full < len {
        let mut velocity = padded(output, full);
        if let Some(uncond) = uncond {
            velocity = guided::<F, FMA>(velocity, padded(uncond, full), guidance);
        }
        out[full..].copy_from_slice(&mean::<F, FMA>(a, b, velocity, padded(sample, full))[..len - full]);
    }
}

/// The next latent, as it is stored. `noise` is a buffer.
#[inline(always)]
fn next_of_block<'a, F: Real, const FMA: bool>(
    step: &'a Step<'_>,
    transition: Transition,
    first: usize,
    mean: &[F],
    next: &'a mut [F; BLOCK],
    noise: &mut [F; BLOCK],
) -> &'a [F] {
    let len = mean.len();
    let Some(out) = &step.stored else { return widen(step.next, first, len, next) };
    if !step.draws {
        let next = &mut next[..len];
        next.copy_from_slice(widen(step.next, first, len, noise));
        // SAFETY: stretches do not overlap, and every task runs once.
        unsafe { store_and_round(next, out, first) };
        return next;
    }
    let (std, noise) = (F::from_f64(transition.std), widen(step.next, first, len, noise));
    let direct = out.dtype() == F::DTYPE;
    // SAFETY: stretches do not overlap, and every task runs once.
    let next = if direct { unsafe { out.part_mut::<F>(first, len) } } else { &mut next[..len] };
    for at in 0..len {
        next[at] = std.mul_add::<FMA>(noise[at], mean[at]);
    }
    if !direct {
        // SAFETY: stretches do not overlap, and every task runs once.
        unsafe { store_and_round(next, out, first) };
    }
    next
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

pub fn backward(call: Host<'_, SdeStepBackward>, threads: usize) {
    let gradient = &Gradient::new(call);
    match call.dtype {
        Dtype::F64 => backward_in::<f64>(gradient, threads),
        _ => backward_in::<f32>(gradient, threads),
    }
}

/// What the backward reads and writes; the gradients are those of the forward's log-prob and mean together.
struct Gradient<'a> {
    rows: usize,
    numel: usize,
    /// `[rows]`
    grad_log_prob: Option<View<'a>>,
    /// `[rows, numel]`
    grad_mean: Option<View<'a>>,
    next: View<'a>,
    mean: View<'a>,
    numbers: View<'a>,
    output: Option<ViewMut<'a>>,
    uncond_output: Option<ViewMut<'a>>,
}

impl<'a> Gradient<'a> {
    fn new(call: Host<'a, SdeStepBackward>) -> Self {
        let (rows, numel, dtype) = (call.rows as usize, call.numel as usize, call.dtype);
        let saved = |address: fn(&SdeStepBackward) -> u64, len| call.view_at(address, dtype, len);
        const THERE: &str = "checked: what the forward left is there";
        Gradient {
            rows,
            numel,
            grad_log_prob: saved(|call| call.grad_log_prob, rows),
            grad_mean: saved(|call| call.grad_prev_sample_mean, rows * numel),
            next: call.view(|call| &call.prev_sample, rows * numel).expect(THERE),
            mean: saved(|call| call.prev_sample_mean, rows * numel).expect(THERE),
            numbers: saved(|call| call.numbers, SDE_STEP_NUMBERS * rows).expect(THERE),
            output: call.output(|call| call.grad_model_output, rows * numel),
            uncond_output: call.output(|call| call.grad_uncond_output, rows * numel),
        }
    }

    fn factors<F: Real>(&self, row: usize) -> Factors {
        let number = |of: SdeStepNumber| self.numbers.slice::<F>(of as usize * self.rows + row, 1)[0].to_f64();
        let (b, guidance) = (number(SdeStepNumber::Velocity), number(SdeStepNumber::Guidance));
        // Looked at first: a coefficient of 0 stays 0, whatever it is multiplied with.
        let log_prob = match (self.grad_log_prob, number(SdeStepNumber::LogProb)) {
            (Some(gradient), coefficient) if coefficient != 0.0 => gradient.get(row) * coefficient,
            _ => 0.0,
        };
        Factors { log_prob, output: b * guidance, uncond_output: b * (1.0 - guidance) }
    }
}

/// What the backward of one row multiplies with: `grad = factor (grad_mean + log_prob (x' - mu))`.
#[derive(Clone, Copy, Debug)]
struct Factors {
    log_prob: f64,
    /// Of the gradient of the model output, and of the unconditional output.
    output: f64,
    uncond_output: f64,
}

fn backward_in<F: Real>(gradient: &Gradient<'_>, threads: usize) {
    let plan = Plan::new(gradient.rows, gradient.numel);
    for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        for stretch in plan.stretches(task) {
            let factors = gradient.factors::<F>(stretch.row);
            dispatch(GradientKernel { call: gradient, factors, stretch, scratch });
        }
    });
}

struct GradientKernel<'a, F: Real> {
    call: &'a Gradient<'a>,
    factors: Factors,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real> Kernel for GradientKernel<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let GradientKernel { call, factors, stretch, scratch } = self;
        let [result, buffer, _] = scratch.buffers();
        for offset in (0..stretch.len).step_by(BLOCK) {
            let (first, len) = (stretch.first + offset, BLOCK.min(stretch.len - offset));
            let gradient = gradient_of_mean::<F, FMA>(call, factors, first, &mut result[..len], buffer);
            // SAFETY: stretches do not overlap, and every task runs once.
            unsafe {
                if let Some(out) = &call.output {
                    store_scaled(gradient, F::from_f64(factors.output), out, first);
                }
                if let Some(out) = &call.uncond_output {
                    store_scaled(gradient, F::from_f64(factors.uncond_output), out, first);
                }
            }
        }
    }
}

/// `grad_mean + log_prob (x' - mu)`; without a coefficient, neither latent is read.
#[inline(always)]
fn gradient_of_mean<'a, F: Real, const FMA: bool>(
    call: &'a Gradient<'_>,
    factors: Factors,
    first: usize,
    result: &'a mut [F],
    buffer: &mut [F; BLOCK],
) -> &'a [F] {
    let (len, log_prob) = (result.len(), F::from_f64(factors.log_prob));
    let grad_mean = call.grad_mean.map(|view| view.slice::<F>(first, len));
    if factors.log_prob == 0.0 {
        result.fill(F::default());
        return grad_mean.unwrap_or(result);
    }
    let (mean, next) = (call.mean.slice::<F>(first, len), widen(call.next, first, len, buffer));
    match grad_mean {
        None => {
            for at in 0..len {
                result[at] = log_prob * (next[at] - mean[at]);
            }
        }
        Some(grad_mean) => {
            for at in 0..len {
                result[at] = log_prob.mul_add::<FMA>(next[at] - mean[at], grad_mean[at]);
            }
        }
    }
    result
}

// ---- into memory -----------------------------------------------------------------------------------------------------

/// Writes `values` to `out[first..]`, and makes them what then stands there.
///
/// # Safety
/// As `store_scaled`.
#[inline(always)]
unsafe fn store_and_round<F: Real>(values: &mut [F], out: &ViewMut<'_>, first: usize) {
    // SAFETY: no other thread writes these elements, by the contract of this function.
    unsafe { with_part!(out, first, values.len(), part => rounded(values, part)) }
}

#[inline(always)]
fn rounded<F: Real, T: Storage>(values: &mut [F], to: &mut [T]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to = T::store(*value);
        *value = to.load();
    }
}
