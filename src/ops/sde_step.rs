//! `sde_step`: the operator behind `sde_step`, one stochastic denoising step drawn or scored.
//!
//! Shapes and dtypes were checked in Python, where the messages can name the user's arguments; what is checked here is
//! what memory safety and the formulas rest on.

use std::f64::consts::PI;

use super::policy_loss::refuse_float64_in;
use crate::cpu::sde_step as cpu;
use crate::cpu::simd::Real;
use crate::cuda::launch::Target;
use crate::cuda::sde_step::{self as gpu, Workspace};
use crate::error::Error;
use crate::plan::Plan;
use crate::tensor::{Dtype, Gpu, Host, View, ViewMut};
use crate::transition::schedule::{Sampler, Schedule};

/// Rows of `numbers`, which the backward reads, in order; twin of the enum in kernels/sde_step.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// d log_prob / d mu_j = LogProb (x'_j - mu_j); 0 where the step is deterministic.
    LogProb,
    /// d mu / d v
    Velocity,
    /// d v / d model_output; 1 without guidance.
    Guidance,
}

pub const NUMBERS: usize = 3;

/// Where the next latent comes from.
#[derive(Clone, Copy, Debug)]
pub enum Next<'a, Space = Host> {
    /// Scored as it is, once it is rounded to the dtype of the sample.
    Given(View<'a, Space>),
    /// Standard normal: `x' = mu + std noise`.
    Noise(View<'a, Space>),
}

impl<'a, Space: Copy> Next<'a, Space> {
    pub fn view(&self) -> View<'a, Space> {
        match *self {
            Next::Given(view) | Next::Noise(view) => view,
        }
    }
}

/// A call, its latents `[rows, numel]` each.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a, Space = Host> {
    pub rows: usize,
    pub numel: usize,
    /// Arithmetic in float64.
    pub double: bool,
    pub schedule: Schedule<'a, Space>,
    /// Whether `log std + log(2 pi)/2` is taken off a Gaussian log-prob.
    pub normalizer: bool,
    pub model_output: View<'a, Space>,
    pub uncond_output: Option<View<'a, Space>>,
    pub sample: View<'a, Space>,
    pub next: Next<'a, Space>,
}

/// Where the forward writes. float32 where no dtype is said, float64 for a call in float64.
pub struct Outputs<'a, Space = Host> {
    /// `[rows, numel]` in the dtype of the sample; absent where the given next latent has that dtype already.
    pub next: Option<ViewMut<'a, Space>>,
    /// `[rows, numel]`
    pub mean: ViewMut<'a, Space>,
    /// `[rows, numel]` of any dtype: `(x' - mu) / std`, 0 where std is.
    pub residual: Option<ViewMut<'a, Space>>,
    /// `[rows]`
    pub log_prob: ViewMut<'a, Space>,
    /// `[rows]`
    pub std: ViewMut<'a, Space>,
    /// `[NUMBERS, rows]`
    pub numbers: ViewMut<'a, Space>,
}

/// What becomes of a row once its latents are summed.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub log_prob: f64,
    pub std: f64,
    pub numbers: [f64; NUMBERS],
}

impl Step<'_> {
    /// `q`: sum of `(x' - mu)^2`.
    pub fn row(&self, row: usize, q: f64) -> Row {
        let step = self.schedule.transition(row, self.double);
        let (n, std) = (self.numel as f64, step.std);
        let (log_prob, coefficient) = if self.schedule.sampler == Sampler::Cps {
            (-q / n, 2.0 / n)
        } else if step.is_deterministic() {
            (0.0, 0.0)
        } else {
            let constant = if self.normalizer { std.ln() + 0.5 * (2.0 * PI).ln() } else { 0.0 };
            (-q / (n * 2.0 * (std * std)) - constant, 1.0 / (n * (std * std)))
        };
        Row { log_prob, std, numbers: [coefficient, step.b, step.guidance] }
    }
}

pub fn forward(step: &Step<'_>, outputs: &Outputs<'_>, threads: usize) -> Result<(), Error> {
    check(step, outputs)?;
    let plan = Plan::new(step.rows, step.numel);
    if step.double {
        cpu::forward::<f64>(step, outputs, plan, threads);
    } else {
        cpu::forward::<f32>(step, outputs, plan, threads);
    }
    Ok(())
}

/// As `forward`, on a GPU: puts the work on the stream and returns.
pub fn forward_on_gpu(
    target: Target,
    step: &Step<'_, Gpu>,
    outputs: &Outputs<'_, Gpu>,
    workspace: &Workspace<'_>,
) -> Result<(), Error> {
    check(step, outputs)?;
    let following = match step.next {
        Next::Given(_) => "prev_sample",
        Next::Noise(_) => "noise",
    };
    refuse_float64_in("model_output", Some(step.model_output))?;
    refuse_float64_in("uncond_output", step.uncond_output)?;
    refuse_float64_in("sample", Some(step.sample))?;
    refuse_float64_in(following, Some(step.next.view()))?;
    match &outputs.residual {
        Some(residual) if residual.dtype() == Dtype::F64 => Err(Error::Float64OnGpu { name: "residual" }),
        _ => gpu::forward(target, step, outputs, workspace),
    }
}

fn check<Space: Copy>(step: &Step<'_, Space>, outputs: &Outputs<'_, Space>) -> Result<(), Error> {
    let require = |present: bool, name| if present { Ok(()) } else { Err(Error::Missing { name }) };
    require(step.uncond_output.is_none() || step.schedule.guidance_scale.is_some(), "guidance_scale")?;
    require(step.uncond_output.is_some() || step.schedule.guidance_scale.is_none(), "uncond_output")?;
    let as_stored = step.sample.dtype();
    match (&outputs.next, step.next) {
        (Some(next), _) => same_dtype("prev_sample", next.dtype(), as_stored),
        (None, Next::Given(given)) => same_dtype("prev_sample", given.dtype(), as_stored),
        (None, Next::Noise(_)) => Err(Error::Missing { name: "memory for prev_sample" }),
    }
}

fn same_dtype(name: &'static str, came: Dtype, wanted: Dtype) -> Result<(), Error> {
    if came == wanted { Ok(()) } else { Err(Error::Dtype { name, came: came.name(), wanted: wanted.name() }) }
}

/// What the backward reads and writes; the gradients are those of the forward's log-prob and mean together.
pub struct Backward<'a, Space = Host> {
    pub rows: usize,
    pub numel: usize,
    pub double: bool,
    /// `[rows]`
    pub grad_log_prob: Option<View<'a, Space>>,
    /// `[rows, numel]`
    pub grad_mean: Option<View<'a, Space>>,
    /// The next latent as it is stored, the mean, and the numbers: what the forward left.
    pub next: View<'a, Space>,
    pub mean: View<'a, Space>,
    pub numbers: View<'a, Space>,
    /// `[rows, numel]` of any dtype.
    pub grad_output: Option<ViewMut<'a, Space>>,
    pub grad_uncond: Option<ViewMut<'a, Space>>,
}

pub fn backward(call: &Backward<'_>, threads: usize) -> Result<(), Error> {
    let plan = Plan::new(call.rows, call.numel);
    if call.double {
        cpu::backward::<f64>(call, plan, threads);
    } else {
        cpu::backward::<f32>(call, plan, threads);
    }
    Ok(())
}

/// As `backward`, on a GPU: puts the work on the stream and returns.
pub fn backward_on_gpu(target: Target, call: &Backward<'_, Gpu>) -> Result<(), Error> {
    refuse_float64_in("prev_sample", Some(call.next))?;
    for (name, gradient) in [("grad_output", &call.grad_output), ("grad_uncond", &call.grad_uncond)] {
        if gradient.as_ref().is_some_and(|gradient| gradient.dtype() == Dtype::F64) {
            return Err(Error::Float64OnGpu { name });
        }
    }
    gpu::backward(target, call)
}

/// What the backward of one row multiplies with: `grad = scale (grad_mean + log_prob (x' - mu))`.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    pub log_prob: f64,
    /// Of the gradient of the model output, and of the unconditional output.
    pub output: f64,
    pub uncond: f64,
}

impl Backward<'_> {
    pub fn factors<F: Real>(&self, row: usize) -> Factors {
        let number = |of: Number| self.numbers.slice::<F>(of as usize * self.rows + row, 1)[0].to_f64();
        let (b, guidance) = (number(Number::Velocity), number(Number::Guidance));
        // Looked at first: a coefficient of 0 stays 0, whatever it is multiplied with.
        let log_prob = match (self.grad_log_prob, number(Number::LogProb)) {
            (Some(gradient), coefficient) if coefficient != 0.0 => gradient.get(row) * coefficient,
            _ => 0.0,
        };
        Factors { log_prob, output: b * guidance, uncond: b * (1.0 - guidance) }
    }
}
