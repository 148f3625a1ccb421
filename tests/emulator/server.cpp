// Launches on request: reads one from stdin, runs it, writes the output buffers to stdout; until stdin ends.
//
// A process of its own, because a sanitizer has to own the process it watches, and ends it at the first fault. Every
// buffer is an allocation of its own and of exactly its size, so that one byte past its end is seen.
//
// Request: Header, name, argument, then per buffer a Buffer and its bytes, then the Pointers. Reply: the bytes of the
// buffers that are outputs, in order.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "launch.h"

namespace {

struct Header {
  uint32_t name_bytes, argument_bytes, buffers, pointers, blocks, seed;
};
struct Buffer {
  uint64_t bytes;
  uint32_t offset;  // of the first byte from an address that is a multiple of 16
  uint32_t is_output;
};
struct Pointer {
  uint32_t at;  // where in the argument
  uint32_t buffer;
};

bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "server: %s\n", what);
  std::exit(2);
}

struct Memory {
  Buffer buffer;
  void* allocation;
  char* data() const { return static_cast<char*>(allocation) + buffer.offset; }
};

}  // namespace

int main() {
  Header header;
  while (read(&header, sizeof header)) {
    std::string name(header.name_bytes, '\0');
    std::vector<char> argument(header.argument_bytes);
    if (!read(name.data(), name.size()) || !read(argument.data(), argument.size())) fail("request cut short");
    if (emu_argument_bytes(name.c_str()) != argument.size()) fail("unknown kernel, or an argument of another size");

    std::vector<Memory> memory(header.buffers);
    for (Memory& m : memory) {
      if (!read(&m.buffer, sizeof m.buffer)) fail("request cut short");
      m.allocation = std::malloc(m.buffer.bytes + m.buffer.offset);
      if (!read(m.data(), m.buffer.bytes)) fail("request cut short");
    }
    for (uint32_t i = 0; i < header.pointers; ++i) {
      Pointer pointer;
      if (!read(&pointer, sizeof pointer)) fail("request cut short");
      const char* address = memory.at(pointer.buffer).data();
      for (size_t byte = 0; byte < sizeof address; ++byte)
        argument.at(pointer.at + byte) = reinterpret_cast<const char*>(&address)[byte];
    }

    emu_launch(name.c_str(), argument.data(), header.blocks, header.seed);
    for (const Memory& m : memory) {
      if (m.buffer.is_output && m.buffer.bytes) std::fwrite(m.data(), m.buffer.bytes, 1, stdout);
      std::free(m.allocation);
    }
    std::fflush(stdout);
  }
}
