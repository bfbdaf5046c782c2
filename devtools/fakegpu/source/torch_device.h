// What torch_operators.cpp takes of torch_device.cpp.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace fake {
constexpr c10::DeviceType TYPE = c10::DeviceType::CUDA;
c10::Allocator* device_memory();  // allocates on the current device
}  // namespace fake
