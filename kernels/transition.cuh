// A source reads latents from memory and computes `Moments`, as src/cpu/source/ does. `Means`, for `loss`, reads mu;
// `Step`, for `step_loss`, computes mu = a x + b v from model outputs. A source has
//   kIsStep          whether it is `Step`: rows have a `StepRow`
//   output_of(l)     the latent that gets the gradient, mean or model output; kDtype is its dtype
//   kVector          elements of a vector: every tensor has whole 16-byte words of it
//   Raw<n>           n elements of all kTensors tensors, unconverted; n is kVector or 1
//   set(row)         sets the row's step, before the first moments(); loads may be in flight
//   load(raw, at)    issues the loads from element `at` on; n > 1 only if aligned(first element of the part)
//   moments(raw, m)  converts a Raw to Moments
#pragma once

#include "common/tensor.cuh"
#include "schedule.cuh"

struct Moments {
  float innovation;  // x' - mu
  float drift;       // mu - mu_old
  float ref_drift;   // mu - mu_ref
};

// The moments that are needed. A tensor that none of these needs is not read.
struct Demand {
  bool innovation, drift, ref_drift;

  __device__ __forceinline__ bool any() const { return innovation || drift || ref_drift; }
};

// What the latent of the old or reference policy holds: its mean, its v, (x' - mu_old) / std (old policy only). With
// kNextForm the latent is unused and mu_old = x'.
enum Form : int { kMeanForm, kOutputForm, kResidualForm, kNextForm, kNoForm };

// A reference, so that the latent stays in the kernel's arguments: a copy would take registers.
struct Policy {
  const Latent& latent;
  int form;
};

__device__ __forceinline__ Policy old_policy(const Latents& latents) {
  if (latents.old_prev_sample_mean.data) return {latents.old_prev_sample_mean, kMeanForm};
  if (latents.old_model_output.data) return {latents.old_model_output, kOutputForm};
  if (latents.old_residual.data) return {latents.old_residual, kResidualForm};
  return {latents.old_residual, kNoForm};
}

__device__ __forceinline__ Policy ref_policy(const Latents& latents) {
  if (latents.ref_prev_sample_mean.data) return {latents.ref_prev_sample_mean, kMeanForm};
  if (latents.ref_model_output.data) return {latents.ref_model_output, kOutputForm};
  return {latents.ref_model_output, kNoForm};
}

// Differences to absent latents are 0.
template <int kMean, int kAnchor, Cache kReread>
struct Means {
  static constexpr bool kIsStep = false;
  static constexpr int kDtype = kMean;
  static constexpr int kTensors = 4;
  static constexpr int kVector = kMean == kFloat32 && kAnchor == kFloat32 ? 4 : 8;
  Tensor<kMean> mean;
  Tensor<kAnchor> next, old, ref;

  template <int kCount>
  struct Raw {
    Pack<kMean, kCount> mean;
    Pack<kAnchor, kCount> next, old, ref;
  };

  __device__ __forceinline__ Means(const Latents& latents, Demand wanted)
      : mean(output_of(latents), wanted.any()),
        next(latents.prev_sample, wanted.innovation),
        old(latents.old_prev_sample_mean, wanted.drift),
        ref(latents.ref_prev_sample_mean, wanted.ref_drift) {}

  static __device__ __forceinline__ const Latent& output_of(const Latents& latents) { return latents.prev_sample_mean; }

  __device__ __forceinline__ void set(const StepRow&) {}

  // The backward reads mu and x' again, hence kReread.
  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    mean.template load<kReread>(raw.mean, at);
    next.template load<kReread>(raw.next, at);
    old.template load<Cache::kStream>(raw.old, at);
    ref.template load<Cache::kStream>(raw.ref, at);
  }

  template <int kCount>
  __device__ __forceinline__ void moments(const Raw<kCount>& raw, Moments (&out)[kCount]) const {
    float mu[kCount], x[kCount], mu_old[kCount], mu_ref[kCount];
    raw.mean.get(mu, mean.dtype());
    raw.next.get(x, next.dtype());
    raw.old.get(mu_old, old.dtype());
    raw.ref.get(mu_ref, ref.dtype());
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      out[j] = {(next.present ? x[j] : mu[j]) - mu[j], mu[j] - (old.present ? mu_old[j] : mu[j]),
                mu[j] - (ref.present ? mu_ref[j] : mu[j])};
  }

  __device__ __forceinline__ bool aligned(long long first) const {
    return mean.aligned(first) && next.aligned(first) && old.aligned(first) && ref.aligned(first);
  }
};

// v = uncond + guidance (output - uncond), mu = a x + b v, in float32, as `sde_step` computes them.
template <int kOutput, int kSample, int kPolicy, Cache kReread>
struct Step {
  static constexpr bool kIsStep = true;
  static constexpr int kDtype = kOutput;
  static constexpr int kTensors = 6;
  static constexpr int kVector = kOutput == kFloat32 && kSample == kFloat32 && kPolicy == kFloat32 ? 4 : 8;
  float a, b, guidance;
  float unit, inverse_unit;  // std, 1 / std
  int old_form, ref_form;
  Tensor<kOutput> output, uncond;
  Tensor<kSample> sample, next;
  Tensor<kPolicy> old, ref;

  template <int kCount>
  struct Raw {
    Pack<kOutput, kCount> output, uncond;
    Pack<kSample, kCount> sample, next;
    Pack<kPolicy, kCount> old, ref;
  };

  __device__ __forceinline__ Step(const Latents& latents, Demand wanted)
      : Step(latents, old_policy(latents), ref_policy(latents), wanted) {}

  static __device__ __forceinline__ const Latent& output_of(const Latents& latents) { return latents.model_output; }

  __device__ __forceinline__ void set(const StepRow& row) {
    a = row.a;
    b = row.b;
    guidance = row.guidance;
    unit = row.std;
    inverse_unit = 1.f / unit;
    // With std 0 a residual holds no information: mu_old is x'.
    if (row.std == 0.f && old_form == kResidualForm) old_form = kNextForm;
  }

  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    output.template load<kReread>(raw.output, at);
    uncond.template load<kReread>(raw.uncond, at);
    sample.template load<kReread>(raw.sample, at);
    next.template load<kReread>(raw.next, at);
    old.template load<Cache::kStream>(raw.old, at);
    ref.template load<Cache::kStream>(raw.ref, at);
  }

  template <int kCount>
  __device__ __forceinline__ void moments(const Raw<kCount>& raw, Moments (&out)[kCount]) const {
    float v[kCount], w[kCount], x[kCount], x_next[kCount], policy_old[kCount], policy_ref[kCount];
    raw.output.get(v, output.dtype());
    raw.uncond.get(w, uncond.dtype());
    raw.sample.get(x, sample.dtype());
    raw.next.get(x_next, next.dtype());
    raw.old.get(policy_old, old.dtype());
    raw.ref.get(policy_ref, ref.dtype());
    if (uncond.present) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = guided(guidance, v[j], w[j]);
    }
    float mu[kCount], u[kCount], drift[kCount], ref_drift[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mu[j] = mean_of(a, b, v[j], x[j]);
      u[j] = next.present ? x_next[j] - mu[j] : 0.f;
    }
    differences(old_form, v, mu, u, policy_old, drift);
    differences(ref_form, v, mu, u, policy_ref, ref_drift);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = {u[j], drift[j], ref_drift[j]};
  }

  __device__ __forceinline__ bool aligned(long long first) const {
    return output.aligned(first) && uncond.aligned(first) && sample.aligned(first) && next.aligned(first) &&
           old.aligned(first) && ref.aligned(first);
  }

 private:
  __device__ __forceinline__ Step(const Latents& latents, const Policy& old_policy, const Policy& ref_policy,
                                  Demand wanted)
      : a(0.f),
        b(0.f),
        guidance(1.f),
        unit(1.f),
        inverse_unit(1.f),
        old_form(wanted.drift ? old_policy.form : kNoForm),
        ref_form(wanted.ref_drift ? ref_policy.form : kNoForm),
        output(output_of(latents), wanted.any()),
        uncond(latents.uncond_output, wanted.any()),
        sample(latents.sample, wanted.innovation || needs_mean(old_form) || needs_mean(ref_form)),
        next(latents.prev_sample, wanted.innovation || old_form == kResidualForm),
        old(old_policy.latent, old_form != kNoForm),
        ref(ref_policy.latent, ref_form != kNoForm) {}

  static __device__ __forceinline__ bool needs_mean(int form) { return form == kMeanForm || form == kResidualForm; }

  // mu minus the mean of the policy. `form` is the same in all threads: branches on it do not diverge.
  template <int kCount>
  __device__ __forceinline__ void differences(int form, const float (&v)[kCount], const float (&mu)[kCount],
                                              const float (&u)[kCount], const float (&policy)[kCount],
                                              float (&out)[kCount]) const {
    if (form == kMeanForm) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = mu[j] - policy[j];
    } else if (form == kOutputForm) {  // exactly 0 for equal outputs; a difference of two means would lose digits
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = b * (v[j] - policy[j]);
    } else if (form == kResidualForm) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = -unit * (u[j] * inverse_unit - policy[j]);
    } else if (form == kNextForm) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = -u[j];
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = 0.f;
    }
  }
};

// The sources that kernels are compiled for: X(name, source, dtypes...).
#define POLICY_LOSS_SOURCES(X)                                \
  X(f32, Means, kFloat32, kFloat32)                           \
  X(bf16, Means, kBfloat16, kBfloat16)                        \
  X(f16, Means, kFloat16, kFloat16)                           \
  X(f32_bf16, Means, kFloat32, kBfloat16)                     \
  X(f32_f16, Means, kFloat32, kFloat16)                       \
  X(step_f32, Step, kFloat32, kFloat32, kFloat32)             \
  X(step_bf16, Step, kBfloat16, kBfloat16, kBfloat16)         \
  X(step_f16, Step, kFloat16, kFloat16, kFloat16)             \
  X(step_bf16_f32, Step, kBfloat16, kFloat32, kFloat32)       \
  X(step_bf16_f32_bf16, Step, kBfloat16, kFloat32, kBfloat16) \
  X(step_bf16_f32_f16, Step, kBfloat16, kFloat32, kFloat16)   \
  X(mixed, Means, kAny, kAny)                                 \
  X(step_mixed, Step, kAny, kAny, kAny)
