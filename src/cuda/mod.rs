//! The CUDA backend: kernels compiled by `build.rs`, launched on PyTorch's stream. `image` finds the kernels for a GPU,
//! `device` holds contexts and modules, `launch` launches, and one file per operator picks its kernel and grid.
//! A call allocates nothing, copies nothing, records no event and waits for nothing, so that a CUDA graph can capture
//! it: outputs and workspace come from PyTorch's allocator.

pub mod device;
pub mod image;
pub mod launch;
pub mod policy_loss;
pub mod sde_step;
