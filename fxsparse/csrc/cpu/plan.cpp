// Plans a sparse convolution: the layout of the canonical input, tiles, schedule and scratch.
#include "cpu/plan.h"

#include <algorithm>
#include <numeric>

#include "cpu/isa.h"

namespace fxsparse {
namespace {

// Inputs of one group of images: half of a small L2, so that the weights of a unit fit beside them.
constexpr int64_t kGroupBytes = 448 * 1024;
// Inputs that one band of tiles reads, for every unit in turn.
constexpr int64_t kBandBytes = 400 * 1024;
// Channel groups of a grouped convolution that are gathered at once: half of L1.
constexpr int64_t kGatherBytes = 16 * 1024;
// Cells of a band when residual weights exist: its results, for the rows of a unit, wait in L1.
constexpr int64_t kResidualBandCells = 512;
// Outputs of a group: enough for full tiles on the narrowest planes.
constexpr int64_t kGroupOutputs = 1024;
constexpr int64_t kMaxOffset = int64_t(1) << 32;
constexpr int64_t kAlignment = 64;
// Tiles are at most this high (block_kernel.h).
constexpr int64_t kTileHeight = 7;
// A window has at least so many rows for each row that it reads beyond them.
constexpr int64_t kWindowHalos = 3;
// Groups of so few tiles are shared among the workers by their rows of the weight alone.
constexpr int64_t kUnsplitTiles = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_up(int64_t a) { return ceil_div(a, kAlignment) * kAlignment; }

int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }
int64_t storage_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Zero padding is shared: the zeros that end a row are those that begin the next, if that makes the row shorter.
Axis make_axis(int64_t input, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation,
               int64_t output, bool zeros) {
  Axis axis = {};
  axis.input = input;
  axis.stride = stride;
  axis.dilation = dilation;
  axis.before = before;
  axis.padded = before + input + after;
  axis.period = stride / std::gcd(stride, dilation);
  axis.slots = std::min(kernel, axis.period);
  const int64_t needed = output + (kernel - 1) * dilation / stride;
  axis.needed = axis.cells = needed;
  if (!zeros)
    return axis;
  int64_t leading = needed, end = 1;
  for (int64_t slot = 0; slot < axis.slots; ++slot) {
    const int64_t phase = slot * dilation % stride;
    leading = std::min(leading, std::max<int64_t>(0, ceil_div(before - phase, stride)));
    end = std::max(end, ceil_div(before + input - phase, stride));
  }
  axis.cells = std::max({std::min(end, needed), needed - leading, output});
  axis.spill = std::max<int64_t>(0, needed - axis.cells);
  return axis;
}

void plan_layout(const ConvShape &s, Conv &c) {
  const bool flat = s.kernel[0] == 1 && s.kernel[1] == 1 && s.stride[0] == 1 && s.stride[1] == 1 &&
                    std::all_of(s.pad, s.pad + 4, [](int64_t p) { return p == 0; });
  const bool zeros = s.mode == PaddingMode::kZeros;
  // Planes of less than a vector are worth the copy, as it puts the planes of several images side by side.
  c.in_place =
      flat && storage_bytes(s.dtype) == accumulator_bytes(s.dtype) && s.out_height * s.out_width >= kPanelLanes;
  if (c.in_place || (flat && !s.stripe)) {
    c.out_height = 1;
    c.out_width = s.out_height * s.out_width;
    c.y = make_axis(1, 0, 0, 1, 1, 1, 1, zeros);
    c.x = make_axis(c.out_width, 0, 0, 1, 1, 1, c.out_width, zeros);
  } else {
    c.out_height = s.out_height;
    c.out_width = s.out_width;
    c.y = make_axis(s.height, s.pad[0], s.pad[1], s.kernel[0], s.stride[0], s.dilation[0], s.out_height, zeros);
    c.x = make_axis(s.width, s.pad[2], s.pad[3], s.kernel[1], s.stride[1], s.dilation[1], s.out_width, zeros);
    if (s.stripe) { // which has all its rows, wherever it begins
      c.y.cells = c.y.needed;
      c.y.spill = 0;
    }
  }
  c.plane = c.y.cells * c.x.cells;
  c.tile_height = std::clamp<int64_t>(c.kernels->positions / c.out_width, 1, kTileHeight);
  c.pieces = ceil_div(c.out_width, c.kernels->positions);
}

// Windows of rows, when one image is more than a worker's cache or when there are fewer images than workers. Each
// worker gathers the rows that it needs, so that they stay in its cache and no worker waits for another.
bool plan_windows(const ConvShape &s, int64_t threads, Conv &c) {
  const int64_t halo = c.y.needed - c.out_height;
  const int64_t row_bytes = s.channels * c.y.slots * c.x.slots * c.x.cells * accumulator_bytes(s.dtype);
  const bool whole_images = s.batch >= 2 * threads || s.batch % threads == 0;
  if (c.in_place || c.tile_height > 1 || (whole_images && row_bytes * c.y.cells <= kGroupBytes))
    return false;
  const int64_t fit = std::max<int64_t>(1, kBandBytes / row_bytes - halo);
  int64_t windows = ceil_div(c.out_height, fit);
  if (s.batch < 2 * threads)
    while (s.batch * windows % threads != 0 && windows < c.out_height)
      ++windows;
  if (s.batch * windows < threads || c.out_height < kWindowHalos * halo * windows)
    return false;
  c.schedule = Schedule::kWindows;
  c.windows = windows;
  c.workers = threads;
  c.group_images = 1;
  c.y.cells = ceil_div(c.out_height, windows) + halo;
  c.y.spill = 0; // a window has all its rows
  c.plane = c.y.cells * c.x.cells;
  return true;
}

// Rows that the depthwise kernel is told of.
int64_t depthwise_rows(const ConvShape &s) { return (s.out_height - 1) * s.stride[0] + s.kernel[0]; }

bool plan_depthwise(const ConvShape &s, int64_t threads, Conv &c) {
  if (!has_depthwise_kernel(s))
    return false;
  c.schedule = Schedule::kDepthwise;
  c.workers = threads;
  return true;
}

// Grouped convolutions, also depthwise ones that have no kernel of their own: the channels of one group stay in L1 or
// L2 from the gather to the last of their units.
bool plan_by_group(const ConvShape &s, int64_t threads, Conv &c) {
  if (s.stripe)
    return false;
  const int64_t taps = s.kernel[0] * s.kernel[1], channels = s.weight_columns / taps;
  const int64_t bytes = channels * c.y.slots * c.x.slots * c.plane * accumulator_bytes(s.dtype);
  if (channels == s.channels || c.in_place || bytes > kGroupBytes)
    return false;
  c.schedule = Schedule::kByGroup;
  c.windows = 1;
  c.workers = threads;
  c.group_images = 1;
  c.gathered_channels = channels * std::clamp<int64_t>(kGatherBytes / bytes, 1, s.channels / channels);
  return true;
}

void plan_groups(const ConvShape &s, int64_t threads, Conv &c) {
  // Alone, a worker has no barriers and its images stay in its own cache.
  const bool whole_images = s.batch >= 2 * threads || s.batch % threads == 0;
  c.schedule = whole_images ? Schedule::kImages : Schedule::kShared;
  c.windows = 1;
  c.workers = whole_images ? std::min(threads, s.batch) : threads;
  const int64_t image = s.channels * c.y.slots * c.x.slots * c.plane;
  const int64_t images = whole_images ? ceil_div(s.batch, c.workers) : s.batch;
  const int64_t fit = kGroupBytes / std::max<int64_t>(1, image * accumulator_bytes(s.dtype));
  const int64_t useful = ceil_div(kGroupOutputs, c.out_height * c.out_width);
  // Images of a group go by one table of rows, for what is added, too.
  const bool alone = c.in_place || s.stripe || s.add_plane != s.output_plane;
  c.group_images = alone ? 1 : std::clamp<int64_t>(std::min(fit, useful), 1, images);
}

// Cells that a band spans, at most.
int64_t band_cells(const Conv &c, int64_t tiles) {
  const int64_t rows = c.pieces == 1 ? tiles * c.tile_height : (tiles + c.pieces - 2) / c.pieces + 1;
  const int64_t gaps = c.group_images == 1 ? 0 : (rows + c.out_height - 2) / c.out_height;
  return tiles * c.tile_height * ceil_div(c.out_width, c.pieces) + (rows - 1) * (c.x.cells - c.out_width) +
         gaps * (c.plane - c.out_height * c.x.cells);
}

void plan_bands(const ConvShape &s, Conv &c) {
  c.bands = 1;
  c.channel_stride = c.in_place ? s.input_plane : c.y.slots * c.x.slots * c.group_images * c.plane;
  const int64_t slack = c.y.spill * c.x.cells + c.x.spill + 2 * kPanelLanes;
  c.buffer_elements = c.in_place ? 0 : c.gathered_channels * c.channel_stride + slack;
  const int64_t tiles =
      c.schedule == Schedule::kWindows ? ceil_div(c.out_height, c.windows) * c.pieces : group_tiles(c, c.group_images);
  int64_t bands = ceil_div(c.gathered_channels * c.channel_stride * accumulator_bytes(s.dtype), kBandBytes);
  const bool depthwise = c.schedule == Schedule::kByGroup && s.weight_columns == s.kernel[0] * s.kernel[1];
  if (c.has_residual && !depthwise) // its results are one row, no more than its input
    bands = std::max(bands, ceil_div(c.group_images * c.plane, kResidualBandCells));
  if (c.schedule == Schedule::kShared && tiles > kUnsplitTiles)
    bands = ceil_div(bands, c.workers) * c.workers;
  c.bands = std::clamp<int64_t>(bands, 1, tiles);
  const int64_t lanes = c.kernels->lanes;
  c.scratch_elements =
      kPanelLanes * c.kernels->unit_panels * (std::max(band_cells(c, ceil_div(tiles, c.bands)), lanes) + 2 * lanes);
}

// Memory that is handed out piece by piece.
struct Pieces {
  int64_t bytes = 0;
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += align_up(size);
    return at;
  }
};

void plan_memory(const ConvShape &s, const PackedWeight &w, Conv &c) {
  const int64_t accumulator = accumulator_bytes(s.dtype);
  Pieces prepared, working;
  if (c.schedule == Schedule::kDepthwise) {
    c.at_values = prepared.take(s.out_channels * s.weight_columns * accumulator);
    c.worker_buffer_bytes = align_up(depthwise_rows(s) * int64_t(sizeof(void *)));
    c.at_buffers = working.take(c.worker_buffer_bytes * c.workers);
    c.prepared_bytes = prepared.bytes;
    c.working_bytes = working.bytes;
    return;
  }
  c.at_offsets = prepared.take((w.num_columns + kColumnsAhead) * int64_t(sizeof(uint32_t)));
  c.at_taps = prepared.take(s.kernel[0] * s.kernel[1] * int64_t(sizeof(uint32_t)));
  c.at_rows = prepared.take(2 * c.group_images * c.out_height * int64_t(sizeof(int64_t)));
  c.at_units = prepared.take(w.num_panels * int64_t(sizeof(Unit)));
  c.at_costs = prepared.take((w.num_panels + 1) * int64_t(sizeof(int64_t)));
  c.at_values = prepared.take(c.kernels->widen ? w.num_values * accumulator : 0);
  c.prepared_bytes = prepared.bytes;
  c.worker_result_bytes = align_up(c.scratch_elements * accumulator);
  c.at_results = working.take(c.worker_result_bytes * c.workers);
  c.worker_buffer_bytes = align_up(c.buffer_elements * accumulator);
  c.at_buffers = working.take(c.worker_buffer_bytes * (c.schedule == Schedule::kShared ? 1 : c.workers));
  c.working_bytes = working.bytes;
}

} // namespace

const KernelSet &kernels_for(Dtype dtype) {
  switch (selected_isa()) {
#if defined(__x86_64__)
  case Isa::kAvx512:
    return avx512_kernels(dtype);
  case Isa::kAvx2:
    return avx2_kernels(dtype);
#endif
  default:
    return baseline_kernels(dtype);
  }
}

bool has_depthwise_kernel(const ConvShape &s) {
  const int64_t size = s.kernel[0], stride = s.stride[0];
  return s.weight_columns == size * size && (size == 3 || size == 5) && s.kernel[1] == size &&
         (stride == 1 || stride == 2) && s.stride[1] == stride && s.dilation[0] == 1 && s.dilation[1] == 1 &&
         s.mode == PaddingMode::kZeros && kernels_for(s.dtype).depthwise != nullptr;
}

int64_t group_tiles(const Conv &conv, int64_t images) {
  return ceil_div(images * conv.out_height, conv.tile_height) * conv.pieces;
}

int64_t plan_conv(const ConvShape &shape, const PackedWeight &weight, int64_t threads, Conv &plan) {
  plan = {};
  plan.shape = shape;
  plan.kernels = &kernels_for(shape.dtype);
  plan.element_bytes = storage_bytes(shape.dtype);
  int64_t block_values = 0;
  for (int64_t p = 0; p < weight.num_panels; ++p)
    block_values += weight.panels[p * kPanelFields + kColumnCount] * kPanelLanes;
  plan.has_residual = weight.num_values > block_values;
  plan_layout(shape, plan);
  plan.gathered_channels = shape.channels;
  if (!plan_depthwise(shape, threads, plan)) {
    if (!plan_by_group(shape, threads, plan) && !plan_windows(shape, threads, plan))
      plan_groups(shape, threads, plan);
    plan_bands(shape, plan);
  }
  if (shape.channels * plan.channel_stride >= kMaxOffset)
    return -1;
  plan_memory(shape, weight, plan);
  return plan.prepared_bytes + plan.working_bytes + kAlignment;
}

} // namespace fxsparse
