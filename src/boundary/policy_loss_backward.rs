//! The backward of `policy_loss`: from saved tensors, or the forward's own gradients, to gradients.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::array::{Library, Torch};
use super::bind::{Shapes, array_at, values};
use super::guard::guarded;
use super::policy_loss::{Leaves, MODEL_OUTPUT, Optional, PREV_SAMPLE_MEAN, UNCOND_OUTPUT, UnitGradients};
use crate::call::{BATCH_LEN, Latent, Latents, PolicyLossBackward, RowVector, fields, numbers_len};
use crate::error::Error;
use crate::ops::Place;
use crate::ops::policy_loss as ops;

/// The gradients that `wants` asks for: those of the output and of `uncond_output` in their dtypes, that of `log_prob`
/// flat in the dtype of `numbers`. `latents` are those that the backward reads, by name.
#[pyfunction]
#[pyo3(signature = (grad_loss, numbers, latents, wants, unit_gradients = None))]
pub fn policy_loss_backward<'py>(
    py: Python<'py>, grad_loss: &Bound<'py, PyAny>, numbers: &Bound<'py, PyAny>, latents: &Bound<'py, PyDict>,
    wants: [bool; 3], unit_gradients: Option<UnitGradients<'py>>,
) -> PyResult<Leaves<'py>> {
    let (torch, unit_gradients) = (Torch::get(py)?, unit_gradients.unwrap_or_default());
    if unit_gradients.iter().any(Option::is_some) && scaled(torch, grad_loss, &unit_gradients)? {
        let [output, uncond] = unit_gradients;
        return Ok([output, uncond, None]);
    }
    backward(torch, grad_loss, numbers, latents, wants, unit_gradients)
}

/// Multiplies the forward's gradients by `grad_loss`. False if they must be computed again: half precision would be
/// rounded twice, and a gradient that overflowed need not overflow with another factor.
fn scaled(torch: &'static Torch, grad_loss: &Bound<'_, PyAny>, unit_gradients: &UnitGradients<'_>) -> PyResult<bool> {
    let py = grad_loss.py();
    let factor: f64 = grad_loss.call_method0(intern!(py, "item"))?.extract()?;
    if factor == 1.0 {
        return Ok(true);
    }
    for gradient in unit_gradients.iter().flatten() {
        let (_, array) = torch.read("gradient", gradient)?;
        let latent = Latent::new(array.address, array.dtype);
        let Place::Host { threads } = torch.place(py, array.device, false)? else { return Ok(false) };
        // SAFETY: the forward allocated the tensor for this gradient alone, and `unit_gradients` holds it.
        if !py.detach(|| unsafe { ops::scale_in_place(&latent, array.len(), factor, threads) }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `unit_gradients`: gradients that the forward computed; their memory is used again.
pub fn backward<'py>(
    library: &dyn Library, grad_loss: &Bound<'py, PyAny>, numbers: &Bound<'py, PyAny>, latents: &Bound<'py, PyDict>,
    wants: [bool; 3], unit_gradients: UnitGradients<'py>,
) -> PyResult<Leaves<'py>> {
    let (py, names) = (grad_loss.py(), Latents::NAMES);
    let values = values(library, &names, latents)?;
    let (numbers, of_numbers) = library.read("numbers", numbers)?;
    let is_step = array_at(&values, MODEL_OUTPUT).is_some();
    let (len, count) = (of_numbers.len(), fields(is_step));
    let rows = len.saturating_sub(BATCH_LEN) / count;
    if rows == 0 || Some(len) != numbers_len(rows, is_step) || of_numbers.shape.len() != 1 {
        return Err(Error::Length { name: "numbers", came: len, wanted: count * rows.max(1) + BATCH_LEN }.into());
    }
    let dtype = of_numbers.arithmetic("numbers")?;
    let first = values.first().and_then(|(slot, _)| Some((names[*slot], &array_at(&values, *slot)?.1.shape)));
    let flat = first.map(|(name, shape)| flattened(name, shape, rows)).transpose()?;
    let shapes = Shapes::new("numbers", &[rows], flat.as_ref().map(|flat| &flat[..]), of_numbers.device)?;
    let mut call = PolicyLossBackward { rows: rows as u64, numel: shapes.numel() as u64, dtype, ..Default::default() };
    let slots = call.latents.each_mut();
    for (slot, _) in &values {
        let (Some((_, array)), Some((_, wanted))) = (array_at(&values, *slot), first) else { continue };
        *slots[*slot] = shapes.exactly(names[*slot], array, wanted)?;
    }
    let (_grad_loss, of_grad) = library.read("grad_loss", grad_loss)?;
    let modulo = of_grad.len();
    if modulo != 1 && modulo != rows {
        return Err(Error::Length { name: "grad_loss", came: modulo, wanted: rows }.into());
    }
    shapes.same_device("grad_loss", &of_grad)?;
    call.grad_loss = RowVector::array("grad_loss", of_grad.address, of_grad.dtype, (1, modulo), rows)?;
    call.numbers = of_numbers.address;

    let like = |slot: usize, memory: Optional<'py>| {
        let (object, array) = array_at(&values, slot).ok_or(Error::Missing { name: names[slot] })?;
        if let Some(memory) = memory {
            // A saved-tensor hook may have changed the latent's dtype since the forward.
            let (memory, found) = library.read("gradient", &memory)?;
            if found.dtype == array.dtype && found.shape == array.shape && found.device == array.device {
                return Ok(memory);
            }
        }
        library.empty(object, &array.shape, array.dtype)
    };
    let ([wants_output, wants_uncond, wants_log_prob], [of_output, of_uncond]) = (wants, unit_gradients);
    let output = if is_step { MODEL_OUTPUT } else { PREV_SAMPLE_MEAN };
    let grads = [
        wants_output.then(|| like(output, of_output)).transpose()?,
        wants_uncond.then(|| like(UNCOND_OUTPUT, of_uncond)).transpose()?,
        wants_log_prob.then(|| library.empty(&numbers, &[rows], dtype)).transpose()?,
    ];
    let address = |grad: &Optional<'py>| grad.as_ref().map_or(Ok(0), |grad| library.address(grad));
    call.grad_output = address(&grads[0])?;
    call.grad_uncond_output = address(&grads[1])?;
    call.grad_log_prob = address(&grads[2])?;
    let place = library.place(py, shapes.device, false)?;
    // SAFETY: inputs are memory of arrays that this function holds, of lengths checked above; outputs were allocated
    // here, or by the forward for this gradient alone, with the shape and dtype of the latent.
    py.detach(|| guarded(|| unsafe { ops::backward(place, &mut call) }))?;
    Ok(grads)
}

/// The shape `[rows, elements of a row]`. Refuses a shape whose elements are no multiple of the rows.
fn flattened(name: &'static str, shape: &[usize], rows: usize) -> Result<[usize; 2], Error> {
    let len: usize = shape.iter().product();
    if len == 0 || !len.is_multiple_of(rows) {
        return Err(Error::Shape { name, came: shape.to_vec(), wanted: vec![rows, len / rows] });
    }
    Ok([rows, len / rows])
}
