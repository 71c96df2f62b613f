// Whether a region stores its values in row lanes (cuda/row_lanes.h) or batch-innermost.
#pragma once

#include "cuda/row_lanes.h"
#include "region_program.h"

#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace fxsparse {

inline constexpr int64_t kFewImages = 8; // fewer leave some of eight lanes empty

// Measured on an H200: what a tile of 64 rows x 64 positions costs where there are more than multiprocessors, and what
// the launch of a small kernel costs, in nanoseconds.
inline constexpr double kTileCost = 5.4, kLaunchCost = 2000;

inline bool fits_row_lanes(const Program &program, cuda::TiledType type) {
  for (const ProgramValue &value : program.values) // the kernels count units of 16 bytes in 32 bits
    if (cuda::row_lanes_count({program.batch, value.channels, value.height, value.width}) / 4 > INT_MAX)
      return false;
  for (const ProgramStep &step : program.steps) {
    cuda::TiledConv conv = {};
    conv.geometry = cuda::on_row_lanes(step.conv);
    conv.type = type;
    if (step.kind == ProgramKind::kConv && cuda::tiled_conv2d_refusal(conv, 64) != nullptr)
      return false;
  }
  return true;
}

// What row lanes gain over batch-innermost images, in nanoseconds. Of few images most of eight lanes are padding; but
// in row lanes convolutions of several taps along a row need their input unfolded, and poolings launches of their own.
inline double gain_of_row_lanes(const Program &program) {
  double gain = 0;
  for (const ProgramStep &step : program.steps) {
    const Conv2dGeometry &g = step.conv;
    if (step.kind == ProgramKind::kConv) {
      const int64_t lanes = cuda::padded_batch(g.batch) * g.out_width - g.batch * cuda::padded_width(g.out_width);
      const double tiles = std::ceil(double(g.out_channels) / 64) * double(g.out_height * lanes) / 64;
      gain += kTileCost * tiles * (step.add >= 0 ? 2 : 1);
    }
    const bool launches =
        step.kind == ProgramKind::kMaxPool || (step.kind == ProgramKind::kConv && !cuda::reads_rows_as_they_lie(g));
    gain -= launches ? kLaunchCost : 0;
  }
  return gain;
}

// FXSPARSE_CUDA_ROW_LANES asks for them: "1" wherever they are possible, "auto" where they seem to gain. They are off
// unless it does: no device has measured them yet.
inline bool runs_in_row_lanes(const Program &program, cuda::TiledType type) {
  const char *asked = std::getenv("FXSPARSE_CUDA_ROW_LANES");
  if (asked == nullptr || *asked == '\0' || std::strcmp(asked, "0") == 0 || !fits_row_lanes(program, type))
    return false;
  return std::strcmp(asked, "auto") != 0 || (program.batch < kFewImages && gain_of_row_lanes(program) > 0);
}

} // namespace fxsparse
