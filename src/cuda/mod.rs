//! The CUDA backend: kernels compiled by `build.rs` and launched on PyTorch's stream.
//!
//! `image` (which compiled kernels fit a GPU), `device` (contexts and modules, once per GPU), `launch` (the one launch,
//! and the table of a unit's kernels), and one file per operator: which kernel takes a call, and its grid. A call
//! allocates nothing, copies nothing, records no event and waits for nothing, so that it can be captured into a CUDA
//! graph: outputs and workspace come from PyTorch's allocator, and the stream is borrowed as it is.

pub mod device;
pub mod image;
pub mod launch;
pub mod policy_loss;
pub mod sde_step;
