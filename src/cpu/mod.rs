//! The CPU backend: `memory` for arrays, `simd` for arithmetic, `threads`, what `loss` and `step_loss` share (`schedule`,
//! `source`, `objective`), and one file per operator.

pub mod memory;
pub mod objective;
pub mod policy_loss;
pub mod schedule;
pub mod sde_step;
pub mod simd;
pub mod source;
pub mod threads;
