// The one loop of all kernels that read latents: over the vectors, the tail and the runs of a part.
#pragma once

#include "common/parts.cuh"

// Elements that are handled with 32-bit indices, and added up in one go: 256 per thread of a block. Longer chains of
// float32 additions would lose digits.
constexpr int kRun = 65536;

// `Work` knows, with the numbers of elements in the whole tensors,
//   kVector, kSteps      elements of a vector, and how many vectors a thread loads together
//   kAhead               whether the loads of an iteration are issued at the end of the one before
//   aligned(first)       whether whole vectors can be loaded from there; else every element is one of the tail
//   load(raw, at)        issues the loads of a vector, or of a single element, into a Raw; what is absent stays 0
//   use(at, step, raw)   does what is to be done with a vector that was loaded as the step-th of its iteration
//   end_run()            every kRun elements
// `prepare()` is called once by every thread that shares the part, empty or not. With kAhead the first loads are under
// way by then: what it forms must not say what is loaded.
//
// A warp takes kSteps times 32 neighbours, so that the steps of a thread are a constant distance apart, and one address
// register per tensor serves all of them. The tail is last, a thread an element.
//
// Why ahead: where loads and arithmetic stand in one block the compiler moves loads behind the first use, to save
// registers (4 of 10, seen in the disassembly): two trips to memory in an iteration, one after the other. It moves none
// over the branch back. A kernel for every mix of dtypes has no registers for that, and spills.
template <class Work, class Prepare>
__device__ __forceinline__ void stream(Work& work, const Part& part, Prepare prepare) {
  constexpr int kSteps = Work::kSteps;
  static_assert(Work::kAhead || kSteps == 1);
  constexpr int kVector = Work::kVector;
  const bool vectorised = work.aligned(part.first);
  const long long end = part.first + part.count;
  long long first = part.first;
  typename Work::template Raw<kVector> raw[kSteps] = {};
#pragma unroll 1
  do {
    const int count = static_cast<int>(end - first < kRun ? end - first : kRun);
    const int vectors = vectorised ? count / kVector : 0;
    const int whole = vectors - (kSteps - 1) * kWarpSize;  // below it the last step of an iteration is there too
    int vector = part.thread / kWarpSize * (kSteps * kWarpSize) + part.thread % kWarpSize;
    const auto at = [&](int step) { return first + vector * kVector + step * (kWarpSize * kVector); };
    const auto load = [&] {
      if (vector < whole) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (!Work::kAhead) raw[step] = {};  // a pack that is not loaded keeps no registers
          work.load(raw[step], at(step));
        }
      } else if (kSteps > 1 && vector < vectors) {
        work.load(raw[0], at(0));
      }
    };
    if (Work::kAhead) load();
    if (first == part.first) prepare();
#pragma unroll 1
    while (vector < whole) {
      if (!Work::kAhead) load();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) work.use(at(step), step, raw[step]);
      vector += kSteps * part.threads;
      if (Work::kAhead) load();
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
