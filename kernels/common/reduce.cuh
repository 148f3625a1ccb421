// Reductions over a warp and over a block, in one fixed order, so that the same values give the same bits.
//
// All threads of the warp, or of the block, take part: no early return before them.
#pragma once

#include "common/numeric.cuh"

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize, "the first warp reduces one value of each warp");

// What a reduction does with two values. Sums start at 0.
struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct NanMax {
  __device__ __forceinline__ float operator()(float a, float b) const { return nan_max(a, b); }
};

// A butterfly: every lane ends with the same value. The loop over distances stays one: a shuffle after a branch takes
// ~15 instructions (the compiler adds a path for lanes that have parted), and unrolled they were half of all code.
template <class T, int kCount, class Combine = Add>
__device__ __forceinline__ void warp_reduce(T (&values)[kCount], Combine combine = {}) {
#pragma unroll 1
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], distance));
  }
}

// Over the block; valid in all lanes of warp 0, the other warps keep what their own warp has. `s_values` is shared
// memory for kWarps * kCount values; a second use of the same memory needs a barrier before it.
template <class T, int kCount, class Combine = Add>
__device__ __forceinline__ void block_reduce(T (&values)[kCount], T* s_values, T nothing = {}, Combine combine = {}) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  warp_reduce(values, combine);
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) s_values[i * kWarps + warp] = values[i];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = lane < kWarps ? s_values[i * kWarps + lane] : nothing;
    warp_reduce(values, combine);
  }
}
