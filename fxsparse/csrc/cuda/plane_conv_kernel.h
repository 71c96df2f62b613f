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
#include "plane_conv.h"
#include "tiled_epilogue.h"
#include "tiled_gather.h"
#include "tiled_mma_kernel.h"

namespace fxsparse::cuda {

inline constexpr int kPlaneThreads = 256, kPlaneWarps = kPlaneThreads / 32, kPlaneChunk = 16;
inline constexpr int kPlaneTable = 1024; // columns that are decoded at a time

struct StoredPosition {
  int image, y, x; // of what is stored
  int part;        // of a pooling's window
};

// Strides of what is written, or added, in elements.
struct StoreSteps {
  uint32_t row, channel, image, x;

  static StoreSteps of(const ImageStrides &s) {
    return {uint32_t(s.row), uint32_t(s.channel), uint32_t(s.image), uint32_t(s.x)};
  }

  // Of channel 0.
  __device__ __forceinline__ uint32_t at(const StoredPosition &p) const {
    return uint32_t(p.image) * image + uint32_t(p.y) * row + uint32_t(p.x) * x;
  }
};

struct PlaneCall {
  GatherShape shape; // units are elements
  TiledWeight weight;
  TiledTensors tensors;
  Activation activation;
  uint32_t in_image, in_row, in_x;
  StoreSteps add, out;
  Divider by_image; // stored positions of one image
  int positions;    // of all images; of a pooling four for each stored one, a window side by side
  int split;
  int table;              // columns that shared memory has room for: a multiple of a chunk
  bool stores_pairs;      // positions of even number and the next lie side by side, in the output and in what is added
  int log_threads_of_row; // how many threads store a CTA's positions of one row: a power of two
};

// How many CTAs a multiprocessor holds, and the chunks whose loads are under way together: what the registers allow.
__host__ __device__ constexpr int plane_ctas(int rows, int units) { return rows == 64 && units == 1 ? 3 : 2; }
__host__ __device__ constexpr int plane_batch(int rows, int units) { return rows == 32 ? 4 / units : 1; }

// Floats between the sums of two rows in shared memory.
__host__ __device__ constexpr int sums_pitch(int positions) { return positions <= 16 ? positions : positions + 4; }

inline int plane_shared_bytes(int rows, int positions, int split, int table) {
  return split * rows * sums_pitch(kPlaneWarps / split * positions) * int(sizeof(float)) + table * int(sizeof(Column));
}

__device__ __forceinline__ StoredPosition stored_position(const PlaneCall &call, int position) {
  const int stored = call.shape.window == 2 ? position / 4 : position, image = call.by_image(stored);
  const int rest = stored - image * int(call.by_image.divisor), y = call.shape.by_out_width(rest);
  return {image, y, rest - y * int(call.shape.by_out_width.divisor),
          position - stored * (call.shape.window == 2 ? 4 : 1)};
}

__device__ __forceinline__ Position gathered_position(const PlaneCall &call, int position) {
  if (position >= call.positions)
    return {0, 0};
  const GatherShape &s = call.shape;
  const StoredPosition p = stored_position(call, position);
  const int y = (p.y * s.window + p.part / 2) * s.stride_y - s.pad_top;
  const int x = (p.x * s.window + p.part % 2) * s.stride_x - s.pad_left;
  return {uint32_t(p.image) * call.in_image + uint32_t(y) * call.in_row + uint32_t(x) * call.in_x, taps_met(s, y, x)};
}

// Four columns of a chunk at one position, for each of a warp's units of eight positions.
template <typename T, int kUnits> struct Gathered {
  T values[kUnits][4];

  // `columns`: a lane's, decoded.
  __device__ __forceinline__ void load(const T *input, const Position (&positions)[kUnits], const Column *columns) {
    const uint4 two[2] = {reinterpret_cast<const uint4 *>(columns)[0], reinterpret_cast<const uint4 *>(columns)[1]};
    const Column own[4] = {{two[0].x, two[0].y}, {two[0].z, two[0].w}, {two[1].x, two[1].y}, {two[1].z, two[1].w}};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        values[u][k] = positions[u].meets(own[k]) ? input[positions[u].base + own[k].offset] : T(0.f);
  }
};

// Sums of kRows x 8 positions in a warp's registers, and how to multiply a chunk.
template <typename T, int kRows> struct PlaneProduct {
  static constexpr int kParts = kRows / 16;
  static constexpr bool kHoldsPairs = true; // a lane: 2t and 2t + 1
  float sums[kParts][4] = {};

  struct Weights {
    uint2 values[kParts][2];

    // `of`: the tile's values, from its first row on.
    __device__ __forceinline__ void load(const void *of, int chunk, int tile_rows, int lane) {
      const uint2 *from =
          static_cast<const uint2 *>(of) + ((chunk * 2 + lane % 4 / 2) * tile_rows + lane / 4) * 2 + lane % 2;
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
        values[m][0] = __ldg(from + m * 32);
        values[m][1] = __ldg(from + m * 32 + 16);
      }
    }
  };

  static __device__ __forceinline__ const void *values_of(const TiledWeight &weight, const RowTile &tile, int row) {
    return static_cast<const uint4 *>(weight.values) + tile.first_value / 8 + row;
  }

  static __device__ __forceinline__ uint32_t pair(T low, T high) {
    return uint32_t(reinterpret_cast<const uint16_t &>(low)) | uint32_t(reinterpret_cast<const uint16_t &>(high)) << 16;
  }

  __device__ __forceinline__ void multiply(const Weights &weights, const T (&gathered)[4], int) {
    const uint32_t b[2] = {pair(gathered[0], gathered[1]), pair(gathered[2], gathered[3])};
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
      const uint2 &upper = weights.values[m][0], &lower = weights.values[m][1];
      const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
      multiply_fragments<T>(sums[m], a, b[0], b[1]);
    }
  }

  // `to`: [kRows][pitch], from the unit's first position on.
  __device__ __forceinline__ void store(float *to, int pitch, int lane) const {
#pragma unroll
    for (int i = 0; i < kParts * 2; ++i)
      *reinterpret_cast<float2 *>(to + (i * 8 + lane / 4) * pitch + lane % 4 * 2) =
          make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  }
};

// Exact: without tensor cores. Lane 4g + t sums a quarter of the rows, from t on, at position g.
template <int kRows> struct PlaneProduct<float, kRows> {
  static constexpr int kOwn = kRows / 4;
  static constexpr bool kHoldsPairs = false;
  float sums[kOwn] = {};

  struct Weights {
    const float *values;
    int tile_rows;

    __device__ __forceinline__ void load(const void *of, int chunk, int rows, int lane) {
      values = static_cast<const float *>(of) + int64_t(chunk) * kPlaneChunk * rows + lane % 4 * kOwn;
      tile_rows = rows;
    }
  };

  static __device__ __forceinline__ const void *values_of(const TiledWeight &weight, const RowTile &tile, int row) {
    return static_cast<const float *>(weight.values) + tile.first_value + row;
  }

  __device__ __forceinline__ void multiply(const Weights &weights, const float (&gathered)[4], int lane) {
#pragma unroll 1
    for (int owner = 0; owner < 4; ++owner)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float value = __shfl_sync(~0u, gathered[k], (lane & ~3) + owner);
        const float4 *from = reinterpret_cast<const float4 *>(weights.values + (owner * 4 + k) * weights.tile_rows);
#pragma unroll
        for (int i = 0; i < kOwn / 4; ++i) {
          const float4 four = __ldg(from + i);
          sums[i * 4] = fmaf(four.x, value, sums[i * 4]);
          sums[i * 4 + 1] = fmaf(four.y, value, sums[i * 4 + 1]);
          sums[i * 4 + 2] = fmaf(four.z, value, sums[i * 4 + 2]);
          sums[i * 4 + 3] = fmaf(four.w, value, sums[i * 4 + 3]);
        }
      }
  }

  __device__ __forceinline__ void store(float *to, int pitch, int lane) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      to[(lane % 4 * kOwn + i) * pitch + lane / 4] = sums[i];
  }
};

template <typename T, int kCount>
__device__ __forceinline__ void activate_sums(Activation activation, float (&values)[kCount]) {
  if constexpr (sizeof(T) == 4)
    activate(activation, values);
  else
    activate_rounded(activation, values);
}

// Two elements that lie side by side, from an even one on.
template <typename T> struct Neighbours {
  static __device__ __forceinline__ float2 load(const T *from) {
    return Pair<T>::unpack(*reinterpret_cast<const uint32_t *>(from));
  }
  static __device__ __forceinline__ void store(T *to, float low, float high) {
    *reinterpret_cast<uint32_t *>(to) = Pair<T>::pack(low, high);
  }
};
template <> struct Neighbours<float> {
  static __device__ __forceinline__ float2 load(const float *from) { return *reinterpret_cast<const float2 *>(from); }
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
    const float2 added = Neighbours<T>::load(add + (call.add.at(stored) + uint32_t(channel) * call.add.channel));
    values[0] += added.x, values[1] += added.y;
  }
  activate_sums<T>(call.activation, values);
  Neighbours<T>::store(output + (call.out.at(stored) + uint32_t(channel) * call.out.channel), values[0], values[1]);
}

// The same for all of a lane's sums of one unit. What is added is loaded before the sums are made.
template <typename T, int kRows> struct PairStores {
  static constexpr int kPairs = kRows / 8;
  StoredPosition stored;
  uint32_t added[kPairs]; // pairs as they lie in memory

  __device__ __forceinline__ void load(const PlaneCall &call, const int *channels, int position, int lane,
                                       const T *add) {
    stored = stored_position(call, position);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      added[i] = 0;
    if (add == nullptr || position >= call.positions)
      return;
    const T *from = add + call.add.at(stored);
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      added[i] =
          *reinterpret_cast<const uint32_t *>(from + uint32_t(max(channels[i * 8 + lane / 4], 0)) * call.add.channel);
  }

  __device__ __forceinline__ void store(const PlaneCall &call, const PlaneProduct<T, kRows> &product,
                                        const int *channels, const float *biases, int lane, T *output) const {
    float values[kPairs * 2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float bias = biases[i * 8 + lane / 4];
      const float2 both = Pair<T>::unpack(added[i]);
      values[i * 2] = product.sums[i / 2][i % 2 * 2] + bias + both.x;
      values[i * 2 + 1] = product.sums[i / 2][i % 2 * 2 + 1] + bias + both.y;
    }
    activate_sums<T>(call.activation, values);
    T *to = output + call.out.at(stored);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int channel = channels[i * 8 + lane / 4];
      if (channel >= 0)
        Neighbours<T>::store(to + uint32_t(channel) * call.out.channel, values[i * 2], values[i * 2 + 1]);
    }
  }
};

// Nothing holds pairs of floats.
template <int kRows> struct PairStores<float, kRows> {
  __device__ __forceinline__ void load(const PlaneCall &, const int *, int, int, const float *) {}
  __device__ __forceinline__ void store(const PlaneCall &, const PlaneProduct<float, kRows> &, const int *,
                                        const float *, int, float *) const {}
};

// Decodes the tile's columns from `first` to `last`.
__device__ __forceinline__ void decode_table(const PlaneCall &call, const int32_t *words, int first, int last,
                                             Column *table) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < last - first; i += kPlaneThreads)
    table[i] = decode_column(call.shape, __ldg(words + first + i));
}

template <typename T, int kRows, int kUnits>
__global__ void __launch_bounds__(kPlaneThreads, plane_ctas(kRows, kUnits)) plane_conv_kernel(const PlaneCall call) {
  using Product = PlaneProduct<T, kRows>;
  constexpr int kBatch = plane_batch(kRows, kUnits);
  extern __shared__ __align__(16) uint8_t shared[];
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
    PairStores<T, kRows> stores[kUnits];
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
