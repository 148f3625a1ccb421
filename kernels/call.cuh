// The arguments of each kernel, field for field as in src/call.rs and src/call/, and how each kernel is launched.
//
// A null address means that the argument is absent. Latents are [rows, numel], contiguous, f32, bf16 or f16, at any
// alignment. Outputs alias nothing; inputs may alias one another.
//
// A kernel's name lists these dtypes, the last one also for the rest; `mixed` takes any. Latents may be absent in all.
//   policy_loss_{forward, backward}_{f32, bf16, f16, f32_bf16, f32_f16, mixed}: dtype of the mean, of other latents
//   policy_loss_{forward, backward}_step_{f32, bf16, f16, bf16_f32, bf16_f32_bf16, bf16_f32_f16, mixed}: dtype of model
//     outputs, of sample and prev_sample, of the old and the reference policy
//   sde_step_{forward, backward}_{f32, bf16_f32, bf16, f16, mixed}: dtype of model outputs, of sample. In the forward
//     prev_sample, noise and residual have any dtype
// A call is one launch. For latents sharded over GPUs a policy_loss forward is two: kSumsAlone writes only row_sums;
// the host adds them up over the shards; kObjectiveAlone reads row_sums and no latents (splits == 0).
//
// Launch: kThreads threads a block, no dynamic shared memory, rows and blocks below 2^31, and a grid of
//   rows * splits          if splits >= 1: block b takes split b % splits of row b / splits
//   ceil(rows / kWarps)    if splits == 0, for numel <= kShortRow: a warp takes a row
//   ceil(rows / kThreads)  for a policy_loss backward that writes grad_log_prob alone: a thread takes a row
// Of the launch only `splits` changes the bits of a result: a plan for the same bits on different GPUs must not depend
// on their number of multiprocessors.
// Tickets are 0 before and after a launch; launches that may run at the same time need different tickets.
#pragma once

#include "compat.cuh"

typedef long long Count;

// kAny is only a template argument: the dtype is known at run time.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kAny = -1 };

struct Latent {
  const void* data;
  int dtype;
  int pad;
};

// One number per row: `value` if data is null, else element (r / divide) % modulo of data for row r. With rows [B, S],
// (divide, modulo) is (1, S) for data [1, S], (S, B) for [B, 1], (1, 1) for a single element. dtype may be kFloat64.
struct RowVector {
  const void* data;
  double value;
  int dtype;
  int present;
  unsigned divide, modulo;
};

struct Latents {
  Latent prev_sample_mean;
  Latent model_output;
  Latent uncond_output;
  Latent sample;
  Latent prev_sample;
  Latent old_prev_sample_mean;  // at most one old_ and one ref_ latent is present
  Latent old_model_output;
  Latent old_residual;
  Latent ref_prev_sample_mean;
  Latent ref_model_output;
};

struct RowVectors {
  RowVector advantages;
  RowVector log_prob;
  RowVector old_log_prob;
  RowVector weights;
  RowVector std;  // std and sqrt_dt are ignored if there is a schedule
  RowVector sqrt_dt;
  RowVector ref_std;  // absent: std of the row
};

struct Schedule {
  RowVector sigma;
  RowVector sigma_next;
  RowVector noise_level;
  RowVector sigma_max;
  RowVector guidance_scale;  // absent: no guidance
};

struct SdeStepLatents {
  Latent model_output;
  Latent uncond_output;
  Latent sample;
  Latent prev_sample;  // either prev_sample or noise
  Latent noise;
};

enum Sampler : int { kNoSampler = 0, kFlowSde = 1, kDanceSde = 2, kCpsSampler = 3 };  // kNoSampler: no schedule
enum ObjectiveKind : int { kFlowDppo = 0, kFlowGrpo = 1, kGrpoGuard = 2 };
enum Mask : int { kMaskAsymmetric = 0, kMaskSymmetric = 1, kMaskNone = 2 };
enum KlDivisor : int { kGaussianKl = 0, kConstantKl = 1, kVelocityKl = 2 };  // (mu - mu_old)^2 over 2 std^2, 2, b^2
enum Density : int { kGaussian = 0, kCps = 1 };
enum LatentReduction : int { kLatentMean = 0, kLatentSum = 1 };
enum Reduction : int { kReduceMean = 0, kReduceSum = 1, kReduceNone = 2, kReduceKeptMean = 3 };
enum Stage : int { kWhole = 0, kSumsAlone = 1, kObjectiveAlone = 2 };

struct Objective {
  double kl_mask_threshold;
  double clip_low, clip_high;  // 1 - clip_low is computed in float64, then rounded to float32
  double adv_clip_max;         // infinity: no clamp
  int kind;
  int mask, kl_divisor;
  int keep_nan_kl, per_row_scale;
  int pad;
};

struct Settings {
  double ref_kl_weight;
  int sampler, density, latent_reduction, reduction;
};

struct PolicyLoss {
  Count rows, numel;
  Latents latents;
  RowVectors vectors;
  Schedule schedule;
  Objective objective;
  Settings settings;
};

struct PolicyLossForward {
  PolicyLoss call;
  float* loss;        // [], or [rows] with kReduceNone
  float* numbers;     // [kStepFields (with a schedule) or kFields, rows], then [kBatchCount]
  float* partials;    // [rows, max(splits, 1), 4], uninitialised; used if splits > 1 or needs_batch_means()
  unsigned* tickets;  // [rows + 1]
  double* row_sums;   // [4 rows + 1]: q, d, cross, f of each row, then the length of a row; used with sharded latents
  unsigned splits;
  int stage;
};

struct PolicyLossBackward {
  Count rows, numel;
  Latents latents;  // those whose coefficients may be nonzero
  RowVector grad_loss;
  const float* numbers;
  void* grad_output;         // [rows, numel], dtype of prev_sample_mean or model_output; null: not wanted
  void* grad_uncond_output;  // [rows, numel], dtype of uncond_output; null: not wanted
  float* grad_log_prob;      // [rows]; null: not wanted
  unsigned splits;
  int dtype;  // of numbers: kFloat32
};

// Rows of `numbers`.
enum Field : int {
  kLogProb,
  kLogRatio,
  kRatio,
  kKl,
  kKeep,
  kLoss,   // the row's policy loss, before any reduction
  kRefKl,  // mean or sum of (mu - mu_ref)^2 / (2 ref_std^2), without its weight
  // d loss / d mu, with a schedule d loss / d v, is (kCoefInnovation (x' - mu) + kCoefDrift (mu - mu_old)) /
  // kPolicyDivisor + kCoefRef (mu - mu_ref). d loss / d log_prob is kCoefLogProb / kPolicyDivisor.
  kCoefInnovation,
  kCoefDrift,
  kCoefRef,
  kCoefLogProb,
  // Only with a schedule: the row's `StepRow`, for the backward.
  kStepA,
  kStepB,
  kStepStd,
  kStepGuidance,
  kStepFields,
};
constexpr int kFields = kCoefLogProb + 1;

// The numbers that follow the rows: the divisor, then the metrics.
enum BatchNumber : int {
  kPolicyDivisor,
  kRatioMean,
  kRatioStd,
  kRatioMin,
  kRatioMax,
  kApproxKl,
  kPpoKl,
  kKlNewOldMean,
  kKlNewOldMax,
  kKlMaskFraction,
  kPosRmFraction,
  kNegRmFraction,
  kMaskedFraction,
  kUnmaskedFraction,
  kClipFraction,
  kClipfracGtOne,
  kClipfracLtOne,
  kNonfiniteFraction,
  kKlLoss,
  kBatchCount,
};

struct SdeStep {
  Count rows, numel;
  SdeStepLatents latents;
  Schedule schedule;
  int sampler;
  int log_prob_normalizer;  // whether log(std) + log(2 pi) / 2 is subtracted from a Gaussian log-prob
};

struct SdeStepForward {
  SdeStep call;
  void* stored;  // x' in the dtype of the sample; null if prev_sample is given in that dtype
  float* prev_sample_mean;
  Latent residual;    // absent: not wanted
  float* log_prob;    // [rows]
  float* std;         // [rows]
  float* numbers;     // [kSdeStepNumbers, rows]
  float* partials;    // [rows, splits], uninitialised; used if splits > 1
  unsigned* tickets;  // [rows]; used if splits > 1
  unsigned splits;
  int pad;
};

struct SdeStepBackward {
  Count rows, numel;
  Latent prev_sample;  // x' in the dtype of the sample
  const float* prev_sample_mean;
  const float* numbers;
  const float* grad_log_prob;          // [rows]; null: none
  const float* grad_prev_sample_mean;  // [rows, numel]; null: none
  Latent grad_model_output;            // absent: not wanted
  Latent grad_uncond_output;
  unsigned splits;
  int dtype;  // of numbers: kFloat32
};

// Rows of `numbers` of sde_step.
enum SdeStepNumber : int {
  kNumberLogProb,   // d log_prob / d mu = kNumberLogProb (x' - mu); 0 for a Gaussian if std is 0
  kNumberVelocity,  // d mu / d v
  kNumberGuidance,  // d v / d model_output; 1 without guidance
  kSdeStepNumbers,
};

// src/call.rs asserts the same sizes and offsets. NVRTC has no __builtin_offsetof; its __INTADDR__ does the same.
#ifdef __CUDACC_RTC__
#define OFFSET(type, field) __INTADDR__(&static_cast<type*>(nullptr)->field)
#else
#define OFFSET(type, field) __builtin_offsetof(type, field)
#endif
static_assert(sizeof(Latent) == 16 && sizeof(RowVector) == 32);
static_assert(OFFSET(RowVector, dtype) == 16 && OFFSET(RowVector, modulo) == 28);
static_assert(sizeof(Latents) == 160 && sizeof(SdeStepLatents) == 80);
static_assert(sizeof(RowVectors) == 224 && sizeof(Schedule) == 160);
static_assert(sizeof(Objective) == 56 && OFFSET(Objective, kind) == 32);
static_assert(sizeof(Settings) == 24 && OFFSET(Settings, reduction) == 20);
static_assert(sizeof(PolicyLoss) == 640 && OFFSET(PolicyLoss, objective) == 560);
static_assert(sizeof(PolicyLossForward) == 688 && OFFSET(PolicyLossForward, splits) == 680);
static_assert(sizeof(PolicyLossBackward) == 248 && OFFSET(PolicyLossBackward, numbers) == 208);
static_assert(sizeof(SdeStep) == 264 && OFFSET(SdeStep, sampler) == 256);
static_assert(sizeof(SdeStepForward) == 344 && OFFSET(SdeStepForward, splits) == 336);
static_assert(sizeof(SdeStepBackward) == 104 && OFFSET(SdeStepBackward, splits) == 96);
#undef OFFSET
