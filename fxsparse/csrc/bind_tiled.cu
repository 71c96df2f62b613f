// Registers the CUDA kernels of `conv2d_batch_inner` and `conv2d_planes`. Their schemas are in bind_cpu.cpp.
#include "cuda/plane_conv.h"
#include "cuda_binding.h"
#include "tiled_arguments.h"

#include <climits>
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
  using Kernel = cuda::TiledKernel;
  static constexpr std::pair<const char *, Kernel> kKernels[] = {{"auto", Kernel::kChosen},
                                                                 {"wgmma64", Kernel::kWgmma64},
                                                                 {"wgmma128", Kernel::kWgmma128},
                                                                 {"wgmma64half", Kernel::kWgmma64Half},
                                                                 {"wgmma128half", Kernel::kWgmma128Half},
                                                                 {"portable", Kernel::kPortable},
                                                                 {"float_64", Kernel::kFloat64},
                                                                 {"float_128", Kernel::kFloat128},
                                                                 {"float_256", Kernel::kFloat256}};
  std::string names;
  for (const auto &[known, kernel] : kKernels) {
    if (name == known)
      return kernel;
    names += std::string(names.empty() ? "" : ", ") + "'" + known + "'";
  }
  STD_TORCH_CHECK(false, "'kernel' is '", name, "', expected one of ", names);
}

// What both operators check and hold alike.
struct TiledArguments {
  TiledArguments(const Tensor &input, const Tensor &tile_values, const Tensor &tile_columns, const Tensor &tiles,
                 const Tensor &tile_rows, const std::optional<Tensor> &bias, IntHeaderOnlyArrayRef weight_shape,
                 IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                 int64_t groups, const std::string &activation, const std::optional<Tensor> &add) {
    check_cuda("input", input);
    STD_TORCH_CHECK(input.dim() == 4, "'input' has shape ", list_text(input.sizes()), ", expected (N, C, H, W)");
    geometry = checked_geometry(checked_images("input", input), weight_shape, stride, padding, dilation, groups,
                                PaddingMode::kZeros, activation_of(activation));
    type = tiled_type_of("input", input);
    const int64_t rows_of_tile =
        check_tiled(tile_values, tile_columns, tiles, tile_rows, "input", input, geometry.out_channels);
    if (bias.has_value())
      check_bias(*bias, "input", input, geometry.out_channels);
    sizes = output_shape(geometry, input);
    if (add.has_value()) {
      check_like("add", *add, "input", input);
      const auto found = add->sizes();
      STD_TORCH_CHECK(std::vector<int64_t>(found.begin(), found.end()) == sizes, "'add' has shape ", list_text(found),
                      ", expected that of the output, ", list_text(sizes));
    }
    weight = {keep(aligned_contiguous(tile_values)),
              static_cast<const int32_t *>(keep(aligned_contiguous(tile_columns))),
              static_cast<const int64_t *>(keep(aligned_contiguous(tiles))),
              static_cast<const int32_t *>(keep(torch::stable::contiguous(tile_rows))),
              tiles.size(0),
              rows_of_tile,
              tile_columns.numel(),
              tile_values.numel()};
    if (bias.has_value())
      tensors.bias = keep(torch::stable::contiguous(*bias));
  }

  const void *keep(const Tensor &tensor) {
    kept.push_back(tensor);
    return tensor.const_data_ptr();
  }

  Conv2dGeometry geometry;
  cuda::TiledType type;
  cuda::TiledWeight weight;
  cuda::TiledTensors tensors = {};
  std::vector<int64_t> sizes; // of the output
  std::vector<Tensor> kept;   // what the pointers point at
};

Tensor conv2d_batch_inner(const Tensor &input, const Tensor &tile_values, const Tensor &tile_columns,
                          const Tensor &tiles, const Tensor &tile_rows, const std::optional<Tensor> &bias,
                          IntHeaderOnlyArrayRef weight_shape, IntHeaderOnlyArrayRef stride,
                          IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int64_t groups,
                          const std::string &activation, const std::optional<Tensor> &add, const std::string &kernel,
                          bool overlap, bool allow_tf32) {
  TiledArguments call(input, tile_values, tile_columns, tiles, tile_rows, bias, weight_shape, stride, padding, dilation,
                      groups, activation, add);
  const cuda::TiledConv conv{call.geometry, call.type, tiled_kernel_of(kernel), overlap, false, allow_tf32};
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const char *refusal = cuda::tiled_conv2d_refusal(conv, call.weight.tile_rows);
  STD_TORCH_CHECK(refusal == nullptr, "'conv2d_batch_inner' does not do this convolution: ", refusal,
                  ". Use 'conv2d' for it");
  const Tensor output = empty_batch_inner(input, call.sizes);
  if (output.numel() == 0)
    return output;
  call.tensors.input = call.keep(to_batch_inner(input));
  if (add.has_value())
    call.tensors.add = call.keep(to_batch_inner(*add));
  call.tensors.output = output.mutable_data_ptr();
  check_launch(cuda::launch_tiled_conv2d(conv, call.weight, call.tensors, current_stream(input)));
  return output;
}

cuda::ImageStrides strides_of_images(const Tensor &images) {
  const auto strides = images.strides();
  return {strides[2], strides[1], strides[0], strides[3]};
}

// Strides that the kernels can count in: not of views that skip most of a large memory.
Tensor with_small_strides(const Tensor &images) {
  __int128 last = 0;
  const auto sizes = images.sizes(), strides = images.strides();
  for (size_t i = 0; i < 4; ++i)
    last += static_cast<__int128>(std::max<int64_t>(sizes[i] - 1, 0)) * strides[i];
  return last <= INT_MAX ? images : torch::stable::contiguous(images);
}

Tensor empty_like_images(const Tensor &input, const std::vector<int64_t> &sizes) {
  const std::vector<int64_t> last = {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1], sizes[1]};
  const Tensor memory = torch::stable::new_empty(input, sizes);
  if (input.is_contiguous() || input.strides()[1] != 1)
    return memory;
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), 4, sizes.data(), last.data(), 0, &view));
  return Tensor(view);
}

Tensor conv2d_planes(const Tensor &input, const Tensor &tile_values, const Tensor &tile_columns, const Tensor &tiles,
                     const Tensor &tile_rows, const std::optional<Tensor> &bias, IntHeaderOnlyArrayRef weight_shape,
                     IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                     int64_t groups, const std::string &activation, const std::optional<Tensor> &add,
                     IntHeaderOnlyArrayRef tile, bool overlap, bool allow_tf32) {
  TiledArguments call(input, tile_values, tile_columns, tiles, tile_rows, bias, weight_shape, stride, padding, dilation,
                      groups, activation, add);
  STD_TORCH_CHECK(tile.size() == 3 && (tile[0] == 0 || tile[0] == 32 || tile[0] == 64) &&
                      (tile[1] == 0 || tile[1] == 8 || tile[1] == 16) &&
                      (tile[2] == 0 || tile[2] == 1 || tile[2] == 2 || tile[2] == 4 || tile[2] == 8),
                  "'tile' is ", list_text(tile),
                  ", expected rows (32 or 64), positions (8 or 16) and warps that share columns (1, 2, 4 or 8), or 0");
  cuda::PlaneConv conv = {call.geometry, call.type, {int(tile[0]), int(tile[1]), int(tile[2])},
                          overlap,       false,     allow_tf32};
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const char *refusal = cuda::plane_conv2d_refusal(conv, call.weight.tile_rows);
  STD_TORCH_CHECK(refusal == nullptr, "'conv2d_planes' does not do this convolution: ", refusal,
                  ". Use 'conv2d' for it");
  const Tensor output = empty_like_images(input, call.sizes);
  if (output.numel() == 0)
    return output;
  const Tensor images = with_small_strides(input);
  conv.in = strides_of_images(images), conv.out = strides_of_images(output);
  call.tensors.input = call.keep(images);
  if (add.has_value()) {
    const Tensor added = with_small_strides(*add);
    conv.add = strides_of_images(added);
    call.tensors.add = call.keep(added);
  }
  call.tensors.output = output.mutable_data_ptr();
  check_launch(cuda::launch_plane_conv2d(conv, call.weight, call.tensors, current_stream(input)));
  return output;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CUDA, m) {
  m.impl("conv2d_batch_inner", TORCH_BOX(&conv2d_batch_inner));
  m.impl("conv2d_planes", TORCH_BOX(&conv2d_planes));
}

} // namespace fxsparse
