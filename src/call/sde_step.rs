//! A call of `sde_step`, its forward and its backward, and the numbers that a forward leaves.

use bytemuck::NoUninit;

use super::{Dtype, Flag, Latent, Sampler, Schedule, joined};

table! {
    /// The latents of `sde_step`; either `prev_sample` or `noise`.
    SdeStepLatents of Latent {
        model_output,
        uncond_output,
        sample,
        prev_sample,
        /// Standard normal: `x' = mu + std noise`.
        noise,
    }
}

impl SdeStepLatents {
    pub fn next(&self) -> &Latent {
        if self.noise.is_present() { &self.noise } else { &self.prev_sample }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct SdeStep {
    pub rows: u64,
    pub numel: u64,
    pub latents: SdeStepLatents,
    pub schedule: Schedule,
    pub sampler: Sampler,
    /// Whether `log std + log(2 pi)/2` is taken off a Gaussian log-prob.
    pub log_prob_normalizer: Flag,
}

impl SdeStep {
    pub const NAMES: [&str; SdeStepLatents::NAMES.len() + Schedule::NAMES.len()] =
        joined(&[&SdeStepLatents::NAMES, &Schedule::NAMES]);

    /// Of the arithmetic, and of outputs that have no dtype of their own: float64 if a latent is, else float32.
    pub fn dtype(&self) -> Dtype {
        let double = self.latents.each().into_iter().any(|latent| latent.dtype == Dtype::F64);
        if double { Dtype::F64 } else { Dtype::F32 }
    }
}

/// Outputs are `[rows, numel]` or `[rows]`; without a dtype here they have the call's (float32 on a GPU).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct SdeStepForward {
    pub call: SdeStep,
    /// The next latent in the dtype of `sample`; 0 where the given one has that dtype already.
    pub stored: u64,
    pub prev_sample_mean: u64,
    /// `(x' - mu) / std`, 0 where std is; absent: not wanted.
    pub residual: Latent,
    pub log_prob: u64,
    pub std: u64,
    /// `[SdeStepNumber, rows]`, for the backward.
    pub numbers: u64,
    /// `[rows, splits]`, and `[rows]` for the tickets; used where splits > 1.
    pub partials: u64,
    pub tickets: u64,
    pub splits: u32,
    pub pad: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct SdeStepBackward {
    pub rows: u64,
    pub numel: u64,
    /// As it was stored.
    pub prev_sample: Latent,
    pub prev_sample_mean: u64,
    pub numbers: u64,
    /// `[rows]`; 0: none.
    pub grad_log_prob: u64,
    /// `[rows, numel]`; 0: none.
    pub grad_prev_sample_mean: u64,
    /// Absent: not wanted.
    pub grad_model_output: Latent,
    pub grad_uncond_output: Latent,
    pub splits: u32,
    /// Of all but the caller's latents; float32 on a GPU.
    pub dtype: Dtype,
}

numbered! {
    /// Rows of `sde_step`'s numbers, which the backward reads.
    SdeStepNumber {
        /// d log_prob / d mu_j = LogProb (x'_j - mu_j); 0 in a deterministic step, unless the sampler is CPS.
        LogProb,
        /// d mu / d v
        Velocity,
        /// d v / d model_output; 1 without guidance.
        Guidance,
    }
}

pub const SDE_STEP_NUMBERS: usize = SdeStepNumber::NAMES.len();
