//! The CPU backend: `simd` for arithmetic, `threads` for sharing tasks among threads, one file per operator.

pub mod policy_loss;
pub mod sde_step;
pub mod simd;
pub mod threads;
