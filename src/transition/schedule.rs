//! Schedule: sampler and noise levels -> a row's coefficients, `mu = a x + b v`, and its standard deviation.
//!
//! The twin of `kernels/schedule.cuh`, line by line; formulas and sources stand in `python/flowdppo_ops/reference.py`.
//! Formed in float64 from numbers of the arithmetic type and rounded once, so that every backend has the same
//! coefficients.

use std::f64::consts::FRAC_PI_2;

use crate::tensor::{Host, Rows};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampler {
    FlowSde,
    DanceSde,
    Cps,
}

impl Sampler {
    pub const NAMES: &str = "flow_sde, dance_sde, cps";

    pub fn parse(name: &str) -> Option<Sampler> {
        match name {
            "flow_sde" => Some(Sampler::FlowSde),
            "dance_sde" => Some(Sampler::DanceSde),
            "cps" => Some(Sampler::Cps),
            _ => None,
        }
    }
}

/// The row vectors that say which step a row is.
#[derive(Clone, Copy, Debug)]
pub struct Schedule<'a, Space = Host> {
    pub sampler: Sampler,
    pub sigma: Rows<'a, Space>,
    pub sigma_next: Rows<'a, Space>,
    pub noise_level: Rows<'a, Space>,
    pub sigma_max: Rows<'a, Space>,
    /// Of classifier-free guidance; absent without an unconditional output.
    pub guidance_scale: Option<Rows<'a, Space>>,
}

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

impl Schedule<'_> {
    /// Of one row, rounded to the arithmetic type: float64 where `double`, else float32.
    pub fn transition(&self, row: usize, double: bool) -> Transition {
        let round = |value: f64| if double { value } else { f64::from(value as f32) };
        let read = |vector: Rows<'_>| round(vector.get(row));
        let (sigma, next, noise_level) = (read(self.sigma), read(self.sigma_next), read(self.noise_level));
        let dt = next - sigma;
        let sqrt_dt = (-dt).sqrt();
        let (a, b, std) = if self.sampler == Sampler::Cps {
            let std = next * (noise_level * FRAC_PI_2).sin();
            let r = (next * next - std * std).sqrt();
            ((1.0 - next) + r, -sigma * (1.0 - next) + (1.0 - sigma) * r, std)
        } else {
            let mut q = noise_level;
            if self.sampler == Sampler::FlowSde {
                let below_one = if sigma == 1.0 { read(self.sigma_max) } else { sigma };
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
            guidance: self.guidance_scale.map_or(1.0, read),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(sampler: Sampler, sigma: f64, sigma_next: f64, noise_level: f64) -> Schedule<'static> {
        let [sigma, sigma_next, noise_level] = [sigma, sigma_next, noise_level].map(Rows::Number);
        Schedule { sampler, sigma, sigma_next, noise_level, sigma_max: Rows::Number(0.9), guidance_scale: None }
    }

    #[test]
    fn without_noise_every_sampler_takes_the_euler_step() {
        for sampler in [Sampler::FlowSde, Sampler::DanceSde, Sampler::Cps] {
            let step = schedule(sampler, 0.75, 0.5, 0.0).transition(0, true);
            assert!((step.a - 1.0).abs() < 1e-15 && (step.b + 0.25).abs() < 1e-15, "{sampler:?}: {step:?}");
            assert!(step.is_deterministic() && step.sqrt_dt == 0.5);
        }
        assert!(schedule(Sampler::Cps, 0.25, 0.0, 0.7).transition(0, true).is_deterministic());
    }

    #[test]
    fn flow_sde_replaces_exactly_one() {
        let at = |sigma| schedule(Sampler::FlowSde, sigma, 0.5, 1.0).transition(0, true).std;
        assert!((at(1.0) - (1.0f64 / 0.1).sqrt() * 0.5f64.sqrt()).abs() < 1e-12);
        assert!((at(0.75) - 3.0f64.sqrt() * 0.25f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn numbers_are_rounded_to_float32_unless_all_is_double() {
        let step = |double| schedule(Sampler::DanceSde, 0.7, 0.6, 0.3).transition(0, double);
        assert_eq!(step(false).std, f64::from(step(false).std as f32));
        assert_ne!(step(true).std, f64::from(step(true).std as f32));
    }
}
