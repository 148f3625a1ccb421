//! Transition: how a row's `x'`, `mu` and `mu°` come out of memory, and what a schedule makes of a row.
//!
//! The twin of `kernels/transition.cuh` and `kernels/schedule.cuh`. A `Source` is the only thing in which the operators
//! over row statistics differ: everything behind it sees differences, `LANES` elements at a time. `loss` reads given
//! means (`means`), `step_loss` forms them from model outputs (`step`).

pub mod means;
pub mod schedule;
pub mod step;

use crate::cpu::simd::{BLOCK, LANES, Real, Storage};
use crate::plan::Stretch;

/// Buffers for what must be converted before it is used; one per thread.
pub struct Scratch<F>(Box<[[F; BLOCK]; 6]>);

impl<F: Real> Default for Scratch<F> {
    fn default() -> Self {
        // From a zeroed vector, so that pages nobody converts into are never touched.
        let zeros: Box<[[F; BLOCK]]> = vec![[F::default(); BLOCK]; 6].into_boxed_slice();
        Scratch(zeros.try_into().unwrap_or_else(|_| unreachable!("the vector has six elements")))
    }
}

/// The differences that every statistic and gradient is made of.
#[derive(Clone, Copy)]
pub struct Moments<F> {
    /// `x' - mu`
    pub innovation: [F; LANES],
    /// `mu - mu°`
    pub drift: [F; LANES],
    /// `mu - mu_ref`
    pub ref_drift: [F; LANES],
}

/// At most `BLOCK` elements of one row.
pub trait Block<F> {
    fn elements(&self) -> usize;
    /// Elements `at .. at + LANES`, all of which exist.
    fn moments<const FMA: bool>(&self, at: usize) -> Moments<F>;
    /// Elements from `at` on, fewer than `LANES`; past the end every difference is 0, which adds nothing to any sum.
    fn tail<const FMA: bool>(&self, at: usize) -> Moments<F>;
}

pub trait Source<F: Real>: Sync {
    type Block<'a>: Block<F>
    where
        Self: 'a,
        F: 'a;
    /// What gradients are written as; converted afterwards where the gradient has another dtype.
    type Gradient: Storage;
    /// Whether `ref_drift` is more than zeros.
    fn has_reference(&self) -> bool;
    /// The same without the differences that are not asked for: they become 0.
    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self;
    /// A part of `stretch`, no longer than `BLOCK`.
    fn block<'a>(&'a self, part: Stretch, scratch: &'a mut Scratch<F>) -> Self::Block<'a>;
}

/// `LANES` elements in the arithmetic type.
#[inline(always)]
fn lanes<T: Storage, F: Real, const FMA: bool>(values: &[T], at: usize) -> [F; LANES] {
    match values[at..].first_chunk() {
        Some(values) => T::load_lanes::<F, FMA>(values),
        None => unreachable!("the caller stays {LANES} elements before the end"),
    }
}

/// The elements from `at` on, then zeros.
#[inline(always)]
fn padded<T: Storage, F: Real>(values: &[T], at: usize) -> [F; LANES] {
    let mut out = [F::default(); LANES];
    for (out, value) in out.iter_mut().zip(&values[at..]) {
        *out = value.load();
    }
    out
}
