//! How a `[rows, numel]` problem is cut into CPU tasks and CUDA blocks: arithmetic on sizes alone.

use std::ops::Range;

use crate::error::Error;

/// Elements of one task: enough to hide the cost of handing it out (128 KiB of float32 takes ~10 us), few enough that
/// two rows of video latents keep every core busy. A constant: the bits of results depend on it, not on the threads.
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

/// Contiguous elements of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub row: usize,
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

    pub fn tasks(&self) -> usize {
        if self.chunks_per_row > 1 { self.rows * self.chunks_per_row } else { self.row_tasks() }
    }

    /// Number of tasks of whole rows, `rows_of(task)` each.
    pub fn row_tasks(&self) -> usize {
        self.rows.div_ceil(self.rows_per_task)
    }

    pub fn rows_of(&self, task: usize) -> Range<usize> {
        let first = task * self.rows_per_task;
        first..self.rows.min(first + self.rows_per_task)
    }

    pub fn stretches_of(&self, row: usize) -> impl Iterator<Item = Stretch> + use<> {
        let plan = *self;
        (row * plan.chunks_per_row..(row + 1) * plan.chunks_per_row).map(move |index| plan.stretch(index))
    }

    /// The stretch at this position in memory order.
    fn stretch(&self, index: usize) -> Stretch {
        let (row, chunk) = (index / self.chunks_per_row, index % self.chunks_per_row);
        let start = chunk * CHUNK;
        Stretch { row, first: row * self.numel + start, len: (self.numel - start).min(CHUNK) }
    }

    pub fn stretches(&self, task: usize) -> impl Iterator<Item = Stretch> + use<> {
        let plan = *self;
        let indices = if plan.chunks_per_row > 1 { task..task + 1 } else { plan.rows_of(task) };
        indices.map(move |index| plan.stretch(index))
    }
}

/// Whether the forward should also write the gradient, row by row, while a row is in the cache: that is one pass over
/// memory instead of two. `row_bytes` is what the gradient reads of a row. Tasks are whole rows, so there must be
/// enough rows to occupy the threads, or little to do. The answer must not depend on the number of threads: a gradient
/// that is multiplied by `grad_loss` afterwards is rounded once more, and bits must not depend on threads.
pub fn gradient_in_forward(rows: usize, row_bytes: usize) -> bool {
    let little = rows.saturating_mul(row_bytes) <= 2 * CHUNK * size_of::<f32>();
    row_bytes <= MAX_ROW_BYTES && (rows >= 8 || little)
}

/// A longer row has left the caches when its gradient is due.
const MAX_ROW_BYTES: usize = 4 << 20;

/// A grid of CUDA blocks over a `[rows, numel]` problem, as `kernels/call.cuh` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridPlan {
    /// Blocks that share a row. 0: a warp or, in `of_rows`, a thread takes a row.
    pub splits: u32,
    pub blocks: u32,
}

impl GridPlan {
    /// Threads of a block, `kThreads`.
    pub const THREADS: u32 = 256;
    const WARPS: usize = Self::THREADS as usize / 32;
    /// Longest row that one warp takes, `kShortRow`.
    const SHORT_ROW: usize = 512;
    /// Blocks of a launch per multiprocessor. 2 or 3 run at a time; with more to come, the end of the launch, when some
    /// multiprocessors idle, is a smaller share of it. Not yet tuned on a GPU.
    const BLOCKS_PER_MULTIPROCESSOR: usize = 16;
    /// Shortest part of a row, 16 elements a thread: below, a block's own cost (its sums, its ticket) outweighs it.
    const MIN_PART: usize = 4096;

    pub fn new(rows: usize, numel: usize, multiprocessors: u32) -> Result<GridPlan, Error> {
        if numel <= Self::SHORT_ROW {
            return Self::checked(rows, numel, 0, rows.div_ceil(Self::WARPS));
        }
        let wanted = (multiprocessors as usize * Self::BLOCKS_PER_MULTIPROCESSOR).div_ceil(rows.max(1));
        let splits = wanted.min(numel.div_ceil(Self::MIN_PART)).max(1);
        Self::checked(rows, numel, splits, rows.saturating_mul(splits))
    }

    /// One thread a row, for a backward that writes only the gradient of the log-probs.
    pub fn of_rows(rows: usize) -> Result<GridPlan, Error> {
        Self::checked(rows, 0, 0, rows.div_ceil(Self::THREADS as usize))
    }

    /// CUDA limits a grid to 2^31 - 1 blocks, and kernels index row vectors with 32 bits.
    fn checked(rows: usize, numel: usize, splits: usize, blocks: usize) -> Result<GridPlan, Error> {
        match (u32::try_from(splits), i32::try_from(blocks.max(rows))) {
            (Ok(splits), Ok(_)) => Ok(GridPlan { splits, blocks: blocks as u32 }),
            _ => Err(Error::Grid { rows, numel }),
        }
    }

    /// Length of a forward's `[rows, max(splits, 1), 4]` partial sums; 0 where no block needs another's.
    pub fn partials(&self, rows: usize, needs_batch_means: bool) -> usize {
        let needed = self.splits > 1 || needs_batch_means;
        if needed { rows * self.splits.max(1) as usize * 4 } else { 0 }
    }
}

#[cfg(test)]
#[path = "../tests/unit/plan.rs"]
mod tests;
