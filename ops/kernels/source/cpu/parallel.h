// Threads: those of OpenMP if the compiler has it, otherwise the system's, which each call starts.

#include <stdlib.h>
#ifdef _OPENMP
#elif defined(_WIN32)
// as in windows.h, whose macros have names that are used here
extern "C" {
__declspec(dllimport) void* __stdcall CreateThread(void*, size_t, unsigned long(__stdcall*)(void*),
                                                   void*, unsigned long, unsigned long*);
__declspec(dllimport) unsigned long __stdcall WaitForSingleObject(void*, unsigned long);
__declspec(dllimport) int __stdcall CloseHandle(void*);
}
#else
#include <pthread.h>
#endif

// Memory at an address that is a multiple of 64, until the end of the block. `items` is made by
// adding to a pointer, so that compilers see that it shares its memory with no other.
template <class T>
struct Buffer {
    void* const memory;
    T* const items;

    explicit Buffer(size_t count)
        : memory(malloc(count * sizeof(T) + 63)),
          items((T*)((char*)memory + (-(size_t)memory & 63))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(memory); }
};

#ifndef _OPENMP
const size_t STACK_BYTES = 4 << 20;  // half a megabyte is macOS's own choice

#ifdef _WIN32
typedef void* Handle;
typedef unsigned long Status;

static bool start_thread(Handle* handle, Status(__stdcall* run)(void*), void* argument) {
    const unsigned long reserve = 0x10000;  // STACK_SIZE_PARAM_IS_A_RESERVATION
    return (*handle = CreateThread(0, STACK_BYTES, run, argument, reserve, 0));
}

static void join_thread(Handle handle) {
    WaitForSingleObject(handle, 0xFFFFFFFF);
    CloseHandle(handle);
}
#else
#define __stdcall
typedef pthread_t Handle;
typedef void* Status;

static bool start_thread(Handle* handle, Status (*run)(void*), void* argument) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return false;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    bool is_started = !pthread_create(handle, &attributes, run, argument);
    pthread_attr_destroy(&attributes);
    return is_started;
}

static void join_thread(Handle handle) { pthread_join(handle, 0); }
#endif

template <class Body>
struct Thread {
    const Body* body;
    int number;
    bool is_started;
    Handle handle;

    static Status __stdcall run(void* argument) {
        const Thread* thread = (const Thread*)argument;
        Body body = *thread->body;  // of a thread's own copy the members stay in registers
        body(thread->number);
        return 0;
    }
};
#endif

// Runs body(0) to body(threads - 1), each on a thread. The body captures by value.
template <class Body>
static void parallel(int threads, Body body) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) firstprivate(body)
    for (int thread = 0; thread < threads; thread++) body(thread);
#else
    Buffer<Thread<Body>> all(threads);
    for (int number = threads - 1; number >= 0; number--) {  // the first one on this thread
        Thread<Body>* thread = all.items + number;
        *thread = {&body, number, false, {}};
        thread->is_started = number && start_thread(&thread->handle, Thread<Body>::run, thread);
        if (!thread->is_started) Thread<Body>::run(thread);
    }
    for (int number = 1; number < threads; number++)
        if (all.items[number].is_started) join_thread(all.items[number].handle);
#endif
}

// Runs body(first, end) on threads, each with its share of the numbers below `count`. The body
// captures by value.
template <class Body>
static void parallel_ranges(int threads, Index count, Body body) {
#ifndef _OPENMP  // which keeps its threads for the next call
    if (threads > count) threads = count ? (int)count : 1;
#endif
    parallel(threads, [=](int thread) {
        body(count * thread / threads, count * (thread + 1) / threads);
    });
}

// Runs body(number) for all numbers below `count`, on threads that share them out evenly. The body
// captures by value.
template <class Body>
static void parallel_for(int threads, Index count, Body body) {
    parallel_ranges(threads, count, [=](Index number, Index end) {
        for (; number < end; number++) body(number);
    });
}

// Returns 0, 1, 2 ..., of all threads to the one that asks.
static FUNCTION Index take_turn(Index* turns) {
    return __atomic_fetch_add(turns, 1, __ATOMIC_RELAXED);
}
