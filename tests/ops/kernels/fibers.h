// Threads of a GPU's kernel on a CPU: fibers that take turns whenever they wait for each other, by jumps: swapcontext asks the
// system for the mask of signals each time.
#undef _FORTIFY_SOURCE  // it takes a jump to another stack for a mistake
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

struct Dimensions { unsigned x, y; };

const unsigned MAX_THREADS = 256, STACK_BYTES = 1 << 16;

static Dimensions threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t fibers[MAX_THREADS];
static jmp_buf scheduler, positions[MAX_THREADS];
static char stacks[MAX_THREADS][STACK_BYTES];
static bool started[MAX_THREADS], finished[MAX_THREADS];
static unsigned barriers[MAX_THREADS];  // that each thread has reached in its block

static unsigned thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }

static void take_turns() {
    if (!_setjmp(positions[thread_number()])) _longjmp(scheduler, 1);
}

static void wait_at_barrier() {
    barriers[thread_number()]++;
    take_turns();
}

// Until the current thread takes turns.
static void resume() {
    unsigned number = thread_number();
    if (_setjmp(scheduler)) return;
    if (started[number]) _longjmp(positions[number], 1);
    started[number] = true;
    setcontext(&fibers[number]);
}

// Runs a kernel in each thread of a grid. Returns whether all threads of each block have reached the same barriers.
static bool run_grid(void (*kernel)(), Dimensions grid, Dimensions block) {
    static void (*the_kernel)();
    the_kernel = kernel;
    void (*run)() = [] {
        for (;;) {  // once for each block
            the_kernel();
            finished[thread_number()] = true;
            take_turns();
        }
    };
    gridDim = grid;
    blockDim = block;
    unsigned threads = block.x * block.y;
    for (unsigned number = 0; number < threads; number++) {
        started[number] = false;
        getcontext(&fibers[number]);
        fibers[number].uc_stack.ss_sp = stacks[number];
        fibers[number].uc_stack.ss_size = STACK_BYTES;
        makecontext(&fibers[number], run, 0);
    }
    bool all_wait = true;
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
            memset(finished, 0, sizeof(finished));
            memset(barriers, 0, sizeof(barriers));
            for (unsigned running = threads; running;) {
                running = 0;
                for (unsigned number = 0; number < threads; number++) {
                    if (finished[number]) continue;
                    threadIdx = {number % block.x, number / block.x};
                    resume();
                    running += !finished[number];
                }
            }
            for (unsigned number = 1; number < threads; number++) all_wait &= barriers[number] == barriers[0];
        }
    return all_wait;
}
