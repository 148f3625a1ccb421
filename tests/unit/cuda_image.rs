//! Tests of `src/cuda/image.rs`.

use super::*;

const fn image(unit: &'static str, capability: u32, is_ptx: bool) -> Image {
    Image { unit, capability, is_ptx, bytes: &[] }
}

const SHIPPED: [Image; 8] = [
    image("a", 80, false),
    image("a", 86, false),
    image("a", 89, false),
    image("a", 90, false),
    image("a", 100, false),
    image("a", 120, false),
    image("a", 80, true),
    image("b", 87, false),
];

fn chosen(unit: &str, capability: u32) -> Option<(u32, bool)> {
    choose(&SHIPPED, unit, capability).map(|image| (image.capability, image.is_ptx))
}

#[test]
fn the_nearest_cubin_of_the_same_major_version() {
    for (capability, wanted) in
        [(80, 80), (86, 86), (87, 86), (88, 86), (89, 89), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)]
    {
        assert_eq!(chosen("a", capability), Some((wanted, false)), "{capability}");
    }
}

#[test]
fn ptx_for_majors_without_a_cubin_and_nothing_below_it() {
    for later in [110, 130, 200] {
        assert_eq!(chosen("a", later), Some((80, true)), "{later}");
    }
    assert_eq!(chosen("a", 75), None);
    assert_eq!(chosen("b", 86), None);
    assert_eq!(chosen("c", 90), None);
}

#[test]
fn what_is_embedded_is_aligned_and_of_its_kind() {
    for image in IMAGES {
        assert!(image.bytes.as_ptr().addr().is_multiple_of(16), "{} {}", image.unit, image.capability);
        assert_eq!(image.bytes.starts_with(b"\x7fELF"), !image.is_ptx);
        assert!(!image.is_ptx || image.bytes.ends_with(&[0]), "the driver reads PTX up to a NUL");
    }
}
