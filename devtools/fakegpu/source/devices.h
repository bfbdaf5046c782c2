// What the two libraries of the fake GPUs share: the driver's side (devices.cpp, driver.cpp: libcuda.so.1) and torch's side
// (streams.cpp, torch_device.cpp, torch_operators.cpp: libfakegpu.so). Python reads the counters through the same functions.
//
// A device is a capacity in bytes and a ledger of what is taken from it; its memory is memory of the host.
#pragma once
#include <cstddef>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default"), noinline))

enum Copy { UP, DOWN, ON, BETWEEN };  // host to device, device to host, on one device, between two

// Number of devices, and bytes of each.
EXPORT void fake_configure(int count, size_t bytes);
EXPORT void fake_set_capacity(int device, size_t bytes);
EXPORT size_t fake_capacity(int device);
EXPORT int fake_count();

// The calling thread's current device. `fake_exchange` sets it, unless it is negative, and gives the one before.
EXPORT int fake_current();
EXPORT int fake_exchange(int device);

// Bytes taken now, and the most since the last reset.
EXPORT size_t fake_used(int device);
EXPORT size_t fake_peak(int device);
EXPORT void fake_reset_peaks();

// Bytes copied: to (UP, ON, BETWEEN) or from (DOWN) a device.
EXPORT uint64_t fake_copied(int copy, int device);
EXPORT void fake_count_copy(int copy, int device, size_t bytes);
EXPORT void fake_reset_copied();

// Bytes of host memory that are pinned now, and how many requests to pin were refused.
EXPORT size_t fake_pinned();
EXPORT uint64_t fake_refused_pins();
EXPORT bool fake_is_pinned(const void* pointer);

// The device whose memory a pointer points into; -1: of none.
EXPORT int fake_device_of(const void* pointer);

// What is called before memory goes and when a whole device is waited for: torch's side sets it, where copies can be late.
extern "C" void (*fake_finish_copies)();

// The part of the driver that torch's side uses. Results: 0, or an error of CUDA's.
extern "C" {
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes);
int cuMemFree_v2(unsigned long long pointer);
int cuMemHostRegister(void* pointer, size_t bytes, unsigned flags);
int cuMemHostUnregister(void* pointer);
}
