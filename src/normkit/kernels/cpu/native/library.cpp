// The C interface: one struct in, a status out; 0 is success.
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <new>

#include "kernels.hpp"
#include "pool.hpp"

namespace normkit {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<Parallel> parallel{nullptr};
std::atomic<bool> is_forked{false};

struct Isa {
  const char* name;
  int (*forward)(const Call&);
  int (*backward)(const Call&);
  int (*apply_grads)(const Call&);
  bool (*is_supported)();
};

#define NK_ISA_ENTRY(isa, supported) \
  {#isa, isa::forward, isa::backward, isa::apply_grads, [] { return supported; }}

// Best first.
const Isa kIsas[] = {
#if defined(NK_WITH_AVX512)
    NK_ISA_ENTRY(avx512, bool(__builtin_cpu_supports("avx512f") &&
                              __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq"))),
#endif
#if defined(NK_WITH_AVX2)
    NK_ISA_ENTRY(avx2, bool(__builtin_cpu_supports("avx2") &&
                            __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("f16c"))),
#endif
    NK_ISA_ENTRY(baseline, true),
};

const Isa* best() {
  for (const Isa& isa : kIsas) {
    if (isa.is_supported()) return &isa;
  }
  return nullptr;  // not reached: the last one always is
}
std::atomic<const Isa*> chosen{best()};

template <class F> int guarded(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

}  // namespace

void run_in_pool(int64_t threads, void (*body)(void*), void* data) {
  const Parallel run = parallel.load();
  if (!run || is_forked.load()) return body(data);
  run(body, data, (unsigned)threads, 0);
}

}  // namespace normkit

extern "C" {

__attribute__((visibility("default"))) int normkit_forward(const void* call) {
  return normkit::guarded([&] {
    return normkit::chosen.load()->forward(*static_cast<const normkit::Call*>(call));
  });
}
__attribute__((visibility("default"))) int normkit_backward(const void* call) {
  return normkit::guarded([&] {
    return normkit::chosen.load()->backward(*static_cast<const normkit::Call*>(call));
  });
}
__attribute__((visibility("default"))) int normkit_apply_grads(const void* call) {
  return normkit::guarded([&] {
    return normkit::chosen.load()->apply_grads(
        *static_cast<const normkit::Call*>(call));
  });
}

// Bytes of the struct that the caller has to pack.
__attribute__((visibility("default"))) int normkit_call_size() {
  return (int)sizeof(normkit::Call);
}

// The pool of torch: its GOMP_parallel, or null to stay serial.
__attribute__((visibility("default"))) void normkit_set_pool(void* gomp_parallel) {
  static std::atomic<bool> is_watching{false};
  if (!is_watching.exchange(true)) {
    pthread_atfork(nullptr, nullptr, [] { normkit::is_forked.store(true); });
  }
  normkit::parallel.store(reinterpret_cast<normkit::Parallel>(gomp_parallel));
}

// The name of the k-th instruction set that this machine has, best first, or null.
__attribute__((visibility("default"))) const char* normkit_isa_name(int k) {
  for (const normkit::Isa& isa : normkit::kIsas) {
    if (isa.is_supported() && k-- == 0) return isa.name;
  }
  return nullptr;
}
__attribute__((visibility("default"))) const char* normkit_chosen_isa() {
  return normkit::chosen.load()->name;
}
__attribute__((visibility("default"))) int normkit_choose_isa(const char* name) {
  for (const normkit::Isa& isa : normkit::kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.is_supported()) {
      normkit::chosen.store(&isa);
      return 0;
    }
  }
  return 1;
}

}  // extern "C"
