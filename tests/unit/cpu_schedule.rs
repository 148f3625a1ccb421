//! Tests of `src/cpu/schedule.rs`.

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
fn all_of_a_cps_step_may_be_noise() {
    for at in 1..200 {
        let sigma_next = f64::from(at) / 256.3;
        let step = transition(Sampler::Cps, [0.8, sigma_next, 1.0], true);
        assert_eq!((step.a, step.std), (1.0 - sigma_next, sigma_next));
        assert!((step.b + 0.8 * (1.0 - sigma_next)).abs() < 1e-15);
    }
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
