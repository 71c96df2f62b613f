// A region: convolutions and what stands between them, run as one call, with memory of its own for what lies between.
//
// Roofline: between layers a network is bound by memory. With an image or more for every worker, each takes a few of
// its own through many steps before it takes the next ones, so that what one step writes is in the cache when the next
// one reads it (region_images.cpp). With fewer, a team shares every step (region_team.cpp).
#pragma once

#include <string>
#include <vector>

#include "cpu/plan.h"

namespace fxsparse {

struct RegionValue {
  int64_t channels, height, width;
  const char *input; // the whole batch, contiguous, or null
  char *output;      // likewise
  // Of a value that is neither: where it is kept, in bytes from where such values begin.
  int64_t at;
  int64_t plane;       // elements from channel to channel
  int64_t images;      // a worker keeps so many
  int64_t share_bytes; // of a value that is split among a team by its rows: what one has, or 0
};

enum class StepKind { kConv, kMaxPool, kAdd, kAverage };

struct RegionStep {
  StepKind kind;
  int64_t input, add, output; // values; `add` may be -1
  Activation activation;
  ConvShape conv;
  PackedWeight weight;
  const void *bias;
  PoolShape pool;
  int64_t images; // taken at a time
  bool striped;   // each of a team computes some rows of the output, from its own rows of the input and a few others
};

struct Region {
  Dtype dtype;
  int64_t batch, threads;
  std::vector<RegionValue> values;
  std::vector<RegionStep> steps;
  // Set by plan_region.
  struct Chunk {
    int64_t images, rows; // what it is planned for; rows of the output
    Conv plan;
    int64_t at; // of its tables, in bytes
  };
  std::vector<std::vector<Chunk>> chunks; // of each step
  struct Phase {
    int64_t first, last; // steps: several where they are striped
    int64_t conv_phase, items;
  };
  std::vector<Phase> phases; // of a team; none begins before the one before it has ended
  bool whole_images;         // each worker has images of its own
  int64_t workers, arena_bytes, scratch_bytes, prepared_bytes;
};

// Returns the bytes that run_region needs, or -1 if an image has more elements than the kernels' offsets reach.
int64_t plan_region(Region &region);

void run_region(Region &region, void *memory, ParallelFor parallel);

} // namespace fxsparse
