// The gradient of an element, and where it goes.
#pragma once

#include "common/stream.cuh"
#include "transition.cuh"

// What the differences of one row are multiplied with; the terms whose coefficient is 0 are not read.
struct Coefficients {
  float innovation, drift, reference;
};

// A coefficient of 0 stays 0, whatever it is multiplied with.
__device__ __forceinline__ float scaled(double grad_loss, float stored, double divisor) {
  return stored == 0.f ? 0.f : static_cast<float>(grad_loss * stored / divisor);
}

__device__ __forceinline__ float gradient(Coefficients c, Moments moments) {
  return fmaf(c.innovation, moments.innovation, fmaf(c.drift, moments.drift, c.reference * moments.ref_drift));
}

// Of one row, from some element on: with guidance the output has that share of G, the unconditional one the rest.
template <class Source>
struct Gradients {
  Target<Source::kDtype> output, uncond;
  float guidance;

  __device__ __forceinline__ Gradients(const PolicyLossBackward& p, long long first, const StepRow& step)
      : output(p.grad_output, Source::output_of(p.latents).dtype, first),
        uncond(Source::kIsStep ? p.grad_uncond_output : nullptr, p.latents.uncond_output.dtype, first),
        guidance(Source::kIsStep ? step.guidance : 1.f) {}
  __device__ __forceinline__ bool aligned() const { return output.aligned() && uncond.aligned(); }
  __device__ __forceinline__ void advance(long long elements) {
    output.advance(elements);
    uncond.advance(elements);
  }
  __device__ __forceinline__ void store(int vector, const float (&gradient)[Source::kVector]) const {
    if (!Source::kIsStep || output.data) output.store(vector, gradient, guidance);
    if (Source::kIsStep && uncond.data) uncond.store(vector, gradient, 1.f - guidance);
  }
  __device__ __forceinline__ void store_one(int at, float gradient) const {
    output.store_one(at, gradient, guidance);
    uncond.store_one(at, gradient, 1.f - guidance);
  }
};
