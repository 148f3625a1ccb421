//! Tests of `src/plan.rs`.

use super::*;

fn covers_everything_once(rows: usize, numel: usize) {
    let plan = Plan::new(rows, numel);
    let mut next = 0;
    for stretch in (0..plan.tasks()).flat_map(|task| plan.stretches(task)) {
        assert_eq!(stretch.first, next, "gap or overlap at {stretch:?} of {plan:?}");
        assert_eq!(stretch.first / numel, stretch.row);
        assert_eq!((stretch.first + stretch.len - 1) / numel, stretch.row, "{stretch:?} leaves its row");
        next += stretch.len;
    }
    assert_eq!(next, rows * numel);
}

#[test]
fn every_element_belongs_to_exactly_one_stretch() {
    for rows in [1, 2, 3, 16, 1000] {
        for numel in [1, 7, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5] {
            covers_everything_once(rows, numel);
        }
    }
}

#[test]
fn tasks_of_whole_rows_cover_the_same_stretches() {
    for (rows, numel) in [(1, 1), (5, 7), (1000, 64), (3, 2 * CHUNK + 5)] {
        let plan = Plan::new(rows, numel);
        let by_row = (0..plan.row_tasks()).flat_map(|task| plan.rows_of(task)).flat_map(|row| plan.stretches_of(row));
        assert!(by_row.eq((0..plan.tasks()).flat_map(|task| plan.stretches(task))));
    }
}

#[test]
fn short_rows_share_a_task_and_long_rows_are_split() {
    assert_eq!(Plan::new(1_000_000, 1).tasks(), 1_000_000usize.div_ceil(CHUNK));
    assert_eq!(Plan::new(16, 65_536).tasks(), 32);
    assert_eq!(Plan::new(2, 2_096_640).tasks(), 128);
}

#[test]
fn element_counts_beyond_32_bits() {
    let plan = Plan::new(3, 1 << 33);
    let last = plan.stretches(plan.tasks() - 1).last().unwrap();
    assert_eq!(last.first + last.len, 3usize << 33);
}

const H200: u32 = 132;

#[test]
fn a_grid_fills_the_chip_several_times_but_not_with_crumbs() {
    for rows in [1, 2, 16, 100, 3000] {
        for numel in [513, 4096, 4097, 65_536, 2_419_200, 1 << 33] {
            let plan = GridPlan::new(rows, numel, H200).unwrap();
            assert_eq!(plan.blocks as usize, rows * plan.splits as usize);
            let part = numel / plan.splits as usize;
            assert!(plan.splits == 1 || part >= GridPlan::MIN_PART / 2, "{rows} x {numel}: {plan:?}");
            let fills = plan.blocks >= 4 * H200;
            assert!(fills || part <= GridPlan::MIN_PART, "{rows} x {numel}: {plan:?} leaves multiprocessors idle");
        }
    }
}

#[test]
fn a_warp_takes_a_short_row() {
    assert_eq!(GridPlan::new(1_000_000, 512, H200), Ok(GridPlan { splits: 0, blocks: 125_000 }));
    assert_eq!(GridPlan::new(9, 0, H200), Ok(GridPlan { splits: 0, blocks: 2 }));
    assert_eq!(GridPlan::new(1_000_000, 513, H200), Ok(GridPlan { splits: 1, blocks: 1_000_000 }));
    assert_eq!(GridPlan::of_rows(257), Ok(GridPlan { splits: 0, blocks: 2 }));
}

#[test]
fn only_what_waits_for_others_needs_partial_sums() {
    let split = GridPlan::new(2, 1 << 20, H200).unwrap();
    assert_eq!(split.partials(2, false), 2 * split.splits as usize * 4);
    let whole = GridPlan::new(9, 64, H200).unwrap();
    assert_eq!((whole.partials(9, false), whole.partials(9, true)), (0, 36));
}

#[test]
fn a_grid_too_large_is_refused() {
    let rows = 1 << 31;
    assert_eq!(GridPlan::new(rows, 600, H200), Err(Error::Grid { rows, numel: 600 }));
    assert!(GridPlan::new(rows, 600, 1).is_err());
    assert!(GridPlan::new(rows - 1, 600, H200).is_ok());
    assert_eq!(GridPlan::new(rows, 1, H200), Err(Error::Grid { rows, numel: 1 }));
}
