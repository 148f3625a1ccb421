//! `policy_loss` on the CPU: row sums over a source, the objective, and the streaming backward.
//!
//! in  latents `[rows, numel]`, contiguous, any dtype each; row vectors.  out `Field` x rows, batch numbers, gradients.
//! Sums are float32 (float64 for float64 latents) over `BLOCK` elements in `LANES` interleaved lanes, then float64 over
//! lanes, blocks and chunks, always in the same order: the bits depend on neither thread count nor schedule.

use super::simd::{BLOCK, Kernel, LANES, Real, Storage, dispatch, narrow};
use super::threads::for_each;
use crate::objective::{Field, Problem, Row, Sums, fields};
use crate::plan::{CHUNK, Plan, Stretch};
use crate::tensor::{Element, Host, ViewMut};
use crate::transition::{Block, Moments, Scratch, Source};

/// Sums over every row's latents.
pub fn row_sums<F: Real, S: Source<F>>(source: &S, plan: Plan, threads: usize) -> Vec<Sums> {
    let mut partials = vec![Sums::default(); plan.partials()];
    {
        let partials = Disjoint::new(&mut partials);
        for_each(plan.tasks(), threads, Scratch::<F>::default, |scratch, task| {
            for stretch in plan.stretches(task) {
                let sums = stretch_sums(source, stretch, scratch);
                // SAFETY: every stretch has its own partial, and every task runs once.
                unsafe { partials.write(stretch.partial, sums) };
            }
        });
    }
    if plan.chunks_per_row == 1 {
        return partials;
    }
    partials.chunks(plan.chunks_per_row).map(|chunks| chunks.iter().fold(Sums::default(), Sums::plus)).collect()
}

fn stretch_sums<F: Real, S: Source<F>>(source: &S, stretch: Stretch, scratch: &mut Scratch<F>) -> Sums {
    if source.has_reference() {
        dispatch(SumKernel::<_, _, true> { source, stretch, scratch })
    } else {
        dispatch(SumKernel::<_, _, false> { source, stretch, scratch })
    }
}

/// Without `REF` a quarter of the arithmetic is left out, which is what bfloat16 waits for; float32 waits for memory.
struct SumKernel<'a, F, S, const REF: bool> {
    source: &'a S,
    stretch: Stretch,
    scratch: &'a mut Scratch<F>,
}

impl<F: Real, S: Source<F>, const REF: bool> Kernel for SumKernel<'_, F, S, REF> {
    type Output = Sums;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Sums {
        let SumKernel { source, stretch, scratch } = self;
        // Lane by lane to the end: adding up 32 lanes in every block would cost a fifth of the time.
        let mut total = LaneSums::<f64>::default();
        for part in stretch.parts(BLOCK) {
            let block = source.block(part, scratch);
            let mut sums = LaneSums::<F>::default();
            // The tail stands apart: a call inside the loop would push the sums out of their registers, every time.
            let full = block.elements() / LANES * LANES;
            for at in (0..full).step_by(LANES) {
                sums = sums.plus::<FMA, REF>(block.moments::<FMA>(at));
            }
            if full < block.elements() {
                sums = sums.plus::<FMA, REF>(block.tail::<FMA>(full));
            }
            for lane in 0..LANES {
                total.q[lane] += sums.q[lane].to_f64();
                total.d[lane] += sums.d[lane].to_f64();
                total.cross[lane] += sums.cross[lane].to_f64();
                total.f[lane] += sums.f[lane].to_f64();
            }
        }
        Sums {
            q: total.q.iter().sum(),
            d: total.d.iter().sum(),
            cross: total.cross.iter().sum(),
            f: total.f.iter().sum(),
        }
    }
}

/// Running sums, one per lane.
#[derive(Clone, Copy, Default)]
struct LaneSums<F> {
    q: [F; LANES],
    d: [F; LANES],
    cross: [F; LANES],
    f: [F; LANES],
}

impl<F: Real> LaneSums<F> {
    /// By value: through a reference every sum would be stored to memory in every round.
    #[inline(always)]
    fn plus<const FMA: bool, const REF: bool>(mut self, moments: Moments<F>) -> Self {
        let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
        for lane in 0..LANES {
            self.q[lane] = u[lane].mul_add::<FMA>(u[lane], self.q[lane]);
            self.d[lane] = e[lane].mul_add::<FMA>(e[lane], self.d[lane]);
            self.cross[lane] = e[lane].mul_add::<FMA>(u[lane], self.cross[lane]);
            if REF {
                self.f[lane] = r[lane].mul_add::<FMA>(r[lane], self.f[lane]);
            }
        }
        self
    }
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
                // SAFETY: tasks own disjoint rows.
                unsafe { write_row::<F>(problem, problem.row(row, sums, guard), row, rows) };
            }
        },
    );
}

/// # Safety
/// Nobody else writes this row.
unsafe fn write_row<F: Real>(problem: &Problem<'_>, numbers: Row, row: usize, out: &ViewMut<'_>) {
    for (field, number) in numbers.into_iter().take(fields(problem.step.is_some())).enumerate() {
        // SAFETY: passed on from the caller; the fields of a row are apart from those of all others.
        unsafe { out.part_mut::<F>(field * problem.rows + row, 1)[0] = F::from_f64(number) };
    }
}

/// `row_sums`, `row_objective` and `gradient` (for a `grad_loss` of 1) row by row, and with the same bits: a row's mean
/// and sample come from the cache when the gradient reads them. `divisor` is that of the batch, known beforehand.
pub fn rows_with_gradient<F: Real, S: Source<F>>(
    problem: &Problem<'_>,
    source: &S,
    plan: Plan,
    divisor: f64,
    numbers: &ViewMut<'_>,
    targets: &Targets<'_>,
    threads: usize,
) {
    let guard = problem.guard_scale();
    for_each(plan.row_tasks(), threads, <(Scratch<F>, Output<S::Gradient>)>::default, |(scratch, output), task| {
        for row in plan.rows_of(task) {
            let sums = plan
                .stretches_of(row)
                .fold(Sums::default(), |total, stretch| total.plus(&stretch_sums(source, stretch, scratch)));
            let row_numbers = problem.row(row, sums, guard);
            // SAFETY: tasks own disjoint rows.
            unsafe { write_row::<F>(problem, row_numbers, row, numbers) };
            let stored = |field: Field| F::from_f64(row_numbers[field as usize]).to_f64();
            let coefficients = Coefficients {
                innovation: stored(Field::CoefInnovation) / divisor,
                drift: stored(Field::CoefDrift) / divisor,
                reference: stored(Field::CoefRef),
                guidance: if problem.step.is_some() { stored(Field::StepGuidance) } else { 1.0 },
            };
            row_gradient(source, plan.stretches_of(row), coefficients, scratch, output, targets);
        }
    });
}

/// What the backward multiplies the differences of one row with.
#[derive(Clone, Copy, Debug)]
pub struct Coefficients {
    pub innovation: f64,
    pub drift: f64,
    pub reference: f64,
    /// What the output's gradient is multiplied with; the unconditional output's with 1 less this.
    pub guidance: f64,
}

impl Coefficients {
    fn times(self, factor: f64) -> Self {
        // A coefficient of 0 stays 0, whatever it is multiplied with.
        let scaled = |coefficient: f64| if coefficient == 0.0 { 0.0 } else { coefficient * factor };
        Coefficients {
            innovation: scaled(self.innovation),
            drift: scaled(self.drift),
            reference: scaled(self.reference),
            ..self
        }
    }
}

/// Where gradients go, each in the dtype of what it belongs to.
#[derive(Default)]
pub struct Targets<'a, Space = Host> {
    /// Of `prev_sample_mean` or `model_output`, `[rows, numel]`.
    pub output: Option<ViewMut<'a, Space>>,
    pub uncond_output: Option<ViewMut<'a, Space>>,
}

impl Targets<'_> {
    /// With the factors of a row.
    fn of_row(&self, guidance: f64) -> impl Iterator<Item = (&ViewMut<'_>, f64)> {
        let pair = [(&self.output, guidance), (&self.uncond_output, 1.0 - guidance)];
        pair.into_iter().filter_map(|(view, factor)| Some((view.as_ref()?, factor)))
    }
}

/// `gradient = innovation (x' - mu) + drift (mu - mu°) + reference (mu - mu_ref)`, row by row.
///
/// A row whose coefficients are all 0 is written without being read, and a term whose coefficient is 0 is dropped from
/// the source, so that an infinity there cannot become 0 * inf.
pub fn gradient<F: Real, S: Source<F>>(
    source: &S,
    coefficients: &(impl Fn(usize) -> Coefficients + Sync),
    plan: Plan,
    targets: &Targets<'_>,
    threads: usize,
) {
    for_each(plan.tasks(), threads, <(Scratch<F>, Output<S::Gradient>)>::default, |(scratch, output), task| {
        for stretch in plan.stretches(task) {
            row_gradient(source, [stretch], coefficients(stretch.row), scratch, output, targets);
        }
    });
}

/// Of stretches of one row.
fn row_gradient<F: Real, S: Source<F>>(
    source: &S,
    stretches: impl IntoIterator<Item = Stretch>,
    coefficients: Coefficients,
    scratch: &mut Scratch<F>,
    output: &mut Output<S::Gradient>,
    targets: &Targets<'_>,
) {
    let Coefficients { innovation, drift, reference, guidance } = coefficients;
    let source = &source.only(innovation != 0.0, drift != 0.0, reference != 0.0);
    for stretch in stretches {
        for (out, factor) in targets.of_row(guidance) {
            let (coefficients, scratch, output) = (coefficients.times(factor), &mut *scratch, &mut *output);
            if drift == 0.0 && reference == 0.0 {
                dispatch(GradientKernel::<_, _, false> { source, stretch, coefficients, scratch, output, out });
            } else {
                dispatch(GradientKernel::<_, _, true> { source, stretch, coefficients, scratch, output, out });
            }
        }
    }
}

/// One block of gradient before it is converted to the dtype that it is wanted in.
struct Output<T>(Box<[T]>);

impl<T: Storage> Default for Output<T> {
    fn default() -> Self {
        Output(vec![T::default(); BLOCK].into_boxed_slice())
    }
}

/// Without `ALL`, the innovation's term alone: what FlowDPPO and FlowGRPO have, and half the arithmetic.
struct GradientKernel<'a, F: Real, S: Source<F>, const ALL: bool> {
    source: &'a S,
    stretch: Stretch,
    coefficients: Coefficients,
    scratch: &'a mut Scratch<F>,
    output: &'a mut Output<S::Gradient>,
    out: &'a ViewMut<'a>,
}

impl<F: Real, S: Source<F>, const ALL: bool> Kernel for GradientKernel<'_, F, S, ALL> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Coefficients { innovation, drift, reference, .. } = self.coefficients;
        let blocked = innovation == 0.0 && drift == 0.0 && reference == 0.0;
        let factors = [F::from_f64(innovation), F::from_f64(drift), F::from_f64(reference)];
        let direct = self.out.dtype() == S::Gradient::DTYPE;
        for part in self.stretch.parts(BLOCK) {
            let Stretch { first, len, .. } = part;
            let target: &mut [S::Gradient] = if direct {
                // SAFETY: stretches do not overlap, and every task runs once.
                unsafe { self.out.part_mut(first, len) }
            } else {
                &mut self.output.0[..len]
            };
            if blocked {
                target.fill(S::Gradient::default());
            } else {
                let block = self.source.block(part, self.scratch);
                let full = len / LANES * LANES;
                for at in (0..full).step_by(LANES) {
                    combine::<F, _, FMA, ALL>(factors, block.moments::<FMA>(at), &mut target[at..at + LANES]);
                }
                if full < len {
                    combine::<F, _, FMA, ALL>(factors, block.tail::<FMA>(full), &mut target[full..]);
                }
            }
            if !direct {
                let values = &self.output.0[..len];
                // SAFETY: as above.
                unsafe { narrow(values, self.out, first) };
            }
        }
    }
}

#[inline(always)]
fn combine<F: Real, T: Storage, const FMA: bool, const ALL: bool>(
    [a, b, c]: [F; 3],
    moments: Moments<F>,
    target: &mut [T],
) {
    let (u, e, r) = (moments.innovation, moments.drift, moments.ref_drift);
    for (lane, target) in target.iter_mut().enumerate() {
        let gradient =
            if ALL { a.mul_add::<FMA>(u[lane], b.mul_add::<FMA>(e[lane], c * r[lane])) } else { a * u[lane] };
        *target = T::store(gradient);
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
