//! The one place that launches a kernel.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::{result, sys};

use super::device::{Device, During};
use crate::error::Error;

/// A loaded kernel that takes one `Parameters` by value.
#[derive(Debug)]
pub struct Kernel<Parameters> {
    function: sys::CUfunction,
    parameters: PhantomData<fn(Parameters)>,
}

// SAFETY: a function handle may be used by every thread, and its module is never unloaded.
unsafe impl<Parameters> Send for Kernel<Parameters> {}
// SAFETY: as above; nothing in a `Kernel` changes.
unsafe impl<Parameters> Sync for Kernel<Parameters> {}

impl<Parameters> Kernel<Parameters> {
    /// # Safety
    /// `function` comes from a module that stays loaded, and its only argument has the layout of `Parameters`.
    pub unsafe fn new(function: sys::CUfunction) -> Self {
        Kernel { function, parameters: PhantomData }
    }
}

/// Where a call runs: PyTorch's device number, and the stream that is current there.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub device: usize,
    pub stream: usize,
}

impl Target {
    /// Whether what is put on the stream now goes into a CUDA graph.
    pub fn is_capturing(&self) -> Result<bool, Error> {
        // The legacy default stream (0, or its name 1) cannot be captured, and asking about it is an error while
        // another stream is. Anything but 0 names its context, so none need be current.
        if self.stream <= 1 {
            return Ok(false);
        }
        // SAFETY: the stream is alive, see `launch`.
        let status = unsafe { result::stream::is_capturing(ptr::without_provenance_mut(self.stream)) };
        let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        status.map(|status| status != none).during("cuStreamIsCapturing")
    }
}

/// A one-dimensional grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: u32,
    pub threads: u32,
}

/// Puts one kernel on a stream and returns at once.
///
/// # Safety
/// - `stream` is a stream of `device`, or 0 for its default one, and alive until this returns: PyTorch looked it up for
///   this call.
/// - Every address in `parameters` is memory of `device` that stays valid, and that no other stream writes (or, where
///   the kernel writes, touches), until the kernel has run: PyTorch's allocator gives memory back to the stream it came
///   from, behind the kernel.
/// - The kernel stays inside that memory for this grid: its plan and its parameters were made from the same sizes.
pub unsafe fn launch<Parameters>(
    kernel: &Kernel<Parameters>,
    device: &Device,
    stream: usize,
    grid: Grid,
    parameters: &Parameters,
) -> Result<(), Error> {
    let _bound = device.bind()?;
    // The driver copies the parameters before it returns; it reads as many bytes as the kernel takes.
    let mut arguments = [ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
    let (stream, blocks, threads) = (ptr::without_provenance_mut(stream), (grid.blocks, 1, 1), (grid.threads, 1, 1));
    // SAFETY: the function is loaded and takes exactly these parameters by the contract of `Kernel::new`, in the
    // context that is current now; the rest is the contract of this function.
    unsafe { result::launch_kernel(kernel.function, blocks, threads, 0, stream, &mut arguments) }
        .during("cuLaunchKernel")
}
