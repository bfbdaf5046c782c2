// The ledger: what each device has, what is taken from it, what was copied, and what of the host's memory is pinned.
#include "ledger.h"

#include <algorithm>

using Guard = std::lock_guard<std::mutex>;

void (*fake_finish_copies)() = nullptr;

static thread_local int current = 0;

Ledger& ledger() {
  static Ledger& only = *new Ledger;  // never destroyed: tensors are freed until the process is gone
  return only;
}

bool Ledger::take(int device, size_t bytes) {
  if (used[device] + bytes > capacity[device]) return false;
  used[device] += bytes;
  peak[device] = std::max(peak[device], used[device]);
  return true;
}

std::map<const char*, Range>::iterator Ledger::find(Kind kind, const void* pointer) {
  auto& of_kind = ranges[kind];
  auto after = of_kind.upper_bound((const char*)pointer);
  if (after == of_kind.begin()) return of_kind.end();
  auto before = std::prev(after);
  return (const char*)pointer < before->first + before->second.bytes ? before : of_kind.end();
}

void fake_configure(int count, size_t bytes) {
  ledger().count = count;
  std::fill_n(ledger().capacity, Ledger::DEVICES, bytes);
}
void fake_set_capacity(int device, size_t bytes) { ledger().capacity[device] = bytes; }
size_t fake_capacity(int device) { return ledger().capacity[device]; }
int fake_count() { return ledger().count; }

int fake_current() { return current; }
int fake_exchange(int device) {
  int before = current;
  if (device >= 0) current = device;
  return before;
}

size_t fake_used(int device) { return ledger().used[device]; }
size_t fake_peak(int device) { return ledger().peak[device]; }
void fake_reset_peaks() {
  Guard guard(ledger().lock);
  std::copy_n(ledger().used, Ledger::DEVICES, ledger().peak);
}

uint64_t fake_copied(int copy, int device) { return ledger().copied[copy][device]; }
void fake_count_copy(int copy, int device, size_t bytes) {
  Guard guard(ledger().lock);
  ledger().copied[copy][device] += bytes;
}
void fake_reset_copied() {
  Guard guard(ledger().lock);
  for (auto& of_kind : ledger().copied) std::fill_n(of_kind, Ledger::DEVICES, 0);
}

size_t fake_pinned() {
  Guard guard(ledger().lock);
  size_t sum = 0;
  for (auto& [start, range] : ledger().ranges[PINNED]) sum += range.bytes;
  return sum;
}
uint64_t fake_refused_pins() { return ledger().refused_pins; }
bool fake_is_pinned(const void* pointer) {
  Guard guard(ledger().lock);
  return ledger().find(PINNED, pointer) != ledger().ranges[PINNED].end();
}

int fake_device_of(const void* pointer) {
  Guard guard(ledger().lock);
  for (Kind kind : {ALLOCATED, MAPPED}) {
    auto found = ledger().find(kind, pointer);
    if (found != ledger().ranges[kind].end()) return found->second.device;
  }
  return -1;
}
