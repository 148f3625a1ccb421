//! A call of `loss` or `step_loss`, its forward and its backward, and the numbers that a forward leaves.

use bytemuck::NoUninit;

use super::{Dtype, Flag, Latent, RowVector, Sampler, Schedule, joined};
use crate::error::Error;

table! {
    /// The latents of `loss` and `step_loss`; absent where nothing reads them. The gradient goes to `prev_sample_mean`
    /// or, with a schedule, to `model_output` and `uncond_output`.
    Latents of Latent {
        prev_sample_mean,
        model_output,
        uncond_output,
        sample,
        prev_sample,
        /// The old policy as mean, as model output after guidance, or as residual `(x' - mu_old) / std`.
        old_prev_sample_mean,
        old_model_output,
        old_residual,
        /// The reference policy as mean, or as model output after guidance.
        ref_prev_sample_mean,
        ref_model_output,
    }
}

impl Latents {
    /// The latent that gets the gradient, with its name.
    pub fn output(&self) -> (&'static str, &Latent) {
        if self.has_model_output() {
            ("model_output", &self.model_output)
        } else {
            ("prev_sample_mean", &self.prev_sample_mean)
        }
    }

    /// Whether means are computed from model outputs, as in a call with a schedule.
    pub fn has_model_output(&self) -> bool {
        self.model_output.is_present()
    }

    /// Outputs, samples, other policies: in most calls each group has one dtype.
    pub fn groups(&self) -> ([Latent; 3], [Latent; 2], [Latent; 5]) {
        let Latents { prev_sample_mean, model_output, uncond_output, sample, prev_sample, .. } = *self;
        let Latents { old_prev_sample_mean, old_model_output, old_residual, .. } = *self;
        let Latents { ref_prev_sample_mean, ref_model_output, .. } = *self;
        (
            [prev_sample_mean, model_output, uncond_output],
            [sample, prev_sample],
            [old_prev_sample_mean, old_model_output, old_residual, ref_prev_sample_mean, ref_model_output],
        )
    }

    pub fn has_old(&self) -> bool {
        [self.old_prev_sample_mean, self.old_model_output, self.old_residual].iter().any(Latent::is_present)
    }

    pub fn has_ref(&self) -> bool {
        self.ref_prev_sample_mean.is_present() || self.ref_model_output.is_present()
    }
}

table! {
    RowVectors of RowVector {
        advantages,
        log_prob,
        old_log_prob,
        weights,
        /// `std` and `sqrt_dt` are not read with a schedule, which gives both.
        std,
        sqrt_dt,
        /// Absent: the row's std.
        ref_std,
    }
}

options! {
    ObjectiveKind { FlowDppo = "flow_dppo", FlowGrpo = "flow_grpo", GrpoGuard = "grpo_guard" }

    /// Which rows of high KL are blocked.
    Mask { Asymmetric = "asymmetric", Symmetric = "symmetric", None = "none" }

    /// What `(mu - mu_old)^2`, reduced over the row, is divided by: `2 std^2`, for the KL of two Gaussians; 2; or
    /// `b^2`, for the squared difference of the model outputs.
    KlDivisor { Gaussian = "gaussian", Constant = "constant", Velocity = "velocity" }

    Density { Gaussian = "gaussian", Cps = "cps" }

    LatentReduction { Mean = "mean", Sum = "sum" }

    /// Over the rows.
    Reduction { Mean = "mean", Sum = "sum", None = "none", KeptMean = "kept_mean" }
}

/// An objective's settings. Limits are float64: `1 - clip_low` is computed before it is rounded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Objective {
    pub kl_mask_threshold: f64,
    pub clip_low: f64,
    pub clip_high: f64,
    /// Infinite: advantages are not clamped.
    pub adv_clip_max: f64,
    pub kind: ObjectiveKind,
    pub mask: Mask,
    pub kl_divisor: KlDivisor,
    pub keep_nan_kl: Flag,
    pub per_row_scale: Flag,
    pub pad: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Settings {
    pub ref_kl_weight: f64,
    pub sampler: Sampler,
    pub density: Density,
    pub latent_reduction: LatentReduction,
    pub reduction: Reduction,
}

/// A call of `loss` or `step_loss`, of `rows` rows with `numel` elements each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct PolicyLoss {
    pub rows: u64,
    pub numel: u64,
    pub latents: Latents,
    pub vectors: RowVectors,
    pub schedule: Schedule,
    pub objective: Objective,
    pub settings: Settings,
}

impl PolicyLoss {
    pub const NAMES: [&str; Latents::NAMES.len() + RowVectors::NAMES.len() + Schedule::NAMES.len()] =
        joined(&[&Latents::NAMES, &RowVectors::NAMES, &Schedule::NAMES]);

    /// Of the arithmetic and of all outputs: float64 if a latent or a log-prob is, else float32.
    pub fn dtype(&self) -> Dtype {
        let log_probs = [&self.vectors.log_prob, &self.vectors.old_log_prob];
        let mut dtypes = self.latents.each().map(|latent| latent.dtype).into_iter().chain(log_probs.map(|v| v.dtype));
        if dtypes.any(|dtype| dtype == Dtype::F64) { Dtype::F64 } else { Dtype::F32 }
    }

    pub fn has_schedule(&self) -> bool {
        self.settings.sampler != Sampler::None
    }

    pub fn has_kl(&self) -> bool {
        self.latents.has_old() && (self.vectors.std.is_present() || self.has_schedule())
    }

    /// Whether a row's numbers depend on all rows: GRPO-Guard's scale.
    pub fn needs_batch_means(&self) -> bool {
        self.objective.kind == ObjectiveKind::GrpoGuard && self.objective.per_row_scale == 0
    }

    /// What the policy's gradient is divided by; None for `KeptMean`, which counts the rows that are kept.
    pub fn divisor(&self) -> Option<f64> {
        match self.settings.reduction {
            Reduction::Mean => Some(self.rows as f64),
            Reduction::Sum | Reduction::None => Some(1.0),
            Reduction::KeptMean => None,
        }
    }

    pub fn loss_len(&self) -> usize {
        if self.settings.reduction == Reduction::None { self.rows as usize } else { 1 }
    }
}

/// Which half of a forward runs. Calls whose latents are sharded take two launches, others `Whole`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, NoUninit)]
#[repr(i32)]
pub enum Stage {
    #[default]
    Whole,
    SumsAlone,
    ObjectiveAlone,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct PolicyLossForward {
    pub call: PolicyLoss,
    /// One element, or one per row with `Reduction::None`; float32 on a GPU, and so are `numbers` and `partials`.
    pub loss: u64,
    /// `[fields, rows]`, then `[BATCH_LEN]`.
    pub numbers: u64,
    /// `[rows, max(splits, 1), 4]`, where blocks need one another's sums.
    pub partials: u64,
    /// `[rows + 1]` 32-bit counters: 0 before a launch and again after it.
    pub tickets: u64,
    /// `SumsAlone` writes, `ObjectiveAlone` reads `[rows, 4]` float64 (order of `Sums`), then the elements of a row.
    pub row_sums: u64,
    pub splits: u32,
    pub stage: Stage,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct PolicyLossBackward {
    pub rows: u64,
    pub numel: u64,
    /// Only those that are read: whose coefficient can be other than 0.
    pub latents: Latents,
    /// d objective / d loss, one number or one per row.
    pub grad_loss: RowVector,
    pub numbers: u64,
    /// In the dtype of `prev_sample_mean` or `model_output`; 0: not wanted.
    pub grad_output: u64,
    /// In the dtype of `uncond_output`.
    pub grad_uncond_output: u64,
    /// `[rows]`; 0: not wanted.
    pub grad_log_prob: u64,
    pub splits: u32,
    /// Of `numbers` and `grad_log_prob`; float32 on a GPU.
    pub dtype: Dtype,
}

/// Sums of a row in `PolicyLossForward::row_sums`.
pub const SUMS: usize = 4;

pub fn row_sums_len(rows: usize) -> Option<usize> {
    rows.checked_mul(SUMS)?.checked_add(1)
}

numbered! {
    /// Rows of `numbers`; Python reads the first five, the backward the coefficients.
    Field {
        LogProb,
        LogRatio,
        Ratio,
        Kl,
        Keep,
        /// The row's policy loss, before any reduction.
        Loss,
        /// `(mu - mu_ref)^2 / (2 ref_std^2)`, reduced over the row, without its weight.
        RefKl,
        /// d loss / d mu_j, with a schedule d loss / d v_j, is `CoefInnovation` (x'_j - mu_j) + `CoefDrift`
        /// (mu_j - mu_old_j) + `CoefRef` (mu_j - mu_ref_j); the first two still to be divided by the batch's divisor.
        CoefInnovation,
        CoefDrift,
        CoefRef,
        /// d loss / d log_prob, still to be divided by the batch's divisor.
        CoefLogProb,
        /// Only with a schedule, for the backward: a and b of `mu = a x + b v`, std and guidance.
        StepA,
        StepB,
        StepStd,
        StepGuidance,
    }
}

pub const FIELDS: usize = Field::CoefLogProb as usize + 1;
pub const STEP_FIELDS: usize = Field::NAMES.len();

pub fn fields(has_schedule: bool) -> usize {
    if has_schedule { STEP_FIELDS } else { FIELDS }
}

/// In the order in which every backend writes them.
pub const METRICS: [&str; 18] = [
    "ratio_mean", "ratio_std", "ratio_min", "ratio_max", "approx_kl", "ppo_kl", "kl_new_old_mean", "kl_new_old_max",
    "kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction", "masked_fraction", "unmasked_fraction", "clip_fraction",
    "clipfrac_gt_one", "clipfrac_lt_one", "nonfinite_fraction", "kl_loss",
];

/// First of the batch's numbers, before the metrics: the row count, the kept count or 1, see `PolicyLoss::divisor`.
pub const POLICY_DIVISOR: usize = 0;
pub const BATCH_LEN: usize = 1 + METRICS.len();

pub fn numbers_len(rows: usize, has_schedule: bool) -> Option<usize> {
    rows.checked_mul(fields(has_schedule))?.checked_add(BATCH_LEN)
}
