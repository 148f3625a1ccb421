//! The boundary to Python: turns Python's objects into checked calls, and errors into exceptions.
//!
//! `array` describes tensors and NumPy arrays (`dlpack` does so faster where it can), `bind` checks them against one
//! another, `memo` remembers calls that Python has checked, and the files of an operator have its functions.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::call::{self, Density, LatentReduction, Reduction, Sampler};
use crate::cpu::simd::{self, InstructionSet};
use crate::cuda::image::{IMAGES, Image, choose};
use crate::cuda::{self, device, device::Driver};
use crate::error::Error;

mod array;
mod bind;
mod dlpack;
mod guard;
mod memo;
mod objective;
mod policy_loss;
mod policy_loss_backward;
mod sde_step;
mod workspace;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("METRICS", call::METRICS)?;
    module.add("FIELDS", call::FIELDS)?;
    module.add("STEP_FIELDS", call::STEP_FIELDS)?;
    module.add("BATCH_LEN", call::BATCH_LEN)?;
    module.add("SDE_STEP_NUMBERS", call::SDE_STEP_NUMBERS)?;
    module.add("LATENTS", call::Latents::NAMES)?;
    module.add("ROW_VECTORS", call::RowVectors::NAMES)?;
    module.add("SCHEDULE", call::Schedule::NAMES)?;
    module.add("SDE_STEP_LATENTS", call::SdeStepLatents::NAMES)?;
    module.add("SAMPLERS", Sampler::NAMES[1..].to_vec())?; // the first stands for none
    module.add("DENSITIES", Density::NAMES.to_vec())?;
    module.add("LATENT_REDUCTIONS", LatentReduction::NAMES.to_vec())?;
    module.add("REDUCTIONS", Reduction::NAMES.to_vec())?;
    module.add_class::<objective::NativeObjective>()?;
    module.add_class::<policy_loss::PolicyLossCall>()?;
    module.add_class::<policy_loss::PolicyLossMemo>()?;
    module.add_function(wrap_pyfunction!(policy_loss_backward::policy_loss_backward, module)?)?;
    module.add_function(wrap_pyfunction!(policy_loss::policy_loss_numpy, module)?)?;
    module.add_class::<sde_step::SdeStepCall>()?;
    module.add_class::<sde_step::SdeStepMemo>()?;
    module.add_function(wrap_pyfunction!(sde_step::sde_step_backward, module)?)?;
    module.add_function(wrap_pyfunction!(instruction_set, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_driver, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_images, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_images_for, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_entry_points, module)?)
}

/// The embedded images: unit, compute capability, whether it is PTX, bytes.
#[pyfunction]
fn cuda_images(py: Python<'_>) -> Vec<(&'static str, u32, bool, Bound<'_, PyBytes>)> {
    let row = |image: &Image| (image.unit, image.capability, image.is_ptx, PyBytes::new(py, image.bytes));
    IMAGES.iter().map(row).collect()
}

/// The names of all kernels, and the number of bytes of the one argument that the launcher gives each.
#[pyfunction]
fn cuda_entry_points() -> Vec<(String, usize)> {
    cuda::policy_loss::UNIT.entry_points().chain(cuda::sde_step::UNIT.entry_points()).collect()
}

/// The image of each unit that a GPU of this compute capability loads: unit, compute capability, whether it is PTX.
#[pyfunction]
fn cuda_images_for(capability: u32) -> Vec<(&'static str, u32, bool)> {
    let mut units: Vec<_> = IMAGES.iter().map(|image| image.unit).collect();
    units.sort_unstable();
    units.dedup();
    let chosen = units.into_iter().filter_map(|unit| choose(IMAGES, unit, capability));
    chosen.map(|image| (image.unit, image.capability, image.is_ptx)).collect()
}

/// The CUDA driver's version and GPUs; None if there is no driver.
#[pyfunction]
fn cuda_driver() -> Result<Option<Driver>, Error> {
    guard::guarded(device::survey)
}

/// The instruction set that the CPU backend uses on this processor.
#[pyfunction]
fn instruction_set() -> &'static str {
    match simd::instruction_set() {
        InstructionSet::Avx512 => "avx512",
        InstructionSet::Avx2 => "avx2",
        InstructionSet::Baseline => "baseline",
    }
}
