//! Memory that the blocks of one forward share on a GPU, from PyTorch's allocator.
//!
//! It is given back while the kernel may still be running: the allocator hands it out again to the same stream only,
//! where whatever comes next runs after it. For the same reason the calls of a stream can share their tickets, which
//! saves filling new ones with zeros: a launch of 2 us beside kernels of 10 us.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use super::array::{Library, Torch};
use crate::call::Dtype;
use crate::cuda::launch::Target;

/// 32-bit counters of a stream, all 0 whenever no forward runs there: kernels leave them so.
static TICKETS: Mutex<Option<HashMap<Target, Py<PyAny>>>> = Mutex::new(None);

/// Tensors whose memory a launch uses.
pub struct Workspace<'py> {
    _partials: Bound<'py, PyAny>,
    _tickets: Bound<'py, PyAny>,
    pub partials: u64,
    pub tickets: u64,
}

/// `lengths`: of the partial sums and of the tickets. `may_keep`: whether a tensor may outlive the call.
///
/// Three calls must not take the kept tickets. One that is captured into a CUDA graph: the graph may be replayed on any
/// stream, beside calls that use them; it gets its own, from the graph's memory, and a fill that is replayed with it. One
/// inside `torch.compile`, whose CUDA-graph trees refuse tensors that stay behind in their memory pool. And one on a
/// stream that is not PyTorch's: when it is destroyed the driver may give its handle to another one, which would run
/// beside the last kernels of the first.
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
    // Kept ones grow by powers of two: no new ones for every batch size.
    let tickets = torch.tickets(like, len.next_power_of_two().max(1024))?;
    let mut known = TICKETS.lock().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(target, tickets.clone().unbind());
    Ok(tickets)
}
