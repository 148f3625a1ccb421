//! Tests of `src/cpu/memory.rs`.

use super::*;

fn host(latent: &Latent) -> Host<'_, Latent> {
    // SAFETY: the tests' arrays outlive the call.
    unsafe { Host::new(latent) }
}

#[test]
#[should_panic(expected = "assertion failed")]
fn a_range_past_the_end_is_refused() {
    let data = [1.0f32; 4];
    let latent = Latent::new(data.as_ptr() as u64, Dtype::F32);
    host(&latent).view(|latent| *latent, 4).unwrap().slice::<f32>(2, 3);
}

#[test]
fn row_vectors_read_every_dtype_and_broadcast() {
    let (single, halves) = ([0.5f32, -2.0], [bf16::from_f32(0.5), bf16::from_f32(-2.0)]);
    let read = |vector: RowVector| {
        // SAFETY: both arrays have two elements and outlive the call.
        let host = unsafe { Host::new(&vector) };
        [0, 1, 2, 3, 4, 5].map(|row| host.row(|vector| vector, row))
    };
    let array = |address: u64, dtype, layout| read(RowVector::array("x", address, dtype, layout, 6).unwrap());
    let (single, halves) = (single.as_ptr() as u64, halves.as_ptr() as u64);
    assert_eq!(array(single, Dtype::F32, (1, 2)), [0.5, -2.0, 0.5, -2.0, 0.5, -2.0]);
    assert_eq!(array(single, Dtype::F32, (3, 2)), [0.5, 0.5, 0.5, -2.0, -2.0, -2.0]);
    assert_eq!(array(halves, Dtype::Bf16, (1, 1)), [0.5; 6]);
    assert_eq!(read(RowVector::number(0.7)), [0.7; 6]);
    assert!(read(RowVector::default())[0].is_nan());
}
