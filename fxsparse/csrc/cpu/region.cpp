// Plans and drives a region.
#include "cpu/region.h"

#include <cstring>

#include "cpu/region_parts.h"
#include "cpu/team.h"

namespace fxsparse {
namespace {

// Phases of the team: the tables, then its own.
int64_t team_phases(const Region &r) { return 1 + int64_t(r.phases.size()); }

int64_t team_items(const Region &r) {
  int64_t most = r.threads;
  for (const Region::Phase &phase : r.phases)
    most = std::max(most, phase.items);
  return most;
}

int64_t team_bytes(const Region &r) { return Team::bytes(team_phases(r), team_items(r)); }

// Where the memory of a run begins: tables, then what a team waits by, then the workers' own.
struct Memory {
  char *prepared, *waiting, *workers;

  Memory(const Region &r, void *memory) {
    prepared = reinterpret_cast<char *>(align_up(reinterpret_cast<int64_t>(memory)));
    waiting = prepared + r.prepared_bytes;
    workers = waiting + align_up(team_bytes(r));
  }
};

// Share `item` of the tables of all steps.
void prepare(Region &r, char *memory, int64_t item) {
  int64_t turn = 0;
  for (size_t s = 0; s < r.steps.size(); ++s)
    for (Region::Chunk &chunk : r.chunks[s])
      if (turn++ % r.threads == item) {
        prepare_conv(chunk.plan, r.steps[s].weight, r.steps[s].bias, memory + chunk.at);
        decode_conv(chunk.plan, r.steps[s].weight, memory + chunk.at, 0, 1);
      }
}

} // namespace

bool add_chunk(Region &r, int64_t s, int64_t images, int64_t rows, int64_t threads) {
  for (const Region::Chunk &chunk : r.chunks[s])
    if (chunk.images == images && chunk.rows == rows)
      return true;
  Region::Chunk chunk = {images, rows, {}, r.prepared_bytes};
  ConvShape &shape = r.steps[s].conv;
  shape.batch = images;
  shape.stripe = r.steps[s].striped;
  shape.out_height = rows;
  if (plan_conv(shape, r.steps[s].weight, threads, chunk.plan) < 0)
    return false;
  r.prepared_bytes += align_up(chunk.plan.prepared_bytes);
  r.chunks[s].push_back(chunk);
  return true;
}

const Conv &chunk_plan(const Region &r, int64_t step, int64_t images, int64_t rows) {
  const auto fits = [=](const Region::Chunk &chunk) { return chunk.images == images && chunk.rows == rows; };
  return std::find_if(r.chunks[step].begin(), r.chunks[step].end(), fits)->plan;
}

int64_t plan_region(Region &region) {
  Region &r = region;
  r.whole_images = r.batch >= 2 * r.threads || r.batch % r.threads == 0;
  r.workers = r.whole_images ? std::min(r.threads, r.batch) : 1;
  r.arena_bytes = r.scratch_bytes = r.prepared_bytes = 0;
  r.phases.clear();
  r.chunks.assign(r.steps.size(), {});
  if (!(r.whole_images ? plan_images(r) : plan_team(r)))
    return -1;
  return kCacheLine + r.prepared_bytes + align_up(team_bytes(r)) + r.workers * (r.arena_bytes + r.scratch_bytes);
}

void run_region(Region &region, void *memory, ParallelFor parallel) {
  const Memory at(region, memory);
  std::memset(at.waiting, 0, team_bytes(region));
  Team team(at.waiting, team_phases(region), team_items(region), region.threads);
  const auto body = [&](int64_t me) {
    team.run(0, region.threads, me, [&](int64_t item) { prepare(region, at.prepared, item); });
    if (!region.whole_images)
      return run_team(region, at.workers, team, 1, me);
    if (me < region.workers)
      run_images(region, at.workers + me * (region.arena_bytes + region.scratch_bytes),
                 region.batch * me / region.workers, region.batch * (me + 1) / region.workers);
  };
  using Body = decltype(body);
  parallel(
      region.threads, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); },
      const_cast<void *>(static_cast<const void *>(&body)));
}

} // namespace fxsparse
