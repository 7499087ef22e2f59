// Products with a panel of 8- or 4-bit weights, unpacked in registers to bfloat16 (quantized.py), and
// from there to float where the processor multiplies no bfloat16.
//
// A panel [k, 32] lies group after group of 32 inputs: codes, 32 scales and, with 4 bits, 32 minima
// (float16). Codes are whole numbers that bfloat16 holds exactly, so they are multiplied as such; the
// group's sums are then scaled, and a minimum counts the sum of the group's inputs:
//     out = sum over groups (scale * (a . codes) + minimum * sum(a))
// No weight is rounded. A row's sums are made in the same order whatever rows are beside it.
#pragma once

#include <array>
#include <vector>

#include "tiles.h"

#if HAS_AVX512 && defined(__AVX512VBMI__)
#define HAS_GROUPS 1
#else
#define HAS_GROUPS 0
#endif

#if HAS_GROUPS

namespace {

constexpr int64_t GROUP = 32;       // inputs under one scale
constexpr int STEPS = 8;            // of a group: two pairs of inputs each
constexpr int64_t AHEAD = 8192;     // bytes that a lone tile fetches ahead

constexpr uint16_t bf16_of(unsigned code) {  // up to 255
  if (code == 0) return 0;
  unsigned exponent = 0;
  while (code >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>(((127 + exponent) << 7) | ((code << 7 >> exponent) & 127));
}

template <class T, int SIZE, class Of>
constexpr std::array<T, SIZE> table_of(Of of) {
  std::array<T, SIZE> table = {};
  for (int i = 0; i < SIZE; ++i) table[i] = of(i);
  return table;
}

// Sign and magnitude: a byte is looked up in 128 entries, once for each half of its bfloat16. Of the
// 16 bytes of a lane the first 8 are of columns 0 .. 15, the others of 16 .. 31.
struct Bits8 {
  static constexpr bool MINIMA = false;
  static constexpr int64_t STEP = 128, CODES = STEPS * STEP, BYTES = CODES + 64;
  alignas(64) static constexpr auto LOW = table_of<uint8_t, 128>([](int i) { return bf16_of(i); });
  alignas(64) static constexpr auto HIGH =
      table_of<uint8_t, 128>([](int i) { return bf16_of(i) >> 8; });
  const __m512i low0 = _mm512_load_si512(LOW.data()), low1 = _mm512_load_si512(LOW.data() + 64);
  const __m512i high0 = _mm512_load_si512(HIGH.data()), high1 = _mm512_load_si512(HIGH.data() + 64);
  const __m512i sign = _mm512_set1_epi8(-128);

  // Two pairs of inputs: of the first columns 0 .. 15 and 16 .. 31, then of the second.
  void unpack(const char* codes, __m512i* out) const {
    for (int pair = 0; pair < 2; ++pair) {
      const __m512i code = _mm512_loadu_si512(codes + 64 * pair);
      const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
      const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high0, code, high1),
                                                     code, sign, 0xf8);  // a | (b & c)
      out[2 * pair] = _mm512_unpacklo_epi8(low, high);
      out[2 * pair + 1] = _mm512_unpackhi_epi8(low, high);
    }
  }
};

// Four codes to a word, each of another of the four vectors. The table has every entry twice, as the
// fifth bit of an index is the next code's.
struct Bits4 {
  static constexpr bool MINIMA = true;
  static constexpr int64_t STEP = 64, CODES = STEPS * STEP, BYTES = CODES + 128;
  alignas(64) static constexpr auto VALUES =
      table_of<uint16_t, 32>([](int i) { return bf16_of(i % 16); });
  const __m512i values = _mm512_load_si512(VALUES.data());

  void unpack(const char* codes, __m512i* out) const {
    const __m512i code = _mm512_loadu_si512(codes);
    out[0] = _mm512_permutexvar_epi16(code, values);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 4), values);
    out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 8), values);
    out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 12), values);
  }
};

// Codes that were unpacked before, for many rows.
template <class Kind>
struct Unpacked {
  static constexpr bool MINIMA = Kind::MINIMA;
  static constexpr int64_t STEP = 256, CODES = STEPS * STEP;
  void unpack(const char* codes, __m512i* out) const {
    for (int i = 0; i < 4; ++i) out[i] = _mm512_loadu_si512(codes + 64 * i);
  }
};

struct GroupPanel {
  const char* codes;
  int64_t codes_step;  // bytes from one group to the next
  const char* scales;
  int64_t scales_step;
  int64_t groups;
};

// Memory to bring into the second cache: ``lines`` for each group, from ``from`` on, and from
// ``next`` on after ``turn`` groups.
struct GroupFetch {
  const char* from;
  const char* next;
  int64_t turn, lines;
};

inline __m512 halves(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Adds the products of one pair of inputs: ``b`` has those of columns 0 .. 15, then of 16 .. 31.
template <int ROWS>
inline __attribute__((always_inline)) void add_pair(const Input* a, int64_t lda, const __m512i* b,
                                                    __m512* left, __m512* right) {
#if HAS_BF16_DOT
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    int32_t two;
    std::memcpy(&two, a + r * lda, 4);
    const __m512i x = _mm512_set1_epi32(two);
    left[r] = dot(left[r], x, b[0]);
    right[r] = dot(right[r], x, b[1]);
  }
#else
  V low = half_of<0>((Bits)b[0]), high = half_of<0>((Bits)b[1]);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const V x = all(a[r * lda]);
    left[r] = (__m512)fused(x, low, (V)left[r]);
    right[r] = (__m512)fused(x, high, (V)right[r]);
  }
  low = half_of<1>((Bits)b[0]), high = half_of<1>((Bits)b[1]);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const V x = all(a[r * lda + 1]);
    left[r] = (__m512)fused(x, low, (V)left[r]);
    right[r] = (__m512)fused(x, high, (V)right[r]);
  }
#endif
}

// sums[r * PANEL + c] = a[r] . b[c] for ROWS rows and 32 columns. inputs[r * groups + g]: the sum of
// a[r] over group g, where there are minima.
template <int ROWS, class Codes>
void group_tile(const Input* a, int64_t lda, const GroupPanel& panel, const float* inputs,
                float* sums, GroupFetch fetch) {
  const Codes reader;
  const char* codes = panel.codes;
  const char* scales = panel.scales;
  for (int64_t i = 0; i < ROWS * PANEL; i += 16) _mm512_storeu_ps(sums + i, _mm512_setzero_ps());
  for (int64_t group = 0; group < panel.groups; ++group) {
    if (group == fetch.turn) fetch.from = fetch.next;
    for (int64_t line = 0; line < fetch.lines; ++line, fetch.from += 64) {
      _mm_prefetch(fetch.from, _MM_HINT_T1);
    }
    __m512 left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int step = 0; step < STEPS; ++step) {
      __m512i b[4];
      reader.unpack(codes + step * Codes::STEP, b);
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        add_pair<ROWS>(a + 4 * step + 2 * pair, lda, b + 2 * pair, left, right);
      }
    }
    const __m512 scale_left = halves(scales), scale_right = halves(scales + 32);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      float* own = sums + r * PANEL;
      left[r] = _mm512_fmadd_ps(left[r], scale_left, _mm512_loadu_ps(own));
      right[r] = _mm512_fmadd_ps(right[r], scale_right, _mm512_loadu_ps(own + 16));
      if (Codes::MINIMA) {
        const __m512 input = _mm512_set1_ps(inputs[r * panel.groups + group]);
        left[r] = _mm512_fmadd_ps(input, halves(scales + 64), left[r]);
        right[r] = _mm512_fmadd_ps(input, halves(scales + 96), right[r]);
      }
      _mm512_storeu_ps(own, left[r]);
      _mm512_storeu_ps(own + 16, right[r]);
    }
    a += GROUP;
    codes += panel.codes_step;
    scales += panel.scales_step;
  }
}

typedef void (*GroupTileFunction)(const Input*, int64_t, const GroupPanel&, const float*, float*,
                                  GroupFetch);

template <class Codes>
inline GroupTileFunction group_tile_of(int64_t rows) {
  static constexpr GroupTileFunction table[TILE_ROWS] = {
      group_tile<1, Codes>,  group_tile<2, Codes>,  group_tile<3, Codes>,  group_tile<4, Codes>,
      group_tile<5, Codes>,  group_tile<6, Codes>,  group_tile<7, Codes>,  group_tile<8, Codes>,
      group_tile<9, Codes>,  group_tile<10, Codes>, group_tile<11, Codes>, group_tile<12, Codes>,
      group_tile<13, Codes>, group_tile<14, Codes>};
  return table[rows - 1];
}

#if HAS_BF16_DOT
inline float sum_of_group(const uint16_t* inputs) {
  const __m512i ones = _mm512_set1_epi16(bf16_of(1));
  return _mm512_reduce_add_ps(dot(_mm512_setzero_ps(), _mm512_loadu_si512(inputs), ones));
}
#else
inline float sum_of_group(const float* inputs) {
  return sum_of(load(inputs) + load(inputs + LANES));
}
#endif

// What one thread keeps beside the rows it multiplies.
struct GroupScratch {
  std::vector<float> inputs;    // [rows][groups]: sums of the rows' inputs over each group
  std::vector<uint16_t> codes;  // of one panel, unpacked

  // To be called before the products of these rows with a weight that has minima.
  void sum_inputs(const Input* a, int64_t lda, int64_t k, int64_t begin, int64_t end) {
    const int64_t groups = k / GROUP;
    inputs.resize((end - begin) * groups);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        inputs[(row - begin) * groups + g] = sum_of_group(a + row * lda + g * GROUP);
      }
    }
  }

  template <class Kind>
  void unpack(const char* panel, int64_t groups) {
    codes.resize(groups * GROUP * PANEL);
    const Kind reader;
    uint16_t* to = codes.data();
    for (int64_t group = 0; group < groups; ++group, panel += Kind::BYTES) {
      for (int step = 0; step < STEPS; ++step, to += 128) {
        __m512i out[4];
        reader.unpack(panel + step * Kind::STEP, out);
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 32 * i, out[i]);
      }
    }
  }
};

// Products of ``tiles`` tiles of ``each`` of the rows [begin, end) with one panel, each tile's handed to
// done(row, rows, sums). ``next``: the panel to be read after this one.
template <class Kind, class Done>
void group_products(const char* panel, const char* next, int64_t k, const Input* a, int64_t lda,
                    int64_t begin, int64_t end, int64_t each, GroupScratch& scratch, float* sums,
                    Done done) {
  const int64_t groups = k / GROUP, bytes = groups * Kind::BYTES;
  const float* inputs = Kind::MINIMA ? scratch.inputs.data() : nullptr;
  GroupPanel own = {panel, Kind::BYTES, panel + Kind::CODES, Kind::BYTES, groups};
  if (end - begin <= each) {
    const int64_t ahead = std::min(groups, AHEAD / Kind::BYTES);
    const GroupFetch fetch = {panel + ahead * Kind::BYTES, next, groups - ahead, Kind::BYTES / 64};
    group_tile_of<Kind>(end - begin)(a + begin * lda, lda, own, inputs, sums, fetch);
    return done(begin, end - begin, sums);
  }
  scratch.unpack<Kind>(panel, groups);
  own.codes = reinterpret_cast<const char*>(scratch.codes.data());
  own.codes_step = Unpacked<Kind>::CODES;
  const int64_t lines = (bytes / 64 + groups - 1) / groups;
  for (int64_t row = begin; row < end; row += each) {
    const int64_t rows = std::min(each, end - row);
    // The first tile fetches the panel that comes next.
    const GroupFetch fetch = {next, next, -1, row == begin ? lines : 0};
    group_tile_of<Unpacked<Kind>>(rows)(a + row * lda, lda, own, inputs + (row - begin) * groups,
                                        sums, fetch);
    done(row, rows, sums);
  }
}

}  // namespace

#endif  // HAS_GROUPS
