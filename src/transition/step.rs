//! The source of `step_loss`: model outputs, samples, and the old policy in one of three forms.

use std::marker::PhantomData;

use super::schedule::{Schedule, Transition};
use super::{Block, Moments, Scratch, Source, lanes, padded};
use crate::cpu::simd::{BLOCK, LANES, Real, Storage, widen};
use crate::plan::Stretch;
use crate::tensor::{Dtype, Host, View};

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

impl Form {
    pub fn parse(name: &str) -> Option<Form> {
        match name {
            "mean" => Some(Form::Mean),
            "output" => Some(Form::Output),
            "residual" => Some(Form::Residual),
            _ => None,
        }
    }
}

/// What `step_loss` has beyond `loss`, but for the latents.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a, Space = Host> {
    pub schedule: Schedule<'a, Space>,
    pub old_form: Form,
    pub ref_form: Form,
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
    pub old: Option<View<'a>>,
    pub old_form: Form,
    pub reference: Option<View<'a>>,
    pub ref_form: Form,
    /// One a row.
    pub rows: &'a [Coefficients],
}

impl Outputs<'_> {
    /// The dtypes of the model outputs, of the samples, and of the other policies, where each is one. Without other
    /// policies the last is that of the samples.
    fn dtypes(&self) -> Option<(Dtype, Dtype, Dtype)> {
        let (output, sample) = (self.output.dtype(), self.sample.dtype());
        let other = self.old.or(self.reference).map_or(sample, |view| view.dtype());
        let fits = |view: Option<View<'_>>, dtype| view.is_none_or(|view| view.dtype() == dtype);
        let uniform = fits(self.uncond_output, output) && fits(self.prev_sample, sample) && fits(self.reference, other);
        uniform.then_some((output, sample, other))
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
        use std::marker::PhantomData;
        use $crate::tensor::{Bf16, F16};
        use $crate::transition::step::{Combination, Outputs, OutputsOf};
        let outputs: Outputs<'_> = $outputs;
        macro_rules! run {
            ($output:ty, $sample:ty, $other:ty) => {{
                let $source = OutputsOf(outputs, PhantomData::<($output, $sample, $other)>);
                $body
            }};
        }
        match outputs.combination() {
            Combination::Float32 => run!(f32, f32, f32),
            Combination::Bfloat16 => run!(Bf16, Bf16, Bf16),
            Combination::OldMean => run!(Bf16, f32, f32),
            Combination::OldOutput => run!(Bf16, f32, Bf16),
            Combination::OldResidual => run!(Bf16, f32, F16),
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
        let from_next = old.is_some() && self.old_form == Form::Residual;
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
        let [b0, b1, b2, b3, b4, b5] = &mut *scratch.0;
        OutputsBlock {
            output: widen(self.output, first, len, b0),
            uncond: widen_if(self.uncond_output, first, len, b1),
            sample: widen(self.sample, first, len, b2),
            next: widen_if(self.prev_sample, first, len, b3),
            old: widen_if(self.old, first, len, b4),
            old_form: self.old_form,
            reference: widen_if(self.reference, first, len, b5),
            ref_form: self.ref_form,
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
        let Outputs { output, uncond_output, sample, prev_sample, old, old_form, reference, ref_form, rows } = self.0;
        OutputsBlock {
            output: output.slice(first, len),
            uncond: uncond_output.map(|view| view.slice(first, len)),
            sample: sample.slice(first, len),
            next: prev_sample.map(|view| view.slice(first, len)),
            old: old.map(|view| view.slice(first, len)),
            old_form,
            reference: reference.map(|view| view.slice(first, len)),
            ref_form,
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
    old: Option<&'a [O]>,
    old_form: Form,
    reference: Option<&'a [O]>,
    ref_form: Form,
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
        if let Some(old) = self.old {
            let unread = self.row.deterministic && self.old_form == Form::Residual;
            moments.drift = point.drift(self.old_form, if unread { zeros } else { read::<O, F, FMA, TAIL>(old, at) });
        }
        if let Some(reference) = self.reference {
            moments.ref_drift = point.drift(self.ref_form, read::<O, F, FMA, TAIL>(reference, at));
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
