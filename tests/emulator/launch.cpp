// The kernels of kernels/, compiled for the emulator, and a table of their names.
//
// g++ -std=c++20 -DFLOWDPPO_EMULATOR -I <kernels> -I <this folder> launch.cpp scheduler.cpp
#include "launch.h"

#include <cstring>

#include "scheduler.h"

// EMULATE_<UNIT>=variant: that one alone, enough where a planted fault is looked for, and a tenth of the time to
// compile. (Of policy_loss the sources have only that one then.)
#ifndef EMULATE_SDE_STEP
#include "policy_loss.cu"
#endif
#ifndef EMULATE_POLICY_LOSS
#include "sde_step.cu"
#endif

namespace {

struct Kernel {
  const char* name;
  size_t bytes;
  void (*run)(const void*);
};

// By value, as a launch passes it: every thread has its own copy, and none can write to another's.
template <class Argument, void (*kKernel)(Argument)>
Kernel kernel(const char* name) {
  return {name, sizeof(Argument), [](const void* argument) { kKernel(*static_cast<const Argument*>(argument)); }};
}

#define POLICY_LOSS_BOTH(variant, ...)                                                       \
  kernel<PolicyLossForward, policy_loss_forward_##variant>("policy_loss_forward_" #variant), \
      kernel<PolicyLossBackward, policy_loss_backward_##variant>("policy_loss_backward_" #variant),
#define SDE_STEP_BOTH(variant)                                                      \
  kernel<SdeStepForward, sde_step_forward_##variant>("sde_step_forward_" #variant), \
      kernel<SdeStepBackward, sde_step_backward_##variant>("sde_step_backward_" #variant)
#define SDE_STEP_BOTH_OF(macro) SDE_STEP_BOTH(macro)

const Kernel kKernels[] = {
#ifndef EMULATE_SDE_STEP
    POLICY_LOSS_SOURCES(POLICY_LOSS_BOTH)
#endif
#if defined(EMULATE_SDE_STEP)
        SDE_STEP_BOTH_OF(EMULATE_SDE_STEP)
#elif !defined(EMULATE_POLICY_LOSS)
    SDE_STEP_BOTH(f32), SDE_STEP_BOTH(bf16_f32), SDE_STEP_BOTH(bf16), SDE_STEP_BOTH(f16), SDE_STEP_BOTH(mixed),
#endif
};

const Kernel* find(const char* name) {
  for (const Kernel& kernel : kKernels)
    if (!std::strcmp(kernel.name, name)) return &kernel;
  return nullptr;
}

}  // namespace

unsigned emu_threads() { return kThreads; }

size_t emu_argument_bytes(const char* name) {
  const Kernel* kernel = find(name);
  return kernel ? kernel->bytes : 0;
}

int emu_launch(const char* name, const void* argument, unsigned blocks, unsigned seed) {
  const Kernel* kernel = find(name);
  if (!kernel) return -1;
  emu::run(blocks, kThreads, seed, kernel->run, argument);
  return 0;
}
