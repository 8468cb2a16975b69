// SPDX-License-Identifier: Apache-2.0
// A CUDA driver that launches nothing and notes what it was asked to: Triton's launcher and ours run against it.
#include <cstdint>
#include <cstring>

namespace {

unsigned char noted[1 << 16];
int used = 0;
int sizes[160];
int count = 0;

void note(const void* bytes, int size) {
  if (used + size > static_cast<int>(sizeof noted)) return;
  memcpy(noted + used, bytes, size);
  used += size;
}

int launched(void* function, const unsigned* grid, unsigned threads, unsigned shared, void* stream, void** arguments) {
  const uint64_t head[] = {reinterpret_cast<uint64_t>(function), grid[0], grid[1], grid[2], threads, shared,
                           reinterpret_cast<uint64_t>(stream)};
  note(head, sizeof head);
  for (int i = 0; i < count; ++i) note(arguments[i], sizes[i]);
  return 0;
}

struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

template <typename T>
int give(T* out, T value) {
  *out = value;
  return 0;
}

}  // namespace

extern "C" {

void note_sizes(const int* of_arguments, int how_many) {
  memcpy(sizes, of_arguments, how_many * sizeof(int));
  count = how_many;
}

int take_notes(unsigned char* out) {
  const int size = used;
  memcpy(out, noted, size);
  used = 0;
  return size;
}

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void**) {
  return launched(function, config->grid, config->block[0], config->shared, config->stream, arguments);
}

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void**) {
  const unsigned grid[] = {x, y, z};
  return launched(function, grid, threads, shared, stream, arguments);
}

// The map's 128 bytes hold what it was made from.
int cuTensorMapEncodeTiled(void* map, int dtype, uint32_t rank, void* address, const uint64_t* size,
                           const uint64_t* stride, const uint32_t* box, const uint32_t* step, int interleave,
                           int swizzle, int promotion, int fill) {
  unsigned char* out = static_cast<unsigned char*>(map);
  memset(out, 0, 128);
  const int head[] = {dtype, static_cast<int>(rank), interleave, swizzle, promotion, fill};
  memcpy(out, head, 24);
  memcpy(out + 24, &address, 8);
  for (uint32_t i = 0; i < rank; ++i) {
    const uint32_t line[] = {static_cast<uint32_t>(size[i]), i + 1 < rank ? static_cast<uint32_t>(stride[i]) : 0,
                             box[i], step[i]};
    memcpy(out + 32 + 16 * i, line, 16);
  }
  return 0;
}

int cuPointerGetAttribute(void* out, int, uint64_t pointer) { return give(static_cast<uint64_t*>(out), pointer); }
int cuGetErrorString(int, const char** text) { return give(text, "stub"); }
int cuGetErrorName(int, const char** text) { return give(text, "STUB"); }
int cuDeviceGet(int* device, int) { return give(device, 0); }
int cuDeviceGetAttribute(int* value, int, int) { return give(value, 232448); }
int cuCtxGetCurrent(void** context) { return give(context, reinterpret_cast<void*>(1)); }
int cuCtxGetDevice(int* device) { return give(device, 0); }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxSetLimit(int, size_t) { return 0; }
int cuCtxGetLimit(size_t* value, int) { return give(value, size_t{0}); }
int cuDevicePrimaryCtxRetain(void** context, int) { return give(context, reinterpret_cast<void*>(1)); }
int cuDriverGetVersion(int* version) { return give(version, 13000); }
int cuModuleLoadData(void** module, const void*) { return give(module, reinterpret_cast<void*>(2)); }
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return give(function, reinterpret_cast<void*>(0x1234)); }
int cuFuncGetAttribute(int* value, int attribute, void*) { return give(value, attribute == 0 ? 1024 : 0); }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void*, const void*) { return give(clusters, 1); }
int cuStreamIsCapturing(void*, int* capturing) { return give(capturing, 0); }
int cuStreamGetCaptureInfo(void*, int* capturing, ...) { return give(capturing, 0); }
int cuInit(unsigned) { return 0; }
}
