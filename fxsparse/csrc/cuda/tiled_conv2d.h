// Sparse convolution of images stored batch-innermost: what the bindings call. No torch: device pointers, numbers and
// a stream in, a launch status out. Nothing here waits for the device or allocates.
//
// An image tensor [N, C, H, W] lies in memory as [H][W][C][Np], Np = N rounded up to a multiple of 8, 16-byte aligned.
// Lanes N to Np - 1 may hold anything; a lane never reaches another.
//
// The weight is in tiles of `tile_rows` (64 or 128) output channels that share one list of columns
// (fxsparse/ops/tiles.py makes them). It does not depend on the input's sizes.
#pragma once

#include "../conv2d_geometry.h"

#include <cstdint>
#include <cuda_runtime.h>

namespace fxsparse::cuda {

// A column of a tile: kernel row, kernel column and input channel (of all groups) in one word, ascending.
inline constexpr int kColumnRowShift = 27, kColumnTapShift = 23;
inline constexpr int kMaxKernel = 15;              // rows and columns of the kernel
inline constexpr int kMaxChannels = 1 << 23;       // of the input
inline constexpr int kPaddingColumn = 0x7f80'0000; // (15, 15, 0): behind the last column, meets zeros
// Columns are padded to a multiple of this.
inline constexpr int kColumnStep = 64;

enum TileField { kTileFirstColumn, kTileColumnCount, kTileFirstValue, kTileMostColumns, kTileFields };

enum class TiledType { kBFloat16, kHalf, kFloat };

// All pointers are to device memory. Per tile, one after the other, with K = its columns rounded up to kColumnStep (at
// least one step):
//   columns[first column, +K): words, kPaddingColumn behind the last;
//   values[first value, +K * tile_rows): [K / 8][tile_rows][8 columns], float32: [K][tile_rows]; zeros in the padding;
//   kTileMostColumns: the largest K of all tiles;
//   rows[tile * tile_rows, +tile_rows): output channels, -1 in the padding.
struct TiledWeight {
  const void *values;
  const int32_t *columns;
  const int64_t *tiles; // [tile_count][kTileFields]
  const int32_t *rows;
  int64_t tile_count, tile_rows, column_count, value_count; // of the four tables
};

// Which kernel runs: chosen from device, type and sizes; Hopper's tensor cores (compute capability 9.0, 16-bit types)
// with so many positions a tile and one CTA an SM, or ("Half") two; or the one for every device of compute
// capability 8.0 and later. Tiles of 128 rows have one kernel on Hopper's tensor cores, whichever is asked for. Of
// float32: with so many positions a tile.
enum class TiledKernel {
  kChosen,
  kWgmma64,
  kWgmma128,
  kWgmma64Half,
  kWgmma128Half,
  kPortable,
  kFloat64,
  kFloat128,
  kFloat256
};

struct TiledConv {
  Conv2dGeometry geometry; // padding_mode must be kZeros
  TiledType type;          // of input, values, bias, add and output; sums are float
  TiledKernel kernel;
  // The kernel may start while the one before it on the stream still runs (it waits before it reads or writes
  // activations). Off: only for measuring what that is worth.
  bool overlap;
  // What is stored is the maximum of each window of 2 x 2 positions; a last odd row or column falls away. The geometry
  // is the convolution's, the output's sizes are half of it. Nothing can be added. See can_pool_tiled_conv2d.
  bool pools;
  bool allow_tf32; // float32: factors may be rounded to TF32 (10 bits) for the tensor cores; sums stay float32
};

struct TiledTensors {
  const void *input;
  const void *bias; // [out_channels] or null
  const void *add;  // like the output, or null
  void *output;
};

// Np.
inline int64_t padded_batch(int64_t batch) { return (batch + 7) / 8 * 8; }

// Why this cannot run on the current device, for an error message, or null. `tile_rows`: of the weight.
const char *tiled_conv2d_refusal(const TiledConv &conv, int64_t tile_rows);

// Whether the current device has a kernel that pools what such a convolution gives.
bool can_pool_tiled_conv2d(const TiledConv &conv);

// Computes activation(conv2d(input, weight, bias) + add). Picks the kernel by the current device's compute capability.
// Tables that point outside the tensors stop the kernel with a trap.
cudaError_t launch_tiled_conv2d(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                                cudaStream_t stream);

} // namespace fxsparse::cuda
