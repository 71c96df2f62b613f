// A region: convolutions and what stands between them, run as one call, with memory of its own for what lies between.
//
// Roofline: between layers a network is bound by memory. A worker takes a few images through many steps before it
// takes the next ones, so that what one step writes is in the cache when the next one reads it.
#pragma once

#include <string>
#include <vector>

#include "cpu/plan.h"

namespace fxsparse {

struct RegionValue {
  int64_t channels, height, width;
  const char *input; // the whole batch, contiguous, or null
  char *output;      // likewise
  // Of a value that is neither: so many images are kept, `at` bytes into a worker's memory.
  int64_t images, at;
};

enum class StepKind { kConv, kMaxPool, kAdd };

struct RegionStep {
  StepKind kind;
  int64_t input, add, output; // values; `add` may be -1
  Activation activation;
  ConvShape conv;
  PackedWeight weight;
  const void *bias;
  PoolShape pool;
  int64_t images; // taken at a time
};

struct Region {
  Dtype dtype;
  int64_t batch, threads;
  std::vector<RegionValue> values;
  std::vector<RegionStep> steps;
  // Set by plan_region.
  struct Chunk {
    int64_t images;
    Conv plan;
    int64_t at; // of its tables, in bytes
  };
  std::vector<std::vector<Chunk>> chunks; // of each step, by the number of images
  bool whole_images;                      // each worker has images of its own; else all share every step
  int64_t workers, phases, arena_bytes, scratch_bytes, prepared_bytes;
};

// Returns the bytes that run_region needs, or -1 if an image has more elements than the kernels' offsets reach.
int64_t plan_region(Region &region);

void run_region(Region &region, void *memory, ParallelFor parallel);

} // namespace fxsparse
