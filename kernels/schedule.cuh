// Schedule: sampler and noise levels -> a row's coefficients, mu = a x + b v, and its standard deviation.
//
// Twin of src/transition/schedule.rs, line by line; formulas and sources stand in python/flowdppo_ops/reference.py.
// Formed in float64 from numbers of float32 and rounded once, so that every backend has the same coefficients.
#pragma once

#include "common/parts.cuh"
#include "common/rows.cuh"

// kNoSampler: means are given, there is no schedule.
enum Sampler : int { kNoSampler = 0, kFlowSde = 1, kDanceSde = 2, kCpsSampler = 3 };

struct Schedule {
  RowVector sigma, sigma_next, noise_level, sigma_max;
  RowVector guidance;  // absent: no guidance
  int sampler;
  int pad;
};
static_assert(sizeof(Schedule) == 168);

struct Transition {
  double a, b, std;
  double sqrt_dt;
};

// Of one row. Some 60 operations of float64: by one thread of a block, not by all.
__device__ __noinline__ Transition transition_of(const Schedule& schedule, long long row) {
  const double sigma = read_row(schedule.sigma, row), next = read_row(schedule.sigma_next, row);
  const double noise_level = read_row(schedule.noise_level, row);
  const double dt = next - sigma, sqrt_dt = sqrt(-dt);
  double a, b, std;
  if (schedule.sampler == kCpsSampler) {
    std = next * sinpi(0.5 * noise_level);  // not sin(): its reduction of large angles takes a stack
    const double r = sqrt(next * next - std * std);
    a = (1.0 - next) + r;
    b = -sigma * (1.0 - next) + (1.0 - sigma) * r;
  } else {
    double q = noise_level;
    if (schedule.sampler == kFlowSde) {
      const double below_one = sigma == 1.0 ? read_row(schedule.sigma_max, row) : sigma;
      q *= sqrt(sigma / (1.0 - below_one));
    }
    const double half_rate = q * q / (2.0 * sigma);
    a = 1.0 + half_rate * dt;
    b = (1.0 + half_rate * (1.0 - sigma)) * dt;
    std = q * sqrt_dt;
  }
  return {rounded(a), rounded(b), rounded(std), rounded(sqrt_dt)};
}

// What is needed of a row's step element by element; v = uncond + guidance (output - uncond).
struct StepRow {
  float a, b, std, guidance;
};

__device__ __forceinline__ StepRow step_row(const Schedule& schedule, const Transition& t, long long row) {
  const double guidance = schedule.guidance.present ? read_row(schedule.guidance, row) : 1.0;
  return {static_cast<float>(t.a), static_cast<float>(t.b), static_cast<float>(t.std), static_cast<float>(guidance)};
}

// The same, formed by one thread for all that share the row. By all threads of the block.
__device__ __forceinline__ StepRow shared_step(const Schedule& schedule, long long rows, const Part& part) {
  SHARED(StepRow, s_steps, kWarps);
  StepRow& s_step = s_steps[part.threads == kWarpSize ? threadIdx.x / kWarpSize : 0];
  if (part.thread == 0 && part.row < rows) s_step = step_row(schedule, transition_of(schedule, part.row), part.row);
  __syncthreads();
  return s_step;
}

// Nothing is random in such a row: noise level 0, or the last step of CPS.
__device__ __forceinline__ bool is_deterministic(const Transition& t) { return t.std == 0.0; }
