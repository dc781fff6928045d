#define NK_ISA baseline
#include "running.hpp"

#include "statistics.hpp"

namespace normkit {
namespace {

using namespace baseline;

template <class T>
void move(T* running, int64_t k, double rate, double value) {
  const double old = to_double(running[k]);
  from_double((1 - rate) * old + rate * value, running + k);
}
void move(void* running, int64_t dtype, int64_t k, double rate, double value) {
  switch (dtype) {
    case kFloat32: return move(static_cast<float*>(running), k, rate, value);
    case kBFloat16: return move(static_cast<bf16*>(running), k, rate, value);
    case kFloat16: return move(static_cast<fp16*>(running), k, rate, value);
    default: return move(static_cast<double*>(running), k, rate, value);
  }
}

}  // namespace

void move_running(const Update& update) {
  const int64_t n = update.channels;
  bool is_finite = true;
  for (int64_t k = 0; k < n; ++k) {
    is_finite &= std::isfinite(update.mean[k]) & std::isfinite(update.m2[k]);
  }
  is_finite |= planted("a_nan_moves_the_running_statistics");
  *update.is_finite = is_finite;
  if (!is_finite && (update.flags & kSkipNonfinite)) return;
  const double rate = update.flags & kEqualShares
                          ? 1 / ((double)*update.num_batches_tracked + 1)
                          : update.rate;
  bool has_value = false;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t count = update.count[update.flags & kCountEach ? k : 0];
    has_value |= count > 0;
    if (update.running_mean && count > 0) {
      move(update.running_mean, update.mean_dtype, k, rate, update.mean[k]);
    }
    if (update.running_var && count > 1) {
      const double less = planted("the_running_variance_is_biased") ? 0 : 1;
      const double var = update.m2[k] / ((double)count - less);
      move(update.running_var, update.var_dtype, k, rate, var);
    }
  }
  if (update.num_batches_tracked && has_value) ++*update.num_batches_tracked;
}

}  // namespace normkit
