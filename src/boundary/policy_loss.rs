//! The boundary of `policy_loss`: bound calls, forward and backward, for tensors on either device and for NumPy arrays.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::array::{Device, Library, Numpy, Torch};
use super::bind::{Shapes, Values, values, write_out};
use super::guard::guarded;
use super::memo::{Arguments, Memo, Recipe, Value};
use super::objective;
use super::workspace::workspace;
use crate::call::{
    BATCH_LEN, Dtype, Latent, Latents, Objective, ObjectiveKind, PolicyLoss, PolicyLossBackward, PolicyLossForward,
    Reduction, RowVector, RowVectors, Schedule, Settings, Stage, fields, numbers_len, row_sums_len,
};
use crate::error::Error;
use crate::ops::Place;
use crate::ops::policy_loss::{self as ops, Gradients};
use crate::plan::{Plan, gradient_ahead};

/// Of the fields: latents, then row vectors, then the schedule's.
const NAMES: [&str; Latents::NAMES.len() + RowVectors::NAMES.len() + Schedule::NAMES.len()] = {
    let mut names = [""; Latents::NAMES.len() + RowVectors::NAMES.len() + Schedule::NAMES.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = if at < FIRST_VECTOR {
            Latents::NAMES[at]
        } else if at < FIRST_VECTOR + RowVectors::NAMES.len() {
            RowVectors::NAMES[at - FIRST_VECTOR]
        } else {
            Schedule::NAMES[at - FIRST_VECTOR - RowVectors::NAMES.len()]
        };
        at += 1;
    }
    names
};
const PREV_SAMPLE_MEAN: usize = 0;
const MODEL_OUTPUT: usize = 1;
const UNCOND_OUTPUT: usize = 2;
const FIRST_VECTOR: usize = Latents::NAMES.len();
const ADVANTAGES: usize = FIRST_VECTOR;
const LOG_PROBS: [usize; 2] = [FIRST_VECTOR + 1, FIRST_VECTOR + 2];

/// What a result needs to know of its call.
#[pyclass(frozen, get_all)]
pub struct Layout {
    row_shape: Py<PyTuple>,
    has_kl: bool,
    has_ref: bool,
    /// Names of the latents that the backward reads.
    saved: Py<PyTuple>,
}

/// What calls of one kind have in common: the same for all that a recipe makes.
#[derive(Clone)]
struct Kind {
    layout: Arc<Py<Layout>>,
    /// Positions of the latents that the backward reads.
    saved: Arc<[usize]>,
    /// A loss, and one number that looks like the numbers: `empty_like` takes half the time of `empty`.
    loss_like: Arc<Py<PyAny>>,
    numbers_like: Arc<Py<PyAny>>,
}

/// A call of `loss` or `step_loss`, bound to its tensors, which it holds.
#[pyclass]
pub struct PolicyLossCall {
    call: PolicyLoss,
    shapes: Shapes,
    objects: Vec<(usize, Py<PyAny>)>,
    kind: Kind,
    #[pyo3(get)]
    numbers: Option<Py<PyAny>>,
}

/// Binds values to a call.
fn bind(values: &Values<'_>, objective: Objective, settings: Settings) -> Result<(PolicyLoss, Shapes), Error> {
    let array = |slot| match values.iter().find(|(at, _)| *at == slot) {
        Some((_, Value::Array(_, array))) => Some(array),
        _ => None,
    };
    let advantages = array(ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
    let first = (0..FIRST_VECTOR).find_map(|slot| Some((NAMES[slot], array(slot)?)));
    let (name, like) = first.unwrap_or(("advantages", advantages));
    let latents = first.map(|(_, array)| &array.shape[..]);
    let shapes = Shapes::new(name, &advantages.shape, latents, like.device)?;
    let (rows, numel) = (shapes.row_count() as u64, shapes.numel() as u64);
    let mut call = PolicyLoss { rows, numel, objective, settings, ..PolicyLoss::default() };
    let (latents, vectors, schedule) = (call.latents.each_mut(), call.vectors.each_mut(), call.schedule.each_mut());
    for (slot, value) in values {
        match slot.checked_sub(FIRST_VECTOR) {
            None => *latents[*slot] = shapes.latent(NAMES[*slot], value)?,
            Some(at) => {
                let whole = *slot == ADVANTAGES || LOG_PROBS.contains(slot);
                let vector = shapes.row_vector(NAMES[*slot], value, whole)?;
                match at.checked_sub(RowVectors::NAMES.len()) {
                    None => *vectors[at] = vector,
                    Some(at) => *schedule[at] = vector,
                }
            }
        }
    }
    Ok((call, shapes))
}

/// Whether the loss depends on the mean through more than a KL that is only compared.
fn differentiates_mean(call: &PolicyLoss) -> bool {
    let is_guard = call.objective.kind == ObjectiveKind::GrpoGuard;
    call.latents.prev_sample.is_present() || call.latents.has_ref() || is_guard
}

/// Whether the backward reads a latent of this name.
fn is_read_by_backward(call: &PolicyLoss, name: &str) -> bool {
    let is_guard = call.objective.kind == ObjectiveKind::GrpoGuard;
    differentiates_mean(call) && (is_guard || !name.starts_with("old_"))
}

impl Kind {
    fn new(library: &dyn Library, advantages: &Bound<'_, PyAny>, call: &PolicyLoss, shapes: &Shapes) -> PyResult<Kind> {
        let (py, dtype, rows) = (advantages.py(), call.dtype(), shapes.row_count());
        let too_large = Error::TooLarge { name: "numbers", rows, numel: fields(call.has_schedule()) };
        let len = numbers_len(rows, call.has_schedule()).ok_or(too_large)?;
        let shape = if call.settings.reduction == Reduction::None { &shapes.rows[..] } else { &[] };
        let loss = library.empty(advantages, shape, dtype)?;
        let numbers = library.expand(&library.empty(advantages, &[1], dtype)?, &[1], &[len])?;
        let latents = call.latents.named().enumerate();
        let read = latents.filter(|(_, (name, latent))| latent.is_present() && is_read_by_backward(call, name));
        let saved: Arc<[usize]> = read.map(|(slot, _)| slot).collect();
        let layout = Layout {
            row_shape: PyTuple::new(py, &shapes.rows)?.unbind(),
            has_kl: call.has_kl(),
            has_ref: call.latents.has_ref(),
            saved: PyTuple::new(py, saved.iter().map(|&slot| NAMES[slot]))?.unbind(),
        };
        let (loss_like, numbers_like) = (Arc::new(loss.unbind()), Arc::new(numbers.unbind()));
        Ok(Kind { layout: Arc::new(Py::new(py, layout)?), saved, loss_like, numbers_like })
    }
}

impl PolicyLossCall {
    /// `kind`: that of the recipe, None of a call that none has made.
    fn new(
        library: &dyn Library,
        mut values: Values<'_>,
        (objective, settings): (Objective, Settings),
        kind: Option<&Kind>,
    ) -> PyResult<Self> {
        write_out(library, &mut values, FIRST_VECTOR, (ADVANTAGES, None))?;
        let (call, shapes) = bind(&values, objective, settings)?;
        let advantages = values.iter().find_map(|(slot, value)| match value {
            Value::Array(object, _) if *slot == ADVANTAGES => Some(object),
            _ => None,
        });
        let advantages = advantages.ok_or(Error::Missing { name: "advantages" })?;
        let kind = kind.map_or_else(|| Kind::new(library, advantages, &call, &shapes), |kind| Ok(kind.clone()))?;
        let objects = values.into_iter().filter_map(|(slot, value)| match value {
            Value::Array(object, _) => Some((slot, object.unbind())),
            Value::Number(_) => None,
        });
        Ok(PolicyLossCall { call, shapes, objects: objects.collect(), kind, numbers: None })
    }

    fn object<'py>(&self, py: Python<'py>, slot: usize) -> Option<Bound<'py, PyAny>> {
        self.objects.iter().find(|(at, _)| *at == slot).map(|(_, object)| object.bind(py).clone())
    }

    /// What gradients may go to: `prev_sample_mean` or `model_output`, `uncond_output`, and `log_prob`.
    fn differentiable<'py>(&self, py: Python<'py>) -> [Option<Bound<'py, PyAny>>; 3] {
        let output = if self.call.latents.has_model_output() { MODEL_OUTPUT } else { PREV_SAMPLE_MEAN };
        [output, UNCOND_OUTPUT, LOG_PROBS[0]].map(|slot| self.object(py, slot))
    }

    /// Runs one stage of a forward; `row_sums` is an address.
    fn run(
        &self,
        py: Python<'_>,
        library: &dyn Library,
        forward: PolicyLossForward,
        gradients: Option<&Gradients>,
        may_keep: bool,
        threads: Option<usize>,
    ) -> PyResult<()> {
        // One task needs no second thread, and nobody has to be asked for their number.
        let threads =
            threads.or_else(|| (Plan::new(self.shapes.row_count(), self.shapes.numel()).tasks() <= 1).then_some(1));
        let place = library.place(py, self.shapes.device, threads)?;
        let mut forward = forward;
        let (mut plan, mut _workspace) = (None, None);
        if let Place::Gpu(target) = place {
            let (call, stage) = (self.call, forward.stage);
            let (grid, partials, tickets) = py.detach(|| guarded(|| ops::workspace(target, &call, stage)))?;
            let advantages = self.object(py, ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
            let room = workspace(Torch::get(py)?, &advantages, target, (partials, tickets), may_keep)?;
            (forward.partials, forward.tickets) = (room.partials, room.tickets);
            forward.splits = grid.splits;
            (plan, _workspace) = (Some(grid), Some(room));
        }
        // SAFETY: inputs are memory of arrays that `self` holds, of the lengths that `bind` checked; outputs were just
        // allocated by the caller, who holds them, and nobody else knows them yet.
        py.detach(|| guarded(|| unsafe { ops::forward(place, plan, &forward, gradients) })).map_err(Into::into)
    }

    fn forward_in<'py>(
        &mut self,
        py: Python<'py>,
        library: &dyn Library,
        with_gradients: bool,
        may_keep: bool,
        row_sums: Option<u64>,
        threads: Option<usize>,
    ) -> PyResult<Formed<'py>> {
        let loss = library.empty_like(self.kind.loss_like.bind(py))?;
        let numbers = library.empty_like(self.kind.numbers_like.bind(py))?;
        let (mut gradients, mut ahead) = ([None, None], None);
        if with_gradients && row_sums.is_none() && self.forms_gradients() {
            let [output, uncond, _] = self.differentiable(py);
            let likes = [(output, self.call.latents.output().1), (uncond, &self.call.latents.uncond_output)];
            let mut targets = [Latent::default(); 2];
            for (at, (like, latent)) in likes.into_iter().enumerate() {
                if let Some(like) = like.filter(requires_grad) {
                    let gradient = library.empty_like(&like)?;
                    targets[at] = Latent::new(library.address(&gradient)?, latent.dtype);
                    gradients[at] = Some(gradient);
                }
            }
            let [output, uncond_output] = targets;
            ahead = gradients.iter().any(Option::is_some).then_some(Gradients { output, uncond_output });
        }
        let forward = PolicyLossForward {
            call: self.call,
            loss: library.address(&loss)?,
            numbers: library.address(&numbers)?,
            row_sums: row_sums.unwrap_or(0),
            stage: if row_sums.is_some() { Stage::ObjectiveAlone } else { Stage::Whole },
            ..PolicyLossForward::default()
        };
        self.run(py, library, forward, ahead.as_ref(), may_keep, threads)?;
        self.numbers = Some(numbers.unbind());
        Ok((loss, gradients))
    }

    /// Whether a forward on the CPU does well to form the gradients of the latents too, see `plan::gradient_ahead`. The
    /// batch's divisor must be known beforehand, and there must be one `grad_loss` for all rows.
    fn forms_gradients(&self) -> bool {
        let PolicyLoss { latents, settings, rows, numel, .. } = &self.call;
        let one_factor = matches!(settings.reduction, Reduction::Mean | Reduction::Sum);
        let (outputs, samples, _) = latents.groups();
        let read = outputs.iter().chain(&samples).filter(|latent| latent.is_present());
        let row_bytes = read.map(|latent| latent.dtype.size() * *numel as usize).sum();
        let replays = latents.prev_sample.is_present() && self.shapes.device == Device::Cpu;
        replays && one_factor && gradient_ahead(*rows as usize, row_bytes)
    }
}

pub(super) fn requires_grad(tensor: &Bound<'_, PyAny>) -> bool {
    let found = tensor.getattr(intern!(tensor.py(), "requires_grad")).and_then(|requires| requires.is_truthy());
    found.unwrap_or(false)
}

/// Loss, and gradients formed with it: of the output and of the unconditional output.
type Formed<'py> = (Bound<'py, PyAny>, [Option<Bound<'py, PyAny>>; 2]);

#[pymethods]
impl PolicyLossCall {
    /// `fields`: tensors and numbers by the names of the operator's arguments; `settings` likewise.
    #[new]
    fn checked(py: Python<'_>, fields: &Bound<'_, PyDict>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let torch = Torch::get(py)?;
        let values = values(torch, NAMES.into_iter(), fields)?;
        Self::new(torch, values, (objective::objective(settings)?, objective::settings(settings)?), None)
    }

    /// What the loss is differentiated in: the output, the unconditional output, and `log_prob`. None where nothing is.
    fn leaves<'py>(&self, py: Python<'py>) -> PyResult<Option<[Option<Bound<'py, PyAny>>; 3]>> {
        let (torch, leaves) = (Torch::get(py)?, self.differentiable(py));
        let wanted = torch.is_grad_enabled(py)? && leaves.iter().flatten().any(requires_grad);
        Ok((wanted || torch.is_forward_mode(py)).then_some(leaves))
    }

    /// The loss, and with `with_gradients` the gradients for a `grad_loss` of 1 where it is well to form them already.
    /// The numbers stay in `numbers`. `row_sums`: what `shard_sums` gave, summed over all shards. `may_keep`: see
    /// `workspace`.
    #[pyo3(signature = (with_gradients = false, row_sums = None, may_keep = true))]
    fn forward<'py>(
        &mut self,
        py: Python<'py>,
        with_gradients: bool,
        row_sums: Option<Bound<'py, PyAny>>,
        may_keep: bool,
    ) -> PyResult<Formed<'py>> {
        let torch = Torch::get(py)?;
        let sums = row_sums.map(|sums| self.read_sums(torch, &sums)).transpose()?;
        let address = sums.as_ref().map(|(_, address)| *address);
        self.forward_in(py, torch, with_gradients, may_keep, address, None)
    }

    /// Of this shard: `[rows, 4]` sums and then the elements of a row, float64, to be added up over the shards.
    #[pyo3(signature = (may_keep = true))]
    fn shard_sums<'py>(&self, py: Python<'py>, may_keep: bool) -> PyResult<Bound<'py, PyAny>> {
        let (torch, rows) = (Torch::get(py)?, self.shapes.row_count());
        let advantages = self.object(py, ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
        let len = row_sums_len(rows).ok_or(Error::TooLarge { name: "shard_sums", rows, numel: 4 })?;
        let sums = torch.empty(&advantages, &[len], Dtype::F64)?;
        let row_sums = torch.address(&sums)?;
        let forward =
            PolicyLossForward { call: self.call, row_sums, stage: Stage::SumsAlone, ..PolicyLossForward::default() };
        self.run(py, torch, forward, None, may_keep, None)?;
        Ok(sums)
    }

    /// Numbers and latents that the backward reads, for `save_for_backward`; and by name those that must be kept in
    /// another way: autograd refuses to save what was made under `inference_mode`, as rollouts are.
    fn saved<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Option<Bound<'py, PyDict>>)> {
        let numbers = self.numbers.as_ref().map(|numbers| numbers.bind(py).clone());
        let (mut saved, mut kept) = (vec![numbers], None);
        for &slot in self.kind.saved.iter() {
            let Some(tensor) = self.object(py, slot) else { continue };
            if tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
                kept.get_or_insert_with(|| PyDict::new(py)).set_item(NAMES[slot], tensor)?;
                saved.push(None);
            } else {
                saved.push(Some(tensor));
            }
        }
        Ok((PyTuple::new(py, saved)?, kept))
    }

    #[getter]
    fn layout(&self, py: Python<'_>) -> Py<Layout> {
        self.kind.layout.clone_ref(py)
    }
}

impl PolicyLossCall {
    /// The summed-up `shard_sums`, and its address.
    fn read_sums<'py>(&self, library: &dyn Library, sums: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, u64)> {
        let (sums, array) = library.read("shard_sums", sums)?;
        let rows = self.shapes.row_count();
        let wanted = row_sums_len(rows).ok_or(Error::TooLarge { name: "shard_sums", rows, numel: 4 })?;
        if array.dtype != Dtype::F64 {
            let came = array.dtype.name().to_owned();
            return Err(Error::Dtype { name: "shard_sums", came, wanted: "float64" }.into());
        }
        let latent = self.shapes.exactly("shard_sums", &array, &[wanted])?;
        Ok((sums, latent.data))
    }
}

/// The gradients of the output and the unconditional output, in their dtypes, and of `log_prob`, flat, in the dtype of
/// `numbers`: those of the three that `wants` says.
///
/// `latents`: by name, those that the backward reads. `formed`: what the forward formed for a `grad_loss` of 1.
#[pyfunction]
#[pyo3(signature = (grad_loss, numbers, latents, wants, formed = None))]
pub fn policy_loss_backward<'py>(
    py: Python<'py>,
    grad_loss: &Bound<'py, PyAny>,
    numbers: &Bound<'py, PyAny>,
    latents: &Bound<'py, PyDict>,
    wants: [bool; 3],
    formed: Option<[Option<Bound<'py, PyAny>>; 2]>,
) -> PyResult<[Option<Bound<'py, PyAny>>; 3]> {
    let (torch, formed) = (Torch::get(py)?, formed.unwrap_or_default());
    if formed.iter().any(Option::is_some) && scaled(torch, grad_loss, &formed)? {
        let [output, uncond] = formed;
        return Ok([output, uncond, None]);
    }
    backward(py, torch, grad_loss, numbers, latents, (wants, formed), None)
}

/// Multiplies gradients that the forward formed with `grad_loss`; false where they must be formed again. Half precision
/// would be rounded twice; and what overflowed, or met an infinity, need not do so with another factor.
fn scaled(
    torch: &'static Torch,
    grad_loss: &Bound<'_, PyAny>,
    formed: &[Option<Bound<'_, PyAny>>; 2],
) -> PyResult<bool> {
    let py = grad_loss.py();
    let factor: f64 = grad_loss.call_method0(intern!(py, "item"))?.extract()?;
    if factor == 1.0 {
        return Ok(true);
    }
    for gradient in formed.iter().flatten() {
        let (_, array) = torch.read("gradient", gradient)?;
        let latent = Latent::new(array.address, array.dtype);
        let Place::Host { threads } = torch.place(py, array.device, None)? else { return Ok(false) };
        // SAFETY: the tensor was allocated by the forward for this gradient alone, and `formed` holds it.
        if !py.detach(|| unsafe { ops::scale_in_place(&latent, array.len(), factor, threads) }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is wanted, and memory for the first two where there is some already.
type Wanted<'py> = ([bool; 3], [Option<Bound<'py, PyAny>>; 2]);

fn backward<'py>(
    py: Python<'py>,
    library: &dyn Library,
    grad_loss: &Bound<'py, PyAny>,
    numbers: &Bound<'py, PyAny>,
    latents: &Bound<'py, PyDict>,
    (wants, memory): Wanted<'py>,
    threads: Option<usize>,
) -> PyResult<[Option<Bound<'py, PyAny>>; 3]> {
    let names = Latents::NAMES;
    let values = values(library, names.into_iter(), latents)?;
    let (numbers, of_numbers) = library.read("numbers", numbers)?;
    let is_step = values.iter().any(|(slot, _)| names[*slot] == "model_output");
    let (len, count) = (of_numbers.len(), fields(is_step));
    let rows = len.saturating_sub(BATCH_LEN) / count;
    if rows == 0 || Some(len) != numbers_len(rows, is_step) || of_numbers.shape.len() != 1 {
        return Err(Error::Length { name: "numbers", came: len, wanted: count * rows.max(1) + BATCH_LEN }.into());
    }
    let dtype = of_numbers.dtype;
    if !matches!(dtype, Dtype::F32 | Dtype::F64) {
        let came = dtype.name().to_owned();
        return Err(Error::Dtype { name: "numbers", came, wanted: "float32 or float64" }.into());
    }
    // The rows' own shape does not matter here: latents are `rows` times as many elements.
    let first = values.iter().find_map(|(slot, value)| match value {
        Value::Array(_, array) => Some((names[*slot], &array.shape)),
        Value::Number(_) => None,
    });
    let flat = first.map(|(name, shape)| flattened(name, shape, rows)).transpose()?;
    let shapes = Shapes::new("numbers", &[rows], flat.as_ref().map(|flat| &flat[..]), of_numbers.device)?;
    let mut call = PolicyLossBackward { rows: rows as u64, numel: shapes.numel() as u64, dtype, ..Default::default() };
    let slots = call.latents.each_mut();
    for (slot, value) in &values {
        let Value::Array(_, array) = value else { continue };
        let wanted = first.map_or(&[][..], |(_, shape)| shape);
        *slots[*slot] = shapes.exactly(names[*slot], array, wanted)?;
    }
    let (_grad_loss, of_grad) = library.read("grad_loss", grad_loss)?;
    let modulo = of_grad.len();
    if modulo != 1 && modulo != rows {
        return Err(Error::Length { name: "grad_loss", came: modulo, wanted: rows }.into());
    }
    if of_grad.device != shapes.device {
        let (came, wanted) = (of_grad.device.to_string(), shapes.device.to_string());
        return Err(Error::Device { name: "grad_loss", came, wanted }.into());
    }
    call.grad_loss = RowVector::array("grad_loss", of_grad.address, of_grad.dtype, (1, modulo), rows)?;
    call.numbers = of_numbers.address;

    let output = call.latents.output().0;
    let like = |name: &'static str, memory: Option<Bound<'py, PyAny>>| {
        let found = values.iter().find(|(slot, _)| names[*slot] == name);
        let Some((_, Value::Array(object, array))) = found else { return Err(PyErr::from(Error::Missing { name })) };
        if let Some(memory) = memory {
            // A hook may have given the latent back in another dtype than that of the gradient which was formed.
            let (memory, formed) = library.read("gradient", &memory)?;
            if formed.dtype == array.dtype && formed.shape == array.shape && formed.device == array.device {
                return Ok(memory);
            }
        }
        library.empty(object, &array.shape, array.dtype)
    };
    let ([wants_output, wants_uncond, wants_log_prob], [of_output, of_uncond]) = (wants, memory);
    let grads = [
        wants_output.then(|| like(output, of_output)).transpose()?,
        wants_uncond.then(|| like("uncond_output", of_uncond)).transpose()?,
        wants_log_prob.then(|| library.empty(&numbers, &[rows], dtype)).transpose()?,
    ];
    let address = |grad: &Option<Bound<'py, PyAny>>| grad.as_ref().map_or(Ok(0), |grad| library.address(grad));
    call.grad_output = address(&grads[0])?;
    call.grad_uncond_output = address(&grads[1])?;
    call.grad_log_prob = address(&grads[2])?;
    let place = library.place(py, shapes.device, threads)?;
    // SAFETY: inputs are memory of arrays that this function holds, of lengths that were checked against the rows;
    // outputs were allocated here, or by the forward for this gradient alone, with the shape and dtype of the latent.
    py.detach(|| guarded(|| unsafe { ops::backward(place, &mut call) }))?;
    Ok(grads)
}

/// `[rows, elements of a row]` of latents that have `rows` rows in their first dimensions.
fn flattened(name: &'static str, shape: &[usize], rows: usize) -> Result<[usize; 2], Error> {
    let len: usize = shape.iter().product();
    if len == 0 || !len.is_multiple_of(rows) {
        return Err(Error::Shape { name, came: shape.to_vec(), wanted: vec![rows, len / rows] });
    }
    Ok([rows, len / rows])
}

/// Of a NumPy call: the loss, then the gradients of the mean and of `log_prob` (flat), where there are such. `fields` and
/// `settings` as in `PolicyLossCall`.
#[pyfunction]
pub fn policy_loss_numpy<'py>(
    py: Python<'py>,
    fields: &Bound<'py, PyDict>,
    settings: &Bound<'py, PyAny>,
    threads: usize,
) -> PyResult<[Option<Bound<'py, PyAny>>; 3]> {
    let values = values(&Numpy, NAMES.into_iter(), fields)?;
    let mut call =
        PolicyLossCall::new(&Numpy, values, (objective::objective(settings)?, objective::settings(settings)?), None)?;
    let (loss, _) = call.forward_in(py, &Numpy, false, false, None, Some(threads))?;
    let latents = PyDict::new(py);
    for &slot in call.kind.saved.iter() {
        latents.set_item(NAMES[slot], call.object(py, slot))?;
    }
    let one = Numpy.empty(&loss, &[1], Dtype::F64)?;
    one.call_method1(intern!(py, "fill"), (1.0,))?;
    let numbers = call.numbers.as_ref().map(|numbers| numbers.bind(py).clone()).expect("the forward has left them");
    let has_mean = call.call.latents.output().1.is_present();
    let wants = [has_mean && differentiates_mean(&call.call), false, call.call.vectors.log_prob.is_present()];
    let [mean, _, log_prob] = backward(py, &Numpy, &one, &numbers, &latents, (wants, [None, None]), Some(threads))?;
    Ok([Some(loss), mean, log_prob])
}

/// Calls of `loss` or of `step_loss` whose metadata has been seen.
#[pyclass(frozen)]
pub struct PolicyLossMemo {
    names: Vec<String>,
    ref_kl_weight: Option<usize>,
    memo: Memo<(Settings, Kind)>,
}

#[pymethods]
impl PolicyLossMemo {
    /// `names`: of the arguments, in the order in which they come.
    #[new]
    fn new(names: Vec<String>) -> Self {
        let ref_kl_weight = names.iter().position(|name| name == "ref_kl_weight");
        PolicyLossMemo { names, ref_kl_weight, memo: Memo::default() }
    }

    /// The call, if one like it has been checked before.
    fn find(&self, py: Python<'_>, arguments: &Bound<'_, PyTuple>) -> PyResult<Option<PolicyLossCall>> {
        let Some(read) = Arguments::read(Torch::get(py)?, arguments) else { return Ok(None) };
        let (Some(recipe), Some(objective)) = (self.memo.find(&read), read.objective) else { return Ok(None) };
        let (mut settings, kind) = (recipe.settings.0, &recipe.settings.1);
        for (at, value) in &read.values {
            if let Value::Number(weight) = value
                && Some(*at) == self.ref_kl_weight
            {
                settings.ref_kl_weight = *weight;
            }
        }
        let values = take(read.values, &recipe);
        PolicyLossCall::new(Torch::get(py)?, values, (objective, settings), Some(kind)).map(Some)
    }

    /// A call that Python has checked: `fields` and `settings` as in `PolicyLossCall`. Remembers what was read of it.
    fn learn(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyTuple>,
        fields: &Bound<'_, PyDict>,
        settings: &Bound<'_, PyAny>,
    ) -> PyResult<PolicyLossCall> {
        let call = PolicyLossCall::checked(py, fields, settings)?;
        let settings = (call.call.settings, call.kind.clone());
        if let Some(read) = Arguments::read(Torch::get(py)?, arguments)
            && let Some(recipe) = Arguments::recipe(&self.names, arguments, NAMES.into_iter(), fields, settings)?
        {
            self.memo.learn(read, recipe);
        }
        Ok(call)
    }
}

/// The values that a recipe reads.
pub(super) fn take<'py, S>(values: Vec<(usize, Value<'py>)>, recipe: &Arc<Recipe<S>>) -> Values<'py> {
    let slot = |at| recipe.read.iter().find(|(_, argument)| *argument == at).map(|(slot, _)| *slot);
    values.into_iter().filter_map(|(at, value)| Some((slot(at)?, value))).collect()
}
