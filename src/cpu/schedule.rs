//! Schedule: sampler and noise levels -> a row's coefficients, `mu = a x + b v`, and its standard deviation.
//!
//! The twin of `kernels/schedule.cuh`; formulas and sources stand in `python/flowdppo_ops/reference.py`. Formed in
//! float64 from numbers of the arithmetic type and rounded once, so that every backend has the same coefficients but for
//! the last bit of a sine (`sin` here, `sinpi` on a GPU).

use std::f64::consts::FRAC_PI_2;

use super::memory::Host;
use crate::call::{RowVector, Sampler, Schedule};

/// What a row's step is: `mu = a x + b v`.
#[derive(Clone, Copy, Debug)]
pub struct Transition {
    pub a: f64,
    pub b: f64,
    pub std: f64,
    /// sqrt(sigma - sigma_next)
    pub sqrt_dt: f64,
    /// `v = uncond + guidance (output - uncond)`; 1 without guidance.
    pub guidance: f64,
}

impl Transition {
    /// Nothing is random in such a row: noise level 0, or the last step of CPS.
    pub fn is_deterministic(&self) -> bool {
        self.std == 0.0
    }
}

impl Transition {
    /// Of one row, rounded to the arithmetic type: float64 where `double`, else float32.
    pub fn new(schedule: Host<'_, Schedule>, sampler: Sampler, row: usize, double: bool) -> Transition {
        let round = |value: f64| if double { value } else { f64::from(value as f32) };
        let read = |of: fn(&Schedule) -> &RowVector| round(schedule.row(of, row));
        let sigma = read(|schedule| &schedule.sigma);
        let next = read(|schedule| &schedule.sigma_next);
        let noise_level = read(|schedule| &schedule.noise_level);
        let dt = next - sigma;
        let sqrt_dt = (-dt).sqrt();
        let (a, b, std) = if sampler == Sampler::Cps {
            let std = next * (noise_level * FRAC_PI_2).sin();
            let r = (next * next - std * std).sqrt();
            ((1.0 - next) + r, -sigma * (1.0 - next) + (1.0 - sigma) * r, std)
        } else {
            let mut q = noise_level;
            if sampler == Sampler::FlowSde {
                let below_one = if sigma == 1.0 { read(|schedule| &schedule.sigma_max) } else { sigma };
                q *= (sigma / (1.0 - below_one)).sqrt();
            }
            let half_rate = q * q / (2.0 * sigma);
            (1.0 + half_rate * dt, (1.0 + half_rate * (1.0 - sigma)) * dt, q * sqrt_dt)
        };
        Transition {
            a: round(a),
            b: round(b),
            std: round(std),
            sqrt_dt: round(sqrt_dt),
            guidance: if schedule.guidance_scale.is_present() {
                read(|schedule| &schedule.guidance_scale)
            } else {
                1.0
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transition(sampler: Sampler, [sigma, sigma_next, noise_level]: [f64; 3], double: bool) -> Transition {
        let [sigma, sigma_next, noise_level, sigma_max] = [sigma, sigma_next, noise_level, 0.9].map(RowVector::number);
        let schedule = Schedule { sigma, sigma_next, noise_level, sigma_max, ..Schedule::default() };
        // SAFETY: all are numbers, there is no address.
        Transition::new(unsafe { Host::new(&schedule) }, sampler, 0, double)
    }

    #[test]
    fn without_noise_every_sampler_takes_the_euler_step() {
        for sampler in [Sampler::FlowSde, Sampler::DanceSde, Sampler::Cps] {
            let step = transition(sampler, [0.75, 0.5, 0.0], true);
            assert!((step.a - 1.0).abs() < 1e-15 && (step.b + 0.25).abs() < 1e-15, "{sampler:?}: {step:?}");
            assert!(step.is_deterministic() && step.sqrt_dt == 0.5);
        }
        assert!(transition(Sampler::Cps, [0.25, 0.0, 0.7], true).is_deterministic());
    }

    #[test]
    fn flow_sde_replaces_exactly_one() {
        let at = |sigma| transition(Sampler::FlowSde, [sigma, 0.5, 1.0], true).std;
        assert!((at(1.0) - (1.0f64 / 0.1).sqrt() * 0.5f64.sqrt()).abs() < 1e-12);
        assert!((at(0.75) - 3.0f64.sqrt() * 0.25f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn numbers_are_rounded_to_float32_unless_all_is_double() {
        let step = |double| transition(Sampler::DanceSde, [0.7, 0.6, 0.3], double);
        assert_eq!(step(false).std, f64::from(step(false).std as f32));
        assert_ne!(step(true).std, f64::from(step(true).std as f32));
    }
}
