//! One file per operator: check, plan, dispatch to a backend.

pub mod policy_loss;
pub mod sde_step;
