// policy_loss: the kernels of `loss` and `step_loss`. See call.cuh for arguments and launch, transition.cuh for the
// sources, objective.cuh for the formulas of a row.
//
// Forward, in one pass and for each row: q = sum (x' - mu)^2, d = sum (mu - mu_old)^2, f = sum (mu - mu_ref)^2 and
// cross = sum (x' - mu)(mu - mu_old), in float32 in a block and in float64 over the splits. The last block of a row
// computes the row's numbers, the last block of all the loss and the metrics. There are no float atomics: the bits do
// not depend on the order of blocks.
//
// Backward: G = innovation (x' - mu) + drift (mu - mu_old) + reference (mu - mu_ref). Terms with a coefficient of 0 are
// not read: only GRPO-Guard reads mu_old; a blocked row reads nothing or, with a reference policy, mu and mu_ref.
#include "common/stream.cuh"
#include "objective.cuh"
#include "transition.cuh"

template <class Source>
constexpr int kNumbers = Source::kIsStep ? kStepFields : kFields;

// Vectors of each tensor that a thread loads together. 2 for equal dtypes: 6 or 8 loads of 16 bytes, not counting the
// reference policy and the unconditional output. 1 for different dtypes, 4 to 7 loads, and for more than 32 elements in
// all tensors: twice 48 would spill.
template <class Source>
constexpr int kUnroll = sizeof(typename Source::template Raw<Source::kVector>) > Source::kTensors * 16 ||
                                Source::kTensors* Source::kVector > 32
                            ? 1
                            : 2;

// ---- forward -------------------------------------------------------------------------------------------------------

enum Sum : int { kQ, kD, kCross, kF, kSums };

__device__ __forceinline__ void add(float (&sums)[kSums], Moments moments) {
  sums[kQ] = fmaf(moments.innovation, moments.innovation, sums[kQ]);
  sums[kD] = fmaf(moments.drift, moments.drift, sums[kD]);
  sums[kCross] = fmaf(moments.drift, moments.innovation, sums[kCross]);
  sums[kF] = fmaf(moments.ref_drift, moments.ref_drift, sums[kF]);
}

template <class Source>
struct Sums {
  template <int kCount>
  using Raw = typename Source::template Raw<kCount>;
  static constexpr int kVector = Source::kVector, kSteps = kUnroll<Source>;
  static constexpr bool kPrefetch = Source::kDtype != kAny;
  Source source;
  float total[kSums] = {};
  float run[kSteps][kSums] = {};  // of this run; kSteps independent chains of additions

  __device__ __forceinline__ bool aligned(long long first) const { return source.aligned(first); }
  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    source.load(raw, at);
  }
  template <int kCount>
  __device__ __forceinline__ void use(long long, int step, const Raw<kCount>& raw) {
    Moments moments[kCount];
    source.moments(raw, moments);
#pragma unroll
    for (int j = 0; j < kCount; ++j) add(run[step], moments[j]);
  }
  __device__ __forceinline__ void end_run() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        total[i] += run[step][i];
        run[step][i] = 0.f;
      }
    }
  }
};

// Where a row's sums wait for guard_scale(): in the row's first partial, which is no longer needed.
__device__ __forceinline__ float4* waiting_sums(const PolicyLossForward& p, long long row) {
  return reinterpret_cast<float4*>(p.partials) + row * (p.splits > 1 ? p.splits : 1);
}

__device__ __forceinline__ void write_row(const PolicyLossForward& p, long long row, RowSums sums, GuardScale guard) {
  const PolicyLoss& call = p.call;
  const double numel = p.stage == kObjectiveAlone ? p.row_sums[4 * call.rows] : static_cast<double>(call.numel);
  row_numbers(call, row, sums, numel, guard, p.numbers);
  if (call.settings.reduction == kReduceNone) p.loss[row] = row_loss(call, p.numbers, row);
}

// Called by the one thread that has the row's sums.
__device__ __forceinline__ void finish_row(const PolicyLossForward& p, long long row, RowSums sums) {
  if (p.stage == kSumsAlone) {
    double* out = p.row_sums + 4 * row;
    out[0] = sums.q;
    out[1] = sums.d;
    out[2] = sums.cross;
    out[3] = sums.f;
    if (row == p.call.rows - 1) out[4] = static_cast<double>(p.call.numel);
  } else if (needs_batch_means(p.call)) {
    *waiting_sums(p, row) = make_float4(static_cast<float>(sums.q), static_cast<float>(sums.d),
                                        static_cast<float>(sums.cross), static_cast<float>(sums.f));
  } else {
    write_row(p, row, sums, {1.0, 1.0});
  }
}

// Called by all threads of the last block.
__device__ __noinline__ void finish_batch(const PolicyLossForward& p, double* s_numbers) {
  const PolicyLoss& call = p.call;
  if (needs_batch_means(call)) {
    const GuardScale guard = guard_scale(call, s_numbers);
#pragma unroll 1
    for (long long row = threadIdx.x; row < call.rows; row += kThreads) {
      const float4 sums = __ldcg(waiting_sums(p, row));
      write_row(p, row, {sums.x, sums.y, sums.z, sums.w}, guard);
    }
  }
  batch_numbers(call, p.numbers, p.loss, s_numbers);
}

template <class Source>
__device__ __forceinline__ void forward(const PolicyLossForward& p) {
  SHARED(double, s_numbers, kSharedNumbers);
  const PolicyLoss& call = p.call;
  const Part part = part_of_thread(call.rows, call.numel, p.splits);

  float sums[kSums] = {};
  if (Source::output_of(call.latents).data && p.stage != kObjectiveAlone) {
    Sums<Source> work = {Source(call.latents, {true, true, true})};
    stream(work, part, [&] {
      if constexpr (Source::kIsStep)
        work.source.set(shared_step(call.schedule, call.settings.sampler, call.rows, part));
    });
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = work.total[i];
  }
  double total[kSums];
  if (!sum_row(part, p.splits, sums, reinterpret_cast<float*>(s_numbers), p.partials, p.tickets, total)) return;
  if (part.thread == 0 && part.row < call.rows) {
    RowSums row_sums = {total[kQ], total[kD], total[kCross], total[kF]};
    if (p.stage == kObjectiveAlone) {
      const double* of_row = p.row_sums + 4 * part.row;
      row_sums = {of_row[0], of_row[1], of_row[2], of_row[3]};
    }
    finish_row(p, part.row, row_sums);
  }
  if (p.stage == kSumsAlone) return;

  // One count per block, not per row, if warps take rows: a million atomics on one address would queue.
  const long long count = p.splits == 0 ? static_cast<long long>(gridDim.x) : call.rows;
  if (comes_last(p.tickets + call.rows, static_cast<unsigned>(count))) finish_batch(p, s_numbers);
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct Coefficients {
  float innovation, drift, reference;
};

// 0 if `stored` is 0, even if grad_loss is infinite or NaN.
__device__ __forceinline__ float scaled(float grad_loss, float stored, float divisor) {
  return stored == 0.f ? 0.f : static_cast<float>(static_cast<double>(grad_loss) * stored / divisor);
}

__device__ __forceinline__ float gradient(Coefficients c, Moments moments) {
  return fmaf(c.innovation, moments.innovation, fmaf(c.drift, moments.drift, c.reference * moments.ref_drift));
}

// grad_output = guidance G, grad_uncond_output = (1 - guidance) G.
template <class Source>
struct Gradients {
  Target<Source::kDtype> output, uncond;
  float guidance;

  __device__ __forceinline__ Gradients(const PolicyLossBackward& p, const StepRow& step)
      : output(p.grad_output, Source::output_of(p.latents).dtype),
        uncond(Source::kIsStep ? p.grad_uncond_output : nullptr, p.latents.uncond_output.dtype),
        guidance(Source::kIsStep ? step.guidance : 1.f) {}
  __device__ __forceinline__ bool aligned(long long first) const {
    return output.aligned(first) && uncond.aligned(first);
  }
  template <int kCount>
  __device__ __forceinline__ void store(long long at, const float (&gradient)[kCount]) const {
    output.store(at, gradient, guidance);
    if (Source::kIsStep) uncond.store(at, gradient, 1.f - guidance);
  }
};

// Four threads compute the three coefficients and grad_log_prob of their row. All threads that have a row must call
// this; the others have left the kernel.
template <class Source>
__device__ __forceinline__ Coefficients shared_coefficients(const PolicyLossBackward& p, const Part& part,
                                                            float grad_loss) {
  SHARED(float, s_coefficients, kWarps * 4);
  float* s_row = s_coefficients + row_in_block(part) * 4;
  if (part.thread < 4) {
    const int field = kCoefInnovation + part.thread;
    const float divisor = field == kCoefRef ? 1.f : p.numbers[kNumbers<Source> * p.rows + kPolicyDivisor];
    const float coefficient = scaled(grad_loss, p.numbers[field * p.rows + part.row], divisor);
    s_row[part.thread] = coefficient;
    if (field == kCoefLogProb && p.grad_log_prob && part.split == 0) p.grad_log_prob[part.row] = coefficient;
  }
  __syncthreads();
  return {s_row[0], s_row[1], s_row[2]};
}

template <class Source>
struct Gradient {
  template <int kCount>
  using Raw = typename Source::template Raw<kCount>;
  static constexpr int kVector = Source::kVector, kSteps = kUnroll<Source>;
  static constexpr bool kPrefetch = Source::kDtype != kAny;
  Source source;
  Gradients<Source> out;
  Coefficients c;

  __device__ __forceinline__ bool aligned(long long first) const { return source.aligned(first) && out.aligned(first); }
  template <int kCount>
  __device__ __forceinline__ void load(Raw<kCount>& raw, long long at) const {
    source.load(raw, at);
  }
  template <int kCount>
  __device__ __forceinline__ void use(long long at, int, const Raw<kCount>& raw) const {
    Moments moments[kCount];
    source.moments(raw, moments);
    float values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = gradient(c, moments[j]);
    out.store(at, values);
  }
  __device__ __forceinline__ void end_run() const {}
};

template <class Source>
__device__ __forceinline__ void backward(const PolicyLossBackward& p) {
  if (!p.grad_output && !p.grad_uncond_output) {
    const long long row = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    if (!p.grad_log_prob || row >= p.rows) return;
    const float stored = p.numbers[kCoefLogProb * p.rows + row];
    const float divisor = p.numbers[kNumbers<Source> * p.rows + kPolicyDivisor];
    p.grad_log_prob[row] = scaled(read_row(p.grad_loss, row), stored, divisor);
    return;
  }
  const Part part = part_of_thread(p.rows, p.numel, p.splits);
  if (part.row >= p.rows) return;
  // All loads first: waiting for them one by one would delay the block by 1 us.
  const float* stored = p.numbers + kCoefInnovation * p.rows + part.row;
  const float innovation = stored[0], drift = stored[p.rows], reference = stored[2 * p.rows];
  StepRow step = {};
  if (Source::kIsStep) {
    const float* fields = p.numbers + kStepA * p.rows + part.row;
    step = {fields[0], fields[p.rows], fields[2 * p.rows], fields[3 * p.rows]};
  }
  const float grad_loss = read_row(p.grad_loss, part.row);
  // A term with a coefficient of 0 is not read, so that 0 times infinity cannot occur.
  const bool any = grad_loss != 0.f;
  const Demand wanted = {any && innovation != 0.f, any && drift != 0.f, any && reference != 0.f};
  Gradient<Source> work = {Source(p.latents, wanted), Gradients<Source>(p, step), {}};
  work.source.set(step);
  stream(work, part, [&] { work.c = shared_coefficients<Source>(p, part, grad_loss); });
}

// ---- entry points --------------------------------------------------------------------------------------------------

// At least 2 blocks on a multiprocessor; at least 3 would spill. Kernels take 62 to 128 registers. 2 or 3 blocks with
// 4 to 8 loads a thread have 33 to 74 KB in flight; an H200 should need ~30 KB (4.8 TB/s, 132 multiprocessors, 0.8 us).
#define POLICY_LOSS(variant, Source, ...)                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                          \
      policy_loss_forward_##variant(const __grid_constant__ PolicyLossForward p) {   \
    forward<Source<__VA_ARGS__, Cache::kKeep>>(p);                                   \
  }                                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                          \
      policy_loss_backward_##variant(const __grid_constant__ PolicyLossBackward p) { \
    backward<Source<__VA_ARGS__, Cache::kStream>>(p);                                \
  }

POLICY_LOSS_SOURCES(POLICY_LOSS)
