// Reads a RowVector.
#pragma once

#include "common/numeric.cuh"

__device__ __forceinline__ double rounded(double value) { return static_cast<float>(value); }

// The number of a row, rounded to float32; NaN if the vector is absent.
__device__ __forceinline__ float row_element(const RowVector& vector, long long row) {
  if (!vector.present) return __uint_as_float(0x7fc00000u);
  if (!vector.data) return static_cast<float>(vector.value);
  // 32 bits suffice for the rows of a grid; a 64-bit division is 70 instructions.
  const unsigned at = static_cast<unsigned>(row) / vector.divide % vector.modulo;
  if (vector.dtype == kFloat64) return static_cast<float>(static_cast<const double*>(vector.data)[at]);
  return load_element(vector.data, vector.dtype, at);
}

// Not inlined, because it has many callers at the end of a launch: inlining doubled the images and spilled registers.
__device__ __noinline__ float read_row(const RowVector& vector, long long row) { return row_element(vector, row); }
