//! A call as the boundary describes it and as the CPU backend and the kernels read it.
//! `kernels/call.cuh` is the twin of every struct and enum here, field for field; both assert sizes and offsets. Fields
//! are named after the public functions' arguments; an address of 0 is an absent argument. `NoUninit` proves that there
//! is no hidden padding. The boundary holds the tensors behind the addresses while the call runs, all on one device,
//! and has checked dtype, length and layout.

use std::mem::offset_of;

use bytemuck::NoUninit;

use crate::error::Error;

// ---- tables: names once, in the order in which they stand in memory -------------------------------------------------

/// C enums, with the names that users write for the variants.
macro_rules! options {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, NoUninit)]
        #[repr(i32)]
        pub enum $name { #[default] $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            pub const NAMES: &[&str] = &[$($text),+];

            pub fn parse(argument: &'static str, came: &str) -> Result<Self, Error> {
                match came {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(Error::Option { name: argument, came: came.to_owned(), wanted: Self::NAMES }),
                }
            }

            pub fn name(self) -> &'static str {
                Self::NAMES[self as usize]
            }
        }
    )+};
}

/// A struct of fields of one type, with their names.
macro_rules! table {
    ($(#[$doc:meta])* $name:ident of $kind:ty { $($(#[$field_doc:meta])* $field:ident,)+ }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, NoUninit)]
        pub struct $name { $($(#[$field_doc])* pub $field: $kind,)+ }

        impl $name {
            pub const NAMES: [&str; [$(stringify!($field)),+].len()] = [$(stringify!($field)),+];

            pub fn each(&self) -> [&$kind; Self::NAMES.len()] {
                [$(&self.$field),+]
            }

            pub fn each_mut(&mut self) -> [&mut $kind; Self::NAMES.len()] {
                [$(&mut self.$field),+]
            }

            pub fn named(&self) -> impl Iterator<Item = (&'static str, &$kind)> {
                Self::NAMES.into_iter().zip(self.each())
            }
        }
    };
}

const fn joined<const N: usize>(tables: &[&[&'static str]]) -> [&'static str; N] {
    let (mut names, mut table, mut at, mut first) = ([""; N], 0, 0, 0);
    while table < tables.len() {
        while at < first + tables[table].len() {
            names[at] = tables[table][at - first];
            at += 1;
        }
        (table, first) = (table + 1, at);
    }
    names
}

/// An enum of the rows of a block of numbers, with their names.
macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            pub const NAMES: [&str; [$(stringify!($variant)),+].len()] = [$(stringify!($variant)),+];
        }
    };
}

options! {
    Dtype { F32 = "float32", Bf16 = "bfloat16", F16 = "float16", F64 = "float64" }
}

impl Dtype {
    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64];

    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F64 => 8,
        }
    }
}

/// A bool of a C struct.
pub type Flag = i32;

/// `[rows, numel]`, contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Latent {
    pub data: u64,
    pub dtype: Dtype,
    pub pad: i32,
}

impl Latent {
    pub fn new(data: u64, dtype: Dtype) -> Latent {
        Latent { data, dtype, pad: 0 }
    }

    pub fn is_present(&self) -> bool {
        self.data != 0
    }
}

/// One number for all rows, or an array that broadcasts to them: row r has element `r / divide % modulo`. Rows `[B, S]`
/// read `[1, S]` with (divide, modulo) = (1, S), `[B, 1]` with (S, B), one element with (1, 1).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct RowVector {
    /// 0: `value`, for all rows.
    pub data: u64,
    pub value: f64,
    pub dtype: Dtype,
    pub present: Flag,
    /// At least 1, as is `modulo`, where `data` is not 0.
    pub divide: u32,
    pub modulo: u32,
}

impl RowVector {
    pub fn number(value: f64) -> RowVector {
        RowVector { value, present: 1, ..RowVector::default() }
    }

    /// Refuses a `divide` or `modulo` of 0 (both are divisors) or beyond `rows`.
    pub fn array(
        name: &'static str, data: u64, dtype: Dtype, (divide, modulo): (usize, usize), rows: usize,
    ) -> Result<RowVector, Error> {
        let wrong = Error::Broadcast { name, divide, modulo, rows };
        let fits = (1..=rows).contains(&divide) && (1..=rows).contains(&modulo);
        match (u32::try_from(divide), u32::try_from(modulo)) {
            (Ok(divide), Ok(modulo)) if fits => Ok(RowVector { data, value: 0.0, dtype, present: 1, divide, modulo }),
            _ => Err(wrong),
        }
    }

    pub fn is_present(&self) -> bool {
        self.present != 0
    }
}

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

table! {
    Schedule of RowVector {
        sigma,
        sigma_next,
        noise_level,
        sigma_max,
        /// Absent without `uncond_output`.
        guidance_scale,
    }
}

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

options! {
    /// `None`: a call of means, without a schedule.
    Sampler { None = "none", FlowSde = "flow_sde", DanceSde = "dance_sde", Cps = "cps" }

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

// ---- policy_loss ----------------------------------------------------------------------------------------------------

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

// ---- sde_step -------------------------------------------------------------------------------------------------------

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

// ---- the twin in kernels/call.cuh asserts the same ------------------------------------------------------------------

const _: () = {
    assert!(size_of::<Latent>() == 16 && size_of::<RowVector>() == 32);
    assert!(offset_of!(RowVector, dtype) == 16 && offset_of!(RowVector, modulo) == 28);
    assert!(size_of::<Latents>() == 160 && size_of::<SdeStepLatents>() == 80);
    assert!(size_of::<RowVectors>() == 224 && size_of::<Schedule>() == 160);
    assert!(size_of::<Objective>() == 56 && offset_of!(Objective, kind) == 32);
    assert!(size_of::<Settings>() == 24 && offset_of!(Settings, reduction) == 20);
    assert!(size_of::<PolicyLoss>() == 640 && offset_of!(PolicyLoss, objective) == 560);
    assert!(size_of::<PolicyLossForward>() == 688 && offset_of!(PolicyLossForward, splits) == 680);
    assert!(size_of::<PolicyLossBackward>() == 248 && offset_of!(PolicyLossBackward, numbers) == 208);
    assert!(size_of::<SdeStep>() == 264 && offset_of!(SdeStep, sampler) == 256);
    assert!(size_of::<SdeStepForward>() == 344 && offset_of!(SdeStepForward, splits) == 336);
    assert!(size_of::<SdeStepBackward>() == 104 && offset_of!(SdeStepBackward, splits) == 96);
};

#[cfg(test)]
#[path = "../tests/unit/call.rs"]
mod tests;
