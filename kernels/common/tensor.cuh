// Latents: `Latent` crosses a launch, `Tensor` is one of them bound to a stretch of a row.
#pragma once

#include "common/vec.cuh"

// A tensor [rows, numel], contiguous; data null: absent.
struct Latent {
  const void* data;
  int dtype;
  int pad;
};
static_assert(sizeof(Latent) == 16);

// One tensor from some element on. `dtype_if_any` is looked at where kDtype is kAny.
template <int kDtype>
struct Tensor {
  const char* data;
  int present;
  int dtype_if_any;

  __device__ __forceinline__ Tensor(const Latent& latent, long long first, bool wanted = true)
      : present(wanted && latent.data), dtype_if_any(latent.dtype) {
    data = present ? static_cast<const char*>(latent.data) + first * dtype_size(dtype()) : nullptr;
  }
  __device__ __forceinline__ int dtype() const { return kDtype == kAny ? dtype_if_any : kDtype; }
  __device__ __forceinline__ bool aligned() const { return reinterpret_cast<size_t>(data) % 16 == 0; }
  __device__ __forceinline__ void advance(long long elements) {
    if (present) data += elements * dtype_size(dtype());
  }
  template <Cache kCache, int kCount>
  __device__ __forceinline__ Pack<kDtype, kCount> load(int vector) const {
    // Zeros, so that a pack which is not loaded does not keep its registers from one iteration to the next.
    Pack<kDtype, kCount> pack = {};
    if (present)
      pack.template load<kCache>(data + static_cast<long long>(vector) * (kCount * dtype_size(dtype())), dtype());
    return pack;
  }
  __device__ __forceinline__ float element(int at, float absent) const {
    return present ? load_element(data, dtype(), at) : absent;
  }
};

// Whole vectors into an output of dtype kDtype, or `dtype` where that is kAny.
template <int kVector, int kDtype>
__device__ __forceinline__ void store_vector(char* out, int dtype, int vector, const float (&values)[kVector]) {
  Pack<kDtype, kVector> pack;
  pack.set(values, dtype);
  pack.store(out + static_cast<long long>(vector) * (kVector * dtype_size(dtype)), dtype);
}
