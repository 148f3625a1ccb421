// What crosses a launch: the twin of src/call.rs, field for field, and the launch that each kernel expects.
//
// An address of 0 means that an argument is absent. Latents are [rows, numel], contiguous, at any alignment, f32, bf16
// or f16; outputs alias nothing, inputs may alias one another.
//
// policy_loss, forward, one launch: variants `policy_loss_forward_{f32, bf16, f16, f32_bf16, f32_f16, mixed}` over
// given means, named after the dtype of the mean and, where it differs, of all other latents; `mixed` takes every mix.
// Over model outputs `policy_loss_forward_step_{f32, bf16, f16, bf16_f32, bf16_f32_bf16, bf16_f32_f16, mixed}`, after
// the dtype of the outputs, of the samples, and of the old and the reference policy. What is absent fits every variant.
//   Latents that are sharded over GPUs take two launches: kSumsAlone writes row_sums and nothing else, and when those
//   have been added up over the shards kObjectiveAlone reads them, and no latents (splits == 0).
// policy_loss, backward, one launch: `policy_loss_backward_...` with the same names.
// sde_step, one launch each way: `sde_step_{forward, backward}_{f32, bf16_f32, bf16, f16, mixed}`, named after the
// dtype of the model outputs and, where it differs, of the sample. The next latent, the noise and the residual are of
// any dtype everywhere.
//
// Launch: blocks of kThreads, no dynamic shared memory, and a grid of
//   rows * splits          splits >= 1: block b takes split b % splits of row b / splits
//   ceil(rows / kWarps)    splits == 0: a warp takes a row. For short rows (numel <= kShortRow), and for log-probs
//                          alone, where there is no mean and numel is 0
//   ceil(rows / kThreads)  backward of the log-probs alone: a thread takes a row
// The grid must fit into 31 bits. The bits of the results depend on `splits` and on nothing else in the launch, so a
// plan that must give the same bits on two GPUs must not ask for the number of multiprocessors.
// Tickets are all zero before a launch and again after it; two launches that may run at the same time (two streams)
// need tickets of their own.
#pragma once

#include "compat.cuh"

// Whole numbers of rows and elements; addresses that the host fills in as 64 bits.
typedef long long Count;

// kAny, for template arguments alone: known only at run time.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kAny = -1 };

struct Latent {
  const void* data;
  int dtype;
  int pad;
};

// data null: `value` for every row. Else row r has element (r / divide) % modulo: rows [B, S] read [1, S] with (1, S),
// [B, 1] with (S, B), a single element with (1, 1). dtype may be kFloat64.
struct RowVector {
  const void* data;
  double value;
  int dtype;
  int present;
  unsigned divide, modulo;
};

// The old policy comes in one of three forms, the reference policy in one of two: see `Form`.
struct Latents {
  Latent prev_sample_mean;
  Latent model_output;
  Latent uncond_output;
  Latent sample;
  Latent prev_sample;
  Latent old_prev_sample_mean;
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
  RowVector std;  // with a schedule, which says both, this one and the next are not looked at
  RowVector sqrt_dt;
  RowVector ref_std;  // absent: that of the transition
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
  Latent prev_sample;  // one of this and the next
  Latent noise;
};

// kNoSampler: means are given, there is no schedule.
enum Sampler : int { kNoSampler = 0, kFlowSde = 1, kDanceSde = 2, kCpsSampler = 3 };
enum ObjectiveKind : int { kFlowDppo = 0, kFlowGrpo = 1, kGrpoGuard = 2 };
enum Mask : int { kMaskAsymmetric = 0, kMaskSymmetric = 1, kMaskNone = 2 };
// What mean (mu - mu_old)^2 is divided by: 2 std^2, 2, or b^2.
enum KlDivisor : int { kGaussianKl = 0, kConstantKl = 1, kVelocityKl = 2 };
enum Density : int { kGaussian = 0, kCps = 1 };
enum LatentReduction : int { kLatentMean = 0, kLatentSum = 1 };
enum Reduction : int { kReduceMean = 0, kReduceSum = 1, kReduceNone = 2, kReduceKeptMean = 3 };
enum Stage : int { kWhole = 0, kSumsAlone = 1, kObjectiveAlone = 2 };

// Limits are float64: 1 - clip_low is formed first and rounded then, as everywhere else.
struct Objective {
  double kl_mask_threshold;
  double clip_low, clip_high;
  double adv_clip_max;  // infinite: advantages are not clamped
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
  float* loss;        // [] or, without a reduction, [rows]
  float* numbers;     // [kFields or, with a schedule, kStepFields, rows], then kBatchLen
  float* partials;    // [rows, max(splits, 1), 4], uninitialised; where splits > 1 or GRPO-Guard takes batch means
  unsigned* tickets;  // [rows + 1]
  double* row_sums;   // [4 rows + 1]: q, d, cross and f of each row, then its elements; null but for sharded latents
  unsigned splits;
  int stage;
};

struct PolicyLossBackward {
  Count rows, numel;
  Latents latents;  // those whose coefficients may not be 0
  RowVector grad_loss;
  const float* numbers;
  void* grad_output;         // of prev_sample_mean or model_output, in its dtype; null: not wanted
  void* grad_uncond_output;  // null: not wanted
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
  kRefKl,  // mean (mu - mu_ref)^2 / (2 ref_std^2), without its weight
  // G_j = kCoefInnovation (x'_j - mu_j) + kCoefDrift (mu_j - mu_old_j) + kCoefRef (mu_j - mu_ref_j) is d loss / d mu_j
  // or, with a schedule, d loss / d v_j; the first two, and kCoefLogProb = d loss / d log_prob, still to be divided by
  // the batch's divisor
  kCoefInnovation,
  kCoefDrift,
  kCoefRef,
  kCoefLogProb,
  // With a schedule the row's step as well, so that the backward needs no schedule: `StepRow`, in order.
  kStepA,
  kStepB,
  kStepStd,
  kStepGuidance,
  kStepFields,
};
constexpr int kFields = kCoefLogProb + 1;

// After the rows: the divisor, then the metrics.
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
  int log_prob_normalizer;  // whether log std + log(2 pi)/2 is taken off a Gaussian log-prob
};

struct SdeStepForward {
  SdeStep call;
  void* stored;  // in the dtype of the sample; null: the next latent is given, and as it is stored
  float* prev_sample_mean;
  Latent residual;    // absent: not wanted
  float* log_prob;    // [rows]
  float* std;         // [rows]
  float* numbers;     // [kSdeStepNumbers, rows]
  float* partials;    // [rows, splits], uninitialised; where splits > 1
  unsigned* tickets;  // [rows]; where splits > 1
  unsigned splits;
  int pad;
};

struct SdeStepBackward {
  Count rows, numel;
  Latent prev_sample;  // as it was stored, in the dtype of the sample
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
  kNumberLogProb,   // d log_prob / d mu_j = kNumberLogProb (x'_j - mu_j); 0 where the step is deterministic
  kNumberVelocity,  // d mu / d v
  kNumberGuidance,  // d v / d model_output; 1 without guidance
  kSdeStepNumbers,
};

// src/call.rs asserts the same numbers, so that a drift of either does not compile.
// NVRTC lacks the builtin that other compilers have, and folds an address with __INTADDR__.
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
