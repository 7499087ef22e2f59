// All layers of a Llama-like decoder over a paged KV pool, in one call for a whole step.
//
// Per layer: norm, query/key/value, rotation and the write to the pool, attention, output added to
// the stream, norm, gate and up, down added to the stream. Each is a stage of the team (team.h). The
// stream of T tokens stays float; what enters a product is what the processor multiplies (vectors.h).
#pragma once

#include <type_traits>

#include "flash.h"
#include "linear.h"

#if HAS_TILES

#include "team.h"
#include "turns.h"

namespace {

struct DecoderLayer {  // mirrored in fused.py, like the two below
  const float* norm_in;
  const float* norm_mid;
  const float* norm_query;  // over each head, or null
  const float* norm_key;
  Linear query, key, value, output, gate, up, down;
  Layer kv;
};

struct Decoder {
  const DecoderLayer* layers;
  int64_t count;
  int64_t width;   // of the stream
  int64_t heads;   // query heads
  double epsilon;
  double scale;    // of scores
  const float* norm_out;
  Linear head;
};

struct DecoderStep {
  Step step;
  int64_t longs;
  const LongRow* rows;
  const float* cosines;  // [T, size / 2]
  const float* sines;
  float* stream;         // [T, width]: the embeddings, overwritten
  Input* normed;         // [T, width]
  uint16_t* mixed;       // [T, (heads + 2 * KV heads) * size]: query, key, value of each token
  Input* attended;       // [T, heads * size]
  Input* active;         // [T, inner width]
  int64_t wanted;
  const int64_t* places;  // [wanted] of the line
  float* logits;          // [wanted, vocabulary]
  Turn* turn;             // null: nobody shares the cores
  const int32_t* cores;   // [threads], null: the system chooses
};

constexpr int64_t BLOCK_ROWS = 224 / sizeof(Input);  // whose inputs stay in the second cache

template <class To>
inline void rms_norm(const float* x, const float* weight, double epsilon, int64_t width, To* out) {
  V sum = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const V v = load(x + i);
    sum = fused(v, v, sum);
  }
  float squares = sum_of(sum);
  for (; i < width; ++i) squares += x[i] * x[i];
  const float by = 1.0f / std::sqrt(squares / static_cast<float>(width) + static_cast<float>(epsilon));
  for (i = 0; i + LANES <= width; i += LANES) put(out + i, load(x + i) * by * load(weight + i));
  for (; i < width; ++i) put_one(out[i], x[i] * by * weight[i]);
}

// How a stage's products are cut into pieces: blocks of rows times runs of panels.
struct Cut {
  int64_t rows, panels;       // all
  int64_t block, run;         // of a piece
  int64_t blocks, runs;
  Cut(int64_t rows_, int64_t panels_, int64_t threads) : rows(rows_), panels(panels_) {
    blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    block = (rows + blocks - 1) / blocks;
    // Some pieces for each thread, so that none waits long for the others.
    const int64_t wanted = std::max<int64_t>(1, (4 * threads + blocks - 1) / blocks);
    run = std::max<int64_t>(1, (panels + wanted - 1) / wanted);
    runs = (panels + run - 1) / run;
  }
  int64_t pieces() const { return blocks * runs; }
  int64_t begin(int64_t piece) const { return piece / runs * block; }  // its rows
  int64_t end(int64_t piece) const { return std::min(rows, begin(piece) + block); }
  template <class Each>  // each(panel, begin, end)
  void walk(int64_t piece, Each each) const {
    const int64_t first = piece % runs * run;
    for (int64_t p = first; p < std::min(panels, first + run); ++p) each(p, begin(piece), end(piece));
  }
};

class Pass {  // one thread's way through a step
 public:
  Pass(const Decoder& decoder, const DecoderStep& step, Team& team, bool first)
      : d_(decoder), s_(step), team_(team), first_(first), size_(decoder.layers[0].kv.key_size),
        kv_heads_(decoder.layers[0].kv.heads) {
    mixed_ = (d_.heads + 2 * kv_heads_) * size_;
  }

  void run() {
    for (int64_t i = 0; i < d_.count; ++i) {
      const DecoderLayer& layer = d_.layers[i];
      if (first_) let_others_in();
      norm(layer.norm_in);
      mix(layer);
      rotate(layer);
      attend_all(layer);
      add(layer.output, s_.attended);
      norm(layer.norm_mid);
      activate(layer);
      add(layer.down, s_.active);
    }
    if (s_.wanted > 0) head();
  }

 private:
  int64_t tokens() const { return s_.step.tokens; }

  void let_others_in() {
    if (s_.turn == nullptr || !turn_is_over(*s_.turn)) return;
    team_.rest(true);
    give_turn(*s_.turn);
    take_turn(*s_.turn);
    ++s_.turn->given;
    team_.rest(false);
  }

  template <class Work>  // work(token) for every token, in runs of some
  void each_token(Work work) {
    const int64_t run = tokens() >= 256 ? 16 : 4;
    team_.share(stage_, (tokens() + run - 1) / run, [&](int64_t piece) {
      for (int64_t t = piece * run; t < std::min(tokens(), (piece + 1) * run); ++t) work(t);
    });
  }

  void norm(const float* weight) {
    each_token([&](int64_t t) {
      rms_norm(s_.stream + t * d_.width, weight, d_.epsilon, d_.width, s_.normed + t * d_.width);
    });
  }

  void mix(const DecoderLayer& layer) {
    const Linear* parts[3] = {&layer.query, &layer.key, &layer.value};
    const int64_t q = panels(layer.query), k = panels(layer.key), v = panels(layer.value);
    const Cut cut(tokens(), q + k + v, s_.step.threads);
    team_.share(stage_, cut.pieces(), [&](int64_t piece) {
      prepare(layer.query, s_.normed, d_.width, cut.begin(piece), cut.end(piece), scratch_);
      cut.walk(piece, [&](int64_t p, int64_t begin, int64_t end) {
        const int which = p < q ? 0 : p < q + k ? 1 : 2;
        const int64_t own = which == 0 ? p : which == 1 ? p - q : p - q - k;
        uint16_t* to = s_.mixed + p * PANEL;
        panel_product(*parts[which], own, panel_of(*parts[which], own + 1), s_.normed, d_.width,
                      begin, end, scratch_, [&](int64_t row, const float* sums) {
                        for (int64_t c = 0; c < PANEL; c += LANES) {
                          narrow(to + row * mixed_ + c, load(sums + c));
                        }
                      });
      });
    });
  }

  // Rotates one head in place, after its norm if it has one.
  void turn(uint16_t* head, const float* weight, const float* cosine, const float* sine) {
    if (weight != nullptr) {
      alignas(64) float wide[512];
      for (int64_t i = 0; i < size_; i += LANES) store(wide + i, widen(head + i));
      rms_norm(wide, weight, d_.epsilon, size_, head);
    }
    const int64_t half = size_ / 2;
    for (int64_t i = 0; i < half; i += LANES) {
      const V a = widen(head + i), b = widen(head + half + i);
      const V c = load(cosine + i), s = load(sine + i);
      narrow(head + i, fused(a, c, -(b * s)));
      narrow(head + half + i, fused(b, c, a * s));
    }
  }

  void rotate(const DecoderLayer& layer) {
    const Layer& kv = layer.kv;
    const int64_t half = size_ / 2, part = kv_heads_ * size_;
    each_token([&](int64_t t) {
      uint16_t* query = s_.mixed + t * mixed_;
      uint16_t* key = query + d_.heads * size_;
      const float *cosine = s_.cosines + t * half, *sine = s_.sines + t * half;
      for (int64_t h = 0; h < d_.heads; ++h) {
        turn(query + h * size_, layer.norm_query, cosine, sine);
      }
      for (int64_t h = 0; h < kv_heads_; ++h) turn(key + h * size_, layer.norm_key, cosine, sine);
      uint16_t* block =
          static_cast<uint16_t*>(kv.pool) + s_.step.slot_blocks[t] * kv.block_stride;
      const int64_t place = s_.step.slot_offsets[t] * part;
      std::memcpy(block + kv.key_offset + place, key, part * 2);
      std::memcpy(block + kv.value_offset + place, key + part, part * 2);
    });
  }

  void attend_all(const DecoderLayer& layer) {
    const int64_t group = d_.heads / kv_heads_, each = span_tokens(group);
    int64_t spans = 0;
    for (int64_t i = 0; i < s_.longs; ++i) spans += spans_of(s_.rows[i], each) * kv_heads_;
    team_.share(stage_, spans + s_.step.items * kv_heads_, [&](int64_t piece) {
      if (piece >= spans) {
        short_piece(layer, piece - spans, group);
      } else {
        long_piece(layer, piece, group, each);
      }
    });
  }

  static int64_t spans_of(const LongRow& row, int64_t each) {
    return (row.end - row.begin + each - 1) / each;
  }

  void long_piece(const DecoderLayer& layer, int64_t piece, int64_t group, int64_t each) {
    int64_t i = 0;
    for (; piece >= spans_of(s_.rows[i], each) * kv_heads_; ++i) {
      piece -= spans_of(s_.rows[i], each) * kv_heads_;
    }
    const LongRow& row = s_.rows[i];
    // The last queries see the most keys: theirs are the pieces to start with.
    const int64_t last = spans_of(row, each) - 1 - piece / kv_heads_;
    const Span span = {s_.mixed, s_.attended, mixed_, d_.heads * size_, group,
                       static_cast<float>(d_.scale)};
    attend_span(layer.kv, row, span, piece % kv_heads_, last * each,
                std::min(row.end - row.begin, (last + 1) * each), flash_);
  }

  void short_piece(const DecoderLayer& layer, int64_t piece, int64_t group) {
    Call call = {};
    call.query = s_.mixed;
    call.query_head = size_;
    call.query_token = mixed_;
    call.out = s_.attended;
    call.query_heads = d_.heads;
    call.scale = d_.scale;
    const int64_t item = piece / kv_heads_, head = piece % kv_heads_;
    single_.fit(group, size_, size_);
    typedef std::conditional_t<HAS_BF16_DOT, Bf16, float> Out;
    const Step& step = s_.step;
    if (size_ == 64) return attend<Bf16, float, 64, Out>(layer.kv, step, call, item, head, single_);
    if (size_ == 128) return attend<Bf16, float, 128, Out>(layer.kv, step, call, item, head, single_);
    attend<Bf16, float, 0, Out>(layer.kv, step, call, item, head, single_);
  }

  // stream += linear(a)
  void add(const Linear& linear, const Input* a) {
    const Cut cut(tokens(), panels(linear), s_.step.threads);
    team_.share(stage_, cut.pieces(), [&](int64_t piece) {
      prepare(linear, a, linear.k, cut.begin(piece), cut.end(piece), scratch_);
      cut.walk(piece, [&](int64_t p, int64_t begin, int64_t end) {
        panel_product(linear, p, panel_of(linear, p + 1), a, linear.k, begin, end, scratch_,
                      [&](int64_t row, const float* sums) {
                        float* to = s_.stream + row * d_.width + p * PANEL;
                        for (int64_t c = 0; c < PANEL; ++c) to[c] += sums[c];
                      });
      });
    });
  }

  // active = silu(gate) * up
  void activate(const DecoderLayer& layer) {
    const int64_t inner = layer.gate.n;
    const Cut cut(tokens(), panels(layer.gate), s_.step.threads);
    team_.share(stage_, cut.pieces(), [&](int64_t piece) {
      alignas(64) float gates[BLOCK_ROWS * PANEL];
      prepare(layer.gate, s_.normed, d_.width, cut.begin(piece), cut.end(piece), scratch_);
      cut.walk(piece, [&](int64_t p, int64_t begin, int64_t end) {
        panel_product(layer.gate, p, panel_of(layer.up, p), s_.normed, d_.width, begin, end,
                      scratch_, [&](int64_t row, const float* sums) {
                        std::memcpy(gates + (row - begin) * PANEL, sums, PANEL * sizeof(float));
                      });
        panel_product(layer.up, p, panel_of(layer.gate, p + 1), s_.normed, d_.width, begin, end,
                      scratch_, [&](int64_t row, const float* sums) {
                        Input* to = s_.active + row * inner + p * PANEL;
                        const float* gate = gates + (row - begin) * PANEL;
                        for (int64_t c = 0; c < PANEL; c += LANES) {
                          const V g = load(gate + c);
                          put(to + c, g / (1.0f + exp_of(-g)) * load(sums + c));
                        }
                      });
      });
    });
  }

  void head() {
    team_.share(stage_, s_.wanted, [&](int64_t i) {
      rms_norm(s_.stream + s_.places[i] * d_.width, d_.norm_out, d_.epsilon, d_.width,
               s_.normed + i * d_.width);
    });
    const Cut cut(s_.wanted, panels(d_.head), 4 * s_.step.threads);
    team_.share(stage_, cut.pieces(), [&](int64_t piece) {
      prepare(d_.head, s_.normed, d_.width, cut.begin(piece), cut.end(piece), scratch_);
      cut.walk(piece, [&](int64_t p, int64_t begin, int64_t end) {
        const int64_t count = std::min(PANEL, d_.head.n - p * PANEL);
        panel_product(d_.head, p, panel_of(d_.head, p + 1), s_.normed, d_.width, begin, end,
                      scratch_, [&](int64_t row, const float* sums) {
                        std::memcpy(s_.logits + row * d_.head.n + p * PANEL, sums,
                                    count * sizeof(float));
                      });
      });
    });
  }

  const Decoder& d_;
  const DecoderStep& s_;
  Team& team_;
  const bool first_;
  int64_t size_, kv_heads_, mixed_ = 0, stage_ = 0;
  FlashScratch flash_;
  Scratch<float> single_;
  GroupScratch scratch_;
};

}  // namespace

#endif  // HAS_TILES
