// The C interface: one struct in, a status out. 0 is success, 1 a dtype that is not
// known, 2 no memory for working vectors.
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <new>

#include "kernels.hpp"
#include "library.hpp"
#include "pages.hpp"
#include "pool.hpp"
#include "ranks.hpp"
#include "running.hpp"
#include "scratch.hpp"

#define NK_PUBLIC extern "C" __attribute__((visibility("default")))

NK_DECLARE(baseline)
#if defined(NK_WITH_AVX2)
NK_DECLARE(avx2)
#endif
#if defined(NK_WITH_AVX512)
NK_DECLARE(avx512)
#endif

namespace normkit {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<Parallel> parallel{nullptr};
std::atomic<bool> is_forked{false};

struct Isa {
  const char* name;
  bool (*is_supported)();
  const Kernels* of_dtype[4];
};

#define NK_ISA_ENTRY(isa, supported)                         \
  {#isa, [] { return bool(supported); },                     \
   {&isa::float32, &isa::bfloat16, &isa::float16, &isa::float64}}

// Best first.
const Isa kIsas[] = {
#if defined(NK_WITH_AVX512)
    NK_ISA_ENTRY(avx512,
                 __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq")),
#endif
#if defined(NK_WITH_AVX2)
    NK_ISA_ENTRY(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c")),
#endif
    NK_ISA_ENTRY(baseline, true),
};

const Isa* best() {
  const Isa* isa = kIsas;
  while (!isa->is_supported()) ++isa;  // the last one always is
  return isa;
}
std::atomic<const Isa*> chosen{best()};

int64_t size_of(int64_t dtype) {
  return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : 2;
}

int run(const void* packed, void (*Kernels::*kernel)(const Call&)) {
  const Call& call = *static_cast<const Call*>(packed);
  if (call.dtype < kFloat32 || call.dtype > kFloat64) return 1;
  const int64_t bytes = call.statistics() * call.values() * size_of(call.dtype);
  for (void* output : {call.y, call.dx, call.dresidual, call.sum}) prefer_large_pages(output, bytes);
  try {
    (chosen.load()->of_dtype[call.dtype]->*kernel)(call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

// Holds statistics that the caller does not keep; reads and updates running ones.
int forward(const void* packed) try {
  Call call = *static_cast<const Call*>(packed);
  const int64_t n = call.statistics();
  const bool moves = !call.has(kGiven) && (call.running_mean || call.running_var);
  const bool counts = moves && call.mask && !call.count;
  const Scratch<double> kept(call.center ? 0 : 2 * n), spread(moves && !call.m2 ? n : 0);
  const Scratch<int64_t> count(counts ? n : 0);
  if (!call.center) {
    call.center = kept.data();
    call.scale = kept.data() + n;
  }
  if (moves && !call.m2) call.m2 = spread.data();
  if (counts) call.count = count.data();
  if (call.has(kGiven) && call.running_mean) {
    read_running(call.running_mean, call.mean_dtype, call.running_var, call.var_dtype, n,
                 call.eps, call.center, call.scale);
  }
  if (const int status = run(&call, &Kernels::forward)) return status;
  if (moves) {
    const int64_t values = call.values();
    move_running({n, call.mean_dtype, call.var_dtype,
                  (call.flags & ((int64_t)kSkipNonfinite | kEqualShares)) |
                      (call.mask ? (int64_t)kCountEach : 0),
                  call.rate, call.center, call.m2, call.mask ? call.count : &values,
                  call.running_mean, call.running_var, call.num_batches_tracked,
                  call.num_batches_skipped});
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 2;
}

// dx from sums over dy that are those of all ranks, as `count` is.
int gradient_over_ranks(const void* packed) try {
  Call call = *static_cast<const Call*>(packed);
  const int64_t n = call.statistics();
  const Scratch<double> slopes(2 * n);
  double *b = slopes.data(), *c = b + n;
  for (int64_t k = 0; k < n; ++k) {
    const double count = (double)(call.count[k] > 0 ? call.count[k] : 1), s = call.scale[k];
    b[k] = -s * s * s * call.sum_dyx[k] / count;
    c[k] = -s * call.sum_dy[k] / count;
  }
  call.b = b;
  call.c = c;
  return run(&call, &Kernels::apply_grads);
} catch (const std::bad_alloc&) {
  return 2;
}

}  // namespace

void run_in_pool(int64_t threads, void (*body)(void*), void* data) {
  const Parallel run = parallel.load();
  if (!run || is_forked.load()) return body(data);
  run(body, data, (unsigned)threads, 0);
}

}  // namespace normkit

NK_PUBLIC int normkit_forward(const void* call) { return normkit::forward(call); }
NK_PUBLIC int normkit_backward(const void* call) {
  return normkit::run(call, &normkit::Kernels::backward);
}
NK_PUBLIC int normkit_apply_grads(const void* call) {
  return normkit::run(call, &normkit::Kernels::apply_grads);
}

NK_PUBLIC int normkit_gradient_over_ranks(const void* call) {
  return normkit::gradient_over_ranks(call);
}

NK_PUBLIC int normkit_pack_for_ranks(const void* ranks) {
  normkit::pack_for_ranks(*static_cast<const normkit::Ranks*>(ranks));
  return 0;
}
// 1 if the statistics have lost digits.
NK_PUBLIC int normkit_finish_from_ranks(const void* ranks) {
  return normkit::finish_from_ranks(*static_cast<const normkit::Ranks*>(ranks));
}

// 1 if every statistic of the batch was finite.
NK_PUBLIC int normkit_move_running(const void* update) {
  return normkit::move_running(*static_cast<const normkit::Update*>(update));
}

// Bytes of the structs that the caller has to pack.
NK_PUBLIC int normkit_call_size() { return (int)sizeof(normkit::Call); }
NK_PUBLIC int normkit_update_size() { return (int)sizeof(normkit::Update); }
NK_PUBLIC int normkit_ranks_size() { return (int)sizeof(normkit::Ranks); }

// The flags of a call that these sources know: a library without a new one would read past
// the end of what it is given.
NK_PUBLIC int normkit_known_flags() { return normkit::kKnownFlags; }

// Sets torch's pool: its GOMP_parallel, or null to stay serial.
NK_PUBLIC void normkit_set_pool(void* gomp_parallel) {
  static std::atomic<bool> is_watching{false};
  if (!is_watching.exchange(true)) {
    pthread_atfork(nullptr, nullptr, [] { normkit::is_forked.store(true); });
  }
  normkit::parallel.store(reinterpret_cast<normkit::Parallel>(gomp_parallel));
}

// The name of the k-th instruction set that this machine has, best first, or null.
NK_PUBLIC const char* normkit_isa_name(int k) {
  for (const normkit::Isa& isa : normkit::kIsas) {
    if (isa.is_supported() && k-- == 0) return isa.name;
  }
  return nullptr;
}
NK_PUBLIC const char* normkit_chosen_isa() { return normkit::chosen.load()->name; }
NK_PUBLIC int normkit_choose_isa(const char* name) {
  for (const normkit::Isa& isa : normkit::kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.is_supported()) {
      normkit::chosen.store(&isa);
      return 0;
    }
  }
  return 1;
}
