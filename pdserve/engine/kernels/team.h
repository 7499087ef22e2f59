// Threads that go through the stages of one step together.
//
// All threads call the same stages in the same order. The pieces of a stage are taken one by one
// from a shared counter, so that a thread that was interrupted does not hold up the others, and a
// stage ends with a barrier. Waiting spins briefly, then gives the core away: stages are short, but
// threads may outnumber the cores.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
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

 private:
  static constexpr int SPINS = 4000;

  void wait(int64_t stage) {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_ * stage) {
      next_.store(0, std::memory_order_relaxed);  // everybody has arrived, nobody has passed
      passed_.store(stage, std::memory_order_release);
      return;
    }
    for (int spins = 0; passed_.load(std::memory_order_acquire) < stage; ++spins) {
      if (spins < SPINS) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

  const int64_t size_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> passed_{0};
};

// Runs body(team) on ``threads`` threads.
template <class Body>
void with_team(int64_t threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
    Team* team = nullptr;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
#pragma omp single
      team = new Team(omp_get_num_threads());
      body(*team);
    }
    delete team;
    return;
  }
#endif
  Team alone(1);
  body(alone);
}

}  // namespace
