//! Every way in which a native call is refused, with the values that were refused.

use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};

/// Ends the messages of calls that no kernel can run.
const REFERENCE: &str =
    "flowdppo_ops.reference runs on every device with float64 (FLOWDPPO_OPS_BACKEND=reference sends calls there)";

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    #[error("{name} has {len} elements and no memory: a fake, meta or released tensor cannot be read")]
    NoMemory { name: &'static str, len: usize },
    #[error("{name} is at address {address:#x}, wanted one that {size} divides, the size of an element")]
    Misaligned { name: &'static str, address: usize, size: usize },
    #[error("{name} has {rows} rows of {numel} elements, more than the address space holds")]
    TooLarge { name: &'static str, rows: usize, numel: usize },
    #[error("{name} is {came:?}, wanted one of {}", wanted.join(", "))]
    Option { name: &'static str, came: String, wanted: &'static [&'static str] },
    #[error("{name} is missing, and this call needs it")]
    Missing { name: &'static str },
    #[error("{name} has dtype {came}, wanted {wanted}")]
    Dtype { name: &'static str, came: String, wanted: &'static str },
    #[error(
        "{name} has dtype float64, wanted float32, bfloat16 or float16 on a GPU: float64 is computed on the CPU alone"
    )]
    Float64OnGpu { name: &'static str },
    #[error("no NVIDIA driver (libcuda.so.1) on this machine; {REFERENCE}")]
    NoDriver,
    #[error("cuda:{ordinal} is a device number beyond what is supported; {REFERENCE}")]
    NoDevice { ordinal: usize },
    #[error(
        "no kernel image for cuda:{ordinal} of compute capability {}.{} in this build; {REFERENCE}",
        capability / 10,
        capability % 10
    )]
    NoImage { ordinal: usize, capability: u32 },
    #[error("{call} failed with {error}; {REFERENCE}")]
    Driver { call: &'static str, error: String },
    #[error("{rows} rows of {numel} elements are more than a grid has blocks for; {REFERENCE}")]
    Grid { rows: usize, numel: usize },
    #[error("{name} has shape {came:?}, wanted {wanted:?}")]
    Shape { name: &'static str, came: Vec<usize>, wanted: Vec<usize> },
    #[error("{name} has {came} elements, wanted {wanted}")]
    Length { name: &'static str, came: usize, wanted: usize },
    #[error("{name} has shape {came:?}, wanted a number or a shape that broadcasts to the rows {rows:?}")]
    RowShape { name: &'static str, came: Vec<usize>, rows: Vec<usize> },
    #[error("row_dims is {came}, wanted 0 to {rank}, the rank of the latents")]
    RowDims { came: i64, rank: usize },
    #[error("{name} is on {came}, wanted {wanted}, where the others are")]
    Device { name: &'static str, came: String, wanted: String },
    #[error("{name} is on {came}, wanted cpu or cuda; {REFERENCE}")]
    NoBackend { name: &'static str, came: String },
    #[error("{name} has {modulo} elements for {divide} rows each, wanted 1 to {rows} and at least 1 row")]
    Broadcast { name: &'static str, divide: usize, modulo: usize, rows: usize },
    #[error("internal error, please report it: {0}")]
    Panic(String),
}

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = format!("flowdppo_ops: {error}");
        match error {
            Error::Dtype { .. } | Error::Float64OnGpu { .. } => PyTypeError::new_err(message),
            Error::NoDriver
            | Error::NoDevice { .. }
            | Error::NoImage { .. }
            | Error::Driver { .. }
            | Error::Grid { .. }
            | Error::NoBackend { .. }
            | Error::Panic(_) => PyRuntimeError::new_err(message),
            _ => PyValueError::new_err(message),
        }
    }
}
