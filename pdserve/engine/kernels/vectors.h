// Numbers a register at a time: what the kernels need of the processor, in one place.
//
// Three kinds of processors have matrix kernels (HAS_TILES), told apart by what enters a product:
//     AVX-512 with BF16   pairs of bfloat16, by the processor's own dot product      (HAS_BF16_DOT)
//     AVX-512             floats; bfloat16 weights are widened in registers
//     AVX2 with FMA       the same in registers of half the size
// ``Input`` is the type of what enters, ``V`` a register of floats, ``LANES`` how many it holds.
// Compiled with EMULATE_BF16_DOT, the first kind runs on the second, slower (tests).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512 1
#else
#define HAS_AVX512 0
#endif

#if HAS_AVX512 && (defined(__AVX512BF16__) || defined(EMULATE_BF16_DOT))
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif

#if HAS_AVX512 || (defined(__AVX2__) && defined(__FMA__))
#define HAS_TILES 1
#include <immintrin.h>
#else
#define HAS_TILES 0
#endif

#if HAS_TILES

namespace {

#if HAS_AVX512
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

#if HAS_BF16_DOT
typedef uint16_t Input;
#else
typedef float Input;
#endif

inline V load(const float* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

inline void store(float* to, V x) { std::memcpy(to, &x, sizeof(V)); }

inline V all(float x) { return x - V{}; }

// a * b + c, rounded once; unlike plain sums it is never reordered.
inline V fused(V a, V b, V c) {
#if HAS_AVX512
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// bfloat16 -> float.
inline V widen(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(Halves));
  return (V)(__builtin_convertvector(halves, Bits) << 16);
}

// float -> bfloat16, to nearest, ties to even; NaN stays NaN.
inline void narrow(uint16_t* to, V x) {
#if HAS_AVX512 && defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits out = x == x ? rounded : Bits{} + 0x7fc0;
#if HAS_AVX512
  const __m256i halves = _mm512_cvtepi32_epi16((__m512i)out);
#else
  const Halves halves = __builtin_convertvector(out, Halves);
#endif
  std::memcpy(to, &halves, sizeof(Halves));
#endif
}

// Of a product's inputs: rounded to what the processor multiplies.
inline void put(uint16_t* to, V x) { narrow(to, x); }
inline void put(float* to, V x) { store(to, x); }

// ``count`` bfloat16, a whole number of registers.
inline void take(uint16_t* to, const uint16_t* from, int64_t count) {
  std::memcpy(to, from, count * 2);
}
inline void take(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, widen(from + i));
}

// The number of each lane.
inline Whole lane_numbers() {
  Whole out;
  for (int i = 0; i < LANES; ++i) out[i] = i;
  return out;
}

// exp; clamped to -87 .. 87; NaN stays NaN. Relative error below 3e-7.
inline V exp_of(V x) {
  const V bounded = x < -87.0f ? all(-87.0f) : x > 87.0f ? all(87.0f) : x;
  const V scaled = bounded * 1.44269504f;
  // Rounded by truncation: the conversion is the one step that no reordering of sums can undo.
  const Whole n =
      __builtin_convertvector(scaled + (scaled < 0.0f ? all(-0.5f) : all(0.5f)), Whole);
  const V whole = __builtin_convertvector(n, V);
  V r = fused(whole, all(-0.693359375f), bounded);
  r = fused(whole, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  p = fused(p, r, all(1.3981999507e-3f));
  p = fused(p, r, all(8.3334519073e-3f));
  p = fused(p, r, all(4.1665795894e-2f));
  p = fused(p, r, all(1.6666665459e-1f));
  p = fused(p, r, all(5.0000001201e-1f));
  p = fused(p, r * r, r) + 1.0f;
  const V out = p * (V)((n + 127) << 23);
  return x == x ? out : x;
}

inline float sum_of(V x) {
#if HAS_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < LANES / 2; ++i) sum += x[i] + x[i + LANES / 2];
  return sum;
#endif
}

// Of lanes of which none is NaN.
inline float largest_of(V x) {
#if HAS_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = best > x[i] ? best : x[i];
  return best;
#endif
}

#if HAS_BF16_DOT
// sum + a.even * b.even + a.odd * b.odd, for pairs of bfloat16.
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  sum = _mm512_fmadd_ps((__m512)_mm512_and_si512(a, odd), (__m512)_mm512_and_si512(b, odd), sum);
  return _mm512_fmadd_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16), sum);
#endif
}
#else
// One of the two bfloat16 of each of LANES pairs.
template <int ODD>
inline V half_of(Bits pairs) {
  return (V)(ODD ? pairs & 0xffff0000u : pairs << 16);
}
template <int ODD>
inline V half_of(const uint16_t* from) {
  Bits pairs;
  std::memcpy(&pairs, from, sizeof(Bits));
  return half_of<ODD>(pairs);
}
#endif

}  // namespace

#endif  // HAS_TILES
