//! Memory that the blocks of one forward share on a GPU, from PyTorch's allocator.
//!
//! It is freed as soon as the kernel is launched. This is safe, because the allocator gives it only to later work of
//! the same stream, which runs after the kernel. For the same reason all calls of a stream can use the same tickets,
//! which saves a launch of 2 us that would fill new ones with 0.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use super::array::{Library, Torch};
use crate::call::Dtype;
use crate::cuda::launch::Target;

/// The tickets of each stream: 32-bit counters, which every forward leaves 0.
static TICKETS: Mutex<Option<HashMap<Target, Py<PyAny>>>> = Mutex::new(None);

/// Addresses for a launch, with the tensors whose memory they are.
pub struct Workspace<'py> {
    _partials: Bound<'py, PyAny>,
    _tickets: Bound<'py, PyAny>,
    pub partials: u64,
    pub tickets: u64,
}

/// Memory for these numbers of partials and tickets. A call gets the kept tickets of its stream, but new ones
/// - if it is captured into a CUDA graph: a replay may run on any stream, beside calls that use the kept ones;
/// - inside `torch.compile` (`may_keep` is false): its CUDA-graph trees refuse tensors that outlive a call;
/// - on a stream that PyTorch did not make: when it is destroyed, the driver may give its handle to a new stream while
///   its last kernel still runs.
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
    // The number is rounded up to a power of two, so that few batch sizes need new tickets.
    let tickets = torch.tickets(like, len.next_power_of_two().max(1024))?;
    let mut known = TICKETS.lock().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(target, tickets.clone().unbind());
    Ok(tickets)
}
