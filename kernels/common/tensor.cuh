// Latents: a `Latent` is what a call has, a `Tensor` or a `Target` is one bound to a stretch of a row.
#pragma once

#include "common/vec.cuh"

// One tensor from some element on. `dtype_if_any` is looked at where kDtype is kAny.
template <int kDtype>
struct Tensor {
  const char* data;  // null: absent
  int dtype_if_any;

  __device__ __forceinline__ Tensor(const Latent& latent, long long first, bool wanted = true)
      : data(wanted ? static_cast<const char*>(latent.data) : nullptr), dtype_if_any(latent.dtype) {
    advance(first);
  }
  __device__ __forceinline__ bool present() const { return data; }
  __device__ __forceinline__ int dtype() const { return kDtype == kAny ? dtype_if_any : kDtype; }
  __device__ __forceinline__ bool aligned() const { return reinterpret_cast<size_t>(data) % 16 == 0; }
  __device__ __forceinline__ void advance(long long elements) {
    if (present()) data += elements * dtype_size(dtype());
  }
  template <Cache kCache, int kCount>
  __device__ __forceinline__ void load(Pack<kDtype, kCount>& pack, int vector) const {
    if (present())
      pack.template load<kCache>(data + static_cast<long long>(vector) * (kCount * dtype_size(dtype())), dtype());
  }
  __device__ __forceinline__ float element(int at, float absent) const {
    return present() ? load_element(data, dtype(), at) : absent;
  }
};

// Whole vectors into an output of dtype kDtype, or `dtype` where that is kAny.
template <int kVector, int kDtype>
__device__ __forceinline__ void store_vector(char* out, int dtype, int vector, const float (&values)[kVector]) {
  Pack<kDtype, kVector> pack;
  pack.set(values, dtype);
  pack.store(out + static_cast<long long>(vector) * (kVector * dtype_size(dtype)), dtype);
}

// An output from some element on; data null: not wanted.
template <int kDtype>
struct Target {
  char* data;
  int dtype_if_any;

  __device__ __forceinline__ Target(void* start, int dtype, long long first)
      : data(static_cast<char*>(start)), dtype_if_any(dtype) {
    advance(first);
  }
  __device__ __forceinline__ Target(const Latent& latent, long long first)
      : Target(const_cast<void*>(latent.data), latent.dtype, first) {}
  __device__ __forceinline__ int dtype() const { return kDtype == kAny ? dtype_if_any : kDtype; }
  __device__ __forceinline__ bool aligned() const { return reinterpret_cast<size_t>(data) % 16 == 0; }
  __device__ __forceinline__ void advance(long long elements) {
    if (data) data += elements * dtype_size(dtype());
  }
  template <int kVector>
  __device__ __forceinline__ void store(int vector, const float (&values)[kVector], float share) const {
    float shares[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) shares[j] = share * values[j];
    store_vector<kVector, kDtype>(data, dtype(), vector, shares);
  }
  __device__ __forceinline__ void store_one(int at, float value, float share) const {
    if (data) store_element(data, dtype(), at, share * value);
  }
};
