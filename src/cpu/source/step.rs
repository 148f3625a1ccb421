//! The source of `step_loss`: model outputs, samples, and the old policy in one of three forms.

use std::marker::PhantomData;

use super::{Block, Moments, Scratch, Source, common_dtype, lanes, padded};
use crate::call::{Dtype, Latent, Latents};
use crate::cpu::memory::{Host, View};
use crate::cpu::schedule::Transition;
use crate::cpu::simd::{BLOCK, LANES, Real, Storage, widen};
use crate::plan::Stretch;

/// What another policy's latents hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Its mean, `mu°`.
    Mean,
    /// Its model output, `v°`, after guidance.
    Output,
    /// `(x' - mu°) / std`
    Residual,
}

/// Another policy, in the form that it came in.
#[derive(Clone, Copy)]
pub struct Policy<'a> {
    view: View<'a>,
    form: Form,
}

/// A row's coefficients as the inner loops need them.
#[derive(Clone, Copy, Debug)]
pub struct Coefficients {
    pub a: f64,
    pub b: f64,
    pub std: f64,
    pub guidance: f64,
}

impl From<Transition> for Coefficients {
    fn from(step: Transition) -> Self {
        Coefficients { a: step.a, b: step.b, std: step.std, guidance: step.guidance }
    }
}

/// Model outputs and samples of any dtypes; what is absent is not read, and its difference is 0.
#[derive(Clone, Copy)]
pub struct Outputs<'a> {
    pub output: View<'a>,
    /// With guidance.
    pub uncond_output: Option<View<'a>>,
    pub sample: View<'a>,
    pub prev_sample: Option<View<'a>>,
    pub old: Option<Policy<'a>>,
    pub reference: Option<Policy<'a>>,
    /// One a row.
    pub rows: &'a [Coefficients],
}

impl<'a> Outputs<'a> {
    /// Of latents of `len` elements; None without a model output and its sample.
    pub fn new(latents: Host<'a, Latents>, len: usize, rows: &'a [Coefficients]) -> Option<Self> {
        let policy = |form, of: fn(&Latents) -> &Latent| latents.view(of, len).map(|view| Policy { view, form });
        Some(Outputs {
            output: latents.view(|latents| &latents.model_output, len)?,
            uncond_output: latents.view(|latents| &latents.uncond_output, len),
            sample: latents.view(|latents| &latents.sample, len)?,
            prev_sample: latents.view(|latents| &latents.prev_sample, len),
            old: policy(Form::Mean, |latents| &latents.old_prev_sample_mean)
                .or_else(|| policy(Form::Output, |latents| &latents.old_model_output))
                .or_else(|| policy(Form::Residual, |latents| &latents.old_residual)),
            reference: policy(Form::Mean, |latents| &latents.ref_prev_sample_mean)
                .or_else(|| policy(Form::Output, |latents| &latents.ref_model_output)),
            rows,
        })
    }

    /// The dtypes of the model outputs, of the samples, and of the other policies, where each is one. Without other
    /// policies the last is that of the samples.
    fn dtypes(&self) -> Option<(Dtype, Dtype, Dtype)> {
        let others = [self.old, self.reference].map(|policy| policy.map(|policy| policy.view));
        let sample = common_dtype([Some(self.sample), self.prev_sample])?;
        let other = if others.iter().all(Option::is_none) { sample } else { common_dtype(others)? };
        Some((common_dtype([Some(self.output), self.uncond_output])?, sample, other))
    }

    pub fn combination(&self) -> Combination {
        match self.dtypes() {
            Some((Dtype::F32, Dtype::F32, Dtype::F32)) => Combination::Float32,
            Some((Dtype::Bf16, Dtype::Bf16, Dtype::Bf16)) => Combination::Bfloat16,
            Some((Dtype::Bf16, Dtype::F32, Dtype::F32)) => Combination::OldMean,
            Some((Dtype::Bf16, Dtype::F32, Dtype::Bf16)) => Combination::OldOutput,
            Some((Dtype::Bf16, Dtype::F32, Dtype::F16)) => Combination::OldResidual,
            _ => Combination::Any,
        }
    }
}

/// Dtypes that have a loop of their own: all one, or bfloat16 model outputs, float32 samples, and the old policy as
/// float32 mean, bfloat16 model output or float16 residual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combination {
    Float32,
    Bfloat16,
    OldMean,
    OldOutput,
    OldResidual,
    Any,
}

/// The same of known dtypes (model outputs, samples, other policies): converted on the way to the registers.
#[derive(Clone, Copy)]
pub struct OutputsOf<'a, V, X, O>(pub Outputs<'a>, pub PhantomData<(V, X, O)>);

/// Runs `$body` with `$source` bound to the fastest source of `$outputs`.
macro_rules! with_outputs {
    ($outputs:expr, $source:ident => $body:expr) => {{
        use half::{bf16, f16};
        use std::marker::PhantomData;
        use $crate::cpu::source::step::{Combination, Outputs, OutputsOf};
        let outputs: Outputs<'_> = $outputs;
        macro_rules! run {
            ($output:ty, $sample:ty, $other:ty) => {{
                let $source = OutputsOf(outputs, PhantomData::<($output, $sample, $other)>);
                $body
            }};
        }
        match outputs.combination() {
            Combination::Float32 => run!(f32, f32, f32),
            Combination::Bfloat16 => run!(bf16, bf16, bf16),
            Combination::OldMean => run!(bf16, f32, f32),
            Combination::OldOutput => run!(bf16, f32, bf16),
            Combination::OldResidual => run!(bf16, f32, f16),
            Combination::Any => {
                let $source = outputs;
                $body
            }
        }
    }};
}
pub(crate) use with_outputs;

impl<F: Real> Source<F> for Outputs<'_> {
    type Block<'a>
        = OutputsBlock<'a, F, F, F, F>
    where
        Self: 'a,
        F: 'a;
    type Gradient = F;

    fn has_reference(&self) -> bool {
        self.reference.is_some()
    }

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        let old = self.old.filter(|_| drift);
        // The drift from a residual is measured from x'.
        let from_next = old.is_some_and(|old| old.form == Form::Residual);
        Outputs {
            prev_sample: self.prev_sample.filter(|_| innovation || from_next),
            old,
            reference: self.reference.filter(|_| ref_drift),
            ..*self
        }
    }

    #[inline(always)]
    fn block<'a>(&'a self, part: Stretch, scratch: &'a mut Scratch<F>) -> Self::Block<'a> {
        let Stretch { row, first, len, .. } = part;
        let [b0, b1, b2, b3, b4, b5] = scratch.buffers();
        OutputsBlock {
            output: widen(self.output, first, len, b0),
            uncond: widen_if(self.uncond_output, first, len, b1),
            sample: widen(self.sample, first, len, b2),
            next: widen_if(self.prev_sample, first, len, b3),
            old: widen_policy(self.old, first, len, b4),
            reference: widen_policy(self.reference, first, len, b5),
            row: RowOf::new(self.rows[row]),
        }
    }
}

#[inline(always)]
fn widen_if<'a, F: Real>(
    view: Option<View<'a>>,
    first: usize,
    len: usize,
    buffer: &'a mut [F; BLOCK],
) -> Option<&'a [F]> {
    match view {
        Some(view) => Some(widen(view, first, len, buffer)),
        None => None,
    }
}

#[inline(always)]
fn widen_policy<'a, F: Real>(
    policy: Option<Policy<'a>>,
    first: usize,
    len: usize,
    buffer: &'a mut [F; BLOCK],
) -> Option<(Form, &'a [F])> {
    match policy {
        Some(Policy { view, form }) => Some((form, widen(view, first, len, buffer))),
        None => None,
    }
}

impl<F: Real, V: Storage, X: Storage, O: Storage> Source<F> for OutputsOf<'_, V, X, O> {
    type Block<'a>
        = OutputsBlock<'a, V, X, O, F>
    where
        Self: 'a,
        F: 'a;
    type Gradient = V;

    fn has_reference(&self) -> bool {
        self.0.reference.is_some()
    }

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        OutputsOf(Source::<F>::only(&self.0, innovation, drift, ref_drift), PhantomData)
    }

    #[inline(always)]
    fn block<'a>(&'a self, part: Stretch, _: &'a mut Scratch<F>) -> Self::Block<'a> {
        let Stretch { row, first, len, .. } = part;
        let Outputs { output, uncond_output, sample, prev_sample, old, reference, rows } = self.0;
        OutputsBlock {
            output: output.slice(first, len),
            uncond: uncond_output.map(|view| view.slice(first, len)),
            sample: sample.slice(first, len),
            next: prev_sample.map(|view| view.slice(first, len)),
            old: old.map(|Policy { view, form }| (form, view.slice(first, len))),
            reference: reference.map(|Policy { view, form }| (form, view.slice(first, len))),
            row: RowOf::new(rows[row]),
        }
    }
}

/// `Coefficients` in the arithmetic type.
#[derive(Clone, Copy)]
struct RowOf<F> {
    a: F,
    b: F,
    guidance: F,
    /// What residuals are measured in: the standard deviation, or 1 in a deterministic row, whose residuals are not read
    /// and count as 0 (the old mean was x' itself).
    unit: F,
    inverse_unit: F,
    deterministic: bool,
}

impl<F: Real> RowOf<F> {
    #[inline(always)]
    fn new(row: Coefficients) -> Self {
        let unit = if row.std == 0.0 { 1.0 } else { row.std };
        RowOf {
            a: F::from_f64(row.a),
            b: F::from_f64(row.b),
            guidance: F::from_f64(row.guidance),
            unit: F::from_f64(unit),
            inverse_unit: F::from_f64(1.0 / unit),
            deterministic: row.std == 0.0,
        }
    }
}

pub struct OutputsBlock<'a, V, X, O, F> {
    output: &'a [V],
    uncond: Option<&'a [V]>,
    sample: &'a [X],
    next: Option<&'a [X]>,
    old: Option<(Form, &'a [O])>,
    reference: Option<(Form, &'a [O])>,
    row: RowOf<F>,
}

impl<F: Real, V: Storage, X: Storage, O: Storage> Block<F> for OutputsBlock<'_, V, X, O, F> {
    #[inline(always)]
    fn elements(&self) -> usize {
        self.output.len()
    }

    #[inline(always)]
    fn moments<const FMA: bool>(&self, at: usize) -> Moments<F> {
        self.differences::<FMA, false>(at)
    }

    #[inline(always)]
    fn tail<const FMA: bool>(&self, at: usize) -> Moments<F> {
        self.differences::<FMA, true>(at)
    }
}

impl<F: Real, V: Storage, X: Storage, O: Storage> OutputsBlock<'_, V, X, O, F> {
    /// The branches are the same for the whole row.
    #[inline(always)]
    fn differences<const FMA: bool, const TAIL: bool>(&self, at: usize) -> Moments<F> {
        let mut velocity = read::<V, F, FMA, TAIL>(self.output, at);
        if let Some(uncond) = self.uncond {
            velocity = guided::<F, FMA>(velocity, read::<V, F, FMA, TAIL>(uncond, at), self.row.guidance);
        }
        let mean = mean::<F, FMA>(self.row.a, self.row.b, velocity, read::<X, F, FMA, TAIL>(self.sample, at));
        let mut point = Point { velocity, mean, innovation: [F::default(); LANES], row: self.row };
        if let Some(next) = self.next {
            point.innovation = minus(read::<X, F, FMA, TAIL>(next, at), mean);
        }
        let zeros = [F::default(); LANES];
        let mut moments = Moments { innovation: point.innovation, drift: zeros, ref_drift: zeros };
        if let Some((form, old)) = self.old {
            let unread = self.row.deterministic && form == Form::Residual;
            moments.drift = point.drift(form, if unread { zeros } else { read::<O, F, FMA, TAIL>(old, at) });
        }
        if let Some((form, reference)) = self.reference {
            moments.ref_drift = point.drift(form, read::<O, F, FMA, TAIL>(reference, at));
        }
        moments
    }
}

#[inline(always)]
fn read<T: Storage, F: Real, const FMA: bool, const TAIL: bool>(values: &[T], at: usize) -> [F; LANES] {
    if TAIL { padded(values, at) } else { lanes::<T, F, FMA>(values, at) }
}

#[inline(always)]
fn minus<F: Real>(mut left: [F; LANES], right: [F; LANES]) -> [F; LANES] {
    for lane in 0..LANES {
        left[lane] = left[lane] - right[lane];
    }
    left
}

/// `uncond + scale (output - uncond)`
#[inline(always)]
pub fn guided<F: Real, const FMA: bool>(output: [F; LANES], uncond: [F; LANES], scale: F) -> [F; LANES] {
    let mut out = output;
    for lane in 0..LANES {
        out[lane] = scale.mul_add::<FMA>(output[lane] - uncond[lane], uncond[lane]);
    }
    out
}

/// `a x + b v`. Means recorded by `sde_step` come from here as well, so that drifts from them are exactly 0 on policy.
#[inline(always)]
pub fn mean<F: Real, const FMA: bool>(a: F, b: F, velocity: [F; LANES], sample: [F; LANES]) -> [F; LANES] {
    let mut out = velocity;
    for lane in 0..LANES {
        out[lane] = b.mul_add::<FMA>(velocity[lane], a * sample[lane]);
    }
    out
}

/// `LANES` elements of the policy that is trained.
struct Point<F> {
    velocity: [F; LANES],
    mean: [F; LANES],
    innovation: [F; LANES],
    row: RowOf<F>,
}

impl<F: Real> Point<F> {
    /// `mu - mu°`, as a difference of the quantity that the other policy was stored as: exactly 0 where that is equal.
    #[inline(always)]
    fn drift(&self, form: Form, other: [F; LANES]) -> [F; LANES] {
        let Point { velocity, mean, innovation, row } = *self;
        match form {
            Form::Mean => minus(mean, other),
            Form::Output => scaled(row.b, minus(velocity, other)),
            // mu - mu° = unit other - innovation
            Form::Residual => scaled(row.unit, minus(other, scaled(row.inverse_unit, innovation))),
        }
    }
}

#[inline(always)]
fn scaled<F: Real>(factor: F, mut values: [F; LANES]) -> [F; LANES] {
    for value in &mut values {
        *value = factor * *value;
    }
    values
}
