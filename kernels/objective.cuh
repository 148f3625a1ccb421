// Objective: a row's few numbers -> ratio, mask or clip, loss, gradient coefficients; all rows -> loss and metrics.
//
// Twin of src/objective.rs, line by line; the formulas and their sources stand in python/flowdppo_ops/reference.py.
// Arithmetic is float64, a few dozen operations a row, and every number that the caller can see is rounded to float32
// *before* it is compared with anything: `kl`, `ratio` and `keep` never contradict each other, and masks agree with
// the CPU backend to the bit.
#pragma once

#include "common/numeric.cuh"
#include "common/reduce.cuh"
#include "policy_loss.cuh"
#include "schedule.cuh"

// Rows of `numbers`, in order.
enum Field : int {
  kLogProb,
  kLogRatio,
  kRatio,
  kKl,
  kKeep,
  kLoss,   // the row's policy loss, before any reduction
  kRefKl,  // mean (mu - mu_ref)^2 / (2 ref_std^2), without its weight
  // G_j = kCoefInnovation (x'_j - mu_j) + kCoefDrift (mu_j - mu_old_j) + kCoefRef (mu_j - mu_ref_j) is d loss / d mu_j,
  // or, with a schedule, d loss / d v_j; the first two, and kCoefLogProb = d loss / d log_prob, still to be divided by
  // the batch's divisor
  kCoefInnovation,
  kCoefDrift,
  kCoefRef,
  kCoefLogProb,
  kFields,
  // With a schedule the row's step as well, so that the backward needs no schedule: `StepRow`, in order.
  kStepA = kFields,
  kStepB,
  kStepStd,
  kStepGuidance,
  kStepFields,
};

// After the rows: the divisor, then the metrics in the order of objective::METRICS.
enum BatchNumber : int {
  kPolicyDivisor,
  kRatioMean,
  kRatioStd,
  kRatioMin,
  kRatioMax,
  kApproxKl,
  kPpoKl,
  kKlMean,
  kKlMax,
  kHighFraction,
  kPosRemovedFraction,
  kNegRemovedFraction,
  kMaskedFraction,
  kUnmaskedFraction,
  kClipFraction,
  kClipAboveFraction,
  kClipBelowFraction,
  kNonfiniteFraction,
  kKlLoss,
  kBatchLen,
};

__device__ __forceinline__ bool has_schedule(const Problem& problem) { return problem.schedule.sampler != kNoSampler; }

__device__ __forceinline__ float* batch_of(const Problem& problem, float* numbers) {
  return numbers + (has_schedule(problem) ? kStepFields : kFields) * problem.rows;
}

// GRPO-Guard's batch means, taken before any row is looked at.
struct GuardScale {
  double c;      // mean(sqrt_dt) mean(std / sqrt_dt)
  double outer;  // 1 / mean(sqrt_dt)^2
};

// Whether rows must wait for the whole batch.
__device__ __forceinline__ bool needs_batch_means(const Problem& problem) {
  return problem.objective == kGrpoGuard && !problem.per_row_scale;
}

// High means outside the trust region: equality counts, and NaN as the objective says.
__device__ __forceinline__ bool is_high(const Problem& problem, double kl) {
  return problem.objective == kFlowDppo && (kl >= rounded(problem.low) || (kl != kl && !problem.keep_nan_kl));
}

// Sums over a row's latents, of u = x' - mu, e = mu - mu_old and f = mu - mu_ref.
struct RowSums {
  double q;      // u^2
  double d;      // e^2
  double cross;  // e u; p of the formulas is cross + d
  double f;      // f^2
};

// What a row's sums are measured with. Of a mean that is given, `b`, the derivative with respect to it, is 1.
__device__ __forceinline__ Transition row_transition(const Problem& problem, long long row) {
  if (has_schedule(problem)) return transition_of(problem.schedule, row);
  return {0.0, 1.0, read_row(problem.std, row), read_row(problem.sqrt_dt, row)};
}

// One row, before any reduction over rows. `numel`: the elements that were summed, over all shards.
__device__ __noinline__ void row_numbers(const Problem& problem, long long row, RowSums sums, double numel,
                                         GuardScale guard, float* numbers) {
  // "mean": per-element numbers; "sum": joint ones, where the normaliser counts once per element. Divided, not
  // multiplied with 1 / numel: that misses a KL equal to its threshold by an ulp.
  const double divisor = problem.latent_sum || numel == 0.0 ? 1.0 : numel;
  const double elements = problem.latent_sum ? numel : 1.0;
  const double q = sums.q / divisor, d = sums.d / divisor, cross = sums.cross / divisor;
  const Transition transition = row_transition(problem, row);
  const double std = transition.std, variance = std * std;
  // A step may have no randomness in it: what would be divided by 0 is 0 then, and so is its gradient.
  const bool step = has_schedule(problem), fixed = step && is_deterministic(transition);
  const bool cps = problem.density == kCps, given = problem.log_prob.present;
  constexpr double kHalfLogTau = 0.91893853320467274178;  // log(2 pi) / 2

  double log_prob;
  if (given) {
    log_prob = read_row(problem.log_prob, row);
  } else {
    const double gaussian = fixed ? 0.0 : -q / (2.0 * variance) - elements * (log(std) + kHalfLogTau);
    log_prob = rounded(cps ? -q : gaussian);
  }
  double log_ratio;
  if (problem.old_log_prob.present) {
    log_ratio = rounded(log_prob - read_row(problem.old_log_prob, row));
  } else {
    // p / std^2 - d / (2 std^2) with p = cross + d; exactly 0 when the means are equal.
    log_ratio = rounded(cps ? 2.0 * cross + d : fixed ? 0.0 : (cross + 0.5 * d) / variance);
  }

  double advantage = read_row(problem.advantages, row);
  const double weights = problem.weights.present ? read_row(problem.weights, row) : 1.0;
  // exponent = (log_ratio + drift / (2 c^2)) scale; scale is 1 and the drift absent but for GRPO-Guard.
  double scale = 1.0, centre = 0.0, outer = 1.0;
  if (problem.objective == kGrpoGuard) {
    double c = guard.c;
    outer = guard.outer;
    if (problem.per_row_scale) {
      c = std;
      outer = 1.0 / (transition.sqrt_dt * transition.sqrt_dt);
    }
    scale = c;
    centre = step && c == 0.0 ? 0.0 : d / (2.0 * (c * c));
  }
  const double ratio = rounded(exp((log_ratio + centre) * scale));
  // What is absent is 0, not NaN: nobody is shown it.
  const double kl_divisor = problem.kl_divisor == kGaussianKl   ? 2.0 * variance
                            : problem.kl_divisor == kVelocityKl ? transition.b * transition.b
                                                                : 2.0;
  const double kl = !problem.has_kl || (step && kl_divisor == 0.0) ? 0.0 : rounded(d / kl_divisor);

  bool blocked;
  double blocked_loss = 0.0;
  if (problem.objective == kFlowDppo) {
    const bool away = (ratio > 1.0 && advantage > 0.0) || (ratio < 1.0 && advantage < 0.0);
    blocked = problem.mask != kMaskNone && is_high(problem, kl) && (problem.mask == kMaskSymmetric || away);
  } else {
    // The larger surrogate is the clipped one exactly when the ratio left the range on the side that the advantage
    // favours.
    const double lower = rounded(1.0 - problem.low), upper = rounded(1.0 + problem.high);
    const double limit = problem.adv_clip_max;
    advantage = advantage > limit ? limit : advantage < -limit ? -limit : advantage;
    blocked = (ratio > upper && advantage > 0.0) || (ratio < lower && advantage < 0.0);
    blocked_loss = -advantage * (ratio > upper ? upper : lower);
  }
  const double open_loss = -advantage * ratio * outer * weights;
  const double loss = blocked ? blocked_loss * outer * weights : open_loss;

  // d loss / d exponent is the loss itself (it is minus A exp(exponent)), and 0 when blocked.
  const double slope = blocked ? 0.0 : open_loss * scale;
  const bool still = given || (fixed && !cps), no_drift = problem.objective != kGrpoGuard || (step && scale == 0.0);
  const double innovation = still ? 0.0 : slope * (cps ? 2.0 : 1.0 / variance) / divisor;
  const double drift = no_drift ? 0.0 : slope / (scale * scale * divisor);
  double ref_kl = 0.0, reference = 0.0;
  const double ref_std = problem.ref_std.present ? read_row(problem.ref_std, row) : std;
  if (problem.has_ref && !(step && ref_std == 0.0)) {
    const double per_element = 1.0 / (ref_std * ref_std * divisor);
    const bool averaged = problem.reduction == kReduceMean || problem.reduction == kReduceKeptMean;
    ref_kl = 0.5 * sums.f * per_element;
    reference = problem.ref_kl_weight * per_element / (averaged ? static_cast<double>(problem.rows) : 1.0);
  }

  const double b = transition.b;
  const double out[kFields] = {log_prob,       log_ratio, ratio,         kl,   blocked ? 0.0 : 1.0, loss, ref_kl,
                               innovation * b, drift * b, reference * b, slope};
#pragma unroll
  for (int field = 0; field < kFields; ++field) numbers[field * problem.rows + row] = static_cast<float>(out[field]);
  if (step) {
    const StepRow used = step_row(problem.schedule, transition, row);
    float* fields = numbers + kStepA * problem.rows + row;
    fields[0] = used.a;
    fields[problem.rows] = used.b;
    fields[2 * problem.rows] = used.std;
    fields[3 * problem.rows] = used.guidance;
  }
}

// The row's own loss, for a call without a reduction.
__device__ __forceinline__ float row_loss(const Problem& problem, const float* numbers, long long row) {
  const double penalty = problem.has_ref ? numbers[kRefKl * problem.rows + row] : 0.0;
  return static_cast<float>(numbers[kLoss * problem.rows + row] + problem.ref_kl_weight * penalty);
}

// ---- over all rows: one block, a thread takes every kThreads-th row ------------------------------------------------

// What is added up over the rows.
enum BatchSum : int {
  kSumRatio,
  kSumLogRatioSquares,
  kSumLogRatio,
  kSumKl,
  kSumHigh,
  kSumPosRemoved,
  kSumNegRemoved,
  kSumBlocked,
  kSumAbove,
  kSumBelow,
  kSumNonfinite,
  kSumRefKl,
  kSumPolicy,
  kBatchSums,
};
enum BatchExtreme : int { kLargestRatio, kSmallestRatio, kLargestKl, kBatchExtremes };

// Shared memory of the functions below, and of the block's sums; never two at a time without a barrier between them.
constexpr int kSharedNumbers = kBatchSums * kWarps;

// Valid in every thread.
__device__ __forceinline__ GuardScale guard_scale(const Problem& problem, double* s_numbers) {
  double sums[2] = {0.0, 0.0};
#pragma unroll 1
  for (long long row = threadIdx.x; row < problem.rows; row += kThreads) {
    const Transition transition = row_transition(problem, row);
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
  const double rows = static_cast<double>(problem.rows);
  const double sqrt_dt = s_numbers[0] / rows, ratio = s_numbers[1] / rows;
  __syncthreads();  // before anyone overwrites them
  return {sqrt_dt * ratio, 1.0 / (sqrt_dt * sqrt_dt)};
}

// Loss (but for kReduceNone), divisor and metrics, from the finished rows of `numbers`.
__device__ __noinline__ void batch_numbers(const Problem& problem, float* numbers, float* loss, double* s_numbers) {
  // Other blocks wrote the rows, so they are read past the first-level cache.
  const auto at = [&](int field, long long row) -> double { return __ldcg(&numbers[field * problem.rows + row]); };
  const bool clips = problem.objective != kFlowDppo, kept_only = problem.reduction == kReduceKeptMean;
  double sums[kBatchSums] = {};
  const float lowest = -__uint_as_float(0x7f800000u);
  float extremes[kBatchExtremes] = {lowest, lowest, lowest};  // the smallest ratio negated

#pragma unroll 1
  for (long long row = threadIdx.x; row < problem.rows; row += kThreads) {
    const double ratio = at(kRatio, row), log_ratio = at(kLogRatio, row), kl = at(kKl, row), policy = at(kLoss, row);
    const double advantage = read_row(problem.advantages, row);
    const bool keep = at(kKeep, row) != 0.0;
    const bool finite = is_finite(log_ratio) && is_finite(ratio) && is_finite(policy) && is_finite(kl);
    sums[kSumRatio] += ratio;
    sums[kSumLogRatioSquares] += 0.5 * (log_ratio * log_ratio);
    sums[kSumLogRatio] -= log_ratio;
    sums[kSumKl] += kl;
    sums[kSumHigh] += is_high(problem, kl);
    sums[kSumPosRemoved] += !keep && advantage > 0.0;
    sums[kSumNegRemoved] += !keep && advantage < 0.0;
    sums[kSumBlocked] += !keep;
    sums[kSumAbove] += clips && rounded(ratio - 1.0) > rounded(problem.high);
    sums[kSumBelow] += clips && rounded(1.0 - ratio) > rounded(problem.low);
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
  if (threadIdx.x == 0) s_numbers[0] = sums[kSumRatio];
  __syncthreads();
  const double rows = static_cast<double>(problem.rows), ratio_mean = s_numbers[0] / rows;
  __syncthreads();  // before the sums of squares overwrite it

  // Two passes: E[r^2] - E[r]^2 loses all digits of a std of 1e-6 around a mean of 1.
  double squares[1] = {0.0};
#pragma unroll 1
  for (long long row = threadIdx.x; row < problem.rows; row += kThreads) {
    const double difference = at(kRatio, row) - ratio_mean;
    squares[0] += difference * difference;
  }
  block_reduce(squares, s_numbers);
  if (threadIdx.x != 0) return;

  const double kept = rows - sums[kSumBlocked], ref_kl = sums[kSumRefKl] / rows;
  const double divisor = problem.reduction == kReduceMean ? rows : kept_only ? (kept > 1.0 ? kept : 1.0) : 1.0;
  float* batch = batch_of(problem, numbers);
  const auto write = [&](int number, double value) { batch[number] = static_cast<float>(value); };
  const double inverse_rows = 1.0 / rows;
  const auto mean = [&](double sum) { return sum * inverse_rows; };
  write(kPolicyDivisor, divisor);
  write(kRatioMean, ratio_mean);
  write(kRatioStd, problem.rows > 1 ? sqrt(squares[0] / (rows - 1.0)) : 0.0);
  write(kRatioMin, -extremes[kSmallestRatio]);
  write(kRatioMax, extremes[kLargestRatio]);
  write(kApproxKl, mean(sums[kSumLogRatioSquares]));
  write(kPpoKl, mean(sums[kSumLogRatio]));
  write(kKlMean, mean(sums[kSumKl]));
  write(kKlMax, extremes[kLargestKl]);
  write(kHighFraction, mean(sums[kSumHigh]));
  write(kPosRemovedFraction, mean(sums[kSumPosRemoved]));
  write(kNegRemovedFraction, mean(sums[kSumNegRemoved]));
  write(kMaskedFraction, mean(sums[kSumBlocked]));
  write(kUnmaskedFraction, mean(kept));
  write(kClipFraction, mean(sums[kSumAbove] + sums[kSumBelow]));
  write(kClipAboveFraction, mean(sums[kSumAbove]));
  write(kClipBelowFraction, mean(sums[kSumBelow]));
  write(kNonfiniteFraction, mean(sums[kSumNonfinite]));
  write(kKlLoss, ref_kl);
  if (problem.reduction != kReduceNone) {
    const double penalty_rows = problem.reduction == kReduceSum ? rows : 1.0;
    const double penalty = problem.has_ref ? problem.ref_kl_weight * ref_kl * penalty_rows : 0.0;
    *loss = static_cast<float>(sums[kSumPolicy] / divisor + penalty);
  }
}
