// Reductions over a warp and over a block, in a fixed order: the same values give the same bits. All threads of the
// warp or block must call them.
#pragma once

#include "common/numeric.cuh"

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;  // per block
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize, "the first warp reduces one value of each warp");

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct NanMax {
  __device__ __forceinline__ float operator()(float a, float b) const { return nan_max(a, b); }
};

// Every lane gets the result. The loop is not unrolled: for a shuffle after a branch the compiler adds a path for
// diverged lanes, ~15 instructions each, and unrolled shuffles were half of a kernel's code.
template <class T, int kCount, class Combine = Add>
__device__ __forceinline__ void warp_reduce(T (&values)[kCount], Combine combine = {}) {
#pragma unroll 1
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], distance));
  }
}

// The result is valid in warp 0. `s_values` is shared memory, kWarps * kCount values; the caller puts a barrier before
// its next use. `nothing` is the neutral element of `combine`.
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
