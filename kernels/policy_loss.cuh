// What crosses a launch of `policy_loss`; src/cuda/policy_loss.rs holds the twin of every struct, field for field.
//
// Forward, one launch: variants `policy_loss_forward_{f32, bf16, f16, f32_bf16, f32_f16, mixed}` over given means,
// named after the dtype of the mean and, where it differs, of all other latents; `mixed` takes every mix. Over model
// outputs `policy_loss_forward_step_{f32, bf16, f16, bf16_f32, bf16_f32_bf16, bf16_f32_f16, mixed}`, after the dtype of
// the outputs, of the samples, and of the old and the reference policy. What is absent fits every variant.
//   in    output, uncond, sample, next, old, ref [rows, numel] f32|bf16|f16, contiguous, any alignment; row vectors of
//         `Problem`. Given means: `output` is the mean, `uncond` and `sample` are absent
//   out   loss [] or, without a reduction, [rows] f32
//         numbers [kFields or, with a schedule, kStepFields, rows], then the policy's divisor and the metrics, f32
//   temp  partials [rows, max(splits, 1), 4] f32, uninitialised; needed where splits > 1 or GRPO-Guard takes batch
//   means
//         tickets [rows + 1] u32, all zero before the launch and again after it; of two launches that may run at the
//         same time (two streams) each needs its own
//   sharded latents, two launches with a sum over the shards between them:
//         row_sums [4 rows + 1] f64: q, d, cross and f of each row, then the elements of a row. kSumsAlone writes it
//         and nothing else; kObjectiveAlone reads it, and no latents (splits == 0)
// Backward, one launch: `policy_loss_backward_...` with the same names.
//   in    the latents whose coefficients may not be zero, numbers, grad_loss (one number or one per row)
//   out   grad_output, grad_uncond [rows, numel] in the dtypes of their latents; grad_log_prob [rows] f32
// Outputs alias nothing; inputs may alias one another.
//
// Launch: blocks of kThreads, no dynamic shared memory, and a grid of
//   rows * splits          splits >= 1: block b takes split b % splits of row b / splits
//   ceil(rows / kWarps)    splits == 0: a warp takes a row. For short rows (numel <= kShortRow), and for log-probs
//                          alone, where there is no mean and numel is 0
//   ceil(rows / kThreads)  backward of the log-probs alone: a thread takes a row
// The grid must fit into 31 bits. The bits of the results depend on `splits` and on nothing else in the launch, so a
// plan that must give the same bits on two GPUs must not ask for the number of multiprocessors.
#pragma once

#include "common/rows.cuh"
#include "common/tensor.cuh"
#include "schedule.cuh"

// Twin of ops::policy_loss::Latents.
struct Latents {
  Latent output, uncond, sample, next, old, ref;
};

enum ObjectiveKind : int { kFlowDppo = 0, kFlowGrpo = 1, kGrpoGuard = 2 };
enum Density : int { kGaussian = 0, kCps = 1 };
enum Reduction : int { kReduceMean = 0, kReduceSum = 1, kReduceNone = 2, kReduceKeptMean = 3 };
enum MaskKind : int { kMaskAsymmetric = 0, kMaskSymmetric = 1, kMaskNone = 2 };
// What mean (mu - mu_old)^2 is divided by: 2 std^2, 2, or b^2.
enum KlDivisor : int { kGaussianKl = 0, kConstantKl = 1, kVelocityKl = 2 };
// What `old` holds: mu_old, the old policy's v, or (x' - mu_old) / std. `ref` is never a residual.
enum Form : int { kMeanForm = 0, kOutputForm = 1, kResidualForm = 2 };
enum Stage : int { kWhole = 0, kSumsAlone = 1, kObjectiveAlone = 2 };

// Twin of objective::Problem.
struct Problem {
  long long rows, numel;
  // FlowDPPO's threshold is `low`. float64: 1 - low is formed first and rounded then, as everywhere else.
  double low, high;
  int objective, density;
  int latent_sum, reduction;
  int mask, kl_divisor;
  int keep_nan_kl, per_row_scale, has_kl, has_ref;
  int old_form, ref_form;
  float adv_clip_max, ref_kl_weight;
  RowVector advantages, log_prob, old_log_prob, weights;
  RowVector std, sqrt_dt;  // with a schedule not looked at: it says both
  RowVector ref_std;       // absent: that of the transition
  Schedule schedule;
};

struct PolicyLossForward {
  Latents latents;
  Problem problem;
  float* loss;
  float* numbers;
  float* partials;
  unsigned* tickets;
  double* row_sums;  // null but for sharded latents
  int splits, stage;
};

struct PolicyLossBackward {
  Latents latents;
  RowVector grad_loss;
  const float* numbers;
  void* grad_output;     // null: not wanted
  void* grad_uncond;     // null: not wanted
  float* grad_log_prob;  // null: not wanted
  int old_form, ref_form;
  int splits;
  int pad;
  long long rows, numel;
};

// The Rust side asserts the same numbers, so that a drift of either does not compile.
static_assert(sizeof(Latents) == 96 && sizeof(Problem) == 480);
static_assert(sizeof(PolicyLossForward) == 624 && sizeof(PolicyLossBackward) == 192);
