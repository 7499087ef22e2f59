// Matrix products on tiles of some rows by 32 columns, weights in bfloat16, sums in float registers.
//
// The second factor [k, 32] lies packed as [k / 2][32][2], so that one load holds two neighbouring
// inputs of a register's columns, which is what a processor's bfloat16 product takes. Where there is
// none (vectors.h), the two are widened one after the other and the first factor is float.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vectors.h"

namespace {

constexpr int64_t PANEL = 32;

#if HAS_TILES

// As many as leave registers for weights and an input beside the sums.
#if HAS_AVX512
constexpr int TILE_ROWS = 14;
#else
constexpr int TILE_ROWS = 3;
#endif

// Memory to bring into the second cache while a tile is computed: ``step`` bytes for each pair of
// inputs, at ``from`` and ``second`` bytes behind it.
struct Fetch {
  const char* from;
  int64_t second, step;
  void next() {
    _mm_prefetch(from, _MM_HINT_T1);
    _mm_prefetch(from + second, _MM_HINT_T1);
    from += step;
  }
};

// sums[r * stride + c] (+)= a[r] . b[c] for ROWS rows and 32 columns; ``pairs`` is k / 2.
#if HAS_BF16_DOT

template <int ROWS, bool ADD>
void tile(const Input* a, int64_t lda, const uint16_t* b, int64_t pairs, float* sums,
          int64_t stride, Fetch fetch) {
  __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    left[r] = ADD ? _mm512_loadu_ps(sums + r * stride) : _mm512_setzero_ps();
    right[r] = ADD ? _mm512_loadu_ps(sums + r * stride + 16) : _mm512_setzero_ps();
  }
  // Every third row has a pointer of its own: the others are reached by an index.
  const Input* rows[(ROWS + 2) / 3];
#pragma GCC unroll 8
  for (int j = 0; j < (ROWS + 2) / 3; ++j) rows[j] = a + 3 * j * lda;
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512i low = _mm512_loadu_si512(b), high = _mm512_loadu_si512(b + 32);
    fetch.next();
    b += 64;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, rows[r / 3] + (r % 3) * lda, 4);
      const __m512i x = _mm512_set1_epi32(two);
      left[r] = dot(left[r], x, low);
      right[r] = dot(right[r], x, high);
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

#else

// Adds a[r] * b[c] of every ODD-th input of the pairs at ``b``; rows[j] leads to row 3 * j.
template <int ROWS, int ODD>
inline __attribute__((always_inline)) void add_half(const Input* const* rows, int64_t lda,
                                                    const uint16_t* b,
                                                    V (*sums)[PANEL / LANES]) {
  constexpr int PARTS = PANEL / LANES;
  if constexpr (PARTS == 2) {
    const V low = half_of<ODD>(b), high = half_of<ODD>(b + 2 * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const V x = all(rows[r / 3][r % 3 * lda + ODD]);
      sums[r][0] = fused(x, low, sums[r][0]);
      sums[r][1] = fused(x, high, sums[r][1]);
    }
  } else {  // fewer registers: the inputs are read again for each part
#pragma GCC unroll 4
    for (int c = 0; c < PARTS; ++c) {
      const V part = half_of<ODD>(b + 2 * LANES * c);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        sums[r][c] = fused(all(rows[r / 3][r % 3 * lda + ODD]), part, sums[r][c]);
      }
    }
  }
}

template <int ROWS, bool ADD>
void tile(const Input* a, int64_t lda, const uint16_t* b, int64_t pairs, float* sums,
          int64_t stride, Fetch fetch) {
  constexpr int PARTS = PANEL / LANES;
  V own[ROWS][PARTS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < PARTS; ++c) own[r][c] = ADD ? load(sums + r * stride + c * LANES) : V{};
  }
  // Every third row has a pointer of its own: the others are reached by an index.
  const Input* rows[(ROWS + 2) / 3];
#pragma GCC unroll 8
  for (int j = 0; j < (ROWS + 2) / 3; ++j) rows[j] = a + 3 * j * lda;
  for (int64_t p = 0; p < pairs; ++p) {
    fetch.next();
    add_half<ROWS, 0>(rows, lda, b, own);
    add_half<ROWS, 1>(rows, lda, b, own);
    b += 64;
#pragma GCC unroll 8
    for (int j = 0; j < (ROWS + 2) / 3; ++j) rows[j] += 2;
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < PARTS; ++c) store(sums + r * stride + c * LANES, own[r][c]);
  }
}

#endif

typedef void (*TileFunction)(const Input*, int64_t, const uint16_t*, int64_t, float*, int64_t,
                             Fetch);

template <bool ADD, int... ROW>
constexpr std::array<TileFunction, sizeof...(ROW)> tiles_of(std::integer_sequence<int, ROW...>) {
  return {tile<ROW + 1, ADD>...};
}

template <bool ADD>
inline TileFunction tile_of(int64_t rows) {
  static constexpr auto table = tiles_of<ADD>(std::make_integer_sequence<int, TILE_ROWS>());
  return table[rows - 1];
}

// Rows of each of the tiles that ``count`` rows are cut into, as equal as can be.
inline int64_t tile_rows(int64_t count) {
  const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
  return (count + tiles - 1) / tiles;
}

#endif  // HAS_TILES

}  // namespace
