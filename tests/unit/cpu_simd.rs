//! Tests of `src/cpu/simd.rs`.

use super::*;

fn same(mine: f32, wanted: f32) -> bool {
    mine.to_bits() == wanted.to_bits() || (mine.is_nan() && wanted.is_nan())
}

#[test]
fn every_half_widens_exactly() {
    for bits in 0..=u16::MAX {
        assert!(same(f16_to_f32(bits), f16::from_bits(bits).to_f32()), "f16 {bits:#x}");
        assert!(same(bf16_to_f32(bits), bf16::from_bits(bits).to_f32()), "bf16 {bits:#x}");
    }
}

struct Widen<'a>(&'a [f16; LANES]);
impl Kernel for Widen<'_> {
    type Output = [f32; LANES];
    #[inline(always)]
    fn run<const FMA: bool>(self) -> [f32; LANES] {
        f16::load_lanes::<f32, FMA>(self.0)
    }
}

#[test]
fn lanes_of_halves_widen_exactly() {
    for first in (0..=u16::MAX).step_by(LANES) {
        let halves: [f16; LANES] = std::array::from_fn(|lane| f16::from_bits(first + lane as u16));
        for (lane, mine) in dispatch(Widen(&halves)).into_iter().enumerate() {
            assert!(same(mine, halves[lane].to_f32()), "f16 {:?}", halves[lane]);
        }
    }
}

#[test]
fn narrowing_rounds_as_half_does() {
    // Every half, its neighbours, and the exact midpoints between halves: all ties, both directions.
    let mut checked = 0;
    let mut check = |value: f32| {
        let (mine, wanted) = (f32_to_f16(value), f16::from_f32(value));
        assert!(same(f16_to_f32(mine), wanted.to_f32()), "f16 {value:e}: {mine:#x}");
        let (mine, wanted) = (f32_to_bf16(value), bf16::from_f32(value));
        assert!(same(bf16_to_f32(mine), wanted.to_f32()), "bf16 {value:e}: {mine:#x}");
        checked += 1;
    };
    for bits in 0..=u16::MAX {
        for half_value in [f16_to_f32(bits), bf16_to_f32(bits)] {
            let around = half_value.to_bits();
            for offset in [0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0x1fff] {
                check(f32::from_bits(around.wrapping_add(offset)));
            }
        }
    }
    // A stride through all of float32 that shares no factor with 2^32.
    let mut bits = 0u32;
    for _ in 0..2_000_000 {
        check(f32::from_bits(bits));
        bits = bits.wrapping_add(2_654_435_769);
    }
    assert!(checked > 3_000_000);
}
