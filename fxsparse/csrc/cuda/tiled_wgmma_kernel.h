// Sparse convolution of batch-innermost images on Hopper's tensor cores (sm_90a).
//
// Tile: kRowBlocks * 64 output channels that share a list of columns, times kPositions positions (pixel-major, the
// batch innermost). D[rows][positions] = W[rows][columns] X[columns][positions]: W lies ready in the weight's tables, a
// row of X is kPositions * 2 bytes of the input, in pieces of at least 16.
//
// An SM has two pairs of warpgroups, in one persistent CTA or in two, each with a ring of stages: a producer gathers X
// by cp.async into the layout that wgmma reads, a consumer multiplies and stores. In one CTA a pair takes every other
// tile. One pair's epilogue runs under the other's main loop. The weights and decoded columns of a row tile stay in
// shared memory for all position tiles that the CTA has of it; where they leave too little room for the rings, they go
// through the rings with the gathered rows ("streamed").
//
// Roofline: the gather moves 2 bytes a column and position from L2 for 64 (128) rows: at 64 rows L2 bounds before the
// tensor cores do; layers with few columns are bound by the memory that input and output need once. Short launches are
// bound by instruction fetches: every unrolled line is paid for.
#pragma once

#include "ptx.h"
#include "tiled_epilogue.h"
#include "tiled_wgmma_plan.h"
#include "tiled_wgmma_tables.h"
#include "wgmma.h"

namespace fxsparse::cuda {

// What unit `at` of a position tile gathers.
template <class Tile>
__device__ __forceinline__ Position gathered_position(const GatherShape &shape, int tile, int at) {
  const bool pools = shape.window != 1;
  const int stored = pools ? tile * Tile::kPooledUnits + at % Tile::kPooledUnits : tile * Tile::kUnits + at;
  return position_of(shape, stored, pools ? at / Tile::kPooledUnits : 0);
}

// Gathers the rows of X (and what is added) for every other tile of the CTA into a ring.
template <typename T, class Tile>
__device__ __forceinline__ void produce(const WgmmaCall &call, const CtaShare &share, const WgmmaLayout &layout,
                                        WgmmaFixed<Tile> &fixed, uint8_t *shared, int position_tiles) {
  constexpr int kSubTiles = Tile::kSubTiles, kRowsPerThread = Tile::kStageColumns / 16;
  constexpr int kPairs = Tile::kPairs;
  const int pair = int(threadIdx.x) / kWarpgroup - kPairs, thread = int(threadIdx.x) % kWarpgroup;
  // Eight threads copy 128 bytes of a row: unit u of row k goes to unit u ^ (k % 8) of the row's 128 bytes.
  const int row = thread / 8, unit = thread % 8;
  const uint32_t ring = shared_address(shared) + pair * layout.stages * layout.stage_bytes;
  const uint32_t to = ring + row * 128 + (unit ^ (row % 8)) * kUnitBytes;
  const uint32_t full = shared_address(fixed.full[pair]), empty = shared_address(fixed.empty[pair]);
  const uint32_t weights_full = shared_address(&fixed.weights_full),
                 weights_empty = shared_address(&fixed.weights_empty);
  const uint4 *input = static_cast<const uint4 *>(call.tensors.input);
  const uint4 *add = static_cast<const uint4 *>(call.tensors.add);
  Column *columns = reinterpret_cast<Column *>(shared + layout.columns);
  RingTurn turn;
  int turns = 0, weights_parity = 1;
  // Whether a tile's positions are all of one pixel: then they meet the same columns, eight units apart.
  const bool one_pixel = call.shape.window == 1 && call.shape.units % Tile::kUnits == 0;
  bool waited = false; // for the kernels before; all before reads the weight only
  for (int i = share.first_row_tile; i <= share.last_row_tile; ++i) {
    const RowTile tile = row_tile(call.weight, i);
    if (tile.padded_columns > share.most_columns)
      __trap();
    const uint8_t *values = static_cast<const uint8_t *>(call.weight.values) + tile.first_value * sizeof(T);
    const int32_t *words = call.weight.columns + tile.first_column + row;
    wait(weights_empty, weights_parity);
    weights_parity ^= 1;
    const bool loads_weights = pair == 0 && thread == 0 && !layout.streamed;
    if (loads_weights) {
      const uint32_t bytes = uint32_t(tile.padded_columns) * Tile::kRows * sizeof(T);
      arrive_and_expect(weights_full, bytes);
      copy_bulk(shared_address(shared) + layout.weights, values, bytes, weights_full);
    }
    load_tables<Tile>(call, tile, layout.streamed, columns, fixed.row_starts);
    meet<kPairs * kWarpgroup>(1);
    if (!loads_weights)
      arrive(weights_full);
    const Range tiles = position_tiles_of(share, i, position_tiles);
    for (int t = tiles.first; t < tiles.end; t += share.step, ++turns) {
      if (turns % kPairs != pair)
        continue;
      Position positions[kSubTiles];
#pragma unroll
      for (int z = 0; z < (one_pixel ? 1 : kSubTiles); ++z)
        positions[z] = gathered_position<Tile>(call.shape, t, z * 8 + unit);
      const Range stages = stages_of<Tile>(call.shape, fixed.row_starts, t);
      int32_t next[kRowsPerThread] = {}; // words of streamed columns, a stage ahead
      if (layout.streamed)
#pragma unroll
        for (int k = 0; k < kRowsPerThread; ++k)
          next[k] = __ldg(words + stages.first * Tile::kStageColumns + k * 16);
      if (!waited)
        wait_for_dependencies();
      waited = true;
#pragma unroll 1
      for (int stage = stages.first; stage < stages.end; ++stage) {
        Column own[kRowsPerThread];
        if (layout.streamed) {
          const int32_t *ahead = words + (stage + 1 < stages.end ? stage + 1 : stage) * Tile::kStageColumns;
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k) {
            own[k] = decode_column(call.shape, next[k]);
            next[k] = __ldg(ahead + k * 16);
          }
        } else {
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k)
            own[k] = columns[stage * Tile::kStageColumns + k * 16 + row];
        }
        const uint32_t slot = turn.slot * layout.stage_bytes, slot_full = full + turn.slot * 8;
        wait(empty + turn.slot * 8, turn.parity ^ 1);
        if (layout.streamed && thread == 0) {
          expect(slot_full, Tile::kWeightBytes);
          copy_bulk(ring + slot + Tile::kInputBytes, values + stage * Tile::kWeightBytes, Tile::kWeightBytes,
                    slot_full);
        }
        const auto copy = [&](int k, int z, uint32_t from, bool meets) {
          copy_unit_async(to + slot + z * (Tile::kStageColumns * 128) + k * 2048, input + from, meets);
        };
        if (kSubTiles > 1 && one_pixel) {
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k) {
            const bool meets = positions[0].meets(own[k]);
            const uint32_t from = meets ? positions[0].base + own[k].offset : 0;
#pragma unroll
            for (int z = 0; z < kSubTiles; ++z)
              copy(k, z, from + z * 8, meets);
          }
        } else {
#pragma unroll
          for (int k = 0; k < kRowsPerThread; ++k)
#pragma unroll
            for (int z = 0; z < kSubTiles; ++z) {
              const bool meets = positions[z].meets(own[k]);
              copy(k, z, meets ? positions[z].base + own[k].offset : 0, meets);
            }
        }
        arrive_after_copies(slot_full);
        turn.advance(layout.stages);
      }
      if (add == nullptr)
        continue;
      // As the sums' rows: per 64 positions 128 bytes a row, swizzled like the input.
      constexpr int kRowStep = kWarpgroup / Tile::kUnits;
      const int add_unit = thread % Tile::kUnits, add_row = thread / Tile::kUnits;
      const int stored = stored_at(call.shape, t * Tile::kUnits + add_unit);
      const uint32_t sub_tile = ring + add_unit / 8 * (Tile::kAddRows * 128);
      for (int s = 0; s < Tile::kAddStages; ++s, turn.advance(layout.stages)) {
        const uint32_t slot = turn.slot * layout.stage_bytes, slot_full = full + turn.slot * 8;
        wait(empty + turn.slot * 8, turn.parity ^ 1);
#pragma unroll 2
        for (int m = add_row; m < Tile::kAddRows; m += kRowStep) {
          const int channel = output_channel(call.shape, call.weight, i * Tile::kRows + s * Tile::kAddRows + m);
          const bool real = channel >= 0 && stored >= 0;
          const uint32_t from = real ? uint32_t(stored) + uint32_t(channel) * uint32_t(call.shape.units) : 0;
          copy_unit_async(sub_tile + slot + m * 128 + ((add_unit ^ m) % 8) * kUnitBytes, add + from, real);
        }
        arrive_after_copies(slot_full);
      }
    }
  }
}

template <typename T> __device__ __forceinline__ float bias_of(const WgmmaCall &call, int channel) {
  const T *bias = static_cast<const T *>(call.tensors.bias);
  return bias != nullptr && channel >= 0 ? widen(__ldg(bias + channel)) : 0.f;
}

// Multiplies what a pair's producer has gathered, and stores.
template <typename T, class Tile>
__device__ __forceinline__ void consume(const WgmmaCall &call, const CtaShare &share, const WgmmaLayout &layout,
                                        WgmmaFixed<Tile> &fixed, uint8_t *shared, int position_tiles) {
  constexpr int kPairs = Tile::kPairs, kSums = Tile::kPositions / 2;
  const int pair = int(threadIdx.x) / kWarpgroup, thread = int(threadIdx.x) % kWarpgroup;
  const int warp = thread / 32, lane = thread % 32;
  const uint32_t ring = shared_address(shared) + pair * layout.stages * layout.stage_bytes;
  const uint32_t staging = shared_address(fixed.staging[pair][warp]);
  const uint32_t full = shared_address(fixed.full[pair]), empty = shared_address(fixed.empty[pair]);
  const bool adds = call.tensors.add != nullptr;
  uint4 *output = static_cast<uint4 *>(call.tensors.output);
  // Where the weights of a stage lie: beside its input, or a row tile's stages one after the other.
  const uint32_t weights = layout.streamed ? ring + Tile::kInputBytes : shared_address(shared) + layout.weights;
  RingTurn turn;
  int turns = 0, weights_parity = 0;
  for (int i = share.first_row_tile; i <= share.last_row_tile; ++i) {
    // Of each block of 64 rows this warp has 16: a thread's sums are in rows lane / 4 and 8 more, what it stores in
    // rows lane / 8 and 4, 8, 12 more.
    float bias[Tile::kRowBlocks][2];
    int row_at[Tile::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Tile::kRowBlocks; ++m) {
      const int first_lane = i * Tile::kRows + m * kBlockRows + warp * 16;
      const int channel = output_channel(call.shape, call.weight, first_lane + lane % 16);
      int *own_rows = fixed.row_at[pair] + m * kBlockRows + warp * 16;
      __syncwarp();
      if (lane < 16)
        own_rows[lane] = channel < 0 ? -1 : channel * call.shape.units;
      __syncwarp();
#pragma unroll
      for (int s = 0; s < 4; ++s)
        row_at[m][s] = own_rows[s * 4 + lane / 8];
#pragma unroll
      for (int s = 0; s < 2; ++s)
        bias[m][s] = bias_of<T>(call, __shfl_sync(~0u, channel, s * 8 + lane / 4));
    }
    wait(shared_address(&fixed.weights_full), weights_parity);
    weights_parity ^= 1;
    const Range tiles = position_tiles_of(share, i, position_tiles);
    for (int t = tiles.first; t < tiles.end; t += share.step, ++turns) {
      if (turns % kPairs != pair)
        continue;
      float sums[Tile::kRowBlocks][kSums];
      const Range stages = stages_of<Tile>(call.shape, fixed.row_starts, t);
      int before = 0; // slot of the stage before
      for (int stage = stages.first; stage < stages.end; ++stage) {
        const uint32_t slot = turn.slot * layout.stage_bytes;
        const uint32_t a = weights + (layout.streamed ? slot : stage * Tile::kWeightBytes);
        const uint32_t b = ring + slot;
        wait(full + turn.slot * 8, turn.parity);
        fence_copies();
        fence_products();
#pragma unroll
        for (int k = 0; k < Tile::kStageColumns / 16; ++k)
#pragma unroll
          for (int m = 0; m < Tile::kRowBlocks; ++m)
            multiply<T>(
                sums[m],
                matrix_descriptor<false>(a + (k * 2 * Tile::kRows + m * kBlockRows) * 16, Tile::kRows * 16, 128),
                matrix_descriptor<true>(b + k * 2048, Tile::kStageColumns * 128, 1024), stage > stages.first || k > 0);
        commit_products();
        wait_for_products<1>(); // those of the stage before
        if (thread == 0 && stage > stages.first)
          arrive(empty + before * 8);
        before = turn.slot;
        turn.advance(layout.stages);
      }
      wait_for_products<0>();
      if (thread == 0)
        arrive(empty + before * 8);

#pragma unroll
      for (int m = 0; m < Tile::kRowBlocks; ++m) {
        const int first_row = warp * 16, matrix_row = lane % 16;
        // Two units of 16 rows are four 8x8 matrices; where a lane's row of matrices j and j + 1 lies in 128-byte rows.
        const auto matrices = [&](int j) {
          return matrix_row * 128 + ((j + lane / 16) ^ (matrix_row % 8)) * kUnitBytes;
        };
        constexpr int kAddStagesPerBlock = Tile::kAddStages / Tile::kRowBlocks;
        RingTurn add_turn = turn;
        // One pass for each step, the branches between them: code that does not run is jumped over as a whole.
#pragma unroll
        for (int v = 0; v < kSums; ++v)
          sums[m][v] += bias[m][v / 2 % 2];
        if (adds) {
          uint32_t added = 0;
          // All stages of the block are waited for, so that all threads keep the ring's time.
#pragma unroll
          for (int s = 0; s < kAddStagesPerBlock; ++s) {
            wait(full + turn.slot * 8, turn.parity);
            if (first_row / Tile::kAddRows == s)
              added = ring + turn.slot * layout.stage_bytes + first_row % Tile::kAddRows * 128;
            turn.advance(layout.stages);
          }
#pragma unroll
          for (int z = 0; z < Tile::kSubTiles; ++z)
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
              uint32_t pairs[4];
              load_matrices(pairs, added + z * (Tile::kAddRows * 128) + matrices(j));
#pragma unroll
              for (int v = 0; v < 4; ++v) {
                const float2 both = Pair<T>::unpack(pairs[v]);
                const int at = (z * 8 + j) * 4 + v * 2;
                sums[m][at] += both.x, sums[m][at + 1] += both.y;
              }
            }
        }
        activate_rounded(call.activation, sums[m]);
        if (call.shape.window != 1) {
          constexpr int kPooled = Tile::kPooledUnits;
#pragma unroll
          for (int j = 0; j < kPooled; j += 2) {
            uint32_t packed[4];
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const int at = j * 4 + v * 2, part = kPooled * 4; // sums from one position of a window to the next
              const auto highest = [&](int a) {
                return max_keeping_nan(max_keeping_nan(sums[m][a], sums[m][a + part]),
                                       max_keeping_nan(sums[m][a + 2 * part], sums[m][a + 3 * part]));
              };
              packed[v] = Pair<T>::pack(highest(at), highest(at + 1));
            }
            store_matrices(staging + matrices(j), packed);
          }
          __syncwarp();
#pragma unroll
          for (int s = 0; s < 16 * kPooled / 32; ++s) {
            const int m_row = (s * 32 + lane) / kPooled, unit = lane % kPooled;
            const int at = fixed.row_at[pair][m * kBlockRows + first_row + m_row];
            const int stored = stored_at(call.shape, t * kPooled + unit);
            const uint4 eight = load_unit(staging + m_row * 128 + (unit ^ (m_row % 8)) * kUnitBytes);
            if (at >= 0 && stored >= 0)
              output[uint32_t(stored) + uint32_t(at)] = eight;
          }
          __syncwarp();
          continue; // nothing is added before a pooling
        }
#pragma unroll
        for (int z = 0; z < Tile::kSubTiles; ++z) {
          const int stored = stored_at(call.shape, t * Tile::kUnits + z * 8 + lane % 8);
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            uint32_t packed[4];
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const int at = (z * 8 + j) * 4 + v * 2;
              packed[v] = Pair<T>::pack(sums[m][at], sums[m][at + 1]);
            }
            store_matrices(staging + matrices(j), packed);
          }
          __syncwarp();
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const int m_row = s * 4 + lane / 8, at = row_at[m][s];
            const uint4 eight = load_unit(staging + m_row * 128 + ((lane % 8) ^ (m_row % 8)) * kUnitBytes);
            if (at >= 0 && stored >= 0)
              output[uint32_t(stored) + uint32_t(at)] = eight;
          }
          __syncwarp();
        }
        if (adds) {
          meet<kWarpgroup>(2 + pair);
          if (thread == 0)
#pragma unroll
            for (int s = 0; s < kAddStagesPerBlock; ++s, add_turn.advance(layout.stages))
              arrive(empty + add_turn.slot * 8);
        }
      }
    }
    meet<kWarpgroup>(2 + pair);
    if (thread == 0)
      arrive(shared_address(&fixed.weights_empty));
  }
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 3 - Tile::kPairs)
    tiled_wgmma_kernel(const WgmmaCall call, int position_tiles) {
  constexpr int kPairs = Tile::kPairs;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto &fixed = *reinterpret_cast<WgmmaFixed<Tile> *>(shared + kRingBytes<Tile>);
  const int thread = int(threadIdx.x);
  let_dependents_launch();
  if (thread < kPairs * kMostStages) {
    init_barrier(shared_address(&fixed.full[0][thread]), kWarpgroup);
    init_barrier(shared_address(&fixed.empty[0][thread]), 1);
  } else if (thread == kPairs * kMostStages) {
    init_barrier(shared_address(&fixed.weights_full), kPairs * kWarpgroup);
    init_barrier(shared_address(&fixed.weights_empty), kPairs);
  }
  fence_barriers();
  // By every warp for itself: that is sooner than by one for all.
  // Through shared memory, where each role reads what it needs: held in registers for both, it would go to local
  // memory, and a load from there waits for all stores before it.
  CtaShare &share = fixed.shares[thread / 32];
  const CtaShare found = share_tiles(call.weight, position_tiles);
  if (thread % 32 == 0)
    share = found;
  const WgmmaLayout layout = wgmma_layout<Tile>(found.most_columns);
  __syncthreads();
  if (thread >= kPairs * kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    produce<T, Tile>(call, share, layout, fixed, shared, position_tiles);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    consume<T, Tile>(call, share, layout, fixed, shared, position_tiles);
  }
}

} // namespace fxsparse::cuda
