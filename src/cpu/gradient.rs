//! The gradient of `policy_loss` on the CPU: coefficients of a row times differences of a source, streamed to memory.

use super::memory::{Element, ViewMut};
use super::simd::{BLOCK, Buffer, Kernel, LANES, Real, Storage, dispatch, narrow, one_by_one};
use super::source::{Moments, Source};
use super::threads::for_each;
use crate::plan::{Plan, Stretch};

/// A row's gradient is `G = terms[0] (x' - mu) + terms[1] (mu - mu°) + terms[2] (mu - mu_ref)`;
/// `grad_output = guidance G` and `grad_uncond_output = (1 - guidance) G`.
#[derive(Clone, Copy, Debug)]
pub struct Coefficients {
    pub terms: [f64; 3],
    pub guidance: f64,
}

/// The gradients of the output and of the unconditional output, `[rows, numel]`, each in its latent's dtype.
pub type Targets<'a> = [Option<ViewMut<'a>>; 2];

/// Buffers of one thread: the source's, and one for a gradient whose array has another dtype than `S::Gradient`.
pub type Buffers<F, S> = (<S as Source<F>>::Scratch, Buffer<<S as Source<F>>::Gradient>);

/// Writes the gradients of all rows. `coefficients` are those of a row, for the whole row.
pub fn gradient<F: Real, S: Source<F>>(
    source: &S, coefficients: &(impl Fn(usize) -> Coefficients + Sync), plan: Plan, targets: &Targets<'_>,
    threads: usize,
) {
    for_each(plan.tasks(), threads, Buffers::<F, S>::default, |buffers, task| {
        for stretch in plan.stretches(task) {
            row_gradient(source, [stretch], coefficients(stretch.row), buffers, targets);
        }
    });
}

/// Writes the gradients of stretches of one row. The source omits differences whose coefficient is 0, so that no
/// infinite latent gives 0 * inf, and reads nothing if all coefficients are 0.
pub fn row_gradient<F: Real, S: Source<F>>(
    source: &S, stretches: impl IntoIterator<Item = Stretch>, coefficients: Coefficients, buffers: &mut Buffers<F, S>,
    targets: &Targets<'_>,
) {
    let Coefficients { terms: [innovation, drift, reference], guidance } = coefficients;
    let source = &source.only(innovation != 0.0, drift != 0.0, reference != 0.0);
    for stretch in stretches {
        for (out, factor) in targets.iter().zip([guidance, 1.0 - guidance]) {
            let Some(out) = out else { continue };
            // 0 stays 0, even times an infinity.
            let coefficients = coefficients.terms.map(|term| if term == 0.0 { 0.0 } else { term * factor });
            let buffers = &mut *buffers;
            if drift == 0.0 && reference == 0.0 {
                dispatch(GradientKernel::<F, S, false> { source, stretch, coefficients, buffers, out });
            } else {
                dispatch(GradientKernel::<F, S, true> { source, stretch, coefficients, buffers, out });
            }
        }
    }
}

/// Without `ALL` the kernel computes the term of x' - mu alone, in half the arithmetic. FlowDPPO and FlowGRPO have no
/// other term unless there is a reference policy.
struct GradientKernel<'a, F: Real, S: Source<F>, const ALL: bool> {
    source: &'a S,
    stretch: Stretch,
    coefficients: [f64; 3],
    buffers: &'a mut Buffers<F, S>,
    out: &'a ViewMut<'a>,
}

impl<F: Real, S: Source<F>, const ALL: bool> Kernel for GradientKernel<'_, F, S, ALL> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [innovation, drift, reference] = self.coefficients;
        let (scratch, buffer) = self.buffers;
        let blocked = innovation == 0.0 && drift == 0.0 && reference == 0.0;
        let factors = [F::from_f64(innovation), F::from_f64(drift), F::from_f64(reference)];
        let direct = self.out.dtype() == S::Gradient::DTYPE;
        for part in self.stretch.parts(BLOCK) {
            let Stretch { first, len, .. } = part;
            let target: &mut [S::Gradient] = if direct {
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { self.out.part_mut(first, len) }
            } else {
                buffer.first(len)
            };
            if blocked {
                target.fill(S::Gradient::default());
            } else {
                let block = self.source.block(part, scratch);
                let full = len / LANES * LANES;
                for at in (0..full).step_by(LANES) {
                    let at = one_by_one(at);
                    let gradient = combine::<F, _, FMA, ALL>(factors, S::moments::<FMA, false>(&block, at));
                    target[at..at + LANES].copy_from_slice(&gradient);
                }
                if full < len {
                    let gradient = combine::<F, _, FMA, ALL>(factors, S::moments::<FMA, true>(&block, full));
                    target[full..].copy_from_slice(&gradient[..len - full]);
                }
            }
            if !direct {
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { narrow(buffer.first(len), self.out, first) };
            }
        }
    }
}

#[inline(always)]
fn combine<F: Real, T: Storage, const FMA: bool, const ALL: bool>(
    [a, b, c]: [F; 3], moments: Moments<F>,
) -> [T; LANES] {
    let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
    let mut out = [T::default(); LANES];
    for lane in 0..LANES {
        let gradient =
            if ALL { a.mul_add::<FMA>(u[lane], b.mul_add::<FMA>(e[lane], c * r[lane])) } else { a * u[lane] };
        out[lane] = T::store(gradient);
    }
    out
}
