// What a region on CUDA is made of, however it stores its values: the program, where values lie and live, the weights.
#pragma once

#include "cuda/batch_inner.h"
#include "cuda/linear.h"
#include "cuda_binding.h"
#include "memory_plan.h"
#include "region_program.h"
#include "tiled_arguments.h"

namespace fxsparse {

using cuda::ImageLayout;
using cuda::Images;
using cuda::TiledType;

inline constexpr int64_t kValueAlignment = 256; // in bytes: at least what the kernels want

inline std::vector<int64_t> strides_of(IntHeaderOnlyArrayRef sizes, bool channels_last) {
  const int64_t dim = int64_t(sizes.size()), channel = dim - 3;
  std::vector<int64_t> order = {dim - 1, dim - 2, channel}, strides(dim); // from the innermost dimension on
  if (channels_last)
    order = {channel, dim - 1, dim - 2};
  if (dim == 4)
    order.push_back(0);
  int64_t stride = 1;
  for (const int64_t axis : order) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

inline Tensor empty_cuda(IntHeaderOnlyArrayRef sizes, ScalarType dtype, bool channels_last, int32_t device) {
  const std::vector<int64_t> strides =
      sizes.size() < 3 ? std::vector<int64_t>(sizes.size(), 1) : strides_of(sizes, channels_last);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

inline bool is_channels_last(const Tensor &images) {
  const std::vector<int64_t> wanted = strides_of(images.sizes(), true);
  const auto sizes = images.sizes(), strides = images.strides();
  for (size_t i = 0; i < wanted.size(); ++i)
    if (sizes[i] > 1 && strides[i] != wanted[i])
      return false;
  return true;
}

class CudaRegion {
public:
  CudaRegion(const Program &program, const std::vector<Tensor> &inputs, const std::vector<int64_t> &outputs,
             const std::vector<Tensor> &results, bool allow_tf32)
      : program_(program), anchor_(inputs[0]), type_(tiled_type_of("inputs", inputs[0])), allow_tf32_(allow_tf32),
        stream_(current_stream(inputs[0])), values_(program.values.size()) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const bool last = is_channels_last(inputs[i]) && !inputs[i].is_contiguous() && is_aligned(inputs[i]);
      kept_.push_back(last ? inputs[i] : torch::stable::contiguous(inputs[i]));
      values_[i].outside = const_cast<void *>(kept_.back().const_data_ptr());
      values_[i].layout = last ? ImageLayout::kChannelsLast : ImageLayout::kContiguous;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      Value &value = values_[outputs[i]];
      value.outside = results[i].mutable_data_ptr();
      value.layout = results[i].is_contiguous() ? ImageLayout::kContiguous : ImageLayout::kChannelsLast;
    }
    find_readers();
    for (const ProgramStep &step : program_.steps)
      linears_.push_back(step.kind == ProgramKind::kLinear ? linear(step) : Linear{});
  }

protected:
  struct Value {
    void *outside = nullptr; // the tensor that torch knows, of an input or an output
    ImageLayout layout = ImageLayout::kContiguous;
    int64_t readers = 0, first = -1, last = -1; // steps
    int64_t at = 0;                             // in the memory
    bool entered = false;
    // An input that the step behind it reads where it lies, or an activation before a pooling that does.
    bool skipped = false;
    // The pooled result of a convolution that pools by itself; and the convolution's own, which is nowhere.
    bool pooled_by_conv = false;
    int64_t pooled = -1;
  };

  struct Weight {
    cuda::TiledWeight tiled;
    const void *bias;
  };

  struct Linear {
    cuda::Linear call; // but for where its images lie
    const void *weight, *bias;
  };

  bool is_input(int64_t value) const { return value < program_.inputs(); }

  Images images(int64_t value) const {
    const ProgramValue &v = program_.values[value];
    return {program_.batch, v.channels, v.height, v.width};
  }

  int64_t stored_as(int64_t value) const { return values_[value].pooled < 0 ? value : values_[value].pooled; }

  // A convolution whose result one pooling alone reads, in windows of 2 x 2 side by side, may write the pooled result.
  // `able(step)`: whether its kernel can; calls `pools(step)`.
  template <typename Able, typename Pools> void pool_with_convs(const Able &able, const Pools &pools) {
    for (const ProgramStep &pool : program_.steps) {
      if (pool.kind != ProgramKind::kMaxPool || is_input(pool.input))
        continue;
      const size_t before = size_t(pool.input - program_.inputs());
      const ProgramStep &conv = program_.steps[before];
      const PoolWindow &w = pool.window;
      bool fits = conv.kind == ProgramKind::kConv && conv.add < 0;
      for (int axis = 0; axis < 2; ++axis)
        fits = fits && w.kernel[axis] == 2 && w.stride[axis] == 2 && w.pad[axis] == 0 && w.dilation[axis] == 1;
      const ProgramValue &in = program_.values[pool.input], &out = program_.values[pool.output];
      fits = fits && out.height == in.height / 2 && out.width == in.width / 2; // not with ceil_mode and odd sizes
      Value &own = values_[pool.input], &result = values_[pool.output];
      if (!fits || own.readers != 1 || own.outside != nullptr || !able(before))
        continue;
      pools(before);
      own.pooled = pool.output;
      result.pooled_by_conv = true;
      result.first = int64_t(before);
    }
  }

  // Checks and binds the tiled weight of a step; `refusal`: of a kernel, given the rows of a tile.
  template <typename Refusal> Weight weight(const ProgramStep &step, const Refusal &refusal_of) {
    const Tensor &values = program_.tensor(step.weight[0]), &columns = program_.tensor(step.weight[1]),
                 &tiles = program_.tensor(step.weight[2]), &rows = program_.tensor(step.weight[3]);
    const int64_t tile_rows = check_tiled(values, columns, tiles, rows, "inputs", anchor_, step.conv.out_channels);
    const char *refusal = refusal_of(tile_rows);
    STD_TORCH_CHECK(refusal == nullptr, "The region has a convolution that cannot run in it: ", refusal);
    Weight bound = {};
    bound.tiled = {contiguous(values).const_data_ptr(),
                   contiguous(columns).const_data_ptr<int32_t>(),
                   contiguous(tiles).const_data_ptr<int64_t>(),
                   contiguous(rows).const_data_ptr<int32_t>(),
                   tiles.size(0),
                   tile_rows,
                   columns.numel(),
                   values.numel()};
    bound.bias = bias(step, step.conv.out_channels);
    return bound;
  }

  const void *bias(const ProgramStep &step, int64_t out_channels) {
    if (step.bias == -1)
      return nullptr;
    check_bias(program_.tensor(step.bias), "inputs", anchor_, out_channels);
    return contiguous(program_.tensor(step.bias)).const_data_ptr();
  }

  // Gives every value for which `count(value)` has elements its place, and takes the memory of all together.
  template <typename Count> void place(const Count &count) {
    const int64_t element = type_ == TiledType::kFloat ? 4 : 2;
    std::vector<Life> lives;
    for (size_t v = 0; v < values_.size(); ++v) {
      const bool there = values_[v].first >= 0 && !values_[v].skipped && values_[v].pooled < 0;
      const int64_t bytes = there ? count(int64_t(v)) * element : 0;
      const int64_t aligned = (bytes + kValueAlignment - 1) / kValueAlignment * kValueAlignment;
      lives.push_back({values_[v].first, values_[v].last, 0, aligned});
    }
    const int64_t bytes = place_lives(lives);
    for (size_t v = 0; v < values_.size(); ++v)
      values_[v].at = lives[v].at;
    kept_.push_back(empty_cuda({bytes}, ScalarType::Byte, false, anchor_.get_device_index()));
    memory_ = static_cast<char *>(kept_.back().mutable_data_ptr());
  }

  void check(cudaError_t status, size_t step) const {
    static constexpr const char *kNames[] = {"convolution", "maximum pooling", "addition", "average pooling",
                                             "linear layer"};
    if (status == cudaSuccess)
      return;
    const ProgramStep &s = program_.steps[step];
    const ProgramValue &in = program_.values[s.input], &out = program_.values[s.output];
    STD_TORCH_CHECK(false, "A CUDA launch failed in step ", step, " of the region, a ", kNames[int64_t(s.kind)], " of ",
                    program_.batch, " images from ", in.channels, " x ", in.height, " x ", in.width, " to ",
                    out.channels, " x ", out.height, " x ", out.width, ": ", cudaGetErrorString(status));
  }

  static cuda::MaxPool max_pool_of(const ProgramStep &step, const Images &in, const ProgramValue &out) {
    const PoolWindow &w = step.window;
    return {in,
            out.height,
            out.width,
            {w.kernel[0], w.kernel[1]},
            {w.stride[0], w.stride[1]},
            {w.pad[0], w.pad[1]},
            {w.dilation[0], w.dilation[1]},
            Activation::kNone};
  }

  const Program &program_;
  const Tensor anchor_;
  const TiledType type_;
  const bool allow_tf32_; // in convolutions
  const cudaStream_t stream_;
  std::vector<Value> values_;
  std::vector<Linear> linears_; // of each step
  std::vector<Tensor> kept_;    // what the pointers point at
  char *memory_ = nullptr;

private:
  Linear linear(const ProgramStep &step) {
    const Tensor &weight = program_.tensor(step.weight[0]);
    check_like("the weight of a linear layer", weight, "inputs", anchor_);
    Linear bound = {};
    bound.call.images = program_.batch;
    bound.call.channels = weight.size(1);
    bound.call.outputs = weight.size(0);
    bound.call.type = type_;
    bound.weight = contiguous(weight).const_data_ptr();
    bound.bias = bias(step, weight.size(0));
    return bound;
  }

  void find_readers() {
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const ProgramStep &step = program_.steps[i];
      values_[step.output].first = values_[step.output].last = int64_t(i);
      for (const int64_t value : {step.input, step.add}) {
        if (value < 0)
          continue;
        values_[value].first = values_[value].first < 0 ? int64_t(i) : values_[value].first;
        values_[value].last = int64_t(i);
        ++values_[value].readers;
      }
    }
  }

  const Tensor &contiguous(const Tensor &tensor) {
    kept_.push_back(aligned_contiguous(tensor));
    return kept_.back();
  }
};

} // namespace fxsparse
