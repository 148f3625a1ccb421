// The emulated device. Compiled without sanitizers; finds those of the program through weak symbols, so that the same
// object serves plain, ASan + UBSan and TSan builds.
//
// A CUDA thread is a fiber that runs until it waits (barrier, shuffle) or returns; the next one is picked from a
// shuffled order. Blocks run one after another, which hides nothing from TSan: each thread of the grid is a TSan
// context of its own, and contexts are ordered by nothing but what orders CUDA threads:
//   start and end of the launch;
//   a barrier, inside its block;
//   fence, atomic in one thread, then atomic on the same address, fence in another. Without both fences, an atomic
//   orders nothing, and a fence alone neither; shuffles never do.
// So a result that crosses blocks without a fence on both sides of the ticket, or a barrier that comes too late, is a
// data race. Not seen: what goes wrong only while two blocks run at the same time.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_ignore_thread_begin();
__attribute__((weak)) void __tsan_ignore_thread_end();

// Saves the registers that a call preserves on the stack, leaves the stack pointer in *save, and goes on from `load`.
// 27 ns for a pair of switches; swapcontext, which also saves the signal mask, takes 330.
void emu_switch(void** save, void* load);
}

#if defined(__x86_64__)
asm(R"(.text
.globl emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where `entry` would return to; also aligns its frame
  *--stack = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--stack = nullptr;
  return stack;
}
#elif defined(__aarch64__)
asm(R"(.text
.globl emu_switch
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  char* stack = top - 160;
  std::memset(stack, 0, 160);
  std::memcpy(stack + 88, &entry, sizeof entry);  // x30, where `ret` goes
  return stack;
}
#else
#error "emulator: no fiber switch for this processor"
#endif

namespace emu {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;
constexpr unsigned kWarpSize = 32;
constexpr unsigned kNoSync = 1;  // for TSan: otherwise every switch would order the two threads

struct Context {
  void* stack_pointer;
  const void* stack;
  size_t stack_bytes;
  void* asan_fake_stack;
  void* tsan_fiber;
};

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  Context context;
  unsigned index;
  State state = State::kReady;
  const char* waits_at = nullptr;
  unsigned shuffles = 0;   // how many this thread has joined
  unsigned mask = 0;       // of the last one
  char* fenced = nullptr;  // TSan: what this thread had seen and done at its last fence
  std::vector<void*> met;  // TSan: the atomics it has taken part in since
};

// Two meetings, used in turn: a fast lane may enter the next one while a slow one still reads this one's values.
struct Warp {
  struct Meeting {
    uint64_t values[kWarpSize];
    unsigned mask, arrived, left;
  } meetings[2] = {};
};

struct Block {
  unsigned index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live, at_barrier;
  std::map<std::string, void*> shared;
  char* barrier_sync;  // its address stands for the block's barrier in TSan
};

Block block;
Thread* current;
Context host;
void (*kernel_function)(const void*);
const void* kernel_argument;
unsigned grid_blocks;
char start_sync, end_sync;
std::map<const void*, void*> atomics;  // by address, an object for TSan
std::vector<void*> allocations;
std::vector<char*> stacks;

[[noreturn]] void die(const char* format, ...) {
  std::fprintf(stderr, "EMULATOR: block %u: ", block.index);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

void release(void* object) {
  if (__tsan_release) __tsan_release(object);
}
void acquire(void* object) {
  if (__tsan_acquire) __tsan_acquire(object);
}

// TSan intercepts malloc, memset and the like; the scheduler's own bookkeeping is not the kernel's.
struct Unobserved {
  Unobserved() {
    if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin();
  }
  ~Unobserved() {
    if (__tsan_ignore_thread_end) __tsan_ignore_thread_end();
  }
};

void switch_to(Context& from, Context& to, bool forever = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber, kNoSync);
  emu_switch(&from.stack_pointer, to.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
}

void thread_entry() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
  acquire(&start_sync);
  kernel_function(kernel_argument);
  release(&end_sync);
  current->state = State::kDone;
  --block.live;
  switch_to(current->context, host, true);
  std::abort();
}

void wait(State state, const char* here) {
  current->state = state;
  current->waits_at = here;
  switch_to(current->context, host);
}

void* poisoned(size_t bytes) {
  void* memory = std::malloc(bytes ? bytes : 1);
  std::memset(memory, 0xff, bytes);
  allocations.push_back(memory);
  return memory;
}

void free_allocations() {
  for (void* memory : allocations) std::free(memory);
  allocations.clear();
}

char* stack_of(unsigned thread, bool fresh) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, kAccess = PROT_READ | PROT_WRITE;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kStackBytes + kPage, kAccess, kFlags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) die("no memory for the stack of thread %u", thread);
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  char* stack = stacks[thread];
  // A new mapping makes TSan forget what the last block's thread did on this stack.
  if (fresh) mmap(stack, kStackBytes, kAccess, kFlags | MAP_FIXED, -1, 0);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
  return stack;
}

void start_block(unsigned index, unsigned threads, void** tsan_fibers) {
  block.index = index;
  block.threads.assign(threads, Thread{});
  block.warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  block.live = threads;
  block.at_barrier = 0;
  block.shared.clear();
  block.barrier_sync = static_cast<char*>(poisoned(8));
  for (unsigned i = 0; i < threads; ++i) {
    char* stack = stack_of(i, tsan_fibers != nullptr);
    block.threads[i].index = i;
    block.threads[i].context = {first_frame(stack + kStackBytes, thread_entry), stack, kStackBytes, nullptr,
                                tsan_fibers ? tsan_fibers[i] : nullptr};
  }
}

// True if the barrier opened: all threads that have not returned are there, and at the same one.
bool open_barrier() {
  if (block.live == 0 || block.at_barrier != block.live) return false;
  const char* here = nullptr;
  for (Thread& thread : block.threads) {
    if (thread.state != State::kAtBarrier) continue;
    if (here && std::strcmp(here, thread.waits_at)) die("divergent barrier: %s and %s", here, thread.waits_at);
    here = thread.waits_at;
    thread.state = State::kReady;
  }
  block.at_barrier = 0;
  return true;
}

void run_block(std::mt19937& random, bool shuffled) {
  std::vector<unsigned> order(block.threads.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  while (block.live) {
    bool moved = false;
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      Thread& thread = block.threads[i];
      if (thread.state == State::kAtShuffle) {
        const Warp::Meeting& meeting = block.warps[i / kWarpSize].meetings[(thread.shuffles - 1) % 2];
        if (meeting.arrived == thread.mask) thread.state = State::kReady;
      }
      if (thread.state != State::kReady) continue;
      current = &thread;
      moved = true;
      switch_to(host, thread.context);
    }
    if (open_barrier() || moved) continue;
    for (const Thread& thread : block.threads)
      if (thread.state != State::kDone)
        std::fprintf(stderr, "  thread %u waits at %s\n", thread.index, thread.waits_at);
    die("deadlock");
  }
}

}  // namespace

unsigned thread_index() { return current->index; }
unsigned block_index() { return block.index; }
unsigned grid_size() { return grid_blocks; }
unsigned lane() { return current->index % kWarpSize; }

void* shared(const char* here, size_t bytes) {
  Unobserved unobserved;
  void*& memory = block.shared[here];
  if (!memory) memory = poisoned(bytes);
  return memory;
}

void barrier(const char* here) {
  ++block.at_barrier;
  release(block.barrier_sync);
  wait(State::kAtBarrier, here);
  acquire(block.barrier_sync);
}

void fence() {
  if (!__tsan_create_fiber) return;
  Unobserved unobserved;
  if (!current->fenced) current->fenced = static_cast<char*>(poisoned(8));
  for (void* object : current->met) acquire(object);
  current->met.clear();
  release(current->fenced);
}

void atomic(const void* address) {
  if (!__tsan_create_fiber) return;
  Unobserved unobserved;
  void*& object = atomics[address];
  if (!object) object = poisoned(8);
  if (current->fenced) {
    // The state of the last fence, not that of now: passed on by a context that knows nothing else. Made by the host,
    // since a context begins with what its maker knows.
    __tsan_switch_to_fiber(host.tsan_fiber, kNoSync);
    void* messenger = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(messenger, kNoSync);
    acquire(current->fenced);
    release(object);
    __tsan_switch_to_fiber(current->context.tsan_fiber, kNoSync);
    __tsan_destroy_fiber(messenger);
  }
  current->met.push_back(object);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* here) {
  const unsigned bit = 1u << lane();
  if (!(mask & bit)) die("%s: lane %u is not in its own mask %08x", here, lane(), mask);
  if (source >= kWarpSize || !(mask >> source & 1)) die("%s: reads lane %u outside the mask %08x", here, source, mask);
  Warp::Meeting& meeting = block.warps[current->index / kWarpSize].meetings[current->shuffles++ % 2];
  if (!meeting.arrived) {
    meeting.mask = mask;
    meeting.left = 0;
  }
  if (meeting.mask != mask) die("%s: lanes disagree on the mask: %08x and %08x", here, meeting.mask, mask);
  meeting.values[lane()] = value;
  meeting.arrived |= bit;
  current->mask = mask;
  if (meeting.arrived != mask) wait(State::kAtShuffle, here);
  const uint64_t result = meeting.values[source];
  meeting.left |= bit;
  if (meeting.left == mask) meeting.arrived = 0;
  return result;
}

void run(unsigned blocks, unsigned threads, unsigned seed, void (*kernel)(const void*), const void* argument) {
  Unobserved unobserved;
  if (blocks == 0 || threads == 0 || threads > 1024) die("a launch of %u blocks of %u threads", blocks, threads);
  grid_blocks = blocks;
  kernel_function = kernel;
  kernel_argument = argument;
  std::mt19937 random(seed);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), random);

  // All contexts exist before the first block runs: one made later would be ordered after it. 0.6 ms each.
  std::vector<void*> fibers;
  if (__tsan_create_fiber) {
    host.tsan_fiber = __tsan_get_current_fiber();
    fibers.resize(static_cast<size_t>(blocks) * threads);
    for (void*& fiber : fibers) fiber = __tsan_create_fiber(0);
  }
  release(&start_sync);
  for (unsigned index : order) {
    start_block(index, threads, fibers.empty() ? nullptr : &fibers[static_cast<size_t>(index) * threads]);
    run_block(random, seed != 0);
    // Under TSan memory is freed at the end, or the next block's would have this one's history.
    if (fibers.empty()) free_allocations();
  }
  acquire(&end_sync);
  for (void* fiber : fibers) __tsan_destroy_fiber(fiber);
  atomics.clear();
  free_allocations();
}

}  // namespace emu
