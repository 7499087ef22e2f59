// Spans of KV in host memory: their checksums, and copies of them into another pool.
//
// A copy's checksum is made of what was loaded to be stored: what lies in the target is what was
// summed, whoever writes to the source meanwhile. Stores go past the caches, as a plain store
// fetches its line from memory first, and what they write is read by the next step at the soonest.
// Spans: whole lines, more than 240 bytes; those that are written to begin at the start of a line.
#pragma once

#include "fetch.h"
#include "xxh3.h"

#if HAS_TILES

namespace {

static_assert(STRIPE == LINE);

// A compiler may load twice what it thinks nobody changes; not through this.
inline Stripe load_once(const char* from) {
  Stripe stripe = load_stripe(from);
  for (Lanes& part : stripe.parts) asm volatile("" : "+v"(part));
  return stripe;
}

inline void store_past_caches(char* to, const Stripe& stripe) {
#if HAS_AVX512
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)stripe.parts[0]);
#else
  for (int64_t i = 0; i < Stripe::PARTS; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, (__m256i)stripe.parts[i]);
  }
#endif
}

inline uint64_t sum_span(const char* from, int64_t bytes) {
  Xxh3 sum;
  const int64_t last = bytes - STRIPE;
  each_line(from, last, [&](int64_t at) { sum.add(load_stripe(from + at)); });
  return sum.end(load_stripe(from + last), bytes);
}

// The stores are seen by others after ``_mm_sfence``.
inline uint64_t take_span(char* to, const char* from, int64_t bytes) {
  Xxh3 sum;
  const int64_t last = bytes - STRIPE;
  each_line(from, last, [&](int64_t at) {
    const Stripe stripe = load_once(from + at);
    sum.add(stripe);
    store_past_caches(to + at, stripe);
  });
  const Stripe stripe = load_once(from + last);
  store_past_caches(to + last, stripe);
  return sum.end(stripe, bytes);
}

}  // namespace

#endif
