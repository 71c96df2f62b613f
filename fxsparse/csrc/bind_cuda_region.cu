// The operator `region_batch_inner` on CUDA: changes the layout of what comes in once, runs all steps on
// batch-innermost images, or on few images in row lanes, and changes the layout of what goes out once. Everything is
// queued on the current stream; the memory of the values between is one tensor of torch's allocator.
#include "cuda/region_storage.h"
#include "cuda_binding.h"
#include "memory_plan.h"
#include "region_program.h"
#include "row_lanes_choice.h"
#include "tiled_arguments.h"

#include <torch/csrc/stable/library.h>

namespace fxsparse {
namespace {

using cuda::BatchInner;
using cuda::ImageLayout;
using cuda::Images;
using cuda::ImageStrides;
using cuda::RowLanes;
using cuda::TiledType;

constexpr int64_t kAlignment = 256; // of the values, in bytes: at least what the kernels want

std::vector<int64_t> strides_of(IntHeaderOnlyArrayRef sizes, bool channels_last) {
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

Tensor empty_cuda(IntHeaderOnlyArrayRef sizes, ScalarType dtype, bool channels_last, int32_t device) {
  const std::vector<int64_t> strides =
      sizes.size() < 3 ? std::vector<int64_t>(sizes.size(), 1) : strides_of(sizes, channels_last);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

bool is_channels_last(const Tensor &images) {
  const std::vector<int64_t> wanted = strides_of(images.sizes(), true);
  const auto sizes = images.sizes(), strides = images.strides();
  for (size_t i = 0; i < wanted.size(); ++i)
    if (sizes[i] > 1 && strides[i] != wanted[i])
      return false;
  return true;
}

// Runs a region's program; see the operator below.
template <class Storage> class Run {
public:
  Run(const Program &program, const std::vector<Tensor> &inputs, const std::vector<int64_t> &outputs,
      const std::vector<Tensor> &results)
      : program_(program), anchor_(inputs[0]), type_(tiled_type_of("inputs", inputs[0])),
        stream_(current_stream(inputs[0])), storage_(type_, stream_), values_(program.values.size()) {
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
    bind_weights();
    if constexpr (Storage::kPoolsInputs)
      pool_inputs();
    if constexpr (Storage::kPoolsInConvs)
      pool_with_convs();
    if constexpr (Storage::kUnfolds)
      find_unfolded();
    place();
  }

  // Queues everything.
  void queue() {
    const Tensor memory = empty_cuda({bytes_}, ScalarType::Byte, false, anchor_.get_device_index());
    memory_ = static_cast<char *>(memory.mutable_data_ptr());
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const ProgramStep &step = program_.steps[i];
      if (values_[step.output].skipped)
        continue;
      for (const int64_t value : {step.input, step.add})
        if (value >= 0 && is_input(value) && !values_[value].entered && !values_[value].skipped)
          enter(value, i);
      if (!values_[step.output].pooled_by_conv)
        check(queue(step, i), i);
      if (values_[step.output].outside != nullptr && !leaves_at_once(step))
        leave(step.output, i);
    }
  }

private:
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
    cuda::TiledConv conv;
    cuda::TiledWeight tiled;
    const void *bias;
  };

  bool is_input(int64_t value) const { return value < program_.inputs(); }

  Images images(int64_t value) const {
    const ProgramValue &v = program_.values[value];
    return {program_.batch, v.channels, v.height, v.width};
  }

  int64_t count(int64_t value) const { return Storage::count(images(value)); } // elements, with padding

  int64_t stored_as(int64_t value) const { return values_[value].pooled < 0 ? value : values_[value].pooled; }

  void *at(int64_t value) const { return value < 0 ? nullptr : memory_ + values_[value].at; }

  // Whether a step writes its result as torch stores it: a mean of planes that no other step reads.
  bool leaves_at_once(const ProgramStep &step) const {
    const Value &value = values_[step.output];
    return step.kind == ProgramKind::kAverage && value.outside != nullptr && value.readers == 0;
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

  void pool_inputs() {
    for (const ProgramStep &step : program_.steps)
      if (step.kind == ProgramKind::kMaxPool)
        skip_before(step);
  }

  // Convolutions that need their input unfolded; of an input that nothing else reads, from where it lies.
  void find_unfolded() {
    unfolded_.resize(program_.steps.size(), -1);
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const ProgramStep &step = program_.steps[i];
      if (step.kind != ProgramKind::kConv || cuda::reads_rows_as_they_lie(step.conv))
        continue;
      unfolded_[i] = 0;
      values_[step.input].skipped = is_input(step.input) && values_[step.input].readers == 1;
    }
  }

  // A pooling that begins the region reads the input where it lies, through an activation that it alone reads.
  void skip_before(const ProgramStep &pool) {
    const int64_t read = pool.input;
    int64_t source = read;
    if (!is_input(read)) {
      const ProgramStep &before = program_.steps[read - program_.inputs()];
      const bool rises = before.activation == Activation::kRelu || before.activation == Activation::kRelu6;
      if (before.kind != ProgramKind::kAdd || before.add >= 0 || !rises || values_[read].outside != nullptr)
        return;
      source = before.input;
    }
    if (!is_input(source) || values_[source].readers != 1 || values_[read].readers != 1 ||
        !cuda::pools_from(images(source), values_[source].layout, type_))
      return;
    values_[source].skipped = values_[read].skipped = true;
  }

  void bind_weights() {
    for (const ProgramStep &step : program_.steps) {
      Weight bound = {};
      if (step.kind == ProgramKind::kConv)
        bound = weight(step);
      weights_.push_back(bound);
    }
  }

  // A convolution whose result one pooling alone reads, in windows of 2 x 2 side by side, writes the pooled result.
  void pool_with_convs() {
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
      if (!fits || own.readers != 1 || own.outside != nullptr || !can_pool_tiled_conv2d(weights_[before].conv))
        continue;
      weights_[before].conv.pools = true;
      own.pooled = pool.output;
      result.pooled_by_conv = true;
      result.first = int64_t(before);
    }
  }

  const Tensor &contiguous(const Tensor &tensor) {
    kept_.push_back(aligned_contiguous(tensor));
    return kept_.back();
  }

  Weight weight(const ProgramStep &step) {
    const Tensor &values = program_.tensor(step.weight[0]), &columns = program_.tensor(step.weight[1]),
                 &tiles = program_.tensor(step.weight[2]), &rows = program_.tensor(step.weight[3]);
    const int64_t tile_rows = check_tiled(values, columns, tiles, rows, "inputs", anchor_, step.conv.out_channels);
    Weight bound = {};
    bound.conv.geometry = Storage::geometry(step.conv);
    bound.conv.type = type_;
    bound.conv.overlap = true;
    const char *refusal = cuda::tiled_conv2d_refusal(bound.conv, tile_rows);
    STD_TORCH_CHECK(refusal == nullptr, "The region has a convolution that cannot run in it: ", refusal);
    bound.tiled = {contiguous(values).const_data_ptr(),
                   contiguous(columns).template const_data_ptr<int32_t>(),
                   contiguous(tiles).template const_data_ptr<int64_t>(),
                   contiguous(rows).template const_data_ptr<int32_t>(),
                   tiles.size(0),
                   tile_rows,
                   columns.numel(),
                   values.numel()};
    if (step.bias != -1) {
      check_bias(program_.tensor(step.bias), "inputs", anchor_, step.conv.out_channels);
      bound.bias = contiguous(program_.tensor(step.bias)).const_data_ptr();
    }
    return bound;
  }

  void place() {
    const int64_t element = type_ == TiledType::kFloat ? 4 : 2;
    const auto aligned = [&](int64_t elements) {
      return (elements * element + kAlignment - 1) / kAlignment * kAlignment;
    };
    std::vector<Life> lives;
    for (size_t v = 0; v < values_.size(); ++v) {
      const bool there = values_[v].first >= 0 && !values_[v].skipped && values_[v].pooled < 0;
      lives.push_back({values_[v].first, values_[v].last, 0, there ? aligned(count(int64_t(v))) : 0});
    }
    for (size_t i = 0; i < unfolded_.size(); ++i)
      if (unfolded_[i] >= 0)
        lives.push_back({int64_t(i), int64_t(i), 0, aligned(unfolded_count(program_.steps[i].conv))});
    bytes_ = place_lives(lives);
    for (size_t v = 0; v < values_.size(); ++v)
      values_[v].at = lives[v].at;
    size_t next = values_.size();
    for (int64_t &at : unfolded_)
      if (at >= 0)
        at = lives[next++].at;
  }

  static int64_t unfolded_count(const Conv2dGeometry &conv) {
    return conv.kernel_width * Storage::count({conv.batch, conv.in_channels, conv.in_height, conv.out_width});
  }

  void enter(int64_t value, size_t step) {
    check(storage_.enter(images(value), values_[value].layout, values_[value].outside, at(value)), step);
    values_[value].entered = true;
  }

  void leave(int64_t value, size_t step) {
    check(storage_.leave(images(value), values_[value].layout, at(value), values_[value].outside), step);
  }

  cudaError_t queue(const ProgramStep &step, size_t index) const {
    switch (step.kind) {
    case ProgramKind::kConv:
      return conv(step, index);
    case ProgramKind::kMaxPool:
      return max_pool(step);
    case ProgramKind::kAdd:
      return launch_add(count(step.output), step.activation, type_, at(step.input), at(step.add), at(step.output),
                        stream_);
    case ProgramKind::kAverage:
      return leaves_at_once(step)
                 ? storage_.average(images(step.input), at(step.input), true, values_[step.output].outside)
                 : storage_.average(images(step.input), at(step.input), false, at(step.output));
    }
    return cudaErrorInvalidValue;
  }

  cudaError_t conv(const ProgramStep &step, size_t index) const {
    const void *input = at(step.input);
    if constexpr (Storage::kUnfolds)
      if (unfolded_[index] >= 0) {
        const Value &value = values_[step.input];
        const Images read = images(step.input);
        const ImageStrides strides =
            value.skipped ? cuda::strides_in_torch(read, value.layout) : cuda::strides_in_row_lanes(read);
        void *unfolded = memory_ + unfolded_[index];
        const cudaError_t status =
            storage_.unfold(read, strides, cuda::row_taps(step.conv), value.skipped ? value.outside : input, unfolded);
        if (status != cudaSuccess)
          return status;
        input = unfolded;
      }
    const Weight &weight = weights_[index];
    return launch_tiled_conv2d(weight.conv, weight.tiled,
                               {input, weight.bias, at(step.add), at(stored_as(step.output))}, stream_);
  }

  cudaError_t max_pool(const ProgramStep &step) const {
    const PoolWindow &w = step.window;
    const ProgramValue &out = program_.values[step.output];
    cuda::MaxPool pool = {images(step.input),
                          out.height,
                          out.width,
                          {w.kernel[0], w.kernel[1]},
                          {w.stride[0], w.stride[1]},
                          {w.pad[0], w.pad[1]},
                          {w.dilation[0], w.dilation[1]},
                          Activation::kNone};
    if (!values_[step.input].skipped)
      return storage_.max_pool(pool, at(step.input), at(step.output));
    int64_t source = step.input;
    if (!is_input(source)) {
      const ProgramStep &before = program_.steps[source - program_.inputs()];
      pool.activation = before.activation;
      source = before.input;
    }
    return launch_pool_to_batch_inner(pool, type_, values_[source].outside, at(step.output), stream_);
  }

  void check(cudaError_t status, size_t step) const {
    static constexpr const char *kNames[] = {"convolution", "maximum pooling", "addition", "average pooling"};
    if (status == cudaSuccess)
      return;
    const ProgramStep &s = program_.steps[step];
    const ProgramValue &in = program_.values[s.input], &out = program_.values[s.output];
    STD_TORCH_CHECK(false, "A CUDA launch failed in step ", step, " of the region, a ", kNames[int64_t(s.kind)], " of ",
                    program_.batch, " images from ", in.channels, " x ", in.height, " x ", in.width, " to ",
                    out.channels, " x ", out.height, " x ", out.width, ": ", cudaGetErrorString(status));
  }

  const Program &program_;
  const Tensor anchor_;
  const TiledType type_;
  const cudaStream_t stream_;
  const Storage storage_;
  std::vector<Value> values_;
  std::vector<Weight> weights_;   // of each step
  std::vector<int64_t> unfolded_; // where a step's unfolded input lies in the memory; -1: it has none
  std::vector<Tensor> kept_;      // what the pointers point at
  int64_t bytes_ = 0;
  char *memory_ = nullptr;
};

std::vector<Tensor> region_batch_inner(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors,
                                       const std::vector<int64_t> &numbers, const std::vector<int64_t> &outputs,
                                       const std::vector<int64_t> &channels_last) {
  const Program program(inputs, tensors, numbers);
  check_cuda("inputs", inputs[0]);
  const torch::stable::accelerator::DeviceGuard guard(inputs[0].get_device_index());
  std::vector<Tensor> results;
  for (const std::vector<int64_t> &sizes : program.output_sizes(outputs, inputs[0])) {
    const bool last =
        std::find(channels_last.begin(), channels_last.end(), outputs[results.size()]) != channels_last.end();
    results.push_back(empty_cuda(sizes, inputs[0].scalar_type(), last, inputs[0].get_device_index()));
  }
  if (program.is_empty()) // nothing to compute: bad weights are refused all the same
    Run<BatchInner>(program, inputs, outputs, results);
  else if (runs_in_row_lanes(program, tiled_type_of("inputs", inputs[0])))
    Run<RowLanes>(program, inputs, outputs, results).queue();
  else
    Run<BatchInner>(program, inputs, outputs, results).queue();
  return results;
}

} // namespace
} // namespace fxsparse

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CUDA, m) { m.impl("region_batch_inner", TORCH_BOX(&fxsparse::region_batch_inner)); }
