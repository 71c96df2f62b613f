// Vectors of the instruction set that this translation unit is compiled for, by the compiler's vector extensions.
//
// Everything lives in a namespace per instruction set, and no inline function of the standard library is called:
// otherwise the linker could merge a copy that was compiled for AVX-512 into code that runs on every machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define FXSPARSE_ISA avx512
#elif defined(__AVX2__)
#define FXSPARSE_ISA avx2
#else
#define FXSPARSE_ISA baseline
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fxsparse::FXSPARSE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T> struct AccumulatorOf {
  using type = float;
};
template <> struct AccumulatorOf<double> {
  using type = double;
};

// A: element, N: lanes.
template <class A> struct VectorOf {
  static constexpr int N = kVectorBytes / int(sizeof(A));
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};
template <class A> using Vec = typename VectorOf<A>::type;
template <class A> constexpr int kLanes = VectorOf<A>::N;

// 16-bit storage for a vector of float.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

template <class A> inline Vec<A> broadcast(A a) {
  // a - 0 is exactly a, so the compiler keeps only the broadcast.
  return a - Vec<A>{};
}

// Stops the compiler from repeating a broadcast from memory in each use, which would double the loads.
template <class A> inline void keep_in_register([[maybe_unused]] Vec<A> &v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
}

inline float float_of_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000 | (fraction << 13);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else { // zero and subnormal: fraction * 2^-24
    const float f = float(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint16_t half_of_float(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000)
    return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) // rounds to 2^16 or more
    return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) { // below 2^-14: the addition rounds to a multiple of 2^-24
    float g;
    std::memcpy(&g, &magnitude, 4);
    g += 0.5f;
    std::memcpy(&u, &g, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

inline Vec<float> widen(HalfVec h, BFloat16) { return (Vec<float>)(__builtin_convertvector(h, WordVec) << 16); }

inline HalfVec narrow(Vec<float> v, BFloat16) {
  const WordVec u = (WordVec)v;
  const WordVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : WordVec{} + 0x7fc0, HalfVec);
}

inline Vec<float> widen(HalfVec h, Float16) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i)
    v[i] = float_of_half(h[i]);
  return v;
#endif
}

inline HalfVec narrow(Vec<float> v, Float16) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfVec h;
  for (int i = 0; i < kLanes<float>; ++i)
    h[i] = half_of_float(v[i]);
  return h;
#endif
}

template <class A> inline Vec<A> load_vector(const A *p) { return *(const typename VectorOf<A>::unaligned *)p; }
template <class A> inline void store_vector(A *p, Vec<A> v) { *(typename VectorOf<A>::unaligned *)p = v; }
inline Vec<float> load(const float *p) { return load_vector(p); }
inline Vec<double> load(const double *p) { return load_vector(p); }
inline void store(float *p, Vec<float> v) { store_vector(p, v); }
inline void store(double *p, Vec<double> v) { store_vector(p, v); }
template <class H> inline Vec<float> load_half(const H *p) { return widen(*(const UnalignedHalfVec *)p, H{}); }
template <class H> inline void store_half(H *p, Vec<float> v) { *(UnalignedHalfVec *)p = narrow(v, H{}); }
inline Vec<float> load(const BFloat16 *p) { return load_half(p); }
inline Vec<float> load(const Float16 *p) { return load_half(p); }
inline void store(BFloat16 *p, Vec<float> v) { store_half(p, v); }
inline void store(Float16 *p, Vec<float> v) { store_half(p, v); }

// Partial vectors: lanes [begin, end) of the vector that begins at p; only their memory is touched. Lanes outside
// read as zero.
#if defined(__AVX512F__)
inline uint32_t lane_mask(int begin, int end) { return ((1u << end) - 1) & ~((1u << begin) - 1); }

// Some lanes, found once for many loads.
template <class A> struct Lanes {
  uint32_t mask;

  static Lanes of(int begin, int end) { return {lane_mask(begin, end)}; }
};
inline Vec<float> load_lanes(const float *p, Lanes<float> lanes) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(lanes.mask), p);
}
inline Vec<double> load_lanes(const double *p, Lanes<double> lanes) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(lanes.mask), p);
}
template <class H> inline Vec<float> load_half_lanes(const H *p, int begin, int end) {
  return widen((HalfVec)_mm256_maskz_loadu_epi16(__mmask16(lane_mask(begin, end)), p), H{});
}
// The next elements go to some of the lanes (a bit each), zeros to the others; only these elements' memory is touched.
template <class A> struct Spread {
  uint32_t lanes;

  static Spread over(uint32_t lanes) { return {lanes}; }
};
inline Vec<float> load_spread(const float *p, const Spread<float> &to) {
  return (Vec<float>)_mm512_maskz_expandloadu_ps(__mmask16(to.lanes), p);
}
inline Vec<double> load_spread(const double *p, const Spread<double> &to) {
  return (Vec<double>)_mm512_maskz_expandloadu_pd(__mmask8(to.lanes), p);
}
inline void store_lanes(float *p, Vec<float> v, int begin, int end) {
  _mm512_mask_storeu_ps(p, __mmask16(lane_mask(begin, end)), (__m512)v);
}
inline void store_lanes(double *p, Vec<double> v, int begin, int end) {
  _mm512_mask_storeu_pd(p, __mmask8(lane_mask(begin, end)), (__m512d)v);
}
template <class H> inline void store_half_lanes(H *p, Vec<float> v, int begin, int end) {
  _mm256_mask_storeu_epi16(p, __mmask16(lane_mask(begin, end)), (__m256i)narrow(v, H{}));
}
#else
// Fewer bytes than a vector, in few moves of fixed size (masked stores are slow on several AVX2 machines).
inline void copy_part(void *to, const void *from, int bytes) {
  char *d = (char *)to;
  const char *s = (const char *)from;
  if (kVectorBytes > 16 && (bytes & 16)) {
    std::memcpy(d, s, 16);
    d += 16, s += 16;
  }
  if (bytes & 8) {
    std::memcpy(d, s, 8);
    d += 8, s += 8;
  }
  if (bytes & 4) {
    std::memcpy(d, s, 4);
    d += 4, s += 4;
  }
  if (bytes & 2)
    std::memcpy(d, s, 2);
}

#if defined(__AVX2__)
// Unlike masked stores, masked loads are as fast as others; what comes by parts through memory has to wait for it.
inline __m256i lane_mask(int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
}
template <class A> struct Lanes {
  __m256i mask;

  static Lanes of(int begin, int end) {
    constexpr int words = int(sizeof(A) / 4);
    return {lane_mask(begin * words, end * words)};
  }
};
inline Vec<float> load_lanes(const float *p, const Lanes<float> &lanes) {
  return (Vec<float>)_mm256_maskload_ps(p, lanes.mask);
}
inline Vec<double> load_lanes(const double *p, const Lanes<double> &lanes) {
  return (Vec<double>)_mm256_maskload_pd(p, lanes.mask);
}

template <class A> struct Spread {
  __m256i loaded, from; // lanes of 4 bytes: a mask of the first ones, and where each comes from

  static Spread over(uint32_t lanes) {
    constexpr int words = int(sizeof(A) / 4);
    int32_t from[8];
    int next = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      const bool inside = lanes >> lane & 1;
      for (int word = 0; word < words; ++word) // the last word is a zero unless all lanes are inside
        from[lane * words + word] = inside ? next * words + word : 7;
      next += inside;
    }
    return {lane_mask(0, next * words), _mm256_loadu_si256((const __m256i *)from)};
  }
};
template <class A> inline Vec<A> load_spread(const A *p, const Spread<A> &to) {
  return (Vec<A>)_mm256_permutevar8x32_epi32(_mm256_maskload_epi32((const int *)p, to.loaded), to.from);
}
#else
template <class A> inline Vec<A> load_vector_lanes(const A *p, int begin, int end) {
  if (end - begin == kLanes<A>)
    return load(p);
  Vec<A> v = {};
  copy_part((A *)&v + begin, p + begin, (end - begin) * int(sizeof(A)));
  return v;
}
template <class A> struct Lanes {
  int begin, end;

  static Lanes of(int begin, int end) { return {begin, end}; }
};
template <class A> inline Vec<A> load_lanes(const A *p, Lanes<A> lanes) {
  return load_vector_lanes(p, lanes.begin, lanes.end);
}
#endif
template <class A> inline void store_vector_lanes(A *p, Vec<A> v, int begin, int end) {
  if (end - begin == kLanes<A>)
    store(p, v);
  else
    copy_part(p + begin, (const A *)&v + begin, (end - begin) * int(sizeof(A)));
}
template <class H> inline Vec<float> load_half_lanes(const H *p, int begin, int end) {
  if (end - begin == kLanes<float>)
    return load(p);
  HalfVec h = {};
  copy_part((uint16_t *)&h + begin, p + begin, (end - begin) * 2);
  return widen(h, H{});
}
template <class H> inline void store_half_lanes(H *p, Vec<float> v, int begin, int end) {
  const HalfVec h = narrow(v, H{});
  if (end - begin == kLanes<float>)
    *(UnalignedHalfVec *)p = h;
  else
    copy_part(p + begin, (const uint16_t *)&h + begin, (end - begin) * 2);
}
inline void store_lanes(float *p, Vec<float> v, int begin, int end) { store_vector_lanes(p, v, begin, end); }
inline void store_lanes(double *p, Vec<double> v, int begin, int end) { store_vector_lanes(p, v, begin, end); }
#endif
inline Vec<float> load_lanes(const float *p, int begin, int end) { return load_lanes(p, Lanes<float>::of(begin, end)); }
inline Vec<double> load_lanes(const double *p, int begin, int end) {
  return load_lanes(p, Lanes<double>::of(begin, end));
}
inline Vec<float> load_lanes(const BFloat16 *p, int begin, int end) { return load_half_lanes(p, begin, end); }
inline Vec<float> load_lanes(const Float16 *p, int begin, int end) { return load_half_lanes(p, begin, end); }
inline void store_lanes(BFloat16 *p, Vec<float> v, int begin, int end) { store_half_lanes(p, v, begin, end); }
inline void store_lanes(Float16 *p, Vec<float> v, int begin, int end) { store_half_lanes(p, v, begin, end); }

template <class T> inline typename AccumulatorOf<T>::type to_accumulator(T t) {
  if constexpr (sizeof(T) == 2)
    return load_lanes(&t, 0, 1)[0];
  else
    return t;
}

} // namespace fxsparse::FXSPARSE_ISA
