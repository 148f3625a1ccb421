//! Fused policy losses for flow-matching RL; the native half of the Python package `flowdppo_ops`.
//!
//! Calls go one way: `python` (boundary) -> `ops` (check, plan, dispatch) -> `cpu` or `cuda` (backend). Two ideas that
//! every backend shares have a file each: `transition` (how means come out of memory) and `objective` (what a row
//! becomes).

use pyo3::prelude::*;

pub mod cpu;
pub mod cuda;
pub mod error;
pub mod objective;
pub mod ops;
pub mod plan;
mod python;
pub mod tensor;
pub mod transition;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    cpu::threads::importing_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("METRICS", objective::METRICS.to_vec())?;
    module.add("FIELDS", objective::FIELDS)?;
    module.add("STEP_FIELDS", objective::STEP_FIELDS)?;
    module.add("BATCH_LEN", objective::BATCH_LEN)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_gradient_ahead, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_forward, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_shard_sums, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_backward, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_workspace_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_forward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_shard_sums_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::policy_loss::policy_loss_backward_cuda, module)?)?;
    module.add("SDE_STEP_NUMBERS", ops::sde_step::NUMBERS)?;
    module.add_function(wrap_pyfunction!(python::sde_step::sde_step_forward, module)?)?;
    module.add_function(wrap_pyfunction!(python::sde_step::sde_step_backward, module)?)?;
    module.add_function(wrap_pyfunction!(python::sde_step::sde_step_workspace_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::sde_step::sde_step_forward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::sde_step::sde_step_backward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(python::instruction_set, module)?)?;
    module.add_function(wrap_pyfunction!(python::cuda_driver, module)?)?;
    module.add_function(wrap_pyfunction!(python::cuda_images, module)?)?;
    module.add_function(wrap_pyfunction!(python::cuda_images_for, module)?)?;
    module.add_function(wrap_pyfunction!(python::cuda_entry_points, module)?)
}
