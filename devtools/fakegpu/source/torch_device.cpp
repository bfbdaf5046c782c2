// The device type "cuda" for a torch that was built without CUDA: its memory, its pinned memory, its guard and its hooks.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>

#include "devices.h"
#include "streams.h"
#include "torch_device.h"

namespace fake {
namespace {

void release(void* memory) {
  if (memory) cuMemFree_v2((unsigned long long)memory);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device device(TYPE, fake_current());
    if (!bytes) return {nullptr, nullptr, &release, device};
    unsigned long long memory = 0;
    TORCH_CHECK_WITH(OutOfMemoryError, cuMemAlloc_v2(&memory, bytes) == 0, "CUDA out of memory. Tried to allocate ", bytes,
                     " bytes on fake GPU ", fake_current(), ", which has ", fake_capacity(fake_current()), " and has ",
                     fake_used(fake_current()), " in use.");
    return {(void*)memory, (void*)memory, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} memory;

void release_pinned(void* pinned) {
  cuMemHostUnregister(pinned);
  free(pinned);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    constexpr size_t PAGE = 4096;
    void* pinned = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    cuMemHostRegister(pinned, bytes, 0);
    return {pinned, pinned, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} pinned_memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override { return at(fake_exchange(device.index())); }
  c10::Device getDevice() const override { return at(fake_current()); }
  void setDevice(c10::Device device) const override { fake_exchange(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { fake_exchange(device.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return fake_count(); }
  c10::Stream getStream(c10::Device device) const override { return stream(device, current_stream(device.index())); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, new_stream()); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(next.device(), std::exchange(current_stream(next.device_index()), next.id()));
  }
  void synchronizeStream(const c10::Stream& stream) const override { finish(stream.id()); }
  void synchronizeDevice(const c10::DeviceIndex) const override { finish_all(); }

 private:
  static c10::Device at(int index) { return {TYPE, (c10::DeviceIndex)index}; }
  static c10::Stream stream(c10::Device device, StreamId id) { return c10::Stream(c10::Stream::UNSAFE, device, id); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

c10::Allocator* device_memory() { return &memory; }

// --- random numbers, which are those of the CPU ---

struct FakeGenerator final : c10::GeneratorImpl {
  explicit FakeGenerator(c10::Device device, at::Generator on_the_cpu)
      : GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)), on_the_cpu(std::move(on_the_cpu)) {}
  void set_current_seed(uint64_t seed) override { on_the_cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { on_the_cpu.set_offset(offset); }
  uint64_t get_offset() const override { return on_the_cpu.get_offset(); }
  uint64_t current_seed() const override { return on_the_cpu.current_seed(); }
  uint64_t seed() override { return on_the_cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { on_the_cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return on_the_cpu.unsafeGetGeneratorImpl()->get_state(); }
  c10::GeneratorImpl* clone_impl() const override { return new FakeGenerator(device(), on_the_cpu.clone()); }

  at::Generator on_the_cpu;
};

at::Generator generator_of_the_cpu(const at::Generator& generator) {
  return generator.device().is_cpu() ? generator : static_cast<FakeGenerator*>(generator.unsafeGetGeneratorImpl())->on_the_cpu;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return fake_count(); }
  int getNumGPUs() const override { return fake_count(); }
  c10::DeviceIndex current_device() const override { return fake_current(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { fake_exchange(device); }
  c10::DeviceIndex getCurrentDevice() const override { return fake_current(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return fake_exchange(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return fake_exchange(device); }
  bool isPinnedPtr(const void* pointer) const override { return fake_is_pinned(pointer); }
  at::Generator getNewGenerator(c10::DeviceIndex device = -1) const override {
    c10::Device of(TYPE, device < 0 ? fake_current() : device);
    return at::make_generator<FakeGenerator>(of, at::detail::createCPUGenerator());
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    int device = fake_device_of(pointer);
    TORCH_CHECK(device >= 0, "The pointer does not point into the memory of a fake GPU.");
    return {TYPE, (c10::DeviceIndex)device};
  }
  void deviceSynchronize(c10::DeviceIndex) const override { finish_all(); }
  std::string showConfig() const override { return "fake GPUs"; }
};

static struct Start {
  Start() {
    c10::SetAllocator(TYPE, &memory, 1);
    fake_finish_copies = &finish_all;
  }
} start;

}  // namespace fake

namespace at {
using FakeHooks = ::fake::Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}  // namespace at
