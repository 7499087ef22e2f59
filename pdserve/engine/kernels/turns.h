// Engines of one host that each use all of its cores compute in turns, not at once.
//
// Two teams of threads on the same cores stop each other at every barrier, and a prompt of seconds
// takes half of the cores from the streams beside it, or they from it. Here one engine computes at a
// time, in the order of asking. Who has had its slice lets the next one in at the end of a layer. A
// decode step is shorter than that, so beside one other engine streams stand still for a slice and a
// layer at most.
//
// A turn is a matter of speed alone: whoever waited ``patience`` for each that was before it computes
// all the same. An engine that was stopped or killed in its turn, or while it waited for one, delays
// the others by some of that, once. turns.py gives out the places.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

namespace {

constexpr int64_t PLACES = 64;

struct Turns {  // shared by processes; all zero at first; mirrored in turns.py
  std::atomic<uint32_t> owner;  // its place + 1, or 0
  std::atomic<uint32_t> changes;
  std::atomic<int64_t> since[PLACES];  // when it began to wait, ns; 0: it does not
};
static_assert(std::atomic<int64_t>::is_always_lock_free);
static_assert(sizeof(Turns) == 8 + 8 * PLACES);

struct Turn {  // one engine's; mirrored in turns.py
  Turns* turns;
  int64_t place;
  int64_t slice;     // ns
  int64_t patience;  // ns
  int64_t began;     // ns, of the present turn
  int64_t waited;    // ns, all in all
  int64_t forced;    // turns that were taken without being given
  int64_t given;     // how often others were let in within a step
};

inline int64_t now_ns() {
  timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * int64_t(1000000000) + at.tv_nsec;
}

// How many others wait, and have since before ``before``. One who has waited for several times the
// patience is not there any more.
inline int64_t others_waiting(const Turn& turn, int64_t now, int64_t before) {
  int64_t count = 0;
  for (int64_t place = 0; place < PLACES; ++place) {
    const int64_t since = turn.turns->since[place].load();
    count += place != turn.place && since != 0 && since < before && now - since < 4 * turn.patience;
  }
  return count;
}

inline void wait_change(Turns& turns, uint32_t seen, int64_t most_ns) {
  const timespec most = {most_ns / 1000000000, most_ns % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&turns.changes), FUTEX_WAIT, seen, &most, nullptr,
          0);
}

inline void take_turn(Turn& turn) {
  Turns& turns = *turn.turns;
  const uint32_t mine = static_cast<uint32_t>(turn.place + 1);
  const int64_t asked = now_ns();
  turns.since[turn.place].store(asked);
  for (int64_t now = asked;; now = now_ns()) {
    const uint32_t seen = turns.changes.load();
    uint32_t nobody = 0;
    const int64_t ahead = others_waiting(turn, now, asked);
    if (ahead == 0 && turns.owner.compare_exchange_strong(nobody, mine)) break;
    const int64_t left = asked + turn.patience * (1 + ahead) - now;
    if (left <= 0) {
      turns.owner.store(mine);
      ++turn.forced;
      break;
    }
    // A place that nobody holds any more tells of no change: look again before long.
    wait_change(turns, seen, std::min<int64_t>(left, turn.patience / 8 + 1));
  }
  turns.since[turn.place].store(0);
  turn.began = now_ns();
  turn.waited += turn.began - asked;
}

inline void give_turn(Turn& turn) {
  Turns& turns = *turn.turns;
  uint32_t mine = static_cast<uint32_t>(turn.place + 1);
  turns.owner.compare_exchange_strong(mine, 0);  // unless somebody lost patience
  if (others_waiting(turn, now_ns(), INT64_MAX) == 0) return;
  turns.changes.fetch_add(1);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&turns.changes), FUTEX_WAKE, INT_MAX, nullptr,
          nullptr, 0);
}

// Whether the turn has lasted long enough for those who wait.
inline bool turn_is_over(const Turn& turn) {
  const int64_t now = now_ns();
  return now - turn.began >= turn.slice && others_waiting(turn, now, INT64_MAX) > 0;
}

}  // namespace
