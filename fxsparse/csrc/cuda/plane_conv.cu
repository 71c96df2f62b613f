#include "plane_conv.h"
#include "plane_conv_kernel.h"
#include "with_type.h"

#include <algorithm>
#include <bit>
#include <climits>

namespace fxsparse::cuda {
namespace {

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

PlaneCall call_of(const PlaneConv &conv, const TiledWeight &weight, const TiledTensors &tensors) {
  const Conv2dGeometry &g = conv.geometry;
  PlaneCall call = {};
  call.shape = GatherShape::of(g, 8, conv.pools);
  call.shape.row_step = uint32_t(g.dilation_y * conv.in.row);
  call.shape.tap_step = uint32_t(g.dilation_x * conv.in.x);
  call.shape.channel_step = uint32_t(conv.in.channel);
  call.weight = weight, call.tensors = tensors, call.activation = g.activation;
  call.tf32 = conv.type == TiledType::kFloat && conv.allow_tf32;
  call.in_image = uint32_t(conv.in.image), call.in_row = uint32_t(conv.in.row), call.in_x = uint32_t(conv.in.x);
  call.add = StoreSteps::of(conv.add), call.out = StoreSteps::of(conv.out);
  const int64_t window = call.shape.window, element = conv.type == TiledType::kFloat ? 4 : 2;
  // Positions of even number and the next are pairs where rows have an even pitch. A row of odd width is computed to
  // its pitch then: what is past the image nobody reads.
  const int64_t height = g.out_height / window, even_width = (g.out_width + 1) / 2 * 2;
  const auto pairs = [&](const ImageStrides &s, const void *tensor) {
    const bool even = s.x == 1 && s.row % 2 == 0 && s.channel % 2 == 0 && s.image % 2 == 0;
    return even && s.row >= even_width && reinterpret_cast<uintptr_t>(tensor) % (2 * element) == 0;
  };
  call.stores_pairs =
      window == 1 && pairs(conv.out, tensors.output) && (tensors.add == nullptr || pairs(conv.add, tensors.add));
  const int64_t width = call.stores_pairs ? even_width : g.out_width / window;
  call.shape.by_out_width = Divider::by(std::max<int64_t>(width, 1));
  call.by_image = Divider::by(std::max<int64_t>(height * width, 1));
  call.positions = int(g.batch * height * width * window * window);
  return call;
}

// How a call is cut into CTAs.
struct PlaneGrid {
  int64_t row_parts, rounds, blocks; // a CTA computes `rounds` tiles of positions of one row part
  int positions;                     // of a CTA's tile

  static PlaneGrid of(const PlaneCall &call, const PlaneTile &tile, int multiprocessors) {
    PlaneGrid grid;
    grid.row_parts = call.weight.tile_count * (call.weight.tile_rows / tile.rows);
    grid.positions = kPlaneWarps / tile.split * tile.positions;
    const int64_t tiles = ceil_of(call.positions, grid.positions);
    const int64_t at_once =
        int64_t(multiprocessors) * plane_ctas(tile.rows, tile.positions / 8, call.tf32) / grid.row_parts;
    grid.rounds = ceil_of(tiles, std::max<int64_t>(at_once, 1));
    grid.blocks = grid.row_parts * ceil_of(tiles, grid.rounds);
    return grid;
  }
};

// Microseconds on an H200. The form is what the kernel does, the numbers are a least-squares fit to 18 layers with 1 to
// 8 images (benchmarks/NOTES.md): choices by it took 1.06 times as long as the best ones.
double estimate(const PlaneCall &call, const PlaneTile &tile, int multiprocessors) {
  const PlaneGrid grid = PlaneGrid::of(call, tile, multiprocessors);
  const int units = tile.positions / 8, rows = tile.rows;
  // Columns are padded to whole steps: half of one, on the average, is none.
  const int64_t columns = call.weight.column_count / call.weight.tile_count - kColumnStep / 2;
  const int64_t chunks = ceil_of(ceil_of(columns, kPlaneChunk), tile.split); // of a warp
  const double load = std::max(double(grid.blocks) / multiprocessors, 1.);   // CTAs that share a multiprocessor
  const int at_once = call.stores_pairs ? 2 : 1;
  const double chunk = 0.116 * units + 0.00008 * rows * (units + 4);
  const double stores =
      call.stores_pairs && tile.split == 1
          ? 0.67 / 64 * rows * units
          : double(ceil_of(rows * grid.positions / at_once, kPlaneThreads)) * (0.21 + 0.015 * tile.split);
  const double latency = 0.42 + 0.17 * double(ceil_of(chunks, plane_batch(rows, units, call.tf32)));
  return 0.93 + double(grid.rounds) * (latency + load * (double(chunks) * chunk + 0.083 * units + stores));
}

// The fastest by the estimate, among those that the caller left open.
PlaneTile chosen(const PlaneCall &call, const PlaneTile &asked, int multiprocessors) {
  PlaneTile best = {};
  double least = 0;
  for (const int rows : {64, 32})
    for (const int positions : {8, 16})
      for (const int split : {1, 2, 4, 8}) {
        if ((asked.rows != 0 && asked.rows != rows) || (asked.positions != 0 && asked.positions != positions) ||
            (asked.split != 0 && asked.split != split))
          continue;
        const PlaneTile tile = {rows, positions, split};
        const double time = estimate(call, tile, multiprocessors);
        if (best.rows == 0 || time < least)
          best = tile, least = time;
      }
  return best;
}

template <typename T, bool kTf32, int kRows, int kPositions>
cudaError_t launch(PlaneCall call, const PlaneTile &tile, int multiprocessors, bool overlap, cudaStream_t stream) {
  const PlaneGrid grid = PlaneGrid::of(call, tile, multiprocessors);
  if (grid.blocks > INT_MAX)
    return cudaErrorInvalidConfiguration;
  const int stored_at_once = call.shape.window == 2 ? 4 : (call.stores_pairs ? 2 : 1);
  call.split = tile.split;
  call.log_threads_of_row = std::countr_zero(unsigned(grid.positions / stored_at_once));
  call.table = int(std::min<int64_t>(kPlaneTable, ceil_of(call.weight.column_count, kColumnStep) * kColumnStep));
  return launch_if_overlapping(overlap, plane_conv_kernel<T, kRows, kPositions / 8, kTf32>, dim3(unsigned(grid.blocks)),
                               kPlaneThreads, plane_shared_bytes(kRows, kPositions, tile.split, call.table), stream,
                               call);
}

template <typename T, bool kTf32>
cudaError_t launch_tile(const PlaneCall &call, const PlaneTile &tile, int multiprocessors, bool overlap,
                        cudaStream_t stream) {
  if (tile.rows == 32)
    return tile.positions == 8 ? launch<T, kTf32, 32, 8>(call, tile, multiprocessors, overlap, stream)
                               : launch<T, kTf32, 32, 16>(call, tile, multiprocessors, overlap, stream);
  return tile.positions == 8 ? launch<T, kTf32, 64, 8>(call, tile, multiprocessors, overlap, stream)
                             : launch<T, kTf32, 64, 16>(call, tile, multiprocessors, overlap, stream);
}

} // namespace

const char *plane_conv2d_refusal(const PlaneConv &conv, int64_t tile_rows) {
  const Conv2dGeometry &g = conv.geometry;
  const TiledConv tiled = {g, conv.type, TiledKernel::kChosen, false, false, false};
  if (const char *refusal = tiled_conv2d_refusal(tiled, tile_rows))
    return refusal;
  if (!are_few({g.batch, g.in_channels, g.in_height, g.in_width}) ||
      !are_few({g.batch, g.out_channels, g.out_height, g.out_width}))
    return "the input or the output has more than 2^29 elements";
  return nullptr;
}

cudaError_t launch_plane_conv2d(const PlaneConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                                cudaStream_t stream) {
  if (weight.tile_count > INT_MAX / weight.tile_rows || (conv.pools && tensors.add != nullptr))
    return cudaErrorInvalidValue;
  const PlaneCall call = call_of(conv, weight, tensors);
  if (call.positions == 0 || weight.tile_count == 0)
    return cudaSuccess;
  int device = 0, multiprocessors = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess)
    return status;
  if (const cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      status != cudaSuccess)
    return status;
  const PlaneTile tile = chosen(call, conv.tile, multiprocessors);
  if (call.tf32)
    return launch_tile<float, true>(call, tile, multiprocessors, conv.overlap, stream);
  return with_type(conv.type, [&](auto value) {
    return launch_tile<decltype(value), false>(call, tile, multiprocessors, conv.overlap, stream);
  });
}

} // namespace fxsparse::cuda
