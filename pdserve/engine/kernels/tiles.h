// Matrix products on bfloat16 tiles: up to 14 rows by 32 columns, sums in float registers.
//
// The second factor [k, 32] lies packed as [k / 2][32][2], so that one load holds two neighbouring
// inputs of 16 columns, which is what the processor's bfloat16 product takes. Without AVX-512 BF16
// nothing here exists (HAS_TILES is 0).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_TILES 1
#include <immintrin.h>
#else
#define HAS_TILES 0
#endif

namespace {

constexpr int64_t PANEL = 32;
constexpr int TILE_ROWS = 14;  // 28 sums, two weights and an input fill the 32 registers

#if HAS_TILES

// Memory to bring into the second cache while a tile is computed: ``step`` bytes for each pair of
// inputs, at ``from`` and ``second`` bytes behind it.
struct Fetch {
  const char* from;
  int64_t second, step;
};

// sums[r * stride + c] (+)= a[r] . b[c] for ROWS rows and 32 columns; ``pairs`` is k / 2.
template <int ROWS, bool ADD>
void tile(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t pairs, float* sums,
          int64_t stride, Fetch fetch) {
  __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    left[r] = ADD ? _mm512_loadu_ps(sums + r * stride) : _mm512_setzero_ps();
    right[r] = ADD ? _mm512_loadu_ps(sums + r * stride + 16) : _mm512_setzero_ps();
  }
  // Every third row has a pointer of its own: the others are reached by an index.
  const uint16_t* rows[(ROWS + 2) / 3];
#pragma GCC unroll 8
  for (int j = 0; j < (ROWS + 2) / 3; ++j) rows[j] = a + 3 * j * lda;
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh high = (__m512bh)_mm512_loadu_si512(b + 32);
    _mm_prefetch(fetch.from, _MM_HINT_T1);
    _mm_prefetch(fetch.from + fetch.second, _MM_HINT_T1);
    fetch.from += fetch.step;
    b += 64;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, rows[r / 3] + (r % 3) * lda, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      left[r] = _mm512_dpbf16_ps(left[r], x, low);
      right[r] = _mm512_dpbf16_ps(right[r], x, high);
    }
#pragma GCC unroll 8
    for (int j = 0; j < (ROWS + 2) / 3; ++j) rows[j] += 2;
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(sums + r * stride, left[r]);
    _mm512_storeu_ps(sums + r * stride + 16, right[r]);
  }
}

typedef void (*TileFunction)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t,
                             Fetch);

template <bool ADD>
inline TileFunction tile_of(int64_t rows) {
  static constexpr TileFunction table[TILE_ROWS] = {
      tile<1, ADD>,  tile<2, ADD>,  tile<3, ADD>,  tile<4, ADD>, tile<5, ADD>,
      tile<6, ADD>,  tile<7, ADD>,  tile<8, ADD>,  tile<9, ADD>, tile<10, ADD>,
      tile<11, ADD>, tile<12, ADD>, tile<13, ADD>, tile<14, ADD>};
  return table[rows - 1];
}

// Rows of each of the tiles that ``count`` rows are cut into, as equal as can be.
inline int64_t tile_rows(int64_t count) {
  const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
  return (count + tiles - 1) / tiles;
}

inline __m512 widen(const uint16_t* from) {
  return (__m512)_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
}

inline void narrow(uint16_t* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 exp_of(__m512 x) {  // like exp_negative of paged.h; clamped to -87 .. 87
  // Of these, a NaN that is the second operand comes through.
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

#endif  // HAS_TILES

}  // namespace
