//! The source of `step_loss`: model outputs, samples, and the old policy in one of three forms.

use std::marker::PhantomData;

use super::{Moments, Source, elements_if, minus, read};
use crate::call::{Latent, Latents};
use crate::cpu::memory::{Host, View};
use crate::cpu::simd::{Buffer, LANES, Real, Storage};
use crate::plan::Stretch;

/// How another policy is stored: mean `mu°`, model output `v°` after guidance, or residual `(x' - mu°) / std`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    Mean,
    Output,
    Residual,
}

/// A row's `mu = a x + b v` with `v = uncond + guidance (output - uncond)`, in the arithmetic type.
#[derive(Clone, Copy)]
pub struct StepRow<F> {
    pub a: F,
    pub b: F,
    pub guidance: F,
    /// `x' - mu° = unit residual`: std, or 1 in a deterministic row, whose residuals count as 0 and are not read.
    unit: F,
    inverse_unit: F,
    deterministic: bool,
}

impl<F: Real> StepRow<F> {
    pub fn new(a: f64, b: f64, std: f64, guidance: f64) -> Self {
        let unit = if std == 0.0 { 1.0 } else { std };
        StepRow {
            a: F::from_f64(a),
            b: F::from_f64(b),
            guidance: F::from_f64(guidance),
            unit: F::from_f64(unit),
            inverse_unit: F::from_f64(1.0 / unit),
            deterministic: std == 0.0,
        }
    }
}

/// Model outputs are read as `V`, samples as `X`, other policies as `O`. An absent one's difference is 0.
#[derive(Clone, Copy)]
pub struct Outputs<'a, F, V, X, O> {
    output: View<'a>,
    uncond: Option<View<'a>>,
    sample: View<'a>,
    next: Option<View<'a>>,
    old: Option<(Form, View<'a>)>,
    reference: Option<(Form, View<'a>)>,
    rows: &'a [StepRow<F>],
    read_as: PhantomData<(V, X, O)>,
}

impl<'a, F, V, X, O> Outputs<'a, F, V, X, O> {
    /// Of latents of `len` elements; None without a model output and its sample.
    pub fn new(latents: Host<'a, Latents>, len: usize, rows: &'a [StepRow<F>]) -> Option<Self> {
        let policy = |form, of: fn(&Latents) -> Latent| latents.view(of, len).map(|view| (form, view));
        Some(Outputs {
            output: latents.view(|latents| latents.model_output, len)?,
            uncond: latents.view(|latents| latents.uncond_output, len),
            sample: latents.view(|latents| latents.sample, len)?,
            next: latents.view(|latents| latents.prev_sample, len),
            old: policy(Form::Mean, |latents| latents.old_prev_sample_mean)
                .or_else(|| policy(Form::Output, |latents| latents.old_model_output))
                .or_else(|| policy(Form::Residual, |latents| latents.old_residual)),
            reference: policy(Form::Mean, |latents| latents.ref_prev_sample_mean)
                .or_else(|| policy(Form::Output, |latents| latents.ref_model_output)),
            rows,
            read_as: PhantomData,
        })
    }
}

pub struct OutputsBlock<'a, F, V, X, O> {
    output: &'a [V],
    uncond: Option<&'a [V]>,
    sample: &'a [X],
    next: Option<&'a [X]>,
    old: Option<(Form, &'a [O])>,
    reference: Option<(Form, &'a [O])>,
    row: StepRow<F>,
}

impl<F: Real, V: Storage, X: Storage, O: Storage> Source<F> for Outputs<'_, F, V, X, O> {
    type Block<'a>
        = OutputsBlock<'a, F, V, X, O>
    where
        Self: 'a;
    type Scratch = ([Buffer<V>; 2], [Buffer<X>; 2], [Buffer<O>; 2]);
    type Gradient = V;

    fn only(&self, innovation: bool, drift: bool, ref_drift: bool) -> Self {
        let old = self.old.filter(|_| drift);
        // A drift from a residual is computed from x'.
        let from_next = old.is_some_and(|(form, _)| form == Form::Residual);
        Outputs {
            next: self.next.filter(|_| innovation || from_next),
            old,
            reference: self.reference.filter(|_| ref_drift),
            ..*self
        }
    }

    #[inline(always)]
    fn block<'a>(&'a self, part: Stretch, scratch: &'a mut Self::Scratch) -> Self::Block<'a> {
        let ([b0, b1], [b2, b3], [b4, b5]) = scratch;
        OutputsBlock {
            output: V::elements(self.output, part, b0),
            uncond: elements_if(self.uncond, part, b1),
            sample: X::elements(self.sample, part, b2),
            next: elements_if(self.next, part, b3),
            old: policy_elements(self.old, part, b4),
            reference: policy_elements(self.reference, part, b5),
            row: self.rows[part.row],
        }
    }

    /// All branches go the same way in a whole row.
    #[inline(always)]
    fn moments<const FMA: bool, const TAIL: bool>(block: &OutputsBlock<'_, F, V, X, O>, at: usize) -> Moments<F> {
        let OutputsBlock { output, uncond, sample, next, old, reference, row } = *block;
        let zeros = [F::default(); LANES];
        let (velocity, mean) = velocity_and_mean::<F, V, X, FMA, TAIL>(output, uncond, sample, row, at);
        let mut point = Point { velocity, mean, innovation: zeros, row };
        if let Some(next) = next {
            point.innovation = minus(read::<X, F, FMA, TAIL>(next, at), mean);
        }
        let mut moments = Moments { innovation: point.innovation, drift: zeros, ref_drift: zeros };
        if let Some((form, old)) = old {
            let unread = row.deterministic && form == Form::Residual;
            moments.drift = point.drift(form, if unread { zeros } else { read::<O, F, FMA, TAIL>(old, at) });
        }
        if let Some((form, reference)) = reference {
            moments.ref_drift = point.drift(form, read::<O, F, FMA, TAIL>(reference, at));
        }
        moments
    }
}

#[inline(always)]
fn policy_elements<'a, T: Storage>(
    policy: Option<(Form, View<'a>)>, part: Stretch, buffer: &'a mut Buffer<T>,
) -> Option<(Form, &'a [T])> {
    match policy {
        Some((form, view)) => Some((form, T::elements(view, part, buffer))),
        None => None,
    }
}

/// `v = uncond + guidance (output - uncond)` and `mu = a x + b v`. `sde_step` computes its means here too, so that the
/// drift from a recorded mean is exactly 0 on policy.
#[inline(always)]
pub fn velocity_and_mean<F: Real, V: Storage, X: Storage, const FMA: bool, const TAIL: bool>(
    output: &[V], uncond: Option<&[V]>, sample: &[X], row: StepRow<F>, at: usize,
) -> ([F; LANES], [F; LANES]) {
    let mut velocity = read::<V, F, FMA, TAIL>(output, at);
    if let Some(uncond) = uncond {
        let uncond = read::<V, F, FMA, TAIL>(uncond, at);
        for lane in 0..LANES {
            velocity[lane] = row.guidance.mul_add::<FMA>(velocity[lane] - uncond[lane], uncond[lane]);
        }
    }
    let mut mean = read::<X, F, FMA, TAIL>(sample, at);
    for lane in 0..LANES {
        mean[lane] = row.b.mul_add::<FMA>(velocity[lane], row.a * mean[lane]);
    }
    (velocity, mean)
}

/// `LANES` elements of the trained policy.
struct Point<F> {
    velocity: [F; LANES],
    mean: [F; LANES],
    innovation: [F; LANES],
    row: StepRow<F>,
}

impl<F: Real> Point<F> {
    /// `mu - mu°` as a difference of what the other policy is stored as: exactly 0 where both are equal.
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
