// The queues of late copies, and what Python calls of them.
#include "streams.h"

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "devices.h"

namespace fake {
namespace {

struct Queue {
  std::deque<std::function<void()>> copies;
  uint64_t done = 0;
};

struct Streams {
  std::mutex lock;
  std::map<StreamId, Queue> queues;
};

Streams& streams() {
  static Streams& only = *new Streams;  // never destroyed, as the ledger
  return only;
}

std::atomic<bool> is_late = false;
std::atomic<StreamId> next = 1;

}  // namespace

bool late() { return is_late; }

void put(StreamId stream, std::function<void()> copy) {
  std::lock_guard guard(streams().lock);
  streams().queues[stream].copies.push_back(std::move(copy));
}

bool is_waiting(StreamId stream) {
  std::lock_guard guard(streams().lock);
  return !streams().queues[stream].copies.empty();
}

Moment now(StreamId stream) {
  std::lock_guard guard(streams().lock);
  auto& queue = streams().queues[stream];
  return {stream, queue.done + queue.copies.size()};
}

void finish(Moment moment) {
  for (;;) {
    std::function<void()> copy;
    {
      std::lock_guard guard(streams().lock);
      auto& queue = streams().queues[moment.stream];
      if (queue.copies.empty() || queue.done >= moment.copies) return;
      copy = std::move(queue.copies.front());
      queue.copies.pop_front();
      queue.done++;
    }
    copy();  // without the lock: it frees tensors
  }
}

void finish(StreamId stream) { finish(now(stream)); }

void finish_all() {
  std::vector<StreamId> ids;
  {
    std::lock_guard guard(streams().lock);
    for (auto& [id, queue] : streams().queues)
      if (!queue.copies.empty()) ids.push_back(id);
  }
  for (auto id : ids) finish(id);
}

StreamId new_stream() { return next++; }

StreamId& current_stream(int device) {
  static thread_local std::map<int, StreamId> current;
  return current[device];
}

}  // namespace fake

EXPORT void fake_set_late(int on) {
  fake::finish_all();
  fake::is_late = on;
}
EXPORT int64_t fake_new_stream() { return fake::new_stream(); }
EXPORT int64_t fake_stream(int device) { return fake::current_stream(device); }
EXPORT void fake_set_stream(int device, int64_t stream) { fake::current_stream(device) = stream; }
EXPORT uint64_t fake_now(int64_t stream) { return fake::now(stream).copies; }
EXPORT void fake_finish(int64_t stream, uint64_t copies) { fake::finish(fake::Moment{stream, copies}); }
EXPORT void fake_finish_all() { fake::finish_all(); }
