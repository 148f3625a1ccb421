// Sampler and noise level of a row -> coefficients of its mean, mu = a x + b v, and its standard deviation. Formulas as
// in src/cpu/schedule.rs, their sources in python/flowdppo_ops/reference.py. Inputs are float32, arithmetic is float64,
// and each result is rounded once, so that the CPU gets the same (except for CPS: the CPU has sin instead of sinpi).
#pragma once

#include "common/parts.cuh"
#include "common/rows.cuh"

struct Transition {
  double a, b, std;
  double sqrt_dt;
};

// About 35 float64 operations, 64 times as slow as float32 on a consumer GPU: not every warp of a block does them.
__device__ __forceinline__ Transition transition(int sampler, double sigma, double next, double noise_level,
                                                 double sigma_max) {
  const double dt = next - sigma;
  double a, b, std;
  if (sampler == kCpsSampler) {
    std = next * sinpi(0.5 * noise_level);           // sin() would take a stack to reduce large angles
    const double r = sqrt(next * next - std * std);  // no fma: 0 at noise level 1, not a NaN
    a = (1.0 - next) + r;
    b = fma(-sigma, a, r);  // -sigma (1 - next) + (1 - sigma) r
  } else {
    // q^2 = noise_level^2 sigma inverse; half_rate = q^2 / (2 sigma); std = q sqrt(-dt).
    const bool flow = sampler == kFlowSde;
    const double inverse = 1.0 / (flow ? 1.0 - (sigma == 1.0 ? sigma_max : sigma) : sigma);
    const double half_rate = 0.5 * (noise_level * noise_level) * inverse;
    a = fma(half_rate, dt, 1.0);
    b = fma(half_rate, 1.0 - sigma, 1.0) * dt;
    std = noise_level * sqrt(flow ? -dt * sigma * inverse : -dt);
  }
  return {a, b, std, sqrt(-dt)};
}

__device__ __noinline__ Transition transition_of(const Schedule& schedule, int sampler, long long row) {
  const Transition t = transition(sampler, read_row(schedule.sigma, row), read_row(schedule.sigma_next, row),
                                  read_row(schedule.noise_level, row), read_row(schedule.sigma_max, row));
  return {rounded(t.a), rounded(t.b), rounded(t.std), rounded(t.sqrt_dt)};
}

struct StepRow {
  float a, b, std, guidance;
};

// `sde_step` and `step_loss` compute v and mu with these two functions: mu - mu_old is exactly 0 in `step_loss` if
// `sde_step` recorded mu_old from the same model outputs.
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

// The same in all threads that share the row; the first warp computes it. All threads of the block must call this.
__device__ __forceinline__ StepRow shared_step(const Schedule& schedule, int sampler, long long rows,
                                               const Part& part) {
  SHARED(float, s_steps, kWarps * 4);
  float* s_step = s_steps + row_in_block(part) * 4;
  if (part.thread < kWarpSize) {
    // Lanes 0 to 4 read one row vector of the schedule each, so that the five loads do not wait for one another.
    const int lane = part.thread;
    const bool reads = lane < 5 && part.row < rows;
    const double element = reads ? row_element((&schedule.sigma)[lane], part.row) : 0.f;
    const auto of_lane = [&](int lane) { return __shfl_sync(0xffffffffu, element, lane); };
    const Transition t = transition(sampler, of_lane(0), of_lane(1), of_lane(2), of_lane(3));
    const double guidance = of_lane(4);
    if (lane < 4) s_step[lane] = static_cast<float>(lane == 0 ? t.a : lane == 1 ? t.b : lane == 2 ? t.std : guidance);
  }
  __syncthreads();
  return {s_step[0], s_step[1], s_step[2], schedule.guidance_scale.present ? s_step[3] : 1.f};
}

// True for noise_level 0 and for the last step of CPS.
__device__ __forceinline__ bool is_deterministic(const Transition& t) { return t.std == 0.0; }
