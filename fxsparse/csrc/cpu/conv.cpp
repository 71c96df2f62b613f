// Plans a sparse convolution (layout, tiles, bands, scratch) and drives the kernels over threads.
#include "cpu/conv.h"

#include <algorithm>
#include <numeric>

#include "cpu/isa.h"
#include "cpu/plan.h"

namespace fxsparse {
namespace {

// Inputs of one group of images: half of a small L2, so that the weights of a unit fit beside them.
constexpr int64_t kGroupBytes = 448 * 1024;
// Inputs that one band of tiles reads, for every unit in turn.
constexpr int64_t kBandBytes = 400 * 1024;
// Cells of a band when residual weights exist: its results, for the rows of a unit, wait in L1.
constexpr int64_t kResidualBandCells = 256;
// Outputs of a group: enough for full tiles on the narrowest planes.
constexpr int64_t kGroupOutputs = 1024;
// Fewer columns than this are decoded by the calling thread.
constexpr int64_t kSerialColumns = 8192;
constexpr int64_t kMaxOffset = int64_t(1) << 32;
constexpr int64_t kAlignment = 64;
// Tiles are at most this high (block_kernel.h).
constexpr int64_t kTileHeight = 7;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_up(int64_t a) { return ceil_div(a, kAlignment) * kAlignment; }

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
  axis.cells = needed;
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
  if (flat) {
    c.out_height = 1;
    c.out_width = s.height * s.width;
    c.y = make_axis(1, 0, 0, 1, 1, 1, 1, zeros);
    c.x = make_axis(c.out_width, 0, 0, 1, 1, 1, c.out_width, zeros);
  } else {
    c.out_height = s.out_height;
    c.out_width = s.out_width;
    c.y = make_axis(s.height, s.pad[0], s.pad[1], s.kernel[0], s.stride[0], s.dilation[0], s.out_height, zeros);
    c.x = make_axis(s.width, s.pad[2], s.pad[3], s.kernel[1], s.stride[1], s.dilation[1], s.out_width, zeros);
  }
  c.plane = c.y.cells * c.x.cells;
  // Planes of less than a vector are worth the copy, as it puts the planes of several images side by side.
  c.in_place = flat && storage_bytes(s.dtype) == accumulator_bytes(s.dtype) && c.plane >= kPanelLanes;
}

void plan_groups(const ConvShape &s, int64_t threads, Conv &c) {
  // Alone, a worker has no barriers and its images stay in its own cache.
  c.images_per_worker = threads == 1 || s.batch >= 2 * threads || (s.batch > 0 && s.batch % threads == 0);
  c.workers = c.images_per_worker ? std::max<int64_t>(1, std::min(threads, s.batch)) : threads;
  const int64_t image = s.channels * c.y.slots * c.x.slots * c.plane;
  const int64_t images = std::max<int64_t>(1, c.images_per_worker ? ceil_div(s.batch, c.workers) : s.batch);
  const int64_t fit = kGroupBytes / std::max<int64_t>(1, image * accumulator_bytes(s.dtype));
  const int64_t useful = ceil_div(kGroupOutputs, c.out_height * c.out_width);
  c.group_images = c.in_place ? 1 : std::clamp<int64_t>(std::min(fit, useful), 1, images);
  c.channel_stride = c.y.slots * c.x.slots * c.group_images * c.plane;
  const int64_t slack = c.y.spill * c.x.cells + c.x.spill + 2 * kPanelLanes;
  c.buffer_elements = c.in_place ? 0 : s.channels * c.channel_stride + slack;
}

int64_t group_tiles(const Conv &c, int64_t images) { return ceil_div(images * c.out_height, c.tile_height) * c.pieces; }

// Cells that a band spans, at most.
int64_t band_cells(const Conv &c, int64_t tiles) {
  const int64_t rows = c.pieces == 1 ? tiles * c.tile_height : (tiles + c.pieces - 2) / c.pieces + 1;
  const int64_t gaps = (rows + c.out_height - 2) / c.out_height;
  return tiles * c.tile_height * ceil_div(c.out_width, c.pieces) + (rows - 1) * (c.x.cells - c.out_width) +
         gaps * (c.plane - c.out_height * c.x.cells);
}

void plan_tiles(const ConvShape &s, Conv &c) {
  const int64_t positions = c.kernels->positions;
  c.tile_height = std::clamp<int64_t>(positions / c.out_width, 1, kTileHeight);
  c.pieces = ceil_div(c.out_width, positions);
  const int64_t tiles = group_tiles(c, c.group_images);
  const int64_t group_bytes = s.channels * c.channel_stride * accumulator_bytes(s.dtype);
  int64_t bands = ceil_div(group_bytes, kBandBytes);
  if (c.has_residual)
    bands = std::max(bands, ceil_div(c.group_images * c.plane, kResidualBandCells));
  if (!c.images_per_worker && tiles > 4)
    bands = ceil_div(std::max(bands, c.workers), c.workers) * c.workers;
  c.bands = std::clamp<int64_t>(bands, 1, tiles);
  const int64_t lanes = c.kernels->lanes;
  c.scratch_elements =
      kPanelLanes * c.kernels->unit_panels * (std::max(band_cells(c, ceil_div(tiles, c.bands)), lanes) + 2 * lanes);
}

int64_t plan_scratch(const ConvShape &s, const PackedWeight &w, Conv &c) {
  int64_t bytes = 0;
  const auto take = [&bytes](int64_t size) {
    const int64_t at = bytes;
    bytes += align_up(size);
    return at;
  };
  const int64_t accumulator = accumulator_bytes(s.dtype);
  c.at_offsets = take(w.num_columns * int64_t(sizeof(uint32_t)));
  c.at_taps = take(s.kernel[0] * s.kernel[1] * int64_t(sizeof(uint32_t)));
  c.at_rows = take(2 * c.group_images * c.out_height * int64_t(sizeof(int64_t)));
  c.at_units = take(w.num_panels * int64_t(sizeof(Unit)));
  c.at_costs = take((w.num_panels + 1) * int64_t(sizeof(int64_t)));
  c.at_values = take(c.kernels->widen ? w.num_values * accumulator : 0);
  c.worker_result_bytes = align_up(c.scratch_elements * accumulator);
  c.at_results = take(c.worker_result_bytes * c.workers);
  c.worker_buffer_bytes = align_up(c.buffer_elements * accumulator);
  c.at_buffers = take(c.worker_buffer_bytes * (c.images_per_worker ? c.workers : 1));
  return bytes + kAlignment;
}

// One run_conv call, shared by its workers.
struct Call {
  Conv &conv;
  const PackedWeight &weight;
  const ConvTensors &tensors;
  char *scratch;
  const int64_t *unit_middles; // cost of all units before, plus half of the unit's own
  int64_t cost;                // of all units
  int64_t first_image;         // of the group that the workers share

  const void *image(const void *tensor, int64_t channels, int64_t plane, int64_t n) const {
    return tensor ? static_cast<const char *>(tensor) + n * channels * plane * storage_bytes(conv.shape.dtype)
                  : nullptr;
  }
  const void *input(int64_t n) const {
    return image(tensors.input, conv.shape.channels, conv.shape.height * conv.shape.width, n);
  }
  void run(const Unit &unit, Band band, int64_t images, int64_t n, const void *cells, int64_t worker) const {
    const int64_t plane = conv.shape.out_height * conv.shape.out_width;
    conv.kernels->run(conv, unit, band, images, cells,
                      const_cast<void *>(image(tensors.output, conv.shape.out_channels, plane, n)),
                      image(tensors.add, conv.shape.out_channels, plane, n),
                      scratch + conv.at_results + worker * conv.worker_result_bytes);
  }
};

void fill_tables(Call &call) {
  Conv &c = call.conv;
  auto *taps = reinterpret_cast<uint32_t *>(call.scratch + c.at_taps);
  const int64_t slot = c.group_images * c.plane;
  for (int64_t r = 0; r < c.shape.kernel[0]; ++r)
    for (int64_t s = 0; s < c.shape.kernel[1]; ++s)
      *taps++ = uint32_t((r % c.y.period * c.x.slots + s % c.x.period) * slot +
                         r * c.y.dilation / c.y.stride * c.x.cells + s * c.x.dilation / c.x.stride);
  auto *cells = reinterpret_cast<int64_t *>(call.scratch + c.at_rows);
  int64_t *outputs = cells + c.group_images * c.out_height;
  c.row_cell = cells;
  c.row_output = outputs;
  for (int64_t image = 0; image < c.group_images; ++image)
    for (int64_t row = 0; row < c.out_height; ++row) {
      *cells++ = image * c.plane + row * c.x.cells;
      *outputs++ = (image * c.shape.out_channels * c.out_height + row) * c.out_width;
    }
}

// In sixteenths of a block column's time for one panel: measured, and only their ratios matter.
constexpr int64_t kColumnCost = 16, kStoreCost = 192, kResidualCost = 4;

void find_units(Call &call) {
  Conv &c = call.conv;
  auto *units = reinterpret_cast<Unit *>(call.scratch + c.at_units);
  auto *middles = reinterpret_cast<int64_t *>(call.scratch + c.at_costs);
  int64_t cost = 0;
  for (int64_t p = 0; p < call.weight.num_panels; ++c.num_units) {
    const int64_t *panel = c.panels + p * kPanelFields;
    int64_t panels = 1;
    while (panels < c.kernels->unit_panels && p + panels < call.weight.num_panels) {
      const int64_t *next = panel + panels * kPanelFields;
      if (next[kFirstColumn] != panel[kFirstColumn] || next[kColumnCount] != panel[kColumnCount] ||
          next[kFirstChannel] != panel[kFirstChannel])
        break;
      ++panels;
    }
    int64_t unit_cost = panels * (panel[kColumnCount] * kColumnCost + kStoreCost);
    if (c.has_residual)
      for (int64_t lane = p * kPanelLanes; lane < (p + panels) * kPanelLanes; ++lane)
        unit_cost += c.rows[lane * kRowFields + kResidualCount] * kResidualCost;
    units[c.num_units] = {p, panels};
    middles[c.num_units] = cost + unit_cost / 2;
    cost += unit_cost;
    p += panels;
  }
  c.units = units;
  call.unit_middles = middles;
  call.cost = cost;
}

// Share `worker` of the work that comes before the first group: column offsets, and weights in the accumulators' type.
void decode(Call &call, int64_t worker, int64_t workers) {
  Conv &c = call.conv;
  const auto *taps = reinterpret_cast<const uint32_t *>(call.scratch + c.at_taps);
  auto *offsets = reinterpret_cast<uint32_t *>(call.scratch + c.at_offsets);
  c.kernels->decode(c, call.weight.columns, taps, call.weight.num_columns * worker / workers,
                    call.weight.num_columns * (worker + 1) / workers, offsets);
  if (c.kernels->widen)
    c.kernels->widen(call.weight.values, call.weight.num_values * worker / workers,
                     call.weight.num_values * (worker + 1) / workers, call.scratch + c.at_values);
}

Band nth_band(const Conv &c, int64_t images, int64_t band) {
  const int64_t tiles = group_tiles(c, images);
  return {tiles * band / c.bands, tiles * (band + 1) / c.bands};
}

// A worker's whole images, group by group.
void run_images(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t last = c.shape.batch * (worker + 1) / c.workers;
  void *buffer = call.scratch + c.at_buffers + worker * c.worker_buffer_bytes;
  for (int64_t n = c.shape.batch * worker / c.workers; n < last; n += c.group_images) {
    const int64_t images = std::min(c.group_images, last - n);
    const void *cells = call.input(n);
    if (!c.in_place) {
      c.kernels->gather(c, cells, images, 0, c.shape.channels, buffer);
      cells = buffer;
    }
    for (int64_t b = 0; b < c.bands; ++b) {
      const Band band = nth_band(c, images, b);
      if (band.first < band.last)
        for (int64_t u = 0; u < c.num_units; ++u)
          call.run(c.units[u], band, images, n, cells, worker);
    }
  }
}

// A worker's share of one group: consecutive (band, unit) pairs of about equal cost.
void run_share(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t images = std::min(c.group_images, c.shape.batch - call.first_image);
  const void *cells = c.in_place ? call.input(call.first_image) : call.scratch + c.at_buffers;
  const int64_t total = c.bands * call.cost;
  const int64_t first = total * worker / c.workers, last = total * (worker + 1) / c.workers;
  for (int64_t b = first / call.cost; b < c.bands && b * call.cost < last; ++b) {
    const Band band = nth_band(c, images, b);
    if (band.first == band.last)
      continue;
    const int64_t *end = call.unit_middles + c.num_units;
    const int64_t *middle = std::lower_bound(call.unit_middles, end, first - b * call.cost);
    for (; middle < end && *middle + b * call.cost < last; ++middle)
      call.run(c.units[middle - call.unit_middles], band, images, call.first_image, cells, worker);
  }
}

template <class Body> void for_each_worker(ParallelFor parallel, int64_t workers, Body body) {
  if (workers == 1)
    return body(0);
  parallel(workers, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); }, &body);
}

} // namespace

int64_t plan_conv(const ConvShape &shape, const PackedWeight &weight, int64_t threads, Conv &plan) {
  plan = {};
  plan.shape = shape;
  plan.kernels = &kernels_for(shape.dtype);
  int64_t block_values = 0;
  for (int64_t p = 0; p < weight.num_panels; ++p)
    block_values += weight.panels[p * kPanelFields + kColumnCount] * kPanelLanes;
  plan.has_residual = weight.num_values > block_values;
  plan_layout(shape, plan);
  plan_groups(shape, threads, plan);
  plan_tiles(shape, plan);
  if (shape.channels * plan.channel_stride >= kMaxOffset)
    return -1;
  return plan_scratch(shape, weight, plan);
}

void run_conv(Conv &plan, const PackedWeight &weight, const ConvTensors &tensors, void *scratch, ParallelFor parallel) {
  plan.panels = weight.panels;
  plan.rows = weight.rows;
  plan.bias = tensors.bias;
  Call call = {plan, weight, tensors, static_cast<char *>(scratch), nullptr, 0, 0};
  plan.offsets = reinterpret_cast<const uint32_t *>(call.scratch + plan.at_offsets);
  plan.values = plan.kernels->widen ? call.scratch + plan.at_values : weight.values;
  fill_tables(call);
  find_units(call);
  const int64_t columns = std::max(weight.num_columns, plan.kernels->widen ? weight.num_values : 0);
  const bool shares_gather = !plan.images_per_worker && !plan.in_place;
  if (columns <= kSerialColumns)
    decode(call, 0, 1);
  else if (!shares_gather)
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { decode(call, worker, plan.workers); });
  if (plan.images_per_worker) {
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { run_images(call, worker); });
    return;
  }
  const int64_t channels = plan.shape.channels;
  for (; call.first_image < plan.shape.batch; call.first_image += plan.group_images) {
    if (shares_gather)
      for_each_worker(parallel, plan.workers, [&](int64_t worker) {
        if (call.first_image == 0 && columns > kSerialColumns)
          decode(call, worker, plan.workers);
        const int64_t images = std::min(plan.group_images, plan.shape.batch - call.first_image);
        plan.kernels->gather(plan, call.input(call.first_image), images, channels * worker / plan.workers,
                             channels * (worker + 1) / plan.workers, call.scratch + plan.at_buffers);
      });
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { run_share(call, worker); });
  }
}

} // namespace fxsparse
