// Sixteen floats at a time: loads and stores, sums, an inverse root, and the walk over a stretch of memory.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int64_t AHEAD = 512;  // elements

typedef float Vec __attribute__((vector_size(64)));
typedef float UnalignedVec __attribute__((vector_size(64), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
inline Vec load(const float* p, int count) {
  Vec x = {};
  std::memcpy(&x, p, count * sizeof(float));
  return x;
}
inline void store(float* p, Vec x, int count) { std::memcpy(p, &x, count * sizeof(float)); }

inline double sum(Vec x) {
  double total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// 1 / (scale sqrt(v) + offset). Estimates of the processor and one step of Newton each: exact to 2^-22; where
// a v is 0, subnormal, infinite or NaN, the exact operations.
inline Vec inverse_root(Vec v, float scale, float offset) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(1e-36f), _CMP_GE_OQ) &
                           _mm512_cmp_ps_mask(x, _mm512_set1_ps(1e36f), _CMP_LE_OQ);
  if (__builtin_expect(normal != 0xffff, 0)) {
    const __m512 denominator = _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_sqrt_ps(x), _mm512_set1_ps(offset));
    return (Vec)_mm512_div_ps(_mm512_set1_ps(1.0f), denominator);
  }
  Vec y = (Vec)_mm512_rsqrt14_ps(x);
  y = y * (1.5f - 0.5f * v * y * y);
  const Vec denominator = scale * (v * y) + offset;
  Vec z = (Vec)_mm512_rcp14_ps((__m512)denominator);
  return z * (2.0f - denominator * z);
#elif defined(__AVX2__)
  union {
    Vec all;
    __m256 half[2];
  } x = {v};
  for (__m256& h : x.half) {
    const __m256 root = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_sqrt_ps(h));
    h = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_add_ps(root, _mm256_set1_ps(offset)));
  }
  return x.all;
#else
  Vec result;
  for (int i = 0; i < LANES; ++i) result[i] = 1.0f / (scale * std::sqrt(v[i]) + offset);
  return result;
#endif
}

template <class Body>
inline void walk(int64_t from, int64_t to, Body body) {
  int64_t i = from;
  for (; i + LANES <= to; i += LANES) body(i, LANES, std::true_type());
  if (i < to) body(i, int(to - i), std::false_type());
}

template <class Full>
inline Vec get(const float* p, int count, Full) {
  if constexpr (Full::value) {
    __builtin_prefetch(p + AHEAD);  // the processor's own prefetching stops at the end of each page
    return load(p);
  }
  return load(p, count);
}
template <class Full>
inline void put(float* p, Vec x, int count, Full) {
  if constexpr (Full::value) store(p, x);
  else store(p, x, count);
}

}  // namespace
