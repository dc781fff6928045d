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

bool settle(const Saved& saved) {
  const int64_t n = saved.statistics;
  for (int64_t k = 0; k < n; ++k) {
    if (planted("what_torch_saved_always_fits")) break;
    // Written so that a NaN anywhere is no fit.
    const double mean = saved.mean ? saved.mean[k] : 0;
    const double precision = saved.var ? 1 / (saved.var[k] + saved.eps)
                                       : (double)saved.inv_std[k] * saved.inv_std[k];
    if (!(mean * mean * precision <= saved.bound * saved.bound)) return false;
    if (!(precision > 1e-30)) return false;
    // A variance below eps cannot be told from what was saved.
    if (saved.running_var && !(precision * saved.eps < 0.5)) return false;
  }
  if (!saved.running_mean) return true;
  const double rate = saved.flags & kEqualShares
                          ? 1 / ((double)*saved.num_batches_tracked + 1)
                          : saved.rate;
  const double less = planted("the_saved_variance_is_biased") ? 0 : 1;
  const double unbiased = saved.count / ((double)saved.count - less);
  for (int64_t k = 0; k < n; ++k) {
    const double precision = (double)saved.inv_std[k] * saved.inv_std[k];
    const double var = (1 / precision - saved.eps) * unbiased;
    move(saved.running_mean, saved.mean_dtype, k, rate, saved.mean[k]);
    move(saved.running_var, saved.var_dtype, k, rate, var);
  }
  if (saved.num_batches_tracked) ++*saved.num_batches_tracked;
  return true;
}

}  // namespace normkit
