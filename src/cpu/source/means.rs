//! The source of `loss`: means.

use std::marker::PhantomData;

use super::{Moments, Source, elements_if, minus, read};
use crate::call::Latents;
use crate::cpu::memory::{Host, View};
use crate::cpu::simd::{Buffer, LANES, Real, Storage};
use crate::plan::Stretch;

/// Means and samples, read as `T`.
#[derive(Clone, Copy)]
pub struct Means<'a, T> {
    mean: View<'a>,
    next: Option<View<'a>>,
    old: Option<View<'a>>,
    reference: Option<View<'a>>,
    read_as: PhantomData<T>,
}

impl<'a, T> Means<'a, T> {
    /// Of latents of `len` elements; None without a mean.
    pub fn new(latents: Host<'a, Latents>, len: usize) -> Option<Self> {
        Some(Means {
            mean: latents.view(|latents| latents.prev_sample_mean, len)?,
            next: latents.view(|latents| latents.prev_sample, len),
            old: latents.view(|latents| latents.old_prev_sample_mean, len),
            reference: latents.view(|latents| latents.ref_prev_sample_mean, len),
            read_as: PhantomData,
        })
    }
}

/// An absent latent is `mean` again: its difference is 0, and reading the cache costs less than a second loop.
pub struct MeansBlock<'a, T> {
    mean: &'a [T],
    next: &'a [T],
    old: &'a [T],
    reference: &'a [T],
}

impl<F: Real, T: Storage> Source<F> for Means<'_, T> {
    type Block<'a>
        = MeansBlock<'a, T>
    where
        Self: 'a;
    type Scratch = [Buffer<T>; 4];
    type Gradient = T;

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        Means {
            next: self.next.filter(|_| innovation),
            old: self.old.filter(|_| drift),
            reference: self.reference.filter(|_| ref_drift),
            ..*self
        }
    }

    #[inline(always)]
    fn block<'a>(&'a self, part: Stretch, [b0, b1, b2, b3]: &'a mut [Buffer<T>; 4]) -> MeansBlock<'a, T> {
        let mean = T::elements(self.mean, part, b0);
        MeansBlock {
            mean,
            next: elements_if(self.next, part, b1).unwrap_or(mean),
            old: elements_if(self.old, part, b2).unwrap_or(mean),
            reference: elements_if(self.reference, part, b3).unwrap_or(mean),
        }
    }

    #[inline(always)]
    fn moments<const FMA: bool, const TAIL: bool>(block: &MeansBlock<'_, T>, at: usize) -> Moments<F> {
        let mean: [F; LANES] = read::<_, _, FMA, TAIL>(block.mean, at);
        Moments {
            innovation: minus(read::<_, _, FMA, TAIL>(block.next, at), mean),
            drift: minus(mean, read::<_, _, FMA, TAIL>(block.old, at)),
            ref_drift: minus(mean, read::<_, _, FMA, TAIL>(block.reference, at)),
        }
    }
}
