// Sums of a row -> ratio, mask or clip, loss, gradient coefficients; all rows -> loss and metrics. The formulas are as
// in src/cpu/objective.rs; their sources are in python/flowdppo_ops/reference.py. Arithmetic is float64. Numbers that
// the caller sees are rounded to float32 before they are compared, so that `keep` agrees with `kl` and `ratio`.
#pragma once

#include "common/numeric.cuh"
#include "common/reduce.cuh"
#include "schedule.cuh"

__device__ __forceinline__ bool has_schedule(const PolicyLoss& call) { return call.settings.sampler != kNoSampler; }

__device__ __forceinline__ bool has_old(const Latents& latents) {
  return latents.old_prev_sample_mean.data || latents.old_model_output.data || latents.old_residual.data;
}

__device__ __forceinline__ bool has_ref(const Latents& latents) {
  return latents.ref_prev_sample_mean.data || latents.ref_model_output.data;
}

__device__ __forceinline__ bool has_kl(const PolicyLoss& call) {
  return has_old(call.latents) && (call.vectors.std.present || has_schedule(call));
}

__device__ __forceinline__ float* batch_of(const PolicyLoss& call, float* numbers) {
  return numbers + (has_schedule(call) ? kStepFields : kFields) * call.rows;
}

struct GuardScale {
  double c;      // mean(sqrt_dt) mean(std / sqrt_dt)
  double outer;  // 1 / mean(sqrt_dt)^2
};

__device__ __forceinline__ bool needs_batch_means(const PolicyLoss& call) {
  return call.objective.kind == kGrpoGuard && !call.objective.per_row_scale;
}

// Whether a row is outside the trust region. kl == threshold is outside; NaN is, unless keep_nan_kl.
__device__ __forceinline__ bool is_high(const Objective& objective, double kl) {
  const double threshold = rounded(objective.kl_mask_threshold);
  return objective.kind == kFlowDppo && (kl >= threshold || (kl != kl && !objective.keep_nan_kl));
}

// Sums over the elements of a row; u = x' - mu, e = mu - mu_old, f = mu - mu_ref.
struct RowSums {
  double q;      // u^2
  double d;      // e^2
  double cross;  // e u
  double f;      // f^2
};

// `b` is d mu / d v; without a schedule 1, because the gradient is that of mu.
__device__ __forceinline__ Transition row_transition(const PolicyLoss& call, long long row) {
  if (has_schedule(call)) return transition_of(call.schedule, call.settings.sampler, row);
  return {0.0, 1.0, read_row(call.vectors.std, row), read_row(call.vectors.sqrt_dt, row)};
}

// Writes all fields of a row. `numel` is the length of a row over all shards.
__device__ __noinline__ void row_numbers(const PolicyLoss& call, long long row, RowSums sums, double numel,
                                         GuardScale guard, float* numbers) {
  const RowVectors& vectors = call.vectors;
  const Objective& objective = call.objective;
  const Settings& settings = call.settings;
  // kLatentMean divides by numel: multiplying with 1 / numel would miss a KL equal to the threshold by an ulp. With
  // kLatentSum the log-prob's normaliser counts once per element.
  const bool latent_sum = settings.latent_reduction == kLatentSum;
  const double divisor = latent_sum || numel == 0.0 ? 1.0 : numel;
  const double elements = latent_sum ? numel : 1.0;
  const double q = sums.q / divisor, d = sums.d / divisor, cross = sums.cross / divisor;
  const Transition transition = row_transition(call, row);
  const double std = transition.std, variance = std * std;
  // In a deterministic step quotients by a std of 0, and their gradients, are 0.
  const bool step = has_schedule(call), deterministic = step && is_deterministic(transition);
  const bool cps = settings.density == kCps, has_log_prob = vectors.log_prob.present;
  constexpr double kHalfLogTau = 0.91893853320467274178;  // log(2 pi) / 2
  // Each number is written at once: keeping all of them to the end would take registers.
  const auto write = [&](int field, double value) { numbers[field * call.rows + row] = static_cast<float>(value); };

  double log_prob;
  if (has_log_prob) {
    log_prob = read_row(vectors.log_prob, row);
  } else {
    const double gaussian = deterministic ? 0.0 : -q / (2.0 * variance) - elements * (log(std) + kHalfLogTau);
    log_prob = rounded(cps ? -q : gaussian);
  }
  write(kLogProb, log_prob);
  double log_ratio;
  if (vectors.old_log_prob.present) {
    log_ratio = rounded(log_prob - read_row(vectors.old_log_prob, row));
  } else {
    // (x' - mu_old)^2 - (x' - mu)^2 = 2 e u + e^2, which is exactly 0 if the means are equal.
    log_ratio = rounded(cps ? 2.0 * cross + d : deterministic ? 0.0 : (cross + 0.5 * d) / variance);
  }
  write(kLogRatio, log_ratio);

  double advantage = read_row(vectors.advantages, row);
  const double weights = vectors.weights.present ? read_row(vectors.weights, row) : 1.0;
  // ratio = exp((log_ratio + centre) scale). GRPO-Guard: scale = c, centre = d / (2 c^2); else scale = 1, centre = 0.
  double scale = 1.0, centre = 0.0, outer = 1.0;
  if (objective.kind == kGrpoGuard) {
    double c = guard.c;
    outer = guard.outer;
    if (objective.per_row_scale) {
      c = std;
      outer = 1.0 / (transition.sqrt_dt * transition.sqrt_dt);
    }
    scale = c;
    centre = step && c == 0.0 ? 0.0 : d / (2.0 * (c * c));
  }
  const double ratio = rounded(exp((log_ratio + centre) * scale));
  write(kRatio, ratio);
  // Without a KL the field is 0: NaN would count in kNonfiniteFraction.
  const double kl_divisor = objective.kl_divisor == kGaussianKl   ? 2.0 * variance
                            : objective.kl_divisor == kVelocityKl ? transition.b * transition.b
                                                                  : 2.0;
  const double kl = !has_kl(call) || (step && kl_divisor == 0.0) ? 0.0 : rounded(d / kl_divisor);
  write(kKl, kl);

  bool blocked;
  double blocked_loss = 0.0;
  if (objective.kind == kFlowDppo) {
    const bool away = (ratio > 1.0 && advantage > 0.0) || (ratio < 1.0 && advantage < 0.0);
    blocked = objective.mask != kMaskNone && is_high(objective, kl) && (objective.mask == kMaskSymmetric || away);
  } else {
    // `blocked`: the clipped term of max(-A ratio, -A clip(ratio)) is the larger one.
    const double lower = rounded(1.0 - objective.clip_low), upper = rounded(1.0 + objective.clip_high);
    const double limit = rounded(objective.adv_clip_max);
    advantage = advantage > limit ? limit : advantage < -limit ? -limit : advantage;
    blocked = (ratio > upper && advantage > 0.0) || (ratio < lower && advantage < 0.0);
    blocked_loss = -advantage * (ratio > upper ? upper : lower);
  }
  const double open_loss = -advantage * ratio * outer * weights;
  write(kKeep, blocked ? 0.0 : 1.0);
  write(kLoss, blocked ? blocked_loss * outer * weights : open_loss);

  // d loss / d log_ratio = loss scale, because the loss is proportional to exp((log_ratio + centre) scale).
  const double slope = blocked ? 0.0 : open_loss * scale;
  const bool no_innovation = has_log_prob || (deterministic && !cps);
  const bool no_drift = objective.kind != kGrpoGuard || (step && scale == 0.0);
  const double innovation = no_innovation ? 0.0 : slope * (cps ? 2.0 : 1.0 / variance) / divisor;
  const double drift = no_drift ? 0.0 : slope / (scale * scale * divisor);
  double ref_kl = 0.0, reference = 0.0;
  const double ref_std = vectors.ref_std.present ? read_row(vectors.ref_std, row) : std;
  if (has_ref(call.latents) && !(step && ref_std == 0.0)) {
    const double per_element = 1.0 / (ref_std * ref_std * divisor);
    const bool averaged = settings.reduction == kReduceMean || settings.reduction == kReduceKeptMean;
    ref_kl = 0.5 * sums.f * per_element;
    reference = settings.ref_kl_weight * per_element / (averaged ? static_cast<double>(call.rows) : 1.0);
  }

  write(kRefKl, ref_kl);
  write(kCoefInnovation, innovation * transition.b);
  write(kCoefDrift, drift * transition.b);
  write(kCoefRef, reference * transition.b);
  write(kCoefLogProb, slope);
  if (step) {
    const StepRow used = step_row(call.schedule, transition, row);
    float* fields = numbers + kStepA * call.rows + row;
    fields[0] = used.a;
    fields[call.rows] = used.b;
    fields[2 * call.rows] = used.std;
    fields[3 * call.rows] = used.guidance;
  }
}

__device__ __forceinline__ float row_loss(const PolicyLoss& call, const float* numbers, long long row) {
  const double ref_kl = numbers[kRefKl * call.rows + row];
  const double penalty = has_ref(call.latents) ? call.settings.ref_kl_weight * ref_kl : 0.0;
  return static_cast<float>(numbers[kLoss * call.rows + row] + penalty);
}

// ---- over all rows: one block, a thread takes every kThreads-th row ------------------------------------------------

// Summed in two passes over the rows: one would take more registers than the loop over the latents.
enum BatchSum : int {
  kSumRatio,
  kSumLogRatioSquares,
  kSumLogRatio,
  kSumKl,
  kSumHigh,
  kSumPosRemoved,
  kSumNegRemoved,
  kSumBlocked,
  kSumNonfinite,
  kSumRefKl,
  kSumPolicy,
  kBatchSums,
};
enum SecondBatchSum : int { kSumSquares, kSumAbove, kSumBelow, kSecondBatchSums };
enum BatchExtreme : int { kLargestRatio, kSmallestRatio, kLargestKl, kBatchExtremes };

// Shared memory for all block reductions of the forward, one after another with barriers between.
constexpr int kSharedNumbers = kBatchSums * kWarps;

// Returns the same in every thread.
__device__ __forceinline__ GuardScale guard_scale(const PolicyLoss& call, double* s_numbers) {
  double sums[2] = {0.0, 0.0};
#pragma unroll 1
  for (long long row = threadIdx.x; row < call.rows; row += kThreads) {
    const Transition transition = row_transition(call, row);
    sums[0] += transition.sqrt_dt;
    sums[1] += transition.std / transition.sqrt_dt;
  }
  block_reduce(sums, s_numbers);
  __syncthreads();
  if (threadIdx.x == 0) {
    s_numbers[0] = sums[0];
    s_numbers[1] = sums[1];
  }
  __syncthreads();
  const double rows = static_cast<double>(call.rows);
  const double sqrt_dt = s_numbers[0] / rows, ratio = s_numbers[1] / rows;
  __syncthreads();  // before s_numbers is overwritten
  return {sqrt_dt * ratio, 1.0 / (sqrt_dt * sqrt_dt)};
}

// Writes loss (unless kReduceNone), divisor and metrics from the rows of `numbers`.
__device__ __noinline__ void batch_numbers(const PolicyLoss& call, float* numbers, float* loss, double* s_numbers) {
  // Other blocks wrote the rows: __ldcg bypasses the L1.
  const auto at = [&](int field, long long row) -> double { return __ldcg(&numbers[field * call.rows + row]); };
  const Objective& objective = call.objective;
  const int reduction = call.settings.reduction;
  const bool clips = objective.kind != kFlowDppo, kept_only = reduction == kReduceKeptMean;
  double sums[kBatchSums] = {};
  const float lowest = -__uint_as_float(0x7f800000u);
  float extremes[kBatchExtremes] = {lowest, lowest, lowest};  // kSmallestRatio holds max(-ratio)

#pragma unroll 1
  for (long long row = threadIdx.x; row < call.rows; row += kThreads) {
    const double ratio = at(kRatio, row), log_ratio = at(kLogRatio, row), kl = at(kKl, row), policy = at(kLoss, row);
    const double advantage = read_row(call.vectors.advantages, row);
    const bool keep = at(kKeep, row) != 0.0;
    const bool finite = is_finite(log_ratio) && is_finite(ratio) && is_finite(policy) && is_finite(kl);
    sums[kSumRatio] += ratio;
    sums[kSumLogRatioSquares] += 0.5 * (log_ratio * log_ratio);
    sums[kSumLogRatio] -= log_ratio;
    sums[kSumKl] += kl;
    sums[kSumHigh] += is_high(objective, kl);
    sums[kSumPosRemoved] += !keep && advantage > 0.0;
    sums[kSumNegRemoved] += !keep && advantage < 0.0;
    sums[kSumBlocked] += !keep;
    sums[kSumNonfinite] += !finite;
    sums[kSumRefKl] += at(kRefKl, row);
    if (keep || !kept_only) sums[kSumPolicy] += policy;
    extremes[kLargestRatio] = nan_max(static_cast<float>(ratio), extremes[kLargestRatio]);
    extremes[kSmallestRatio] = nan_max(static_cast<float>(-ratio), extremes[kSmallestRatio]);
    extremes[kLargestKl] = nan_max(static_cast<float>(kl), extremes[kLargestKl]);
  }
  block_reduce(sums, s_numbers);
  __syncthreads();
  block_reduce(extremes, reinterpret_cast<float*>(s_numbers), lowest, NanMax());
  __syncthreads();

  const double rows = static_cast<double>(call.rows), inverse_rows = 1.0 / rows;
  float* batch = batch_of(call, numbers);
  const auto write = [&](int number, double value) { batch[number] = static_cast<float>(value); };
  const auto mean = [&](double sum) { return sum * inverse_rows; };
  if (threadIdx.x == 0) {
    const double kept = rows - sums[kSumBlocked], ref_kl = sums[kSumRefKl] / rows;
    const double divisor = reduction == kReduceMean ? rows : kept_only ? (kept > 1.0 ? kept : 1.0) : 1.0;
    s_numbers[0] = sums[kSumRatio] / rows;
    write(kPolicyDivisor, divisor);
    write(kRatioMean, s_numbers[0]);
    write(kRatioMin, -extremes[kSmallestRatio]);
    write(kRatioMax, extremes[kLargestRatio]);
    write(kApproxKl, mean(sums[kSumLogRatioSquares]));
    write(kPpoKl, mean(sums[kSumLogRatio]));
    write(kKlNewOldMean, mean(sums[kSumKl]));
    write(kKlNewOldMax, extremes[kLargestKl]);
    write(kKlMaskFraction, mean(sums[kSumHigh]));
    write(kPosRmFraction, mean(sums[kSumPosRemoved]));
    write(kNegRmFraction, mean(sums[kSumNegRemoved]));
    write(kMaskedFraction, mean(sums[kSumBlocked]));
    write(kUnmaskedFraction, mean(kept));
    write(kNonfiniteFraction, mean(sums[kSumNonfinite]));
    write(kKlLoss, ref_kl);
    if (reduction != kReduceNone) {
      const double penalty_rows = reduction == kReduceSum ? rows : 1.0;
      const double penalty = has_ref(call.latents) ? call.settings.ref_kl_weight * ref_kl * penalty_rows : 0.0;
      *loss = static_cast<float>(sums[kSumPolicy] / divisor + penalty);
    }
  }
  __syncthreads();
  const double ratio_mean = s_numbers[0];
  __syncthreads();  // before the sums of squares overwrite it

  // A second pass for the variance: E[r^2] - E[r]^2 loses all digits of a std of 1e-6 around a mean of 1.
  double second[kSecondBatchSums] = {};
#pragma unroll 1
  for (long long row = threadIdx.x; row < call.rows; row += kThreads) {
    const double ratio = at(kRatio, row), difference = ratio - ratio_mean;
    second[kSumSquares] += difference * difference;
    second[kSumAbove] += clips && rounded(ratio - 1.0) > rounded(objective.clip_high);
    second[kSumBelow] += clips && rounded(1.0 - ratio) > rounded(objective.clip_low);
  }
  block_reduce(second, s_numbers);
  if (threadIdx.x != 0) return;
  write(kRatioStd, call.rows > 1 ? sqrt(second[kSumSquares] / (rows - 1.0)) : 0.0);
  write(kClipFraction, mean(second[kSumAbove] + second[kSumBelow]));
  write(kClipfracGtOne, mean(second[kSumAbove]));
  write(kClipfracLtOne, mean(second[kSumBelow]));
}
