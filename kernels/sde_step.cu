// sde_step: the kernels of `sde_step`. Arguments and launch are in call.cuh, the coefficients of a row in schedule.cuh.
//
// Forward, one pass: v = uncond + guidance (output - uncond), mu = a x + b v, x' = mu + std noise or the given one,
// rounded to its dtype, residual (x' - mu) / std, and q = sum (x' - mu)^2 for the log-prob: float32 in a block, float64
// over the splits. The last block of a row writes the row's numbers. The bits do not depend on the order of blocks.
//
// Backward: log_prob = grad_log_prob kNumberLogProb, G = grad_mean + log_prob (x' - mu), grad_output = b guidance G,
// grad_uncond_output = b (1 - guidance) G. A row with log_prob == 0 reads neither x' nor mu.
#include "common/stream.cuh"
#include "common/tensor.cuh"
#include "schedule.cuh"

namespace sde_step {

// ---- forward -------------------------------------------------------------------------------------------------------

// `next`, prev_sample or noise, has a run-time dtype: one kernel draws a latent and later scores it, and thus adds up
// in the same order.
template <int kOutput, int kSample>
struct Step {
  Tensor<kOutput> output, uncond;
  Tensor<kSample> sample;
  Tensor<kAny> next;
  Target<kSample> stored;
  Target<kFloat32> mean;
  Target<kAny> residual;
  StepRow row;
  float per_std;
  bool draws;
  float sum, run;  // of (x' - mu)^2: over the finished runs, over this run

  static constexpr bool kPrefetch = true;
  static constexpr int kVector = 8, kSteps = 1;  // 16 bytes of a 16-bit dtype, 32 of float32
  template <int kCount>
  struct Raw {
    Pack<kOutput, kCount> output, uncond;
    Pack<kSample, kCount> sample;
    Pack<kAny, kCount> next;
  };

  __device__ __forceinline__ Step(const SdeStepForward& p)
      : output(p.call.latents.model_output),
        uncond(p.call.latents.uncond_output),
        sample(p.call.latents.sample),
        next(next_of(p.call.latents)),
        stored(p.stored, p.call.latents.sample.dtype),
        mean(p.prev_sample_mean, kFloat32),
        residual(p.residual),
        row(),
        per_std(0.f),
        draws(p.call.latents.noise.data),
        sum(0.f),
        run(0.f) {}

  __device__ __forceinline__ void set(const StepRow& step) {
    row = step;
    per_std = step.std == 0.f ? 0.f : 1.f / step.std;
  }

  __device__ __forceinline__ bool aligned(long long first) const {
    return output.aligned(first) && uncond.aligned(first) && sample.aligned(first) && next.aligned(first) &&
           stored.aligned(first) && mean.aligned(first) && residual.aligned(first);
  }

  // Of these the backward reads only a given x' again.
  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    output.template load<Cache::kStream>(raw.output, at);
    uncond.template load<Cache::kStream>(raw.uncond, at);
    sample.template load<Cache::kStream>(raw.sample, at);
    next.template load<Cache::kKeep>(raw.next, at);
  }

  template <int kCount>
  __device__ __forceinline__ void use(long long at, int, const Raw<kCount>& raw) {
    float v[kCount], w[kCount], x[kCount], mu[kCount], x_next[kCount];
    raw.output.get(v, output.dtype());
    raw.sample.get(x, sample.dtype());
    if (uncond.present) {
      raw.uncond.get(w, uncond.dtype());
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[j] = guided(row.guidance, v[j], w[j]);
    }
    raw.next.get(x_next, next.dtype());
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      mu[j] = mean_of(row.a, row.b, v[j], x[j]);
      if (draws) x_next[j] = fmaf(row.std, x_next[j], mu[j]);
    }
    mean.store(at, mu);
    if (stored.data) {
      Pack<kSample, kCount> pack;
      pack.set(x_next, stored.dtype());
      pack.store(stored.address(at), stored.dtype());
      pack.get(x_next, stored.dtype());  // the log-prob is that of the rounded x'
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float u = x_next[j] - mu[j];
      run = fmaf(u, u, run);
      // The residual of a deterministic row is 0 even if x' overflowed when it was rounded.
      x_next[j] = per_std == 0.f ? 0.f : u;
    }
    residual.store(at, x_next, per_std);
  }

  __device__ __forceinline__ void end_run() {
    sum += run;
    run = 0.f;
  }

 private:
  static __device__ __forceinline__ const Latent& next_of(const SdeStepLatents& latents) {
    return latents.noise.data ? latents.noise : latents.prev_sample;
  }
};

// Called by the one thread that has the row's q.
__device__ __noinline__ void write_row(const SdeStepForward& p, long long row, double q, StepRow step) {
  const SdeStep& call = p.call;
  const double n = static_cast<double>(call.numel), std = step.std;
  double log_prob = 0.0, coefficient = 0.0;
  if (call.sampler == kCpsSampler) {
    log_prob = -q / n;
    coefficient = 2.0 / n;
  } else if (std != 0.0) {
    const double constant = call.log_prob_normalizer ? log(std) + 0.91893853320467274178 : 0.0;  // log(2 pi)/2
    log_prob = -q / (n * 2.0 * (std * std)) - constant;
    coefficient = 1.0 / (n * (std * std));
  }
  p.log_prob[row] = static_cast<float>(log_prob);
  p.std[row] = step.std;
  p.numbers[kNumberLogProb * call.rows + row] = static_cast<float>(coefficient);
  p.numbers[kNumberVelocity * call.rows + row] = step.b;
  p.numbers[kNumberGuidance * call.rows + row] = step.guidance;
}

template <int kOutput, int kSample>
__device__ __forceinline__ void forward(const SdeStepForward& p) {
  SHARED(float, s_sums, kWarps);
  const SdeStep& call = p.call;
  const Part part = part_of_thread(call.rows, call.numel, p.splits);
  Step<kOutput, kSample> work(p);
  stream(work, part, [&] { work.set(shared_step(call.schedule, call.sampler, call.rows, part)); });
  float sum[1] = {work.sum};
  double q[1];
  if (!sum_row(part, p.splits, sum, s_sums, p.partials, p.tickets, q)) return;
  if (part.thread == 0 && part.row < call.rows) write_row(p, part.row, q[0], work.row);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <int kOutput, int kNext>
struct Gradient {
  Tensor<kFloat32> grad_mean, mean;
  Tensor<kNext> next;
  Target<kOutput> output, uncond;
  float log_prob, output_share, uncond_share;

  static constexpr bool kPrefetch = true;
  static constexpr int kVector = 8, kSteps = 1;
  template <int kCount>
  struct Raw {
    Pack<kFloat32, kCount> grad_mean, mean;
    Pack<kNext, kCount> next;
  };

  __device__ __forceinline__ Gradient(const SdeStepBackward& p, float log_prob, float b, float guidance)
      : grad_mean({p.grad_prev_sample_mean, kFloat32, 0}),
        mean({p.prev_sample_mean, kFloat32, 0}, log_prob != 0.f),
        next(p.prev_sample, log_prob != 0.f),
        output(p.grad_model_output),
        uncond(p.grad_uncond_output),
        log_prob(log_prob),
        output_share(b * guidance),
        uncond_share(fmaf(-b, guidance, b)) {}

  __device__ __forceinline__ bool aligned(long long first) const {
    return grad_mean.aligned(first) && mean.aligned(first) && next.aligned(first) && output.aligned(first) &&
           uncond.aligned(first);
  }

  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    grad_mean.template load<Cache::kStream>(raw.grad_mean, at);
    mean.template load<Cache::kStream>(raw.mean, at);
    next.template load<Cache::kStream>(raw.next, at);
  }

  template <int kCount>
  __device__ __forceinline__ void use(long long at, int, const Raw<kCount>& raw) const {
    float gradient[kCount], mu[kCount], x_next[kCount];
    raw.grad_mean.get(gradient, kFloat32);
    raw.mean.get(mu, kFloat32);
    raw.next.get(x_next, next.dtype());
#pragma unroll
    for (int j = 0; j < kCount; ++j) gradient[j] = fmaf(log_prob, x_next[j] - mu[j], gradient[j]);
    output.store(at, gradient, output_share);
    uncond.store(at, gradient, uncond_share);
  }
  __device__ __forceinline__ void end_run() const {}
};

template <int kOutput, int kNext>
__device__ __forceinline__ void backward(const SdeStepBackward& p) {
  const Part part = part_of_thread(p.rows, p.numel, p.splits);
  if (part.count == 0) return;
  // All loads first: waiting for them one by one would delay the block by 1 us.
  const float coefficient = p.numbers[kNumberLogProb * p.rows + part.row];
  const float b = p.numbers[kNumberVelocity * p.rows + part.row];
  const float guidance = p.numbers[kNumberGuidance * p.rows + part.row];
  const float upstream = p.grad_log_prob ? p.grad_log_prob[part.row] : 0.f;
  // 0 if the coefficient is 0, even if upstream is infinite or NaN.
  const float log_prob = coefficient == 0.f ? 0.f : upstream * coefficient;
  Gradient<kOutput, kNext> work(p, log_prob, b, guidance);
  stream(work, part, [] {});
}

}  // namespace sde_step

// ---- entry points --------------------------------------------------------------------------------------------------

// At least 2 blocks on a multiprocessor, as in policy_loss.cu.
#define SDE_STEP(variant, output, sample)                                      \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                    \
      sde_step_forward_##variant(const __grid_constant__ SdeStepForward p) {   \
    sde_step::forward<output, sample>(p);                                      \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                    \
      sde_step_backward_##variant(const __grid_constant__ SdeStepBackward p) { \
    sde_step::backward<output, sample>(p);                                     \
  }

SDE_STEP(f32, kFloat32, kFloat32)
SDE_STEP(bf16_f32, kBfloat16, kFloat32)
SDE_STEP(bf16, kBfloat16, kBfloat16)
SDE_STEP(f16, kFloat16, kFloat16)
SDE_STEP(mixed, kAny, kAny)
