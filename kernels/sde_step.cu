// sde_step: the kernels behind `sde_step`. Shapes, dtypes and the launch are in call.cuh, a row's step in
// schedule.cuh.
//
// Forward. v = uncond + guidance (output - uncond), mu = a x + b v, x' = mu + std noise or given, rounded as it is
// stored; q = sum (x' - mu)^2 -> log-prob. One pass: mean, next latent and residual are written as they come, float32
// is added up per thread, by a fixed tree over the block, in float64 over the splits of a row. The block that finishes
// a row last writes its numbers. The same bits in whatever order blocks run.
//
// Backward. G = grad_mean + log_prob (x' - mu), the gradient of mu; the gradients are shares of it. Streaming. Where a
// row's log-prob has no coefficient x' and mu are not read.
#include "common/stream.cuh"
#include "common/tensor.cuh"
#include "schedule.cuh"

namespace sde_step {

// ---- forward -------------------------------------------------------------------------------------------------------

// One row's step, from some element on. `next` is of any dtype in every variant: a latent that was drawn with float32
// noise is summed in the same order when it is scored again.
template <int kOutput, int kSample>
struct Step {
  Tensor<kOutput> output, uncond;
  Tensor<kSample> sample;
  Tensor<kAny> next;
  Target<kSample> stored;
  Target<kFloat32> mean;
  Target<kAny> residual;
  float a, b, std, guidance, per_std;
  bool draws;
  float sum, run;  // of (x' - mu)^2: of all runs but this one, and of this one

  static constexpr bool kAhead = true;
  static constexpr int kVector = 8, kSteps = 1;  // one word of 16 bytes of a half, two of float32
  struct Raw {
    Pack<kOutput, kVector> output, uncond;
    Pack<kSample, kVector> sample;
    Pack<kAny, kVector> next;
  };

  __device__ __forceinline__ Step(const SdeStepForward& p, long long first, const StepRow& row)
      : output(p.call.latents.model_output, first),
        uncond(p.call.latents.uncond_output, first),
        sample(p.call.latents.sample, first),
        next(next_of(p.call.latents), first),
        stored(p.stored, p.call.latents.sample.dtype, first),
        mean(p.prev_sample_mean, kFloat32, first),
        residual(p.residual, first),
        a(row.a),
        b(row.b),
        std(row.std),
        guidance(row.guidance),
        per_std(row.std == 0.f ? 0.f : 1.f / row.std),
        draws(p.call.latents.noise.data),
        sum(0.f),
        run(0.f) {}

  __device__ __forceinline__ bool aligned() const {
    return output.aligned() && uncond.aligned() && sample.aligned() && next.aligned() && stored.aligned() &&
           mean.aligned() && residual.aligned();
  }

  // The backward reads a given x' again, and none of the others.
  __device__ __forceinline__ void load(Raw& raw, int vector) const {
    output.template load<Cache::kStream>(raw.output, vector);
    uncond.template load<Cache::kStream>(raw.uncond, vector);
    sample.template load<Cache::kStream>(raw.sample, vector);
    next.template load<Cache::kKeep>(raw.next, vector);
  }

  __device__ __forceinline__ void vector(int vector, int, const Raw& raw) {
    float v[kVector], w[kVector], x[kVector], mu[kVector], x_next[kVector];
    raw.output.get(v, output.dtype());
    raw.sample.get(x, sample.dtype());
    if (uncond.present()) {
      raw.uncond.get(w, uncond.dtype());
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] = guided(guidance, v[j], w[j]);
    }
    raw.next.get(x_next, next.dtype());
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      mu[j] = mean_of(a, b, v[j], x[j]);
      if (draws) x_next[j] = fmaf(std, x_next[j], mu[j]);
    }
    mean.store(vector, mu, 1.f);
    if (stored.data) {
      Pack<kSample, kVector> pack;
      pack.set(x_next, stored.dtype());
      pack.store(stored.data + static_cast<long long>(vector) * (kVector * dtype_size(stored.dtype())), stored.dtype());
      pack.get(x_next, stored.dtype());  // scored as stored
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) x_next[j] = innovation(x_next[j], mu[j]);
    if (residual.data) residual.store(vector, x_next, per_std);
  }

  __device__ __forceinline__ void element(int at) {
    float v = output.element(at, 0.f);
    if (uncond.present()) v = guided(guidance, v, uncond.element(at, 0.f));
    const float mu = mean_of(a, b, v, sample.element(at, 0.f));
    float x_next = next.element(at, 0.f);
    if (draws) x_next = fmaf(std, x_next, mu);
    mean.store_one(at, mu, 1.f);
    if (stored.data) {
      stored.store_one(at, x_next, 1.f);
      x_next = as_stored(stored.dtype(), x_next);
    }
    residual.store_one(at, innovation(x_next, mu), per_std);
  }

  __device__ __forceinline__ void advance(long long elements) {
    output.advance(elements);
    uncond.advance(elements);
    sample.advance(elements);
    next.advance(elements);
    stored.advance(elements);
    mean.advance(elements);
    residual.advance(elements);
    sum += run;
    run = 0.f;
  }

 private:
  // The next latent as given, or the noise that draws it.
  static __device__ __forceinline__ const Latent& next_of(const SdeStepLatents& latents) {
    return latents.noise.data ? latents.noise : latents.prev_sample;
  }

  // Counted in. 0 for a residual of a deterministic row, whose latent may have overflowed as it was stored.
  __device__ __forceinline__ float innovation(float x_next, float mu) {
    const float u = x_next - mu;
    run = fmaf(u, u, run);
    return per_std == 0.f ? 0.f : u;
  }
};

// Over the splits of a row, in float64: a thread of the first warp takes every 32nd, then a tree. Valid in that warp.
__device__ __forceinline__ double sum_of_splits(const float* partials, unsigned splits) {
  double sum[1] = {};
  if (threadIdx.x < kWarpSize) {
#pragma unroll 1
    for (unsigned split = threadIdx.x; split < splits; split += kWarpSize) sum[0] += __ldcg(partials + split);
    warp_reduce(sum);
  }
  return sum[0];
}

// By the one thread that has a row's sum of squares.
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
  const StepRow step = shared_step(call.schedule, call.sampler, call.rows, part);
  float sum[1] = {};
  if (part.count > 0) {
    Step<kOutput, kSample> work(p, part.row * call.numel + part.first, step);
    stream(work, part, [] {});
    sum[0] = work.sum;
  }

  if (p.splits == 0) {
    warp_reduce(sum);
    if (part.thread == 0 && part.row < call.rows) write_row(p, part.row, sum[0], step);
    return;
  }
  block_reduce(sum, s_sums);
  double q = sum[0];
  if (p.splits > 1) {
    float* partials = p.partials + part.row * p.splits;
    if (threadIdx.x == 0) partials[part.split] = sum[0];
    if (!comes_last(p.tickets + part.row, p.splits)) return;
    q = sum_of_splits(partials, p.splits);
  }
  if (threadIdx.x == 0) write_row(p, part.row, q, step);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The gradient of one row's mean, from some element on, and its shares.
template <int kOutput, int kNext>
struct Gradient {
  Tensor<kFloat32> grad_mean, mean;
  Tensor<kNext> next;
  Target<kOutput> output, uncond;
  float log_prob, output_share, uncond_share;

  static constexpr bool kAhead = true;
  static constexpr int kVector = 8, kSteps = 1;
  struct Raw {
    Pack<kFloat32, kVector> grad_mean, mean;
    Pack<kNext, kVector> next;
  };

  __device__ __forceinline__ Gradient(const SdeStepBackward& p, long long first, float log_prob, double b,
                                      double guidance)
      : grad_mean({p.grad_prev_sample_mean, kFloat32, 0}, first),
        mean({p.prev_sample_mean, kFloat32, 0}, first, log_prob != 0.f),
        next(p.prev_sample, first, log_prob != 0.f),
        output(p.grad_model_output, first),
        uncond(p.grad_uncond_output, first),
        log_prob(log_prob),
        output_share(static_cast<float>(b * guidance)),
        uncond_share(static_cast<float>(b * (1.0 - guidance))) {}

  __device__ __forceinline__ bool aligned() const {
    return grad_mean.aligned() && mean.aligned() && next.aligned() && output.aligned() && uncond.aligned();
  }

  __device__ __forceinline__ void load(Raw& raw, int vector) const {
    grad_mean.template load<Cache::kStream>(raw.grad_mean, vector);
    mean.template load<Cache::kStream>(raw.mean, vector);
    next.template load<Cache::kStream>(raw.next, vector);
  }

  __device__ __forceinline__ void vector(int vector, int, const Raw& raw) const {
    float gradient[kVector], mu[kVector], x_next[kVector];
    raw.grad_mean.get(gradient, kFloat32);
    raw.mean.get(mu, kFloat32);
    raw.next.get(x_next, next.dtype());
#pragma unroll
    for (int j = 0; j < kVector; ++j) gradient[j] = fmaf(log_prob, x_next[j] - mu[j], gradient[j]);
    if (output.data) output.store(vector, gradient, output_share);
    if (uncond.data) uncond.store(vector, gradient, uncond_share);
  }

  __device__ __forceinline__ void element(int at) const {
    const float gradient = fmaf(log_prob, next.element(at, 0.f) - mean.element(at, 0.f), grad_mean.element(at, 0.f));
    output.store_one(at, gradient, output_share);
    uncond.store_one(at, gradient, uncond_share);
  }

  __device__ __forceinline__ void advance(long long elements) {
    grad_mean.advance(elements);
    mean.advance(elements);
    next.advance(elements);
    output.advance(elements);
    uncond.advance(elements);
  }
};

template <int kOutput, int kNext>
__device__ __forceinline__ void backward(const SdeStepBackward& p) {
  const Part part = part_of_thread(p.rows, p.numel, p.splits);
  if (part.count == 0) return;
  // All loads first: waiting for one after the other would cost a block 1 us before it streams.
  const float coefficient = p.numbers[kNumberLogProb * p.rows + part.row];
  const float b = p.numbers[kNumberVelocity * p.rows + part.row];
  const float guidance = p.numbers[kNumberGuidance * p.rows + part.row];
  const float upstream = p.grad_log_prob ? p.grad_log_prob[part.row] : 0.f;
  // A coefficient of 0 stays 0, whatever it is multiplied with.
  const double log_prob = coefficient == 0.f ? 0.0 : static_cast<double>(upstream) * coefficient;
  Gradient<kOutput, kNext> work(p, part.row * p.numel + part.first, static_cast<float>(log_prob), b, guidance);
  stream(work, part, [] {});
}

}  // namespace sde_step

// ---- entry points --------------------------------------------------------------------------------------------------

// Two blocks on a multiprocessor at least, as for policy_loss.
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
