// Schedule: sampler and noise levels -> a row's coefficients, mu = a x + b v, and its standard deviation.
//
// Twin of src/cpu/schedule.rs, line by line; formulas and sources stand in python/flowdppo_ops/reference.py.
// Formed in float64 from numbers of float32 and rounded once, so that every backend has the same coefficients.
#pragma once

#include "common/parts.cuh"
#include "common/rows.cuh"

struct Transition {
  double a, b, std;
  double sqrt_dt;
};

// Of one row. Some 60 operations of float64: by one thread of a block, not by all.
__device__ __noinline__ Transition transition_of(const Schedule& schedule, int sampler, long long row) {
  const double sigma = read_row(schedule.sigma, row), next = read_row(schedule.sigma_next, row);
  const double noise_level = read_row(schedule.noise_level, row);
  const double dt = next - sigma, sqrt_dt = sqrt(-dt);
  double a, b, std;
  if (sampler == kCpsSampler) {
    std = next * sinpi(0.5 * noise_level);  // not sin(): its reduction of large angles takes a stack
    const double r = sqrt(next * next - std * std);
    a = (1.0 - next) + r;
    b = -sigma * (1.0 - next) + (1.0 - sigma) * r;
  } else {
    double q = noise_level;
    if (sampler == kFlowSde) {
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

// What is needed of a row's step element by element.
struct StepRow {
  float a, b, std, guidance;
};

// The velocity with guidance, and the mean mu = a x + b v. `sde_step` and `step_loss` both form means with these two
// functions: a mean that the one recorded, given to the other as the old policy's, has a drift of exactly 0.
__device__ __forceinline__ float guided(float guidance, float output, float uncond) {
  return fmaf(guidance, output - uncond, uncond);
}
__device__ __forceinline__ float mean_of(float a, float b, float velocity, float sample) {
  return fmaf(b, velocity, a * sample);
}

__device__ __forceinline__ StepRow step_row(const Schedule& schedule, const Transition& t, long long row) {
  const double guidance = schedule.guidance_scale.present ? read_row(schedule.guidance_scale, row) : 1.0;
  return {static_cast<float>(t.a), static_cast<float>(t.b), static_cast<float>(t.std), static_cast<float>(guidance)};
}

// The same, formed by one thread for all that share the row. By all threads of the block.
__device__ __forceinline__ StepRow shared_step(const Schedule& schedule, int sampler, long long rows,
                                               const Part& part) {
  SHARED(StepRow, s_steps, kWarps);
  StepRow& s_step = s_steps[part.threads == kWarpSize ? threadIdx.x / kWarpSize : 0];
  if (part.thread == 0 && part.row < rows)
    s_step = step_row(schedule, transition_of(schedule, sampler, part.row), part.row);
  __syncthreads();
  return s_step;
}

// Nothing is random in such a row: noise level 0, or the last step of CPS.
__device__ __forceinline__ bool is_deterministic(const Transition& t) { return t.std == 0.0; }
