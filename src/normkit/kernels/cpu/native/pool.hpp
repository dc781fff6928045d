// Tasks on the thread pool that torch already runs.
//
// A second OpenMP pool would compete with torch's for the same cores, so the library
// links to none: the caller hands over the GOMP_parallel that torch uses. Results never
// depend on the number of threads: what a task computes is fixed by the geometry, and
// partial results are added in the order of the tasks.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "fault.hpp"

namespace normkit {

// Runs body(data) once in each of `threads` threads; serially in a forked child, whose
// pool has lost its threads.
void run_in_pool(int64_t threads, void (*body)(void*), void* data);

template <class Task>
void parallel_for(int64_t tasks, int64_t threads, const Task& task) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Task* task;
  } shared;
  shared.tasks = tasks;
  shared.task = &task;
  run_in_pool(
      std::min(threads, tasks),
      [](void* data) {
        auto& all = *static_cast<Shared*>(data);
        const int lost = planted("threads_lose_the_last_task");
        for (int64_t i; (i = all.next.fetch_add(1)) < all.tasks - lost;) (*all.task)(i);
      },
      &shared);
}

}  // namespace normkit
