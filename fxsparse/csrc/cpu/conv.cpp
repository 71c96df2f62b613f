// Drives the kernels of a planned convolution over threads.
#include "cpu/conv.h"

#include <algorithm>

#include "cpu/plan.h"

namespace fxsparse {
namespace {

// Fewer columns than this are decoded by the calling thread.
constexpr int64_t kSerialColumns = 8192;

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
    return tensor ? static_cast<const char *>(tensor) + n * channels * plane * conv.element_bytes : nullptr;
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

Band nth_band(Band tiles, int64_t band, int64_t bands) {
  const int64_t count = tiles.last - tiles.first;
  return {tiles.first + count * band / bands, tiles.first + count * (band + 1) / bands};
}

void run_bands(const Call &call, Band tiles, int64_t images, int64_t n, const void *cells, int64_t worker) {
  const Conv &c = call.conv;
  for (int64_t b = 0; b < c.bands; ++b) {
    const Band band = nth_band(tiles, b, c.bands);
    if (band.first < band.last)
      for (int64_t u = 0; u < c.num_units; ++u)
        call.run(c.units[u], band, images, n, cells, worker);
  }
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
      c.kernels->gather(c, cells, images, 0, c.shape.channels, 0, buffer);
      cells = buffer;
    }
    run_bands(call, {0, group_tiles(c, images)}, images, n, cells, worker);
  }
}

// A worker's windows of rows.
void run_windows(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t total = c.shape.batch * c.windows;
  char *buffer = call.scratch + c.at_buffers + worker * c.worker_buffer_bytes;
  const int64_t cell_bytes = c.shape.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  for (int64_t i = total * worker / c.workers; i < total * (worker + 1) / c.workers; ++i) {
    const int64_t n = i / c.windows, window = i % c.windows;
    const Band rows = nth_band({0, c.out_height}, window, c.windows);
    c.kernels->gather(c, call.input(n), 1, 0, c.shape.channels, rows.first, buffer);
    // The kernels count the cells of the whole image.
    const char *cells = buffer - c.row_cell[rows.first] * cell_bytes;
    run_bands(call, {rows.first * c.pieces, rows.last * c.pieces}, 1, n, cells, worker);
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
    const Band band = nth_band({0, group_tiles(c, images)}, b, c.bands);
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
  const bool shares_gather = plan.schedule == Schedule::kShared && !plan.in_place;
  if (columns <= kSerialColumns)
    decode(call, 0, 1);
  else if (!shares_gather)
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { decode(call, worker, plan.workers); });
  if (plan.schedule != Schedule::kShared) {
    const auto run = plan.schedule == Schedule::kImages ? run_images : run_windows;
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { run(call, worker); });
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
                             channels * (worker + 1) / plan.workers, 0, call.scratch + plan.at_buffers);
      });
    for_each_worker(parallel, plan.workers, [&](int64_t worker) { run_share(call, worker); });
  }
}

} // namespace fxsparse
