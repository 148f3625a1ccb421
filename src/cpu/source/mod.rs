//! A source reads latents and computes their differences, `LANES` elements at a time. `means`, for `loss`, reads means;
//! `step`, for `step_loss`, computes them from model outputs. Twin: `kernels/transition.cuh`.

pub mod means;
pub mod step;

use super::memory::View;
use super::simd::{Buffer, LANES, Real, Storage};
use crate::call::{Dtype, Latent, Latents};
use crate::plan::Stretch;

/// What all sums and gradients are made of: `x' - mu`, `mu - mu°` (old policy) and `mu - mu_ref`.
#[derive(Clone, Copy)]
pub struct Moments<F> {
    pub innovation: [F; LANES],
    pub drift: [F; LANES],
    pub ref_drift: [F; LANES],
}

pub trait Source<F: Real>: Sync {
    /// At most `BLOCK` elements of one row.
    type Block<'a>
    where
        Self: 'a;
    /// Buffers of one thread.
    type Scratch: Default;
    /// Gradients are rounded to this type, then converted where their array has another dtype.
    type Gradient: Storage;
    /// The same source with 0 for the differences that are false here; it does not read latents that it then need not.
    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self;
    fn block<'a>(&'a self, part: Stretch, scratch: &'a mut Self::Scratch) -> Self::Block<'a>;
    /// The differences of elements `at .. at + LANES`. With `TAIL` the block ends sooner; those past its end are 0.
    fn moments<const FMA: bool, const TAIL: bool>(block: &Self::Block<'_>, at: usize) -> Moments<F>;
}

/// Runs `$body` with `$source` bound to the source of these latents; None without a mean or a model output. `$rows`:
/// each row's `StepRow`, for model outputs. The common mixes of half precision, listed here, are converted to `$real`,
/// the arithmetic type, in registers; any other mix in buffers (1.5 times as long for bfloat16).
macro_rules! with_source {
    ($real:ty, $latents:expr, $len:expr, $rows:expr, $source:ident => $body:expr) => {{
        use half::{bf16, f16};
        use $crate::call::Dtype::{Bf16, F16, F32};
        use $crate::cpu::source::{dtypes, means::Means, step::Outputs};
        let (latents, len, rows) = ($latents, $len, $rows);
        macro_rules! run {
            ($new:expr) => {
                $new.map(|$source| $body)
            };
        }
        match (latents.has_model_output(), dtypes(&latents)) {
            (false, Some([Bf16, Bf16, Bf16])) => run!(Means::<bf16>::new(latents, len)),
            (false, Some([F16, F16, F16])) => run!(Means::<f16>::new(latents, len)),
            (false, _) => run!(Means::<$real>::new(latents, len)),
            (true, Some([Bf16, Bf16, Bf16])) => run!(Outputs::<$real, bf16, bf16, bf16>::new(latents, len, rows)),
            (true, Some([Bf16, F32, F32])) => run!(Outputs::<$real, bf16, f32, f32>::new(latents, len, rows)),
            (true, Some([Bf16, F32, Bf16])) => run!(Outputs::<$real, bf16, f32, bf16>::new(latents, len, rows)),
            (true, Some([Bf16, F32, F16])) => run!(Outputs::<$real, bf16, f32, f16>::new(latents, len, rows)),
            (true, _) => run!(Outputs::<$real, $real, $real, $real>::new(latents, len, rows)),
        }
    }};
}
pub(crate) use with_source;

/// The dtypes of outputs, samples and other policies; None where one of these groups mixes dtypes. An absent group
/// takes the dtype of the one before.
pub fn dtypes(latents: &Latents) -> Option<[Dtype; 3]> {
    fn common(latents: &[Latent], otherwise: Dtype) -> Option<Dtype> {
        let mut dtypes = latents.iter().filter(|latent| latent.is_present()).map(|latent| latent.dtype);
        let first = dtypes.next().unwrap_or(otherwise);
        dtypes.all(|dtype| dtype == first).then_some(first)
    }
    let (outputs, samples, policies) = latents.groups();
    let output = common(&outputs, Dtype::F32)?;
    let sample = common(&samples, output)?;
    Some([output, sample, common(&policies, sample)?])
}

/// `Storage::elements` of a latent that may be absent. Not `Option::map`: `Kernel` says why.
#[inline(always)]
pub fn elements_if<'a, T: Storage>(
    view: Option<View<'a>>, part: Stretch, buffer: &'a mut Buffer<T>,
) -> Option<&'a [T]> {
    match view {
        Some(view) => Some(T::elements(view, part, buffer)),
        None => None,
    }
}

/// Elements `at .. at + LANES` in the arithmetic type; with `TAIL` there are fewer, and zeros follow.
#[inline(always)]
pub(super) fn read<T: Storage, F: Real, const FMA: bool, const TAIL: bool>(values: &[T], at: usize) -> [F; LANES] {
    if TAIL {
        let mut out = [F::default(); LANES];
        for (out, value) in out.iter_mut().zip(&values[at..]) {
            *out = value.load();
        }
        return out;
    }
    match values[at..].first_chunk() {
        Some(values) => T::load_lanes::<F, FMA>(values),
        None => unreachable!("the caller stays {LANES} elements before the end"),
    }
}

#[inline(always)]
fn minus<F: Real>(mut left: [F; LANES], right: [F; LANES]) -> [F; LANES] {
    for lane in 0..LANES {
        left[lane] = left[lane] - right[lane];
    }
    left
}
