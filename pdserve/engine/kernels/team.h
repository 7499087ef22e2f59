// Threads that go through the stages of one step together.
//
// All threads call the same stages in the same order. The pieces of a stage are taken one by one
// from a shared counter, so that a thread that was interrupted does not hold up the others, and a
// stage ends with a barrier. Waiting spins, since stages are short; then it yields, since threads may
// outnumber the cores; then it sleeps, so that a thread that is held up costs the others no core. While
// the first thread waits for something else (turns.h), the others sleep at once.
#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  // Calls work(i) for every i in [0, count), each by one of the threads, and waits for all.
  // ``stage`` counts this thread's stages and starts at 0.
  template <class Work>
  void share(int64_t& stage, int64_t count, Work work) {
    for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      work(i);
    }
    wait(++stage);
  }

  // Said by the thread that is about to be away for long, and when it is back.
  void rest(bool on) { resting_.store(on, std::memory_order_relaxed); }

 private:
  static constexpr int SPINS = 4000;
  static constexpr int YIELDS = 4000;

  void wait(int64_t stage) {
    const uint32_t goal = static_cast<uint32_t>(stage);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_ * stage) {
      next_.store(0, std::memory_order_relaxed);  // everybody has arrived, nobody has passed
      passed_.store(goal);
      // In one total order with a sleeper's two steps: it is counted here, or sees the store there.
      if (sleepers_.load() > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
      return;
    }
    // A thread is never more than one stage behind, so equality is enough.
    for (int tries = 0; passed_.load(std::memory_order_acquire) != goal; ++tries) {
      if (resting_.load(std::memory_order_relaxed)) tries = SPINS + YIELDS;
      if (tries < SPINS) {
        _mm_pause();
      } else if (tries < SPINS + YIELDS) {
        sched_yield();
      } else {
        sleepers_.fetch_add(1);
        if (passed_.load() != goal) futex(FUTEX_WAIT_PRIVATE, goal - 1);
        sleepers_.fetch_sub(1);
      }
    }
  }

  // Waits while ``passed_`` is ``value``, or wakes ``value`` sleepers.
  void futex(int operation, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&passed_), operation, value, nullptr, nullptr, 0);
  }

  const int64_t size_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> passed_{0};  // the low half of the stage that all have passed
  alignas(64) std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> resting_{false};
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
};

// A helper keeps to one core from its first step on. Two threads that the system puts on one core wait
// for each other at every stage, while the other core idles.
inline void keep_to(int32_t core) {
  static thread_local int32_t kept = -1;
  if (kept == core) return;
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(core, &own);
  if (sched_setaffinity(0, sizeof(own), &own) == 0) kept = core;
}

// The first thread keeps to one core for a step alone: what it starts between steps, among that the
// runtime's new helpers, has all cores.
class KeptForNow {
 public:
  explicit KeptForNow(int32_t core) {
    if (sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    cpu_set_t own;
    CPU_ZERO(&own);
    CPU_SET(core, &own);
    kept_ = sched_setaffinity(0, sizeof(own), &own) == 0;
  }
  ~KeptForNow() {
    if (kept_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  KeptForNow(const KeptForNow&) = delete;
  KeptForNow& operator=(const KeptForNow&) = delete;

 private:
  cpu_set_t before_;
  bool kept_ = false;
};

// Runs body(team, first) on ``threads`` threads, of which one is the first; ``cores``: one for each
// of them, or null.
template <class Body>
void with_team(int64_t threads, const int32_t* cores, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
    Team* team = nullptr;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp single
      team = new Team(omp_get_num_threads());
      const int thread = omp_get_thread_num();
      if (cores != nullptr && thread > 0) keep_to(cores[thread]);
      if (cores != nullptr && thread == 0) {
        const KeptForNow kept(cores[0]);
        body(*team, true);
      } else {
        body(*team, thread == 0);
      }
    }
    delete team;
    return;
  }
#endif
  Team alone(1);
  body(alone, true);
}

}  // namespace
