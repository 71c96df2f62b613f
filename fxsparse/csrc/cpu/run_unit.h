// One unit of rows on one band of tiles: block part, residual part, output.
#pragma once

#include "cpu/plan.h"
#include "cpu/residual_kernel.h"
#include "cpu/store_tile.h"
#include "cpu/wide_kernel.h"

namespace fxsparse::FXSPARSE_ISA {

constexpr int kMaxUnitLanes = kMaxVectors * int(kPanelLanes);

// A unit's columns and the places of its rows.
template <class T, class A> struct UnitRows {
  const A *cells;
  const uint32_t *offsets;
  int64_t columns, lanes;
  const int64_t *table; // rows of the packed form
  bool has_residual;
  const A *weights[kMaxVectors];
  T *outputs[kMaxUnitLanes];
  const T *adds[kMaxUnitLanes];
  alignas(kVectorBytes) A bias[kMaxUnitLanes];
};

template <class T, class A>
inline void find_rows(const Conv &conv, const Unit &unit, const A *cells, T *output, const T *add,
                      UnitRows<T, A> &rows) {
  const int64_t *panel = conv.panels + unit.first_panel * kPanelFields;
  rows.cells = cells + panel[kFirstChannel] * conv.channel_stride;
  rows.offsets = conv.offsets + panel[kFirstColumn];
  rows.columns = panel[kColumnCount];
  rows.lanes = unit.panels * kPanelLanes;
  rows.table = conv.rows + unit.first_panel * kPanelLanes * kRowFields;
  rows.has_residual = false;
  for (int64_t p = 0; p < unit.panels; ++p)
    rows.weights[p] = (const A *)conv.values + panel[p * kPanelFields + kFirstValue];
  for (int64_t lane = 0; lane < rows.lanes; ++lane) {
    const int64_t *row = rows.table + lane * kRowFields, channel = row[kOutChannel];
    const bool used = channel >= 0;
    rows.outputs[lane] = used ? output + channel * conv.shape.output_plane : nullptr;
    rows.adds[lane] = used && add != nullptr ? add + channel * conv.shape.add_plane : nullptr;
    rows.bias[lane] = used && conv.bias != nullptr ? A(to_accumulator(((const T *)conv.bias)[channel])) : A(0);
    rows.has_residual |= row[kResidualCount] > 0;
  }
}

// Tile number `tile`: rows [first_row, last_row) of the group's valid rows, positions [first_x, last_x) of each.
struct Tile {
  int64_t first_row, last_row, first_x, last_x;
};

inline Tile find_tile(const Conv &conv, int64_t rows, int64_t tile) {
  const int64_t blocks = (rows + conv.tile_height - 1) / conv.tile_height;
  const int64_t block = tile / conv.pieces, piece = tile % conv.pieces;
  return {rows * block / blocks, rows * (block + 1) / blocks, conv.out_width * piece / conv.pieces,
          conv.out_width * (piece + 1) / conv.pieces};
}

// Where `run_block` and `run_wide` put what they compute: row r begins at outputs[lane] + row_output[r] - origin.
template <class D> struct Destination {
  D *const *outputs;
  const D *const *adds; // null, or what is added; a lane's is null where its output is
  const int64_t *row_output;
  int64_t origin;
  Activation activation;
};

// The block kernel on tiles [band.first, band.last). A tile's inputs serve all rows of the unit while they lie in L1.
template <class D, class T, class A>
void run_block(const Conv &conv, const UnitRows<T, A> &unit, Band band, int64_t rows, const Destination<D> &to) {
  constexpr int lanes = kLanes<A>;
  alignas(kVectorBytes) A tile[kTileElements<A>];
  for (int64_t t = band.first; t < band.last; ++t) {
    const Tile at = find_tile(conv, rows, t);
    const int64_t width = at.last_x - at.first_x, valid = at.last_row - at.first_row;
    const int height = kernel_height<A>(width, valid);
    const A *x[kMaxTileHeight];
    TileOutput shape;
    shape.positions = int(width) * height;
    shape.num_segments = 0;
    for (int h = 0; h < height; ++h) {
      const int64_t row = minimum(at.first_row + h, at.last_row - 1);
      x[h] = unit.cells + conv.row_cell[row] + at.first_x;
      if (h >= valid)
        continue;
      const int begin = h * int(width), end = begin + int(width);
      const int64_t output = to.row_output[row] - to.origin + at.first_x - begin;
      Segment *previous = shape.segments + shape.num_segments - 1;
      if (h > 0 && previous->output == output)
        previous->end = end;
      else
        shape.segments[shape.num_segments++] = {begin, end, output};
    }
    for (int64_t first_lane = 0; first_lane < unit.lanes; first_lane += kMaxVectors * lanes) {
      const int vectors = int(minimum(kMaxVectors, (unit.lanes - first_lane) / lanes));
      const A *weights[kMaxVectors];
      for (int v = 0; v < vectors; ++v) {
        const int64_t lane = first_lane + v * lanes;
        weights[v] = unit.weights[lane / kPanelLanes] + lane % kPanelLanes;
      }
      kBlockKernels<A>.table[vectors - 1][width][height](x, unit.offsets, weights, unit.columns, unit.bias + first_lane,
                                                         tile);
      store_tile<D, A>(tile, vectors * lanes, shape, to.outputs + first_lane, to.adds ? to.adds + first_lane : nullptr,
                       to.activation);
    }
  }
}

// Rows of a wide tile to the output, one vector at a time. Whole: all lanes are outputs.
template <bool Whole, class D, class A>
inline void store_wide_row(const A *results, int count, const Stretch *stretches, D *output, const D *add,
                           Activation activation) {
  constexpr int N = kLanes<A>;
  for (int v = 0; v < count; ++v) {
    const Stretch &at = stretches[v];
    const int begin = Whole ? 0 : at.begin, end = Whole ? N : at.end;
    Vec<A> sum = load(results + v * N);
    // For the next tile, too: so many rows at once are more streams than prefetchers of the hardware follow.
    if (kPrefetchesOutputs)
      __builtin_prefetch(output + at.output + kWideVectors * N, 1);
    if (add != nullptr) {
      sum += Whole ? load(add + at.output) : load_lanes(add + at.output, begin, end);
      if (kPrefetchesOutputs)
        __builtin_prefetch(add + at.output + kWideVectors * N);
    }
    sum = activate<A>(sum, activation);
    if constexpr (Whole)
      store(output + at.output, sum);
    else
      store_lanes(output + at.output, sum, begin, end);
  }
}

// So many stretches, in tiles of the wide kernel, for all rows of the unit.
template <class D, class T, class A>
void run_stretches(const UnitRows<T, A> &unit, int count, const A *const *positions, const Stretch *stretches,
                   const Destination<D> &to) {
  constexpr int N = kLanes<A>;
  alignas(kVectorBytes) A tile[kWideRows * kWideVectors * N];
  for (int64_t lane = 0; lane < unit.lanes; lane += kWideRows) {
    const A *weights = unit.weights[lane / kPanelLanes] + lane % kPanelLanes;
    for (int first = 0; first < count; first += kWideVectors) {
      const int vectors = int(minimum(kWideVectors, count - first));
      kWideKernels<A>[vectors](positions + first, unit.offsets, weights, unit.columns, unit.bias + lane, tile);
      bool whole = true;
      for (int v = first; v < first + vectors; ++v)
        whole = whole && stretches[v].end - stretches[v].begin == N;
      for (int r = 0; r < kWideRows; ++r) {
        D *output = to.outputs[lane + r];
        if (output == nullptr)
          continue;
        const A *results = tile + r * vectors * N;
        const D *add = to.adds ? to.adds[lane + r] : nullptr;
        if (whole)
          store_wide_row<true, D, A>(results, vectors, stretches + first, output, add, to.activation);
        else
          store_wide_row<false, D, A>(results, vectors, stretches + first, output, add, to.activation);
      }
    }
  }
}

// The wide kernel on the positions from `begin` to `end`, as `run_block` does it.
template <class D, class T, class A>
void run_wide(const Conv &conv, const UnitRows<T, A> &unit, const Tile &begin, const Tile &end,
              const Destination<D> &to) {
  constexpr int N = kLanes<A>;
  const int64_t tile_bytes = unit.columns * kWideVectors * kVectorBytes;
  const int most = int(minimum(kWideTiles, maximum(1, kWideInputBytes / tile_bytes))) * kWideVectors;
  const A *positions[kWideTiles * kWideVectors];
  Stretch stretches[kWideTiles * kWideVectors];
  int count = 0;
  for (int64_t row = begin.first_row; row < end.last_row; ++row) {
    const int64_t last_x = row == end.last_row - 1 ? end.last_x : conv.out_width;
    for (int64_t x = row == begin.first_row ? begin.first_x : 0; x < last_x; x += N) {
      // In place, nothing past the input may be read: its last vector begins earlier.
      const int64_t first = conv.in_place ? minimum(x, conv.out_width - N) : x;
      positions[count] = unit.cells + conv.row_cell[row] + first;
      stretches[count++] = {int(x - first), int(minimum(last_x - first, N)), to.row_output[row] - to.origin + first};
      if (count == most) {
        run_stretches(unit, count, positions, stretches, to);
        count = 0;
      }
    }
  }
  if (count > 0)
    run_stretches(unit, count, positions, stretches, to);
}

// The results of one band: cells [first, first + count) of the canonical input, of which [begin, end) are outputs. Each
// lane's are `stride` apart.
template <class A> struct BandResults {
  A *results;
  int64_t first, count, begin, end, stride;
};

// Adds the residual weights to the results of every row. In place, where cells are outputs, it also stores them.
template <class T, class A>
void run_residual(const Conv &conv, const UnitRows<T, A> &unit, const BandResults<A> &band) {
  constexpr int lanes = kLanes<A>;
  const int64_t vectors = (band.count + lanes - 1) / lanes;
  const int64_t tiles = (vectors + kMaxResidualVectors - 1) / kMaxResidualVectors;
  const bool starts = unit.columns == 0, stores = conv.in_place;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = vectors * t / tiles * lanes, end = vectors * (t + 1) / tiles * lanes;
    // The last vector of all ends where the band ends, so that nothing past the input is read in place.
    const int64_t last = (end > band.count && band.count >= lanes ? band.count - lanes : end - lanes) - first;
    const int64_t cell = band.first + first;
    const int64_t stored_begin = maximum(cell, band.begin), stored_end = minimum(band.first + end, band.end);
    for (int64_t lane = 0; lane < unit.lanes; ++lane) {
      const int64_t *row = unit.table + lane * kRowFields, weights = row[kResidualCount];
      if (unit.outputs[lane] == nullptr)
        continue;
      // Results that nothing is added to later share one place, which stays in L1.
      A *results = starts && stores ? band.results : band.results + lane * band.stride + first;
      if (weights > 0 || starts)
        kResidualKernels<A>[(end - first) / lanes](unit.cells + cell, conv.offsets + row[kFirstResidual],
                                                   (const A *)conv.values + row[kFirstResidualValue], weights, last,
                                                   starts ? unit.bias + lane : nullptr, results);
      if (stores)
        store_row<T, A>(results + (stored_begin - cell), stored_end - stored_begin, unit.outputs[lane] + stored_begin,
                        unit.adds[lane] ? unit.adds[lane] + stored_begin : nullptr, conv.shape.activation);
    }
  }
}

// Stores the rows [begin.first_row, end.last_row) of a band from its results.
template <class T, class A>
void store_band(const Conv &conv, const UnitRows<T, A> &unit, const BandResults<A> &band, const Tile &begin,
                const Tile &end) {
  for (int64_t lane = 0; lane < unit.lanes; ++lane) {
    if (unit.outputs[lane] == nullptr)
      continue;
    for (int64_t row = begin.first_row; row < end.last_row; ++row) {
      const int64_t first_x = row == begin.first_row ? begin.first_x : 0;
      const int64_t last_x = row == end.last_row - 1 ? end.last_x : conv.out_width;
      const int64_t at = conv.row_output[row] + first_x;
      store_row<T, A>(band.results + lane * band.stride + conv.row_cell[row] + first_x - band.first, last_x - first_x,
                      unit.outputs[lane] + at, unit.adds[lane] ? unit.adds[lane] + at : nullptr, conv.shape.activation);
    }
  }
}

template <class T, class A>
void run_unit(const Conv &conv, const Unit &unit_panels, Band band, int64_t images, const void *cells, void *output,
              const void *add, void *results) {
  UnitRows<T, A> unit;
  find_rows(conv, unit_panels, (const A *)cells, (T *)output, (const T *)add, unit);
  const int64_t rows = images * conv.out_height;
  const Tile begin = find_tile(conv, rows, band.first), end = find_tile(conv, rows, band.last - 1);
  const bool wide = wide_is_faster<A>(conv.out_width, unit.columns);
  if (!unit.has_residual && unit.columns > 0) {
    const Destination<T> to = {unit.outputs, add ? unit.adds : nullptr, conv.row_output, 0, conv.shape.activation};
    return wide ? run_wide(conv, unit, begin, end, to) : run_block(conv, unit, band, rows, to);
  }
  // The block part of the band waits here, as rows of cells, for the residual part.
  BandResults<A> waiting = {};
  waiting.results = (A *)results;
  waiting.begin = conv.row_cell[begin.first_row] + begin.first_x;
  waiting.end = conv.row_cell[end.last_row - 1] + end.last_x;
  waiting.first = conv.in_place ? minimum(waiting.begin, conv.out_width - kLanes<A>) : waiting.begin;
  waiting.count = conv.in_place ? maximum(waiting.end - waiting.first, kLanes<A>) : waiting.end - waiting.first;
  waiting.stride = (waiting.count + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  if (unit.columns > 0) {
    A *outputs[kMaxUnitLanes];
    for (int64_t lane = 0; lane < unit.lanes; ++lane)
      outputs[lane] = unit.outputs[lane] ? waiting.results + lane * waiting.stride : nullptr;
    const Destination<A> to = {outputs, nullptr, conv.row_cell, waiting.first, Activation::kNone};
    wide ? run_wide(conv, unit, begin, end, to) : run_block(conv, unit, band, rows, to);
  }
  run_residual(conv, unit, waiting);
  if (!conv.in_place)
    store_band(conv, unit, waiting, begin, end);
}

} // namespace fxsparse::FXSPARSE_ISA
