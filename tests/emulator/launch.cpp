// Finds the kernels that were linked in by name, and launches them.
#include "launch.h"

#include <cstring>
#include <vector>

#include "scheduler.h"

namespace {

std::vector<emu::Kernel>& kernels() {  // in a function, so that it exists before any file adds to it
  static std::vector<emu::Kernel> all;
  return all;
}

const emu::Kernel* find(const char* name) {
  for (const emu::Kernel& kernel : kernels())
    if (!std::strcmp(kernel.name, name)) return &kernel;
  return nullptr;
}

}  // namespace

bool emu::add(std::initializer_list<Kernel> some) {
  kernels().insert(kernels().end(), some);
  return true;
}

unsigned emu_threads() { return kernels().front().threads; }

size_t emu_argument_bytes(const char* name) {
  const emu::Kernel* kernel = find(name);
  return kernel ? kernel->bytes : 0;
}

int emu_launch(const char* name, const void* argument, unsigned blocks, unsigned seed) {
  const emu::Kernel* kernel = find(name);
  if (!kernel) return -1;
  emu::run(blocks, kernel->threads, seed, kernel->run, argument);
  return 0;
}
