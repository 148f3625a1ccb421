//! Source: how a row's `x'`, `mu` and `mu_old` come out of memory. The twin of `kernels/transition.cuh`.
//!
//! A `Source` is the only thing in which `loss` and `step_loss` differ: everything behind it sees differences, `LANES`
//! elements at a time. `loss` reads given means (`means`), `step_loss` forms them from model outputs (`step`).

pub mod means;
pub mod step;

use super::memory::View;
use super::simd::{BLOCK, LANES, Real, Storage};
use crate::plan::Stretch;

/// Buffers for what must be converted before it is used; one per thread, made when the first is used.
pub struct Scratch<F, const BUFFERS: usize = 6>(Option<Box<[[F; BLOCK]; BUFFERS]>>);

impl<F, const BUFFERS: usize> Default for Scratch<F, BUFFERS> {
    fn default() -> Self {
        Scratch(None)
    }
}

impl<F: Real, const BUFFERS: usize> Scratch<F, BUFFERS> {
    #[inline(always)]
    pub fn buffers(&mut self) -> &mut [[F; BLOCK]; BUFFERS] {
        if self.0.is_none() {
            self.0 = Some(Self::zeroed());
        }
        match &mut self.0 {
            Some(buffers) => buffers,
            None => unreachable!("they were made above"),
        }
    }

    #[cold]
    fn zeroed() -> Box<[[F; BLOCK]; BUFFERS]> {
        // From a zeroed vector, so that pages nobody converts into are never touched.
        let zeros: Box<[[F; BLOCK]]> = vec![[F::default(); BLOCK]; BUFFERS].into_boxed_slice();
        zeros.try_into().unwrap_or_else(|_| unreachable!("the vector has {BUFFERS} elements"))
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

/// The dtype of all that are present, if it is one.
fn common_dtype<const N: usize>(views: [Option<View<'_>>; N]) -> Option<crate::call::Dtype> {
    let mut dtypes = views.into_iter().flatten().map(|view| view.dtype());
    let first = dtypes.next()?;
    dtypes.all(|dtype| dtype == first).then_some(first)
}

/// `LANES` elements in the arithmetic type.
#[inline(always)]
pub(super) fn lanes<T: Storage, F: Real, const FMA: bool>(values: &[T], at: usize) -> [F; LANES] {
    match values[at..].first_chunk() {
        Some(values) => T::load_lanes::<F, FMA>(values),
        None => unreachable!("the caller stays {LANES} elements before the end"),
    }
}

/// The elements from `at` on, then zeros.
#[inline(always)]
pub(super) fn padded<T: Storage, F: Real>(values: &[T], at: usize) -> [F; LANES] {
    let mut out = [F::default(); LANES];
    for (out, value) in out.iter_mut().zip(&values[at..]) {
        *out = value.load();
    }
    out
}
