//! One file per operator: checks what memory safety and the formulas need, then calls a backend. The boundary has
//! checked shapes and dtypes, where messages can name the user's arguments.

pub mod policy_loss;
pub mod sde_step;

use crate::call::{Dtype, Latent};
use crate::cuda::launch::Target;
use crate::error::Error;

/// Where a call's memory is; the backend there computes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Host { threads: usize },
    Gpu(Target),
}

fn require(present: bool, name: &'static str) -> Result<(), Error> {
    if present { Ok(()) } else { Err(Error::Missing { name }) }
}

/// Float64 latents are computed in float64, on the CPU alone. Row vectors may be float64.
fn refuse_float64<'a>(latents: impl Iterator<Item = (&'static str, &'a Latent)>) -> Result<(), Error> {
    match latents.into_iter().find(|(_, latent)| latent.dtype == Dtype::F64) {
        Some((name, _)) => Err(Error::Float64OnGpu { name }),
        None => Ok(()),
    }
}
