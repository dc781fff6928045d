#include "pool.hpp"

#include <algorithm>
#include <atomic>

#include "fault.hpp"
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace normkit {
namespace {

constexpr int64_t kMostShares = 64;

// Tasks low..high; `is_home` once a thread has begun with it.
struct alignas(64) Share {
  int64_t low, high;
  std::atomic<int64_t> taken;
  std::atomic<bool> is_home;
};

struct Work {
  Share shares[kMostShares];
  int64_t count;
  Order order;
  void (*task)(const void*, int64_t);
  const void* data;

  // The share that this thread started with last time, or the first without a thread.
  int64_t home() {
    static thread_local int64_t last = 0;
    if (last < count && !shares[last].is_home.exchange(true)) return last;
    for (int64_t k = 0; k < count; ++k) {
      if (!shares[k].is_home.exchange(true)) return last = k;
    }
    return 0;
  }
  void run() {
    const int64_t first = home();
    for (int64_t k = 0; k < count; ++k) {
      Share& share = shares[first + k < count ? first + k : first + k - count];
      const int64_t tasks = share.high - share.low;
      for (int64_t i; (i = share.taken.fetch_add(1)) < tasks;) {
        task(data, order == Order::kForwards ? share.low + i : share.high - 1 - i);
      }
    }
#if defined(__SSE__)
    _mm_sfence();  // what went past the caches, before another thread reads it
#endif
  }
};

}  // namespace

void run_tasks(int64_t tasks, int64_t threads, Order order,
               void (*task)(const void*, int64_t), const void* data) {
  Work work;
  work.count = std::min({threads, tasks, kMostShares});
  work.order = order;
  work.task = task;
  work.data = data;
  for (int64_t k = 0; k < work.count; ++k) {
    Share& share = work.shares[k];
    share.low = k * tasks / work.count;
    share.high = (k + 1) * tasks / work.count;
    share.taken.store(0);
    share.is_home.store(false);
  }
  if (planted("threads_lose_the_last_task")) --work.shares[work.count - 1].high;
  run_in_pool(
      work.count, [](void* all) { static_cast<Work*>(all)->run(); }, &work);
}

}  // namespace normkit
