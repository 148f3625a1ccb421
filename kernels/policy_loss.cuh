// What crosses a launch of `policy_loss`; src/cuda/policy_loss.rs holds the twin of every struct, field for field.
//
// Forward, one launch: variants `policy_loss_forward_{f32, bf16, f16, f32_bf16, f32_f16, mixed}`, named after the dtype
// of the mean and, where it differs, of all other latents. `mixed` takes every mix; what is absent fits every variant.
//   in    mean, next, old, ref [rows, numel] f32|bf16|f16, contiguous, any alignment; row vectors of `Problem`
//   out   loss [] or, without a reduction, [rows] f32
//         numbers [kFields, rows], then the policy's divisor and the metrics, f32
//   temp  partials [rows, max(splits, 1), 4] f32, uninitialised; needed where splits > 1 or GRPO-Guard takes batch
//   means
//         tickets [rows + 1] u32, all zero before the launch and again after it; of two launches that may run at the
//         same time (two streams) each needs its own
// Backward, one launch: `policy_loss_backward_...` with the same names.
//   in    the latents whose coefficients may not be zero, numbers, grad_loss (one number or one per row)
//   out   grad_mean [rows, numel] in the dtype of the mean; grad_log_prob [rows] f32
// Outputs alias nothing; inputs may alias one another.
//
// Launch: blocks of kThreads, no dynamic shared memory, and a grid of
//   rows * splits          splits >= 1: block b takes split b % splits of row b / splits
//   ceil(rows / kWarps)    splits == 0: a warp takes a row. For short rows (numel <= kShortRow), and for log-probs
//                          alone, where there is no mean and numel is 0
//   ceil(rows / kThreads)  backward without grad_mean: a thread takes a row
// The grid must fit into 31 bits. The bits of the results depend on `splits` and on nothing else in the launch, so a
// plan that must give the same bits on two GPUs must not ask for the number of multiprocessors.
#pragma once

#include "common/rows.cuh"
#include "common/tensor.cuh"

enum ObjectiveKind : int { kFlowDppo = 0, kFlowGrpo = 1, kGrpoGuard = 2 };
enum Density : int { kGaussian = 0, kCps = 1 };
enum Reduction : int { kReduceMean = 0, kReduceSum = 1, kReduceNone = 2, kReduceKeptMean = 3 };
enum MaskKind : int { kMaskAsymmetric = 0, kMaskSymmetric = 1, kMaskNone = 2 };

// Twin of objective::Problem.
struct Problem {
  long long rows, numel;
  // FlowDPPO's threshold is `low`. float64: 1 - low is formed first and rounded then, as everywhere else.
  double low, high;
  int objective, density;
  int latent_sum, reduction;
  int mask;
  int normalize_kl, keep_nan_kl, per_row_scale, has_kl, has_ref;
  float adv_clip_max, ref_kl_weight;
  RowVector advantages, log_prob, old_log_prob, weights, std, sqrt_dt, ref_std;
};

struct PolicyLossForward {
  Latent mean, next, old, ref;
  Problem problem;
  float* loss;
  float* numbers;
  float* partials;
  unsigned* tickets;
  int splits;
  int pad;
};

struct PolicyLossBackward {
  Latent mean, next, old, ref;
  RowVector grad_loss;
  const float* numbers;
  void* grad_mean;  // null: not wanted
  int grad_dtype;
  int splits;
  float* grad_log_prob;  // null: not wanted
  long long rows, numel;
};

// The Rust side asserts the same numbers, so that a drift of either does not compile.
static_assert(sizeof(Problem) == 304);
static_assert(sizeof(PolicyLossForward) == 408 && sizeof(PolicyLossBackward) == 144);
