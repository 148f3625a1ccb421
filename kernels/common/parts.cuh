// How the threads of a grid share `[rows, numel]`: which part of which row, and which block comes last.
#pragma once

#include "common/reduce.cuh"

// Up to here a warp per row is no slower than a block: two steps of 256 float32.
constexpr long long kShortRow = 512;

// A contiguous part of one row, and the threads that work on it together: a block, or one warp.
struct Part {
  long long row;
  long long first, count;  // elements, the first by its number in the whole tensor
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
  part.first = row * numel + split * stretch;
  // A late split may be empty, since stretches are rounded up.
  const long long left = numel - split * stretch;
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
  part.first = part.row * numel;
  part.count = part.row < rows ? numel : 0;
  part.thread = thread % kWarpSize;
  part.threads = kWarpSize;
  return part;
}

// Which of the rows that a block has.
__device__ __forceinline__ int row_in_block(const Part& part) {
  return part.threads == kWarpSize ? static_cast<int>(threadIdx.x) / kWarpSize : 0;
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

// Adds up what the threads of a row have: in float32 over a block, in float64 over the splits, in one fixed order.
// False in blocks that do not come last of their row; else `total` is valid in the first thread of the part. `s_sums`:
// shared memory for kWarps * kCount values. `partials` [rows, splits, kCount] and `tickets` [rows] where splits > 1.
template <int kCount>
__device__ __forceinline__ bool sum_row(const Part& part, unsigned splits, float (&sums)[kCount], float* s_sums,
                                        float* partials, unsigned* tickets, double (&total)[kCount]) {
  if (splits == 0) {
    warp_reduce(sums);
  } else {
    block_reduce(sums, s_sums);
  }
  if (splits <= 1) {
    if (part.thread == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] = sums[i];
    }
    return true;
  }
  float* of_row = partials + part.row * splits * kCount;
  if (part.thread == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_row[part.split * kCount + i] = sums[i];
  }
  if (!comes_last(tickets + part.row, splits)) return false;
  // A thread of the first warp takes every 32nd split, then a tree.
  if (part.thread < kWarpSize) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[i] = 0.0;
#pragma unroll 1
    for (unsigned split = part.thread; split < splits; split += kWarpSize) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += __ldcg(of_row + split * kCount + i);
    }
    warp_reduce(total);
  }
  return true;
}
