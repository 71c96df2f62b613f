// The kernels of row_lanes.h. Each thread takes a unit: 16 bytes of lanes.
#pragma once

#include "row_lanes.h"

namespace fxsparse::cuda {

inline constexpr int kRowThreads = 256;

template <typename T> inline constexpr int kUnitLanes = 16 / int(sizeof(T));

// Units of images in row lanes, innermost first; counted in 32 bits, as in tiled_gather.h.
struct RowUnits {
  uint32_t lane_units, batch, channels, columns, count;
};

#ifdef __CUDACC__

struct RowUnit {
  uint32_t lane, image, channel, column, row; // `lane`: the first
};

template <typename T> __device__ __forceinline__ RowUnit row_unit(const RowUnits &units, uint32_t index) {
  RowUnit at;
  uint32_t rest = index / units.lane_units;
  at.lane = (index - rest * units.lane_units) * kUnitLanes<T>;
  const auto take = [&rest](uint32_t size) {
    const uint32_t quotient = rest / size, remainder = rest - quotient * size;
    rest = quotient;
    return remainder;
  };
  at.image = take(units.batch);
  at.channel = take(units.channels);
  at.column = take(units.columns);
  at.row = rest;
  return at;
}

template <typename T> union UnitOf {
  uint4 all;
  T lanes[kUnitLanes<T>];

  __device__ UnitOf() : all(make_uint4(0, 0, 0, 0)) {}
};

template <typename T>
__device__ __forceinline__ void unfold_unit(uint32_t index, const RowUnits &units, const ImageStrides &strides,
                                            const RowTaps &taps, int width, const T *__restrict__ input,
                                            uint4 *__restrict__ output) {
  const RowUnit at = row_unit<T>(units, index);
  const T *row = input + at.row * strides.row + at.channel * strides.channel + at.image * strides.image;
  const int first = int(at.lane) * int(taps.stride) + int(at.column) * int(taps.dilation) - int(taps.pad);
  UnitOf<T> unit;
#pragma unroll
  for (int i = 0; i < kUnitLanes<T>; ++i) {
    const int x = first + i * int(taps.stride);
    if (x >= 0 && x < width)
      unit.lanes[i] = row[x * strides.x];
  }
  output[index] = unit.all;
}

template <typename T>
__device__ __forceinline__ void leave_unit(uint32_t index, const RowUnits &units, const ImageStrides &strides,
                                           int width, const uint4 *__restrict__ input, T *__restrict__ output) {
  const RowUnit at = row_unit<T>(units, index);
  T *row = output + at.row * strides.row + at.channel * strides.channel + at.image * strides.image;
  UnitOf<T> unit;
  unit.all = input[index];
#pragma unroll
  for (int i = 0; i < kUnitLanes<T>; ++i)
    if (int(at.lane) + i < width)
      row[(int(at.lane) + i) * strides.x] = unit.lanes[i];
}

// `units` and `index` are of the output; a NaN wins, as in torch.
template <typename T>
__device__ __forceinline__ void pool_unit(uint32_t index, const RowUnits &units, const ImageStrides &strides,
                                          const MaxPool &pool, const T *__restrict__ input,
                                          uint4 *__restrict__ output) {
  const RowUnit at = row_unit<T>(units, index);
  const T *plane = input + at.channel * strides.channel + at.image * strides.image;
  const int height = int(pool.in.height), width = int(pool.in.width);
  const int top = int(at.row) * int(pool.stride[0]) - int(pool.pad[0]);
  UnitOf<T> unit;
  for (int i = 0; i < kUnitLanes<T>; ++i) {
    const int left = (int(at.lane) + i) * int(pool.stride[1]) - int(pool.pad[1]);
    float most = -__int_as_float(0x7f800000);
    for (int r = 0; r < int(pool.kernel[0]); ++r)
      for (int s = 0; s < int(pool.kernel[1]); ++s) {
        const int y = top + r * int(pool.dilation[0]), x = left + s * int(pool.dilation[1]);
        if (y < 0 || y >= height || x < 0 || x >= width)
          continue;
        const float value = float(plane[y * strides.row + x]);
        if (value > most || value != value)
          most = value;
      }
    unit.lanes[i] = T(most);
  }
  output[index] = unit.all;
}

#endif // __CUDACC__

} // namespace fxsparse::cuda
