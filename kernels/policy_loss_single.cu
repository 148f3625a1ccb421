// policy_loss in a single pass, for latents that the L2 does not hold from the forward to the backward: every input is
// read once and the gradient written once. Of means 4 tensors move instead of 6, of a step's latents 5 instead of 8.
//
// The gradient is a multiple of x' - mu, known when all of the row has been summed. Until then x' - mu waits in shared
// memory. `splits` blocks, a team, share a row: each sums its part and keeps it; the last to come forms the row's
// numbers; then each writes its part of the gradient. Team t of T takes the rows t, t + T, ... Blocks wait for one
// another, so all of them must be resident: a cooperative launch, 4 room bytes of dynamic shared memory.
//   While a row is being finished nobody idles: what room is left takes the beginning of the team's next row.
//   A thread takes every kThreads-th vector of a part, a step each; what it keeps no other thread reads.
// The bits of the results depend on `splits` and on nothing else in the launch.
#include "gradient.cuh"
#include "row_sums.cuh"

// Where innovations wait, up to two rows at a time: slots in turn, each with a vector of every thread of the block.
template <int kVector>
struct Ring {
  float4* mine;
  int slots;

  __device__ __forceinline__ Ring(float4* memory, int room)
      : mine(memory + threadIdx.x), slots(room / (kVector * kThreads)) {}
  __device__ __forceinline__ int following(int slot, int steps) const {
    return slot + steps < slots ? slot + steps : slot + steps - slots;
  }
  __device__ __forceinline__ void put(int slot, const Moments (&moments)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; j += 4)
      mine[(slot * kVector + j) / 4 * kThreads] = make_float4(moments[j].innovation, moments[j + 1].innovation,
                                                              moments[j + 2].innovation, moments[j + 3].innovation);
  }
  __device__ __forceinline__ void get(int slot, float (&innovations)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      const float4 four = mine[(slot * kVector + j) / 4 * kThreads];
      innovations[j] = four.x;
      innovations[j + 1] = four.y;
      innovations[j + 2] = four.z;
      innovations[j + 3] = four.w;
    }
  }
};

// Counters of the launch, all 0 before and after it.
struct Tickets {
  unsigned* arrived;  // [rows]: blocks of the team that have brought their sums
  unsigned* waiting;  // [rows]: 0 until the row has its numbers, then the blocks that have not yet read them
  unsigned* rows;     // rows that have their numbers

  __device__ __forceinline__ explicit Tickets(const PolicyLossForward& p)
      : arrived(p.tickets), waiting(p.tickets + p.problem.rows), rows(p.tickets + 2 * p.problem.rows) {}
};

// Of the team's `index`th row; in turn from 0. A step is ~2 us for one thread, so they are formed side by side.
__device__ __forceinline__ StepRow team_step(const Problem& problem, int team, int teams, int index) {
  SHARED(StepRow, s_steps, kThreads);
  if (index % kThreads == 0) {
    __syncthreads();  // nobody reads the last ones any more
    const long long row = team + static_cast<long long>(index + threadIdx.x) * teams;
    if (row < problem.rows)
      s_steps[threadIdx.x] = step_row(problem.schedule, transition_of(problem.schedule, row), row);
    __syncthreads();
  }
  return s_steps[index % kThreads];
}

// Steps `first` to `last` of a part of `vectors`: into the sums, and into the slots from `slot` on.
template <class Source>
__device__ __forceinline__ void take(const Source& source, int vectors, int first, int last,
                                     const Ring<Source::kVector>& ring, int slot, float (&sums)[kSums]) {
  constexpr int kSteps = kUnroll<Source>, kVector = Source::kVector;
  int step = first;
#pragma unroll 1
  for (; step + kSteps <= last && (step + kSteps) * kThreads <= vectors; step += kSteps) {
    typename Source::Raw raw[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) raw[i] = source.load((step + i) * kThreads + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      Moments moments[kVector];
      source.moments(raw[i], moments);
#pragma unroll
      for (int j = 0; j < kVector; ++j) add(sums, moments[j]);
      ring.put(ring.following(slot, step + i), moments);
    }
  }
  // The last one, of which not every thread has a vector.
#pragma unroll 1
  for (; step < last; ++step) {
    const int vector = step * kThreads + threadIdx.x;
    if (vector >= vectors) break;
    Moments moments[kVector];
    source.moments(source.load(vector), moments);
#pragma unroll
    for (int j = 0; j < kVector; ++j) add(sums, moments[j]);
    ring.put(ring.following(slot, step), moments);
  }
}

// Brings the block's sums of its part; the last of the team forms the row's numbers, the last of all the batch's.
__device__ __forceinline__ void bring(const PolicyLossForward& p, long long row, int split, float (&sums)[kSums],
                                      double* s_numbers) {
  const Tickets tickets(p);
  float4* partials = reinterpret_cast<float4*>(p.partials) + row * p.splits;
  block_reduce(sums, reinterpret_cast<float*>(s_numbers));
  if (threadIdx.x == 0) partials[split] = make_float4(sums[kQ], sums[kD], sums[kCross], sums[kF]);
  if (!comes_last(tickets.arrived + row, p.splits)) return;
  const RowSums row_sums = sum_of_splits(partials, p.splits);
  if (threadIdx.x == 0) {
    write_row(p, row, row_sums, {1.0, 1.0});
    __threadfence();  // the numbers come before the word that they are there
    atomicExch(tickets.waiting + row, static_cast<unsigned>(p.splits));
  }
  if (comes_last(tickets.rows, static_cast<unsigned>(p.problem.rows)))
    batch_numbers(p.problem, p.numbers, p.loss, s_numbers);
}

// What x' - mu is multiplied with, once the row has its numbers. In all threads.
__device__ __forceinline__ float await_coefficient(const PolicyLossForward& p, long long row) {
  SHARED(float, s_coefficient, 1);
  const Problem& problem = p.problem;
  if (threadIdx.x == 0) {
    unsigned* waiting = Tickets(p).waiting + row;
    while (poll(waiting) == 0) pause();
    __threadfence();  // the word comes before the numbers
    const float stored = __ldcg(&p.numbers[kCoefInnovation * problem.rows + row]);
    s_coefficient[0] = scaled(1.0, stored, problem.reduction == kReduceMean ? static_cast<float>(problem.rows) : 1.f);
    atomicSub(waiting, 1u);
  }
  __syncthreads();
  return s_coefficient[0];
}

template <class Source>
__device__ __forceinline__ void write_kept(const Ring<Source::kVector>& ring, int slot, int vectors, float coefficient,
                                           const Gradients<Source>& out) {
#pragma unroll 1
  for (int vector = threadIdx.x, step = 0; vector < vectors; vector += kThreads, ++step) {
    float values[Source::kVector];
    ring.get(ring.following(slot, step), values);
#pragma unroll
    for (int j = 0; j < Source::kVector; ++j)
      values[j] = coefficient == 0.f ? 0.f : gradient({coefficient, 0.f, 0.f}, {values[j], 0.f, 0.f});
    out.store(vector, values);
  }
}

template <class Source>
__device__ __forceinline__ void single(const PolicyLossSingle& call) {
  SHARED(double, s_numbers, kSharedNumbers);
  DYNAMIC_SHARED(float4, s_kept);
  const PolicyLossForward& p = call.forward;
  const Problem& problem = p.problem;
  const int team = blockIdx.x / p.splits, teams = gridDim.x / p.splits, split = blockIdx.x % p.splits;
  const Part part = part_of_block(team, problem.numel, split, p.splits);  // the same one of each row
  const Demand wanted = {problem.old_form, problem.ref_form, true, true, true};

  const Ring<Source::kVector> ring(s_kept, call.room);
  const int vectors = static_cast<int>(part.count) / Source::kVector, steps = (vectors + kThreads - 1) / kThreads;
  const int ahead = steps < ring.slots - steps ? steps : ring.slots - steps;
  int slot = 0, index = 0;
  StepRow step = {}, last_step = {};

#pragma unroll 1
  for (long long row = team;; row += teams, ++index) {
    const bool any = row < problem.rows, any_before = row != team;
    const int next_slot = any_before ? ring.following(slot, steps) : slot;
    if constexpr (Source::kIsStep) {
      if (any) step = team_step(problem, team, teams, index);
    }
    const Source source(p.latents, any ? row * problem.numel + part.first : 0, step, wanted);
    float sums[kSums] = {};
    const int early = !any ? 0 : any_before ? ahead : steps;
    take(source, vectors, 0, early, ring, next_slot, sums);
    if (any_before) {
      const long long last = row - teams;
      const float coefficient = await_coefficient(p, last);
      const Gradients<Source> out(call, p.latents, last * problem.numel + part.first, last_step);
      write_kept<Source>(ring, slot, vectors, coefficient, out);
    }
    if (!any) return;
    take(source, vectors, early, steps, ring, next_slot, sums);
    bring(p, row, split, sums, s_numbers);
    slot = next_slot;
    last_step = step;
  }
}

// Two blocks on a multiprocessor, each with half of its shared memory: one loads while the other waits or writes.
#define POLICY_LOSS_SINGLE(variant, Source, ...)                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                         \
      policy_loss_single_##variant(const __grid_constant__ PolicyLossSingle call) { \
    single<Source<__VA_ARGS__, Cache::kStream>>(call);                              \
  }

POLICY_LOSS_TYPED(POLICY_LOSS_SINGLE)
