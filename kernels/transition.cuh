// Transition: how a row's x', mu, mu_old and mu_ref come out of memory. Twin of src/transition.rs.
//
// A *source* is the only thing in which the operators over row statistics differ; everything behind it sees `Moments`.
// It is a value type bound to one stretch of one row:
//   kVector          elements of one vector step; every load of it is whole 16-byte words
//   Raw              one vector step of every tensor, unconverted
//   load(i)          the Raw of vector i of the stretch; needs aligned()
//   moments(raw, m)  the kVector Moments of a Raw
//   element(i)       those of element i of the stretch, for tails and odd addresses
//   advance(n)       moves it n elements on
// `loss` reads given means (`Means`); a source over model outputs applies a x + b v before the differences.
#pragma once

#include "common/tensor.cuh"
#include "policy_loss.cuh"

// The differences that every statistic and gradient is made of.
struct Moments {
  float innovation;  // x' - mu
  float drift;       // mu - mu_old
  float ref_drift;   // mu - mu_ref
};

// Means as given. mu is always there; what else is absent stands for mu itself: its difference is 0.
template <int kMean, int kAnchor, Cache kReread>
struct Means {
  static constexpr int kVector = kMean == kFloat32 && kAnchor == kFloat32 ? 4 : 8;
  Tensor<kMean> mean;
  Tensor<kAnchor> next, old, ref;

  struct Raw {
    Pack<kMean, kVector> mean;
    Pack<kAnchor, kVector> next, old, ref;
  };

  // mu and x' stay in the L2 for the backward as far as it reaches; nobody reads the anchors again.
  __device__ __forceinline__ Raw load(int vector) const {
    return {mean.template load<kReread, kVector>(vector), next.template load<kReread, kVector>(vector),
            old.template load<Cache::kStream, kVector>(vector), ref.template load<Cache::kStream, kVector>(vector)};
  }

  __device__ __forceinline__ void moments(const Raw& raw, Moments (&out)[kVector]) const {
    float mu[kVector], x[kVector], mu_old[kVector], mu_ref[kVector];
    raw.mean.get(mu, mean.dtype());
    raw.next.get(x, next.dtype());
    raw.old.get(mu_old, old.dtype());
    raw.ref.get(mu_ref, ref.dtype());
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      out[j] = differences(mu[j], next.present ? x[j] : mu[j], old.present ? mu_old[j] : mu[j],
                           ref.present ? mu_ref[j] : mu[j]);
  }

  __device__ __forceinline__ Moments element(int at) const {
    const float mu = load_element(mean.data, mean.dtype(), at);
    return differences(mu, next.element(at, mu), old.element(at, mu), ref.element(at, mu));
  }

  // Absent tensors have the address 0, which is aligned.
  __device__ __forceinline__ bool aligned() const {
    return mean.aligned() && next.aligned() && old.aligned() && ref.aligned();
  }

  __device__ __forceinline__ void advance(long long elements) {
    mean.advance(elements);
    next.advance(elements);
    old.advance(elements);
    ref.advance(elements);
  }

 private:
  static __device__ __forceinline__ Moments differences(float mu, float next, float old, float ref) {
    return {next - mu, mu - old, mu - ref};
  }
};
