// What torch_operators.cpp takes of torch_device.cpp.
#pragma once
#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace fake {
constexpr c10::DeviceType TYPE = c10::DeviceType::CUDA;
c10::Allocator* device_memory();  // allocates on the current device
at::Generator generator_of_the_cpu(const at::Generator& generator);  // which the CPU's operators draw from
}  // namespace fake
