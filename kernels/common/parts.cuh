// How the threads of a grid share `[rows, numel]`: which part of which row, and which block comes last.
#pragma once

#include "common/reduce.cuh"

// Up to here a warp per row is no slower than a block: two steps of 256 float32.
constexpr long long kShortRow = 512;

// A contiguous part of one row, and the threads that work on it together: a block, or one warp.
struct Part {
  long long row;
  long long first, count;  // elements of the row
  unsigned split;
  int thread, threads;
};

// Splits begin at multiples of this many elements, so that all of them are aligned if their row is.
constexpr long long kSplitUnit = 64;

// Split `split` of a row, for all threads of a block.
__device__ __forceinline__ Part part_of_block(long long row, long long numel, unsigned split, unsigned splits) {
  const long long stretch = ((numel + splits - 1) / splits + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
  Part part;
  part.row = row;
  part.split = split;
  part.first = split * stretch;
  // A late split may be empty, since stretches are rounded up.
  const long long left = numel - part.first;
  part.count = left < 0 ? 0 : left < stretch ? left : stretch;
  part.thread = threadIdx.x;
  part.threads = kThreads;
  return part;
}

__device__ __forceinline__ Part part_of_thread(long long rows, long long numel, unsigned splits) {
  const unsigned block = blockIdx.x;
  if (splits > 0) return part_of_block(block / splits, numel, block % splits, splits);
  const int thread = threadIdx.x;
  Part part;
  // Past the last row in the last block: no elements.
  part.row = static_cast<long long>(block) * kWarps + thread / kWarpSize;
  part.split = 0;
  part.first = 0;
  part.count = part.row < rows ? numel : 0;
  part.thread = thread % kWarpSize;
  part.threads = kWarpSize;
  return part;
}

// Counts this block in; true in all threads of the block that came last of `count`, which may then read what the others
// wrote before they were counted. The ticket is 0 again after the last one.
__device__ __forceinline__ bool comes_last(unsigned* ticket, unsigned count) {
  SHARED(unsigned, s_last, 1);
  __syncthreads();  // the whole block has written
  if (threadIdx.x == 0) {
    __threadfence();  // for the block: its writes come before the count
    s_last[0] = atomicInc(ticket, count - 1) == count - 1;
    __threadfence();  // the count comes before what the last block reads
  }
  __syncthreads();
  return s_last[0];
}
