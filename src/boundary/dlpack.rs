//! DLPack's exchange interface (version 1): PyTorch 2.10 and later gives a tensor's metadata in one call of C. For six
//! tensors after a model's forward this and `is_neg` take 20 us, their seven attributes 35.

use std::ffi::{CStr, c_int, c_void};
use std::{ptr, slice};

use pyo3::ffi::{PyCapsule_GetPointer, PyObject};
use pyo3::prelude::*;

use crate::call::Dtype;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

const NAME: &CStr = c"dlpack_exchange_api";

/// `DLTensor`
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackExchangeAPI`, as far as it is used.
#[repr(C)]
struct Api {
    major: u32,
    minor: u32,
    previous: *const c_void,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object: *const c_void,
    tensor_from_py_object: Option<unsafe extern "C" fn(*mut PyObject, *mut Tensor) -> c_int>,
}

/// Describes tensors of the class that it was found in.
pub struct Exchange(unsafe extern "C" fn(*mut PyObject, *mut Tensor) -> c_int);

/// Address, dtype, device, shape.
pub type Described = (usize, Dtype, Device, Vec<usize>);

impl Exchange {
    pub fn find(class: &Bound<'_, PyAny>) -> Option<Exchange> {
        let capsule = class.getattr_opt("__dlpack_c_exchange_api__").ok()??;
        // SAFETY: the GIL is held; a capsule of this name holds DLPack's struct for ever. For another object the pointer
        // is null and an exception is set, which is taken below.
        let api = unsafe { PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr()).cast::<Api>().as_ref() };
        if api.is_none() {
            drop(PyErr::take(class.py()));
        }
        api.filter(|api| api.major == 1).and_then(|api| api.tensor_from_py_object).map(Exchange)
    }

    /// None for a tensor that is not contiguous, or whose device, dtype or layout no call takes; the caller then reads
    /// its attributes.
    ///
    /// # Safety
    /// `tensor` is of the class that the exchange was found in, or of a subclass with the same memory layout.
    pub unsafe fn describe(&self, tensor: &Bound<'_, PyAny>) -> Option<Described> {
        let mut found = Tensor {
            data: ptr::null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: the caller promises the class that the function is for; `found` is writable; DLPack's functions do not
        // throw.
        if unsafe { (self.0)(tensor.as_ptr(), &raw mut found) } != 0 {
            drop(PyErr::take(tensor.py()));
            return None;
        }
        let dtype = match (found.code, found.bits, found.lanes) {
            (2, 32, 1) => Dtype::F32,
            (2, 16, 1) => Dtype::F16,
            (2, 64, 1) => Dtype::F64,
            (4, 16, 1) => Dtype::Bf16,
            _ => return None,
        };
        let device = match found.device_type {
            1 => Device::Cpu,
            2 => Device::Cuda(usize::try_from(found.device_id).ok()?),
            _ => return None,
        };
        let ndim = usize::try_from(found.ndim).ok()?;
        let dims = |of: *const i64| {
            // SAFETY: `ndim` numbers stay there while the tensor lives unchanged, and nobody changes it while we hold the
            // GIL.
            if ndim == 0 { &[][..] } else { unsafe { slice::from_raw_parts(of, ndim) } }
        };
        let shape = dims(found.shape);
        if ndim > 0 && !found.strides.is_null() {
            let mut expected = 1;
            for (&dim, &stride) in shape.iter().zip(dims(found.strides)).rev() {
                if dim != 1 && stride != expected {
                    return None;
                }
                expected *= dim;
            }
        }
        let address = (found.data as usize).checked_add(usize::try_from(found.byte_offset).ok()?)?;
        let shape = shape.iter().map(|&dim| usize::try_from(dim).ok()).collect::<Option<Vec<_>>>()?;
        Some((address, dtype, device, shape))
    }
}
