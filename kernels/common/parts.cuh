// How the threads of a grid share [rows, numel], and how blocks that share a row add up their sums.
#pragma once

#include "common/reduce.cuh"

constexpr long long kShortRow = 512;  // the longest row that one warp takes: two iterations of 256 float32

// A contiguous part of one row and its threads: a block, or one warp.
struct Part {
  long long row;
  long long first, count;  // elements; `first` counts from the start of the tensor
  unsigned split;
  int thread, threads;
};

constexpr long long kSplitUnit = 64;  // splits begin at multiples of it: if a row is aligned, all its splits are

__device__ __forceinline__ Part part_of_block(long long row, long long numel, unsigned split, unsigned splits) {
  const long long stretch = ((numel + splits - 1) / splits + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
  Part part;
  part.row = row;
  part.split = split;
  part.first = row * numel + split * stretch;
  const long long left = numel - split * stretch;
  part.count = left < 0 ? 0 : left < stretch ? left : stretch;  // stretches are rounded up: late splits may be empty
  part.thread = threadIdx.x;
  part.threads = kThreads;
  return part;
}

__device__ __forceinline__ Part part_of_thread(long long rows, long long numel, unsigned splits) {
  const unsigned block = blockIdx.x;
  if (splits > 0) return part_of_block(block / splits, numel, block % splits, splits);
  const int thread = threadIdx.x;
  Part part;
  part.row = static_cast<long long>(block) * kWarps + thread / kWarpSize;
  part.split = 0;
  part.first = part.row * numel;
  part.count = part.row < rows ? numel : 0;  // the last block may have warps without a row
  part.thread = thread % kWarpSize;
  part.threads = kWarpSize;
  return part;
}

// The index of the part's row among the rows of the block.
__device__ __forceinline__ int row_in_block(const Part& part) {
  return part.threads == kWarpSize ? static_cast<int>(threadIdx.x) / kWarpSize : 0;
}

// All threads of `count` blocks call this. True in the last block, which may then read what the others wrote before.
// The last block resets the ticket to 0.
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

// Adds up the threads' `sums` of a row in a fixed order: float32 in a block or warp, float64 over the splits. True in
// the last block of a row, where `total` is valid in thread 0 of the part. `s_sums` is shared memory, kWarps * kCount
// values; `partials` [rows, splits, kCount] and `tickets` [rows] are used if splits > 1.
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
