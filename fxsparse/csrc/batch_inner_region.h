// A region on batch-innermost images: changes the layout of what comes in once, and of what goes out once.
#pragma once

#include "cuda_region.h"

namespace fxsparse {

class BatchInnerRegion : CudaRegion {
public:
  BatchInnerRegion(const Program &program, const std::vector<Tensor> &inputs, const std::vector<int64_t> &outputs,
                   const std::vector<Tensor> &results, bool allow_tf32)
      : CudaRegion(program, inputs, outputs, results, allow_tf32) {
    for (const ProgramStep &step : program_.steps) {
      Conv conv = {};
      if (step.kind == ProgramKind::kConv) {
        conv.call = {step.conv, type_, cuda::TiledKernel::kChosen, true, false, allow_tf32_};
        conv.weight = weight(step, [&](int64_t rows) { return cuda::tiled_conv2d_refusal(conv.call, rows); });
      }
      convs_.push_back(conv);
    }
    pool_inputs();
    pool_with_convs([&](size_t step) { return can_pool_tiled_conv2d(convs_[step].call); },
                    [&](size_t step) { convs_[step].call.pools = true; });
  }

  // Queues everything.
  void queue() {
    place([&](int64_t value) { return count(value); });
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
  struct Conv {
    cuda::TiledConv call;
    Weight weight;
  };

  int64_t count(int64_t value) const { // elements, with padding
    const Images i = images(value);
    return i.channels * i.height * i.width * cuda::padded_batch(i.batch);
  }

  void *at(int64_t value) const { return value < 0 ? nullptr : memory_ + values_[value].at; }

  // Whether a step writes its result as torch stores it: one pixel that no other step reads.
  bool leaves_at_once(const ProgramStep &step) const {
    const Value &value = values_[step.output];
    const bool able = step.kind == ProgramKind::kAverage || step.kind == ProgramKind::kLinear;
    return able && value.outside != nullptr && value.readers == 0;
  }

  cuda::ImageStrides strides_of_pixels(int64_t value) const { // of planes of one pixel
    const int64_t lanes = cuda::padded_batch(program_.batch);
    return {images(value).channels * lanes, lanes, 1, 0};
  }

  void pool_inputs() {
    for (const ProgramStep &step : program_.steps)
      if (step.kind == ProgramKind::kMaxPool)
        skip_before(step);
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

  void enter(int64_t value, size_t step) {
    const Value &v = values_[value];
    check(launch_to_batch_inner(images(value), v.layout, type_, v.outside, at(value), stream_), step);
    values_[value].entered = true;
  }

  void leave(int64_t value, size_t step) {
    const Value &v = values_[value];
    check(launch_from_batch_inner(images(value), v.layout, type_, at(value), v.outside, stream_), step);
  }

  cudaError_t queue(const ProgramStep &step, size_t index) const {
    switch (step.kind) {
    case ProgramKind::kConv:
      return launch_tiled_conv2d(convs_[index].call, convs_[index].weight.tiled,
                                 {at(step.input), convs_[index].weight.bias, at(step.add), at(stored_as(step.output))},
                                 stream_);
    case ProgramKind::kMaxPool:
      return max_pool(step);
    case ProgramKind::kAdd:
      return launch_add(count(step.output), step.activation, type_, at(step.input), at(step.add), at(step.output),
                        stream_);
    case ProgramKind::kAverage: {
      const bool leaves = leaves_at_once(step);
      return launch_average(images(step.input), type_, at(step.input), leaves,
                            leaves ? values_[step.output].outside : at(step.output), stream_);
    }
    case ProgramKind::kLinear: {
      const bool leaves = leaves_at_once(step);
      cuda::Linear call = linears_[index].call;
      call.overlap = true;
      call.in = strides_of_pixels(step.input);
      call.out = leaves ? cuda::strides_in_torch(images(step.output), ImageLayout::kContiguous)
                        : strides_of_pixels(step.output);
      return launch_linear(call,
                           {at(step.input), linears_[index].weight, linears_[index].bias,
                            leaves ? values_[step.output].outside : at(step.output)},
                           stream_);
    }
    }
    return cudaErrorInvalidValue;
  }

  cudaError_t max_pool(const ProgramStep &step) const {
    cuda::MaxPool pool = max_pool_of(step, images(step.input), program_.values[step.output]);
    if (!values_[step.input].skipped)
      return launch_max_pool(pool, type_, at(step.input), at(step.output), stream_);
    int64_t source = step.input;
    if (!is_input(source)) {
      const ProgramStep &before = program_.steps[source - program_.inputs()];
      pool.activation = before.activation;
      source = before.input;
    }
    return launch_pool_to_batch_inner(pool, type_, values_[source].outside, at(step.output), stream_);
  }

  std::vector<Conv> convs_; // of each step
};

} // namespace fxsparse
