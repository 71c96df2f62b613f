// Drives the kernels of a planned convolution over threads.
#include "cpu/conv.h"

#include <algorithm>

#include "cpu/plan.h"

namespace fxsparse {
namespace {

// Fewer columns than this are decoded by the calling thread.
constexpr int64_t kSerialColumns = 8192;

// Of a group that all workers share.
constexpr int64_t kSharesEach = 4;
constexpr int64_t kPlanesAtOnce = 32, kCacheLine = 64;

struct RowRange {
  int64_t first, last;
};

// One phase of a run.
struct Call {
  const Conv &conv;
  const ConvTensors &tensors;
  char *working;

  const char *image(const void *tensor, int64_t channels, int64_t plane, int64_t n) const {
    return tensor ? static_cast<const char *>(tensor) + n * channels * plane * conv.element_bytes : nullptr;
  }
  // Where an input is read as it lies: its rows are in one piece then.
  const void *input(int64_t n) const {
    const int64_t skipped = tensors.first_row * conv.shape.width * conv.element_bytes;
    return image(tensors.inputs[0].at, conv.shape.channels, conv.shape.input_plane, n) + skipped;
  }
  void gather(int64_t n, int64_t images, int64_t first, int64_t last, int64_t row, void *buffer) const {
    conv.kernels->gather(conv, {tensors.inputs, tensors.num_inputs, n, images, first, last, tensors.first_row + row},
                         buffer);
  }
  char *buffer(int64_t worker) const { return working + conv.at_buffers + worker * conv.worker_buffer_bytes; }
  void run(const Unit &unit, Band band, int64_t images, int64_t n, const void *cells, int64_t worker) const {
    conv.kernels->run(conv, unit, band, images, cells, output(n), add(n),
                      working + conv.at_results + worker * conv.worker_result_bytes);
  }
  // Output channels [first, last) of an image.
  void run_depthwise(int64_t n, int64_t first, int64_t last, int64_t worker) const {
    auto **rows = reinterpret_cast<const void **>(buffer(worker));
    find_rows(n, rows);
    for (int64_t channel = first; channel < last; channel += kPlanesAtOnce) {
      const int64_t end = std::min(channel + kPlanesAtOnce, last);
      fetch_far_rows(n, channel, end);
      conv.kernels->depthwise(conv, {channel, end, rows, output(n), add(n)});
    }
  }

private:
  int64_t row_bytes() const { return conv.shape.width * conv.element_bytes; }
  // The rows of the input that the depthwise kernel reads, padding among them; and those of them that are in `in`.
  RowRange rows_read() const {
    const int64_t first = tensors.first_row * conv.shape.stride[0] - conv.shape.pad[0];
    return {first, first + (conv.out_height - 1) * conv.shape.stride[0] + conv.shape.kernel[0]};
  }
  RowRange rows_read(const InputRows &in) const {
    return {std::max(in.first, rows_read().first), std::min(in.last, rows_read().last)};
  }
  // Where they lie in the first plane.
  void find_rows(int64_t n, const void **rows) const {
    const RowRange all = rows_read();
    std::fill_n(rows, all.last - all.first, nullptr);
    for (const InputRows *in = tensors.inputs; in < tensors.inputs + tensors.num_inputs; ++in)
      for (int64_t y = rows_read(*in).first; y < rows_read(*in).last; ++y)
        rows[y - all.first] = image(in->at, conv.shape.channels, conv.shape.input_plane, n) + y * row_bytes();
  }
  // Reads what the neighbours of a stripe have made for some planes. A line takes over 100 ns from another core's
  // cache, many at once hardly longer; one by one, between planes, they would double the time of small planes.
  void fetch_far_rows(int64_t n, int64_t first_plane, int64_t last_plane) const {
    const ConvShape &s = conv.shape;
    if (tensors.num_inputs == 1)
      return;
    const auto count = [this](const InputRows &in) { return rows_read(in).last - rows_read(in).first; };
    const auto fewer = [&](const InputRows &a, const InputRows &b) { return count(a) < count(b); };
    const InputRows *own = std::max_element(tensors.inputs, tensors.inputs + tensors.num_inputs, fewer);
    for (const InputRows *in = tensors.inputs; in < tensors.inputs + tensors.num_inputs; ++in)
      for (int64_t plane = first_plane; in != own && plane < last_plane; ++plane) {
        const char *at = image(in->at, s.channels, s.input_plane, n) +
                         plane * s.channels / s.out_channels * s.input_plane * conv.element_bytes;
        const char *begin = at + rows_read(*in).first * row_bytes(), *last = at + rows_read(*in).last * row_bytes();
        for (const char *line = begin; line < last; line += kCacheLine)
          touch(line);
        touch(last - 1);
      }
  }
  static void touch(const char *line) { static_cast<void>(*static_cast<const volatile char *>(line)); }
  void *output(int64_t n) const {
    return const_cast<char *>(image(tensors.output, conv.shape.out_channels, conv.shape.output_plane, n));
  }
  const void *add(int64_t n) const { return image(tensors.add, conv.shape.out_channels, conv.shape.add_plane, n); }
};

void fill_tables(Conv &c, char *memory) {
  auto *taps = reinterpret_cast<uint32_t *>(memory + c.at_taps);
  const int64_t slot = c.group_images * c.plane;
  for (int64_t r = 0; r < c.shape.kernel[0]; ++r)
    for (int64_t s = 0; s < c.shape.kernel[1]; ++s)
      *taps++ = uint32_t((r % c.y.period * c.x.slots + s % c.x.period) * slot +
                         r * c.y.dilation / c.y.stride * c.x.cells + s * c.x.dilation / c.x.stride);
  auto *cells = reinterpret_cast<int64_t *>(memory + c.at_rows);
  int64_t *outputs = cells + c.group_images * c.out_height;
  c.row_cell = cells;
  c.row_output = outputs;
  for (int64_t image = 0; image < c.group_images; ++image)
    for (int64_t row = 0; row < c.out_height; ++row) {
      *cells++ = image * c.plane + row * c.x.cells;
      *outputs++ = image * c.shape.out_channels * c.shape.output_plane + row * c.out_width;
    }
}

// In sixteenths of a block column's time for one panel: measured, and only their ratios matter.
constexpr int64_t kColumnCost = 16, kStoreCost = 192, kResidualCost = 4;

void find_units(Conv &c, int64_t num_panels, char *memory) {
  auto *units = reinterpret_cast<Unit *>(memory + c.at_units);
  auto *middles = reinterpret_cast<int64_t *>(memory + c.at_costs);
  int64_t cost = 0;
  for (int64_t p = 0; p < num_panels; ++c.num_units) {
    const int64_t *panel = c.panels + p * kPanelFields;
    int64_t panels = 1;
    while (panels < c.kernels->unit_panels && p + panels < num_panels) {
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
  c.unit_middles = middles;
  c.cost = cost;
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
  void *buffer = call.buffer(worker);
  for (int64_t n = c.shape.batch * worker / c.workers; n < last; n += c.group_images) {
    const int64_t images = std::min(c.group_images, last - n);
    if (!c.in_place)
      call.gather(n, images, 0, c.shape.channels, 0, buffer);
    run_bands(call, {0, group_tiles(c, images)}, images, n, c.in_place ? call.input(n) : buffer, worker);
  }
}

// A worker's windows of rows.
void run_windows(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t total = c.shape.batch * c.windows;
  char *buffer = call.buffer(worker);
  const int64_t cell_bytes = c.shape.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float);
  for (int64_t i = total * worker / c.workers; i < total * (worker + 1) / c.workers; ++i) {
    const int64_t n = i / c.windows, window = i % c.windows;
    const Band rows = nth_band({0, c.out_height}, window, c.windows);
    call.gather(n, 1, 0, c.shape.channels, rows.first, buffer);
    // The kernels count the cells of the whole image.
    const char *cells = buffer - c.row_cell[rows.first] * cell_bytes;
    run_bands(call, {rows.first * c.pieces, rows.last * c.pieces}, 1, n, cells, worker);
  }
}

// A worker's units of all images, of about equal cost; their channels are gathered some groups at a time.
void run_by_group(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t total = c.shape.batch * c.cost, cell_bytes = c.shape.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t first = total * worker / c.workers, last = total * (worker + 1) / c.workers;
  const int64_t *end = c.unit_middles + c.num_units;
  for (int64_t n = first / c.cost; n < c.shape.batch && n * c.cost < last; ++n) {
    int64_t gathered = 0, end_gathered = 0;
    char *cells = nullptr;
    const int64_t *middle = std::lower_bound(c.unit_middles, end, first - n * c.cost);
    for (; middle < end && *middle + n * c.cost < last; ++middle) {
      const Unit &unit = c.units[middle - c.unit_middles];
      const int64_t channel = c.panels[unit.first_panel * kPanelFields + kFirstChannel];
      if (channel < gathered || channel >= end_gathered) {
        gathered = channel;
        end_gathered = std::min(channel + c.gathered_channels, c.shape.channels);
        // The kernels count the channels of the whole image.
        cells = call.buffer(worker) - channel * c.channel_stride * cell_bytes;
        call.gather(n, 1, gathered, end_gathered, 0, cells);
      }
      for (int64_t b = 0; b < c.bands; ++b) {
        const Band band = nth_band({0, group_tiles(c, 1)}, b, c.bands);
        if (band.first < band.last)
          call.run(unit, band, 1, n, cells, worker);
      }
    }
  }
}

// A worker's planes of all images.
void run_depthwise(const Call &call, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t channels = c.shape.out_channels, total = c.shape.batch * channels;
  const int64_t first = total * worker / c.workers, last = total * (worker + 1) / c.workers;
  for (int64_t n = first / channels; n * channels < last; ++n)
    call.run_depthwise(n, std::max<int64_t>(first - n * channels, 0), std::min(last - n * channels, channels), worker);
}

// The taps of some panels' rows, zeros among them.
template <class A>
void spread_taps(const PackedWeight &w, int64_t taps, int64_t first_panel, int64_t last_panel, A *spread) {
  const auto *values = static_cast<const A *>(w.values);
  for (int64_t p = first_panel; p < last_panel; ++p)
    for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
      const int64_t *panel = w.panels + p * kPanelFields, *row = w.rows + (p * kPanelLanes + lane) * kRowFields;
      if (row[kOutChannel] < 0)
        continue;
      A *to = spread + row[kOutChannel] * taps;
      std::fill_n(to, taps, A(0));
      for (int64_t k = 0; k < panel[kColumnCount]; ++k)
        to[w.columns[panel[kFirstColumn] + k]] = values[panel[kFirstValue] + k * kPanelLanes + lane];
      for (int64_t k = 0; k < row[kResidualCount]; ++k)
        to[w.columns[row[kFirstResidual] + k]] = values[row[kFirstResidualValue] + k];
    }
}

// The group of images that all workers share.
struct Group {
  int64_t first, images;
};

Group nth_group(const Conv &c, int64_t group) {
  const int64_t first = group * c.group_images;
  return {first, std::min(c.group_images, c.shape.batch - first)};
}

bool shares_gather(const Conv &c) { return c.schedule == Schedule::kShared && !c.in_place; }

// A worker's share of the channels of a group.
void gather_share(const Call &call, Group group, int64_t worker) {
  const Conv &c = call.conv;
  const int64_t channels = c.shape.channels;
  call.gather(group.first, group.images, channels * worker / c.workers, channels * (worker + 1) / c.workers, 0,
              call.buffer(0));
}

// A share of a group: consecutive (band, unit) pairs of about equal cost.
void run_share(const Call &call, Group group, int64_t share, int64_t shares, int64_t worker) {
  const Conv &c = call.conv;
  const void *cells = c.in_place ? call.input(group.first) : call.buffer(0);
  const int64_t total = c.bands * c.cost;
  const int64_t first = total * share / shares, last = total * (share + 1) / shares;
  for (int64_t b = first / c.cost; b < c.bands && b * c.cost < last; ++b) {
    const Band band = nth_band({0, group_tiles(c, group.images)}, b, c.bands);
    if (band.first == band.last)
      continue;
    const int64_t *end = c.unit_middles + c.num_units;
    const int64_t *middle = std::lower_bound(c.unit_middles, end, first - b * c.cost);
    for (; middle < end && *middle + b * c.cost < last; ++middle)
      call.run(c.units[middle - c.unit_middles], band, group.images, group.first, cells, worker);
  }
}

template <class Body> void for_each_worker(ParallelFor parallel, int64_t workers, Body body) {
  if (workers == 1)
    return body(0);
  parallel(workers, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); }, &body);
}

} // namespace

void prepare_conv(Conv &plan, const PackedWeight &weight, const void *bias, void *memory) {
  auto *at = static_cast<char *>(memory);
  plan.panels = weight.panels;
  plan.rows = weight.rows;
  plan.bias = bias;
  if (plan.schedule == Schedule::kDepthwise) {
    plan.values = at + plan.at_values;
    return;
  }
  plan.offsets = reinterpret_cast<const uint32_t *>(at + plan.at_offsets);
  plan.values = plan.kernels->widen ? at + plan.at_values : weight.values;
  fill_tables(plan, at);
  find_units(plan, weight.num_panels, at);
  auto *offsets = reinterpret_cast<uint32_t *>(at + plan.at_offsets);
  std::fill_n(offsets + weight.num_columns, kColumnsAhead, 0);
}

void decode_conv(const Conv &plan, const PackedWeight &weight, void *memory, int64_t worker, int64_t workers) {
  auto *at = static_cast<char *>(memory);
  if (plan.schedule == Schedule::kDepthwise) {
    const int64_t first = weight.num_panels * worker / workers, last = weight.num_panels * (worker + 1) / workers;
    if (plan.shape.dtype == Dtype::kFloat64)
      spread_taps(weight, plan.shape.weight_columns, first, last, reinterpret_cast<double *>(at + plan.at_values));
    else
      spread_taps(weight, plan.shape.weight_columns, first, last, reinterpret_cast<float *>(at + plan.at_values));
    return;
  }
  const auto *taps = reinterpret_cast<const uint32_t *>(at + plan.at_taps);
  plan.kernels->decode(plan, weight.columns, taps, weight.num_columns * worker / workers,
                       weight.num_columns * (worker + 1) / workers, reinterpret_cast<uint32_t *>(at + plan.at_offsets));
  if (plan.kernels->widen)
    plan.kernels->widen(weight.values, weight.num_values * worker / workers, weight.num_values * (worker + 1) / workers,
                        at + plan.at_values);
}

int64_t conv_phases(const Conv &plan) {
  if (plan.schedule != Schedule::kShared)
    return 1;
  const int64_t groups = (plan.shape.batch + plan.group_images - 1) / plan.group_images;
  return groups * (shares_gather(plan) ? 2 : 1);
}

int64_t conv_shares(const Conv &plan, int64_t phase) {
  const bool gathers = shares_gather(plan) && phase % 2 == 0;
  return plan.workers * (plan.schedule == Schedule::kShared && plan.workers > 1 && !gathers ? kSharesEach : 1);
}

void run_conv_phase(const Conv &plan, const ConvTensors &tensors, void *working, int64_t phase, int64_t share,
                    int64_t shares, int64_t worker) {
  const Call call = {plan, tensors, static_cast<char *>(working)};
  if (plan.schedule == Schedule::kImages)
    run_images(call, share);
  else if (plan.schedule == Schedule::kWindows)
    run_windows(call, share);
  else if (plan.schedule == Schedule::kByGroup)
    run_by_group(call, share);
  else if (plan.schedule == Schedule::kDepthwise)
    run_depthwise(call, share);
  else if (!shares_gather(plan))
    run_share(call, nth_group(plan, phase), share, shares, worker);
  else if (phase % 2 == 0)
    gather_share(call, nth_group(plan, phase / 2), share);
  else
    run_share(call, nth_group(plan, phase / 2), share, shares, worker);
}

void run_conv(Conv &plan, const PackedWeight &weight, const ConvTensors &tensors, void *memory, ParallelFor parallel) {
  prepare_conv(plan, weight, tensors.bias, memory);
  const int64_t entries = std::max(weight.num_columns, plan.kernels->widen ? weight.num_values : 0);
  const int64_t decoders = entries <= kSerialColumns ? 1 : plan.workers;
  for_each_worker(parallel, decoders, [&](int64_t w) { decode_conv(plan, weight, memory, w, decoders); });
  void *working = static_cast<char *>(memory) + plan.prepared_bytes;
  for (int64_t phase = 0; phase < conv_phases(plan); ++phase)
    for_each_worker(parallel, plan.workers,
                    [&](int64_t w) { run_conv_phase(plan, tensors, working, phase, w, plan.workers, w); });
}

} // namespace fxsparse
