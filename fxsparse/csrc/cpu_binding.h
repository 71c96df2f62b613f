// What the CPU bindings share: tensors in, plain pointers out.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "conv2d_arguments.h"
#include "cpu/conv.h"

namespace fxsparse {

inline Dtype dtype_of(const Tensor &tensor) { // a checked one
  switch (tensor.scalar_type()) {
  case ScalarType::Float:
    return Dtype::kFloat32;
  case ScalarType::Double:
    return Dtype::kFloat64;
  case ScalarType::BFloat16:
    return Dtype::kBFloat16;
  default:
    return Dtype::kFloat16;
  }
}

// A call through the dispatcher costs more than a small convolution, so contiguous tensors take none.
inline Tensor as_contiguous(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor> &t) {
  return t.has_value() ? std::optional(as_contiguous(*t)) : std::nullopt;
}

// As torch::stable::empty, but past the dispatcher.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The packed tensors, contiguous, and pointers to them.
struct Packed {
  Tensor values, columns, panels, rows;

  Packed(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows)
      : values(as_contiguous(values)), columns(as_contiguous(columns)), panels(as_contiguous(panels)),
        rows(as_contiguous(rows)) {}

  PackedWeight weight() const {
    return {values.const_data_ptr(),
            columns.const_data_ptr<int32_t>(),
            panels.const_data_ptr<int64_t>(),
            rows.const_data_ptr<int64_t>(),
            values.numel(),
            columns.numel(),
            panels.size(0)};
  }
};

inline ConvShape shape_of(const Conv2dGeometry &g, Dtype dtype) {
  return {g.batch,
          g.in_channels,
          g.in_height,
          g.in_width,
          g.out_channels,
          g.out_height,
          g.out_width,
          g.in_height * g.in_width,
          g.out_height * g.out_width,
          g.out_height * g.out_width,
          {g.kernel_height, g.kernel_width},
          {g.stride_y, g.stride_x},
          {g.dilation_y, g.dilation_x},
          {g.pad_top, g.pad_bottom, g.pad_left, g.pad_right},
          g.group_channels * g.kernel_height * g.kernel_width,
          g.padding_mode,
          g.activation,
          dtype,
          false};
}

inline void parallel_workers(int64_t workers, void (*body)(int64_t worker, void *context), void *context) {
  torch::stable::parallel_for(0, workers, 1, [=](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      body(worker, context);
  });
}

} // namespace fxsparse
