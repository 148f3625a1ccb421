//! Schedule: a row's sampler and noise levels -> coefficients of `mu = a x + b v` and the standard deviation.
//! Twin: `kernels/schedule.cuh`. Formulas and sources: `python/flowdppo_ops/reference.py`. Computed in float64 from
//! numbers of the arithmetic type and rounded once: every backend has the same coefficients but for the last bit of a
//! sine (`sin` here, `sinpi` on a GPU).

use std::f64::consts::FRAC_PI_2;

use super::memory::Host;
use crate::call::{RowVector, Sampler, Schedule};

/// A row's step: `mu = a x + b v` with standard deviation `std`.
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
    /// Noise level 0, or the last step of CPS.
    pub fn is_deterministic(&self) -> bool {
        self.std == 0.0
    }

    /// Of one row, rounded to the arithmetic type: float64 where `double`, else float32.
    pub fn new(schedule: Host<'_, Schedule>, sampler: Sampler, row: usize, double: bool) -> Transition {
        let round = |value: f64| if double { value } else { f64::from(value as f32) };
        let read = |of: fn(&Schedule) -> &RowVector| round(schedule.row(of, row));
        let sigma = read(|schedule| &schedule.sigma);
        let next = read(|schedule| &schedule.sigma_next);
        let noise_level = read(|schedule| &schedule.noise_level);
        let dt = next - sigma;
        let (a, b, std) = if sampler == Sampler::Cps {
            let std = next * (noise_level * FRAC_PI_2).sin();
            let r = (next * next - std * std).sqrt(); // no mul_add: 0 at noise level 1, not a NaN
            let a = (1.0 - next) + r;
            (a, (-sigma).mul_add(a, r), std) // b: -sigma (1 - next) + (1 - sigma) r
        } else {
            // q^2 = noise_level^2 sigma inverse; half_rate = q^2 / (2 sigma); std = q sqrt(-dt).
            let (inverse, variance) = if sampler == Sampler::FlowSde {
                let below_one = if sigma == 1.0 { read(|schedule| &schedule.sigma_max) } else { sigma };
                let inverse = 1.0 / (1.0 - below_one);
                (inverse, -dt * sigma * inverse)
            } else {
                (1.0 / sigma, -dt)
            };
            let half_rate = 0.5 * (noise_level * noise_level) * inverse;
            (half_rate.mul_add(dt, 1.0), half_rate.mul_add(1.0 - sigma, 1.0) * dt, noise_level * variance.sqrt())
        };
        Transition {
            a: round(a),
            b: round(b),
            std: round(std),
            sqrt_dt: round((-dt).sqrt()),
            guidance: if schedule.guidance_scale.is_present() {
                read(|schedule| &schedule.guidance_scale)
            } else {
                1.0
            },
        }
    }
}

#[cfg(test)]
#[path = "../../tests/unit/cpu_schedule.rs"]
mod tests;
