//! Instruction sets, the two arithmetic types, and conversions that the compiler vectorises (`half`'s f16 conversions
//! stay scalar in a loop: 0.93 against 0.23 ms). A kernel has one generic body. `dispatch` calls it in a function that
//! enables an instruction set, and `#[inline(always)]` compiles it there (0.10 against 0.16 ms on [16, 65536] float32).

use std::ops::{Mul, Sub};
use std::sync::OnceLock;

use half::{bf16, f16};

use super::memory::{Element, View, ViewMut};
use crate::plan::Stretch;

/// Elements of one round of a loop: two AVX-512 registers of float32. Four running sums are then eight independent
/// chains, enough for two fused multiply-add units of latency four.
pub const LANES: usize = 32;

/// Elements converted at a time: 3 or 4 float32 buffers of this length fit into a 48 KiB first-level cache.
pub const BLOCK: usize = 2048;

/// The arithmetic type of a kernel: float32 or float64.
pub trait Real: Storage + Sub<Output = Self> + Mul<Output = Self> {
    fn from_f32(value: f32) -> Self;
    fn from_f64(value: f64) -> Self;
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
    /// `self * b + c`, fused only where there is an instruction for it: without one, `mul_add` is a library call.
    fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self;
}

macro_rules! real {
    ($type:ty, $from:ident, $to:ident) => {
        impl Real for $type {
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value as $type
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self {
                if FMA { <$type>::mul_add(self, b, c) } else { self * b + c }
            }
        }

        impl Storage for $type {
            #[inline(always)]
            fn load<F: Real>(self) -> F {
                F::$from(self)
            }
            #[inline(always)]
            fn store<F: Real>(value: F) -> Self {
                value.$to()
            }
            #[inline(always)]
            fn elements<'a>(view: View<'a>, part: Stretch, buffer: &'a mut Buffer<Self>) -> &'a [Self] {
                widen(view, part, buffer)
            }
        }
    };
}
real!(f32, from_f32, to_f32);
real!(f64, from_f64, to_f64);

/// A computation compiled for each instruction set. `run` and all it calls must be `#[inline(always)]`. They must pass
/// no closure to std (`map_or`, `array::from_fn`): it is compiled without the features, and its `mul_add` is a library
/// call (19 times slower in the backward). `FMA`: the processor has fused multiply-adds and, if x86-64, F16C.
pub trait Kernel {
    type Output;
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// Runs `kernel` with the best instructions of this processor.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        fn avx512<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<true>()
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<true>()
        }
        match instruction_set() {
            // SAFETY: `instruction_set` saw these features on this processor.
            InstructionSet::Avx512 => return unsafe { avx512(kernel) },
            // SAFETY: `instruction_set` saw these features on this processor.
            InstructionSet::Avx2 => return unsafe { avx2(kernel) },
            InstructionSet::Baseline => {}
        }
    }
    if cfg!(target_arch = "aarch64") { kernel.run::<true>() } else { kernel.run::<false>() }
}

/// Hides the index of a round of `LANES` elements from LLVM, which would vectorise across rounds instead of lanes:
/// float32 gathered and scattered, `LANES` elements apart, takes 4 times as long.
#[inline(always)]
pub fn one_by_one(at: usize) -> usize {
    std::hint::black_box(at)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    Avx512,
    Avx2,
    Baseline,
}

pub fn instruction_set() -> InstructionSet {
    static SET: OnceLock<InstructionSet> = OnceLock::new();
    *SET.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let fma = is_x86_feature_detected!("fma");
            if avx512 && fma {
                return InstructionSet::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && fma {
                return InstructionSet::Avx2;
            }
        }
        InstructionSet::Baseline
    })
}

// ---- conversions: without branches, and with the same results in a flush-to-zero mode -------------------------------

#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Round to nearest, ties to even; NaN stays a quiet NaN.
#[inline(always)]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) as u16
}

#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = (u32::from(bits) & 0x8000) << 16;
    let magnitude = (u32::from(bits) & 0x7fff) << 13;
    let normal = magnitude + (112 << 23); // exponent bias 15 to 127
    // m 2^-24 as 2^-14 (1 + m / 1024) - 2^-14: no operand is subnormal, so a flush-to-zero mode changes nothing.
    let subnormal = (f32::from_bits(magnitude + 0x3880_0000) - f32::from_bits(0x3880_0000)).to_bits();
    let finite = if magnitude < 0x0080_0000 { subnormal } else { normal };
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if magnitude >= 0x0f80_0000 { special } else { finite })
}

/// Round to nearest, ties to even; overflow to infinity, NaN stays a quiet NaN.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let normal = magnitude.wrapping_add(0x0fff + ((magnitude >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
    // The addition rounds: 0.5 has an ulp of 2^-24, which is the unit of float16 subnormals.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    (sign | if magnitude >= 0x477f_f000 { special } else { finite }) as u16
}

/// `BLOCK` elements, allocated on first use: most latents are read and written in place.
#[derive(Default)]
pub struct Buffer<T>(Vec<T>);

impl<T: Element> Buffer<T> {
    #[inline(always)]
    pub fn first(&mut self, len: usize) -> &mut [T] {
        if self.0.is_empty() {
            self.0.resize(BLOCK, T::default());
        }
        &mut self.0[..len]
    }
}

/// An element type of arrays, converted from and to the arithmetic type.
pub trait Storage: Element {
    fn load<F: Real>(self) -> F;
    fn store<F: Real>(value: F) -> Self;

    #[inline(always)]
    fn load_lanes<F: Real, const FMA: bool>(values: &[Self; LANES]) -> [F; LANES] {
        each_loaded(values)
    }

    /// At most `BLOCK` elements of `view`: the memory itself where it holds `Self`. float32 and float64 also take a
    /// view of another dtype, converted into `buffer`.
    #[inline(always)]
    fn elements<'a>(view: View<'a>, part: Stretch, _: &'a mut Buffer<Self>) -> &'a [Self] {
        view.slice(part.first, part.len)
    }
}

impl Storage for bf16 {
    #[inline(always)]
    fn load<F: Real>(self) -> F {
        F::from_f32(bf16_to_f32(self.to_bits()))
    }
    #[inline(always)]
    fn store<F: Real>(value: F) -> Self {
        bf16::from_bits(f32_to_bf16(value.to_f32()))
    }
}

impl Storage for f16 {
    #[inline(always)]
    fn load<F: Real>(self) -> F {
        F::from_f32(f16_to_f32(self.to_bits()))
    }
    #[inline(always)]
    fn store<F: Real>(value: F) -> Self {
        f16::from_bits(f32_to_f16(value.to_f32()))
    }

    /// F16C: the integers of `f16_to_f32` would take a third of a call with a float16 residual.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn load_lanes<F: Real, const FMA: bool>(values: &[Self; LANES]) -> [F; LANES] {
        if !FMA {
            return each_loaded(values);
        }
        let mut out = [F::default(); LANES];
        for (out, values) in out.chunks_exact_mut(8).zip(values.chunks_exact(8)) {
            // SAFETY: `FMA` says AVX2 with F16C, or AVX-512, which includes it; the chunks have 8 elements.
            let floats = unsafe { eight_halves(values.as_ptr()) };
            for lane in 0..8 {
                out[lane] = F::from_f32(floats[lane]);
            }
        }
        out
    }
}

#[inline(always)]
fn each_loaded<T: Storage, F: Real>(values: &[T; LANES]) -> [F; LANES] {
    let mut out = [F::default(); LANES];
    for lane in 0..LANES {
        out[lane] = values[lane].load();
    }
    out
}

/// Exact, in a flush-to-zero mode too.
/// # Safety
/// Eight elements can be read.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
#[inline]
unsafe fn eight_halves(halves: *const f16) -> [f32; 8] {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let mut out = [0.0; 8];
    // SAFETY: the caller has eight elements to read; both intrinsics take unaligned addresses.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(halves.cast()))) };
    out
}

/// Runs `$body` with `$type` as the element type of `$dtype`.
macro_rules! with_type {
    (@ $of:ty, $type:ident => $body:expr) => {{
        type $type = $of;
        $body
    }};
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            $crate::call::Dtype::F32 => with_type!(@ f32, $type => $body),
            $crate::call::Dtype::Bf16 => with_type!(@ half::bf16, $type => $body),
            $crate::call::Dtype::F16 => with_type!(@ half::f16, $type => $body),
            $crate::call::Dtype::F64 => with_type!(@ f64, $type => $body),
        }
    };
}
pub(crate) use with_type;

#[inline(always)]
fn widen<'a, F: Real>(view: View<'a>, Stretch { first, len, .. }: Stretch, buffer: &'a mut Buffer<F>) -> &'a [F] {
    if view.dtype() == F::DTYPE {
        return view.slice(first, len);
    }
    let buffer = buffer.first(len);
    with_type!(view.dtype(), T => convert(view.slice::<T>(first, len), buffer));
    buffer
}

#[inline(always)]
fn convert<S: Storage, T: Storage>(from: &[S], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::store(from.load::<f64>());
    }
}

/// Writes `scale` times `values` to `out[first..]`.
/// # Safety
/// No other thread touches these elements of `out`.
#[inline(always)]
pub unsafe fn store_scaled<F: Real>(values: &[F], scale: F, out: &ViewMut<'_>, first: usize) {
    // SAFETY: no other thread touches these elements, as the caller promises.
    unsafe { with_type!(out.dtype(), T => scaled(values, scale, out.part_mut::<T>(first, values.len()))) }
}

#[inline(always)]
fn scaled<F: Real, T: Storage>(from: &[F], scale: F, to: &mut [T]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = T::store(scale * from);
    }
}

/// Writes `values` to `out[first..]` in the dtype of `out`.
/// # Safety
/// No other thread touches these elements of `out`.
#[inline(always)]
pub unsafe fn narrow<S: Storage>(values: &[S], out: &ViewMut<'_>, first: usize) {
    // SAFETY: no other thread touches these elements, as the caller promises.
    unsafe { with_type!(out.dtype(), T => convert(values, out.part_mut::<T>(first, values.len()))) }
}

#[cfg(test)]
#[path = "../../tests/unit/cpu_simd.rs"]
mod tests;
