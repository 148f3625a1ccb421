// Dtypes, and loads and stores of single elements as float32.
#pragma once

#include "call.cuh"

__device__ __forceinline__ constexpr int dtype_size(int dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// bfloat16 is the upper half of a float32.
__device__ __forceinline__ float low_bfloat_to_float(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bfloat_to_float(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

__device__ __forceinline__ float load_element(const void* data, int dtype, long long at) {
  if (dtype == kFloat32) return __ldg(static_cast<const float*>(data) + at);  // no kernel writes its inputs
  const unsigned bits = __ldg(static_cast<const unsigned short*>(data) + at);
  return dtype == kBfloat16 ? low_bfloat_to_float(bits) : low_half_to_float(bits);
}

__device__ __forceinline__ void store_element(void* data, int dtype, float value) {
  if (dtype == kFloat32) {
    *static_cast<float*>(data) = value;
  } else {
    const unsigned bits = dtype == kBfloat16 ? floats_to_bfloats(value, 0.f) : floats_to_halves(value, 0.f);
    *static_cast<unsigned short*>(data) = static_cast<unsigned short>(bits);
  }
}

__device__ __forceinline__ float as_stored(int dtype, float value) {
  if (dtype == kBfloat16) return low_bfloat_to_float(floats_to_bfloats(value, 0.f));
  return dtype == kFloat16 ? low_half_to_float(floats_to_halves(value, 0.f)) : value;
}

// NaN if one of them is, as torch.max.
__device__ __forceinline__ float nan_max(float a, float b) { return a != a || a > b ? a : b; }

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0.0; }
