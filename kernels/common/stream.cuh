// The loop of all kernels that read latents: over the vectors and single elements of a part.
#pragma once

#include "common/parts.cuh"

constexpr int kRun = 65536;  // elements, 256 per thread of a block: longer chains of float32 additions lose digits

// `Work` has the following; `at` and `first` are element indices in the whole tensor.
//   kVector, kSteps      elements of a vector, vectors that a thread loads in an iteration
//   kPrefetch               whether an iteration issues the loads of the next one
//   aligned(first)       whether vectors can be loaded from there; else all elements are processed singly
//   load(raw, at)        issues the loads of a vector or an element into a Raw; absent tensors leave it 0
//   use(at, step, raw)   processes what `load` put into raw; `step` is the vector's number in the iteration
//   end_run()            is called after every run
// Every thread of the part calls `prepare()` once, even if the part is empty. With kPrefetch it runs while the first
// loads are in flight: `load` must not depend on it.
//
// In an iteration the vectors of a thread are 32 apart: one address register per tensor serves all of them.
// Without kPrefetch the compiler moves loads behind the first use to save registers (4 of 10 in the disassembly), and
// an iteration waits for memory twice. It moves none across the loop's branch. The mixed kernels of policy_loss do not
// set kPrefetch: they would spill.
template <class Work, class Prepare>
__device__ __forceinline__ void stream(Work& work, const Part& part, Prepare prepare) {
  constexpr int kSteps = Work::kSteps;
  static_assert(Work::kPrefetch || kSteps == 1);
  constexpr int kVector = Work::kVector;
  const bool vectorised = work.aligned(part.first);
  const long long end = part.first + part.count;
  long long first = part.first;
  typename Work::template Raw<kVector> raw[kSteps] = {};
#pragma unroll 1
  do {
    const int count = static_cast<int>(end - first < kRun ? end - first : kRun);
    const int vectors = vectorised ? count / kVector : 0;
    const int whole = vectors - (kSteps - 1) * kWarpSize;  // all kSteps vectors exist if vector < whole
    int vector = part.thread / kWarpSize * (kSteps * kWarpSize) + part.thread % kWarpSize;
    const auto at = [&](int step) { return first + vector * kVector + step * (kWarpSize * kVector); };
    const auto load = [&] {
      if (vector < whole) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (!Work::kPrefetch) raw[step] = {};  // packs of absent tensors then take no registers
          work.load(raw[step], at(step));
        }
      } else if (kSteps > 1 && vector < vectors) {
        work.load(raw[0], at(0));
      }
    };
    if (Work::kPrefetch) load();
    if (first == part.first) prepare();
#pragma unroll 1
    while (vector < whole) {
      if (!Work::kPrefetch) load();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) work.use(at(step), step, raw[step]);
      vector += kSteps * part.threads;
      if (Work::kPrefetch) load();
    }
    if (vector < vectors) work.use(at(0), 0, raw[0]);
#pragma unroll 1
    for (int tail = vectors * kVector + part.thread; tail < count; tail += part.threads) {
      typename Work::template Raw<1> element = {};
      work.load(element, first + tail);
      work.use(first + tail, 0, element);
    }
    work.end_run();
    first += kRun;
  } while (first < end);
}
