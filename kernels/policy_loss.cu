// policy_loss: the kernels behind `loss` and `step_loss`, one body over two sources. Shapes, dtypes and the launch are
// in call.cuh, the sources in transition.cuh, the formulas of a row in objective.cuh.
//
// Forward. Per row q = sum (x' - mu)^2, d = sum (mu - mu_old)^2, cross = sum (x' - mu)(mu - mu_old) and
// f = sum (mu - mu_ref)^2, in one pass: float32 per thread, a fixed tree over the block, float64 over the splits of a
// row. The block that finishes a row last turns the sums into the row's numbers; the one that finishes the last row
// forms the loss and the metrics. Hence one launch, no float atomics, and the same bits in whatever order blocks run.
//   warp w of a block: vectors 64 w .. 64 w + 63 of the block's part, a lane two of them, 32 apart; then 2 kThreads
//   further on; at last the tail, a thread an element. (Where dtypes differ: 32 vectors, a lane one.)
// Latents that are sharded over several GPUs take two launches (`Stage`): the sums of a shard, and, when those have
// been added up over the shards, the objective.
//
// Backward. G = innovation (x' - mu) + drift (mu - mu_old) + reference (mu - mu_ref), streaming; same mapping.
// Reads what has a coefficient: mu and x' alone for FlowDPPO and FlowGRPO; of a blocked row nothing. The gradient is G,
// with guidance its share of G for each of the two outputs.
#include "gradient.cuh"
#include "row_sums.cuh"

// Rows of `numbers`.
template <class Source>
constexpr int kNumbers = Source::kIsStep ? kStepFields : kFields;

// ---- forward -------------------------------------------------------------------------------------------------------

// This thread's share of a row's sums.
template <class Source>
struct Sums {
  using Raw = typename Source::Raw;
  static constexpr int kVector = Source::kVector, kSteps = kUnroll<Source>;
  static constexpr bool kAhead = Source::kDtype != kAny;
  Source source;
  float total[kSums] = {};
  float run[kSteps][kSums] = {};  // of this run: chains that do not wait for each other

  __device__ __forceinline__ bool aligned() const { return source.aligned(); }
  __device__ __forceinline__ void load(Raw& raw, int vector) const { source.load(raw, vector); }
  __device__ __forceinline__ void vector(int, int step, const Raw& raw) {
    Moments moments[kVector];
    source.moments(raw, moments);
#pragma unroll
    for (int j = 0; j < kVector; ++j) add(run[step], moments[j]);
  }
  __device__ __forceinline__ void element(int at) { add(run[0], source.element(at)); }
  __device__ __forceinline__ void advance(long long elements) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        total[i] += run[step][i];
        run[step][i] = 0.f;
      }
    }
    source.advance(elements);
  }
};

// The sums of a row that waits for the batch's means: in the first partial of the row, which nobody needs any more.
__device__ __forceinline__ float4* waiting_sums(const PolicyLossForward& p, long long row) {
  return reinterpret_cast<float4*>(p.partials) + row * (p.splits > 1 ? p.splits : 1);
}

// By the one thread that has a row's sums.
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

// By the last block: GRPO-Guard's rows, one thread each, and the batch.
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
    StepRow step = {};
    if constexpr (Source::kIsStep) step = shared_step(call.schedule, call.settings.sampler, call.rows, part);
    const Demand wanted = {true, true, true};
    const long long first = part.row * call.numel + part.first;
    Sums<Source> work = {Source(call.latents, first, step, wanted)};
    stream(work, part, [] {});
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = work.total[i];
  }

  bool owner;  // of the row: the one thread that finishes it
  if (p.splits == 0) {
    warp_reduce(sums);
    owner = part.thread == 0 && part.row < call.rows;
  } else {
    block_reduce(sums, reinterpret_cast<float*>(s_numbers));
    owner = threadIdx.x == 0;
  }
  RowSums row_sums = {sums[kQ], sums[kD], sums[kCross], sums[kF]};

  if (p.splits > 1) {
    float4* partials = reinterpret_cast<float4*>(p.partials) + part.row * p.splits;
    if (threadIdx.x == 0) partials[part.split] = make_float4(sums[kQ], sums[kD], sums[kCross], sums[kF]);
    if (!comes_last(p.tickets + part.row, p.splits)) return;
    row_sums = sum_of_splits(partials, p.splits);
  }
  if (owner) {
    if (p.stage == kObjectiveAlone) {
      const double* of_row = p.row_sums + 4 * part.row;
      row_sums = {of_row[0], of_row[1], of_row[2], of_row[3]};
    }
    finish_row(p, part.row, row_sums);
  }
  if (p.stage == kSumsAlone) return;

  // With a warp per row the blocks are counted, else the rows: a million rows would queue for one address.
  const long long count = p.splits == 0 ? static_cast<long long>(gridDim.x) : call.rows;
  if (comes_last(p.tickets + call.rows, static_cast<unsigned>(count))) finish_batch(p, s_numbers);
}

// ---- backward ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void write_grad_log_prob(const PolicyLossBackward& p, long long row, float divisor) {
  const float stored = p.numbers[kCoefLogProb * p.rows + row];
  p.grad_log_prob[row] = scaled(read_row(p.grad_loss, row), stored, divisor);
}

__device__ __forceinline__ Coefficients coefficients(const PolicyLossBackward& p, long long row, float divisor) {
  // All loads first: waiting for one after the other would cost a block 1 us before it streams.
  const float innovation = p.numbers[kCoefInnovation * p.rows + row];
  const float drift = p.numbers[kCoefDrift * p.rows + row];
  const float reference = p.numbers[kCoefRef * p.rows + row];
  const double grad_loss = read_row(p.grad_loss, row);
  return {scaled(grad_loss, innovation, divisor), scaled(grad_loss, drift, divisor), scaled(grad_loss, reference, 1.0)};
}

// The gradient of one row.
template <class Source>
struct Gradient {
  using Raw = typename Source::Raw;
  static constexpr int kVector = Source::kVector, kSteps = kUnroll<Source>;
  static constexpr bool kAhead = Source::kDtype != kAny;
  Source source;
  Gradients<Source> out;
  Coefficients c;

  __device__ __forceinline__ bool aligned() const { return source.aligned() && out.aligned(); }
  __device__ __forceinline__ void load(Raw& raw, int vector) const { source.load(raw, vector); }
  __device__ __forceinline__ void vector(int vector, int, const Raw& raw) const {
    Moments moments[kVector];
    source.moments(raw, moments);
    float values[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = gradient(c, moments[j]);
    out.store(vector, values);
  }
  __device__ __forceinline__ void element(int at) const { out.store_one(at, gradient(c, source.element(at))); }
  __device__ __forceinline__ void advance(long long elements) {
    source.advance(elements);
    out.advance(elements);
  }
};

template <class Source>
__device__ __forceinline__ void backward(const PolicyLossBackward& p) {
  const float divisor = p.numbers[kNumbers<Source> * p.rows + kPolicyDivisor];
  if (!p.grad_output && !p.grad_uncond_output) {
    const long long row = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
    if (p.grad_log_prob && row < p.rows) write_grad_log_prob(p, row, divisor);
    return;
  }
  const Part part = part_of_thread(p.rows, p.numel, p.splits);
  if (part.row >= p.rows) return;
  if (p.grad_log_prob && part.split == 0 && part.thread == 0) write_grad_log_prob(p, part.row, divisor);
  if (part.count == 0) return;

  StepRow step = {};
  if (Source::kIsStep) {
    const float* fields = p.numbers + kStepA * p.rows + part.row;
    step = {fields[0], fields[p.rows], fields[2 * p.rows], fields[3 * p.rows]};
  }
  const Coefficients c = coefficients(p, part.row, divisor);
  // What has no coefficient is not read, and an infinity there is not multiplied with 0.
  const Demand wanted = {c.innovation != 0.f, c.drift != 0.f, c.reference != 0.f};
  const long long first = part.row * p.numel + part.first;
  Gradient<Source> work = {Source(p.latents, first, step, wanted), Gradients<Source>(p, first, step), c};
  stream(work, part, [] {});
}

// ---- entry points --------------------------------------------------------------------------------------------------

// Two blocks on a multiprocessor at least, not more: asked for three, the compiler saves registers by sinking half of
// an iteration's loads below the arithmetic. It takes 62 to 126; 2 or 3 blocks with 4 to 8 loads a thread are 33 to 74
// KB in flight, where an H200 should need ~30 (4.8 TB/s, 132 multiprocessors, 0.8 us).
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
