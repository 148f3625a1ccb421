// Transition: how a row's x', mu, mu_old and mu_ref come out of memory. Twin of src/cpu/source/.
//
// A *source* is the only thing in which the operators over row statistics differ; everything behind it sees `Moments`.
// It is a value type:
//   kIsStep          whether the output is a model's: a row has a step, `StepRow`, which stands in its `numbers` too
//   output_of(l)     what the gradient goes to: the mean, or the model output
//   kDtype           of the output
//   kVector          elements of one vector step; every load of it is whole 16-byte words
//   Raw<n>           n elements of all kTensors tensors, unconverted: a vector, or 1 for tails and odd addresses
//   set(row)         gives it the row's step
//   load(raw, at)    issues the loads from element `at` on; of a vector only where aligned(first of the part)
//   moments(raw, m)  the Moments of a Raw
// `loss` reads given means (`Means`), `step_loss` model outputs (`Step`): a x + b v comes before the differences there.
#pragma once

#include "common/tensor.cuh"
#include "schedule.cuh"

// The differences that every statistic and gradient is made of.
struct Moments {
  float innovation;  // x' - mu
  float drift;       // mu - mu_old
  float ref_drift;   // mu - mu_ref
};

// Which of the moments somebody wants; what only the others need is not read.
struct Demand {
  bool innovation, drift, ref_drift;

  __device__ __forceinline__ bool any() const { return innovation || drift || ref_drift; }
};

// How another policy is given: as its mean, as its v, or, the old policy alone, as (x' - mu_old) / std or as x' itself.
enum Form : int { kMeanForm, kOutputForm, kResidualForm, kNextForm, kNoForm };

// The latent by reference, so that its dtype stays among the arguments: a copy would cost each thread registers.
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

// Means as given. What is absent stands for mu: its difference is 0.
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

  // mu and x' stay in the L2 for the backward as far as it reaches; nobody reads the anchors again.
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

// Model outputs: v = uncond + guidance (output - uncond), mu = a x + b v. In float32, as a rollout forms them.
//   old, ref   mean      mu - old
//              output    b (v - old): no cancellation of two means; exactly 0 when the outputs are equal
//              residual  -std ((x' - mu)/std - old)
// Read is what a difference needs; without `old` or `ref` theirs is 0.
template <int kOutput, int kSample, int kPolicy, Cache kReread>
struct Step {
  static constexpr bool kIsStep = true;
  static constexpr int kDtype = kOutput;
  static constexpr int kTensors = 6;
  static constexpr int kVector = kOutput == kFloat32 && kSample == kFloat32 && kPolicy == kFloat32 ? 4 : 8;
  float a, b, guidance;
  float unit, inverse_unit;  // of a residual
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

  // Before the first moments; the first loads may be under way by then.
  __device__ __forceinline__ void set(const StepRow& row) {
    a = row.a;
    b = row.b;
    guidance = row.guidance;
    unit = row.std;
    inverse_unit = 1.f / unit;
    // In a deterministic row a residual stands for mu_old = x', whatever it holds.
    if (row.std == 0.f && old_form == kResidualForm) old_form = kNextForm;
  }

  // What the backward reads again stays in the L2 as far as that reaches.
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

  // mu minus the mean of another policy. The form is the same for all threads: one branch for all elements.
  template <int kCount>
  __device__ __forceinline__ void differences(int form, const float (&v)[kCount], const float (&mu)[kCount],
                                              const float (&u)[kCount], const float (&policy)[kCount],
                                              float (&out)[kCount]) const {
    if (form == kMeanForm) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = mu[j] - policy[j];
    } else if (form == kOutputForm) {
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

// The sources that kernels are compiled for: X(name, source, dtypes...). What no typed one fits takes a mixed one,
// which looks at the dtypes at run time.
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
