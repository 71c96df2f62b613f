// A region on images of which each worker has its own: a few at a time through many steps.
#include "cpu/region_parts.h"

namespace fxsparse {
namespace {

// What a step reads and writes for the images that it takes at a time: about an L2 cache.
constexpr int64_t kCacheBytes = 1536 * 1024;
// Output positions of the images taken at a time: enough to fill tiles, and to use a weight often once it is loaded.
constexpr int64_t kPositions = 4096;

// How many images each step takes at a time: more where planes are small. A step takes at least as many as the steps
// before it, which then run several times for it.
void choose_images(Region &r) {
  int64_t most = (r.batch + r.workers - 1) / r.workers;
  for (size_t i = r.steps.size(); i-- > 0;) {
    RegionStep &step = r.steps[i];
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

// Places values by the steps between which they live.
void place_by_steps(Region &r) {
  const Uses uses(r);
  place_values(
      r, uses,
      [&](int64_t v) {
        RegionValue &value = r.values[v];
        const int64_t made = uses.made[v], last = std::max(uses.read[v], made);
        value.images = r.steps[last].images;
        // What a step with larger chunks reads is made bit by bit, while the steps before it run again and again.
        const int64_t first = r.steps[made].images < value.images ? 0 : made;
        return Life{first, last, 0, align_up(value.images * image_bytes(r, v))};
      },
      [&](int64_t v, int64_t over) {
        const int64_t images = r.steps[uses.made[v]].images;
        return r.values[v].images == images && r.values[over].images == images &&
               r.steps[uses.made[over]].images == images;
      });
}

class Run {
public:
  Run(const Region &region, char *memory, int64_t first_image)
      : r_(region), arena_(memory), scratch_(memory + region.arena_bytes), first_image_(first_image) {}

  // Steps [0, end) on images [first, first + count).
  void steps(int64_t end, int64_t first, int64_t count) const {
    if (end == 0)
      return;
    const int64_t images = r_.steps[end - 1].images;
    int64_t begin = end - 1;
    while (begin > 0 && r_.steps[begin - 1].images == images)
      --begin;
    for (int64_t n = first; n < first + count; n += images) {
      const int64_t taken = std::min(images, first + count - n);
      steps(begin, n, taken);
      for (int64_t s = begin; s < end; ++s)
        r_.steps[s].kind == StepKind::kConv ? conv(s, n, taken) : between(r_.steps[s], n, taken);
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

  void conv(int64_t s, int64_t n, int64_t images) const {
    const RegionStep &step = r_.steps[s];
    const RegionValue &in = r_.values[step.input];
    const InputRows rows = {place(step.input, n), 0, in.height};
    const ConvTensors tensors = {&rows, 1, 0, step.bias, place(step.add, n), place(step.output, n)};
    const Conv &plan = chunk_plan(r_, s, images, r_.values[step.output].height);
    for (int64_t phase = 0; phase < conv_phases(plan); ++phase)
      run_conv_phase(plan, tensors, scratch_, phase, 0, 1, 0);
  }

  void between(const RegionStep &step, int64_t n, int64_t images) const {
    const KernelSet &kernels = kernels_for(r_.dtype);
    const RegionValue &in = r_.values[step.input], &out = r_.values[step.output];
    const int64_t planes = images * in.channels;
    const char *input = place(step.input, n);
    char *output = place(step.output, n);
    if (step.kind == StepKind::kMaxPool)
      kernels.max_pool(step.pool, {planes, in.plane, out.plane, 0, out.height}, input, output, scratch_);
    else if (step.kind == StepKind::kAverage)
      kernels.average(in.height * in.width, {planes, in.plane, out.plane, 0, 1}, input, output);
    else
      kernels.add_activate(input, place(step.add, n), output, planes * out.plane, step.activation);
  }

  const Region &r_;
  char *const arena_, *const scratch_;
  const int64_t first_image_;
};

} // namespace

bool plan_images(Region &r) {
  choose_images(r);
  place_by_steps(r);
  const int64_t share = r.batch / r.workers; // of some workers; the others have one more
  for (int64_t s = 0; s < int64_t(r.steps.size()); ++s) {
    const RegionStep &step = r.steps[s];
    if (step.kind == StepKind::kMaxPool)
      r.scratch_bytes = std::max(r.scratch_bytes, pool_bytes(r, step));
    if (step.kind != StepKind::kConv)
      continue;
    for (const int64_t images : {step.images, share % step.images, (share + 1) % step.images})
      if (images > 0 && !add_chunk(r, s, images, r.values[step.output].height, 1))
        return false;
    for (const Region::Chunk &chunk : r.chunks[s])
      r.scratch_bytes = std::max(r.scratch_bytes, align_up(chunk.plan.working_bytes));
  }
  return true;
}

void run_images(const Region &r, char *memory, int64_t first, int64_t last) {
  Run(r, memory, first).steps(int64_t(r.steps.size()), first, last - first);
}

} // namespace fxsparse
