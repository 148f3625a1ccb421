// The emulated device: blocks one after another, the threads of a block as fibers. See scheduler.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace emu {

// ---- from inside a kernel; `here` is file:line, for messages and for telling barriers apart
unsigned thread_index();
unsigned block_index();
unsigned grid_size();
unsigned lane();
void* shared(const char* here, size_t bytes);
void barrier(const char* here);
// All lanes of `mask` meet; returns what lane `source` brought.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* here);
void fence();
void atomic(const void* address);  // an atomic operation on it is about to be done

// ---- from outside
struct Kernel {
  const char* name;
  size_t bytes;  // of its one argument
  unsigned threads;
  void (*run)(const void* argument);
};
// Makes kernels known to `emu_launch`; true.
bool add(std::initializer_list<Kernel> some);

// Runs kernel(argument) for every thread of a one-dimensional grid. Seed 0 keeps the natural order; any other shuffles
// blocks, and threads between any two points where they wait. A misuse (divergent barriers, a lane missing from a
// shuffle) is written to stderr, and the process aborts.
void run(unsigned blocks, unsigned threads, unsigned seed, void (*kernel)(const void*), const void* argument);

}  // namespace emu
