//! `policy_loss` on the CPU: row sums over a source, the objective, and the streaming backward.
//!
//! in  latents `[rows, numel]`, contiguous, any dtype each; row vectors.   out `Field` x rows, batch numbers, gradient.
//! Sums are float32 (float64 for float64 latents) over `BLOCK` elements in `LANES` interleaved lanes, then float64 over
//! lanes, blocks and chunks, always in the same order: the bits depend on neither thread count nor schedule.

use super::pool::for_each;
use super::simd::{BLOCK, Kernel, LANES, Real, dispatch, narrow};
use crate::objective::{Field, Problem, Row, Sums};
use crate::plan::{CHUNK, Plan, Stretch};
use crate::tensor::ViewMut;
use crate::transition::{Block, Scratch, Source};

/// Sums over every row's latents.
pub fn row_sums<F: Real, S: Source<F>>(source: &S, plan: Plan, threads: usize) -> Vec<Sums> {
    let mut partials = vec![Sums::default(); plan.partials()];
    {
        let partials = Disjoint::new(&mut partials);
        for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
            for stretch in plan.stretches(task) {
                let sums = dispatch(SumKernel { source, stretch, scratch });
                // SAFETY: every stretch has its own partial, and every task runs once.
                unsafe { partials.write(stretch.partial, sums) };
            }
        });
    }
    if plan.chunks_per_row == 1 {
        return partials;
    }
    let add = |a: Sums, b: &Sums| Sums { q: a.q + b.q, d: a.d + b.d, cross: a.cross + b.cross, f: a.f + b.f };
    partials.chunks(plan.chunks_per_row).map(|chunks| chunks.iter().fold(Sums::default(), add)).collect()
}

struct SumKernel<'a, F, S> {
    source: &'a S,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real, S: Source<F>> Kernel for SumKernel<'_, F, S> {
    type Output = Sums;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Sums {
        let SumKernel { source, stretch: Stretch { first, len, .. }, scratch } = self;
        let mut total = Sums::default();
        for offset in (0..len).step_by(BLOCK) {
            let block = source.block(first + offset, BLOCK.min(len - offset), scratch);
            let zeros = [F::default(); LANES];
            let (mut q, mut d, mut cross, mut f) = (zeros, zeros, zeros, zeros);
            for at in (0..block.elements()).step_by(LANES) {
                let moments = block.moments(at);
                let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
                for lane in 0..LANES {
                    q[lane] = u[lane].mul_add::<FMA>(u[lane], q[lane]);
                    d[lane] = e[lane].mul_add::<FMA>(e[lane], d[lane]);
                    cross[lane] = e[lane].mul_add::<FMA>(u[lane], cross[lane]);
                    f[lane] = r[lane].mul_add::<FMA>(r[lane], f[lane]);
                }
            }
            total.q += sum(q);
            total.d += sum(d);
            total.cross += sum(cross);
            total.f += sum(f);
        }
        total
    }
}

#[inline(always)]
fn sum<F: Real>(lanes: [F; LANES]) -> f64 {
    lanes.iter().map(|lane| lane.to_f64()).sum()
}

/// Every row's numbers into `rows`, laid out `[FIELDS, rows]`.
pub fn row_objective<F: Real>(problem: &Problem<'_>, sums: &[Sums], rows: &ViewMut<'_>, threads: usize) {
    let guard = problem.guard_scale();
    // ~50 ns a row: worth a thread from thousands of rows on.
    let per_task = CHUNK / 16;
    for_each(
        problem.rows.div_ceil(per_task),
        threads,
        || (),
        |(), task| {
            for row in task * per_task..problem.rows.min((task + 1) * per_task) {
                let sums = sums.get(row).copied().unwrap_or_default();
                let numbers: Row = problem.row(row, sums, guard);
                for (field, number) in numbers.into_iter().enumerate() {
                    // SAFETY: tasks own disjoint rows.
                    unsafe { rows.part_mut::<F>(field * problem.rows + row, 1)[0] = F::from_f64(number) };
                }
            }
        },
    );
}

/// What the backward multiplies the differences of one row with.
#[derive(Clone, Copy, Debug)]
pub struct Coefficients {
    pub innovation: f64,
    pub drift: f64,
    pub reference: f64,
}

/// `gradient = innovation (x' - mu) + drift (mu - mu°) + reference (mu - mu_ref)`, row by row.
///
/// A row whose coefficients are all 0 is written without being read. `only` drops the terms of a row whose
/// coefficient is 0 from a source, so that an infinity there cannot become 0 * inf.
pub fn gradient<F: Real, S: Source<F>>(
    coefficients: &(impl Fn(usize) -> Coefficients + Sync),
    only: &(impl Fn(Coefficients) -> S + Sync),
    plan: Plan,
    out: &ViewMut<'_>,
    threads: usize,
) {
    for_each(plan.tasks(), threads, <(Scratch<F>, Output<F>)>::default, |(scratch, output), task| {
        for stretch in plan.stretches(task) {
            let coefficients = coefficients(stretch.row);
            let source = only(coefficients);
            dispatch(GradientKernel { source: &source, stretch, coefficients, scratch, output, out });
        }
    });
}

/// One block of gradient before it is converted to the dtype of the mean.
struct Output<F>(Box<[F]>);

impl<F: Real> Default for Output<F> {
    fn default() -> Self {
        Output(vec![F::default(); BLOCK].into_boxed_slice())
    }
}

struct GradientKernel<'a, F, S> {
    source: &'a S,
    stretch: Stretch,
    coefficients: Coefficients,
    scratch: &'a mut Scratch<F>,
    output: &'a mut Output<F>,
    out: &'a ViewMut<'a>,
}

impl<F: Real, S: Source<F>> Kernel for GradientKernel<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Coefficients { innovation, drift, reference } = self.coefficients;
        let blocked = innovation == 0.0 && drift == 0.0 && reference == 0.0;
        let (a, b, c) = (F::from_f64(innovation), F::from_f64(drift), F::from_f64(reference));
        let Stretch { first, len, .. } = self.stretch;
        for offset in (0..len).step_by(BLOCK) {
            let (first, len) = (first + offset, BLOCK.min(len - offset));
            let direct = self.out.dtype() == F::DTYPE;
            let target = if direct {
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { self.out.part_mut::<F>(first, len) }
            } else {
                &mut self.output.0[..len]
            };
            if blocked {
                target.fill(F::default());
            } else {
                let block = self.source.block(first, len, self.scratch);
                for (index, target) in target.chunks_mut(LANES).enumerate() {
                    let moments = block.moments(index * LANES);
                    let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
                    let values: [F; LANES] =
                        std::array::from_fn(|lane| a.mul_add::<FMA>(u[lane], b.mul_add::<FMA>(e[lane], c * r[lane])));
                    match <&mut [F; LANES]>::try_from(&mut *target) {
                        Ok(full) => *full = values,
                        Err(_) => target.copy_from_slice(&values[..target.len()]),
                    }
                }
            }
            if !direct {
                // SAFETY: as above.
                unsafe { narrow(&self.output.0[..len], self.out, first) };
            }
        }
    }
}

/// d loss / d log_prob, one number a row.
pub fn log_prob_gradient<F: Real>(numbers: impl Iterator<Item = f64>, out: &mut ViewMut<'_>) {
    for (out, number) in out.slice_mut::<F>().iter_mut().zip(numbers) {
        *out = F::from_f64(number);
    }
}

/// A slice whose elements different threads write, each its own.
struct Disjoint<T>(*mut T, usize);

// SAFETY: only `write` touches the elements, and its contract keeps threads apart.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    fn new(slice: &mut [T]) -> Self {
        Disjoint(slice.as_mut_ptr(), slice.len())
    }

    /// # Safety
    /// No two threads write the same index, and the slice outlives this value.
    unsafe fn write(&self, index: usize, value: T) {
        assert!(index < self.1);
        // SAFETY: in range by the assertion, exclusive by the contract.
        unsafe { *self.0.add(index) = value }
    }
}

/// Reads one number of the `[FIELDS, rows]` block.
pub fn read_field<F: Real>(rows: &[F], count: usize, field: Field, row: usize) -> f64 {
    rows[field as usize * count + row].to_f64()
}
