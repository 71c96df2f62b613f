// Plans and drives a region.
#include "cpu/region.h"

#include <algorithm>

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

struct Life {
  int64_t first, last, at, bytes;
};

// Places values that are alive at the same time apart.
void place_values(Region &r) {
  const int64_t count = int64_t(r.values.size());
  std::vector<int64_t> made(count, -1), read(count, -1);
  for (int64_t i = 0; i < int64_t(r.steps.size()); ++i) {
    made[r.steps[i].output] = i;
    for (const int64_t value : {r.steps[i].input, r.steps[i].add})
      if (value >= 0)
        read[value] = i;
  }
  std::vector<Life> lives;
  for (int64_t v = 0; v < count; ++v) {
    RegionValue &value = r.values[v];
    if (!is_own(value) || made[v] < 0)
      continue;
    const int64_t last = std::max(read[v], made[v]);
    value.images = r.steps[last].images;
    // What a step with larger chunks reads is made bit by bit, while the steps before it run again and again.
    const int64_t first = r.steps[made[v]].images < value.images ? 0 : made[v];
    Life life = {first, last, 0, align_up(value.images * image_bytes(r, v))};
    std::vector<Life> beside;
    for (const Life &other : lives)
      if (other.first <= life.last && life.first <= other.last)
        beside.push_back(other);
    std::sort(beside.begin(), beside.end(), [](const Life &a, const Life &b) { return a.at < b.at; });
    for (const Life &other : beside)
      if (life.at + life.bytes > other.at)
        life.at = std::max(life.at, other.at + other.bytes);
    value.at = life.at;
    r.arena_bytes = std::max(r.arena_bytes, life.at + life.bytes);
    lives.push_back(life);
  }
}

// Plans a step for every number of images that it will be given; false if an image is too large.
bool plan_chunks(Region &r, int64_t s) {
  RegionStep &step = r.steps[s];
  if (step.kind == StepKind::kMaxPool)
    r.scratch_bytes = std::max(r.scratch_bytes, step.pool.row_elements * accumulator_bytes(r.dtype));
  if (step.kind != StepKind::kConv)
    return true;
  const int64_t least = r.batch / r.workers;
  for (const int64_t images : {step.images, least % step.images, (least + 1) % step.images}) {
    const auto known = [images](const Region::Chunk &chunk) { return chunk.images == images; };
    if (images == 0 || std::any_of(r.chunks[s].begin(), r.chunks[s].end(), known))
      continue;
    Region::Chunk chunk = {images, {}};
    step.conv.batch = images;
    const int64_t bytes = plan_conv(step.conv, step.weight, r.whole_images ? 1 : r.threads, chunk.plan);
    if (bytes < 0)
      return false;
    r.scratch_bytes = std::max(r.scratch_bytes, bytes);
    r.chunks[s].push_back(chunk);
  }
  return true;
}

void serially(int64_t workers, void (*body)(int64_t worker, void *context), void *context) {
  for (int64_t worker = 0; worker < workers; ++worker)
    body(worker, context);
}

// One worker's run, or, where images are shared, that of all of them.
class Run {
public:
  Run(const Region &region, char *memory, int64_t first_image, ParallelFor parallel)
      : r_(region), arena_(memory), scratch_(memory + region.arena_bytes), first_image_(first_image),
        parallel_(parallel) {}

  // Steps [0, end) on images [first, first + count).
  void run(int64_t end, int64_t first, int64_t count) const {
    if (end == 0)
      return;
    const int64_t images = r_.steps[end - 1].images;
    int64_t begin = end - 1;
    while (begin > 0 && r_.steps[begin - 1].images == images)
      --begin;
    for (int64_t n = first; n < first + count; n += images) {
      const int64_t taken = std::min(images, first + count - n);
      run(begin, n, taken);
      for (int64_t s = begin; s < end; ++s)
        step(s, n, taken);
    }
  }

private:
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

  void step(int64_t s, int64_t n, int64_t images) const {
    const RegionStep &step = r_.steps[s];
    char *input = place(step.input, n), *add = place(step.add, n), *output = place(step.output, n);
    if (step.kind == StepKind::kConv) {
      Conv plan = std::find_if(r_.chunks[s].begin(), r_.chunks[s].end(), [images](const Region::Chunk &chunk) {
                    return chunk.images == images;
                  })->plan;
      run_conv(plan, step.weight, {input, step.bias, add, output}, scratch_, parallel_);
      return;
    }
    const KernelSet &kernels = kernels_for(r_.dtype);
    const RegionValue &in = r_.values[step.input], &out = r_.values[step.output];
    const int64_t workers = r_.whole_images ? 1 : r_.threads, planes = images * in.channels;
    const int64_t element = element_bytes(r_.dtype), in_plane = in.height * in.width * element,
                  out_plane = out.height * out.width * element;
    const auto body = [&](int64_t worker) {
      const int64_t first = planes * worker / workers, count = planes * (worker + 1) / workers - first;
      char *to = output + first * out_plane;
      if (step.kind == StepKind::kMaxPool)
        kernels.max_pool(step.pool, input + first * in_plane, to, count, scratch_ + worker * row_bytes(step));
      else
        kernels.add_activate(input + first * in_plane, add ? add + first * in_plane : nullptr, to,
                             count * out.height * out.width, step.activation);
    };
    using Body = decltype(body);
    parallel_(
        workers, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); },
        const_cast<void *>(static_cast<const void *>(&body)));
  }

  int64_t row_bytes(const RegionStep &step) const {
    return align_up(step.pool.row_elements * accumulator_bytes(r_.dtype));
  }

  const Region &r_;
  char *const arena_, *const scratch_;
  const int64_t first_image_;
  const ParallelFor parallel_;
};

} // namespace

int64_t plan_region(Region &region) {
  Region &r = region;
  r.whole_images = r.batch >= 2 * r.threads || r.batch % r.threads == 0;
  r.workers = r.whole_images ? std::min(r.threads, r.batch) : 1;
  r.arena_bytes = r.scratch_bytes = 0;
  r.chunks.assign(r.steps.size(), {});
  choose_images(r);
  place_values(r);
  for (int64_t s = 0; s < int64_t(r.steps.size()); ++s)
    if (!plan_chunks(r, s))
      return -1;
  // Where images are shared, every thread has a row for pooling.
  r.scratch_bytes = align_up(r.scratch_bytes) * (r.whole_images ? 1 : r.threads);
  return r.workers * (r.arena_bytes + r.scratch_bytes) + kAlignment;
}

void run_region(const Region &region, void *memory, ParallelFor parallel) {
  const int64_t steps = int64_t(region.steps.size()), each = region.arena_bytes + region.scratch_bytes;
  auto *aligned = reinterpret_cast<char *>(align_up(reinterpret_cast<int64_t>(memory)));
  if (!region.whole_images)
    return Run(region, aligned, 0, parallel).run(steps, 0, region.batch);
  const auto body = [&](int64_t worker) {
    const int64_t first = region.batch * worker / region.workers, last = region.batch * (worker + 1) / region.workers;
    Run(region, aligned + worker * each, first, serially).run(steps, first, last - first);
  };
  using Body = decltype(body);
  parallel(
      region.workers, [](int64_t worker, void *context) { (*static_cast<Body *>(context))(worker); },
      const_cast<void *>(static_cast<const void *>(&body)));
}

} // namespace fxsparse
