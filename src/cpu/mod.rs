//! The CPU backend: `simd` for arithmetic, `pool` for threads, one file per operator.

pub mod policy_loss;
pub mod pool;
pub mod sde_step;
pub mod simd;
