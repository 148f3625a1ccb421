//! Objective: a row's few numbers -> ratio, mask or clip, loss, gradient coefficients; all rows -> loss and metrics.
//!
//! The twin of `kernels/objective.cuh`; the formulas and their sources stand in `python/flowdppo_ops/reference.py`.
//! Arithmetic is float64, and every number that the caller can see is rounded to the output precision *before* it is
//! compared with anything, so that `kl`, `ratio` and `keep` never contradict each other.

use std::f64::consts::TAU;

use crate::tensor::{Host, Rows};
use crate::transition::schedule::Transition;
use crate::transition::step::Step;

/// Names of the metrics, in the order in which every backend writes them.
pub const METRICS: [&str; 18] = [
    "ratio_mean",
    "ratio_std",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "ppo_kl",
    "kl_new_old_mean",
    "kl_new_old_max",
    "kl_mask_fraction",
    "pos_rm_fraction",
    "neg_rm_fraction",
    "masked_fraction",
    "unmasked_fraction",
    "clip_fraction",
    "clipfrac_gt_one",
    "clipfrac_lt_one",
    "nonfinite_fraction",
    "kl_loss",
];

/// Before the metrics, what the backward divides the policy's gradient by: the row count or the kept count, or 1.
pub const POLICY_DIVISOR: usize = 0;
pub const BATCH_LEN: usize = 1 + METRICS.len();

/// Rows of the per-row block, in order; Python reads the first five, the backward the coefficients.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum Field {
    LogProb,
    LogRatio,
    Ratio,
    Kl,
    Keep,
    /// The row's policy loss, before any reduction.
    Loss,
    /// `mean (mu - mu_ref)^2 / (2 ref_std^2)`, without its weight.
    RefKl,
    /// d loss / d mu_j, with a schedule d loss / d v_j, is `CoefInnovation` (x'_j - mu_j) + `CoefDrift` (mu_j - mu°_j) +
    /// `CoefRef` (mu_j - mu_ref_j); the first two still to be divided by the batch's divisor.
    CoefInnovation,
    CoefDrift,
    CoefRef,
    /// d loss / d log_prob, still to be divided by the batch's divisor.
    CoefLogProb,
    /// With a schedule alone, for the backward: the row's `mu = a x + b v`, std and guidance.
    StepA,
    StepB,
    StepStd,
    StepGuidance,
}
pub const FIELDS: usize = Field::CoefLogProb as usize + 1;
/// Of a call with a schedule.
pub const STEP_FIELDS: usize = Field::StepGuidance as usize + 1;

pub fn fields(has_schedule: bool) -> usize {
    if has_schedule { STEP_FIELDS } else { FIELDS }
}

/// Length of a call's numbers: `[fields, rows]`, then the batch's.
pub fn numbers_len(rows: usize, has_schedule: bool) -> Option<usize> {
    rows.checked_mul(fields(has_schedule))?.checked_add(BATCH_LEN)
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask {
    Asymmetric,
    Symmetric,
    None,
}

#[derive(Clone, Copy, Debug)]
pub struct Clip {
    pub low: f64,
    pub high: f64,
    pub adv_clip_max: f64,
}

/// What the squared drift is divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KlDivisor {
    /// 2 std^2: the KL of two Gaussians.
    Gaussian,
    /// 2
    Constant,
    /// b^2: the mean squared difference of the model outputs.
    Velocity,
}

#[derive(Clone, Copy, Debug)]
pub enum Objective {
    FlowDppo { threshold: f64, kl_divisor: KlDivisor, mask: Mask, keep_nan_kl: bool },
    FlowGrpo(Clip),
    GrpoGuard { clip: Clip, per_row_scale: bool },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Density {
    Gaussian,
    Cps,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reduction {
    Mean,
    Sum,
    None,
    KeptMean,
}

/// Sums over a row's latents, of `u = x' - mu`, `e = mu - mu°` and `f = mu - mu_ref`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sums {
    /// sum u^2
    pub q: f64,
    /// sum e^2
    pub d: f64,
    /// sum e u; `p` of the formulas is `cross + d`
    pub cross: f64,
    /// sum f^2
    pub f: f64,
}

impl Sums {
    pub fn plus(self, other: &Sums) -> Sums {
        Sums { q: self.q + other.q, d: self.d + other.d, cross: self.cross + other.cross, f: self.f + other.f }
    }
}

/// The row vectors of a call and its settings: everything but the latents.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a, Space = Host> {
    pub rows: usize,
    /// Elements of a row over which its statistics are taken.
    pub numel: usize,
    pub objective: Objective,
    pub density: Density,
    pub latent_sum: bool,
    pub reduction: Reduction,
    pub ref_kl_weight: f64,
    /// Outputs are float64; float32 otherwise.
    pub double: bool,
    /// An old policy was read, and there is a std to measure the drift with.
    pub has_kl: bool,
    pub has_ref: bool,
    /// Of `step_loss`: stands for `std` and `sqrt_dt`.
    pub step: Option<Step<'a, Space>>,
    pub advantages: Rows<'a, Space>,
    pub log_prob: Option<Rows<'a, Space>>,
    pub old_log_prob: Option<Rows<'a, Space>>,
    pub weights: Option<Rows<'a, Space>>,
    pub std: Option<Rows<'a, Space>>,
    pub sqrt_dt: Option<Rows<'a, Space>>,
    pub ref_std: Option<Rows<'a, Space>>,
}

/// What one row becomes, by `Field`; the last four with a schedule alone.
pub type Row = [f64; STEP_FIELDS];

/// GRPO-Guard's batch means, taken before any row is looked at.
#[derive(Clone, Copy, Debug)]
pub struct GuardScale {
    /// mean(sqrt_dt) mean(std / sqrt_dt)
    c: f64,
    /// 1 / mean(sqrt_dt)^2
    outer: f64,
}

impl<Space> Problem<'_, Space> {
    /// Whether a row's numbers depend on all rows: GRPO-Guard's scale.
    pub fn needs_batch_means(&self) -> bool {
        matches!(self.objective, Objective::GrpoGuard { per_row_scale: false, .. })
    }

    /// What the policy's part of the gradient is divided by, where that does not depend on the rows' outcome.
    pub fn divisor(&self) -> Option<f64> {
        match self.reduction {
            Reduction::Mean => Some(self.rows as f64),
            Reduction::Sum | Reduction::None => Some(1.0),
            Reduction::KeptMean => None,
        }
    }
}

impl Problem<'_> {
    /// Rounds to the output precision; float32 overflow becomes an infinity here as it does in float32 arithmetic.
    #[inline]
    fn round(&self, value: f64) -> f64 {
        if self.double { value } else { f64::from(value as f32) }
    }

    #[inline]
    fn read(&self, vector: Option<Rows<'_>>, row: usize) -> f64 {
        vector.map_or(f64::NAN, |vector| self.round(vector.get(row)))
    }

    /// Of a call with a schedule.
    pub fn transition(&self, row: usize) -> Option<Transition> {
        self.step.map(|step| step.schedule.transition(row, self.double))
    }

    /// (std, sqrt_dt), from the schedule if there is one.
    fn deviations(&self, row: usize, transition: Option<Transition>) -> (f64, f64) {
        match transition {
            Some(step) => (step.std, step.sqrt_dt),
            None => (self.read(self.std, row), self.read(self.sqrt_dt, row)),
        }
    }

    pub fn guard_scale(&self) -> GuardScale {
        if !self.needs_batch_means() {
            return GuardScale { c: 1.0, outer: 1.0 };
        }
        let mean = |value: &dyn Fn((f64, f64)) -> f64| {
            (0..self.rows).map(|row| value(self.deviations(row, self.transition(row)))).sum::<f64>() / self.rows as f64
        };
        let sqrt_dt = mean(&|(_, sqrt_dt)| sqrt_dt);
        let std_dev = mean(&|(std, sqrt_dt)| std / sqrt_dt);
        GuardScale { c: sqrt_dt * std_dev, outer: 1.0 / (sqrt_dt * sqrt_dt) }
    }

    /// One row, before any reduction over rows.
    pub fn row(&self, row: usize, sums: Sums, guard: GuardScale) -> Row {
        // "mean": per-element numbers; "sum": joint ones, where the normaliser counts once per element. Divided, not
        // multiplied with 1 / numel: at 49 elements that misses a KL equal to its threshold by an ulp.
        let (divisor, elements) =
            if self.latent_sum { (1.0, self.numel as f64) } else { (self.numel.max(1) as f64, 1.0) };
        let (q, d, cross) = (sums.q / divisor, sums.d / divisor, sums.cross / divisor);
        let transition = self.transition(row);
        let (std, sqrt_dt) = self.deviations(row, transition);
        let variance = std * std;
        let cps = self.density == Density::Cps;
        // Nothing was random in a deterministic step: its density and the ratio of two policies there are 1.
        let deterministic = transition.is_some_and(|step| step.is_deterministic());

        let log_prob = self.round(match self.log_prob {
            Some(given) => given.get(row),
            None if cps => -q,
            None if deterministic => 0.0,
            None => -q / (2.0 * variance) - elements * (std.ln() + 0.5 * TAU.ln()),
        });
        let log_ratio = self.round(match self.old_log_prob {
            Some(old) => log_prob - self.round(old.get(row)),
            // p / std^2 - d / (2 std^2) with p = cross + d; exactly 0 when the means are equal.
            None if cps => 2.0 * cross + d,
            None if deterministic => 0.0,
            None => (cross + 0.5 * d) / variance,
        });

        let advantage = self.round(self.advantages.get(row));
        let weights = self.weights.map_or(1.0, |weights| self.round(weights.get(row)));
        // exponent = (log_ratio + drift / (2 c^2)) scale; scale is 1 and the drift absent but for GRPO-Guard.
        let (scale, outer) = match self.objective {
            Objective::GrpoGuard { per_row_scale: true, .. } => (std, sqrt_dt.powi(-2)),
            Objective::GrpoGuard { .. } => (guard.c, guard.outer),
            _ => (1.0, 1.0),
        };
        let is_guard = matches!(self.objective, Objective::GrpoGuard { .. });
        // A scale of 0 comes from deterministic steps alone.
        let drifts = is_guard && !(scale == 0.0 && transition.is_some());
        let centre = if drifts { d / (2.0 * scale * scale) } else { 0.0 };
        let ratio = self.round(((log_ratio + centre) * scale).exp());
        let kl_divisor = match self.objective {
            Objective::FlowDppo { kl_divisor: KlDivisor::Constant, .. } => 2.0,
            Objective::FlowDppo { kl_divisor: KlDivisor::Velocity, .. } => {
                transition.map_or(f64::NAN, |step| step.b * step.b)
            }
            _ => 2.0 * variance,
        };
        // What is absent is 0, not NaN: nobody is shown it, and NaN would not compare equal to itself in opcheck.
        let has_kl = self.has_kl && !(kl_divisor == 0.0 && transition.is_some());
        let kl = if has_kl { self.round(d / kl_divisor) } else { 0.0 };

        let (advantage, blocked, blocked_loss) = match self.objective {
            Objective::FlowDppo { mask, .. } => {
                let away = (ratio > 1.0 && advantage > 0.0) || (ratio < 1.0 && advantage < 0.0);
                let blocked = match mask {
                    Mask::Asymmetric => self.is_high(kl) && away,
                    Mask::Symmetric => self.is_high(kl),
                    Mask::None => false,
                };
                (advantage, blocked, 0.0)
            }
            Objective::FlowGrpo(clip) | Objective::GrpoGuard { clip, .. } => {
                // The larger surrogate is the clipped one exactly when the ratio left the range on the side that the
                // advantage favours.
                let (lower, upper) = (self.round(1.0 - clip.low), self.round(1.0 + clip.high));
                let limit = self.round(clip.adv_clip_max);
                let advantage = if advantage.is_nan() { advantage } else { advantage.clamp(-limit, limit) };
                let blocked = (ratio > upper && advantage > 0.0) || (ratio < lower && advantage < 0.0);
                (advantage, blocked, -advantage * if ratio > upper { upper } else { lower })
            }
        };
        let open_loss = -advantage * ratio * outer * weights;
        let loss = if blocked { blocked_loss * outer * weights } else { open_loss };

        // d loss / d exponent is the loss itself (it is minus A exp(exponent)), and 0 when blocked.
        let slope = if blocked { 0.0 } else { open_loss * scale };
        let innovation = if cps {
            slope * 2.0 / divisor
        } else if deterministic {
            0.0
        } else {
            slope * (1.0 / variance) / divisor
        };
        let drift = if drifts { slope / (scale * scale * divisor) } else { 0.0 };
        let ref_std = self.ref_std.map_or(std, |ref_std| self.round(ref_std.get(row)));
        let over_rows = match self.reduction {
            Reduction::Mean | Reduction::KeptMean => self.rows as f64,
            Reduction::Sum | Reduction::None => 1.0,
        };
        let has_ref = self.has_ref && !(ref_std == 0.0 && transition.is_some());
        let (ref_kl, reference) = if has_ref {
            let per_element = 1.0 / (ref_std * ref_std * divisor);
            (0.5 * sums.f * per_element, self.ref_kl_weight * per_element / over_rows)
        } else {
            (0.0, 0.0)
        };

        // What the gradient goes to is mu, or v in mu = a x + b v.
        let (a, b, step_std, guidance) = match transition {
            Some(step) => (step.a, step.b, step.std, step.guidance),
            None => (0.0, 1.0, 0.0, 0.0),
        };
        let mut out = [0.0; STEP_FIELDS];
        let fields = [
            (Field::LogProb, log_prob),
            (Field::LogRatio, log_ratio),
            (Field::Ratio, ratio),
            (Field::Kl, kl),
            (Field::Keep, f64::from(u8::from(!blocked))),
            (Field::Loss, loss),
            (Field::RefKl, ref_kl),
            (Field::CoefInnovation, if self.log_prob.is_some() { 0.0 } else { innovation * b }),
            (Field::CoefDrift, drift * b),
            (Field::CoefRef, reference * b),
            (Field::CoefLogProb, slope),
            (Field::StepA, a),
            (Field::StepB, b),
            (Field::StepStd, step_std),
            (Field::StepGuidance, guidance),
        ];
        for (field, value) in fields {
            out[field as usize] = self.round(value);
        }
        out
    }

    /// High means outside the trust region: equality counts, and NaN as the objective says.
    fn is_high(&self, kl: f64) -> bool {
        match self.objective {
            Objective::FlowDppo { threshold, keep_nan_kl, .. } => {
                let threshold = self.round(threshold);
                kl >= threshold || (kl.is_nan() && !keep_nan_kl)
            }
            _ => false,
        }
    }

    /// Loss (None with `Reduction::None`), then the policy divisor and the metrics, from the finished rows.
    pub fn batch(&self, at: impl Fn(Field, usize) -> f64) -> (Option<f64>, [f64; BATCH_LEN]) {
        let rows = self.rows as f64;
        let mean = |value: &dyn Fn(usize) -> f64| (0..self.rows).map(value).sum::<f64>() / rows;
        let share = |condition: &dyn Fn(usize) -> bool| mean(&|row| f64::from(u8::from(condition(row))));
        let extreme = |field, pick: fn(f64, f64) -> f64| {
            (0..self.rows).map(|row| at(field, row)).reduce(pick).unwrap_or(f64::NAN)
        };
        let keep = |row| at(Field::Keep, row) != 0.0;
        let advantage = |row| self.round(self.advantages.get(row));
        let (low, up) = match self.objective {
            Objective::FlowDppo { .. } => (f64::INFINITY, f64::INFINITY),
            Objective::FlowGrpo(clip) | Objective::GrpoGuard { clip, .. } => {
                (self.round(clip.low), self.round(clip.high))
            }
        };
        let above = |row| self.round(at(Field::Ratio, row) - 1.0) > up;
        let below = |row| self.round(1.0 - at(Field::Ratio, row)) > low;
        let finite = |row| {
            [Field::LogRatio, Field::Ratio, Field::Loss].into_iter().all(|field| at(field, row).is_finite())
                && (!self.has_kl || at(Field::Kl, row).is_finite())
        };

        let ratio_mean = mean(&|row| at(Field::Ratio, row));
        // Two passes: E[r^2] - E[r]^2 loses all digits of a std of 1e-6 around a mean of 1.
        let squares = mean(&|row| (at(Field::Ratio, row) - ratio_mean).powi(2));
        let ratio_std = if self.rows > 1 { (squares * rows / (rows - 1.0)).sqrt() } else { 0.0 };
        let ref_kl = mean(&|row| at(Field::RefKl, row));
        let metrics: [f64; METRICS.len()] = [
            ratio_mean,
            ratio_std,
            extreme(Field::Ratio, min),
            extreme(Field::Ratio, max),
            mean(&|row| 0.5 * at(Field::LogRatio, row).powi(2)),
            mean(&|row| -at(Field::LogRatio, row)),
            mean(&|row| at(Field::Kl, row)),
            extreme(Field::Kl, max),
            share(&|row| self.is_high(at(Field::Kl, row))),
            share(&|row| !keep(row) && advantage(row) > 0.0),
            share(&|row| !keep(row) && advantage(row) < 0.0),
            share(&|row| !keep(row)),
            share(&keep),
            share(&|row| above(row) || below(row)),
            share(&above),
            share(&below),
            share(&|row| !finite(row)),
            ref_kl,
        ];

        let kept_only = self.reduction == Reduction::KeptMean;
        let policy: f64 = (0..self.rows).filter(|&row| !kept_only || keep(row)).map(|row| at(Field::Loss, row)).sum();
        let kept = || ((0..self.rows).filter(|&row| keep(row)).count() as f64).max(1.0);
        let divisor = self.divisor().unwrap_or_else(kept);
        let penalty = match self.reduction {
            _ if !self.has_ref => 0.0,
            Reduction::Sum => self.ref_kl_weight * ref_kl * rows,
            _ => self.ref_kl_weight * ref_kl,
        };
        let loss = (self.reduction != Reduction::None).then_some(policy / divisor + penalty);
        let mut batch = [divisor; BATCH_LEN];
        batch[POLICY_DIVISOR + 1..].copy_from_slice(&metrics);
        (loss, batch)
    }

    /// The row's own loss with `Reduction::None`.
    pub fn row_loss(&self, at: impl Fn(Field) -> f64) -> f64 {
        at(Field::Loss) + if self.has_ref { self.ref_kl_weight * at(Field::RefKl) } else { 0.0 }
    }
}

/// As torch: NaN wins.
fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || a < b { a } else { b }
}

fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}
