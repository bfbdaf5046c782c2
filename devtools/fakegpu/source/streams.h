// Streams, and copies in them that are late: with `late` on, a copy that need not block arrives only when work that comes after it
// in its stream runs, or when somebody waits for it. Code that forgets to wait computes with what was there before.
//
// What is not imitated: kernels. They run at once, so what a copy overwrites too early is not noticed.
#pragma once
#include <cstdint>
#include <functional>

namespace fake {

using StreamId = int64_t;  // 0 is the default stream of every device
struct Moment {  // in a stream: after so many of its copies
  StreamId stream;
  uint64_t copies;
};

bool late();
void put(StreamId stream, std::function<void()> copy);  // to be done later
bool is_waiting(StreamId stream);  // whether any of its copies has not arrived
Moment now(StreamId stream);
void finish(Moment moment);
void finish(StreamId stream);
void finish_all();

StreamId new_stream();
StreamId& current_stream(int device);  // of the calling thread

}  // namespace fake
