// The ledger of devices.cpp as driver.cpp writes it.
#pragma once
#include <map>
#include <mutex>

#include "devices.h"

enum Kind { ALLOCATED, MAPPED, RESERVED, PINNED };  // mapped: device memory at an address that was reserved before

struct Range {
  size_t bytes;
  int device;
};

struct Ledger {
  static constexpr int DEVICES = 8;

  std::mutex lock;
  int count = 1;
  size_t capacity[DEVICES] = {}, used[DEVICES] = {}, peak[DEVICES] = {};
  uint64_t copied[4][DEVICES] = {};
  uint64_t refused_pins = 0;
  std::map<const char*, Range> ranges[4];  // by kind and first address

  // The functions below are called with `lock` held.
  bool take(int device, size_t bytes);  // false: the device has not that much left
  void give_back(int device, size_t bytes) { used[device] -= bytes; }
  std::map<const char*, Range>::iterator find(Kind kind, const void* pointer);  // the range that a pointer is in, or end()
};

Ledger& ledger();
