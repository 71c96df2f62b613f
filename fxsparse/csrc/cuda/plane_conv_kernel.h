// The convolution of few images as torch stores them: no layout, and no barrier between the wait for the kernel before
// and the sums.
//
// A warp multiplies 32 or 64 rows of a tile with 8 or 16 positions. Every thread gathers what it multiplies, an element
// a load, straight into the registers that mma.sync wants: lane 4g + t has position g and four columns from 4t on, of
// 16 at a time. That these are not the columns the instruction means does not matter, as the weights are taken in the
// same order: a tile's [K / 8][rows][8 columns] gives a lane the weights of a row and its four columns in one load.
// Several warps may share the columns of the same positions; their sums meet in shared memory, from where threads with
// consecutive positions add, activate and store.
//
// Roofline: one image of a deep network has nothing to bind but latencies: the launch (0.8 us in a chain of dependent
// ones), the gather, the store, and the instructions between, of which a multiprocessor's few warps hide little. So
// columns are decoded once a CTA, and the table, the first weights and all positions are there before the kernel waits
// for the one before it; an element costs eight instructions then.
#pragma once

#include "overlapping_launch.h"
#include "plane_product.h"
#include "tiled_epilogue.h"

namespace fxsparse::cuda {

template <typename T, int kCount>
__device__ __forceinline__ void activate_sums(Activation activation, float (&values)[kCount]) {
  if constexpr (sizeof(T) == 4)
    activate(activation, values);
  else
    activate_rounded(activation, values);
}

// Two elements that lie side by side, from an even one on.
template <typename T> struct Neighbours {
  using Both = uint32_t; // as they lie in memory
  static __device__ __forceinline__ float2 unpack(Both both) { return Pair<T>::unpack(both); }
  static __device__ __forceinline__ void store(T *to, float low, float high) {
    *reinterpret_cast<uint32_t *>(to) = Pair<T>::pack(low, high);
  }
};
template <> struct Neighbours<float> {
  using Both = float2;
  static __device__ __forceinline__ float2 unpack(Both both) { return both; }
  static __device__ __forceinline__ void store(float *to, float low, float high) {
    *reinterpret_cast<float2 *>(to) = make_float2(low, high);
  }
};

// Finishes and stores the sums of two positions side by side, the first at `stored`.
template <typename T>
__device__ __forceinline__ void store_pair(const PlaneCall &call, int channel, float bias, const StoredPosition &stored,
                                           float2 pair, const T *add, T *output) {
  if (channel < 0)
    return;
  float values[2] = {pair.x + bias, pair.y + bias};
  if (add != nullptr) {
    const T *from = add + (call.add.at(stored) + uint32_t(channel) * call.add.channel);
    const float2 added = Neighbours<T>::unpack(*reinterpret_cast<const typename Neighbours<T>::Both *>(from));
    values[0] += added.x, values[1] += added.y;
  }
  activate_sums<T>(call.activation, values);
  Neighbours<T>::store(output + (call.out.at(stored) + uint32_t(channel) * call.out.channel), values[0], values[1]);
}

// The same for all of a lane's sums of one unit. What is added is loaded before the sums are made.
template <typename T, int kRows, class Product, bool = Product::kHoldsPairs> struct PairStores {
  using Both = typename Neighbours<T>::Both;
  static constexpr int kPairs = kRows / 8;
  StoredPosition stored;
  Both added[kPairs];

  __device__ __forceinline__ void load(const PlaneCall &call, const int *channels, int position, int lane,
                                       const T *add) {
    stored = stored_position(call, position);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      added[i] = Both{};
    if (add == nullptr || position >= call.positions)
      return;
    const T *from = add + call.add.at(stored);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      added[i] =
          *reinterpret_cast<const Both *>(from + uint32_t(max(channels[Product::row(i, lane)], 0)) * call.add.channel);
  }

  __device__ __forceinline__ void store(const PlaneCall &call, const Product &product, const int *channels,
                                        const float *biases, int lane, T *output) const {
    float values[kPairs * 2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float bias = biases[Product::row(i, lane)];
      const float2 both = Neighbours<T>::unpack(added[i]);
      values[i * 2] = product.sums[i / 2][i % 2 * 2] + bias + both.x;
      values[i * 2 + 1] = product.sums[i / 2][i % 2 * 2 + 1] + bias + both.y;
    }
    activate_sums<T>(call.activation, values);
    T *to = output + call.out.at(stored);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int channel = channels[Product::row(i, lane)];
      if (channel >= 0)
        Neighbours<T>::store(to + uint32_t(channel) * call.out.channel, values[i * 2], values[i * 2 + 1]);
    }
  }
};

// A lane's sums are of one position.
template <typename T, int kRows, class Product> struct PairStores<T, kRows, Product, false> {
  __device__ __forceinline__ void load(const PlaneCall &, const int *, int, int, const T *) {}
  __device__ __forceinline__ void store(const PlaneCall &, const Product &, const int *, const float *, int,
                                        T *) const {}
};

// Decodes the tile's columns from `first` to `last`.
__device__ __forceinline__ void decode_table(const PlaneCall &call, const int32_t *words, int first, int last,
                                             Column *table) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < last - first; i += kPlaneThreads)
    table[i] = decode_column(call.shape, __ldg(words + first + i));
}

template <typename T, int kRows, int kUnits, bool kTf32>
__global__ void __launch_bounds__(kPlaneThreads, plane_ctas(kRows, kUnits, kTf32))
    plane_conv_kernel(const PlaneCall call) {
  using Product = PlaneProduct<T, kRows, kTf32>;
  constexpr int kBatch = plane_batch(kRows, kUnits, kTf32);
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int channels[kRows];
  __shared__ float biases[kRows];
  Column *table = reinterpret_cast<Column *>(shared);
  float *sums = reinterpret_cast<float *>(table + call.table); // [split][kRows][pitch]
  const GatherShape &shape = call.shape;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int split = call.split, teams = kPlaneWarps / split, team = warp / split, member = warp % split;
  const int tile_rows = int(call.weight.tile_rows), parts = tile_rows / kRows;
  const uint32_t row_parts = uint32_t(call.weight.tile_count) * uint32_t(parts);
  const int part = int(blockIdx.x % row_parts), count = teams * kUnits * 8, pitch = sums_pitch(count);
  const T *input = static_cast<const T *>(call.tensors.input), *add = static_cast<const T *>(call.tensors.add);
  T *output = static_cast<T *>(call.tensors.output);
  let_next_kernel_begin();

  // All of this is the weight's and the call's: the kernel before may still run.
  const RowTile tile = row_tile(call.weight, part / parts);
  const int chunks = (tile.columns + kPlaneChunk - 1) / kPlaneChunk; // padding fills the last
  const int32_t *words = call.weight.columns + tile.first_column;
  const void *values = Product::values_of(call.weight, tile, part % parts * kRows);
  typename Product::Weights weights[kBatch];
  const auto load_weights = [&](int chunk, int end) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (chunk + b * split < end)
        weights[b].load(values, chunk + b * split, tile_rows, lane);
  };
  if (thread < kRows) {
    const int channel = output_channel(shape, call.weight, part * kRows + thread);
    const T *bias = static_cast<const T *>(call.tensors.bias);
    channels[thread] = channel;
    biases[thread] = bias != nullptr && channel >= 0 ? float(bias[channel]) : 0.f;
  }
  const int held = call.table / kPlaneChunk; // chunks
  // What a thread stores of some rows: one position, or two, or one window's maximum.
  const int window = shape.window == 2 ? 4 : 1, log_own = call.log_threads_of_row;
  const int own_position = (thread & ((1 << log_own) - 1)) * (call.stores_pairs ? 2 : window);
  const int own_row = thread >> log_own;

  const bool direct = Product::kHoldsPairs && call.stores_pairs && split == 1; // from registers to where they belong
  bool begins = true;
  const int step = int(gridDim.x / row_parts) * count;
#pragma unroll 1
  for (int from = int(blockIdx.x / row_parts) * count; from < call.positions; from += step) {
    Position positions[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      positions[u] = gathered_position(call, from + (team * kUnits + u) * 8 + lane / 4);
    const StoredPosition stored = stored_position(call, from + own_position);
    Product products[kUnits];
    PairStores<T, kRows, Product> stores[kUnits];
#pragma unroll 1
    for (int first = 0; first == 0 || first < chunks; first += held) {
      const int end = min(chunks, first + held);
      load_weights(first + member, end);
      if (begins || chunks > held) {
        __syncthreads(); // everybody is done with the table
        decode_table(call, words, first * kPlaneChunk, end * kPlaneChunk, table);
        __syncthreads();
      }
      if (begins)
        wait_after_trigger();
      begins = false;
      if (direct && first == 0)
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
          stores[u].load(call, channels, from + (team * kUnits + u) * 8 + lane % 4 * 2, lane, add);
#pragma unroll 1
      for (int chunk = first + member; chunk < end; chunk += kBatch * split) {
        Gathered<T, kUnits> gathered[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (chunk + b * split < end)
            gathered[b].load(input, positions, table + (chunk + b * split - first) * kPlaneChunk + lane % 4 * 4);
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          if (chunk + b * split < end)
#pragma unroll
            for (int u = 0; u < kUnits; ++u)
              products[u].multiply(weights[b], gathered[b].values[u], lane);
        load_weights(chunk + kBatch * split, end);
      }
    }

    if (direct) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        if (from + (team * kUnits + u) * 8 + lane % 4 * 2 < call.positions)
          stores[u].store(call, products[u], channels, biases, lane, output);
      continue;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      products[u].store(sums + member * kRows * pitch + (team * kUnits + u) * 8, pitch, lane);
    __syncthreads();
    const float *own = sums + own_row * pitch + own_position;
    const int rows = kPlaneThreads >> log_own;
    if (from + own_position < call.positions) {
#pragma unroll 1
      for (int row = own_row; row < kRows; row += rows, own += rows * pitch) {
        if (call.stores_pairs) {
          float2 pair = {};
#pragma unroll 4
          for (int s = 0; s < split; ++s) {
            const float2 part = *reinterpret_cast<const float2 *>(own + s * kRows * pitch);
            pair.x += part.x, pair.y += part.y;
          }
          store_pair(call, channels[row], biases[row], stored, pair, add, output);
          continue;
        }
        const int channel = channels[row];
        if (channel < 0)
          continue;
        float base = biases[row], most = 0;
        if (add != nullptr)
          base += float(add[call.add.at(stored) + uint32_t(channel) * call.add.channel]);
#pragma unroll 1
        for (int k = 0; k < window; ++k) {
          float value[1] = {base};
#pragma unroll 4
          for (int s = 0; s < split; ++s)
            value[0] += own[s * kRows * pitch + k];
          activate_sums<T>(call.activation, value);
          most = k == 0 ? value[0] : max_keeping_nan(most, value[0]);
        }
        output[call.out.at(stored) + uint32_t(channel) * call.out.channel] = T(most);
      }
    }
    if (from + step < call.positions)
      __syncthreads(); // before the sums are written again
  }
}

} // namespace fxsparse::cuda
