// libcuda.so.1 as comfy-aimdo asks for it: the real library of the package runs on this one, unchanged.
//
// New device memory holds NaN whatever is read from it, and freed memory is gone from the address space, so that nothing stale
// is read without being noticed. Structures and error numbers are those of the CUDA driver API 12.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "ledger.h"

using Result = int;
using Pointer = unsigned long long;
using Handle = unsigned long long;
enum : Result { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, ALREADY_PINNED = 712, NOT_PINNED = 713 };

// The beginnings of CUmemAllocationProp and of what a handle of cuMemCreate stands for here.
struct Location { int type, device; };
struct Properties { int type, handle_types; Location location; };
struct Physical { size_t bytes; int device; };

constexpr unsigned READ_ONLY = 8;  // CU_MEMHOSTREGISTER_READ_ONLY
constexpr size_t UNIT = 512, EDGE = 1 << 16;  // torch's own allocator rounds sizes up to units of 512 bytes
constexpr int NAN_BYTE = 0xFF;

static std::unique_lock<std::mutex> locked() { return std::unique_lock(ledger().lock); }
static void finish_copies() { if (fake_finish_copies) fake_finish_copies(); }

static char* map_host_memory(void* at, size_t bytes, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* found = mmap(at, bytes, protection, flags, -1, 0);
  return found == MAP_FAILED ? nullptr : (char*)found;
}

// --- memory that torch and aimdo allocate ---

static Result allocate(Pointer* out, size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + UNIT - 1) / UNIT * UNIT;
  int device = fake_current();
  auto lock = locked();
  if (!ledger().take(device, bytes)) return OUT_OF_MEMORY;
  char* memory = map_host_memory(nullptr, bytes, PROT_READ | PROT_WRITE);
  if (!memory) {
    ledger().give_back(device, bytes);
    return OUT_OF_MEMORY;
  }
  ledger().ranges[ALLOCATED][memory] = {bytes, device};
  lock.unlock();
  size_t edge = std::min(bytes, EDGE);  // of large ones only the ends, for pages that nobody touches cost nothing
  memset(memory, NAN_BYTE, edge);
  memset(memory + bytes - edge, NAN_BYTE, edge);
  *out = (Pointer)memory;
  return OK;
}

static Result release(Pointer pointer) {
  auto lock = locked();
  auto found = ledger().ranges[ALLOCATED].find((const char*)pointer);
  if (found == ledger().ranges[ALLOCATED].end()) return INVALID_VALUE;
  ledger().give_back(found->second.device, found->second.bytes);
  munmap((void*)pointer, found->second.bytes);
  ledger().ranges[ALLOCATED].erase(found);
  return OK;
}

// aimdo writes a jump into the beginning of each of these six, so they must be six functions, and longer than a jump.
#define A_BODY_OF_ITS_OWN(number) volatile int mark = number; (void)mark
EXPORT Result cuMemAlloc_v2(Pointer* out, size_t bytes) { A_BODY_OF_ITS_OWN(1); return allocate(out, bytes); }
EXPORT Result cuMemFree_v2(Pointer pointer) { A_BODY_OF_ITS_OWN(2); return release(pointer); }
EXPORT Result cuMemAllocAsync(Pointer* out, size_t bytes, void*) { A_BODY_OF_ITS_OWN(3); return allocate(out, bytes); }
EXPORT Result cuMemAllocAsync_ptsz(Pointer* out, size_t bytes, void*) { A_BODY_OF_ITS_OWN(4); return allocate(out, bytes); }
EXPORT Result cuMemFreeAsync(Pointer pointer, void*) { A_BODY_OF_ITS_OWN(5); return release(pointer); }
EXPORT Result cuMemFreeAsync_ptsz(Pointer pointer, void*) { A_BODY_OF_ITS_OWN(6); return release(pointer); }

// --- addresses that aimdo reserves, and memory that it maps there ---

EXPORT Result cuMemAddressReserve(Pointer* out, size_t bytes, size_t, Pointer, unsigned long long) {
  char* address = map_host_memory(nullptr, bytes, PROT_NONE);
  if (!address) return OUT_OF_MEMORY;
  auto lock = locked();
  ledger().ranges[RESERVED][address] = {bytes, -1};
  *out = (Pointer)address;
  return OK;
}

EXPORT Result cuMemAddressFree(Pointer pointer, size_t bytes) {
  auto lock = locked();
  ledger().ranges[RESERVED].erase((const char*)pointer);
  return munmap((void*)pointer, bytes) ? INVALID_VALUE : OK;
}

EXPORT Result cuMemCreate(Handle* out, size_t bytes, const Properties* properties, unsigned long long) {
  auto lock = locked();
  if (!ledger().take(properties->location.device, bytes)) return OUT_OF_MEMORY;
  *out = (Handle) new Physical{bytes, properties->location.device};
  return OK;
}

EXPORT Result cuMemRelease(Handle handle) {
  auto* physical = (Physical*)handle;
  auto lock = locked();
  ledger().give_back(physical->device, physical->bytes);
  delete physical;
  return OK;
}

EXPORT Result cuMemMap(Pointer pointer, size_t bytes, size_t, Handle handle, unsigned long long) {
  char* memory = map_host_memory((void*)pointer, bytes, PROT_READ | PROT_WRITE);
  if (!memory) return OUT_OF_MEMORY;
  memset(memory, NAN_BYTE, bytes);
  auto lock = locked();
  ledger().ranges[MAPPED][memory] = {bytes, ((Physical*)handle)->device};
  return OK;
}

EXPORT Result cuMemSetAccess(Pointer, size_t, const void*, size_t) { return OK; }

EXPORT Result cuMemUnmap(Pointer pointer, size_t bytes) {
  finish_copies();  // tensors in this memory do not own it
  auto lock = locked();
  auto& mapped = ledger().ranges[MAPPED];
  mapped.erase(mapped.lower_bound((const char*)pointer), mapped.lower_bound((const char*)pointer + bytes));
  return map_host_memory((void*)pointer, bytes, PROT_NONE) ? OK : INVALID_VALUE;
}

// --- pinned memory of the host ---

// Whether this process may write each of these bytes.
static bool is_writable(const void* pointer, size_t bytes) {
  auto position = (unsigned long)pointer, end = position + bytes;
  FILE* maps = fopen("/proc/self/maps", "r");  // in the order of addresses
  char line[512], rights[5];
  unsigned long from, to;
  bool writable = true;
  while (writable && position < end && fgets(line, sizeof line, maps))
    if (sscanf(line, "%lx-%lx %4s", &from, &to, rights) == 3 && position >= from && position < to) {
      writable = rights[1] == 'w';
      position = to;
    }
  fclose(maps);
  return writable;
}

// A real driver refuses memory that may not be written, such as a mapped file, unless it is told that it is read only.
EXPORT Result cuMemHostRegister(void* pointer, size_t bytes, unsigned flags) {
  bool refused = !(flags & READ_ONLY) && !is_writable(pointer, bytes);
  auto lock = locked();
  if (refused) {
    ledger().refused_pins++;
    return INVALID_VALUE;
  }
  if (ledger().find(PINNED, pointer) != ledger().ranges[PINNED].end()) return ALREADY_PINNED;
  ledger().ranges[PINNED][(const char*)pointer] = {bytes, -1};
  return OK;
}

EXPORT Result cuMemHostUnregister(void* pointer) {
  finish_copies();
  auto lock = locked();
  return ledger().ranges[PINNED].erase((const char*)pointer) ? OK : NOT_PINNED;
}

EXPORT Result cuMemAllocHost(void** out, size_t bytes) {
  *out = malloc(bytes);
  return *out ? cuMemHostRegister(*out, bytes, 0) : OUT_OF_MEMORY;
}

EXPORT Result cuMemFreeHost(void* pointer) {
  cuMemHostUnregister(pointer);
  free(pointer);
  return OK;
}

// --- copies of aimdo's own, which arrive at once, and waiting ---

EXPORT Result cuMemcpyHtoDAsync(Pointer to, const void* from, size_t bytes, void*) {
  memcpy((void*)to, from, bytes);
  fake_count_copy(UP, fake_device_of((void*)to), bytes);
  return OK;
}

EXPORT Result cuMemcpyDtoHAsync(void* to, Pointer from, size_t bytes, void*) {
  finish_copies();
  memcpy(to, (const void*)from, bytes);
  fake_count_copy(DOWN, fake_device_of((void*)from), bytes);
  return OK;
}

EXPORT Result cuCtxSynchronize() { finish_copies(); return OK; }
EXPORT Result cuEventCreate(void** event, unsigned) { *event = malloc(1); return OK; }
EXPORT Result cuEventDestroy(void* event) { free(event); return OK; }
EXPORT Result cuEventRecord(void*, void*) { return OK; }
EXPORT Result cuEventSynchronize(void*) { finish_copies(); return OK; }

// --- what there is ---

EXPORT Result cuInit(unsigned) { return OK; }
EXPORT Result cuCtxGetDevice(int* device) { *device = fake_current(); return OK; }
EXPORT Result cuDeviceGet(int* device, int index) {
  if (index < 0 || index >= fake_count()) return INVALID_DEVICE;
  *device = index;
  return OK;
}
EXPORT Result cuDeviceGetAttribute(int* value, int, int) { *value = 0; return OK; }
EXPORT Result cuDeviceTotalMem(size_t* bytes, int device) { *bytes = fake_capacity(device); return OK; }
EXPORT Result cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "Fake GPU %d", device); return OK; }
EXPORT Result cuDeviceGetUuid(unsigned char* uuid, int device) { memset(uuid, device, 16); return OK; }
EXPORT Result cuGetErrorString(Result error, const char** text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : error ? "an error of the fake driver" : "no error";
  return OK;
}
EXPORT Result cuMemGetInfo(size_t* available, size_t* total) {
  size_t used = fake_used(fake_current());
  *total = fake_capacity(fake_current());
  *available = *total > used ? *total - used : 0;  // less than used where a test has taken capacity away
  return OK;
}

// Name -> function, and the one for streams of each thread where that is another.
struct Symbol { void *function, *per_thread; };
#define SAME(name) {#name, {(void*)name, (void*)name}}
EXPORT Result cuGetProcAddress(const char* name, void** out, int, uint64_t flags, int*) {
  static const std::map<std::string, Symbol> symbols = {
      SAME(cuInit), SAME(cuGetErrorString), SAME(cuCtxGetDevice), SAME(cuCtxSynchronize), SAME(cuDeviceGet),
      SAME(cuDeviceGetAttribute), SAME(cuDeviceTotalMem), SAME(cuDeviceGetName), SAME(cuDeviceGetUuid), SAME(cuMemGetInfo),
      {"cuMemAlloc", {(void*)cuMemAlloc_v2, (void*)cuMemAlloc_v2}}, {"cuMemFree", {(void*)cuMemFree_v2, (void*)cuMemFree_v2}},
      {"cuMemAllocAsync", {(void*)cuMemAllocAsync, (void*)cuMemAllocAsync_ptsz}},
      {"cuMemFreeAsync", {(void*)cuMemFreeAsync, (void*)cuMemFreeAsync_ptsz}}, SAME(cuMemAllocHost), SAME(cuMemFreeHost),
      SAME(cuMemHostRegister), SAME(cuMemHostUnregister), SAME(cuMemAddressReserve), SAME(cuMemAddressFree), SAME(cuMemCreate),
      SAME(cuMemMap), SAME(cuMemSetAccess), SAME(cuMemUnmap), SAME(cuMemRelease), SAME(cuMemcpyHtoDAsync), SAME(cuMemcpyDtoHAsync),
      SAME(cuEventCreate), SAME(cuEventDestroy), SAME(cuEventRecord), SAME(cuEventSynchronize)};
  constexpr uint64_t PER_THREAD_STREAMS = 2;
  auto found = symbols.find(name);
  *out = found == symbols.end() ? nullptr : flags == PER_THREAD_STREAMS ? found->second.per_thread : found->second.function;
  return *out ? OK : NOT_FOUND;
}
