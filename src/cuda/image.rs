//! The compiled kernels inside this library, and which of them a GPU gets.

/// One `kernels/<unit>.cu`, compiled.
#[derive(Debug)]
pub struct Image {
    pub unit: &'static str,
    /// Compute capability as one number: 90 for 9.0.
    pub capability: u32,
    /// PTX, which the driver compiles when it is loaded; a cubin otherwise.
    pub is_ptx: bool,
    pub bytes: &'static [u8],
}

/// The driver maps a cubin as it lies in memory; `include_bytes!` alone promises no alignment.
#[allow(dead_code)] // a build without kernels embeds nothing
#[repr(C, align(16))]
struct Aligned<Bytes: ?Sized>(Bytes);

#[allow(unused_macros)] // as above
macro_rules! embed {
    ($path:expr) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &IMAGE.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// A cubin runs on its own major version, from its minor on: the nearest one below. PTX runs on everything later, after
/// a compilation that the driver caches on disk.
pub fn choose<'a>(images: &'a [Image], unit: &str, capability: u32) -> Option<&'a Image> {
    let of_unit = || images.iter().filter(|image| image.unit == unit && image.capability <= capability);
    let cubins = of_unit().filter(|image| !image.is_ptx && image.capability / 10 == capability / 10);
    cubins.max_by_key(|image| image.capability).or_else(|| {
        let ptx = of_unit().filter(|image| image.is_ptx);
        ptx.max_by_key(|image| image.capability)
    })
}

#[cfg(test)]
mod tests {
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
}
