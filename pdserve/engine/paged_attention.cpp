// Attention of single tokens over a paged KV pool, and the write of new KV into it.
//
// Plain C interface, loaded by native.py; the structures below mirror the ones declared there.
// Keys and values are read in place, block by block. Sums are float (double for a double pool) with
// an online softmax. One (token, KV head) pair is computed by one thread in a fixed order, so its
// result depends neither on the batch nor on the number of threads.

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

constexpr int64_t TILE = 64;  // positions handled together

template <class T, class A>
struct Scratch {
  std::vector<A> query, sums, tile, scores, peak, total;
  void fit(int64_t group, int64_t key_size, int64_t value_size) {
    query.resize(group * key_size);
    sums.resize(group * value_size);
    tile.resize(TILE * std::max(key_size, value_size));
    scores.resize(group * TILE);
    peak.resize(group);
    total.resize(group);
  }
};

template <class T, class A>
inline void widen(const T* from, int64_t stride, int64_t rows, int64_t size, A* to) {
  for (int64_t t = 0; t < rows; ++t) {
    const T* row = from + t * stride;
    A* wide = to + t * size;
    for (int64_t d = 0; d < size; ++d) wide[d] = load(row[d]);
  }
}

template <class A>
inline A dot(const A* a, const A* b, int64_t size) {
  A sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += a[d] * b[d];
  return sum;
}

// Folds one tile of scores into a query head's running maximum, total and weighted sum. On return
// ``scores`` holds the weights of the tile's values.
template <class A>
inline void fold(A* scores, int64_t rows, A softcap, A& peak, A& total, A* sums, int64_t size) {
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

// FIXED: the head size when it is known at compile time and equal for keys and values, else 0.
template <class T, class A, int64_t FIXED>
void attend(const Layer& layer, const Step& step, const Call& call, int64_t item, int64_t head,
            Scratch<T, A>& s) {
  const int64_t ks = FIXED ? FIXED : layer.key_size;
  const int64_t vs = FIXED ? FIXED : layer.value_size;
  const int64_t group = call.query_heads / layer.heads;
  const int64_t token = step.item_tokens[item];
  const int64_t context = step.item_contexts[item];
  const int32_t* table = step.tables + step.item_rows[item] * step.table_stride;
  const T* pool = static_cast<const T*>(layer.pool);
  const T* query = static_cast<const T*>(call.query) + token * call.query_token;
  for (int64_t g = 0; g < group; ++g) {
    const T* row = query + (head * group + g) * call.query_head;
    for (int64_t d = 0; d < ks; ++d) s.query[g * ks + d] = load(row[d]) * A(call.scale);
    s.peak[g] = -std::numeric_limits<A>::infinity();
    s.total[g] = 0;
  }
  std::fill(s.sums.begin(), s.sums.begin() + group * vs, A(0));
  const int64_t first = call.window > 0 && context > call.window ? context - call.window : 0;
  for (int64_t at = first; at < context;) {
    const int64_t offset = at % layer.block_size;
    const int64_t rows = std::min({layer.block_size - offset, context - at, TILE});
    const T* block = pool + table[at / layer.block_size] * layer.block_stride;
    const T* keys = block + layer.key_offset + (offset * layer.heads + head) * ks;
    const T* values = block + layer.value_offset + (offset * layer.heads + head) * vs;
    widen<T, A>(keys, layer.heads * ks, rows, ks, s.tile.data());
    for (int64_t g = 0; g < group; ++g) {
      A* scores = &s.scores[g * TILE];
      for (int64_t t = 0; t < rows; ++t) scores[t] = dot<A>(&s.query[g * ks], &s.tile[t * ks], ks);
      fold<A>(scores, rows, A(call.softcap), s.peak[g], s.total[g], &s.sums[g * vs], vs);
    }
    widen<T, A>(values, layer.heads * vs, rows, vs, s.tile.data());
    for (int64_t g = 0; g < group; ++g) {
      A* sums = &s.sums[g * vs];
      for (int64_t t = 0; t < rows; ++t) {
        const A weight = s.scores[g * TILE + t];
        const A* value = &s.tile[t * vs];
        for (int64_t d = 0; d < vs; ++d) sums[d] += weight * value[d];
      }
    }
    at += rows;
  }
  T* out = static_cast<T*>(call.out) + (token * call.query_heads + head * group) * vs;
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

template <class T, class A, int64_t FIXED>
void attend_all(const Layer& layer, const Step& step, const Call& call) {
  const int64_t pairs = step.items * layer.heads;
  int64_t keys = 0;
  for (int64_t i = 0; i < step.items; ++i) keys += step.item_contexts[i];
  // Waking the other threads costs more than very little work.
  const int threads = keys * layer.heads < 256 ? 1 : static_cast<int>(step.threads);
  const int64_t group = call.query_heads / layer.heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T, A> scratch;
    scratch.fit(group, layer.key_size, layer.value_size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      attend<T, A, FIXED>(layer, step, call, pair / layer.heads, pair % layer.heads, scratch);
    }
  }
}

template <class T, class A>
void run(const Layer& layer, const Step& step, const Call& call) {
  write_kv<T>(layer, step, call);
  if (step.items == 0) return;
  const bool equal = layer.key_size == layer.value_size;
  if (equal && layer.key_size == 64) return attend_all<T, A, 64>(layer, step, call);
  if (equal && layer.key_size == 128) return attend_all<T, A, 128>(layer, step, call);
  attend_all<T, A, 0>(layer, step, call);
}

}  // namespace

extern "C" {

// Writes the step's keys and values into the pool, then attends its items.
void pdserve_paged_attention(const Layer* layer, const Step* step, const Call* call) {
  switch (layer->dtype) {
    case 0: return run<Bf16, float>(*layer, *step, *call);
    case 1: return run<float, float>(*layer, *step, *call);
    case 2: return run<double, double>(*layer, *step, *call);
  }
}

// Bumped with every change of the structures above.
int64_t pdserve_paged_attention_abi() { return 1; }
}
