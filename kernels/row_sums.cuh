// The sums of a row while they are added up: element by element, over the blocks that share the row, and at last as the
// row's numbers.
#pragma once

#include "objective.cuh"
#include "transition.cuh"

// Vector steps whose loads are issued together. Two where all dtypes are one, 6 or 8 loads of 16 bytes; one for a mix,
// 4 to 6 loads, and where a step has more than 32 elements: two of 48 spill. (The reference policy and the
// unconditional output not counted.)
template <class Source>
constexpr int kUnroll =
    sizeof(typename Source::Raw) > Source::kTensors * 16 || Source::kTensors* Source::kVector > 32 ? 1 : 2;

// The four sums of `RowSums` while elements are added up.
enum Sum : int { kQ, kD, kCross, kF, kSums };

__device__ __forceinline__ void add(float (&sums)[kSums], Moments moments) {
  sums[kQ] = fmaf(moments.innovation, moments.innovation, sums[kQ]);
  sums[kD] = fmaf(moments.drift, moments.drift, sums[kD]);
  sums[kCross] = fmaf(moments.drift, moments.innovation, sums[kCross]);
  sums[kF] = fmaf(moments.ref_drift, moments.ref_drift, sums[kF]);
}

// Over the splits of a row, in float64: a thread of the first warp takes every 32nd, then a tree. Valid in that warp.
__device__ __forceinline__ RowSums sum_of_splits(const float4* partials, unsigned splits) {
  double sums[kSums] = {};
  if (threadIdx.x < kWarpSize) {
#pragma unroll 1
    for (unsigned split = threadIdx.x; split < splits; split += kWarpSize) {
      const float4 partial = __ldcg(partials + split);
      sums[kQ] += partial.x;
      sums[kD] += partial.y;
      sums[kCross] += partial.z;
      sums[kF] += partial.w;
    }
    warp_reduce(sums);
  }
  return {sums[kQ], sums[kD], sums[kCross], sums[kF]};
}

__device__ __forceinline__ void write_row(const PolicyLossForward& p, long long row, RowSums sums, GuardScale guard) {
  const PolicyLoss& call = p.call;
  const double numel = p.stage == kObjectiveAlone ? p.row_sums[4 * call.rows] : static_cast<double>(call.numel);
  row_numbers(call, row, sums, numel, guard, p.numbers);
  if (call.settings.reduction == kReduceNone) p.loss[row] = row_loss(call, p.numbers, row);
}
