// Latents that a kernel reads (`Tensor`) and writes (`Target`). Positions `at` and `first` are element indices in the
// whole tensor, so that all tensors share one offset; their base addresses stay in the kernel's arguments and take no
// registers. `dtype_if_any` is used if kDtype is kAny.
#pragma once

#include "common/vec.cuh"

template <int kDtype>
struct Tensor {
  const void* data;
  int dtype_if_any;
  bool present;

  __device__ __forceinline__ Tensor(const Latent& latent, bool wanted = true)
      : data(latent.data), dtype_if_any(latent.dtype), present(wanted && latent.data) {}
  __device__ __forceinline__ int dtype() const { return kDtype == kAny ? dtype_if_any : kDtype; }
  __device__ __forceinline__ const char* address(long long at) const {
    return static_cast<const char*>(data) + at * dtype_size(dtype());
  }
  __device__ __forceinline__ bool aligned(long long first) const {
    return !present || reinterpret_cast<size_t>(address(first)) % 16 == 0;
  }
  template <Cache kCache, int kCount>
  __device__ __forceinline__ void load(Pack<kDtype, kCount>& pack, long long at) const {
    if (present) pack.template load<kCache>(address(at), dtype());
  }
};

// Nothing is stored if data is null.
template <int kDtype>
struct Target {
  void* data;
  int dtype_if_any;

  __device__ __forceinline__ Target(void* data, int dtype) : data(data), dtype_if_any(dtype) {}
  __device__ __forceinline__ Target(const Latent& latent) : Target(const_cast<void*>(latent.data), latent.dtype) {}
  __device__ __forceinline__ int dtype() const { return kDtype == kAny ? dtype_if_any : kDtype; }
  __device__ __forceinline__ char* address(long long at) const {
    return static_cast<char*>(data) + at * dtype_size(dtype());
  }
  __device__ __forceinline__ bool aligned(long long first) const {
    return !data || reinterpret_cast<size_t>(address(first)) % 16 == 0;
  }
  template <int kCount>
  __device__ __forceinline__ void store(long long at, const float (&values)[kCount], float share = 1.f) const {
    if (!data) return;
    float shares[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) shares[j] = share * values[j];
    Pack<kDtype, kCount> pack;
    pack.set(shares, dtype());
    pack.store(address(at), dtype());
  }
};
