//! GPUs: the driver, each device's primary context, in which the CUDA runtime and PyTorch work, and the kernels loaded
//! there. Contexts are never released, modules never unloaded: a stream may still run kernels when the process ends.

use std::ffi::{CString, c_int};
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{DriverError, result};

use super::image::{IMAGES, choose};
use crate::error::Error;

/// Adds the driver function's name to an error.
pub(super) trait During<T> {
    fn during(self, call: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, call: &'static str) -> Result<T, Error> {
        self.map_err(|error| {
            let name = error.error_name().unwrap_or(c"an unknown error").to_string_lossy();
            let meaning = error.error_string().unwrap_or(c"no description").to_string_lossy();
            Error::Driver { call, error: format!("{name} ({meaning})") }
        })
    }
}

/// cudarc panics where there is no driver, so ask first; once, because it searches 34 library names (~1 ms).
fn has_driver() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads and releases libcuda, whose initialisers ask nothing of this process.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

fn attribute(handle: sys::CUdevice, which: Attribute) -> Result<c_int, Error> {
    // SAFETY: callers have the handle from cuDeviceGet.
    unsafe { result::device::get_attribute(handle, which) }.during("cuDeviceGetAttribute")
}

/// As one number: 90 for 9.0.
fn capability(handle: sys::CUdevice) -> Result<u32, Error> {
    let major = attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((10 * major + minor).cast_unsigned())
}

/// The driver's version (12040 for CUDA 12.4), and each GPU's name and compute capability.
pub type Driver = (c_int, Vec<(String, u32)>);

/// For a report: opens no context. None without a driver.
pub fn survey() -> Result<Option<Driver>, Error> {
    if !has_driver() {
        return Ok(None);
    }
    result::init().during("cuInit")?;
    let mut version = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().during("cuDriverGetVersion")?;
    let count = result::device::get_count().during("cuDeviceGetCount")?;
    let described = |ordinal| {
        let handle = result::device::get(ordinal).during("cuDeviceGet")?;
        Ok((result::device::get_name(handle).during("cuDeviceGetName")?, capability(handle)?))
    };
    Ok(Some((version, (0..count).map(described).collect::<Result<_, _>>()?)))
}

/// One value per device, made on first use. A failure is not kept: the next call tries again.
pub struct PerDevice<T>([OnceLock<T>; MAX_DEVICES], Mutex<()>);

const MAX_DEVICES: usize = 64;

impl<T> PerDevice<T> {
    #[allow(clippy::new_without_default)] // a default is no constant
    pub const fn new() -> Self {
        PerDevice([const { OnceLock::new() }; MAX_DEVICES], Mutex::new(()))
    }

    pub fn get_or_make(&self, ordinal: usize, make: impl FnOnce() -> Result<T, Error>) -> Result<&T, Error> {
        let slot = self.0.get(ordinal).ok_or(Error::NoDevice { ordinal })?;
        if let Some(value) = slot.get() {
            return Ok(value);
        }
        // One thread makes the value: a module loaded twice would waste device memory.
        let _making = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.get() {
            Some(value) => Ok(value),
            None => make().map(|value| slot.get_or_init(|| value)),
        }
    }
}

#[derive(Debug)]
pub struct Device {
    pub ordinal: usize,
    pub capability: u32,
    pub multiprocessors: u32,
    context: sys::CUcontext,
}

// SAFETY: a context handle may be used by every thread, and a retained primary context stays valid.
unsafe impl Send for Device {}
// SAFETY: several threads may use a context at once, and nothing in a `Device` changes.
unsafe impl Sync for Device {}

impl Device {
    /// The device that PyTorch calls `cuda:<ordinal>`: driver and runtime count them alike.
    pub fn get(ordinal: usize) -> Result<&'static Device, Error> {
        static DEVICES: PerDevice<Device> = PerDevice::new();
        DEVICES.get_or_make(ordinal, || Device::open(ordinal))
    }

    fn open(ordinal: usize) -> Result<Device, Error> {
        if !has_driver() {
            return Err(Error::NoDriver);
        }
        result::init().during("cuInit")?;
        let _relaxed = Relaxed::enter()?;
        let index = c_int::try_from(ordinal).map_err(|_| Error::NoDevice { ordinal })?;
        let handle = result::device::get(index).during("cuDeviceGet")?;
        let multiprocessors = attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: `handle` came from cuDeviceGet. Retaining makes nothing current, and is what the runtime does too.
        let context = unsafe { result::primary_ctx::retain(handle) }.during("cuDevicePrimaryCtxRetain")?;
        Ok(Device {
            ordinal,
            capability: capability(handle)?,
            multiprocessors: multiprocessors.max(1).cast_unsigned(),
            context,
        })
    }

    /// Makes the device's context current on this thread until the result is dropped.
    pub(super) fn bind(&self) -> Result<Bound, Error> {
        let previous = result::ctx::get_current().during("cuCtxGetCurrent")?.unwrap_or(ptr::null_mut());
        if previous == self.context {
            return Ok(Bound { restore: None, thread: PhantomData });
        }
        // SAFETY: a retained primary context is valid.
        unsafe { result::ctx::set_current(self.context) }.during("cuCtxSetCurrent")?;
        Ok(Bound { restore: Some(previous), thread: PhantomData })
    }

    /// Loads the image of `unit` for this GPU and finds `names` in it. `PerDevice` calls it once per device.
    pub(super) fn load(&self, unit: &'static str, names: &[String]) -> Result<Vec<sys::CUfunction>, Error> {
        let Device { ordinal, capability, .. } = *self;
        let image = choose(IMAGES, unit, capability).ok_or(Error::NoImage { ordinal, capability })?;
        let _bound = self.bind()?;
        let _relaxed = Relaxed::enter()?;
        // SAFETY: the image is a whole cubin, or PTX that ends with a NUL, by `build.rs` and the tests of `image`.
        let module = unsafe { result::module::load_data(image.bytes.as_ptr().cast()) }.during("cuModuleLoadData")?;
        let find = |name: &String| {
            let name = CString::new(name.as_str()).expect("kernel names have no NUL");
            // SAFETY: the module was just loaded.
            let function = unsafe { result::module::get_function(module, name) }.during("cuModuleGetFunction")?;
            let any = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS;
            // Drivers load a kernel when it is first asked for: ask here, not during a CUDA graph capture.
            // SAFETY: the function was just found.
            unsafe { result::function::get_function_attribute(function, any) }.during("cuFuncGetAttribute")?;
            Ok(function)
        };
        names.iter().map(find).collect()
    }
}

/// Restores the previous context: to the runtime, the current context *is* the caller's current device.
pub(super) struct Bound {
    restore: Option<sys::CUcontext>,
    /// Not `Send`: a current context belongs to a thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(previous) = self.restore {
            // SAFETY: this context was current on this thread before, or is null, which means none.
            // The error is dropped: a broken context reports itself on the next call.
            let _ = unsafe { result::ctx::set_current(previous) };
        }
    }
}

/// A capture in the default mode forbids every thread to load modules, although that does not touch the captured
/// stream. In relaxed mode this thread may (PyTorch: `CUDAStreamCaptureModeGuard`).
struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    fn enter() -> Result<Relaxed, Error> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges this thread's mode with a valid one.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }
            .result()
            .during("cuThreadExchangeStreamCaptureMode")?;
        Ok(Relaxed(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: exchanges this thread's mode with the one that was there before.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}
