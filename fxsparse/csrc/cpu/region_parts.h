// What both ways to run a region share.
#pragma once

#include <algorithm>

#include "cpu/region.h"
#include "memory_plan.h"

namespace fxsparse {

class Team;

constexpr int64_t kCacheLine = 64;

inline int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }
inline int64_t align_up(int64_t a) { return round_up(a, kCacheLine); }

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
inline int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

inline bool is_own(const RegionValue &value) { return value.input == nullptr && value.output == nullptr; }

inline int64_t image_bytes(const Region &r, int64_t value) {
  return r.values[value].channels * r.values[value].plane * element_bytes(r.dtype);
}

inline int64_t pool_bytes(const Region &r, const RegionStep &step) {
  return align_up(step.pool.row_elements * accumulator_bytes(r.dtype));
}

// The value that a step may write its result over: one that it alone reads then, position by position; or -1.
inline int64_t overwritten(const Region &r, const RegionStep &step) {
  const int64_t value = step.kind == StepKind::kAdd && step.add < 0 ? step.input : step.add;
  return value >= 0 && (step.kind == StepKind::kAdd || value != step.input) && is_own(r.values[value]) ? value : -1;
}

// For every value, the step that makes it and the last one that reads it, or -1.
struct Uses {
  std::vector<int64_t> made, read;

  explicit Uses(const Region &r) : made(r.values.size(), -1), read(r.values.size(), -1) {
    for (int64_t i = 0; i < int64_t(r.steps.size()); ++i) {
      made[r.steps[i].output] = i;
      for (const int64_t value : {r.steps[i].input, r.steps[i].add})
        if (value >= 0)
          read[value] = i;
    }
  }
};

// Places values that are alive at the same time apart. A sum takes the place of what is added, where nothing reads that
// later and can_take(sum, added) allows it: to read and write the same lines halves the traffic. life_of(value): when
// it is alive, and its bytes.
template <class LifeOf, class CanTake>
void place_values(Region &r, const Uses &uses, const LifeOf &life_of, const CanTake &can_take) {
  const int64_t count = int64_t(r.values.size());
  std::vector<int64_t> place(count);
  std::vector<Life> lives(count);
  for (int64_t v = 0; v < count; ++v) {
    place[v] = v;
    if (!is_own(r.values[v]) || uses.made[v] < 0)
      continue;
    lives[v] = life_of(v);
    const int64_t over = overwritten(r, r.steps[uses.made[v]]);
    if (over < 0 || uses.made[over] < 0 || uses.read[over] != uses.made[v] || !can_take(v, over))
      continue;
    place[v] = place[over];
    lives[place[v]].last = lives[v].last;
    lives[v].bytes = 0;
  }
  r.arena_bytes = place_lives(lives);
  for (int64_t v = 0; v < count; ++v)
    r.values[v].at = lives[place[v]].at;
}

// Plans a convolution for so many images or, of a stripe, output rows, unless that has been done; false if an image is
// too large.
bool add_chunk(Region &r, int64_t step, int64_t images, int64_t rows, int64_t threads);

// The plan for as much.
const Conv &chunk_plan(const Region &r, int64_t step, int64_t images, int64_t rows);

// Fill the plan of a region; false if an image is too large.
bool plan_images(Region &r);
bool plan_team(Region &r);

// All steps on the images [first, last), by one worker with memory of arena_bytes + scratch_bytes.
void run_images(const Region &r, char *memory, int64_t first, int64_t last);

// All steps on all images, by a team that shares such memory; the team's phases from `phase` on.
void run_team(const Region &r, char *memory, Team &team, int64_t phase, int64_t me);

} // namespace fxsparse
