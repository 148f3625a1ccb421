//! Memory that the blocks of one forward share on a GPU, from PyTorch's allocator.
//!
//! It is freed while the kernel may still run: the allocator gives it to the same stream only, where the next kernel runs
//! later. So the calls of a stream can share their tickets too, which saves a launch of 2 us that fills new ones with 0.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use super::array::{Library, Torch};
use crate::call::Dtype;
use crate::cuda::launch::Target;

/// 32-bit counters of each stream. Every forward leaves them 0.
static TICKETS: Mutex<Option<HashMap<Target, Py<PyAny>>>> = Mutex::new(None);

/// Tensors whose memory a launch uses.
pub struct Workspace<'py> {
    _partials: Bound<'py, PyAny>,
    _tickets: Bound<'py, PyAny>,
    pub partials: u64,
    pub tickets: u64,
}

/// `partials`, `tickets`: how many. The tickets are new ones for a call
/// - that is captured into a CUDA graph: a replay may run on any stream, beside calls that use the kept ones;
/// - inside `torch.compile` (`may_keep` is false): its CUDA-graph trees refuse tensors that outlive a call;
/// - on a stream that PyTorch did not make: the driver may give its handle to a new stream while its last kernel runs.
pub fn workspace<'py>(
    torch: &'static Torch, like: &Bound<'py, PyAny>, target: Target, (partials, tickets): (usize, usize),
    may_keep: bool,
) -> PyResult<Workspace<'py>> {
    let keep = may_keep && !target.is_capturing()? && torch.owns_stream(like.py(), target)?;
    let partials = torch.empty(like, &[partials], Dtype::F32)?;
    let tickets = if keep { kept(torch, like, target, tickets)? } else { torch.tickets(like, tickets)? };
    Ok(Workspace {
        partials: torch.address(&partials)?,
        tickets: torch.address(&tickets)?,
        _partials: partials,
        _tickets: tickets,
    })
}

fn kept<'py>(
    torch: &'static Torch, like: &Bound<'py, PyAny>, target: Target, len: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let py = like.py();
    let find = || {
        let known = TICKETS.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_ref().and_then(|known| known.get(&target)).map(|tickets| tickets.clone_ref(py))
    };
    if let Some(tickets) = find() {
        let tickets = tickets.into_bound(py);
        if tickets.len()? >= len {
            return Ok(tickets);
        }
    }
    // A power of two, so that not every batch size needs new ones.
    let tickets = torch.tickets(like, len.next_power_of_two().max(1024))?;
    let mut known = TICKETS.lock().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(target, tickets.clone().unbind());
    Ok(tickets)
}
