//! Turns named Python values into a call that holds its arrays. Each value is checked against the rows and the latents.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::array::{Array, Device, Library, Torch, row_stride};
use crate::call::{Latent, Latents, PolicyLoss, RowVector, RowVectors, SdeStep, SdeStepLatents};
use crate::error::Error;

pub enum Value<'py> {
    Number(f64),
    /// The object whose memory is described.
    Array(Bound<'py, PyAny>, Array),
}

/// The values that are present, each with its position in a table of names.
pub type Values<'py> = Vec<(usize, Value<'py>)>;

pub fn values<'py>(
    library: &dyn Library, names: &[&'static str], fields: &Bound<'py, PyDict>,
) -> PyResult<Values<'py>> {
    let mut found = Vec::new();
    for (slot, name) in names.iter().enumerate() {
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

/// The value at this position, if it is an array.
pub fn array_at<'a, 'py>(values: &'a Values<'py>, wanted: usize) -> Option<(&'a Bound<'py, PyAny>, &'a Array)> {
    values.iter().find_map(|(slot, value)| match value {
        Value::Array(object, array) if *slot == wanted => Some((object, array)),
        _ => None,
    })
}

/// A call whose fields are latents and then row vectors. A slot is the position of a field in `NAMES`.
pub trait Fields: Copy {
    const NAMES: &[&'static str];
    const LATENTS: usize;
    fn latent(&mut self, slot: usize) -> &mut Latent;
    fn row_vector(&mut self, slot: usize) -> &mut RowVector;
}

impl Fields for PolicyLoss {
    const NAMES: &[&'static str] = &PolicyLoss::NAMES;
    const LATENTS: usize = Latents::NAMES.len();

    fn latent(&mut self, slot: usize) -> &mut Latent {
        self.latents.each_mut()[slot]
    }

    fn row_vector(&mut self, slot: usize) -> &mut RowVector {
        match (slot - Self::LATENTS).checked_sub(RowVectors::NAMES.len()) {
            None => self.vectors.each_mut()[slot - Self::LATENTS],
            Some(slot) => self.schedule.each_mut()[slot],
        }
    }
}

impl Fields for SdeStep {
    const NAMES: &[&'static str] = &SdeStep::NAMES;
    const LATENTS: usize = SdeStepLatents::NAMES.len();

    fn latent(&mut self, slot: usize) -> &mut Latent {
        self.latents.each_mut()[slot]
    }

    fn row_vector(&mut self, slot: usize) -> &mut RowVector {
        self.schedule.each_mut()[slot - Self::LATENTS]
    }
}

/// A call with the arrays that its addresses point into.
pub struct BoundCall<C> {
    pub call: C,
    pub shapes: Arc<Shapes>,
    objects: Vec<(usize, Py<PyAny>)>,
}

impl<C: Fields> BoundCall<C> {
    /// Checks every value against `shapes`.
    pub fn new(values: Values<'_>, shapes: Shapes, mut call: C) -> Result<Self, Error> {
        for (slot, value) in &values {
            if *slot < C::LATENTS {
                *call.latent(*slot) = shapes.latent(C::NAMES[*slot], value)?;
            } else {
                *call.row_vector(*slot) = shapes.row_vector(C::NAMES[*slot], value)?;
            }
        }
        Ok(BoundCall { call, shapes: shapes.into(), objects: objects(values) })
    }

    /// The call `call` with other addresses and numbers. The types, dtypes, shapes and devices of `values` must be
    /// those of the values that it was made from.
    pub fn like(mut call: C, shapes: Arc<Shapes>, values: Values<'_>) -> Self {
        for (slot, value) in &values {
            match value {
                Value::Array(_, array) if *slot < C::LATENTS => call.latent(*slot).data = array.address,
                Value::Array(_, array) => call.row_vector(*slot).data = array.address,
                Value::Number(number) => call.row_vector(*slot).value = *number,
            }
        }
        BoundCall { call, shapes, objects: objects(values) }
    }

    /// Holds one more array, whose address the caller has put into the call.
    pub fn hold(&mut self, slot: usize, value: Value<'_>) {
        self.objects.extend(objects(vec![(slot, value)]));
    }

    pub fn object<'py>(&self, py: Python<'py>, wanted: usize) -> Option<Bound<'py, PyAny>> {
        self.objects.iter().find(|(slot, _)| *slot == wanted).map(|(_, object)| object.bind(py).clone())
    }

    /// The arrays of `slots`; None if autograd need not see this call. In forward mode it must, so that it refuses.
    pub fn leaves<'py, const N: usize>(
        &self, torch: &Torch, py: Python<'py>, slots: [usize; N],
    ) -> PyResult<Option<[Option<Bound<'py, PyAny>>; N]>> {
        let leaves = slots.map(|slot| self.object(py, slot));
        let wanted = leaves.iter().flatten().any(requires_grad) && torch.is_grad_enabled(py)?;
        Ok((wanted || torch.is_forward_mode(py)).then_some(leaves))
    }
}

fn objects(values: Values<'_>) -> Vec<(usize, Py<PyAny>)> {
    let objects = values.into_iter().filter_map(|(slot, value)| match value {
        Value::Array(object, _) => Some((slot, object.unbind())),
        Value::Number(_) => None,
    });
    objects.collect()
}

pub fn requires_grad(tensor: &Bound<'_, PyAny>) -> bool {
    let found = tensor.getattr(pyo3::intern!(tensor.py(), "requires_grad")).and_then(|requires| requires.is_truthy());
    found.unwrap_or(false)
}

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

    /// Refuses `latents` whose first dimensions are not `rows`.
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

    pub fn same_device(&self, name: &'static str, array: &Array) -> Result<(), Error> {
        if array.device == self.device {
            return Ok(());
        }
        Err(Error::Device { name, came: array.device.to_string(), wanted: self.device.to_string() })
    }

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

    fn row_vector(&self, name: &'static str, value: &Value<'_>) -> Result<RowVector, Error> {
        let array = match value {
            Value::Number(number) => return Ok(RowVector::number(*number)),
            Value::Array(_, array) => array,
        };
        self.same_device(name, array)?;
        if ["advantages", "log_prob", "old_log_prob"].contains(&name) && array.shape != self.rows {
            return Err(Error::Shape { name, came: array.shape.clone(), wanted: self.rows.clone() });
        }
        let Some(stride) = row_stride(&array.shape, &self.rows) else {
            return Err(Error::RowShape { name, came: array.shape.clone(), rows: self.rows.clone() });
        };
        RowVector::array(name, array.address, array.dtype, stride, self.row_count())
    }
}
