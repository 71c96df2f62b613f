// CUDA's half on a CPU.
#pragma once

struct __half {
  _Float16 value = 0;
  __half() = default;
  explicit __half(float v) : value(_Float16(v)) {}
  operator float() const { return float(value); }
};
