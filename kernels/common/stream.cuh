// The one loop of all kernels that read latents: over the vectors, the tail and the runs of a part.
#pragma once

#include "common/parts.cuh"

// Elements that are handled with 32-bit indices, and added up in one go: 256 per thread of a block. Longer chains of
// float32 additions would lose digits.
constexpr int kRun = 65536;

// `Work` is bound to the first element of a part, and knows
//   kVector, kSteps     elements of a vector, and how many vectors a thread loads together
//   kAhead              whether the loads of an iteration are issued at the end of the one before
//   aligned()           whether whole vectors can be loaded; else every element is one of the tail
//   load(raw, i)        issues the loads of vector i; what is absent stays 0
//   vector(i, step, r)  does what is to be done with vector i, loaded into r as the step-th of its iteration
//   element(i)          the same for one element
//   advance(n)          moves on by n elements; after every run
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
  const bool vectorised = work.aligned();
  typename Work::Raw raw[kSteps] = {};
  long long first = 0;
#pragma unroll 1
  do {
    const int count = static_cast<int>(part.count - first < kRun ? part.count - first : kRun);
    const int vectors = vectorised ? count / Work::kVector : 0;
    const int whole = vectors - (kSteps - 1) * kWarpSize;  // below it the last step of an iteration is there too
    int vector = part.thread / kWarpSize * (kSteps * kWarpSize) + part.thread % kWarpSize;
    const auto load = [&] {
      if (vector < whole) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (!Work::kAhead) raw[step] = {};  // a pack that is not loaded keeps no registers
          work.load(raw[step], vector + step * kWarpSize);
        }
      } else if (kSteps > 1 && vector < vectors) {
        work.load(raw[0], vector);
      }
    };
    if (Work::kAhead) load();
    if (first == 0) prepare();
#pragma unroll 1
    while (vector < whole) {
      if (!Work::kAhead) load();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) work.vector(vector + step * kWarpSize, step, raw[step]);
      vector += kSteps * part.threads;
      if (Work::kAhead) load();
    }
    if (vector < vectors) work.vector(vector, 0, raw[0]);
#pragma unroll 1
    for (int at = vectors * Work::kVector + part.thread; at < count; at += part.threads) work.element(at);
    work.advance(kRun);
    first += kRun;
  } while (first < part.count);
}
