// Places in one piece of memory what is alive at the same time apart. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fxsparse {

// Of a value that takes `bytes` from the step that first writes it until the last one that reads it; `at` is its place.
struct Life {
  int64_t first, last, at, bytes;
};

// Gives each the lowest place that is free all the time, in the order given, and returns the bytes of all together.
// What has no bytes takes no place.
inline int64_t place_lives(std::vector<Life> &lives) {
  int64_t total = 0;
  std::vector<Life> placed, beside;
  for (Life &life : lives) {
    if (life.bytes == 0)
      continue;
    beside.clear();
    for (const Life &other : placed)
      if (other.first <= life.last && life.first <= other.last)
        beside.push_back(other);
    std::sort(beside.begin(), beside.end(), [](const Life &a, const Life &b) { return a.at < b.at; });
    life.at = 0;
    for (const Life &other : beside)
      if (life.at + life.bytes > other.at)
        life.at = std::max(life.at, other.at + other.bytes);
    total = std::max(total, life.at + life.bytes);
    placed.push_back(life);
  }
  return total;
}

} // namespace fxsparse
