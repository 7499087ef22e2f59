// The plain C interface of the native kernels; native.py builds and loads it.

#include "decoder.h"
#include "paged.h"
#include "spans.h"

namespace {

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
    Scratch<A> scratch;
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

// Bumped with every change of the structures that Python mirrors.
int64_t pdserve_kernels_abi() { return 8; }

// Whether the functions below are there, and whether they take 8- and 4-bit weights.
int64_t pdserve_has_tiles() { return HAS_TILES; }
int64_t pdserve_has_groups() { return HAS_GROUPS; }

#if HAS_TILES

// sums[i]: of span blocks[i] of a pool.
void pdserve_sum_spans(const char* pool, const int64_t* blocks, uint64_t* sums, int64_t count,
                       int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) sums[i] = sum_span(pool + blocks[i] * bytes, bytes);
}

// Span source[i] of another pool is copied to span target[i] of ours; sums[i] is what was copied.
void pdserve_take_spans(const char* theirs, const int64_t* source, char* ours,
                        const int64_t* target, uint64_t* sums, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = take_span(ours + target[i] * bytes, theirs + source[i] * bytes, bytes);
  }
  _mm_sfence();
}

// Of a number that enters a product: 2 for bfloat16, 4 for float.
int64_t pdserve_input_bytes() { return sizeof(Input); }

// out[rows, n] = x[rows, k] . linear, all bfloat16.
void pdserve_linear(const Linear* linear, const uint16_t* x, uint16_t* out, int64_t rows,
                    int64_t threads) {
  if (rows == 0) return;
  const int64_t k = linear->k, n = linear->n;
  const Cut cut(rows, panels(*linear), threads);
#if HAS_BF16_DOT
  const Input* a = x;
#else
  std::vector<float> wide(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) wide[i] = load(Bf16{x[i]});
  const Input* a = wide.data();
#endif
  with_team(threads, nullptr, [&](Team& team, bool) {
    int64_t stage = 0;
    GroupScratch scratch;
    team.share(stage, cut.pieces(), [&](int64_t piece) {
      prepare(*linear, a, k, cut.begin(piece), cut.end(piece), scratch);
      cut.walk(piece, [&](int64_t p, int64_t begin, int64_t end) {
        const int64_t count = std::min(PANEL, n - p * PANEL);
        panel_product(*linear, p, panel_of(*linear, p + 1), a, k, begin, end, scratch,
                      [&](int64_t row, const float* sums) {
                        uint16_t own[PANEL];
                        for (int64_t c = 0; c < PANEL; c += LANES) narrow(own + c, load(sums + c));
                        std::memcpy(out + row * n + p * PANEL, own, count * 2);
                      });
      });
    });
  });
}

void pdserve_decoder_step(const Decoder* decoder, const DecoderStep* step) {
  if (step->turn != nullptr) take_turn(*step->turn);
  with_team(step->step.threads, step->cores,
            [&](Team& team, bool first) { Pass(*decoder, *step, team, first).run(); });
  if (step->turn != nullptr) give_turn(*step->turn);
}

// As the step above does it; for tests.
void pdserve_take_turn(Turn* turn) { take_turn(*turn); }
void pdserve_give_turn(Turn* turn) { give_turn(*turn); }

#endif
}
