// The functions of the CUDA driver and of the HIP runtime that ops/kernels/runtime_compiler.py calls, for one device: this CPU,
// with compute capability 8.6.
// An image is the path of a library of kernels that was compiled with kernel.h.
#include <dlfcn.h>
#include <string>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
       NOT_FOUND = 500, LAUNCH_TIMEOUT = 702 };

static bool initialized;
static thread_local void* current;
static char primary;

extern "C" {
int cuInit(unsigned flags) {
    initialized = flags == 0;
    return initialized ? SUCCESS : INVALID_VALUE;
}

int cuGetErrorString(int, const char** text) {
    *text = "refused by the driver";
    return SUCCESS;
}

int cuDeviceGet(int* device, int index) {
    *device = 7;
    return !initialized ? NOT_INITIALIZED : index ? INVALID_DEVICE : SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 8 : 6;
    return device == 7 && (attribute == 75 || attribute == 76) ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &primary;
    return device == 7 ? SUCCESS : INVALID_DEVICE;
}

int cuCtxPushCurrent_v2(void* context) {
    current = context;
    return context == &primary ? SUCCESS : INVALID_CONTEXT;
}

int cuCtxPopCurrent_v2(void** context) {
    *context = current;
    current = nullptr;
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void* image) {
    *module = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    return !current ? INVALID_CONTEXT : *module ? SUCCESS : INVALID_IMAGE;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = dlsym(module, (std::string("launch_") + name).c_str());
    return !current ? INVALID_CONTEXT : *function ? SUCCESS : NOT_FOUND;
}

int cuLaunchKernel(void* function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    if (!current) return INVALID_CONTEXT;
    if (!blocks || !blocks_y || blocks_y > 65535 || blocks_z != 1 || !threads || !threads_y || threads_z != 1 ||
        threads * threads_y > 256 || shared_bytes || extra)
        return INVALID_VALUE;
    unsigned grid[] = {blocks, blocks_y}, block[] = {threads, threads_y};
    bool all_wait = ((bool (*)(const unsigned*, const unsigned*, void**))function)(grid, block, arguments);
    return all_wait ? SUCCESS : LAUNCH_TIMEOUT;
}

int hipInit(unsigned flags) { return cuInit(flags); }

const char* hipGetErrorString(int) { return "refused by the driver"; }

int hipGetDevice(int* device) {
    *device = current ? 0 : 3;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

int hipSetDevice(int device) {
    current = device ? nullptr : &primary;
    return device == 0 || device == 3 ? SUCCESS : INVALID_DEVICE;
}

int hipModuleLoadData(void** module, const void* image) { return cuModuleLoadData(module, image); }

int hipModuleGetFunction(void** function, void* module, const char* name) { return cuModuleGetFunction(function, module, name); }

int hipModuleLaunchKernel(void* function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads, unsigned threads_y,
                          unsigned threads_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    return cuLaunchKernel(function, blocks, blocks_y, blocks_z, threads, threads_y, threads_z, shared_bytes, stream, arguments, extra);
}
}
