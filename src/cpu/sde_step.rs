//! `sde_step` on the CPU: mean, next latent, residual and log-prob in one pass, and the streaming backward.
//!
//! in  latents `[rows, numel]`, contiguous, any dtype each.   out latents, and a few numbers a row, see `ops::sde_step`.
//! A block of `BLOCK` elements goes through the first-level cache step by step: a tensor that does not have the
//! arithmetic type is converted into a buffer first. Sums as in `policy_loss`: `LANES` interleaved lanes over a block,
//! then float64 in a fixed order, so that the bits depend on neither thread count nor schedule.

use std::sync::atomic::{AtomicU64, Ordering};

use super::simd::{BLOCK, Kernel, LANES, Real, Storage, dispatch, store_scaled, widen, with_part};
use super::threads::for_each;
use crate::ops::sde_step::{Backward, Factors, Next, Outputs, Step};
use crate::plan::{Plan, Stretch};
use crate::tensor::ViewMut;
use crate::transition::schedule::Transition;

/// Buffers for what must be converted; one per thread.
struct Scratch<F>(Box<[[F; BLOCK]; 3]>);

impl<F: Real> Default for Scratch<F> {
    fn default() -> Self {
        // From a zeroed vector, so that pages nobody converts into are never touched.
        let zeros: Box<[[F; BLOCK]]> = vec![[F::default(); BLOCK]; 3].into_boxed_slice();
        Scratch(zeros.try_into().unwrap_or_else(|_| unreachable!("the vector has three elements")))
    }
}

pub fn forward<F: Real>(step: &Step<'_>, outputs: &Outputs<'_>, plan: Plan, threads: usize) {
    // Of rows in several stretches, the sum of each: the bits of a float64.
    let split = plan.chunks_per_row > 1;
    let partials: Vec<AtomicU64> = (0..if split { plan.partials() } else { 0 }).map(|_| AtomicU64::new(0)).collect();
    for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        for stretch in plan.stretches(task) {
            let transition = step.schedule.transition(stretch.row, step.double);
            let q = dispatch(StepKernel { step, outputs, transition, stretch, scratch });
            match partials.get(stretch.partial) {
                Some(partial) => partial.store(q.to_bits(), Ordering::Relaxed),
                // SAFETY: every row is one stretch, and every task runs once.
                None => unsafe { write_row::<F>(step, outputs, stretch.row, q) },
            }
        }
    });
    for (row, chunks) in partials.chunks(plan.chunks_per_row).enumerate() {
        let q = chunks.iter().map(|partial| f64::from_bits(partial.load(Ordering::Relaxed))).sum();
        // SAFETY: all threads are done.
        unsafe { write_row::<F>(step, outputs, row, q) };
    }
}

/// # Safety
/// Nobody else writes this row.
unsafe fn write_row<F: Real>(step: &Step<'_>, outputs: &Outputs<'_>, row: usize, q: f64) {
    let of_row = step.row(row, q);
    let write = |out: &ViewMut<'_>, at: usize, number: f64| {
        // SAFETY: passed on from the caller; the numbers of a row are apart from those of all others.
        unsafe { out.part_mut::<F>(at, 1)[0] = F::from_f64(number) };
    };
    write(&outputs.log_prob, row, of_row.log_prob);
    write(&outputs.std, row, of_row.std);
    for (at, number) in of_row.numbers.into_iter().enumerate() {
        write(&outputs.numbers, at * step.rows + row, number);
    }
}

/// A stretch of one row; gives its sum of `(x' - mu)^2`.
struct StepKernel<'a, F: Real> {
    step: &'a Step<'a>,
    outputs: &'a Outputs<'a>,
    transition: Transition,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real> Kernel for StepKernel<'_, F> {
    type Output = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let StepKernel { step, outputs, transition, stretch, scratch } = self;
        let mut total = [0.0; LANES];
        for offset in (0..stretch.len).step_by(BLOCK) {
            let (first, len) = (stretch.first + offset, BLOCK.min(stretch.len - offset));
            // SAFETY: stretches do not overlap, and every task runs once.
            let mean = unsafe { outputs.mean.part_mut::<F>(first, len) };
            mean_of_block::<F, FMA>(step, transition, first, mean, scratch);
            let [b0, b1, _] = &mut *scratch.0;
            let next = next_of_block::<F, FMA>(step, outputs, transition, first, mean, b0, b1);
            let sums = squares::<F, FMA>(mean, next);
            for lane in 0..LANES {
                total[lane] += sums[lane].to_f64();
            }
            if let Some(out) = &outputs.residual {
                let innovation = &mut b1[..len];
                // 0 times an overflow of the stored latent would be NaN.
                let per_std = if transition.is_deterministic() { 0.0 } else { 1.0 / transition.std };
                for at in 0..len {
                    innovation[at] = if per_std == 0.0 { F::default() } else { next[at] - mean[at] };
                }
                // SAFETY: as above.
                unsafe { store_scaled(innovation, F::from_f64(per_std), out, first) };
            }
        }
        total.iter().sum()
    }
}

/// `mu = a x + b v`. The operations, and their order, are those of `step_loss`: a mean that is recorded here and given
/// back as the old policy's gives a drift of exactly 0.
#[inline(always)]
fn mean_of_block<F: Real, const FMA: bool>(
    step: &Step<'_>,
    transition: Transition,
    first: usize,
    mean: &mut [F],
    scratch: &mut Scratch<F>,
) {
    let (len, [b0, b1, b2]) = (mean.len(), &mut *scratch.0);
    let [a, b, guidance] = [transition.a, transition.b, transition.guidance].map(F::from_f64);
    let output = widen(step.model_output, first, len, b0);
    let sample = widen(step.sample, first, len, b1);
    match step.uncond_output {
        None => {
            for at in 0..len {
                mean[at] = b.mul_add::<FMA>(output[at], a * sample[at]);
            }
        }
        Some(uncond) => {
            let uncond = widen(uncond, first, len, b2);
            for at in 0..len {
                let velocity = guidance.mul_add::<FMA>(output[at] - uncond[at], uncond[at]);
                mean[at] = b.mul_add::<FMA>(velocity, a * sample[at]);
            }
        }
    }
}

/// The next latent, as it is stored. `noise` is a buffer.
#[inline(always)]
fn next_of_block<'a, F: Real, const FMA: bool>(
    step: &'a Step<'_>,
    outputs: &'a Outputs<'_>,
    transition: Transition,
    first: usize,
    mean: &[F],
    next: &'a mut [F; BLOCK],
    noise: &mut [F; BLOCK],
) -> &'a [F] {
    let len = mean.len();
    match (step.next, &outputs.next) {
        (Next::Given(given), None) => widen(given, first, len, next),
        (Next::Given(given), Some(out)) => {
            let next = &mut next[..len];
            next.copy_from_slice(widen(given, first, len, noise));
            // SAFETY: stretches do not overlap, and every task runs once.
            unsafe { store_and_round(next, out, first) };
            next
        }
        (Next::Noise(drawn), Some(out)) => {
            let (std, noise) = (F::from_f64(transition.std), widen(drawn, first, len, noise));
            let direct = out.dtype() == F::DTYPE;
            // SAFETY: as above.
            let next = if direct { unsafe { out.part_mut::<F>(first, len) } } else { &mut next[..len] };
            for at in 0..len {
                next[at] = std.mul_add::<FMA>(noise[at], mean[at]);
            }
            if !direct {
                // SAFETY: as above.
                unsafe { store_and_round(next, out, first) };
            }
            next
        }
        (Next::Noise(_), None) => unreachable!("checked: what is drawn is stored"),
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

pub fn backward<F: Real>(call: &Backward<'_>, plan: Plan, threads: usize) {
    for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
        for stretch in plan.stretches(task) {
            let factors = call.factors::<F>(stretch.row);
            dispatch(GradientKernel { call, factors, stretch, scratch });
        }
    });
}

struct GradientKernel<'a, F: Real> {
    call: &'a Backward<'a>,
    factors: Factors,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real> Kernel for GradientKernel<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let GradientKernel { call, factors, stretch, scratch } = self;
        let [result, buffer, _] = &mut *scratch.0;
        for offset in (0..stretch.len).step_by(BLOCK) {
            let (first, len) = (stretch.first + offset, BLOCK.min(stretch.len - offset));
            let gradient = gradient_of_mean::<F, FMA>(call, factors, first, &mut result[..len], buffer);
            // SAFETY: stretches do not overlap, and every task runs once.
            unsafe {
                if let Some(out) = &call.grad_output {
                    store_scaled(gradient, F::from_f64(factors.output), out, first);
                }
                if let Some(out) = &call.grad_uncond {
                    store_scaled(gradient, F::from_f64(factors.uncond), out, first);
                }
            }
        }
    }
}

/// `grad_mean + log_prob (x' - mu)`; without a coefficient, neither latent is read.
#[inline(always)]
fn gradient_of_mean<'a, F: Real, const FMA: bool>(
    call: &'a Backward<'_>,
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
    // SAFETY: passed on from the caller.
    unsafe { with_part!(out, first, values.len(), part => rounded(values, part)) }
}

#[inline(always)]
fn rounded<F: Real, T: Storage>(values: &mut [F], to: &mut [T]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to = T::store(*value);
        *value = to.load();
    }
}
