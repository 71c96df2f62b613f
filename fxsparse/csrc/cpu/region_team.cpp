// A region on so few images that a team shares every step.
//
// Roofline: a line of the cache that the other core has written comes at a fifth of the rate of one's own L2, and to
// write to it costs twice that again. So a step is striped where that moves less: each of the team computes the same
// rows of every value, in a share of its own, reads what its neighbours have of the rows around, and waits for them
// only before such rows are read. It reads all of the weight, though, so small planes under large weights are shared
// out by the rows of the weight instead.
#include "cpu/region_parts.h"
#include "cpu/team.h"

namespace fxsparse {
namespace {

// A stripe has at least so many rows, and reads those of at most so many others.
constexpr int64_t kLeastRows = 2, kMostOthers = 8;

int64_t first_row(int64_t height, int64_t threads, int64_t worker) { return height * worker / threads; }

struct RowRange {
  int64_t first, last;
};

RowRange rows_of(const Region &r, int64_t value, int64_t worker) {
  const int64_t height = r.values[value].height;
  return {first_row(height, r.threads, worker), first_row(height, r.threads, worker + 1)};
}

// Rows of its input that a step reads for rows of its output.
RowRange rows_read(const Region &r, const RegionStep &step, RowRange out) {
  if (step.kind == StepKind::kAdd || out.first == out.last)
    return out;
  const bool conv = step.kind == StepKind::kConv;
  const int64_t kernel = conv ? step.conv.kernel[0] : step.pool.kernel[0],
                stride = conv ? step.conv.stride[0] : step.pool.stride[0],
                dilation = conv ? step.conv.dilation[0] : step.pool.dilation[0],
                pad = conv ? step.conv.pad[0] : step.pool.pad[0], height = r.values[step.input].height;
  const int64_t first = std::clamp<int64_t>(out.first * stride - pad, 0, height),
                last = (out.last - 1) * stride - pad + (kernel - 1) * dilation + 1;
  return {first, std::clamp(last, first, height)};
}

// Whether some stripe reads rows of its input that are not its own.
bool reads_others(const Region &r, const RegionStep &step) {
  for (int64_t w = 0; w < r.threads; ++w) {
    const RowRange rows = rows_read(r, step, rows_of(r, step.output, w)), own = rows_of(r, step.input, w);
    if (rows.first < rows.last && (rows.first < own.first || rows.last > own.last))
      return true;
  }
  return false;
}

// Shares of the input that a stripe reads, at most.
int64_t shares_read(const Region &r, const RegionStep &step) {
  int64_t most = 0;
  for (int64_t w = 0; w < r.threads; ++w) {
    const RowRange rows = rows_read(r, step, rows_of(r, step.output, w));
    int64_t shares = 0;
    for (int64_t other = 0; other < r.threads; ++other) {
      const RowRange own = rows_of(r, step.input, other);
      shares += std::max(rows.first, own.first) < std::min(rows.last, own.last);
    }
    most = std::max(most, shares);
  }
  return most;
}

bool conv_is_striped(const Region &r, const RegionStep &step) {
  const ConvShape &s = step.conv;
  const bool grouped = s.weight_columns != s.channels * s.kernel[0] * s.kernel[1];
  if (s.mode != PaddingMode::kZeros || (grouped && !has_depthwise_kernel(s)) || s.out_height < kLeastRows * r.threads)
    return false;
  // What a stripe reads of the weight beyond a share of it, against what it would read and write of others' values.
  const int64_t values = s.batch * (s.channels * s.height * s.width + s.out_channels * s.out_height * s.out_width);
  return step.weight.num_values <= values;
}

void choose_stripes(Region &r) {
  std::vector<bool> wanted(r.values.size(), false); // by a striped convolution
  for (RegionStep &step : r.steps) {
    step.striped = step.kind == StepKind::kConv && conv_is_striped(r, step);
    if (step.striped)
      wanted[step.input] = true;
  }
  const Uses uses(r);
  for (RegionStep &step : r.steps) {
    const int64_t made = uses.made[step.input];
    if (step.kind != StepKind::kConv && r.values[step.output].height >= kLeastRows * r.threads)
      step.striped = (made >= 0 && r.steps[made].striped) || wanted[step.output];
  }
}

// Splits what only striped steps read and write, and begins all other planes at a line of the cache: no two of the team
// write to one line.
void choose_planes(Region &r) {
  const Uses uses(r);
  std::vector<bool> split(r.values.size(), false);
  for (size_t v = 0; v < r.values.size(); ++v)
    split[v] = is_own(r.values[v]) && uses.made[v] >= 0 && r.steps[uses.made[v]].striped;
  for (const RegionStep &step : r.steps) {
    const auto reads_few = [&] {
      return step.kind == StepKind::kConv ? shares_read(r, step) <= kMostOthers : !reads_others(r, step);
    };
    if (!step.striped || !reads_few())
      split[step.input] = false;
    if (!step.striped && step.add >= 0)
      split[step.add] = false;
  }
  const int64_t line = kCacheLine / element_bytes(r.dtype);
  for (size_t v = 0; v < r.values.size(); ++v) {
    RegionValue &value = r.values[v];
    value.share_bytes = 0;
    value.plane = value.height * value.width;
    if (!is_own(value))
      continue;
    if (split[v])
      value.plane = (value.height + r.threads - 1) / r.threads * value.width;
    value.plane = round_up(value.plane, line);
    if (split[v])
      value.share_bytes = align_up(r.batch * image_bytes(r, int64_t(v)));
  }
}

bool plan_convs(Region &r) {
  for (int64_t s = 0; s < int64_t(r.steps.size()); ++s) {
    RegionStep &step = r.steps[s];
    if (step.kind == StepKind::kMaxPool)
      r.scratch_bytes = std::max(r.scratch_bytes, r.threads * pool_bytes(r, step));
    if (step.kind != StepKind::kConv)
      continue;
    step.conv.input_plane = r.values[step.input].plane;
    step.conv.output_plane = r.values[step.output].plane;
    step.conv.add_plane = r.values[step.add < 0 ? step.output : step.add].plane;
    const int64_t height = r.values[step.output].height, least = height / r.threads;
    if (!step.striped && !add_chunk(r, s, r.batch, height, r.threads))
      return false;
    for (const int64_t rows : {least, (height + r.threads - 1) / r.threads})
      if (step.striped && !add_chunk(r, s, r.batch, rows, 1))
        return false;
    for (const Region::Chunk &chunk : r.chunks[s])
      r.scratch_bytes = std::max(r.scratch_bytes, (step.striped ? r.threads : 1) * align_up(chunk.plan.working_bytes));
  }
  return true;
}

// Striped steps go on together until one reads rows that others have made meanwhile.
void choose_phases(Region &r) {
  const Uses uses(r);
  bool open = false;
  for (int64_t s = 0; s < int64_t(r.steps.size()); ++s) {
    const RegionStep &step = r.steps[s];
    if (step.striped) {
      if (!open || (uses.made[step.input] >= r.phases.back().first && reads_others(r, step)))
        r.phases.push_back({s, s, 0, r.threads});
      r.phases.back().last = s + 1;
    } else if (step.kind == StepKind::kConv) {
      const Conv &plan = r.chunks[s][0].plan;
      for (int64_t p = 0; p < conv_phases(plan); ++p)
        r.phases.push_back({s, s + 1, p, conv_shares(plan, p)});
    } else {
      r.phases.push_back({s, s + 1, 0, r.threads});
    }
    open = step.striped;
  }
}

// Places values by the phases between which they live.
void place_by_phases(Region &r) {
  const Uses uses(r);
  std::vector<int64_t> begin(r.steps.size(), -1), end(r.steps.size()); // phases
  for (int64_t p = 0; p < int64_t(r.phases.size()); ++p)
    for (int64_t s = r.phases[p].first; s < r.phases[p].last; ++s) {
      begin[s] = begin[s] < 0 ? p : begin[s];
      end[s] = p;
    }
  // Whether another one of the team may still read the value when a step writes to it.
  const auto is_read_beside = [&](int64_t value, int64_t writer) {
    for (int64_t s = r.phases[begin[writer]].first; s < writer; ++s)
      if (r.steps[s].input == value && reads_others(r, r.steps[s]))
        return true;
    return false;
  };
  place_values(
      r, uses,
      [&](int64_t v) {
        const int64_t share = r.values[v].share_bytes, made = uses.made[v];
        const int64_t bytes = share > 0 ? r.threads * share : align_up(r.batch * image_bytes(r, v));
        return Life{begin[made], end[std::max(uses.read[v], made)], 0, bytes};
      },
      [&](int64_t v, int64_t over) {
        return r.values[over].share_bytes == r.values[v].share_bytes && !is_read_beside(over, uses.made[v]);
      });
}

class Run {
public:
  Run(const Region &region, char *memory) : r_(region), arena_(memory), scratch_(memory + region.arena_bytes) {}

  void phase(const Region::Phase &phase, int64_t item, int64_t me) const {
    for (int64_t s = phase.first; s < phase.last; ++s) {
      const RegionStep &step = r_.steps[s];
      if (step.striped)
        stripe(s, item);
      else if (step.kind == StepKind::kConv)
        shared_conv(s, phase.conv_phase, item, phase.items, me);
      else
        some_planes(step, item);
    }
  }

private:
  // Where row 0 of a value is, or would be if `worker` had it too.
  char *place(int64_t v, int64_t worker) const {
    const RegionValue &value = r_.values[v];
    if (value.input != nullptr)
      return const_cast<char *>(value.input);
    if (value.output != nullptr)
      return value.output;
    char *at = arena_ + value.at;
    return value.share_bytes == 0 ? at : at + worker * value.share_bytes - row_bytes(v, rows_of(r_, v, worker).first);
  }

  int64_t row_bytes(int64_t v, int64_t row) const { return row * r_.values[v].width * element_bytes(r_.dtype); }

  const void *place_add(const RegionStep &step, int64_t worker, int64_t row) const {
    return step.add < 0 ? nullptr : place(step.add, worker) + row_bytes(step.add, row);
  }

  // Others may be at another step of the phase.
  char *own_scratch(int64_t worker) const { return scratch_ + worker * (r_.scratch_bytes / r_.threads); }

  void shared_conv(int64_t s, int64_t phase, int64_t item, int64_t items, int64_t me) const {
    const RegionStep &step = r_.steps[s];
    const InputRows rows = {place(step.input, 0), 0, r_.values[step.input].height};
    const ConvTensors tensors = {&rows, 1, 0, step.bias, place_add(step, 0, 0), place(step.output, 0)};
    run_conv_phase(r_.chunks[s][0].plan, tensors, scratch_, phase, item, items, me);
  }

  // The rows of one of the team.
  void stripe(int64_t s, int64_t worker) const {
    const RegionStep &step = r_.steps[s];
    const RowRange out = rows_of(r_, step.output, worker);
    char *output = place(step.output, worker);
    if (step.kind != StepKind::kConv)
      return between(step, worker, 0, r_.batch * r_.values[step.output].channels, out);
    InputRows inputs[kMostOthers];
    int64_t count = 0;
    const RowRange read = rows_read(r_, step, out);
    if (r_.values[step.input].share_bytes == 0)
      inputs[count++] = {place(step.input, 0), 0, r_.values[step.input].height};
    else
      for (int64_t other = 0; other < r_.threads; ++other) {
        const RowRange own = rows_of(r_, step.input, other);
        if (std::max(read.first, own.first) < std::min(read.last, own.last))
          inputs[count++] = {place(step.input, other), own.first, own.last};
      }
    const ConvTensors tensors = {inputs,
                                 count,
                                 out.first,
                                 step.bias,
                                 place_add(step, worker, out.first),
                                 output + row_bytes(step.output, out.first)};
    const Conv &plan = chunk_plan(r_, s, r_.batch, out.last - out.first);
    run_conv_phase(plan, tensors, own_scratch(worker), 0, 0, 1, 0);
  }

  // A share of the planes of a step that is no convolution.
  void some_planes(const RegionStep &step, int64_t item) const {
    const RegionValue &out = r_.values[step.output];
    const int64_t planes = r_.batch * out.channels;
    between(step, item, planes * item / r_.threads, planes * (item + 1) / r_.threads, {0, out.height});
  }

  // Rows of the planes [first, last) of its output.
  void between(const RegionStep &step, int64_t worker, int64_t first, int64_t last, RowRange rows) const {
    const KernelSet &kernels = kernels_for(r_.dtype);
    const RegionValue &in = r_.values[step.input], &out = r_.values[step.output];
    const int64_t element = element_bytes(r_.dtype);
    const char *input = place(step.input, worker) + first * in.plane * element;
    char *output = place(step.output, worker) + first * out.plane * element;
    if (step.kind == StepKind::kMaxPool)
      return kernels.max_pool(step.pool, {last - first, in.plane, out.plane, rows.first, rows.last}, input, output,
                              own_scratch(worker));
    if (step.kind == StepKind::kAverage)
      return kernels.average(in.height * in.width, {last - first, in.plane, out.plane, 0, 1}, input, output);
    const char *add = step.add < 0 ? nullptr : place(step.add, worker);
    const int64_t add_plane = step.add < 0 ? 0 : r_.values[step.add].plane;
    const int64_t skipped = row_bytes(step.output, rows.first), count = (rows.last - rows.first) * out.width;
    for (int64_t i = 0; i < last - first; ++i)
      kernels.add_activate(input + i * in.plane * element + skipped,
                           add == nullptr ? nullptr : add + (first + i) * add_plane * element + skipped,
                           output + i * out.plane * element + skipped, count, step.activation);
  }

  const Region &r_;
  char *const arena_, *const scratch_;
};

} // namespace

bool plan_team(Region &r) {
  choose_stripes(r);
  choose_planes(r);
  if (!plan_convs(r))
    return false;
  r.scratch_bytes = round_up(r.scratch_bytes, r.threads * kCacheLine);
  choose_phases(r);
  place_by_phases(r);
  return true;
}

void run_team(const Region &r, char *memory, Team &team, int64_t phase, int64_t me) {
  const Run run(r, memory);
  for (const Region::Phase &each : r.phases)
    team.run(phase++, each.items, me, [&](int64_t item) { run.phase(each, item, me); });
}

} // namespace fxsparse
