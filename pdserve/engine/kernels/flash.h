// Attention of a row of many tokens over a paged KV pool, tile by tile with an online softmax.
//
// A piece of work is a span of the row's queries under one KV head, all of that head's query heads
// together. Keys and values are read in place, TILE_KEYS positions at a time, packed as weights are
// (tiles.h); scores and sums are float.
#pragma once

#include <limits>
#include <vector>

#include "paged.h"
#include "tiles.h"

#if HAS_TILES

namespace {

constexpr int64_t TILE_KEYS = 64;
constexpr int64_t SPAN_ROWS = 336;  // queries times heads of a piece, at most (if it has one query)

struct LongRow {  // mirrored in fused.py
  int64_t begin, end;    // its tokens in the line
  int64_t start;         // position of its first token
  const int64_t* table;  // blocks of positions 0 .. start + end - begin
};

struct Span {
  const uint16_t* query;  // token 0 of the line; heads of one KV head lie together
  Input* out;
  int64_t query_token, out_token;  // elements from one token to the next
  int64_t group;                   // query heads of a KV head
  float scale;
};

struct FlashScratch {
  std::vector<Input> query, weights;
  std::vector<uint16_t> keys, values;
  std::vector<float> scores, sums, peak, total;
  void fit(int64_t rows, int64_t size) {
    query.resize(rows * size);
    weights.resize(rows * TILE_KEYS);
    keys.resize(TILE_KEYS * size);
    values.resize(TILE_KEYS * size);
    scores.resize(rows * TILE_KEYS);
    sums.resize(rows * size);
    peak.resize(rows);
    total.resize(rows);
  }
};

inline void put_one(uint16_t& to, float x) {
  Bf16 one;
  store(one, x);
  to = one.bits;
}
inline void put_one(float& to, float x) { to = x; }

inline int64_t span_tokens(int64_t group) { return std::max<int64_t>(1, SPAN_ROWS / group); }

// Packs ``count`` keys and values from position ``first`` on; the rest of the tile is zero.
inline void pack_tile(const Layer& layer, const int64_t* table, int64_t head, int64_t first,
                      int64_t count, FlashScratch& s) {
  const int64_t size = layer.key_size, pairs = size / 2;
  const uint16_t* keys[TILE_KEYS];
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = first + t, place = at % layer.block_size;
    keys[t] = static_cast<const uint16_t*>(layer.pool) +
              table[at / layer.block_size] * layer.block_stride + layer.key_offset +
              (place * layer.heads + head) * size;
  }
  if (count < TILE_KEYS) {
    std::fill(s.keys.begin(), s.keys.end(), uint16_t(0));
    std::fill(s.values.begin(), s.values.end(), uint16_t(0));
  }
  for (int64_t t = 0; t < count; ++t) {
    uint16_t* to = s.keys.data() + t / PANEL * pairs * PANEL * 2 + t % PANEL * 2;
    for (int64_t p = 0; p < pairs; ++p) std::memcpy(to + p * PANEL * 2, keys[t] + 2 * p, 4);
  }
  alignas(64) static const uint16_t zeros[256] = {};
  const int64_t values = layer.value_offset - layer.key_offset;
  for (int64_t t = 0; t < count; t += 2) {
    const uint16_t* even = keys[t] + values;
    const uint16_t* odd = t + 1 < count ? keys[t + 1] + values : zeros;
    for (int64_t panel = 0; panel < size / PANEL; ++panel) {
      uint16_t* to = s.values.data() + (panel * TILE_KEYS + t) * PANEL;
      for (int64_t d = 0; d < PANEL; ++d) {
        to[2 * d] = even[panel * PANEL + d];
        to[2 * d + 1] = odd[panel * PANEL + d];
      }
    }
  }
}

// Rows of ``a`` from ``from`` on times the packed tile ``b`` [width / 32 panels].
template <bool ADD>
inline void multiply(const Input* a, int64_t depth, const uint16_t* b, int64_t width,
                     float* out, int64_t from, int64_t rows) {
  if (from >= rows) return;
  const int64_t each = tile_rows(rows - from);
  for (int64_t panel = 0; panel < width / PANEL; ++panel) {
    const uint16_t* own = b + panel * depth * PANEL;
    for (int64_t row = from; row < rows; row += each) {
      tile_of<ADD>(std::min(each, rows - row))(
          a + row * depth, depth, own, depth / 2, out + row * width + panel * PANEL, width,
          Fetch{reinterpret_cast<const char*>(own), 0, 0});
    }
  }
}

// Turns one row of scores into weights and brings peak, total and sums up to date.
inline void fold_row(float* scores, int64_t seen, float scale, float& peak, float& total,
                     float* sums, int64_t size, Input* weights) {
  constexpr int64_t PARTS = TILE_KEYS / LANES;
  constexpr float NONE = -std::numeric_limits<float>::infinity();
  const Whole lanes = lane_numbers();
  V part[PARTS];
  V best = all(peak);
  for (int64_t i = 0; i < PARTS; ++i) {
    const Whole seen_by = lanes < static_cast<int32_t>(seen - LANES * i);
    part[i] = seen_by ? load(scores + LANES * i) * scale : all(NONE);
    best = best > part[i] ? best : part[i];
  }
  const float top = largest_of(best);
  V sum = {};
  for (int64_t i = 0; i < PARTS; ++i) {
    const V weight = part[i] != NONE ? exp_of(part[i] - top) : V{};  // NaN for a NaN
    sum += weight;
    put(weights + LANES * i, weight);
  }
  if (top > peak) {
    const float shrink = peak == NONE ? 0.0f : std::exp(peak - top);
    total *= shrink;
    for (int64_t d = 0; d < size; d += LANES) store(sums + d, load(sums + d) * shrink);
    peak = top;
  }
  total += sum_of(sum);
}

// Queries [low, high) of the row (counted from its first) under one KV head.
inline void attend_span(const Layer& layer, const LongRow& row, const Span& span, int64_t head,
                        int64_t low, int64_t high, FlashScratch& s) {
  const int64_t size = layer.key_size, group = span.group, rows = (high - low) * group;
  s.fit(rows, size);
  for (int64_t t = low; t < high; ++t) {
    take(s.query.data() + (t - low) * group * size,
         span.query + (row.begin + t) * span.query_token + head * group * size, group * size);
  }
  std::fill(s.sums.begin(), s.sums.begin() + rows * size, 0.0f);
  std::fill(s.total.begin(), s.total.begin() + rows, 0.0f);
  std::fill(s.peak.begin(), s.peak.begin() + rows, -std::numeric_limits<float>::infinity());
  const int64_t base = row.start + low, end = row.start + high;
  for (int64_t first = 0; first < end; first += TILE_KEYS) {
    const int64_t count = std::min(TILE_KEYS, end - first);
    pack_tile(layer, row.table, head, first, count, s);
    // Queries before the tile's first key see none of it.
    const int64_t from = std::max<int64_t>(0, first - base) * group;
    multiply<false>(s.query.data(), size, s.keys.data(), TILE_KEYS, s.scores.data(), from, rows);
    for (int64_t r = from; r < rows; ++r) {
      const int64_t seen = std::min(TILE_KEYS, base + r / group + 1 - first);
      fold_row(&s.scores[r * TILE_KEYS], seen, span.scale, s.peak[r], s.total[r],
               &s.sums[r * size], size, &s.weights[r * TILE_KEYS]);
    }
    multiply<true>(s.weights.data(), TILE_KEYS, s.values.data(), size, s.sums.data(), from, rows);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = 1.0f / s.total[r];
    Input* to = span.out + (row.begin + low + r / group) * span.out_token +
                (head * group + r % group) * size;
    for (int64_t d = 0; d < size; d += LANES) put(to + d, load(&s.sums[r * size + d]) * scale);
  }
}

}  // namespace

#endif  // HAS_TILES
