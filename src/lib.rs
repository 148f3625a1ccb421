//! `flowdppo_ops._native`.
use pyo3::prelude::*;
pub mod objective;
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("METRICS", objective::METRICS.to_vec())?;
    Ok(())
}
