// What may be tuned without a change of results beyond rounding, each with the value that ships. benches/tune.py
// compiles and times others (-DFLOWDPPO_...=...); benches/README.md has what was expected of them and what came.
#pragma once

#ifndef FLOWDPPO_THREADS  // the emulator takes fewer where the thread sanitizer needs 0.6 ms for each
#define FLOWDPPO_THREADS 256
#endif
#ifndef FLOWDPPO_MIN_BLOCKS
#define FLOWDPPO_MIN_BLOCKS 2
#endif
#ifndef FLOWDPPO_NARROW_STEPS
#define FLOWDPPO_NARROW_STEPS 2
#endif
#ifndef FLOWDPPO_WIDE_STEPS
#define FLOWDPPO_WIDE_STEPS 1
#endif
#ifndef FLOWDPPO_FORWARD_LOADS
#define FLOWDPPO_FORWARD_LOADS kKeep
#endif
#ifndef FLOWDPPO_BACKWARD_LOADS
#define FLOWDPPO_BACKWARD_LOADS kStream
#endif
#ifndef FLOWDPPO_STORES
#define FLOWDPPO_STORES kKeep
#endif
#ifndef FLOWDPPO_BACKWARD_REVERSED
#define FLOWDPPO_BACKWARD_REVERSED 0
#endif
#ifndef FLOWDPPO_DEPENDENT_LAUNCH
#define FLOWDPPO_DEPENDENT_LAUNCH 0
#endif

enum class Cache {
  kKeep,    // loads take the read-only path, stores write back; both live in the L2 as long as all else
  kStream,  // evict first: nobody reads it again
};

// Of a block.
constexpr int kThreads = FLOWDPPO_THREADS;
// Blocks on a multiprocessor at least: the compiler's limit on registers. Not three: it then saves registers by sinking
// half of an iteration's loads below the arithmetic. It takes 62 to 126; 2 or 3 blocks with 4 to 8 loads a thread are
// 33 to 74 KB in flight, where an H200 should need ~30 (4.8 TB/s, 132 multiprocessors, 0.8 us).
constexpr int kMinBlocks = FLOWDPPO_MIN_BLOCKS;
// Vector steps whose loads are issued together: of few words each, and of many, which are enough by themselves.
constexpr int kNarrowSteps = FLOWDPPO_NARROW_STEPS;
constexpr int kWideSteps = FLOWDPPO_WIDE_STEPS;
// What the backward reads again: when the forward reads it, and when the backward does.
constexpr Cache kForwardLoads = Cache::FLOWDPPO_FORWARD_LOADS;
constexpr Cache kBackwardLoads = Cache::FLOWDPPO_BACKWARD_LOADS;
// Whole vectors of gradients, means and next latents.
constexpr Cache kStores = Cache::FLOWDPPO_STORES;
// Whether the backward's blocks begin with the last part, which the forward left in the L2.
constexpr bool kBackwardReversed = FLOWDPPO_BACKWARD_REVERSED;
// Whether the backward may be launched while the forward's last blocks run (sm_90 and later).
constexpr bool kDependentLaunch = FLOWDPPO_DEPENDENT_LAUNCH;
