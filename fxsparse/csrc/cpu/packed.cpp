#include "cpu/packed.h"

#include <sstream>
#include <vector>

namespace fxsparse {
namespace {

// Calls move(packed index, dense index) for every stored weight of panels [first, last).
template <class Move>
void for_each_weight(const PackedWeight &packed, int64_t columns, int64_t first, int64_t last, Move move) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t *panel = packed.panels + p * kPanelFields;
    for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
      const int64_t *row = packed.rows + (p * kPanelLanes + lane) * kRowFields;
      if (row[kOutChannel] < 0)
        continue;
      const int64_t dense = row[kOutChannel] * columns;
      for (int64_t k = 0; k < panel[kColumnCount]; ++k)
        move(panel[kFirstValue] + k * kPanelLanes + lane, dense + packed.columns[panel[kFirstColumn] + k]);
      for (int64_t k = 0; k < row[kResidualCount]; ++k)
        move(row[kFirstResidualValue] + k, dense + packed.columns[row[kFirstResidual] + k]);
    }
  }
}

template <class E>
void unpack_elements(const PackedWeight &packed, int64_t columns, int64_t first, int64_t last, void *dense) {
  const E *values = static_cast<const E *>(packed.values);
  E *weight = static_cast<E *>(dense);
  for_each_weight(packed, columns, first, last, [=](int64_t value, int64_t at) { weight[at] = values[value]; });
}

template <class E>
void repack_elements(const PackedWeight &packed, int64_t columns, int64_t first, int64_t last, const void *dense,
                     void *packed_values) {
  const E *weight = static_cast<const E *>(dense);
  E *values = static_cast<E *>(packed_values);
  for (int64_t p = first; p < last; ++p) {
    const int64_t *panel = packed.panels + p * kPanelFields;
    for (int64_t i = 0; i < panel[kColumnCount] * kPanelLanes; ++i)
      values[panel[kFirstValue] + i] = E(0);
  }
  for_each_weight(packed, columns, first, last, [=](int64_t value, int64_t at) { values[value] = weight[at]; });
}

// [first, first + count) lies in [0, size), with no overflow whatever the numbers are.
bool in_range(int64_t first, int64_t count, int64_t size) {
  return first >= 0 && count >= 0 && first <= size && count <= size - first;
}

bool ascending(const int32_t *columns, int64_t count, int64_t limit) {
  int64_t previous = -1;
  for (int64_t i = 0; i < count; previous = columns[i++])
    if (columns[i] <= previous || columns[i] >= limit)
      return false;
  return true;
}

bool disjoint(const int32_t *a, int64_t a_count, const int32_t *b, int64_t b_count) {
  for (int64_t i = 0, j = 0; i < a_count && j < b_count;) {
    if (a[i] == b[j])
      return false;
    a[i] < b[j] ? ++i : ++j;
  }
  return true;
}

template <class... Parts> std::string message(const Parts &...parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

class TableCheck {
public:
  TableCheck(const PackedWeight &packed, int64_t out_channels, int64_t columns, int64_t group_channels, int64_t groups)
      : packed_(packed), columns_(columns), group_channels_(group_channels), groups_(groups),
        rows_per_group_(out_channels / groups), seen_(out_channels, 0) {}

  std::string run() {
    for (int64_t p = 0; p < packed_.num_panels; ++p)
      if (std::string wrong = check_panel(p); !wrong.empty())
        return wrong;
    for (size_t channel = 0; channel < seen_.size(); ++channel)
      if (!seen_[channel])
        return message("Output channel ", channel, " is missing from 'rows'");
    return "";
  }

private:
  std::string check_panel(int64_t p) {
    const int64_t *panel = packed_.panels + p * kPanelFields;
    const int64_t count = panel[kColumnCount];
    if (!in_range(panel[kFirstColumn], count, packed_.num_columns))
      return message("Panel ", p, " has columns [", panel[kFirstColumn], ", +", count, "), but 'columns' has ",
                     packed_.num_columns, " entries");
    if (count > packed_.num_values / kPanelLanes ||
        !in_range(panel[kFirstValue], count * kPanelLanes, packed_.num_values))
      return message("Panel ", p, " has ", count, " columns of values from ", panel[kFirstValue],
                     " on, but 'values' has ", packed_.num_values, " entries");
    const int32_t *block = packed_.columns + panel[kFirstColumn];
    if (!ascending(block, count, columns_))
      return message("The columns of panel ", p, " are not ascending indices in [0, ", columns_, ")");
    const int64_t channel = panel[kFirstChannel];
    if (channel < 0 || channel % group_channels_ != 0 || channel / group_channels_ >= groups_)
      return message("Panel ", p, " has first input channel ", channel, ", expected a multiple of ", group_channels_,
                     " below ", group_channels_ * groups_);
    for (int64_t lane = 0; lane < kPanelLanes; ++lane)
      if (std::string wrong = check_row(p * kPanelLanes + lane, channel / group_channels_, block, count);
          !wrong.empty())
        return wrong;
    return "";
  }

  std::string check_row(int64_t at, int64_t group, const int32_t *block, int64_t count) {
    const int64_t *row = packed_.rows + at * kRowFields;
    const int64_t channel = row[kOutChannel], residual = row[kResidualCount];
    if (channel < 0) {
      if (channel != -1 || row[kFirstResidual] != 0 || residual != 0 || row[kFirstResidualValue] != 0)
        return message("Lane ", at, " has output channel ", channel, ", expected a padding lane (-1, 0, 0, 0)");
      return "";
    }
    if (channel >= int64_t(seen_.size()) || channel / rows_per_group_ != group)
      return message("Lane ", at, " has output channel ", channel, ", expected one of group ", group, ": [",
                     group * rows_per_group_, ", ", (group + 1) * rows_per_group_, ")");
    if (seen_[channel])
      return message("Output channel ", channel, " is in 'rows' twice");
    seen_[channel] = 1;
    if (!in_range(row[kFirstResidual], residual, packed_.num_columns))
      return message("Lane ", at, " has residual columns [", row[kFirstResidual], ", +", residual,
                     "), but 'columns' has ", packed_.num_columns, " entries");
    if (!in_range(row[kFirstResidualValue], residual, packed_.num_values))
      return message("Lane ", at, " has residual values [", row[kFirstResidualValue], ", +", residual,
                     "), but 'values' has ", packed_.num_values, " entries");
    const int32_t *own = packed_.columns + row[kFirstResidual];
    if (!ascending(own, residual, columns_))
      return message("The residual columns of lane ", at, " are not ascending indices in [0, ", columns_, ")");
    if (!disjoint(own, residual, block, count))
      return message("Lane ", at, " has a residual weight in a column of its block");
    return "";
  }

  const PackedWeight &packed_;
  const int64_t columns_, group_channels_, groups_, rows_per_group_;
  std::vector<char> seen_;
};

} // namespace

void unpack_panels(const PackedWeight &packed, int64_t columns, int64_t element_bytes, int64_t first, int64_t last,
                   void *dense) {
  if (element_bytes == 2)
    unpack_elements<uint16_t>(packed, columns, first, last, dense);
  else if (element_bytes == 4)
    unpack_elements<uint32_t>(packed, columns, first, last, dense);
  else
    unpack_elements<uint64_t>(packed, columns, first, last, dense);
}

void repack_panels(const PackedWeight &packed, int64_t columns, int64_t element_bytes, int64_t first, int64_t last,
                   const void *dense, void *values) {
  if (element_bytes == 2)
    repack_elements<uint16_t>(packed, columns, first, last, dense, values);
  else if (element_bytes == 4)
    repack_elements<uint32_t>(packed, columns, first, last, dense, values);
  else
    repack_elements<uint64_t>(packed, columns, first, last, dense, values);
}

std::string describe_invalid_tables(const PackedWeight &packed, int64_t out_channels, int64_t columns,
                                    int64_t group_channels, int64_t groups) {
  return TableCheck(packed, out_channels, columns, group_channels, groups).run();
}

} // namespace fxsparse
