//! How a `[rows, numel]` problem is cut into tasks: plain numbers from plain numbers, no memory and no threads.

/// Elements of one task. Large enough to hide the cost of handing it out (128 KiB of float32 takes ~10 us), small
/// enough that two rows of video latents keep every core busy. Results depend on it, so it is a constant: the same
/// chunks, and with them the same bits, for any number of threads.
pub const CHUNK: usize = 32_768;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub rows: usize,
    pub numel: usize,
    /// Tasks of a row; 1 when rows are short.
    pub chunks_per_row: usize,
    /// Rows of a task; 1 when rows are long.
    pub rows_per_task: usize,
}

/// One contiguous stretch inside one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub row: usize,
    /// Where its partial sum goes.
    pub partial: usize,
    /// First element, counted from the start of the whole array.
    pub first: usize,
    pub len: usize,
}

impl Plan {
    pub fn new(rows: usize, numel: usize) -> Plan {
        let chunks_per_row = numel.div_ceil(CHUNK).max(1);
        let rows_per_task = (CHUNK / numel.max(1)).clamp(1, rows.max(1));
        Plan { rows, numel, chunks_per_row, rows_per_task }
    }

    pub fn partials(&self) -> usize {
        self.rows * self.chunks_per_row
    }

    pub fn tasks(&self) -> usize {
        if self.chunks_per_row > 1 { self.partials() } else { self.rows.div_ceil(self.rows_per_task) }
    }

    /// The stretches of one task, in memory order.
    pub fn stretches(&self, task: usize) -> impl Iterator<Item = Stretch> + use<> {
        let plan = *self;
        let (first, count) = if plan.chunks_per_row > 1 {
            (task, 1)
        } else {
            let first = task * plan.rows_per_task;
            (first, plan.rows_per_task.min(plan.rows - first))
        };
        (first..first + count).map(move |partial| {
            let (row, chunk) = (partial / plan.chunks_per_row, partial % plan.chunks_per_row);
            let start = chunk * CHUNK;
            Stretch { row, partial, first: row * plan.numel + start, len: (plan.numel - start).min(CHUNK) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers_everything_once(rows: usize, numel: usize) {
        let plan = Plan::new(rows, numel);
        let mut next = 0;
        let mut partials = Vec::new();
        for stretch in (0..plan.tasks()).flat_map(|task| plan.stretches(task)) {
            assert_eq!(stretch.first, next, "gap or overlap at {stretch:?} of {plan:?}");
            assert_eq!(stretch.first / numel, stretch.row);
            assert_eq!((stretch.first + stretch.len - 1) / numel, stretch.row, "{stretch:?} leaves its row");
            next += stretch.len;
            partials.push(stretch.partial);
        }
        assert_eq!(next, rows * numel);
        assert_eq!(partials, (0..plan.partials()).collect::<Vec<_>>());
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
}
