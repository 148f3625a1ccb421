//! Describes PyTorch's tensors and NumPy's arrays without reading a value, and makes new ones.

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyAttributeError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

pub use super::dlpack::Device;
use super::dlpack::Exchange;
use crate::call::Dtype;
use crate::cuda::launch::Target;
use crate::error::Error;
use crate::ops::Place;

/// Contiguous memory of one dtype.
#[derive(Clone, Debug)]
pub struct Array {
    pub address: u64,
    pub dtype: Dtype,
    pub device: Device,
    pub shape: Vec<usize>,
}

impl Array {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The dtype, if it is one in which results are computed.
    pub fn arithmetic(&self, name: &'static str) -> Result<Dtype, Error> {
        match self.dtype {
            Dtype::F32 | Dtype::F64 => Ok(self.dtype),
            came => Err(Error::Dtype { name, came: came.name().to_owned(), wanted: "float32 or float64" }),
        }
    }

    fn new(name: &'static str, (address, dtype, device): (usize, Dtype, Device), shape: Vec<usize>) -> PyResult<Array> {
        let array = Array { address: address as u64, dtype, device, shape };
        if address == 0 && array.len() > 0 {
            return Err(Error::NoMemory { name, len: array.len() }.into());
        }
        if !address.is_multiple_of(dtype.size()) {
            return Err(Error::Misaligned { name, address, size: dtype.size() }.into());
        }
        Ok(array)
    }
}

/// An array library: PyTorch or NumPy.
pub trait Library: Sync {
    fn is_array(&self, object: &Bound<'_, PyAny>) -> bool;

    /// Describes an array, or a contiguous copy of it: the returned object has the memory.
    fn read<'py>(&self, name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, Array)>;

    /// An uninitialised array on the device of `like`.
    fn empty<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize], dtype: Dtype) -> PyResult<Bound<'py, PyAny>>;

    /// An argument for `empty_like`, which makes arrays of `len` elements of it. PyTorch's has memory for one element.
    fn pattern<'py>(&self, like: &Bound<'py, PyAny>, len: usize, dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        self.empty(like, &[len], dtype)
    }

    /// An uninitialised array of the shape and dtype of `like`, contiguous. The strides of `like` must be those of a
    /// contiguous array, or 0.
    fn empty_like<'py>(&self, like: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>>;

    /// The address of an array that `empty` or `empty_like` made.
    fn address(&self, array: &Bound<'_, PyAny>) -> PyResult<u64>;

    /// Where a call on this device runs, and with how many threads: one if the call `is_one_task`.
    fn place(&self, py: Python<'_>, device: Device, is_one_task: bool) -> PyResult<Place>;
}

// ---- PyTorch
// ---------------------------------------------------------------------------------------------------------

/// PyTorch's objects that calls need, looked up once.
pub struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyAny>,
    /// In the order of `Dtype::ALL`.
    dtypes: [Py<PyAny>; 4],
    int32: Py<PyAny>,
    empty_like: Py<PyAny>,
    is_neg: Py<PyAny>,
    grad_enabled: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    current_stream: Py<PyAny>,
    /// None before PyTorch 2.10.
    exchange: Option<Exchange>,
    /// `torch._C._len_torch_dispatch_stack`, private to PyTorch. Without it every call goes through the dispatcher.
    dispatch_modes: Option<Py<PyAny>>,
    /// `torch.autograd.forward_ad`, whose `_current_level` is -1 where no forward-mode differentiation goes on.
    forward_ad: Py<PyAny>,
}

impl Torch {
    pub fn get(py: Python<'_>) -> PyResult<&'static Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtypes = Dtype::ALL.map(|dtype| torch.getattr(dtype.name()).map(Bound::unbind));
            let [f32, bf16, f16, f64] = dtypes;
            Ok(Torch {
                tensor: torch.getattr("Tensor")?.cast_into::<PyType>()?.unbind(),
                parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
                dtypes: [f32?, bf16?, f16?, f64?],
                int32: torch.getattr("int32")?.unbind(),
                is_neg: torch.getattr("Tensor")?.getattr("is_neg")?.unbind(),
                empty_like: torch.getattr("empty_like")?.unbind(),
                grad_enabled: torch.getattr("is_grad_enabled")?.unbind(),
                get_num_threads: torch.getattr("get_num_threads")?.unbind(),
                current_stream: torch.getattr("cuda")?.getattr("current_stream")?.unbind(),
                exchange: Exchange::find(&torch.getattr("Tensor")?),
                dispatch_modes: torch.getattr("_C")?.getattr("_len_torch_dispatch_stack").ok().map(Bound::unbind),
                forward_ad: py.import("torch.autograd.forward_ad")?.into_any().unbind(),
            })
        })
    }

    /// Whether the object is of PyTorch's own classes. The dispatcher must see the calls of a subclass.
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type();
        class.is(&self.tensor) || class.is(&self.parameter)
    }

    /// Whether a dispatch mode is active, such as fake tensors.
    pub fn is_watched(&self, py: Python<'_>) -> bool {
        let modes = |count: &Py<PyAny>| count.bind(py).call0()?.extract::<usize>();
        self.dispatch_modes.as_ref().is_none_or(|count| modes(count).unwrap_or(1) > 0)
    }

    pub fn is_grad_enabled(&self, py: Python<'_>) -> PyResult<bool> {
        self.grad_enabled.bind(py).call0()?.is_truthy()
    }

    /// Whether tensors may carry tangents.
    pub fn is_forward_mode(&self, py: Python<'_>) -> bool {
        let level = self.forward_ad.bind(py).getattr(intern!(py, "_current_level"));
        level.and_then(|level| level.extract::<i64>()).map_or(true, |level| level >= 0)
    }

    /// The dtype that a `torch.dtype` stands for; None if it is not one of the four.
    pub fn dtype(&self, object: &Bound<'_, PyAny>) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|&dtype| object.is(&self.dtypes[dtype as usize]))
    }

    pub fn dtype_object(&self, dtype: Dtype) -> &Py<PyAny> {
        &self.dtypes[dtype as usize]
    }

    fn device(name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Device> {
        let py = tensor.py();
        if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Ok(Device::Cpu);
        }
        if tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            return Ok(Device::Cuda(tensor.call_method0(intern!(py, "get_device"))?.extract()?));
        }
        let came = tensor.getattr(intern!(py, "device"))?.str()?.to_string();
        Err(Error::NoBackend { name, came }.into())
    }

    /// Whether PyTorch made the stream, in which case it is never destroyed. The id of another stream is its handle.
    pub fn owns_stream(&self, py: Python<'_>, target: Target) -> PyResult<bool> {
        let stream = self.current_stream.bind(py).call1((target.device,))?;
        let id: i64 = stream.getattr(intern!(py, "stream_id"))?.extract()?;
        Ok(target.stream == 0 || id.cast_unsigned() != target.stream as u64)
    }

    /// `len` 32-bit zeros on the device of `like`.
    pub fn tickets<'py>(&self, like: &Bound<'py, PyAny>, len: usize) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        let options = PyDict::new(py);
        options.set_item(intern!(py, "dtype"), &self.int32)?;
        like.call_method(intern!(py, "new_zeros"), (len,), Some(&options))
    }
}

impl Library for Torch {
    fn is_array(&self, object: &Bound<'_, PyAny>) -> bool {
        object.is_instance(self.tensor.bind(object.py())).unwrap_or(false)
    }

    fn read<'py>(&self, name: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, Array)> {
        let py = tensor.py();
        if let Some(exchange) = self.exchange.as_ref().filter(|_| self.is_plain(tensor))
            // SAFETY: `is_plain` says that the object is a `Tensor` or a `Parameter`, which have the same layout.
            && let Some((address, dtype, device, shape)) = unsafe { exchange.describe(tensor) }
            && !self.is_neg.bind(py).call1((tensor,))?.is_truthy()?
        {
            return Ok((tensor.clone(), Array::new(name, (address, dtype, device), shape)?));
        }
        let mut tensor = tensor.clone();
        let named = |error: PyErr| {
            let is_attribute = error.is_instance_of::<PyAttributeError>(py);
            if is_attribute { wrong_type(name, "torch.Tensor", "another type") } else { error }
        };
        let came = tensor.getattr(intern!(py, "dtype")).map_err(named)?;
        let wanted = "float32, bfloat16, float16 or float64";
        let Some(dtype) = self.dtype(&came) else {
            return Err(Error::Dtype { name, came: came.str()?.to_string(), wanted }.into());
        };
        // A lazily negated view, such as `z.conj().imag`, shares memory that has the opposite sign.
        if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            tensor = tensor.call_method0(intern!(py, "resolve_neg"))?;
        }
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            tensor = tensor.call_method0(intern!(py, "contiguous"))?;
        }
        let device = Torch::device(name, &tensor)?;
        let address = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let shape = tensor.getattr(intern!(py, "shape"))?;
        let shape = shape.cast::<PyTuple>()?;
        let shape = shape.iter_borrowed().map(|dim| dim.extract()).collect::<PyResult<_>>()?;
        Ok((tensor, Array::new(name, (address, dtype, device), shape)?))
    }

    fn empty<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize], dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        // Each dimension is an argument of its own. After a model's forward PyTorch takes 25 us longer to read a tuple.
        let shape = if shape.is_empty() { PyTuple::new(py, [PyTuple::empty(py)])? } else { PyTuple::new(py, shape)? };
        let options = PyDict::new(py);
        options.set_item(intern!(py, "dtype"), &self.dtypes[dtype as usize])?;
        like.call_method(intern!(py, "new_empty"), shape, Some(&options))
    }

    fn pattern<'py>(&self, like: &Bound<'py, PyAny>, len: usize, dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        self.empty(like, &[1], dtype)?.call_method1(intern!(like.py(), "expand"), (len,))
    }

    fn empty_like<'py>(&self, like: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.empty_like.bind(like.py()).call1((like,))
    }

    fn address(&self, tensor: &Bound<'_, PyAny>) -> PyResult<u64> {
        tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()
    }

    fn place(&self, py: Python<'_>, device: Device, is_one_task: bool) -> PyResult<Place> {
        Ok(match device {
            Device::Cpu if is_one_task => Place::Host { threads: 1 },
            Device::Cpu => Place::Host { threads: self.get_num_threads.bind(py).call0()?.extract()? },
            Device::Cuda(device) => {
                let stream = self.current_stream.bind(py).call1((device,))?;
                Place::Gpu(Target { device, stream: stream.getattr(intern!(py, "cuda_stream"))?.extract()? })
            }
        })
    }
}

fn wrong_type(name: &str, wanted: &str, came: &str) -> PyErr {
    PyTypeError::new_err(format!("flowdppo_ops: {name} is {came}, wanted a {wanted}"))
}

// ---- NumPy
// -----------------------------------------------------------------------------------------------------------

pub struct Numpy {
    pub threads: usize,
}

impl Library for Numpy {
    fn is_array(&self, object: &Bound<'_, PyAny>) -> bool {
        object.cast::<PyUntypedArray>().is_ok()
    }

    fn read<'py>(&self, name: &'static str, array: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, Array)> {
        let py = array.py();
        let Ok(untyped) = array.cast::<PyUntypedArray>() else {
            return Err(wrong_type(name, "numpy.ndarray", "another type"));
        };
        let found = [
            typed::<f32>(array).map(|address| (address, Dtype::F32)),
            typed::<half::f16>(array).map(|address| (address, Dtype::F16)),
            typed::<f64>(array).map(|address| (address, Dtype::F64)),
        ];
        let Some((address, dtype)) = found.into_iter().flatten().next() else {
            let wanted = "float32, float16 or float64";
            return Err(Error::Dtype { name, came: untyped.dtype().to_string(), wanted }.into());
        };
        if !untyped.is_c_contiguous() || !address.is_multiple_of(dtype.size()) {
            let copy = array.call_method1(intern!(py, "copy"), ("C",))?;
            return self.read(name, &copy);
        }
        Ok((array.clone(), Array::new(name, (address, dtype, Device::Cpu), untyped.shape().to_vec())?))
    }

    fn empty<'py>(&self, like: &Bound<'py, PyAny>, shape: &[usize], dtype: Dtype) -> PyResult<Bound<'py, PyAny>> {
        let py = like.py();
        Ok(match dtype {
            Dtype::F64 => PyArrayDyn::<f64>::zeros(py, shape, false).into_any(),
            Dtype::F16 => PyArrayDyn::<half::f16>::zeros(py, shape, false).into_any(),
            Dtype::F32 | Dtype::Bf16 => PyArrayDyn::<f32>::zeros(py, shape, false).into_any(),
        })
    }

    fn empty_like<'py>(&self, like: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        like.py().import("numpy")?.call_method1(intern!(like.py(), "empty_like"), (like,))
    }

    fn address(&self, array: &Bound<'_, PyAny>) -> PyResult<u64> {
        self.read("an output", array).map(|(_, array)| array.address)
    }

    fn place(&self, _: Python<'_>, _: Device, _: bool) -> PyResult<Place> {
        Ok(Place::Host { threads: self.threads })
    }
}

/// The address of the array; None if it has another dtype.
fn typed<T: numpy::Element>(array: &Bound<'_, PyAny>) -> Option<usize> {
    array.cast::<PyArrayDyn<T>>().ok().map(|array| array.data().addr())
}

/// How a row vector of this shape broadcasts: row r has element `r / divide % modulo`.
///
/// Returns (divide, modulo): (1, 1) for one element, (1, rows) for one per row, (1, S) for [1, S] and rows [B, S], (S,
/// B) for [B, 1]. Returns None if the shape does not broadcast to the rows dimension by dimension, or if the dimensions
/// that vary are not neighbours ([A, 1, C] for rows [A, B, C]).
pub fn row_stride(shape: &[usize], rows: &[usize]) -> Option<(usize, usize)> {
    if shape.is_empty() {
        return Some((1, 1));
    }
    let trailing_ones = shape.get(rows.len()..)?.iter().all(|&dim| dim == 1);
    let (mut divide, mut modulo, mut inner) = (1, 1, 1); // inner: the rows of the dimensions behind
    for (&have, &wanted) in shape.iter().zip(rows).rev() {
        match have {
            _ if wanted == 1 && have == 1 => {}
            _ if have == wanted => {
                if inner != divide * modulo {
                    return None;
                }
                modulo *= wanted;
                inner *= wanted;
            }
            1 => {
                if modulo == 1 {
                    divide *= wanted;
                }
                inner *= wanted;
            }
            _ => return None,
        }
    }
    trailing_ones.then_some(if modulo > 1 { (divide, modulo) } else { (1, 1) })
}

#[cfg(test)]
#[path = "../../tests/unit/boundary_array.rs"]
mod tests;
