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

// Some 40 operations of float64, of which a consumer GPU has 1/64 of the rate: by one warp of a block, not by all.
__device__ __forceinline__ Transition transition(int sampler, double sigma, double next, double noise_level,
                                                 double sigma_max) {
  const double dt = next - sigma;
  double a, b, std;
  if (sampler == kCpsSampler) {
    std = next * sinpi(0.5 * noise_level);  // not sin(): its reduction of large angles takes a stack
    const double r = sqrt(next * next - std * std);
    a = (1.0 - next) + r;
    b = -sigma * (1.0 - next) + (1.0 - sigma) * r;
  } else {
    // q^2 = noise_level^2 sigma / divisor, with the same divisor in the std: one division and one root.
    const bool flow = sampler == kFlowSde;
    const double inverse = 1.0 / (flow ? 1.0 - (sigma == 1.0 ? sigma_max : sigma) : sigma);
    const double half_rate = 0.5 * (noise_level * noise_level) * inverse;
    a = 1.0 + half_rate * dt;
    b = (1.0 + half_rate * (1.0 - sigma)) * dt;
    std = noise_level * sqrt(flow ? -dt * sigma * inverse : -dt);
  }
  return {a, b, std, sqrt(-dt)};
}

// Of one row.
__device__ __noinline__ Transition transition_of(const Schedule& schedule, int sampler, long long row) {
  const Transition t = transition(sampler, read_row(schedule.sigma, row), read_row(schedule.sigma_next, row),
                                  read_row(schedule.noise_level, row), read_row(schedule.sigma_max, row));
  return {rounded(t.a), rounded(t.b), rounded(t.std), rounded(t.sqrt_dt)};
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

// The same, formed by the first warp of those that share the row. By all threads of the block.
__device__ __forceinline__ StepRow shared_step(const Schedule& schedule, int sampler, long long rows,
                                               const Part& part) {
  SHARED(float, s_steps, kWarps * 4);
  float* s_step = s_steps + row_in_block(part) * 4;
  if (part.thread < kWarpSize) {
    // A lane reads one of the schedule's five row vectors and rounds one result: in one lane all of that would take as
    // long for each of them.
    const int lane = part.thread;
    const bool reads = lane < 5 && part.row < rows;
    const double mine = reads ? row_element((&schedule.sigma)[lane], part.row) : 0.f;
    const auto of_lane = [&](int lane) { return __shfl_sync(0xffffffffu, mine, lane); };
    const Transition t = transition(sampler, of_lane(0), of_lane(1), of_lane(2), of_lane(3));
    const double guidance = of_lane(4);
    if (lane < 4) s_step[lane] = static_cast<float>(lane == 0 ? t.a : lane == 1 ? t.b : lane == 2 ? t.std : guidance);
  }
  __syncthreads();
  return {s_step[0], s_step[1], s_step[2], schedule.guidance_scale.present ? s_step[3] : 1.f};
}

// Nothing is random in such a row: noise level 0, or the last step of CPS.
__device__ __forceinline__ bool is_deterministic(const Transition& t) { return t.std == 0.0; }
