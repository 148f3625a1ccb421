//! The CPU backend: `policy_loss` (with `gradient`) and `sde_step` are the operators, the other modules what they
//! share.

pub mod gradient;
pub mod memory;
pub mod objective;
pub mod policy_loss;
pub mod schedule;
pub mod sde_step;
pub mod simd;
pub mod source;
pub mod threads;
