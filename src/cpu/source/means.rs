//! The source of `loss`: means as given.

use std::marker::PhantomData;

use super::{Block, Moments, Scratch, Source, common_dtype, lanes, padded};
use crate::call::{Dtype, Latents};
use crate::cpu::memory::{Host, View};
use crate::cpu::simd::{BLOCK, LANES, Real, Storage, widen};
use crate::plan::Stretch;

/// Means as given, of any dtypes. What is absent stands for `mu` itself: its difference is 0 and its loads hit the
/// first-level cache, which costs less than a second copy of the loop would.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    pub prev_sample_mean: View<'a>,
    pub prev_sample: Option<View<'a>>,
    pub old_prev_sample_mean: Option<View<'a>>,
    pub ref_prev_sample_mean: Option<View<'a>>,
}

impl<'a> Means<'a> {
    /// Of latents of `len` elements; None without a mean.
    pub fn new(latents: Host<'a, Latents>, len: usize) -> Option<Self> {
        Some(Means {
            prev_sample_mean: latents.view(|latents| &latents.prev_sample_mean, len)?,
            prev_sample: latents.view(|latents| &latents.prev_sample, len),
            old_prev_sample_mean: latents.view(|latents| &latents.old_prev_sample_mean, len),
            ref_prev_sample_mean: latents.view(|latents| &latents.ref_prev_sample_mean, len),
        })
    }

    pub fn common_dtype(&self) -> Option<Dtype> {
        let Means { prev_sample_mean, prev_sample, old_prev_sample_mean, ref_prev_sample_mean } = *self;
        common_dtype([Some(prev_sample_mean), prev_sample, old_prev_sample_mean, ref_prev_sample_mean])
    }
}

/// The same, all of one dtype: converted on the way to the registers. bfloat16 through buffers costs 1.5 times as much.
#[derive(Clone, Copy)]
pub struct MeansOf<'a, T>(pub Means<'a>, pub PhantomData<T>);

/// Runs `$body` with `$source` bound to the fastest source of `$means`.
macro_rules! with_means {
    ($means:expr, $source:ident => $body:expr) => {{
        use half::{bf16, f16};
        use std::marker::PhantomData;
        use $crate::call::Dtype;
        let means: $crate::cpu::source::means::Means<'_> = $means;
        match means.common_dtype() {
            Some(Dtype::F32) => {
                let $source = $crate::cpu::source::means::MeansOf(means, PhantomData::<f32>);
                $body
            }
            Some(Dtype::Bf16) => {
                let $source = $crate::cpu::source::means::MeansOf(means, PhantomData::<bf16>);
                $body
            }
            Some(Dtype::F16) => {
                let $source = $crate::cpu::source::means::MeansOf(means, PhantomData::<f16>);
                $body
            }
            Some(Dtype::F64) | None => {
                let $source = means;
                $body
            }
        }
    }};
}
pub(crate) use with_means;

pub struct MeansBlock<'a, T> {
    mean: &'a [T],
    next: &'a [T],
    old: &'a [T],
    reference: &'a [T],
}

impl<F: Real> Source<F> for Means<'_> {
    type Block<'a>
        = MeansBlock<'a, F>
    where
        Self: 'a,
        F: 'a;
    type Gradient = F;

    fn has_reference(&self) -> bool {
        self.ref_prev_sample_mean.is_some()
    }

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        Means {
            prev_sample_mean: self.prev_sample_mean,
            prev_sample: self.prev_sample.filter(|_| innovation),
            old_prev_sample_mean: self.old_prev_sample_mean.filter(|_| drift),
            ref_prev_sample_mean: self.ref_prev_sample_mean.filter(|_| ref_drift),
        }
    }

    #[inline(always)]
    fn block<'a>(&'a self, Stretch { first, len, .. }: Stretch, scratch: &'a mut Scratch<F>) -> MeansBlock<'a, F> {
        let [b0, b1, b2, b3, ..] = scratch.buffers();
        let mean = widen(self.prev_sample_mean, first, len, b0);
        let or_mean = |view: Option<View<'a>>, buffer: &'a mut [F; BLOCK]| match view {
            Some(view) => widen(view, first, len, buffer),
            None => mean,
        };
        MeansBlock {
            mean,
            next: or_mean(self.prev_sample, b1),
            old: or_mean(self.old_prev_sample_mean, b2),
            reference: or_mean(self.ref_prev_sample_mean, b3),
        }
    }
}

impl<F: Real, T: Storage> Source<F> for MeansOf<'_, T> {
    type Block<'a>
        = MeansBlock<'a, T>
    where
        Self: 'a,
        F: 'a;
    type Gradient = T;

    fn has_reference(&self) -> bool {
        self.0.ref_prev_sample_mean.is_some()
    }

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        MeansOf(Source::<F>::only(&self.0, innovation, drift, ref_drift), PhantomData)
    }

    #[inline(always)]
    fn block<'a>(&'a self, Stretch { first, len, .. }: Stretch, _: &'a mut Scratch<F>) -> MeansBlock<'a, T> {
        let mean = self.0.prev_sample_mean.slice(first, len);
        let or_mean = |view: Option<View<'a>>| match view {
            Some(view) => view.slice(first, len),
            None => mean,
        };
        MeansBlock {
            mean,
            next: or_mean(self.0.prev_sample),
            old: or_mean(self.0.old_prev_sample_mean),
            reference: or_mean(self.0.ref_prev_sample_mean),
        }
    }
}

impl<F: Real, T: Storage> Block<F> for MeansBlock<'_, T> {
    #[inline(always)]
    fn elements(&self) -> usize {
        self.mean.len()
    }

    #[inline(always)]
    fn moments<const FMA: bool>(&self, at: usize) -> Moments<F> {
        differences(
            lanes::<_, _, FMA>(self.mean, at),
            lanes::<_, _, FMA>(self.next, at),
            lanes::<_, _, FMA>(self.old, at),
            lanes::<_, _, FMA>(self.reference, at),
        )
    }

    #[inline(always)]
    fn tail<const FMA: bool>(&self, at: usize) -> Moments<F> {
        differences(padded(self.mean, at), padded(self.next, at), padded(self.old, at), padded(self.reference, at))
    }
}

#[inline(always)]
fn differences<F: Real>(mean: [F; LANES], next: [F; LANES], old: [F; LANES], reference: [F; LANES]) -> Moments<F> {
    let zeros = [F::default(); LANES];
    let mut out = Moments { innovation: zeros, drift: zeros, ref_drift: zeros };
    for lane in 0..LANES {
        out.innovation[lane] = next[lane] - mean[lane];
        out.drift[lane] = mean[lane] - old[lane];
        out.ref_drift[lane] = mean[lane] - reference[lane];
    }
    out
}
