//! Tests of `src/boundary/array.rs`.

use super::row_stride;

#[test]
fn row_vectors_broadcast_without_being_expanded() {
    for (shape, rows, wanted) in [
        (&[][..], &[4, 3][..], Some((1, 1))),
        (&[4, 3], &[4, 3], Some((1, 12))),
        (&[1, 3], &[4, 3], Some((1, 3))),
        (&[4, 1], &[4, 3], Some((3, 4))),
        (&[4, 1, 1, 1], &[4], Some((1, 4))),
        (&[1, 1], &[4, 3], Some((1, 1))),
        (&[2, 1, 5], &[2, 3, 5], None),
        (&[1, 3, 5], &[2, 3, 5], Some((1, 15))),
        (&[2, 3, 1], &[2, 3, 5], Some((5, 6))),
        (&[3], &[4], None),
        (&[3], &[4, 3], None),
        (&[4, 2], &[4], None),
        (&[1, 1], &[1, 1], Some((1, 1))),
    ] {
        assert_eq!(row_stride(shape, rows), wanted, "{shape:?} for {rows:?}");
    }
}

/// Every index that is formed for a row is that of NumPy's broadcasting.
#[test]
fn every_row_reads_its_own_element() {
    for rows in [[2, 3, 4], [1, 3, 4], [2, 1, 4], [2, 3, 1]] {
        for mask in 0..8usize {
            let shape: Vec<usize> = (0..3).map(|at| if mask >> at & 1 == 1 { rows[at] } else { 1 }).collect();
            let Some((divide, modulo)) = row_stride(&shape, &rows) else { continue };
            for row in 0..rows.iter().product() {
                let at = [row / (rows[1] * rows[2]), row / rows[2] % rows[1], row % rows[2]];
                let wanted = (0..3).fold(0, |index, axis| index * shape[axis] + at[axis] % shape[axis]);
                assert_eq!(row / divide % modulo, wanted, "row {row} of {rows:?}, {shape:?}");
            }
        }
    }
}
