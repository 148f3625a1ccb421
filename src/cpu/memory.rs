//! The arrays of a call in host memory, as slices.

use std::marker::PhantomData;
use std::slice;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::call::{Dtype, Latent, RowVector};

/// An element type. `Pod`: every bit pattern is a value.
pub trait Element: Pod + Default + Send + Sync {
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}
impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// A call whose addresses are all memory of this process.
#[derive(Clone, Copy, Debug)]
pub struct Host<'a, Call>(&'a Call);

impl<'a, Call> Host<'a, Call> {
    /// # Safety
    /// Every address in `call` but 0 is aligned memory of this process, alive for `'a`, as long as the call says
    /// (latents `rows * numel`, row vectors `modulo`). During `'a` nobody writes inputs, nobody else touches outputs.
    pub unsafe fn new(call: &'a Call) -> Self {
        Host(call)
    }

    pub fn part<Part>(self, of: impl FnOnce(&'a Call) -> &'a Part) -> Host<'a, Part> {
        Host(of(self.0))
    }

    /// An input of `len` elements; None where it is absent.
    pub fn view(self, of: impl FnOnce(&'a Call) -> Latent, len: usize) -> Option<View<'a>> {
        let Latent { data, dtype, .. } = of(self.0);
        (data != 0).then_some(View { address: data as usize, dtype, len, memory: PhantomData })
    }

    /// An output of `len` elements; None where it is absent.
    pub fn output(self, of: impl FnOnce(&'a Call) -> Latent, len: usize) -> Option<ViewMut<'a>> {
        let Latent { data, dtype, .. } = of(self.0);
        (data != 0).then_some(ViewMut { address: data as usize, dtype, len, memory: PhantomData })
    }

    /// One element of a row vector; NaN where it is absent.
    #[inline]
    pub fn row(self, of: impl FnOnce(&'a Call) -> &'a RowVector, row: usize) -> f64 {
        let vector = of(self.0);
        if vector.data == 0 {
            return if vector.is_present() { vector.value } else { f64::NAN };
        }
        let (divide, modulo) = (vector.divide as usize, vector.modulo as usize);
        let view = View { address: vector.data as usize, dtype: vector.dtype, len: modulo, memory: PhantomData };
        view.get(if divide == 1 && row < modulo { row } else { row / divide % modulo })
    }
}

impl<Call> std::ops::Deref for Host<'_, Call> {
    type Target = Call;

    fn deref(&self) -> &Call {
        self.0
    }
}

/// `len` contiguous elements of `dtype`, of an input of a `Host` call: readable and unwritten for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    address: usize,
    dtype: Dtype,
    len: usize,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> View<'a> {
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Elements `first .. first + len`; panics on a range outside the view or a type of another dtype.
    pub fn slice<T: Element>(self, first: usize, len: usize) -> &'a [T] {
        assert!(T::DTYPE == self.dtype && first <= self.len && len <= self.len - first);
        // SAFETY: range and type are asserted; `Host::new` got aligned memory, unwritten for 'a; `Pod` takes any bits.
        unsafe { slice::from_raw_parts((self.address as *const T).add(first), len) }
    }

    pub fn get(self, index: usize) -> f64 {
        match self.dtype {
            Dtype::F32 => self.slice::<f32>(index, 1)[0].into(),
            Dtype::F64 => self.slice::<f64>(index, 1)[0],
            Dtype::Bf16 => self.slice::<bf16>(index, 1)[0].to_f64(),
            Dtype::F16 => self.slice::<f16>(index, 1)[0].to_f64(),
        }
    }
}

/// As `View`, of an output: nobody else reads or writes it during `'a`.
#[derive(Debug)]
pub struct ViewMut<'a> {
    address: usize,
    dtype: Dtype,
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl ViewMut<'_> {
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn slice_mut<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: the whole view is borrowed mutably, so no other part of it is in use.
        unsafe { self.part_mut(0, self.len) }
    }

    /// Elements `first .. first + len`, for threads that write disjoint parts; panics as `View::slice` does.
    /// # Safety
    /// Parts that are in use at the same time do not overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part_mut<T: Element>(&self, first: usize, len: usize) -> &mut [T] {
        assert!(T::DTYPE == self.dtype && first <= self.len && len <= self.len - first);
        // SAFETY: range and type are asserted; `Host::new` got aligned memory for 'a that nobody else touches, and the
        // caller keeps parts apart.
        unsafe { slice::from_raw_parts_mut((self.address as *mut T).add(first), len) }
    }
}

#[cfg(test)]
#[path = "../../tests/unit/cpu_memory.rs"]
mod tests;
