//! From named Python values to the arrays and numbers of a call, each checked against the others.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::array::{Array, Device, Library, row_stride};
use super::memo::Value;
use crate::call::{Latent, RowVector};
use crate::error::Error;

/// Values by their position in a table of names; what is absent is left out.
pub type Values<'py> = Vec<(usize, Value<'py>)>;

/// The named values that a dictionary has.
pub fn values<'py>(
    library: &dyn Library,
    names: impl Iterator<Item = &'static str>,
    fields: &Bound<'py, PyDict>,
) -> PyResult<Values<'py>> {
    let mut found = Vec::new();
    for (slot, name) in names.enumerate() {
        let Some(value) = fields.get_item(name)?.filter(|value| !value.is_none()) else { continue };
        found.push((slot, value_of(library, name, &value)?));
    }
    Ok(found)
}

pub fn value_of<'py>(library: &dyn Library, name: &'static str, value: &Bound<'py, PyAny>) -> PyResult<Value<'py>> {
    if library.is_array(value) {
        library.read(name, value).map(|(object, array)| Value::Array(object, array))
    } else {
        value.extract().map(Value::Number)
    }
}

/// Writes out row vectors whose varying dimensions are not neighbours: [A, 1, C] for rows [A, B, C] has no stride. The
/// rows are the first dimensions of the array at `like`.
pub fn write_out(
    library: &dyn Library,
    values: &mut Values<'_>,
    first_vector: usize,
    (like, row_dims): (usize, Option<usize>),
) -> PyResult<()> {
    // Two dimensions are always neighbours.
    let may_not_fit = |value: &Value<'_>| matches!(value, Value::Array(_, array) if array.shape.len() > 2);
    if !values.iter().any(|(slot, value)| *slot >= first_vector && may_not_fit(value)) {
        return Ok(());
    }
    let rows = values.iter().find_map(|(slot, value)| match value {
        Value::Array(_, array) if *slot == like => Some(&array.shape[..row_dims.unwrap_or(array.shape.len())]),
        _ => None,
    });
    let rows = rows.unwrap_or_default().to_vec();
    for (slot, value) in values {
        let Value::Array(object, array) = value else { continue };
        if *slot < first_vector || row_stride(&array.shape, &rows).is_some() || array.shape.len() < rows.len() {
            continue;
        }
        let (leading, trailing) = array.shape.split_at(rows.len());
        let broadcasts = leading.iter().zip(&rows).all(|(have, wanted)| have == wanted || *have == 1);
        if broadcasts && trailing.iter().all(|&dim| dim == 1) {
            let (object, array) = library.read("a row vector", &library.expand(object, leading, &rows)?)?;
            *value = Value::Array(object, array);
        }
    }
    Ok(())
}

/// The shapes that all arrays of a call must fit.
pub struct Shapes {
    pub rows: Vec<usize>,
    /// Of the latents; None where there are none.
    pub latents: Option<Vec<usize>>,
    pub device: Device,
}

impl Shapes {
    pub fn row_count(&self) -> usize {
        self.rows.iter().product()
    }

    /// Elements of a row.
    pub fn numel(&self) -> usize {
        self.latents.as_ref().map_or(0, |shape| shape[self.rows.len()..].iter().product())
    }

    /// Of latents of this shape, whose first dimensions are the rows.
    pub fn new(name: &'static str, rows: &[usize], latents: Option<&[usize]>, device: Device) -> Result<Self, Error> {
        if let Some(shape) = latents
            && (!shape.starts_with(rows) || shape.contains(&0))
        {
            return Err(Error::Shape { name, came: shape.to_vec(), wanted: rows.to_vec() });
        }
        let shapes = Shapes { rows: rows.to_vec(), latents: latents.map(<[_]>::to_vec), device };
        let (rows, numel) = (shapes.row_count(), shapes.numel());
        match rows.checked_mul(numel.max(1)) {
            Some(len) if len <= isize::MAX as usize / 16 && rows > 0 => Ok(shapes),
            _ => Err(Error::TooLarge { name, rows, numel }),
        }
    }

    fn same_device(&self, name: &'static str, array: &Array) -> Result<(), Error> {
        if array.device == self.device {
            return Ok(());
        }
        Err(Error::Device { name, came: array.device.to_string(), wanted: self.device.to_string() })
    }

    /// An array of exactly this shape.
    pub fn exactly(&self, name: &'static str, array: &Array, wanted: &[usize]) -> Result<Latent, Error> {
        self.same_device(name, array)?;
        if array.shape != wanted {
            return Err(Error::Shape { name, came: array.shape.clone(), wanted: wanted.to_vec() });
        }
        Ok(Latent::new(array.address, array.dtype))
    }

    pub fn latent(&self, name: &'static str, value: &Value<'_>) -> Result<Latent, Error> {
        match (value, &self.latents) {
            (Value::Array(_, array), Some(shape)) => self.exactly(name, array, shape),
            _ => Err(Error::Missing { name: "an array of latents" }),
        }
    }

    /// `whole`: one element per row, as log-probs are given.
    pub fn row_vector(&self, name: &'static str, value: &Value<'_>, whole: bool) -> Result<RowVector, Error> {
        let array = match value {
            Value::Number(number) => return Ok(RowVector::number(*number)),
            Value::Array(_, array) => array,
        };
        self.same_device(name, array)?;
        if whole && array.shape != self.rows {
            return Err(Error::Shape { name, came: array.shape.clone(), wanted: self.rows.clone() });
        }
        let Some(stride) = row_stride(&array.shape, &self.rows) else {
            return Err(Error::RowShape { name, came: array.shape.clone(), rows: self.rows.clone() });
        };
        RowVector::array(name, array.address, array.dtype, stride, self.row_count())
    }
}
