#include "saved.hpp"

#include <cmath>
#include <vector>

#include "fault.hpp"

namespace normkit {
namespace {

// Squares of float32 up to here do not overflow when they are summed.
constexpr double kMostVar = 1e30;

// The worst verdict so far; written so that a NaN anywhere is no fit.
class Worst {
 public:
  explicit Worst(const Saved& saved)
      : fit_(saved.bound * saved.bound), most_(saved.most * saved.most) {}
  void take(double mean, double precision) {
    const double offset = mean * mean * precision;
    is_fit_ &= offset <= fit_;
    is_to_mend_ &= (offset <= most_) & (precision > 1 / kMostVar);
  }
  void mend() { is_fit_ = false; }
  Verdict verdict() const {
    if (planted("what_torch_saved_always_fits")) return kFit;
    return !is_to_mend_ ? kUnfit : is_fit_ ? kFit : kToMend;
  }

 private:
  double fit_, most_;
  bool is_fit_ = true, is_to_mend_ = true;
};

// Around 0: of few values, where the mean is not far, no digit is lost that counts.
Verdict judge_input(const Saved& saved) {
  Worst worst(saved);
  const float* x = saved.mean;
  for (int64_t k = 0; k < saved.statistics; ++k, x += saved.count) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < saved.count; ++i) {
      const double value = x[i];
      sum += value;
      square += value * value;
    }
    const double mean = sum / (double)saved.count;
    const double var = square / (double)saved.count - mean * mean;
    worst.take(mean, 1 / ((var < 0 ? 0 : var) + saved.eps));
  }
  return worst.verdict();
}

template <class Mean, class Var>
void move_running(const Saved& saved, const Mean& mean, const Var& var) {
  if (!saved.running_mean) return;
  const double rate = saved.flags & kSharesAlike
                          ? 1 / ((double)*saved.num_batches_tracked + 1)
                          : saved.rate;
  const double n = (double)saved.count;
  const double unbiased = n / (n - (planted("the_saved_variance_is_biased") ? 0 : 1));
  for (int64_t k = 0; k < saved.statistics; ++k) {
    float &old_mean = saved.running_mean[k], &old_var = saved.running_var[k];
    old_mean = (float)((1 - rate) * old_mean + rate * mean(k));
    old_var = (float)((1 - rate) * old_var + rate * unbiased * var(k));
  }
  if (saved.num_batches_tracked) ++*saved.num_batches_tracked;
}

}  // namespace

Verdict judge(const Saved& saved) {
  if (!(saved.eps > 0 && saved.eps < 1)) return kUnfit;
  // A tensor without values of its own has no address.
  if (saved.flags & kIsInput) return saved.mean ? judge_input(saved) : kUnfit;
  if (!saved.inv_std || (saved.running_mean && !saved.mean)) return kUnfit;
  Worst worst(saved);
  const auto precision = [&](int64_t k) {
    const double found = saved.inv_std[k];
    return saved.flags & kIsVar ? 1 / (found + saved.eps) : found * found;
  };
  for (int64_t k = 0; k < saved.statistics; ++k) {
    worst.take(saved.mean ? saved.mean[k] : 0, precision(k));
    // A variance below eps cannot be told from what was saved.
    if (saved.running_mean && !(precision(k) * saved.eps < 0.5)) worst.mend();
  }
  const Verdict verdict = worst.verdict();
  if (verdict == kFit) {
    move_running(
        saved, [&](int64_t k) { return (double)saved.mean[k]; },
        [&](int64_t k) { return 1 / precision(k) - saved.eps; });
  }
  return verdict;
}

Verdict mend(const Mend& mend, const Kernels& kernels) {
  const Saved& saved = mend.saved;
  Call call = mend.call;
  const int64_t n = saved.statistics;
  std::vector<double> center(n), scale(n), m2(n);
  call.center = center.data();
  call.scale = scale.data();
  if (saved.flags & kIsVar) {
    call.flags |= kGiven;
    for (int64_t k = 0; k < n; ++k) {
      center[k] = saved.mean[k];
      scale[k] = 1 / std::sqrt((double)saved.inv_std[k] + call.eps);
    }
    kernels.forward(call);
    return kFit;
  }
  call.m2 = m2.data();
  kernels.forward(call);
  Worst worst(saved);
  for (int64_t k = 0; k < n; ++k) worst.take(center[k], scale[k] * scale[k]);
  if (worst.verdict() == kUnfit) return kUnfit;
  if (!planted("what_torch_saved_stays")) {
    for (int64_t k = 0; k < n; ++k) {
      saved.mean[k] = (float)center[k];
      saved.inv_std[k] = (float)scale[k];
    }
  }
  move_running(
      saved, [&](int64_t k) { return center[k]; },
      [&](int64_t k) { return m2[k] / (double)saved.count; });
  return kFit;
}

}  // namespace normkit
