// Activations on a vector of results.
#pragma once

#include "cpu/conv.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

// exp by 2^n * Taylor(r), |r| <= ln(2) / 2. Overflows to infinity and underflows to zero where exp does; NaN stays.
template <class A> struct ExpConstants;
template <> struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float kMax = 89.0f, kMin = -87.5f, kRound = 12582912.0f; // 1.5 * 2^23
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  static constexpr int kFraction = 23, kBias = 127, kDegree = 7;
};
template <> struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double kMax = 710.0, kMin = -708.4, kRound = 6755399441055744.0; // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-1, kLn2Low = 1.90821492927058770002e-10;
  static constexpr int kFraction = 52, kBias = 1023, kDegree = 13;
};

template <class A> inline Vec<A> exponential(Vec<A> x) {
  using C = ExpConstants<A>;
  using BitsVec = Vec<typename C::Bits>;
  const Vec<A> high = broadcast(C::kMax), low = broadcast(C::kMin);
  x = x > high ? high : x;
  x = x < low ? low : x;
  const Vec<A> shifted = x * A(1.44269504088896340736) + C::kRound;
  const Vec<A> n = shifted - C::kRound;
  const Vec<A> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  A factorial = 1;
  for (int i = 2; i <= C::kDegree; ++i)
    factorial *= A(i);
  Vec<A> sum = broadcast(1 / factorial);
#pragma GCC unroll 16
  for (int i = C::kDegree; i > 0; --i) {
    factorial /= A(i);
    sum = sum * r + 1 / factorial;
  }
  // The low bits of `shifted` hold n, and the rest is shifted out.
  const BitsVec scale = ((BitsVec)shifted << C::kFraction) + (typename C::Bits(C::kBias) << C::kFraction);
  return sum * (Vec<A>)scale;
}

// The comparisons are written so that NaN passes through, as in PyTorch.
template <class A> inline Vec<A> activate(Vec<A> x, Activation activation) {
  const Vec<A> zero = {}, six = broadcast(A(6));
  switch (activation) {
  case Activation::kNone:
    return x;
  case Activation::kRelu:
    return zero > x ? zero : x;
  case Activation::kRelu6:
    x = zero > x ? zero : x;
    return six < x ? six : x;
  case Activation::kSilu:
    return x / (A(1) + exponential<A>(-x));
  case Activation::kHardswish: {
    Vec<A> t = x + A(3);
    t = zero > t ? zero : t;
    t = six < t ? six : t;
    return x * t / A(6);
  }
  }
  return x;
}

} // namespace fxsparse::FXSPARSE_ISA
