//! How a `[rows, numel]` problem is cut into tasks: plain numbers from plain numbers, no memory and no threads.

use std::ops::Range;

use crate::error::Error;

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

impl Stretch {
    /// In pieces of at most `len` elements.
    pub fn parts(self, len: usize) -> impl Iterator<Item = Stretch> {
        (0..self.len).step_by(len).map(move |offset| Stretch {
            first: self.first + offset,
            len: len.min(self.len - offset),
            ..self
        })
    }
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
        if self.chunks_per_row > 1 { self.partials() } else { self.row_tasks() }
    }

    /// Rows that a task takes which does all of a row.
    pub fn row_tasks(&self) -> usize {
        self.rows.div_ceil(self.rows_per_task)
    }

    /// The rows of one such task.
    pub fn rows_of(&self, task: usize) -> Range<usize> {
        let first = task * self.rows_per_task;
        first..self.rows.min(first + self.rows_per_task)
    }

    /// The stretches of one row.
    pub fn stretches_of(&self, row: usize) -> impl Iterator<Item = Stretch> + use<> {
        let plan = *self;
        (row * plan.chunks_per_row..(row + 1) * plan.chunks_per_row).map(move |partial| plan.stretch(partial))
    }

    fn stretch(&self, partial: usize) -> Stretch {
        let (row, chunk) = (partial / self.chunks_per_row, partial % self.chunks_per_row);
        let start = chunk * CHUNK;
        Stretch { row, partial, first: row * self.numel + start, len: (self.numel - start).min(CHUNK) }
    }

    /// The stretches of one task, in memory order.
    pub fn stretches(&self, task: usize) -> impl Iterator<Item = Stretch> + use<> {
        let plan = *self;
        let partials = if plan.chunks_per_row > 1 { task..task + 1 } else { plan.rows_of(task) };
        partials.map(move |partial| plan.stretch(partial))
    }
}

/// Whether the forward should form the gradient as well, row by row, while a row is still in the cache: one pass over
/// memory instead of two. Tasks are whole rows then, so there must be enough of them to share, or little to do at all.
/// `row_bytes`: of what the gradient reads of a row.
///
/// The number of threads has no say: a gradient formed ahead is multiplied with the upstream factor in a rounding of
/// its own, and the bits must not depend on the threads.
pub fn gradient_ahead(rows: usize, row_bytes: usize) -> bool {
    let little = rows.saturating_mul(row_bytes) <= 2 * CHUNK * size_of::<f32>();
    row_bytes <= MAX_ROW_BYTES && (rows >= 8 || little)
}

/// Beyond, a row has left the caches before its gradient's turn.
const MAX_ROW_BYTES: usize = 4 << 20;

/// A grid of CUDA blocks over a `[rows, numel]` problem, as `kernels/call.cuh` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridPlan {
    /// Blocks that share a row; 0 when every warp of a block takes a row of its own.
    pub splits: u32,
    pub blocks: u32,
}

impl GridPlan {
    /// Threads of a block, `kThreads`; and its warps.
    pub const THREADS: u32 = 256;
    const WARPS: usize = Self::THREADS as usize / 32;
    /// Longest row that one warp takes, `kShortRow`.
    const SHORT_ROW: usize = 512;
    /// Blocks that a multiprocessor works off in a launch. 2 or 3 run at a time; several times that lets the first that
    /// finish take over from the last, so that the half-empty end of the launch is short. Not yet tuned on a GPU.
    const BLOCKS_PER_MULTIPROCESSOR: usize = 16;
    /// Shortest part of a row: 16 elements a thread, 8 KiB of bfloat16. Below, what a block does once (its sums, its
    /// ticket) costs more than its share of the row.
    const MIN_PART: usize = 4096;

    pub fn new(rows: usize, numel: usize, multiprocessors: u32) -> Result<GridPlan, Error> {
        if numel <= Self::SHORT_ROW {
            return Self::checked(rows, numel, 0, rows.div_ceil(Self::WARPS));
        }
        let wanted = (multiprocessors as usize * Self::BLOCKS_PER_MULTIPROCESSOR).div_ceil(rows.max(1));
        let splits = wanted.min(numel.div_ceil(Self::MIN_PART)).max(1);
        Self::checked(rows, numel, splits, rows.saturating_mul(splits))
    }

    /// One thread a row: a backward that only has the gradient of the log-probs to write.
    pub fn of_rows(rows: usize) -> Result<GridPlan, Error> {
        Self::checked(rows, 0, 0, rows.div_ceil(Self::THREADS as usize))
    }

    /// The first dimension of a grid has at most 2^31 - 1 blocks, and kernels index row vectors with 32 bits.
    fn checked(rows: usize, numel: usize, splits: usize, blocks: usize) -> Result<GridPlan, Error> {
        match (u32::try_from(splits), i32::try_from(blocks.max(rows))) {
            (Ok(splits), Ok(_)) => Ok(GridPlan { splits, blocks: blocks as u32 }),
            _ => Err(Error::Grid { rows, numel }),
        }
    }

    /// Length of a forward's `[rows, max(splits, 1), 4]` partial sums; 0 where each row is one part that is finished
    /// where it was summed.
    pub fn partials(&self, rows: usize, needs_batch_means: bool) -> usize {
        let needed = self.splits > 1 || needs_batch_means;
        if needed { rows * self.splits.max(1) as usize * 4 } else { 0 }
    }
}

#[cfg(test)]
#[path = "../tests/unit/plan.rs"]
mod tests;
