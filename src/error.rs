//! Every way in which a native call is refused, with the values that were refused.

use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    #[error("{name} has {len} elements and no memory: a fake, meta or released tensor cannot be read")]
    NoMemory { name: &'static str, len: usize },
    #[error("{name} is at address {address:#x}, wanted one that {size} divides, the size of an element")]
    Misaligned { name: &'static str, address: usize, size: usize },
    #[error("{name} has {rows} rows of {numel} elements, more than the address space holds")]
    TooLarge { name: &'static str, rows: usize, numel: usize },
    #[error("{name} is {came:?}, wanted one of {wanted}")]
    Option { name: &'static str, came: String, wanted: &'static str },
    #[error("{name} is missing, and this call needs it")]
    Missing { name: &'static str },
    #[error("{name} has dtype {came}, wanted {wanted}")]
    Dtype { name: &'static str, came: &'static str, wanted: &'static str },
    #[error("internal error, please report it: {0}")]
    Panic(String),
}

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = format!("flowdppo_ops: {error}");
        match error {
            Error::Dtype { .. } => PyTypeError::new_err(message),
            Error::Panic(_) => PyRuntimeError::new_err(message),
            _ => PyValueError::new_err(message),
        }
    }
}
