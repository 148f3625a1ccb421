// kCount neighbouring elements of a tensor, loaded and stored 16 bytes at a time, at 16-byte aligned addresses. `load`
// converts nothing, so that a thread issues the loads of several packs and waits for memory (~600 ns) once.
#pragma once

#include "common/numeric.cuh"

enum class Cache {
  kKeep,    // normal eviction: the backward reads it again
  kStream,  // evict first: nothing reads it again
};

template <Cache kCache>
__device__ __forceinline__ uint4 load16(const uint4* address) {
  return kCache == Cache::kStream ? __ldcs(address) : __ldg(address);
}

template <int kDtype, int kCount>
struct Pack {
  static_assert(kCount % 8 == 0 || (kCount == 4 && kDtype == kFloat32), "a pack is whole 16-byte vectors");
  static constexpr int kVectors = kCount * (kDtype == kAny ? 4 : dtype_size(kDtype)) / 16;
  uint4 raw[kVectors];

  // `dtype` is kDtype unless that is kAny. It is the same in all threads: branches on it do not diverge.
  template <Cache kCache>
  __device__ __forceinline__ void load(const void* data, int dtype) {
    const uint4* vectors = static_cast<const uint4*>(data);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (kDtype != kAny || i < kVectors / 2 || dtype == kFloat32) raw[i] = load16<kCache>(vectors + i);
  }

  __device__ __forceinline__ void store(void* data, int dtype) const {
    uint4* vectors = static_cast<uint4*>(data);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (kDtype != kAny || i < kVectors / 2 || dtype == kFloat32) store16(vectors + i, raw[i]);
  }

  __device__ __forceinline__ void get(float (&values)[kCount], int dtype) const {
    if (dtype == kFloat32) {
      if constexpr (kDtype == kFloat32 || kDtype == kAny) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(word(i));
      }
    } else if (dtype == kBfloat16) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        values[2 * i] = low_bfloat_to_float(word(i));
        values[2 * i + 1] = high_bfloat_to_float(word(i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        values[2 * i] = low_half_to_float(word(i));
        values[2 * i + 1] = high_half_to_float(word(i));
      }
    }
  }

  __device__ __forceinline__ void set(const float (&values)[kCount], int dtype) {
    if (dtype == kFloat32) {
      if constexpr (kDtype == kFloat32 || kDtype == kAny) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) word(i) = __float_as_uint(values[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float low = values[2 * i], high = values[2 * i + 1];
        word(i) = dtype == kBfloat16 ? floats_to_bfloats(low, high) : floats_to_halves(low, high);
      }
    }
  }

 private:
  // `i` must be a constant after unrolling, because registers cannot be indexed at run time.
  __device__ __forceinline__ unsigned& word(int i) {
    uint4& vector = raw[i / 4];
    return i % 4 == 0 ? vector.x : i % 4 == 1 ? vector.y : i % 4 == 2 ? vector.z : vector.w;
  }
  __device__ __forceinline__ unsigned word(int i) const { return const_cast<Pack*>(this)->word(i); }
};

// A single element at any address.
template <int kDtype>
struct Pack<kDtype, 1> {
  float value;
  template <Cache kCache>
  __device__ __forceinline__ void load(const void* data, int dtype) {
    value = load_element(data, dtype, 0);
  }
  __device__ __forceinline__ void store(void* data, int dtype) const { store_element(data, dtype, value); }
  __device__ __forceinline__ void get(float (&values)[1], int) const { values[0] = value; }
  __device__ __forceinline__ void set(const float (&values)[1], int dtype) { value = as_stored(dtype, values[0]); }
};
