//! The boundary of `sde_step`: bound calls, forward and backward, for tensors on either device.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::array::{Array, Library, Torch};
use super::bind::{BoundCall, Shapes, array_at, value_of, values};
use super::guard::guarded;
use super::memo::{Arguments, Memo};
use super::objective::field;
use super::workspace::workspace;
use crate::call::{Dtype, Latent, SDE_STEP_NUMBERS, SdeStep, SdeStepBackward, SdeStepForward, SdeStepLatents};
use crate::error::Error;
use crate::ops::Place;
use crate::ops::sde_step as ops;

const MODEL_OUTPUT: usize = 0;
const UNCOND_OUTPUT: usize = 1;
const SAMPLE: usize = 2;
const PREV_SAMPLE: usize = 3;
const NOISE: usize = 4;

type Optional<'py> = Option<Bound<'py, PyAny>>;
/// `model_output` and `uncond_output`, or their gradients.
type Leaves<'py> = [Optional<'py>; 2];
/// `prev_sample`, `log_prob`, `prev_sample_mean`, `std`, `residual` (None if not wanted), `numbers`.
type Outputs<'py> = [Optional<'py>; 6];
/// The leaves are None if nothing is differentiated.
type Forward<'py> = (Outputs<'py>, Option<Leaves<'py>>);

/// A call of `sde_step`, bound to its tensors, which it holds.
#[pyclass]
pub struct SdeStepCall {
    bound: BoundCall<SdeStep>,
    residual_dtype: Option<Dtype>,
}

impl SdeStepCall {
    /// Whether `prev_sample` is given in the dtype of `sample`: then the next latent need not be written.
    fn is_as_stored(&self) -> bool {
        let SdeStepLatents { prev_sample, sample, .. } = &self.bound.call.latents;
        prev_sample.is_present() && prev_sample.dtype == sample.dtype
    }
}

/// Reads a dtype of latents.
fn dtype(torch: &Torch, name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Dtype> {
    let (came, wanted) = (object.str()?.to_string(), "float32, bfloat16, float16 or float64");
    torch.dtype(object).ok_or_else(|| Error::Dtype { name, came, wanted }.into())
}

#[pymethods]
impl SdeStepCall {
    /// Checks the call. `fields` are tensors and numbers, `settings` the rest, by the names of the operator's
    /// arguments.
    #[new]
    fn checked(py: Python<'_>, fields: &Bound<'_, PyDict>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let torch = Torch::get(py)?;
        let residual_dtype: Optional<'_> = field(settings, "residual_dtype")?;
        let residual_dtype = residual_dtype.map(|object| dtype(torch, "residual_dtype", &object)).transpose()?;
        let values = values(torch, &SdeStep::NAMES, fields)?;
        let (_, output) = array_at(&values, MODEL_OUTPUT).ok_or(Error::Missing { name: "model_output" })?;
        let (came, rank): (i64, _) = (field(settings, "row_dims")?, output.shape.len());
        let row_dims = usize::try_from(came).ok().filter(|&dims| dims <= rank);
        let rows = &output.shape[..row_dims.ok_or(Error::RowDims { came, rank })?];
        let shapes = Shapes::new("model_output", rows, Some(&output.shape), output.device)?;
        let call = SdeStep {
            rows: shapes.row_count() as u64,
            numel: shapes.numel() as u64,
            sampler: field(settings, "sampler")?,
            log_prob_normalizer: field::<bool>(settings, "log_prob_normalizer")?.into(),
            ..SdeStep::default()
        };
        Ok(SdeStepCall { bound: BoundCall::new(values, shapes, call)?, residual_dtype })
    }

    /// PyTorch's dispatcher calls this, and has its own autograd. It allows no output that is an input, so
    /// `prev_sample` is None if it need not be written, and no tensor that outlives the call (see `workspace`).
    fn forward<'py>(&self, py: Python<'py>) -> PyResult<Outputs<'py>> {
        self.forward_with(py, false)
    }
}

impl SdeStepCall {
    /// Runs the forward of a call of plain tensors. If it has neither `prev_sample` nor noise, `draw(sample, dtype)`
    /// makes the noise.
    fn forward_eager<'py>(&mut self, py: Python<'py>, draw: &Bound<'py, PyAny>) -> PyResult<Forward<'py>> {
        let (torch, SdeStepLatents { prev_sample, noise, .. }) = (Torch::get(py)?, &self.bound.call.latents);
        if !prev_sample.is_present() && !noise.is_present() {
            let noise = draw.call1((self.sample(py)?, torch.dtype_object(self.bound.call.dtype())))?;
            let value = value_of(torch, "noise", &noise)?;
            self.bound.call.latents.noise = self.bound.shapes.latent("noise", &value)?;
            self.bound.hold(NOISE, value);
        }
        let mut outputs = self.forward_with(py, true)?;
        if self.is_as_stored()
            && let Some(prev_sample) = self.bound.object(py, PREV_SAMPLE)
        {
            outputs[0] = Some(prev_sample.call_method0("detach")?);
        }
        Ok((outputs, self.bound.leaves(torch, py, [MODEL_OUTPUT, UNCOND_OUTPUT])?))
    }

    fn sample<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>, Error> {
        self.bound.object(py, SAMPLE).ok_or(Error::Missing { name: "sample" })
    }

    fn forward_with<'py>(&self, py: Python<'py>, may_keep: bool) -> PyResult<Outputs<'py>> {
        let (torch, sample, BoundCall { call, shapes, .. }) = (Torch::get(py)?, self.sample(py)?, &self.bound);
        let (dtype, latents) = (call.dtype(), shapes.latents.as_deref().unwrap_or(&[]));
        let outputs = [
            (!self.is_as_stored()).then_some((latents, call.latents.sample.dtype)),
            Some((&shapes.rows[..], dtype)),
            Some((latents, dtype)),
            Some((&shapes.rows[..], dtype)),
            self.residual_dtype.map(|dtype| (latents, dtype)),
            Some((&[SDE_STEP_NUMBERS * shapes.row_count()][..], dtype)),
        ];
        let mut arrays = Outputs::default();
        let mut addresses = [0; 6];
        for ((array, address), output) in arrays.iter_mut().zip(&mut addresses).zip(outputs) {
            let Some((shape, dtype)) = output else { continue };
            let made = array.insert(torch.empty(&sample, shape, dtype)?);
            *address = torch.address(made)?;
        }
        let [stored, log_prob, prev_sample_mean, std, residual, numbers] = addresses;
        let residual = self.residual_dtype.map_or_else(Latent::default, |dtype| Latent::new(residual, dtype));
        let (call, rest) = (*call, SdeStepForward::default());
        let mut forward = SdeStepForward { call, stored, prev_sample_mean, residual, log_prob, std, numbers, ..rest };
        let place = torch.place(py, shapes.device, false)?;
        let (mut plan, mut _workspace) = (None, None);
        if let Place::Gpu(target) = place {
            let (grid, partials, tickets) = py.detach(|| guarded(|| ops::workspace(target, &call)))?;
            let shared = workspace(torch, &sample, target, (partials, tickets), may_keep)?;
            (forward.partials, forward.tickets, forward.splits) = (shared.partials, shared.tickets, grid.splits);
            (plan, _workspace) = (Some(grid), Some(shared));
        }
        // SAFETY: inputs are memory of arrays that `self` holds, of lengths that `BoundCall::new` checked; outputs were
        // allocated above, and nobody else has them.
        py.detach(|| guarded(|| unsafe { ops::forward(place, plan, &forward) }))?;
        Ok(arrays)
    }
}

/// The gradients of `model_output` and `uncond_output` in `dtypes` (None: not wanted), from those of `log_prob` and
/// `prev_sample_mean` in `grads` and what the forward left.
#[pyfunction]
pub fn sde_step_backward<'py>(
    py: Python<'py>, grads: Leaves<'py>, prev_sample: &Bound<'py, PyAny>, prev_sample_mean: &Bound<'py, PyAny>,
    numbers: &Bound<'py, PyAny>, dtypes: Leaves<'py>,
) -> PyResult<Leaves<'py>> {
    let torch = Torch::get(py)?;
    // `read` copies a tensor that is not contiguous. The copy must live until the kernel has been launched.
    let read = |name, tensor: &Bound<'py, PyAny>| torch.read(name, tensor);
    let read_grad = |name, grad: Optional<'py>| grad.map(|grad| read(name, &grad)).transpose();
    let (mean, of_mean) = read("prev_sample_mean", prev_sample_mean)?;
    let (_numbers, of_numbers) = read("numbers", numbers)?;
    let (_prev_sample, of_prev) = read("prev_sample", prev_sample)?;
    let [grad_log_prob, grad_mean] = grads;
    let grad_log_prob = read_grad("grad_log_prob", grad_log_prob)?;
    let grad_mean = read_grad("grad_prev_sample_mean", grad_mean)?;

    let wide = of_mean.arithmetic("prev_sample_mean")?;
    let rows = of_numbers.len() / SDE_STEP_NUMBERS;
    if rows == 0 || !of_numbers.len().is_multiple_of(SDE_STEP_NUMBERS) || !of_mean.len().is_multiple_of(rows) {
        let wanted = SDE_STEP_NUMBERS * of_mean.shape.first().copied().unwrap_or(1);
        return Err(Error::Length { name: "numbers", came: of_numbers.len(), wanted }.into());
    }
    let flat = [rows, of_mean.len() / rows];
    let shapes = Shapes::new("prev_sample_mean", &[rows], Some(&flat), of_mean.device)?;
    let arithmetic = |name, array: &Array, shape: &[usize]| -> Result<u64, Error> {
        if array.dtype != wide {
            return Err(Error::Dtype { name, came: array.dtype.name().to_owned(), wanted: wide.name() });
        }
        Ok(shapes.exactly(name, array, shape)?.data)
    };
    let mut call = SdeStepBackward {
        rows: rows as u64,
        numel: flat[1] as u64,
        dtype: wide,
        numbers: arithmetic("numbers", &of_numbers, &of_numbers.shape)?,
        prev_sample_mean: of_mean.address,
        prev_sample: shapes.exactly("prev_sample", &of_prev, &of_mean.shape)?,
        ..SdeStepBackward::default()
    };
    if let Some((_, array)) = &grad_log_prob {
        if array.len() != rows {
            return Err(Error::Length { name: "grad_log_prob", came: array.len(), wanted: rows }.into());
        }
        call.grad_log_prob = arithmetic("grad_log_prob", array, &array.shape)?;
    }
    if let Some((_, array)) = &grad_mean {
        call.grad_prev_sample_mean = arithmetic("grad_prev_sample_mean", array, &of_mean.shape)?;
    }
    let mut grads = [None, None];
    let targets = [&mut call.grad_model_output, &mut call.grad_uncond_output];
    for ((grad, wanted), target) in grads.iter_mut().zip(dtypes).zip(targets) {
        let Some(wanted) = wanted else { continue };
        let dtype = dtype(torch, "a gradient", &wanted)?;
        let array = grad.insert(torch.empty(&mean, &of_mean.shape, dtype)?);
        *target = Latent::new(torch.address(array)?, dtype);
    }
    let place = torch.place(py, shapes.device, false)?;
    // SAFETY: inputs are memory of arrays that this function holds, of lengths that were checked against the rows;
    // outputs were just allocated here.
    py.detach(|| guarded(|| unsafe { ops::backward(place, &mut call) }))?;
    Ok(grads)
}

/// Runs calls of `sde_step`, and remembers those that Python has checked.
#[pyclass(frozen)]
pub struct SdeStepMemo(Memo<SdeStep, Option<Dtype>>);

#[pymethods]
impl SdeStepMemo {
    /// `names` are those of the function's arguments, in order.
    #[new]
    fn new(names: Vec<String>) -> Self {
        SdeStepMemo(Memo::new(names))
    }

    /// The forward of a call whose key is known; None for any other call. `draw`: see `forward_eager`.
    fn forward<'py>(
        &self, py: Python<'py>, arguments: &Bound<'py, PyTuple>, draw: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Forward<'py>>> {
        let Some(mut read) = Arguments::read(Torch::get(py)?, arguments) else { return Ok(None) };
        let Some((bound, residual_dtype)) = self.0.find(&mut read) else { return Ok(None) };
        SdeStepCall { bound, residual_dtype }.forward_eager(py, draw).map(Some)
    }

    /// Remembers a call that Python has checked, and runs it. `fields`, `settings`: as in `SdeStepCall`.
    fn learn<'py>(
        &self, py: Python<'py>, arguments: &Bound<'py, PyTuple>, fields: &Bound<'py, PyDict>,
        settings: &Bound<'py, PyAny>, draw: &Bound<'py, PyAny>,
    ) -> PyResult<Forward<'py>> {
        let mut call = SdeStepCall::checked(py, fields, settings)?;
        self.0.learn(arguments, fields, &call.bound, call.residual_dtype)?;
        call.forward_eager(py, draw)
    }
}
