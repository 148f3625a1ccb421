// What crosses a launch of `sde_step`; src/cuda/sde_step.rs holds the twin of every struct, field for field.
//
// Forward, one launch: variants `sde_step_forward_{f32, bf16_f32, bf16, f16, mixed}`, named after the dtype of the
// model outputs and, where it differs, of the sample. `mixed` takes every mix of these; the next latent, or the noise,
// and the residual are of any dtype everywhere.
//   in    output, uncond, sample, next [rows, numel] f32|bf16|f16, contiguous, any alignment; row vectors of `Schedule`
//   out   stored [rows, numel] in the dtype of the sample; mean [rows, numel] f32; residual [rows, numel]
//         log_prob, std [rows] f32; numbers [kSdeStepNumbers, rows] f32
//   temp  partials [rows, splits] f32, uninitialised; needed where splits > 1
//         tickets [rows] u32, all zero before the launch and again after it; needed where splits > 1, by one launch at
//         a time
// Backward, one launch: `sde_step_backward_...` with the same names; the gradients have the dtype of the model outputs,
// `next` that of the sample.
//   in    next as it was stored, mean, numbers; grad_log_prob [rows] f32, grad_mean [rows, numel] f32
//   out   grad_output, grad_uncond [rows, numel]
// Outputs alias nothing; inputs may alias one another.
//
// Launch: blocks of kThreads, no dynamic shared memory, and a grid of
//   rows * splits          splits >= 1: block b takes split b % splits of row b / splits
//   ceil(rows / kWarps)    splits == 0: a warp takes a row. For short rows (numel <= kShortRow)
// The grid must fit into 31 bits. The bits of the results depend on `splits` and on nothing else in the launch.
#pragma once

#include "common/tensor.cuh"
#include "schedule.cuh"

// Rows of `numbers`, in order; twin of ops::sde_step::Number.
enum SdeStepNumber : int {
  kNumberLogProb,   // d log_prob / d mu_j = kNumberLogProb (x'_j - mu_j); 0 where the step is deterministic
  kNumberVelocity,  // d mu / d v
  kNumberGuidance,  // d v / d model_output; 1 without guidance
  kSdeStepNumbers,
};

struct SdeStepForward {
  Latent output, uncond, sample;  // uncond absent: no guidance
  Latent next;                    // the next latent, or the noise that draws it
  Schedule schedule;
  void* stored;  // null: the next latent is given, and as it is stored
  float* mean;
  void* residual;  // null: not wanted
  float* log_prob;
  float* std;
  float* numbers;
  float* partials;
  unsigned* tickets;
  long long rows, numel;
  int draws;       // whether `next` is noise
  int normalizer;  // whether log std + log(2 pi)/2 is taken off a Gaussian log-prob
  int residual_dtype;
  int splits;
};

struct SdeStepBackward {
  Latent next;
  const float* mean;
  const float* numbers;
  const float* grad_log_prob;  // null: none
  const float* grad_mean;      // null: none
  void* grad_output;           // null: not wanted
  void* grad_uncond;
  long long rows, numel;
  int output_dtype, uncond_dtype;
  int splits;
  int pad;
};

// The Rust side asserts the same numbers, so that a drift of either does not compile.
static_assert(sizeof(SdeStepForward) == 328 && sizeof(SdeStepBackward) == 96);
