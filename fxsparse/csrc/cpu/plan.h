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
  int64_t needed; // cells per slot that the outputs read
  int64_t cells;  // stored cells per slot
  int64_t spill;  // cells past the last one that a tap may read: the zeros that begin the next row or plane
};

// Panels that are computed together: they read the same columns of the same channels.
struct Unit {
  int64_t first_panel, panels;
};

// What a worker takes: whole images in groups; windows of an image's rows, each gathered by itself; a share of the
// tiles and units of a group that all workers gather together; units of images, for which it gathers the channels of
// their group alone; or planes for the depthwise kernel, which gathers nothing.
enum class Schedule { kImages, kWindows, kShared, kByGroup, kDepthwise };

// Max pooling of one plane; `row_elements` is what one padded row takes, with room to read past its end.
struct PoolShape {
  int64_t height, width, out_height, out_width, kernel[2], stride[2], pad[2], dilation[2], row_elements;
};

// Rows [first, last) of so many planes of an output; planes are so many elements apart.
struct PlaneRows {
  int64_t planes, input_plane, output_plane, first, last;
};

struct KernelSet;

struct Conv {
  ConvShape shape;
  const KernelSet *kernels;
  int64_t element_bytes;
  // Canonical input of a group of images: [channel][slot y][slot x][image][row][cell].
  Axis y, x;
  bool in_place; // the input is read where it lies: one row of height * width cells per image
  int64_t group_images, gathered_channels, plane, channel_stride, buffer_elements;
  // Tiles: the valid rows of a group (group_images * out_height) in blocks of at most tile_height, each row in
  // `pieces` of at most the kernel set's positions.
  int64_t out_height, out_width, tile_height, pieces;
  // Schedule.
  Schedule schedule;
  int64_t workers, num_units;
  int64_t windows;          // of an image; each has cells for its rows only
  int64_t bands;            // of a group or a window
  int64_t scratch_elements; // per worker, for results that wait for residual weights
  bool has_residual;
  // Tables, and what a run works in: sizes and offsets in bytes.
  int64_t prepared_bytes, at_offsets, at_taps, at_rows, at_units, at_costs, at_values;
  int64_t working_bytes, at_buffers, at_results, worker_buffer_bytes, worker_result_bytes;
  // Set by prepare_conv.
  const uint32_t *offsets;   // per entry of `columns`: where its cells begin
  const int64_t *row_cell;   // per valid row: its first cell
  const int64_t *row_output; // per valid row: its first element in the output
  const Unit *units;
  const int64_t *unit_middles; // cost of all units before, plus half of the unit's own
  int64_t cost;                // of all units
  const int64_t *panels, *rows;
  const void *values; // in the type of the accumulators; of the depthwise kernel: all taps of each row
  const void *bias;
};

// The kernels look so many columns ahead.
constexpr int64_t kColumnsAhead = 4;

// Tiles [first, last) of the group.
struct Band {
  int64_t first, last;
};

// Channels [first, last) of some images: rows of cells from `first_row` on.
struct Gathering {
  const InputRows *inputs;
  int64_t num_inputs, first_image, images, first, last, first_row;
};

// Rows [first, last) of the weight matrix, on one image. `rows`: of its first plane, what each row of the kernel reads
// for each row of the output, or null for zeros.
struct DepthwiseShare {
  int64_t first, last;
  const void *const *rows;
  void *output;
  const void *add;
};

// One instruction set's code for one dtype. `T` is the storage type, `A` the accumulators' (float for 16-bit T).
struct KernelSet {
  int64_t lanes;     // of a vector of A
  int64_t positions; // outputs of a tile, at most
  int64_t unit_panels;
  // T input [image][channel][row][column] -> A canonical buffer.
  void (*gather)(const Conv &conv, const Gathering &what, void *buffer);
  // Entries [first, last) of columns -> cell offsets.
  void (*decode)(const Conv &conv, const int32_t *columns, const uint32_t *taps, int64_t first, int64_t last,
                 uint32_t *offsets);
  // T values -> A, for 16-bit T; null otherwise.
  void (*widen)(const void *values, int64_t first, int64_t last, void *out);
  // One unit on one band of tiles. `cells` is the canonical buffer (or the input, in place), `output` and `add` begin
  // at the group's first image.
  void (*run)(const Conv &conv, const Unit &unit, Band band, int64_t images, const void *cells, void *output,
              const void *add, void *results);
  // Null where masked loads are slow, or T is not A.
  void (*depthwise)(const Conv &conv, const DepthwiseShare &share);
  // Rows of the output as `rows` says. `scratch` has place for shape.row_elements of A.
  void (*max_pool)(const PoolShape &shape, const PlaneRows &rows, const void *input, void *output, void *scratch);
  // The mean of each of so many planes of `count` elements, which are so far apart.
  void (*average)(int64_t count, const PlaneRows &planes, const void *input, void *output);
  // output = activation(a + b) for `count` elements of T; `b` may be null.
  void (*add_activate)(const void *a, const void *b, void *output, int64_t count, Activation activation);
};

// Tells whether the depthwise kernel computes a convolution.
bool has_depthwise_kernel(const ConvShape &shape);

// The kernels that this process uses.
const KernelSet &kernels_for(Dtype dtype);

// Tiles of a group of so many images.
int64_t group_tiles(const Conv &conv, int64_t images);

const KernelSet &avx512_kernels(Dtype dtype);
const KernelSet &avx2_kernels(Dtype dtype);
const KernelSet &baseline_kernels(Dtype dtype);

} // namespace fxsparse
