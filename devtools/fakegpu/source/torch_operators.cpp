// Operators on tensors of fake GPUs: making and viewing them, copying, and the CPU's own operators for everything else.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "devices.h"
#include "streams.h"
#include "torch_device.h"

namespace fake {
namespace {

// --- making tensors ---

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

c10::DeviceGuard guard_of(std::optional<at::Device> device) {
  return c10::DeviceGuard(device && device->has_index() ? *device : at::Device(TYPE, fake_current()));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto guard = guard_of(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), device_memory(), KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  auto guard = guard_of(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), device_memory(), KEYS,
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

// --- views, which are the same for every device ---

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset.guard_int(__FILE__, __LINE__),
                                      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// --- copies ---

thread_local bool computing = false;  // in an operator of the CPU, whose copies are not the caller's

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()));
}

void copy_now(const at::Tensor& to, const at::Tensor& from) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  on_host(to).copy_(on_host(from).expand(to.sizes()));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_same(from)) return to;
  Copy kind = from.is_cpu() ? UP : to.is_cpu() ? DOWN : to.device() == from.device() ? ON : BETWEEN;
  int device = kind == DOWN ? from.device().index() : to.device().index();
  if (!computing) fake_count_copy(kind, device, from.nbytes());
  StreamId stream = current_stream(device);
  // What a real GPU promises: work that comes later in this stream sees the values, other work only after waiting. A copy between
  // the host and a device blocks if it may, or if the host's memory is not pinned. One on the device never does; but it is done at
  // once here where nothing waits before it, for what waits is not free yet.
  bool can_wait = kind == ON ? is_waiting(stream)
                             : kind != BETWEEN && non_blocking && fake_is_pinned((kind == UP ? from : to).data_ptr());
  if (late() && can_wait) {
    put(stream, [to, from]() { copy_now(to, from); });
    return to;
  }
  finish(stream);
  if (kind == BETWEEN) finish(current_stream(from.device().index()));
  copy_now(to, from);
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  return copy(target, from, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resize(to, c10::fromIntArrayRefSlow(from.sizes()), std::nullopt);
  return copy_from(from, to, false);
}

// --- everything else: the CPU's own operators, in the devices' memory ---

// Arguments of one call of an operator of the CPU that share the memory of tensors on devices.
class Shared {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // of the CPU, of a device

 public:
  std::optional<at::Device> device;  // of the first tensor on one, or the one that is asked for

  at::Tensor on_cpu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    if (!device) device = tensor.device();
    finish(current_stream(tensor.device().index()));
    // an empty one may be an output, which becomes as large as it has to
    at::Tensor shared = tensor.numel() ? on_host(tensor) : at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    pairs.emplace_back(shared, tensor);
    return shared;
  }

  at::Tensor on_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !device) return tensor;
    for (auto& [shared, own] : pairs)
      if (shared.is_same(tensor)) {
        if (own.sizes() != shared.sizes()) copy_from_and_resize(shared, own);
        return own;
      }
    return tensor.to(*device);
  }
};

// Replaces each tensor among the last `count` values of the stack by the function's result for it.
template <class Function>
void replace_tensors(torch::jit::Stack& stack, size_t count, Function function) {
  for (size_t index = 0; index < count; index++) {
    c10::IValue& value = torch::jit::peek(stack, index, count);
    if (value.isTensor()) {
      value = function(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(function(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        tensors.push_back(tensor ? std::optional(function(*tensor)) : std::nullopt);
      value = tensors;
    }
  }
}

void compute_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  struct Computing {
    bool outer = std::exchange(computing, true);
    ~Computing() { computing = outer; }
  } for_now;
  Shared shared;
  size_t arguments = op.schema().arguments().size(), results = op.schema().returns().size();
  replace_tensors(*stack, arguments, [&](const at::Tensor& tensor) { return shared.on_cpu(tensor); });
  for (size_t index = 0; index < arguments; index++) {
    c10::IValue& argument = torch::jit::peek(*stack, index, arguments);
    if (argument.isGenerator()) argument = generator_of_the_cpu(argument.toGenerator());
    if (argument.isDevice()) {
      shared.device = argument.toDevice();
      argument = c10::Device(at::kCPU);
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  replace_tensors(*stack, results, [&](const at::Tensor& tensor) { return shared.on_device(tensor); });
}

void record_stream(at::Tensor&, at::Stream) {}  // tensors are never reused here

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("view", &view);
  library.impl("as_strided", &as_strided);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", &unfold);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("copy_", &copy);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("record_stream", &record_stream);
  // torch takes these apart in another way on a GPU. Left whole they are the CPU's, and so are their last bits.
  for (auto name : {"linear", "convolution", "scaled_dot_product_attention", "rms_norm", "group_norm", "layer_norm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute_on_the_cpu>());
}

}  // namespace fake
