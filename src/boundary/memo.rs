//! Calls whose metadata has been checked before are not checked again.
//!
//! A key holds exactly what `flowdppo_ops._checks` reads: types, dtypes, shapes, devices, options, and whether a number
//! is 0. Calls of one key read the same arguments; they differ in addresses, numbers and the limits of the objective.

use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyString, PyTuple};

use super::array::{Device, Library, Torch};
use super::bind::{BoundCall, Fields, Shapes, Value, Values};
use super::objective::NativeObjective;
use crate::call::Objective;

/// Calls that a memo keeps. Each shape of a batch has its own key; a training run has a handful.
const CAPACITY: usize = 512;

/// Remembers checked calls of one public function. `Common` is what the calls of one key share beside the call itself.
pub struct Memo<C, Common> {
    /// Names of the function's arguments, in order.
    names: Vec<String>,
    /// In the order in which they were learnt; the search starts with the last.
    known: Mutex<Vec<Arc<Known<C, Common>>>>,
}

struct Known<C, Common> {
    key: Vec<u64>,
    /// The arguments that the call reads: position of each in `C::NAMES` and among the arguments.
    read: Vec<(usize, usize)>,
    call: C,
    shapes: Arc<Shapes>,
    common: Common,
}

impl<C: Fields, Common: Clone> Memo<C, Common> {
    pub fn new(names: Vec<String>) -> Self {
        Memo { names, known: Mutex::default() }
    }

    /// The call of these arguments, if one like it has been checked before.
    pub fn find(&self, arguments: &mut Arguments<'_>) -> Option<(BoundCall<C>, Common)> {
        let calls = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = calls.iter().rev().find(|known| known.key == arguments.key)?.clone();
        drop(calls);
        let slot = |at| known.read.iter().find(|(_, argument)| *argument == at).map(|(slot, _)| *slot);
        let values = arguments.values.drain(..).filter_map(|(at, value)| Some((slot(at)?, value))).collect();
        Some((BoundCall::like(known.call, known.shapes.clone(), values), known.common.clone()))
    }

    /// Remembers a call that Python has checked. It remembers nothing if the checks replaced an argument, as they do
    /// with a row vector that has to be expanded.
    pub fn learn(
        &self, arguments: &Bound<'_, PyTuple>, fields: &Bound<'_, PyDict>, bound: &BoundCall<C>, common: Common,
    ) -> PyResult<()> {
        let Some(key) = Arguments::read(Torch::get(arguments.py())?, arguments).map(|read| read.key) else {
            return Ok(());
        };
        let mut read = Vec::new();
        for (slot, name) in C::NAMES.iter().enumerate() {
            let Some(field) = fields.get_item(name)?.filter(|field| !field.is_none()) else { continue };
            let argument = self.names.iter().position(|argument| argument == name);
            match argument {
                Some(at) if arguments.get_item(at)?.is(&field) => read.push((slot, at)),
                _ => return Ok(()),
            }
        }
        let known = Known { key, read, call: bound.call, shapes: bound.shapes.clone(), common };
        let mut calls = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() >= CAPACITY {
            calls.clear();
        }
        calls.push(known.into());
        Ok(())
    }
}

/// Whether an environment variable is set that makes `flowdppo_ops._calls` handle a call in another way. Asking
/// Python's `os.environ` would take a tenth of a small call; `std::env::var_os` takes 1.5 us longer than `getenv`.
fn is_variable_set(_: Python<'_>) -> bool {
    unsafe extern "C" {
        fn getenv(name: *const c_char) -> *const c_char;
    }
    const VARIABLES: [&CStr; 2] = [c"FLOWDPPO_OPS_BACKEND", c"FLOWDPPO_OPS_CHECK"];
    // SAFETY: the names end with 0, and only the null pointer is told from others. The GIL is held here, and Python
    // sets variables with the GIL held.
    VARIABLES.iter().any(|name| !unsafe { getenv(name.as_ptr()) }.is_null())
}

/// The arguments of a public function, each read once.
pub struct Arguments<'py> {
    /// The numbers and arrays among them, by position.
    pub values: Values<'py>,
    pub objective: Option<Objective>,
    key: Vec<u64>,
}

impl<'py> Arguments<'py> {
    /// Reads all arguments. None, so that Python checks the call, if an argument has no key (a process group, a
    /// generator, a subclass of `Tensor`), a dispatch mode is active, or an environment variable is set.
    pub fn read(torch: &'static Torch, arguments: &Bound<'py, PyTuple>) -> Option<Arguments<'py>> {
        if is_variable_set(arguments.py()) || torch.is_watched(arguments.py()) {
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

    /// Adds the argument's part of the key; returns its value, if it is a number or an array.
    fn one(&mut self, torch: &'static Torch, argument: Bound<'py, PyAny>) -> Option<Option<Value<'py>>> {
        let key = &mut self.key;
        if argument.is_none() {
            key.push(0);
        } else if torch.is_plain(&argument) {
            // Python's checks will raise this error with the argument's name.
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

    /// The argument at this position, if it is a number.
    pub fn number(&self, at: usize) -> Option<f64> {
        self.values.iter().find_map(|(position, value)| match value {
            Value::Number(number) if *position == at => Some(*number),
            _ => None,
        })
    }
}
