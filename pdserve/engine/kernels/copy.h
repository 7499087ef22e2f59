// Copying a span of KV into a pool without fetching the lines that it overwrites.
//
// A plain store fetches its line from memory first, so a copy moves three lines where two would do.
// These stores go past the caches: what they write is read by the next step at the soonest. What is
// read passes through the cache, where a checksum finds it right after.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

#ifdef __SSE2__

constexpr int64_t LINE = 64;
// Bytes that are fetched ahead of the copy: the processor itself stops at each page's end.
constexpr int64_t FETCHED_AHEAD = 4096;

inline void copy_past_caches(char* to, const char* from, int64_t bytes) {
  const int64_t head = std::min(bytes, -reinterpret_cast<int64_t>(to) & (LINE - 1));
  std::memcpy(to, from, head);
  int64_t at = head;
  for (; at + LINE <= bytes; at += LINE) {
    if (at + FETCHED_AHEAD < bytes) _mm_prefetch(from + at + FETCHED_AHEAD, _MM_HINT_T0);
    for (int64_t part = at; part < at + LINE; part += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
    }
  }
  std::memcpy(to + at, from + at, bytes - at);
  _mm_sfence();  // the stores are seen before whatever tells of them
}

#else

inline void copy_past_caches(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, bytes);
}

#endif

}  // namespace
