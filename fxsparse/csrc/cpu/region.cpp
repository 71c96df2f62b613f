// Plans and drives a region.
#include "cpu/region.h"

#include <algorithm>
#include <cstring>

#include "cpu/team.h"
#include "memory_plan.h"

namespace fxsparse {
namespace {

// What a step reads and writes for the images that it takes at a time: about an L2 cache.
constexpr int64_t kCacheBytes = 1536 * 1024;
// Output positions of the images taken at a time: enough to fill tiles, and to use a weight often once it is loaded.
constexpr int64_t kPositions = 4096;
constexpr int64_t kAlignment = 64;

int64_t align_up(int64_t a) { return (a + kAlignment - 1) / kAlignment * kAlignment; }

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

int64_t image_bytes(const Region &r, int64_t value) {
  const RegionValue &v = r.values[value];
  return v.channels * v.height * v.width * element_bytes(r.dtype);
}

bool is_own(const RegionValue &value) { return value.input == nullptr && value.output == nullptr; }

// How many images each step takes at a time: more where planes are small. A step takes at least as many as the steps
// before it, which then run several times for it.
void choose_images(Region &r) {
  const int64_t share = (r.batch + r.workers - 1) / r.workers;
  int64_t most = share;
  for (size_t i = r.steps.size(); i-- > 0;) {
    RegionStep &step = r.steps[i];
    if (!r.whole_images) {
      step.images = r.batch;
      continue;
    }
    const RegionValue &out = r.values[step.output];
    const int64_t bytes =
        image_bytes(r, step.input) + image_bytes(r, step.output) + (step.add < 0 ? 0 : image_bytes(r, step.add));
    const int64_t fit = kCacheBytes / std::max<int64_t>(bytes, 1);
    const int64_t useful = kPositions / std::max<int64_t>(out.height * out.width, 1);
    const int64_t wanted = std::clamp<int64_t>(std::min(fit, useful), 1, most);
    step.images = 1;
    while (2 * step.images <= wanted) // powers of two: chunks of one step are whole chunks of the ones before
      step.images *= 2;
    most = step.images;
  }
}

// The value that a step may write its result over: one that it alone reads then, position by position; or -1.
int64_t overwritten(const Region &r, const RegionStep &step) {
  const int64_t value = step.kind == StepKind::kAdd && step.add < 0 ? step.input : step.add;
  return value >= 0 && (step.kind == StepKind::kAdd || value != step.input) && is_own(r.values[value]) ? value : -1;
}

// Places values that are alive at the same time apart. A sum takes the place of what is added: to read and write the
// same lines halves the traffic.
void place_values(Region &r) {
  const int64_t count = int64_t(r.values.size());
  std::vector<int64_t> made(count, -1), read(count, -1), place(count);
  for (int64_t i = 0; i < int64_t(r.steps.size()); ++i) {
    made[r.steps[i].output] = i;
    for (const int64_t value : {r.steps[i].input, r.steps[i].add})
      if (value >= 0)
        read[value] = i;
  }
  std::vector<Life> lives(count);
  for (int64_t v = 0; v < count; ++v) {
    RegionValue &value = r.values[v];
    place[v] = v;
    if (!is_own(value) || made[v] < 0)
      continue;
    const int64_t last = std::max(read[v], made[v]), images = r.steps[made[v]].images;
    value.images = r.steps[last].images;
    // What a step with larger chunks reads is made bit by bit, while the steps before it run again and again.
    lives[v] = {images < value.images ? 0 : made[v], last, 0, align_up(value.images * image_bytes(r, v))};
    const int64_t over = overwritten(r, r.steps[made[v]]);
    if (over < 0 || made[over] < 0 || read[over] != made[v] || value.images != images ||
        r.values[over].images != images || r.steps[made[over]].images != images)
      continue;
    place[v] = place[over];
    lives[place[v]].last = last;
    lives[v].bytes = 0;
  }
  r.arena_bytes = place_lives(lives);
  for (int64_t v = 0; v < count; ++v)
    r.values[v].at = lives[place[v]].at;
}

// Plans a step for every number of images that it will be given; false if an image is too large.
bool plan_chunks(Region &r, int64_t s) {
  RegionStep &step = r.steps[s];
  int64_t phases = 1; // of a team
  if (step.kind == StepKind::kMaxPool)
    r.scratch_bytes = std::max(r.scratch_bytes, align_up(step.pool.row_elements * accumulator_bytes(r.dtype)) *
                                                    (r.whole_images ? 1 : r.threads));
  if (step.kind == StepKind::kConv) {
    const int64_t least = r.whole_images ? r.batch / r.workers : 0;
    for (const int64_t images : {step.images, least % step.images, r.whole_images ? (least + 1) % step.images : 0}) {
      const auto known = [images](const Region::Chunk &chunk) { return chunk.images == images; };
      if (images == 0 || std::any_of(r.chunks[s].begin(), r.chunks[s].end(), known))
        continue;
      Region::Chunk chunk = {images, {}, r.prepared_bytes};
      step.conv.batch = images;
      if (plan_conv(step.conv, step.weight, r.whole_images ? 1 : r.threads, chunk.plan) < 0)
        return false;
      r.prepared_bytes += align_up(chunk.plan.prepared_bytes);
      r.scratch_bytes = std::max(r.scratch_bytes, align_up(chunk.plan.working_bytes));
      r.chunks[s].push_back(chunk);
    }
    phases = conv_phases(r.chunks[s][0].plan);
  }
  if (!r.whole_images)
    r.phases += phases;
  return true;
}

// Where the memory of a run begins: tables, then what a team waits by, then the workers' own.
struct Memory {
  char *prepared, *waiting, *workers;

  Memory(const Region &r, void *memory) {
    prepared = reinterpret_cast<char *>(align_up(reinterpret_cast<int64_t>(memory)));
    waiting = prepared + r.prepared_bytes;
    workers = waiting + align_up(Team::bytes(r.phases, r.threads));
  }
};

class Run {
public:
  // `memory`: of a worker that has images from `first_image` on, or of all workers.
  Run(const Region &region, char *memory, int64_t first_image)
      : r_(region), arena_(memory), scratch_(memory + region.arena_bytes), first_image_(first_image) {}

  // Steps [0, end) on images [first, first + count), by one worker.
  void alone(int64_t end, int64_t first, int64_t count) const {
    if (end == 0)
      return;
    const int64_t images = r_.steps[end - 1].images;
    int64_t begin = end - 1;
    while (begin > 0 && r_.steps[begin - 1].images == images)
      --begin;
    for (int64_t n = first; n < first + count; n += images) {
      const int64_t taken = std::min(images, first + count - n);
      alone(begin, n, taken);
      for (int64_t s = begin; s < end; ++s) {
        if (r_.steps[s].kind != StepKind::kConv) {
          between(s, n, taken, 0, 1);
          continue;
        }
        const Conv &plan = this->plan(s, taken);
        for (int64_t phase = 0; phase < conv_phases(plan); ++phase)
          run_conv_phase(plan, tensors(s, n), scratch_, phase, 0);
      }
    }
  }

  // All steps on all images, by a team from `phase` on.
  void together(Team &team, int64_t phase, int64_t me) const {
    for (int64_t s = 0; s < int64_t(r_.steps.size()); ++s) {
      if (r_.steps[s].kind != StepKind::kConv) {
        team.run(phase++, r_.threads, me, [&](int64_t item) { between(s, 0, r_.batch, item, r_.threads); });
        continue;
      }
      const Conv &plan = this->plan(s, r_.batch);
      const ConvTensors given = tensors(s, 0);
      for (int64_t p = 0; p < conv_phases(plan); ++p)
        team.run(phase++, plan.workers, me, [&](int64_t item) { run_conv_phase(plan, given, scratch_, p, item); });
    }
  }

private:
  const Conv &plan(int64_t s, int64_t images) const {
    const auto fits = [images](const Region::Chunk &chunk) { return chunk.images == images; };
    return std::find_if(r_.chunks[s].begin(), r_.chunks[s].end(), fits)->plan;
  }

  char *place(int64_t v, int64_t n) const {
    if (v < 0)
      return nullptr;
    const RegionValue &value = r_.values[v];
    const int64_t bytes = image_bytes(r_, v);
    if (value.input != nullptr)
      return const_cast<char *>(value.input) + n * bytes;
    if (value.output != nullptr)
      return value.output + n * bytes;
    return arena_ + value.at + (n - first_image_) % value.images * bytes;
  }

  ConvTensors tensors(int64_t s, int64_t n) const {
    const RegionStep &step = r_.steps[s];
    return {place(step.input, n), step.bias, place(step.add, n), place(step.output, n)};
  }

  // Share `worker` of a step that is no convolution.
  void between(int64_t s, int64_t n, int64_t images, int64_t worker, int64_t workers) const {
    const RegionStep &step = r_.steps[s];
    const KernelSet &kernels = kernels_for(r_.dtype);
    const RegionValue &in = r_.values[step.input], &out = r_.values[step.output];
    const int64_t planes = images * in.channels;
    const int64_t first = planes * worker / workers, count = planes * (worker + 1) / workers - first;
    const int64_t element = element_bytes(r_.dtype), skipped = first * in.height * in.width * element;
    const char *input = place(step.input, n) + skipped, *add = place(step.add, n);
    char *output = place(step.output, n) + first * out.height * out.width * element;
    if (step.kind == StepKind::kMaxPool)
      kernels.max_pool(step.pool, input, output, count,
                       scratch_ + worker * align_up(step.pool.row_elements * accumulator_bytes(r_.dtype)));
    else
      kernels.add_activate(input, add ? add + skipped : nullptr, output, count * out.height * out.width,
                           step.activation);
  }

  const Region &r_;
  char *const arena_, *const scratch_;
  const int64_t first_image_;
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

int64_t plan_region(Region &region) {
  Region &r = region;
  r.whole_images = r.batch >= 2 * r.threads || r.batch % r.threads == 0;
  r.workers = r.whole_images ? std::min(r.threads, r.batch) : 1;
  r.arena_bytes = r.scratch_bytes = r.prepared_bytes = 0;
  r.phases = 1; // the tables
  r.chunks.assign(r.steps.size(), {});
  choose_images(r);
  place_values(r);
  for (int64_t s = 0; s < int64_t(r.steps.size()); ++s)
    if (!plan_chunks(r, s))
      return -1;
  return kAlignment + r.prepared_bytes + align_up(Team::bytes(r.phases, r.threads)) +
         r.workers * (r.arena_bytes + r.scratch_bytes);
}

void run_region(Region &region, void *memory, ParallelFor parallel) {
  const Memory at(region, memory);
  std::memset(at.waiting, 0, Team::bytes(region.phases, region.threads));
  Team team(at.waiting, region.phases, region.threads);
  const auto body = [&](int64_t me) {
    team.run(0, region.threads, me, [&](int64_t item) { prepare(region, at.prepared, item); });
    if (!region.whole_images)
      return Run(region, at.workers, 0).together(team, 1, me);
    if (me >= region.workers)
      return;
    const int64_t first = region.batch * me / region.workers, last = region.batch * (me + 1) / region.workers;
    char *own = at.workers + me * (region.arena_bytes + region.scratch_bytes);
    Run(region, own, first).alone(int64_t(region.steps.size()), first, last - first);
  };
  using Body = decltype(body);
  parallel(
      region.threads, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); },
      const_cast<void *>(static_cast<const void *>(&body)));
}

} // namespace fxsparse
