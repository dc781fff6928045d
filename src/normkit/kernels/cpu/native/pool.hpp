// Tasks on the thread pool that torch already runs.
//
// A second OpenMP pool would compete with torch's for the same cores, so the library
// links to none: the caller passes the GOMP_parallel that torch uses. Results never depend
// on the number of threads: the geometry fixes the tasks, and partial results are added in
// their order.
#pragma once
#include <algorithm>
#include <cstdint>

namespace normkit {

// Runs body(data) once in each of `threads` threads, or of fewer; serially in a forked
// child, whose pool has lost its threads.
void run_in_pool(int64_t threads, void (*body)(void*), void* data);

enum class Order { kForwards, kBackwards };

// task(data, k) for each k < tasks. A thread starts with the same share of the tasks each
// time, and then steals from the others: a second pass over the same values, from the last
// to the first, finds them in the cache of its own core.
void run_tasks(int64_t tasks, int64_t threads, Order order,
               void (*task)(const void*, int64_t), const void* data);

template <Order order = Order::kForwards, class Task>
void parallel_for(int64_t tasks, int64_t threads, const Task& task) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t k = 0; k < tasks; ++k) {
      task(order == Order::kForwards ? k : tasks - 1 - k);
    }
    return;
  }
  run_tasks(
      tasks, threads, order,
      [](const void* data, int64_t k) { (*static_cast<const Task*>(data))(k); }, &task);
}
template <class Task>
void parallel_backwards(int64_t tasks, int64_t threads, const Task& task) {
  parallel_for<Order::kBackwards>(tasks, threads, task);
}

}  // namespace normkit
