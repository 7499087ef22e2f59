// A linear layer's packed weights and the products of rows with them.
//
// A weight [n, k] lies packed in panels of 32 outputs, the last one padded with zeros: as bfloat16
// (tiles.h) or as 8- or 4-bit codes (groups.h).
#pragma once

#include "groups.h"
#include "tiles.h"

namespace {

struct Linear {  // mirrored in tiles.py
  const char* packed;
  const uint16_t* bias;  // [n] or null
  int64_t n, k;
  int64_t bits;  // of a weight: 16, 8 or 4
};

#if HAS_TILES

#if !HAS_GROUPS
struct GroupScratch {};
#endif

inline int64_t panels(const Linear& linear) { return (linear.n + PANEL - 1) / PANEL; }

inline const char* panel_of(const Linear& linear, int64_t panel) {
#if HAS_GROUPS
  if (linear.bits == 8) return linear.packed + panel * (linear.k / GROUP) * Bits8::BYTES;
  if (linear.bits == 4) return linear.packed + panel * (linear.k / GROUP) * Bits4::BYTES;
#endif
  return linear.packed + panel * linear.k * PANEL * 2;
}

// Once before the products of the rows [begin, end) of ``a`` with any panels of ``linear``.
inline void prepare(const Linear& linear, const Input* a, int64_t lda, int64_t begin, int64_t end,
                    GroupScratch& scratch) {
#if HAS_GROUPS
  if (linear.bits == 4) scratch.sum_inputs(a, lda, linear.k, begin, end);
#endif
}

// Where tile ``index`` of ``tiles`` over one panel should fetch. A lone tile reads its weights from
// memory, so it fetches a little ahead. Of several, the first two fetch the panel that comes next.
inline Fetch fetch_of(const char* panel, const char* next, int64_t pairs, int64_t index,
                      int64_t tiles) {
  if (tiles == 1) return {panel + 4096, 64, 128};
  if (index > 1) return {panel, 0, 0};
  return {next + index * pairs * 64, 0, 64};
}

// Products of the rows [begin, end) of ``a`` with one panel, handed to ``take(row, sums)`` row by
// row; ``sums`` are 32 floats, the bias included. ``next``: the panel to be read after this one.
template <class Take>
inline void panel_product(const Linear& linear, int64_t panel, const char* next, const Input* a,
                          int64_t lda, int64_t begin, int64_t end, GroupScratch& scratch,
                          Take take) {
  alignas(64) float sums[TILE_ROWS * PANEL];
  const char* b = panel_of(linear, panel);
  const int64_t each = tile_rows(end - begin), first = panel * PANEL;
  alignas(64) float bias[PANEL] = {};
  if (linear.bias != nullptr) {
    for (int64_t c = 0; c < std::min(PANEL, linear.n - first); ++c) {
      const uint32_t wide = static_cast<uint32_t>(linear.bias[first + c]) << 16;
      std::memcpy(&bias[c], &wide, 4);
    }
  }
  const auto done = [&](int64_t row, int64_t rows, float* found) {
    for (int64_t r = 0; r < rows; ++r) {
      float* own = found + r * PANEL;
      if (linear.bias != nullptr) {
        for (int64_t c = 0; c < PANEL; ++c) own[c] += bias[c];
      }
      take(row + r, own);
    }
  };
#if HAS_GROUPS
  if (linear.bits == 8) {
    return group_products<Bits8>(b, next, linear.k, a, lda, begin, end, each, scratch, sums, done);
  }
  if (linear.bits == 4) {
    return group_products<Bits4>(b, next, linear.k, a, lda, begin, end, each, scratch, sums, done);
  }
#endif
  const int64_t pairs = linear.k / 2, tiles = (end - begin + each - 1) / each;
  for (int64_t index = 0; index < tiles; ++index) {
    const int64_t row = begin + index * each, rows = std::min(each, end - row);
    tile_of<false>(rows)(a + row * lda, lda, reinterpret_cast<const uint16_t*>(b), pairs, sums,
                         PANEL, fetch_of(b, next, pairs, index, tiles));
    done(row, rows, sums);
  }
}

#endif  // HAS_TILES

}  // namespace
