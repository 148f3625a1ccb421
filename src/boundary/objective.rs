//! An objective's settings as Python's objects carry them, and options by name.

use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Density, KlDivisor, LatentReduction, Mask, Objective, ObjectiveKind, Reduction, Sampler, Settings};

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

/// By the names of the operator's schema.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct ObjectiveFields {
    objective: ObjectiveKind,
    kl_mask_threshold: f64,
    clip_low: f64,
    clip_high: f64,
    adv_clip_max: f64,
    mask: Mask,
    kl_divisor: KlDivisor,
    keep_nan_kl: bool,
    per_row_scale: bool,
}

/// By the names of the operator's schema.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct SettingsFields {
    sampler: Sampler,
    density: Density,
    latent_reduction: LatentReduction,
    reduction: Reduction,
    ref_kl_weight: f64,
}

pub fn objective(settings: &Bound<'_, PyAny>) -> PyResult<Objective> {
    let given: ObjectiveFields = settings.extract()?;
    Ok(Objective {
        kl_mask_threshold: given.kl_mask_threshold,
        clip_low: given.clip_low,
        clip_high: given.clip_high,
        adv_clip_max: given.adv_clip_max,
        kind: given.objective,
        mask: given.mask,
        kl_divisor: given.kl_divisor,
        keep_nan_kl: given.keep_nan_kl.into(),
        per_row_scale: given.per_row_scale.into(),
        pad: 0,
    })
}

pub fn settings(settings: &Bound<'_, PyAny>) -> PyResult<Settings> {
    let SettingsFields { sampler, density, latent_reduction, reduction, ref_kl_weight } = settings.extract()?;
    Ok(Settings { ref_kl_weight, sampler, density, latent_reduction, reduction })
}

impl Objective {
    /// What a check of arguments may ask of an objective: everything but its limits.
    pub fn kinds(&self) -> u64 {
        let Objective { kind, mask, kl_divisor, keep_nan_kl, per_row_scale, .. } = *self;
        let digits = [kind as u64, mask as u64, kl_divisor as u64, keep_nan_kl as u64, per_row_scale as u64];
        digits.iter().fold(0, |number, digit| 4 * number + digit)
    }
}

/// What an objective keeps in `_native`, made when it is first used.
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
    /// None of what is no objective, or of one that was never used.
    pub fn of(object: &Bound<'_, PyAny>) -> Option<Objective> {
        let native = object.getattr_opt(intern!(object.py(), "_native")).ok()??;
        native.cast::<NativeObjective>().ok().map(|native| native.get().0)
    }
}
