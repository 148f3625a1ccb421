//! Transition: how a row's `x'`, `mu` and `mu°` come out of memory.
//!
//! The twin of `kernels/transition.cuh`. A `Source` is the only thing in which the operators over row statistics
//! differ: everything behind it sees differences, `LANES` elements at a time. `loss` reads given means (`Means`).

use crate::cpu::simd::{BLOCK, LANES, Real, widen};
use crate::tensor::View;

/// Buffers for what must be converted before it is used; one per thread.
pub struct Scratch<F>(Box<[[F; BLOCK]; 4]>);

impl<F: Real> Default for Scratch<F> {
    fn default() -> Self {
        // From a zeroed vector, so that pages nobody converts into are never touched.
        let zeros: Box<[[F; BLOCK]]> = vec![[F::default(); BLOCK]; 4].into_boxed_slice();
        Scratch(zeros.try_into().unwrap_or_else(|_| unreachable!("the vector has four elements")))
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

/// At most `BLOCK` elements of one row, in the arithmetic type.
pub trait Block<F> {
    fn elements(&self) -> usize;
    /// Elements `at .. at + LANES`; past the end every difference is 0, which adds nothing to any sum.
    fn moments(&self, at: usize) -> Moments<F>;
}

pub trait Source<F: Real>: Sync {
    type Block<'a>: Block<F>
    where
        Self: 'a,
        F: 'a;
    /// Elements `first .. first + len`, counted over all rows; inside one row, and no more than `BLOCK`.
    fn block<'a>(&'a self, first: usize, len: usize, scratch: &'a mut Scratch<F>) -> Self::Block<'a>;
}

/// Means as given. What is absent stands for `mu` itself: its difference is 0 and its loads hit the first-level cache,
/// which costs less than a second copy of the loop would.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    pub prev_sample_mean: View<'a>,
    pub prev_sample: Option<View<'a>>,
    pub old_prev_sample_mean: Option<View<'a>>,
    pub ref_prev_sample_mean: Option<View<'a>>,
}

pub struct MeansBlock<'a, F> {
    mean: &'a [F],
    next: &'a [F],
    old: &'a [F],
    reference: &'a [F],
}

impl<F: Real> Source<F> for Means<'_> {
    type Block<'a>
        = MeansBlock<'a, F>
    where
        Self: 'a,
        F: 'a;

    #[inline(always)]
    fn block<'a>(&'a self, first: usize, len: usize, scratch: &'a mut Scratch<F>) -> MeansBlock<'a, F> {
        let [b0, b1, b2, b3] = &mut *scratch.0;
        let mean = widen(self.prev_sample_mean, first, len, b0);
        let next = self.prev_sample.map_or(mean, |view| widen(view, first, len, b1));
        let old = self.old_prev_sample_mean.map_or(mean, |view| widen(view, first, len, b2));
        let reference = self.ref_prev_sample_mean.map_or(mean, |view| widen(view, first, len, b3));
        MeansBlock { mean, next, old, reference }
    }
}

impl<F: Real> Block<F> for MeansBlock<'_, F> {
    #[inline(always)]
    fn elements(&self) -> usize {
        self.mean.len()
    }

    #[inline(always)]
    fn moments(&self, at: usize) -> Moments<F> {
        let mean = lanes(self.mean, at);
        Moments {
            innovation: difference(lanes(self.next, at), mean),
            drift: difference(mean, lanes(self.old, at)),
            ref_drift: difference(mean, lanes(self.reference, at)),
        }
    }
}

#[inline(always)]
fn lanes<F: Real>(values: &[F], at: usize) -> [F; LANES] {
    match values.get(at..at + LANES) {
        Some(full) => full.try_into().unwrap_or_else(|_| unreachable!("the range has LANES elements")),
        None => {
            let mut padded = [F::default(); LANES];
            padded[..values.len() - at].copy_from_slice(&values[at..]);
            padded
        }
    }
}

#[inline(always)]
fn difference<F: Real>(a: [F; LANES], b: [F; LANES]) -> [F; LANES] {
    std::array::from_fn(|lane| a[lane] - b[lane])
}
