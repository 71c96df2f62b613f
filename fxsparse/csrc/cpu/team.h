// Threads that work through phases together, each phase begun when the one before is done.
//
// A fork and join for every phase costs some microseconds, which is what a small convolution takes. So there is one
// fork, and threads wait for each other by looking at a counter. No thread is needed: each takes what nobody has taken
// yet, its own share first, so that the work ends however few threads the pool gives, as within another parallel loop.
#pragma once

#include <atomic>
#include <cstdint>

namespace fxsparse {

class Team {
public:
  // `memory`: of bytes(), zeroed. A phase has so many items at most.
  Team(void *memory, int64_t phases, int64_t items, int64_t workers)
      : done_(static_cast<uint32_t *>(memory)), taken_(reinterpret_cast<uint8_t *>(done_ + phases)), most_items_(items),
        workers_(workers) {}

  static int64_t bytes(int64_t phases, int64_t items) { return phases * (int64_t(sizeof(uint32_t)) + items); }

  // Calls body(item) for items [0, items) that no other thread has taken, and returns when all are done. Neighbours go
  // to one thread, as far as all are equally fast.
  template <class Body> void run(int64_t phase, int64_t items, int64_t me, const Body &body) {
    std::atomic_ref<uint32_t> done(done_[phase]);
    for (int64_t i = 0; i < items; ++i) {
      const int64_t item = (items * me / workers_ + i) % items;
      std::atomic_ref<uint8_t> taken(taken_[phase * most_items_ + item]);
      if (taken.load(std::memory_order_relaxed) || taken.exchange(1, std::memory_order_relaxed))
        continue;
      body(item);
      done.fetch_add(1, std::memory_order_acq_rel);
      done.notify_all();
    }
    int64_t spins = 0;
    for (uint32_t seen; (seen = done.load(std::memory_order_acquire)) < items;)
      if (++spins < kSpins)
        pause();
      else // others need the core
        done.wait(seen, std::memory_order_acquire);
  }

private:
  static constexpr int64_t kSpins = 4096; // some tens of microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  uint32_t *const done_;
  uint8_t *const taken_;
  const int64_t most_items_, workers_;
};

} // namespace fxsparse
