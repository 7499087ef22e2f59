// Reading a long stretch of memory once, line by line.
//
// One core waits for memory more than it works: the processor fetches ahead along one stream and
// stops at each page's end. So while one piece is worked on, the next is fetched from its quarters in
// turn. Worth it only for what is not in a cache yet; it costs little for what is.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t PIECE = 16384;  // two fit the first cache: the one worked on and the one fetched
constexpr int64_t STREAMS = 4;

// Calls line(at) for at = 0, 64, ...: whole lines, in order. What is fetched may reach some lines
// past the end: fetching never faults.
template <class Line>
inline void each_line(const char* from, int64_t bytes, Line line) {
  for (int64_t begin = 0; begin < bytes; begin += PIECE) {
    const int64_t end = std::min(begin + PIECE, bytes);
    const char* next = from + end;
    const int64_t stride = (std::min(PIECE, bytes - end) / STREAMS + LINE - 1) / LINE * LINE;
    int64_t at = begin;
    for (int64_t row = 0; row < stride && at + STREAMS * LINE <= end; row += LINE) {
      for (int64_t stream = 0; stream < STREAMS; ++stream, at += LINE) {
        __builtin_prefetch(next + stream * stride + row);
        line(at);
      }
    }
    for (; at + LINE <= end; at += LINE) line(at);
  }
}

}  // namespace
