//! Objective of `loss` and `step_loss`: a row's sums -> ratio, mask or clip, loss, gradient coefficients; all rows ->
//! loss and metrics. Twin: `kernels/objective.cuh`. Formulas and sources: `python/flowdppo_ops/reference.py`.
//! Arithmetic is float64. Numbers that the caller sees are rounded to the output precision *before* they are compared
//! with anything, so that `kl`, `ratio` and `keep` never contradict each other.

use std::f64::consts::TAU;

use bytemuck::{Pod, Zeroable};

use super::memory::Host;
use super::schedule::Transition;
use crate::call::{
    BATCH_LEN, Density, Dtype, Field, KlDivisor, LatentReduction, METRICS, Mask, ObjectiveKind, POLICY_DIVISOR,
    PolicyLoss, Reduction, RowVector, RowVectors, STEP_FIELDS,
};

/// Sums over a row's elements: q = sum u^2, d = sum e^2, cross = sum e u, f = sum r^2, with u = x' - mu, e = mu - mu°
/// and r = mu - mu_ref (x': `prev_sample`; mu, mu°, mu_ref: means of the trained, old, reference policy).
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Sums {
    pub q: f64,
    pub d: f64,
    pub cross: f64,
    pub f: f64,
}

impl Sums {
    pub fn plus(self, other: &Sums) -> Sums {
        Sums { q: self.q + other.q, d: self.d + other.d, cross: self.cross + other.cross, f: self.f + other.f }
    }
}

/// The rows of a call: everything but the latents.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    call: Host<'a, PolicyLoss>,
    pub rows: usize,
    /// Elements of a row; of all shards together where latents are sharded.
    numel: usize,
    /// Outputs are float64, else float32.
    double: bool,
    has_kl: bool,
    pub has_ref: bool,
}

/// A row's numbers, indexed by `Field`; the last four count only with a schedule.
pub type Row = [f64; STEP_FIELDS];

/// GRPO-Guard's factors from means over the batch.
#[derive(Clone, Copy, Debug)]
pub struct GuardScale {
    /// mean(sqrt_dt) mean(std / sqrt_dt)
    c: f64,
    /// 1 / mean(sqrt_dt)^2
    outer: f64,
}

impl<'a> Problem<'a> {
    pub fn new(call: Host<'a, PolicyLoss>) -> Self {
        Problem {
            call,
            rows: call.rows as usize,
            numel: call.numel as usize,
            double: call.dtype() == Dtype::F64,
            has_kl: call.has_kl(),
            has_ref: call.latents.has_ref(),
        }
    }

    pub fn with_numel(self, numel: usize) -> Self {
        Problem { numel, ..self }
    }

    pub fn has_schedule(&self) -> bool {
        self.call.has_schedule()
    }

    /// Rounds to the output precision; float32 may overflow to an infinity.
    #[inline]
    fn round(&self, value: f64) -> f64 {
        if self.double { value } else { f64::from(value as f32) }
    }

    #[inline]
    fn read(&self, of: fn(&RowVectors) -> &RowVector, row: usize) -> f64 {
        self.round(self.call.row(|call| of(&call.vectors), row))
    }

    fn advantage(&self, row: usize) -> f64 {
        self.read(|vectors| &vectors.advantages, row)
    }

    pub fn transition(&self, row: usize) -> Option<Transition> {
        let schedule = self.call.part(|call| &call.schedule);
        self.has_schedule().then(|| Transition::new(schedule, self.call.settings.sampler, row, self.double))
    }

    /// (std, sqrt_dt), from the schedule if there is one.
    fn deviations(&self, row: usize, transition: Option<Transition>) -> (f64, f64) {
        match transition {
            Some(step) => (step.std, step.sqrt_dt),
            None => (self.read(|vectors| &vectors.std, row), self.read(|vectors| &vectors.sqrt_dt, row)),
        }
    }

    pub fn guard_scale(&self) -> GuardScale {
        if !self.call.needs_batch_means() {
            return GuardScale { c: 1.0, outer: 1.0 };
        }
        let mean = |value: &dyn Fn((f64, f64)) -> f64| {
            (0..self.rows).map(|row| value(self.deviations(row, self.transition(row)))).sum::<f64>() / self.rows as f64
        };
        let sqrt_dt = mean(&|(_, sqrt_dt)| sqrt_dt);
        let std_dev = mean(&|(std, sqrt_dt)| std / sqrt_dt);
        GuardScale { c: sqrt_dt * std_dev, outer: 1.0 / (sqrt_dt * sqrt_dt) }
    }

    pub fn row(&self, row: usize, sums: Sums, guard: GuardScale) -> Row {
        let PolicyLoss { vectors, objective, settings, .. } = &*self.call;
        let latent_sum = settings.latent_reduction == LatentReduction::Sum;
        // `Mean`: numbers per element. `Sum`: joint ones, whose log-prob has the normaliser `numel` times. A product
        // with 1 / numel, not a division, would miss a KL equal to its threshold by an ulp at 49 elements.
        let (divisor, elements) = if latent_sum { (1.0, self.numel as f64) } else { (self.numel.max(1) as f64, 1.0) };
        let (q, d, cross) = (sums.q / divisor, sums.d / divisor, sums.cross / divisor);
        let transition = self.transition(row);
        let (std, sqrt_dt) = self.deviations(row, transition);
        let variance = std * std;
        let cps = settings.density == Density::Cps;
        // A deterministic step has no Gaussian density: log-prob and log-ratio are 0. CPS has a density there too.
        let deterministic = transition.is_some_and(|step| step.is_deterministic());

        let log_prob = if vectors.log_prob.is_present() {
            self.read(|vectors| &vectors.log_prob, row)
        } else if cps {
            self.round(-q)
        } else if deterministic {
            0.0
        } else {
            self.round(-q / (2.0 * variance) - elements * (std.ln() + 0.5 * TAU.ln()))
        };
        // p / std^2 - d / (2 std^2) with p = cross + d; exactly 0 when the means are equal.
        let log_ratio = self.round(if vectors.old_log_prob.is_present() {
            log_prob - self.read(|vectors| &vectors.old_log_prob, row)
        } else if cps {
            2.0 * cross + d
        } else if deterministic {
            0.0
        } else {
            (cross + 0.5 * d) / variance
        });

        let advantage = self.advantage(row);
        let weights = if vectors.weights.is_present() { self.read(|vectors| &vectors.weights, row) } else { 1.0 };
        // ratio = exp((log_ratio + d / (2 scale^2)) scale) for GRPO-Guard, exp(log_ratio) for the others.
        let is_guard = objective.kind == ObjectiveKind::GrpoGuard;
        let (scale, outer) = match (is_guard, objective.per_row_scale != 0) {
            (true, true) => (std, sqrt_dt.powi(-2)),
            (true, false) => (guard.c, guard.outer),
            (false, _) => (1.0, 1.0),
        };
        // With a schedule, a scale of 0 comes from deterministic steps only; they have no drift term.
        let drifts = is_guard && !(scale == 0.0 && transition.is_some());
        let centre = if drifts { d / (2.0 * scale * scale) } else { 0.0 };
        let ratio = self.round(((log_ratio + centre) * scale).exp());
        let kl_divisor = match objective.kl_divisor {
            KlDivisor::Gaussian => 2.0 * variance,
            KlDivisor::Constant => 2.0,
            KlDivisor::Velocity => transition.map_or(f64::NAN, |step| step.b * step.b),
        };
        // An absent KL is 0, not NaN: nobody sees it, and opcheck compares outputs, where NaN differs from itself.
        let has_kl = self.has_kl && !(kl_divisor == 0.0 && transition.is_some());
        let kl = if has_kl { self.round(d / kl_divisor) } else { 0.0 };

        let (advantage, blocked, blocked_loss) = match objective.kind {
            ObjectiveKind::FlowDppo => {
                let away = (ratio > 1.0 && advantage > 0.0) || (ratio < 1.0 && advantage < 0.0);
                let blocked = match objective.mask {
                    Mask::Asymmetric => self.is_high(kl) && away,
                    Mask::Symmetric => self.is_high(kl),
                    Mask::None => false,
                };
                (advantage, blocked, 0.0)
            }
            ObjectiveKind::FlowGrpo | ObjectiveKind::GrpoGuard => {
                // The clipped loss is the larger where the ratio left the range on the side that A favours.
                let (lower, upper) = (self.round(1.0 - objective.clip_low), self.round(1.0 + objective.clip_high));
                let limit = self.round(objective.adv_clip_max);
                let advantage = if advantage.is_nan() { advantage } else { advantage.clamp(-limit, limit) };
                let blocked = (ratio > upper && advantage > 0.0) || (ratio < lower && advantage < 0.0);
                (advantage, blocked, -advantage * if ratio > upper { upper } else { lower })
            }
        };
        let open_loss = -advantage * ratio * outer * weights;
        let loss = if blocked { blocked_loss * outer * weights } else { open_loss };

        // d loss / d log_ratio = loss scale, since loss = -A exp(scale log_ratio + ..) outer weights; 0 if blocked.
        let slope = if blocked { 0.0 } else { open_loss * scale };
        let innovation = if cps {
            slope * 2.0 / divisor
        } else if deterministic {
            0.0
        } else {
            slope * (1.0 / variance) / divisor
        };
        let drift = if drifts { slope / (scale * scale * divisor) } else { 0.0 };
        let ref_std = if vectors.ref_std.is_present() { self.read(|vectors| &vectors.ref_std, row) } else { std };
        let over_rows = match settings.reduction {
            Reduction::Mean | Reduction::KeptMean => self.rows as f64,
            Reduction::Sum | Reduction::None => 1.0,
        };
        let has_ref = self.has_ref && !(ref_std == 0.0 && transition.is_some());
        let (ref_kl, reference) = if has_ref {
            let per_element = 1.0 / (ref_std * ref_std * divisor);
            (0.5 * sums.f * per_element, settings.ref_kl_weight * per_element / over_rows)
        } else {
            (0.0, 0.0)
        };

        // The gradient is that of mu or, with a schedule (mu = a x + b v), of v.
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
            (Field::CoefInnovation, if vectors.log_prob.is_present() { 0.0 } else { innovation * b }),
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

    /// Whether the row is outside FlowDPPO's trust region: `kl >= threshold`, or a NaN unless `keep_nan_kl`.
    fn is_high(&self, kl: f64) -> bool {
        let objective = &self.call.objective;
        let threshold = self.round(objective.kl_mask_threshold);
        objective.kind == ObjectiveKind::FlowDppo && (kl >= threshold || (kl.is_nan() && objective.keep_nan_kl == 0))
    }

    /// From all rows: the loss (None with `Reduction::None`), and the policy divisor followed by the metrics.
    pub fn batch(&self, at: impl Fn(Field, usize) -> f64) -> (Option<f64>, [f64; BATCH_LEN]) {
        let rows = self.rows as f64;
        let mean = |value: &dyn Fn(usize) -> f64| (0..self.rows).map(value).sum::<f64>() / rows;
        let share = |condition: &dyn Fn(usize) -> bool| mean(&|row| f64::from(u8::from(condition(row))));
        let extreme = |field, pick: fn(f64, f64) -> f64| {
            (0..self.rows).map(|row| at(field, row)).reduce(pick).unwrap_or(f64::NAN)
        };
        let keep = |row| at(Field::Keep, row) != 0.0;
        let advantage = |row| self.advantage(row);
        let PolicyLoss { objective, settings, .. } = &*self.call;
        let (low, up) = match objective.kind {
            ObjectiveKind::FlowDppo => (f64::INFINITY, f64::INFINITY),
            _ => (self.round(objective.clip_low), self.round(objective.clip_high)),
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

        let kept_only = settings.reduction == Reduction::KeptMean;
        let policy: f64 = (0..self.rows).filter(|&row| !kept_only || keep(row)).map(|row| at(Field::Loss, row)).sum();
        let kept = || ((0..self.rows).filter(|&row| keep(row)).count() as f64).max(1.0);
        let divisor = self.call.divisor().unwrap_or_else(kept);
        let penalty = match settings.reduction {
            _ if !self.has_ref => 0.0,
            Reduction::Sum => settings.ref_kl_weight * ref_kl * rows,
            _ => settings.ref_kl_weight * ref_kl,
        };
        let loss = (settings.reduction != Reduction::None).then_some(policy / divisor + penalty);
        let mut batch = [divisor; BATCH_LEN];
        batch[POLICY_DIVISOR + 1..].copy_from_slice(&metrics);
        (loss, batch)
    }

    pub fn row_loss(&self, at: impl Fn(Field) -> f64) -> f64 {
        at(Field::Loss) + if self.has_ref { self.call.settings.ref_kl_weight * at(Field::RefKl) } else { 0.0 }
    }
}

/// NaN wins, as in torch.
fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || a < b { a } else { b }
}

fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}
