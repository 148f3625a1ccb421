// Kernels are compiled by NVRTC or nvcc, and by g++ for a CPU emulator. They use shared memory and PTX only through the
// names below; tests/emulator/shim.h defines these for g++. Conversions are PTX, because cuda_fp16.h and cuda_bf16.h
// would make a build need more than NVRTC. Compilers fuse no product and sum (--fmad=false): only `fmaf` does.
#pragma once

#ifdef FLOWDPPO_EMULATOR
#include "shim.h"
#else

#define SHARED(type, name, count) __shared__ type name[count]

// Convert the lower or the upper half of a word from float16.
__device__ __forceinline__ float low_half_to_float(unsigned word) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(word));
  return value;
}
__device__ __forceinline__ float high_half_to_float(unsigned word) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(word));
  return value;
}

// Two floats in one word, rounded to nearest even; overflow gives infinity, NaN stays NaN.
__device__ __forceinline__ unsigned floats_to_halves(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned floats_to_bfloats(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// PTX, because the compiler makes a plain store a generic one, and __stwb a strong one (STG.STRONG.SM).
__device__ __forceinline__ void store16(uint4* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w));
}

#endif
