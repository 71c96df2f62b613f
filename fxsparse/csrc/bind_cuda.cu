// Registers the operators' CUDA kernels. The schemas are in bind_cpu.cpp; the library loads without a GPU,
// and with a torch that has no CUDA.
#include "cuda/launch.h"
#include "cuda_binding.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

namespace fxsparse {
namespace {

// Calls `body` with a null pointer of the element type that `tensor` holds (a checked one).
template <typename Body> cudaError_t with_element_type(const Tensor &tensor, const Body &body) {
  switch (tensor.scalar_type()) {
  case ScalarType::Float:
    return body(static_cast<float *>(nullptr));
  case ScalarType::Double:
    return body(static_cast<double *>(nullptr));
  case ScalarType::Half:
    return body(static_cast<__half *>(nullptr));
  default:
    return body(static_cast<__nv_bfloat16 *>(nullptr));
  }
}

template <typename T> const T *pointer(const Tensor &tensor) { return static_cast<const T *>(tensor.const_data_ptr()); }

// Holds contiguous tables for as long as their pointers are in use (they are contiguous already unless a user
// made them otherwise).
struct Tables {
  Tensor columns, panels, rows;

  Tables(const Tensor &columns, const Tensor &panels, const Tensor &rows)
      : columns(torch::stable::contiguous(columns)), panels(torch::stable::contiguous(panels)),
        rows(torch::stable::contiguous(rows)) {}

  cuda::PackedTables pointers(int64_t value_count) const {
    return {pointer<int32_t>(columns), pointer<int64_t>(panels), pointer<int64_t>(rows),
            columns.numel(),           panels.size(0),           value_count};
  }
};

Tensor conv2d_cuda(const Tensor &input, const Tensor &values, const Tensor &columns, const Tensor &panels,
                   const Tensor &rows, const std::optional<Tensor> &bias, IntHeaderOnlyArrayRef weight_shape,
                   IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                   int64_t groups, const std::string &padding_mode, const std::string &activation,
                   const std::optional<Tensor> &add) {
  check_cuda("input", input);
  const Conv2dGeometry geometry = check_conv2d(input, values, columns, panels, rows, bias, weight_shape, stride,
                                               padding, dilation, groups, padding_mode, activation, add);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor output = torch::stable::new_empty(input, output_shape(geometry, input));
  if (output.numel() == 0)
    return output;

  const Tables tables(columns, panels, rows);
  const Tensor input_c = torch::stable::contiguous(input);
  const Tensor values_c = torch::stable::contiguous(values);
  std::optional<Tensor> bias_c, add_c;
  if (bias.has_value())
    bias_c = torch::stable::contiguous(*bias);
  if (add.has_value())
    add_c = torch::stable::contiguous(*add);
  const cudaStream_t stream = current_stream(input);
  check_launch(with_element_type(input, [&](auto *element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const cuda::Conv2dTensors<T> tensors{pointer<T>(input_c), pointer<T>(values_c),
                                         bias_c ? pointer<T>(*bias_c) : nullptr, add_c ? pointer<T>(*add_c) : nullptr,
                                         static_cast<T *>(output.mutable_data_ptr())};
    return cuda::launch_conv2d<T>(geometry, tables.pointers(values.numel()), tensors, stream);
  }));
  return output;
}

Tensor unpack_cuda(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows,
                   IntHeaderOnlyArrayRef weight_shape) {
  check_cuda("values", values);
  const int64_t row_columns = check_unpack(values, columns, panels, rows, weight_shape);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const Tensor weight = torch::stable::new_empty(values, weight_shape);
  if (weight.numel() == 0)
    return weight;
  const Tables tables(columns, panels, rows);
  const Tensor values_c = torch::stable::contiguous(values);
  const cudaStream_t stream = current_stream(values);
  check_launch(with_element_type(values, [&](auto *element) {
    using T = std::remove_pointer_t<decltype(element)>;
    return cuda::launch_unpack<T>(tables.pointers(values.numel()), weight_shape[0], row_columns, pointer<T>(values_c),
                                  static_cast<T *>(weight.mutable_data_ptr()), stream);
  }));
  return weight;
}

Tensor repack_cuda(const Tensor &weight, const Tensor &columns, const Tensor &panels, const Tensor &rows,
                   int64_t values) {
  check_cuda("weight", weight);
  const int64_t row_columns = check_repack(weight, columns, panels, rows, values);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor packed = torch::stable::new_empty(weight, {values});
  if (values == 0)
    return packed;
  const Tables tables(columns, panels, rows);
  const Tensor weight_c = torch::stable::contiguous(weight);
  const cudaStream_t stream = current_stream(weight);
  check_launch(with_element_type(weight, [&](auto *element) {
    using T = std::remove_pointer_t<decltype(element)>;
    return cuda::launch_repack<T>(tables.pointers(values), weight.size(0), row_columns, pointer<T>(weight_c),
                                  static_cast<T *>(packed.mutable_data_ptr()), stream);
  }));
  return packed;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&conv2d_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
  m.impl("repack", TORCH_BOX(&repack_cuda));
}

} // namespace fxsparse
