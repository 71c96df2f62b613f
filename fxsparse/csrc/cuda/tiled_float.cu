// Launches tiled_float_kernel.h.
#include "overlapping_launch.h"
#include "shared_memory.h"
#include "tiled_float_kernel.h"
#include "tiled_kernels.h"

#include <limits>

namespace fxsparse::cuda {
namespace {

template <class Product> cudaError_t launch_product(const TiledCall &call, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  constexpr int kBytes = FloatMemory<Product>::kSharedBytes;
  const cudaError_t status = allow_shared_memory(tiled_float_kernel<Product>, kBytes, allowed);
  if (status != cudaSuccess)
    return status;
  const unsigned grid = tiled_grid(call.shape, call.weight, Product::kUnits);
  if (grid == 0)
    return cudaErrorInvalidConfiguration;
  return launch_overlapping(tiled_float_kernel<Product>, dim3(grid), kFloatThreads, kBytes, stream, call);
}

// Microseconds that two CTAs of one multiprocessor take, or one that has it for itself: at all, and for each stage.
struct TileTime {
  double two, stage_of_two, one, stage_of_one;
};

// By kSlices 1, 2, 4, on an H200: least-squares fits to 17 layers with 64 and 256 images (benchmarks/NOTES.md). Choices
// by them took 1.00 (TF32) and 1.01 (exact) times as long as the best ones.
constexpr TileTime kTf32Times[] = {{5.6, 0.98, 4.4, 0.55}, {3.6, 1.19, 1.7, 0.73}, {2.9, 0.78, 1.5, 0.50}};
constexpr TileTime kExactTimes[] = {{5.5, 2.87, 5.5, 1.45}, {3.8, 2.91, 1.5, 1.64}, {2.8, 1.60, 1.1, 0.96}};

template <class Product> double estimate(const TiledCall &call, int multiprocessors, const TileTime &time) {
  const int64_t tiles = tiled_grid(call.shape, call.weight, Product::kUnits);
  if (tiles == 0)
    return std::numeric_limits<double>::infinity(); // too many for a grid
  // Columns are padded to whole steps: half of one, on the average, is none.
  const int64_t columns = call.weight.column_count / call.weight.tile_count - kColumnStep / 2;
  const double stages = double((columns + Product::kStageColumns - 1) / Product::kStageColumns);
  const int64_t rounds = tiles / (2 * multiprocessors), rest = tiles % (2 * multiprocessors);
  const double two = time.two + stages * time.stage_of_two, one = time.one + stages * time.stage_of_one;
  return double(rounds) * two + (rest == 0 ? 0 : rest <= multiprocessors ? one : two);
}

// `kernel`: the tile, or kChosen or kPortable for the fastest by the estimates.
template <template <int> class Product>
cudaError_t launch_tile(const TiledCall &call, TiledKernel kernel, int multiprocessors, const TileTime *times,
                        cudaStream_t stream) {
  if (kernel == TiledKernel::kFloat256)
    return launch_product<Product<1>>(call, stream);
  if (kernel == TiledKernel::kFloat128)
    return launch_product<Product<2>>(call, stream);
  if (kernel == TiledKernel::kFloat64)
    return launch_product<Product<4>>(call, stream);
  const double whole = estimate<Product<1>>(call, multiprocessors, times[0]);
  const double half = estimate<Product<2>>(call, multiprocessors, times[1]);
  const double quarter = estimate<Product<4>>(call, multiprocessors, times[2]);
  if (whole <= half && whole <= quarter)
    return launch_product<Product<1>>(call, stream);
  return half <= quarter ? launch_product<Product<2>>(call, stream) : launch_product<Product<4>>(call, stream);
}

} // namespace

cudaError_t launch_tiled_float(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream) {
  const TiledCall call{GatherShape::of(conv.geometry, 4), weight, tensors, conv.geometry.activation};
  if (conv.allow_tf32)
    return launch_tile<Tf32Product>(call, conv.kernel, multiprocessors, kTf32Times, stream);
  return launch_tile<ExactProduct>(call, conv.kernel, multiprocessors, kExactTimes, stream);
}

} // namespace fxsparse::cuda
