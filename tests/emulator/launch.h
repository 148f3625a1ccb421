// The C boundary of the emulated kernels: what a driver's launch is to a real one.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Threads of a block, which the kernels are compiled for.
unsigned emu_threads(void);

// Bytes of the kernel's one argument; 0 for an unknown name.
size_t emu_argument_bytes(const char* kernel);

// Runs `kernel` over `blocks` blocks in the order that `seed` gives (0: the natural one); `argument` is copied as a
// launch copies it. 0, or -1 for an unknown name. Not reentrant: one device, one launch at a time.
int emu_launch(const char* kernel, const void* argument, unsigned blocks, unsigned seed);

#ifdef __cplusplus
}
#endif
