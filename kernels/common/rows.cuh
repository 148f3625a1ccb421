// Row vectors: one number a row, given as a number, or as a tensor that broadcasts to the rows without being expanded.
#pragma once

#include "common/numeric.cuh"

__device__ __forceinline__ double rounded(double value) { return static_cast<float>(value); }

// Rounded to float32.
__device__ __forceinline__ float row_element(const RowVector& vector, long long row) {
  if (!vector.present) return __uint_as_float(0x7fc00000u);
  if (!vector.data) return static_cast<float>(vector.value);
  // 32 bits: a grid has fewer rows than that, and a 64-bit division is 70 instructions.
  const unsigned at = static_cast<unsigned>(row) / vector.divide % vector.modulo;
  if (vector.dtype == kFloat64) return static_cast<float>(static_cast<const double*>(vector.data)[at]);
  return load_element(vector.data, vector.dtype, at);
}

// Not inlined, as all of the cold end of a launch that is called from several places: inlined there, images were twice
// as large, and the registers of the epilogue spilled.
__device__ __noinline__ float read_row(const RowVector& vector, long long row) { return row_element(vector, row); }
