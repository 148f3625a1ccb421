//! Views of the caller's arrays, validated once at the boundary and immutable after.
//!
//! Python owns the memory and holds the arrays for the whole call; nothing here allocates or frees. A view carries a
//! dtype, an address and a length, so that the rest of the crate handles no raw pointer. In which memory the address
//! lies is part of the type: the host cannot read a view of a GPU's memory, since that view has no function for it.

use std::marker::PhantomData;
use std::slice;

use crate::cpu::simd::Storage;
use crate::error::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    F64,
}

impl Dtype {
    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64];

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::F64 => "float64",
        }
    }

    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F64 => 8,
        }
    }

    pub fn parse(name: &str) -> Result<Dtype, Error> {
        Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| Error::Option {
            name: "dtype",
            came: name.to_owned(),
            wanted: "float32, bfloat16, float16, float64",
        })
    }
}

/// The bits of a bfloat16.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// The bits of a float16.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub struct F16(pub u16);

/// What arrays hold: memory of `DTYPE` can be read as a slice of it.
///
/// # Safety
/// The type has the size and alignment of `DTYPE`'s elements, and every bit pattern is a value of it.
pub unsafe trait Element: Copy + Default + Send + Sync {
    const DTYPE: Dtype;
}
// SAFETY: f32 is what float32 arrays hold; every bit pattern is valid.
unsafe impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
// SAFETY: as above, for float64.
unsafe impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
// SAFETY: a transparent u16, which is what both half formats are stored as.
unsafe impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
// SAFETY: as above.
unsafe impl Element for F16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// Memory that this process reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Host;

/// Memory of a GPU: only kernels read and write it.
#[derive(Clone, Copy, Debug)]
pub struct Gpu;

/// `len` contiguous elements of `dtype`, readable for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, Space = Host> {
    address: usize,
    dtype: Dtype,
    len: usize,
    memory: PhantomData<(&'a [u8], Space)>,
}

/// As `View`, writable and not aliased.
#[derive(Debug)]
pub struct ViewMut<'a, Space = Host> {
    address: usize,
    dtype: Dtype,
    len: usize,
    memory: PhantomData<(&'a mut [u8], Space)>,
}

fn check(name: &'static str, address: usize, dtype: Dtype, len: usize) -> Result<(), Error> {
    if address == 0 && len > 0 {
        return Err(Error::NoMemory { name, len });
    }
    if !address.is_multiple_of(dtype.size()) {
        return Err(Error::Misaligned { name, address, size: dtype.size() });
    }
    Ok(())
}

impl<Space> View<'_, Space> {
    /// # Safety
    /// The caller holds an array with at least `len` contiguous elements of `dtype` at `address`, in the memory that
    /// `Space` says, and nobody writes to it during `'a`. On a GPU time is that of the stream which the work goes to.
    pub unsafe fn new(name: &'static str, address: usize, dtype: Dtype, len: usize) -> Result<Self, Error> {
        check(name, address, dtype, len)?;
        Ok(View { address, dtype, len, memory: PhantomData })
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl<'a> View<'a> {
    /// Elements `first .. first + len`; panics on a range outside the view or a type of another dtype.
    pub fn slice<T: Element>(self, first: usize, len: usize) -> &'a [T] {
        assert!(T::DTYPE == self.dtype && first <= self.len && len <= self.len - first);
        if len == 0 {
            return &[];
        }
        // SAFETY: in range and of the right type by the assertion; alignment and non-null by `check`; readable and
        // unwritten for 'a by the contract of `new`.
        unsafe { slice::from_raw_parts((self.address as *const T).add(first), len) }
    }

    /// One element as f64; what row vectors are read with.
    pub fn get(self, index: usize) -> f64 {
        match self.dtype {
            Dtype::F32 => self.slice::<f32>(index, 1)[0].into(),
            Dtype::F64 => self.slice::<f64>(index, 1)[0],
            Dtype::Bf16 => self.slice::<Bf16>(index, 1)[0].load(),
            Dtype::F16 => self.slice::<F16>(index, 1)[0].load(),
        }
    }
}

impl View<'_, Gpu> {
    /// What a kernel is given.
    pub fn address(&self) -> usize {
        self.address
    }
}

impl<Space> ViewMut<'_, Space> {
    /// # Safety
    /// As `View::new`, and the caller holds the only access to these elements during `'a`.
    pub unsafe fn new(name: &'static str, address: usize, dtype: Dtype, len: usize) -> Result<Self, Error> {
        check(name, address, dtype, len)?;
        Ok(ViewMut { address, dtype, len, memory: PhantomData })
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl ViewMut<'_, Gpu> {
    pub fn elements(&self) -> usize {
        self.len
    }

    /// What a kernel is given.
    pub fn address(&self) -> usize {
        self.address
    }
}

impl ViewMut<'_> {
    pub fn slice_mut<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: the whole view borrowed mutably is the only part in use.
        unsafe { self.part_mut(0, self.len) }
    }

    /// Elements `first .. first + len`, through a shared reference, for threads that write disjoint parts.
    ///
    /// # Safety
    /// Parts handed out at the same time do not overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut<T: Element>(&self, first: usize, len: usize) -> &mut [T] {
        assert!(T::DTYPE == self.dtype && first <= self.len && len <= self.len - first);
        if len == 0 {
            return &mut [];
        }
        // SAFETY: in range and of the right type by the assertion; alignment and non-null by `check`; exclusive by
        // the contracts of `new` and of this function.
        unsafe { slice::from_raw_parts_mut((self.address as *mut T).add(first), len) }
    }
}

/// A row vector: one number for all rows, or an array that broadcasts to the rows without being expanded. Row r has
/// element `r / divide % modulo`: `[B, S]` rows read `[1, S]` with (1, S), `[B, 1]` with (S, B), one element with (1, 1).
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a, Space = Host> {
    Number(f64),
    Array { view: View<'a, Space>, divide: usize, modulo: usize },
}

impl Rows<'_> {
    #[inline]
    pub fn get(&self, row: usize) -> f64 {
        match *self {
            Rows::Number(value) => value,
            Rows::Array { view, modulo: 1, .. } => view.get(0),
            Rows::Array { view, divide: 1, modulo } if row < modulo => view.get(row),
            Rows::Array { view, divide, modulo } => view.get(row / divide % modulo),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_misaligned_memory_is_refused() {
        // SAFETY: both are refused before anything is read.
        let (null, odd) =
            unsafe { (View::<Host>::new("x", 0, Dtype::F32, 3), View::<Host>::new("x", 6, Dtype::F32, 3)) };
        assert_eq!(null.unwrap_err(), Error::NoMemory { name: "x", len: 3 });
        assert_eq!(odd.unwrap_err(), Error::Misaligned { name: "x", address: 6, size: 4 });
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_range_past_the_end_is_refused() {
        let data = [1.0f32; 4];
        // SAFETY: `data` has four elements.
        let view = unsafe { View::new("x", data.as_ptr() as usize, Dtype::F32, 4) }.unwrap();
        view.slice::<f32>(2, 3);
    }

    #[test]
    fn row_vectors_read_every_dtype_and_broadcast() {
        let (single, half) = ([0.5f32, -2.0], [0x3f00u16, 0xc000]);
        // SAFETY: both arrays have two elements.
        let (single, half) = unsafe {
            (
                View::new("x", single.as_ptr() as usize, Dtype::F32, 2).unwrap(),
                View::new("x", half.as_ptr() as usize, Dtype::Bf16, 2).unwrap(),
            )
        };
        assert_eq!(Rows::Array { view: single, divide: 1, modulo: 2 }.get(1), -2.0);
        assert_eq!(Rows::Array { view: half, divide: 1, modulo: 1 }.get(1), 0.5);
        let of_six =
            |divide, modulo| [0, 1, 2, 3, 4, 5].map(|row| Rows::Array { view: single, divide, modulo }.get(row));
        assert_eq!(of_six(1, 2), [0.5, -2.0, 0.5, -2.0, 0.5, -2.0]);
        assert_eq!(of_six(3, 2), [0.5, 0.5, 0.5, -2.0, -2.0, -2.0]);
        assert_eq!(Rows::Number(0.7).get(9), 0.7);
    }
}
