//! Settings of an objective and of a call, read from Python's dictionaries. Options come as names.

use pyo3::conversion::FromPyObjectOwned;
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{
    Density, Flag, KlDivisor, LatentReduction, Mask, Objective, ObjectiveKind, Reduction, Sampler, Settings,
};

macro_rules! extract_by_name {
    ($($option:ident $argument:literal,)+) => {
        $(impl<'py> FromPyObject<'_, 'py> for $option {
            type Error = PyErr;

            fn extract(name: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
                Ok($option::parse($argument, name.extract()?)?)
            }
        })+
    };
}
extract_by_name! {
    Sampler "sampler",
    ObjectiveKind "objective",
    Mask "mask",
    KlDivisor "kl_divisor",
    Density "density",
    LatentReduction "latent_reduction",
    Reduction "reduction",
}

/// The setting of this name.
pub fn field<'py, T: FromPyObjectOwned<'py>>(settings: &Bound<'py, PyAny>, name: &str) -> PyResult<T> {
    settings.get_item(name)?.extract().map_err(Into::into)
}

fn flag(settings: &Bound<'_, PyAny>, name: &str) -> PyResult<Flag> {
    field::<bool>(settings, name).map(Flag::from)
}

pub fn objective(settings: &Bound<'_, PyAny>) -> PyResult<Objective> {
    Ok(Objective {
        kl_mask_threshold: field(settings, "kl_mask_threshold")?,
        clip_low: field(settings, "clip_low")?,
        clip_high: field(settings, "clip_high")?,
        adv_clip_max: field(settings, "adv_clip_max")?,
        kind: field(settings, "objective")?,
        mask: field(settings, "mask")?,
        kl_divisor: field(settings, "kl_divisor")?,
        keep_nan_kl: flag(settings, "keep_nan_kl")?,
        per_row_scale: flag(settings, "per_row_scale")?,
        pad: 0,
    })
}

pub fn settings(settings: &Bound<'_, PyAny>) -> PyResult<Settings> {
    Ok(Settings {
        ref_kl_weight: field(settings, "ref_kl_weight")?,
        sampler: field(settings, "sampler")?,
        density: field(settings, "density")?,
        latent_reduction: field(settings, "latent_reduction")?,
        reduction: field(settings, "reduction")?,
    })
}

impl Objective {
    /// One number for everything that the checks read of an objective. They do not read its limits.
    pub fn kinds(&self) -> u64 {
        let Objective { kind, mask, kl_divisor, keep_nan_kl, per_row_scale, .. } = *self;
        let digits = [kind as u64, mask as u64, kl_divisor as u64, keep_nan_kl as u64, per_row_scale as u64];
        digits.iter().fold(0, |number, digit| 4 * number + digit)
    }
}

/// The attribute `_native` of a Python objective: its settings, converted when it is first used.
#[pyclass(frozen, name = "Objective")]
pub struct NativeObjective(Objective);

#[pymethods]
impl NativeObjective {
    #[new]
    fn new(settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        objective(settings).map(NativeObjective)
    }
}

impl NativeObjective {
    /// The settings of an objective; None if `object` is not one, or is one that has not been used.
    pub fn of(object: &Bound<'_, PyAny>) -> Option<Objective> {
        let native = object.getattr_opt(intern!(object.py(), "_native")).ok()??;
        native.cast::<NativeObjective>().ok().map(|native| native.get().0)
    }
}
