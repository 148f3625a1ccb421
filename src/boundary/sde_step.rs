//! The boundary of `sde_step`: bound calls, forward and backward, for tensors on either device.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::array::{Library, Torch};
use super::bind::{Shapes, Values, value_of, values, write_out};
use super::guard::guarded;
use super::memo::{Arguments, Memo, Value};
use super::objective::field;
use super::policy_loss::{requires_grad, take};
use super::workspace::workspace;
use crate::call::{
    Dtype, Latent, SDE_STEP_NUMBERS, Sampler, Schedule, SdeStep, SdeStepBackward, SdeStepForward, SdeStepLatents,
};
use crate::error::Error;
use crate::ops::Place;
use crate::ops::sde_step as ops;

/// Latents, then the schedule's row vectors.
pub fn names() -> impl Iterator<Item = &'static str> {
    SdeStepLatents::NAMES.into_iter().chain(Schedule::NAMES)
}
const FIRST_VECTOR: usize = SdeStepLatents::NAMES.len();
const MODEL_OUTPUT: usize = 0;
const UNCOND_OUTPUT: usize = 1;
const SAMPLE: usize = 2;
const PREV_SAMPLE: usize = 3;
const NOISE: usize = 4;

/// What is no tensor.
#[derive(Clone, Copy)]
struct Options {
    sampler: Sampler,
    log_prob_normalizer: bool,
    residual_dtype: Option<Dtype>,
    row_dims: i64,
}

impl Options {
    fn new(torch: &Torch, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let residual_dtype: Option<Bound<'_, PyAny>> = field(settings, "residual_dtype")?;
        let dtype = |object: Bound<'_, PyAny>| {
            let wanted = "float32, bfloat16, float16 or float64";
            let came = object.str()?.to_string();
            torch.dtype(&object).ok_or_else(|| PyErr::from(Error::Dtype { name: "residual_dtype", came, wanted }))
        };
        let residual_dtype = residual_dtype.map(dtype).transpose()?;
        Ok(Options {
            sampler: field(settings, "sampler")?,
            log_prob_normalizer: field(settings, "log_prob_normalizer")?,
            residual_dtype,
            row_dims: field(settings, "row_dims")?,
        })
    }
}

/// A call of `sde_step`, bound to its tensors, which it holds.
#[pyclass]
pub struct SdeStepCall {
    call: SdeStep,
    shapes: Shapes,
    objects: Vec<(usize, Py<PyAny>)>,
    residual_dtype: Option<Dtype>,
}

/// `prev_sample` (None where the given one is as stored), `log_prob`, `prev_sample_mean`, `std`, `residual` (None where
/// none is wanted), `numbers`.
type Outputs<'py> = [Option<Bound<'py, PyAny>>; 6];

impl SdeStepCall {
    fn new(library: &dyn Library, mut values: Values<'_>, options: Options) -> PyResult<Self> {
        let names: Vec<_> = names().collect();
        let output = values.iter().find_map(|(slot, value)| match value {
            Value::Array(_, array) if *slot == MODEL_OUTPUT => Some(array),
            _ => None,
        });
        let output = output.ok_or(Error::Missing { name: "model_output" })?;
        let row_dims = usize::try_from(options.row_dims).ok().filter(|&dims| dims <= output.shape.len());
        let row_dims = row_dims.ok_or(Error::RowDims { came: options.row_dims, rank: output.shape.len() })?;
        let rows = &output.shape[..row_dims];
        let shapes = Shapes::new("model_output", rows, Some(&output.shape), output.device)?;
        write_out(library, &mut values, FIRST_VECTOR, (MODEL_OUTPUT, Some(row_dims)))?;
        let mut call = SdeStep {
            rows: shapes.row_count() as u64,
            numel: shapes.numel() as u64,
            sampler: options.sampler,
            log_prob_normalizer: options.log_prob_normalizer.into(),
            ..SdeStep::default()
        };
        for (slot, value) in &values {
            match slot.checked_sub(FIRST_VECTOR) {
                None => *call.latents.each_mut()[*slot] = shapes.latent(names[*slot], value)?,
                Some(at) => *call.schedule.each_mut()[at] = shapes.row_vector(names[*slot], value, false)?,
            }
        }
        let objects = values.into_iter().filter_map(|(slot, value)| match value {
            Value::Array(object, _) => Some((slot, object.unbind())),
            Value::Number(_) => None,
        });
        Ok(SdeStepCall { call, shapes, objects: objects.collect(), residual_dtype: options.residual_dtype })
    }

    fn object<'py>(&self, py: Python<'py>, slot: usize) -> Option<Bound<'py, PyAny>> {
        self.objects.iter().find(|(at, _)| *at == slot).map(|(_, object)| object.bind(py).clone())
    }

    /// Whether the next latent is given, and in the dtype that it is stored in: there is none to write.
    fn is_as_stored(&self) -> bool {
        let SdeStepLatents { prev_sample, sample, .. } = &self.call.latents;
        prev_sample.is_present() && prev_sample.dtype == sample.dtype
    }
}

#[pymethods]
impl SdeStepCall {
    /// `fields`: tensors and numbers by the names of the operator's arguments; `settings` likewise.
    #[new]
    fn checked(py: Python<'_>, fields: &Bound<'_, PyDict>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let torch = Torch::get(py)?;
        Self::new(torch, values(torch, names(), fields)?, Options::new(torch, settings)?)
    }

    /// Whether the noise is still to be drawn.
    #[getter]
    fn needs_noise(&self) -> bool {
        let SdeStepLatents { prev_sample, noise, .. } = &self.call.latents;
        !prev_sample.is_present() && !noise.is_present()
    }

    /// Whether arithmetic is float64.
    #[getter]
    fn is_double(&self) -> bool {
        self.call.dtype() == Dtype::F64
    }

    fn give_noise(&mut self, noise: &Bound<'_, PyAny>) -> PyResult<()> {
        let value = value_of(Torch::get(noise.py())?, "noise", noise)?;
        self.call.latents.noise = self.shapes.latent("noise", &value)?;
        if let Value::Array(object, _) = value {
            self.objects.push((NOISE, object.unbind()));
        }
        Ok(())
    }

    /// What the outputs are differentiated in: `model_output` and `uncond_output`. None where nothing is.
    fn leaves<'py>(&self, py: Python<'py>) -> PyResult<Option<[Option<Bound<'py, PyAny>>; 2]>> {
        let torch = Torch::get(py)?;
        let leaves = [self.object(py, MODEL_OUTPUT), self.object(py, UNCOND_OUTPUT)];
        let wanted = torch.is_grad_enabled(py)? && leaves.iter().flatten().any(requires_grad);
        Ok((wanted || torch.is_forward_mode(py)).then_some(leaves))
    }

    /// The given next latent, where the forward writes none.
    #[getter]
    fn stored<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        if self.is_as_stored() { self.object(py, PREV_SAMPLE) } else { None }
    }

    /// `may_keep`: see `workspace`.
    #[pyo3(signature = (may_keep = true))]
    fn forward<'py>(&self, py: Python<'py>, may_keep: bool) -> PyResult<Outputs<'py>> {
        let torch = Torch::get(py)?;
        let sample = self.object(py, SAMPLE).ok_or(Error::Missing { name: "sample" })?;
        let (dtype, rows) = (self.call.dtype(), self.shapes.row_count());
        let (latents, of_rows) = (self.shapes.latents.as_deref().unwrap_or(&[]), &self.shapes.rows[..]);
        let outputs = [
            (!self.is_as_stored()).then_some((latents, self.call.latents.sample.dtype)),
            Some((of_rows, dtype)),
            Some((latents, dtype)),
            Some((of_rows, dtype)),
            self.residual_dtype.map(|dtype| (latents, dtype)),
            Some((&[SDE_STEP_NUMBERS * rows][..], dtype)),
        ];
        let mut arrays: Outputs<'py> = Default::default();
        let mut addresses = [0; 6];
        for (at, output) in outputs.into_iter().enumerate() {
            let Some((shape, dtype)) = output else { continue };
            let array = torch.empty(&sample, shape, dtype)?;
            addresses[at] = torch.address(&array)?;
            arrays[at] = Some(array);
        }
        let [stored, log_prob, prev_sample_mean, std, residual, numbers] = addresses;
        let residual = self.residual_dtype.map_or_else(Latent::default, |dtype| Latent::new(residual, dtype));
        let mut forward = SdeStepForward {
            call: self.call,
            stored,
            prev_sample_mean,
            residual,
            log_prob,
            std,
            numbers,
            ..SdeStepForward::default()
        };
        let place = torch.place(py, self.shapes.device, None)?;
        let (mut plan, mut _workspace) = (None, None);
        if let Place::Gpu(target) = place {
            let call = self.call;
            let (grid, partials, tickets) = py.detach(|| guarded(|| ops::workspace(target, &call)))?;
            let room = workspace(torch, &sample, target, (partials, tickets), may_keep)?;
            (forward.partials, forward.tickets, forward.splits) = (room.partials, room.tickets, grid.splits);
            (plan, _workspace) = (Some(grid), Some(room));
        }
        // SAFETY: inputs are memory of arrays that `self` holds, of the lengths that `new` checked; outputs were just
        // allocated here, and nobody else knows them yet.
        py.detach(|| guarded(|| unsafe { ops::forward(place, plan, &forward) }))?;
        Ok(arrays)
    }
}

/// Gradients of `model_output` and `uncond_output` in the dtypes given; None: not wanted. The others are what the forward
/// left, and the gradients of `log_prob` and `prev_sample_mean`.
#[pyfunction]
pub fn sde_step_backward<'py>(
    py: Python<'py>,
    grads: (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>),
    prev_sample: &Bound<'py, PyAny>,
    prev_sample_mean: &Bound<'py, PyAny>,
    numbers: &Bound<'py, PyAny>,
    dtypes: [Option<Bound<'py, PyAny>>; 2],
) -> PyResult<[Option<Bound<'py, PyAny>>; 2]> {
    let (torch, (grad_log_prob, grad_mean)) = (Torch::get(py)?, grads);
    let (mean, of_mean) = torch.read("prev_sample_mean", prev_sample_mean)?;
    let (_numbers, of_numbers) = torch.read("numbers", numbers)?;
    let dtype = of_mean.dtype;
    if !matches!(dtype, Dtype::F32 | Dtype::F64) {
        let came = dtype.name().to_owned();
        return Err(Error::Dtype { name: "prev_sample_mean", came, wanted: "float32 or float64" }.into());
    }
    let rows = of_numbers.len() / SDE_STEP_NUMBERS;
    if rows == 0 || !of_numbers.len().is_multiple_of(SDE_STEP_NUMBERS) || !of_mean.len().is_multiple_of(rows) {
        let wanted = SDE_STEP_NUMBERS * of_mean.shape.first().copied().unwrap_or(1);
        return Err(Error::Length { name: "numbers", came: of_numbers.len(), wanted }.into());
    }
    let flat = [rows, of_mean.len() / rows];
    let shapes = Shapes::new("prev_sample_mean", &[rows], Some(&flat), of_mean.device)?;
    let mut call = SdeStepBackward { rows: rows as u64, numel: flat[1] as u64, dtype, ..SdeStepBackward::default() };
    // Of the arithmetic's dtype, all on one device.
    let arithmetic = |name: &'static str, array: &super::array::Array, shape: &[usize]| -> Result<u64, Error> {
        if array.dtype != dtype {
            return Err(Error::Dtype { name, came: array.dtype.name().to_owned(), wanted: dtype.name() });
        }
        Ok(shapes.exactly(name, array, shape)?.data)
    };
    call.numbers = arithmetic("numbers", &of_numbers, &of_numbers.shape)?;
    call.prev_sample_mean = of_mean.address;
    let (_prev_sample, of_prev) = torch.read("prev_sample", prev_sample)?;
    call.prev_sample = shapes.exactly("prev_sample", &of_prev, &of_mean.shape)?;
    // Contiguous copies must live until the kernel has been launched.
    let mut held = Vec::new();
    if let Some(grad) = grad_log_prob {
        let (object, array) = torch.read("grad_log_prob", &grad)?;
        if array.len() != rows {
            return Err(Error::Length { name: "grad_log_prob", came: array.len(), wanted: rows }.into());
        }
        call.grad_log_prob = arithmetic("grad_log_prob", &array, &array.shape)?;
        held.push(object);
    }
    if let Some(grad) = grad_mean {
        let (object, array) = torch.read("grad_prev_sample_mean", &grad)?;
        call.grad_prev_sample_mean = arithmetic("grad_prev_sample_mean", &array, &of_mean.shape)?;
        held.push(object);
    }
    let mut grads = [None, None];
    let targets = [&mut call.grad_model_output, &mut call.grad_uncond_output];
    for ((grad, wanted), target) in grads.iter_mut().zip(dtypes).zip(targets) {
        let Some(wanted) = wanted else { continue };
        let known = "float32, bfloat16, float16 or float64";
        let came = wanted.str()?.to_string();
        let dtype = torch.dtype(&wanted).ok_or(Error::Dtype { name: "a gradient", came, wanted: known })?;
        let array = torch.empty(&mean, &of_mean.shape, dtype)?;
        *target = Latent::new(torch.address(&array)?, dtype);
        *grad = Some(array);
    }
    let place = torch.place(py, shapes.device, None)?;
    // SAFETY: inputs are memory of arrays that this function holds, of lengths that were checked against the rows;
    // outputs were just allocated here.
    py.detach(|| guarded(|| unsafe { ops::backward(place, &mut call) }))?;
    Ok(grads)
}

/// Calls of `sde_step` whose metadata has been seen.
#[pyclass(frozen)]
pub struct SdeStepMemo {
    names: Vec<String>,
    memo: Memo<Options>,
}

#[pymethods]
impl SdeStepMemo {
    /// `names`: of the arguments, in the order in which they come.
    #[new]
    fn new(names: Vec<String>) -> Self {
        SdeStepMemo { names, memo: Memo::default() }
    }

    /// The call, if one like it has been checked before.
    fn find(&self, py: Python<'_>, arguments: &Bound<'_, PyTuple>) -> PyResult<Option<SdeStepCall>> {
        let Some(read) = Arguments::read(Torch::get(py)?, arguments) else { return Ok(None) };
        let Some(recipe) = self.memo.find(&read) else { return Ok(None) };
        SdeStepCall::new(Torch::get(py)?, take(read.values, &recipe), recipe.settings).map(Some)
    }

    /// A call that Python has checked: `fields` and `settings` as in `SdeStepCall`. Remembers what was read of it.
    fn learn(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        fields: &Bound<'_, PyDict>,
        settings: &Bound<'_, PyAny>,
    ) -> PyResult<SdeStepCall> {
        let torch = Torch::get(py)?;
        let (call, options) = (SdeStepCall::checked(py, fields, settings)?, Options::new(torch, settings)?);
        if let Some(read) = Arguments::read(torch, arguments)
            && let Some(recipe) = Arguments::recipe(&self.names, arguments, names(), fields, options)?
        {
            self.memo.learn(read, recipe);
        }
        Ok(call)
    }
}
