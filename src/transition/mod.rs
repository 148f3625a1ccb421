//! Transition: how a row's `x'`, `mu` and `mu°` come out of memory, and what a schedule makes of a row.
//!
//! The twin of `kernels/transition.cuh` and `kernels/schedule.cuh`. A `Source` is the only thing in which the operators
//! over row statistics differ: everything behind it sees differences, `LANES` elements at a time. `loss` reads given
//! means (`means`), `step_loss` applies `a x + b v` to model outputs (`step`).

pub mod means;
pub mod schedule;
