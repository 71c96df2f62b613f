// 16 bytes of elements: what one thread reads at a time, and what poolings do with it.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {

template <typename T> struct Pairs; // of 16-bit elements, two in a word

template <> struct Pairs<__nv_bfloat16> {
  using Word = __nv_bfloat162;
  static constexpr uint32_t kLowest = 0xff80'ff80u, kSix = 0x40c0'40c0u; // -infinity, 6
};
template <> struct Pairs<__half> {
  using Word = __half2;
  static constexpr uint32_t kLowest = 0xfc00'fc00u, kSix = 0x4600'4600u;
};

template <typename T> __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  using Word = typename Pairs<T>::Word;
  const Word found = __hmax2_nan(*reinterpret_cast<Word *>(&a), *reinterpret_cast<Word *>(&b));
  return *reinterpret_cast<const uint32_t *>(&found);
}
template <typename T> __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
  using Word = typename Pairs<T>::Word;
  const Word found = __hmin2_nan(*reinterpret_cast<Word *>(&a), *reinterpret_cast<Word *>(&b));
  return *reinterpret_cast<const uint32_t *>(&found);
}
// NaN wins, as in torch.
template <> __device__ __forceinline__ uint32_t larger<float>(uint32_t a, uint32_t b) {
  const float x = __uint_as_float(a), y = __uint_as_float(b);
  return y > x || y != y ? b : a;
}
template <> __device__ __forceinline__ uint32_t smaller<float>(uint32_t a, uint32_t b) {
  const float x = __uint_as_float(a), y = __uint_as_float(b);
  return y < x || y != y ? b : a;
}
template <> struct Pairs<float> {
  static constexpr uint32_t kLowest = 0xff80'0000u, kSix = 0x40c0'0000u;
};

template <typename T> __device__ __forceinline__ uint4 lowest() {
  constexpr uint32_t word = Pairs<T>::kLowest;
  return make_uint4(word, word, word, word);
}

template <typename T> __device__ __forceinline__ void keep_larger(uint4 &most, const uint4 &other) {
  most.x = larger<T>(most.x, other.x);
  most.y = larger<T>(most.y, other.y);
  most.z = larger<T>(most.z, other.z);
  most.w = larger<T>(most.w, other.w);
}

// Clamps to [0, 6], or to [0, infinity).
template <typename T> __device__ __forceinline__ void clamp(uint4 &value, bool to_six) {
  keep_larger<T>(value, make_uint4(0, 0, 0, 0));
  if (!to_six)
    return;
  value.x = smaller<T>(value.x, Pairs<T>::kSix);
  value.y = smaller<T>(value.y, Pairs<T>::kSix);
  value.z = smaller<T>(value.z, Pairs<T>::kSix);
  value.w = smaller<T>(value.w, Pairs<T>::kSix);
}

} // namespace fxsparse::cuda
