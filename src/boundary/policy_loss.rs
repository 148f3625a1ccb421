//! The boundary of `policy_loss`: bound calls, their forward, and the memo, for tensors on either device and for NumPy
//! arrays.

use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::array::{Array, Device, Library, Numpy, Torch};
use super::bind::{BoundCall, Fields, Shapes, Values, array_at, requires_grad, values};
use super::guard::guarded;
use super::memo::{Arguments, Memo};
use super::objective;
use super::policy_loss_backward::backward;
use super::workspace::workspace;
use crate::call::{
    Dtype, Latent, Objective, ObjectiveKind, PolicyLoss, PolicyLossForward, Reduction, Settings, Stage, fields,
    numbers_len, row_sums_len,
};
use crate::error::Error;
use crate::ops::Place;
use crate::ops::policy_loss::{self as ops, Gradients};
use crate::plan::{Plan, gradient_in_forward};

pub const PREV_SAMPLE_MEAN: usize = 0;
pub const MODEL_OUTPUT: usize = 1;
pub const UNCOND_OUTPUT: usize = 2;
const ADVANTAGES: usize = PolicyLoss::LATENTS;
const LOG_PROB: usize = ADVANTAGES + 1;

pub type Optional<'py> = Option<Bound<'py, PyAny>>;
/// The output (`prev_sample_mean` or `model_output`), `uncond_output` and `log_prob`, or their gradients.
pub type Leaves<'py> = [Optional<'py>; 3];
/// Gradients of the first two for a `grad_loss` of 1, which the forward computed.
pub type UnitGradients<'py> = [Optional<'py>; 2];

struct Forward<'py> {
    loss: Bound<'py, PyAny>,
    numbers: Bound<'py, PyAny>,
    unit_gradients: Option<UnitGradients<'py>>,
}

/// What Python needs to know about a call to read its numbers and to run its backward.
#[pyclass(frozen, get_all)]
pub struct Layout {
    row_shape: Py<PyTuple>,
    has_kl: bool,
    has_ref: bool,
    /// Names of the latents that the backward reads.
    saved: Py<PyTuple>,
    /// Dtype of the loss and of the numbers.
    dtype: Py<PyAny>,
}

/// What calls with the same metadata share.
#[derive(Clone)]
struct Common {
    layout: Arc<Py<Layout>>,
    /// Positions of the latents that the backward reads.
    saved: Arc<[usize]>,
    /// Arguments for `empty_like`, which takes half the time of `empty`.
    loss_like: Arc<Py<PyAny>>,
    numbers_like: Arc<Py<PyAny>>,
}

/// A call of `loss` or `step_loss`, bound to its tensors, which it holds.
#[pyclass]
pub struct PolicyLossCall {
    bound: BoundCall<PolicyLoss>,
    common: Common,
}

/// Whether the mean has a gradient: a KL that is only compared with a threshold gives it none.
fn differentiates_mean(call: &PolicyLoss) -> bool {
    let is_guard = call.objective.kind == ObjectiveKind::GrpoGuard;
    call.latents.prev_sample.is_present() || call.latents.has_ref() || is_guard
}

/// Whether the backward reads a latent of this name.
fn is_read_by_backward(call: &PolicyLoss, name: &str) -> bool {
    let is_guard = call.objective.kind == ObjectiveKind::GrpoGuard;
    differentiates_mean(call) && (is_guard || !name.starts_with("old_"))
}

impl Common {
    fn new(library: &dyn Library, advantages: &Bound<'_, PyAny>, bound: &BoundCall<PolicyLoss>) -> PyResult<Common> {
        let (py, call, rows) = (advantages.py(), &bound.call, bound.shapes.row_count());
        let too_large = Error::TooLarge { name: "numbers", rows, numel: fields(call.has_schedule()) };
        let len = numbers_len(rows, call.has_schedule()).ok_or(too_large)?;
        let shape = if call.settings.reduction == Reduction::None { &bound.shapes.rows[..] } else { &[] };
        let loss = library.empty(advantages, shape, call.dtype())?;
        let numbers = library.pattern(advantages, len, call.dtype())?;
        let latents = call.latents.named().enumerate();
        let read = latents.filter(|(_, (name, latent))| latent.is_present() && is_read_by_backward(call, name));
        let (saved, names): (Vec<_>, Vec<_>) = read.map(|(slot, (name, _))| (slot, name)).unzip();
        let layout = Layout {
            row_shape: PyTuple::new(py, &bound.shapes.rows)?.unbind(),
            has_kl: call.has_kl(),
            has_ref: call.latents.has_ref(),
            saved: PyTuple::new(py, names)?.unbind(),
            dtype: loss.getattr("dtype")?.unbind(),
        };
        let (loss_like, numbers_like) = (Arc::new(loss.unbind()), Arc::new(numbers.unbind()));
        Ok(Common { layout: Arc::new(Py::new(py, layout)?), saved: saved.into(), loss_like, numbers_like })
    }
}

impl PolicyLossCall {
    fn new(library: &dyn Library, fields: &Bound<'_, PyDict>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let values = values(library, PolicyLoss::NAMES.as_slice(), fields)?;
        let bound = bind(values, objective::objective(settings)?, objective::settings(settings)?)?;
        let advantages = bound.object(fields.py(), ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
        let common = Common::new(library, &advantages, &bound)?;
        Ok(PolicyLossCall { bound, common })
    }

    fn leaf_slots(&self) -> [usize; 3] {
        let has_model_output = self.bound.call.latents.has_model_output();
        [if has_model_output { MODEL_OUTPUT } else { PREV_SAMPLE_MEAN }, UNCOND_OUTPUT, LOG_PROB]
    }

    fn run(
        &self, py: Python<'_>, library: &dyn Library, mut forward: PolicyLossForward, gradients: Option<&Gradients>,
        may_keep: bool,
    ) -> PyResult<()> {
        let (shapes, call, stage) = (&self.bound.shapes, self.bound.call, forward.stage);
        // One task needs one thread, so PyTorch need not be asked for its number of threads.
        let is_one_task = Plan::new(shapes.row_count(), shapes.numel()).tasks() <= 1;
        let place = library.place(py, shapes.device, is_one_task)?;
        let (mut plan, mut _workspace) = (None, None);
        if let Place::Gpu(target) = place {
            let (grid, partials, tickets) = py.detach(|| guarded(|| ops::workspace(target, &call, stage)))?;
            let advantages = self.bound.object(py, ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
            let shared = workspace(Torch::get(py)?, &advantages, target, (partials, tickets), may_keep)?;
            (forward.partials, forward.tickets, forward.splits) = (shared.partials, shared.tickets, grid.splits);
            (plan, _workspace) = (Some(grid), Some(shared));
        }
        // SAFETY: inputs are memory of arrays that `self` holds, of lengths that `bind` checked; the caller has just
        // allocated the outputs and holds them, and nobody else has them.
        py.detach(|| guarded(|| unsafe { ops::forward(place, plan, &forward, gradients) })).map_err(Into::into)
    }

    /// Runs the forward. `row_sums`: see `read_sums`. `leaves`: what the loss will be differentiated in; their
    /// gradients are computed too if `computes_gradients` says so.
    fn forward_with<'py>(
        &self, py: Python<'py>, library: &dyn Library, row_sums: Option<&Bound<'py, PyAny>>,
        leaves: Option<&Leaves<'py>>, may_keep: bool,
    ) -> PyResult<Forward<'py>> {
        let sums = row_sums.map(|sums| self.read_sums(library, sums)).transpose()?;
        let loss = library.empty_like(self.common.loss_like.bind(py))?;
        let numbers = library.empty_like(self.common.numbers_like.bind(py))?;
        let (mut unit_gradients, mut targets) = ([None, None], Gradients::default());
        if let Some([output, uncond, _]) = leaves
            && sums.is_none()
            && self.computes_gradients()
        {
            let latents = &self.bound.call.latents;
            let of_output = (output, latents.output().1, &mut targets.output);
            let of_uncond = (uncond, &latents.uncond_output, &mut targets.uncond_output);
            for (gradient, (like, latent, target)) in unit_gradients.iter_mut().zip([of_output, of_uncond]) {
                if let Some(like) = like.as_ref().filter(|like| requires_grad(like)) {
                    let gradient = gradient.insert(library.empty_like(like)?);
                    *target = Latent::new(library.address(gradient)?, latent.dtype);
                }
            }
        }
        let forward = PolicyLossForward {
            call: self.bound.call,
            loss: library.address(&loss)?,
            numbers: library.address(&numbers)?,
            row_sums: sums.as_ref().map_or(0, |(_, array)| array.address),
            stage: if sums.is_some() { Stage::ObjectiveAlone } else { Stage::Whole },
            ..PolicyLossForward::default()
        };
        let gradients = unit_gradients.iter().any(Option::is_some).then_some(&targets);
        self.run(py, library, forward, gradients, may_keep)?;
        let unit_gradients = gradients.is_some().then_some(unit_gradients);
        Ok(Forward { loss, numbers, unit_gradients })
    }

    /// The tensors that autograd saves: `log_prob`, the numbers and the latents of `Layout::saved`. Autograd refuses
    /// tensors that were made under `inference_mode`, as rollouts are; these come in the dictionary, by name.
    fn saved<'py>(
        &self, numbers: &Bound<'py, PyAny>, log_prob: &Optional<'py>,
    ) -> PyResult<(Bound<'py, PyTuple>, Option<Bound<'py, PyDict>>)> {
        let (py, mut unsaved) = (numbers.py(), None);
        let mut tensors = vec![log_prob.clone(), Some(numbers.clone())];
        for &slot in self.common.saved.iter() {
            let Some(tensor) = self.bound.object(py, slot) else { continue };
            if tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
                unsaved.get_or_insert_with(|| PyDict::new(py)).set_item(PolicyLoss::NAMES[slot], tensor)?;
                tensors.push(None);
            } else {
                tensors.push(Some(tensor));
            }
        }
        Ok((PyTuple::new(py, tensors)?, unsaved))
    }

    /// Whether the forward also computes the gradients of the latents, see `plan::gradient_in_forward`. That needs a
    /// divisor which is known beforehand, and one `grad_loss` for all rows.
    fn computes_gradients(&self) -> bool {
        let PolicyLoss { latents, settings, rows, numel, .. } = &self.bound.call;
        let one_factor = matches!(settings.reduction, Reduction::Mean | Reduction::Sum);
        let (outputs, samples, _) = latents.groups();
        let read = outputs.iter().chain(&samples).filter(|latent| latent.is_present());
        let row_bytes = read.map(|latent| latent.dtype.size() * *numel as usize).sum();
        let replays = latents.prev_sample.is_present() && self.bound.shapes.device == Device::Cpu;
        replays && one_factor && gradient_in_forward(*rows as usize, row_bytes)
    }

    /// Reads `row_sums`: what `shard_sums` returned, added up over all shards.
    fn read_sums<'py>(&self, library: &dyn Library, sums: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, Array)> {
        let (object, array) = library.read("shard_sums", sums)?;
        let rows = self.bound.shapes.row_count();
        let wanted = row_sums_len(rows).ok_or(Error::TooLarge { name: "shard_sums", rows, numel: 4 })?;
        if array.dtype != Dtype::F64 {
            let came = array.dtype.name().to_owned();
            return Err(Error::Dtype { name: "shard_sums", came, wanted: "float64" }.into());
        }
        self.bound.shapes.exactly("shard_sums", &array, &[wanted])?;
        Ok((object, array))
    }
}

/// Turns values into a call.
fn bind(values: Values<'_>, objective: Objective, settings: Settings) -> Result<BoundCall<PolicyLoss>, Error> {
    let (_, advantages) = array_at(&values, ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
    let first = (0..PolicyLoss::LATENTS).find_map(|slot| Some((PolicyLoss::NAMES[slot], array_at(&values, slot)?.1)));
    let (name, like) = first.unwrap_or(("advantages", advantages));
    let latents = first.map(|(_, array)| &array.shape[..]);
    let shapes = Shapes::new(name, &advantages.shape, latents, like.device)?;
    let (rows, numel) = (shapes.row_count() as u64, shapes.numel() as u64);
    BoundCall::new(values, shapes, PolicyLoss { rows, numel, objective, settings, ..PolicyLoss::default() })
}

#[pymethods]
impl PolicyLossCall {
    /// Checks the call. `fields` are tensors and numbers, `settings` the rest, by the names of the operator's
    /// arguments.
    #[new]
    fn checked(py: Python<'_>, fields: &Bound<'_, PyDict>, settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::new(Torch::get(py)?, fields, settings)
    }

    /// Loss and numbers. PyTorch's dispatcher calls this, and has its own autograd. `row_sums`: see `read_sums`.
    #[pyo3(signature = (row_sums = None))]
    fn forward<'py>(&self, py: Python<'py>, row_sums: Option<&Bound<'py, PyAny>>) -> PyResult<[Bound<'py, PyAny>; 2]> {
        let forward = self.forward_with(py, Torch::get(py)?, row_sums, None, false)?;
        Ok([forward.loss, forward.numbers])
    }

    /// The sums of this shard, float64: `[rows, 4]`, then the elements of a row. `eager` is false if PyTorch's
    /// dispatcher calls this: then no tensor may outlive the call (see `workspace`).
    #[pyo3(signature = (eager = true))]
    fn shard_sums<'py>(&self, py: Python<'py>, eager: bool) -> PyResult<Bound<'py, PyAny>> {
        let (torch, rows) = (Torch::get(py)?, self.bound.shapes.row_count());
        let advantages = self.bound.object(py, ADVANTAGES).ok_or(Error::Missing { name: "advantages" })?;
        let len = row_sums_len(rows).ok_or(Error::TooLarge { name: "shard_sums", rows, numel: 4 })?;
        let sums = torch.empty(&advantages, &[len], Dtype::F64)?;
        let (call, row_sums) = (self.bound.call, torch.address(&sums)?);
        let forward = PolicyLossForward { call, row_sums, stage: Stage::SumsAlone, ..PolicyLossForward::default() };
        self.run(py, torch, forward, None, eager)?;
        Ok(sums)
    }
}

/// For NumPy: the loss, and the gradients of the mean and of `log_prob` (flat). `fields`, `settings`: as in
/// `PolicyLossCall`.
#[pyfunction]
pub fn policy_loss_numpy<'py>(
    py: Python<'py>, fields: &Bound<'py, PyDict>, settings: &Bound<'py, PyAny>, threads: usize,
) -> PyResult<Leaves<'py>> {
    let library = Numpy { threads };
    let call = PolicyLossCall::new(&library, fields, settings)?;
    let Forward { loss, numbers, .. } = call.forward_with(py, &library, None, None, false)?;
    let latents = PyDict::new(py);
    for &slot in call.common.saved.iter() {
        latents.set_item(PolicyLoss::NAMES[slot], call.bound.object(py, slot))?;
    }
    let one = library.empty(&loss, &[1], Dtype::F64)?;
    one.call_method1(intern!(py, "fill"), (1.0,))?;
    let PolicyLoss { latents: of_call, vectors, .. } = &call.bound.call;
    let wants_mean = of_call.output().1.is_present() && differentiates_mean(&call.bound.call);
    let wants = [wants_mean, false, vectors.log_prob.is_present()];
    let [mean, _, log_prob] = backward(&library, &one, &numbers, &latents, wants, [None, None])?;
    Ok([Some(loss), mean, log_prob])
}

/// Runs calls of `loss` or of `step_loss`, and remembers those that Python has checked.
#[pyclass(frozen)]
pub struct PolicyLossMemo {
    memo: Memo<PolicyLoss, Common>,
    /// Position of this argument.
    ref_kl_weight: Option<usize>,
    /// A Python function that ties a loss to its leaves, for autograd.
    tie: Py<PyAny>,
    /// The Python class of results.
    result: Py<PyAny>,
}

#[pymethods]
impl PolicyLossMemo {
    /// `names` are those of the function's arguments, in order.
    #[new]
    fn new(names: Vec<String>, tie: Py<PyAny>, result: Py<PyAny>) -> Self {
        let ref_kl_weight = names.iter().position(|name| name == "ref_kl_weight");
        PolicyLossMemo { memo: Memo::new(names), ref_kl_weight, tie, result }
    }

    /// The result of a call whose key is known; None for any other call.
    fn forward<'py>(&self, py: Python<'py>, arguments: &Bound<'py, PyTuple>) -> PyResult<Optional<'py>> {
        let Some(mut read) = Arguments::read(Torch::get(py)?, arguments) else { return Ok(None) };
        // Calls of one key may differ in these two: the key has only whether the weight is 0, and an objective's
        // options.
        let (weight, objective) = (self.ref_kl_weight.and_then(|at| read.number(at)), read.objective);
        let Some((mut bound, common)) = self.memo.find(&mut read) else { return Ok(None) };
        bound.call.settings.ref_kl_weight = weight.unwrap_or(bound.call.settings.ref_kl_weight);
        bound.call.objective = objective.unwrap_or(bound.call.objective);
        self.run(py, &PolicyLossCall { bound, common }, None).map(Some)
    }

    /// Remembers a call that Python has checked, and runs it. `fields`, `settings`: as in `PolicyLossCall`.
    fn learn<'py>(
        &self, py: Python<'py>, arguments: &Bound<'py, PyTuple>, fields: &Bound<'py, PyDict>,
        settings: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let call = PolicyLossCall::checked(py, fields, settings)?;
        self.memo.learn(arguments, fields, &call.bound, call.common.clone())?;
        self.run(py, &call, None)
    }

    /// Runs a call of plain tensors. `row_sums`: see `PolicyLossCall::read_sums`.
    #[pyo3(signature = (call, row_sums = None))]
    fn run<'py>(
        &self, py: Python<'py>, call: &PolicyLossCall, row_sums: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let torch = Torch::get(py)?;
        let leaves = call.bound.leaves(torch, py, call.leaf_slots())?;
        let Forward { loss, numbers, unit_gradients } =
            call.forward_with(py, torch, row_sums, leaves.as_ref(), true)?;
        let layout = call.common.layout.bind(py);
        let loss = match leaves {
            None => loss,
            Some([output, uncond, log_prob]) => {
                let (saved, unsaved) = call.saved(&numbers, &log_prob)?;
                self.tie.bind(py).call1((output, uncond, log_prob, (loss, saved, (layout, unsaved, unit_gradients))))?
            }
        };
        self.result.bind(py).call1((loss, numbers, layout))
    }
}
