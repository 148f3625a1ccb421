// Transition: how a row's x', mu, mu_old and mu_ref come out of memory. Twin of src/cpu/source/.
//
// A *source* is the only thing in which the operators over row statistics differ; everything behind it sees `Moments`.
// It is a value type bound to one stretch of one row:
//   kIsStep          whether the output is a model's: a row has a step, `StepRow`, which stands in its `numbers` too
//   output_of(l)     what the gradient goes to: the mean, or the model output
//   kDtype           of the output
//   kVector          elements of one vector step; every load of it is whole 16-byte words
//   Raw              one vector step of all kTensors tensors, unconverted
//   load(i)          the Raw of vector i of the stretch; needs aligned()
//   moments(raw, m)  the kVector Moments of a Raw
//   element(i)       those of element i of the stretch, for tails and odd addresses
//   advance(n)       moves it n elements on
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

// How another policy is given: as its mean, as its v, or, the old policy alone, as (x' - mu_old) / std.
enum Form : int { kMeanForm, kOutputForm, kResidualForm, kNoForm };

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

  struct Raw {
    Pack<kMean, kVector> mean;
    Pack<kAnchor, kVector> next, old, ref;
  };

  __device__ __forceinline__ Means(const Latents& latents, long long first, const StepRow&, Demand wanted)
      : mean(output_of(latents), first, wanted.any()),
        next(latents.prev_sample, first, wanted.innovation),
        old(latents.old_prev_sample_mean, first, wanted.drift),
        ref(latents.ref_prev_sample_mean, first, wanted.ref_drift) {}

  static __device__ __forceinline__ const Latent& output_of(const Latents& latents) { return latents.prev_sample_mean; }

  // mu and x' stay in the L2 for the backward as far as it reaches; nobody reads the anchors again.
  __device__ __forceinline__ void load(Raw& raw, int vector) const {
    mean.template load<kReread>(raw.mean, vector);
    next.template load<kReread>(raw.next, vector);
    old.template load<Cache::kStream>(raw.old, vector);
    ref.template load<Cache::kStream>(raw.ref, vector);
  }

  __device__ __forceinline__ void moments(const Raw& raw, Moments (&out)[kVector]) const {
    float mu[kVector], x[kVector], mu_old[kVector], mu_ref[kVector];
    raw.mean.get(mu, mean.dtype());
    raw.next.get(x, next.dtype());
    raw.old.get(mu_old, old.dtype());
    raw.ref.get(mu_ref, ref.dtype());
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      out[j] = differences(mu[j], next.present() ? x[j] : mu[j], old.present() ? mu_old[j] : mu[j],
                           ref.present() ? mu_ref[j] : mu[j]);
  }

  __device__ __forceinline__ Moments element(int at) const {
    const float mu = mean.element(at, 0.f);
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

  struct Raw {
    Pack<kOutput, kVector> output, uncond;
    Pack<kSample, kVector> sample, next;
    Pack<kPolicy, kVector> old, ref;
  };

  __device__ __forceinline__ Step(const Latents& latents, long long first, const StepRow& row, Demand wanted)
      : Step(latents, old_policy(latents), ref_policy(latents), first, row, wanted) {}

  static __device__ __forceinline__ const Latent& output_of(const Latents& latents) { return latents.model_output; }

  // What the backward reads again stays in the L2 as far as that reaches.
  __device__ __forceinline__ void load(Raw& raw, int vector) const {
    output.template load<kReread>(raw.output, vector);
    uncond.template load<kReread>(raw.uncond, vector);
    sample.template load<kReread>(raw.sample, vector);
    next.template load<kReread>(raw.next, vector);
    old.template load<Cache::kStream>(raw.old, vector);
    ref.template load<Cache::kStream>(raw.ref, vector);
  }

  __device__ __forceinline__ void moments(const Raw& raw, Moments (&out)[kVector]) const {
    Values<kVector> values;
    raw.output.get(values.output, output.dtype());
    raw.uncond.get(values.uncond, uncond.dtype());
    raw.sample.get(values.sample, sample.dtype());
    raw.next.get(values.next, next.dtype());
    raw.old.get(values.old, old.dtype());
    raw.ref.get(values.ref, ref.dtype());
    moments_of(values, out);
  }

  __device__ __forceinline__ Moments element(int at) const {
    const Values<1> values = {{output.element(at, 0.f)}, {uncond.element(at, 0.f)}, {sample.element(at, 0.f)},
                              {next.element(at, 0.f)},   {old.element(at, 0.f)},    {ref.element(at, 0.f)}};
    Moments out[1];
    moments_of(values, out);
    return out[0];
  }

  __device__ __forceinline__ bool aligned() const {
    return output.aligned() && uncond.aligned() && sample.aligned() && next.aligned() && old.aligned() && ref.aligned();
  }

  __device__ __forceinline__ void advance(long long elements) {
    output.advance(elements);
    uncond.advance(elements);
    sample.advance(elements);
    next.advance(elements);
    old.advance(elements);
    ref.advance(elements);
  }

 private:
  __device__ __forceinline__ Step(const Latents& latents, const Policy& old_policy, const Policy& ref_policy,
                                  long long first, const StepRow& row, Demand wanted)
      : a(row.a),
        b(row.b),
        guidance(row.guidance),
        // In a deterministic row a residual stands for mu_old = x', whatever it holds: it is not read, and counts as 0.
        unit(row.std == 0.f ? 1.f : row.std),
        inverse_unit(1.f / unit),
        old_form(wanted.drift ? old_policy.form : kNoForm),
        ref_form(wanted.ref_drift ? ref_policy.form : kNoForm),
        output(output_of(latents), first, wanted.any()),
        uncond(latents.uncond_output, first, wanted.any()),
        sample(latents.sample, first, wanted.innovation || needs_mean(old_form) || needs_mean(ref_form)),
        next(latents.prev_sample, first, wanted.innovation || old_form == kResidualForm),
        old(old_policy.latent, first, old_form != kNoForm && !(old_form == kResidualForm && row.std == 0.f)),
        ref(ref_policy.latent, first, ref_form != kNoForm) {}

  template <int kCount>
  struct Values {
    float output[kCount], uncond[kCount], sample[kCount], next[kCount], old[kCount], ref[kCount];
  };

  static __device__ __forceinline__ bool needs_mean(int form) { return form == kMeanForm || form == kResidualForm; }

  template <int kCount>
  __device__ __forceinline__ void moments_of(const Values<kCount>& in, Moments (&out)[kCount]) const {
    float v[kCount], mu[kCount], u[kCount], drift[kCount], ref_drift[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = in.output[j];
    if (uncond.present()) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = guided(guidance, v[j], in.uncond[j]);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mu[j] = mean_of(a, b, v[j], in.sample[j]);
      u[j] = next.present() ? in.next[j] - mu[j] : 0.f;
    }
    differences(old_form, v, mu, u, in.old, drift);
    differences(ref_form, v, mu, u, in.ref, ref_drift);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = {u[j], drift[j], ref_drift[j]};
  }

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
