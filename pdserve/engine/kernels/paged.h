// Attention of single tokens over a paged KV pool, and the write of new KV into it.
//
// The structures mirror the ones declared in native.py. Keys and values are read in place, block by
// block. Sums are float (double for a double pool) with an online softmax. One (token, KV head) pair
// is computed by one thread in a fixed order, so its result depends neither on the batch nor on the
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct Layer {
  void* pool;             // block 0
  int64_t block_stride;   // elements
  int64_t key_offset;     // elements, inside a block
  int64_t value_offset;
  int64_t heads;          // KV heads
  int64_t key_size;
  int64_t value_size;
  int64_t block_size;     // tokens
  int64_t dtype;          // 0 bfloat16, 1 float32, 2 float64
};

struct Step {
  int64_t tokens;
  const int32_t* slot_blocks;   // [tokens]
  const int32_t* slot_offsets;  // [tokens]
  int64_t items;
  const int32_t* item_tokens;   // [items]
  const int32_t* item_rows;
  const int32_t* item_contexts;
  const int32_t* tables;
  int64_t table_stride;
  int64_t threads;
};

struct Call {  // strides in elements; the last dimension is contiguous
  const void* query;
  int64_t query_head, query_token;
  const void* key;
  int64_t key_head, key_token;
  const void* value;
  int64_t value_head, value_token;
  void* out;                    // [tokens, query_heads, value_size]
  int64_t query_heads;
  int64_t window;               // 0: none
  double scale;
  double softcap;               // 0: none
};

struct Bf16 {
  uint16_t bits;
};

inline float load(Bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
inline float load(float x) { return x; }
inline double load(double x) { return x; }

inline void store(Bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to.bits = 0x7fc0;  // NaN stays NaN
  } else {
    to.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}
inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }

// exp for x <= 0, branch-free so that loops over it vectorize; relative error below 3e-7.
inline float exp_negative(float x) {
  float clamped = x < -87.0f ? -87.0f : x;
  float n = std::floor(clamped * 1.44269504088896341f + 0.5f);
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  float out = p * power;
  out = x < -87.0f ? 0.0f : out;
  return x == x ? out : x;
}
inline double exp_negative(double x) { return std::exp(x); }

constexpr int64_t TILE = 64;  // positions that are folded into the running sums together

template <class A>
struct Scratch {
  std::vector<A> query, sums, scores, peak, total;
  void fit(int64_t group, int64_t key_size, int64_t value_size) {
    query.resize(group * key_size);
    sums.resize(group * value_size);
    scores.resize(group * TILE);
    peak.resize(group);
    total.resize(group);
  }
};

// 64 bytes of sums, written as one value; the compiler splits it where registers are narrower.
template <class A>
struct Wide;
template <>
struct Wide<float> {
  typedef float type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 16;
};
template <>
struct Wide<double> {
  typedef double type __attribute__((vector_size(64)));
  static constexpr int64_t lanes = 8;
};

inline Wide<float>::type load_wide(const float* from) {
  Wide<float>::type out;
  std::memcpy(&out, from, 64);
  return out;
}
inline Wide<double>::type load_wide(const double* from) {
  Wide<double>::type out;
  std::memcpy(&out, from, 64);
  return out;
}
inline Wide<float>::type load_wide(const Bf16* from) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Full __attribute__((vector_size(64)));
  Half half;
  std::memcpy(&half, from, 32);
  return (Wide<float>::type)(__builtin_convertvector(half, Full) << 16);
}

inline float sum_lanes(Wide<float>::type x) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  V8 a, b;
  std::memcpy(&a, &x, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + 32, 32);
  a += b;
  V4 c, d;
  std::memcpy(&c, &a, 16);
  std::memcpy(&d, reinterpret_cast<const char*>(&a) + 16, 16);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}
inline double sum_lanes(Wide<double>::type x) {
  typedef double V4 __attribute__((vector_size(32)));
  V4 a, b;
  std::memcpy(&a, &x, 32);
  std::memcpy(&b, reinterpret_cast<const char*>(&x) + 32, 32);
  a += b;
  return (a[0] + a[2]) + (a[1] + a[3]);
}

// Scores of one key row under ``group`` query heads; scores[g * TILE].
template <class T, class A, int64_t FIXED>
inline void score_row(const T* __restrict key, const A* __restrict query, int64_t group,
                      int64_t size, A* __restrict scores) {
  if constexpr (FIXED > 0) {
    constexpr int64_t lanes = Wide<A>::lanes, parts = FIXED / lanes;
    typename Wide<A>::type row[parts];
    for (int64_t i = 0; i < parts; ++i) row[i] = load_wide(key + i * lanes);
    for (int64_t g = 0; g < group; ++g) {
      const A* head = query + g * FIXED;
      typename Wide<A>::type sum = row[0] * load_wide(head);
      for (int64_t i = 1; i < parts; ++i) sum += row[i] * load_wide(head + i * lanes);
      scores[g * TILE] = sum_lanes(sum);
    }
  } else {
    for (int64_t g = 0; g < group; ++g) {
      A sum = 0;
      for (int64_t d = 0; d < size; ++d) sum += load(key[d]) * query[g * size + d];
      scores[g * TILE] = sum;
    }
  }
}

// Folds one tile of scores into a query head's running maximum and total, and shrinks its weighted
// sum to the new maximum. On return ``scores`` holds the weights of the tile's values.
template <class A>
inline void fold(A* __restrict scores, int64_t rows, A softcap, A& peak, A& total,
                 A* __restrict sums, int64_t size) {
  if (softcap > 0) {
    for (int64_t t = 0; t < rows; ++t) scores[t] = softcap * std::tanh(scores[t] / softcap);
  }
  A best = peak;
  for (int64_t t = 0; t < rows; ++t) best = scores[t] > best ? scores[t] : best;
  A sum = 0;
  for (int64_t t = 0; t < rows; ++t) {
    scores[t] = exp_negative(scores[t] - best);
    sum += scores[t];
  }
  A shrink = peak == -std::numeric_limits<A>::infinity() ? A(0) : exp_negative(peak - best);
  total = total * shrink + sum;
  peak = best;
  for (int64_t d = 0; d < size; ++d) sums[d] *= shrink;
}

// Blocks lie far apart, so that the processor's own prefetching starts anew in each of them.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + at);
  }
}

// Where the keys (or values) of the positions from ``at`` on lie, up to the end of their block.
template <class T>
struct Piece {
  const T* first;
  int64_t rows;
};

template <class T>
inline Piece<T> piece(const Layer& layer, const int32_t* table, int64_t at, int64_t end,
                      int64_t part_offset, int64_t head, int64_t size) {
  const int64_t offset = at % layer.block_size;
  const T* block =
      static_cast<const T*>(layer.pool) + table[at / layer.block_size] * layer.block_stride;
  return {block + part_offset + (offset * layer.heads + head) * size,
          std::min(layer.block_size - offset, end - at)};
}

// Adds the weighted values of a piece to one query head's sums. The sums of a fixed size stay in
// registers for the whole piece.
template <class T, class A, int64_t FIXED>
inline void add_values(const T* __restrict values, int64_t stride, int64_t rows,
                       const A* __restrict weights, A* __restrict sums, int64_t size) {
  if constexpr (FIXED > 0) {
    constexpr int64_t lanes = Wide<A>::lanes, parts = FIXED / lanes;
    typename Wide<A>::type part[parts];
    for (int64_t i = 0; i < parts; ++i) part[i] = load_wide(sums + i * lanes);
    for (int64_t t = 0; t < rows; ++t) {
      const T* value = values + t * stride;
      for (int64_t i = 0; i < parts; ++i) part[i] += weights[t] * load_wide(value + i * lanes);
    }
    std::memcpy(sums, part, sizeof(part));
  } else {
    for (int64_t t = 0; t < rows; ++t) {
      const T* __restrict value = values + t * stride;
      for (int64_t d = 0; d < size; ++d) sums[d] += weights[t] * load(value[d]);
    }
  }
}

// FIXED: the head size when it is known at compile time and equal for keys and values, else 0.
// O: what ``call.out`` is made of.
template <class T, class A, int64_t FIXED, class O = T>
void attend(const Layer& layer, const Step& step, const Call& call, int64_t item, int64_t head,
            Scratch<A>& s) {
  const int64_t ks = FIXED ? FIXED : layer.key_size;
  const int64_t vs = FIXED ? FIXED : layer.value_size;
  const bool equal = ks == vs;
  const int64_t group = call.query_heads / layer.heads;
  const int64_t token = step.item_tokens[item];
  const int64_t context = step.item_contexts[item];
  const int32_t* table = step.tables + step.item_rows[item] * step.table_stride;
  const T* query = static_cast<const T*>(call.query) + token * call.query_token;
  for (int64_t g = 0; g < group; ++g) {
    const T* row = query + (head * group + g) * call.query_head;
    for (int64_t d = 0; d < ks; ++d) s.query[g * ks + d] = load(row[d]) * A(call.scale);
    s.peak[g] = -std::numeric_limits<A>::infinity();
    s.total[g] = 0;
  }
  std::fill(s.sums.begin(), s.sums.begin() + group * vs, A(0));
  const int64_t first = call.window > 0 && context > call.window ? context - call.window : 0;
  for (int64_t tile = first; tile < context; tile += TILE) {
    const int64_t end = std::min(tile + TILE, context);
    for (int64_t at = tile; at < end;) {
      auto keys = piece<T>(layer, table, at, end, layer.key_offset, head, ks);
      // Values lie behind the keys of the same block; they are wanted next.
      const T* values = keys.first - layer.key_offset + layer.value_offset;
      for (int64_t t = 0; t < keys.rows; ++t) {
        if (equal) prefetch(values + t * layer.heads * ks, vs * sizeof(T));
        score_row<T, A, FIXED>(keys.first + t * layer.heads * ks, s.query.data(), group, ks,
                               &s.scores[at - tile + t]);
      }
      at += keys.rows;
    }
    for (int64_t g = 0; g < group; ++g) {
      fold<A>(&s.scores[g * TILE], end - tile, A(call.softcap), s.peak[g], s.total[g],
              &s.sums[g * vs], vs);
    }
    for (int64_t at = tile; at < end;) {
      auto values = piece<T>(layer, table, at, end, layer.value_offset, head, vs);
      if (at + TILE < context) {
        auto next = piece<T>(layer, table, at + TILE, context, layer.key_offset, head, ks);
        for (int64_t t = 0; t < next.rows; ++t) {
          prefetch(next.first + t * layer.heads * ks, ks * sizeof(T));
        }
      }
      for (int64_t g = 0; g < group; ++g) {
        add_values<T, A, FIXED>(values.first, layer.heads * vs, values.rows,
                                &s.scores[g * TILE + at - tile], &s.sums[g * vs], vs);
      }
      at += values.rows;
    }
  }
  O* out = static_cast<O*>(call.out) + (token * call.query_heads + head * group) * vs;
  for (int64_t g = 0; g < group; ++g) {
    const A scale = A(1) / s.total[g];
    for (int64_t d = 0; d < vs; ++d) store(out[g * vs + d], s.sums[g * vs + d] * scale);
  }
}

template <class T>
void write_kv(const Layer& layer, const Step& step, const Call& call) {
  T* pool = static_cast<T*>(layer.pool);
  for (int64_t token = 0; token < step.tokens; ++token) {
    T* block = pool + step.slot_blocks[token] * layer.block_stride;
    const int64_t place = step.slot_offsets[token] * layer.heads;
    const T* key = static_cast<const T*>(call.key) + token * call.key_token;
    const T* value = static_cast<const T*>(call.value) + token * call.value_token;
    for (int64_t head = 0; head < layer.heads; ++head) {
      std::memcpy(block + layer.key_offset + (place + head) * layer.key_size,
                  key + head * call.key_head, layer.key_size * sizeof(T));
      std::memcpy(block + layer.value_offset + (place + head) * layer.value_size,
                  value + head * call.value_head, layer.value_size * sizeof(T));
    }
  }
}

}  // namespace
