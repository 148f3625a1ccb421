// A stand-in for the NVIDIA driver (libcuda.so.1): takes the calls of src/cuda/ on a machine without a GPU, refuses
// what a driver would refuse, notes each launch, and runs the kernel if a library of emulated kernels is named.
//
// "Device memory" is memory of this process. Devices, failures and captures are set through the `standin_` functions
// and STANDIN_ variables; the tests read what happened with `standin_take_log`. Only what the launcher calls is here:
// a call of anything else fails in cudarc, by name.
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

// The codes of CUresult that are used here.
enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = 700,
  kCaptureUnsupported = 900,
};
const std::map<int, const char*> kNames = {
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},     {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},   {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"}, {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},   {kNotFound, "CUDA_ERROR_NOT_FOUND"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
};

struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
  bool retained = false;
};
struct Stream {
  Device* device;
  bool capturing = false;
};
struct Module {
  Device* device;
  const unsigned char* image;
  bool is_elf;
};
struct Function {
  Module* module;
  std::string name;
  size_t parameter_bytes;
};

std::mutex lock;
std::mutex running;            // the emulator runs one kernel at a time
std::vector<Device*> devices;  // a Device* is a CUcontext; nothing is ever freed
std::set<Stream*> streams;     // a Stream* is a CUstream
std::map<std::string, int> failures;
std::ostringstream log_text;
bool initialised = false;
unsigned next_seed = 0;  // of the emulator, see `standin_shuffle`
thread_local Device* current = nullptr;
thread_local int capture_mode = 0;  // 0 global, 2 relaxed

// Numbers of a variable, with commas between them.
std::vector<int> numbers(const char* variable, const char* otherwise) {
  const char* list = std::getenv(variable);
  std::istringstream text(list ? list : otherwise);
  std::vector<int> out;
  for (std::string item; std::getline(text, item, ',');) out.push_back(std::atoi(item.c_str()));
  return out;
}

// Whether a test wants this call to fail, and with what.
int failure(const char* call) {
  const auto found = failures.find(call);
  return found == failures.end() ? kSuccess : found->second;
}

#define ENTER(call)                              \
  const std::lock_guard<std::mutex> guard(lock); \
  if (const int code = failure(call)) return code

template <class T>
T read(const unsigned char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// ---- images: 64-bit ELF of machine EM_CUDA, or PTX
// -------------------------------------------------------------------

// Architecture in the ELF flags: the low byte up to ABI version 7 (sm_90 and before), the second byte after that.
int elf_capability(const unsigned char* image) {
  const auto flags = read<uint32_t>(image + 48);
  return image[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff;
}

std::string_view elf_section(const unsigned char* image, const std::string& wanted) {
  const auto table = read<uint64_t>(image + 40);
  const auto size = read<uint16_t>(image + 58), count = read<uint16_t>(image + 60), names = read<uint16_t>(image + 62);
  const auto header = [&](int at) { return image + table + at * size; };
  const auto offset = [&](int at) { return read<uint64_t>(header(at) + 24); };
  for (int at = 0; at < count; ++at) {
    const char* name = reinterpret_cast<const char*>(image + offset(names) + read<uint32_t>(header(at)));
    if (wanted == name) return {reinterpret_cast<const char*>(image + offset(at)), read<uint64_t>(header(at) + 32)};
  }
  return {};
}

// Bytes of all parameters of a kernel: what a launch reads. 0 if there is no such kernel.
size_t parameter_bytes(const Module& module, const std::string& kernel) {
  if (module.is_elf) {
    const std::string_view info = elf_section(module.image, ".nv.info." + kernel);
    for (size_t at = 0; at + 4 <= info.size();) {
      const auto* entry = reinterpret_cast<const unsigned char*>(info.data() + at);
      const auto value = read<uint16_t>(entry + 2);
      if (entry[1] == 0x19) return value;  // EIATTR_CBANK_PARAM_SIZE
      at += entry[0] == 4 ? 4 + value : 4;
    }
    return 0;
  }
  const std::string text(reinterpret_cast<const char*>(module.image));
  const std::string parameter = kernel + "_param_0[";
  const size_t at = text.find(parameter);
  return at == std::string::npos ? 0 : std::strtoul(text.c_str() + at + parameter.size(), nullptr, 10);
}

int check_image(const unsigned char* image, int capability) {
  if (reinterpret_cast<uintptr_t>(image) % 16) return kInvalidImage;
  if (std::memcmp(image, "\177ELF", 4) == 0) {
    if (read<uint16_t>(image + 18) != 190) return kInvalidImage;
    const int built = elf_capability(image);
    return built / 10 == capability / 10 && built <= capability ? kSuccess : kNoBinaryForGpu;
  }
  const char* target = std::strstr(reinterpret_cast<const char*>(image), "\n.target sm_");
  if (!target) return kInvalidImage;
  return std::atoi(target + std::strlen("\n.target sm_")) <= capability ? kSuccess : kNoBinaryForGpu;
}

// The emulated kernels, tests/emulator/launch.h; absent unless STANDIN_KERNELS names the library.
struct Emulator {
  unsigned (*threads)();
  size_t (*argument_bytes)(const char* kernel);
  int (*launch)(const char* kernel, const void* argument, unsigned blocks, unsigned seed);
};

const Emulator* emulator() {
  static const Emulator* loaded = [] {
    const char* path = std::getenv("STANDIN_KERNELS");
    void* library = path ? dlopen(path, RTLD_NOW) : nullptr;
    if (path && !library) std::fprintf(stderr, "stand-in: %s\n", dlerror());
    if (!library) return static_cast<Emulator*>(nullptr);
    auto* out = new Emulator;
    *reinterpret_cast<void**>(&out->threads) = dlsym(library, "emu_threads");
    *reinterpret_cast<void**>(&out->argument_bytes) = dlsym(library, "emu_argument_bytes");
    *reinterpret_cast<void**>(&out->launch) = dlsym(library, "emu_launch");
    return out;
  }();
  return loaded;
}

}  // namespace

extern "C" {

// ---- for the tests
// ---------------------------------------------------------------------------------------------------

// The named call returns `code` from now on; 0 ends it.
void standin_fail(const char* call, int code) { failures[call] = code; }

void* standin_context(int device) { return devices.at(device); }

void* standin_stream(int device) {
  auto* stream = new Stream{devices.at(device)};
  streams.insert(stream);
  return stream;
}

// Emulated launches run their blocks and threads in another order each, this number being the first one's seed. 0: all
// in the natural order.
void standin_shuffle(unsigned seed) { next_seed = seed; }

void standin_capture(void* stream, int on) { static_cast<Stream*>(stream)->capturing = on; }

int standin_capture_mode() { return capture_mode; }

// One line an event since the last call, into `out`; returns its length, or what it needs.
size_t standin_take_log(char* out, size_t size) {
  const std::lock_guard<std::mutex> guard(lock);
  const std::string text = log_text.str();
  if (text.size() >= size) return text.size() + 1;
  std::memcpy(out, text.c_str(), text.size() + 1);
  log_text.str("");
  return text.size();
}

// ---- the driver
// ------------------------------------------------------------------------------------------------------

int cuInit(unsigned flags) {
  ENTER("cuInit");
  if (devices.empty()) {
    // Few multiprocessors, so that grids stay small enough to emulate.
    const std::vector<int> few = numbers("STANDIN_MULTIPROCESSORS", "4");
    for (const int capability : numbers("STANDIN_CAPABILITIES", "90"))
      devices.push_back(new Device{capability, few[devices.size() % few.size()]});
  }
  initialised = true;
  return flags == 0 ? kSuccess : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion");
  *version = 12040;
  return kSuccess;
}

int cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount");
  *count = static_cast<int>(devices.size());
  return initialised ? kSuccess : kNotInitialized;
}

int cuDeviceGetName(char* name, int size, int device) {
  ENTER("cuDeviceGetName");
  std::snprintf(name, size, "Stand-in %d", devices.at(device)->capability);
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet");
  if (!initialised) return kNotInitialized;
  *device = ordinal;
  return ordinal >= 0 && ordinal < static_cast<int>(devices.size()) ? kSuccess : kInvalidDevice;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER("cuDeviceGetAttribute");
  const int capability = devices.at(device)->capability;
  switch (attribute) {
    case 16:
      *value = devices.at(device)->multiprocessors;
      return kSuccess;
    case 75:
      *value = capability / 10;
      return kSuccess;
    case 76:
      *value = capability % 10;
      return kSuccess;
    default:
      return kInvalidValue;
  }
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER("cuDevicePrimaryCtxRetain");
  devices.at(device)->retained = true;
  log_text << "retain " << device << '\n';
  *context = devices[device];
  return kSuccess;
}

int cuCtxGetCurrent(void** context) {
  ENTER("cuCtxGetCurrent");
  *context = current;
  return kSuccess;
}

int cuCtxSetCurrent(void* context) {
  ENTER("cuCtxSetCurrent");
  current = static_cast<Device*>(context);
  return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode");
  std::swap(*mode, capture_mode);
  return kSuccess;
}

int cuModuleLoadData(void** module, const void* data) {
  // As long as a real one takes, so that a second thread comes before the first is done.
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  ENTER("cuModuleLoadData");
  if (!current || !current->retained) return kInvalidContext;
  // A capture in the global mode, PyTorch's, forbids this to all threads but those in relaxed mode.
  for (const Stream* stream : streams)
    if (stream->capturing && capture_mode != 2) return kCaptureUnsupported;
  const auto* image = static_cast<const unsigned char*>(data);
  if (const int code = check_image(image, current->capability)) return code;
  const bool is_elf = image[0] == 0x7f;
  log_text << "load " << (is_elf ? "sm_" + std::to_string(elf_capability(image)) : "ptx") << '\n';
  *module = new Module{current, image, is_elf};
  return kSuccess;
}

int cuModuleGetFunction(void** function, void* handle, const char* name) {
  ENTER("cuModuleGetFunction");
  auto* module = static_cast<Module*>(handle);
  const size_t bytes = parameter_bytes(*module, name);
  if (bytes == 0) return kNotFound;
  *function = new Function{module, name, bytes};
  return kSuccess;
}

int cuFuncGetAttribute(int* value, int, void*) {
  ENTER("cuFuncGetAttribute");
  *value = 32;
  return kSuccess;
}

int cuStreamIsCapturing(void* handle, int* status) {
  ENTER("cuStreamIsCapturing");
  auto* stream = static_cast<Stream*>(handle);
  if (!streams.count(stream)) return kInvalidHandle;
  *status = stream->capturing;
  return kSuccess;
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream_handle, void** parameters, void** extra) {
  const auto* function = static_cast<Function*>(handle);
  {
    ENTER("cuLaunchKernel");
    auto* stream = static_cast<Stream*>(stream_handle);
    if (current != function->module->device) return kInvalidContext;
    if (stream && (!streams.count(stream) || stream->device != current)) return kInvalidHandle;
    const bool grid =
        grid_x >= 1 && grid_x <= 0x7fffffff && grid_y >= 1 && grid_y <= 65535 && grid_z >= 1 && grid_z <= 65535;
    const uint64_t threads = uint64_t{block_x} * block_y * block_z;
    if (!grid || threads < 1 || threads > 1024 || shared > 49152 || !parameters || extra) return kInvalidValue;
    log_text << "launch " << function->name << " grid " << grid_x << ' ' << grid_y << ' ' << grid_z << " block "
             << block_x << ' ' << block_y << ' ' << block_z << " shared " << shared << " stream " << stream_handle
             << " parameters ";
    const auto* bytes = static_cast<const unsigned char*>(parameters[0]);
    char hex[3];
    for (size_t at = 0; at < function->parameter_bytes; ++at) {
      std::snprintf(hex, sizeof hex, "%02x", bytes[at]);
      log_text << hex;
    }
    log_text << '\n';
  }
  const Emulator* kernels = emulator();
  if (!kernels) return kSuccess;
  const char* name = function->name.c_str();
  if (kernels->argument_bytes(name) != function->parameter_bytes || kernels->threads() != block_x) return kInvalidValue;
  const std::lock_guard<std::mutex> guard(running);
  const unsigned seed = next_seed ? next_seed++ : 0;
  return kernels->launch(name, parameters[0], grid_x, seed) == 0 ? kSuccess : kNotFound;
}

int cuGetErrorName(int code, const char** name) {
  const auto found = kNames.find(code);
  *name = found == kNames.end() ? nullptr : found->second;
  return *name ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int code, const char** text) {
  *text = "what the driver says about it";
  return kNames.count(code) ? kSuccess : kInvalidValue;
}

}  // extern "C"
