// The seam between the compilers: NVRTC or nvcc for the GPU, g++ against tests/emulator/shim.h for the CPU emulator.
//
// Both compile what is written: a product and a sum are fused where it says `fmaf`, and nowhere else (--fmad=false).
// What the emulator cannot run is reached only through the names defined here, each with a twin in the shim: shared
// memory (the emulator hands out poisoned memory of the exact size), and a few instructions. The conversions are PTX
// rather than cuda_fp16.h and cuda_bf16.h so that a build needs nothing beside NVRTC itself.
#pragma once

#ifdef FLOWDPPO_EMULATOR
#include "shim.h"
#else

#define SHARED(type, name, count) __shared__ type name[count]

// The lower and the upper half of a word, as float16.
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

// Two floats in one word, rounded to nearest even; overflow becomes an infinity, NaN stays NaN.
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

// Of a plain store the compiler does not see that it is to global memory, and __stwb is one that other blocks must see.
__device__ __forceinline__ void store16(uint4* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w));
}

#endif
