#define NK_ISA baseline
#include "running.hpp"

#include "statistics.hpp"

namespace normkit {
namespace {

using namespace baseline;

template <class Body> void with_type(int64_t dtype, void* p, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(static_cast<float*>(p));
    case kBFloat16: return body(static_cast<bf16*>(p));
    case kFloat16: return body(static_cast<fp16*>(p));
    default: return body(static_cast<double*>(p));
  }
}

}  // namespace

bool move_running(const Update& update) {
  const int64_t n = update.channels;
  bool is_finite = true;
  for (int64_t k = 0; k < n; ++k) {
    is_finite &= std::isfinite(update.mean[k]) & std::isfinite(update.m2[k]);
  }
  is_finite |= planted("a_nan_moves_the_running_statistics");
  if (!is_finite && (update.flags & kSkipNonfinite)) {
    if (update.num_batches_skipped) ++*update.num_batches_skipped;
    return false;
  }
  const double rate = update.flags & kEqualShares
                          ? 1 / ((double)*update.num_batches_tracked + 1)
                          : update.rate;
  const int64_t step = update.flags & kCountEach ? 1 : 0;
  bool has_value = false;
  for (int64_t k = 0; k < n; ++k) has_value |= update.count[k * step] > 0;
  if (update.running_mean) {
    with_type(update.mean_dtype, update.running_mean, [&](auto* running) {
      for (int64_t k = 0; k < n; ++k) {
        if (update.count[k * step] < 1) continue;
        from_double((1 - rate) * to_double(running[k]) + rate * update.mean[k],
                    running + k);
      }
    });
  }
  if (update.running_var) {
    const double less = planted("the_running_variance_is_biased") ? 0 : 1;
    with_type(update.var_dtype, update.running_var, [&](auto* running) {
      for (int64_t k = 0; k < n; ++k) {
        const double count = (double)update.count[k * step];
        if (count < 2) continue;
        const double var = update.m2[k] / (count - less);
        from_double((1 - rate) * to_double(running[k]) + rate * var, running + k);
      }
    });
  }
  if (update.num_batches_tracked && has_value) ++*update.num_batches_tracked;
  return is_finite;
}

void read_running(const void* running_mean, int64_t mean_dtype, const void* running_var,
                  int64_t var_dtype, int64_t channels, double eps, double* center,
                  double* scale) {
  with_type(mean_dtype, const_cast<void*>(running_mean), [&](const auto* mean) {
    for (int64_t k = 0; k < channels; ++k) center[k] = to_double(mean[k]);
  });
  with_type(var_dtype, const_cast<void*>(running_var), [&](const auto* var) {
    for (int64_t k = 0; k < channels; ++k) scale[k] = 1 / std::sqrt(to_double(var[k]) + eps);
  });
}

}  // namespace normkit
