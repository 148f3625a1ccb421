// What kernels/ need of CUDA, for g++: one fiber per CUDA thread, see scheduler.cpp.
//
// Only kernel sources include this, through kernels/compat.cuh. Memory of the kernel is touched here and not in the
// scheduler, so that a sanitizer, which instruments this side alone, sees it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ inline __attribute__((noinline))  // `inline`: several files have it
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- where a thread is ---------------------------------------------------------------------------------------------

// A proxy, since the kernel says `threadIdx.x`.
struct EmuThreadIndex {
  struct X {
    operator int() const { return static_cast<int>(emu::thread_index()); }
  } x;
};
struct EmuBlockIndex {
  struct X {
    operator unsigned() const { return emu::block_index(); }
  } x;
};
struct EmuGridSize {
  struct X {
    operator unsigned() const { return emu::grid_size(); }
  } x;
};
inline constexpr EmuThreadIndex threadIdx{};
inline constexpr EmuBlockIndex blockIdx{};
inline constexpr EmuGridSize gridDim{};

#define EMU_TEXT(x) #x
#define EMU_LINE(x) EMU_TEXT(x)
#define EMU_HERE __FILE__ ":" EMU_LINE(__LINE__)

// One buffer per block and place in the source: exactly this size, every byte 0xff (a NaN, a huge index).
#define SHARED(type, name, count) type* name = static_cast<type*>(emu::shared(EMU_HERE, sizeof(type) * (count)))
#define __syncthreads() emu::barrier(EMU_HERE)
#define __shfl_sync(mask, value, source) emu_shuffle(mask, value, static_cast<unsigned>(source), EMU_HERE)
#define __shfl_xor_sync(mask, value, distance) \
  emu_shuffle(mask, value, emu::lane() ^ static_cast<unsigned>(distance), EMU_HERE)

template <class T>
T emu_shuffle(unsigned mask, T value, unsigned source, const char* here) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emu::exchange(mask, bits, source, here);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- memory --------------------------------------------------------------------------------------------------------

inline void __threadfence() { emu::fence(); }

// One processor runs all fibers, so a load and a store are atomic; relaxed, so that TSan takes no ordering from them.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  emu::atomic(address);
  const unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, old >= limit ? 0u : old + 1, __ATOMIC_RELAXED);
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline void store16(uint4* address, uint4 value) { *address = value; }

// ---- numbers: twins of the instructions in compat.cuh --------------------------------------------------------------

inline double sinpi(double value) { return std::sin(value * 3.14159265358979323846); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float low_half_to_float(unsigned word) {
  const uint16_t bits = static_cast<uint16_t>(word);
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}
inline float high_half_to_float(unsigned word) { return low_half_to_float(word >> 16); }

inline unsigned emu_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline unsigned emu_bfloat(float value) {  // nearest, ties to even
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline unsigned floats_to_halves(float low, float high) { return emu_half(high) << 16 | emu_half(low); }
inline unsigned floats_to_bfloats(float low, float high) { return emu_bfloat(high) << 16 | emu_bfloat(low); }
