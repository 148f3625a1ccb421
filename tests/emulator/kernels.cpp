// Some kernels of kernels/, compiled for the emulator. build.py compiles this file several times, each with a part of
// the kernels: -DEMULATE_POLICY_LOSS or -DEMULATE_SDE_STEP, and -DVARIANTS="X(f32) X(bf16)".
#include "scheduler.h"

#ifdef EMULATE_POLICY_LOSS
#include "policy_loss.cu"
#else
#include "sde_step.cu"
#endif

namespace {

// By value, as a launch passes it: every thread has its own copy, and none can write to another's.
template <class Argument, void (*kKernel)(Argument)>
emu::Kernel kernel(const char* name) {
  return {name, sizeof(Argument), kThreads, [](const void* p) { kKernel(*static_cast<const Argument*>(p)); }};
}

#ifdef EMULATE_POLICY_LOSS
#define X(variant)                                                                           \
  kernel<PolicyLossForward, policy_loss_forward_##variant>("policy_loss_forward_" #variant), \
      kernel<PolicyLossBackward, policy_loss_backward_##variant>("policy_loss_backward_" #variant),
#else
#define X(variant)                                                                  \
  kernel<SdeStepForward, sde_step_forward_##variant>("sde_step_forward_" #variant), \
      kernel<SdeStepBackward, sde_step_backward_##variant>("sde_step_backward_" #variant),
#endif

const bool kAdded = emu::add({VARIANTS});

}  // namespace
