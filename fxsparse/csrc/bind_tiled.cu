// Registers the CUDA kernel of `conv2d_batch_inner`. Its schema is in bind_cpu.cpp.
#include "cuda_binding.h"
#include "tiled_arguments.h"

#include <torch/csrc/stable/library.h>

namespace fxsparse {
namespace {

// [N, C, H, W] stored as [H][W][C][Np].
std::vector<int64_t> batch_inner_strides(IntHeaderOnlyArrayRef sizes) {
  const int64_t lanes = cuda::padded_batch(sizes[0]);
  return {1, lanes, sizes[3] * sizes[1] * lanes, sizes[1] * lanes};
}

bool is_batch_inner(const Tensor &tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const std::vector<int64_t> expected = batch_inner_strides(sizes);
  for (size_t i = 0; i < 4; ++i)
    if (sizes[i] > 1 && strides[i] != expected[i])
      return false;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t lanes = sizes[1] * sizes[2] * sizes[3] * cuda::padded_batch(sizes[0]);
  return is_aligned(tensor) && (tensor.storage_offset() + lanes) * int64_t(tensor.element_size()) <= bytes;
}

// A view of fresh memory that has the lanes behind the batch too.
Tensor empty_batch_inner(const Tensor &like, const std::vector<int64_t> &sizes) {
  const std::vector<int64_t> strides = batch_inner_strides(sizes);
  const int64_t lanes = cuda::padded_batch(sizes[0]) * sizes[1] * sizes[2] * sizes[3];
  const Tensor memory = torch::stable::new_empty(like, {lanes});
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 4, sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

Tensor to_batch_inner(const Tensor &tensor) {
  if (is_batch_inner(tensor))
    return tensor;
  const auto sizes = tensor.sizes();
  Tensor copy = empty_batch_inner(tensor, {sizes.begin(), sizes.end()});
  torch::stable::copy_(copy, tensor);
  return copy;
}

cuda::TiledKernel tiled_kernel_of(const std::string &name) {
  if (name == "auto")
    return cuda::TiledKernel::kChosen;
  if (name == "wgmma64")
    return cuda::TiledKernel::kWgmma64;
  if (name == "wgmma128")
    return cuda::TiledKernel::kWgmma128;
  if (name == "wgmma64half")
    return cuda::TiledKernel::kWgmma64Half;
  if (name == "wgmma128half")
    return cuda::TiledKernel::kWgmma128Half;
  STD_TORCH_CHECK(name == "portable", "'kernel' is '", name,
                  "', expected 'auto', 'wgmma64', 'wgmma128', 'wgmma64half', 'wgmma128half' or 'portable'");
  return cuda::TiledKernel::kPortable;
}

Tensor conv2d_batch_inner(const Tensor &input, const Tensor &tile_values, const Tensor &tile_columns,
                          const Tensor &tiles, const Tensor &tile_rows, const std::optional<Tensor> &bias,
                          IntHeaderOnlyArrayRef weight_shape, IntHeaderOnlyArrayRef stride,
                          IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int64_t groups,
                          const std::string &activation, const std::optional<Tensor> &add, const std::string &kernel,
                          bool overlap) {
  check_cuda("input", input);
  STD_TORCH_CHECK(input.dim() == 4, "'input' has shape ", list_text(input.sizes()), ", expected (N, C, H, W)");
  const Conv2dGeometry geometry = checked_geometry(checked_images("input", input), weight_shape, stride, padding,
                                                   dilation, groups, PaddingMode::kZeros, activation_of(activation));
  const cuda::TiledConv conv{geometry, tiled_type_of("input", input), tiled_kernel_of(kernel), overlap};
  const int64_t rows_of_tile =
      check_tiled(tile_values, tile_columns, tiles, tile_rows, "input", input, geometry.out_channels);
  if (bias.has_value())
    check_bias(*bias, "input", input, geometry.out_channels);
  const std::vector<int64_t> sizes = output_shape(geometry, input);
  if (add.has_value()) {
    check_like("add", *add, "input", input);
    const auto found = add->sizes();
    STD_TORCH_CHECK(std::vector<int64_t>(found.begin(), found.end()) == sizes, "'add' has shape ", list_text(found),
                    ", expected that of the output, ", list_text(sizes));
  }
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const char *refusal = cuda::tiled_conv2d_refusal(conv, rows_of_tile);
  STD_TORCH_CHECK(refusal == nullptr, "'conv2d_batch_inner' does not do this convolution: ", refusal,
                  ". Use 'conv2d' for it");
  const Tensor output = empty_batch_inner(input, sizes);
  if (output.numel() == 0)
    return output;

  const Tensor input_b = to_batch_inner(input), values_c = aligned_contiguous(tile_values);
  const Tensor columns_c = torch::stable::contiguous(tile_columns), tiles_c = torch::stable::contiguous(tiles);
  const Tensor rows_c = torch::stable::contiguous(tile_rows);
  std::optional<Tensor> bias_c, add_b;
  if (bias.has_value())
    bias_c = torch::stable::contiguous(*bias);
  if (add.has_value())
    add_b = to_batch_inner(*add);
  const cuda::TiledWeight weight{values_c.const_data_ptr(),
                                 static_cast<const int32_t *>(columns_c.const_data_ptr()),
                                 static_cast<const int64_t *>(tiles_c.const_data_ptr()),
                                 static_cast<const int32_t *>(rows_c.const_data_ptr()),
                                 tiles.size(0),
                                 rows_of_tile,
                                 tile_columns.numel(),
                                 tile_values.numel()};
  const cuda::TiledTensors tensors{input_b.const_data_ptr(), bias_c ? bias_c->const_data_ptr() : nullptr,
                                   add_b ? add_b->const_data_ptr() : nullptr, output.mutable_data_ptr()};
  check_launch(cuda::launch_tiled_conv2d(conv, weight, tensors, current_stream(input)));
  return output;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CUDA, m) { m.impl("conv2d_batch_inner", TORCH_BOX(&conv2d_batch_inner)); }

} // namespace fxsparse
