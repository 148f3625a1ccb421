//! The CUDA backend: kernels compiled by `build.rs` and launched on PyTorch's stream.
//!
//! `image` (which compiled kernels fit a GPU), `device` (contexts and modules, once per GPU), `launch` (the one
//! launch), `arguments` (what all kernels take), and one file per operator with its arguments beside the CUDA prototypes
//! they mirror. A call allocates nothing, copies nothing, records no event and waits for nothing, so that it can be
//! captured into a CUDA graph: outputs and workspace come from PyTorch's allocator, and the stream is borrowed as it is.

mod arguments;
pub mod device;
pub mod image;
pub mod launch;
pub mod policy_loss;
pub mod sde_step;
