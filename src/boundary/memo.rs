//! Calls whose metadata has been seen: what Python's checks proved of them is not proved again.
//!
//! The checks of `flowdppo_ops._checks` look at types, dtypes, shapes, devices and options, and at numbers only for
//! being 0. A key of exactly these stands for one outcome: which of the arguments are read. After a model's forward that
//! is most of why a small call takes half of what it took.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyString, PyTuple};

use super::array::{Array, Device, Library, Torch};
use super::objective::NativeObjective;
use crate::call::Objective;

/// One argument of a public function.
pub enum Value<'py> {
    Number(f64),
    /// The object whose memory is described.
    Array(Bound<'py, PyAny>, Array),
}

/// What a call of this key reads.
pub struct Recipe<Settings> {
    /// Positions in the table of fields, and in the arguments.
    pub read: Vec<(usize, usize)>,
    pub settings: Settings,
}

/// Arguments, each read once.
pub struct Arguments<'py> {
    /// The numbers and arrays among them, by position.
    pub values: Vec<(usize, Value<'py>)>,
    pub objective: Option<Objective>,
    key: Vec<u64>,
}

/// A bound on what is kept; every shape of a batch has a key, and a run has a handful.
const MOST: usize = 512;

pub struct Memo<Settings>(Mutex<HashMap<Vec<u64>, std::sync::Arc<Recipe<Settings>>>>);

impl<Settings> Default for Memo<Settings> {
    fn default() -> Self {
        Memo(Mutex::default())
    }
}

impl<Settings> Memo<Settings> {
    pub fn find(&self, arguments: &Arguments<'_>) -> Option<std::sync::Arc<Recipe<Settings>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&arguments.key).cloned()
    }

    pub fn learn(&self, arguments: Arguments<'_>, recipe: Recipe<Settings>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(arguments.key, recipe.into());
    }
}

impl<'py> Arguments<'py> {
    /// None where an argument is of a kind that has no key (a process group, a generator, a tensor of a subclass), where
    /// somebody watches the dispatcher, or where an environment variable asks for more: Python looks at those calls.
    pub fn read(torch: &'static Torch, arguments: &Bound<'py, PyTuple>) -> Option<Arguments<'py>> {
        if super::environment::asks_for_more() || torch.is_watched(arguments.py()) {
            return None;
        }
        let mut read = Arguments { values: Vec::with_capacity(8), objective: None, key: Vec::with_capacity(64) };
        for (at, argument) in arguments.iter().enumerate() {
            if let Some(value) = read.one(torch, argument)? {
                read.values.push((at, value));
            }
        }
        Some(read)
    }

    /// Of the argument: its value, after its part of the key.
    fn one(&mut self, torch: &'static Torch, argument: Bound<'py, PyAny>) -> Option<Option<Value<'py>>> {
        let key = &mut self.key;
        if argument.is_none() {
            key.push(0);
        } else if torch.is_plain(&argument) {
            // Whatever fails here fails in the checks as well, with the argument's name.
            let (tensor, array) = torch.read("an argument", &argument).ok()?;
            let device = match array.device {
                Device::Cpu => 0,
                Device::Cuda(index) => index as u64 + 1,
            };
            key.push(1 | (array.dtype as u64) << 8 | (array.shape.len() as u64) << 16 | device << 32);
            key.extend(array.shape.iter().map(|&dim| dim as u64));
            return Some(Some(Value::Array(tensor, array)));
        } else if argument.is_exact_instance_of::<PyFloat>() {
            let number: f64 = argument.extract().ok()?;
            key.push(2 | u64::from(number == 0.0) << 8);
            return Some(Some(Value::Number(number)));
        } else if let Ok(text) = argument.cast_exact::<PyString>() {
            let text = text.to_str().ok()?.as_bytes();
            key.push(3 | (text.len() as u64) << 8);
            key.extend(text.chunks(8).map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            }));
        } else if argument.is_exact_instance_of::<PyBool>() {
            key.push(4 | u64::from(argument.is_truthy().ok()?) << 8);
        } else if argument.is_exact_instance_of::<PyInt>() {
            let number: i64 = argument.extract().ok()?;
            key.extend([5, number.cast_unsigned()]);
            return Some(Some(Value::Number(number as f64)));
        } else if let Some(dtype) = torch.dtype(&argument) {
            key.push(6 | (dtype as u64) << 8);
        } else {
            let objective = NativeObjective::of(&argument)?;
            key.push(7 | objective.kinds() << 8);
            self.objective = Some(objective);
        }
        Some(None)
    }

    /// The recipe for reading `fields` again out of arguments like these; None where a field is not simply one of the
    /// arguments (a row vector that was written out, say). `names`: of the arguments; `slots`: of all fields.
    pub fn recipe<Settings>(
        names: &[String],
        arguments: &Bound<'_, PyTuple>,
        slots: impl Iterator<Item = &'static str>,
        fields: &Bound<'_, PyDict>,
        settings: Settings,
    ) -> PyResult<Option<Recipe<Settings>>> {
        let mut read = Vec::new();
        for (slot, name) in slots.enumerate() {
            let Some(field) = fields.get_item(name)?.filter(|field| !field.is_none()) else { continue };
            let Some(at) = names.iter().position(|argument| argument == name) else { return Ok(None) };
            if !arguments.get_item(at)?.is(&field) {
                return Ok(None);
            }
            read.push((slot, at));
        }
        Ok(Some(Recipe { read, settings }))
    }
}
