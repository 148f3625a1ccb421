//! Fused policy losses for flow-matching RL; the native half of the Python package `flowdppo_ops`.
//!
//! Calls go one way: `boundary` (Python's objects to a call) -> `ops` (check, plan, dispatch) -> `cpu` or `cuda` (backend)
//! -> `call` (what a call is) and `plan` (how it is cut into tasks and grids), which depend on nothing.

use pyo3::prelude::*;

mod boundary;
pub mod call;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod ops;
pub mod plan;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    cpu::threads::importing_process();
    boundary::register(module)
}
