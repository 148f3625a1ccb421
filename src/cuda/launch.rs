//! The table of the kernels of one `kernels/<unit>.cu`, and their launch.

use std::ffi::c_void;
use std::ptr;

use bytemuck::NoUninit;
use cudarc::driver::{result, sys};

use super::device::{Device, During, PerDevice};
use crate::call::{Dtype, Latent};
use crate::error::Error;
use crate::plan::GridPlan;

/// Where a call runs: PyTorch's device number, and the current stream there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub device: usize,
    pub stream: usize,
}

impl Target {
    /// Whether the stream is being captured into a CUDA graph.
    pub fn is_capturing(&self) -> Result<bool, Error> {
        // The legacy default stream (0 or 1) cannot be captured, and asking about it is an error while another stream
        // is being captured. Other handles name their context, so none need be current.
        if self.stream <= 1 {
            return Ok(false);
        }
        // SAFETY: PyTorch looked the stream up for this call, so it is alive.
        let status = unsafe { result::stream::is_capturing(ptr::without_provenance_mut(self.stream)) };
        let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        status.map(|status| status != none).during("cuStreamIsCapturing")
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Direction {
    Forward,
    Backward,
}

/// A kernel for three dtypes, or for every mix.
#[derive(Debug)]
pub struct Variant {
    pub suffix: &'static str,
    /// Takes model outputs, else means.
    pub is_step: bool,
    /// Of the outputs, the samples, the other policies; None: every mix.
    pub dtypes: Option<[Dtype; 3]>,
}

impl Variant {
    pub const fn means(suffix: &'static str, mean: Dtype, others: Dtype) -> Variant {
        Variant { suffix, is_step: false, dtypes: Some([mean, others, others]) }
    }

    pub const fn step(suffix: &'static str, outputs: Dtype, samples: Dtype, policies: Dtype) -> Variant {
        Variant { suffix, is_step: true, dtypes: Some([outputs, samples, policies]) }
    }
}

/// The kernels of one compiled unit: `<unit>_{forward, backward}_<variant>`, each with one argument by value.
pub struct Unit {
    pub name: &'static str,
    /// Those that take every mix come last.
    pub variants: &'static [Variant],
    /// Bytes of the argument of a forward and of a backward.
    pub bytes: [usize; 2],
    pub loaded: PerDevice<Loaded>,
}

/// Function handles of a device: all forwards, then all backwards.
pub struct Loaded(Vec<sys::CUfunction>);

// SAFETY: a function handle may be used by every thread, and its module is never unloaded.
unsafe impl Send for Loaded {}
// SAFETY: a function handle may be used by several threads at once, and the list does not change.
unsafe impl Sync for Loaded {}

impl Unit {
    /// Names of all entry points, forward and then backward, with the bytes of their only argument.
    pub fn entry_points(&self) -> impl Iterator<Item = (String, usize)> {
        ["forward", "backward"].into_iter().zip(self.bytes).flat_map(move |(direction, bytes)| {
            self.variants.iter().map(move |one| (format!("{}_{direction}_{}", self.name, one.suffix), bytes))
        })
    }

    /// Multiprocessors of the device; loads the kernels there.
    pub fn multiprocessors(&self, ordinal: usize) -> Result<u32, Error> {
        self.load(ordinal).map(|(device, _)| device.multiprocessors)
    }

    fn load(&self, ordinal: usize) -> Result<(&'static Device, &Loaded), Error> {
        let device = Device::get(ordinal)?;
        let loaded = self.loaded.get_or_make(ordinal, || {
            let names: Vec<String> = self.entry_points().map(|(name, _)| name).collect();
            device.load(self.name, &names).map(Loaded)
        })?;
        Ok((device, loaded))
    }

    /// Index of the variant for these latents: outputs, samples, other policies. An absent latent fits every variant.
    fn variant(&self, is_step: bool, groups: [&[Latent]; 3]) -> usize {
        let fits = |variant: &Variant| {
            let of_group = |(latents, dtype): (&[Latent], Dtype)| {
                latents.iter().all(|latent| !latent.is_present() || latent.dtype == dtype)
            };
            variant.is_step == is_step
                && variant.dtypes.is_none_or(|dtypes| groups.into_iter().zip(dtypes).all(of_group))
        };
        self.variants.iter().position(fits).expect("the last variant of each kind fits everything")
    }

    /// Puts the kernel for these latents on a stream and returns at once.
    /// # Safety
    /// - `Parameters` is what this unit's kernels take in this direction, and the sizes in `parameters` fit `plan`.
    /// - `target.stream` is a stream of `target.device`, or 0 for its default one, and alive until this returns.
    /// - Every address in `parameters` is memory of that device and of these sizes. Until the kernel has run it stays
    ///   valid, and no other stream writes it or, where the kernel writes, touches it.
    pub unsafe fn launch<Parameters: NoUninit>(
        &self, target: Target, direction: Direction, (is_step, groups): (bool, [&[Latent]; 3]), plan: GridPlan,
        parameters: &Parameters,
    ) -> Result<(), Error> {
        let (device, Loaded(functions)) = self.load(target.device)?;
        let first = direction as usize * self.variants.len();
        let function = functions[first + self.variant(is_step, groups)];
        assert_eq!(size_of::<Parameters>(), self.bytes[direction as usize]);
        let _bound = device.bind()?;
        // The driver copies the parameters before it returns; it reads as many bytes as the kernel takes.
        let mut arguments = [ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let (grid, block) = ((plan.blocks, 1, 1), (GridPlan::THREADS, 1, 1));
        // SAFETY: `function` is of this context and takes these parameters; the caller promises stream and memory.
        unsafe {
            let stream = ptr::without_provenance_mut(target.stream);
            result::launch_kernel(function, grid, block, 0, stream, &mut arguments)
        }
        .during("cuLaunchKernel")
    }
}
