// CUDA's bfloat16 on a CPU; rounds to nearest even.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) {
    const uint32_t all = std::bit_cast<uint32_t>(v);
    bits = v != v ? uint16_t(0x7fc0) : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
