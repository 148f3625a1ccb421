//! The compiled kernels inside this library, and which of them a GPU gets.

/// `kernels/<unit>.cu`, compiled for one architecture.
#[derive(Debug)]
pub struct Image {
    pub unit: &'static str,
    /// As one number: 90 for 9.0.
    pub capability: u32,
    /// PTX, which the driver compiles as it loads it; else a cubin.
    pub is_ptx: bool,
    pub bytes: &'static [u8],
}

/// The driver reads a cubin in place, and `include_bytes!` promises no alignment.
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

/// The cubin of the same major version with the highest minor version up to the GPU's. Else PTX, which runs on every
/// later GPU; the driver compiles it and caches the result on disk.
pub fn choose<'a>(images: &'a [Image], unit: &str, capability: u32) -> Option<&'a Image> {
    let of_unit = || images.iter().filter(|image| image.unit == unit && image.capability <= capability);
    let cubins = of_unit().filter(|image| !image.is_ptx && image.capability / 10 == capability / 10);
    cubins.max_by_key(|image| image.capability).or_else(|| {
        let ptx = of_unit().filter(|image| image.is_ptx);
        ptx.max_by_key(|image| image.capability)
    })
}

#[cfg(test)]
#[path = "../../tests/unit/cuda_image.rs"]
mod tests;
