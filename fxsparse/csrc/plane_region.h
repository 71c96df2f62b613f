// A region on few images, as torch stores them: every step reads and writes through strides, inputs and outputs where
// they lie. Nothing changes its layout.
#pragma once

#include "cuda/plane_conv.h"
#include "cuda_region.h"

#include <cstdlib>
#include <cstring>

namespace fxsparse {

// Whether a program runs so. Measured on an H200 (benchmarks/NOTES.md): below 8 images, of which batch-innermost lanes
// would be padding. FXSPARSE_CUDA_STORAGE says "planes" or "batch_inner", for tests and measurements.
inline bool runs_on_planes(const Program &program) {
  const char *asked = std::getenv("FXSPARSE_CUDA_STORAGE");
  const bool chosen = asked == nullptr || *asked == '\0', planes = !chosen && std::strcmp(asked, "planes") == 0;
  STD_TORCH_CHECK(chosen || planes || std::strcmp(asked, "batch_inner") == 0, "FXSPARSE_CUDA_STORAGE is '", asked,
                  "', expected 'planes' or 'batch_inner'");
  for (const ProgramValue &v : program.values)
    if (!cuda::are_few({program.batch, v.channels, v.height, v.width}))
      return false;
  return planes || (chosen && program.batch < 8);
}

class PlaneRegion : CudaRegion {
public:
  PlaneRegion(const Program &program, const std::vector<Tensor> &inputs, const std::vector<int64_t> &outputs,
              const std::vector<Tensor> &results, bool allow_tf32)
      : CudaRegion(program, inputs, outputs, results, allow_tf32) {
    for (const ProgramStep &step : program_.steps) {
      Conv conv = {};
      if (step.kind == ProgramKind::kConv) {
        conv.call.geometry = step.conv;
        conv.call.type = type_;
        conv.call.allow_tf32 = allow_tf32_;
        conv.weight = weight(step, [&](int64_t rows) { return cuda::plane_conv2d_refusal(conv.call, rows); });
      }
      convs_.push_back(conv);
    }
    pool_with_convs([](size_t) { return true; }, [&](size_t step) { convs_[step].call.pools = true; });
  }

  // Queues everything.
  void queue() {
    place([&](int64_t value) { return values_[value].outside == nullptr ? program_.batch * strides(value).image : 0; });
    bool first = true; // what runs before it may write weights
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const ProgramStep &step = program_.steps[i];
      if (values_[step.output].pooled_by_conv)
        continue;
      check(queue(step, i, !first), i);
      first = false;
    }
  }

private:
  struct Conv {
    cuda::PlaneConv call;
    Weight weight;
  };

  void *at(int64_t value) const {
    if (value < 0)
      return nullptr;
    return values_[value].outside != nullptr ? values_[value].outside : memory_ + values_[value].at;
  }

  // Values that torch does not know have rows of an even pitch: two positions are stored at once then.
  cuda::ImageStrides strides(int64_t value) const {
    if (value < 0)
      return {};
    Images sizes = images(value);
    if (values_[value].outside == nullptr)
      sizes.width = (sizes.width + 1) / 2 * 2;
    return cuda::strides_in_torch(sizes, values_[value].layout);
  }

  cudaError_t queue(const ProgramStep &step, size_t index, bool overlap) const {
    const int64_t out = stored_as(step.output);
    switch (step.kind) {
    case ProgramKind::kConv: {
      cuda::PlaneConv call = convs_[index].call;
      call.overlap = overlap;
      call.in = strides(step.input), call.add = strides(step.add), call.out = strides(out);
      return launch_plane_conv2d(call, convs_[index].weight.tiled,
                                 {at(step.input), convs_[index].weight.bias, at(step.add), at(out)}, stream_);
    }
    case ProgramKind::kMaxPool:
      return launch_plane_max_pool(max_pool_of(step, images(step.input), program_.values[out]), strides(step.input),
                                   strides(out), type_, overlap, at(step.input), at(out), stream_);
    case ProgramKind::kAdd:
      return launch_plane_add(images(out), strides(step.input), strides(step.add), strides(out), step.activation, type_,
                              overlap, at(step.input), at(step.add), at(out), stream_);
    case ProgramKind::kAverage:
      return launch_plane_average(images(step.input), strides(step.input), strides(out), type_, overlap, at(step.input),
                                  at(out), stream_);
    case ProgramKind::kLinear: {
      cuda::Linear call = linears_[index].call;
      call.overlap = overlap;
      call.in = strides(step.input), call.out = strides(out);
      return launch_linear(call, {at(step.input), linears_[index].weight, linears_[index].bias, at(out)}, stream_);
    }
    }
    return cudaErrorInvalidValue;
  }

  std::vector<Conv> convs_; // of each step
};

} // namespace fxsparse
