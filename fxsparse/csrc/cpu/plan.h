// What the planner (conv.cpp) hands to the kernels. Plain data only: this header is compiled into translation units
// for different instruction sets, so an inline function here could end up linked in the wrong one.
#pragma once

#include "cpu/conv.h"

namespace fxsparse {

// One direction of the canonical input: padded, and de-interleaved by the stride, so that consecutive outputs read
// consecutive cells whatever the stride and the dilation are. Padded coordinate p is cell p / stride of phase
// p % stride; only the phases that a tap reads are stored, each in a slot.
struct Axis {
  int64_t input, stride, dilation, before, padded;
  int64_t slots;  // stored phases; slot i holds phase (i * dilation) % stride
  int64_t period; // tap t reads slot t % period
  int64_t cells;  // stored cells per slot
  int64_t spill;  // cells past the last one that a tap may read: the zeros that begin the next row or plane
};

// Panels that are computed together: they read the same columns of the same channels.
struct Unit {
  int64_t first_panel, panels;
};

struct KernelSet;

struct Conv {
  ConvShape shape;
  const KernelSet *kernels;
  // Canonical input of a group of images: [channel][slot y][slot x][image][row][cell].
  Axis y, x;
  bool in_place; // the input is read where it lies: one row of height * width cells per image
  int64_t group_images, plane, channel_stride, buffer_elements;
  // Tiles: the valid rows of a group (group_images * out_height) in blocks of at most tile_height, each row in
  // `pieces` of at most the kernel set's positions.
  int64_t out_height, out_width, tile_height, pieces;
  // Schedule.
  int64_t bands, scratch_elements; // per worker, for results that wait for residual weights
  int64_t workers, num_units;
  bool images_per_worker; // each worker takes whole images; otherwise all workers share each group
  bool has_residual;
  // Offsets into the scratch, in bytes.
  int64_t at_offsets, at_taps, at_rows, at_units, at_costs, at_values, at_buffers, at_results, worker_buffer_bytes,
      worker_result_bytes;
  // Set by run_conv.
  const uint32_t *offsets;   // per entry of `columns`: where its cells begin
  const int64_t *row_cell;   // per valid row: its first cell
  const int64_t *row_output; // per valid row: its first element in the output
  const Unit *units;
  const int64_t *panels, *rows;
  const void *values; // in the type of the accumulators
  const void *bias;
};

// Tiles [first, last) of the group.
struct Band {
  int64_t first, last;
};

// One instruction set's code for one dtype. `T` is the storage type, `A` the accumulators' (float for 16-bit T).
struct KernelSet {
  int64_t lanes;     // of a vector of A
  int64_t positions; // outputs of a tile, at most
  int64_t unit_panels;
  // T input [image][channel][row][column] -> A canonical buffer, channels [first, last).
  void (*gather)(const Conv &conv, const void *input, int64_t images, int64_t first, int64_t last, void *buffer);
  // Entries [first, last) of columns -> cell offsets.
  void (*decode)(const Conv &conv, const int32_t *columns, const uint32_t *taps, int64_t first, int64_t last,
                 uint32_t *offsets);
  // T values -> A, for 16-bit T; null otherwise.
  void (*widen)(const void *values, int64_t first, int64_t last, void *out);
  // One unit on one band of tiles. `cells` is the canonical buffer (or the input, in place), `output` and `add` begin
  // at the group's first image.
  void (*run)(const Conv &conv, const Unit &unit, Band band, int64_t images, const void *cells, void *output,
              const void *add, void *results);
};

const KernelSet &avx512_kernels(Dtype dtype);
const KernelSet &avx2_kernels(Dtype dtype);
const KernelSet &baseline_kernels(Dtype dtype);

} // namespace fxsparse
