// The sparse convolution on a CPU, as the binding sees it: plain shapes and pointers in, no torch.
#pragma once

#include "conv2d_geometry.h"

namespace fxsparse {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
// Sizes of one convolution call. `pad` is (top, bottom, left, right).
struct ConvShape {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  // Elements from one channel to the next; images follow each other as channels do.
  int64_t input_plane, add_plane, output_plane;
  int64_t kernel[2], stride[2], dilation[2], pad[4];
  int64_t weight_columns; // (channels / groups) * kernel height * kernel width
  PaddingMode mode;
  Activation activation;
  Dtype dtype;
  bool stripe; // `out_height` are consecutive rows of more; which ones, a run is told
};

// The packed weight: see docs/architecture.md.
struct PackedWeight {
  const void *values;
  const int32_t *columns;
  const int64_t *panels, *rows;
  int64_t num_values, num_columns, num_panels;
};

// Rows [first, last) of every plane of a tensor: `at` is where row 0 of its first plane is, or would be.
struct InputRows {
  const void *at;
  int64_t first, last;
};

// NCHW tensors whose rows are contiguous; `bias` and `add` may be null.
struct ConvTensors {
  const InputRows *inputs; // together all rows that are read
  int64_t num_inputs;
  int64_t first_row; // which row of the whole output the first one here is
  const void *bias, *add;
  void *output;
};

// Calls body(worker, context) for every worker in [0, workers), in parallel where it can.
using ParallelFor = void (*)(int64_t workers, void (*body)(int64_t worker, void *context), void *context);

struct Conv;

// Fills `plan` and returns the bytes of memory that run_conv needs (at most one allocation by the caller), or -1
// if one image has more elements than the kernels' 32-bit offsets reach.
int64_t plan_conv(const ConvShape &shape, const PackedWeight &weight, int64_t threads, Conv &plan);

// Runs a convolution as planned: the three below, one after the other.
void run_conv(Conv &plan, const PackedWeight &weight, const ConvTensors &tensors, void *memory, ParallelFor parallel);

// Writes the tables of a convolution, which serve any number of runs, into memory of plan.prepared_bytes.
void prepare_conv(Conv &plan, const PackedWeight &weight, const void *bias, void *memory);

// Share `worker` of the larger ones: column offsets, and weights in the accumulators' type.
void decode_conv(const Conv &plan, const PackedWeight &weight, void *memory, int64_t worker, int64_t workers);

// A run is so many phases: none begins before all shares of the one before have ended.
int64_t conv_phases(const Conv &plan);

// Into how many shares a phase goes at the most. Workers that take a small one after the other end together even if the
// machine has slowed one of them down.
int64_t conv_shares(const Conv &plan, int64_t phase);

// Share `share` of `shares` of a phase: conv_shares() or, one for each, the plan's workers. `working`: memory of
// plan.working_bytes, the same for all phases; no other share runs on this `worker` meanwhile.
void run_conv_phase(const Conv &plan, const ConvTensors &tensors, void *working, int64_t phase, int64_t share,
                    int64_t shares, int64_t worker);

} // namespace fxsparse
