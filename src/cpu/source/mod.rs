//! Source: how a row's `x'`, `mu` and `mu_old` come out of memory. The twin of `kernels/transition.cuh`.
//!
//! A `Source` is the only thing in which `loss` and `step_loss` differ: everything behind it sees differences, `LANES`
//! elements at a time. `loss` reads given means (`means`), `step_loss` forms them from model outputs (`step`).

pub mod means;
pub mod step;

use super::memory::View;
use super::simd::{Buffer, LANES, Real, Storage};
use crate::call::{Dtype, Latent, Latents};
use crate::plan::Stretch;

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

pub trait Source<F: Real>: Sync {
    /// At most `BLOCK` elements of one row.
    type Block<'a>
    where
        Self: 'a;
    /// One per thread.
    type Scratch: Default;
    /// What gradients are written as; converted afterwards where the gradient has another dtype.
    type Gradient: Storage;
    /// The same without the differences that are not asked for: they become 0.
    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self;
    /// A part of a stretch, no longer than `BLOCK`.
    fn block<'a>(&'a self, part: Stretch, scratch: &'a mut Self::Scratch) -> Self::Block<'a>;
    /// Of elements `at .. at + LANES`; see `read` for `TAIL`, where every difference past the end is 0.
    fn moments<const FMA: bool, const TAIL: bool>(block: &Self::Block<'_>, at: usize) -> Moments<F>;
}

/// Runs `$body` with `$source` bound to the fastest source of these latents, if there are any to read. `$rows` are the
/// steps, where means are formed from model outputs. Latents stored as bfloat16 and float16 are converted on the way to
/// the registers (through buffers, bfloat16 costs 1.5 times as much) in the combinations of dtypes that are common: all
/// one, or bfloat16 model outputs, float32 samples, and the old policy as float32 mean, bfloat16 model output or float16
/// residual. In any other all latents are converted to the arithmetic type, `$real`, through buffers.
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

/// The dtypes of outputs, samples and other policies, where each of the three has one. What is absent has that of what
/// stands before it.
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

/// As `Storage::elements`. No `Option::map`: see `Kernel`.
#[inline(always)]
pub fn elements_if<'a, T: Storage>(
    view: Option<View<'a>>, part: Stretch, buffer: &'a mut Buffer<T>,
) -> Option<&'a [T]> {
    match view {
        Some(view) => Some(T::elements(view, part, buffer)),
        None => None,
    }
}

/// `LANES` elements from `at` on in the arithmetic type. With `TAIL` there are fewer, and zeros follow, which add nothing
/// to any sum.
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
